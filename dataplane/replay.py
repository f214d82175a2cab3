"""A capture judged by policies: who talked to whom, and what the policies make of it.

The policies' objects become one table with every pod of the cluster, as `explain` has it; a capture's
packets pass the engine with it (`_replay`), and its flows are gathered here.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from dataplane._engine import Publisher, judge_flow
from dataplane._pcap import Capture, Filter
from dataplane._replay import Replay
from dataplane.addresses import format_address
from dataplane.model import Direction, Key, Snapshot
from dataplane.observe.events import describe_event
from dataplane.policy.compile import Compiler
from dataplane.policy.effective import isolating_policies
from dataplane.policy.explain import known_pods, table_of_everything
from dataplane.policy.resolve import in_force
from dataplane.reasons import Reason
from dataplane.verdict import Began, Conversation, End, Flow, Verdict

Record = dict[str, Any]


class Policies:
    """What some objects make of traffic: every pod of them, on whatever node, known by its addresses."""

    def __init__(self, known: Snapshot) -> None:
        self.known = known
        self.resolved = in_force(known)
        peers = known_pods(self.resolved)
        self.table = table_of_everything(self.resolved, Compiler())
        self.names: Mapping[bytes, Key] = {
            address: key for key, peer in peers.items() for address in peer.addresses
        }
        self.nodes = [peers[entry.key].node_ips for entry in self.table.pods]
        self.isolating = isolating_policies(self.resolved)
        self.services: Mapping[bytes, Key] = {
            address: service.key for service in known.services for address in service.cluster_ips
        }
        self._nodes_of = {entry.key: nodes for entry, nodes in zip(self.table.pods, self.nodes, strict=True)}

    def replay(self, chosen: Filter | None = None, *, seed: int | None = None) -> Replay:
        """The engine with this table, ready for a capture.

        `chosen`: which of its packets. `seed` keys the hash tables, random by default.
        """
        publisher = Publisher()
        publisher.publish(self.table)
        return Replay(publisher, self.nodes, chosen=chosen, seed=seed)

    def verdict(self, flow: Flow) -> Verdict:
        """For a flow as its originator opened it."""
        src, dst = self.names.get(flow.src), self.names.get(flow.dst)
        verdict = judge_flow(self.table, flow.src, flow.dst, flow.protocol, flow.sport, flow.dport)
        if (src is None) != (dst is None):
            pod, other = (src, flow.dst) if src is not None else (dst, flow.src)
            if pod is not None and other in self._nodes_of.get(pod, ()):
                # Traffic between a pod and its own node passes no queue.
                way = Direction.EGRESS if src is not None else Direction.INGRESS
                return verdict._replace(allow=True, reason=Reason.OWN_NODE, direction=way)
        return verdict


class Talk(NamedTuple):
    """What flows that differ by the originator's port alone have in common.

    `source` and `destination` are pods, or addresses of none. `port` is None for protocols without.
    """

    source: str
    destination: str
    protocol: int
    port: int | None
    allow: bool
    reason: Reason
    direction: Direction | None
    policies: tuple[tuple[Direction, Key, int], ...]  # whose rules matched, per end, with the rule's index


@dataclass(slots=True)
class Count:
    """How much of something there was."""

    flows: int = 0
    packets: int = 0
    bytes: int = 0

    def add(self, flow: Conversation, flows: int) -> None:
        """So many flows more, both ways; `flow` has what all of them carried."""
        self.flows += flows
        self.packets += sum(flow.packets) + flow.related
        self.bytes += sum(flow.bytes)


@dataclass(frozen=True, slots=True)
class Summary:
    """What a capture holds, by `policies`.

    `talks` are sorted: denied ones first, then by packets. `outside` are the flows between addresses
    of which neither is a pod's. `by_policy`: what each policy's rules allowed; `denied_by`: what no rule
    of the policies that isolate an end allowed. `services`: flows to the ClusterIP of a Service, which
    is not what policies judge. `began` counts flows that began before the capture.
    """

    talks: list[tuple[Talk, Count]]
    outside: Count
    by_policy: list[tuple[Key, Count]]
    denied_by: list[tuple[tuple[Key, ...], Direction, Count]]
    services: Counter[Key]
    began: Counter[Began]


def summarise(flows: Iterable[tuple[Conversation, int]], policies: Policies) -> Summary:
    """Gather flows, as `Replay.talks` has them, by who talks to whom, and by the policies that decided."""
    talks: defaultdict[Talk, Count] = defaultdict(Count)
    by_policy: defaultdict[Key, Count] = defaultdict(Count)
    denied_by: defaultdict[tuple[tuple[Key, ...], Direction], Count] = defaultdict(Count)
    outside = Count()
    services: Counter[Key] = Counter()
    began: Counter[Began] = Counter()
    for each, number in flows:
        if each.began is not Began.OPENED:
            began[each.began] += number
        verdict = each.verdict
        if verdict.egress.pod is None and verdict.ingress.pod is None:
            outside.add(each, number)
            continue
        matched = _matched(verdict)
        talks[_talk(each, policies.names, matched)].add(each, number)
        for key in {policy for _, policy, _ in matched} if verdict.allow else ():
            by_policy[key].add(each, number)
        if not verdict.allow and verdict.direction is not None:
            end = verdict.egress if verdict.direction is Direction.EGRESS else verdict.ingress
            if end.pod is not None:
                isolating = policies.isolating[verdict.direction].get(end.pod.key, ())
                denied_by[isolating, verdict.direction].add(each, number)
        if each.flow.dst in policies.services and verdict.ingress.pod is None:
            services[policies.services[each.flow.dst]] += number
    return Summary(
        talks=_sorted(talks),
        outside=outside,
        by_policy=sorted(by_policy.items(), key=lambda item: (-item[1].packets, item[0])),
        denied_by=sorted(
            ((isolating, direction, count) for (isolating, direction), count in denied_by.items()),
            key=lambda item: (-item[2].packets, item[:2]),
        ),
        services=services,
        began=began,
    )


def _sorted(talks: Mapping[Talk, Count]) -> list[tuple[Talk, Count]]:
    return sorted(
        talks.items(),
        key=lambda item: (
            item[0].allow,
            -item[1].packets,
            *item[0][:3],
            item[0].port or 0,
            item[0].reason,
            item[0].policies,
        ),
    )


def _matched(verdict: Verdict) -> tuple[tuple[Direction, Key, int], ...]:
    found = []
    for end, direction in ((verdict.egress, Direction.EGRESS), (verdict.ingress, Direction.INGRESS)):
        rule = end.pod.rule(direction, end.rule_id) if end.pod is not None else None
        if rule is not None:
            found.append((direction, rule[0], rule[1].index))
    return tuple(found)


def _name(end: End, address: bytes, names: Mapping[bytes, Key]) -> str:
    key = end.pod.key if end.pod is not None else names.get(address)
    return str(key) if key is not None else format_address(address)


def _talk(
    each: Conversation, names: Mapping[bytes, Key], matched: tuple[tuple[Direction, Key, int], ...]
) -> Talk:
    flow, verdict = each.flow, each.verdict
    return Talk(
        _name(verdict.egress, flow.src, names),
        _name(verdict.ingress, flow.dst, names),
        flow.protocol,
        flow.dport if flow.has_ports else None,
        verdict.allow,
        verdict.reason,
        verdict.direction,
        matched,
    )


def changes(
    flows: Iterable[tuple[Conversation, int]], now: Policies, then: Policies
) -> list[tuple[Talk, Count]]:
    """The flows whose verdict `then` would be another than `now`, as `then` has them; denied ones first."""
    found: defaultdict[Talk, Count] = defaultdict(Count)
    for each, number in flows:
        if each.verdict.reason is Reason.NEIGHBOUR_DISCOVERY:
            continue  # never a matter of policy, and told by more than its addresses
        verdict = then.verdict(each.flow)
        if verdict.allow != each.verdict.allow:
            changed = each._replace(verdict=verdict)
            found[_talk(changed, now.names, _matched(verdict))].add(each, number)
    return _sorted(found)


def read_packets(replay: Replay, capture: Capture, names: Mapping[bytes, Key]) -> Iterator[Record]:
    """The capture's packets as they are judged, as records with the flow log's fields."""
    while (event := replay.next(capture)) is not None:
        yield describe_event(event, names, None) | {"generation": None}  # there is but one table


def read_through(replay: Replay, capture: Capture) -> None:
    """Judge all of the capture."""
    while replay.run(capture):
        pass  # every moment, so that Ctrl-C is heard
