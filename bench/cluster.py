"""One agent in a large cluster: CPU, memory and latency against a real API server.

    KUBEBUILDER_ASSETS=… .venv/bin/python bench/cluster.py        # 6 minutes, as root

The API server holds --policies PolicyEndpoints of as many policies, which select 2.5 pods each, on 5,000
nodes. The node of the agent has --pods of these pods (network namespaces of a lab), each selected by
three policies. After a quiet time, --rate objects change per second, one in ten of them concerning this
node. Latency: from the first event's arrival to the table in force, with and without the coalescing
window (20 ms after the last event, 200 ms at most); then how long judging live flows again took.
"""

from __future__ import annotations

import os
import random
import re
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "netns"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "cluster"))

import kube_binaries
from cluster_agent import ClusterAgent
from control_plane import ControlPlane
from objects import pod, policy, rule, select

from dataplane.lab.world import Lab

TICKS = os.sysconf("SC_CLK_TCK")
WRITERS = 16  # an update takes the API server some 50 ms


def slice_(number: int, endpoints: list[Any], chance: random.Random) -> dict[str, Any]:
    rules = [
        rule(f"10.{chance.randrange(64, 128)}.{chance.randrange(256)}.{chance.randrange(256)}", "80/TCP")
        for _ in range(10)
    ]
    return policy("x", f"policy-{number}", endpoints, ingress=rules)


def elsewhere(chance: random.Random) -> list[Any]:
    return [
        {
            "name": f"web-{chance.randrange(10**9):x}",
            "namespace": "x",
            "podIP": f"10.{chance.randrange(64, 128)}.{chance.randrange(256)}.{chance.randrange(256)}",
            "hostIP": f"10.{chance.randrange(16, 36)}.{chance.randrange(250)}.1",
        }
        for _ in range(chance.choice((2, 3)))
    ]


def cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def memory(pid: int) -> str:
    sizes = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    now, peak = (int(sizes[name].split()[0]) // 1024 for name in ("VmRSS", "VmHWM"))
    return f"RSS {now} MB (peak {peak})"


@click.command()
@click.option("--policies", default=20_000, show_default=True)
@click.option("--pods", default=100, show_default=True)
@click.option("--rate", default=100, show_default=True)
@click.option("--seconds", default=60.0, show_default=True)
@click.option("--idle", default=20.0, show_default=True)
def main(policies: int, pods: int, rate: int, seconds: float, idle: float) -> None:
    chance = random.Random(1)
    with tempfile.TemporaryDirectory() as home:
        cluster = ControlPlane(kube_binaries.wait(), Path(home) / "control-plane", f"bench{os.getpid():x}")
        lab = None
        try:
            cluster.start()
            cluster.install_definition()
            cluster.grant()
            cluster.namespaces("x")
            print(f"making {policies} PolicyEndpoints and {pods} pods …", flush=True)
            lab = Lab.up(f"bench{os.getpid():x}", [pod(f"x/p{number}") for number in range(pods)])
            local = {
                number: slice_(number, [*select(lab, f"x/p{number // 3}")[:1], *elsewhere(chance)], chance)
                for number in range(pods * 3)
            }
            others = {
                number: slice_(number, elsewhere(chance), chance) for number in range(len(local), policies)
            }
            cluster.create_all([*local.values(), *others.values()])
            one = ClusterAgent(cluster, lab, Path(home))
            one.write_pods()
            started = time.monotonic()
            one.start(wait=False)
            one.wait_ready(120)
            assert one.process is not None
            pid = one.process.pid
            print(f"ready after {time.monotonic() - started:.1f} s; {memory(pid)}", flush=True)
            before, began = cpu(pid), time.monotonic()
            time.sleep(idle)
            print(f"idle CPU {(cpu(pid) - before) / (time.monotonic() - began):.2%}")
            churn(cluster, local, others, rate, seconds, chance, pid)
            status = one.status()
            took = status["programming_ms"]
            print(f"{took['changes']} changes, arrival to in force: p50 {took['p50']}, p99 {took['p99']} ms")
            after = took["after_window"]
            print(f"… from the end of the coalescing window: p50 {after['p50']}, p99 {after['p99']} ms")
            judged = sorted(float(ms) for ms in re.findall(r"rules in force.*flows_ms=([0-9.]+)", one.text()))
            judged = [ms for ms in judged if ms > 1]  # others had no flows to look at
            if judged:
                middle = judged[len(judged) // 2]
                print(f"then judging live flows again: p50 {middle} ms ({len(judged)} times)")
            print(f"{memory(pid)}; problems: {status['problems'][:3]}")
            one.terminate()
        finally:
            if lab is not None:
                lab.down()
            cluster.stop()


def churn(
    cluster: ControlPlane,
    local: dict[int, Any],
    others: dict[int, Any],
    rate: int,
    seconds: float,
    chance: random.Random,
    pid: int,
) -> None:
    done = [0]
    end = time.monotonic() + seconds

    def work(seed: int) -> None:
        mine = random.Random(seed)
        due = time.monotonic()
        while due < end:
            made = mine.choice(list((local if mine.random() < 0.1 else others).values()))
            address = f"10.{mine.randrange(64, 128)}.{mine.randrange(256)}.{mine.randrange(256)}"
            cluster.patch(
                made, {"spec": {"ingress": [*made["spec"]["ingress"][1:], rule(address, "80/TCP")]}}
            )
            done[0] += 1
            due += WRITERS / rate
            time.sleep(max(due - time.monotonic(), 0))

    before, began = cpu(pid), time.monotonic()
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(WRITERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.monotonic() - began
    print(
        f"{done[0] / took:.0f} changes/s for {took:.0f} s: CPU {(cpu(pid) - before) / took:.1%} of one core"
    )


if __name__ == "__main__":
    main()
