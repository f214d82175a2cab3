"""A NetworkPolicy as the API server would complete it: defaults filled in, nothing left to interpret.

* protocol missing → TCP
* policyTypes missing or empty → Ingress always, Egress when there are egress rules
* empty `from`, `to` and `ports` equal missing ones: anybody, every port
* rules for a direction that the policy does not isolate are dropped: they mean nothing
"""

from __future__ import annotations

from typing import NamedTuple

from dataplane.model import (
    EVERYTHING,
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
    PortRange,
    Requirement,
)

NAME_LABEL = "kubernetes.io/metadata.name"  # the API server sets it on every namespace


class NamedPort(NamedTuple):
    """A port by the name that a pod's container gives it."""

    name: str
    protocol: int


class PodPeer(NamedTuple):
    """The pods that `pods` matches in the namespaces that `namespaces` matches."""

    namespaces: LabelSelector
    pods: LabelSelector


class NormalRule(NamedTuple):
    """`peers` None: anybody. Unless `every_port`, `numbers` and `names` list the ports that are allowed."""

    peers: tuple[PodPeer | IPBlock, ...] | None
    every_port: bool
    numbers: tuple[PortRange, ...]
    names: tuple[NamedPort, ...]


class NormalPolicy(NamedTuple):
    """A policy without defaults or alternatives."""

    key: Key
    pods: LabelSelector
    isolates: frozenset[Direction]
    ingress: tuple[NormalRule, ...]
    egress: tuple[NormalRule, ...]


def normalize(policy: NetworkPolicy) -> NormalPolicy:
    """The same policy with every default spelled out."""
    types = policy.policy_types
    if not types:
        types = frozenset(Direction) if policy.egress else frozenset({Direction.INGRESS})
    return NormalPolicy(
        policy.key,
        policy.pod_selector,
        types,
        _rules(policy.ingress, policy.key) if Direction.INGRESS in types else (),
        _rules(policy.egress, policy.key) if Direction.EGRESS in types else (),
    )


def _rules(rules: tuple[NetworkPolicyRule, ...], policy: Key) -> tuple[NormalRule, ...]:
    return tuple(_rule(rule, policy) for rule in rules)


def _rule(rule: NetworkPolicyRule, policy: Key) -> NormalRule:
    numbers: set[PortRange] = set()
    names: set[NamedPort] = set()
    for port in rule.ports:
        found = normal_port(port)
        if isinstance(found, NamedPort):
            names.add(found)
        else:
            numbers.add(found)
    peers = tuple(peer for each in rule.peers if (peer := normal_peer(each, policy)) is not None)
    return NormalRule(
        peers if rule.peers else None, not rule.ports, tuple(sorted(numbers)), tuple(sorted(names))
    )


def normal_port(port: NetworkPolicyPort) -> PortRange | NamedPort:
    """One item of `ports`: protocol TCP and every port where it does not say."""
    protocol = PROTOCOLS["TCP"] if port.protocol is None else port.protocol
    if isinstance(port.port, str):
        return NamedPort(port.port, protocol)
    if port.port is None:
        return PortRange(protocol, 0, 65535)
    return PortRange(protocol, port.port, port.port if port.end_port is None else port.end_port)


def normal_peer(peer: NetworkPolicyPeer, policy: Key) -> PodPeer | IPBlock | None:
    """One item of `from` or `to` of a policy; None where it was bad and matches nothing."""
    if peer.ip_block is not None:
        return peer.ip_block
    if peer.pod_selector is None and peer.namespace_selector is None:
        return None
    # Without a namespaceSelector only the policy's own namespace is meant, which its name label names.
    own = LabelSelector((Requirement(NAME_LABEL, Operator.IN, (policy.namespace,)),))
    return PodPeer(
        own if peer.namespace_selector is None else peer.namespace_selector,
        EVERYTHING if peer.pod_selector is None else peer.pod_selector,
    )
