"""`podgate cleanup`: removes everything of podgate from the kernel."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import click

from dataplane.cli.client import control_option, output_option
from dataplane.config import MarkLayout
from dataplane.errors import InputError


def _mask(ctx: click.Context, param: click.Parameter, value: str | None) -> MarkLayout | None:
    if value is None:
        return None
    try:
        return MarkLayout.from_mask(int(value, 0))
    except ValueError:
        raise InputError(f"--mark-mask {value}: not a number, write it like 0x70000000") from None


def _is_left_over(control: Path) -> bool:
    """Whether this is the socket of an agent that has crashed."""
    if not control.is_socket():
        return False
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(control))
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False


@click.command(epilog="Example:  ip netns exec my-node podgate cleanup")
@click.option(
    "--mark-mask",
    metavar="MASK",
    callback=_mask,
    envvar="PODGATE_MARK_MASK",
    help="The mark bits the agent used, where its rules are gone already.  [default: as the rules say]",
)
@output_option
@control_option
def command(mark_mask: MarkLayout | None, output: str, control: Path) -> None:
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
    if _is_left_over(control):
        control.unlink(missing_ok=True)
        removed.append(f"the socket {control}")
    if output == "json":
        click.echo(json.dumps({"removed": removed}))
    elif removed:
        for line in removed:
            click.echo(f"removed {line}")
    else:
        click.echo("nothing of podgate is here")
