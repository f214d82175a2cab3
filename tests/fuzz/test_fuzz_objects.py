"""Mutated objects and text.

Invariant: whatever a document holds, reading it raises nothing, and a mutation never opens a pod:
the object is unusable (then its last good version stays), or its isolation and its pods stand, and
every rule that it allows something by is one that the valid object has at that place.
"""

from __future__ import annotations

import copy
import json
import math
import re
from typing import Any

import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dataplane.addresses import parse_address
from dataplane.model import Direction, Key, PolicyEndpoint, Problem, Rule, Snapshot
from dataplane.policy.effective import effective_rules
from dataplane.policy.reference import matches
from dataplane.sources.contents import read_contents
from dataplane.sources.objects import pod, policy_endpoint
from dataplane.sources.store import Store
from dataplane.sources.text import TextError, Unreadable, documents

VALID: dict[str, Any] = {
    "apiVersion": "networking.k8s.aws/v1alpha1",
    "kind": "PolicyEndpoint",
    "metadata": {
        "name": "p-1",
        "namespace": "x",
        "labels": {"podgate.dev/port-group": "g1"},
        "annotations": {"networking.k8s.aws/last-change-trigger-time": "2026-01-31T12:00:00.5Z"},
    },
    "spec": {
        "policyRef": {"name": "p", "namespace": "x"},
        "podSelector": {},
        "podIsolation": ["Ingress", "Egress"],
        "podSelectorEndpoints": [
            {"name": "a", "namespace": "x", "podIP": "10.0.0.5", "hostIP": "192.0.2.1"},
            {"name": "b", "namespace": "x", "podIP": "2001:db8::5", "hostIP": "192.0.2.1"},
        ],
        "ingress": [
            {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"], "ports": [{"port": 80}, {"protocol": "UDP"}]},
            {"cidr": "2001:db8::/32", "ports": [{"protocol": "SCTP", "port": 5, "endPort": 9}]},
        ],
        "egress": [{"cidr": "0.0.0.0/0", "except": ["10.0.0.0/8", "192.168.0.0/16"]}],
    },
}

VALID_POD: dict[str, Any] = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "a", "namespace": "x", "uid": "1", "labels": {"a": "b"}},
    "spec": {"nodeName": "n", "containers": [{"ports": [{"containerPort": 80, "name": "http"}]}]},
    "status": {"phase": "Running", "podIPs": [{"ip": "10.0.0.5"}], "hostIP": "192.0.2.1"},
}

ODD = st.sampled_from(
    [None, True, 0, 80, -1, 10**40, 1.5, math.nan, math.inf, "", "x", "\ud800", "\x00", "10.0.0.0/8", [], {}]
)
VALUES = st.recursive(
    st.one_of(ODD, st.integers(), st.floats(), st.text(max_size=8), st.just(Unreadable("a map twice"))),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(st.text(max_size=4), st.integers()), inner, max_size=3),
    ),
    max_leaves=8,
)

HERE = frozenset({parse_address("192.0.2.1")})
PEERS = [
    parse_address(text)
    for text in ("10.0.0.1", "10.1.0.1", "10.200.0.1", "192.168.0.1", "8.8.8.8", "2001:db8::1", "2001:db9::1")
]
PACKETS = [(6, 80), (6, 81), (6, 443), (17, 53), (132, 5), (132, 10), (1, 0)]


