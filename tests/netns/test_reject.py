"""What policies deny is answered: clients fail at once, with what says why."""

from __future__ import annotations

import errno
import socket
import struct
import time

import pytest
from conftest import AgentFactory, LabFactory
from objects import allow, deny, policy, select, until
from packets import Stream, af, check, sniffing
from traffic import arrives, sending, udp

from dataplane.lab.topology import Topology, Wire
from dataplane.lab.world import Lab
from dataplane.node.rendering import ANSWERS

pytestmark = pytest.mark.netns
FAMILY = pytest.mark.parametrize("family", [4, 6])
# ICMP type 3 code 13 (RFC 1812 §5.2.7.1) and ICMPv6 type 1 code 1 (RFC 4443 §3.1), as Linux tells them.
PROHIBITED = {4: errno.EHOSTUNREACH, 6: errno.EACCES}
PATIENCE = 20.0  # a client that hears nothing waits far longer


def tcp_answer(lab: Lab, source: str, address: str, family: int, port: int = 80) -> int:
    """The errno with which a connection fails, 0 for none."""
    with lab.make_socket(source, af(family), socket.SOCK_STREAM) as client:
        client.settimeout(PATIENCE)
        return client.connect_ex((address, port))


def udp_answer(lab: Lab, source: str, address: str, family: int, port: int = 80) -> int:
    """The errno that a sender hears of."""
    with lab.make_socket(source, af(family), socket.SOCK_DGRAM) as client:
        client.settimeout(PATIENCE)
        client.connect((address, port))
        client.send(b"hello")
        try:
            client.recv(100)
        except TimeoutError:
            raise AssertionError("no answer") from None
        except OSError as error:
            return error.errno or 0
        return 0


@FAMILY
@pytest.mark.parametrize("direction", ["ingress", "egress"])
@pytest.mark.parametrize("options", ["", "--no-offload", "--backend netfilterqueue"])
def test_a_client_hears_at_once(
    lab: LabFactory, agent: AgentFactory, family: int, direction: str, options: str
) -> None:
    one = lab(["x/a", "x/b"])
    closed = "x/a" if direction == "ingress" else "x/b"
    daemon = agent(one, deny(one, closed, directions=direction), options=["--reject", *options.split()])
    to = one.address("x/a", family)
    assert tcp_answer(one, "x/b", to, family) == errno.ECONNREFUSED
    assert udp_answer(one, "x/b", to, family) == PROHIBITED[family]
    check(one, ("x/b", "x/a", "80/TCP 80/UDP 80/SCTP ICMP", "XXXX"), families=[family])
    assert daemon.status()["counters"]["no-rule"] >= 5
    assert daemon.status()["reject"] is True


@FAMILY
def test_an_address_outside_is_answered_for_too(lab: LabFactory, agent: AgentFactory, family: int) -> None:
    one = lab(["x/a"])
    agent(one, deny(one, "x/a"), options=["--reject"])
    assert tcp_answer(one, "x/a", one.address("outside", family), family) == errno.ECONNREFUSED


@FAMILY
def test_pods_on_a_bridge(lab: LabFactory, agent: AgentFactory, family: int) -> None:
    one = lab(["x/a", "x/b"], Topology(wire=Wire.BRIDGE))
    agent(one, deny(one, "x/a", directions="ingress"), options=["--reject"])
    assert tcp_answer(one, "x/b", one.address("x/a", family), family) == errno.ECONNREFUSED


@pytest.mark.parametrize("sender", ["client", "server"])
def test_an_open_connection_that_is_denied_ends_at_once(
    lab: LabFactory, agent: AgentFactory, sender: str
) -> None:
    one = lab(["x/a", "x/b"])
    web = policy("x", "web", select(one, "x/a"), ingress=allow(one, "x/b"))
    daemon = agent(one, web, options=["--reject"])
    with Stream(one, "x/b", "x/a", sender=sender, port=7001) as stream:
        daemon.write(deny(one, "x/a", name="web"))
        writer = stream.client if sender == "client" else stream.server

        def broken() -> int:
            return writer.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) or writer.fileno() < 0

        until(lambda: broken() or _closed(writer), timeout=PATIENCE, what="the sender hears of it")


def _closed(sock: socket.socket) -> bool:
    # TCP_INFO's first byte is the state; 7 is TCP_CLOSE (net/tcp_states.h).
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) == b"\x07"


