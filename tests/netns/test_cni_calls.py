"""What the VPC CNI's calls do to real packets: pods closed before their first one, flows that end."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from conftest import PODGATE, AgentFactory, LabFactory, RunningAgent, import_path
from objects import allow, anywhere, deny, pod, policy, select, until
from traffic import Stream, arrives, passes, udp

os.environ.update(GRPC_ENABLE_FORK_SUPPORT="0", GRPC_VERBOSITY="NONE")  # read by the import
import grpc

from dataplane.addresses import format_address
from dataplane.lab.probe import connect
from dataplane.lab.world import Lab

pytestmark = pytest.mark.netns
BOTH_FAMILIES = pytest.mark.parametrize("family", [4, 6])
DIAL_SECONDS = 2.0  # how long the CNI waits to be connected


class Cni:
    """Calls the agent as the VPC CNI does: a new connection per call, bytes written by hand."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.options = ("--cni-socket", str(path))

    def add(self, name: str, mode: str = "") -> bool:
        namespace, _, short = name.partition("/")
        return self._call("EnforceNpToPod", _field(1, short) + _field(2, namespace) + _field(3, mode))

    def delete(self, name: str) -> bool:
        namespace, _, short = name.partition("/")
        return self._call("DeletePodNp", _field(2, short) + _field(3, namespace))

    def _call(self, method: str, data: bytes) -> bool:
        with grpc.insecure_channel(f"unix:{self.path}") as channel:
            grpc.channel_ready_future(channel).result(DIAL_SECONDS)
            answer = channel.unary_unary(f"/rpc.NPBackend/{method}")(data, timeout=10)
        assert answer in {b"", b"\x08\x01"}
        return bool(answer)


def _field(number: int, text: str) -> bytes:
    return bytes([number << 3 | 2, len(text)]) + text.encode() if text else b""


@pytest.fixture
def cni(tmp_path_factory: pytest.TempPathFactory) -> Cni:
    return Cni(tmp_path_factory.mktemp("cni") / "aws-node" / "npa.sock")


def strict(cni: Cni) -> tuple[str, ...]:
    return (*cni.options, "--mode", "strict")


def closed(lab: Lab, name: str, other: str, family: int) -> bool:
    """Whether nothing passes between two pods, whoever begins."""
    new, old = udp(lab, name, 9000, family=family), udp(lab, other, 9001, family=family)
    return not arrives(old, (lab.address(name, family), 9000), new) and not arrives(
        new, (lab.address(other, family), 9001), old
    )


def judged(daemon: RunningAgent) -> list[tuple[str, str]]:
    """Flows that the kernel passes by an earlier verdict."""
    rows = daemon.ask("flows")
    return [(row["src"], row["dst"]) for row in rows if row["egress_judged"] or row["ingress_judged"]]


@BOTH_FAMILIES
def test_strict_mode_closes_a_pod_before_its_first_packet(
    lab: LabFactory, agent: AgentFactory, cni: Cni, family: int
) -> None:
    one = lab(["x/b"])
    daemon = agent(
        one, policy("x", "b", select(one, "x/b"), ingress=anywhere(), egress=anywhere()), options=strict(cni)
    )
    one.add_pod(pod("x/new"))
    assert cni.add("x/new", "strict")
    # Not merely an interface nobody knows: the agent knows the pod, and that nothing is allowed.
    assert daemon.podgate("rules", "x/new").returncode == 0
    assert closed(one, "x/new", "x/b", family)
    assert daemon.status()["counters"].get("no-table", 0) == 0
    assert daemon.status()["counters"]["no-rule"] > 0
    # Its node's probes arrive, and it reaches its node.
    assert connect(one, "node", "x/new", family=family).reached
    with one.serving([one.node], [(6, 9000)]):
        assert connect(one, "x/new", "node", "9000/TCP", family=family).reached
    # Rules may lag; then they open it.
    daemon.write(
        policy("x", "b", select(one, "x/b"), ingress=anywhere(), egress=anywhere()),
        policy("x", "new", select(one, "x/new"), ingress=allow(one, "x/b"), egress=[]),
    )
    new, b = udp(one, "x/new", 9000, family=family), udp(one, "x/b", 9001, family=family)
    assert passes(b, (one.address("x/new", family), 9000), new)
    assert daemon.status()["problems"] == []


def test_rules_known_by_name_hold_at_once(lab: LabFactory, agent: AgentFactory, cni: Cni) -> None:
    # A StatefulSet's pod made again with another address: objects still tell the former one.
    one = lab(["x/web", "x/b", "x/c"])
    rules = policy("x", "web", select(one, "x/web"), ingress=allow(one, "x/b"), egress=allow(one, "x/b"))
    others = policy("x", "others", select(one, "x/b", "x/c"), ingress=anywhere(), egress=anywhere())
    agent(one, rules, others, options=strict(cni))
    one.replace_pod("x/web", ["10.1.0.77", "fd00:1::77"])
    assert cni.add("x/web", "strict")
    for family in (4, 6):
        assert connect(one, "x/b", "x/web", family=family).reached
        assert not connect(one, "x/c", "x/web", family=family, timeout=0.3).reached
        assert not connect(one, "x/web", "x/c", family=family, timeout=0.3).reached
        assert connect(one, "node", "x/web", family=family).reached


