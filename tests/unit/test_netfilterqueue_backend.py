"""What the NetfilterQueue package hides has to be read from the packet."""

from __future__ import annotations

import pytest

from dataplane.node.netfilterqueue_backend import COPY_RANGE, wire_length

V4 = bytes([0x45, 0]) + (1500).to_bytes(2) + bytes(COPY_RANGE - 4)
V6 = bytes([0x60, 0, 0, 0]) + (1400).to_bytes(2) + bytes(COPY_RANGE - 6)


@pytest.mark.parametrize(
    ("payload", "length"),
    [
        pytest.param(V4, 1500, id="v4-cut"),
        pytest.param(V6, 1440, id="v6-cut"),
        pytest.param(V4[:100], 100, id="not-cut"),
        pytest.param(b"", 0, id="empty"),
        pytest.param(b"\x45\x00\x00\x14" + bytes(COPY_RANGE - 4), COPY_RANGE, id="never-less-than-there-is"),
        pytest.param(b"\x60" + bytes(COPY_RANGE - 1), COPY_RANGE, id="jumbogram"),
    ],
)
def test_wire_length(payload: bytes, length: int) -> None:
    assert wire_length(payload) == length
