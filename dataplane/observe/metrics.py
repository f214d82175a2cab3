"""What /metrics shows: the closed list of metrics, and their text for Prometheus.

Nothing is counted here for the sake of metrics, but for two histograms: at a scrape, `Metrics` is given
what the engine, the kernel and the sources count anyway, by name and labels.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

CONTENT_TYPE = CONTENT_TYPE_LATEST

# Label values and the value, of one metric.
Series = Sequence[tuple[tuple[str, ...], float]]
Readings = Mapping[str, Series]


class Family(NamedTuple):
    """One metric. Names of counters are without `_total`, which the text format adds."""

    kind: type[CounterMetricFamily] | type[GaugeMetricFamily]
    name: str
    help: str
    labels: tuple[str, ...] = ()


_COUNTER, _GAUGE = CounterMetricFamily, GaugeMetricFamily
_OTHER = (
    "Series with empty namespace and the name other: what found no series of its own, because as many as"
    " there may be are in use."
)

FAMILIES = (
    # --- verdicts
    Family(
        _COUNTER,
        "podgate_verdicts",
        "Packets judged by the engine. direction: of the end that decided, empty when none did. Packets of"
        " flows that were handed to the kernel after their verdict are not seen again and not counted.",
        ("direction", "verdict", "reason"),
    ),
    Family(
        _COUNTER,
        "podgate_verdict_bytes",
        "Bytes of the packets in podgate_verdicts_total, IP headers included.",
        ("direction", "verdict", "reason"),
    ),
    Family(
        _COUNTER,
        "podgate_steering_dropped_packets",
        "Packets dropped by our rules in the kernel, before any queue: forged sources, what conntrack calls"
        " invalid, and in strict mode what comes before there are rules.",
        ("reason",),
    ),
    Family(
        _COUNTER,
        "podgate_pod_denied_packets",
        f"Packets denied at this pod's end, every one of them. {_OTHER}",
        ("namespace", "pod", "direction", "reason"),
    ),
    Family(
        _COUNTER,
        "podgate_pod_allowed_flows",
        "Packets that a rule of this pod allowed when it was looked up: about one for each flow, and one more"
        f" when its verdict had to be looked up again; what the flow cache answers is not counted. {_OTHER}",
        ("namespace", "pod", "direction"),
    ),
    Family(
        _COUNTER,
        "podgate_policy_denied_packets",
        "Packets denied because no rule allowed them, at pods that this policy isolates; a packet counts for"
        f" each policy that isolates the pod in that direction. {_OTHER}",
        ("namespace", "policy", "direction"),
    ),
    Family(
        _COUNTER,
        "podgate_policy_allowed_flows",
        "Packets that a rule of this policy allowed when it was looked up (see podgate_pod_allowed_flows);"
        f" where rules of several policies do, the first by name counts. {_OTHER}",
        ("namespace", "policy", "direction"),
    ),
    Family(
        _COUNTER,
        "podgate_pod_audited_packets",
        "Packets at this pod's end that would be denied but for an audit, counted when they were looked up:"
        f" about one for each flow; what has no flow, every time. {_OTHER}",
        ("namespace", "pod", "direction", "reason"),
    ),
    Family(
        _COUNTER,
        "podgate_policy_audited_packets",
        "The same, of packets that no rule allowed, at pods that this policy isolates; a packet counts for"
        f" each policy that isolates the pod in that direction. {_OTHER}",
        ("namespace", "policy", "direction"),
    ),
    # --- queues and flow cache
    Family(_GAUGE, "podgate_queue_depth", "Packets that wait for a verdict.", ("queue",)),
    Family(
        _GAUGE,
        "podgate_queue_fail_open",
        "1 when the kernel lets packets through unjudged where a queue is full or nobody reads it (--fail"
        " open). It does not count those.",
        ("queue",),
    ),
    Family(
        _COUNTER,
        "podgate_queue_dropped_packets",
        "Packets the kernel did not queue. queue-full: the queue had its maximum length. socket-full: the"
        " socket had no room.",
        ("queue", "cause"),
    ),
    Family(
        _COUNTER,
        "podgate_queue_faults",
        "What went wrong between the kernel and the queue threads, by kind: overruns, unreadable (messages),"
        " gone (packets flushed before their verdict), refused (verdicts), send_errors (bursts),"
        " failed_judgements (packets dropped).",
        ("kind",),
    ),
    Family(
        _COUNTER,
        "podgate_queue_packets",
        "Packets read from the queues.",
    ),
    Family(_COUNTER, "podgate_flow_cache_hits", "Packets whose verdict the flow cache held."),
    Family(_COUNTER, "podgate_flow_cache_misses", "Packets whose verdict was looked up and then kept."),
    Family(
        _COUNTER,
        "podgate_events_lost",
        "Verdict events that no reader (podgate trace, flow log) got: a ring was full, or a reader too slow.",
        ("where",),
    ),
    # --- flow log
    Family(_COUNTER, "podgate_flow_log_lines", "Lines written to the flow log, by event.", ("event",)),
    Family(
        _COUNTER,
        "podgate_flow_log_suppressed_lines",
        "Lines over --flow-log-rate, by reason; end: flows that ended.",
        ("reason",),
    ),
    Family(
        _COUNTER,
        "podgate_flow_log_lost",
        "Lines that should have been there. write: the file could not be written. reader, ring: the agent was"
        " too busy. kernel: times that the kernel left out flows that ended, nobody knows how many.",
        ("where",),
    ),
    # --- tables
    Family(_GAUGE, "podgate_table_generation", "Number of the table in force; it grows with each change."),
    Family(_GAUGE, "podgate_table_pods", "Pods of this node with an interface, in the table in force."),
    Family(_GAUGE, "podgate_table_isolated_pods", "Pods of this node that a policy isolates."),
    Family(_GAUGE, "podgate_table_waiting_pods", "Isolated pods whose interface has not been found."),
    Family(_GAUGE, "podgate_table_policies", "Policies known."),
    Family(_GAUGE, "podgate_table_rules", "Rules in the table; pods with equal rules share them."),
    Family(_GAUGE, "podgate_table_intervals", "Address intervals that look-ups search."),
    Family(_GAUGE, "podgate_table_bytes", "Memory of the table."),
    Family(_GAUGE, "podgate_table_compile_seconds", "How long the newest table took to compile."),
    # --- objects and readiness
    Family(_GAUGE, "podgate_ready", "1 when everything known is in force and nothing is wrong: /readyz."),
    Family(
        _GAUGE,
        "podgate_problems",
        "Problems that `podgate status` shows. objects: of the input. source: files or API server."
        " enforcement: of this node's kernel or our rules there.",
        ("kind",),
    ),
    Family(_GAUGE, "podgate_objects", "Objects known, by kind.", ("kind",)),
    # --- API server
    Family(_GAUGE, "podgate_watch_synced", "1 when the kind has been listed in full.", ("resource",)),
    Family(
        _GAUGE,
        "podgate_watch_up",
        "1 when nothing is known to be in the way of following the kind.",
        ("resource",),
    ),
    Family(
        _GAUGE,
        "podgate_watch_silence_seconds",
        "Time since anything was heard of the kind: an event, a bookmark (about one a minute) or a list.",
        ("resource",),
    ),
    Family(_COUNTER, "podgate_watch_events", "Watch events, by type.", ("resource", "type")),
    Family(_COUNTER, "podgate_watch_lists", "Full lists of the kind.", ("resource",)),
    Family(
        _COUNTER,
        "podgate_watch_restarts",
        "Watches opened again. ended: after their time. expired: the kind was listed again. error: see"
        " podgate_api_errors_total.",
        ("resource", "reason"),
    ),
    Family(
        _COUNTER,
        "podgate_api_errors",
        "Requests that failed: no-answer (or none that can be read), unauthorized, forbidden, not-found,"
        " throttled, server-error, other.",
        ("resource", "kind"),
    ),
    Family(
        _GAUGE,
        "podgate_policies_without_endpoints",
        "NetworkPolicies for which no PolicyEndpoint was made in time.",
    ),
    # --- conntrack
    Family(_GAUGE, "podgate_conntrack_entries", "Flows in conntrack's table of this network namespace."),
    Family(_GAUGE, "podgate_conntrack_entries_limit", "How many it may hold; new flows are dropped beyond."),
)

# A change should be in force within milliseconds; minutes only where something is wrong.
_LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class _Collector(Collector):
    """The families, with the readings of one scrape."""

    def __init__(self) -> None:
        self.readings: Readings = {}

    def describe(self) -> Iterable[Metric]:
        return [family.kind(family.name, family.help, labels=family.labels) for family in FAMILIES]

    def collect(self) -> Iterable[Metric]:
        for family in FAMILIES:
            made = family.kind(family.name, family.help, labels=family.labels)
            for labels, value in self.readings.get(family.name, ()):
                made.add_metric(labels, value)
            yield made


class Metrics:
    """A registry of its own: metrics of nobody else's get in."""

    def __init__(self, build: Mapping[str, str]) -> None:
        """`build`: further labels of podgate_build_info."""
        self.registry = CollectorRegistry()
        self._collector = _Collector()
        self.registry.register(self._collector)
        ProcessCollector(registry=self.registry)
        info = GaugeMetricFamily(
            "podgate_build_info",
            "1, and in its labels the versions at work.",
            labels=("version", "python", "kernel", *build),
        )
        info.add_metric((_version(), platform.python_version(), platform.release(), *build.values()), 1)
        self.registry.register(_Constant(info))
        self.change_to_force = Histogram(
            "podgate_change_to_force_seconds",
            "From the first event of a change received to its rules in force, coalescing included.",
            buckets=_LATENCY_BUCKETS,
            registry=self.registry,
        )
        self.flows_judged = Histogram(
            "podgate_live_flows_judged_seconds",
            "From the rules of a change in force to all live flows that it concerns judged again by them.",
            buckets=_LATENCY_BUCKETS,
            registry=self.registry,
        )
        self.programming_latency = Histogram(
            "podgate_programming_latency_seconds",
            "From the trigger time that a PolicyEndpoint carries to its rules in force here.",
            buckets=_LATENCY_BUCKETS,
            registry=self.registry,
        )

    def text(self, readings: Readings) -> bytes:
        """What Prometheus reads. Not for several threads at once. KeyError for a metric not declared."""
        if unknown := readings.keys() - _NAMES:
            raise KeyError(*sorted(unknown))
        self._collector.readings = readings
        return generate_latest(self.registry)


class _Constant(Collector):
    def __init__(self, metric: Metric) -> None:
        self._metric = metric

    def collect(self) -> Iterable[Metric]:
        return [self._metric]


_NAMES = {family.name for family in FAMILIES}


def _version() -> str:
    try:
        return version("podgate")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"
