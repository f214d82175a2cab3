"""Totals by name, in bounded number: pods and policies come and go, and anybody may make many."""

from __future__ import annotations

import time
from collections.abc import Callable, Container

MAX_SERIES = 1000
KEEP_SECONDS = 900.0  # after its pod or policy is gone: some scrapes see its last count

Labels = tuple[str, ...]


class Totals:
    """Counts by label values. The first `limit` have a series each; `other` counts for all further ones."""

    def __init__(
        self,
        limit: int = MAX_SERIES,
        keep: float = KEEP_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limit = limit
        self._keep = keep
        self._clock = clock
        self._counts: dict[Labels, int] = {}
        self._gone: dict[Labels, float] = {}  # since when, oldest first
        self._other: dict[Labels, int] = {}

    def add(self, name: tuple[str, str], rest: Labels, count: int) -> None:
        """Count for (`namespace`, `name`) and further labels, of which there are few."""
        labels = (*name, *rest)
        if labels not in self._counts and len(self._counts) >= self._limit:
            if not self._gone:
                self._other[rest] = self._other.get(rest, 0) + count
                return
            self._forget(next(iter(self._gone)))
        self._counts[labels] = self._counts.get(labels, 0) + count

    def expire(self, here: Container[tuple[str, str]]) -> None:
        """Forget what has been gone for long. `here`: the names that exist now."""
        now = self._clock()
        for labels in self._counts:
            if labels[:2] in here:
                self._gone.pop(labels, None)
            else:
                self._gone.setdefault(labels, now)
        for labels in [labels for labels, since in self._gone.items() if now - since > self._keep]:
            self._forget(labels)

    def _forget(self, labels: Labels) -> None:
        del self._gone[labels], self._counts[labels]

    def series(self) -> list[tuple[Labels, float]]:
        """Everything counted, sorted; what has no series of its own is named ("", "other")."""
        own = sorted(self._counts.items())
        return [*own, *((("", "other", *rest), count) for rest, count in sorted(self._other.items()))]
