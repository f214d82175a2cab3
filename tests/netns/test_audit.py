"""Audit: what would be denied is judged, counted and told, and arrives."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest
import yaml
from conftest import AgentFactory, LabFactory, RunningAgent
from objects import Object, allow, deny, network_policy, policy, select, until
from packets import Events, Stream, check, send_frames, sniffing
from traffic import arrives, passes, received, udp

from dataplane.lab.topology import Topology, Wire
from dataplane.lab.world import Lab
from dataplane.model import ANNOTATION_MODE

pytestmark = pytest.mark.netns


def counters(agent: RunningAgent) -> dict[str, int]:
    found: dict[str, int] = agent.status()["counters"]
    return found


def annotated(one: Object, mode: str = "audit") -> Object:
    return {**one, "metadata": {**one["metadata"], "annotations": {ANNOTATION_MODE: mode}}}


def namespace(name: str, mode: str | None = None) -> Object:
    metadata: Object = {"name": name}
    if mode:
        metadata["annotations"] = {ANNOTATION_MODE: mode}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": metadata}


CLOSED = network_policy("x/closed", {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]})
OTHER = network_policy("x/other", {"podSelector": {}, "policyTypes": ["Ingress"]})
CUT = "80/TCP 80/UDP ICMP"


# --- the whole agent


@pytest.mark.parametrize(
    ("wire", "options"),
    [
        (Wire.ROUTED, ""),
        (Wire.ROUTED, "--no-offload"),
        (Wire.ROUTED, "--mode strict"),
        (Wire.ROUTED, "--backend netfilterqueue"),
        (Wire.BRIDGE, ""),
        (Wire.BRIDGE, "--no-offload"),
    ],
)
def test_an_agent_in_audit_drops_nothing(
    lab: LabFactory, agent: AgentFactory, wire: Wire, options: str
) -> None:
    one = lab(["x/a", "x/b", "x/c"], Topology(wire=wire))
    daemon = agent(one, deny(one, "x/a", "x/b"), options=["--audit", "--fail", "closed", *options.split()])
    with Events(daemon.control, "denied") as events:
        check(one, ("x/b", "x/a", CUT, "..."), ("x/c", "x/a", CUT, "..."), ("x/a", "x/c", CUT, "..."))
        for family in (4, 6):
            target, to = udp(one, "x/a", 9000, family=family), (one.address("x/a", family), 9000)
            forger = udp(one, "x/c", 5001, family=family, address=one.address("x/b", family))
            assert passes(forger, to, target), "a forged source"
        if "strict" not in options:  # there the sender's own end always comes first
            until(lambda: events.of(reason="audit", would_deny="no-rule", direction="ingress"))
        until(lambda: events.of(reason="audit", would_deny="no-rule", direction="egress"))
        until(lambda: events.of(reason="audit", would_deny="spoofed"))
    assert {row["verdict"] for row in events.rows} == {"allow"}
    assert counters(daemon)["spoofed"] > 0, "the kernel's rule counts them"
    status = daemon.status()
    assert (status["audit"], status["fail"], status["audited_pods"] > 0) == (True, "open", True)
    assert "no-rule" not in counters(daemon)


@pytest.mark.parametrize("family", [4, 6])
def test_in_audit_what_cannot_be_judged_passes(lab: LabFactory, agent: AgentFactory, family: int) -> None:
    one = lab(["x/a", "x/b"])
    daemon = agent(one, deny(one, "x/a"), options=["--audit"])
    source, target = one.address("x/b", family), one.address("x/a", family)
    # An answer to what nobody asked: conntrack calls it invalid.
    if family == 4:
        head = bytes.fromhex("4500001c000100004001") + b"\0\0"
        body = bytes.fromhex("0000ffff") + bytes(4)
        packet = bytearray(head + socket.inet_aton(source) + socket.inet_aton(target) + body)
        packet[10:12] = _checksum(bytes(packet[:20]))
    else:
        addresses = socket.inet_pton(socket.AF_INET6, source) + socket.inet_pton(socket.AF_INET6, target)
        body = bytearray(bytes.fromhex("81000000") + bytes(4))
        body[2:4] = _checksum(addresses + bytes([0, 0, 0, 8, 0, 0, 0, 58]) + bytes(body))
        packet = bytearray(bytes.fromhex("6000000000083a40") + addresses + bytes(body))
    with sniffing(one, "x/a", source) as seen:
        send_frames(one, "x/b", family, [bytes(packet)])
        until(lambda: counters(daemon).get("invalid"))
    assert [data[-8:] for data in seen] == [bytes(packet[-8:])]


def _checksum(data: bytes) -> bytes:
    total = sum(int.from_bytes(data[at : at + 2]) for at in range(0, len(data), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return (~total & 0xFFFF).to_bytes(2)


def test_in_audit_packets_pass_without_the_agent(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/a", "x/b"])
    daemon = agent(one, deny(one, "x/a"), options=["--audit"])
    daemon.kill()
    check(one, ("x/b", "x/a", CUT, "..."))


def test_from_enforcing_to_audit_and_back_by_a_restart(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/a", "x/b"])
    daemon = agent(one, deny(one, "x/a"), options=["--audit"])
    with Stream(one, "x/b", "x/a", port=7001) as stream:
        daemon.terminate()
        daemon.options = ()
        daemon.start()
        stream.assert_cut()
        check(one, ("x/b", "x/a", CUT, "XXX"))
        daemon.terminate()
        daemon.options = ("--audit",)
        daemon.start()
        stream.assert_flows(5)
    assert counters(daemon)["audit"] > 0


# --- policies in audit


@contextlib.contextmanager
def streams(one: Lab) -> Iterator[list[Stream]]:
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(Stream(one, "x/b", "x/a", family, sender, 7001 + number))
            for number, (family, sender) in enumerate(((4, "client"), (6, "server")))
        ]


@pytest.mark.parametrize("where", ["policy", "namespace"])
@pytest.mark.parametrize("options", [[], ["--no-offload"]], ids=["offload", "no-offload"])
def test_the_annotation_comes_and_goes_while_connections_are_open(
    lab: LabFactory, agent: AgentFactory, where: str, options: list[str]
) -> None:
    one = lab(["x/a", "x/b"])
    audit = [annotated(CLOSED), namespace("x")] if where == "policy" else [CLOSED, namespace("x", "audit")]
    enforce = [CLOSED, namespace("x")]
    daemon = agent(one, *audit, options=options)
    check(one, ("x/b", "x/a", CUT, "..."))
    assert daemon.status()["audited_pods"] == 2
    with streams(one) as flows:
        daemon.write(*enforce)
        for flow in flows:
            flow.assert_cut()
        check(one, ("x/b", "x/a", CUT, "XXX"))
        assert daemon.status()["audited_pods"] == 0
        before = counters(daemon)["audit"]
        daemon.write(*audit)
        for flow in flows:
            flow.assert_flows(5)
    assert counters(daemon)["audit"] > before


def test_a_change_of_policy_tells_of_the_open_connections_that_it_would_cut(
    lab: LabFactory, agent: AgentFactory
) -> None:
    one = lab(["x/a", "x/b"])
    web = policy("x", "web", select(one, "x/a"), ingress=allow(one, "x/b"))
    head = annotated(network_policy("x/web", {"podSelector": {}}))
    daemon = agent(one, web, head)
    with Stream(one, "x/b", "x/a", port=7001) as stream, Events(daemon.control, "denied") as events:
        daemon.write(policy("x", "web", select(one, "x/a"), ingress=[]), head)
        rows = until(lambda: events.of(7001, reason="audit"))
        stream.assert_flows(5)
        assert stream.retransmitted <= 2
    assert rows[0]["would_deny"] == "no-rule"
    assert rows[0]["policies"] == ["x/web"]


def test_one_policy_that_is_not_in_audit_enforces(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/a", "x/b"])
    # `other` isolates for ingress only: egress stays in audit.
    daemon = agent(one, annotated(CLOSED), OTHER, annotated(deny(one, "x/b", name="not-there")))
    check(one, ("x/b", "x/a", CUT, "XXX"), ("x/a", "outside", "ICMP", "."))
    daemon.write(annotated(CLOSED), annotated(OTHER), namespace("x"))
    check(one, ("x/b", "x/a", CUT, "..."))
    # A policy's own word counts before its namespace's.
    daemon.write(CLOSED, annotated(OTHER, "enforce"), namespace("x", "audit"))
    check(one, ("x/b", "x/a", CUT, "XXX"), ("x/a", "outside", "ICMP", "."))


@pytest.mark.parametrize("resolve", ["auto", "never"])
def test_the_annotation_counts_for_policy_endpoints_of_that_name(
    lab: LabFactory, agent: AgentFactory, resolve: str
) -> None:
    one = lab(["x/a", "x/b"])
    endpoint = deny(one, "x/a", name="closed")
    daemon = agent(one, endpoint, CLOSED, options=["--resolve", resolve])
    check(one, ("x/b", "x/a", CUT, "XXX"))
    daemon.write(endpoint, annotated(CLOSED))
    check(one, ("x/b", "x/a", CUT, "..."))
    # What is written there otherwise does not count, and a word that means nothing is reported.
    daemon.write(endpoint, annotated(CLOSED, "audti"))
    check(one, ("x/b", "x/a", CUT, "XXX"))
    assert any("must be audit or enforce" in problem for problem in daemon.status()["problems"])


def test_a_policy_in_audit_does_not_open_what_is_not_a_policys(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/a", "x/b", "x/c"])
    daemon = agent(one, annotated(CLOSED))
    target, to = udp(one, "x/a", 9000), (one.address("x/a", 4), 9000)
    assert passes(udp(one, "x/c", 5000), to, target)
    assert not arrives(udp(one, "x/c", 5001, address=one.address("x/b", 4)), to, target)
    assert not received(target, 0.0)
    assert counters(daemon)["spoofed"] > 0


def test_strict_mode_isolates_whatever_policies_are_in_audit(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/a", "x/b"])
    agent(one, annotated(CLOSED), options=["--mode", "strict"])
    check(one, ("x/b", "x/a", CUT, "XXX"))


def test_what_people_see(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/a", "x/b"])
    daemon = agent(one, annotated(CLOSED))
    question = ("explain", "--from", "x/b", "--to", "x/a", "--port", "80/TCP")
    told = daemon.podgate(*question, "--expect", "allow").stdout
    assert told.startswith("ALLOW (in audit: egress and ingress would deny)  x/b")
    assert "x/closed ingress: the policy has no ingress rules: nothing is allowed" in told
    assert "The smallest policies that would allow it once enforced:" in told
    assert "in audit: what no rule allows passes too" in daemon.podgate("rules", "x/a").stdout
    assert "2 pods have policies in audit only" in daemon.podgate("status").stdout


def test_the_report_says_what_enforcement_would_break(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/a", "x/b", "x/c"])
    daemon = agent(one, CLOSED)
    assert "Nothing is in audit on this node" in daemon.podgate("audit-report").stdout
    daemon.write(annotated(network_policy("x/closed", {"podSelector": {}, "policyTypes": ["Ingress"]})))
    check(one, ("x/b", "x/a", "80/TCP", "."), families=[4])
    (row,) = until(lambda: daemon.ask("audit")["rows"])
    assert {name: row[name] for name in ("policies", "direction", "reason", "from", "to", "port")} == {
        "policies": ["x/closed"],
        "direction": "ingress",
        "reason": "no-rule",
        "from": "x/b",
        "to": "x/a",
        "port": "80/TCP",
    }
    told = daemon.podgate("audit-report").stdout
    assert "Enforcement would deny, as seen since" in told
    # What it suggests is enough: enforced beside it, the same packets pass.
    report = daemon.ask("audit")
    suggested = [document for text in report["suggestions"] for document in yaml.safe_load_all(text)]
    daemon.write(network_policy("x/closed", {"podSelector": {}, "policyTypes": ["Ingress"]}), *suggested)
    check(one, ("x/b", "x/a", "80/TCP 81/TCP", ".X"), families=[4])
