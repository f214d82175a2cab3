"""Reading conntrack entries and writing updates, without a kernel."""

from __future__ import annotations

import struct

from hypothesis import given
from hypothesis import strategies as st

from dataplane._conntrack import encode_clear, parse
from dataplane.node.conntrack import state_name

TUPLE_ORIG, TUPLE_REPLY, STATUS, PROTOINFO, TIMEOUT, MARK, ZONE, MARK_MASK = 1, 2, 3, 4, 7, 8, 18, 21
COUNTERS_ORIG, COUNTERS_REPLY = 9, 10
NESTED = 0x8000


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", len(value) + 4, kind) + value + bytes(-len(value) % 4)


def pair(kind: int, src: bytes, dst: bytes, protocol: bytes) -> bytes:
    first = 1 if len(src) == 4 else 3
    ip = attribute(1 | NESTED, attribute(first, src) + attribute(first + 1, dst))
    return attribute(kind | NESTED, ip + attribute(2 | NESTED, protocol))


def ports(protocol: int, sport: int, dport: int) -> bytes:
    return (
        attribute(1, bytes([protocol]))
        + attribute(2, struct.pack("!H", sport))
        + attribute(3, struct.pack("!H", dport))
    )


def message(*attributes: bytes, kind: int = 0x100, seq: int = 0) -> bytes:
    body = struct.pack("!BBH", 2, 0, 0) + b"".join(attributes)
    return struct.pack("=IHHII", 16 + len(body), kind, 2, seq, 0) + body


A, B, C = b"\x0a\0\0\x01", b"\x0a\0\0\x02", b"\x0a\0\0\x03"
ENTRY = (
    pair(TUPLE_ORIG, A, C, ports(6, 40000, 80)),
    pair(TUPLE_REPLY, B, A, ports(6, 8080, 40000)),
    attribute(STATUS, struct.pack("!I", 0x2E)),
    attribute(TIMEOUT, struct.pack("!I", 431999)),
    attribute(MARK, struct.pack("!I", 0x10000080)),
    attribute(ZONE, struct.pack("!H", 5)),
    attribute(PROTOINFO | NESTED, attribute(1 | NESTED, attribute(1, b"\x03"))),
    attribute(
        COUNTERS_ORIG | NESTED, attribute(1, struct.pack("!Q", 7)) + attribute(2, struct.pack("!Q", 700))
    ),
    attribute(
        COUNTERS_REPLY | NESTED, attribute(1, struct.pack("!Q", 5)) + attribute(2, struct.pack("!Q", 50))
    ),
)


def test_an_entry_with_everything() -> None:
    (entry,) = parse(message(*ENTRY))
    assert entry[:8] == ((A, 40000, C, 80), (B, 8080, A, 40000), 6, None, 0x10000080, 0x2E, 431999, 5)
    assert entry[9] == (7, 700, 5, 50)
    assert state_name(entry[8], entry[5]) == "ESTABLISHED"


def test_icmp_and_ipv6() -> None:
    six, seven = bytes(15) + b"\x06", bytes(15) + b"\x07"
    echo = attribute(1, b"\x3a") + attribute(7, b"\x12\x34") + attribute(8, b"\x80") + attribute(9, b"\x00")
    (entry,) = parse(message(pair(TUPLE_ORIG, six, seven, echo), pair(TUPLE_REPLY, seven, six, echo)))
    assert entry[:4] == ((six, 0, seven, 0), (seven, 0, six, 0), 58, (128, 0, 0x1234))
    assert entry[9] is None


def test_several_entries_in_a_datagram_and_strangers_between() -> None:
    data = message(*ENTRY) + message(*ENTRY, kind=0x101) + message(*ENTRY, seq=9) + message(*ENTRY)
    assert len(parse(data)) == 2
    assert len(parse(data, seq=9)) == 1


def test_half_a_tuple_is_no_entry() -> None:
    half = attribute(TUPLE_ORIG | NESTED, attribute(1 | NESTED, attribute(1, A)))
    assert parse(message(half, ENTRY[1])) == []
    assert parse(message(ENTRY[0])) == []


def test_an_update_names_the_flow_and_only_our_bits() -> None:
    sent = encode_clear(message(*ENTRY), 0x30000000)
    length, kind, flags, _, _ = struct.unpack_from("=IHHII", sent)
    assert (length, kind) == (len(sent), 0x100)
    assert flags == 1  # NLM_F_REQUEST: no NLM_F_CREATE, so a flow that has gone is not made anew
    assert sent[16] == 2
    assert sent[20:] == (
        ENTRY[0] + ENTRY[5] + attribute(MARK, bytes(4)) + attribute(MARK_MASK, struct.pack("!I", 0x30000000))
    )


def test_states_of_flows_without_a_protocol_state() -> None:
    assert state_name(b"", 0) == "UNREPLIED"
    assert state_name(b"", 2) == "REPLIED"
    assert state_name(b"", 6) == "ASSURED"
    assert state_name(attribute(3 | NESTED, attribute(1, b"\x04")), 0) == "ESTABLISHED"
    assert state_name(attribute(1 | NESTED, attribute(1, b"\xff")), 6) == "ASSURED"


@given(st.binary(max_size=800))
def test_random_bytes_never_crash(data: bytes) -> None:
    parse(data)
    encode_clear(data, 1)
    state_name(data, 0)


@given(st.integers(0, 10**6), st.binary(min_size=1, max_size=6))
def test_damaged_entries_never_crash(place: int, damage: bytes) -> None:
    whole = bytearray(message(*ENTRY) * 2)
    place %= len(whole)
    whole[place : place + len(damage)] = damage
    for entry in parse(bytes(whole)):
        assert all(len(end[0]) in (4, 16) and len(end[2]) in (4, 16) for end in entry[:2])
    encode_clear(bytes(whole[: len(whole) // 2]), 1)


def test_every_truncation_is_no_entry_or_a_whole_one() -> None:
    whole = message(*ENTRY)
    for length in range(len(whole)):
        assert parse(whole[:length]) == []
