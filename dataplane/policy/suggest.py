"""The smallest NetworkPolicy that would allow a packet which one end denies.

It selects the denied pod's workload by the labels that tell it from others, allows one peer at one
port, and isolates nobody who is not isolated in that direction today: a policy that selects a pod
isolates it, and an allow rule must not cut what it did not mean.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dataplane.addresses import BITS, Prefix, format_address
from dataplane.manifests import selector_manifest, to_yaml
from dataplane.model import (
    EVERYTHING,
    PROTOCOL_NAMES,
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
    Snapshot,
)
from dataplane.policy.normalize import NAME_LABEL
from dataplane.policy.selectors import matches
from dataplane.policy.why import Whys

# What names a workload, most telling first; other labels follow by name.
_TELLING = (
    "app.kubernetes.io/name",
    "app.kubernetes.io/component",
    "app.kubernetes.io/instance",
    "app",
    "k8s-app",
    "name",
    "component",
    "tier",
    "role",
    "app.kubernetes.io/part-of",
)
# What controllers and package managers write anew for each pod, roll-out or release.
_PASSING = frozenset(
    {
        "pod-template-hash",
        "pod-template-generation",
        "controller-revision-hash",
        "statefulset.kubernetes.io/pod-name",
        "apps.kubernetes.io/pod-index",
        "batch.kubernetes.io/job-name",
        "batch.kubernetes.io/controller-uid",
        "batch.kubernetes.io/job-completion-index",
        "job-name",
        "controller-uid",
        "app.kubernetes.io/version",
        "helm.sh/chart",
        "chart",
    }
)
_NAME_LENGTH = 63  # longer ones are valid, but nobody reads them


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A policy to add, or None where none can be written; `comments` say what to know before applying it."""

    direction: Direction
    policy: NetworkPolicy | None
    comments: tuple[str, ...]

    def document(self) -> dict[str, Any] | None:
        """The policy as a manifest, ready for YAML or JSON."""
        return None if self.policy is None else _document(self.policy, self.direction)

    def yaml(self) -> str:
        """The policy as a YAML document, ready to apply, with the comments as such; both may be missing."""
        document = self.document()
        comments = "".join(f"# {comment}\n" for comment in self.comments)
        # After the line that begins the document: a tool that splits documents keeps them with it.
        text = to_yaml([document]) if document is not None else "---\n"
        return text.replace("---\n", f"---\n{comments}", 1)


