"""Which network interface of this node is a pod's, and which addresses are the node's own.

`LinkState` is a frozen picture of what rtnetlink says; everything here but `Interfaces` computes with
it and does no I/O. `Interfaces` keeps the picture current from netlink events, without polling.
"""

from __future__ import annotations

import asyncio
import enum
import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

from dataplane.addresses import Prefix, format_address, parse_prefix
from dataplane.errors import KernelError
from dataplane.model import Key
from dataplane.node import rtnetlink
from dataplane.node.rtnetlink import AF_BRIDGE, AF_INET, AF_INET6, Overrun, RouteSocket

# Local addresses that are a service to pods rather than the node itself: node-local DNS, the Pod
# Identity agent. A policy decides about them.
SERVICE_PREFIXES = (parse_prefix("169.254.0.0/16")[0], parse_prefix("fd00:ec2::/32")[0])
_NEVER_OWN = (*SERVICE_PREFIXES, parse_prefix("127.0.0.0/8")[0], parse_prefix("fe80::/10")[0])
# The VPC CNI keeps the routes of branch interface number N in table 100 + N; N is a VLAN id.
# 253 to 255 are the kernel's default, main and local.
BRANCH_TABLES = frozenset(range(101, 100 + 4095)) - {253, 254, 255}
BRANCH_PREFIX = "vlan"  # host veths of pods with strict security groups; the uplinks are vlan.eth.<id>
# A pod can invent MAC and IP addresses without end; what is kept of them has one, per port where
# possible, so that a pod pushes out only its own.
MACS_PER_PORT = 256
NEIGHBOURS = 16384
RETRY_S = 0.5
_BRANCH_UPLINK = re.compile(r"vlan\.eth\.\d+")


class Kind(enum.StrEnum):
    """How a pod's packets reach the node: by a route, by a route of a branch interface, by a bridge."""

    ROUTED = "routed"
    BRANCH = "branch"
    BRIDGED = "bridged"


class Link(NamedTuple):
    """A link; `kind` as rtnetlink names it (veth, bridge, dummy …), `master` an ifindex or 0.

    `group`: its device group, all 32 bits of it; here so that a change of it is noticed at once.
    """

    ifindex: int
    name: str
    kind: str = ""
    master: int = 0
    up: bool = True
    group: int = 0


class LocalAddress(NamedTuple):
    """An address of this node; `scope` 0 is global (RT_SCOPE_…, linux/rtnetlink.h)."""

    ifindex: int
    address: bytes
    length: int
    scope: int = 0


class HostRoute(NamedTuple):
    """A /32 or /128 unicast route straight to a link (no gateway)."""

    address: bytes
    ifindex: int
    table: int = 254


class DefaultRoute(NamedTuple):
    """One next hop of a default route; `advertised`: learnt from an IPv6 router advertisement."""

    ifindex: int
    gateway: bytes | None = None
    table: int = 254
    advertised: bool = False


