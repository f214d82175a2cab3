"""From parsed YAML or JSON to the frozen objects of `dataplane.model`, checked field by field.

Input is whatever somebody could write: any field may be missing, null, or of another type. Nothing
here raises; what cannot be used becomes a `Problem` and takes away what it would have allowed.

A bad object must never open a pod. Therefore isolation and pods stand whatever the rules hold; a
bad `cidr`, a bad `except` (the rule would be wider without it) or an unknown field (it may have
been meant to limit the rule) drops its whole rule; a bad port entry is dropped, and the rule with
it when none is left, because no ports means every port. An unreadable `podIsolation` isolates both
ways: less would open the pod at the next restart, when no earlier version is at hand.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import TypeVar

from dataplane.addresses import Prefix, parse_address, parse_prefix
from dataplane.model import (
    PROTOCOLS,
    ContainerPort,
    Direction,
    Key,
    Pod,
    PodEndpoint,
    PolicyEndpoint,
    PortRange,
    Problem,
    Rule,
)

PORT_GROUP_LABEL = "podgate.dev/port-group"
CHANGED_ANNOTATION = "networking.k8s.aws/last-change-trigger-time"
OWN_PREFIX = "podgate.dev/"

MAX_PROBLEMS = 50  # per object: 100,000 bad rules must not become 100,000 log lines

_T = TypeVar("_T")

# RFC 1123 names as the API server checks them. They end up in log lines, interface hashes and
# names of network namespaces, so nothing else may pass.
_SUBDOMAIN = re.compile(r"[a-z0-9](?:[-a-z0-9.]{0,251}[a-z0-9])?")
_LABEL = re.compile(r"[a-z0-9](?:[-a-z0-9]{0,61}[a-z0-9])?")
_LABEL_KEY = re.compile(r"(?:[a-z0-9][-a-z0-9.]{0,252}/)?[A-Za-z0-9](?:[-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_LABEL_VALUE = re.compile(r"(?:[A-Za-z0-9](?:[-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
_TIME = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)[Tt](\d\d):(\d\d):(\d\d)(\.\d{1,9})?(?:[Zz]|([+-])(\d\d):(\d\d))", re.ASCII
)
# The longest address text (8 groups, the last two dotted), a slash and three digits, generously.
_MAX_CIDR_TEXT = 64

_ISOLATION = {"Ingress": Direction.INGRESS, "Egress": Direction.EGRESS}
_RULE_FIELDS = {"cidr", "except", "ports", "domainName"}
_PORT_FIELDS = {"protocol", "port", "endPort"}
_SPEC_FIELDS = {"policyRef", "podSelector", "podIsolation", "podSelectorEndpoints", "ingress", "egress"}


class _BadError(Exception):
    """A field cannot be used: where and why. Never leaves this module."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(field, reason)
        self.field = field
        self.reason = reason


class _Report:
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


def policy_endpoint(raw: object, source: str) -> tuple[PolicyEndpoint | None, list[Problem]]:
    """One PolicyEndpoint (networking.k8s.aws/v1alpha1) from a parsed document.

    `source` names the file or API path in problems. The object is None when it is unusable as a
    whole: its name, `spec`, `policyRef` or the list of its pods cannot be read. Its problems then
    still carry its name where that is known, so that the last good version can be kept.
    """
    report = _Report(source)
    try:
        endpoint = _policy_endpoint(raw, report)
    except _BadError as bad:
        report.add(bad.field, bad.reason)
        endpoint = None
    return endpoint, report.finish()


def pod(raw: object, source: str) -> tuple[Pod | None, list[Problem]]:
    """One v1 Pod from a parsed document; None when its name, `spec` or `status` cannot be read.

    A field that cannot be read counts as missing: the pod then has fewer addresses, ports and
    labels, and is neither finished nor on the host's network, which would free it from policy.
    """
    report = _Report(source)
    try:
        result = _pod(raw, report)
    except _BadError as bad:
        report.add(bad.field, bad.reason)
        result = None
    return result, report.finish()


def identity(kind: str, raw: object) -> str:
    """`Kind namespace/name` of a parsed object, as problems name it, or "" when it has no usable name."""
    try:
        return f"{kind} {_key(_map(_map(raw, ''), '', 'metadata'))}"
    except _BadError:
        return ""


