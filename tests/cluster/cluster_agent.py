"""`podgate agent --source kubernetes` in the node of a lab, and its pods as objects of a real API server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from control_plane import ROOT, ControlPlane, Raw, until
from objects import pod_object

from dataplane.addresses import family_of, format_address
from dataplane.cli.client import ask
from dataplane.errors import AgentUnreachable
from dataplane.lab.probe import connect
from dataplane.lab.topology import LabPod
from dataplane.lab.world import Lab

PODGATE = (sys.executable, "-c", "from dataplane.cli import main; main()")
NODE = "node-1"


class ClusterAgent:
    """One agent; its node is called NODE."""

    def __init__(self, cluster: ControlPlane, lab: Lab, directory: Path, options: Sequence[str] = ()) -> None:
        self.cluster, self.lab, self.options = cluster, lab, tuple(options)
        self.control = directory / "control.sock"
        self.log = directory / "agent.log"
        self.server = cluster.connect(lab.node)
        self.kubeconfig = cluster.kubeconfig(directory / "kubeconfig", self.server)
        self.process: subprocess.Popen[Any] | None = None

    # -- objects

    def write_pods(self, labels: dict[str, str] | None = None) -> None:
        """The lab's node and pods, in the cluster."""
        addresses = [{"type": "InternalIP", "address": format_address(ip)} for ip in self.lab.node_ips]
        self.cluster.apply(
            {
                "apiVersion": "v1",
                "kind": "Node",
                "metadata": {"name": NODE},
                "status": {"addresses": addresses},
            }
        )
        for one in self.lab.pods.values():
            self.write_pod(one, labels)

    def write_pod(self, one: LabPod, labels: dict[str, str] | None = None) -> None:
        self.cluster.namespaces(one.key.namespace)
        self.cluster.create(self.pod(one, labels))

    def pod(self, one: LabPod, labels: dict[str, str] | None = None) -> Raw:
        """The Pod object, as its kubelet would have it."""
        made: Raw = pod_object(self.lab, one)
        made["metadata"]["labels"] = {"pod": one.key.name} if labels is None else labels
        made["spec"]["nodeName"] = NODE
        # The API server wants the single fields to be the first of the lists.
        made["status"]["podIP"] = made["status"]["podIPs"][0]["ip"]
        made["status"]["hostIP"] = made["status"]["hostIPs"][0]["ip"]
        return made

    # -- running

    def start(self, *, wait: bool = True) -> None:
        argv = [*PODGATE, "agent", "--source", "kubernetes", "--node-name", NODE]
        argv += ["--kubeconfig", str(self.kubeconfig), "--control", str(self.control), *self.options]
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        with self.log.open("ab") as log:
            self.process = self.lab.popen(
                "node",
                *argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONPATH": path},
            )
        if wait:
            self.wait_ready()

    def wait_ready(self, seconds: float = 30.0) -> Raw:
        return self.wait_status(lambda status: bool(status["ready"]), seconds)

    def wait_status(self, condition: Any, seconds: float = 30.0) -> Raw:
        """The first status that meets a condition; AssertionError with the log when none does in time."""
        last: list[Raw] = []

        def look() -> Raw | None:
            assert self.process is not None
            assert self.process.poll() is None, f"the agent ended:\n{self.text()}"
            try:
                last[:] = [self.status()]
            except AgentUnreachable:
                return None
            return last[0] if condition(last[0]) else None

        try:
            found: Raw = until(look, seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}: {last}\n{self.text()}") from None
        return found

    def wait_problem(self, text: str, seconds: float = 30.0) -> Raw:
        """A status among whose problems is one with this text."""
        return self.wait_status(
            lambda status: any(text in problem for problem in status["problems"]), seconds
        )

    def status(self) -> Raw:
        answer: Raw = ask(self.control, "status")
        return answer

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def terminate(self) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(15)

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    # -- packets

    def reaches(self, source: str, destination: str, port: str = "80/TCP") -> set[bool]:
        """Whether a connection by real packets is answered, over each family that the pods have."""
        families = sorted({family_of(ip) for ip in self.lab.pod(destination).ips})
        return {connect(self.lab, source, destination, port, family).reached for family in families}

    def wait_reaches(self, source: str, destination: str, expected: bool, seconds: float = 15.0) -> None:
        """Until connections of every family are answered, or no longer are."""
        until(
            lambda: self.reaches(source, destination) == {expected},
            seconds,
            f"{source} to {destination}: {expected}\n{self.text()}",
        )
