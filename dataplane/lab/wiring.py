"""A lab as `ip` commands and sysctls: what each namespace gets, in text a person could type.

The wiring of routed pods repeats amazon-vpc-cni-k8s (cmd/routed-eni-cni-plugin/driver): addresses
are /32 and /128, the pod's gateway 169.254.1.1 (fe80::1) has a permanent neighbour entry, the node
has one route of scope link per pod address.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from dataplane.addresses import family_of, format_address, parse_prefix
from dataplane.lab.topology import (
    OUTSIDE_ADDRESSES,
    OUTSIDE_NETS,
    LabPod,
    Plan,
    Wire,
    gateways,
    overlaps_outside,
    veth_name,
)

UPSTREAM4 = "100.64.0.1"  # the router beyond the node's uplink; RFC 6598, no pod has it
UPSTREAM6 = "fe80::1"
NODE6 = "fe80::2"
POD_GATEWAY4 = "169.254.1.1"
POD_GATEWAY6 = "fe80::1"
BRIDGE = "cni0"


@dataclass(frozen=True, slots=True)
class Step:
    """Something to do in one namespace: sysctls first (paths below /proc/sys/net), then `ip` lines."""

    netns: str
    sysctls: tuple[tuple[str, str], ...] = ()
    lines: tuple[str, ...] = ()
    family: int = 0


# Before any link exists, so that `default` reaches every one that comes. Duplicate address detection
# would keep each address unusable for a second or two; limited ICMP errors would make tests lie.
_COMMON = (
    ("ipv6/conf/all/accept_dad", "0"),
    ("ipv6/conf/default/accept_dad", "0"),
    ("ipv6/conf/default/dad_transmits", "0"),
    ("ipv6/conf/all/accept_ra", "0"),
    ("ipv6/conf/default/accept_ra", "0"),
    ("ipv6/conf/default/router_solicitations", "0"),
    ("ipv4/icmp_ratelimit", "0"),
    ("ipv6/icmp/ratelimit", "0"),
)
_ROUTER = (
    ("ipv4/ip_forward", "1"),
    ("ipv6/conf/all/forwarding", "1"),
    ("ipv6/conf/default/forwarding", "1"),
    ("ipv4/conf/all/rp_filter", "0"),
    ("ipv4/conf/default/rp_filter", "0"),
    ("ipv4/conf/all/send_redirects", "0"),
    ("ipv4/conf/default/send_redirects", "0"),
)


def base(lab: Plan) -> Iterator[Step]:
    """Node and outside world, before the pods. The namespaces exist and are empty."""
    yield Step(lab.node, (*_COMMON, *_ROUTER))
    yield Step(
        lab.outside, (*_COMMON, *_ROUTER, ("ipv6/ip_nonlocal_bind", "1"), ("ipv4/ip_nonlocal_bind", "1"))
    )
    uplinks = ["eth0", *(["eth1"] if _uses(lab, Wire.SECONDARY) else [])]
    yield Step(
        lab.node,
        lines=(
            "link set lo up",
            *(line for link in uplinks for line in _uplink(lab, link, link)),
            *(f"addr add {_host(ip)} dev eth0" + _nodad(ip) for ip in lab.node_ips),
        ),
    )
    yield Step(
        lab.outside,
        lines=(
            "link set lo up",
            *(line for link in uplinks for line in _router_side(link)),
        ),
    )
    for family in (4, 6):
        source = next((format_address(ip) for ip in lab.node_ips if family_of(ip) == family), None)
        yield Step(lab.node, lines=tuple(_default_route(family, "eth0", source)), family=family)
        # The outside's own address, unless the objects gave it to somebody in the lab.
        taken = {*lab.node_ips, *(ip for one in lab.pods for ip in one.ips)}
        own = [ip for ip in OUTSIDE_ADDRESSES if family_of(ip) == family and ip not in taken]
        back = [f"addr add {_host(ip)} dev lo" + _nodad(ip) for ip in own]
        src = f" src {format_address(own[0])}" if own else ""
        via = f"via {source} dev eth0 onlink" if family == 4 else f"via {NODE6} dev eth0"
        back.append(f"route add default {via}{src}")
        back += [f"route add local {net} dev lo" for net in OUTSIDE_NETS if net.family == family]
        back += _not_outside(lab.node_ips, family)
        if family == 4:
            # Without a rule beside the three built-in ones the kernel keeps `local` and `main` in one
            # trie (fib_trie_unmerge), and `throw` then ends the look-up as unreachable.
            back.append("rule add priority 32765 lookup main")
        yield Step(lab.outside, lines=tuple(back), family=family)
    # The CNI's choice: loose on the uplink, off elsewhere.
    yield Step(lab.node, tuple((f"ipv4/conf/{link}/rp_filter", "2") for link in uplinks))
    if _uses(lab, Wire.SECONDARY):
        for family in (4, 6):
            yield Step(lab.node, lines=tuple(_default_route(family, "eth1", None, " table 2")), family=family)
    if _uses(lab, Wire.BRANCH):
        # The CNI moves the local table behind the rules of branch interfaces, so that what a pod
        # sends to its node goes out to the VPC and its security groups first; early demultiplexing
        # would shortcut that.
        for family in (4, 6):
            yield Step(
                lab.node,
                (("ipv4/tcp_early_demux", "0"),),
                ("rule add priority 20 lookup local", "rule del priority 0"),
                family,
            )
    if _uses(lab, Wire.BRIDGE):
        yield Step(
            lab.node,
            lines=(
                f"link add {BRIDGE} type bridge",
                f"link set {BRIDGE} up",
                *(
                    f"addr add {format_address(ip)}/{length} dev {BRIDGE}" + _nodad(ip)
                    for ip, length in zip(gateways(lab.topology), _lengths(lab), strict=True)
                ),
            ),
        )
        value = "1" if lab.topology.br_netfilter else "0"
        yield Step(
            lab.node, tuple((f"bridge/bridge-nf-call-{tool}", value) for tool in ("iptables", "ip6tables"))
        )


def pod(lab: Plan, one: LabPod) -> Iterator[Step]:
    """One pod's wires. Its namespace exists and is empty."""
    yield Step(one.netns, _COMMON)
    yield Step(
        lab.node,
        lines=(
            f"link add {one.device} address {one.host_mac} type veth"
            f" peer name eth0 address {one.mac} netns {one.netns}",
            *([f"link set {one.device} master {BRIDGE}"] if one.wire is Wire.BRIDGE else []),
            f"link set {one.device} up",
            # A pod that reaches itself through its Service comes back out of the port it came in by.
            *([f"link set {one.device} type bridge_slave hairpin on"] if one.wire is Wire.BRIDGE else []),
        ),
    )
    yield Step(one.netns, lines=("link set lo up", "link set eth0 up"))
    if one.wire is Wire.BRANCH:
        yield from _branch_links(lab, one)
    for family in (4, 6):
        ips = [format_address(ip) for ip in one.ips if family_of(ip) == family]
        if ips:
            yield from _pod_family(lab, one, family, ips)
    if one.second_veth:
        yield from _second_veth(lab, one)


