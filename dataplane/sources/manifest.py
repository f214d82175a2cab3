"""PolicyEndpoints as manifests: what `sources.objects` reads, written as EKS's controller writes it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dataplane.addresses import BITS, Prefix, format_address
from dataplane.manifests import selector_manifest
from dataplane.model import (
    PROTOCOL_NAMES,
    Direction,
    NetworkPolicy,
    PodEndpoint,
    PolicyEndpoint,
    PortRange,
    Rule,
)
from dataplane.sources.objects import PORT_GROUP_LABEL

_TYPES = {Direction.INGRESS: "Ingress", Direction.EGRESS: "Egress"}


def manifest(endpoint: PolicyEndpoint, policy: NetworkPolicy | None) -> dict[str, Any]:
    """One PolicyEndpoint as a document. `policy` is what it was made from, where that is known.

    Pods without an address of their own are left out: others apply an entry to its address.
    """
    metadata: dict[str, Any] = {
        "name": endpoint.key.name,
        "generateName": f"{endpoint.policy.name}-",
        "namespace": endpoint.key.namespace,
    }
    if endpoint.port_group is not None:
        metadata["labels"] = {PORT_GROUP_LABEL: endpoint.port_group}
    if policy is not None and policy.uid:
        metadata["ownerReferences"] = [
            {
                "apiVersion": "networking.k8s.io/v1",
                "kind": "NetworkPolicy",
                "name": policy.key.name,
                "uid": policy.uid,
                "controller": True,
                "blockOwnerDeletion": True,
            }
        ]
    spec: dict[str, Any] = {
        "policyRef": {"name": endpoint.policy.name, "namespace": endpoint.policy.namespace}
    }
    if policy is not None:
        spec["podSelector"] = selector_manifest(policy.pod_selector)
    spec["podIsolation"] = [text for direction, text in _TYPES.items() if direction in endpoint.isolates]
    for name, entries in (
        ("podSelectorEndpoints", [_pod(entry) for entry in endpoint.endpoints if entry.pod_ip]),
        ("ingress", _rules(endpoint.ingress)),
        ("egress", _rules(endpoint.egress)),
    ):
        if entries:
            spec[name] = entries
    return {
        "apiVersion": "networking.k8s.aws/v1alpha1",
        "kind": "PolicyEndpoint",
        "metadata": metadata,
        "spec": spec,
    }


def _pod(entry: PodEndpoint) -> dict[str, str]:
    host = {"hostIP": format_address(entry.host_ip)} if entry.host_ip else {}
    return {
        **host,
        "podIP": format_address(entry.pod_ip),
        "name": entry.pod.name,
        "namespace": entry.pod.namespace,
    }


def _rules(rules: Iterable[Rule]) -> list[dict[str, Any]]:
    written = []
    for rule in rules:
        each: dict[str, Any] = {"cidr": _cidr(rule.cidr)}
        if rule.excepts:
            each["except"] = [str(prefix) for prefix in rule.excepts]
        if rule.ports:
            each["ports"] = [_port(port) for port in rule.ports]
        written.append(each)
    return written


def _cidr(prefix: Prefix) -> str:
    """Pod IPs and ClusterIPs are written bare, as the controller does."""
    full = prefix.length == BITS[len(prefix.network)]
    return format_address(prefix.network) if full else str(prefix)


def _port(port: PortRange) -> dict[str, Any]:
    written: dict[str, Any] = {"protocol": PROTOCOL_NAMES[port.protocol]}
    if (port.first, port.last) != (0, 65535):
        written["port"] = port.first
        if port.last != port.first:
            written["endPort"] = port.last
    return written
