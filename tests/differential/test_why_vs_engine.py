"""The reasons given for a verdict never contradict it: every packet between the pods of generated worlds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import HealthCheck, example, given, settings
from test_resolve_vs_naive import EVERY_BLOCK, EXTERNAL, HTTP, PORTS, Raw, snapshot_of, three_pods, worlds

from dataplane._engine import judge_flow
from dataplane.addresses import parse_address
from dataplane.model import PROTOCOLS, Direction, Snapshot
from dataplane.policy.compile import Compiler
from dataplane.policy.explain import table_of_everything
from dataplane.policy.resolve import in_force
from dataplane.policy.why import Miss, Whys
from dataplane.reasons import Reason

CLUSTER_IP = "172.20.0.1"


def check(world: Raw, known: Snapshot, *, by_policy: bool) -> None:
    resolved = in_force(known)
    whys, table = Whys(known, resolved), table_of_everything(resolved, Compiler())
    ips = {entry["ip"] for each in world["pods"] for entry in each["status"]["podIPs"]}
    ends = sorted({*ips, *EXTERNAL, CLUSTER_IP})
    for source in ends:
        for destination in ends:
            if (":" in source) != (":" in destination) or source == destination:
                continue
            for protocol, port in (*(("TCP", port) for port in PORTS), ("UDP", 80), ("SCTP", 80)):
                number = PROTOCOLS[protocol]
                src, dst = parse_address(source), parse_address(destination)
                verdict = judge_flow(table, src, dst, number, 40000, port)
                asked: list[tuple[Direction, Any, bytes]] = [
                    (Direction.EGRESS, verdict.egress, dst),
                    (Direction.INGRESS, verdict.ingress, src),
                ]
                for direction, end, peer in asked:
                    where = (source, destination, protocol, port, direction)
                    if end.reason is Reason.NO_RULE:
                        why = whys.denied(end.pod.key, direction, peer, number, port, shown=None)
                        assert why.policies, where
                        assert {each.policy for each in why.candidates} == set(why.policies), where
                        for each in why.candidates:
                            assert each.miss is not Miss.MATCH, where
                            assert each.sentence, where
                            written = destination != CLUSTER_IP
                            assert (" rule " in each.field) <= (not (by_policy and written)), (where, each)
                    elif end.reason is Reason.POLICY_RULE:
                        policy, rule = end.pod.rule(direction, end.rule_id)
                        found = whys.allowed(end.pod.key, direction, peer, number, port, policy, rule.index)
                        assert (found.policy, found.miss) == (policy, Miss.MATCH), where
                        if by_policy and destination != CLUSTER_IP:
                            assert " rule " not in found.field, (where, found)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(worlds())
@example(three_pods({"ingress": [{"from": [], "ports": [HTTP]}]}))
@example(three_pods({"egress": [{"to": [{"namespaceSelector": {}}], "ports": [HTTP]}]}))
@example(three_pods({"egress": [{"to": [], "ports": [HTTP, {"port": 79, "protocol": "UDP"}]}]}))
@example(three_pods({"egress": [{"to": EVERY_BLOCK, "ports": [HTTP, {"port": 79}]}]}))
def test_no_candidate_of_a_denied_end_matches_and_the_rule_of_an_allowed_one_does(world: Raw) -> None:
    check(world, snapshot_of(world), by_policy=True)


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(worlds())
@example(three_pods({"ingress": [{"from": [], "ports": [HTTP]}]}))
def test_so_it_is_with_policy_endpoints_alone(world: Raw) -> None:
    endpoints = in_force(snapshot_of(world)).policy_endpoints
    check(world, Snapshot(policy_endpoints=endpoints), by_policy=False)


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(worlds(), worlds())
def test_so_it_is_with_policy_endpoints_that_do_not_fit_their_policies(world: Raw, other: Raw) -> None:
    known = snapshot_of(world)
    stale = in_force(snapshot_of(other)).policy_endpoints
    check(world, replace(known, policy_endpoints=stale), by_policy=False)
