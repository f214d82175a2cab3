"""Egress that is closed to what pods need without anybody thinking of it: DNS, AWS credentials.

Judged are the effective rules of each pod, all its policies together, by the engine's own compiled
rules. A pod that may send nothing at all is left alone: that is plainly meant.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import NamedTuple

from dataplane._rules import RuleSet
from dataplane.addresses import family_of, parse_address, parse_prefix
from dataplane.model import (
    Direction,
    Hint,
    IPBlock,
    Key,
    Namespace,
    NetworkPolicyPeer,
    NetworkPolicyRule,
    Pod,
    PortRange,
    Snapshot,
)
from dataplane.policy.check.dns import NODE_LOCAL, PORT, TCP, UDP, DnsServers
from dataplane.policy.check.findings import Check, Finding, Severity
from dataplane.policy.check.world import RuleAt, World, names
from dataplane.policy.effective import DirectionRules, effective_rules
from dataplane.policy.resolve import in_force
from dataplane.policy.selectors import matches

NO_DNS = Check(
    "no-dns",
    Severity.WARNING,
    "Egress is isolated and DNS is not allowed",
    "The pods may send something, but no rule of any of their policies lets them ask a DNS server (UDP or "
    "TCP 53, or the port that the DNS Service leads to). DNS servers are the pods behind a Service with port "
    "53 in kube-system or openshift-dns, pods labelled k8s-app=kube-dns in kube-system, and 169.254.20.10; a "
    "ClusterIP in an ipBlock does not count, packets are judged by the pod's address. Where the input has no "
    "DNS server, or the pod's dnsPolicy names others, any rule that seems to be about DNS counts. Silent "
    "for pods that may send nothing at all.",
)
DNS_ONE_PROTOCOL = Check(
    "dns-one-protocol",
    Severity.NOTE,
    "DNS is allowed over UDP only, or over TCP only",
    "Resolvers ask over UDP, and again over TCP when an answer is too long for a datagram (RFC 7766).",
)
NO_NODE_LOCAL_DNS = Check(
    "blocks-node-local-dns",
    Severity.WARNING,
    "Egress blocks node-local DNS",
    "Node-local DNS answers on 169.254.20.10 on the pod's own node; no podSelector matches it. Found where "
    "its pods are in the input, or a pod's dnsConfig names the address, and the pods may ask other DNS "
    "servers but not this one.",
)
NO_IMDS = Check(
    "blocks-imds",
    Severity.WARNING,
    "Egress blocks the instance metadata that the pod takes credentials from",
    "A container has AWS_… settings and no other source of credentials in sight: no web identity token, no "
    "Pod Identity, no keys, profile or credentials file, metadata not disabled. The SDKs then ask "
    "169.254.169.254 (or fd00:ec2::254). Silent where an `except` takes it out: that is meant.",
)
NO_POD_IDENTITY = Check(
    "blocks-pod-identity",
    Severity.WARNING,
    "Egress blocks the Pod Identity agent",
    "The pod takes its AWS credentials from the EKS Pod Identity agent of its node, at 169.254.170.23 (or "
    "fd00:ec2::23) port 80. Silent where it has a web identity token too, which the SDKs prefer.",
)
CHECKS = (NO_DNS, DNS_ONE_PROTOCOL, NO_NODE_LOCAL_DNS, NO_IMDS, NO_POD_IDENTITY)

_HTTP = 80
_DNS_NAME = re.compile("dns|domain")
_CREDENTIALS = frozenset({Hint.WEB_IDENTITY, Hint.POD_IDENTITY, Hint.OWN_CREDENTIALS})
_IMDS = {4: parse_address("169.254.169.254"), 6: parse_address("fd00:ec2::254")}
_AGENT = {4: parse_address("169.254.170.23"), 6: parse_address("fd00:ec2::23")}
# An except within these is there for the metadata service; a wider one may have other reasons.
_LINK_LOCAL = {4: parse_prefix("169.254.0.0/16")[0], 6: parse_prefix("fd00:ec2::/32")[0]}


class _Group(NamedTuple):
    """What makes pods equal here: their policies, their needs, the family of their first address."""

    policies: frozenset[tuple[Key, str | None]]
    hints: frozenset[Hint]
    family: int


class _Case(NamedTuple):
    """A group, and what is allowed to it."""

    rules: DirectionRules
    hints: frozenset[Hint]
    family: int
    names_dns: frozenset[int]  # protocols over which some rule seems to mean DNS, wherever that is


def find(world: World) -> Iterator[Finding]:
    """What is to say about egress that is closed."""
    if not world.knows_pods:
        return
    dns = DnsServers(world)
    policies = _Policies(world)
    groups = _groups(world, policies)
    samples = {members[0]: group for group, members in groups.items()}
    found: defaultdict[tuple[Key, Check, str, str], set[Key]] = defaultdict(set)
    for sample, rules in _effective(world, dns, policies, samples.keys()).items():
        group = samples[sample]
        members = groups[group]
        case = _Case(rules, group.hints, group.family, policies.names_dns(group.policies, rules))
        blame = policies.first_to_open(group.policies)
        if blame is None:
            continue
        for check, message, mend in _judge(case, dns):
            concerned = set(members) - dns.pods if check in _ABOUT_DNS else members
            found[blame, check, message, mend].update(concerned)
    for (policy, check, message, mend), pods in found.items():
        if pods:
            yield check.at(policy, "spec.egress", f"{names(sorted(pods))} {message}", mend)


_ABOUT_DNS = (NO_DNS, DNS_ONE_PROTOCOL, NO_NODE_LOCAL_DNS)


class _Policies:
    """The policies that isolate egress, and what can be known of them without their peers' addresses."""

    def __init__(self, world: World) -> None:
        self._world = world
        slices = world.snapshot.policy_endpoints
        self.given = {slice_.policy for slice_ in slices}  # they win over the NetworkPolicy
        self.written = {
            policy.key: policy
            for policy in world.policies
            if policy.key not in self.given and Direction.EGRESS in world.normal[policy.key].isolates
        }
        self.slices = [slice_ for slice_ in slices if Direction.EGRESS in slice_.isolates]
        self._opening = {slice_.policy for slice_ in slices if slice_.egress}

    def first_to_open(self, policies: frozenset[tuple[Key, str | None]]) -> Key | None:
        """The policy to mend: the first, by name, of those that let the pods send something."""
        return min((policy for policy, _ in policies if self._opens(policy)), default=None)

    def _opens(self, policy: Key) -> bool:
        if (
            policy in self.written
            and policy not in self._opening
            and any(self._allows_somebody(rule) for rule in self._egress(policy))
        ):
            self._opening.add(policy)
        return policy in self._opening

    def _allows_somebody(self, rule: RuleAt) -> bool:
        return rule.normal.peers is None or any(
            isinstance(peer, IPBlock) or self._world.matched(peer) for peer in rule.normal.peers
        )

    def _egress(self, policy: Key) -> list[RuleAt]:
        rules = self._world.rules(self.written[policy])
        return [rule for rule in rules if rule.direction is Direction.EGRESS]

    def names_dns(self, policies: frozenset[tuple[Key, str | None]], rules: DirectionRules) -> frozenset[int]:
        """The protocols over which a rule may have been written for DNS, whoever its peers are."""
        return frozenset(
            protocol
            for protocol in (UDP, TCP)
            if any(
                _seems_dns(rule, protocol)
                for policy, _ in policies
                if policy in self.written
                for rule in self._egress(policy)
            )
            or any(
                not rule.ports or _holds_dns(rule.ports, protocol)
                for policy, rule in rules.rules
                if policy in self.given
            )
        )


