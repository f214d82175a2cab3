"""Real packets through both queue backends."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
from collections.abc import Iterator

import pytest
from packet_lab import CLIENT4, MARKS, SERVER4, SERVER6, PacketLab, inside, packet_lab, run, wait_for

from dataplane._engine import Publisher, Worker
from dataplane._nfqueue import NativeQueue
from dataplane.config import Backend, Fail
from dataplane.errors import KernelError
from dataplane.model import PortRange
from dataplane.node.queues import QueueSet, read_stats
from dataplane.reasons import Reason

pytestmark = pytest.mark.netns
ALLOWED = PortRange(17, 5000, 5999)
TCP = PortRange(6, 5000, 5999)


@pytest.fixture
def lab() -> Iterator[PacketLab]:
    with packet_lab() as made:
        yield made


@pytest.fixture(params=list(Backend), ids=lambda backend: backend.value)
def backend(request: pytest.FixtureRequest) -> Backend:
    value = request.param
    assert isinstance(value, Backend)
    return value


@contextlib.contextmanager
def queues(
    lab: PacketLab,
    backend: Backend,
    numbers: range = range(1),
    *,
    offload: bool = True,
    fail: Fail = Fail.CLOSED,
    maxlen: int = 4096,
    publish: bool = True,
) -> Iterator[QueueSet]:
    publisher = Publisher()
    if publish:
        publisher.publish(lab.table(ALLOWED, TCP))
    made = QueueSet(
        publisher, backend=backend, numbers=numbers, marks=MARKS, fail=fail, offload=offload, maxlen=maxlen
    )
    with inside(lab.node):
        made.start()
    try:
        yield made
    finally:
        made.stop()


def judged(made: QueueSet, reason: Reason | None = None) -> int:
    return sum(
        packets
        for worker in made.workers
        for (_, _, why), (packets, _) in worker.counters().items()
        if reason is None or why is reason
    )


def silent(link: socket.socket, seconds: float = 0.3) -> bool:
    """Nothing arrives; what was denied has already been dropped when this is asked."""
    return not select.select([link], [], [], seconds)[0]


@pytest.mark.parametrize("six", [False, True], ids=["v4", "v6"])
def test_allowed_passes_and_denied_is_dropped(lab: PacketLab, backend: Backend, six: bool) -> None:
    lab.steer()
    server = SERVER6 if six else SERVER4
    with queues(lab, backend) as made, lab.receiver(5001, six) as good, lab.receiver(7001, six) as bad:
        with lab.udp(lab.client, six) as client:
            client.sendto(b"yes", (server, 5001))
            assert good.recv(64) == b"yes"
            client.sendto(b"no", (server, 7001))
            wait_for(lambda: judged(made, Reason.NO_RULE) == 1)
            assert silent(bad)
        assert made.healthy() == []


def test_a_judged_flow_never_comes_back(lab: PacketLab, backend: Backend) -> None:
    lab.steer()
    with queues(lab, backend) as made, lab.receiver(5001) as server, lab.udp(lab.client) as client:
        for number in range(20):
            client.sendto(b"%d" % number, (SERVER4, 5001))
            _, peer = server.recvfrom(64)
            server.sendto(b"back", peer)
            client.recv(64)
        assert judged(made) == 1
    assert lab.rule_packets("POSTROUTING", "CONNMARK or 0x10000000") == 1


def test_without_offload_every_packet_is_judged(lab: PacketLab, backend: Backend) -> None:
    lab.steer()
    with (
        queues(lab, backend, offload=False) as made,
        lab.receiver(5001) as server,
        lab.udp(lab.client) as client,
    ):
        for _ in range(10):
            client.sendto(b"ping", (SERVER4, 5001))
            _, peer = server.recvfrom(64)
            server.sendto(b"back", peer)
            client.recv(64)
        wait_for(lambda: judged(made) == 20)
        assert judged(made, Reason.REPLY) == 10
    assert lab.rule_packets("POSTROUTING", "CONNMARK or 0x10000000") == 0


def test_the_packets_own_mark_is_kept(lab: PacketLab, backend: Backend) -> None:
    """kube-proxy's 0x4000 asks for masquerading in POSTROUTING; losing it kills hairpin flows."""
    lab.steer(
        before=["-A PREROUTING -p udp --dport 5002 -j MARK --or-mark 0x4000"],
        after=["-A POSTROUTING -m mark --mark 0x4000", "-A POSTROUTING -m mark --mark 0x0"],
    )
    with queues(lab, backend), lab.receiver(5002) as server, lab.udp(lab.client) as client:
        client.sendto(b"marked", (SERVER4, 5002))
        assert server.recv(64) == b"marked"
    assert lab.rule_packets("POSTROUTING", "mark match 0x4000") == 1
    assert lab.rule_packets("POSTROUTING", "mark match 0x0") == 0


