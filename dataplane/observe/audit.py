"""What an audit has let through, added up: from live records, or from the lines of a flow log."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from dataplane.reasons import Reason

KEPT = 10_000  # different denials; the packets of more are only counted


class Denial(NamedTuple):
    """What would be denied, in its flow's original direction. Pods are `namespace/name`.

    `src`, `dst` are addresses; `src_port` is left out: every flow has another.
    """

    reason: str
    direction: str | None
    policies: tuple[str, ...]
    src: str | None
    src_pod: str | None
    dst: str | None
    dst_pod: str | None
    protocol: str
    port: int | None


class AuditTally:
    """Counts packets by `Denial`. `begin` and `end` are the times of the first and last record."""

    def __init__(self) -> None:
        self.begin: str | None = None
        self.end: str | None = None
        self.more = 0  # packets of denials beyond those that are kept
        self._counts: Counter[Denial] = Counter()

    def add(self, record: Mapping[str, Any]) -> bool:
        """Count a record with the flow log's fields; whether an audit is what let it through.

        KeyError, TypeError or ValueError for one that does not have them.
        """
        reason = record.get("would_deny")
        if reason in (None, Reason.HOOK.text):  # no policy denies what a hook would
            return False
        ends = ("dst", "src") if record.get("reply") else ("src", "dst")
        source, destination = ends
        port = record[f"{destination}_port"]
        denial = Denial(
            str(reason),
            record["direction"],
            tuple(map(str, record.get("policies") or ())),
            record[source],
            record.get(f"{source}_pod"),
            record[destination],
            record.get(f"{destination}_pod"),
            str(record["protocol"]),
            None if port is None else int(port),
        )
        when = str(record["ts"])
        self.begin = min(self.begin or when, when)
        self.end = max(self.end or when, when)
        if denial in self._counts or len(self._counts) < KEPT:
            self._counts[denial] += 1
        else:
            self.more += 1
        return True

    def __iter__(self) -> Iterator[tuple[Denial, int]]:
        return iter(list(self._counts.items()))