def parse_time(value: object) -> float:
    """Seconds since the epoch from RFC 3339 text with up to nanoseconds. ValueError says what is wrong."""
    match = _TIME.fullmatch(value) if isinstance(value, str) and len(value) < 64 else None
    if match is None:
        raise ValueError(f"{show(value)} is not a time such as 2026-01-31T12:00:00.5Z")
    year, month, day, hour, minute, second = (int(part) for part in match.groups()[:6])
    fraction, sign, off_hours, off_minutes = match.groups()[6:]
    if second > 60 or int(off_hours or 0) > 23 or int(off_minutes or 0) > 59:
        raise ValueError(f"{show(value)} is not a time that exists")
    try:
        start = datetime(year, month, day, hour, minute, tzinfo=UTC).timestamp()
    except ValueError:
        raise ValueError(f"{show(value)} is not a time that exists") from None
    offset = int(off_hours or 0) * 3600 + int(off_minutes or 0) * 60
    # Second 60 is a leap second (RFC 3339 §5.6); it counts as the next second.
    return start + second + float(fraction or 0) - (-offset if sign == "-" else offset)


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


# --- PolicyEndpoint ---------------------------------------------------------------------------------


def _policy_endpoint(raw: object, report: _Report) -> PolicyEndpoint:
    whole = _map(raw, "")
    metadata = _map(whole, "", "metadata")
    key = _key(metadata)
    report.object = f"PolicyEndpoint {key}"
    spec = _map(whole, "", "spec")
    reference = _map(spec, "spec", "policyRef")
    policy = Key(
        _name(reference, "spec.policyRef", "namespace", _LABEL),
        _name(reference, "spec.policyRef", "name", _SUBDOMAIN),
    )
    for name in spec:
        if name not in _SPEC_FIELDS:
            report.add(f"spec.{_path(name)}", "unknown field, it has no effect")
    return PolicyEndpoint(
        key=key,
        policy=policy,
        isolates=_isolation(spec, report),
        endpoints=_endpoints(spec, report),
        ingress=_rules(spec, "ingress", report),
        egress=_rules(spec, "egress", report),
        port_group=_port_group(key, metadata, report),
        changed_at=_changed_at(metadata, report),
    )


def _isolation(spec: Mapping[object, object], report: _Report) -> frozenset[Direction]:
    values = spec.get("podIsolation")
    if values is None:
        return frozenset()
    if not isinstance(values, list):
        report.add(
            "spec.podIsolation",
            f"must be a list of Ingress and Egress, not {show(values)}; its pods are isolated both ways",
        )
        return frozenset(Direction)
    isolates: set[Direction] = set()
    for index, value in enumerate(values):
        if isinstance(value, str) and value in _ISOLATION:
            isolates.add(_ISOLATION[value])
        else:
            report.add(
                f"spec.podIsolation[{index}]",
                f"must be Ingress or Egress, not {show(value)}; its pods are isolated both ways",
            )
            isolates.update(Direction)
    return frozenset(isolates)


def _endpoints(spec: Mapping[object, object], report: _Report) -> tuple[PodEndpoint, ...]:
    where = "spec.podSelectorEndpoints"
    values = spec.get("podSelectorEndpoints")
    if values is None:
        return ()
    if not isinstance(values, list):
        raise _BadError(where, f"must be a list of pods, not {show(values)}")
    endpoints: list[PodEndpoint] = []
    for index, value in enumerate(values):
        field = f"{where}[{index}]"
        try:
            entry = _map(value, field)
            key = Key(_name(entry, field, "namespace", _LABEL), _name(entry, field, "name", _SUBDOMAIN))
        except _BadError as bad:
            report.add(bad.field, f"{bad.reason}; this entry selects no pod")
            continue
        pod_ip = _endpoint_address(entry, field, "podIP", report)
        host_ip = _endpoint_address(entry, field, "hostIP", report)
        # hostNetwork: the address is the node's, and never a policy subject.
        if not pod_ip or pod_ip != host_ip:
            endpoints.append(PodEndpoint(key, pod_ip, host_ip))
    return tuple(endpoints)


