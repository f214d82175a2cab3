"""`podgate matrix`: who can reach whom, for every pair of pods."""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dataplane.cli.objects import read_objects
from dataplane.cli.progress import progress
from dataplane.errors import InputError
from dataplane.reachability import (
    ALLOWED,
    AUDITED,
    BOTH_DENIED,
    DENIED,
    EGRESS_DENIED,
    INGRESS_DENIED,
    NOT_JUDGED,
)

if TYPE_CHECKING:
    from dataplane.reachability import Reachability

COLOURS = {
    ALLOWED: "green",
    AUDITED: "cyan",
    EGRESS_DENIED: "yellow",
    INGRESS_DENIED: "red",
    BOTH_DENIED: "magenta",
}
MEANINGS = {
    ALLOWED: "allowed",
    AUDITED: "allowed by an audit only",
    EGRESS_DENIED: "denied by egress",
    INGRESS_DENIED: "denied by ingress",
    BOTH_DENIED: "denied by both",
    NOT_JUDGED: "not judged",
}
_CELLS = {
    mark: click.style(mark, fg=COLOURS[mark], bold=mark != ALLOWED or None) if mark in COLOURS else mark
    for mark in MEANINGS
}
OUTSIDE = "outside"
READABLE = 100  # columns that a table with names takes at most where there is no terminal to measure
_CORNER = "from \\ to"
_NAMED = 5  # pods named in one note


@click.command(
    epilog="Example:  kubectl get netpol,pods,ns,svc -A -o yaml > dump.yaml;"
    " podgate matrix dump.yaml --port 80/TCP --port 53/UDP --external 203.0.113.9"
)
@click.argument("paths", metavar="PATH...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--port",
    "ports",
    multiple=True,
    metavar="PORT",
    help="80/TCP, 53/UDP, 9999/SCTP or ICMP; repeatable. Default: what most pods declare.",
)
@click.option(
    "--external", "externals", multiple=True, metavar="IP", help="Also to and from this IP; repeatable."
)
@click.option("--family", type=click.Choice(["4", "6"]), help="Default: that of the pods' first address.")
@click.option(
    "-o",
    "--output",
    type=click.Choice(["table", "json", "html"]),
    default="table",
    show_default=True,
    help="A table for people, JSON for machines, or a page for a browser (-o html > page.html).",
)
def command(
    paths: tuple[Path, ...],
    ports: tuple[str, ...],
    externals: tuple[str, ...],
    family: str | None,
    output: str,
) -> None:
    """Show which pods can reach which, as the policies in PATH have it.

    PATH are files or directories with NetworkPolicy, Pod, Namespace, Service and PolicyEndpoint
    objects. The verdicts are those of the engine that judges real packets; ask `podgate explain`
    about a single one.
    """
    from dataplane.policy.explain import parse_family, parse_port
    from dataplane.policy.matrix import common_ports, reachability
    from dataplane.policy.resolve import in_force

    wanted = [parse_port(port) for port in ports]
    if output == "html" and sys.stdout.isatty():
        raise InputError("-o html prints a whole page: send it to a file, as in `-o html > page.html`")
    known = read_objects(paths).snapshot
    resolved = in_force(known)
    if not wanted:
        wanted, others = common_ports(resolved.pods)
        if others:
            click.echo(
                f"podgate: no --port, so the {len(wanted)} that most pods declare; there are also"
                f" {', '.join(map(str, others[:_NAMED]))}{', …' if len(others) > _NAMED else ''}",
                err=True,
            )
    with progress("Asking the engine about every pair"):
        reach = reachability(resolved, wanted, externals, parse_family(family))
    for note in notes(reach):
        click.echo(f"podgate: {note}", err=True)
    if output == "json":
        click.echo(json.dumps(reach.matrix().to_json()))
    elif output == "html":
        from dataplane.report.page import render

        with progress("Explaining every pair"):
            page = render(reach, known, resolved, [str(path) for path in paths])
        click.echo(page)
    else:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        click.echo("\n".join(table(reach, width)))


