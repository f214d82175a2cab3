"""The oracle itself, held to the words of the specification."""

from __future__ import annotations

import pytest

from dataplane.addresses import parse_address as address
from dataplane.addresses import parse_prefix
from dataplane.model import PROTOCOLS, Direction, Key, PortRange, Rule
from dataplane.policy.effective import DirectionRules, PodRules
from dataplane.policy.reference import judge_end, judge_flow, matches
from dataplane.reasons import Reason

POLICY = Key("x", "p")
TCP, UDP, SCTP, ICMP, AH = 6, 17, 132, 1, 51


def rule(text: str, index: int = 0) -> Rule:
    """`cidr[!except…][:port,port…]`, ports as `80/TCP`, `80-90/UDP` or `TCP`; brackets as in [::]/0."""
    head, _, ports = text.partition(" :")
    cidr, *excepts = head.split("!")
    return Rule(
        parse_prefix(cidr.strip())[0],
        tuple(parse_prefix(each.strip())[0] for each in excepts),
        tuple(port_range(each) for each in ports.split(",") if each),
        index,
    )


def port_range(text: str) -> PortRange:
    numbers, _, protocol = text.strip().rpartition("/")
    if not numbers:
        return PortRange(PROTOCOLS[protocol], 0, 65535)
    first, _, last = numbers.partition("-")
    return PortRange(PROTOCOLS[protocol], int(first), int(last or first))


def rules(*texts: str) -> DirectionRules:
    return DirectionRules(tuple((POLICY, rule(text, index)) for index, text in enumerate(texts)))


def pod(
    name: str = "a",
    ip: str = "10.9.0.1",
    ingress: DirectionRules | None = None,
    egress: DirectionRules | None = None,
) -> PodRules:
    return PodRules(Key("x", name), (address(ip),), ingress, egress)


def allows(allowed: DirectionRules, peer: str, port: int, protocol: int = TCP) -> bool:
    return judge_end(pod(ingress=allowed), Direction.INGRESS, address(peer), protocol, port).allow


FIRST = ("10.0.0.0/8 ! 10.1.2.0/24 :80/TCP", "10.1.0.0/16 :443/TCP")


def test_overlap_except_limits_only_its_own_rule() -> None:
    assert allows(rules(*FIRST), "10.1.2.9", 443)
    assert not allows(rules(*FIRST), "10.1.2.9", 80)


def test_overlap_longer_prefix_does_not_hide_shorter_ones() -> None:
    allowed = rules(*FIRST, "10.1.2.5/32 :22/TCP")
    assert not allows(allowed, "10.1.2.5", 80)
    assert allows(allowed, "10.1.2.5", 443)
    assert allows(allowed, "10.1.2.5", 22)


def test_overlap_same_cidr_once_with_ports_once_with_except() -> None:
    allowed = rules("0.0.0.0/0 :53/TCP", "0.0.0.0/0 ! 10.0.0.0/8")
    assert allows(allowed, "10.0.0.10", 53)
    assert not allows(allowed, "10.0.0.10", 54)


def test_overlap_except_inside_another_rules_cidr() -> None:
    allowed = rules("0.0.0.0/0 ! 10.0.0.0/24", "10.0.0.0/16 :80/TCP")
    assert allows(allowed, "10.0.5.5", 443)
    assert allows(allowed, "10.0.0.5", 80)
    assert not allows(allowed, "10.0.0.5", 443)


