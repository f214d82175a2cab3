"""Decoding: one row per kind of packet, then every row cut off at every length against a guard page."""

from __future__ import annotations

import logging
import socket
import struct
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
from guard_page import GuardPage

from dataplane._packet import decode_packet
from dataplane.reasons import Reason

logging.getLogger("scapy.runtime").setLevel(logging.ERROR)
from scapy.layers.inet import ICMP, IP, TCP, UDP, ICMPerror, IPerror, TCPerror, UDPerror  # noqa: E402
from scapy.layers.inet6 import (  # noqa: E402
    ICMPv6DestUnreach,
    ICMPv6EchoReply,
    ICMPv6EchoRequest,
    ICMPv6MLReport,
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6ND_RA,
    ICMPv6PacketTooBig,
    ICMPv6TimeExceeded,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
    Jumbo,
    PadN,
    RouterAlert,
)
from scapy.layers.ipsec import AH, ESP  # noqa: E402
from scapy.layers.sctp import SCTP, SCTPChunkInit  # noqa: E402

A4, B4, R4 = "10.0.0.1", "10.0.0.2", "192.0.2.1"
A6, B6, R6 = "fd00::1", "fd00::2", "2001:db8::1"
V4 = {"src": A4, "dst": B4}
V6 = {"src": A6, "dst": B6}
NONE, MALFORMED, FRAGMENT = Reason.NONE, Reason.MALFORMED, Reason.FRAGMENT


def packed(address: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)


class Row(NamedTuple):
    what: str
    data: bytes
    reason: Reason
    # Fields of Packet or of its flow; or inner: (src, dst, protocol, sport, dport).
    expected: Mapping[str, Any] = MappingProxyType({})
    wire: int | None = None


def raw6(
    next_header: int, payload: bytes, *, length: int | None = None, hops: int = 64, src: str = A6
) -> bytes:
    size = len(payload) if length is None else length
    return struct.pack("!IHBB", 6 << 28, size, next_header, hops) + packed(src) + packed(B6) + payload


def extension(next_header: int, units: int = 0) -> bytes:
    """An extension header of (units + 1) * 8 bytes of Pad1."""
    return bytes([next_header, units]) + bytes(6 + 8 * units)


PORTS = struct.pack("!HH", 1234, 80)
UDP8 = PORTS + struct.pack("!HH", 8, 0)
TCP20 = PORTS + bytes(8) + b"\x50\x02" + bytes(6)
QUOTED4 = IP(src=B4, dst=A4) / UDP(sport=53, dport=999) / b"answer"
QUOTED6 = IPv6(src=B6, dst=A6) / UDP(sport=53, dport=999) / b"answer"


def to_quoter(quoted: Any, layer: Any) -> bytes:
    """An ICMP error of router R to the sender of `quoted`."""
    outer = IP(src=R4, dst=quoted.src) if isinstance(quoted, IP) else IPv6(src=R6, dst=quoted.src)
    return bytes(outer / layer / quoted)


PORTED = {"protocol": 6, "sport": 1234, "dport": 80, "has_ports": True}

