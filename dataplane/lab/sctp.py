"""Just enough SCTP (RFC 9260) to ask a port whether it is there: INIT, INIT ACK, ABORT.

Built by hand over raw sockets, because a kernel may come without SCTP. The checksum must be right:
conntrack calls a packet with a wrong one invalid.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import google_crc32c

PROTOCOL = 132
INIT, INIT_ACK, ABORT = 1, 2, 6
_STATE_COOKIE = 7
_WINDOW, _STREAMS = 65536, 1


class Packet(NamedTuple):
    """An SCTP packet's common header and its first chunk.

    `init_tag` and `cookie` are those of an INIT or INIT ACK, else 0 and empty.
    """

    source_port: int
    destination_port: int
    tag: int
    chunk: int
    init_tag: int
    cookie: bytes


def checksum(packet: bytes) -> int:
    """CRC32c of a packet, its checksum field taken as zero (RFC 9260 appendix A)."""
    value: int = google_crc32c.value(packet[:8] + bytes(4) + packet[12:])
    return value


def _packet(source_port: int, destination_port: int, tag: int, chunk: bytes) -> bytes:
    bare = struct.pack("!HHII", source_port, destination_port, tag, 0) + chunk
    # The reflected CRC goes on the wire with its lowest byte first, unlike every other field.
    return bare[:8] + struct.pack("<I", checksum(bare)) + bare[12:]


def init(source_port: int, destination_port: int, init_tag: int) -> bytes:
    """An INIT; the answer's tag will be `init_tag`."""
    chunk = struct.pack("!BBHIIHHI", INIT, 0, 20, init_tag, _WINDOW, _STREAMS, _STREAMS, init_tag)
    return _packet(source_port, destination_port, 0, chunk)


def init_ack(to: Packet, init_tag: int, cookie: bytes) -> bytes:
    """The answer to an INIT. The cookie is the server's to choose; padded to four bytes."""
    parameter = struct.pack("!HH", _STATE_COOKIE, 4 + len(cookie)) + cookie + bytes(-len(cookie) % 4)
    head = struct.pack(
        "!BBHIIHHI", INIT_ACK, 0, 20 + len(parameter), init_tag, _WINDOW, _STREAMS, _STREAMS, init_tag
    )
    return _packet(to.destination_port, to.source_port, to.init_tag, head + parameter)


def abort(to: Packet) -> bytes:
    """The answer to an INIT for a port where nobody listens (RFC 9260 §5.1)."""
    return _packet(to.destination_port, to.source_port, to.init_tag, struct.pack("!BBH", ABORT, 0, 4))


def end(to: Packet) -> bytes:
    """The client's ABORT after an INIT ACK, so that nothing keeps a half-open association."""
    return abort(to)


def parse(data: bytes) -> Packet | None:
    """A packet with a right checksum and a whole first chunk; None for anything else."""
    if len(data) < 16 or struct.unpack_from("<I", data, 8)[0] != checksum(data):
        return None
    source_port, destination_port, tag, _ = struct.unpack_from("!HHII", data)
    chunk, _, length = struct.unpack_from("!BBH", data, 12)
    if length < 4 or 12 + length > len(data):
        return None
    init_tag, cookie = 0, b""
    if chunk in (INIT, INIT_ACK):
        if length < 20:
            return None
        init_tag = struct.unpack_from("!I", data, 16)[0]
        cookie = _parameter(data[32 : 12 + length], _STATE_COOKIE)
    return Packet(source_port, destination_port, tag, chunk, init_tag, cookie)


def _parameter(data: bytes, wanted: int) -> bytes:
    while len(data) >= 4:
        kind, length = struct.unpack_from("!HH", data)
        if length < 4 or length > len(data):
            break
        if kind == wanted:
            return data[4:length]
        data = data[length + (-length % 4) :]
    return b""