@pytest.mark.parametrize("offload", [True, False], ids=["offload", "every-packet"])
def test_tcp_transfer(lab: PacketLab, backend: Backend, offload: bool) -> None:
    """GSO packets of up to 64 KiB cross the native queue whole; both directions are steered."""
    lab.steer()
    size = 8 << 20 if backend is Backend.NATIVE or offload else 1 << 20
    with queues(lab, backend, offload=offload) as made:
        with inside(lab.server):
            listener = socket.create_server((SERVER4, 5003))
        received = []

        def sink() -> None:
            link, _ = listener.accept()
            with link:
                link.settimeout(20)
                total = 0
                while chunk := link.recv(1 << 20):
                    total += len(chunk)
                received.append(total)

        thread = threading.Thread(target=sink)
        thread.start()
        with inside(lab.client):
            client = socket.socket()
        with client, listener:
            client.settimeout(20)
            client.connect((SERVER4, 5003))
            client.sendall(bytes(size))
            client.shutdown(socket.SHUT_WR)
            thread.join(30)
        assert received == [size]
        if offload:
            # The SYN sets E and I; the packets in flight before it was saved may follow it.
            assert judged(made) <= 3
        else:
            assert judged(made) > 20
        assert made.losses().get("unreadable", 0) == 0


def test_several_queues_share_the_load(lab: PacketLab, backend: Backend) -> None:
    lab.steer("--queue-balance 4:5")
    for number in range(3, 40):
        run("ip", "-n", lab.client, "addr", "add", f"10.77.0.{number}/24", "dev", "eth0")
    publisher = Publisher()
    publisher.publish(lab.table(ALLOWED))
    with queues(lab, backend, range(4, 6)) as made, lab.receiver(5001) as server:
        for number in range(2, 40):
            with lab.udp(lab.client) as client:
                client.bind((f"10.77.0.{number}", 0))
                client.sendto(b"x", (SERVER4, 5001))
        # Only the pod's own address is allowed: the others are spoofed, and judged all the same.
        wait_for(lambda: judged(made) == 38)
        assert server.recv(64) == b"x"
        assert all(sum(n for n, _ in worker.counters().values()) > 0 for worker in made.workers)
        assert [stats.num for stats in made.stats()] == [4, 5]


def test_a_queue_held_by_another_process(lab: PacketLab, backend: Backend) -> None:
    with queues(lab, backend, range(1, 2)):
        other = QueueSet(
            Publisher(), backend=backend, numbers=range(3), marks=MARKS, fail=Fail.CLOSED, offload=True
        )
        with inside(lab.node), pytest.raises(KernelError, match="queue 1 is held by another process"):
            other.start()
        # Queue 0, which it could have, has been given back.
        with queues(lab, backend, range(1)):
            pass


def test_stop_and_start(lab: PacketLab, backend: Backend) -> None:
    lab.steer()
    publisher = Publisher()
    publisher.publish(lab.table(ALLOWED))
    made = QueueSet(publisher, backend=backend, numbers=[0], marks=MARKS, fail=Fail.CLOSED, offload=False)
    assert made.healthy() == ["the queues are not started"]
    with lab.receiver(5001) as server, lab.udp(lab.client) as client:
        for _ in range(3):
            with inside(lab.node):
                made.start()
            client.sendto(b"on", (SERVER4, 5001))
            assert server.recv(64) == b"on"
            made.stop()
            client.sendto(b"off", (SERVER4, 5001))
            assert silent(server, 0.1)
            assert not any(thread.name == "podgate-q0" for thread in threading.enumerate())


def test_nothing_passes_without_a_table(lab: PacketLab, backend: Backend) -> None:
    lab.steer()
    with (
        queues(lab, backend, publish=False) as made,
        lab.receiver(5001) as server,
        lab.udp(lab.client) as client,
    ):
        client.sendto(b"early", (SERVER4, 5001))
        wait_for(lambda: judged(made, Reason.NO_TABLE) == 1)
        assert silent(server)


def test_malformed_packets_are_dropped(lab: PacketLab, backend: Backend) -> None:
    """A UDP header that does not fit: conntrack calls it invalid, the engine malformed."""
    lab.steer(before=["-A FORWARD -m conntrack --ctstate INVALID -j NFQUEUE --queue-num 0"])
    with queues(lab, backend) as made:
        with inside(lab.server):
            sniffer = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP)
        with inside(lab.client):
            raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
        with sniffer, raw:
            header = struct.pack(
                "!BBHHHBBH4s4s",
                0x45,
                0,
                24,
                1,
                0,
                64,
                17,
                0,
                socket.inet_aton(CLIENT4),
                socket.inet_aton(SERVER4),
            )
            raw.sendto(header + b"\x13\x89\x13\x89", (SERVER4, 0))
            wait_for(lambda: judged(made, Reason.MALFORMED) == 1)
            assert silent(sniffer)


