"""The lab's SCTP: checksums against known values, and answers that fit their questions."""

from __future__ import annotations

import struct

import pytest

from dataplane.lab import sctp


def _slow_crc32c(data: bytes) -> int:
    """Bit by bit, from the polynomial of RFC 9260 appendix A (reflected)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def test_checksum_is_crc32c() -> None:
    assert _slow_crc32c(b"123456789") == 0xE3069283  # RFC 3720 appendix B.4, CRC catalogue check value
    packet = sctp.init(1234, 80, 0xDEADBEEF)
    assert sctp.checksum(packet) == _slow_crc32c(packet[:8] + bytes(4) + packet[12:])


def test_checksum_goes_on_the_wire_lowest_byte_first() -> None:
    packet = sctp.init(1234, 80, 0xDEADBEEF)
    assert struct.unpack("<I", packet[8:12])[0] == sctp.checksum(packet)


def test_an_init_is_answered_with_the_askers_tag() -> None:
    asked = sctp.parse(sctp.init(40000, 80, 7))
    assert asked is not None
    assert (asked.source_port, asked.destination_port, asked.tag, asked.init_tag) == (40000, 80, 0, 7)
    answer = sctp.parse(sctp.init_ack(asked, 9, b"x/a"))
    assert answer == sctp.Packet(80, 40000, 7, sctp.INIT_ACK, 9, b"x/a")
    refusal = sctp.parse(sctp.abort(asked))
    assert refusal == sctp.Packet(80, 40000, 7, sctp.ABORT, 0, b"")


@pytest.mark.parametrize("position", range(32))
def test_a_flipped_bit_is_noticed(position: int) -> None:
    packet = bytearray(sctp.init(40000, 80, 7))
    packet[position] ^= 1
    assert sctp.parse(bytes(packet)) is None


@pytest.mark.parametrize("length", range(32))
def test_a_cut_packet_is_nothing(length: int) -> None:
    assert sctp.parse(sctp.init(40000, 80, 7)[:length]) is None
