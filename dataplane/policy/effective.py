"""Effective rules: from PolicyEndpoint objects to what each pod may receive and send.

Slices of one policy are joined by (`policyRef`, port group) first, because a slice may hold pods
without rules or rules without pods; then the policies that select a pod are united. Nothing here
looks at history: equal snapshots give equal results.

Where Pod objects are known they are the truth about a pod's addresses and node; a PolicyEndpoint
only says which policies select it. A PolicyEndpoint may lag behind: it can still name a pod that is
gone, with an address that another pod has by now.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from dataplane.model import Direction, Key, Pod, PolicyEndpoint, Rule, Snapshot

# A policy, or the part of it that holds for one group of pods (see PolicyEndpoint.port_group).
Group = tuple[Key, str | None]

_NEVER = float("-inf")
_SAMPLE = 64


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class DirectionRules:
    """All that one direction of an isolated pod allows: (policy, rule) sorted by policy and index.

    Equal content compares and hashes equal. Within one result of `effective_rules` equal content is
    the same object, so whatever is derived from it (a compiled table) can be shared by identity.
    """

    rules: tuple[tuple[Key, Rule], ...]
    _hash: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # A sample tells rule sets apart well enough, and hashing 100,000 rules takes 100 ms.
        step = max(1, len(self.rules) // _SAMPLE)
        object.__setattr__(self, "_hash", hash((len(self.rules), self.rules[::step])))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, DirectionRules):
            return NotImplemented
        return self._hash == other._hash and self.rules == other.rules


@dataclass(frozen=True, slots=True)
class PodRules:
    """What policies make of one pod. None: not isolated in that direction, everything may pass.

    `addresses` are packed and sorted, IPv4 first. It is empty when nothing usable is known, or when
    every address has gone to a newer pod: the pod's isolation stands all the same.
    """

    pod: Key
    addresses: tuple[bytes, ...]
    ingress: DirectionRules | None
    egress: DirectionRules | None

    @property
    def isolated(self) -> bool:
        """Whether a policy isolates it in at least one direction."""
        return self.ingress is not None or self.egress is not None


def effective_rules(snapshot: Snapshot, node_ips: frozenset[bytes] | None) -> dict[Key, PodRules]:
    """Every known pod that runs on the node with `node_ips`: selected by a policy, or a live Pod object.

    `node_ips` are packed addresses; None means every node. The result is sorted by pod. hostNetwork
    pods are left out: their addresses are the node's.
    """
    selected = _selected(snapshot, node_ips)
    pods = selected.keys() | _live(snapshot, node_ips)
    addresses = _addresses(snapshot, pods, node_ips)
    joined = _join(snapshot, frozenset(group for groups in selected.values() for group in groups))
    shared: dict[DirectionRules, DirectionRules] = {}
    united: dict[tuple[frozenset[Group], Direction], DirectionRules | None] = {}

    def unite(groups: frozenset[Group], direction: Direction) -> DirectionRules | None:
        # Most pods of a node are selected by the same few policies: each set is united once.
        if (groups, direction) not in united:
            rules = _unite(groups, direction, joined)
            united[groups, direction] = None if rules is None else shared.setdefault(rules, rules)
        return united[groups, direction]

    def rules_of(pod: Key) -> PodRules:
        groups = frozenset(selected.get(pod, ()))
        return PodRules(
            pod, addresses[pod], unite(groups, Direction.INGRESS), unite(groups, Direction.EGRESS)
        )

    return {pod: rules_of(pod) for pod in sorted(pods)}


def isolating_policies(snapshot: Snapshot) -> dict[Direction, dict[Key, tuple[Key, ...]]]:
    """The policies that isolate each pod of any node, per direction, sorted by name.

    A pod that no policy isolates in a direction is not in that direction's result.
    """
    isolates: defaultdict[Group, set[Direction]] = defaultdict(set)
    for slice_ in snapshot.policy_endpoints:
        isolates[slice_.policy, slice_.port_group] |= slice_.isolates
    same: dict[tuple[Key, ...], tuple[Key, ...]] = {}
    found: dict[Direction, dict[Key, tuple[Key, ...]]] = {direction: {} for direction in Direction}
    for pod, groups in _selected(snapshot, None).items():
        for direction, by_pod in found.items():
            policies = tuple(
                sorted({policy for policy, part in groups if direction in isolates[policy, part]})
            )
            if policies:
                by_pod[pod] = same.setdefault(policies, policies)
    return found


def changed_pods(old: Mapping[Key, PodRules], new: Mapping[Key, PodRules]) -> set[Key]:
    """The pods that came, went, or have other addresses or rules in `new` than in `old`."""
    return {pod for pod in old.keys() | new.keys() if old.get(pod) != new.get(pod)}


def _selected(snapshot: Snapshot, node_ips: frozenset[bytes] | None) -> dict[Key, set[Group]]:
    """Which policies select each pod of this node."""
    objects = {pod.key: pod for pod in snapshot.pods}
    selected: defaultdict[Key, set[Group]] = defaultdict(set)
    for slice_ in snapshot.policy_endpoints:
        group = (slice_.policy, slice_.port_group)
        for pod, pod_ip, host_ip in slice_.endpoints:
            known = objects.get(pod)
            if known is not None and (known.finished or known.host_network):
                continue
            if _of_host(pod_ip, host_ip, node_ips):
                continue
            if node_ips is None or _is_local(known, host_ip, node_ips):
                selected[pod].add(group)
    return selected


def _live(snapshot: Snapshot, node_ips: frozenset[bytes] | None) -> set[Key]:
    """The pods of this node that their Pod objects make known."""
    return {
        pod.key
        for pod in snapshot.pods
        if not pod.finished
        and not pod.host_network
        and (node_ips is None or not node_ips.isdisjoint(pod.host_ips))
    }


def _is_local(known: Pod | None, host_ip: bytes, node_ips: frozenset[bytes]) -> bool:
    if known is not None and known.host_ips:
        return not node_ips.isdisjoint(known.host_ips)
    # An unreadable hostIP must not take the pod out of isolation on the node where it runs; on the
    # other nodes no interface of that pod will be found.
    return not host_ip or host_ip in node_ips


def _of_host(pod_ip: bytes, host_ip: bytes, node_ips: frozenset[bytes] | None) -> bool:
    """Whether the pod shares its node's address (hostNetwork): never a policy subject."""
    if not pod_ip:
        return False
    # The node's second family shows in `node_ips` only: hostIP has one address.
    return pod_ip == host_ip or (node_ips is not None and pod_ip in node_ips)


