"""Time to resolve NetworkPolicies: from scratch; from a pod that came to its node's table; how both grow.

resolve.py [--plot FILE.png]. The cluster: 50 namespaces of 100 pods, 20 applications in each; 1,000
policies that select an application and allow others by pod, by namespace, by both and by named port.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

from dataplane._rules import RuleTable
from dataplane.model import (
    ContainerPort,
    Direction,
    Key,
    LabelSelector,
    Namespace,
    NetworkPolicy,
    NetworkPolicyPeer,
    NetworkPolicyPort,
    NetworkPolicyRule,
    Pod,
    Service,
    ServicePort,
    Snapshot,
)
from dataplane.policy.compile import Compiler, PodEntry
from dataplane.policy.effective import Effective
from dataplane.policy.explain import table_of_everything
from dataplane.policy.resolve import Resolver, in_force

APPS = 20
PODS_PER_NAMESPACE = 100
NODES = 40
NODE = frozenset({b"\xc0\x00\x02\x00"})


def _pod(number: int, namespaces: int) -> Pod:
    address = (10 << 24) + number + 1
    turn = number // namespaces
    return Pod(
        Key(f"ns-{number % namespaces}", f"pod-{number}"),
        uid=str(number),
        host_ips=(b"\xc0\x00\x02" + bytes([number % NODES]),),
        ips=(address.to_bytes(4), b"\xfd" + address.to_bytes(15)),
        created_at=float(number),
        labels={"app": f"app-{turn % APPS}", "tier": ("front", "back")[turn % 2], "hash": str(number)},
        ports=(ContainerPort("http", 6, 8080 if turn % 10 else 80),),
    )


def _policy(number: int, namespaces: int) -> NetworkPolicy:
    def pods(app: int) -> LabelSelector:
        return LabelSelector.of({"app": f"app-{app % APPS}"})

    turn = number // namespaces
    team = LabelSelector.of({"team": f"team-{turn % 10}"})
    ingress = (
        NetworkPolicyRule((NetworkPolicyPeer(pods(turn + 1)),), (NetworkPolicyPort(None, "http"),)),
        NetworkPolicyRule((NetworkPolicyPeer(pods(turn + 2), team),), (NetworkPolicyPort(None, 443),)),
    )
    egress = (
        NetworkPolicyRule((NetworkPolicyPeer(pods(turn + 3)),)),
        NetworkPolicyRule((), (NetworkPolicyPort(17, 53),)),
    )
    namespace = f"ns-{number % namespaces}"
    return NetworkPolicy(Key(namespace, f"p-{number}"), pods(turn), frozenset(Direction), ingress, egress)


def cluster(policies: int, pods: int) -> Snapshot:
    namespaces = max(1, pods // PODS_PER_NAMESPACE)
    names = [f"ns-{number}" for number in range(namespaces)]
    return Snapshot(
        pods=tuple(sorted((_pod(n, namespaces) for n in range(pods)), key=lambda pod: pod.key)),
        network_policies=tuple(
            sorted((_policy(n, namespaces) for n in range(policies)), key=lambda policy: policy.key)
        ),
        namespaces=tuple(
            sorted(
                (Namespace(name, {"team": f"team-{n % 10}"}) for n, name in enumerate(names)),
                key=lambda each: each.name,
            )
        ),
        services=tuple(
            Service(
                Key(name, "s"),
                {"app": "app-3"},
                (b"\xac\x14" + n.to_bytes(2),),
                (ServicePort(6, 80, "http"),),
            )
            for n, name in enumerate(sorted(names))
        ),
    )


def _ms(call: Callable[[], object], repeat: int = 3) -> float:
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1000)
    return min(times)


def one_pod(snapshot: Snapshot) -> tuple[float, float]:
    """Median and worst milliseconds from a pod that came to its node's compiled table, over 20 pods."""
    resolver, effective, compiler = Resolver(), Effective(NODE), Compiler()

    def table(generation: int) -> RuleTable:
        pods = effective.update(in_force(snapshot, resolver)).values()
        entries = [
            PodEntry(pod.pod, pod.addresses, (number,), pod.ingress, pod.egress)
            for number, pod in enumerate(pods, 1)
        ]
        return compiler.table(generation, entries, NODE)

    kept = table(1)  # what it shares with the next one is not compiled again
    gc.freeze()  # as the agent does with what is loaded
    times = []
    first = -(-len(snapshot.pods) // NODES) * NODES  # the first pod's node is NODE, each time
    for number in range(first, first + 20 * NODES, NODES):
        pod = _pod(number, len(snapshot.namespaces))
        pods = tuple(sorted((*snapshot.pods, pod), key=lambda each: each.key))
        snapshot = replace(snapshot, pods=pods)
        start = time.perf_counter()
        kept = table(number)
        times.append((time.perf_counter() - start) * 1000)
    assert kept.generation == number
    return statistics.median(times), max(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plot", help="write the growth as a picture")
    options = parser.parse_args()
    rows = []
    print(f"{'policies':>9} {'pods':>7} {'rules':>8} {'resolve ms':>11} {'one pod ms':>11} {'worst ms':>9}")
    for factor in (1, 2, 4, 8, 16):
        snapshot = cluster(1000 * factor // 16, 5000 * factor // 16)
        made = Resolver().update(snapshot)
        rules = sum(len(each.ingress) + len(each.egress) for each in made)
        whole = _ms(lambda snapshot=snapshot: Resolver().update(snapshot))  # type: ignore[misc]
        median, worst = one_pod(snapshot)
        rows.append((len(snapshot.network_policies), whole, median))
        print(
            f"{len(snapshot.network_policies):9} {len(snapshot.pods):7} {rules:8} "
            f"{whole:11.1f} {median:11.2f} {worst:9.2f}"
        )
    tables = _ms(lambda: table_of_everything(in_force(snapshot), Compiler()), 1)
    print(f"resolved and compiled for every pod, as one node would never do: {tables:.0f} ms")
    if options.plot:
        plot(rows, options.plot)


def plot(rows: list[tuple[int, float, float]], path: str) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots()
    for column, label in ((1, "from scratch"), (2, "one pod came (median)")):
        axes.loglog([row[0] for row in rows], [row[column] for row in rows], "o-", label=label)
    axes.set(xlabel="policies (with 5 pods each)", ylabel="ms", title="Resolving NetworkPolicies")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
