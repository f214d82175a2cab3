"""What the rules steer, drop and keep, with real packets; installing, adopting and removing them."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from packet_lab import inside, run, wait_for
from steering_net import CONFIG, PORT, Listener, Net, net, steering, udp_packet

from dataplane.addresses import parse_address, parse_prefix
from dataplane.config import Fail, IptablesVariant, MarkLayout, Mode
from dataplane.node.interfaces import Kind, Placement
from dataplane.node.rendering import GROUP_CHECKED, GROUP_EGRESS, GROUP_INGRESS
from dataplane.node.rtnetlink import RouteSocket
from dataplane.node.steering import Steering, remove_everything
from dataplane.reasons import Reason

pytestmark = pytest.mark.netns
MARKS = MarkLayout()
NFT, LEGACY = IptablesVariant.NFT, IptablesVariant.LEGACY


@pytest.fixture
def lab() -> Iterator[Net]:
    with net() as made:
        yield made


@pytest.fixture(params=[NFT, LEGACY], ids=["nft", "legacy"])
def variant(request: pytest.FixtureRequest) -> IptablesVariant:
    return IptablesVariant(request.param)


@pytest.fixture(params=[4, 6], ids=["v4", "v6"])
def family(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(params=[(NFT, 4), (LEGACY, 6)], ids=["nft-v4", "legacy-v6"])
def way(request: pytest.FixtureRequest) -> tuple[IptablesVariant, int]:
    """Each variant and each family once: enough where a table has many rows."""
    variant, family = request.param
    return variant, family


def save(variant: IptablesVariant) -> str:
    """Every rule of both families, without counters and the time."""
    lines = [
        line
        for tool in ("iptables", "ip6tables")
        for line in run(f"{tool}-{variant}-save").splitlines()
        if line.startswith(("*", "-A", ":PODGATE"))
    ]
    return "\n".join(lines)


def nft_handles() -> str:
    """Every nft object with its handle, which a rule that is replaced by an equal one does not keep."""
    return re.sub(r"counter packets \d+ bytes \d+", "", run("nft", "-a", "list", "ruleset"))


def group(name: str) -> int:
    with RouteSocket() as route:
        return next(link.group for link in route.links() if link.name == name)


class Flow:
    """One UDP conversation: `ask` goes to the server, `answer` comes back."""

    def __init__(self, lab: Net, client: str, server: str, family: int = 4, port: int = PORT) -> None:
        self.client, self.server = lab.udp(client, family), lab.udp(server, family, port)
        self.to = (lab.address(server, family), port)
        self.back: tuple[str, int] | None = None

    def ask(self) -> None:
        self.client.sendto(b"ask", self.to)

    def asked(self) -> bool:
        """Whether the request arrives; call when it must have been delivered or dropped."""
        return self._got(self.server)

    def answer(self) -> None:
        assert self.back is not None
        self.server.sendto(b"answer", self.back)

    def answered(self) -> bool:
        return self._got(self.client)

    def _got(self, link: socket.socket) -> bool:
        link.setblocking(False)
        try:
            _, sender = link.recvfrom(100)
        except BlockingIOError:
            return False
        if link is self.server:
            self.back = sender
        return True


def arrives(flow: Flow) -> None:
    flow.ask()
    wait_for(flow.asked, 3)
    flow.answer()
    wait_for(flow.answered, 3)


# --- installing, adopting, changing, removing ---------------------------------------------------


def test_a_second_install_touches_nothing(lab: Net, variant: IptablesVariant) -> None:
    with inside(lab.node):
        assert steering(variant).install() is True
        before = save(variant)
        handles = nft_handles()
        assert steering(variant).install() is False
        assert save(variant) == before
        assert nft_handles() == handles
        assert "PODGATE-FORWARD" in before


def test_an_agent_after_a_crash_takes_over_what_is_there(lab: Net, variant: IptablesVariant) -> None:
    lab.add_pod("a")
    lab.add_pod("b")
    pods = [lab.steered("a", egress=True), lab.steered("b", ingress=True)]
    with inside(lab.node):
        first = steering(variant)
        first.install()
        first.apply(pods, [parse_prefix("169.254.20.10/32")[0]])
        sets, rules = run("ipset", "save"), save(variant)
        second = steering(variant)
        assert second.install() is False
        assert second.verify() == []
        assert (run("ipset", "save"), save(variant)) == (sets, rules)
        assert group(lab.veth("a")) == GROUP_EGRESS | GROUP_CHECKED
        second.apply(pods[1:])
        assert group(lab.veth("a")) == 0
        assert lab.address("a") not in run("ipset", "save")
        assert "169.254.20.10" not in run("ipset", "save")
        assert second.verify() == []


@pytest.mark.parametrize("guest", ["watched", "hooked"])
def test_guests_come_and_go_and_are_not_taken_over(guest: str, lab: Net, variant: IptablesVariant) -> None:
    lab.add_pod("a")
    pods = [lab.steered("a", egress=True)]
    with inside(lab.node):
        steer = steering(variant)
        steer.install()
        steer.apply(pods)
        plain = save(variant)
        more: dict[str, Any] = {guest: [parse_address(lab.address("a"))]}
        steer.apply(pods, **more)
        assert f"PODGATE-{guest.upper()}" in save(variant)
        assert steer.verify() == []
        # An agent after a crash knows of nobody who looks on.
        assert steering(variant).install() is True
        assert save(variant) == plain
        steer = steering(variant)
        steer.install()
        steer.apply(pods, **more)
        steer.end_guests()
        assert save(variant) == plain
        steer.apply(pods)
        assert steer.verify() == []
        assert lab.address("a") not in run("ipset", "save").split(f"podgate-{guest}-4", 1)[1]


def test_others_bits_of_a_device_group_stay(lab: Net) -> None:
    host = lab.add_pod("a")
    run("ip", "-n", lab.node, "link", "set", host, "group", "0x01000007")
    with inside(lab.node):
        steer = steering(NFT)
        steer.install()
        steer.apply([lab.steered("a", egress=True)])
        assert group(host) == 0x01000007 | GROUP_EGRESS | GROUP_CHECKED
        steer.apply([])
        assert group(host) == 0x01000007


def test_what_is_applied_already_is_not_applied_again(lab: Net) -> None:
    """Others' changes are found by who looks for them; the next change meets what is there."""
    host = lab.add_pod("a")
    pods = [lab.steered("a", egress=True, ingress=True)]
    member = f"{lab.address('a')},{host}"
    with inside(lab.node):
        steer = steering(NFT)
        steer.install()
        assert steer.apply(pods) is True
        assert steer.apply(list(pods)) is False
        run("ip", "link", "set", host, "group", "7")
        run("ipset", "del", "podgate-spoof-4", member)
        assert steer.apply(pods) is False
        assert steer.keep_groups() == [host]
        assert group(host) == 7 | GROUP_EGRESS | GROUP_INGRESS | GROUP_CHECKED
        assert len(steer.verify(repair=True)) == 1
        assert member in run("ipset", "save", "podgate-spoof-4")
        assert steer.apply(pods) is True  # who repairs may have been stopped half-way
        assert steer.apply(pods) is False
        assert steer.apply([]) is True
        assert (group(host), member in run("ipset", "save", "podgate-spoof-4")) == (7, False)
        assert steer.verify() == []


