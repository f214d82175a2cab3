"""What policies allow and deny, asked with real packets on IPv4 and IPv6. Tables written by hand."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Sequence

import pytest
import yaml
from conftest import AgentFactory, LabFactory
from objects import Object, allow, anywhere, deny, pod, policy, rule, select, until
from packets import FAMILIES, af, check

from dataplane.lab import netns
from dataplane.lab.topology import Topology, Wire

pytestmark = pytest.mark.netns

THREE = "80/TCP 80/UDP 80/SCTP"
PODS = ("x/a", "x/b", "y/c")
VARIANTS = {
    "default": (),
    "no-offload": ("--no-offload",),
    "netfilterqueue": ("--backend", "netfilterqueue"),
    "netfilterqueue-no-offload": ("--backend", "netfilterqueue", "--no-offload"),
    "legacy": ("--iptables", "legacy"),
    "two-queues": ("--queues", "2", "--queue-base", "7"),
    "fail-open": ("--fail", "open"),
}


def nets(v4: str, v6: str, *ports: str, except_: Sequence[str] = ()) -> list[Object]:
    """The same rule for both families."""
    return [
        rule(v4, *ports, except_=[one for one in except_ if ":" not in one]),
        rule(v6, *ports, except_=[one for one in except_ if ":" in one]),
    ]


@pytest.mark.parametrize(
    ("directions", "table"),
    [
        (
            "ingress",
            (("x/a", "x/b", "..."), ("x/b", "x/a", "XXX"), ("y/c", "x/a", "XXX"), ("outside", "x/a", "XXX")),
        ),
        (
            "egress",
            (("x/a", "x/b", "XXX"), ("x/b", "x/a", "..."), ("y/c", "x/a", "..."), ("outside", "x/a", "...")),
        ),
        (
            "ingress egress",
            (("x/a", "x/b", "XXX"), ("x/b", "x/a", "XXX"), ("y/c", "x/a", "XXX"), ("outside", "x/a", "XXX")),
        ),
    ],
)
def test_default_deny(
    lab: LabFactory, agent: AgentFactory, directions: str, table: tuple[tuple[str, str, str], ...]
) -> None:
    one = lab(PODS)
    running = agent(one, deny(one, "x/a", directions=directions))
    rows = [(source, to, THREE, verdicts) for source, to, verdicts in table]
    # Nobody else is touched; the node, where kubelet's probes come from, still reaches the pod.
    rows += [("x/b", "y/c", THREE, "..."), ("outside", "x/b", THREE, "..."), ("node", "x/a", THREE, "...")]
    out = "X" if "egress" in directions else "."
    rows += [("x/a", "outside", "80/TCP ICMP", out * 2), ("x/b", "outside", "80/TCP ICMP", "..")]
    check(one, *rows)
    assert running.status()["counters"]["no-rule"] >= 6
    running.remove()
    check(one, ("x/a", "x/b", THREE, "..."), ("y/c", "x/a", THREE, "..."))


def test_ingress_by_peer_port_and_protocol(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(PODS)
    rules = [
        *allow(one, "x/b", ports=["80/TCP", "90-95/UDP", "SCTP"]),
        *allow(one, "y/c", ports=["443/TCP"]),
    ]
    agent(one, policy("x", "web", select(one, "x/a"), ingress=rules))
    ports = "80/TCP 81/TCP 443/TCP 80/UDP 90/UDP 80/SCTP 4000/SCTP ICMP"
    check(
        one,
        ("x/b", "x/a", ports, ".XXX...X"),
        ("y/c", "x/a", ports, "XX.XXXXX"),
        ("outside", "x/a", ports, "XXXXXXXX"),
        ("x/a", "x/b", ports, "........"),
        ("x/b", "y/c", ports, "........"),
    )


def test_egress_by_peer_port_and_protocol(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(PODS)
    one.add_external("203.0.113.9")
    one.add_external("2001:db8::9")
    rules = [
        *allow(one, "x/b", ports=["80/TCP", "90-95/UDP", "SCTP"]),
        *nets("203.0.113.8/31", "2001:db8::8/127", "443/TCP"),
    ]
    agent(one, policy("x", "web", select(one, "x/a"), egress=rules))
    ports = "80/TCP 81/TCP 443/TCP 80/UDP 90/UDP 80/SCTP 4000/SCTP ICMP"
    check(
        one,
        ("x/a", "x/b", ports, ".XXX...X"),
        ("x/a", "y/c", ports, "XXXXXXXX"),
        ("x/a", "203.0.113.9", ports, "XX.XXXXX"),
        ("x/a", "2001:db8::9", ports, "XX.XXXXX"),
        ("x/a", "outside", ports, "XXXXXXXX"),
        ("x/b", "x/a", ports, "........"),
        ("x/b", "203.0.113.9", ports, "........"),
    )


@pytest.mark.parametrize("direction", ["ingress", "egress"])
def test_port_ranges(lab: LabFactory, agent: AgentFactory, direction: str) -> None:
    one = lab(["x/a", "x/b"])
    ranges = ["1000-1010/TCP", "1005-1020/UDP", "1010-1010/SCTP", "65534-65535/TCP", "1-2/TCP"]
    if direction == "ingress":
        made = policy("x", "ranges", select(one, "x/b"), ingress=allow(one, "x/a", ports=ranges))
    else:
        made = policy("x", "ranges", select(one, "x/a"), egress=allow(one, "x/b", ports=ranges))
    agent(one, made)
    check(
        one,
        ("x/a", "x/b", "999/TCP 1000/TCP 1005/TCP 1010/TCP 1011/TCP 1015/TCP", "X...XX"),
        ("x/a", "x/b", "1000/UDP 1004/UDP 1005/UDP 1010/UDP 1020/UDP 1021/UDP", "XX...X"),
        ("x/a", "x/b", "1000/SCTP 1009/SCTP 1010/SCTP 1011/SCTP", "XX.X"),
        ("x/a", "x/b", "1/TCP 2/TCP 3/TCP 65533/TCP 65534/TCP 65535/TCP 65535/UDP", "..XX..X"),
    )


# Rule without or with one port, and what it opens of: 80/TCP 81/TCP 80/UDP 81/UDP 80/SCTP 81/SCTP ICMP
OPENS = {
    "80/TCP": ".XXXXXX",
    "80/UDP": "XX.XXXX",
    "80/SCTP": "XXXX.XX",
    "TCP": "..XXXXX",
    "UDP": "XX..XXX",
    "SCTP": "XXXX..X",
    "": ".......",
}


@pytest.mark.parametrize("direction", ["ingress", "egress"])
def test_a_protocol_opens_only_itself(lab: LabFactory, agent: AgentFactory, direction: str) -> None:
    pods = {f"x/p{number}": port for number, port in enumerate(OPENS)}
    one = lab(["x/a", *pods])
    made = []
    for name, port in pods.items():
        rules = allow(one, "x/a", ports=[port] if port else [])
        short = name.removeprefix("x/")
        if direction == "ingress":
            made.append(policy("x", short, select(one, name), ingress=rules))
        else:
            made.append(policy("x", short, select(one, name), egress=rules))
    agent(one, *made)
    ports = "80/TCP 81/TCP 80/UDP 81/UDP 80/SCTP 81/SCTP ICMP"
    if direction == "ingress":
        check(one, *(("x/a", name, ports, OPENS[port]) for name, port in pods.items()))
    else:
        check(one, *((name, "x/a", ports, OPENS[port]) for name, port in pods.items()))


def test_both_ends_must_allow(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(PODS)
    client = policy(
        "x", "client", select(one, "x/a"), egress=allow(one, "x/b", ports=["80-82/TCP", "80/UDP", "SCTP"])
    )
    server = policy(
        "x", "server", select(one, "x/b"), ingress=allow(one, "x/a", ports=["82-84/TCP", "UDP", "81/SCTP"])
    )
    running = agent(one, client, server)
    ports = "80/TCP 82/TCP 84/TCP 80/UDP 81/UDP 80/SCTP 81/SCTP"
    check(
        one,
        ("x/a", "x/b", ports, "X.X.XX."),
        ("x/b", "x/a", ports, "......."),  # neither a's ingress nor b's egress is isolated
        ("x/a", "y/c", ports, "XXXXXXX"),
        ("y/c", "x/b", ports, "XXXXXXX"),
        ("y/c", "x/a", ports, "......."),
        ("x/b", "y/c", ports, "......."),
    )
    # The client's policy goes: the server's alone decides.
    running.write(server)
    check(one, ("x/a", "x/b", ports, "X....X."), ("x/a", "y/c", ports, "......."))


def test_ingress_and_egress_are_independent(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(PODS)
    both = policy(
        "x",
        "both",
        select(one, "x/a"),
        ingress=allow(one, "y/c", ports=["80/TCP"]),
        egress=allow(one, "x/b", ports=["81/TCP"]),
    )
    agent(one, both)
    ports = "80/TCP 81/TCP"
    check(
        one,
        ("y/c", "x/a", ports, ".X"),
        ("x/b", "x/a", ports, "XX"),
        ("x/a", "x/b", ports, "X."),
        ("x/a", "y/c", ports, "XX"),
    )


def test_policies_union(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(PODS)
    first = policy("x", "one", select(one, "x/a"), ingress=allow(one, "x/b", ports=["81/TCP"]))
    second = policy("x", "two", select(one, "x/a", "x/b"), ingress=allow(one, "x/b", ports=["80/TCP"]))
    every = policy("x", "all", select(one, "x/a"), ingress=anywhere())
    ports = "80/TCP 81/TCP 82/TCP"
    running = agent(one, deny(one, "x/a"), first)
    check(one, ("x/b", "x/a", ports, "X.X"), ("y/c", "x/a", ports, "XXX"), ("x/a", "x/b", ports, "XXX"))
    running.write(deny(one, "x/a"), first, second)
    check(one, ("x/b", "x/a", ports, "..X"), ("y/c", "x/a", ports, "XXX"), ("y/c", "x/b", ports, "XXX"))
    running.write(deny(one, "x/a"), first, second, every)
    check(one, ("x/b", "x/a", ports, "..."), ("y/c", "x/a", ports, "..."), ("x/a", "y/c", ports, "XXX"))
    running.write(first)
    check(one, ("x/b", "x/a", ports, "X.X"), ("x/a", "y/c", ports, "..."), ("y/c", "x/b", ports, "..."))


# The four cases of policy-semantics that a longest-prefix map gets wrong, each as rules for both
# families: (v4, v6, ports, excepts), and rows: (v4, v6, ports, verdicts).
OVERLAPS = {
    "narrower net, other port": (
        [
            ("10.0.0.0/8", "fd10::/16", ["80/TCP"], ["10.1.2.0/24", "fd10:1:2::/48"]),
            ("10.1.0.0/16", "fd10:1::/32", ["443/TCP"], []),
        ],
        [
            ("10.1.2.9", "fd10:1:2::9", "443/TCP 80/TCP", ".X"),
            ("10.1.3.9", "fd10:1:3::9", "443/TCP 80/TCP", ".."),
            ("10.2.0.9", "fd10:2::9", "443/TCP 80/TCP", "X."),
        ],
    ),
    "and a host inside": (
        [
            ("10.0.0.0/8", "fd10::/16", ["80/TCP"], ["10.1.2.0/24", "fd10:1:2::/48"]),
            ("10.1.0.0/16", "fd10:1::/32", ["443/TCP"], []),
            ("10.1.2.5/32", "fd10:1:2::5/128", ["22/TCP"], []),
        ],
        [
            ("10.1.2.5", "fd10:1:2::5", "80/TCP 443/TCP 22/TCP", "X.."),
            ("10.1.2.6", "fd10:1:2::6", "80/TCP 443/TCP 22/TCP", "X.X"),
        ],
    ),
    "a port everywhere": (
        [
            ("0.0.0.0/0", "::/0", ["53/UDP", "53/TCP"], []),
            ("0.0.0.0/0", "::/0", [], ["10.0.0.0/8", "fd10::/16"]),
        ],
        [
            ("10.0.0.10", "fd10::10", "53/TCP 53/UDP 54/TCP 54/UDP ICMP", "..XXX"),
            ("203.0.113.9", "2001:db8::9", "53/TCP 53/UDP 54/TCP 54/UDP ICMP", "....."),
        ],
    ),
    "an except narrower than another rule": (
        [
            ("0.0.0.0/0", "::/0", [], ["10.0.0.0/24", "fd10::/64"]),
            ("10.0.0.0/16", "fd10::/48", ["80/TCP"], []),
        ],
        [
            ("10.0.5.5", "fd10:0:0:5::5", "443/TCP 80/TCP ICMP", "..."),
            ("10.0.0.5", "fd10::5", "443/TCP 80/TCP ICMP", "X.X"),
        ],
    ),
}


@pytest.mark.parametrize("case", OVERLAPS)
def test_overlapping_rules(lab: LabFactory, agent: AgentFactory, case: str) -> None:
    rules, rows = OVERLAPS[case]
    one = lab(["x/a", "x/b"], Topology(v4="10.200.0.0/16"))
    for v4, v6, _, _ in rows:
        one.add_external(v4)
        one.add_external(v6)
    made = [item for v4, v6, ports, excepts in rules for item in nets(v4, v6, *ports, except_=excepts)]
    running = agent(one, policy("x", "egress", select(one, "x/a"), egress=made))
    table = [("x/a", to, ports, verdicts) for v4, v6, ports, verdicts in rows for to in (v4, v6)]
    check(one, *table)
    # The same rules shared out over several policies, slices and orders mean the same.
    apart = [
        policy("x", f"part-{number}", select(one, "x/a"), egress=[item])
        for number, item in enumerate(reversed(made))
    ]
    running.write(*apart)
    check(one, *table)


def test_except(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(PODS)
    excepts = [f"{one.address('x/b', 4)}/32", f"{one.address('x/b', 6)}/128"]
    agent(
        one,
        policy("x", "in", select(one, "x/a"), ingress=anywhere("80/TCP", "UDP", except_=excepts)),
        policy("y", "out", select(one, "y/c"), egress=anywhere(except_=excepts)),
    )
    ports = "80/TCP 81/TCP 80/UDP"
    check(
        one,
        ("x/b", "x/a", ports, "XXX"),
        ("y/c", "x/a", ports, ".X."),
        ("outside", "x/a", ports, ".X."),
        ("y/c", "x/b", ports, "XXX"),
        ("y/c", "outside", ports, "..."),
    )


@pytest.mark.parametrize("count", [30, 300])
@pytest.mark.parametrize("direction", ["ingress", "egress"])
def test_many_ports_on_one_cidr(lab: LabFactory, agent: AgentFactory, count: int, direction: str) -> None:
    one = lab(["x/a", "x/b"])
    ports = [f"{20000 + 2 * number}/{'TCP' if number % 2 else 'UDP'}" for number in range(count)]
    rules = anywhere(*ports)
    if direction == "ingress":
        made = policy("x", "many", select(one, "x/b"), ingress=rules)
    else:
        made = policy("x", "many", select(one, "x/a"), egress=rules)
    agent(one, made)
    neighbours = [f"{20001 + 2 * number}/{'TCP' if number % 2 else 'UDP'}" for number in range(count)]
    # The same number of the other protocol.
    others = [f"{20000 + 2 * number}/{'UDP' if number % 2 else 'TCP'}" for number in range(count)]
    check(
        one,
        ("x/a", "x/b", " ".join(ports), "." * count),
        ("x/a", "x/b", " ".join(neighbours), "X" * count),
        ("x/a", "x/b", " ".join(others), "X" * count),
        timeout=1.5,
    )


def test_slices_are_joined_by_their_policy(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(PODS)
    pods = policy("x", "web", select(one, "x/a"), isolate=["Ingress"], slice_="pods")
    rules = policy(
        "x", "web", ingress=allow(one, "x/b", ports=["80/TCP"]), isolate=["Ingress"], slice_="rules"
    )
    more = policy("x", "web", ingress=allow(one, "y/c", ports=["81/TCP"]), isolate=["Ingress"], slice_="more")
    # Another policy of the same name elsewhere, with rules and no pods, must not open anything here.
    foreign = policy("y", "web", ingress=anywhere(), isolate=["Ingress"], slice_="rules")
    running = agent(one, pods, foreign)
    ports = "80/TCP 81/TCP"
    check(one, ("x/b", "x/a", ports, "XX"), ("y/c", "x/a", ports, "XX"))
    running.write(rules, file="rules.yaml")
    check(one, ("x/b", "x/a", ports, ".X"), ("y/c", "x/a", ports, "XX"))
    running.write(more, file="more.yaml")
    check(one, ("x/b", "x/a", ports, ".X"), ("y/c", "x/a", ports, "X."))
    running.remove("rules.yaml")
    check(one, ("x/b", "x/a", ports, "XX"), ("y/c", "x/a", ports, "X."))
    running.write(foreign)
    check(one, ("x/b", "x/a", ports, ".."), ("y/c", "x/a", ports, ".."))


@pytest.mark.parametrize("links_change", [False, True], ids=["links-rest", "links-change"])
def test_a_change_over_two_slices_never_shows_half_of_it(
    lab: LabFactory, agent: AgentFactory, links_change: bool
) -> None:
    one = lab(["x/a", "x/b"])
    tcp = allow(one, "x/b", ports=["80/TCP", "80/UDP"])

    def slices(turn: int) -> tuple[Object, Object]:
        # The rule that matters moves from one slice to the other: half of a change lacks it.
        other = [rule("192.0.2.1")]
        pods = select(one, "x/a")
        return (
            policy("x", "web", pods, ingress=tcp if turn % 2 else other, slice_="1"),
            policy("x", "web", ingress=other if turn % 2 else tcp, slice_="2"),
        )

    running = agent(one, options=["--no-offload"])  # every packet is judged
    files = [running.directory / name for name in ("one.yaml", "two.yaml")]
    drafts = [path.with_name(f".{path.name}.new") for path in files]

    def turn_to(turn: int) -> float:
        """Write both files, one right after the other; how many seconds that took."""
        for draft, made in zip(drafts, slices(turn), strict=True):
            draft.write_text(yaml.safe_dump(made))
        generation = running.status()["generation"]
        began = time.monotonic()
        for draft, path in zip(drafts, files, strict=True):
            draft.rename(path)
        took = time.monotonic() - began
        until(lambda: running.status()["generation"] > generation, what="the change is in force")
        return took

    def denials() -> int:
        return int(running.status()["counters"].get("no-rule", 0))

    stop = threading.Event()
    answered = 0

    def ask_all_the_time() -> None:
        nonlocal answered
        with one.make_socket("x/b", af(4), socket.SOCK_DGRAM) as sock:
            sock.settimeout(0.2)
            while not stop.is_set():
                sock.sendto(b"question", (one.address("x/a"), 80))
                with contextlib.suppress(TimeoutError):
                    answered += bool(sock.recv(100))

    def change_links_all_the_time() -> None:
        # Each wakes the agent, which must not take up half a change then.
        while not stop.wait(0.01):
            for word in ("add", "del"):
                netns.ip([f"addr {word} 192.0.2.250/32 dev lo"], netns=one.node)

    turn_to(0)
    threads = [threading.Thread(target=ask_all_the_time)]
    if links_change:
        threads.append(threading.Thread(target=change_links_all_the_time))
    for thread in threads:
        thread.start()
    counted = 0
    try:
        for turn in range(1, 41):
            if counted == 6:
                break
            before = denials()
            if turn_to(turn) > 0.004:
                continue  # the machine paused in between: then the first slice was alone for a time
            counted += 1
            assert denials() == before, f"turn {turn} showed half of it"
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert counted >= 3
    assert answered > 20
    check(one, ("x/b", "x/a", "80/TCP 81/TCP", ".X"))


@pytest.mark.parametrize("wire", [Wire.ROUTED, Wire.BRIDGE])
def test_ping_needs_a_rule_without_ports(lab: LabFactory, agent: AgentFactory, wire: Wire) -> None:
    one = lab(PODS, Topology(wire=wire))
    every_protocol = policy(
        "x", "in", select(one, "x/a"), ingress=allow(one, "x/b", ports=["TCP", "UDP", "SCTP"])
    )
    running = agent(one, every_protocol)
    check(
        one,
        ("x/b", "x/a", "80/TCP ICMP", ".X"),
        ("y/c", "x/a", "80/TCP ICMP", "XX"),
        ("x/a", "x/b", "80/TCP ICMP", ".."),
    )
    running.write(policy("x", "in", select(one, "x/a"), ingress=allow(one, "x/b")))
    check(one, ("x/b", "x/a", "80/TCP ICMP", ".."), ("y/c", "x/a", "80/TCP ICMP", "XX"))


@pytest.mark.parametrize("wire", [Wire.PTP, Wire.BRIDGE])
def test_neighbours_are_found_while_ping_is_blocked(lab: LabFactory, agent: AgentFactory, wire: Wire) -> None:
    one = lab(PODS, Topology(wire=wire))
    rules = allow(one, "x/b", ports=["80/TCP"])
    agent(
        one,
        policy("x", "a", select(one, "x/a"), ingress=rules, egress=[]),
        policy("x", "b", select(one, "x/b"), ingress=[], egress=allow(one, "x/a", ports=["80/TCP"])),
    )
    for place in (*PODS, "node"):
        one.run(place, "ip", "-4", "neigh", "flush", "nud", "all")
        one.run(place, "ip", "-6", "neigh", "flush", "nud", "all")
    check(one, ("x/b", "x/a", "80/TCP ICMP 80/UDP", ".XX"), ("y/c", "x/a", "80/TCP ICMP", "XX"), timeout=1.5)
    found = one.run("x/b", "ip", "-6", "neigh").stdout
    peer = one.address("x/a", 6) if wire is Wire.BRIDGE else "fd00:1::1"
    assert f"{peer} dev eth0 lladdr" in found


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_way_to_run_the_agent(lab: LabFactory, agent: AgentFactory, variant: str) -> None:
    """A representative table with each backend, with and without offload, queue counts, fail modes."""
    one = lab([*PODS, pod("z/host", host_network=True, ports=[])])
    running = agent(
        one,
        policy("x", "a", select(one, "x/a"), ingress=allow(one, "x/b", ports=["80/TCP", "80-82/UDP"])),
        policy("x", "b", select(one, "x/b"), egress=allow(one, "x/a", ports=["80-81/TCP", "UDP", "80/SCTP"])),
        policy("y", "c", select(one, "y/c"), ingress=anywhere("SCTP"), egress=anywhere()),
        options=VARIANTS[variant],
    )
    status = running.status()
    assert status["backend"] == ("netfilterqueue" if "netfilterqueue" in variant else "native")
    assert status["iptables"] == ("legacy" if variant == "legacy" else "nft")
    assert status["fail"] == ("open" if variant == "fail-open" else "closed")
    assert [queue["num"] for queue in status["queues"]] == ([7, 8] if variant == "two-queues" else [0])
    assert not status["problems"]
    ports = "80/TCP 81/TCP 80/UDP 83/UDP 80/SCTP ICMP"
    table: Sequence[tuple[str, str, str, str]] = (
        ("x/b", "x/a", ports, ".X.XXX"),
        ("y/c", "x/a", ports, "XXXXXX"),
        ("x/b", "y/c", ports, "XXXXXX"),
        ("x/a", "x/b", ports, "......"),
        ("x/a", "y/c", ports, "XXXX.X"),
        ("outside", "y/c", ports, "XXXX.X"),
        ("y/c", "outside", "80/TCP ICMP", ".."),
        ("node", "x/a", ports, "......"),
    )
    check(one, *table)
    counters = running.status()["counters"]
    assert counters["no-rule"] >= 2 * (4 + 6 + 6 + 5 + 5)
    assert counters["policy-rule"] >= 2 * (2 + 1 + 1 + 2)
    if "no-offload" in variant:
        assert counters["reply"] >= 2 * 6
    assert counters.get("queue-full", 0) == 0
    check(one, *table[:1], families=FAMILIES)  # again, with what conntrack and caches now know
