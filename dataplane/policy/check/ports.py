"""Ports: names that no pod has, and a Service's port where the container's is meant.

A pod may listen on a port that it does not declare, so a number that nobody declares says nothing by
itself. A name that nobody declares opens nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from dataplane.model import EVERYTHING, PROTOCOL_NAMES, Direction, NetworkPolicyPort, Pod, Service
from dataplane.policy.check.ends import on_the_wrong_end
from dataplane.policy.check.findings import Check, Finding, Severity
from dataplane.policy.check.world import Pods, RuleAt, World, names, near, protocol_of
from dataplane.policy.normalize import PodPeer
from dataplane.wording import count

NAMED_PORT_UNKNOWN = Check(
    "named-port-unknown",
    Severity.ERROR,
    "A named port that no pod has",
    "No pod concerned declares a port of that name, so the entry opens nothing. For ingress these are the "
    "pods that the policy selects, for egress the pods that `to` means.",
)
NAMED_PORT_PROTOCOL = Check(
    "named-port-protocol",
    Severity.ERROR,
    "A named port with another protocol than the pods give it",
    "A named port is looked up by name and protocol; without `protocol` it means TCP.",
)
NAMED_PORT_SOME = Check(
    "named-port-on-some-pods",
    Severity.NOTE,
    "A named port that only some of the pods have",
    "The entry opens nothing on the others. Silent where the selector is {} and so means pods of all kinds, "
    "where it matches more than 500 pods, and where another entry of the rule serves the others.",
)
NAMED_PORT_WITHOUT_PODS = Check(
    "named-port-to-addresses",
    Severity.ERROR,
    "A named port in an egress rule that means no pods",
    "Names are looked up on the pods that `to` means; an ipBlock has none, so the entry opens nothing.",
)
SERVICE_PORT = Check(
    "service-port",
    Severity.WARNING,
    "A Service's port where the container's port is meant",
    "Policies judge packets after Service translation: the container's port counts. Found where a rule has "
    "the port of a Service in front of the pods, the Service's targetPort is another one that the rule does "
    "not allow, and no pod concerned declares the number.",
)
CHECKS = (
    NAMED_PORT_UNKNOWN,
    NAMED_PORT_PROTOCOL,
    NAMED_PORT_SOME,
    NAMED_PORT_WITHOUT_PODS,
    SERVICE_PORT,
)

_MANY = 500  # pods; beyond that, naming those without a port helps nobody, and takes long to find


def find(world: World) -> Iterator[Finding]:
    """What is to say about ports."""
    if not world.knows_pods:
        return
    fronts = _fronts(world)
    anybody = _Anybody(world)
    for rule in world.every_rule():
        if not rule.written.ports or on_the_wrong_end(world, rule):
            continue
        if rule.normal.names:
            yield from _names(world, rule, anybody)
        yield from _service_ports(world, rule, fronts)


class _Anybody:
    """The pods that an egress rule without `to` means by a named port: whoever has it."""

    def __init__(self, world: World) -> None:
        self._named: dict[str, list[Pod]] = {}
        for pod in world.snapshot.pods:
            if not pod.finished:
                for port in pod.ports:
                    if port.name:
                        self._named.setdefault(port.name, []).append(pod)

    def with_name(self, name: str) -> Pods:
        return tuple(self._named.get(name, ()))


def _concerned(world: World, rule: RuleAt) -> list[Pods]:
    """The pods on whose side the ports are: those selected, or each peer's. Only non-empty groups."""
    if rule.direction is Direction.INGRESS:
        groups = [world.subjects(rule.policy)]
    else:
        groups = [world.matched(peer.normal) for peer in rule.peers() if isinstance(peer.normal, PodPeer)]
    return [group for group in groups if group]


def _names(world: World, rule: RuleAt, anybody: _Anybody) -> Iterator[Finding]:
    groups = _concerned(world, rule)
    open_to_all = rule.direction is Direction.EGRESS and rule.normal.peers is None
    said = False  # once for a rule: its other entries leave out the same pods
    for field, port in zip(world.port_fields(rule), rule.written.ports, strict=True):
        if not isinstance(port.port, str):
            continue
        name, protocol = port.port, protocol_of(port)
        if open_to_all:
            groups = [pods] if (pods := anybody.with_name(name)) else []
        elif not groups:
            if rule.direction is Direction.EGRESS and rule.normal.peers and not _pod_peers(rule):
                yield NAMED_PORT_WITHOUT_PODS.at(
                    rule.policy.key,
                    f"{field}.port",
                    f"port {name} is a name, and the addresses of an ipBlock have no named ports",
                    "write the number",
                )
            continue
        if not any(_has(pod, name, protocol) for group in groups for pod in group):
            yield _unknown_name(rule, field, port, groups)
        elif not said and not open_to_all and not _selects_all_kinds(rule):
            pods = tuple({pod.key: pod for group in groups for pod in group}.values())
            left = _unserved(rule, pods) if len(pods) <= _MANY else []
            if left:
                said = True
                right = [pod.key for pod in pods if _has(pod, name, protocol)]
                yield NAMED_PORT_SOME.at(
                    rule.policy.key,
                    f"{field}.port",
                    f"{names(right)} {'has' if len(right) == 1 else 'have'} a port named {name}, "
                    f"{names(pod.key for pod in left)} {'has' if len(left) == 1 else 'have'} not",
                    "name the containers' ports alike, or select only the pods that have it",
                )


def _has(pod: Pod, name: str, protocol: int) -> bool:
    return any(port.name == name and port.protocol == protocol for port in pod.ports)