def test_remove_takes_away_ours_and_nothing_else(lab: Net, variant: IptablesVariant) -> None:
    host = lab.add_pod("a")
    with inside(lab.node):
        run("ip", "link", "set", host, "group", "9")
        run("ipset", "create", "theirs", "hash:ip")
        theirs = f"{variant}"
        for table, chain in (("mangle", "FORWARD"), ("filter", "INPUT"), ("raw", "PREROUTING")):
            run(f"iptables-{theirs}", "-t", table, "-A", chain, "-p", "tcp", "--dport", "9", "-j", "ACCEPT")
        before = save(variant)
        steer = steering(variant)
        steer.install()
        steer.apply([lab.steered("a", egress=True, ingress=True)])
        removed = steering(variant).remove()  # another process, which knows nothing
        assert any("mangle" in line for line in removed)
        assert f"device group bits 0x70000000 of {host}" in removed
        assert "14 IP sets" in removed
        assert "PODGATE" not in save(NFT) + save(LEGACY)
        assert {line for line in before.splitlines() if "-A" in line} <= set(save(variant).splitlines())
        assert run("ipset", "-n", "list").split() == ["theirs"]
        assert group(host) == 9
        assert remove_everything() == []


def test_switching_the_variant_leaves_one_set_of_rules(lab: Net) -> None:
    with inside(lab.node):
        steering(NFT).install()
        assert steering(LEGACY).install() is True
        assert "PODGATE" not in save(NFT)
        assert "PODGATE" in save(LEGACY)


