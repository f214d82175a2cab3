"""Mutated NetworkPolicies, Namespaces and Services.

Whatever a document holds, reading it raises nothing and tells each problem in one short line. A
mutation never opens a pod:

* The policy is unusable (its last good version stays) only where its name, `spec`, or the
  `spec.podSelector` that says whom it isolates is mutated.
* Otherwise it selects the same pods and isolates them in at least the directions of the valid one,
  unless `policyTypes` itself was mutated to other readable types.
* Garbage inside a rule, anything a person cannot have meant, allows no packet that the valid policy
  does not allow.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from test_fuzz_objects import ODD, PACKETS, VALUES, check_problems, mutate, places

from dataplane.addresses import parse_address
from dataplane.model import Direction, Key, NetworkPolicy, Pod, Problem, Snapshot
from dataplane.policy.effective import effective_rules
from dataplane.policy.reference import matches
from dataplane.policy.resolve import in_force
from dataplane.sources.contents import read_contents
from dataplane.sources.networkpolicy import namespace, network_policy, service
from dataplane.sources.objects import pod
from dataplane.sources.store import Store

VALID: dict[str, Any] = {
    "apiVersion": "networking.k8s.io/v1",
    "kind": "NetworkPolicy",
    "metadata": {"name": "p", "namespace": "x"},
    "spec": {
        "podSelector": {
            "matchLabels": {"app": "db"},
            "matchExpressions": [{"key": "tier", "operator": "NotIn", "values": ["test"]}],
        },
        "policyTypes": ["Ingress", "Egress"],
        "ingress": [
            {
                "from": [
                    {"podSelector": {"matchLabels": {"app": "web"}}},
                    {
                        "namespaceSelector": {"matchExpressions": [{"key": "team", "operator": "Exists"}]},
                        "podSelector": {"matchLabels": {"app": "web"}},
                    },
                ],
                "ports": [{"port": "http"}, {"protocol": "SCTP", "port": 5, "endPort": 9}],
            },
            {
                "from": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}}],
                "ports": [{"port": 443}],
            },
        ],
        "egress": [
            {"ports": [{"protocol": "UDP", "port": 53}]},
            {"to": [{"namespaceSelector": {"matchLabels": {"team": "red"}}}], "ports": [{"port": 80}]},
        ],
    },
}
VALID_NAMESPACE: dict[str, Any] = {
    "apiVersion": "v1",
    "kind": "Namespace",
    "metadata": {"name": "y", "labels": {"team": "red"}},
}
VALID_SERVICE: dict[str, Any] = {
    "apiVersion": "v1",
    "kind": "Service",
    "metadata": {"name": "s", "namespace": "x"},
    "spec": {
        "selector": {"app": "db"},
        "clusterIP": "172.20.0.1",
        "clusterIPs": ["172.20.0.1", "fd00::1"],
        "ports": [{"port": 80, "targetPort": "http"}, {"protocol": "UDP", "port": 53}],
    },
}


def _pod(key: str, address: str, labels: dict[str, str]) -> Pod:
    namespace_, name = key.split("/")
    raw = {
        "metadata": {"name": name, "namespace": namespace_, "labels": labels},
        "spec": {"containers": [{"ports": [{"name": "http", "containerPort": 80}]}]},
        "status": {"podIP": address, "hostIP": "192.0.2.1"},
    }
    made, problems = pod(raw, "f")
    assert made is not None
    assert problems == []
    return made


PODS = (
    _pod("x/db", "10.9.0.1", {"app": "db"}),
    _pod("x/other", "10.9.0.2", {"app": "other"}),
    _pod("x/test", "10.9.0.3", {"app": "db", "tier": "test"}),
    _pod("x/web", "10.9.0.4", {"app": "web"}),
    _pod("y/web", "2001:db8::5", {"app": "web"}),
    _pod("z/web", "10.9.0.6", {"app": "web"}),
)
NAMESPACES = tuple(
    found
    for name, labels in (("x", {}), ("y", {"team": "red"}), ("z", {}))
    if (found := namespace({"metadata": {"name": name, "labels": labels}}, "f")[0]) is not None
)
PEERS = [
    *(each.ips[0] for each in PODS),
    *(
        parse_address(text)
        for text in ("10.0.0.1", "10.1.0.1", "192.168.0.1", "8.8.8.8", "2001:db9::1", "fd00::1")
    ),
]
Packet = tuple[Direction, bytes, int, int]
NAMES = {"spec", "from", "to", "ports", "podSelector", "namespaceSelector", "ipBlock", "matchLabels"}
NAMES |= {"matchExpressions", "key", "operator", "values", "protocol", "port", "endPort", "cidr", "except"}


def read(raw: object) -> tuple[NetworkPolicy | None, list[Problem]]:
    found, problems = network_policy(raw, "f")
    check_problems(problems)
    return found, problems


def allows(policy: NetworkPolicy) -> dict[Key, set[Packet]]:
    """What each isolated pod may receive and send; everything in a direction in which it is not isolated."""
    snapshot = Snapshot(pods=PODS, network_policies=(policy,), namespaces=NAMESPACES)
    return {
        key: {
            (direction, peer, protocol, port)
            for direction in Direction
            for peer in PEERS
            for protocol, port in PACKETS
            if (rules := each.ingress if direction is Direction.INGRESS else each.egress) is None
            or any(matches(rule, peer, protocol, port) for _, rule in rules.rules)
        }
        for key, each in effective_rules(in_force(snapshot), None).items()
        if each.ingress is not None or each.egress is not None
    }


def isolates(policy: NetworkPolicy) -> frozenset[Direction]:
    """The directions as the API server would default them."""
    if policy.policy_types is not None:
        return policy.policy_types
    return frozenset({Direction.INGRESS, *([Direction.EGRESS] if policy.egress else [])})


_good, _problems = read(VALID)
assert _good is not None
assert _problems == []
GOOD: NetworkPolicy = _good
GOOD_ALLOWS = allows(GOOD)
PLACES = places(VALID)
RULE_PLACES = [path for path in PLACES if path[:1] == ("spec",) and path[1:2] in (("ingress",), ("egress",))]


def plausible(value: object) -> bool:
    """Whether a person may have meant it somewhere in a rule: then it need not be a problem."""
    if isinstance(value, list):
        return not value or any(plausible(each) for each in value)
    if isinstance(value, int) and not isinstance(value, bool):
        return 1 <= value <= 65535
    # Letters and digits may be a label's key or value, or the name of a port.
    return isinstance(value, dict | str) or value is None


GARBAGE = VALUES.filter(lambda value: not plausible(value))


def test_what_the_comparisons_rest_on() -> None:
    db = Key("x", "db")
    assert set(GOOD_ALLOWS) == {db}
    assert isolates(GOOD) == set(Direction)
    web, other = parse_address("10.9.0.4"), parse_address("10.9.0.2")
    allowed = GOOD_ALLOWS[db]
    assert (Direction.INGRESS, web, 6, 80) in allowed
    assert (Direction.INGRESS, other, 6, 80) not in allowed
    assert (Direction.INGRESS, parse_address("10.9.0.6"), 6, 80) not in allowed, "z has no team"
    assert (Direction.INGRESS, parse_address("2001:db8::5"), 132, 5) in allowed
    assert (Direction.INGRESS, other, 6, 443) in allowed, "by its address"
    assert (Direction.INGRESS, parse_address("10.1.0.1"), 6, 443) not in allowed
    assert (Direction.EGRESS, parse_address("8.8.8.8"), 17, 53) in allowed
    assert (Direction.EGRESS, parse_address("2001:db8::5"), 6, 80) in allowed
    assert (Direction.EGRESS, other, 6, 80) not in allowed
    assert (Direction.EGRESS, other, 1, 0) not in allowed


@settings(max_examples=400, deadline=None)
@given(VALUES)
@example("\ud800")
def test_any_document_is_read_without_an_error(raw: object) -> None:
    for decode in (network_policy, namespace, service):
        item, problems = decode(raw, "f")
        assert item is not None or problems
        check_problems(problems)


@settings(max_examples=1000, deadline=None)
@given(st.sampled_from(PLACES), VALUES)
@example(("spec", "podSelector"), {"matchLabel": {"app": "db"}})
@example(("spec", "policyTypes"), ["Ingres"])
@example(("spec", "egress"), {})
def test_a_mutation_never_opens_a_pod(path: tuple[Any, ...], value: object) -> None:
    item, problems = read(mutate(VALID, path, value))
    if item is None:
        assert problems
        assert path[:1] in ((), ("metadata",)) or path == ("spec",) or path[:2] == ("spec", "podSelector")
        return
    if path in ((), ("spec",)) or path[:1] == ("metadata",):
        return  # another policy
    if path[:2] != ("spec", "podSelector"):
        assert item.pod_selector == GOOD.pod_selector
    if path[:2] == ("spec", "policyTypes"):
        readable = value in (None, []) or value in ("Ingress", "Egress")
        assert isolates(item) == set(Direction) or readable
    else:
        assert isolates(item) == isolates(GOOD)
    field = path[1] if len(path) > 1 else ""
    for name in ("ingress", "egress"):
        if field != name:
            assert getattr(item, name) == getattr(GOOD, name)
    # Whatever one item was made, the others allow nothing more.
    if field in ("ingress", "egress") and len(path) > 2:
        mutated, other = getattr(item, field), getattr(GOOD, field)
        assert [each for index, each in enumerate(mutated) if index != path[2]] == [
            each for index, each in enumerate(other) if index != path[2]
        ]


@settings(max_examples=600, deadline=None)
@given(st.sampled_from(RULE_PLACES), GARBAGE)
@example(("spec", "ingress", 1, "from", 0, "ipBlock", "except", 0), 10.1)
@example(("spec", "ingress", 0, "ports"), [True, 1.5])
@example(("spec", "ingress", 0, "ports", 0, "port"), 1.5)
@example(("spec", "ingress", 0, "from", 1, "podSelector", "matchLabels", "app"), True)
@example(("spec", "ingress", 0, "from", 1, "namespaceSelector", "matchExpressions"), False)
def test_garbage_in_a_rule_allows_nothing_more(path: tuple[Any, ...], value: object) -> None:
    item, problems = read(mutate(VALID, path, value))
    assert item is not None
    assert problems
    assert isolates(item) == isolates(GOOD)
    found = allows(item)
    assert set(found) == set(GOOD_ALLOWS)
    assert all(found[key] <= GOOD_ALLOWS[key] for key in found)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(RULE_PLACES), st.text(min_size=1, max_size=8), VALUES)
@example(("spec", "ingress", 0), "form", [])
@example(("spec", "ingress", 0, "ports", 1), "endport", 9)
@example(("spec", "ingress", 1, "from", 0, "ipBlock"), "excepts", ["10.2.0.0/16"])
@example(("spec", "ingress", 0, "from", 0, "podSelector"), "matchlabels", {"tier": "a"})
def test_an_unknown_field_allows_nothing_more(path: tuple[Any, ...], name: str, value: object) -> None:
    raw = copy.deepcopy(VALID)
    inner: Any = raw
    for step in path:
        inner = inner[step]
    assume(isinstance(inner, dict) and path[-1] != "matchLabels" and name not in NAMES)
    inner[name] = value
    item, problems = read(raw)
    assert item is not None
    assert problems
    found = allows(item)
    assert all(found[key] <= GOOD_ALLOWS[key] for key in GOOD_ALLOWS)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from([path for path in PLACES if path[:2] == ("spec", "podSelector")]), VALUES)
@example(("spec", "podSelector"), "app=db")
@example(("spec", "podSelector", "matchLabels"), ["app"])
@example(("spec", "podSelector", "matchExpressions", 0, "values"), [])
@example(("spec", "podSelector", "matchExpressions", 0, "operator"), "notin")
def test_after_a_good_version_an_unreadable_selector_frees_no_pod(
    path: tuple[Any, ...], value: object
) -> None:
    store = Store()
    good = read_contents(json.dumps(VALID).encode(), "f")
    store.replace("f", good.objects, good.problems)
    item, problems = read(mutate(VALID, path, value))
    store.replace("f", [] if item is None else [item], problems)
    (held,) = store.snapshot().network_policies
    if item is None:
        assert held == GOOD
        assert "its last good version stays in force" in str(store.snapshot().problems)
    else:
        # Nothing of it was dropped: less of a selector would select others than it says.
        assert held == item
        assert problems == []


@pytest.mark.parametrize(
    ("valid", "decode"),
    [(VALID_NAMESPACE, namespace), (VALID_SERVICE, service)],
    ids=["namespace", "service"],
)
@settings(max_examples=400, deadline=None)
@given(st.data())
def test_other_objects_lose_only_what_is_mutated(
    valid: dict[str, Any], decode: Callable[[object, str], tuple[Any, list[Problem]]], data: st.DataObject
) -> None:
    whole, none = decode(valid, "f")
    assert none == []
    path = data.draw(st.sampled_from(places(valid)))
    item, problems = decode(mutate(valid, path, data.draw(st.one_of(VALUES, ODD))), "f")
    check_problems(problems)
    if item is None:
        assert problems
        assert path[:1] in ((), ("metadata",)) or path == ("spec",)
        return
    if decode is namespace:
        assert set(item.labels.items()) <= {*whole.labels.items()} or path[:2] == ("metadata", "labels")
        return
    assert all(len(address) in (4, 16) for address in item.cluster_ips)
    assert all(1 <= each.port <= 65535 for each in item.ports)
    if any(problem.field.startswith("spec.selector") for problem in problems):
        assert item.selector == {}, "half of a selector would select more"
    elif path[:2] != ("spec", "selector") and path not in (("spec",), ("spec", "type")):
        assert item.selector == whole.selector


TEXT = yaml.safe_dump_all([VALID, VALID_NAMESPACE, VALID_SERVICE]).encode()


@settings(max_examples=400, deadline=None)
@given(st.integers(0, len(TEXT)), st.integers(0, 12), st.binary(max_size=6))
@example(TEXT.index(b"app: db") + 5, 2, b"[")
@example(TEXT.index(b"app: db") + 5, 2, b"1")
@example(TEXT.index(b"  podSelector:\n    matchExpressions"), 3, b"")
def test_a_damaged_file_frees_no_pod_of_the_policy_it_held(
    position: int, removed: int, inserted: bytes
) -> None:
    store = Store()
    good = read_contents(TEXT, "f")
    store.replace("f", good.objects, good.problems)
    found = read_contents(TEXT[:position] + inserted + TEXT[position + removed :], "f")
    check_problems(found.problems)
    store.replace("f", found.objects, found.problems)
    if Key("x", "p") not in {policy.key for policy in store.snapshot().network_policies}:
        # Only where what is there now is readable, and is something else.
        assert not [problem for problem in found.problems if not problem.object]
        renamed = [item for item in found.objects if isinstance(item, NetworkPolicy)]
        assert renamed or found.skipped or len(found.objects) < 3
