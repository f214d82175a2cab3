"""The objects of all origins together, as one Snapshot.

An origin is a file or one kind of the Kubernetes API. The snapshot depends on what the origins hold
now, never on the order in which they came to hold it, with one exception, which is the point of it:
what cannot be read keeps its last good version in force, so that a typing error opens no pod.

* A problem that names an object (`Problem.object`) which is not among the origin's objects: that
  object is unusable as a whole. Its last good version stays while the origin still holds the object.
* A problem that names no object: something in the origin could not even be identified, or the
  origin could not be read. Everything that it held before stays unless it holds a newer version.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TypeVar

from dataplane.model import Namespace, NetworkPolicy, Pod, PolicyEndpoint, Problem, Service, Snapshot

KubernetesObject = PolicyEndpoint | Pod | NetworkPolicy | Namespace | Service
_T = TypeVar("_T", PolicyEndpoint, Pod, NetworkPolicy, Service)

_KEPT = "its last good version stays in force"
_LOST = "it is not in force"
_KEPT_ALL = "what was read from here before stays in force"


def identity(item: KubernetesObject) -> str:
    """`Kind namespace/name`, or `Namespace name`, as `Problem.object` names it."""
    if isinstance(item, Namespace):
        return f"Namespace {item.name}"
    return f"{type(item).__name__} {item.key}"


@dataclass(slots=True, eq=False)
class _Origin:
    given: dict[str, KubernetesObject] = field(default_factory=dict)  # readable, by identity
    problems: tuple[Problem, ...] = ()
    unusable: frozenset[str] = frozenset()  # named by a problem, not among `given`
    unidentified: bool = False  # something here has no name
    kept: dict[str, KubernetesObject] = field(default_factory=dict)  # earlier versions still in force


class Store:
    """Holds objects per origin. Not for several threads: call it from the event loop's thread.

    `wait_change` returns once no further change came for `quiet` seconds, at the latest `limit`
    seconds after the first one: slices of one policy change arrive one after another.
    """

    def __init__(
        self,
        *,
        quiet: float = 0.02,
        limit: float = 0.2,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._quiet = quiet
        self._limit = limit
        self._clock = clock
        self._sleep = sleep
        self._origins: dict[str, _Origin] = {}
        # The version last in force of each object of the latest snapshot: it is needed when an
        # object moves to another origin and breaks on the way.
        self._in_force: dict[str, KubernetesObject] = {}
        self._changed = asyncio.Event()
        self._first = 0.0
        self._last = 0.0

    def replace(self, origin: str, objects: Iterable[KubernetesObject], problems: Iterable[Problem]) -> None:
        """Everything that `origin` holds now. Of several objects with one name the last counts."""
        problems = tuple(problems)
        given: dict[str, KubernetesObject] = {}
        repeated: set[str] = set()
        for item in objects:
            name = identity(item)
            if given.get(name, item) != item:
                repeated.add(name)
            given[name] = item
        problems += tuple(
            Problem(origin, name, "", "is here more than once; the last one counts")
            for name in sorted(repeated)
        )
        new = _Origin(given, problems)
        new.unusable = frozenset(problem.object for problem in problems if problem.object) - given.keys()
        new.unidentified = any(not problem.object for problem in problems)
        old = self._origins.get(origin)
        if old is not None:
            before = old.kept | old.given
            new.kept = {
                name: item
                for name, item in before.items()
                if name in new.unusable or (new.unidentified and name not in given)
            }
            if (old.given, old.problems, old.kept) == (new.given, new.problems, new.kept):
                return
        self._origins[origin] = new
        self._note_change()

    def remove(self, origin: str) -> None:
        """`origin` is gone, and its objects with it."""
        if self._origins.pop(origin, None) is not None:
            self._note_change()

    def snapshot(self) -> Snapshot:
        """Everything known now. Of several origins that hold an object the last by name counts."""
        self._changed.clear()
        in_force: dict[str, KubernetesObject] = {}
        holders: dict[str, str] = {}
        problems: list[Problem] = []
        for origin in sorted(self._origins):
            held = self._origins[origin]
            for name, item in (held.kept | held.given).items():
                if in_force.get(name, item) != item:
                    reason = f"is also in {origin}, which counts"
                    problems.append(Problem(holders[name], name, "", reason))
                in_force[name] = item
                holders[name] = origin
        for held in self._origins.values():
            for name in held.unusable:
                if name not in in_force and name in self._in_force:
                    in_force[name] = self._in_force[name]
        for held in self._origins.values():
            problems += (self._outcome(problem, held, in_force) for problem in held.problems)
        self._in_force = in_force
        return Snapshot(
            policy_endpoints=_sorted(in_force.values(), PolicyEndpoint),
            pods=_sorted(in_force.values(), Pod),
            network_policies=_sorted(in_force.values(), NetworkPolicy),
            namespaces=tuple(
                sorted(
                    (item for item in in_force.values() if isinstance(item, Namespace)),
                    key=lambda item: item.name,
                )
            ),
            services=_sorted(in_force.values(), Service),
            problems=tuple(
                sorted(set(problems), key=lambda each: (each.source, each.object, each.field, each.reason))
            ),
        )

    async def wait_change(self) -> None:
        """Returns when something changed since the last `snapshot`, coalesced."""
        await self._changed.wait()
        while (wait := self._unsettled()) > 0:
            await self._sleep(wait)

    @property
    def settled(self) -> bool:
        """Whether `snapshot` would show whole changes: none is under way, or it has had its time.

        For whoever wakes up for another reason than `wait_change`.
        """
        return not self._changed.is_set() or self._unsettled() <= 0

    def _unsettled(self) -> float:
        return min(self._last + self._quiet, self._first + self._limit) - self._clock()

    def _note_change(self) -> None:
        self._last = self._clock()
        if not self._changed.is_set():
            self._first = self._last
            self._changed.set()

    @staticmethod
    def _outcome(problem: Problem, held: _Origin, in_force: dict[str, KubernetesObject]) -> Problem:
        """The problem, and what becomes of the object that it makes unusable."""
        if problem.object in held.unusable:
            outcome = _KEPT if problem.object in in_force else _LOST
        elif not problem.object and held.kept:
            outcome = _KEPT_ALL
        else:
            return problem
        return replace(problem, reason=f"{problem.reason}; {outcome}")


def _sorted(items: Iterable[KubernetesObject], kind: type[_T]) -> tuple[_T, ...]:
    return tuple(sorted((item for item in items if isinstance(item, kind)), key=lambda item: item.key))
