"""Compiled rule sets: what they answer, how they are laid out, how large they get."""

from __future__ import annotations

import itertools
import random
import time

import pytest

from dataplane._rules import RuleSet, RuleTable
from dataplane.addresses import Prefix, parse_address, parse_prefix
from dataplane.model import Key, PortRange, Rule
from dataplane.policy.compile import PodEntry
from dataplane.verdict import Allowed, Interval

TCP, UDP, SCTP, ICMP = 6, 17, 132, 1


def prefix(text: str) -> Prefix:
    return parse_prefix(text)[0]


def rule(cidr: str, *ports: tuple[int, int, int] | int, excepts: tuple[str, ...] = ()) -> Rule:
    """A rule; a bare number is that TCP port."""
    ranges = tuple(PortRange(TCP, p, p) if isinstance(p, int) else PortRange(*p) for p in ports)
    return Rule(prefix(cidr), tuple(map(prefix, excepts)), ranges)


def find(rules: RuleSet, peer: str, port: int = 0, protocol: int = TCP) -> int:
    return rules.find(parse_address(peer), protocol, port)


def shown(rules: RuleSet, family: int = 4) -> list[tuple[str, list[tuple[str, int]]]]:
    return [(i.peer, [(str(a), a.rule_id) for a in i.allowed]) for i in rules.intervals(family)]


# The four overlaps that a longest-prefix map gets wrong.
OVERLAPS = [
    (
        [rule("10.0.0.0/8", 80, excepts=("10.1.2.0/24",)), rule("10.1.0.0/16", 443)],
        [("10.1.2.9", 443, 1), ("10.1.2.9", 80, -1), ("10.1.3.9", 80, 0), ("10.1.3.9", 443, 1)],
    ),
    (
        [rule("10.0.0.0/8", 80, excepts=("10.1.2.0/24",)), rule("10.1.0.0/16", 443), rule("10.1.2.5/32", 22)],
        [("10.1.2.5", 80, -1), ("10.1.2.5", 443, 1), ("10.1.2.5", 22, 2)],
    ),
    (
        [rule("0.0.0.0/0", 53), rule("0.0.0.0/0", excepts=("10.0.0.0/8",))],
        [("10.0.0.10", 53, 0), ("10.0.0.10", 54, -1), ("9.255.255.255", 54, 1), ("11.0.0.0", 53, 0)],
    ),
    (
        [rule("0.0.0.0/0", excepts=("10.0.0.0/24",)), rule("10.0.0.0/16", 80)],
        [("10.0.5.5", 443, 0), ("10.0.0.5", 80, 1), ("10.0.0.5", 443, -1)],
    ),
]


@pytest.mark.parametrize(
    ("rules", "answers"), OVERLAPS, ids=["except+narrower", "three deep", "port+any", "any+port"]
)
def test_overlaps(rules: list[Rule], answers: list[tuple[str, int, int]]) -> None:
    compiled = RuleSet(rules)
    assert [find(compiled, peer, port) for peer, port, _ in answers] == [rule_id for _, _, rule_id in answers]


def test_no_rules_allow_nothing() -> None:
    compiled = RuleSet([])
    assert find(compiled, "10.0.0.1", 80) == find(compiled, "::1", 80) == -1
    assert compiled.intervals(4) == compiled.intervals(6) == []


def test_edges_of_the_address_space() -> None:
    compiled = RuleSet(
        [rule("0.0.0.0/32", 1), rule("255.255.255.255/32", 2), rule("::/128", 3), rule("ff00::/8", 4)]
    )
    assert [find(compiled, a, p) for a, p in [("0.0.0.0", 1), ("0.0.0.1", 1), ("255.255.255.255", 2)]] == [
        0,
        -1,
        1,
    ]
    assert find(compiled, "255.255.255.254", 2) == -1
    everything = "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"
    assert [find(compiled, a, p) for a, p in [("::", 3), ("::1", 3), ("ff00::", 4), (everything, 4)]] == [
        2,
        -1,
        3,
        3,
    ]


def test_ipv6_bounds_inside_and_across_the_halves() -> None:
    compiled = RuleSet(
        [
            rule("fd00::/64", 1),
            rule("fd00:0:0:1::ffff:0/112", 2),
            rule("fd00::/16", 3, excepts=("fd01::/17",)),
        ]
    )
    assert find(compiled, "fd00::ffff:ffff:ffff:ffff", 1) == 0
    assert find(compiled, "fd00:0:0:1::", 1) == -1
    assert [
        find(compiled, f"fd00:0:0:1::{tail}", 2) for tail in ("fffe:ffff", "ffff:0", "ffff:ffff", "1:0:0")
    ] == [-1, 1, 1, -1]
    assert [find(compiled, a, 3) for a in ("fd00:ffff::1", "fcff::", "fd01::")] == [2, -1, -1]


