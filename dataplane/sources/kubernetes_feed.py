"""From objects as the API server sends them to the store: decoded, reduced, and published when complete.

Before `Outlet.publish` nothing reaches the store: an agent that has half of what it needs must not act.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from sys import intern
from typing import Any, TypeVar

from dataplane.model import ANNOTATION_MODE, Key, Namespace, Pod, PolicyHead, Problem, Service
from dataplane.sources.fields import identity as name_of
from dataplane.sources.kubernetes_watch import Raw
from dataplane.sources.store import KubernetesObject, Store

# An object, None when it is there but unusable, and what is wrong with it.
Decoded = tuple[KubernetesObject | None, tuple[Problem, ...]]
Reader = Callable[[object, str], tuple[KubernetesObject | None, list[Problem]]]
_T = TypeVar("_T")


class Outlet:
    """One origin of the store, which learns of it only from `publish` on."""

    def __init__(self, store: Store, origin: str) -> None:
        self.origin = origin
        self._store = store
        self._waiting: dict[str, Decoded] | None = {}

    @property
    def published(self) -> bool:
        return self._waiting is None

    def publish(self) -> None:
        """Everything so far, in one step, instead of what the origin held before."""
        if self._waiting is not None:
            waiting, self._waiting = self._waiting, None
            self._replace(waiting)

    def replace(self, everything: dict[str, Decoded]) -> None:
        """All objects, by identity."""
        if self._waiting is not None:
            self._waiting = everything
        else:
            self._replace(everything)

    def _replace(self, everything: dict[str, Decoded]) -> None:
        items = [item for item, _ in everything.values() if item is not None]
        problems = [problem for _, found in everything.values() for problem in found]
        self._store.replace(self.origin, items, problems)

    def put(self, name: str, item: KubernetesObject | None, problems: tuple[Problem, ...] = ()) -> None:
        """One object, by its identity."""
        if self._waiting is not None:
            self._waiting[name] = (item, problems)
        else:
            self._store.put(self.origin, name, item, problems)

    def delete(self, name: str) -> None:
        if self._waiting is not None:
            self._waiting.pop(name, None)
        else:
            self._store.delete(self.origin, name)


class PodOutlet(Outlet):
    """Knows besides which pods run on the node `node`."""

    def __init__(self, store: Store, origin: str, node: str, on_local: Callable[[], None]) -> None:
        """`on_local` is called when these pods, or the addresses of their node, have changed."""
        super().__init__(store, origin)
        self.local: dict[str, Pod] = {}
        self._node = node
        self._on_local = on_local

    def replace(self, everything: dict[str, Decoded]) -> None:
        super().replace(everything)
        local = {
            name: item
            for name, (item, _) in everything.items()
            if isinstance(item, Pod) and item.node_name == self._node
        }
        if local != self.local:
            self.local = local
            self._on_local()

    def put(self, name: str, item: KubernetesObject | None, problems: tuple[Problem, ...] = ()) -> None:
        super().put(name, item, problems)
        if isinstance(item, Pod) and item.node_name == self._node:
            before = self.local.get(name)
            self.local[name] = item
            if before is None or before.host_ips != item.host_ips:
                self._on_local()

    def delete(self, name: str) -> None:
        super().delete(name)
        if self.local.pop(name, None) is not None:
            self._on_local()


class PolicyOutlet(Outlet):
    """Knows besides which NetworkPolicies there are.

    Of heads the store gets only those that say something.
    """

    def __init__(self, store: Store, origin: str) -> None:
        super().__init__(store, origin)
        self.policies: set[Key] = set()

    def replace(self, everything: dict[str, Decoded]) -> None:
        self.policies = set(map(_policy_key, everything))
        super().replace({name: decoded for name, decoded in everything.items() if _says(*decoded)})

    def put(self, name: str, item: KubernetesObject | None, problems: tuple[Problem, ...] = ()) -> None:
        self.policies.add(_policy_key(name))
        if _says(item, problems):
            super().put(name, item, problems)
        else:
            super().delete(name)

    def delete(self, name: str) -> None:
        self.policies.discard(_policy_key(name))
        super().delete(name)


class Decoder:
    """Receives the objects of one kind and gives an outlet what is left of them after `reduce`.

    `reduce` returns None for an object that nothing needs.
    """

    def __init__(
        self,
        outlet: Outlet,
        kind: str,
        read: Reader,
        reduce: Callable[[Any], KubernetesObject | None] = lambda item: item,
    ) -> None:
        self._outlet = outlet
        self._kind = kind
        self._read = read
        self._reduce = reduce
        self._listing: dict[str, Decoded] = {}

    def begin_list(self) -> None:
        self._listing = {}

    def listed(self, raw: Raw) -> None:
        name, decoded = self._decode(raw)
        if decoded is not None:
            self._listing[name] = decoded

    def unlisted(self, raw: Raw) -> None:
        self._listing.pop(name_of(self._kind, raw), None)

    def end_list(self) -> None:
        listing, self._listing = self._listing, {}
        self._outlet.replace(listing)

    def changed(self, raw: Raw) -> None:
        name, decoded = self._decode(raw)
        if decoded is None:
            self._outlet.delete(name)
        else:
            self._outlet.put(name, *decoded)

    def gone(self, raw: Raw) -> None:
        self._outlet.delete(name_of(self._kind, raw))

    def _decode(self, raw: Raw) -> tuple[str, Decoded | None]:
        item, problems = self._read(raw, self._outlet.origin)
        if item is None:
            return name_of(self._kind, raw), (None, tuple(problems))
        kept = self._reduce(item)
        return name_of(self._kind, raw), None if kept is None else (kept, tuple(problems))


class PodReducer:
    """Pods as far as a node needs them: its own whole, of the others what a policy can match.

    Pods of one workload share their labels and ports. `names_only`: of the others nothing but their
    names and addresses, for showing them.
    """

    def __init__(self, node: str, *, names_only: bool) -> None:
        self._node = node
        self._names_only = names_only
        self._shared: dict[object, Any] = {}

    def __call__(self, pod: Pod) -> Pod | None:
        if pod.node_name == self._node:
            return pod
        if pod.finished or not pod.ips:
            return None  # it has no address, or no longer has it
        return replace(
            pod,
            key=Key(intern(pod.key.namespace), pod.key.name),
            node_name=pod.node_name and intern(pod.node_name),
            host_ips=self._share(pod.host_ips, pod.host_ips),
            labels={} if self._names_only else self._share(frozenset(pod.labels.items()), pod.labels),
            annotations={},
            ports=() if self._names_only else self._share(pod.ports, pod.ports),
        )

    def _share(self, content: object, value: _T) -> _T:
        if len(self._shared) > 100_000:  # labels of workloads that are long gone
            self._shared.clear()
        shared: _T = self._shared.setdefault(content, value)
        return shared


def needed_service(service: Service) -> Service | None:
    """A Service that a policy can mean: one with a selector and an address."""
    return service if service.selector and service.cluster_ips else None


def told_namespace(namespace: Namespace) -> Namespace | None:
    """A Namespace that says whether its policies are in audit."""
    return namespace if ANNOTATION_MODE in namespace.annotations else None


def _says(item: KubernetesObject | None, problems: tuple[Problem, ...]) -> bool:
    return not isinstance(item, PolicyHead) or bool(item.annotations) or bool(problems)


def _policy_key(name: str) -> Key:
    namespace, _, rest = name.removeprefix("NetworkPolicy ").partition("/")
    return Key(namespace, rest)
