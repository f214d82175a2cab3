"""Suggested policies: what they select and allow, and what applying them changes; written by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import yaml
from test_why import ns, pod, policy, read

from dataplane._engine import judge_flow
from dataplane.addresses import format_address
from dataplane.addresses import parse_address as address
from dataplane.model import (
    PROTOCOL_NAMES,
    Direction,
    Key,
    NetworkPolicy,
    PodEndpoint,
    PolicyEndpoint,
    Snapshot,
)
from dataplane.policy.compile import Compiler
from dataplane.policy.explain import table_of_everything
from dataplane.policy.resolve import in_force
from dataplane.policy.suggest import Suggestion, Suggestions
from dataplane.policy.why import Whys
from dataplane.sources.networkpolicy import network_policy

Raw = dict[str, Any]
INGRESS, EGRESS = Direction.INGRESS, Direction.EGRESS
DENY = policy("x/deny", podSelector={}, policyTypes=["Ingress", "Egress"])
WORLD = [
    ns("x"),
    ns("y"),
    pod("x/web-1", "10.0.0.1", "fd00::1", labels={"app": "web", "tier": "front", "pod-template-hash": "7d9"}),
    pod("x/web-2", "10.0.0.2", "fd00::2", labels={"app": "web", "tier": "front", "pod-template-hash": "7d9"}),
    pod("x/db-0", "10.0.0.3", "fd00::3", labels={"app": "db", "statefulset.kubernetes.io/pod-name": "db-0"}),
    pod("y/api", "10.0.0.4", "fd00::4", labels={"app.kubernetes.io/name": "api", "app": "old-name"}),
    pod("y/agent", "192.0.2.1", labels={"app": "agent"}, host=True),
    pod("x/plain", "10.0.0.6"),
]
WEB, DB = Key("x", "web-1"), Key("x", "db-0")


def suggest(
    known: Snapshot,
    own: Key = DB,
    peer: str = "10.0.0.1",
    port: int = 5432,
    protocol: int | None = 6,
    direction: Direction = INGRESS,
) -> Suggestion:
    return Suggestions(known, Whys(known)).allow(own, direction, address(peer), protocol, port)


def applied(known: Snapshot, made: Suggestion) -> Snapshot:
    """The snapshot with the suggestion, read back from its YAML as `kubectl apply` would send it."""
    found, problems = network_policy(yaml.safe_load(made.yaml()), "suggestion")
    assert problems == []
    assert found == made.policy
    assert found is not None
    policies = (*known.network_policies, found)
    return replace(known, network_policies=tuple(sorted(policies, key=lambda each: each.key)))


def reached(known: Snapshot, *more: str) -> set[tuple[str, str, str]]:
    """(source, destination, port) of everything allowed, over some ports and all addresses."""
    table = table_of_everything(in_force(known), Compiler())
    ips = [*(ip for each in known.pods if not each.finished for ip in each.ips), *map(address, more)]
    return {
        (
            format_address(source),
            format_address(destination),
            f"{port}/{PROTOCOL_NAMES.get(protocol, 'ICMP')}",
        )
        for source in ips
        for destination in ips
        if len(source) == len(destination) and source != destination
        for protocol, port in ((6, 5432), (6, 80), (17, 5432), (1 if len(source) == 4 else 58, 0))
        if judge_flow(table, source, destination, protocol, 40000, port).allow
    }


def only_ingress(known: Snapshot) -> Snapshot:
    """Without what stands in the way of egress, so that one policy is enough."""
    return replace(
        known,
        network_policies=tuple(
            replace(each, policy_types=frozenset({INGRESS})) for each in known.network_policies
        ),
    )


def test_yaml_as_it_is_applied() -> None:
    made = suggest(read(*WORLD, DENY))
    assert made.yaml() == (
        "---\n"
        "apiVersion: networking.k8s.io/v1\n"
        "kind: NetworkPolicy\n"
        "metadata:\n"
        "  name: allow-db-from-web-5432-tcp\n"
        "  namespace: x\n"
        "spec:\n"
        "  podSelector:\n"
        "    matchLabels:\n"
        "      app: db\n"
        "  policyTypes:\n"
        "  - Ingress\n"
        "  ingress:\n"
        "  - from:\n"
        "    - podSelector:\n"
        "        matchLabels:\n"
        "          app: web\n"
        "    ports:\n"
        "    - protocol: TCP\n"
        "      port: 5432\n"
    )
    assert made.comments == ()


def test_what_it_opens_is_the_workloads_and_the_port() -> None:
    known = only_ingress(read(*WORLD, DENY))
    before, after = reached(known), reached(applied(known, suggest(known)))
    pairs = [
        ("10.0.0.1", "10.0.0.3"),
        ("10.0.0.2", "10.0.0.3"),
        ("fd00::1", "fd00::3"),
        ("fd00::2", "fd00::3"),
    ]
    assert after - before == {(*pair, "5432/TCP") for pair in pairs}
    assert not before - after


def test_both_ends_deny_and_each_gets_its_policy() -> None:
    known = read(*WORLD, DENY)
    one = suggest(known)
    other = suggest(known, WEB, "10.0.0.3", direction=EGRESS)
    assert one.policy is not None
    assert other.policy is not None
    assert other.policy.key == Key("x", "allow-web-to-db-5432-tcp")
    assert (other.policy.policy_types, other.policy.ingress) == (frozenset({EGRESS}), ())
    packet = ("10.0.0.1", "10.0.0.3", "5432/TCP")
    assert packet not in reached(applied(known, one))
    assert packet not in reached(applied(known, other))
    assert packet in reached(applied(applied(known, one), other))


def test_a_peer_in_another_namespace_is_named_by_it() -> None:
    made = suggest(read(*WORLD, DENY), peer="10.0.0.4")
    document = made.document()
    assert document is not None
    assert document["metadata"]["name"] == "allow-db-from-y-api-5432-tcp"
    assert document["spec"]["ingress"][0]["from"] == [
        {
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "y"}},
            "podSelector": {"matchLabels": {"app.kubernetes.io/name": "api"}},
        }
    ]


@pytest.mark.parametrize(
    ("peer", "cidr", "words"),
    [
        ("203.0.113.9", "203.0.113.9/32", ""),
        ("2001:db8::9", "2001:db8::9/128", ""),
        ("192.0.2.1", "192.0.2.1/32", "192.0.2.1 is a node's address"),
        ("10.0.0.6", "10.0.0.6/32", "x/plain has no labels"),
    ],
)
def test_a_peer_that_no_label_names_is_an_address(peer: str, cidr: str, words: str) -> None:
    known = only_ingress(read(*WORLD, DENY))
    made = suggest(known, peer=peer)
    document = made.document()
    assert document is not None
    assert document["spec"]["ingress"][0]["from"] == [{"ipBlock": {"cidr": cidr}}]
    assert [each.startswith(words) for each in made.comments] == ([True] if words else [])
    before = reached(known, "203.0.113.9", "2001:db8::9")
    assert reached(applied(known, made), "203.0.113.9", "2001:db8::9") - before == {
        (peer, "10.0.0.3" if "." in peer else "fd00::3", "5432/TCP")
    }


def test_icmp_opens_every_port_and_says_so() -> None:
    known = only_ingress(read(*WORLD, DENY))
    made = suggest(known, peer="203.0.113.9", protocol=None, port=0)
    assert made.policy is not None
    assert made.policy.ingress[0].ports == ()
    assert made.policy.key.name == "allow-db-from-203-0-113-9-icmp"
    (comment,) = made.comments
    assert "ICMP" in comment
    assert f"---\n# {comment}\napiVersion:" in made.yaml()
    assert ("203.0.113.9", "10.0.0.3", "0/ICMP") in reached(applied(known, made), "203.0.113.9")


def labels_of(*raws: Raw, own: Key, direction: Direction = INGRESS) -> Raw:
    document = suggest(read(ns("x"), *raws), own, "203.0.113.9", direction=direction).document()
    assert document is not None
    selector = document["spec"]["podSelector"]
    assert isinstance(selector, dict)
    return selector


def test_labels_are_as_few_as_tell_the_workload() -> None:
    helm = {"app.kubernetes.io/name": "web", "app.kubernetes.io/instance": "one", "helm.sh/chart": "web-1.2"}
    pods = [
        pod("x/a", "10.0.0.1", labels={**helm, "zone": "1"}),
        pod("x/b", "10.0.0.2", labels={**helm, "zone": "1", "app.kubernetes.io/instance": "two"}),
    ]
    assert labels_of(pods[0], DENY, own=Key("x", "a")) == {"matchLabels": {"app.kubernetes.io/name": "web"}}
    assert labels_of(*pods, DENY, own=Key("x", "a")) == {
        "matchLabels": {"app.kubernetes.io/instance": "one", "app.kubernetes.io/name": "web"}
    }
    # A label that controllers write serves only where there is no other.
    bare = pod("x/c-0", "10.0.0.3", labels={"statefulset.kubernetes.io/pod-name": "c-0"})
    known = read(ns("x"), bare, DENY)
    made = suggest(known, Key("x", "c-0"), "203.0.113.9")
    assert made.policy is not None
    assert made.policy.pod_selector.requirements[0].key == "statefulset.kubernetes.io/pod-name"
    assert [each.split(":")[0] for each in made.comments] == ["x/c-0 has no label that outlives a roll-out"]
    assert suggest(read(*WORLD, DENY), Key("x", "plain"), "203.0.113.9").comments == (
        "x/plain has no labels: this selects every pod of namespace x",
    )


def test_nobody_else_is_isolated_by_it() -> None:
    """Two pods of one workload, of which a policy isolates one: selecting both would cut the other."""
    odd = {"podSelector": {"matchExpressions": [{"key": "canary", "operator": "Exists"}]}}
    pods = [
        pod("x/a", "10.0.0.1", labels={"app": "web", "canary": "yes", "pod-template-hash": "1"}),
        pod("x/b", "10.0.0.2", labels={"app": "web", "pod-template-hash": "2"}),
    ]
    known = read(ns("x"), *pods, policy("x/p", **odd, policyTypes=["Ingress"]))
    made = suggest(known, Key("x", "a"), "203.0.113.9")
    assert made.comments == ()
    before, after = reached(known, "203.0.113.9"), reached(applied(known, made), "203.0.113.9")
    assert after - before == {("203.0.113.9", "10.0.0.1", "5432/TCP")}
    assert not before - after
    # `zone NotIn (1)` selects x/c though no label of its own tells it from x/d.
    odd = {"podSelector": {"matchExpressions": [{"key": "zone", "operator": "NotIn", "values": ["1"]}]}}
    pods = [
        pod("x/c", "10.0.0.1", labels={"app": "web"}),
        pod("x/d", "10.0.0.2", labels={"app": "web", "zone": "1"}),
    ]
    known = read(ns("x"), *pods, policy("x/p", **odd, policyTypes=["Ingress"]))
    made = suggest(known, Key("x", "c"), "203.0.113.9")
    assert made.comments == ()
    document = made.document()
    assert document is not None
    assert document["spec"]["podSelector"] == {
        "matchLabels": {"app": "web"},
        "matchExpressions": [{"key": "zone", "operator": "NotIn", "values": ["1"]}],
    }
    assert not reached(known) - reached(applied(known, made))


def endpoint(*pods: tuple[str, str], direction: Direction = INGRESS) -> PolicyEndpoint:
    selected = tuple(
        PodEndpoint(Key(*name.split("/")), address(ip), address("192.0.2.1")) for name, ip in pods
    )
    return PolicyEndpoint(Key("x", "p-abc"), Key("x", "p"), frozenset({direction}), selected)


def test_policy_endpoints_with_pods_get_a_networkpolicy_too() -> None:
    known = replace(read(*WORLD), policy_endpoints=(endpoint(("x/db-0", "10.0.0.3")),))
    made = suggest(known)
    assert made.comments == ()
    before, after = reached(known), reached(applied(known, made))
    pairs = [
        ("10.0.0.1", "10.0.0.3"),
        ("10.0.0.2", "10.0.0.3"),
        ("fd00::1", "fd00::3"),
        ("fd00::2", "fd00::3"),
    ]
    assert after - before == {(*pair, "5432/TCP") for pair in pairs}
    assert not before - after


def test_where_nothing_avoids_isolating_others_it_says_so() -> None:
    twins = [pod(f"x/t-{n}", f"10.0.0.{n}", labels={"app": "t"}) for n in range(1, 7)]
    known = replace(read(ns("x"), *twins), policy_endpoints=(endpoint(("x/t-1", "10.0.0.1")),))
    made = suggest(known, Key("x", "t-1"), "203.0.113.9")
    assert made.comments == (
        "WARNING: this also selects x/t-2, x/t-3, x/t-4 and others, not isolated for ingress today:"
        " they would be",
    )


def test_unknown_labels() -> None:
    given = endpoint(("x/db-0", "10.0.0.3"), ("x/web-1", "10.0.0.1"))
    alone = Snapshot(policy_endpoints=(given,))
    made = suggest(alone)
    assert made.policy is made.document() is None
    assert made.comments == (
        "the labels of x/db-0 are not known here, so no policy can name it: give Pod objects too",
        "the labels of the pod with 10.0.0.1 are not known here: its address may change",
    )
    assert made.yaml() == "---\n" + "".join(f"# {each}\n" for each in made.comments)
    written = read(policy("x/p", podSelector={"matchLabels": {"app": "db"}}))
    made = suggest(replace(written, policy_endpoints=(given,)))
    assert made.policy is not None
    assert made.policy.pod_selector == written.network_policies[0].pod_selector
    assert made.comments[0] == ("the labels of x/db-0 are not known here: this selects all pods of x/p")


def test_names_are_new_short_and_valid() -> None:
    known = read(*WORLD, DENY, policy("x/allow-db-from-web-5432-tcp"))
    made = suggest(known)
    assert made.policy is not None
    assert made.policy.key.name == "allow-db-from-web-5432-tcp-2"
    long = pod("x/long", "10.0.0.7", labels={"app": "A_" + "long-" * 11 + "Name"})
    known = read(*WORLD, DENY, long)
    first = suggest(known, Key("x", "long")).policy
    assert first is not None
    second = suggest(read(*WORLD, DENY, long, policy(str(first.key))), Key("x", "long")).policy
    assert second is not None
    assert first.key.name == ("allow-a-" + "long-" * 11)[:63].rstrip("-")
    assert len(second.key.name) <= 63
    assert second.key.name.endswith("-2")


def test_labels_that_yaml_takes_for_something_else() -> None:
    odd = [pod("x/a", "10.0.0.1", labels={"app": "1e3"}), pod("x/b", "10.0.0.2", labels={"app": "no"})]
    known = only_ingress(read(ns("x"), *odd, DENY))
    made = suggest(known, Key("x", "a"), "10.0.0.2")
    assert reached(applied(known, made)) - reached(known) == {("10.0.0.2", "10.0.0.1", "5432/TCP")}
    empty = pod("x/c", "10.0.0.3", labels={"app": ""})
    known = only_ingress(read(ns("x"), *odd, empty, DENY))
    made = suggest(known, Key("x", "c"), "10.0.0.1")
    assert made.policy is not None
    assert made.policy.key.name == "allow-c-from-1e3-5432-tcp"
    assert isinstance(applied(known, made).network_policies[0], NetworkPolicy)
