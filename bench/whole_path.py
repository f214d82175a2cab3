"""Whole-path benchmark: real packets through the node, against its baselines in the same run.

    sudo .venv/bin/python bench/whole_path.py [--quick] [--json FILE] [--plot FILE.png]

See bench/README.md for what is measured and how to read it.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from paths import PATHS, SERVER, Running, process_cpu, up  # noqa: E402

WINDOW, FLOWS = 512, 64
UDP_PATHS = ("plain", "accept", "floor", "nfq", "podgate")
TCP_PATHS = ("plain", "accept", "floor", "floor-offload", "nfq", "podgate", "podgate-offload")
CONNECT_PATHS = ("plain", "accept", "floor-offload", "nfq-offload", "podgate-offload")

Sample = dict[str, float]
Rounds = dict[str, list[Sample]]  # path → one sample per round


@dataclass(frozen=True)
class Aim:
    """A comparison of two paths, round by round. `limit` is what the median must keep."""

    text: str
    kind: str  # udp, tcp or connect
    ours: str
    other: str
    value: Callable[[Sample, Sample, Sample], float]  # ours, other, conntrack accept
    limit: float
    at_most: bool
    unit: str = "x"


def _added(ours: Sample, other: Sample, accept: Sample) -> float:
    """The CPU that queueing adds to conntrack accept, on the whole machine."""
    return (ours["cpu_us"] - accept["cpu_us"]) / (other["cpu_us"] - accept["cpu_us"])


AIMS = (
    Aim("CPU per queued packet / C floor", "udp", "podgate", "floor", _added, 1.25, True),
    Aim("CPU per queued packet / NetfilterQueue", "udp", "podgate", "nfq", _added, 0.5, True),
    Aim(
        "queued TCP Gbit/s / C floor",
        "tcp",
        "podgate",
        "floor",
        lambda a, b, _: a["gbit"] / b["gbit"],
        0.9,
        False,
    ),
    Aim(
        "queued TCP Gbit/s / NetfilterQueue",
        "tcp",
        "podgate",
        "nfq",
        lambda a, b, _: a["gbit"] / b["gbit"],
        10,
        False,
    ),
    Aim(
        "offloaded TCP Gbit/s / conntrack accept",
        "tcp",
        "podgate-offload",
        "accept",
        lambda a, b, _: a["gbit"] / b["gbit"],
        0.95,
        False,
    ),
    Aim(
        "connect p50 - C floor",
        "connect",
        "podgate-offload",
        "floor-offload",
        lambda a, b, _: a["p50"] - b["p50"],
        10,
        True,
        "us",
    ),
)


def _ratio(key: str) -> Callable[[Sample, Sample, Sample], float]:
    return lambda ours, other, _: ours[key] / other[key]


# Shown beside the aims: the same comparisons counted in other ways.
ALSO = tuple(
    Aim(f"{text} / {name}", kind, ours, other, _ratio(key), 0, True)
    for text, kind, ours, key, others in (
        ("CPU per packet, whole path", "udp", "podgate", "cpu_us", ("floor", "nfq")),
        ("CPU per packet, queue process", "udp", "podgate", "queue_us", ("floor", "nfq")),
        ("queued TCP CPU per byte", "tcp", "podgate", "cpu_ns", ("floor", "nfq")),
        ("offloaded TCP CPU per byte", "tcp", "podgate-offload", "cpu_ns", ("accept", "floor-offload")),
    )
    for other in others
    for name in (
        {"floor": "C floor", "nfq": "NetfilterQueue", "accept": "conntrack accept"}.get(other, other),
    )
)


def compile_c(where: Path) -> tuple[Path, Path]:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise SystemExit("no C compiler: install gcc (apt-get install gcc libc6-dev)")
    made = []
    for name in ("floor", "traffic"):
        target = where / name
        command = [compiler, "-O3", "-pthread", "-o", str(target), str(HERE / f"{name}.c")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}: {done.stderr.strip()}")
        made.append(target)
    return made[0], made[1]


def softirq_threads() -> list[int]:
    """The kernel threads that take over when softirq work piles up."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if (entry / "comm").read_text().startswith("ksoftirqd/"):
                    found.append(int(entry.name))
    return found


def softirq_apart() -> bool:
    """Whether this kernel keeps softirq time off the processes it interrupts."""
    option = "CONFIG_IRQ_TIME_ACCOUNTING=y"
    with contextlib.suppress(OSError):
        return option in gzip.decompress(Path("/proc/config.gz").read_bytes()).decode().splitlines()
    with contextlib.suppress(OSError):
        return option in Path(f"/boot/config-{platform.release()}").read_text().splitlines()
    return False


def softirq_seconds(cpus: set[int]) -> float:
    """Softirq time of these CPUs as /proc/stat has it."""
    ticks = 0
    for line in Path("/proc/stat").read_text().splitlines():
        name, *fields = line.split()
        if name.removeprefix("cpu").isdigit() and int(name[3:]) in cpus:
            ticks += int(fields[6])
    return ticks / os.sysconf("SC_CLK_TCK")


