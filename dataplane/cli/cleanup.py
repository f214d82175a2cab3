"""`podgate cleanup`: removes everything of podgate from the kernel."""

from __future__ import annotations

import json

import click

from dataplane.cli.client import output_option
from dataplane.config import MarkLayout
from dataplane.errors import InputError


def _mask(ctx: click.Context, param: click.Parameter, value: str | None) -> MarkLayout | None:
    if value is None:
        return None
    try:
        return MarkLayout.from_mask(int(value, 0))
    except ValueError:
        raise InputError(f"--mark-mask {value}: not a number, write it like 0x70000000") from None


@click.command(epilog="Example:  ip netns exec my-node podgate cleanup")
@click.option(
    "--mark-mask",
    metavar="MASK",
    callback=_mask,
    envvar="PODGATE_MARK_MASK",
    help="The mark bits the agent used, where its rules are gone already.  [default: as the rules say]",
)
@output_option
def command(mark_mask: MarkLayout | None, output: str) -> None:
    """Remove podgate's rules, IP sets, device group bits and flow marks, after a crash too.

    Acts in the network namespace it is run in. Stop the agent first: it would miss them. From then on
    pods are not policed.
    """
    from dataplane.node import conntrack
    from dataplane.node.steering import installed_marks, remove_everything

    marks = mark_mask or installed_marks() or MarkLayout()
    removed = remove_everything()
    cleared = conntrack.clear_all(marks).cleared
    if cleared:
        removed.append(f"the marks {marks.saved:#x} of {cleared} connections")
    if output == "json":
        click.echo(json.dumps({"removed": removed}))
    elif removed:
        for line in removed:
            click.echo(f"removed {line}")
    else:
        click.echo("nothing of podgate is here")
