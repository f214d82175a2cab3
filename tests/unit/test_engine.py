"""Verdicts: one row per case of one small node, then what tables, caches, counters and events promise."""

from __future__ import annotations

import gc
import logging
import threading
import time
import weakref
from typing import Any, NamedTuple

import pytest

from dataplane._engine import Publisher, Worker, judge, judge_flow
from dataplane._rules import RuleTable
from dataplane.addresses import parse_address, parse_prefix
from dataplane.model import Direction, Key, PortRange, Rule
from dataplane.policy.compile import Compiler, PodEntry, rule_of
from dataplane.policy.effective import DirectionRules
from dataplane.reasons import Reason
from dataplane.verdict import Verdict

logging.getLogger("scapy.runtime").setLevel(logging.ERROR)
from scapy.layers.inet import ICMP, IP, TCP, UDP  # noqa: E402
from scapy.layers.inet6 import (  # noqa: E402
    ICMPv6DestUnreach,
    ICMPv6EchoReply,
    ICMPv6EchoRequest,
    ICMPv6MLReport,
    ICMPv6ND_NS,
    IPv6,
)

EGRESS, INGRESS = Direction.EGRESS, Direction.INGRESS
E, I = 1, 2  # noqa: E741
R = Reason
LOCAL_IN = 1

# Interfaces: pods 11…, uplink 2, bridge 3.
UPLINK, BRIDGE = 2, 3
A, B, C, OPEN, BRANCH, NEW, BRIDGED, ROUTER, NAMELESS = 11, 12, 13, 14, 15, 16, 17, 18, 19
NODE4, NODE6 = "192.168.0.1", "fd00:1::1"


def ip(text: str) -> bytes:
    return parse_address(text)


def direction_rules(*rules: tuple[str, tuple[int, ...]], protocol: int = 6) -> DirectionRules:
    return DirectionRules(
        tuple(
            (
                Key("x", "policy"),
                Rule(parse_prefix(cidr)[0], (), tuple(PortRange(protocol, p, p) for p in ports), i),
            )
            for i, (cidr, ports) in enumerate(rules)
        )
    )


NOTHING = direction_rules()
WEB = direction_rules(("10.0.0.0/24", (80,)), ("fd00::/64", (80,)), ("10.0.0.0/24", (443,)))
OUT = direction_rules(("10.0.0.0/16", (80, 443)), ("fd00::/16", (80,)), ("192.0.2.0/24", (80,)))
ANY = direction_rules(("0.0.0.0/0", ()), ("::/0", ()))


def pod(name: str, device: int, *addresses: str, **more: Any) -> PodEntry:
    return PodEntry(Key("x", name), tuple(map(ip, addresses)), (device,), **more)


PODS = [
    pod("a", A, "10.0.0.1", "fd00::1", egress=OUT),  # isolated for egress
    pod("b", B, "10.0.0.2", "fd00::2", ingress=WEB),  # isolated for ingress
    pod("c", C, "10.0.0.3", "fd00::3", ingress=NOTHING, egress=NOTHING),  # denies everything
    pod("open", OPEN, "10.0.0.4", "fd00::4"),
    pod("branch", BRANCH, "10.0.0.5", "fd00::5", ingress=NOTHING, egress=NOTHING, branch=True),
    pod("new", NEW, "10.0.0.6", unknown=True),
    pod("bridged", BRIDGED, "10.0.0.7", ingress=WEB, bridge=BRIDGE),
    pod("nameless", NAMELESS, unknown=True),
    pod("router", ROUTER, "10.0.0.8", egress=OUT, spoof_check=False),
]
BY_NAME = {entry.key.name: entry for entry in PODS}


@pytest.fixture(scope="module")
def table() -> RuleTable:
    return Compiler().table(1, PODS, [ip(NODE4), ip(NODE6)])


def tcp(src: str, dst: str, dport: int = 80, sport: int = 1234, **more: Any) -> bytes:
    network = IPv6 if ":" in src else IP
    return bytes(network(src=src, dst=dst, **more) / TCP(sport=sport, dport=dport))


def back(src: str, dst: str, sport: int = 80) -> bytes:
    """A reply: the server's `sport` to the client's 1234."""
    return tcp(src, dst, dport=1234, sport=sport)


def error(src: str, quoted: bytes) -> bytes:
    """An ICMP error from `src` to whoever sent `quoted`."""
    if quoted[0] >> 4 == 4:
        return bytes(IP(src=src, dst=IP(quoted).src) / ICMP(type=3, code=4) / quoted[:28])
    return bytes(IPv6(src=src, dst=IPv6(quoted).src) / ICMPv6DestUnreach() / quoted)


class Row(NamedTuple):
    what: str
    packet: bytes
    path: tuple[int, int]  # in, out
    expected: tuple[bool, Reason, Direction | None, int]
    ends: tuple[Reason, Reason]  # egress, ingress
    reply: bool = False
    hook: int = 2


