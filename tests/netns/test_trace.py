"""`podgate trace` with real packets: what it shows, what a slow reader loses, and what it must not change."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Self

import pytest
from conftest import PODGATE, AgentFactory, LabFactory, RunningAgent, import_path
from objects import Object, allow, policy, select, until
from packets import Stream
from record_command import RecordCommand
from traffic import passes, sending, udp

from dataplane.lab.topology import Topology, Wire
from dataplane.lab.world import Lab

pytestmark = pytest.mark.netns

SERVED, REFUSED = 8001, 8002


class Trace(RecordCommand):
    """`podgate trace -o json` in the node; a context manager that begins when the agent says so."""

    def __init__(self, running: RunningAgent, *argv: str) -> None:
        super().__init__(running, "trace", *argv)
        assert self.process.stderr is not None
        self.header = self.process.stderr.readline()
        self.said = ""
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with contextlib.suppress(ValueError):  # cut off in the middle of a line
            for line in self.process.stdout:
                self.rows.append(json.loads(line))

    def __enter__(self) -> Self:
        return self

    def ended(self) -> int:
        """Its exit status once it has ended. What it said at the end is in `said`."""
        status = self.process.wait(15)
        self._thread.join(15)
        assert self.process.stderr is not None
        self.said += self.process.stderr.read() if not self.process.stderr.closed else ""
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()  # closed already is no error
        return status


@contextlib.contextmanager
def listening(lab: Lab, pod: str, port: int) -> Iterator[None]:
    with lab.make_socket(pod, socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind((lab.address(pod), port))
        listener.listen(64)
        yield


def tries(lab: Lab, source: str, destination: str, port: int, seconds: float = 0.3) -> None:
    """One connection is tried, whatever comes of it."""
    with lab.make_socket(source, socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.settimeout(seconds)
        with contextlib.suppress(OSError):
            sock.connect((lab.address(destination), port))


def web(lab: Lab) -> Object:
    """x/b may open SERVED of x/a."""
    return policy("x", "web", select(lab, "x/a"), ingress=allow(lab, "x/b", ports=[f"{SERVED}/TCP"]))


def watched_rules(lab: Lab) -> str:
    """What of the rules in the node concerns looking at every packet."""
    saved = "".join(
        lab.run("node", f"{tool}-save", "-t", "mangle").stdout for tool in ("iptables", "ip6tables")
    )
    return "\n".join(line for line in saved.splitlines() if "WATCH" in line)


def test_denied_and_allowed_packets_show_both_pods_and_what_decided(
    lab: LabFactory, agent: AgentFactory
) -> None:
    one = lab(["x/a", "x/b", "y/c"])
    running = agent(one, web(one))
    with Trace(running) as trace, listening(one, "x/a", SERVED):
        assert "Flows that the kernel passes show only the packets that opened them" in trace.header
        tries(one, "x/b", "x/a", SERVED)
        tries(one, "y/c", "x/a", SERVED)
        allowed = trace.wait(src_pod="x/b", tcp_flags="SYN")[0]
        denied = trace.wait(src_pod="y/c")[0]
        assert trace.end() == 0
    assert trace.said.strip() == f"{len(trace.rows)} records"
    common = {"dst_pod": "x/a", "dst": one.address("x/a"), "dst_port": SERVED, "protocol": "TCP"}
    common |= {"direction": "ingress", "tcp_flags": "SYN", "reply": False, "cached": False, "icmp_type": None}
    for row, source in ((allowed, "x/b"), (denied, "y/c")):
        assert {**row, **common, "src": one.address(source)} == row
        assert row["generation"] == running.status()["generation"]
        assert row["egress"] == {"pod": source, "reason": "not-isolated", "policy": None, "rule": None}
        assert set(row) >= {"ts", "verdict", "reason", "policy", "src_port", "node", "bytes"}
    assert (allowed["verdict"], allowed["reason"], allowed["policy"]) == ("allow", "policy-rule", "x/web")
    assert allowed["ingress"] == {"pod": "x/a", "reason": "policy-rule", "policy": "x/web", "rule": 0}
    assert allowed["rule"] == 0
    assert (denied["verdict"], denied["reason"], denied["policy"]) == ("deny", "no-rule", None)
    assert denied["ingress"] == {"pod": "x/a", "reason": "no-rule", "policy": None, "rule": None}


def test_readers_see_what_their_filters_select(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/a", "x/b", "y/c"])
    running = agent(one, web(one))
    filters = {
        "deny": ["verdict=deny"],
        "from": ["from=y/*"],
        "port": ["tcp", "dst", "port", str(REFUSED)],
        "host": [f"host {one.address('y/c')}", "and", "reason=no-rule"],
        "policy": ["policy=x/web"],
        "none": ["namespace=z"],
    }
    with contextlib.ExitStack() as stack, listening(one, "x/a", SERVED):
        traces = {name: stack.enter_context(Trace(running, *words)) for name, words in filters.items()}
        everything = stack.enter_context(Trace(running))
        for source in ("x/b", "y/c"):
            for port in (SERVED, REFUSED):
                tries(one, source, "x/a", port)
        everything.wait(3, verdict="deny", tcp_flags="SYN")
        for name in ("deny", "port"):
            traces[name].wait(2)
        traces["policy"].wait(3, verdict="deny", tcp_flags="SYN")
    pairs = {
        name: {(row["src_pod"], row["dst_port"]) for row in trace.rows if row["tcp_flags"] == "SYN"}
        for name, trace in traces.items()
    }
    assert pairs == {
        "deny": {("x/b", REFUSED), ("y/c", SERVED), ("y/c", REFUSED)},
        "from": {("y/c", SERVED), ("y/c", REFUSED)},
        "port": {("x/b", REFUSED), ("y/c", REFUSED)},
        "host": {("y/c", SERVED), ("y/c", REFUSED)},
        # What its rules allow, and what is denied at the pods that it isolates.
        "policy": {("x/b", SERVED), ("x/b", REFUSED), ("y/c", SERVED), ("y/c", REFUSED)},
        "none": set(),
    }


@pytest.mark.skipif(shutil.which("tshark") is None, reason="needs tshark: apt-get install tshark")
def test_a_capture_opens_in_tshark_with_the_verdicts(
    lab: LabFactory, agent: AgentFactory, tmp_path: Path
) -> None:
    one = lab(["x/a", "x/b", "y/c"])
    running = agent(one, web(one))
    file = tmp_path / "verdicts.pcapng"
    with Trace(running, "--pcap", str(file)) as trace, listening(one, "x/a", SERVED):
        tries(one, "x/b", "x/a", SERVED)
        tries(one, "y/c", "x/a", REFUSED)
        trace.wait(src_pod="y/c")
        trace.wait(src_pod="x/b", tcp_flags="SYN")
    fields = ["frame.comment", "ip.src", "tcp.dstport", "tcp.flags.syn", "frame.len", "frame.time_epoch"]
    argv = ["tshark", "-r", str(file), "-T", "fields", *(word for name in fields for word in ("-e", name))]
    shown = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    packets = [line.split("\t") for line in shown.splitlines()]
    assert len(packets) == len(trace.rows)
    for packet, row in zip(packets, trace.rows, strict=True):
        assert packet[1] == row["src"]
        assert int(packet[2]) == row["dst_port"]
        assert int(packet[4]) == row["bytes"]
        assert packet[0].startswith(f"{row['verdict']} ")
        assert packet[5][:17] == f"{epoch(row['ts']):.6f}"[:17]
    comments = {packet[0] for packet in packets}
    assert any(one.startswith("allow ingress: policy-rule of x/web rule 0; x/b > x/a") for one in comments)
    assert any(one.startswith("deny ingress: no-rule (isolated by x/web); y/c > x/a") for one in comments)


def epoch(ts: str) -> float:
    return datetime.fromisoformat(ts).timestamp()


def test_text_is_for_people_and_v_decodes(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/a", "y/c"])
    running = agent(one, web_of_nobody(one))
    with sending(udp(one, "y/c", 7777), (one.address("x/a"), 53)):
        done = running.podgate("trace", "-v", "-n", "1", "udp")
    line, *layers = done.stdout.splitlines()
    assert line.split()[1:6] == ["deny", "y/c:7777", ">", "x/a:53", "UDP"]
    assert "ingress: no-rule" in line
    assert layers[0].startswith("    IP  version=4 ")
    assert f"dst={one.address('x/a')}" in layers[0]
    assert layers[1].startswith("    UDP  ")
    assert "\x1b" not in done.stdout
    assert done.stderr.splitlines()[-1] == "1 record"


def web_of_nobody(lab: Lab) -> Object:
    return policy("x", "closed", select(lab, "x/a"), ingress=[])


def test_a_stopped_reader_loses_its_own_records_and_is_told(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/a", "x/b"])
    running = agent(
        one,
        policy("x", "web", select(one, "x/a"), ingress=allow(one, "x/b")),
        options=["--no-offload"],
    )
    source, target = udp(one, "x/b", 7001), udp(one, "x/a", 7002)
    to = (one.address("x/a"), 7002)
    with Trace(running, "udp port 7002") as slow, Trace(running, "udp port 7003") as quick:
        assert passes(source, to, target)
        slow.wait()
        slow.process.send_signal(signal.SIGSTOP)

        def judged() -> int:
            return int(running.status()["counters"].get("policy-rule", 0))

        # What a socket and a reader's queue can hold is some tens of thousands of records at most.
        before = judged()
        with contextlib.ExitStack() as stack:
            for _ in range(4):
                stack.enter_context(sending(source, to, interval=0.00001))
            until(lambda: judged() - before > 40_000, timeout=60, what="many packets judged")
        # Verdicts go on, and so does the other reader.
        other = udp(one, "x/a", 7003)
        until(
            lambda: passes(source, (to[0], 7003), other) and quick.of(dst_port=7003),
            timeout=60,
            what="the other reader sees its packets",
        )
        slow.process.send_signal(signal.SIGCONT)
        until(lambda: any("lost" in row for row in slow.rows), timeout=60, what="the loss is told")
        slow.end()
    losses = [row for row in slow.rows if "lost" in row]
    assert {row["where"] for row in losses} <= {"reader", "ring"}
    assert any(row["where"] == "reader" for row in losses)
    lost = sum(row["lost"] for row in losses)
    assert f"{lost:,} lost" in slow.said
    assert not any(row.get("where") == "reader" for row in quick.rows)


@pytest.mark.parametrize("wire", [Wire.ROUTED, Wire.BRIDGE])
@pytest.mark.parametrize("family", [4, 6])
def test_every_packet_shows_flows_in_the_kernel_and_ends_with_its_reader(
    wire: Wire, family: int, lab: LabFactory, agent: AgentFactory
) -> None:
    one = lab(["x/a", "x/b", "x/c"], Topology(wire=wire))
    running = agent(one, web(one))
    plain = watched_rules(one)
    with (
        Stream(one, "x/b", "x/a", family=family, port=SERVED) as stream,
        Trace(running, "pod=x/a") as usual,
    ):
        stream.assert_flows(20)
        assert not usual.rows
        with Trace(running, "--every-packet", "pod=x/a", "tcp") as every:
            assert every.header.startswith("Every packet of x/a, until this ends.")
            assert "PODGATE-WATCHED" in watched_rules(one)
            stream.assert_flows(20)
            there = every.wait(20, src_pod="x/b", dst_pod="x/a", reply=False)
            back = every.wait(20, src_pod="x/a", dst_pod="x/b", reply=True)
            every.process.kill()
            until(lambda: watched_rules(one) == plain, what="the rules are as before")
            assert every.end() == -signal.SIGKILL
        ended = time.time()
        stream.assert_flows(20)
        assert not [row for row in usual.rows if epoch(row["ts"]) > ended]
        assert stream.retransmitted == 0
    assert {row["verdict"] for row in (*there, *back)} == {"allow"}
    assert {row["policy"] for row in there} == {"x/web"}
    members = one.run("node", "ipset", "list", f"podgate-watched-{family}").stdout.split("Members:")[1]
    assert not members.strip()


def test_every_packet_of_a_pod_without_a_policy(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/a", "x/b", "y/c", "y/d"])
    running = agent(one, web(one))
    source, target = udp(one, "y/c", 7001), udp(one, "y/d", 7002)
    to = (one.address("y/d"), 7002)
    with Trace(running, "--every-packet", "namespace=y") as trace:
        assert "y/c, y/d" in trace.header
        assert passes(source, to, target)
        row = trace.wait(src_pod="y/c", dst_pod="y/d")[0]
        assert (row["verdict"], row["reason"]) == ("allow", "not-isolated")
        # Pods that nobody looks at go their usual way.
        with Stream(one, "x/b", "x/a", port=SERVED) as stream:
            stream.assert_flows(20)
        assert not [row for row in trace.rows if "x/b" in (row["src_pod"], row["dst_pod"])]
    until(lambda: not watched_rules(one), what="the rules are as before")
    assert passes(source, to, target)


def test_nothing_is_cut_when_the_agent_dies_while_every_packet_is_shown(
    lab: LabFactory, agent: AgentFactory
) -> None:
    one = lab(["x/a", "x/b", "y/c", "y/d"])
    running = agent(one, web(one), options=["--fail", "closed"])
    source, target = udp(one, "y/c", 7001), udp(one, "y/d", 7002)
    to = (one.address("y/d"), 7002)
    with Stream(one, "x/b", "x/a", port=SERVED) as stream, Trace(running, "--every-packet") as trace:
        trace.wait(src_pod="x/b")
        running.kill()
        # Neither flows that were judged nor pods that no policy isolates need the agent.
        stream.assert_flows(20)
        assert passes(source, to, target)
        assert trace.ended() == 1
        assert "ended" in trace.said
        # What must be judged still is not let through.
        assert not connect_works(one, "x/b")
        running.start()
        assert not watched_rules(one)
        stream.assert_flows(20)
    assert passes(source, to, target)


def connect_works(lab: Lab, source: str) -> bool:
    with (
        listening(lab, "x/a", SERVED + 100),
        lab.make_socket(source, socket.AF_INET, socket.SOCK_STREAM) as sock,
    ):
        sock.settimeout(0.5)
        try:
            sock.connect((lab.address("x/a"), SERVED + 100))
        except OSError:
            return False
        return True


def test_the_agents_end_puts_everything_back(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/a", "x/b"])
    running = agent(one, web(one))
    with Trace(running, "--every-packet", "pod=x/a") as trace:
        assert watched_rules(one)
        assert running.terminate() == 0
        assert not watched_rules(one)
        assert trace.ended() == 1


def test_readers_of_every_packet_come_and_go(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/a", "x/b"])
    running = agent(one, web(one))
    generation = running.status()["generation"]
    with Stream(one, "x/b", "x/a", port=SERVED) as stream:
        with Trace(running, "--every-packet", "pod=x/a") as first:
            with Trace(running, "--every-packet", "pod=x/b") as second:
                first.wait(10, src_pod="x/b")
                second.wait(10, src_pod="x/b")
            count = len(first.rows)
            until(lambda: len(first.rows) > count + 20, what="the other goes on")
        until(lambda: not watched_rules(one), what="the rules are as before")
        stream.assert_flows(20)
    # It concerned no rule of any pod.
    assert running.status()["generation"] == generation


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["verdict=denied"], "did you mean deny?"),
        (["pod=db"], "pod=*/db"),
        (["tcp", "prt", "80"], "is no pcap-filter expression"),
        (["--every-packet", "pod=z/nobody"], "no pod of this node is meant; known here: x/a"),
        (["--pcap", "/nowhere/at/all.pcapng"], "--pcap /nowhere/at/all.pcapng: No such file or directory"),
        (["-n", "0"], "0 is not in the range"),
    ],
)
def test_bad_input_is_one_line(argv: list[str], said: str, lab: LabFactory, agent: AgentFactory) -> None:
    running = agent(lab(["x/a"]))
    done = running.podgate("trace", *argv, check=False)
    assert done.returncode == 2
    assert said in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_without_an_agent(lab: LabFactory, tmp_path: Path) -> None:
    line = (*PODGATE, "trace", "--control", str(tmp_path / "none.sock"))
    environment = {**os.environ, "PYTHONPATH": import_path()}
    done = subprocess.run(line, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1
    assert "no agent at" in done.stderr
