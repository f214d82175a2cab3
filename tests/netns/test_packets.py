"""Unusual packets: ICMP errors, fragments, extension headers, and what is no proper packet at all."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator, Sequence

import pytest
from conftest import AgentFactory, LabFactory, RunningAgent
from objects import allow, anywhere, deny, policy, rule, select, until
from packets import Events, af, conntrack, send_frames, sniffing, udp_server

from dataplane.lab import netns
from dataplane.lab.world import Lab

pytestmark = pytest.mark.netns

FAMILY = pytest.mark.parametrize("family", [4, 6])
OFFLOAD = pytest.mark.parametrize("options", [[], ["--no-offload"]], ids=["offload", "no-offload"])
FAR = {4: "198.51.100.77", 6: "2001:db8:77::77"}
TOOLS = {4: "iptables", 6: "ip6tables"}
SMALL_MTU = 1300


@pytest.fixture
def far() -> Iterator[Callable[[Lab], str]]:
    """Makes a place two hops beyond the node, behind a link of a smaller MTU; returns its namespace."""
    made: list[str] = []

    def make(lab: Lab) -> str:
        name = f"{lab.name}-far"
        netns.ip([f"netns add {name}"])
        made.append(name)
        netns.ip(
            [
                f"link add far type veth peer name eth0 netns {name}",
                # Only the near end is small: the far one announces an MSS for 1500 bytes.
                f"link set far mtu {SMALL_MTU} up",
                "addr add fe80::1/64 dev far nodad",
            ],
            netns=lab.outside,
        )
        netns.ip(["link set lo up", "link set eth0 up"], netns=name)
        for family in (4, 6):
            length, gateway = (32, "100.64.0.1") if family == 4 else (128, "fe80::1")
            nodad, onlink = (" nodad", "") if family == 6 else ("", " onlink")
            # Out of what the lab's outside world answers for.
            netns.ip(
                [f"route add throw {FAR[family]} table local", f"route add {FAR[family]} dev far"],
                netns=lab.outside,
                family=family,
            )
            netns.ip(
                [
                    f"addr add {FAR[family]}/{length} dev eth0{nodad}",
                    f"route add default via {gateway} dev eth0{onlink}",
                ],
                netns=name,
                family=family,
            )
        return name

    yield make
    for name in made:
        netns.ip([f"netns del {name}"], force=True)


def bulk(lab: Lab, pod: str, space: str, address: str, family: int, size: int = 1 << 20) -> int:
    """Send `size` bytes by TCP from a pod to port 5001 of a namespace; how many arrived."""
    listener = netns.make_socket(space, af(family), socket.SOCK_STREAM)
    listener.settimeout(5)
    arrived = 0

    def receive() -> None:
        nonlocal arrived
        with contextlib.suppress(OSError):
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(5)
                while data := connection.recv(65536):
                    arrived += len(data)

    with listener:
        listener.bind((address, 5001))
        listener.listen()
        thread = threading.Thread(target=receive)
        thread.start()
        with lab.make_socket(pod, af(family), socket.SOCK_STREAM) as sock:
            sock.settimeout(5)
            sock.connect((address, 5001))
            with contextlib.suppress(TimeoutError):
                sock.sendall(bytes(size))
                sock.shutdown(socket.SHUT_WR)
            thread.join()
    return arrived


# -- ICMP errors


@OFFLOAD
@FAMILY
@pytest.mark.parametrize("masquerade", [False, True], ids=["plain", "masquerade"])
def test_path_mtu_discovery_completes_a_transfer(
    lab: LabFactory,
    agent: AgentFactory,
    far: Callable[[Lab], str],
    family: int,
    options: list[str],
    masquerade: bool,
) -> None:
    one = lab(["x/a"])
    space = far(one)
    if masquerade:  # as a CNI does it for what leaves the cluster
        one.run(
            "node", TOOLS[family], *f"-t nat -A POSTROUTING -o eth0 -d {FAR[family]} -j MASQUERADE".split()
        )
    rules = [rule(FAR[family], "5001/TCP")]
    running = agent(one, policy("x", "a", select(one, "x/a"), ingress=[], egress=rules), options=options)
    assert bulk(one, "x/a", space, FAR[family], family) == 1 << 20
    # It was needed, and it worked: the pod knows the path.
    assert f"mtu {SMALL_MTU}" in one.run("x/a", "ip", "route", "get", FAR[family]).stdout
    if options:
        assert running.status()["counters"]["related"] >= 1


@FAMILY
def test_the_nodes_own_errors_reach_the_pod(lab: LabFactory, agent: AgentFactory, family: int) -> None:
    one = lab(["x/a"])
    old = one.run("node", "ip", f"-{family}", "route", "show", "default").stdout.strip()
    one.run("node", *f"ip -{family} route replace {old} mtu {SMALL_MTU}".split())
    to = one.address("outside", family)
    agent(one, policy("x", "a", select(one, "x/a"), ingress=[], egress=[rule(to, "5001/TCP")]))
    assert bulk(one, "x/a", one.outside, to, family) == 1 << 20
    assert f"mtu {SMALL_MTU}" in one.run("x/a", "ip", "route", "get", to).stdout


def refused(lab: Lab, pod: str, address: str, port: int, family: int) -> bool:
    """Whether a datagram from the pod is answered by "port unreachable"."""
    with lab.make_socket(pod, af(family), socket.SOCK_DGRAM) as sock:
        sock.settimeout(0.5)
        sock.connect((address, port))
        sock.send(b"anybody?")
        try:
            sock.recv(100)
        except ConnectionRefusedError:
            return True
        except TimeoutError:
            return False
    raise AssertionError("somebody answers")


@OFFLOAD
def test_port_unreachable_comes_back_for_allowed_flows_only(
    lab: LabFactory, agent: AgentFactory, options: list[str]
) -> None:
    one = lab(["x/a", "x/b"])
    service = {4: "172.20.0.10", 6: "fd00:20::10"}
    for family in (4, 6):
        host = one.address("x/b", family)
        to = f"{host}:7001" if family == 4 else f"[{host}]:7001"
        line = f"-t nat -A PREROUTING -d {service[family]} -p udp --dport 53 -j DNAT --to-destination {to}"
        one.run("node", TOOLS[family], *line.split())
    ports = ["7001/UDP"]
    outside = [rule(one.address("outside", family), *ports) for family in (4, 6)]
    agent(
        one,
        policy("x", "a", select(one, "x/a"), ingress=[], egress=[*allow(one, "x/b", ports=ports), *outside]),
        policy("x", "b", select(one, "x/b"), ingress=allow(one, "x/a", ports=ports), egress=[]),
        options=options,
    )
    for family in (4, 6):
        for place in ("x/b", "outside"):
            assert refused(one, "x/a", one.address(place, family), 7001, family), (family, place)
            assert not refused(one, "x/a", one.address(place, family), 7002, family), (family, place)
        assert refused(one, "x/a", service[family], 53, family), family


def from_outside(lab: Lab, family: int, packets: Sequence[bytes]) -> None:
    """Send IP packets, made whole by the caller, to the node's uplink."""
    link = json.loads(lab.run("node", "ip", "-j", "link", "show", "dev", "eth0").stdout)[0]
    kind = {4: b"\x08\x00", 6: b"\x86\xdd"}[family]
    header = bytes.fromhex(link["address"].replace(":", "")) + bytes.fromhex("02000000beef") + kind
    with lab.make_socket("outside", socket.AF_PACKET, socket.SOCK_RAW) as raw:
        raw.bind(("eth0", 0))
        for packet in packets:
            raw.send(header + packet)


