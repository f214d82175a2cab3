"""Pods wired in every known way: their interface is found, and both of their ends are judged."""

from __future__ import annotations

import json

import pytest
from conftest import AgentFactory, LabFactory
from objects import allow, deny, pod, policy, select, until
from traffic import Stream, arrives, passes, udp

from dataplane.lab.probe import connect, probe
from dataplane.lab.topology import Topology, Wire, veth_name
from dataplane.lab.world import Lab
from dataplane.model import Key
from dataplane.node.rendering import GROUP_CHECKED, GROUP_EGRESS, GROUP_INGRESS, GROUP_MASK
from dataplane.reachability import Matrix

pytestmark = pytest.mark.netns
WIRES = [wire for wire in Wire if wire is not Wire.HOST]
PORTS = ("80/TCP", "80/UDP", "80/SCTP")


def group(lab: Lab, device: str) -> int:
    """Our bits of a link's device group."""
    (link,) = json.loads(lab.run("node", "ip", "-j", "link", "show", "dev", device).stdout)
    named = link.get("group", "default")
    return (0 if named == "default" else int(named, 0)) & GROUP_MASK


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("family", [4, 6])
def test_the_whole_matrix(lab: LabFactory, agent: AgentFactory, wire: Wire, family: int) -> None:
    one = lab(["x/a", "x/b", "x/c", "x/d"], Topology(wire=wire))
    daemon = agent(
        one,
        policy("x", "a", select(one, "x/a"), ingress=allow(one, "x/b", "x/c", ports=PORTS)),
        policy("x", "c", select(one, "x/c"), egress=allow(one, "x/b", ports=PORTS)),
    )
    assert daemon.status()["problems"] == []
    external = "203.0.113.9" if family == 4 else "2001:db8::9"
    seen = probe(one, [*PORTS, "ICMP"], family, [external], timeout=0.6)
    order = ("x/a", "x/b", "x/c", "x/d", external)
    # a: in from b alone (c may, but c's own egress does not let it). c: out to b alone.
    row = (".....", ".....", "X..XX", "X....", "X....")
    echo = (".....", "X....", "XX.XX", "X....", "X....")
    assert not seen.diff(Matrix(order, {**dict.fromkeys(PORTS, row), "ICMP": echo}))
    # Probes of the node, and what an isolated pod wants of its own node.
    assert connect(one, "node", "x/a", family=family).reached
    assert connect(one, "node", "x/c", "ICMP", family=family).reached
    with one.serving([one.node], [(17, 9000)]):
        assert connect(one, "x/c", "node", "9000/UDP", family=family).reached


@pytest.mark.parametrize("wire", WIRES)
def test_a_change_cuts_and_spares(lab: LabFactory, agent: AgentFactory, wire: Wire) -> None:
    one = lab(["x/a", "x/b", "x/c"], Topology(wire=wire))
    both = policy("x", "a", select(one, "x/a"), ingress=allow(one, "x/b", "x/c"))
    daemon = agent(one, both)
    spared, cut = Stream(one, "x/b", "x/a"), Stream(one, "x/c", "x/a", family=6)
    daemon.write(policy("x", "a", select(one, "x/a"), ingress=allow(one, "x/b")))
    assert cut.silent()
    assert spared.flows()


@pytest.mark.parametrize("family", [4, 6])
def test_branch_pods_of_one_node_are_judged_at_both_ends(
    lab: LabFactory, agent: AgentFactory, family: int
) -> None:
    # One conntrack entry, two passes through FORWARD: neither end's verdict stands for the other's.
    one = lab(["x/a", "x/b"], Topology(wire=Wire.BRANCH))
    target, to = udp(one, "x/a", 9000, family=family), (one.address("x/a", family), 9000)
    daemon = agent(one)
    for number, (out, in_) in enumerate([(False, False), (True, False), (False, True), (True, True)]):
        daemon.write(
            policy("x", "out", select(one, "x/b"), egress=allow(one, "x/a") if out else []),
            policy("x", "in", select(one, "x/a"), ingress=allow(one, "x/b") if in_ else []),
        )
        source = udp(one, "x/b", 5000 + number, family=family)
        if out and in_:
            assert passes(source, to, target)
        else:
            assert not arrives(source, to, target), (out, in_)
    (flow,) = [row for row in daemon.ask("flows") if row["src_port"] == 5003]
    assert (flow["egress_judged"], flow["ingress_judged"]) == (True, True)
    # Each end can cut a flow that both had let pass.
    daemon.write(
        policy("x", "out", select(one, "x/b"), egress=[]),
        policy("x", "in", select(one, "x/a"), ingress=allow(one, "x/b")),
    )
    assert not arrives(source, to, target)
    daemon.write(
        policy("x", "out", select(one, "x/b"), egress=allow(one, "x/a")),
        policy("x", "in", select(one, "x/a"), ingress=[]),
    )
    assert not arrives(source, to, target)
    assert connect(one, "node", "x/a", family=family).reached
    assert connect(one, "node", "x/b", family=family).reached


