"""From the objects and links known now to what the kernel and the engine must hold: pure, no I/O.

A plan depends on the present alone, never on history. `touched` compares two plans to tell which
live flows a change concerns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from dataplane.addresses import Prefix
from dataplane.config import AgentConfig, Mode
from dataplane.model import Direction, Key, Pod, Snapshot
from dataplane.node.interfaces import (
    Kind,
    LinkState,
    Placement,
    branch_uplink,
    local_service_addresses,
    locate,
    lookalikes,
    named_links,
    own_node_addresses,
    problems,
)
from dataplane.node.steering import SteeredPod
from dataplane.policy.compile import PodEntry
from dataplane.policy.effective import DirectionRules, Effective, PodRules, changed_pods

# Which of the pods known here somebody means, now and whenever they change.
Choice = Callable[[Iterable[Key]], frozenset[Key]]
_Claim = tuple[tuple[bytes, ...], float]

NOTHING = DirectionRules(())  # isolated, and no rule allows anything
ANNOTATION_SPOOF_CHECK = "podgate.dev/spoof-check"  # "off" on pods that route for others


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that one change puts in force; equal plans need no change.

    `entries` and `own_node` are what the table is compiled from. `pods`: every known pod of this node,
    `isolated` of them isolated. `placements`: those whose interface is there; `waiting`: isolated pods
    whose interface is not (yet). `services`: local service addresses. `not_pods`: links that only look
    like a pod's. `audited`: pods with a direction that is isolated, and in audit. `watched`: addresses
    of which every packet is looked at, judged or not; `hooked`: addresses whose packets a user's hook gets.
    """

    entries: tuple[PodEntry, ...]
    own_node: frozenset[bytes]
    pods: dict[Key, PodRules]
    isolated: int
    placements: dict[Key, Placement]
    steered: tuple[SteeredPod, ...]
    services: frozenset[Prefix]
    not_pods: frozenset[str]
    waiting: tuple[Key, ...]
    policies: int
    problems: tuple[str, ...]
    audited: int = 0
    watched: frozenset[bytes] = frozenset()
    hooked: frozenset[bytes] = frozenset()

    def addresses_of(self, choices: Iterable[Choice]) -> frozenset[bytes]:
        """The addresses of the pods with an interface that any of `choices` means."""
        pods = frozenset[Key]().union(*(choice(self.placements) for choice in choices))
        return frozenset(address for key in pods for address in self.pods[key].addresses)


def node_addresses(config: AgentConfig, state: LinkState) -> frozenset[bytes]:
    """The addresses by which objects name this node: --node-ip, else those of its links."""
    return frozenset(config.node_ips) or own_node_addresses(state)


def make_plan(config: AgentConfig, snapshot: Snapshot, state: LinkState) -> Plan:
    """What is to be in force for these objects on these links."""
    return Planner().plan(config, snapshot, state)


class Planner:
    """Makes plans for one snapshot after another; what it remembers of the last one only saves work."""

    def __init__(self) -> None:
        self._effective: Effective | None = None
        self._places: Places | None = None
        self._config: AgentConfig | None = None
        self._sides: dict[Key, tuple[PodRules, PodEntry, SteeredPod]] = {}  # of the last plan

    def plan(self, config: AgentConfig, snapshot: Snapshot, state: LinkState) -> Plan:
        """See `make_plan`."""
        node_ips = node_addresses(config, state)
        if self._effective is None or self._effective.node_ips != node_ips:
            self._effective = Effective(node_ips)
        pods = self._effective.update(snapshot)
        claims = {key: _claim(pod) for key, pod in pods.items()}
        places = self._places
        if places is None or not places.hold(claims, state, config.veth_prefix):
            places = Places(pods, claims, state, config.veth_prefix)
        before = self._sides if config is self._config and places is self._places else {}
        self._places, self._config, self._sides = places, config, {}
        for key in places.placements:
            pod, known = pods[key], before.get(key)
            if known is None or known[0] is not pod:
                known = (pod, *_sides(config, places, pod))
            self._sides[key] = known
        isolated = [key for key, pod in pods.items() if pod.isolated]
        entries = tuple(entry for _, entry, _ in self._sides.values())
        return Plan(
            entries=entries,
            own_node=node_ips | places.own_node,
            pods=pods,
            isolated=len(isolated),
            placements=places.placements,
            steered=tuple(steered for _, _, steered in self._sides.values()),
            services=places.services,
            not_pods=places.not_pods,
            waiting=tuple(key for key in isolated if key not in places.placements),
            policies=self._effective.policies,
            audited=sum(bool(entry.audit & _isolated_in(entry)) for entry in entries if entry.audit),
            # Not only the links tell: sysctls may have changed.
            problems=tuple(problems(state, places.placements.values(), strict=config.mode is Mode.STRICT)),
        )


class Places:
    """What the links tell of a node's pods: which interface and which addresses are whose.

    Of the pods it takes only what they claim (see `_claim`): rules may change under the same places.
    """

    def __init__(
        self, pods: Mapping[Key, PodRules], claims: dict[Key, _Claim], state: LinkState, veth_prefix: str
    ) -> None:
        self._made_of = (claims, veth_prefix)
        self._state = state
        placements = place(pods, state, veth_prefix)
        owners = address_owners(pods, placements, state)
        self.placements = dict(sorted(placements.items()))
        self.own_addresses = {
            key: tuple(address for address in pods[key].addresses if owners[address] == key)
            for key in self.placements
        }
        self.uplinks = {
            key: branch_uplink(placement, pods[key].addresses, state)
            for key, placement in self.placements.items()
        }
        self.own_node = own_node_addresses(state)
        self.services = local_service_addresses(state)
        self.not_pods = lookalikes(state, veth_prefix)

    def hold(self, claims: dict[Key, _Claim], state: LinkState, veth_prefix: str) -> bool:
        """Whether these are the places of such pods on such links too."""
        return self._state is state and self._made_of == (claims, veth_prefix)