def test_auto_follows_kube_proxy(lab: Net) -> None:
    with inside(lab.node):
        steer = steering(IptablesVariant.AUTO)
        steer.detect()
        assert steer.variant is NFT
        run("iptables-legacy", "-t", "nat", "-N", "KUBE-SERVICES")
        steer.detect()
        assert steer.variant is LEGACY


def test_verify_tells_and_repairs_what_others_changed(lab: Net, variant: IptablesVariant) -> None:
    host = lab.add_pod("a")
    with inside(lab.node):
        steer = steering(variant)
        steer.install()
        steer.apply([lab.steered("a", egress=True)])
        assert steer.verify() == []
        run(f"iptables-{variant}", "-t", "mangle", "-I", "FORWARD", "1", "-p", "tcp", "-j", "ACCEPT")
        run(f"iptables-{variant}", "-t", "mangle", "-F", "PODGATE-QUEUE")
        run(f"ip6tables-{variant}", "-t", "mangle", "-D", "POSTROUTING", "1")
        run(f"iptables-{variant}", "-t", "raw", "-A", "PREROUTING", "-j", "PODGATE-PREROUTING")
        run("ipset", "flush", "podgate-spoof-4")
        run("ip", "link", "set", host, "group", "0")
        found = steer.verify(repair=True)
        assert [line for line in found if "rules stand before the jump to PODGATE-FORWARD" in line]
        assert "iptables mangle: chain PODGATE-QUEUE was changed" in found
        assert "ip6tables mangle POSTROUTING: the jump to PODGATE-POSTROUTING is gone" in found
        assert "iptables raw PREROUTING: 2 jumps to PODGATE-PREROUTING" in found
        assert "ipset podgate-spoof-4 was changed: 1 members missing, 0 added" in found
        assert f"{host}: our bits of its device group are 0x0, not 0x50000000" in found
        assert steer.verify() == []


def test_a_machine_without_ipv6_is_told_and_enforces_ipv4(lab: Net) -> None:
    lab.add_pod("a")
    flow = Flow(lab, "a", "outside")
    with inside(lab.node):
        steer = Steering(replace(CONFIG, iptables=NFT), ipv6=False)
        steer.install()
        assert any("IPv6 is off" in problem for problem in steer.problems)
        steer.apply([lab.steered("a", egress=True)], [parse_prefix("fd00:ec2::/32")[0]])
        assert steer.verify() == []
        flow.ask()
        wait_for(lambda: lab.queued(NFT) == 1)
        assert "PODGATE" not in run("ip6tables-nft-save")


def test_rules_of_others_that_use_our_mark_bits_are_told(lab: Net) -> None:
    with inside(lab.node):
        run("iptables", "-t", "mangle", "-A", "PREROUTING", "-j", "MARK", "--set-mark", "0x1")
        run("iptables", "-t", "mangle", "-A", "PREROUTING", "-j", "MARK", "--or-mark", "0x4000")
        steer = steering(NFT)
        steer.detect()
        assert len(steer.problems) == 1
        assert "--set-xmark 0x1/0xffffffff" in steer.problems[0]


# --- no gap, no loss ----------------------------------------------------------------------------


