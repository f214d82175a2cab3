"""Pods begin, end, move and hand on their addresses; nothing of one reaches another."""

from __future__ import annotations

import json
import os
import signal
import socket
import time

import pytest
from conftest import AgentFactory, LabFactory, RunningAgent
from objects import Object, allow, deny, pod, pod_object, policy, select, until
from traffic import Stream, arrives, passes, received, sending, udp

from dataplane.addresses import format_address
from dataplane.lab.probe import connect, probe
from dataplane.lab.topology import LabPod
from dataplane.lab.world import Lab

pytestmark = pytest.mark.netns
BOTH_FAMILIES = pytest.mark.parametrize("family", [4, 6])


def named(lab: Lab, name: str, ips: tuple[bytes, ...]) -> list[Object]:
    """podSelectorEndpoints of a pod that need not be there."""
    namespace, _, short = name.partition("/")
    hosts = {len(ip): format_address(ip) for ip in reversed(lab.node_ips)}
    return [
        {"name": short, "namespace": namespace, "podIP": format_address(ip), "hostIP": hosts[len(ip)]}
        for ip in ips
    ]


def texts(one: LabPod) -> list[str]:
    return [format_address(ip) for ip in one.ips]


def no_problems(agent: RunningAgent) -> bool:
    return agent.status()["problems"] == []


@BOTH_FAMILIES
def test_a_reused_address_inherits_nothing(lab: LabFactory, agent: AgentFactory, family: int) -> None:
    one = lab(["x/old", "x/server"])
    old_policy = policy("x", "old", select(one, "x/old"), egress=allow(one, "x/server"), ingress=[])
    daemon = agent(one, old_policy)
    old = one.pod("x/old")
    server, to_server = udp(one, "x/server", 9000, family=family), (one.address("x/server", family), 9000)
    to_old = (one.address("x/old", family), 5000)
    client = udp(one, "x/old", 5000, family=family)
    assert passes(client, to_server, server)
    assert passes(server, to_old, client)
    assert any(row["egress_judged"] for row in daemon.ask("flows"))
    client.close()

    one.remove_pod("x/old")
    # Same address, another pod, isolated without a rule; its policy is there before it is.
    daemon.write(policy("x", "new", named(one, "x/new", old.ips), ingress=[], egress=[]))
    daemon.write(pod_object(one, one.pod("x/server")), file="pods.yaml")
    one.add_pod(pod("x/new", *texts(old)))
    until(lambda: no_problems(daemon), what="the new pod's interface is found")
    heir = udp(one, "x/new", 5000, family=family)
    # What the server still sends is of the old pod's flow, which the new pod's policy denies.
    assert not arrives(server, to_old, heir)
    # The same ports from the new pod: no verdict of the old one's.
    assert not arrives(heir, to_server, server)
    assert not connect(one, "x/server", "x/new", family=family, timeout=0.5).reached
    # Nor is the new pod left with the isolation of its predecessor.
    daemon.write(policy("x", "new", named(one, "x/new", old.ips), ingress=[]))
    assert passes(heir, to_server, server)
    assert connect(one, "x/new", "x/server", family=family).reached


@BOTH_FAMILIES
def test_an_unpoliced_heir_is_free(lab: LabFactory, agent: AgentFactory, family: int) -> None:
    one = lab(["x/old", "x/b"])
    daemon = agent(one, deny(one, "x/old"))
    old = one.pod("x/old")
    assert not connect(one, "x/b", "x/old", family=family, timeout=0.5).reached
    one.remove_pod("x/old")
    one.add_pod(pod("x/new", *texts(old)))
    daemon.remove()
    daemon.write_pods()
    for source, destination in (("x/b", "x/new"), ("x/new", "x/b")):
        answer = connect(one, source, destination, family=family)
        assert (answer.reached, answer.by) == (True, destination)
    assert daemon.status()["counters"].get("spoofed", 0) == 0