def gone(lab: Plan, one: LabPod) -> Iterator[Step]:
    """What is left to undo for a pod once its links are gone: rules and the outside's knowledge."""
    for family in (4, 6):
        ips = [format_address(ip) for ip in one.ips if family_of(ip) == family]
        rules = []
        for ip in ips:
            if one.wire in (Wire.ROUTED, Wire.SECONDARY):
                rules.append(f"rule del priority 512 to {ip}")
            if one.wire is Wire.SECONDARY:
                rules.append(f"rule del priority 1536 from {ip}")
        if one.wire is Wire.BRANCH and ips:
            rules += [f"rule del priority 10 lookup {100 + one.index}"] * 2
        yield Step(lab.node, lines=tuple(rules), family=family)
        outside = [f"route del throw {ip} table local" for ip in ips]
        outside += [f"route del {ip} dev eth1" for ip in ips if one.wire is Wire.SECONDARY]
        yield Step(lab.outside, lines=tuple(outside), family=family)


def _pod_family(lab: Plan, one: LabPod, family: int, ips: list[str]) -> Iterator[Step]:
    bits = 32 if family == 4 else 128
    nodad = " nodad" if family == 6 else ""
    gateway = POD_GATEWAY4 if family == 4 else POD_GATEWAY6
    upstream = UPSTREAM4 if family == 4 else UPSTREAM6
    node = one.device
    if one.wire in (Wire.PTP, Wire.BRIDGE):
        gateway, bits = _gateway(lab, family)
    # ptp gives the prefix length of the whole range, yet every neighbour is behind the gateway.
    flags = nodad + (" noprefixroute" if one.wire is Wire.PTP else "")
    inner = [f"addr add {ip}/{bits} dev eth0{flags}" for ip in ips]
    if one.wire is not Wire.BRIDGE:
        inner.append(f"route add {gateway} dev eth0 scope link")
    inner.append(f"route add default via {gateway} dev eth0")
    if one.wire not in (Wire.PTP, Wire.BRIDGE):
        inner.append(f"neigh replace {gateway} lladdr {one.host_mac} dev eth0 nud permanent")
    yield Step(one.netns, lines=tuple(inner), family=family)

    outer: list[str] = []
    table = f" table {100 + one.index}" if one.wire is Wire.BRANCH else ""
    if one.wire is Wire.PTP:
        outer.append(f"addr add {gateway}/{32 if family == 4 else 128} dev {node}{nodad}")
        outer += [f"route add {ip} dev {node} scope host" for ip in ips]
    elif one.wire is not Wire.BRIDGE:
        outer += [f"route add {ip} dev {node} scope link{table}" for ip in ips]
    if one.wire in (Wire.ROUTED, Wire.SECONDARY):
        outer += [f"rule add priority 512 to {ip} lookup main" for ip in ips]
    if one.wire is Wire.SECONDARY:
        outer += [f"rule add priority 1536 from {ip} lookup 2" for ip in ips]
    if one.wire is Wire.BRANCH:
        link = branch_link(one)
        outer += _default_route(family, link, None, table)
        outer += [f"rule add priority 10 iif {device} lookup {100 + one.index}" for device in (link, node)]
        # The iif rules come before the local table: answers to ARP and ND would be routed away.
        outer.append(f"neigh replace {upstream} lladdr {_trunk_mac(one)} dev {link} nud permanent")
        outer += [f"neigh replace {ip} lladdr {one.mac} dev {node} nud permanent" for ip in ips]
    yield Step(lab.node, lines=tuple(outer), family=family)

    outside = _not_outside([ip for ip in one.ips if family_of(ip) == family], family)
    if one.wire is Wire.BRANCH:
        for ip in ips:
            outside.append(f"neigh replace {ip} lladdr {_branch_mac(one)} dev {_trunk(one)} nud permanent")
            outside.append(f"route add {ip} dev {_trunk(one)}")
    if one.wire is Wire.SECONDARY:
        hop = next((format_address(ip) for ip in lab.node_ips if family_of(ip) == 4), "")
        via = f"via {hop} dev eth1 onlink" if family == 4 else f"via {NODE6} dev eth1"
        outside += [f"route add {ip} {via}" for ip in ips]
    yield Step(lab.outside, lines=tuple(outside), family=family)