ROWS = [
    # ---- rules of either end
    Row(
        "egress rule matches",
        tcp("10.0.0.1", "192.0.2.9"),
        (A, UPLINK),
        (True, R.POLICY_RULE, EGRESS, E),
        (R.POLICY_RULE, R.NOT_A_POD),
    ),
    Row(
        "no egress rule",
        tcp("10.0.0.1", "192.0.2.9", 81),
        (A, UPLINK),
        (False, R.NO_RULE, EGRESS, 0),
        (R.NO_RULE, R.NOT_A_POD),
    ),
    Row(
        "ingress rule matches",
        tcp("10.0.0.99", "10.0.0.2", 443),
        (UPLINK, B),
        (True, R.POLICY_RULE, INGRESS, I),
        (R.NOT_A_POD, R.POLICY_RULE),
    ),
    Row(
        "no ingress rule",
        tcp("10.0.1.99", "10.0.0.2"),
        (UPLINK, B),
        (False, R.NO_RULE, INGRESS, 0),
        (R.NOT_A_POD, R.NO_RULE),
    ),
    Row(
        "both ends allow",
        tcp("10.0.0.1", "10.0.0.2"),
        (A, B),
        (True, R.POLICY_RULE, EGRESS, E | I),
        (R.POLICY_RULE, R.POLICY_RULE),
    ),
    Row(
        "both ends allow, IPv6",
        tcp("fd00::1", "fd00::2"),
        (A, B),
        (True, R.POLICY_RULE, EGRESS, E | I),
        (R.POLICY_RULE, R.POLICY_RULE),
    ),
    Row(
        "egress allows, ingress denies",
        tcp("10.0.0.1", "10.0.0.3"),
        (A, C),
        (False, R.NO_RULE, INGRESS, 0),
        (R.POLICY_RULE, R.NO_RULE),
    ),
    Row(
        "both deny: egress is named",
        tcp("10.0.0.3", "10.0.0.2", 81),
        (C, B),
        (False, R.NO_RULE, EGRESS, 0),
        (R.NO_RULE, R.NO_RULE),
    ),
    Row(
        "the other direction of a pod is free",
        tcp("10.0.0.2", "10.0.0.1"),
        (B, A),
        (True, R.NOT_ISOLATED, EGRESS, 0),
        (R.NOT_ISOLATED, R.NOT_ISOLATED),
    ),
    Row(
        "rules decide over freedom",
        tcp("10.0.0.4", "10.0.0.2"),
        (OPEN, B),
        (True, R.POLICY_RULE, INGRESS, I),
        (R.NOT_ISOLATED, R.POLICY_RULE),
    ),
    Row(
        "not isolated and no pod",
        tcp("10.0.0.4", "8.8.8.8"),
        (OPEN, UPLINK),
        (True, R.NOT_ISOLATED, EGRESS, 0),
        (R.NOT_ISOLATED, R.NOT_A_POD),
    ),
    Row(
        "no pod and not isolated",
        tcp("8.8.8.8", "10.0.0.4"),
        (UPLINK, OPEN),
        (True, R.NOT_ISOLATED, INGRESS, 0),
        (R.NOT_A_POD, R.NOT_ISOLATED),
    ),
    Row(
        "no pod at all",
        tcp("8.8.8.8", "9.9.9.9"),
        (UPLINK, 99),
        (True, R.NOT_A_POD, None, 0),
        (R.NOT_A_POD, R.NOT_A_POD),
    ),
    Row(
        "protocol counts",
        bytes(IP(src="10.0.0.1", dst="192.0.2.9") / UDP(sport=1, dport=80)),
        (A, UPLINK),
        (False, R.NO_RULE, EGRESS, 0),
        (R.NO_RULE, R.NOT_A_POD),
    ),
    Row(
        "an echo is no port",
        bytes(IP(src="10.0.0.1", dst="192.0.2.9") / ICMP(type=8)),
        (A, UPLINK),
        (False, R.NO_RULE, EGRESS, 0),
        (R.NO_RULE, R.NOT_A_POD),
    ),
    Row(
        "the pod is found by its interface, not by its address",
        tcp("10.0.0.1", "10.0.0.2"),
        (UPLINK, 99),
        (True, R.NOT_A_POD, None, 0),
        (R.NOT_A_POD, R.NOT_A_POD),
    ),
    # ---- replies: the flow is judged as its originator opened it
    Row(
        "reply of an allowed flow",
        back("192.0.2.9", "10.0.0.1"),
        (UPLINK, A),
        (True, R.REPLY, EGRESS, E),
        (R.POLICY_RULE, R.NOT_A_POD),
        reply=True,
    ),
    Row(
        "reply of a denied flow",
        back("192.0.2.9", "10.0.0.1", 81),
        (UPLINK, A),
        (False, R.NO_RULE, EGRESS, 0),
        (R.NO_RULE, R.NOT_A_POD),
        reply=True,
    ),
    Row(
        "reply between two pods",
        back("10.0.0.2", "10.0.0.1"),
        (B, A),
        (True, R.REPLY, EGRESS, E | I),
        (R.POLICY_RULE, R.POLICY_RULE),
        reply=True,
    ),
    Row(
        "reply of a pod to a client outside",
        back("10.0.0.2", "10.0.0.99"),
        (B, UPLINK),
        (True, R.REPLY, INGRESS, I),
        (R.NOT_A_POD, R.POLICY_RULE),
        reply=True,
    ),
    Row(
        "reply without policies",
        back("8.8.8.8", "10.0.0.4"),
        (UPLINK, OPEN),
        (True, R.REPLY, EGRESS, 0),
        (R.NOT_ISOLATED, R.NOT_A_POD),
        reply=True,
    ),
    Row(
        "a packet not marked reply opens a flow",
        back("10.0.0.2", "10.0.0.3"),
        (B, C),
        (False, R.NO_RULE, INGRESS, 0),
        (R.NOT_ISOLATED, R.NO_RULE),
    ),
    # ---- ICMP errors
    Row(
        "error about a flow that a opened",
        error("192.0.2.1", tcp("10.0.0.1", "192.0.2.9")),
        (UPLINK, A),
        (True, R.RELATED, EGRESS, 0),
        (R.POLICY_RULE, R.NOT_A_POD),
        reply=True,
    ),
    Row(
        "error about a flow that a may not open",
        error("192.0.2.1", tcp("10.0.0.1", "192.0.2.9", 81)),
        (UPLINK, A),
        (False, R.NO_RULE, EGRESS, 0),
        (R.NO_RULE, R.NOT_A_POD),
        reply=True,
    ),
    Row(
        "a's own error about a reply",
        error("10.0.0.1", back("192.0.2.9", "10.0.0.1")),
        (A, UPLINK),
        (True, R.RELATED, EGRESS, 0),
        (R.POLICY_RULE, R.NOT_A_POD),
    ),
    Row(
        "b's error about a request that b allows",
        error("10.0.0.2", tcp("10.0.0.99", "10.0.0.2")),
        (B, UPLINK),
        (True, R.RELATED, INGRESS, 0),
        (R.NOT_A_POD, R.POLICY_RULE),
        reply=True,
    ),
    Row(
        "a client's error about b's reply",
        error("10.0.0.99", back("10.0.0.2", "10.0.0.99")),
        (UPLINK, B),
        (True, R.RELATED, INGRESS, 0),
        (R.NOT_A_POD, R.POLICY_RULE),
    ),
    Row(
        "a client's error about a reply that b never sent",
        error("10.0.0.99", back("10.0.0.2", "10.0.0.99", 81)),
        (UPLINK, B),
        (False, R.NO_RULE, INGRESS, 0),
        (R.NOT_A_POD, R.NO_RULE),
    ),
    Row(
        "error over IPv6",
        error("2001:db8::1", tcp("fd00::1", "fd00:2::1")),
        (UPLINK, A),
        (True, R.RELATED, EGRESS, 0),
        (R.POLICY_RULE, R.NOT_A_POD),
        reply=True,
    ),
    Row(
        "error about a pod's own flow to itself",
        error("10.0.0.3", tcp("10.0.0.3", "10.0.0.3")),
        (C, C),
        (True, R.SAME_POD, EGRESS, 0),
        (R.SAME_POD, R.SAME_POD),
        reply=True,
    ),
    Row(
        "an error from an address that is not the pod's",
        error("10.0.0.77", back("192.0.2.9", "10.0.0.1")),
        (A, UPLINK),
        (False, R.SPOOFED, EGRESS, 0),
        (R.SPOOFED, R.NONE),
    ),
    # ---- own node
    Row(
        "branch pod to its node",
        tcp("10.0.0.5", NODE4, 10250),
        (BRANCH, UPLINK),
        (True, R.OWN_NODE, EGRESS, E),
        (R.OWN_NODE, R.NOT_A_POD),
    ),
    Row(
        "branch pod to its node, IPv6",
        tcp("fd00::5", NODE6),
        (BRANCH, UPLINK),
        (True, R.OWN_NODE, EGRESS, E),
        (R.OWN_NODE, R.NOT_A_POD),
    ),
    Row(
        "branch pod to another node",
        tcp("10.0.0.5", "192.168.0.2"),
        (BRANCH, UPLINK),
        (False, R.NO_RULE, EGRESS, 0),
        (R.NO_RULE, R.NOT_A_POD),
    ),
    Row(
        "reply of a branch pod to its node",
        back("10.0.0.5", NODE4),
        (BRANCH, UPLINK),
        (True, R.OWN_NODE, INGRESS, I),
        (R.NOT_A_POD, R.OWN_NODE),
        reply=True,
    ),
    Row(
        "an ordinary pod reaches its node otherwise",
        tcp("10.0.0.3", NODE4),
        (C, UPLINK),
        (False, R.NO_RULE, EGRESS, 0),
        (R.NO_RULE, R.NOT_A_POD),
    ),
    Row(
        "the node's address from a pod's interface opens nothing",
        tcp(NODE4, "10.0.0.3"),
        (ROUTER, C),
        (False, R.NO_RULE, INGRESS, 0),
        (R.POLICY_RULE, R.NO_RULE),
    ),
    Row(
        "nor do replies to it",
        back("10.0.0.3", NODE4),
        (C, ROUTER),
        (False, R.NO_RULE, INGRESS, 0),
        (R.POLICY_RULE, R.NO_RULE),
        reply=True,
    ),
    Row(
        "the node's address as a source from outside is a peer",
        tcp(NODE4, "10.0.0.3"),
        (UPLINK, C),
        (False, R.NO_RULE, INGRESS, 0),
        (R.NOT_A_POD, R.NO_RULE),
    ),
    # ---- forged sources
    Row(
        "forged source",
        tcp("10.0.0.2", "192.0.2.9"),
        (A, UPLINK),
        (False, R.SPOOFED, EGRESS, 0),
        (R.SPOOFED, R.NONE),
    ),
    Row(
        "forged source without any policy",
        tcp("10.0.0.2", "8.8.8.8"),
        (OPEN, UPLINK),
        (False, R.SPOOFED, EGRESS, 0),
        (R.SPOOFED, R.NONE),
    ),
    Row(
        "forged source in a reply",
        back("10.0.0.9", "10.0.0.1"),
        (B, A),
        (False, R.SPOOFED, INGRESS, 0),
        (R.NONE, R.SPOOFED),
        reply=True,
    ),
    Row(
        "forged link-local source in ordinary traffic",
        tcp("fe80::1", "fd00::2"),
        (A, B),
        (False, R.SPOOFED, EGRESS, 0),
        (R.SPOOFED, R.NONE),
    ),
    Row(
        "IPv4 address as low bits of an IPv6 source",
        tcp("::10.0.0.1", "fd00::2"),
        (A, B),
        (False, R.SPOOFED, EGRESS, 0),
        (R.SPOOFED, R.NONE),
    ),
    Row(
        "a pod that routes may send for others, unoffloaded",
        tcp("203.0.113.5", "192.0.2.9"),
        (ROUTER, UPLINK),
        (True, R.POLICY_RULE, EGRESS, 0),
        (R.POLICY_RULE, R.NOT_A_POD),
    ),
    # ---- a pod to itself
    Row(
        "same pod",
        tcp("10.0.0.3", "10.0.0.3", 9),
        (C, C),
        (True, R.SAME_POD, EGRESS, E | I),
        (R.SAME_POD, R.SAME_POD),
    ),
    Row(
        "same pod, reply",
        back("10.0.0.3", "10.0.0.3"),
        (C, C),
        (True, R.SAME_POD, EGRESS, E | I),
        (R.SAME_POD, R.SAME_POD),
        reply=True,
    ),
    Row(
        "same pod without isolation",
        tcp("10.0.0.4", "10.0.0.4"),
        (OPEN, OPEN),
        (True, R.SAME_POD, EGRESS, 0),
        (R.SAME_POD, R.SAME_POD),
    ),
    Row(
        "back to the same interface for somebody else",
        tcp("10.0.0.3", "10.0.0.99"),
        (C, C),
        (False, R.NO_RULE, EGRESS, 0),
        (R.NO_RULE, R.NO_RULE),
    ),
    # ---- neighbour discovery
    Row(
        "neighbour solicitation under default deny",
        bytes(IPv6(src="fd00::3", dst="fd00::2", hlim=255) / ICMPv6ND_NS(tgt="fd00::2")),
        (C, B),
        (True, R.NEIGHBOUR_DISCOVERY, None, 0),
        (R.NONE, R.NONE),
    ),
    Row(
        "duplicate address detection",
        bytes(IPv6(src="::", dst="ff02::1:ff00:3", hlim=255) / ICMPv6ND_NS(tgt="fd00::3")),
        (C, UPLINK),
        (True, R.NEIGHBOUR_DISCOVERY, None, 0),
        (R.NONE, R.NONE),
    ),
    Row(
        "neighbour solicitation with a forged source",
        bytes(IPv6(src="fd00::2", dst="fd00::1", hlim=255) / ICMPv6ND_NS(tgt="fd00::1")),
        (C, A),
        (False, R.SPOOFED, EGRESS, 0),
        (R.SPOOFED, R.NONE),
    ),
    Row(
        "MLD report",
        bytes(IPv6(src="fe80::3", dst="ff02::16", hlim=1) / ICMPv6MLReport()),
        (C, UPLINK),
        (True, R.NEIGHBOUR_DISCOVERY, None, 0),
        (R.NONE, R.NONE),
    ),
    Row(
        "forwarded neighbour discovery is ordinary",
        bytes(IPv6(src="fd00::3", dst="fd00::2", hlim=254) / ICMPv6ND_NS(tgt="fd00::2")),
        (C, B),
        (False, R.NO_RULE, EGRESS, 0),
        (R.NO_RULE, R.NO_RULE),
    ),
    # ---- strict mode
    Row(
        "unknown pod sends",
        tcp("10.0.0.6", "8.8.8.8"),
        (NEW, UPLINK),
        (False, R.NO_TABLE, EGRESS, 0),
        (R.NO_TABLE, R.NOT_A_POD),
    ),
    Row(
        "unknown pod without any address yet",
        tcp("10.0.0.66", "8.8.8.8"),
        (NAMELESS, UPLINK),
        (False, R.NO_TABLE, EGRESS, 0),
        (R.NO_TABLE, R.NOT_A_POD),
    ),
    Row(
        "unknown pod receives",
        tcp("8.8.8.8", "10.0.0.6"),
        (UPLINK, NEW),
        (False, R.NO_TABLE, INGRESS, 0),
        (R.NOT_A_POD, R.NO_TABLE),
    ),
    # ---- routed onto a bridge: no port is named
    Row(
        "bridged pod by its address",
        tcp("10.0.0.99", "10.0.0.7", 443),
        (UPLINK, BRIDGE),
        (True, R.POLICY_RULE, INGRESS, I),
        (R.NOT_A_POD, R.POLICY_RULE),
    ),
    Row(
        "bridged pod by its address, denied",
        tcp("10.0.1.99", "10.0.0.7"),
        (UPLINK, BRIDGE),
        (False, R.NO_RULE, INGRESS, 0),
        (R.NOT_A_POD, R.NO_RULE),
    ),
    Row(
        "bridged pod by its port",
        tcp("10.0.0.1", "10.0.0.7"),
        (A, BRIDGED),
        (True, R.POLICY_RULE, EGRESS, E | I),
        (R.POLICY_RULE, R.POLICY_RULE),
    ),
    Row(
        "reply to a client through the bridge",
        back("10.0.0.7", "10.0.0.99"),
        (BRIDGED, UPLINK),
        (True, R.REPLY, INGRESS, I),
        (R.NOT_A_POD, R.POLICY_RULE),
        reply=True,
    ),
    Row(
        "a routed pod is never found by its address",
        tcp("10.0.0.99", "10.0.0.3"),
        (UPLINK, BRIDGE),
        (True, R.NOT_A_POD, None, 0),
        (R.NOT_A_POD, R.NOT_A_POD),
    ),
    Row(
        "nor a bridged one on another device",
        tcp("10.0.1.99", "10.0.0.7"),
        (UPLINK, 98),
        (True, R.NOT_A_POD, None, 0),
        (R.NOT_A_POD, R.NOT_A_POD),
    ),
    # ---- to the node itself
    Row(
        "local service address is an egress peer",
        tcp("10.0.0.3", "169.254.20.10", 53),
        (C, 0),
        (False, R.NO_RULE, EGRESS, 0),
        (R.NO_RULE, R.NOT_A_POD),
        hook=LOCAL_IN,
    ),
    Row(
        "local service address that a rule allows",
        tcp("10.0.0.1", "10.0.77.1"),
        (A, 0),
        (True, R.POLICY_RULE, EGRESS, E),
        (R.POLICY_RULE, R.NOT_A_POD),
        hook=LOCAL_IN,
    ),
    Row(
        "no own-node exception in LOCAL_IN",
        tcp("10.0.0.5", NODE4),
        (BRANCH, 0),
        (False, R.NO_RULE, EGRESS, 0),
        (R.NO_RULE, R.NOT_A_POD),
        hook=LOCAL_IN,
    ),
    Row(
        "reply to what the node opened",
        back("10.0.0.3", "169.254.20.10"),
        (C, 0),
        (True, R.REPLY, None, 0),
        (R.NOT_A_POD, R.NOT_A_POD),
        reply=True,
        hook=LOCAL_IN,
    ),
    Row(
        "forged source to the node",
        tcp("10.0.0.9", "169.254.20.10"),
        (C, 0),
        (False, R.SPOOFED, EGRESS, 0),
        (R.SPOOFED, R.NONE),
        hook=LOCAL_IN,
    ),
    # ---- not to be read
    Row(
        "malformed", tcp("10.0.0.1", "10.0.0.2")[:30], (A, B), (False, R.MALFORMED, None, 0), (R.NONE, R.NONE)
    ),
    Row(
        "later fragment",
        bytes(IP(src="10.0.0.4", dst="8.8.8.8", frag=9, proto=17) / bytes(8)),
        (OPEN, UPLINK),
        (False, R.FRAGMENT, None, 0),
        (R.NONE, R.NONE),
    ),
    Row(
        "first fragment is judged by its ports",
        bytes(IP(src="10.0.0.1", dst="192.0.2.9", flags="MF") / TCP(sport=1, dport=80)),
        (A, UPLINK),
        (True, R.POLICY_RULE, EGRESS, E),
        (R.POLICY_RULE, R.NOT_A_POD),
    ),
]


