"""The objects of all origins together, as one Snapshot.

An origin is a file or one kind of the Kubernetes API. The snapshot depends on what the origins hold
now, never on the order in which they came to hold it, with one exception, which is the point of it:
what cannot be read keeps its last good version in force, so that a typing error opens no pod.

* A problem that names an object (`Problem.object`) which is not among the origin's objects: that
  object is unusable as a whole. Its last good version stays while the origin still holds the object.
* A problem that names no object: something in the origin could not even be identified, or the
  origin could not be read. Everything that it held before stays unless it holds a newer version.

Work is in proportion to what changed: a snapshot shares with the one before every object that did not
change, and the whole tuple of every kind of which none did.
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast

from dataplane.model import (
    Namespace,
    NetworkPolicy,
    Pod,
    PolicyEndpoint,
    PolicyHead,
    Problem,
    Service,
    Snapshot,
)

KubernetesObject = PolicyEndpoint | Pod | NetworkPolicy | PolicyHead | Namespace | Service
_T = TypeVar("_T", PolicyEndpoint, Pod, NetworkPolicy, PolicyHead, Namespace, Service)

_KEPT = "its last good version stays in force"
_LOST = "it is not in force"
_KEPT_ALL = "what was read from here before stays in force"


def identity(item: KubernetesObject) -> str:
    """`Kind namespace/name`, or `Namespace name`, as `Problem.object` names it."""
    if isinstance(item, Namespace):
        return f"Namespace {item.name}"
    if isinstance(item, PolicyHead):
        return f"NetworkPolicy {item.key}"
    return f"{type(item).__name__} {item.key}"


@dataclass(slots=True, eq=False)
class _Origin:
    given: dict[str, KubernetesObject] = field(default_factory=dict)  # readable, by identity
    problems: dict[str, tuple[Problem, ...]] = field(default_factory=dict)  # by the object they name, or ""
    kept: dict[str, KubernetesObject] = field(default_factory=dict)  # earlier versions still in force

    def unusable(self) -> set[str]:
        """The objects that problems name and that are not readable."""
        return {name for name in self.problems if name and name not in self.given}

    def holds(self, name: str) -> KubernetesObject | None:
        return self.given.get(name, self.kept.get(name))


class _Kind:
    """The objects of one kind in force, sorted; the same tuple for as long as none changes."""

    def __init__(self) -> None:
        self._keys: list[Any] = []
        self._items: list[Any] = []  # in step with the keys
        self._tuple: tuple[Any, ...] = ()

    def update(self, changes: dict[Any, Any]) -> None:
        """Changes by sort key; None takes the object away."""
        # An insertion moves what comes after it: many at a time are cheaper sorted anew.
        if len(changes) > 16 + len(self._keys) // 64:
            whole = dict(zip(self._keys, self._items, strict=True)) | changes
            self._keys = sorted(key for key, item in whole.items() if item is not None)
            self._items = [whole[key] for key in self._keys]
        else:
            for key, item in changes.items():
                place = bisect_left(self._keys, key)
                known = place < len(self._keys) and self._keys[place] == key
                if item is None and known:
                    del self._keys[place], self._items[place]
                elif item is not None and known:
                    self._items[place] = item
                elif item is not None:
                    self._keys.insert(place, key)
                    self._items.insert(place, item)
        self._tuple = tuple(self._items)

    def objects(self, _kind: type[_T]) -> tuple[_T, ...]:
        return cast("tuple[_T, ...]", self._tuple)


class Store:
    """Holds objects per origin. Not for several threads: call it from the event loop's thread.

    `wait_change` returns once no further change came for `quiet` seconds, at the latest `limit`
    seconds after the first one: slices of one policy change arrive one after another. Objects of
    the kinds `without` are not taken up; of a NetworkPolicy its head still is.
    """

    def __init__(
        self,
        *,
        quiet: float = 0.02,
        limit: float = 0.2,
        without: Collection[type] = (),
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._quiet = quiet
        self._limit = limit
        self._without = tuple(without)
        self._clock = clock
        self._sleep = sleep
        self._origins: dict[str, _Origin] = {}
        self._holders: dict[str, tuple[str, ...]] = {}  # identity → origins that hold it, sorted
        self._unusable: defaultdict[str, set[str]] = defaultdict(set)  # identity → origins
        self._dirty: set[str] = set()  # what may be different in the next snapshot
        # The version in force of each object of the latest snapshot: it is needed when an object
        # moves to another origin and breaks on the way.
        self._in_force: dict[str, KubernetesObject] = {}
        self._kinds: defaultdict[type, _Kind] = defaultdict(_Kind)
        self._clashes: dict[str, list[Problem]] = {}
        self._problems: tuple[Problem, ...] = ()
        self._changed = asyncio.Event()
        self._first = 0.0
        self._last = 0.0

    def replace(self, origin: str, objects: Iterable[KubernetesObject], problems: Iterable[Problem]) -> None:
        """Everything that `origin` holds now. Of several objects with one name the last counts."""
        old = self._origins.get(origin) or _Origin()
        new = _Origin()
        repeated: set[str] = set()
        for given in objects:
            item = given
            if isinstance(given, self._without):
                if not isinstance(given, NetworkPolicy):
                    continue
                item = PolicyHead(given.key, given.annotations)
            name = identity(item)
            if new.given.get(name, item) != item:
                repeated.add(name)
            before = old.given.get(name)
            new.given[name] = before if before == item and before is not None else item
        named = defaultdict(list)
        for problem in problems:
            named[problem.object].append(problem)
        for name in sorted(repeated):
            named[name].append(Problem(origin, name, "", "is here more than once; the last one counts"))
        new.problems = {name: tuple(each) for name, each in named.items()}
        unusable = new.unusable()
        if unusable or "" in new.problems:
            new.kept = {
                name: item
                for name, item in (old.kept | old.given).items()
                if name in unusable or ("" in new.problems and name not in new.given)
            }
        known = origin in self._origins
        self._origins[origin] = new
        changed = self._compare(origin, old, new)
        if changed or not known or old.problems != new.problems:
            self._note_change()

    def put(
        self, origin: str, name: str, item: KubernetesObject | None, problems: Iterable[Problem] = ()
    ) -> None:
        """One object of `origin`, `name` its identity. None: it is there but unusable, as `problems` say."""
        held = self._origins.setdefault(origin, _Origin())
        before, problems = held.holds(name), tuple(problems)
        if item is not None and item == held.given.get(name) and problems == held.problems.get(name, ()):
            return
        held.given.pop(name, None)
        held.kept.pop(name, None)
        held.problems.pop(name, None)
        if problems:
            held.problems[name] = problems
        if item is not None:
            held.given[name] = item
        elif before is not None:
            held.kept[name] = before
        self._mark(origin, name, here=item is not None or before is not None, unusable=item is None)
        self._note_change()

    def delete(self, origin: str, name: str) -> None:
        """One object that `origin` no longer holds."""
        held = self._origins.get(origin)
        if held is None or (held.holds(name) is None and name not in held.problems):
            return
        held.given.pop(name, None)
        held.kept.pop(name, None)
        held.problems.pop(name, None)
        self._mark(origin, name, here=False, unusable=False)
        self._note_change()

    def remove(self, origin: str) -> None:
        """`origin` is gone, and its objects with it."""
        old = self._origins.pop(origin, None)
        if old is not None:
            self._compare(origin, old, _Origin())
            self._note_change()

    def snapshot(self) -> Snapshot:
        """Everything known now. Of several origins that hold an object the last by name counts."""
        self._changed.clear()
        changes: defaultdict[type, dict[Any, KubernetesObject | None]] = defaultdict(dict)
        for name in self._dirty:
            before, now = self._in_force.get(name), self._decide(name)
            if now is None:
                self._in_force.pop(name, None)
            elif now is not before:
                self._in_force[name] = now
            if now is before:
                continue
            # An object may come back as another kind: a NetworkPolicy as its head.
            for item, after in ((before, None), (now, now)):
                if item is not None:
                    changes[type(item)][item.name if isinstance(item, Namespace) else item.key] = after
        self._dirty.clear()
        for kind, changed in changes.items():
            self._kinds[kind].update(changed)
        self._problems = self._all_problems()
        return Snapshot(
            policy_endpoints=self._kinds[PolicyEndpoint].objects(PolicyEndpoint),
            pods=self._kinds[Pod].objects(Pod),
            network_policies=self._kinds[NetworkPolicy].objects(NetworkPolicy),
            namespaces=self._kinds[Namespace].objects(Namespace),
            services=self._kinds[Service].objects(Service),
            policy_heads=self._kinds[PolicyHead].objects(PolicyHead),
            problems=self._problems,
        )

    async def wait_change(self) -> None:
        """Returns when something changed since the last `snapshot`, coalesced."""
        await self._changed.wait()
        while (wait := self._unsettled()) > 0:
            await self._sleep(wait)

    @property
    def changed_since(self) -> float | None:
        """When the first change came that the latest snapshot does not show; None when there is none."""
        return self._first if self._changed.is_set() else None

    @property
    def settled_since(self) -> float:
        """When the coalescing window of the changes that the latest snapshot does not show is over."""
        return min(self._last + self._quiet, self._first + self._limit)

    @property
    def settled(self) -> bool:
        """Whether `snapshot` would show whole changes: none is under way, or it has had its time.

        For whoever wakes up for another reason than `wait_change`.
        """
        return not self._changed.is_set() or self._unsettled() <= 0

    def _unsettled(self) -> float:
        return self.settled_since - self._clock()

    def _note_change(self) -> None:
        self._last = self._clock()
        if not self._changed.is_set():
            self._first = self._last
            self._changed.set()

    def _compare(self, origin: str, old: _Origin, new: _Origin) -> bool:
        """Note every object that `new` does not hold as `old` did; whether there are any."""
        was, unusable = old.unusable(), new.unusable()
        names = old.given.keys() | old.kept.keys() | new.given.keys() | new.kept.keys()
        changed = {name for name in names if old.holds(name) is not new.holds(name)} | (was ^ unusable)
        for name in changed:
            self._mark(origin, name, here=new.holds(name) is not None, unusable=name in unusable)
        return bool(changed)

    def _mark(self, origin: str, name: str, *, here: bool, unusable: bool) -> None:
        holders = self._holders.get(name, ())
        if here and origin not in holders:
            self._holders[name] = tuple(sorted((*holders, origin)))
        elif not here and origin in holders:
            rest = tuple(other for other in holders if other != origin)
            if rest:
                self._holders[name] = rest
            else:
                del self._holders[name]
        if unusable:
            self._unusable[name].add(origin)
        elif name in self._unusable:
            self._unusable[name].discard(origin)
            if not self._unusable[name]:
                del self._unusable[name]
        self._dirty.add(name)

    def _decide(self, name: str) -> KubernetesObject | None:
        """The version of an object that counts now; notes who else holds another one."""
        now: KubernetesObject | None = None
        last = ""
        clashes: list[Problem] = []
        for origin in self._holders.get(name, ()):
            item = self._origins[origin].holds(name)
            if now is not None and item != now:
                clashes.append(Problem(last, name, "", f"is also in {origin}, which counts"))
            now, last = item, origin
        if clashes:
            self._clashes[name] = clashes
        else:
            self._clashes.pop(name, None)
        before = self._in_force.get(name)
        if now is None:
            return before if name in self._unusable else None
        return before if now == before else now

    def _all_problems(self) -> tuple[Problem, ...]:
        found = {problem for clashes in self._clashes.values() for problem in clashes}
        for held in self._origins.values():
            for name, problems in held.problems.items():
                found.update(self._outcome(problem, name, held) for problem in problems)
        return tuple(sorted(found, key=lambda each: (each.source, each.object, each.field, each.reason)))

    def _outcome(self, problem: Problem, name: str, held: _Origin) -> Problem:
        """The problem, and what becomes of the object that it makes unusable."""
        if name and name not in held.given:
            outcome = _KEPT if name in self._in_force else _LOST
        elif not name and held.kept:
            outcome = _KEPT_ALL
        else:
            return problem
        return replace(problem, reason=f"{problem.reason}; {outcome}")