ROWS = [
    # ---- IPv4
    Row(
        "TCP",
        bytes(IP(**V4, ttl=61) / TCP(sport=1234, dport=80, flags="SA") / b"hello"),
        NONE,
        PORTED | {"tcp_flags": 0x12, "l4_offset": 20, "hop_limit": 61, "length": 45, "inner": None},
    ),
    Row(
        "TCP with options", bytes(IP(**V4) / TCP(sport=1234, dport=80, options=[("MSS", 1460)])), NONE, PORTED
    ),
    Row(
        "IPv4 options",
        bytes(IP(**V4, options=[b"\x01" * 40]) / TCP(sport=1234, dport=80)),
        NONE,
        PORTED | {"l4_offset": 60},
    ),
    Row(
        "UDP",
        bytes(IP(**V4) / UDP(sport=5, dport=53) / b"q"),
        NONE,
        {"protocol": 17, "sport": 5, "dport": 53},
    ),
    Row(
        "SCTP",
        bytes(IP(**V4) / SCTP(sport=7, dport=9) / SCTPChunkInit()),
        NONE,
        {"protocol": 132, "sport": 7, "dport": 9, "has_ports": True},
    ),
    Row("UDP-Lite", bytes(IP(**V4, proto=136) / UDP8), NONE, PORTED | {"protocol": 136}),
    Row("DCCP", bytes(IP(**V4, proto=33) / (PORTS + bytes(12))), NONE, PORTED | {"protocol": 33}),
    Row(
        "ICMP echo",
        bytes(IP(**V4) / ICMP(type=8, id=77)),
        NONE,
        {"protocol": 1, "sport": 77, "dport": 0x0800, "has_ports": False, "icmp_type": 8, "icmp_code": 0},
    ),
    Row(
        "ICMP echo reply",
        bytes(IP(**V4) / ICMP(type=0, id=77)),
        NONE,
        {"sport": 77, "dport": 0, "icmp_type": 0},
    ),
    Row("ICMP timestamp", bytes(IP(**V4) / ICMP(type=13, id=5)), NONE, {"sport": 5, "dport": 13 << 8}),
    Row(
        "ICMP router solicitation has no identifier",
        bytes(IP(**V4, proto=1) / b"\x0a\0\0\0\1\2\0\0"),
        NONE,
        {"sport": 0, "dport": 10 << 8},
    ),
    Row(
        "GRE keeps its number and has no ports",
        bytes(IP(**V4, proto=47) / b"12345678"),
        NONE,
        {"protocol": 47, "sport": 0, "dport": 0, "has_ports": False},
    ),
    Row("a protocol without a payload", bytes(IP(**V4, proto=253)), NONE, {"protocol": 253}),
    Row(
        "ESP", bytes(IP(**V4) / ESP(spi=1, seq=1, data=b"x" * 20)), NONE, {"protocol": 50, "has_ports": False}
    ),
    Row(
        "IPv4 AH is a protocol of its own",
        bytes(IP(**V4) / AH(spi=1, seq=1) / TCP()),
        NONE,
        {"protocol": 51, "has_ports": False},
    ),
    Row(
        "ICMPv6 in IPv4 is only a number",
        bytes(IP(**V4, proto=58) / bytes([135]) / bytes(30)),
        NONE,
        {"protocol": 58, "neighbour_discovery": False, "icmp_type": 0},
    ),
    Row(
        "trailing Ethernet padding",
        bytes(IP(**V4) / UDP(sport=1, dport=2)) + bytes(18),
        NONE,
        {"length": 28, "dport": 2},
    ),
    Row(
        "only headers captured",
        bytes(IP(**V4, len=60_000) / TCP(sport=1234, dport=80)),
        NONE,
        PORTED | {"length": 60_000},
        wire=60_000,
    ),
    Row(
        "BIG TCP: total length 0",
        bytes(IP(**V4, len=0) / TCP(sport=1234, dport=80)),
        NONE,
        PORTED | {"length": 190_000},
        wire=190_000,
    ),
    Row("total length 0 in a packet that could say it", bytes(IP(**V4, len=0) / TCP()), MALFORMED),
    Row(
        "first fragment keeps its ports",
        bytes(IP(**V4, flags="MF") / UDP(sport=1, dport=53) / bytes(16)),
        NONE,
        {"first_fragment": True, "dport": 53},
    ),
    Row("later fragment", bytes(IP(**V4, frag=185, proto=17) / bytes(16)), FRAGMENT, {"src": packed(A4)}),
    Row("later fragment with MF", bytes(IP(**V4, frag=1, flags="MF", proto=6) / bytes(16)), FRAGMENT),
    Row("RFC 1858 tiny fragment", bytes(IP(**V4, flags="MF", proto=6) / TCP20[:8]), MALFORMED),
    Row("header length below 20", b"\x44" + bytes(IP(**V4) / TCP())[1:], MALFORMED),
    Row("header longer than the packet", b"\x4f" + bytes(IP(**V4, proto=47) / b"1234")[1:], MALFORMED),
    Row("total length below the header", bytes(IP(**V4, len=19) / TCP()), MALFORMED),
    Row("total length beyond the wire", bytes(IP(**V4, len=41) / TCP()), MALFORMED),
    Row("TCP data offset below 5", bytes(IP(**V4) / TCP(dataofs=4)), MALFORMED),
    Row("TCP data offset beyond the packet", bytes(IP(**V4) / TCP(dataofs=6)), MALFORMED),
    Row("UDP length below 8", bytes(IP(**V4) / UDP(len=7)), MALFORMED),
    Row("UDP length 0", bytes(IP(**V4) / UDP(len=0)), MALFORMED),
    Row("IP version 5", b"\x55" + bytes(IP(**V4) / TCP())[1:], MALFORMED),
    Row("nothing", b"", MALFORMED, {"src": b"", "dst": b""}),
    # ---- ICMP errors over IPv4
    *(
        Row(
            f"ICMP error {kind}",
            to_quoter(QUOTED4, ICMP(type=kind)),
            NONE,
            {"protocol": 1, "icmp_type": kind, "inner": (B4, A4, 17, 53, 999)},
        )
        for kind in (3, 4, 5, 11, 12)
    ),
    Row(
        "ICMP error quoting 8 bytes",
        bytes(IP(src=R4, dst=B4) / ICMP(type=3, code=4) / bytes(QUOTED4)[:28]),
        NONE,
        {"inner": (B4, A4, 17, 53, 999), "icmp_code": 4},
    ),
    Row(
        "ICMP error quoting 7 bytes",
        bytes(IP(src=R4, dst=B4) / ICMP(type=3) / bytes(QUOTED4)[:27]),
        MALFORMED,
    ),
    Row(
        "ICMP error quoting TCP",
        to_quoter(IP(src=B4, dst=A4) / TCP(sport=80, dport=1234), ICMP(type=11)),
        NONE,
        {"inner": (B4, A4, 6, 80, 1234)},
    ),
    Row(
        "ICMP error quoting SCTP",
        bytes(IP(src=R4, dst=B4) / ICMP(type=3) / bytes(IP(src=B4, dst=A4) / SCTP(sport=1, dport=2))[:28]),
        NONE,
        {"inner": (B4, A4, 132, 1, 2)},
    ),
    Row(
        "ICMP error quoting an echo",
        to_quoter(IP(src=B4, dst=A4) / ICMP(type=8, id=9), ICMP(type=3)),
        NONE,
        {"inner": (B4, A4, 1, 9, 0x0800)},
    ),
    Row(
        "ICMP error quoting GRE",
        to_quoter(IP(src=B4, dst=A4, proto=47) / b"12345678", ICMP(type=3)),
        NONE,
        {"inner": (B4, A4, 47, 0, 0)},
    ),
    Row(
        "ICMP error quoting an ICMP error",
        to_quoter(IP(src=B4, dst=A4) / ICMP(type=3) / bytes(28), ICMP(type=3)),
        MALFORMED,
    ),
    Row(
        "ICMP error quoting a later fragment",
        to_quoter(IP(src=B4, dst=A4, frag=9, proto=17) / bytes(16), ICMP(type=3)),
        MALFORMED,
    ),
    Row(
        "ICMP error to somebody else than it quotes",
        bytes(IP(src=R4, dst="10.9.9.9") / ICMP(type=3) / QUOTED4),
        MALFORMED,
    ),
    Row("ICMP error quoting IPv6", bytes(IP(src=R4, dst=B4) / ICMP(type=3) / QUOTED6), MALFORMED),
    Row("ICMP error quoting nothing", bytes(IP(src=R4, dst=B4) / ICMP(type=3)), MALFORMED),
    # ---- IPv6
    Row(
        "TCP over IPv6",
        bytes(IPv6(**V6) / TCP(sport=1234, dport=80)),
        NONE,
        PORTED | {"family": 6, "length": 60, "l4_offset": 40},
    ),
    Row(
        "UDP over IPv6",
        bytes(IPv6(**V6) / UDP(sport=1, dport=53) / b"q"),
        NONE,
        {"protocol": 17, "dport": 53},
    ),
    Row("SCTP over IPv6", bytes(IPv6(**V6) / SCTP(sport=1, dport=2)), NONE, {"protocol": 132, "dport": 2}),
    Row(
        "every extension header",
        raw6(
            0,
            extension(60)
            + extension(43, 2)
            + extension(44)
            + bytes([51, 0])
            + bytes(6)
            + bytes([135, 1])
            + bytes(10)
            + extension(139)
            + extension(140, 1)
            + extension(60)
            + extension(6)
            + TCP20,
        ),
        NONE,
        PORTED | {"l4_offset": 140, "first_fragment": False},
    ),
    Row(
        "hop-by-hop with options",
        bytes(
            IPv6(**V6)
            / IPv6ExtHdrHopByHop(options=[RouterAlert(), PadN(optdata=b"")])
            / UDP(sport=1, dport=2)
        ),
        NONE,
        {"protocol": 17, "dport": 2},
    ),
    Row(
        "destination options",
        bytes(IPv6(**V6) / IPv6ExtHdrDestOpt() / UDP(sport=1, dport=2)),
        NONE,
        {"dport": 2},
    ),
    Row(
        "AH over IPv6 is looked through",
        bytes(IPv6(**V6) / AH(nh=6, spi=1, seq=1, payloadlen=4, icv=b"x" * 12) / TCP(sport=1234, dport=80)),
        NONE,
        PORTED | {"l4_offset": 64},
    ),
    Row("AH too short for its own fields", raw6(51, bytes([6, 0]) + bytes(6) + TCP20), MALFORMED),
    Row("ESP over IPv6", bytes(IPv6(**V6) / ESP(spi=1, seq=1, data=b"x" * 20)), NONE, {"protocol": 50}),
    Row("no next header", raw6(59, b""), NONE, {"protocol": 59, "has_ports": False}),
    Row("no next header, with bytes behind", raw6(59, b"junk"), NONE, {"protocol": 59}),
    Row("unknown protocol", raw6(200, b"x"), NONE, {"protocol": 200}),
    Row(
        "ICMPv4 in IPv6 is only a number",
        raw6(1, bytes([3]) + bytes(40)),
        NONE,
        {"protocol": 1, "inner": None},
    ),
    Row(
        "first fragment",
        bytes(IPv6(**V6) / IPv6ExtHdrFragment(m=1, offset=0) / UDP(sport=1, dport=53)),
        NONE,
        {"first_fragment": True, "dport": 53},
    ),
    Row(
        "atomic fragment",
        bytes(IPv6(**V6) / IPv6ExtHdrFragment() / UDP(sport=1, dport=53)),
        NONE,
        {"first_fragment": False, "dport": 53},
    ),
    Row(
        "later fragment over IPv6",
        bytes(IPv6(**V6) / IPv6ExtHdrFragment(offset=3, nh=17) / bytes(16)),
        FRAGMENT,
        {"src": packed(A6), "protocol": 17},
    ),
    Row("tiny first fragment", bytes(IPv6(**V6) / IPv6ExtHdrFragment(m=1, nh=6) / TCP20[:16]), MALFORMED),
    Row(
        "first fragment ends in an extension header",
        bytes(IPv6(**V6) / IPv6ExtHdrFragment(m=1, nh=60) / bytes([6, 4]) / bytes(14)),
        MALFORMED,
    ),
    Row("hop-by-hop not in first place", raw6(60, extension(0) + extension(6) + TCP20), MALFORMED),
    Row(
        "routing header type 0 with segments left",
        bytes(IPv6(**V6) / IPv6ExtHdrRouting(type=0, addresses=[R6]) / TCP()),
        MALFORMED,
    ),
    Row("16 extension headers", raw6(60, extension(60) * 15 + extension(6) + TCP20), NONE, PORTED),
    Row("17 extension headers", raw6(60, extension(60) * 16 + extension(6) + TCP20), MALFORMED),
    Row("extension beyond the packet", raw6(60, bytes([6, 200]) + bytes(30)), MALFORMED),
    Row("payload length beyond the wire", raw6(6, TCP20, length=21), MALFORMED),
    Row("payload length 0 and a payload", raw6(6, TCP20, length=0), MALFORMED),
    Row(
        "jumbogram",
        bytes(
            IPv6(**V6, plen=0)
            / IPv6ExtHdrHopByHop(nh=6, options=[Jumbo(jumboplen=100_028)])
            / TCP(sport=1234, dport=80)
        ),
        NONE,
        PORTED | {"length": 100_068},
        wire=100_068,
    ),
    Row(
        "BIG TCP without the option",
        raw6(6, TCP20, length=0),
        NONE,
        PORTED | {"length": 100_060},
        wire=100_060,
    ),
    Row(
        "jumbogram longer than the wire",
        bytes(IPv6(**V6, plen=0) / IPv6ExtHdrHopByHop(nh=6, options=[Jumbo(jumboplen=100_029)]) / TCP()),
        MALFORMED,
        wire=100_068,
    ),
    Row(
        "jumbo option below 65,536",
        bytes(IPv6(**V6, plen=0) / IPv6ExtHdrHopByHop(nh=6, options=[Jumbo(jumboplen=28)]) / TCP()),
        MALFORMED,
    ),
    Row(
        "jumbo option beside a payload length",
        bytes(IPv6(**V6) / IPv6ExtHdrHopByHop(options=[Jumbo(jumboplen=100_028)]) / TCP()),
        MALFORMED,
        wire=100_068,
    ),
    Row("option beyond its header", raw6(0, bytes([6, 0, 5, 9]) + bytes(4) + TCP20), MALFORMED),
    Row("hop-by-hop and no payload length", raw6(0, extension(6) + TCP20, length=0), MALFORMED),
    # ---- ICMPv6
    Row(
        "ICMPv6 echo",
        bytes(IPv6(**V6) / ICMPv6EchoRequest(id=7)),
        NONE,
        {"protocol": 58, "sport": 7, "dport": 128 << 8, "icmp_type": 128, "neighbour_discovery": False},
    ),
    Row(
        "ICMPv6 echo reply", bytes(IPv6(**V6) / ICMPv6EchoReply(id=7)), NONE, {"sport": 7, "dport": 129 << 8}
    ),
    *(
        Row(
            f"ICMPv6 error {kind}",
            to_quoter(QUOTED6, layer),
            NONE,
            {"icmp_type": kind, "inner": (B6, A6, 17, 53, 999)},
        )
        for kind, layer in ((1, ICMPv6DestUnreach()), (2, ICMPv6PacketTooBig()), (3, ICMPv6TimeExceeded()))
    ),
    Row(
        "ICMPv6 error of an unassigned type",
        bytes(IPv6(src=R6, dst=B6) / (b"\x64" + bytes(7)) / QUOTED6).replace(b"\x3b\x40", b"\x3a\x40", 1),
        NONE,
        {"inner": (B6, A6, 17, 53, 999)},
    ),
    Row(
        "ICMPv6 error quoting an extension header",
        to_quoter(IPv6(src=B6, dst=A6) / IPv6ExtHdrDestOpt() / UDP(sport=1, dport=2), ICMPv6PacketTooBig()),
        NONE,
        {"inner": (B6, A6, 17, 1, 2)},
    ),
    Row(
        "ICMPv6 error quoting an error",
        to_quoter(IPv6(src=B6, dst=A6) / ICMPv6DestUnreach() / bytes(48), ICMPv6DestUnreach()),
        MALFORMED,
    ),
    Row(
        "ICMPv6 error quoting a first fragment",
        to_quoter(
            IPv6(src=B6, dst=A6) / IPv6ExtHdrFragment(m=1) / UDP(sport=1, dport=2), ICMPv6DestUnreach()
        ),
        NONE,
        {"inner": (B6, A6, 17, 1, 2)},
    ),
    Row(
        "ICMPv6 error to somebody else",
        bytes(IPv6(src=R6, dst="fd00::9") / ICMPv6DestUnreach() / QUOTED6),
        MALFORMED,
    ),
    Row(
        "neighbour solicitation",
        bytes(IPv6(**V6, hlim=255) / ICMPv6ND_NS(tgt=B6)),
        NONE,
        {"neighbour_discovery": True},
    ),
    Row(
        "neighbour advertisement",
        bytes(IPv6(**V6, hlim=255) / ICMPv6ND_NA(tgt=B6)),
        NONE,
        {"neighbour_discovery": True},
    ),
    Row(
        "router advertisement",
        bytes(IPv6(**V6, hlim=255) / ICMPv6ND_RA()),
        NONE,
        {"neighbour_discovery": True},
    ),
    Row(
        "forwarded neighbour discovery",
        bytes(IPv6(**V6, hlim=254) / ICMPv6ND_NS(tgt=B6)),
        NONE,
        {"neighbour_discovery": False},
    ),
    Row(
        "neighbour discovery with a code",
        bytes(IPv6(**V6, hlim=255) / ICMPv6ND_NS(tgt=B6, code=1)),
        NONE,
        {"neighbour_discovery": False},
    ),
    Row(
        "fragmented neighbour discovery (RFC 6980)",
        bytes(IPv6(**V6, hlim=255) / IPv6ExtHdrFragment(m=1) / ICMPv6ND_NS(tgt=B6)),
        NONE,
        {"neighbour_discovery": False},
    ),
    Row(
        "MLD report",
        raw6(0, bytes([58, 0, 5, 2, 0, 0, 1, 0]) + bytes([143]) + bytes(7), hops=1, src="fe80::1"),
        NONE,
        {"neighbour_discovery": True},
    ),
    Row(
        "MLD report of a host without an address",
        bytes(IPv6(src="::", dst="ff02::16", hlim=1) / ICMPv6MLReport()),
        NONE,
        {"neighbour_discovery": True},
    ),
    Row(
        "MLD from a global address",
        bytes(IPv6(**V6, hlim=1) / ICMPv6MLReport()),
        NONE,
        {"neighbour_discovery": False},
    ),
    Row(
        "MLD with another hop limit",
        bytes(IPv6(src="fe80::1", dst=B6, hlim=2) / ICMPv6MLReport()),
        NONE,
        {"neighbour_discovery": False},
    ),
]


