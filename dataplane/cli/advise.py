"""`podgate advise`: from recorded traffic to the policies that allow it."""

from __future__ import annotations

import io
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import click

from dataplane.cli.captures import (
    open_capture,
    open_file,
    parse_filter,
    port_name,
    warn_of_end,
)
from dataplane.cli.objects import read_objects
from dataplane.cli.progress import progress
from dataplane.errors import InputError, PodgateError
from dataplane.wording import count

if TYPE_CHECKING:
    from dataplane.advice import Proof, Traffic
    from dataplane.policy.advise import Advice, Seen

# The first bytes of pcap files, with micro- and nanoseconds in both byte orders, and of pcapng.
MAGIC = frozenset(
    bytes.fromhex(text) for text in ("a1b2c3d4", "d4c3b2a1", "a1b23c4d", "4d3cb2a1", "0a0d0d0a")
)
_NAMED = 10  # flows or workloads named in one list


class NotAllowed(PodgateError):
    """The advice does not allow what was seen: exit 1."""

    exit_code = 1


@click.command(
    epilog="Example:  kubectl get netpol,pods,ns,svc -A -o yaml > dump.yaml;"
    " podgate advise flows.jsonl dump.yaml > advised.yaml; podgate matrix dump.yaml advised.yaml"
)
@click.argument("file", metavar="CAPTURE|FLOWLOG", type=click.Path(path_type=Path, allow_dash=True))
@click.argument("paths", metavar="PATH...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--filter", "expression", metavar="EXPR", help="Of a capture only these packets: 'tcp port 80'."
)
@click.option(
    "--direction",
    type=click.Choice(["both", "ingress", "egress"]),
    default="both",
    show_default=True,
    help="What the policies isolate pods for.",
)
@click.option(
    "--outside-prefix",
    "length4",
    type=click.IntRange(0, 32),
    default=32,
    show_default=True,
    metavar="BITS",
    help="Allow IPv4 addresses outside by prefixes of this length.",
)
@click.option(
    "--outside-prefix6",
    "length6",
    type=click.IntRange(0, 128),
    default=128,
    show_default=True,
    metavar="BITS",
    help="The same for IPv6.",
)
@click.option("--unanswered", is_flag=True, help="Of a capture also what nobody answered.")
@click.option(
    "-o",
    "--output",
    type=click.Choice(["yaml", "json"]),
    default="yaml",
    show_default=True,
    help="YAML to apply, or JSON with what the proof found.",
)
def command(
    file: Path,
    paths: tuple[Path, ...],
    expression: str | None,
    direction: str,
    length4: int,
    length6: int,
    unanswered: bool,
    output: str,
) -> None:
    """Print the least NetworkPolicies that allow what a capture or a flow log holds, and nothing else.

    PATH are files or directories with the Pod, Namespace and Service objects of that time. Each
    workload that was seen gets one policy: pods are selected by the labels that outlive a roll-out,
    addresses outside are allowed one by one. The same traffic is then judged by the policies alone,
    and what they allow beyond it is told on stderr.

    What was denied is no part of the advice; nor is, of a capture, what nobody answered, nor ICMP,
    which no NetworkPolicy can name.
    """
    from dataplane.advice import Reader, prove
    from dataplane.model import Direction
    from dataplane.policy.advise import advise
    from dataplane.replay import Policies, read_through

    chosen = parse_filter(expression)
    known = read_objects(paths).snapshot
    policies = Policies(known)
    reader = Reader(policies)
    with _opened(file) as (source, is_capture):
        if is_capture:
            capture, replay = open_capture(source, str(file)), policies.replay(chosen)
            with progress(f"Replaying {file}"):
                read_through(replay, capture)
                traffic = reader.capture(replay.talks(), unanswered=unanswered)
            warn_of_end(capture, str(file))
        elif chosen is not None:
            raise InputError("--filter is for captures; choose lines of a flow log with jq")
        else:
            with progress(f"Reading {file}"), _lines(source) as lines:
                traffic = reader.flow_log(lines, str(file))
    with progress("Writing policies and trying them"):
        directions = tuple(Direction) if direction == "both" else (Direction(direction),)
        advice = advise(known, traffic.seen, directions=directions, lengths={4: length4, 6: length6})
        proof = prove(known, advice, traffic.seen)
    if output == "json":
        click.echo(json.dumps(_document(traffic, advice, proof)))
    else:
        _print(advice)
    for line in _told(traffic, advice, proof):
        click.echo(f"podgate: {line}", err=True)
    if proof.denied:
        raise NotAllowed(
            f"the advice does not allow all that was seen: {_few([_talk(each) for each in proof.denied])}"
        )


