"""`podgate explain`: the engine's verdict for one packet, why, and what would allow it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from dataplane.cli.client import ask, control_option, output_option
from dataplane.cli.objects import read_objects
from dataplane.errors import PodgateError


class NotAsExpected(PodgateError):
    """`--expect` was not met: exit 1."""

    exit_code = 1


def _from_files(
    paths: tuple[Path, ...], source: str, destination: str, port: str, family: str | None, everything: bool
) -> Any:
    from dataplane.policy.compile import Compiler
    from dataplane.policy.explain import table_of_everything
    from dataplane.policy.explainer import Explainer
    from dataplane.policy.resolve import in_force

    known = read_objects(paths).snapshot
    resolved = in_force(known)
    explainer = Explainer(table_of_everything(resolved, Compiler()), known, resolved)
    return explainer.explain(source, destination, port, family, everything=everything)


REASONS = {
    "policy-rule": "a rule allows it",
    "no-rule": "the pod is isolated in this direction and no rule of its policies matches",
    "audit": "no rule of its policies matches; it passes all the same, because they are in audit",
    "not-isolated": "no policy isolates the pod in this direction",
    "not-a-pod": "not a pod that policies are enforced for here",
    "same-pod": "a pod may always talk to itself",
    "own-node": "traffic between a pod and its own node is never blocked",
    "spoofed": "the source is not an address of this pod",
    "no-table": "no rules are known for this pod yet",
}
POLICIES_SHOWN = 8


def _end(label: str, who: str, end: dict[str, Any], everything: bool) -> Iterator[str]:
    colour = "red" if end["verdict"] == "deny" else "yellow" if end["reason"] == "audit" else "green"
    yield f"  {label} of {who}: " + click.style(f"{end['verdict']}, {end['reason']}", fg=colour)
    if end["rule"]:
        rule = end["rule"]
        excepts = f" except {', '.join(rule['except'])}" if rule["except"] else ""
        ports = ", ".join(rule["ports"]) or "every port"
        yield f"    policy {end['policy']}, rule {rule['index']}: {rule['cidr']}{excepts}, {ports}"
        if " rule " not in end["field"]:  # where the policy itself is known
            yield f"    written as {end['policy']} {end['field']}"
    else:
        yield f"    {REASONS.get(end['reason'], end['reason'])}"
    policies = end["policies"]
    if policies:
        rest = 0 if everything else len(policies) - POLICIES_SHOWN
        names = ", ".join(policies if rest <= 0 else policies[:POLICIES_SHOWN])
        yield f"    isolated by {names}" + (f" and {rest} more" if rest > 0 else "")
    for candidate in end.get("candidates", ()):
        place = click.style(f"{candidate['policy']} {candidate['field']}", bold=True)
        yield f"      {place}: {candidate['sentence']}"
    for alike in end.get("more", ()):
        yield f"      {alike['sentence']}"
    if end.get("more"):
        yield "      (--all shows them)"


def _name(end: dict[str, Any]) -> str:
    return f"{end['pod']} ({end['ip']})" if end["pod"] else str(end["ip"])


def told(answer: dict[str, Any], *, everything: bool = False) -> Iterator[str]:
    """The agent's answer for people, with colour: lines, some of which hold line breaks."""
    allowed = answer["verdict"] == "allow"
    word = click.style("ALLOW" if allowed else "DENY", fg="green" if allowed else "red", bold=True)
    audited = [side for side in ("egress", "ingress") if answer[side]["reason"] == "audit"]
    if allowed and audited:
        word += click.style(f" (in audit: {' and '.join(audited)} would deny)", fg="yellow")
    yield f"{word}  {_name(answer['from'])} → {_name(answer['to'])}  {answer['port']}"
    for note in answer["notes"]:
        yield click.style(f"  note: {note}", fg="yellow")
    yield from _end("egress", answer["from"]["pod"] or answer["from"]["ip"], answer["egress"], everything)
    yield from _end("ingress", answer["to"]["pod"] or answer["to"]["ip"], answer["ingress"], everything)
    suggestions = answer["suggestions"]
    if suggestions:
        policies = [each for each in suggestions if each["manifest"]]
        many = "policies" if len(policies) > 1 else "policy"
        would = "allow it once enforced" if audited else "allow it"
        yield f"\nThe smallest {many} that would {would}:" if policies else "\nNo policy can be suggested:"
    for each in suggestions:
        yield each["yaml"].removesuffix("\n")


@click.command(epilog="Example:  podgate explain policies/ --from shop/web-0 --to shop/db-0 --port 5432/TCP")
@click.argument("paths", metavar="[PATH]...", nargs=-1, type=click.Path(path_type=Path))
@click.option("--from", "source", required=True, metavar="POD|IP", help="namespace/pod, or an IP address.")
@click.option("--to", "destination", required=True, metavar="POD|IP", help="namespace/pod, or an IP address.")
@click.option("--port", required=True, help="80/TCP, 53/UDP, 9999/SCTP or ICMP.")
@click.option("--family", type=click.Choice(["4", "6"]), help="IPv4 or IPv6; default: the first both have.")
@click.option("--expect", type=click.Choice(["allow", "deny"]), help="Exit 1 when the verdict is another.")
@click.option(
    "--all", "everything", is_flag=True, help="Every rule that did not match, not just the nearest."
)
@output_option
@control_option
def command(
    paths: tuple[Path, ...],
    source: str,
    destination: str,
    port: str,
    family: str | None,
    expect: str | None,
    everything: bool,
    output: str,
    control: Path,
) -> None:
    """Say whether a packet would pass, why, and what would allow one that is denied.

    With PATH: by the objects in those files, every pod in them. Without: by the rules the running
    agent has in force for the pods of its node.

    A denied end lists the rules of its policies with the reason why each did not match, nearest miss
    first, and the smallest NetworkPolicy that would allow the packet.
    """
    if paths:
        answer = _from_files(paths, source, destination, port, family, everything)
    else:
        query = {"from": source, "to": destination, "port": port, "family": family or ""}
        answer = ask(control, "explain", query | ({"all": "yes"} if everything else {}))
    if output == "json":
        click.echo(json.dumps(answer))
    else:
        for line in told(answer, everything=everything):
            click.echo(line)
    if expect and answer["verdict"] != expect:
        raise NotAsExpected(f"expected {expect}, the verdict is {answer['verdict']}")
