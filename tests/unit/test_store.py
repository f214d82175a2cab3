"""The store: last good versions, duplicates, and that history leaves no trace otherwise."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataplane.addresses import parse_prefix
from dataplane.model import (
    ANNOTATION_MODE,
    Direction,
    Key,
    NetworkPolicy,
    Pod,
    PolicyEndpoint,
    PolicyHead,
    Problem,
    Rule,
    Snapshot,
)
from dataplane.sources.store import KubernetesObject, Store, identity


def policy(name: str, version: int = 1) -> PolicyEndpoint:
    rule = Rule(parse_prefix(f"10.0.0.{version}")[0])
    return PolicyEndpoint(Key("x", name), Key("x", "p"), frozenset({Direction.INGRESS}), ingress=(rule,))


def about(item: KubernetesObject, origin: str = "a.yaml", reason: str = "broken") -> Problem:
    return Problem(origin, identity(item), "spec", reason)


def nameless(origin: str = "a.yaml") -> Problem:
    return Problem(origin, "", "", "line 3: not YAML")


def names(snapshot: Snapshot) -> list[tuple[str, int]]:
    """(name, version) of each PolicyEndpoint."""
    return [(p.key.name, p.ingress[0].cidr.network[3]) for p in snapshot.policy_endpoints]


def reasons(snapshot: Snapshot) -> list[str]:
    return [problem.reason for problem in snapshot.problems]


def test_snapshot_is_sorted() -> None:
    store = Store()
    pods = [Pod(Key("x", name)) for name in "ba"]
    store.replace("b.yaml", [policy("c"), *pods, policy("a")], [nameless("b.yaml")])
    store.replace("a.yaml", [policy("b")], [nameless("a.yaml")])
    snapshot = store.snapshot()
    assert names(snapshot) == [("a", 1), ("b", 1), ("c", 1)]
    assert [each.key.name for each in snapshot.pods] == ["a", "b"]
    assert [problem.source for problem in snapshot.problems] == ["a.yaml", "b.yaml"]


def test_pod_and_policy_of_one_name_are_two_objects() -> None:
    store = Store()
    store.replace("a.yaml", [policy("a"), Pod(Key("x", "a"))], [])
    snapshot = store.snapshot()
    assert (len(snapshot.policy_endpoints), len(snapshot.pods), snapshot.problems) == (1, 1, ())


def test_broken_object_keeps_its_last_good_version() -> None:
    store = Store()
    store.replace("a.yaml", [policy("a", 1), policy("b", 1)], [])
    store.replace("a.yaml", [policy("b", 2)], [about(policy("a"))])
    snapshot = store.snapshot()
    assert names(snapshot) == [("a", 1), ("b", 2)]
    assert reasons(snapshot) == ["broken; its last good version stays in force"]
    # It stays through further edits of the file, for as long as it is there at all.
    store.replace("a.yaml", [policy("b", 3)], [about(policy("a"), reason="still broken")])
    assert names(store.snapshot()) == [("a", 1), ("b", 3)]
    store.replace("a.yaml", [policy("b", 3)], [])
    assert names(store.snapshot()) == [("b", 3)]


def test_mended_object_replaces_what_was_kept() -> None:
    store = Store()
    store.replace("a.yaml", [policy("a", 1)], [])
    store.replace("a.yaml", [], [about(policy("a"))])
    store.replace("a.yaml", [policy("a", 2)], [])
    assert store.snapshot() == Snapshot((policy("a", 2),))


def test_broken_object_without_a_good_version_is_reported() -> None:
    store = Store()
    store.replace("a.yaml", [policy("b")], [about(policy("a"))])
    snapshot = store.snapshot()
    assert names(snapshot) == [("b", 1)]
    assert reasons(snapshot) == ["broken; it is not in force"]


def test_problem_of_a_usable_object_changes_nothing_about_it() -> None:
    store = Store()
    store.replace("a.yaml", [policy("a", 1)], [])
    store.replace("a.yaml", [policy("a", 2)], [about(policy("a"), reason="a rule is bad")])
    snapshot = store.snapshot()
    assert names(snapshot) == [("a", 2)]
    assert reasons(snapshot) == ["a rule is bad"]


def test_broken_file_keeps_its_last_good_content() -> None:
    store = Store()
    store.replace("a.yaml", [policy("a", 1), policy("b", 1)], [])
    store.replace("a.yaml", [policy("b", 2), policy("c", 1)], [nameless()])
    snapshot = store.snapshot()
    assert names(snapshot) == [("a", 1), ("b", 2), ("c", 1)]
    assert reasons(snapshot) == ["line 3: not YAML; what was read from here before stays in force"]
    store.replace("a.yaml", [], [nameless()])
    assert names(store.snapshot()) == [("a", 1), ("b", 2), ("c", 1)]
    store.replace("a.yaml", [policy("c", 1)], [])
    assert store.snapshot() == Snapshot((policy("c", 1),))


def test_removed_origin_takes_everything_along() -> None:
    store = Store()
    store.replace("a.yaml", [policy("a")], [])
    store.replace("a.yaml", [], [nameless()])
    store.remove("a.yaml")
    store.remove("a.yaml")
    assert store.snapshot() == Snapshot()


def test_object_that_moves_and_breaks_keeps_its_last_good_version() -> None:
    store = Store()
    store.replace("a.yaml", [policy("a", 1)], [])
    assert names(store.snapshot()) == [("a", 1)]
    store.remove("a.yaml")
    store.replace("b.yaml", [], [about(policy("a"), "b.yaml")])
    assert names(store.snapshot()) == [("a", 1)]
    assert names(store.snapshot()) == [("a", 1)]
    store.remove("b.yaml")
    assert store.snapshot() == Snapshot()


def test_other_origins_are_not_touched() -> None:
    store = Store()
    store.replace("a.yaml", [policy("a")], [])
    store.replace("b.yaml", [policy("b")], [])
    store.replace("b.yaml", [], [])
    assert names(store.snapshot()) == [("a", 1)]


def test_object_in_two_origins_has_one_winner_and_a_problem() -> None:
    for order in ([("a.yaml", 1), ("b.yaml", 2)], [("b.yaml", 2), ("a.yaml", 1)]):
        store = Store()
        for origin, version in order:
            store.replace(origin, [policy("a", version)], [])
        snapshot = store.snapshot()
        assert names(snapshot) == [("a", 2)]
        assert snapshot.problems == (
            Problem("a.yaml", "PolicyEndpoint x/a", "", "is also in b.yaml, which counts"),
        )
    store.remove("b.yaml")
    assert store.snapshot() == Snapshot((policy("a", 1),))


def test_equal_copies_are_no_problem() -> None:
    store = Store()
    store.replace("a.yaml", [policy("a"), policy("a")], [])
    store.replace("b.yaml", [policy("a")], [])
    assert store.snapshot() == Snapshot((policy("a"),))


def test_object_twice_in_one_origin() -> None:
    store = Store()
    store.replace("a.yaml", [policy("a", 1), policy("a", 2)], [])
    snapshot = store.snapshot()
    assert names(snapshot) == [("a", 2)]
    assert reasons(snapshot) == ["is here more than once; the last one counts"]


# --- history ------------------------------------------------------------------------------------------

_POLICIES = st.builds(policy, st.sampled_from("abc"), st.integers(1, 3))
_PODS = st.builds(Pod, st.builds(Key, st.just("x"), st.sampled_from("abc")), uid=st.sampled_from("12"))
_OBJECTS = st.lists(st.one_of(_POLICIES, _PODS), max_size=4)
_EVENTS = st.lists(st.tuples(st.sampled_from(["1", "2", "3"]), st.none() | _OBJECTS), max_size=8)

_Event = tuple[str, list[KubernetesObject] | None]


def _play(events: list[_Event], look_every: int) -> Snapshot:
    store = Store()
    for number, (origin, objects) in enumerate(events, 1):
        if objects is None:
            store.remove(origin)
        else:
            bad_rules = [about(item, origin, "a rule is bad") for item in objects]
            store.replace(origin, objects, bad_rules)
        if look_every and number % look_every == 0:
            store.snapshot()
    return store.snapshot()


@given(_EVENTS, st.randoms())
def test_only_the_final_content_counts(events: list[_Event], random: object) -> None:
    final = list(dict(events).items())
    expected = _play(final, 0)
    last = {origin: len(events) - 1 - [o for o, _ in reversed(events)].index(origin) for origin, _ in events}
    shuffled = list(final)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    variants: dict[str, list[_Event]] = {
        "as they came": events,
        "reversed, then the last of each": list(reversed(events)) + final,
        "other order of origins": shuffled,
        "duplicated": [event for event in events for _ in range(2)],
        "repeated": events + events,
        "squashed": [event for number, event in enumerate(events) if last[event[0]] == number],
        "split": [
            (origin, objects if objects is None else objects[:size])
            for origin, objects in events
            for size in range(1 + len(objects or ()))
        ],
        "cleared between": [step for event in events for step in ((event[0], None), event)],
    }
    for name, variant in variants.items():
        for look_every in (0, 1, 3):
            assert _play(variant, look_every) == expected, name


# --- waiting ------------------------------------------------------------------------------------------


class Clock:
    """Time that passes only by sleeping."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds + 1e-9
        await asyncio.sleep(0)


