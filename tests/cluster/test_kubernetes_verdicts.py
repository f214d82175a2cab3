"""Objects of a real API server → verdicts for real packets."""

from __future__ import annotations

import pytest
from cluster_agent import NODE
from conftest import AgentFactory, LabFactory
from control_plane import RULES, ControlPlane, Raw, until
from objects import allow, deny, pod, policy, select

pytestmark = [pytest.mark.cluster, pytest.mark.netns]


def network_policy(
    name: str, selector: Raw, *, ingress: list[Raw] | None = None, namespace: str = "x"
) -> Raw:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"podSelector": selector, "policyTypes": ["Ingress"], "ingress": ingress or []},
    }


def from_pods(**labels: str) -> Raw:
    return {"from": [{"podSelector": {"matchLabels": labels}}]}


def test_policy_endpoints_come_change_and_go(
    lab: LabFactory, agent: AgentFactory, cluster: ControlPlane
) -> None:
    pods = lab(["x/a", "x/b", "x/c"])
    one = agent(pods)
    one.wait_reaches("x/a", "x/b", True)
    made = policy("x", "web", select(pods, "x/b"), ingress=allow(pods, "x/c"))
    cluster.create(made)
    one.wait_reaches("x/a", "x/b", False)
    one.wait_reaches("x/c", "x/b", True)
    cluster.apply(policy("x", "web", select(pods, "x/b"), ingress=allow(pods, "x/a")))
    one.wait_reaches("x/a", "x/b", True)
    assert one.status()["programming_ms"]["changes"] >= 2
    one.wait_reaches("x/c", "x/b", False)
    cluster.delete(made)
    one.wait_reaches("x/c", "x/b", True)
    one.wait_reaches("x/a", "x/b", True)


def test_objects_that_are_there_first_are_in_force_when_the_agent_is_ready(
    lab: LabFactory, agent: AgentFactory, cluster: ControlPlane
) -> None:
    pods = lab(["x/a", "x/b"])
    cluster.namespaces("x")
    cluster.create(deny(pods, "x/b"))
    one = agent(pods)
    assert one.reaches("x/a", "x/b") == {False}
    assert one.status()["policies"] == 1


def test_slices_in_any_order_make_one_policy(
    lab: LabFactory, agent: AgentFactory, cluster: ControlPlane
) -> None:
    pods = lab(["x/a", "x/b", "x/c"])
    one = agent(pods)
    # The rules first, without any pod of this node; then the pods, without any rule.
    cluster.create(policy("x", "web", ingress=allow(pods, "x/c"), slice_="rules"))
    cluster.create(policy("x", "web", select(pods, "x/b"), isolate=["Ingress"], slice_="pods"))
    one.wait_reaches("x/a", "x/b", False)
    assert one.reaches("x/c", "x/b") == {True}


def test_network_policies_are_resolved_where_no_policy_endpoints_are_served(
    lab: LabFactory, agent: AgentFactory, cluster: ControlPlane
) -> None:
    cluster.remove_definition()
    pods = lab(["x/a", "x/b", "x/c"])
    one = agent(pods)
    cluster.create(network_policy("b", {"matchLabels": {"pod": "b"}}, ingress=[from_pods(pod="c")]))
    one.wait_reaches("x/a", "x/b", False)
    assert one.reaches("x/c", "x/b") == {True}
    # A label changes: another pod is the one that may.
    cluster.patch(one.pod(pods.pod("x/c")), {"metadata": {"labels": {"pod": "other"}}})
    one.wait_reaches("x/c", "x/b", False)
    cluster.patch(one.pod(pods.pod("x/a")), {"metadata": {"labels": {"pod": "c"}}})
    one.wait_reaches("x/a", "x/b", True)


def test_a_pod_that_comes_is_policed_and_its_address_starts_anew(
    lab: LabFactory, agent: AgentFactory, cluster: ControlPlane
) -> None:
    cluster.remove_definition()
    pods = lab(["x/a", "x/b"])
    one = agent(pods)
    cluster.create(network_policy("b", {"matchLabels": {"pod": "b"}}))
    one.wait_reaches("x/a", "x/b", False)
    addresses = [pods.address("x/b", family) for family in (4, 6)]
    cluster.delete(one.pod(pods.pod("x/b")))
    pods.remove_pod("x/b")
    one.write_pod(pods.add_pod(pod("x/d", *addresses)))
    one.wait_reaches("x/a", "x/d", True)
    cluster.apply(network_policy("b", {"matchLabels": {"pod": "d"}}))
    one.wait_reaches("x/a", "x/d", False)


