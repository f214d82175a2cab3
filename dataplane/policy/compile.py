"""Effective rules of this node's pods → the table the engine judges by.

Pods with equal rules share one compiled RuleSet, and a new table takes over the RuleSets of earlier
ones that are still in memory: a change of one pod compiles that pod's rules only.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import cast
from weakref import WeakValueDictionary

from dataplane._rules import RuleSet, RuleTable
from dataplane.model import Direction, Key, Rule
from dataplane.policy.effective import DirectionRules


@dataclass(frozen=True)
class PodEntry:
    """One pod of this node, as the engine sees it.

    `devices` are the interface indices of its host side (for a bridge, of its port). `ingress` and
    `egress` are None where no policy isolates it. `bridge` is the index of the bridge that its port
    belongs to, 0 for a routed pod: the engine then finds it by its address where a packet only names
    the bridge. `branch`: on a branch interface (security groups for pods), whose way out of the node
    is the interface with index `uplink` (0: not known). `unknown`: strict mode, no policy has been
    read for it yet, so nothing but own-node traffic passes. `audit`: directions in which what no rule
    allows passes all the same, with the reason `audit`. `ingress_policies`, `egress_policies`: which isolate
    it.
    """

    key: Key
    addresses: tuple[bytes, ...]
    devices: tuple[int, ...]
    ingress: DirectionRules | None = field(default=None, repr=False)
    egress: DirectionRules | None = field(default=None, repr=False)
    spoof_check: bool = True
    branch: bool = False
    unknown: bool = False
    bridge: int = 0
    uplink: int = 0
    audit: frozenset[Direction] = frozenset()
    ingress_policies: tuple[Key, ...] = field(default=(), repr=False)
    egress_policies: tuple[Key, ...] = field(default=(), repr=False)

    def rule(self, direction: Direction, rule_id: int) -> tuple[Key, Rule] | None:
        """The policy and rule behind a rule id of one of its directions; None for id -1, no rule."""
        rules = self.egress if direction is Direction.EGRESS else self.ingress
        return rules.rules[rule_id] if rules is not None and rule_id >= 0 else None

    def policies(self, direction: Direction) -> tuple[Key, ...]:
        """The policies that isolate it in a direction, sorted; none in strict mode's own isolation."""
        return self.egress_policies if direction is Direction.EGRESS else self.ingress_policies


class Compiler:
    """Makes tables. Keeps compiled rule sets alive only as long as some table does."""

    def __init__(self) -> None:
        self._compiled: WeakValueDictionary[DirectionRules, RuleSet] = WeakValueDictionary()

    def table(self, generation: int, pods: Sequence[PodEntry], own_node: Collection[bytes]) -> RuleTable:
        """The table for `pods`. `own_node`: this node's own packed addresses.

        ValueError when two pods claim one interface, or an address is no packed address.
        """
        ingress = [self._ruleset(pod.ingress) for pod in pods]
        egress = [self._ruleset(pod.egress) for pod in pods]
        return RuleTable(generation, pods, ingress, egress, own_node)

    def _ruleset(self, rules: DirectionRules | None) -> RuleSet | None:
        if rules is None:
            return None
        compiled = self._compiled.get(rules)
        if compiled is None:
            compiled = RuleSet([rule for _, rule in rules.rules], tag=rules)
            self._compiled[rules] = compiled
        return compiled


def rule_of(ruleset: RuleSet, rule_id: int) -> tuple[Key, Rule]:
    """The policy and rule behind a rule id of a RuleSet that a Compiler made."""
    return cast(DirectionRules, ruleset.tag).rules[rule_id]
