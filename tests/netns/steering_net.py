"""A node with pods as the VPC CNI wires them, a host outside, and packets sent by hand.

Everything is in namespaces of its own, named uniquely; addresses of both families.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace

import netfilterqueue
from packet_lab import inside, require, run

from dataplane.addresses import parse_address
from dataplane.config import AgentConfig, IptablesVariant
from dataplane.model import Key
from dataplane.node.interfaces import Kind, Placement, host_veth_name
from dataplane.node.steering import SteeredPod, Steering

_COUNT = itertools.count()
NODE = {4: "10.99.200.1", 6: "fd99:200::1"}
OUTSIDE = {4: "10.99.200.2", 6: "fd99:200::2"}
PORT = 7777


class Listener:
    """A queue's listener that answers when told to, in the namespace it is opened in."""

    def __init__(self, number: int) -> None:
        self.held: list[netfilterqueue.Packet] = []
        self.seen = 0
        self._queue = netfilterqueue.NetfilterQueue()
        self._queue.bind(number, self._hold)

    def _hold(self, packet: netfilterqueue.Packet) -> None:
        data = packet.get_payload()
        if data[0] >> 4 == 6 and data[6] != 17:
            packet.accept()  # neighbour discovery and MLD on a bridge, as the engine does
            return
        packet.retain()
        self.seen += 1
        self.held.append(packet)

    def collect(self, count: int, seconds: float = 3.0) -> None:
        """Wait until `count` packets are held."""
        deadline = time.monotonic() + seconds
        while len(self.held) < count:
            ready, _, _ = select.select([self._queue.get_fd()], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise AssertionError(f"{len(self.held)} packets queued, not {count}")
            self._queue.run(block=False)

    def pending(self) -> int:
        """How many packets wait right now."""
        while select.select([self._queue.get_fd()], [], [], 0)[0]:
            self._queue.run(block=False)
        return len(self.held)

    def accept(self, bits: int = 0) -> list[int]:
        """Accept everything held with these mark bits added; the marks the packets came with."""
        marks = []
        for packet in self.held:
            marks.append(packet.get_mark() or 0)
            packet.set_mark((packet.get_mark() or 0) & ~0x70000000 | bits)
            packet.accept()
        self.held.clear()
        return marks

    def close(self) -> None:
        self._queue.unbind()


class Net:
    """The namespaces. `pods` maps a name to the index of its addresses (10.99.0.<n>, fd99::<n>)."""

    def __init__(self) -> None:
        self.tag = f"pgs{os.getpid()}-{next(_COUNT)}"
        self.node, self.outside = f"{self.tag}n", f"{self.tag}x"
        self.pods: dict[str, int] = {}
        self._sockets: list[socket.socket] = []
        self._made: list[str] = []

    def up(self) -> None:
        for name in (self.node, self.outside):
            self._namespace(name)
        run(
            "ip",
            "-n",
            self.node,
            "link",
            "add",
            "up0",
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            self.outside,
        )
        for where, device, addresses in ((self.node, "up0", NODE), (self.outside, "eth0", OUTSIDE)):
            run("ip", "-n", where, "addr", "add", f"{addresses[4]}/24", "dev", device)
            run("ip", "-n", where, "addr", "add", f"{addresses[6]}/64", "dev", device, "nodad")
            run("ip", "-n", where, "link", "set", device, "up")
        for family, via in NODE.items():
            run("ip", "-n", self.outside, f"-{family}", "route", "add", "default", "via", via)
        with inside(self.node):
            for path in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
                with open(f"/proc/sys/net/{path}", "w") as knob:
                    knob.write("1")

    def down(self) -> None:
        for link in self._sockets:
            link.close()
        for name in self._made:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)

    def _namespace(self, name: str) -> None:
        run("ip", "netns", "add", name)
        self._made.append(name)
        with inside(name):  # no second of silence before the first IPv6 packet
            for which in ("all", "default"):
                with open(f"/proc/sys/net/ipv6/conf/{which}/accept_dad", "w") as knob:
                    knob.write("0")
        run("ip", "-n", name, "link", "set", "lo", "up")

    def space(self, who: str) -> str:
        return {"node": self.node, "outside": self.outside}.get(who) or f"{self.tag}{who}"

    def address(self, who: str, family: int = 4) -> str:
        if who in {"node", "outside"}:
            return {"node": NODE, "outside": OUTSIDE}[who][family]
        return f"10.99.0.{self.pods[who]}" if family == 4 else f"fd99::{self.pods[who]:x}"

    def add_pod(self, name: str, host: str | None = None) -> str:
        """A pod with its veth and its host routes; the veth's name."""
        self.pods[name] = len(self.pods) + 2
        host = host or host_veth_name(Key("t", name), "eni")
        space = self.space(name)
        self._namespace(space)
        run(
            "ip", "-n", self.node, "link", "add", host, "type", "veth", "peer", "name", "eth0", "netns", space
        )
        run("ip", "-n", self.node, "link", "set", host, "address", "02:00:00:00:00:01", "up")
        run("ip", "-n", space, "addr", "add", f"{self.address(name, 4)}/32", "dev", "eth0")
        run("ip", "-n", space, "addr", "add", f"{self.address(name, 6)}/128", "dev", "eth0", "nodad")
        run("ip", "-n", space, "link", "set", "eth0", "up")
        for family, gateway in ((4, "169.254.1.1"), (6, "fe80::1")):
            run(
                "ip",
                "-n",
                space,
                f"-{family}",
                "neigh",
                "add",
                gateway,
                "lladdr",
                "02:00:00:00:00:01",
                "dev",
                "eth0",
            )
            if family == 4:
                run("ip", "-n", space, "route", "add", gateway, "dev", "eth0", "scope", "link")
            run("ip", "-n", space, f"-{family}", "route", "add", "default", "via", gateway, "dev", "eth0")
            run("ip", "-n", self.node, f"-{family}", "route", "add", self.address(name, family), "dev", host)
        return host

    def add_bridged_pod(self, name: str, bridge: str) -> str:
        """A pod on a bridge of the node, which is made with the first one."""
        self.pods[name] = len(self.pods) + 2
        space, host = self.space(name), f"vb{name}"
        self._namespace(space)
        with inside(self.node):
            if bridge not in {link for _, link in socket.if_nameindex()}:
                run("ip", "link", "add", bridge, "type", "bridge")
                run("ip", "addr", "add", "10.99.0.1/24", "dev", bridge)
                run("ip", "addr", "add", "fd99::1/64", "dev", bridge, "nodad")
                run("ip", "link", "set", bridge, "up")
            run("ip", "link", "add", host, "type", "veth", "peer", "name", "eth0", "netns", space)
            run("ip", "link", "set", host, "master", bridge, "up")
        run("ip", "-n", space, "addr", "add", f"{self.address(name, 4)}/24", "dev", "eth0")
        run("ip", "-n", space, "addr", "add", f"{self.address(name, 6)}/64", "dev", "eth0", "nodad")
        run("ip", "-n", space, "link", "set", "eth0", "up")
        run("ip", "-n", space, "route", "add", "default", "via", "10.99.0.1")
        run("ip", "-n", space, "-6", "route", "add", "default", "via", "fd99::1")
        return host

    def steered(
        self,
        name: str,
        *,
        egress: bool = False,
        ingress: bool = False,
        spoof_check: bool = True,
        bridge: str | None = None,
    ) -> SteeredPod:
        host = f"vb{name}" if bridge else self.veth(name)
        with inside(self.node):
            index = socket.if_nametoindex(host)
            bridge_index = socket.if_nametoindex(bridge) if bridge else 0
        return SteeredPod(
            Key("t", name),
            Placement(index, host, Kind.BRIDGED if bridge else Kind.ROUTED, bridge, bridge_index),
            tuple(parse_address(self.address(name, family)) for family in (4, 6)),
            egress,
            ingress,
            spoof_check,
        )

    def veth(self, name: str) -> str:
        return host_veth_name(Key("t", name), "eni")

    def udp(self, who: str, family: int = 4, port: int = 0, address: str = "") -> socket.socket:
        with inside(self.space(who)):
            link = socket.socket(socket.AF_INET if family == 4 else socket.AF_INET6, socket.SOCK_DGRAM)
        self._sockets.append(link)
        if port:
            link.bind((address, port))
        link.settimeout(3)
        return link

    def raw(self, who: str, family: int = 4) -> socket.socket:
        """A socket that sends whole IP packets, source address included."""
        with inside(self.space(who)):
            link = socket.socket(
                socket.AF_INET if family == 4 else socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_RAW
            )
        self._sockets.append(link)
        return link

    def queued(self, variant: IptablesVariant, family: int = 4) -> int:
        """How many packets the rules sent to the queue so far."""
        tool = "iptables" if family == 4 else "ip6tables"
        with inside(self.node):
            listing = run(f"{tool}-{variant}", "-t", "mangle", "-nvxL", "PODGATE-QUEUE")
        return sum(int(line.split()[0]) for line in listing.splitlines() if "NFQUEUE" in line)


