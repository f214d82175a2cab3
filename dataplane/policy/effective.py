"""Effective rules: from PolicyEndpoint objects to what each pod may receive and send.

Slices of one policy are joined by (`policyRef`, port group) first, because a slice may hold pods
without rules or rules without pods; then the policies that select a pod are united. Nothing here
looks at history: equal snapshots give equal results, and `Effective` remembers the last one only to
look at what changed since.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import NamedTuple
from weakref import WeakKeyDictionary, ref

from dataplane.model import Direction, Key, Pod, PolicyEndpoint, Rule, Snapshot
from dataplane.policy.audit import AuditModes
from dataplane.policy.changes import differences
from dataplane.policy.subjects import Group, Subjects, group_of

_SAMPLE = 8

# (policy, rule), the rule numbered on over all slices of its group.
Pairs = tuple[tuple[Key, Rule], ...]


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class DirectionRules:
    """All that one direction of an isolated pod allows: (policy, rule) sorted by policy and index.

    Equal content compares and hashes equal. Within one result of `effective_rules`, and from one result
    of `Effective.update` to the next, equal content is the same object, so whatever is derived from it
    (a compiled table) can be shared by identity.
    """

    rules: tuple[tuple[Key, Rule], ...]
    _hash: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # A few tell the rules of different policies apart, and hashing 100,000 takes 100 ms.
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
    every address has gone to a newer pod: the pod's isolation stands all the same. `object` is its Pod
    object, where one is known. `audit`: the directions in which all policies that isolate it are in audit,
    so that what no rule allows is let through. `ingress_policies`, `egress_policies`: which isolate it.
    """

    pod: Key
    addresses: tuple[bytes, ...]
    ingress: DirectionRules | None
    egress: DirectionRules | None
    object: Pod | None = field(default=None, repr=False)
    audit: frozenset[Direction] = frozenset()
    ingress_policies: tuple[Key, ...] = field(default=(), repr=False)
    egress_policies: tuple[Key, ...] = field(default=(), repr=False)

    @property
    def isolated(self) -> bool:
        """Whether a policy isolates it in at least one direction."""
        return self.ingress is not None or self.egress is not None


def effective_rules(snapshot: Snapshot, node_ips: frozenset[bytes] | None) -> dict[Key, PodRules]:
    """Every known pod that runs on the node with `node_ips`: selected by a policy, or a live Pod object.

    `node_ips` are packed addresses; None means every node. The result is sorted by pod. hostNetwork
    pods are left out: their addresses are the node's.
    """
    return Effective(node_ips).update(snapshot)


def isolating_policies(snapshot: Snapshot) -> dict[Direction, dict[Key, tuple[Key, ...]]]:
    """The policies that isolate each pod of any node, per direction, sorted by name.

    A pod that no policy isolates in a direction is not in that direction's result.
    """
    isolates: defaultdict[Group, set[Direction]] = defaultdict(set)
    for slice_ in snapshot.policy_endpoints:
        isolates[group_of(slice_)] |= slice_.isolates
    same: dict[tuple[Key, ...], tuple[Key, ...]] = {}
    found: dict[Direction, dict[Key, tuple[Key, ...]]] = {direction: {} for direction in Direction}
    subjects = Subjects(None)
    for pod in sorted(subjects.update(((), snapshot.policy_endpoints), ((), snapshot.pods))):
        subject = subjects.find(pod)
        groups = subject.groups if subject is not None else ()
        for direction, by_pod in found.items():
            policies = tuple(sorted({group[0] for group in groups if direction in isolates[group]}))
            if policies:
                by_pod[pod] = same.setdefault(policies, policies)
    return found


def changed_pods(old: Mapping[Key, PodRules], new: Mapping[Key, PodRules]) -> set[Key]:
    """The pods that came, went, or have other addresses or rules in `new` than in `old`."""
    # From one update to the next what stayed is the same object: seldom is anything compared in full.
    changed = {
        key
        for key, pod in new.items()
        if (was := old.get(key)) is not pod and (was is None or _judged_by(was) != _judged_by(pod))
    }
    return changed | (old.keys() - new.keys())


