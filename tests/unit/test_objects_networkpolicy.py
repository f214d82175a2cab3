"""NetworkPolicy, Namespace and Service documents: what is bad in them is said once and allows nothing."""

from __future__ import annotations

from typing import Any

import pytest

from dataplane.addresses import parse_address, parse_prefix
from dataplane.model import (
    EVERYTHING,
    Direction,
    IPBlock,
    Key,
    LabelSelector,
    NetworkPolicyPeer,
    NetworkPolicyPort,
    NetworkPolicyRule,
    Operator,
    Requirement,
    ServicePort,
)
from dataplane.sources.contents import read_contents
from dataplane.sources.networkpolicy import namespace, network_policy, service
from dataplane.sources.store import Store

NOBODY = NetworkPolicyPeer()


def read(spec: Any) -> tuple[Any, list[str]]:
    raw = {"metadata": {"name": "p", "namespace": "x"}, "spec": spec}
    policy, problems = network_policy(raw, "file")
    return policy, [f"{problem.field}: {problem.reason}" for problem in problems]


def test_a_whole_policy() -> None:
    policy, problems = read(
        {
            "podSelector": {
                "matchLabels": {"app": "db"},
                "matchExpressions": [{"key": "tier", "operator": "NotIn", "values": ["b", "a"]}],
            },
            "policyTypes": ["Egress"],
            "ingress": [
                {
                    "from": [
                        {"podSelector": {}, "namespaceSelector": {"matchLabels": {"team": "red"}}},
                        {"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}},
                    ],
                    "ports": [{"port": "http"}, {"protocol": "UDP", "port": 5, "endPort": 9}, {}],
                }
            ],
            "egress": [{}],
        }
    )
    assert problems == []
    assert policy.key == Key("x", "p")
    assert policy.pod_selector == LabelSelector(
        (Requirement("app", Operator.IN, ("db",)), Requirement("tier", Operator.NOT_IN, ("a", "b")))
    )
    assert policy.policy_types == {Direction.EGRESS}
    block = IPBlock(parse_prefix("10.0.0.0/8")[0], (parse_prefix("10.1.0.0/16")[0],))
    assert policy.ingress == (
        NetworkPolicyRule(
            (
                NetworkPolicyPeer(EVERYTHING, LabelSelector.of({"team": "red"})),
                NetworkPolicyPeer(ip_block=block),
            ),
            (NetworkPolicyPort(None, "http"), NetworkPolicyPort(17, 5, 9), NetworkPolicyPort()),
        ),
    )
    assert policy.egress == (NetworkPolicyRule(),)


@pytest.mark.parametrize("spec", [None, {}, {"podSelector": None, "policyTypes": [], "ingress": []}])
def test_missing_null_and_empty_are_the_same(spec: Any) -> None:
    policy, problems = read(spec)
    assert problems == []
    assert (policy.pod_selector, policy.policy_types) == (EVERYTHING, None)
    assert (policy.ingress, policy.egress) == ((), ())


@pytest.mark.parametrize(
    ("selector", "line"),
    [
        ("app=db", "spec.podSelector: must be a map, not 'app=db'"),
        ({"matchLabel": {"a": "b"}}, "spec.podSelector.matchLabel: unknown field"),
        (
            {"matchLabels": {"v": 1}},
            "spec.podSelector.matchLabels[v]: 1 is not a label's value; write it in quotes",
        ),
        ({"matchLabels": {"a b": "c"}}, "spec.podSelector.matchLabels['a b']: 'a b' is not a label's name"),
        ({"matchLabels": [1]}, "spec.podSelector.matchLabels: must be a map, not a list"),
        ({"matchExpressions": {}}, "spec.podSelector.matchExpressions: must be a list, not a map"),
        (
            {"matchExpressions": [{"key": "a", "operator": "Equals", "values": ["b"]}]},
            "spec.podSelector.matchExpressions[0].operator: "
            "must be In, NotIn, Exists or DoesNotExist, not 'Equals'",
        ),
        (
            {"matchExpressions": [{"key": "a", "operator": "In"}]},
            "spec.podSelector.matchExpressions[0].values: must not be empty with In",
        ),
        (
            {"matchExpressions": [{"key": "a", "operator": "Exists", "values": ["b"]}]},
            "spec.podSelector.matchExpressions[0].values: must be empty with Exists",
        ),
        (
            {"matchExpressions": [{"operator": "Exists"}]},
            "spec.podSelector.matchExpressions[0].key: missing",
        ),
    ],
)
def test_a_bad_pod_selector_makes_the_policy_unusable(selector: Any, line: str) -> None:
    policy, problems = read({"podSelector": selector})
    assert policy is None
    assert problems == [line]
    # The same selector of a peer takes away that peer, no more.
    policy, problems = read(
        {"policyTypes": ["Ingress"], "ingress": [{"from": [{"podSelector": selector}, {"podSelector": {}}]}]}
    )
    assert policy.ingress == (NetworkPolicyRule((NOBODY, NetworkPolicyPeer(EVERYTHING))),)
    assert problems == [line.replace("spec.", "spec.ingress[0].from[0].", 1) + "; this peer matches nothing"]


@pytest.mark.parametrize(
    ("peer", "line"),
    [
        ({}, ": must have podSelector, namespaceSelector or ipBlock"),
        ({"podselector": {}}, ".podselector: unknown field"),
        (
            {"podSelector": {}, "ipBlock": {"cidr": "10.0.0.0/8"}},
            ".ipBlock: excludes podSelector and namespaceSelector",
        ),
        ({"ipBlock": {}}, ".ipBlock.cidr: missing"),
        ({"ipBlock": {"cidr": "10.0.0.0/33"}}, ".ipBlock.cidr: '10.0.0.0/33' is not a CIDR: the prefix "),
        (
            {"ipBlock": {"cidr": "10.0.0.0/8", "except": ["x"]}},
            ".ipBlock.except[0]: 'x' is not an IP address",
        ),
        (
            {"ipBlock": {"cidr": "10.0.0.0/8", "except": ["::/0"]}},
            ".ipBlock.except[0]: ::/0 is not of the same family as cidr 10.0.0.0/8",
        ),
        ({"ipBlock": {"cidr": "10.0.0.0/8", "excepts": []}}, ".ipBlock.excepts: unknown field"),
    ],
)
def test_a_bad_peer_matches_nothing(peer: Any, line: str) -> None:
    policy, problems = read({"egress": [{"to": [peer]}]})
    assert policy.egress == (NetworkPolicyRule((NOBODY,)),)  # still a rule: the pods stay isolated
    (told,) = problems
    assert told.startswith(f"spec.egress[0].to[0]{line}")
    assert told.endswith("; this peer matches nothing")


def test_host_bits_are_cleared_and_said() -> None:
    policy, (told,) = read({"ingress": [{"from": [{"ipBlock": {"cidr": "10.0.0.1/8"}}]}]})
    assert policy.ingress[0].peers[0].ip_block.cidr == parse_prefix("10.0.0.0/8")[0]
    assert told == (
        "spec.ingress[0].from[0].ipBlock.cidr: 10.0.0.1/8 has bits set after its prefix; it means 10.0.0.0/8"
    )


@pytest.mark.parametrize(
    ("port", "line"),
    [
        ({"port": 0}, ".port: must be a number from 1 to 65535, not 0"),
        ({"port": 65536}, ".port: must be a number from 1 to 65535, not 65536"),
        ({"port": True}, ".port: must be a number from 1 to 65535, not true"),
        ({"port": "80"}, ".port: '80' is text; write the number without quotes"),
        ({"port": "no--name"}, ".port: 'no--name' is not a port name"),
        ({"port": "longer-than-15-x"}, ".port: 'longer-than-15-x' is not a port name"),
        ({"port": "http", "endPort": 90}, ".endPort: needs a numeric port"),
        ({"endPort": 90}, ".endPort: needs port"),
        ({"port": 90, "endPort": 80}, ".endPort: 80 is less than port 90"),
        ({"protocol": "ICMP"}, ".protocol: must be TCP, UDP or SCTP, not 'ICMP'"),
        ({"protocol": "tcp"}, ".protocol: must be TCP, UDP or SCTP, not 'tcp'"),
        ({"ports": 80}, ".ports: unknown field"),
    ],
)
def test_a_bad_port_opens_nothing(port: Any, line: str) -> None:
    entry = f"spec.ingress[0].ports[0]{line}; this entry allows nothing"
    policy, problems = read({"ingress": [{"ports": [port, {"port": 81}]}]})
    assert policy.ingress == (NetworkPolicyRule((), (NetworkPolicyPort(None, 81),)),)
    assert problems == [entry]
    # Without another entry it must not become "every port".
    policy, problems = read({"ingress": [{"ports": [port]}]})
    assert policy.ingress == (NetworkPolicyRule((NOBODY,)),)
    assert problems == [entry, "spec.ingress[0].ports: no entry can be used; this rule allows nothing"]


@pytest.mark.parametrize(
    ("rule", "line"),
    [
        (None, ": must be a map, not null"),
        ({"form": []}, ".form: unknown field"),
        ({"to": []}, ".to: unknown field"),
        ({"from": {}}, ".from: must be a list of peers, not a map"),
        ({"ports": 80}, ".ports: must be a list of ports, not 80"),
    ],
)
def test_a_bad_rule_allows_nothing_and_keeps_its_place(rule: Any, line: str) -> None:
    policy, problems = read({"ingress": [rule, {}]})
    assert policy.ingress == (NetworkPolicyRule((NOBODY,)), NetworkPolicyRule())
    assert problems == [f"spec.ingress[0]{line}; this rule allows nothing"]


def test_rules_that_are_no_list_isolate_as_rules_would() -> None:
    policy, problems = read({"egress": "none"})
    assert policy.egress == (NetworkPolicyRule((NOBODY,)),)
    assert problems == ["spec.egress: must be a list of rules, not 'none'; nothing is allowed by it"]


@pytest.mark.parametrize("types", ["Ingress", ["ingress"], ["Ingress", None]])
def test_unreadable_policy_types_isolate_both_ways(types: Any) -> None:
    policy, (told,) = read({"policyTypes": types})
    assert policy.policy_types == set(Direction)
    assert told.endswith("; its pods are isolated both ways")


def test_the_last_good_version_stays_in_force() -> None:
    def contents(selector: str) -> bytes:
        return (
            "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\n"
            f"metadata: {{name: p, namespace: x}}\nspec: {{podSelector: {selector}}}\n"
        ).encode()

    store = Store()
    bad = read_contents(contents("{matchLabels: {a: 1}}"), "f")
    store.replace("f", bad.objects, bad.problems)
    assert store.snapshot().network_policies == ()
    (told,) = store.snapshot().problems
    assert str(told).startswith("f: NetworkPolicy x/p: spec.podSelector.matchLabels[a]: 1 is not")
    assert str(told).endswith("; it is not in force")
    good = read_contents(contents("{}"), "f")
    store.replace("f", good.objects, good.problems)
    store.replace("f", bad.objects, bad.problems)
    snapshot = store.snapshot()
    assert snapshot.network_policies == tuple(good.objects)
    assert str(snapshot.problems[0]).endswith("; its last good version stays in force")


def test_namespaces() -> None:
    found, problems = namespace({"metadata": {"name": "x", "labels": {"team": "red", "n": 1}}}, "f")
    assert found is not None
    assert (found.name, found.labels) == ("x", {"team": "red"})
    assert [str(each) for each in problems] == [
        "f: Namespace x: metadata.labels[n]: 1 is not a label; it is not used"
    ]
    assert namespace({"metadata": {"name": "X"}}, "f")[0] is None


def test_services() -> None:
    def read_service(spec: Any) -> tuple[Any, list[str]]:
        found, problems = service({"metadata": {"name": "s", "namespace": "x"}, "spec": spec}, "f")
        return found, [f"{problem.field}: {problem.reason}" for problem in problems]

    found, problems = read_service(
        {
            "selector": {"app": "db"},
            "clusterIP": "10.2.0.1",
            "clusterIPs": ["10.2.0.1", "fd00::1"],
            "ports": [{"port": 80, "targetPort": "http"}, {"protocol": "UDP", "port": 53}],
        }
    )
    assert problems == []
    assert found.cluster_ips == (parse_address("10.2.0.1"), parse_address("fd00::1"))
    assert found.ports == (ServicePort(6, 80, "http"), ServicePort(17, 53, 53))
    assert read_service({"clusterIP": "None"})[0].cluster_ips == ()
    assert read_service({"type": "ExternalName", "clusterIP": "10.2.0.1"})[0].cluster_ips == ()
    found, problems = read_service({"selector": {"a": 1}, "clusterIP": "x", "ports": [{"port": 0}]})
    assert (found.selector, found.cluster_ips, found.ports) == ({}, (), ())
    assert len(problems) == 3


def test_a_bad_version_of_a_namespace_names_it_without_a_namespace() -> None:
    found = read_contents(b"{apiVersion: v2, kind: Namespace, metadata: {name: x}}", "f")
    assert [str(each) for each in found.problems] == [
        "f: Namespace x: apiVersion: must be v1 for a Namespace, not 'v2'"
    ]