def short(verdict: Verdict) -> tuple[bool, Reason, Direction | None, int]:
    return verdict.allow, verdict.reason, verdict.direction, verdict.bits


@pytest.mark.parametrize("row", ROWS, ids=[row.what for row in ROWS])
def test_verdict(row: Row, table: RuleTable) -> None:
    path = {"indev": row.path[0], "outdev": row.path[1], "hook": row.hook, "reply": row.reply}
    verdict = judge(table, row.packet, **path)
    assert short(verdict) == row.expected
    assert (verdict.egress.reason, verdict.ingress.reason) == row.ends
    assert not verdict.cached
    # A worker says the same, from the rules and from its cache, whichever direction comes first.
    publisher = Publisher()
    publisher.publish(table)
    worker = Worker(publisher)
    assert worker.judge(row.packet, **path) == verdict
    again = worker.judge(row.packet, **path)
    assert again._replace(cached=False) == verdict
    assert worker.cache_stats()[0] == again.cached


def test_rows_are_distinct() -> None:
    assert len({row.what for row in ROWS}) == len(ROWS)


def test_ends_name_pods_and_rules(table: RuleTable) -> None:
    verdict = judge(table, tcp("10.0.0.1", "10.0.0.2", 443), indev=A, outdev=B)
    assert verdict.egress == (BY_NAME["a"], Reason.POLICY_RULE, 0)
    assert verdict.ingress == (BY_NAME["b"], Reason.POLICY_RULE, 2)
    ruleset = table.ingress(1)
    assert ruleset is not None
    assert rule_of(ruleset, 2) == (Key("x", "policy"), WEB.rules[2][1])
    assert judge(table, tcp("10.0.0.1", "8.8.8.8"), indev=A, outdev=UPLINK).egress == (
        BY_NAME["a"],
        Reason.NO_RULE,
        -1,
    )