def _endpoint_address(entry: Mapping[object, object], field: str, name: str, report: _Report) -> bytes:
    """The packed address, or b"" when it cannot be read: the pod stays selected by its name."""
    try:
        return _address(entry.get(name))
    except ValueError as error:
        report.add(f"{field}.{name}", f"{error}; the pod stays selected by its name")
        return b""


def _rules(spec: Mapping[object, object], name: str, report: _Report) -> tuple[Rule, ...]:
    values = spec.get(name)
    if values is None:
        return ()
    if not isinstance(values, list):
        report.add(f"spec.{name}", f"must be a list of rules, not {show(values)}; nothing is allowed by it")
        return ()
    rules: list[Rule] = []
    for index, value in enumerate(values):
        try:
            rules.append(_rule(value, f"spec.{name}[{index}]", index, report))
        except _BadError as bad:
            report.add(bad.field, f"{bad.reason}; this rule allows nothing")
    return tuple(rules)


def _rule(value: object, field: str, index: int, report: _Report) -> Rule:
    rule = _map(value, field)
    for name in rule:
        if name not in _RULE_FIELDS:
            raise _BadError(f"{field}.{_path(name)}", "unknown field")
    cidr, domain = rule.get("cidr"), rule.get("domainName")
    if domain not in (None, ""):
        reason = "rules by domain name cannot be enforced yet"
        raise _BadError(f"{field}.domainName", reason if cidr in (None, "") else "excludes cidr")
    if cidr in (None, ""):
        raise _BadError(f"{field}.cidr", "missing")
    prefix = _prefix(cidr, f"{field}.cidr", report)
    return Rule(prefix, _excepts(rule, field, prefix, report), _ports(rule, field, report), index)


def _excepts(rule: Mapping[object, object], field: str, cidr: Prefix, report: _Report) -> tuple[Prefix, ...]:
    values = rule.get("except")
    if values is None:
        return ()
    if not isinstance(values, list):
        raise _BadError(f"{field}.except", f"must be a list of CIDRs, not {show(values)}")
    excepts: list[Prefix] = []
    for index, value in enumerate(values):
        where = f"{field}.except[{index}]"
        prefix = _prefix(value, where, report)
        if prefix.family != cidr.family:
            raise _BadError(where, f"{prefix} is not of the same family as cidr {cidr}")
        if not cidr.covers(prefix) and not prefix.covers(cidr):
            report.add(where, f"{prefix} is outside cidr {cidr} and has no effect")
        excepts.append(prefix)
    return tuple(excepts)


def _ports(rule: Mapping[object, object], field: str, report: _Report) -> tuple[PortRange, ...]:
    values = rule.get("ports")
    if values is None:
        return ()
    if not isinstance(values, list):
        raise _BadError(f"{field}.ports", f"must be a list of ports, not {show(values)}")
    ports: list[PortRange] = []
    for index, value in enumerate(values):
        try:
            ports.append(_port(value, f"{field}.ports[{index}]"))
        except _BadError as bad:
            report.add(bad.field, f"{bad.reason}; this entry allows nothing")
    if values and not ports:
        raise _BadError(f"{field}.ports", "no entry can be used")
    return tuple(ports)


def _port(value: object, field: str) -> PortRange:
    entry = _map(value, field)
    for name in entry:
        if name not in _PORT_FIELDS:
            raise _BadError(f"{field}.{_path(name)}", "unknown field")
    protocol = _protocol(entry, field)
    first, last = entry.get("port"), entry.get("endPort")
    if first is None:
        if last is not None:
            raise _BadError(f"{field}.endPort", "needs port")
        return PortRange(protocol, 0, 65535)
    low = _port_number(first, f"{field}.port")
    if last is None:
        return PortRange(protocol, low, low)
    high = _port_number(last, f"{field}.endPort")
    if high < low:
        raise _BadError(f"{field}.endPort", f"{high} is less than port {low}")
    return PortRange(protocol, low, high)


def _port_group(key: Key, metadata: Mapping[object, object], report: _Report) -> str | None:
    labels = metadata.get("labels")
    group = labels.get(PORT_GROUP_LABEL) if isinstance(labels, Mapping) else None
    if labels is None or (isinstance(labels, Mapping) and PORT_GROUP_LABEL not in labels):
        return None
    if isinstance(group, str) and _LABEL_VALUE.fullmatch(group):
        return group
    # Joined with other slices, its rules would open ports on their pods. No label has a slash.
    report.add("metadata.labels", f"{PORT_GROUP_LABEL} cannot be read; the object stands by itself")
    return f"/{key}"