def test_the_stricter_of_two_modes_wins(lab: LabFactory, agent: AgentFactory, cni: Cni) -> None:
    one = lab(["x/a", "x/b"])
    daemon = agent(one, options=cni.options)
    one.add_pod(pod("x/new"))
    assert cni.add("x/new", "strict")
    assert closed(one, "x/new", "x/b", 4)
    assert connect(one, "node", "x/new").reached
    assert connect(one, "x/a", "x/b").reached  # nobody asked for these to be closed
    status = daemon.status()
    assert status["ready"]
    assert len(status["problems"]) == 1
    assert "the VPC CNI runs in strict mode, this agent in standard mode" in status["problems"][0]
    daemon.write_pods()  # its Pod object changes nothing of that
    assert closed(one, "x/new", "x/b", 4)


def test_standard_mode_leaves_a_new_pod_open(lab: LabFactory, agent: AgentFactory, cni: Cni) -> None:
    one = lab(["x/b"])
    daemon = agent(one, options=cni.options)
    new = one.add_pod(pod("x/new"))
    assert cni.add("x/new", "standard")
    for family in (4, 6):
        assert connect(one, "x/b", "x/new", family=family).reached
        assert connect(one, "x/new", "x/b", family=family).reached
    # What it sends is checked from now on, although no object names its address.
    forger, b = udp(one, "x/new", 9000, address="10.1.0.99"), udp(one, "x/b", 9001)
    until(lambda: not arrives(forger, (one.address("x/b"), 9001), b), what="forged packets are dropped")
    own = udp(one, "x/new", 9002, address=format_address(new.ips[0]))
    assert passes(own, (one.address("x/b"), 9001), b)
    assert daemon.status()["counters"]["spoofed"] > 0


@BOTH_FAMILIES
def test_a_deleted_pods_flows_end(lab: LabFactory, agent: AgentFactory, cni: Cni, family: int) -> None:
    one = lab(["x/a", "x/b", "x/c"])
    rules = policy("x", "a", select(one, "x/a"), ingress=anywhere(), egress=anywhere())
    daemon = agent(one, rules, options=cni.options)
    streams = [Stream(one, "x/a", "x/b", family=family), Stream(one, "x/c", "x/a", family=family)]
    assert all(stream.flows() for stream in streams)
    assert len(judged(daemon)) == 2
    gone = one.remove_pod("x/a")
    assert cni.delete("x/a")
    assert judged(daemon) == []
    # The next pod has the address at once, and no object tells of it yet.
    one.add_pod(pod("x/heir", *[format_address(ip) for ip in gone.ips]))
    assert cni.add("x/heir", "strict")
    assert closed(one, "x/heir", "x/b", family)
    assert not connect(one, "x/c", "x/heir", family=family, timeout=0.3).reached


def test_deletions_that_need_nothing(lab: LabFactory, agent: AgentFactory, cni: Cni) -> None:
    one = lab(["x/a", "x/b"])
    daemon = agent(one, policy("x", "a", select(one, "x/a"), ingress=anywhere()), options=cni.options)
    assert cni.delete("x/nobody")
    # The CNI is late: a pod of that name lives. It stays isolated; its flows are only judged again.
    stream = Stream(one, "x/b", "x/a")
    assert cni.delete("x/a")
    assert stream.flows()
    daemon.write(deny(one, "x/a"))
    assert stream.silent()


def test_fifty_calls_at_once(lab: LabFactory, agent: AgentFactory, cni: Cni) -> None:
    one = lab(["x/b"])
    daemon = agent(one, options=strict(cni))
    names = [f"x/new-{number}" for number in range(10)]
    for name in names:
        one.add_pod(pod(name))
    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda name: cni.add(name, "strict"), names * 5))
    assert answers == [True] * 50
    assert all(daemon.podgate("rules", name).returncode == 0 for name in names[:2])
    assert closed(one, names[9], "x/b", 4)
    with ThreadPoolExecutor(50) as pool:
        assert all(pool.map(cni.delete, names * 5))


def test_a_pod_without_an_interface_is_refused(lab: LabFactory, agent: AgentFactory, cni: Cni) -> None:
    one = lab(["x/b"])
    daemon = agent(one, options=strict(cni))
    assert not cni.add("x/nobody", "strict")
    assert cni.add("x/b", "strict")
    assert not cni.add("x/b", "lax")
    text = daemon.text()
    assert "pod refused: it could not be isolated; kubelet tries again" in text
    assert "AWS_VPC_K8S_CNI_VETHPREFIX" in text
    assert "neither standard nor strict" in text


