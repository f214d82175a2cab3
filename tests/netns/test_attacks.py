"""What a hostile pod may try that no other test does: ways round the steering, and round the sweep."""

from __future__ import annotations

import json
import signal
import socket
import struct
import time

import pytest
import yaml
from conftest import AgentFactory, LabFactory
from objects import anywhere, deny, pod_object, policy, select
from traffic import arrives, passes, received, udp

from dataplane.lab.topology import Topology, Wire
from dataplane.plan import ANNOTATION_SPOOF_CHECK

pytestmark = pytest.mark.netns
# 802.1Q and 802.1ad tags of VLAN 0, alone and one in the other.
TAGS = ("81000000", "88a80000", "8100000081000000", "88a8000081000000")
BEHIND = {4: "172.30.0.5", 6: "fd30::5"}  # an address that a pod routes for


def datagram(source: str, target: str, sport: int, dport: int, data: bytes) -> bytes:
    """IPv4 with UDP, without a UDP checksum (RFC 768)."""
    body = struct.pack("!HHHH", sport, dport, 8 + len(data), 0) + data
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 0, 0, 64, 17, 0)
    head += socket.inet_aton(source) + socket.inet_aton(target)
    total = sum(struct.unpack("!10H", head))
    total = (total & 0xFFFF) + (total >> 16)
    total = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
    return head[:10] + struct.pack("!H", total) + head[12:] + body


def tagged(to: str, source: str, tags: str, packet: bytes) -> bytes:
    """An Ethernet frame whose IPv4 packet hides behind VLAN tags, given in hex."""
    return bytes.fromhex(f"{to}{source}".replace(":", "") + tags + "0800") + packet


@pytest.mark.parametrize("tags", TAGS)
def test_tags_do_not_hide_a_packet_from_the_ingress_rules(
    lab: LabFactory, agent: AgentFactory, tags: str
) -> None:
    # br_netfilter shows tagged frames to nobody, while the receiving pod takes VLAN 0 for none at
    # all (IEEE 802.1Q: a priority tag), twice over (net/core/dev.c, check_vlan_id).
    one = lab(["x/a", "x/b"], Topology(wire=Wire.BRIDGE))
    a, b = one.pod("x/a"), one.pod("x/b")
    target = udp(one, "x/a", 9000)
    packet = datagram(one.address("x/b"), one.address("x/a"), 5000, 9000, b"tagged")
    raw = one.make_socket("x/b", socket.AF_PACKET, socket.SOCK_RAW)
    raw.bind(("eth0", 0))
    raw.send(tagged(a.mac, b.mac, tags, packet))
    assert received(target, 1.0, 1) == [b"tagged"], "pods understand it"
    daemon = agent(one, deny(one, "x/a"))
    assert daemon.status()["problems"] == []
    for _ in range(3):
        raw.send(tagged(a.mac, b.mac, tags, packet))
    assert received(target) == []


@pytest.mark.parametrize("tags", TAGS)
def test_tags_do_not_hide_a_packet_from_the_egress_rules(
    lab: LabFactory, agent: AgentFactory, tags: str
) -> None:
    # To the bridge itself, which routes it: nothing tells the IP hooks which port it came from, so
    # that a source that is nobody's would make it nobody's packet.
    one = lab(["x/a", "x/b"], Topology(wire=Wire.BRIDGE))
    b = one.pod("x/b")
    (bridge,) = json.loads(one.run("node", "ip", "-j", "link", "show", "dev", "cni0").stdout)
    target = udp(one, "outside", 9000)
    packet = datagram("10.1.99.99", one.address("outside"), 5000, 9000, b"tagged")
    raw = one.make_socket("x/b", socket.AF_PACKET, socket.SOCK_RAW)
    raw.bind(("eth0", 0))
    raw.send(tagged(bridge["address"], b.mac, tags, packet))
    assert received(target, 1.0, 1) == [b"tagged"], "the node routes it"
    agent(one, deny(one, "x/b"))
    for _ in range(3):
        raw.send(tagged(bridge["address"], b.mac, tags, packet))
    assert received(target) == []