def _changed_at(metadata: Mapping[object, object], report: _Report) -> float | None:
    annotations = metadata.get("annotations")
    value = annotations.get(CHANGED_ANNOTATION) if isinstance(annotations, Mapping) else None
    if value is None:
        return None
    try:
        return parse_time(value)
    except ValueError as error:
        report.add(f"metadata.annotations[{CHANGED_ANNOTATION}]", f"{error}; it is not used")
        return None


# --- Pod ----------------------------------------------------------------------------------------------


def _pod(raw: object, report: _Report) -> Pod:
    whole = _map(raw, "")
    metadata = _map(whole, "", "metadata")
    key = _key(metadata)
    report.object = f"Pod {key}"
    spec = _map(whole, "", "spec", missing={})
    status = _map(whole, "", "status", missing={})
    uid = _optional(metadata, "metadata", "uid", _text, report)
    created_at = _optional(metadata, "metadata", "creationTimestamp", parse_time, report)
    phase = _optional(status, "status", "phase", _text, report)
    return Pod(
        key=key,
        uid=uid or "",
        node_name=_optional(spec, "spec", "nodeName", _text, report) or None,
        host_ips=_status_addresses(status, "hostIPs", "hostIP", report),
        ips=_status_addresses(status, "podIPs", "podIP", report),
        host_network=_optional(spec, "spec", "hostNetwork", _boolean, report) or False,
        finished=phase in ("Succeeded", "Failed"),
        created_at=created_at,
        labels=_labels(metadata, report),
        annotations=_annotations(metadata, report),
        ports=_container_ports(spec, report),
    )


def _status_addresses(
    status: Mapping[object, object], plural: str, singular: str, report: _Report
) -> tuple[bytes, ...]:
    """The addresses of `podIPs: [{ip: …}]` and `podIP`, in this order, each once."""
    addresses: dict[bytes, None] = {}
    for index, value in enumerate(_list(status, "status", plural, report)):
        field = f"status.{plural}[{index}]"
        try:
            addresses[_address(_map(value, field).get("ip"))] = None
        except _BadError as bad:
            report.add(bad.field, f"{bad.reason}; it is not used")
        except ValueError as error:
            report.add(f"{field}.ip", f"{error}; it is not used")
    # The API server prints an empty podIP as "" in some versions.
    if status.get(singular) not in (None, ""):
        address = _optional(status, "status", singular, _address, report)
        if address is not None:
            addresses[address] = None
    return tuple(addresses)


def _labels(metadata: Mapping[object, object], report: _Report) -> dict[str, str]:
    labels: dict[str, str] = {}
    for name, value in _entries(metadata, "labels", report):
        if (
            isinstance(name, str)
            and isinstance(value, str)
            and _LABEL_KEY.fullmatch(name)
            and _LABEL_VALUE.fullmatch(value)
        ):
            labels[name] = value
        else:
            report.add(f"metadata.labels[{_path(name)}]", f"{show(value)} is not a label; it is not used")
    return labels


def _annotations(metadata: Mapping[object, object], report: _Report) -> dict[str, str]:
    annotations: dict[str, str] = {}
    for name, value in _entries(metadata, "annotations", report):
        if not isinstance(name, str) or not name.startswith(OWN_PREFIX):
            continue
        if isinstance(value, str) and _LABEL_KEY.fullmatch(name) and _is_text(value):
            annotations[name] = value
        else:
            report.add(f"metadata.annotations[{_path(name)}]", f"{show(value)} is not text; it is not used")
    return annotations


def _entries(
    metadata: Mapping[object, object], name: str, report: _Report
) -> Iterable[tuple[object, object]]:
    value = metadata.get(name)
    if value is None:
        return ()
    if not isinstance(value, Mapping):
        report.add(f"metadata.{name}", f"must be a map, not {show(value)}; it is not used")
        return ()
    return value.items()