def _seems_dns(rule: RuleAt, protocol: int) -> bool:
    if any(port.protocol == protocol and _DNS_NAME.search(port.name) for port in rule.normal.names):
        return True
    if PortRange(protocol, PORT, PORT) in rule.normal.numbers:
        return True
    if not rule.normal.every_port and not _holds_dns(rule.normal.numbers, protocol):
        return False
    # Pods of the own namespace, on every port: hardly the cluster's DNS.
    return rule.normal.peers is None or any(
        peer.written.namespace_selector is not None or peer.written.ip_block is not None
        for peer in rule.peers()
    )


def _holds_dns(ports: tuple[PortRange, ...], protocol: int) -> bool:
    return any(each.protocol == protocol and each.first <= PORT <= each.last for each in ports)


def _groups(world: World, policies: _Policies) -> dict[_Group, list[Key]]:
    """The pods that are isolated for egress, by what makes them equal; sorted by name."""
    selecting: defaultdict[Key, list[tuple[Key, str | None]]] = defaultdict(list)
    for policy in policies.written.values():
        for pod in world.subjects(policy):
            selecting[pod.key].append((policy.key, None))
    for slice_ in policies.slices:
        for endpoint in slice_.endpoints:
            selecting[endpoint.pod].append((slice_.policy, slice_.port_group))
    groups: defaultdict[_Group, list[Key]] = defaultdict(list)
    for pod in world.snapshot.pods:
        # Without an address yet, nothing is resolved for it: it must not stand for others.
        if (by := selecting.get(pod.key)) and pod.ips and not pod.finished and not pod.host_network:
            groups[_Group(frozenset(by), pod.hints, family_of(pod.ips[0]))].append(pod.key)
    return groups


def _effective(
    world: World, dns: DnsServers, policies: _Policies, samples: Collection[Key]
) -> dict[Key, DirectionRules]:
    """The egress rules of `samples`, as far as they are about DNS servers and addresses.

    Resolved against the samples and the DNS servers' pods only. Peers that are other pods have no say
    in it, and thousands of policies with thousands of peers each would be millions of rules.
    """
    snapshot = world.snapshot
    wanted = dns.pods.union(samples)
    servers = [pod for pod in snapshot.pods if pod.key in dns.pods]
    small = Snapshot(
        policy_endpoints=snapshot.policy_endpoints,
        pods=tuple(pod for pod in snapshot.pods if pod.key in wanted),
        network_policies=tuple(
            replace(
                policy,
                ingress=(),
                policy_types=frozenset({Direction.EGRESS}),
                egress=tuple(
                    _about_dns(world, policy.key.namespace, rule, servers) for rule in policy.egress
                ),
            )
            for policy in policies.written.values()
        ),
        namespaces=tuple(Namespace(name, labels) for name, labels in sorted(world.namespaces.items())),
        services=tuple(service for service in snapshot.services if service.key in dns.services),
    )
    effective = effective_rules(in_force(small), None)
    return {
        key: found.egress
        for key in sorted(samples)
        if (found := effective.get(key)) is not None and found.egress is not None
    }


