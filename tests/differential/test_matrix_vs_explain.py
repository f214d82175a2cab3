"""Every cell of a matrix against `podgate explain`, which asks the engine about one packet."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_resolve_vs_naive import EXTERNAL, HTTP, Raw, snapshot_of, three_pods, worlds

from dataplane.policy.compile import Compiler
from dataplane.policy.explain import (
    Peer,
    describe_rule,
    explain,
    known_pods,
    parse_port,
    table_of_everything,
)
from dataplane.policy.matrix import reachability
from dataplane.policy.resolve import in_force
from dataplane.reachability import EndVerdict

PORTS = ("80/TCP", "8080/TCP", "80/UDP", "80/SCTP", "ICMP")
NODES = ({4: "192.0.2.1", 6: "2001:db8::1"}, {4: "192.0.2.2", 6: "2001:db8::2"})


@st.composite
def worlds_on_nodes(draw: st.DrawFn) -> Raw:
    """Pods on two nodes; those on their host's network have its addresses."""
    world: Raw = draw(worlds())
    for each in world["pods"]:
        node = NODES[draw(st.integers(0, 1))]
        each["status"]["hostIPs"] = [{"ip": node[4]}, {"ip": node[6]}]
        if each["spec"]["hostNetwork"]:
            families = {6 if ":" in entry["ip"] else 4 for entry in each["status"]["podIPs"]}
            each["status"]["podIPs"] = [{"ip": node[family]} for family in sorted(families)]
    return world


def told(end: EndVerdict) -> dict[str, Any]:
    return {
        "verdict": "allow" if end.allow else "deny",
        "reason": end.reason.text,
        "policy": str(end.policy) if end.policy else None,
        "rule": describe_rule(end.rule) if end.rule else None,
    }


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(worlds_on_nodes(), st.sampled_from([4, 6]))
@example(three_pods({"egress": [{"to": [{"namespaceSelector": {}}], "ports": [HTTP]}]}), 4)
def test_every_cell_is_what_explain_says(world: Raw, family: int) -> None:
    snapshot = in_force(snapshot_of(world))
    table, known = table_of_everything(snapshot, Compiler()), known_pods(snapshot)
    if not any(peer.address(family) for peer in known.values()):
        return
    externals = (EXTERNAL[family == 6], *(node[family] for node in NODES))
    result = reachability(snapshot, [parse_port(port) for port in PORTS], externals, family)
    # A hostNetwork pod is its node's address, and no pod.
    peers = [known.get(place.pod) or Peer((place.address,)) for place in result.places if place.pod]
    peers += [Peer((place.address,)) for place in result.places if not place.pod]
    cells = result.matrix().cells
    for port in PORTS:
        for row, source in enumerate(peers):
            for column, destination in enumerate(peers):
                found = result.ends(port, row, column)
                if found is None or (row == column and result.places[row].host_network):
                    continue
                answer = explain(table, source, destination, parse_port(port), family)
                where = (port, result.order[row], result.order[column])
                assert [told(end) for end in found] == [answer["egress"], answer["ingress"]], where
                allowed = cells[port][row][column] == "."
                assert allowed == (answer["verdict"] == "allow"), where
