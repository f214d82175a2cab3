"""A capture of real packets: replayed, and made into policies that allow the same and no more."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import captures
import pytest
import yaml
from conftest import PODGATE, ROOT, AgentFactory, LabFactory, import_path
from objects import PodLabels, network_policy

from dataplane.lab.probe import probe
from dataplane.lab.world import Lab
from dataplane.sources.directory import read_paths

pytestmark = pytest.mark.netns

STARS = ROOT / "deploy/examples/stars"
NAMES = ("x/web", "x/db", "y/api")
LABELS: PodLabels = {"x/web": {"app": "web"}, "x/db": {"app": "db"}, "y/api": {"app": "api"}}
PORTS = ["80/TCP", "81/TCP"]
DENY = network_policy("x/deny", {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]})
WEB = network_policy(
    "x/web",
    {
        "podSelector": {"matchLabels": {"app": "web"}},
        "policyTypes": ["Egress"],
        "egress": [{"to": [{"podSelector": {"matchLabels": {"app": "db"}}}]}],
    },
)
DB = network_policy(
    "x/db",
    {
        "podSelector": {"matchLabels": {"app": "db"}},
        "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "web"}}}], "ports": [{"port": 81}]}],
    },
)
API = network_policy("y/api", {"podSelector": {}, "policyTypes": ["Ingress"]})


@contextlib.contextmanager
def capturing(lab: Lab, path: Path) -> Iterator[None]:
    """What `tcpdump -i any -y LINUX_SLL -w PATH` would write in the node, once the block has ended."""
    frames: list[tuple[float, bytes]] = []
    done = threading.Event()
    raw = lab.make_socket("node", socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3))  # ETH_P_ALL
    raw.settimeout(0.05)

    def read() -> None:
        while True:
            try:
                data, (_, protocol, kind, hardware, address) = raw.recvfrom(65536)
            except TimeoutError:
                if done.is_set():
                    return
                continue
            padded = address[:8].ljust(8, b"\0")
            head = struct.pack("!HHH8sH", kind, hardware, len(address), padded, protocol)
            frames.append((time.time(), head + data))

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        raw.close()
    captures.write(path, captures.pcap(captures.COOKED, frames))


@pytest.mark.parametrize("family", [4, 6])
def test_a_capture_of_the_node(lab: LabFactory, agent: AgentFactory, tmp_path: Path, family: int) -> None:
    one = lab(list(NAMES))
    # Every packet comes to the agent and passes several interfaces of the node.
    daemon = agent(one, DENY, WEB, DB, API, start=False)
    daemon.write_pods(LABELS)
    daemon.start()
    dump = tmp_path / "node.pcap"
    with capturing(one, dump):
        matrix = probe(one, PORTS, family=family)
    pairs = [(a, b) for a in NAMES for b in NAMES if a != b]
    reached = {(a, b, port) for a, b in pairs for port in PORTS if matrix.allows(a, b, port)}
    assert reached == {("x/web", "x/db", "81/TCP")}

    def podgate(*argv: str) -> str:
        return one.run("node", "env", f"PYTHONPATH={import_path()}", *PODGATE, *argv).stdout

    document = json.loads(podgate("replay", str(dump), str(daemon.directory), "--summary", "-o", "json"))
    seen = {
        (flow["src_pod"], flow["dst_pod"], f"{flow['dst_port']}/TCP"): flow["verdict"]
        for flow in document["flows"]
        if flow["src_pod"] and flow["dst_pod"] and flow["protocol"] == "TCP"
    }
    assert seen == {
        (a, b, port): "allow" if (a, b, port) in reached else "deny" for a, b in pairs for port in PORTS
    }
    assert document["capture"]["seen_again"] > 0  # each packet that was forwarded
    assert {flow["began"] for flow in document["flows"] if flow["protocol"] == "TCP"} == {"opened"}

    # The policies that are made of it reach the same, alone.
    advised = podgate("advise", str(dump), str(daemon.directory), "--filter", "tcp")
    assert {each["metadata"]["name"] for each in yaml.safe_load_all(advised)} == {"advised-web", "advised-db"}
    daemon.write_text(advised)
    again = probe(one, PORTS, family=family)
    among = {(a, b, port) for a, b in pairs for port in PORTS if again.allows(a, b, port)}
    # Nobody was seen to talk to the API, nor it to anybody: nothing is said of it but by the others.
    assert among == reached


def test_advice_reproduces_what_the_demo_allows(lab: LabFactory, agent: AgentFactory, tmp_path: Path) -> None:
    """Everybody who may talk does, is captured, and the policies made of it alone give the same matrix."""
    one = lab(read_paths([STARS / "pods.yaml"]).snapshot.pods)
    daemon = agent(one, start=False)
    daemon.write_text((STARS / "pods.yaml").read_text(), "pods.yaml", wait=False)
    policies = "\n---\n".join(path.read_text() for path in sorted(STARS.glob("0*.yaml")))
    daemon.write_text(policies, wait=False)
    daemon.start()
    ports = ["80/TCP", "6379/TCP", "9000/TCP", "9001/TCP"]
    dump = tmp_path / "demo.pcap"
    with capturing(one, dump):
        before = {family: probe(one, ports, family=family) for family in (4, 6)}
    assert before[4].allows("stars/frontend", "stars/backend", "6379/TCP")
    assert not before[4].allows("client/client", "stars/backend", "6379/TCP")
    advised = one.run(
        "node",
        *("env", f"PYTHONPATH={import_path()}"),
        *PODGATE,
        *("advise", str(dump), str(daemon.directory), "--filter", "tcp"),
    ).stdout
    daemon.write_text(advised)
    for family, matrix in before.items():
        assert not probe(one, ports, family=family).diff(matrix)
