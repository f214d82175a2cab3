"""Fixtures for tests against a real API server: one per worker, cleared after each test."""

from __future__ import annotations

import itertools
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "netns"))  # its ways of writing objects

import cluster_controller
import kube_binaries
import yaml
from cluster_agent import ClusterAgent
from cluster_controller import ClusterController
from control_plane import CONTROLLER, ROOT, ControlPlane
from objects import pod

from dataplane.lab.topology import Topology
from dataplane.lab.world import Lab
from dataplane.model import Pod

TOOLS = ("ip", "iptables", "ip6tables", "conntrack", "ipset", "openssl", "setpriv")
_numbers = itertools.count()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    reason = None
    if os.geteuid() != 0:
        reason = "makes network namespaces: run as root, for example `sudo make test`"
    elif missing:
        reason = f"needs {', '.join(missing)}: apt-get install iproute2 iptables conntrack ipset openssl"
    building = kube_binaries.find() is None
    for item in items:
        if here in item.path.parents and item.get_closest_marker("cluster"):
            if building:  # the first of them waits until the API server is built
                item.add_marker(pytest.mark.timeout(kube_binaries.BUILD_SECONDS + 600))
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def _control_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    try:
        binaries = kube_binaries.wait()
    except kube_binaries.Unavailable as reason:
        pytest.skip(str(reason))
    worker = os.environ.get("PYTEST_XDIST_WORKER", "gw")
    one = ControlPlane(binaries, tmp_path_factory.mktemp("control-plane"), f"k{os.getpid():x}{worker}")
    try:
        one.start()
        yield one
    finally:
        one.stop()


@pytest.fixture
def cluster(_control_plane: ControlPlane) -> Iterator[ControlPlane]:
    """The API server, with PolicyEndpoints served and the agent's rights granted."""
    _control_plane.start_again()
    _control_plane.install_definition()
    _control_plane.grant()
    yield _control_plane
    _control_plane.start_again()
    _control_plane.clear()


LabFactory = Callable[..., Lab]


@pytest.fixture
def lab() -> Iterator[LabFactory]:
    """Makes a lab: `lab(["x/a", "x/b"])`."""
    made: list[Lab] = []

    def make(pods: Sequence[str | Pod], topology: Topology | None = None) -> Lab:
        worker = os.environ.get("PYTEST_XDIST_WORKER", "gw")
        objects = [pod(one) if isinstance(one, str) else one for one in pods]
        made.append(Lab.up(f"c{os.getpid():x}{worker}{next(_numbers)}", objects, topology))
        return made[-1]

    yield make
    for one in made:
        if one.home.exists():
            one.down()


AgentFactory = Callable[..., ClusterAgent]


@pytest.fixture
def agent(cluster: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentFactory]:
    """Starts agents on the cluster: `agent(lab, options=["--resolve", "always"])`, ready when it returns.

    The lab's node and pods are made objects of the cluster first. `wait=False` does not wait until it
    is ready, `start=False` leaves starting to the test.
    """
    made: list[ClusterAgent] = []

    def make(
        lab: Lab, *, options: Sequence[str] = (), start: bool = True, wait: bool = True, pods: bool = True
    ) -> ClusterAgent:
        one = ClusterAgent(cluster, lab, tmp_path_factory.mktemp("agent"), options)
        made.append(one)
        if pods:
            one.write_pods()
        if start:
            one.start(wait=wait)
        return one

    yield make
    for one in made:
        one.kill()


ControllerFactory = Callable[..., ClusterController]


@pytest.fixture
def controller(
    cluster: ControlPlane, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ControllerFactory]:
    """Starts controllers with the rights that `deploy/` gives them: `controller("--no-install-crd")`.

    It is ready when this returns, unless `wait=False`.
    """
    for made in yaml.safe_load_all((ROOT / "deploy/controller/rbac.yaml").read_text()):
        cluster.apply(made)
    running: list[ClusterController] = []

    def make(*options: str, wait: bool = True) -> ClusterController:
        one = ClusterController(cluster, tmp_path_factory.mktemp("controller"), CONTROLLER, options)
        running.append(one)
        one.start()
        if wait:
            one.wait_ready()
        return one

    yield make
    for one in running:
        one.kill()
    cluster.start_again()
    cluster_controller.forget(cluster)