class Bench:
    def __init__(self, traffic: Path, cpus: set[int]) -> None:
        self.traffic = traffic
        self.cpus = cpus
        self.softirq = softirq_threads()
        self.apart = softirq_apart()

    def interrupts(self) -> float:
        """CPU seconds so far that are in no process's clock but the kernel's own."""
        # Where softirq time is kept apart, that of the softirq threads is part of it.
        return softirq_seconds(self.cpus) if self.apart else sum(map(process_cpu, self.softirq))

    def run(self, path: Running, *mode: str) -> tuple[dict[str, float], float, float]:
        """What the traffic program printed, all CPU seconds of the run, and the queue process's."""
        queue = path.cpu
        softirq = self.interrupts()
        done = subprocess.run(
            [str(self.traffic), path.client, path.server, SERVER, *mode],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            preexec_fn=lambda: os.sched_setaffinity(0, self.cpus),
        )
        if done.returncode:
            raise SystemExit(f"{path.path.name}: {done.stderr.strip()}")
        result: dict[str, float] = json.loads(done.stdout)
        queue = path.cpu - queue
        return result, result["cpu"] + queue + self.interrupts() - softirq, queue

    def udp(self, path: Running, seconds: float) -> Sample:
        result, cpu, queue = self.run(path, "udp", str(seconds), str(WINDOW), str(FLOWS))
        packets = max(result["packets"], 1)
        return {
            "cpu_us": cpu / packets * 1e6,
            "queue_us": queue / packets * 1e6,
            "per_core": packets / cpu,
            "lost": result["lost"],
        }

    def tcp(self, path: Running, seconds: float) -> Sample:
        result, cpu, _ = self.run(path, "tcp", str(seconds))
        octets = max(result["bytes"], 1)
        return {"gbit": octets * 8e-9 / result["seconds"], "cpu_ns": cpu / octets * 1e9}

    def connect(self, path: Running, count: int) -> Sample:
        result, cpu, _ = self.run(path, "connect", str(count))
        return {
            "rate": result["connections"] / result["seconds"],
            "p50": result["p50"],
            "p99": result["p99"],
            "cpu_us": cpu / result["connections"] * 1e6,
        }


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def compare(aim: Aim, rounds: dict[str, Rounds]) -> tuple[float, float, float]:
    of = rounds[aim.kind]
    return quartiles(
        [aim.value(a, b, c) for a, b, c in zip(of[aim.ours], of[aim.other], of["accept"], strict=True)]
    )


def measure(
    bench: Bench, running: dict[str, Running], rounds: int, seconds: float, count: int
) -> dict[str, Rounds]:
    results: dict[str, Rounds] = {"udp": {}, "tcp": {}, "connect": {}}
    plan: list[tuple[str, tuple[str, ...], Callable[[Running], Sample]]] = [
        ("udp", UDP_PATHS, lambda path: bench.udp(path, seconds)),
        ("tcp", TCP_PATHS, lambda path: bench.tcp(path, seconds)),
        ("connect", CONNECT_PATHS, lambda path: bench.connect(path, count)),
    ]
    for number in range(rounds):
        for kind, names, run_one in plan:
            # Turned by one place each round: no path always runs after the same neighbour.
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                results[kind].setdefault(name, []).append(run_one(running[name]))
        if sys.stderr.isatty():
            print(f"\rround {number + 1} of {rounds}", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    return results


def cell(samples: Sequence[Sample], key: str, digits: int) -> str:
    low, middle, high = quartiles([sample[key] for sample in samples])
    return f"{middle:,.{digits}f} ({low:,.{digits}f}-{high:,.{digits}f})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
                     for row in (head, ["-" * width for width in widths], *rows))  # fmt: skip


def report(results: dict[str, Rounds], judged: bool) -> str:
    text = {path.name: path.text for path in PATHS}
    udp, tcp, connect = results["udp"], results["tcp"], results["connect"]
    parts = [
        "64-byte UDP, every packet queued (median, quartiles)",
        table(
            ("path", "CPU us/packet", "of it queue process", "packets/s per core", "lost"),
            [
                (
                    text[name],
                    cell(samples, "cpu_us", 2),
                    cell(samples, "queue_us", 2),
                    cell(samples, "per_core", 0),
                    f"{sum(sample['lost'] for sample in samples):.0f}",
                )
                for name, samples in udp.items()
            ],
        ),
        "",
        "TCP, one connection",
        table(
            ("path", "Gbit/s", "CPU ns/byte"),
            [
                (text[name], cell(samples, "gbit", 2), cell(samples, "cpu_ns", 3))
                for name, samples in tcp.items()
            ],
        ),
        "",
        "New TCP connections, one after the other",
        table(
            ("path", "connections/s", "connect p50 us", "p99 us"),
            [
                (text[name], cell(samples, "rate", 0), cell(samples, "p50", 1), cell(samples, "p99", 1))
                for name, samples in connect.items()
            ],
        ),
        "",
        "Aims (median of the rounds' ratios, quartiles)",
    ]
    rows = []
    for aim in AIMS:
        low, middle, high = compare(aim, results)
        met = middle <= aim.limit if aim.at_most else middle >= aim.limit
        rows.append(
            (
                aim.text,
                f"{'<=' if aim.at_most else '>='} {aim.limit:g} {aim.unit}",
                f"{middle:.2f} ({low:.2f} to {high:.2f}) {aim.unit}",
                ("met" if met else "NOT MET") if judged else "too short to judge",
            )
        )
    for aim in ALSO:
        low, middle, high = compare(aim, results)
        rows.append((aim.text, "", f"{middle:.2f} ({low:.2f} to {high:.2f}) {aim.unit}", ""))
    parts.append(table(("comparison", "aim", "result", ""), rows))
    return "\n".join(parts)