def test_no_packet_slips_through_while_rules_are_replaced(lab: Net, variant: IptablesVariant) -> None:
    """Default deny (nobody listens), a steady stream of packets, and agents with ever other options."""
    lab.add_pod("a")
    flow = Flow(lab, "a", "outside")
    flow.server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    with inside(lab.node):
        steer = steering(variant)
        steer.install()
        steer.apply([lab.steered("a", egress=True)])
        stop = threading.Event()
        sent = 0

        def flood() -> None:
            nonlocal sent
            while not stop.is_set():
                flow.ask()
                sent += 1

        thread = threading.Thread(target=flood)
        thread.start()
        try:
            for round_ in range(12):
                steer = steering(
                    variant,
                    queue_base=round_,
                    queues=1 + round_ % 2,
                    offload=round_ % 3 != 0,
                    mode=Mode.STRICT if round_ % 4 == 1 else Mode.STANDARD,
                    marks=MarkLayout() if round_ % 5 else MarkLayout.from_mask(0x07000000),
                )
                assert steer.install() is True
                steer.apply([lab.steered("a", egress=True, ingress=bool(round_ % 2))])
        finally:
            stop.set()
            thread.join()
        assert sent > 200
        assert not flow.asked()


def test_no_packet_slips_through_while_the_variant_changes(lab: Net) -> None:
    lab.add_pod("a")
    flow = Flow(lab, "a", "outside")
    with inside(lab.node):
        steering(NFT).install()
        stop = threading.Event()
        steer = steering(NFT)
        steer.install()
        steer.apply([lab.steered("a", egress=True)])

        def flood() -> None:
            while not stop.is_set():
                flow.ask()

        thread = threading.Thread(target=flood)
        thread.start()
        try:
            for variant in (LEGACY, NFT) * 3:
                assert steering(variant).install() is True
        finally:
            stop.set()
            thread.join()
        assert not flow.asked()


def test_packets_that_wait_in_a_queue_survive_every_change(lab: Net, variant: IptablesVariant) -> None:
    lab.add_pod("a")
    lab.add_pod("b")
    flow = Flow(lab, "a", "outside")
    with inside(lab.node):
        # With the last rule that needs it, conntrack itself leaves the namespace, and every queued
        # packet with its hooks; a node has other rules that need it.
        for tool in ("iptables", "ip6tables"):
            run(f"{tool}-{variant}", "-A", "FORWARD", "-m", "conntrack", "--ctstate", "INVALID")
        steer = steering(variant)
        steer.install()
        steer.apply([lab.steered("a", egress=True)])
        listener = Listener(0)
        flow.ask()
        listener.collect(1)
        steer.apply([lab.steered("a", egress=True), lab.steered("b", egress=True, ingress=True)])
        steering(variant, queue_base=4, offload=False).install()
        run(f"iptables-{variant}", "-t", "mangle", "-D", "FORWARD", "1")
        steer.verify(repair=True)
        remove_everything()
        assert not flow.asked()
        listener.accept()
        wait_for(flow.asked, 3)
        listener.close()


# --- what is steered ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("client", "server", "egress", "ingress", "queued"),
    [
        ("a", "outside", False, False, False),
        ("a", "outside", True, False, True),
        ("a", "outside", False, True, False),
        ("outside", "a", True, False, False),
        ("outside", "a", False, True, True),
        ("b", "a", False, True, True),
        ("a", "b", False, True, False),
        ("a", "b", True, False, True),
    ],
)
def test_only_the_isolated_direction_of_a_pod_is_queued(
    lab: Net,
    way: tuple[IptablesVariant, int],
    client: str,
    server: str,
    egress: bool,
    ingress: bool,
    queued: bool,
) -> None:
    variant, family = way
    lab.add_pod("a")
    lab.add_pod("b")
    flow = Flow(lab, client, server, family)
    with inside(lab.node):
        steer = steering(variant)
        steer.install()
        steer.apply([lab.steered("a", egress=egress, ingress=ingress), lab.steered("b")])
        if queued:
            flow.ask()
            wait_for(lambda: lab.queued(variant, family) == 1)
            assert not flow.asked()
        else:
            arrives(flow)
            assert lab.queued(variant, family) == 0