def test_a_servers_stream_does_not_follow_the_address(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/old", "x/server"])
    daemon = agent(one, policy("x", "old", select(one, "x/old"), egress=allow(one, "x/server"), ingress=[]))
    stream, old = Stream(one, "x/old", "x/server"), one.pod("x/old")
    assert stream.flows()
    daemon.write(
        policy("x", "old", select(one, "x/old"), egress=allow(one, "x/server"), ingress=[]),
        policy("x", "new", named(one, "x/new", old.ips), ingress=[], egress=[], slice_="2"),
    )
    one.remove_pod("x/old")
    one.add_pod(pod("x/new", *texts(old)))
    daemon.write(policy("x", "new", named(one, "x/new", old.ips), ingress=[], egress=[], slice_="2"))
    until(lambda: no_problems(daemon), what="the new pod's interface is found")
    # The server retransmits to the address; whatever of it reached the pod would be seen here.
    watch = one.make_socket("x/new", socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP)
    watch.setblocking(False)
    before = _sent_to(one, old)
    assert received(watch, 1.0) == []
    assert until(lambda: _sent_to(one, old) > before, what="the server still sends")


def _sent_to(lab: Lab, old: LabPod) -> int:
    """Packets of flows from the old pod that its peer has sent, as conntrack has them in any state."""
    text = lab.run("x/server", "cat", "/proc/net/netstat").stdout
    names, values = [line.split() for line in text.splitlines() if line.startswith("TcpExt:")]
    counts = dict(zip(names, values, strict=True))
    return int(counts["TCPLostRetransmit"]) + int(counts["TCPTimeouts"])


@BOTH_FAMILIES
def test_an_address_moves_between_two_pods(lab: LabFactory, agent: AgentFactory, family: int) -> None:
    # b was allowed by address; the pod that has the address next is judged by its own interface.
    one = lab(["x/a", "x/b", "x/c"])
    daemon = agent(one, policy("x", "a", select(one, "x/a"), ingress=allow(one, "x/b")))
    b, c = one.pod("x/b"), one.pod("x/c")
    assert connect(one, "x/b", "x/a", family=family).reached
    one.remove_pod("x/b")
    one.remove_pod("x/c")
    one.add_pod(pod("x/c", *texts(b)))
    one.add_pod(pod("x/b", *texts(c)))
    daemon.write_pods()
    until(lambda: no_problems(daemon))
    # The rule names an address, and that is c's now.
    assert connect(one, "x/c", "x/a", family=family).reached
    assert not connect(one, "x/b", "x/a", family=family, timeout=0.5).reached
    daemon.write(policy("x", "a", select(one, "x/a"), ingress=allow(one, "x/b")))
    assert connect(one, "x/b", "x/a", family=family).reached
    assert not connect(one, "x/c", "x/a", family=family, timeout=0.5).reached


def test_an_interface_goes_while_its_packets_wait(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/a", "x/b", "x/c"])
    daemon = agent(
        one,
        policy("x", "a", select(one, "x/a"), ingress=allow(one, "x/b")),
        policy("x", "c", select(one, "x/c"), ingress=allow(one, "x/b")),
    )
    assert daemon.process is not None
    os.kill(daemon.process.pid, signal.SIGSTOP)
    try:
        b = udp(one, "x/b", 5000)
        for number in range(500):
            b.sendto(b"waiting", (one.address("x/a"), 9000 + number % 50))
        one.remove_pod("x/a")
    finally:
        os.kill(daemon.process.pid, signal.SIGCONT)
    target = udp(one, "x/c", 9000)
    assert passes(udp(one, "x/b", 5001), (one.address("x/c"), 9000), target)
    status = until(
        lambda: (now := daemon.status())["queues"][0]["depth"] == 0 and now, what="the queue is empty"
    )
    assert status["ready"]
    assert daemon.process.poll() is None


@BOTH_FAMILIES
def test_the_policy_is_there_before_the_pod(lab: LabFactory, agent: AgentFactory, family: int) -> None:
    one = lab(["x/b", "x/c"])
    late = pod("x/late", "10.1.0.200", "fd00:1::200")
    policies = policy("x", "late", named(one, "x/late", late.ips), ingress=allow(one, "x/b"))
    daemon = agent(one, policies)
    assert daemon.status()["problems"] == ["pod x/late: its policies wait for its interface to appear"]
    assert daemon.status()["ready"]
    target_port = 9000
    c = udp(one, "x/c", 5000, family=family)
    address = format_address(late.ips[0 if family == 4 else 1])
    with sending(c, (address, target_port)):
        one.add_pod(late)
        until(lambda: no_problems(daemon), what="the interface is found")
        target = udp(one, "x/late", target_port, family=family)
        assert received(target) == []
    assert passes(udp(one, "x/b", 5000, family=family), (address, target_port), target)


def test_an_interface_is_renamed(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/a", "x/b"])
    daemon = agent(one, policy("x", "a", select(one, "x/a"), ingress=[]))
    device, address = one.pod("x/a").device, one.address("x/a")
    assert not connect(one, "x/b", "x/a", timeout=0.4).reached
    one.run("node", "ip", "link", "set", device, "down")
    one.run("node", "ip", "link", "set", device, "name", "other0")
    one.run("node", "ip", "link", "set", "other0", "up")
    one.run("node", "ip", "route", "add", address, "dev", "other0", "scope", "link")
    until(lambda: "other0" in one.run("node", "ipset", "list", "podgate-spoof-4").stdout)
    until(lambda: no_problems(daemon))
    assert connect(one, "x/a", "x/b").reached
    assert not connect(one, "x/b", "x/a", timeout=0.4).reached
    assert daemon.status()["counters"].get("spoofed", 0) == 0


def test_an_interface_leaves_the_node_and_returns(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/a", "x/b"])
    daemon = agent(one, policy("x", "a", select(one, "x/a"), ingress=[]))
    device, address = one.pod("x/a").device, one.address("x/a")
    one.run("node", "ip", "link", "set", device, "netns", one.outside)
    until(lambda: not no_problems(daemon), what="the interface is missed")
    one.run("outside", "ip", "link", "set", device, "group", "7")
    one.run("outside", "ip", "link", "set", device, "netns", one.node)
    one.run("node", "ip", "link", "set", device, "up")
    one.run("node", "ip", "route", "add", address, "dev", device, "scope", "link")
    until(lambda: no_problems(daemon), what="the interface is found again")
    assert not connect(one, "x/b", "x/a", timeout=0.4).reached
    (link,) = json.loads(one.run("node", "ip", "-j", "link", "show", "dev", device).stdout)
    assert int(link["group"], 0) & 0xFFFF == 7, "the bits of others stay"
    assert connect(one, "x/a", "x/b").reached


@BOTH_FAMILIES
def test_a_pod_comes_back_with_another_address(lab: LabFactory, agent: AgentFactory, family: int) -> None:
    one = lab(["x/a", "x/b"])
    daemon = agent(one, deny(one, "x/a", directions="ingress"))
    old = one.address("x/a", family)
    one.replace_pod("x/a", ["10.1.0.77", "fd00:1::77"])
    # Until the objects know, the name stands for the old address: the pod is isolated, and what it
    # sends under an address that nobody gave it is dropped.
    assert not connect(one, "x/b", "x/a", family=family, timeout=0.4).reached
    daemon.write_pods()
    daemon.write(deny(one, "x/a", directions="ingress"))
    assert not connect(one, "x/b", "x/a", family=family, timeout=0.4).reached
    assert connect(one, "x/a", "x/b", family=family).reached
    daemon.write(policy("x", "default-deny", select(one, "x/a"), ingress=allow(one, "x/b")))
    assert connect(one, "x/b", "x/a", family=family).reached
    # The address left behind is nobody's: a pod that claims it is forging.
    target = udp(one, "x/b", 9000, family=family)
    forger = udp(one, "x/a", 5000, family=family, address=old)
    assert not arrives(forger, (one.address("x/b", family), 9000), target)


def test_many_pods_come_and_go_while_a_flow_runs(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/a", "x/b"])
    steady = policy("x", "a", select(one, "x/a"), ingress=allow(one, "x/b"))
    daemon = agent(one, steady)
    stream = Stream(one, "x/b", "x/a")
    target = udp(one, "x/a", 9000)
    b, to = udp(one, "x/b", 5000), (one.address("x/a"), 9000)
    count = 0
    for turn in range(4):
        one.add_pod(pod(f"x/p{turn}", f"10.1.1.{turn + 1}"))
        daemon.write_pods(wait=False)
        daemon.write(steady, deny(one, f"x/p{turn}", name=f"deny-{turn}"), wait=False)
        for _ in range(50):
            b.sendto(b"steady", to)
        one.remove_pod(f"x/p{turn}")
        count += len(received(target, 2.0, 50))
    assert count == 200, "not one packet of a pod that nothing happened to is lost"
    assert stream.flows()


def test_one_name_is_the_beginning_of_another(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/web-1", "x/web-10", "x/web", "x/z"])
    daemon = agent(one, deny(one, "x/web-1"))
    for family in (4, 6):
        seen = probe(one, ["80/TCP"], family, timeout=0.5)
        assert seen.order == ("x/web", "x/web-1", "x/web-10", "x/z")
        assert seen.cells["80/TCP"] == (".X..", "X.XX", ".X..", ".X..")
    assert daemon.status()["pods"] == 1


def test_two_replicas_isolated_and_a_third_not(lab: LabFactory, agent: AgentFactory) -> None:
    # One ReplicaSet's names; the third has other labels, so that no policy selects it.
    names = [f"x/shop-7d9f-{tail}" for tail in ("aaaaa", "bbbbb", "ccccc")]
    one = lab([*names, "x/z"])
    daemon = agent(one, policy("x", "shop", select(one, *names[:2]), ingress=allow(one, names[0])))
    for family in (4, 6):
        seen = probe(one, ["80/TCP"], family, timeout=0.5)
        # The first may reach the second; nobody else reaches either.
        assert seen.cells["80/TCP"] == ("....", "X...", "XX..", "XX..")
    assert daemon.status()["pods"] == 2


def test_finished_pods_own_no_address(lab: LabFactory, agent: AgentFactory) -> None:
    # A Job's pod is done, its address already another's: the object still lies there.
    one = lab(["x/a", "x/b"])
    daemon = agent(one, start=False)
    done = pod_object(one, one.pod("x/a")) | {"metadata": {"name": "job", "namespace": "x"}}
    done["status"] = {**done["status"], "phase": "Succeeded"}
    daemon.write(done, *(pod_object(one, one.pod(name)) for name in ("x/a", "x/b")), file="pods.yaml")
    daemon.write(policy("x", "a", select(one, "x/a"), ingress=allow(one, "x/b")))
    daemon.start()
    assert connect(one, "x/b", "x/a").reached
    assert connect(one, "x/a", "x/b").reached
    assert daemon.status()["problems"] == []


def test_the_waiting_policy_takes_hold_quickly(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/b"])
    late = pod("x/late", "10.1.0.200", "fd00:1::200")
    daemon = agent(one, policy("x", "late", named(one, "x/late", late.ips), ingress=[]))
    one.add_pod(late)
    made = time.monotonic()
    until(lambda: no_problems(daemon))
    print(f"isolated {(time.monotonic() - made) * 1000:.0f} ms after the pod")  # noqa: T201
    assert time.monotonic() - made < 2
