"""Flows that live while policies change: cut or left alone, and never let back in."""

from __future__ import annotations

import socket
import threading
import time

import pytest
from conftest import AgentFactory, LabFactory, RunningAgent
from objects import Object, allow, anywhere, deny, policy, select, until
from packets import Events, Stream, af, check, conntrack

from dataplane.lab.probe import connect
from dataplane.lab.world import Lab

pytestmark = pytest.mark.netns

OFFLOAD = pytest.mark.parametrize("options", [[], ["--no-offload"]], ids=["offload", "no-offload"])
SENDER = pytest.mark.parametrize("sender", ["client", "server"])
FAMILY = pytest.mark.parametrize("family", [4, 6])
KEPT, CUT = 7001, 7002
# A stall that a client could feel; the machine itself sometimes pauses for some tenths of a second.
MAX_GAP = 1.5


def web(lab: Lab, *ports: int, direction: str = "ingress") -> Object:
    """The policy under which x/b may open these TCP ports of x/a, at the server's end or the client's."""
    texts = [f"{port}/TCP" for port in ports]
    if direction == "ingress":
        return policy("x", "web", select(lab, "x/a"), ingress=allow(lab, "x/b", ports=texts))
    return policy("x", "web", select(lab, "x/b"), egress=allow(lab, "x/a", ports=texts))


class Streams:
    """One stream per family and sender on each of two ports, all between x/b and x/a."""

    def __init__(self, lab: Lab) -> None:
        self.kept: list[Stream] = []
        self.cut: list[Stream] = []
        try:
            for family in (4, 6):
                for number, sender in enumerate(("client", "server")):
                    for port, where in ((KEPT, self.kept), (CUT, self.cut)):
                        where.append(Stream(lab, "x/b", "x/a", family, sender, port + 10 * number))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Streams:
        for one in (*self.kept, *self.cut):
            one.assert_flows(5)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for one in (*self.kept, *self.cut):
            one.close()

    def assert_only_kept_flows(self) -> None:
        for one in self.cut:
            one.assert_cut(watch=0.3)
        for one in self.kept:
            one.assert_flows(20)
            assert one.gap < MAX_GAP


KEPT_PORTS, CUT_PORTS = (KEPT, KEPT + 10), (CUT, CUT + 10)


@OFFLOAD
@pytest.mark.parametrize("direction", ["ingress", "egress"])
def test_a_change_cuts_what_it_denies_and_leaves_the_rest_alone(
    lab: LabFactory, agent: AgentFactory, direction: str, options: list[str]
) -> None:
    one = lab(["x/a", "x/b"])
    running = agent(one, web(one, *KEPT_PORTS, *CUT_PORTS, direction=direction), options=options)
    with Streams(one) as streams, Events(running.control) as events:
        running.write(web(one, *KEPT_PORTS, direction=direction))
        streams.assert_only_kept_flows()
        assert all(stream.retransmitted <= 2 for stream in streams.kept)
        until(lambda: len(events.of(*CUT_PORTS, verdict="deny")) >= 4, what="denials told")
    kept, denied = events.of(*KEPT_PORTS), events.of(verdict="deny")
    if options:
        assert kept
        assert all(row["verdict"] == "allow" for row in kept)
    else:
        # Not disturbed at all: the change sent none of its packets to the queue.
        assert not kept
    assert {(row["reason"], row["direction"]) for row in denied} == {("no-rule", direction)}
    assert {port for row in denied for port in (row["src_port"], row["dst_port"])} >= set(CUT_PORTS)
    # Where only the server sends, it is a reply that is judged as what it answers.
    assert any(row["reply"] for row in denied)


