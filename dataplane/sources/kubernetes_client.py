"""The API server: where it is, how to prove who we are, and its answers as plain parsed JSON.

Credentials come from `kubernetes.aio`'s own loaders (a pod's ServiceAccount, kubeconfig files with
tokens, certificates and exec plugins) and are read anew for each request: kubelet exchanges a pod's
token about once an hour, and a plugin's expires. Requests are rare, since a watch lasts for minutes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import ssl
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp

# The client looks for a home directory when it is imported; a container's user may have none.
os.environ.setdefault("HOME", "/")
from kubernetes.aio.client import Configuration
from kubernetes.aio.client.rest import RESTClientObject
from kubernetes.aio.config import load_kube_config
from kubernetes.aio.config.incluster_config import (
    SERVICE_CERT_FILENAME,
    SERVICE_HOST_ENV_NAME,
    SERVICE_TOKEN_FILENAME,
    InClusterConfigLoader,
)

from dataplane.errors import InputError

CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 60.0  # for a whole answer that is no watch
PLUGIN_SECONDS = 60.0  # for an exec plugin of a kubeconfig
MAX_ANSWER = 512 * 1024 * 1024
MAX_EVENT = 64 * 1024 * 1024
MAX_TEXT = 300  # of a message of somebody else's that goes into one of our lines
# A peer that is gone without a word is noticed after 15 + 3 × 5 s; data it does not confirm, after 30 s.
_KEEPALIVE = {
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE): 1,
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE): 15,
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL): 5,
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT): 3,
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT): 30_000,
}


class ApiFault(Exception):
    """The API server refused a request, or gave no answer: one line that says which and why.

    `status` is the HTTP status, 0 when there was no answer. `retry_after`: seconds the server asks for.
    """

    def __init__(self, text: str, status: int = 0, retry_after: float | None = None) -> None:
        super().__init__(text)
        self.status = status
        self.retry_after = retry_after


class Garbage(ApiFault):
    """An answer came that makes no sense."""


@dataclass(frozen=True, slots=True)
class _Access:
    """What one request needs."""

    host: str
    headers: dict[str, str]
    tls: ssl.SSLContext | bool
    proxy: str | None
    server_name: str | None


class _Payload(NamedTuple):
    """What a request that writes has besides its path. `content` is the type of `body`."""

    method: str
    body: str
    content: str


class Credentials:
    """Finds the API server and our credentials: a kubeconfig that is named, else those of the pod we
    run in, else ~/.kube/config. InputError when there is none of these.

    `kubeconfig`: a path, or several with colons between them as in KUBECONFIG.
    """

    def __init__(
        self,
        kubeconfig: str | None = None,
        *,
        token_file: str = SERVICE_TOKEN_FILENAME,
        ca_file: str = SERVICE_CERT_FILENAME,
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        self._environment = environment
        self._token_file, self._ca_file = token_file, ca_file
        default = Path(environment.get("HOME") or "/nonexistent") / ".kube" / "config"
        if not kubeconfig and SERVICE_HOST_ENV_NAME not in environment and default.is_file():
            kubeconfig = str(default)
        self.kubeconfig = kubeconfig
        if kubeconfig and not any(Path(path).expanduser().is_file() for path in kubeconfig.split(":")):
            raise InputError(f"kubeconfig {kubeconfig}: no such file")
        if not kubeconfig and SERVICE_HOST_ENV_NAME not in environment:
            raise InputError(
                "no way to the API server: not in a pod, no --kubeconfig or KUBECONFIG, no ~/.kube/config"
            )
        self._loader: Any = None
        self._loaded = Configuration()
        self._files: tuple[object, ...] = ()
        self._tls: ssl.SSLContext | bool = True
        self._tls_files: tuple[object, ...] | None = None
        self._lock = asyncio.Lock()

    @property
    def origin(self) -> str:
        """Where the credentials come from, for people."""
        return f"kubeconfig {self.kubeconfig}" if self.kubeconfig else self._token_file

    async def current(self, *, refused: bool = False) -> _Access:
        """What is valid now. `refused`: the last ones were not accepted, so no cached one will do.

        ApiFault when they cannot be read.
        """
        async with self._lock:  # an exec plugin is run once, not once per watch
            with _complaints() as complaints:
                try:
                    # Not wait_for: before Python 3.12 it may swallow a cancellation.
                    async with asyncio.timeout(PLUGIN_SECONDS):
                        await self._load(refused)
                    tls = self._tls_context()
                except TimeoutError:
                    raise ApiFault(f"{self.origin}: no credentials within {PLUGIN_SECONDS:.0f} s") from None
                # The library checks little of what it reads: a malformed file shows as any exception.
                except Exception as error:
                    raise ApiFault(f"{self.origin}: {_one_line(error)}") from None
            if complaints:  # it logs a failing exec plugin and goes on without credentials
                raise ApiFault(f"{self.origin}: {_one_line(complaints[-1])}")
            token = self._loaded.api_key.get("BearerToken")
            headers = {"Authorization": " ".join(token.split())} if token else {}
            loaded = self._loaded
            return _Access(loaded.host.rstrip("/"), headers, tls, loaded.proxy, loaded.tls_server_name)

    async def _load(self, refused: bool) -> None:
        if self.kubeconfig:
            files = tuple(map(_signature, self.kubeconfig.split(":")))
            if self._loader is None or refused or files != self._files:
                fresh = Configuration()
                self._loader = await load_kube_config(
                    self.kubeconfig, client_configuration=fresh, persist_config=False
                )
                self._loaded, self._files = fresh, files
            else:  # a token file is read again, an exec plugin run again when its token has expired
                await self._loader.load_and_set(self._loaded)
        else:
            fresh = Configuration()
            loader = InClusterConfigLoader(
                self._token_file, self._ca_file, try_refresh_token=False, environ=self._environment
            )
            loader.load_and_set(fresh)
            self._loaded = fresh

    def _tls_context(self) -> ssl.SSLContext | bool:
        loaded = self._loaded
        if not loaded.host.startswith("https:"):
            return False
        files = (
            loaded.verify_ssl,
            *(
                (path, _signature(path))
                for path in (loaded.ssl_ca_cert, loaded.cert_file, loaded.key_file)
                if path
            ),
        )
        if files != self._tls_files:
            # Python 3.13 refuses CAs without the extensions of RFC 5280 §4.2, which clusters' CAs lack
            # (those of EKS among them) and every other client of theirs accepts.
            loaded.disable_strict_ssl_verification = True
            self._tls = RESTClientObject(loaded).ssl_context
            self._tls_files = files
        return self._tls


class ApiServer:
    """Requests to the API server. Every failure is an ApiFault."""

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials
        self._session: aiohttp.ClientSession | None = None
        self.host = ""  # as last used

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def get(self, path: str, query: Mapping[str, str]) -> dict[str, Any]:
        """The parsed answer, a JSON object."""
        patience = aiohttp.ClientTimeout(total=ANSWER_SECONDS, sock_connect=CONNECT_SECONDS)
        async with self._request(path, query, patience) as response:
            return await self._whole(path, response)

    async def send(
        self, method: str, path: str, body: object, seconds: float, content: str = "application/json"
    ) -> dict[str, Any]:
        """The parsed answer to a request that writes. `body`: JSON in the making; `content`: its type."""
        patience = aiohttp.ClientTimeout(total=seconds)
        async with self._request(path, {}, patience, _Payload(method, json.dumps(body), content)) as response:
            return await self._whole(path, response)

    async def _whole(self, path: str, response: aiohttp.ClientResponse) -> dict[str, Any]:
        body = bytearray()
        async for chunk in response.content.iter_any():
            body += chunk
            if len(body) > MAX_ANSWER:
                raise Garbage(f"{self.host}: an answer to {path} of more than {MAX_ANSWER >> 20} MiB")
        return _parse(body, self.host)

    @contextlib.asynccontextmanager
    async def watch(
        self, path: str, query: Mapping[str, str], seconds: float, silence: float
    ) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
        """A watch's events, parsed, while the context is open.

        It ends when the server ends it. ApiFault once it lasts longer than `seconds` or nothing comes
        for `silence` seconds: the connection is then taken for dead.
        """
        patience = aiohttp.ClientTimeout(total=seconds, sock_connect=CONNECT_SECONDS, sock_read=silence)
        async with self._request(path, query, patience) as response:
            yield self._events(response)

    async def _events(self, response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
        waiting = bytearray()
        async for chunk in response.content.iter_any():
            start = len(waiting)
            waiting += chunk
            if waiting.find(b"\n", start) < 0:
                if len(waiting) > MAX_EVENT:
                    raise Garbage(f"{self.host}: a watch event of more than {MAX_EVENT >> 20} MiB")
                continue
            *lines, rest = waiting.split(b"\n")
            waiting = rest
            for line in lines:
                if line:
                    yield _parse(line, self.host)
        # What is left has no end: a piece of an event whose rest was lost.

    @contextlib.asynccontextmanager
    async def _request(
        self,
        path: str,
        query: Mapping[str, str],
        patience: aiohttp.ClientTimeout,
        payload: _Payload | None = None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        try:
            async with contextlib.AsyncExitStack() as stack:
                response = await self._send(stack, path, query, patience, payload)
                if response.status == 401:
                    # Expired between two looks at it, or revoked: read what there is now, once.
                    response = await self._send(stack, path, query, patience, payload, refused=True)
                if response.status // 100 != 2:
                    raise await self._refusal(response)
                yield response
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise ApiFault(f"API server {self.host}: {_explain(error)}") from None

    async def _send(
        self,
        stack: contextlib.AsyncExitStack,
        path: str,
        query: Mapping[str, str],
        patience: aiohttp.ClientTimeout,
        payload: _Payload | None,
        *,
        refused: bool = False,
    ) -> aiohttp.ClientResponse:
        access = await self._credentials.current(refused=refused)
        self.host = access.host
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=0, socket_factory=_make_socket, ttl_dns_cache=60)
            self._session = aiohttp.ClientSession(
                connector=connector, trust_env=True, headers={"Accept": "application/json"}
            )
        typed = {"Content-Type": payload.content} if payload else {}
        return await stack.enter_async_context(
            self._session.request(
                payload.method if payload else "GET",
                access.host + path,
                params=dict(query),
                data=payload.body if payload else None,
                headers=access.headers | typed,
                ssl=access.tls,
                proxy=access.proxy,
                server_hostname=access.server_name,
                timeout=patience,
                read_bufsize=1 << 20,
            )
        )

    async def _refusal(self, response: aiohttp.ClientResponse) -> ApiFault:
        body = await response.content.read(1 << 16)
        try:
            status = json.loads(body)
            message = status["message"]
        except (ValueError, TypeError, KeyError, RecursionError):
            message = body[:MAX_TEXT].decode(errors="replace")
        message = _one_line(message) or response.reason or ""
        if response.status == 401:
            message = f"our credentials ({self._credentials.origin}) are not accepted; have they expired?"
        try:
            retry_after = float(response.headers.get("Retry-After", ""))
        except ValueError:
            retry_after = None
        text = f"API server {self.host} answers {response.status}: {message}"
        return ApiFault(text, response.status, retry_after)


def _parse(data: bytes | bytearray, host: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Garbage(f"API server {host}: answers what is not JSON: {_one_line(error)}") from None
    if not isinstance(value, dict):
        raise Garbage(f"API server {host}: answers JSON that is no object")
    return value


def _explain(error: Exception) -> str:
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        reason = getattr(error.certificate_error, "verify_message", None) or error.certificate_error
        return f"its certificate is not one we trust: {_one_line(reason)}; check the CA in our credentials"
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return "its name cannot be resolved"
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return f"no connection within {CONNECT_SECONDS:.0f} s"
    if isinstance(error, TimeoutError):
        return "no answer in time; the connection is taken for dead"
    if isinstance(error, aiohttp.ClientConnectorError) and error.os_error.errno:
        return os.strerror(error.os_error.errno).lower()
    if isinstance(error, aiohttp.ClientPayloadError | aiohttp.ServerDisconnectedError | ConnectionResetError):
        return "the connection broke off"
    return _one_line(error) or type(error).__name__


def _one_line(text: object) -> str:
    line = " ".join(str(text).split())
    plain = "".join(character if character.isprintable() else "?" for character in line)
    return plain if len(plain) <= MAX_TEXT else plain[: MAX_TEXT - 3] + "..."


def _signature(path: str) -> tuple[int, int, int] | None:
    try:
        status = os.stat(os.path.expanduser(path))
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def _make_socket(info: tuple[int, int, int, str, tuple[Any, ...]]) -> socket.socket:
    family, kind, protocol, *_ = info
    made = socket.socket(family, kind, protocol)
    for (level, name), value in _KEEPALIVE.items():
        made.setsockopt(level, name, value)
    return made


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextlib.contextmanager
def _complaints() -> Any:
    """What the library's loaders log, which would otherwise go to stderr as it is."""
    logger = logging.getLogger("kubernetes.aio.config.kube_config")
    collector, propagate = _Collector(), logger.propagate
    logger.addHandler(collector)
    logger.propagate = False
    try:
        yield collector.lines
    finally:
        logger.removeHandler(collector)
        logger.propagate = propagate