def _judged_by(pod: PodRules) -> tuple[object, ...]:
    """All that verdicts depend on; a Pod object may change in labels that none does."""
    return pod.addresses, pod.ingress, pod.egress, pod.audit


class Effective:
    """The effective rules of one snapshot after another; an update costs what changed.

    What is equal in two results is the same object in both.
    """

    def __init__(self, node_ips: frozenset[bytes] | None) -> None:
        self.node_ips = node_ips
        self._snapshot = Snapshot()
        self._subjects = Subjects(node_ips)
        self._slices: dict[Group, tuple[PolicyEndpoint, ...]] = {}
        self._parts: Counter[Key] = Counter()  # of how many groups each policy is
        self._groups: dict[Key, frozenset[Group]] = {}  # that select each pod of this node
        self._selected: defaultdict[Group, set[Key]] = defaultdict(set)  # the same the other way round
        self._joined: dict[Group, _Joined] = {}  # of groups that select a pod of this node
        self._audit = AuditModes()
        self._interned: WeakKeyDictionary[DirectionRules, ref[DirectionRules]] = WeakKeyDictionary()
        self._pods: dict[Key, PodRules] = {}

    @property
    def policies(self) -> int:
        """How many policies there are, on whatever node their pods run."""
        return len(self._parts)

    def update(self, snapshot: Snapshot) -> dict[Key, PodRules]:
        """What `effective_rules` says of `snapshot`: the very result of the last time if nothing changed."""
        slices = differences(self._snapshot.policy_endpoints, snapshot.policy_endpoints)
        pods = differences(self._snapshot.pods, snapshot.pods)
        was, self._audit = self._audit, self._audit.of(self._snapshot, snapshot)
        self._snapshot = snapshot
        changed = self._subjects.update(slices, pods)
        if self._audit is not was:
            for group, selected in self._selected.items():
                if was.covers(group[0]) != self._audit.covers(group[0]):
                    changed |= selected
        for group in self._take_slices(*slices):
            changed |= self._selected.get(group, set())
        united: dict[tuple[frozenset[Group], Direction], _United] = {}
        news: dict[Key, PodRules | None] = {}
        for key in changed:
            pod = self._pod(key, united)
            if pod != self._pods.get(key):
                news[key] = pod
        if news:
            self._pods = _amended(self._pods, news)
        return self._pods

    def _take_slices(self, gone: Iterable[PolicyEndpoint], come: Iterable[PolicyEndpoint]) -> set[Group]:
        """The groups whose slices changed."""
        changed: set[Group] = set()
        for slice_ in gone:
            group = group_of(slice_)
            changed.add(group)
            self._slices[group] = tuple([each for each in self._slices[group] if each is not slice_])
        for slice_ in come:
            group = group_of(slice_)
            changed.add(group)
            if group not in self._slices:
                self._parts[group[0]] += 1
            self._slices[group] = (*self._slices.get(group, ()), slice_)
        for group in changed:
            if not self._slices[group]:
                del self._slices[group]
                self._parts[group[0]] -= 1
                if not self._parts[group[0]]:
                    del self._parts[group[0]]
        return changed

    def _pod(self, key: Key, united: dict[tuple[frozenset[Group], Direction], _United]) -> PodRules | None:
        """What holds for one pod now; None when it is not of this node. `united`: what this update made."""
        subject = self._subjects.find(key)
        self._select(key, subject.groups if subject is not None else frozenset())
        if subject is None:
            return None
        for direction in Direction:
            # Most pods of a node are selected by the same few policies: each set is united once.
            if (subject.groups, direction) not in united:
                united[subject.groups, direction] = self._unite(subject.groups, direction)
        sides = {direction: united[subject.groups, direction] for direction in Direction}
        return PodRules(
            key,
            subject.addresses,
            sides[Direction.INGRESS].rules,
            sides[Direction.EGRESS].rules,
            subject.object,
            frozenset([direction for direction, side in sides.items() if side.audit]),
            sides[Direction.INGRESS].policies,
            sides[Direction.EGRESS].policies,
        )

    def _select(self, key: Key, groups: frozenset[Group]) -> None:
        before = self._groups.pop(key, frozenset())
        if groups:
            self._groups[key] = groups
        for group in groups - before:
            self._selected[group].add(key)
        for group in before - groups:
            selected = self._selected[group]
            selected.remove(key)
            if not selected:
                del self._selected[group]
                self._joined.pop(group, None)

    def _unite(self, groups: frozenset[Group], direction: Direction) -> _United:
        # Rules for a direction that their own policy does not isolate mean nothing (policyTypes of a
        # NetworkPolicy): they must not open what another policy closes.
        isolating = [group for group in groups if direction in self._join(group).isolates]
        if not isolating:
            return _United(None, audit=False, policies=())
        isolating.sort(key=lambda group: (group[0], group[1] or ""))
        policies = tuple(dict.fromkeys([group[0] for group in isolating]))
        audit = all(map(self._audit.covers, policies))
        rules = DirectionRules(
            tuple(chain.from_iterable(self._join(group).rules[direction] for group in isolating))
        )
        known = self._interned.get(rules)
        same = known() if known is not None else None
        if same is None:
            self._interned[rules] = ref(rules)
            same = rules
        return _United(same, audit, policies)

    def _join(self, group: Group) -> _Joined:
        joined, slices = self._joined.get(group), self._slices[group]
        if joined is None or joined.slices is not slices:
            joined = self._joined[group] = _Joined(slices, joined)
        return joined


