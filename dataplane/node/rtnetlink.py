"""The few rtnetlink messages the agent needs: dumps of links, addresses, routes and neighbours, and
the group of a link.

A library that decodes every attribute of every message needs some 20 ms for the links of a full
node; these parsers read the six attributes that matter. Layouts: linux/rtnetlink.h,
linux/if_link.h, linux/neighbour.h, linux/pkt_cls.h; all numbers are in host byte order.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from typing import NamedTuple, Self

from dataplane.errors import KernelError

NETLINK_ROUTE = 0
NLMSG_ERROR, NLMSG_DONE = 2, 3
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR = 0x1, 0x4, 0x300, 0x10
NLM_F_CREATE, NLM_F_REPLACE = 0x400, 0x100
SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, NETLINK_NO_ENOBUFS = 270, 1, 5
SO_RCVBUFFORCE, SO_MEMINFO = 33, 55
ANSWER_TIMEOUT_S = 10.0
_MEMINFO = struct.Struct("=9I")  # SK_MEMINFO_…, linux/sock_diag.h; the last one is the number of drops

RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK, RTM_SETLINK = 16, 17, 18, 19
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
RTM_NEWNEIGH, RTM_DELNEIGH, RTM_GETNEIGH = 28, 29, 30
RTM_GETTFILTER = 46

# Multicast groups (enum rtnetlink_groups).
GROUP_LINK, GROUP_NEIGH, GROUP_IPV4_ADDR, GROUP_IPV4_ROUTE, GROUP_IPV6_ADDR, GROUP_IPV6_ROUTE = (
    1,
    3,
    5,
    7,
    9,
    11,
)
ALL_GROUPS = (GROUP_LINK, GROUP_NEIGH, GROUP_IPV4_ADDR, GROUP_IPV4_ROUTE, GROUP_IPV6_ADDR, GROUP_IPV6_ROUTE)

AF_UNSPEC, AF_INET, AF_BRIDGE, AF_INET6 = 0, 2, 7, 10
IFLA_ADDRESS, IFLA_IFNAME, IFLA_MASTER, IFLA_LINKINFO, IFLA_GROUP, IFLA_EXT_MASK = 1, 3, 10, 18, 27, 29
IFLA_INFO_KIND = 1
RTEXT_FILTER_SKIP_STATS = 8
IFF_UP = 1
IFA_ADDRESS, IFA_LOCAL = 1, 2
RTA_DST, RTA_OIF, RTA_GATEWAY, RTA_MULTIPATH, RTA_TABLE, RTA_VIA = 1, 4, 5, 9, 15, 18
RTN_UNICAST = 1
RTPROT_KERNEL, RTPROT_RA = 2, 9
RT_SCOPE_HOST = 254
NDA_DST, NDA_LLADDR, NDA_MASTER = 1, 2, 9
NTF_USE, NTF_SELF = 0x01, 0x02
NUD_PROBE, NUD_PERMANENT = 0x10, 0x80
TCA_KIND, TCA_OPTIONS, TCA_BPF_NAME = 1, 2, 7
CLSACT_PARENTS = (0xFFFFFFF2, 0xFFFFFFF3)  # ingress and egress, linux/pkt_sched.h

_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
_ATTRIBUTE = struct.Struct("=HH")  # struct rtattr
_LINK = struct.Struct("=BxHiII")  # struct ifinfomsg: family, type, index, flags, change
_ADDRESS = struct.Struct("=BBBBI")  # struct ifaddrmsg: family, prefix length, flags, scope, index
_ROUTE = struct.Struct("=BBBBBBBBI")  # struct rtmsg
_NEXT_HOP = struct.Struct("=HBBi")  # struct rtnexthop
_NEIGHBOUR = struct.Struct("=BxxxiHBB")  # struct ndmsg: family, index, state, flags, type
_TRAFFIC = struct.Struct("=BxxxiIII")  # struct tcmsg: family, index, handle, parent, info
_ATTRIBUTE_TYPE = 0x3FFF  # without NLA_F_NESTED and NLA_F_NET_BYTEORDER


class Overrun(Exception):
    """The kernel had more events than the socket could hold: what was seen is no longer complete."""


class LinkMessage(NamedTuple):
    """A link. `kind` is the rtnl_link_ops name (veth, bridge, dummy, vlan …), empty for hardware."""

    ifindex: int
    name: str
    kind: str
    master: int  # ifindex of the bridge, bond or VRF it belongs to; 0: none
    group: int
    up: bool


class AddressMessage(NamedTuple):
    ifindex: int
    address: bytes
    length: int
    scope: int


class RouteMessage(NamedTuple):
    """A unicast route. `hops` are (ifindex, gateway or None); a blackhole has none."""

    family: int  # AF_INET or AF_INET6
    table: int
    destination: bytes  # empty for a default route
    length: int
    protocol: int
    kind: int  # RTN_…
    hops: tuple[tuple[int, bytes | None], ...]


class NeighbourMessage(NamedTuple):
    """A neighbour entry, or for AF_BRIDGE an entry of a bridge's forwarding table."""

    family: int
    ifindex: int
    state: int
    flags: int
    address: bytes | None  # IP address; None for AF_BRIDGE
    mac: bytes | None
    master: int  # AF_BRIDGE: ifindex of the bridge


