"""Why an end of a packet is denied or allowed, in the terms of whoever wrote the policies.

The engine's verdict comes first and is never doubted: asked about a denied end, every candidate rule
gets a reason why it did not match; asked about an allowed one, the written rule that matched is named.
Where NetworkPolicies are known a candidate is one item of a rule's `from` or `to`; where only
PolicyEndpoints are, or where they say something else than the NetworkPolicy of their name, it is one
rule of theirs.

Sentences name neither pods nor the peer's address, so one answer serves all pods that policies cannot
tell apart; `Candidate.told` puts the names in.
"""

from __future__ import annotations

import enum
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from dataplane.addresses import Prefix, family_of
from dataplane.model import (
    PROTOCOL_NAMES,
    ContainerPort,
    Direction,
    IPBlock,
    Key,
    LabelSelector,
    NetworkPolicy,
    NetworkPolicyPeer,
    Operator,
    Pod,
    PortRange,
    Problem,
    Requirement,
    Snapshot,
)
from dataplane.policy.effective import DirectionRules, effective_rules, isolating_policies
from dataplane.policy.normalize import NAME_LABEL, NamedPort, PodPeer, normal_peer, normal_port, normalize
from dataplane.policy.resolve import in_force, namespace_labels, newest
from dataplane.policy.selectors import matches

SHOWN = 10  # candidates of one end that are told in full; the others are counted
_PORTS_SHOWN = 6
_FAILURES_SHOWN = 3  # requirements of one selector


class Miss(enum.StrEnum):
    """Why a candidate did not match, nearest miss first; MATCH: it did."""

    MATCH = "match"
    PORT = "port"  # the peer is right, the port is another
    PROTOCOL = "protocol"  # the peer is right, no port of this protocol
    NAMED_PORT = "named-port"  # the peer is right, the pod has no port of that name and protocol
    PROBLEM = "problem"  # could not be read, and was dropped
    EXCEPT = "except"  # inside the cidr, but inside an except too
    POD_LABELS = "pod-labels"
    NAMESPACE_LABELS = "namespace-labels"
    NAMESPACE = "namespace"  # no namespaceSelector, and the peer is in another namespace
    LABELS_UNKNOWN = "labels-unknown"  # a pod without a Pod object
    FINISHED = "finished"  # a finished pod owns no address
    NOT_A_POD = "not-a-pod"  # a selector, and the peer is no pod
    CIDR = "cidr"  # outside the cidr
    FAMILY = "family"  # IPv4 against IPv6
    NO_RULES = "no-rules"  # the policy has no rule in this direction


_RANK = {miss: rank for rank, miss in enumerate(Miss)}

_IN_SHORT = {
    Miss.MATCH: "match",
    Miss.PORT: "wrong port",
    Miss.PROTOCOL: "wrong protocol",
    Miss.NAMED_PORT: "no port of that name",
    Miss.PROBLEM: "cannot be used",
    Miss.EXCEPT: "inside except",
    Miss.POD_LABELS: "other pod labels",
    Miss.NAMESPACE_LABELS: "other namespace labels",
    Miss.NAMESPACE: "another namespace",
    Miss.LABELS_UNKNOWN: "labels unknown",
    Miss.FINISHED: "a finished pod",
    Miss.NOT_A_POD: "not a pod",
    Miss.CIDR: "address outside the cidr",
    Miss.FAMILY: "address of the other family",
    Miss.NO_RULES: "no rules",
}


