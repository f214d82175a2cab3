"""NetworkPolicies → the PolicyEndpoints that enforce them.

What a selector says becomes addresses and port numbers: pods are found, named ports looked up on
the pods that have them, Services named by their ClusterIPs. The result depends on the objects
alone: equal snapshots give equal PolicyEndpoints, whatever was resolved before.

Where pods that a policy selects resolve a named port differently, one set of rules cannot serve
them all; the policy is then written once per group of equal pods (`PolicyEndpoint.port_group`).

A rule whose `to` is empty means any address, and an address has no named ports. Its named ports are
those of the pods, in any namespace, that have a port of that name and protocol: Kubernetes' own
conformance tests ask for it ("allow egress access on one named port"). It opens nothing but pods that
declare the port, at the number they declare; no such pod, nothing is opened. An `ipBlock` stays an
address, and its named ports are left out.

A PolicyEndpoint holds at most MAX_ENTRIES pods and as many rules per direction. Longer lists are
cut where an entry's own hash says so, not at every 200th: an entry more or less then changes one or
two objects, not all that follow.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import NamedTuple, TypeVar
from zlib import crc32

from dataplane.addresses import BITS, Prefix
from dataplane.model import (
    EVERYTHING,
    ContainerPort,
    IPBlock,
    Key,
    LabelSelector,
    Namespace,
    NetworkPolicy,
    Pod,
    PodEndpoint,
    PolicyEndpoint,
    PortRange,
    Rule,
    Service,
    Snapshot,
)
from dataplane.policy.changes import differences
from dataplane.policy.normalize import NAME_LABEL, NamedPort, NormalPolicy, NormalRule, PodPeer, normalize
from dataplane.policy.selectors import LabelIndex, matches, narrowest

MAX_ENTRIES = 200  # per list of one object
_MIN_ENTRIES = 64  # a list is not cut into pieces shorter than this …
_CUT = 96  # … and then after one entry in so many, on average

_ANYBODY = (Prefix(bytes(4), 0), Prefix(bytes(16), 0))
_ALPHABET = "bcdfghjklmnpqrstvwxz2456789"  # of generated names in Kubernetes: no vowels, no words
_GENERATED_BASE = 53  # characters of the policy's name that a generated name keeps, of 63 in all
_NEVER = float("-inf")

_T = TypeVar("_T")
_KEY = attrgetter("key")

# A rule without its place in the list.
Entry = tuple[Prefix, tuple[Prefix, ...], tuple[PortRange, ...]]


class View(NamedTuple):
    """A pod as policies see it: live, with the addresses that are its own."""

    key: Key
    labels: dict[str, str]
    addresses: tuple[Prefix, ...]  # none when every address has gone to a newer pod
    ports: tuple[ContainerPort, ...]
    host_network: bool
    endpoints: tuple[PodEndpoint, ...]  # as policies that select it name it

    def number(self, port: NamedPort) -> PortRange | None:
        """What a named port means on this pod; the first container that has it counts."""
        for name, protocol, number in self.ports:
            if name == port.name and protocol == port.protocol:
                return PortRange(protocol, number, number)
        return None


def policy_endpoints(snapshot: Snapshot) -> tuple[PolicyEndpoint, ...]:
    """The PolicyEndpoints of every NetworkPolicy that has none among the objects, sorted by key."""
    return Resolver().update(snapshot)


def in_force(snapshot: Snapshot, resolver: Resolver | None = None) -> Snapshot:
    """`snapshot` with every PolicyEndpoint that counts: those given, and those of all other NetworkPolicies.

    PolicyEndpoints that are given win over the NetworkPolicy they name. With a `resolver` that has
    seen earlier snapshots, only what changed since is resolved again.
    """
    made = (resolver or Resolver()).update(snapshot)
    if not made:
        return snapshot
    if snapshot.policy_endpoints:
        made = tuple(sorted((*snapshot.policy_endpoints, *made), key=_KEY))
    return replace(snapshot, policy_endpoints=made)


@dataclass(eq=False, slots=True)
class _Query:
    """The pods of some namespaces that a selector matches, kept as pods come and go.

    With a `port`, only those that have a port of that name.
    """

    namespaces: frozenset[str]
    selector: LabelSelector
    port: NamedPort | None
    members: dict[Key, View] = field(default_factory=dict)
    users: set[Key] = field(default_factory=set)  # policies that depend on it
    _sorted: tuple[View, ...] | None = None
    # Many policies name the same peers: what they look like as entries is worked out once.
    _entries: dict[tuple[PortRange, ...], list[Entry]] = field(default_factory=dict)

    def wants(self, view: View) -> bool:
        """Whether the pod is to be a member."""
        return (
            view.key.namespace in self.namespaces
            and matches(self.selector, view.labels)
            and (self.port is None or view.number(self.port) is not None)
        )

    def changed(self) -> None:
        """Its members are others, or look different."""
        self._sorted = None
        self._entries.clear()

    def views(self) -> tuple[View, ...]:
        """The members, sorted by name."""
        if self._sorted is None:
            self._sorted = tuple([self.members[key] for key in sorted(self.members)])
        return self._sorted

    def entries(self, ports: tuple[PortRange, ...]) -> list[Entry]:
        """All members' addresses with these ports, sorted."""
        found = self._entries.get(ports)
        if found is None:
            found = [(address, (), ports) for view in self.members.values() for address in view.addresses]
            found.sort()
            self._entries[ports] = found
        return found

    def numbered(self) -> list[Entry]:
        """All members' addresses with the number that `port` has on each."""
        assert self.port is not None
        return [
            (address, (), (number,))
            for view in self.members.values()
            if (number := view.number(self.port)) is not None
            for address in view.addresses
        ]

    def tokens(self) -> list[tuple[str | None, str, str]]:
        """What a pod must have one of to be a member: a namespace (None: any), a label and its value.

        No label's name is empty: without one the value is the name of a port.
        """
        if self.port is not None:
            return [(None, "", self.port.name)]
        namespace = next(iter(self.namespaces)) if len(self.namespaces) == 1 else None
        required = narrowest(self.selector)
        if required is None:
            return [(namespace, "", "")]
        return [(namespace, required.key, value) for value in required.values]


