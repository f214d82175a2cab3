"""What the agent answers on its control socket: status, rules, flows, explain."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from dataplane._engine import judge_flow
from dataplane._rules import RuleTable
from dataplane.addresses import format_address
from dataplane.enforcement import Enforcement
from dataplane.errors import InputError, KernelError
from dataplane.node import conntrack
from dataplane.observe.control import Answer, Query
from dataplane.observe.events import deciding_policy, pod_name, protocol_name
from dataplane.observe.selection import Selection
from dataplane.plan import node_addresses
from dataplane.pod_names import NamesByAddress
from dataplane.policy.explain import describe_rules
from dataplane.policy.explainer import Explainer
from dataplane.reasons import Reason
from dataplane.verdict import Event, Flow, Packet, Verdict


class Source(Protocol):
    """Where the objects come from, as far as people ask."""

    @property
    def ready(self) -> bool: ...
    @property
    def problems(self) -> Sequence[str]: ...


class Latencies(Protocol):
    """How long changes took from their arrival to the rules in force (`programming.Programming`)."""

    def quantiles(self) -> dict[str, Any]: ...


class Reachable(Protocol):
    """What stands between the CNI and us (`cni.pods.CniPods`, `cni.server.CniServer`)."""

    @property
    def problems(self) -> Sequence[str]: ...


def _event(flow: Flow, verdict: Verdict) -> Event:
    """The verdict of a flow in the form that selections read, without a packet of it."""
    packet = Packet(Reason.NONE, flow, None, 0, 0, 0, 0, 0, 0, False, False)
    return Event(0, packet, 0, 0, 0, False, 0, True, verdict)


class Answers:
    """Reads the state of enforcement; changes nothing."""

    def __init__(
        self,
        enforcement: Enforcement,
        source: Source,
        latencies: Latencies,
        cni: Sequence[Reachable],
        names: NamesByAddress,
    ) -> None:
        self.enforcement = enforcement
        self.source = source
        self.latencies = latencies
        self.cni = cni
        self._names = names

    def by_name(self) -> Mapping[str, Answer]:
        """The single answers, by path."""
        return {"status": self.status, "rules": self.rules, "flows": self.flows, "explain": self.explain}

    def _table(self) -> RuleTable:
        table = self.enforcement.publisher.table
        if table is None:
            raise InputError("the agent has no rules yet: it is still starting")
        return table

    async def status(self, _query: Query) -> dict[str, Any]:
        """How the agent is."""
        now, plan = self.enforcement, self.enforcement.in_force
        counters: Counter[str] = Counter()
        for worker in now.workers:
            for (_allow, _direction, reason), (packets, _bytes) in worker.counters().items():
                counters[reason.text] += packets
        problems = [*self.source.problems, *now.all_faults]
        for part in self.cni:
            problems += part.problems
        if now.refused:
            problems.append(now.refused)
        if plan is not None:
            problems += plan.problems
            problems += [f"pod {key}: its policies wait for its interface to appear" for key in plan.waiting]
        problems += [str(problem) for problem in now.snapshot.problems]
        queues = []
        counters["queue-full"] += now.interception.lost
        if plan is not None:
            try:
                dropped = await now.in_kernel_thread(now.steering.counters)
                for reason, packets in dropped.items():
                    counters[reason.text] += packets
            except KernelError as error:
                problems.append(str(error))
            for queue in now.queues.stats():
                counters["queue-full"] += queue.dropped + queue.user_dropped
                queues.append(
                    {
                        "num": queue.num,
                        "depth": queue.depth,
                        "dropped": queue.dropped,
                        "user_dropped": queue.user_dropped,
                    }
                )
        variant = now.steering.variant
        return {
            "ready": now.ready and self.source.ready,
            "generation": now.generation,
            "mode": str(now.config.mode),
            "fail": str(now.config.fail),
            "backend": str(now.config.backend),
            "iptables": str(variant) if variant else None,
            "audit": now.config.audit,
            "reject": now.config.rejects,
            "audited_pods": plan.audited if plan else 0,
            "pods": plan.isolated if plan else 0,
            "policies": plan.policies if plan else 0,
            "intercepted_pods": now.intercepted_pods,
            "queues": queues,
            "counters": {reason: count for reason, count in sorted(counters.items()) if count},
            "problems": problems,
            "programming_ms": self.latencies.quantiles(),
            "pid": os.getpid(),
        }

    async def rules(self, query: Query) -> dict[str, Any]:
        """The compiled rules of one pod of this node."""
        name = query.get("pod", "")
        table = self._table()
        pods = table.pods
        for index, entry in enumerate(pods):
            if str(entry.key) == name:
                return describe_rules(table, index)
        known = ", ".join(str(entry.key) for entry in pods) or "none"
        raise InputError(f"{name}: no such pod with an interface on this node; known here: {known}")

    async def explain(self, query: Query) -> dict[str, Any]:
        """The verdict for one packet, by the rules in force, and why."""
        now, table = self.enforcement, self._table()
        known, resolved = now.known, now.snapshot
        own_node = node_addresses(now.config, now.interfaces.state)

        def answer() -> dict[str, Any]:
            return Explainer(table, known, resolved, own_node).explain(
                query.get("from", ""),
                query.get("to", ""),
                query.get("port", ""),
                query.get("family"),
                everything=query.get("all") == "yes",
            )

        # It goes through every object: events and changes of policy must not wait for it.
        found = await asyncio.to_thread(answer)
        if now.config.audit:
            found["notes"].append("the agent runs with --audit: it drops nothing")
        return found

    async def flows(self, query: Query) -> list[dict[str, Any]]:
        """Live flows from conntrack that touch a pod of this node, with their verdict now.

        `filter`: only those that its conditions select (`observe.selection`). No packet is at hand: a
        pcap-filter expression is refused.
        """
        selection = Selection.parse([query.get("filter", "")])
        if selection.packets:
            raise InputError("FILTER: flows know no packets, so no pcap-filter expression selects them")
        wanted = selection.wanted(self._names, None)
        table, names = self._table(), self._names()
        rows = []
        marks = self.enforcement.config.marks
        for flow in await asyncio.to_thread(lambda: conntrack.flows(marks, unjudged=True)):
            # The originator before, the responder after translation: what pods' interfaces see.
            src, sport, dst, dport = flow.src, flow.sport, flow.reply_src, flow.reply_sport
            if src not in names and dst not in names:
                continue
            verdict = judge_flow(table, src, dst, flow.protocol, sport, dport)
            if wanted is not None and not wanted(
                _event(Flow(src, dst, flow.protocol, sport, dport, True), verdict)
            ):
                continue
            rows.append(
                {
                    "verdict": "allow" if verdict.allow else "deny",
                    "reason": verdict.reason.text,
                    "policy": deciding_policy(verdict),
                    "src": format_address(src),
                    "src_port": sport,
                    "dst": format_address(dst),
                    "dst_port": dport,
                    "protocol": protocol_name(flow.protocol),
                    "src_pod": pod_name(names, src),
                    "dst_pod": pod_name(names, dst),
                    "state": flow.state,
                    "egress_judged": flow.egress,
                    "ingress_judged": flow.ingress,
                    "packets": flow.packets,
                    "bytes": flow.bytes,
                    "reply_packets": flow.reply_packets,
                    "reply_bytes": flow.reply_bytes,
                    "timeout": flow.timeout,
                }
            )
        return rows