@dataclass(frozen=True)
class LinkState:
    """What locates pods. `neighbours`: (ifindex, IP) → MAC; `forwarding`: (bridge ifindex, MAC) → port."""

    links: Mapping[int, Link] = field(default_factory=dict)
    addresses: frozenset[LocalAddress] = frozenset()
    host_routes: frozenset[HostRoute] = frozenset()
    default_routes: frozenset[DefaultRoute] = frozenset()
    neighbours: Mapping[tuple[int, bytes], bytes] = field(default_factory=dict)
    forwarding: Mapping[tuple[int, bytes], int] = field(default_factory=dict)

    @cached_property
    def by_name(self) -> dict[str, Link]:
        return {link.name: link for link in self.links.values()}

    @cached_property
    def routes_by_address(self) -> dict[bytes, tuple[HostRoute, ...]]:
        found: dict[bytes, list[HostRoute]] = {}
        for route in sorted(self.host_routes):
            found.setdefault(route.address, []).append(route)
        return {address: tuple(routes) for address, routes in found.items()}

    @cached_property
    def neighbours_by_address(self) -> dict[bytes, tuple[tuple[int, bytes], ...]]:
        found: dict[bytes, list[tuple[int, bytes]]] = {}
        for (index, address), mac in sorted(self.neighbours.items()):
            found.setdefault(address, []).append((index, mac))
        return {address: tuple(entries) for address, entries in found.items()}

    @cached_property
    def uplinks(self) -> frozenset[int]:
        """Links that lead out of the node, by ifindex. None of them is ever a pod's interface."""
        routed_to = {route.ifindex for route in self.host_routes}
        found = set()
        for route in self.default_routes:
            link = self.links.get(route.ifindex)
            if route.advertised and link is not None and link.kind == "veth" and link.ifindex in routed_to:
                # A pod can send router advertisements; where the node believes them, the pod would
                # become an "uplink" and go free.
                continue
            found.add(route.ifindex)
            if route.gateway is not None and link is not None and link.kind == "bridge":
                found |= self._ports_of(route.ifindex, route.gateway)
        for link in self.links.values():
            if _BRANCH_UPLINK.fullmatch(link.name):
                found.add(link.ifindex)
            master = self.links.get(link.master)
            if master is not None and master.kind == "bridge" and link.kind != "veth":
                found.add(link.ifindex)
        return frozenset(found)

    def _ports_of(self, bridge: int, gateway: bytes) -> set[int]:
        mac = self.neighbours.get((bridge, gateway))
        port = self.forwarding.get((bridge, mac)) if mac is not None else None
        return set() if port is None else {port}


@dataclass(frozen=True)
class Placement:
    """A pod's interface on this node. `bridge` names the bridge whose port it is (kind BRIDGED)."""

    ifindex: int
    name: str
    kind: Kind
    bridge: str | None = None
    bridge_ifindex: int = 0


@lru_cache(maxsize=8192)
def host_veth_name(pod: Key, prefix: str) -> str:
    """The name the VPC CNI gives a pod's host-side veth (pkg/networkutils, GeneratePodHostVethName)."""
    digest = hashlib.sha1(f"{pod.namespace}.{pod.name}".encode(), usedforsecurity=False)
    return prefix + digest.hexdigest()[:11]


def named_links(pod: Key, state: LinkState, veth_prefix: str) -> set[int]:
    """The links, by ifindex, whose name says that they are this pod's: one, or none."""
    return {
        link.ifindex
        for prefix in (veth_prefix, BRANCH_PREFIX)
        if (link := state.by_name.get(host_veth_name(pod, prefix))) is not None
        and link.ifindex not in state.uplinks
    }


def locate(
    pod: Key,
    addresses: Collection[bytes],
    state: LinkState,
    veth_prefix: str,
    others: Collection[int] = (),
) -> Placement | None:
    """The interface of a pod, or None while it has none here. `others`: links named for other pods.

    By name, then by host route in any table, then through a bridge's neighbour and forwarding tables;
    last, where pods are wired by hand, the one veth whose own subnet holds the address.
    Name and route may disagree: the veth of a former pod of the same name can outlive it. Then a link
    that a route of the pod leads to wins over one without, and the newest (highest ifindex) among equals.
    """
    routed = {route.ifindex for address in addresses for route in state.routes_by_address.get(address, ())}
    named = named_links(pod, state, veth_prefix)
    # An address may have been handed on: its route then leads to the next owner's interface.
    routed = {index for index in routed if index in named or index not in others}
    candidates = named | {index for index in routed if _may_be_pod(state, index)}
    if candidates:
        if named & routed:
            best = max(named & routed)
        elif named and max(candidates) in named:
            # The CNI makes the link before the route, and a route of a former owner of the
            # address may still be there: it leads to an older link.
            best = max(named)
        else:
            best = max(candidates)
        return _placement(pod, addresses, state, best)
    return _locate_on_bridge(addresses, state) or _locate_on_subnet(addresses, state, others)