class Resolver:
    """Resolves one snapshot after another and keeps what it can: indexes, and policies that did not change.

    A pod's change resolves only the policies that select it or have it as a peer. A change of the
    namespaces or Services resolves everything again.
    """

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._namespaces: dict[str, dict[str, str]] = {}
        self._namespace_objects: tuple[Namespace, ...] = ()
        self._services: tuple[Service, ...] = ()
        self._services_of: defaultdict[str, list[Service]] = defaultdict(list)
        self._known: tuple[Pod, ...] = ()
        self._given: tuple[PolicyEndpoint, ...] = ()
        self._slices_given: Counter[Key] = Counter()  # how many PolicyEndpoints there are, by policy
        self._pods: dict[Key, Pod] = {}
        self._claims: defaultdict[bytes, set[Key]] = defaultdict(set)
        self._views: dict[Key, View] = {}
        self._index: LabelIndex[View] = LabelIndex()
        self._policies: dict[Key, NetworkPolicy] = {}
        self._normal: dict[Key, NormalPolicy] = {}
        self._queries: dict[tuple[frozenset[str], LabelSelector, NamedPort | None], _Query] = {}
        self._by_token: defaultdict[tuple[str | None, str, str], list[_Query]] = defaultdict(list)
        self._used: defaultdict[Key, list[_Query]] = defaultdict(list)
        self._selected_namespaces: dict[LabelSelector, frozenset[str]] = {}
        self._made: dict[Key, tuple[PolicyEndpoint, ...]] = {}

    @property
    def made(self) -> Mapping[Key, tuple[PolicyEndpoint, ...]]:
        """The PolicyEndpoints that the last update returned, by NetworkPolicy; at least one of each."""
        return self._made

    def update(self, snapshot: Snapshot) -> tuple[PolicyEndpoint, ...]:
        """The PolicyEndpoints of the NetworkPolicies in `snapshot` that have none there, sorted by key."""
        if not snapshot.network_policies and not self._policies:
            return ()  # what else changed counts from the first policy on
        gone, come = differences(self._known, snapshot.pods)
        # A namespace that nothing is in any more may stay: no selector finds anything there.
        if (
            snapshot.namespaces != self._namespace_objects
            or snapshot.services != self._services
            or not self._namespaces.keys() >= _used_namespaces(come, snapshot.network_policies)
        ):
            self._forget()
            gone, come = [], list(snapshot.pods)
            self._namespaces = namespace_labels(snapshot)
            self._namespace_objects = snapshot.namespaces
            self._services = snapshot.services
            for service in snapshot.services:
                if service.selector and service.cluster_ips:
                    self._services_of[service.key.namespace].append(service)
        self._known = snapshot.pods
        self._count_given(snapshot.policy_endpoints)
        policies = {
            policy.key: policy for policy in snapshot.network_policies if policy.key not in self._slices_given
        }
        dirty: set[Key] = set()
        for changed in self._take_pods(gone, come):
            dirty |= self._spread(*changed)
        for key in self._policies.keys() - policies.keys():
            self._forget_unused(self._release(key))
            del self._normal[key], self._made[key]
        for key, policy in policies.items():
            known = self._policies.get(key)
            if known is not policy and known != policy:
                self._normal[key] = normalize(policy)
                dirty.add(key)
        self._policies = policies
        for key in sorted(dirty & policies.keys()):
            before = self._release(key)
            self._made[key] = self._resolve(self._normal[key])
            self._forget_unused(before)
        made = [endpoint for endpoints in self._made.values() for endpoint in endpoints]
        made.sort(key=_KEY)
        return tuple(made)

    def _count_given(self, endpoints: tuple[PolicyEndpoint, ...]) -> None:
        gone, come = differences(self._given, endpoints)
        self._given = endpoints
        self._slices_given.update([endpoint.policy for endpoint in come])
        for endpoint in gone:
            self._slices_given[endpoint.policy] -= 1
            if not self._slices_given[endpoint.policy]:
                del self._slices_given[endpoint.policy]

    # --- pods -----------------------------------------------------------------------------------------

    def _take_pods(self, gone: list[Pod], come: list[Pod]) -> list[tuple[View | None, View | None]]:
        """Take up changes of pods; what each changed one looked like, and looks like."""
        affected: set[Key] = set()  # whose view may change
        touched: set[bytes] = set()  # addresses whose claimants changed
        for pod in gone:
            affected.add(pod.key)
            touched.update(self._claim(pod, claim=False))
            del self._pods[pod.key]
        for pod in come:
            affected.add(pod.key)
            touched.update(self._claim(pod, claim=True))
            self._pods[pod.key] = pod
        for address in touched:
            affected |= self._claims.get(address, set())
        owners: dict[bytes, Key] = {}
        changes: list[tuple[View | None, View | None]] = []
        for key in sorted(affected):
            before = self._views.get(key)
            after = self._view(self._pods[key], owners) if key in self._pods else None
            if before == after:
                continue
            if before is not None:
                self._index.remove(before)
                del self._views[key]
            if after is not None:
                self._index.add(after)
                self._views[key] = after
            changes.append((before, after))
        return changes

    def _claim(self, pod: Pod, *, claim: bool) -> tuple[bytes, ...]:
        if pod.finished:
            return ()
        for address in pod.ips:
            claimants = self._claims[address]
            if claim:
                claimants.add(pod.key)
            else:
                claimants.discard(pod.key)
                if not claimants:
                    del self._claims[address]
        return pod.ips

    def _view(self, pod: Pod, owners: dict[bytes, Key]) -> View | None:
        if pod.finished or not pod.ips:
            return None
        own = [address for address in pod.ips if self._owns(pod, address, owners)]
        own.sort(key=lambda address: (len(address), address))
        return View(
            pod.key,
            dict(pod.labels),
            tuple(Prefix(address, BITS[len(address)]) for address in own),
            pod.ports,
            pod.host_network,
            _endpoints(pod, own),
        )

    def _owns(self, pod: Pod, address: bytes, owners: dict[bytes, Key]) -> bool:
        """Whether `pod` is the newest live pod with `address`; pods on their host's network share it."""
        if address not in owners:
            owners[address] = max(self._claims[address], key=lambda key: _age(self._pods[key]))
        owner = owners[address]
        return owner == pod.key or (pod.host_network and self._pods[owner].host_network)

    def _spread(self, before: View | None, after: View | None) -> set[Key]:
        """Bring the queries up to date with one pod's change; the policies it concerns."""
        dirty: set[Key] = set()
        seen: set[int] = set()
        for view in (before, after):
            if view is None:
                continue
            namespace = view.key.namespace
            tokens: list[tuple[str | None, str, str]] = [(namespace, "", ""), (None, "", "")]
            for name, value in view.labels.items():
                tokens += ((namespace, name, value), (None, name, value))
            tokens += {(None, "", port.name) for port in view.ports if port.name}
            for token in tokens:
                for query in self._by_token.get(token, ()):
                    if id(query) in seen:
                        continue
                    seen.add(id(query))
                    key = view.key
                    was = key in query.members
                    is_ = after is not None and query.wants(after)
                    if is_ and after is not None:
                        query.members[key] = after
                    elif was:
                        del query.members[key]
                    if was or is_:
                        query.changed()
                        dirty |= query.users
        return dirty

    # --- policies -------------------------------------------------------------------------------------

    def _release(self, policy: Key) -> list[_Query]:
        """`policy` depends on nothing any more; what it depended on, to be forgotten if it still does not."""
        queries = self._used.pop(policy, [])
        for query in queries:
            query.users.discard(policy)
        return queries

    def _forget_unused(self, queries: Iterable[_Query]) -> None:
        for query in queries:
            if not query.users:
                del self._queries[query.namespaces, query.selector, query.port]
                for token in query.tokens():
                    self._by_token[token].remove(query)
                    if not self._by_token[token]:
                        del self._by_token[token]

    def _select(
        self, policy: Key, namespaces: frozenset[str], selector: LabelSelector, port: NamedPort | None = None
    ) -> _Query:
        """The pods a selector matches (and that have a port); from now on `policy` depends on them."""
        query = self._queries.get((namespaces, selector, port))
        if query is None:
            query = self._queries[namespaces, selector, port] = _Query(namespaces, selector, port)
            found = self._index.select(namespaces, selector)
            query.members = {view.key: view for view in found if port is None or query.wants(view)}
            for token in query.tokens():
                self._by_token[token].append(query)
        if policy not in query.users:
            query.users.add(policy)
            self._used[policy].append(query)
        return query

    def _namespaces_of(self, selector: LabelSelector) -> frozenset[str]:
        found = self._selected_namespaces.get(selector)
        if found is None:
            found = frozenset(name for name, labels in self._namespaces.items() if matches(selector, labels))
            self._selected_namespaces[selector] = found
        return found

    def _resolve(self, policy: NormalPolicy) -> tuple[PolicyEndpoint, ...]:
        selected = [
            view
            for view in self._select(policy.key, frozenset((policy.key.namespace,)), policy.pods).views()
            if not view.host_network
        ]
        egress = _places(entry for rule in policy.egress for entry in self._egress(policy.key, rule))
        names = sorted({name for rule in policy.ingress for name in rule.names})
        groups: defaultdict[tuple[PortRange | None, ...], list[View]] = defaultdict(list)
        for view in selected:
            groups[tuple([view.number(name) for name in names])].append(view)
        if not groups:
            groups[tuple(None for _ in names)] = []
        made: list[PolicyEndpoint] = []
        for numbers, views in groups.items():
            group = None if len(groups) == 1 else _group_label(names, numbers)
            known = dict(zip(names, numbers, strict=True))
            ingress = _places(
                entry
                for rule in policy.ingress
                if (ports := _numbers(rule, known.get)) is not None
                for entry in self._ingress(policy.key, rule, ports)
            )
            made += _slices(
                policy, group, [each for view in views for each in view.endpoints], ingress, egress
            )
        return tuple(made)

    def _ingress(self, policy: Key, rule: NormalRule, ports: tuple[PortRange, ...]) -> Iterable[Entry]:
        if rule.peers is None:
            return [(cidr, (), ports) for cidr in _ANYBODY]
        entries: list[Entry] = []
        for peer in rule.peers:
            if isinstance(peer, IPBlock):
                entries.append((peer.cidr, peer.excepts, ports))
            else:
                query = self._select(policy, self._namespaces_of(peer.namespaces), peer.pods)
                entries += query.entries(ports)
        return entries

    def _egress(self, policy: Key, rule: NormalRule) -> Iterable[Entry]:
        # Addresses have no named ports: what is left are the numbers, and without any, nothing.
        plain = _numbers(rule, lambda _: None)
        if rule.peers is None:
            anybody: list[Entry] = [(cidr, (), plain) for cidr in _ANYBODY] if plain is not None else []
            return anybody + self._any_pod(policy, rule)
        entries: list[Entry] = []
        for peer in rule.peers:
            if isinstance(peer, IPBlock):
                if plain is not None:
                    entries.append((peer.cidr, peer.excepts, plain))
                continue
            namespaces = self._namespaces_of(peer.namespaces)
            query = self._select(policy, namespaces, peer.pods)
            if not rule.names:
                if plain is not None:
                    entries += query.entries(plain)
            else:
                for view in query.views():
                    ports = _numbers(rule, view.number)
                    if ports is not None:
                        entries += [(address, (), ports) for address in view.addresses]
            entries += self._cluster_ips(policy, namespaces, peer, rule)
        return entries

    def _any_pod(self, policy: Key, rule: NormalRule) -> list[Entry]:
        """Whatever pod has a port that `rule`, with any peer, names."""
        everywhere = self._namespaces_of(EVERYTHING)
        entries: list[Entry] = []
        for name in rule.names:
            entries += self._select(policy, everywhere, EVERYTHING, name).numbered()
        if entries:
            peer = PodPeer(EVERYTHING, EVERYTHING)
            entries += self._cluster_ips(policy, everywhere, peer, rule._replace(numbers=()))
        return entries

    def _cluster_ips(
        self, policy: Key, namespaces: frozenset[str], peer: PodPeer, rule: NormalRule
    ) -> Iterable[Entry]:
        """The ClusterIPs of Services in front of the peer's pods, with the ports that lead there."""
        if not self._services_of:
            return
        for namespace in sorted(namespaces):
            for service in self._services_of.get(namespace, ()):
                if not matches(peer.pods, service.selector):
                    continue
                ports = () if rule.every_port else self._service_ports(policy, service, rule)
                if ports or rule.every_port:
                    for address in service.cluster_ips:
                        yield Prefix(address, BITS[len(address)]), (), ports

    def _service_ports(self, policy: Key, service: Service, rule: NormalRule) -> tuple[PortRange, ...]:
        allowed: set[PortRange] = set()
        for protocol, port, target in service.ports:
            if isinstance(target, int) and _holds(rule.numbers, protocol, target):
                allowed.add(PortRange(protocol, port, port))
                continue
            if isinstance(target, str) and NamedPort(target, protocol) in rule.names:
                allowed.add(PortRange(protocol, port, port))
                continue
            # A name against a number: it depends on the pods behind the Service. All of them must be
            # allowed at theirs, since nobody knows which one a packet will reach.
            backends = self._backends(policy, service)
            reached = [_target(view, protocol, target) for view in backends]
            numbers = [(view, number) for view, number in zip(backends, reached, strict=True) if number]
            if numbers and all(
                _holds(_numbers(rule, view.number) or (), protocol, number) for view, number in numbers
            ):
                allowed.add(PortRange(protocol, port, port))
        return tuple(sorted(allowed))

    def _backends(self, policy: Key, service: Service) -> tuple[View, ...]:
        return self._select(
            policy, frozenset((service.key.namespace,)), LabelSelector.of(service.selector)
        ).views()


