"""Whom a policy selects, and whom its peers mean: nobody, most often by a slip of the pen."""

from __future__ import annotations

from collections.abc import Iterator

from dataplane.model import EVERYTHING, Key, LabelSelector, NetworkPolicy, Operator
from dataplane.policy.check.findings import Check, Finding, Severity
from dataplane.policy.check.world import Peer, Pods, RuleAt, World, names, near, selector_text
from dataplane.policy.normalize import NAME_LABEL, PodPeer

SELECTS_NO_POD = Check(
    "selects-no-pod",
    Severity.WARNING,
    "The policy selects no pod",
    "spec.podSelector matches no pod of the policy's own namespace, although there are pods in it. A "
    "policy never selects pods of another namespace. Silent where the namespace has no pods.",
)
SELECTS_ONLY_FINISHED = Check(
    "selects-only-finished-pods",
    Severity.WARNING,
    "The policy selects only pods that have ended",
    "Every pod that spec.podSelector matches has succeeded or failed (a Job's, for example). Such pods "
    "own no address, so nothing is enforced.",
)
SELECTS_ONLY_HOST_NETWORK = Check(
    "selects-only-host-network",
    Severity.WARNING,
    "The policy selects only pods on the host's network",
    "Pods with hostNetwork use their node's address and interfaces; no NetworkPolicy is enforced on them.",
)
EMPTY_NAMESPACE = Check(
    "empty-namespace",
    Severity.NOTE,
    "The policy is in a namespace without pods",
    "There are pods in the input, but none in the policy's namespace. Silent for a policy that selects "
    "every pod ({}): that one may wait for pods to come.",
)
UNKNOWN_NAMESPACE = Check(
    "unknown-namespace",
    Severity.WARNING,
    "The policy is in a namespace that does not exist",
    "Namespace objects are in the input, but not the policy's.",
)
PEER_NO_NAMESPACE = Check(
    "peer-matches-no-namespace",
    Severity.WARNING,
    "A namespaceSelector matches no namespace",
    "No Namespace object of the input has the labels that a peer asks for. Silent where the input has no "
    "Namespace objects.",
)
NAMESPACE_NAME_LABEL = Check(
    "namespace-name-label",
    Severity.WARNING,
    "A namespaceSelector means a name, by a label that no namespace has",
    "The selector asks for a label such as name=x that no namespace has, but there is a namespace x. "
    f"Kubernetes sets the label {NAME_LABEL} on each namespace, and no other.",
)
PEER_NO_POD = Check(
    "peer-matches-no-pod",
    Severity.WARNING,
    "A peer matches no pod",
    "A peer's podSelector and namespaceSelector together match no pod, so the peer allows nothing. Silent "
    "where the input may hold only a part of the cluster: no pods in any namespace that the peer means, "
    "and pods in one namespace only.",
)
PEER_ELSEWHERE = Check(
    "peer-in-another-namespace",
    Severity.WARNING,
    "A podSelector peer matches pods of other namespaces only",
    "A peer with nothing but a podSelector means pods of the policy's own namespace. None there has the "
    "labels, but pods elsewhere do: a namespaceSelector is missing in the same list item.",
)
AND_OR = Check(
    "and-or",
    Severity.WARNING,
    "namespaceSelector and podSelector as two items mean OR",
    "Two items of `from` or `to` allow what either of them matches: a whole namespace, and pods of the "
    "policy's own namespace. Found where the podSelector's item matches nothing (but would in those "
    "namespaces) or adds nothing, because the namespaceSelector's item already holds the own namespace.",
)
CHECKS = (
    SELECTS_NO_POD,
    SELECTS_ONLY_FINISHED,
    SELECTS_ONLY_HOST_NETWORK,
    EMPTY_NAMESPACE,
    UNKNOWN_NAMESPACE,
    PEER_NO_NAMESPACE,
    NAMESPACE_NAME_LABEL,
    PEER_NO_POD,
    PEER_ELSEWHERE,
    AND_OR,
)


