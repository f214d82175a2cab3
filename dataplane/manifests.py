"""Kubernetes manifests as text, and the pieces of them that several writers share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from dataplane.model import LabelSelector, Operator


def selector_manifest(selector: LabelSelector) -> dict[str, Any]:
    """A LabelSelector as it is written: `matchLabels` where they can say it, else `matchExpressions`."""
    labels: dict[str, str] = {}
    expressions: list[dict[str, Any]] = []
    for key, operator, values in selector.requirements:
        if operator is Operator.IN and len(values) == 1 and key not in labels:
            labels[key] = values[0]
        else:
            given = {"values": list(values)} if values else {}
            expressions.append({"key": key, "operator": operator.value, **given})
    written: dict[str, Any] = {}
    if labels:
        written["matchLabels"] = labels
    if expressions:
        written["matchExpressions"] = expressions
    return written


def to_yaml(documents: Iterable[Mapping[str, Any]]) -> str:
    """YAML documents, each after a line `---`; texts that some reader takes for a number are quoted."""
    import yaml  # only commands that print it pay for it
    from yaml.cyaml import CSafeDumper  # four times as fast

    class Dumper(CSafeDumper):
        """Quotes what one reader or another of YAML takes for a number: `1e3`, `22:22`, `0777`."""

        def ignore_aliases(self, data: Any) -> bool:
            return True

    def text(dumper: CSafeDumper, value: str) -> yaml.ScalarNode:
        style = None if value[:1].isalpha() else '"'
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)

    Dumper.add_representer(str, text)
    return yaml.dump_all(documents, Dumper=Dumper, sort_keys=False, explicit_start=True)
