"""The cluster that conformance tables are asked of, and the words they are written in.

Namespaces x, y and z with pods a, b and c, each with one address per family, serving 80 and 81 over
TCP, UDP and SCTP; and one address outside the cluster, called `world`. A table starts with everything
allowed and takes away what the policies mean:

    ALL.deny(to="x/a").allow("y", to="x/a", ports="81/TCP")

Nobody reaches x/a, but the pods of y its TCP port 81; all else stays open. Later words win.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import yaml
from objects import Object, network_policy, pod, pod_object

from dataplane.lab.probe import probe_families
from dataplane.lab.world import Lab
from dataplane.reachability import ALLOWED, DENIED, Matrix

if TYPE_CHECKING:
    from conftest import RunningAgent

# The last byte of an address is 0x11 for x/a up to 0x33 for z/c: a namespace is a /28, or a /124.
ADDRESSES = {
    f"{namespace}/{name}": (f"10.1.0.{16 * row + column}", f"fd00:1::{row}{column}")
    for row, namespace in enumerate("xyz", 1)
    for column, name in enumerate("abc", 1)
}
PODS = tuple(ADDRESSES)
WORLD = {4: "203.0.113.9", 6: "2001:db8::9"}
ENDS = (*PODS, "world")
PORTS = tuple(f"{port}/{protocol}" for port in (80, 81) for protocol in ("TCP", "UDP", "SCTP"))


@dataclass(frozen=True)
class Table:
    """Who reaches whom, on every port. Made by saying what is denied and what is allowed again."""

    ports: tuple[str, ...] = PORTS
    denied: frozenset[tuple[str, str, str]] = frozenset()  # source, destination, port

    def deny(self, source: str = "*", to: str = "*", ports: str = "*") -> Table:
        """Ends: `x` a namespace, `x/a` a pod, `pods`, `world`, `*` all. Ports: `80`, `TCP`, `80/TCP`, `*`."""
        return replace(self, denied=self.denied | self._cells(source, to, ports))

    def allow(self, source: str = "*", to: str = "*", ports: str = "*") -> Table:
        """The same words as `deny`."""
        return replace(self, denied=self.denied - self._cells(source, to, ports))

    def _cells(self, source: str, to: str, ports: str) -> frozenset[tuple[str, str, str]]:
        named = [port for word in ports.split() for port in self._ports(word)]
        return frozenset((s, d, port) for s in _ends(source) for d in _ends(to) for port in named)

    def _ports(self, word: str) -> list[str]:
        found = [port for port in self.ports if word in ("*", port, *port.split("/"))]
        assert found, f"no port of the table is {word}"
        return found

    def matrix(self, family: int) -> Matrix:
        """The table in the shape that a probe gives."""
        return Matrix(
            (*PODS, WORLD[family]),
            {
                port: tuple(
                    "".join(DENIED if s != d and (s, d, port) in self.denied else ALLOWED for d in ENDS)
                    for s in ENDS
                )
                for port in self.ports
            },
        )


ALL = Table()


def _ends(words: str) -> list[str]:
    found: list[str] = []
    for word in words.split():
        ends = [
            end
            for end in ENDS
            if word in ("*", end, end.partition("/")[0]) or (word == "pods" and end != "world")
        ]
        assert ends, f"no end of a table is {word}"
        found += ends
    return found


def policy(spec: str, at: str = "x/policy") -> Object:
    """A NetworkPolicy: its spec as YAML, `namespace/name`."""
    return network_policy(at, yaml.safe_load(textwrap.dedent(spec)) or {})


@dataclass(frozen=True)
class Step:
    """One state of the cluster and the table that must hold in it.

    `labels` are further labels, by pod or namespace; `ports` further named container ports, by pod:
    `{"x/a": {"http": "80/TCP"}}`. `six` is the table on IPv6 where it is not that on IPv4.
    """

    table: Table
    policies: tuple[Object, ...] = ()
    labels: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    ports: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    six: Table | None = None


def step(table: Table, *policies: Object | str, **more: Any) -> Step:
    """`policies`: objects, or specs of policies in namespace x, as YAML."""
    made = [
        policy(each, f"x/policy-{number}") if isinstance(each, str) else each
        for number, each in enumerate(policies)
    ]
    return Step(table, tuple(made), **more)


class Cluster:
    """A lab with a running agent, changed by writing the files that the agent watches."""

    def __init__(self, lab: Lab, agent: RunningAgent) -> None:
        self.lab = lab
        self.agent = agent
        self.state = Step(ALL)

    @staticmethod
    def pods() -> list[Any]:
        """What the lab is made of."""
        return [
            pod(name, *ips, ports=[f"serve-{port.replace('/', '-').lower()}={port}" for port in PORTS])
            for name, ips in ADDRESSES.items()
        ]

    def start(self) -> None:
        self._write(self.state, ("policies", "labels", "ports"), wait=False)
        self.agent.start()

    def check(self, *steps: Step) -> None:
        """Each step in turn: everything is put in force live, and then every packet asked for."""
        for number, each in enumerate(steps, 1):
            self.put(each)
            seen = probe_families(self.lab, each.table.ports, externals=tuple(WORLD.values()))
            expected = {4: each.table, 6: each.six or each.table}
            wrong = "".join(
                difference(f"IPv{family}", table.matrix(family), seen[family])
                for family, table in expected.items()
            )
            if wrong:
                raise AssertionError(f"table {number} of {len(steps)}\n{wrong}\n{_written(each)}")

    def put(self, state: Step) -> None:
        """Bring the cluster into this state; back once it is in force."""
        before, self.state = self.state, state
        names = [n for n in ("policies", "labels", "ports") if getattr(before, n) != getattr(state, n)]
        self._write(state, names, wait=True)

    def _write(self, state: Step, names: Iterable[str], *, wait: bool) -> None:
        names = set(names)
        if "labels" in names:
            self.agent.write(*_namespaces(state), file="namespaces.yaml", wait=wait)
        if names & {"labels", "ports"}:
            self.agent.write(*self._pods(state), file="pods.yaml", wait=wait)
        if "policies" in names:
            self.agent.write(*state.policies, file="policies.yaml", wait=wait)

    def _pods(self, state: Step) -> list[Object]:
        made = []
        for one in self.lab.pods.values():
            name = str(one.key)
            labels = {"pod": one.key.name, **state.labels.get(name, {})}
            written = pod_object(self.lab, one, labels)
            for port_name, port in state.ports.get(name, {}).items():
                number, _, protocol = port.partition("/")
                entry = {"name": port_name, "containerPort": int(number), "protocol": protocol}
                written["spec"]["containers"].append({"name": port_name, "image": "-", "ports": [entry]})
            made.append(written)
        return made


def _namespaces(state: Step) -> list[Object]:
    """Without the label that the API server sets: dumps of old clusters have none."""
    return [
        {
            "apiVersion": "v1",
            "kind": "Namespace",
            "metadata": {"name": name, "labels": {"ns": name, **state.labels.get(name, {})}},
        }
        for name in "xyz"
    ]


def difference(title: str, expected: Matrix, seen: Matrix) -> str:
    """The ports whose rows differ, expected and seen side by side; empty when all is as expected."""
    assert seen.order == expected.order
    assert seen.cells.keys() == expected.cells.keys()
    names = [name if "/" in name else "world" for name in expected.order]
    lines = []
    for port, wanted in expected.cells.items():
        got = seen.cells[port]
        if got == wanted:
            continue
        head = " ".join(name.replace("/", "")[:2] for name in names)
        lines += [
            f"{title} {port}  (row: source, column: destination)",
            f"{'':7}{'expected':<{3 * len(names)}}    seen",
            f"{'':7}{head}    {head}",
        ]
        for name, left, right in zip(names, wanted, got, strict=True):
            mark = "  <--" if left != right else ""
            lines.append(f"{name:7}{_row(left)}    {_row(right)}{mark}")
    return "".join(f"{line}\n" for line in lines)


def _row(cells: Sequence[str]) -> str:
    return " ".join(f"{cell:2}" for cell in cells)


def _written(state: Step) -> str:
    parts = [yaml.safe_dump_all(state.policies, sort_keys=False) if state.policies else "no policies\n"]
    parts += [f"labels: {dict(state.labels)}\n"] if state.labels else []
    parts += [f"ports: {dict(state.ports)}\n"] if state.ports else []
    return "".join(parts)
