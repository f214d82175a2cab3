"""Finding pods' interfaces in pictures of a node's links, one topology after another."""

from __future__ import annotations

import pytest

from dataplane.addresses import parse_address, parse_prefix
from dataplane.model import Key
from dataplane.node.interfaces import (
    DefaultRoute,
    HostRoute,
    Kind,
    Link,
    LinkState,
    LocalAddress,
    host_veth_name,
    local_service_addresses,
    locate,
    lookalikes,
    own_node_addresses,
    problems,
)

POD = Key("default", "web-0")
ENI = host_veth_name(POD, "eni")
VLAN = host_veth_name(POD, "vlan")
A4, A6 = parse_address("10.0.1.5"), parse_address("2001:db8::5")
GATEWAY = parse_address("10.0.0.1")


def state(
    *links: Link,
    routes: tuple[HostRoute, ...] = (),
    default: tuple[DefaultRoute, ...] = (DefaultRoute(2, GATEWAY),),
    **more: object,
) -> LinkState:
    known = (Link(1, "lo"), Link(2, "eth0"), *links)
    return LinkState(
        {link.ifindex: link for link in known},
        host_routes=frozenset(routes),
        default_routes=frozenset(default),
        **more,  # type: ignore[arg-type]
    )


def veth(ifindex: int, name: str, master: int = 0) -> Link:
    return Link(ifindex, name, "veth", master)


def found(picture: LinkState, pod: Key = POD, addresses: tuple[bytes, ...] = (A4,)) -> tuple[int, str] | None:
    place = locate(pod, addresses, picture, "eni")
    return None if place is None else (place.ifindex, str(place.kind))


def test_the_name_is_that_of_the_vpc_cni() -> None:
    # sha1("default.web-0"), as `printf default.web-0 | sha1sum` prints it
    assert "eni" + "1b4efdb9e58"[:0] + ENI[3:] == ENI
    assert len(ENI) == 14
    assert len(VLAN) == 15  # IFNAMSIZ - 1


@pytest.mark.parametrize(
    ("picture", "expected"),
    [
        # a plain pod: name and route
        (state(veth(5, ENI), routes=(HostRoute(A4, 5),)), (5, "routed")),
        # the route is not there yet
        (state(veth(5, ENI)), (5, "routed")),
        # prefix delegation: the address is from a /28 of the node, its route like any other, any name
        (state(veth(5, "veth0"), routes=(HostRoute(A4, 5),)), (5, "routed")),
        # a pod on a secondary interface: `from <pod> lookup 3`, whose default leads out by eth1
        (
            state(
                Link(3, "eth1"),
                veth(5, ENI),
                routes=(HostRoute(A4, 5),),
                default=(DefaultRoute(2, GATEWAY), DefaultRoute(3, GATEWAY, 3)),
            ),
            (5, "routed"),
        ),
        # a branch pod: routes only in table 100 + N, whose default is the branch uplink
        (
            state(
                Link(4, "vlan.eth.2", "vlan"),
                veth(5, VLAN),
                routes=(HostRoute(A4, 5, 102),),
                default=(DefaultRoute(2, GATEWAY), DefaultRoute(4, GATEWAY, 102)),
            ),
            (5, "branch"),
        ),
        # the same found by its route alone
        (state(veth(5, "vlan99999999999"), routes=(HostRoute(A4, 5, 102),)), (5, "branch")),
        # table 254 is `main`, not that of branch interface 154
        (state(veth(5, "veth5"), routes=(HostRoute(A4, 5, 254),)), (5, "routed")),
        # security groups without strict mode: a branch pod whose routes are in main too
        (state(veth(5, ENI), routes=(HostRoute(A4, 5, 102), HostRoute(A4, 5, 254))), (5, "routed")),
        # nothing here
        (state(veth(5, "eni00000000000")), None),
        (state(), None),
    ],
)
def test_topologies(picture: LinkState, expected: tuple[int, str] | None) -> None:
    assert found(picture) == expected


def test_a_second_veth_of_the_same_pod_is_left_alone() -> None:
    # Multus, ENABLE_V4_EGRESS: its address is none of the pod's own.
    other = parse_address("169.254.172.5")
    picture = state(veth(5, ENI), veth(6, "v4iface"), routes=(HostRoute(A4, 5), HostRoute(other, 6)))
    assert found(picture) == (5, "routed")


def test_both_families_lead_to_one_interface() -> None:
    picture = state(veth(5, "veth5"), routes=(HostRoute(A6, 5),))
    assert found(picture, addresses=(A4, A6)) == (5, "routed")


