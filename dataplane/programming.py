"""How long a change takes from its cause to the rules in force."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from dataplane.model import Snapshot
from dataplane.sources.store import Store

RECENT = 1024


class Latency(NamedTuple):
    """Of one change that came into force, in seconds.

    `received`: since its first event was received, the coalescing window included. `settled`: since that
    window was over. `triggered`: since the trigger time that its PolicyEndpoint carries, None where it
    carries none; 0 where the clock of the machine that wrote it is ahead of ours.
    """

    received: float
    settled: float
    triggered: float | None


class Programming:
    """A store that remembers when what it gives out came in.

    `Enforcement` takes snapshots from it, and tells it when they are in force. `recent` holds the last
    latencies; every function of `listeners` is called with each.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._last = Snapshot()
        self._triggers: list[float] = []  # of changes that no snapshot shows yet
        self._taken: list[Latency] = []  # … that a snapshot shows, with times instead of spans
        self.recent: deque[Latency] = deque(maxlen=RECENT)
        self.listeners: list[Callable[[Latency], None]] = []

    @property
    def settled(self) -> bool:
        return self._store.settled

    async def wait_change(self) -> None:
        await self._store.wait_change()

    def snapshot(self) -> Snapshot:
        """The store's, and the beginning of the way into force of what is new in it."""
        since, settled, triggers = self._store.changed_since, self._store.settled_since, self._triggers
        snapshot = self._store.snapshot()
        self._triggers = []
        if snapshot != self._last and since is not None:
            times: list[float | None] = [*triggers] or [None]
            self._taken += (Latency(since, settled, trigger) for trigger in times)
        self._last = snapshot
        return snapshot

    def trigger(self, changed_at: float | None) -> None:
        """A change is in the store, whose cause was at `changed_at` (seconds since the epoch)."""
        if changed_at is not None:
            self._triggers.append(changed_at)

    def in_force(self) -> None:
        """Everything that snapshots have shown is in force."""
        taken, self._taken = self._taken, []
        now, wall = time.monotonic(), time.time()
        for since, settled, trigger in taken:
            triggered = None if trigger is None else max(wall - trigger, 0.0)
            latency = Latency(now - since, max(now - settled, 0.0), triggered)
            self.recent.append(latency)
            for listener in self.listeners:
                listener(latency)

    def quantiles(self) -> dict[str, Any]:
        """Milliseconds from arrival to in force, of the last RECENT changes: p50, p99 and their number.

        The same again as `after_window`: from the end of the coalescing window.
        """
        if not self.recent:
            return {"changes": 0}
        return {
            "changes": len(self.recent),
            **_quantiles([each.received for each in self.recent]),
            "after_window": _quantiles([each.settled for each in self.recent]),
        }


def _quantiles(seconds: Iterable[float]) -> dict[str, float]:
    times = sorted(seconds)
    return {
        name: round(times[min(int(len(times) * share), len(times) - 1)] * 1000, 1)
        for name, share in (("p50", 0.5), ("p99", 0.99))
    }
