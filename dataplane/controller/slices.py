"""What to write so that one policy's PolicyEndpoints hold what they should: found and desired → writes.

Pure, and without a memory: everything is told by the objects that are there, so a controller that starts
again goes on where the last one stopped.

An entry stays in the object (the slice) that it is in. A new one takes the place of what it replaces (a
pod's other address, the same block with other ports), else a place in a slice that is written anyway,
else the roomiest one. So a small change touches few objects, and those that it touches are written once.

Agents see the writes of one policy one after another, and may enforce each state in between. The order
of writes is such that no state allows what neither the old nor the new policy allows, and that no pod
which both isolate is without isolation:

1. pods that the policy no longer selects go, and directions that it no longer isolates: rules that come
   must not reach them;
2. rules come. In the same write as rules that go from that slice: either is the old or the new policy's;
3. rules go from the other slices: a flow that both an old and a new rule allow is not cut;
4. pods and directions of isolation come: never with rules of before, nor before all rules are there;
5. what stands elsewhere by now goes: a pod is named somewhere at every moment.

A pod that changes its port group is added to the new one before it leaves the old one, and the new one
is complete by then. Where groups exchange pods, no order would do: the pods stand in a slice of their own
meanwhile, isolated and without rules.
"""

from __future__ import annotations

import enum
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from graphlib import CycleError, TopologicalSorter
from typing import NamedTuple, TypeVar, cast

from dataplane.model import Direction, Key, PodEndpoint
from dataplane.policy.resolve import MAX_ENTRIES, Entry

# A rule with hundreds of ports is as large as hundreds of rules; etcd takes 1.5 MB per object.
MAX_WEIGHT = 6000
HELD = "held"  # port group of pods between two others; the resolver's begin with g-

