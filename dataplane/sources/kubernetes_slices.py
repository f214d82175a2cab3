"""The PolicyEndpoints of a cluster, of which one node needs few.

Only policies that select a pod of this node are decoded and reach the store. Which those are may
change with every pod, and slices of one policy arrive in any order: so of every slice is kept what
tells whom it selects, and its content compressed to some hundred bytes.
"""

from __future__ import annotations

import json
import struct
import zlib
from array import array
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from sys import intern
from typing import Any

from dataplane.addresses import parse_address
from dataplane.model import Key, PolicyEndpoint, Problem
from dataplane.sources import objects
from dataplane.sources.kubernetes_feed import Decoded, Outlet
from dataplane.sources.kubernetes_watch import Raw

# What is kept of an object's metadata: its managedFields are often larger than all the rest.
_METADATA = ("name", "namespace", "labels", "annotations")
_ANY_NODE = 0  # the token of a node that cannot be told
# Most of a small object is the names of its fields: a dictionary halves what zlib makes of it.
_WORDS = (
    b'"except": ["annotations": {"networking.k8s.aws/last-change-trigger-time": "2026-0T0:00Z"}, '
    b'{"metadata": {"name": "", "namespace": "default"}, "spec": {"podIsolation": ["Ingress", "Egress"], '
    b'"podSelector": {"matchLabels": {"app": ""}}, "podSelectorEndpoints": [{"hostIP": "10.0.", "name": "", '
    b'"namespace": "", "podIP": "10.0."}], "policyRef": {"name": "", "namespace": ""}, "egress": [], '
    b'"ingress": [{"cidr": "10.0.", "ports": [{"port": 80, "protocol": "TCP"}]}, {"cidr": "10.'
)


@dataclass(slots=True)
class _Slice:
    policy: Key
    tokens: bytes  # of each pod that it selects and of each of their nodes, 8 bytes each
    packed: bytes  # its JSON, compressed
    local: bool  # one of its tokens is ours


