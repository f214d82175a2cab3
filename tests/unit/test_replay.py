"""A capture's packets get the verdicts of the flows they belong to, in the direction they were opened."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import captures
import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP, fragment
from scapy.layers.inet6 import ICMPv6DestUnreach, ICMPv6EchoReply, ICMPv6EchoRequest, IPv6
from scapy.layers.sctp import SCTP, SCTPChunkInit, SCTPChunkInitAck
from scapy.packet import Packet

from dataplane._pcap import Capture, Filter
from dataplane._replay import Replay
from dataplane.model import Key
from dataplane.reasons import Reason
from dataplane.replay import Policies, changes, summarise
from dataplane.sources.directory import read_paths
from dataplane.verdict import Began, Conversation, Event

STARS = Path(__file__).parents[2] / "deploy" / "examples" / "stars"
CLIENT, FRONTEND, BACKEND, UI = "10.1.0.10", "10.1.0.20", "10.1.0.30", "10.1.0.40"
CLIENT6, BACKEND6 = "fd00:1::10", "fd00:1::30"
NODE, OUTSIDE = "10.0.0.1", "203.0.113.9"

Frame = tuple[float, bytes]


@pytest.fixture(scope="module")
def policies() -> Policies:
    return Policies(read_paths([STARS]).snapshot)


def tcp(src: str, sport: int, dst: str, dport: int, flags: str, **more: Any) -> Packet:
    network = IPv6(src=src, dst=dst) if ":" in src else IP(src=src, dst=dst, **more)
    return network / TCP(sport=sport, dport=dport, flags=flags)


def udp(src: str, sport: int, dst: str, dport: int, payload: bytes = b"x") -> Packet:
    return IP(src=src, dst=dst) / UDP(sport=sport, dport=dport) / payload


class Replayed:
    """What became of some packets, one second apart unless they come with times."""

    def __init__(
        self,
        policies: Policies,
        path: Path,
        packets: Sequence[Packet | Frame],
        *,
        linktype: int = captures.RAW,
        snaplen: int = 262144,
        chosen: str | None = None,
    ) -> None:
        frames = [
            each if isinstance(each, tuple) else (1e9 + number, captures.frame(linktype, bytes(each)))
            for number, each in enumerate(packets)
        ]
        captures.write(path / "capture", captures.pcap(linktype, frames, snaplen=snaplen))
        self.replay: Replay = policies.replay(Filter(chosen) if chosen else None)
        with (path / "capture").open("rb") as file:
            self.capture = Capture(file)
        self.events: list[Event] = []
        while (event := self.replay.next(self.capture)) is not None:
            self.events.append(event)
        self.flows: list[Conversation] = self.replay.conversations()
        # All at once judges as one by one.
        again = policies.replay(Filter(chosen) if chosen else None)
        with (path / "capture").open("rb") as file:
            whole = Capture(file)
        while again.run(whole, 3):
            pass
        assert again.conversations() == self.flows
        assert again.totals() == self.replay.totals()
        assert (again.unmatched, again.again, again.cut, again.stray, again.times) == (
            self.replay.unmatched,
            self.replay.again,
            self.replay.cut,
            self.replay.stray,
            self.replay.times,
        )

    @property
    def verdicts(self) -> list[tuple[bool, str, bool]]:
        """(allow, reason, reply) of each packet."""
        return [(each.verdict.allow, each.verdict.reason.text, each.reply) for each in self.events]


# ---- who opened a flow ------------------------------------------------------------------------------


def test_a_connection_is_judged_as_it_was_opened(policies: Policies, tmp_path: Path) -> None:
    found = Replayed(
        policies,
        tmp_path,
        [
            tcp(CLIENT, 40000, FRONTEND, 80, "S"),
            tcp(FRONTEND, 80, CLIENT, 40000, "SA"),
            tcp(CLIENT, 40000, FRONTEND, 80, "A"),
            tcp(FRONTEND, 80, CLIENT, 40000, "FA"),
        ],
    )
    assert found.verdicts == [
        (True, "policy-rule", False),
        (True, "reply", True),
        (True, "policy-rule", False),
        (True, "reply", True),
    ]
    assert [event.verdict.cached for event in found.events] == [False, True, True, True]
    (flow,) = found.flows
    assert (flow.began, flow.opened, flow.packets, flow.bytes) == (Began.OPENED, 1, (2, 2), (80, 80))
    assert (flow.first_ns, flow.last_ns) == (10**18, 10**18 + 3 * 10**9)
    assert (flow.verdict.allow, flow.verdict.reason) == (True, Reason.POLICY_RULE)
    assert found.replay.totals() == {(True, Reason.POLICY_RULE): (2, 80), (True, Reason.REPLY): (2, 80)}


def test_the_replies_of_a_denied_flow_are_denied_with_it(policies: Policies, tmp_path: Path) -> None:
    found = Replayed(
        policies,
        tmp_path,
        [tcp(CLIENT, 40000, BACKEND, 6379, "S"), tcp(BACKEND, 6379, CLIENT, 40000, "SA")],
    )
    assert found.verdicts == [(False, "no-rule", False), (False, "no-rule", True)]


@pytest.mark.parametrize(
    ("first", "began", "allow"),
    [
        # The frontend may ask the backend at 6379, nobody may ask the frontend at 40000.
        (tcp(BACKEND, 6379, FRONTEND, 40000, "SA"), Began.ANSWERED, True),
        (tcp(BACKEND, 6379, FRONTEND, 40000, "PA"), Began.BY_PORTS, True),
        (tcp(FRONTEND, 40000, BACKEND, 6379, "A"), Began.BY_PORTS, True),
        (tcp(BACKEND, 6379, FRONTEND, 7000, "A"), Began.BY_PORTS, True),  # the lower port is the service's
        (tcp(BACKEND, 6379, FRONTEND, 6379, "R"), Began.BY_SENDER, False),
        (tcp(FRONTEND, 6379, BACKEND, 6379, "FA"), Began.BY_SENDER, True),
    ],
)
def test_a_capture_that_begins_in_the_middle(
    policies: Policies, tmp_path: Path, first: Packet, began: Began, allow: bool
) -> None:
    found = Replayed(policies, tmp_path, [first])
    (flow,) = found.flows
    assert (flow.began, flow.opened, flow.verdict.allow) == (began, 0, allow)
    assert found.events[0].verdict.allow is allow
    # Its own verdict is no `reply`: that is what a packet is.
    assert flow.verdict.reason in (Reason.POLICY_RULE, Reason.NO_RULE)


@pytest.mark.parametrize(
    ("packet", "began", "reply"),
    [
        (udp(UI, 40000, BACKEND, 53), Began.OPENED, False),
        (udp(BACKEND, 53, UI, 40000), Began.BY_PORTS, True),  # an answer of a service
        (udp(BACKEND, 5300, UI, 40000), Began.OPENED, False),
        (udp(BACKEND, 123, UI, 123), Began.OPENED, False),
        (IP(src=UI, dst=BACKEND) / ICMP(type=8, id=3), Began.OPENED, False),
        (IP(src=BACKEND, dst=UI) / ICMP(type=0, id=3), Began.ANSWERED, True),
        (IPv6(src=BACKEND6, dst=CLIENT6) / ICMPv6EchoReply(id=3), Began.ANSWERED, True),
        (IP(src=UI, dst=BACKEND) / SCTP(sport=9, dport=9) / SCTPChunkInit(), Began.OPENED, False),
        (IP(src=BACKEND, dst=UI) / SCTP(sport=9, dport=9) / SCTPChunkInitAck(), Began.ANSWERED, True),
        (IP(src=UI, dst=BACKEND, proto=47) / bytes(8), Began.OPENED, False),
    ],
)
def test_first_packets_without_a_tcp_handshake(
    policies: Policies, tmp_path: Path, packet: Packet, began: Began, reply: bool
) -> None:
    found = Replayed(policies, tmp_path, [packet])
    (flow,) = found.flows
    assert (flow.began, found.events[0].reply) == (began, reply)
    assert flow.packets == ((0, 1) if reply else (1, 0))


def test_pings_of_both_ends_are_two_flows(policies: Policies, tmp_path: Path) -> None:
    found = Replayed(
        policies,
        tmp_path,
        [
            IPv6(src=CLIENT6, dst=BACKEND6) / ICMPv6EchoRequest(id=7),
            IPv6(src=BACKEND6, dst=CLIENT6) / ICMPv6EchoReply(id=7),
            IPv6(src=BACKEND6, dst=CLIENT6) / ICMPv6EchoRequest(id=7),
            IPv6(src=CLIENT6, dst=BACKEND6) / ICMPv6EchoReply(id=7),
        ],
    )
    assert [flow.packets for flow in found.flows] == [(1, 1), (1, 1)]
    assert [reply for _, _, reply in found.verdicts] == [False, True, False, True]


def test_a_port_used_again(policies: Policies, tmp_path: Path) -> None:
    again = [
        tcp(CLIENT, 40000, FRONTEND, 80, "S"),
        tcp(CLIENT, 40000, FRONTEND, 80, "R"),
        tcp(CLIENT, 40000, FRONTEND, 80, "S"),
    ]
    (flow,) = Replayed(policies, tmp_path, again).flows
    assert (flow.opened, flow.packets) == (2, (3, 0))
    # The other end opens one: a flow of its own, judged its own way.
    back = [*again, tcp(FRONTEND, 80, CLIENT, 40000, "S"), tcp(CLIENT, 40000, FRONTEND, 80, "SA")]
    found = Replayed(policies, tmp_path, back)
    assert [flow.packets for flow in found.flows] == [(3, 0), (1, 1)]
    assert [flow.verdict.allow for flow in found.flows] == [True, False]
    # While it lives, such a SYN belongs to it: both ends open at once (RFC 9293 §3.5).
    at_once = [tcp(CLIENT, 40000, FRONTEND, 80, "S"), tcp(FRONTEND, 80, CLIENT, 40000, "S")]
    assert [flow.packets for flow in Replayed(policies, tmp_path, at_once).flows] == [(1, 1)]


def test_what_was_guessed_gives_way_to_who_is_seen_to_open(policies: Policies, tmp_path: Path) -> None:
    found = Replayed(
        policies,
        tmp_path,
        [tcp(FRONTEND, 80, CLIENT, 40000, "A"), tcp(FRONTEND, 80, CLIENT, 40000, "S")],
    )
    assert [(flow.began, flow.verdict.allow) for flow in found.flows] == [
        (Began.BY_PORTS, True),
        (Began.OPENED, False),
    ]


# ---- packets of no flow of their own ----------------------------------------------------------------


@pytest.mark.parametrize("sender", [BACKEND, OUTSIDE])
def test_an_icmp_error_is_judged_by_the_flow_inside(policies: Policies, tmp_path: Path, sender: str) -> None:
    def error(sender: str, quoted: Packet) -> Packet:
        return IP(src=sender, dst=quoted.src) / ICMP(type=3, code=3) / quoted

    allowed, denied = udp(UI, 40000, BACKEND, 53), udp(CLIENT, 40000, BACKEND, 53)
    found = Replayed(policies, tmp_path, [allowed, error(sender, allowed), denied, error(sender, denied)])
    assert found.verdicts[:2] == [(True, "policy-rule", False), (True, "related", True)]
    assert found.verdicts[2] == (False, "no-rule", False)
    # A router's error comes by no pod's interface: there the backend's rules are not asked.
    assert found.verdicts[3] == ((False, "no-rule", True) if sender == BACKEND else (True, "related", True))
    assert [(flow.packets, flow.related) for flow in found.flows] == [((1, 0), 1), ((1, 0), 1)]
    assert found.replay.stray == 0


def test_an_icmp_error_that_the_opener_sends(policies: Policies, tmp_path: Path) -> None:
    answer = udp(BACKEND, 53, UI, 40000)
    error = IP(src=UI, dst=BACKEND) / ICMP(type=3, code=3) / answer
    found = Replayed(policies, tmp_path, [udp(UI, 40000, BACKEND, 53), answer, error])
    assert found.verdicts[-1] == (True, "related", False)


def test_an_icmp_error_about_a_flow_that_is_not_there(policies: Policies, tmp_path: Path) -> None:
    error = (
        IPv6(src=BACKEND6, dst=CLIENT6)
        / ICMPv6DestUnreach(code=4)
        / (IPv6(src=CLIENT6, dst=BACKEND6) / UDP(sport=1, dport=2))
    )
    found = Replayed(policies, tmp_path, [error])
    assert (found.verdicts, found.flows, found.replay.stray) == ([(False, "no-rule", True)], [], 1)


@pytest.mark.parametrize("family", [4, 6])
def test_fragments_belong_to_the_flow_of_their_first(policies: Policies, tmp_path: Path, family: int) -> None:
    if family == 4:
        whole = IP(src=UI, dst=BACKEND, id=77) / UDP(sport=40000, dport=53) / bytes(3000)
        parts = fragment(whole, 1400)
    else:
        from scapy.layers.inet6 import IPv6ExtHdrFragment, fragment6

        whole = (
            IPv6(src="fd00:1::40", dst=BACKEND6)
            / IPv6ExtHdrFragment(id=9)
            / UDP(sport=40000, dport=53)
            / bytes(3000)
        )
        parts = fragment6(whole, 1400)
    assert len(parts) == 3
    found = Replayed(policies, tmp_path, parts)
    assert [allow for allow, _, _ in found.verdicts] == [True, True, True]
    assert [flow.packets for flow in found.flows] == [(3, 0)]
    # Without the first nobody knows the flow.
    late = Replayed(policies, tmp_path, parts[1:])
    assert (late.verdicts, late.flows) == ([(False, "fragment", False)] * 2, [])


def test_a_pod_and_its_own_node(policies: Policies, tmp_path: Path) -> None:
    found = Replayed(
        policies,
        tmp_path,
        [
            tcp(NODE, 40000, BACKEND, 6379, "S"),
            tcp(BACKEND, 6379, NODE, 40000, "SA"),
            tcp("10.0.0.2", 40000, BACKEND, 6379, "S"),  # another node
        ],
    )
    assert [(allow, reason) for allow, reason, _ in found.verdicts] == [
        (True, "own-node"),
        (True, "own-node"),
        (False, "no-rule"),
    ]


def test_what_cannot_be_read_is_denied_and_what_was_not_captured_is_not_judged(
    policies: Policies, tmp_path: Path
) -> None:
    short = bytes(tcp(CLIENT, 40000, FRONTEND, 80, "S"))[:30]
    found = Replayed(policies, tmp_path, [(1e9, short)])
    assert (found.verdicts, found.replay.cut) == ([(False, "malformed", False)], 0)
    found = Replayed(policies, tmp_path, [tcp(CLIENT, 40000, FRONTEND, 80, "S")], snaplen=30)
    assert (found.verdicts, found.replay.cut) == ([], 1)
    found = Replayed(policies, tmp_path, [tcp(CLIENT, 40000, FRONTEND, 80, "S") / bytes(99)], snaplen=40)
    assert (found.verdicts, found.flows[0].bytes) == ([(True, "policy-rule", False)], (139, 0))


# ---- packets that were captured more than once ------------------------------------------------------


def at(when: float, packet: Packet, *, outgoing: bool = False) -> Frame:
    """A packet in a Linux cooked frame, as `tcpdump -i any` takes it."""
    frame = captures.frame(captures.COOKED, bytes(packet))
    return when, (b"\0\4" if outgoing else b"\0\0") + frame[2:]


def test_a_packet_on_its_way_through_the_node_counts_once(policies: Policies, tmp_path: Path) -> None:
    opens = tcp(CLIENT, 40000, FRONTEND, 80, "S", id=1, ttl=64)
    forwarded = tcp(CLIENT, 40000, FRONTEND, 80, "S", id=1, ttl=63)
    forwarded[TCP].chksum = 0x1234  # filled in by the interface that sends
    later = tcp(CLIENT, 40000, FRONTEND, 80, "S", id=2, ttl=64)
    found = Replayed(
        policies,
        tmp_path,
        [
            at(1e9, opens),
            at(1e9 + 1e-4, forwarded, outgoing=True),
            at(1e9 + 2e-4, forwarded),
            at(1e9 + 1, later),
            at(1e9 + 2, later, outgoing=True),  # not within a moment
        ],
        linktype=captures.COOKED,
    )
    assert found.replay.again == 2
    assert [flow.packets for flow in found.flows] == [(3, 0)]


def test_what_is_sent_twice_counts_twice(policies: Policies, tmp_path: Path) -> None:
    same = udp(UI, 40000, BACKEND, 53)
    frames = [
        at(1e9, same),
        at(1e9 + 1e-5, same, outgoing=True),
        at(1e9 + 1e-4, same),
        at(1e9 + 1.1e-4, same, outgoing=True),
    ]
    found = Replayed(policies, tmp_path, frames, linktype=captures.COOKED)
    assert (found.replay.again, found.flows[0].packets) == (2, (2, 0))
    found = Replayed(policies, tmp_path, [(1e9, bytes(same)), (1e9, bytes(same))])
    assert (found.replay.again, found.flows[0].packets) == (0, (2, 0))


# ---- many, and chosen ones --------------------------------------------------------------------------


def test_more_flows_than_the_table_begins_with(policies: Policies, tmp_path: Path) -> None:
    packets = [tcp(CLIENT, 1024 + number, FRONTEND, 80, "S") for number in range(3000)]
    answers = [tcp(FRONTEND, 80, CLIENT, 1024 + number, "SA") for number in range(3000)]
    found = Replayed(policies, tmp_path, [*packets, *answers])
    assert len(found.flows) == 3000
    assert [flow.flow.sport for flow in found.flows] == list(range(1024, 4024))
    assert {flow.packets for flow in found.flows} == {(1, 1)}
    ((talk, number),) = found.replay.talks()
    assert (number, talk.packets, talk.bytes, talk.opened) == (3000, (3000, 3000), (120000, 120000), 3000)
    assert talk.flow == found.flows[0].flow._replace(sport=0)
    assert (talk.first_ns, talk.last_ns) == (found.flows[0].first_ns, found.flows[-1].last_ns)


def test_flows_are_taken_together_only_where_all_but_the_port_is_the_same(
    policies: Policies, tmp_path: Path
) -> None:
    packets = [
        tcp(CLIENT, 40000, FRONTEND, 80, "S"),
        tcp(FRONTEND, 80, CLIENT, 40000, "SA"),
        tcp(CLIENT, 40001, FRONTEND, 80, "S"),  # not answered
        tcp(CLIENT, 40001, FRONTEND, 81, "S"),  # another port
        tcp(FRONTEND, 80, CLIENT, 40002, "SA"),  # not seen to open
    ]
    found = Replayed(policies, tmp_path, packets)
    assert [
        (talk.flow.dport, talk.answered, talk.began, number) for talk, number in found.replay.talks()
    ] == [
        (80, True, Began.OPENED, 1),
        (80, False, Began.OPENED, 1),
        (81, False, Began.OPENED, 1),
        (80, True, Began.ANSWERED, 1),
    ]


def test_a_filter_chooses_packets(policies: Policies, tmp_path: Path) -> None:
    packets = [tcp(CLIENT, 40000, FRONTEND, 80, "S"), udp(UI, 40000, BACKEND, 53)]
    found = Replayed(policies, tmp_path, packets, linktype=captures.ETHERNET, chosen="udp port 53")
    assert (len(found.events), found.replay.unmatched) == (1, 1)
    assert found.events[0].packet.flow.protocol == 17


def test_a_filter_of_another_link_type_is_refused(policies: Policies) -> None:
    with pytest.raises(ValueError, match="raw IP"):
        policies.replay(Filter("vlan", linktype=captures.ETHERNET))


# ---- the summary ------------------------------------------------------------------------------------


def test_who_talked_to_whom_and_who_decided(policies: Policies, tmp_path: Path) -> None:
    found = Replayed(
        policies,
        tmp_path,
        [
            tcp(CLIENT, 40000, FRONTEND, 80, "S"),
            tcp(CLIENT, 40001, FRONTEND, 80, "S"),
            tcp(CLIENT, 40002, BACKEND, 6379, "S"),
            tcp(OUTSIDE, 40000, BACKEND, 6379, "S"),
            tcp(OUTSIDE, 40000, "198.51.100.7", 443, "S"),
        ],
    )
    summary = summarise(found.replay.talks(), policies)
    assert [
        (talk.source, talk.destination, talk.port, talk.allow, count.flows, count.packets)
        for talk, count in summary.talks
    ] == [
        (OUTSIDE, "stars/backend", 6379, False, 1, 1),
        ("client/client", "stars/backend", 6379, False, 1, 1),
        ("client/client", "stars/frontend", 80, True, 2, 2),
    ]
    assert [(key, count.flows) for key, count in summary.by_policy] == [(Key("stars", "frontend"), 2)]
    ((isolating, direction, count),) = summary.denied_by
    assert ([str(key) for key in isolating], str(direction), count.flows) == (
        ["stars/allow-ui", "stars/backend", "stars/default-deny"],
        "ingress",
        2,
    )
    assert summary.outside.flows == 1


def test_what_other_policies_would_change(policies: Policies, tmp_path: Path) -> None:
    found = Replayed(
        policies,
        tmp_path,
        [
            tcp(CLIENT, 40000, FRONTEND, 80, "S"),
            tcp(CLIENT, 40001, BACKEND, 6379, "S"),
            tcp(NODE, 40002, BACKEND, 6379, "S"),  # own node: allowed by both
            tcp(BACKEND, 6379, FRONTEND, 40003, "SA"),
        ],
    )
    closed = Policies(read_paths([STARS / "pods.yaml", STARS / "01-default-deny.yaml"]).snapshot)
    opened = Policies(read_paths([STARS / "pods.yaml"]).snapshot)
    assert changes(found.replay.talks(), policies, policies) == []
    denied = changes(found.replay.talks(), policies, closed)
    assert [(talk.source, talk.destination, talk.allow, talk.reason) for talk, _ in denied] == [
        ("client/client", "stars/frontend", False, Reason.NO_RULE),
        ("stars/frontend", "stars/backend", False, Reason.NO_RULE),
    ]
    allowed = changes(found.replay.talks(), policies, opened)
    assert [(talk.source, talk.destination, talk.allow, talk.reason) for talk, _ in allowed] == [
        ("client/client", "stars/backend", True, Reason.NOT_ISOLATED)
    ]
