"""What a lab is planned to be: names, addresses, clashes; and matrices of what was seen."""

from __future__ import annotations

import re

import pytest

from dataplane.addresses import format_address, parse_address
from dataplane.errors import InputError
from dataplane.lab.probe import Port
from dataplane.lab.topology import LabPod, Topology, Wire, plan, veth_name
from dataplane.lab.wiring import base, pod
from dataplane.model import ContainerPort, Key, Pod
from dataplane.reachability import Matrix


def _pod(name: str, *ips: str, host_ips: tuple[str, ...] = (), host_network: bool = False) -> Pod:
    return Pod(
        Key(*name.split("/")),
        ips=tuple(map(parse_address, ips)),
        host_ips=tuple(map(parse_address, host_ips)),
        host_network=host_network,
        ports=(ContainerPort("http", 6, 80),),
    )


def test_the_cni_names_the_veth() -> None:
    # printf default.nginx | sha1sum
    assert veth_name(Key("default", "nginx")) == "enic440f455693"
    assert veth_name(Key("default", "nginx"), "vlan") == "vlanc440f455693"
    assert veth_name(Key("a", "b.c")) == veth_name(Key("a.b", "c")), "the CNI's own ambiguity"


def test_the_order_of_objects_does_not_matter() -> None:
    pods = [_pod("x/a"), _pod("x/b", "10.1.0.2"), _pod("y/c")]
    assert plan("n", pods, Topology()) == plan("n", pods[::-1], Topology())


def test_stated_addresses_are_never_given_to_others() -> None:
    lab = plan("n", [_pod("x/a"), _pod("x/b", "10.1.0.2", "fd00:1::2")], Topology())
    assert [format_address(ip) for ip in lab.pods[0].ips] == ["10.1.0.3", "fd00:1::3"]


def test_the_node_has_the_host_addresses_of_its_pods() -> None:
    lab = plan(
        "n", [_pod("x/a", host_ips=("192.168.5.1",)), _pod("x/b", host_ips=("192.168.5.1",))], Topology()
    )
    assert [format_address(ip) for ip in lab.node_ips] == ["192.168.5.1", "fd00::1"]


def test_host_network_pods_live_in_the_node() -> None:
    lab = plan("n", [_pod("x/a", host_network=True)], Topology())
    assert (lab.pods[0].netns, lab.pods[0].ips) == (lab.node, lab.node_ips)
    assert lab.namespaces == ("n-node", "n-outside")


def test_finished_pods_are_left_out() -> None:
    done = Pod(Key("x", "done"), ips=(parse_address("10.1.0.9"),), finished=True)
    lab = plan("n", [done, _pod("x/heir", "10.1.0.9")], Topology())
    assert [one.key.name for one in lab.pods] == ["heir"]


@pytest.mark.parametrize(
    ("pods", "message"),
    [
        ([_pod("x/a", "10.1.0.5"), _pod("x/b", "10.1.0.5")], "Pod x/b: address 10.1.0.5"),
        ([_pod("x/a", "10.0.0.1")], "Pod x/a: address 10.0.0.1"),
        ([_pod("x/a"), _pod("x/a")], "already has a pod of this name"),
    ],
)
def test_clashes_are_named(pods: list[Pod], message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan("n", pods, Topology())


@pytest.mark.parametrize("name", ["", "-a", "a-", "A", "a/b", "..", "a" * 41])
def test_bad_lab_names(name: str) -> None:
    with pytest.raises(InputError, match="lab name"):
        plan(name, [_pod("x/a")], Topology())


def test_an_exhausted_range_is_an_error() -> None:
    with pytest.raises(InputError, match="no free address"):
        plan("n", [_pod(f"x/p{number}") for number in range(3)], Topology(v4="10.9.0.0/30", v6=None))


def test_long_names_fit_a_file_name_and_stay_apart() -> None:
    lab = plan("n", [_pod(f"{'n' * 63}/{'p' * 250}{end}") for end in "ab"], Topology())
    names = [one.netns for one in lab.pods]
    assert len(set(names)) == 2
    assert max(map(len, names)) < 255


@pytest.mark.parametrize("wire", [wire for wire in Wire if wire is not Wire.HOST])
def test_device_names_fit_the_kernel(wire: Wire) -> None:
    lab = plan("n", [_pod("x/a")], Topology(wire=wire, second_veth=frozenset({Key("x", "a")})))
    steps = [*base(lab), *pod(lab, lab.pods[0])]
    names = [name for step in steps for line in step.lines for name in re.findall(r"link add (\S+)", line)]
    assert names
    assert all(len(name) <= 15 for name in names)  # IFNAMSIZ - 1


def test_a_pod_survives_its_file() -> None:
    one = plan("n", [_pod("x/a")], Topology(wire=Wire.BRANCH)).pods[0]
    assert LabPod.from_json(one.to_json()) == one


@pytest.mark.parametrize(
    ("text", "port"),
    [
        ("80/TCP", (6, 80)),
        ("80", (6, 80)),
        ("53/udp", (17, 53)),
        ("7/SCTP", (132, 7)),
        ("ICMP", (1, 0)),
        ("icmp", (1, 0)),
    ],
)
def test_ports(text: str, port: tuple[int, int]) -> None:
    assert Port.parse(text) == port


@pytest.mark.parametrize("text", ["", "0/TCP", "65536/TCP", "80/FOO", "http/TCP", "-1", "80/ICMP", "٣/TCP"])
def test_bad_ports(text: str) -> None:
    with pytest.raises(InputError, match="--port"):
        Port.parse(text)


def test_differences_name_their_cells() -> None:
    order = ("x/a", "x/b")
    seen = Matrix(order, {"80/TCP": ("..", "X.")})
    wanted = Matrix(order, {"80/TCP": (".X", "X.")})
    assert seen.diff(seen) == ""
    assert seen.diff(wanted) == "80/TCP: x/a -> x/b: observed allowed, expected denied"
    assert "not the same table" in seen.diff(Matrix(order, {"81/TCP": ("..", "..")}))
    assert Matrix.from_json(seen.to_json()) == seen
    assert not seen.allows("x/b", "x/a")
