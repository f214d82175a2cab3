"""Who can reach whom, asked with real packets, everything at once under one timeout.

One process makes the sockets inside each pod's namespace and waits for all of them together. A flow
is allowed when an answer from the right place comes back; a refusal counts as denied, since an
agent may answer for a pod that it protects (TCP reset, ICMP error).
"""

from __future__ import annotations

import contextlib
import errno
import resource
import secrets
import select
import socket
import struct
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import NamedTuple

from dataplane.addresses import family_of, format_address, parse_address
from dataplane.errors import InputError
from dataplane.lab import netns, sctp
from dataplane.lab.server import IPV6_FREEBIND
from dataplane.lab.topology import LabPod, Wire
from dataplane.lab.world import Lab
from dataplane.model import PROTOCOLS
from dataplane.reachability import ALLOWED, DENIED, NOT_JUDGED, Matrix

TCP, UDP, ICMP, SCTP, ICMP6 = 6, 17, 1, 132, 58
DEFAULT_TIMEOUT = 1.0
SENDS = 4  # datagrams are lost without anybody's ill will; each is sent this often within the timeout


class Port(NamedTuple):
    """What is probed: an IP protocol number and a port, 0 for ICMP (echo)."""

    protocol: int
    port: int

    @classmethod
    def parse(cls, text: str) -> Port:
        """`80/TCP`, `80` (TCP) or `ICMP`. InputError says what is wrong."""
        number, _, name = text.partition("/")
        if text.upper() == "ICMP":
            return cls(ICMP, 0)
        protocol = PROTOCOLS.get((name or "TCP").upper())
        if protocol is None or not (number.isascii() and number.isdigit()) or not 1 <= int(number) <= 65535:
            raise InputError(f"--port {text!r}: write it as 80/TCP, 53/UDP, 7/SCTP or ICMP")
        return cls(protocol, int(number))

    def __str__(self) -> str:
        if self.protocol == ICMP:
            return "ICMP"
        name = {number: text for text, number in PROTOCOLS.items()}[self.protocol]
        return f"{self.port}/{name}"


@dataclass(frozen=True, slots=True)
class Flow:
    """One question: can `netns`, speaking as `source`, reach `destination` on `port`?

    Addresses are packed; source None leaves the choice to the kernel.
    """

    netns: str
    source: bytes | None
    destination: bytes
    port: Port


@dataclass(slots=True)
class Answer:
    """What came back. `by` names the pod that answered (None: nobody, or an echo reply).

    `error` is the refusal, such as `ECONNREFUSED`, or empty when there was only silence.
    """

    reached: bool = False
    by: str | None = None
    error: str = ""
    seconds: float = 0.0


def probe(
    lab: Lab,
    ports: Sequence[str | Port] = ("80/TCP",),
    family: int | None = None,
    externals: Sequence[str] = (),
    timeout: float = DEFAULT_TIMEOUT,
) -> Matrix:
    """The matrix of a lab. `family` 4 or 6; default: that of the pods' first address.

    Ports that a pod does not serve are answered for the duration, so that the matrix shows the
    network and not who happens to listen. hostNetwork pods count as their node's address.
    """
    if family is None:
        pods = lab.pods.values()
        first = next((pod.ips[0] for pod in pods if pod.wire is not Wire.HOST and pod.ips), lab.node_ips[0])
        family = family_of(first)
    return probe_families(lab, ports, (family,), externals, timeout)[family]


def probe_families(
    lab: Lab,
    ports: Sequence[str | Port] = ("80/TCP",),
    families: Sequence[int] = (4, 6),
    externals: Sequence[str] = (),
    timeout: float = DEFAULT_TIMEOUT,
) -> dict[int, Matrix]:
    """The matrix of each family, as `probe` gives it. All are asked at once, under one timeout."""
    wanted = [port if isinstance(port, Port) else Port.parse(port) for port in ports]
    asked = [_Table(lab, family, wanted) for family in families]
    for text in externals:
        try:
            address = parse_address(text)
        except ValueError as error:
            raise InputError(f"--external: {error}") from None
        table = next((table for table in asked if table.family == family_of(address)), None)
        if table is None:
            named = " or ".join(f"IPv{family}" for family in families)
            raise InputError(f"--external {text}: not an {named} address; see --family")
        lab.add_external(text)
        table.ends.append(_End(text, lab.outside, address, pod=False))
    open_ports = {(port.protocol, port.port) for port in wanted if port.protocol != ICMP}
    flows = [table.flows() for table in asked]
    with lab.serving(dict.fromkeys(end.netns for table in asked for end in table.ends), open_ports):
        answers = iter(ask(list(chain.from_iterable(flows)), timeout))
    return {
        table.family: table.matrix(list(islice(answers, len(own))))
        for table, own in zip(asked, flows, strict=True)
    }


