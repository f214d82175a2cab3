"""A verdict as the record people and programs read: flow-log field names, pods and policies named."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from dataplane.addresses import format_address
from dataplane.model import PROTOCOL_NAMES, Direction, Key
from dataplane.verdict import Event, Verdict

OTHER_PROTOCOLS = {1: "ICMP", 58: "ICMPv6", 33: "DCCP", 136: "UDPLITE", 47: "GRE", 50: "ESP", 51: "AH"}


def protocol_name(number: int) -> str:
    """`TCP`, `ICMPv6` …, or the number."""
    return PROTOCOL_NAMES.get(number) or OTHER_PROTOCOLS.get(number, str(number))


def pod_name(names: Mapping[bytes, Key], address: bytes) -> str | None:
    """`namespace/name` of the pod with this address, None when it is no pod of this node."""
    key = names.get(address)
    return str(key) if key else None


def deciding_policy(verdict: Verdict) -> str | None:
    """`namespace/name` of the policy whose rule decided, the deciding end's first; None: no rule did."""
    ends = [(verdict.egress, Direction.EGRESS), (verdict.ingress, Direction.INGRESS)]
    ends.sort(key=lambda end: end[1] is not verdict.direction)
    for end, direction in ends:
        found = end.pod.rule(direction, end.rule_id) if end.pod is not None else None
        if found:
            return str(found[0])
    return None


def describe_event(event: Event, names: Mapping[bytes, Key], node: str | None) -> dict[str, Any]:
    """One event as a JSON-ready record. `names`: the pods of this node by address."""
    verdict, packet, flow = event.verdict, event.packet, event.packet.flow
    return {
        "ts": datetime.fromtimestamp(event.when_ns / 1e9, UTC).isoformat(timespec="microseconds"),
        "verdict": "allow" if verdict.allow else "deny",
        "reason": verdict.reason.text,
        "direction": str(verdict.direction) if verdict.direction else None,
        "policy": deciding_policy(verdict),
        "src": format_address(flow.src) if flow.src else None,
        "src_port": flow.sport if flow.has_ports else None,
        "dst": format_address(flow.dst) if flow.dst else None,
        "dst_port": flow.dport if flow.has_ports else None,
        "protocol": protocol_name(flow.protocol),
        "src_pod": pod_name(names, flow.src),
        "dst_pod": pod_name(names, flow.dst),
        "node": node,
        "reply": event.reply,
        "cached": verdict.cached,
        "generation": event.generation,
        "bytes": packet.length,
    }
