"""Live flows in the kernel's conntrack table: read, judged again, bits taken back."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from collections.abc import Iterator

import pytest
from packet_lab import CLIENT4, MARKS, SERVER4, SERVER6, PacketLab, inside, packet_lab, run, wait_for

from dataplane._engine import Publisher
from dataplane.addresses import parse_address
from dataplane.config import Backend, Fail
from dataplane.errors import KernelError
from dataplane.model import PortRange
from dataplane.node import conntrack
from dataplane.node.queues import QueueSet
from dataplane.policy.compile import Compiler
from dataplane.reasons import Reason

pytestmark = pytest.mark.netns
OTHERS = 0x80  # Amazon VPC CNI's connection mark
UDP = PortRange(17, 5000, 5999)


@pytest.fixture
def lab() -> Iterator[PacketLab]:
    with packet_lab() as made:
        made.steer(after=[f"-A POSTROUTING -j CONNMARK --or-mark {OTHERS:#x}"])
        yield made


@pytest.fixture
def publisher(lab: PacketLab) -> Iterator[Publisher]:
    made = Publisher()
    made.publish(lab.table(UDP))
    queue = QueueSet(made, backend=Backend.NATIVE, numbers=[0], marks=MARKS, fail=Fail.CLOSED, offload=True)
    with inside(lab.node):
        queue.start()
    try:
        yield made
    finally:
        queue.stop()


@contextlib.contextmanager
def exchange(lab: PacketLab, port: int, six: bool = False) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A UDP flow that has been judged in both directions: (client, server) sockets, connected."""
    server_address = SERVER6 if six else SERVER4
    with lab.receiver(port, six) as server, lab.udp(lab.client, six) as client:
        client.connect((server_address, port))
        client.send(b"hello")
        _, peer = server.recvfrom(64)
        server.connect(peer)
        server.send(b"back")
        client.recv(64)
        yield client, server


def marks_of(lab: PacketLab) -> dict[int, int]:
    """Destination port → connection mark, as the conntrack table has it."""
    with inside(lab.node), open("/proc/thread-self/net/nf_conntrack") as table:
        found = {}
        for line in table:
            fields = dict(field.split("=", 1) for field in reversed(line.split()) if "=" in field)
            if "dport" in fields:
                found[int(fields["dport"])] = int(fields["mark"])
    return found


def test_flows_shows_what_was_judged(lab: PacketLab, publisher: Publisher) -> None:
    with exchange(lab, 5001) as (client, _), inside(lab.node):
        (flow,) = conntrack.flows(MARKS)
        assert (flow.src, flow.dst) == (parse_address(CLIENT4), parse_address(SERVER4))
        assert (flow.sport, flow.dport) == (client.getsockname()[1], 5001)
        assert (flow.reply_src, flow.reply_sport) == (flow.dst, flow.dport)
        assert (flow.egress, flow.ingress) == (True, True)
        assert flow.protocol == socket.IPPROTO_UDP
        assert flow.mark == MARKS.saved | OTHERS
        assert flow.state in ("REPLIED", "ASSURED")
        assert 0 < flow.timeout <= 180


@pytest.mark.parametrize("six", [False, True], ids=["v4", "v6"])
def test_rejudge_cuts_only_what_is_denied(lab: PacketLab, publisher: Publisher, six: bool) -> None:
    with exchange(lab, 5001, six) as (client, server), exchange(lab, 5900, six) as (other, other_server):
        table = lab.table(PortRange(17, 5000, 5500), generation=2)
        publisher.publish(table)
        wait_for(publisher.quiesced)
        with inside(lab.node):
            assert conntrack.rejudge(table, MARKS, None) == conntrack.Swept(2, 1)
            assert len(conntrack.flows(MARKS)) == 1
        if not six:
            assert marks_of(lab) == {5001: MARKS.saved | OTHERS, 5900: OTHERS}
        # The cut flow is cut from both sides, the other one is not disturbed.
        other_server.send(b"late")
        other.send(b"late")
        client.send(b"on")
        assert server.recv(64) == b"on"
        server.send(b"and back")
        assert client.recv(64) == b"and back"
        for link in (other, other_server):
            link.settimeout(0.2)
            with pytest.raises(TimeoutError):
                link.recv(64)


def test_a_sweep_can_be_limited_to_addresses(lab: PacketLab, publisher: Publisher) -> None:
    nothing = lab.table(generation=2, deny_all=True)
    with exchange(lab, 5001), exchange(lab, 5002, six=True), inside(lab.node):
        assert conntrack.rejudge(nothing, MARKS, [parse_address("10.99.0.1")]) == conntrack.Swept(0, 0)
        assert conntrack.rejudge(nothing, MARKS, []) == conntrack.Swept(0, 0)
        assert conntrack.rejudge(nothing, MARKS, [parse_address(SERVER4)]) == conntrack.Swept(1, 1)
        assert conntrack.clear(MARKS, [parse_address(SERVER6)]) == conntrack.Swept(1, 1)
        assert conntrack.clear_all(MARKS) == conntrack.Swept(0, 0)


