"""The objects of a cluster, followed on its API server, in the store.

Which kinds are needed depends on who turns NetworkPolicies into PolicyEndpoints (`Resolve`). Where that
changes while we run (the CustomResourceDefinition is installed, or deleted), the kinds that are needed
from now on are listed first; then, in one step, they take the place of those that no longer are. In no
moment is less known than what is in force.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any

from dataplane.addresses import parse_address
from dataplane.config import PodNames, Resolve
from dataplane.errors import InputError
from dataplane.model import Key
from dataplane.sources import networkpolicy, objects
from dataplane.sources.fields import SUBDOMAIN
from dataplane.sources.kubernetes_client import ApiFault, ApiServer, Credentials
from dataplane.sources.kubernetes_feed import (
    Decoder,
    Outlet,
    PodOutlet,
    PodReducer,
    PolicyOutlet,
    needed_service,
    told_namespace,
)
from dataplane.sources.kubernetes_slices import Slices
from dataplane.sources.kubernetes_watch import Raw, Receiver, Resource, Timing, Watch
from dataplane.sources.store import Store

POLICY_ENDPOINTS = Resource("networking.k8s.aws", "v1alpha1", "policyendpoints")
NETWORK_POLICIES = Resource("networking.k8s.io", "v1", "networkpolicies")
PODS = Resource("", "v1", "pods")
NAMESPACES = Resource("", "v1", "namespaces")
SERVICES = Resource("", "v1", "services")
DEFINITIONS = Resource("apiextensions.k8s.io", "v1", "customresourcedefinitions")

UNMATCHED_SECONDS = 10.0  # a controller has this long to make a NetworkPolicy's PolicyEndpoint
DISCOVERY_SECONDS = 60.0  # between looks at what is served, where watching it is not allowed
NODE_SECONDS = 600.0  # between looks at our own Node
NODE_RETRY_SECONDS = 10.0
SHOWN_UNMATCHED = 20  # problems in `status`; the log has them all

_STAYS = "what was known last stays in force"


@dataclass(slots=True)
class _Feed:
    """One watch and where its objects go."""

    watch: Watch
    outlet: Outlet
    task: asyncio.Task[None]


class KubernetesSource:
    """Keeps `store` in step with a cluster. `run` it until cancelled; `wait_synced` is the gate.

    `problems` and `ready` say how it is. `watches`, `unmatched` and `switches` are there to be counted.
    """

    def __init__(
        self,
        credentials: Credentials,
        store: Store,
        *,
        node_name: str,
        node_ips: Iterable[bytes] = (),
        resolve: Resolve = Resolve.AUTO,
        pod_names: PodNames = PodNames.LOCAL,
        log: Any,
        on_trigger: Callable[[float | None], None] = lambda _changed_at: None,
        on_node_ips: Callable[[frozenset[bytes]], None] = lambda _addresses: None,
        timing: Timing | None = None,
    ) -> None:
        """InputError when `node_name` cannot be a Node's.

        `on_trigger`: see `Slices`. `on_node_ips` is called with the addresses of our own Node.
        """
        if not SUBDOMAIN.fullmatch(node_name):
            raise InputError(f"--node-name {node_name!r} is not a Kubernetes name")
        self._credentials = credentials
        self._api = ApiServer(credentials)
        self._store = store
        self._node_name = node_name
        self._given_ips = frozenset(node_ips)
        self._node_ips: frozenset[bytes] = frozenset()
        self._resolve = resolve
        self._pod_names = pod_names
        self._log = log
        self._on_trigger = on_trigger
        self._on_node_ips = on_node_ips
        self._timing = timing
        self._feeds: dict[str, _Feed] = {}
        self._slices: Slices | None = None
        self._definition = _Definition(self._wake_up)
        self._resolving = False  # NetworkPolicies are in force by our own resolution
        self._node_read = False  # or known that it cannot be
        self._node_problem: str | None = None
        self._node_missing = False
        self._reported: set[Key] = set()
        self._said: list[str] = []
        self._wake = asyncio.Event()
        self._synced = asyncio.Event()
        self.unmatched: tuple[Key, ...] = ()  # NetworkPolicies without a PolicyEndpoint, for too long
        self.switches = 0  # between resolving and PolicyEndpoints
        self._definitions = Watch(
            self._api,
            DEFINITIONS,
            self._definition,
            field_selector=f"metadata.name={POLICY_ENDPOINTS}",
            timing=replace(timing or Timing(), forbidden_retry=DISCOVERY_SECONDS),
            on_change=self._wake_up,
        )

    # --- how it is ------------------------------------------------------------------------------------

    @property
    def synced(self) -> bool:
        """Whether every kind that is needed has been listed once, and is in the store."""
        return self._synced.is_set()

    @property
    def ready(self) -> bool:
        """Whether the store shows the cluster as it is."""
        return self.synced and not self._node_missing and all(watch.problem is None for watch in self.watches)

    @property
    def resolving(self) -> bool:
        """Whether NetworkPolicies are resolved here."""
        return self._resolving

    @property
    def watches(self) -> tuple[Watch, ...]:
        """Of every kind that is followed now."""
        definitions = () if self._resolve is not Resolve.AUTO or self._polling else (self._definitions,)
        return (*definitions, *(feed.watch for feed in self._feeds.values()))

    @property
    def problems(self) -> list[str]:
        """What is in the way of knowing the cluster as it is, one line each."""
        found = self._faults()
        for policy in self.unmatched[:SHOWN_UNMATCHED]:
            found.append(f"NetworkPolicy {policy} has no PolicyEndpoint: {self._consequence}")
        if len(self.unmatched) > SHOWN_UNMATCHED:
            found.append(f"and {len(self.unmatched) - SHOWN_UNMATCHED} more without a PolicyEndpoint")
        return found

    @property
    def _consequence(self) -> str:
        if self._resolving:
            return "it is resolved here until there is one"
        return "it has no effect; is the controller that makes them at work?"

    def _faults(self) -> list[str]:
        """Of the watches and of our own Node; each once, though all kinds may share it."""
        stays = f"; {_STAYS}" if self.synced else ""
        found = [f"{watch.problem}{stays}" for watch in self.watches if watch.problem is not None]
        if self._polling and self._definition.problem:
            found.append(f"{self._definition.problem}{stays}")
        if self._node_problem is not None:
            found.append(self._node_problem)
        return list(dict.fromkeys(found))

    async def wait_synced(self) -> None:
        """Returns once everything is in the store that is needed to begin."""
        await self._synced.wait()

    # --- running --------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Follow the cluster until cancelled."""
        self._log.info("following the cluster", node=self._node_name, credentials=self._credentials.origin)
        tasks = [asyncio.create_task(part) for part in (self._read_node(), self._tick())]
        if self._resolve is Resolve.AUTO:
            tasks += [asyncio.create_task(part) for part in (self._definitions.run(), self._discover())]
        try:
            while True:
                self._wake.clear()
                self._steer()
                self._tell()
                wake = asyncio.create_task(self._wake.wait())
                running = [*tasks, *(feed.task for feed in self._feeds.values())]
                done, _ = await asyncio.wait([wake, *running], return_when=asyncio.FIRST_COMPLETED)
                wake.cancel()
                for task in done - {wake}:
                    task.result()  # none ends by itself: let its error out
        finally:
            running = [*tasks, *(feed.task for feed in self._feeds.values())]
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            await self._api.close()

    def _wake_up(self) -> None:
        self._wake.set()

    @property
    def _polling(self) -> bool:
        """We may not watch CustomResourceDefinitions, and look at what is served instead."""
        return self._definitions.refused == 403

    def _steer(self) -> None:
        """Open the feeds that are needed; once all of them are complete, close the others."""
        if self._slices is not None:
            self._slices.frozen = self._definition.deleting
        wanted = self._wanted()
        for name in wanted - self._feeds.keys():
            self._open(name)
        if not wanted or not self._node_read:
            return
        if not all(self._feeds[name].watch.synced for name in wanted):
            return
        for name in wanted:
            self._feeds[name].outlet.publish()
        for name in self._feeds.keys() - wanted:
            self._close(name)
        resolving = "networkpolicies" in wanted
        if not self.synced or resolving != self._resolving:
            self.switches += self.synced
            what = "NetworkPolicies are resolved here" if resolving else "PolicyEndpoints rule"
            self._log.info(f"{what} from now on" if self.synced else what)
        self._resolving = resolving
        self._synced.set()

    def _wanted(self) -> set[str]:
        """The feeds that are needed, by name. Empty: not to be told yet."""
        resolving = {"networkpolicies", "pods", "namespaces", "services"}
        pods = "local pods" if self._pod_names is PodNames.LOCAL else "pod names"
        match self._resolve:
            case Resolve.ALWAYS:
                return resolving
            case Resolve.NEVER:
                return {"policyendpoints", "policy names", "namespace modes", pods}
        if self._definition.served is None:
            return set()
        if not self._definition.served:
            return resolving
        # What we have resolved stays in force until its PolicyEndpoints are there: a controller that
        # has just been installed takes its time, and policies must not be without effect meanwhile.
        if self._resolving and (not self._listed("policyendpoints") or self._without_endpoints()):
            return {*resolving, "policyendpoints"}
        return {"policyendpoints", "policy names", "namespace modes", pods}

    def _listed(self, name: str) -> bool:
        return name in self._feeds and self._feeds[name].watch.synced

    def _open(self, name: str) -> None:
        receiver: Receiver
        selector = ""
        match name:
            case "policyendpoints":
                resource, outlet = POLICY_ENDPOINTS, Outlet(self._store, f"kubernetes {POLICY_ENDPOINTS}")
                self._slices = receiver = Slices(outlet, self._on_trigger)
                self._locate()
            case "networkpolicies" | "policy names":
                whole = name == "networkpolicies"
                resource = NETWORK_POLICIES
                outlet = PolicyOutlet(self._store, f"kubernetes {resource}")
                if whole:
                    receiver = Decoder(outlet, "NetworkPolicy", networkpolicy.network_policy)
                else:
                    receiver = Decoder(outlet, "NetworkPolicy", networkpolicy.policy_head)
            case "namespaces" | "namespace modes":
                resource, outlet = NAMESPACES, Outlet(self._store, f"kubernetes {NAMESPACES}")
                if name == "namespaces":
                    receiver = Decoder(outlet, "Namespace", networkpolicy.namespace)
                else:
                    receiver = Decoder(outlet, "Namespace", networkpolicy.namespace, told_namespace)
            case "services":
                resource, outlet = SERVICES, Outlet(self._store, f"kubernetes {SERVICES}")
                receiver = Decoder(outlet, "Service", networkpolicy.service, needed_service)
            case _:
                resource = PODS
                outlet = PodOutlet(self._store, f"kubernetes {PODS}", self._node_name, self._locate)
                reducer = PodReducer(self._node_name, names_only=name == "pod names")
                receiver = Decoder(outlet, "Pod", objects.pod, reducer)
                if name == "local pods":
                    selector = f"spec.nodeName={self._node_name}"
        watch = Watch(
            self._api,
            resource,
            receiver,
            field_selector=selector,
            timing=self._timing,
            on_change=self._wake_up,
        )
        self._feeds[name] = _Feed(watch, outlet, asyncio.create_task(watch.run()))

    def _close(self, name: str) -> None:
        feed = self._feeds.pop(name)
        feed.task.cancel()
        if name == "policyendpoints":
            self._slices = None
        if all(other.outlet.origin != feed.outlet.origin for other in self._feeds.values()):
            self._store.remove(feed.outlet.origin)

    # --- this node ------------------------------------------------------------------------------------

    def _locate(self) -> None:
        """Tell the slices which pods are here."""
        if self._slices is None:
            return
        local = [
            pod
            for feed in self._feeds.values()
            if isinstance(feed.outlet, PodOutlet)
            for pod in feed.outlet.local.values()
        ]
        hosts = {address for pod in local for address in pod.host_ips}
        self._slices.locate((pod.key for pod in local), self._given_ips | self._node_ips | hosts)

    async def _read_node(self) -> None:
        retry = 1.0
        while True:
            try:
                raw = await self._api.get(f"/api/v1/nodes/{self._node_name}", {})
                addresses = _node_addresses(raw)
                self._node_problem, self._node_missing = None, False
                wait, retry = NODE_SECONDS * random.uniform(0.8, 1.2), 1.0
                if addresses != self._node_ips:
                    self._node_ips = addresses
                    self._locate()
                    self._on_node_ips(addresses)
            except ApiFault as fault:
                wait, retry = retry * random.uniform(0.5, 1.0), min(retry * 2, NODE_RETRY_SECONDS)
                if fault.status not in (403, 404):
                    await asyncio.sleep(wait)  # no answer about the Node; the watches say why
                    continue
                self._node_missing = fault.status == 404
                self._node_problem = self._explain_node(fault)
            self._node_read = True
            self._wake_up()
            await asyncio.sleep(wait)

    def _explain_node(self, fault: ApiFault) -> str | None:
        if fault.status == 404:
            return f"the cluster has no Node {self._node_name}: --node-name must be the name of this node's"
        if self._given_ips:
            return None  # we were told what we would have read
        return (
            f"not allowed to get the Node {self._node_name}, so the addresses of this machine's links count: "
            'give our ClusterRole the rule apiGroups: [""], resources: ["nodes"], verbs: ["get"], '
            "or name the addresses with --node-ip"
        )

    # --- who resolves ---------------------------------------------------------------------------------

    async def _discover(self) -> None:
        """Look from time to time whether PolicyEndpoints are served, where that cannot be watched."""
        path = f"/apis/{POLICY_ENDPOINTS.group}/{POLICY_ENDPOINTS.version}"
        while True:
            if not self._polling:
                await asyncio.sleep(1.0)
                continue
            try:
                answer = await self._api.get(path, {})
                self._definition.discovered(is_listed(answer.get("resources")))
            except ApiFault as fault:
                if fault.status == 404:
                    self._definition.discovered(False)
                else:
                    self._definition.failed(str(fault))
            known = self._definition.problem is None
            await asyncio.sleep(DISCOVERY_SECONDS * random.uniform(0.5, 1.0) if known else 2.0)

    def _without_endpoints(self) -> list[Key]:
        """The NetworkPolicies that have no PolicyEndpoint."""
        slices = self._slices
        if slices is None or not self._listed("policyendpoints"):
            return []
        policies: Collection[Key] = ()
        for name in ("networkpolicies", "policy names"):
            if self._listed(name):
                outlet = self._feeds[name].outlet
                assert isinstance(outlet, PolicyOutlet)
                policies = outlet.policies
        return sorted(policy for policy in policies if policy not in slices)

    async def _tick(self) -> None:
        """Once a second: what becomes due by time alone."""
        looked_at: list[tuple[Resource, int, int]] = []
        # Since when: a policy that is being deleted may lose its PolicyEndpoint first, and that is no news.
        without: dict[Key, float] | None = None
        while True:
            await asyncio.sleep(1.0)
            now = [(watch.resource, watch.lists, watch.changes) for watch in self.watches]
            if without == {} and now == looked_at:
                continue  # thousands of policies, and nothing new about them
            looked_at, moment, before = now, time.monotonic(), without or {}
            without = {policy: before.get(policy, moment) for policy in self._without_endpoints()}
            latest = moment - UNMATCHED_SECONDS
            unmatched = [policy for policy, since in without.items() if since <= latest]
            self._report(unmatched if self.synced else [])
            if self._resolving and self._definition.served:
                self._wake_up()  # the last policy that we resolved may have its PolicyEndpoint by now

    def _report(self, unmatched: list[Key]) -> None:
        for policy in unmatched:
            if policy not in self._reported:
                self._log.warning(
                    "NetworkPolicy without PolicyEndpoint",
                    policy=str(policy),
                    seconds=UNMATCHED_SECONDS,
                    consequence=self._consequence,
                )
        self.unmatched, self._reported = tuple(unmatched), set(unmatched)

    def _tell(self) -> None:
        """Log what has come into the way of knowing the cluster, and when it is gone."""
        waiting = [f"waiting for the first list of {watch.resource}" for watch in self.watches]
        now = [fault for fault in self._faults() if fault.removesuffix(f"; {_STAYS}") not in waiting]
        for fault in now:
            if fault not in self._said:
                self._log.error("not in step with the cluster", problem=fault)
        if self._said and not now:
            self._log.info("in step with the cluster again")
        self._said = now


