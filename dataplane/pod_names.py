"""The pods that addresses belong to, as far as this agent knows them."""

from __future__ import annotations

from collections.abc import Mapping

from dataplane.config import PodNames
from dataplane.enforcement import Enforcement
from dataplane.model import Key, Pod
from dataplane.plan import Plan


class NamesByAddress:
    """This node's pods by packed address, and with `--pod-names cluster` all others. Call it for now's."""

    def __init__(self, enforcement: Enforcement) -> None:
        self._enforcement = enforcement
        self._made_of: tuple[Plan | None, tuple[Pod, ...]] = (None, ())
        self._names: Mapping[bytes, Key] = {}

    def __call__(self) -> Mapping[bytes, Key]:
        plan, pods = self._enforcement.in_force, self._enforcement.snapshot.pods
        # Asked for every event: what has not been made anew is not looked into.
        if self._made_of[0] is not plan or self._made_of[1] is not pods:
            names: dict[bytes, Key] = {}
            if self._enforcement.config.pod_names is PodNames.CLUSTER:
                for pod in pods:
                    if not pod.finished and not pod.host_network:
                        names.update(dict.fromkeys(pod.ips, pod.key))
            for key, known in plan.pods.items() if plan else ():
                names.update(dict.fromkeys(known.addresses, key))
            self._made_of, self._names = (plan, pods), names
        return self._names
