"""What commands that read captures have in common."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

import click

from dataplane.errors import InputError

if TYPE_CHECKING:
    from dataplane._pcap import Capture, Filter


def open_capture(file: IO[bytes], name: str) -> Capture:
    """The capture in an open file, which `name` is to people. InputError when it is none."""
    from dataplane._pcap import Capture

    try:
        return Capture(file)
    except OSError as error:
        raise InputError(f"{name}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{name}: no capture that can be read (pcap or pcapng): {error}") from None


def open_file(path: Path) -> IO[bytes]:
    """A file, or standard input for `-`, without a buffer. InputError when it cannot be read."""
    try:
        return open(
            sys.stdin.fileno() if str(path) == "-" else path, "rb", buffering=0, closefd=str(path) != "-"
        )
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None


def warn_of_end(capture: Capture, name: str) -> None:
    """Says on stderr when reading ended before the capture did."""
    if capture.error is not None:
        click.echo(
            f"podgate: warning: {name}: {capture.error}; {capture.packets:,} packets before that were read",
            err=True,
        )


def parse_filter(expression: str | None) -> Filter | None:
    """What `--filter` says. InputError with libpcap's words."""
    from dataplane._pcap import Filter

    if not expression:
        return None
    try:
        return Filter(expression)
    except ValueError as error:
        raise InputError(f"--filter {expression!r}: {error}; pcap-filter(7) tells how to write it") from None


def port_name(protocol: int, port: int | None) -> str:
    """`80/TCP`, or a protocol without ports by its name."""
    from dataplane.observe.events import protocol_name

    return protocol_name(protocol) if port is None else f"{port}/{protocol_name(protocol)}"


def columns(rows: Sequence[Sequence[str]], right: frozenset[int] = frozenset()) -> Iterator[str]:
    """Rows of cells as lines whose cells stand below each other; `right`: columns aligned at their end.

    Colours count as no width.
    """
    widths = [max(len(click.unstyle(row[at])) for row in rows) for at in range(len(rows[0]))] if rows else []
    for row in rows:
        cells = []
        for at, (cell, width) in enumerate(zip(row, widths, strict=True)):
            blank = " " * (width - len(click.unstyle(cell)))
            cells.append(blank + cell if at in right else cell + blank)
        yield "  ".join(cells).rstrip()
