"""Invariant: whatever packets a capture holds, each is judged once or said to be passed over."""

from __future__ import annotations

import random
from pathlib import Path

import captures
import pytest
from test_fuzz_packet import cases

from dataplane._pcap import Capture
from dataplane.addresses import Prefix
from dataplane.model import Direction, Key, PodEndpoint, PolicyEndpoint, PortRange, Rule, Snapshot
from dataplane.policy.explain import parse_port
from dataplane.reasons import Reason
from dataplane.replay import Policies, summarise

POD4, POD6 = b"\x0a\0\0\1", b"\xfd" + bytes(15)
ASKED = parse_port("80/TCP")


def policies() -> Policies:
    """One pod that may be asked at 80/TCP and at every UDP port, and may ask the same."""
    rules = (Rule(Prefix(bytes(4), 0), (), (PortRange(6, 80, 80), PortRange(17, 0, 65535))),)
    pod = Key("x", "a")
    return Policies(
        Snapshot(
            policy_endpoints=(
                PolicyEndpoint(
                    Key("x", "p-1"),
                    Key("x", "p"),
                    frozenset(Direction),
                    tuple(PodEndpoint(pod, address, b"\x0a\0\0\2") for address in (POD4, POD6)),
                    rules,
                    rules,
                ),
            )
        )
    )


@pytest.mark.parametrize("seed", range(6))
def test_every_packet_is_accounted_for(seed: int, tmp_path: Path) -> None:
    known = policies()
    rng = random.Random(seed)
    out = bytearray(captures.pcap(captures.RAW, []))
    when, packets = 0, 0
    for data, wire in cases(seed, 4000):
        when += rng.choice([0, 1, 100, 10_000])
        seconds, fraction = divmod(when, 1_000_000)
        for _ in range(rng.choice([1, 1, 1, 2])):
            header = (seconds, fraction, len(data), min(wire, 0xFFFFFFFF))
            out += b"".join(value.to_bytes(4, "little") for value in header) + data
            packets += 1
    path = captures.write(tmp_path / "c", bytes(out))
    replay = known.replay(seed=seed)
    with path.open("rb") as file:
        capture = Capture(file)
    events = []
    while (event := replay.next(capture)) is not None:
        assert event.verdict.reason is not Reason.NONE
        events.append(event)
    assert capture.error is None
    assert capture.packets + capture.others == packets  # those without a byte are no packets
    assert len(events) + replay.again + replay.cut == capture.packets
    assert sum(count for count, _ in replay.totals().values()) == len(events)
    flows = replay.conversations()
    counted = sum(sum(flow.packets) + flow.related for flow in flows)
    of_no_flow = sum(event.verdict.reason in (Reason.MALFORMED, Reason.FRAGMENT) for event in events)
    assert counted + of_no_flow + replay.stray == len(events)
    assert all(flow.first_ns <= flow.last_ns for flow in flows)
    assert len({flow.flow for flow in flows}) > 20
    talks = replay.talks()
    assert sum(number for _, number in talks) == len(flows)
    assert sum(sum(flow.packets) for flow, _ in talks) == sum(sum(flow.packets) for flow in flows)
    summary = summarise(talks, known)
    assert sum(count.flows for _, count in summary.talks) + summary.outside.flows == len(flows)

    # Two packets whose hashes meet take each other's place among those seen before: the same in both.
    again = known.replay(seed=seed)
    with path.open("rb") as file:
        whole = Capture(file)
    while again.run(whole, 17):
        pass
    assert again.conversations() == flows
