"""What the controller writes: as little as possible, and in an order in which nothing opens on the way."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataplane.addresses import Prefix, parse_address
from dataplane.controller import slices
from dataplane.controller.slices import (
    HELD,
    Action,
    Contents,
    Desired,
    Found,
    Head,
    Slice,
    Write,
    limited,
    plan,
)
from dataplane.model import Direction, Key, PodEndpoint, PortRange
from dataplane.policy.resolve import Entry

HEAD = Head(Key("x", "web"), "uid-1", "{}", frozenset(Direction))
NODE = parse_address("10.0.0.1")
_serial = itertools.count()
LIMIT = 3  # entries per list in the property tests, where many slices are wanted


def endpoint(pod: int, ip: int = 0) -> PodEndpoint:
    return PodEndpoint(Key("x", f"p{pod}"), bytes([10, 1, ip, pod % 256]), NODE)


def entry(number: int, *ports: int) -> Entry:
    cidr = Prefix(bytes([10, 2, number // 256, number % 256]), 32)
    return cidr, (), tuple(PortRange(6, port, port) for port in ports)


def pods(numbers: Iterable[int], ip: int = 0) -> tuple[PodEndpoint, ...]:
    return tuple(endpoint(number, ip) for number in numbers)


def entries(numbers: Iterable[int], *ports: int) -> tuple[Entry, ...]:
    return tuple(entry(number, *ports) for number in numbers)


def desire(contents: Contents, head: Head = HEAD) -> Desired:
    return Desired(head, {None: contents})


def apply(found: Sequence[Found], writes: Sequence[Write]) -> list[list[Found]]:
    """The objects after each write. Fails on a write that makes no sense."""
    there = {each.name: each for each in found}
    names: dict[int, str] = {}
    states = []
    for number, write in enumerate(writes):
        name = write.found.name if write.found is not None else names.get(write.place)
        if write.action is Action.CREATE:
            assert name is None
            name = names[write.place] = f"web-new-{next(_serial):06}"
        assert name is not None
        assert (name in there) is (write.action is not Action.CREATE)
        if write.slice is None:
            assert write.action is Action.DELETE
            del there[name]
        else:
            there[name] = Found(name, f"uid-{name}", str(number), write.slice)
        states.append(list(there.values()))
    return states


def settle(found: Sequence[Found], desired: Desired | None) -> list[Found]:
    """The objects after a plan, and another plan finds nothing to do."""
    writes = plan(found, desired)
    after = apply(found, writes)[-1] if writes else list(found)
    assert plan(after, desired) == []
    return after


def one_group(found: Iterable[Found]) -> tuple[set[PodEndpoint], set[Entry], set[Entry]]:
    together: tuple[set[PodEndpoint], set[Entry], set[Entry]] = (set(), set(), set())
    for each in found:
        contents = each.slice.contents
        for whole, part in zip(
            together, (contents.endpoints, contents.ingress, contents.egress), strict=True
        ):
            whole.update(part)
    return together


# --- what is made ------------------------------------------------------------------------------------


def test_a_policy_without_pods_or_rules_has_one_object() -> None:
    writes = plan([], desire(Contents()))
    assert [(write.action, write.slice) for write in writes] == [
        (Action.CREATE, Slice(HEAD, None, Contents()))
    ]


def test_many_entries_make_objects_of_at_most_200() -> None:
    wanted = Contents(pods(range(10)), entries(range(401)), entries(range(500, 700)))
    after = settle([], desire(wanted))
    assert sorted(len(each.slice.contents.ingress) for each in after) == [1, 200, 200]
    assert one_group(after) == (set(wanted.endpoints), set(wanted.ingress), set(wanted.egress))


def test_rules_are_there_before_the_pods() -> None:
    writes = plan([], desire(Contents(pods(range(2)), entries(range(450)))))
    assert [write.action for write in writes] == [Action.CREATE] * 3
    assert [len(write.slice.contents.endpoints) for write in writes if write.slice] == [0, 0, 2]


def test_an_entry_of_a_thousand_ports_fills_an_object() -> None:
    many = [(entry(number)[0], (), tuple(PortRange(6, p, p) for p in range(1, 5001))) for number in range(3)]
    after = settle([], desire(Contents(pods([1]), tuple(many))))
    assert [len(each.slice.contents.ingress) for each in after] == [1, 1, 1]


def big() -> list[Found]:
    return settle([], desire(Contents(pods(range(150)), entries(range(1000)), entries(range(2000, 2600)))))


def contents_of(found: Sequence[Found]) -> Contents:
    endpoints, ingress, egress = one_group(found)
    return Contents(tuple(sorted(endpoints)), tuple(sorted(ingress)), tuple(sorted(egress)))


def test_one_entry_more_writes_one_object() -> None:
    found = big()
    before = contents_of(found)
    more = replace(before, egress=(*before.egress, entry(5000)))
    (write,) = plan(found, desire(more))
    # Ingress is full everywhere; egress has room in two of the five.
    assert write.action is Action.UPDATE


def test_a_pod_that_is_selected_and_a_peer_writes_two_objects_at_most() -> None:
    found = big()
    before = contents_of(found)
    gone = replace(before, endpoints=before.endpoints[1:], ingress=before.ingress[1:])
    assert len({write.place for write in plan(found, desire(gone))}) <= 2
    assert len(plan(found, desire(gone))) <= 2


def test_a_rule_with_other_ports_takes_the_place_of_the_old_one() -> None:
    found = big()
    before = contents_of(found)
    changed = replace(before, ingress=(*before.ingress[:500], entry(500, 80), *before.ingress[501:]))
    (write,) = plan(found, desire(changed))
    assert write.slice is not None
    assert entry(500, 80) in write.slice.contents.ingress
    assert entry(500) not in write.slice.contents.ingress


def test_a_pod_with_another_address_is_replaced_in_one_write() -> None:
    wanted = Contents(pods(range(500)), entries([1]))
    found = settle([], desire(wanted))
    moved = replace(wanted, endpoints=(endpoint(0, 7), *wanted.endpoints[1:]))
    (write,) = plan(found, desire(moved))
    assert write.slice is not None
    assert endpoint(0, 7) in write.slice.contents.endpoints
    assert endpoint(0) not in write.slice.contents.endpoints


def test_what_is_right_is_not_written() -> None:
    found = big()
    before = contents_of(found)
    shuffled = replace(before, ingress=before.ingress[::-1], endpoints=before.endpoints[::-1])
    assert plan(found[::-1], desire(shuffled)) == []


def test_an_object_that_says_more_than_was_read_is_written_again() -> None:
    found = settle([], desire(Contents(pods([1]))))
    (write,) = plan([replace(found[0], clean=False)], desire(Contents(pods([1]))))
    assert (write.action, write.slice) == (Action.UPDATE, found[0].slice)


def test_a_policy_made_anew_gets_its_objects_owner_changed() -> None:
    found = big()
    head = HEAD._replace(uid="uid-2")
    writes = plan(found, desire(contents_of(found), head))
    assert len(writes) == len(found)
    assert {write.slice.head.uid for write in writes if write.slice} == {"uid-2"}


def test_of_a_policy_that_is_gone_pods_are_let_go_first() -> None:
    found = big()
    writes = plan(found, None)
    assert {write.action for write in writes} == {Action.DELETE}
    held = [bool(write.found.slice.contents.endpoints) for write in writes if write.found]
    assert held == sorted(held, reverse=True)
    assert len(writes) == len(found)


def test_an_entry_that_is_there_twice_goes_once() -> None:
    wanted = desire(Contents(pods([1]), entries([1])))
    (first,) = settle([], wanted)
    second = replace(first, name="web-zzz")
    assert settle([first, second], wanted) == [first]


def test_sparse_objects_become_fewer_with_other_changes() -> None:
    found = [
        Found(f"web-{number:02}", "u", "1", Slice(HEAD, None, Contents((), entries([number]))))
        for number in range(20)
    ]
    assert plan(found, desire(Contents((), entries(range(20))))) == []
    writes = plan(found, desire(Contents((), entries(range(21)))))
    assert len(writes) <= 3
    after = apply(found, writes)[-1]
    assert len(after) < len(found)


def test_new_isolation_comes_after_the_rules_and_before_none_is_there() -> None:
    ingress_only = HEAD._replace(isolates=frozenset({Direction.INGRESS}))
    found = settle([], desire(Contents(pods([1])), ingress_only))
    writes = plan(found, desire(Contents(pods([1]), (), entries(range(500)))))
    steps = [
        (each.slice.head.isolates, sum(len(one.slice.contents.egress) for one in state))
        for state in apply(found, writes)
        for each in state
        if each.name == found[0].name
    ]
    assert all(Direction.EGRESS not in isolates or rules == 500 for isolates, rules in steps)
    assert steps[-1] == (HEAD.isolates, 500)


def test_groups_that_exchange_pods_hold_them_meanwhile() -> None:
    before = Desired(
        HEAD, {"g-1": Contents(pods([1]), entries([1])), "g-2": Contents(pods([2]), entries([2]))}
    )
    after = Desired(
        HEAD, {"g-1": Contents(pods([2]), entries([1])), "g-2": Contents(pods([1]), entries([2]))}
    )
    found = settle([], before)
    writes = plan(found, after)
    first, last = writes[0], writes[-1]
    assert first.slice == Slice(HEAD, f"{HELD}-1", Contents(pods([1, 2])))
    assert (last.place, last.action) == (first.place, Action.DELETE)
    settle(found, after)


def test_a_slice_that_alone_isolates_goes_last() -> None:
    """As a controller that ended half-way may leave them: an empty slice isolates the others' pods."""
    both = HEAD._replace(isolates=frozenset(Direction))
    one = HEAD._replace(isolates=frozenset({Direction.INGRESS}))
    other = HEAD._replace(isolates=frozenset({Direction.EGRESS}))
    found = [
        Found("web-0", "u0", "1", Slice(one, None, Contents(pods([1]), (), entries([1]))), False),
        Found("web-1", "u1", "1", Slice(other, None, Contents()), False),
    ]
    writes = plan(found, Desired(both, {None: Contents(pods([1]))}))
    for state in apply(found, writes):
        assert {direction for _, direction in judge(each.slice for each in state)} == set(Direction)
    assert [(each.slice.head, each.name) for each in state] == [(both, "web-0")]


