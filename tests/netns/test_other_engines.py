"""Signs of other engines, as they leave them in a node's kernel."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import PODGATE, AgentFactory, LabFactory, import_path
from packet_lab import inside, require, run

from dataplane.config import IptablesVariant
from dataplane.node import iptables
from dataplane.node.other_engines import signs
from dataplane.node.rtnetlink import (
    NLM_F_CREATE,
    TCA_BPF_NAME,
    TCA_KIND,
    TCA_OPTIONS,
    RouteSocket,
    attribute,
)

pytestmark = pytest.mark.netns
BPF = 321 if platform.machine() == "x86_64" else 280  # the system call's number
BPF_PROG_LOAD, BPF_PROG_TYPE_SCHED_CLS = 5, 3
RTM_NEWTFILTER = 44
TCA_BPF_FD = 6


def attach(device: str, parent: int, name: str) -> None:
    """An eBPF program that lets everything through, as a traffic filter."""
    code = ctypes.create_string_buffer(
        struct.pack("=BBhiBBhi", 0xB7, 0, 0, -1, 0x95, 0, 0, 0)
    )  # r0 = -1; exit
    licence = ctypes.create_string_buffer(b"GPL")
    asked = struct.pack(
        "=IIQQIIQ", BPF_PROG_TYPE_SCHED_CLS, 2, ctypes.addressof(code), ctypes.addressof(licence), 0, 0, 0
    )
    program = ctypes.CDLL(None, use_errno=True).syscall(BPF, BPF_PROG_LOAD, asked, len(asked))
    if program < 0:
        pytest.skip(f"this kernel loads no eBPF programs here: {os.strerror(ctypes.get_errno())}")
    try:
        options = attribute(TCA_BPF_FD, struct.pack("=I", program)) + attribute(
            TCA_BPF_NAME, name.encode() + b"\0"
        )
        body = struct.pack("=BxxxiIII", 0, socket.if_nametoindex(device), 0, parent, socket.htons(3))
        body += attribute(TCA_KIND, b"bpf\0") + attribute(TCA_OPTIONS, options)
        with RouteSocket() as route:
            route.request(RTM_NEWTFILTER, body, NLM_F_CREATE)
    finally:
        os.close(program)


@pytest.fixture
def space() -> Iterator[str]:
    require()
    name = f"pgo{os.getpid()}"
    run("ip", "netns", "add", name)
    run("ip", "-n", name, "link", "add", "eni0", "type", "veth", "peer", "name", "pod0")
    run("ip", "-n", name, "link", "set", "eni0", "up")
    yield name
    run("ip", "netns", "del", name)


def seen(space: str, pins: Path = Path("/nowhere")) -> list[str]:
    with inside(space):
        names = []
        for variant in (IptablesVariant.NFT, IptablesVariant.LEGACY):
            tool = iptables.find_tool(variant, 4)
            names += iptables.chain_names(tool) if tool is not None else []
        return signs(names, pins)


def test_nobody(space: str) -> None:
    with inside(space):
        run("iptables-nft", "-N", "KUBE-FORWARD")
    assert seen(space) == []


@pytest.mark.parametrize("variant", ["nft", "legacy"])
@pytest.mark.parametrize(
    ("chain", "engine"),
    [
        ("cali-FORWARD", "Calico"),
        ("CILIUM_FORWARD", "Cilium"),
        ("KUBE-POD-FW-7XWQ", "kube-router"),
        ("WEAVE-NPC", "Weave Net"),
    ],
)
def test_chains(space: str, variant: str, chain: str, engine: str) -> None:
    with inside(space):
        if subprocess.run([f"iptables-{variant}", "-N", chain], capture_output=True, check=False).returncode:
            pytest.skip(f"this kernel or machine has no iptables-{variant}")
    assert seen(space) == [f"{engine} is or was at work here (iptables chain {chain})"]


def test_an_interface(space: str) -> None:
    run("ip", "-n", space, "link", "add", "cilium_host", "type", "veth", "peer", "name", "cilium_net")
    assert seen(space) == ["Cilium is or was at work here (interface cilium_host)"]


@pytest.mark.parametrize("direction", ["ingress", "egress"])
def test_an_ebpf_program(space: str, direction: str) -> None:
    with inside(space):
        run("tc", "qdisc", "add", "dev", "eni0", "clsact")
        # Not an engine's: a filter that a person wrote, which has neither name nor program.
        run("tc", "filter", "add", "dev", "eni0", direction, "bpf", "da", "bytecode", "1,6 0 0 4294967295,")
    assert seen(space) == []
    with inside(space):
        attach("eni0", 0xFFFFFFF2 if direction == "ingress" else 0xFFFFFFF3, "handle_it")
    assert seen(space) == [
        "an eBPF engine (on EKS, the VPC CNI's network policy agent) is or was at work here"
        " (program handle_it on interface eni0)"
    ]


def test_pinned_objects(space: str, tmp_path: Path) -> None:
    (tmp_path / "maps").mkdir()
    (tmp_path / "programs").mkdir()
    assert seen(space, tmp_path) == []
    (tmp_path / "programs" / "web-7d4-default_handle_ingress").touch()
    assert seen(space, tmp_path) == [
        "the Amazon VPC CNI's network policy agent is or was at work here"
        f" (eBPF objects in {tmp_path / 'programs'})"
    ]


def test_agent_and_doctor_say_so(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/a"])
    one.run("node", "iptables", "-N", "cali-FORWARD")
    daemon = agent(one)
    assert daemon.status()["ready"], "it is told, and left to the operator"
    (note,) = [line for line in daemon.text().splitlines() if "Calico" in line]
    assert "cali-FORWARD" in note
    assert "take it off this node" in note
    doctor = one.run("node", "env", f"PYTHONPATH={import_path()}", *PODGATE, "doctor", "-o", "json")
    answer = json.loads(doctor.stdout)
    (check,) = [check for check in answer["checks"] if check["name"] == "other engines"]
    assert check["state"] == "lacks"
    assert "Calico" in check["found"]
    assert answer["ok"] is True
