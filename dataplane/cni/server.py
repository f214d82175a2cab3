"""The gRPC server that the VPC CNI calls whenever it has made or removed a pod's interface.

The CNI waits for at most 2 s to be connected. Where nobody answers, or the answer is a failure, the
pod is not created, and kubelet tries again.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Awaitable, Callable
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


class Pods(Protocol):
    """What is done about pods that come and go (`cni.pods.CniPods`)."""

    async def created(self, pod: Key, mode: str) -> bool: ...
    async def deleted(self, pod: Key) -> bool: ...


class CniServer:
    """Serves `NPBackend` on a unix socket that only root may open."""

    def __init__(self, path: Path, pods: Pods) -> None:
        self.path = path
        self.log: Logger = get_logger()
        self._pods = pods
        self._server: grpc.aio.Server | None = None

    async def start(self) -> None:
        """Open the socket. InputError when somebody answers there already, or it cannot be made."""
        if someone_listens(self.path):
            raise InputError(
                f"--cni-socket {self.path}: another agent answers the CNI here; if it is the VPC CNI's own,"
                " switch it off (enableNetworkPolicy: false), else stop it"
            )
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists() and not stat.S_ISSOCK(self.path.stat().st_mode):
                raise InputError(f"--cni-socket {self.path}: there is a file that is not a socket; remove it")
        except OSError as error:
            raise InputError(f"--cni-socket {self.path}: {error.strerror or error}") from None
        self._server = self._make()
        # Open to root alone from the moment that it exists.
        before = os.umask(0o177)
        try:
            self._server.add_insecure_port(f"unix:{self.path}")
        except RuntimeError:
            raise InputError(
                f"--cni-socket {self.path}: cannot listen there; is the directory writable, and the path"
                " no longer than 107 bytes?"
            ) from None
        finally:
            os.umask(before)
        await self._server.start()
        self.log.info("serving the CNI", socket=str(self.path))

    async def stop(self, grace: float = 0.0) -> None:
        """End calls under way after `grace` seconds; gRPC removes the socket."""
        server, self._server = self._server, None
        if server is not None:
            await server.stop(grace)

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