def places(value: object, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a document, as the keys that lead there."""
    found = [path]
    if isinstance(value, dict):
        for key, inner in value.items():
            found += places(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            found += places(inner, (*path, index))
    return found


PLACES = places(VALID)
POD_PLACES = places(VALID_POD)


def mutate(valid: object, path: tuple[Any, ...], value: object) -> object:
    """`valid` with another value at `path`."""
    if not path:
        return value
    whole = copy.deepcopy(valid)
    inner: Any = whole
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = copy.deepcopy(value)
    return whole


def parsed(raw: object) -> PolicyEndpoint:
    item, problems = policy_endpoint(raw, "f")
    assert item is not None
    assert problems == []
    return item


GOOD = parsed(VALID)


def check_problems(problems: list[Problem]) -> None:
    for problem in problems:
        text = str(problem)
        assert text.encode()
        assert "\n" not in text
        assert len(text) < 500


@settings(max_examples=400, deadline=None)
@given(VALUES)
@example("\ud800")
def test_any_document_is_read_without_an_error(raw: object) -> None:
    for read in (policy_endpoint, pod):
        item, problems = read(raw, "f")
        assert item is not None or problems
        check_problems(problems)


@settings(max_examples=1000, deadline=None)
@given(st.sampled_from(PLACES), VALUES)
def test_a_mutation_never_opens_a_pod(path: tuple[Any, ...], value: object) -> None:
    item, problems = policy_endpoint(mutate(VALID, path, value), "f")
    check_problems(problems)
    if item is None:
        assert problems
        # Unusable: only what the whole object hangs on may do that.
        assert (
            path == ()
            or path[0] == "metadata"
            or path[:2] in ((), ("spec",), ("spec", "policyRef"))
            or (path == ("spec", "podSelectorEndpoints"))
        )
        return
    field = path[1] if path[:1] == ("spec",) and len(path) > 1 else ""
    if field != "podIsolation":
        assert item.isolates == GOOD.isolates
    elif value not in (None, []) or len(path) > 2:
        readable = isinstance(value, str) and value in ("Ingress", "Egress")
        assert item.isolates == GOOD.isolates or readable
    if field != "podSelectorEndpoints":
        assert item.endpoints == GOOD.endpoints
    if field not in ("ingress", "egress"):
        assert (item.ingress, item.egress) == (GOOD.ingress, GOOD.egress)


RULE_PLACES = [path for path in PLACES if path[:1] == ("spec",) and path[1:2] in (("ingress",), ("egress",))]


def plausible(value: object) -> bool:
    """Whether somebody may have meant it: then it need not be a problem, and may allow something."""
    if isinstance(value, list):
        return not value or any(plausible(each) for each in value)
    if isinstance(value, int) and not isinstance(value, bool):
        return 1 <= value <= 65535
    return isinstance(value, dict) or value in (None, "", "TCP", "UDP", "SCTP", "10.0.0.0/8")


GARBAGE = VALUES.filter(lambda value: not plausible(value))


def _allows(rules: tuple[Rule, ...]) -> set[tuple[bytes, int, int]]:
    return {
        (peer, protocol, port)
        for peer in PEERS
        for protocol, port in PACKETS
        if any(matches(rule, peer, protocol, port) for rule in rules)
    }


@settings(max_examples=1000, deadline=None)
@given(st.sampled_from(RULE_PLACES), GARBAGE)
@example(("spec", "ingress", 0, "except", 0), "10.1.0.0/33")
@example(("spec", "ingress", 0, "except"), "10.1.0.0/16")
@example(("spec", "ingress", 1, "ports", 0), "5")
@example(("spec", "ingress", 1, "ports", 0, "port"), "5")
@example(("spec", "ingress", 0, "ports"), [None, None])
@example(("spec", "ingress", 0, "ports"), {"port": 80})
def test_garbage_in_a_rule_allows_nothing_more(path: tuple[Any, ...], value: object) -> None:
    item, problems = policy_endpoint(mutate(VALID, path, value), "f")
    assert item is not None
    assert problems
    assert (item.isolates, item.endpoints) == (GOOD.isolates, GOOD.endpoints)
    assert _allows(item.ingress) <= _allows(GOOD.ingress)
    assert _allows(item.egress) <= _allows(GOOD.egress)
    rules = effective_rules(Snapshot((item,)), HERE)
    assert set(rules) == {Key("x", "a"), Key("x", "b")}
    assert all(each.ingress is not None and each.egress is not None for each in rules.values())


@settings(max_examples=600, deadline=None)
@given(st.sampled_from(RULE_PLACES), st.text(min_size=1, max_size=6), VALUES)
@example(("spec", "ingress", 0), "excepts", ["10.1.0.0/16"])
@example(("spec", "ingress", 1, "ports", 0), "endport", 9)
def test_an_unknown_field_allows_nothing_more(path: tuple[Any, ...], name: str, value: object) -> None:
    raw = copy.deepcopy(VALID)
    inner: Any = raw
    for step in path:
        inner = inner[step]
    if not isinstance(inner, dict) or name in (
        "cidr",
        "except",
        "ports",
        "domainName",
        "port",
        "endPort",
        "protocol",
    ):
        return
    inner[name] = value
    item, problems = policy_endpoint(raw, "f")
    assert item is not None
    assert problems
    assert _allows(item.ingress) <= _allows(GOOD.ingress)
    assert _allows(item.egress) <= _allows(GOOD.egress)


@settings(max_examples=600, deadline=None)
@given(st.sampled_from(PLACES), VALUES)
def test_after_a_good_version_a_mutation_frees_no_pod(path: tuple[Any, ...], value: object) -> None:
    """Through the store: what is unusable stays as it was."""
    if path[:1] in (("kind",), ("metadata",)) or path == ():
        # Another name or kind is another object; the good one is then gone from the file.
        return
    if path[:2] == ("spec", "podIsolation") and (value in (None, []) or value in ("Ingress", "Egress")):
        return
    if path == ("spec", "podSelectorEndpoints") and not (
        value and isinstance(value, (str, dict, int, float))
    ):
        return
    if path[:2] == ("spec", "podSelectorEndpoints"):
        return
    store = Store()
    good = read_contents(json.dumps(VALID).encode(), "f")
    store.replace("f", good.objects, good.problems)
    item, problems = policy_endpoint(mutate(VALID, path, value), "f")
    store.replace("f", [] if item is None else [item], problems)
    rules = effective_rules(store.snapshot(), HERE)
    assert set(rules) == {Key("x", "a"), Key("x", "b")}
    for each in rules.values():
        assert each.ingress is not None
        assert each.egress is not None


@settings(max_examples=800, deadline=None)
@given(st.sampled_from(POD_PLACES), VALUES)
def test_a_mutated_pod_is_freed_only_by_saying_so(path: tuple[Any, ...], value: object) -> None:
    item, problems = pod(mutate(VALID_POD, path, value), "f")
    check_problems(problems)
    if item is None:
        assert problems
        return
    assert not item.finished or value in ("Succeeded", "Failed") or path in ((), ("status",))
    assert not item.host_network or path in ((), ("spec",))
    assert all(len(address) in (4, 16) for address in (*item.ips, *item.host_ips))
    assert all(1 <= port.port <= 65535 for port in item.ports)


# --- text ---------------------------------------------------------------------------------------------

TEXT = yaml.safe_dump_all([VALID, VALID_POD]).encode()


def read_everything(data: bytes) -> None:
    for only_json in (False, True):
        for document in documents(data, only_json=only_json):
            assert document is not None or only_json
            if isinstance(document, TextError):
                assert "\n" not in str(document)
                assert len(str(document)) < 400
        check_problems(read_contents(data, "f", only_json=only_json).problems)


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=60))
@example(b"\xff\xfe")
@example(b"a: &a [*a]")
@example(b"\xf0\x9f\x98\x80: !!x")
def test_any_bytes(data: bytes) -> None:
    read_everything(data)


@settings(max_examples=500, deadline=None)
@given(st.text("{}[]:,-?&*!|>'\"%@`#<~ \n\tab1.", max_size=40))
def test_any_yaml_signs(text: str) -> None:
    read_everything(text.encode())


@settings(max_examples=500, deadline=None)
@given(st.integers(0, len(TEXT)), st.integers(0, 12), st.binary(max_size=6))
def test_damaged_files(position: int, removed: int, inserted: bytes) -> None:
    read_everything(TEXT[:position] + inserted + TEXT[position + removed :])


class GoLikeDumper(yaml.SafeDumper):
    """Quotes text that YAML 1.2 and kubectl take for a number, such as 0E0; YAML 1.1 does not."""


GoLikeDumper.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$"),
    list("-+.0123456789"),
)


@settings(max_examples=300, deadline=None)
@example("0E0")
@example("1.e5")
@example("09")
@given(
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(-(10**18), 10**18), st.text(max_size=8)),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
        ),
        max_leaves=8,
    ).filter(lambda value: value is not None)
)
def test_what_is_written_is_read_back(value: object) -> None:
    def printable(value: object) -> bool:
        return all(
            ord(sign) >= 0x20 and sign not in "\x7f\ufeff\ufffe\uffff"
            for sign in json.dumps(value, ensure_ascii=False)
        )

    assert list(documents(json.dumps(value).encode(), only_json=True)) == [value]
    if printable(value):
        (found,) = documents(yaml.dump(value, Dumper=GoLikeDumper, allow_unicode=False).encode())
        assert found == value


def test_isolation_directions_of_the_valid_object() -> None:
    # What the comparisons above rest on.
    assert GOOD.isolates == set(Direction)
    assert len(GOOD.ingress) == 2
    assert _allows(GOOD.ingress)
    assert _allows(GOOD.egress)
