"""Reading single fields of parsed objects: each helper checks one thing and says clearly what is wrong.

What a field means for enforcement when it is bad is decided by the callers (`sources.objects`,
`sources.networkpolicy`); nothing here raises anything but `BadFieldError` and, where it says so, ValueError.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TypeVar

from dataplane.addresses import Prefix, parse_address, parse_prefix
from dataplane.model import PROTOCOLS, Key, Problem

CLUSTER_SCOPED = {"Namespace"}
OWN_PREFIX = "podgate.dev/"  # of annotations
MAX_PROBLEMS = 50  # per object: 100,000 bad rules must not become 100,000 log lines

_T = TypeVar("_T")

# RFC 1123 names as the API server checks them. They end up in log lines, interface hashes and
# names of network namespaces, so nothing else may pass.
SUBDOMAIN = re.compile(r"[a-z0-9](?:[-a-z0-9.]{0,251}[a-z0-9])?")
LABEL = re.compile(r"[a-z0-9](?:[-a-z0-9]{0,61}[a-z0-9])?")
LABEL_KEY = re.compile(r"(?:[a-z0-9][-a-z0-9.]{0,252}/)?[A-Za-z0-9](?:[-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
LABEL_VALUE = re.compile(r"(?:[A-Za-z0-9](?:[-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
# The longest address text (8 groups, the last two dotted), a slash and three digits, generously.
_MAX_CIDR_TEXT = 64


class BadFieldError(Exception):
    """A field cannot be used: where and why. Never leaves this module."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(field, reason)
        self.field = field
        self.reason = reason


class Report:
    """Collects the problems of one object."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.object = ""
        self.problems: list[Problem] = []
        self.more = 0

    def add(self, field: str, reason: str) -> None:
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(Problem(self.source, self.object, field, reason))
        else:
            self.more += 1

    def finish(self) -> list[Problem]:
        if self.more:
            self.problems.append(Problem(self.source, self.object, "", f"and {self.more} more problems"))
        return self.problems


def identity(kind: str, raw: object) -> str:
    """`Kind namespace/name` of a parsed object, as problems name it, or "" when it has no usable name."""
    try:
        metadata = map_of(map_of(raw, ""), "", "metadata")
        if kind in CLUSTER_SCOPED:
            return f"{kind} {name_of(metadata, 'metadata', 'name', LABEL)}"
        return f"{kind} {key_of(metadata)}"
    except BadFieldError:
        return ""


def show(value: object) -> str:
    """A value for an error line: short, on one line, and safe whatever it is."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case int():
            # str() of an int refuses beyond 4,300 digits.
            return str(value) if -(10**20) < value < 10**20 else "a number beyond all bounds"
        case str():
            return repr(value if len(value) <= 80 else value[:77] + "...")
        case Mapping():
            return "a map"
        case list() | tuple():
            return "a list"
    return repr(value)[:80]


def map_of(
    value: object, field: str, name: str | None = None, missing: Mapping[object, object] | None = None
) -> Mapping[object, object]:
    """`value`, or its member `name`, as a map. `missing` stands for a null or absent one."""
    if name is not None:
        assert isinstance(value, Mapping)
        value = value.get(name)
        field = f"{field}.{name}" if field else name
        if value is None and missing is not None:
            return missing
        if value is None:
            raise BadFieldError(field, "missing")
    if not isinstance(value, Mapping):
        raise BadFieldError(field, f"must be a map, not {show(value)}")
    return value


def list_of(parent: Mapping[object, object], field: str, name: str, report: Report) -> list[object]:
    value = parent.get(name)
    if value is None:
        return []
    if not isinstance(value, list):
        report.add(f"{field}.{name}", f"must be a list, not {show(value)}; it is not used")
        return []
    return value


def optional(
    parent: Mapping[object, object], field: str, name: str, read: Callable[[object], _T], report: Report
) -> _T | None:
    """A member that may be missing; one that cannot be read is reported and counts as missing."""
    value = parent.get(name)
    if value is None:
        return None
    try:
        return read(value)
    except ValueError as error:
        report.add(f"{field}.{name}", f"{error}; it is not used")
        return None


def key_of(metadata: Mapping[object, object]) -> Key:
    # As kubectl: an object without a namespace is in "default".
    namespace = (
        "default" if metadata.get("namespace") is None else name_of(metadata, "metadata", "namespace", LABEL)
    )
    return Key(namespace, name_of(metadata, "metadata", "name", SUBDOMAIN))


def name_of(parent: Mapping[object, object], field: str, name: str, pattern: re.Pattern[str]) -> str:
    value = parent.get(name)
    if value is None:
        raise BadFieldError(f"{field}.{name}", "missing")
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise BadFieldError(f"{field}.{name}", f"{show(value)} is not a Kubernetes name")
    return value


def protocol_of(entry: Mapping[object, object], field: str) -> int:
    value = entry.get("protocol")
    if value is None:
        return PROTOCOLS["TCP"]
    if not isinstance(value, str) or value not in PROTOCOLS:
        raise BadFieldError(f"{field}.protocol", f"must be TCP, UDP or SCTP, not {show(value)}")
    return PROTOCOLS[value]


