"""What `podgate intercept` prints of packets, for people and for machines."""

from __future__ import annotations

import io
import json
from collections import Counter
from typing import Any

import pytest

from dataplane.cli.intercept import _Printer

RECORD: dict[str, Any] = {
    "ts": "2026-01-02T03:04:05.000006+00:00",
    "verdict": "allow",
    "reason": "policy-rule",
    "direction": "ingress",
    "policy": "x/web",
    "rule": 0,
    "ingress": {"reason": "policy-rule", "policy": "x/web", "rule": 0},
    "src": "10.0.0.1",
    "src_port": 7,
    "src_pod": "x/b",
    "dst": "10.0.0.2",
    "dst_port": 9,
    "dst_pod": "x/a",
    "protocol": "UDP",
}
BY_HOOK = {**RECORD, "reason": "hook", "direction": None, "policy": None, "rule": None}
RULES = "the rules: allow, ingress: policy-rule of x/web rule 0"


def printed(record: dict[str, Any], did: str, why: str = "", **more: bool) -> str:
    out = io.StringIO()
    printer = _Printer(out, more.get("as_json", False), more.get("verbose", True))
    printer.show(RECORD, {"did": did, "why": why, "record": record})
    return out.getvalue()


@pytest.mark.parametrize(
    ("did", "why", "end"),
    [
        ("drop", "", f"hook  {RULES}"),
        ("allow", "", f"hook  {RULES}"),
        ("rewrite", "5 to 7 bytes", f"hook  rewritten, 5 to 7 bytes; {RULES}"),
        ("delay", "0.2 s", "ingress: policy-rule of x/web rule 0  delayed 0.2 s"),
        ("engine", "", "ingress: policy-rule of x/web rule 0"),
        ("timeout", "", "no answer in time"),
        ("error", "hook.py:3: KeyError: 'x'", "hook.py:3: KeyError: 'x'"),
        ("refused", "a delay must be 0 to 10 seconds", "a delay must be 0 to 10 seconds"),
    ],
)
def test_lines(did: str, why: str, end: str) -> None:
    record = BY_HOOK if did in ("drop", "allow", "rewrite") else RECORD
    line = " ".join(printed(record, did, why).split())
    assert line.endswith(" ".join(end.split()))
    assert "x/b:7 > x/a:9 UDP" in line
    quiet = printed(record, did, why, verbose=False)
    assert bool(quiet) is (did in ("drop", "allow", "rewrite", "delay"))


def test_machines_are_told_what_was_proposed() -> None:
    row = json.loads(printed(BY_HOOK, "drop", as_json=True))
    assert row["proposed"] == {
        "verdict": "allow",
        "reason": "policy-rule",
        "direction": "ingress",
        "policy": "x/web",
        "rule": 0,
    }
    assert (row["hook"], row["why"], row["reason"]) == ("drop", None, "hook")


def test_a_warning_comes_once_and_the_end_tells_all(capsys: pytest.CaptureFixture[str]) -> None:
    printer = _Printer(io.StringIO(), False, False)
    for _ in range(2):
        printer.show(RECORD, {"did": "timeout", "why": "", "record": RECORD})
    printer.end({"asked": 1234, "engine": 1000, "drop": 1, "timeout": 2}, Counter({"SYNs": 1500}))
    printer.end({"asked": 1}, Counter())
    assert capsys.readouterr().err.splitlines() == [
        "-- the hook does not answer in time; until it does, the rules decide --",
        "1,234 packets: 1,000 left to the rules, 1 dropped, 2 not answered in time",
        "counted by the hook: SYNs 1,500",
        "1 packet",
    ]