def _addresses(
    snapshot: Snapshot, pods: set[Key], node_ips: frozenset[bytes] | None
) -> dict[Key, tuple[bytes, ...]]:
    """The addresses that each of `pods` really has: an address belongs to the newest live claimant.

    A live Pod object beats what a PolicyEndpoint says. Among Pod objects the newest counts, among
    PolicyEndpoints the one whose change began last; ties fall to the greater name, so that the
    result depends on content only.
    """
    objects = {pod.key: pod for pod in snapshot.pods}
    claims: defaultdict[Key, set[bytes]] = defaultdict(set)
    ranks: dict[bytes, tuple[bool, float, str, Key]] = {}

    def claim(address: bytes, rank: tuple[bool, float, str, Key]) -> None:
        claims[rank[3]].add(address)
        if address not in ranks or ranks[address] < rank:
            ranks[address] = rank

    for pod in snapshot.pods:
        if not pod.finished and not pod.host_network:
            since = _NEVER if pod.created_at is None else pod.created_at
            for address in pod.ips:
                claim(address, (True, since, pod.uid, pod.key))
    for slice_ in snapshot.policy_endpoints:
        since = _NEVER if slice_.changed_at is None else slice_.changed_at
        for key, pod_ip, host_ip in slice_.endpoints:
            known = objects.get(key)
            if known is not None and (known.finished or known.host_network or known.ips):
                continue
            if pod_ip and not _of_host(pod_ip, host_ip, node_ips):
                claim(pod_ip, (False, since, "", key))
    return {
        pod: tuple(
            sorted(
                (address for address in claims.get(pod, ()) if ranks[address][3] == pod),
                key=lambda address: (len(address), address),
            )
        )
        for pod in pods
    }


@dataclass(slots=True)
class _Joined:
    """All slices of one group together."""

    isolates: set[Direction] = field(default_factory=set)
    rules: dict[Direction, list[Rule]] = field(default_factory=lambda: {d: [] for d in Direction})


def _join(snapshot: Snapshot, groups: frozenset[Group]) -> dict[Group, _Joined]:
    slices: defaultdict[Group, list[PolicyEndpoint]] = defaultdict(list)
    for slice_ in snapshot.policy_endpoints:
        if (group := (slice_.policy, slice_.port_group)) in groups:
            slices[group].append(slice_)
    joined: dict[Group, _Joined] = {}
    for group, members in slices.items():
        whole = joined[group] = _Joined()
        for slice_ in sorted(members, key=lambda member: member.key):
            whole.isolates |= slice_.isolates
            _append(whole.rules[Direction.INGRESS], slice_.ingress)
            _append(whole.rules[Direction.EGRESS], slice_.egress)
    return joined


def _append(rules: list[Rule], more: Iterable[Rule]) -> None:
    """Number on: a slice's rules carry their place in the slice."""
    offset = rules[-1].index + 1 if rules else 0
    rules += (replace(rule, index=offset + rule.index) for rule in more) if offset else more


def _unite(
    groups: frozenset[Group], direction: Direction, joined: Mapping[Group, _Joined]
) -> DirectionRules | None:
    isolating = [group for group in groups if direction in joined[group].isolates]
    if not isolating:
        return None
    # Rules for a direction that their own policy does not isolate mean nothing (policyTypes of a
    # NetworkPolicy): they must not open what another policy closes.
    isolating.sort(key=lambda group: (group[0], group[1] or ""))
    pairs = [(policy, rule) for policy, part in isolating for rule in joined[policy, part].rules[direction]]
    pairs.sort(key=lambda pair: (pair[0], pair[1].index))
    return DirectionRules(tuple(pairs))
