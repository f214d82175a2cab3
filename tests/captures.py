"""Captures for tests: IP packets in the frames of every link type, as pcap and as pcapng."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path

# Link types of a file (tcpdump.org/linktypes.html).
ETHERNET, RAW, LOOPBACK, COOKED, COOKED2, IPV4, IPV6 = 1, 101, 0, 113, 276, 228, 229


def frame(linktype: int, packet: bytes, *, tags: Iterable[int] = ()) -> bytes:
    """The frame that carries an IP packet; `tags`: the Ethernet types of VLAN tags before it."""
    kind = 0x0800 if packet[0] >> 4 == 4 else 0x86DD
    inner = b""
    types = [*tags, kind]
    for following in types[1:]:
        inner += struct.pack("!HH", 7, following)
    first = types[0]
    match linktype:
        case 1:
            head = bytes(12) + struct.pack("!H", first)
        case 113:
            head = struct.pack("!HHH8sH", 0, 1, 6, bytes(8), first)
        case 276:
            head = struct.pack("!HHIHBB8s", first, 0, 3, 1, 0, 6, bytes(8))
        case 0:
            head = struct.pack("<I", 2 if kind == 0x0800 else 10)
        case _:
            head = b""
    return head + inner + packet


def pcap(linktype: int, frames: Iterable[tuple[float, bytes]], *, snaplen: int = 262144) -> bytes:
    """A pcap file with microseconds; frames longer than `snaplen` are cut."""
    out = struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, snaplen, linktype)
    for when, data in frames:
        cut = data[:snaplen]
        out += struct.pack("<IIII", int(when), round(when % 1 * 1e6), len(cut), len(data)) + cut
    return out


def pcapng(linktype: int, frames: Iterable[tuple[float, bytes]]) -> bytes:
    """A pcapng file of one section and one interface."""
    out = block(0x0A0D0D0A, struct.pack("<IHHq", 0x1A2B3C4D, 1, 0, -1))
    out += block(1, struct.pack("<HHI", linktype, 0, 262144))
    for when, data in frames:
        high, low = divmod(round(when * 1e6), 1 << 32)
        body = struct.pack("<IIIII", 0, high, low, len(data), len(data)) + data + bytes(-len(data) % 4)
        out += block(6, body)
    return out


def block(kind: int, body: bytes) -> bytes:
    """A block of a pcapng file."""
    return struct.pack("<II", kind, len(body) + 12) + body + struct.pack("<I", len(body) + 12)


def write(path: Path, content: bytes) -> Path:
    """`content` in `path`."""
    path.write_bytes(content)
    return path
