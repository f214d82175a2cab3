"""Verdicts as a capture: pcapng with the verdict of each packet as its comment.

Wireshark and tshark show the comments (`frame.comment`); every other reader of pcapng sees packets.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from dataplane.errors import InputError

LINKTYPE_RAW = 101  # from the IP header on: what the queues are given

_EPOCH = datetime.fromtimestamp(0, UTC)


class _Commented(bytes):
    """A packet as scapy's writer takes it: it looks for comments in an attribute."""

    comments: list[bytes]

    def __new__(cls, packet: bytes, comment: str) -> Self:
        made = super().__new__(cls, packet)
        made.comments = [comment.encode()]
        return made


class CaptureFile:
    """A pcapng file of raw IP packets. InputError when it cannot be written."""

    def __init__(self, path: Path) -> None:
        # Takes a fifth of a second to import.
        from scapy.utils import PcapNgWriter

        self._path = path
        try:
            self._writer = PcapNgWriter(str(path))
            self._writer.linktype = LINKTYPE_RAW
            self._writer.write_header(None)  # a capture without packets is one too
            self._writer.flush()
        except OSError as error:
            raise self._failed(error) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    def write(self, ts: str, packet: bytes, length: int, comment: str) -> None:
        """One packet of `length` bytes on the wire, of which `packet` was kept, at an ISO 8601 time."""
        since = datetime.fromisoformat(ts) - _EPOCH
        try:
            # Whole microseconds, as a number that the writer's multiplication cannot round down.
            self._writer.write_packet(
                _Commented(packet, comment),
                sec=(since.days * 86400 + since.seconds) + (since.microseconds + 0.25) / 1e6,
                wirelen=max(length, len(packet)),
            )
        except OSError as error:
            raise self._failed(error) from None

    def flush(self) -> None:
        """Make what was written readable to others."""
        try:
            self._writer.flush()
        except OSError as error:
            raise self._failed(error) from None

    def close(self) -> None:
        """End the file."""
        try:
            self._writer.close()
        except OSError as error:
            raise self._failed(error) from None

    def _failed(self, error: OSError) -> InputError:
        return InputError(f"--pcap {self._path}: {error.strerror or error}")


def comment(record: Mapping[str, Any], decision: str) -> str:
    """What a packet's comment says: the verdict, who decided it, and both pods where they are known."""
    parts = [f"{record['verdict']} {decision}"]
    ends = [str(record.get(f"{side}_pod") or record.get(side) or "?") for side in ("src", "dst")]
    parts.append(" > ".join(ends))
    if record.get("generation"):
        parts.append(f"{'cached' if record.get('cached') else 'evaluated'}, table {record['generation']}")
    return "; ".join(parts)
