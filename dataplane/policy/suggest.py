"""The smallest NetworkPolicy that would allow a packet which one end denies.

It selects the denied pod's workload by the labels that tell it from others, allows one peer at one
port, and isolates nobody who is not isolated in that direction today: a policy that selects a pod
isolates it, and an allow rule must not cut what it did not mean.
"""

from __future__ import annotations

import re
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
    Snapshot,
)
from dataplane.policy.normalize import NAME_LABEL
from dataplane.policy.selectors import matches
from dataplane.policy.why import Whys
from dataplane.policy.workloads import Workloads, unused_name, word_of


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A policy to add, or None where none can be written; `comments` say what to know before applying it."""

    direction: Direction
    policy: NetworkPolicy | None
    comments: tuple[str, ...]

    def document(self) -> dict[str, Any] | None:
        """The policy as a manifest, ready for YAML or JSON."""
        return None if self.policy is None else policy_document(self.policy)

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
        self._workloads = Workloads(known.pods)

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
        own = word_of(selector) or pod.name
        policy = NetworkPolicy(
            unused_name(
                pod.namespace, f"allow-{own}-{'to' if egress else 'from'}-{peer_name}-{what}", self._taken
            ),
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
        known = self._workloads.live.get(pod)
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
        selector = self._workloads.selector_of(known, comments)
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
            for pod in self._workloads.by_namespace[namespace]
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
            selector = self._workloads.selector_of(pod, comments)
            there = pod.key.namespace
            own = there == namespace
            spaces = None if own else LabelSelector.of({NAME_LABEL: there})
            name = word_of(selector) or pod.key.name
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


def _both(one: LabelSelector, other: LabelSelector) -> LabelSelector:
    return LabelSelector(tuple(sorted({*one.requirements, *other.requirements})))


def policy_document(policy: NetworkPolicy) -> dict[str, Any]:
    """A policy as a manifest. It must have policy types; rules are written for these alone."""
    types = [direction for direction in Direction if direction in (policy.policy_types or ())]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": policy.key.name, "namespace": policy.key.namespace},
        "spec": {
            "podSelector": selector_manifest(policy.pod_selector),
            "policyTypes": [direction.capitalize() for direction in types],
            **{str(direction): _rule_documents(policy, direction) for direction in types},
        },
    }


def _rule_documents(policy: NetworkPolicy, direction: Direction) -> list[dict[str, Any]]:
    egress = direction is Direction.EGRESS
    return [
        {"to" if egress else "from": [_peer_document(peer) for peer in rule.peers]}
        | ({"ports": [_port_document(port) for port in rule.ports]} if rule.ports else {})
        for rule in (policy.egress if egress else policy.ingress)
    ]


def _peer_document(peer: NetworkPolicyPeer) -> dict[str, Any]:
    if peer.ip_block is not None:
        return {"ipBlock": {"cidr": str(peer.ip_block.cidr)}}
    spaces = peer.namespace_selector
    return ({} if spaces is None else {"namespaceSelector": selector_manifest(spaces)}) | {
        "podSelector": selector_manifest(peer.pod_selector or EVERYTHING)
    }


def _port_document(port: NetworkPolicyPort) -> dict[str, Any]:
    document: dict[str, Any] = {"protocol": PROTOCOL_NAMES[port.protocol or 0], "port": port.port}
    return document | ({} if port.end_port is None else {"endPort": port.end_port})
