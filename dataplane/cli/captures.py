"""What commands that read captures have in common."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dataplane.errors import InputError

if TYPE_CHECKING:
    from dataplane._pcap import Capture, Filter


@contextmanager
def open_capture(path: Path) -> Iterator[Capture]:
    """The capture in a file, `-` for standard input. Warns at the end of one that ended early.

    InputError when it cannot be read, or is no capture.
    """
    from dataplane._pcap import Capture

    try:
        if str(path) == "-":
            capture = Capture(sys.stdin.buffer)
        else:
            with path.open("rb") as file:
                capture = Capture(file)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path}: no capture that can be read (pcap or pcapng): {error}") from None
    yield capture
    if capture.error is not None:
        click.echo(
            f"podgate: warning: {path}: {capture.error}; {capture.packets:,} packets before that were read",
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
