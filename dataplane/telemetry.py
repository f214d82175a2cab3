"""What monitoring is told of the agent: the readings of /metrics, and what /healthz and /readyz say."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from aiohttp import web

from dataplane._rules import RuleTable
from dataplane.config import Fail
from dataplane.enforcement import Enforcement
from dataplane.errors import KernelError
from dataplane.model import Direction, Key, Snapshot
from dataplane.observe.metrics import CONTENT_TYPE, Metrics, Readings
from dataplane.observe.totals import Totals
from dataplane.policy.compile import rule_of
from dataplane.policy.effective import isolating_policies
from dataplane.programming import Latency, Programming
from dataplane.reasons import Reason

KERNEL_PATIENCE_SECONDS = 2.0  # for the rules' counters, while the kernel thread is at work
SETTLE_SECONDS = 10.0  # at most so often, without a scrape, denials are put down to policies
OPEN_DENIALS = 8  # sets of policies of which denials are kept apart until then
CONNTRACK = Path("/proc/sys/net/netfilter")

Series = list[tuple[tuple[str, ...], float]]


class Watched(Protocol):
    """One kind followed on an API server, as far as it is counted (`sources.kubernetes_watch.Watch`)."""

    @property
    def resource(self) -> object: ...
    @property
    def synced(self) -> bool: ...
    @property
    def problem(self) -> str | None: ...
    @property
    def silence(self) -> float | None: ...
    @property
    def lists(self) -> int: ...
    @property
    def restarts(self) -> Mapping[str, int]: ...
    @property
    def events(self) -> Mapping[str, int]: ...
    @property
    def faults(self) -> Mapping[str, int]: ...


class FlowLog(Protocol):
    """The flow log, as far as it is counted (`flowlog.FlowLog`)."""

    @property
    def lines(self) -> Mapping[str, int]: ...
    @property
    def suppressed(self) -> Mapping[str, int]: ...
    @property
    def lost(self) -> Mapping[str, int]: ...


class Source(Protocol):
    """Where the objects come from, as far as it is monitored."""

    @property
    def ready(self) -> bool: ...
    @property
    def problems(self) -> Sequence[str]: ...
    @property
    def watches(self) -> Sequence[Watched]: ...
    @property
    def unmatched(self) -> Collection[Key]: ...


class Telemetry:
    """Reads the state of enforcement and of the source; changes neither."""

    def __init__(self, enforcement: Enforcement, source: Source, programming: Programming) -> None:
        self.enforcement = enforcement
        self.source = source
        config = enforcement.config
        self.metrics = Metrics({"backend": str(config.backend), "mode": str(config.mode)})
        self.flow_log: FlowLog | None = None
        self._tallies = Tallies(config.audit)
        self._compile_seconds = 0.0
        self._steering: Mapping[Reason, int] = {}
        self._scraping = asyncio.Lock()
        enforcement.when_compiled = self._compiled
        enforcement.publisher.on_retired = self._tallies.retire
        programming.listeners.append(self._in_force)

    # --- probes ---------------------------------------------------------------------------------------

    def dead(self) -> list[str]:
        """What only a restart mends, one line each."""
        return self.enforcement.queues.dead() if self.enforcement.started else []

    def unready(self) -> list[str]:
        """What is in the way of being ready, one line each."""
        now, plan = self.enforcement, self.enforcement.in_force
        found = [*now.all_faults, *([now.refused] if now.refused is not None else [])]
        found += plan.problems if plan is not None else ["starting: no rules are in force yet"]
        if not self.source.ready:
            found += self.source.problems or ["the source of the objects is not ready"]
        return list(dict.fromkeys(found))

    # --- metrics --------------------------------------------------------------------------------------

    async def page(self) -> web.Response:
        """/metrics."""
        async with self._scraping:
            await self._ask_steering()
            readings = self._readings()
            table, here = self.enforcement.publisher.table, self._here()

            def text() -> bytes:
                tallies = self._tallies.readings(table, *here)
                return self.metrics.text({**readings, **tallies})

            # Neither the event loop nor the queue threads wait for it.
            body = await asyncio.to_thread(text)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE})

    def _compiled(self, table: RuleTable, compile_seconds: float) -> None:
        self._compile_seconds = compile_seconds
        self._tallies.publish(table, self.enforcement.snapshot)

    def _in_force(self, latency: Latency) -> None:
        self.metrics.change_to_force.observe(latency.received)
        if latency.triggered is not None:
            self.metrics.programming_latency.observe(latency.triggered)

    def flows_judged(self, seconds: float) -> None:
        """A change has been in force for so long when the last live flow was judged by it."""
        self.metrics.flows_judged.observe(seconds)

    def _here(self) -> tuple[set[Key], set[Key]]:
        """Pods of this node and policies that exist now."""
        plan = self.enforcement.in_force
        policies = {slice_.policy for slice_ in self.enforcement.snapshot.policy_endpoints}
        return set(plan.pods) if plan is not None else set(), policies

    async def _ask_steering(self) -> None:
        """The kernel's counters; those of the last scrape while a change or a lock holds them up."""
        now = self.enforcement
        if now.in_force is None:
            return
        try:
            async with asyncio.timeout(KERNEL_PATIENCE_SECONDS):
                self._steering = await now.in_kernel_thread(now.steering.counters)
        except (TimeoutError, KernelError):
            pass  # what is wrong with our rules, readiness says

    def _readings(self) -> Readings:
        """Everything but what is counted per pod and policy. For the event loop's thread."""
        found: defaultdict[str, Series] = defaultdict(list)
        self._read_engine(found)
        self._read_queues(found)
        self._read_state(found)
        self._read_watches(found)
        if self.flow_log is not None:
            self._read_flow_log(found, self.flow_log)
        for name, file in (("entries", "nf_conntrack_count"), ("entries_limit", "nf_conntrack_max")):
            value = _number(CONNTRACK / file)
            if value is not None:
                found[f"podgate_conntrack_{name}"] = [((), value)]
        return found

    def _read_engine(self, found: defaultdict[str, Series]) -> None:
        # From the start: a rate has no beginning where a series appears with its first packet.
        packets: Counter[tuple[str, str, str]] = Counter()
        for direction in Direction:
            for verdict, reason in (("allow", Reason.POLICY_RULE), ("deny", Reason.NO_RULE)):
                packets[str(direction), verdict, reason.text] = 0
        sizes = packets.copy()
        hits = misses = 0
        for worker in self.enforcement.workers:
            for (allow, side, reason), (count, size) in worker.counters().items():
                labels = (side, "allow" if allow else "deny", reason.text)
                packets[labels] += count
                sizes[labels] += size
            hit, missed = worker.cache_stats()
            hits, misses = hits + hit, misses + missed
        found["podgate_verdicts"] = list(packets.items())
        found["podgate_verdict_bytes"] = list(sizes.items())
        found["podgate_flow_cache_hits"] = [((), hits)]
        found["podgate_flow_cache_misses"] = [((), misses)]
        live = self.enforcement.live
        found["podgate_events_lost"] = [(("ring",), live.lost_in_rings), (("reader",), live.lost_by_readers)]
        found["podgate_steering_dropped_packets"] = [
            ((reason.text,), count) for reason, count in self._steering.items()
        ]

    def _read_queues(self, found: defaultdict[str, Series]) -> None:
        queues, fail_open = self.enforcement.queues, self.enforcement.config.fail is Fail.OPEN
        for queue in queues.stats():
            number = str(queue.num)
            found["podgate_queue_depth"].append(((number,), queue.depth))
            found["podgate_queue_fail_open"].append(((number,), fail_open))
            found["podgate_queue_dropped_packets"] += [
                ((number, "queue-full"), queue.dropped),
                ((number, "socket-full"), queue.user_dropped),
            ]
        losses = queues.losses()
        found["podgate_queue_packets"] = [((), losses.pop("packets", 0))]
        losses.pop("bursts", None)
        found["podgate_queue_faults"] = [((kind,), count) for kind, count in sorted(losses.items())]

    def _read_state(self, found: defaultdict[str, Series]) -> None:
        now, plan, table = self.enforcement, self.enforcement.in_force, self.enforcement.publisher.table
        unready = self.unready()

        def gauge(name: str, value: float) -> None:
            found[f"podgate_{name}"] = [((), value)]

        gauge("ready", not unready)
        gauge("table_generation", now.generation)
        gauge("table_compile_seconds", self._compile_seconds)
        if table is not None:
            rulesets = table.rulesets
            gauge("table_pods", len(table.pods))
            gauge("table_rules", sum(len(one.rules) for one in rulesets))
            gauge("table_intervals", sum(one.n_intervals for one in rulesets))
            gauge("table_bytes", table.nbytes + sum(one.nbytes for one in rulesets))
        if plan is not None:
            gauge("table_isolated_pods", plan.isolated)
            gauge("table_waiting_pods", len(plan.waiting))
            gauge("table_policies", plan.policies)
        enforcement = len(now.all_faults) + (now.refused is not None) + len(plan.problems if plan else ())
        found["podgate_problems"] = [
            (("objects",), len(now.snapshot.problems)),
            (("source",), len(self.source.problems)),
            (("enforcement",), enforcement),
        ]
        known = now.known
        found["podgate_objects"] = [
            (("PolicyEndpoint",), len(known.policy_endpoints)),
            (("NetworkPolicy",), len(known.network_policies)),
            (("Pod",), len(known.pods)),
            (("Namespace",), len(known.namespaces)),
            (("Service",), len(known.services)),
        ]
        gauge("policies_without_endpoints", len(self.source.unmatched))

    @staticmethod
    def _read_flow_log(found: defaultdict[str, Series], log: FlowLog) -> None:
        for name, counts in (("lines", log.lines), ("suppressed_lines", log.suppressed), ("lost", log.lost)):
            found[f"podgate_flow_log_{name}"] = [((what,), count) for what, count in dict(counts).items()]

    def _read_watches(self, found: defaultdict[str, Series]) -> None:
        # While one way of knowing a kind takes the other's place, two watches follow it.
        by_resource: defaultdict[str, list[Watched]] = defaultdict(list)
        for watch in self.source.watches:
            by_resource[str(watch.resource)].append(watch)
        for resource, watches in by_resource.items():
            found["podgate_watch_synced"].append(((resource,), all(one.synced for one in watches)))
            found["podgate_watch_up"].append(((resource,), all(one.problem is None for one in watches)))
            silences = [one.silence for one in watches if one.silence is not None]
            if silences:
                found["podgate_watch_silence_seconds"].append(((resource,), max(silences)))
            found["podgate_watch_lists"].append(((resource,), sum(one.lists for one in watches)))
            for name, counters in (
                ("watch_events", [one.events for one in watches]),
                ("watch_restarts", [one.restarts for one in watches]),
                ("api_errors", [one.faults for one in watches]),
            ):
                total: Counter[str] = Counter()
                for counter in counters:
                    total.update(counter)
                found[f"podgate_{name}"] += [((resource, kind), count) for kind, count in total.items()]


