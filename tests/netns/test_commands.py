"""Commands against a live agent: what they print, in which shape, and how they fail."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import PODGATE, AgentFactory, LabFactory, RunningAgent, import_path
from objects import allow, deny, pod, policy, rule, select
from traffic import Stream

from dataplane.lab.probe import probe
from dataplane.lab.world import Lab
from dataplane.reasons import BY_TEXT

pytestmark = pytest.mark.netns


def run(lab: Lab, *argv: str) -> subprocess.CompletedProcess[str]:
    """A podgate command in the node, with no agent named."""
    return lab.run("node", "env", f"PYTHONPATH={import_path()}", *PODGATE, *argv, check=False)


def fails(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """Exit status, one line on stderr with these words, nothing on stdout."""
    assert done.returncode == code, (done.stdout, done.stderr)
    assert done.stderr.startswith("podgate: "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    for word in words:
        assert word in done.stderr, done.stderr
    assert done.stdout == ""


@pytest.fixture
def running(lab: LabFactory, agent: AgentFactory) -> RunningAgent:
    """Three pods: a is open to b's port 80 but for what `except` says; c may send nothing."""
    one = lab(["x/a", "x/b", "x/c"])
    return agent(
        one,
        policy(
            "x",
            "web",
            select(one, "x/a"),
            ingress=[
                *allow(one, "x/b", ports=["80/TCP", "8000-8080/TCP"]),
                rule("203.0.113.0/24", except_=["203.0.113.128/25"]),
            ],
        ),
        deny(one, "x/c", directions="egress", name="quiet"),
    )


def as_json(running: RunningAgent, *argv: str) -> Any:
    done = running.podgate(*argv, "-o", "json")
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_status(running: RunningAgent) -> None:
    probe(running.lab, ["80/TCP"], 4, timeout=0.4)
    status = as_json(running, "status")
    assert set(status) >= {
        "ready", "generation", "mode", "fail", "backend", "iptables", "pods", "policies", "queues",
        "counters", "problems",
    }  # fmt: skip
    assert (status["ready"], status["mode"], status["fail"]) == (True, "standard", "closed")
    assert (status["backend"], status["pods"], status["policies"]) == ("native", 2, 2)
    assert status["generation"] >= 1
    assert [set(queue) for queue in status["queues"]] == [{"num", "depth", "dropped", "user_dropped"}]
    assert set(status["counters"]) <= set(BY_TEXT)
    assert status["counters"]["no-rule"] > 0
    assert status["counters"]["policy-rule"] > 0
    assert status["problems"] == []
    text = running.podgate("status", "--wait-ready", "1").stdout
    assert text.startswith("ready")
    assert "2 pods under 2 policies" in text
    assert "no-rule" in text
    assert "\x1b" not in text


def test_explain_shape(running: RunningAgent) -> None:
    b = running.lab.address("x/b")
    answer = as_json(running, "explain", "--from", "x/b", "--to", "x/a", "--port", "80/TCP")
    assert answer["verdict"] == "allow"
    assert answer["egress"] == {
        "verdict": "allow", "reason": "not-isolated", "policy": None, "rule": None, "policies": [],
    }  # fmt: skip
    assert answer["ingress"] == {
        "verdict": "allow",
        "reason": "policy-rule",
        "policy": "x/web",
        "rule": {"index": 0, "cidr": f"{b}/32", "except": [], "ports": ["80/TCP", "8000-8080/TCP"]},
        "policies": ["x/web"],
        "field": "ingress rule 0",
    }
    assert (answer["suggestions"], answer["notes"]) == ([], [])
    answer = as_json(running, "explain", "--from", "203.0.113.9", "--to", "x/a", "--port", "9/UDP")
    assert answer["egress"]["reason"] == "not-a-pod"
    assert answer["ingress"]["rule"] == {
        "index": 2, "cidr": "203.0.113.0/24", "except": ["203.0.113.128/25"], "ports": [],
    }  # fmt: skip
    for source, reason in (("203.0.113.200", "no-rule"), ("x/c", "no-rule"), ("node", "own-node")):
        who = running.lab.address("node") if source == "node" else source
        answer = as_json(running, "explain", "--from", who, "--to", "x/a", "--port", "80/TCP")
        assert answer["ingress"]["reason"] == reason, source
        assert answer["verdict"] == ("allow" if reason == "own-node" else "deny")
    answer = as_json(running, "explain", "--from", "x/c", "--to", "x/a", "--port", "80/TCP")
    assert answer["egress"] == {
        "verdict": "deny", "reason": "no-rule", "policy": None, "rule": None, "policies": ["x/quiet"],
        "candidates": [
            {
                "policy": "x/quiet", "field": "egress", "reason": "no-rules",
                "sentence": "its PolicyEndpoints have no egress rules: nothing is allowed",
            }
        ],
        "more": [],
    }  # fmt: skip


