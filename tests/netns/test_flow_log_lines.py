"""The flow log with real packets: begins, denials and ends; rotated, limited, full."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
from conftest import AgentFactory, LabFactory, RunningAgent
from objects import Object, allow, deny, policy, select, until
from packets import af, check, conntrack
from traffic import arrives, passes, sending, udp

from dataplane.lab.world import Lab

pytestmark = pytest.mark.netns
FIELDS = {
    "ts",
    "verdict",
    "reason",
    "direction",
    "policy",
    "src",
    "src_port",
    "dst",
    "dst_port",
    "protocol",
    "src_pod",
    "dst_pod",
    "node",
}


def lines(path: Path, **fields: Any) -> list[dict[str, Any]]:
    """Those with these fields; every line of the file is read."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for row in rows:
        assert row.keys() >= FIELDS, row
    return [row for row in rows if all(row.get(name) == value for name, value in fields.items())]


def web(lab: Lab) -> Object:
    return policy("x", "web", select(lab, "x/a"), ingress=allow(lab, "x/b", ports=["9000/UDP", "80/TCP"]))


def started(
    lab: Lab, agent: AgentFactory, path: Path, *objects: Object, options: tuple[str, ...] = ()
) -> RunningAgent:
    lab.run("node", "sysctl", "-qw", "net.netfilter.nf_conntrack_acct=1")
    running: RunningAgent = agent(lab, *objects, options=["--flow-log", str(path), *options])
    return running


@pytest.mark.parametrize("family", [4, 6])
def test_a_flow_from_its_begin_to_its_end(
    lab: LabFactory, agent: AgentFactory, tmp_path: Path, family: int
) -> None:
    one, path = lab(["x/a", "x/b", "x/c"]), tmp_path / "flows"
    started(one, agent, path, web(one), options=("--node-name", "here"))
    target, to = udp(one, "x/a", 9000, family=family), (one.address("x/a", family), 9000)
    source = udp(one, "x/b", 5000, family=family)
    assert passes(source, to, target)
    (begin,) = until(lambda: lines(path, event="flow", src_port=5000))
    assert {name: begin[name] for name in FIELDS - {"ts"}} == {
        "verdict": "allow",
        "reason": "policy-rule",
        "direction": "ingress",
        "policy": "x/web",
        "src": one.address("x/b", family),
        "src_port": 5000,
        "dst": one.address("x/a", family),
        "dst_port": 9000,
        "protocol": "UDP",
        "src_pod": "x/b",
        "dst_pod": "x/a",
        "node": "here",
    }
    for _ in range(4):
        source.sendto(b"x" * 100, to)
    name = "ipv4" if family == 4 else "ipv6"
    until(lambda: any(len(line) for line in conntrack(one, "-L", "-f", name, "-p", "udp").splitlines()))
    conntrack(one, "-D", "-f", name, "-p", "udp", "--orig-port-src", "5000")
    (end,) = until(lambda: lines(path, event="end", src_port=5000))
    assert {name: end[name] for name in FIELDS - {"ts"}} == {name: begin[name] for name in FIELDS - {"ts"}}
    assert end["packets"] >= 5
    assert end["bytes"] >= 4 * 128
    assert (end["reply_packets"], end["reply_bytes"]) == (0, 0)


def test_denials_and_what_an_audit_lets_through(lab: LabFactory, agent: AgentFactory, tmp_path: Path) -> None:
    one, path = lab(["x/a", "x/b", "x/c"]), tmp_path / "flows"
    daemon = started(one, agent, path, web(one))
    target, to = udp(one, "x/a", 9000), (one.address("x/a", 4), 9000)
    assert not arrives(udp(one, "x/c", 5001), to, target)
    denied = until(lambda: lines(path, event="deny"))
    assert {(row["reason"], row["direction"], row["src_pod"], row["dst_pod"]) for row in denied} == {
        ("no-rule", "ingress", "x/c", "x/a")
    }
    assert denied[0]["policies"] == ["x/web"]
    assert denied[0]["policy"] is None
    daemon.terminate()
    daemon.options += ("--audit",)
    daemon.start()
    assert passes(udp(one, "x/c", 5002), to, target)
    (row,) = until(lambda: lines(path, event="audit", src_port=5002))
    assert (row["verdict"], row["reason"], row["would_deny"]) == ("allow", "audit", "no-rule")