@pytest.mark.parametrize("row", ROWS, ids=[row.what for row in ROWS])
def test_decode(row: Row) -> None:
    found = decode_packet(row.data, row.wire)
    assert found.reason is row.reason
    values = found._asdict() | found.flow._asdict() | {"family": 4 if len(found.flow.src) == 4 else 6}
    for name, expected in row.expected.items():
        if name == "inner" and expected is not None:
            src, dst, protocol, sport, dport = expected
            assert found.inner is not None
            assert found.inner[:5] == (packed(src), packed(dst), protocol, sport, dport)
        else:
            assert values[name] == expected, name
    if row.reason is NONE and row.data[0] >> 4 == 4:
        assert (found.flow.src, found.flow.dst) == (row.data[12:16], row.data[16:20])
    elif row.reason is NONE:
        assert (found.flow.src, found.flow.dst) == (row.data[8:24], row.data[24:40])


def test_rows_are_distinct() -> None:
    assert len({row.what for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize("row", ROWS, ids=[row.what for row in ROWS])
def test_cut_by_the_kernels_copy(row: Row, guard: GuardPage) -> None:
    """Fewer bytes captured than were on the wire: the same answer, or malformed; never a guess."""
    wire = len(row.data) if row.wire is None else row.wire
    whole = guard.decode(row.data, wire)
    assert whole == decode_packet(row.data, row.wire)
    complete = False
    for length in range(len(row.data) + 1):
        cut = guard.decode(row.data[:length], wire)
        if cut != whole:
            assert cut.reason is MALFORMED, length
            assert not complete or whole.reason is MALFORMED, f"{length} bytes: fewer had been enough"
        elif whole.reason is not MALFORMED:
            complete = True
    assert complete or whole.reason is MALFORMED


@pytest.mark.parametrize("row", [row for row in ROWS if row.wire is None], ids=lambda row: row.what)
def test_cut_on_the_wire(row: Row, guard: GuardPage) -> None:
    """A packet that ends before its own length says so is malformed at every length."""
    claimed = decode_packet(row.data).length
    for length in range(min(len(row.data), claimed)):
        assert guard.decode(row.data[:length]).reason is MALFORMED, length


def test_wire_below_captured_is_a_callers_error() -> None:
    with pytest.raises(ValueError, match="shorter than"):
        decode_packet(bytes(40), 39)


def test_imported_error_layers_parse_what_we_quote() -> None:
    """The builders above make what they say: scapy reads the quoted packet back."""
    error = IP(to_quoter(QUOTED4, ICMP(type=3)))
    assert error[ICMPerror if ICMPerror in error else IPerror].dst == A4
    assert error[UDPerror].dport == 999
    assert TCPerror not in error
