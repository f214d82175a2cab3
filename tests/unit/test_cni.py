"""The VPC CNI's calls: their bytes, the socket they come in on, and what of a pod they make known."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

os.environ.update(GRPC_ENABLE_FORK_SUPPORT="0", GRPC_VERBOSITY="NONE")  # read by the import
import grpc
import grpc.aio

from dataplane.addresses import parse_address
from dataplane.cni import messages
from dataplane.cni.pods import CniPods
from dataplane.cni.server import CniServer
from dataplane.config import AgentConfig, Mode
from dataplane.errors import InputError
from dataplane.model import Key, Pod, Snapshot
from dataplane.node.interfaces import HostRoute, Link, LinkState, host_veth_name
from dataplane.plan import make_plan

# Written by hand from the protobuf encoding: field number << 3 | wire type, length, bytes.
ENFORCE = b"\x0a\x03web" + b"\x12\x04shop" + b"\x1a\x06strict" + b"\x20\x02"
DELETE = b"\x12\x03web" + b"\x1a\x04shop"
EARLIER_DELETE = b"\x0a\x03web" + b"\x12\x04shop"
YES, NO = b"\x08\x01", b""

# --- messages --------------------------------------------------------------------------------------


def test_requests_as_the_cni_writes_them() -> None:
    assert messages.parse_enforce(ENFORCE) == ("web", "shop", "strict", 2)
    assert messages.parse_enforce(b"\x0a\x03web\x12\x04shop") == ("web", "shop", "", 0)
    assert messages.parse_delete(DELETE) == ("web", "shop")
    assert messages.parse_delete(b"\x08\x01" + DELETE) == ("web", "shop")
    assert messages.parse_delete(EARLIER_DELETE) == ("web", "shop")
    # A field that a later CNI adds.
    assert messages.parse_enforce(ENFORCE + b"\x2a\x03new") == ("web", "shop", "strict", 2)


def test_replies_as_the_cni_reads_them() -> None:
    assert messages.enforce_reply(True) == messages.delete_reply(True) == YES
    assert messages.enforce_reply(False) == messages.delete_reply(False) == NO


@pytest.mark.parametrize("data", [b"\xff", b"\x0a\x7fweb", b"\x12\x02\xff\xfe", b"\x0b"])
def test_other_bytes_are_an_error(data: bytes) -> None:
    with pytest.raises(ValueError, match="EnforceNpRequest"):
        messages.parse_enforce(data)
    with pytest.raises(ValueError, match="DeleteNpRequest"):
        messages.parse_delete(data)


# --- the socket ------------------------------------------------------------------------------------


class Recorder:
    """Says yes to every pod but those called "no"."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, ...]] = []

    async def created(self, pod: Key, mode: str) -> bool:
        self.calls.append(("created", str(pod), mode))
        return pod.name != "no"

    async def deleted(self, pod: Key) -> bool:
        self.calls.append(("deleted", str(pod)))
        return pod.name != "no"


Caller = Callable[[str, bytes], Awaitable[bytes]]


def serve(
    path: Path, pods: Recorder, act: Callable[[Caller, CniServer], Awaitable[None]], seconds: float = 20
) -> None:
    async def run() -> None:
        server = CniServer(path, pods)
        await server.start()
        try:
            async with grpc.aio.insecure_channel(f"unix:{path}") as channel:

                async def call(method: str, data: bytes) -> bytes:
                    answer: bytes = await channel.unary_unary(f"/rpc.NPBackend/{method}")(data)
                    return answer

                await act(call, server)
        finally:
            await server.stop()

    asyncio.run(asyncio.wait_for(run(), seconds))


@pytest.fixture
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cni") / "npa.sock"


def test_calls_over_the_socket(path: Path) -> None:
    pods = Recorder()

    async def act(call: Caller, _server: CniServer) -> None:
        assert await call("EnforceNpToPod", ENFORCE) == YES
        assert await call("EnforceNpToPod", b"\x0a\x02no\x12\x04shop") == NO
        assert await call("DeletePodNp", DELETE) == YES
        assert await call("DeletePodNp", EARLIER_DELETE) == YES
        assert await call("DeletePodNp", b"\x12\x02no\x1a\x04shop") == NO

    serve(path, pods, act)
    assert pods.calls == [
        ("created", "shop/web", "strict"),
        ("created", "shop/no", ""),
        ("deleted", "shop/web"),
        ("deleted", "shop/web"),
        ("deleted", "shop/no"),
    ]