_T = TypeVar("_T", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Contents:
    """The three lists of a slice, or of a whole group."""

    endpoints: tuple[PodEndpoint, ...] = ()
    ingress: tuple[Entry, ...] = ()
    egress: tuple[Entry, ...] = ()

    def __len__(self) -> int:
        return len(self.endpoints) + len(self.ingress) + len(self.egress)


class Head(NamedTuple):
    """What all slices of a policy say alike. `selector` is `podSelector` as canonical JSON."""

    policy: Key
    uid: str
    selector: str
    isolates: frozenset[Direction]


@dataclass(frozen=True, slots=True)
class Slice:
    """What one PolicyEndpoint says."""

    head: Head
    group: str | None
    contents: Contents


@dataclass(frozen=True, slots=True)
class Found:
    """A PolicyEndpoint of ours as the API server has it.

    `clean`: it says just what `slice` does, in the form in which we write it.
    """

    name: str
    uid: str
    version: str
    slice: Slice
    clean: bool = True


@dataclass(frozen=True, slots=True)
class Desired:
    """What the slices of one policy are to say together, by port group; at least one group."""

    head: Head
    groups: Mapping[str | None, Contents]


class Action(enum.StrEnum):
    CREATE = "create"
    UPDATE = "update"
    DELETE = "delete"


class Write(NamedTuple):
    """One request. `place` tells objects of a plan apart: one that it creates may be updated later.

    `found` is the object as it was before the plan, None for one that the plan creates; `slice` is what
    it is to say, None when it is to go.
    """

    place: int
    found: Found | None
    action: Action
    slice: Slice | None


def plan(found: Iterable[Found], desired: Desired | None) -> list[Write]:
    """The writes, in order, that make the objects of one policy say what is desired; None: nothing.

    Nothing to do gives no writes. After all writes, another plan is empty.
    """
    slots = [_Slot(place, each) for place, each in enumerate(sorted(found, key=lambda each: each.name))]
    writes = _Writes()
    if desired is None:
        for slot in _pods_first(slots):
            writes.delete(slot)
        return writes.made
    by_group: defaultdict[str | None, list[_Slot]] = defaultdict(list)
    for slot in slots:
        by_group[slot.group].append(slot)
    places = len(slots)
    order, exchanged = _order(by_group, desired)
    # A group of its own, whatever a controller that crashed has left there.
    hold = next(name for name in (f"{HELD}-{n}" for n in itertools.count(1)) if name not in by_group)
    held = [_Slot(places + number, None, hold) for number in range(-(-len(exchanged) // MAX_ENTRIES))]
    places += len(held)
    for number, slot in enumerate(held):
        endpoints = exchanged[number * MAX_ENTRIES : (number + 1) * MAX_ENTRIES]
        writes.put(slot, Slice(desired.head, hold, Contents(tuple(endpoints))))
    for group in order:
        members = by_group[group]
        wanted = desired.groups.get(group)
        if wanted is None:
            for slot in _pods_first(members):
                writes.delete(slot)
            continue
        places = _assign(members, group, wanted, desired.head, places)
        _write_group(members, wanted, desired.head, writes)
    for slot in held:
        writes.delete(slot)
    return writes.made


# --- slots: where entries are and where they go --------------------------------------------------------


@dataclass(eq=False, slots=True)
class _List:
    """One list of one slice: what it holds, what of that stays, and what comes."""

    before: tuple[Hashable, ...] = ()
    kept: dict[Hashable, None] = field(default_factory=dict)
    come: dict[Hashable, None] = field(default_factory=dict)
    blocked: int = 0  # entries that go, but not before those that come are written
    weight: int = 0

    @property
    def final(self) -> tuple[Hashable, ...]:
        return (*self.kept, *self.come)

    def has_room(self, weight: int) -> bool:
        length = len(self.kept) + len(self.come)
        return length + self.blocked < MAX_ENTRIES and (length == 0 or self.weight + weight <= MAX_WEIGHT)

    @property
    def room(self) -> int:
        return MAX_ENTRIES - len(self.kept) - len(self.come) - self.blocked

    def add(self, entry: Hashable, weight: int) -> None:
        self.come[entry] = None
        self.weight += weight


class _Slot:
    """One object, and what becomes of it."""

    def __init__(self, place: int, found: Found | None, group: str | None = None) -> None:
        self.place = place
        self.found = found
        self.group = group if found is None else found.slice.group
        contents = Contents() if found is None else found.slice.contents
        self.endpoints = _List(contents.endpoints)
        self.ingress = _List(contents.ingress)
        self.egress = _List(contents.egress)

    @property
    def lists(self) -> tuple[_List, _List, _List]:
        return self.endpoints, self.ingress, self.egress

    @property
    def kept(self) -> int:
        return sum(len(each.kept) for each in self.lists)

    @property
    def touched(self) -> bool:
        """Whether it is written anyway."""
        return self.found is None or any(
            each.come or len(each.kept) < len(each.before) for each in self.lists
        )


def _assign(slots: list[_Slot], group: str | None, wanted: Contents, head: Head, places: int) -> int:
    """Give every wanted entry its slot, appending new slots as needed; the next free place number."""
    kinds: tuple[_Kind, ...] = (
        _Kind(0, wanted.endpoints, lambda entry: cast("PodEndpoint", entry).pod, lambda _entry: 1),
        _Kind(1, wanted.ingress, lambda entry: cast("Entry", entry)[0], _weight),
        _Kind(2, wanted.egress, lambda entry: cast("Entry", entry)[0], _weight),
    )
    missing = [_keep(slots, kind) for kind in kinds]
    if any(missing) or any(slot.touched or not _same_head(slot, head) for slot in slots):
        _dissolve(slots, kinds, missing)
    staying = {endpoint.pod for endpoint in wanted.endpoints}
    for kind, entries in zip(kinds, missing, strict=True):
        rest = _replace(slots, kind, entries)
        if kind.number == 0:
            _block(slots, staying)
        places = _fill(slots, group, kind, rest, places)
    if not slots:
        slots.append(_Slot(places, None, group))
        places += 1
    return places


class _Kind(NamedTuple):
    """One of the three lists. An entry takes the place of one with the same `key`."""

    number: int
    wanted: Sequence[Hashable]
    key: Callable[[Hashable], Hashable]
    weight: Callable[[Hashable], int]


def _weight(entry: Hashable) -> int:
    _, excepts, ports = cast("Entry", entry)
    return 1 + len(excepts) + len(ports)


def _keep(slots: Iterable[_Slot], kind: _Kind) -> list[Hashable]:
    """Wanted entries stay where they are, once each; those that are nowhere."""
    missing = dict.fromkeys(kind.wanted)
    for slot in slots:
        each = slot.lists[kind.number]
        for entry in each.before:
            if entry in missing and len(each.kept) < MAX_ENTRIES:
                del missing[entry]
                each.kept[entry] = None
                each.weight += kind.weight(entry)
    return list(missing)


def _dissolve(slots: list[_Slot], kinds: Sequence[_Kind], missing: list[list[Hashable]]) -> None:
    """Where slices have become many and sparse, spread the emptiest over the others.

    One at a time, along with another change: this must not be what makes a small change large.
    """
    needed = max(
        1,
        *(-(-len(kind.wanted) // MAX_ENTRIES) for kind in kinds),
        *(-(-sum(map(kind.weight, kind.wanted)) // MAX_WEIGHT) for kind in kinds),
    )
    living = [slot for slot in slots if slot.kept]
    if len(living) <= 2 * needed + 1:
        return
    emptiest = min(living, key=lambda slot: slot.kept)
    slots.remove(emptiest)
    slots.append(emptiest)  # last: the others are looked at first, and have room
    for kind, homeless in zip(kinds, missing, strict=True):
        each = emptiest.lists[kind.number]
        homeless.extend(each.kept)
        each.kept.clear()
        each.weight = 0
        each.blocked = MAX_ENTRIES  # nothing comes here


def _replace(slots: Iterable[_Slot], kind: _Kind, entries: Sequence[Hashable]) -> list[Hashable]:
    """Put entries in the place of those with the same key that go; the entries for which there is none."""
    free: defaultdict[Hashable, list[_List]] = defaultdict(list)
    for slot in slots:
        each = slot.lists[kind.number]
        if each.blocked:
            continue
        for entry in each.before:
            if entry not in each.kept:
                free[kind.key(entry)].append(each)
    rest = []
    for entry in entries:
        places, weight = free.get(kind.key(entry)), kind.weight(entry)
        if places and places[0].has_room(weight):
            places.pop(0).add(entry, weight)
        else:
            rest.append(entry)
    return rest


def _block(slots: Iterable[_Slot], staying: Collection[Key]) -> None:
    """Entries of pods that stay selected keep their places until the pods' new entries are written."""
    for slot in slots:
        each = slot.endpoints
        came = Counter(cast("PodEndpoint", entry).pod for entry in each.come)
        for entry in each.before:
            pod = cast("PodEndpoint", entry).pod
            if entry in each.kept or pod not in staying:
                continue
            if came[pod] > 0:
                came[pod] -= 1
            else:
                each.blocked += 1


def _fill(
    slots: list[_Slot], group: str | None, kind: _Kind, entries: Sequence[Hashable], places: int
) -> int:
    """Put entries where there is room, in as few slots as possible; the next free place number."""
    order = iter(
        sorted(slots, key=lambda slot: (not slot.touched, -slot.lists[kind.number].room, slot.place))
    )
    slot = next(order, None)
    for entry in entries:
        weight = kind.weight(entry)
        while slot is not None and not slot.lists[kind.number].has_room(weight):
            slot = next(order, None)
        if slot is None:
            slot, order = _Slot(places, None, group), iter(())
            places += 1
            slots.append(slot)
        slot.lists[kind.number].add(entry, weight)
    return places


# --- the order of writes ------------------------------------------------------------------------------


def _order(
    by_group: Mapping[str | None, Sequence[_Slot]], desired: Desired
) -> tuple[list[str | None], list[PodEndpoint]]:
    """Groups in the order in which to write them, and pods that must be held meanwhile.

    A group that pods go to comes before the group they leave.
    """
    groups = sorted(
        by_group.keys() | desired.groups.keys(), key=lambda group: (group is not None, group or "")
    )
    was: defaultdict[Key, set[str | None]] = defaultdict(set)
    for group, slots in by_group.items():
        for slot in slots:
            for entry in slot.endpoints.before:
                was[cast("PodEndpoint", entry).pod].add(group)
    before: dict[str | None, set[str | None]] = {group: set() for group in groups}
    moving: set[PodEndpoint] = set()
    for group, wanted in desired.groups.items():
        for endpoint in wanted.endpoints:
            for left in was[endpoint.pod] - {group}:
                moving.add(endpoint)
                before[left].add(group)
    try:
        return list(TopologicalSorter(before).static_order()), []
    except CycleError:
        return groups, sorted(moving)


def _write_group(slots: Sequence[_Slot], wanted: Contents, head: Head, writes: _Writes) -> None:
    """Bring the slots of one group to what they are to say, step by step."""
    staying = {endpoint.pod for endpoint in wanted.endpoints}
    early = _isolated_before_pods_come(slots, head)
    used = [slot for slot in slots if any(each.final for each in slot.lists)] or list(slots[:1])
    stages: list[dict[_Slot, Slice | None]] = [{} for _ in range(5)]
    for slot in slots:
        steps = _steps(slot, staying, head, early)
        if slot not in used:
            last = max((number for number, step in enumerate(steps) if step is not None), default=4)
            stages[last][slot] = None
            steps = steps[:last]
        for number, step in enumerate(steps):
            if step is not None:
                stages[number][slot] = step
    for number, stage in enumerate(stages):
        following: Mapping[_Slot, object] = next((later for later in stages[number + 1 :] if later), {})
        for slot in _in_turn(stage, writes.last, following):
            step = stage[slot]
            if step is None:
                writes.delete(slot)
            else:
                writes.put(slot, step)


def _in_turn(
    stage: Mapping[_Slot, Slice | None], last: _Slot | None, following: Mapping[_Slot, object]
) -> list[_Slot]:
    """The slots of a stage: what was written last comes first, and what the next stage writes comes last.

    Two writes of one slot that follow each other are one. But before a slice is deleted, which may be
    the only one that says how pods of others are isolated, those others say it.
    """
    return sorted(
        stage, key=lambda slot: (slot is not last, stage[slot] is None, slot in following, slot.place)
    )


def _isolated_before_pods_come(slots: Iterable[_Slot], head: Head) -> frozenset[Direction]:
    """The directions of isolation that can be written at once: those that are in force, and all of them
    while the group has no pods."""
    found = [slot.found.slice for slot in slots if slot.found is not None]
    if not any(each.contents.endpoints for each in found):
        return head.isolates
    in_force: set[Direction] = set().union(*(each.head.isolates for each in found))
    return head.isolates & in_force


_Rules = tuple[tuple[Hashable, ...], tuple[Hashable, ...]]
_State = tuple[tuple[Hashable, ...], _Rules, frozenset[Direction]]


def _steps(
    slot: _Slot, staying: Collection[Key], head: Head, early: frozenset[Direction]
) -> list[Slice | None]:
    """What a slot says after each of the five steps; None where the step does not change it."""
    found = slot.found
    pods = slot.endpoints
    selected = tuple(
        entry for entry in pods.before if entry in pods.kept or cast("PodEndpoint", entry).pod in staying
    )
    here = {cast("PodEndpoint", entry).pod for entry in pods.final}
    # In the same write as those that come, unless what takes their place stands elsewhere.
    lingering = tuple(
        entry for entry in selected if entry not in pods.kept and cast("PodEndpoint", entry).pod not in here
    )
    old: _Rules = slot.ingress.before, slot.egress.before
    new: _Rules = slot.ingress.final, slot.egress.final
    states: list[_State] = [
        (selected, old, early),
        (selected, new if slot.ingress.come or slot.egress.come else old, early),
        (selected, new, early),
        ((*pods.final, *lingering), new, head.isolates),
        (pods.final, new, head.isolates),
    ]
    before: _State = (pods.before, old, early if found is None else found.slice.head.isolates)
    steps: list[Slice | None] = []
    for state in states:
        steps.append(None if state == before else _slice(slot, head, *state))
        before = state
    if not any(steps) and not _same_head(slot, head):
        steps[1] = _slice(slot, head, *states[-1])
    return steps


def _slice(
    slot: _Slot, head: Head, endpoints: tuple[Hashable, ...], rules: _Rules, isolates: frozenset[Direction]
) -> Slice:
    contents = Contents(
        cast("tuple[PodEndpoint, ...]", endpoints),
        cast("tuple[Entry, ...]", rules[0]),
        cast("tuple[Entry, ...]", rules[1]),
    )
    return Slice(head._replace(isolates=isolates), slot.group, contents)


def _same_head(slot: _Slot, head: Head) -> bool:
    return slot.found is not None and slot.found.clean and slot.found.slice.head == head


def _pods_first(slots: Iterable[_Slot]) -> list[_Slot]:
    """In the order of deletion: pods are let go before the rules that they need."""
    return sorted(slots, key=lambda slot: (not slot.endpoints.before, slot.place))


class _Writes:
    """The writes so far; two of one object that follow each other are one."""

    def __init__(self) -> None:
        self.made: list[Write] = []
        self.last: _Slot | None = None
        self._exists: set[_Slot] = set()

    def put(self, slot: _Slot, state: Slice) -> None:
        if slot is self.last:
            self.made[-1] = self.made[-1]._replace(slice=state)
            return
        there = slot.found is not None or slot in self._exists
        self._exists.add(slot)
        self.last = slot
        self.made.append(Write(slot.place, slot.found, Action.UPDATE if there else Action.CREATE, state))

    def delete(self, slot: _Slot) -> None:
        if slot is self.last:
            self.made.pop()
        self.last = slot
        self.made.append(Write(slot.place, slot.found, Action.DELETE, None))


def limited(desired: Desired, found: Iterable[Found]) -> Desired:
    """`desired` without the rules that are not there yet.

    For a policy whose new rules the API server refuses: its pods must be isolated all the same.
    """
    known: defaultdict[str | None, set[tuple[str, Entry]]] = defaultdict(set)
    for each in found:
        contents = each.slice.contents
        known[each.slice.group].update(("ingress", entry) for entry in contents.ingress)
        known[each.slice.group].update(("egress", entry) for entry in contents.egress)
    groups = {
        group: replace(
            contents,
            ingress=tuple(entry for entry in contents.ingress if ("ingress", entry) in known[group]),
            egress=tuple(entry for entry in contents.egress if ("egress", entry) in known[group]),
        )
        for group, contents in desired.groups.items()
    }
    return replace(desired, groups=groups)
