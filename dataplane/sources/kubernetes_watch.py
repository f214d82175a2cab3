"""One kind of object, followed for as long as it takes: a full list, then a watch from there on.

The list is streamed where the server can (`sendInitialEvents`), else read in pages. The watch goes on
from the last version seen when it ends, which every watch does after some minutes, and everything is
listed again when the server no longer has that version (410, as a status or inside the stream). A
list counts only once it is complete.

A connection may die without a word. The server ends a watch after a time that we name; it sends a
bookmark about once a minute; what is silent or lasts beyond that is taken for dead and opened again.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from dataplane.sources.kubernetes_client import ApiFault, ApiServer, Garbage

Raw = dict[str, Any]

_END_OF_LIST = "k8s.io/initial-events-end"
_GONE = 410
_FORBIDDEN = 403
_NOT_FOUND = 404


@dataclass(frozen=True, slots=True)
class Resource:
    """A kind as the API server serves it. `group` is "" for the core group."""

    group: str
    version: str
    plural: str

    @property
    def path(self) -> str:
        """Of the objects of all namespaces."""
        prefix = f"/apis/{self.group}/{self.version}" if self.group else f"/api/{self.version}"
        return f"{prefix}/{self.plural}"

    def __str__(self) -> str:
        return f"{self.plural}.{self.group}" if self.group else self.plural


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds, unless it says otherwise."""

    watch: float = 300.0  # the longest that the server keeps one watch open; the shortest is half of it
    grace: float = 15.0  # … and how long after that time we wait for it to do so
    silence: float = 150.0  # without an event or a bookmark
    list_silence: float = 15.0  # without an event of a streamed list
    first_retry: float = 0.25
    last_retry: float = 10.0
    forbidden_retry: float = 10.0  # the longest wait after a 403: rights do not come by themselves
    page: int = 200  # objects; a page is parsed as a whole, and takes ten times its size while it is


class Receiver(Protocol):
    """Who is told about objects, in the form of parsed JSON. A list is complete once `end_list` is called."""

    def begin_list(self) -> None: ...
    def listed(self, raw: Raw) -> None: ...
    def unlisted(self, raw: Raw) -> None: ...
    def end_list(self) -> None: ...
    def changed(self, raw: Raw) -> None: ...
    def gone(self, raw: Raw) -> None: ...


class _Expired(Exception):
    """The server no longer has the version that we want to go on from."""


class _NoStreaming(Exception):
    """The server cannot stream lists."""