def _attributes(data: bytes, offset: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(type, start, end) of each attribute; stops at the first that does not fit."""
    while offset + 4 <= end:
        length, kind = _ATTRIBUTE.unpack_from(data, offset)
        if length < 4 or offset + length > end:
            return
        yield kind & _ATTRIBUTE_TYPE, offset + 4, offset + length
        offset += (length + 3) & ~3


def _u32(data: bytes, start: int) -> int:
    return int.from_bytes(data[start : start + 4], "little" if _LITTLE else "big")


_LITTLE = struct.pack("=H", 1) == b"\x01\x00"


def parse_link(data: bytes) -> LinkMessage | None:
    """The payload of RTM_NEWLINK or RTM_DELLINK; None for messages that are not about the link itself."""
    family, _, index, flags, _ = _LINK.unpack_from(data)
    if family != AF_UNSPEC:  # AF_BRIDGE: only the bridge port's attributes
        return None
    name = kind = ""
    master = group = 0
    for attribute, start, end in _attributes(data, _LINK.size, len(data)):
        if attribute == IFLA_IFNAME:
            name = data[start:end].rstrip(b"\0").decode(errors="replace")
        elif attribute == IFLA_MASTER:
            master = _u32(data, start)
        elif attribute == IFLA_GROUP:
            group = _u32(data, start)
        elif attribute == IFLA_LINKINFO:
            for inner, first, last in _attributes(data, start, end):
                if inner == IFLA_INFO_KIND:
                    kind = data[first:last].rstrip(b"\0").decode(errors="replace")
    return LinkMessage(index, name, kind, master, group, bool(flags & IFF_UP))


def parse_address(data: bytes) -> AddressMessage | None:
    """The payload of RTM_NEWADDR or RTM_DELADDR."""
    family, length, _, scope, index = _ADDRESS.unpack_from(data)
    if family not in {AF_INET, AF_INET6}:
        return None
    address = local = None
    for attribute, start, end in _attributes(data, _ADDRESS.size, len(data)):
        if attribute == IFA_LOCAL:  # on a point-to-point link IFA_ADDRESS is the peer's
            local = data[start:end]
        elif attribute == IFA_ADDRESS:
            address = data[start:end]
    found = local or address
    return AddressMessage(index, found, length, scope) if found else None


def parse_route(data: bytes) -> RouteMessage | None:
    """The payload of RTM_NEWROUTE or RTM_DELROUTE; None for other families than IP."""
    family, length, _, _, table, protocol, _, kind, _ = _ROUTE.unpack_from(data)
    if family not in {AF_INET, AF_INET6}:
        return None
    destination = b""
    gateway: bytes | None = None
    index = 0
    hops: list[tuple[int, bytes | None]] = []
    for attribute, start, end in _attributes(data, _ROUTE.size, len(data)):
        if attribute == RTA_DST:
            destination = data[start:end]
        elif attribute == RTA_OIF:
            index = _u32(data, start)
        elif attribute == RTA_GATEWAY:
            gateway = data[start:end]
        elif attribute == RTA_VIA:  # struct rtvia: family, address (an IPv6 gateway of an IPv4 route)
            gateway = data[start + 2 : end]
        elif attribute == RTA_TABLE:
            table = _u32(data, start)
        elif attribute == RTA_MULTIPATH:
            hops += _next_hops(data, start, end)
    if index:
        hops.append((index, gateway))
    return RouteMessage(family, table, destination, length, protocol, kind, tuple(hops))


def _next_hops(data: bytes, start: int, end: int) -> Iterator[tuple[int, bytes | None]]:
    while start + _NEXT_HOP.size <= end:
        length, _, _, index = _NEXT_HOP.unpack_from(data, start)
        if length < _NEXT_HOP.size or start + length > end:
            return
        gateway = None
        for attribute, first, last in _attributes(data, start + _NEXT_HOP.size, start + length):
            if attribute == RTA_GATEWAY:
                gateway = data[first:last]
            elif attribute == RTA_VIA:
                gateway = data[first + 2 : last]
        yield index, gateway
        start += (length + 3) & ~3


def parse_neighbour(data: bytes) -> NeighbourMessage | None:
    """The payload of RTM_NEWNEIGH or RTM_DELNEIGH."""
    family, index, state, flags, _ = _NEIGHBOUR.unpack_from(data)
    if family not in {AF_INET, AF_INET6, AF_BRIDGE}:
        return None
    address = mac = None
    master = 0
    for attribute, start, end in _attributes(data, _NEIGHBOUR.size, len(data)):
        if attribute == NDA_DST and family != AF_BRIDGE:
            address = data[start:end]
        elif attribute == NDA_LLADDR:
            mac = data[start:end]
        elif attribute == NDA_MASTER:
            master = _u32(data, start)
    return NeighbourMessage(family, index, state, flags, address, mac, master)


def parse_classifier(data: bytes) -> str | None:
    """The name of the BPF program of a traffic filter, None when it is of another kind."""
    kind, name = b"", ""
    for type_, start, end in _attributes(data, _TRAFFIC.size, len(data)):
        if type_ == TCA_KIND:
            kind = data[start:end].rstrip(b"\0")
        elif type_ == TCA_OPTIONS:
            for inner, at, until in _attributes(data, start, end):
                if inner == TCA_BPF_NAME:
                    name = data[at:until].rstrip(b"\0").decode(errors="replace")
    if kind != b"bpf":
        return None
    # The kernel lists the filter's head once more, without options.
    return name or None


def attribute(kind: int, value: bytes) -> bytes:
    """One encoded attribute, padded."""
    return _ATTRIBUTE.pack(4 + len(value), kind) + value + bytes(-len(value) % 4)


class RouteSocket:
    """A NETLINK_ROUTE socket of the network namespace of the calling thread."""

    def __init__(self, groups: tuple[int, ...] = (), *, receive_buffer: int = 1 << 20) -> None:
        try:
            self.socket = socket.socket(
                socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_ROUTE
            )
        except OSError as error:
            raise KernelError(f"rtnetlink: cannot open a socket: {error.strerror}") from error
        with contextlib.suppress(OSError):  # without CAP_NET_ADMIN the default size has to do
            self.socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, receive_buffer)
        self.socket.bind((0, 0))
        for group in groups:
            self.socket.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, group)
        # An overrun as a socket error would end the polling of libuv for good (uv__poll_io stops on
        # POLLERR). The drop counter tells as well, and whoever drops has left something to read.
        self.socket.setsockopt(SOL_NETLINK, NETLINK_NO_ENOBUFS, 1)
        # Dumps answer at once; a kernel that does not must not hang its caller for good.
        self.socket.settimeout(0 if groups else ANSWER_TIMEOUT_S)
        self._sequence = 0
        self._drops = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fileno(self) -> int:
        return self.socket.fileno()

    def close(self) -> None:
        self.socket.close()

    def _send(self, kind: int, flags: int, payload: bytes) -> int:
        self._sequence += 1
        size = _HEADER.size + len(payload)
        self.socket.send(_HEADER.pack(size, kind, flags, self._sequence, 0) + payload)
        return self._sequence

    def events(self) -> Iterator[tuple[int, bytes]]:
        """(message type, payload) of everything that waits; never blocks. Overrun when some were lost."""
        while True:
            try:
                data = self.socket.recv(1 << 16)
            except BlockingIOError:
                break
            for kind, _, _, payload in _messages(data):
                yield kind, payload
        drops = _MEMINFO.unpack(self.socket.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, _MEMINFO.size))[8]
        if drops != self._drops:
            self._drops = drops
            raise Overrun

    def dump(self, kind: int, payload: bytes) -> list[tuple[int, bytes]]:
        """Every message that answers one dump request, taken again when it changed meanwhile."""
        for _ in range(8):
            found, interrupted = self._dump_once(kind, payload)
            if not interrupted:
                break
        # Still changing after eight tries: the events that told of it bring another dump soon.
        return found

    def _dump_once(self, kind: int, payload: bytes) -> tuple[list[tuple[int, bytes]], bool]:
        sequence = self._send(kind, NLM_F_REQUEST | NLM_F_DUMP, payload)
        found: list[tuple[int, bytes]] = []
        interrupted = False
        while True:
            data = self.socket.recv(1 << 18)
            for answer, flags, number, body in _messages(data):
                if number != sequence:
                    continue
                interrupted = interrupted or bool(flags & NLM_F_DUMP_INTR)
                if answer == NLMSG_DONE:
                    return found, interrupted
                if answer == NLMSG_ERROR:
                    code = -struct.unpack_from("=i", body)[0]
                    raise KernelError(f"rtnetlink: dump {kind} refused: {os.strerror(code)}")
                found.append((answer, body))

    def request(self, kind: int, payload: bytes, flags: int = 0) -> None:
        """One change, acknowledged by the kernel. OSError with the kernel's error number."""
        sequence = self._send(kind, NLM_F_REQUEST | NLM_F_ACK | flags, payload)
        while True:
            for answer, _, number, body in _messages(self.socket.recv(1 << 16)):
                if number == sequence and answer == NLMSG_ERROR:
                    code = -struct.unpack_from("=i", body)[0]
                    if code:
                        raise OSError(code, os.strerror(code))
                    return

    def links(self) -> list[LinkMessage]:
        skip_stats = attribute(IFLA_EXT_MASK, struct.pack("=I", RTEXT_FILTER_SKIP_STATS))
        answers = self.dump(RTM_GETLINK, _LINK.pack(AF_UNSPEC, 0, 0, 0, 0) + skip_stats)
        return [link for _, body in answers if (link := parse_link(body)) is not None]

    def addresses(self) -> list[AddressMessage]:
        answers = self.dump(RTM_GETADDR, _ADDRESS.pack(AF_UNSPEC, 0, 0, 0, 0))
        return [found for _, body in answers if (found := parse_address(body)) is not None]

    def routes(self, family: int) -> list[RouteMessage]:
        """Routes of every table."""
        answers = self.dump(RTM_GETROUTE, _ROUTE.pack(family, 0, 0, 0, 0, 0, 0, 0, 0))
        return [
            route
            for _, body in answers
            if (route := parse_route(body)) is not None and route.family == family
        ]

    def neighbours(self, family: int) -> list[NeighbourMessage]:
        """Neighbour entries of AF_INET or AF_INET6, or with AF_BRIDGE forwarding tables."""
        # Older kernels read an ifinfomsg here for AF_BRIDGE, which is longer than a ndmsg.
        payload = _NEIGHBOUR.pack(family, 0, 0, 0, 0)
        if family == AF_BRIDGE:
            payload = _LINK.pack(AF_BRIDGE, 0, 0, 0, 0)
        answers = self.dump(RTM_GETNEIGH, payload)
        return [entry for _, body in answers if (entry := parse_neighbour(body)) is not None]

    def classifiers(self, ifindex: int) -> list[str]:
        """Names of the BPF programs that see the packets of a link, in either direction (clsact).

        Those attached as a link of their own (TCX) are not told by rtnetlink.
        """
        names = []
        for parent in CLSACT_PARENTS:
            try:
                answers = self.dump(RTM_GETTFILTER, _TRAFFIC.pack(AF_UNSPEC, ifindex, 0, parent, 0))
            except KernelError:  # no clsact here
                continue
            names += [name for _, body in answers if (name := parse_classifier(body)) is not None]
        return list(dict.fromkeys(names))

    def set_group(self, ifindex: int, group: int) -> None:
        """Give a link its device group. OSError ENODEV when it is gone."""
        payload = _LINK.pack(AF_UNSPEC, 0, ifindex, 0, 0) + attribute(IFLA_GROUP, struct.pack("=I", group))
        self.request(RTM_SETLINK, payload)

    def solicit(self, ifindex: int, address: bytes, mac: bytes | None = None) -> None:
        """Have the kernel ask (ARP, ND) which MAC an address has on this link; OSError when it cannot.

        `mac`: the one it is known to have. An entry that exists would otherwise be trusted for
        seconds before it is probed.
        """
        family = AF_INET if len(address) == 4 else AF_INET6
        state, flags = (NUD_PROBE, 0) if mac is not None else (0, NTF_USE)
        payload = _NEIGHBOUR.pack(family, ifindex, state, flags, 0) + attribute(NDA_DST, address)
        if mac is not None:
            payload += attribute(NDA_LLADDR, mac)
        self.request(RTM_NEWNEIGH, payload, NLM_F_CREATE | NLM_F_REPLACE)


def _messages(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """(type, flags, sequence, payload) of each message in a datagram."""
    offset = 0
    while offset + _HEADER.size <= len(data):
        length, kind, flags, sequence, _ = _HEADER.unpack_from(data, offset)
        if length < _HEADER.size or offset + length > len(data):
            return
        yield kind, flags, sequence, data[offset + _HEADER.size : offset + length]
        offset += (length + 3) & ~3