@dataclass(slots=True)
class _Denials:
    """Packets that no rule allowed, by pod, direction and whether an audit let them through, while these
    objects were in force."""

    snapshot: Snapshot
    counts: Counter[tuple[Key, Direction, bool]]


class Tallies:
    """What was counted per pod and policy, over all tables. For several threads."""

    def __init__(self, audit: bool = False) -> None:
        """`audit`: nothing at all is denied."""
        self._lock = threading.Lock()
        self._audit = audit
        self._snapshots: dict[int, Snapshot] = {}  # by the generation of tables that may be counted in
        self._denials: list[_Denials] = []  # oldest first
        self._settled = time.monotonic()
        self._pod_denied, self._pod_allowed = Totals(), Totals()
        self._policy_denied, self._policy_allowed = Totals(), Totals()
        self._pod_audited, self._policy_audited = Totals(), Totals()

    def publish(self, table: RuleTable, snapshot: Snapshot) -> None:
        """`table` was made from `snapshot` and is in force from now on."""
        with self._lock:
            self._snapshots[table.generation] = snapshot

    def retire(self, table: RuleTable) -> None:
        """Nobody counts in `table` any more."""
        with self._lock:
            self._take(table)
            self._snapshots.pop(table.generation, None)
            if time.monotonic() - self._settled > SETTLE_SECONDS:
                self._settle()

    def readings(self, table: RuleTable | None, pods: set[Key], policies: set[Key]) -> Readings:
        """All counts, those of the table in force included. `pods`, `policies`: those that exist."""
        with self._lock:
            if table is not None:
                self._take(table)
            self._settle()
            for totals, here in (
                (self._pod_denied, pods),
                (self._pod_allowed, pods),
                (self._pod_audited, pods),
                (self._policy_audited, policies),
                (self._policy_denied, policies),
                (self._policy_allowed, policies),
            ):
                totals.expire(here)
            return {
                "podgate_pod_denied_packets": self._pod_denied.series(),
                "podgate_pod_allowed_flows": self._pod_allowed.series(),
                "podgate_pod_audited_packets": self._pod_audited.series(),
                "podgate_policy_audited_packets": self._policy_audited.series(),
                "podgate_policy_denied_packets": self._policy_denied.series(),
                "podgate_policy_allowed_flows": self._policy_allowed.series(),
            }

    def _take(self, table: RuleTable) -> None:
        pods, rules = table.take_tally()
        denied: Counter[tuple[Key, Direction, bool]] = Counter()
        for (pod, direction, reason), count in pods:
            if reason is Reason.POLICY_RULE:
                self._pod_allowed.add(pod, (str(direction),), count)
                continue
            audited, why = self._audit, reason
            if reason is Reason.AUDIT:
                audited, why = True, Reason.NO_RULE
            totals = self._pod_audited if audited else self._pod_denied
            totals.add(pod, (str(direction), why.text), count)
            if why is Reason.NO_RULE:
                denied[pod, direction, audited] = count
        for (ruleset, direction, rule_id), count in rules:
            self._policy_allowed.add(rule_of(ruleset, rule_id)[0], (str(direction),), count)
        snapshot = self._snapshots.get(table.generation)
        if denied and snapshot is not None:
            self._note(snapshot, denied)

    def _note(self, snapshot: Snapshot, denied: Counter[tuple[Key, Direction, bool]]) -> None:
        """Keep denials until somebody asks which policies they are due to: that goes through all objects."""
        newest = self._denials[-1] if self._denials else None
        if newest is not None and newest.snapshot.policy_endpoints is snapshot.policy_endpoints:
            newest.counts.update(denied)
            return
        self._denials.append(_Denials(snapshot, denied))
        if len(self._denials) > OPEN_DENIALS:
            oldest = self._denials.pop(0)
            self._denials[0].counts.update(oldest.counts)

    def _settle(self) -> None:
        """Put denials down to the policies that isolated their pods."""
        for denials in self._denials:
            isolating = _isolating(denials.snapshot, {pod for pod, _, _ in denials.counts})
            for (pod, direction, audited), count in denials.counts.items():
                totals = self._policy_audited if audited else self._policy_denied
                for policy in isolating[direction].get(pod, ()):
                    totals.add(policy, (str(direction),), count)
        self._denials.clear()
        self._settled = time.monotonic()


def _isolating(snapshot: Snapshot, pods: set[Key]) -> Mapping[Direction, Mapping[Key, Iterable[Key]]]:
    """The policies that isolate each of a few pods, per direction."""
    groups = {
        (slice_.policy, slice_.port_group)
        for slice_ in snapshot.policy_endpoints
        if any(endpoint[0] in pods for endpoint in slice_.endpoints)
    }
    slices = [one for one in snapshot.policy_endpoints if (one.policy, one.port_group) in groups]
    objects = [pod for pod in snapshot.pods if pod.key in pods]
    return isolating_policies(replace(snapshot, policy_endpoints=tuple(slices), pods=tuple(objects)))


def _number(path: Path) -> float | None:
    try:
        return float(path.read_text())
    except (OSError, ValueError):  # no connection tracking in this kernel
        return None
