"""Which of several controllers writes: the one that holds a Lease (coordination.k8s.io/v1).

`kubernetes.aio.leaderelection` would let two of them write: it ends at the first request that finds no
server, without ending the work; no request of its has a time limit, so that the renewal deadline passes
unnoticed while one hangs; and it measures time by a clock that people set.

A leader stops before another can begin: it may write for `renew_within` seconds from the moment at which
its last renewal was sent, and no request of its lasts longer than `answer`; others wait for the whole
`duration` from the moment at which they saw that renewal. What a request does that the server carries out
later still, updates' and deletions' resourceVersions guard against. Time runs while a machine sleeps.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from dataplane.controller.objects import Raw
from dataplane.sources.kubernetes_client import ApiFault, ApiServer

_CONFLICT = 409
_NOT_FOUND = 404


@dataclass(frozen=True, slots=True)
class Terms:
    """Seconds. `renew_within` + `answer` must be less than `duration`."""

    duration: int = 15
    renew_within: float = 9.0
    answer: float = 5.0
    retry: float = 2.0


def now() -> float:
    """Seconds of a clock that nobody sets and that runs on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Election:
    """Run it until cancelled; `leading` says at each moment whether we may write."""

    def __init__(
        self,
        api: ApiServer,
        namespace: str,
        name: str,
        identity: str,
        *,
        log: Any,
        on_change: Callable[[], None] = lambda: None,
        terms: Terms | None = None,
    ) -> None:
        """`identity` must be no other's, not even an earlier one's.

        `on_change` is called when `leading` or `problem` has changed.
        """
        self.identity = identity
        self.holder: str | None = None  # None: not known yet, or nobody
        self.problem: str | None = None
        self._path = f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"
        self._namespace = namespace
        self._name = name
        self._api = api
        self._log = log
        self._on_change = on_change
        self._terms = terms or Terms()
        self._until = 0.0  # we may write
        self._ever_held = False
        self._seen = ""  # another's lease, as last seen …
        self._seen_at = 0.0  # … for the first time
        self._was_leading = False
        self._told_holder = ""

    @property
    def leading(self) -> bool:
        return now() < self._until

    async def run(self) -> None:
        """Get the lease, keep it, get it again when it is lost."""
        while True:
            try:
                async with asyncio.timeout(self._terms.answer):
                    await self._attempt()
                self._note(None)
            except TimeoutError:
                self._note(f"the Lease {self._namespace}/{self._name}: no answer in time")
            except ApiFault as fault:
                if fault.status != _CONFLICT:  # somebody was quicker
                    self._note(self._explain(fault))
            self._tell()
            wait = self._terms.retry * random.uniform(0.8, 1.2)
            if self._was_leading:
                # The end of what we may do must show in time, whether or not a request succeeds.
                wait = min(wait, max(0.0, self._until - now()) + 0.01)
            await asyncio.sleep(wait)
            self._tell()

    async def release(self) -> None:
        """Let another begin at once. Only after the last write has ended, and `run` as well."""
        if not self._ever_held:
            return
        self._until, self._was_leading = 0.0, False
        try:
            async with asyncio.timeout(self._terms.answer):
                # As it is now: the last renewal may have been carried out without an answer to us.
                lease = await self._get()
                if lease is None or lease["spec"].get("holderIdentity") != self.identity:
                    return
                spec = {**lease["spec"], "holderIdentity": "", "leaseDurationSeconds": 1}
                await self._put({**lease, "spec": spec | {"renewTime": _micro_time()}})
                self._log.info("the lease is free for another controller")
        except (ApiFault, TimeoutError) as error:
            self._log.warning("the lease could not be released; it ends by itself", why=str(error))

    async def _attempt(self) -> None:
        started = now()
        lease = await self._get()
        spec = (lease or {}).get("spec") or {}
        holder = str(spec.get("holderIdentity") or "")
        self.holder = holder or None
        if lease is None:
            await self._take(started, self._new(), method="POST")
        elif holder == self.identity:
            await self._take(started, {**lease, "spec": {**spec, "renewTime": _micro_time()}})
        else:
            self._until = 0.0
            if holder and holder != self._told_holder:
                self._log.info("another controller writes; ready to take its place", holder=holder)
            self._told_holder = holder
            if not holder or self._expired(lease, spec):
                transitions = spec.get("leaseTransitions")
                taken = self._new()
                taken["metadata"] = lease["metadata"]
                taken["spec"]["leaseTransitions"] = (transitions if isinstance(transitions, int) else 0) + 1
                await self._take(now(), taken)

    def _expired(self, lease: Raw, spec: Raw) -> bool:
        """Whether a lease has stood unrenewed, before our eyes, for as long as its holder asked for."""
        version = f"{lease['metadata'].get('uid')}/{spec.get('holderIdentity')}/{spec.get('renewTime')}"
        if version != self._seen:
            self._seen, self._seen_at = version, now()
        duration = spec.get("leaseDurationSeconds")
        if not isinstance(duration, int) or not 0 < duration <= 3600:
            duration = self._terms.duration
        return now() >= self._seen_at + duration

    def _new(self) -> Raw:
        moment = _micro_time()
        return {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": self._name, "namespace": self._namespace},
            "spec": {
                "holderIdentity": self.identity,
                "leaseDurationSeconds": self._terms.duration,
                "acquireTime": moment,
                "renewTime": moment,
                "leaseTransitions": 0,
            },
        }

    async def _take(self, started: float, lease: Raw, method: str = "PUT") -> None:
        """Write the lease as ours; it counts from before the request."""
        await (self._put(lease) if method == "PUT" else self._post(lease))
        self._ever_held = True
        self.holder = self.identity
        self._until = started + self._terms.renew_within

    async def _get(self) -> Raw | None:
        try:
            return await self._api.get(f"{self._path}/{self._name}", {})
        except ApiFault as fault:
            if fault.status == _NOT_FOUND:
                return None
            raise

    async def _put(self, lease: Raw) -> Raw:
        return await self._api.send("PUT", f"{self._path}/{self._name}", lease, self._terms.answer)

    async def _post(self, lease: Raw) -> Raw:
        return await self._api.send("POST", self._path, lease, self._terms.answer)

    def _note(self, problem: str | None) -> None:
        if problem != self.problem:
            self.problem = problem
            if problem:
                self._log.warning(problem)
            self._on_change()

    def _tell(self) -> None:
        if self.leading == self._was_leading:
            return
        self._was_leading = self.leading
        if self._was_leading:
            self._log.info("leading: this controller writes", identity=self.identity)
        else:
            self._log.warning("no longer leading: nothing is written")
        self._on_change()

    def _explain(self, fault: ApiFault) -> str:
        if fault.status == 403:
            return (
                "not allowed to keep our Lease: give our Role in namespace "
                f'{self._namespace} the rule apiGroups: ["coordination.k8s.io"], resources: ["leases"], '
                f'verbs: ["get", "create", "update"] ({fault})'
            )
        return str(fault)


def _micro_time() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
