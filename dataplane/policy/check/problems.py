"""What could not be read as written: the sources' problems, as findings."""

from __future__ import annotations

from collections.abc import Iterator

from dataplane.model import Problem
from dataplane.policy.check.findings import Check, Finding, Severity
from dataplane.policy.check.world import World

BAD_INPUT = Check(
    "bad-input",
    Severity.ERROR,
    "Something that cannot be read",
    "A document, object or field is not what Kubernetes takes. The message says what becomes of it: nothing "
    "bad ever allows traffic.",
)
PORT_RANGE = Check(
    "port-range",
    Severity.ERROR,
    "A port range that holds nothing",
    "`endPort` needs a numeric `port` that is not greater; the entry allows nothing.",
)
HOST_BITS = Check(
    "cidr-host-bits",
    Severity.WARNING,
    "A CIDR with bits set after its prefix",
    "10.0.0.5/24 means 10.0.0.0/24: 256 addresses where one may have been meant.",
)
REPEATED = Check(
    "repeated-object",
    Severity.WARNING,
    "An object that is in the input more than once",
    "Objects of one kind and name in several places differ; the last one counts.",
)
CHECKS = (BAD_INPUT, PORT_RANGE, HOST_BITS, REPEATED)

_POLICIES = ("NetworkPolicy ", "PolicyEndpoint ")


def find(world: World) -> Iterator[Finding]:
    """One finding for each problem."""
    for problem in world.snapshot.problems:
        check, mend = _kind(problem)
        severity = check.severity
        if check is BAD_INPUT and problem.object and not problem.object.startswith(_POLICIES):
            severity = Severity.WARNING  # a pod's or Service's: it says less of what is enforced
        yield Finding(check.id, severity, problem.object, problem.field, problem.reason, mend, problem.source)


def _kind(problem: Problem) -> tuple[Check, str]:
    if problem.field.endswith(".endPort"):
        return PORT_RANGE, "write port and endPort as numbers, the smaller first"
    if "bits set after its prefix" in problem.reason:
        return HOST_BITS, "write the network's own address, or a longer prefix"
    if problem.reason.startswith(("is here more than once", "is also in ")):
        return REPEATED, "keep one of them"
    return BAD_INPUT, "correct it as the message says"