def _unknown_name(rule: RuleAt, field: str, port: NetworkPolicyPort, groups: list[Pods]) -> Finding:
    """No pod has a port of that name and protocol; `groups` are the pods that might."""
    name = port.port
    pods = {pod.key: pod for group in groups for pod in group}
    others = [(key, each) for key, pod in pods.items() for each in pod.ports if each.name == name]
    if others:
        theirs, written = PROTOCOL_NAMES[others[0][1].protocol], PROTOCOL_NAMES[protocol_of(port)]
        return NAMED_PORT_PROTOCOL.at(
            rule.policy.key,
            f"{field}.protocol",
            f"port {name} is {theirs} on {names(key for key, _ in others)}, here it is {written}"
            + ("" if port.protocol else " (the default)"),
            f"write `protocol: {theirs}`",
        )
    side = "selected" if rule.direction is Direction.INGRESS else "destination"
    if not pods:
        message = f"no pod has a port named {name}"
    elif len(pods) == 1:
        message = f"{next(iter(pods))}, the only {side} pod, has no port named {name}"
    else:
        message = f"none of the {count(len(pods), f'{side} pod')} has a port named {name}"
    known = sorted({each.name for pod in pods.values() for each in pod.ports if each.name})
    return NAMED_PORT_UNKNOWN.at(rule.policy.key, f"{field}.port", message, _suggestion(str(name), known))


def _suggestion(name: str, known: list[str]) -> str:
    if meant := near(name, known):
        return f"did you mean {meant}?"
    return (
        f"the names there: {names(known, 6)}" if known else "write the number, or name the container's port"
    )


def _pod_peers(rule: RuleAt) -> list[PodPeer]:
    return [peer.normal for peer in rule.peers() if isinstance(peer.normal, PodPeer)]


def _selects_all_kinds(rule: RuleAt) -> bool:
    if rule.direction is Direction.INGRESS:
        return rule.policy.pod_selector == EVERYTHING
    return any(peer.pods == EVERYTHING for peer in _pod_peers(rule))


def _unserved(rule: RuleAt, pods: Pods) -> list[Pod]:
    """The pods on which no entry of the rule opens a port that they declare."""
    wanted = {(port.name, port.protocol) for port in rule.normal.names}
    return [
        pod
        for pod in pods
        if not any(
            (port.name, port.protocol) in wanted or _allows(rule, port.protocol, port.port)
            for port in pod.ports
        )
    ]


def _allows(rule: RuleAt, protocol: int, number: int) -> bool:
    return any(
        each.protocol == protocol and each.first <= number <= each.last for each in rule.normal.numbers
    )


class _Front(NamedTuple):
    """A Service's port that leads to pods' ports of other numbers."""

    service: Service
    backends: Pods
    targets: frozenset[int]
    names: frozenset[str]  # that the pods give these ports


def _fronts(world: World) -> dict[tuple[int, int], list[_Front]]:
    """By (protocol, the Service's port)."""
    fronts: defaultdict[tuple[int, int], list[_Front]] = defaultdict(list)
    for service in world.snapshot.services:
        backends = world.backends(service) if service.selector else ()
        for protocol, number in {(port.protocol, port.port) for port in service.ports}:
            targets = _targets(service, (protocol, number), backends)
            if backends and targets and number not in targets:
                there = (port for pod in backends for port in pod.ports if port.protocol == protocol)
                known = frozenset(port.name for port in there if port.name and port.port in targets)
                fronts[protocol, number].append(_Front(service, backends, targets, known))
    return fronts


def _opens(rule: RuleAt, protocol: int, targets: frozenset[int], known: frozenset[str]) -> bool:
    """Whether the rule has one of the targets too, by number or by name: the author knows of them."""
    return any(_allows(rule, protocol, target) for target in targets) or any(
        port.name in known for port in rule.normal.names if port.protocol == protocol
    )


def _service_ports(
    world: World, rule: RuleAt, fronts: dict[tuple[int, int], list[_Front]]
) -> Iterator[Finding]:
    groups = _concerned(world, rule)
    if not groups or len(groups) != (
        1 if rule.direction is Direction.INGRESS else len(rule.normal.peers or ())
    ):
        return  # an address among the peers: the port may be meant for it
    for field, port in zip(world.port_fields(rule), rule.written.ports, strict=True):
        if not isinstance(port.port, int) or port.end_port not in (None, port.port):
            continue
        wanted = (protocol_of(port), port.port)
        if wanted not in fronts or any(wanted in world.declared(group) for group in groups):
            continue
        opened: set[tuple[frozenset[int], frozenset[str]]] = set()  # thousands of Services are alike
        for service, backends, targets, known in fronts[wanted]:
            if (targets, known) in opened:
                continue
            if _opens(rule, wanted[0], targets, known):
                opened.add((targets, known))
                continue
            if all(world.keys(backends).isdisjoint(world.keys(group)) for group in groups):
                continue
            yield SERVICE_PORT.at(
                rule.policy.key,
                f"{field}.port",
                f"{port.port} is the port of Service {service.key}; its pods listen on "
                f"{names(sorted(targets))}, and their port is what counts",
                f"write `port: {min(targets)}`" if len(targets) == 1 else "write the pods' port, or its name",
            )
            break


def _targets(service: Service, wanted: tuple[int, int], backends: Pods) -> frozenset[int]:
    """The pods' ports that the Service's port leads to."""
    targets: set[int] = set()
    for protocol, number, target in service.ports:
        if (protocol, number) != wanted:
            continue
        if isinstance(target, int):
            targets.add(target)
        else:
            targets.update(
                port.port
                for pod in backends
                for port in pod.ports
                if port.name == target and port.protocol == protocol
            )
    return frozenset(targets)
