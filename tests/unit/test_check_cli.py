"""`podgate check` as people and CI call it: exit status, text, JSON, SARIF, and what is written where."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from click.testing import CliRunner, Result

from dataplane.cli.check import command
from dataplane.policy.check import CHECKS

PODS = """\
apiVersion: v1
kind: Pod
metadata: {name: web-0, namespace: shop, labels: {app: web}}
spec: {containers: [{ports: [{name: http, containerPort: 8080}]}]}
status: {phase: Running, hostIP: 192.0.2.1, podIPs: [{ip: 10.1.0.10}]}
"""
BAD = """\
# the shop
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: fine, namespace: shop}
spec: {podSelector: {}, policyTypes: [Ingress]}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: web, namespace: shop}
spec:
  podSelector: {matchLabels: {app: web}}
  ingress:
    - ports: [{port: htp}, {port: 90, endPort: 80}]
"""


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    directory = tmp_path / "the shop"
    directory.mkdir()
    (directory / "pods.yaml").write_text(PODS)
    (directory / "policies.yaml").write_text(BAD)
    return directory


def run(*arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def test_text_is_grouped_by_object_and_counts(shop: Path) -> None:
    result = run(shop)
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        f"NetworkPolicy shop/web  ({shop}/policies.yaml:7)",
        "  error named-port-unknown: spec.ingress[0].ports[0].port",
        "    shop/web-0, the only selected pod, has no port named htp",
        "    mend: did you mean http?",
        "  error port-range: spec.ingress[0].ports[1].endPort",
        "    80 is less than port 90; this entry allows nothing",
        "    mend: write port and endPort as numbers, the smaller first",
        "",
        "2 errors in 2 policies and 1 pod; `podgate check --list` explains each check",
    ]


def test_nothing_found_is_exit_0(shop: Path) -> None:
    (shop / "policies.yaml").write_text(BAD.replace("htp", "http").replace("90", "8").replace("#", "# ok"))
    result = run(shop)
    assert (result.exit_code, result.stdout) == (0, "nothing found in 2 policies and 1 pod\n")


def test_ignored_checks_do_not_count(shop: Path) -> None:
    assert run(shop, "--ignore", "named-port-unknown,port-range").exit_code == 0
    assert run(shop, "--ignore", "named-port-unknown").exit_code == 1


def test_without_pods_it_says_what_is_left_out(shop: Path) -> None:
    (shop / "pods.yaml").unlink()
    result = run(shop)
    assert "no Pod here" in result.stderr
    assert "port-range" in result.stdout
    assert "named-port" not in result.stdout


def test_json(shop: Path) -> None:
    result = run(shop, "-o", "json")
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    assert document["counts"] == {"error": 2, "warning": 0, "note": 0}
    assert document["findings"][0] == {
        "id": "named-port-unknown",
        "severity": "error",
        "object": "NetworkPolicy shop/web",
        "field": "spec.ingress[0].ports[0].port",
        "message": "shop/web-0, the only selected pod, has no port named htp",
        "mend": "did you mean http?",
        "source": f"{shop}/policies.yaml",
        "line": 7,
    }
    assert run(shop, "-o", "json").stdout == result.stdout


def test_a_document_that_is_no_object_is_a_finding_with_its_file(shop: Path) -> None:
    (shop / "broken.yaml").write_text("kind: [\n")
    (finding,) = [
        each for each in json.loads(run(shop, "-o", "json").stdout)["findings"] if not each["object"]
    ]
    assert finding["id"] == "bad-input"
    assert finding["source"] == f"{shop}/broken.yaml"
    assert f"\n{shop}/broken.yaml\n  error bad-input\n" in "\n" + run(shop).stdout


def test_list_explains_every_check() -> None:
    result = run("--list")
    assert result.exit_code == 0
    for check in CHECKS.values():
        assert f"{check.id}  ({check.severity})  {check.title}" in result.stdout


# What SARIF 2.1.0 (OASIS, §3) says of the members that are printed. Members not named here are refused,
# so that none is added without looking.
def _map(required: str, **members: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": members,
        "required": required.split(),
        "additionalProperties": False,
    }


_TEXT = {"type": "string", "minLength": 1}
_LEVEL = {"enum": ["none", "note", "warning", "error"]}
_MESSAGE = _map("text", text=_TEXT)
_PHYSICAL = _map(
    "artifactLocation",
    artifactLocation=_map("uri", uri={"type": "string", "format": "uri-reference"}),
    region=_map("startLine", startLine={"type": "integer", "minimum": 1}),
)
_LOGICAL = _map("", name=_TEXT, fullyQualifiedName=_TEXT, kind=_TEXT)
_RESULT = _map(
    "message",
    ruleId=_TEXT,
    ruleIndex={"type": "integer", "minimum": -1},
    level=_LEVEL,
    message=_MESSAGE,
    locations={
        "type": "array",
        "items": _map("", physicalLocation=_PHYSICAL, logicalLocations={"type": "array", "items": _LOGICAL}),
    },
    partialFingerprints={"type": "object", "additionalProperties": _TEXT},
)
_RULE = _map(
    "id",
    id=_TEXT,
    shortDescription=_MESSAGE,
    fullDescription=_MESSAGE,
    help=_MESSAGE,
    defaultConfiguration=_map("", level=_LEVEL),
)
_DRIVER = _map(
    "name", name=_TEXT, version=_TEXT, rules={"type": "array", "items": _RULE, "uniqueItems": True}
)
_RUN = _map("tool", tool=_map("driver", driver=_DRIVER), results={"type": "array", "items": _RESULT})
SARIF = _map(
    "version runs",
    **{
        "$schema": {"type": "string"},
        "version": {"const": "2.1.0"},
        "runs": {"type": "array", "items": _RUN},
    },
)


def test_sarif(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shop.parent)
    (shop / "broken.yaml").write_text("kind: [\n")
    result = run("the shop", "-o", "sarif")
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    jsonschema.validate(document, SARIF, format_checker=jsonschema.FormatChecker())
    (made,) = document["runs"]
    rules = made["tool"]["driver"]["rules"]
    assert [rule["id"] for rule in rules] == list(CHECKS)
    for each in made["results"]:
        assert rules[each["ruleIndex"]]["id"] == each["ruleId"]
    places = [
        (each["ruleId"], *each["locations"][0]["physicalLocation"].values()) for each in made["results"]
    ]
    policies = {"uri": "the%20shop/policies.yaml"}
    assert places == [
        ("bad-input", {"uri": "the%20shop/broken.yaml"}, {"startLine": 1}),
        ("named-port-unknown", policies, {"startLine": 7}),
        ("port-range", policies, {"startLine": 7}),
    ]
    assert (
        made["results"][1]["locations"][0]["logicalLocations"][0]["name"] == "spec.ingress[0].ports[0].port"
    )


def test_sarif_without_findings_is_a_run_without_results(shop: Path) -> None:
    (shop / "policies.yaml").unlink()
    result = run(shop, "-o", "sarif")
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    jsonschema.validate(document, SARIF)
    assert document["runs"][0]["results"] == []


def test_a_fingerprint_outlives_moved_lines_and_other_pods(shop: Path) -> None:
    def prints() -> set[str]:
        results = json.loads(run(shop, "-o", "sarif").stdout)["runs"][0]["results"]
        return {each["partialFingerprints"]["finding/v1"] for each in results}

    before = prints()
    (shop / "policies.yaml").write_text("\n\n" + BAD)
    (shop / "pods.yaml").write_text(PODS.replace("web-0", "web-7"))
    assert prints() == before
    assert len(before) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nonexistent/x.yaml"], "/nonexistent/x.yaml: cannot be read"),
        (["--ignore", "no-dsn", "."], "--ignore no-dsn: there is no such check"),
        ([], "Missing argument 'PATH...'"),
    ],
)
def test_bad_usage_is_one_line_and_exit_2(arguments: list[str], message: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from dataplane.cli import main; main()", "check", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=os.path.dirname(__file__),
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert message in done.stderr
    assert done.stdout == ""
