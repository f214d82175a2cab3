"""`podgate trace`: live verdicts of the running agent."""

from __future__ import annotations

import base64
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import click

from dataplane.cli.client import control_option, output_option, streaming
from dataplane.errors import AgentUnreachable, InputError
from dataplane.observe.lines import Lines, decision
from dataplane.observe.selection import Selection

PODS_NAMED = 5

Record = dict[str, Any]


def _say(text: str) -> None:
    click.echo(text, err=True)


def _header(began: Record) -> str:
    """What the reader is going to see, and what not."""
    pods = began["every_packet_of"]
    if pods is not None:
        more = f" and {len(pods) - PODS_NAMED} more" if len(pods) > PODS_NAMED else ""
        names = ", ".join(pods[:PODS_NAMED]) + more
        return f"Every packet of {names}, until this ends. Ctrl-C ends it."
    if not began["offload"]:
        return (
            "Every packet that is judged. Pods without a policy show none (--every-packet shows all)."
            " Ctrl-C ends it."
        )
    return (
        "Flows that the kernel passes show only the packets that opened them, and pods without a policy"
        " none (--every-packet shows all). Ctrl-C ends it."
    )


class _Printer:
    """Writes records as they come, in every form that was asked for."""

    def __init__(self, output: str, verbose: bool, capture: Callable[[Record], None] | None, quiet: bool):
        self._json = output == "json"
        self._verbose = verbose
        self._capture = capture
        self._quiet = quiet
        self._lines = Lines(colour=sys.stdout.isatty() and "NO_COLOR" not in os.environ)
        self.records = 0
        self.lost = 0

    def show(self, record: Record) -> None:
        if "lost" in record:
            self.lost += record["lost"]
        else:
            self.records += 1
            if self._capture is not None:
                self._capture(record)
        if self._quiet:
            return
        if self._json:
            print(json.dumps(record), flush=True)
            return
        print(self._lines.line(record), flush=True)
        if self._verbose and "lost" not in record:
            from dataplane.observe.decode import layers

            for line in layers(base64.b64decode(record["data"])):
                print(f"    {line}", flush=True)

    def summary(self) -> str:
        lost = f", {self.lost:,} lost" if self.lost else ""
        return f"{self.records:,} {'record' if self.records == 1 else 'records'}{lost}"


def _capturing(path: Path, done: ExitStack) -> Callable[[Record], None]:
    from dataplane.observe.pcapng import CaptureFile, comment

    file = done.enter_context(CaptureFile(Path("/dev/stdout") if str(path) == "-" else path))

    def write(record: Record) -> None:
        packet = base64.b64decode(record["data"])
        file.write(record["ts"], packet, record["bytes"], comment(record, decision(record)))
        file.flush()

    return write


def _until(count: int | None, records: Iterator[Record], show: Callable[[Record], None]) -> bool:
    """Show records; True once there were `count`, False when the agent ended before."""
    seen = 0
    for record in records:
        show(record)
        seen += "lost" not in record
        if count is not None and seen >= count:
            return True
    return False


@click.command(
    epilog="Example:  podgate trace verdict=deny pod=shop/db 'tcp port 5432'\n\n"
    "FILTER: all of FIELD=VALUE[,VALUE…] or FIELD!=VALUE, and a pcap-filter expression. Fields: verdict,"
    " reason, direction, policy, pod, namespace, from, to. Pods and policies are NAMESPACE/NAME; * stands"
    " for any part. from and to take IP addresses too."
)
@click.argument("filter_", metavar="[FILTER]...", nargs=-1)
@click.option(
    "--every-packet",
    is_flag=True,
    help="Show every packet of the pods that FILTER names (else of all), judged or not: flows in the kernel"
    " and pods without a policy too, for as long as this runs. No verdict depends on it.",
)
@click.option("-v", "--verbose", is_flag=True, help="Decode each packet, layer by layer.")
@click.option(
    "--pcap",
    type=click.Path(dir_okay=False, path_type=Path, allow_dash=True),
    metavar="FILE",
    help="Write the packets to a pcapng file too, with the verdict as each packet's comment; - for standard"
    " output, without lines. The first 256 bytes of a packet are kept.",
)
@click.option("-n", "--count", type=click.IntRange(min=1), metavar="N", help="End after N packets.")
@output_option
@control_option
def command(
    filter_: tuple[str, ...],
    every_packet: bool,
    verbose: bool,
    pcap: Path | None,
    count: int | None,
    output: str,
    control: Path,
) -> None:
    """Show verdicts of the running agent as they are given: who, to whom, and why.

    Packets that the kernel's own rules drop (spoofed, invalid) never reach the agent: `podgate status`
    counts them.
    """
    selection = Selection.parse(filter_)
    selection.compile()
    to_stdout = pcap is not None and str(pcap) == "-"
    if to_stdout and sys.stdout.isatty():
        raise InputError("--pcap -: standard output is a terminal; redirect it, or name a file")
    query = {"filter": str(selection)}
    if every_packet:
        query["every-packet"] = "yes"
    if verbose or pcap is not None:
        query["data"] = "yes"
    signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # `timeout 10 podgate trace` ends as Ctrl-C does
    with suppress(OSError):
        os.nice(10)  # reading about packets is less urgent than packets
    if verbose:
        from dataplane.observe.decode import scapy_packet

        scapy_packet(b"")  # takes a second the first time: better now than when packets come
    with ExitStack() as done:
        records = done.enter_context(streaming(control, "trace", query))
        began = next(records, None)
        if began is None:
            raise AgentUnreachable(f"the agent at {control} ended")
        capture = _capturing(pcap, done) if pcap is not None else None
        printer = _Printer(output, verbose, capture, to_stdout)
        _say(_header(began))
        finished = True
        try:
            finished = _until(count, records, printer.show)
        except KeyboardInterrupt:
            pass  # how a person ends it
        finally:
            _say(printer.summary())
        if not finished:
            raise AgentUnreachable(f"the agent at {control} ended")
