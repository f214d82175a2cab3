"""NetworkPolicy and what it refers to (Namespace, Service) from parsed YAML or JSON, checked field by field.

Nothing here raises. A bad rule, peer or port must never allow more than a good one: a bad peer
matches nothing, a bad port opens nothing, an unknown field (it may have been meant to limit) spoils
the rule, peer or port that it is in. The policy's isolation stands all the same. Only where
`spec.podSelector` cannot be read is the policy unusable as a whole, because nobody can say whom it
isolates; its last good version then stays in force.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from dataplane.model import (
    ANNOTATION_MODE,
    EVERYTHING,
    Direction,
    IPBlock,
    Key,
    LabelSelector,
    Namespace,
    NetworkPolicy,
    NetworkPolicyPeer,
    NetworkPolicyPort,
    NetworkPolicyRule,
    Operator,
    PolicyHead,
    Problem,
    Requirement,
    Service,
    ServicePort,
)
from dataplane.sources.fields import (
    LABEL,
    LABEL_KEY,
    LABEL_VALUE,
    BadFieldError,
    Report,
    address_of,
    annotations_of,
    entries_of,
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

# The API server's IsValidPortName: at most 15 of these, at least one letter, no two hyphens in a row.
_PORT_NAME = re.compile(r"(?=.*[a-z])(?!.*--)[a-z0-9](?:[-a-z0-9]{0,13}[a-z0-9])?")

_TYPES = {"Ingress": Direction.INGRESS, "Egress": Direction.EGRESS}
_SPEC_FIELDS = {"podSelector", "policyTypes", "ingress", "egress"}
_PEER_FIELDS = {"podSelector", "namespaceSelector", "ipBlock"}
_PORT_FIELDS = {"protocol", "port", "endPort"}
_BLOCK_FIELDS = {"cidr", "except"}
_SELECTOR_FIELDS = {"matchLabels", "matchExpressions"}
_REQUIREMENT_FIELDS = {"key", "operator", "values"}
_OPERATORS = {operator.value: operator for operator in Operator}

_NOBODY = NetworkPolicyPeer()
_NO_RULE = NetworkPolicyRule((_NOBODY,))


def network_policy(raw: object, source: str) -> tuple[NetworkPolicy | None, list[Problem]]:
    """One networking.k8s.io/v1 NetworkPolicy; None when its name, `spec` or `podSelector` cannot be read.

    `source` names the file or API path in problems, which carry the policy's name where it is known.
    """
    report = Report(source)
    try:
        policy = _network_policy(raw, report)
    except BadFieldError as bad:
        report.add(bad.field, bad.reason)
        policy = None
    return policy, report.finish()


def namespace(raw: object, source: str) -> tuple[Namespace | None, list[Problem]]:
    """One v1 Namespace; None when its name cannot be read. A bad label counts as missing."""
    report = Report(source)
    try:
        metadata = map_of(map_of(raw, ""), "", "metadata")
        name = name_of(metadata, "metadata", "name", LABEL)
        report.object = f"Namespace {name}"
        found = Namespace(name, labels_of(metadata, report), _annotations(metadata, report))
    except BadFieldError as bad:
        report.add(bad.field, bad.reason)
        found = None
    return found, report.finish()


def service(raw: object, source: str) -> tuple[Service | None, list[Problem]]:
    """One v1 Service; None when its name or `spec` cannot be read.

    An address or port that cannot be read is left out; a selector that cannot be read selects nothing.
    """
    report = Report(source)
    try:
        found = _service(raw, report)
    except BadFieldError as bad:
        report.add(bad.field, bad.reason)
        found = None
    return found, report.finish()


def policy_head(raw: object, source: str) -> tuple[PolicyHead | None, list[Problem]]:
    """The name and the annotations of a networking.k8s.io/v1 NetworkPolicy; None when it has no name."""
    report = Report(source)
    try:
        metadata = map_of(map_of(raw, ""), "", "metadata")
        key = key_of(metadata)
        report.object = f"NetworkPolicy {key}"
        found = PolicyHead(key, _annotations(metadata, report))
    except BadFieldError as bad:
        report.add(bad.field, bad.reason)
        found = None
    return found, report.finish()


def _annotations(metadata: Mapping[object, object], report: Report) -> dict[str, str]:
    found = annotations_of(metadata, report)
    mode = found.get(ANNOTATION_MODE)
    if mode not in (None, "audit", "enforce"):
        reason = f"must be audit or enforce, not {show(mode)}; it is not used"
        report.add(f"metadata.annotations[{ANNOTATION_MODE}]", reason)
        del found[ANNOTATION_MODE]
    return found


# --- NetworkPolicy ----------------------------------------------------------------------------------


def _network_policy(raw: object, report: Report) -> NetworkPolicy:
    whole = map_of(raw, "")
    metadata = map_of(whole, "", "metadata")
    key = key_of(metadata)
    report.object = f"NetworkPolicy {key}"
    spec = map_of(whole, "", "spec", missing={})
    selector = spec.get("podSelector")
    pod_selector = EVERYTHING if selector is None else _selector(selector, "spec.podSelector")
    for name in spec:
        if name not in _SPEC_FIELDS:
            report.add(f"spec.{path_of(name)}", "unknown field, it has no effect")
    return NetworkPolicy(
        key=key,
        pod_selector=pod_selector,
        policy_types=_policy_types(spec, report),
        ingress=_rules(spec, "ingress", "from", report),
        egress=_rules(spec, "egress", "to", report),
        uid=optional(metadata, "metadata", "uid", text_of, report) or "",
        annotations=_annotations(metadata, report),
        left_open=tuple(_left_open(spec)),
    )


def _left_open(spec: Mapping[object, object]) -> Iterator[str]:
    """Where nothing is written and everything is meant by it, by the API's own rules."""
    if spec.get("podSelector") is None:
        yield "spec.podSelector"
    if spec.get("egress") == [] and not spec.get("policyTypes"):
        yield "spec.egress"  # it does not even isolate, unlike `ingress: []`
    for name, peers in (("ingress", "from"), ("egress", "to")):
        rules = spec.get(name)
        for index, rule in enumerate(rules if isinstance(rules, list) else ()):
            if isinstance(rule, Mapping):
                for member in (peers, "ports"):
                    if rule.get(member) == []:
                        yield f"spec.{name}[{index}].{member}"


