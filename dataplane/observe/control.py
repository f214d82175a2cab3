"""The agent's control socket: HTTP on a unix socket, JSON answers.

`podgate status` and the other commands use it; so can anything else:
``curl --unix-socket /run/podgate/control.sock http://agent/status``.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from aiohttp import web

from dataplane.errors import InputError, PodgateError

Query = Mapping[str, str]
Answer = Callable[[Query], Awaitable[Any]]
Stream = Callable[[Query], AsyncIterator[Any]]

# A reader of a stream never finishes by itself, and must not keep the agent from ending.
SHUTDOWN_SECONDS = 0.5


# aiohttp logs whatever a client gets wrong, with a traceback; the client is told, and that is enough.
_SILENT = logging.getLogger("dataplane.control")
_SILENT.addHandler(logging.NullHandler())
_SILENT.propagate = False


def _someone_listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True


def _refusal(error: PodgateError) -> web.Response:
    return web.json_response({"error": str(error), "exit_code": error.exit_code}, status=400)


class ControlServer:
    """Serves named answers and streams of JSON lines on a unix socket that only root may open."""

    def __init__(self, path: Path, answers: Mapping[str, Answer], streams: Mapping[str, Stream]) -> None:
        self._path = path
        self._runner: web.AppRunner | None = None
        self._app = web.Application()
        for name, answer in answers.items():
            self._app.router.add_get(f"/{name}", self._answer(answer))
        for name, stream in streams.items():
            self._app.router.add_get(f"/{name}", self._stream(stream))

    @staticmethod
    def _answer(answer: Answer) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def handle(request: web.Request) -> web.Response:
            try:
                return web.json_response(await answer(request.query))
            except PodgateError as error:
                return _refusal(error)

        return handle

    @staticmethod
    def _stream(stream: Stream) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def handle(request: web.Request) -> web.StreamResponse:
            try:
                items = stream(request.query)
            except PodgateError as error:
                return _refusal(error)
            response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
            await response.prepare(request)
            # The reader going away is how a stream ends.
            with suppress(ConnectionError, asyncio.CancelledError):
                async for item in items:
                    await response.write(json.dumps(item).encode() + b"\n")
            return response

        return handle

    async def start(self) -> None:
        """Open the socket. InputError when an agent already answers there."""
        if _someone_listens(self._path):
            raise InputError(
                f"--control {self._path}: another agent is running here; stop it, or choose another path"
            )
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.unlink(missing_ok=True)
            self._runner = web.AppRunner(
                self._app,
                access_log=None,
                logger=_SILENT,
                handler_cancellation=True,
                shutdown_timeout=SHUTDOWN_SECONDS,
            )
            await self._runner.setup()
            await web.UnixSite(self._runner, str(self._path)).start()
            self._path.chmod(0o600)
        except OSError as error:
            raise InputError(f"--control {self._path}: {error.strerror or error}") from None

    async def stop(self) -> None:
        """Close every connection and remove the socket."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._path.unlink(missing_ok=True)