def test_rules_that_the_server_refuses_are_left_out() -> None:
    found = settle([], desire(Contents(pods([1]), entries([1, 2]))))
    wanted = desire(Contents(pods([1, 2]), entries([2, 3]), entries([4])))
    assert limited(wanted, found).groups == {None: Contents(pods([1, 2]), entries([2]))}


# --- on the way ---------------------------------------------------------------------------------------

Rules = frozenset[Entry]
# What one pod may do in one direction; None: whatever it likes, as far as this policy goes.
Judgement = dict[tuple[Key, Direction], Rules]


def judge(parts: Iterable[Slice]) -> Judgement:
    """What each selected pod may do, as an agent joins the slices: by group, then by pod."""
    groups: dict[str | None, list[Slice]] = {}
    for each in parts:
        groups.setdefault(each.group, []).append(each)
    result: Judgement = {}
    for members in groups.values():
        isolates = frozenset[Direction]().union(*(each.head.isolates for each in members))
        for direction in isolates:
            rules: Rules = frozenset().union(*(getattr(each.contents, direction) for each in members))
            for each in members:
                for one in each.contents.endpoints:
                    result[one.pod, direction] = result.get((one.pod, direction), frozenset()) | rules
    return result


def wished(desired: Desired | None) -> Judgement:
    return judge(Slice(desired.head, *each) for each in desired.groups.items()) if desired else {}


