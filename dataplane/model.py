"""The frozen objects everything else is computed from.

Nothing here has behaviour beyond naming itself: sources build these, `policy` computes with them.
Addresses are packed bytes (`dataplane.addresses`).
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from dataplane.addresses import Prefix

ANNOTATION_MODE = "podgate.dev/mode"  # of a NetworkPolicy or Namespace: `audit` or `enforce`
PROTOCOLS = {"TCP": 6, "UDP": 17, "SCTP": 132}
PROTOCOL_NAMES = {number: name for name, number in PROTOCOLS.items()}


class Direction(enum.StrEnum):
    """Seen from the pod: ingress is what it receives, egress what it sends."""

    INGRESS = "ingress"
    EGRESS = "egress"


class Key(NamedTuple):
    """The name of a namespaced object, written `namespace/name`."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


class PortRange(NamedTuple):
    """Ports `first` to `last` inclusive of one IP protocol number; 0 to 65535 is every port."""

    protocol: int
    first: int
    last: int

    def __str__(self) -> str:
        name = PROTOCOL_NAMES.get(self.protocol, str(self.protocol))
        if (self.first, self.last) == (0, 65535):
            return name
        return f"{self.first}/{name}" if self.first == self.last else f"{self.first}-{self.last}/{name}"


@dataclass(frozen=True, slots=True)
class Rule:
    """One allow rule of a PolicyEndpoint.

    Matches a peer inside `cidr` and outside every prefix of `excepts`, when `ports` is empty
    (every protocol and port, ICMP too) or one of them holds the packet's protocol and port.
    `index` is the rule's place in the policy's list for that direction, over all slices in the
    order of their names; it identifies the rule to people and takes no part in matching.
    """

    cidr: Prefix
    excepts: tuple[Prefix, ...] = ()
    ports: tuple[PortRange, ...] = ()
    index: int = 0


class PodEndpoint(NamedTuple):
    """A pod that a PolicyEndpoint selects, as `spec.podSelectorEndpoints` names it."""

    pod: Key
    pod_ip: bytes
    host_ip: bytes


@dataclass(frozen=True, slots=True)
class PolicyEndpoint:
    """One PolicyEndpoint object (networking.k8s.aws/v1alpha1), checked: what could not be used is gone.

    `port_group` is the label podgate.dev/port-group of objects podgate made, else None: slices are
    joined by (`policy`, `port_group`). `changed_at` is the trigger-time annotation, seconds since
    the epoch, or None.
    """

    key: Key
    policy: Key
    isolates: frozenset[Direction]
    endpoints: tuple[PodEndpoint, ...] = ()
    ingress: tuple[Rule, ...] = ()
    egress: tuple[Rule, ...] = ()
    port_group: str | None = None
    changed_at: float | None = None


class ContainerPort(NamedTuple):
    """A port a container declares; `name` is None when it has none."""

    name: str | None
    protocol: int
    port: int


class Hint(enum.StrEnum):
    """What a pod's spec tells about whom it will talk to beyond other pods."""

    AWS = "aws"  # AWS_… settings in its environment
    WEB_IDENTITY = "web-identity"  # credentials from STS, by a projected token (IRSA)
    POD_IDENTITY = "pod-identity"  # credentials from the Pod Identity agent of its node
    OWN_CREDENTIALS = "own-credentials"  # keys or a profile are, or may be, in its environment or files
    OWN_DNS = "own-dns"  # does not ask the cluster's DNS servers
    NODE_LOCAL_DNS = "node-local-dns"  # asks 169.254.20.10


@dataclass(frozen=True, slots=True)
class Pod:
    """What is needed of a v1 Pod. `ips` are its status.podIPs, empty when it has none yet."""

    key: Key
    uid: str = ""
    node_name: str | None = None
    host_ips: tuple[bytes, ...] = ()
    ips: tuple[bytes, ...] = ()
    host_network: bool = False
    finished: bool = False  # phase Succeeded or Failed: it owns no address any more
    created_at: float | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)  # only podgate.dev/…
    ports: tuple[ContainerPort, ...] = ()
    hints: frozenset[Hint] = frozenset()
    strict: bool = False  # isolated both ways whatever policies say: the CNI's word, never an object's


class Operator(enum.StrEnum):
    """What a requirement of a label selector asks of a label."""

    IN = "In"
    NOT_IN = "NotIn"
    EXISTS = "Exists"
    DOES_NOT_EXIST = "DoesNotExist"


