"""The kernel's conntrack table: the live flows we judged, and how their judgement is taken back.

Everything acts in the network namespace of the calling thread and needs CAP_NET_ADMIN there. Each
call raises KernelError when the kernel refuses; flows may then still carry their bits, so the
caller tries again.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from dataplane import _conntrack
from dataplane._rules import RuleTable
from dataplane.config import MarkLayout
from dataplane.errors import KernelError

# enum tcp_conntrack and enum sctp_conntrack (linux/netfilter/nf_conntrack_tcp.h, …_sctp.h)
_TCP_STATES = (
    "NONE",
    "SYN_SENT",
    "SYN_RECV",
    "ESTABLISHED",
    "FIN_WAIT",
    "CLOSE_WAIT",
    "LAST_ACK",
    "TIME_WAIT",
    "CLOSE",
    "SYN_SENT2",
)
_SCTP_STATES = (
    "NONE",
    "CLOSED",
    "COOKIE_WAIT",
    "COOKIE_ECHOED",
    "ESTABLISHED",
    "SHUTDOWN_SENT",
    "SHUTDOWN_RECD",
    "SHUTDOWN_ACK_SENT",
    "HEARTBEAT_SENT",
)
# CTA_PROTOINFO_TCP and CTA_PROTOINFO_SCTP; in both the state is attribute 1, one byte.
_STATES = {1: _TCP_STATES, 3: _SCTP_STATES}
_NETLINK_NETFILTER, _DESTROYED = 12, 1 << 2  # linux/netlink.h; the bit of NFNLGRP_CONNTRACK_DESTROY
_SO_RCVBUFFORCE = 33
_ROOM = 8 << 20  # for the events of some ten thousand flows
_READ_AT_ONCE = 1024  # messages
_SEEN_REPLY, _ASSURED = 2, 4  # enum ip_conntrack_status


@dataclass(frozen=True, slots=True)
class Swept:
    """`seen` flows carried a bit and were looked at; `cleared` of them lost both."""

    seen: int
    cleared: int


@dataclass(frozen=True, slots=True)
class LiveFlow:
    """A flow of the kernel's conntrack table; an end that was judged passes without a queue.

    `src`, `sport`, `dst`, `dport` are the originator's packets before translation, `reply_…` the
    packets that answer them: (`src`, `sport`) to (`reply_src`, `reply_sport`) is what a pod's
    interface sees. Addresses are packed; ports are 0 for protocols without. `icmp` is (type, code,
    identifier). `timeout` is in seconds. Counters are None where the kernel does not count
    (net.netfilter.nf_conntrack_acct).
    """

    protocol: int
    src: bytes
    sport: int
    dst: bytes
    dport: int
    reply_src: bytes
    reply_sport: int
    reply_dst: bytes
    reply_dport: int
    icmp: tuple[int, int, int] | None
    state: str
    timeout: int
    egress: bool  # the egress of the originator's pod was judged
    ingress: bool  # the ingress of the responder's pod was judged
    mark: int
    zone: int
    packets: int | None = None
    bytes: int | None = None
    reply_packets: int | None = None
    reply_bytes: int | None = None


def rejudge(table: RuleTable, marks: MarkLayout, addresses: Collection[bytes] | None) -> Swept:
    """Take the bits of live flows that `table` denies, so that their next packet is judged.

    Only flows from or to `addresses` (packed; None: every flow). Call it when no worker announces
    an older table any more (`Publisher.quiesced`): a flow still being let in by the old table is
    not in conntrack yet.
    """
    return Swept(*_conntrack.sweep(table, marks.egress, marks.ingress, addresses))


def clear(marks: MarkLayout, addresses: Collection[bytes]) -> Swept:
    """Take the bits of every flow from or to `addresses`, whatever a table says."""
    return Swept(*_conntrack.sweep(None, marks.egress, marks.ingress, addresses))


def clear_all(marks: MarkLayout) -> Swept:
    """Take the bits of every flow: nothing of ours stays in conntrack."""
    return Swept(*_conntrack.sweep(None, marks.egress, marks.ingress, None))


def flows(marks: MarkLayout, *, unjudged: bool = False) -> list[LiveFlow]:
    """Every flow that carries one of our bits; with `unjudged`, those without too."""
    wanted = (0, 0) if unjudged else (marks.egress, marks.ingress)
    return [_live(entry, marks) for entry in _conntrack.dump(*wanted)]


class EndedFlows:
    """Hears of flows as the kernel forgets them. A network namespace's first listener turns events on.

    `overruns`: how often the kernel had no room for events; nobody knows for how many.
    """

    def __init__(self, marks: MarkLayout) -> None:
        """KernelError when the kernel refuses."""
        self.overruns = 0
        self._marks = marks
        try:
            self._socket = socket.socket(
                socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER
            )
            self._socket.setblocking(False)
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _ROOM)
            self._socket.bind((0, _DESTROYED))
        except OSError as error:
            raise KernelError(
                f"conntrack events: {error.strerror}; they need root (CAP_NET_ADMIN), and"
                " CONFIG_NF_CONNTRACK_EVENTS in the kernel"
            ) from None

    @property
    def counted(self) -> bool:
        """Whether the kernel counts packets and bytes of new flows."""
        try:
            return Path("/proc/sys/net/netfilter/nf_conntrack_acct").read_text().strip() != "0"
        except OSError:
            return False

    def fileno(self) -> int:
        """Readable when there is something to `read`."""
        return self._socket.fileno()

    def read(self) -> list[LiveFlow]:
        """The flows that have ended since the last call; it does not wait for any. KernelError."""
        found: list[LiveFlow] = []
        for _ in range(_READ_AT_ONCE):
            try:
                data, (port, _groups) = self._socket.recvfrom(1 << 16)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise KernelError(f"conntrack events: {os.strerror(error.errno or 0)}") from None
                self.overruns += 1
                continue
            if port == 0:  # of the kernel; any process may send
                found += [_live(entry, self._marks) for entry in _conntrack.parse(data, ended=True)]
        return found

    def close(self) -> None:
        """Hear no more."""
        self._socket.close()


def _live(entry: _conntrack._Entry, marks: MarkLayout) -> LiveFlow:
    original, reply, protocol, icmp, mark, status, timeout, zone, information, counters = entry
    packets, octets, reply_packets, reply_octets = counters or (None, None, None, None)
    return LiveFlow(
        protocol,
        *original,
        *reply,
        icmp=icmp,
        state=state_name(information, status),
        timeout=timeout,
        egress=bool(mark & marks.egress),
        ingress=bool(mark & marks.ingress),
        mark=mark,
        zone=zone,
        packets=packets,
        bytes=octets,
        reply_packets=reply_packets,
        reply_bytes=reply_octets,
    )


def state_name(information: bytes, status: int) -> str:
    """The flow's state: its protocol's where CTA_PROTOINFO tells one, else what conntrack saw of it."""
    if len(information) >= 4:
        names = _STATES.get(int.from_bytes(information[2:4], sys.byteorder) & 0x3FFF, ())
        inner = information[4:]
        while len(inner) >= 5:
            length = int.from_bytes(inner[:2], sys.byteorder)
            if int.from_bytes(inner[2:4], sys.byteorder) & 0x3FFF == 1 and inner[4] < len(names):
                return names[inner[4]]
            if length < 4:
                break
            inner = inner[(length + 3) & ~3 :]
    if status & _ASSURED:
        return "ASSURED"
    return "REPLIED" if status & _SEEN_REPLY else "UNREPLIED"
