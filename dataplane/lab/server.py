"""The lab's one helper process: answers on the ports of every pod, from inside each pod's namespace.

Run as `python -m dataplane.lab.server DIRECTORY`; it listens on DIRECTORY/server.sock for JSON
lines and prints `ready` on stdout once it does. Requests, each answered by `{"ok": true}` or
`{"error": text}`:

    {"op": "serve", "netns": N, "name": POD, "ports": [[protocol, port], …]}
    {"op": "forget", "netns": N}                 close everything in there: a socket keeps a namespace alive
    {"op": "open", "netns": [N, …], "ports": …}  also answer these, until this connection ends
    {"op": "stop"}

What the ports answer: TCP `who` → the pod's name; an HTTP GET → a page with the pod's name;
`stream` → a numbered line every 20 ms until the end; anything else comes back as it is. UDP: the
datagram and the pod's name behind it. SCTP: INIT ACK whose cookie is the pod's name.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import secrets
import signal
import socket
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dataplane.lab import netns, sctp

TCP, UDP = 6, 17
STREAM_INTERVAL = 0.02
IPV6_FREEBIND = 78  # linux/in6.h; the socket module has no name for it
IP_PKTINFO = 8
_ANCILLARY = 256


class Place:
    """Everything served in one namespace. One dual-stack socket per port; names may differ by port."""

    def __init__(self, name: str) -> None:
        self.netns = name
        self.label = name
        self.listeners: dict[tuple[int, int], socket.socket | asyncio.Server] = {}
        self.names: dict[tuple[int, int], str] = {}
        self.users: dict[tuple[int, int], int] = {}  # how many want it: the pod, and running probes
        self.connections: set[asyncio.Task[None]] = set()
        self.raw: list[socket.socket] = []

    async def start(self) -> None:
        # Without a raw socket for the protocol the kernel answers SCTP with "protocol unreachable".
        for family in (socket.AF_INET, socket.AF_INET6):
            raw = netns.make_socket(self.netns, family, socket.SOCK_RAW, sctp.PROTOCOL)
            _want_destination(raw)
            self.raw.append(raw)
            asyncio.get_running_loop().add_reader(raw, self._sctp, raw)

    async def open(self, protocol: int, port: int, name: str) -> None:
        key = (protocol, port)
        self.users[key] = self.users.get(key, 0) + 1
        if self.users[key] > 1:
            return
        self.names[key] = name
        try:
            if protocol == TCP:
                listener = await asyncio.to_thread(self._bind, socket.SOCK_STREAM, port)
                self.listeners[key] = await asyncio.start_server(
                    self._accepted(name), sock=listener, backlog=1024
                )
            elif protocol == UDP:
                udp = await asyncio.to_thread(self._bind, socket.SOCK_DGRAM, port)
                self.listeners[key] = udp
                asyncio.get_running_loop().add_reader(udp, self._udp, udp, name)
        except BaseException:
            del self.users[key], self.names[key]
            raise

    def close(self, protocol: int, port: int) -> None:
        key = (protocol, port)
        self.users[key] -= 1
        if self.users[key]:
            return
        del self.users[key], self.names[key]
        self._drop(self.listeners.pop(key, None))

    def stop(self) -> None:
        for listener in self.listeners.values():
            self._drop(listener)
        for raw in self.raw:
            self._drop(raw)
        for task in self.connections:
            task.cancel()

    def _drop(self, listener: socket.socket | asyncio.Server | None) -> None:
        if isinstance(listener, asyncio.Server):
            listener.close()
        elif listener is not None:
            asyncio.get_running_loop().remove_reader(listener)
            listener.close()

    def _bind(self, kind: int, port: int) -> socket.socket:
        made = netns.make_socket(self.netns, socket.AF_INET6, kind)
        try:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if kind == socket.SOCK_DGRAM:
                _want_destination(made)
            made.bind(("::", port))
        except BaseException:
            made.close()
            raise
        return made

    def _accepted(self, name: str) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            self.connections.add(task)
            try:
                await _talk(reader, writer, name)
            except (OSError, asyncio.CancelledError):
                pass
            finally:
                self.connections.discard(task)
                writer.transport.abort()

        return handle

    def _udp(self, sock: socket.socket, name: str) -> None:
        with contextlib.suppress(OSError):
            data, ancillary, _, peer = sock.recvmsg(65536, _ANCILLARY)
            sock.sendmsg([data.rstrip(b"\n"), b" ", name.encode(), b"\n"], _as_received(ancillary), 0, peer)

    def _sctp(self, raw: socket.socket) -> None:
        with contextlib.suppress(OSError):
            data, ancillary, _, peer = raw.recvmsg(65536, _ANCILLARY)
            if raw.family == socket.AF_INET:
                data = data[(data[0] & 15) * 4 :]
            packet = sctp.parse(data)
            # Answers to the probes' own INITs arrive here too; those are the probes' business.
            if packet is None or packet.chunk != sctp.INIT:
                return
            name = self.names.get((sctp.PROTOCOL, packet.destination_port))
            if name is None:
                answer = sctp.abort(packet)
            else:
                answer = sctp.init_ack(packet, secrets.randbits(32) | 1, name.encode())
            raw.sendmsg([answer], _as_received(ancillary), 0, peer)


def _want_destination(sock: socket.socket) -> None:
    # Answer from the address that was asked: a namespace may have several.
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)


def _as_received(ancillary: list[tuple[int, int, bytes]]) -> list[tuple[int, int, bytes]]:
    """Control data that sends from the address a packet was sent to (ip(7), ipv6(7)), by any route."""
    for level, kind, data in ancillary:
        if level == socket.IPPROTO_IPV6 and kind == socket.IPV6_PKTINFO:
            interface = struct.unpack_from("@I", data, 16)[0] if data[:2] == b"\xfe\x80" else 0
            return [(level, kind, data[:16] + struct.pack("@I", interface))]
        if level == socket.IPPROTO_IP and kind == IP_PKTINFO:
            return [(level, kind, struct.pack("@i4s4s", 0, data[8:12], bytes(4)))]
    return []


async def _talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, name: str) -> None:
    while chunk := await reader.read(65536):
        if chunk.startswith((b"GET ", b"HEAD ")):
            body = f"{name}\n".encode()
            writer.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nConnection: close\r\n"
                b"Content-Length: %d\r\n\r\n%s" % (len(body), body if chunk[:1] == b"G" else b"")
            )
            await writer.drain()
            writer.write_eof()
            await reader.read()
            return
        if chunk.strip() == b"who":
            writer.write(f"{name}\n".encode())
        elif chunk.strip() == b"stream":
            number = 0
            while True:
                writer.write(f"{name} {number}\n".encode())
                await writer.drain()
                number += 1
                await asyncio.sleep(STREAM_INTERVAL)
        else:
            writer.write(chunk)
        await writer.drain()


class Server:
    """Keeps the places and answers the control socket."""

    def __init__(self) -> None:
        self.places: dict[str, Place] = {}
        self.stopping = asyncio.Event()

    async def control(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        borrowed: list[tuple[Place, int, int]] = []
        try:
            while line := await reader.readline():
                try:
                    await self._request(json.loads(line), borrowed)
                    answer: dict[str, Any] = {"ok": True}
                except (OSError, ValueError, KeyError) as error:
                    answer = {"error": str(error)}
                writer.write(json.dumps(answer).encode() + b"\n")
                await writer.drain()
        except OSError:
            pass
        finally:
            for place, protocol, port in borrowed:
                if self.places.get(place.netns) is place:
                    place.close(protocol, port)
            writer.close()

    async def _request(self, request: dict[str, Any], borrowed: list[tuple[Place, int, int]]) -> None:
        match request["op"]:
            case "serve":
                place = await self._place(request["netns"])
                if not request.get("shared"):
                    place.label = request["name"]
                for protocol, port in request["ports"]:
                    await place.open(protocol, port, request["name"])
            case "open":
                for name in request["netns"]:
                    place = await self._place(name)
                    for protocol, port in request["ports"]:
                        await place.open(protocol, port, place.label)
                        borrowed.append((place, protocol, port))
            case "forget":
                place_or_none = self.places.pop(request["netns"], None)
                if place_or_none is not None:
                    place_or_none.stop()
                    await asyncio.gather(*place_or_none.connections, return_exceptions=True)
            case "stop":
                self.stopping.set()
            case other:
                raise ValueError(f"no such request: {other}")

    async def _place(self, name: str) -> Place:
        if name not in self.places:
            place = Place(name)
            await place.start()
            self.places[name] = place
        return self.places[name]


async def run(directory: Path) -> None:
    server = Server()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.stopping.set)
    listener = await asyncio.start_unix_server(server.control, directory / "server.sock", limit=1 << 24)
    os.chmod(directory / "server.sock", 0o600)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    # Whoever started us reads one line; later output must not fill that pipe.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    await server.stopping.wait()
    listener.close()
    for place in server.places.values():
        place.stop()


if __name__ == "__main__":
    asyncio.run(run(Path(sys.argv[1])))
