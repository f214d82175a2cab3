"""The examples in deploy/: readable without a warning, and the two ways to write them mean the same."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import pytest

from dataplane.model import Key, Snapshot
from dataplane.policy.effective import PodRules, effective_rules
from dataplane.policy.reference import judge_flow
from dataplane.policy.resolve import in_force
from dataplane.sources.directory import read_paths

EXAMPLES = Path(__file__).resolve().parents[2] / "deploy/examples"
WRITTEN = ("stars",)
RESOLVED = ("stars/pods.yaml", "policyendpoints/stars.yaml")
NAMES = ("client/client", "management-ui/management-ui", "stars/backend", "stars/frontend")
PORTS = (80, 6379, 9000, 9001)


def read(*names: str) -> Snapshot:
    snapshot = read_paths([EXAMPLES / name for name in names]).snapshot
    assert snapshot.problems == ()
    assert [str(pod.key) for pod in snapshot.pods] == list(NAMES)
    return snapshot


def allowed(snapshot: Snapshot, family: int) -> set[tuple[str, str, int]]:
    """Which pod reaches which at which TCP port."""
    rules = effective_rules(in_force(snapshot), None)
    addresses = {
        pod.key: next(ip for ip in pod.ips if len(ip) == (4 if family == 4 else 16)) for pod in snapshot.pods
    }

    def end(key: Key) -> PodRules:
        return rules.get(key) or PodRules(key, (addresses[key],), None, None)

    return {
        (source.name, destination.name, port)
        for source, destination in permutations(addresses, 2)
        for port in PORTS
        if judge_flow(end(source), end(destination), addresses[source], addresses[destination], 6, port).allow
    }


@pytest.mark.parametrize("names", [WRITTEN, RESOLVED], ids=["networkpolicies", "policyendpoints"])
@pytest.mark.parametrize("family", [4, 6])
def test_the_application_works_along_its_own_path(names: tuple[str, ...], family: int) -> None:
    assert allowed(read(*names), family) == {
        *(("management-ui", pod, port) for pod in ("client", "frontend", "backend") for port in PORTS),
        *((pod, "management-ui", port) for pod in ("client", "frontend", "backend") for port in PORTS),
        ("frontend", "backend", 6379),
        ("client", "frontend", 80),
    }


def test_the_policyendpoints_are_those_of_the_policies() -> None:
    written, resolved = read(*WRITTEN), read(*RESOLVED)
    assert not written.policy_endpoints
    assert not resolved.network_policies
    made, given = in_force(written).policy_endpoints, resolved.policy_endpoints

    def meaning(snapshot: Snapshot) -> dict[Key, object]:
        return {
            pod: [
                None
                if rules is None
                else {(policy, rule.cidr, rule.excepts, rule.ports) for policy, rule in rules.rules}
                for rules in (each.ingress, each.egress)
            ]
            for pod, each in effective_rules(snapshot, None).items()
        }

    assert meaning(in_force(written)) == meaning(resolved)
    assert {(each.policy, each.isolates, frozenset(each.endpoints)) for each in made} == {
        (each.policy, each.isolates, frozenset(each.endpoints)) for each in given
    }