def test_without_a_table_everything_is_denied() -> None:
    worker = Worker(Publisher())
    for verdict in (judge(None, tcp("1.1.1.1", "2.2.2.2")), worker.judge(tcp("1.1.1.1", "2.2.2.2"))):
        assert short(verdict) == (False, Reason.NO_TABLE, None, 0)
    assert judge(None, b"\x45").reason is Reason.MALFORMED


def test_bad_arguments_are_errors(table: RuleTable) -> None:
    with pytest.raises(ValueError, match="hook"):
        judge(table, b"", hook=3)
    with pytest.raises(ValueError, match="shorter than"):
        judge(table, bytes(40), wire=39)
    with pytest.raises(ValueError, match="one family"):
        judge_flow(table, bytes(4), bytes(16), 6, 1, 2)
    with pytest.raises(OverflowError):
        judge(table, b"", indev=-1)


FLOWS = [
    ("10.0.0.1", "192.0.2.9", 80, (True, Reason.POLICY_RULE, EGRESS, E)),
    ("10.0.0.1", "192.0.2.9", 81, (False, Reason.NO_RULE, EGRESS, 0)),
    ("10.0.0.99", "10.0.0.7", 80, (True, Reason.POLICY_RULE, INGRESS, I)),
    ("10.0.0.3", "10.0.0.3", 80, (True, Reason.SAME_POD, EGRESS, E | I)),
    ("10.0.0.5", NODE4, 80, (True, Reason.OWN_NODE, EGRESS, E)),
    (NODE4, "10.0.0.5", 80, (True, Reason.OWN_NODE, INGRESS, I)),
    (NODE4, "10.0.0.3", 80, (False, Reason.NO_RULE, INGRESS, 0)),
    ("8.8.8.8", "9.9.9.9", 80, (True, Reason.NOT_A_POD, None, 0)),
    ("fd00::1", "fd00::2", 80, (True, Reason.POLICY_RULE, EGRESS, E | I)),
]


