"""Every flow of a capture against `podgate explain`, which asks the engine about its opening packet."""

from __future__ import annotations

import tempfile
from random import Random

import captures
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_matrix_vs_explain import NODES, PORTS, worlds_on_nodes
from test_resolve_vs_naive import EXTERNAL, Raw, snapshot_of

from dataplane._pcap import Capture
from dataplane.addresses import parse_address
from dataplane.policy.explain import Peer, build_packet, describe_verdict, explain, known_pods, parse_port
from dataplane.reasons import Reason
from dataplane.replay import Policies

ASKED = 100  # of the packets between all ends of a world


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(worlds_on_nodes(), st.sampled_from([4, 6]), st.integers(0, 1 << 32))
def test_every_opening_packet_has_the_verdict_of_explain(world: Raw, family: int, seed: int) -> None:
    policies = Policies(snapshot_of(world))
    pods = [peer for peer in known_pods(policies.resolved).values() if peer.address(family)]
    others = {parse_address(each) for each in (EXTERNAL[family == 6], *(node[family] for node in NODES))}
    known = {address for peer in pods for address in peer.addresses}
    peers = [*pods, *(Peer((address,)) for address in sorted(others - known))]
    ports = [parse_port(port) for port in PORTS]
    asked = [
        (source, destination, port)
        for source in peers
        for destination in peers
        for port in ports
        if source.address(family) != destination.address(family)
    ]
    asked = Random(seed).sample(asked, min(len(asked), ASKED))
    frames = [
        (float(number), build_packet(source.address(family) or b"", destination.address(family) or b"", port))
        for number, (source, destination, port) in enumerate(asked)
    ]
    replay = policies.replay()
    with tempfile.TemporaryFile() as file:
        file.write(captures.pcap(captures.RAW, frames))
        file.seek(0)
        capture = Capture(file)
    for source, destination, port in asked:
        event = replay.next(capture)
        assert event is not None
        answer = explain(policies.table, source, destination, port, family)
        told = describe_verdict(event.verdict)
        assert told["verdict"] == answer["verdict"], (source, destination, port)
        if answer["egress"]["reason"] == "own-node":
            assert event.verdict.reason is Reason.OWN_NODE, (source, destination, port)
            continue  # explain says so of both ends, the engine of the pod's
        assert told["egress"] == answer["egress"], (source, destination, port)
        # Where the egress end denies, explain looks at the other end besides.
        if answer["egress"]["verdict"] == "allow":
            assert told["ingress"] == answer["ingress"], (source, destination, port)
    assert replay.next(capture) is None
    for flow, (source, destination, port) in zip(replay.conversations(), asked, strict=True):
        answer = explain(policies.table, source, destination, port, family)
        assert flow.verdict.allow == (answer["verdict"] == "allow")
        assert policies.verdict(flow.flow).allow == flow.verdict.allow