def find(world: World) -> Iterator[Finding]:
    """What is to say about selectors."""
    for policy in world.policies:
        yield from _subjects(world, policy)
        for rule in world.rules(policy):
            yield from _peers(world, rule)


def _subjects(world: World, policy: NetworkPolicy) -> Iterator[Finding]:
    namespace, selector = policy.key.namespace, policy.pod_selector
    field = "spec.podSelector"
    if world.knows_namespaces and not world.known_namespace(namespace) and not world.in_namespace(namespace):
        meant = near(namespace, [each.name for each in world.snapshot.namespaces])
        yield UNKNOWN_NAMESPACE.at(
            policy.key,
            "metadata.namespace",
            f"there is no namespace {namespace}",
            f"did you mean {meant}?" if meant else "create the namespace, or correct metadata.namespace",
        )
        return
    if not world.knows_pods:
        return
    selected = world.selected(policy)
    if selected:
        if all(pod.host_network for pod in selected):
            yield SELECTS_ONLY_HOST_NETWORK.at(
                policy.key,
                field,
                f"selects only pods on the host's network ({names(pod.key for pod in selected)}), "
                "which no NetworkPolicy is enforced on",
                "take hostNetwork from the pods, or protect the node by other means",
            )
        return
    ended = world.finished((namespace,), selector)
    if ended is not None and selector != EVERYTHING:
        yield SELECTS_ONLY_FINISHED.at(
            policy.key,
            field,
            f"selects only pods that have ended, such as {ended.key}",
            "correct the labels, or delete the policy",
        )
    elif not world.in_namespace(namespace):
        if selector != EVERYTHING:
            yield EMPTY_NAMESPACE.at(
                policy.key,
                field,
                f"there is no pod in namespace {namespace}",
                "nothing, if the pods are yet to come; else correct metadata.namespace",
            )
    else:
        others = world.elsewhere(selector, namespace)
        message = f"no pod of namespace {namespace} has {selector_text(selector)}"
        mend = _mend(world, selector, namespace)
        if others:
            message += f"; pods of {_namespaces(others)} have, but a policy selects in its own namespace only"
            mend = mend or f"put the policy into namespace {others[0].key.namespace}"
        yield SELECTS_NO_POD.at(policy.key, field, message, mend or "correct the labels")


def _peers(world: World, rule: RuleAt) -> Iterator[Finding]:
    if rule.normal.peers is None:
        return
    peers = list(rule.peers())
    settled: set[str] = set()
    for peer, sibling in _and_or(world, rule.policy.key.namespace, peers):
        settled.add(peer.field)
        written = peer.written.pod_selector
        assert written is not None
        own = rule.policy.key.namespace
        what = "nothing" if not world.matched(_pods_of(peer)) else "nothing more"
        yield AND_OR.at(
            rule.policy.key,
            peer.field,
            f"podSelector {selector_text(written)} is an item of its own: it means pods of namespace {own} "
            f"and adds {what}, while {sibling.field} allows every pod of the namespaces it matches",
            f"write podSelector into the item {_item(sibling.field)}, beside its namespaceSelector, if both "
            f"must hold",
        )
    for peer in peers:
        if peer.field not in settled and isinstance(peer.normal, PodPeer):
            finding = _peer(world, rule, peer, peer.normal)
            if finding is not None:
                yield finding


def _and_or(world: World, own: str, peers: list[Peer]) -> Iterator[tuple[Peer, Peer]]:
    """Items with nothing but a podSelector, each with the namespaceSelector's item it belongs into."""
    whole = [
        peer
        for peer in peers
        if peer.written.namespace_selector is not None and peer.written.pod_selector is None
    ]
    for peer in peers:
        selector = peer.written.pod_selector
        if not whole or not selector or selector == EVERYTHING or peer.written.namespace_selector is not None:
            continue
        here = world.matched(_pods_of(peer))
        for sibling in whole:
            namespaces = world.namespaces_of(_pods_of(sibling).namespaces)
            there = not here and world.in_namespace(own) and world.select(namespaces, selector)
            if there or own in namespaces:
                yield peer, sibling
                break


