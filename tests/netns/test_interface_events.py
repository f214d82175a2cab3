"""The picture of a node's links follows the kernel, event by event, under the loop the agent uses."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator

import pytest
import uvloop
from packet_lab import inside, require, run

from dataplane.addresses import parse_address
from dataplane.model import Key
from dataplane.node.interfaces import Interfaces, Kind, Placement, host_veth_name, locate, own_node_addresses

pytestmark = pytest.mark.netns
POD = Key("x", "a")
ENI = host_veth_name(POD, "eni")
ADDRESS, ADDRESS6 = parse_address("10.98.0.5"), parse_address("fd98::5")


@pytest.fixture(scope="module")
def spaces() -> Iterator[list[str]]:
    made: list[str] = []
    yield made
    for name in made:
        run("ip", "netns", "del", name)


@pytest.fixture
def node(spaces: list[str]) -> str:
    require()
    name = f"pgi{os.getpid()}-{len(spaces)}"
    run("ip", "netns", "add", name)
    spaces.append(name)
    return name


@contextlib.asynccontextmanager
async def following() -> AsyncIterator[Interfaces]:
    interfaces = Interfaces()
    await interfaces.start()
    try:
        yield interfaces
    finally:
        await interfaces.stop()


def here(node: str, body: Callable[[], Coroutine[object, object, None]]) -> None:
    with inside(node):
        uvloop.run(body())


async def becomes(interfaces: Interfaces, wanted: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not wanted():
            await interfaces.wait_change()


def place(interfaces: Interfaces, *addresses: bytes) -> Placement | None:
    return locate(POD, addresses or (ADDRESS,), interfaces.state, "eni")


def add_veth(name: str, *more: str) -> None:
    run("ip", "link", "add", name, "type", "veth", "peer", "name", f"p{name[:9]}")
    run("ip", "link", "set", f"p{name[:9]}", "up")
    run("ip", "link", "set", name, "up", *more)


def mac(space: str) -> str:
    return run("ip", "-n", space, "-o", "link", "show", "dev", "eth0").split("link/ether ")[1].split()[0]


def test_an_interface_appears_is_renamed_and_vanishes(node: str) -> None:
    async def body() -> None:
        async with following() as interfaces:
            assert place(interfaces) is None
            add_veth("plain")
            run("ip", "link", "set", "plain", "down")
            run("ip", "link", "set", "plain", "name", ENI)
            await becomes(interfaces, lambda: place(interfaces) is not None)
            found = place(interfaces)
            assert found is not None
            assert (found.name, found.kind) == (ENI, Kind.ROUTED)
            run("ip", "link", "set", ENI, "name", "other")
            await becomes(interfaces, lambda: place(interfaces) is None)
            run("ip", "link", "set", "other", "name", ENI)
            await becomes(interfaces, lambda: place(interfaces) is not None)
            run("ip", "link", "del", ENI)
            await becomes(interfaces, lambda: place(interfaces) is None)

    here(node, body)


@pytest.mark.parametrize("address", [ADDRESS, ADDRESS6], ids=["v4", "v6"])
def test_a_route_moves_to_another_interface(node: str, address: bytes) -> None:
    text = "10.98.0.5/32" if len(address) == 4 else "fd98::5/128"
    family = "-4" if len(address) == 4 else "-6"

    async def body() -> None:
        add_veth("one")
        add_veth("two")
        run("ip", family, "route", "add", text, "dev", "one")
        async with following() as interfaces:

            def at(name: str | None, kind: Kind = Kind.ROUTED) -> bool:
                found = place(interfaces, address)
                return (found and (found.name, found.kind)) == (name and (name, kind))

            assert at("one")
            run("ip", family, "route", "replace", text, "dev", "two")
            await becomes(interfaces, lambda: at("two"))
            run("ip", family, "route", "del", text)
            await becomes(interfaces, lambda: at(None))
            run("ip", family, "route", "add", text, "dev", "one", "table", "103")
            await becomes(interfaces, lambda: at("one", Kind.BRANCH))
            run("ip", "link", "set", "one", "down")  # takes the route along without telling (IPv4)
            await becomes(interfaces, lambda: at(None))

    here(node, body)


def test_a_default_route_makes_an_uplink(node: str) -> None:
    async def body() -> None:
        add_veth(ENI)
        run("ip", "addr", "add", "10.98.1.2/24", "dev", ENI)
        async with following() as interfaces:
            assert place(interfaces) is not None
            assert own_node_addresses(interfaces.state) == {parse_address("10.98.1.2")}
            run("ip", "route", "add", "default", "via", "10.98.1.1", "table", "99")
            await becomes(interfaces, lambda: place(interfaces) is None)
            run("ip", "addr", "add", "10.98.1.3/32", "dev", "lo")
            await becomes(interfaces, lambda: len(own_node_addresses(interfaces.state)) == 2)

    here(node, body)


def test_a_bridged_pod_is_found_when_asked_for_and_stays_known_when_silent(
    node: str, spaces: list[str]
) -> None:
    pod = f"{node}p"
    run("ip", "netns", "add", pod)
    spaces.append(pod)

    async def body() -> None:
        async with following() as interfaces:
            run("ip", "link", "add", "br0", "type", "bridge")
            run("ip", "addr", "add", "10.98.0.1/24", "dev", "br0")
            run("ip", "link", "set", "br0", "up")
            run("ip", "link", "add", "vp", "type", "veth", "peer", "name", "eth0", "netns", pod)
            run("ip", "link", "set", "vp", "master", "br0", "up")
            run("ip", "-n", pod, "addr", "add", "10.98.0.5/24", "dev", "eth0")
            run("ip", "-n", pod, "link", "set", "eth0", "up")
            await becomes(
                interfaces, lambda: any(link.name == "vp" for link in interfaces.state.links.values())
            )
            await becomes(interfaces, lambda: bool(own_node_addresses(interfaces.state)))
            assert place(interfaces) is None
            async with asyncio.timeout(5):
                while place(interfaces) is None:  # the port starts forwarding a moment after its creation
                    interfaces.solicit([ADDRESS])
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(interfaces.wait_change(), 0.2)
            found = place(interfaces)
            assert found is not None
            assert (found.name, found.kind, found.bridge) == ("vp", Kind.BRIDGED, "br0")
            run("bridge", "fdb", "flush", "dev", "br0")
            run("ip", "neigh", "flush", "dev", "br0")
            run("ip", "addr", "add", "10.98.7.7/32", "dev", "lo")  # an event behind those of the flush
            await becomes(interfaces, lambda: len(own_node_addresses(interfaces.state)) == 2)
            assert place(interfaces) == found
            # An agent that starts now has nothing but the node's own memory of the MAC.
            run("ip", "neigh", "replace", "10.98.0.5", "lladdr", mac(pod), "dev", "br0", "nud", "stale")
            run("bridge", "fdb", "flush", "dev", "br0")
            async with following() as fresh:
                fresh.solicit([ADDRESS])
                await becomes(fresh, lambda: place(fresh) == found)
            run("ip", "link", "set", "vp", "nomaster")
            await becomes(interfaces, lambda: place(interfaces) is None)

    here(node, body)


def test_more_events_than_the_socket_holds_lead_to_a_new_look(node: str) -> None:
    async def body() -> None:
        async with following() as interfaces:
            assert interfaces._events is not None
            interfaces._events.socket.setsockopt(1, 8, 1)  # SO_RCVBUF: the smallest there is
            batch = "".join(
                f"link add w{number} type veth peer name z{number}\nlink set w{number} up\n"
                f"link set z{number} up\nroute add 10.97.0.{number} dev w{number}\n"
                for number in range(1, 120)
            )
            # No turn of the loop until all has happened: the events must overrun.
            run("ip", "-batch", "-", stdin=batch)
            run("ip", "link", "add", ENI, "type", "veth", "peer", "name", "pe")
            await becomes(interfaces, lambda: place(interfaces) is not None)
            assert interfaces._events._drops > 0
            assert len(interfaces.state.host_routes) == 119
            run("ip", "link", "del", ENI)
            await becomes(interfaces, lambda: place(interfaces) is None)

    here(node, body)