@pytest.mark.parametrize("family", [4, 6])
def test_what_a_pod_routes_for_others_is_judged_again(
    lab: LabFactory, agent: AgentFactory, family: int
) -> None:
    # The flow carries an address that is no pod's, so that a sweep cannot tell whose flow it is.
    one = lab(["x/a", "x/c"])
    daemon = agent(one, start=False)
    objects = [pod_object(one, one.pod(name)) for name in ("x/a", "x/c")]
    objects[1]["metadata"]["annotations"] = {ANNOTATION_SPOOF_CHECK: "off"}
    daemon.write_text(yaml.safe_dump_all(objects), "pods.yaml", wait=False)
    daemon.write(policy("x", "c", select(one, "x/c"), egress=anywhere("9000/UDP")), wait=False)
    daemon.start()
    target, to = udp(one, "x/a", 9000, family=family), (one.address("x/a", family), 9000)
    forwarded = udp(one, "x/c", 5000, family=family, address=BEHIND[family])
    assert passes(forwarded, to, target)
    daemon.write(policy("x", "c", select(one, "x/c"), egress=anywhere("9001/UDP")))
    assert not arrives(forwarded, to, target)


def test_a_flow_that_a_helper_expects_is_judged(lab: LabFactory, agent: AgentFactory) -> None:
    # Active FTP: the server opens the data connection. The kernel gives it the mark of the control
    # connection, our bits included.
    one = lab(["x/a", "x/b"])
    helper = ("-t", "raw", "-A", "PREROUTING", "-p", "tcp", "--dport", "21", "-j", "CT", "--helper", "ftp")
    if one.run("node", "iptables", *helper, check=False).returncode:
        pytest.skip("this kernel has no FTP helper (CONFIG_NF_CONNTRACK_FTP, modprobe nf_conntrack_ftp)")
    agent(
        one,
        policy("x", "a", select(one, "x/a"), ingress=[]),
        policy("x", "b", select(one, "x/b"), ingress=anywhere("21/TCP")),
    )
    listener = one.make_socket("x/b", socket.AF_INET, socket.SOCK_STREAM)
    listener.bind(("0.0.0.0", 21))
    listener.listen()
    client = one.make_socket("x/a", socket.AF_INET, socket.SOCK_STREAM)
    client.settimeout(5)
    client.connect((one.address("x/b"), 21))
    server, _ = listener.accept()
    data = one.make_socket("x/a", socket.AF_INET, socket.SOCK_STREAM)
    data.bind(("0.0.0.0", 9000))
    data.listen()
    server.sendall(b"220 hello\r\n")
    client.recv(100)
    client.sendall(b"USER x\r\n")  # the helper wants to have seen the end of a line
    server.settimeout(5)
    assert server.recv(100)
    numbers = one.address("x/a").replace(".", ",")
    client.sendall(f"PORT {numbers},{9000 >> 8},{9000 & 255}\r\n".encode())
    server.settimeout(5)
    assert server.recv(100)
    assert one.run("node", "conntrack", "-L", "expect").stdout, "the kernel does expect it"
    back = one.make_socket("x/b", socket.AF_INET, socket.SOCK_STREAM)
    back.settimeout(1)
    with pytest.raises(OSError):
        back.connect((one.address("x/a"), 9000))


def test_readers_do_not_keep_the_agent_from_ending(lab: LabFactory, agent: AgentFactory) -> None:
    # The kubelet kills after 30 s; a `podgate trace` left open somewhere must not bring that about.
    one = lab(["x/a", "x/b"])
    daemon = agent(one, deny(one, "x/a"))
    readers = []
    for question in (b"GET /events?capture=all HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /ev"):
        reader = socket.socket(socket.AF_UNIX)
        reader.connect(str(daemon.control))
        reader.sendall(question)
        readers.append(reader)
    assert readers[0].recv(10)
    began = time.monotonic()
    assert daemon.terminate() == 0
    assert time.monotonic() - began < 10


def test_a_hangup_ends_the_agent_in_order(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/a"])
    # The agent must not have it ignored from us, as below nohup.
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        daemon = agent(one, deny(one, "x/a"))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert daemon.process is not None
    daemon.process.send_signal(signal.SIGHUP)
    assert daemon.process.wait(10) == 0
    assert "rules stay in the kernel" in daemon.text()
