"""`podgate flows` lists what conntrack knows of pods, also what a policy has cut."""

from __future__ import annotations

import json

import pytest
from conftest import AgentFactory, LabFactory
from objects import allow, deny, policy, select, until

from dataplane.lab.probe import connect

pytestmark = pytest.mark.netns


def test_a_cut_flow_is_listed_as_denied(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/server", "x/client", "x/other"])
    rules = policy("x", "web", select(one, "x/server"), ingress=allow(one, "x/client", ports=["80/TCP"]))
    daemon = agent(one, rules)
    assert connect(one, "x/client", "x/server").reached
    assert connect(one, "x/other", "x/client").reached

    def row() -> dict[str, object]:
        rows = json.loads(daemon.podgate("flows", "-o", "json").stdout)
        assert all("x/client" in (entry["src_pod"], entry["dst_pod"]) for entry in rows)
        (found,) = (entry for entry in rows if entry["dst_pod"] == "x/server")
        return dict(found)

    assert (row()["verdict"], row()["policy"], row()["ingress_judged"]) == ("allow", "x/web", True)
    daemon.write(deny(one, "x/server", directions="ingress"))
    until(lambda: row()["verdict"] == "deny")
    assert (row()["reason"], row()["policy"], row()["ingress_judged"]) == ("no-rule", None, False)
