"""Packets decoded for people: whatever they hold, they become lines."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dataplane.observe.decode import layers

FIRST = st.sampled_from([b"\x45", b"\x46", b"\x4f", b"\x60", b""])


@given(FIRST, st.binary(max_size=256))
def test_anything_becomes_lines(first: bytes, rest: bytes) -> None:
    lines = layers(first + rest)
    assert bool(lines) == bool(first + rest)
    assert all(line and "\n" not in line for line in lines)
