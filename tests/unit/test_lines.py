"""Verdict records as lines of text."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest

from dataplane.observe.events import flag_names
from dataplane.observe.lines import Lines, clock, decision, end, protocol

NO_END = {"reason": None, "policy": None, "rule": None}


def record(**more: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "ts": "2026-01-02T03:04:05.678901+00:00",
        "verdict": "deny",
        "reason": "no-rule",
        "direction": "ingress",
        "policy": None,
        "rule": None,
        "src": "10.0.0.1",
        "src_port": 40112,
        "dst": "10.0.0.2",
        "dst_port": 5432,
        "protocol": "TCP",
        "src_pod": "shop/web",
        "dst_pod": "shop/db",
        "tcp_flags": "SYN",
        "icmp_type": None,
        "icmp_code": None,
        "egress": {"reason": "not-isolated", "policy": None, "rule": None},
        "ingress": {"reason": "no-rule", "policy": None, "rule": None},
        "cached": False,
        "generation": 7,
    }
    return made | more


def test_a_line_says_who_what_and_why() -> None:
    when = datetime.fromisoformat("2026-01-02T03:04:05.678901+00:00").astimezone().strftime("%H:%M:%S.%f")
    assert Lines().line(record()).split() == [
        *[when, "deny", "shop/web:40112", ">", "shop/db:5432", "TCP", "SYN", "ingress:", "no-rule"],
        *["evaluated,", "table", "7"],
    ]


def test_both_ends_are_named_where_rules_of_both_allowed() -> None:
    egress = {"reason": "policy-rule", "policy": "shop/out", "rule": 2}
    ingress = {"reason": "policy-rule", "policy": "shop/in", "rule": 0}
    both = record(
        verdict="allow", reason="policy-rule", direction="egress", policy="shop/out", rule=2,
        egress=egress, ingress=ingress,
    )  # fmt: skip
    assert decision(both) == "egress: policy-rule of shop/out rule 2, ingress: policy-rule of shop/in rule 0"


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, "ingress: no-rule"),
        ({"policies": ["x/a", "x/b"]}, "ingress: no-rule (isolated by x/a, x/b)"),
        ({"policies": list("abcde")}, "ingress: no-rule (isolated by a, b, c and 2 more)"),
        (
            {"verdict": "allow", "reason": "audit", "would_deny": "no-rule", "policies": ["x/a"]},
            "ingress: audit, would deny: no-rule (isolated by x/a)",
        ),
        ({"verdict": "allow", "reason": "not-isolated", "direction": "egress"}, "egress: not-isolated"),
        ({"reason": "malformed", "direction": None, "egress": NO_END, "ingress": NO_END}, "malformed"),
        (
            {"verdict": "allow", "reason": "reply", "direction": "ingress", "policy": "x/p", "rule": 0},
            "ingress: reply (x/p rule 0)",
        ),
    ],
)
def test_the_deciding_end_comes_with_its_reason(more: dict[str, Any], expected: str) -> None:
    assert decision(record(**more)) == expected


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, "shop/web:40112"),
        ({"src_pod": None}, "10.0.0.1:40112"),
        ({"src_pod": None, "src": "fd00::1"}, "[fd00::1]:40112"),
        ({"src_pod": None, "src_port": None, "src": "fd00::1"}, "fd00::1"),
        ({"src_port": None}, "shop/web"),
        ({"src_pod": None, "src": None, "src_port": None}, "?"),
    ],
)
def test_ends_are_pods_or_addresses(more: dict[str, Any], expected: str) -> None:
    assert end(record(**more), "src") == expected


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, "TCP SYN"),
        ({"protocol": "UDP", "tcp_flags": None}, "UDP"),
        ({"protocol": "ICMP", "tcp_flags": None, "icmp_type": 8, "icmp_code": 0}, "ICMP echo"),
        ({"protocol": "ICMP", "tcp_flags": None, "icmp_type": 13, "icmp_code": 0}, "ICMP 13/0"),
    ],
)
def test_protocols_show_flags_and_types(more: dict[str, Any], expected: str) -> None:
    assert protocol(record(**more)) == expected


def test_columns_stay_aligned_once_they_have_grown() -> None:
    lines = Lines()
    longest = lines.line(record(src_pod="a-long-namespace/a-long-pod-name-of-a-deployment"))
    shorter = lines.line(record())
    assert shorter.index("TCP") == longest.index("TCP")
    assert shorter.index("evaluated") == longest.index("evaluated")


def test_colour_only_where_asked_for() -> None:
    assert "\x1b" not in Lines().line(record())
    assert "\x1b[31mdeny" in Lines(colour=True).line(record())


def test_losses_are_told_in_words() -> None:
    lines = Lines()
    assert lines.line({"lost": 1200, "where": "reader"}) == (
        "-- 1,200 records lost: this reader was too slow --"
    )
    assert "1 record lost" in lines.line({"lost": 1, "where": "ring"})


def test_flag_names() -> None:
    assert [flag_names(bits) for bits in (0x02, 0x12, 0x11, 0)] == ["SYN", "SYN,ACK", "FIN,ACK", "-"]


def test_a_record_without_time_has_no_clock() -> None:
    assert clock(None) == ""