class About(enum.Enum):
    """Whom a sentence begins with."""

    RULE = "rule"  # nobody: the sentence stands alone
    PEER = "peer"  # the pod at the other end
    ADDRESS = "address"  # the other end's address
    OWN = "own"  # the pod whose policies these are


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way a policy could have allowed the packet, and why it did not.

    `field` is the place in the policy's spec (`ingress[0].from[1]`), or the rule of its PolicyEndpoints
    (`ingress rule 17`, as `Rule.index` counts).
    """

    policy: Key
    direction: Direction
    field: str
    miss: Miss
    about: About
    text: str  # what is said of `about`
    near: bool = True  # only what `miss` says is missing; else port and peer both are

    @property
    def sentence(self) -> str:
        """The reason, for any pods that policies cannot tell apart from those that were asked about."""
        ingress = self.direction is Direction.INGRESS
        peer, own = ("the source", "the destination") if ingress else ("the destination", "the source")
        return self.told(peer, f"{peer}'s address", own)

    def told(self, peer: str, address: str, own: str) -> str:
        """The reason, with the names of the pod or address at the other end and of the pod at this end."""
        subject = {About.RULE: "", About.PEER: peer, About.ADDRESS: address, About.OWN: own}[self.about]
        return f"{subject} {self.text}" if subject else self.text

    @property
    def order(self) -> tuple[bool, bool, int]:
        """Nearest misses sort first; a policy without rules, which nothing was near to, last."""
        return (self.miss is Miss.NO_RULES, not self.near, _RANK[self.miss])


class Alike(NamedTuple):
    """Candidates that are only counted."""

    miss: Miss
    number: int

    @property
    def sentence(self) -> str:
        return f"and {self.number:,} more: {_IN_SHORT[self.miss]}"


@dataclass(frozen=True, slots=True)
class Why:
    """All that explains one denied end: its policies, their candidates nearest first, and how many more."""

    policies: tuple[Key, ...]
    candidates: tuple[Candidate, ...]
    more: tuple[Alike, ...] = ()


class _Seen(NamedTuple):
    """A pod as selectors and named ports see it. Equal for pods that no policy can tell apart."""

    namespace: str
    labels: tuple[tuple[str, str], ...]
    ports: tuple[ContainerPort, ...]
    host_network: bool


class _Peer(NamedTuple):
    """The other end: the live pods that have its address, or why there is none."""

    pods: tuple[_Seen, ...]
    absent: Miss = Miss.NOT_A_POD  # without pods: FINISHED, LABELS_UNKNOWN or NOT_A_POD


class _Packet(NamedTuple):
    protocol: int
    port: int

    def __str__(self) -> str:
        if self.protocol in (1, 58):
            return "ICMP"
        return str(PortRange(self.protocol, self.port, self.port))


@dataclass(frozen=True, slots=True)
class _Item:
    """One candidate before any packet: a peer (None: anybody; a Miss: unusable) and its rule's ports."""

    field: str
    peer: PodPeer | IPBlock | Miss | None
    ports: tuple[PortRange | NamedPort, ...]  # none: every port
    own_namespace: bool = False  # no namespaceSelector
    problem: str = ""  # of the item if it is unusable, else of an entry of its ports


# Blocks that hold an address: the item's index, and the narrowest except that holds it too.
Holding = tuple[tuple[int, Prefix | None], ...]


@dataclass(slots=True)
class _Part:
    """One policy's candidates in one direction; blocks are found by address without a walk."""

    policy: Key
    direction: Direction
    written: bool  # as NetworkPolicy, else as PolicyEndpoints
    items: list[_Item] = field(default_factory=list)
    others: list[int] = field(default_factory=list)  # items that are no blocks
    blocks: dict[int, list[int]] = field(default_factory=lambda: {4: [], 6: []})
    by_prefix: dict[int, dict[int, dict[int, list[int]]]] = field(default_factory=lambda: {4: {}, 6: {}})
    named: bool = False  # some item has a named port

    def add(self, item: _Item) -> None:
        index = len(self.items)
        self.items.append(item)
        self.named = self.named or any(isinstance(port, NamedPort) for port in item.ports)
        if not isinstance(item.peer, IPBlock):
            self.others.append(index)
            return
        cidr = item.peer.cidr
        self.blocks[cidr.family].append(index)
        shift = 8 * len(cidr.network) - cidr.length
        networks = self.by_prefix[cidr.family].setdefault(shift, {})
        networks.setdefault(int.from_bytes(cidr.network) >> shift, []).append(index)

    def holding(self, address: bytes) -> Holding:
        """The blocks whose cidr holds an address, in order, each with the except that holds it too."""
        number = int.from_bytes(address)
        found: list[int] = []
        for shift, networks in self.by_prefix[family_of(address)].items():
            found += networks.get(number >> shift, ())
        found.sort()
        return tuple([(index, _hole(self.items[index], address)) for index in found])