def notes(reach: Reachability) -> Iterator[str]:
    """What a reader of the table should know about what is not in it."""
    if reach.left_out:
        named = ", ".join(map(str, reach.left_out[:_NAMED]))
        rest = len(reach.left_out) - _NAMED
        more = f" and {rest} more" if rest > 0 else ""
        yield f"left out, no IPv{reach.family} address: {named}{more}"
    if not any(policies for place in reach.places for policies in place.isolated_by.values()):
        yield "no policy here isolates any pod, so everything is allowed"


def table(reach: Reachability, width: int | None) -> Iterator[str]:
    """The lines of every port's table, for a terminal of `width` characters (None: not a terminal).

    A table of pairs that would wrap is shown by namespace instead; one that would wrap even then is
    left out, and the last line says what else to do.
    """
    grid = _Grid.of_places(reach, width)
    if width is None or grid.width <= width:
        for port, marks in reach.marks.items():
            yield from (f"{click.style(port, bold=True)}  {summary(marks)}", "", *grid.lines(marks), "")
        seen = {mark for rows in reach.marks.values() for row in rows for mark in row}
        yield "  ".join(f"{_CELLS[mark]} {text}" for mark, text in MEANINGS.items() if mark in seen)
        return
    groups = list(reach.namespaces())
    small = _Grid.of_namespaces(groups)
    for port, marks in reach.marks.items():
        yield f"{click.style(port, bold=True)}  {summary(marks)}"
        if small.width <= width:
            yield from ("", *small.lines(_shares(groups, marks)), "")
    if small.width <= width:
        yield f"{_CELLS[ALLOWED]} all pairs allowed  {_CELLS[DENIED]} none  42% of the pairs  (42) pods"
    yield (
        f"Pair by pair it takes {grid.width} columns, this terminal has {width}:"
        " use -o html > page.html, -o json, or pipe into `less -S`"
    )


@dataclass(frozen=True, slots=True)
class _Grid:
    """What tables of one shape have in common. Columns stand in groups, and so do rows."""

    groups: Sequence[tuple[str, range]]  # heading of the rows, and the rows and columns
    labels: Sequence[str]  # of the rows
    heads: Sequence[Sequence[str]]  # lines above the columns
    over: Sequence[str]  # a line above groups of columns; none: no such line
    widths: Sequence[int]  # of the columns
    gap: str  # between columns; between groups it is one longer

    @classmethod
    def of_places(cls, reach: Reachability, width: int | None) -> _Grid:
        """A row and a column per place: under their names, where these fit, else under numbers."""
        names = [place.pod.name if place.pod else place.name for place in reach.places]
        groups = [(namespace or OUTSIDE, range_) for namespace, range_ in reach.namespaces()]
        widths = [len(name) for name in names]
        for heading, range_ in groups:
            widths[range_[-1]] += max(0, len(heading) - sum(widths[i] + 2 for i in range_) + 2)
        labels = [f"  {name}" for name in names]
        named = cls(groups, labels, [names], [heading for heading, _ in groups], widths, "  ")
        if named.width <= (width or READABLE):
            return named
        return cls(groups, _numbered(names), _digits(len(names)), (), [1] * len(names), " ")

    @classmethod
    def of_namespaces(cls, groups: Sequence[tuple[str | None, range]]) -> _Grid:
        """A row and a column per namespace."""
        names = [f"{namespace or OUTSIDE} ({len(range_)})" for namespace, range_ in groups]
        numbers = [str(number) for number in range(1, len(names) + 1)]
        widths = [max(3, len(number)) for number in numbers]  # 3: a share such as 42%
        return cls([("", range(len(names)))], _numbered(names), [numbers], (), widths, " ")

    @property
    def _side(self) -> int:
        texts = (_CORNER, *self.labels, *(heading for heading, _ in self.groups))
        return max(map(len, texts))

    @property
    def width(self) -> int:
        """Characters of the longest line."""
        between = len(self.gap) * (len(self.widths) - 1) + len(self.groups) - 1
        return self._side + 2 + sum(self.widths) + between

    def lines(self, rows: Sequence[Sequence[str]]) -> Iterator[str]:
        """The table with these cells: marks, or shares such as `42%`."""
        side = self._side
        heads = [self._line(f"{'':<{side}}", head) for head in self.heads]
        if self.over:
            spans = [sum(self.widths[i] + 2 for i in range_) - 2 for _, range_ in self.groups]
            over = (f"{text:<{span}}" for text, span in zip(self.over, spans, strict=True))
            heads.insert(0, f"{'':<{side}}  {f'{self.gap} '.join(over)}".rstrip())
        heads[-1] = _CORNER + heads[-1][len(_CORNER) :]
        yield from heads
        for heading, range_ in self.groups:
            if heading:
                yield heading
            for index in range_:
                yield self._line(f"{self.labels[index]:<{side}}", rows[index])

    def _line(self, start: str, cells: Sequence[str]) -> str:
        groups = (
            self.gap.join([_centred(cells[i], self.widths[i]) for i in range_]) for _, range_ in self.groups
        )
        return f"{start}  {f'{self.gap} '.join(groups)}".rstrip()


