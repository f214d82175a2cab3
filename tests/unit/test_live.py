"""Readers of live verdicts: what each gets, what it loses and is told of."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Awaitable, Callable

from dataplane._engine import Publisher, Worker
from dataplane.addresses import parse_address, parse_prefix
from dataplane.model import Key, PortRange, Rule
from dataplane.observe.live import CAPTURE, LiveVerdicts, Lost
from dataplane.policy.compile import Compiler, PodEntry
from dataplane.policy.effective import DirectionRules
from dataplane.verdict import Event

POD = 11  # the pod's interface
ALLOWED, DENIED = 53, 99


def make_worker(publisher: Publisher | None = None, ring: int = 64) -> Worker:
    if publisher is None:
        rule = Rule(parse_prefix("10.0.0.0/8")[0], (), (PortRange(17, ALLOWED, ALLOWED),), 0)
        egress = DirectionRules(((Key("x", "p"), rule),))
        pod = PodEntry(Key("x", "a"), (parse_address("10.0.0.1"),), (POD,), egress=egress)
        publisher = Publisher()
        publisher.publish(Compiler().table(1, [pod], []))
    return Worker(publisher, ring_entries=ring)


def send(worker: Worker, dport: int, sport: int = 4000) -> None:
    header = struct.pack(
        "!BBHHHBBH4s4s", 0x45, 0, 28, 0, 0, 64, 17, 0, parse_address("10.0.0.1"), parse_address("10.9.9.9")
    )
    worker.judge(header + struct.pack("!HHHH", sport, dport, 8, 0), indev=POD)


def sports(events: list[Event]) -> list[int]:
    return [event.packet.flow.sport for event in events]


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await test()

    asyncio.run(bounded())


def test_each_reader_gets_what_its_capture_level_asks_for() -> None:
    async def test() -> None:
        worker = make_worker()
        live = LiveVerdicts([worker])
        everything, misses = live.read(CAPTURE["all"]), live.read(CAPTURE["misses"])
        denied = live.read(CAPTURE["denied"])
        for dport in (ALLOWED, ALLOWED, DENIED):
            send(worker, dport)
        got = [
            [event.packet.flow.dport for event in await one.take()] for one in (everything, misses, denied)
        ]
        assert got == [[ALLOWED, ALLOWED, DENIED], [ALLOWED, DENIED], [DENIED]]

    run(test)


def test_nothing_is_recorded_without_a_reader_and_only_what_the_last_ones_need() -> None:
    async def test() -> None:
        worker = make_worker()
        live = LiveVerdicts([worker])
        assert worker.capture == CAPTURE["none"]
        with live.read(CAPTURE["all"]):
            with live.read(CAPTURE["denied"]):
                assert worker.capture == CAPTURE["all"]
            assert worker.capture == CAPTURE["all"]
        assert worker.capture == CAPTURE["none"]
        with live.read(CAPTURE["denied"]) as reader:
            assert worker.capture == CAPTURE["denied"]
            reader.close()
            assert worker.capture == CAPTURE["none"]

    run(test)


def test_packets_are_kept_while_a_reader_asks_for_them() -> None:
    async def test() -> None:
        worker = make_worker()
        live = LiveVerdicts([worker])
        headers = live.read(CAPTURE["all"])
        with live.read(CAPTURE["all"], data=True) as bytes_too:
            send(worker, ALLOWED)
            (event,) = await bytes_too.take()
            assert (len(event.data), event.data[0]) == (28, 0x45)
        await headers.take()
        send(worker, ALLOWED)
        assert [event.data for event in await headers.take()] == [b""]

    run(test)


def test_a_reader_is_given_only_the_events_it_wants() -> None:
    async def test() -> None:
        worker = make_worker()
        live = LiveVerdicts([worker])
        odd = live.read(CAPTURE["all"], lambda event: event.packet.flow.sport % 2 == 1)
        for sport in range(6):
            send(worker, ALLOWED, sport)
        assert sports(await odd.take()) == [1, 3, 5]
        assert odd.lost == Lost(0, 0)

    run(test)


def test_a_slow_reader_loses_its_own_events_only_and_keeps_the_oldest() -> None:
    async def test() -> None:
        worker = make_worker()
        live = LiveVerdicts([worker])
        slow, quick = live.read(CAPTURE["all"], room=4), live.read(CAPTURE["all"])
        for sport in range(10):
            send(worker, ALLOWED, sport)
        assert sports(await quick.take()) == list(range(10))
        assert sports(await slow.take()) == [0, 1, 2, 3]
        assert (slow.lost, quick.lost) == (Lost(6, 0), Lost(0, 0))
        assert live.lost_by_readers == 6
        send(worker, ALLOWED, 77)
        assert sports(await slow.take()) == [77]

    run(test)


def test_a_full_ring_is_told_to_every_reader_of_the_time_even_if_nothing_else_is() -> None:
    async def test() -> None:
        worker = make_worker(ring=8)
        live = LiveVerdicts([worker])
        picky = live.read(CAPTURE["all"], lambda _event: False)
        for sport in range(20):
            send(worker, ALLOWED, sport)
        assert await picky.take() == []
        assert picky.lost == Lost(0, 12)
        later = live.read(CAPTURE["all"])
        assert later.lost == Lost(0, 0)
        assert live.lost_in_rings == 12

    run(test)


def test_events_from_before_do_not_reach_the_next_reader() -> None:
    async def test() -> None:
        worker = make_worker()
        live = LiveVerdicts([worker])
        with live.read(CAPTURE["all"]):
            send(worker, ALLOWED, 1)
        reader = live.read(CAPTURE["all"])
        send(worker, ALLOWED, 2)
        assert sports(await reader.take()) == [2]

    run(test)


def test_what_a_reader_does_not_take_at_once_waits() -> None:
    async def test() -> None:
        worker = make_worker()
        reader = LiveVerdicts([worker]).read(CAPTURE["all"])
        for sport in range(5):
            send(worker, ALLOWED, sport)
        assert sports(await reader.take(3)) == [0, 1, 2]
        assert sports(await reader.take(3)) == [3, 4]

    run(test)


def test_workers_come_and_go_and_losses_stay_counted() -> None:
    async def test() -> None:
        first = make_worker(ring=2)
        second = make_worker(first.publisher, ring=2)
        live = LiveVerdicts([first])
        reader = live.read(CAPTURE["all"])
        live.add(second)
        for sport in range(4):
            send(second, ALLOWED, sport)
            send(first, ALLOWED, sport + 10)
        live.remove(second)
        assert second.capture == CAPTURE["none"]
        assert sports(await reader.take()) == [0, 1]
        assert sports(await reader.take()) == [10, 11]
        assert reader.lost == Lost(0, 4)

    run(test)


def test_events_of_several_workers_come_in_the_order_of_their_time() -> None:
    async def test() -> None:
        first = make_worker()
        second = make_worker(first.publisher)
        reader = LiveVerdicts([first, second]).read(CAPTURE["all"])
        for sport in range(8):
            send((first, second)[sport % 2], ALLOWED, sport)
        assert sports(await reader.take()) == list(range(8))

    run(test)
