"""The upstream NetworkPolicy conformance cases, by the engine's verdict on resolved policies.

Namespaces x, y, z with pods a, b, c, each serving 80 and 81. Expectations are written from the
meaning of each policy: `expect(source, destination)` says whether the source may connect.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dataplane._engine import judge_flow
from dataplane.addresses import parse_address
from dataplane.model import PROTOCOLS, Snapshot
from dataplane.policy.compile import Compiler
from dataplane.policy.explain import table_of_everything
from dataplane.policy.resolve import in_force
from dataplane.sources.contents import read_contents
from dataplane.sources.store import Store

Raw = dict[str, Any]
Expect = Callable[[str, str], bool]

PODS = [f"{ns}/{name}" for ns in "xyz" for name in "abc"]


def address(pod: str, family: int) -> str:
    number = PODS.index(pod) + 1
    return f"10.0.0.{number}" if family == 4 else f"fd00::{number}"


def world(*policies: Raw, labels: dict[str, Raw] | None = None) -> Snapshot:
    labels = labels or {}
    ports = [
        {"name": f"serve-{port}-{name.lower()}", "containerPort": port, "protocol": name}
        for port in (80, 81)
        for name in PROTOCOLS
    ]
    items: list[Raw] = [
        {
            "apiVersion": "v1",
            "kind": "Namespace",
            "metadata": {"name": ns, "labels": {"ns": ns, **labels.get(ns, {})}},
        }
        for ns in "xyz"
    ]
    for pod in PODS:
        ns, name = pod.split("/")
        items.append(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": name, "namespace": ns, "labels": {"pod": name, **labels.get(pod, {})}},
                "spec": {"containers": [{"ports": ports}]},
                "status": {
                    "phase": "Running",
                    "hostIP": "192.0.2.1",
                    "podIPs": [{"ip": address(pod, 4)}, {"ip": address(pod, 6)}],
                },
            }
        )
    for number, spec in enumerate(policies):
        metadata = {"name": f"p{number}", "namespace": spec.get("in", "x")}
        written = {name: value for name, value in spec.items() if name != "in"}
        items.append(
            {
                "apiVersion": "networking.k8s.io/v1",
                "kind": "NetworkPolicy",
                "metadata": metadata,
                "spec": written,
            }
        )
    found = read_contents(json.dumps({"kind": "List", "items": items}).encode(), "f", only_json=True)
    assert found.problems == []
    store = Store()
    store.replace("f", found.objects, ())
    return in_force(store.snapshot())


def check(snapshot: Snapshot, expect: Expect, port: int = 80, protocol: str = "TCP") -> None:
    table = table_of_everything(snapshot, Compiler())
    for family in (4, 6):
        wrong = [
            f"{source} → {destination} v{family}"
            for source in PODS
            for destination in PODS
            if source != destination
            and judge_flow(
                table,
                parse_address(address(source, family)),
                parse_address(address(destination, family)),
                PROTOCOLS[protocol],
                40000,
                port,
            ).allow
            != expect(source, destination)
        ]
        assert wrong == []


def pods(*names: str) -> Raw:
    return {"matchExpressions": [{"key": "pod", "operator": "In", "values": list(names)}]}


def namespace(name: str) -> Raw:
    return {"matchLabels": {"ns": name}}


A = {"matchLabels": {"pod": "a"}}
INGRESS, EGRESS, BOTH = ["Ingress"], ["Egress"], ["Ingress", "Egress"]
NOT_X = {"matchExpressions": [{"key": "ns", "operator": "NotIn", "values": ["x"]}]}
DEFAULT_NAME = "kubernetes.io/metadata.name"


def to_a(*sources: str) -> Expect:
    """Only `sources` (namespaces or pods) reach x/a; everything else is open."""
    return lambda s, d: d != "x/a" or s in sources or s[0] in sources


def from_a(*destinations: str) -> Expect:
    return lambda s, d: s != "x/a" or d in destinations or d[0] in destinations


def ingress(*peers: Raw, ports: list[Raw] | None = None) -> Raw:
    rule: Raw = {"from": list(peers)}
    return {
        "podSelector": A,
        "policyTypes": INGRESS,
        "ingress": [rule if ports is None else {**rule, "ports": ports}],
    }


def egress(*peers: Raw, ports: list[Raw] | None = None) -> Raw:
    rule: Raw = {"to": list(peers)}
    return {
        "podSelector": A,
        "policyTypes": EGRESS,
        "egress": [rule if ports is None else {**rule, "ports": ports}],
    }


@pytest.mark.parametrize("protocol", ["TCP", "UDP", "SCTP"])
@pytest.mark.parametrize(
    ("policy", "expect"),
    [
        pytest.param(
            {"podSelector": {}, "policyTypes": INGRESS}, lambda s, d: d[0] != "x", id="deny-ingress"
        ),
        pytest.param(
            {"podSelector": {}, "policyTypes": BOTH}, lambda s, d: "x" not in (s[0], d[0]), id="deny-all"
        ),
        pytest.param(ingress({"podSelector": pods("b")}), to_a("x/b"), id="pod-of-own-namespace"),
        pytest.param(ingress({"namespaceSelector": {}}), to_a("x", "y", "z"), id="all-namespaces"),
        pytest.param(ingress({"namespaceSelector": namespace("y")}), to_a("y"), id="one-namespace"),
        pytest.param(ingress({"namespaceSelector": NOT_X}), to_a("y", "z"), id="namespace-expression"),
        pytest.param(
            ingress({"namespaceSelector": namespace("y")}, {"podSelector": pods("b")}),
            to_a("y", "x/b"),
            id="pod-or-namespace",
        ),
        pytest.param(
            ingress({"namespaceSelector": namespace("y"), "podSelector": pods("b")}),
            to_a("y/b"),
            id="pod-and-namespace",
        ),
        pytest.param(
            ingress({"namespaceSelector": NOT_X, "podSelector": pods("b", "c")}),
            to_a("y/b", "y/c", "z/b", "z/c"),
            id="pods-and-other-namespaces",
        ),
        pytest.param(
            ingress({"podSelector": pods("b")}, {"podSelector": pods("c")}),
            to_a("x/b", "x/c"),
            id="any-of-pods",
        ),
        pytest.param(
            {"podSelector": {}, "ingress": [{"from": [{"podSelector": {}}]}]},
            lambda s, d: d[0] != "x" or s[0] == "x",
            id="deny-other-namespaces",
        ),
        pytest.param({"podSelector": {}, "ingress": [{}]}, lambda s, d: True, id="allow-all"),
        pytest.param({"podSelector": A, "policyTypes": EGRESS}, from_a(), id="deny-egress-of-a-pod"),
        pytest.param(
            {"podSelector": {}, "policyTypes": EGRESS},
            lambda s, d: s[0] != "x",
            id="deny-egress-of-a-namespace",
        ),
        pytest.param(
            egress({"namespaceSelector": namespace("y"), "podSelector": A}),
            from_a("y/a"),
            id="egress-to-one-pod",
        ),
        pytest.param(
            egress({"ipBlock": {"cidr": "10.0.0.4/32"}}, {"ipBlock": {"cidr": "fd00::4/128"}}),
            from_a("y/a"),
            id="egress-to-an-address",
        ),
        pytest.param(
            egress(
                {"ipBlock": {"cidr": "10.0.0.0/24", "except": ["10.0.0.4/32"]}},
                {"ipBlock": {"cidr": "fd00::/64", "except": ["fd00::4/128"]}},
            ),
            from_a(*(pod for pod in PODS if pod != "y/a")),
            id="except",
        ),
        pytest.param(
            ingress({"namespaceSelector": {"matchLabels": {DEFAULT_NAME: "y"}}}), to_a("y"), id="default-name"
        ),
        pytest.param(
            egress(
                {
                    "namespaceSelector": {
                        "matchExpressions": [{"key": DEFAULT_NAME, "operator": "NotIn", "values": ["y"]}]
                    }
                }
            ),
            from_a("x", "z"),
            id="default-name-not-in",
        ),
    ],
)
def test_who_reaches_whom(policy: Raw, expect: Expect, protocol: str) -> None:
    check(world(policy), expect, 80, protocol)
    check(world(policy), expect, 81, protocol)


FROM_Y = {"namespaceSelector": namespace("y")}


@pytest.mark.parametrize(
    ("policies", "port", "protocol", "expect"),
    [
        # One port, then a second policy that adds the other, then one that allows everything.
        ([ingress(FROM_Y, ports=[{"port": 81}])], 81, "TCP", to_a("y")),
        ([ingress(FROM_Y, ports=[{"port": 81}])], 80, "TCP", to_a()),
        (
            [ingress(FROM_Y, ports=[{"port": 81}]), ingress(FROM_Y, ports=[{"port": 80}])],
            80,
            "TCP",
            to_a("y"),
        ),
        ([ingress(FROM_Y, ports=[{"port": 81}]), ingress()], 80, "TCP", to_a("x", "y", "z")),
        # Named ports.
        ([ingress(ports=[{"port": "serve-80-tcp"}])], 80, "TCP", to_a("x", "y", "z")),
        ([ingress(ports=[{"port": "serve-80-tcp"}])], 81, "TCP", to_a()),
        ([ingress(FROM_Y, ports=[{"port": "serve-80-tcp"}])], 80, "TCP", to_a("y")),
        ([egress(FROM_Y, ports=[{"port": "serve-80-tcp"}])], 80, "TCP", from_a("y")),
        ([egress(FROM_Y, ports=[{"port": "serve-80-tcp"}])], 81, "TCP", from_a()),
        ([egress(ports=[{"port": "serve-80-tcp"}])], 80, "TCP", from_a("x", "y", "z")),
        ([egress(ports=[{"port": "serve-80-tcp"}])], 81, "TCP", from_a()),
        # A protocol without a port; another protocol.
        ([ingress(ports=[{"protocol": "UDP"}])], 81, "UDP", to_a("x", "y", "z")),
        ([ingress(ports=[{"protocol": "UDP"}])], 81, "TCP", to_a()),
        ([ingress(ports=[{"protocol": "SCTP", "port": 80}])], 80, "TCP", to_a()),
        ([ingress(ports=[{"protocol": "SCTP", "port": 80}])], 80, "SCTP", to_a("x", "y", "z")),
        ([ingress(ports=[{"protocol": "UDP", "port": 80}])], 80, "TCP", to_a()),
        # endPort: outside, edge, inside.
        ([ingress(ports=[{"port": 78, "endPort": 80}])], 80, "TCP", to_a("x", "y", "z")),
        ([ingress(ports=[{"port": 78, "endPort": 80}])], 81, "TCP", to_a()),
        ([egress(ports=[{"port": 80, "endPort": 82}])], 81, "TCP", from_a("x", "y", "z")),
        ([egress(ports=[{"port": 82, "endPort": 90}])], 81, "TCP", from_a()),
        # Both ends must allow.
        (
            [{"podSelector": A, "ingress": [{}]}, {"in": "y", "podSelector": A, "policyTypes": EGRESS}],
            80,
            "TCP",
            lambda s, d: s != "y/a",
        ),
        # The union of blocks with holes: what one leaves out, another lets in.
        (
            [
                egress({"ipBlock": {"cidr": "10.0.0.0/24", "except": ["10.0.0.4/30"]}}),
                egress({"ipBlock": {"cidr": "10.0.0.4/32"}}, {"ipBlock": {"cidr": "fd00::/126"}}),
                egress({"ipBlock": {"cidr": "fd00::4/128"}}, {"ipBlock": {"cidr": "fd00::8/125"}}),
            ],
            80,
            "TCP",
            from_a("x", "y/a", "z/b", "z/c"),
        ),
    ],
)
def test_ports_and_unions(policies: list[Raw], port: int, protocol: str, expect: Expect) -> None:
    check(world(*policies), expect, port, protocol)


def test_labels_decide_at_once() -> None:
    by_label = ingress({"namespaceSelector": {"matchLabels": {"ns2": "new"}}})
    check(world(by_label), to_a())
    check(world(by_label, labels={"y": {"ns2": "new"}}), to_a("y"))
    client = ingress({"podSelector": {"matchLabels": {"role": "client"}}})
    check(world(client), to_a())
    check(world(client, labels={"x/b": {"role": "client"}}), to_a("x/b"))
    target = {"podSelector": {"matchLabels": {"target": "isolated"}}, "policyTypes": INGRESS}
    check(world(target), lambda s, d: True)
    check(world(target, labels={"x/a": {"target": "isolated"}}), to_a())


def test_the_tests_of_behaviour_around_the_rules_are_there() -> None:
    netns = Path(__file__).parents[1] / "netns"
    named = re.findall(r"(test_\w+)::(test_\w+)", (netns / "conformance.py").read_text())
    assert len(named) >= 20
    for file, name in named:
        assert f"\ndef {name}(" in (netns / f"{file}.py").read_text(), f"{file}::{name}"
