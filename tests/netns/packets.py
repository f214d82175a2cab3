"""Packets for tests: reachability written as rows, streams that check themselves, frames made by hand."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from objects import until

from dataplane.addresses import family_of, parse_address
from dataplane.lab.probe import Flow, Port, ask
from dataplane.lab.world import Lab
from dataplane.reachability import ALLOWED, DENIED

FAMILIES = (4, 6)
BLOCK = struct.Struct("!Q56x")
TCP_INFO_TOTAL_RETRANS = 100  # offset in struct tcp_info (linux/tcp.h)
ETH_P = {4: 0x0800, 6: 0x86DD}

# source, destination, ports with blanks in between, one character per port: `.` allowed, `X` denied
Row = tuple[str, str, str, str]


def check(lab: Lab, *rows: Row, families: Sequence[int] = FAMILIES, timeout: float = 1.0) -> None:
    """Every row holds with real packets, on every family, all asked at once.

    A destination is a place of the lab or an address outside it; one of the other family is left out
    there. Ports that nobody serves are answered for the while.
    """
    flows: list[Flow] = []
    wanted: list[tuple[str, str]] = []
    spaces: dict[str, None] = {}
    ports: dict[tuple[int, int], None] = {}
    for source, destination, texts, verdicts in rows:
        names = texts.split()
        assert len(names) == len(verdicts), (texts, verdicts)
        assert set(verdicts) <= {ALLOWED, DENIED}, verdicts
        for family in families:
            to = _address(lab, destination, family)
            if to is None:
                continue
            spaces[
                lab.outside if destination[0].isdigit() or ":" in destination else lab.netns(destination)
            ] = None
            own = parse_address(lab.address(source, family)) if "/" in source else None
            for name, verdict in zip(names, verdicts, strict=True):
                port = Port.parse(name)
                if port.port:
                    ports[port.protocol, port.port] = None
                flows.append(Flow(lab.netns(source), own, to, port))
                wanted.append((verdict, f"IPv{family} {source} -> {destination} {name}"))
    with lab.serving(spaces, ports):
        answers = ask(flows, timeout)
    wrong = [
        f"{text}: {'allowed' if answer.reached else 'denied'} {answer.error}"
        for (verdict, text), answer in zip(wanted, answers, strict=True)
        if answer.reached != (verdict == ALLOWED)
    ]
    assert not wrong, "\n".join(wrong)


def _address(lab: Lab, destination: str, family: int) -> bytes | None:
    if destination in ("node", "outside") or "/" in destination:
        return parse_address(lab.address(destination, family))
    address = parse_address(destination)
    return address if family_of(address) == family else None


def af(family: int) -> int:
    return socket.AF_INET if family == 4 else socket.AF_INET6


class Stream:
    """A TCP connection between two places with numbered blocks under way, checked as they arrive.

    `sender`: "client" or "server" keeps sending; the other side only reads. `received` counts the
    blocks that came in order and whole; anything else ends up in `fault`.
    """

    def __init__(
        self, lab: Lab, client: str, server: str, family: int = 4, sender: str = "client", port: int = 80
    ) -> None:
        self.received = 0
        self.fault: str | None = None
        self.gap = 0.0  # the longest pause between two arrivals
        self.sender = sender
        self._stop = threading.Event()
        # Its own port number: the lab serves those of the pods.
        with lab.make_socket(server, af(family), socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((lab.address(server, family), port))
            listener.listen()
            listener.settimeout(5)
            self.client = lab.make_socket(client, af(family), socket.SOCK_STREAM)
            self.client.settimeout(5)
            self.client.connect((lab.address(server, family), port))
            self.server, _ = listener.accept()
        self.client_port = self.client.getsockname()[1]
        ends = (self.client, self.server) if sender == "client" else (self.server, self.client)
        self._out, self._in = ends
        self._out.settimeout(30)
        self._in.settimeout(0.2)
        self._threads = [threading.Thread(target=self._send), threading.Thread(target=self._receive)]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Stream:
        until(lambda: self.received > 5, what="the stream flows")
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._stop.set()
        for sock in (self.client, self.server):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5)
        self.client.close()
        self.server.close()

    @property
    def retransmitted(self) -> int:
        """Segments that the sender had to send again."""
        info = self._out.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192)
        return int(struct.unpack_from("=I", info, TCP_INFO_TOTAL_RETRANS)[0])

    def assert_flows(self, blocks: int = 40) -> None:
        """It is alive: so many more blocks arrive, all in order."""
        before = self.received
        # After a cut the next repetition may be as far off as the cut was long (RFC 6298 §5.5).
        until(
            lambda: self.received >= before + blocks or self.fault, timeout=30, what=f"{blocks} more blocks"
        )
        assert self.fault is None

    def assert_cut(self, within: float = 1.0, watch: float = 0.6) -> None:
        """Nothing arrives any more, `within` seconds from now."""
        deadline = time.monotonic() + within
        quiet_since, before = time.monotonic(), self.received
        while time.monotonic() - quiet_since < watch:
            time.sleep(0.02)
            if self.received != before:
                quiet_since, before = time.monotonic(), self.received
                assert quiet_since < deadline, f"still flowing after {within} s"
        assert self.fault is None

    def _send(self) -> None:
        number = 0
        with contextlib.suppress(OSError):
            while not self._stop.wait(0.004):
                self._out.sendall(BLOCK.pack(number))
                number += 1

    def _receive(self) -> None:
        data = b""
        last = time.monotonic()
        while not self._stop.is_set():
            try:
                more = self._in.recv(65536)
            except TimeoutError:
                continue
            except OSError as error:
                if not self._stop.is_set():
                    self.fault = str(error)
                return
            if not more:
                if not self._stop.is_set():
                    self.fault = "ended"
                return
            now = time.monotonic()
            self.gap, last = max(self.gap, now - last), now
            data += more
            while len(data) >= BLOCK.size:
                (number,) = BLOCK.unpack_from(data)
                if number != self.received:
                    self.fault = f"block {number} after {self.received}"
                    return
                data = data[BLOCK.size :]
                self.received += 1


class Events:
    """The agent's live verdicts, read in the background while the block runs."""

    def __init__(self, control: Path, capture: str = "all") -> None:
        self.rows: list[dict[str, Any]] = []
        self._connection = http.client.HTTPConnection("agent", timeout=5)
        self._connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._connection.sock.settimeout(30)
        self._connection.sock.connect(str(control))
        self._raw = self._connection.sock
        self._connection.request("GET", f"/events?capture={capture}")
        self._response = self._connection.getresponse()
        self._thread = threading.Thread(target=self._read)

    def __enter__(self) -> Events:
        self._thread.start()
        time.sleep(0.05)  # capturing begins right after the header: nothing tells when
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._raw.shutdown(socket.SHUT_RDWR)
        self._thread.join(5)
        self._connection.close()
        self._raw.close()

    def _read(self) -> None:
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError, AttributeError):
            while line := self._response.readline():
                self.rows.append(json.loads(line))

    def of(self, *ports: int, **fields: Any) -> list[dict[str, Any]]:
        """Those with one of these port numbers on either side, and these fields."""
        return [
            row
            for row in list(self.rows)
            if (not ports or row["src_port"] in ports or row["dst_port"] in ports)
            and all(row[name] == value for name, value in fields.items())
        ]