def _policy_types(spec: Mapping[object, object], report: Report) -> frozenset[Direction] | None:
    values = spec.get("policyTypes")
    if values is None:
        return None
    both = "its pods are isolated both ways"
    if not isinstance(values, list):
        reason = f"must be a list of Ingress and Egress, not {show(values)}; {both}"
        report.add("spec.policyTypes", reason)
        return frozenset(Direction)
    types: set[Direction] = set()
    for index, value in enumerate(values):
        if isinstance(value, str) and value in _TYPES:
            types.add(_TYPES[value])
        else:
            reason = f"must be Ingress or Egress, not {show(value)}; {both}"
            report.add(f"spec.policyTypes[{index}]", reason)
            types.update(Direction)
    return frozenset(types) or None  # the API server reads an empty list as a missing one


def _rules(
    spec: Mapping[object, object], name: str, peers: str, report: Report
) -> tuple[NetworkPolicyRule, ...]:
    values = spec.get(name)
    if values is None:
        return ()
    if not isinstance(values, list):
        report.add(f"spec.{name}", f"must be a list of rules, not {show(values)}; nothing is allowed by it")
        return (_NO_RULE,)  # something was meant: it isolates as a rule would
    rules: list[NetworkPolicyRule] = []
    for index, value in enumerate(values):
        try:
            rules.append(_rule(value, f"spec.{name}[{index}]", peers, report))
        except BadFieldError as bad:
            report.add(bad.field, f"{bad.reason}; this rule allows nothing")
            rules.append(_NO_RULE)
    return tuple(rules)


def _rule(value: object, field: str, peers: str, report: Report) -> NetworkPolicyRule:
    rule = map_of(value, field)
    known_fields(rule, field, {peers, "ports"})
    return NetworkPolicyRule(_peers(rule, field, peers, report), ports_of(rule, field, report, _port))


