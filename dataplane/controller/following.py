"""What PolicyEndpoints are made of, followed in the whole cluster: policies, pods, namespaces, Services."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from dataplane.model import Key
from dataplane.sources import networkpolicy, objects
from dataplane.sources.kubernetes import NAMESPACES, NETWORK_POLICIES, PODS, SERVICES
from dataplane.sources.kubernetes_client import ApiServer
from dataplane.sources.kubernetes_feed import Decoder, Outlet, PodReducer, PolicyOutlet, needed_service
from dataplane.sources.kubernetes_watch import Receiver, Resource, Timing, Watch
from dataplane.sources.store import Store


class Following:
    """Keeps `store` in step with a cluster, from the first moment on at which all kinds have been listed."""

    def __init__(
        self, api: ApiServer, store: Store, on_change: Callable[[], None], timing: Timing | None = None
    ) -> None:
        """`on_change` is called when a kind has been listed, and when a problem comes or goes."""
        self._policies = PolicyOutlet(store, f"kubernetes {NETWORK_POLICIES}")
        pods = Outlet(store, f"kubernetes {PODS}")
        namespaces = Outlet(store, f"kubernetes {NAMESPACES}")
        services = Outlet(store, f"kubernetes {SERVICES}")
        self._outlets = (self._policies, pods, namespaces, services)
        nowhere = PodReducer("", names_only=False)  # no pod is ours: of each only what policies can match
        kinds: tuple[tuple[Resource, Receiver], ...] = (
            (NETWORK_POLICIES, Decoder(self._policies, "NetworkPolicy", networkpolicy.network_policy)),
            (PODS, Decoder(pods, "Pod", objects.pod, nowhere)),
            (NAMESPACES, Decoder(namespaces, "Namespace", networkpolicy.namespace)),
            (SERVICES, Decoder(services, "Service", networkpolicy.service, needed_service)),
        )
        self.watches = tuple(
            Watch(api, resource, receiver, timing=timing, on_change=on_change) for resource, receiver in kinds
        )

    @property
    def synced(self) -> bool:
        """Whether every kind has been listed."""
        return all(watch.synced for watch in self.watches)

    def publish(self) -> None:
        """Let the store have it. Once all is listed: half of the pods would make half of the rules."""
        for outlet in self._outlets:
            outlet.publish()

    def exists(self, policy: Key) -> bool:
        """Whether the cluster has this NetworkPolicy, readable or not."""
        return policy in self._policies.policies

    async def run(self) -> None:
        """Follow until cancelled."""
        tasks = [asyncio.create_task(watch.run()) for watch in self.watches]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
