"""Signs that another engine enforces policies on this node.

Two engines judge each packet one after the other, by their own copies of the rules: what either denies
is denied, and `podgate explain` knows of one only. Looks are cheap and read only; none is proof that
its owner still runs, since rules and programs outlive the agents that made them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from dataplane.node.rtnetlink import LinkMessage, RouteSocket

_CHAINS = {
    "cali-": "Calico",
    "CILIUM_": "Cilium",
    "KUBE-NWPLCY-": "kube-router",
    "KUBE-POD-FW-": "kube-router",
    "WEAVE-NPC": "Weave Net",
    "ANTREA-": "Antrea",
}
_LINKS = {"cilium_host": "Cilium", "bpfin.cali": "Calico", "antrea-gw0": "Antrea"}
# Where the VPC CNI's agent pins its maps and programs; a container sees it when it is mounted.
PINS = Path("/sys/fs/bpf/globals/aws")
LOOKED_AT = 4  # pods' interfaces: an engine has programs on all that policies select


def signs(chains: Iterable[str], pins: Path = PINS) -> list[str]:
    """One line for each engine found. `chains`: names of the iptables chains of this network namespace."""
    found: dict[str, str] = {}
    for chain in chains:
        for prefix, engine in _CHAINS.items():
            if chain.startswith(prefix):
                found.setdefault(engine, f"iptables chain {chain}")
    with RouteSocket() as route:
        links = route.links()
        for link in links:
            if link.name in _LINKS:
                found.setdefault(_LINKS[link.name], f"interface {link.name}")
        programs = _programs(route, links)
    if (pinned := _first(pins)) is not None:
        found["the Amazon VPC CNI's network policy agent"] = f"eBPF objects in {pinned}"
    elif programs and not found:
        found["an eBPF engine (on EKS, the VPC CNI's network policy agent)"] = programs
    return [f"{engine} is or was at work here ({evidence})" for engine, evidence in found.items()]


def _programs(route: RouteSocket, links: Iterable[LinkMessage]) -> str:
    veths = [link for link in links if link.kind == "veth" and link.up]
    for link in veths[-LOOKED_AT:]:
        if names := route.classifiers(link.ifindex):
            return f"program {', '.join(names)} on interface {link.name}"
    return ""


def _first(directory: Path) -> Path | None:
    """The directory with its first directory that holds something, None when there is none."""
    try:
        for entry in sorted(os.scandir(directory), key=lambda one: one.name):
            if entry.is_dir() and any(os.scandir(entry.path)):
                return Path(entry.path)
    except OSError:
        return None
    return None
