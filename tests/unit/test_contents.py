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
    many = read(*({"kind": f"Kind{n}"} for n in range(100, 200)), {"kind": "K" * 100_000})
    assert sum(many.skipped.values()) == 101
    line = summary(many.skipped)
    assert "1 Kind100, 1 Kind101, " in line
    assert line.endswith("and 81 more kinds")
    assert len(line) < 500
    assert len(max(many.skipped, key=len)) < 100


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


POLICY = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: p, namespace: x}\n"
SELECTOR = "NetworkPolicy x/p: spec.podSelector.matchLabels"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            POLICY.encode("utf-16"),
            "not UTF-8 text: byte 0 is 0xff; save it as UTF-8; this document is not used",
        ),
        (b"kind: caf\xe9", "not UTF-8 text: byte 9 is 0xe9; save it as UTF-8; this document is not used"),
        (
            POLICY + "spec:\n\tpodSelector: {}\n",
            "line 5: not YAML: found character that cannot start any token",
        ),
        (POLICY + "\0", "not YAML: unacceptable character #x0000"),
        (
            POLICY + 'spec: {podSelector: {matchLabels: {a: "\\0"}}}',
            rf"{SELECTOR}[a]: '\x00' is not a label's value",
        ),
        (
            POLICY + "spec: {podSelector: {matchLabels: {a: true}}}",
            f"{SELECTOR}[a]: true is not a label's value; write",
        ),
        (POLICY + f"spec: {{podSelector: {{matchLabels: {{a: {'b' * 64}}}}}}}", f"{SELECTOR}[a]: 'bbbbbbbb"),
        (
            POLICY + f"spec: {{podSelector: {{matchLabels: {{a: {'b' * 10**6}}}}}}}",
            f"{SELECTOR}[a]: 'bbbbbbbb",
        ),
        (POLICY + f"spec: {{podSelector: {{matchLabels: {{{'b' * 1000}: a}}}}}}", f"{SELECTOR}['bbbbbbbb"),
        (POLICY + "spec: {podSelector: {matchLabels: {[a]: b}}}", "line 4: a map's key must be text"),
        (
            POLICY + "spec: {podSelector: {}, podSelector: {}}",
            "NetworkPolicy x/p: spec: must be a map, not a map with",
        ),
        (
            POLICY + "kind: Pod\n",
            "must be an object with kind and metadata, not a map with the key 'kind' twice",
        ),
        (
            POLICY + "spec: !!python/object:os.system {}",
            "line 4: unknown tag 'tag:yaml.org,2002:python/object:os.system'",
        ),
        (POLICY.replace("name: p", "name: true"), "metadata.name: true is not a Kubernetes name"),
        (
            POLICY.replace("name: p", 'name: "a\\e[31m"'),
            "metadata.name: 'a\\x1b[31m' is not a Kubernetes name",
        ),
        (POLICY.replace("NetworkPolicy", "networkpolicy"), "kind must be NetworkPolicy, not 'networkpolicy'"),
        (
            POLICY.replace("NetworkPolicy", "'NetworkPolicy '"),
            "kind must be NetworkPolicy, not 'NetworkPolicy '",
        ),
        ("kind: list\nitems: []\n", "kind must be List, not 'list'"),
        (
            "kind: List\nitems: [[{kind: Pod}]]\n",
            "items[0]: must be an object with kind and metadata, not a list",
        ),
        ('{"kind": "List", "items": [' * 10_000, "line 1: nested deeper than 64 levels"),
        ("<html>\n<body>Forbidden</body>\n", "must be an object with kind and metadata, not '<html> <body>"),
    ],
)
def test_what_cannot_be_read_is_one_short_line_and_keeps_what_was_there(text: str | bytes, line: str) -> None:
    data = text if isinstance(text, bytes) else text.encode()
    found = read_contents(data, "f.yaml")
    assert found.objects == []
    (problem,) = found.problems
    told = str(problem)
    assert told.removeprefix("f.yaml: ").startswith(line)
    assert told.isprintable()
    assert len(told) < 300
    store = Store()
    good = read_contents((POLICY + "spec: {podSelector: {}}\n").encode(), "f.yaml")
    store.replace("f.yaml", good.objects, good.problems)
    store.replace("f.yaml", found.objects, found.problems)
    assert store.snapshot().network_policies == tuple(good.objects)
    assert str(store.snapshot().problems[0]).endswith("in force")


@pytest.mark.parametrize(
    "text",
    [
        "\ufeff" + POLICY,
        POLICY.replace("\n", "\r\n"),
        "base: &b {podSelector: {}}\n" + POLICY + "spec: {<<: *b, policyTypes: [Ingress]}\n",
        POLICY.replace("name: p", "name: 2026-01-31"),
    ],
    ids=["bom", "crlf", "merge", "date"],
)
def test_odd_but_readable(text: str) -> None:
    found = read_contents(text.encode(), "f.yaml")
    assert len(found.objects) == 1
    assert found.problems == []


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
