"""The agent's control socket: HTTP on a unix socket, JSON answers.

`podgate status` and the other commands use it; so can anything else:
``curl --unix-socket /run/podgate/control.sock http://agent/status``.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from dataplane.errors import InputError, PodgateError

Query = Mapping[str, str]
Answer = Callable[[Query], Awaitable[Any]]
# In batches, the first of which (it may be empty) says that the stream has begun.
Stream = Callable[[Query], AsyncGenerator[Sequence[Any], None]]

LONGEST_MESSAGE = 1 << 17  # bytes that a client of a dialogue may say at once

# A reader of a stream never finishes by itself, and must not keep the agent from ending.
SHUTDOWN_SECONDS = 0.5
HAND_OVER = "hand-over"
HAND_OVER_SECONDS = 30.0  # a change that is being put in force ends first


# aiohttp logs whatever a client gets wrong, with a traceback; the client is told, and that is enough.
_SILENT = logging.getLogger("dataplane.control")
_SILENT.addHandler(logging.NullHandler())
_SILENT.propagate = False


class Channel:
    """A conversation with one client, a WebSocket: JSON values go there, texts come back."""

    def __init__(self, request: web.Request) -> None:
        self._request = request
        self.socket = web.WebSocketResponse(max_msg_size=LONGEST_MESSAGE, compress=False)

    async def open(self) -> None:
        """Begin. Until then the client can be refused."""
        await self.socket.prepare(self._request)

    async def send(self, value: Any) -> None:
        """Say something; waits while the client does not read. ConnectionError when it has gone."""
        await self.socket.send_str(json.dumps(value))

    async def texts(self) -> AsyncIterator[str]:
        """What the client says, until it goes. What is no text is empty."""
        async for message in self.socket:
            yield message.data if message.type is aiohttp.WSMsgType.TEXT else ""


Dialogue = Callable[[Query, Channel], Awaitable[None]]


def someone_listens(path: Path) -> bool:
    """Whether an agent answers on this socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True


async def ask_to_hand_over(path: Path) -> bool:
    """Ask the agent on this socket to leave the node to us. True once it has left its queues and rules
    as they are; False when no agent answers. InputError when it will not.
    """
    timeout = aiohttp.ClientTimeout(total=HAND_OVER_SECONDS)
    connector = aiohttp.UnixConnector(path=str(path))
    try:
        async with (
            aiohttp.ClientSession(connector=connector, timeout=timeout) as session,
            session.post(f"http://agent/{HAND_OVER}") as answer,
        ):
            if answer.status == 200:
                return True
            said = (await answer.text())[:200] or str(answer.status)
    except aiohttp.ClientConnectorError:
        return False
    except (aiohttp.ClientError, TimeoutError) as error:
        said = str(error) or "no answer in time"
    raise InputError(f"--control {path}: another agent is running here and does not hand over: {said}")


def _refused(error: PodgateError) -> dict[str, Any]:
    return {"error": str(error), "exit_code": error.exit_code}


def _refusal(error: PodgateError) -> web.Response:
    return web.json_response(_refused(error), status=400)


class ControlServer:
    """Serves named answers and streams of JSON lines on a unix socket that only root may open."""

    def __init__(
        self,
        path: Path,
        answers: Mapping[str, Answer],
        streams: Mapping[str, Stream],
        hand_over: Answer | None = None,
        dialogues: Mapping[str, Dialogue] | None = None,
    ) -> None:
        """`hand_over` is called by POST, all others by GET."""
        self._path = path
        self._file: tuple[int, int] | None = None  # device and inode of our socket
        self._runner: web.AppRunner | None = None
        self._app = web.Application()
        for name, answer in answers.items():
            self._app.router.add_get(f"/{name}", self._answer(answer))
        for name, stream in streams.items():
            self._app.router.add_get(f"/{name}", self._stream(stream))
        for name, dialogue in (dialogues or {}).items():
            self._app.router.add_get(f"/{name}", self._dialogue(dialogue))
        if hand_over is not None:
            self._app.router.add_post(f"/{HAND_OVER}", self._answer(hand_over))

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
            async with aclosing(stream(request.query)) as batches:
                try:
                    batch = await anext(batches)
                except PodgateError as error:
                    return _refusal(error)
                response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
                # The reader going away is how a stream ends.
                with suppress(ConnectionError, asyncio.CancelledError):
                    await response.prepare(request)
                    while True:
                        lines = [json.dumps(item).encode() + b"\n" for item in batch]
                        if lines:
                            await response.write(b"".join(lines))
                        batch = await anext(batches)
                return response

        return handle

    @staticmethod
    def _dialogue(dialogue: Dialogue) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def handle(request: web.Request) -> web.StreamResponse:
            channel = Channel(request)
            if not channel.socket.can_prepare(request):
                return _refusal(InputError(f"{request.path} is a WebSocket"))
            with suppress(ConnectionError):  # the client going away is how it ends
                try:
                    await dialogue(request.query, channel)
                except PodgateError as error:
                    # A client of WebSockets does not see the body of a refusal.
                    if not channel.socket.prepared:
                        await channel.open()
                    await channel.send(_refused(error))
            await channel.socket.close()
            return channel.socket

        return handle

    async def start(self) -> None:
        """Open the socket. InputError when an agent already answers there."""
        if someone_listens(self._path):
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
            made = self._path.stat()
            self._file = (made.st_dev, made.st_ino)
        except OSError as error:
            raise InputError(f"--control {self._path}: {error.strerror or error}") from None

    def withdraw(self) -> None:
        """Remove the socket, unless another agent has put its own there. Open connections go on."""
        with suppress(OSError):
            found = self._path.stat()
            if (found.st_dev, found.st_ino) == self._file:
                self._path.unlink()
        self._file = None

    async def stop(self) -> None:
        """Close every connection and remove the socket."""
        if self._runner is not None:
            self.withdraw()
            await self._runner.cleanup()
            self._runner = None