class _Definition:
    """Whether PolicyEndpoints are served: receives the one CustomResourceDefinition that says so."""

    def __init__(self, on_change: Callable[[], None]) -> None:
        self._on_change = on_change
        self._found: Raw | None = None
        self.served: bool | None = None  # None: not known yet
        self.deleting = False  # with all its objects
        self.problem: str | None = None  # of looking at it without a watch

    def begin_list(self) -> None:
        self._found = None

    def listed(self, raw: Raw) -> None:
        self._found = raw

    def unlisted(self, _raw: Raw) -> None:
        self._found = None

    def end_list(self) -> None:
        self._set(self._found)

    def changed(self, raw: Raw) -> None:
        self._set(raw)

    def gone(self, _raw: Raw) -> None:
        self._set(None)

    def discovered(self, served: bool) -> None:
        """What discovery says."""
        self.problem = None
        self.served = served
        self._on_change()

    def failed(self, problem: str) -> None:
        self.problem = problem
        self._on_change()

    def _set(self, raw: Raw | None) -> None:
        self.deleting = raw is not None and bool(raw["metadata"].get("deletionTimestamp"))
        self.served = raw is not None and not self.deleting and _is_served(raw)
        self._on_change()


def _is_served(definition: Raw) -> bool:
    """Whether our version is served and the API server has begun to."""
    try:
        versions = {each["name"]: each["served"] for each in definition["spec"]["versions"]}
        conditions = {each["type"]: each["status"] for each in definition["status"]["conditions"]}
    except (KeyError, TypeError):
        return False
    return versions.get(POLICY_ENDPOINTS.version) is True and conditions.get("Established") == "True"


def is_listed(resources: object) -> bool:
    """Whether PolicyEndpoints are among what the API server says its group has."""
    return isinstance(resources, list) and any(
        isinstance(each, dict) and each.get("name") == POLICY_ENDPOINTS.plural for each in resources
    )


def _node_addresses(node: Raw) -> frozenset[bytes]:
    """The IP addresses of a Node object; what cannot be read is left out."""
    status = node.get("status")
    entries = status.get("addresses") if isinstance(status, dict) else None
    found: set[bytes] = set()
    for entry in entries if isinstance(entries, list) else ():
        if isinstance(entry, dict) and entry.get("type") in ("InternalIP", "ExternalIP"):
            try:
                found.add(parse_address(entry.get("address")))
            except ValueError:
                continue
    return frozenset(found)
