"""Policies made of recorded traffic allow it, and nothing that was not seen between these workloads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import captures
import pytest
import yaml
from click.testing import CliRunner, Result
from scapy.layers.inet import ICMP, IP, UDP
from test_replay import BACKEND, CLIENT, FRONTEND, NODE, OUTSIDE, STARS, UI, tcp

from dataplane.cli.advise import command
from dataplane.errors import InputError
from dataplane.model import Snapshot
from dataplane.policy.explain import parse_port
from dataplane.policy.matrix import reachability
from dataplane.policy.resolve import in_force
from dataplane.sources.directory import read_paths

PODS = STARS / "pods.yaml"
PODGATE = (sys.executable, "-c", "from dataplane.cli import main; main()")
ADDRESSES = {"client/client": CLIENT, "stars/frontend": FRONTEND, "stars/backend": BACKEND}
ADDRESSES["management-ui/management-ui"] = UI


def connection(src: str, dst: str, port: int, sport: int = 40000, *, answered: bool = True) -> list[Any]:
    opens = [tcp(src, sport, dst, port, "S")]
    return [*opens, tcp(dst, port, src, sport, "SA")] if answered else opens


def capture(path: Path, packets: list[Any]) -> Path:
    frames = [(1e9 + number, bytes(each)) for number, each in enumerate(packets)]
    return captures.write(path / "seen.pcap", captures.pcap(captures.RAW, frames))


def flow_log(path: Path, *records: dict[str, Any]) -> Path:
    defaults = {
        "ts": "2026-01-01T00:00:00+00:00",
        "verdict": "allow",
        "reason": "policy-rule",
        "direction": "ingress",
        "policy": None,
        "src_port": 40000,
        "protocol": "TCP",
        "src_pod": None,
        "dst_pod": None,
        "node": "node-1",
    }
    lines = [json.dumps(defaults | each) + "\n" for each in records]
    return captures.write(path / "flows.jsonl", "".join(lines).encode())


def run(*argv: object) -> Result:
    return CliRunner().invoke(command, [str(each) for each in argv])


def advised(*argv: object) -> dict[str, Any]:
    """The specs of the advised policies, by namespace/name."""
    result = run(*argv)
    assert result.exception is None, result.exception
    return {
        f"{each['metadata']['namespace']}/{each['metadata']['name']}": each["spec"]
        for each in yaml.safe_load_all(result.stdout)
    }


def pod(name: str, ip: str, **labels: str) -> str:
    namespace, _, own = name.partition("/")
    return yaml.safe_dump(
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": own, "namespace": namespace, "labels": labels},
            "status": {"phase": "Running", "hostIP": "192.0.2.1", "podIPs": [{"ip": ip}]},
        },
        explicit_start=True,
    )


# ---- what was seen comes out again ------------------------------------------------------------------


def test_the_stars_are_reached_as_under_their_own_policies(tmp_path: Path) -> None:
    # Everybody tries everything; what the example's policies allow is answered.
    ports = [parse_port(text) for text in ("80/TCP", "6379/TCP", "9000/TCP", "9001/TCP")]

    def matrix(known: Snapshot) -> Any:
        return reachability(in_force(known), ports, (), None).matrix()

    wanted = matrix(read_paths([STARS]).snapshot)
    packets: list[Any] = []
    for source in wanted.order:
        for destination in wanted.order:
            for port in ports:
                if source != destination:
                    answered = wanted.allows(source, destination, str(port))
                    ends = ADDRESSES[source], ADDRESSES[destination]
                    packets += connection(*ends, port.number, answered=answered)
    result = run(capture(tmp_path, packets), PODS)
    assert result.exception is None, result.exception
    advice = captures.write(tmp_path / "advised.yaml", result.stdout.encode())
    got = matrix(read_paths([PODS, advice]).snapshot)
    assert not got.diff(wanted)
    assert "proven: with these policies alone all that traffic passes" in result.stderr
    assert "also allowed" not in result.stderr


def test_one_policy_for_a_workload_with_peers_at_the_same_ports_in_one_rule(tmp_path: Path) -> None:
    packets = [
        *connection(FRONTEND, BACKEND, 6379),
        *connection(UI, BACKEND, 6379),
        *connection(CLIENT, BACKEND, 9000),
        *connection(BACKEND, OUTSIDE, 443),
    ]
    found = advised(capture(tmp_path, packets), PODS)
    assert sorted(found) == [
        "client/advised-client",
        "management-ui/advised-management-ui",
        "stars/advised-backend",
        "stars/advised-frontend",
    ]
    ui = {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "management-ui"}},
        "podSelector": {"matchLabels": {"app": "management-ui"}},
    }
    client = {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "client"}},
        "podSelector": {"matchLabels": {"app": "client"}},
    }
    assert found["stars/advised-backend"] == {
        "podSelector": {"matchLabels": {"app": "backend"}},
        "policyTypes": ["Ingress", "Egress"],
        "ingress": [
            {
                "from": [ui, {"podSelector": {"matchLabels": {"app": "frontend"}}}],
                "ports": [{"protocol": "TCP", "port": 6379}],
            },
            {"from": [client], "ports": [{"protocol": "TCP", "port": 9000}]},
        ],
        "egress": [
            {
                "to": [{"ipBlock": {"cidr": f"{OUTSIDE}/32"}}],
                "ports": [{"protocol": "TCP", "port": 443}],
            }
        ],
    }
    assert found["stars/advised-frontend"]["ingress"] == []


def test_ports_that_follow_each_other_are_one_range(tmp_path: Path) -> None:
    packets = [
        each for port in (7000, 7001, 7002, 7004) for each in connection(FRONTEND, BACKEND, port, 50000)
    ]
    found = advised(capture(tmp_path, packets), PODS)
    assert found["stars/advised-backend"]["ingress"][0]["ports"] == [
        {"protocol": "TCP", "port": 7000, "endPort": 7002},
        {"protocol": "TCP", "port": 7004},
    ]


def test_one_direction_and_prefixes_outside(tmp_path: Path) -> None:
    packets = [*connection("203.0.113.9", FRONTEND, 80), *connection("203.0.113.77", FRONTEND, 80)]
    path = capture(tmp_path, packets)
    found = advised(path, PODS, "--direction", "ingress", "--outside-prefix", "24")
    assert found["stars/advised-frontend"] == {
        "podSelector": {"matchLabels": {"app": "frontend"}},
        "policyTypes": ["Ingress"],
        "ingress": [
            {
                "from": [{"ipBlock": {"cidr": "203.0.113.0/24"}}],
                "ports": [{"protocol": "TCP", "port": 80}],
            }
        ],
    }


# ---- what counts as seen ----------------------------------------------------------------------------


def test_what_nobody_answered_or_a_firewall_refused_is_not_counted(tmp_path: Path) -> None:
    packets = [
        *connection(FRONTEND, BACKEND, 6379),
        *connection(CLIENT, BACKEND, 6379, answered=False),
        tcp(UI, 40000, BACKEND, 6379, "S"),
        tcp(BACKEND, 6379, UI, 40000, "RA"),
    ]
    path = capture(tmp_path, packets)
    assert sorted(advised(path, PODS)) == ["stars/advised-backend", "stars/advised-frontend"]
    assert "not counted: 2 flows unanswered or refused" in run(path, PODS).stderr
    assert "client/advised-client" in advised(path, PODS, "--unanswered")


def test_datagrams_without_an_answer_count_as_far_as_policies_allow_them(tmp_path: Path) -> None:
    packets = [
        IP(src=FRONTEND, dst=BACKEND) / UDP(sport=40000, dport=514),
        IP(src=UI, dst=BACKEND) / UDP(sport=40000, dport=514),
    ]
    path = capture(tmp_path, packets)
    assert "stars/advised-frontend" in advised(path, PODS)
    # Under the example's policies only the UI's were let through.
    assert sorted(advised(path, STARS)) == ["management-ui/advised-management-ui", "stars/advised-backend"]


def test_own_node_and_icmp_are_left_out(tmp_path: Path) -> None:
    packets = [
        *connection(NODE, BACKEND, 8080),
        IP(src=FRONTEND, dst=BACKEND) / ICMP(type=8, id=1),
        IP(src=BACKEND, dst=FRONTEND) / ICMP(type=0, id=1),
    ]
    result = run(capture(tmp_path, packets), PODS)
    assert result.exception is None
    # A ping alone: both are isolated and nothing is allowed.
    specs = {each["metadata"]["name"]: each["spec"] for each in yaml.safe_load_all(result.stdout)}
    assert {name: (spec["ingress"], spec["egress"]) for name, spec in specs.items()} == {
        "advised-backend": ([], []),
        "advised-frontend": ([], []),
    }
    assert "only with every port besides: stars/frontend → stars/backend ICMP" in result.stderr


def test_a_service_stands_for_the_pods_behind_it(tmp_path: Path) -> None:
    service = tmp_path / "service.yaml"
    service.write_text(
        "{apiVersion: v1, kind: Service, metadata: {name: web, namespace: stars},"
        " spec: {clusterIP: 172.20.0.10, selector: {app: frontend},"
        " ports: [{port: 8080, targetPort: http, protocol: TCP}]}}"
    )
    found = advised(capture(tmp_path, connection(CLIENT, "172.20.0.10", 8080)), PODS, service)
    assert found["stars/advised-frontend"]["ingress"][0]["ports"] == [{"protocol": "TCP", "port": 80}]
    (rule,) = found["client/advised-client"]["egress"]
    assert rule["to"][0]["podSelector"] == {"matchLabels": {"app": "frontend"}}


# ---- flow logs --------------------------------------------------------------------------------------


def test_a_flow_log(tmp_path: Path) -> None:
    web = {"src": CLIENT, "dst": FRONTEND, "dst_port": 80}
    path = flow_log(
        tmp_path,
        web,
        web | {"src_port": 40001, "reason": "audit", "src_pod": "client/client"},
        {"src": CLIENT, "dst": BACKEND, "dst_port": 6379, "verdict": "deny", "reason": "no-rule"},
        {"src": FRONTEND, "dst": CLIENT, "dst_port": 40000, "reason": "reply", "reply": True},
        {"src": NODE, "dst": FRONTEND, "dst_port": 80, "reason": "own-node"},
        web | {"event": "end", "packets": 5},
        web | {"dst_port": 81, "reason": "audit", "would_deny": "spoofed"},
        {"event": "suppressed", "verdict": None, "src": None, "dst": None, "count": 3},
    )
    with path.open("a") as file:
        file.write('{"ts": "2026-01-01T0')  # torn
    assert sorted(advised(path, PODS)) == ["client/advised-client", "stars/advised-frontend"]
    told = run(path, PODS).stderr
    assert "2 policies for 2 flows (1 different one that a policy can name)" in told
    assert "not counted: 2 flows denied" in told
    assert "warning: the log lacks lines (3 suppressed, 1 unreadable): what they would have told" in told


def test_a_flow_that_began_before_the_log_counts_at_its_end(tmp_path: Path) -> None:
    path = flow_log(tmp_path, {"event": "end", "src": CLIENT, "dst": FRONTEND, "dst_port": 80, "packets": 9})
    assert sorted(advised(path, PODS)) == ["client/advised-client", "stars/advised-frontend"]


def test_a_pod_of_a_flow_log_goes_by_its_name(tmp_path: Path) -> None:
    # Its address has changed since; another pod, that is gone, cannot be named.
    path = flow_log(
        tmp_path,
        {"src": "10.9.9.9", "src_pod": "client/client", "dst": FRONTEND, "dst_port": 80},
        {"src": "10.9.9.8", "src_pod": "client/gone", "dst": FRONTEND, "dst_port": 80},
    )
    result = run(path, PODS)
    assert result.exception is None
    assert "10.9.9" not in result.stdout
    assert "not counted: 1 flow of client/gone, which is not in PATH" in result.stderr
    assert "proven" in result.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty, neither a capture nor a flow log"),
        ("hello\n", "neither a capture nor a flow log: no line of it is JSON"),
        ("[]\n", "line 1 is no flow log's: it is no JSON object"),
        ('{"kind": "Pod"}', "line 1 is no flow log's: it has no 'verdict'"),
        (
            '{"verdict": "allow", "src": "10.1.0.10", "dst": "10.1.0.20"}',
            "line 1 is no flow log's: it has no",
        ),
        (
            '{"verdict": "allow", "reason": "x", "src": "10.1", "dst": "10.1.0.20", "protocol": "TCP"}',
            "'10.1' is not an IP address",
        ),
        (
            '{"verdict": "allow", "reason": "x", "src": "10.1.0.10", "dst": "10.1.0.20", "protocol": "TCP",'
            ' "dst_port": 70000}',
            "dst_port is 70000",
        ),
    ],
)
def test_what_is_no_flow_log_is_said(tmp_path: Path, text: str, message: str) -> None:
    error = run(captures.write(tmp_path / "flows", text.encode()), PODS).exception
    assert isinstance(error, InputError)
    assert message in str(error)


def test_standard_input_and_exit_status(tmp_path: Path) -> None:
    path = capture(tmp_path, connection(CLIENT, FRONTEND, 80))
    for file in (path, flow_log(tmp_path, {"src": CLIENT, "dst": FRONTEND, "dst_port": 80})):
        argv = [*PODGATE, "advise", "-", str(PODS), "-o", "json"]
        done = subprocess.run(argv, input=file.read_bytes(), capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        document = json.loads(done.stdout)
        assert [each["manifest"]["metadata"]["name"] for each in document["policies"]] == [
            "advised-client",
            "advised-frontend",
        ]
        assert (document["flows"], document["denied"], document["also_allowed"]) == (1, [], [])
    done = subprocess.run([*PODGATE, "advise", "nowhere", str(PODS)], capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr == b"podgate: nowhere: No such file or directory\n"


# ---- workloads --------------------------------------------------------------------------------------


def test_workloads_go_by_labels_that_outlive_a_roll_out_and_the_rest_is_told(tmp_path: Path) -> None:
    pods = captures.write(
        tmp_path / "pods.yaml",
        (
            pod("x/web-1", "10.0.0.1", app="web", **{"pod-template-hash": "a"})
            + pod("x/web-2", "10.0.0.2", app="web", **{"pod-template-hash": "b"})
            + pod("x/db", "10.0.0.3", app="db")
        ).encode(),
    )
    path = capture(tmp_path, connection("10.0.0.1", "10.0.0.3", 5432))
    assert advised(path, pods)["x/advised-web"]["podSelector"] == {"matchLabels": {"app": "web"}}
    assert (
        "also allowed: x/web → x/db 5432/TCP between 1 more pairs of pods than the 1 seen"
        in run(path, pods).stderr
    )


def test_pods_that_no_label_tells_apart_are_said(tmp_path: Path) -> None:
    pods = captures.write(
        tmp_path / "pods.yaml", (pod("x/a", "10.0.0.1") + pod("x/b", "10.0.0.2", app="b")).encode()
    )
    result = run(capture(tmp_path, connection("10.0.0.1", "10.0.0.2", 80)), pods)
    assert result.exception is None
    assert "# x/a has no labels: this selects every pod of x" in result.stdout
    assert "# x/a has no labels: a rule can only name its address, which may change" in result.stdout
