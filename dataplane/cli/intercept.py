"""`podgate intercept`: a user's Python function decides about packets of the running agent."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO

import click

from dataplane.cli.client import control_option, output_option
from dataplane.cli.hook_file import HookFile
from dataplane.errors import AgentUnreachable, InputError, KernelError
from dataplane.observe.lines import Lines, decision
from dataplane.observe.selection import Selection
from dataplane.wording import count

if TYPE_CHECKING:
    from aiohttp import ClientWebSocketResponse

PODS_NAMED = 5
FAREWELL_SECONDS = 2.0  # for the agent to tell the summary
OVERRIDES = ("allow", "drop", "rewrite", "delay")
# Of the summary, in this order.
_SUMMARY = {
    "engine": "left to the rules",
    "allow": "allowed",
    "drop": "dropped",
    "rewrite": "rewritten",
    "delay": "delayed",
    "error": "failed in the hook",
    "timeout": "not answered in time",
    "refused": "answered with what cannot be",
    "ended": "waiting when it ended",
    "busy": "not asked about while an answer was overdue",
    "full": "not asked about for want of room",
    "lost": "lost in a full queue",
    "nonsense": "answers about no packet",
}

Record = dict[str, Any]


def _say(text: str) -> None:
    click.echo(text, err=True)


def _header(began: Record, seconds: float) -> str:
    pods = began["pods"]
    latest = f", after {seconds:g} s at the latest" if seconds else ""
    more = f" and {len(pods) - PODS_NAMED} more" if len(pods) > PODS_NAMED else ""
    text = (
        f"Packets of {', '.join(pods[:PODS_NAMED])}{more} wait for the hook, {began['timeout'] * 1000:g} ms"
        f" at most each, until this ends{latest}: they pass no faster than Python answers. Ctrl-C ends it."
    )
    return text + (" The agent runs with --audit: what the hook drops passes." if began["audit"] else "")


def _note(did: str, why: str, proposed: Record) -> str:
    """What the line of a packet does not say: what the rules would have done, or why they decided."""
    rules = f"the rules: {proposed['verdict']}, {decision(proposed)}"
    notes = {
        "engine": "",
        "allow": rules,
        "drop": rules,
        "rewrite": f"rewritten, {why}; {rules}",
        "delay": f"delayed {why}",
        "timeout": "no answer in time",
        "ended": "the end came before the answer",
    }
    return notes.get(did, why)


class _Printer:
    """Writes what became of packets, in the form that was asked for."""

    def __init__(self, out: TextIO, as_json: bool, verbose: bool) -> None:
        self._out = out
        self._json = as_json
        self._verbose = verbose
        self._lines = Lines(colour=out.isatty() and "NO_COLOR" not in os.environ)
        self._told: set[str] = set()
        self.counts: Counter[str] = Counter()

    def show(self, proposed: Record, outcome: Record) -> None:
        did, why, record = outcome["did"], outcome["why"], outcome["record"]
        self.counts[did] += 1
        if did == "refused":
            self.warn(f"what the hook wants cannot be: {why}; the rules decide")
        elif did == "timeout":
            self.warn("the hook does not answer in time; until it does, the rules decide")
        if did not in OVERRIDES and not self._verbose:
            return
        if self._json:
            kept = {name: proposed.get(name) for name in ("verdict", "reason", "direction", "policy", "rule")}
            self._write(json.dumps({**record, "hook": did, "why": why or None, "proposed": kept}))
            return
        self._write(f"{self._lines.line(record)}  {_note(did, why, proposed)}".rstrip())

    def warn(self, text: str) -> None:
        """Say something the first time that there is reason for it."""
        if text not in self._told:
            self._told.add(text)
            _say(f"-- {text} --")

    def end(self, summary: dict[str, int], own: Counter[str]) -> None:
        """The last words. `own`: what the hook has counted itself."""
        if self._json:
            self._write(json.dumps({"summary": summary, "counted": dict(own)}))
        asked = summary.get("asked", 0)
        parts = [f"{summary[key]:,} {text}" for key, text in _SUMMARY.items() if summary.get(key)]
        _say(f"{count(asked, 'packet')}{': ' if parts else ''}{', '.join(parts)}")
        if own:
            _say("counted by the hook: " + ", ".join(f"{name} {number:,}" for name, number in own.items()))

    def _write(self, text: str) -> None:
        print(text, file=self._out, flush=True)


class _Conversation:
    """With the agent, about packets; the hook is called in the main thread, where Ctrl-C reaches it."""

    def __init__(
        self, control: Path, hook: HookFile, printer: _Printer, most: int | None, seconds: float
    ) -> None:
        self._control = control
        self._seconds = seconds
        self._hook = hook
        self._printer = printer
        self._left = most
        self._proposed: dict[int, Record] = {}
        self._in_hook = False
        self._leaving = False
        self._socket: ClientWebSocketResponse | None = None
        self._main: asyncio.Task[None] | None = None
        self._end: asyncio.Task[None] | None = None
        self.summary: dict[str, int] | None = None
        self.why: str | None = None
        self.asked = 0

    async def run(self, query: dict[str, str]) -> None:
        """Until the agent ends, or `leave`. AgentUnreachable, InputError or KernelError: it cannot begin."""
        import aiohttp

        self._main = asyncio.current_task()
        connector = aiohttp.UnixConnector(path=str(self._control))
        try:
            async with (
                aiohttp.ClientSession(connector=connector) as session,
                session.ws_connect(
                    "http://agent/intercept", params=query, max_msg_size=0, autoping=True
                ) as ws,
            ):
                self._socket = ws
                async for message in ws:
                    if message.type is not aiohttp.WSMsgType.TEXT:
                        break
                    await self._hear(json.loads(message.data))
                    if self.summary is not None:
                        break
        except aiohttp.WSServerHandshakeError as error:
            raise AgentUnreachable(
                f"the agent at {self._control} answers {error.status}: it is older than this command"
            ) from None
        except aiohttp.ClientConnectorError as error:
            self._not_there(error.os_error)
        except (aiohttp.ClientError, ConnectionError, json.JSONDecodeError):
            pass  # it ended in the middle of something
        except asyncio.CancelledError:
            if not self._leaving:
                raise

    def _not_there(self, error: OSError) -> None:
        if isinstance(error, PermissionError):
            said = f"{self._control}: permission denied; the agent's socket is root's"
        else:
            said = (
                f"no agent at {self._control}: start one with `podgate agent`, or name its socket"
                " with --control"
            )
        raise AgentUnreachable(said) from None

    async def _hear(self, item: Record) -> None:
        if "packet" in item:
            await self._asked(item)
        elif "did" in item:
            self._printer.show(self._proposed.pop(item["id"]), item)
            if self._left is not None:
                self._left -= 1
                if self._left == 0:
                    self.leave()
        elif "began" in item:
            _say(_header(item, self._seconds))
        elif "summary" in item:
            self.summary, self.why = item["summary"], item["why"]
        elif "error" in item:
            raise (KernelError if item.get("exit_code") == 1 else InputError)(item["error"])

    async def _asked(self, item: Record) -> None:
        self.asked += 1
        self._proposed[item["id"]] = item["packet"]
        if self._leaving or self._socket is None:
            return
        try:
            self._in_hook = True
            answer = self._hook.answer(item["packet"], base64.b64decode(item["data"]))
        except KeyboardInterrupt:
            self.leave()
            return
        finally:
            self._in_hook = False
        await self._socket.send_str(json.dumps({"id": item["id"], **answer}))
        if self.left:  # the hook has taken no notice of it
            self.leave()

    @property
    def left(self) -> bool:
        """Whether it was us who wanted to end."""
        return self._leaving

    def leave(self) -> None:
        """Ask the agent for the summary, and end once it is there. From within the event loop."""
        if self._end is not None or self._socket is None or self._main is None:
            return
        self._leaving = True
        self._end = asyncio.ensure_future(self._socket.send_str('{"end": true}'))
        asyncio.get_running_loop().call_later(FAREWELL_SECONDS, self._main.cancel)

    def interrupted(self, number: int, _frame: FrameType | None) -> None:
        """A signal that ends the command. A hook that takes no notice: the next signal kills."""
        signal.signal(number, signal.SIG_DFL)
        self._leaving = True
        if self._in_hook or self._main is None:
            raise KeyboardInterrupt
        loop = self._main.get_loop()
        loop.call_soon_threadsafe(self.leave if self._socket is not None else self._main.cancel)


@click.command(
    epilog="Example:  podgate intercept --hook drop_third_syn.py pod=shop/db 'tcp port 5432'\n\n"
    "FILE.py defines on_packet(packet, seen): `packet` is a scapy packet, `seen` what the rules say of it"
    " (seen.verdict, seen.reason, seen.policy, seen.src_pod …; seen.count(NAME) counts). It returns None (as"
    " the rules say), ALLOW, DROP or delay(SECONDS), imported from dataplane.hook, or a packet that goes on"
    " in the place of this one. FILTER is that of `podgate trace`: all packets of the pods that it means come"
    " by, and the hook is asked about those that it selects."
)
@click.argument("filter_", metavar="[FILTER]...", nargs=-1)
@click.option(
    "--hook",
    "file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path, allow_dash=True),
    metavar="FILE.py",
    required=True,
    help="The Python file with on_packet(packet, seen), or - for standard input. It runs here, not in the"
    " agent.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(0.001, 10),
    default=0.1,
    show_default=True,
    metavar="SECONDS",
    help="How long a packet waits for the hook; then it gets its verdict by the rules.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0),
    default=600,
    show_default=True,
    metavar="SECONDS",
    help="End after so long: one that was forgotten, or whose `kubectl exec` was cut off, does not go on. 0:"
    " never.",
)
@click.option("-v", "--verbose", is_flag=True, help="Show packets too that are left to the rules.")
@click.option("-n", "--count", "most", type=click.IntRange(min=1), metavar="N", help="End after N packets.")
@output_option
@control_option
def command(
    filter_: tuple[str, ...],
    file: Path,
    timeout: float,
    seconds: float,
    verbose: bool,
    most: int | None,
    output: str,
    control: Path,
) -> None:
    """Let a Python function decide about packets: drop, allow, change or delay them.

    For experiments: what do retries make of every third SYN lost, or of slow DNS? All other pods go their
    usual way. A hook that fails, or takes too long, leaves the packet to the rules; when this command
    ends, in whatever way, so does the interception.
    """
    selection = Selection.parse(filter_)
    selection.compile()
    out = sys.stdout
    if output == "json":
        sys.stdout = sys.stderr  # what the hook prints is no JSON
    hook = HookFile(file, _say)
    hook.warm_up()
    printer = _Printer(out, output == "json", verbose)
    conversation = _Conversation(control, hook, printer, most, seconds)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, conversation.interrupted)
    # A second time for a hook that takes no notice of the first.
    signal.setitimer(signal.ITIMER_REAL, seconds, 2 * FAREWELL_SECONDS)
    try:
        asyncio.run(conversation.run({"filter": str(selection), "timeout": str(timeout)}))
    except KeyboardInterrupt:
        pass  # in the hook, at an unlucky moment: the agent notices that we have gone
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.stdout = out
    printer.end(conversation.summary or {"asked": conversation.asked, **printer.counts}, hook.counts)
    if not conversation.left:
        ended = f": {conversation.why}" if conversation.why else ""
        raise AgentUnreachable(f"the agent at {control} ended{ended}")
