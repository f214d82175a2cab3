"""What a file holds: its documents, sorted into objects, problems, and kinds that mean nothing here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from dataplane.model import Problem
from dataplane.sources import networkpolicy, objects, store
from dataplane.sources.fields import identity, show
from dataplane.sources.store import KubernetesObject
from dataplane.sources.text import Located, TextError, documents

MAX_PROBLEMS = 1000  # per file: a million bad objects must not become a million log lines
MAX_KINDS = 20  # in the line about what was skipped

_Reader = Callable[[object, str], tuple[KubernetesObject | None, list[Problem]]]

# kind → (apiVersion, reader)
_READERS: dict[str, tuple[str, _Reader]] = {
    "PolicyEndpoint": ("networking.k8s.aws/v1alpha1", objects.policy_endpoint),
    "Pod": ("v1", objects.pod),
    "NetworkPolicy": ("networking.k8s.io/v1", networkpolicy.network_policy),
    "Namespace": ("v1", networkpolicy.namespace),
    "Service": ("v1", networkpolicy.service),
}
# Another spelling is no other kind: skipped, it would take a policy out of force without a word.
_SPELLINGS = {kind.lower(): kind for kind in (*_READERS, "List")}


@dataclass(slots=True)
class Contents:
    objects: list[KubernetesObject] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)  # kind → how many
    lines: dict[str, int] = field(default_factory=dict)  # identity → where it begins, the last one's
    more: int = 0  # problems that are not listed
    lost: bool = False  # one of them tells of something that is not among `objects`

    def add(self, problem: Problem, *, lost: bool = True) -> None:
        """List a problem. `lost`: what it is about is not among `objects`."""
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(problem)
        else:
            self.more += 1
            self.lost = self.lost or lost

    def finish(self) -> None:
        """Tell how many problems are not listed."""
        if self.more:
            # Without a name everything read from the file before stays in force: what was lost may be
            # any of it. The name of an object that can be used does no such thing.
            last = self.problems[-1]
            name = "" if self.lost else store.identity(self.objects[-1])
            self.problems.append(
                Problem(last.source, name, "", f"and {self.more} more problems in this file")
            )


def read_contents(data: bytes, source: str, *, only_json: bool = False) -> Contents:
    """Everything in the bytes of one file; `source` names it in problems. Never raises."""
    found = Contents()
    parsed = list(documents(data, only_json=only_json))
    for number, document in enumerate(parsed, 1):
        where = f"document {number}" if len(parsed) > 1 else ""
        if isinstance(document, TextError):
            found.add(Problem(source, "", where, f"{document}; this document is not used"))
        else:
            _document(document, source, where, found)
    found.finish()
    return found


def summary(skipped: Mapping[str, int]) -> str:
    """One line for the log about the kinds that were skipped; empty when there were none."""
    if not skipped:
        return ""
    kinds = [f"{count} {kind}" for kind, count in sorted(skipped.items())]
    if len(kinds) > MAX_KINDS:
        kinds[MAX_KINDS:] = [f"and {len(kinds) - MAX_KINDS} more kinds"]
    return f"skipped what has no meaning here: {', '.join(kinds)}"


def _document(document: object, source: str, where: str, found: Contents) -> None:
    # Lists may hold lists; a stack, because how deep they go is the writer's choice.
    waiting: list[tuple[object, str, str]] = [(document, where, "")]
    while waiting:
        raw, place, inherited = waiting.pop()
        if not isinstance(raw, Mapping):
            reason = f"must be an object with kind and metadata, not {show(raw)}"
            found.add(Problem(source, "", place, reason))
            continue
        kind = raw.get("kind", inherited or None)
        if not isinstance(kind, str) or not kind:
            reason = "has no kind" if kind is None else f"kind must be text, not {show(kind)}"
            found.add(Problem(source, "", place, reason))
        elif kind.endswith("List") and "items" in raw:
            items = raw["items"]
            if items is not None and not isinstance(items, list):
                reason = f"items must be a list, not {show(items)}"
                found.add(Problem(source, "", place, reason))
                continue
            # The items of a typed list (PodList) may leave out their kind.
            below = kind.removesuffix("List")
            prefix = f"{place}, items" if place else "items"
            entries = [(item, f"{prefix}[{index}]", below) for index, item in enumerate(items or ())]
            waiting += reversed(entries)
        elif kind in _READERS:
            _object(kind, raw, source, place, found)
        elif (meant := _SPELLINGS.get(kind.strip().lower())) not in (None, kind):
            found.add(Problem(source, "", place, f"kind must be {meant}, not {show(kind)}"))
        else:
            found.skipped[kind if kind.isidentifier() and len(kind) < 64 else show(kind)] += 1


def _object(kind: str, raw: Mapping[object, object], source: str, place: str, found: Contents) -> None:
    version, read = _READERS[kind]
    item: KubernetesObject | None = None
    given = raw.get("apiVersion", version)
    if given == version:
        item, problems = read(raw, source)
        if item is not None:
            found.objects.append(item)
        if isinstance(raw, Located):
            found.lines[identity(kind, raw) if item is None else store.identity(item)] = raw.line
    else:
        reason = f"must be {version} for a {kind}, not {show(given)}"
        problems = [Problem(source, identity(kind, raw), "apiVersion", reason)]
    for problem in problems:
        # Without a name, its place in the file is all that identifies it.
        field_ = ", ".join(part for part in (place, problem.field) if part)
        found.add(problem if problem.object else replace(problem, field=field_), lost=item is None)
