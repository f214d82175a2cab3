"""`podgate intercept` as the agent sees it: a conversation about packets with the process of a user's hook.

The agent says, one JSON object each:

    {"began": …, "filter", "pods", "timeout", "audit"}      once
    {"id", "packet": record, "data": base64}               what do you want of this packet?
    {"id", "did", "why", "record"}                         what became of it (`Interception` says the words)
    {"refused": why}                                       what was said last is about no packet
    {"summary": counts, "why": text or null}               the end

The other side answers as `hook_answers` describes, or says `{"end": true}` to be told the summary.
"""

from __future__ import annotations

import asyncio
import base64
import math
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from dataplane.enforcement import Enforcement
from dataplane.errors import InputError
from dataplane.hook_answers import packet_number, read_answer, read_json
from dataplane.interception import Interception
from dataplane.observe.control import Channel, Query
from dataplane.observe.events import describe_event
from dataplane.observe.live import Wanted
from dataplane.observe.selection import Selection
from dataplane.pod_names import NamesByAddress
from dataplane.tracing import pods_meant
from dataplane.verdict import Event

SHORTEST_TIMEOUT, LONGEST_TIMEOUT = 0.001, 10.0  # seconds
TIMEOUT = 0.1
FAREWELL_SECONDS = 0.3  # for a client to be told the summary

Record = dict[str, Any]


def _timeout(query: Query) -> float:
    text = query.get("timeout", str(TIMEOUT))
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not SHORTEST_TIMEOUT <= seconds <= LONGEST_TIMEOUT:
        raise InputError(f"timeout={text}: {SHORTEST_TIMEOUT:g} to {LONGEST_TIMEOUT:g} seconds")
    return seconds


class Intercepting:
    """Packets of chosen pods, and what a hook in another process says of them."""

    def __init__(self, enforcement: Enforcement, names: NamesByAddress) -> None:
        self._enforcement = enforcement
        self._names = names

    async def intercept(self, query: Query, channel: Channel) -> None:
        """Ask about the packets that `filter` selects (`observe.selection`) until the client goes.

        All packets of the pods that it means are queued for that; those that it does not select get
        their verdict at once. `timeout`: seconds within which an answer must come.
        """
        timeout = _timeout(query)
        selection = Selection.parse([query.get("filter", "")])
        packets = await asyncio.to_thread(selection.compile)
        now = self._enforcement
        pods = pods_meant(now.in_force, selection)
        wanted = selection.wanted(self._names, packets)
        session = Session(now.interception, wanted, timeout, self._describe)
        await now.intercept(selection.pods, session)
        try:
            await channel.open()
            session.begin(
                {
                    "began": datetime.now(UTC).isoformat(timespec="microseconds"),
                    "filter": str(selection),
                    "pods": pods,
                    "timeout": timeout,
                    "audit": now.config.audit,
                }
            )
            await session.run(channel)
        finally:
            now.end_interception(session)
        with suppress(TimeoutError):
            async with asyncio.timeout(FAREWELL_SECONDS):
                await session.part(channel)

    def _describe(self, event: Event) -> Record:
        return describe_event(event, self._names(), self._enforcement.config.node_name)


class Session:
    """One client's hook, as `interception.Hook`."""

    def __init__(
        self,
        interception: Interception,
        wanted: Wanted | None,
        timeout: float,
        describe: Callable[[Event], Record],
    ) -> None:
        self.timeout = timeout
        self._interception = interception
        self._wanted = wanted
        self._describe = describe
        self._out: asyncio.Queue[Record] = asyncio.Queue()
        self._over = asyncio.Event()
        self._why: str | None = None
        self._counts: Counter[str] = Counter()
        self._lost_before = interception.lost
        self._begun = False

    # --- what packets come to --------------------------------------------------------------------------

    def wants(self, proposal: Event) -> bool:
        # Packets come as soon as one rule is there: before all are, and before the client listens.
        return self._begun and (self._wanted is None or self._wanted(proposal))

    def ask(self, number: int, proposal: Event) -> None:
        self._counts["asked"] += 1
        data = base64.b64encode(proposal.data).decode()
        self.say({"id": number, "packet": self._describe(proposal), "data": data})

    def told(self, number: int, did: str, event: Event, why: str) -> None:
        self._counts[did] += 1
        self.say({"id": number, "did": did, "why": why, "record": self._describe(event)})

    def passed_over(self, why: str) -> None:
        self._counts[why] += 1

    def ended(self, why: str) -> None:
        self._why = why
        self._over.set()

    # --- the client ------------------------------------------------------------------------------------

    def begin(self, header: Record) -> None:
        """The client listens: packets are asked about from now on."""
        self.say(header)
        self._begun = True

    def say(self, message: Record) -> None:
        """Send something when its turn comes."""
        self._out.put_nowait(message)

    async def run(self, channel: Channel) -> None:
        """Until the client goes or says that it ends, or nothing can be intercepted any more."""
        parts = [
            asyncio.create_task(part)
            for part in (self._send(channel), self._hear(channel), self._over.wait())
        ]
        try:
            done, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for part in parts:
                part.cancel()
            await asyncio.gather(*parts, return_exceptions=True)
        for part in done:
            part.result()

    async def part(self, channel: Channel) -> None:
        """Tell what is left to be told, and the summary."""
        while not self._out.empty():
            await channel.send(self._out.get_nowait())
        if lost := self._interception.lost - self._lost_before:
            self._counts["lost"] = lost
        await channel.send({"summary": dict(self._counts), "why": self._why})

    async def _send(self, channel: Channel) -> None:
        while True:
            await channel.send(await self._out.get())

    async def _hear(self, channel: Channel) -> None:
        async for text in channel.texts():
            if self._heard(text):
                return

    def _heard(self, text: str) -> bool:
        """Take one message; whether it is the client's last."""
        try:
            message = read_json(text)
            if isinstance(message, dict) and message.get("end") is True:
                return True
            number = packet_number(message)
        except ValueError as error:
            self._counts["nonsense"] += 1
            self._interception.alive()
            self.say({"refused": f"{error}"[:200]})
            return False
        try:
            answer = read_answer(message)
        except ValueError as error:
            self._interception.refuse(number, str(error))
        else:
            self._interception.answer(answer)
        return False