def test_the_flow_is_judged_as_forward_sees_it(lab: PacketLab, publisher: Publisher) -> None:
    """After destination translation: the rules speak of the pod's address and container port."""
    run(
        "ip", "netns", "exec", lab.node, "iptables-restore", "-n",
        stdin="*nat\n-A PREROUTING -p udp -d 10.96.0.1 --dport 53"
        f" -j DNAT --to-destination {SERVER4}:5353\nCOMMIT\n",
    )  # fmt: skip
    with lab.receiver(5353) as server, lab.udp(lab.client) as client:
        client.connect(("10.96.0.1", 53))
        client.send(b"query")
        _, peer = server.recvfrom(64)
        server.sendto(b"answer", peer)
        assert client.recv(64) == b"answer"
        with inside(lab.node):
            (flow,) = conntrack.flows(MARKS)
            assert (flow.dport, flow.reply_sport) == (53, 5353)
            assert conntrack.rejudge(lab.table(UDP, generation=2), MARKS, None).cleared == 0
            only_service_port = lab.table(PortRange(17, 53, 53), generation=3)
            assert conntrack.rejudge(only_service_port, MARKS, None).cleared == 1


def test_icmp_flows_are_judged(lab: PacketLab, publisher: Publisher) -> None:
    publisher.publish(lab.table(generation=2))
    run("ip", "netns", "exec", lab.client, "ping", "-c", "1", "-W", "3", SERVER4)
    with inside(lab.node):
        (flow,) = conntrack.flows(MARKS)
        assert flow.icmp is not None
        assert flow.icmp[:2] == (8, 0)
        assert conntrack.rejudge(lab.table(generation=3), MARKS, None) == conntrack.Swept(1, 0)
        assert conntrack.rejudge(lab.table(UDP, generation=4), MARKS, None) == conntrack.Swept(1, 1)


def test_a_flow_in_a_zone_is_cut_there(lab: PacketLab, publisher: Publisher) -> None:
    run(
        "ip", "netns", "exec", lab.node, "iptables-restore",
        stdin="*raw\n-A PREROUTING -i pa -j CT --zone 7\n-A PREROUTING -i pb -j CT --zone 7\nCOMMIT\n",
    )  # fmt: skip
    with exchange(lab, 5001), inside(lab.node):
        (flow,) = conntrack.flows(MARKS)
        assert flow.zone == 7
        assert conntrack.clear_all(MARKS) == conntrack.Swept(1, 1)
        assert conntrack.flows(MARKS) == []


def test_without_privilege_it_says_so() -> None:
    """A user namespace of its own owns no part of this network namespace."""

    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setuid(65534)
            conntrack.flows(MARKS)
            text = "no error"
        except KernelError as error:
            text = str(error)
        except BaseException as error:
            text = repr(error)
        os.write(writing, text.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        assert "needs root (CAP_NET_ADMIN)" in pipe.read()
    os.waitpid(child, 0)


def test_fifty_thousand_flows_are_swept_within_a_second(lab: PacketLab) -> None:
    """Entries are made through ctnetlink: 50,000 with our bits, every tenth denied, and one live flow."""
    flows = 50_000
    fill(lab, flows)
    publisher = Publisher()
    publisher.publish(lab.table(UDP))
    queue = QueueSet(
        publisher, backend=Backend.NATIVE, numbers=[0], marks=MARKS, fail=Fail.CLOSED, offload=True
    )
    with inside(lab.node):
        queue.start()
    try:
        with exchange(lab, 5999) as (client, server):
            table = lab.table(PortRange(17, 5000, 5899), compiler=Compiler(), generation=2)
            started = time.monotonic()
            publisher.publish(table)
            wait_for(publisher.quiesced)
            with inside(lab.node):
                swept = conntrack.rejudge(table, MARKS, None)
            elapsed = time.monotonic() - started
            assert swept.seen == flows + 1
            assert swept.cleared == flows // 10 + 1
            assert elapsed < 1.0
            client.send(b"cut")
            wait_for(lambda: any(why is Reason.NO_RULE for (_, _, why) in queue.workers[0].counters()))
            server.settimeout(0.1)
            with pytest.raises(TimeoutError):
                server.recv(64)
    finally:
        queue.stop()


def fill(lab: PacketLab, flows: int) -> None:
    """Conntrack entries of the client to the server: ports 5000 to 5999, evenly."""

    def attribute(kind: int, value: bytes) -> bytes:
        return struct.pack("=HH", len(value) + 4, kind) + value + bytes(-len(value) % 4)

    def pair(kind: int, src: bytes, dst: bytes, sport: int, dport: int) -> bytes:
        ip = attribute(0x8001, attribute(1, src) + attribute(2, dst))
        protocol = attribute(0x8002, attribute(1, b"\x11") + attribute(2, struct.pack("!H", sport))
                             + attribute(3, struct.pack("!H", dport)))  # fmt: skip
        return attribute(kind | 0x8000, ip + protocol)

    client, server = parse_address(CLIENT4), parse_address(SERVER4)
    with inside(lab.node):
        link = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12)
    with link:
        batch = b""
        for number in range(flows):
            sport, dport = 1024 + number // 1000, 5000 + number % 1000
            body = (
                b"\x02\0\0\0" + pair(1, client, server, sport, dport) + pair(2, server, client, dport, sport)
            )
            body += attribute(3, struct.pack("!I", 0xE)) + attribute(7, struct.pack("!I", 600))
            body += attribute(8, struct.pack("!I", MARKS.saved))
            batch += struct.pack("=IHHII", 16 + len(body), 0x100, 0x401, 0, 0) + body
            if len(batch) > 60_000 or number == flows - 1:
                link.send(batch)
                batch = b""
        link.settimeout(0)
        with pytest.raises(BlockingIOError):  # no error came back
            link.recv(4096)