def test_one_queue_pass_per_flow_and_both_ends_need_their_bit(
    lab: Net, variant: IptablesVariant, family: int
) -> None:
    lab.add_pod("a")
    lab.add_pod("b")
    flow = Flow(lab, "a", "b", family)
    with inside(lab.node):
        steer = steering(variant)
        steer.install()
        steer.apply([lab.steered("a", egress=True), lab.steered("b", ingress=True)])
        listener = Listener(0)
        flow.ask()
        listener.collect(1)
        assert listener.accept(MARKS.egress) == [0]
        wait_for(flow.asked, 3)
        flow.ask()  # the other end's bit is still missing
        listener.collect(1)
        assert listener.accept(MARKS.ingress) == [0]
        wait_for(flow.asked, 3)
        flow.answer()
        wait_for(flow.answered, 3)
        arrives(flow)
        assert listener.pending() == 0
        assert listener.seen == 2
        listener.close()


def test_a_reply_without_its_bit_is_queued_and_marked_as_one(lab: Net, variant: IptablesVariant) -> None:
    lab.add_pod("a")
    flow = Flow(lab, "a", "outside")
    with inside(lab.node):
        steer = steering(variant)
        steer.install()
        flow.ask()
        wait_for(flow.asked, 3)  # before isolation began
        steer.apply([lab.steered("a", egress=True)])
        listener = Listener(0)
        flow.answer()
        listener.collect(1)
        assert listener.accept() == [MARKS.reply]
        wait_for(flow.answered, 3)
        listener.close()


def test_marks_of_others_survive_and_ours_leave_the_packet(lab: Net, variant: IptablesVariant) -> None:
    lab.add_pod("a")
    flow = Flow(lab, "a", "outside")
    tool = f"iptables-{variant}"
    with inside(lab.node):
        # A component that marks, and one that claims a verdict of ours without there being any.
        run(tool, "-t", "mangle", "-A", "PREROUTING", "-j", "MARK", "--set-mark", "0x30004000")
        run(
            tool,
            "-t",
            "nat",
            "-A",
            "POSTROUTING",
            "-m",
            "mark",
            "--mark",
            "0x4000/0xffffffff",
            "-j",
            "ACCEPT",
        )
        steer = steering(variant)
        steer.install()
        steer.apply([lab.steered("a", egress=True)])
        listener = Listener(0)
        flow.ask()
        listener.collect(1)
        assert listener.accept(MARKS.egress) == [0x4000]
        wait_for(flow.asked, 3)
        rules = run(tool, "-t", "nat", "-nvxL", "POSTROUTING").splitlines()
        assert next(line.split()[0] for line in rules if "0x4000" in line) == "1"
        listener.close()


def test_without_offload_every_packet_is_queued(lab: Net) -> None:
    lab.add_pod("a")
    flow = Flow(lab, "a", "outside")
    with inside(lab.node):
        steer = steering(NFT, offload=False)
        steer.install()
        steer.apply([lab.steered("a", egress=True)])
        listener = Listener(0)
        for _ in range(3):
            flow.ask()
            listener.collect(1)
            listener.accept(MARKS.egress)
            wait_for(flow.asked, 3)
        flow.answer()
        listener.collect(1)
        assert listener.accept(MARKS.egress) == [MARKS.reply]
        listener.close()


def test_untracked_packets_are_queued_one_by_one(lab: Net, family: int) -> None:
    lab.add_pod("a")
    flow = Flow(lab, "a", "outside", family)
    with inside(lab.node):
        tool = "iptables" if family == 4 else "ip6tables"
        run(tool, "-t", "raw", "-A", "PREROUTING", "-p", "udp", "-j", "NOTRACK")
        steer = steering(NFT)
        steer.install()
        steer.apply([lab.steered("a", egress=True)])
        listener = Listener(0)
        for _ in range(2):
            flow.ask()
            listener.collect(1)
            assert listener.accept(MARKS.egress) == [0]
            wait_for(flow.asked, 3)
        listener.close()