class Requirement(NamedTuple):
    """One condition on one label; `values` is empty for Exists and DoesNotExist."""

    key: str
    operator: Operator
    values: tuple[str, ...] = ()


class LabelSelector(NamedTuple):
    """Every requirement must hold; none at all matches everything. `matchLabels` are In with one value."""

    requirements: tuple[Requirement, ...] = ()

    @classmethod
    def of(cls, labels: Mapping[str, str]) -> LabelSelector:
        """What `matchLabels: labels` selects."""
        return cls(tuple(Requirement(key, Operator.IN, (value,)) for key, value in sorted(labels.items())))


EVERYTHING = LabelSelector()


class IPBlock(NamedTuple):
    """Addresses inside `cidr` and outside every prefix of `excepts`."""

    cidr: Prefix
    excepts: tuple[Prefix, ...] = ()


class NetworkPolicyPeer(NamedTuple):
    """One item of `from` or `to`. With no member set, which is how a bad one is read, it matches nothing."""

    pod_selector: LabelSelector | None = None
    namespace_selector: LabelSelector | None = None
    ip_block: IPBlock | None = None


class NetworkPolicyPort(NamedTuple):
    """One item of `ports`, as written: every member may be missing. A text `port` is a named port."""

    protocol: int | None = None
    port: int | str | None = None
    end_port: int | None = None


class NetworkPolicyRule(NamedTuple):
    """One rule as written. No `peers`: anybody. No `ports`: every port."""

    peers: tuple[NetworkPolicyPeer, ...] = ()
    ports: tuple[NetworkPolicyPort, ...] = ()


@dataclass(frozen=True, slots=True)
class NetworkPolicy:
    """A networking.k8s.io/v1 NetworkPolicy as written, checked: what is bad in it allows nothing.

    `policy_types` is None where it is missing: `policy.normalize` applies the defaults. A rule that
    cannot be used stays in its list, so that rules keep their places, and matches nothing.
    """

    key: Key
    pod_selector: LabelSelector = EVERYTHING
    policy_types: frozenset[Direction] | None = None
    ingress: tuple[NetworkPolicyRule, ...] = ()
    egress: tuple[NetworkPolicyRule, ...] = ()
    uid: str = ""
    annotations: Mapping[str, str] = field(default_factory=dict)  # only podgate.dev/…
    left_open: tuple[str, ...] = ()  # paths of fields written empty, or left out, where that means everything


@dataclass(frozen=True, slots=True)
class PolicyHead:
    """A NetworkPolicy of which nothing counts but its annotations: its PolicyEndpoints are others' work."""

    key: Key
    annotations: Mapping[str, str] = field(default_factory=dict)  # only podgate.dev/…


@dataclass(frozen=True, slots=True)
class Namespace:
    """What is needed of a v1 Namespace."""

    name: str
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)  # only podgate.dev/…


class ServicePort(NamedTuple):
    """`target`: the pods' port, as a number or as the name of a container port."""

    protocol: int
    port: int
    target: int | str


@dataclass(frozen=True, slots=True)
class Service:
    """What is needed of a v1 Service. `cluster_ips` is empty for headless and ExternalName ones."""

    key: Key
    selector: Mapping[str, str] = field(default_factory=dict)
    cluster_ips: tuple[bytes, ...] = ()
    ports: tuple[ServicePort, ...] = ()


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with the input: where, what, and what stays in force because of it.

    `source` is a file or API path; `object` names the object (`PolicyEndpoint ns/name`) or is
    empty; `field` is a path such as `spec.ingress[3].cidr` or is empty.
    """

    source: str
    object: str
    field: str
    reason: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.source, self.object, self.field, self.reason) if part)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Every object known at one moment. Equal content gives equal snapshots, whatever the history."""

    policy_endpoints: tuple[PolicyEndpoint, ...] = ()  # sorted by key
    pods: tuple[Pod, ...] = ()  # sorted by key
    problems: tuple[Problem, ...] = ()
    network_policies: tuple[NetworkPolicy, ...] = ()  # sorted by key
    namespaces: tuple[Namespace, ...] = ()  # sorted by name
    services: tuple[Service, ...] = ()  # sorted by key
    policy_heads: tuple[PolicyHead, ...] = ()  # sorted by key
