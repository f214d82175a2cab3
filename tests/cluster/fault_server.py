"""An API server for faults that a real one does not produce on demand. It knows one kind of objects.

Each request is answered by the next step of a script, a coroutine that writes what it likes; a request
beyond the script is held open without an answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any
from urllib.parse import parse_qsl, urlsplit

Raw = dict[str, Any]


class Request:
    """One request, and ways to answer it."""

    def __init__(self, query: dict[str, str], headers: dict[str, str], writer: asyncio.StreamWriter) -> None:
        self.query, self.headers = query, headers
        self._writer = writer

    async def answer(self, body: object, status: int = 200, headers: str = "") -> None:
        """A whole answer."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\n{headers}"
        self._writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        await self._writer.drain()

    async def stream(self, *events: Raw | bytes, end: bool = False) -> None:
        """Begin a watch with these events; `end` ends it as a server does whose time is over."""
        self._writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        await self.more(*events, end=end)

    async def more(self, *events: Raw | bytes, end: bool = False) -> None:
        for event in events:
            data = event if isinstance(event, bytes) else json.dumps(event).encode() + b"\n"
            self._writer.write(b"%x\r\n%s\r\n" % (len(data), data))
        if end:
            self._writer.write(b"0\r\n\r\n")
        await self._writer.drain()

    async def raw(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    def cut(self) -> None:
        """Break the connection off, as a crash does."""
        self._writer.transport.abort()


Step = Callable[[Request], Awaitable[None]]


class FaultServer:
    """`requests` are those that came, in order."""

    def __init__(self, script: Iterable[Step]) -> None:
        self._script = list(script)
        self.requests: list[Request] = []
        self.url = ""

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[FaultServer]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self._tasks: set[asyncio.Task[Any]] = set()
        try:
            yield self
        finally:
            server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        # A cancelled handler would be logged as an error by asyncio itself.
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                first, *lines = head.split("\r\n")
                headers = dict(line.lower().split(": ", 1) for line in lines if line)
                request = Request(dict(parse_qsl(urlsplit(first.split()[1]).query)), headers, writer)
                self.requests.append(request)
                if len(self.requests) > len(self._script):
                    await asyncio.Event().wait()
                await self._script[len(self.requests) - 1](request)


def item(name: str, version: int, **more: object) -> Raw:
    return {"metadata": {"name": name, "namespace": "x", "resourceVersion": str(version)}, **more}


def event(kind: str, name: str, version: int) -> Raw:
    return {"type": kind, "object": item(name, version)}


def bookmark(version: int, *, end: bool = False) -> Raw:
    made = item("", version)
    if end:
        made["metadata"]["annotations"] = {"k8s.io/initial-events-end": "true"}
    return {"type": "BOOKMARK", "object": made}


def error(code: int, message: str = "no") -> Raw:
    return {"type": "ERROR", "object": {"kind": "Status", "code": code, "message": message}}


def page(*items: Raw, version: int = 0, token: str = "") -> Raw:
    return {"kind": "List", "metadata": {"resourceVersion": str(version), "continue": token}, "items": items}