def test_wait_returns_after_a_quiet_moment() -> None:
    clock = Clock()
    store = Store(quiet=0.02, limit=0.2, clock=clock, sleep=clock.sleep)
    store.replace("a", [policy("a")], [])
    asyncio.run(store.wait_change())
    assert clock.now == pytest.approx(100.02, abs=1e-3)


def test_changes_that_keep_coming_are_not_awaited_for_ever() -> None:
    clock = Clock()
    store = Store(quiet=0.02, limit=0.2, clock=clock, sleep=clock.sleep)

    async def scenario() -> None:
        store.replace("a", [policy("a")], [])
        waiting = asyncio.ensure_future(store.wait_change())
        version = 1
        while not waiting.done():
            version += 1
            store.replace("a", [replace(policy("a"), changed_at=float(version))], [])
            await clock.sleep(0.01)
        await waiting

    asyncio.run(scenario())
    assert clock.now == pytest.approx(100.2, abs=0.03)


def test_settled_tells_whether_a_change_is_under_way() -> None:
    clock = Clock()
    store = Store(quiet=0.02, limit=0.05, clock=clock, sleep=clock.sleep)
    assert store.settled
    store.replace("a", [policy("a")], [])
    assert not store.settled
    clock.now += 0.019
    store.replace("b", [policy("b")], [])
    clock.now += 0.019
    assert not store.settled  # the second one began a quiet time of its own
    clock.now += 0.002
    assert store.settled
    store.replace("a", [policy("a", 2)], [])
    clock.now += 0.011
    assert store.settled  # not for ever: the first of them is 0.05 s old
    store.replace("c", [policy("c")], [])
    store.snapshot()
    assert store.settled


