"""Captures are read whatever frames they have, and filters match what pcap-filter(7) says."""

from __future__ import annotations

import os
import struct
import threading
from pathlib import Path

import captures
import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import CookedLinux, Ether
from scapy.utils import PcapNgWriter, wrpcap

from dataplane._pcap import RAW_IP, Capture, Filter

WEB = bytes(IP(src="10.0.0.1", dst="10.0.0.5") / TCP(sport=40000, dport=80, flags="S"))
DNS = bytes(IP(src="10.0.0.1", dst="10.0.0.9") / UDP(sport=40001, dport=53) / b"question")
WEB6 = bytes(IPv6(src="fd00::1", dst="fd00::5") / TCP(sport=40000, dport=80, flags="S"))


def read(path: Path) -> tuple[Capture, list[tuple[int, bytes, int]]]:
    with path.open("rb") as file:
        capture = Capture(file)
    return capture, list(capture)


# ---- captures ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["pcap", "pcapng"])
@pytest.mark.parametrize(
    ("linktype", "link"),
    [
        (captures.ETHERNET, "Ethernet"),
        (captures.COOKED, "Linux cooked"),
        (captures.COOKED2, "Linux cooked v2"),
        (captures.RAW, "raw IP"),
        (captures.LOOPBACK, "BSD loopback"),
    ],
)
def test_packets_begin_at_their_network_header(tmp_path: Path, form: str, linktype: int, link: str) -> None:
    frames = [(1.5 + n, captures.frame(linktype, packet)) for n, packet in enumerate([WEB, WEB6, DNS])]
    path = captures.write(tmp_path / "c", getattr(captures, form)(linktype, frames))
    capture, packets = read(path)
    assert (capture.link, capture.error, capture.packets, capture.others) == (link, None, 3, 0)
    assert packets == [
        (1_500_000_000, WEB, len(WEB)),
        (2_500_000_000, WEB6, len(WEB6)),
        (3_500_000_000, DNS, len(DNS)),
    ]


@pytest.mark.parametrize(("linktype", "packet"), [(captures.IPV4, WEB), (captures.IPV6, WEB6)])
def test_link_types_of_one_family(tmp_path: Path, linktype: int, packet: bytes) -> None:
    _, packets = read(captures.write(tmp_path / "c", captures.pcap(linktype, [(1, packet)])))
    assert [data for _, data, _ in packets] == [packet]


@pytest.mark.parametrize("linktype", [captures.ETHERNET, captures.COOKED, captures.COOKED2])
@pytest.mark.parametrize("tags", [(0x8100,), (0x88A8, 0x8100), (0x9100, 0x8100, 0x8100)])
def test_vlan_tags_are_passed_over(tmp_path: Path, linktype: int, tags: tuple[int, ...]) -> None:
    frames = [(1, captures.frame(linktype, WEB, tags=tags))]
    _, packets = read(captures.write(tmp_path / "c", captures.pcap(linktype, frames)))
    assert [data for _, data, _ in packets] == [WEB]


def test_what_scapy_writes(tmp_path: Path) -> None:
    # Its own headers, not ours: Ethernet as pcap, Linux cooked as pcapng.
    wrpcap(str(tmp_path / "e.pcap"), [Ether() / IP(WEB), Ether() / IP(DNS)])
    with PcapNgWriter(str(tmp_path / "c.pcapng")) as writer:
        writer.write(CookedLinux(proto=0x0800) / IP(WEB))
        writer.write(CookedLinux(proto=0x86DD) / IPv6(WEB6))
    assert [data for _, data, _ in read(tmp_path / "e.pcap")[1]] == [WEB, DNS]
    assert [data for _, data, _ in read(tmp_path / "c.pcapng")[1]] == [WEB, WEB6]


def test_frames_without_ip_are_counted_and_passed_over(tmp_path: Path) -> None:
    arp = bytes(12) + b"\x08\x06" + bytes(28)
    netlink = struct.pack("!HHH8sH", 0, 824, 0, bytes(8), 0x0800) + WEB
    ethernet = [(1, arp), (2, captures.frame(1, WEB)), (3, bytes(10)), (4, bytes(12) + b"\x81\0\0\1")]
    capture, packets = read(captures.write(tmp_path / "e", captures.pcap(captures.ETHERNET, ethernet)))
    assert (len(packets), capture.packets, capture.others) == (1, 1, 3)
    capture, packets = read(captures.write(tmp_path / "s", captures.pcap(captures.COOKED, [(1, netlink)])))
    assert (packets, capture.others) == ([], 1)


def test_a_snap_length_cuts_packets_and_keeps_their_length(tmp_path: Path) -> None:
    frames = [(1, captures.frame(captures.ETHERNET, DNS))]
    path = captures.write(tmp_path / "c", captures.pcap(captures.ETHERNET, frames, snaplen=42))
    assert read(path)[1] == [(1_000_000_000, DNS[:28], len(DNS))]


