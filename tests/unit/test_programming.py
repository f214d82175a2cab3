"""The time from a change's cause and its arrival to the rules in force."""

from __future__ import annotations

import time

from dataplane.model import Key, Pod
from dataplane.programming import Latency, Programming
from dataplane.sources.store import Store


def test_a_change_is_measured_from_its_arrival_and_from_its_trigger() -> None:
    now = [time.monotonic() - 100]
    store = Store(clock=lambda: now[0])
    programming = Programming(store)
    heard: list[Latency] = []
    programming.listeners.append(heard.append)
    store.put("k", "Pod x/a", Pod(Key("x", "a")))
    now[0] += 50
    store.put("k", "Pod x/b", Pod(Key("x", "b")))  # coalesced with the first
    programming.trigger(time.time() - 200)
    programming.trigger(None)
    programming.trigger(time.time() + 1000)  # another machine's clock is ahead
    programming.snapshot()
    assert heard == []
    programming.in_force()
    assert [round(each.received) for each in heard] == [100, 100]
    assert [round(each.received - each.settled, 1) for each in heard] == [0.2, 0.2]  # the window's limit
    assert [each.triggered is not None and round(each.triggered) for each in heard] == [200, 0]
    assert list(programming.recent) == heard


def test_a_change_without_a_trigger_is_measured_once() -> None:
    store = Store()
    programming = Programming(store)
    store.put("k", "Pod x/a", Pod(Key("x", "a")))
    programming.snapshot()
    programming.in_force()
    programming.in_force()
    assert [each.triggered for each in programming.recent] == [None]


def test_what_changes_nothing_is_not_measured() -> None:
    store = Store()
    programming = Programming(store)
    store.put("k", "Pod x/a", Pod(Key("x", "a")))
    store.delete("k", "Pod x/a")
    programming.trigger(1.0)
    programming.snapshot()
    programming.in_force()
    assert not programming.recent


def test_what_is_in_force_late_is_measured_when_it_is() -> None:
    store = Store()
    programming = Programming(store)
    store.put("k", "Pod x/a", Pod(Key("x", "a")))
    programming.snapshot()  # the kernel refuses it
    store.put("k", "Pod x/b", Pod(Key("x", "b")))
    programming.snapshot()
    programming.in_force()
    assert len(programming.recent) == 2


def test_quantiles_are_those_of_the_last_changes() -> None:
    programming = Programming(Store())
    assert programming.quantiles() == {"changes": 0}
    programming.recent.extend(Latency(number / 1000, number / 2000, None) for number in range(1, 101))
    assert programming.quantiles() == {
        "changes": 100,
        "p50": 51.0,
        "p99": 100.0,
        "after_window": {"p50": 25.5, "p99": 50.0},
    }
