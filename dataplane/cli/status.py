"""`podgate status`: how the running agent is."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dataplane.cli import client
from dataplane.cli.client import TIMEOUT_SECONDS, ask, control_option, output_option
from dataplane.errors import AgentUnreachable, PodgateError
from dataplane.wording import count


class NotReady(PodgateError):
    """The agent answers, but is not ready: exit 1."""

    exit_code = 1


def _wait(control: Path, seconds: float) -> dict[str, Any]:
    deadline = time.monotonic() + seconds
    while True:
        try:
            # An agent that hangs must not make anybody wait for longer than they said.
            patience = max(deadline - time.monotonic(), 1.0) if seconds else TIMEOUT_SECONDS
            status: dict[str, Any] = ask(control, "status", timeout=patience)
            if status["ready"] or time.monotonic() >= deadline:
                return status
        except AgentUnreachable:
            if time.monotonic() >= deadline:
                raise
        time.sleep(0.05)


def _print(status: dict[str, Any]) -> None:
    console = Console(highlight=False)
    word = "[green]ready[/]" if status["ready"] else "[red]not ready[/]"
    console.print(
        f"{word}  generation {status['generation']}, "
        f"{count(status['pods'], 'pod')} under {count(status['policies'], 'policy', 'policies')}"
    )
    denied = "answered" if status["reject"] else "dropped"
    console.print(
        f"mode {status['mode']}, fail {status['fail']}, backend {status['backend']}, "
        f"iptables {status['iptables']}, what policies deny is {denied}",
        soft_wrap=True,
    )
    if status["audit"]:
        console.print("[yellow]audit[/]: nothing is dropped; see podgate audit-report")
    elif status["audited_pods"]:
        pods = count(status["audited_pods"], "pod has", "pods have")
        console.print(f"[yellow]audit[/]: {pods} policies in audit only; see podgate audit-report")
    if status["intercepted_pods"]:
        pods = count(status["intercepted_pods"], "pod")
        console.print(f"[yellow]intercept[/]: a hook is asked about packets of {pods}")
    queues = Table(
        "queue", "waiting", "dropped: queue full", "dropped: socket full", box=None, pad_edge=False
    )
    for queue in status["queues"]:
        queues.add_row(*(str(queue[name]) for name in ("num", "depth", "dropped", "user_dropped")))
    console.print(queues)
    if status["counters"]:
        counters = Table("reason", "packets", box=None, pad_edge=False)
        for reason, packets in sorted(status["counters"].items(), key=lambda item: -item[1]):
            counters.add_row(reason, f"{packets:,}")
        console.print(counters)
    for problem in status["problems"]:
        console.print(f"[yellow]problem[/]: {escape(problem)}", soft_wrap=True)


@click.command(epilog="Example:  podgate status --wait-ready 10")
@click.option(
    "--wait-ready",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="Wait until the agent is ready, at most this long.",
)
@click.option(
    "--is-own",
    is_flag=True,
    help="Only tell by the exit status whether an agent of this container answers, ready or not: a startup"
    " probe for an agent that takes over from another container's.",
)
@output_option
@control_option
def command(wait_ready: float | None, is_own: bool, output: str, control: Path) -> None:
    """Ask the running agent how it is. Exit 0 when it is ready, 1 when not or not reachable."""
    if is_own:
        if not client.is_own(control):
            raise NotReady(f"no agent of this container answers at {control}")
        return
    status = _wait(control, wait_ready or 0)
    if output == "json":
        click.echo(json.dumps(status))
    else:
        _print(status)
    if not status["ready"]:
        raise NotReady("the agent is not ready: " + ("; ".join(status["problems"]) or "still starting"))
