"""What the engine counts per pod and per rule, across workers and from table to table."""

from __future__ import annotations

import struct

import pytest

from dataplane._engine import Publisher, Worker
from dataplane._rules import RuleTable
from dataplane.addresses import parse_address, parse_prefix
from dataplane.model import Direction, Key, PortRange, Rule
from dataplane.policy.compile import Compiler, PodEntry
from dataplane.policy.effective import DirectionRules
from dataplane.reasons import Reason

EGRESS, INGRESS = Direction.EGRESS, Direction.INGRESS
A, B, NEW = 11, 12, 13  # interfaces
POD_A, POD_B, POD_NEW = (Key("x", name) for name in ("a", "b", "new"))


def rules(*ports: int) -> DirectionRules:
    """Everybody, one rule for each UDP port."""
    cidr = parse_prefix("10.0.0.0/8")[0]
    return DirectionRules(
        tuple((Key("x", f"p{i}"), Rule(cidr, (), (PortRange(17, p, p),), 0)) for i, p in enumerate(ports))
    )


def make_table(
    generation: int, compiler: Compiler | None = None, in_b: DirectionRules | None = None
) -> RuleTable:
    """a's egress and b's ingress are isolated; both may use ports 53 and 80, or b what `in_b` says."""
    both = rules(53, 80)
    pods = [
        PodEntry(POD_A, (parse_address("10.0.0.1"),), (A,), egress=both),
        PodEntry(POD_B, (parse_address("10.0.0.2"),), (B,), ingress=in_b or both),
        PodEntry(POD_NEW, (parse_address("10.0.0.3"),), (NEW,), unknown=True),
    ]
    return (compiler or Compiler()).table(generation, pods, [])


def udp(src: str, dst: str, dport: int, sport: int = 4000) -> bytes:
    header = struct.pack(
        "!BBHHHBBH4s4s", 0x45, 0, 28, 0, 0, 64, 17, 0, parse_address(src), parse_address(dst)
    )
    return header + struct.pack("!HHHH", sport, dport, 8, 0)


def a_to_b(worker: Worker, dport: int, sport: int = 4000) -> bool:
    return worker.judge(udp("10.0.0.1", "10.0.0.2", dport, sport), indev=A, outdev=B).allow


def named(
    table: RuleTable,
) -> tuple[dict[tuple[Key, Direction, Reason], int], dict[tuple[Direction, int], int]]:
    """What was counted since the last look, without the rule sets."""
    pods, of_rules = table.take_tally()
    return dict(pods), {(direction, rule): n for (_, direction, rule), n in of_rules}


@pytest.fixture
def publisher() -> Publisher:
    return Publisher()


def test_allowed_flows_count_once_and_at_both_ends(publisher: Publisher) -> None:
    worker, table = Worker(publisher), make_table(1)
    publisher.publish(table)
    assert all(a_to_b(worker, 80) for _ in range(3))
    assert a_to_b(worker, 80, sport=4001)
    assert a_to_b(worker, 53)
    pods, of_rules = named(table)
    assert pods == {(POD_A, EGRESS, Reason.POLICY_RULE): 3, (POD_B, INGRESS, Reason.POLICY_RULE): 3}
    assert of_rules == {(EGRESS, 0): 1, (EGRESS, 1): 2, (INGRESS, 0): 1, (INGRESS, 1): 2}


def test_every_denied_packet_counts_at_the_end_that_decided(publisher: Publisher) -> None:
    worker, table = Worker(publisher), make_table(1, in_b=rules(53))
    publisher.publish(table)
    for _ in range(3):
        assert not a_to_b(worker, 80)  # a's egress allows it, b's ingress does not
    for _ in range(2):
        assert not a_to_b(worker, 99)  # neither end's rules do: a's is asked first
    assert named(table) == (
        {(POD_B, INGRESS, Reason.NO_RULE): 3, (POD_A, EGRESS, Reason.NO_RULE): 2},
        {},
    )


