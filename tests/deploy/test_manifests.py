"""What `kubectl apply -k deploy/` and the Helm chart would create."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from dataplane.cli.agent import command as agent_command
from dataplane.cli.controller import command as controller_command
from dataplane.config import VPC_CNI_SOCKET

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "helm" / "podgate"
Raw = dict[str, Any]

needs_kubectl = pytest.mark.skipif(
    shutil.which("kubectl") is None,
    reason="needs kubectl, which renders kustomizations: install it into PATH",
)
needs_helm = pytest.mark.skipif(
    shutil.which("helm") is None,
    reason="needs helm: install it into PATH, for example by `go install helm.sh/helm/v4/cmd/helm@latest`",
)


def run(*argv: str | Path) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def documents(text: str) -> list[Raw]:
    return [one for one in yaml.safe_load_all(text) if one]


def kustomized(tmp_path: Path, *components: str, controller: bool = False) -> list[Raw]:
    """The base with components, as an overlay beside the checkout would have it."""
    overlay = tmp_path / "overlay"
    overlay.mkdir(exist_ok=True)
    shutil.copytree(DEPLOY, tmp_path / "deploy", dirs_exist_ok=True)
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": ["../deploy", *(["../deploy/controller"] if controller else [])],
        "components": [f"../deploy/components/{name}" for name in components],
    }
    (overlay / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return documents(run("kubectl", "kustomize", overlay))


def templated(*settings: str) -> list[Raw]:
    flags = [part for setting in settings for part in ("--set", setting)]
    return documents(run("helm", "template", "podgate", CHART, "--namespace", "kube-system", *flags))


def one(objects: Sequence[Raw], kind: str) -> Raw:
    (found,) = [each for each in objects if each["kind"] == kind]
    return found


def meaning(objects: Sequence[Raw]) -> dict[tuple[str, str, str], Raw]:
    """Objects by kind, namespace and name; without labels, and lists of named things in one order."""

    def sort(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: sort(each) for key, each in value.items()}
        if isinstance(value, list):
            items = [sort(each) for each in value]
            if items and all(isinstance(each, dict) and "name" in each for each in items):
                items.sort(key=lambda each: (each["name"], str(each)))
            return items
        return value

    found = {}
    for each in objects:
        metadata = {key: value for key, value in each["metadata"].items() if key != "labels"}
        key = (each["kind"], metadata.get("namespace", ""), metadata["name"])
        found[key] = sort({**each, "metadata": metadata})
    return found


@needs_kubectl
@needs_helm
@pytest.mark.parametrize(
    ("components", "settings"),
    [
        ([], []),
        (["strict"], ["mode=strict"]),
        (["resolve-always"], ["resolve=always"]),
        (["uninstall"], ["onStop=clean"]),
        (["privileged"], ["privileged=true"]),
        (["strict", "resolve-always", "privileged"], ["mode=strict", "resolve=always", "privileged=true"]),
    ],
    ids=lambda value: "+".join(value) or "base",
)
def test_kustomize_and_helm_mean_the_same(tmp_path: Path, components: list[str], settings: list[str]) -> None:
    assert meaning(kustomized(tmp_path, *components)) == meaning(templated(*settings))


@needs_kubectl
@needs_helm
@pytest.mark.parametrize(
    ("components", "settings"),
    [
        ([], []),
        (["controller-host-network"], ["controller.hostNetwork=true"]),
        (["strict", "controller-host-network"], ["mode=strict"]),
    ],
    ids=lambda value: "+".join(value) or "base",
)
def test_the_controller_is_the_same_from_both(
    tmp_path: Path, components: list[str], settings: list[str]
) -> None:
    from_helm = templated("controller.enabled=true", *settings)
    assert meaning(kustomized(tmp_path, *components, controller=True)) == meaning(from_helm)


@needs_kubectl
def test_deleting_the_controllers_objects_deletes_nobodys_policies() -> None:
    objects = documents(run("kubectl", "kustomize", DEPLOY / "controller"))
    assert "CustomResourceDefinition" not in {each["kind"] for each in objects}
    (definition,) = documents(run("kubectl", "kustomize", DEPLOY / "crds"))
    assert definition["kind"] == "CustomResourceDefinition"


@needs_kubectl
def test_the_controllers_pods_can_do_nothing_but_write_policy_endpoints() -> None:
    objects = documents(run("kubectl", "kustomize", DEPLOY / "controller"))
    deployment = one(objects, "Deployment")["spec"]
    assert deployment["replicas"] == 2
    spec = deployment["template"]["spec"]
    assert "hostNetwork" not in spec
    assert "volumes" not in spec
    assert spec["priorityClassName"] == "system-cluster-critical"
    (container,) = spec["containers"]
    assert "limits" not in container["resources"]
    security = container["securityContext"]
    assert (security["runAsNonRoot"], security["readOnlyRootFilesystem"]) == (True, True)
    assert security["allowPrivilegeEscalation"] is False
    assert security["capabilities"] == {"drop": ["ALL"]}
    name, *arguments = container["args"]
    assert name == "controller"
    options = controller_command.make_context("controller", arguments).params
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {
        "metrics": options["metrics_bind_addr"].port,
        "health": options["health_probe_bind_addr"].port,
    }
    # Whatever policies say, it must reach the API server.
    policy = one(objects, "NetworkPolicy")["spec"]
    assert (policy["policyTypes"], policy["egress"]) == (["Egress"], [{}])
    labels = deployment["template"]["metadata"]["labels"]
    assert policy["podSelector"] == deployment["selector"] == {"matchLabels": labels}
    # The agent's DaemonSet would take them for its own.
    daemonset = one(documents(run("kubectl", "kustomize", DEPLOY)), "DaemonSet")["spec"]
    assert not daemonset["selector"]["matchLabels"].items() <= labels.items()


@needs_kubectl
def test_what_the_controller_may_write() -> None:
    objects = documents(run("kubectl", "kustomize", DEPLOY / "controller"))
    written = {
        (each["kind"], resource): set(rule["verbs"]) - {"get", "list", "watch"}
        for each in objects
        if each["kind"] in ("ClusterRole", "Role")
        for rule in each["rules"]
        for resource in rule["resources"]
        if set(rule["verbs"]) - {"get", "list", "watch"} and "resourceNames" not in rule
    }
    assert written == {
        ("ClusterRole", "policyendpoints"): {"create", "patch", "delete"},
        ("ClusterRole", "networkpolicies/finalizers"): {"update"},
        ("ClusterRole", "customresourcedefinitions"): {"create"},
        ("Role", "leases"): {"create"},
    }


@needs_kubectl
def test_the_daemonset_can_surge_on_the_nodes_it_is_for() -> None:
    daemonset = one(documents(run("kubectl", "kustomize", DEPLOY)), "DaemonSet")
    assert daemonset["metadata"]["namespace"] == "kube-system"
    assert daemonset["spec"]["updateStrategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    spec = daemonset["spec"]["template"]["spec"]
    assert spec["hostNetwork"] is True
    assert spec["priorityClassName"] == "system-node-critical"
    assert spec["tolerations"] == [{"operator": "Exists"}]
    (container,) = spec["containers"]
    # The scheduler would take them for host ports, and keep a second pod off the node.
    assert "ports" not in container
    assert "limits" not in container["resources"]
    security = container["securityContext"]
    assert security["capabilities"] == {"drop": ["ALL"], "add": ["NET_ADMIN", "NET_RAW"]}
    assert (security["privileged"], security["readOnlyRootFilesystem"]) == (False, True)
    paths = {volume["hostPath"]["path"]: volume["hostPath"]["type"] for volume in spec["volumes"]}
    assert paths == {
        "/run/podgate": "DirectoryOrCreate",
        "/run/xtables.lock": "FileOrCreate",
        "/var/run/aws-node": "DirectoryOrCreate",
    }


@needs_kubectl
def test_the_agent_may_only_read() -> None:
    role = one(documents(run("kubectl", "kustomize", DEPLOY)), "ClusterRole")
    granted = {
        (group, resource): set(rule["verbs"])
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }
    watched = {"get", "list", "watch"}
    assert granted == {
        ("networking.k8s.aws", "policyendpoints"): watched,
        ("networking.k8s.io", "networkpolicies"): watched,
        ("", "pods"): watched,
        ("", "namespaces"): watched,
        ("", "services"): watched,
        ("apiextensions.k8s.io", "customresourcedefinitions"): watched,
        ("", "nodes"): {"get"},
    }


@needs_kubectl
@pytest.mark.parametrize(
    ("components", "expected"),
    [
        ([], {"mode": "standard", "resolve": "auto", "on_stop": "auto"}),
        (
            ["strict", "resolve-always", "uninstall"],
            {"mode": "strict", "resolve": "always", "on_stop": "clean"},
        ),
    ],
)
def test_the_agent_takes_its_arguments_and_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, components: list[str], expected: dict[str, str]
) -> None:
    template = one(kustomized(tmp_path, *components), "DaemonSet")["spec"]["template"]
    (container,) = template["spec"]["containers"]
    fields = {"spec.nodeName": "node-1", "status.hostIP": "192.0.2.1"}
    known = {variable for option in agent_command.params for variable in option.envvar or ()}
    for variable in container["env"]:
        assert variable["name"] in known
        value = variable.get("value") or fields[variable["valueFrom"]["fieldRef"]["fieldPath"]]
        monkeypatch.setenv(variable["name"], value)
    name, *arguments = container["args"]
    assert name == "agent"
    options = agent_command.make_context("agent", arguments).params
    assert {key: options[key] for key in expected} == expected
    assert (options["source"], options["take_over"]) == (("kubernetes",), True)
    assert str(options["cni_socket"]) == VPC_CNI_SOCKET
    assert (options["node_name"], options["node_ip"]) == ("node-1", (bytes([192, 0, 2, 1]),))


@needs_helm
def test_helm_lint() -> None:
    said = run("helm", "lint", "--strict", CHART)
    assert "0 chart(s) failed" in said


@needs_helm
@pytest.mark.parametrize(
    ("setting", "field"),
    [
        ("mode=stict", "mode"),
        ("queues=0", "queues"),
        ("image.repositry=x", "repositry"),
        ("maxSurge=0", "maxSurge"),
        ("tolerance=x", "tolerance"),
        ("controller.enable=true", "enable"),
        ("controller.replicas=0", "replicas"),
    ],
)
def test_a_wrong_value_is_refused_by_name(setting: str, field: str) -> None:
    done = subprocess.run(
        ["helm", "template", "podgate", str(CHART), "--set", setting],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode != 0
    assert "meet the specifications of the schema" in done.stderr
    assert field in done.stderr


@needs_helm
def test_every_value_reaches_the_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {
        "mode": "strict",
        "resolve": "never",
        "fail": "open",
        "podNames": "cluster",
        "spoofCheck": "off",
        "onStop": "clean",
        "logFormat": "json",
        "queues": "4",
        "extraArgs[0]": "--veth-prefix=cali",
    }
    rendered = one(templated(*(f"{key}={value}" for key, value in settings.items())), "DaemonSet")
    (container,) = rendered["spec"]["template"]["spec"]["containers"]
    for variable in container["env"]:
        if "value" in variable:
            monkeypatch.setenv(variable["name"], variable["value"])
    options = agent_command.make_context("agent", [*container["args"][1:], "--node-name=n"]).params
    assert {key: options[key] for key in ("mode", "resolve", "fail", "pod_names", "spoof_check")} == {
        "mode": "strict",
        "resolve": "never",
        "fail": "open",
        "pod_names": "cluster",
        "spoof_check": "off",
    }
    assert (options["on_stop"], options["log_format"], options["queues"]) == ("clean", "json", 4)
    assert options["veth_prefix"] == "cali"


@needs_helm
def test_the_definition_only_when_asked_for_and_then_for_good() -> None:
    assert all(each["kind"] != "CustomResourceDefinition" for each in templated())
    definition = one(templated("crds.install=true"), "CustomResourceDefinition")
    assert definition["metadata"].pop("annotations") == {"helm.sh/resource-policy": "keep"}
    (ours,) = (DEPLOY / "crds").glob("policyendpoints.*.yaml")
    assert definition == yaml.safe_load(ours.read_text())


def test_the_chart_carries_the_definition_of_this_version() -> None:
    for copy in (CHART / "files").iterdir():
        assert copy.read_text() == (DEPLOY / "crds" / copy.name).read_text()
