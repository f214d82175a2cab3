"""The plain queue backend: the NetfilterQueue package, one Python callback per packet.

It gives the same verdicts and marks as the native loop, and is slower: one packet per system call,
no GSO (the kernel cuts every large TCP packet into segments first), the GIL held in the callback.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import warnings
from collections.abc import Callable
from typing import TypedDict

from netfilterqueue import COPY_PACKET, NetfilterQueue, Packet

from dataplane._engine import Worker
from dataplane._nfqueue import holder_of
from dataplane.config import MarkLayout
from dataplane.errors import KernelError
from dataplane.reasons import Reason
from dataplane.verdict import Verdict

# The engine needs headers only; as in the native loop, longer extension headers are denied.
COPY_RANGE = 256
SOCKET_BYTES = 2048  # skb->truesize of one queued message of so few bytes, at most (see _nfqueue)
BIT_EGRESS, BIT_INGRESS = 1, 2

# linux/netfilter/nfnetlink_queue.h
_CONFIG = 3 << 8 | 2  # NFNL_SUBSYS_QUEUE, NFQNL_MSG_CONFIG
_CFG_MASK, _CFG_FLAGS, _F_FAIL_OPEN = 4, 5, 1


class Path(TypedDict):
    """How a packet came, as `Worker.judge` wants it."""

    indev: int
    outdev: int
    hook: int
    reply: bool
    wire: int


def take_queue(
    number: int, callback: Callable[[Packet], None], *, maxlen: int, copied: int, fail_open: bool
) -> NetfilterQueue:
    """Bind a queue of this network namespace; `callback` gets the first `copied` bytes of its packets.

    KernelError says who holds it or what is missing.
    """
    holder = holder_of(number)
    if holder is not None:
        raise KernelError(
            f"queue {number} is held by another process (netlink port {holder}, usually its "
            "process id): stop it, or choose other queue numbers with --queue-base"
        )
    try:
        queue = NetfilterQueue()
        with warnings.catch_warnings():
            # "rcvbuf limit is now …": it is always twice what was asked for, or rmem_max.
            warnings.simplefilter("ignore", RuntimeWarning)
            queue.bind(
                number,
                callback,
                max_len=maxlen,
                mode=COPY_PACKET,
                range=copied,
                sock_len=maxlen * (SOCKET_BYTES // 2 + copied - COPY_RANGE),
            )
    except OSError as error:
        raise KernelError(
            f"queue {number} cannot be bound: {error}; it needs root (CAP_NET_ADMIN) in this "
            "network namespace and CONFIG_NETFILTER_NETLINK_QUEUE"
        ) from None
    if fail_open:
        _set_fail_open(number, queue.get_fd())
    return queue


def _set_fail_open(number: int, fd: int) -> None:
    """The package has no call for flags; its own socket may set them."""
    attributes = struct.pack("=HHI", 8, _CFG_MASK, socket.htonl(_F_FAIL_OPEN))
    attributes += struct.pack("=HHI", 8, _CFG_FLAGS, socket.htonl(_F_FAIL_OPEN))
    body = struct.pack("=BBH", 0, 0, socket.htons(number)) + attributes
    message = struct.pack("=IHHII", 16 + len(body), _CONFIG, 1, 0, 0) + body
    with socket.socket(fileno=os.dup(fd)) as link:
        link.sendto(message, (0, 0))


def payload_of(packet: Packet) -> bytes:
    """What was copied of a packet, nothing included."""
    return packet.get_payload() if packet.get_payload_len() else b""


def path_of(packet: Packet, payload: bytes, marks: MarkLayout, copied: int) -> Path:
    """How a packet came whose `payload` was copied up to `copied` bytes."""
    return {
        "indev": packet.physindev or packet.indev,
        "outdev": packet.physoutdev or packet.outdev,
        "hook": packet.hook,
        "reply": bool(packet.mark & marks.reply),
        "wire": wire_length(payload, copied),
    }


def kernel_answer(
    verdict: Verdict, own: int, marks: MarkLayout, *, offload: bool, reject: bool
) -> tuple[bool, int]:
    """Whether the kernel is to accept a packet of the mark `own`, and the mark that it then has."""
    if reject and not verdict.allow and verdict.reason is Reason.NO_RULE:
        return True, own | marks.mask  # the rules behind the queue answer and drop it
    mark = own & ~marks.mask
    if verdict.allow and offload:
        if verdict.bits & BIT_EGRESS:
            mark |= marks.egress
        if verdict.bits & BIT_INGRESS:
            mark |= marks.ingress
    return verdict.allow, mark


class PlainQueue:
    """One queue of the network namespace that `bind` is called in, judged by `worker`."""

    def __init__(
        self,
        worker: Worker,
        number: int,
        *,
        marks: MarkLayout,
        offload: bool = True,
        fail_open: bool = False,
        maxlen: int = 1024,
    ) -> None:
        self.worker = worker
        self.number = number
        self.maxlen = maxlen
        self.fail_open = fail_open
        self._marks = marks
        self._offload = offload
        self._queue: NetfilterQueue | None = None
        self._wake = -1
        self._stopping = False
        self._losses = {"failed_judgements": 0, "packets": 0}

    def bind(self) -> None:
        """Take the queue. KernelError says who holds it or what is missing."""
        self._stopping = False
        self._queue = take_queue(
            self.number, self._judge, maxlen=self.maxlen, copied=COPY_RANGE, fail_open=self.fail_open
        )
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def run(self) -> None:
        """Judge packets until `stop`. KernelError when the socket fails."""
        if self._queue is None:
            raise KernelError(f"queue {self.number} is not bound")
        fd = self._queue.get_fd()
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        while not self._stopping:
            poll.poll()
            try:
                self._queue.run(block=False)
            except OSError as error:
                raise KernelError(f"queue {self.number}: receiving packets failed: {error}") from None

    def stop(self) -> None:
        """Make `run` return after the packets already delivered. From any thread."""
        self._stopping = True
        if self._wake >= 0:
            os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        """Give the queue back; the kernel drops what is still in it. Not while `run` runs."""
        queue, self._queue = self._queue, None
        if queue is not None:
            queue.unbind()
            del queue
            os.close(self._wake)
            self._wake = -1

    def losses(self) -> dict[str, int]:
        """Packets that went wrong, and how many there were."""
        return dict(self._losses)

    def _judge(self, packet: Packet) -> None:
        # An exception in here would end `run` and leave the packet queued for ever: one packet
        # must not be able to stop the queue, so it is dropped (in audit let through), counted and shown as
        # a problem.
        try:
            accept, mark = self._verdict(packet)
        except Exception:
            self._losses["failed_judgements"] += 1
            accept, mark = self.worker.audit, packet.mark & ~self._marks.mask
        self._losses["packets"] += 1
        if accept:
            packet.set_mark(mark)
            packet.accept()
        else:
            packet.drop()

    def _verdict(self, packet: Packet) -> tuple[bool, int]:
        payload = payload_of(packet)
        verdict = self.worker.judge(payload, **path_of(packet, payload, self._marks, COPY_RANGE))
        return kernel_answer(
            verdict, packet.mark, self._marks, offload=self._offload, reject=self.worker.reject
        )


def wire_length(payload: bytes, copied: int = COPY_RANGE) -> int:
    """The length of the whole packet. The package hides NFQA_CAP_LEN, so the IP header tells.

    The kernel has trimmed the packet to that length before any hook sees it (ip_rcv_core,
    ip6_rcv_core); a jumbogram's length field is 0, which leaves what was copied.
    """
    length = len(payload)
    if length < copied:
        return length
    if payload[0] >> 4 == 4:
        return max(length, int.from_bytes(payload[2:4]))
    return max(length, 40 + int.from_bytes(payload[4:6]))
