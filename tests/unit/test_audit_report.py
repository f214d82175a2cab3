"""What enforcement would break, from the lines of a flow log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from dataplane.cli.audit_report import command
from dataplane.errors import InputError
from dataplane.observe.audit import KEPT, AuditTally

OBJECTS = """\
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: Pod
metadata: {name: web-7d9-a, namespace: shop, labels: {app: web, pod-template-hash: 7d9}}
status: {podIPs: [{ip: 10.0.0.1}], hostIPs: [{ip: 192.0.2.1}]}
---
apiVersion: v1
kind: Pod
metadata: {name: web-7d9-b, namespace: shop, labels: {app: web, pod-template-hash: 7d9}}
status: {podIPs: [{ip: 10.0.0.2}], hostIPs: [{ip: 192.0.2.1}]}
---
apiVersion: v1
kind: Pod
metadata: {name: db-0, namespace: shop, labels: {app: db}}
status: {podIPs: [{ip: 10.0.0.3}], hostIPs: [{ip: 192.0.2.1}]}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: closed, namespace: shop, annotations: {podgate.dev/mode: audit}}
spec: {podSelector: {matchLabels: {app: db}}, policyTypes: [Ingress]}
"""


def line(**changes: Any) -> dict[str, Any]:
    return {
        "event": "audit",
        "ts": "2026-03-01T10:00:00.000000+00:00",
        "verdict": "allow",
        "reason": "audit",
        "would_deny": "no-rule",
        "direction": "ingress",
        "policy": None,
        "policies": ["shop/closed"],
        "src": "10.0.0.1",
        "src_port": 40000,
        "dst": "10.0.0.3",
        "dst_port": 5432,
        "protocol": "TCP",
        "src_pod": "shop/web-7d9-a",
        "dst_pod": "shop/db-0",
        "node": "n",
        **changes,
    }


LINES = [
    line(),
    line(src="10.0.0.2", src_pod="shop/web-7d9-b", ts="2026-03-01T09:00:00.000000+00:00"),
    # A reply belongs to what it answers.
    line(
        src="10.0.0.3",
        src_pod="shop/db-0",
        src_port=5432,
        dst="10.0.0.1",
        dst_pod="shop/web-7d9-a",
        dst_port=40000,
        reply=True,
    ),
    line(src="203.0.113.9", src_pod=None, protocol="ICMP", src_port=None, dst_port=None),
    line(would_deny="spoofed", direction="egress", policies=[], dst_port=9),
    line(event="flow", reason="policy-rule", would_deny=None),
    line(event="suppressed", verdict=None, would_deny=None, count=7),
]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "flows"
    path.write_text("".join(json.dumps(each) + "\n" for each in LINES))
    return path


def run(*argv: object) -> Result:
    result = CliRunner().invoke(command, [*map(str, argv)], catch_exceptions=True)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_with_objects_workloads_are_named_and_policies_written(log: Path, tmp_path: Path) -> None:
    objects = tmp_path / "dump.yaml"
    objects.write_text(OBJECTS)
    answer = json.loads(run(log, "--objects", objects, "-o", "json").stdout)
    rows = [
        (row["from"], row["to"], row["port"], row["reason"], row["packets"], row["pairs"])
        for row in answer["rows"]
    ]
    assert rows == [
        ("shop/web", "shop/db", "5432/TCP", "no-rule", 3, 2),
        ("203.0.113.9", "shop/db", "ICMP", "no-rule", 1, 1),
        ("shop/web", "shop/db", "9/TCP", "spoofed", 1, 1),
    ]
    assert answer["rows"][0]["policies"] == ["shop/closed"]
    assert (answer["packets"], answer["since"]) == (5, "2026-03-01T09:00:00.000000+00:00")
    # One for both pods of web, one for ICMP; none for what is not a policy's.
    assert len(answer["suggestions"]) == 2
    assert "app: web" in answer["suggestions"][0]
    assert "port: 5432" in answer["suggestions"][0]
    assert "NetworkPolicy cannot name ICMP" in answer["suggestions"][1]


def test_without_objects_pods_have_their_names(log: Path) -> None:
    text = run(log).stdout
    assert "shop/web-7d9-a" in text
    assert "shop/closed" in text
    assert "kind: NetworkPolicy" not in text


def test_lines_that_are_none_are_left_out_and_said(log: Path, tmp_path: Path) -> None:
    log.write_text(log.read_text() + "not json\n[1]\n" + '{"verdict": "allow", "would_deny": "no-rule"}\n')
    result = run(log, "-o", "json")
    assert "3 lines are no lines of a flow log; left out" in result.stderr
    assert json.loads(result.stdout)["packets"] == 5
    other = tmp_path / "other"
    other.write_text("hello\n")
    with pytest.raises(InputError, match="no line of a flow log in it"):
        run(other)
    with pytest.raises(InputError, match="No such file"):
        run(tmp_path / "missing")


def test_nothing_to_tell(tmp_path: Path) -> None:
    path = tmp_path / "flows"
    path.write_text(json.dumps(LINES[5]) + "\n")
    assert run(path).stdout == "Nothing was seen that enforcement would deny.\n"


def test_what_is_kept_is_bounded() -> None:
    tally = AuditTally()
    for number in range(KEPT + 5):
        tally.add(line(src=f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}", src_pod=None))
    assert (len(list(tally)), tally.more) == (KEPT, 5)
    tally.add(line(src="10.0.0.0", src_pod=None))
    assert tally.more == 5