def test_pods_that_no_policy_isolates_have_no_lines(
    lab: LabFactory, agent: AgentFactory, tmp_path: Path
) -> None:
    one, path = lab(["x/a", "x/b", "x/c", "x/d"]), tmp_path / "flows"
    started(one, agent, path, web(one))
    check(one, ("x/c", "x/d", "80/TCP 80/UDP", ".."), ("x/b", "x/a", "80/TCP", "."), families=[4])
    conntrack(one, "-D", "-p", "tcp")
    conntrack(one, "-D", "-p", "udp")
    until(lambda: lines(path, event="end", dst_pod="x/a"))
    assert {row["dst_pod"] for row in lines(path)} == {"x/a"}


def test_a_file_that_is_moved_away_is_made_anew(lab: LabFactory, agent: AgentFactory, tmp_path: Path) -> None:
    one, path = lab(["x/a", "x/b"]), tmp_path / "flows"
    started(one, agent, path, web(one))
    target, to = udp(one, "x/a", 9000), (one.address("x/a", 4), 9000)
    assert passes(udp(one, "x/b", 5000), to, target)
    until(lambda: lines(path, src_port=5000))
    path.rename(tmp_path / "flows.1")
    until(path.exists, what="a new file")
    assert passes(udp(one, "x/b", 5001), to, target)
    until(lambda: lines(path, src_port=5001))
    assert lines(tmp_path / "flows.1", src_port=5000)
    assert not lines(path, src_port=5000)


def test_a_flood_of_one_reason_is_limited_and_counted(
    lab: LabFactory, agent: AgentFactory, tmp_path: Path
) -> None:
    one, path = lab(["x/a", "x/b", "x/c"]), tmp_path / "flows"
    daemon = started(one, agent, path, web(one), options=("--flow-log-rate", "1"))
    target, to = udp(one, "x/a", 9000), (one.address("x/a", 4), 9000)
    with sending(udp(one, "x/c", 5001), to):
        until(lambda: daemon.status()["counters"].get("no-rule", 0) > 200, timeout=20)
        # Others are not kept from being written.
        assert passes(udp(one, "x/b", 5000), to, target)
        until(lambda: lines(path, event="flow", src_port=5000))
    assert len(lines(path, event="deny")) < 100
    daemon.terminate()
    told = lines(path, event="suppressed", reason="no-rule")
    assert told
    suppressed, written = sum(row["count"] for row in told), len(lines(path, event="deny"))
    lost = sum(row["count"] for row in lines(path, event="lost"))
    assert suppressed + written + lost > 200


def test_a_full_disk_does_not_stop_the_agent(lab: LabFactory, agent: AgentFactory, tmp_path: Path) -> None:
    one = lab(["x/a", "x/b"])
    daemon = started(
        one, agent, Path("/dev/full"), web(one), options=("--metrics-bind-addr", "127.0.0.1:9162")
    )
    target, to = udp(one, "x/a", 9000), (one.address("x/a", 4), 9000)
    assert passes(udp(one, "x/b", 5000), to, target)
    until(lambda: "No space left on device" in daemon.text())
    assert passes(udp(one, "x/b", 5001), to, target)
    until(lambda: _metric(one, 'podgate_flow_log_lost_total{where="write"}') >= 2)
    assert daemon.text().count("No space left on device") == 1
    daemon.write(deny(one, "x/a"))
    assert not arrives(udp(one, "x/b", 5002), to, target)
    assert daemon.terminate() == 0


def _metric(lab: Lab, name: str) -> float:
    with lab.make_socket("node", af(4), socket.SOCK_STREAM) as link:
        link.settimeout(5)
        link.connect(("127.0.0.1", 9162))
        link.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        text = b""
        while more := link.recv(65536):
            text += more
    found = [line.split()[1] for line in text.decode().splitlines() if line.startswith(name + " ")]
    return float(found[0]) if found else 0.0


def test_stdout_and_a_place_that_is_none(lab: LabFactory, agent: AgentFactory, tmp_path: Path) -> None:
    one = lab(["x/a", "x/b"])
    daemon = started(one, agent, Path("-"), web(one))
    target, to = udp(one, "x/a", 9000), (one.address("x/a", 4), 9000)
    assert passes(udp(one, "x/b", 5000), to, target)
    until(lambda: '"event":"flow"' in daemon.text())
    daemon.terminate()
    daemon.options = ("--flow-log", str(tmp_path / "missing" / "flows"))
    daemon.start(wait=False)
    assert daemon.process is not None
    assert daemon.process.wait(60) == 2
    assert "flows: No such file or directory" in daemon.text().splitlines()[-1]