def _numbered(names: Sequence[str]) -> list[str]:
    size = len(str(len(names)))
    return [f"  {number:>{size}} {name}" for number, name in enumerate(names, 1)]


def _digits(count: int) -> list[list[str]]:
    """The numbers 1 to `count`, written downwards."""
    size = len(str(count))
    return [list(line) for line in zip(*(f"{number:>{size}}" for number in range(1, count + 1)), strict=True)]


def _centred(cell: str, width: int) -> str:
    text = _CELLS.get(cell, cell)
    left = (width - len(cell)) // 2
    return f"{' ' * left}{text}{' ' * (width - len(cell) - left)}" if width > len(cell) else text


def _shares(groups: Sequence[tuple[str | None, range]], marks: Sequence[str]) -> list[list[str]]:
    """By namespace: `.` all pairs allowed, `X` none, `-` none judged, else how many in a hundred."""
    return [[_share(marks, sources, destinations) for _, destinations in groups] for _, sources in groups]


def _share(marks: Sequence[str], sources: range, destinations: range) -> str:
    cut = slice(destinations.start, destinations.stop)
    count = Counter("".join(marks[source][cut] for source in sources))
    allowed = count[ALLOWED] + count[AUDITED]
    if sources == destinations:
        allowed -= len(sources)  # the diagonal
    judged = allowed + count[EGRESS_DENIED] + count[INGRESS_DENIED] + count[BOTH_DENIED]
    if allowed == judged:
        return NOT_JUDGED if count[NOT_JUDGED] else ALLOWED
    return f"{min(99, max(1, round(100 * allowed / judged)))}%" if allowed else DENIED


def summary(marks: Sequence[str]) -> str:
    """How many pairs of different places are allowed and denied, and by whom."""
    count = Counter("".join(marks))
    count[ALLOWED] -= len(marks)  # the diagonal
    denied = count[EGRESS_DENIED] + count[INGRESS_DENIED] + count[BOTH_DENIED]
    allowed = count[ALLOWED] + count[AUDITED]
    audited = f" ({count[AUDITED]:,} by an audit only)" if count[AUDITED] else ""
    text = f"{allowed:,} of {allowed + denied:,} pairs allowed{audited}, {denied:,} denied"
    by = [
        f"{count[mark]:,} by {word}"
        for mark, word in ((EGRESS_DENIED, "egress"), (INGRESS_DENIED, "ingress"), (BOTH_DENIED, "both"))
        if count[mark]
    ]
    return f"{text} ({', '.join(by)})" if by else text
