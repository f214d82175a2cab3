"""Brings the PolicyEndpoints of each policy to what they are to say, for as long as we may write."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import Any

from dataplane.controller import objects
from dataplane.controller.inventory import Inventory
from dataplane.controller.metrics import Metrics
from dataplane.controller.slices import Desired, limited, plan
from dataplane.controller.worklist import Worklist
from dataplane.controller.writer import Moved, Refused, Stopped, Writer
from dataplane.model import Key
from dataplane.sources.kubernetes_client import ApiFault

WORKERS = 8  # policies at a time
LASTING = 3  # failures in a row after which a policy's failure is no passing one
SHOWN = 5  # policies that are named; the log has them all


class Reconciler:
    """`run` it whenever we may write, and `stop` it when we no longer may."""

    def __init__(
        self,
        inventory: Inventory,
        desired: Callable[[Key], Desired | None],
        exists: Callable[[Key], bool],
        writer: Writer,
        metrics: Metrics,
        log: Any,
    ) -> None:
        """`desired`: of a policy, None where that is not known. `exists`: whether the cluster has it."""
        self._inventory = inventory
        self._desired = desired
        self._exists = exists
        self._writer = writer
        self._metrics = metrics
        self._log = log
        self._worklist: Worklist | None = None
        self._failures: dict[Key, str] = {}  # why a policy could not be written when it was tried last
        self._limits: dict[Key, str] = {}  # why the API server does not take all rules of a policy

    @property
    def waiting(self) -> int:
        """Policies that wait to be written."""
        return 0 if self._worklist is None else len(self._worklist)

    @property
    def failing(self) -> int:
        return len(self._failures)

    @property
    def limited(self) -> int:
        return len(self._limits)

    @property
    def problems(self) -> list[str]:
        """What stays wrong, one line each."""
        counts = {} if self._worklist is None else self._worklist.failing
        found = [
            f"NetworkPolicy {policy} cannot be written: {why}"
            for policy, why in sorted(self._failures.items())
            if counts.get(policy, 0) >= LASTING
        ]
        found += [
            f"NetworkPolicy {policy} is in force without its new rules: {why}"
            for policy, why in sorted(self._limits.items())
        ]
        return found if len(found) <= SHOWN else [*found[:SHOWN], f"and {len(found) - SHOWN} more policies"]

    def look_at(self, policies: Iterable[Key], since: float | None = None) -> None:
        """Something about these policies has changed, at `since` (seconds since the epoch; None: now).

        Forgotten while `run` does not run: it begins with all policies.
        """
        if self._worklist is not None:
            since = time.time() if since is None else since
            for policy in policies:
                self._worklist.add(policy, since)

    async def run(self, policies: Iterable[Key]) -> None:
        """Look at these policies, and at all that change, until `stop`: the write under way is finished.

        Not to be cancelled, or a request may be carried out of which nobody knows.
        """
        worklist = self._worklist = Worklist()
        self.look_at(policies)
        workers = [asyncio.create_task(self._work(worklist)) for _ in range(WORKERS)]
        try:
            await asyncio.gather(*workers)
        finally:
            self.stop()
            await asyncio.gather(*workers, return_exceptions=True)
            self._failures.clear()
            self._limits.clear()

    def stop(self) -> None:
        """Let `run` end."""
        if self._worklist is not None:
            self._worklist.close()
            self._worklist = None

    async def _work(self, worklist: Worklist) -> None:
        while (taken := await worklist.take()) is not None:
            policy, since = taken
            try:
                await self._bring_in_order(policy, since)
            except Stopped:
                worklist.close()  # this policy is in nobody's hands now: begin again with all of them
                return
            except Moved:
                worklist.retry(policy, since)
            except Refused as refused:
                self._limit(policy, str(refused))
                worklist.retry(policy, since)
            except ApiFault as fault:
                wait = worklist.retry(policy, since, fault.retry_after or 0.0)
                self._fail(policy, fault, wait)
            else:
                self._failures.pop(policy, None)
                if self._limits.pop(policy, None) is not None:
                    self._log.info("policy written with all its rules", policy=str(policy))
                worklist.done(policy)

    async def _bring_in_order(self, policy: Key, since: float) -> None:
        desired = self._desired(policy)
        if desired is None and self._exists(policy):
            return  # it cannot be read: what it was stays in force
        found = self._inventory.of(policy)
        trigger = objects.trigger_time(since)
        try:
            count = await self._writer.carry_out(policy, plan(found, desired), trigger)
        except Refused:
            if desired is not None:
                # Its pods must be isolated whatever becomes of its rules.
                now = self._inventory.of(policy)
                try:
                    await self._writer.carry_out(policy, plan(now, limited(desired, now)), trigger)
                except Refused as nothing:
                    raise ApiFault(str(nothing)) from None
            raise
        if count:
            self._metrics.settled(time.time() - since)
            if not found or desired is None:
                what = "policy written" if desired is not None else "policy gone, its PolicyEndpoints removed"
                self._log.info(what, policy=str(policy), requests=count)

    def _fail(self, policy: Key, fault: ApiFault, wait: float) -> None:
        if fault.status == 403 and "being terminated" in str(fault):
            return  # the policy goes with its namespace
        why = _explain(fault)
        if self._failures.get(policy) != why:
            self._failures[policy] = why
            self._log.error(
                "a policy cannot be written", policy=str(policy), problem=why, retry_s=round(wait, 1)
            )

    def _limit(self, policy: Key, why: str) -> None:
        self._failures.pop(policy, None)
        if self._limits.get(policy) != why:
            self._limits[policy] = why
            self._log.error(
                "the API server does not take the rules of a policy",
                policy=str(policy),
                problem=why,
                consequence="its pods are isolated, without the rules that are new",
            )


def _explain(fault: ApiFault) -> str:
    if fault.status == 403:
        return f"not allowed to write PolicyEndpoints: apply deploy/controller/rbac.yaml ({fault})"
    return str(fault)
