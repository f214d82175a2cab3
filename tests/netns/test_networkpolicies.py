"""NetworkPolicies in a source directory, enforced as they are written."""

from __future__ import annotations

import pytest
from conftest import AgentFactory, LabFactory
from objects import network_policy

from dataplane.lab.probe import probe

pytestmark = pytest.mark.netns


@pytest.mark.parametrize("family", [4, 6])
def test_a_policy_takes_effect_changes_and_goes(lab: LabFactory, agent: AgentFactory, family: int) -> None:
    one = lab(["x/a", "x/b", "y/a"])
    daemon = agent(one)

    def reached() -> set[tuple[str, str]]:
        matrix = probe(one, ["80/TCP"], family=family)
        names = ("x/a", "x/b", "y/a")
        return {(a, b) for a in names for b in names if a != b and matrix.allows(a, b)}

    everything = reached()
    assert len(everything) == 6
    to_x = {(a, b) for a, b in everything if b.startswith("x/")}
    daemon.write(network_policy("x/web", {"podSelector": {}, "ingress": [{"from": [{"podSelector": {}}]}]}))
    assert reached() == everything - {("y/a", "x/a"), ("y/a", "x/b")}
    daemon.write(network_policy("x/web", {"podSelector": {}, "policyTypes": ["Ingress"]}))
    assert reached() == everything - to_x
    answer = daemon.podgate("explain", "--from", "y/a", "--to", "x/a", "--port", "80/TCP", "--expect", "deny")
    assert "no-rule" in answer.stdout
    daemon.remove()
    assert reached() == everything