@pytest.mark.parametrize(("src", "dst", "port", "expected"), FLOWS)
def test_live_flow_by_its_addresses(
    table: RuleTable, src: str, dst: str, port: int, expected: tuple[bool, Reason, Direction | None, int]
) -> None:
    assert short(judge_flow(table, ip(src), ip(dst), 6, 1234, port)) == expected


def test_ports_of_protocols_without_ports_mean_nothing() -> None:
    entry = pod("p", A, "10.0.0.1", egress=direction_rules(("0.0.0.0/0", (0,)), protocol=1))
    table = Compiler().table(1, [entry], ())
    assert judge_flow(table, ip("10.0.0.1"), ip("8.8.8.8"), 1, 77, 0x0800).allow
    assert judge(table, bytes(IP(src="10.0.0.1", dst="8.8.8.8") / ICMP(type=8)), indev=A).allow


# ---- the cache


def test_both_directions_share_one_entry(table: RuleTable) -> None:
    publisher = Publisher()
    publisher.publish(table)
    pairs = [
        (tcp("10.0.0.1", "10.0.0.2"), back("10.0.0.2", "10.0.0.1")),
        (tcp("fd00::1", "fd00::2"), back("fd00::2", "fd00::1")),
        (
            bytes(IP(src="10.0.0.1", dst="10.0.0.2") / ICMP(type=8, id=7)),
            bytes(IP(src="10.0.0.2", dst="10.0.0.1") / ICMP(type=0, id=7)),
        ),
        (
            bytes(IPv6(src="fd00::1", dst="fd00::2") / ICMPv6EchoRequest(id=7)),
            bytes(IPv6(src="fd00::2", dst="fd00::1") / ICMPv6EchoReply(id=7)),
        ),
    ]
    for there, reply in pairs:
        worker = Worker(publisher)
        assert not worker.judge(there, indev=A, outdev=B).cached
        assert worker.judge(reply, indev=B, outdev=A, reply=True).cached
        other = Worker(publisher)
        assert not other.judge(reply, indev=B, outdev=A, reply=True).cached
        assert other.judge(there, indev=A, outdev=B).cached
        assert other.cache_stats() == (1, 1)


def test_icmp_errors_stay_out_of_the_cache(table: RuleTable) -> None:
    publisher = Publisher()
    publisher.publish(table)
    worker = Worker(publisher)
    packet = error("192.0.2.1", tcp("10.0.0.1", "192.0.2.9"))
    for _ in range(3):
        assert not worker.judge(packet, indev=UPLINK, outdev=A, reply=True).cached
    assert worker.cache_stats() == (0, 0)
    assert not worker.judge(tcp("10.0.0.1", "192.0.2.9"), indev=A, outdev=UPLINK).cached


def test_a_cached_flow_does_not_cover_a_forged_packet(table: RuleTable) -> None:
    publisher = Publisher()
    publisher.publish(table)
    worker = Worker(publisher)
    good = tcp("10.0.0.1", "192.0.2.9")
    assert worker.judge(good, indev=A, outdev=UPLINK).allow
    assert worker.judge(good, indev=OPEN, outdev=UPLINK).reason is Reason.SPOOFED
    assert worker.judge(good, indev=A, outdev=UPLINK).cached


def test_a_new_table_overrules_the_cache(table: RuleTable) -> None:
    publisher = Publisher()
    publisher.publish(table)
    worker = Worker(publisher)
    packet = tcp("10.0.0.1", "192.0.2.9")
    assert worker.judge(packet, indev=A, outdev=UPLINK).allow
    publisher.publish(Compiler().table(2, [pod("a", A, "10.0.0.1", egress=NOTHING)], ()))
    assert short(worker.judge(packet, indev=A, outdev=UPLINK)) == (False, Reason.NO_RULE, EGRESS, 0)
    publisher.publish(None)
    assert worker.judge(packet, indev=A, outdev=UPLINK).reason is Reason.NO_TABLE
    publisher.publish(Compiler().table(3, [pod("a", A, "10.0.0.1")], ()))
    assert worker.judge(packet, indev=A, outdev=UPLINK).reason is Reason.NOT_ISOLATED


def test_a_burst_keeps_its_table(table: RuleTable) -> None:
    publisher = Publisher()
    publisher.publish(table)
    worker = Worker(publisher)
    worker.enter()
    publisher.publish(Compiler().table(2, [], ()))
    assert not publisher.quiesced()
    assert publisher.held == 2
    worker.leave()
    assert publisher.quiesced()
    assert publisher.held == 1


# ---- publication


def test_generations_must_grow(table: RuleTable) -> None:
    publisher = Publisher()
    publisher.publish(Compiler().table(5, [], ()))
    for generation in (4, 5):
        with pytest.raises(ValueError, match="not above 5"):
            publisher.publish(Compiler().table(generation, [], ()))
    assert publisher.table is not None
    publisher.publish(publisher.table)
    assert publisher.table.generation == 5