def _may_be_pod(state: LinkState, ifindex: int) -> bool:
    link = state.links.get(ifindex)
    return link is not None and link.kind == "veth" and ifindex not in state.uplinks


def _placement(pod: Key, addresses: Collection[bytes], state: LinkState, ifindex: int) -> Placement:
    link = state.links[ifindex]
    master = state.links.get(link.master)
    if master is not None and master.kind == "bridge":
        return Placement(ifindex, link.name, Kind.BRIDGED, master.name, master.ifindex)
    tables = {
        route.table
        for address in addresses
        for route in state.routes_by_address.get(address, ())
        if route.ifindex == ifindex
    }
    branch = link.name == host_veth_name(pod, BRANCH_PREFIX) or (
        bool(tables) and all(table in BRANCH_TABLES for table in tables)
    )
    return Placement(ifindex, link.name, Kind.BRANCH if branch else Kind.ROUTED)


def branch_uplink(place: Placement, addresses: Collection[bytes], state: LinkState) -> int:
    """The interface by which a branch pod's traffic leaves the node and comes back, 0 when unknown: where
    the default route goes in the table that holds the pod's own route."""
    if place.kind is not Kind.BRANCH:
        return 0
    tables = {
        route.table
        for address in addresses
        for route in state.routes_by_address.get(address, ())
        if route.ifindex == place.ifindex
    }
    found = {
        route.ifindex
        for route in state.default_routes
        if route.table in tables & BRANCH_TABLES and not route.advertised
    }
    return found.pop() if len(found) == 1 else 0


def _locate_on_bridge(addresses: Iterable[bytes], state: LinkState) -> Placement | None:
    for address in addresses:
        for index, mac in state.neighbours_by_address.get(address, ()):
            bridge = state.links.get(index)
            if bridge is None or bridge.kind != "bridge":
                continue
            port = state.forwarding.get((index, mac))
            if port is not None and _may_be_pod(state, port):
                return Placement(port, state.links[port].name, Kind.BRIDGED, bridge.name, bridge.ifindex)
    return None


def _locate_on_subnet(
    addresses: Collection[bytes], state: LinkState, others: Collection[int]
) -> Placement | None:
    lengths: dict[int, int] = {}
    for local in state.addresses:
        link = state.links.get(local.ifindex)
        if link is None or link.master or link.ifindex in others or not _may_be_pod(state, link.ifindex):
            continue
        network = _network_of(local)
        if local.address not in _LINK_LOCAL_V6 and any(
            address in network and address != local.address for address in addresses
        ):
            lengths[link.ifindex] = max(local.length, lengths.get(link.ifindex, 0))
    nearest = [index for index, length in lengths.items() if length == max(lengths.values())]
    if len(nearest) != 1:
        return None
    return Placement(nearest[0], state.links[nearest[0]].name, Kind.ROUTED)


def lookalikes(state: LinkState, veth_prefix: str) -> frozenset[str]:
    """Names of links that strict mode would take for pods not yet known, and which are none: uplinks,
    and links that share the prefix but are no veth."""
    return frozenset(
        link.name
        for link in state.links.values()
        if link.name.startswith((veth_prefix, BRANCH_PREFIX))
        and not _BRANCH_UPLINK.fullmatch(link.name)
        and (link.ifindex in state.uplinks or link.kind != "veth")
    )


def own_node_addresses(state: LinkState) -> frozenset[bytes]:
    """The node's own addresses: global unicast, on links that are not `dummy`, outside service ranges."""
    return frozenset(
        local.address
        for local in state.addresses
        if local.scope == 0
        and _kind_of(state, local.ifindex) != "dummy"
        and not any(local.address in prefix for prefix in _NEVER_OWN)
        and local.address != bytes(15) + b"\x01"
    )


