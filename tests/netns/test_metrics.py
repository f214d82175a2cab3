"""Scrapes and probes of a live agent, against packets that were really sent."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable

import pytest
from conftest import PODGATE, AgentFactory, LabFactory, RunningAgent, import_path
from objects import allow, deny, policy, select
from prometheus_client.parser import text_string_to_metric_families
from traffic import received, udp

from dataplane.lab.world import Lab

pytestmark = pytest.mark.netns

METRICS, HEALTH = "http://127.0.0.1:8162/metrics", "http://127.0.0.1:8163"
Labels = tuple[tuple[str, str], ...]
Samples = dict[tuple[str, Labels], float]


def fetch(lab: Lab, url: str) -> tuple[int, str]:
    """Status and body, from inside the node; status 0: nobody answers."""
    code = (
        "import sys, urllib.request, urllib.error\n"
        "try:\n answer = urllib.request.urlopen(sys.argv[1], timeout=10)\n"
        "except urllib.error.HTTPError as error:\n answer = error\n"
        "except urllib.error.URLError as error:\n print(0, error.reason, sep='\\n'); sys.exit()\n"
        "print(answer.status, answer.read().decode(), sep='\\n', end='')"
    )
    done = lab.run("node", PODGATE[0], "-c", code, url)
    status, _, body = done.stdout.partition("\n")
    return int(status), body


def parse(text: str) -> Samples:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def scrape(lab: Lab) -> Samples:
    status, body = fetch(lab, METRICS)
    assert status == 200, body
    return parse(body)


def key(name: str, **labels: str) -> tuple[str, Labels]:
    return name, tuple(sorted(labels.items()))


def grown(before: Samples, after: Samples, name: str) -> dict[Labels, float]:
    """By how much each series of a counter grew, those that did."""
    return {
        labels: value - before.get((each, labels), 0)
        for (each, labels), value in after.items()
        if each == name and value != before.get((each, labels), 0)
    }


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.02)


@pytest.fixture
def running(lab: LabFactory, agent: AgentFactory) -> RunningAgent:
    """b takes port 53/UDP from a alone; c may send nothing; d is open."""
    one = lab(["x/a", "x/b", "x/c", "x/d"])
    return agent(
        one,
        policy("x", "dns", select(one, "x/b"), ingress=allow(one, "x/a", ports=["53/UDP"])),
        policy("x", "dns-too", select(one, "x/b"), ingress=[]),
        deny(one, "x/c", directions="egress", name="quiet"),
    )


def test_counters_grow_by_what_was_sent(running: RunningAgent) -> None:
    lab = running.lab
    b = lab.address("x/b")
    target, wrong = udp(lab, "x/b", 53), udp(lab, "x/b", 54)
    sources = [udp(lab, place, port) for place, port in (("x/a", 4001), ("x/a", 4002), ("x/c", 4003))]
    spoofing = udp(lab, "x/d", 4004, address="203.0.113.66")
    try:
        before = scrape(lab)
        for source in sources[:2]:  # two flows, whose later packets the kernel passes
            source.sendto(b"one", (b, 53))
            assert received(target, 2.0, 1)
            for _ in range(3):
                source.sendto(b"more", (b, 53))
            assert len(received(target, 2.0, 3)) == 3
        for _ in range(5):
            sources[0].sendto(b"denied at b", (b, 54))
        for _ in range(7):
            sources[2].sendto(b"denied at c", (b, 53))
        for _ in range(4):
            spoofing.sendto(b"forged", (b, 53))
        assert received(wrong) == []
        after = scrape(lab)
    finally:
        for sock in (target, wrong, spoofing, *sources):
            sock.close()
    verdicts = {
        tuple(value for _, value in labels): count
        for labels, count in grown(before, after, "podgate_verdicts_total").items()
    }
    assert verdicts == {
        ("ingress", "policy-rule", "allow"): 2,
        ("ingress", "no-rule", "deny"): 5,
        ("egress", "no-rule", "deny"): 7,
    }
    at_b = {"namespace": "x", "pod": "b", "direction": "ingress"}
    assert grown(before, after, "podgate_pod_allowed_flows_total") == {key("", **at_b)[1]: 2}
    assert grown(before, after, "podgate_pod_denied_packets_total") == {
        key("", **at_b, reason="no-rule")[1]: 5,
        key("", namespace="x", pod="c", direction="egress", reason="no-rule")[1]: 7,
    }
    of_dns = {"namespace": "x", "policy": "dns", "direction": "ingress"}
    assert grown(before, after, "podgate_policy_allowed_flows_total") == {key("", **of_dns)[1]: 2}
    assert grown(before, after, "podgate_policy_denied_packets_total") == {
        key("", **of_dns)[1]: 5,
        key("", **(of_dns | {"policy": "dns-too"}))[1]: 5,
        key("", namespace="x", policy="quiet", direction="egress")[1]: 7,
    }
    assert grown(before, after, "podgate_steering_dropped_packets_total") == {(("reason", "spoofed"),): 4}
    # 3 bytes and 28 of headers for the first packets of the two flows.
    sizes = grown(before, after, "podgate_verdict_bytes_total")
    assert sizes[key("", direction="ingress", verdict="allow", reason="policy-rule")[1]] == 2 * 31
    assert grown(before, after, "podgate_queue_packets_total") == {(): 14}
    misses = grown(before, after, "podgate_flow_cache_misses_total")
    hits = grown(before, after, "podgate_flow_cache_hits_total")
    assert misses == {(): 4}  # two flows allowed, two denied
    assert hits == {(): 10}
    assert after[key("podgate_ready")] == 1
    assert after[key("podgate_table_isolated_pods")] == 2
    assert after[key("podgate_queue_depth", queue="0")] == 0
    assert after[key("podgate_objects", kind="Pod")] == 4
    assert after[key("podgate_change_to_force_seconds_count")] >= 1
    assert after[key("podgate_conntrack_entries")] >= 4
    assert after[key("podgate_conntrack_entries_limit")] >= after[key("podgate_conntrack_entries")]


def test_counts_outlive_a_change_of_policies(running: RunningAgent) -> None:
    lab = running.lab
    source = udp(lab, "x/c", 4003)
    at_c = {"namespace": "x", "pod": "c", "direction": "egress", "reason": "no-rule"}
    denied = key("podgate_pod_denied_packets_total", **at_c)
    of_quiet = key("podgate_policy_denied_packets_total", namespace="x", policy="quiet", direction="egress")
    try:
        for _ in range(3):
            source.sendto(b"denied", (lab.address("x/b"), 53))
        until(lambda: running.status()["counters"].get("no-rule") == 3)
        # Never scraped under the first policies.
        running.write(deny(lab, "x/c", directions="egress", name="silent"))
        for _ in range(4):
            source.sendto(b"denied", (lab.address("x/b"), 53))
        until(lambda: running.status()["counters"].get("no-rule") == 7)
    finally:
        source.close()
    after = scrape(lab)
    assert after[denied] == 7
    assert after[of_quiet] == 3
    assert after[key(of_quiet[0], namespace="x", policy="silent", direction="egress")] == 4
    assert after[key("podgate_table_generation")] == running.status()["generation"]


def test_probes_follow_readiness(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/a"])
    running = agent(one, policy("x", "none", select(one, "x/a"), ingress=[]), wait=False)
    seen: set[tuple[int, str]] = set()

    def ready() -> bool:
        seen.add(fetch(one, f"{HEALTH}/readyz"))
        return (200, "ready\n") in seen

    until(ready, 30)
    assert {status for status, _ in seen} <= {0, 503, 200}
    assert all("starting" in body for status, body in seen if status == 503)
    assert fetch(one, f"{HEALTH}/healthz") == (200, "alive\n")
    assert fetch(one, f"{HEALTH}/metrics")[0] == 404
    assert running.terminate() == 0
    assert fetch(one, f"{HEALTH}/healthz")[0] == 0


def second(lab: Lab, running: RunningAgent, *options: str) -> subprocess.CompletedProcess[str]:
    """An agent that shares nothing with the first but what the options leave."""
    return lab.run(
        "node", "env", f"PYTHONPATH={import_path()}", *PODGATE, "agent", "--source", str(running.directory),
        "--control", str(running.control) + "2", "--queue-base", "9", *options, check=False,
    )  # fmt: skip


def test_a_port_in_use_is_named_with_its_option(running: RunningAgent) -> None:
    before = running.status()["generation"]
    done = second(running.lab, running)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1] == (
        "podgate: --metrics-bind-addr :8162: the port is in use; stop who has it, choose another port, or 0"
        " to serve nothing"
    )
    done = second(running.lab, running, "--metrics-bind-addr", "0", "--health-probe-bind-addr", "[::1]:8163")
    assert done.returncode == 2, done.stderr
    assert "podgate: --health-probe-bind-addr [::1]:8163: the port is in use" in done.stderr
    assert not re.search("Traceback", done.stderr)
    assert running.status()["generation"] == before
    assert fetch(running.lab, f"{HEALTH}/readyz") == (200, "ready\n")


def test_addresses_are_served_as_named(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/a"])
    agent(one, options=["--metrics-bind-addr", "[::1]:9000", "--health-probe-bind-addr", "0"])
    assert fetch(one, "http://[::1]:9000/metrics")[0] == 200
    assert fetch(one, "http://127.0.0.1:9000/metrics")[0] == 0
    assert fetch(one, f"{HEALTH}/healthz")[0] == 0


def test_one_address_serves_both(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/a"])
    agent(one, options=["--metrics-bind-addr", ":9000", "--health-probe-bind-addr", ":9000"])
    for address in ("127.0.0.1", "[::1]"):
        for path, word in (("metrics", "podgate_build_info"), ("healthz", "alive"), ("readyz", "ready")):
            status, body = fetch(one, f"http://{address}:9000/{path}")
            assert (status, word in body) == (200, True), body