def test_an_old_table_is_freed_when_its_last_reader_leaves() -> None:
    publisher = Publisher()
    worker, idle = Worker(publisher), Worker(publisher)
    old = Compiler().table(1, PODS, ())
    gone = weakref.ref(old)
    publisher.publish(old)
    worker.enter()
    del old
    publisher.publish(Compiler().table(2, [], ()))
    assert publisher.quiesced() is False
    gc.collect()
    assert gone() is not None
    worker.leave()
    assert publisher.quiesced() is True
    gc.collect()
    assert gone() is None
    idle.enter()
    assert publisher.quiesced() is True  # it announces the table in force


def test_a_worker_that_is_gone_holds_nothing() -> None:
    publisher = Publisher()
    publisher.publish(Compiler().table(1, [], ()))
    worker = Worker(publisher)
    worker.enter()
    publisher.publish(Compiler().table(2, [], ()))
    assert not publisher.quiesced()
    del worker
    gc.collect()
    assert publisher.quiesced()


def test_equal_rules_are_compiled_once() -> None:
    compiler = Compiler()
    first = compiler.table(1, PODS, ())
    rules = first.ingress(1)
    assert rules is first.ingress(6)
    assert (
        compiler.table(2, [pod("z", A, "10.9.9.9", ingress=DirectionRules(WEB.rules))], ()).ingress(0)
        is rules
    )
    gone = weakref.ref(rules)  # type: ignore[arg-type]
    del first, rules
    gc.collect()
    assert gone() is None


def test_tables_change_under_threads() -> None:
    """Workers judge without the GIL while tables come and go; nobody sees a freed one."""
    publisher = Publisher()
    compiler = Compiler()
    publisher.publish(compiler.table(1, PODS, ()))
    load = [(tcp("10.0.0.1", "192.0.2.9", port), A, UPLINK, False) for port in range(60, 124)]
    workers = [Worker(publisher, cache_entries=64), Worker(publisher, cache_entries=0)]
    stop = threading.Event()
    counts: list[int] = []

    def work(worker: Worker) -> None:
        done = 0
        while not stop.is_set():
            worker.bench_judge(load, rounds=20, burst=16)
            done += 20 * len(load)
        counts.append(done)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for generation in range(2, 400):
        # Even tables let port 80 out of a, odd ones nothing.
        egress = OUT if generation % 2 == 0 else DirectionRules(NOTHING.rules)
        publisher.publish(compiler.table(generation, [pod("a", A, "10.0.0.1", egress=egress)], ()))
    stop.set()
    for thread in threads:
        thread.join()
    deadline = time.monotonic() + 5
    while not publisher.quiesced():
        assert time.monotonic() < deadline
    assert publisher.held == 1
    for worker in workers:
        counted = worker.counters()
        assert {key[2] for key in counted} <= {Reason.POLICY_RULE, Reason.NO_RULE}
    assert sum(packets for worker in workers for packets, _ in worker.counters().values()) == sum(counts)


# ---- counters and events


def test_counters(table: RuleTable) -> None:
    publisher = Publisher()
    publisher.publish(table)
    worker = Worker(publisher)
    good = tcp("10.0.0.1", "192.0.2.9")
    for _ in range(3):
        worker.judge(good, indev=A, outdev=UPLINK)
    worker.judge(tcp("10.0.0.9", "10.0.0.3"), indev=UPLINK, outdev=C)
    worker.judge(b"\x45", indev=A)
    assert worker.counters() == {
        (True, "egress", Reason.POLICY_RULE): (3, 120),
        (False, "ingress", Reason.NO_RULE): (1, 40),
        (False, "", Reason.MALFORMED): (1, 1),
    }
    assert worker.cache_stats() == (2, 2)


def test_bytes_are_those_of_the_wire(table: RuleTable) -> None:
    publisher = Publisher()
    publisher.publish(table)
    worker = Worker(publisher)
    header = bytes(IP(src="10.0.0.1", dst="192.0.2.9", len=64_000) / TCP(dport=80))
    assert worker.judge(header, indev=A, outdev=UPLINK, wire=64_000).allow
    assert worker.counters() == {(True, "egress", Reason.POLICY_RULE): (1, 64_000)}


def events_of(capture: int, table: RuleTable) -> list[tuple[bool, bool]]:
    publisher = Publisher()
    publisher.publish(table)
    worker = Worker(publisher, ring_entries=64)
    worker.capture = capture
    for port in (80, 80, 81):
        worker.judge(tcp("10.0.0.1", "192.0.2.9", port), indev=A, outdev=UPLINK)
    return [(event.verdict.allow, event.verdict.cached) for event in worker.events()]


@pytest.mark.parametrize(
    ("capture", "expected"),
    [
        (0, []),
        (1, [(False, False)]),
        (2, [(True, False), (False, False)]),
        (3, [(True, False), (True, True), (False, False)]),
    ],
)
def test_capture(capture: int, expected: list[tuple[bool, bool]], table: RuleTable) -> None:
    assert events_of(capture, table) == expected


def test_event_says_what_happened(table: RuleTable) -> None:
    publisher = Publisher()
    publisher.publish(table)
    worker = Worker(publisher, ring_entries=4)
    worker.capture = 3
    before = time.time_ns()
    verdict = worker.judge(back("10.0.0.2", "10.0.0.1"), indev=B, outdev=A, reply=True)
    worker.judge(b"\x45", indev=A)
    (event, broken) = worker.events()
    assert before <= event.when_ns <= time.time_ns()
    assert event.packet.flow[:5] == (ip("10.0.0.2"), ip("10.0.0.1"), 6, 80, 1234)
    assert (event.indev, event.outdev, event.hook, event.reply, event.generation) == (B, A, 2, True, 1)
    assert event.verdict == verdict
    assert event.verdict.egress.pod is BY_NAME["a"]
    assert broken.packet.reason is broken.verdict.reason is Reason.MALFORMED
    assert broken.packet.flow.src == b""
    assert worker.events() == []


def test_a_full_ring_loses_the_newest_and_says_so(table: RuleTable) -> None:
    publisher = Publisher()
    publisher.publish(table)
    worker = Worker(publisher, ring_entries=3)  # rounded up to 4
    worker.capture = 3
    for port in range(10):
        worker.judge(tcp("10.0.0.1", "192.0.2.9", port), indev=A, outdev=UPLINK)
    assert worker.events_lost == 6
    assert [e.packet.flow.dport for e in worker.events(limit=2)] == [0, 1]
    worker.judge(tcp("10.0.0.1", "192.0.2.9", 99), indev=A, outdev=UPLINK)
    assert [e.packet.flow.dport for e in worker.events()] == [2, 3, 99]


