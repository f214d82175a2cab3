"""Whatever policies, pods and Services hold, `check` answers with findings and never with an exception."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from dataplane.policy.check import CHECKS, check
from dataplane.sources.contents import read_contents
from dataplane.sources.store import Store

Raw = dict[str, Any]

OBJECTS: list[Raw] = [
    {"kind": "Namespace", "metadata": {"name": "x", "labels": {"team": "a"}}},
    {
        "kind": "Pod",
        "metadata": {"name": "a", "namespace": "x", "labels": {"app": "a"}},
        "spec": {
            "hostNetwork": False,
            "dnsPolicy": "ClusterFirst",
            "containers": [
                {
                    "ports": [{"name": "http", "containerPort": 8080, "protocol": "TCP"}],
                    "env": [{"name": "AWS_REGION", "value": "x"}],
                }
            ],
            "volumes": [{"projected": {"sources": [{"serviceAccountToken": {"audience": "x"}}]}}],
        },
        "status": {
            "phase": "Running",
            "hostIP": "192.0.2.1",
            "podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}],
        },
    },
    {
        "kind": "Service",
        "metadata": {"name": "a", "namespace": "kube-system"},
        "spec": {
            "selector": {"app": "a"},
            "clusterIP": "172.20.0.1",
            "ports": [{"port": 53, "targetPort": "http"}],
        },
    },
    {
        "kind": "NetworkPolicy",
        "metadata": {"name": "p", "namespace": "x", "annotations": {"podgate.dev/check-ignore": "no-dns"}},
        "spec": {
            "podSelector": {"matchLabels": {"app": "a"}},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [
                {
                    "from": [
                        {
                            "podSelector": {
                                "matchExpressions": [{"key": "app", "operator": "In", "values": ["a"]}]
                            }
                        },
                        {"namespaceSelector": {"matchLabels": {"team": "a"}}},
                    ],
                    "ports": [{"port": "http", "protocol": "TCP"}, {"port": 80, "endPort": 90}],
                },
                {},
            ],
            "egress": [
                {
                    "to": [{"ipBlock": {"cidr": "10.0.0.0/24", "except": ["10.0.0.4/30"]}}],
                    "ports": [{"port": 53}],
                },
                {"to": [{"podSelector": {}}]},
            ],
        },
    },
    {
        "kind": "PolicyEndpoint",
        "metadata": {"name": "q-1", "namespace": "x"},
        "spec": {
            "policyRef": {"name": "q", "namespace": "x"},
            "podIsolation": ["Egress"],
            "podSelectorEndpoints": [
                {"name": "a", "namespace": "x", "podIP": "10.0.0.1", "hostIP": "192.0.2.1"}
            ],
            "egress": [{"cidr": "10.0.0.1", "ports": [{"port": 53}]}],
        },
    },
]


def places(value: object, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every path into a value."""
    found = [path] if path else []
    entries = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, each in entries:
        found += places(each, (*path, key))
    return found


PLACES = places(OBJECTS)
VALUES = st.sampled_from(
    [
        None,
        True,
        0,
        53,
        8080,
        65536,
        -1,
        "",
        "a",
        "http",
        "x",
        "TCP",
        "UDP",
        "10.0.0.1/32",
        "::/0",
        "0.0.0.0/0",
        "10.0.0.1",
        [],
        [{}],
        {},
        {"matchLabels": {}},
        "Ingress",
        ["Egress"],
        "Succeeded",
    ]
)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(PLACES), VALUES, st.booleans()), min_size=1, max_size=4))
def test_any_mutation_is_checked(mutations: list[tuple[tuple[Any, ...], object, bool]]) -> None:
    objects: Any = copy.deepcopy(OBJECTS)
    for path, value, removed in mutations:
        parent = objects
        try:
            for step in path[:-1]:
                parent = parent[step]
            if removed:
                del parent[path[-1]]
            else:
                parent[path[-1]] = copy.deepcopy(value)
        except (LookupError, TypeError):
            continue  # an earlier mutation took the place away
    text = json.dumps({"kind": "List", "items": objects}).encode()
    contents = read_contents(text, "f", only_json=True)
    store = Store()
    store.replace("f", contents.objects, contents.problems)
    findings = check(store.snapshot())
    for finding in findings:
        assert finding.check in CHECKS
        assert finding.message
        assert finding.mend
    # A problem of the input never goes without a word.
    if contents.problems:
        assert findings