def test_families_do_not_meet() -> None:
    compiled = RuleSet([rule("0.0.0.0/0")])
    assert find(compiled, "::1") == -1
    assert find(compiled, "1.2.3.4") == 0


def test_ports_and_protocols() -> None:
    compiled = RuleSet(
        [rule("10.0.0.0/8", (UDP, 100, 200), (SCTP, 0, 65535), (TCP, 65535, 65535), (ICMP, 0, 65535))]
    )
    rows = [(UDP, 99, -1), (UDP, 100, 0), (UDP, 200, 0), (UDP, 201, -1), (SCTP, 0, 0), (SCTP, 65535, 0)]
    rows += [(TCP, 65535, 0), (TCP, 65534, -1), (133, 0, -1), (131, 65535, -1), (ICMP, 0, 0), (7, 0, -1)]
    assert [find(compiled, "10.1.1.1", port, protocol) for protocol, port, _ in rows] == [
        row[2] for row in rows
    ]


def test_rule_without_ports_allows_every_protocol() -> None:
    compiled = RuleSet([rule("10.0.0.0/8")])
    assert all(
        find(compiled, "10.1.1.1", port, protocol) == 0 for protocol in range(256) for port in (0, 1, 65535)
    )


def test_lowest_rule_wins_per_port() -> None:
    compiled = RuleSet(
        [rule("10.0.0.0/16", (TCP, 80, 90)), rule("10.0.0.0/8", (TCP, 70, 85)), rule("10.0.0.0/24")]
    )
    expected = {69: 2, 70: 1, 79: 1, 80: 0, 90: 0, 91: 2}
    assert {port: find(compiled, "10.0.0.1", port) for port in expected} == expected
    assert {port: find(compiled, "10.0.1.1", port) for port in expected} == expected | {69: -1, 91: -1}
    assert shown(compiled)[0] == (
        "10.0.0.0/24",
        [
            ("protocols 0-5, 0-69/TCP", 2),
            ("70-79/TCP", 1),
            ("80-90/TCP", 0),
            ("91-65535/TCP, protocols 7-255", 2),
        ],
    )


def test_intervals_are_disjoint_and_merged() -> None:
    # Halves of one rule's range, cut by another rule that adds nothing: one interval again.
    compiled = RuleSet([rule("10.0.0.0/8", 80), rule("10.64.0.0/16", 80), rule("10.65.0.0/16", 80)])
    assert shown(compiled) == [("10.0.0.0/8", [("80/TCP", 0)])]
    assert repr(compiled) == "<RuleSet of 3 rules, 3 + 1 intervals>"


def test_adjacent_and_overlapping_port_ranges_are_one() -> None:
    compiled = RuleSet([rule("10.0.0.0/8", 81, 80, (TCP, 79, 80), 83)])
    assert shown(compiled) == [("10.0.0.0/8", [("79-81/TCP", 0), ("83/TCP", 0)])]


def test_excepts() -> None:
    compiled = RuleSet(
        [
            rule(
                "10.0.0.0/8",
                80,
                # nested, adjacent, outside, other family, first and last address
                excepts=("10.1.0.0/16", "10.1.2.0/24", "10.2.0.0/16", "11.0.0.0/8", "fd00::/8", "10.0.0.0/32",
                         "10.255.255.255/32"),
            )
        ]
    )  # fmt: skip
    assert shown(compiled) == [
        ("10.0.0.1-10.0.255.255", [("80/TCP", 0)]),
        ("10.3.0.0-10.255.255.254", [("80/TCP", 0)]),
    ]


@pytest.mark.parametrize("hole", ["10.0.0.0/8", "10.0.0.0/7", "0.0.0.0/0"])
def test_except_that_covers_its_rule_leaves_nothing(hole: str) -> None:
    assert RuleSet([rule("10.0.0.0/8", excepts=(hole,))]).intervals(4) == []


def test_except_limits_its_own_rule_only() -> None:
    compiled = RuleSet([rule("10.0.0.0/8", excepts=("10.1.0.0/16",)), rule("10.1.0.0/16", 22)])
    assert find(compiled, "10.1.0.1", 22) == 1
    assert find(compiled, "10.1.0.1", 23) == -1


