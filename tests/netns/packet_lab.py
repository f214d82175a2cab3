"""Three network namespaces, client – node – server, and the steering rules written by hand.

Small and independent of the steering module, so that the queues are tested by themselves.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence

import pytest

from dataplane.addresses import parse_address, parse_prefix
from dataplane.config import MarkLayout
from dataplane.model import Key, PortRange, Rule
from dataplane.policy.compile import Compiler, PodEntry
from dataplane.policy.effective import DirectionRules

MARKS = MarkLayout()
CLIENT4, SERVER4 = "10.77.0.2", "10.77.1.2"
CLIENT6, SERVER6 = "fd77::2", "fd77:1::2"
EGRESS_GROUP, INGRESS_GROUP = 0x10000000, 0x20000000
_LIBC = ctypes.CDLL(None, use_errno=True)
_COUNT = itertools.count()


def require() -> None:
    """Skip, with the reason, where these tests cannot run."""
    if os.geteuid() != 0:
        pytest.skip("needs root: run the tests with sudo")
    missing = [tool for tool in ("ip", "iptables", "ip6tables", "iptables-restore") if not shutil.which(tool)]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: install iproute2 and iptables")


def run(*command: str, stdin: str | None = None) -> str:
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssertionError(f"{' '.join(command)}: {done.stderr or done.stdout}")
    return done.stdout


def wait_for(condition: Callable[[], object], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {condition}")
        time.sleep(0.005)


@contextlib.contextmanager
def inside(namespace: str) -> Iterator[None]:
    """This thread in another network namespace; sockets opened here stay there."""
    with open("/proc/thread-self/ns/net", "rb") as home, open(f"/run/netns/{namespace}", "rb") as there:
        if _LIBC.setns(there.fileno(), 0x40000000):
            raise OSError(ctypes.get_errno(), "setns")
        try:
            yield
        finally:
            _LIBC.setns(home.fileno(), 0x40000000)


class PacketLab:
    """The namespaces, named uniquely; `node` forwards between `pa` (client) and `pb` (server)."""

    def __init__(self) -> None:
        tag = f"pgq{os.getpid()}-{next(_COUNT)}"
        self.client, self.node, self.server = f"{tag}c", f"{tag}n", f"{tag}s"

    def up(self) -> None:
        for name in (self.client, self.node, self.server):
            run("ip", "netns", "add", name)
            run("ip", "-n", name, "link", "set", "lo", "up")
        for port, peer, net4, net6, self4, self6 in (
            ("pa", self.client, "10.77.0", "fd77:", CLIENT4, CLIENT6),
            ("pb", self.server, "10.77.1", "fd77:1:", SERVER4, SERVER6),
        ):
            run(
                "ip",
                "-n",
                self.node,
                "link",
                "add",
                port,
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "netns",
                peer,
            )
            for name, device, host4, host6 in (
                (self.node, port, f"{net4}.1", f"{net6}:1"),
                (peer, "eth0", self4, self6),
            ):
                run("ip", "-n", name, "addr", "add", f"{host4}/24", "dev", device)
                run("ip", "-n", name, "addr", "add", f"{host6}/64", "dev", device, "nodad")
                run("ip", "-n", name, "link", "set", device, "up")
            run("ip", "-n", peer, "route", "add", "default", "via", f"{net4}.1")
            run("ip", "-n", peer, "route", "add", "default", "via", f"{net6}:1")
        with inside(self.node):
            for path in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
                with open(f"/proc/sys/net/{path}", "w") as knob:
                    knob.write("1")
        run("ip", "-n", self.node, "link", "set", "pa", "group", str(EGRESS_GROUP))
        run("ip", "-n", self.node, "link", "set", "pb", "group", str(INGRESS_GROUP))

    def down(self) -> None:
        for name in (self.client, self.node, self.server):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)

    def ifindex(self, device: str) -> int:
        with inside(self.node):
            return socket.if_nametoindex(device)

    def steer(
        self, target: str = "--queue-num 0", before: Sequence[str] = (), after: Sequence[str] = ()
    ) -> None:
        """The two-bit steering rules; `before` and `after` are more lines for the mangle table."""
        m = MARKS
        orig, reply = "-m conntrack --ctdir ORIGINAL", "-m conntrack --ctdir REPLY"
        src_e = f"-m devgroup --src-group {EGRESS_GROUP:#x}/{EGRESS_GROUP:#x}"
        dst_e = f"-m devgroup --dst-group {EGRESS_GROUP:#x}/{EGRESS_GROUP:#x}"
        src_i = f"-m devgroup --src-group {INGRESS_GROUP:#x}/{INGRESS_GROUP:#x}"
        dst_i = f"-m devgroup --dst-group {INGRESS_GROUP:#x}/{INGRESS_GROUP:#x}"
        no_e = f"-m connmark ! --mark {m.egress:#x}/{m.egress:#x}"
        no_i = f"-m connmark ! --mark {m.ingress:#x}/{m.ingress:#x}"
        mark_e, mark_i = (f"-m mark --mark {bit:#x}/{bit:#x}" for bit in (m.egress, m.ingress))
        rules = [
            "*mangle",
            ":Q - [0:0]",
            *before,
            f"-A FORWARD {orig} {src_e} {no_e} -j Q",
            f"-A FORWARD {orig} {dst_i} {no_i} -j Q",
            f"-A FORWARD {reply} {src_i} {no_i} -j Q",
            f"-A FORWARD {reply} {dst_e} {no_e} -j Q",
            f"-A Q {reply} -j MARK --set-xmark {m.reply:#x}/{m.reply:#x}",
            f"-A Q -j NFQUEUE {target}",
            f"-A POSTROUTING {mark_e} -j CONNMARK --or-mark {m.egress:#x}",
            f"-A POSTROUTING {mark_i} -j CONNMARK --or-mark {m.ingress:#x}",
            f"-A POSTROUTING -j MARK --set-xmark 0x0/{m.mask:#x}",
            *after,
            "COMMIT",
            "",
        ]
        for tool in ("iptables-restore", "ip6tables-restore"):
            run("ip", "netns", "exec", self.node, tool, stdin="\n".join(rules))

    def rule_packets(self, chain: str, text: str) -> int:
        """Packets that matched the v4 mangle rule whose listing contains `text`."""
        with inside(self.node):
            listing = run("iptables", "-t", "mangle", "-nvxL", chain)
        return sum(int(line.split()[0]) for line in listing.splitlines() if text in line)

    def table(
        self, *ports: PortRange, compiler: Compiler | None = None, generation: int = 1, deny_all: bool = False
    ) -> object:
        """The client may reach, and the server may be reached, on `ports` (none: on everything)."""
        rules = (
            []
            if deny_all
            else [
                (Key("t", "allow"), Rule(parse_prefix(cidr)[0], (), tuple(ports), index))
                for index, cidr in enumerate(("10.77.0.0/16", "fd77::/16"))
            ]
        )
        direction = DirectionRules(tuple(rules))
        return (compiler or Compiler()).table(
            generation,
            [
                PodEntry(
                    Key("t", "client"),
                    (parse_address(CLIENT4), parse_address(CLIENT6)),
                    (self.ifindex("pa"),),
                    egress=direction,
                ),
                PodEntry(
                    Key("t", "server"),
                    (parse_address(SERVER4), parse_address(SERVER6)),
                    (self.ifindex("pb"),),
                    ingress=direction,
                ),
            ],
            [],
        )

    def udp(self, where: str, six: bool = False) -> socket.socket:
        with inside(where):
            link = socket.socket(socket.AF_INET6 if six else socket.AF_INET, socket.SOCK_DGRAM)
        link.settimeout(3)
        return link

    def receiver(self, port: int, six: bool = False) -> socket.socket:
        link = self.udp(self.server, six)
        link.bind((SERVER6 if six else SERVER4, port))
        return link


@contextlib.contextmanager
def packet_lab() -> Iterator[PacketLab]:
    require()
    made = PacketLab()
    try:
        made.up()
        yield made
    finally:
        made.down()