def unreachable(family: int, sender: str, source: str, sport: int, destination: str, dport: int) -> bytes:
    """ "Port unreachable" from `sender` about a UDP datagram from `source` to `destination`."""
    from scapy.layers.inet import ICMP, IP, UDP
    from scapy.layers.inet6 import ICMPv6DestUnreach, IPv6

    quoted = UDP(sport=sport, dport=dport, len=20, chksum=1) / bytes(12)
    if family == 4:
        return bytes(
            IP(src=sender, dst=source)
            / ICMP(type=3, code=3)
            / IP(src=source, dst=destination, ttl=60)
            / quoted
        )
    inner = IPv6(src=source, dst=destination, hlim=60) / quoted
    return bytes(IPv6(src=sender, dst=source) / ICMPv6DestUnreach(code=4) / inner)


@FAMILY
def test_an_icmp_error_opens_nothing(lab: LabFactory, agent: AgentFactory, family: int) -> None:
    one = lab(["x/a"])
    running = agent(one)
    to, own = one.address("outside", family), one.address("x/a", family)
    server = udp_server(one, "outside", family, 9999)
    client = udp_server(one, "x/a", family, 5000)
    client.connect((to, 9999))

    def mark() -> int:
        listed = conntrack(one, "-L", "-f", f"ipv{family}", "-p", "udp", "--dport", "9999")
        (text,) = re.findall(r"mark=(\d+)", listed)
        return int(text)

    # Opened before the first policy, so that nobody has judged it yet.
    client.send(b"hello")
    server.sendto(b"hello", server.recvfrom(100)[1])
    assert client.recv(100) == b"hello"
    running.write(policy("x", "a", select(one, "x/a"), ingress=[], egress=[rule(to, "9999/UDP")]))
    assert mark() == 0
    error = unreachable(family, to, own, 5000, to, 9999)
    with Events(running.control) as events:
        from_outside(one, family, [error])
        with pytest.raises(ConnectionRefusedError):
            client.recv(100)
        until(lambda: events.of(verdict="allow", reason="related"), what="the error is told")
    # The error was let in; the flow it quotes still has to be judged itself.
    assert mark() == 0
    client.send(b"again")
    assert server.recvfrom(100)[0] == b"again"
    assert mark() == 0x10000000

    # Denied: no error about it gets in, and none makes it live again.
    running.write(deny(one, "x/a"))
    assert mark() == 0
    before = running.status()["counters"]
    with sniffing(one, "x/a", to) as seen:
        from_outside(one, family, [error] * 3)
        until(lambda: running.status()["counters"]["no-rule"] >= before.get("no-rule", 0) + 3)
        client.send(b"lost")
        server.sendto(b"lost too", (own, 5000))
    assert seen == []
    assert mark() == 0
    server.settimeout(0.2)
    with pytest.raises(TimeoutError):
        server.recvfrom(100)
    server.close()
    client.close()


