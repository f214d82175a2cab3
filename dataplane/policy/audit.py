"""Which policies are only audited: the annotation podgate.dev/mode on a NetworkPolicy or its Namespace.

PolicyEndpoints do not carry it, so it is read at the NetworkPolicy of the name that they refer to. A
policy's own word counts before its namespace's. A policy in audit still isolates and allows as ever:
only where no other policy isolates a pod in a direction is what no rule allows let through.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dataplane.model import ANNOTATION_MODE, Key, Namespace, NetworkPolicy, PolicyHead, Snapshot

AUDIT, ENFORCE = "audit", "enforce"


@dataclass(frozen=True)
class AuditModes:
    """The modes of all policies of one snapshot: `policies` by their own word, `namespaces` in audit."""

    policies: Mapping[Key, bool] = field(default_factory=dict)
    namespaces: frozenset[str] = frozenset()

    def covers(self, policy: Key) -> bool:
        """Whether a policy is in audit."""
        own = self.policies.get(policy)
        return policy.namespace in self.namespaces if own is None else own

    def of(self, before: Snapshot, now: Snapshot) -> AuditModes:
        """The modes in `now`, where these are those in `before`: the same object if none is another."""
        if (
            now.network_policies is before.network_policies
            and now.policy_heads is before.policy_heads
            and now.namespaces is before.namespaces
        ):
            return self
        policies = {
            item.key: mode
            for items in (now.policy_heads, now.network_policies)
            for item in items
            if (mode := _mode(item)) is not None
        }
        namespaces = frozenset(each.name for each in now.namespaces if _mode(each))
        made = AuditModes(policies, namespaces)
        return self if made == self else made


def audit_modes(snapshot: Snapshot) -> AuditModes:
    """The modes of all policies of a snapshot."""
    return AuditModes().of(Snapshot(), snapshot)


def _mode(item: NetworkPolicy | PolicyHead | Namespace) -> bool | None:
    return {AUDIT: True, ENFORCE: False}.get(item.annotations.get(ANNOTATION_MODE, ""))
