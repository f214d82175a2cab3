"""What `deploy/` holds, as a real API server sees it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from conftest import AgentFactory, LabFactory
from control_plane import ControlPlane, Raw, Refused
from objects import deny

pytestmark = pytest.mark.cluster

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
COLLECTIONS = {
    "ServiceAccount": "api/v1/namespaces/kube-system/serviceaccounts",
    "DaemonSet": "apis/apps/v1/namespaces/kube-system/daemonsets",
    "ClusterRole": "apis/rbac.authorization.k8s.io/v1/clusterroles",
    "ClusterRoleBinding": "apis/rbac.authorization.k8s.io/v1/clusterrolebindings",
    "Role": "apis/rbac.authorization.k8s.io/v1/namespaces/kube-system/roles",
    "RoleBinding": "apis/rbac.authorization.k8s.io/v1/namespaces/kube-system/rolebindings",
    "Deployment": "apis/apps/v1/namespaces/kube-system/deployments",
    "NetworkPolicy": "apis/networking.k8s.io/v1/namespaces/kube-system/networkpolicies",
    "CustomResourceDefinition": "apis/apiextensions.k8s.io/v1/customresourcedefinitions",
}


def objects(*argv: str | Path) -> list[Raw]:
    if shutil.which(str(argv[0])) is None:
        pytest.skip(f"needs {argv[0]}, which renders the manifests: install it into PATH")
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return [one for one in yaml.safe_load_all(done.stdout) if one]


def dry_run(cluster: ControlPlane, made: Raw) -> Raw:
    """As it would be kept. Refused for an unknown field, too."""
    name = made["metadata"]["name"]
    path = (
        f"{COLLECTIONS[made['kind']]}/{name}?dryRun=All&fieldValidation=Strict&fieldManager=test&force=true"
    )
    kept: Raw = cluster.request("PATCH", path, made, "application/apply-patch+yaml")
    return kept


@pytest.mark.parametrize(
    "argv",
    [
        ("kubectl", "kustomize", DEPLOY),
        ("helm", "template", "podgate", DEPLOY / "helm/podgate", "--namespace", "kube-system"),
        (
            *("helm", "template", "podgate", DEPLOY / "helm/podgate", "--namespace", "kube-system"),
            *("--set", "privileged=true,mode=strict,crds.install=true,queues=4"),
        ),
    ],
    ids=["kustomize", "helm", "helm with values"],
)
def test_every_object_is_accepted(cluster: ControlPlane, argv: tuple[str | Path, ...]) -> None:
    found = objects(*argv)
    assert {"ServiceAccount", "ClusterRole", "ClusterRoleBinding", "DaemonSet"} <= {
        one["kind"] for one in found
    }
    for one in found:
        kept = dry_run(cluster, one)
        assert kept["metadata"]["name"] == one["metadata"]["name"]


@pytest.mark.parametrize(
    "argv",
    [
        ("kubectl", "kustomize", DEPLOY / "controller"),
        (
            *("helm", "template", "podgate", DEPLOY / "helm/podgate", "--namespace", "kube-system"),
            *("--set", "controller.enabled=true,mode=strict,logFormat=json"),
        ),
    ],
    ids=["kustomize", "helm"],
)
def test_every_object_of_the_controller_is_accepted(
    cluster: ControlPlane, argv: tuple[str | Path, ...]
) -> None:
    found = objects(*argv)
    assert {"ServiceAccount", "Role", "RoleBinding", "Deployment", "NetworkPolicy"} <= {
        one["kind"] for one in found
    }
    for one in found:
        kept = dry_run(cluster, one)
        assert kept["metadata"]["name"] == one["metadata"]["name"]


def test_a_misspelt_field_is_not(cluster: ControlPlane) -> None:
    (daemonset,) = [one for one in objects("kubectl", "kustomize", DEPLOY) if one["kind"] == "DaemonSet"]
    daemonset["spec"]["minReadySecond"] = 3
    with pytest.raises(Refused, match="minReadySecond"):
        dry_run(cluster, daemonset)


@pytest.mark.netns
@pytest.mark.parametrize("resolve", ["auto", "always", "never"])
def test_the_rights_are_enough(
    lab: LabFactory, agent: AgentFactory, cluster: ControlPlane, resolve: str
) -> None:
    (role,) = [
        one
        for one in yaml.safe_load_all((DEPLOY / "agent" / "rbac.yaml").read_text())
        if one["kind"] == "ClusterRole"
    ]
    cluster.grant(role["rules"])
    pods = lab(["x/a", "x/b"])
    cluster.namespaces("x")
    cluster.create(deny(pods, "x/b"))
    one = agent(pods, options=["--resolve", resolve])
    assert one.status()["problems"] == []
    assert one.reaches("x/a", "x/b") == {resolve == "always"}