@FAMILY
def test_a_forged_icmp_error_passes_nothing(lab: LabFactory, agent: AgentFactory, family: int) -> None:
    """About flows that never were, about somebody else's, and to an address it does not quote."""
    one = lab(["x/a", "x/b"])
    running = agent(one, deny(one, "x/a"))
    to, own, other = (one.address(place, family) for place in ("outside", "x/a", "x/b"))
    # A flow that is allowed, which a forger may know of.
    with udp_server(one, "outside", family, 9999) as server, udp_server(one, "x/b", family, 5000) as client:
        client.sendto(b"hello", (to, 9999))
        assert server.recvfrom(100)[0] == b"hello"
        lying = bytearray(unreachable(family, to, other, 5000, to, 9999))
        at = 16 if family == 4 else 24
        lying[at : at + (4 if family == 4 else 16)] = socket.inet_pton(af(family), own)
        if family == 4:
            lying[10:12] = bytes(2)
            total = sum(int.from_bytes(lying[i : i + 2]) for i in range(0, 20, 2))
            while total >> 16:
                total = (total & 0xFFFF) + (total >> 16)
            lying[10:12] = (~total & 0xFFFF).to_bytes(2)
        with sniffing(one, "x/a", to) as seen:
            from_outside(one, family, [unreachable(family, to, own, 5000, to, 9999), bytes(lying)])
        assert seen == []
    # conntrack knows of no such flow, and refuses the one that goes elsewhere than it quotes.
    assert running.status()["counters"]["invalid"] == 2


# -- fragments


