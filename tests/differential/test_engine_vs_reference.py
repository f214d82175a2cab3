"""The compiled engine against the plain evaluator, over generated policies and packets.

Policies are generated around few addresses and ports, so that prefixes, excepts and ranges overlap;
packets sit on and beside every boundary of what was generated.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dataplane._engine import Publisher, Worker, judge, judge_flow
from dataplane._rules import RuleSet
from dataplane.addresses import BITS, Prefix
from dataplane.model import (
    ANNOTATION_MODE,
    Direction,
    Key,
    PodEndpoint,
    PolicyEndpoint,
    PolicyHead,
    PortRange,
    Rule,
    Snapshot,
)
from dataplane.policy import reference
from dataplane.policy.compile import Compiler, PodEntry
from dataplane.policy.effective import PodRules, effective_rules
from dataplane.reasons import Reason
from dataplane.verdict import End, Verdict

TCP, UDP, SCTP, ICMP, GRE = 6, 17, 132, 1, 47
PORTED = {TCP, UDP, SCTP}
BASES = [b"\x0a\0\0\0", b"\x0a\1\2\0", b"\xff\xff\xff\xff", bytes(4)]
BASES += [b"\xfd" + bytes(15), b"\xfd" + bytes(6) + b"\1\xff\xff" + bytes(6), b"\xff" * 16, bytes(16)]
PORTS = [0, 1, 79, 80, 81, 443, 1000, 65534, 65535]
NODE = b"\xc0\xa8\0\1"

# Hundreds of generated policies each: seconds on a quiet machine, minutes on one that is shared.
pytestmark = pytest.mark.timeout(600)

generous = settings(
    max_examples=500,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@st.composite
def prefixes(draw: st.DrawFn, size: int | None = None) -> Prefix:
    base = draw(st.sampled_from([b for b in BASES if size in (None, len(b))]))
    bits = BITS[len(base)]
    length = draw(st.sampled_from([0, 1, 8, 15, 16, 24, 31, 32, 33, 63, 64, 65, 96, 127, 128, bits - 2]))
    length = min(length, bits)
    # One bit anywhere turns a base into its neighbours.
    number = int.from_bytes(base) ^ draw(st.sampled_from([0] + [1 << i for i in range(bits)]))
    return Prefix((number >> (bits - length) << (bits - length)).to_bytes(len(base)), length)


@st.composite
def port_ranges(draw: st.DrawFn) -> PortRange:
    protocol = draw(st.sampled_from([TCP, TCP, UDP, SCTP, ICMP]))
    first, last = sorted((draw(st.sampled_from(PORTS)), draw(st.sampled_from(PORTS))))
    return PortRange(protocol, *draw(st.sampled_from([(first, first), (first, last), (0, 65535)])))


@st.composite
def rule_lists(draw: st.DrawFn) -> tuple[Rule, ...]:
    rules = []
    for index in range(draw(st.integers(0, 7))):
        cidr = draw(prefixes())
        excepts = draw(st.lists(prefixes(len(cidr.network)), max_size=3))
        ports = draw(st.lists(port_ranges(), max_size=3))
        rules.append(Rule(cidr, tuple(excepts), tuple(ports), index))
    return tuple(rules)


class Node(NamedTuple):
    """Generated policies, what they make of the pods, and the packets' places of interest."""

    rules: dict[Key, PodRules]
    devices: dict[Key, int]
    peers: list[bytes]
    ports: list[int]


PODS = {
    Key("x", "a"): b"\x0a\1\2\5",
    Key("x", "b"): b"\x0a\1\3\5",
    Key("y", "a"): b"\xfd" + bytes(14) + b"\5",
    Key("y", "b"): b"\xfd" + bytes(13) + b"\1\0",
}


@st.composite
def nodes(draw: st.DrawFn) -> Node:
    objects = []
    for number in range(draw(st.integers(0, 4))):
        # Several slices may be of one policy.
        policy = Key("x", draw(st.sampled_from(["p", "q", "r"])))
        selected = draw(st.lists(st.sampled_from(sorted(PODS)), max_size=4, unique=True))
        objects.append(
            PolicyEndpoint(
                Key("x", f"{policy.name}-{number}"),
                policy,
                draw(st.frozensets(st.sampled_from(list(Direction)))),
                tuple(PodEndpoint(pod, PODS[pod], NODE) for pod in selected),
                draw(rule_lists()),
                draw(rule_lists()),
            )
        )
    audited = draw(st.lists(st.sampled_from(["p", "q", "r"]), unique=True))
    heads = tuple(PolicyHead(Key("x", name), {ANNOTATION_MODE: "audit"}) for name in sorted(audited))
    known = Snapshot(policy_endpoints=tuple(objects), policy_heads=heads)
    rules = effective_rules(known, frozenset({NODE}))
    for pod, address in PODS.items():
        rules.setdefault(pod, PodRules(pod, (address,), None, None))
    found: set[bytes] = {*PODS.values(), *BASES}
    ports = set(PORTS)
    for endpoint in objects:
        for rule in (*endpoint.ingress, *endpoint.egress):
            for prefix in (rule.cidr, *rule.excepts):
                for edge in (prefix.network, prefix.last):
                    for step in (-1, 0, 1):
                        found.add(((int.from_bytes(edge) + step) % 256 ** len(edge)).to_bytes(len(edge)))
            for ports_ in rule.ports:
                ports |= {max(ports_.first - 1, 0), min(ports_.last + 1, 65535)}
    return Node(rules, {pod: 11 + i for i, pod in enumerate(PODS)}, sorted(found), sorted(ports))


