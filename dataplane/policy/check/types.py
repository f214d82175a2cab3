"""policyTypes, and fields left empty: rules that mean nothing, and nothing that means everything."""

from __future__ import annotations

import re
from collections.abc import Iterator

from dataplane.model import Direction, NetworkPolicy
from dataplane.policy.check.findings import Check, Finding, Severity
from dataplane.policy.check.world import World

RULES_IGNORED = Check(
    "rules-ignored",
    Severity.ERROR,
    "Rules for a direction that policyTypes leaves out",
    "Egress rules of a policy with `policyTypes: [Ingress]`, or ingress rules with `[Egress]`, are ignored. "
    "So is `egress: []` without policyTypes: it does not isolate.",
)
TYPES_MISSING = Check(
    "policy-types-missing",
    Severity.WARNING,
    "Only egress rules, but no policyTypes: ingress is closed too",
    "Without policyTypes a policy always isolates ingress, and egress when it has egress rules. One that has "
    "egress rules only lets nothing in. Silent where it has ingress rules as well.",
)
EMPTY_MEANS_ANY = Check(
    "empty-means-any",
    Severity.WARNING,
    "An empty list means everything",
    "`from: []`, `to: []` and `ports: []` mean the same as leaving them out: anybody, every port. A policy "
    "without spec.podSelector selects every pod of its namespace.",
)
DENY_ALLOWS = Check(
    "deny-allows-all",
    Severity.WARNING,
    "A policy called deny allows everything",
    "`ingress: [{}]` is one rule without conditions, and allows everybody; `ingress: []`, or none, denies. "
    "Found where the policy's name says deny and not allow, except or from.",
)
CHECKS = (RULES_IGNORED, TYPES_MISSING, EMPTY_MEANS_ANY, DENY_ALLOWS)

_DENY = re.compile(r"(?:^|[-.])(?:default-)?deny(?:[-.]|$)|(?:^|[-.])block(?:[-.]|$)")
_BUT = re.compile(r"allow|except|from|to-|only|but")


def find(world: World) -> Iterator[Finding]:
    """What is to say about directions and empty fields."""
    for policy in world.policies:
        yield from _ignored(world, policy)
        yield from _left_open(world, policy)
        if _DENY.search(policy.key.name) and not _BUT.search(policy.key.name):
            for rule in world.rules(policy):
                if rule.allows_all and _about(policy.key.name, rule.direction):
                    yield DENY_ALLOWS.at(
                        policy.key,
                        rule.field,
                        f"a rule without conditions allows all {rule.direction}",
                        f"write `{rule.direction}: []`, which denies, or give the policy another name",
                    )


def _about(name: str, direction: Direction) -> bool:
    """Whether a policy's name speaks of a direction: `deny-egress` says nothing of ingress."""
    spoken = [each for each in Direction if each in name]
    return not spoken or direction in spoken


def _ignored(world: World, policy: NetworkPolicy) -> Iterator[Finding]:
    isolates = world.normal[policy.key].isolates
    for direction, rules in ((Direction.INGRESS, policy.ingress), (Direction.EGRESS, policy.egress)):
        if rules and direction not in isolates:
            yield RULES_IGNORED.at(
                policy.key,
                f"spec.{direction}",
                f"the {direction} rules are ignored: policyTypes has no {direction.title()}, so all "
                f"{direction} stays open",
                f"add {direction.title()} to policyTypes, or remove the rules",
            )
    if policy.policy_types is None and policy.egress and not policy.ingress:
        yield TYPES_MISSING.at(
            policy.key,
            "spec.policyTypes",
            "policyTypes is missing and there are only egress rules: nothing can reach the pods any more",
            "write `policyTypes: [Egress]`, or `[Ingress, Egress]` if that is meant",
        )


def _left_open(world: World, policy: NetworkPolicy) -> Iterator[Finding]:
    for field in policy.left_open:
        if field == "spec.podSelector":
            yield EMPTY_MEANS_ANY.at(
                policy.key,
                field,
                f"there is no podSelector, so every pod of namespace {policy.key.namespace} is selected",
                "write `podSelector: {}` if that is meant",
                Severity.NOTE,
            )
        elif field == "spec.egress":
            yield RULES_IGNORED.at(
                policy.key,
                field,
                "`egress: []` without policyTypes does not isolate: all egress stays open",
                "write `policyTypes: [Egress]` to deny it, or `[Ingress, Egress]`",
            )
        else:
            name = field.rpartition(".")[2]
            direction = Direction.EGRESS if field.startswith("spec.egress") else Direction.INGRESS
            if direction in world.normal[policy.key].isolates:
                yield EMPTY_MEANS_ANY.at(
                    policy.key,
                    field,
                    f"`{name}: []` allows {'every port' if name == 'ports' else 'everybody'}",
                    f"leave `{name}` out if that is meant; to allow nothing, remove the rule",
                    Severity.NOTE if name == "ports" else Severity.WARNING,
                )
