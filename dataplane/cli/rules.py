"""`podgate rules`: what the running agent enforces for one pod."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from dataplane.cli.client import ask, control_option, output_option


def _audit(side: dict[str, Any]) -> str:
    return " (in audit: what no rule allows passes too)" if side["audit"] else ""


def _print(answer: dict[str, Any]) -> None:
    console = Console(highlight=False)
    console.print(f"[bold]{answer['pod']}[/]  {', '.join(answer['addresses'])}")
    for direction in ("ingress", "egress"):
        side = answer[direction]
        if side is None:
            console.print(f"{direction}: not isolated, everything may pass")
            continue
        if not side["intervals"]:
            console.print(f"{direction}: isolated, nothing may pass{_audit(side)}")
            continue
        console.print(f"{direction}: isolated{_audit(side)}; may pass ({len(side['rules'])} rules):")
        table = Table("from" if direction == "ingress" else "to", "ports", "policy", "rule", box=None)
        for interval in side["intervals"]:
            for number, allowed in enumerate(interval["allowed"]):
                peer = interval["peer"] if number == 0 else ""
                table.add_row(peer, allowed["ports"], allowed["policy"], str(allowed["rule"]))
        console.print(table)


@click.command(epilog="Example:  podgate rules shop/db-0")
@click.argument("pod", metavar="NAMESPACE/POD")
@output_option
@control_option
def command(pod: str, output: str, control: Path) -> None:
    """Show the compiled rules of a pod: which peers it may talk to, and which policy says so."""
    answer = ask(control, "rules", {"pod": pod})
    if output == "json":
        click.echo(json.dumps(answer))
    else:
        _print(answer)
