"""Reading packet messages and packing verdicts, without a kernel."""

from __future__ import annotations

import struct
import sys

from hypothesis import given
from hypothesis import strategies as st

from dataplane._nfqueue import encode_answers, parse

PACKET_HDR, VERDICT_HDR, MARK, INDEV, OUTDEV, PHYSIN, PHYSOUT, PAYLOAD, CAP_LEN = 1, 2, 3, 5, 6, 7, 8, 10, 13
VERDICT, BATCH = 0x301, 0x303
DROP, ACCEPT = 0, 1


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", len(value) + 4, kind) + value + bytes(-len(value) % 4)


def message(*attributes: bytes) -> bytes:
    body = struct.pack("!BBH", 2, 0, 0) + b"".join(attributes)
    return struct.pack("=IHHII", 16 + len(body), 0x300, 0, 0, 0) + body


def header(number: int, hook: int = 2) -> bytes:
    return attribute(PACKET_HDR, struct.pack("!IHB", number, 0x0800, hook))


def word(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("!I", value))


def decode(sent: bytes) -> list[tuple[int, int, int, int]]:
    """(message type, verdict, id, mark) of each message, all fields checked."""
    found = []
    while sent:
        length, kind, flags, seq, _ = struct.unpack_from("=IHHII", sent)
        assert (length, flags, seq) == (40, 1, 0)
        assert struct.unpack_from("!BBH", sent, 16) == (0, 0, 7)
        assert struct.unpack_from("=HH", sent, 20) == (12, VERDICT_HDR)
        assert struct.unpack_from("=HH", sent, 32) == (8, MARK)
        verdict, number = struct.unpack_from("!II", sent, 24)
        found.append((kind, verdict, number, struct.unpack_from("!I", sent, 36)[0]))
        sent = sent[length:]
    return found


def test_everything_a_packet_message_tells() -> None:
    assert parse(
        message(header(9), word(MARK, 0x4000), word(INDEV, 3), word(OUTDEV, 4), attribute(PAYLOAD, b"abcde"))
    ) == (9, 0x4000, 3, 4, 2, b"abcde", 5, True)


def test_bridge_ports_go_before_the_bridge() -> None:
    parsed = parse(message(header(1), word(INDEV, 3), word(PHYSIN, 30), word(OUTDEV, 4), word(PHYSOUT, 40)))
    assert parsed is not None
    assert parsed[2:4] == (30, 40)


def test_the_wire_length_is_cap_len_where_the_copy_was_cut() -> None:
    assert parse(message(header(1), word(CAP_LEN, 1500), attribute(PAYLOAD, bytes(256))))[6] == 1500  # type: ignore[index]
    # Never less than what is there, whatever it says.
    assert parse(message(header(1), word(CAP_LEN, 3), attribute(PAYLOAD, bytes(256))))[6] == 256  # type: ignore[index]


def test_no_id_no_packet() -> None:
    assert parse(message(attribute(PAYLOAD, b"x"))) is None
    assert parse(message(attribute(PACKET_HDR, b"\0\0\0\1\0\0"))) is None
    assert parse(b"") is None


def test_every_truncation_is_seen() -> None:
    whole = message(header(9), word(MARK, 1), attribute(PAYLOAD, bytes(64)))
    for length in range(len(whole)):
        parsed = parse(whole[:length])
        if parsed is not None and length not in (31, 32, 40):  # at the end of an attribute
            assert not parsed[7], length


@given(st.binary(max_size=600))
def test_random_bytes_never_crash(data: bytes) -> None:
    parsed = parse(data)
    if parsed is not None:
        assert parsed[5] in data
        assert parsed[6] >= len(parsed[5])


@given(st.binary(max_size=400), st.lists(st.integers(0, 65535), max_size=8))
def test_random_attribute_lengths_never_crash(data: bytes, lengths: list[int]) -> None:
    mangled = bytearray(message(header(1), data))
    for place, length in enumerate(lengths):
        at = 20 + place * 24
        if at + 2 <= len(mangled):
            mangled[at : at + 2] = length.to_bytes(2, sys.byteorder)
    parse(bytes(mangled))


def test_equal_answers_are_one_batch_of_the_last_id() -> None:
    assert decode(encode_answers(7, [(5, True, 9), (6, True, 9), (7, True, 9)])) == [(BATCH, ACCEPT, 7, 9)]


def test_mixed_answers_stay_in_order() -> None:
    answers = [(1, True, 8), (2, False, 0), (3, False, 0), (4, True, 8), (5, True, 4)]
    assert decode(encode_answers(7, answers)) == [
        (VERDICT, ACCEPT, 1, 8),
        (BATCH, DROP, 3, 0),
        (VERDICT, ACCEPT, 4, 8),
        (VERDICT, ACCEPT, 5, 4),
    ]


def test_what_was_not_answered_is_dropped_before_an_accepting_batch() -> None:
    answers = [(8, True, 1), (9, True, 1)]
    assert decode(encode_answers(7, answers, drop_older=True)) == [(BATCH, DROP, 7, 0), (BATCH, ACCEPT, 9, 1)]


def test_nothing_to_answer_is_nothing_to_send() -> None:
    assert encode_answers(7, [], drop_older=True) == b""


@given(st.integers(1, 2**32 - 200), st.lists(st.tuples(st.booleans(), st.sampled_from([0, 1])), max_size=64))
def test_a_kernel_applying_the_messages_gives_each_packet_its_own_verdict(
    first: int, wanted: list[tuple[bool, int]]
) -> None:
    """Play nfqnl_recv_verdict and nfqnl_recv_verdict_batch over a list of queued ids."""
    answers = [(first + place, accept, mark if accept else 0) for place, (accept, mark) in enumerate(wanted)]
    queue = [number for number, _, _ in answers]
    given_out = []
    for kind, verdict, number, mark in decode(encode_answers(7, answers)):
        covered = [queued for queued in queue if queued <= number] if kind == BATCH else [number]
        for queued in covered:
            queue.remove(queued)
            given_out.append((queued, bool(verdict), mark))
    assert given_out == answers
    assert queue == []