@pytest.mark.parametrize(
    "data", [b"", b"\xff", b"\x0a\x03web", b"\x0a\x00\x12\x04shop", b"\x0a\x02a\n\x12\x01x"], ids=repr
)
def test_senseless_calls_are_refused(path: Path, data: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    pods = Recorder()

    async def act(call: Caller, _server: CniServer) -> None:
        assert await call("EnforceNpToPod", data) == NO
        assert await call("DeletePodNp", data) == NO
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call("Reboot", data)
        assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call("EnforceNpToPod", ENFORCE + b"\x2a\xff\xff\x7f" + bytes(1 << 21))
        assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED

    serve(path, pods, act)
    assert pods.calls == []
    said = "".join(capfd.readouterr())
    assert "makes no sense" in said
    assert "Traceback" not in said


def test_bytes_that_are_no_grpc_do_no_harm(path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rng = random.Random(5)
    noise = [
        rng.randbytes(5000),
        b"GET / HTTP/1.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + rng.randbytes(3000),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff\xff\xff\x01\x04\x00\x00\x00\x01",
        b"",
    ]

    async def act(call: Caller, _server: CniServer) -> None:
        for number, garbage in enumerate(noise * 10):
            with socket.socket(socket.AF_UNIX) as one:
                one.connect(str(path))
                one.sendall(garbage)
                if number % 2:
                    one.shutdown(socket.SHUT_WR)
        assert await call("EnforceNpToPod", ENFORCE) == YES

    serve(path, Recorder(), act)
    assert "".join(capfd.readouterr()).count("\n") == 1  # that it serves


def test_the_socket_is_roots_alone_and_goes_with_the_server(path: Path) -> None:
    modes: list[int] = []

    async def act(_call: Caller, _server: CniServer) -> None:
        modes.append(stat.S_IMODE(os.stat(path).st_mode))

    before = os.umask(0o022)
    try:
        serve(path, Recorder(), act)
        assert os.umask(0o022) == 0o022
        assert modes == [0o600]
    finally:
        os.umask(before)
    assert not path.exists()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 -- what others do to a file
            await asyncio.sleep(0.01)


def test_who_finds_another_agent_serves_once_that_has_gone(path: Path) -> None:
    first, second = Recorder(), Recorder()

    async def act(call: Caller, server: CniServer) -> None:
        other = CniServer(path, second, look_seconds=0.02)
        await other.start()
        assert [f"--cni-socket {path}: another agent answers the CNI" in one for one in other.problems] == [
            True
        ]
        assert await call("EnforceNpToPod", ENFORCE) == YES
        await server.stop()
        await until(lambda: not other.problems)
        assert await call("EnforceNpToPod", ENFORCE) == YES
        await other.stop()

    serve(path, first, act)
    assert (len(first.calls), len(second.calls)) == (1, 1)
    assert not path.exists()


def test_who_loses_the_socket_leaves_it_to_the_other(path: Path) -> None:
    """The VPC CNI's own agent removes whatever is there when it starts."""
    first, second = Recorder(), Recorder()

    async def run() -> None:
        loser, winner = CniServer(path, first, look_seconds=0.02), CniServer(path, second)
        await loser.start()
        os.unlink(path)
        await winner.start()  # nothing else runs before it listens
        await until(lambda: bool(loser.problems))
        await loser.stop()
        async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
            assert await channel.unary_unary("/rpc.NPBackend/EnforceNpToPod")(ENFORCE) == YES
        await winner.stop()

    asyncio.run(asyncio.wait_for(run(), 20))
    assert (len(first.calls), len(second.calls)) == (0, 1)
    assert not path.exists()


def test_a_socket_that_somebody_removed_is_made_again(path: Path) -> None:
    pods = Recorder()

    async def run() -> None:
        server = CniServer(path, pods, look_seconds=0.02)
        await server.start()
        os.unlink(path)
        await until(path.exists)
        async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
            assert await channel.unary_unary("/rpc.NPBackend/DeletePodNp")(DELETE) == YES
        await server.stop()

    asyncio.run(asyncio.wait_for(run(), 20))
    assert pods.calls == [("deleted", "shop/web")]


def test_the_socket_of_a_killed_agent_is_taken(path: Path) -> None:
    code = f"import socket, time; s = socket.socket(socket.AF_UNIX); s.bind({str(path)!r}); s.listen()"
    dead = subprocess.Popen([sys.executable, "-c", f"{code}; time.sleep(60)"])
    deadline = time.monotonic() + 10
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    dead.send_signal(signal.SIGKILL)
    dead.wait()
    assert path.exists()

    async def act(call: Caller, _server: CniServer) -> None:
        assert await call("EnforceNpToPod", ENFORCE) == YES

    serve(path, Recorder(), act)


def test_what_is_no_socket_is_not_touched(path: Path) -> None:
    path.write_text("mine")
    with pytest.raises(InputError, match="not a socket"):
        asyncio.run(CniServer(path, Recorder()).start())
    assert path.read_text() == "mine"


@pytest.mark.parametrize("place", ["/proc/none/npa.sock", f"/tmp/{'long' * 30}"])
def test_a_place_that_cannot_be_listened_on(place: str) -> None:
    with pytest.raises(InputError, match="--cni-socket /"):
        asyncio.run(CniServer(Path(place), Recorder()).start())


def test_the_directory_is_made(path: Path) -> None:
    async def act(call: Caller, _server: CniServer) -> None:
        assert await call("DeletePodNp", DELETE) == YES

    serve(path.parent / "aws-node" / "npa.sock", Recorder(), act)


# --- pods ------------------------------------------------------------------------------------------

NODE, OLD, NEW = (parse_address(text) for text in ("192.0.2.1", "10.0.0.5", "10.0.0.9"))
WEB = Key("shop", "web")


class StillEnforcement:
    """As much of it as knows objects and links and does nothing by itself."""

    def __init__(self, mode: Mode) -> None:
        self.config = AgentConfig((), node_ips=(NODE,), mode=mode)
        self.refused = self.in_force = None
        self.amend: Any = None
        self.looked = 0

    def look(self) -> None:
        self.looked += 1


def told(mode: Mode, *calls: tuple[Key, str]) -> tuple[CniPods, StillEnforcement]:
    enforcement = StillEnforcement(mode)
    pods = CniPods(enforcement)  # type: ignore[arg-type]

    async def call() -> None:
        for key, said in calls:
            assert await pods.created(key, said)

    asyncio.run(call())
    return pods, enforcement


def links(*addresses: bytes, ifindex: int = 7, pod: Key = WEB) -> LinkState:
    link = Link(ifindex, host_veth_name(pod, "eni"), "veth")
    return LinkState({ifindex: link}, host_routes=frozenset(HostRoute(ip, ifindex) for ip in addresses))


def test_a_pod_is_known_by_the_routes_to_its_interface() -> None:
    pods, enforcement = told(Mode.STANDARD, (WEB, "standard"))
    assert enforcement.looked == 1
    made = pods.amend(Snapshot(), links(NEW)).pods
    assert [(pod.key, pod.ips, pod.host_ips, pod.strict) for pod in made] == [(WEB, (NEW,), (NODE,), False)]
    assert pods.problems == ()


def test_a_former_pods_address_does_not_count() -> None:
    pods, _ = told(Mode.STANDARD, (WEB, "standard"))
    former = Pod(WEB, ips=(OLD,), host_ips=(NODE,), labels={"app": "web"}, created_at=1.0)
    other = Pod(Key("shop", "a"), ips=(NEW,), host_ips=(NODE,), created_at=2.0)
    known = Snapshot(pods=(other, former))
    first, second = pods.amend(known, links(NEW)).pods
    assert first is other
    assert (second.ips, second.labels) == ((NEW,), {"app": "web"})
    # The address was another's, whose object is still there: the newest has it.
    plan = make_plan(AgentConfig((), node_ips=(NODE,)), pods.amend(known, links(NEW)), links(NEW))
    assert plan.pods[WEB].addresses == (NEW,)
    assert plan.pods[other.key].addresses == ()


def test_the_same_objects_give_the_same_snapshot() -> None:
    pods, _ = told(Mode.STANDARD, (WEB, ""))
    known, state = Snapshot(), links(NEW)
    once = pods.amend(known, state)
    assert pods.amend(known, state) is once
    # Other links, the same pod: whoever compares by identity sees no change of it.
    assert pods.amend(known, links(NEW)).pods[0] is once.pods[0]


@pytest.mark.parametrize("gone", [True, False], ids=["its interface goes", "its object says the same"])
def test_a_pod_is_kept_in_mind_until(gone: bool) -> None:
    pods, _ = told(Mode.STANDARD, (WEB, "standard"))
    known = Snapshot() if gone else Snapshot(pods=(Pod(WEB, ips=(NEW,), host_ips=(NODE,)),))
    assert pods.amend(known, LinkState() if gone else links(NEW)) is known
    nothing = Snapshot()
    assert pods.amend(nothing, links(OLD)) is nothing


def test_without_a_route_a_pod_is_not_taken_for_a_forger() -> None:
    pods, _ = told(Mode.STANDARD, (WEB, "standard"))
    known = Snapshot()
    assert pods.amend(known, links()) is known
    assert pods.amend(known, links(NEW)).pods[0].ips == (NEW,)


def test_a_finished_pod_owns_no_address() -> None:
    pods, _ = told(Mode.STANDARD, (WEB, "standard"))
    known = Snapshot(pods=(Pod(WEB, ips=(NEW,), host_ips=(NODE,), finished=True),))
    assert pods.amend(known, links(NEW)) is known


def test_the_stricter_mode_wins_and_status_tells() -> None:
    enforcement = StillEnforcement(Mode.STANDARD)
    pods = CniPods(enforcement)  # type: ignore[arg-type]
    asked = []

    async def settle() -> bool:
        asked.append(len(pods.amend(Snapshot(), links(NEW)).pods))
        state = links(NEW)
        plan = make_plan(enforcement.config, pods.amend(Snapshot(), state), state)
        enforcement.in_force = plan  # type: ignore[assignment]
        return True

    enforcement.settle = settle  # type: ignore[attr-defined]
    enforcement.all_faults = []  # type: ignore[attr-defined]
    assert asyncio.run(pods.created(WEB, "Strict"))
    assert asked == [1]
    plan: Any = enforcement.in_force
    assert [(one.key, one.ingress, one.egress) for one in plan.steered] == [(WEB, True, True)]
    assert plan.entries[0].ingress.rules == plan.entries[0].egress.rules == ()
    assert "runs in strict mode, this agent in standard mode" in pods.problems[0]
    # The next call tells that the CNI was put right; the pod stays as it was made.
    assert asyncio.run(pods.created(Key("shop", "b"), "standard"))
    assert pods.problems == ()
    assert pods.amend(Snapshot(), links(NEW)).pods[0].strict


def test_strict_refuses_what_it_cannot_close(capfd: pytest.CaptureFixture[str]) -> None:
    enforcement = StillEnforcement(Mode.STRICT)
    pods = CniPods(enforcement)  # type: ignore[arg-type]

    async def settle() -> bool:
        return True

    enforcement.settle = settle  # type: ignore[attr-defined]
    enforcement.all_faults = []  # type: ignore[attr-defined]
    plan = SimpleNamespace(problems=(), steered=())
    enforcement.in_force = plan  # type: ignore[assignment]
    assert not asyncio.run(pods.created(WEB, "strict"))
    name = host_veth_name(WEB, "eni")
    assert f"no interface {name} is here" in "".join(capfd.readouterr())
    plan.problems = ("kube-proxy runs in IPVS mode",)
    assert not asyncio.run(pods.created(WEB, "strict"))
    assert "kube-proxy runs in IPVS mode" in "".join(capfd.readouterr())


@pytest.mark.parametrize("mode", ["lax", "strict\n", "STANDARD!"])
def test_an_unknown_mode_is_refused(mode: str) -> None:
    pods = CniPods(StillEnforcement(Mode.STANDARD))  # type: ignore[arg-type]
    assert not asyncio.run(pods.created(WEB, mode))
    assert pods.amend(Snapshot(), links(NEW)).pods == ()