def _target(view: View, protocol: int, target: int | str) -> int | None:
    if isinstance(target, int):
        return target
    found = view.number(NamedPort(target, protocol))
    return None if found is None else found.first


def _holds(ranges: Iterable[PortRange], protocol: int, number: int) -> bool:
    return any(each.protocol == protocol and each.first <= number <= each.last for each in ranges)


def newest(pods: Collection[Pod]) -> list[Pod]:
    """Whose an address is, of the live pods that have it: the newest one's.

    Pods on their host's network share theirs.
    """
    if len(pods) <= 1:
        return list(pods)
    owner = max(pods, key=_age)
    return [pod for pod in pods if pod is owner or (pod.host_network and owner.host_network)]


def _age(pod: Pod) -> tuple[float, str, Key]:
    return (_NEVER if pod.created_at is None else pod.created_at, pod.uid, pod.key)


def _used_namespaces(pods: Iterable[Pod], policies: Iterable[NetworkPolicy]) -> set[str]:
    return {pod.key.namespace for pod in pods} | {policy.key.namespace for policy in policies}


def namespace_labels(snapshot: Snapshot) -> dict[str, dict[str, str]]:
    """Labels by namespace; one without an object that a pod, policy or Service is in has its name's."""
    names = _used_namespaces(snapshot.pods, snapshot.network_policies)
    names.update(service.key.namespace for service in snapshot.services)
    namespaces = {name: {NAME_LABEL: name} for name in sorted(names)}
    for namespace in snapshot.namespaces:
        namespaces[namespace.name] = {**namespace.labels, NAME_LABEL: namespace.name}
    return namespaces