class _End(NamedTuple):
    """One row and column of a matrix."""

    name: str
    netns: str
    address: bytes
    pod: bool


class _Table:
    """One family's matrix while it is asked for: every pair but those of two ends outside."""

    def __init__(self, lab: Lab, family: int, ports: Sequence[Port]) -> None:
        self.family = family
        self.ports = ports
        self.ends: list[_End] = []
        for pod in lab.pods.values():
            address = next((ip for ip in pod.ips if family_of(ip) == family), None)
            if address is not None:
                self.ends.append(_End(str(pod.key), pod.netns, address, pod=True))

    def flows(self) -> list[Flow]:
        return [
            Flow(source.netns, source.address, destination.address, port)
            for port in self.ports
            for source in self.ends
            for destination in self.ends
            if _judged(source, destination)
        ]

    def matrix(self, answers: Sequence[Answer]) -> Matrix:
        """`answers` in the order of `flows`."""
        coming = iter(answers)
        return Matrix(
            tuple(end.name for end in self.ends),
            {
                str(port): tuple(
                    "".join(
                        (ALLOWED if next(coming).reached else DENIED)
                        if _judged(source, destination)
                        else (ALLOWED if source is destination else NOT_JUDGED)
                        for destination in self.ends
                    )
                    for source in self.ends
                )
                for port in self.ports
            },
        )


def _judged(source: _End, destination: _End) -> bool:
    return source is not destination and (source.pod or destination.pod)


def connect(
    lab: Lab,
    source: str,
    destination: str,
    port: str | Port = "80/TCP",
    family: int = 4,
    timeout: float = DEFAULT_TIMEOUT,
    from_address: str | None = None,
) -> Answer:
    """One question. `source` is a place of the lab; `destination` a place or an address."""
    if destination in ("node", "outside") or "/" in destination:
        destination = lab.address(destination, family)
    where = port if isinstance(port, Port) else Port.parse(port)
    own = parse_address(from_address) if from_address else None
    return ask([Flow(lab.netns(source), own, parse_address(destination), where)], timeout)[0]


def ask(flows: Sequence[Flow], timeout: float = DEFAULT_TIMEOUT) -> list[Answer]:
    """An answer for every flow, in order. Ends early once all have answered.

    While answers keep coming the timeout is extended a little, so that a busy machine does not turn
    "slow" into "denied"; never beyond three times `timeout`.
    """
    _raise_file_limit(2 * len(flows) + 64)
    run = _Run(flows, timeout)
    try:
        run.go()
    finally:
        run.close()
    return run.answers


