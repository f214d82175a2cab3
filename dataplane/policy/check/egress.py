"""Egress that is closed to what pods need without anybody thinking of it: DNS, AWS credentials.

Judged are the effective rules of each pod, all its policies together, by the engine's own compiled
rules. A pod that may send nothing at all is left alone: that is plainly meant.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from dataplane._rules import RuleSet
from dataplane.addresses import family_of, parse_address, parse_prefix
from dataplane.model import Direction, Hint, Key, Pod
from dataplane.policy.check.dns import NODE_LOCAL, PORT, TCP, UDP, DnsServers
from dataplane.policy.check.findings import Check, Finding, Severity
from dataplane.policy.check.world import World, names
from dataplane.policy.effective import DirectionRules, effective_rules
from dataplane.policy.resolve import in_force

NO_DNS = Check(
    "no-dns",
    Severity.WARNING,
    "Egress is isolated and DNS is not allowed",
    "The pods may send something, but no rule of any of their policies lets them ask a DNS server (UDP or "
    "TCP 53, or the port that the DNS Service leads to). DNS servers are the pods behind a Service with port "
    "53 in kube-system or openshift-dns, pods labelled k8s-app=kube-dns in kube-system, and 169.254.20.10; a "
    "ClusterIP in an ipBlock does not count, packets are judged by the pod's address. Where the input has no "
    "DNS server, or the pod's dnsPolicy names others, any rule that opens port 53 to anybody counts. Silent "
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
_CREDENTIALS = frozenset({Hint.WEB_IDENTITY, Hint.POD_IDENTITY, Hint.OWN_CREDENTIALS})
_IMDS = {4: parse_address("169.254.169.254"), 6: parse_address("fd00:ec2::254")}
_AGENT = {4: parse_address("169.254.170.23"), 6: parse_address("fd00:ec2::23")}
# An except within these is there for the metadata service; a wider one may have other reasons.
_LINK_LOCAL = {4: parse_prefix("169.254.0.0/16")[0], 6: parse_prefix("fd00:ec2::/32")[0]}


class _Group(NamedTuple):
    """Pods with equal rules and equal needs."""

    rules: DirectionRules
    hints: frozenset[Hint]
    family: int  # of their first address


def find(world: World) -> Iterator[Finding]:
    """What is to say about egress that is closed."""
    if not world.knows_pods:
        return
    dns = DnsServers(world)
    groups: defaultdict[_Group, list[Key]] = defaultdict(list)
    pods = {pod.key: pod for pod in world.snapshot.pods}
    for key, effective in effective_rules(in_force(world.snapshot), None).items():
        pod = pods.get(key)
        if pod is not None and effective.egress is not None and effective.egress.rules:
            groups[_Group(effective.egress, pod.hints, _family(pod))].append(key)
    engine = _Engine()
    found: defaultdict[tuple[Check, Key], _Said] = defaultdict(_Said)
    for group, members in groups.items():
        for check, message, mend in _judge(group, engine, dns):
            concerned = [key for key in members if key not in dns.pods] if check in _ABOUT_DNS else members
            said = found[check, _to_blame(group.rules)]
            said.pods += concerned
            said.message, said.mend = message, mend
    yield from _unresolved(world, found, dns)


class _Said:
    """One finding, about all pods that it is true of."""

    def __init__(self) -> None:
        self.pods: list[Key] = []
        self.message = self.mend = ""


_ABOUT_DNS = (NO_DNS, DNS_ONE_PROTOCOL, NO_NODE_LOCAL_DNS)


def _unresolved(world: World, found: dict[tuple[Check, Key], _Said], dns: DnsServers) -> Iterator[Finding]:
    # A peer that matches no pod of the input resolves to nothing, but may be where DNS is.
    names_dns: set[Key] = set()
    if not dns.servers:
        for rule in world.every_rule():
            if rule.direction is Direction.EGRESS and any(
                port.protocol in (TCP, UDP) and port.first <= PORT <= port.last
                for port in rule.normal.numbers
            ):
                names_dns.update(pod.key for pod in world.subjects(rule.policy))
    for (check, policy), said in sorted(found.items(), key=lambda item: (item[0][1], item[0][0].id)):
        pods = sorted(set(said.pods))
        if check is NO_DNS:
            pods = [pod for pod in pods if pod not in names_dns]
        if pods:
            yield check.at(policy, "spec.egress", f"{names(pods)} {said.message}", said.mend)


def _judge(group: _Group, engine: _Engine, dns: DnsServers) -> Iterator[tuple[Check, str, str]]:
    yield from _dns(group, engine, dns)
    family = group.family
    holes = [
        hole
        for _, rule in group.rules.rules
        for hole in rule.excepts
        if _LINK_LOCAL[family].covers(hole) and _IMDS[family] in hole
    ]
    if Hint.AWS in group.hints and group.hints.isdisjoint(_CREDENTIALS) and not holes:
        address, text = _IMDS[family], ("169.254.169.254/32" if family == 4 else "fd00:ec2::254/128")
        if not engine.allows(group.rules, address, TCP, _HTTP):
            yield (
                NO_IMDS,
                "may use AWS with the node's credentials, but egress to the instance metadata is not allowed",
                f"give the pods a role of their own (web identity, Pod Identity), or allow `ipBlock: {{cidr: "
                f"{text}}}` with port 80",
            )
    if Hint.POD_IDENTITY in group.hints and Hint.WEB_IDENTITY not in group.hints:
        address, text = _AGENT[family], ("169.254.170.23/32" if family == 4 else "fd00:ec2::23/128")
        if not engine.allows(group.rules, address, TCP, _HTTP):
            yield (
                NO_POD_IDENTITY,
                "takes AWS credentials from the Pod Identity agent, which egress does not allow",
                f"allow `ipBlock: {{cidr: {text}}}` with port 80",
            )


def _dns(group: _Group, engine: _Engine, dns: DnsServers) -> Iterator[tuple[Check, str, str]]:
    allowed = {protocol: _asks(group, engine, dns, protocol) for protocol in (UDP, TCP)}
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
    local = Hint.NODE_LOCAL_DNS in group.hints or (dns.node_local and Hint.OWN_DNS not in group.hints)
    if local and not engine.allows(group.rules, NODE_LOCAL, UDP, PORT):
        yield (
            NO_NODE_LOCAL_DNS,
            "may ask other DNS servers, but not node-local DNS (169.254.20.10)",
            "allow `ipBlock: {cidr: 169.254.20.10/32}` with ports 53/UDP and 53/TCP",
        )


def _asks(group: _Group, engine: _Engine, dns: DnsServers, protocol: int) -> bool:
    """Whether some DNS server may be asked over a protocol."""
    rules = group.rules
    if engine.allows(rules, NODE_LOCAL, protocol, PORT):
        return True
    if not dns.servers or Hint.OWN_DNS in group.hints:
        return engine.opens(rules, protocol, PORT)
    if any(
        server.protocol == protocol and engine.allows(rules, server.address, protocol, server.port)
        for server in dns.servers
    ):
        return True
    return dns.node_local and any(
        engine.allows(rules, address, protocol, PORT) for address in dns.cluster_ips
    )


class _Engine:
    """The compiled rules that judge packets, compiled once for all pods that share them."""

    def __init__(self) -> None:
        self._compiled: dict[DirectionRules, RuleSet] = {}

    def allows(self, rules: DirectionRules, peer: bytes, protocol: int, port: int) -> bool:
        """Whether a packet to `peer` (packed) may pass."""
        compiled = self._compiled.get(rules)
        if compiled is None:
            compiled = self._compiled[rules] = RuleSet([rule for _, rule in rules.rules])
        return compiled.find(peer, protocol, port) >= 0

    def opens(self, rules: DirectionRules, protocol: int, port: int) -> bool:
        """Whether any rule has the port, whoever the peer."""
        return any(
            not rule.ports
            or any(each.protocol == protocol and each.first <= port <= each.last for each in rule.ports)
            for _, rule in rules.rules
        )


def _family(pod: Pod) -> int:
    return family_of(pod.ips[0]) if pod.ips else 4


def _to_blame(rules: DirectionRules) -> Key:
    """The policy to mend: the first, by name, of those that let the pods send at all."""
    return rules.rules[0][0]