def test_changes_that_allow_a_flow_never_show_in_it(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/a", "x/b", "x/c"])
    start = web(one, KEPT)
    running = agent(one, start)
    both = {"family": 6, "port": KEPT}
    with (
        Stream(one, "x/b", "x/a", sender="client", **both) as up,
        Stream(one, "x/b", "x/a", sender="server", family=4, port=KEPT) as down,
        Events(running.control) as events,
    ):
        for changed in (
            [start, deny(one, "x/c")],
            [web(one, KEPT, 80), deny(one, "x/c")],
            [web(one, 80), policy("x", "other", select(one, "x/a"), ingress=allow(one, "x/b"))],
            [policy("x", "renamed", select(one, "x/a"), ingress=anywhere("TCP"))],
            [start],
            [],  # isolation ends
        ):
            running.write(*changed)
            up.assert_flows(10)
            down.assert_flows(10)
    assert not events.of(KEPT)
    for stream in (up, down):
        assert stream.gap < MAX_GAP


@pytest.mark.parametrize("first", ["flow", "agent"])
def test_a_flow_older_than_the_first_policy(lab: LabFactory, agent: AgentFactory, first: str) -> None:
    """It is judged by the policy in force, in the direction in which it was opened."""
    one = lab(["x/a", "x/b"])
    # What the server may open matters not to what it answers, nor what the client lets in.
    strict = policy(
        "x",
        "web",
        select(one, "x/a"),
        ingress=allow(one, "x/b", ports=[f"{port}/TCP" for port in KEPT_PORTS]),
        egress=[],
    )
    closed = deny(one, "x/b", directions="ingress", name="client")
    running = agent(one, start=False)
    if first == "agent":
        running.start()
    with Streams(one) as streams:
        running.write(strict, closed)
        if first == "flow":
            running.start()
        streams.assert_only_kept_flows()
        # The other way round both pods are closed.
        check(one, ("x/a", "x/b", "80/TCP", "X"), ("x/b", "x/a", "80/TCP", "X"))


@SENDER
@OFFLOAD
def test_a_denied_flow_does_not_come_back(
    lab: LabFactory, agent: AgentFactory, sender: str, options: list[str]
) -> None:
    """Not by replies that would be allowed as flows of their own, nor by keepalives of either side."""
    one = lab(["x/a", "x/b"])
    running = agent(one, web(one, KEPT), options=options)
    with Stream(one, "x/b", "x/a", sender=sender, port=KEPT) as stream, Events(running.control) as events:
        for sock in (stream.client, stream.server):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
        # The server may open anything, and its client lets everything in.
        closed = [
            policy("x", "web", select(one, "x/a"), ingress=[], egress=anywhere()),
            policy("x", "client", select(one, "x/b"), ingress=anywhere()),
        ]
        running.write(*closed)
        stream.assert_cut(watch=2.2)
        denied = events.of(KEPT, verdict="deny")
        assert {(row["reason"], row["direction"]) for row in denied} == {("no-rule", "ingress")}
        assert not events.of(KEPT, verdict="allow") or options
        if sender == "client":
            # Somebody empties conntrack, which picks the flow up in its middle (nf_conntrack_tcp_loose)
            # from the next packet: the client's, for it alone sends now. Denied as ever. (Were it the
            # server's, nothing on the node could tell it from a flow that the server opens.)
            stream.server.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 0)
            conntrack(one, "-D", "-p", "tcp", "--dport", str(KEPT))
            stream.assert_cut(watch=1.5)
        # It is the policy that stops it, nothing else: allowed again it goes on where it was.
        running.write(web(one, KEPT))
        before = stream.received
        until(lambda: stream.received > before + 20, 10, "the flow goes on")
        assert stream.fault is None


@OFFLOAD
def test_udp_flows_are_cut_in_both_directions(
    lab: LabFactory, agent: AgentFactory, options: list[str]
) -> None:
    one = lab(["x/a", "x/b"])
    rules = allow(one, "x/b", ports=["7001/UDP", "7002/UDP"])
    running = agent(one, policy("x", "web", select(one, "x/a"), ingress=rules), options=options)
    pairs = {}
    for family in (4, 6):
        for port in (KEPT, CUT):
            server = one.make_socket("x/a", af(family), socket.SOCK_DGRAM)
            client = one.make_socket("x/b", af(family), socket.SOCK_DGRAM)
            server.bind((one.address("x/a", family), port))
            client.connect((one.address("x/a", family), port))
            for sock in (server, client):
                sock.settimeout(1)
            client.send(b"hello")
            server.connect(server.recvfrom(10)[1])
            server.send(b"hello")
            assert client.recv(10) == b"hello"
            pairs[family, port] = client, server
    rules = allow(one, "x/b", ports=["7001/UDP"])
    running.write(policy("x", "web", select(one, "x/a"), ingress=rules, egress=anywhere()))
    for (_, port), (client, server) in pairs.items():
        for sender, receiver in ((server, client), (client, server)):
            receiver.settimeout(1 if port == KEPT else 0.3)
            sender.send(b"again")
            if port == KEPT:
                assert receiver.recv(10) == b"again"
            else:
                with pytest.raises(TimeoutError):
                    receiver.recv(10)
    for pair in pairs.values():
        for sock in pair:
            sock.close()


