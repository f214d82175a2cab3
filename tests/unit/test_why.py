"""Why rules did not match: one test per reason, sentences written by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from dataplane.addresses import parse_address as address
from dataplane.addresses import parse_prefix
from dataplane.model import PROTOCOLS, Direction, Key, PodEndpoint, PolicyEndpoint, PortRange, Rule, Snapshot
from dataplane.policy.resolve import in_force
from dataplane.policy.why import SHOWN, About, Alike, Candidate, Miss, Why, Whys
from dataplane.sources.contents import read_contents
from dataplane.sources.store import Store

Raw = dict[str, Any]
INGRESS, EGRESS = Direction.INGRESS, Direction.EGRESS
DB = Key("x", "db")


def pod(name: str, *ips: str, labels: Raw | None = None, **more: Any) -> Raw:
    """`namespace/name`; more: ports as `name: (number, protocol)`, phase, host."""
    namespace, _, own = name.partition("/")
    ports = [
        {"name": each, "containerPort": number, "protocol": protocol}
        for each, (number, protocol) in more.get("ports", {}).items()
    ]
    return {
        "kind": "Pod",
        "apiVersion": "v1",
        "metadata": {"name": own, "namespace": namespace, "labels": labels or {}},
        "spec": {"hostNetwork": more.get("host", False), "containers": [{"ports": ports}]},
        "status": {
            "phase": more.get("phase", "Running"),
            "podIPs": [{"ip": ip} for ip in ips],
            "hostIPs": [{"ip": "192.0.2.1"}],
        },
    }


def ns(name: str, **labels: str) -> Raw:
    return {"kind": "Namespace", "apiVersion": "v1", "metadata": {"name": name, "labels": labels}}


def policy(name: str, **spec: Any) -> Raw:
    namespace, _, own = name.partition("/")
    return {
        "kind": "NetworkPolicy",
        "apiVersion": "networking.k8s.io/v1",
        "metadata": {"name": own, "namespace": namespace},
        "spec": {"podSelector": {"matchLabels": {"app": "db"}}, **spec},
    }


def read(*raws: Raw) -> Snapshot:
    found = read_contents(json.dumps({"kind": "List", "items": raws}).encode(), "f", only_json=True)
    store = Store()
    store.replace("f", found.objects, found.problems)
    return store.snapshot()


PODS = [
    ns("x"),
    ns("y", team="blue"),
    pod(
        "x/db", "10.0.0.1", "fd00::1", labels={"app": "db"},
        ports={"pg": (5432, "TCP"), "metrics": (9090, "TCP"), "dns": (53, "UDP")},
    ),
    pod("x/web", "10.0.0.2", "fd00::2", labels={"app": "web", "tier": "front"}, ports={"http": (80, "TCP")}),
    pod("y/api", "10.0.0.3", "fd00::3", labels={"app": "api"}),
    pod("x/job", "10.0.0.4", labels={"app": "web"}, phase="Succeeded"),
    pod("y/agent", "192.0.2.1", labels={"app": "agent"}, host=True),
]  # fmt: skip
NAMES = {"10.0.0.2": "x/web", "10.0.0.3": "y/api", "fd00::3": "y/api"}
TO_WEB = {"matchLabels": {"app": "web"}}


def ask(
    rule: Raw | None, peer: str, port: int = 80, protocol: str = "TCP", direction: Direction = INGRESS
) -> tuple[Miss, str, str]:
    """Why the one rule of one policy does not let x/db talk with `peer`: reason, field, sentence."""
    peers = "from" if direction is INGRESS else "to"
    written = [] if rule is None else [{peers if key == "peers" else key: rule[key] for key in rule}]
    types = ["Ingress" if direction is INGRESS else "Egress"]
    whys = Whys(read(*PODS, policy("x/p", policyTypes=types, **{direction.value: written})))
    number = {**PROTOCOLS, "ICMP": 1, "ICMPv6": 58}[protocol]
    why = whys.denied(DB, direction, address(peer), number, port)
    assert why.policies == (Key("x", "p"),)
    assert why.more == ()
    (found,) = why.candidates
    assert (found.policy, found.direction) == (Key("x", "p"), direction)
    return found.miss, found.field, found.told(NAMES.get(peer, peer), peer, "x/db")


CASES: dict[str, tuple[Raw | None, str, Miss, str, str]] = {
    "no rules": (
        None, "10.0.0.2", Miss.NO_RULES, "ingress", "the policy has no ingress rules: nothing is allowed",
    ),
    "port": (
        {"ports": [{"port": 81}]}, "10.0.0.2",
        Miss.PORT, "ingress[0]", "wrong port: allows 81/TCP, packet is 80/TCP",
    ),
    "many ports": (
        {"ports": [{"port": port, "endPort": port + 1} for port in range(100, 116, 2)]}, "10.0.0.2",
        Miss.PORT, "ingress[0]",
        "wrong port: allows 100-101/TCP, 102-103/TCP, 104-105/TCP, 106-107/TCP, 108-109/TCP, 110-111/TCP"
        " and 2 more, packet is 80/TCP",
    ),
    "named port with another number": (
        {"ports": [{"port": "pg"}, {"port": 22}]}, "10.0.0.2",
        Miss.PORT, "ingress[0]", "wrong port: allows pg (5432/TCP), 22/TCP, packet is 80/TCP",
    ),
    "protocol": (
        {"peers": [{"podSelector": {}}], "ports": [{"port": 80, "protocol": "UDP"}]}, "10.0.0.2",
        Miss.PROTOCOL, "ingress[0].from[0]", "wrong protocol: allows 80/UDP, packet is 80/TCP",
    ),
    "named port that the pod lacks": (
        {"ports": [{"port": "http"}]}, "10.0.0.2",
        Miss.NAMED_PORT, "ingress[0]",
        "x/db has no TCP port named http (it has pg 5432/TCP, metrics 9090/TCP, dns 53/UDP)",
    ),
    "named port of another protocol": (
        {"ports": [{"port": "dns"}]}, "10.0.0.2",
        Miss.NAMED_PORT, "ingress[0]",
        "x/db has no TCP port named dns (it has pg 5432/TCP, metrics 9090/TCP, dns 53/UDP)",
    ),
    "one name missing, another elsewhere": (
        {"ports": [{"port": "http"}, {"port": "pg"}]}, "10.0.0.2",
        Miss.PORT, "ingress[0]",
        "wrong port: allows pg (5432/TCP), packet is 80/TCP; no port is named http there",
    ),
    "cidr": (
        {"peers": [{"ipBlock": {"cidr": "192.168.0.0/16"}}]}, "10.0.0.2",
        Miss.CIDR, "ingress[0].from[0]", "10.0.0.2 is outside 192.168.0.0/16",
    ),
    "family": (
        {"peers": [{"ipBlock": {"cidr": "0.0.0.0/0"}}]}, "fd00::3",
        Miss.FAMILY, "ingress[0].from[0]", "fd00::3 is not in 0.0.0.0/0, an IPv4 range",
    ),
    "except": (
        {"peers": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.0.0.0/16", "10.0.0.0/24"]}}]},
        "10.0.0.2", Miss.EXCEPT, "ingress[0].from[0]",
        "10.0.0.2 is inside 10.0.0.0/8, but also inside its except 10.0.0.0/24",
    ),
    "except, IPv6": (
        {"peers": [{"ipBlock": {"cidr": "::/0", "except": ["fd00::/126"]}}]},
        "fd00::3", Miss.EXCEPT, "ingress[0].from[0]",
        "fd00::3 is inside ::/0, but also inside its except fd00::/126",
    ),
    "pod label with another value": (
        {"peers": [{"podSelector": {"matchLabels": {"app": "api"}}}]}, "10.0.0.2",
        Miss.POD_LABELS, "ingress[0].from[0]", "x/web has label app=web, not app=api",
    ),
    "pod labels missing": (
        {"peers": [{"podSelector": {"matchExpressions": [
            {"key": "role", "operator": "Exists"}, {"key": "zone", "operator": "In", "values": ["a", "b"]},
            {"key": "tier", "operator": "NotIn", "values": ["front"]},
        ]}}]}, "10.0.0.2", Miss.POD_LABELS, "ingress[0].from[0]",
        "x/web has no label role (asked for: role Exists), and has label tier=front, which tier NotIn (front)"
        " leaves out, and has no label zone (asked for: zone In (a, b))",
    ),
    "a label that must not be there": (
        {"peers": [{"podSelector": {"matchExpressions": [{"key": "tier", "operator": "DoesNotExist"}]}}]},
        "10.0.0.2", Miss.POD_LABELS, "ingress[0].from[0]",
        "x/web has label tier=front, and tier DoesNotExist is asked for",
    ),
    "namespace label": (
        {"peers": [{"namespaceSelector": {"matchLabels": {"team": "red"}}}]}, "10.0.0.3",
        Miss.NAMESPACE_LABELS, "ingress[0].from[0]", "namespace y has label team=blue, not team=red",
    ),
    "namespace label missing": (
        {"peers": [{"namespaceSelector": {"matchLabels": {"team": "red"}}}]}, "10.0.0.2",
        Miss.NAMESPACE_LABELS, "ingress[0].from[0]",
        "namespace x has no label team (asked for: team=red)",
    ),
    "a namespace by its name": (
        {"peers": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "z"}}}]},
        "10.0.0.3", Miss.NAMESPACE_LABELS, "ingress[0].from[0]", "namespace y is not z",
    ),
    "the policy's namespace only": (
        {"peers": [{"podSelector": {}}]}, "10.0.0.3",
        Miss.NAMESPACE, "ingress[0].from[0]",
        "y/api is in namespace y; without namespaceSelector only namespace x is meant",
    ),
    "finished": (
        {"peers": [{"podSelector": TO_WEB}]}, "10.0.0.4",
        Miss.FINISHED, "ingress[0].from[0]",
        "10.0.0.4 was a finished pod's (Succeeded or Failed), which owns no address any more",
    ),
    "not a pod": (
        {"peers": [{"podSelector": {}}]}, "203.0.113.9",
        Miss.NOT_A_POD, "ingress[0].from[0]",
        "203.0.113.9 is not a known pod's, and selectors match pods only",
    ),
    "on its host's network": (
        {"peers": [{"namespaceSelector": {}, "podSelector": TO_WEB}]}, "192.0.2.1",
        Miss.POD_LABELS, "ingress[0].from[0]",
        "192.0.2.1 has label app=agent, not app=web (a pod on its host's network)",
    ),
    "a peer that was dropped": (
        {"peers": [{"podSelector": {"matchlabels": {"app": "web"}}}]}, "10.0.0.2",
        Miss.PROBLEM, "ingress[0].from[0]",
        "cannot be used: spec.ingress[0].from[0].podSelector.matchlabels: unknown field",
    ),
    "a rule that was dropped": (
        {"ports": [{"port": 70000}]}, "10.0.0.2",
        Miss.PROBLEM, "ingress[0]", "cannot be used: spec.ingress[0].ports",
    ),
    "a port that was dropped": (
        {"ports": [{"port": 81}, {"port": "80"}]}, "10.0.0.2",
        Miss.PORT, "ingress[0]", "wrong port: allows 81/TCP, packet is 80/TCP; spec.ingress[0].ports[1].port",
    ),
    "peer and port": (
        {"peers": [{"podSelector": {"matchLabels": {"app": "api"}}}], "ports": [{"port": 81}]}, "10.0.0.2",
        Miss.POD_LABELS, "ingress[0].from[0]",
        "x/web has label app=web, not app=api; the port does not match either",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_reason(name: str) -> None:
    rule, peer, miss, field, sentence = CASES[name]
    found = ask(rule, peer)
    assert found[:2] == (miss, field)
    # What is wrong with an object is said in the words of its reader, which are tested there.
    assert (
        found[2].startswith(sentence)
        if ": spec." in sentence or "; spec." in sentence
        else (found[2] == sentence)
    )


@pytest.mark.parametrize(("peer", "protocol"), [("10.0.0.2", "ICMP"), ("fd00::3", "ICMPv6")])
def test_icmp_needs_a_rule_without_ports(peer: str, protocol: str) -> None:
    miss, _, sentence = ask({"ports": [{"protocol": "TCP"}, {"port": "pg"}]}, peer, 0, protocol)
    assert miss is Miss.PROTOCOL
    assert sentence == (
        "wrong protocol: allows TCP, pg (5432/TCP), packet is ICMP: only a rule without ports lets ICMP pass"
    )


def test_egress_looks_names_up_on_the_other_pod() -> None:
    rule: Raw = {"peers": [{"namespaceSelector": {}}], "ports": [{"port": "http"}]}
    assert ask(rule, "10.0.0.3", direction=EGRESS) == (
        Miss.NAMED_PORT,
        "egress[0].to[0]",
        "y/api has no TCP port named http (it has no ports declared)",
    )
    assert ask(rule, "10.0.0.2", 81, direction=EGRESS) == (
        Miss.PORT, "egress[0].to[0]", "wrong port: allows http (80/TCP), packet is 81/TCP",
    )  # fmt: skip
    rule = {
        "peers": [{"ipBlock": {"cidr": "10.0.0.0/8"}}],
        "ports": [{"port": "http"}, {"port": 9, "protocol": "UDP"}],
    }
    assert ask(rule, "10.0.0.2", direction=EGRESS) == (
        Miss.NAMED_PORT,
        "egress[0].to[0]",
        "named port http: names are looked up on pods, an ipBlock has none; besides, 9/UDP is allowed",
    )
    assert ask({"ports": [{"port": "http"}]}, "203.0.113.9", direction=EGRESS) == (
        Miss.NAMED_PORT, "egress[0]", "203.0.113.9 is no pod that could have a TCP port named http",
    )  # fmt: skip


def test_the_nearest_miss_comes_first() -> None:
    peers: list[Raw] = [
        {"ipBlock": {"cidr": "192.168.0.0/16"}},
        {"podSelector": {"matchLabels": {"app": "api"}}},
        {"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.0.0.2/32"]}},
    ]
    known = read(
        *PODS,
        policy("x/deny", podSelector={}, policyTypes=["Ingress"]),
        policy("x/p", ingress=[{"from": peers}, {"from": [{"podSelector": {}}], "ports": [{"port": 81}]}]),
    )
    whys = Whys(known)
    why = whys.denied(DB, INGRESS, address("10.0.0.2"), 6, 80)
    assert why.policies == whys.policies(DB, INGRESS) == (Key("x", "deny"), Key("x", "p"))
    assert [(each.policy.name, each.field, each.miss) for each in why.candidates] == [
        ("p", "ingress[1].from[0]", Miss.PORT),
        ("p", "ingress[0].from[2]", Miss.EXCEPT),
        ("p", "ingress[0].from[1]", Miss.POD_LABELS),
        ("p", "ingress[0].from[0]", Miss.CIDR),
        ("deny", "ingress", Miss.NO_RULES),
    ]
    assert whys.policies(DB, EGRESS) == whys.policies(Key("x", "nobody"), INGRESS) == ()


def test_long_lists_are_counted() -> None:
    blocks = [{"ipBlock": {"cidr": f"172.16.{n // 250}.{n % 250}/32"}} for n in range(5000)]
    six = [{"ipBlock": {"cidr": f"2001:db8::{n:x}/128"}} for n in range(30)]
    known = read(
        *PODS,
        policy(
            "x/p",
            ingress=[
                {"from": [*blocks, *six]},
                {"from": [{"ipBlock": {"cidr": "10.0.0.0/8"}}], "ports": [{"port": 81}]},
            ],
        ),
    )
    whys = Whys(known)
    why = whys.denied(DB, INGRESS, address("10.0.0.2"), 6, 80)
    assert [each.miss for each in why.candidates] == [Miss.PORT] + [Miss.CIDR] * (SHOWN - 1)
    assert why.candidates[1].field == "ingress[0].from[0]"
    assert [(each.miss, each.number) for each in why.more] == [(Miss.CIDR, 4991), (Miss.FAMILY, 30)]
    assert why.more[0].sentence == "and 4,991 more: address outside the cidr"
    everything = whys.denied(DB, INGRESS, address("10.0.0.2"), 6, 80, shown=None)
    assert len(everything.candidates) == 5031
    assert everything.more == ()


def test_equal_pods_share_an_answer() -> None:
    twins = [pod(f"x/web-{n}", f"10.0.1.{n}", labels={"app": "web"}) for n in (1, 2)]
    others = [pod(f"x/db-{n}", f"10.0.2.{n}", labels={"app": "db"}) for n in (1, 2)]
    rules = [{"from": [{"podSelector": {"matchLabels": {"app": "api"}}}]}, {"ports": [{"port": "http"}]}]
    whys = Whys(read(*PODS, *twins, *others, policy("x/p", ingress=rules)))

    def why(own: int, peer: str, port: int = 80) -> Why:
        return whys.denied(Key("x", f"db-{own}"), INGRESS, address(peer), 6, port)

    one = why(1, "10.0.1.1")
    assert why(2, "10.0.1.2") is one
    assert why(1, "10.0.1.1", 81).candidates == one.candidates
    assert why(1, "10.0.0.3").candidates != one.candidates
    assert [each.sentence for each in one.candidates] == [
        "the destination has no TCP port named http (it has no ports declared)",
        "the source has label app=web, not app=api",
    ]


def test_an_except_tells_addresses_of_one_block_apart() -> None:
    block = {"ipBlock": {"cidr": "203.0.113.0/24", "except": ["203.0.113.128/25"]}}
    whys = Whys(read(*PODS, policy("x/p", ingress=[{"from": [block], "ports": [{"port": 81}]}])))
    inside = whys.denied(DB, INGRESS, address("203.0.113.1"), 6, 80).candidates[0]
    outside = whys.denied(DB, INGRESS, address("203.0.113.200"), 6, 80).candidates[0]
    assert (inside.miss, outside.miss) == (Miss.PORT, Miss.EXCEPT)


def rule(cidr: str, *ports: int, index: int, excepts: tuple[str, ...] = ()) -> Rule:
    holes = tuple(parse_prefix(each)[0] for each in excepts)
    return Rule(parse_prefix(cidr)[0], holes, tuple(PortRange(6, port, port) for port in ports), index)


def endpoints(*rules: Rule, name: str = "p") -> PolicyEndpoint:
    selected = (PodEndpoint(DB, address("10.0.0.1"), address("192.0.2.1")),)
    return PolicyEndpoint(Key("x", f"{name}-abc"), Key("x", name), frozenset({INGRESS}), selected, rules)


def test_policy_endpoints_alone_are_told_by_their_rules() -> None:
    given = endpoints(
        rule("192.168.0.0/16", index=0),
        rule("10.0.0.2/32", 81, 82, index=1),
        rule("10.0.0.0/8", index=2, excepts=("10.0.0.0/24",)),
    )
    empty = replace(endpoints(name="empty"), key=Key("x", "empty-abc"))
    whys = Whys(Snapshot(policy_endpoints=(empty, given)))
    why = whys.denied(DB, INGRESS, address("10.0.0.2"), 6, 80)
    assert [(each.field, each.miss, each.told("x/web", "10.0.0.2", "x/db")) for each in why.candidates] == [
        ("ingress rule 1", Miss.PORT, "wrong port: allows 81/TCP, 82/TCP, packet is 80/TCP"),
        ("ingress rule 2", Miss.EXCEPT,
         "10.0.0.2 is inside 10.0.0.0/8, but also inside its except 10.0.0.0/24"),
        ("ingress rule 0", Miss.CIDR, "10.0.0.2 is outside 192.168.0.0/16"),
        ("ingress", Miss.NO_RULES, "its PolicyEndpoints have no ingress rules: nothing is allowed"),
    ]  # fmt: skip


def test_a_peer_that_only_policy_endpoints_name_has_no_labels() -> None:
    quiet = PolicyEndpoint(
        Key("y", "q-abc"), Key("y", "q"), frozenset({EGRESS}),
        (PodEndpoint(Key("y", "api"), address("10.0.0.9"), address("192.0.2.1")),),
    )  # fmt: skip
    known = read(*PODS, policy("x/p", ingress=[{"from": [{"podSelector": {}}]}]))
    whys = Whys(replace(known, policy_endpoints=(quiet,)))
    (found,) = whys.denied(DB, INGRESS, address("10.0.0.9"), 6, 80).candidates
    assert found.miss is Miss.LABELS_UNKNOWN
    assert found.told("y/api", "10.0.0.9", "x/db") == (
        "10.0.0.9 is of a pod whose labels are not known here (there is no Pod object)"
    )
    assert whys.unlabelled(address("10.0.0.9"))
    assert not whys.unlabelled(address("10.0.0.2"))


def test_policy_endpoints_that_say_less_than_their_policy_are_told_instead() -> None:
    known = read(*PODS, policy("x/p", ingress=[{"from": [{"podSelector": {}}]}]))
    stale = replace(known, policy_endpoints=(endpoints(rule("10.0.0.9/32", index=0)),))
    (found,) = Whys(stale).denied(DB, INGRESS, address("10.0.0.2"), 6, 80).candidates
    assert (found.field, found.miss) == ("ingress rule 0", Miss.CIDR)
    # Where they agree, the policy is what its author knows.
    (found,) = Whys(stale).denied(DB, INGRESS, address("10.0.0.3"), 6, 80).candidates
    assert (found.field, found.miss) == ("ingress[0].from[0]", Miss.NAMESPACE)


def test_policy_endpoints_tell_pods_apart_that_policies_do_not() -> None:
    twins = [pod(f"x/web-{n}", f"10.0.1.{n}", labels={"app": "web"}) for n in (1, 2)]
    known = read(*PODS, *twins, policy("x/p", ingress=[{"from": [{"podSelector": TO_WEB}]}]))
    given = endpoints(rule("10.0.1.1/32", 81, index=0), rule("10.0.1.2/32", 82, index=1))
    whys = Whys(replace(known, policy_endpoints=(given,)))
    for peer, near in (("10.0.1.1", "ingress rule 0"), ("10.0.1.2", "ingress rule 1")):
        first = whys.denied(DB, INGRESS, address(peer), 6, 80).candidates[0]
        assert (first.field, first.miss) == (near, Miss.PORT)


def test_pods_that_share_their_hosts_address() -> None:
    """Any of them is enough for a rule; the nearest miss is told where none is."""
    ports: Raw = {"ports": {"http": (80, "TCP")}}
    shared = [
        pod("y/one", "192.0.2.7", labels={"app": "one"}, host=True),
        pod("y/two", "192.0.2.7", labels={"app": "two"}, host=True, **ports),
    ]
    unnamed = pod("y/three", "192.0.2.7", labels={"app": "two"}, host=True)
    unnamed["spec"]["containers"] = [{"ports": [{"containerPort": 80}]}]
    peers = [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "y"}}, "podSelector": {
        "matchLabels": {"app": "two"}}}]  # fmt: skip
    rules = [{"from": peers, "ports": [{"port": 81}]}]
    whys = Whys(read(*PODS, *shared, unnamed, policy("x/p", ingress=rules)))
    (found,) = whys.denied(DB, INGRESS, address("192.0.2.7"), 6, 80).candidates
    assert (found.miss, found.sentence) == (Miss.PORT, "wrong port: allows 81/TCP, packet is 80/TCP")


def test_a_direction_that_cannot_be_read() -> None:
    whys = Whys(read(*PODS, policy("x/p", ingress={"from": []})))
    (found,) = whys.denied(DB, INGRESS, address("10.0.0.2"), 6, 80).candidates
    assert (found.miss, found.field) == (Miss.PROBLEM, "ingress[0]")
    assert found.sentence.startswith("cannot be used: spec.ingress: must be a list of rules")


def test_a_bad_rule_of_a_policy_endpoint_is_a_candidate() -> None:
    raw = {
        "kind": "PolicyEndpoint",
        "apiVersion": "networking.k8s.aws/v1alpha1",
        "metadata": {"name": "p-abc", "namespace": "x"},
        "spec": {
            "policyRef": {"name": "p", "namespace": "x"},
            "podIsolation": ["Ingress"],
            "podSelectorEndpoints": [
                {"hostIP": "192.0.2.1", "podIP": "10.0.0.1", "name": "db", "namespace": "x"}
            ],
            "ingress": [{"cidr": "10.0.0"}],
        },
    }
    (found,) = Whys(read(*PODS, raw)).denied(DB, INGRESS, address("10.0.0.2"), 6, 80).candidates
    assert (found.miss, found.field) == (Miss.PROBLEM, "x/p-abc ingress[0].cidr")
    assert found.sentence.startswith("cannot be used: ")


def test_the_written_rule_behind_an_allowed_packet() -> None:
    rules = [
        {"from": [{"podSelector": {"matchLabels": {"app": "api"}}}]},
        {
            "from": [{"ipBlock": {"cidr": "203.0.113.0/24"}}, {"podSelector": TO_WEB}],
            "ports": [{"port": "pg"}],
        },
    ]
    known = read(*PODS, policy("x/p", ingress=rules))
    resolved = in_force(known)
    whys = Whys(known, resolved)
    pairs = whys.rules_of(DB, INGRESS)
    assert pairs is not None
    for peer, field in (("10.0.0.2", "ingress[1].from[1]"), ("203.0.113.9", "ingress[1].from[0]")):
        behind = next(each for _, each in pairs.rules if address(peer) in each.cidr)
        found = whys.allowed(DB, INGRESS, address(peer), 6, 5432, Key("x", "p"), behind.index)
        assert found == Candidate(Key("x", "p"), INGRESS, field, Miss.MATCH, About.RULE, "matches")
    alone = Whys(Snapshot(policy_endpoints=resolved.policy_endpoints))
    found = alone.allowed(DB, INGRESS, address("10.0.0.2"), 6, 5432, Key("x", "p"), 0)
    assert found.field == "ingress rule 0"


def test_nobody_isolates_a_pod_in_strict_mode() -> None:
    whys = Whys(read(*PODS))
    assert whys.denied(DB, INGRESS, address("10.0.0.2"), 6, 80) == Why((), (), ())


def test_every_reason_has_its_own_short_form() -> None:
    assert len({Alike(miss, 1).sentence for miss in Miss}) == len(Miss)
