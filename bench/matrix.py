"""Time of `podgate matrix`: a cluster's dump as kubectl prints it, every pair of pods, two ports.

matrix.py [--pods 1000] [--json FILE] [--plot FILE.png]. Two clusters: `apps`, 25 pods of each application
under shared policies, as clusters are; and `apart`, where every pod has policies of its own, so that no
two pods share a rule set. `command` is the whole `podgate matrix dump.yaml -o json` in a process of its
own; the other columns are its parts, run in this one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import yaml

from dataplane.policy.explain import parse_port
from dataplane.policy.matrix import reachability
from dataplane.policy.resolve import in_force
from dataplane.sources.directory import read_paths

PORTS = ("8080/TCP", "53/UDP")
REPLICAS = 25
PODS_PER_NAMESPACE = 100
PARTS = ("read", "resolve", "matrix", "json", "command")

_T = TypeVar("_T")


def _pod(number: int, app: int) -> dict[str, Any]:
    """A pod with the fields that make the bulk of what kubectl prints."""
    namespace, name = f"ns-{number // PODS_PER_NAMESPACE}", f"app-{app}-{number}"
    address = f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}"
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "uid": f"00000000-0000-0000-0000-{number:012}",
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": {"app": f"app-{app}", "pod-template-hash": "6d4b75cb6d", "version": "v1"},
            "annotations": {"prometheus.io/scrape": "true", "prometheus.io/port": "9102"},
            "ownerReferences": [
                {"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": f"app-{app}-6d4b75cb6d", "uid": "u"}
            ],
        },
        "spec": {
            "containers": [
                {
                    "name": "main",
                    "image": "registry.example.com/team/app:1.2.3",
                    "env": [{"name": f"SETTING_{each}", "value": str(each)} for each in range(8)],
                    "ports": [{"name": "http", "containerPort": 8080, "protocol": "TCP"}],
                    "resources": {"requests": {"cpu": "100m", "memory": "128Mi"}},
                    "volumeMounts": [{"mountPath": "/etc/config", "name": "config", "readOnly": True}],
                }
            ],
            "nodeName": f"node-{number % 20}",
            "tolerations": [
                {"effect": "NoExecute", "key": f"node.kubernetes.io/{word}", "operator": "Exists"}
                for word in ("not-ready", "unreachable")
            ],
            "volumes": [{"name": "config", "configMap": {"name": "config"}}],
        },
        "status": {
            "phase": "Running",
            "conditions": [
                {"type": kind, "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"}
                for kind in ("Initialized", "Ready", "ContainersReady", "PodScheduled")
            ],
            "hostIP": f"192.0.2.{number % 20}",
            "podIP": address,
            "podIPs": [{"ip": address}],
        },
    }


def _policy(namespace: int, app: int, apps: int) -> dict[str, Any]:
    """The application takes 8080 from five others and serves its namespace; it sends to three and to DNS."""

    def peers(first: int, count: int) -> list[dict[str, Any]]:
        selectors = ({"matchLabels": {"app": f"app-{(app + first + n) % apps}"}} for n in range(count))
        return [{"namespaceSelector": {}, "podSelector": selector} for selector in selectors]

    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": f"app-{app}", "namespace": f"ns-{namespace}"},
        "spec": {
            "podSelector": {"matchLabels": {"app": f"app-{app}"}},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [{"from": peers(1, 5), "ports": [{"port": "http"}]}, {"from": [{"podSelector": {}}]}],
            "egress": [{"to": peers(-3, 3)}, {"ports": [{"port": 53, "protocol": "UDP"}]}],
        },
    }


def dump(pods: int, replicas: int) -> str:
    """What `kubectl get netpol,pods -A -o yaml` prints, with `replicas` pods of each application."""
    apps = max(1, pods // replicas)
    items = [_pod(number, number // replicas) for number in range(pods)]
    items += [_policy(app * replicas // PODS_PER_NAMESPACE, app, apps) for app in range(apps)]
    return yaml.dump({"apiVersion": "v1", "kind": "List", "items": items}, Dumper=yaml.CSafeDumper)


def _timed(call: Callable[[], _T]) -> tuple[float, _T]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def measure(pods: int, replicas: int) -> dict[str, Any]:
    """Seconds of each part, and what was computed."""
    ports = [parse_port(port) for port in PORTS]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "dump.yaml"
        path.write_text(dump(pods, replicas))
        read, snapshot = _timed(lambda: read_paths([path]).snapshot)
        resolve, resolved = _timed(lambda: in_force(snapshot))
        matrix, reach = _timed(lambda: reachability(resolved, ports))
        as_json, text = _timed(lambda: json.dumps(reach.matrix().to_json()))
        line = [
            sys.executable,
            "-c",
            "from dataplane.cli import main; main()",
            "matrix",
            str(path),
            "-o",
            "json",
        ]
        line += [option for port in PORTS for option in ("--port", port)]
        command, done = _timed(lambda: subprocess.run(line, capture_output=True, text=True, check=True))
    assert done.stdout == text + "\n", "the command printed something else than its parts"
    return {
        "pods": pods,
        "pairs": len(PORTS) * pods * (pods - 1),
        "allowed": sum(row.count(".") for rows in reach.marks.values() for row in rows) - len(PORTS) * pods,
        "rule_sets": len(reach.ingress[PORTS[0]].lines) + len(reach.egress[PORTS[0]].lines),
        "seconds": dict(zip(PARTS, (read, resolve, matrix, as_json, command), strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pods", type=int, default=1000, metavar="N", help="of the largest cluster")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="write the growth as a picture")
    options = parser.parse_args()
    if options.pods < 16:
        parser.error("--pods must be at least 16")
    results: dict[str, list[dict[str, Any]]] = {}
    print(f"{'cluster':<8} {'pods':>5} {'pairs':>9} {'allowed':>9} {'rule sets':>9}", end="")
    print("".join(f" {part + ' s':>9}" for part in PARTS))
    for name, replicas in (("apps", REPLICAS), ("apart", 1)):
        results[name] = []
        for divisor in (16, 8, 4, 2, 1):
            row = measure(options.pods // divisor, replicas)
            results[name].append(row)
            print(
                f"{name:<8} {row['pods']:5} {row['pairs']:9,} {row['allowed']:9,} {row['rule_sets']:9}",
                end="",
            )
            print("".join(f" {seconds:9.3f}" for seconds in row["seconds"].values()), flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    if options.plot:
        plot(results, options.plot)


def plot(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots()
    labels = {"apps": f"{REPLICAS} pods share policies", "apart": "every pod has its own"}
    for (name, rows), colour in zip(results.items(), ("tab:blue", "tab:orange"), strict=True):
        for part, style in (("command", "o-"), ("matrix", "o--")):
            axes.loglog(
                [row["pods"] for row in rows],
                [row["seconds"][part] for row in rows],
                style,
                color=colour,
                label=f"{'whole command' if part == 'command' else 'matrix alone'}, {labels[name]}",
            )
    axes.set(xlabel="pods (every pair, two ports)", ylabel="seconds", title="podgate matrix")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