class Suggestions:
    """Writes them for one state of the cluster, the one that `whys` explains."""

    def __init__(self, known: Snapshot, whys: Whys) -> None:
        self._whys = whys
        self._written = {policy.key: policy for policy in known.network_policies}
        self._taken = set(self._written) | {endpoint.policy for endpoint in known.policy_endpoints}
        self._live = {pod.key: pod for pod in known.pods if not pod.finished}
        self._by_namespace: defaultdict[str, list[Pod]] = defaultdict(list)
        for pod in self._live.values():
            self._by_namespace[pod.key.namespace].append(pod)
        self._labels: dict[Key, Mapping[str, str]] = {}

    def allow(
        self, pod: Key, direction: Direction, peer: bytes, protocol: int | None, port: int
    ) -> Suggestion:
        """The policy by which `pod` would send to (egress) or receive from (ingress) the address `peer`.

        `protocol` is the IP protocol number, None for ICMP; `port` the destination port.
        """
        comments: list[str] = []
        selector = self._subject(pod, direction, comments)
        item, peer_name = self._peer(pod.namespace, peer, comments)
        if selector is None:
            return Suggestion(direction, None, tuple(comments))
        if protocol is None:
            ports: tuple[NetworkPolicyPort, ...] = ()
            what = "icmp"
            comments.append("NetworkPolicy cannot name ICMP: without ports this rule opens every port, too")
        else:
            ports = (NetworkPolicyPort(protocol, port),)
            what = f"{port}-{PROTOCOL_NAMES[protocol].lower()}"
        rules = (NetworkPolicyRule((item,), ports),)
        egress = direction is Direction.EGRESS
        own = _workload(selector) or pod.name
        policy = NetworkPolicy(
            self._name(pod.namespace, f"{own}-{'to' if egress else 'from'}-{peer_name}-{what}"),
            selector,
            frozenset({direction}),
            ingress=() if egress else rules,
            egress=rules if egress else (),
        )
        return Suggestion(direction, policy, tuple(comments))

    # --- the denied pod -----------------------------------------------------------------------------------

    def _subject(self, pod: Key, direction: Direction, comments: list[str]) -> LabelSelector | None:
        policies = self._whys.policies(pod, direction)
        known_policies = [self._written[key] for key in policies if key in self._written]
        written = [policy.pod_selector for policy in known_policies]
        known = self._live.get(pod)
        if known is None:
            if not written:
                comments.append(
                    f"the labels of {pod} are not known here, so no policy can name it: give Pod objects too"
                )
                return None
            comments.append(
                f"the labels of {pod} are not known here: this selects all pods of {known_policies[0].key}"
            )
            return written[0]
        selector = self._workload_of(known, comments)
        if not selector.requirements:
            comments.append(f"{pod} has no labels: this selects every pod of namespace {pod.namespace}")
        if not policies:
            return selector  # strict mode: every pod is isolated without any policy
        others = self._newly_isolated(selector, pod.namespace, direction)
        if others:
            # What an isolating policy selects is isolated: with its requirements added, nobody else is cut.
            narrowed = [_both(selector, each) for each in written] or [LabelSelector.of(known.labels)]
            selector = min(
                narrowed, key=lambda each: len(self._newly_isolated(each, pod.namespace, direction))
            )
            others = self._newly_isolated(selector, pod.namespace, direction)
        if others:
            names = ", ".join(str(key) for key in others[:3]) + (" and others" if len(others) > 3 else "")
            comments.append(
                f"WARNING: this also selects {names}, not isolated for {direction} today: they would be"
            )
        return selector

    def _newly_isolated(self, selector: LabelSelector, namespace: str, direction: Direction) -> list[Key]:
        """The pods that a policy with this selector would newly isolate."""
        return sorted(
            pod.key
            for pod in self._by_namespace[namespace]
            if pod.ips  # without an address it is not isolated yet, by whatever policy
            and not pod.host_network
            and not self._whys.policies(pod.key, direction)
            and matches(selector, pod.labels)
        )

    # --- the peer -----------------------------------------------------------------------------------------

    def _peer(self, namespace: str, address: bytes, comments: list[str]) -> tuple[NetworkPolicyPeer, str]:
        holders = self._whys.holders(address)
        text = format_address(address)
        if len(holders) == 1 and not holders[0].host_network and holders[0].labels:
            pod = holders[0]
            selector = self._workload_of(pod, comments)
            there = pod.key.namespace
            own = there == namespace
            spaces = None if own else LabelSelector.of({NAME_LABEL: there})
            name = _workload(selector) or pod.key.name
            return NetworkPolicyPeer(selector, spaces), name if own else f"{there}-{name}"
        if any(pod.host_network for pod in holders):
            comments.append(f"{text} is a node's address: all that runs on that node's network has it")
        elif holders:
            comments.append(
                f"{holders[0].key} has no labels: a rule can only name its address, which may change"
            )
        elif self._whys.unlabelled(address):
            comments.append(f"the labels of the pod with {text} are not known here: its address may change")
        block = IPBlock(Prefix(address, BITS[len(address)]))
        return NetworkPolicyPeer(ip_block=block), re.sub(r"[^0-9a-f]+", "-", text).strip("-")

    # --- labels and names ---------------------------------------------------------------------------------

    def _workload_of(self, pod: Pod, comments: list[str]) -> LabelSelector:
        """Those of a pod's lasting labels that it takes to select as few pods of its namespace as all do."""
        if pod.key not in self._labels:
            lasting = {key: value for key, value in pod.labels.items() if key not in _PASSING}
            self._labels[pod.key] = self._fewest(pod, lasting or pod.labels)
        labels = self._labels[pod.key]
        if labels and _PASSING.issuperset(labels):
            comments.append(
                f"{pod.key} has no label that outlives a roll-out: give it one, and use that here"
            )
        return LabelSelector.of(labels)

    def _fewest(self, pod: Pod, labels: Mapping[str, str]) -> Mapping[str, str]:
        ranked = sorted(
            labels, key=lambda key: (_TELLING.index(key) if key in _TELLING else len(_TELLING), key)
        )
        left = self._by_namespace[pod.key.namespace]
        chosen: dict[str, str] = {}
        for key in ranked:
            fewer = [each for each in left if each.labels.get(key) == labels[key]]
            # The first is taken in any case: without one the selector would select pods yet to come.
            if not chosen or len(fewer) < len(left):
                chosen[key] = labels[key]
                left = fewer
        return chosen

    def _name(self, namespace: str, wanted: str) -> Key:
        base = re.sub(r"[^a-z0-9]+", "-", f"allow-{wanted}".lower())[:_NAME_LENGTH].strip("-")
        key, number = Key(namespace, base), 1
        while key in self._taken:
            number += 1
            key = Key(namespace, f"{base[: _NAME_LENGTH - len(str(number)) - 1].rstrip('-')}-{number}")
        return key


def _workload(selector: LabelSelector) -> str:
    """A word for what a selector selects: the value of its most telling label."""
    values = {each.key: each.values[0] for each in selector.requirements if each.operator is Operator.IN}
    return next((values[key] for key in _TELLING if values.get(key)), "")


def _both(one: LabelSelector, other: LabelSelector) -> LabelSelector:
    return LabelSelector(tuple(sorted({*one.requirements, *other.requirements})))


def _document(policy: NetworkPolicy, direction: Direction) -> dict[str, Any]:
    egress = direction is Direction.EGRESS
    peers = "to" if egress else "from"
    rules = [
        {peers: [_peer_document(peer) for peer in rule.peers]}
        | ({"ports": [_port_document(port) for port in rule.ports]} if rule.ports else {})
        for rule in (policy.egress if egress else policy.ingress)
    ]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": policy.key.name, "namespace": policy.key.namespace},
        "spec": {
            "podSelector": selector_manifest(policy.pod_selector),
            "policyTypes": ["Egress" if egress else "Ingress"],
            str(direction): rules,
        },
    }


def _peer_document(peer: NetworkPolicyPeer) -> dict[str, Any]:
    if peer.ip_block is not None:
        return {"ipBlock": {"cidr": str(peer.ip_block.cidr)}}
    spaces = peer.namespace_selector
    return ({} if spaces is None else {"namespaceSelector": selector_manifest(spaces)}) | {
        "podSelector": selector_manifest(peer.pod_selector or EVERYTHING)
    }


def _port_document(port: NetworkPolicyPort) -> dict[str, Any]:
    return {"protocol": PROTOCOL_NAMES[port.protocol or 0], "port": port.port}