def test_prefix_delegated_pods(lab: LabFactory, agent: AgentFactory) -> None:
    # Addresses out of one /28 and one /80, as ENABLE_PREFIX_DELEGATION and IPv6 clusters have them.
    one = lab(
        [
            pod("x/a", "10.1.7.16", "fd00:1::a:b:c:0"),
            pod("x/b", "10.1.7.17", "fd00:1::a:b:c:1"),
            pod("x/c", "10.1.7.31", "fd00:1::a:b:c:f"),
        ]
    )
    agent(one, policy("x", "a", select(one, "x/a"), ingress=allow(one, "x/c")))
    for family in (4, 6):
        seen = probe(one, ["80/TCP"], family, timeout=0.6)
        assert seen.cells["80/TCP"] == ("...", "X..", "...")


@pytest.mark.parametrize("family", [4, 6])
def test_pods_of_one_family_only(lab: LabFactory, agent: AgentFactory, family: int) -> None:
    one = lab(["x/a", "x/b"], Topology(**{"v6" if family == 4 else "v4": None}))
    daemon = agent(one, deny(one, "x/a"))
    assert not connect(one, "x/b", "x/a", family=family, timeout=0.5).reached
    assert connect(one, "node", "x/a", family=family).reached
    assert daemon.status()["problems"] == []


def test_a_second_veth_is_left_alone(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/a", "x/b"], Topology(second_veth=frozenset({Key("x", "a")})))
    agent(one, deny(one, "x/a"))
    pod_a = one.pod("x/a")
    assert group(one, pod_a.device) == GROUP_EGRESS | GROUP_INGRESS | GROUP_CHECKED
    assert group(one, veth_name(pod_a.key, "mul")) == 0
    assert group(one, one.pod("x/b").device) == GROUP_CHECKED
    assert group(one, "eth0") == 0
    assert not connect(one, "x/b", "x/a", timeout=0.5).reached
    second = f"172.31.{pod_a.index >> 8}.{pod_a.index & 255}"
    # Its answers leave by the second veth as well, as Multus' routes have it.
    gateway = one.address("x/b")
    one.run("x/a", "ip", "route", "add", f"{gateway}/32", "dev", "net1")
    device = veth_name(pod_a.key, "mul")
    one.sysctl("node", f"ipv4/conf/{device}/proxy_arp", "1")
    assert connect(one, "x/b", second).reached


@pytest.mark.parametrize("family", [4, 6])
def test_bridged_and_routed_pods_side_by_side(lab: LabFactory, agent: AgentFactory, family: int) -> None:
    wires = {Key("x", "c"): Wire.ROUTED, Key("x", "d"): Wire.ROUTED}
    one = lab(["x/a", "x/b", "x/c", "x/d"], Topology(wire=Wire.BRIDGE, wires=wires))
    # a and b sit on the bridge's own network: routed pods answer through the node.
    for name in ("x/a", "x/b"):
        for other in ("x/c", "x/d"):
            gateway = "10.1.0.1" if family == 4 else "fd00:1::1"
            one.run(name, "ip", f"-{family}", "route", "add", one.address(other, family), "via", gateway)
    agent(
        one,
        policy("x", "a", select(one, "x/a"), ingress=allow(one, "x/b", "x/c")),
        policy("x", "d", select(one, "x/d"), ingress=allow(one, "x/a"), egress=allow(one, "x/b")),
    )
    seen = probe(one, ["80/TCP", "80/UDP"], family, timeout=0.6)
    rows = ("....", "...X", "...X", "X.X.")
    assert not seen.diff(Matrix(("x/a", "x/b", "x/c", "x/d"), {"80/TCP": rows, "80/UDP": rows}))


def test_a_silent_pod_on_a_bridge_is_found_before_ready(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/a", "x/b"], Topology(wire=Wire.BRIDGE))
    daemon = agent(one, deny(one, "x/a"), start=False)
    # Neither the bridge nor the node has heard of anybody, and the pod will not speak first.
    one.run("node", "ip", "neigh", "flush", "dev", "cni0")
    one.run("node", "ip", "link", "set", one.pod("x/a").device, "type", "bridge_slave", "fdb_flush")
    daemon.start()
    assert daemon.status()["problems"] == []
    assert not connect(one, "x/b", "x/a", timeout=0.5).reached


def test_without_br_netfilter_it_is_not_ready(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/a", "x/b"], Topology(wire=Wire.BRIDGE, br_netfilter=False))
    daemon = agent(one, deny(one, "x/a"), options=["--verify-seconds", "0.3"], wait=False)
    until(lambda: "not ready" in daemon.text(), 15, "it has looked at the bridge")
    done = daemon.podgate("status", "--wait-ready", "0.3", check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "sysctl -w net.bridge.bridge-nf-call-iptables=1" in done.stderr
    for tool in ("iptables", "ip6tables"):
        one.sysctl("node", f"bridge/bridge-nf-call-{tool}", "1")
    daemon.wait_ready()
    assert not connect(one, "x/b", "x/a", timeout=0.4).reached
