"""Traffic with the pod's own node, through Services, and packets that other programs have marked."""

from __future__ import annotations

import re
import socket

import pytest
from conftest import AgentFactory, LabFactory
from objects import Object, allow, anywhere, deny, network_policy, pod, policy, rule, select, until
from packets import af, check, conntrack, counter

from dataplane.lab.probe import connect
from dataplane.lab.world import Lab

pytestmark = pytest.mark.netns

FAMILY = pytest.mark.parametrize("family", [4, 6])
OFFLOAD = pytest.mark.parametrize("options", [[], ["--no-offload"]], ids=["offload", "no-offload"])
SERVICE = {4: "172.20.0.10", 6: "fd00:20::10"}
TOOLS = {4: "iptables", 6: "ip6tables"}
LOCAL_DNS = "169.254.20.10"
IDENTITY = "fd00:ec2::23"


def iptables(lab: Lab, family: int, *lines: str) -> None:
    """Run iptables lines in the node, each without the program's name."""
    for line in lines:
        lab.run("node", TOOLS[family], "-w", *line.split())


def service(lab: Lab, family: int, backend: str, port: int, protocol: str = "tcp") -> None:
    """kube-proxy's rules for a Service on port 80: DNAT, and masquerade for a pod that reaches itself."""
    host = lab.address(backend, family)
    to = f"{host}:{port}" if family == 4 else f"[{host}]:{port}"
    match = f"-d {SERVICE[family]} -p {protocol} --dport 80"
    iptables(
        lab,
        family,
        f"-t nat -A PREROUTING {match} -s {host} -j MARK --set-xmark 0x4000/0x4000",
        f"-t nat -A PREROUTING {match} -j DNAT --to-destination {to}",
        "-t nat -A POSTROUTING -m mark --mark 0x4000/0x4000 -m comment --comment masquerade -j MASQUERADE",
    )


# -- own node


@OFFLOAD
def test_probes_from_the_node_pass_under_default_deny(
    lab: LabFactory, agent: AgentFactory, options: list[str]
) -> None:
    one = lab(["x/a", "x/b"])
    agent(one, deny(one, "x/a"), options=options)
    ports = "80/TCP 8080/TCP 80/UDP 80/SCTP ICMP"
    check(one, ("node", "x/a", ports, "....."), ("x/b", "x/a", ports, "XXXXX"))
    for family in (4, 6):
        host = one.address("x/a", family)
        url = f"http://{host}/healthz" if family == 4 else f"http://[{host}]/healthz"
        code = f"import urllib.request as u; print(u.urlopen({url!r}, timeout=5).read().decode())"
        assert one.run("node", "python3", "-c", code).stdout.strip() == "x/a"


@OFFLOAD
def test_the_own_node_is_reached_under_default_deny_egress(
    lab: LabFactory, agent: AgentFactory, options: list[str]
) -> None:
    one = lab(["x/a", "x/b", pod("x/server", host_network=True, ports=["9090/TCP", "9090/UDP"])])
    agent(one, deny(one, "x/a"), options=options)
    ports = "9090/TCP 9090/UDP ICMP"
    check(
        one,
        ("x/a", "node", ports, "..."),
        ("x/a", "x/server", ports, "..."),
        ("x/a", "x/b", ports, "XXX"),
        ("x/a", "outside", "80/TCP ICMP", "XX"),
    )


