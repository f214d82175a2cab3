"""Policies on the wrong end: the pods that should have been selected are the peers."""

from __future__ import annotations

from collections.abc import Iterator

from dataplane.model import PROTOCOL_NAMES, Direction, NetworkPolicyPort
from dataplane.policy.check.findings import Check, Finding, Severity
from dataplane.policy.check.world import Pods, RuleAt, World, names, protocol_of
from dataplane.policy.normalize import NormalRule, PodPeer

WRONG_END = Check(
    "wrong-end",
    Severity.WARNING,
    "The policy selects the pods that it means as peers",
    "An ingress rule's ports are ports of the selected pods, an egress rule's those of its peers. Found "
    "where every port of a rule is declared by all pods on the other side, and by none on the side where it "
    "counts, although those declare ports.",
)
ONLY_ITSELF = Check(
    "only-itself",
    Severity.NOTE,
    "The policy allows a pod nobody but itself",
    "The only rule's only peer is the one pod that the policy selects. A pod always reaches itself, so the "
    "rule allows nothing. Silent where the selector is {} or matches several pods.",
)
CHECKS = (WRONG_END, ONLY_ITSELF)


def find(world: World) -> Iterator[Finding]:
    """What is to say about which end is which."""
    if not world.knows_pods:
        return
    for rule in world.every_rule():
        if on_the_wrong_end(world, rule):
            yield _wrong_end(world, rule)
        elif finding := _only_itself(world, rule):
            yield finding


def on_the_wrong_end(world: World, rule: RuleAt) -> bool:
    """Whether the rule's ports are those of the other side's pods."""
    if not rule.written.ports or not rule.normal.peers:
        return False
    subjects, peers = world.subjects(rule.policy), _peers(world, rule)
    if not subjects or not peers or any(port.port is None or port.end_port for port in rule.written.ports):
        return False
    serving, others = ([subjects], peers) if rule.direction is Direction.INGRESS else (peers, [subjects])
    # Pods that declare nothing may listen on anything.
    if not all(any(pod.ports for pod in group) for group in serving):
        return False
    if any(_declares_any(world, group, rule.normal) for group in serving):
        return False
    return all(_all_declare(group, port) for group in others for port in rule.written.ports)


def _peers(world: World, rule: RuleAt) -> list[Pods]:
    """Each peer's pods, or nothing when a peer is not known to be pods."""
    found: list[Pods] = []
    for peer in rule.peers():
        if not isinstance(peer.normal, PodPeer) or not (pods := world.matched(peer.normal)):
            return []
        found.append(pods)
    return found


def _declares_any(world: World, pods: Pods, rule: NormalRule) -> bool:
    declared = world.declared(pods)
    if any((port.protocol, port.first) in declared for port in rule.numbers):
        return True
    wanted = {(port.name, port.protocol) for port in rule.names}
    return bool(wanted) and any((port.name, port.protocol) in wanted for pod in pods for port in pod.ports)


def _all_declare(pods: Pods, wanted: NetworkPolicyPort) -> bool:
    protocol = protocol_of(wanted)
    return all(
        any(port.protocol == protocol and wanted.port in (port.port, port.name) for port in pod.ports)
        for pod in pods
    )


def _wrong_end(world: World, rule: RuleAt) -> Finding:
    ports = names(f"{port.port}/{PROTOCOL_NAMES[protocol_of(port)]}" for port in rule.written.ports)
    subjects = names(pod.key for pod in world.subjects(rule.policy))
    peers = names(pod.key for group in _peers(world, rule) for pod in group)
    if rule.direction is Direction.INGRESS:
        message = f"lets {peers} reach port {ports} of {subjects}; the port is declared by {peers} only"
        mend = "select the pods that serve, and put the clients into `from`; or write an egress rule"
    else:
        message = f"lets {subjects} reach port {ports} of {peers}; the port is declared by {subjects} only"
        mend = "write an ingress rule, or select the clients and put the pods that serve into `to`"
    return WRONG_END.at(rule.policy.key, f"{rule.field}.ports", message, mend)


def _only_itself(world: World, rule: RuleAt) -> Finding | None:
    policy = rule.policy
    rules = [each for each in world.rules(policy) if each.direction is rule.direction]
    subjects = world.subjects(policy)
    if len(rules) != 1 or len(subjects) != 1 or not policy.pod_selector.requirements:
        return None
    peers = list(rule.peers())
    if len(peers) != 1 or len(rule.written.peers) != 1 or not isinstance(peers[0].normal, PodPeer):
        return None
    if peers[0].written.pod_selector != policy.pod_selector or world.matched(peers[0].normal) != subjects:
        return None
    side = "from" if rule.direction is Direction.INGRESS else "to"
    return ONLY_ITSELF.at(
        policy.key,
        peers[0].field,
        f"the selector is the policy's own, and matches {subjects[0].key} alone: nobody else is allowed",
        f"put the other end's labels into `{side}`",
    )