def test_a_capture_that_ends_early_gives_what_could_be_read(tmp_path: Path) -> None:
    whole = captures.pcap(captures.RAW, [(1, WEB), (2, DNS)])
    capture, packets = read(captures.write(tmp_path / "c", whole[:-5]))
    assert [data for _, data, _ in packets] == [WEB]
    assert "truncated" in (capture.error or "")
    assert list(capture) == []


def test_times_that_are_none_are_zero(tmp_path: Path) -> None:
    # pcapng has 64 bits of microseconds: some 580,000 years.
    far = struct.pack("<IIIII", 0, 0xFFFFFFFF, 0xFFFFFFFF, len(WEB), len(WEB)) + WEB
    content = captures.pcapng(captures.RAW, []) + captures.block(6, far)
    assert read(captures.write(tmp_path / "c", content))[1] == [(0, WEB, len(WEB))]


def test_a_length_below_what_was_captured_counts_as_that(tmp_path: Path) -> None:
    content = captures.pcap(captures.RAW, []) + struct.pack("<IIII", 1, 0, len(WEB), 3) + WEB
    assert read(captures.write(tmp_path / "c", content))[1] == [(1_000_000_000, WEB, len(WEB))]


def test_a_pipe_is_read(tmp_path: Path) -> None:
    out, into = os.pipe()
    writer = threading.Thread(target=lambda: [os.write(into, captures.pcap(101, [(1, WEB)])), os.close(into)])
    writer.start()
    with os.fdopen(out, "rb") as file:
        assert [data for _, data, _ in Capture(file)] == [WEB]
    writer.join()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated"),
        (b"kind: Pod\nmetadata: {}\n----", "unknown file format"),
        (captures.pcap(105, []), "link type 105 .802.11. is none of Ethernet, Linux cooked"),
        (captures.pcap(147, []), "link type 147"),
    ],
)
def test_what_is_no_capture_is_said(tmp_path: Path, content: bytes, message: str) -> None:
    with captures.write(tmp_path / "c", content).open("rb") as file, pytest.raises(ValueError, match=message):
        Capture(file)


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    good = captures.write(tmp_path / "good", captures.pcap(captures.RAW, [(1, WEB)]))
    bad = captures.write(tmp_path / "bad", b"no capture at all, but long enough to be one")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        read(good)
        with pytest.raises(ValueError), bad.open("rb") as file:
            Capture(file)
    assert len(os.listdir("/proc/self/fd")) == before


# ---- filters ----------------------------------------------------------------------------------------

ECHO = bytes(IP(src="10.0.0.1", dst="10.0.0.5") / ICMP())


@pytest.mark.parametrize(
    ("expression", "matching"),
    [
        ("", [WEB, DNS, WEB6, ECHO]),
        ("ip", [WEB, DNS, ECHO]),
        ("ip6", [WEB6]),
        ("tcp", [WEB, WEB6]),
        ("host 10.0.0.5", [WEB, ECHO]),
        ("host 10.0.0.5 and tcp port 80", [WEB]),
        ("src host 10.0.0.5", []),
        ("net 10.0.0.8/29", [DNS]),
        ("net fd00::/64", [WEB6]),
        ("udp dst port 53 or icmp", [DNS, ECHO]),
        ("tcp[tcpflags] & tcp-syn != 0", [WEB]),
        ("not port 80", [DNS, ECHO]),
    ],
)
def test_filters_match(expression: str, matching: list[bytes]) -> None:
    found = Filter(expression)
    assert (found.expression, found.linktype) == (expression, RAW_IP)
    assert [packet for packet in (WEB, DNS, WEB6, ECHO) if found.matches(packet)] == matching


def test_a_filter_of_another_link_type() -> None:
    vlan = Filter("vlan 7 and host 10.0.0.5", linktype=captures.ETHERNET)
    assert vlan.matches(captures.frame(captures.ETHERNET, WEB, tags=(0x8100,)))
    assert not vlan.matches(captures.frame(captures.ETHERNET, WEB))


def test_a_filter_sees_only_what_was_captured_and_the_length_it_had() -> None:
    assert not Filter("tcp port 80").matches(WEB[:20], wire=len(WEB))
    assert not Filter("tcp port 80").matches(b"")
    assert Filter("greater 1000").matches(WEB, wire=1500)
    assert not Filter("greater 1000").matches(WEB)
    with pytest.raises(ValueError, match="shorter"):
        Filter("ip").matches(WEB, wire=3)


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("tcp port", "syntax error"),
        ("verdict deny", "syntax error"),
        ("port 99999", "illegal port"),
        ("ether host 00:00:00:00:00:01", "ethernet"),
        ("host 10.0.0.256", "10.0.0.256"),
        ("ip\0and tcp", "zero byte"),
        ("(" * 20000, "."),
    ],
)
def test_a_bad_filter_is_refused_with_libpcaps_words(expression: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Filter(expression)


def test_threads_compile_and_match_at_once() -> None:
    wrong: list[str] = []

    def work(port: int) -> None:
        for _ in range(200):
            made = Filter(f"tcp port {port}")
            if made.matches(WEB) != (port == 80):
                wrong.append(made.expression)

    threads = [threading.Thread(target=work, args=(port,)) for port in (80, 81, 80, 82)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
