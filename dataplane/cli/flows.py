"""`podgate flows`: live flows of this node's pods, with their verdicts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from dataplane.cli.client import ask, control_option, output_option


def _end(row: dict[str, Any], end: str) -> str:
    address = row[f"{end}_pod"] or row[end]
    port = row[f"{end}_port"]
    return f"{address}:{port}" if row["protocol"] in ("TCP", "UDP", "SCTP") else str(address)


def _judged(row: dict[str, Any]) -> str:
    ends = [name for name in ("egress", "ingress") if row[f"{name}_judged"]]
    return "+".join(ends) or "-"


def _print(rows: list[dict[str, Any]]) -> None:
    console = Console(highlight=False)
    table = Table("from", "to", "protocol", "state", "judged", "verdict", "reason", box=None, pad_edge=False)
    for row in rows:
        colour = "green" if row["verdict"] == "allow" else "red"
        table.add_row(
            _end(row, "src"),
            _end(row, "dst"),
            row["protocol"],
            row["state"] or "",
            _judged(row),
            f"[{colour}]{row['verdict']}[/]",
            row["reason"],
        )
    console.print(table)
    console.print(f"{len(rows)} flows", style="dim")


@click.command(epilog="Example:  podgate flows -o json | jq '.[] | select(.verdict == \"deny\")'")
@output_option
@control_option
def command(output: str, control: Path) -> None:
    """Show live flows of this node's pods from the kernel's conntrack table.

    "judged" tells which ends the kernel knows to be judged; the verdict is what the rules in force
    say of the flow now.
    """
    rows = ask(control, "flows")
    if output == "json":
        click.echo(json.dumps(rows))
    else:
        _print(rows)