class Slices:
    """Receives every PolicyEndpoint and gives an outlet those of policies that select a local pod.

    Of these the endpoints on other nodes are left out.
    """

    def __init__(
        self, outlet: Outlet, on_event: Callable[[float | None], None] = lambda _changed_at: None
    ) -> None:
        """`on_event` is called when a slice that concerns this node has come or changed and is in the
        store, with its trigger time if it has one (seconds since the epoch)."""
        self._outlet = outlet
        self._on_event = on_event
        self._slices: dict[Key, _Slice] = {}
        self._members: dict[Key, tuple[Key, ...]] = {}  # policy → its slices
        self._unusable: set[Key] = set()  # their last good version, if any, is in `_slices`
        self._pods: frozenset[Key] = frozenset()
        self._node_ips: frozenset[bytes] = frozenset()
        self._tokens = frozenset((_ANY_NODE,))  # of these pods and this node
        self._listing: dict[Key, _Slice | tuple[Problem, ...]] = {}
        self.frozen = False  # deletions are not believed: all objects of the kind are being deleted

    def __contains__(self, policy: object) -> bool:
        """Whether a policy has a slice."""
        return policy in self._members

    def __len__(self) -> int:
        return len(self._slices)

    def locate(self, pods: Iterable[Key], node_ips: Iterable[bytes]) -> None:
        """The pods that are known to run here, and the addresses of this node."""
        self._pods, self._node_ips = frozenset(pods), frozenset(node_ips)
        before = self._tokens
        hosts = (hash(address) for address in self._node_ips)
        self._tokens = frozenset((_ANY_NODE, *map(hash, self._pods), *hosts))
        changed = [struct.pack("=q", token) for token in before ^ self._tokens]
        if not changed:
            return
        # Which slices have an endpoint here may be other than it was, and which endpoints those are.
        for key, each in list(self._slices.items()):
            if any(token in each.tokens for token in changed):
                self._apply(key, replace(each, local=self._is_local(each.tokens)))

    # --- from the watch -------------------------------------------------------------------------------

    def begin_list(self) -> None:
        self._listing = {}

    def listed(self, raw: Raw) -> None:
        self._listing[_key(raw)] = self._read(raw)

    def unlisted(self, raw: Raw) -> None:
        self._listing.pop(_key(raw), None)

    def end_list(self) -> None:
        listing, self._listing = self._listing, {}
        for key in (self._slices.keys() | self._unusable) - listing.keys():
            self._forget(key)
        for key, found in listing.items():
            self._take(key, found)

    def changed(self, raw: Raw) -> None:
        key = _key(raw)
        if self._take(key, self._read(raw)) and self._outlet.published:
            self._on_event(_changed_at(raw))

    def gone(self, raw: Raw) -> None:
        if not self.frozen:
            self._forget(_key(raw))

    # --- slices ---------------------------------------------------------------------------------------

    def _read(self, raw: Raw) -> _Slice | tuple[Problem, ...]:
        """A slice, or what is wrong with it when it is unusable as a whole."""
        spec: Any = raw.get("spec")
        try:
            reference, endpoints = spec["policyRef"], spec.get("podSelectorEndpoints") or ()
            policy = Key(intern(reference["namespace"]), intern(reference["name"]))
            tokens = array("q", {token for entry in endpoints for token in _tokens(entry)}).tobytes()
        except (TypeError, KeyError, AttributeError, ValueError):
            endpoint, problems = objects.policy_endpoint(raw, self._outlet.origin)
            if endpoint is None:
                return tuple(problems)
            # The checks above are stricter than the decoder's: it may select any pod.
            policy, tokens = endpoint.policy, array("q", (_ANY_NODE,)).tobytes()
        metadata = raw["metadata"]
        content = {"metadata": {name: metadata[name] for name in _METADATA if name in metadata}, "spec": spec}
        squeeze = zlib.compressobj(1, zlib.DEFLATED, -15, zdict=_WORDS)
        packed = squeeze.compress(json.dumps(content).encode()) + squeeze.flush()
        return _Slice(policy, tokens, packed, self._is_local(tokens))

    def _is_local(self, tokens: bytes) -> bool:
        own = array("q")
        own.frombytes(tokens)
        return not self._tokens.isdisjoint(own)

    def _take(self, key: Key, found: _Slice | tuple[Problem, ...]) -> bool:
        """Whether it concerns this node."""
        if not isinstance(found, _Slice):
            self._unusable.add(key)
            self._outlet.put(_name(key), None, found)
            return True
        self._unusable.discard(key)
        return self._apply(key, found)

    def _forget(self, key: Key) -> bool:
        if key in self._unusable:
            self._unusable.discard(key)
            self._outlet.delete(_name(key))
        return self._apply(key, None)

    def _apply(self, key: Key, new: _Slice | None) -> bool:
        """Put a slice in the place of another; whether either concerns this node."""
        old = self._slices.get(key)
        if old is not None and new is not None and old.packed == new.packed and not (old.local or new.local):
            return False
        policies = {each.policy for each in (old, new) if each is not None}
        before = {policy for policy in policies if self._relevant(policy)}
        self._replace(key, old, new)
        after = {policy for policy in policies if self._relevant(policy)}
        for policy in before - after:
            for member in self._members.get(policy, ()):
                self._outlet.delete(_name(member))
        if old is not None and old.policy in before and (new is None or new.policy not in after):
            self._outlet.delete(_name(key))
        for policy in after:
            for member in self._members[policy]:
                if policy not in before or member == key:
                    self._emit(member)
        return bool(before or after)

    def _replace(self, key: Key, old: _Slice | None, new: _Slice | None) -> None:
        if old is not None:
            rest = tuple(member for member in self._members[old.policy] if member != key)
            if rest:
                self._members[old.policy] = rest
            else:
                del self._members[old.policy]
            del self._slices[key]
        if new is not None:
            self._slices[key] = new
            self._members[new.policy] = (*self._members.get(new.policy, ()), key)

    def _relevant(self, policy: Key) -> bool:
        return any(self._slices[member].local for member in self._members.get(policy, ()))

    def _emit(self, key: Key) -> None:
        if key in self._unusable:
            return
        expand = zlib.decompressobj(-15, zdict=_WORDS)
        raw = json.loads(expand.decompress(self._slices[key].packed))
        self._outlet.put(_name(key), *self._decode(raw))

    def _decode(self, raw: object) -> Decoded:
        endpoint, problems = objects.policy_endpoint(raw, self._outlet.origin)
        if endpoint is not None:
            here = tuple(
                each
                for each in endpoint.endpoints
                if not each.host_ip or each.host_ip in self._node_ips or each.pod in self._pods
            )
            endpoint = replace(endpoint, endpoints=here)
        return endpoint, tuple(problems)


def _tokens(entry: Mapping[str, Any]) -> tuple[int, int]:
    """Of a pod and of its node. Numbers, because names would take most of an agent's memory."""
    try:
        host = hash(parse_address(entry["hostIP"]))
    except (ValueError, KeyError):
        host = _ANY_NODE
    return hash(Key(entry["namespace"], entry["name"])), host


def _key(raw: Raw) -> Key:
    metadata = raw["metadata"]
    return Key(intern(str(metadata.get("namespace"))), str(metadata.get("name")))


def _name(key: Key) -> str:
    return f"{PolicyEndpoint.__name__} {key}"


def _changed_at(raw: Raw) -> float | None:
    annotations = raw["metadata"].get("annotations")
    try:
        return objects.parse_time(annotations[objects.CHANGED_ANNOTATION])
    except (ValueError, TypeError, KeyError):
        return None