numbers = st.lists(st.integers(0, 9), unique=True, max_size=8)
rules = st.lists(
    st.tuples(st.integers(0, 9), st.sampled_from([(), (80,), (80, 443)])), unique=True, max_size=9
)
directions = st.frozensets(st.sampled_from(list(Direction)), min_size=1)
groups = st.sampled_from([None, "g-1", "g-2", "g-3"])


@st.composite
def wishes(draw: st.DrawFn) -> Desired:
    head = HEAD._replace(isolates=draw(directions), uid=draw(st.sampled_from(["uid-1", "uid-2"])))
    made: dict[str | None, Contents] = {}
    members = draw(st.dictionaries(st.integers(0, 9), st.tuples(groups, st.integers(0, 2)), max_size=9))
    for group in {group for group, _ in members.values()} or {draw(groups)}:
        here = [(pod, ip) for pod, (its, ip) in members.items() if its == group]
        made[group] = Contents(
            tuple(endpoint(pod, ip + second) for pod, ip in here for second in (0, 10)[: 1 + pod % 2]),
            *(tuple(entry(number, *ports) for number, ports in draw(rules)) for _ in range(2)),
        )
    return Desired(head, made)


@st.composite
def junk(draw: st.DrawFn) -> list[Found]:
    """Objects as nobody would write them: duplicates, gaps, other groups."""
    made = []
    for number in range(draw(st.integers(0, 5))):
        contents = Contents(
            tuple(endpoint(pod) for pod in draw(numbers)[:LIMIT]),
            *(tuple(entry(each, *ports) for each, ports in draw(rules)[:LIMIT]) for _ in range(2)),
        )
        head = HEAD._replace(isolates=draw(directions))
        group = draw(st.sampled_from([None, "g-1", "g-2", f"{HELD}-1"]))
        made.append(
            Found(f"web-{number}", f"u{number}", "1", Slice(head, group, contents), draw(st.booleans()))
        )
    return made