def test_another_node_is_an_ordinary_peer(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/a"])
    one.add_external("10.0.0.2")
    one.add_external("fd00::2")
    agent(one, policy("x", "a", select(one, "x/a"), ingress=[], egress=[rule("10.0.0.2", "80/TCP")]))
    check(one, ("x/a", "10.0.0.2", "80/TCP 81/TCP ICMP", ".XX"), ("x/a", "fd00::2", "80/TCP ICMP", "XX"))


# -- local service addresses


@OFFLOAD
def test_local_services_are_ordinary_destinations(
    lab: LabFactory, agent: AgentFactory, options: list[str]
) -> None:
    """Node-local DNS and the Pod Identity agent, tracked and (as node-local DNS wants it) untracked."""
    one = lab(["x/a", "x/b"])
    services = {(4, LOCAL_DNS): False, (6, IDENTITY): False, (4, "169.254.170.23"): True}
    for (family, address), tracked in services.items():
        nodad = " nodad" if family == 6 else ""
        one.run("node", *f"ip addr add {address}/{32 if family == 4 else 128} dev lo{nodad}".split())
        for protocol in () if tracked else ("udp", "tcp"):
            iptables(
                one,
                family,
                f"-t raw -A PREROUTING -d {address} -p {protocol} --dport 53 -j CT --notrack",
                f"-t raw -A OUTPUT -s {address} -p {protocol} --sport 53 -j CT --notrack",
            )
    running = agent(one, deny(one, "x/a"), options=options)
    ports = "53/UDP 53/TCP 54/UDP"
    with one.serving([one.node], [(17, 53), (6, 53), (17, 54)]):

        def ask(verdicts: str) -> None:
            rows = [("x/a", address, ports, verdicts) for _, address in services]
            rows += [("x/b", address, ports, "...") for _, address in services]
            # The node itself stays reachable all the while.
            check(one, *rows, ("x/a", "node", ports, "..."))

        ask("XXX")
        assert running.status()["counters"]["no-rule"] >= 9
        allowed = [rule(address, "53/UDP") for _, address in services]
        running.write(policy("x", "a", select(one, "x/a"), ingress=[], egress=allowed))
        ask(".XX")


def test_a_local_service_answers_only_while_allowed(lab: LabFactory, agent: AgentFactory) -> None:
    """One UDP flow, untracked and tracked, allowed and then not: every packet counts."""
    one = lab(["x/a"])
    one.run("node", "ip", "addr", "add", f"{LOCAL_DNS}/32", "dev", "lo")
    iptables(
        one,
        4,
        f"-t raw -A PREROUTING -d {LOCAL_DNS} -p udp --dport 53 -j CT --notrack",
        f"-t raw -A OUTPUT -s {LOCAL_DNS} -p udp --sport 53 -j CT --notrack",
    )
    open_ = policy("x", "a", select(one, "x/a"), egress=[rule(LOCAL_DNS, "53-54/UDP")])
    running = agent(one, open_)
    with one.serving([one.node], [(17, 53), (17, 54)]):
        socks = []
        for port in (53, 54):  # untracked, tracked
            sock = one.make_socket("x/a", socket.AF_INET, socket.SOCK_DGRAM)
            sock.settimeout(1)
            sock.connect((LOCAL_DNS, port))
            socks.append(sock)
        for _ in range(3):
            for sock in socks:
                sock.send(b"question")
                assert sock.recv(100) == b"question node\n"
        running.write(policy("x", "a", select(one, "x/a"), egress=[]))
        for sock in socks:
            sock.settimeout(0.3)
            sock.send(b"again")
            with pytest.raises(TimeoutError):
                sock.recv(100)
        running.write(open_)
        for sock in socks:
            sock.settimeout(1)
            sock.send(b"third")
            assert sock.recv(100) == b"third node\n"
            sock.close()


# -- Services


@OFFLOAD
def test_policy_sees_the_port_behind_a_service(
    lab: LabFactory, agent: AgentFactory, options: list[str]
) -> None:
    """Service port 80, container port 8080: rules name the latter, on both ends."""
    one = lab(["x/a", pod("x/b", ports=["8080/TCP", "8080/UDP", "8080/SCTP"])])
    for family in (4, 6):
        for protocol in ("tcp", "udp", "sctp"):
            service(one, family, "x/b", 8080, protocol)
    ports, behind = ("80/TCP", "80/UDP", "80/SCTP"), ("8080/TCP", "8080/UDP", "8080/SCTP")
    running = agent(
        one,
        policy("x", "a", select(one, "x/a"), ingress=[], egress=allow(one, "x/b", ports=behind)),
        policy("x", "b", select(one, "x/b"), ingress=allow(one, "x/a", ports=behind), egress=[]),
        options=options,
    )
    for family in (4, 6):
        for port in ports:
            assert connect(one, "x/a", SERVICE[family], port, family).by == "x/b"
    # Neither the Service's address and port nor the backend's with the Service's port opens it.
    services = [rule(SERVICE[family], *ports) for family in (4, 6)]
    rules = [*services, *allow(one, "x/b", ports=ports)]
    running.write(policy("x", "a", select(one, "x/a"), egress=rules))
    check(one, *(("x/a", SERVICE[family], " ".join(ports), "XXX") for family in (4, 6)))


def test_networkpolicies_name_the_port_behind_a_service(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/a", pod("x/b", ports=["http=8080/TCP"])])
    for family in (4, 6):
        service(one, family, "x/b", 8080)
    front = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "front", "namespace": "x"},
        "spec": {
            "selector": {"app": "b"},
            "clusterIPs": list(SERVICE.values()),
            "ports": [{"port": 80, "targetPort": "http"}],
        },
    }

    def policies(port: str | int) -> list[Object]:
        ports = [{"port": port}]
        a, b = ({"podSelector": {"matchLabels": {"app": name}}} for name in "ab")
        return [
            network_policy("x/a", {**a, "policyTypes": ["Egress"], "egress": [{"to": [b], "ports": ports}]}),
            network_policy("x/b", {**b, "ingress": [{"from": [a], "ports": ports}]}),
        ]

    daemon = agent(one, front, *policies("http"))
    daemon.write_pods({"x/a": {"app": "a"}, "x/b": {"app": "b"}})
    through, direct = (
        [("x/a", SERVICE[family], "80/TCP") for family in (4, 6)],
        ("x/a", "x/b", "8080/TCP 80/TCP"),
    )
    for port in ("http", 8080):
        daemon.write(front, *policies(port))
        check(one, *((*each, ".") for each in through), (*direct, ".X"))
    # The Service's own port means the pod's port of that number, which nobody asked for.
    daemon.write(front, *policies(80))
    check(one, *((*each, "X") for each in through), (*direct, "X."))


