"""The writes of one policy, carried out one after another; what the API server has, the inventory learns."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence

from aiolimiter import AsyncLimiter

from dataplane.controller import objects
from dataplane.controller.inventory import Inventory
from dataplane.controller.metrics import Metrics
from dataplane.controller.objects import Raw
from dataplane.controller.slices import Found, Slice, Write
from dataplane.model import Key
from dataplane.sources.kubernetes import POLICY_ENDPOINTS
from dataplane.sources.kubernetes_client import ApiFault, ApiServer

_BASE = f"/apis/{POLICY_ENDPOINTS.group}/{POLICY_ENDPOINTS.version}/namespaces"
_JSON_PATCH = "application/json-patch+json"
_NOT_FOUND = 404
_CONFLICT = 409
_REFUSED = (400, 413, 422)  # what it will say of the same object next time, too


class Moved(Exception):
    """An object is no longer as it was found: plan again."""


class Refused(Exception):
    """The API server will never take this object."""


class Stopped(Exception):
    """We may not write any more."""


class Writer:
    """`seconds`: the longest request. `may_write` is asked before each."""

    def __init__(
        self,
        api: ApiServer,
        inventory: Inventory,
        limiter: AsyncLimiter,
        metrics: Metrics,
        may_write: Callable[[], bool],
        seconds: float,
    ) -> None:
        self._api = api
        self._inventory = inventory
        self._limiter = limiter
        self._metrics = metrics
        self._may_write = may_write
        self._seconds = seconds

    async def carry_out(self, policy: Key, writes: Iterable[Write], trigger: str) -> int:
        """All of them, in order; how many. Moved, Refused, Stopped and ApiFault say why not all."""
        made: dict[int, Found] = {}
        count = 0
        for write in writes:
            async with self._limiter:
                pass
            if not self._may_write():
                raise Stopped
            try:
                await self._one(policy.namespace, write, made, trigger)
            except ApiFault as fault:
                self._metrics.wrote(write.action, _result(fault))
                raise
            except TimeoutError:
                self._metrics.wrote(write.action, "error")
                raise ApiFault("API server: no answer in time") from None
            self._metrics.wrote(write.action, "ok")
            count += 1
        return count

    async def _one(self, namespace: str, write: Write, made: dict[int, Found], trigger: str) -> None:
        before = made.get(write.place, write.found)
        try:
            async with asyncio.timeout(self._seconds):
                if before is None:
                    assert write.slice is not None
                    answer = await self._send("POST", namespace, "", objects.body(write.slice, trigger))
                elif write.slice is None:
                    await self._delete(namespace, before)
                    return
                else:
                    patch = objects.patch(before, write.slice, trigger)
                    answer = await self._send("PATCH", namespace, before.name, patch, _JSON_PATCH)
        except ApiFault as fault:
            if before is not None and fault.status in (_NOT_FOUND, _CONFLICT):
                self._metrics.wrote(write.action, _result(fault))
                await self._look_again(namespace, before)
                raise Moved(str(fault)) from None
            if fault.status in _REFUSED:
                self._metrics.wrote(write.action, _result(fault))
                raise Refused(str(fault)) from None
            raise
        found = _found(answer, write.slice)
        made[write.place] = found
        self._inventory.wrote(namespace, found)

    async def _delete(self, namespace: str, before: Found) -> None:
        conditions = {"uid": before.uid, "resourceVersion": before.version}
        try:
            await self._send("DELETE", namespace, before.name, {"preconditions": conditions})
        except ApiFault as fault:
            if fault.status != _NOT_FOUND:
                raise
        self._inventory.removed(namespace, before.name)

    async def _look_again(self, namespace: str, before: Found) -> None:
        try:
            raw = await self._api.get(f"{_BASE}/{namespace}/{POLICY_ENDPOINTS.plural}/{before.name}", {})
        except ApiFault as fault:
            if fault.status == _NOT_FOUND:
                self._inventory.removed(namespace, before.name)
            return
        self._inventory.changed(raw)

    async def _send(
        self,
        method: str,
        namespace: str,
        name: str,
        content: Raw | Sequence[Raw],
        kind: str = "application/json",
    ) -> Raw:
        path = f"{_BASE}/{namespace}/{POLICY_ENDPOINTS.plural}" + (f"/{name}" if name else "")
        return await self._api.send(method, path, content, self._seconds, kind)


def _found(answer: Raw, part: Slice) -> Found:
    metadata = answer.get("metadata")
    if not isinstance(metadata, dict) or not {"name", "uid", "resourceVersion"} <= metadata.keys():
        raise ApiFault("API server: answers a write with something else than the object")
    return Found(str(metadata["name"]), str(metadata["uid"]), str(metadata["resourceVersion"]), part)


def _result(fault: ApiFault) -> str:
    return str(fault.status) if fault.status else "error"
