"""`podgate controller` against a real API server: what it writes, when it does not, and who writes."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from cluster_controller import ALL, LEASE, ClusterController, resolved, together, versions, written
from conftest import AgentFactory, ControllerFactory, LabFactory
from control_plane import BASES, ROOT, ControlPlane, Raw, Refused, until

pytestmark = pytest.mark.cluster

DEFINITION = "policyendpoints.networking.k8s.aws"


def network_policy(name: str, selector: Raw, *, namespace: str = "x", **spec: object) -> Raw:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"podSelector": selector, **spec},
    }


def labels(**pairs: str) -> Raw:
    return {"matchLabels": pairs}


def pod(name: str, address: str, *, namespace: str = "x", port: int = 80, **marks: str) -> Raw:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "labels": marks},
        "spec": {
            "nodeName": "node-1",
            "containers": [{"name": "c", "image": "-", "ports": [{"name": "http", "containerPort": port}]}],
        },
        "status": {
            "phase": "Running",
            "podIP": address,
            "podIPs": [{"ip": address}, {"ip": f"fd00::{address.replace('.', ':')}"}],
            "hostIP": "10.0.0.1",
            "hostIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::ff"}],
        },
    }


def service(name: str, address: str, selector: Raw, namespace: str = "x") -> Raw:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "selector": selector,
            "clusterIP": address,
            "ports": [{"port": 8000, "targetPort": "http", "protocol": "TCP"}],
        },
    }


def some_policies(cluster: ControlPlane) -> None:
    """Pods and policies of every kind that resolve to something of their own."""
    cluster.namespaces("x", "y")
    cluster.patch(
        {"kind": "Namespace", "metadata": {"name": "y"}}, {"metadata": {"labels": {"team": "blue"}}}
    )
    cluster.create_all(
        [
            pod("web-1", "10.1.0.1", app="web"),
            pod("web-2", "10.1.0.2", app="web", port=8080),
            pod("db", "10.1.0.3", app="db"),
            pod("client", "10.1.0.4", namespace="y", app="client"),
            pod("other", "10.1.0.5", namespace="y", app="other"),
            service("db", "10.96.0.33", {"app": "db"}),
            network_policy("deny", {}, policyTypes=["Ingress", "Egress"]),
            network_policy(
                "web",
                labels(app="web"),
                ingress=[
                    {
                        "from": [
                            {"namespaceSelector": labels(team="blue"), "podSelector": labels(app="client")},
                            {"ipBlock": {"cidr": "192.0.2.0/24", "except": ["192.0.2.8/29"]}},
                        ],
                        "ports": [{"port": "http"}, {"port": 9000, "endPort": 9010}],
                    }
                ],
            ),
            network_policy(
                "db",
                labels(app="web"),
                policyTypes=["Egress"],
                egress=[{"to": [{"podSelector": labels(app="db")}], "ports": [{"port": "http"}]}],
            ),
            network_policy("nobody", labels(app="none"), ingress=[{}], namespace="y"),
        ]
    )


def wait_equal(one: ClusterController, cluster: ControlPlane, directory: Path) -> list[Raw]:
    """Until what is written is what `podgate resolve` prints; what is written."""
    expected = together(resolved(cluster, directory))
    found: list[Raw] = []

    def equal() -> bool:
        found[:] = written(cluster)
        return bool(together(found) == expected)

    try:
        one.wait(equal)
    except AssertionError as error:
        raise AssertionError(f"{together(found)}\nis not\n{expected}\n{error}") from None
    return found


def test_what_it_writes_is_what_resolve_prints(
    cluster: ControlPlane, controller: ControllerFactory, tmp_path: Path
) -> None:
    some_policies(cluster)
    one = controller()
    made = wait_equal(one, cluster, tmp_path)
    # `web` has a named port with another number on each of its pods.
    assert sorted(each["spec"]["policyRef"]["name"] for each in made) == [
        "db",
        "deny",
        "nobody",
        "web",
        "web",
    ]
    for each in made:
        metadata = each["metadata"]
        assert metadata["labels"]["app.kubernetes.io/managed-by"] == "podgate"
        assert metadata["generateName"] == f"{each['spec']['policyRef']['name']}-"
        assert "networking.k8s.aws/last-change-trigger-time" in metadata["annotations"]
    quiet = one.writes()

    cluster.patch(pod("other", "", namespace="y"), {"metadata": {"labels": {"app": "client"}}})
    wait_equal(one, cluster, tmp_path)
    cluster.create(pod("web-3", "10.1.0.6", app="web", port=8080))
    wait_equal(one, cluster, tmp_path)
    cluster.delete(pod("web-1", ""))
    wait_equal(one, cluster, tmp_path)
    cluster.patch(pod("web-2", ""), {"status": {"phase": "Failed"}}, part="/status")
    wait_equal(one, cluster, tmp_path)
    cluster.patch({"kind": "Namespace", "metadata": {"name": "y"}}, {"metadata": {"labels": {"team": "red"}}})
    wait_equal(one, cluster, tmp_path)
    cluster.delete(service("db", "", {}))
    wait_equal(one, cluster, tmp_path)
    cluster.apply(network_policy("web", labels(app="db"), policyTypes=["Ingress", "Egress"], ingress=[{}]))
    wait_equal(one, cluster, tmp_path)
    assert one.writes() > quiet
    # Nothing more comes of it.
    assert one.metric("podgate_controller_queue_policies ") == 0
    assert one.metric("podgate_controller_failing_policies ") == 0
    assert one.metric("podgate_controller_policy_endpoints ") == len(written(cluster))
    before = versions(cluster)
    cluster.patch(pod("db", ""), {"metadata": {"annotations": {"unrelated": "change"}}})
    cluster.create(network_policy("last", {}, namespace="y"))
    wait_equal(one, cluster, tmp_path)
    assert {name: version for name, version in versions(cluster).items() if name in before} == before


def test_policies_that_go_take_their_objects_along(
    cluster: ControlPlane, controller: ControllerFactory, tmp_path: Path
) -> None:
    some_policies(cluster)
    one = controller()
    wait_equal(one, cluster, tmp_path)
    cluster.delete(network_policy("web", {}))
    assert all(each["spec"]["policyRef"]["name"] != "web" for each in wait_equal(one, cluster, tmp_path))
    # One that goes and comes again, faster than anybody looks: its objects have the new one's uid.
    cluster.delete(network_policy("deny", {}))
    again = cluster.create(network_policy("deny", {}, policyTypes=["Ingress", "Egress"]))
    made = wait_equal(one, cluster, tmp_path)
    (owner,) = [
        each["metadata"]["ownerReferences"][0] for each in made if each["spec"]["policyRef"]["name"] == "deny"
    ]
    assert owner["uid"] == again["metadata"]["uid"]
    # And some that go while nobody is there.
    assert one.terminate() == 0
    cluster.delete(network_policy("db", {}))
    cluster.delete(network_policy("nobody", {}, namespace="y"))
    assert len(written(cluster)) == 3
    following = controller()
    assert len(wait_equal(following, cluster, tmp_path)) == 1


def test_200_entries_an_object_and_few_objects_for_a_small_change(
    cluster: ControlPlane, controller: ControllerFactory, tmp_path: Path
) -> None:
    cluster.namespaces("x", "y")
    many = [pod(f"p-{n}", f"10.2.{n // 200}.{n % 200 + 1}", app="peer") for n in range(430)]
    for each in many:  # one address each
        del each["status"]["podIPs"][1], each["status"]["hostIPs"][1]
    cluster.create_all(many)
    peers = [{"from": [{"podSelector": labels(app="peer")}]}]
    cluster.create(network_policy("all", {}, ingress=peers))
    one = controller()
    made = wait_equal(one, cluster, tmp_path)
    assert sorted(len(each["spec"].get("ingress", ())) for each in made) == [30, 200, 200]
    assert sorted(len(each["spec"].get("podSelectorEndpoints", ())) for each in made) == [30, 200, 200]
    # All rules come before the pods: the last object is made with both, the others get their pods after it.
    first = one.writes()
    assert first == 5
    before = versions(cluster)

    # A pod that is selected and a peer: one object for each role at most.
    cluster.delete(many[77])
    wait_equal(one, cluster, tmp_path)
    assert one.writes() - first <= 2
    after = versions(cluster)
    assert len(before.items() - after.items()) <= 2
    assert before.keys() == after.keys()

    came = one.writes()
    cluster.create(pod("new", "10.2.9.1", app="peer"))
    wait_equal(one, cluster, tmp_path)
    assert one.writes() - came <= 2

    # Another selector, the same pods: all objects say so, none is made anew.
    cluster.apply(network_policy("all", labels(app="peer"), ingress=peers))
    wait_equal(one, cluster, tmp_path)
    assert versions(cluster).keys() == before.keys()


def test_what_others_change_is_put_right(
    cluster: ControlPlane, controller: ControllerFactory, tmp_path: Path
) -> None:
    some_policies(cluster)
    one = controller()
    made = {each["spec"]["policyRef"]["name"]: each for each in wait_equal(one, cluster, tmp_path)}
    db, deny, nobody = made["db"], made["deny"], made["nobody"]
    for each in (db, deny, nobody):
        each["kind"] = "PolicyEndpoint"
    # Opened by hand.
    anywhere = {"ingress": [{"cidr": "0.0.0.0/0"}], "egress": [{"cidr": "0.0.0.0/0"}]}
    cluster.patch(deny, {"spec": anywhere, "metadata": {"labels": {"team": "blue"}}})
    wait_equal(one, cluster, tmp_path)
    path = f"{cluster.base(deny)}/{deny['metadata']['name']}"
    assert cluster.get(path)["metadata"]["labels"]["team"] == "blue"
    # Deleted by hand.
    cluster.delete(db)
    wait_equal(one, cluster, tmp_path)
    assert cluster.status_of(f"{cluster.base(db)}/{db['metadata']['name']}") == 404
    # A second one by hand, with our label.
    copy = {**db, "metadata": {**db["metadata"], "name": "db-copy", "resourceVersion": ""}}
    cluster.create(copy)
    one.wait(lambda: cluster.status_of(f"{cluster.base(db)}/db-copy") == 404 or _once(cluster, "db"))
    wait_equal(one, cluster, tmp_path)
    # One of ours that belongs to no policy.
    stray = {**nobody, "metadata": {**nobody["metadata"], "name": "stray", "resourceVersion": ""}}
    stray["spec"] = {**stray["spec"], "policyRef": {"name": "never-was", "namespace": "y"}}
    cluster.create(stray)
    one.wait(lambda: cluster.status_of(f"{cluster.base(stray)}/stray") == 404)


def _once(cluster: ControlPlane, policy: str) -> bool:
    return sum(each["spec"]["policyRef"]["name"] == policy for each in written(cluster)) == 1


def test_changes_made_while_the_api_server_was_away(
    cluster: ControlPlane, controller: ControllerFactory, tmp_path: Path
) -> None:
    some_policies(cluster)
    one = controller()
    wait_equal(one, cluster, tmp_path)
    cluster.stop_server(kill=True)
    one.wait_unready("connection refused")
    one.wait(lambda: not one.leads)
    cluster.start_server()
    cluster.delete(network_policy("web", {}))
    cluster.create(network_policy("late", labels(app="db")))
    wait_equal(one, cluster, tmp_path)
    one.wait_ready()
    assert "Traceback" not in one.text()


# --- where it must not write ---------------------------------------------------------------------------


def foreign(name: str = "theirs") -> Raw:
    return {
        "apiVersion": "networking.k8s.aws/v1alpha1",
        "kind": "PolicyEndpoint",
        "metadata": {"name": name, "namespace": "x"},
        "spec": {"policyRef": {"name": "web", "namespace": "x"}, "podIsolation": ["Ingress"]},
    }


def switch(value: str) -> Raw:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "amazon-vpc-cni", "namespace": "kube-system"},
        "data": {"enable-network-policy-controller": value},
    }


def set_switch(cluster: ControlPlane, value: str) -> None:
    path = "api/v1/namespaces/kube-system/configmaps"
    try:
        cluster.request("POST", path, switch(value))
    except Refused:
        cluster.request("PUT", f"{path}/amazon-vpc-cni", switch(value))


def test_it_refuses_to_start_where_others_have_written(
    cluster: ControlPlane, controller: ControllerFactory
) -> None:
    some_policies(cluster)
    theirs = cluster.create(foreign())
    one = controller(wait=False)
    assert one.wait_end() == 1
    last = one.text().splitlines()[-1]
    assert last.startswith("podgate: another controller writes PolicyEndpoints: PolicyEndpoint x/theirs")
    assert "app.kubernetes.io/managed-by" in last
    assert "Traceback" not in one.text()
    assert written(cluster) == [{**theirs, **written(cluster)[0]}]
    assert written(cluster)[0]["metadata"]["resourceVersion"] == theirs["metadata"]["resourceVersion"]
    assert cluster.status_of(LEASE) == 404


def test_it_refuses_to_start_where_eks_controller_is_switched_on(
    cluster: ControlPlane, controller: ControllerFactory, tmp_path: Path
) -> None:
    some_policies(cluster)
    set_switch(cluster, "true")
    one = controller(wait=False)
    assert one.wait_end() == 1
    assert "podgate: EKS's controller writes PolicyEndpoints here" in one.text().splitlines()[-1]
    assert written(cluster) == []
    set_switch(cluster, "false")
    wait_equal(controller(), cluster, tmp_path)


def test_others_that_come_later_stop_it(
    cluster: ControlPlane, controller: ControllerFactory, tmp_path: Path
) -> None:
    some_policies(cluster)
    one = controller()
    wait_equal(one, cluster, tmp_path)
    cluster.create(foreign())
    one.wait_unready("PolicyEndpoint x/theirs without the label app.kubernetes.io/managed-by: podgate")
    assert "nothing is written" in one.get("/readyz")[1]
    before = versions(cluster)
    cluster.delete(network_policy("web", {}))
    late = cluster.create(network_policy("late", {}))
    # It sees that, and does not act on it: a foreign object's policy is looked at again when it goes.
    one.wait(lambda: "theirs" in one.text())
    assert versions(cluster) == before
    cluster.delete(foreign())
    made = wait_equal(one, cluster, tmp_path)
    assert late["metadata"]["uid"] in {each["metadata"]["ownerReferences"][0]["uid"] for each in made}
    one.wait_ready()


@pytest.fixture
def no_definition(cluster: ControlPlane) -> Iterator[None]:
    cluster.remove_definition()
    yield
    cluster.start_again()
    cluster.remove_definition()


@pytest.mark.usefixtures("no_definition")
def test_the_definition_is_installed_where_it_is_missing(
    cluster: ControlPlane, controller: ControllerFactory, tmp_path: Path
) -> None:
    some_policies(cluster)
    one = controller("--no-install-crd", wait=False)
    assert one.wait_end() == 1
    assert "podgate: the CustomResourceDefinition" in one.text().splitlines()[-1]
    assert "kubectl apply -k deploy/crds" in one.text().splitlines()[-1]
    two = controller()
    wait_equal(two, cluster, tmp_path)
    (ours,) = (ROOT / "deploy/crds").glob("policyendpoints.*.yaml")
    served = cluster.get(f"{BASES['CustomResourceDefinition']}/{DEFINITION}")["spec"]["versions"]
    assert [one["name"] for one in served] == [
        one["name"] for one in yaml.safe_load(ours.read_text())["spec"]["versions"]
    ]


def grant(cluster: ControlPlane, *without: str) -> None:
    """The rights in `deploy/controller`, but those to some resources."""
    for made in yaml.safe_load_all((ROOT / "deploy/controller/rbac.yaml").read_text()):
        if made["kind"] in ("ClusterRole", "Role"):
            made["rules"] = [rule for rule in made["rules"] if not set(rule["resources"]) & set(without)]
        cluster.apply(made)


@pytest.mark.usefixtures("no_definition")
def test_without_the_right_to_install_the_definition_it_says_so_and_waits(
    cluster: ControlPlane, controller: ControllerFactory
) -> None:
    grant(cluster, "customresourcedefinitions")
    one = controller(wait=False)
    one.wait_unready(f"not allowed to create the CustomResourceDefinition {DEFINITION}: apply deploy/")
    assert one.text().count("not allowed to create") == 1
    grant(cluster)
    one.wait_ready()


def test_rights_that_are_missing_are_named_and_tried_again(
    cluster: ControlPlane, controller: ControllerFactory, tmp_path: Path
) -> None:
    some_policies(cluster)
    grant(cluster, "configmaps", "pods", "leases")
    one = controller(wait=False)
    one.wait_unready("not allowed to get the ConfigMap kube-system/amazon-vpc-cni")
    grant(cluster, "pods", "leases")
    one.wait_unready("not allowed to watch pods: give our ClusterRole the rule")
    grant(cluster, "leases")
    one.wait_unready("not allowed to keep our Lease")
    assert written(cluster) == []
    grant(cluster, "leases", "policyendpoints")
    for made in yaml.safe_load_all((ROOT / "deploy/controller/rbac.yaml").read_text()):
        if made["kind"] == "ClusterRole":
            for rule in made["rules"]:
                if rule["resources"] == ["policyendpoints"]:
                    rule["verbs"] = ["get", "list", "watch"]
            cluster.apply(made)
        elif made["kind"] == "Role":
            cluster.apply(made)
    one.wait_unready("cannot be written: not allowed to write PolicyEndpoints: apply deploy/controller/")
    assert one.metric("podgate_controller_failing_policies ") == 4
    grant(cluster)
    wait_equal(one, cluster, tmp_path)
    one.wait_ready()
    assert "Traceback" not in one.text()


def test_a_policy_whose_rules_are_not_taken_isolates_all_the_same(
    cluster: ControlPlane, controller: ControllerFactory, tmp_path: Path
) -> None:
    some_policies(cluster)
    path = f"{BASES['CustomResourceDefinition']}/{DEFINITION}"
    spec = "/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties/ingress/maxItems"
    patch = "application/json-patch+json"
    cluster.request("PATCH", path, [{"op": "add", "path": spec, "value": 2}], patch)
    try:
        until(lambda: _refuses(cluster))
        one = controller(wait=False)
        one.wait_unready("NetworkPolicy x/web is in force without its new rules")
        found = [each["spec"] for each in written(cluster) if each["spec"]["policyRef"]["name"] == "web"]
        assert {name for each in found for name in each} & {"ingress", "egress"} == set()
        assert sum(len(each["podSelectorEndpoints"]) for each in found) == 4
        assert one.metric("podgate_controller_limited_policies ") == 1
    finally:
        cluster.request("PATCH", path, [{"op": "remove", "path": spec}], patch)
    # It tries again by itself.
    expected = together(resolved(cluster, tmp_path))
    one.wait(lambda: cluster.status_of(ALL) == 200 and together(written(cluster)) == expected)
    one.wait_ready()


def _refuses(cluster: ControlPlane) -> bool:
    made = foreign("probe")
    made["spec"]["ingress"] = [{"cidr": f"10.0.0.{n}"} for n in range(3)]
    try:
        cluster.request("POST", f"{cluster.base(made)}?dryRun=All", made)
    except Refused as refused:
        return refused.status == 422
    return False


# --- who writes -----------------------------------------------------------------------------------------


def test_of_two_one_writes_and_the_other_goes_on(
    cluster: ControlPlane, controller: ControllerFactory, tmp_path: Path
) -> None:
    some_policies(cluster)
    one = controller()
    one.wait_leads()
    wait_equal(one, cluster, tmp_path)
    other = controller()
    assert not other.leads
    assert (one.leads, other.writes()) == (True, 0)
    # It ends in the middle of everything, and its lease stays.
    before = versions(cluster)
    one.kill()
    cluster.delete(network_policy("web", {}))
    cluster.create(network_policy("late", labels(app="db")))
    other.wait_leads()
    made = wait_equal(other, cluster, tmp_path)
    # Only what has changed since is written.
    names = {each["metadata"]["name"]: each["spec"]["policyRef"]["name"] for each in made}
    unchanged = [name for name in names if names[name] != "late"]
    assert {name: version for name, version in versions(cluster).items() if name in unchanged} == {
        name: before[name] for name in unchanged
    }
    assert len(names) == len(set(names.values())) == 4
    assert other.writes() == 3
    assert cluster.get(LEASE)["spec"]["leaseTransitions"] == 1


def test_a_rolling_update_hands_over_at_once_and_writes_nothing(
    cluster: ControlPlane, controller: ControllerFactory, tmp_path: Path
) -> None:
    some_policies(cluster)
    one = controller()
    wait_equal(one, cluster, tmp_path)
    before = versions(cluster)
    other = controller()
    assert one.terminate() == 0
    assert "the lease is free for another controller" in one.text()
    other.wait_leads()
    cluster.create(network_policy("late", labels(app="db")))
    wait_equal(other, cluster, tmp_path)
    assert other.writes() == 1
    assert before.items() <= versions(cluster).items()
    assert other.terminate() == 0
    assert cluster.get(LEASE)["spec"]["holderIdentity"] == ""


def test_two_that_change_places_while_much_changes(
    cluster: ControlPlane, controller: ControllerFactory, tmp_path: Path
) -> None:
    some_policies(cluster)
    running = [controller(), controller()]
    numbers = itertools.count()
    for round_ in range(3):
        for _ in range(10):
            number = next(numbers)
            cluster.create(network_policy(f"more-{number}", labels(app=f"a-{number % 3}")))
            cluster.create(pod(f"more-{number}", f"10.3.0.{number + 1}", app=f"a-{number % 3}"))
        leader = next((one for one in running if one.leads), running[0])
        running.remove(leader)
        if round_ == 1:
            assert leader.process is not None
            leader.process.send_signal(signal.SIGKILL)
        else:
            leader.terminate()
        running.append(controller())
    running[0].wait(lambda: any(one.leads for one in running))
    made = wait_equal(running[0], cluster, tmp_path)
    # One object for each policy and port group, and nothing more is written.
    assert len(made) == len(together(made))
    assert all("Traceback" not in one.text() for one in running)


# --- with agents ------------------------------------------------------------------------------------------


@pytest.mark.netns
def test_from_a_policy_to_a_packet(
    lab: LabFactory,
    agent: AgentFactory,
    cluster: ControlPlane,
    controller: ControllerFactory,
    tmp_path: Path,
) -> None:
    pods = lab(["x/a", "x/b", "x/c"])
    written_by = controller()
    one = agent(pods)
    assert one.reaches("x/a", "x/b") == {True}
    allow_c = [{"from": [{"podSelector": labels(pod="c")}]}]
    cluster.create(network_policy("b", labels(pod="b"), ingress=allow_c))
    one.wait_reaches("x/a", "x/b", False)
    assert one.reaches("x/c", "x/b") == {True}
    # Another pod is the one that may.
    cluster.patch(one.pod(pods.pod("x/a")), {"metadata": {"labels": {"pod": "c"}}})
    one.wait_reaches("x/a", "x/b", True)
    # The controller goes: what it has written stays in force.
    assert written_by.terminate() == 0
    cluster.patch(one.pod(pods.pod("x/c")), {"metadata": {"labels": {"pod": "other"}}})
    assert one.reaches("x/c", "x/b") == {True}
    following = controller()
    wait_equal(following, cluster, tmp_path)
    one.wait_reaches("x/c", "x/b", False)
    assert one.reaches("x/a", "x/b") == {True}
    cluster.delete(network_policy("b", {}))
    one.wait_reaches("x/c", "x/b", True)
    assert one.status()["problems"] == []


@pytest.mark.netns
def test_agents_that_resolve_change_over_without_a_gap(
    lab: LabFactory, agent: AgentFactory, cluster: ControlPlane, controller: ControllerFactory
) -> None:
    cluster.remove_definition()
    pods = lab(["x/a", "x/b"])
    one = agent(pods)
    cluster.create(network_policy("b", labels(pod="b")))
    one.wait_reaches("x/a", "x/b", False)
    writer = controller()
    assert one.reaches("x/a", "x/b") == {False}
    until(lambda: "PolicyEndpoints rule from now on" in one.text(), 90)
    assert one.reaches("x/a", "x/b") == {False}
    # And back, with the controller still there.
    cluster.remove_definition()
    assert one.reaches("x/a", "x/b") == {False}
    until(lambda: one.text().count("NetworkPolicies are resolved here") == 2, 90)
    assert one.reaches("x/a", "x/b") == {False}
    writer.wait_unready("does not serve policyendpoints")
    # What it wrote comes again with the definition.
    cluster.install_definition()
    writer.wait(lambda: len(written(cluster)) == 1)
    writer.wait_ready()
    assert one.reaches("x/a", "x/b") == {False}
    cluster.delete(network_policy("b", {}))
    one.wait_reaches("x/a", "x/b", True, 90)
