"""Invariant: whatever a capture holds, reading it ends, with packets that lie within their frames."""

from __future__ import annotations

import random
from pathlib import Path

import captures
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fuzz_packet import packet

from dataplane._pcap import Capture, Filter

KINDS = (captures.ETHERNET, captures.RAW, captures.LOOPBACK, captures.COOKED, captures.COOKED2)
WORDS = (
    *(
        "host",
        "10.0.0.1",
        "port",
        "80",
        "net",
        "10.0.0.0/8",
        "tcp",
        "udp",
        "icmp",
        "ip6",
        "ip",
        "sctp",
        "src",
    ),
    *("dst", "and", "or", "not", "(", ")", "[", "]", "20:4", "=", "!=", "&", "0x3f", "proto", "vlan", "6"),
    *("gateway", "len", "greater", "100", "portrange", "1-5", "ip6[6]", "<", ">", "fd00::1", "protochain"),
    *("\\tcp", "broadcast"),
)
SIGNS = "()[]&|!<>=+-*/ :.\\0123456789"  # no letters: a word alone would be looked up as a host's name


def damaged(rng: random.Random, content: bytes) -> bytes:
    out = bytearray(content)
    for _ in range(rng.choice([0, 1, 1, 3, 20])):
        out[rng.randrange(len(out))] = rng.choice([0, 1, 255, rng.randrange(256)])
    if rng.random() < 0.4:
        del out[rng.randrange(len(out)) :]
    if rng.random() < 0.1:
        at = rng.randrange(len(out) + 1)
        out[at:at] = rng.randbytes(rng.randrange(40))
    return bytes(out)


@pytest.mark.parametrize("seed", range(6))
def test_read_anything(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    read = refused = cut = 0
    matching = Filter("host 10.0.0.1 or ip6 protochain 6 or port 80")
    path = tmp_path / "capture"
    for _ in range(400):
        linktype = rng.choice(KINDS)
        frames = [
            (
                float(n),
                captures.frame(linktype, packet(rng, rng.choice([4, 6])), tags=rng.choice([(), (0x8100,)])),
            )
            for n in range(rng.randrange(6))
        ]
        whole = rng.choice([captures.pcap, captures.pcapng])(linktype, frames)
        path.write_bytes(damaged(rng, whole))
        try:
            with path.open("rb") as file:
                capture = Capture(file)
        except ValueError:
            refused += 1
            continue
        for when, data, wire in capture:
            assert 0 <= when < 1 << 64
            assert 0 < len(data) <= wire < 1 << 32
            assert matching.matches(data, wire=wire) in (True, False)
            read += 1
        cut += capture.error is not None
        assert capture.error is None or capture.error.strip()
    assert read > 200
    assert refused > 20
    assert cut > 20


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join) | st.text(SIGNS, max_size=40))
def test_any_expression_matches_or_is_refused(expression: str) -> None:
    try:
        made = Filter(expression)
    except ValueError:
        return
    for data in (b"", b"\x45", bytes(64), b"\x60" + bytes(80)):
        assert made.matches(data) in (True, False)
