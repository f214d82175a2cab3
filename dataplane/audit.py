"""Adds up what audits let through, while there are any: what `podgate audit-report` asks for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from dataplane.enforcement import Enforcement
from dataplane.model import Key
from dataplane.observe.audit import AuditTally
from dataplane.observe.events import describe_event
from dataplane.observe.live import CAPTURE
from dataplane.policy.audit_report import audit_report
from dataplane.reasons import Reason
from dataplane.verdict import Event


def _audited(event: Event) -> bool:
    return event.verdict.audited is not Reason.NONE


class AuditWatch:
    """Reads live verdicts while anything is in audit. Run it until cancelled; `report` at any time."""

    def __init__(self, enforcement: Enforcement, names: Callable[[], Mapping[bytes, Key]]) -> None:
        """`names`: the pods that addresses belong to."""
        self._enforcement = enforcement
        self._names = names
        self._tally = AuditTally()
        self._since: str | None = None
        self._lost = 0
        self._changed = asyncio.Event()

    def look(self) -> None:
        """Something may be in audit now that was not, or the other way round."""
        self._changed.set()

    @property
    def _auditing(self) -> bool:
        plan = self._enforcement.in_force
        return plan is not None and (self._enforcement.config.audit or plan.audited > 0)

    async def run(self) -> None:
        """Read whenever there is something to read."""
        reading: asyncio.Task[None] | None = None
        try:
            while True:
                await self._changed.wait()
                self._changed.clear()
                if self._auditing and reading is None:
                    reading = asyncio.create_task(self._read())
                elif not self._auditing and reading is not None:
                    reading.cancel()
                    reading = None
        finally:
            if reading is not None:
                reading.cancel()
                with suppress(asyncio.CancelledError):
                    await reading

    async def _read(self) -> None:
        self._since = self._since or datetime.now(UTC).isoformat(timespec="seconds")
        before = self._lost
        with self._enforcement.live.read(CAPTURE["denied"], _audited) as reader:
            while True:
                events, names = await reader.take(), self._names()
                self._lost = before + sum(reader.lost)
                for event in events:
                    self._tally.add(describe_event(event, names, None))

    async def report(self, _query: Mapping[str, str]) -> dict[str, Any]:
        """What `podgate audit-report -o json` prints."""
        now = self._enforcement
        denials, known, resolved = list(self._tally), now.known, now.snapshot
        found = await asyncio.to_thread(lambda: audit_report(denials, known, resolved))
        return {
            "auditing": self._auditing,
            "since": self._since,
            "lost": self._lost,
            "more": self._tally.more,
            **found,
        }