def test_300_ports_on_one_cidr() -> None:
    compiled = RuleSet([rule("10.0.0.0/8", *range(1000, 1600, 2))])
    assert [find(compiled, "10.0.0.1", port) for port in range(999, 1602)] == [
        0 if 1000 <= port < 1600 and port % 2 == 0 else -1 for port in range(999, 1602)
    ]
    apart = RuleSet([rule("10.0.0.0/8", port) for port in range(1000, 1600, 2)])
    assert [find(apart, "10.0.0.1", port) for port in range(1000, 1600, 2)] == list(range(300))


@pytest.mark.parametrize(
    "bad",
    [
        Rule(Prefix(b"\x0a\0\0\0", 33)),
        Rule(Prefix(b"\x0a\0\0", 8)),
        Rule(Prefix(b"\x0a\0\0\1", 8)),
        Rule(Prefix(bytes(15) + b"\1", 127)),
        Rule(Prefix(bytes(7) + b"\1" + bytes(8), 32)),
        Rule(Prefix(bytes(4), 0), (Prefix(b"\1\1\1\1", 31),)),
        Rule(Prefix(bytes(4), 0), (), (PortRange(TCP, 5, 4),)),
        Rule(Prefix(bytes(4), 0), (), (PortRange(256, 1, 1),)),
        Rule(Prefix(bytes(4), 0), (), (PortRange(TCP, 0, 65536),)),
    ],
)
def test_rules_that_are_not_well_formed(bad: Rule) -> None:
    with pytest.raises(ValueError, match="is not a"):
        RuleSet([bad])


def test_interval_texts() -> None:
    assert Interval(bytes(4), b"\xff" * 4, ()).peer == "0.0.0.0/0"
    assert Interval(bytes(16), b"\xff" * 16, ()).peer == "::/0"
    assert Interval(b"\0\0\0\1", b"\0\0\0\2", ()).peer == "0.0.0.1-0.0.0.2"
    assert str(Allowed(0, 0xFFFFFF, 0)) == "every port"
    assert str(Allowed(47 << 16, 47 << 16 | 65535, 0)) == "protocol 47"
    assert str(Allowed(6 << 16 | 5, 8 << 16 | 65535, 0)) == "5-65535/TCP, protocols 7-8"
    assert str(Allowed(6 << 16 | 5, 7 << 16 | 65535, 0)) == "5-65535/TCP, protocol 7"


def brute(rules: list[Rule], peer: bytes, protocol: int, port: int) -> int:
    for i, r in enumerate(rules):
        inside = peer in r.cidr and not any(peer in hole for hole in r.excepts)
        if inside and (not r.ports or any(p == protocol and a <= port <= z for p, a, z in r.ports)):
            return i
    return -1


def nested(rng: random.Random, count: int, wide: int, size: int = 4) -> list[Rule]:
    """Narrow rules under `wide` ones that overlap all of them, each with a port of its own."""
    rules = []
    for i in range(wide):
        hole = bytes([10, rng.randrange(256)]) + bytes(size - 2)
        rules.append(Rule(Prefix(bytes(size), 0), (Prefix(hole, 16),), (PortRange(TCP, 1000 + i, 1000 + i),)))
    for _ in range(count):
        length = rng.randrange(12, 33)
        value = int.from_bytes(bytes([10]) + rng.randbytes(3)) >> (32 - length) << (32 - length)
        rules.append(
            Rule(
                Prefix(value.to_bytes(4) + bytes(size - 4), length),
                (),
                (PortRange(TCP, 1, rng.randrange(1, 3000)),),
            )
        )
    rng.shuffle(rules)
    return rules


@pytest.mark.parametrize("size", [4, 16])
@pytest.mark.parametrize(("count", "wide"), [(40, 5), (400, 80), (6000, 120)])
def test_against_every_rule_in_turn(count: int, wide: int, size: int) -> None:
    rng = random.Random(count)
    rules = nested(rng, count, wide, size)
    compiled = RuleSet(rules)
    edges = [r.cidr.network for r in rng.sample(rules, min(60, len(rules)))]
    edges += [r.cidr.last for r in rng.sample(rules, min(60, len(rules)))]
    for peer, step, port in itertools.product(edges, (-1, 0, 1), (1, 999, 1000, 1000 + wide, 2999)):
        moved = ((int.from_bytes(peer) + step) % 256**size).to_bytes(size)
        assert compiled.find(moved, TCP, port) == brute(rules, moved, TCP, port)