class _Run:
    def __init__(self, flows: Sequence[Flow], timeout: float) -> None:
        self.flows = flows
        self.timeout = timeout
        self.answers = [Answer() for _ in flows]
        self.pending = set(range(len(flows)))
        self.sockets: list[socket.socket] = []
        self.by_fd: dict[int, tuple[socket.socket, list[int]]] = {}
        self.connected: set[int] = set()
        self.tokens: dict[bytes, int] = {}  # UDP, by a word in the datagram
        self.echoes: dict[tuple[int, int], int] = {}  # ICMP, by identifier and sequence number
        self.tags: dict[int, int] = {}  # SCTP, by the tag that the answer must carry
        self.messages: dict[int, tuple[socket.socket, bytes, tuple[str, int]]] = {}
        self.epoll = select.epoll()

    def go(self) -> None:
        spaces: dict[str, list[int]] = {}
        for number, flow in enumerate(self.flows):
            spaces.setdefault(flow.netns, []).append(number)
        for space, numbers in spaces.items():
            netns.inside(space, partial(self._prepare, numbers))
        began = time.monotonic()
        for number in self.messages:
            self._send(number)
        deadline, last = began + self.timeout, began + 3 * self.timeout
        sends = 1
        while self.pending:
            now = time.monotonic()
            if now >= deadline:
                break
            next_send = began + sends * self.timeout / SENDS
            if now >= next_send and sends < SENDS:
                sends += 1
                for number in self.pending & self.messages.keys():
                    self._send(number)
                continue
            wait = min(deadline, next_send if sends < SENDS else deadline) - now
            before = len(self.pending)
            for fd, _ in self.epoll.poll(max(wait, 0)):
                sock, numbers = self.by_fd[fd]
                self._ready(sock, numbers, began)
            if len(self.pending) < before:
                deadline = min(last, max(deadline, time.monotonic() + self.timeout / 2))

    def close(self) -> None:
        self.epoll.close()
        for sock in self.sockets:
            sock.close()

    # Runs on a thread inside the namespace: the sockets made here stay there.
    def _prepare(self, numbers: Sequence[int]) -> None:
        shared: dict[tuple[int, int, bytes | None], socket.socket] = {}
        for number in numbers:
            flow = self.flows[number]
            if flow.port.protocol == TCP:
                self._prepare_tcp(number, flow)
                continue
            key = (flow.port.protocol, len(flow.destination), flow.source)
            if key not in shared:
                shared[key] = self._shared_socket(flow)
            self._prepare_message(number, flow, shared[key])

    def _prepare_tcp(self, number: int, flow: Flow) -> None:
        try:
            sock = self._new(flow, socket.SOCK_STREAM, 0)
            # Closing with a reset leaves no TIME_WAIT behind: thousands of probes reuse the ports.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            code = sock.connect_ex((format_address(flow.destination), flow.port.port))
        except OSError as error:
            self._refused(number, error.errno or 0)
            return
        if code not in (0, errno.EINPROGRESS):
            self._refused(number, code)
            return
        self._watch(sock, [number], select.EPOLLOUT)

    def _shared_socket(self, flow: Flow) -> socket.socket:
        v4 = len(flow.destination) == 4
        if flow.port.protocol == UDP:
            sock = self._new(flow, socket.SOCK_DGRAM, 0)
        elif flow.port.protocol == SCTP:
            sock = self._new(flow, socket.SOCK_RAW, SCTP)
        else:
            sock = self._new(flow, socket.SOCK_RAW, ICMP if v4 else ICMP6)
        # A burst of questions brings a burst of answers.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        self._watch(sock, [], select.EPOLLIN)
        return sock

    def _prepare_message(self, number: int, flow: Flow, sock: socket.socket) -> None:
        self.by_fd[sock.fileno()][1].append(number)
        v4 = len(flow.destination) == 4
        if flow.port.protocol == UDP:
            token = secrets.token_hex(8).encode()
            self.tokens[token] = number
            message = token
        elif flow.port.protocol == SCTP:
            tag = secrets.randbits(32) | 1
            self.tags[tag] = number
            message = sctp.init(20000 + secrets.randbelow(40000), flow.port.port, tag)
        else:
            echo = (secrets.randbits(16), secrets.randbits(16))
            self.echoes[echo] = number
            message = struct.pack("!BBHHH", 8 if v4 else 128, 0, 0, *echo) + b"podgate!"
            if v4:  # the kernel fills in ICMPv6 checksums only
                message = message[:2] + _internet_checksum(message) + message[4:]
        # Raw IPv6 sockets want port 0.
        port = flow.port.port if flow.port.protocol == UDP else 0
        self.messages[number] = (sock, message, (format_address(flow.destination), port))

    def _new(self, flow: Flow, kind: int, protocol: int) -> socket.socket:
        family = socket.AF_INET if len(flow.destination) == 4 else socket.AF_INET6
        sock = socket.socket(family, kind | socket.SOCK_NONBLOCK, protocol)
        self.sockets.append(sock)
        sock.setblocking(False)
        if flow.source is not None:
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)
            sock.bind((format_address(flow.source), 0))
        return sock

    def _watch(self, sock: socket.socket, numbers: list[int], events: int) -> None:
        self.by_fd[sock.fileno()] = (sock, numbers)
        self.epoll.register(sock, events)

    def _send(self, number: int) -> None:
        sock, message, to = self.messages[number]
        try:
            sock.sendto(message, to)
        except BlockingIOError:
            pass  # the next round tries again
        except OSError as error:
            if error.errno in (errno.EPERM, errno.ENOBUFS, errno.ECONNREFUSED, errno.EHOSTUNREACH):
                self.answers[number].error = errno.errorcode[error.errno]
            else:
                self._refused(number, error.errno or 0)

    def _ready(self, sock: socket.socket, numbers: list[int], began: float) -> None:
        if sock.type == socket.SOCK_STREAM:
            self._tcp_ready(sock, numbers[0], began)
            return
        while True:
            try:
                data, peer = sock.recvfrom(65536)
            except BlockingIOError:
                return
            except OSError:
                continue  # an ICMP error about some datagram; the flow itself stays unanswered
            self._message(sock, data, peer[0], began)

    def _tcp_ready(self, sock: socket.socket, number: int, began: float) -> None:
        try:
            if number not in self.connected:
                code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if code:
                    raise OSError(code, "")
                self.connected.add(number)
                sock.send(b"who\n")
                self.epoll.modify(sock, select.EPOLLIN)
                return
            data = sock.recv(4096)
        except BlockingIOError:
            return
        except OSError as error:
            self._refused(number, error.errno or 0)
            self._unwatch(sock)
            return
        if data:
            self._reached(number, data.decode(errors="replace").strip(), began)
        else:
            self._refused(number, errno.ECONNRESET)
        self._unwatch(sock)

    def _message(self, sock: socket.socket, data: bytes, peer: str, began: float) -> None:
        number: int | None = None
        by: str | None = None
        if sock.type == socket.SOCK_DGRAM:
            token, _, name = data.strip().partition(b" ")
            number, by = self.tokens.get(token), name.decode(errors="replace")
        else:
            if sock.family == socket.AF_INET:  # raw IPv4 sockets give the IP header too
                data = data[(data[0] & 15) * 4 :]
            if sock.proto == SCTP:
                packet = sctp.parse(data)
                if packet is None or packet.chunk not in (sctp.INIT_ACK, sctp.ABORT):
                    return
                number = self.tags.get(packet.tag)
                if number is not None and packet.chunk == sctp.ABORT:
                    self._refused(number, errno.ECONNREFUSED)
                    return
                by = packet.cookie.decode(errors="replace")
                if number in self.pending:
                    with contextlib.suppress(OSError):
                        sock.sendto(sctp.end(packet), self.messages[number][2])
            elif len(data) >= 8 and data[0] in (0, 129):
                number = self.echoes.get(struct.unpack_from("!HH", data, 4))
        # An answer from elsewhere than where the question went is no answer.
        if number is not None and parse_address(peer.partition("%")[0]) == self.flows[number].destination:
            self._reached(number, by, began)

    def _reached(self, number: int, by: str | None, began: float) -> None:
        if number in self.pending:
            self.pending.discard(number)
            self.answers[number] = Answer(True, by, "", time.monotonic() - began)

    def _refused(self, number: int, code: int) -> None:
        if number in self.pending:
            self.pending.discard(number)
            self.answers[number].error = errno.errorcode.get(code, str(code))

    def _unwatch(self, sock: socket.socket) -> None:
        self.epoll.unregister(sock)
        sock.close()


def _internet_checksum(data: bytes) -> bytes:
    """RFC 1071, for data of even length."""
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return struct.pack("!H", ~total & 0xFFFF)


def _raise_file_limit(wanted: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted + 64:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, wanted + 64)), hard))


def served(lab: Lab) -> Iterable[tuple[LabPod, Port]]:
    """Every pod with every port it serves."""
    for pod in lab.pods.values():
        for port in pod.ports:
            yield pod, Port(port.protocol, port.port)