class Probe(NamedTuple):
    src: bytes
    dst: bytes
    source_pod: Key | None
    destination_pod: Key | None
    protocol: int
    sport: int
    dport: int

    @property
    def port(self) -> int:
        return self.dport if self.protocol in PORTED else 0

    def packet(self, reply: bool = False) -> bytes:
        src, dst, sport, dport = self.src, self.dst, self.sport, self.dport
        kind = 8 if len(src) == 4 else 128
        if reply:
            src, dst, sport, dport, kind = dst, src, dport, sport, 0 if kind == 8 else 129
        if self.protocol == TCP:
            body = struct.pack("!HHIIBBHHH", sport, dport, 0, 0, 0x50, 2, 0, 0, 0)
        elif self.protocol == UDP:
            body = struct.pack("!HHHH", sport, dport, 8, 0)
        elif self.protocol == SCTP:
            body = struct.pack("!HHII", sport, dport, 0, 0)
        elif self.protocol == ICMP:
            body = struct.pack("!BBHHH", kind, 0, 0, self.sport, 0)
        else:
            body = b"payload!"
        if len(src) == 4:
            return (
                struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 0, 0, 64, self.protocol, 0)
                + src
                + dst
                + body
            )
        protocol = 58 if self.protocol == ICMP else self.protocol
        return struct.pack("!IHBB", 6 << 28, len(body), protocol, 64) + src + dst + body

    def wire_protocol(self) -> int:
        """ICMP has a number of its own in each family."""
        return 58 if self.protocol == ICMP and len(self.src) == 16 else self.protocol


@st.composite
def probes(draw: st.DrawFn, node: Node) -> Probe:
    """A flow between two pods, or between a pod and somebody else, either way round."""
    pod = draw(st.sampled_from(sorted(PODS)))
    family = [key for key in sorted(PODS) if len(PODS[key]) == len(PODS[pod])]
    other = draw(st.sampled_from([None, None, *family]))
    if other is not None:
        peer = PODS[other]
    else:
        peer = draw(st.sampled_from([p for p in node.peers if len(p) == len(PODS[pod])]))
    ends = [(PODS[pod], pod), (peer, other)]
    if draw(st.booleans()):
        ends.reverse()
    return Probe(
        ends[0][0],
        ends[1][0],
        ends[0][1],
        ends[1][1],
        draw(st.sampled_from([TCP, TCP, UDP, SCTP, ICMP, GRE])),
        draw(st.sampled_from([1024, 40000])),
        draw(st.sampled_from(node.ports)),
    )


def entries(node: Node, devices: dict[Key, int] | None = None) -> list[PodEntry]:
    devices = devices or node.devices
    return [
        PodEntry(
            key,
            (PODS[key],),
            (devices[key],),
            node.rules[key].ingress,
            node.rules[key].egress,
            audit=node.rules[key].audit,
        )
        for key in sorted(PODS)
    ]


def path(node: Node, probe: Probe, reply: bool = False) -> dict[str, int]:
    ends = [2 if pod is None else node.devices[pod] for pod in (probe.source_pod, probe.destination_pod)]
    indev, outdev = reversed(ends) if reply else ends
    return {"indev": indev, "outdev": outdev}


def expected(node: Node, probe: Probe) -> reference.FlowDecision:
    pods = [None if pod is None else node.rules[pod] for pod in (probe.source_pod, probe.destination_pod)]
    return reference.judge_flow(*pods, probe.src, probe.dst, probe.wire_protocol(), probe.port)


def check_end(end: End, direction: Direction, decision: reference.Decision) -> None:
    assert end.reason is decision.reason
    if decision.rule is None:
        assert end.rule_id == -1
        return
    assert end.pod is not None
    rules = end.pod.ingress if direction is Direction.INGRESS else end.pod.egress
    assert rules is not None
    assert rules.rules[end.rule_id] == (decision.policy, decision.rule)