def _peers(
    rule: Mapping[object, object], field: str, name: str, report: Report
) -> tuple[NetworkPolicyPeer, ...]:
    values = rule.get(name)
    if values is None:
        return ()
    if not isinstance(values, list):
        raise BadFieldError(f"{field}.{name}", f"must be a list of peers, not {show(values)}")
    peers: list[NetworkPolicyPeer] = []
    for index, value in enumerate(values):
        try:
            peers.append(_peer(value, f"{field}.{name}[{index}]", report))
        except BadFieldError as bad:
            report.add(bad.field, f"{bad.reason}; this peer matches nothing")
            peers.append(_NOBODY)
    return tuple(peers)


def _peer(value: object, field: str, report: Report) -> NetworkPolicyPeer:
    peer = map_of(value, field)
    known_fields(peer, field, _PEER_FIELDS)
    pods, namespaces, block = (peer.get(name) for name in ("podSelector", "namespaceSelector", "ipBlock"))
    if block is not None:
        if pods is not None or namespaces is not None:
            raise BadFieldError(f"{field}.ipBlock", "excludes podSelector and namespaceSelector")
        return NetworkPolicyPeer(ip_block=_ip_block(block, f"{field}.ipBlock", report))
    if pods is None and namespaces is None:
        raise BadFieldError(field, "must have podSelector, namespaceSelector or ipBlock")
    return NetworkPolicyPeer(
        None if pods is None else _selector(pods, f"{field}.podSelector"),
        None if namespaces is None else _selector(namespaces, f"{field}.namespaceSelector"),
    )


def _ip_block(value: object, field: str, report: Report) -> IPBlock:
    block = map_of(value, field)
    known_fields(block, field, _BLOCK_FIELDS)
    if block.get("cidr") in (None, ""):
        raise BadFieldError(f"{field}.cidr", "missing")
    cidr = prefix_of(block["cidr"], f"{field}.cidr", report)
    return IPBlock(cidr, excepts_of(block, field, cidr, report))


def _port(value: object, field: str) -> NetworkPolicyPort:
    entry = map_of(value, field)
    known_fields(entry, field, _PORT_FIELDS)
    protocol = None if entry.get("protocol") is None else protocol_of(entry, field)
    port, end = entry.get("port"), entry.get("endPort")
    if isinstance(port, str):
        if port.isascii() and port.isdigit():
            raise BadFieldError(f"{field}.port", f"{show(port)} is text; write the number without quotes")
        if not _PORT_NAME.fullmatch(port):
            raise BadFieldError(f"{field}.port", f"{show(port)} is not a port name")
        if end is not None:
            raise BadFieldError(f"{field}.endPort", "needs a numeric port")
        return NetworkPolicyPort(protocol, port)
    if port is None:
        if end is not None:
            raise BadFieldError(f"{field}.endPort", "needs port")
        return NetworkPolicyPort(protocol)
    low = port_number(port, f"{field}.port")
    if end is None:
        return NetworkPolicyPort(protocol, low)
    high = port_number(end, f"{field}.endPort")
    if high < low:
        raise BadFieldError(f"{field}.endPort", f"{high} is less than port {low}")
    return NetworkPolicyPort(protocol, low, high)


# --- selectors --------------------------------------------------------------------------------------


def _selector(value: object, field: str) -> LabelSelector:
    """A LabelSelector; BadFieldError when any part of it is bad: less of it would select more."""
    selector = map_of(value, field)
    known_fields(selector, field, _SELECTOR_FIELDS)
    requirements: list[Requirement] = []
    labels = map_of(selector, field, "matchLabels", missing={})
    for name, text in labels.items():
        where = f"{field}.matchLabels[{path_of(name)}]"
        key = _label_key(name, where)
        requirements.append(Requirement(key, Operator.IN, (_label_value(text, where),)))
    expressions = selector.get("matchExpressions")
    if expressions is not None and not isinstance(expressions, list):
        raise BadFieldError(f"{field}.matchExpressions", f"must be a list, not {show(expressions)}")
    for index, expression in enumerate(expressions or ()):
        requirements.append(_requirement(expression, f"{field}.matchExpressions[{index}]"))
    return LabelSelector(tuple(sorted(set(requirements))))