def test_explain_text_and_expectation(running: RunningAgent) -> None:
    ask = ["explain", "--from", "x/b", "--to", "x/a", "--port", "81/TCP"]
    done = running.podgate(*ask)
    assert done.stdout.startswith("DENY  x/b (")
    assert "\x1b" not in done.stdout
    assert running.podgate(*ask, "--expect", "deny", check=False).returncode == 0
    done = running.podgate(*ask, "--expect", "allow", check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    done = running.podgate("explain", "--from", "x/b", "--to", "x/a", "--port", "8005/TCP")
    assert "policy x/web, rule 0" in done.stdout
    sixth = running.podgate("explain", "--from", "x/b", "--to", "x/a", "--port", "80", "--family", "6")
    assert running.lab.address("x/a", 6) in sixth.stdout
    # An own address of the pod is the pod.
    by_address = running.podgate(
        "explain", "--from", running.lab.address("x/b"), "--to", "x/a", "--port", "80"
    )
    assert by_address.stdout.startswith("ALLOW  x/b")


@pytest.mark.parametrize("family", [4, 6])
def test_explain_agrees_with_real_packets(lab: LabFactory, agent: AgentFactory, family: int) -> None:
    names = ["x/a", "x/b", "y/a", "y/b"]
    one = lab([pod(name, ports=["80/TCP", "81/TCP", "80/UDP", "80/SCTP"]) for name in names])
    daemon = agent(
        one,
        policy(
            "x", "a", select(one, "x/a"),
            ingress=[*allow(one, "x/b", ports=["81/TCP", "80/UDP"]), *allow(one, "y/a")],
        ),
        policy("y", "a", select(one, "y/a"), egress=allow(one, "x/a", ports=["80-81/TCP", "80/SCTP"])),
        policy(
            "x", "b", select(one, "x/b"),
            ingress=[rule("203.0.113.0/24", "80/TCP"), rule("2001:db8::/32")],
        ),
        deny(one, "y/b"),
    )  # fmt: skip
    ports = ["80/TCP", "81/TCP", "80/UDP", "80/SCTP", "ICMP"]
    external = "203.0.113.9" if family == 4 else "2001:db8::9"
    seen = probe(one, ports, family, [external], timeout=0.6)
    for port in ports:
        for source in seen.order:
            for destination in seen.order:
                if source == destination or external == source == destination:
                    continue
                query = {"from": source, "to": destination, "port": port, "family": str(family)}
                verdict = daemon.ask("explain", **query)["verdict"]
                real = "allow" if seen.allows(source, destination, port) else "deny"
                assert verdict == real, query
    # By the files alone, with the same objects, the command says the same.
    asked = ["explain", "--from", "y/a", "--to", "x/a", "--family", str(family), "-o", "json"]
    for port in ports:
        live = json.loads(daemon.podgate(*asked, "--port", port).stdout)
        files = json.loads(run(one, *asked, "--port", port, str(daemon.directory)).stdout)
        assert files == live


def test_rules(running: RunningAgent) -> None:
    lab = running.lab
    answer = as_json(running, "rules", "x/a")
    assert answer["pod"] == "x/a"
    assert answer["addresses"] == [lab.address("x/a", 4), lab.address("x/a", 6)]
    assert answer["egress"] is None
    assert [found["index"] for found in answer["ingress"]["rules"]] == [0, 1, 2]
    peers = {interval["peer"]: interval["allowed"] for interval in answer["ingress"]["intervals"]}
    assert any(lab.address("x/b") in peer for peer in peers)
    assert all({"ports", "policy", "rule"} == set(one) for allowed in peers.values() for one in allowed)
    text = running.podgate("rules", "x/a").stdout
    assert "egress: not isolated, everything may pass" in text
    assert "x/web" in text
    assert "8000-8080/TCP" in text
    assert "egress: isolated, nothing may pass" in running.podgate("rules", "x/c").stdout
    assert "ingress: not isolated" in running.podgate("rules", "x/b").stdout


def test_flows(running: RunningAgent) -> None:
    lab = running.lab
    stream = Stream(lab, "x/b", "x/a")
    (row,) = as_json(running, "flows")
    assert {
        "verdict": "allow", "reason": "policy-rule", "policy": "x/web", "dst_port": 80, "protocol": "TCP",
        "src": lab.address("x/b"), "src_pod": "x/b", "dst": lab.address("x/a"), "dst_pod": "x/a",
        "ingress_judged": True, "egress_judged": False, "state": "ESTABLISHED",
    }.items() <= row.items()  # fmt: skip
    assert row["src_port"] == stream.sock.getsockname()[1]
    text = running.podgate("flows").stdout
    assert f"x/b:{row['src_port']}" in text
    assert "x/a:80" in text
    assert "1 flows" in text or "1 flow" in text


BAD = {
    "no-such-command": (["enforce"], 2, "enforce"),
    "bad-option": (["status", "--wait"], 2, "--wait"),
    "bad-number": (["status", "--wait-ready", "soon"], 2, "soon"),
    "bad-format": (["status", "-o", "yaml"], 2, "yaml"),
    "no-pod": (["rules"], 2, "POD"),
    "unknown-pod": (["rules", "x/nobody"], 2, "x/nobody"),
    "pod-without-namespace": (["explain", "--from", "a", "--to", "x/a", "--port", "80"], 2, "namespace/pod"),
    "unknown-from": (["explain", "--from", "x/zz", "--to", "x/a", "--port", "80"], 2, "x/zz"),
    "bad-port": (["explain", "--from", "x/b", "--to", "x/a", "--port", "http"], 2, "80/TCP"),
    "big-port": (["explain", "--from", "x/b", "--to", "x/a", "--port", "70000/TCP"], 2, "70000"),
    "bad-protocol": (["explain", "--from", "x/b", "--to", "x/a", "--port", "80/GRE"], 2, "80/GRE"),
    "bad-address": (["explain", "--from", "10.1.0.300", "--to", "x/a", "--port", "80"], 2, "10.1.0.300"),
    "bad-family": (["explain", "--from", "x/b", "--to", "x/a", "--port", "80", "--family", "5"], 2, "5"),
    "no-family": (
        ["explain", "--from", "203.0.113.1", "--to", "x/a", "--port", "80", "--family", "6"], 2, "family",
    ),
    "missing-path": (
        ["explain", "/no/such/file.yaml", "--from", "x/b", "--to", "x/a", "--port", "80"], 2,
        "/no/such/file.yaml",
    ),
    "missing-port": (["explain", "--from", "x/b", "--to", "x/a"], 2, "--port"),
    "agent-without-source": (["agent"], 2, "--source"),
    "agent-mask": (["agent", "--source", "/tmp", "--mark-mask", "0x1"], 2, "three bits"),
    "agent-mask-word": (["agent", "--source", "/tmp", "--mark-mask", "all"], 2, "--mark-mask"),
    "agent-ip": (["agent", "--source", "/tmp", "--node-ip", "10.0.0"], 2, "10.0.0"),
    "agent-mode": (["agent", "--source", "/tmp", "--mode", "lenient"], 2, "lenient"),
    "agent-queues": (["agent", "--source", "/tmp", "--queues", "0"], 2, "--queues"),
    "agent-source": (["agent", "--source", "/no/such/dir"], 2, "/no/such/dir"),
}  # fmt: skip


def test_errors_are_one_line(running: RunningAgent) -> None:
    for name, (argv, code, word) in BAD.items():
        done = running.podgate(*argv, check=False)
        assert "Traceback" not in done.stderr, name
        fails(done, code, word)
    assert running.status()["ready"]


def test_no_agent(lab: LabFactory, tmp_path: Path) -> None:
    one = lab(["x/a"])
    socket = str(tmp_path / "none.sock")
    asked = ["explain", "--from", "x/a", "--to", "x/a", "--port", "80"]
    for argv in (["status"], ["status", "--wait-ready", "0.2"], ["flows"], ["rules", "x/a"], asked):
        fails(run(one, *argv, "--control", socket), 1, "no agent at", socket)
    stale = tmp_path / "stale.sock"
    stale.write_text("")
    done = run(one, "status", "--control", str(stale))
    fails(done, 1, str(stale))


def test_an_agent_that_hangs(running: RunningAgent) -> None:
    assert running.process is not None
    running.process.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    try:
        done = running.podgate("status", "--wait-ready", "1", check=False)
    finally:
        running.process.send_signal(signal.SIGCONT)
    fails(done, 1, "does not answer")
    assert time.monotonic() - began < 5
    assert running.status()["ready"]


def test_explain_warns_of_bad_objects(lab: LabFactory, tmp_path: Path) -> None:
    one = lab(["x/a", "x/b"])
    bad = policy("x", "p", select(one, "x/a"), ingress=[{"cidr": "wrong"}, rule("10.0.0.0/8", "80/TCP")])
    path = tmp_path / "p.yaml"
    path.write_text(yaml.safe_dump(bad))
    done = run(one, "explain", str(path), "--from", one.address("x/b"), "--to", "x/a", "--port", "80")
    assert done.returncode == 0
    assert done.stdout.startswith("ALLOW")
    assert "warning" in done.stderr
    assert "spec.ingress[0].cidr" in done.stderr
    assert str(path) in done.stderr


@pytest.mark.parametrize(
    "command", ["agent", "status", "explain", "rules", "flows", "doctor", "cleanup", "lab"]
)
def test_help_has_an_example(lab_name: str, command: str) -> None:
    done = subprocess.run([*PODGATE, command, "--help"], capture_output=True, text=True, check=True)
    assert "podgate " + command in done.stdout
    assert "Example" in done.stdout


def test_doctor(lab: LabFactory) -> None:
    one = lab(["x/a"])
    before = one.run("node", "iptables-save").stdout
    done = run(one, "doctor")
    assert done.returncode in (0, 1)
    assert "Traceback" not in done.stderr
    assert done.stdout
    found = run(one, "doctor", "-o", "json")
    assert json.loads(found.stdout)
    after = one.run("node", "iptables-save").stdout
    assert [line for line in after.splitlines() if line.startswith("-A")] == [
        line for line in before.splitlines() if line.startswith("-A")
    ]


def test_cleanup_says_what_it_removed(running: RunningAgent) -> None:
    lab = running.lab
    stream = Stream(lab, "x/b", "x/a")
    running.kill()
    removed = json.loads(run(lab, "cleanup", "-o", "json").stdout)["removed"]
    text = "\n".join(removed)
    for word in ("iptables", "ip6tables", "IP sets", "device group"):
        assert word in text
    again = run(lab, "cleanup")
    assert (again.returncode, again.stdout) == (0, "nothing of podgate is here\n")
    assert stream.flows()
