"""`podgate explain`: the engine's verdict for one packet, and why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from dataplane.cli.client import ask, control_option, output_option
from dataplane.errors import PodgateError


class NotAsExpected(PodgateError):
    """`--expect` was not met: exit 1."""

    exit_code = 1


def _from_files(paths: tuple[Path, ...], source: str, destination: str, port: str, family: str | None) -> Any:
    from dataplane.policy.compile import Compiler
    from dataplane.policy.explain import (
        explain,
        find_peer,
        known_pods,
        parse_family,
        parse_port,
        table_of_everything,
    )
    from dataplane.policy.resolve import in_force
    from dataplane.sources.directory import read_paths

    snapshot = in_force(read_paths(paths))
    for problem in snapshot.problems:
        click.echo(f"podgate: warning: {problem}", err=True)
    pods = known_pods(snapshot)
    return explain(
        table_of_everything(snapshot, Compiler()),
        find_peer(source, pods, "--from"),
        find_peer(destination, pods, "--to"),
        parse_port(port),
        parse_family(family),
    )


REASONS = {
    "policy-rule": "a rule allows it",
    "no-rule": "the pod is isolated in this direction and no rule of its policies matches",
    "not-isolated": "no policy isolates the pod in this direction",
    "not-a-pod": "not a pod that policies are enforced for here",
    "same-pod": "a pod may always talk to itself",
    "own-node": "traffic between a pod and its own node is never blocked",
    "spoofed": "the source is not an address of this pod",
    "no-table": "no rules are known for this pod yet",
}


def _end(label: str, who: str, end: dict[str, Any]) -> None:
    colour = "green" if end["verdict"] == "allow" else "red"
    click.echo(
        f"  {label} of {who}: " + click.style(f"{end['verdict']}, {end['reason']}", fg=colour), nl=False
    )
    if end["rule"]:
        rule = end["rule"]
        excepts = f" except {', '.join(rule['except'])}" if rule["except"] else ""
        ports = ", ".join(rule["ports"]) or "every port"
        click.echo(f"\n    policy {end['policy']}, rule {rule['index']}: {rule['cidr']}{excepts}, {ports}")
    else:
        click.echo(f"\n    {REASONS.get(end['reason'], end['reason'])}")


def _name(end: dict[str, Any]) -> str:
    return f"{end['pod']} ({end['ip']})" if end["pod"] else str(end["ip"])


def _print(answer: dict[str, Any]) -> None:
    allowed = answer["verdict"] == "allow"
    word = click.style("ALLOW" if allowed else "DENY", fg="green" if allowed else "red", bold=True)
    click.echo(f"{word}  {_name(answer['from'])} → {_name(answer['to'])}  {answer['port']}")
    _end("egress", answer["from"]["pod"] or answer["from"]["ip"], answer["egress"])
    _end("ingress", answer["to"]["pod"] or answer["to"]["ip"], answer["ingress"])


@click.command(epilog="Example:  podgate explain policies/ --from shop/web-0 --to shop/db-0 --port 5432/TCP")
@click.argument("paths", metavar="[PATH]...", nargs=-1, type=click.Path(path_type=Path))
@click.option("--from", "source", required=True, metavar="POD|IP", help="namespace/pod, or an IP address.")
@click.option("--to", "destination", required=True, metavar="POD|IP", help="namespace/pod, or an IP address.")
@click.option("--port", required=True, help="80/TCP, 53/UDP, 9999/SCTP or ICMP.")
@click.option("--family", type=click.Choice(["4", "6"]), help="IPv4 or IPv6; default: the first both have.")
@click.option("--expect", type=click.Choice(["allow", "deny"]), help="Exit 1 when the verdict is another.")
@output_option
@control_option
def command(
    paths: tuple[Path, ...],
    source: str,
    destination: str,
    port: str,
    family: str | None,
    expect: str | None,
    output: str,
    control: Path,
) -> None:
    """Say whether a packet would pass, and which policy and rule decide.

    With PATH: by the objects in those files, every pod in them. Without: by the rules the running
    agent has in force for the pods of its node.
    """
    if paths:
        answer = _from_files(paths, source, destination, port, family)
    else:
        query = {"from": source, "to": destination, "port": port, "family": family or ""}
        answer = ask(control, "explain", query)
    if output == "json":
        click.echo(json.dumps(answer))
    else:
        _print(answer)
    if expect and answer["verdict"] != expect:
        raise NotAsExpected(f"expected {expect}, the verdict is {answer['verdict']}")
