"""The paths that whole_path.py compares: three namespaces each, and who answers the queue.

client – node – server, two veth pairs; the node forwards.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dataplane.config import MarkLayout

MARKS = MarkLayout()
SERVER = "10.78.1.2"
HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Way:
    """One way through the node. `answer`: none, floor, netfilterqueue or native."""

    name: str
    text: str
    rules: str  # plain, accept or steered
    answer: str = "none"
    offload: bool = False


PATHS = (
    Way("plain", "plain forwarding, conntrack active", "plain"),
    Way("accept", "iptables conntrack accept", "accept"),
    Way("floor", "C floor, every packet queued", "steered", "floor"),
    Way("floor-offload", "C floor, offload", "steered", "floor", offload=True),
    Way("nfq", "NetfilterQueue, every packet queued", "steered", "netfilterqueue"),
    Way("nfq-offload", "NetfilterQueue, offload", "steered", "netfilterqueue", offload=True),
    Way("podgate", "podgate, every packet queued", "steered", "native"),
    Way("podgate-offload", "podgate, offload", "steered", "native", offload=True),
)


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(HERE.parent)}


def run(*command: str, stdin: str | None = None) -> str:
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def rules_text(kind: str) -> str:
    """The mangle table of a node without podgate."""
    if kind == "plain":
        # Conntrack works in a namespace only while some rule there needs it.
        lines = ["-A INPUT -m conntrack --ctstate INVALID -j DROP"]
    else:
        lines = [
            "-A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
            "-A FORWARD -m conntrack --ctstate INVALID -j DROP",
            "-A FORWARD -m conntrack --ctstate NEW -j ACCEPT",
        ]
    return "\n".join(["*mangle", *lines, "COMMIT", ""])


@dataclass
class Running:
    """A path that is up: its namespaces and the process that answers its queue."""

    path: Way
    client: str
    node: str
    server: str
    process: subprocess.Popen[str] | None

    @property
    def cpu(self) -> float:
        """CPU seconds of the answering process so far, to the nanosecond."""
        return process_cpu(self.process.pid) if self.process else 0.0


def process_cpu(pid: int) -> float:
    """CPU seconds of a process or kernel thread: the clock id of its CPU clock is ~pid << 3 | 2."""
    return time.clock_gettime(~pid << 3 | 2)


@contextlib.contextmanager
def up(path: Way, floor: Path, n_rules: int, cpus: set[int]) -> Iterator[Running]:
    """Build the path; everything of it is gone afterwards."""
    tag = f"pgb{os.getpid()}-{path.name}"
    names = [f"{tag}-{end}" for end in ("c", "n", "s")]
    client, node, server = names
    process = None
    try:
        for name in names:
            run("ip", "netns", "add", name)
            run("ip", "-n", name, "link", "set", "lo", "up")
        for port, peer, net in (("pa", client, "10.78.0"), ("pb", server, "10.78.1")):
            run("ip", "-n", node, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", peer)
            for name, device, address in ((node, port, f"{net}.1/24"), (peer, "eth0", f"{net}.2/24")):
                run("ip", "-n", name, "addr", "add", address, "dev", device)
                run("ip", "-n", name, "link", "set", device, "up")
            run("ip", "-n", peer, "route", "add", "default", "via", f"{net}.1")
        # Connections in quick succession use up the default range of ports.
        run("ip", "netns", "exec", client, "sysctl", "-qw", "net.ipv4.ip_local_port_range=1024 65000")
        run("ip", "netns", "exec", node, "sysctl", "-qw", "net.ipv4.ip_forward=1")
        if path.rules == "steered":
            run("ip", "netns", "exec", node, sys.executable, str(HERE / "steer.py"), str(int(path.offload)))
        else:
            run("ip", "netns", "exec", node, "iptables-restore", stdin=rules_text(path.rules))
        if path.answer != "none":
            process = start(path, node, floor, n_rules, cpus)
        yield Running(path, client, node, server, process)
    finally:
        if process:
            process.kill()
            process.wait()
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def start(path: Way, node: str, floor: Path, n_rules: int, cpus: set[int]) -> subprocess.Popen[str]:
    saved = MARKS.saved if path.offload else 0
    if path.answer == "floor":
        command = [str(floor), "0", "4096", hex(saved), hex(MARKS.mask)]
    else:
        command = [sys.executable, str(HERE / "answer.py"), path.answer, str(n_rules), str(int(path.offload))]
    process = subprocess.Popen(
        ["ip", "netns", "exec", node, *command],
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    os.sched_setaffinity(process.pid, cpus)
    assert process.stdout is not None
    if process.stdout.readline().strip() != "ready":
        raise SystemExit(f"{path.name}: {' '.join(command)} did not start")
    return process