def test_fail_open_lets_packets_pass_while_nobody_listens(lab: Net, variant: IptablesVariant) -> None:
    lab.add_pod("a")
    flow = Flow(lab, "a", "outside")
    with inside(lab.node):
        steer = steering(variant, fail=Fail.OPEN, queues=2)
        steer.install()
        steer.apply([lab.steered("a", egress=True)])
        arrives(flow)
        assert lab.queued(variant) == 2


def test_invalid_packets_of_isolated_pods_are_dropped_and_counted(lab: Net, variant: IptablesVariant) -> None:
    lab.add_pod("a")
    with inside(lab.space("a")):
        link = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP)
    with link, inside(lab.node):
        steer = steering(variant)
        steer.install()
        link.sendto(b"\0\0\0\0", (lab.address("outside"), 0))  # TCP cut off after the ports
        assert steer.counters()[Reason.INVALID] == 0
        steer.apply([lab.steered("a", ingress=True)])
        link.sendto(b"\0\0\0\0", (lab.address("outside"), 0))
        wait_for(lambda: steer.counters()[Reason.INVALID] == 1)
        other = steering(variant, queue_base=3, offload=False, mode=Mode.STRICT)
        other.install()
        other.apply([lab.steered("a", ingress=True)])
        assert other.counters()[Reason.INVALID] == 1  # replaced rules take their counts along
        assert lab.queued(variant) == 0


# --- forged sources -----------------------------------------------------------------------------


def test_a_forged_source_is_dropped_before_conntrack(lab: Net, variant: IptablesVariant, family: int) -> None:
    lab.add_pod("a")
    lab.add_pod("b")
    server = lab.udp("outside", family, PORT)
    raw = lab.raw("a", family)
    target = lab.address("outside", family)

    def send(source: str) -> None:
        raw.sendto(udp_packet(family, source, target, PORT, source.encode()), (target, 0))

    with inside(lab.node):
        steer = steering(variant)
        steer.install()
        steer.apply([lab.steered("a"), lab.steered("b")])  # no policy on either: the check is for all
        victim, own = lab.address("b", family), lab.address("a", family)
        send(victim)
        send(lab.address("node", family))
        send(own)
        assert server.recv(100).rstrip(b"\0") == own.encode()
        assert steer.counters()[Reason.SPOOFED] == 2
        steer.apply([lab.steered("a", spoof_check=False)])
        send(victim)
        assert server.recv(100).rstrip(b"\0") == victim.encode()
        assert steer.counters()[Reason.SPOOFED] == 2


def test_another_pod_cannot_ride_an_offloaded_flow(lab: Net, family: int) -> None:
    lab.add_pod("a")
    lab.add_pod("b")
    with inside(lab.node):
        steer = steering(NFT)
        steer.install()
        steer.apply([lab.steered("a", egress=True), lab.steered("b", egress=True)])
        listener = Listener(0)
        client, server = lab.udp("a", family), lab.udp("outside", family, PORT)
        client.bind(("", 4000))
        to = (lab.address("outside", family), PORT)
        client.sendto(b"mine", to)
        listener.collect(1)
        listener.accept(MARKS.egress)
        assert server.recv(100) == b"mine"
        lab.raw("b", family).sendto(udp_packet(family, lab.address("a", family), to[0], PORT), (to[0], 0))
        client.sendto(b"mine again", to)
        assert server.recv(100) == b"mine again"
        assert steer.counters()[Reason.SPOOFED] == 1
        listener.close()


# --- the node itself ----------------------------------------------------------------------------