def _peer(world: World, rule: RuleAt, peer: Peer, normal: PodPeer) -> Finding | None:
    policy, own = rule.policy.key, rule.policy.key.namespace
    selector = peer.written.namespace_selector
    namespaces = world.namespaces_of(normal.namespaces)
    if selector is not None and not world.knows_namespaces:
        return None
    if selector is not None and not namespaces:
        return _no_namespace(world, policy, f"{peer.field}.namespaceSelector", selector)
    if not world.knows_pods or world.matched(normal):
        return None
    field = f"{peer.field}.podSelector" if peer.written.pod_selector is not None else peer.field
    ended = world.finished(namespaces, normal.pods)
    if selector is None:
        if not world.in_namespace(own):
            return None  # said of the policy itself, if at all
        others = world.elsewhere(normal.pods, own)
        if others and ended is None:
            name = others[0].key.namespace
            return PEER_ELSEWHERE.at(
                policy,
                field,
                f"no pod of namespace {own} has {selector_text(normal.pods)}; pods of {_namespaces(others)} "
                "have, but a podSelector alone means the policy's own namespace",
                f"add `namespaceSelector: {{matchLabels: {{{NAME_LABEL}: {name}}}}}` to the same list item",
            )
    elif world.populated == 1 and not any(world.in_namespace(name) for name in namespaces):
        return None
    where = f"namespace {own}" if selector is None else _names(namespaces)
    if ended is not None:
        message = f"matches only pods that have ended, such as {ended.key}"
    elif normal.pods == EVERYTHING:
        message = f"there is no pod in {where}"
    else:
        message = f"no pod of {where} has {selector_text(normal.pods)}"
    mend = _mend(world, normal.pods, min(namespaces)) if len(namespaces) == 1 and ended is None else ""
    return PEER_NO_POD.at(policy, field, message, mend or "correct the labels, or remove the peer")


def _no_namespace(world: World, policy: Key, field: str, selector: LabelSelector) -> Finding:
    all_names = [namespace.name for namespace in world.snapshot.namespaces]
    for key, operator, values in selector.requirements:
        if operator is not Operator.IN or key == NAME_LABEL:
            continue
        meant = [value for value in values if world.known_namespace(value)]
        if meant and not any(key in labels for labels in world.namespaces.values()):
            return NAMESPACE_NAME_LABEL.at(
                policy,
                field,
                f"no namespace has a label {key}, but there is a namespace {meant[0]}",
                f"write `{NAME_LABEL}: {meant[0]}`, or label the namespace",
            )
    mend = "correct the labels, or label the namespace"
    wanted = [value for key, _, values in selector.requirements if key == NAME_LABEL for value in values]
    if wanted and (meant_name := near(wanted[0], all_names)):
        mend = f"did you mean {meant_name}?"
    return PEER_NO_NAMESPACE.at(policy, field, f"no namespace has {selector_text(selector)}", mend)


def _mend(world: World, selector: LabelSelector, namespace: str) -> str:
    """What the labels of the pods there suggest, or nothing."""
    for requirement in selector.requirements:
        key, operator, values = requirement
        if operator is not Operator.IN or world.select(
            frozenset((namespace,)), LabelSelector((requirement,))
        ):
            continue
        there = world.label_values(namespace, key)
        if meant := near(values[0], there):
            return f"did you mean {key}={meant}?"
        if there:
            return f"correct the labels; there, {key} is {names(there)}"
        meant = near(key, world.label_keys(namespace))
        return f"did you mean the label {meant}?" if meant else ""
    return ""


def _pods_of(peer: Peer) -> PodPeer:
    assert isinstance(peer.normal, PodPeer)
    return peer.normal


def _namespaces(pods: Pods) -> str:
    return _names({pod.key.namespace for pod in pods})


def _names(namespaces: frozenset[str] | set[str]) -> str:
    noun = "namespace" if len(namespaces) == 1 else "namespaces"
    return f"{noun} {names(sorted(namespaces))}"


def _item(field: str) -> str:
    return field.rpartition(".")[2]
