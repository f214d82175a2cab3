"""NetworkPolicies in a source directory, enforced as they are written."""

from __future__ import annotations

import pytest
from conftest import AgentFactory, LabFactory
from objects import PodLabels, network_policy, pod, pod_object
from packets import check
from traffic import Stream

from dataplane.lab.probe import probe

pytestmark = pytest.mark.netns

DENY = {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
FROM_CLIENTS = {
    "podSelector": {"matchLabels": {"app": "web"}},
    "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "client"}}}]}],
}


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


def test_a_label_cuts_and_spares_open_connections(lab: LabFactory, agent: AgentFactory) -> None:
    """In both, only the server sends: what is cut is a reply."""
    one = lab(["x/a", "x/b", "x/c"])
    client = {"app": "client"}
    labels: PodLabels = {"x/a": {"app": "web"}, "x/b": client, "x/c": client}
    daemon = agent(one, network_policy("x/web", FROM_CLIENTS), start=False)
    daemon.write_pods(labels)
    daemon.start()
    spared, cut = Stream(one, "x/b", "x/a"), Stream(one, "x/c", "x/a", family=6)
    daemon.write_pods({**labels, "x/b": {**client, "version": "2"}, "x/c": {"app": "other"}})
    assert cut.silent()
    assert spared.flows()
    check(one, ("x/b", "x/a", "80/TCP", "."), ("x/c", "x/a", "80/TCP", "X"))


def test_labels_that_change_while_nobody_runs(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/a", "x/b", "x/c"])
    client = {"app": "client"}
    daemon = agent(one, network_policy("x/web", FROM_CLIENTS), start=False)
    daemon.write_pods({"x/a": {"app": "web"}, "x/b": client})
    daemon.start()
    stream = Stream(one, "x/b", "x/a")
    daemon.kill()
    daemon.write_pods({"x/a": {"app": "web"}, "x/c": client})
    daemon.start()
    assert stream.silent()
    check(one, ("x/c", "x/a", "80/TCP", "."), ("x/b", "x/a", "80/TCP", "X"))


def test_replicas_are_told_apart_by_their_labels(lab: LabFactory, agent: AgentFactory) -> None:
    """Two of one ReplicaSet, and a third of the same name prefix that no policy selects."""
    names = [f"x/shop-7d9f-{tail}" for tail in ("aaaaa", "bbbbb", "ccccc")]
    one = lab([*names, "x/z"])
    daemon = agent(one, network_policy("x/shop", {"podSelector": {"matchLabels": {"app": "shop"}}}))
    daemon.write_pods({name: {"app": "shop"} for name in names[:2]})
    first, second, third = (("x/z", name, "80/TCP 80/UDP") for name in names)
    check(one, (*first, "XX"), (*second, "XX"), (*third, ".."))
    assert daemon.status()["pods"] == 2


def test_pods_on_the_hosts_network_are_never_isolated(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/a", "x/b", "y/c", pod("x/server", host_network=True, ports=["9090/TCP"])])
    agent(one, network_policy("x/deny", DENY))
    check(
        one,
        ("x/a", "x/server", "9090/TCP", "."),
        ("x/server", "x/a", "80/TCP", "."),
        ("y/c", "x/server", "9090/TCP", "."),
        ("x/a", "x/b", "80/TCP", "X"),
        ("y/c", "x/a", "80/TCP", "X"),
    )


def test_an_address_stands_for_the_pod_that_has_it_now(lab: LabFactory, agent: AgentFactory) -> None:
    """A Job's pod is done, and its address is another pod's: what the Job was allowed opens nothing."""
    one = lab(["x/a", "x/b"])
    web = network_policy("x/web", FROM_CLIENTS)
    daemon = agent(one, web)
    live = [pod_object(one, one.pod("x/a"), {"app": "web"}), pod_object(one, one.pod("x/b"))]
    job = pod_object(one, one.pod("x/b"), {"app": "client"})
    job["metadata"]["name"] = "job"
    daemon.write(*live, {**job, "status": {**job["status"], "phase": "Succeeded"}}, file="pods.yaml")
    check(one, ("x/b", "x/a", "80/TCP", "X"))
    # Both live, as in the moment when an address is handed on: it is the newer one's.
    live[1]["metadata"]["creationTimestamp"] = "2026-01-01T00:00:02Z"
    job["metadata"]["creationTimestamp"] = "2026-01-01T00:00:01Z"
    daemon.write(*live, job, file="pods.yaml")
    check(one, ("x/b", "x/a", "80/TCP", "X"))
    live[1]["metadata"]["labels"] = {"app": "client"}
    daemon.write(*live, job, file="pods.yaml")
    check(one, ("x/b", "x/a", "80/TCP", "."))


def test_more_peers_and_ports_than_one_object_holds(lab: LabFactory, agent: AgentFactory) -> None:
    """300 peers: several PolicyEndpoints. 300 ports: no limit of the API is ours."""
    first, last = pod("x/aaa"), pod("x/zzz")
    one = lab([first, last, "x/web", "x/other"])
    client = {"app": "client"}
    others = [pod_object(one, one.pod("x/other"), client) for _ in range(300)]
    for number, other in enumerate(others):
        other["metadata"] = {"name": f"m{number:03}", "namespace": "x", "labels": client}
        other["status"]["podIPs"] = [
            {"ip": f"10.9.{number >> 8}.{number & 255}"},
            {"ip": f"fd00:9::{number:x}"},
        ]
    ports = [f"{20000 + 2 * number}" for number in range(300)]
    rule = {**FROM_CLIENTS["ingress"][0], "ports": [{"port": int(port)} for port in ports]}
    daemon = agent(one, network_policy("x/web", {**FROM_CLIENTS, "ingress": [rule]}))
    labels: PodLabels = {"x/web": {"app": "web"}, "x/aaa": client, "x/zzz": client}
    daemon.write(*others, file="others.yaml")
    daemon.write_pods(labels)
    opened = " ".join(f"{port}/TCP" for port in ports)
    check(
        one,
        ("x/aaa", "x/web", opened, "." * 300),
        ("x/zzz", "x/web", opened, "." * 300),
        ("x/other", "x/web", opened, "X" * 300),
        ("x/zzz", "x/web", "19999/TCP 20001/TCP 20599/TCP 20000/UDP", "XXXX"),
        timeout=1.5,
    )