@FAMILY
def test_a_reset_is_not_answered(lab: LabFactory, agent: AgentFactory, family: int) -> None:
    """Else two ends that reject could answer each other for ever (RFC 9293 §3.5.2)."""
    one = lab(["x/a", "x/b"])
    web = policy("x", "web", select(one, "x/a"), ingress=allow(one, "x/b"))
    daemon = agent(one, web, options=["--reject"])
    with one.make_socket("x/a", af(family), socket.SOCK_STREAM) as listener:
        listener.bind((one.address("x/a", family), 7001))
        listener.listen()
        client = one.make_socket("x/b", af(family), socket.SOCK_STREAM)
        client.settimeout(PATIENCE)
        client.connect((one.address("x/a", family), 7001))
        generation = daemon.status()["generation"]
        daemon.write(deny(one, "x/a", name="web"))
        until(lambda: daemon.status()["generation"] > generation, what="the connection is denied")
        with sniffing(one, "x/b", one.address("x/a", family)) as heard:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()  # sends a reset
            until(lambda: daemon.status()["counters"].get("no-rule"), what="the reset is denied")
        assert not [packet for packet in heard if _error(packet)]


@FAMILY
def test_a_forged_source_is_not_answered(lab: LabFactory, agent: AgentFactory, family: int) -> None:
    one = lab(["x/a", "x/b", "x/c"])
    daemon = agent(one, deny(one, "x/a", directions="ingress"), options=["--reject"])
    target, to = udp(one, "x/a", 9000, family=family), (one.address("x/a", family), 9000)
    victim = one.address("x/b", family)
    with sniffing(one, "x/b") as heard:
        forger = udp(one, "x/c", 5001, family=family, address=victim)
        assert not arrives(forger, to, target)
        assert daemon.status()["counters"]["spoofed"] > 0
    assert not [
        packet for packet in heard if packet[9 if family == 4 else 6] in (1, 6, 58) and _error(packet)
    ]


def _error(packet: bytes) -> bool:
    """Whether it is an ICMP destination unreachable or a TCP segment."""
    protocol, body = (packet[9], packet[20:]) if packet[0] >> 4 == 4 else (packet[6], packet[40:])
    return protocol == 6 or (protocol, body[0]) in ((1, 3), (58, 1))


def test_a_flood_is_answered_at_the_limit_only(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/a", "x/b"])
    daemon = agent(one, deny(one, "x/a", directions="ingress"), options=["--reject"])
    one.run("node", "sysctl", "-qw", "net.ipv4.icmp_ratelimit=0", "net.ipv4.icmp_msgs_per_sec=100000")
    source, to = udp(one, "x/b", 5001), (one.address("x/a", 4), 9000)
    began = time.monotonic()
    with sniffing(one, "x/b") as heard, sending(source, to, interval=0.0005):
        until(lambda: daemon.status()["counters"].get("no-rule", 0) > 1500, timeout=60)
    seconds = time.monotonic() - began
    answers = len([packet for packet in heard if _error(packet)])
    rate = int(ANSWERS.partition("/")[0])
    assert 0 < answers <= rate * (seconds + 2)
    assert answers < daemon.status()["counters"]["no-rule"]


@pytest.mark.parametrize("chain", ["FORWARD", "PODGATE-FORWARD-REJECT", "PODGATE-REJECT"])
def test_without_its_rules_nothing_passes(lab: LabFactory, agent: AgentFactory, chain: str) -> None:
    one = lab(["x/a", "x/b"])
    daemon = agent(
        one, deny(one, "x/a", directions="ingress"), options=["--reject", "--verify-seconds", "60"]
    )
    one.run("node", "iptables", "-t", "filter", "-F", chain)
    check(one, ("x/b", "x/a", "80/TCP 80/UDP", "XX"), families=[4])
    assert daemon.status()["counters"]["no-rule"] > 0


def test_what_is_allowed_leaves_no_trace(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/a", "x/b"])
    agent(one, policy("x", "web", select(one, "x/a"), ingress=allow(one, "x/b")), options=["--reject"])
    check(one, ("x/b", "x/a", "80/TCP 80/UDP ICMP", "..."))
    flows = one.run("node", "conntrack", "-L", "-o", "extended", check=False).stdout.splitlines()
    marks = {field for line in flows for field in line.split() if field.startswith("mark=")}
    assert marks <= {"mark=0", f"mark={0x20000000}"}


@FAMILY
def test_a_local_service_of_the_node(lab: LabFactory, agent: AgentFactory, family: int) -> None:
    """What the pod asks of node-local DNS is judged in INPUT, and answered there."""
    one = lab(["x/a"])
    address, nodad = {4: ("169.254.20.10/32", ""), 6: ("fd00:ec2::23/128", "nodad")}[family]
    one.run("node", *f"ip addr add {address} dev lo {nodad}".split())
    local = address.partition("/")[0]
    daemon = agent(one, deny(one, "x/a", directions="egress"), options=["--reject"])
    with one.serving([one.node], [(6, 53), (17, 53)]):
        assert tcp_answer(one, "x/a", local, family, 53) == errno.ECONNREFUSED
        assert udp_answer(one, "x/a", local, family, 53) == PROHIBITED[family]
    assert daemon.status()["counters"]["no-rule"] >= 2