@pytest.mark.parametrize(("count", "wide"), [(40, 5), (700, 150)])
def test_listing_says_what_find_says(count: int, wide: int) -> None:
    rules = nested(random.Random(3), count, wide)
    compiled = RuleSet(rules)
    listed = compiled.intervals(4)
    for before, after in itertools.pairwise(listed):
        assert before.last < after.first
        assert before.allowed != after.allowed or int.from_bytes(before.last) + 1 < int.from_bytes(
            after.first
        )
    for interval in listed[:: max(1, len(listed) // 50)]:
        for peer, allowed in itertools.product(
            (interval.first, interval.last), interval.allowed[:: max(1, wide // 20)]
        ):
            for number in (allowed.first, allowed.last):
                assert compiled.find(peer, number >> 16, number & 0xFFFF) == allowed.rule_id


def test_memory_does_not_multiply() -> None:
    """Wide rules are not repeated in every interval below them."""
    rng = random.Random(1)
    narrow = RuleSet(nested(rng, 20_000, 0)).nbytes
    both = RuleSet(nested(rng, 20_000, 300)).nbytes
    assert both < 4 * narrow
    # Every rule overlaps every other and has its own hole and port: the worst that few rules can do.
    worst = [
        Rule(Prefix(bytes(4), 0), (Prefix(bytes([10, i >> 8, i & 255, 0]), 24),), (PortRange(TCP, i, i),))
        for i in range(4000)
    ]
    assert RuleSet(worst).nbytes < 64 << 20


def test_compile_time_grows_with_the_rules_only() -> None:
    """Ten times the rules take less than forty times as long, wide overlapping rules included."""

    def seconds(count: int) -> float:
        rules = nested(random.Random(count), count, 300)
        times = []
        for _ in range(3):
            began = time.perf_counter()
            RuleSet(rules)
            times.append(time.perf_counter() - began)
        return min(times)

    assert seconds(30_000) < 40 * seconds(3_000)


def test_equal_cells_are_shared() -> None:
    alternating = [
        Rule(Prefix(bytes([10, 0, i >> 7, (i & 127) * 2]), 32), (), (PortRange(TCP, 80, 80),))
        for i in range(8192 // 8)
    ]
    few_ports = RuleSet(alternating).nbytes
    own_ports = RuleSet([Rule(r.cidr, (), (PortRange(TCP, i, i),)) for i, r in enumerate(alternating)]).nbytes
    assert own_ports - few_ports >= 12 * (len(alternating) - 1) - 64


# ---- tables


def entry(name: str, addresses: tuple[str, ...], devices: tuple[int, ...], **more: object) -> PodEntry:
    return PodEntry(Key("x", name), tuple(map(parse_address, addresses)), devices, **more)  # type: ignore[arg-type]


def test_two_pods_cannot_have_one_interface() -> None:
    pods = [entry("a", ("10.0.0.1",), (3, 4)), entry("b", ("10.0.0.2",), (4,))]
    with pytest.raises(ValueError, match="x/b and x/a both claim interface 4"):
        RuleTable(1, pods, [None] * 2, [None] * 2, ())


@pytest.mark.parametrize("generation", [0, -1, 1 << 32])
def test_generation_out_of_range(generation: int) -> None:
    with pytest.raises((ValueError, OverflowError)):
        RuleTable(generation, (), (), (), ())


def test_table_refuses_what_it_cannot_hold() -> None:
    with pytest.raises(ValueError, match="interface index is never 0"):
        RuleTable(1, [entry("a", (), (0,))], [None], [None], ())
    with pytest.raises(ValueError, match="same length"):
        RuleTable(1, [entry("a", (), (1,))], [], [None], ())
    with pytest.raises(ValueError, match="4 or 16 bytes"):
        RuleTable(1, (), (), (), (b"abc",))


def test_table_keeps_its_rule_sets_alive() -> None:
    rules = RuleSet([rule("10.0.0.0/8", 80)], tag="mine")
    table = RuleTable(7, [entry("a", ("10.0.0.1", "fd00::1"), (3,))], [rules], [None], ())
    assert table.generation == 7
    assert table.ingress(0) is rules
    assert table.egress(0) is None
    assert table.rulesets == {rules}
    assert rules.tag == "mine"