@contextmanager
def _opened(file: Path) -> Iterator[tuple[IO[bytes], bool]]:
    """The file, from its beginning, and whether it is a capture. InputError when it cannot be read."""
    try:
        with open_file(file) as given, tempfile.TemporaryFile(buffering=0) as copy:
            source = given
            if not given.seekable():  # a pipe: its first bytes could not be read twice
                shutil.copyfileobj(given, copy)
                source = copy
                source.seek(0)
            head = source.read(4)
            source.seek(0)
            if not head:
                raise InputError(f"{file}: is empty, neither a capture nor a flow log")
            yield source, head in MAGIC
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}") from None


def _lines(source: IO[bytes]) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BufferedReader(cast(io.RawIOBase, source)), "utf-8", "replace")


def _print(advice: Advice) -> None:
    from dataplane.manifests import to_yaml
    from dataplane.policy.suggest import policy_document

    for each in advice.policies:
        comments = "".join(f"# {comment}\n" for comment in each.comments)
        text = to_yaml([policy_document(each.policy)])
        click.echo(text.replace("---\n", f"---\n{comments}", 1), nl=False)


def _told(traffic: Traffic, advice: Advice, proof: Proof) -> Iterator[str]:
    """What to know of the advice: what it is made of, what it leaves out, what else it allows."""
    flows = sum(traffic.seen.values())
    yield (
        f"{count(len(advice.policies), 'policy', 'policies')} for {count(flows, 'flow')}"
        f" ({count(len(traffic.seen) - len(advice.left_out), 'different one')} that a policy can name)"
    )
    for why, number in sorted(traffic.passed_over.items()):
        yield f"not counted: {count(number, 'flow')} {why}"
    if traffic.missing or traffic.unreadable:
        lacking = [f"{number:,} {what}" for what, number in sorted(traffic.missing.items())]
        lacking += [f"{traffic.unreadable:,} unreadable"] if traffic.unreadable else []
        yield f"warning: the log lacks lines ({', '.join(lacking)}): what they would have told may be denied"
    if advice.left_out:
        yield (
            "left out, since a NetworkPolicy allows them only with every port besides: "
            + _few([_talk(each) for each in advice.left_out])
        )
    if not proof.denied and traffic.seen:
        yield "proven: with these policies alone all that traffic passes"
    for each in proof.more[:_NAMED]:
        yield (
            f"also allowed: {each.source} → {each.destination} {port_name(each.protocol, each.port)} between"
            f" {each.pairs - each.seen:,} more pairs of pods than the {each.seen:,} seen"
        )
    if len(proof.more) > _NAMED:
        yield f"also allowed: {len(proof.more) - _NAMED:,} more such grants (-o json lists them)"
    if proof.unasked:
        yield f"not looked into: {proof.unasked:,} pairs of pods that the advice may allow besides"


def _talk(each: Seen) -> str:
    from dataplane.addresses import format_address

    ends = [
        str(pod or format_address(address))
        for pod, address in ((each.source_pod, each.source), (each.destination_pod, each.destination))
    ]
    return f"{ends[0]} → {ends[1]} {port_name(each.protocol, each.port if _has_port(each) else None)}"


def _has_port(each: Seen) -> bool:
    from dataplane.model import PROTOCOL_NAMES

    return each.protocol in PROTOCOL_NAMES


def _few(texts: list[str]) -> str:
    more = f" and {len(texts) - _NAMED:,} more" if len(texts) > _NAMED else ""
    return ", ".join(texts[:_NAMED]) + more


def _document(traffic: Traffic, advice: Advice, proof: Proof) -> dict[str, Any]:
    from dataplane.policy.suggest import policy_document

    return {
        "policies": [
            {"manifest": policy_document(each.policy), "comments": list(each.comments)}
            for each in advice.policies
        ],
        "flows": sum(traffic.seen.values()),
        "not_counted": dict(sorted(traffic.passed_over.items())),
        "missing_lines": dict(sorted(traffic.missing.items())) | {"unreadable": traffic.unreadable},
        "left_out": [_talk(each) for each in advice.left_out],
        "denied": [_talk(each) for each in proof.denied],
        "also_allowed": [
            {
                "from": each.source,
                "to": each.destination,
                "port": port_name(each.protocol, each.port),
                "pairs": each.pairs,
                "seen": each.seen,
            }
            for each in proof.more
        ],
    }