def test_events_of_tables_long_gone_keep_their_reasons(table: RuleTable) -> None:
    publisher = Publisher()
    publisher.publish(table)
    worker = Worker(publisher, ring_entries=4)
    worker.capture = 3
    worker.judge(tcp("10.0.0.1", "192.0.2.9"), indev=A, outdev=UPLINK)
    for generation in range(2, 40):
        publisher.publish(Compiler().table(generation, [], ()))
    (event,) = worker.events()
    assert not event.known
    assert event.generation == 1
    assert event.verdict.egress == (None, Reason.POLICY_RULE, 2)


def test_events_carry_the_beginning_of_their_packet_only_when_asked(table: RuleTable) -> None:
    publisher = Publisher()
    publisher.publish(table)
    worker = Worker(publisher, ring_entries=3)
    short = tcp("10.0.0.1", "192.0.2.9")
    long = bytes(IP(src="10.0.0.1", dst="192.0.2.9") / TCP(dport=80) / bytes(range(256)) / b"more")
    worker.capture = 3
    packets = [short, long, b"\x45", b""]
    for keep in (False, True, False):
        worker.keep_bytes = keep
        assert (worker.capture, worker.keep_bytes) == (3, keep)
        for _round in range(3):  # every slot of the ring, several times
            for packet in packets:
                worker.judge(packet, indev=A, outdev=UPLINK)
            expected = [short, long[:256], b"\x45", b""] if keep else [b""] * 4
            assert [event.data for event in worker.events()] == expected
    worker.keep_bytes = True
    worker.capture = 0
    worker.judge(short, indev=A, outdev=UPLINK)
    assert (worker.events(), worker.keep_bytes) == ([], True)


def test_without_a_ring_nothing_is_kept(table: RuleTable) -> None:
    publisher = Publisher()
    publisher.publish(table)
    worker = Worker(publisher)
    worker.capture, worker.keep_bytes = 3, True
    assert worker.judge(tcp("10.0.0.1", "192.0.2.9"), indev=A, outdev=UPLINK).allow
    assert worker.events() == []


def test_an_observer_lets_everything_pass_and_counts_for_nobody(table: RuleTable) -> None:
    publisher = Publisher()
    publisher.publish(table)
    table.take_tally()
    observer = Worker(publisher, ring_entries=8, observer=True)
    observer.capture = 3
    for packet, reason in (
        (tcp("10.0.0.1", "192.0.2.9"), Reason.POLICY_RULE),
        (tcp("10.0.0.1", "192.0.2.9", 81), Reason.NO_RULE),
        (tcp("10.0.0.9", "192.0.2.9"), Reason.SPOOFED),
        (b"\x45", Reason.MALFORMED),
    ):
        verdict = observer.judge(packet, indev=A, outdev=UPLINK)
        assert (verdict.allow, verdict.reason, verdict.bits) == (True, reason, 0)
    assert all(event.verdict.allow for event in observer.events())
    assert table.take_tally() == ([], [])
    assert Worker(publisher).judge(tcp("10.0.0.1", "192.0.2.9"), indev=A, outdev=UPLINK).bits == E


def test_a_proposal_is_what_judge_answers_and_leaves_no_trace(table: RuleTable) -> None:
    publisher = Publisher()
    publisher.publish(table)
    table.take_tally()
    worker = Worker(publisher, ring_entries=8)
    worker.capture = 3
    packets = [tcp("10.0.0.1", "192.0.2.9"), tcp("10.0.0.1", "192.0.2.9", 81), tcp("10.0.0.9", "192.0.2.9")]
    proposals = [worker.propose(packet, indev=A, outdev=UPLINK) for packet in [*packets, b"\x45"]]
    assert (worker.counters(), worker.events(), table.take_tally()) == ({}, [], ([], []))
    assert [one.verdict.reason for one in proposals] == [R.POLICY_RULE, R.NO_RULE, R.SPOOFED, R.MALFORMED]
    assert [one.data for one in proposals] == [*packets, b"\x45"]
    for packet, proposal in zip(packets, proposals, strict=False):
        assert proposal.verdict == worker.judge(packet, indev=A, outdev=UPLINK)
        assert proposal.generation == table.generation
        (event,) = worker.events()
        assert proposal.packet == event.packet


@pytest.mark.parametrize("allow", [False, True])
@pytest.mark.parametrize("port", [80, 81])
def test_what_a_hook_decides_is_counted_as_its_own(table: RuleTable, allow: bool, port: int) -> None:
    publisher = Publisher()
    publisher.publish(table)
    table.take_tally()
    worker = Worker(publisher, ring_entries=8)
    worker.capture = 3
    packet = tcp("10.0.0.1", "192.0.2.9", port)
    event = worker.override(packet, allow, indev=A, outdev=UPLINK)
    verdict = event.verdict
    assert (verdict.allow, verdict.reason, verdict.direction, verdict.bits) == (allow, R.HOOK, None, 0)
    assert verdict.egress.reason is (R.POLICY_RULE if port == 80 else R.NO_RULE)
    assert worker.counters() == {(allow, "", R.HOOK): (1, len(packet))}
    assert [one.verdict for one in worker.events()] == [verdict]
    assert table.take_tally() == ([], [])
    # The next packet of the flow is judged as ever.
    assert worker.judge(packet, indev=A, outdev=UPLINK).allow is (port == 80)
    assert table.take_tally() != ([], [])


def test_a_hook_decides_nothing_of_what_cannot_be_parsed(table: RuleTable) -> None:
    publisher = Publisher()
    publisher.publish(table)
    worker = Worker(publisher)
    with pytest.raises(ValueError, match="cannot be parsed"):
        worker.override(b"\x45", True, indev=A, outdev=UPLINK)
    assert worker.counters() == {}
    publisher.publish(None)
    assert publisher.quiesced()  # no table is held on to


def test_in_audit_a_hooks_drop_lets_through(table: RuleTable) -> None:
    publisher = Publisher()
    publisher.publish(table)
    worker = Worker(publisher, audit=True)
    packet = tcp("10.0.0.1", "192.0.2.9")
    verdict = worker.override(packet, False, indev=A, outdev=UPLINK).verdict
    assert (verdict.allow, verdict.reason, verdict.audited) == (True, R.AUDIT, R.HOOK)
    denied = worker.propose(tcp("10.0.0.1", "192.0.2.9", 81), indev=A, outdev=UPLINK).verdict
    assert (denied.allow, denied.reason, denied.audited) == (True, R.AUDIT, R.NO_RULE)


def test_events_before_any_table() -> None:
    worker = Worker(Publisher(), ring_entries=4)
    worker.capture = 1
    worker.judge(tcp("10.0.0.1", "192.0.2.9"))
    (event,) = worker.events()
    assert (event.generation, event.known, event.verdict.reason) == (0, True, Reason.NO_TABLE)


