"""The queue of a user's hook: whole packets, on the event loop, each answered whenever it is decided.

The NetfilterQueue package reads it. What it copies of a packet is limited (`COPIED` bytes).
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from collections.abc import Callable

from netfilterqueue import NetfilterQueue
from netfilterqueue import Packet as KernelPacket

from dataplane.config import MarkLayout
from dataplane.node.netfilterqueue_backend import Path, path_of, payload_of, take_queue
from dataplane.node.queues import QueueStats, open_proc, read_stats

COPIED = 4016  # the package's receive buffer of 4096 bytes, less what it keeps for other attributes
AT_ONCE = 32  # packets that are read before anything else in the event loop has its turn
MAXLEN = 2048  # packets in the kernel's queue, those that wait for a decision included
_SIOCGIFMTU = 0x8921  # linux/sockios.h


class HeldPacket:
    """A packet that waits for its verdict. `payload`: from its network header on, `path`: how it came."""

    def __init__(self, packet: KernelPacket, marks: MarkLayout) -> None:
        self._packet = packet
        self.payload = payload_of(packet)
        self.path: Path = path_of(packet, self.payload, marks, COPIED)
        self.mark: int = packet.mark

    @property
    def whole(self) -> bool:
        """Whether all of it is here."""
        return len(self.payload) == self.path["wire"]

    def give(self, accept: bool, mark: int, payload: bytes | None = None) -> None:
        """Give the verdict. `payload` goes on in the place of what came."""
        if not accept:
            self._packet.drop()
            return
        if payload is not None:
            self._packet.set_payload(payload)
        self._packet.set_mark(mark)
        self._packet.accept()


class HookQueue:
    """One queue of the network namespace that `open` is called in. Not for several threads.

    `taken` gets every packet and must see to its verdict, then or later; it must not raise.
    """

    def __init__(
        self, number: int, taken: Callable[[HeldPacket], None], *, marks: MarkLayout, fail_open: bool
    ) -> None:
        self.number = number
        self._taken = taken
        self._marks = marks
        self._fail_open = fail_open
        self._queue: NetfilterQueue | None = None
        self._socket: socket.socket | None = None
        self._proc = -1
        self._left = 0

    @property
    def is_open(self) -> bool:
        """Whether the queue is ours."""
        return self._queue is not None

    def open(self) -> int:
        """Take the queue; the file descriptor that is readable when there are packets. KernelError."""
        self._proc = open_proc()
        try:
            self._queue = take_queue(
                self.number, self._take, maxlen=MAXLEN, copied=COPIED, fail_open=self._fail_open
            )
        except BaseException:
            self._close_proc()
            raise
        self._socket = socket.socket(fileno=os.dup(self._queue.get_fd()))
        return self._socket.fileno()

    def read(self) -> bool:
        """Take some of the packets that are there; whether there may be more."""
        if self._queue is None:
            return False
        self._left = AT_ONCE
        self._queue.run_socket(self)  # type: ignore[arg-type]  # `recv` is all that it calls
        return self._left < 0

    def recv(self, size: int) -> bytes:
        """For `run_socket` of the package, which reads until nothing is there."""
        self._left -= 1
        if self._left < 0:
            raise BlockingIOError(errno.EAGAIN, "enough for now")
        assert self._socket is not None
        return self._socket.recv(size, socket.MSG_DONTWAIT)

    def close(self) -> None:
        """Give the queue back. The kernel drops what still waits in it."""
        queue, self._queue = self._queue, None
        if queue is not None and self._socket is not None:
            self._socket.close()
            queue.unbind()
            self._close_proc()

    def _close_proc(self) -> None:
        os.close(self._proc)
        self._proc = -1

    def stats(self) -> QueueStats | None:
        """The queue as the kernel counts it, None when it is not ours."""
        return read_stats(self._proc).get(self.number) if self._proc >= 0 else None

    def _take(self, packet: KernelPacket) -> None:
        self._taken(HeldPacket(packet, self._marks))


def longest_packet(outdev: int) -> int:
    """The MTU of an interface; what fits in a packet at all for one that is not known (0) or gone."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            name = socket.if_indextoname(outdev)
            answer = fcntl.ioctl(any_socket, _SIOCGIFMTU, struct.pack("16s24x", name.encode()))
        except (OSError, OverflowError):
            return 0xFFFF
    return int(struct.unpack_from("16xi", answer)[0])
