"""The node agent: the composition root, and the only module that knows all others."""

from __future__ import annotations

import asyncio
import gc
import signal
import sys
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dataplane.answers import Answers
from dataplane.audit import AuditWatch
from dataplane.cni.pods import ANSWER_SECONDS, CniPods
from dataplane.cni.server import CniServer
from dataplane.config import AgentConfig, Mode, OnStop, Resolve
from dataplane.enforcement import Enforcement
from dataplane.errors import KernelError
from dataplane.flowlog import FlowLog
from dataplane.intercepting import Intercepting
from dataplane.model import Key, NetworkPolicy, PolicyEndpoint
from dataplane.node.steering import installed_marks
from dataplane.observe.control import ControlServer, ask_to_hand_over, someone_listens
from dataplane.observe.health import health_pages
from dataplane.observe.http import HttpServer
from dataplane.observe.log import Logger, get_logger
from dataplane.pod_names import NamesByAddress
from dataplane.programming import Programming
from dataplane.sources.contents import summary
from dataplane.sources.directory import DirectorySource
from dataplane.sources.store import Store
from dataplane.telemetry import Telemetry, Watched
from dataplane.tracing import Tracing

if TYPE_CHECKING:
    from dataplane.sources.kubernetes import KubernetesSource

# In files both may be there; in a cluster only what counts is asked for.
_IGNORED: dict[Resolve, tuple[type, ...]] = {
    Resolve.AUTO: (),
    Resolve.ALWAYS: (PolicyEndpoint,),
    Resolve.NEVER: (NetworkPolicy,),
}

# After handing over: how often the next agent is looked for, and how long it may be away.
LOOK_SECONDS = 0.2
ALONE_SECONDS = 3.0


class Files:
    """Objects from files: everything is there before the agent begins."""

    ready = True
    problems: Sequence[str] = ()
    watches: Sequence[Watched] = ()
    unmatched: Sequence[Key] = ()

    def __init__(self, config: AgentConfig, store: Store, log: Logger) -> None:
        self._source = DirectorySource(config.sources, store)
        self._log = log

    def load(self) -> None:
        """Read everything. InputError when a path cannot be read."""
        self._source.load()
        if skipped := summary(self._source.skipped):
            self._log.info("skipped", what=skipped)

    async def run(self) -> None:
        await self._source.run()

    async def wait_synced(self) -> None:
        """Everything is there once it is loaded."""