def local_service_addresses(state: LinkState) -> frozenset[Prefix]:
    """Local addresses that are services to pods: on `dummy` links, link-local IPv4, fd00:ec2::/32."""
    return frozenset(
        Prefix(local.address, len(local.address) * 8)
        for local in state.addresses
        if local.address not in _LINK_LOCAL_V6
        and (
            _kind_of(state, local.ifindex) == "dummy"
            or any(local.address in prefix for prefix in SERVICE_PREFIXES)
        )
    )


_LINK_LOCAL_V6 = parse_prefix("fe80::/10")[0]


def _kind_of(state: LinkState, ifindex: int) -> str:
    link = state.links.get(ifindex)
    return "" if link is None else link.kind


def problems(
    state: LinkState,
    placements: Iterable[Placement],
    read: Callable[[str], str | None] | None = None,
    *,
    strict: bool = False,
) -> list[str]:
    """What keeps policy from being enforced on this node; each text says what to do.

    `strict`: pods that nobody has named yet must be closed too. `read` returns the content of a file
    below /proc/sys/net/bridge, None when it is not there.
    """
    read = read or _read_bridge_setting
    found = []
    if "kube-ipvs0" in state.by_name:
        found.append(
            "kube-proxy runs in IPVS mode (interface kube-ipvs0): Service traffic to pods never meets the"
            " FORWARD hook and cannot be judged; set kube-proxy to iptables or nftables mode"
        )
    if strict:
        masters = {link.master for link in state.links.values() if link.kind == "veth"}
        open_bridges = sorted(
            link.name for link in state.links.values() if link.ifindex in masters and link.kind == "bridge"
        )
        if open_bridges:
            found.append(
                "strict mode cannot close pods on a bridge that are not known yet"
                f" ({', '.join(open_bridges)}); run without --mode strict, or give pods routed interfaces"
            )
    bridges = sorted({place.bridge for place in placements if place.kind is Kind.BRIDGED and place.bridge})
    if bridges:
        for name in ("bridge-nf-call-iptables", "bridge-nf-call-ip6tables"):
            value = read(name)
            if value is None:
                found.append(
                    f"pods are on bridge {', '.join(bridges)}, but br_netfilter is not loaded: their traffic"
                    " is not seen; run: modprobe br_netfilter"
                )
                break
            if value.strip() != "1":
                found.append(
                    f"pods are on bridge {', '.join(bridges)}, but net.bridge.{name} is {value.strip()}:"
                    f" their traffic is not seen; run: sysctl -w net.bridge.{name}=1"
                )
    return found


def _read_bridge_setting(name: str) -> str | None:
    try:
        return Path("/proc/sys/net/bridge", name).read_text()
    except OSError:
        return None


