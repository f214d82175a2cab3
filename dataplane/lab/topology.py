"""What a lab is to look like: pods, their addresses, names and wires. Values only, no I/O."""

from __future__ import annotations

import enum
import hashlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dataplane.addresses import Prefix, family_of, format_address, parse_address, parse_prefix
from dataplane.errors import InputError
from dataplane.model import ContainerPort, Key, Pod

DEFAULT_NODE = (parse_address("10.0.0.1"), parse_address("fd00::1"))
# The outside world answers for these (RFC 5737, RFC 3849) from the start, for others when told to.
OUTSIDE_NETS = tuple(
    parse_prefix(text)[0] for text in ("203.0.113.0/24", "198.51.100.0/24", "192.0.2.0/24", "2001:db8::/32")
)
OUTSIDE_ADDRESSES = (parse_address("203.0.113.1"), parse_address("2001:db8::1"))
LAB_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,38}[a-z0-9])?")


class Wire(enum.StrEnum):
    """How a pod is connected to its node."""

    ROUTED = "routed"  # Amazon VPC CNI: veth eni…, /32 and /128 routes of scope link
    PTP = "ptp"  # the CNI plugin ptp (kind): veth with a random name, gateway address on each veth
    BRIDGE = "bridge"  # the CNI plugin bridge: cni0, needs br_netfilter
    BRANCH = "branch"  # security groups for pods, strict: veth vlan…, routes only in table 100+N
    SECONDARY = "secondary"  # an address of a second network interface: leaves by eth1, by a source rule
    HOST = "host"  # hostNetwork: lives in the node


@dataclass(frozen=True, slots=True)
class Topology:
    """What differs from the default: every pod wired as the Amazon VPC CNI does it.

    `v4` and `v6` are where pods without status.podIPs get theirs from (None: no address of that
    family). The bridge's own address is the first of each. `second_veth` lists pods that get a
    second veth pair, as Multus makes.
    """

    wire: Wire = Wire.ROUTED
    wires: Mapping[Key, Wire] = field(default_factory=dict)
    second_veth: frozenset[Key] = frozenset()
    v4: str | None = "10.1.0.0/16"
    v6: str | None = "fd00:1::/64"
    node_ips: tuple[bytes, ...] = ()
    veth_prefix: str = "eni"
    conntrack: bool = True  # kube-proxy's rule that makes conntrack follow forwarded flows
    br_netfilter: bool = True


