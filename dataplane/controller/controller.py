"""`podgate controller`: NetworkPolicies of a cluster in, PolicyEndpoints out. The composition of its parts.

All replicas follow the cluster, so that the next one can go on at once; the one that holds the lease
writes. A term of writing begins with a list of the PolicyEndpoints that is newer than the last leader's
last write, and with a look at every policy.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import uuid
from collections.abc import Collection, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from aiolimiter import AsyncLimiter

from dataplane.config import BindAddress
from dataplane.controller import prerequisites
from dataplane.controller.election import Election, Terms
from dataplane.controller.following import Following
from dataplane.controller.inventory import Inventory
from dataplane.controller.metrics import CONTENT_TYPE, Metrics
from dataplane.controller.reconciler import Reconciler
from dataplane.controller.resolution import Resolution
from dataplane.controller.writer import Writer
from dataplane.model import Key
from dataplane.observe.health import health_pages
from dataplane.observe.http import HttpServer
from dataplane.observe.log import Logger, get_logger
from dataplane.sources.kubernetes import POLICY_ENDPOINTS
from dataplane.sources.kubernetes_client import ApiFault, ApiServer, Credentials
from dataplane.sources.kubernetes_watch import Timing, Watch
from dataplane.sources.store import Store

OTHERS_SECONDS = 30.0  # between looks at the ConfigMap that switches EKS's controller
RETRY_SECONDS = 2.0  # while the API server does not answer at the start


@dataclass(frozen=True, slots=True)
class ControllerConfig:
    """Everything `podgate controller` can be told."""

    kubeconfig: str | None = None  # None: the pod's own credentials, else ~/.kube/config
    install_crd: bool = True  # where PolicyEndpoints are not served
    lease_namespace: str = "kube-system"
    lease_name: str = "podgate-controller"
    quiet: float = 0.1  # seconds without a change of objects before changes are resolved …
    quiet_limit: float = 0.5  # … and how long changes may be put off in all
    writes_per_second: int = 100
    metrics: BindAddress | None = None  # None: not served
    health: BindAddress | None = None
    terms: Terms = field(default_factory=Terms)
    timing: Timing = field(default_factory=Timing)


class Controller:
    """Runs until SIGTERM or SIGINT. Refusal where it must not work."""

    def __init__(self, config: ControllerConfig) -> None:
        self.config = config
        self.log: Logger = get_logger()
        credentials = Credentials(config.kubeconfig)
        self._credentials = credentials
        self._api = ApiServer(credentials)
        self._store = Store(quiet=config.quiet, limit=config.quiet_limit)
        self._following = Following(self._api, self._store, self._wake_up, config.timing)
        self._inventory = Inventory(lambda policy: self._reconciler.look_at([policy]), self._wake_up)
        self._endpoints = self._watch_endpoints()
        self._list_again = asyncio.Event()
        self._resolution = Resolution(self._store, self._look_at, self.log)
        self._metrics = Metrics()
        limiter = AsyncLimiter(config.writes_per_second, 1.0)
        writer = Writer(
            self._api, self._inventory, limiter, self._metrics, lambda: self.may_write, config.terms.answer
        )
        self._reconciler = Reconciler(
            self._inventory,
            self._resolution.desired,
            self._following.exists,
            writer,
            self._metrics,
            self.log,
        )
        self._election = Election(
            self._api,
            config.lease_namespace,
            config.lease_name,
            f"{os.uname().nodename}_{uuid.uuid4()}",
            log=self.log,
            on_change=self._wake_up,
            terms=config.terms,
        )
        self._metrics.read_with(
            leading=lambda: self._election.leading,
            queue=lambda: self._reconciler.waiting,
            failing=lambda: self._reconciler.failing,
            limited=lambda: self._reconciler.limited,
            unusable=lambda: self._resolution.problems,
            objects=lambda: len(self._inventory),
            watches=lambda: (*self._following.watches, self._endpoints),
        )
        self._http = HttpServer()
        self._http.add("--metrics-bind-addr", config.metrics, {"/metrics": self._metrics_page})
        pages = health_pages(lambda: (), self.unready)
        self._http.add("--health-probe-bind-addr", config.health, pages)
        self._starting: str | None = "starting: the cluster is not known yet"
        self._switched_on = False  # EKS's controller
        self._said: list[str] = []
        self._stopping = False
        self._stop = asyncio.Event()
        self._woken = asyncio.Event()  # for who keeps the log
        self._woken_leader = asyncio.Event()

    # --- how it is --------------------------------------------------------------------------------------

    @property
    def may_write(self) -> bool:
        """Whether the next request may change anything."""
        return not self._stopping and self._obstacle is None and self._election.leading

    @property
    def _obstacle(self) -> str | None:
        """Somebody else writes PolicyEndpoints."""
        if self._switched_on:
            return str(prerequisites.refuse_switched_on())
        foreign = self._inventory.foreign
        return None if foreign is None else str(prerequisites.refuse_foreign(foreign))

    def unready(self) -> Sequence[str]:
        """What is in the way of knowing the cluster, or of writing, one line each. Following is ready."""
        starting = [self._starting] if self._starting is not None else []
        return [*starting, *self._faults(), *self._reconciler.problems]

    def _faults(self) -> list[str]:
        found = [f"{self._obstacle}; nothing is written"] if self._obstacle is not None else []
        watches = (*self._following.watches, self._endpoints)
        found += [watch.problem for watch in watches if watch.problem is not None]
        if self._election.problem is not None:
            found.append(self._election.problem)
        return list(dict.fromkeys(found))

    async def _metrics_page(self) -> web.Response:
        return web.Response(body=self._metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    # --- running ----------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until told to stop. The write under way is finished, and the lease given back."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopped)
        try:
            await self._http.start()
            await _together(self._work(), self._stop.wait())
        finally:
            self._stopping = True
            await self._election.release()
            await self._http.stop()
            await self._api.close()
        self.log.info("stopped")

    def _stopped(self) -> None:
        self.log.info("stopping")
        self._stopping = True
        self._stop.set()

    async def _work(self) -> None:
        self.log.info("following the cluster", credentials=self._credentials.origin)
        await self._prepare()
        await _together(
            self._following.run(),
            self._follow_endpoints(),
            self._keep_log(),
            self._look_for_others(),
            self._go_on(),
        )

    async def _prepare(self) -> None:
        """Refusal where others write, or where PolicyEndpoints cannot be had. What passes is waited for."""
        while True:
            try:
                if await prerequisites.switched_on(self._api):
                    raise prerequisites.refuse_switched_on()
                if not await prerequisites.kind_served(self._api):
                    if not self.config.install_crd:
                        raise prerequisites.refuse_missing()
                    await prerequisites.install_definition(self._api, self.log)
                return
            except ApiFault as fault:
                if str(fault) != self._starting:
                    self._starting = str(fault)
                    self.log.error("waiting for the API server", problem=self._starting)
            await asyncio.sleep(RETRY_SECONDS)

    async def _go_on(self) -> None:
        """What follows once everything has been listed."""
        await self._until(lambda: self._endpoints.synced)
        if self._inventory.foreign is not None:
            raise prerequisites.refuse_foreign(self._inventory.foreign)
        await self._until(lambda: self._following.synced)
        self._following.publish()
        await self._resolution.update()
        # What is loaded stays: the collector need not look through it at every later change.
        gc.collect()
        gc.freeze()
        self._starting = None
        self.log.info(
            "knowing the cluster",
            policies=len(self._resolution.policies),
            policy_endpoints=len(self._inventory),
        )
        await _together(self._resolution.run(), self._election.run(), self._lead())

    async def _lead(self) -> None:
        while True:
            await self._until(lambda: self.may_write)
            self._list_again.set()
            await self._look_at_switch()
            await self._until(
                lambda: not self.may_write or (not self._list_again.is_set() and self._endpoints.synced)
            )
            if self.may_write:
                await self._write()

    async def _write(self) -> None:
        """A term of writing."""
        policies = {*self._resolution.policies, *self._inventory.policies}
        term = asyncio.create_task(self._reconciler.run(sorted(policies)))
        watch = asyncio.create_task(self._until(lambda: not self.may_write))
        try:
            await asyncio.wait([term, watch], return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            self._stopping = True
            raise
        finally:
            self._reconciler.stop()
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
            await term

    async def _until(self, condition: Any) -> None:
        while not condition():
            self._woken_leader.clear()
            await self._woken_leader.wait()

    def _wake_up(self) -> None:
        self._woken.set()
        self._woken_leader.set()

    def _look_at(self, policies: Collection[Key], since: float) -> None:
        self._reconciler.look_at(policies, since)

    # --- PolicyEndpoints ----------------------------------------------------------------------------------

    def _watch_endpoints(self) -> Watch:
        return Watch(
            self._api, POLICY_ENDPOINTS, self._inventory, timing=self.config.timing, on_change=self._wake_up
        )

    async def _follow_endpoints(self) -> None:
        while True:
            await _together(self._endpoints.run(), self._list_again.wait())
            self._endpoints = self._watch_endpoints()
            self._list_again.clear()

    # --- who else writes ----------------------------------------------------------------------------------

    async def _look_for_others(self) -> None:
        while True:
            await asyncio.sleep(OTHERS_SECONDS)
            await self._look_at_switch()

    async def _look_at_switch(self) -> None:
        try:
            on = await prerequisites.switched_on(self._api)
        except ApiFault:
            return  # what was known last counts; the watches say why there is no answer
        if on != self._switched_on:
            self._switched_on = on
            self._wake_up()

    async def _keep_log(self) -> None:
        """Log what comes into the way, and when it is gone."""
        while True:
            waiting = [f"waiting for the first list of {watch.resource}" for watch in self._following.watches]
            waiting.append(f"waiting for the first list of {POLICY_ENDPOINTS}")
            now = [fault for fault in self._faults() if fault not in waiting]
            for fault in now:
                if fault not in self._said and fault != self._election.problem:  # which has said so itself
                    self.log.error("not in step with the cluster", problem=fault)
            if self._said and not now:
                self.log.info("in step with the cluster again")
            self._said = now
            self._woken.clear()
            await self._woken.wait()


async def _together(*parts: Coroutine[Any, Any, Any]) -> None:
    """Run parts until one of them ends or fails; then none runs any more."""
    tasks = [asyncio.create_task(part) for part in parts]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
