"""What comes from a hook's process: whatever it is, it is read, or refused with words."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from dataplane._packet import decode_packet
from dataplane.hook_answers import (
    LONGEST_DELAY,
    Wish,
    check_rewritten,
    packet_number,
    read_answer,
    read_json,
)
from dataplane.reasons import Reason

WORDS = st.sampled_from(["id", "verdict", "packet", "delay", "error", "end", "x"])
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["allow", "drop", "deny", "AAAA", 10**400, -0.0]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
MESSAGES = st.dictionaries(WORDS, VALUES, max_size=3) | VALUES
V4 = bytes.fromhex("4500001d0001000040110000000000000000000000070009000900" + "0078")
V6 = bytes.fromhex("6000000000091140") + bytes(32) + bytes.fromhex("000700090009000078")


@given(MESSAGES.map(json.dumps) | st.text())
def test_messages(text: str) -> None:
    try:
        message = read_json(text)
        number = packet_number(message)
        answer = read_answer(message)
    except ValueError:
        return
    assert answer.number == number
    assert 0 <= answer.delay <= LONGEST_DELAY
    assert bool(answer.packet) <= (answer.wish is Wish.REWRITE)
    assert "\n" not in answer.error


@given(st.sampled_from([V4, V6]), st.lists(st.tuples(st.integers(0, 70), st.binary(max_size=3)), max_size=4))
def test_packets(old: bytes, changes: list[tuple[int, bytes]]) -> None:
    check_rewritten(old, old, 1500)
    new = old
    for at, change in changes:
        new = new[:at] + change + new[at + len(change) :]
    try:
        check_rewritten(old, new, 1500)
    except ValueError:
        return
    before, after = decode_packet(old), decode_packet(new)
    assert after.reason is Reason.NONE
    assert (after.flow, after.length) == (before.flow, len(new))
