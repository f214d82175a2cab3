"""Captures with verdicts, and packets decoded for people."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from dataplane.errors import InputError
from dataplane.observe.decode import layers
from dataplane.observe.pcapng import LINKTYPE_RAW, CaptureFile, comment

logging.getLogger("scapy.runtime").setLevel(logging.ERROR)
from scapy.layers.inet import IP, TCP, UDP  # noqa: E402
from scapy.layers.inet6 import IPv6  # noqa: E402
from scapy.utils import RawPcapNgReader  # noqa: E402

SYN = bytes(IP(src="10.0.0.1", dst="10.0.0.2") / TCP(sport=1, dport=2, flags="S"))
SIX = bytes(IPv6(src="fd00::1", dst="fd00::2") / UDP(sport=1, dport=2) / bytes(range(100)))


def test_a_capture_reads_as_it_was_written(tmp_path: Path) -> None:
    file = tmp_path / "c.pcapng"
    written = [
        ("2026-01-02T03:04:05.678901+00:00", SYN, 1500, "deny ingress: no-rule; a > b"),
        ("2026-01-02T03:04:05.999999+00:00", SIX, len(SIX), "allow …"),
        ("2026-01-02T03:04:06.000000+00:00", b"", 0, "deny malformed"),
    ]
    with CaptureFile(file) as capture:
        for one in written:
            capture.write(*one)
    read = list(RawPcapNgReader(str(file)))
    assert [(packet, meta.linktype) for packet, meta in read] == [
        (packet, LINKTYPE_RAW) for _, packet, _, _ in written
    ]
    assert [meta.wirelen for _, meta in read][:2] == [1500, len(SIX)]
    assert [[text.decode() for text in meta.comments] for _, meta in read] == [[text] for *_, text in written]
    times = [(meta.tshigh << 32 | meta.tslow) % 60_000_000 for _, meta in read]
    assert times == [5_678_901, 5_999_999, 6_000_000]


def test_a_capture_without_packets_is_one(tmp_path: Path) -> None:
    file = tmp_path / "c.pcapng"
    with CaptureFile(file):
        assert file.stat().st_size > 0
    assert list(RawPcapNgReader(str(file))) == []


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--pcap .*/no/c.pcapng: No such file or directory"):
        CaptureFile(tmp_path / "no" / "c.pcapng")


def test_comments_say_what_was_decided_and_between_whom() -> None:
    record = {"verdict": "deny", "src_pod": "x/a", "src": "10.0.0.1", "dst_pod": None, "dst": "192.0.2.1"}
    assert comment(record, "egress: no-rule") == "deny egress: no-rule; x/a > 192.0.2.1"
    more = comment(record | {"generation": 7, "cached": True}, "egress: no-rule")
    assert more.endswith("; cached, table 7")


@pytest.mark.parametrize(
    ("packet", "expected"),
    [
        (SYN, ["IP  version=4 ", "TCP  sport="]),
        (SIX, ["IPv6  version=6 ", "UDP  sport=", "100 bytes  00 01 02"]),
        (SYN[:25], ["IP  version=4 ", "5 bytes  00 01 00 02 00"]),
        (b"\x45\x00", ["2 bytes  45 00"]),
        (b"\x00\x01", ["2 bytes  00 01"]),
        (b"", []),
    ],
)
def test_layers(packet: bytes, expected: list[str]) -> None:
    shown = layers(packet)
    assert [line[: len(start)] for line, start in zip(shown, expected, strict=False)] == expected
