"""`podgate doctor` and `podgate cleanup`, run as a person runs them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest
from packet_lab import inside, require, run
from steering_net import Listener, Net, net, steering

from dataplane.config import IptablesVariant, MarkLayout

pytestmark = pytest.mark.netns
PODGATE = (sys.executable, "-c", "from dataplane.cli import main; main()")


@pytest.fixture
def space() -> Iterator[str]:
    require()
    name = f"pgd{os.getpid()}"
    run("ip", "netns", "add", name)
    yield name
    run("ip", "netns", "del", name)


@pytest.fixture
def lab() -> Iterator[Net]:
    with net() as made:
        yield made


def podgate(*words: str, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*prefix, *PODGATE, *words], capture_output=True, text=True, check=False)


def everything() -> str:
    parts = [run("ip", "-o", "link"), run("ipset", "save")]
    parts += [
        run(f"{tool}-{variant}-save") for tool in ("iptables", "ip6tables") for variant in ("nft", "legacy")
    ]
    return "\n".join(line for part in parts for line in part.splitlines() if not line.startswith("#"))


def test_doctor_tries_everything_and_leaves_no_trace(space: str) -> None:
    with inside(space):
        before = everything()
        done = podgate("doctor", "-o", "json")
        assert everything() == before
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    states = {check["name"]: check["state"] for check in answer["checks"]}
    assert answer["ok"] is True
    for name in ("privileges", "iptables", "ipset", "IP sets", "device groups", "queue", "conntrack"):
        assert states[name] == "ok", answer
    assert "ok" in {states["rules, iptables-nft"], states["rules, iptables-legacy"]}


def test_doctor_says_what_is_missing_and_what_to_do(space: str) -> None:
    if not shutil.which("setpriv"):
        pytest.skip("needs setpriv: install util-linux")
    with inside(space):
        done = podgate("doctor", prefix=("setpriv", "--bounding-set", "-net_admin", "--inh-caps", "-all"))
    assert done.returncode == 1
    assert "missing" in done.stdout
    assert "NET_ADMIN" in done.stdout
    assert "podgate cannot run here yet." in done.stdout
    assert done.stderr == ""


def test_doctor_in_the_agents_own_container(space: str) -> None:
    """Which has CAP_NET_ADMIN, but may not make a namespace."""
    if not shutil.which("setpriv"):
        pytest.skip("needs setpriv: install util-linux")
    with inside(space):
        done = podgate(
            "doctor", "-o", "json", prefix=("setpriv", "--bounding-set", "-sys_admin", "--inh-caps", "-all")
        )
    assert done.returncode == 0, done.stdout
    (tried,) = [one for one in json.loads(done.stdout)["checks"] if one["name"] == "network namespace"]
    assert tried["state"] == "lacks"
    assert "run this on the node as root" in tried["remedy"]


def test_cleanup_removes_everything_after_a_crash(lab: Net) -> None:
    host = lab.add_pod("a")
    marks = MarkLayout.from_mask(0x00070000)
    with inside(lab.node):
        run("iptables", "-A", "FORWARD", "-m", "conntrack", "--ctstate", "INVALID")
        steer = steering(IptablesVariant.NFT, marks=marks)
        steer.install()
        steer.apply([lab.steered("a", egress=True, ingress=True)])
        client, server = lab.udp("a"), lab.udp("outside", port=7777)
        listener = Listener(0)
        client.sendto(b"x", (lab.address("outside"), 7777))
        listener.collect(1)
        listener.accept(marks.egress)
        assert server.recv(10) == b"x"
        listener.close()
        assert f"mark={marks.egress}" in run("conntrack", "-L", "-p", "udp", "--dport", "7777")

        done = podgate("cleanup")
        assert done.returncode == 0, done.stderr
        assert f"removed device group bits 0x70000000 of {host}\n" in done.stdout
        assert "removed the marks 0x30000 of 1 connections\n" in done.stdout
        assert "PODGATE" not in everything()
        assert "podgate" not in everything()
        assert "mark=0" in run("conntrack", "-L", "-p", "udp", "--dport", "7777")

        again = podgate("cleanup", "-o", "json")
        assert json.loads(again.stdout) == {"removed": []}
        assert podgate("cleanup").stdout == "nothing of podgate is here\n"


def test_cleanup_refuses_a_mask_it_cannot_use() -> None:
    done = podgate("cleanup", "--mark-mask", "many")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "0x70000000" in done.stderr
