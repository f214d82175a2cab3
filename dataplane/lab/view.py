"""Matrices for people: coloured in a terminal, plain ASCII anywhere else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from dataplane.reachability import ALLOWED, DENIED, NOT_JUDGED, Matrix

_STYLES = {ALLOWED: "bold green", DENIED: "bold red", NOT_JUDGED: "dim"}
_MARKS = {ALLOWED: "✓", DENIED: "✗", NOT_JUDGED: "-"}


def cell(mark: str, console: Console) -> Text:
    """One cell: a coloured tick or cross, or the plain character of the matrix."""
    if fancy(console):
        return Text(_MARKS[mark], style=_STYLES[mark])
    return Text(mark)


def fancy(console: Console) -> bool:
    """Whether colour and characters beyond ASCII will be seen as meant."""
    return console.is_terminal and console.encoding.startswith("utf") and not console.legacy_windows


def legend(console: Console) -> Text:
    words = {ALLOWED: "answered", DENIED: "no answer", NOT_JUDGED: "not asked"}
    return Text("  ").join(
        [cell(mark, console) + Text(f" {word}", style="dim") for mark, word in words.items()]
    )


def print_matrix(matrix: Matrix, console: Console) -> None:
    """Print one table per port: a row per source, a column per destination."""
    for part in _tables(matrix, console):
        console.print(part)
    console.print(legend(console))


def _tables(matrix: Matrix, console: Console) -> Iterator[RenderableType]:
    names: Sequence[str] = matrix.order
    headings = names
    side = max((len(name) for name in names), default=0)
    numbered = side + sum(len(name) + 2 for name in names) > console.width
    if numbered:  # names would not fit beside each other
        headings = [str(number) for number in range(1, len(names) + 1)]
        names = [
            f"{number:>{len(headings[-1])}} {name}" for number, name in zip(headings, names, strict=True)
        ]
    for port, rows in matrix.cells.items():
        table = Table(box=None, pad_edge=False, padding=(0, 2 if not numbered else 1, 0, 0), show_edge=False)
        table.add_column(Text(f"{port}  from \\ to"), no_wrap=True)
        for heading in headings:
            table.add_column(Text(heading), justify="center", no_wrap=True)
        for name, row in zip(names, rows, strict=True):
            table.add_row(Text(name), *(cell(mark, console) for mark in row))
        yield table
        yield ""
