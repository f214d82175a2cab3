"""Rules that change nothing, because others allow all of it already.

Policies only add up: a narrow rule beside a wide one limits nothing, which is seldom what its author
thinks. Compared is what is written (selectors, CIDRs, ports), so a result holds whatever pods come.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from dataplane.model import Direction, IPBlock, Key, LabelSelector, NetworkPolicy, Operator, PortRange
from dataplane.policy.check.findings import Check, Finding, Severity
from dataplane.policy.check.world import Peer, RuleAt, World, names
from dataplane.policy.normalize import NormalRule, PodPeer

MOOT = Check(
    "moot-beside-allow-all",
    Severity.WARNING,
    "A rule that allows everything makes the others moot",
    "Another rule of the same policy, or of a policy that selects the same pods, has no conditions. Rules "
    "only add up, so what the others say limits nothing. Across policies found where every pod that the "
    "policy selects is opened so.",
)
COVERED = Check(
    "rule-covered",
    Severity.WARNING,
    "A rule or peer that another of the same policy covers",
    "Everything that it allows is allowed by another rule, or peer of the same rule, as written. Silent "
    "across policies, where saying a thing twice is often meant. Of a policy with more than 100 rules and "
    "peers in a direction, only equal ones are found.",
)
DUPLICATE = Check(
    "duplicate-policy",
    Severity.WARNING,
    "Two policies that say the same",
    "Two policies of one namespace select the same pods and have the same rules: deleting one changes "
    "nothing, and changing one only may change nothing either.",
)
CHECKS = (MOOT, COVERED, DUPLICATE)

# Rules and peers of one policy and direction that are compared each with each; of more, only equal ones
# are found.
_PAIRWISE = 100


def find(world: World) -> Iterator[Finding]:
    """What is to say about rules that add nothing."""
    yield from _across_policies(world)
    yield from _duplicates(world)
    for policy in world.policies:
        for direction in Direction:
            rules = [rule for rule in world.rules(policy) if rule.direction is direction]
            open_rule = next((rule for rule in rules if rule.allows_all), None)
            if open_rule is not None:
                yield from _moot(policy, open_rule, [rule for rule in rules if rule is not open_rule])
                continue
            few = sum(1 + len(rule.written.peers) for rule in rules) <= _PAIRWISE
            yield from _covered_rules(rules, few)
            for rule in rules:
                yield from _covered_peers(rule, few)


def _moot(policy: NetworkPolicy, open_rule: RuleAt, others: list[RuleAt]) -> Iterator[Finding]:
    if others:
        yield MOOT.at(
            policy.key,
            open_rule.field,
            f"this rule has no conditions and allows all {open_rule.direction}: "
            f"{names(rule.field for rule in others)} {'limits' if len(others) == 1 else 'limit'} nothing",
            "remove this rule, or the others",
        )


def _across_policies(world: World) -> Iterator[Finding]:
    opened: dict[Direction, dict[Key, Key]] = {direction: {} for direction in Direction}
    opening: set[tuple[Key, Direction]] = set()
    for rule in world.every_rule():
        if rule.allows_all:
            opening.add((rule.policy.key, rule.direction))
            for pod in world.subjects(rule.policy):
                opened[rule.direction].setdefault(pod.key, rule.policy.key)
    for policy in world.policies:
        for direction in Direction:
            here = opened[direction]
            rules = [rule for rule in world.rules(policy) if rule.direction is direction]
            if not here or not rules or (policy.key, direction) in opening:
                continue
            subjects = world.subjects(policy)
            by = {here.get(pod.key) for pod in subjects}
            if subjects and None not in by:
                others = names(sorted(filter(None, by)))
                yield MOOT.at(
                    policy.key,
                    f"spec.{direction}",
                    f"these rules limit nothing: all {direction} of the same pods is allowed by {others}",
                    "remove these rules, or let the other policy select fewer pods",
                )


def _duplicates(world: World) -> Iterator[Finding]:
    same: defaultdict[object, list[NetworkPolicy]] = defaultdict(list)
    for policy in world.policies:
        normal = world.normal[policy.key]
        rules = (frozenset(normal.ingress), frozenset(normal.egress))
        same[policy.key.namespace, normal.pods, normal.isolates, rules].append(policy)
    for policies in same.values():
        for policy in policies[1:]:
            yield DUPLICATE.at(
                policy.key, "spec", f"says the same as {policies[0].key}", "delete one of the two"
            )


def _covered_rules(rules: list[RuleAt], few: bool) -> Iterator[Finding]:
    first: dict[NormalRule, RuleAt] = {}
    for rule in rules:
        if rule.normal.peers == ():  # nothing in it can be used, which has been reported
            continue
        by = first.setdefault(rule.normal, rule)
        if by is rule and few:
            wider = (each for each in rules if each.normal != rule.normal)
            by = next((each for each in wider if _covers(each.normal, rule.normal)), rule)
        if by is not rule:
            how = "says the same as" if by.normal == rule.normal else "allows nothing that is not allowed by"
            yield COVERED.at(rule.policy.key, rule.field, f"{how} {by.field}", "remove one of the two")


def _covered_peers(rule: RuleAt, few: bool) -> Iterator[Finding]:
    peers = list(rule.peers())
    first: dict[PodPeer | IPBlock, Peer] = {}
    for peer in peers:
        by = first.setdefault(peer.normal, peer)
        if by is peer and few:
            wider = (each for each in peers if each.normal != peer.normal)
            by = next((each for each in wider if _covers_peer(each.normal, peer.normal)), peer)
        if by is peer or _is_and_or(by, peer):
            continue
        how = "says the same as" if by.normal == peer.normal else "is covered by"
        yield COVERED.at(rule.policy.key, peer.field, f"{how} {by.field}", "remove one of the two")


def _is_and_or(by: Peer, peer: Peer) -> bool:
    """Whether `and-or` has said more of it."""
    return by.written.pod_selector is None and peer.written.namespace_selector is None


def _covers(wide: NormalRule, narrow: NormalRule) -> bool:
    if wide.peers is not None:
        if narrow.peers is None:
            return False
        if not all(any(_covers_peer(each, peer) for each in wide.peers) for peer in narrow.peers):
            return False
    if wide.every_port:
        return True
    if narrow.every_port:
        return False
    return all(any(_holds(each, port) for each in wide.numbers) for port in narrow.numbers) and (
        set(narrow.names)
        <= set(wide.names) | {name for name in narrow.names if _whole(wide.numbers, name.protocol)}
    )


def _whole(ranges: tuple[PortRange, ...], protocol: int) -> bool:
    return any(each.protocol == protocol and (each.first, each.last) == (0, 65535) for each in ranges)


def _holds(wide: PortRange, narrow: PortRange) -> bool:
    return wide.protocol == narrow.protocol and wide.first <= narrow.first and narrow.last <= wide.last


def _covers_peer(wide: PodPeer | IPBlock, narrow: PodPeer | IPBlock) -> bool:
    if isinstance(wide, IPBlock):
        return (
            isinstance(narrow, IPBlock)
            and wide.cidr.covers(narrow.cidr)
            and all(
                any(inner.covers(hole) for inner in narrow.excepts)
                or not (narrow.cidr.covers(hole) or hole.covers(narrow.cidr))
                for hole in wide.excepts
            )
        )
    return (
        isinstance(narrow, PodPeer)
        and _selects_more(wide.namespaces, narrow.namespaces)
        and _selects_more(wide.pods, narrow.pods)
    )


def _selects_more(wide: LabelSelector, narrow: LabelSelector) -> bool:
    """Whether all that `narrow` matches is matched by `wide`, as far as the requirements show."""
    have = set(narrow.requirements)
    return all(
        each in have
        or (
            each.operator in (Operator.IN, Operator.EXISTS)
            and any(
                other.key == each.key
                and other.operator is Operator.IN
                and (each.operator is Operator.EXISTS or set(other.values) <= set(each.values))
                for other in narrow.requirements
            )
        )
        for each in wide.requirements
    )