def test_what_the_cache_is_not_asked_about(publisher: Publisher) -> None:
    worker, table = Worker(publisher), make_table(1)
    publisher.publish(table)
    assert not worker.judge(udp("10.0.0.9", "10.0.0.2", 80), indev=A, outdev=B).allow
    assert not worker.judge(udp("10.0.0.3", "192.0.2.1", 80), indev=NEW, outdev=2).allow
    quoted = udp("10.0.0.2", "10.0.0.1", 4000, 80)
    unreachable = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 56, 0, 0, 64, 1, 0, quoted[16:20], quoted[12:16])
    unreachable += struct.pack("!BBHI", 3, 3, 0, 0) + quoted
    related = worker.judge(unreachable, indev=A, outdev=B)
    assert (related.allow, related.reason) == (True, Reason.RELATED)
    assert worker.judge(udp("192.0.2.1", "192.0.2.2", 80), indev=2, outdev=3).reason is Reason.NOT_A_POD
    assert named(table) == (
        {(POD_A, EGRESS, Reason.SPOOFED): 1, (POD_NEW, EGRESS, Reason.NO_TABLE): 1},
        {},
    )


def test_workers_are_summed_and_told_once(publisher: Publisher) -> None:
    early = [Worker(publisher) for _ in range(2)]
    table = make_table(1)
    publisher.publish(table)
    late = Worker(publisher)
    for number, worker in enumerate([*early, late]):
        for _ in range(number + 1):
            assert not a_to_b(worker, 99)
    assert named(table) == ({(POD_A, EGRESS, Reason.NO_RULE): 6}, {})
    assert named(table) == ({}, {})
    assert not a_to_b(late, 99)
    assert named(table) == ({(POD_A, EGRESS, Reason.NO_RULE): 1}, {})


def test_a_worker_that_ends_leaves_its_place_and_its_counts(publisher: Publisher) -> None:
    table = make_table(1)
    publisher.publish(table)
    for _ in range(200):
        assert not a_to_b(Worker(publisher, cache_entries=0), 99)
    assert named(table) == ({(POD_A, EGRESS, Reason.NO_RULE): 200}, {})


def test_more_workers_than_places_are_refused(publisher: Publisher) -> None:
    workers = [Worker(publisher, cache_entries=0) for _ in range(64)]
    with pytest.raises(ValueError, match="at most 64 workers"):
        Worker(publisher, cache_entries=0)
    assert len(workers) == 64


def test_nothing_is_lost_when_tables_change(publisher: Publisher) -> None:
    retired: list[tuple[int, int]] = []

    def take(table: RuleTable) -> None:
        retired.append((table.generation, sum(n for _, n in table.take_tally()[0])))

    publisher.on_retired = take
    worker, compiler = Worker(publisher), Compiler()
    first, second, third = (make_table(number, compiler) for number in (1, 2, 3))
    publisher.publish(first)
    assert not a_to_b(worker, 99)
    worker.enter()  # a burst is under way: the first table may still be counted in
    publisher.publish(second)
    assert retired == []
    worker.leave()
    assert publisher.quiesced()
    assert retired == [(1, 1)]
    for _ in range(2):
        assert not a_to_b(worker, 99)
    publisher.publish(third)
    assert retired == [(1, 1), (2, 2)]
    publisher.publish(None)
    assert retired == [(1, 1), (2, 2), (3, 0)]


def test_equal_rules_of_both_directions_are_told_apart(publisher: Publisher) -> None:
    worker, table = Worker(publisher), make_table(1)
    assert len(table.rulesets) == 1
    publisher.publish(table)
    assert worker.judge(udp("10.0.0.1", "192.0.2.1", 99), indev=A, outdev=2).allow is False
    assert worker.judge(udp("10.9.9.9", "10.0.0.2", 80), indev=2, outdev=B).allow
    assert named(table)[1] == {(INGRESS, 1): 1}


def test_a_table_that_nobody_publishes_counts_nothing() -> None:
    assert make_table(1).take_tally() == ([], [])
