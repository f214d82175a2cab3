"""`podgate intercept` with real packets: what hooks may do to them, and what must not change."""

from __future__ import annotations

import json
import logging
import socket
import ssl
import threading
from pathlib import Path

import pytest
from conftest import AgentFactory, LabFactory
from interceptor import PATIENT, SERVED, Intercept, all_rules, hook_rules, members, web
from objects import policy, select, until
from packets import Events, Stream
from traffic import arrives, passes, received, sending, udp

from dataplane.lab.topology import Topology, Wire

logging.getLogger("scapy.runtime").setLevel(logging.ERROR)
from scapy.layers.dns import DNS, DNSQR  # noqa: E402

pytestmark = pytest.mark.netns

EXAMPLES = Path(__file__).resolve().parents[2] / "deploy/examples/hooks"
TOTAL_RETRANS = 100  # struct tcp_info, tcpi_total_retrans, linux/tcp.h


def events_of_hooks(log: Path) -> set[str]:
    """The events that a flow log has for packets that a hook decided about."""
    rows = [json.loads(line) for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return {row["event"] for row in rows if row.get("reason") == "hook"}


@pytest.mark.parametrize("wire", [Wire.ROUTED, Wire.BRIDGE])
@pytest.mark.parametrize("family", [4, 6])
def test_a_hook_allows_drops_and_rewrites(
    wire: Wire, family: int, lab: LabFactory, agent: AgentFactory, tmp_path: Path
) -> None:
    one = lab(["x/a", "x/b", "x/c"], Topology(wire=wire))
    log = tmp_path / "flows"
    running = agent(one, web(one), options=["--flow-log", str(log)])
    before = all_rules(one)
    code = """
from scapy.packet import Raw

def on_packet(packet, seen):
    load = bytes(packet[Raw]) if Raw in packet else b""
    if load.startswith(b"rewrite"):
        packet[Raw].load = b"rewritten, and longer than it was"
        return packet
    if seen.src_pod == "x/c":
        assert (seen.verdict, seen.reason) == ("deny", "no-rule")
        return ALLOW
    return DROP
"""
    friend, stranger = udp(one, "x/b", 7001, family=family), udp(one, "x/c", 7001, family=family)
    target = udp(one, "x/a", SERVED, family=family)
    to = (one.address("x/a", family), SERVED)
    assert passes(friend, to, target)
    assert not arrives(stranger, to, target)
    with Events(running.control) as events, Intercept(running, code, *PATIENT, "pod=x/a", "udp") as hook:
        assert running.status()["intercepted_pods"] == 1
        assert "a hook is asked about packets of 1 pod" in running.podgate("status").stdout
        assert passes(stranger, to, target)
        assert not arrives(friend, to, target)
        # Others who look on see what the hook decided.
        until(lambda: {row["verdict"] for row in events.of(SERVED, reason="hook")} == {"allow", "deny"})
        friend.sendto(b"rewrite me", to)
        assert received(target, 5, 1) == [b"rewritten, and longer than it was"]
        assert hook.end() == 0
    until(lambda: all_rules(one) == before and not members(one, family), what="all is as before")
    allowed, dropped, rewritten = (hook.of(hook=did)[0] for did in ("allow", "drop", "rewrite"))
    for row, verdict in ((allowed, "allow"), (dropped, "deny"), (rewritten, "allow")):
        decided = {name: row[name] for name in ("verdict", "reason", "direction", "policy", "rule")}
        assert decided == {
            "verdict": verdict,
            "reason": "hook",
            "direction": None,
            "policy": None,
            "rule": None,
        }
    assert allowed["proposed"] | {"verdict": "deny", "reason": "no-rule"} == allowed["proposed"]
    assert dropped["proposed"] | {"verdict": "allow", "policy": "x/web"} == dropped["proposed"]
    assert hook.summary["rewrite"] == 1
    assert running.status()["counters"]["hook"] == len(hook.rows) - 1
    until(lambda: events_of_hooks(log) == {"hook", "deny"}, what="the flow log tells of it")
    # What the policies say holds again.
    assert passes(friend, to, target)
    assert not arrives(stranger, to, target)


@pytest.mark.parametrize(("wire", "family"), [(Wire.ROUTED, 4), (Wire.BRIDGE, 6)])
def test_flows_in_the_kernel_are_seen_and_other_pods_left_alone(
    wire: Wire, family: int, lab: LabFactory, agent: AgentFactory
) -> None:
    one = lab(["x/a", "x/b", "y/c", "y/d"], Topology(wire=wire))
    running = agent(one, web(one))
    with (
        Stream(one, "x/b", "x/a", family=family, port=SERVED) as stream,
        Stream(one, "y/c", "y/d", family=family, port=SERVED) as other,
    ):
        stream.assert_flows(20)
        generation = running.status()["generation"]
        with Intercept(running, "def on_packet(packet, seen): seen.count(seen.src_pod)", "pod=x/a") as hook:
            there = hook.wait(20, src_pod="x/b", dst_pod="x/a", reply=False, hook="engine")
            back = hook.wait(20, src_pod="x/a", dst_pod="x/b", reply=True, hook="engine")
            other.assert_flows(20)
            assert hook.end() == 0
        stream.assert_flows(20)
        until(lambda: not hook_rules(one), what="the rules are as before")
        stream.assert_flows(20)
        assert (stream.retransmitted, other.retransmitted) == (0, 0)
    assert {row["policy"] for row in there} == {"x/web"}
    assert {row["verdict"] for row in (*there, *back)} == {"allow"}
    assert {row["src_pod"] for row in hook.rows if "src_pod" in row} == {"x/a", "x/b"}
    counted = hook.rows[-1]["counted"]
    assert counted["x/a"] + counted["x/b"] == hook.summary["asked"] - hook.summary.get("ended", 0)
    # No rule of any pod has changed.
    assert running.status()["generation"] == generation


def test_a_delayed_packet_comes_later_and_others_do_not_wait(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/a", "x/b"])
    running = agent(one, web(one))
    code = "def on_packet(packet, seen): return delay(2) if b'slow' in bytes(packet) else None"
    source, target = udp(one, "x/b", 7001), udp(one, "x/a", SERVED)
    to = (one.address("x/a"), SERVED)
    with Intercept(running, code, *PATIENT, "pod=x/a", "udp") as hook:
        source.sendto(b"slow", to)
        source.sendto(b"quick", to)
        assert received(target, 20, 2) == [b"quick", b"slow"]
        (row,) = hook.wait(hook="delay")
    assert (row["verdict"], row["reason"], row["policy"]) == ("allow", "policy-rule", "x/web")


def test_a_tcp_payload_of_the_same_length_is_exchanged(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/a", "x/b"])
    running = agent(one, web(one))
    code = """
from scapy.packet import Raw

def on_packet(packet, seen):
    if Raw in packet and packet[Raw].load == b"GET /one":
        packet[Raw].load = b"GET /two"
        return packet
"""
    with (
        Intercept(running, code, *PATIENT, "to=x/a", "tcp"),
        one.make_socket("x/a", socket.AF_INET, socket.SOCK_STREAM) as listener,
        one.make_socket("x/b", socket.AF_INET, socket.SOCK_STREAM) as client,
    ):
        listener.bind((one.address("x/a"), SERVED))
        listener.listen()
        client.settimeout(10)
        client.connect((one.address("x/a"), SERVED))
        server, _ = listener.accept()
        with server:
            server.settimeout(10)
            client.sendall(b"GET /one")
            assert server.recv(100) == b"GET /two"
            client.sendall(b"GET /six")
            assert server.recv(100) == b"GET /six"
            server.sendall(b"200")
            assert client.recv(100) == b"200"
            # Large packets are cut into segments before they come by.
            sending_all = threading.Thread(target=client.sendall, args=(b"x" * 300_000,))
            sending_all.start()
            got = b""
            while len(got) < 300_000:
                got += server.recv(65536)
            sending_all.join()
            assert got == b"x" * 300_000


def test_what_the_filter_leaves_out_is_not_asked_about(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/a", "x/b", "x/c"])
    running = agent(one, web(one))
    to = (one.address("x/a"), SERVED)
    friend, stranger, target = udp(one, "x/b", 7001), udp(one, "x/c", 7001), udp(one, "x/a", SERVED)
    code = "def on_packet(packet, seen): return DROP"
    with Intercept(running, code, *PATIENT, "pod=x/a", "verdict=deny", "udp port 9") as hook:
        assert passes(friend, to, target)
        assert not arrives(stranger, to, target)
        stranger.sendto(b"x", (to[0], 9))
        (row,) = hook.wait(hook="drop")
        assert (row["dst_port"], row["proposed"]["reason"]) == (9, "no-rule")
    assert hook.summary["asked"] == 1


def test_in_strict_mode_a_pod_without_a_policy_can_be_let_in(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/a", "x/b"])
    running = agent(one, options=["--mode", "strict"])
    source, target = udp(one, "x/b", 7001), udp(one, "x/a", SERVED)
    to = (one.address("x/a"), SERVED)
    assert not arrives(source, to, target)
    with Intercept(running, "def on_packet(packet, seen): return ALLOW", *PATIENT, "pod=x/a") as hook:
        assert passes(source, to, target)
        assert hook.wait(hook="allow")[0]["proposed"]["reason"] == "no-rule"
    until(lambda: not hook_rules(one), what="the rules are as before")
    assert not arrives(source, to, target)


def test_packets_to_local_services_are_the_hooks_too(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/a"])
    one.run("node", "ip", "addr", "add", "169.254.20.10/32", "dev", "lo")
    running = agent(one, policy("x", "a", select(one, "x/a"), egress=[]))
    source = udp(one, "x/a", 7001)
    target, node = udp(one, "node", 53), (one.address("node"), 53)
    assert not arrives(source, ("169.254.20.10", 53), target)
    with Intercept(running, "def on_packet(packet, seen): return ALLOW", *PATIENT, "pod=x/a", "udp") as hook:
        assert passes(source, ("169.254.20.10", 53), target)
        assert hook.wait(hook="allow")[0]["proposed"]["reason"] == "no-rule"
        # All else between a pod and its own node is no matter of policy, and no hook's.
        assert passes(source, node, target)
    assert {row["dst"] for row in hook.rows if "dst" in row} == {"169.254.20.10"}


def test_it_ends_by_itself_after_so_many_packets(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/a", "x/b"])
    running = agent(one, web(one))
    source, target = udp(one, "x/b", 7001), udp(one, "x/a", SERVED)
    to = (one.address("x/a"), SERVED)
    with sending(source, to):
        code = "def on_packet(packet, seen): return ALLOW"
        hook = Intercept(running, code, *PATIENT, "-n", "3", "pod=x/a")
        assert hook.ended() == 0
    assert len([row for row in hook.rows if "hook" in row]) >= 3
    until(lambda: not hook_rules(one), what="the rules are as before")
    assert passes(source, to, target)


@pytest.mark.parametrize("hangs", [False, True], ids=["idle", "in-the-hook"])
def test_it_ends_by_itself_after_so_long(lab: LabFactory, agent: AgentFactory, hangs: bool) -> None:
    """What `kubectl exec` has started lives on when kubectl is killed."""
    one = lab(["x/a", "x/b"])
    running = agent(one, web(one))
    source, target = udp(one, "x/b", 7001), udp(one, "x/a", SERVED)
    to = (one.address("x/a"), SERVED)
    code = "import time\ndef on_packet(packet, seen): time.sleep(1000)"
    with Intercept(running, code, "--seconds", "4", "pod=x/a") as hook:
        assert "until this ends, after 4 s at the latest" in hook.lines[0]
        if hangs:
            source.sendto(b"one", to)
            assert received(target, 20, 1) == [b"one"]
        assert hook.ended() == 0
    assert hook.summary.get("timeout", 0) == int(hangs)
    until(lambda: not hook_rules(one), what="the rules are as before")
    assert passes(source, to, target)


def test_in_audit_a_drop_passes_and_says_so(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/a", "x/b"])
    running = agent(one, web(one), options=["--audit"])
    source, target = udp(one, "x/b", 7001), udp(one, "x/a", SERVED)
    with Intercept(running, "def on_packet(packet, seen): return DROP", *PATIENT, "pod=x/a") as hook:
        assert "what the hook drops passes" in hook.lines[0]
        assert passes(source, (one.address("x/a"), SERVED), target)
        row = hook.wait(hook="drop")[0]
    assert (row["verdict"], row["reason"], row["would_deny"]) == ("allow", "audit", "hook")


def test_what_policies_deny_is_answered_with_reject(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/a", "x/b", "x/c"])
    running = agent(one, web(one), options=["--reject"])
    with (
        Intercept(running, "def on_packet(packet, seen): pass", *PATIENT, "pod=x/a") as hook,
        one.make_socket("x/c", socket.AF_INET, socket.SOCK_STREAM) as client,
    ):
        client.settimeout(20)
        with pytest.raises(ConnectionRefusedError):
            client.connect((one.address("x/a"), SERVED))
        hook.wait(hook="engine", verdict="deny", reason="no-rule")


def test_a_change_of_policy_holds_for_packets_that_wait(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/a", "x/b"])
    running = agent(one, web(one))
    source, target = udp(one, "x/b", 7001), udp(one, "x/a", SERVED)
    to = (one.address("x/a"), SERVED)
    go = running.directory.parent / "go"
    code = f"""
import os, time

def on_packet(packet, seen):
    print("asked", flush=True)
    if b"delay" in bytes(packet):
        return delay(3)
    while not os.path.exists({str(go)!r}):
        time.sleep(0.01)
"""
    with Intercept(running, code, *PATIENT, "pod=x/a", "udp") as hook:
        source.sendto(b"delay", to)
        until(lambda: hook.lines.count("asked") == 1, timeout=20, what="the hook is asked")
        source.sendto(b"wait", to)
        until(lambda: hook.lines.count("asked") == 2, timeout=20, what="the hook is asked")
        running.write(policy("x", "web", select(one, "x/a"), ingress=[]))
        go.touch()
        rows = [hook.wait(hook=did)[0] for did in ("engine", "delay")]
        assert not received(target, 0.2)
    for row in rows:
        assert (row["verdict"], row["reason"]) == ("deny", "no-rule")
        assert row["proposed"]["verdict"] == "allow"
        assert row["policies"] == ["x/web"]


def test_examples_do_what_they_say(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/a", "x/b"])
    running = agent(one)
    address = one.address("x/a")

    def retries() -> int:
        """SYNs that a connection needed besides the first."""
        with one.make_socket("x/b", socket.AF_INET, socket.SOCK_STREAM) as client:
            client.settimeout(20)
            client.connect((address, SERVED))
            return int(client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192)[TOTAL_RETRANS])

    with one.make_socket("x/a", socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind((address, SERVED))
        listener.listen()
        with Intercept(running, EXAMPLES / "lose_syns.py", *PATIENT, "to=x/a", "tcp") as hook:
            assert [retries() for _ in range(2)] == [1, 0]
        assert hook.rows[-1]["counted"] == {"connections": 2, "SYNs sent again": 1}

        with (
            Intercept(running, EXAMPLES / "tls_names.py", *PATIENT, "tcp", "port", str(SERVED)) as hook,
            one.make_socket("x/b", socket.AF_INET, socket.SOCK_STREAM) as client,
        ):
            client.connect((address, SERVED))
            client.sendall(client_hello("www.db.example"))
            until(lambda: f"x/b asks {address}:{SERVED} for www.db.example" in hook.lines, timeout=20)

    server, client = udp(one, "x/a", 53), udp(one, "x/b", 7001)
    question = DNS(qd=DNSQR(qname="db.shop"))
    with Intercept(running, EXAMPLES / "slow_dns.py", *PATIENT, "pod=x/b", "udp port 53") as hook:
        client.sendto(bytes(question), (address, 53))
        assert received(server, 20, 1) == [bytes(question)]
        server.sendto(bytes(DNS(qr=1, qd=question.qd)), (one.address("x/b"), 7001))
        server.sendto(b"no DNS", (one.address("x/b"), 7001))
        assert received(client, 20, 2)[0] == b"no DNS"
        hook.wait(hook="delay")
    assert hook.rows[-1]["counted"] == {"db.shop.": 1}


def client_hello(name: str) -> bytes:
    """The first bytes that Python's own TLS client sends."""
    outward = ssl.MemoryBIO()
    client = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), outward, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return outward.read()
