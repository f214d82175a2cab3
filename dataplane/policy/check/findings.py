"""What a check is and what it finds."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from dataplane.model import Key


class Severity(enum.StrEnum):
    """error: it cannot do what is written; warning: it does something else than most likely meant;
    note: true and worth a look, but it may be meant."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that the author of an object probably did not mean.

    `object` is `Kind namespace/name` (`model.Problem.object`), or empty where the input could not even
    be identified; `field` a path such as `spec.egress[0].ports[1]`, or empty. `source` is set only
    where a problem of the input names its file.
    """

    check: str
    severity: Severity
    object: str
    field: str
    message: str
    mend: str
    source: str = ""


@dataclass(frozen=True, slots=True)
class Check:
    """A kind of finding: `title` is one short line, `help` says what is looked at, and when it is silent."""

    id: str
    severity: Severity
    title: str
    help: str

    def at(
        self, policy: Key, field: str, message: str, mend: str, severity: Severity | None = None
    ) -> Finding:
        """A finding about a NetworkPolicy."""
        return Finding(self.id, severity or self.severity, f"NetworkPolicy {policy}", field, message, mend)