def _numbers(
    rule: NormalRule, look_up: Callable[[NamedPort], PortRange | None]
) -> tuple[PortRange, ...] | None:
    """The ports of `rule` as numbers, () for every port. None: no port is left, the rule allows nothing."""
    if rule.every_port:
        return ()
    if not rule.names:
        return rule.numbers or None
    found = {number for name in rule.names if (number := look_up(name)) is not None}
    return tuple(sorted(found.union(rule.numbers))) or None


def _endpoints(pod: Pod, addresses: Iterable[bytes]) -> tuple[PodEndpoint, ...]:
    hosts = {len(address): address for address in reversed(pod.host_ips)}  # the first of each family
    any_host = pod.host_ips[0] if pod.host_ips else b""
    named = tuple(PodEndpoint(pod.key, address, hosts.get(len(address), any_host)) for address in addresses)
    # When its addresses have gone to newer pods it stays selected by its name, so that it is not
    # opened; an address must not be named, or the newer pod would inherit the policy.
    return named or (PodEndpoint(pod.key, b"", any_host),)


def _places(entries: Iterable[Entry]) -> list[Entry]:
    return sorted(set(entries))


def _group_label(names: Sequence[NamedPort], numbers: Sequence[PortRange | None]) -> str:
    """The same for the same ports, whatever other groups there are."""
    text = ",".join(f"{name.name}/{number}" for name, number in zip(names, numbers, strict=True))
    return f"g-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _slices(
    policy: NormalPolicy,
    group: str | None,
    endpoints: Sequence[PodEndpoint],
    ingress: Sequence[Entry],
    egress: Sequence[Entry],
) -> list[PolicyEndpoint]:
    pods, incoming, outgoing = _cut(endpoints), _cut(ingress), _cut(egress)
    stem = _generated(policy.key, group)
    return [
        PolicyEndpoint(
            key=Key(policy.key.namespace, f"{stem}{_ordinal(index)}"),
            policy=policy.key,
            isolates=policy.isolates,
            endpoints=tuple(pods[index]) if index < len(pods) else (),
            ingress=_rules(incoming[index]) if index < len(incoming) else (),
            egress=_rules(outgoing[index]) if index < len(outgoing) else (),
            port_group=group,
        )
        for index in range(max(1, len(pods), len(incoming), len(outgoing)))
    ]


