"""podgate as `kubectl apply -k` installs it, in an overlay of its own, and its removal."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from kubectl import Kubectl, KubectlError

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
NAMESPACE, DAEMONSET = "kube-system", "daemonset/podgate"
SELECTOR = "app.kubernetes.io/name=podgate"
ROLLOUT_SECONDS = 180


def image_reference(image: str) -> dict[str, str]:
    """`registry:5000/podgate:0.1.0` as an entry of a kustomization's `images`. ValueError without a name."""
    name, at, digest = image.partition("@")
    first, colon, tag = name.rpartition(":")
    if not colon or "/" in tag:  # the colon of a registry's port
        first, tag = name, ""
    if not first or (at and not digest.startswith("sha256:")):
        raise ValueError(f"{image!r} is no image; write it like registry.example/podgate:0.1.0")
    entry = {"name": "podgate", "newName": first}
    if tag:
        entry["newTag"] = tag
    if digest:
        entry["digest"] = digest
    return entry


def kustomization(
    base: str, image: str, environment: Mapping[str, str], components: Sequence[str] = ()
) -> dict[str, Any]:
    """An overlay over `base` (a relative path). `environment` is the agents'."""
    made: dict[str, Any] = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [base],
        "components": [f"{base}/components/{name}" for name in components],
        "images": [image_reference(image)],
    }
    if environment:
        container = {
            "name": "agent",
            "env": [{"name": key, "value": value} for key, value in environment.items()],
        }
        patch = {
            "apiVersion": "apps/v1",
            "kind": "DaemonSet",
            "metadata": {"name": "podgate", "namespace": NAMESPACE},
            "spec": {"template": {"spec": {"containers": [container]}}},
        }
        made["patches"] = [{"patch": json.dumps(patch)}]
    return made


class Installation:
    """Of one image on one cluster."""

    def __init__(self, kubectl: Kubectl, image: str, environment: Mapping[str, str]) -> None:
        self._kubectl = kubectl
        self._image = image
        self._environment = environment

    def is_there(self) -> bool:
        """Whether the cluster has a podgate already, whoever's."""
        return bool(self._kubectl.get("daemonset", "-n", NAMESPACE, "-l", SELECTOR)["items"])

    def install(self) -> int:
        """Install, and wait until every agent is ready; how many there are."""
        self._on_overlay("apply")
        try:
            self._roll_out()
        except KubectlError as error:
            raise KubectlError(f"the agents do not get ready: {error}\n{self._why_not_ready()}") from None
        daemonset = self._kubectl.get(DAEMONSET, "-n", NAMESPACE)
        return int(daemonset["status"]["numberReady"])

    def remove(self) -> list[str]:
        """Have the agents take their rules along and go. What may be left, one line each."""
        left = []
        try:
            if self.is_there():
                self._on_overlay("apply", "uninstall")
                self._roll_out()
        except KubectlError as error:
            left.append(f"rules on the nodes, to be removed by `podgate cleanup` there: {error}")
        try:
            self._on_overlay("delete")
            gone = ("wait", "--for=delete", "pod", "-n", NAMESPACE, "-l", SELECTOR, "--timeout=60s")
            self._kubectl(*gone, seconds=70)
        except KubectlError as error:
            left.append(f"objects of podgate in {NAMESPACE}: {error}")
        return left

    def agent_on(self, node: str) -> str:
        """The pod of the agent that runs there."""
        found = self._kubectl.get(
            "pod", "-n", NAMESPACE, "-l", SELECTOR, f"--field-selector=spec.nodeName={node}"
        )
        if not found["items"]:
            raise KubectlError(f"no agent runs on node {node}")
        return str(found["items"][0]["metadata"]["name"])

    def _on_overlay(self, what: str, *components: str) -> None:
        with tempfile.TemporaryDirectory(prefix="podgate-e2e-") as directory:
            base = os.path.relpath(DEPLOY, os.path.realpath(directory))
            overlay = kustomization(base, self._image, self._environment, components)
            Path(directory, "kustomization.yaml").write_text(json.dumps(overlay))
            options = ("--ignore-not-found", "--timeout=60s") if what == "delete" else ()
            self._kubectl(what, "-k", directory, *options, seconds=90)

    def _roll_out(self) -> None:
        seconds = ROLLOUT_SECONDS
        self._kubectl(
            "rollout", "status", DAEMONSET, "-n", NAMESPACE, f"--timeout={seconds}s", seconds=seconds + 10
        )

    def _why_not_ready(self) -> str:
        said = []
        for argv in (
            ("get", "pod", "-n", NAMESPACE, "-l", SELECTOR, "-o", "wide"),
            ("logs", "-n", NAMESPACE, "-l", SELECTOR, "--tail=20", "--prefix"),
        ):
            with suppress(KubectlError):
                said.append(self._kubectl(*argv))
        return "".join(said)
