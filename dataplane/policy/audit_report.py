"""What enforcement would break, by policy, workload and port, and the policies that would allow it."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from dataplane.addresses import parse_address
from dataplane.model import PROTOCOLS, Direction, Key, LabelSelector, Pod, Snapshot
from dataplane.policy.suggest import Suggestions
from dataplane.policy.why import Whys
from dataplane.policy.workloads import word_of
from dataplane.reasons import Reason

SUGGESTED = 50  # rows, those with most packets, for which a policy is written


class Denied(Protocol):
    """What would be denied (`observe.audit.Denial`)."""

    @property
    def reason(self) -> str: ...
    @property
    def direction(self) -> str | None: ...
    @property
    def policies(self) -> tuple[str, ...]: ...
    @property
    def src(self) -> str | None: ...
    @property
    def src_pod(self) -> str | None: ...
    @property
    def dst(self) -> str | None: ...
    @property
    def dst_pod(self) -> str | None: ...
    @property
    def protocol(self) -> str: ...
    @property
    def port(self) -> int | None: ...


class _Row(NamedTuple):
    policies: tuple[str, ...]
    direction: str | None
    reason: str
    source: str
    destination: str
    port: str


@dataclass(slots=True)
class _Seen:
    packets: int = 0
    pairs: set[tuple[str | None, str | None]] = field(default_factory=set)
    example: Denied | None = None


def audit_report(
    denials: Iterable[tuple[Denied, int]], known: Snapshot, resolved: Snapshot, *, suggest: bool = True
) -> dict[str, Any]:
    """JSON-ready: `rows`, most packets first, and `suggestions`, YAML documents of policies to add.

    `known`: the objects as they were read; `resolved`: the same with the PolicyEndpoints in force. Both may
    be empty: pods then count by their names, and nothing is suggested.
    """
    workloads = {str(pod.key): _workload(pod) for pod in known.pods}

    def name(pod: str | None, address: str | None) -> str:
        return workloads.get(pod, pod) if pod is not None else str(address)

    rows: defaultdict[_Row, _Seen] = defaultdict(_Seen)
    for denial, count in denials:
        port = denial.protocol if denial.port is None else f"{denial.port}/{denial.protocol}"
        row = _Row(
            denial.policies,
            denial.direction,
            denial.reason,
            name(denial.src_pod, denial.src),
            name(denial.dst_pod, denial.dst),
            port,
        )
        seen = rows[row]
        seen.packets += count
        seen.pairs.add((denial.src, denial.dst))
        seen.example = seen.example or denial
    ordered = sorted(rows.items(), key=lambda item: (-item[1].packets, tuple(map(str, item[0]))))
    suggestions: list[str] = []
    if suggest and known.pods:
        examples = [seen.example for _, seen in ordered if seen.example is not None]
        suggestions = _suggestions(examples[:SUGGESTED], known, resolved)
    return {
        "packets": sum(seen.packets for seen in rows.values()),
        "rows": [
            {
                "policies": list(row.policies),
                "direction": row.direction,
                "reason": row.reason,
                "from": row.source,
                "to": row.destination,
                "port": row.port,
                "packets": seen.packets,
                "pairs": len(seen.pairs),
            }
            for row, seen in ordered
        ],
        "suggestions": suggestions,
    }


def _workload(pod: Pod) -> str:
    return f"{pod.key.namespace}/{word_of(LabelSelector.of(pod.labels)) or pod.key.name}"


def _suggestions(denials: Iterable[Denied], known: Snapshot, resolved: Snapshot) -> list[str]:
    writer = Suggestions(known, Whys(known, resolved))
    found: dict[str, str] = {}
    for denial in denials:
        egress = denial.direction == Direction.EGRESS
        own, peer = (denial.src_pod, denial.dst) if egress else (denial.dst_pod, denial.src)
        icmp = denial.protocol.startswith("ICMP")
        if denial.reason != Reason.NO_RULE.text or own is None or peer is None:
            continue
        if not icmp and (denial.protocol not in PROTOCOLS or denial.port is None):
            continue  # no policy can name it
        made = writer.allow(
            Key(*own.split("/", 1)),
            Direction.EGRESS if egress else Direction.INGRESS,
            parse_address(peer),
            None if icmp else PROTOCOLS[denial.protocol],
            denial.port or 0,
        )
        document = made.document()
        if document is not None:
            same = json.dumps({"spec": document["spec"], "namespace": document["metadata"]["namespace"]})
            found.setdefault(same, made.yaml())
    return list(found.values())