# -- packets made by hand


def send_frames(lab: Lab, pod: str, family: int, packets: Sequence[bytes]) -> None:
    """Send IP packets, made whole by the caller, out of a pod's eth0."""
    one = lab.pod(pod)
    header = bytes.fromhex((one.host_mac + one.mac).replace(":", "")) + struct.pack("!H", ETH_P[family])
    with lab.make_socket(pod, socket.AF_PACKET, socket.SOCK_RAW) as raw:
        raw.bind(("eth0", 0))
        for packet in packets:
            raw.send(header + packet)


@contextlib.contextmanager
def sniffing(lab: Lab, pod: str, *sources: str) -> Iterator[list[bytes]]:
    """Every IP packet that reaches a pod's eth0 while the block runs, and 0.3 s longer.

    With `sources`, only those that come from one of these addresses.
    """
    wanted = [parse_address(source) for source in sources]
    seen: list[bytes] = []
    done = threading.Event()
    raw = lab.make_socket(pod, socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3))  # ETH_P_ALL
    raw.bind(("eth0", 3))
    raw.settimeout(0.05)

    def read() -> None:
        while True:
            try:
                data, address = raw.recvfrom(65536)
            except TimeoutError:
                if done.is_set():
                    return
                continue
            if address[2] == socket.PACKET_OUTGOING or address[1] not in ETH_P.values():
                continue
            if not wanted or (data[12:16] if data[0] >> 4 == 4 else data[8:24]) in wanted:
                seen.append(data)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield seen
        time.sleep(0.3)
    finally:
        done.set()
        thread.join()
        raw.close()


def udp_server(lab: Lab, place: str, family: int, port: int) -> socket.socket:
    """A bound UDP socket with a timeout of a second."""
    made = lab.make_socket(place, af(family), socket.SOCK_DGRAM)
    made.settimeout(1.0)
    made.bind((lab.address(place, family), port))
    return made


def conntrack(lab: Lab, *argv: str) -> str:
    """conntrack(8) in the node; what it prints."""
    return lab.run("node", "conntrack", *argv, check=False).stdout


def counter(lab: Lab, tool: str, table: str, comment: str) -> int:
    """Packets counted by the one rule of the node with this comment."""
    lines = lab.run("node", f"{tool}-save", "-c", "-t", table).stdout.splitlines()
    found = [line for line in lines if f"--comment {comment} " in line + " "]
    assert len(found) == 1, (comment, found)
    return int(found[0].lstrip("[").partition(":")[0])
