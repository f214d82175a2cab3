"""The pods that policies are about: which run on this node, what selects each, whose each address is.

Where Pod objects are known they are the truth about a pod's addresses and node; a PolicyEndpoint
only says which policies select it. A PolicyEndpoint may lag behind: it can still name a pod that is
gone, with an address that another pod has by now.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from dataplane.model import Key, Pod, PodEndpoint, PolicyEndpoint

# A policy, or the part of it that holds for one group of pods (see PolicyEndpoint.port_group).
Group = tuple[Key, str | None]

_NEVER = float("-inf")


def group_of(slice_: PolicyEndpoint) -> Group:
    """The group that a PolicyEndpoint is a slice of."""
    return slice_.policy, slice_.port_group


class Subject(NamedTuple):
    """A pod of this node: the groups that select it, its packed addresses, its Pod object if it has one.

    `addresses` are sorted, IPv4 first. An address belongs to the newest live claimant: a live Pod
    object beats what a PolicyEndpoint says; among Pod objects the newest counts, among
    PolicyEndpoints the one whose change began last; ties fall to the greater name.
    """

    groups: frozenset[Group]
    addresses: tuple[bytes, ...]
    object: Pod | None


class _Mention(NamedTuple):
    """One PolicyEndpoint's word about one pod."""

    group: Group
    since: float  # when that PolicyEndpoint's change began
    endpoint: PodEndpoint


class Subjects:
    """Every pod that objects name, on whatever node, kept as objects come and go.

    `node_ips` are the packed addresses of the node asked about; None means every node.
    """

    def __init__(self, node_ips: frozenset[bytes] | None) -> None:
        self._node_ips = node_ips
        self._objects: dict[Key, Pod] = {}
        self._mentions: defaultdict[Key, list[_Mention]] = defaultdict(list)
        self._claims: dict[Key, frozenset[bytes]] = {}
        self._claimants: defaultdict[bytes, set[Key]] = defaultdict(set)

    def update(
        self,
        slices: tuple[Iterable[PolicyEndpoint], Iterable[PolicyEndpoint]],
        pods: tuple[Iterable[Pod], Iterable[Pod]],
    ) -> set[Key]:
        """Take up what went and what came, of each kind; the pods that `find` may see otherwise now."""
        changed = {pod.key for side in pods for pod in side}
        for pod in pods[0]:
            del self._objects[pod.key]
        for pod in pods[1]:
            self._objects[pod.key] = pod
        # Most endpoints of a changed slice are what they were.
        gone, come = (Counter(mention for each in side for mention in _mentions(each)) for side in slices)
        for mention in (gone - come).elements():
            self._mentions[mention.endpoint.pod].remove(mention)
            changed.add(mention.endpoint.pod)
        for mention in (come - gone).elements():
            self._mentions[mention.endpoint.pod].append(mention)
            changed.add(mention.endpoint.pod)
        touched = {address for pod in changed for address in self._claim(pod)}
        return changed.union(*(self._claimants[address] for address in touched if address in self._claimants))

    def find(self, pod: Key) -> Subject | None:
        """The pod as policies see it; None when it is not of this node, gone, or in its host's network."""
        known = self._objects.get(pod)
        if known is not None and (known.finished or known.host_network):
            return None
        groups = frozenset(
            [
                group
                for group, _, endpoint in self._mentions.get(pod, ())
                if not self._of_host(endpoint) and self._is_local(known, endpoint)
            ]
        )
        if not groups and (known is None or not self._runs_here(known)):
            return None
        own = [address for address in self._claims.get(pod, ()) if self._owner(address) == pod]
        own.sort(key=lambda address: (len(address), address))
        return Subject(groups, tuple(own), known)

    def _runs_here(self, known: Pod) -> bool:
        return self._node_ips is None or not self._node_ips.isdisjoint(known.host_ips)

    def _is_local(self, known: Pod | None, endpoint: PodEndpoint) -> bool:
        if self._node_ips is None:
            return True
        if known is not None and known.host_ips:
            return self._runs_here(known)
        # An unreadable hostIP must not take the pod out of isolation on the node where it runs; on the
        # other nodes no interface of that pod will be found.
        return not endpoint.host_ip or endpoint.host_ip in self._node_ips

    def _of_host(self, endpoint: PodEndpoint) -> bool:
        """Whether the pod shares its node's address (hostNetwork): never a policy subject."""
        if not endpoint.pod_ip:
            return False
        # The node's second family shows in `node_ips` only: hostIP has one address.
        return endpoint.pod_ip == endpoint.host_ip or (
            self._node_ips is not None and endpoint.pod_ip in self._node_ips
        )

    # --- whose each address is ------------------------------------------------------------------------

    def _claim(self, pod: Key) -> frozenset[bytes]:
        """Bring the pod's claims up to date; the addresses it claimed, and claims."""
        before, now = self._claims.pop(pod, frozenset()), self._claimed(pod)
        if now:
            self._claims[pod] = now
        for address in now - before:
            self._claimants[address].add(pod)
        for address in before - now:
            claimants = self._claimants[address]
            claimants.remove(pod)
            if not claimants:
                del self._claimants[address]
        if not self._mentions.get(pod, True):
            del self._mentions[pod]
        return before | now

    def _claimed(self, pod: Key) -> frozenset[bytes]:
        known = self._objects.get(pod)
        if known is not None:
            if known.finished or known.host_network:
                return frozenset()
            if known.ips:
                return frozenset(known.ips)
        return frozenset(
            [
                endpoint.pod_ip
                for _, _, endpoint in self._mentions.get(pod, ())
                if endpoint.pod_ip and not self._of_host(endpoint)
            ]
        )

    def _owner(self, address: bytes) -> Key:
        claimants = self._claimants[address]
        if len(claimants) == 1:
            return next(iter(claimants))
        return max(claimants, key=lambda pod: self._rank(pod, address))

    def _rank(self, pod: Key, address: bytes) -> tuple[bool, float, str, Key]:
        known = self._objects.get(pod)
        if known is not None and known.ips:
            return True, _NEVER if known.created_at is None else known.created_at, known.uid, pod
        since = max(each.since for each in self._mentions[pod] if each.endpoint.pod_ip == address)
        return False, since, "", pod


def _mentions(slice_: PolicyEndpoint) -> set[_Mention]:
    group = group_of(slice_)
    since = _NEVER if slice_.changed_at is None else slice_.changed_at
    return {_Mention(group, since, endpoint) for endpoint in slice_.endpoints}