def _requirement(value: object, field: str) -> Requirement:
    expression = map_of(value, field)
    known_fields(expression, field, _REQUIREMENT_FIELDS)
    key = _label_key(expression.get("key"), f"{field}.key")
    name = expression.get("operator")
    if not isinstance(name, str) or name not in _OPERATORS:
        choices = "must be In, NotIn, Exists or DoesNotExist"
        raise BadFieldError(f"{field}.operator", f"{choices}, not {show(name)}")
    operator = _OPERATORS[name]
    values = expression.get("values")
    if values is not None and not isinstance(values, list):
        raise BadFieldError(f"{field}.values", f"must be a list, not {show(values)}")
    if operator in (Operator.EXISTS, Operator.DOES_NOT_EXIST):
        if values:
            raise BadFieldError(f"{field}.values", f"must be empty with {operator}")
        return Requirement(key, operator)
    if not values:
        raise BadFieldError(f"{field}.values", f"must not be empty with {operator}")
    texts = {_label_value(text, f"{field}.values[{index}]") for index, text in enumerate(values)}
    return Requirement(key, operator, tuple(sorted(texts)))


def _label_key(value: object, field: str) -> str:
    if value is None:
        raise BadFieldError(field, "missing")
    if not isinstance(value, str) or not LABEL_KEY.fullmatch(value):
        raise BadFieldError(field, f"{show(value)} is not a label's name")
    return value


def _label_value(value: object, field: str) -> str:
    if not isinstance(value, str) or not LABEL_VALUE.fullmatch(value):
        quotes = "; write it in quotes" if isinstance(value, bool | int | float) else ""
        raise BadFieldError(field, f"{show(value)} is not a label's value{quotes}")
    return value


# --- Service ----------------------------------------------------------------------------------------


def _service(raw: object, report: Report) -> Service:
    whole = map_of(raw, "")
    metadata = map_of(whole, "", "metadata")
    key = key_of(metadata)
    report.object = f"Service {key}"
    spec = map_of(whole, "", "spec", missing={})
    if spec.get("type") == "ExternalName":
        return Service(key)
    addresses: dict[bytes, None] = {}
    given: list[tuple[str, object]] = [("spec.clusterIP", spec.get("clusterIP"))]
    for index, value in enumerate(list_of(spec, "spec", "clusterIPs", report)):
        given.append((f"spec.clusterIPs[{index}]", value))
    for field, value in given:
        if value in (None, "", "None"):  # headless, or not assigned yet
            continue
        try:
            addresses[address_of(value)] = None
        except ValueError as error:
            report.add(field, f"{error}; it is not used")
    ports: list[ServicePort] = []
    for index, value in enumerate(list_of(spec, "spec", "ports", report)):
        try:
            ports.append(_service_port(value, f"spec.ports[{index}]"))
        except BadFieldError as bad:
            report.add(bad.field, f"{bad.reason}; it is not used")
    return Service(key, _service_selector(spec, key, report), tuple(addresses), tuple(ports))


def _service_selector(spec: Mapping[object, object], key: Key, report: Report) -> dict[str, str]:
    labels: dict[str, str] = {}
    try:
        for name, value in entries_of(spec, "selector", report, "spec"):
            where = f"spec.selector[{path_of(name)}]"
            labels[_label_key(name, where)] = _label_value(value, where)
    except BadFieldError as bad:
        report.add(bad.field, f"{bad.reason}; the Service selects nothing")
        return {}
    return labels


def _service_port(value: object, field: str) -> ServicePort:
    entry = map_of(value, field)
    port = port_number(entry.get("port"), f"{field}.port")
    target = entry.get("targetPort")
    if target in (None, 0, ""):  # the API server fills in the port
        target = port
    elif isinstance(target, str):
        if not _PORT_NAME.fullmatch(target):
            raise BadFieldError(f"{field}.targetPort", f"{show(target)} is not a port name")
    else:
        target = port_number(target, f"{field}.targetPort")
    return ServicePort(protocol_of(entry, field), port, target)
