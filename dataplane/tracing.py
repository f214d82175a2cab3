"""`podgate trace` as the agent sees it: a stream of verdict records for each reader.

What a reader does not want is never made into a record. What it loses is told in the stream, by a
record of its own kind: `{"lost": 12, "where": "reader"}`.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncGenerator
from datetime import UTC, datetime
from typing import Any

from dataplane.config import PodNames
from dataplane.enforcement import Enforcement
from dataplane.errors import InputError
from dataplane.observe.control import Query, Stream
from dataplane.observe.events import describe_event
from dataplane.observe.live import CAPTURE, REST, Lost, Reader
from dataplane.observe.selection import Selection
from dataplane.plan import Plan
from dataplane.pod_names import NamesByAddress
from dataplane.verdict import Event

RECORDS_AT_ONCE = 256  # made before anything else in the event loop has its turn

Records = AsyncGenerator[list[dict[str, Any]], None]


def _capture(query: Query, default: str) -> int:
    capture = query.get("capture", default)
    if capture not in CAPTURE:
        raise InputError(f"capture={capture}: one of {', '.join(CAPTURE)}")
    return CAPTURE[capture]


def pods_meant(plan: Plan | None, selection: Selection) -> list[str]:
    """The pods of this node whose packets must be looked at for a selection. InputError: there is none."""
    if plan is None:
        raise InputError("the agent has no rules yet: it is still starting")
    pods = selection.pods(plan.placements)
    if not pods:
        known = ", ".join(map(str, sorted(plan.placements))) or "none"
        raise InputError(f"FILTER: no pod of this node is meant; known here: {known}")
    return [str(key) for key in sorted(pods)]


class Tracing:
    """Streams of live verdicts. Changes nothing but what is captured and, if asked to, what is queued."""

    def __init__(self, enforcement: Enforcement, names: NamesByAddress) -> None:
        self._enforcement = enforcement
        self._names = names

    def streams(self) -> dict[str, Stream]:
        """The streams of JSON lines, by path."""
        return {"trace": self.trace, "events": self.events}

    async def events(self, query: Query) -> Records:
        """Every verdict of a capture level. `capture`: denied, misses (the default) or all."""
        with self._enforcement.live.read(_capture(query, "misses")) as reader:
            yield []
            async for records in self._records(reader):
                yield records

    async def trace(self, query: Query) -> Records:
        """The verdicts that `filter` selects (`observe.selection`), after one record that says what is read.

        `data=yes`: with the first bytes of each packet, as base64. `every-packet=yes`: of packets too
        that need no verdict; the pods that the filter means are looked at until the stream ends.
        `capture`: denied, misses or all (the default), if that is less than what the filter selects.
        """
        most = _capture(query, "all")
        selection = Selection.parse([query.get("filter", "")])
        packets = await asyncio.to_thread(selection.compile)
        data, every_packet = query.get("data") == "yes", query.get("every-packet") == "yes"
        wanted = selection.wanted(self._names, packets)
        live = self._enforcement.live
        pods = pods_meant(self._enforcement.in_force, selection) if every_packet else None
        local = self._enforcement.config.pod_names is PodNames.LOCAL
        first = selection.first_filter(packets, pods=local)
        level = min(selection.capture, most)
        with live.read(level, wanted, first=first, data=data or packets is not None) as reader:
            if every_packet:
                await self._enforcement.watch(selection.pods)
            try:
                yield [
                    {
                        "began": datetime.now(UTC).isoformat(timespec="microseconds"),
                        "filter": str(selection),
                        "offload": self._enforcement.config.offload,
                        "every_packet_of": pods,
                        "node": self._enforcement.config.node_name,
                    }
                ]
                async for records in self._records(reader, data=data):
                    yield records
            finally:
                if every_packet:
                    self._enforcement.unwatch(selection.pods)

    async def _records(self, reader: Reader, *, data: bool = False) -> Records:
        told = Lost(0, 0)
        while True:
            events = await reader.take(RECORDS_AT_ONCE)
            began = time.thread_time()
            records = [self._record(event, data) for event in events]
            for where, count in (lost := reader.lost)._asdict().items():
                if more := count - getattr(told, where):
                    records.append({"lost": more, "where": where})
            told = lost
            # Packets come first on a busy machine; turning the records into text costs as much again.
            rest = (time.thread_time() - began) * 2 * REST
            yield records
            await asyncio.sleep(rest)

    def _record(self, event: Event, data: bool) -> dict[str, Any]:
        record = describe_event(event, self._names(), self._enforcement.config.node_name)
        if data:
            record["data"] = base64.b64encode(event.data).decode()
        return record
