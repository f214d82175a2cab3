"""The agent's plain HTTP for probes and scrapes: text answers on the addresses that options name."""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Awaitable, Callable, Mapping

from aiohttp import web

from dataplane.config import BindAddress
from dataplane.errors import InputError

Handler = Callable[[], Awaitable[web.Response]]

_BACKLOG = 128
# Whoever reads slowly must not keep the agent from ending.
_SHUTDOWN_SECONDS = 0.5
# What clients get wrong, aiohttp would log with a traceback.
_SILENT = logging.getLogger("dataplane.http")
_SILENT.addHandler(logging.NullHandler())
_SILENT.propagate = False


class HttpServer:
    """Serves pages, all of those that have one address from one socket."""

    def __init__(self) -> None:
        self._pages: dict[BindAddress, dict[str, Handler]] = {}
        self._options: dict[BindAddress, str] = {}
        self._runners: list[web.AppRunner] = []

    def add(self, option: str, address: BindAddress | None, pages: Mapping[str, Handler]) -> None:
        """Pages by path. `option` is the one that named the address; None: they are not served."""
        if address is not None:
            self._options.setdefault(address, option)
            self._pages.setdefault(address, {}).update(pages)

    async def start(self) -> None:
        """Open every socket. InputError when an address cannot be had."""
        for address, pages in self._pages.items():
            sock = _listen(self._options[address], address)
            app = web.Application()
            for path, handler in pages.items():
                app.router.add_get(path, _without_request(handler))
            runner = web.AppRunner(app, access_log=None, logger=_SILENT, shutdown_timeout=_SHUTDOWN_SECONDS)
            self._runners.append(runner)
            await runner.setup()
            await web.SockSite(runner, sock, backlog=_BACKLOG).start()

    async def stop(self) -> None:
        """Close every socket and connection."""
        while self._runners:
            await self._runners.pop().cleanup()


def _without_request(handler: Handler) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def handle(_request: web.Request) -> web.Response:
        return await handler()

    return handle


def _listen(option: str, address: BindAddress) -> socket.socket:
    hosts = [address.host] if address.host else ["::", "0.0.0.0"]
    for host in hosts:
        six = ":" in host
        try:
            sock = socket.socket(socket.AF_INET6 if six else socket.AF_INET, socket.SOCK_STREAM)
        except OSError:  # a kernel without IPv6
            if host != hosts[-1]:
                continue
            raise
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if six:
                # Without a host: IPv4 too, by the same socket.
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(bool(address.host)))
            sock.bind((host, address.port))
            # Another program may have bound the port without listening yet; then this is what fails.
            sock.listen(_BACKLOG)
        except OSError as error:
            sock.close()
            if error.errno == errno.EADDRNOTAVAIL and host != hosts[-1]:  # IPv6 is switched off
                continue
            raise InputError(_explain(option, address, error)) from None
        sock.setblocking(False)
        return sock
    raise AssertionError


def _explain(option: str, address: BindAddress, error: OSError) -> str:
    what = f"{option} {address}"
    if error.errno == errno.EADDRINUSE:
        return f"{what}: the port is in use; stop who has it, choose another port, or 0 to serve nothing"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{what}: no interface of this network namespace has that address"
    return f"{what}: {error.strerror or error}"
