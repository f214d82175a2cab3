"""The node agent: the composition root, and the only module that knows all others."""

from __future__ import annotations

import asyncio
import gc
import signal
import sys
from collections.abc import Coroutine
from typing import Any

from dataplane.answers import Answers
from dataplane.config import AgentConfig, OnStop
from dataplane.enforcement import Enforcement
from dataplane.observe.control import ControlServer
from dataplane.observe.log import Logger, get_logger
from dataplane.sources.contents import summary
from dataplane.sources.directory import DirectorySource
from dataplane.sources.store import Store


class Agent:
    """Runs until told to stop. One per network namespace and range of queue numbers."""

    def __init__(self, config: AgentConfig) -> None:
        self.config = config
        self.log: Logger = get_logger()
        store = Store()
        self.source = DirectorySource(config.sources, store)
        self.enforcement = Enforcement(config, store)
        answers = Answers(self.enforcement)
        self.control = ControlServer(config.control, answers.by_name(), answers.streams())
        self._stop = asyncio.Event()
        self._stop_signal: int | None = None

    async def run(self) -> None:
        """Start, enforce, and stop on SIGTERM, SIGINT or SIGHUP.

        The control socket comes first, since a second agent stops there, and no rule is in force
        before every source has been read once.
        """
        await self.control.start()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number is not signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                loop.add_signal_handler(number, self._stopped_by, number)
        try:
            self.source.load()
            if skipped := summary(self.source.skipped):
                self.log.info("skipped", what=skipped)
            # What is loaded stays: the collector need not look through it at every later change.
            gc.collect()
            gc.freeze()
            await self._until_stopped(self.source.run(), self.enforcement.run())
        finally:
            await self._leave()
            await self.control.stop()

    async def _until_stopped(self, *parts: Coroutine[Any, Any, None]) -> None:
        tasks: list[asyncio.Task[Any]] = [asyncio.create_task(part) for part in parts]
        stop = asyncio.create_task(self._stop.wait())
        try:
            done, _ = await asyncio.wait([stop, *tasks], return_when=asyncio.FIRST_COMPLETED)
            for task in done - {stop}:
                task.result()  # a part never ends by itself: let its error out
        finally:
            for task in (stop, *tasks):
                task.cancel()
            await asyncio.gather(stop, *tasks, return_exceptions=True)

    def _stopped_by(self, number: int) -> None:
        self._stop_signal = number
        self._stop.set()

    async def _leave(self) -> None:
        on_stop, enforced = self.config.on_stop, self.enforcement.in_force is not None
        at_terminal = self._stop_signal == signal.SIGINT and sys.stdin is not None and sys.stdin.isatty()
        clean = on_stop is OnStop.CLEAN or (on_stop is OnStop.AUTO and at_terminal)
        removed = await self.enforcement.stop(clean=clean)
        if clean and self.enforcement.started:
            self.log.info("cleaned up", removed=len(removed))
        elif enforced:
            closed = self.config.fail == "closed"
            self.log.info(
                "rules stay in the kernel for the next agent",
                until_then="new flows wait" if closed else "new flows pass unjudged",
                remove_with="podgate cleanup",
            )
