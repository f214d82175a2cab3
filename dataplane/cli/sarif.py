"""Findings as SARIF 2.1.0, the format in which code scanning services take them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import quote

from dataplane.policy.check import CHECKS, Check, Finding
from dataplane.sources.directory import Place

_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"


def place_of(finding: Finding, places: Mapping[str, Place]) -> Place | None:
    """Where the object of a finding is written, as far as that is known."""
    place = places.get(finding.object)
    if finding.source and (place is None or place.source != finding.source):
        return Place(finding.source, None)
    return place


def sarif(findings: Iterable[Finding], places: Mapping[str, Place]) -> dict[str, Any]:
    """One run with every check as a rule. `places`: where objects are written, by identity."""
    index = {name: number for number, name in enumerate(CHECKS)}
    return {
        "$schema": _SCHEMA,
        "version": "2.1.0",
        "runs": [
            {
                "tool": {
                    "driver": {
                        "name": "podgate",
                        "version": version("podgate"),
                        "rules": [_rule(check) for check in CHECKS.values()],
                    }
                },
                "results": [_result(finding, index[finding.check], places) for finding in findings],
            }
        ],
    }


def _rule(check: Check) -> dict[str, Any]:
    return {
        "id": check.id,
        "shortDescription": {"text": check.title},
        "fullDescription": {"text": check.help},
        "help": {"text": check.help},
        "defaultConfiguration": {"level": str(check.severity)},
    }


def _result(finding: Finding, rule: int, places: Mapping[str, Place]) -> dict[str, Any]:
    where = ": ".join(part for part in (finding.object, finding.field) if part)
    logical = {
        "name": finding.field or finding.object,
        "fullyQualifiedName": " ".join(part for part in (finding.object, finding.field) if part),
        "kind": "member" if finding.field else "object",
    }
    location: dict[str, Any] = {"logicalLocations": [logical]} if finding.object else {}
    place = place_of(finding, places)
    if place is not None:
        location["physicalLocation"] = {"artifactLocation": {"uri": _uri(place.source)}}
        # A result must name a line to be shown beside the file; of an unknown one, the first.
        location["physicalLocation"]["region"] = {"startLine": place.line or 1}
    # The same finding keeps its identity when lines move, or when another pod is named in the message.
    identity = f"{finding.check}\0{finding.object}\0{finding.field}"
    return {
        "ruleId": finding.check,
        "ruleIndex": rule,
        "level": str(finding.severity),
        "message": {"text": f"{where}: {finding.message}. To mend it: {finding.mend}."},
        "locations": [location] if location else [],
        "partialFingerprints": {"finding/v1": hashlib.sha256(identity.encode()).hexdigest()},
    }


def _uri(path: str) -> str:
    """A relative path as a relative reference, which code scanning takes from the repository's root."""
    return Path(path).as_uri() if path.startswith("/") else quote(path.removeprefix("./"))
