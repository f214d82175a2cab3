"""`podgate audit-report`: what enforcement would break of what an audit let through."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from dataplane.cli.client import ask, control_option, output_option
from dataplane.cli.objects import read_objects
from dataplane.cli.progress import progress
from dataplane.errors import InputError

if TYPE_CHECKING:
    from dataplane.observe.audit import AuditTally

STDIN = Path("-")
POLICIES_SHOWN = 3
WIDE = 240


def _read(paths: tuple[Path, ...]) -> AuditTally:
    """Add up flow logs. What is no line of one is told, and left out; a file without any is bad input."""
    from dataplane.observe.audit import AuditTally

    tally = AuditTally()
    for path in paths:
        good = bad = 0
        try:
            with progress(f"Reading {path}"):
                lines: Iterable[bytes]
                with sys.stdin.buffer if path == STDIN else path.open("rb") as lines:
                    for line in lines:
                        try:
                            record = json.loads(line)
                            if record.get("verdict") is not None:
                                tally.add(record)
                            good += 1
                        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                            bad += 1
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}") from None
        if bad and not good:
            raise InputError(
                f"{path}: no line of a flow log in it; it is what `podgate agent --flow-log` writes"
            )
        if bad:
            click.echo(
                f"podgate: warning: {path}: {bad} lines are no lines of a flow log; left out", err=True
            )
    return tally


def _from_logs(paths: tuple[Path, ...], objects: tuple[Path, ...]) -> dict[str, Any]:
    from dataplane.model import Snapshot
    from dataplane.policy.audit_report import audit_report
    from dataplane.policy.resolve import in_force

    known = read_objects(objects).snapshot if objects else Snapshot()
    tally = _read(paths)
    found = audit_report(tally, known, in_force(known))
    return {"auditing": None, "since": tally.begin, "lost": 0, "more": tally.more, **found}


def _print(answer: dict[str, Any]) -> None:
    # A pipe has no width: names are not cut there.
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else WIDE)
    since = f" since {answer['since']}" if answer["since"] else ""
    if answer["auditing"] is False and not answer["rows"]:
        console.print(
            "Nothing is in audit on this node: annotate a policy or namespace with podgate.dev/mode: audit,"
        )
        console.print("or run the agent with --audit.")
        return
    if not answer["rows"]:
        console.print(f"Nothing was seen{since} that enforcement would deny.")
        return
    console.print(f"Enforcement would deny, as seen{since} (packets: about one for each flow):")
    table = Table(box=None, pad_edge=False)
    for heading in ("packets", "direction", "from", "to", "port", "why", "policies"):
        table.add_column(heading, overflow="fold")
    for row in answer["rows"]:
        names = row["policies"]
        rest = len(names) - POLICIES_SHOWN
        table.add_row(
            f"{row['packets']:,}",
            row["direction"] or "-",
            row["from"],
            row["to"],
            row["port"],
            row["reason"],
            ", ".join(names[:POLICIES_SHOWN]) + (f" and {rest} more" if rest > 0 else ""),
        )
    console.print(table)
    if answer["more"] or answer["lost"]:
        console.print(f"and {answer['more'] + answer['lost']:,} packets that were not kept")
    if answer["suggestions"]:
        many = "policies" if len(answer["suggestions"]) > 1 else "policy"
        console.print(f"\nThe smallest {many} that would allow it:")
    for text in answer["suggestions"]:
        click.echo(text, nl=False)


@click.command(
    epilog="Example:  podgate audit-report\n\n"
    "From logs:  podgate audit-report /var/log/podgate/flows* --objects dump.yaml"
)
@click.argument("logs", metavar="[LOG]...", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "--objects",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="With LOG: the cluster's objects (kubectl get netpol,pods,ns,svc -A -o yaml), for the names of"
    " workloads and the policies to add. Repeatable.",
)
@output_option
@control_option
def command(logs: tuple[Path, ...], objects: tuple[Path, ...], output: str, control: Path) -> None:
    """Sum up what an audit let through: what enforcement would break.

    By policy, workload and port, with the smallest NetworkPolicies that would allow it. Without LOG from the
    running agent, of what it has seen since something was in audit; with LOG from flow logs (- is stdin).
    """
    if objects and not logs:
        raise InputError("--objects goes with LOG: the running agent has objects of its own")
    answer = _from_logs(logs, objects) if logs else ask(control, "audit")
    if output == "json":
        click.echo(json.dumps(answer))
    else:
        _print(answer)
