"""`podgate top`: a live view of the running agent in a terminal."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

import click

from dataplane.cli.client import ask, control_option
from dataplane.errors import AgentUnreachable
from dataplane.observe.selection import Selection

WIDE = 240  # columns of a snapshot, where lines are not to be broken


async def _view(control: Path, selection: Selection) -> int | None:
    from dataplane.cli.top_feed import Agent
    from dataplane.cli.top_view import TopView

    async with Agent(control) as agent:
        view = TopView(agent, selection)
        await view.run_async()
        return view.return_code


async def _snapshot(control: Path, selection: Selection, seconds: float) -> None:
    from rich.console import Console

    from dataplane.cli.progress import progress
    from dataplane.cli.top_feed import Agent, Feed
    from dataplane.cli.top_view import plain

    async with Agent(control) as agent:
        feed = Feed(agent, selection)
        with progress(f"watching for {seconds:g} s"), suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await feed.run()
    if feed.trouble:
        raise AgentUnreachable(feed.trouble)
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else WIDE)
    for part in plain(feed.top, time.monotonic()):
        console.print(part)


@click.command(
    epilog="Example:  podgate top verdict=deny namespace=shop\n\n"
    "FILTER: as of `podgate trace`. It selects denials, verdicts and talkers; the numbers at the top are of"
    " the whole agent."
)
@click.argument("filter_", metavar="[FILTER]...", nargs=-1)
@click.option(
    "--once",
    is_flag=True,
    help="Watch for --seconds, print what was seen and end; the default without a terminal.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0.5, max=3600),
    default=3.0,
    show_default=True,
    help="How long --once watches.",
)
@control_option
def command(filter_: tuple[str, ...], once: bool, seconds: float, control: Path) -> None:
    """Watch the running agent: denials by pod and policy, top talkers, the latest verdicts.

    Keys: Tab the next table, Enter the explanation of a line, / a filter, space stops the rows, q quits.

    Flows that the kernel passes show only the packets that opened them; their bytes are conntrack's, where
    it counts (net.netfilter.nf_conntrack_acct=1).
    """
    selection = Selection.parse(filter_)
    selection.compile()
    ask(control, "status")  # no agent: say so in a line, before the screen is ours
    with suppress(OSError):
        os.nice(10)  # reading about packets is less urgent than packets
    if once or not (sys.stdout.isatty() and sys.stdin.isatty()):
        asyncio.run(_snapshot(control, selection, seconds))
        return
    sys.exit(asyncio.run(_view(control, selection)) or 0)
