"""The agent's answers and verdicts for `podgate top`, without ever waiting in the event loop's way."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

import aiohttp

from dataplane.cli.client import TIMEOUT_SECONDS
from dataplane.errors import AgentUnreachable, InputError
from dataplane.observe.selection import Selection
from dataplane.observe.top import Top

STATUS_SECONDS = 1.0
FLOWS_SECONDS = 3.0
FLOWS_SHARE = 20  # … and so many times as long as the agent took: it judges every flow for that answer
RETRY_SECONDS = 1.0
LONGEST_LINE = 1 << 20  # bytes

NO_QUERY: Mapping[str, str] = MappingProxyType({})


class Agent:
    """The control socket of a running agent. A context manager."""

    def __init__(self, control: Path) -> None:
        self.control = control
        self._session = aiohttp.ClientSession(
            connector=aiohttp.UnixConnector(path=str(control)),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT_SECONDS),
            read_bufsize=LONGEST_LINE,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def ask(self, what: str, query: Mapping[str, str] = NO_QUERY) -> Any:
        """The answer to GET /`what`. AgentUnreachable, InputError when it refuses."""
        try:
            async with (
                asyncio.timeout(TIMEOUT_SECONDS),
                self._session.get(f"http://agent/{what}", params=query) as response,
            ):
                body = await response.json()
        except (aiohttp.ClientError, OSError, ValueError, TimeoutError) as error:
            raise self._unreachable(error) from None
        if response.status != 200:
            raise InputError(str(body.get("error", f"the agent answered {response.status}")))
        return body

    async def stream(self, what: str, query: Mapping[str, str]) -> AsyncGenerator[dict[str, Any], None]:
        """The items of a stream until the agent ends it. AgentUnreachable, InputError when it refuses."""
        try:
            async with self._session.get(f"http://agent/{what}", params=query) as response:
                if response.status != 200:
                    body = await response.json()
                    raise InputError(str(body.get("error", f"the agent answered {response.status}")))
                async for line in response.content:
                    yield json.loads(line)
        except (aiohttp.ClientError, OSError, ValueError, TimeoutError) as error:
            raise self._unreachable(error) from None

    def _unreachable(self, error: Exception) -> AgentUnreachable:
        return AgentUnreachable(
            f"the agent at {self.control} does not answer: {error or 'no answer in time'}"
        )


class Feed:
    """Fills a `Top` while `run` runs. `trouble` is what keeps it from doing so, None when nothing does."""

    def __init__(
        self, agent: Agent, selection: Selection, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.top = Top(clock())
        self.selection = selection
        self._agent = agent
        self._clock = clock
        self._troubles: dict[str, str] = {}

    @property
    def trouble(self) -> str | None:
        return next(iter(self._troubles.values()), None)

    async def run(self) -> None:
        """Never ends by itself; an agent that is gone is asked again until it answers."""
        async with asyncio.TaskGroup() as group:
            for part in (self._status, self._flows, self._records):
                group.create_task(self._again(part))

    async def _again(self, part: Callable[[], Awaitable[float]]) -> None:
        name = part.__name__
        while True:
            try:
                rest = await part()
                self._troubles.pop(name, None)
            except (AgentUnreachable, InputError) as error:
                self._troubles[name] = str(error)
                rest = RETRY_SECONDS
            await asyncio.sleep(rest)

    async def _status(self) -> float:
        self.top.add_status(await self._agent.ask("status"), self._clock())
        return STATUS_SECONDS

    async def _flows(self) -> float:
        began = self._clock()
        # A pcap-filter expression needs packets, of which a flow in conntrack has none.
        conditions = Selection(self.selection.conditions)
        self.top.add_flows(await self._agent.ask("flows", {"filter": str(conditions)}), self._clock())
        return max(FLOWS_SECONDS, (self._clock() - began) * FLOWS_SHARE)

    async def _records(self) -> float:
        query = {"filter": str(self.selection), "capture": "misses"}
        async with aclosing(self._agent.stream("trace", query)) as records:
            async for record in records:
                self._troubles.pop("_records", None)
                self.top.add_record(record, self._clock())
        raise AgentUnreachable(f"the agent at {self._agent.control} ended")
