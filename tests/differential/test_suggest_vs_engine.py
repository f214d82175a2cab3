"""What is suggested for a denied packet, applied: the packet passes, and nothing that passed stops."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from random import Random

import yaml
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from test_resolve_vs_naive import EXTERNAL, PORTS, Raw, snapshot_of, worlds

from dataplane._engine import judge_flow
from dataplane.addresses import family_of, format_address, parse_address
from dataplane.model import Direction, Snapshot
from dataplane.policy.compile import Compiler
from dataplane.policy.explain import ICMP, Port, table_of_everything
from dataplane.policy.resolve import in_force
from dataplane.policy.suggest import Suggestions
from dataplane.policy.why import Whys
from dataplane.reasons import Reason
from dataplane.sources.networkpolicy import network_policy
from dataplane.verdict import Verdict

ASKED = [*(Port(6, port) for port in PORTS[1:]), Port(17, 80), Port(None, 0)]
Packet = tuple[bytes, bytes, Port]


def verdicts(known: Snapshot) -> dict[Packet, Verdict]:
    """Every packet between the addresses of a world."""
    table = table_of_everything(in_force(known), Compiler())
    ips = {ip for pod in known.pods for ip in pod.ips} | {parse_address(each) for each in EXTERNAL}
    return {
        (source, destination, port): judge_flow(
            table, source, destination, port.protocol or ICMP[family_of(source)], 40000, port.number
        )
        for source in sorted(ips)
        for destination in sorted(ips)
        if family_of(source) == family_of(destination) and source != destination
        for port in ASKED
    }


# Both pods have what tells the first one's workload, and only the first is isolated.
PARTLY_ISOLATED: Raw = {
    "namespaces": [],
    "services": [],
    "pods": [
        {
            "metadata": {"name": f"pod{n}", "namespace": "x", "labels": labels},
            "spec": {"containers": []},
            "status": {"phase": "Running", "podIPs": [{"ip": f"10.0.0.{n}"}], "hostIP": "192.0.2.1"},
        }
        for n, labels in ((1, {"app": "a"}), (2, {"app": "a", "tier": "front"}))
    ],
    "policies": [
        {
            "metadata": {"name": "p", "namespace": "x"},
            "spec": {
                "podSelector": {"matchExpressions": [{"key": "tier", "operator": "DoesNotExist"}]},
                "policyTypes": ["Ingress", "Egress"],
            },
        }
    ],
}


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(worlds(), st.randoms(use_true_random=False))
@example(PARTLY_ISOLATED, Random(1))
def test_a_suggestion_opens_the_packet_and_cuts_nothing(world: Raw, random: Random) -> None:
    known = snapshot_of(world)
    before = verdicts(known)
    denied = [packet for packet, verdict in before.items() if not verdict.allow]
    assume(denied)
    random.shuffle(denied)
    for packet in islice(denied, 3):
        after, warned = before, False
        applied = known
        for _ in Direction:  # the second end's verdict shows when the first allows
            verdict = after[packet]
            if verdict.allow:
                break
            source, destination, port = packet
            ends = {
                Direction.EGRESS: (verdict.egress, destination),
                Direction.INGRESS: (verdict.ingress, source),
            }
            direction = next(each for each in ends if ends[each][0].reason is Reason.NO_RULE)
            end, peer = ends[direction]
            assert end.pod is not None
            whys = Whys(applied)
            made = Suggestions(applied, whys).allow(end.pod.key, direction, peer, port.protocol, port.number)
            policy, problems = network_policy(yaml.safe_load(made.yaml()), "suggestion")
            assert policy == made.policy
            assert policy is not None
            assert not problems
            warned = warned or any("WARNING" in each for each in made.comments)
            more = (*applied.network_policies, policy)
            applied = replace(applied, network_policies=tuple(sorted(more, key=lambda each: each.key)))
            after = verdicts(applied)
        where = [*map(format_address, packet[:2]), str(packet[2])]
        assert after[packet].allow, where
        assert not warned, where  # with the policies known, their selectors keep others out
        for each, verdict in before.items():
            assert not verdict.allow or after[each].allow, (where, each)
            if after[each].allow and not verdict.allow and packet[2].protocol is not None:
                assert each[2] == packet[2], (where, each)