def as_json(results: dict[str, Rounds], options: argparse.Namespace, cpus: set[int]) -> dict[str, Any]:
    return {
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": {
            "kernel": platform.release(),
            "cpus": os.cpu_count(),
            "python": platform.python_version(),
        },
        "options": {
            "rounds": options.rounds,
            "seconds": options.seconds,
            "connections": options.connections,
            "rules": options.rules,
            "cpus": sorted(cpus),
            "quick": options.quick,
        },
        "samples": results,
        "aims": [
            {
                "text": aim.text,
                "limit": aim.limit,
                "at_most": aim.at_most,
                "unit": aim.unit,
                **dict(zip(("q1", "median", "q3"), compare(aim, results), strict=True)),
            }
            for aim in AIMS
        ],
    }


def plot(results: dict[str, Rounds], target: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.2))
    for axis, (kind, key, title) in zip(
        axes,
        (("udp", "cpu_us", "CPU per packet, µs (lower is better)"),
         ("tcp", "gbit", "TCP Gbit/s (higher is better)"),
         ("connect", "p50", "connect p50, µs (lower is better)")),
        strict=True,
    ):  # fmt: skip
        names = list(results[kind])
        spread = [quartiles([sample[key] for sample in results[kind][name]]) for name in names]
        middle = [value for _, value, _ in spread]
        axis.barh(
            names,
            middle,
            xerr=[[m - low for low, m, _ in spread], [high - m for _, m, high in spread]],
            color=["#2a7" if name.startswith("podgate") else "#89a" for name in names],
            capsize=3,
        )
        axis.invert_yaxis()
        axis.set_title(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(target, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="podgate's packet path against its baselines, in network namespaces of its own.",
        epilog="example: sudo .venv/bin/python bench/whole_path.py --json bench/results/today.json",
    )
    parser.add_argument("--rounds", type=int, default=11, help="interleaved rounds (default 11)")
    parser.add_argument(
        "--seconds", type=float, default=0.5, help="length of each UDP and TCP run (default 0.5)"
    )
    parser.add_argument("--connections", type=int, default=1500, help="connections per run (default 1500)")
    parser.add_argument("--rules", type=int, default=10_000, help="rules per direction (default 10000)")
    parser.add_argument(
        "--cpu", type=int, default=None, help="the CPU everything runs on (default: the last)"
    )
    parser.add_argument("--quick", action="store_true", help="a few seconds, to see that it works")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all samples")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw medians and quartiles")
    options = parser.parse_args()
    if os.geteuid() != 0:
        raise SystemExit("needs root: it makes network namespaces")
    missing = [tool for tool in ("ip", "iptables-restore", "ipset", "sysctl") if not shutil.which(tool)]
    if missing:
        raise SystemExit(f"needs {', '.join(missing)}: install iproute2, iptables, ipset and procps")
    if options.quick:
        options.rounds, options.seconds, options.connections = 1, 0.05, 50
    if min(options.rounds, options.connections, options.rules) < 1 or options.seconds <= 0:
        raise SystemExit("--rounds, --connections, --rules and --seconds must be positive")
    cpus = {options.cpu if options.cpu is not None else max(os.sched_getaffinity(0))}
    if not cpus <= os.sched_getaffinity(0):
        raise SystemExit(f"--cpu {options.cpu}: this process may use {sorted(os.sched_getaffinity(0))}")

    with tempfile.TemporaryDirectory() as where, contextlib.ExitStack() as stack:
        floor, traffic = compile_c(Path(where))
        running = {path.name: stack.enter_context(up(path, floor, options.rules, cpus)) for path in PATHS}
        results = measure(Bench(traffic, cpus), running, options.rounds, options.seconds, options.connections)
    print(report(results, judged=options.rounds >= 9))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(as_json(results, options, cpus), indent=1) + "\n")
    if options.plot:
        options.plot.parent.mkdir(parents=True, exist_ok=True)
        plot(results, options.plot)


if __name__ == "__main__":
    main()
