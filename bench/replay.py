"""Packets per second of `podgate replay --summary`, on a generated capture.

replay.py [--packets 2000000] [--flows 20000] [--json FILE]. The capture: Ethernet, connections of 1,000 pods
to a service of 20, three in four allowed, opened, answered and closed, with small and full-size packets.
`engine` reads, judges and gathers by flow; `summary` makes it what people read; `command` is the whole
command in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from dataplane._pcap import Capture
from dataplane.replay import Policies, read_through, summarise
from dataplane.sources.directory import read_paths

SIZES = (60, 1500, 52, 1500, 52, 300)  # of a connection's packets between its SYN and its FIN


def objects() -> str:
    """A namespace of clients, three in four of which may talk to the pods of another."""
    documents = [
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": f"pod-{number}",
                "namespace": "clients" if number >= 20 else "service",
                "labels": {"app": "api" if number < 20 else "web" if number % 4 else "batch"},
            },
            "status": {"phase": "Running", "hostIP": "192.0.2.1", "podIPs": [{"ip": address(number)}]},
        }
        for number in range(1020)
    ]
    peers = [{"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": "web"}}}]
    documents.append(
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": {"name": "api", "namespace": "service"},
            "spec": {"podSelector": {}, "ingress": [{"from": peers, "ports": [{"port": 8080}]}]},
        }
    )
    return yaml.dump_all(documents, Dumper=yaml.CSafeDumper)


def address(number: int) -> str:
    """A pod's."""
    return f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}"


def write_capture(path: Path, packets: int, flows: int) -> None:
    """Flows beside each other: the n-th packets of all, then the next."""
    source = [bytes(map(int, address(20 + number % 1000).split("."))) for number in range(flows)]
    target = [bytes(map(int, address(number % 20).split("."))) for number in range(flows)]
    mac = bytes(12) + b"\x08\x00"
    written, turn = 0, 0
    with path.open("wb", buffering=1 << 20) as file:
        file.write(struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 262144, 1))
        while written < packets:
            first, answer = turn == 0, turn % 2 == 1
            size = 60 if first else SIZES[turn % len(SIZES)]
            flags = 2 if first else 18 if turn == 1 else 24
            for number in range(min(flows, packets - written)):
                ends = (target[number], source[number]) if answer else (source[number], target[number])
                client = 1024 + number // 1000 % 60000
                ports = (8080, client) if answer else (client, 8080)
                head = struct.pack("!BBHHHBBH", 0x45, 0, size, turn, 0x4000, 64, 6, 0)
                tcp = struct.pack("!HHIIBBHHH", *ports, turn, 0, 0x50, flags, 65535, 0, 0)
                now = written + number
                file.write(struct.pack("<IIII", 1_700_000_000 + now // 500_000, now % 500_000, 54, size + 14))
                file.write(mac + head + ends[0] + ends[1] + tcp)
            written += min(flows, packets - written)
            turn += 1


def cpu_seconds() -> float:
    """Of this process and of those it has waited for."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--packets", type=int, default=2_000_000)
    parser.add_argument("--flows", type=int, default=20_000)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        dump, capture = Path(directory, "dump.yaml"), Path(directory, "capture.pcap")
        dump.write_text(objects())
        write_capture(capture, asked.packets, asked.flows)
        policies = Policies(read_paths([dump]).snapshot)
        began, cpu = time.perf_counter(), cpu_seconds()
        replay = policies.replay()
        with capture.open("rb") as file:
            opened = Capture(file)
        read_through(replay, opened)
        engine = time.perf_counter() - began, cpu_seconds() - cpu
        found = summarise(replay.talks(), policies)
        summary = time.perf_counter() - began, cpu_seconds() - cpu
        assert opened.packets == asked.packets, opened.error
        assert sum(count.flows for _, count in found.talks) == asked.flows
        began, cpu = time.perf_counter(), cpu_seconds()
        argv = [sys.executable, "-c", "from dataplane.cli import main; main()"]
        subprocess.run(
            [*argv, "replay", str(capture), str(dump), "--summary", "-o", "text"],
            check=True,
            capture_output=True,
        )
        command = time.perf_counter() - began, cpu_seconds() - cpu
    rates = {
        name: [round(asked.packets / each) for each in seconds]
        for name, seconds in (("engine", engine), ("summary", summary), ("command", command))
    }
    print(f"{asked.packets:,} packets of {asked.flows:,} flows; packets per second, and per second of CPU:")
    for name, (wall, busy) in rates.items():
        print(f"  {name:8} {wall:>12,} {busy:>12,}")
    if asked.json:
        asked.json.write_text(json.dumps({"packets": asked.packets, "flows": asked.flows, "rates": rates}))


if __name__ == "__main__":
    main()
