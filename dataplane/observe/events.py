"""A verdict as the record people and programs read: flow-log field names, pods and policies named."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from dataplane.addresses import format_address
from dataplane.model import PROTOCOL_NAMES, Direction, Key
from dataplane.reasons import Reason
from dataplane.verdict import Conversation, End, Event, Flow, Verdict

OTHER_PROTOCOLS = {1: "ICMP", 58: "ICMPv6", 33: "DCCP", 136: "UDPLITE", 47: "GRE", 50: "ESP", 51: "AH"}

TCP_FLAGS = ("FIN", "SYN", "RST", "PSH", "ACK", "URG", "ECE", "CWR")  # from the lowest bit, RFC 9293 §3.1


def protocol_name(number: int) -> str:
    """`TCP`, `ICMPv6` …, or the number."""
    return PROTOCOL_NAMES.get(number) or OTHER_PROTOCOLS.get(number, str(number))


def pod_name(names: Mapping[bytes, Key], address: bytes) -> str | None:
    """`namespace/name` of the pod with this address, None when it is no pod of this node."""
    key = names.get(address)
    return str(key) if key else None


def deciding_rule(verdict: Verdict) -> tuple[Key, int] | None:
    """The policy whose rule decided, the deciding end's first, and the rule's index; None: no rule did."""
    if Reason.HOOK in (verdict.reason, verdict.audited):
        return None
    ends = [(verdict.egress, Direction.EGRESS), (verdict.ingress, Direction.INGRESS)]
    ends.sort(key=lambda end: end[1] is not verdict.direction)
    for end, direction in ends:
        if found := _rule(end, direction):
            return found
    return None


def isolating(verdict: Verdict) -> tuple[Key, ...]:
    """The policies of the end that denies for want of a rule, or would but for an audit."""
    if verdict.direction is None or Reason.NO_RULE not in (verdict.reason, verdict.audited):
        return ()
    end = verdict.egress if verdict.direction is Direction.EGRESS else verdict.ingress
    return end.pod.policies(verdict.direction) if end.pod is not None else ()


def deciding_policy(verdict: Verdict) -> str | None:
    """`namespace/name` of the policy whose rule decided; None: no rule did."""
    found = deciding_rule(verdict)
    return str(found[0]) if found else None


def _rule(end: End, direction: Direction) -> tuple[Key, int] | None:
    found = end.pod.rule(direction, end.rule_id) if end.pod is not None else None
    return (found[0], found[1].index) if found else None


def _describe_end(end: End, direction: Direction) -> dict[str, Any]:
    policy, rule = _rule(end, direction) or (None, None)
    return {
        "pod": str(end.pod.key) if end.pod is not None else None,
        "reason": None if end.reason is Reason.NONE else end.reason.text,
        "policy": str(policy) if policy else None,
        "rule": rule,
    }


def flag_names(flags: int) -> str:
    """TCP flags by name, as `SYN,ACK`; `-` for none."""
    return ",".join(name for bit, name in enumerate(TCP_FLAGS) if flags >> bit & 1) or "-"


def describe_event(event: Event, names: Mapping[bytes, Key], node: str | None) -> dict[str, Any]:
    """One event as a JSON-ready record. `names`: the pods of this node by address.

    Of its verdict all that `describe_verdict` says.
    """
    packet, flow = event.packet, event.packet.flow
    readable = packet.reason is Reason.NONE
    icmp = readable and flow.protocol in (1, 58)
    return {
        "ts": _time(event.when_ns),
        **describe_verdict(event.verdict),
        **describe_ends(flow, names),
        "tcp_flags": flag_names(packet.tcp_flags) if readable and flow.protocol == 6 else None,
        "icmp_type": packet.icmp_type if icmp else None,
        "icmp_code": packet.icmp_code if icmp else None,
        "node": node,
        "reply": event.reply,
        "cached": event.verdict.cached,
        "generation": event.generation,
        "bytes": packet.length,
    }


def describe_conversation(flow: Conversation, names: Mapping[bytes, Key]) -> dict[str, Any]:
    """A flow of a capture as a JSON-ready record, as its originator's packets have it.

    `ts` is the time of its first packet, `last` of its last. `packets` and `bytes` are of its
    originator, `reply_packets` and `reply_bytes` of the other end; `related` counts ICMP errors.
    `began` is `opened`, or says how its direction was told where it began before the capture.
    """
    icmp = flow.flow.protocol in (1, 58)
    return {
        "ts": _time(flow.first_ns),
        **describe_verdict(flow.verdict),
        **describe_ends(flow.flow, names),
        "icmp_type": flow.flow.dport >> 8 if icmp else None,
        "icmp_code": flow.flow.dport & 0xFF if icmp else None,
        "node": None,
        "last": _time(flow.last_ns),
        "began": flow.began.name.lower().replace("_", "-"),
        "opened": flow.opened,
        "packets": flow.packets[0],
        "bytes": flow.bytes[0],
        "reply_packets": flow.packets[1],
        "reply_bytes": flow.bytes[1],
        "related": flow.related,
    }


def _time(when_ns: int) -> str:
    return datetime.fromtimestamp(when_ns / 1e9, UTC).isoformat(timespec="microseconds")


def describe_verdict(verdict: Verdict) -> dict[str, Any]:
    """A verdict's part of a record.

    `policy` and `rule` are of the rule that decided; `egress` and `ingress` say the same of each end,
    their `reason` null where that end was not asked. `would_deny`: why it would be denied but for an audit.
    `policies`: those that isolate the pod at the end that denies, or would.
    """
    policy, rule = deciding_rule(verdict) or (None, None)
    return {
        "verdict": "allow" if verdict.allow else "deny",
        "reason": verdict.reason.text,
        "would_deny": verdict.audited.text if verdict.audited is not Reason.NONE else None,
        "direction": str(verdict.direction) if verdict.direction else None,
        "policy": str(policy) if policy else None,
        "rule": rule,
        "policies": [str(each) for each in isolating(verdict)],
        "egress": _describe_end(verdict.egress, Direction.EGRESS),
        "ingress": _describe_end(verdict.ingress, Direction.INGRESS),
    }


def has_ports(protocol: int) -> bool:
    """Whether packets of an IP protocol have ports that rules look at."""
    return protocol in (6, 17, 33, 132, 136)


def describe_ends(flow: Flow, names: Mapping[bytes, Key]) -> dict[str, Any]:
    """The addresses, ports and pods of a flow's record."""
    return {
        "src": format_address(flow.src) if flow.src else None,
        "src_port": flow.sport if flow.has_ports else None,
        "dst": format_address(flow.dst) if flow.dst else None,
        "dst_port": flow.dport if flow.has_ports else None,
        "protocol": protocol_name(flow.protocol),
        "src_pod": pod_name(names, flow.src),
        "dst_pod": pod_name(names, flow.dst),
    }