@dataclass(frozen=True, slots=True)
class LabPod:
    """One pod of a lab. `device` is the node's end of its veth; empty for hostNetwork."""

    key: Key
    netns: str
    wire: Wire
    ips: tuple[bytes, ...]
    ports: tuple[ContainerPort, ...]
    index: int
    device: str
    second_veth: bool = False

    @property
    def mac(self) -> str:
        """Hardware address of the pod's eth0."""
        return _mac(f"pod {self.key} {self.index}")

    @property
    def host_mac(self) -> str:
        """Hardware address of the node's end."""
        return _mac(f"node {self.key} {self.index}")

    def to_json(self) -> dict[str, Any]:
        return {
            "namespace": self.key.namespace,
            "name": self.key.name,
            "netns": self.netns,
            "wire": str(self.wire),
            "ips": [format_address(ip) for ip in self.ips],
            "ports": [[port.name, port.protocol, port.port] for port in self.ports],
            "index": self.index,
            "device": self.device,
            "second_veth": self.second_veth,
        }

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> LabPod:
        return cls(
            Key(raw["namespace"], raw["name"]),
            raw["netns"],
            Wire(raw["wire"]),
            tuple(parse_address(ip) for ip in raw["ips"]),
            tuple(ContainerPort(*port) for port in raw["ports"]),
            raw["index"],
            raw["device"],
            raw["second_veth"],
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """A lab, fully decided. `wiring` turns it into commands."""

    name: str
    node: str
    outside: str
    node_ips: tuple[bytes, ...]
    pods: tuple[LabPod, ...]
    topology: Topology

    @property
    def namespaces(self) -> tuple[str, ...]:
        own = [pod.netns for pod in self.pods if pod.wire is not Wire.HOST]
        return (self.node, self.outside, *own)


def veth_name(key: Key, prefix: str = "eni") -> str:
    """The node's end of a pod's veth: amazon-vpc-cni-k8s, `GeneratePodHostVethName`."""
    digest = hashlib.sha1(f"{key.namespace}.{key.name}".encode(), usedforsecurity=False).hexdigest()
    return prefix + digest[:11]


def check_name(name: str) -> str:
    if not LAB_NAME.fullmatch(name):
        raise InputError(f"lab name {name!r}: use at most 40 of a-z, 0-9 and '-', such as 'demo'")
    return name


def plan(name: str, pods: Sequence[Pod], topology: Topology) -> Plan:
    """Decide names and addresses for `pods`. The same pods always get the same addresses."""
    check_name(name)
    live = sorted((pod for pod in pods if not pod.finished), key=lambda pod: pod.key)
    node_ips = topology.node_ips or tuple(dict.fromkeys(ip for pod in live for ip in pod.host_ips))
    families = {family_of(ip) for ip in node_ips}
    node_ips += tuple(ip for ip in DEFAULT_NODE if family_of(ip) not in families)
    done = Plan(name, f"{name}-node", f"{name}-outside", node_ips, (), topology)
    # Addresses that the objects state are taken before the first one is given out.
    stated = {ip for pod in live if not pod.host_network for ip in pod.ips}
    for pod in live:
        done = replace(done, pods=(*done.pods, place(done, pod, stated)))
    return done


def place(lab: Plan, pod: Pod, taken: Collection[bytes] = ()) -> LabPod:
    """Decide everything about one more pod of `lab`. InputError: it clashes with one that is there."""
    topology = lab.topology
    if any(other.key == pod.key for other in lab.pods):
        raise InputError(f"Pod {pod.key}: the lab {lab.name} already has a pod of this name")
    if pod.host_network:
        index = max((other.index for other in lab.pods), default=0) + 1
        return LabPod(pod.key, lab.node, Wire.HOST, lab.node_ips, pod.ports, index, "")
    used = {ip for other in lab.pods for ip in other.ips} | {*lab.node_ips, *gateways(topology)}
    for ip in pod.ips:
        if ip in used:
            raise InputError(f"Pod {pod.key}: address {format_address(ip)} is taken by something else")
    used.update(taken)
    ips = pod.ips or tuple(
        next_address(parse_prefix(text)[0], used) for text in (topology.v4, topology.v6) if text
    )
    wire = topology.wires.get(pod.key, topology.wire)
    index = max((other.index for other in lab.pods), default=0) + 1
    return LabPod(
        pod.key,
        _netns(lab, pod.key),
        wire,
        ips,
        pod.ports,
        index,
        _device(pod.key, wire, index, topology.veth_prefix),
        pod.key in topology.second_veth,
    )


def gateways(topology: Topology) -> Iterator[bytes]:
    """The node's own addresses on the pod network, where the wire has such: the first of each range."""
    for text in (topology.v4, topology.v6):
        if text:
            yield _nth(parse_prefix(text)[0], 1)


def next_address(prefix: Prefix, used: Collection[bytes]) -> bytes:
    """The lowest address of `prefix` that is free; the first two are kept for network and gateway."""
    for offset in range(2, 1 << min(20, 8 * len(prefix.network) - prefix.length)):
        address = _nth(prefix, offset)
        if address not in used:
            return address
    raise InputError(f"the lab has no free address left in {prefix}")


def overlaps_outside(ips: Iterable[bytes]) -> list[bytes]:
    """Addresses of ours inside the ranges that the outside world answers for."""
    return [ip for ip in ips if any(ip in net for net in OUTSIDE_NETS)]


def _nth(prefix: Prefix, offset: int) -> bytes:
    return (int.from_bytes(prefix.network) + offset).to_bytes(len(prefix.network))


def _netns(lab: Plan, key: Key) -> str:
    name = f"{lab.name}-{key.namespace}-{key.name}"
    # a/b-c and a-b/c would share a name, and a file name ends at 255 bytes.
    if len(name) > 200 or name in lab.namespaces:
        digest = hashlib.sha1(str(key).encode(), usedforsecurity=False).hexdigest()
        name = f"{name[:200]}-{digest[:8]}"
    return name


def _device(key: Key, wire: Wire, index: int, prefix: str) -> str:
    if wire is Wire.BRANCH:
        return veth_name(key, "vlan")
    if wire in (Wire.PTP, Wire.BRIDGE):
        # Those plugins draw the name by lot; nothing may be read from it. A digest keeps runs alike.
        digest = hashlib.sha1(f"{wire} {index} {key}".encode(), usedforsecurity=False).hexdigest()
        return f"veth{digest[:8]}"
    return veth_name(key, prefix)


def _mac(text: str) -> str:
    digest = hashlib.sha1(text.encode(), usedforsecurity=False).digest()
    # 02: locally administered, unicast.
    return ":".join(f"{byte:02x}" for byte in (0x02, *digest[:5]))