class Whys:
    """Answers about one state of the cluster; equal questions about equal pods are worked out once.

    `known`: the objects as they were read. `resolved`: the same with the PolicyEndpoints of their
    NetworkPolicies (`resolve.in_force`), which is made here when it is not given.
    """

    def __init__(self, known: Snapshot, resolved: Snapshot | None = None) -> None:
        self._resolved = in_force(known) if resolved is None else resolved
        self.rules = effective_rules(self._resolved, None)
        self._written = {policy.key: policy for policy in known.network_policies}
        self._pods = {pod.key: pod for pod in known.pods}
        self._namespaces = namespace_labels(known)
        self._claims: defaultdict[bytes, list[Pod]] = defaultdict(list)
        for pod in known.pods:
            for address in pod.ips:
                self._claims[address].append(pod)
        self._named = {  # addresses that PolicyEndpoints give to pods
            pod_ip
            for endpoint in self._resolved.policy_endpoints
            for _, pod_ip, host_ip in endpoint.endpoints
            if pod_ip and pod_ip != host_ip
        }
        self._isolating = isolating_policies(self._resolved)
        self._problems: defaultdict[str, list[Problem]] = defaultdict(list)
        for problem in self._resolved.problems:
            self._problems[problem.object].append(problem)
        self._objects: defaultdict[Key, list[str]] = defaultdict(list)  # PolicyEndpoints of a policy
        for endpoint in known.policy_endpoints:
            self._objects[endpoint.policy].append(f"PolicyEndpoint {endpoint.key}")
        self._peers: dict[bytes, _Peer] = {}
        self._seen: dict[Key, _Seen] = {}
        self._same: dict[_Seen, _Seen] = {}
        self._written_parts: dict[tuple[Key, Direction], _Part | None] = {}
        self._given_parts: dict[tuple[int, Key, Direction], _Part] = {}
        self._answers: dict[object, Why] = {}

    def policies(self, pod: Key, direction: Direction) -> tuple[Key, ...]:
        """The policies that isolate a pod in a direction, sorted; none for one that is not isolated."""
        return self._isolating[direction].get(pod, ())

    def holders(self, address: bytes) -> list[Pod]:
        """The live pods that have an address: several only where they share their host's network."""
        return newest([pod for pod in self._claims.get(address, ()) if not pod.finished])

    def unlabelled(self, address: bytes) -> bool:
        """Whether an address is a pod's of whom only PolicyEndpoints tell."""
        return self._peer(address).absent is Miss.LABELS_UNKNOWN

    def denied(
        self,
        pod: Key,
        direction: Direction,
        peer: bytes,
        protocol: int,
        port: int,
        shown: int | None = SHOWN,
    ) -> Why:
        """Why no rule of `pod` lets a packet pass that the engine denies at this end.

        `peer` is the other end's packed address, `protocol` the IP protocol number, `port` the
        destination port (0 for ICMP). `shown`: how many candidates are told, None for all of them.
        """
        policies = self.policies(pod, direction)
        parts = [self._part(policy, pod, direction) for policy in policies]
        holding = tuple([part.holding(peer) for part in parts])
        other = self._peer(peer)
        own = self._own(pod) if any(part.named for part in parts) else None
        rules = self.rules_of(pod, direction)
        key = (direction, policies, id(rules), other, holding, own, len(peer), protocol, port, shown)
        answer = self._answers.get(key)
        if answer is not None:
            return answer
        packet, common = _Packet(protocol, port), True
        candidates: list[Candidate] = []
        more: Counter[Miss] = Counter()
        for part, touched in zip(parts, holding, strict=True):
            told, counted = self._evaluate(part, touched, other, own, peer, packet, shown)
            if part.written and any(each.miss is Miss.MATCH for each in told):
                # The PolicyEndpoints in force say less than the NetworkPolicy: theirs is what counts.
                given = self._given(part.policy, rules, direction)
                told, counted = self._evaluate(given, given.holding(peer), other, own, peer, packet, shown)
                common = False  # theirs are addresses, which `key` does not hold
            candidates += told
            more += counted
        candidates.sort(key=lambda each: each.order)
        if shown is not None:
            more += Counter(each.miss for each in candidates[shown:])
            del candidates[shown:]
        alike = sorted(
            (Alike(miss, count) for miss, count in more.items()), key=lambda each: _RANK[each.miss]
        )
        answer = Why(policies, tuple(candidates), tuple(alike))
        if common:
            self._answers[key] = answer
        return answer

    def allowed(
        self, pod: Key, direction: Direction, peer: bytes, protocol: int, port: int, policy: Key, rule: int
    ) -> Candidate:
        """The written rule behind what the engine names: a policy, and the index of a rule."""
        part = self._part(policy, pod, direction)
        if part.written:
            touched, own = part.holding(peer), self._own(pod)
            packet = _Packet(protocol, port)
            told, _ = self._evaluate(part, touched, self._peer(peer), own, peer, packet, 0)
            for candidate in told:
                if candidate.miss is Miss.MATCH:
                    return candidate
        return Candidate(policy, direction, _place(direction, rule), Miss.MATCH, About.RULE, "matches")

    # --- the ends ---------------------------------------------------------------------------------------

    def rules_of(self, pod: Key, direction: Direction) -> DirectionRules | None:
        """What a pod's policies allow in a direction; None where it is not isolated, or not known."""
        rules = self.rules.get(pod)
        if rules is None:
            return None
        return rules.ingress if direction is Direction.INGRESS else rules.egress

    def _own(self, pod: Key) -> _Seen | None:
        known = self._pods.get(pod)
        return None if known is None else self._see(known)

    def _see(self, pod: Pod) -> _Seen:
        found = self._seen.get(pod.key)
        if found is None:
            labels = tuple(sorted(pod.labels.items()))
            found = _Seen(pod.key.namespace, labels, pod.ports, pod.host_network)
            found = self._seen[pod.key] = self._same.setdefault(found, found)
        return found

    def _peer(self, address: bytes) -> _Peer:
        found = self._peers.get(address)
        if found is None:
            live = self.holders(address)
            if live:
                found = _Peer(tuple(dict.fromkeys(self._see(pod) for pod in live)))
            elif address in self._claims:
                found = _Peer((), Miss.FINISHED)
            elif address in self._named:
                found = _Peer((), Miss.LABELS_UNKNOWN)
            else:
                found = _Peer(())
            self._peers[address] = found
        return found

    # --- the policies -----------------------------------------------------------------------------------

    def _part(self, policy: Key, pod: Key, direction: Direction) -> _Part:
        if (policy, direction) not in self._written_parts:
            written = self._written.get(policy)
            usable = written is not None and direction in normalize(written).isolates
            part = self._write(written, direction) if written is not None and usable else None
            self._written_parts[policy, direction] = part
        return self._written_parts[policy, direction] or self._given(
            policy, self.rules_of(pod, direction), direction
        )

    def _write(self, policy: NetworkPolicy, direction: Direction) -> _Part:
        part = _Part(policy.key, direction, written=True)
        ingress = direction is Direction.INGRESS
        problems = _by_place(self._problems.get(f"NetworkPolicy {policy.key}", ()))
        for number, rule in enumerate(policy.ingress if ingress else policy.egress):
            place = f"{direction}[{number}]"
            peers = f"{place}.{'from' if ingress else 'to'}"
            ports = tuple(normal_port(port) for port in rule.ports)
            bad_port = problems.get(f"spec.{place}.ports", "")
            if not rule.peers:
                part.add(_Item(place, None, ports, problem=bad_port))
            elif rule.peers == (NetworkPolicyPeer(),) and f"spec.{peers}[0]" not in problems:
                reason = problems.get(f"spec.{place}") or problems.get(f"spec.{direction}", "")
                part.add(_Item(place, Miss.PROBLEM, ports, problem=reason))
            else:
                for index, each in enumerate(rule.peers):
                    at = f"{peers}[{index}]"
                    found = normal_peer(each, policy.key)
                    reason = bad_port if found is not None else problems.get(f"spec.{at}", "")
                    own = each.namespace_selector is None
                    part.add(_Item(at, Miss.PROBLEM if found is None else found, ports, own, reason))
        if not part.items:
            part.add(_Item(str(direction), Miss.NO_RULES, ()))
        return part

    def _given(self, policy: Key, rules: DirectionRules | None, direction: Direction) -> _Part:
        key = (id(rules), policy, direction)  # `self.rules` keeps the rules alive
        part = self._given_parts.get(key)
        if part is None:
            part = self._given_parts[key] = _Part(policy, direction, written=False)
            for _, rule in (pair for pair in (rules.rules if rules else ()) if pair[0] == policy):
                part.add(_Item(_place(direction, rule.index), IPBlock(rule.cidr, rule.excepts), rule.ports))
            for name in self._objects.get(policy, ()):
                for problem in self._problems.get(name, ()):
                    if problem.field.startswith(f"spec.{direction}["):
                        at = f"{name.removeprefix('PolicyEndpoint ')} {problem.field.removeprefix('spec.')}"
                        part.add(_Item(at, Miss.PROBLEM, (), problem=problem.reason))
            if not part.items:
                part.add(_Item(str(direction), Miss.NO_RULES, ()))
        return part

    # --- one policy against one packet --------------------------------------------------------------------

    def _evaluate(
        self,
        part: _Part,
        touched: Holding,
        peer: _Peer,
        own: _Seen | None,
        address: bytes,
        packet: _Packet,
        shown: int | None,
    ) -> tuple[list[Candidate], Counter[Miss]]:
        """Its candidates, in the policy's order, and how many it only counts.

        Blocks that do not hold the address are told only as far as `shown` goes.
        """
        told = []
        for index in sorted({*part.others, *(index for index, _ in touched)}):
            told.append(self._candidate(part, part.items[index], peer, own, address, packet))
        more: Counter[Miss] = Counter()
        family = family_of(address)
        inside = {index for index, _ in touched}
        for blocks, miss in ((part.blocks[family], Miss.CIDR), (part.blocks[10 - family], Miss.FAMILY)):
            outside = len(blocks) - (len(inside) if miss is Miss.CIDR else 0)
            for index in blocks:
                if shown is not None and len(told) >= shown:
                    break
                if index not in inside:
                    told.append(self._candidate(part, part.items[index], peer, own, address, packet))
                    outside -= 1
            if outside:
                more[miss] += outside
        return told, more

    def _candidate(
        self, part: _Part, item: _Item, peer: _Peer, own: _Seen | None, address: bytes, packet: _Packet
    ) -> Candidate:
        def say(miss: Miss, about: About, text: str, *, near: bool = True) -> Candidate:
            return Candidate(part.policy, part.direction, item.field, miss, about, text, near)

        if item.peer is Miss.NO_RULES:
            they = "the policy has" if part.written else "its PolicyEndpoints have"
            return say(Miss.NO_RULES, About.RULE, f"{they} no {part.direction} rules: nothing is allowed")
        if item.peer is Miss.PROBLEM:
            return say(Miss.PROBLEM, About.RULE, f"cannot be used: {item.problem or 'it could not be read'}")
        ingress, by_address = part.direction is Direction.INGRESS, isinstance(item.peer, IPBlock)
        found: list[Candidate] = []
        for pod in (None,) if by_address else peer.pods or (None,):
            wrong = self._peer_miss(part.policy, item, pod, peer.absent, address)
            if ingress:
                ports = _port_miss(item, packet, own, About.OWN)
            else:
                ports = _port_miss(item, packet, pod, About.RULE if by_address else About.PEER)
            if wrong is not None and ports is not None:
                miss, about, text = wrong
                found.append(say(miss, about, f"{text}; the port does not match either", near=False))
            else:
                found.append(say(*(wrong or ports or (Miss.MATCH, About.RULE, "matches"))))
        return min(found, key=lambda each: each.order)

    def _peer_miss(
        self, policy: Key, item: _Item, pod: _Seen | None, absent: Miss, address: bytes
    ) -> _Missed | None:
        """Why an item does not mean the other end: `pod`, one of those that have its address, if any."""
        peer = item.peer
        if isinstance(peer, IPBlock):
            return _block_miss(peer, address)
        if not isinstance(peer, PodPeer):  # anybody
            return None
        if pod is None:
            return absent, About.ADDRESS, _ABSENT[absent]
        namespace = self._namespaces.get(pod.namespace, {})
        if not matches(peer.namespaces, namespace):
            if item.own_namespace:
                only = f"without namespaceSelector only namespace {policy.namespace} is meant"
                return Miss.NAMESPACE, About.PEER, f"is in namespace {pod.namespace}; {only}"
            failed = _failures(peer.namespaces, namespace)
            return Miss.NAMESPACE_LABELS, About.RULE, f"namespace {pod.namespace} {failed}"
        labels = dict(pod.labels)
        if not matches(peer.pods, labels):
            host = " (a pod on its host's network)" if pod.host_network else ""
            return Miss.POD_LABELS, About.PEER, _failures(peer.pods, labels) + host
        return None