def test_only_local_service_addresses_are_steered_in_input(
    lab: Net, variant: IptablesVariant, family: int
) -> None:
    lab.add_pod("a")
    service = {4: "169.254.20.10", 6: "fd00:ec2::23"}[family]
    length, nodad = ("32", ()) if family == 4 else ("128", ("nodad",))
    run("ip", "-n", lab.node, "addr", "add", f"{service}/{length}", "dev", "lo", *nodad)
    client = lab.udp("a", family)
    kubelet = lab.udp("node", family, PORT, lab.address("node", family))
    dns = lab.udp("node", family, PORT, service)
    with inside(lab.node):
        steer = steering(variant)
        steer.install()
        steer.apply(
            [lab.steered("a", egress=True, ingress=True)],
            [parse_prefix("169.254.20.10/32")[0], parse_prefix("fd00:ec2::/32")[0]],
        )
        listener = Listener(0)
        client.sendto(b"kubelet", (lab.address("node", family), PORT))
        message, sender = kubelet.recvfrom(100)
        assert message == b"kubelet"
        kubelet.sendto(b"probe", sender)
        assert client.recv(100) == b"probe"
        assert listener.pending() == 0

        client.sendto(b"dns", (service, PORT))
        listener.collect(1)
        listener.accept(MARKS.egress)
        assert dns.recv(100) == b"dns"
        client.sendto(b"dns again", (service, PORT))
        assert dns.recv(100) == b"dns again"
        assert listener.seen == 1
        listener.close()


def test_strict_mode_closes_interfaces_nobody_knows_yet(
    lab: Net, variant: IptablesVariant, family: int
) -> None:
    lab.add_pod("a")
    lab.add_pod("b", "vlan0123456789a")
    out, back = Flow(lab, "a", "outside", family), Flow(lab, "outside", "b", family)
    probe = Flow(lab, "node", "a", family, PORT + 1)
    with inside(lab.node):
        steer = steering(variant, mode=Mode.STRICT)
        steer.install()
        out.ask()
        back.ask()
        wait_for(lambda: steer.counters()[Reason.NO_TABLE] == 2)
        arrives(probe)  # the node's own traffic
        steer.apply([lab.steered("a")], not_pods=["vlan0123456789a"])
        arrives(out)
        arrives(back)
        assert steer.counters()[Reason.NO_TABLE] == 2


def test_strict_mode_spares_the_uplinks_of_branch_interfaces(lab: Net) -> None:
    run("ip", "-n", lab.node, "link", "set", "up0", "down")
    run("ip", "-n", lab.node, "link", "set", "up0", "name", "vlan.eth.1")
    run("ip", "-n", lab.node, "link", "set", "vlan.eth.1", "up")
    run("ip", "-n", lab.node, "addr", "replace", f"{lab.address('node')}/24", "dev", "vlan.eth.1")
    lab.add_pod("a")
    flow = Flow(lab, "a", "outside")
    with inside(lab.node):
        steer = steering(NFT, mode=Mode.STRICT)
        steer.install()
        steer.apply([lab.steered("a")])
        arrives(flow)


# --- pods on a bridge ---------------------------------------------------------------------------


@pytest.fixture
def bridged(lab: Net) -> Net:
    """Pods a and b on a bridge, pod c on a veth of its own."""
    lab.add_bridged_pod("a", "br0")
    lab.add_bridged_pod("b", "br0")
    lab.add_pod("c")
    run("ip", "-n", lab.space("a"), "route", "add", lab.address("c"), "via", "10.99.0.1")
    run("ip", "-n", lab.space("a"), "-6", "route", "add", lab.address("c", 6), "via", "fd99::1")
    run("ip", "-n", lab.node, "route", "replace", f"{lab.address('c')}/32", "dev", lab.veth("c"))
    return lab