def test_wait_does_not_return_without_a_change() -> None:
    store = Store(quiet=0.0)
    store.replace("a", [policy("a")], [about(policy("a"))])
    store.snapshot()

    async def scenario() -> bool:
        waiting = asyncio.ensure_future(store.wait_change())
        # Equal content is no change, nor is the removal of what is not there.
        store.replace("a", [policy("a")], [about(policy("a"))])
        store.remove("b")
        for _ in range(5):
            await asyncio.sleep(0)
        quiet = not waiting.done()
        store.replace("a", [policy("a", 2)], [])
        await asyncio.wait_for(waiting, 10)
        return quiet

    assert asyncio.run(scenario())


def test_wait_returns_at_once_when_nobody_looked_since_the_change() -> None:
    store = Store(quiet=0.0)
    store.replace("a", [policy("a")], [])

    async def scenario() -> None:
        await asyncio.wait_for(store.wait_change(), 10)
        await asyncio.wait_for(store.wait_change(), 10)

    asyncio.run(scenario())
    assert names(store.snapshot()) == [("a", 1)]


def test_what_did_not_change_is_the_same_object_in_the_next_snapshot() -> None:
    store = Store()
    store.replace("policies", [policy("a"), policy("b")], [])
    store.replace("pods", [Pod(Key("x", "a")), Pod(Key("x", "b"))], [])
    before = store.snapshot()
    store.put("policies", "PolicyEndpoint x/b", policy("b", 2))
    store.replace("pods", [Pod(Key("x", "b")), Pod(Key("x", "a"))], [])  # read again, and equal
    after = store.snapshot()
    assert names(after) == [("a", 1), ("b", 2)]
    assert after.policy_endpoints[0] is before.policy_endpoints[0]
    assert after.pods is before.pods


