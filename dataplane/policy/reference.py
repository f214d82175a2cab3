"""The slow oracle: what a packet's verdict must be, written straight from the rules' meaning.

It knows nothing of intervals, tables or caches, and shares no code with them, so that a comparison
with the engine means something. One rule at a time, in order; the first that matches is reported.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_address, ip_network

from dataplane.addresses import Prefix
from dataplane.model import Direction, Key, Rule
from dataplane.policy.effective import PodRules
from dataplane.reasons import Reason


@dataclass(frozen=True, slots=True)
class Decision:
    """The verdict of one end. `policy` and `rule` are set exactly when a rule decided."""

    allow: bool
    reason: Reason
    policy: Key | None = None
    rule: Rule | None = None


@dataclass(frozen=True, slots=True)
class FlowDecision:
    """The verdict of both ends together: allowed when both allow."""

    allow: bool
    reason: Reason
    egress: Decision
    ingress: Decision


def matches(rule: Rule, peer: bytes, protocol: int, port: int) -> bool:
    """Whether `rule` allows `peer` (packed) at an IP protocol and destination port (0 where it has none)."""
    if not _inside(peer, rule.cidr):
        return False
    for hole in rule.excepts:
        if _inside(peer, hole):
            return False
    if not rule.ports:
        return True
    return any(ports.protocol == protocol and ports.first <= port <= ports.last for ports in rule.ports)


def judge_end(pod: PodRules | None, direction: Direction, peer: bytes, protocol: int, port: int) -> Decision:
    """The verdict of one end of a flow; `pod` is None when this end is no pod of this node."""
    if pod is None:
        return Decision(True, Reason.NOT_A_POD)
    rules = pod.ingress if direction is Direction.INGRESS else pod.egress
    if rules is None:
        return Decision(True, Reason.NOT_ISOLATED)
    for policy, rule in rules.rules:
        if matches(rule, peer, protocol, port):
            return Decision(True, Reason.POLICY_RULE, policy, rule)
    if direction in pod.audit:
        return Decision(True, Reason.AUDIT)
    return Decision(False, Reason.NO_RULE)


def judge_flow(
    source_pod: PodRules | None,
    destination_pod: PodRules | None,
    source: bytes,
    destination: bytes,
    protocol: int,
    port: int,
) -> FlowDecision:
    """The verdict of a packet that opens a flow; `port` is its destination port (0 where it has none).

    Both ends are judged even when the first denies. Where both deny, the reason is that of egress.
    """
    if (
        source_pod is not None
        and destination_pod is not None
        and source_pod.pod == destination_pod.pod
        and source in source_pod.addresses
        and destination in destination_pod.addresses
    ):
        same = Decision(True, Reason.SAME_POD)
        return FlowDecision(True, Reason.SAME_POD, same, same)
    egress = judge_end(source_pod, Direction.EGRESS, destination, protocol, port)
    ingress = judge_end(destination_pod, Direction.INGRESS, source, protocol, port)
    if not egress.allow:
        return FlowDecision(False, egress.reason, egress, ingress)
    if not ingress.allow:
        return FlowDecision(False, ingress.reason, egress, ingress)
    reasons = {egress.reason, ingress.reason}
    for reason in (Reason.AUDIT, Reason.POLICY_RULE, Reason.NOT_ISOLATED):
        if reason in reasons:
            return FlowDecision(True, reason, egress, ingress)
    return FlowDecision(True, Reason.NOT_A_POD, egress, ingress)


def _inside(address: bytes, prefix: Prefix) -> bool:
    return ip_address(address) in ip_network((prefix.network, prefix.length))
