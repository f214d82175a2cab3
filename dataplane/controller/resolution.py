"""What the PolicyEndpoints of each NetworkPolicy are to say, kept in step with the store."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

from dataplane.controller import objects
from dataplane.controller.slices import Desired
from dataplane.model import Key, NetworkPolicy, PolicyEndpoint, Problem, Snapshot
from dataplane.policy.resolve import Resolver
from dataplane.sources.store import Store

_Made = Mapping[Key, tuple[PolicyEndpoint, ...]]


class Resolution:
    """Run it until cancelled; `update` it once before, when everything is in the store."""

    def __init__(self, store: Store, on_change: Callable[[Collection[Key], float], None], log: Any) -> None:
        """`on_change` is called with policies for which something else is desired now, those that are gone
        among them, and with the moment at which the change began, in seconds since the epoch."""
        self._store = store
        self._on_change = on_change
        self._log = log
        self._resolver = Resolver()
        self._policies: dict[Key, NetworkPolicy] = {}
        self._made: _Made = {}
        self._problems: frozenset[Problem] = frozenset()

    @property
    def policies(self) -> Collection[Key]:
        """The policies that are resolved."""
        return self._policies.keys()

    @property
    def problems(self) -> int:
        """How many things of the objects cannot be used."""
        return len(self._problems)

    def desired(self, policy: Key) -> Desired | None:
        """What the PolicyEndpoints of a policy are to say; None for a policy that is not resolved."""
        found = self._policies.get(policy)
        return None if found is None else objects.desired(found, self._made[policy])

    async def run(self) -> None:
        while True:
            await self._store.wait_change()
            await self.update()

    async def update(self) -> None:
        """Take up what the store has."""
        first = self._store.changed_since
        since = time.time() - (0.0 if first is None else time.monotonic() - first)
        snapshot = self._store.snapshot()
        # Minutes of computing at once must not keep the lease from being renewed.
        policies, made, changed = await asyncio.to_thread(self._resolve, snapshot)
        self._policies, self._made = policies, made
        self._tell(snapshot)
        if changed:
            self._on_change(changed, since)

    def _resolve(self, snapshot: Snapshot) -> tuple[dict[Key, NetworkPolicy], _Made, list[Key]]:
        self._resolver.update(snapshot)
        made = dict(self._resolver.made)
        policies = {policy.key: policy for policy in snapshot.network_policies}
        before, known = self._made, self._policies
        changed = [
            key
            for key, policy in policies.items()
            if not (_same(known.get(key), policy) and _same(before.get(key), made[key]))
        ]
        return policies, made, changed + sorted(known.keys() - policies.keys())

    def _tell(self, snapshot: Snapshot) -> None:
        problems = frozenset(snapshot.problems)
        for problem in snapshot.problems:
            if problem not in self._problems:
                self._log.warning("an object cannot be used as it is", problem=str(problem))
        self._problems = problems


def _same(one: object, other: object) -> bool:
    return one is other or one == other
