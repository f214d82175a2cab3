"""What the VPC CNI's calls mean: pods that it has just made are known, and closed where they must be,
before any object names them; the flows of pods that it has removed end.

The CNI calls after it has made a pod's interface and its routes, and before the pod's containers run;
on deletion, after it has taken both away.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from dataplane.config import Mode
from dataplane.enforcement import Enforcement
from dataplane.errors import KernelError
from dataplane.model import Key, Pod, Snapshot
from dataplane.node import conntrack
from dataplane.node.interfaces import LinkState, host_veth_name, named_links
from dataplane.observe.log import Logger, get_logger
from dataplane.plan import node_addresses

ANSWER_SECONDS = 1.5  # the CNI gives a connection 2 s


class _Told(NamedTuple):
    """What the CNI said of a pod; `since` in seconds since the epoch."""

    since: float
    strict: bool


class CniPods:
    """The pods that the CNI told of, until their interface goes or their Pod object says as much.

    Until then their addresses are those that the node routes to their interface: an object of the
    same name may be that of a former pod.
    """

    def __init__(self, enforcement: Enforcement) -> None:
        self.log: Logger = get_logger()
        self._enforcement = enforcement
        enforcement.amend = self.amend
        self._told: dict[Key, _Told] = {}
        self._made: dict[Key, Pod] = {}
        self._amended: tuple[Snapshot, LinkState, Snapshot] | None = None
        self._said: Mode | None = None  # the CNI's mode, where it is not ours

    @property
    def problems(self) -> Sequence[str]:
        """What of the CNI's settings contradicts ours."""
        if self._said is None:
            return ()
        ours = self._enforcement.config.mode
        outcome = (
            "pods are isolated only if they are made from now on, and until this agent restarts"
            if ours is Mode.STANDARD
            else "pods are isolated all the same"
        )
        return (
            f"the VPC CNI runs in {self._said} mode, this agent in {ours} mode: {outcome}; give both the same"
            " NETWORK_POLICY_ENFORCING_MODE",
        )

    async def created(self, pod: Key, mode: str) -> bool:
        """A pod's interface is there. In standard mode there is nothing to wait for; in strict mode (the
        CNI's or ours) the answer is whether the pod is isolated in both directions now."""
        try:
            said = Mode(mode.lower()) if mode else None
        except ValueError:
            self.log.error(
                "pod refused: the CNI's NETWORK_POLICY_ENFORCING_MODE is neither standard nor strict",
                pod=str(pod),
                mode=mode[:32],
            )
            return False
        enforcement = self._enforcement
        ours = enforcement.config.mode
        if said is not None:
            known, self._said = self._said, said if said is not ours else None
            if self._said is not known:
                for problem in self.problems:
                    self.log.error("settings differ", what=problem)
        enforcement.look()  # or the pod's interface might not be known yet, and the pod forgotten
        self._told[pod] = _Told(time.time(), said is Mode.STRICT)
        self._amended = None
        if Mode.STRICT not in (said, ours):
            return True
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                await enforcement.settle()
            reason = self._why_open(pod)
        except TimeoutError:
            reason = enforcement.refused or "the rules are not in force yet: objects are still being read"
            if enforcement.in_force is not None:
                reason = f"no new rules came into force within {ANSWER_SECONDS} s"
        if reason is not None:
            self.log.error(
                "pod refused: it could not be isolated; kubelet tries again", pod=str(pod), reason=reason
            )
        return reason is None

    async def deleted(self, pod: Key) -> bool:
        """A pod's interface is gone: none of its flows stays judged, and nothing is kept of it."""
        enforcement = self._enforcement
        if enforcement.in_force is None:
            return True  # the first rules judge every flow again
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                settled = await enforcement.settle()
                # A new interface may have the pod's name already; then only its flows are looked at again.
                still = enforcement.in_force.pods.get(pod)
                if settled and still is not None and pod in enforcement.in_force.placements:
                    marks = enforcement.config.marks
                    await enforcement.in_kernel_thread(lambda: conntrack.clear(marks, set(still.addresses)))
        except (TimeoutError, KernelError) as error:
            settled = False
            self.log.error(
                "flows of a removed pod not ended yet", pod=str(pod), reason=str(error) or "no time"
            )
        return settled

    def amend(self, snapshot: Snapshot, state: LinkState) -> Snapshot:
        """The objects known, with the pods that the CNI told of as these links show them."""
        if self._amended is not None and self._amended[0] is snapshot and self._amended[1] is state:
            return self._amended[2]
        amended = self._amend(snapshot, state) if self._told else snapshot
        self._amended = snapshot, state, amended
        return amended

    def _amend(self, snapshot: Snapshot, state: LinkState) -> Snapshot:
        config = self._enforcement.config
        routed: defaultdict[int, list[bytes]] = defaultdict(list)
        for route in state.host_routes:
            routed[route.ifindex].append(route.address)
        objects = {pod.key: pod for pod in snapshot.pods}
        here = tuple(sorted(node_addresses(config, state)))
        made: dict[Key, Pod] = {}
        for key, told in [*self._told.items()]:
            known, links = objects.get(key), named_links(key, state, config.veth_prefix)
            addresses = tuple(
                sorted({ip for link in links for ip in routed[link]}, key=lambda ip: (len(ip), ip))
            )
            caught_up = known is not None and set(known.ips) == set(addresses) and not told.strict
            if not links or caught_up:
                del self._told[key]
                continue
            if known is not None and known.finished:
                continue
            if not addresses and not told.strict:
                continue  # of a pod without addresses every packet would be taken for a forged one
            pod = replace(
                known or Pod(key),
                host_network=False,
                host_ips=here,
                ips=addresses or (known.ips if known is not None else ()),
                created_at=told.since,
                strict=told.strict,
            )
            before = self._made.get(key)
            objects[key] = made[key] = before if before == pod and before is not None else pod
        self._made = made
        if not made:
            return snapshot
        return replace(snapshot, pods=tuple([objects[key] for key in sorted(objects)]))

    def _why_open(self, pod: Key) -> str | None:
        """Why the pod is not isolated in both directions by the rules in force; None when it is."""
        enforcement = self._enforcement
        plan = enforcement.in_force
        if plan is None or enforcement.refused is not None:
            return enforcement.refused or "no rules are in force"
        for fault in (*plan.problems, *enforcement.all_faults):
            return fault
        if any(one.key == pod and one.ingress and one.egress for one in plan.steered):
            return None
        prefix = enforcement.config.veth_prefix
        return (
            f"no interface {host_veth_name(pod, prefix)} is here; is --veth-prefix {prefix} the CNI's"
            " AWS_VPC_K8S_CNI_VETHPREFIX?"
        )