# --- before the first list -------------------------------------------------------------------------


@pytest.fixture
def without_api(cni: Cni, tmp_path: Path) -> Iterator[Callable[..., RunningAgent]]:
    """Starts agents that wait for an API server which is not there."""
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": "http://127.0.0.1:1"}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "users": [{"name": "u", "user": {}}],
        "current-context": "c",
    }
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
    running: list[subprocess.Popen[bytes]] = []

    def start(lab: Lab, daemon: RunningAgent) -> RunningAgent:
        argv = [*PODGATE, "agent", "--source", "kubernetes", "--kubeconfig", str(tmp_path / "kubeconfig")]
        argv += ["--node-name", "n1", "--control", str(daemon.control), *daemon.options]
        for ip in lab.node_ips:
            argv += ["--node-ip", format_address(ip)]
        with daemon.log.open("ab") as log:
            env = {**os.environ, "PYTHONPATH": import_path()}
            daemon.process = lab.popen(
                "node", *argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env
            )
        running.append(daemon.process)
        until(cni.path.exists, timeout=15, what="the CNI's socket")
        return daemon

    yield start
    for process in running:
        process.kill()
        process.wait()


def test_standard_calls_are_answered_before_anything_is_known(
    lab: LabFactory, agent: AgentFactory, cni: Cni, without_api: Callable[..., RunningAgent]
) -> None:
    one = lab(["x/a", "x/b"])
    daemon = without_api(one, agent(one, options=cni.options, start=False))
    assert cni.add("x/a", "standard")
    assert cni.delete("x/a")
    assert not daemon.status()["ready"]
    assert connect(one, "x/b", "x/a").reached
    # Nobody can close a pod yet, and that is said, in time.
    began = time.monotonic()
    assert not cni.add("x/b", "strict")
    assert time.monotonic() - began < 10
    assert "objects are still being read" in daemon.text()


def test_strict_mode_needs_no_objects(
    lab: LabFactory, agent: AgentFactory, cni: Cni, without_api: Callable[..., RunningAgent]
) -> None:
    one = lab(["x/a", "x/b"])
    daemon = without_api(one, agent(one, options=strict(cni), start=False))
    until(lambda: daemon.status()["generation"] > 0, timeout=15, what="the first rules")
    one.add_pod(pod("x/new"))
    assert cni.add("x/new", "strict")
    assert closed(one, "x/new", "x/b", 4)
    assert connect(one, "node", "x/new").reached


# --- the socket ------------------------------------------------------------------------------------


def test_the_socket_lives_as_long_as_the_agent(lab: LabFactory, agent: AgentFactory, cni: Cni) -> None:
    one = lab(["x/a"])
    daemon = agent(one, options=cni.options)
    assert stat.S_IMODE(cni.path.stat().st_mode) == 0o600
    second = agent(one, options=(*cni.options, "--queue-base", "10"), start=False)
    second.start(wait=False)
    assert second.process is not None
    assert second.process.wait(15) == 2
    # It ends because its ports are taken, and leaves the socket to whom it belongs.
    assert "another agent answers the CNI" in second.text()
    assert not second.control.exists()
    assert cni.add("x/a")
    daemon.kill()
    assert cni.path.exists()
    daemon.start()
    assert cni.add("x/a")
    assert daemon.terminate() == 0
    assert not cni.path.exists()


def test_garbage_on_the_socket_does_no_harm(lab: LabFactory, agent: AgentFactory, cni: Cni) -> None:
    one = lab(["x/a"])
    daemon = agent(one, options=strict(cni))
    before = daemon.text()
    held = []
    for number in range(100):
        stray = socket.socket(socket.AF_UNIX)
        stray.connect(str(cni.path))
        stray.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" * (number % 2) + os.urandom(2000))
        held.append(stray)
    assert cni.add("x/a", "strict")
    for stray in held:
        stray.close()
    assert daemon.status()["ready"]
    said = daemon.text()[len(before) :].splitlines()
    assert all("rules in force" in line for line in said), said


def test_calls_go_on_while_one_agent_takes_over(lab: LabFactory, agent: AgentFactory, cni: Cni) -> None:
    one = lab(["x/a", "x/b"])
    first = agent(one, options=strict(cni))
    second = agent(one, options=(*strict(cni), "--take-over"), start=False)
    second.control = first.control
    answers: list[bool] = []
    second.start(wait=False)
    assert second.process is not None

    def taken_over() -> bool:
        answers.append(cni.add("x/a", "strict"))
        return "took over" in second.text()

    until(taken_over, timeout=20, what="the second agent takes over")
    second.wait_ready()
    assert cni.add("x/b", "strict")
    assert answers.count(True) >= len(answers) - 1  # one may come just as the first stops
    assert first.terminate() == 0
    assert cni.add("x/b", "strict")