def test_changes_made_while_the_api_server_was_away(
    lab: LabFactory, agent: AgentFactory, cluster: ControlPlane
) -> None:
    pods = lab(["x/a", "x/b", "x/c"])
    one = agent(pods)
    kept, gone = deny(pods, "x/b"), policy("x", "gone", select(pods, "x/c"), ingress=[])
    cluster.create(kept)
    cluster.create(gone)
    one.wait_reaches("x/a", "x/b", False)
    one.wait_reaches("x/a", "x/c", False)
    cluster.stop_server(kill=True)
    status = one.wait_problem("connection refused; what was known last stays in force")
    assert not status["ready"]
    assert one.reaches("x/a", "x/b") == {False}
    # With the agent's way to it blocked, the server has a past that the agent does not know.
    pods.run("node", "ip", "link", "set", "k8sapi", "down")
    cluster.start_server()
    cluster.delete(gone)
    cluster.apply({**kept, "spec": {**kept["spec"], "ingress": allow(pods, "x/c")}})
    cluster.stop_server()
    cluster.compact()
    pods.run("node", "ip", "link", "set", "k8sapi", "up")
    cluster.start_server()
    one.wait_reaches("x/a", "x/c", True, 40)
    one.wait_reaches("x/c", "x/b", True)
    assert one.reaches("x/a", "x/b") == {False}
    one.wait_status(lambda status: status["ready"] and not status["problems"])


def test_a_token_that_expires_and_is_exchanged(
    lab: LabFactory, agent: AgentFactory, cluster: ControlPlane
) -> None:
    pods = lab(["x/a", "x/b"])
    one = agent(pods, start=False)
    token = one.kubeconfig.with_name("token")
    token.write_text("expired-token\n")
    cluster.kubeconfig(one.kubeconfig, one.server, user={"tokenFile": str(token)})
    one.start(wait=False)
    status = one.wait_problem("have they expired?")
    assert not status["ready"]
    assert "Traceback" not in one.text()
    token.write_text("agent-token\n")
    one.wait_ready()
    cluster.create(deny(pods, "x/b"))
    one.wait_reaches("x/a", "x/b", False)


def test_rights_that_are_missing_are_named_and_tried_again(
    lab: LabFactory, agent: AgentFactory, cluster: ControlPlane
) -> None:
    pods = lab(["x/a", "x/b"])
    cluster.grant([rule for rule in RULES if "policyendpoints" not in rule["resources"]])
    one = agent(pods, wait=False)
    status = one.wait_problem('resources: ["policyendpoints"], verbs: ["get", "list", "watch"]')
    assert not status["ready"]
    assert any("not allowed to" in problem for problem in status["problems"])
    # Standard mode: nothing is in the kernel before everything has been listed.
    chains = pods.run("node", "iptables-save").stdout
    assert "PODGATE" not in chains
    cluster.create(deny(pods, "x/b"))
    assert one.reaches("x/a", "x/b") == {True}
    cluster.grant()
    one.wait_ready()
    assert one.reaches("x/a", "x/b") == {False}


def test_without_the_right_to_get_its_node_the_links_addresses_count(
    lab: LabFactory, agent: AgentFactory, cluster: ControlPlane
) -> None:
    pods = lab(["x/a", "x/b"])
    cluster.grant([rule for rule in RULES if "nodes" not in rule["resources"]])
    cluster.namespaces("x")
    cluster.create(deny(pods, "x/b"))
    one = agent(pods)
    assert one.reaches("x/a", "x/b") == {False}
    assert any(f"not allowed to get the Node {NODE}" in line for line in one.status()["problems"])


def test_without_the_right_to_watch_definitions_it_looks_what_is_served(
    lab: LabFactory, agent: AgentFactory, cluster: ControlPlane
) -> None:
    pods = lab(["x/a", "x/b"])
    cluster.grant([rule for rule in RULES if "customresourcedefinitions" not in rule["resources"]])
    one = agent(pods)
    cluster.create(deny(pods, "x/b"))
    one.wait_reaches("x/a", "x/b", False)
    assert one.status()["problems"] == []


def test_policies_stay_in_force_when_policy_endpoints_come_to_be_served(
    lab: LabFactory, agent: AgentFactory, cluster: ControlPlane
) -> None:
    cluster.remove_definition()
    pods = lab(["x/a", "x/b", "x/c"])
    one = agent(pods)
    cluster.create(network_policy("b", {"matchLabels": {"pod": "b"}}))
    one.wait_reaches("x/a", "x/b", False)
    cluster.install_definition()
    # No controller has made its PolicyEndpoint yet: it is resolved here all the same, and reported.
    one.wait_problem("NetworkPolicy x/b has no PolicyEndpoint: it is resolved here", 30)
    assert one.reaches("x/a", "x/b") == {False}
    cluster.create(policy("x", "b", select(pods, "x/b"), ingress=allow(pods, "x/c")))
    one.wait_reaches("x/c", "x/b", True)
    assert one.reaches("x/a", "x/b") == {False}
    until(lambda: "PolicyEndpoints rule from now on" in one.text(), 20, one.text())
    # From here on PolicyEndpoints alone count.
    cluster.create(network_policy("c", {"matchLabels": {"pod": "c"}}))
    one.wait_problem("NetworkPolicy x/c has no PolicyEndpoint: it has no effect", 30)
    assert one.reaches("x/a", "x/c") == {True}
    assert one.status()["ready"]