_Missed = tuple[Miss, About, str]

_ABSENT = {
    Miss.NOT_A_POD: "is not a known pod's, and selectors match pods only",
    Miss.FINISHED: "was a finished pod's (Succeeded or Failed), which owns no address any more",
    Miss.LABELS_UNKNOWN: "is of a pod whose labels are not known here (there is no Pod object)",
}


def _place(direction: Direction, rule: int) -> str:
    return f"{direction} rule {rule}"


def _by_place(problems: Iterable[Problem]) -> dict[str, str]:
    """What is wrong with a field, or first in something in it, by the field's path."""
    found: dict[str, str] = {}
    for problem in problems:
        reason = f"{problem.field}: {problem.reason}"
        for index, character in enumerate(problem.field):
            if character in ".[":
                found.setdefault(problem.field[:index], reason)
        found.setdefault(problem.field, reason)
    return found


def _block_miss(block: IPBlock, address: bytes) -> _Missed | None:
    if address not in block.cidr:
        if len(block.cidr.network) != len(address):
            family = "an IPv4" if len(block.cidr.network) == 4 else "an IPv6"
            return Miss.FAMILY, About.ADDRESS, f"is not in {block.cidr}, {family} range"
        return Miss.CIDR, About.ADDRESS, f"is outside {block.cidr}"
    if (hole := _narrowest(block.excepts, address)) is not None:
        return Miss.EXCEPT, About.ADDRESS, f"is inside {block.cidr}, but also inside its except {hole}"
    return None


