"""`podgate explain` by a running agent: its reasons, and its suggestions applied to real packets."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from conftest import AgentFactory, LabFactory, RunningAgent
from objects import PodLabels, network_policy

from dataplane.lab.probe import probe

pytestmark = pytest.mark.netns

NAMES = ("x/web", "x/db", "y/api")
LABELS: PodLabels = {"x/web": {"app": "web"}, "x/db": {"app": "db"}, "y/api": {"app": "api"}}
DENY = network_policy("x/deny", {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]})
DB = network_policy(
    "x/db",
    {
        "podSelector": {"matchLabels": {"app": "db"}},
        "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "web"}}}], "ports": [{"port": 81}]}],
    },
)


def explain(daemon: RunningAgent, source: str, destination: str, port: str, *more: str) -> Any:
    asked = ["explain", "--from", source, "--to", destination, "--port", port, "-o", "json", *more]
    return json.loads(daemon.podgate(*asked).stdout)


@pytest.mark.parametrize("family", [4, 6])
def test_what_is_suggested_opens_what_was_asked_for(
    lab: LabFactory, agent: AgentFactory, family: int
) -> None:
    one = lab(list(NAMES))
    daemon = agent(one, DENY, DB, start=False)
    daemon.write_pods(LABELS)
    daemon.start()

    def reached() -> set[tuple[str, str]]:
        matrix = probe(one, ["80/TCP"], family=family)
        return {(a, b) for a in NAMES for b in NAMES if a != b and matrix.allows(a, b)}

    before = reached()
    assert before == set()  # x may neither send nor receive
    answer = explain(daemon, "x/web", "x/db", "80/TCP", "--family", str(family))
    assert answer["ingress"]["policies"] == ["x/db", "x/deny"]
    assert [
        (each["policy"], each["field"], each["sentence"]) for each in answer["ingress"]["candidates"]
    ] == [
        ("x/db", "ingress[0].from[0]", "wrong port: allows 81/TCP, packet is 80/TCP"),
        ("x/deny", "ingress", "the policy has no ingress rules: nothing is allowed"),
    ]
    everything = explain(daemon, "x/web", "x/db", "80/TCP", "--family", str(family), "--all")
    assert everything == answer  # there are no more
    egress, ingress = answer["suggestions"]
    daemon.write(*yaml.safe_load_all(egress["yaml"] + ingress["yaml"]), file="fix-1.yaml")
    assert reached() == {("x/web", "x/db")}
    answer = explain(daemon, "x/web", "x/db", "80/TCP", "--family", str(family))
    assert answer["verdict"] == "allow"
    assert (answer["egress"]["field"], answer["ingress"]["field"]) == (
        "egress[0].to[0]",
        "ingress[0].from[0]",
    )
    # From outside the namespace, by its name.
    (made,) = explain(daemon, "y/api", "x/web", "80/TCP", "--family", str(family))["suggestions"]
    daemon.write(yaml.safe_load(made["yaml"]), file="fix-2.yaml")
    assert reached() == {("x/web", "x/db"), ("y/api", "x/web")}


def test_text_and_strict_mode(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(list(NAMES))
    daemon = agent(one, options=["--mode", "strict"], start=False)
    daemon.write_pods(LABELS)
    daemon.start()
    text = daemon.podgate("explain", "--from", "x/web", "--to", "x/db", "--port", "80").stdout
    assert "note: no policy isolates x/db for ingress: strict mode isolates every pod" in text
    assert "The smallest policies that would allow it:" in text
    made = text.partition("allow it:\n")[2]
    daemon.write(*yaml.safe_load_all(made))
    assert daemon.podgate("explain", "--from", "x/web", "--to", "x/db", "--port", "80", "--expect", "allow")
    matrix = probe(one, ["80/TCP"])
    assert matrix.allows("x/web", "x/db")
    assert not matrix.allows("x/db", "x/web")
