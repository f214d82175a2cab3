"""`podgate doctor`: what this machine offers and lacks."""

from __future__ import annotations

import json
from dataclasses import asdict

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dataplane.cli.client import output_option

_COLOURS = {"ok": "green", "lacks": "yellow", "missing": "red"}


@click.command(epilog="Example:  podgate doctor -o json")
@output_option
@click.pass_context
def command(ctx: click.Context, output: str) -> None:
    """Say what this machine's kernel and tools offer and lack for podgate, and what to do.

    Everything is tried out in a network namespace made for it; this machine's own rules are only
    read. Exit 0 when the agent can run here, 1 when something it needs is missing.
    """
    from dataplane.node.probe import State, machine

    checks = machine()
    able = all(check.state is not State.MISSING for check in checks)
    if output == "json":
        click.echo(json.dumps({"ok": able, "checks": [asdict(check) for check in checks]}))
    else:
        console = Console(highlight=False)
        table = Table("", "", "found", "what to do", box=None, pad_edge=False)
        for check in checks:
            table.add_row(
                f"[{_COLOURS[check.state]}]{check.state}[/]",
                check.name,
                escape(check.found),
                escape(check.remedy),
            )
        console.print(table)
        console.print("podgate can run here." if able else "podgate cannot run here yet.")
    ctx.exit(0 if able else 1)