@pytest.mark.parametrize(
    ("text", "peer", "protocol", "port", "expected"),
    [
        ("10.0.0.0/8", "10.255.255.255", ICMP, 0, True),
        ("10.0.0.0/8", "11.0.0.0", TCP, 80, False),
        ("10.0.0.0/8", "10.0.0.1", AH, 0, True),
        ("10.0.0.0/8 :TCP", "10.0.0.1", TCP, 0, True),
        ("10.0.0.0/8 :TCP", "10.0.0.1", TCP, 65535, True),
        ("10.0.0.0/8 :TCP", "10.0.0.1", UDP, 53, False),
        ("10.0.0.0/8 :TCP", "10.0.0.1", ICMP, 0, False),
        ("10.0.0.0/8 :80/SCTP", "10.0.0.1", TCP, 80, False),
        ("10.0.0.0/8 :80/SCTP", "10.0.0.1", SCTP, 80, True),
        ("10.0.0.0/8 :80-90/TCP", "10.0.0.1", TCP, 90, True),
        ("10.0.0.0/8 :80-90/TCP", "10.0.0.1", TCP, 91, False),
        ("10.0.0.0/8 :80-90/TCP", "10.0.0.1", TCP, 79, False),
        ("10.0.0.5", "10.0.0.5", TCP, 1, True),
        ("10.0.0.5", "10.0.0.4", TCP, 1, False),
        ("10.0.0.0/8 ! 10.0.0.0/8", "10.0.0.1", TCP, 1, False),
        ("10.0.0.0/8 ! 10.1.0.0/16 ! 10.2.0.0/16", "10.2.3.4", TCP, 1, False),
        ("0.0.0.0/0", "2001:db8::1", TCP, 1, False),
        ("::/0", "10.0.0.1", TCP, 1, False),
        ("::/0", "2001:db8::1", TCP, 1, True),
        ("2001:db8::/32 ! 2001:db8:1::/48", "2001:db8:1::9", TCP, 1, False),
    ],
)
def test_one_rule(text: str, peer: str, protocol: int, port: int, expected: bool) -> None:
    assert matches(rule(text), address(peer), protocol, port) is expected


def test_first_matching_rule_is_reported() -> None:
    decision = judge_end(
        pod(egress=rules("10.0.0.0/8 :1/TCP", "10.0.0.0/9", "10.0.0.0/10")),
        Direction.EGRESS,
        address("10.0.0.1"),
        TCP,
        80,
    )
    assert (decision.allow, decision.reason, decision.policy) == (True, Reason.POLICY_RULE, POLICY)
    assert decision.rule is not None
    assert decision.rule.index == 1


def test_empty_rules_isolate_and_no_rules_do_not() -> None:
    peer = address("10.0.0.1")
    assert judge_end(pod(ingress=rules()), Direction.INGRESS, peer, TCP, 1).reason is Reason.NO_RULE
    assert judge_end(pod(ingress=rules()), Direction.EGRESS, peer, TCP, 1).reason is Reason.NOT_ISOLATED
    assert judge_end(None, Direction.EGRESS, peer, TCP, 1).reason is Reason.NOT_A_POD


@pytest.mark.parametrize(
    ("egress", "ingress", "allow", "reason"),
    [
        (None, None, True, Reason.NOT_ISOLATED),
        (rules("0.0.0.0/0"), None, True, Reason.POLICY_RULE),
        (None, rules("0.0.0.0/0"), True, Reason.POLICY_RULE),
        (rules(), rules("0.0.0.0/0"), False, Reason.NO_RULE),
        (rules("0.0.0.0/0"), rules(), False, Reason.NO_RULE),
        (rules("10.0.0.2"), rules("10.0.0.1"), True, Reason.POLICY_RULE),
        (rules("10.0.0.1"), rules("10.0.0.1"), False, Reason.NO_RULE),
        (rules("10.0.0.2"), rules("10.0.0.2"), False, Reason.NO_RULE),
    ],
)
def test_both_ends_must_allow(
    egress: DirectionRules | None, ingress: DirectionRules | None, allow: bool, reason: Reason
) -> None:
    source, destination = pod("a", "10.0.0.1", egress=egress), pod("b", "10.0.0.2", ingress=ingress)
    decision = judge_flow(source, destination, address("10.0.0.1"), address("10.0.0.2"), TCP, 80)
    assert (decision.allow, decision.reason) == (allow, reason)


def test_outside_to_outside_is_nobodys_pod() -> None:
    decision = judge_flow(None, None, address("192.0.2.1"), address("192.0.2.2"), TCP, 80)
    assert (decision.allow, decision.reason) == (True, Reason.NOT_A_POD)


def test_a_pod_reaches_itself_but_not_with_a_foreign_address() -> None:
    closed = pod("a", "10.0.0.1", ingress=rules(), egress=rules())
    own, other = address("10.0.0.1"), address("10.0.0.9")
    assert judge_flow(closed, closed, own, own, TCP, 80).reason is Reason.SAME_POD
    assert not judge_flow(closed, closed, other, own, TCP, 80).allow
