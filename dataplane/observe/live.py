"""Live verdicts: one pump empties the event rings of all queue threads for any number of readers.

A reader says which packets it wants and how far it may lag. What it cannot take in time is lost to
it alone, and counted; what no reader could be given because a ring was full is counted as well. The
queue threads never wait for any of this, and with no reader they record nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable
from operator import attrgetter
from types import TracebackType
from typing import NamedTuple, Self

from dataplane._engine import Worker
from dataplane._events import EventFilter, take
from dataplane.reasons import Reason
from dataplane.verdict import Event

# How much of the traffic becomes events; the values are the engine's capture levels.
CAPTURE = {"none": 0, "denied": 1, "misses": 2, "all": 3}

PERIOD_SECONDS = 0.02  # how often the rings are emptied while somebody reads
REST = 9.0  # the pump rests for so many times the CPU time it took: packets come first on a busy machine
TAKEN_AT_ONCE = 2048  # events of one ring: the event loop has other work too
READER_EVENTS = 8192  # how far a reader may lag by default

Wanted = Callable[[Event], bool]


class Lost(NamedTuple):
    """Events that a reader never got: it was too slow (`reader`), or the rings were full (`ring`).

    For a reader without room no event is made: those count whatever `wanted` would have said of them.

    Nobody knows what stood in events that found a ring full: they count for every reader of the time.
    """

    reader: int
    ring: int


class Reader:
    """One consumer of live verdicts. A context manager; reading ends with it."""

    def __init__(
        self,
        live: LiveVerdicts,
        capture: int,
        wanted: Wanted | None,
        first: EventFilter | None,
        room: int,
        data: bool,
    ) -> None:
        self.capture = capture
        self.data = data
        self.first = first or EventFilter(capture=capture)
        self._live = live
        self._wanted = wanted
        self._room = room
        self._events: deque[Event] = deque()
        self._woken = asyncio.Event()
        self._ring_before = live.lost_in_rings

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def lost(self) -> Lost:
        """What was lost to this reader since it began."""
        return Lost(self.first.missed, self._live.lost_in_rings - self._ring_before)

    async def take(self, most: int = READER_EVENTS) -> list[Event]:
        """Wait for events; the oldest up to `most` that are there. An empty list: only losses are new."""
        await self._woken.wait()
        taken = [self._events.popleft() for _ in range(min(most, len(self._events)))]
        if not self._events:
            self._woken.clear()
        return taken

    def close(self) -> None:
        """End reading. More than once is no error."""
        self._live._remove(self)

    def _offer(self, events: Iterable[Event]) -> None:
        wanted, mine = self._wanted, self._events
        room = self._room - len(mine)
        for event in events:
            # Not everything is recorded for this reader: another may have asked for more.
            if (self.capture < CAPTURE["all"] and not _captured(event, self.capture)) or (
                wanted is not None and not wanted(event)
            ):
                continue
            if room > 0:  # else `first` has counted it
                mine.append(event)
                room -= 1
                self._woken.set()

    def _with_room(self) -> EventFilter:
        """The filter of this reader, which makes no event that the reader has no room for."""
        self.first.room = self._room - len(self._events)
        return self.first

    def _wake(self) -> None:
        self._woken.set()


class LiveVerdicts:
    """The verdicts of these workers as they happen. For the event loop's thread."""

    def __init__(self, workers: Iterable[Worker]) -> None:
        self._workers = list(workers)
        self._readers: list[Reader] = []
        self._pump: asyncio.Task[None] | None = None
        self._lost_before = 0  # in rings of workers that are gone
        self.lost_by_readers = 0  # events that a reader wanted and had no room for, since the start
        self._told = 0  # of all losses, readers have been woken for so many

    def read(
        self,
        capture: int = CAPTURE["misses"],
        wanted: Wanted | None = None,
        *,
        first: EventFilter | None = None,
        room: int = READER_EVENTS,
        data: bool = False,
    ) -> Reader:
        """Begin to read, with a running event loop.

        `capture`: a level of CAPTURE. `first` and `wanted` choose among those events: `first` before an
        event is made for Python, so that what it leaves out costs next to nothing (one for each reader),
        `wanted` afterwards.
        `room`: how far the reader may lag. `data`: events with the beginning of their packet, for which
        the rings need 256 bytes per entry from the first such reader on.
        """
        if not self._readers:  # what the last reader left must not be taken for this one's
            for worker in self._workers:
                while worker.events(TAKEN_AT_ONCE):
                    pass
            self._told = self.lost_in_rings + self.lost_by_readers
        reader = Reader(self, capture, wanted, first, room, data)
        self._readers.append(reader)
        self._set_capture()
        if self._pump is None or self._pump.done():
            self._pump = asyncio.get_running_loop().create_task(self._empty_rings())
        return reader

    @property
    def lost_in_rings(self) -> int:
        """Events that found a ring full, since the start."""
        return self._lost_before + sum(worker.events_lost for worker in self._workers)

    def add(self, worker: Worker) -> None:
        """Events of this worker too, from now on."""
        self._workers.append(worker)
        self._set_capture()

    def remove(self, worker: Worker) -> None:
        """Its last events are delivered; nothing more is read of it."""
        self._drain(worker)
        self._workers.remove(worker)
        self._lost_before += worker.events_lost
        worker.capture, worker.keep_bytes = CAPTURE["none"], False

    def _remove(self, reader: Reader) -> None:
        if reader in self._readers:
            self._readers.remove(reader)
            self._set_capture()

    def _set_capture(self) -> None:
        level = max((reader.capture for reader in self._readers), default=CAPTURE["none"])
        data = any(reader.data for reader in self._readers)
        for worker in self._workers:
            if worker.keep_bytes is not data:
                worker.keep_bytes = data
            worker.capture = level

    async def _empty_rings(self) -> None:
        while self._readers:
            began = time.thread_time()
            self._deliver(self._take(self._workers))
            if (lost := self.lost_in_rings + self.lost_by_readers) != self._told:
                self._told = lost
                for reader in self._readers:
                    reader._wake()
            await asyncio.sleep(max(PERIOD_SECONDS, (time.thread_time() - began) * REST))

    def _take(self, workers: Iterable[Worker]) -> list[Event]:
        """Some of what is in the rings, oldest first."""
        filters = [reader._with_room() for reader in self._readers]
        missed = sum(one.missed for one in filters)
        taken: list[Event] = []
        for worker in workers:
            taken += take(worker, TAKEN_AT_ONCE, filters)
        self.lost_by_readers += sum(one.missed for one in filters) - missed
        taken.sort(key=attrgetter("when_ns"))
        return taken

    def _drain(self, worker: Worker) -> None:
        more = True
        while more:
            taken = self._take([worker])
            self._deliver(taken)
            more = len(taken) == TAKEN_AT_ONCE

    def _deliver(self, events: list[Event]) -> None:
        for reader in self._readers:
            reader._offer(events)


def _captured(event: Event, capture: int) -> bool:
    """Whether a reader of this capture level is to see the event."""
    verdict = event.verdict
    return not verdict.allow or (
        not verdict.cached and (capture == CAPTURE["misses"] or verdict.reason is Reason.AUDIT)
    )
