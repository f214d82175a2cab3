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
from collections.abc import Mapping
from datetime import UTC, datetime

from dataplane.model import (
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
from dataplane.sources.fields import (
    LABEL,
    LABEL_VALUE,
    SUBDOMAIN,
    BadFieldError,
    Report,
    address_of,
    annotations_of,
    boolean_of,
    excepts_of,
    key_of,
    known_fields,
    labels_of,
    list_of,
    map_of,
    name_of,
    optional,
    path_of,
    port_number,
    ports_of,
    prefix_of,
    protocol_of,
    show,
    text_of,
)
from dataplane.sources.hints import hints_of

PORT_GROUP_LABEL = "podgate.dev/port-group"
CHANGED_ANNOTATION = "networking.k8s.aws/last-change-trigger-time"

_TIME = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)[Tt](\d\d):(\d\d):(\d\d)(\.\d{1,9})?(?:[Zz]|([+-])(\d\d):(\d\d))", re.ASCII
)

_ISOLATION = {"Ingress": Direction.INGRESS, "Egress": Direction.EGRESS}
_RULE_FIELDS = {"cidr", "except", "ports", "domainName"}
_PORT_FIELDS = {"protocol", "port", "endPort"}
_SPEC_FIELDS = {"policyRef", "podSelector", "podIsolation", "podSelectorEndpoints", "ingress", "egress"}


def policy_endpoint(raw: object, source: str) -> tuple[PolicyEndpoint | None, list[Problem]]:
    """One PolicyEndpoint (networking.k8s.aws/v1alpha1) from a parsed document.

    `source` names the file or API path in problems. The object is None when it is unusable as a
    whole: its name, `spec`, `policyRef` or the list of its pods cannot be read. Its problems then
    still carry its name where that is known, so that the last good version can be kept.
    """
    report = Report(source)
    try:
        endpoint = _policy_endpoint(raw, report)
    except BadFieldError as bad:
        report.add(bad.field, bad.reason)
        endpoint = None
    return endpoint, report.finish()


def pod(raw: object, source: str) -> tuple[Pod | None, list[Problem]]:
    """One v1 Pod from a parsed document; None when its name, `spec` or `status` cannot be read.

    A field that cannot be read counts as missing: the pod then has fewer addresses, ports and
    labels, and is neither finished nor on the host's network, which would free it from policy.
    """
    report = Report(source)
    try:
        result = _pod(raw, report)
    except BadFieldError as bad:
        report.add(bad.field, bad.reason)
        result = None
    return result, report.finish()


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


# --- PolicyEndpoint ---------------------------------------------------------------------------------


def _policy_endpoint(raw: object, report: Report) -> PolicyEndpoint:
    whole = map_of(raw, "")
    metadata = map_of(whole, "", "metadata")
    key = key_of(metadata)
    report.object = f"PolicyEndpoint {key}"
    spec = map_of(whole, "", "spec")
    reference = map_of(spec, "spec", "policyRef")
    policy = Key(
        name_of(reference, "spec.policyRef", "namespace", LABEL),
        name_of(reference, "spec.policyRef", "name", SUBDOMAIN),
    )
    for name in spec:
        if name not in _SPEC_FIELDS:
            report.add(f"spec.{path_of(name)}", "unknown field, it has no effect")
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


def _isolation(spec: Mapping[object, object], report: Report) -> frozenset[Direction]:
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


def _endpoints(spec: Mapping[object, object], report: Report) -> tuple[PodEndpoint, ...]:
    where = "spec.podSelectorEndpoints"
    values = spec.get("podSelectorEndpoints")
    if values is None:
        return ()
    if not isinstance(values, list):
        raise BadFieldError(where, f"must be a list of pods, not {show(values)}")
    endpoints: list[PodEndpoint] = []
    for index, value in enumerate(values):
        field = f"{where}[{index}]"
        try:
            entry = map_of(value, field)
            key = Key(name_of(entry, field, "namespace", LABEL), name_of(entry, field, "name", SUBDOMAIN))
        except BadFieldError as bad:
            report.add(bad.field, f"{bad.reason}; this entry selects no pod")
            continue
        pod_ip = _endpoint_address(entry, field, "podIP", report)
        host_ip = _endpoint_address(entry, field, "hostIP", report)
        # hostNetwork: the address is the node's, and never a policy subject.
        if not pod_ip or pod_ip != host_ip:
            endpoints.append(PodEndpoint(key, pod_ip, host_ip))
    return tuple(endpoints)


def _endpoint_address(entry: Mapping[object, object], field: str, name: str, report: Report) -> bytes:
    """The packed address, or b"" when it cannot be read: the pod stays selected by its name."""
    try:
        return address_of(entry.get(name))
    except ValueError as error:
        report.add(f"{field}.{name}", f"{error}; the pod stays selected by its name")
        return b""


def _rules(spec: Mapping[object, object], name: str, report: Report) -> tuple[Rule, ...]:
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
        except BadFieldError as bad:
            report.add(bad.field, f"{bad.reason}; this rule allows nothing")
    return tuple(rules)


