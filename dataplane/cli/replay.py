"""`podgate replay`: a capture through the engine, and what other policies would change."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dataplane.cli.captures import (
    columns,
    open_capture,
    open_file,
    parse_filter,
    port_name,
    warn_of_end,
)
from dataplane.cli.client import output_option
from dataplane.cli.objects import read_objects
from dataplane.cli.progress import progress
from dataplane.wording import count

if TYPE_CHECKING:
    from dataplane._pcap import Capture
    from dataplane._replay import Replay
    from dataplane.replay import Count, Policies, Summary, Talk

SHOWN = 50  # rows of a table
_NAMED = 5  # Services named in one note


@click.command(
    epilog="Example:  tcpdump -i any -w dump.pcap; podgate replay dump.pcap policies/"
    " --filter 'tcp port 80' --diff policies-of-tomorrow/"
)
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path, allow_dash=True))
@click.argument("paths", metavar="PATH...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--filter", "expression", metavar="EXPR", help="Only these packets: 'host 10.0.0.5 and tcp'.")
@click.option("--summary", is_flag=True, help="The summary alone, without a line for each packet.")
@click.option(
    "--diff",
    "others",
    multiple=True,
    metavar="PATH",
    type=click.Path(path_type=Path),
    help="What would change with the objects in PATH instead; repeatable. No line for each packet.",
)
@click.option("--all", "everything", is_flag=True, help=f"Every row of the summary, not {SHOWN}.")
@output_option
def command(
    file: Path,
    paths: tuple[Path, ...],
    expression: str | None,
    summary: bool,
    others: tuple[Path, ...],
    everything: bool,
    output: str,
) -> None:
    """Judge the packets of the capture FILE by the policies in PATH.

    FILE is a pcap or pcapng file (`-`: standard input) of Ethernet, Linux cooked or raw IP. PATH are
    files or directories with NetworkPolicy, Pod, Namespace, Service and PolicyEndpoint objects: pods
    are known by their addresses.

    Shows the verdict for each packet, then who talked to whom and which policies decided. With
    `-o json`: a record for each packet, one per line; with --summary or --diff one document with the
    flows. Flows are judged in the direction in which they were opened.
    """
    from dataplane.replay import Policies, changes, read_packets, read_through, summarise

    chosen = parse_filter(expression)
    known = read_objects(paths).snapshot
    other = read_objects(others).snapshot if others else None
    packet_by_packet = not summary and other is None
    with open_file(file) as opened:
        capture = open_capture(opened, str(file))
    policies = Policies(known)
    replay = policies.replay(chosen)
    if packet_by_packet:
        _print_packets(read_packets(replay, capture, policies.names), output)
    else:
        with progress(f"Replaying {file}"):
            read_through(replay, capture)
    warn_of_end(capture, str(file))
    if packet_by_packet and output == "json":
        return
    with progress("Gathering flows"):
        talks = replay.talks()
        found = summarise(talks, policies)
        changed = changes(talks, policies, Policies(other)) if other is not None else None
    if output == "json":
        click.echo(json.dumps(_document(file, capture, replay, policies, found, changed)))
        return
    if packet_by_packet and capture.packets:
        click.echo()
    limit = None if everything else SHOWN
    click.echo("\n".join(_summary(file, capture, replay, policies, found, limit)))
    if changed is not None:
        click.echo("\n".join(_changes(changed, others, limit)))


def _print_packets(records: Iterator[dict[str, Any]], output: str) -> None:
    from dataplane.observe.lines import Lines

    lines = Lines(colour=sys.stdout.isatty())
    for record in records:
        click.echo(json.dumps(record) if output == "json" else lines.line(record))


# --- text ------------------------------------------------------------------------------------------------


def _summary(
    file: Path, capture: Capture, replay: Replay, policies: Policies, found: Summary, limit: int | None
) -> Iterator[str]:
    first, last = replay.times
    when = f", {(last - first) / 1e9:.3g} s from {_time(first)}" if first else ""
    yield click.style(f"{file}: {count(capture.packets, 'packet')}{when}, {capture.link}", bold=True)
    denied = [amount for talk, amount in found.talks if not talk.allow]
    flows = sum(amount.flows for _, amount in found.talks)
    if flows:
        lost = sum(amount.flows for amount in denied)
        yield f"{count(flows, 'flow')} of pods: {flows - lost:,} allowed, {lost:,} denied"
    else:
        yield "no flow of a pod that is known here"
    yield from (f"note: {note}" for note in _notes(capture, replay, policies, found))
    if found.talks:
        yield ""
        yield from _talks(found.talks, limit, ("allow", "deny"), "VERDICT")
    if found.by_policy or found.denied_by:
        yield ""
        yield from _by_policy(found, limit)


def _talks(
    talks: Sequence[tuple[Talk, Count]], limit: int | None, words: tuple[str, str], title: str
) -> Iterator[str]:
    from dataplane.observe.lines import decision

    rows = [(title, "FROM", "TO", "PORT", "FLOWS", "PACKETS", "BYTES", "DECIDED BY")]
    for talk, amount in talks[:limit]:
        record: dict[str, Any] = {
            "verdict": "allow" if talk.allow else "deny",
            "reason": talk.reason.text,
            "direction": talk.direction,
            **{
                str(way): {"reason": "policy-rule", "policy": str(policy), "rule": rule}
                for way, policy, rule in talk.policies
            },
        }
        rows.append(
            (
                click.style(words[not talk.allow], fg="green" if talk.allow else "red"),
                talk.source,
                talk.destination,
                port_name(talk.protocol, talk.port),
                *_amounts(amount),
                decision(record),
            )
        )
    yield from columns(rows, frozenset({4, 5, 6}))
    if limit is not None and len(talks) > limit:
        yield f"and {len(talks) - limit:,} more (--all shows them)"


def _by_policy(found: Summary, limit: int | None) -> Iterator[str]:
    rows = [("POLICY", "FLOWS", "PACKETS", "BYTES")]
    rows += [(f"{policy} allowed", *_amounts(amount)) for policy, amount in found.by_policy]
    for isolating, direction, amount in found.denied_by:
        names = ", ".join(map(str, isolating)) or "any policy"
        rows.append((f"no {direction} rule of {names} allowed", *_amounts(amount)))
    yield from columns(rows if limit is None else rows[: limit + 1], frozenset({1, 2, 3}))


def _amounts(amount: Count) -> tuple[str, str, str]:
    return f"{amount.flows:,}", f"{amount.packets:,}", f"{amount.bytes:,}"


def _notes(capture: Capture, replay: Replay, policies: Policies, found: Summary) -> Iterator[str]:
    """What a reader of the numbers should know of how they came about."""
    from dataplane.reasons import Reason
    from dataplane.verdict import Began

    if capture.others:
        yield f"{count(capture.others, 'frame')} without IP passed over"
    if replay.unmatched:
        yield f"{count(replay.unmatched, 'packet')} left out by the filter"
    if replay.again:
        yield (
            f"{count(replay.again, 'packet')} captured more than once on the way, as `tcpdump -i any` does,"
            " counted once"
        )
    if replay.cut:
        yield (
            f"{count(replay.cut, 'packet')} captured too short to be judged; `tcpdump -s 256` captures enough"
        )
    began = found.began
    if before := began.total():
        how = [
            f"{began[kind]:,} {text}"
            for kind, text in (
                (Began.ANSWERED, "told by a first packet that answers"),
                (Began.BY_PORTS, "by their ports: the service's end was asked"),
                (Began.BY_SENDER, "taken to be opened by who was seen first"),
            )
            if began[kind]
        ]
        yield f"{count(before, 'flow')} began before the capture; their direction: {', '.join(how)}"
    if replay.stray:
        yield f"{count(replay.stray, 'ICMP error')} about flows that are not in the capture"
    if found.outside.flows:
        yield (
            f"{count(found.outside.flows, 'flow')} ({count(found.outside.packets, 'packet')}) between"
            " addresses that are no pods here: no matter of policy"
        )
    if not policies.names:
        yield "no pod is known here: give Pod objects too, as `kubectl get netpol,pods,ns,svc -A -o yaml` has"
    for (allow, reason), (packets, _bytes) in replay.totals().items():
        if not allow and reason in (Reason.MALFORMED, Reason.FRAGMENT):
            yield f"{count(packets, 'packet')} denied, {reason.text}: of no flow"
    if found.services:
        names = sorted(map(str, found.services))
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        yield (
            f"{count(found.services.total(), 'flow')} to the ClusterIP of {', '.join(names[:_NAMED])}{more}:"
            " policies judge packets as they are sent on to a pod, so capture where the pods receive"
        )


def _changes(changed: list[tuple[Talk, Count]], others: tuple[Path, ...], limit: int | None) -> Iterator[str]:
    yield ""
    where = " ".join(map(str, others))
    flows = [sum(amount.flows for talk, amount in changed if talk.allow is way) for way in (False, True)]
    yield click.style(
        f"With {where}: {count(flows[0], 'flow')} newly denied, {flows[1]:,} newly allowed", bold=True
    )
    if changed:
        yield from _talks(changed, limit, ("newly allowed", "newly denied"), "CHANGE")


def _time(when_ns: int) -> str:
    return datetime.fromtimestamp(when_ns // 1_000_000_000).astimezone().strftime("%Y-%m-%d %H:%M:%S")


# --- JSON ------------------------------------------------------------------------------------------------


def _document(
    file: Path,
    capture: Capture,
    replay: Replay,
    policies: Policies,
    found: Summary,
    changed: list[tuple[Talk, Count]] | None,
) -> dict[str, Any]:
    from dataplane.observe.events import describe_conversation

    first, last = replay.times
    verdicts: dict[str, dict[str, dict[str, int]]] = {"allow": {}, "deny": {}}
    for (allow, reason), (packets, length) in replay.totals().items():
        verdicts["allow" if allow else "deny"][reason.text] = {"packets": packets, "bytes": length}
    document: dict[str, Any] = {
        "capture": {
            "file": str(file),
            "link": capture.link,
            "first": _iso(first),
            "last": _iso(last),
            "packets": capture.packets,
            "without_ip": capture.others,
            "left_out": replay.unmatched,
            "seen_again": replay.again,
            "cut": replay.cut,
            "error": capture.error,
        },
        "verdicts": verdicts,
        "flows": [describe_conversation(each, policies.names) for each in replay.conversations()],
        "policies": [{"policy": str(policy), **_json(amount)} for policy, amount in found.by_policy],
        "denied_by": [
            {"policies": [str(key) for key in isolating], "direction": str(direction), **_json(amount)}
            for isolating, direction, amount in found.denied_by
        ],
    }
    if changed is not None:
        document["changes"] = [
            {
                "verdict": "allow" if talk.allow else "deny",
                "reason": talk.reason.text,
                "src": talk.source,
                "dst": talk.destination,
                "protocol": port_name(talk.protocol, None),
                "dst_port": talk.port,
                **_json(amount),
            }
            for talk, amount in changed
        ]
    return document


def _json(amount: Count) -> dict[str, int]:
    return {"flows": amount.flows, "packets": amount.packets, "bytes": amount.bytes}


def _iso(when_ns: int) -> str | None:
    return datetime.fromtimestamp(when_ns / 1e9, UTC).isoformat(timespec="microseconds") if when_ns else None
