"""A forged source address opens nothing: not for who forges it, nor for whose it is."""

from __future__ import annotations

import pytest
import yaml
from conftest import AgentFactory, LabFactory, RunningAgent
from objects import allow, anywhere, deny, pod_object, policy, rule, select, until
from traffic import arrives, passes, received, udp

from dataplane.lab.probe import connect
from dataplane.lab.topology import Topology, Wire
from dataplane.plan import ANNOTATION_SPOOF_CHECK

pytestmark = [pytest.mark.netns, pytest.mark.parametrize("family", [4, 6])]
BEHIND = {4: "172.30.0.5", 6: "fd30::5"}  # an address that pod c routes for


def spoofed(agent: RunningAgent) -> int:
    count: int = agent.status()["counters"].get("spoofed", 0)
    return count


@pytest.mark.parametrize("wire", [Wire.ROUTED, Wire.BRANCH, Wire.BRIDGE])
def test_another_pods_address(lab: LabFactory, agent: AgentFactory, wire: Wire, family: int) -> None:
    one = lab(["x/a", "x/b", "x/c"], Topology(wire=wire))
    daemon = agent(one, policy("x", "p", select(one, "x/a"), ingress=allow(one, "x/b", ports=["9000/UDP"])))
    target = udp(one, "x/a", 9000, family=family)
    to = (one.address("x/a", family), 9000)
    assert passes(udp(one, "x/b", 5000, family=family), to, target)
    before = spoofed(daemon)
    assert not arrives(udp(one, "x/c", 5001, family=family, address=one.address("x/b", family)), to, target)
    assert spoofed(daemon) > before
    # Under its own address it is denied for another reason.
    assert not arrives(udp(one, "x/c", 5002, family=family), to, target)
    assert daemon.status()["counters"]["no-rule"] > 0


def test_the_victims_address_does_not_open_the_victim(
    lab: LabFactory, agent: AgentFactory, family: int
) -> None:
    # c sends to b as if it were a. Were that flow known to conntrack, b's packets to a would be
    # its replies, and a's isolation would not be asked about them.
    one = lab(["x/a", "x/b", "x/c"])
    daemon = agent(one, deny(one, "x/a", directions="ingress"))
    victim, b = udp(one, "x/a", 9000, family=family), udp(one, "x/b", 5000, family=family)
    a_address, b_address = one.address("x/a", family), one.address("x/b", family)
    forger = udp(one, "x/c", 9000, family=family, address=a_address)
    assert not arrives(forger, (b_address, 5000), b)
    assert spoofed(daemon) > 0
    assert not arrives(b, (a_address, 9000), victim)
    # Nor does a flow that the victim may have: a itself opens another port of b.
    assert passes(victim, (b_address, 5000), b)
    assert passes(b, (a_address, 9000), victim), "replies to what a opened"
    assert not arrives(udp(one, "x/b", 5001, family=family), (a_address, 9000), victim)


def test_the_tuple_of_a_flow_that_the_kernel_passes(
    lab: LabFactory, agent: AgentFactory, family: int
) -> None:
    one = lab(["x/a", "x/b", "x/c"])
    daemon = agent(one, policy("x", "p", select(one, "x/a"), ingress=allow(one, "x/b", ports=["9000/UDP"])))
    a_address, b_address = one.address("x/a", family), one.address("x/b", family)
    a, b = udp(one, "x/a", 9000, family=family), udp(one, "x/b", 5000, family=family)
    assert passes(b, (a_address, 9000), a)
    assert passes(a, (b_address, 5000), b)
    flow = next(row for row in daemon.ask("flows") if row["src_port"] == 5000)
    assert (flow["src_pod"], flow["dst_pod"], flow["ingress_judged"]) == ("x/b", "x/a", True)
    before = spoofed(daemon)
    as_b = udp(one, "x/c", 5000, family=family, address=b_address)
    as_a = udp(one, "x/c", 9000, family=family, address=a_address)
    assert not arrives(as_b, (a_address, 9000), a)
    assert not arrives(as_a, (b_address, 5000), b)
    assert spoofed(daemon) >= before + 2
    assert passes(b, (a_address, 9000), a), "the true flow goes on"


def test_the_nodes_address(lab: LabFactory, agent: AgentFactory, family: int) -> None:
    one = lab(["x/a", "x/c"])
    daemon = agent(one, deny(one, "x/a"))
    assert connect(one, "node", "x/a", family=family).reached
    target, to = udp(one, "x/a", 9000, family=family), (one.address("x/a", family), 9000)
    assert passes(udp(one, "node", 5000, family=family), to, target)
    before = spoofed(daemon)
    forger = udp(one, "x/c", 5000, family=family, address=one.address("node", family))
    assert not arrives(forger, to, target)
    assert spoofed(daemon) > before


