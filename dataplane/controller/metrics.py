"""What the controller's /metrics shows."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from dataplane.sources.kubernetes_watch import Watch

CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """Counters of its own registry: a process may hold several controllers, as tests do."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        registry = self._registry
        ProcessCollector(registry=registry)
        build = Gauge(
            "podgate_build_info",
            "1, and in its labels the versions at work.",
            ["version", "python"],
            registry=registry,
        )
        build.labels(_version(), platform.python_version()).set(1)
        self._leader = Gauge("podgate_controller_leader", "1 when this controller writes.", registry=registry)
        self._queue = Gauge(
            "podgate_controller_queue_policies", "Policies that wait to be written.", registry=registry
        )
        self._failing = Gauge(
            "podgate_controller_failing_policies",
            "Policies whose last write failed; they are tried again.",
            registry=registry,
        )
        self._limited = Gauge(
            "podgate_controller_limited_policies",
            "Policies in force without their new rules, because the API server does not take these.",
            registry=registry,
        )
        self._unusable = Gauge(
            "podgate_controller_object_problems",
            "What is wrong with objects that policies are made of; the log says what.",
            registry=registry,
        )
        self._objects = Gauge(
            "podgate_controller_policy_endpoints", "PolicyEndpoints of ours.", registry=registry
        )
        self._writes = Counter(
            "podgate_controller_writes",
            "Requests that write. result: ok, the HTTP status, or error.",
            ["verb", "result"],
            registry=registry,
        )
        self._latency = Histogram(
            "podgate_controller_latency_seconds",
            "From the first event of a change to its last write.",
            buckets=(0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300),
            registry=registry,
        )

    def read_with(
        self,
        leading: Callable[[], bool],
        queue: Callable[[], int],
        failing: Callable[[], int],
        limited: Callable[[], int],
        unusable: Callable[[], int],
        objects: Callable[[], int],
        watches: Callable[[], Sequence[Watch]],
    ) -> None:
        """Where to look at each scrape."""
        self._leader.set_function(lambda: float(leading()))
        self._queue.set_function(queue)
        self._failing.set_function(failing)
        self._limited.set_function(limited)
        self._unusable.set_function(unusable)
        self._objects.set_function(objects)
        self._registry.register(_Watches(watches))

    def wrote(self, verb: str, result: str) -> None:
        self._writes.labels(verb, result).inc()

    def settled(self, seconds: float) -> None:
        """A change was written in full, so long after its first event."""
        self._latency.observe(max(0.0, seconds))

    def text(self) -> bytes:
        """The text format of Prometheus."""
        return generate_latest(self._registry)


class _Watches(Collector):
    """The watches as the agent shows its own."""

    def __init__(self, watches: Callable[[], Sequence[Watch]]) -> None:
        self._watches = watches

    def describe(self) -> Iterator[Metric]:
        return iter(())

    def collect(self) -> Iterator[Metric]:
        synced = GaugeMetricFamily(
            "podgate_watch_synced", "1 when the kind has been listed in full.", labels=["resource"]
        )
        up = GaugeMetricFamily(
            "podgate_watch_up", "1 unless what is known of the kind may be old.", labels=["resource"]
        )
        faults = CounterMetricFamily(
            "podgate_api_errors", "Requests of watches that failed, by kind.", labels=["resource", "kind"]
        )
        for watch in self._watches():
            resource = str(watch.resource)
            synced.add_metric([resource], watch.synced)
            up.add_metric([resource], watch.problem is None)
            for kind, count in sorted(watch.faults.items()):
                faults.add_metric([resource, kind], count)
        yield from (synced, up, faults)


def _version() -> str:
    try:
        return version("podgate")
    except PackageNotFoundError:
        return "unknown"