# -- many short flows


@pytest.fixture
def two(lab: LabFactory, agent: AgentFactory) -> tuple[Lab, RunningAgent]:
    """Two pods, each isolated both ways, and allowed what the tests below do."""
    one = lab(["x/a", "x/b"])
    ports = ["80/TCP", "7001/TCP", "53/UDP"]
    running = agent(
        one,
        policy("x", "a", select(one, "x/a"), ingress=allow(one, "x/b", ports=ports), egress=[]),
        policy("x", "b", select(one, "x/b"), ingress=[], egress=allow(one, "x/a", ports=ports)),
    )
    return one, running


@FAMILY
def test_two_queries_from_one_socket_are_never_lost(two: tuple[Lab, RunningAgent], family: int) -> None:
    """A and AAAA as glibc sends them: back to back, from a socket of their own; 10,000 of them."""
    one, running = two
    stop = threading.Event()
    server = one.make_socket("x/a", af(family), socket.SOCK_DGRAM)
    server.bind((one.address("x/a", family), 53))
    server.settimeout(0.2)

    def answer() -> None:
        while not stop.is_set():
            try:
                data, peer = server.recvfrom(512)
            except TimeoutError:
                continue
            server.sendto(data, peer)

    thread = threading.Thread(target=answer)
    thread.start()
    to = (one.address("x/a", family), 53)

    def lookups() -> int:
        lost = 0
        for number in range(5000):
            with socket.socket(af(family), socket.SOCK_DGRAM) as sock:
                sock.settimeout(2)
                sock.connect(to)
                pair = {b"A %d" % number, b"AAAA %d" % number}
                for query in sorted(pair):
                    sock.send(query)
                try:
                    while pair:
                        pair.discard(sock.recv(512))
                except TimeoutError:
                    lost += len(pair)
                    if lost > 20:
                        break
        return lost

    try:
        assert one.inside("x/b", lookups) == 0
    finally:
        stop.set()
        thread.join()
        server.close()
    counters = running.status()["counters"]
    assert not counters.get("no-rule")
    assert not counters.get("queue-full")
    assert not counters.get("invalid")


@FAMILY
def test_churn_beside_a_steady_flow(two: tuple[Lab, RunningAgent], family: int) -> None:
    """Thousands of connections that use few ports again and again; not one is denied, nothing stalls."""
    one, running = two
    to, own = (one.address("x/a", family), 80), one.address("x/b", family)
    stop = threading.Event()
    listener = one.make_socket("x/a", af(family), socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)

    def accept() -> None:
        while not stop.is_set():
            try:
                listener.accept()[0].close()
            except TimeoutError:
                continue

    def churn() -> tuple[int, list[str]]:
        made, wrong = 0, []
        deadline = time.monotonic() + 2.5
        while time.monotonic() < deadline and len(wrong) < 5:
            with socket.socket(af(family), socket.SOCK_STREAM) as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                # Closed by reset: no TIME_WAIT, so that the port is free at once.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                sock.settimeout(2)
                try:
                    sock.bind((own, 30000 + made % 50))
                    sock.connect(to)
                except OSError as error:
                    wrong.append(f"connection {made}: {error}")
            made += 1
        return made, wrong

    one.ask({"op": "forget", "netns": one.netns("x/a")})  # the lab's own server leaves port 80
    listener.bind(to)
    listener.listen(256)
    listener.settimeout(0.2)
    thread = threading.Thread(target=accept)
    thread.start()
    try:
        with Stream(one, "x/b", "x/a", family, port=KEPT) as steady:
            made, wrong = one.inside("x/b", churn)
            steady.assert_flows()
    finally:
        stop.set()
        thread.join()
        listener.close()
    assert not wrong
    assert made > 500
    assert steady.gap < MAX_GAP
    counters = running.status()["counters"]
    assert not counters.get("no-rule")
    assert not counters.get("queue-full")


def test_status_and_flows_tell_of_live_flows(two: tuple[Lab, RunningAgent]) -> None:
    one, running = two
    with Stream(one, "x/b", "x/a", 4, port=KEPT):
        rows = [row for row in running.ask("flows") if row["dst_port"] == KEPT]
        assert [(row["src_pod"], row["dst_pod"], row["verdict"]) for row in rows] == [("x/b", "x/a", "allow")]
        assert rows[0]["egress_judged"]
        assert rows[0]["ingress_judged"]
    assert connect(one, "x/b", "x/a", "80/TCP").reached