def test_single_objects_are_put_and_deleted() -> None:
    store = Store()
    store.put("k", "PolicyEndpoint x/a", policy("a"))
    store.put("k", "PolicyEndpoint x/b", policy("b"))
    assert names(store.snapshot()) == [("a", 1), ("b", 1)]
    store.put("k", "PolicyEndpoint x/a", None, [about(policy("a"), "k")])
    snapshot = store.snapshot()
    assert names(snapshot) == [("a", 1), ("b", 1)]
    assert reasons(snapshot) == ["broken; its last good version stays in force"]
    store.put("k", "PolicyEndpoint x/c", None, [about(policy("c"), "k")])
    assert reasons(store.snapshot())[1] == "broken; it is not in force"
    store.put("k", "PolicyEndpoint x/a", policy("a", 2))
    store.delete("k", "PolicyEndpoint x/c")
    store.delete("k", "PolicyEndpoint x/b")
    assert store.snapshot() == Snapshot((policy("a", 2),))


def test_putting_what_is_there_already_is_no_change() -> None:
    store = Store()
    store.put("k", "PolicyEndpoint x/a", policy("a"))
    store.snapshot()
    store.put("k", "PolicyEndpoint x/a", policy("a"))
    store.delete("k", "PolicyEndpoint x/b")
    assert store.settled
    asyncio.run(_expect_no_change(store))


async def _expect_no_change(store: Store) -> None:
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(store.wait_change(), 0.05)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["put", "delete", "replace", "remove", "snapshot"]),
        st.sampled_from(["o1", "o2"]),
        st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 3)), max_size=4),
    ),
    max_size=25,
)


@given(STEPS)
def test_however_it_came_about_a_snapshot_shows_what_is_there(
    steps: list[tuple[str, str, list[tuple[str, int]]]],
) -> None:
    store = Store()
    there: dict[str, dict[str, PolicyEndpoint]] = {}
    for what, origin, objects in steps:
        if what == "snapshot":
            store.snapshot()
        elif what == "remove":
            store.remove(origin)
            there.pop(origin, None)
        elif what == "replace":
            there[origin] = {name: policy(name, version) for name, version in objects}
            store.replace(origin, there[origin].values(), [])
        for name, version in objects if what in ("put", "delete") else []:
            if what == "put":
                store.put(origin, f"PolicyEndpoint x/{name}", policy(name, version))
                there.setdefault(origin, {})[name] = policy(name, version)
            else:
                store.delete(origin, f"PolicyEndpoint x/{name}")
                there.get(origin, {}).pop(name, None)
    expected: dict[str, PolicyEndpoint] = {}
    for origin in sorted(there):
        expected |= there[origin]
    assert store.snapshot().policy_endpoints == tuple(expected[name] for name in sorted(expected))


def test_kinds_that_do_not_count_are_not_taken_up() -> None:
    store = Store(without=(PolicyEndpoint,))
    store.replace("a.yaml", [policy("a"), Pod(Key("x", "b"))], [])
    snapshot = store.snapshot()
    assert (snapshot.policy_endpoints, [pod.key.name for pod in snapshot.pods]) == ((), ["b"])


@pytest.mark.parametrize("together", [1, 100])
def test_many_objects_stay_sorted_however_many_change_at_once(together: int) -> None:
    store = Store()
    expected: dict[str, PolicyEndpoint] = {}
    for start in range(0, 300, together):
        for number in range(start, start + together):
            name = f"p{number * 7919 % 300:03}"
            if number % 3 == 2:
                gone = f"p{(number - 1) * 7919 % 300:03}"
                expected.pop(gone, None)
                store.delete("k", f"PolicyEndpoint x/{gone}")
            expected[name] = policy(name, number % 200)
            store.put("k", f"PolicyEndpoint x/{name}", expected[name])
        assert store.snapshot().policy_endpoints == tuple(expected[name] for name in sorted(expected))


def test_of_a_network_policy_that_does_not_count_the_head_is_kept() -> None:
    audit = {ANNOTATION_MODE: "audit"}
    whole = NetworkPolicy(Key("x", "p"), annotations=audit)
    store = Store(without=(NetworkPolicy,))
    store.replace("a.yaml", [whole], [])
    snapshot = store.snapshot()
    assert (snapshot.network_policies, snapshot.policy_heads) == ((), (PolicyHead(Key("x", "p"), audit),))


def test_a_policy_and_its_head_take_each_others_place() -> None:
    whole, head = NetworkPolicy(Key("x", "p")), PolicyHead(Key("x", "p"))
    store = Store()
    for item in (whole, head, whole):
        store.put("k", "NetworkPolicy x/p", item)
        snapshot = store.snapshot()
        assert (*snapshot.network_policies, *snapshot.policy_heads) == (item,)
    store.delete("k", "NetworkPolicy x/p")
    assert store.snapshot() == Snapshot()
