"""Documents sorted into objects, problems and kinds that mean nothing here."""

from __future__ import annotations

import json
from textwrap import dedent
from typing import Any

import pytest

from dataplane.sources import contents
from dataplane.sources.contents import Contents, read_contents, summary
from dataplane.sources.networkpolicy import network_policy
from dataplane.sources.store import Store, identity


def endpoint(name: str = "p-1", **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "networking.k8s.aws/v1alpha1",
        "kind": "PolicyEndpoint",
        "metadata": {"name": name, "namespace": "x"},
        "spec": {"policyRef": {"name": "p", "namespace": "x"}, "podIsolation": ["Ingress"], **spec},
    }


def pod(name: str = "a") -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "x"}}


def read(*values: object) -> Contents:
    return read_contents("\n---\n".join(json.dumps(value) for value in values).encode(), "f.yaml")


def names(found: Contents) -> list[str]:
    return [identity(item) for item in found.objects]


def places(found: Contents) -> list[tuple[str, str]]:
    return [(problem.object, problem.field) for problem in found.problems]


def test_documents_lists_and_lists_in_lists() -> None:
    inner = {"apiVersion": "v1", "kind": "List", "items": [pod("c"), {"kind": "List", "items": [pod("d")]}]}
    found = read(pod("a"), {"kind": "List", "items": [endpoint(), pod("b"), inner]}, pod("e"))
    assert names(found) == [
        "Pod x/a",
        "PolicyEndpoint x/p-1",
        "Pod x/b",
        "Pod x/c",
        "Pod x/d",
        "Pod x/e",
    ]
    assert found.problems == []


def test_items_of_a_typed_list_may_leave_out_their_kind() -> None:
    bare = endpoint()
    del bare["kind"], bare["apiVersion"]
    found = read({"apiVersion": "networking.k8s.aws/v1alpha1", "kind": "PolicyEndpointList", "items": [bare]})
    assert names(found) == ["PolicyEndpoint x/p-1"]
    assert read({"kind": "PodList", "items": None}).problems == []


def test_other_kinds_are_counted() -> None:
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"}}
    found = read(secret, {"kind": "List", "items": [secret, {"kind": "Deployment"}]}, pod())
    assert found.skipped == {"Secret": 2, "Deployment": 1}
    assert found.problems == []
    assert summary(found.skipped) == "skipped what has no meaning here: 1 Deployment, 2 Secret"
    assert summary({}) == ""


@pytest.mark.parametrize(
    ("value", "field"),
    [
        ("text", "document 1"),
        ([pod()], "document 1"),
        ({}, "document 1"),
        ({"kind": 7}, "document 1"),
        ({"kind": ""}, "document 1"),
        ({"kind": "List", "items": {}}, "document 1"),
        ({"kind": "List", "items": [None]}, "document 1, items[0]"),
        ({"kind": "List", "items": [{"metadata": {}}]}, "document 1, items[0]"),
        ({"kind": "List", "items": [{"kind": "Pod", "metadata": {}}]}, "document 1, items[0], metadata.name"),
        ({"kind": "Pod"}, "document 1, metadata"),
        ({"kind": "PolicyEndpoint", "apiVersion": "v2"}, "document 1, apiVersion"),
    ],
)
def test_what_cannot_be_identified_is_named_by_its_place(value: object, field: str) -> None:
    found = read(value, pod())
    assert names(found) == ["Pod x/a"]
    assert places(found) == [("", field)]


def test_wrong_version_names_the_object() -> None:
    found = read(endpoint() | {"apiVersion": "networking.k8s.aws/v1"})
    assert found.objects == []
    assert places(found) == [("PolicyEndpoint x/p-1", "apiVersion")]
    assert found.problems[0].reason == (
        "must be networking.k8s.aws/v1alpha1 for a PolicyEndpoint, not 'networking.k8s.aws/v1'"
    )


def test_one_bad_object_spares_the_others() -> None:
    found = read({"kind": "List", "items": [endpoint("bad", policyRef=None), endpoint("good"), pod()]})
    assert names(found) == ["PolicyEndpoint x/good", "Pod x/a"]
    assert places(found) == [("PolicyEndpoint x/bad", "spec.policyRef")]


def test_a_key_twice_in_a_rule_drops_the_rule() -> None:
    found = read_contents(
        dedent("""\
            apiVersion: networking.k8s.aws/v1alpha1
            kind: PolicyEndpoint
            metadata: {name: p-1, namespace: x}
            spec:
              policyRef: {name: p, namespace: x}
              podIsolation: [Ingress]
              ingress:
              - {cidr: 10.0.0.0/8, except: [10.1.0.0/16], except: []}
              - cidr: 10.2.0.0/16
            """).encode(),
        "f.yaml",
    )
    (item,) = found.objects
    assert [rule.index for rule in item.ingress] == [1]  # type: ignore[union-attr]
    assert [str(problem) for problem in found.problems] == [
        "f.yaml: PolicyEndpoint x/p-1: spec.ingress[0]: "
        "must be a map, not a map with the key 'except' twice; this rule allows nothing"
    ]


def test_broken_text_is_one_problem() -> None:
    found = read_contents(b"a: [\n", "f.yaml")
    assert places(found) == [("", "")]
    assert str(found.problems[0]).startswith("f.yaml: line 2: not YAML: ")


def test_problems_of_a_file_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "MAX_PROBLEMS", 10)
    # Of what can be used: the line names one of these, so that nothing is kept that went from the file.
    odd = pod() | {"spec": {"nodeName": 7}}
    found = read({"kind": "List", "items": [odd | {"metadata": {"name": f"p{n}"}} for n in range(30)]})
    assert len(found.objects) == 30
    assert len(found.problems) == 11
    assert str(found.problems[-1]) == "f.yaml: Pod default/p29: and 20 more problems in this file"
    # Of what cannot be used, the name of some is not told: whatever was read before stays.
    unusable = [endpoint(f"p{n}", policyRef=None) for n in range(29)]
    found = read({"kind": "List", "items": [*unusable, odd, pod("b")]})
    assert [problem.object for problem in found.problems[-2:]] == ["PolicyEndpoint x/p9", ""]
    assert found.problems[-1].reason == "and 20 more problems in this file"
    store = Store()
    before = [network_policy({"metadata": {"name": "old", "namespace": "x"}}, "f")[0]]
    store.replace("f", [item for item in before if item is not None], [])
    store.replace("f", found.objects, found.problems)
    assert [str(policy.key) for policy in store.snapshot().network_policies] == ["x/old"]


def test_lists_as_deep_as_json_allows() -> None:
    text = '{"kind":"List","items":[' * 400 + json.dumps(pod()) + "]}" * 400
    assert names(read_contents(text.encode(), "f.json", only_json=True)) == ["Pod x/a"]