class Interfaces:
    """The links, addresses, routes and neighbours of this network namespace, kept current by events.

    An event about a link, address or interesting route leads to one new dump of that kind, however
    many events arrived together: the state then depends on what is, not on what happened. Neighbours,
    which change all the time, are followed one by one, and only while there is a bridge.
    """

    def __init__(self) -> None:
        self.state = LinkState()
        self._changed = asyncio.Event()
        self._events: RouteSocket | None = None
        self._dumps: RouteSocket | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._links: dict[int, Link] = {}
        self._addresses: frozenset[LocalAddress] = frozenset()
        self._host_routes: frozenset[HostRoute] = frozenset()
        self._default_routes: frozenset[DefaultRoute] = frozenset()
        self._neighbours: dict[tuple[int, bytes], bytes] = {}
        self._forwarding: dict[tuple[int, bytes], int] = {}
        self._behind: dict[int, dict[tuple[int, bytes], None]] = {}  # port → its keys of _forwarding
        self._following_neighbours = False

    async def start(self) -> None:
        """Take the first picture and follow changes. KernelError when rtnetlink cannot be used."""
        self._events = RouteSocket(rtnetlink.ALL_GROUPS, receive_buffer=8 << 20)
        self._dumps = RouteSocket()
        self._loop = asyncio.get_running_loop()
        self._refresh(links=True, addresses=True, routes=True)
        self._loop.add_reader(self._events.fileno(), self._on_events)

    async def stop(self) -> None:
        """Close the sockets; the last state stays readable."""
        if self._events is not None and self._loop is not None:
            self._loop.remove_reader(self._events.fileno())
            self._events.close()
            self._events = None
        if self._dumps is not None:
            self._dumps.close()
            self._dumps = None

    async def wait_change(self) -> None:
        """Return when the state changed since the last return; changes in between count as one."""
        await self._changed.wait()
        self._changed.clear()

    def catch_up(self) -> None:
        """Take in what has happened until now, before the event loop comes to it."""
        if self._events is not None:
            self._on_events()

    def solicit(self, addresses: Iterable[bytes]) -> None:
        """Make the kernel find out behind which bridge port these addresses are.

        A pod that has not spoken lately is in no forwarding table. Its answer to the node's ARP or
        neighbour solicitation brings the events that locate it.
        """
        if self._dumps is None:
            return
        for address in addresses:
            for local in self._addresses:
                bridge = self._links.get(local.ifindex)
                if bridge is None or bridge.kind != "bridge" or len(local.address) != len(address):
                    continue
                mac = self._neighbours.get((local.ifindex, address))
                # An address may be known from long ago while the bridge has forgotten its port.
                known = mac is not None and (local.ifindex, mac) in self._forwarding
                if address in _network_of(local) and not known:
                    try:
                        self._dumps.solicit(local.ifindex, address, mac)
                    except OSError:
                        continue  # the bridge is gone or down; its events are on their way

    def _on_events(self) -> None:
        assert self._events is not None
        links = addresses = routes = neighbours = False
        try:
            for kind, body in self._events.events():
                if kind in {rtnetlink.RTM_NEWLINK, rtnetlink.RTM_DELLINK}:
                    # IPv4 routes vanish with their link without an event of their own.
                    links = routes = True
                elif kind in {rtnetlink.RTM_NEWADDR, rtnetlink.RTM_DELADDR}:
                    addresses = True
                elif kind in {rtnetlink.RTM_NEWROUTE, rtnetlink.RTM_DELROUTE}:
                    routes = routes or _matters(rtnetlink.parse_route(body))
                elif kind == rtnetlink.RTM_NEWNEIGH and self._following_neighbours:
                    neighbours = self._learn(rtnetlink.parse_neighbour(body)) or neighbours
        except Overrun:
            links = addresses = routes = True
            self._following_neighbours = False  # dumps them again
        try:
            self._refresh(links=links, addresses=addresses, routes=routes, neighbours=neighbours)
        except (KernelError, OSError):
            assert self._loop is not None
            self._loop.call_later(RETRY_S, self._resync)

    def _resync(self) -> None:
        """Look at everything again after the kernel refused an answer."""
        if self._dumps is None:
            return
        self._following_neighbours = False
        try:
            self._refresh(links=True, addresses=True, routes=True)
        except (KernelError, OSError):
            assert self._loop is not None
            self._loop.call_later(RETRY_S, self._resync)

    def _refresh(
        self, *, links: bool = False, addresses: bool = False, routes: bool = False, neighbours: bool = False
    ) -> None:
        assert self._dumps is not None
        if not (links or addresses or routes or neighbours):
            return
        if links:
            self._links = {
                link.ifindex: Link(link.ifindex, link.name, link.kind, link.master, link.up, link.group)
                for link in self._dumps.links()
            }
            self._forget_gone()
        if addresses:
            self._addresses = frozenset(LocalAddress(*found) for found in self._dumps.addresses())
        if routes:
            self._read_routes()
        self._follow_neighbours()
        state = LinkState(
            dict(self._links),
            self._addresses,
            self._host_routes,
            self._default_routes,
            dict(self._neighbours),
            dict(self._forwarding),
        )
        if state != self.state:
            self.state = state
            self._changed.set()

    def _read_routes(self) -> None:
        assert self._dumps is not None
        host: set[HostRoute] = set()
        default: set[DefaultRoute] = set()
        for family, bits in ((AF_INET, 32), (AF_INET6, 128)):
            for route in self._dumps.routes(family):
                if route.kind != rtnetlink.RTN_UNICAST:
                    continue
                if route.length == 0:
                    advertised = route.protocol == rtnetlink.RTPROT_RA
                    default |= {
                        DefaultRoute(index, via, route.table, advertised) for index, via in route.hops
                    }
                elif route.length == bits and route.protocol != rtnetlink.RTPROT_KERNEL:
                    # The kernel's own /128 routes are to addresses of this node.
                    host |= {
                        HostRoute(route.destination, index, route.table)
                        for index, via in route.hops
                        if via is None
                    }
        self._host_routes, self._default_routes = frozenset(host), frozenset(default)

    def _follow_neighbours(self) -> None:
        """Read neighbours when the first bridge appears, drop them with the last."""
        assert self._dumps is not None
        wanted = any(link.kind == "bridge" for link in self._links.values())
        if wanted and not self._following_neighbours:
            for family in (AF_INET, AF_INET6, AF_BRIDGE):
                for entry in self._dumps.neighbours(family):
                    self._learn(entry)
        elif not wanted:
            self._neighbours.clear()
            self._forwarding.clear()
            self._behind.clear()
        self._following_neighbours = wanted

    def _learn(self, entry: rtnetlink.NeighbourMessage | None) -> bool:
        """Take in one entry. An entry that ages out stays known until its link goes or another one
        replaces it: a pod that is silent for five minutes has not moved."""
        if entry is None or entry.mac is None:
            return False
        if entry.family == AF_BRIDGE:
            if not entry.master or entry.flags & rtnetlink.NTF_SELF or entry.state & rtnetlink.NUD_PERMANENT:
                return False  # the port's own MAC
            key = (entry.master, entry.mac)
            if self._forwarding.get(key) == entry.ifindex:
                return False
            self._behind.get(self._forwarding.get(key, 0), {}).pop(key, None)
            behind = self._behind.setdefault(entry.ifindex, {})
            if len(behind) >= MACS_PER_PORT:
                oldest = next(iter(behind))
                del behind[oldest], self._forwarding[oldest]
            behind[key] = None
            self._forwarding[key] = entry.ifindex
            return True
        if entry.address is None or _kind_in(self._links, entry.ifindex) != "bridge":
            return False
        place = (entry.ifindex, entry.address)
        if self._neighbours.get(place) == entry.mac:
            return False
        if place not in self._neighbours and len(self._neighbours) >= NEIGHBOURS:
            del self._neighbours[next(iter(self._neighbours))]
        self._neighbours[place] = entry.mac
        return True

    def _forget_gone(self) -> None:
        self._neighbours = {
            key: mac for key, mac in self._neighbours.items() if _kind_in(self._links, key[0]) == "bridge"
        }
        self._forwarding = {
            key: port
            for key, port in self._forwarding.items()
            if port in self._links and self._links[port].master == key[0]
        }
        self._behind = {}
        for key, port in self._forwarding.items():
            self._behind.setdefault(port, {})[key] = None


def _kind_in(links: Mapping[int, Link], ifindex: int) -> str:
    link = links.get(ifindex)
    return "" if link is None else link.kind


def _network_of(local: LocalAddress) -> Prefix:
    return parse_prefix(f"{format_address(local.address)}/{local.length}")[0]


def _matters(route: rtnetlink.RouteMessage | None) -> bool:
    """Whether a route event can move a pod or an uplink: host routes and default routes."""
    return route is not None and route.length in {0, 32, 128} and route.kind == rtnetlink.RTN_UNICAST
