"""The matrix as one page for a browser: a heat map to search, and why each cell is what it is.

One file without a single request: script and style are inside, which the page's own content security
policy enforces (nothing else runs, nothing is fetched). All that comes from objects and file names is
compressed into one block of base64, which holds no markup whatever the names are, and the script puts it
into the document as text only.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import shlex
import sys
import unicodedata
import zlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from importlib.resources import files as resources
from itertools import chain
from string import Template
from typing import Any

from dataplane.addresses import format_address
from dataplane.model import Direction, Key, Snapshot
from dataplane.reachability import (
    ALLOWED,
    AUDITED,
    BOTH_DENIED,
    EGRESS_DENIED,
    INGRESS_DENIED,
    NOT_JUDGED,
    EndVerdict,
    Reachability,
)
from dataplane.reasons import Reason
from dataplane.report.explanations import Explanations, Texts, explanations

# As the page's script numbers what a cell can be. 4 is a place and itself.
_STATES = str.maketrans(
    {
        ALLOWED: "\0",
        AUDITED: "\0",
        EGRESS_DENIED: "\1",
        INGRESS_DENIED: "\2",
        BOTH_DENIED: "\3",
        NOT_JUDGED: "\5",
    }
)
_ITSELF = 4
# What a reader cannot see, or what would turn the text around it: control and format characters (bidi
# overrides among them), surrogates, line and paragraph separators.
_UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}

_EGRESS = {
    Reason.POLICY_RULE: "A rule of its policies lets it send there.",
    Reason.NO_RULE: "It is isolated for egress, and no rule of its policies lets it send there.",
    Reason.AUDIT: "No rule of its policies lets it send there. It may all the same: they are in audit.",
    Reason.NOT_ISOLATED: "No policy isolates it for egress, so it may send anything.",
}
_INGRESS = {
    Reason.POLICY_RULE: "A rule of its policies lets this in.",
    Reason.NO_RULE: "It is isolated for ingress, and no rule of its policies lets this in.",
    Reason.AUDIT: "No rule of its policies lets this in. It comes in all the same: they are in audit.",
    Reason.NOT_ISOLATED: "No policy isolates it for ingress, so it may receive anything.",
}
_EITHER = {
    Reason.NOT_A_POD: "No pod that policies are enforced for: outside the cluster, or on its node's network.",
    Reason.OWN_NODE: "Traffic between a pod and its own node is never blocked.",
    Reason.SAME_POD: "A pod may always talk to itself.",
}


def render(reach: Reachability, known: Snapshot, resolved: Snapshot, files: Sequence[str]) -> str:
    """The page of `reach`, as HTML text.

    `known`: the objects as they were read; `resolved`: the same with every PolicyEndpoint in force
    (`resolve.in_force`), what `reach` was made from. `files`: their names as the user gave them.
    """
    texts = Texts()
    policies = {policy: number for number, policy in enumerate(sorted(_policies(resolved)))}
    told = explanations(reach, known, resolved, policies, texts)
    arrays = _arrays(reach, told)
    head = {
        "version": version("podgate"),
        "files": [_seen(name) for name in files],
        "command": shlex.join(["podgate", "explain", *map(_path, files)]),
        "family": reach.family,
        "ports": list(reach.ports),
        "counts": [_counts(arrays[f"marks{number}"]) for number in range(len(reach.ports))],
        "policies": [_seen(str(policy)) for policy in policies],
        "leftOut": [_seen(str(pod)) for pod in reach.left_out],
        "verdicts": [_verdict(verdict, policies, texts) for verdict in reach.verdicts],
        "reasons": {
            side: {reason.text: text for reason, text in (_EITHER | own).items()}
            for side, own in (("egress", _EGRESS), ("ingress", _INGRESS))
        },
        **_places(reach, policies),
        "answers": told.answers,
        "candidates": told.candidates,
        "texts": [_seen(text) for text in texts.all],
    }
    return _html(f"podgate matrix: {', '.join(files)}", _packed(head, arrays))


def _policies(resolved: Snapshot) -> set[Key]:
    return {policy.key for policy in resolved.network_policies} | {
        endpoint.policy for endpoint in resolved.policy_endpoints
    }


def _seen(text: str) -> str:
    """`text` with what cannot be seen written out, as in `web\\u202e`."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        f"\\u{ord(letter):04x}" if unicodedata.category(letter) in _UNSEEN else letter for letter in text
    )


def _path(name: str) -> str:
    """As an argument that no command takes for an option."""
    return _seen(f"./{name}" if name.startswith("-") and name != "-" else name)


# --- contents ----------------------------------------------------------------------------------------