@OFFLOAD
@FAMILY
def test_fragmented_datagrams_are_judged_by_their_port(
    lab: LabFactory, agent: AgentFactory, family: int, options: list[str]
) -> None:
    one = lab(["x/a", "x/b"])
    ports = ["7001/UDP"]
    running = agent(
        one,
        policy(
            "x", "a", select(one, "x/a"), ingress=[], egress=allow(one, "x/b", ports=[*ports, "7002/UDP"])
        ),
        policy("x", "b", select(one, "x/b"), ingress=allow(one, "x/a", ports=ports), egress=[]),
        options=options,
    )
    big = bytes(range(256)) * 40
    with one.serving([one.netns("x/b")], [(17, 7001), (17, 7002)]):
        for port in (7001, 7002):
            with one.make_socket("x/a", af(family), socket.SOCK_DGRAM) as sock:
                sock.connect((one.address("x/b", family), port))
                for _ in range(3):
                    # It comes back in fragments too, as a reply.
                    sock.settimeout(2 if port == 7001 else 0.3)
                    sock.send(big)
                    if port == 7001:
                        assert sock.recv(65536) == big + b" x/b\n"
                    else:
                        with pytest.raises(TimeoutError):
                            sock.recv(65536)
    assert running.status()["counters"]["no-rule"] == 3