def test_two_pods_with_one_name_prefix_are_told_apart() -> None:
    one, two = Key("x", "web-1"), Key("x", "web-10")
    b4 = parse_address("10.0.1.6")
    picture = state(
        veth(5, host_veth_name(one, "eni")),
        veth(6, host_veth_name(two, "eni")),
        routes=(HostRoute(A4, 5), HostRoute(b4, 6)),
    )
    assert found(picture, one, (A4,)) == (5, "routed")
    assert found(picture, two, (b4,)) == (6, "routed")
    # "x.web" + "-1" and "x-web" + "1" hash differently: the separator counts
    assert host_veth_name(Key("a.b", "c"), "eni") == host_veth_name(Key("a", "b.c"), "eni")
    assert host_veth_name(Key("a", "bc"), "eni") != host_veth_name(Key("ab", "c"), "eni")


@pytest.mark.parametrize(
    ("links", "routes", "expected"),
    [
        # a branch pod was recreated as a plain one under the same name; the old link outlived it
        ((veth(5, VLAN), veth(6, ENI)), (HostRoute(A4, 6),), (6, "routed")),
        ((veth(5, VLAN), veth(6, ENI)), (), (6, "routed")),
        ((veth(6, VLAN), veth(5, ENI)), (), (6, "branch")),
        # the stale route of a former owner of the address leads to an older link
        ((veth(5, "eni11111111111"), veth(6, ENI)), (HostRoute(A4, 5),), (6, "routed")),
        # a stale link with the pod's name, and a newer one that the route leads to
        ((veth(5, ENI), veth(6, "veth6")), (HostRoute(A4, 6),), (6, "routed")),
        # two routes for one address: that to the pod's own link counts
        ((veth(5, ENI), veth(6, "veth6")), (HostRoute(A4, 5), HostRoute(A4, 6, 9)), (5, "routed")),
    ],
)
def test_name_and_route_disagree(
    links: tuple[Link, ...], routes: tuple[HostRoute, ...], expected: tuple[int, str]
) -> None:
    assert found(state(*links, routes=routes)) == expected


@pytest.mark.parametrize(
    "picture",
    [
        # default route in any table
        state(veth(5, ENI), routes=(HostRoute(A4, 5),), default=(DefaultRoute(5, GATEWAY, 77),)),
        # the uplink of branch interfaces has a /32 route to the gateway
        state(Link(5, "vlan.eth.1", "vlan"), routes=(HostRoute(A4, 5, 101),)),
        # a route to something that is no veth
        state(Link(5, "eth1"), routes=(HostRoute(A4, 5),)),
        state(Link(5, "tun0", "tun"), routes=(HostRoute(A4, 5),)),
    ],
)
def test_an_uplink_is_never_a_pods_interface(picture: LinkState) -> None:
    assert found(picture) is None


def test_a_pod_does_not_become_an_uplink_by_router_advertisements() -> None:
    link_local = parse_address("fe80::1")
    picture = state(
        veth(5, ENI),
        routes=(HostRoute(A4, 5),),
        default=(DefaultRoute(5, link_local, advertised=True), DefaultRoute(2, link_local, advertised=True)),
    )
    assert found(picture) == (5, "routed")
    assert picture.uplinks == {2}


MAC, UPLINK_MAC = b"\2\0\0\0\0\5", b"\2\0\0\0\0\1"
BRIDGED: dict[str, object] = {
    "neighbours": {(4, A4): MAC, (4, GATEWAY): UPLINK_MAC},
    "forwarding": {(4, MAC): 5, (4, UPLINK_MAC): 3},
}


def test_a_pod_on_a_bridge_is_found_by_its_mac() -> None:
    picture = state(
        Link(3, "eth1", master=4),
        Link(4, "cni0", "bridge"),
        veth(5, "veth5", 4),
        veth(6, "veth6", 4),
        **BRIDGED,
    )
    place = locate(POD, (A4,), picture, "eni")
    assert place is not None
    assert (place.ifindex, place.kind, place.bridge, place.bridge_ifindex) == (5, Kind.BRIDGED, "cni0", 4)
    assert found(picture, addresses=(A6,)) is None
    assert found(picture, addresses=(GATEWAY,)) is None  # a hardware port leads out


def test_the_port_that_leads_to_the_gateway_is_an_uplink_although_a_veth() -> None:
    picture = state(
        veth(3, "veth3", 4),
        Link(4, "br0", "bridge"),
        veth(5, "veth5", 4),
        default=(DefaultRoute(4, GATEWAY),),
        **BRIDGED,
    )
    assert found(picture) == (5, "bridged")
    assert found(picture, addresses=(GATEWAY,)) is None


def test_a_neighbour_elsewhere_does_not_place_a_pod() -> None:
    picture = state(
        Link(4, "cni0", "bridge"), veth(5, "veth5"), neighbours={(2, A4): MAC}, forwarding={(4, MAC): 5}
    )
    assert found(picture) is None


