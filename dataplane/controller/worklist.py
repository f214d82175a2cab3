"""Policies that have to be looked at: each once, however many changes there were, by one worker at a time."""

from __future__ import annotations

import asyncio
import random
from collections import Counter, deque

from dataplane.model import Key

FIRST_RETRY = 0.25
LAST_RETRY = 60.0


class Worklist:
    """`add` from anywhere in the event loop; workers `take`, and then either `done` or `retry`."""

    def __init__(self) -> None:
        self._since: dict[Key, float] = {}  # when the oldest change began that is not written yet
        self._order: deque[Key] = deque()
        self._taken: set[Key] = set()
        self._delayed: dict[Key, asyncio.TimerHandle] = {}
        self._failures: Counter[Key] = Counter()
        self._ready = asyncio.Event()
        self._closed = False

    def __len__(self) -> int:
        return len(self._since)

    def add(self, policy: Key, since: float) -> None:
        """Have a policy looked at. `since`: when the change began, in seconds since the epoch."""
        known = self._since.get(policy)
        self._since[policy] = since if known is None else min(known, since)
        delayed = self._delayed.pop(policy, None)
        if delayed is not None:
            delayed.cancel()
        if policy not in self._taken and (known is None or delayed is not None):
            self._queue(policy)

    def close(self) -> None:
        """No worker is given anything any more."""
        self._closed = True
        for delayed in self._delayed.values():
            delayed.cancel()
        self._ready.set()

    async def take(self) -> tuple[Key, float] | None:
        """The next policy, and when its oldest change began; None once the list is closed."""
        while not self._order and not self._closed:
            self._ready.clear()
            await self._ready.wait()
        if self._closed:
            return None
        policy = self._order.popleft()
        self._taken.add(policy)
        return policy, self._since.pop(policy)

    def done(self, policy: Key) -> None:
        """A policy that was taken is in order."""
        self._failures.pop(policy, None)
        self._taken.discard(policy)
        if policy in self._since:
            self._queue(policy)

    def retry(self, policy: Key, since: float, after: float = 0.0) -> float:
        """A policy that was taken is to come again: later each time, and not before `after` seconds.

        Returns the seconds.
        """
        self._failures[policy] += 1
        # Days of failures must not become a number too large to count with.
        doubled = min(self._failures[policy] - 1, 20)
        longest = min(FIRST_RETRY * float(1 << doubled), LAST_RETRY)
        wait = max(after, longest * random.uniform(0.5, 1.0))
        known = self._since.get(policy)
        self._since[policy] = since if known is None else min(known, since)
        self._taken.discard(policy)
        if self._closed:
            return wait
        self._delayed[policy] = asyncio.get_running_loop().call_later(wait, self._due, policy)
        return wait

    @property
    def failing(self) -> dict[Key, int]:
        """Policies that could not be written, and how many times in a row."""
        return dict(self._failures)

    def _due(self, policy: Key) -> None:
        self._delayed.pop(policy, None)
        self._queue(policy)

    def _queue(self, policy: Key) -> None:
        self._order.append(policy)
        self._ready.set()