def test_a_long_packet_is_judged_by_its_headers(lab: PacketLab, backend: Backend) -> None:
    """Only 256 bytes are copied; length fields that say more are no reason to deny."""
    lab.steer()
    with queues(lab, backend, offload=False) as made, lab.receiver(5001) as server:
        with lab.udp(lab.client) as client:
            client.sendto(bytes(1400), (SERVER4, 5001))
            assert len(server.recv(2000)) == 1400
        assert judged(made, Reason.MALFORMED) == 0


def test_an_interface_removed_while_packets_are_queued(lab: PacketLab, backend: Backend) -> None:
    """The kernel flushes them: verdicts then meet ENOENT, which is no failure."""
    lab.steer()
    with queues(lab, backend, offload=False) as made, lab.udp(lab.client) as client:
        stop = threading.Event()

        def flood() -> None:
            while not stop.is_set():
                with contextlib.suppress(OSError):
                    client.sendto(b"x" * 64, (SERVER4, 5001))

        thread = threading.Thread(target=flood)
        thread.start()
        try:
            wait_for(lambda: judged(made) > 100)
            run("ip", "-n", lab.node, "link", "del", "pb")
        finally:
            stop.set()
            thread.join()
        wait_for(lambda: all(stats.depth == 0 for stats in made.stats()))
        assert made.healthy() == []
        run(
            "ip",
            "-n",
            lab.node,
            "link",
            "add",
            "pb",
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            lab.server,
        )


def test_a_full_queue_is_counted(lab: PacketLab) -> None:
    """Bound but not run: nobody answers, so the queue fills up."""
    lab.steer()
    worker = Worker(Publisher())
    queue = NativeQueue(
        worker, 0, mark_egress=MARKS.egress, mark_ingress=MARKS.ingress, mark_reply=MARKS.reply, maxlen=8
    )
    with inside(lab.node):
        queue.bind()
        proc = os.open("/proc/thread-self/net/netfilter/nfnetlink_queue", os.O_RDONLY)
    try:
        with lab.udp(lab.client) as client:
            for _ in range(20):
                client.sendto(b"x", (SERVER4, 5001))
        wait_for(lambda: read_stats(proc)[0].dropped == 12)
        assert read_stats(proc)[0].depth == 8
        assert read_stats(proc)[0].user_dropped == 0
        thread = threading.Thread(target=queue.run)
        thread.start()
        wait_for(lambda: read_stats(proc)[0].depth == 0)
        queue.stop()
        thread.join(5)
        assert not thread.is_alive()
    finally:
        queue.close()
        os.close(proc)


def test_the_socket_has_room_for_a_full_queue(lab: PacketLab) -> None:
    """The default buffer holds about 256 packets whatever the queue's length is."""
    lab.steer()
    queue = NativeQueue(
        Worker(Publisher()), 0, mark_egress=MARKS.egress, mark_ingress=MARKS.ingress, mark_reply=MARKS.reply
    )
    with inside(lab.node):
        queue.bind()
        proc = os.open("/proc/thread-self/net/netfilter/nfnetlink_queue", os.O_RDONLY)
    try:
        with lab.udp(lab.client) as client:
            for _ in range(queue.maxlen):
                client.sendto(bytes(1400), (SERVER4, 5001))
        wait_for(lambda: read_stats(proc)[0].depth == queue.maxlen)
        assert read_stats(proc)[0].user_dropped == 0
    finally:
        queue.close()
        os.close(proc)


def test_fail_open_lets_the_overflow_through(lab: PacketLab, backend: Backend) -> None:
    """NFQA_CFG_F_FAIL_OPEN: a full queue accepts instead of dropping."""
    lab.steer()
    publisher = Publisher()
    publisher.publish(lab.table(ALLOWED))
    made = QueueSet(
        publisher, backend=backend, numbers=[0], marks=MARKS, fail=Fail.OPEN, offload=False, maxlen=4
    )
    with inside(lab.node):
        for queue in made._queues:
            queue.bind()
    try:
        with lab.receiver(7001) as server, lab.udp(lab.client) as client:
            for number in range(10):
                client.sendto(b"%d" % number, (SERVER4, 7001))
            assert [server.recv(64) for _ in range(6)] == [b"%d" % n for n in range(4, 10)]
            assert silent(server)
    finally:
        for queue in made._queues:
            queue.close()


def test_a_thread_that_ends_is_a_problem(lab: PacketLab) -> None:
    with queues(lab, Backend.NATIVE) as made:
        assert made.healthy() == []
        made._queues[0].stop()
        wait_for(lambda: made.healthy() != [])
        assert made.healthy() == ["queue 0: its thread stopped: it ended by itself"]


def test_binding_twice_is_refused(lab: PacketLab) -> None:
    queue = NativeQueue(
        Worker(Publisher()), 0, mark_egress=MARKS.egress, mark_ingress=MARKS.ingress, mark_reply=MARKS.reply
    )
    with inside(lab.node):
        queue.bind()
        with pytest.raises(KernelError, match="queue 0 is bound already"):
            queue.bind()
    queue.close()
    queue.close()
