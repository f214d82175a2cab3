"""The cluster that conformance tables are asked of, and the words they are written in.

Namespaces x, y and z with pods a, b and c, each with one address per family, serving 80 and 81 over
TCP, UDP and SCTP; and one address outside the cluster, called `world`. A table starts with everything
allowed and takes away what the policies mean:

    ALL.deny(to="x/a").allow("y", to="x/a", ports="81/TCP")

Nobody reaches x/a, but the pods of y its TCP port 81; all else stays open. Later words win. Real packets
have to do what it says, and `podgate matrix` has to say it too.

What must hold around the rules is not a table, and is tested beside them:

probes from the node under default deny
    test_node_and_services::test_probes_from_the_node_pass_under_default_deny,
    test_life_cycle::test_strict_mode
a Service whose port is not the container's
    test_node_and_services::test_policy_sees_the_port_behind_a_service,
    test_node_and_services::test_networkpolicies_name_the_port_behind_a_service
a change cuts open connections or spares them, also when only the server sends
    test_live_flows::test_a_change_cuts_what_it_denies_and_leaves_the_rest_alone,
    test_networkpolicies::test_a_label_cuts_and_spares_open_connections
replies to a request made before the first policy
    test_live_flows::test_a_flow_older_than_the_first_policy
ping blocked, neighbour discovery alive
    test_policies::test_neighbours_are_found_while_ping_is_blocked
path MTU discovery, port unreachable
    test_packets::test_path_mtu_discovery_completes_a_transfer,
    test_packets::test_port_unreachable_comes_back_for_allowed_flows_only
a server on the own node under default deny egress
    test_node_and_services::test_the_own_node_is_reached_under_default_deny_egress
changes while the agent was down
    test_life_cycle::test_killed_and_started_again,
    test_networkpolicies::test_labels_that_change_while_nobody_runs
one policy in several slices
    test_policies::test_a_change_over_two_slices_never_shows_half_of_it,
    test_networkpolicies::test_more_peers_and_ports_than_one_object_holds
an address that passes to another pod
    test_pods_come_and_go::test_a_reused_address_inherits_nothing,
    test_networkpolicies::test_an_address_stands_for_the_pod_that_has_it_now
a forged source address
    test_spoofing::test_another_pods_address, test_spoofing::test_the_victims_address_does_not_open_the_victim
two passes through the node
    test_topologies::test_branch_pods_of_one_node_are_judged_at_both_ends
a pod that reaches itself through its Service
    test_node_and_services::test_a_pod_reaches_itself_through_its_service
an ICMP error opens nothing for its flow
    test_packets::test_an_icmp_error_opens_nothing
a named port with several numbers
    test_conformance_beyond::test_beyond_upstream
every kind of wiring
    test_topologies::test_the_whole_matrix, test_topologies::test_prefix_delegated_pods,
    test_topologies::test_a_second_veth_is_left_alone
replicas of one name prefix
    test_pods_come_and_go::test_two_replicas_isolated_and_a_third_not,
    test_networkpolicies::test_replicas_are_told_apart_by_their_labels
30 and 300 ports on one CIDR
    test_policies::test_many_ports_on_one_cidr
A and AAAA back to back from one socket
    test_live_flows::test_two_queries_from_one_socket_are_never_lost
ports used again and again beside a steady flow
    test_live_flows::test_churn_beside_a_steady_flow
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import yaml
from click.testing import CliRunner
from objects import Object, network_policy, pod, pod_object

from dataplane.cli.matrix import command
from dataplane.lab.probe import probe_families
from dataplane.lab.world import Lab
from dataplane.model import Pod
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
        self._written: dict[str, list[Object]] = {}

    @staticmethod
    def pods() -> list[Pod]:
        """What the lab is made of."""
        return [
            pod(name, *ips, ports=[f"serve-{port.replace('/', '-').lower()}={port}" for port in PORTS])
            for name, ips in ADDRESSES.items()
        ]

    def start(self) -> None:
        self.put(Step(ALL))
        self.agent.start()

    def check(self, *steps: Step) -> None:
        """Each step in turn: put in force live, then every packet asked for, and `podgate matrix`."""
        for number, each in enumerate(steps, 1):
            self.put(each)
            seen = probe_families(self.lab, each.table.ports, externals=tuple(WORLD.values()))
            expected = {4: each.table, 6: each.six or each.table}
            wrong = ""
            for family, table in expected.items():
                wanted = table.matrix(family)
                wrong += difference(f"packets, IPv{family}", wanted, seen[family])
                wrong += difference(f"podgate matrix, IPv{family}", wanted, self._computed(table, family))
            if wrong:
                raise AssertionError(f"table {number} of {len(steps)}\n{wrong}\n{_written(each)}")

    def _computed(self, table: Table, family: int) -> Matrix:
        """What `podgate matrix` says of the same files."""
        options = [word for port in table.ports for word in ("--port", port)]
        options += ["--external", WORLD[family], "--family", str(family), "-o", "json"]
        done = CliRunner().invoke(command, [str(self.agent.directory), *options], catch_exceptions=False)
        return Matrix.from_json(json.loads(done.stdout))

    def put(self, state: Step) -> None:
        """Bring the cluster into this state; back once it is in force."""
        files = {
            "namespaces.yaml": _namespaces(state),
            "pods.yaml": self._pods(state),
            "policies.yaml": list(state.policies),
        }
        for file, objects in files.items():
            # Each write is waited for by the agent's generation: one that changes nothing would confuse it.
            if self._written.get(file) != objects:
                self._written.pop(file, None)
                self.agent.write(*objects, file=file)
                self._written[file] = objects

    def _pods(self, state: Step) -> list[Object]:
        made = []
        for one in self.lab.pods.values():
            name = str(one.key)
            more = [f"{named}={port}" for named, port in state.ports.get(name, {}).items()]
            declared = replace(one, ports=(*one.ports, *pod(name, ports=more).ports))
            labels = {"pod": one.key.name, **state.labels.get(name, {})}
            made.append(pod_object(self.lab, declared, labels))
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
    policies = yaml.safe_dump_all(state.policies, sort_keys=False) if state.policies else "no policies\n"
    return f"{policies}further labels: {dict(state.labels)}\nfurther ports: {dict(state.ports)}\n"
