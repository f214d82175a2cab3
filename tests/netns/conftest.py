"""Fixtures for tests with real packets: labs of pods, and agents that run in them."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from conformance import ALL, Cluster, Step
from objects import Object, PodLabels, pod, pod_object

from dataplane.addresses import format_address
from dataplane.cli.client import ask
from dataplane.errors import AgentUnreachable
from dataplane.lab.topology import Topology
from dataplane.lab.world import Lab
from dataplane.model import Pod

TOOLS = ("ip", "iptables", "ip6tables", "conntrack", "ipset")
PODGATE = (sys.executable, "-c", "from dataplane.cli import main; main()")
ROOT = Path(__file__).resolve().parents[2]
# Through `env`, which has lost root's rights when it looks for the program.
UNPRIVILEGED = ("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "env")
READY_SECONDS = 15.0
_numbers = itertools.count()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    reason = None
    if os.geteuid() != 0:
        reason = "makes network namespaces: run as root, for example `sudo make test`"
    elif missing:
        reason = f"needs {', '.join(missing)}: apt-get install iproute2 iptables conntrack ipset"
    if reason is None:
        return
    for item in items:
        if here in item.path.parents and item.get_closest_marker("netns"):
            item.add_marker(pytest.mark.skip(reason=reason))


LabFactory = Callable[..., Lab]


def _unused_name() -> str:
    worker = os.environ.get("PYTEST_XDIST_WORKER", "gw")
    return f"t{os.getpid():x}{worker}{next(_numbers)}"


@pytest.fixture
def lab_name() -> str:
    """A lab name that no other test, worker or run uses at this time."""
    return _unused_name()


@pytest.fixture
def lab(lab_name: str) -> Iterator[LabFactory]:
    """Makes labs: `lab(["x/a", pod("x/b", ports=["53/UDP"])], Topology(wire=Wire.BRIDGE))`."""
    made: list[Lab] = []

    def make(pods: Sequence[str | Pod], topology: Topology | None = None) -> Lab:
        objects = [pod(one) if isinstance(one, str) else one for one in pods]
        made.append(Lab.up(f"{lab_name}-{len(made)}" if made else lab_name, objects, topology))
        return made[-1]

    yield make
    for one in made:
        if one.home.exists():
            one.down()


class RunningAgent:
    """`podgate agent` in the node of a lab, fed from a directory of its own."""

    def __init__(self, lab: Lab, directory: Path, options: Sequence[str]) -> None:
        self.lab = lab
        self.directory = directory / "policies"
        self.directory.mkdir()
        self.control = directory / "control.sock"
        self.log = directory / "agent.log"
        self.options = tuple(options)
        self.process: subprocess.Popen[Any] | None = None

    # -- running

    def start(self, *, wait: bool = True) -> None:
        argv = [*PODGATE, "agent", "--source", str(self.directory), "--control", str(self.control)]
        for ip in self.lab.node_ips:
            argv += ["--node-ip", format_address(ip)]
        with self.log.open("ab") as log:
            self.process = self.lab.popen(
                "node",
                *argv,
                *self.options,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONPATH": import_path()},
            )
        if wait:
            self.wait_ready()

    def wait_ready(self, seconds: float = READY_SECONDS) -> dict[str, Any]:
        """Status once the agent is ready; AssertionError with its log when it is not in time."""
        deadline = time.monotonic() + seconds
        status: dict[str, Any] = {}
        while time.monotonic() < deadline:
            assert self.process is not None
            if self.process.poll() is not None:
                raise AssertionError(f"the agent exited with {self.process.returncode}:\n{self.text()}")
            try:
                status = self.status()
                if status["ready"]:
                    return status
            except AgentUnreachable:
                pass
            time.sleep(0.01)
        raise AssertionError(f"the agent is not ready after {seconds} s: {status}\n{self.text()}")

    def kill(self) -> None:
        """SIGKILL, as the kernel's out-of-memory killer does."""
        self._end(signal.SIGKILL)

    def terminate(self) -> int:
        """SIGTERM, as Kubernetes does; the exit status."""
        return self._end(signal.SIGTERM)

    def close(self) -> None:
        """End it in whatever state it is, and wait for that."""
        if self.process is not None:
            if self.process.poll() is None:
                self.process.kill()
            self.process.wait()

    def _end(self, number: int) -> int:
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"the agent does not end on signal {number}:\n{self.text()}") from None

    def text(self) -> str:
        """What the agent has logged."""
        return self.log.read_text(errors="replace")

    # -- asking

    def status(self) -> dict[str, Any]:
        result: dict[str, Any] = ask(self.control, "status")
        return result

    def ask(self, what: str, **query: str) -> Any:
        """Any other question to the control socket."""
        return ask(self.control, what, query)

    def podgate(self, *argv: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run another podgate command against this agent, in the node."""
        path = f"PYTHONPATH={import_path()}"
        line = (*PODGATE, *argv, "--control", str(self.control))
        return self.lab.run("node", "env", path, *line, check=check)

    # -- policies

    def write(self, *objects: Object, file: str = "policies.yaml", wait: bool = True) -> None:
        """Put objects into one file of the directory, in one step; return once they are in force."""
        # An empty file keeps what it held before (it may be about to be written); an empty list does not.
        documents = objects or ({"apiVersion": "v1", "kind": "List", "items": []},)
        self.write_text(yaml.safe_dump_all(documents), file, wait=wait)

    def write_text(self, text: str, file: str = "policies.yaml", *, wait: bool = True) -> None:
        path = self.directory / file
        if wait and path.exists() and _means_the_same(path.read_text(), text):
            wait = False  # nothing to come into force

        def act() -> None:
            new = self.directory / f".{file}.new"
            new.write_text(text)
            new.rename(path)

        self._change(act, wait)

    def remove(self, file: str = "policies.yaml", *, wait: bool = True) -> None:
        self._change((self.directory / file).unlink, wait)

    def write_pods(self, labels: PodLabels | None = None, *, wait: bool = True) -> None:
        """Write the Pod objects of the lab as it is now."""
        known = labels or {}
        objects = [pod_object(self.lab, one, known.get(str(key))) for key, one in self.lab.pods.items()]
        self.write(*objects, file="pods.yaml", wait=wait)

    def _change(self, act: Callable[[], object], wait: bool) -> None:
        running = self.process is not None and self.process.poll() is None
        before = self.status()["generation"] if running and wait else 0
        act()
        if not (running and wait):
            return
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            now = self.status()["generation"]
            if now > before:
                # A link event may have come in between: what was just written is in force once no
                # newer generation follows.
                time.sleep(0.03)
                if self.status()["generation"] == now:
                    return
                before = now - 1
            else:
                time.sleep(0.002)
        raise AssertionError(f"the change is not in force after 10 s: {self.status()}\n{self.text()}")


def _means_the_same(old: str, new: str) -> bool:
    try:
        return list(yaml.safe_load_all(old)) == list(yaml.safe_load_all(new))
    except (yaml.YAMLError, RecursionError):
        return old == new


AgentFactory = Callable[..., RunningAgent]


@pytest.fixture
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentFactory]:
    """Starts agents: `agent(lab, policy(…), …, options=["--no-offload"])`, ready when it returns.

    The Pod objects of the lab are in the directory from the start. `start=False` leaves starting to
    the test (`.start()`), `wait=False` does not wait until it is ready.
    """
    made: list[RunningAgent] = []

    def make(
        lab: Lab,
        *objects: Object,
        options: Iterable[str] = (),
        start: bool = True,
        wait: bool = True,
    ) -> RunningAgent:
        # A unix socket's path has room for 107 bytes: not below pytest's long names.
        directory = tmp_path_factory.mktemp("agent")
        one = RunningAgent(lab, directory, tuple(options))
        made.append(one)
        one.write_pods(wait=False)
        if objects:
            one.write(*objects, wait=False)
        if start:
            one.start(wait=wait)
        return one

    yield make
    for one in made:
        one.close()


@pytest.fixture(scope="module")
def _shared_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Lab.up(_unused_name(), Cluster.pods()) as lab:
        running = RunningAgent(lab, tmp_path_factory.mktemp("agent"), ())
        try:
            cluster = Cluster(lab, running)
            cluster.start()
            yield cluster
        finally:
            running.close()


@pytest.fixture
def cluster(_shared_cluster: Cluster) -> Iterator[Cluster]:
    """The cluster of the conformance tables, without policies; one for a whole module."""
    yield _shared_cluster
    _shared_cluster.put(Step(ALL))


@pytest.fixture(scope="session")
def rootless_python() -> str:
    """A Python that an unprivileged user can run and that finds this package; skips without one."""
    # yaml's compiled part tells whether the packages are those of this Python's version.
    code = "import dataplane.cli, click, rich, google_crc32c, yaml._yaml"
    for python in (sys.executable, f"/usr/bin/python3.{sys.version_info.minor}", "/usr/bin/python3"):
        done = subprocess.run(
            [*UNPRIVILEGED, python, "-c", code],
            env=rootless_environment(),
            cwd="/",
            capture_output=True,
            check=False,
        )
        if done.returncode == 0:
            return python
    pytest.skip(
        f"user 65534 can run no Python that sees {ROOT}: make the checkout and Python readable to all"
    )


def import_path() -> str:
    """PYTHONPATH with which the package is found from any directory, installed or not."""
    return os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


def rootless_environment() -> dict[str, str]:
    """An environment in which user 65534 finds the package and its dependencies."""
    packages = [path for path in sys.path if path.endswith("site-packages")]
    return {
        "PATH": os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *packages]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "LC_ALL": "C.UTF-8",
    }
