"""The objects as checks need them: every selector is evaluated once, whoever asks."""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

from dataplane.model import (
    PROTOCOLS,
    Direction,
    IPBlock,
    Key,
    LabelSelector,
    NetworkPolicy,
    NetworkPolicyPeer,
    NetworkPolicyPort,
    NetworkPolicyRule,
    Operator,
    Pod,
    Service,
    Snapshot,
)
from dataplane.policy.normalize import NormalPolicy, NormalRule, PodPeer, normalize
from dataplane.policy.resolve import namespace_labels
from dataplane.policy.selectors import LabelIndex, matches

_DROPPED_PORT = re.compile(r"spec\.((?:in|e)gress)\[(\d+)\]\.ports\[(\d+)\]")
_NOTHING = NetworkPolicyPeer()

Pods = tuple[Pod, ...]


class Peer(NamedTuple):
    """One item of `from` or `to`: as written, and completed."""

    field: str
    written: NetworkPolicyPeer
    normal: PodPeer | IPBlock


class RuleAt(NamedTuple):
    """One rule that is in force, and where it stands."""

    policy: NetworkPolicy
    direction: Direction
    place: int
    written: NetworkPolicyRule
    normal: NormalRule

    @property
    def field(self) -> str:
        return f"spec.{self.direction}[{self.place}]"

    @property
    def allows_all(self) -> bool:
        """Whether it lets anybody in or out, on every port."""
        return self.normal.peers is None and self.normal.every_port

    def peers(self) -> Iterator[Peer]:
        """Those that can be used; a bad one is written as a peer without members."""
        name = "from" if self.direction is Direction.INGRESS else "to"
        places = [index for index, peer in enumerate(self.written.peers) if peer != _NOTHING]
        for index, normal in zip(places, self.normal.peers or (), strict=True):
            yield Peer(f"{self.field}.{name}[{index}]", self.written.peers[index], normal)


