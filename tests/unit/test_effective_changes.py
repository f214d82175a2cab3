"""Effective rules of one snapshot after another: as from scratch, and what stays is the same object."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataplane.addresses import parse_address as address
from dataplane.addresses import parse_prefix
from dataplane.model import (
    ANNOTATION_MODE,
    Direction,
    Key,
    Namespace,
    Pod,
    PodEndpoint,
    PolicyEndpoint,
    PolicyHead,
    PortRange,
    Rule,
    Snapshot,
)
from dataplane.policy.changes import differences
from dataplane.policy.effective import DirectionRules, Effective, PodRules, changed_pods, effective_rules

HERE, THERE, HERE_V6 = address("192.0.2.1"), address("192.0.2.2"), address("2001:db8:ffff::1")
NODE = frozenset({HERE, HERE_V6})
PODS = tuple(Key("x", name) for name in "abcd")
IPS = (*(address(ip) for ip in ("10.0.0.1", "10.0.0.2", "2001:db8::1")), HERE_V6)
HOSTS = (HERE, THERE, b"")
CIDRS = tuple(parse_prefix(text)[0] for text in ("10.1.0.0/16", "0.0.0.0/0", "2001:db8::/64"))


@st.composite
def rules(draw: st.DrawFn) -> tuple[Rule, ...]:
    # Numbers have gaps where a bad rule was left out.
    numbers = sorted(draw(st.sets(st.integers(0, 4), max_size=3)))
    return tuple(Rule(draw(st.sampled_from(CIDRS)), (), (PortRange(6, 80, 80),), n) for n in numbers)


modes = st.sampled_from(({}, {}, {ANNOTATION_MODE: "audit"}, {ANNOTATION_MODE: "enforce"}))


@st.composite
def slices(draw: st.DrawFn, name: str) -> PolicyEndpoint:
    return PolicyEndpoint(
        Key("x", name),
        Key("x", draw(st.sampled_from("pq"))),
        draw(st.frozensets(st.sampled_from(Direction))),
        tuple(
            draw(
                st.lists(
                    st.builds(
                        PodEndpoint,
                        st.sampled_from(PODS),
                        st.sampled_from((*IPS, HERE, b"")),
                        st.sampled_from(HOSTS),
                    ),
                    max_size=4,
                )
            )
        ),
        draw(rules()),
        draw(rules()),
        draw(st.sampled_from((None, None, "g1", "g2"))),
        draw(st.sampled_from((None, 1.0, 2.0))),
    )


@st.composite
def pods(draw: st.DrawFn, key: Key) -> Pod:
    return Pod(
        key,
        uid=draw(st.sampled_from("uv")),
        host_ips=draw(st.sampled_from(((HERE,), (THERE,), (HERE, HERE_V6), ()))),
        ips=tuple(draw(st.lists(st.sampled_from(IPS[:3]), max_size=2, unique=True))),
        host_network=draw(st.integers(0, 5)) == 0,
        finished=draw(st.integers(0, 5)) == 0,
        created_at=draw(st.sampled_from((None, 1.0, 2.0))),
    )


@st.composite
def histories(draw: st.DrawFn) -> list[Snapshot]:
    """Snapshots of which each follows from the one before: what did not change is the same object."""
    pieces: dict[Key, PolicyEndpoint] = {}
    objects: dict[Key, Pod] = {}
    made = []
    for _ in range(draw(st.integers(2, 6))):
        for _ in range(draw(st.integers(0, 4))):
            name, key = draw(st.sampled_from(("s1", "s2", "s3", "s4", "s5"))), draw(st.sampled_from(PODS))
            match draw(st.sampled_from(("slice", "slice", "rules", "no slice", "pod", "no pod", "equal"))):
                case "slice":
                    pieces[Key("x", name)] = draw(slices(name))
                case "rules" if Key("x", name) in pieces:
                    pieces[Key("x", name)] = replace(pieces[Key("x", name)], ingress=draw(rules()))
                case "no slice":
                    pieces.pop(Key("x", name), None)
                case "pod":
                    objects[key] = draw(pods(key))
                case "no pod":
                    objects.pop(key, None)
                case "equal":
                    pieces = copy.deepcopy(pieces)
                    objects = copy.deepcopy(objects)
        made.append(
            Snapshot(
                tuple(sorted(pieces.values(), key=lambda piece: piece.key)),
                tuple(sorted(objects.values(), key=lambda pod: pod.key)),
                namespaces=(Namespace("x", {}, draw(modes)),),
                policy_heads=tuple(PolicyHead(Key("x", name), draw(modes)) for name in "pq"),
            )
        )
    return made


@settings(max_examples=600, deadline=None)
@given(histories(), st.sampled_from((NODE, frozenset({THERE}), frozenset(), None)))
def test_every_update_gives_what_a_fresh_look_gives(
    history: list[Snapshot], node_ips: frozenset[bytes] | None
) -> None:
    effective = Effective(node_ips)
    before: dict[Key, PodRules] = {}
    for snapshot in history:
        now, fresh = effective.update(snapshot), effective_rules(snapshot, node_ips)
        assert list(now.items()) == list(fresh.items())
        assert effective.policies == len({piece.policy for piece in snapshot.policy_endpoints})
        for key, pod in now.items():
            if before.get(key) == pod:
                assert before[key] is pod
        directions = [each for pod in (*before.values(), *now.values()) for each in (pod.ingress, pod.egress)]
        distinct = {each for each in directions if each is not None}
        assert {id(each) for each in directions if each is not None} == {id(each) for each in distinct}
        before = now
        assert effective.update(snapshot) is now


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 9), unique=True), st.lists(st.integers(0, 9), unique=True))
def test_differences_are_by_identity_and_in_order(first: list[int], second: list[int]) -> None:
    things = [Key("x", "same") for _ in range(10)]  # all equal
    assert len({id(thing) for thing in things}) == 10
    old, new = [things[index] for index in first], [things[index] for index in second]
    gone, come = differences(old, new)
    assert [id(each) for each in gone] == [id(things[index]) for index in first if index not in second]
    assert [id(each) for each in come] == [id(things[index]) for index in second if index not in first]


def allows(*numbers: int) -> dict[str, Any]:
    return {
        "ingress": tuple(
            Rule(parse_prefix(f"10.{number}.0.0/16")[0], index=index) for index, number in enumerate(numbers)
        )
    }


@pytest.fixture
def world() -> Snapshot:
    isolates = frozenset({Direction.INGRESS})
    here = [PodEndpoint(key, address(f"10.0.0.{n}"), HERE) for n, key in enumerate(PODS, start=1)]
    return Snapshot(
        (
            PolicyEndpoint(Key("x", "p-1"), Key("x", "p"), isolates, (here[0], here[1]), **allows(1, 2)),
            PolicyEndpoint(Key("x", "p-2"), Key("x", "p"), isolates, (), **allows(3)),
            PolicyEndpoint(Key("x", "q-1"), Key("x", "q"), isolates, (here[2],), **allows(4)),
        )
    )


def with_slice(snapshot: Snapshot, number: int, **changes: Any) -> Snapshot:
    pieces = list(snapshot.policy_endpoints)
    pieces[number] = replace(pieces[number], **changes)
    return replace(snapshot, policy_endpoints=tuple(pieces))


def numbers(rules: DirectionRules | None) -> list[tuple[str, int]]:
    assert rules is not None
    return [(str(rule.cidr), rule.index) for _, rule in rules.rules]


def test_a_rule_more_changes_the_pods_of_its_policy_only(world: Snapshot) -> None:
    effective = Effective(NODE)
    before = effective.update(world)
    now = effective.update(with_slice(world, 0, **allows(1, 2, 9)))
    assert changed_pods(before, now) == {PODS[0], PODS[1]}
    assert now[PODS[0]].ingress is now[PODS[1]].ingress
    assert now[PODS[2]] is before[PODS[2]]
    # The rules of later slices are numbered on.
    expected = [("10.1.0.0/16", 0), ("10.2.0.0/16", 1), ("10.9.0.0/16", 2), ("10.3.0.0/16", 3)]
    assert numbers(now[PODS[0]].ingress) == expected
    # An earlier result stays what it was.
    assert numbers(before[PODS[0]].ingress) == [("10.1.0.0/16", 0), ("10.2.0.0/16", 1), ("10.3.0.0/16", 2)]


def test_a_pod_more_in_a_policy_takes_its_rules_as_they_are(world: Snapshot) -> None:
    effective = Effective(NODE)
    before = effective.update(world)
    endpoints = (
        *world.policy_endpoints[0].endpoints,
        PodEndpoint(PODS[3], address("10.0.0.4"), HERE),
    )
    now = effective.update(with_slice(world, 0, endpoints=endpoints))
    assert changed_pods(before, now) == {PODS[3]}
    assert now[PODS[3]].ingress is before[PODS[0]].ingress
    assert list(now) == sorted(now)


def test_the_pod_whose_address_another_one_takes_changes_too(world: Snapshot) -> None:
    effective = Effective(NODE)
    before = effective.update(world)
    newcomer = Pod(Key("x", "z"), host_ips=(THERE,), ips=(address("10.0.0.1"),))
    now = effective.update(replace(world, pods=(newcomer,)))
    assert changed_pods(before, now) == {PODS[0]}
    assert now[PODS[0]].addresses == ()
    assert effective.update(world) == before


def test_rules_that_come_back_are_the_same_object_while_somebody_has_them(world: Snapshot) -> None:
    effective = Effective(NODE)
    before = effective.update(world)
    effective.update(with_slice(world, 0, **allows(9)))
    assert effective.update(world)[PODS[0]].ingress is before[PODS[0]].ingress
