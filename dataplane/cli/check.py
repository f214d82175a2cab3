"""`podgate check`: policies that do something else than their author thinks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dataplane.cli.objects import read_objects
from dataplane.cli.progress import progress
from dataplane.errors import InputError

if TYPE_CHECKING:
    from dataplane.policy.check import Finding
    from dataplane.sources.directory import Place

_COLOURS = {"error": "red", "warning": "yellow", "note": "cyan"}


def _list(ctx: click.Context, _option: click.Parameter, wanted: bool) -> None:
    from dataplane.policy.check import CHECKS

    if not wanted or ctx.resilient_parsing:
        return
    for check in CHECKS.values():
        click.echo(f"{click.style(check.id, bold=True)}  ({check.severity})  {check.title}")
        click.echo(click.wrap_text(check.help, 96, "    ", "    "))
    ctx.exit()


def _split(_ctx: click.Context, _option: click.Parameter, values: tuple[str, ...]) -> frozenset[str]:
    from dataplane.policy.check import CHECKS

    ids = frozenset(part.strip() for value in values for part in value.split(",") if part.strip())
    for name in sorted(ids - CHECKS.keys()):
        raise InputError(f"--ignore {name}: there is no such check; `podgate check --list` shows them all")
    return ids


def _json(findings: Sequence[Finding], places: Mapping[str, Place], counts: dict[str, int]) -> dict[str, Any]:
    from dataplane.cli.sarif import place_of

    documents = []
    for finding in findings:
        source, line = place_of(finding, places) or (None, None)
        documents.append(
            {
                "id": finding.check,
                "severity": str(finding.severity),
                "object": finding.object or None,
                "field": finding.field or None,
                "message": finding.message,
                "mend": finding.mend,
                "source": source,
                "line": line,
            }
        )
    return {"findings": documents, "counts": counts}


def _print(findings: Sequence[Finding], places: Mapping[str, Place]) -> None:
    from dataplane.cli.sarif import place_of

    for _, group in groupby(findings, key=lambda finding: finding.object or finding.source):
        members = list(group)
        source, line = place_of(members[0], places) or (None, None)
        title = click.style(members[0].object or source or "", bold=True)
        where = f"{source}:{line}" if line else source
        click.echo(f"{title}  ({where})" if where and members[0].object else title)
        for finding in members:
            severity = click.style(str(finding.severity), fg=_COLOURS[finding.severity])
            click.echo(f"  {severity} {finding.check}" + (f": {finding.field}" if finding.field else ""))
            click.echo(f"    {finding.message}")
            click.echo(f"    {click.style('mend:', dim=True)} {finding.mend}")
        click.echo()


@click.command(
    epilog="Example:  kubectl get netpol,pods,ns,svc -A -o yaml > dump.yaml; podgate check dump.yaml"
)
@click.argument("paths", metavar="PATH...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Choice(["text", "json", "sarif"]),
    default="text",
    show_default=True,
    help="Text for people, JSON for machines, SARIF 2.1.0 for code scanning.",
)
@click.option(
    "--ignore",
    multiple=True,
    metavar="ID[,ID]",
    callback=_split,
    help="Leave out these checks. For one policy: its annotation podgate.dev/check-ignore.",
)
@click.option(
    "--list", is_flag=True, is_eager=True, expose_value=False, callback=_list, help="Explain every check."
)
def command(paths: tuple[Path, ...], output: str, ignore: frozenset[str]) -> None:
    """Find NetworkPolicies that do something else than their author thinks.

    PATH are files or directories with NetworkPolicies and what they are about: Pods, Namespaces and
    Services. The more of them, the more can be said; what cannot be known is not guessed. Exit 1 when
    anything was found, 0 when not, 2 when a path cannot be read.
    """
    from dataplane.policy.check import check, reported

    snapshot, places, _ = read_objects(paths, warn=False)  # what is wrong is found below
    if not snapshot.network_policies and not snapshot.policy_endpoints:
        click.echo("podgate: no NetworkPolicy here, so there is little to check", err=True)
    elif not snapshot.pods:
        click.echo("podgate: no Pod here, so only what the policies say by themselves is checked", err=True)
    with progress("Checking"):
        findings = check(snapshot, ignore)
    counts = {str(severity): count for severity, count in reported(findings).items()}
    if output == "json":
        click.echo(json.dumps(_json(findings, places, counts), indent=2))
    elif output == "sarif":
        from dataplane.cli.sarif import sarif

        click.echo(json.dumps(sarif(findings, places), indent=2))
    else:
        _print(findings, places)
        looked_at = f"{_counted(len(snapshot.network_policies), 'policy')} and " + _counted(
            len(snapshot.pods), "pod"
        )
        if findings:
            parts = ", ".join(_counted(count, name) for name, count in counts.items() if count)
            click.echo(f"{parts} in {looked_at}; `podgate check --list` explains each check")
        else:
            click.echo(f"nothing found in {looked_at}")
    if findings:
        click.get_current_context().exit(1)


def _counted(number: int, noun: str) -> str:
    plural = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"