def _container_ports(spec: Mapping[object, object], report: _Report) -> tuple[ContainerPort, ...]:
    ports: list[ContainerPort] = []
    for kind in ("containers", "initContainers"):
        for index, value in enumerate(_list(spec, "spec", kind, report)):
            field = f"spec.{kind}[{index}]"
            if not isinstance(value, Mapping):
                report.add(field, f"must be a map, not {show(value)}; it is not used")
                continue
            # Only a restartable init container (a sidecar) serves while the pod runs.
            if kind == "initContainers" and value.get("restartPolicy") != "Always":
                continue
            for number, entry in enumerate(_list(value, field, "ports", report)):
                try:
                    ports.append(_container_port(entry, f"{field}.ports[{number}]"))
                except _BadError as bad:
                    report.add(bad.field, f"{bad.reason}; it is not used")
    return tuple(ports)


def _container_port(value: object, field: str) -> ContainerPort:
    entry = _map(value, field)
    name = entry.get("name")
    if name is not None and not (isinstance(name, str) and _LABEL.fullmatch(name)):
        raise _BadError(f"{field}.name", f"{show(name)} is not a port name")
    port = _port_number(entry.get("containerPort"), f"{field}.containerPort")
    return ContainerPort(name, _protocol(entry, field), port)


# --- fields -------------------------------------------------------------------------------------------


def _map(
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
            raise _BadError(field, "missing")
    if not isinstance(value, Mapping):
        raise _BadError(field, f"must be a map, not {show(value)}")
    return value


def _list(parent: Mapping[object, object], field: str, name: str, report: _Report) -> list[object]:
    value = parent.get(name)
    if value is None:
        return []
    if not isinstance(value, list):
        report.add(f"{field}.{name}", f"must be a list, not {show(value)}; it is not used")
        return []
    return value


def _optional(
    parent: Mapping[object, object], field: str, name: str, read: Callable[[object], _T], report: _Report
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


def _key(metadata: Mapping[object, object]) -> Key:
    # As kubectl: an object without a namespace is in "default".
    namespace = (
        "default" if metadata.get("namespace") is None else _name(metadata, "metadata", "namespace", _LABEL)
    )
    return Key(namespace, _name(metadata, "metadata", "name", _SUBDOMAIN))


def _name(parent: Mapping[object, object], field: str, name: str, pattern: re.Pattern[str]) -> str:
    value = parent.get(name)
    if value is None:
        raise _BadError(f"{field}.{name}", "missing")
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise _BadError(f"{field}.{name}", f"{show(value)} is not a Kubernetes name")
    return value


def _protocol(entry: Mapping[object, object], field: str) -> int:
    value = entry.get("protocol")
    if value is None:
        return PROTOCOLS["TCP"]
    if not isinstance(value, str) or value not in PROTOCOLS:
        raise _BadError(f"{field}.protocol", f"must be TCP, UDP or SCTP, not {show(value)}")
    return PROTOCOLS[value]


def _port_number(value: object, field: str) -> int:
    # bool is a subclass of int: `port: true` must not mean port 1.
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 65535:
        raise _BadError(field, f"must be a number from 1 to 65535, not {show(value)}")
    return value


def _prefix(value: object, field: str, report: _Report) -> Prefix:
    if not isinstance(value, str) or len(value) > _MAX_CIDR_TEXT:
        raise _BadError(field, f"{show(value)} is not a CIDR")
    try:
        prefix, host_bits = parse_prefix(value)
    except ValueError as error:
        raise _BadError(field, str(error)) from None
    if host_bits:
        report.add(field, f"{value} has bits set after its prefix; it means {prefix}")
    return prefix


def _address(value: object) -> bytes:
    if not isinstance(value, str) or len(value) > _MAX_CIDR_TEXT:
        raise ValueError("missing" if value is None else f"{show(value)} is not an IP address")
    return parse_address(value)


def _text(value: object) -> str:
    if not isinstance(value, str) or not _is_text(value) or not value.isprintable():
        raise ValueError(f"{show(value)} is not text")
    return value


def _boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"must be true or false, not {show(value)}")
    return value


def _is_text(value: str) -> bool:
    """Whether it can be printed at all: JSON may hold half a surrogate pair."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _path(name: object) -> str:
    """A map's key inside a field path."""
    return name if isinstance(name, str) and _LABEL_KEY.fullmatch(name) else show(name)
