"""PolicyEndpoint and Pod from parsed documents: what is kept, what is dropped, what is said."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest

from dataplane.addresses import parse_address as address
from dataplane.model import ContainerPort, Direction, Key, PodEndpoint, PortRange, Problem
from dataplane.sources.fields import MAX_PROBLEMS
from dataplane.sources.objects import parse_time, pod, policy_endpoint

SOURCE = "policies.yaml"
NAME = "PolicyEndpoint x/p-abcde"


def valid() -> dict[str, Any]:
    return {
        "apiVersion": "networking.k8s.aws/v1alpha1",
        "kind": "PolicyEndpoint",
        "metadata": {
            "name": "p-abcde",
            "namespace": "x",
            "creationTimestamp": "2026-01-31T12:00:00Z",
            "annotations": {"networking.k8s.aws/last-change-trigger-time": "2026-01-31T12:00:00.123456789Z"},
        },
        "spec": {
            "policyRef": {"name": "p", "namespace": "x"},
            "podSelector": {"matchLabels": {"app": "a"}},
            "podIsolation": ["Ingress", "Egress"],
            "podSelectorEndpoints": [
                {"name": "a", "namespace": "x", "podIP": "10.0.0.5", "hostIP": "192.0.2.1"},
                {"name": "b", "namespace": "x", "podIP": "2001:db8::5", "hostIP": "192.0.2.1"},
            ],
            "ingress": [{"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"], "ports": [{"port": 80}]}],
            "egress": [{"cidr": "10.0.0.9", "ports": [{"protocol": "UDP", "port": 53, "endPort": 54}]}],
        },
    }


def with_rule(rule: object) -> dict[str, Any]:
    raw = valid()
    raw["spec"]["ingress"] = [rule]
    return raw


def problems_of(raw: object) -> list[tuple[str, str, str]]:
    return [(p.object, p.field, p.reason) for p in policy_endpoint(raw, SOURCE)[1]]


def test_valid_object() -> None:
    endpoint, problems = policy_endpoint(valid(), SOURCE)
    assert problems == []
    assert endpoint is not None
    assert endpoint.key == Key("x", "p-abcde")
    assert endpoint.policy == Key("x", "p")
    assert endpoint.isolates == {Direction.INGRESS, Direction.EGRESS}
    assert endpoint.endpoints == (
        PodEndpoint(Key("x", "a"), address("10.0.0.5"), address("192.0.2.1")),
        PodEndpoint(Key("x", "b"), address("2001:db8::5"), address("192.0.2.1")),
    )
    (ingress,), (egress,) = endpoint.ingress, endpoint.egress
    assert (str(ingress.cidr), [str(e) for e in ingress.excepts]) == ("10.0.0.0/8", ["10.1.0.0/16"])
    assert ingress.ports == (PortRange(6, 80, 80),)
    assert str(egress.cidr) == "10.0.0.9/32"
    assert egress.ports == (PortRange(17, 53, 54),)
    assert endpoint.port_group is None
    assert endpoint.changed_at == pytest.approx(1769860800.123456789, abs=1e-6)
    assert hash(endpoint) == hash(policy_endpoint(valid(), "elsewhere")[0])


@pytest.mark.parametrize("empty", [None, []])
@pytest.mark.parametrize("name", ["podIsolation", "podSelectorEndpoints", "ingress", "egress"])
def test_null_and_empty_mean_missing(name: str, empty: object) -> None:
    raw, without = valid(), valid()
    raw["spec"][name] = empty
    del without["spec"][name]
    assert policy_endpoint(raw, SOURCE) == policy_endpoint(without, SOURCE)
    assert policy_endpoint(raw, SOURCE)[1] == []


@pytest.mark.parametrize("empty", [None, []])
def test_empty_ports_and_except_mean_any_and_none(empty: object) -> None:
    endpoint, problems = policy_endpoint(
        with_rule({"cidr": "10.0.0.0/8", "except": empty, "ports": empty, "domainName": None}), SOURCE
    )
    assert problems == []
    assert endpoint is not None
    assert endpoint.ingress[0].ports == ()
    assert endpoint.ingress[0].excepts == ()


# Each of these is a rule that must not be there, and the field that the line names.
BAD_RULES: dict[str, tuple[object, str]] = {
    "no map": ("10.0.0.0/8", ""),
    "null": (None, ""),
    "list": ([], ""),
    "no cidr": ({"ports": [{"port": 80}]}, ".cidr"),
    "empty": ({}, ".cidr"),
    "empty cidr": ({"cidr": ""}, ".cidr"),
    "null cidr": ({"cidr": None}, ".cidr"),
    "word": ({"cidr": "everything"}, ".cidr"),
    "number": ({"cidr": 10}, ".cidr"),
    "length beyond 32": ({"cidr": "10.0.0.0/33"}, ".cidr"),
    "length beyond 128": ({"cidr": "2001:db8::/129"}, ".cidr"),
    "no length": ({"cidr": "10.0.0.0/"}, ".cidr"),
    "negative length": ({"cidr": "10.0.0.0/-1"}, ".cidr"),
    "mask": ({"cidr": "10.0.0.0/255.0.0.0"}, ".cidr"),
    "short": ({"cidr": "10.0/16"}, ".cidr"),
    "octal": ({"cidr": "010.0.0.0/8"}, ".cidr"),
    "space": ({"cidr": " 10.0.0.0/8"}, ".cidr"),
    "newline": ({"cidr": "10.0.0.0/8\n"}, ".cidr"),
    "zone": ({"cidr": "fe80::1%eth0"}, ".cidr"),
    "mapped": ({"cidr": "::ffff:10.0.0.0/104"}, ".cidr"),
    "long": ({"cidr": "1" * 100_000}, ".cidr"),
    "other digits": ({"cidr": "10.0.0.0/\u0668"}, ".cidr"),
    "domain": ({"domainName": "example.com"}, ".domainName"),
    "domain and cidr": ({"domainName": "example.com", "cidr": "10.0.0.0/8"}, ".domainName"),
    "except no list": ({"cidr": "10.0.0.0/8", "except": "10.1.0.0/16"}, ".except"),
    "except bad": ({"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16", "x"]}, ".except[1]"),
    "except null": ({"cidr": "10.0.0.0/8", "except": [None]}, ".except[0]"),
    "except of other family": ({"cidr": "10.0.0.0/8", "except": ["2001:db8::/32"]}, ".except[0]"),
    "excepts, misspelt": ({"cidr": "10.0.0.0/8", "excepts": ["10.1.0.0/16"]}, ".excepts"),
    "ports no list": ({"cidr": "10.0.0.0/8", "ports": {"port": 80}}, ".ports"),
    "ports text": ({"cidr": "10.0.0.0/8", "ports": "80"}, ".ports"),
}

BAD_PORTS: dict[str, tuple[object, str]] = {
    "no map": (80, ""),
    "null": (None, ""),
    "named": ({"port": "http"}, ".port"),
    "text": ({"port": "80"}, ".port"),
    "zero": ({"port": 0}, ".port"),
    "negative": ({"port": -1}, ".port"),
    "beyond": ({"port": 65536}, ".port"),
    "huge": ({"port": 10**5000}, ".port"),
    "true": ({"port": True}, ".port"),
    "float": ({"port": 80.0}, ".port"),
    "nan": ({"port": math.nan}, ".port"),
    "list": ({"port": [80]}, ".port"),
    "small letters": ({"protocol": "tcp", "port": 80}, ".protocol"),
    "unknown protocol": ({"protocol": "ICMP"}, ".protocol"),
    "empty protocol": ({"protocol": "", "port": 80}, ".protocol"),
    "protocol number": ({"protocol": 6, "port": 80}, ".protocol"),
    "end without port": ({"endPort": 90}, ".endPort"),
    "end before port": ({"port": 90, "endPort": 80}, ".endPort"),
    "end beyond": ({"port": 90, "endPort": 70000}, ".endPort"),
    "end text": ({"port": 90, "endPort": "100"}, ".endPort"),
    "end true": ({"port": 1, "endPort": True}, ".endPort"),
    "unknown field": ({"port": 80, "endport": 90}, ".endport"),
}


@pytest.mark.parametrize("name", BAD_RULES)
def test_bad_rule_is_dropped_and_isolation_stands(name: str) -> None:
    rule, field = BAD_RULES[name]
    raw = with_rule(rule)
    raw["spec"]["ingress"].append({"cidr": "10.7.0.0/16"})
    endpoint, problems = policy_endpoint(raw, SOURCE)
    good, _ = policy_endpoint(valid(), SOURCE)
    assert endpoint is not None
    assert good is not None
    assert [(str(rule.cidr), rule.index) for rule in endpoint.ingress] == [("10.7.0.0/16", 1)]
    assert (endpoint.isolates, endpoint.endpoints, endpoint.egress) == (
        good.isolates,
        good.endpoints,
        good.egress,
    )
    (problem,) = problems
    assert (problem.source, problem.object, problem.field) == (SOURCE, NAME, f"spec.ingress[0]{field}")
    assert problem.reason.endswith("this rule allows nothing")
    assert len(str(problem)) < 300
    assert "\n" not in str(problem)


@pytest.mark.parametrize("name", BAD_PORTS)
def test_bad_port_is_dropped(name: str) -> None:
    port, field = BAD_PORTS[name]
    endpoint, problems = policy_endpoint(
        with_rule({"cidr": "10.0.0.0/8", "ports": [port, {"port": 443}]}), SOURCE
    )
    assert endpoint is not None
    assert endpoint.ingress[0].ports == (PortRange(6, 443, 443),)
    assert [(p.object, p.field) for p in problems] == [(NAME, f"spec.ingress[0].ports[0]{field}")]


@pytest.mark.parametrize("name", BAD_PORTS)
def test_rule_goes_with_its_last_port(name: str) -> None:
    endpoint, problems = policy_endpoint(
        with_rule({"cidr": "10.0.0.0/8", "ports": [BAD_PORTS[name][0]]}), SOURCE
    )
    assert endpoint is not None
    assert endpoint.ingress == ()
    assert problems[-1].field == "spec.ingress[0].ports"
    assert problems[-1].reason == "no entry can be used; this rule allows nothing"


def test_port_forms() -> None:
    ports = [
        {},
        {"protocol": None, "port": None, "endPort": None},
        {"protocol": "SCTP"},
        {"port": 1, "endPort": 65535},
        {"port": 7, "endPort": 7},
    ]
    endpoint, problems = policy_endpoint(with_rule({"cidr": "::/0", "ports": ports}), SOURCE)
    assert problems == []
    assert endpoint is not None
    assert endpoint.ingress[0].ports == (
        PortRange(6, 0, 65535),
        PortRange(6, 0, 65535),
        PortRange(132, 0, 65535),
        PortRange(6, 1, 65535),
        PortRange(6, 7, 7),
    )


def test_many_ports_on_one_rule() -> None:
    ports = [{"port": port} for port in range(1, 301)]
    endpoint, _ = policy_endpoint(with_rule({"cidr": "10.0.0.0/8", "ports": ports}), SOURCE)
    assert endpoint is not None
    assert len(endpoint.ingress[0].ports) == 300


def test_host_bits_are_masked_and_reported() -> None:
    endpoint, problems = policy_endpoint(with_rule({"cidr": "10.1.2.3/8", "except": ["10.9.9.9/16"]}), SOURCE)
    assert endpoint is not None
    assert str(endpoint.ingress[0].cidr) == "10.0.0.0/8"
    assert [str(each) for each in endpoint.ingress[0].excepts] == ["10.9.0.0/16"]
    assert [p.field for p in problems] == ["spec.ingress[0].cidr", "spec.ingress[0].except[0]"]
    assert "it means 10.0.0.0/8" in problems[0].reason


def test_except_outside_its_cidr_is_kept_and_reported() -> None:
    endpoint, problems = policy_endpoint(
        with_rule({"cidr": "10.0.0.0/8", "except": ["192.168.0.0/16"]}), SOURCE
    )
    assert endpoint is not None
    assert len(endpoint.ingress) == 1
    assert [p.field for p in problems] == ["spec.ingress[0].except[0]"]


@pytest.mark.parametrize("rules", ["x", {"cidr": "0.0.0.0/0"}, 7, True])
def test_rules_that_are_no_list_allow_nothing(rules: object) -> None:
    raw = valid()
    raw["spec"]["ingress"] = rules
    endpoint, problems = policy_endpoint(raw, SOURCE)
    assert endpoint is not None
    assert endpoint.ingress == ()
    assert endpoint.isolates == set(Direction)
    assert [p.field for p in problems] == ["spec.ingress"]


@pytest.mark.parametrize("isolation", ["Ingress", {"Ingress": True}, 1, ["ingress"], [None], ["Ingress", 3]])
def test_unreadable_isolation_closes_both_ways(isolation: object) -> None:
    raw = valid()
    raw["spec"]["podIsolation"] = isolation
    endpoint, problems = policy_endpoint(raw, SOURCE)
    assert endpoint is not None
    assert endpoint.isolates == set(Direction)
    assert len(problems) == 1
    assert problems[0].field.startswith("spec.podIsolation")


def test_isolation_of_one_direction() -> None:
    raw = valid()
    raw["spec"]["podIsolation"] = ["Egress", "Egress"]
    endpoint, problems = policy_endpoint(raw, SOURCE)
    assert endpoint is not None
    assert (endpoint.isolates, problems) == ({Direction.EGRESS}, [])


def test_host_network_entry_is_skipped_in_silence() -> None:
    raw = valid()
    raw["spec"]["podSelectorEndpoints"][0]["podIP"] = "192.0.2.1"
    endpoint, problems = policy_endpoint(raw, SOURCE)
    assert endpoint is not None
    assert ([e.pod.name for e in endpoint.endpoints], problems) == (["b"], [])


@pytest.mark.parametrize("value", [None, "", "x", 5, [], "10.0.0.5/32", "::ffff:10.0.0.5"])
@pytest.mark.parametrize(("name", "place"), [("podIP", 1), ("hostIP", 2)])
def test_entry_with_unreadable_address_still_selects_its_pod(name: str, place: int, value: object) -> None:
    raw = valid()
    raw["spec"]["podSelectorEndpoints"][0][name] = value
    endpoint, problems = policy_endpoint(raw, SOURCE)
    assert endpoint is not None
    assert endpoint.endpoints[0].pod == Key("x", "a")
    assert endpoint.endpoints[0][place] == b""
    assert [p.field for p in problems] == [f"spec.podSelectorEndpoints[0].{name}"]


@pytest.mark.parametrize(
    "entry", [None, "a", [], {}, {"name": "a"}, {"namespace": "x"}, {"name": "A b", "namespace": "x"}]
)
def test_entry_without_a_name_is_dropped_and_the_others_stand(entry: object) -> None:
    raw = valid()
    raw["spec"]["podSelectorEndpoints"][0] = entry
    endpoint, problems = policy_endpoint(raw, SOURCE)
    assert endpoint is not None
    assert [e.pod.name for e in endpoint.endpoints] == ["b"]
    assert len(problems) == 1
    assert problems[0].reason.endswith("this entry selects no pod")


@pytest.mark.parametrize(
    ("change", "field", "named"),
    [
        (lambda raw: raw.pop("spec"), "spec", True),
        (lambda raw: raw.update(spec=[]), "spec", True),
        (lambda raw: raw["spec"].pop("policyRef"), "spec.policyRef", True),
        (lambda raw: raw["spec"].update(policyRef="p"), "spec.policyRef", True),
        (lambda raw: raw["spec"]["policyRef"].pop("name"), "spec.policyRef.name", True),
        (lambda raw: raw["spec"]["policyRef"].update(namespace=7), "spec.policyRef.namespace", True),
        (lambda raw: raw["spec"].update(podSelectorEndpoints={}), "spec.podSelectorEndpoints", True),
        (lambda raw: raw.pop("metadata"), "metadata", False),
        (lambda raw: raw["metadata"].pop("name"), "metadata.name", False),
        (lambda raw: raw["metadata"].update(name="../etc"), "metadata.name", False),
        (lambda raw: raw["metadata"].update(name="a\nb"), "metadata.name", False),
        (lambda raw: raw["metadata"].update(namespace=[]), "metadata.namespace", False),
    ],
)
def test_unusable_as_a_whole(change: Any, field: str, named: bool) -> None:
    raw = valid()
    change(raw)
    endpoint, problems = policy_endpoint(raw, SOURCE)
    assert endpoint is None
    assert [(p.object, p.field) for p in problems] == [(NAME if named else "", field)]


@pytest.mark.parametrize("raw", [None, [], "x", 5, True, math.nan, {}])
def test_no_object_at_all(raw: object) -> None:
    for read in (policy_endpoint, pod):
        item, problems = read(raw, SOURCE)
        assert item is None
        assert len(problems) == 1


def test_namespace_defaults_as_kubectl_does() -> None:
    raw = valid()
    del raw["metadata"]["namespace"]
    endpoint, _ = policy_endpoint(raw, SOURCE)
    assert endpoint is not None
    assert endpoint.key == Key("default", "p-abcde")


def test_unknown_spec_field_is_reported() -> None:
    raw = valid()
    raw["spec"]["podIsolations"] = ["Egress"]
    endpoint, problems = policy_endpoint(raw, SOURCE)
    assert endpoint is not None
    assert [p.field for p in problems] == ["spec.podIsolations"]


def test_port_group() -> None:
    def group(labels: object) -> tuple[str | None, int]:
        raw = valid()
        raw["metadata"]["labels"] = labels
        endpoint, problems = policy_endpoint(raw, SOURCE)
        assert endpoint is not None
        return endpoint.port_group, len(problems)

    assert group(None) == (None, 0)
    assert group({"app": "x"}) == (None, 0)
    assert group({"podgate.dev/port-group": "1"}) == ("1", 0)
    # A group that cannot be read is joined with no other, least of all with the ungrouped.
    assert group({"podgate.dev/port-group": 1}) == ("/x/p-abcde", 1)


def test_problems_are_bounded() -> None:
    raw = valid()
    raw["spec"]["ingress"] = [{"cidr": "x"}] * 1000
    endpoint, problems = policy_endpoint(raw, SOURCE)
    assert endpoint is not None
    assert len(problems) == MAX_PROBLEMS + 1
    assert problems[-1] == Problem(SOURCE, NAME, "", f"and {1000 - MAX_PROBLEMS} more problems")


def test_input_is_left_as_it_was() -> None:
    raw = valid()
    before = copy.deepcopy(raw)
    policy_endpoint(raw, SOURCE)
    assert raw == before


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1970-01-01T00:00:00Z", 0.0),
        ("1970-01-01T00:00:00.000000001Z", 1e-9),
        ("1970-01-01t01:00:00.5+01:00", 0.5),
        ("1969-12-31T23:00:00-01:30", 1800.0),
        ("2024-02-29T00:00:00Z", 1709164800.0),
        ("2016-12-31T23:59:60Z", 1483228800.0),
    ],
)
def test_times(text: str, seconds: float) -> None:
    assert parse_time(text) == pytest.approx(seconds, abs=1e-9)


@pytest.mark.parametrize(
    "value",
    [
        None,
        5,
        "",
        "now",
        "2026-01-31",
        "2026-01-31T12:00:00",
        "2026-13-01T00:00:00Z",
        "2025-02-29T00:00:00Z",
        "2026-01-31T24:00:00Z",
        "2026-01-31T12:60:00Z",
        "2026-01-31T12:00:61Z",
        "2026-01-31T12:00:00+99:00",
        "0000-01-01T00:00:00Z",
        "2026-01-31T12:00:00.1234567890Z",
        "2026-01-31T12:00:00Z\n",
        "٢٠٢٦-01-31T12:00:00Z",
    ],
)
def test_no_times(value: object) -> None:
    with pytest.raises(ValueError, match=r"is not a time"):
        parse_time(value)


def test_bad_trigger_time_costs_only_itself() -> None:
    raw = valid()
    raw["metadata"]["annotations"]["networking.k8s.aws/last-change-trigger-time"] = "yesterday"
    endpoint, problems = policy_endpoint(raw, SOURCE)
    assert endpoint is not None
    assert (endpoint.changed_at, len(problems), len(endpoint.ingress)) == (None, 1, 1)


# --- Pod ----------------------------------------------------------------------------------------------


def valid_pod() -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": "a-0",
            "namespace": "x",
            "uid": "0f3c",
            "creationTimestamp": "1970-01-01T00:00:10Z",
            "labels": {"app": "a", "empty": "", "example.com/tier": "front"},
            "annotations": {"podgate.dev/spoof-check": "off", "kubectl.kubernetes.io/other": "x" * 1000},
        },
        "spec": {
            "nodeName": "node-1",
            "containers": [
                {"name": "one", "ports": [{"containerPort": 80, "name": "http"}]},
                {"name": "two", "ports": [{"containerPort": 53, "protocol": "UDP"}]},
                {"name": "three"},
            ],
            "initContainers": [
                {"name": "once", "ports": [{"containerPort": 1}]},
                {"name": "sidecar", "restartPolicy": "Always", "ports": [{"containerPort": 2}]},
            ],
        },
        "status": {
            "phase": "Running",
            "podIP": "10.0.0.5",
            "podIPs": [{"ip": "10.0.0.5"}, {"ip": "2001:db8::5"}],
            "hostIP": "192.0.2.1",
            "hostIPs": [{"ip": "192.0.2.1"}, {"ip": "2001:db8::1"}],
        },
    }


def test_valid_pod() -> None:
    item, problems = pod(valid_pod(), SOURCE)
    assert problems == []
    assert item is not None
    assert (item.key, item.uid, item.node_name) == (Key("x", "a-0"), "0f3c", "node-1")
    assert item.ips == (address("10.0.0.5"), address("2001:db8::5"))
    assert item.host_ips == (address("192.0.2.1"), address("2001:db8::1"))
    assert (item.host_network, item.finished, item.created_at) == (False, False, 10.0)
    assert item.labels == {"app": "a", "empty": "", "example.com/tier": "front"}
    assert item.annotations == {"podgate.dev/spoof-check": "off"}
    assert item.ports == (
        ContainerPort("http", 6, 80),
        ContainerPort(None, 17, 53),
        ContainerPort(None, 6, 2),
    )


def test_pending_pod_has_nothing_yet() -> None:
    item, problems = pod({"metadata": {"name": "a"}, "status": {"phase": "Pending", "podIP": ""}}, SOURCE)
    assert problems == []
    assert item is not None
    assert (item.ips, item.host_ips, item.finished) == ((), (), False)


@pytest.mark.parametrize("phase", ["Succeeded", "Failed"])
def test_finished_pod(phase: str) -> None:
    raw = valid_pod()
    raw["status"]["phase"] = phase
    item, _ = pod(raw, SOURCE)
    assert item is not None
    assert item.finished


def test_terminating_pod_counts_until_it_ends() -> None:
    raw = valid_pod()
    raw["metadata"]["deletionTimestamp"] = "1970-01-01T00:00:20Z"
    item, _ = pod(raw, SOURCE)
    assert item is not None
    assert not item.finished


@pytest.mark.parametrize("value", ["true", 1, "yes", [], {}])
def test_host_network_must_be_said_plainly(value: object) -> None:
    # Believing it would free the pod of every policy.
    raw = valid_pod()
    raw["spec"]["hostNetwork"] = value
    item, problems = pod(raw, SOURCE)
    assert item is not None
    assert not item.host_network
    assert [p.field for p in problems] == ["spec.hostNetwork"]


def test_single_addresses_are_enough() -> None:
    raw = valid_pod()
    del raw["status"]["podIPs"], raw["status"]["hostIPs"]
    item, _ = pod(raw, SOURCE)
    assert item is not None
    assert (item.ips, item.host_ips) == ((address("10.0.0.5"),), (address("192.0.2.1"),))


@pytest.mark.parametrize(
    ("section", "name", "value", "fields"),
    [
        ("status", "podIPs", "x", ["status.podIPs"]),
        (
            "status",
            "podIPs",
            [{"ip": "x"}, 3, {}],
            ["status.podIPs[0].ip", "status.podIPs[1]", "status.podIPs[2].ip"],
        ),
        ("status", "podIP", 7, ["status.podIP"]),
        ("status", "phase", ["Failed"], ["status.phase"]),
        ("metadata", "labels", ["a"], ["metadata.labels"]),
        ("metadata", "labels", {"on": True}, ["metadata.labels[on]"]),
        ("metadata", "labels", {"a b": "x"}, ["metadata.labels['a b']"]),
        ("metadata", "annotations", {"podgate.dev/x": "\ud800"}, ["metadata.annotations[podgate.dev/x]"]),
        ("metadata", "creationTimestamp", 5, ["metadata.creationTimestamp"]),
        ("metadata", "uid", {}, ["metadata.uid"]),
        ("spec", "nodeName", 5, ["spec.nodeName"]),
        ("spec", "containers", {}, ["spec.containers"]),
        ("spec", "containers", [7, {"ports": 7}], ["spec.containers[0]", "spec.containers[1].ports"]),
        (
            "spec",
            "containers",
            [{"ports": [{"containerPort": "80"}, {"containerPort": 80, "name": "A B"}, {}]}],
            [
                "spec.containers[0].ports[0].containerPort",
                "spec.containers[0].ports[1].name",
                "spec.containers[0].ports[2].containerPort",
            ],
        ),
    ],
)
def test_bad_pod_field_counts_as_missing(section: str, name: str, value: object, fields: list[str]) -> None:
    raw = valid_pod()
    raw[section][name] = value
    item, problems = pod(raw, SOURCE)
    assert item is not None
    assert item.key == Key("x", "a-0")
    assert [(p.object, p.field) for p in problems] == [("Pod x/a-0", field) for field in fields]


@pytest.mark.parametrize("section", ["spec", "status"])
def test_pod_without_readable_sections_is_unusable(section: str) -> None:
    raw = valid_pod()
    raw[section] = "x"
    item, problems = pod(raw, SOURCE)
    assert item is None
    assert [(p.object, p.field) for p in problems] == [("Pod x/a-0", section)]