class Agent:
    """Runs until told to stop. One per network namespace and range of queue numbers."""

    def __init__(self, config: AgentConfig) -> None:
        self.config = config
        self.log: Logger = get_logger()
        store = Store(quiet=config.quiet, limit=config.quiet_limit, without=_IGNORED[config.resolve])
        self.programming = Programming(store)
        self.enforcement = Enforcement(config, self.programming)
        self.enforcement.when_in_force = self.programming.in_force
        self.enforcement.when_flows_judged = self._flows_judged
        self.source = Files(config, store, self.log) if config.sources else self._cluster(store)
        pods = CniPods(self.enforcement)
        self.cni = CniServer(config.cni_socket, pods) if config.cni_socket is not None else None
        names = NamesByAddress(self.enforcement)
        answers = Answers(
            self.enforcement,
            self.source,
            self.programming,
            [pods, *([self.cni] if self.cni is not None else [])],
            names,
        )
        streams = Tracing(self.enforcement, names).streams()
        self.audit = AuditWatch(self.enforcement, names)
        by_name = {**answers.by_name(), "audit": self.audit.report}
        dialogues = {"intercept": Intercepting(self.enforcement, names).intercept}
        self.control = ControlServer(config.control, by_name, streams, self._hand_over, dialogues)
        self.telemetry = telemetry = Telemetry(self.enforcement, self.source, self.programming)
        self.flow_log: FlowLog | None = None
        if config.flow_log is not None:
            self.flow_log = FlowLog(self.enforcement, names, config.flow_log, config.flow_log_rate)
            telemetry.flow_log = self.flow_log
        self.http = HttpServer()
        self.http.add("--metrics-bind-addr", config.metrics, {"/metrics": telemetry.page})
        pages = health_pages(telemetry.dead, telemetry.unready)
        self.http.add("--health-probe-bind-addr", config.health, pages)
        self._stop = asyncio.Event()
        self._stop_signal: int | None = None
        self._relieved = False  # another agent has taken over, or is about to
        self._left = asyncio.Event()  # nothing of this node is ours any more

    def _cluster(self, store: Store) -> KubernetesSource:
        # The client takes half a second and 45 MB to import.
        from dataplane.sources.kubernetes import KubernetesSource
        from dataplane.sources.kubernetes_client import Credentials

        config = self.config
        assert config.node_name is not None
        return KubernetesSource(
            Credentials(config.kubeconfig),
            store,
            node_name=config.node_name,
            node_ips=config.node_ips,
            resolve=config.resolve,
            pod_names=config.pod_names,
            log=self.log,
            on_trigger=self.programming.trigger,
            on_node_ips=self._take_node_ips,
        )

    def _flows_judged(self, seconds: float) -> None:
        self.telemetry.flows_judged(seconds)
        self.audit.look()

    def _take_node_ips(self, addresses: frozenset[bytes]) -> None:
        """The addresses of our own Node, besides those that we were told."""
        known = tuple(dict.fromkeys((*self.config.node_ips, *sorted(addresses))))
        self.enforcement.config = replace(self.config, node_ips=known)

    async def run(self) -> None:
        """Start, enforce, and stop on SIGTERM, SIGINT or SIGHUP.

        The control socket comes first, since a second agent stops there; unless that is to take over:
        then the first agent judges packets until everything is ready but the queues. The CNI's calls
        are answered before anything is known: until they are, no pod is made.
        """
        taking_over = False
        if self.config.take_over and await asyncio.to_thread(someone_listens, self.config.control):
            self.log.info("another agent is running here; taking over once everything is known")
            self.enforcement.before_queues, self.enforcement.after_queues = self._take_over, self._serve
            taking_over = True
        else:
            await self.control.start()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number is not signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                loop.add_signal_handler(number, self._stopped_by, number)
        try:
            if self.cni is not None and not taking_over:
                await self.cni.start()
            if self.enforcement.before_queues is None:  # else the first agent still answers there
                await self.http.start()
            if isinstance(self.source, Files):
                self.source.load()
            if self.flow_log is not None:
                self.flow_log.open()
            parts = [self.source.run(), self._enforce(), self.audit.run()]
            if self.flow_log is not None:
                parts.append(self.flow_log.run())
            await self._until_stopped(*parts)
        finally:
            if self.cni is not None:
                await self.cni.stop()
            await self.http.stop()
            await self._leave()
            self._left.set()
            await self.control.stop()
        if self._relieved and self._stop_signal is None:
            await self._stand_by()

    async def _take_over(self) -> None:
        handed_over = await ask_to_hand_over(self.config.control)
        await self.control.start()
        self.log.info("took over" if handed_over else "the other agent has gone")

    async def _serve(self) -> None:
        """What waits until packets are judged again: to load gRPC alone takes a quarter of a second."""
        await self.http.start()
        if self.cni is not None:
            await self.cni.start()

    async def _hand_over(self, _query: Mapping[str, str]) -> dict[str, int]:
        """Leave everything in the kernel as it is, and answer once the queues are free."""
        self._relieved = True
        self.control.withdraw()
        if self.cni is not None:
            await self.cni.stop(grace=ANSWER_SECONDS)
        self._stop.set()
        await self._left.wait()
        return {"generation": self.enforcement.generation}

    async def _stand_by(self) -> None:
        """Wait to be stopped: who ends instead is started again by its supervisor, and takes over.

        That is what should happen when the agent that took over has gone: KernelError.
        """
        self.log.info("handed over; waiting to be stopped")
        self._stop.clear()
        alone = 0.0
        while alone < ALONE_SECONDS:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), LOOK_SECONDS)
                return
            there = await asyncio.to_thread(someone_listens, self.config.control)
            alone = 0.0 if there else alone + LOOK_SECONDS
        raise KernelError("the agent that took over has gone; start this one again")

    async def _enforce(self) -> None:
        """No rule comes into force before everything is known that rules are made of.

        Strict mode is the exception where no agent has been before: its pods must be closed from the
        first packet. Where one has been, its rules are still in the kernel and keep them closed.
        """
        open_now = self.config.mode is Mode.STRICT and await asyncio.to_thread(installed_marks) is None
        if isinstance(self.source, Files) or not open_now:
            await self.source.wait_synced()
            # What is loaded stays: the collector need not look through it at every later change.
            gc.collect()
            gc.freeze()
        await self.enforcement.run()

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
        if self._relieved:  # they are the next agent's now
            clean = enforced = False
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
