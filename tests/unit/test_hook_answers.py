"""What a hook's process says: read, or refused in words; and which packets may take another's place."""

from __future__ import annotations

import base64
import logging

import pytest

from dataplane.hook_answers import (
    Answer,
    Wish,
    check_rewritten,
    packet_number,
    read_answer,
    read_json,
)

logging.getLogger("scapy.runtime").setLevel(logging.ERROR)
from scapy.layers.inet import ICMP, IP, TCP, UDP  # noqa: E402
from scapy.layers.inet6 import IPv6  # noqa: E402


@pytest.mark.parametrize(
    ("message", "answer"),
    [
        ({"id": 7}, Answer(7, Wish.ENGINE)),
        ({"id": 7, "verdict": "allow"}, Answer(7, Wish.ALLOW)),
        ({"id": 7, "verdict": "drop"}, Answer(7, Wish.DROP)),
        ({"id": 7, "packet": base64.b64encode(b"x").decode()}, Answer(7, Wish.REWRITE, packet=b"x")),
        ({"id": 7, "delay": 10}, Answer(7, Wish.DELAY, delay=10.0)),
        ({"id": 7, "delay": 0.25}, Answer(7, Wish.DELAY, delay=0.25)),
        ({"id": 7, "error": "oh\n dear" + "!" * 500}, Answer(7, Wish.ERROR, error="oh dear" + "!" * 192)),
    ],
)
def test_answers(message: object, answer: Answer) -> None:
    assert read_answer(message) == answer


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"id": 7, "verdict": "deny"}, "a verdict must be allow or drop"),
        ({"id": 7, "verdict": ["drop"]}, "a verdict must be allow or drop"),
        ({"id": 7, "packet": "%"}, "base64"),
        ({"id": 7, "packet": 7}, "base64"),
        ({"id": 7, "packet": "ä"}, "base64"),
        ({"id": 7, "delay": -1}, "0 to 10 seconds"),
        ({"id": 7, "delay": 10.01}, "0 to 10 seconds"),
        ({"id": 7, "delay": float("nan")}, "0 to 10 seconds"),
        ({"id": 7, "delay": True}, "0 to 10 seconds"),
        ({"id": 7, "delay": 10**400}, "0 to 10 seconds"),
        ({"id": 7, "verdict": "drop", "delay": 1}, "one wish, not 2"),
        ({"id": 7, "accept": 1}, "must be verdict, packet, delay or error"),
    ],
)
def test_answers_that_are_none(message: object, said: str) -> None:
    assert packet_number(message) == 7
    with pytest.raises(ValueError, match=said):
        read_answer(message)


@pytest.mark.parametrize("message", [None, [], 7, {}, {"id": "7"}, {"id": 7.0}, {"id": True}, {"id": -1}])
def test_what_is_about_no_packet(message: object) -> None:
    with pytest.raises(ValueError, match="the packet's number"):
        packet_number(message)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '"\\ud800', "NaNa"])
def test_what_is_no_json(text: str) -> None:
    with pytest.raises(ValueError):
        read_json(text)


OLD = IP(src="10.0.0.1", dst="10.0.0.2") / UDP(sport=7, dport=9) / b"hello"
OLD6 = IPv6(src="fd00::1", dst="fd00::2") / TCP(sport=7, dport=9) / b"hello"


@pytest.mark.parametrize(
    "new",
    [
        OLD,
        IP(src="10.0.0.1", dst="10.0.0.2", ttl=3, tos=8) / UDP(sport=7, dport=9) / (b"x" * 1472),
        IP(src="10.0.0.1", dst="10.0.0.2") / UDP(sport=7, dport=9),
    ],
)
def test_another_load_may_go_on(new: IP) -> None:
    check_rewritten(bytes(OLD), bytes(new), 1500)


def test_a_longer_packet_than_the_mtu_may_go_on_where_it_came_so() -> None:
    long = bytes(IP(src="10.0.0.1", dst="10.0.0.2") / UDP(sport=7, dport=9) / (b"x" * 3000))
    check_rewritten(long, long[:-1] + b"y", 1500)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (OLD, b"", "cannot be read"),
        (OLD, b"junk", "cannot be read"),
        (OLD, bytes(OLD) + b"more", "its header says 33 bytes, and it has 37"),
        (OLD, bytes(OLD)[:-1], "cannot be read"),
        (OLD, bytes(OLD / (b"x" * 1468)), r"1501 bytes are more than the way out takes \(1500\)"),
        (OLD, bytes(IP(src="10.0.0.1", dst="10.0.0.3") / UDP(sport=7, dport=9)), "keeps its addresses"),
        (OLD, bytes(IP(src="10.0.0.1", dst="10.0.0.2") / UDP(sport=7, dport=10)), "keeps its addresses"),
        (OLD, bytes(IP(src="10.0.0.1", dst="10.0.0.2") / TCP(sport=7, dport=9)), "keeps its addresses"),
        (OLD, bytes(IPv6(src="fd00::1", dst="fd00::2") / UDP(sport=7, dport=9)), "keeps its addresses"),
        (OLD, bytes(IP(src="10.0.0.1", dst="10.0.0.2", frag=1, proto=17) / b"x"), "cannot be read"),
        (OLD6, bytes(IPv6(src="fd00::1", dst="fd00::2", plen=0) / TCP(sport=7, dport=9)), "cannot be read"),
        (OLD6, bytes(OLD6) + b"more", "its header says 65 bytes, and it has 69"),
    ],
)
def test_no_other_packet_may_go_on(old: IP, new: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_rewritten(bytes(old), new, 1500)


def test_an_error_quotes_what_it_quoted() -> None:
    error, other = (
        bytes(IP(src="10.0.0.9", dst="10.0.0.1") / ICMP(type=3, code=1) / quoted)
        for quoted in (bytes(OLD), bytes(OLD).replace(bytes([10, 0, 0, 2]), bytes([10, 0, 0, 3])))
    )
    check_rewritten(error, error, 1500)
    with pytest.raises(ValueError, match="keeps its addresses"):
        check_rewritten(error, other, 1500)
