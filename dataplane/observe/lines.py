"""A verdict record (`events.describe_event`) as one line of aligned text for people."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

Record = Mapping[str, Any]

# A column grows with what it shows and stays so; beyond this much a long entry stands out by itself.
NAMED = 3  # policies that isolate the pod of a denial
WIDEST = {"ends": 72, "protocol": 20, "decision": 84}
_WORDS = {"allow": "32", "deny": "31"}  # SGR colours
_DIM, _YELLOW = "2", "33"
# What each type means, from IANA's icmp-parameters and icmpv6-parameters.
_ICMP = {
    "ICMP": {0: "echo reply", 3: "unreachable", 5: "redirect", 8: "echo", 11: "time exceeded"},
    "ICMPv6": {
        1: "unreachable",
        2: "packet too big",
        3: "time exceeded",
        128: "echo",
        129: "echo reply",
        135: "neighbour solicitation",
        136: "neighbour advertisement",
    },
}


class Lines:
    """Turns records into lines whose columns stand below each other. One per output.

    A record has the flow log's fields; those that are missing are left out of the line.
    """

    def __init__(self, *, colour: bool = False) -> None:
        self._colour = colour
        self._widths = {"ends": 52, "protocol": 11, "decision": 32}

    def line(self, record: Record) -> str:
        """`14:03:22.123456  deny   shop/web:40112 > shop/db:5432  TCP SYN  ingress: no-rule  …`"""
        if "lost" in record:
            return self._paint(loss(record), _YELLOW)
        verdict = str(record["verdict"])
        parts = [
            self._paint(clock(record.get("ts")), _DIM),
            self._paint(verdict.ljust(5), _WORDS.get(verdict, _YELLOW)),
            self._pad("ends", f"{end(record, 'src')} > {end(record, 'dst')}"),
            self._pad("protocol", protocol(record)),
            self._pad("decision", decision(record)),
            self._paint(evaluation(record), _DIM),
        ]
        return "  ".join(part for part in parts if part).rstrip()

    def _pad(self, column: str, text: str) -> str:
        width = max(self._widths[column], min(len(text), WIDEST[column]))
        self._widths[column] = width
        return text.ljust(width)

    def _paint(self, text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._colour and text.strip() else text


def clock(ts: str | None) -> str:
    """The local time of day of an ISO 8601 time, with microseconds."""
    if ts is None:
        return ""
    return datetime.fromisoformat(ts).astimezone().strftime("%H:%M:%S.%f")


def end(record: Record, side: str) -> str:
    """`namespace/pod:port`, or the address where no pod is known; `side` is `src` or `dst`."""
    address = record.get(side)
    pod = record.get(f"{side}_pod")
    port = record.get(f"{side}_port")
    name = pod or address or "?"
    if port is None:
        return str(name)
    return f"[{name}]:{port}" if not pod and ":" in name else f"{name}:{port}"


def protocol(record: Record) -> str:
    """`TCP SYN,ACK`, `UDP`, `ICMP echo`, `ICMP 13/0`."""
    name = str(record["protocol"])
    if flags := record.get("tcp_flags"):
        return f"{name} {flags}"
    kind = record.get("icmp_type")
    if kind is None:
        return name
    known = _ICMP.get(name, {}).get(kind)
    return f"{name} {known}" if known else f"{name} {kind}/{record.get('icmp_code')}"


def decision(record: Record) -> str:
    """Who decided and why: `ingress: policy-rule of shop/db rule 0`, each end that a rule allowed."""
    ends = [(side, record[side]) for side in ("egress", "ingress") if record.get(side)]
    ruled = [f"{side}: {_named(one)}" for side, one in ends if one.get("policy")]
    if record["verdict"] == "allow" and record["reason"] == "policy-rule" and ruled:
        return ", ".join(ruled)
    text = _named(record)
    if record.get("would_deny"):
        text += f", would deny: {record['would_deny']}"
    if isolating := record.get("policies"):
        more = f" and {len(isolating) - NAMED} more" if len(isolating) > NAMED else ""
        text += f" (isolated by {', '.join(isolating[:NAMED])}{more})"
    direction = record.get("direction")
    return f"{direction}: {text}" if direction else text


def _named(one: Record) -> str:
    reason, policy, rule = str(one["reason"]), one.get("policy"), one.get("rule")
    if not policy:
        return reason
    by = policy if rule is None else f"{policy} rule {rule}"
    return f"{reason} of {by}" if reason == "policy-rule" else f"{reason} ({by})"


def evaluation(record: Record) -> str:
    """`evaluated, table 7`, or `cached, table 7`: by which table, and whether its rules were asked."""
    if record.get("cached") is None:
        return ""
    word = "cached" if record["cached"] else "evaluated"
    return f"{word}, table {record['generation']}" if record.get("generation") else word


def loss(record: Record) -> str:
    """What a record of lost records says."""
    count = record["lost"]
    what = "1 record" if count == 1 else f"{count:,} records"
    where = {
        "reader": "this reader was too slow",
        "ring": "the agent was too busy with packets to keep them",
    }
    return f"-- {what} lost: {where.get(str(record.get('where')), 'not known why')} --"