def _places(reach: Reachability, policies: Mapping[Key, int]) -> dict[str, Any]:
    namespaces = {name: number for number, (name, _) in enumerate(reach.namespaces()) if name is not None}
    labels: dict[tuple[tuple[str, str], ...], int] = {(): 0}
    sets: dict[tuple[Key, ...], int] = {(): 0}
    places = []
    for place in reach.places:
        own = tuple(sorted(place.labels.items()))
        egress, ingress = (place.isolated_by.get(each, ()) for each in (Direction.EGRESS, Direction.INGRESS))
        places.append(
            {
                "n": _seen(place.pod.name if place.pod else place.name),
                "s": namespaces[place.pod.namespace] if place.pod else -1,
                "a": format_address(place.address),
                "l": labels.setdefault(own, len(labels)),
                "e": sets.setdefault(egress, len(sets)),
                "i": sets.setdefault(ingress, len(sets)),
                "h": int(place.host_network),
            }
        )
    return {
        "places": places,
        "namespaces": [_seen(name) for name in namespaces],
        "labels": [[[_seen(key), _seen(value)] for key, value in pairs] for pairs in labels],
        "sets": [[policies[key] for key in keys] for keys in sets],
    }


def _verdict(verdict: EndVerdict, policies: Mapping[Key, int], texts: Texts) -> tuple[int, str, int, int]:
    """Whether it allows, its reason, and by whom: a policy and the text of its rule, or -1."""
    if verdict.policy is None or verdict.rule is None:
        return int(verdict.allow), verdict.reason.text, -1, -1
    rule = verdict.rule
    excepts = f" except {', '.join(map(str, rule.excepts))}" if rule.excepts else ""
    ports = ", ".join(map(str, rule.ports)) or "every port"
    opens = texts.number(f"{rule.cidr}{excepts}, {ports}")
    return int(verdict.allow), verdict.reason.text, policies[verdict.policy], opens


def _arrays(reach: Reachability, told: Explanations) -> dict[str, array[int]]:
    """Every table with an entry per cell, by the names that the script knows."""
    arrays: dict[str, array[int]] = {}
    size = len(reach.places)
    for number, port in enumerate(reach.ports):
        cells = array("B", "".join(reach.marks[port]).translate(_STATES).encode("latin-1"))
        cells[:: size + 1] = array("B", bytes([_ITSELF] * size))
        arrays[f"marks{number}"] = cells
        for side, lines in (("egress", reach.egress[port]), ("ingress", reach.ingress[port])):
            arrays[f"{side}Of{number}"] = array("I", lines.of)
            arrays[f"{side}Lines{number}"] = _joined(lines.lines)
            answers = told.sides[Direction(side)]
            arrays[f"{side}WhyOf{number}"] = array("I", answers.of)
            arrays[f"{side}WhyLines{number}"] = _joined(answers.lines[port])
    return arrays


def _joined(lines: Iterable[Sequence[int]]) -> array[int]:
    return array("I", chain.from_iterable(lines))


def _counts(cells: array[int]) -> tuple[int, int]:
    """Pairs of different places that are allowed, and that are denied."""
    marks = cells.tobytes()
    return marks.count(0), marks.count(1) + marks.count(2) + marks.count(3)


# --- one file ----------------------------------------------------------------------------------------


def _packed(head: Mapping[str, Any], arrays: Mapping[str, array[int]]) -> str:
    """Length and text of the JSON head, then the arrays at multiples of four, deflated, in base64."""
    tables = {name: _narrow(values) for name, values in arrays.items()}
    types = {"B": "u8", "H": "u16", "I": "u32"}
    described = [[name, types[values.typecode], len(values)] for name, values in tables.items()]
    text = json.dumps({**head, "arrays": described}, separators=(",", ":"), ensure_ascii=False).encode()
    squeeze = zlib.compressobj(6)
    parts = [squeeze.compress(len(text).to_bytes(4, "little") + text)]
    at = 4 + len(text)
    for values in tables.values():
        if sys.byteorder == "big":
            values.byteswap()
        data = bytes(-at % 4) + values.tobytes()
        parts.append(squeeze.compress(data))
        at += len(data)
    parts.append(squeeze.flush())
    return base64.b64encode(b"".join(parts)).decode("ascii")


def _narrow(values: array[int]) -> array[int]:
    """The same numbers in as few bytes each as the largest needs."""
    top = max(values, default=0)
    wanted = "B" if top < 1 << 8 else "H" if top < 1 << 16 else "I"
    return values if values.typecode == wanted else array(wanted, values)


def _html(title: str, data: str) -> str:
    assets = resources("dataplane.report") / "assets"
    script, style = ((assets / name).read_text("utf-8") for name in ("page.js", "page.css"))
    policy = "; ".join(
        [
            "default-src 'none'",
            f"script-src {_hash(script)}",
            f"style-src {_hash(style)}",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    return Template((assets / "page.html").read_text("utf-8")).substitute(
        policy=html.escape(policy), title=html.escape(_seen(title)), style=style, data=data, script=script
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
