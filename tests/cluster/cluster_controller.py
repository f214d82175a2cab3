"""`podgate controller` beside a real API server, and what it is to have written there."""

from __future__ import annotations

import http.client
import itertools
import json
import os
import signal
import socket
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from cluster_agent import PODGATE
from control_plane import BASES, PORT, ROOT, ControlPlane, Raw, until

from dataplane.lab import netns

ALL = "apis/networking.k8s.aws/v1alpha1/policyendpoints"
LEASE = "apis/coordination.k8s.io/v1/namespaces/kube-system/leases/podgate-controller"
PATIENCE = 100.0  # seconds; usual are one or two, and 20 after a leader was killed
_ports = itertools.count(20_000, 2)


class ClusterController:
    """One controller, in the network namespace of the API server."""

    def __init__(
        self, cluster: ControlPlane, directory: Path, token: str, options: Sequence[str] = ()
    ) -> None:
        self.cluster, self.options = cluster, tuple(options)
        self.log = directory / "controller.log"
        self.kubeconfig = cluster.kubeconfig(
            directory / "kubeconfig", f"https://127.0.0.1:{PORT}", user={"token": token}
        )
        self._metrics = next(_ports)
        self.process: subprocess.Popen[Any] | None = None

    def start(self) -> None:
        argv = ["ip", "netns", "exec", self.cluster.space, *PODGATE, "controller"]
        argv += ["--kubeconfig", str(self.kubeconfig), "--metrics-bind-addr", f"127.0.0.1:{self._metrics}"]
        argv += ["--health-probe-bind-addr", f"127.0.0.1:{self._metrics + 1}", *self.options]
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONPATH": path},
            )

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def get(self, page: str) -> tuple[int, str]:
        """Status and text of one of its pages; status 0 while nobody answers."""
        port = self._metrics + (page != "/metrics")
        try:
            made = netns.make_socket(self.cluster.space, socket.AF_INET, socket.SOCK_STREAM)
            made.settimeout(10)
            made.connect(("127.0.0.1", port))
            connection = http.client.HTTPConnection("127.0.0.1", port)
            connection.sock = made
            with made:
                connection.request("GET", page, headers={"Connection": "close"})
                answer = connection.getresponse()
                return answer.status, answer.read().decode()
        except (OSError, http.client.HTTPException):
            return 0, ""

    def metric(self, name: str) -> float:
        """The sum of a metric's series."""
        lines = [line for line in self.get("/metrics")[1].splitlines() if line.startswith(name)]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    def writes(self) -> int:
        """Requests of its that changed something."""
        lines = self.get("/metrics")[1].splitlines()
        done = [line for line in lines if line.startswith("podgate_controller_writes_total{")]
        return round(sum(float(line.rpartition(" ")[2]) for line in done if 'result="ok"' in line))

    @property
    def leads(self) -> bool:
        return self.metric("podgate_controller_leader ") == 1

    def wait(self, condition: Any, seconds: float = PATIENCE, what: str = "") -> Any:
        def look() -> Any:
            assert self.process is not None
            assert self.process.poll() is None, f"the controller ended:\n{self.text()}"
            return condition()

        try:
            return until(look, seconds, what)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.get('/readyz')}\n{self.text()}") from None

    def wait_ready(self, seconds: float = PATIENCE) -> None:
        self.wait(lambda: self.get("/readyz")[0] == 200, seconds, "ready")

    def wait_leads(self, seconds: float = PATIENCE) -> None:
        self.wait(lambda: self.leads, seconds, "leading")

    def wait_unready(self, text: str, seconds: float = PATIENCE) -> None:
        """Until /readyz says why not, with these words."""
        self.wait(lambda: text in self.get("/readyz")[1], seconds, text)

    def wait_end(self, seconds: float = PATIENCE) -> int:
        assert self.process is not None
        return self.process.wait(seconds)

    def terminate(self) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE)

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


# --- what is there, and what is to be ------------------------------------------------------------------


def written(cluster: ControlPlane) -> list[Raw]:
    """The PolicyEndpoints of the cluster."""
    items: list[Raw] = cluster.get(ALL)["items"]
    return items


def versions(cluster: ControlPlane) -> dict[str, str]:
    return {one["metadata"]["name"]: one["metadata"]["resourceVersion"] for one in written(cluster)}


def resolved(cluster: ControlPlane, directory: Path) -> list[Raw]:
    """What `podgate resolve` prints of the same cluster."""
    items: list[Raw] = []
    for kind, base in BASES.items():
        if kind in ("NetworkPolicy", "Pod", "Service", "Namespace"):
            found = cluster.get(base.replace("/namespaces/{}", ""))
            items += [{"apiVersion": found["apiVersion"], "kind": kind, **one} for one in found["items"]]
    dump = directory / "dump.json"
    dump.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))
    done = subprocess.run(
        [*PODGATE, "resolve", str(dump), "-o", "json"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    made: list[Raw] = json.loads(done.stdout)["items"]
    return made


def together(made: Sequence[Raw]) -> dict[tuple[str, str, str], Raw]:
    """What the slices of each policy and port group say, whatever stands in which of them.

    An entry that stands in two is there twice, here too.
    """
    policies: dict[tuple[str, str, str], Raw] = {}
    for one in made:
        metadata, spec = one["metadata"], one["spec"]
        group = metadata.get("labels", {}).get("podgate.dev/port-group", "")
        (owner,) = metadata["ownerReferences"]
        assert (owner["kind"], owner["name"]) == ("NetworkPolicy", spec["policyRef"]["name"])
        assert (owner["controller"], owner["blockOwnerDeletion"]) == (True, True)
        assert metadata["namespace"] == spec["policyRef"]["namespace"]
        whole = policies.setdefault(
            (metadata["namespace"], spec["policyRef"]["name"], group),
            {
                "owner": owner["uid"],
                "isolation": spec["podIsolation"],
                "selector": spec["podSelector"],
                **{name: [] for name in ("podSelectorEndpoints", "ingress", "egress")},
            },
        )
        assert (whole["owner"], whole["isolation"]) == (owner["uid"], spec["podIsolation"])
        assert whole["selector"] == spec["podSelector"]
        for name in ("podSelectorEndpoints", "ingress", "egress"):
            entries = spec.get(name, [])
            assert len(entries) <= 200
            whole[name] += [json.dumps(entry, sort_keys=True) for entry in entries]
    for whole in policies.values():
        for name in ("podSelectorEndpoints", "ingress", "egress"):
            whole[name].sort()
    return policies


def forget(cluster: ControlPlane) -> None:
    """Take away what controllers leave behind besides PolicyEndpoints, and what stops them."""
    for path in (LEASE, "api/v1/namespaces/kube-system/configmaps/amazon-vpc-cni"):
        with suppress(Exception):
            cluster.request("DELETE", path)