def _hole(item: _Item, address: bytes) -> Prefix | None:
    return _narrowest(item.peer.excepts, address) if isinstance(item.peer, IPBlock) else None


def _narrowest(prefixes: Iterable[Prefix], address: bytes) -> Prefix | None:
    holding = [prefix for prefix in prefixes if address in prefix]
    return max(holding, key=lambda prefix: prefix.length, default=None)


def _port_miss(item: _Item, packet: _Packet, holder: _Seen | None, whose: About) -> _Missed | None:
    """Why the ports of an item do not hold the packet's.

    `holder`: the pod whose names count, if any; `whose`: the end that it is, RULE where no pod's do.
    """
    if not item.ports:
        return None
    allows: list[str] = []
    protocols: set[int] = set()
    missing: list[NamedPort] = []
    for port in item.ports:
        if isinstance(port, NamedPort):
            found = _number(port, holder)
            if found is None:
                if port.protocol == packet.protocol:
                    missing.append(port)
                else:
                    allows.append(f"{port.name}/{PROTOCOL_NAMES[port.protocol]}")
                continue
            allows.append(f"{port.name} ({found})")
        else:
            found = port
            allows.append(str(port))
        if found.protocol == packet.protocol and found.first <= packet.port <= found.last:
            return None
        protocols.add(found.protocol)
    bad = f"; {item.problem}" if item.problem else ""
    if missing and packet.protocol not in protocols:
        names = ", ".join(port.name for port in missing)
        kind = PROTOCOL_NAMES.get(packet.protocol, str(packet.protocol))
        also = f"; besides, {_listed(allows)} is allowed" if allows else ""
        if whose is About.RULE:
            return (
                Miss.NAMED_PORT,
                About.RULE,
                f"named port {names}: names are looked up on pods, an ipBlock has none{also}{bad}",
            )
        if holder is None:
            text = f"is no pod that could have a {kind} port named {names}"
            return Miss.NAMED_PORT, whose, f"{text}{also}{bad}"
        has = (
            _listed([_container_port(port) for port in holder.ports]) if holder.ports else "no ports declared"
        )
        return Miss.NAMED_PORT, whose, f"has no {kind} port named {names} (it has {has}){also}{bad}"
    if packet.protocol in (1, 58):
        text = f"allows {_listed(allows)}, packet is ICMP: only a rule without ports lets ICMP pass{bad}"
        return Miss.PROTOCOL, About.RULE, f"wrong protocol: {text}"
    miss = Miss.PORT if packet.protocol in protocols else Miss.PROTOCOL
    names = "".join(f"; no port is named {port.name} there" for port in missing)
    return miss, About.RULE, f"wrong {miss}: allows {_listed(allows)}, packet is {packet}{names}{bad}"