def _claim(pod: PodRules) -> _Claim:
    """What a pod's claim to an interface depends on: its addresses, and how new it is."""
    return pod.addresses, pod.object.created_at or 0.0 if pod.object is not None else -1.0


def _sides(config: AgentConfig, places: Places, pod: PodRules) -> tuple[PodEntry, SteeredPod]:
    """What the engine, and what the kernel's rules, must know of one pod."""
    placement, own = places.placements[pod.pod], places.own_addresses[pod.pod]
    # Strict mode: a pod is isolated both ways before, and besides, what policies say of it.
    default = NOTHING if config.mode is Mode.STRICT or (pod.object and pod.object.strict) else None
    ingress = pod.ingress or default
    egress = pod.egress or default
    # Strict mode isolates by itself, and is not in audit because a policy is.
    audit = frozenset(Direction) if config.audit else pod.audit if default is None else frozenset()
    spoof_check = config.spoof_check and not _routes_for_others(pod.object)
    entry = PodEntry(
        key=pod.pod,
        addresses=own,
        devices=(placement.ifindex,),
        ingress=ingress,
        egress=egress,
        spoof_check=spoof_check,
        branch=placement.kind is Kind.BRANCH,
        bridge=placement.bridge_ifindex,
        uplink=places.uplinks[pod.pod],
        audit=audit,
        ingress_policies=pod.ingress_policies,
        egress_policies=pod.egress_policies,
    )
    steered = SteeredPod(
        key=pod.pod,
        placement=placement,
        addresses=own,
        egress=egress is not None,
        ingress=ingress is not None,
        spoof_check=spoof_check,
    )
    return entry, steered


def _isolated_in(entry: PodEntry) -> set[Direction]:
    sides = ((Direction.INGRESS, entry.ingress), (Direction.EGRESS, entry.egress))
    return {direction for direction, rules in sides if rules is not None}


def _routes_for_others(pod: Pod | None) -> bool:
    return pod is not None and pod.annotations.get(ANNOTATION_SPOOF_CHECK) == "off"


def place(pods: Mapping[Key, PodRules], state: LinkState, veth_prefix: str) -> dict[Key, Placement]:
    """The interface of every pod that has one here; no two pods have the same.

    While an address passes from one pod to the next, objects of both may name it. An interface belongs
    to the pod whose name it carries, else to the newest live Pod object, else to the pod that policies
    name last: never to none, which would leave it open.
    """
    names: dict[int, Key] = {}
    for key in pods:
        names.update(dict.fromkeys(named_links(key, state, veth_prefix), key))
    claims: dict[int, list[tuple[bool, float, Key, Placement]]] = {}
    for key, pod in pods.items():
        placement = locate(key, pod.addresses, state, veth_prefix, names)  # its own name's link stays its own
        if placement is not None:
            named = names.get(placement.ifindex) == key
            claims.setdefault(placement.ifindex, []).append((named, _claim(pod)[1], key, placement))
    winners = (max(claimants, key=lambda claim: claim[:3]) for claimants in claims.values())
    return {key: placement for _, _, key, placement in sorted(winners, key=lambda claim: claim[2])}


def address_owners(
    pods: Mapping[Key, PodRules], placements: Mapping[Key, Placement], state: LinkState
) -> dict[bytes, Key]:
    """The one pod that has each address: where its route leads, else the one on the newest interface."""
    claims: dict[bytes, list[tuple[bool, int, Key]]] = {}
    for key, placement in placements.items():
        for address in pods[key].addresses:
            routed = any(
                route.ifindex == placement.ifindex for route in state.routes_by_address.get(address, ())
            )
            claims.setdefault(address, []).append((routed, placement.ifindex, key))
    return {address: max(claimants)[2] for address, claimants in claims.items()}


def touched(old: Plan | None, new: Plan) -> tuple[set[bytes], set[bytes]]:
    """Addresses whose flows lose their bits at once, and those whose flows are judged again.

    The first: a pod, its interface or its address came or went, or isolation began. A flow's bits
    may then stand for somebody else's verdict (an address used again), or for none.
    """
    renewed: set[bytes] = set()
    rejudged: set[bytes] = set()
    old_placements = old.placements if old else {}
    old_pods = old.pods if old else {}
    for key in old_placements.keys() | new.placements.keys():
        before = old_pods[key].addresses if key in old_pods else ()
        now = new.pods[key].addresses if key in new.pods else ()
        if old_placements.get(key) != new.placements.get(key) or before != now:
            renewed.update(before, now)
    for key in changed_pods(old_pods, new.pods):
        was, is_ = old_pods.get(key), new.pods.get(key)
        both = {*(was.addresses if was else ()), *(is_.addresses if is_ else ())}
        begins = is_ is not None and (
            (is_.ingress is not None and (was is None or was.ingress is None))
            or (is_.egress is not None and (was is None or was.egress is None))
        )
        (renewed if begins else rejudged).update(both)
    return renewed, rejudged - renewed
