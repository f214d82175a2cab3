"""FILTER of `podgate trace`: what is read, what is refused with which words, and which events match."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import pytest

from dataplane._engine import Publisher, Worker
from dataplane._events import EventFilter, take
from dataplane.addresses import parse_address, parse_prefix
from dataplane.errors import InputError
from dataplane.model import Key, PortRange, Rule
from dataplane.observe.live import CAPTURE
from dataplane.observe.selection import Condition, Selection
from dataplane.policy.compile import Compiler, PodEntry
from dataplane.policy.effective import DirectionRules

WEB, DB = Key("shop", "web-5f4b"), Key("shop", "db")
UPLINK, ON_WEB, ON_DB = 2, 11, 12
OUTSIDE = "192.0.2.7"


@pytest.mark.parametrize(
    ("words", "conditions", "packets"),
    [
        ([], [], ""),
        (["verdict=deny"], ["verdict=deny"], ""),
        (["verdict=deny", "pod=shop/db", "tcp port 5432"], ["verdict=deny", "pod=shop/db"], "tcp port 5432"),
        (["verdict=deny and tcp port 80"], ["verdict=deny"], "tcp port 80"),
        (["tcp port 80 and verdict=deny"], ["verdict=deny"], "tcp port 80"),
        (["tcp", "port", "80"], [], "tcp port 80"),
        (["host 10.0.0.5 and tcp port 80"], [], "host 10.0.0.5 and tcp port 80"),
        (["tcp", "verdict=allow", "&&", "port", "80"], ["verdict=allow"], "(tcp) and (port 80)"),
        (["host 10.0.0.5", "udp or tcp"], [], "(host 10.0.0.5) and (udp or tcp)"),
        (["reason=reply,spoofed", "pod!=dns/*"], ["reason=reply,spoofed", "pod!=dns/*"], ""),
        (["from=10.0.0.1", "to=shop/db-?"], ["from=10.0.0.1", "to=shop/db-?"], ""),
        (["tcp[tcpflags] & tcp-syn != 0"], [], "tcp[tcpflags] & tcp-syn != 0"),
        (["len=100"], [], "len=100"),
        (["namespace=x", "direction=egress"], ["namespace=x", "direction=egress"], ""),
        (["policy=*/*"], ["policy=*/*"], ""),
    ],
)  # fmt: skip
def test_what_is_read(words: list[str], conditions: list[str], packets: str) -> None:
    selection = Selection.parse(words)
    assert ([str(one) for one in selection.conditions], selection.packets) == (conditions, packets)
    selection.compile()
    assert Selection.parse([str(selection)]) == selection


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["verdict=denied"], "'denied' is no verdict; did you mean deny?"),
        (["reason=norule"], "did you mean no-rule?"),
        (["reason=x"], "one of policy-rule, no-rule"),
        (["pods=shop/db"], "there is no such field; did you mean pod=?"),
        (["colour=red"], "fields are verdict, reason, direction, policy, pod, namespace, from, to"),
        (["pod=db"], "for example pod=*/db"),
        (["pod=a/b/c"], "is not NAMESPACE/NAME"),
        (["to=300.0.0.1"], "is not NAMESPACE/NAME or an IP address"),
        (["namespace=a/b"], "is no namespace's name"),
        (["verdict="], "a value is missing; verdict is allow or deny"),
        (["verdict=deny,"], "a value is missing"),
        (["not", "verdict=deny"], "the opposite FIELD!=A"),
        (["verdict=deny", "or", "tcp"], "conditions must all hold"),
        (["(verdict=deny)"], "a condition stands by itself"),
        (["verdict=deny " * 700], "longer than"),
        (["verdict=deny"] * 65, "more than 64 conditions"),
    ],
)
def test_what_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(InputError) as refused:
        Selection.parse(words)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("packets", ["tcp prt 80", "tcp or", "(tcp", "port"])
def test_what_pcap_filter_refuses(packets: str) -> None:
    with pytest.raises(InputError, match="is no pcap-filter expression: "):
        Selection.parse([packets]).compile()


def test_only_denials_are_captured_where_no_more_is_asked_for() -> None:
    level = {words: Selection.parse([words]).capture for words in ("verdict=deny", "verdict!=allow", "tcp")}
    assert level == {
        "verdict=deny": CAPTURE["denied"],
        "verdict!=allow": CAPTURE["denied"],
        "tcp": CAPTURE["all"],
    }


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["pod=shop/db"], {DB}),
        (["namespace=shop", "pod=*/db"], {DB}),
        (["from=shop/web*", "to=shop/*"], {WEB}),
        (["from=192.0.2.7"], {WEB, DB}),
        (["verdict=deny", "tcp"], {WEB, DB}),
        (["pod!=shop/db"], {WEB, DB}),
        (["pod=other/x"], set()),
    ],
)
def test_pods_that_every_packet_must_be_seen_of(words: list[str], expected: set[Key]) -> None:
    assert Selection.parse(words).pods([WEB, DB]) == expected


# --- events ----------------------------------------------------------------------------------------------


def make_worker() -> Worker:
    ports = (PortRange(17, 53, 53),)
    rule = Rule(parse_prefix("0.0.0.0/0")[0], (), ports, 0)
    dns = DirectionRules(((Key("shop", "out"), rule),))
    pods = [
        PodEntry(WEB, (parse_address("10.0.0.1"),), (ON_WEB,), egress=dns),
        PodEntry(DB, (parse_address("10.0.0.2"),), (ON_DB,), ingress=DirectionRules(())),
    ]
    publisher = Publisher()
    publisher.publish(Compiler().table(1, pods, []))
    worker = Worker(publisher, ring_entries=64)
    worker.capture, worker.keep_bytes = CAPTURE["all"], True
    return worker


NAMES = {parse_address("10.0.0.1"): WEB, parse_address("10.0.0.2"): DB}
# What the packets of `some_packets` are, in their order.
PACKETS = ["web-dns", "web-other", "web-db", "outside-db", "forged", "junk", "dns-reply"]


def udp(src: str, dst: str, dport: int, sport: int = 4000) -> bytes:
    header = struct.pack(
        "!BBHHHBBH4s4s", 0x45, 0, 28, 0, 0, 64, 17, 0, parse_address(src), parse_address(dst)
    )
    return header + struct.pack("!HHHH", sport, dport, 8, 0)


def some_packets(worker: Worker) -> None:
    worker.judge(udp("10.0.0.1", OUTSIDE, 53), indev=ON_WEB, outdev=UPLINK)
    worker.judge(udp("10.0.0.1", OUTSIDE, 99), indev=ON_WEB, outdev=UPLINK)
    worker.judge(udp("10.0.0.1", "10.0.0.2", 53), indev=ON_WEB, outdev=ON_DB)
    worker.judge(udp(OUTSIDE, "10.0.0.2", 53), indev=UPLINK, outdev=ON_DB)
    worker.judge(udp("10.0.0.2", OUTSIDE, 53), indev=ON_WEB, outdev=UPLINK)  # web as db
    worker.judge(b"\x45\x00", indev=ON_WEB)
    worker.judge(udp(OUTSIDE, "10.0.0.1", 4000, 53), indev=UPLINK, outdev=ON_WEB, reply=True)


def selected(words: Sequence[str]) -> list[str]:
    worker = make_worker()
    some_packets(worker)
    everything = worker.events()
    selection = Selection.parse(words)
    packets = selection.compile()
    wanted = selection.wanted(lambda: NAMES, packets) or (lambda _event: True)
    found = [name for name, event in zip(PACKETS, everything, strict=True) if wanted(event)]
    # What is left out before an event is made must be left out afterwards too.
    some_packets(worker)
    first = take(worker, 64, [selection.first_filter(packets)])
    assert [event.packet for event in first if wanted(event)] == [
        event.packet for event in everything if wanted(event)
    ]
    assert worker.events() == []
    return found


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["verdict=allow"], ["web-dns", "dns-reply"]),
        (["verdict!=allow"], ["web-other", "web-db", "outside-db", "forged", "junk"]),
        (["reason=no-rule"], ["web-other", "web-db", "outside-db"]),
        (["reason=malformed,spoofed"], ["forged", "junk"]),
        (["reason!=no-rule", "verdict=deny"], ["forged", "junk"]),
        (["direction=ingress"], ["web-db", "outside-db"]),
        (["direction=egress"], ["web-dns", "web-other", "forged", "dns-reply"]),
        (["direction!=egress,ingress"], ["junk"]),
        (["policy=shop/out"], ["web-dns", "web-db", "dns-reply"]),
        (["policy=shop/in"], []),
        (["policy!=shop/out"], ["web-other", "outside-db", "forged", "junk"]),
        (["pod=shop/db"], ["web-db", "outside-db"]),
        (["pod=shop/web-*"], ["web-dns", "web-other", "web-db", "forged", "dns-reply"]),
        (["namespace=shop"], ["web-dns", "web-other", "web-db", "outside-db", "forged", "dns-reply"]),
        (["namespace!=shop"], ["junk"]),
        (["from=shop/web*"], ["web-dns", "web-other", "web-db", "forged"]),
        (["to=shop/web*"], ["dns-reply"]),
        (["from=192.0.2.7,shop/db"], ["outside-db", "dns-reply"]),
        (["to=192.0.2.7"], ["web-dns", "web-other", "forged"]),
        (["from!=shop/*"], ["outside-db", "junk", "dns-reply"]),
        (["udp port 53"], ["web-dns", "web-db", "outside-db", "forged", "dns-reply"]),
        (["udp port 53", "verdict=deny", "pod=shop/db"], ["web-db", "outside-db"]),
        (["host 10.0.0.2", "from=shop/web-*"], ["web-db", "forged"]),
        ([], PACKETS),
    ],
)
def test_which_events_match(words: list[str], expected: list[str]) -> None:
    assert selected(words) == expected


def test_events_are_taken_in_order_until_enough_were_wanted() -> None:
    worker = make_worker()
    for sport in range(10):
        worker.judge(udp("10.0.0.1", OUTSIDE, 53 if sport % 2 else 99, sport), indev=ON_WEB)
    denied = EventFilter(verdicts=1)
    assert [event.packet.flow.sport for event in take(worker, 2, [denied])] == [0, 2]
    assert [event.packet.flow.sport for event in take(worker, 9, [denied, denied])] == [4, 6, 8]
    assert take(worker, 9, [denied]) == []
    worker.judge(udp("10.0.0.1", OUTSIDE, 99), indev=ON_WEB)
    assert take(worker, 9, []) == []
    assert worker.events() == []


def test_no_event_is_made_for_whom_there_is_no_room() -> None:
    worker = make_worker()
    slow, quick = EventFilter(verdicts=1), EventFilter(verdicts=2)
    slow.room = 2
    for sport in range(10):
        worker.judge(udp("10.0.0.1", OUTSIDE, 53 if sport % 2 else 99, sport), indev=ON_WEB)
    assert [event.packet.flow.sport for event in take(worker, 64, [slow, quick])] == [0, 1, 2, 3, 5, 7, 9]
    assert (slow.room, slow.missed, quick.missed) == (0, 3, 0)


def test_pods_are_those_of_the_table_an_event_was_judged_by() -> None:
    worker = make_worker()
    only_db = Selection.parse(["pod=shop/db"]).first_filter(None)
    worker.judge(udp(OUTSIDE, "10.0.0.2", 53), indev=UPLINK, outdev=ON_DB)
    # The next table has the pod at another place.
    pods = [PodEntry(DB, (parse_address("10.0.0.2"),), (ON_DB,), ingress=DirectionRules(()))]
    worker.publisher.publish(Compiler().table(2, pods, []))
    worker.judge(udp(OUTSIDE, "10.0.0.2", 53), indev=UPLINK, outdev=ON_DB)
    assert [event.generation for event in take(worker, 9, [only_db])] == [1, 2]


def test_conditions_read_as_they_are_written() -> None:
    assert str(Condition("pod", ("a/b", "c/d"), negated=True)) == "pod!=a/b,c/d"
