"""Who reaches whom: the values that the computed matrix, the probed one and their pages share.

Rows are sources, columns are destinations, both in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dataplane.model import Direction, Key, Rule
from dataplane.reasons import Reason

ALLOWED, DENIED, NOT_JUDGED = ".", "X", "-"


@dataclass(frozen=True, slots=True)
class Matrix:
    """Reachability, in the shape that `podgate matrix -o json` prints.

    `cells[port]` has one string per source in `order`, one character per destination: `.` allowed,
    `X` denied, `-` not judged.
    """

    order: tuple[str, ...]
    cells: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"order": list(self.order), "cells": {port: list(rows) for port, rows in self.cells.items()}}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Matrix:
        return cls(tuple(raw["order"]), {port: tuple(rows) for port, rows in raw["cells"].items()})

    def cell(self, source: str, destination: str, port: str) -> str:
        return self.cells[port][self.order.index(source)][self.order.index(destination)]

    def allows(self, source: str, destination: str, port: str = "80/TCP") -> bool:
        return self.cell(source, destination, port) == ALLOWED

    def diff(self, expected: Matrix) -> str:
        """Every cell that differs from `expected`, one line each; empty when none does."""
        if self.order != expected.order or self.cells.keys() != expected.cells.keys():
            return (
                f"not the same table: observed {self.order} {list(self.cells)},"
                f" expected {expected.order} {list(expected.cells)}"
            )
        words = {ALLOWED: "allowed", DENIED: "denied", NOT_JUDGED: "not judged"}
        return "\n".join(
            f"{port}: {source} -> {self.order[column]}: observed {words[seen]}, expected {words[wanted]}"
            for port, rows in self.cells.items()
            for source, row, wanted_row in zip(self.order, rows, expected.cells[port], strict=True)
            for column, (seen, wanted) in enumerate(zip(row, wanted_row, strict=True))
            if seen != wanted
        )

    def __str__(self) -> str:
        width = max((len(name) for name in self.order), default=0)
        parts = []
        for port, rows in self.cells.items():
            parts.append(f"{port}")
            parts += [
                f"  {name:<{width}}  {' '.join(row)}" for name, row in zip(self.order, rows, strict=True)
            ]
        return "\n".join(parts)


# What a cell of `Reachability.marks` says beyond ALLOWED and NOT_JUDGED: which end denies, or would.
EGRESS_DENIED, INGRESS_DENIED, BOTH_DENIED = "E", "I", "X"
AUDITED = "a"  # allowed because the policies that would deny are in audit
_TO_MATRIX = str.maketrans(
    {EGRESS_DENIED: DENIED, INGRESS_DENIED: DENIED, BOTH_DENIED: DENIED, AUDITED: ALLOWED}
)


@dataclass(frozen=True, slots=True)
class Place:
    """One row and column: a pod, or an address outside the cluster.

    `isolated_by` names the policies that isolate the pod, per direction: none means not isolated.
    """

    name: str  # namespace/name, or the address as it was given
    address: bytes  # the one that counts here; a hostNetwork pod has its node's
    pod: Key | None = None
    host_network: bool = False
    labels: Mapping[str, str] = field(default_factory=dict)
    isolated_by: Mapping[Direction, tuple[Key, ...]] = field(default_factory=dict)


class EndVerdict(NamedTuple):
    """What one end of a flow says. `policy` and `rule` are set when a rule allowed it."""

    reason: Reason
    policy: Key | None = None
    rule: Rule | None = None

    @property
    def allow(self) -> bool:
        return self.reason is not Reason.NO_RULE


# Indices into `Reachability.verdicts`, one per place.
Line = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Lines:
    """What one direction's ends say on one port, each distinct line once.

    Egress: `lines[of[source]][destination]`. Ingress: `lines[of[destination]][source]`.
    """

    of: tuple[int, ...]
    lines: tuple[Line, ...]


@dataclass(frozen=True, slots=True)
class Reachability:
    """Who reaches whom, and why.

    `marks[port]` has one string per source, one character per destination: `.` allowed, `E` the
    source's egress denies, `I` the destination's ingress denies, `X` both deny, `a` allowed by an
    audit only, `-` not judged (between two addresses outside). `egress[port]` and `ingress[port]`
    say what each end answers, as indices into `verdicts`; they mean nothing where a place meets itself
    (always allowed) and where nothing is judged. `left_out`: pods without an address of this family.
    """

    family: int
    places: tuple[Place, ...]
    marks: Mapping[str, tuple[str, ...]]
    verdicts: tuple[EndVerdict, ...]
    egress: Mapping[str, Lines]
    ingress: Mapping[str, Lines]
    left_out: tuple[Key, ...] = ()

    @property
    def order(self) -> tuple[str, ...]:
        return tuple(place.name for place in self.places)

    @property
    def ports(self) -> tuple[str, ...]:
        return tuple(self.marks)

    def matrix(self) -> Matrix:
        """The verdicts alone, as `-o json` prints them."""
        return Matrix(
            self.order,
            {port: tuple(row.translate(_TO_MATRIX) for row in rows) for port, rows in self.marks.items()},
        )

    def ends(self, port: str, source: int, destination: int) -> tuple[EndVerdict, EndVerdict] | None:
        """What the egress end and the ingress end of one cell say; None between addresses outside."""
        if self.places[source].pod is None and self.places[destination].pod is None:
            return None
        if source == destination:
            return (EndVerdict(Reason.SAME_POD), EndVerdict(Reason.SAME_POD))
        egress, ingress = self.egress[port], self.ingress[port]
        return (
            self.verdicts[egress.lines[egress.of[source]][destination]],
            self.verdicts[ingress.lines[ingress.of[destination]][source]],
        )

    def namespaces(self) -> Iterator[tuple[str | None, range]]:
        """Runs of places of one namespace, in order; None for the addresses outside."""
        start = 0
        for index in range(1, len(self.places) + 1):
            first = self.places[start].pod
            namespace = first.namespace if first else None
            if index < len(self.places):
                pod = self.places[index].pod
                if (pod.namespace if pod else None) == namespace:
                    continue
            yield namespace, range(start, index)
            start = index