def udp_packet(family: int, source: str, destination: str, port: int, payload: bytes = b"forged") -> bytes:
    """A whole packet for `Net.raw`; the kernel fills in IPv4's checksum, UDP's is left out (0) on IPv4."""
    payload += bytes(len(payload) % 2)  # whole 16-bit words for the checksum
    length = 8 + len(payload)
    if family == 4:
        header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + length, 0, 0, 64, 17, 0)
        head = header + parse_address(source) + parse_address(destination)
        return head + struct.pack("!HHHH", 4000, port, length, 0) + payload
    addresses = parse_address(source) + parse_address(destination)
    pseudo = addresses + struct.pack("!IHBB", length, 0, 0, 17)
    datagram = struct.pack("!HHHH", 4000, port, length, 0) + payload
    total = sum(struct.unpack(f"!{len(pseudo + datagram) // 2}H", pseudo + datagram))
    total = (total & 0xFFFF) + (total >> 16)
    checksum = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
    datagram = struct.pack("!HHHH", 4000, port, length, checksum) + payload
    return struct.pack("!IHBB", 0x60000000, length, 17, 64) + addresses + datagram


@contextlib.contextmanager
def net() -> Iterator[Net]:
    require()
    made = Net()
    try:
        made.up()
        yield made
    finally:
        made.down()


CONFIG = AgentConfig(sources=(), iptables=IptablesVariant.NFT)


def steering(variant: IptablesVariant, **changes: object) -> Steering:
    return Steering(replace(CONFIG, iptables=variant, **changes))  # type: ignore[arg-type]