class Watch:
    """Keeps a receiver in step with one kind; `run` never ends by itself.

    `synced`: the receiver has had a whole list. `problem`: why it may be behind the server now, one
    line, or None. `restarts` counts by reason: ended (its time was over), expired (listed again),
    error. `lists` and `events` count what was received, `faults` the requests that failed, by kind.
    """

    def __init__(
        self,
        api: ApiServer,
        resource: Resource,
        receiver: Receiver,
        *,
        field_selector: str = "",
        timing: Timing | None = None,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_change` is called when `synced` or `problem` has changed."""
        self.resource = resource
        self._api = api
        self._receiver = receiver
        self._field_selector = field_selector
        self._timing = timing or Timing()
        self._on_change = on_change
        self.synced = False
        self.problem: str | None = f"waiting for the first list of {resource}"
        self.refused = 0  # the HTTP status behind the problem, if there is one
        self.restarts: Counter[str] = Counter()
        self.events: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.lists = 0
        self._version: str | None = None  # to go on from; None: list
        self._streaming = True  # unless the server could not when it was tried last
        self._pages = True  # until a list takes longer than the server keeps its pages
        self._retry = 0.0
        self._connected = False  # a watch is open
        self._heard: float | None = None  # when an event, a bookmark or a list came last

    @property
    def silence(self) -> float | None:
        """Seconds since anything was heard of the kind; None: nothing ever was."""
        return None if self._heard is None else time.monotonic() - self._heard

    @property
    def changes(self) -> int:
        """Events received that were about an object, since the lists."""
        return sum(self.events.values()) - self.events["BOOKMARK"]

    async def run(self) -> None:
        """Follow the kind until cancelled."""
        while True:
            started = time.monotonic()
            wait = 0.0
            self._connected = False
            try:
                if self._version is not None:
                    await self._follow(self._version)
                elif self._streaming:
                    await self._stream()
                else:
                    await self._list()
                    continue
                self.restarts["ended"] += 1
            except _NoStreaming:
                self._streaming = False
                continue
            except _Expired:
                self.restarts["expired"] += 1
                self._version = None
            except ApiFault as fault:
                self.restarts["error"] += 1
                self.faults[_fault_kind(fault.status)] += 1
                # A connection that breaks off, or a server that asks for a moment (as it does when a kind
                # has just been installed), is no news before the next attempt fails too.
                passing = fault.status == 429 or (self._connected and not fault.status)
                if self._retry or not passing:
                    self._note(self._explain(fault), refused=fault.status)
                # What was lost with an event that makes no sense only a list can tell. And a version that
                # the server says it has yet to reach is one of another etcd.
                ahead = fault.status in (400, 500, 504) and "resource version" in str(fault).lower()
                if ahead or isinstance(fault, Garbage):
                    self._version = None
                wait = min(fault.retry_after or 0.0, self._timing.last_retry)
            await asyncio.sleep(max(wait, self._pause(time.monotonic() - started)))

    def _pause(self, lasted: float) -> float:
        """Seconds until the next attempt: none after one that lasted, else ever more, and never the
        same on all nodes."""
        timing = self._timing
        if self.problem is None and lasted > timing.first_retry * 4:
            self._retry = 0.0
            return random.uniform(0, timing.first_retry)
        longest = timing.forbidden_retry if self.refused == _FORBIDDEN else timing.last_retry
        self._retry = min(max(self._retry * 2, timing.first_retry), longest)
        return self._retry * random.uniform(0.5, 1.0)

    # --- lists ------------------------------------------------------------------------------------

    async def _stream(self) -> None:
        """A list as a stream of events, and the watch that follows on the same connection."""
        query = {"sendInitialEvents": "true", "resourceVersionMatch": "NotOlderThan"}
        patience = self._timing.list_silence
        clock = asyncio.get_running_loop().time
        ended = False
        try:
            async with self._open(query) as events:
                self._receiver.begin_list()
                try:
                    async with asyncio.timeout(patience) as limit:
                        async for event in events:
                            limit.reschedule(clock() + patience)
                            if ended := self._listed_event(*self._read(event)):
                                break
                except TimeoutError:
                    raise _NoStreaming from None
                if not ended:
                    raise _NoStreaming
                await self._events(events)
        except ApiFault as fault:
            # Refused as a parameter, or (with etcd before 3.4.25) once it was tried.
            if not ended and fault.status not in (0, 401, _FORBIDDEN, _NOT_FOUND, 429):
                raise _NoStreaming from None
            raise

    def _listed_event(self, kind: str, raw: Raw) -> bool:
        """Take up one event of a streamed list; whether it was the last."""
        match kind:
            case "ADDED" | "MODIFIED":
                self._receiver.listed(raw)
            case "DELETED":  # after it was listed and before the list was complete
                self._receiver.unlisted(raw)
            case "BOOKMARK" if (raw["metadata"].get("annotations") or {}).get(_END_OF_LIST) == "true":
                self._listed(raw["metadata"])
                return True
            case _:  # an older server has taken it for a plain watch
                raise _NoStreaming
        return False

    async def _list(self) -> None:
        query = self._query()
        if self._pages:
            query["limit"] = str(self._timing.page)
        self._receiver.begin_list()
        while True:
            try:
                page = await self._api.get(self.resource.path, query)
            except ApiFault as fault:
                if fault.status == _GONE and "continue" in query:
                    self._pages = False
                    raise _Expired from None
                raise
            metadata, items = page.get("metadata"), page.get("items")
            if not isinstance(metadata, dict) or not isinstance(items, list | None):
                raise Garbage(f"API server {self._api.host}: the list of {self.resource} is none")
            for raw in items or ():
                self._receiver.listed(_object(raw, self._api.host))
            following = metadata.get("continue")
            if not following:
                break
            query["continue"] = str(following)
        self._listed(metadata)

    def _listed(self, metadata: Raw) -> None:
        self._receiver.end_list()
        self.lists += 1
        self._take_version(metadata)
        self._streaming = self._pages = True
        self._note(None, synced=True)

    # --- watches ----------------------------------------------------------------------------------

    async def _follow(self, version: str) -> None:
        async with self._open({"resourceVersion": version}) as events:
            self._note(None)
            await self._events(events)

    async def _events(self, events: AsyncIterator[Raw]) -> None:
        async for event in events:
            kind, raw = self._read(event)
            match kind:
                case "ADDED" | "MODIFIED":
                    self._receiver.changed(raw)
                case "DELETED":
                    self._receiver.gone(raw)
                case "BOOKMARK":
                    pass
                case _:
                    raise Garbage(f"API server {self._api.host}: a watch event of an unknown type")
            self.events[kind] += 1
            # Only now: what is not taken up yet must come again when we go on from here.
            self._take_version(raw["metadata"])

    @contextlib.asynccontextmanager
    async def _open(self, query: dict[str, str]) -> AsyncIterator[AsyncIterator[Raw]]:
        timing = self._timing
        # Not the same time for all watches of all nodes, or they would all come back at once.
        seconds = max(1, int(timing.watch * random.uniform(0.5, 1.0)))
        query = self._query() | query
        query |= {"watch": "true", "allowWatchBookmarks": "true", "timeoutSeconds": str(seconds)}
        try:
            async with self._api.watch(
                self.resource.path, query, seconds + timing.grace, timing.silence
            ) as events:
                self._connected = True
                yield events
        except ApiFault as fault:
            if fault.status == _GONE:
                raise _Expired from None
            raise

    def _query(self) -> dict[str, str]:
        return {"fieldSelector": self._field_selector} if self._field_selector else {}

    def _read(self, event: Raw) -> tuple[str, Raw]:
        """Type and object of an event; `metadata` of the object is a map."""
        kind, raw = event.get("type"), event.get("object")
        if kind == "ERROR" and isinstance(raw, dict):
            code = raw.get("code")
            message = f"{raw.get('message') or raw.get('reason') or 'an error without words'}"[:300]
            status = code if isinstance(code, int) else 500
            raise ApiFault(f"API server {self._api.host} ends the watch: {message}", status)
        if not isinstance(kind, str):
            raise Garbage(f"API server {self._api.host}: what comes is no watch event")
        return kind, _object(raw, self._api.host)

    def _take_version(self, metadata: Raw) -> None:
        version = metadata.get("resourceVersion")
        self._heard = time.monotonic()
        if isinstance(version, str) and version:
            self._version = version

    # --- telling ----------------------------------------------------------------------------------

    def _note(self, problem: str | None, *, synced: bool = False, refused: int = 0) -> None:
        if (problem, refused) != (self.problem, self.refused) or (synced and not self.synced):
            self.problem, self.refused = problem, refused
            self.synced = self.synced or synced
            self._on_change()

    def _explain(self, fault: ApiFault) -> str:
        resource = self.resource
        if fault.status == _FORBIDDEN:
            verb = "watch" if "cannot watch" in str(fault) else "list"
            return (
                f"not allowed to {verb} {resource}: give our ClusterRole the rule "
                f'apiGroups: ["{resource.group}"], resources: ["{resource.plural}"], '
                f'verbs: ["get", "list", "watch"] ({fault})'
            )
        if fault.status == _NOT_FOUND:
            return f"the API server does not serve {resource}; is its CustomResourceDefinition installed?"
        return str(fault)


def _fault_kind(status: int) -> str:
    """A failed request by its HTTP status, in a word. 0: no answer, or none that can be read."""
    if status >= 500:
        return "server-error"
    known = {0: "no-answer", 401: "unauthorized", 403: "forbidden", 404: "not-found", 429: "throttled"}
    return known.get(status, "other")


def _object(raw: object, host: str) -> Raw:
    if isinstance(raw, dict) and isinstance(raw.get("metadata"), dict):
        return raw
    raise Garbage(f"API server {host}: an object without metadata")
