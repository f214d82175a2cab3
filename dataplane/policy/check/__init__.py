"""`podgate check`: what the author of NetworkPolicies probably did not mean.

Each module here holds one family of checks: `CHECKS`, and `find(world)`. Every check is silent where
the input cannot tell (no pods, no Namespace objects), and for what is plainly meant.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from dataplane.model import Snapshot
from dataplane.policy.check import blocks, egress, ends, overlap, ports, problems, selection, types
from dataplane.policy.check.findings import Check, Finding, Severity
from dataplane.policy.check.world import World

__all__ = ["CHECKS", "IGNORE_ANNOTATION", "Check", "Finding", "Severity", "check", "reported"]

IGNORE_ANNOTATION = "podgate.dev/check-ignore"

UNKNOWN_CHECK = Check(
    "unknown-check",
    Severity.WARNING,
    "An annotation that ignores a check that does not exist",
    f"The annotation {IGNORE_ANNOTATION} of a NetworkPolicy lists ids of checks, separated by commas.",
)

_FAMILIES = (selection, ports, ends, types, blocks, overlap, egress, problems)

CHECKS: dict[str, Check] = {
    each.id: each for each in (*(each for family in _FAMILIES for each in family.CHECKS), UNKNOWN_CHECK)
}

_NUMBERS = re.compile(r"(\d+)")


def check(snapshot: Snapshot, ignore: Collection[str] = ()) -> tuple[Finding, ...]:
    """Everything found, sorted by object and field. `ignore`: ids of checks to leave out.

    NetworkPolicies leave out what their annotation podgate.dev/check-ignore lists.
    """
    world = World(snapshot)
    ignored = {
        f"NetworkPolicy {policy.key}": _ids(policy.annotations.get(IGNORE_ANNOTATION, ""))
        for policy in snapshot.network_policies
    }
    found: set[Finding] = set()
    excepts: set[tuple[str, str]] = set()
    for family in _FAMILIES:
        for finding in family.find(world):
            # The sources note an except without effect too, up to their bound of problems per object.
            if finding.check == blocks.EXCEPT_OUTSIDE.id:
                excepts.add((finding.object, finding.field))
            elif family is problems and (finding.object, finding.field) in excepts:
                continue
            if finding.check not in ignore and finding.check not in ignored.get(finding.object, ()):
                found.add(finding)
    for finding in _unknown(snapshot):
        if finding.check not in ignore:
            found.add(finding)
    return tuple(sorted(found, key=_order))


def reported(findings: Collection[Finding]) -> dict[Severity, int]:
    """How many findings of each severity there are, the gravest first."""
    return {severity: sum(finding.severity is severity for finding in findings) for severity in Severity}


def _ids(text: str) -> frozenset[str]:
    return frozenset(part.strip() for part in text.split(",") if part.strip())


def _unknown(snapshot: Snapshot) -> Iterator[Finding]:
    for policy in snapshot.network_policies:
        for name in sorted(_ids(policy.annotations.get(IGNORE_ANNOTATION, "")) - CHECKS.keys()):
            yield UNKNOWN_CHECK.at(
                policy.key,
                f"metadata.annotations[{IGNORE_ANNOTATION}]",
                f"there is no check {name[:80]!r}",
                "`podgate check --list` shows them all",
            )


def _order(finding: Finding) -> tuple[object, ...]:
    kind, _, name = finding.object.partition(" ")
    # ingress[10] comes after ingress[9].
    parts = [(int(part), "") if part.isdigit() else (-1, part) for part in _NUMBERS.split(finding.field)]
    file = "" if finding.object else finding.source
    return (name, kind, file, parts, finding.check, finding.message)