def test_worker_sizes_out_of_range() -> None:
    publisher = Publisher()
    for bad in (
        {"cache_entries": -1},
        {"cache_entries": 1 << 29},
        {"ring_entries": -1},
        {"ring_entries": 1 << 21},
    ):
        with pytest.raises(ValueError, match="must be 0 to"):
            Worker(publisher, **bad)
    with pytest.raises(ValueError, match="capture is 4"):
        Worker(publisher).capture = 4


# ---- audit


def audited(*directions: Direction) -> RuleTable:
    pods = [
        pod("a", A, "10.0.0.1", "fd00::1", egress=OUT, audit=frozenset(directions)),
        pod("c", C, "10.0.0.3", "fd00::3", ingress=NOTHING, egress=NOTHING, audit=frozenset(directions)),
        pod("b", B, "10.0.0.2", ingress=NOTHING),
        pod("new", NEW, "10.0.0.6", unknown=True),
    ]
    return Compiler().table(1, pods, [ip(NODE4)])


def told(verdict: Verdict) -> tuple[bool, Reason, Reason, Direction | None, int]:
    return verdict.allow, verdict.reason, verdict.audited, verdict.direction, verdict.bits


def test_an_end_in_audit_lets_pass_what_no_rule_allows() -> None:
    table = audited(INGRESS, EGRESS)
    out = judge(table, tcp("10.0.0.1", "192.0.2.9", 81), indev=A, outdev=UPLINK)
    assert told(out) == (True, R.AUDIT, R.NO_RULE, EGRESS, E)
    assert (out.egress.reason, out.egress.rule_id) == (R.AUDIT, -1)
    into = judge(table, tcp("192.0.2.9", "10.0.0.3"), indev=UPLINK, outdev=C)
    assert told(into) == (True, R.AUDIT, R.NO_RULE, INGRESS, I)
    both = judge(table, tcp("10.0.0.1", "10.0.0.3", 81), indev=A, outdev=C)
    assert told(both) == (True, R.AUDIT, R.NO_RULE, EGRESS, E | I)
    answer = judge(table, back("10.0.0.3", "10.0.0.1", 81), indev=C, outdev=A, reply=True)
    assert told(answer) == (True, R.AUDIT, R.NO_RULE, EGRESS, E | I)
    # What a rule allows is not an audit's business, nor is an ICMP error about what is let through.
    assert told(judge(table, tcp("10.0.0.1", "192.0.2.9"), indev=A, outdev=UPLINK)) == (
        (True, R.POLICY_RULE, R.NONE, EGRESS, E)
    )
    quoted = error("192.0.2.9", tcp("10.0.0.1", "192.0.2.9", 81))
    related = judge(table, quoted, indev=UPLINK, outdev=A, reply=True)
    assert told(related) == (True, R.RELATED, R.NONE, EGRESS, 0)


def test_the_other_end_is_enforced_as_ever() -> None:
    table = audited(EGRESS)
    denied = judge(table, tcp("10.0.0.1", "10.0.0.2", 81), indev=A, outdev=B)
    assert told(denied) == (False, R.NO_RULE, R.NONE, INGRESS, 0)
    assert denied.egress.reason is R.AUDIT
    assert told(judge(table, tcp("192.0.2.9", "10.0.0.3"), indev=UPLINK, outdev=C)) == (
        (False, R.NO_RULE, R.NONE, INGRESS, 0)
    )
    # A policy's audit is about rules only.
    assert judge(table, tcp("10.0.0.9", "192.0.2.9", 81), indev=A, outdev=UPLINK).reason is R.SPOOFED


def test_a_flow_known_by_its_addresses_is_let_through_too() -> None:
    found = judge_flow(audited(EGRESS), ip("10.0.0.1"), ip("192.0.2.9"), 6, 1234, 81)
    assert told(found) == (True, R.AUDIT, R.NO_RULE, EGRESS, E)


@pytest.mark.parametrize("cache", [0, 64])
def test_what_is_audited_is_counted_and_told_once_for_each_look_up(cache: int) -> None:
    publisher = Publisher()
    worker = Worker(publisher, cache_entries=cache, ring_entries=64)
    table = audited(EGRESS)
    publisher.publish(table)
    worker.capture = 1
    packet = tcp("10.0.0.1", "192.0.2.9", 81)
    for _ in range(3):
        assert worker.judge(packet, indev=A, outdev=UPLINK).audited is R.NO_RULE
    looked_up = 1 if cache else 3
    events = worker.events()
    assert [(each.verdict.reason, each.verdict.audited) for each in events] == (
        [(R.AUDIT, R.NO_RULE)] * looked_up
    )
    assert {key: packets for key, (packets, _) in worker.counters().items()} == {(True, "egress", R.AUDIT): 3}
    assert table.take_tally()[0] == [((Key("x", "a"), EGRESS, R.AUDIT), looked_up)]


def test_a_worker_in_audit_denies_nothing() -> None:
    publisher = Publisher()
    worker = Worker(publisher, cache_entries=64, ring_entries=64, audit=True)
    worker.capture = 1
    assert worker.audit
    assert told(worker.judge(tcp("10.0.0.1", "192.0.2.9"), indev=A)) == (True, R.AUDIT, R.NO_TABLE, None, 0)
    publisher.publish(audited(EGRESS))
    forged = worker.judge(tcp("10.0.0.9", "192.0.2.9"), indev=A, outdev=UPLINK)
    assert told(forged) == (True, R.AUDIT, R.SPOOFED, EGRESS, 0)
    unknown = worker.judge(tcp("10.0.0.6", "192.0.2.9"), indev=NEW, outdev=UPLINK)
    assert told(unknown) == (True, R.AUDIT, R.NO_TABLE, EGRESS, 0)
    assert told(worker.judge(b"\x45", indev=A)) == (True, R.AUDIT, R.MALFORMED, None, 0)
    fragment = bytes(IP(src="10.0.0.1", dst="192.0.2.9", frag=3, proto=6) / b"12345678")
    assert told(worker.judge(fragment, indev=A)) == (True, R.AUDIT, R.FRAGMENT, None, 0)
    assert told(worker.judge(tcp("192.0.2.9", "10.0.0.2"), indev=UPLINK, outdev=B)) == (
        (True, R.AUDIT, R.NO_RULE, INGRESS, 0)
    )
    assert all(allow and reason is R.AUDIT for allow, _, reason in worker.counters())
    told_of = [(each.packet.reason, each.verdict.audited) for each in worker.events()]
    assert told_of[3:5] == [(R.MALFORMED, R.MALFORMED), (R.FRAGMENT, R.FRAGMENT)]
    assert len(told_of) == 6
