"""The lab itself: wiring, servers, probes, and that nothing is left behind."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import PODGATE, UNPRIVILEGED, import_path, rootless_environment
from objects import pod, until

from dataplane.addresses import format_address, parse_address
from dataplane.errors import InputError
from dataplane.lab import netns, world
from dataplane.lab.probe import connect, probe, probe_families
from dataplane.lab.topology import Topology, Wire
from dataplane.lab.world import Lab
from dataplane.model import Key
from dataplane.reachability import Matrix

pytestmark = pytest.mark.netns

ALL = ("80/TCP", "80/UDP", "80/SCTP", "ICMP")
MakeLab = Callable[..., Lab]


def test_a_pod_is_wired_as_the_vpc_cni_does_it(lab: MakeLab) -> None:
    one = lab(["x/a", "x/b"])
    device = "eni" + hashlib.sha1(b"x.a").hexdigest()[:11]
    assert one.pod("x/a").device == device
    v4, v6 = one.address("x/a", 4), one.address("x/a", 6)
    routes = one.run("node", "ip", "-4", "route", "show", "dev", device).stdout
    assert routes.split() == [v4, "scope", "link"]
    assert v6 in one.run("node", "ip", "-6", "route", "show", "dev", device).stdout
    inside = json.loads(one.run("x/a", "ip", "-j", "addr", "show", "dev", "eth0").stdout)[0]["addr_info"]
    assert (v4, 32) in [(info["local"], info["prefixlen"]) for info in inside]
    assert (v6, 128) in [(info["local"], info["prefixlen"]) for info in inside]
    assert not [info for info in inside if info.get("tentative")]
    assert "default via 169.254.1.1 dev eth0" in one.run("x/a", "ip", "-4", "route").stdout
    assert "default via fe80::1 dev eth0" in one.run("x/a", "ip", "-6", "route").stdout
    neighbours = one.run("x/a", "ip", "neigh").stdout
    assert re.search(r"169\.254\.1\.1 .*PERMANENT", neighbours)
    assert re.search(r"fe80::1 .*PERMANENT", neighbours)


def test_sysctls_of_the_node(lab: MakeLab) -> None:
    one = lab(["x/a"])
    values = one.run(
        "node",
        "sysctl",
        "-n",
        "net.ipv4.ip_forward",
        "net.ipv6.conf.all.forwarding",
        "net.ipv4.conf.all.rp_filter",
        "net.ipv4.conf.eth0.rp_filter",
        f"net.ipv4.conf.{one.pod('x/a').device}.rp_filter",
    ).stdout
    assert values.split() == ["1", "1", "0", "2", "0"]


def test_addresses_come_from_the_objects_or_are_the_same_each_time(lab: MakeLab) -> None:
    pods = ["x/b", pod("x/a", "10.1.0.2", "fd00:1::2"), "y/c"]
    first, second = lab(pods), lab(list(reversed(pods)))
    assert first.address("x/a") == "10.1.0.2"
    taken = [ip for one in first.pods.values() for ip in one.ips]
    assert len(set(taken)) == len(taken) == 6
    assert [one.ips for one in first.pods.values()] == [one.ips for one in second.pods.values()]


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("wire", [wire for wire in Wire if wire is not Wire.HOST])
def test_everybody_reaches_everybody_without_an_agent(lab: MakeLab, wire: Wire, family: int) -> None:
    pods = ["x/a", "x/b", "y/a", pod("kube-system/proxy", host_network=True)]
    one = lab(pods, Topology(wire=wire, second_veth=frozenset({Key("x", "a")})))
    external = "203.0.113.9" if family == 4 else "2001:db8::9"
    seen = probe(one, ALL, family, [external])
    order = ("kube-system/proxy", "x/a", "x/b", "y/a", external)
    expected = Matrix(order, dict.fromkeys(ALL, ("." * 5,) * 5))
    assert not seen.diff(expected)


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("port", ["80/TCP", "80/UDP", "80/SCTP"])
def test_the_answer_names_the_pod(lab: MakeLab, family: int, port: str) -> None:
    one = lab(["x/a", "x/b"])
    assert connect(one, "x/a", "x/b", port, family).by == "x/b"
    assert connect(one, "node", "x/b", port, family).by == "x/b"
    assert connect(one, "outside", "x/b", port, family).by == "x/b"


@pytest.mark.parametrize("family", [4, 6])
def test_dnat_shows_who_answered(lab: MakeLab, family: int) -> None:
    one = lab(["x/a", pod("x/b", ports=["8080/TCP", "8080/UDP", "8080/SCTP"])])
    tool, service = ("iptables", "172.20.0.10") if family == 4 else ("ip6tables", "fd00:20::10")
    backend = one.address("x/b", family)
    for protocol in ("tcp", "udp", "sctp"):
        to = f"{backend}:8080" if family == 4 else f"[{backend}]:8080"
        rule = f"-t nat -A PREROUTING -d {service} -p {protocol} --dport 80 -j DNAT --to-destination {to}"
        one.run("node", tool, *rule.split())
    for port in ("80/TCP", "80/UDP", "80/SCTP"):
        answer = connect(one, "x/a", service, port, family)
        assert (answer.reached, answer.by) == (True, "x/b"), port


@pytest.mark.parametrize("port", ["81/TCP", "81/SCTP"])
def test_a_closed_port_refuses(lab: MakeLab, port: str) -> None:
    one = lab(["x/a", "x/b"])
    answer = connect(one, "x/a", "x/b", port)
    assert (answer.reached, answer.error) == (False, "ECONNREFUSED")


def test_probe_opens_unserved_ports_only_while_it_runs(lab: MakeLab) -> None:
    one = lab(["x/a", "x/b"])
    assert probe(one, ["81/TCP"]).cells["81/TCP"] == ("..", "..")
    until(lambda: not connect(one, "x/a", "x/b", "81/TCP").reached, what="port 81 closed again")


@pytest.mark.parametrize(
    ("tool", "family", "match", "port"),
    [
        ("iptables", 4, "-p tcp --dport 80", "80/TCP"),
        ("iptables", 4, "-p udp --dport 80", "80/UDP"),
        ("iptables", 4, "-p sctp --dport 80", "80/SCTP"),
        ("iptables", 4, "-p icmp", "ICMP"),
        ("ip6tables", 6, "-p tcp --dport 80", "80/TCP"),
        ("ip6tables", 6, "-p udp --dport 80", "80/UDP"),
        ("ip6tables", 6, "-p sctp --dport 80", "80/SCTP"),
        ("ip6tables", 6, "-p icmpv6", "ICMP"),
    ],
)
def test_a_dropped_flow_shows_in_its_cell(
    lab: MakeLab, tool: str, family: int, match: str, port: str
) -> None:
    one = lab(["x/a", "x/b", "x/c"])
    ends = ["-s", one.address("x/a", family), "-d", one.address("x/c", family)]
    one.run("node", tool, "-A", "FORWARD", *ends, *match.split(), "-j", "DROP")
    seen = probe(one, [port, "7/TCP"], family, timeout=0.5)
    expected = Matrix(("x/a", "x/b", "x/c"), {port: ("..X", "...", "..."), "7/TCP": ("...",) * 3})
    assert not seen.diff(expected)


def test_both_families_are_asked_at_once(lab: MakeLab) -> None:
    one = lab(["x/a", "x/b", pod("x/four", "10.1.0.99")])
    for tool, family in (("iptables", 4), ("ip6tables", 6)):
        source, to = ("x/a", "x/b") if family == 4 else ("x/b", "x/a")
        ends = f"-s {one.address(source, family)} -d {one.address(to, family)}"
        one.run("node", tool, *f"-A FORWARD {ends} -p udp --dport 80 -j DROP".split())
    seen = probe_families(one, ["80/UDP", "80/TCP"], externals=["203.0.113.9", "2001:db8::9"], timeout=0.5)
    assert seen[4].order == ("x/a", "x/b", "x/four", "203.0.113.9")
    assert seen[4].cells == {"80/UDP": (".X..", "....", "....", "...."), "80/TCP": ("....",) * 4}
    assert seen[6].order == ("x/a", "x/b", "2001:db8::9")
    assert seen[6].cells == {"80/UDP": ("...", "X..", "..."), "80/TCP": ("...",) * 3}


def test_a_refused_flow_counts_as_denied(lab: MakeLab) -> None:
    one = lab(["x/a", "x/b"])
    rule = f"-A FORWARD -d {one.address('x/b')} -p tcp -j REJECT --reject-with tcp-reset"
    one.run("node", "iptables", *rule.split())
    assert probe(one).cells["80/TCP"] == (".X", "..")


def test_branch_traffic_passes_the_node_twice(lab: MakeLab) -> None:
    one = lab(["x/a", "x/b"], Topology(wires={Key("x", "b"): Wire.BRANCH}))
    one.run("node", "iptables", "-A", "FORWARD", "-p", "udp", "--dport", "80", "-j", "ACCEPT")
    assert connect(one, "x/a", "x/b", "80/UDP").by == "x/b"
    table = f"table {100 + one.pod('x/b').index}"
    v4 = one.address("x/b")
    assert v4 not in one.run("node", "ip", "route").stdout
    assert v4 in one.run("node", "ip", "route", "show", *table.split()).stdout
    counted = one.run("node", "iptables", "-nvxL", "FORWARD").stdout
    packets = next(line.split()[0] for line in counted.splitlines() if "dpt:80" in line)
    assert packets == "2"


def test_a_bridge_pod_meets_iptables_only_with_br_netfilter(lab: MakeLab) -> None:
    topology = Topology(wire=Wire.BRIDGE, br_netfilter=False)
    one = lab(["x/a", "x/b"], topology)
    one.run("node", "iptables", "-A", "FORWARD", "-p", "tcp", "-j", "DROP")
    assert connect(one, "x/a", "x/b").reached
    one.sysctl("node", "bridge/bridge-nf-call-iptables", "1")
    assert not connect(one, "x/a", "x/b", timeout=0.3).reached


def test_a_pod_is_made_again_with_the_same_and_with_another_address(lab: MakeLab) -> None:
    one = lab(["x/a", "x/b"])
    before = one.pod("x/a")
    assert one.replace_pod("x/a").ips == before.ips
    assert connect(one, "x/b", "x/a").by == "x/a"
    one.replace_pod("x/a", ["10.1.9.9", "fd00:1::9:9"])
    assert connect(one, "x/b", "10.1.9.9").by == "x/a"
    old = format_address(before.ips[0])
    assert not connect(one, "x/b", old, timeout=0.3).reached
    assert old not in one.run("node", "ip", "rule").stdout
    added = one.add_pod(pod("x/new", old))
    assert added.ips == (parse_address(old),)
    assert connect(one, "x/b", old).by == "x/new"
    assert Lab.open(one.name).pods.keys() == {Key("x", "a"), Key("x", "b"), Key("x", "new")}


def test_a_stream_keeps_coming(lab: MakeLab) -> None:
    one = lab(["x/a", "x/b"])
    with one.make_socket("x/a", socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.settimeout(5)
        sock.connect((one.address("x/b"), 80))
        sock.sendall(b"stream\n")
        with sock.makefile() as lines:
            assert [lines.readline() for _ in range(5)] == [f"x/b {number}\n" for number in range(5)]


def test_http_is_answered(lab: MakeLab) -> None:
    one = lab(["x/a", "x/b"])
    code = f"import urllib.request as u; print(u.urlopen('http://{one.address('x/b')}/').read().decode())"
    assert one.run("x/a", "python3", "-c", code).stdout.strip() == "x/b"


@pytest.mark.parametrize("family", [4, 6])
def test_pods_may_have_addresses_of_the_outside_worlds_ranges(lab: MakeLab, family: int) -> None:
    one = lab([pod("x/a", "192.0.2.7", "2001:db8::77")])
    assert connect(one, "outside", "x/a", "80/TCP", family).by == "x/a"
    assert connect(one, "x/a", "outside", "80/TCP", family).by == "outside"


def test_labs_side_by_side_do_not_meet(lab: MakeLab) -> None:
    first, second = lab(["x/a", "x/b"]), lab(["x/a", "x/b"])
    rule = f"-A FORWARD -d {first.address('x/b')} -j DROP"
    first.run("node", "iptables", *rule.split())
    assert probe(first, timeout=0.5).cells["80/TCP"] == (".X", "..")
    assert probe(second).cells["80/TCP"] == ("..", "..")
    first.down()
    assert probe(second).cells["80/TCP"] == ("..", "..")


def test_down_leaves_nothing(lab: MakeLab) -> None:
    one = lab(["x/a", "y/b"])
    sleeper = one.popen("x/a", "sleep", "300")
    spaces = one.plan.namespaces
    identities = [netns.identity(space) for space in spaces]
    assert all(identities)
    one.down()
    sleeper.wait(5)
    assert not [space for space in spaces if netns.exists(space)]
    assert not one.home.exists()
    held = {
        (status.st_dev, status.st_ino)
        for path in Path("/proc").glob("[0-9]*/ns/net")
        if (status := _stat(path)) is not None
    }
    assert not held & set(identities)
    assert one.name not in world.names()


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None


def test_down_works_after_a_crash_at_any_point(lab: MakeLab) -> None:
    one = lab(["x/a", "x/b"])
    state = json.loads((one.home / "state.json").read_text())
    os.kill(state["server"][0], signal.SIGKILL)  # the server is gone
    netns.ip([f"netns del {one.pod('x/a').netns}"])  # and so is half of the rest
    world.down(one.name)
    assert not [space for space in one.plan.namespaces if netns.exists(space)]
    assert not one.home.exists()


def test_up_that_fails_leaves_nothing(lab_name: str) -> None:
    with pytest.raises(InputError, match="taken"):
        Lab.up(lab_name, [pod("x/a", "10.1.0.5"), pod("x/b", "10.1.0.5")])
    netns.ip([f"netns add {lab_name}-x-b"])
    try:
        with pytest.raises(InputError, match="exists already"):
            Lab.up(lab_name, [pod("x/a"), pod("x/b")])
        assert not netns.exists(f"{lab_name}-node")
        assert lab_name not in world.names()
    finally:
        netns.ip([f"netns del {lab_name}-x-b"])


def test_names_that_would_clash_are_told_apart(lab: MakeLab) -> None:
    one = lab(["a/b-c", "a-b/c"])
    assert one.pod("a/b-c").netns != one.pod("a-b/c").netns
    assert connect(one, "a/b-c", "a-b/c").by == "a-b/c"


POD = """
apiVersion: v1
kind: Pod
metadata: {name: %s, namespace: x}
spec: {containers: [{name: main, ports: [{containerPort: 80}]}]}
"""
PODS = "---".join(POD % name for name in "ab")


def test_command_line(lab_name: str, tmp_path: Path) -> None:
    (tmp_path / "pods.yaml").write_text(PODS)

    def podgate(*argv: str) -> subprocess.CompletedProcess[str]:
        line = [*PODGATE, "lab", *argv]
        env = {**os.environ, "PYTHONPATH": import_path()}
        return subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)

    name = ("--name", lab_name)
    try:
        assert podgate("up", "pods.yaml", *name).returncode == 0
        again = podgate("up", "pods.yaml", *name)
        assert again.returncode == 2
        assert again.stderr.count("\n") == 1
        assert "podgate lab down" in again.stderr
        seen = podgate("probe", *name, "--port", "80/TCP", "-o", "json")
        assert json.loads(seen.stdout) == {"order": ["x/a", "x/b"], "cells": {"80/TCP": ["..", ".."]}}
        assert podgate("exec", *name, "x/a", "--", "sh", "-c", "exit 7").returncode == 7
        assert podgate("exec", *name, "x/nobody", "--", "true").returncode == 2
    finally:
        assert podgate("down", *name).returncode == 0
    gone = podgate("probe", *name)
    assert (gone.returncode, gone.stdout) == (2, "")
    assert "no lab named" in gone.stderr


def test_without_root(rootless_python: str, lab_name: str) -> None:
    main = (rootless_python, "-c", "from dataplane.cli import main; main()", "lab")

    def podgate(command: str, *argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*UNPRIVILEGED, *main, command, "--name", lab_name, *argv],
            cwd=directory,
            env=rootless_environment(),
            capture_output=True,
            text=True,
            check=False,
        )

    # pytest's own directories are closed to other users.
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        Path(directory, "pods.yaml").write_text(PODS)
        up = podgate("up", "pods.yaml")
        if "does not let you make namespaces" in up.stderr:
            pytest.skip(up.stderr.strip())
        try:
            assert up.returncode == 0, up.stderr
            assert podgate("up", "pods.yaml").returncode == 2
            seen = podgate("probe", "--port", "80/TCP", "--port", "80/SCTP", "--family", "6", "-o", "json")
            assert json.loads(seen.stdout)["cells"] == {"80/TCP": ["..", ".."], "80/SCTP": ["..", ".."]}
            queue = "iptables -t mangle -A FORWARD -j NFQUEUE --queue-num 1 && id -u"
            done = podgate("exec", "node", "--", "sh", "-c", queue)
            assert done.stdout.strip() == "0", done.stderr
            assert not netns.exists(f"{lab_name}-node")  # it never was in our own namespace
        finally:
            down = podgate("down")
        assert down.returncode == 0, down.stderr
        assert podgate("down").returncode == 2
    assert not list(Path(tempfile.gettempdir(), "podgate-lab-65534").glob(f"{lab_name}*"))
