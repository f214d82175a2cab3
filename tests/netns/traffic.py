"""Sockets in the places of a lab: datagrams under any source address, and streams that keep coming."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections.abc import Iterator

from dataplane.lab import netns
from dataplane.lab.world import Lab

IP_TRANSPARENT, IPV6_TRANSPARENT = 19, 75  # linux/in.h, linux/in6.h
SO_RCVBUFFORCE = 33  # asm-generic/socket.h
QUIET_SECONDS = 0.4  # silence that counts as silence: many times what a packet needs
FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}


def udp(lab: Lab, place: str, port: int, *, family: int = 4, address: str | None = None) -> socket.socket:
    """A UDP socket of a place. With `address` it speaks as that address, its own or not."""
    where = lab.netns(place)
    made = netns.make_socket(where, FAMILIES[family], socket.SOCK_DGRAM)
    made.setblocking(False)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Room for a flood: what the test counts must not get lost here.
    made.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 16 << 20)
    if address is not None:
        if family == 4:
            made.setsockopt(socket.IPPROTO_IP, IP_TRANSPARENT, 1)
        else:
            made.setsockopt(socket.IPPROTO_IPV6, IPV6_TRANSPARENT, 1)
    made.bind((address or ("0.0.0.0" if family == 4 else "::"), port))
    return made


def received(sock: socket.socket, seconds: float = QUIET_SECONDS, count: int = 0) -> list[bytes]:
    """Datagrams that arrive until `count` are there, or for `seconds`."""
    deadline = time.monotonic() + seconds
    found: list[bytes] = []
    while not count or len(found) < count:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([sock], [], [], left)[0]:
            break
        with contextlib.suppress(OSError):
            found.append(sock.recv(65536))
    return found


def passes(source: socket.socket, to: tuple[str, int], target: socket.socket, seconds: float = 2.0) -> bool:
    """Whether a datagram from `source` to `to` arrives at `target` within `seconds`; sent several times."""
    received(target, 0.0)
    word = f"probe {time.monotonic_ns()}".encode()
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):  # an ICMP error about the one before, or EPERM
            source.sendto(word, to)
        if word in received(target, min(0.1, seconds / 4), 1):
            return True
    return False


def arrives(source: socket.socket, to: tuple[str, int], target: socket.socket) -> bool:
    """The same with the short patience that is enough to see a denial."""
    return passes(source, to, target, QUIET_SECONDS)


class Stream:
    """A TCP connection from a place to a pod of the lab, whose server sends a line every 20 ms."""

    def __init__(self, lab: Lab, source: str, destination: str, *, family: int = 4, port: int = 80) -> None:
        self.sock = lab.make_socket(source, FAMILIES[family], socket.SOCK_STREAM)
        self.sock.settimeout(5)
        address = lab.address(destination, family) if "/" in destination else destination
        self.sock.connect((address, port))
        self.sock.sendall(b"stream\n")
        assert self.sock.recv(4096)
        self.sock.setblocking(False)

    def flows(self, seconds: float = 5.0) -> bool:
        """Whether data comes now, other than what had arrived before."""
        self._drain()
        if not select.select([self.sock], [], [], seconds)[0]:
            return False
        return bool(self._drain())

    def silent(self, seconds: float = 0.5) -> bool:
        """Whether nothing comes for so long. What is under way when it is called may still arrive."""
        time.sleep(0.05)
        self._drain()
        return not select.select([self.sock], [], [], seconds)[0]

    def _drain(self) -> int:
        total = 0
        with contextlib.suppress(BlockingIOError):
            while data := self.sock.recv(65536):
                total += len(data)
        return total

    def close(self) -> None:
        self.sock.close()


@contextlib.contextmanager
def sending(source: socket.socket, to: tuple[str, int], interval: float = 0.002) -> Iterator[None]:
    """Send datagrams without a pause for as long as the block runs."""
    stop = threading.Event()

    def work() -> None:
        while not stop.wait(interval):
            with contextlib.suppress(OSError):
                source.sendto(b"again", to)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