class _United(NamedTuple):
    """All policies of one pod in one direction."""

    rules: DirectionRules | None
    audit: bool  # all that isolate are in audit
    policies: tuple[Key, ...]  # that isolate


class _Joined:
    """All slices of one group together: what they isolate, and their rules, numbered on.

    `earlier`: the same group before it changed.
    """

    def __init__(self, slices: tuple[PolicyEndpoint, ...], earlier: _Joined | None) -> None:
        self.slices = slices
        self.isolates = frozenset().union(*(slice_.isolates for slice_ in slices))
        self.rules: dict[Direction, Pairs] = {}
        # By the slice's identity (`slices` keeps it alive) and the number at which its rules begin.
        self._pieces: dict[tuple[Direction, int, int], Pairs] = {}
        known = earlier._pieces if earlier is not None else {}
        ordered = sorted(slices, key=lambda slice_: slice_.key)
        for direction in Direction:
            pieces: list[Pairs] = []
            first = 0
            for slice_ in ordered:
                rules = slice_.ingress if direction is Direction.INGRESS else slice_.egress
                if rules:
                    place = (direction, id(slice_), first)
                    piece = self._pieces[place] = known.get(place) or _number(slice_.policy, rules, first)
                    pieces.append(piece)
                    first += rules[-1].index + 1
            self.rules[direction] = tuple(chain.from_iterable(pieces))


def _number(policy: Key, rules: Iterable[Rule], first: int) -> Pairs:
    """A slice's rules carry their place in the slice; here it becomes their place in the group."""
    return tuple([(policy, replace(rule, index=first + rule.index) if first else rule) for rule in rules])


def _amended(pods: dict[Key, PodRules], news: Mapping[Key, PodRules | None]) -> dict[Key, PodRules]:
    """`pods` with `news` (None: gone), sorted."""
    amended = {**pods, **{key: pod for key, pod in news.items() if pod is not None}}
    for key, pod in news.items():
        if pod is None:
            del amended[key]
    if amended.keys() == pods.keys():
        return amended
    return {key: amended[key] for key in sorted(amended)}