def test_a_vpc_cni_name_on_a_bridge_port_is_bridged() -> None:
    assert found(state(Link(4, "br0", "bridge"), veth(5, ENI, 4))) == (5, "bridged")


def test_lookalikes_are_what_strict_mode_must_not_close() -> None:
    picture = state(
        Link(3, "vlan10", "vlan"),
        Link(4, "vlan.eth.1", "vlan"),
        veth(5, ENI),
        veth(6, "enip0"),
        default=(DefaultRoute(2, GATEWAY), DefaultRoute(6, GATEWAY)),
    )
    assert lookalikes(picture, "eni") == {"vlan10", "enip0"}


def addresses(*rows: tuple[int, str, int]) -> frozenset[LocalAddress]:
    return frozenset(
        LocalAddress(index, parse_address(text), len(parse_address(text)) * 8, scope)
        for index, text, scope in rows
    )


NODE = state(
    Link(3, "nodelocaldns", "dummy"),
    Link(4, "cni0", "bridge"),
    addresses=addresses(
        (1, "127.0.0.1", 254),
        (1, "::1", 254),
        (1, "169.254.170.23", 0),
        (1, "192.0.2.1", 0),
        (2, "10.0.0.9", 0),
        (2, "2001:db8::9", 0),
        (2, "fe80::9", 253),
        (3, "169.254.20.10", 0),
        (3, "172.20.0.10", 0),
        (3, "fe80::3", 253),
        (4, "10.244.1.1", 0),
        (2, "fd00:ec2::23", 0),
        (2, "169.254.7.7", 253),
    ),
)


def test_own_addresses_are_global_ones_of_real_links() -> None:
    expected = {"10.0.0.9", "2001:db8::9", "10.244.1.1", "192.0.2.1"}
    assert own_node_addresses(NODE) == {parse_address(text) for text in expected}


def test_service_addresses_are_those_of_dummies_and_of_the_service_ranges() -> None:
    expected = ("169.254.20.10", "172.20.0.10", "169.254.170.23", "fd00:ec2::23", "169.254.7.7")
    assert local_service_addresses(NODE) == {parse_prefix(text)[0] for text in expected}


def test_what_keeps_policy_from_working_is_told_with_a_remedy() -> None:
    assert problems(state(), [], lambda name: None) == []
    (ipvs,) = problems(state(Link(9, "kube-ipvs0", "dummy")), [], lambda name: "1")
    assert "IPVS" in ipvs
    picture = state(Link(4, "cni0", "bridge"), veth(5, "veth5", 4), **BRIDGED)
    place = locate(POD, (A4,), picture, "eni")
    assert place is not None
    assert problems(picture, [place], lambda name: "1\n") == []
    (missing,) = problems(picture, [place], lambda name: None)
    assert "modprobe br_netfilter" in missing
    off = problems(picture, [place], lambda name: "0\n" if name.endswith("ip6tables") else "1\n")
    assert len(off) == 1
    assert "net.bridge.bridge-nf-call-ip6tables=1" in off[0]


def local(ifindex: int, text: str) -> LocalAddress:
    address, _, length = text.partition("/")
    return LocalAddress(ifindex, parse_address(address), int(length))


@pytest.mark.parametrize(
    ("addresses", "expected"),
    [
        ([(10, "10.0.1.1/24")], (10, "routed")),
        ([(10, "10.0.1.1/24"), (11, "10.0.0.1/16")], (10, "routed")),  # the nearer subnet
        ([(10, "10.0.1.1/24"), (11, "10.0.1.2/24")], None),  # nobody can say which
        ([(10, "10.0.2.1/24")], None),
        ([(2, "10.0.1.1/24")], None),  # the uplink's subnet is not a pod's
        ([(10, "10.0.1.5/24")], None),  # the node's own address
    ],
)
def test_a_veth_wired_by_hand_is_found_by_its_subnet(
    addresses: list[tuple[int, str]], expected: tuple[int, str] | None
) -> None:
    links = (veth(10, "vetha"), veth(11, "vethb"))
    locals_ = frozenset(local(index, text) for index, text in addresses)
    assert found(state(*links, addresses=locals_)) == expected


def test_strict_mode_is_not_ready_where_a_bridge_may_hide_pods() -> None:
    picture = state(Link(5, "cni0", "bridge"), veth(10, "vetha", master=5))
    assert problems(picture, [], lambda name: "1\n") == []
    (text,) = problems(picture, [], lambda name: "1\n", strict=True)
    assert "cni0" in text
    assert problems(state(Link(5, "br0", "bridge")), [], lambda name: "1\n", strict=True) == []
