"""The gRPC server that the VPC CNI calls whenever it has made or removed a pod's interface.

The CNI waits for at most 2 s to be connected. Where nobody answers, or the answer is a failure, the
pod is not created, and kubelet tries again.

The VPC CNI's own agent answers there even where its policies are switched off, and when it starts it
removes whatever socket it finds. Two do not fight for it: while that agent answers, this one waits.
"""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dataplane.errors import InputError
from dataplane.model import Key
from dataplane.observe.control import someone_listens
from dataplane.observe.log import Logger, get_logger

if TYPE_CHECKING:
    import grpc.aio

MAX_REQUEST_BYTES = 1 << 16  # two names and a word
MAX_NAME = 253  # a DNS subdomain, which pods' names are
LOOK_SECONDS = 2.0  # how often we look whose socket it is


class Pods(Protocol):
    """What is done about pods that come and go (`cni.pods.CniPods`)."""

    async def created(self, pod: Key, mode: str) -> bool: ...
    async def deleted(self, pod: Key) -> bool: ...


class CniServer:
    """Serves `NPBackend` on a unix socket that only root may open."""

    def __init__(self, path: Path, pods: Pods, look_seconds: float = LOOK_SECONDS) -> None:
        self.path = path
        self.log: Logger = get_logger()
        self._pods = pods
        self._look_seconds = look_seconds
        self._server: grpc.aio.Server | None = None
        self._mine: tuple[int, int] | None = None  # device and inode of our socket
        self._keeper: asyncio.Task[None] | None = None
        self._problem: str | None = None

    @property
    def problems(self) -> Sequence[str]:
        """Why the CNI does not reach us."""
        return () if self._problem is None else (self._problem,)

    async def start(self) -> None:
        """Serve as soon as nobody else does. InputError when the socket cannot be made."""
        await self._serve()
        self._keeper = asyncio.create_task(self._keep())

    async def stop(self, grace: float = 0.0) -> None:
        """End calls under way after `grace` seconds, and remove our socket."""
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            keeper.cancel()
            await asyncio.gather(keeper, return_exceptions=True)
        await self._close(grace)

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(self._look_seconds)
            if self._server is not None:
                if self._identity() == self._mine:
                    continue
                await self._close()
            try:
                await self._serve()
            except InputError as error:
                self._complain(str(error))

    def _complain(self, problem: str) -> None:
        if problem != self._problem:
            self.log.warning("the CNI does not reach this agent", reason=problem)
        self._problem = problem

    async def _serve(self) -> None:
        if someone_listens(self.path):
            self._complain(
                f"--cni-socket {self.path}: another agent answers the CNI; where that is the VPC CNI's own,"
                " with its policies switched off, all is well: pods are closed as soon as they are seen"
            )
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists() and not stat.S_ISSOCK(self.path.stat().st_mode):
                raise InputError(f"--cni-socket {self.path}: there is a file that is not a socket; remove it")
        except OSError as error:
            raise InputError(f"--cni-socket {self.path}: {error.strerror or error}") from None
        server = self._make()
        # Open to root alone from the moment that it exists.
        before = os.umask(0o177)
        try:
            server.add_insecure_port(f"unix:{self.path}")
        except RuntimeError:
            raise InputError(
                f"--cni-socket {self.path}: cannot listen there; is the directory writable, and the path"
                " no longer than 107 bytes?"
            ) from None
        finally:
            os.umask(before)
        self._server, self._mine = server, self._identity()
        await server.start()
        self._problem = None
        self.log.info("serving the CNI", socket=str(self.path))

    def _identity(self) -> tuple[int, int] | None:
        """Of what is at the path now; None when there is nothing."""
        try:
            found = os.stat(self.path)
        except OSError:
            return None
        return found.st_dev, found.st_ino

    async def _close(self, grace: float = 0.0) -> None:
        """gRPC removes the socket when it stops, whoever's it is then: another's is out of its way."""
        server, self._server = self._server, None
        if server is None:
            return
        aside = None
        if self._identity() not in (None, self._mine):
            aside = self.path.with_suffix(".aside")
            with suppress(OSError):
                os.rename(self.path, aside)
        await server.stop(grace)
        if aside is not None:
            with suppress(OSError):
                os.rename(aside, self.path)

    def _make(self) -> grpc.aio.Server:
        # gRPC writes lines of its own to stderr, and its fork handlers can hang a process that starts
        # others, as we do for every change of rules. Both are read when it is imported.
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
        os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
        import grpc  # 10 MB and a quarter of a second
        import grpc.aio

        from dataplane.cni import messages

        async def enforce(data: bytes, _context: Any) -> bytes:
            return messages.enforce_reply(await self._answer(data, messages.parse_enforce, self._created))

        async def delete(data: bytes, _context: Any) -> bytes:
            return messages.delete_reply(await self._answer(data, messages.parse_delete, self._deleted))

        server = grpc.aio.server(options=[("grpc.max_receive_message_length", MAX_REQUEST_BYTES)])
        # Messages are parsed by us: what gRPC cannot parse it reports with a traceback.
        handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
            "EnforceNpToPod": grpc.unary_unary_rpc_method_handler(enforce),
            "DeletePodNp": grpc.unary_unary_rpc_method_handler(delete),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(messages.SERVICE, handlers),))
        return server

    async def _answer(
        self, data: bytes, parse: Callable[[bytes], Any], act: Callable[[Any], Awaitable[bool]]
    ) -> bool:
        """A failure is an answer too: the CNI's code does not survive an error on deletion."""
        try:
            request = parse(data)
            for part in (request.name, request.namespace):
                if not 0 < len(part) <= MAX_NAME or not part.isprintable():
                    raise ValueError(f"{part[:MAX_NAME]!r} is no name of a pod or namespace")
        except ValueError as error:
            self.log.warning("a call on the CNI's socket makes no sense", error=str(error))
            return False
        return await act(request)

    async def _created(self, request: Any) -> bool:
        return await self._pods.created(Key(request.namespace, request.name), request.mode)

    async def _deleted(self, request: Any) -> bool:
        return await self._pods.deleted(Key(request.namespace, request.name))
