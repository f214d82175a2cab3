"""The least NetworkPolicies that allow the traffic that was seen.

Each workload that was seen gets one policy, which isolates it and allows what its pods were seen to
receive and to send: other workloads by their labels, everybody else by address. A rule has peers that
were seen at the same ports.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from dataplane.addresses import BITS, Prefix, format_address
from dataplane.model import (
    PROTOCOL_NAMES,
    Direction,
    IPBlock,
    Key,
    LabelSelector,
    NetworkPolicy,
    NetworkPolicyPeer,
    NetworkPolicyPort,
    NetworkPolicyRule,
    Pod,
    Snapshot,
)
from dataplane.policy.normalize import NAME_LABEL
from dataplane.policy.workloads import Workloads, unused_name, word_of


class Seen(NamedTuple):
    """Somebody opened flows to somebody: pods where `source_pod` and `destination_pod` name them."""

    source: bytes
    source_pod: Key | None
    destination: bytes
    destination_pod: Key | None
    protocol: int
    port: int  # 0: the protocol has none


@dataclass(frozen=True, slots=True)
class Advised:
    """A policy, and what to know before applying it."""

    policy: NetworkPolicy
    comments: tuple[str, ...]


class Advice(NamedTuple):
    """`policies` by namespace and name. `left_out`: what no NetworkPolicy can allow without allowing more."""

    policies: tuple[Advised, ...]
    left_out: tuple[Seen, ...]


# A workload: its namespace and what selects it there.
_Subject = tuple[str, LabelSelector]
_Ports = frozenset[tuple[int, int]]


def advise(
    known: Snapshot,
    seen: Iterable[Seen],
    *,
    directions: Collection[Direction] = tuple(Direction),
    lengths: Mapping[int, int] | None = None,
) -> Advice:
    """Policies by which `seen` passes, and nothing else from or to the workloads in it.

    `directions`: those to isolate workloads in. `lengths`: by family, the length of the prefixes by which
    addresses outside are allowed; by default each alone.
    """
    workloads = Workloads(known.pods)
    comments: defaultdict[_Subject, list[str]] = defaultdict(list)
    ports: defaultdict[_Subject, dict[Direction, defaultdict[NetworkPolicyPeer, set[tuple[int, int]]]]] = (
        defaultdict(lambda: {direction: defaultdict(set) for direction in Direction})
    )
    left_out: list[Seen] = []
    for each in sorted(set(seen), key=_order):
        ends = (
            (Direction.EGRESS, each.source_pod, each.destination_pod, each.destination),
            (Direction.INGRESS, each.destination_pod, each.source_pod, each.source),
        )
        nameable = each.protocol in PROTOCOL_NAMES
        if not nameable:
            left_out.append(each)
        for direction, own, other, address in ends:
            pod = workloads.live.get(own) if own is not None else None
            if pod is None:
                continue
            told: list[str] = []
            subject = (pod.key.namespace, workloads.selector_of(pod, told))
            if not subject[1].requirements:
                told.append(f"{pod.key} has no labels: this selects every pod of {pod.key.namespace}")
            allowed = ports[subject][direction]  # isolated, whatever of it can be named
            if nameable and direction in directions:
                peer = _peer(workloads, pod.key.namespace, other, address, lengths or {}, told)
                allowed[peer].add((each.protocol, each.port))
            comments[subject] += [text for text in told if text not in comments[subject]]
    taken: set[Key] = set()
    policies = []
    for subject in sorted(ports, key=lambda subject: (subject[0], word_of(subject[1]), subject[1])):
        namespace, selector = subject
        key = unused_name(namespace, f"advised-{word_of(selector) or 'all'}", taken)
        taken.add(key)
        policy = NetworkPolicy(
            key,
            selector,
            frozenset(directions),
            ingress=_rules(ports[subject][Direction.INGRESS]),
            egress=_rules(ports[subject][Direction.EGRESS]),
        )
        policies.append(Advised(policy, tuple(comments[subject])))
    return Advice(tuple(policies), tuple(left_out))


def _order(each: Seen) -> tuple[str, str, int, int]:
    return (
        str(each.source_pod or format_address(each.source)),
        str(each.destination_pod or format_address(each.destination)),
        each.protocol,
        each.port,
    )


def _peer(
    workloads: Workloads,
    namespace: str,
    other: Key | None,
    address: bytes,
    lengths: Mapping[int, int],
    comments: list[str],
) -> NetworkPolicyPeer:
    pod: Pod | None = workloads.live.get(other) if other is not None else None
    if pod is not None and pod.labels:
        selector = workloads.selector_of(pod, comments)
        there = pod.key.namespace
        spaces = None if there == namespace else LabelSelector.of({NAME_LABEL: there})
        return NetworkPolicyPeer(selector, spaces)
    bits = BITS[len(address)]
    if pod is not None:
        comments.append(f"{pod.key} has no labels: a rule can only name its address, which may change")
        return NetworkPolicyPeer(ip_block=IPBlock(Prefix(address, bits)))
    length = min(lengths.get(4 if bits == 32 else 6, bits), bits)
    network = int.from_bytes(address) >> (bits - length) << (bits - length)
    return NetworkPolicyPeer(ip_block=IPBlock(Prefix(network.to_bytes(len(address)), length)))


def _rules(
    allowed: Mapping[NetworkPolicyPeer, set[tuple[int, int]]],
) -> tuple[NetworkPolicyRule, ...]:
    """One rule for all peers that were seen at the same ports; rules by ports, then peers as they came."""
    by_ports: defaultdict[_Ports, list[NetworkPolicyPeer]] = defaultdict(list)
    for peer, ports in allowed.items():
        by_ports[frozenset(ports)].append(peer)
    return tuple(
        NetworkPolicyRule(tuple(peers), tuple(_ranges(ports)))
        for ports, peers in sorted(by_ports.items(), key=lambda item: sorted(item[0]))
    )


def _ranges(ports: _Ports) -> Iterable[NetworkPolicyPort]:
    """Ports as ranges, where they follow upon each other."""
    first: tuple[int, int] | None = None
    last = (0, 0)
    for protocol, number in [*sorted(ports), (0, 0)]:
        if first is not None and (protocol, number) != (last[0], last[1] + 1):
            yield NetworkPolicyPort(first[0], first[1], last[1] if last[1] > first[1] else None)
            first = None
        if first is None:
            first = (protocol, number)
        last = (protocol, number)