def test_policies_stay_in_force_when_policy_endpoints_cease_to_be_served(
    lab: LabFactory, agent: AgentFactory, cluster: ControlPlane
) -> None:
    pods = lab(["x/a", "x/b"])
    one = agent(pods)
    cluster.create(network_policy("b", {"matchLabels": {"pod": "b"}}))
    cluster.create(policy("x", "b", select(pods, "x/b"), ingress=[]))
    one.wait_reaches("x/a", "x/b", False)
    generation = one.status()["generation"]
    cluster.remove_definition()
    until(lambda: "resolved here from now on" in one.text(), 30, one.text())
    assert one.reaches("x/a", "x/b") == {False}
    # In no table in between was the pod without its policy.
    lines = [line for line in one.text().splitlines() if "rules in force" in line]
    assert all("pods=1" in line for line in lines if f"generation={generation}" not in line), lines
    cluster.delete(network_policy("b", {}))
    one.wait_reaches("x/a", "x/b", True)


def test_always_and_never(lab: LabFactory, agent: AgentFactory, cluster: ControlPlane) -> None:
    pods = lab(["x/a", "x/b", "x/c"])
    cluster.namespaces("x")
    cluster.create(network_policy("b", {"matchLabels": {"pod": "b"}}))
    cluster.create(policy("x", "c", select(pods, "x/c"), ingress=[]))
    one = agent(pods, options=["--resolve", "always"])
    assert (one.reaches("x/a", "x/b"), one.reaches("x/a", "x/c")) == ({False}, {True})
    one.terminate()
    one.options = ("--resolve", "never")
    one.start()
    assert (one.reaches("x/a", "x/b"), one.reaches("x/a", "x/c")) == ({True}, {False})


def test_never_without_the_definition_waits_for_it(
    lab: LabFactory, agent: AgentFactory, cluster: ControlPlane
) -> None:
    cluster.remove_definition()
    pods = lab(["x/a", "x/b"])
    one = agent(pods, options=["--resolve", "never"], wait=False)
    status = one.wait_problem("is its CustomResourceDefinition installed?")
    assert not status["ready"]
    cluster.install_definition()
    cluster.create(deny(pods, "x/b"))
    one.wait_ready()
    one.wait_reaches("x/a", "x/b", False)


def test_a_thousand_policies_at_once(lab: LabFactory, agent: AgentFactory, cluster: ControlPlane) -> None:
    pods = lab(["x/a", "x/b", "x/c"])
    one = agent(pods)
    # One in ten selects a pod that is here; together they allow 100 addresses, x/c's among them.
    elsewhere = [{"name": "far", "namespace": "x", "podIP": "10.200.0.1", "hostIP": "10.199.0.1"}]
    made = []
    for number in range(1000):
        here = select(pods, "x/b") if number % 10 == 0 else elsewhere
        rules = allow(pods, "x/c") if number == 990 else [{"cidr": f"10.222.{number // 250}.{number % 250}"}]
        made.append(policy("x", f"p{number}", here, ingress=rules))
    cluster.create_all(made)
    one.wait_reaches("x/a", "x/b", False)
    one.wait_reaches("x/c", "x/b", True)
    assert one.wait_status(lambda status: status["policies"] == 100)["ready"]


def test_strict_mode_closes_pods_before_the_cluster_answers(
    lab: LabFactory, agent: AgentFactory, cluster: ControlPlane
) -> None:
    pods = lab(["x/a", "x/b"])
    one = agent(pods, start=False)
    cluster.stop_server(kill=True)
    one.options = ("--mode", "strict")
    one.start(wait=False)
    one.wait_reaches("x/a", "x/b", False)
    assert not one.status()["ready"]
    cluster.start_server()
    cluster.create(policy("x", "b", select(pods, "x/b"), ingress=allow(pods, "x/a")))
    cluster.create(policy("x", "a", select(pods, "x/a"), egress=allow(pods, "x/b")))
    one.wait_reaches("x/a", "x/b", True, 30)
    # While it starts, the API server refuses what it will grant; our Node is asked for again.
    one.wait_status(lambda status: status["ready"] and not status["problems"])


def test_an_agent_that_waits_for_the_cluster_stops_when_told(
    lab: LabFactory, agent: AgentFactory, cluster: ControlPlane
) -> None:
    pods = lab(["x/a"])
    one = agent(pods, start=False)
    cluster.stop_server(kill=True)
    one.start(wait=False)
    one.wait_problem("connection refused")
    assert one.terminate() == 0
    assert "Traceback" not in one.text()
    assert "Unclosed" not in one.text()
