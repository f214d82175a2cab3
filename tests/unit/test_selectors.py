"""Label selectors, and the index that answers them."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataplane.model import EVERYTHING, Key, LabelSelector, Operator, Requirement
from dataplane.policy.selectors import LabelIndex, matches

OTHER = {"other": "1"}


@pytest.mark.parametrize(
    ("operator", "values", "a", "empty", "missing"),
    [
        (Operator.IN, ("a", "b"), True, False, False),
        (Operator.IN, ("",), False, True, False),  # matchLabels: {k: ""} asks for the label to be there
        (Operator.NOT_IN, ("a",), False, True, True),
        (Operator.NOT_IN, ("b",), True, True, True),
        (Operator.EXISTS, (), True, True, False),
        (Operator.DOES_NOT_EXIST, (), False, False, True),
    ],
)
def test_operators(
    operator: Operator, values: tuple[str, ...], *, a: bool, empty: bool, missing: bool
) -> None:
    selector = LabelSelector((Requirement("k", operator, values),))
    assert matches(selector, {**OTHER, "k": "a"}) is a
    assert matches(selector, {**OTHER, "k": ""}) is empty
    assert matches(selector, OTHER) is missing


def test_every_requirement_must_hold_and_none_matches_all() -> None:
    both = LabelSelector((Requirement("a", Operator.IN, ("1",)), Requirement("b", Operator.EXISTS)))
    assert matches(both, {"a": "1", "b": "x"})
    assert not matches(both, {"a": "1"})
    assert not matches(both, {"b": "x"})
    assert matches(EVERYTHING, {})


@dataclass
class Item:
    key: Key
    labels: dict[str, str] = field(default_factory=dict)


labels = st.dictionaries(st.sampled_from("ab"), st.sampled_from(["", "1", "2"]))
requirements = st.one_of(
    st.builds(
        Requirement,
        st.sampled_from("ab"),
        st.sampled_from([Operator.IN, Operator.NOT_IN]),
        st.lists(st.sampled_from(["", "1", "2"]), min_size=1, unique=True).map(tuple),
    ),
    st.builds(
        Requirement, st.sampled_from("ab"), st.sampled_from([Operator.EXISTS, Operator.DOES_NOT_EXIST])
    ),
)


@given(
    st.lists(st.tuples(st.sampled_from("xyz"), labels), max_size=8),
    st.sets(st.sampled_from("xyz")),
    st.lists(requirements, max_size=3),
    st.sets(st.integers(0, 7)),
)
def test_the_index_finds_what_looking_at_each_finds(
    made: list[tuple[str, dict[str, str]]],
    namespaces: set[str],
    required: list[Requirement],
    removed: set[int],
) -> None:
    selector = LabelSelector(tuple(required))
    items = [Item(Key(namespace, str(n)), own) for n, (namespace, own) in enumerate(made)]
    index: LabelIndex[Item] = LabelIndex()
    for item in items:
        index.add(item)
    for number in removed & set(range(len(items))):
        index.remove(items[number])
    expected = [
        item.key
        for number, item in enumerate(items)
        if number not in removed and item.key.namespace in namespaces and matches(selector, item.labels)
    ]
    assert sorted(item.key for item in index.select(namespaces, selector)) == sorted(expected)