def port_number(value: object, field: str) -> int:
    # bool is a subclass of int: `port: true` must not mean port 1.
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 65535:
        raise BadFieldError(field, f"must be a number from 1 to 65535, not {show(value)}")
    return value


def prefix_of(value: object, field: str, report: Report) -> Prefix:
    if not isinstance(value, str) or len(value) > _MAX_CIDR_TEXT:
        raise BadFieldError(field, f"{show(value)} is not a CIDR")
    try:
        prefix, host_bits = parse_prefix(value)
    except ValueError as error:
        raise BadFieldError(field, str(error)) from None
    if host_bits:
        report.add(field, f"{value} has bits set after its prefix; it means {prefix}")
    return prefix


def address_of(value: object) -> bytes:
    if not isinstance(value, str) or len(value) > _MAX_CIDR_TEXT:
        raise ValueError("missing" if value is None else f"{show(value)} is not an IP address")
    return parse_address(value)


def text_of(value: object) -> str:
    if not isinstance(value, str) or not is_text(value) or not value.isprintable():
        raise ValueError(f"{show(value)} is not text")
    return value


def boolean_of(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"must be true or false, not {show(value)}")
    return value


def is_text(value: str) -> bool:
    """Whether it can be printed at all: JSON may hold half a surrogate pair."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def path_of(name: object) -> str:
    """A map's key inside a field path."""
    return name if isinstance(name, str) and LABEL_KEY.fullmatch(name) else show(name)


def labels_of(metadata: Mapping[object, object], report: Report) -> dict[str, str]:
    """`metadata.labels`; what is no label is reported and left out."""
    labels: dict[str, str] = {}
    for name, value in entries_of(metadata, "labels", report):
        if (
            isinstance(name, str)
            and isinstance(value, str)
            and LABEL_KEY.fullmatch(name)
            and LABEL_VALUE.fullmatch(value)
        ):
            labels[name] = value
        else:
            report.add(f"metadata.labels[{path_of(name)}]", f"{show(value)} is not a label; it is not used")
    return labels


def annotations_of(metadata: Mapping[object, object], report: Report) -> dict[str, str]:
    """Those of `metadata.annotations` that are podgate's; what is no text is reported and left out."""
    annotations: dict[str, str] = {}
    for name, value in entries_of(metadata, "annotations", report):
        if not isinstance(name, str) or not name.startswith(OWN_PREFIX):
            continue
        if isinstance(value, str) and LABEL_KEY.fullmatch(name) and is_text(value):
            annotations[name] = value
        else:
            report.add(f"metadata.annotations[{path_of(name)}]", f"{show(value)} is not text; it is not used")
    return annotations


def entries_of(
    parent: Mapping[object, object], name: str, report: Report, field: str = "metadata"
) -> Iterable[tuple[object, object]]:
    """The entries of a map that may be missing; what is no map is reported and counts as missing."""
    value = parent.get(name)
    if value is None:
        return ()
    if not isinstance(value, Mapping):
        report.add(f"{field}.{name}", f"must be a map, not {show(value)}; it is not used")
        return ()
    return value.items()


def excepts_of(rule: Mapping[object, object], field: str, cidr: Prefix, report: Report) -> tuple[Prefix, ...]:
    values = rule.get("except")
    if values is None:
        return ()
    if not isinstance(values, list):
        raise BadFieldError(f"{field}.except", f"must be a list of CIDRs, not {show(values)}")
    excepts: list[Prefix] = []
    for index, value in enumerate(values):
        where = f"{field}.except[{index}]"
        prefix = prefix_of(value, where, report)
        if prefix.family != cidr.family:
            raise BadFieldError(where, f"{prefix} is not of the same family as cidr {cidr}")
        if not cidr.covers(prefix) and not prefix.covers(cidr):
            report.add(where, f"{prefix} is outside cidr {cidr} and has no effect")
        excepts.append(prefix)
    return tuple(excepts)


def ports_of(
    rule: Mapping[object, object], field: str, report: Report, read: Callable[[object, str], _T]
) -> tuple[_T, ...]:
    """The entries of a rule's `ports`, each by `read`; empty when there is no list, or an empty one.

    A bad entry is reported and left out. BadFieldError when none of several is left: an empty result
    would open every port.
    """
    values = rule.get("ports")
    if values is None:
        return ()
    if not isinstance(values, list):
        raise BadFieldError(f"{field}.ports", f"must be a list of ports, not {show(values)}")
    ports: list[_T] = []
    for index, value in enumerate(values):
        try:
            ports.append(read(value, f"{field}.ports[{index}]"))
        except BadFieldError as bad:
            report.add(bad.field, f"{bad.reason}; this entry allows nothing")
    if values and not ports:
        raise BadFieldError(f"{field}.ports", "no entry can be used")
    return tuple(ports)


def known_fields(value: Mapping[object, object], field: str, known: Collection[str]) -> None:
    """BadFieldError for a field that is not among `known`: it may narrow what the others allow."""
    for name in value:
        if name not in known:
            raise BadFieldError(f"{field}.{path_of(name)}", "unknown field")