@pytest.fixture(scope="module", autouse=True)
def _full_size() -> None:
    assert slices.MAX_ENTRIES == 200


@given(start=junk(), history=st.lists(st.one_of(wishes(), st.none()), min_size=1, max_size=4), cut=st.data())
@settings(max_examples=150, deadline=None)
def test_no_state_on_the_way_is_wider_than_before_and_after(
    start: list[Found], history: list[Desired | None], cut: st.DataObject
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slices, "MAX_ENTRIES", LIMIT)
        patch.setattr(slices, "MAX_WEIGHT", 8)
        found = start
        for number, desired in enumerate(history):
            writes = plan(found, desired)
            old, new = judge(each.slice for each in found), wished(desired)
            states = apply(found, writes)
            for state in states:
                check_state(state, old, new)
            if states and number + 1 < len(history):
                # A controller may end at any write, and the next one goes on with another wish.
                found = states[cut.draw(st.integers(0, len(states) - 1))]
            elif states:
                found = states[-1]
        assert plan(found, history[-1]) == []
        assert judge(each.slice for each in found) == new


def check_state(state: Sequence[Found], old: Judgement, new: Judgement) -> None:
    now = judge(each.slice for each in state)
    for each in state:
        contents = each.slice.contents
        assert max(len(contents.endpoints), len(contents.ingress), len(contents.egress)) <= LIMIT
    assert old.keys() & new.keys() <= now.keys(), "a pod without the isolation that it had and is to have"
    holding = {
        one.pod
        for each in state
        if (each.slice.group or "").startswith(HELD)
        for one in each.slice.contents.endpoints
    }
    for end, allowed in now.items():
        assert allowed <= old.get(end, frozenset()) | new.get(end, frozenset())
        if end in old and end in new and end[0] not in holding:
            assert allowed >= old[end] & new[end], "a flow that was and will be allowed is cut"


@given(wished_for=wishes(), change=st.tuples(st.integers(0, 9), st.integers(20, 29)))
@settings(max_examples=200, deadline=None)
def test_one_pod_more_touches_as_many_objects_as_it_has_entries(
    wished_for: Desired, change: tuple[int, int]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slices, "MAX_ENTRIES", LIMIT)
        found = settle([], wished_for)
        group, contents = next(iter(wished_for.groups.items()))
        more = replace(
            contents,
            endpoints=(*contents.endpoints, endpoint(change[1])),
            ingress=(*contents.ingress, entry(change[1])),
            egress=(*contents.egress, entry(change[1])),
        )
        after: Mapping[str | None, Contents] = {**wished_for.groups, group: more}
        writes = plan(found, replace(wished_for, groups=after))
        # One per list, and what is emptied where slices have become sparse.
        assert len({write.place for write in writes}) <= 3 + 1
