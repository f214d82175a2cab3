"""The Grafana dashboard shows metrics that the agent has, by labels that they carry."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from dataplane.observe.metrics import FAMILIES, Metrics

DASHBOARD = json.loads((Path(__file__).resolve().parents[2] / "deploy/grafana/podgate.json").read_text())
# Of the scrape, not of the metric.
SCRAPED = {"instance", "job"}
BUILT = {"version", "python", "kernel", "backend", "mode"}
PANELS: list[dict[str, Any]] = [one for one in DASHBOARD["panels"] if one["type"] != "row"]
NAME = re.compile(r"\b(?:podgate|process)_\w+")


def samples() -> set[str]:
    """Every name that a scrape may have."""
    readings = {family.name: [(("",) * len(family.labels), 1.0)] for family in FAMILIES}
    text = Metrics({"backend": "native", "mode": "standard"}).text(readings).decode()
    return {sample.name for one in text_string_to_metric_families(text) for sample in one.samples}


def labels_of(name: str) -> set[str]:
    found = {family.name: set(family.labels) for family in FAMILIES}
    plain = name.removesuffix("_total")
    if name == "podgate_build_info":
        return BUILT | SCRAPED
    return found.get(plain, {"le"} if name.endswith("_bucket") else set()) | SCRAPED


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_a_panel_shows_what_there_is(panel: dict[str, Any]) -> None:
    assert panel["targets"]
    for target in panel["targets"]:
        expression, legend = target["expr"], target["legendFormat"]
        names = set(NAME.findall(expression))
        assert names <= samples()
        known = set.union(*map(labels_of, names))
        grouped = {
            label.strip()
            for group in re.findall(r"(?:by|on) \(([^)]*)\)", expression)
            for label in group.split(",")
        }
        assert grouped | set(re.findall(r"{{(\w+)}}", legend)) <= known
        # What a legend names must survive the aggregation.
        if grouped and "{{" in legend:
            assert set(re.findall(r"{{(\w+)}}", legend)) <= grouped


def test_every_metric_is_shown() -> None:
    shown = {name for panel in PANELS for one in panel["targets"] for name in NAME.findall(one["expr"])}
    missing = {family.name for family in FAMILIES} - {name.removesuffix("_total") for name in shown}
    assert not missing


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