def _rules(entries: Iterable[Entry]) -> tuple[Rule, ...]:
    return tuple([Rule(cidr, excepts, ports, index) for index, (cidr, excepts, ports) in enumerate(entries)])


def _cut(entries: Sequence[_T]) -> list[Sequence[_T]]:
    """Pieces of at most MAX_ENTRIES, cut where the entries themselves say so."""
    if len(entries) <= MAX_ENTRIES:
        return [entries] if entries else []
    pieces: list[Sequence[_T]] = []
    start = 0
    for index, entry in enumerate(entries, 1):
        length = index - start
        if length >= MAX_ENTRIES or (length >= _MIN_ENTRIES and crc32(repr(entry).encode()) % _CUT == 0):
            pieces.append(entries[start:index])
            start = index
    if start < len(entries):
        pieces.append(entries[start:])
    return pieces


def _generated(policy: Key, group: str | None) -> str:
    """`<policy>-` and seven letters by which policies, and groups of one, tell apart."""
    digest = int.from_bytes(hashlib.sha256(f"{policy}/{group or ''}".encode()).digest()[:8])
    base = policy.name[:_GENERATED_BASE].rstrip("-.")
    return f"{base}-{_letters(digest, 7)}"


def _ordinal(index: int) -> str:
    # Two letters hold 729 slices; further ones are longer, and the alphabet's last letter keeps them apart.
    limit = len(_ALPHABET) ** 2 - len(_ALPHABET)
    return _letters(index, 2) if index < limit else _ALPHABET[-1] + _letters(index, 6)


def _letters(number: int, count: int) -> str:
    letters = []
    for _ in range(count):
        number, rest = divmod(number, len(_ALPHABET))
        letters.append(_ALPHABET[rest])
    return "".join(reversed(letters))