class World:
    """A snapshot, indexed. Pods are the live ones unless it says otherwise, sorted by name."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.policies = snapshot.network_policies
        self.normal: dict[Key, NormalPolicy] = {policy.key: normalize(policy) for policy in self.policies}
        self.namespaces = namespace_labels(snapshot)
        self._live: LabelIndex[Pod] = LabelIndex()
        self._finished: LabelIndex[Pod] = LabelIndex()
        self._in_namespace: defaultdict[str, list[Pod]] = defaultdict(list)
        for pod in snapshot.pods:
            (self._finished if pod.finished else self._live).add(pod)
            if not pod.finished:
                self._in_namespace[pod.key.namespace].append(pod)
        self._namespaces_of: dict[LabelSelector, frozenset[str]] = {}
        self._selected: dict[tuple[frozenset[str], LabelSelector], Pods] = {}
        self._subjects: dict[Key, Pods] = {}
        # By id: hashing thousands of pods costs more than what is asked. `_held` keeps them alive.
        self._held: list[Pods] = []
        self._keys: dict[int, frozenset[Key]] = {}
        self._declared: dict[int, frozenset[tuple[int, int]]] = {}
        self._rules: dict[Key, tuple[RuleAt, ...]] = {}
        self._dropped_ports: defaultdict[tuple[str, str], set[int]] = defaultdict(set)
        for problem in snapshot.problems:
            if match := _DROPPED_PORT.match(problem.field):
                rule = f"spec.{match[1]}[{match[2]}]"
                self._dropped_ports[problem.object, rule].add(int(match[3]))

    # --- what the input holds -------------------------------------------------------------------------

    @property
    def knows_pods(self) -> bool:
        """Whether there are pods at all: without any, nobody can say what a selector misses."""
        return bool(self.snapshot.pods)

    @property
    def knows_namespaces(self) -> bool:
        """Whether Namespace objects were given: without them, labels of namespaces are not known."""
        return bool(self.snapshot.namespaces)

    def known_namespace(self, name: str) -> bool:
        """Whether there is a Namespace object of that name."""
        return name in self._namespace_names

    @cached_property
    def _namespace_names(self) -> frozenset[str]:
        return frozenset(namespace.name for namespace in self.snapshot.namespaces)

    def in_namespace(self, namespace: str) -> list[Pod]:
        """Its pods."""
        return self._in_namespace.get(namespace, [])

    @property
    def populated(self) -> int:
        """In how many namespaces there are pods."""
        return len(self._in_namespace)

    # --- selectors ------------------------------------------------------------------------------------

    def namespaces_of(self, selector: LabelSelector) -> frozenset[str]:
        """The namespaces that a namespaceSelector matches."""
        found = self._namespaces_of.get(selector)
        if found is None:
            found = frozenset(name for name, labels in self.namespaces.items() if matches(selector, labels))
            self._namespaces_of[selector] = found
        return found

    def select(self, namespaces: frozenset[str], selector: LabelSelector) -> Pods:
        """The pods of `namespaces` that `selector` matches. Equal questions get the same tuple."""
        found = self._selected.get((namespaces, selector))
        if found is None:
            found = tuple(sorted(self._live.select(namespaces, selector), key=lambda pod: pod.key))
            self._selected[namespaces, selector] = found
        return found

    def selected(self, policy: NetworkPolicy) -> Pods:
        """The pods that the policy's podSelector matches, those on their host's network included."""
        return self.select(frozenset((policy.key.namespace,)), policy.pod_selector)

    def subjects(self, policy: NetworkPolicy) -> Pods:
        """The pods that the policy is enforced on."""
        found = self._subjects.get(policy.key)
        if found is None:
            found = self.selected(policy)
            if any(pod.host_network for pod in found):
                found = tuple(pod for pod in found if not pod.host_network)
            self._subjects[policy.key] = found
        return found

    def matched(self, peer: PodPeer) -> Pods:
        """The pods that a peer means."""
        return self.select(self.namespaces_of(peer.namespaces), peer.pods)

    def finished(self, namespaces: Iterable[str], selector: LabelSelector) -> Pod | None:
        """A pod that has ended and would match, if there is one."""
        return min(
            self._finished.select(frozenset(namespaces), selector), key=lambda pod: pod.key, default=None
        )

    def elsewhere(self, selector: LabelSelector, namespace: str) -> Pods:
        """The pods of all other namespaces that `selector` matches."""
        return self.select(self._all_namespaces - {namespace}, selector)

    @cached_property
    def _all_namespaces(self) -> frozenset[str]:
        return frozenset(self.namespaces)

    def backends(self, service: Service) -> Pods:
        """The pods behind a Service."""
        return self.select(frozenset((service.key.namespace,)), LabelSelector.of(service.selector))

    def keys(self, pods: Pods) -> frozenset[Key]:
        """The names of what `select` found."""
        found = self._keys.get(id(pods))
        if found is None:
            self._held.append(pods)
            found = self._keys[id(pods)] = frozenset(pod.key for pod in pods)
        return found

    def declared(self, pods: Pods) -> frozenset[tuple[int, int]]:
        """The (protocol, port) that any of `pods` declares."""
        found = self._declared.get(id(pods))
        if found is None:
            self._held.append(pods)
            found = frozenset((port.protocol, port.port) for pod in pods for port in pod.ports)
            self._declared[id(pods)] = found
        return found

    # --- rules ----------------------------------------------------------------------------------------

    def rules(self, policy: NetworkPolicy) -> tuple[RuleAt, ...]:
        """The policy's rules for the directions that it isolates, ingress first."""
        found = self._rules.get(policy.key)
        if found is None:
            normal = self.normal[policy.key]
            found = tuple(
                RuleAt(policy, direction, index, written, completed)
                for direction, rules, normals in (
                    (Direction.INGRESS, policy.ingress, normal.ingress),
                    (Direction.EGRESS, policy.egress, normal.egress),
                )
                if direction in normal.isolates
                for index, (written, completed) in enumerate(zip(rules, normals, strict=True))
            )
            self._rules[policy.key] = found
        return found

    def every_rule(self) -> Iterator[RuleAt]:
        """The rules of all policies."""
        for policy in self.policies:
            yield from self.rules(policy)

    def port_fields(self, rule: RuleAt) -> list[str]:
        """The field paths of `rule.written.ports`: entries that could not be read are not among them."""
        dropped = self._dropped_ports.get((f"NetworkPolicy {rule.policy.key}", rule.field), set())
        fields: list[str] = []
        index = 0
        while len(fields) < len(rule.written.ports):
            if index not in dropped:
                fields.append(f"{rule.field}.ports[{index}]")
            index += 1
        return fields

    def label_values(self, namespace: str, key: str) -> list[str]:
        """The values that pods of `namespace` have for a label."""
        return sorted(self._labels.get(namespace, {}).get(key, ()))

    def label_keys(self, namespace: str) -> list[str]:
        """The labels that pods of `namespace` have."""
        return sorted(self._labels.get(namespace, ()))

    @cached_property
    def _labels(self) -> Mapping[str, Mapping[str, set[str]]]:
        labels: defaultdict[str, defaultdict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
        for pod in self.snapshot.pods:
            for key, value in pod.labels.items():
                labels[pod.key.namespace][key].add(value)
        return labels


def selector_text(selector: LabelSelector) -> str:
    """A selector as kubectl takes it: `app=web,tier in (a,b),!old`."""
    parts: list[str] = []
    for key, operator, values in selector.requirements:
        match operator:
            case Operator.IN if len(values) == 1:
                parts.append(f"{key}={values[0]}")
            case Operator.IN:
                parts.append(f"{key} in ({','.join(values)})")
            case Operator.NOT_IN:
                parts.append(f"{key} notin ({','.join(values)})")
            case Operator.EXISTS:
                parts.append(key)
            case Operator.DOES_NOT_EXIST:
                parts.append(f"!{key}")
    return ",".join(parts) if parts else "{}"


def names(items: Iterable[object], limit: int = 3) -> str:
    """`a, b, c and 4 more`."""
    texts = [str(item) for item in items]
    shown = texts[:limit]
    if len(texts) > limit:
        return f"{', '.join(shown)} and {len(texts) - limit} more"
    return " and ".join(filter(None, (", ".join(shown[:-1]), shown[-1]))) if shown else ""


def near(word: str, words: Sequence[str]) -> str:
    """The word that was probably meant, or nothing."""
    return next(iter(difflib.get_close_matches(word, words[:1000], 1, 0.6)), "")


def protocol_of(port: NetworkPolicyPort) -> int:
    """The IP protocol number that an item of `ports` means."""
    return PROTOCOLS["TCP"] if port.protocol is None else port.protocol