@pytest.mark.parametrize(
    ("client", "server", "isolated", "bits"),
    [
        ("a", "b", {"a": "egress"}, MARKS.egress),
        ("a", "b", {"b": "ingress"}, MARKS.ingress),
        ("a", "outside", {"a": "egress"}, MARKS.egress),
        ("outside", "a", {"a": "ingress"}, MARKS.ingress),
        ("a", "c", {"a": "egress"}, MARKS.egress),
        ("a", "c", {"c": "ingress"}, MARKS.ingress),
    ],
)
def test_pods_on_a_bridge_are_queued_once_in_their_isolated_direction(
    bridged: Net,
    way: tuple[IptablesVariant, int],
    client: str,
    server: str,
    isolated: dict[str, str],
    bits: int,
) -> None:
    variant, family = way
    lab = bridged
    flow = Flow(lab, client, server, family)
    with inside(lab.node):
        steer = steering(variant)
        steer.install()
        pods = [
            lab.steered(
                name,
                egress=isolated.get(name) == "egress",
                ingress=isolated.get(name) == "ingress",
                bridge="br0" if name != "c" else None,
            )
            for name in ("a", "b", "c")
        ]
        steer.apply(pods)
        assert steer.verify() == []
        listener = Listener(0)
        flow.ask()
        listener.collect(1)
        assert listener.accept() == [0]
        wait_for(flow.asked, 3)
        flow.answer()  # its bit is missing: the reply is judged too
        listener.collect(1)
        assert listener.accept(bits) == [MARKS.reply]
        wait_for(flow.answered, 3)
        arrives(flow)
        assert listener.pending() == 0
        # The opposite direction of isolation is none of this flow's business.
        assert listener.seen == 2
        adopted = steering(variant)
        assert adopted.install() is False
        adopted.apply(pods)
        assert adopted.verify() == []
        listener.close()


def test_a_bridged_pod_cannot_forge_nor_hide_behind_its_link_local_address(bridged: Net) -> None:
    lab = bridged
    with inside(lab.node):
        steer = steering(NFT)
        steer.install()
        steer.apply([lab.steered("a", egress=True, bridge="br0"), lab.steered("b", bridge="br0")])
        for family in (4, 6):
            target = lab.address("outside", family)
            lab.raw("a", family).sendto(
                udp_packet(family, lab.address("b", family), target, PORT), (target, 0)
            )
            wait_for(lambda count=family // 2 - 1: steer.counters()[Reason.SPOOFED] == count)
        link_local = run(
            "ip", "-n", lab.space("b"), "-6", "-o", "addr", "show", "dev", "eth0", "scope", "link"
        )
        address = link_local.split("inet6 ")[1].split("/")[0]
        lab.udp("b", 6, PORT)
        with inside(lab.space("a")):
            scope = socket.if_nametoindex("eth0")
        client = lab.udp("a", 6)
        before = lab.queued(NFT, 6)

        def sent() -> bool:
            client.sendto(b"x", (address, PORT, 0, scope))
            return lab.queued(NFT, 6) > before

        wait_for(sent)


def test_a_bridged_pod_whose_source_is_not_checked_is_steered_by_its_port(bridged: Net, family: int) -> None:
    lab = bridged
    with inside(lab.node):
        steer = steering(NFT)
        steer.install()
        steer.apply(
            [lab.steered("a", egress=True, spoof_check=False, bridge="br0"), lab.steered("b", bridge="br0")]
        )
        target = lab.address("outside", family)
        for count, source in enumerate(
            (lab.address("b", family), {4: "192.0.2.7", 6: "2001:db8::7"}[family]), 1
        ):
            lab.raw("a", family).sendto(udp_packet(family, source, target, PORT), (target, 0))

            def queued_udp(count: int = count) -> bool:
                return lab.queued(NFT, family) >= count

            wait_for(queued_udp)
        assert steer.counters()[Reason.SPOOFED] == 0


def test_many_bridged_pods_are_checked_through_short_chains(lab: Net) -> None:
    lab.add_bridged_pod("a", "br0")
    one = lab.steered("a", egress=True, bridge="br0")
    others = [
        replace(
            one,
            placement=Placement(1000 + number, f"vx{number}", Kind.BRIDGED, "br0", 1),
            addresses=(
                parse_address(f"10.99.{number // 200}.{number % 200 + 10}"),
                parse_address(f"fd99::{number + 100:x}"),
            ),
        )
        for number in range(250)
    ]
    flow = Flow(lab, "a", "outside")
    with inside(lab.node):
        steer = steering(NFT)
        steer.install()
        steer.apply([*others, one])
        assert steer.verify() == []
        flow.ask()
        wait_for(lambda: lab.queued(NFT) == 1)
        assert steer.counters()[Reason.SPOOFED] == 0