def branch_link(one: LabPod) -> str:
    """The node's VLAN interface of a branch pod, named as the CNI names it."""
    return f"vlan.eth.{one.index}"


def _branch_links(lab: Plan, one: LabPod) -> Iterator[Step]:
    # A veth pair straight to the router stands for the tagged trunk: not every kernel has 802.1Q,
    # and above the link nothing can tell.
    yield Step(
        lab.node,
        lines=(
            f"link add {branch_link(one)} address {_branch_mac(one)} type veth"
            f" peer name {_trunk(one)} address {_trunk_mac(one)} netns {lab.outside}",
            f"link set {branch_link(one)} up",
        ),
    )
    # What the node itself sends to a branch pod comes back in here with the node's own source.
    yield Step(lab.node, ((f"ipv4/conf/{branch_link(one)}/accept_local", "1"),))
    yield Step(lab.outside, lines=(f"link set {_trunk(one)} up",))


def _second_veth(lab: Plan, one: LabPod) -> Iterator[Step]:
    device = veth_name(one.key, "mul")
    address = f"172.31.{one.index >> 8}.{one.index & 255}"
    yield Step(
        lab.node,
        lines=(
            f"link add {device} type veth peer name net1 netns {one.netns}",
            f"link set {device} up",
            f"route add {address} dev {device} scope link",
        ),
    )
    yield Step(one.netns, lines=("link set net1 up", f"addr add {address}/32 dev net1"))


def _uplink(lab: Plan, near: str, far: str) -> list[str]:
    return [
        f"link add {near} type veth peer name {far} netns {lab.outside}",
        f"link set {near} up",
        f"addr add {NODE6}/64 dev {near} nodad",
    ]


def _router_side(link: str) -> list[str]:
    return [
        f"link set {link} up",
        f"addr add {UPSTREAM4}/32 dev {link}",
        f"addr add {UPSTREAM6}/64 dev {link} nodad",
    ]


def _default_route(family: int, link: str, source: str | None, table: str = "") -> list[str]:
    upstream = UPSTREAM4 if family == 4 else UPSTREAM6
    src = f" src {source}" if source else ""
    lines = [f"route add {upstream} dev {link} scope link{table}"] if family == 4 else []
    onlink = " onlink" if family == 4 else ""
    return [*lines, f"route add default via {upstream} dev {link}{onlink}{src}{table}"]


def _not_outside(ips: Iterable[bytes], family: int) -> list[str]:
    # Pods may have documentation addresses too; `throw` makes the look-up go on to the main table.
    return [
        f"route add throw {format_address(ip)} table local"
        for ip in overlaps_outside(ips)
        if family_of(ip) == family
    ]


def _gateway(lab: Plan, family: int) -> tuple[str, int]:
    for ip, length in zip(gateways(lab.topology), _lengths(lab), strict=True):
        if family_of(ip) == family:
            return format_address(ip), length
    raise AssertionError("a pod has an address of a family that the pod network lacks")


def _lengths(lab: Plan) -> list[int]:
    return [parse_prefix(text)[0].length for text in (lab.topology.v4, lab.topology.v6) if text]


def _uses(lab: Plan, wire: Wire) -> bool:
    return lab.topology.wire is wire or wire in lab.topology.wires.values()


def _trunk(one: LabPod) -> str:
    return f"trunk{one.index}"


def _branch_mac(one: LabPod) -> str:
    return f"02:b0:00:00:{one.index >> 8:02x}:{one.index & 255:02x}"


def _trunk_mac(one: LabPod) -> str:
    return f"02:b1:00:00:{one.index >> 8:02x}:{one.index & 255:02x}"


def _host(ip: bytes) -> str:
    return f"{format_address(ip)}/{8 * len(ip)}"


def _nodad(ip: bytes) -> str:
    return " nodad" if len(ip) == 16 else ""