def _about_dns(world: World, own: str, rule: NetworkPolicyRule, servers: list[Pod]) -> NetworkPolicyRule:
    """The rule with every peer that means pods, but none of `servers`, made to match nothing."""
    return rule._replace(
        peers=tuple(
            peer
            if peer.ip_block is not None or any(_means(world, own, peer, pod) for pod in servers)
            else NetworkPolicyPeer()
            for peer in rule.peers
        )
    )


def _means(world: World, own: str, peer: NetworkPolicyPeer, pod: Pod) -> bool:
    selector = peer.namespace_selector
    namespaces = {own} if selector is None else world.namespaces_of(selector)
    return pod.key.namespace in namespaces and (
        peer.pod_selector is None or matches(peer.pod_selector, pod.labels)
    )


def _judge(case: _Case, dns: DnsServers) -> Iterator[tuple[Check, str, str]]:
    compiled = RuleSet([rule for _, rule in case.rules.rules])
    yield from _dns(case, compiled, dns)
    family = case.family
    holes = [
        hole
        for _, rule in case.rules.rules
        for hole in rule.excepts
        if _LINK_LOCAL[family].covers(hole) and _IMDS[family] in hole
    ]
    if Hint.AWS in case.hints and case.hints.isdisjoint(_CREDENTIALS) and not holes:
        address, text = _IMDS[family], ("169.254.169.254/32" if family == 4 else "fd00:ec2::254/128")
        if not _allows(compiled, address, TCP, _HTTP):
            yield (
                NO_IMDS,
                "may use AWS with the node's credentials, but egress to the instance metadata is not allowed",
                f"give the pods a role of their own (web identity, Pod Identity), or allow `ipBlock: {{cidr: "
                f"{text}}}` with port 80",
            )
    if Hint.POD_IDENTITY in case.hints and Hint.WEB_IDENTITY not in case.hints:
        address, text = _AGENT[family], ("169.254.170.23/32" if family == 4 else "fd00:ec2::23/128")
        if not _allows(compiled, address, TCP, _HTTP):
            yield (
                NO_POD_IDENTITY,
                "may not ask the Pod Identity agent, where their AWS credentials come from",
                f"allow `ipBlock: {{cidr: {text}}}` with port 80",
            )


def _dns(case: _Case, compiled: RuleSet, dns: DnsServers) -> Iterator[tuple[Check, str, str]]:
    allowed = {protocol: _asks(case, compiled, dns, protocol) for protocol in (UDP, TCP)}
    if not any(allowed.values()):
        yield (
            NO_DNS,
            "may send, but not ask DNS: names do not resolve",
            "allow ports 53/UDP and 53/TCP to the DNS servers: `namespaceSelector: {matchLabels: "
            "{kubernetes.io/metadata.name: kube-system}}` with `podSelector: "
            "{matchLabels: {k8s-app: kube-dns}}`"
            + (", and `ipBlock: {cidr: 169.254.20.10/32}`" if dns.node_local else ""),
        )
        return
    if not all(allowed.values()):
        only, missing = ("UDP", "TCP") if allowed[UDP] else ("TCP", "UDP")
        yield DNS_ONE_PROTOCOL, f"may ask DNS over {only} only", f"allow port 53/{missing} too"
    local = Hint.NODE_LOCAL_DNS in case.hints or (dns.node_local and Hint.OWN_DNS not in case.hints)
    if local and not _allows(compiled, NODE_LOCAL, UDP, PORT):
        yield (
            NO_NODE_LOCAL_DNS,
            "may ask other DNS servers, but not node-local DNS (169.254.20.10)",
            "allow `ipBlock: {cidr: 169.254.20.10/32}` with ports 53/UDP and 53/TCP",
        )


def _asks(case: _Case, compiled: RuleSet, dns: DnsServers, protocol: int) -> bool:
    """Whether some DNS server may be asked over a protocol."""
    if _allows(compiled, NODE_LOCAL, protocol, PORT):
        return True
    if not dns.servers or Hint.OWN_DNS in case.hints:
        return protocol in case.names_dns
    if any(
        server.protocol == protocol and _allows(compiled, server.address, protocol, server.port)
        for server in dns.servers
    ):
        return True
    return dns.node_local and any(_allows(compiled, address, protocol, PORT) for address in dns.cluster_ips)


def _allows(compiled: RuleSet, peer: bytes, protocol: int, port: int) -> bool:
    return compiled.find(peer, protocol, port) >= 0
