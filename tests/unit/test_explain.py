"""`podgate explain` on files: its JSON, its text, and what it says when a name is not what it looks like."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from test_why import ns, pod, policy

from dataplane.cli.explain import command
from dataplane.errors import InputError

Raw = dict[str, Any]
END_KEYS = {"verdict", "reason", "policy", "rule"}  # of the contract

OBJECTS: list[Raw] = [
    ns("shop"),
    ns("ops", team="blue"),
    pod("shop/web-1", "10.0.1.5", "fd00::5", labels={"app": "web"}, ports={"http": (8080, "TCP")}),
    pod("shop/db-0", "10.0.2.7", labels={"app": "db"}, ports={"pg": (5432, "TCP")}),
    pod("ops/prober", "10.0.3.9", labels={"app": "prober"}),
    pod("ops/exporter", "192.0.2.9", labels={"app": "exporter"}, host=True),
    pod("shop/migrate", "10.0.1.77", labels={"app": "migrate"}, phase="Succeeded"),
    pod("shop/pending", labels={"app": "web"}, phase="Pending"),
    {
        "kind": "Service",
        "apiVersion": "v1",
        "metadata": {"name": "web", "namespace": "shop"},
        "spec": {
            "selector": {"app": "web"},
            "clusterIP": "172.20.0.10",
            "ports": [{"port": 80, "targetPort": "http"}, {"port": 81, "targetPort": 9000}, {"port": 8080}],
        },
    },
    {
        "kind": "Service",
        "apiVersion": "v1",
        "metadata": {"name": "empty", "namespace": "shop"},
        "spec": {"selector": {"app": "nobody"}, "clusterIP": "172.20.0.11", "ports": [{"port": 80}]},
    },
    policy("shop/deny", podSelector={}, policyTypes=["Ingress", "Egress"]),
    policy(
        "shop/db",
        ingress=[
            {"from": [{"podSelector": {"matchLabels": {"app": "web"}}}], "ports": [{"port": 5433}]},
            {"from": [{"namespaceSelector": {"matchLabels": {"team": "blue"}}}], "ports": [{"port": "pg"}]},
        ],
    ),
]


def explain(tmp_path: Path, source: str, destination: str, port: str, *more: str) -> Result:
    path = tmp_path / "dump.json"
    path.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": OBJECTS}))
    argv = [str(path), "--from", source, "--to", destination, "--port", port, *more]
    return CliRunner().invoke(command, argv)


def as_json(tmp_path: Path, *asked: str) -> Any:
    done = explain(tmp_path, *asked, "-o", "json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def fails(tmp_path: Path, *asked: str) -> str:
    done = explain(tmp_path, *asked)
    assert isinstance(done.exception, InputError)
    assert done.stdout == ""
    return str(done.exception)


def test_both_ends_of_a_denied_packet(tmp_path: Path) -> None:
    answer = as_json(tmp_path, "shop/web-1", "shop/db-0", "5432/TCP")
    assert answer["verdict"] == "deny"
    egress, ingress = answer["egress"], answer["ingress"]
    assert {key: egress[key] for key in END_KEYS} == {
        "verdict": "deny", "reason": "no-rule", "policy": None, "rule": None,
    }  # fmt: skip
    assert egress["policies"] == ["shop/deny"]
    assert egress["candidates"] == [
        {
            "policy": "shop/deny",
            "field": "egress",
            "reason": "no-rules",
            "sentence": "the policy has no egress rules: nothing is allowed",
        }
    ]
    assert ingress["policies"] == ["shop/db", "shop/deny"]
    assert [(each["policy"], each["field"], each["sentence"]) for each in ingress["candidates"]] == [
        ("shop/db", "ingress[0].from[0]", "wrong port: allows 5433/TCP, packet is 5432/TCP"),
        ("shop/db", "ingress[1].from[0]", "namespace shop has no label team (asked for: team=blue)"),
        ("shop/deny", "ingress", "the policy has no ingress rules: nothing is allowed"),
    ]
    assert ingress["more"] == egress["more"] == answer["notes"] == []
    assert [each["direction"] for each in answer["suggestions"]] == ["egress", "ingress"]
    for each in answer["suggestions"]:
        assert yaml.safe_load(each["yaml"]) == each["manifest"]
        assert each["comments"] == []


def test_an_allowed_end_names_the_written_rule(tmp_path: Path) -> None:
    answer = as_json(tmp_path, "ops/prober", "shop/db-0", "5432/TCP")
    assert answer["verdict"] == "allow"
    assert answer["egress"] == {
        "verdict": "allow", "reason": "not-isolated", "policy": None, "rule": None, "policies": [],
    }  # fmt: skip
    assert answer["ingress"]["policy"] == "shop/db"
    assert answer["ingress"]["field"] == "ingress[1].from[0]"
    assert answer["suggestions"] == []


def test_what_is_suggested_is_enough(tmp_path: Path) -> None:
    made = as_json(tmp_path, "shop/web-1", "shop/db-0", "5432/TCP")["suggestions"]
    (tmp_path / "fix.yaml").write_text("".join(each["yaml"] for each in made))
    answer = as_json(tmp_path, "shop/web-1", "shop/db-0", "5432/TCP", str(tmp_path / "fix.yaml"))
    assert (answer["egress"]["policy"], answer["ingress"]["policy"]) == (
        "shop/allow-web-to-db-5432-tcp",
        "shop/allow-db-from-web-5432-tcp",
    )
    assert answer["verdict"] == "allow"


def test_text(tmp_path: Path) -> None:
    assert explain(tmp_path, "ops/prober", "shop/db-0", "80/TCP").stdout == (
        "DENY  ops/prober (10.0.3.9) → shop/db-0 (10.0.2.7)  80/TCP\n"
        "  egress of ops/prober: allow, not-isolated\n"
        "    no policy isolates the pod in this direction\n"
        "  ingress of shop/db-0: deny, no-rule\n"
        "    the pod is isolated in this direction and no rule of its policies matches\n"
        "    isolated by shop/db, shop/deny\n"
        "      shop/db ingress[1].from[0]: wrong port: allows pg (5432/TCP), packet is 80/TCP\n"
        "      shop/db ingress[0].from[0]: ops/prober is in namespace ops; without namespaceSelector only"
        " namespace shop is meant; the port does not match either\n"
        "      shop/deny ingress: the policy has no ingress rules: nothing is allowed\n"
        "\n"
        "The smallest policy that would allow it:\n"
        "---\n"
        "apiVersion: networking.k8s.io/v1\n"
        "kind: NetworkPolicy\n"
        "metadata:\n"
        "  name: allow-db-from-ops-prober-80-tcp\n"
        "  namespace: shop\n"
        "spec:\n"
        "  podSelector:\n"
        "    matchLabels:\n"
        "      app: db\n"
        "  policyTypes:\n"
        "  - Ingress\n"
        "  ingress:\n"
        "  - from:\n"
        "    - namespaceSelector:\n"
        "        matchLabels:\n"
        "          kubernetes.io/metadata.name: ops\n"
        "      podSelector:\n"
        "        matchLabels:\n"
        "          app: prober\n"
        "    ports:\n"
        "    - protocol: TCP\n"
        "      port: 80\n"
    )
    allowed = explain(tmp_path, "ops/prober", "shop/db-0", "5432").stdout
    assert allowed.splitlines()[-3:] == [
        "    policy shop/db, rule 1: 10.0.3.9/32, 5432/TCP",
        "    written as shop/db ingress[1].from[0]",
        "    isolated by shop/db, shop/deny",
    ]


def test_long_answers_are_cut_unless_asked_for(tmp_path: Path) -> None:
    blocks = [{"ipBlock": {"cidr": f"172.16.{n}.0/24"}} for n in range(200)]
    (tmp_path / "long.json").write_text(json.dumps(policy("shop/long", ingress=[{"from": blocks}])))
    many = [policy(f"shop/p{n}", podSelector={}) for n in range(9)]
    (tmp_path / "many.json").write_text(json.dumps({"kind": "List", "apiVersion": "v1", "items": many}))
    asked = ("shop/web-1", "shop/db-0", "5432", str(tmp_path / "long.json"), str(tmp_path / "many.json"))
    short = explain(tmp_path, *asked).stdout.splitlines()
    eight = "shop/db, shop/deny, shop/long, shop/p0, shop/p1, shop/p2, shop/p3, shop/p4"
    assert f"    isolated by {eight} and 4 more" in short
    counted = short.index("      and 192 more: address outside the cidr")
    assert short[counted + 1 : counted + 3] == ["      and 10 more: no rules", "      (--all shows them)"]
    every = explain(tmp_path, *asked, "--all").stdout.splitlines()
    assert sum("is outside 172.16." in line for line in every) == 200
    assert not any("more" in line for line in every)
    answer = as_json(tmp_path, *asked)
    assert len(answer["ingress"]["candidates"]) == 10
    assert answer["ingress"]["more"][0] == {
        "reason": "cidr", "count": 192, "sentence": "and 192 more: address outside the cidr",
    }  # fmt: skip


def test_a_service_is_not_an_end(tmp_path: Path) -> None:
    assert fails(tmp_path, "ops/prober", "shop/web", "80") == (
        "--to shop/web: a Service; packets are judged when they have been sent on to a pod;"
        " ask for one of its pods: shop/web-1"
    )
    assert fails(tmp_path, "ops/prober", "shop/empty", "80").endswith("and no pod here is behind it")
    (note,) = as_json(tmp_path, "ops/prober", "172.20.0.10", "80")["notes"]
    assert note == (
        "172.20.0.10 is the ClusterIP of Service shop/web; packets are judged when they have been sent on"
        " to a pod: ask for one of shop/web-1"
    )
    (note,) = as_json(tmp_path, "ops/prober", "172.20.0.11", "80")["notes"]
    assert note.endswith("none is behind it here")


@pytest.mark.parametrize(
    ("port", "leads_to"),
    [("80", "8080/TCP"), ("81", "9000/TCP"), ("8080", None), ("82", None), ("80/UDP", None)],
)
def test_a_port_of_the_service(tmp_path: Path, port: str, leads_to: str | None) -> None:
    answer = as_json(tmp_path, "ops/prober", "shop/web-1", port)
    notes = [] if leads_to is None else [
        f"{port}/TCP is a port of Service shop/web, which leads to {leads_to} of shop/web-1:"
        f" ask for --port {leads_to}"
    ]  # fmt: skip
    assert answer["notes"] == notes
    # Whoever applies what is suggested must not miss it.
    assert [each["comments"] for each in answer["suggestions"]] == [notes]


def test_pods_that_policies_do_not_see(tmp_path: Path) -> None:
    answer = as_json(tmp_path, "ops/exporter", "shop/db-0", "80")
    assert answer["from"] == {"pod": None, "ip": "192.0.2.9"}
    assert answer["notes"] == [
        "ops/exporter is on its node's network: no policy isolates it; others see 192.0.2.9"
    ]
    assert answer["egress"]["policies"] == []
    assert fails(tmp_path, "shop/migrate", "shop/db-0", "80") == (
        "--from shop/migrate: a finished pod (Succeeded or Failed): it owns no address any more"
    )
    assert fails(tmp_path, "ops/prober", "shop/pending", "80") == (
        "--to shop/pending: this pod has no address yet, or a newer pod has it now"
    )
    assert fails(tmp_path, "ops/prober", "shop/bd-0", "80") == (
        "--to shop/bd-0: no pod of that name with an address is known here;"
        " did you mean one of shop/db-0, shop/web-1?"
    )
    assert fails(tmp_path, "nowhere/nobody", "shop/db-0", "80").endswith("; an IP address works too")
    assert fails(tmp_path, "shop-web", "shop/db-0", "80").endswith("as namespace/pod or as an IP address")


def test_objects_without_pods(tmp_path: Path) -> None:
    path = tmp_path / "policies.json"
    path.write_text(json.dumps(policy("shop/deny", podSelector={})))
    argv = [str(path), "--from", "shop/web-1", "--to", "shop/db-0", "--port", "80"]
    error = CliRunner().invoke(command, argv).exception
    assert isinstance(error, InputError)
    assert "give Pod objects too, for example from `kubectl get netpol,pods,ns,svc -A -o yaml`" in str(error)


def test_icmp_and_both_families(tmp_path: Path) -> None:
    answer = as_json(tmp_path, "2001:db8::9", "shop/web-1", "ICMP", "--family", "6")
    (made,) = answer["suggestions"]
    assert made["manifest"]["spec"]["ingress"] == [{"from": [{"ipBlock": {"cidr": "2001:db8::9/128"}}]}]
    assert "ICMP" in made["comments"][0]
    assert answer["ingress"]["candidates"][0]["reason"] == "no-rules"


def test_no_suggestion_without_labels(tmp_path: Path) -> None:
    endpoint = {
        "kind": "PolicyEndpoint",
        "apiVersion": "networking.k8s.aws/v1alpha1",
        "metadata": {"name": "p-abc", "namespace": "far"},
        "spec": {
            "policyRef": {"name": "p", "namespace": "far"},
            "podIsolation": ["Ingress"],
            "podSelectorEndpoints": [
                {"hostIP": "192.0.2.1", "podIP": "10.9.0.1", "name": "a", "namespace": "far"}
            ],
        },
    }
    (tmp_path / "far.json").write_text(json.dumps(endpoint))
    done = explain(tmp_path, "ops/prober", "far/a", "80", str(tmp_path / "far.json"))
    assert done.stdout.endswith(
        "No policy can be suggested:\n---\n"
        "# the labels of far/a are not known here, so no policy can name it: give Pod objects too\n"
    )
