"""The resolver with effective rules and engine, against an evaluator that knows no PolicyEndpoints.

The naive evaluator asks, packet by packet, what the written policies say of these two pods: raw
documents, labels, peer by peer. It shares no code with what it checks.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache, lru_cache
from ipaddress import ip_address, ip_network
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dataplane._engine import judge_flow
from dataplane.addresses import parse_address
from dataplane.model import PROTOCOLS, Snapshot
from dataplane.policy.compile import Compiler
from dataplane.policy.explain import table_of_everything
from dataplane.policy.resolve import Resolver, in_force
from dataplane.sources.networkpolicy import namespace, network_policy, service
from dataplane.sources.objects import pod

Raw = dict[str, Any]

EXTERNAL = ("203.0.113.9", "2001:db8:ffff::9")
NAMESPACES = ("x", "y", "z")


# --- the naive evaluator ------------------------------------------------------------------------------


def selects(selector: Raw, labels: Raw) -> bool:
    for key, value in (selector.get("matchLabels") or {}).items():
        if key not in labels or labels[key] != value:
            return False
    for each in selector.get("matchExpressions") or []:
        has, value = each["key"] in labels, labels.get(each["key"])
        holds = {
            "In": has and value in each.get("values", []),
            "NotIn": not has or value not in each.get("values", []),
            "Exists": has,
            "DoesNotExist": not has,
        }[each["operator"]]
        if not holds:
            return False
    return True


def labels_of_namespace(world: Raw, name: str) -> Raw:
    for each in world["namespaces"]:
        if each["metadata"]["name"] == name:
            return {**(each["metadata"].get("labels") or {}), "kubernetes.io/metadata.name": name}
    return {"kubernetes.io/metadata.name": name}


def holder(world: Raw, address: str) -> Raw | None:
    """The newest live pod with an address."""
    found = [
        each
        for each in world["pods"]
        if each["status"]["phase"] not in ("Succeeded", "Failed")
        and address in [entry["ip"] for entry in each["status"]["podIPs"]]
    ]
    return max(found, key=lambda each: each["metadata"]["creationTimestamp"], default=None)


def number_of(named: Raw, name: str, protocol: str) -> int | None:
    containers = [*named["spec"]["containers"]]
    containers += [
        each for each in named["spec"].get("initContainers", []) if each.get("restartPolicy") == "Always"
    ]
    for container in containers:
        for port in container.get("ports", []):
            if port.get("name") == name and port.get("protocol", "TCP") == protocol:
                return int(port["containerPort"])
    return None


def port_matches(entry: Raw, protocol: str, port: int, named: Raw | None) -> bool:
    """`named`: the pod that a named port is looked up on."""
    if (entry.get("protocol") or "TCP") != protocol:
        return False
    wanted = entry.get("port")
    if wanted is None:
        return True
    if isinstance(wanted, str):
        return named is not None and number_of(named, wanted, protocol) == port
    return bool(wanted <= port <= (entry.get("endPort") or wanted))


@cache
def inside(address: str, network: str) -> bool:
    return ip_address(address) in ip_network(network)


def peer_matches(world: Raw, policy: Raw, peer: Raw, address: str, other: Raw | None) -> bool:
    if peer.get("ipBlock"):
        block = peer["ipBlock"]
        if not inside(address, block["cidr"]):
            return False
        return not any(inside(address, hole) for hole in block.get("except") or [])
    if other is None:
        return False
    there = other["metadata"]["namespace"]
    if peer.get("namespaceSelector") is None:
        if there != policy["metadata"]["namespace"]:
            return False
    elif not selects(peer["namespaceSelector"], labels_of_namespace(world, there)):
        return False
    pods = peer.get("podSelector")
    return pods is None or selects(pods, other["metadata"].get("labels") or {})


def end_allows(world: Raw, direction: str, me: Raw | None, address: str, protocol: str, port: int) -> bool:
    """Whether pod `me` may send to (egress) or receive from (ingress) `address`."""
    if me is None or me["spec"].get("hostNetwork"):
        return True
    other = holder(world, address)
    isolated = False
    for policy in world["policies"]:
        spec = policy["spec"]
        if policy["metadata"]["namespace"] != me["metadata"]["namespace"]:
            continue
        if not selects(spec.get("podSelector") or {}, me["metadata"].get("labels") or {}):
            continue
        types = spec.get("policyTypes") or (["Ingress", "Egress"] if spec.get("egress") else ["Ingress"])
        if direction not in types:
            continue
        isolated = True
        for rule in spec.get(direction.lower()) or []:
            peers = rule.get("from" if direction == "Ingress" else "to") or [None]
            for peer in peers:
                if peer is not None and not peer_matches(world, policy, peer, address, other):
                    continue
                # Ingress: this pod's own port has the name. Egress: the other pod's, but not where the rule
                # means that pod by an address.
                by_address = peer is not None and bool(peer.get("ipBlock"))
                named = me if direction == "Ingress" else None if by_address else other
                ports = rule.get("ports") or []
                if not ports or any(port_matches(entry, protocol, port, named) for entry in ports):
                    return True
    return not isolated


def allowed(world: Raw, source: str, destination: str, protocol: str, port: int) -> bool:
    sender, receiver = holder(world, source), holder(world, destination)
    if sender is not None and sender is receiver and not sender["spec"].get("hostNetwork"):
        return True
    return end_allows(world, "Egress", sender, destination, protocol, port) and end_allows(
        world, "Ingress", receiver, source, protocol, port
    )


# --- worlds -------------------------------------------------------------------------------------------

KEYS = {"app": ["a", "b"], "tier": ["front", ""]}
PORTS = [79, 80, 81, 8080]


@st.composite
def selectors(draw: st.DrawFn, keys: dict[str, list[str]]) -> Raw:
    selector: Raw = {}
    if draw(st.booleans()):
        key = draw(st.sampled_from(sorted(keys)))
        selector["matchLabels"] = draw(st.sampled_from([{}, {key: draw(st.sampled_from(keys[key]))}]))
    if draw(st.integers(0, 2)) == 0:
        key = draw(st.sampled_from(sorted(keys)))
        operator = draw(st.sampled_from(["In", "NotIn", "Exists", "DoesNotExist"]))
        expression: Raw = {"key": key, "operator": operator}
        if operator in ("In", "NotIn"):
            expression["values"] = draw(st.lists(st.sampled_from(keys[key]), min_size=1, max_size=2))
        selector["matchExpressions"] = [expression]
    return selector


NAMESPACE_KEYS = {"team": ["red", "blue"], "kubernetes.io/metadata.name": list(NAMESPACES)}


@st.composite
def peers(draw: st.DrawFn) -> Raw:
    kind = draw(st.integers(0, 6))
    if kind == 0:
        block = st.sampled_from(
            [
                {"cidr": "10.0.0.0/8", "except": ["10.0.0.0/30"]},
                {"cidr": "10.0.0.2/32"},
                {"cidr": "0.0.0.0/0"},
                {"cidr": "::/0", "except": ["fd00::/126", "2001:db8::/32"]},
            ]
        )
        return {"ipBlock": draw(block)}
    if kind in (1, 2):
        return {"podSelector": draw(selectors(KEYS))}
    if kind in (3, 4):
        return {"namespaceSelector": draw(selectors(NAMESPACE_KEYS)), "podSelector": None}
    return {"podSelector": draw(selectors(KEYS)), "namespaceSelector": draw(selectors(NAMESPACE_KEYS))}


@st.composite
def port_entries(draw: st.DrawFn) -> Raw:
    named = [{"protocol": name} for name in (None, *PROTOCOLS)]
    entry: Raw = dict(draw(st.sampled_from([{}, *named])))
    kind = draw(st.integers(0, 5))
    if kind == 0:
        entry["port"] = None
    elif kind in (1, 2):
        entry["port"] = draw(st.sampled_from(PORTS))
        if draw(st.booleans()):
            entry["endPort"] = entry["port"] + draw(st.integers(0, 1))
    else:
        entry["port"] = draw(st.sampled_from(["http", "web", "nowhere"]))
    return entry


def _maybe(draw: st.DrawFn, raw: Raw, name: str, values: st.SearchStrategy[Any]) -> None:
    """The field as people leave it: missing, null, empty or filled."""
    kind = draw(st.integers(0, 6))
    if kind == 1:
        raw[name] = None
    elif kind == 2:
        raw[name] = []
    elif kind > 2:
        raw[name] = draw(st.lists(values, min_size=1, max_size=2))


@st.composite
def rules(draw: st.DrawFn, name: str) -> Raw:
    rule: Raw = {}
    _maybe(draw, rule, name, peers())
    _maybe(draw, rule, "ports", port_entries())
    return rule


@st.composite
def policies(draw: st.DrawFn, number: int) -> Raw:
    spec: Raw = {}
    if draw(st.booleans()):
        spec["podSelector"] = draw(st.one_of(st.none(), st.just({}), selectors(KEYS)))
    types = [None, [], ["Ingress"], ["Egress"], ["Ingress", "Egress"]]
    if draw(st.booleans()):
        spec["policyTypes"] = draw(st.sampled_from(types))
    _maybe(draw, spec, "ingress", rules("from"))
    _maybe(draw, spec, "egress", rules("to"))
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": f"p{number}", "namespace": draw(st.sampled_from(NAMESPACES))},
        "spec": spec,
    }


@st.composite
def containers(draw: st.DrawFn) -> list[Raw]:
    entry = st.fixed_dictionaries(
        {"containerPort": st.sampled_from(PORTS), "name": st.sampled_from(["http", "web"])},
        optional={"protocol": st.sampled_from(sorted(PROTOCOLS))},
    )
    return [{"ports": ports} for ports in draw(st.lists(st.lists(entry, max_size=2), max_size=2))]


@st.composite
def pods(draw: st.DrawFn, number: int) -> Raw:
    host = draw(st.integers(0, 7)) == 0
    # Two in eight have an address that another pod may have, too.
    last = number if draw(st.integers(0, 7)) > 1 else 2
    families = draw(st.sampled_from([("10.0.0.",), ("fd00::",), ("10.0.0.", "fd00::")]))
    labels = {key: draw(st.sampled_from(values)) for key, values in KEYS.items() if draw(st.booleans())}
    side = {"restartPolicy": draw(st.sampled_from(["Always", None]))}
    return {
        "metadata": {
            "name": f"pod{number}",
            "namespace": draw(st.sampled_from(NAMESPACES)),
            "labels": labels or draw(st.sampled_from([{}, None])),
            "creationTimestamp": f"2026-01-01T00:00:{number:02}Z",
        },
        "spec": {
            "hostNetwork": host,
            "containers": draw(containers()),
            "initContainers": [{**side, **each} for each in draw(containers())],
        },
        "status": {
            "phase": draw(st.sampled_from(["Running", "Running", "Pending", "Unknown", "Succeeded"])),
            "podIPs": [{"ip": f"{family}{100 + number if host else last}"} for family in families],
            "hostIPs": [{"ip": "192.0.2.1"}],
        },
    }


@st.composite
def namespace_lists(draw: st.DrawFn) -> list[Raw]:
    labels = st.sampled_from([{}, {"team": "red"}, {"team": "blue"}])
    named = NAMESPACES[: draw(st.integers(0, 3))]
    return [{"metadata": {"name": name, "labels": draw(labels)}} for name in named]


@st.composite
def pod_lists(draw: st.DrawFn) -> list[Raw]:
    return [draw(pods(number)) for number in range(1, draw(st.integers(2, 6)) + 1)]


@st.composite
def policy_lists(draw: st.DrawFn) -> list[Raw]:
    return [draw(policies(number)) for number in range(draw(st.integers(1, 4)))]


@st.composite
def service_lists(draw: st.DrawFn) -> list[Raw]:
    spec = {
        "selector": {"app": draw(st.sampled_from(KEYS["app"]))},
        "clusterIP": "172.20.0.1",
        "ports": [{"port": 80, "targetPort": draw(st.sampled_from([80, 8080, "http"]))}],
    }
    return [{"metadata": {"name": "s", "namespace": draw(st.sampled_from(NAMESPACES))}, "spec": spec}]


KINDS = {
    "namespaces": namespace_lists(),
    "pods": pod_lists(),
    "policies": policy_lists(),
    "services": service_lists(),
}


def worlds() -> st.SearchStrategy[Raw]:
    return st.fixed_dictionaries(KINDS)


@st.composite
def next_worlds(draw: st.DrawFn, world: Raw) -> Raw:
    """`world` after a change of one kind, one pod or one field of a pod, as a watch brings it."""
    what = draw(st.sampled_from([*KINDS, "gone", "come", "containers", "labels", "phase", "podIPs"]))
    if what in KINDS:
        return {**world, what: draw(KINDS[what])}
    number = draw(st.integers(1, 6))
    new = draw(pods(number))
    here = {each["metadata"]["name"]: each for each in world["pods"]}
    old = here.pop(new["metadata"]["name"], None)
    if what == "come" or (old is None and what != "gone"):
        here[new["metadata"]["name"]] = new
    elif old is not None and what != "gone":
        part = {"containers": "spec", "labels": "metadata"}.get(what, "status")
        here[old["metadata"]["name"]] = {**old, part: {**old[part], what: new[part][what]}}
    return {**world, "pods": list(here.values())}


READERS: dict[str, Callable[[Raw, str], Any]] = {
    "pods": pod,
    "policies": network_policy,
    "namespaces": namespace,
    "services": service,
}


@lru_cache(4096)
def read_one(kind: str, text: str) -> Any:
    """The same object for the same document, as a watch leaves alone what did not change."""
    item, problems = READERS[kind](json.loads(text), "test")
    assert item is not None
    assert not problems
    return item


def snapshot_of(world: Raw) -> Snapshot:
    read = {kind: [read_one(kind, json.dumps(raw)) for raw in world[kind]] for kind in READERS}
    return Snapshot(
        pods=tuple(sorted(read["pods"], key=lambda each: each.key)),
        network_policies=tuple(sorted(read["policies"], key=lambda each: each.key)),
        namespaces=tuple(sorted(read["namespaces"], key=lambda each: each.name)),
        services=tuple(sorted(read["services"], key=lambda each: each.key)),
    )


def three_pods(spec: Raw) -> Raw:
    """Three dual-stack pods whose port `http` has three numbers, the third in another namespace."""
    return {
        "namespaces": [],
        "services": [],
        "pods": [
            {
                "metadata": {
                    "name": f"pod{n}",
                    "namespace": namespace,
                    "creationTimestamp": f"2026-01-01T00:00:0{n}Z",
                },
                "spec": {"containers": [{"ports": [{"name": "http", "containerPort": port}]}]},
                "status": {
                    "phase": "Running",
                    "podIPs": [{"ip": f"10.0.0.{n}"}, {"ip": f"fd00::{n}"}],
                    "hostIP": "192.0.2.1",
                },
            }
            for n, port, namespace in ((1, 80, "x"), (2, 8080, "x"), (3, 81, "y"))
        ],
        "policies": [{"metadata": {"name": "p", "namespace": "x"}, "spec": spec}],
    }


HTTP: Raw = {"port": "http", "protocol": None}
EVERY_BLOCK = [{"ipBlock": {"cidr": "0.0.0.0/0"}}, {"ipBlock": {"cidr": "::/0"}}]


# Five times 300 worlds rather than 1,500 in one test, so that they can run side by side.
@pytest.mark.parametrize("part", range(5))
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(worlds())
@example(three_pods({"ingress": [{"from": [], "ports": [{"port": "http"}]}]}))
@example(three_pods({"egress": [{"to": [{"namespaceSelector": {}}], "ports": [HTTP]}]}))
@example(three_pods({"egress": [{"to": None, "ports": [HTTP]}]}))
@example(three_pods({"egress": [{"to": [], "ports": [HTTP, {"port": 79, "protocol": "UDP"}]}]}))
@example(three_pods({"egress": [{"to": EVERY_BLOCK, "ports": [HTTP]}]}))
@example(three_pods({"egress": [{"to": EVERY_BLOCK, "ports": [HTTP, {"port": 79, "endPort": 80}]}]}))
def test_every_packet_is_judged_as_the_policies_say(part: int, world: Raw) -> None:
    table = table_of_everything(in_force(snapshot_of(world)), Compiler())
    ips = {entry["ip"] for each in world["pods"] for entry in each["status"]["podIPs"]}
    ends = sorted(ip for ip in {*ips, *EXTERNAL})
    for source in ends:
        for destination in ends:
            if (":" in source) != (":" in destination) or source == destination:
                continue
            for protocol, ports in (("TCP", PORTS), ("UDP", PORTS[1:3]), ("SCTP", PORTS[1:2])):
                for port in ports:
                    verdict = judge_flow(
                        table,
                        parse_address(source),
                        parse_address(destination),
                        PROTOCOLS[protocol],
                        40000,
                        port,
                    )
                    expected = allowed(world, source, destination, protocol, port)
                    assert verdict.allow == expected, (source, destination, protocol, port, verdict)


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_a_resolver_that_saw_other_snapshots_gives_the_same(data: st.DataObject) -> None:
    resolver = Resolver()
    world = data.draw(worlds())
    for _ in range(5):
        snapshot = snapshot_of(world)
        assert resolver.update(snapshot) == Resolver().update(snapshot)
        world = data.draw(next_worlds(world))
