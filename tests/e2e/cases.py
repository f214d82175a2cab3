"""The policies of the end-to-end test, and which connections each of them leaves, written down by hand.

Pods x/a, x/b, y/a and y/b listen on 8080/TCP, 8081/TCP and 8080/UDP. A table has a line for each pod
that asks and a column for each pod that is asked, in the order xa xb ya yb; a cell says what is open:

    *  everything      .  nothing      8  8080/TCP alone      u  8080/UDP alone

A pod always reaches itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PODS = ("x/a", "x/b", "y/a", "y/b")
PORTS = ("8080/TCP", "8081/TCP", "8080/UDP")
_OPEN = {"*": frozenset(PORTS), ".": frozenset[str](), "8": {"8080/TCP"}, "u": {"8080/UDP"}}

Raw = dict[str, Any]
Cell = tuple[str, str, str]  # from, to, port


@dataclass(frozen=True)
class Names:
    """What the cluster calls things: namespaces by x and y, addresses by pod."""

    namespaces: Mapping[str, str]
    addresses: Mapping[str, Sequence[str]]

    def blocks(self, pod: str) -> list[str]:
        return [f"{ip}/{128 if ':' in ip else 32}" for ip in self.addresses[pod]]


@dataclass(frozen=True)
class Case:
    """Policies, by name, that are in force at a time, and what they leave open."""

    name: str
    policies: Callable[[Names], list[Raw]]
    table: str

    def expected(self) -> dict[Cell, bool]:
        return parse_table(self.table)


def parse_table(text: str) -> dict[Cell, bool]:
    """Whether each connection is open, by from, to and port. ValueError for anything but a table."""
    lines = [line.split() for line in text.strip().splitlines()]
    if [line[:1] for line in lines] != [[pod.replace("/", "")] for pod in PODS]:
        raise ValueError(f"a line for each of {PODS} in this order, not {lines}")
    found: dict[Cell, bool] = {}
    for source, (_, *cells) in zip(PODS, lines, strict=True):
        for destination, cell in zip(PODS, cells, strict=True):
            if cell not in _OPEN:
                raise ValueError(f"{cell!r} is not one of {''.join(_OPEN)}")
            for port in PORTS:
                found[source, destination, port] = source == destination or port in _OPEN[cell]
    return found


def _policy(names: Names, place: str, name: str, app: str | None, **spec: Any) -> Raw:
    types = [kind for kind in ("Ingress", "Egress") if kind.lower() in spec]
    selector = {"matchLabels": {"app": app}} if app else {}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name, "namespace": names.namespaces[place]},
        "spec": {"podSelector": selector, "policyTypes": types, **spec},
    }


def _app(app: str) -> Raw:
    return {"podSelector": {"matchLabels": {"app": app}}}


def _namespace(names: Names, place: str) -> Raw:
    return {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": names.namespaces[place]}}}


def _tcp(port: int) -> list[Raw]:
    return [{"protocol": "TCP", "port": port}]


EVERYTHING = """
xa * * * *
xb * * * *
ya * * * *
yb * * * *
"""

CASES = (
    Case("no policy: everything is open", lambda names: [], EVERYTHING),
    Case(
        "default-deny for ingress in x",
        lambda names: [_policy(names, "x", "deny", None, ingress=[])],
        """
        xa * . * *
        xb . * * *
        ya . . * *
        yb . . * *
        """,
    ),
    Case(
        "… and x/a serves the pods app=b of its own namespace",
        lambda names: [
            _policy(names, "x", "deny", None, ingress=[]),
            _policy(names, "x", "by-label", "a", ingress=[{"from": [_app("b")]}]),
        ],
        """
        xa * . * *
        xb * * * *
        ya . . * *
        yb . . * *
        """,
    ),
    Case(
        "… or app=b of namespace y, on 8080/TCP alone",
        lambda names: [
            _policy(names, "x", "deny", None, ingress=[]),
            _policy(
                names,
                "x",
                "by-namespace",
                "a",
                ingress=[{"from": [{**_namespace(names, "y"), **_app("b")}], "ports": _tcp(8080)}],
            ),
        ],
        """
        xa * . * *
        xb . * * *
        ya . . * *
        yb 8 . * *
        """,
    ),
    Case(
        "x/a takes UDP from anywhere, and no TCP",
        lambda names: [
            _policy(names, "x", "udp", "a", ingress=[{"ports": [{"protocol": "UDP", "port": 8080}]}])
        ],
        """
        xa * * * *
        xb u * * *
        ya u * * *
        yb u * * *
        """,
    ),
    Case(
        "x/a sends to 8080/TCP in y, and nowhere else",
        lambda names: [
            _policy(names, "x", "egress", "a", egress=[{"to": [_namespace(names, "y")], "ports": _tcp(8080)}])
        ],
        """
        xa * . 8 8
        xb * * * *
        ya * * * *
        yb * * * *
        """,
    ),
    Case(
        "both ends must allow: x/a sends to y/a, y/a is served by y/b",
        lambda names: [
            _policy(names, "x", "egress", "a", egress=[{"to": [{**_namespace(names, "y"), **_app("a")}]}]),
            _policy(names, "y", "ingress", "a", ingress=[{"from": [_app("b")]}]),
        ],
        """
        xa * . . .
        xb * * . *
        ya * * * *
        yb * * * *
        """,
    ),
    Case(
        "x/a serves the addresses of y/a",
        lambda names: [
            _policy(
                names,
                "x",
                "block",
                "a",
                ingress=[{"from": [{"ipBlock": {"cidr": block}} for block in names.blocks("y/a")]}],
            )
        ],
        """
        xa * * * *
        xb . * * *
        ya * * * *
        yb . * * *
        """,
    ),
    Case(
        "x/a serves every address but those of y/a",
        lambda names: [
            _policy(
                names,
                "x",
                "except",
                "a",
                ingress=[
                    {
                        "from": [
                            {"ipBlock": {"cidr": "::/0" if ":" in block else "0.0.0.0/0", "except": [block]}}
                            for block in names.blocks("y/a")
                        ]
                    }
                ],
            )
        ],
        """
        xa * * * *
        xb * * * *
        ya . * * *
        yb * * * *
        """,
    ),
    Case("the policies are gone: everything is open", lambda names: [], EVERYTHING),
)
