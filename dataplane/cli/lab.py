"""`podgate lab`: pods as network namespaces on this machine, and real packets between them."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dataplane.addresses import format_address
from dataplane.cli.objects import read_objects
from dataplane.errors import InputError

if TYPE_CHECKING:
    from dataplane.lab.world import Lab
    from dataplane.model import Key, Pod
    from dataplane.reachability import Matrix

name_option = click.option(
    "--name", default="podgate", show_default=True, metavar="N", help="Which lab; its namespaces are N-…"
)
output_option = click.option(
    "-o",
    "--output",
    type=click.Choice(["table", "json"]),
    default="table",
    show_default=True,
    help="A table for people, JSON for machines.",
)


@click.group()
def command() -> None:
    """Pods as network namespaces on this machine: try policies without a cluster.

    A lab is a node namespace with one namespace per pod, wired as the Amazon VPC CNI does it, and
    an outside world beyond the node's uplink. Every container port of every pod answers.

    \b
    Example:
      podgate lab up deploy/examples/stars/pods.yaml
      podgate lab probe --port 80/TCP
      podgate lab exec node -- podgate agent --source deploy/examples/stars
      podgate lab down
    """


@command.command(epilog="Example:  podgate lab up pods.yaml --name shop")
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="PATH…")
@name_option
def up(paths: tuple[Path, ...], name: str) -> None:
    """Make a network namespace of every Pod object in PATH (files or directories of YAML or JSON)."""
    from dataplane.lab import rootless
    from dataplane.lab.world import Lab

    pods = _pods(paths)
    borrowed = rootless.needed()
    if borrowed:
        rootless.create(name)
        rootless.enter(name)
    try:
        lab = Lab.up(name, pods)
    except BaseException:
        if borrowed:
            rootless.end_holder()
        raise
    width = max(len(str(key)) for key in lab.pods)
    for key, pod in lab.pods.items():
        ips = " ".join(format_address(ip) for ip in pod.ips)
        click.echo(f"{key!s:<{width}}  {ips}")
    click.echo(f"{'node':<{width}}  {' '.join(format_address(ip) for ip in lab.node_ips)}")
    suffix = "" if name == "podgate" else f" --name {name}"
    click.echo(f"Next:  podgate lab probe{suffix}    who reaches whom, with real packets")
    click.echo(f"       podgate lab exec{suffix} {next(iter(lab.pods))} -- ip addr")
    source = " ".join(f"--source {path}" for path in paths)
    own = " ".join(f"--node-ip {format_address(ip)}" for ip in lab.node_ips)
    click.echo(f"       podgate lab exec{suffix} node -- podgate agent {source} {own}")
    click.echo(f"       podgate lab down{suffix}")


@command.command(epilog="Example:  podgate lab down --name shop")
@name_option
def down(name: str) -> None:
    """Take a lab away, with everything that runs in it; what a crash left, too."""
    from dataplane.lab import rootless, world

    if rootless.needed():
        rootless.enter(name)
        try:
            with contextlib.suppress(InputError):  # its making died before it had any state
                world.down(name)
        finally:
            rootless.end_holder()
    else:
        world.down(name)


@command.command("list", epilog="Example:  podgate lab list")
def list_() -> None:
    """Name the labs that are up."""
    from dataplane.lab import rootless, world

    for name in rootless.names() if rootless.needed() else world.names():
        click.echo(name)


@command.command(
    "exec",
    context_settings={"ignore_unknown_options": True},
    epilog="Example:  podgate lab exec stars/frontend -- ping -c1 10.1.0.5",
)
@name_option
@click.argument("place", metavar="POD|node|outside")
@click.argument("argv", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- COMMAND…")
def exec_(name: str, place: str, argv: tuple[str, ...]) -> None:
    """Run a command in a pod (namespace/name), in the node, or in the outside world."""
    line = _open(name).command(place, argv)
    sys.stdout.flush()
    os.execvp(line[0], line)


@command.command(
    epilog="Example:  podgate lab probe --port 80/TCP --port ICMP --family 6 --external 2001:db8::9"
)
@name_option
@click.option(
    "--port",
    "ports",
    multiple=True,
    metavar="PORT",
    help="80/TCP, 53/UDP, 7/SCTP or ICMP; repeatable. Default: every port that a pod declares.",
)
@click.option("--family", type=click.Choice(["4", "6"]), help="Default: that of the pods' first address.")
@click.option(
    "--external", "externals", multiple=True, metavar="IP", help="Also to and from this outside IP."
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0.05, max=60),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="How long silence means denied; one wait for the whole table.",
)
@output_option
def probe(
    name: str,
    ports: tuple[str, ...],
    family: str | None,
    externals: tuple[str, ...],
    timeout: float,
    output: str,
) -> None:
    """Find out who reaches whom by sending real packets, all pairs at once.

    A port that some pod does not serve is answered for it while the probe runs: the table shows
    what the network lets through.
    """
    from dataplane.lab.probe import Port, served
    from dataplane.lab.probe import probe as run

    lab = _open(name)
    chosen = [Port.parse(port) for port in ports] or sorted({port for _, port in served(lab)})
    if not chosen:
        raise InputError(f"lab {name}: no pod declares a port; say which with --port 80/TCP")
    matrix = run(lab, chosen, int(family) if family else None, externals, timeout)
    if output == "json":
        click.echo(json.dumps(matrix.to_json()))
    else:
        _print(matrix)


@command.command(epilog="Example:  podgate lab demo stars")
@click.argument("which", metavar="[NAME]", default="stars")
def demo(which: str) -> None:
    """Watch policies take effect on real packets, step by step; needs about half a minute.

    The only one so far is `stars`, after the example of the EKS user guide.
    """
    from dataplane.lab import demo as player

    sys.exit(player.play(which))


def _pods(paths: Sequence[Path]) -> list[Pod]:
    """The pods to make. One without an address gets it from a PolicyEndpoint that names it, if any."""
    snapshot = read_objects(paths).snapshot
    stated: dict[Key, dict[bytes, None]] = {}
    hosts: dict[Key, dict[bytes, None]] = {}
    for policy in snapshot.policy_endpoints:
        for endpoint in policy.endpoints:
            stated.setdefault(endpoint.pod, {})[endpoint.pod_ip] = None
            hosts.setdefault(endpoint.pod, {})[endpoint.host_ip] = None
    pods = [
        pod
        if pod.ips or pod.host_network or pod.key not in stated
        else replace(pod, ips=tuple(stated[pod.key]), host_ips=pod.host_ips or tuple(hosts[pod.key]))
        for pod in snapshot.pods
        if not pod.finished
    ]
    if not pods:
        raise InputError(f"{' '.join(map(str, paths))}: holds no Pod object, so there is nothing to make")
    return pods


def _open(name: str) -> Lab:
    from dataplane.lab import rootless
    from dataplane.lab.world import Lab

    if rootless.needed():
        rootless.enter(name)
    return Lab.open(name)


def _print(matrix: Matrix) -> None:
    from rich.console import Console

    from dataplane.lab.view import print_matrix

    print_matrix(matrix, Console(highlight=False))
