"""What `podgate trace` costs: packets per second with every packet queued, without and with a reader.

    sudo .venv/bin/python bench/trace.py [--rounds 11] [--seconds 1]

Two pods of a lab, the whole agent with `--no-offload`, and 64-byte UDP between them. "off": nobody reads;
"filtered": one reader whose filter leaves everything out; "reader": one reader of everything, as JSON
lines into /dev/null. Each round runs each once, in turn; the ratios are taken inside a round. Records
that the reader lost are shown: a reader may fall behind, the packets may not.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from paths import ENVIRONMENT  # noqa: E402
from whole_path import FLOWS, WINDOW, compile_c  # noqa: E402

from dataplane.addresses import format_address  # noqa: E402
from dataplane.lab.world import Lab  # noqa: E402
from dataplane.model import Key, Pod  # noqa: E402

PODGATE = (sys.executable, "-c", "from dataplane.cli import main; main()")
CLIENT, SERVER = "x/client", "x/server"
# What reads: arguments of `podgate trace`, None for nobody.
READERS: dict[str, Sequence[str] | None] = {"off": None, "filtered": ["pod=nobody/here"], "reader": []}


def policy(lab: Lab) -> dict[str, object]:
    """The server may be sent to by the client, and by nobody else."""
    pod = lab.pod(SERVER)
    selected = [
        {"name": "server", "namespace": "x", "podIP": format_address(ip), "hostIP": lab.address("node")}
        for ip in pod.ips
    ]
    spec = {
        "policyRef": {"name": "p", "namespace": "x"},
        "podIsolation": ["Ingress"],
        "podSelectorEndpoints": selected,
        "ingress": [{"cidr": lab.address(CLIENT)}],
    }
    return {
        "apiVersion": "networking.k8s.aws/v1alpha1",
        "kind": "PolicyEndpoint",
        "metadata": {"name": "p-1", "namespace": "x"},
        "spec": spec,
    }


@contextlib.contextmanager
def running_agent(lab: Lab, home: Path) -> Iterator[Path]:
    """The agent in the lab's node; its control socket."""
    control = home / "control.sock"
    source = home / "policies"
    source.mkdir()
    (source / "policy.json").write_text(json.dumps(policy(lab)))
    options = ["--no-offload", "--source", str(source), "--control", str(control)]
    for ip in lab.node_ips:
        options += ["--node-ip", format_address(ip)]
    with (home / "log").open("wb") as log:
        process = lab.popen("node", *PODGATE, "agent", *options, stderr=log, env=ENVIRONMENT)
        try:
            ready = [*PODGATE, "status", "--wait-ready", "60", "--control", str(control)]
            subprocess.run(ready, check=True, stdout=subprocess.DEVNULL, env=ENVIRONMENT)
            yield control
        finally:
            process.terminate()
            process.wait()


@contextlib.contextmanager
def reading(control: Path, filters: Sequence[str] | None, said: list[str]) -> Iterator[None]:
    """A reader while the block runs; what it says at its end goes to `said`."""
    if filters is None:
        yield
        return
    command = [*PODGATE, "trace", *filters, "-o", "json", "--control", str(control)]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    assert process.stderr is not None
    process.stderr.readline()  # it has begun
    try:
        yield
    finally:
        process.terminate()
        said += process.stderr.read().splitlines()[-1:]
        process.wait()


def rate(traffic: Path, lab: Lab, seconds: float) -> float:
    """Packets per second that arrived."""
    names = [lab.netns(CLIENT), lab.netns(SERVER), lab.address(SERVER)]
    command = [str(traffic), *names, "udp", str(seconds), str(WINDOW), str(FLOWS)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result = json.loads(done.stdout)
    return float(result["packets"]) / float(result["seconds"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--seconds", type=float, default=1.0)
    asked = parser.parse_args()
    if os.geteuid() != 0:
        raise SystemExit("needs root: it makes network namespaces")
    rates: dict[str, list[float]] = {name: [] for name in READERS}
    said: list[str] = []
    pods = [Pod(Key(*name.split("/"))) for name in (CLIENT, SERVER)]
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        _, traffic = compile_c(home)
        with Lab.up(f"pgt{os.getpid()}", pods) as lab, running_agent(lab, home) as control:
            rate(traffic, lab, asked.seconds)  # warm
            for number in range(asked.rounds):
                names = [*READERS]
                for name in names[number % len(names) :] + names[: number % len(names)]:
                    with reading(control, READERS[name], said if name == "reader" else []):
                        rates[name].append(rate(traffic, lab, asked.seconds))
    for name, values in rates.items():
        ratios = [value / off for value, off in zip(values, rates["off"], strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        ratio = f"{median:.2f} ({low:.2f} to {high:.2f})"
        print(f"{name:9} {statistics.median(values):9,.0f} packets/s   of off: {ratio}")
    print(f"the reader of everything, last round: {said[-1] if said else 'nothing'}")


if __name__ == "__main__":
    main()
