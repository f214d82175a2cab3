"""NetworkPolicies to PolicyEndpoints, sentence by sentence; expectations written by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from dataplane.addresses import format_address, parse_address
from dataplane.cli.resolve import command
from dataplane.model import Direction, Key, PodEndpoint, PolicyEndpoint, Rule, Snapshot
from dataplane.policy.effective import effective_rules
from dataplane.policy.resolve import MAX_ENTRIES, Resolver, in_force, policy_endpoints
from dataplane.sources.contents import read_contents
from dataplane.sources.directory import read_paths
from dataplane.sources.store import Store

Raw = dict[str, Any]


def ns(name: str, **labels: str) -> Raw:
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}


def pod(name: str, *ips: str, **more: Any) -> Raw:
    """`namespace/name`; more: labels, ports, phase, host, created, deleted, init."""
    namespace, _, own = name.partition("/")
    metadata: Raw = {"name": own, "namespace": namespace, "labels": more.get("labels", {}), "uid": own}
    metadata["creationTimestamp"] = f"2026-01-01T00:00:{more.get('created', 0):02}Z"
    if "deleted" in more:
        metadata["deletionTimestamp"] = "2026-01-01T00:01:00Z"
    ports = [
        {"name": each, "containerPort": number, "protocol": protocol}
        for each, number, protocol in more.get("ports", ())
    ]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": metadata,
        "spec": {
            "hostNetwork": more.get("host", False),
            "containers": [{"ports": ports}],
            "initContainers": more.get("init", []),
        },
        "status": {
            "phase": more.get("phase", "Running"),
            "podIPs": [{"ip": ip} for ip in ips],
            "hostIPs": [{"ip": "192.0.2.1"}, {"ip": "2001:db8::1"}],
        },
    }


def policy(spec: Raw, name: str = "x/p") -> Raw:
    namespace, _, own = name.partition("/")
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": own, "namespace": namespace, "uid": "u1"},
        "spec": spec,
    }


def service(name: str, selector: Raw, ports: list[Raw], *ips: str) -> Raw:
    namespace, _, own = name.partition("/")
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": own, "namespace": namespace},
        "spec": {"selector": selector, "clusterIPs": list(ips), "ports": ports},
    }


def snapshot(*raws: Raw) -> Snapshot:
    found = read_contents(json.dumps({"kind": "List", "items": raws}).encode(), "f", only_json=True)
    assert found.problems == []
    store = Store()
    store.replace("f", found.objects, ())
    return store.snapshot()


def text(rule: Rule) -> str:
    excepts = f" except {','.join(map(str, rule.excepts))}" if rule.excepts else ""
    ports = f" {','.join(map(str, rule.ports))}" if rule.ports else ""
    return f"{rule.cidr}{excepts}{ports}".replace("/32", "").replace("/128", "")


def rules(direction: str, *raws: Raw) -> list[str]:
    """The rules of the only PolicyEndpoint."""
    (made,) = policy_endpoints(snapshot(*raws))
    found = made.ingress if direction == "ingress" else made.egress
    assert [rule.index for rule in found] == list(range(len(found)))
    return [text(rule) for rule in found]


def selected(*raws: Raw) -> list[str]:
    (made,) = policy_endpoints(snapshot(*raws))
    return [f"{each.pod} {format_address(each.pod_ip) if each.pod_ip else '-'}" for each in made.endpoints]


HTTP = [("http", 80, "TCP")]


# --- selected pods ------------------------------------------------------------------------------------


def test_selected_pods_have_an_address_live_and_are_not_on_the_hosts_network() -> None:
    assert selected(
        policy({}),
        pod("x/dual", "10.0.0.1", "fd00::1"),
        pod("x/none"),
        pod("x/done", "10.0.0.2", phase="Succeeded"),
        pod("x/failed", "10.0.0.3", phase="Failed"),
        pod("x/host", "192.0.2.1", host=True),
        pod("x/ending", "10.0.0.4", deleted=True),
        pod("x/pending", "10.0.0.5", phase="Pending"),
        pod("y/other", "10.0.0.6"),
    ) == ["x/dual 10.0.0.1", "x/dual fd00::1", "x/ending 10.0.0.4", "x/pending 10.0.0.5"]


def test_each_address_comes_with_the_nodes_of_its_family() -> None:
    (made,) = policy_endpoints(snapshot(policy({}), pod("x/a", "10.0.0.1", "fd00::1")))
    a, four, six = Key("x", "a"), parse_address("192.0.2.1"), parse_address("2001:db8::1")
    assert made.endpoints == (
        PodEndpoint(a, parse_address("10.0.0.1"), four),
        PodEndpoint(a, parse_address("fd00::1"), six),
    )


def test_an_address_belongs_to_the_newest_live_pod() -> None:
    old, new = pod("x/old", "10.0.0.1", created=1), pod("x/new", "10.0.0.1", created=2)
    # The older one stays isolated, by its name.
    assert selected(policy({}), old, new) == ["x/new 10.0.0.1", "x/old -"]
    done = pod("x/new", "10.0.0.1", created=2, phase="Succeeded")
    assert selected(policy({}), old, done) == ["x/old 10.0.0.1"]
    # As a peer the address counts as the newer pod's, too.
    named = {"from": [{"podSelector": {"matchLabels": {"app": "old"}}}]}
    old["metadata"]["labels"] = {"app": "old"}
    assert rules("ingress", policy({"ingress": [named]}), old, new) == []
    assert rules("ingress", policy({"ingress": [named]}), old) == ["10.0.0.1"]


@pytest.mark.parametrize(
    ("spec", "isolates"),
    [
        ({}, {"ingress"}),
        ({"egress": []}, {"ingress"}),
        ({"egress": [{}]}, {"ingress", "egress"}),
        ({"policyTypes": ["Egress"]}, {"egress"}),
    ],
)
def test_policy_types_are_the_isolation(spec: Raw, isolates: set[str]) -> None:
    (made,) = policy_endpoints(snapshot(policy(spec)))
    assert made.isolates == isolates
    assert (made.ingress, made.policy) == ((), Key("x", "p"))


def test_rules_of_a_direction_that_is_not_listed_are_ignored() -> None:
    (made,) = policy_endpoints(snapshot(policy({"policyTypes": ["Egress"], "ingress": [{}]})))
    assert (made.ingress, made.egress) == ((), ())


# --- peers --------------------------------------------------------------------------------------------

EVERYWHERE = ["0.0.0.0/0", "::/0"]


@pytest.mark.parametrize("rule", [{}, {"from": None}, {"from": []}, {"from": [], "ports": []}])
def test_no_peers_mean_anybody(rule: Raw) -> None:
    assert rules("ingress", policy({"ingress": [rule]})) == EVERYWHERE


@pytest.mark.parametrize("spec", [{}, {"ingress": None}, {"ingress": []}])
def test_no_rules_mean_nobody(spec: Raw) -> None:
    assert rules("ingress", policy(spec)) == []


def test_ip_blocks_are_copied() -> None:
    block = {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}
    assert rules("egress", policy({"egress": [{"to": [{"ipBlock": block}]}]})) == [
        "10.0.0.0/8 except 10.1.0.0/16"
    ]


WORLD = [
    ns("x", team="red"),
    ns("y", team="blue"),
    pod("x/a", "10.0.0.1", "fd00::1", labels={"app": "a"}),
    pod("x/b", "10.0.0.2", labels={"app": "b"}),
    pod("y/a", "10.0.1.1", labels={"app": "a"}),
    pod("y/b", "10.0.1.2", labels={"app": "b"}),
    pod("z/a", "10.0.2.1", labels={"app": "a"}),  # its namespace has no object
    pod("z/host", "192.0.2.7", host=True),
]
A = {"matchLabels": {"app": "a"}}


@pytest.mark.parametrize(
    ("peers", "expected"),
    [
        ([{"podSelector": A}], ["10.0.0.1", "fd00::1"]),
        ([{"podSelector": {}}], ["10.0.0.1", "10.0.0.2", "fd00::1"]),
        ([{"namespaceSelector": {"matchLabels": {"team": "blue"}}}], ["10.0.1.1", "10.0.1.2"]),
        ([{"namespaceSelector": {"matchLabels": {"team": "blue"}}, "podSelector": A}], ["10.0.1.1"]),
        (
            [{"namespaceSelector": {"matchLabels": {"team": "blue"}}}, {"podSelector": A}],
            ["10.0.0.1", "10.0.1.1", "10.0.1.2", "fd00::1"],
        ),
        ([{"namespaceSelector": {}, "podSelector": A}], ["10.0.0.1", "10.0.1.1", "10.0.2.1", "fd00::1"]),
        (
            [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "z"}}}],
            ["10.0.2.1", "192.0.2.7"],  # a pod on the host's network is its node's address
        ),
        (
            [{"namespaceSelector": {"matchExpressions": [{"key": "team", "operator": "DoesNotExist"}]}}],
            ["10.0.2.1", "192.0.2.7"],
        ),
    ],
)
def test_pods_of_namespaces(peers: list[Raw], expected: list[str]) -> None:
    assert rules("ingress", policy({"ingress": [{"from": peers}]}), *WORLD) == expected
    assert rules("egress", policy({"egress": [{"to": peers}]}), *WORLD) == expected


# --- ports --------------------------------------------------------------------------------------------


def test_ports_as_numbers() -> None:
    ports = [{"port": 80, "endPort": 90}, {"protocol": "SCTP"}, {"port": 80, "endPort": 90}]
    assert rules(
        "ingress", policy({"ingress": [{"from": [{"podSelector": A}], "ports": ports}]}), *WORLD
    ) == [
        "10.0.0.1 80-90/TCP,SCTP",
        "fd00::1 80-90/TCP,SCTP",
    ]


def test_named_ports_of_egress_are_those_of_each_destination() -> None:
    raws = [
        pod("x/a", "10.0.0.1", ports=HTTP),
        pod("x/b", "10.0.0.2", ports=[("http", 8080, "TCP")]),
        pod("x/udp", "10.0.0.3", ports=[("http", 80, "UDP")]),
        pod("x/none", "10.0.0.4"),
    ]
    to = [{"podSelector": {}}]
    assert rules("egress", policy({"egress": [{"to": to, "ports": [{"port": "http"}]}]}), *raws) == [
        "10.0.0.1 80/TCP",
        "10.0.0.2 8080/TCP",
    ]
    both = [{"port": "http"}, {"port": 443}]
    assert rules("egress", policy({"egress": [{"to": to, "ports": both}]}), *raws)[2:] == [
        "10.0.0.3 443/TCP",
        "10.0.0.4 443/TCP",
    ]


def test_only_restartable_init_containers_serve() -> None:
    port = [{"name": "http", "containerPort": 80}]
    to = {"to": [{"podSelector": {}}], "ports": [{"port": "http"}]}
    sidecar = pod("x/side", "10.0.0.1", init=[{"restartPolicy": "Always", "ports": port}])
    assert rules("egress", policy({"egress": [to]}), sidecar) == ["10.0.0.1 80/TCP"]
    assert rules("egress", policy({"egress": [to]}), pod("x/i", "10.0.0.1", init=[{"ports": port}])) == []


def test_egress_to_a_block_has_no_named_ports() -> None:
    a = pod("x/a", "10.0.0.1", ports=HTTP)
    block = [{"ipBlock": {"cidr": "10.0.0.0/8"}}]
    assert rules("egress", policy({"egress": [{"to": block, "ports": [{"port": "http"}]}]}), a) == []
    ports = [{"port": "http"}, {"port": 53}]
    assert rules("egress", policy({"egress": [{"to": block, "ports": ports}]}), a) == ["10.0.0.0/8 53/TCP"]


@pytest.mark.parametrize("to", [{}, {"to": None}, {"to": []}])
def test_a_named_port_to_anybody_means_the_pods_that_have_it(to: Raw) -> None:
    raws = [
        pod("x/a", "10.0.0.1", "fd00::1", ports=HTTP),
        pod("y/b", "10.0.0.2", ports=[("http", 8080, "TCP"), ("https", 443, "TCP")]),
        pod("y/udp", "10.0.0.3", ports=[("http", 80, "UDP")]),
        pod("z/none", "10.0.0.4"),
        pod("z/done", "10.0.0.5", ports=HTTP, phase="Failed"),
        pod("z/host", "192.0.2.1", ports=HTTP, host=True),
    ]
    having = ["10.0.0.1 80/TCP", "10.0.0.2 8080/TCP", "192.0.2.1 80/TCP", "fd00::1 80/TCP"]
    assert rules("egress", policy({"egress": [{**to, "ports": [{"port": "http"}]}]}), *raws) == having
    # Numbers beside the name are anybody's, and open nothing more of the pods.
    both = policy({"egress": [{**to, "ports": [{"port": "http"}, {"port": 53, "protocol": "UDP"}]}]})
    assert sorted(rules("egress", both, *raws)) == sorted([*having, "0.0.0.0/0 53/UDP", "::/0 53/UDP"])
    # A name that no pod has opens nothing.
    assert rules("egress", policy({"egress": [{**to, "ports": [{"port": "nowhere"}]}]}), *raws) == []


def test_the_pods_that_have_a_named_port_come_and_go() -> None:
    spec = policy({"egress": [{"ports": [{"port": "http"}]}]})
    client = pod("x/client", "10.0.0.1")
    steps: list[tuple[list[Raw], list[str]]] = [
        ([], []),
        ([pod("y/a", "10.0.0.2", ports=HTTP)], ["10.0.0.2 80/TCP"]),
        ([pod("y/a", "10.0.0.2", ports=HTTP), pod("y/b", "10.0.0.3")], ["10.0.0.2 80/TCP"]),
        ([pod("y/a", "10.0.0.2", ports=[("http", 8080, "TCP")])], ["10.0.0.2 8080/TCP"]),
        ([pod("y/a", "10.0.0.2", ports=[("http", 8080, "UDP")])], []),
        (
            [pod("y/a", "10.0.0.9", ports=HTTP), pod("y/b", "10.0.0.3", ports=HTTP)],
            ["10.0.0.3 80/TCP", "10.0.0.9 80/TCP"],
        ),
        ([pod("y/a", "10.0.0.9", ports=HTTP, phase="Succeeded")], []),
        ([], []),
    ]
    resolver = Resolver()
    for pods, expected in steps:
        (made,) = resolver.update(snapshot(spec, client, *pods))
        assert [text(rule) for rule in made.egress] == expected


def test_a_named_port_to_anybody_names_the_services_in_front_of_it() -> None:
    spec = policy({"egress": [{"ports": [{"port": "dns", "protocol": "UDP"}, {"port": 8443}]}]})
    dns = service(
        "kube-system/kube-dns",
        {"k8s-app": "kube-dns"},
        [
            {"port": 53, "protocol": "UDP", "targetPort": "dns"},
            {"port": 443, "protocol": "TCP", "targetPort": 8443},
        ],
        "172.20.0.10",
    )
    backend = pod("kube-system/c", "10.0.0.2", labels={"k8s-app": "kube-dns"}, ports=[("dns", 5353, "UDP")])
    anybody = ["0.0.0.0/0 8443/TCP", "::/0 8443/TCP"]
    assert sorted(rules("egress", spec, dns, backend)) == sorted(
        [*anybody, "10.0.0.2 5353/UDP", "172.20.0.10 53/UDP"]
    )
    assert rules("egress", spec, dns) == anybody


def test_named_ports_of_ingress_that_all_pods_have_alike_need_no_groups() -> None:
    rule = {"from": [{"ipBlock": {"cidr": "10.0.0.0/8"}}], "ports": [{"port": "http"}]}
    raws = [pod("x/a", "10.0.0.1", ports=HTTP), pod("x/b", "10.0.0.2", ports=HTTP)]
    assert rules("ingress", policy({"ingress": [rule]}), *raws) == ["10.0.0.0/8 80/TCP"]
    (made,) = policy_endpoints(snapshot(policy({"ingress": [rule]}), *raws))
    assert made.port_group is None


def test_pods_whose_named_port_differs_get_a_policy_endpoint_per_group() -> None:
    spec = {"ingress": [{"ports": [{"port": "http"}]}, {"ports": [{"port": 22}]}], "egress": [{}]}
    raws = [
        pod("x/a", "10.0.0.1", ports=HTTP),
        pod("x/b", "10.0.0.2", ports=[("http", 8080, "TCP")]),
        pod("x/c", "10.0.0.3", ports=HTTP),
        pod("x/d", "10.0.0.4"),
    ]
    whole = snapshot(policy(spec), *raws)
    made = policy_endpoints(whole)
    assert {tuple(each.pod.name for each in one.endpoints) for one in made} == {("a", "c"), ("b",), ("d",)}
    assert len({one.port_group for one in made}) == len({one.key for one in made}) == 3
    assert all(one.port_group for one in made)
    assert {one.policy for one in made} == {Key("x", "p")}
    opened = {
        key.name: [text(rule) for _, rule in pod_rules.ingress.rules if pod_rules.ingress]
        for key, pod_rules in effective_rules(in_force(whole), None).items()
        if pod_rules.ingress
    }
    ssh = ["0.0.0.0/0 22/TCP", "::/0 22/TCP"]
    assert opened["a"] == opened["c"] == [ssh[0], "0.0.0.0/0 80/TCP", ssh[1], "::/0 80/TCP"]
    assert opened["b"] == [ssh[0], "0.0.0.0/0 8080/TCP", ssh[1], "::/0 8080/TCP"]
    assert opened["d"] == ssh
    # A group is called the same whatever other groups there are.
    names = {one.key: one for one in made}
    fewer = policy_endpoints(snapshot(policy(spec), *raws[:2]))
    assert {one.port_group for one in fewer} < {one.port_group for one in names.values()}


# --- Services -----------------------------------------------------------------------------------------


def test_egress_names_the_cluster_ips_of_services_in_front_of_its_peers() -> None:
    raws = [
        pod("x/a", "10.0.0.1", labels={"app": "a"}),
        service(
            "x/s", {"app": "a"}, [{"port": 80, "targetPort": 8080}, {"port": 22}], "172.20.0.1", "fd01::1"
        ),
        service("x/other", {"app": "b"}, [{"port": 80, "targetPort": 8080}], "172.20.0.2"),
        service("x/headless", {"app": "a"}, [{"port": 80, "targetPort": 8080}], "None"),
        service("x/bare", {}, [{"port": 80, "targetPort": 8080}], "172.20.0.3"),
        service("y/s", {"app": "a"}, [{"port": 80, "targetPort": 8080}], "172.20.0.4"),
    ]
    to = [{"podSelector": A}]
    assert rules("egress", policy({"egress": [{"to": to}]}), *raws) == ["10.0.0.1", "172.20.0.1", "fd01::1"]
    limited = {"to": to, "ports": [{"port": 8000, "endPort": 8080}]}
    assert rules("egress", policy({"egress": [limited]}), *raws) == [
        "10.0.0.1 8000-8080/TCP",
        "172.20.0.1 80/TCP",
        "fd01::1 80/TCP",
    ]
    assert rules("egress", policy({"egress": [{"to": to, "ports": [{"port": 80}]}]}), *raws) == [
        "10.0.0.1 80/TCP"  # the Service's own port is not what the rule names
    ]
    assert rules("ingress", policy({"ingress": [{"from": to}]}), *raws) == ["10.0.0.1"]


@pytest.mark.parametrize(
    ("target", "port", "numbers", "opened"),
    [
        ("http", "http", (80, 8080), True),
        ("http", 80, (80, 80), True),
        ("http", 80, (80, 8080), False),  # one of the pods behind it is not allowed at its port
        (80, "http", (80, 80), True),
        (80, "http", (80, 8080), False),
        (80, "http", (), False),
    ],
)
def test_named_target_ports(target: Any, port: Any, numbers: tuple[int, ...], *, opened: bool) -> None:
    raws = [
        pod(f"x/a{n}", f"10.0.0.{n}", labels={"app": "a"}, ports=[("http", number, "TCP")])
        for n, number in enumerate(numbers, 1)
    ]
    raws.append(service("x/s", {"app": "a"}, [{"port": 81, "targetPort": target}], "172.20.0.1"))
    found = rules(
        "egress", policy({"egress": [{"to": [{"podSelector": A}], "ports": [{"port": port}]}]}), *raws
    )
    assert ("172.20.0.1 81/TCP" in found) is opened
    assert sum(each.startswith("172") for each in found) == opened


# --- objects ------------------------------------------------------------------------------------------


def many(count: int) -> list[Raw]:
    return [pod(f"x/p{n:04}", f"10.0.{n // 250}.{n % 250 + 1}", labels={"app": "a"}) for n in range(count)]


def test_objects_hold_at_most_200_entries_and_a_small_change_touches_few() -> None:
    spec = policy({"ingress": [{"from": [{"podSelector": A}]}], "egress": [{"to": [{"podSelector": A}]}]})
    pods = many(1000)
    whole = policy_endpoints(snapshot(spec, *pods))
    assert len(whole) > 4
    assert len({each.key for each in whole}) == len(whole)
    for each in whole:
        assert max(len(each.endpoints), len(each.ingress), len(each.egress)) <= MAX_ENTRIES
        assert each.isolates == set(Direction)
    assert sum(len(each.endpoints) for each in whole) == 1000
    assert len({rule.cidr for each in whole for rule in each.ingress}) == 1000
    fewer = {each.key: each for each in policy_endpoints(snapshot(spec, *pods[:333], *pods[334:]))}
    changed = [each for each in whole if fewer.get(each.key) != each]
    assert len(changed) <= 4 < len(whole)


def test_exactly_200_entries_are_one_object() -> None:
    assert len(policy_endpoints(snapshot(policy({}), *many(200)))) == 1
    assert len(policy_endpoints(snapshot(policy({}), *many(201)))) > 1


def test_names_are_valid_and_differ_whatever_the_policies_are_called() -> None:
    long = "a" * 253
    made = policy_endpoints(
        snapshot(policy({}, f"x/{long}"), policy({}, f"x/{long[:-1]}b"), policy({}, "x/p"), policy({}, "y/p"))
    )
    assert len({each.key for each in made}) == 4
    assert all(len(each.key.name) <= 63 for each in made)
    assert next(each.key.name for each in made if each.policy == Key("x", "p")).startswith("p-")


def test_policy_endpoints_that_are_there_win() -> None:
    whole = snapshot(policy({}), policy({}, "x/q"), pod("x/a", "10.0.0.1"))
    given = PolicyEndpoint(Key("x", "zz"), Key("x", "p"), frozenset({Direction.EGRESS}))
    both = in_force(replace(whole, policy_endpoints=(given,)))
    assert [each.policy.name for each in both.policy_endpoints] == ["q", "p"]
    assert both.policy_endpoints[1] is given
    assert in_force(Snapshot(policy_endpoints=(given,))).policy_endpoints == (given,)


def test_the_order_of_what_was_known_before_does_not_matter() -> None:
    spec = policy({"ingress": [{"from": [{"podSelector": A}], "ports": [{"port": "http"}]}]})
    steps = [
        snapshot(spec, *WORLD),
        snapshot(spec, *WORLD[:3]),
        snapshot(spec, *WORLD[2:]),
        snapshot(spec, *WORLD, pod("x/new", "10.0.0.1", created=9, labels={"app": "a"}, ports=HTTP)),
        snapshot(*WORLD),
        snapshot(spec, *WORLD),
    ]
    resolver = Resolver()
    for step in steps:
        assert resolver.update(step) == policy_endpoints(step)


# --- podgate resolve ----------------------------------------------------------------------------------


def dump(tmp_path: Path, *raws: Raw) -> Path:
    path = tmp_path / "dump.json"
    path.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": raws}))
    return path


@pytest.mark.parametrize("output", ["yaml", "json"])
def test_what_resolve_prints_reads_back_the_same(tmp_path: Path, output: str) -> None:
    spec: Raw = {
        "podSelector": {"matchExpressions": [{"key": "app", "operator": "NotIn", "values": ["1e3"]}]},
        "ingress": [
            {"from": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}}, {"podSelector": {}}]},
            {"ports": [{"port": "http"}, {"port": 5, "endPort": 9}, {"protocol": "UDP"}]},
        ],
        "egress": [{"to": [{"namespaceSelector": {}}]}],
    }
    path = dump(
        tmp_path,
        policy(spec, "x/1e3"),
        policy({}, "x/on"),
        pod("x/a", "10.9.0.1", "fd00::1", ports=HTTP),
        pod("x/b", "10.9.0.2", ports=[("http", 8080, "TCP")]),
        *many(300),
    )
    answer = CliRunner().invoke(command, [str(path), "-o", output])
    assert (answer.exit_code, answer.stderr) == (0, "")
    back = read_contents(answer.stdout.encode(), "out")
    assert back.problems == []
    assert not back.skipped
    given = [each for each in back.objects if isinstance(each, PolicyEndpoint)]
    assert tuple(sorted(given, key=lambda each: each.key)) == policy_endpoints(read_paths([path]).snapshot)
    again = CliRunner().invoke(command, [str(path), "-o", output])
    assert again.stdout == answer.stdout


def test_the_shape_of_an_object(tmp_path: Path) -> None:
    path = dump(tmp_path, policy({"podSelector": A, "ingress": [{}]}), *WORLD)
    answer = json.loads(CliRunner().invoke(command, [str(path), "-o", "json"]).stdout)
    (item,) = answer["items"]
    assert (answer["kind"], item["kind"]) == ("List", "PolicyEndpoint")
    assert item["metadata"]["generateName"] == "p-"
    (owner,) = item["metadata"]["ownerReferences"]
    assert owner == {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "name": "p",
        "uid": "u1",
        "controller": True,
        "blockOwnerDeletion": True,
    }
    assert item["spec"] == {
        "policyRef": {"name": "p", "namespace": "x"},
        "podSelector": {"matchLabels": {"app": "a"}},
        "podIsolation": ["Ingress"],
        "podSelectorEndpoints": [
            {"hostIP": "192.0.2.1", "podIP": "10.0.0.1", "name": "a", "namespace": "x"},
            {"hostIP": "2001:db8::1", "podIP": "fd00::1", "name": "a", "namespace": "x"},
        ],
        "ingress": [{"cidr": "0.0.0.0/0"}, {"cidr": "::/0"}],
    }


def test_resolve_says_what_it_leaves_alone(tmp_path: Path) -> None:
    endpoint = {
        "apiVersion": "networking.k8s.aws/v1alpha1",
        "kind": "PolicyEndpoint",
        "metadata": {"name": "p-1", "namespace": "x"},
        "spec": {"policyRef": {"name": "p", "namespace": "x"}},
    }
    answer = CliRunner().invoke(command, [str(dump(tmp_path, policy({}), endpoint))])
    assert (answer.exit_code, answer.stdout) == (0, "")
    assert answer.stderr == "podgate: not resolved, there are PolicyEndpoints already: x/p\n"
    answer = CliRunner().invoke(command, [str(dump(tmp_path, pod("x/a")))])
    assert answer.stderr == "podgate: no NetworkPolicy here, so there is nothing to resolve\n"
