"""The pods that ask each other, and the tables of who reaches whom."""

from __future__ import annotations

import ipaddress
import json
import secrets
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from cases import PODS, PORTS, Names
from kubectl import Kubectl

LABEL = "podgate.dev/e2e"
PYTHON = "/opt/podgate/bin/python"
PROGRAM = Path(__file__).with_name("peer.py").read_text()
SERVED = "x/a"  # has a Service, port 80 to its 8080


class Probe(NamedTuple):
    """One question. `by_service`: to the Service's address instead of the pod's."""

    source: str
    destination: str
    port: str
    family: int
    by_service: bool = False

    def __str__(self) -> str:
        way = " by its Service" if self.by_service else ""
        return f"IPv{self.family} {self.source} > {self.destination}{way} {self.port}"


def pod(name: str, namespace: str, app: str, image: str) -> dict[str, Any]:
    """A pod that answers; it needs no rights and no image but podgate's own."""
    probe = {"tcpSocket": {"port": 8080}, "periodSeconds": 2, "failureThreshold": 3}
    container = {
        "name": "peer",
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "command": [PYTHON, "-c", PROGRAM, "serve", name],
        "readinessProbe": probe,
        "livenessProbe": probe,
        "resources": {"requests": {"cpu": "10m", "memory": "32Mi"}},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "runAsNonRoot": True,
            "runAsUser": 65534,
            "capabilities": {"drop": ["ALL"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }
    spread = {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": {"matchLabels": {LABEL: "peer"}},
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": app, "namespace": namespace, "labels": {"app": app, LABEL: "peer"}},
        "spec": {
            "automountServiceAccountToken": False,
            "terminationGracePeriodSeconds": 0,
            "topologySpreadConstraints": [spread],
            "containers": [container],
        },
    }


def family_of(address: str) -> int:
    return ipaddress.ip_address(address).version


def questions(addresses: Mapping[str, Sequence[str]], service: Sequence[str]) -> dict[Probe, str]:
    """Every probe with the target that the pod's program takes."""
    found = {}
    for source in PODS:
        families = {family_of(address) for address in addresses[source]}
        for destination in PODS:
            for address in addresses[destination]:
                if (family := family_of(address)) not in families:
                    continue
                for port in PORTS:
                    number, protocol = port.split("/")
                    found[Probe(source, destination, port, family)] = f"{address},{number},{protocol}"
        if source == SERVED:  # needs a CNI that lets a pod reach itself through its Service
            continue
        for address in service:
            if (family := family_of(address)) in families:
                found[Probe(source, SERVED, "8080/TCP", family, by_service=True)] = f"{address},80,TCP"
    return found


class Pods:
    """Four pods in two namespaces that nothing else is in."""

    def __init__(self, kubectl: Kubectl, image: str) -> None:
        self._kubectl = kubectl
        self._image = image
        suffix = secrets.token_hex(3)
        self.namespaces = {place: f"podgate-e2e-{place}-{suffix}" for place in ("x", "y")}
        self.nodes: dict[str, str] = {}
        self.addresses: dict[str, list[str]] = {}
        self._questions: dict[Probe, str] = {}

    @property
    def names(self) -> Names:
        return Names(self.namespaces, self.addresses)

    def full_name(self, which: str) -> str:
        """x/a as the cluster calls it."""
        place, name = which.split("/")
        return f"{self.namespaces[place]}/{name}"

    def make(self) -> None:
        """Make them and wait until they are ready."""
        for name in self.namespaces.values():
            metadata = {"name": name, "labels": {LABEL: "true"}}
            self._kubectl.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})
        objects = []
        for which in PODS:
            namespace, app = self.full_name(which).split("/")
            objects.append(pod(which, namespace, app, self._image))
        namespace, app = self.full_name(SERVED).split("/")
        service = {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": app, "namespace": namespace},
            "spec": {
                "selector": {"app": app},
                "ipFamilyPolicy": "PreferDualStack",
                "ports": [{"port": 80, "targetPort": 8080}],
            },
        }
        self._kubectl.apply(*objects, service)
        for name in self.namespaces.values():
            ready = ("wait", "--for=condition=Ready", "pod", "--all", "-n", name, "--timeout=120s")
            self._kubectl(*ready, seconds=130)
        for which in PODS:
            namespace, app = self.full_name(which).split("/")
            found = self._kubectl.get("pod", app, "-n", namespace)
            self.nodes[which] = found["spec"]["nodeName"]
            self.addresses[which] = [one["ip"] for one in found["status"]["podIPs"]]
        found = self._kubectl.get("service", "a", "-n", self.namespaces["x"])
        self._questions = questions(self.addresses, found["spec"]["clusterIPs"])

    def ask(self) -> dict[Probe, bool]:
        """Ask everything at once; whether the pod that was meant has answered."""
        with ThreadPoolExecutor(len(PODS)) as pool:
            answers: dict[Probe, bool] = {}
            for part in pool.map(self._ask_from, PODS):
                answers.update(part)
        return answers

    def _ask_from(self, source: str) -> dict[Probe, bool]:
        asked = [probe for probe in self._questions if probe.source == source]
        targets = [f"{number},{self._questions[probe]}" for number, probe in enumerate(asked)]
        namespace, app = self.full_name(source).split("/")
        said = self._kubectl("exec", "-n", namespace, app, "--", PYTHON, "-c", PROGRAM, "ask", *targets)
        answers = json.loads(said)
        return {probe: answers[str(number)] == probe.destination for number, probe in enumerate(asked)}

    def unwell(self) -> list[str]:
        """Pods whose probes have failed: kubelet must reach them whatever the policies say."""
        found = []
        for name in self.namespaces.values():
            for one in self._kubectl.get("pod", "-n", name)["items"]:
                status = one["status"]["containerStatuses"][0]
                if not status["ready"] or status["restartCount"]:
                    said = f"ready: {status['ready']}, restarts: {status['restartCount']}"
                    found.append(f"{name}/{one['metadata']['name']} {said}")
        return found

    def replace_policies(self, policies: Sequence[Mapping[str, Any]]) -> None:
        """Have these in force, and no others."""
        if policies:
            self._kubectl.apply(*policies)
        wanted = {(one["metadata"]["namespace"], one["metadata"]["name"]) for one in policies}
        for namespace in self.namespaces.values():
            for one in self._kubectl.get("networkpolicy", "-n", namespace)["items"]:
                name = one["metadata"]["name"]
                if (namespace, name) not in wanted:
                    self._kubectl("delete", "networkpolicy", name, "-n", namespace)

    def remove(self) -> None:
        """These, and what an earlier run has left."""
        self._kubectl("delete", "namespace", "-l", f"{LABEL}=true", "--timeout=120s", seconds=130)