def test_the_nodes_address_from_an_interface_nobody_knows(
    lab: LabFactory, agent: AgentFactory, family: int
) -> None:
    # No Pod object names c, so its source is not checked; it still is not the node.
    one = lab(["x/a", "x/c"], Topology(wire=Wire.BRANCH))
    daemon = agent(one, start=False)
    daemon.write(pod_object(one, one.pod("x/a")), file="pods.yaml")
    daemon.start()
    target, to = udp(one, "x/a", 9000, family=family), (one.address("x/a", family), 9000)
    one.sysctl("node", f"ipv4/conf/{one.pod('x/c').device}/accept_local", "1")
    # Straight to the pod's interface, so that nothing beyond the node may drop it.
    network = "10.1.0.0/24" if family == 4 else "fd00:1::/64"
    table = str(100 + one.pod("x/c").index)
    one.run("node", "ip", f"-{family}", "route", "add", network, "dev", one.pod("x/a").device, "table", table)
    forger = udp(one, "x/c", 5000, family=family, address=one.address("node", family))
    assert passes(forger, to, target), "the node would let it through"
    daemon.write(deny(one, "x/a"))
    assert not arrives(forger, to, target)
    assert connect(one, "node", "x/a", family=family).reached


@pytest.mark.parametrize("how", ["option", "annotation"])
def test_a_pod_that_routes(lab: LabFactory, agent: AgentFactory, how: str, family: int) -> None:
    one = lab(["x/a", "x/c", "x/d"])
    options = ["--spoof-check", "off"] if how == "option" else []
    daemon = agent(one, options=options, start=False)
    objects = [pod_object(one, one.pod(name)) for name in ("x/a", "x/c", "x/d")]
    if how == "annotation":
        objects[1]["metadata"]["annotations"] = {ANNOTATION_SPOOF_CHECK: "off"}
    daemon.write_text(yaml.safe_dump_all(objects), "pods.yaml")
    daemon.start()
    target, to = udp(one, "x/a", 9000, family=family), (one.address("x/a", family), 9000)
    forwarded = udp(one, "x/c", 5000, family=family, address=BEHIND[family])
    assert passes(forwarded, to, target)
    if how == "annotation":  # the other pods' sources are checked
        assert not arrives(udp(one, "x/d", 5000, family=family, address=BEHIND[family]), to, target)
        assert spoofed(daemon) > 0
    else:
        assert spoofed(daemon) == 0
    # By its interface: c's own egress decides about what it forwards, under every source.
    daemon.write(policy("x", "c", select(one, "x/c"), egress=anywhere("9001/UDP")))
    assert not arrives(forwarded, to, target), "the flow from before the policy"
    fresh = udp(one, "x/c", 5001, family=family, address=BEHIND[family])
    assert not arrives(fresh, to, target)
    other = udp(one, "x/a", 9001, family=family)
    assert passes(fresh, (to[0], 9001), other)
    # And the peer's ingress, by the source it carries.
    behind = f"{BEHIND[family]}/{32 if family == 4 else 128}"
    daemon.write(
        policy("x", "c", select(one, "x/c"), egress=anywhere()),
        policy("x", "a", select(one, "x/a"), ingress=[rule(behind, "9000/UDP")]),
    )
    assert passes(forwarded, to, target)
    assert not arrives(fresh, (to[0], 9001), other)
    assert received(target, 0.0) == []


def test_a_routing_pod_cannot_ride_anothers_flow(lab: LabFactory, agent: AgentFactory, family: int) -> None:
    # Nothing checks sources here: the flow of b is in the kernel's hands, and c has its tuple.
    one = lab(["x/a", "x/b", "x/c"])
    daemon = agent(
        one,
        policy("x", "a", select(one, "x/a"), ingress=allow(one, "x/b")),
        policy("x", "c", select(one, "x/c"), egress=[]),
        options=["--spoof-check", "off"],
    )
    target, to = udp(one, "x/a", 9000, family=family), (one.address("x/a", family), 9000)
    b = udp(one, "x/b", 5000, family=family)
    assert passes(b, to, target)
    until(lambda: any(row["ingress_judged"] for row in daemon.ask("flows")), what="the flow is offloaded")
    forger = udp(one, "x/c", 5000, family=family, address=one.address("x/b", family))
    assert not arrives(forger, to, target)
    assert passes(b, to, target)