def _rule(value: object, field: str, index: int, report: Report) -> Rule:
    rule = map_of(value, field)
    known_fields(rule, field, _RULE_FIELDS)
    cidr, domain = rule.get("cidr"), rule.get("domainName")
    if domain not in (None, ""):
        reason = "rules by domain name cannot be enforced yet"
        raise BadFieldError(f"{field}.domainName", reason if cidr in (None, "") else "excludes cidr")
    if cidr in (None, ""):
        raise BadFieldError(f"{field}.cidr", "missing")
    prefix = prefix_of(cidr, f"{field}.cidr", report)
    return Rule(prefix, excepts_of(rule, field, prefix, report), ports_of(rule, field, report, _port), index)


def _port(value: object, field: str) -> PortRange:
    entry = map_of(value, field)
    known_fields(entry, field, _PORT_FIELDS)
    protocol = protocol_of(entry, field)
    first, last = entry.get("port"), entry.get("endPort")
    if first is None:
        if last is not None:
            raise BadFieldError(f"{field}.endPort", "needs port")
        return PortRange(protocol, 0, 65535)
    low = port_number(first, f"{field}.port")
    if last is None:
        return PortRange(protocol, low, low)
    high = port_number(last, f"{field}.endPort")
    if high < low:
        raise BadFieldError(f"{field}.endPort", f"{high} is less than port {low}")
    return PortRange(protocol, low, high)


def _port_group(key: Key, metadata: Mapping[object, object], report: Report) -> str | None:
    labels = metadata.get("labels")
    group = labels.get(PORT_GROUP_LABEL) if isinstance(labels, Mapping) else None
    if labels is None or (isinstance(labels, Mapping) and PORT_GROUP_LABEL not in labels):
        return None
    if isinstance(group, str) and LABEL_VALUE.fullmatch(group):
        return group
    # Joined with other slices, its rules would open ports on their pods. No label has a slash.
    report.add("metadata.labels", f"{PORT_GROUP_LABEL} cannot be read; the object stands by itself")
    return f"/{key}"


def _changed_at(metadata: Mapping[object, object], report: Report) -> float | None:
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


def _pod(raw: object, report: Report) -> Pod:
    whole = map_of(raw, "")
    metadata = map_of(whole, "", "metadata")
    key = key_of(metadata)
    report.object = f"Pod {key}"
    spec = map_of(whole, "", "spec", missing={})
    status = map_of(whole, "", "status", missing={})
    uid = optional(metadata, "metadata", "uid", text_of, report)
    created_at = optional(metadata, "metadata", "creationTimestamp", parse_time, report)
    phase = optional(status, "status", "phase", text_of, report)
    return Pod(
        key=key,
        uid=uid or "",
        node_name=optional(spec, "spec", "nodeName", text_of, report) or None,
        host_ips=_status_addresses(status, "hostIPs", "hostIP", report),
        ips=_status_addresses(status, "podIPs", "podIP", report),
        host_network=optional(spec, "spec", "hostNetwork", boolean_of, report) or False,
        finished=phase in ("Succeeded", "Failed"),
        created_at=created_at,
        labels=labels_of(metadata, report),
        annotations=annotations_of(metadata, report),
        ports=_container_ports(spec, report),
        hints=hints_of(spec),
    )


def _status_addresses(
    status: Mapping[object, object], plural: str, singular: str, report: Report
) -> tuple[bytes, ...]:
    """The addresses of `podIPs: [{ip: …}]` and `podIP`, in this order, each once."""
    addresses: dict[bytes, None] = {}
    for index, value in enumerate(list_of(status, "status", plural, report)):
        field = f"status.{plural}[{index}]"
        try:
            addresses[address_of(map_of(value, field).get("ip"))] = None
        except BadFieldError as bad:
            report.add(bad.field, f"{bad.reason}; it is not used")
        except ValueError as error:
            report.add(f"{field}.ip", f"{error}; it is not used")
    # The API server prints an empty podIP as "" in some versions.
    if status.get(singular) not in (None, ""):
        address = optional(status, "status", singular, address_of, report)
        if address is not None:
            addresses[address] = None
    return tuple(addresses)


def _container_ports(spec: Mapping[object, object], report: Report) -> tuple[ContainerPort, ...]:
    ports: list[ContainerPort] = []
    for kind in ("containers", "initContainers"):
        for index, value in enumerate(list_of(spec, "spec", kind, report)):
            field = f"spec.{kind}[{index}]"
            if not isinstance(value, Mapping):
                report.add(field, f"must be a map, not {show(value)}; it is not used")
                continue
            # Only a restartable init container (a sidecar) serves while the pod runs.
            if kind == "initContainers" and value.get("restartPolicy") != "Always":
                continue
            for number, entry in enumerate(list_of(value, field, "ports", report)):
                try:
                    ports.append(_container_port(entry, f"{field}.ports[{number}]"))
                except BadFieldError as bad:
                    report.add(bad.field, f"{bad.reason}; it is not used")
    return tuple(ports)


def _container_port(value: object, field: str) -> ContainerPort:
    entry = map_of(value, field)
    name = entry.get("name")
    if name is not None and not (isinstance(name, str) and LABEL.fullmatch(name)):
        raise BadFieldError(f"{field}.name", f"{show(name)} is not a port name")
    port = port_number(entry.get("containerPort"), f"{field}.containerPort")
    return ContainerPort(name, protocol_of(entry, field), port)