@FAMILY
def test_fragments_by_hand(lab: LabFactory, agent: AgentFactory, family: int) -> None:
    """A later fragment alone, and a header cut in two, carry nothing past a policy."""
    from scapy.layers.inet import IP, TCP, UDP, fragment
    from scapy.layers.inet6 import IPv6, IPv6ExtHdrFragment

    one = lab(["x/a", "x/b"])
    agent(one, policy("x", "b", select(one, "x/b"), ingress=allow(one, "x/a", ports=["7001/UDP"])))
    source, to = one.address("x/a", family), one.address("x/b", family)
    if family == 4:
        base = IP(src=source, dst=to, proto=17)
        alone = [base.copy() / bytes(64)]
        alone[0].frag, alone[0].id = 100, 77
        # The first fragment ends behind the ports (RFC 1858); to an allowed port as UDP would see it.
        cut = [
            IP(bytes(one)) for one in fragment(IP(src=source, dst=to, id=78) / TCP(dport=7001) / bytes(64), 8)
        ]
        whole = fragment(IP(src=source, dst=to, id=79) / UDP(sport=9, dport=7001) / (b"whole" * 20), 24)
    else:
        ip6 = IPv6(src=source, dst=to)
        alone = [ip6 / IPv6ExtHdrFragment(nh=17, offset=100, m=0, id=77) / bytes(64)]
        segment = bytes(ip6 / TCP(dport=7001) / bytes(64))[40:]
        cut = [
            ip6
            / IPv6ExtHdrFragment(nh=6, offset=at // 8, m=int(at + 8 < len(segment)), id=78)
            / segment[at : at + 8]
            for at in range(0, len(segment), 8)
        ]
        datagram = bytes(ip6 / UDP(sport=9, dport=7001) / (b"whole" * 20))[40:]
        whole = [
            ip6
            / IPv6ExtHdrFragment(nh=17, offset=at // 8, m=int(at + 24 < len(datagram)), id=79)
            / datagram[at : at + 24]
            for at in range(0, len(datagram), 24)
        ]
    with udp_server(one, "x/b", family, 7001) as server:
        with sniffing(one, "x/b", source) as seen:
            send_frames(one, "x/a", family, [bytes(packet) for packet in (*alone, *cut)])
        assert seen == []
        # The same in order is put together, judged and delivered.
        send_frames(one, "x/a", family, [bytes(packet) for packet in whole])
        assert server.recv(1000) == b"whole" * 20


# -- extension headers


def test_ports_behind_extension_headers(lab: LabFactory, agent: AgentFactory) -> None:
    from scapy.layers.inet import UDP
    from scapy.layers.inet6 import (
        HBHOptUnknown,
        IPv6,
        IPv6ExtHdrDestOpt,
        IPv6ExtHdrFragment,
        IPv6ExtHdrHopByHop,
        IPv6ExtHdrRouting,
    )

    def options(kind: type, size: int = 4) -> object:
        # 0x1e: an experiment's, to be skipped by whoever does not know it (RFC 4727).
        return kind(options=[HBHOptUnknown(otype=0x1E, optdata=bytes(size))])

    chains = {
        "none": [],
        "hop-by-hop": [options(IPv6ExtHdrHopByHop)],
        "destination": [options(IPv6ExtHdrDestOpt)],
        "both": [options(IPv6ExtHdrHopByHop), options(IPv6ExtHdrDestOpt)],
        "three": [options(IPv6ExtHdrDestOpt) for _ in range(3)],
        "past the usual 128 bytes": [options(IPv6ExtHdrDestOpt, 92)],
        "atomic fragment": [IPv6ExtHdrFragment(offset=0, m=0, id=5)],
        "before a fragment": [options(IPv6ExtHdrDestOpt), IPv6ExtHdrFragment(offset=0, m=0, id=6)],
        "routing, at its end": [IPv6ExtHdrRouting(type=2, segleft=0, addresses=["fd00::9"])],
    }
    one = lab(["x/a", "x/b"])
    running = agent(one, policy("x", "b", select(one, "x/b"), ingress=allow(one, "x/a", ports=["7001/UDP"])))
    ends = {port: udp_server(one, "x/b", 6, port) for port in (7001, 7002)}
    packets = []
    for name, chain in chains.items():
        for port in ends:
            packet = IPv6(src=one.address("x/a", 6), dst=one.address("x/b", 6))
            for header in chain:
                packet /= header
            packets.append(bytes(packet / UDP(sport=1000 + len(packets), dport=port) / name.encode()))
    with Events(running.control) as events:
        send_frames(one, "x/a", 6, packets)
        arrived = {ends[7001].recv(1000).decode() for _ in chains}
        until(lambda: len(events.of(7002, reason="no-rule")) >= len(chains), what="every denial told")
    assert arrived == set(chains)
    ends[7002].settimeout(0.2)
    with pytest.raises(TimeoutError):
        ends[7002].recv(1000)
    # Headers so long that the ports are beyond what is looked at: denied, even to the allowed port.
    far_off = IPv6(src=one.address("x/a", 6), dst=one.address("x/b", 6)) / options(IPv6ExtHdrDestOpt, 252)
    send_frames(one, "x/a", 6, [bytes(far_off / UDP(sport=9, dport=7001) / b"hidden")])
    until(lambda: running.status()["counters"].get("malformed") == 1, what="the packet is counted")
    ends[7001].settimeout(0.2)
    with pytest.raises(TimeoutError):
        ends[7001].recv(1000)
    for end in ends.values():
        end.close()


# -- what is no proper packet


def broken(family: int, source: str, to: str) -> dict[str, bytes]:
    """Packets that a router passes on and nobody can judge, by what is wrong with them."""
    from scapy.layers.inet import ICMP, IP
    from scapy.layers.inet6 import IPv6, IPv6ExtHdrRouting

    def ip(protocol: int, payload: bytes) -> bytes:
        if family == 4:
            return bytes(IP(src=source, dst=to, proto=protocol) / payload)
        return bytes(IPv6(src=source, dst=to, nh=protocol) / payload)

    ports = bytes.fromhex("1b581b59")
    tcp = ports + bytes(8)
    made = {
        "TCP of 8 bytes": ip(6, ports + bytes(4)),
        "TCP of 19 bytes": ip(6, tcp + b"\x50\x02\x20\x00" + bytes(3)),
        "TCP header shorter than any": ip(6, tcp + b"\x40\x02\x20\x00" + bytes(4)),
        "TCP header longer than the packet": ip(6, tcp + b"\xf0\x02\x20\x00" + bytes(4)),
        "UDP of 4 bytes": ip(17, ports),
        "UDP shorter than its header": ip(17, ports + b"\x00\x04\x00\x00"),
        "SCTP of 8 bytes": ip(132, ports + bytes(4)),
        "UDP-Lite of 4 bytes": ip(136, ports),
        "DCCP of 8 bytes": ip(33, ports + bytes(4)),
        "ICMP of 4 bytes": ip(
            1 if family == 4 else 58, b"\x08\x00\x00\x00" if family == 4 else b"\x80\0\0\0"
        ),
    }
    if family == 4:
        made["an error that quotes nothing"] = bytes(IP(src=source, dst=to) / ICMP(type=3, code=3))
    else:
        made["options past the end"] = ip(60, b"\x11\x08" + bytes(14))
        made["hop-by-hop options in the middle"] = ip(60, b"\x00\x00" + bytes(6) + b"\x11\x00" + bytes(14))
        made["a route to go on by"] = bytes(
            IPv6(src=source, dst=to)
            / IPv6ExtHdrRouting(type=0, segleft=1, addresses=["fd00:1::99"])
            / bytes(8)
        )
    return made


@OFFLOAD
@FAMILY
def test_what_cannot_be_parsed_is_dropped_and_counted(
    lab: LabFactory, agent: AgentFactory, family: int, options: list[str]
) -> None:
    one = lab(["x/a", "x/b"])
    running = agent(one, options=options)
    packets = broken(family, one.address("x/b", family), one.address("x/a", family))
    sent = list(packets.values())

    def arrived(seen: list[bytes]) -> list[str]:
        # A router changes the hop count and, on IPv4, the checksum.
        def bare(data: bytes) -> bytes:
            return data[:8] + data[12:] if family == 4 else data[:7] + data[8:]

        return [name for name, packet in packets.items() if bare(packet) in {bare(one) for one in seen}]

    with sniffing(one, "x/a") as seen:
        send_frames(one, "x/b", family, sent)
    assert arrived(seen) == list(packets), "without a policy all of them pass"
    # Whatever a policy can allow is allowed.
    running.write(policy("x", "a", select(one, "x/a"), ingress=anywhere()))
    with sniffing(one, "x/a") as seen:
        send_frames(one, "x/b", family, sent)
    assert arrived(seen) == []
    counters = running.status()["counters"]
    assert counters.get("malformed", 0) + counters.get("invalid", 0) == len(packets), counters


def test_neighbour_discovery_from_afar_is_an_ordinary_packet(lab: LabFactory, agent: AgentFactory) -> None:
    """A router has counted its hop limit down: it proves nothing any more, and opens nothing."""
    from scapy.layers.inet6 import ICMPv6ND_NA, ICMPv6ND_NS, IPv6

    one = lab(["x/a", "x/b"])
    own, peer = one.address("x/b", 6), one.address("x/a", 6)
    running = agent(one)
    packets = [
        bytes(IPv6(src=own, dst=peer, hlim=255) / kind(tgt=peer)) for kind in (ICMPv6ND_NS, ICMPv6ND_NA)
    ]
    with sniffing(one, "x/a", own) as seen:
        send_frames(one, "x/b", 6, packets)
    assert len(seen) == 2
    rules = allow(one, "x/b", ports=["TCP", "UDP", "SCTP"])
    running.write(policy("x", "a", select(one, "x/a"), ingress=rules))
    with sniffing(one, "x/a", own) as seen:
        send_frames(one, "x/b", 6, packets)
    assert seen == []


def test_a_closed_agent_is_quiet(lab: LabFactory, agent: AgentFactory) -> None:
    """A denied packet is dropped without a word: no error tells the sender that somebody is there."""
    one = lab(["x/a", "x/b"])
    running: RunningAgent = agent(one, deny(one, "x/a"))
    with sniffing(one, "x/b") as seen:
        for family in (4, 6):
            assert not refused(one, "x/b", one.address("x/a", family), 80, family)
    # Neighbour discovery and multicast listeners (RFC 4443: types from 128 on) are no errors.
    assert not [data for data in seen if data[0] >> 4 == 4 or (data[6] == 58 and data[40] < 128)]
    assert running.status()["counters"]["no-rule"] == 2