def check(verdict: Verdict, decision: reference.FlowDecision, reply: bool = False) -> None:
    plain = {Reason.POLICY_RULE, Reason.NOT_ISOLATED, Reason.NOT_A_POD}
    reason = Reason.REPLY if reply and decision.allow and decision.reason in plain else decision.reason
    assert (verdict.allow, verdict.reason) == (decision.allow, reason)
    assert verdict.audited is (Reason.NO_RULE if reason is Reason.AUDIT else Reason.NONE)
    check_end(verdict.egress, Direction.EGRESS, decision.egress)
    check_end(verdict.ingress, Direction.INGRESS, decision.ingress)
    if verdict.reason is not Reason.SAME_POD:
        by_rules = {Reason.POLICY_RULE, Reason.AUDIT}
        judged = (decision.egress.reason in by_rules) * 1 | (decision.ingress.reason in by_rules) * 2
        assert verdict.bits == (judged if verdict.allow else 0)


@generous
@given(st.data())
def test_packets(data: st.DataObject) -> None:
    """Verdict, reason, policy and rule of both ends, for packets and their replies."""
    node = data.draw(nodes())
    table = Compiler().table(1, entries(node), {NODE})
    for probe in data.draw(st.lists(probes(node), min_size=1, max_size=12)):
        decision = expected(node, probe)
        check(judge(table, probe.packet(), **path(node, probe)), decision)
        back = judge(table, probe.packet(reply=True), reply=True, **path(node, probe, reply=True))
        check(back, decision, reply=True)


@generous
@given(st.data())
def test_live_flows(data: st.DataObject) -> None:
    """The same by addresses alone, as flows are judged again from conntrack."""
    node = data.draw(nodes())
    table = Compiler().table(1, entries(node), {NODE})
    owners = {address: key for key, address in PODS.items()}
    for probe in data.draw(st.lists(probes(node), min_size=1, max_size=12)):
        named = probe._replace(source_pod=owners.get(probe.src), destination_pod=owners.get(probe.dst))
        found = judge_flow(table, probe.src, probe.dst, probe.wire_protocol(), probe.sport, probe.dport)
        check(found, expected(node, named))


@generous
@given(st.data())
def test_rule_sets(data: st.DataObject) -> None:
    """Compiled intervals against one rule after the other, on every edge of every prefix and port."""
    rules = data.draw(rule_lists())
    compiled = RuleSet(rules)
    peers = {edge for rule in rules for p in (rule.cidr, *rule.excepts) for edge in (p.network, p.last)}
    peers |= {
        ((int.from_bytes(p) + step) % 256 ** len(p)).to_bytes(len(p)) for p in peers for step in (-1, 1)
    }
    peers |= set(BASES)
    numbers = {(protocol, port) for protocol in (TCP, ICMP) for port in PORTS}
    for rule in rules:
        for protocol, first, last in rule.ports:
            numbers |= {(protocol, p) for p in (max(first - 1, 0), first, last, min(last + 1, 65535))}
    places = [(peer, *number) for peer in sorted(peers) for number in sorted(numbers)]
    for peer, protocol, port in data.draw(st.lists(st.sampled_from(places), min_size=20, max_size=60)):
        first_match = next(
            (i for i, rule in enumerate(rules) if reference.matches(rule, peer, protocol, port)), -1
        )
        assert compiled.find(peer, protocol, port) == first_match


@generous
@given(st.data())
def test_cache_changes_nothing(data: st.DataObject) -> None:
    """With and without a flow cache: one answer, over packets, replies, and tables that change."""
    publisher = Publisher()
    compiler = Compiler()
    cached = Worker(publisher, cache_entries=data.draw(st.sampled_from([8, 64, 4096])), seed=1)
    plain = Worker(publisher, cache_entries=0)
    versions = data.draw(st.lists(nodes(), min_size=1, max_size=3))
    flows = data.draw(st.lists(probes(versions[0]), min_size=1, max_size=6))
    generation = 0
    for step in data.draw(st.lists(st.integers(0, 2 * len(flows) + len(versions)), min_size=4, max_size=30)):
        if step >= 2 * len(flows) or generation == 0:
            generation += 1
            node = versions[step % len(versions)]
            publisher.publish(compiler.table(generation, entries(node), {NODE}))
        probe, reply = flows[step // 2 % len(flows)], bool(step % 2)
        where = path(versions[0], probe, reply)
        verdict = cached.judge(probe.packet(reply), reply=reply, **where)
        assert verdict._replace(cached=False) == plain.judge(probe.packet(reply), reply=reply, **where)
    assert plain.cache_stats()[0] == 0
    assert publisher.quiesced()