@FAMILY
@OFFLOAD
def test_a_pod_reaches_itself_through_its_service(
    lab: LabFactory, agent: AgentFactory, options: list[str], family: int
) -> None:
    one = lab([pod("x/a", ports=["8080/TCP"]), "x/b"])
    service(one, family, "x/a", 8080)
    running = agent(one, deny(one, "x/a"), options=options)
    assert connect(one, "x/a", SERVICE[family], "80/TCP", family).by == "x/a"
    # kube-proxy's mark was still there when the packet left: it was masqueraded.
    assert counter(one, TOOLS[family], "nat", "masquerade") >= 1
    assert running.status()["counters"]["same-pod"] >= 1
    # Somebody else does not get in by that door.
    assert not connect(one, "x/b", SERVICE[family], "80/TCP", family, timeout=0.5).reached


@pytest.mark.parametrize("backend", ["native", "netfilterqueue"])
@FAMILY
def test_marks_of_others_survive(lab: LabFactory, agent: AgentFactory, backend: str, family: int) -> None:
    one = lab(["x/a", "x/b"])
    # Set before the verdict, looked at after it: 0xf00 with no bit of ours left over. Two packets of
    # different marks in one burst must each get its own back.
    iptables(
        one,
        family,
        "-t mangle -A PREROUTING -p tcp --dport 80 -j MARK --set-xmark 0xf00/0xffffffff",
        "-t mangle -A PREROUTING -p udp --dport 80 -j MARK --set-xmark 0x8000/0xffffffff",
        "-t mangle -A PREROUTING -p tcp --dport 80 -j CONNMARK --set-xmark 0x80/0x80",
        "-t nat -A POSTROUTING -m comment --comment seen-tcp -m mark --mark 0xf00/0xffffffff -p tcp",
        "-t nat -A POSTROUTING -m comment --comment seen-udp -m mark --mark 0x8000/0xffffffff -p udp",
    )
    rules = allow(one, "x/b", ports=["80/TCP", "80/UDP"])
    running = agent(one, policy("x", "a", select(one, "x/a"), ingress=rules), options=["--backend", backend])
    with one.make_socket("x/b", af(family), socket.SOCK_STREAM) as sock:
        sock.settimeout(3)
        sock.connect((one.address("x/a", family), 80))
        sock.sendall(b"who\n")
        assert sock.recv(100) == b"x/a\n"
        assert connect(one, "x/b", "x/a", "80/UDP", family).reached
        assert counter(one, TOOLS[family], "nat", "seen-tcp") == 1
        assert counter(one, TOOLS[family], "nat", "seen-udp") == 1

        def marks() -> list[int]:
            listed = conntrack(one, "-L", "-f", f"ipv{family}", "-p", "tcp", "--dport", "80")
            return [int(text) for text in re.findall(r"mark=(\d+)", listed)]

        assert marks() == [0x80 | 0x20000000]
        # Our bit goes with the permission; theirs stays.
        running.write(deny(one, "x/a"))
        until(lambda: marks() == [0x80], what="only their bit is left")
        assert {row["verdict"] for row in running.ask("flows")} <= {"deny"}


@pytest.fixture
def burst_lab(lab: LabFactory) -> Lab:
    """Two pods; a quarter of the datagrams that pass is marked 1, 2, 3 or 0 by its port."""
    one = lab(["x/a", "x/b"])
    for number in (1, 2, 3):
        iptables(
            one,
            4,
            f"-t mangle -A PREROUTING -p udp --dport 700{number} -j MARK --set-xmark {number:#x}/0xffffffff",
        )
    for number in (0, 1, 2, 3):
        iptables(
            one,
            4,
            f"-t mangle -A POSTROUTING -p udp --dport 700{number} -m comment --comment kept-{number}"
            f" -m mark --mark {number:#x}/0xffffffff",
        )
    return one


@pytest.mark.parametrize("backend", ["native", "netfilterqueue"])
def test_marks_are_kept_packet_by_packet_in_a_burst(
    burst_lab: Lab, agent: AgentFactory, backend: str
) -> None:
    one = burst_lab
    rules = anywhere("7000-7003/UDP")
    running = agent(
        one,
        policy("x", "a", select(one, "x/a"), ingress=rules),
        options=["--backend", backend, "--no-offload"],
    )
    ends = []
    for number in range(4):
        end = one.make_socket("x/a", socket.AF_INET, socket.SOCK_DGRAM)
        end.bind((one.address("x/a"), 7000 + number))
        ends.append(end)
    with one.make_socket("x/b", socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for round_ in range(400):
            sock.sendto(b"x", (one.address("x/a"), 7000 + round_ % 4))
    until(lambda: running.status()["counters"].get("policy-rule", 0) >= 400, what="all judged")
    assert [counter(one, "iptables", "mangle", f"kept-{number}") for number in range(4)] == [100] * 4
    for end in ends:
        end.close()