def _number(port: NamedPort, holder: _Seen | None) -> PortRange | None:
    if holder is not None:
        for name, protocol, number in holder.ports:
            if (name, protocol) == port:
                return PortRange(protocol, number, number)
    return None


def _container_port(port: ContainerPort) -> str:
    number = str(PortRange(port.protocol, port.port, port.port))
    return f"{port.name} {number}" if port.name else number


def _listed(texts: Sequence[str]) -> str:
    rest = len(texts) - _PORTS_SHOWN
    if not texts:
        return "nothing"
    return ", ".join(texts[:_PORTS_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _failures(selector: LabelSelector, labels: dict[str, str]) -> str:
    """What the labels lack: `has no label tier (asked for: tier=front)`."""
    failed = [each for each in selector.requirements if not matches(LabelSelector((each,)), labels)]
    texts = [_failure(each, labels.get(each.key)) for each in failed[:_FAILURES_SHOWN]]
    rest = len(failed) - _FAILURES_SHOWN
    return ", and ".join(texts) + (f", and {rest} more" if rest > 0 else "")


def _failure(requirement: Requirement, value: str | None) -> str:
    key, operator, values = requirement
    match operator:
        case Operator.IN:
            if key == NAME_LABEL:
                return f"is not {' or '.join(values)}"
            wanted = f"{key}={values[0]}" if len(values) == 1 else f"{key} In ({_listed(values)})"
            if value is None:
                return f"has no label {key} (asked for: {wanted})"
            return f"has label {key}={value}, not {wanted}"
        case Operator.NOT_IN:
            return f"has label {key}={value}, which {key} NotIn ({_listed(values)}) leaves out"
        case Operator.EXISTS:
            return f"has no label {key} (asked for: {key} Exists)"
    return f"has label {key}={value}, and {key} DoesNotExist is asked for"
