"""`podgate resolve`: NetworkPolicies as the PolicyEndpoints that enforce them."""

from __future__ import annotations

import json
from pathlib import Path

import click

from dataplane.cli.objects import read_objects
from dataplane.cli.progress import progress


@click.command(
    epilog="Example:  kubectl get netpol,pods,ns,svc -A -o yaml > dump.yaml; podgate resolve dump.yaml"
)
@click.argument("paths", metavar="PATH...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Choice(["yaml", "json"]),
    default="yaml",
    show_default=True,
    help="YAML documents, or one JSON List.",
)
def command(paths: tuple[Path, ...], output: str) -> None:
    """Print the PolicyEndpoints of the NetworkPolicies in PATH.

    PATH are files or directories with NetworkPolicy, Pod, Namespace and Service objects. A policy
    that has PolicyEndpoints there already is left to them.
    """
    from dataplane.manifests import to_yaml
    from dataplane.policy.resolve import policy_endpoints
    from dataplane.sources.manifest import manifest

    snapshot = read_objects(paths).snapshot
    policies = {policy.key: policy for policy in snapshot.network_policies}
    with progress("Resolving"):
        made = policy_endpoints(snapshot)
    if not policies:
        click.echo("podgate: no NetworkPolicy here, so there is nothing to resolve", err=True)
    elif given := policies.keys() - {endpoint.policy for endpoint in made}:
        names = ", ".join(str(key) for key in sorted(given))
        click.echo(f"podgate: not resolved, there are PolicyEndpoints already: {names}", err=True)
    for pod in sorted({entry.pod for each in made for entry in each.endpoints if not entry.host_ip}):
        click.echo(f"podgate: warning: Pod {pod}: status.hostIP: missing; its entries have none", err=True)
    documents = [manifest(endpoint, policies[endpoint.policy]) for endpoint in made]
    if output == "json":
        click.echo(json.dumps({"apiVersion": "v1", "kind": "List", "items": documents}, indent=2))
    elif documents:
        click.echo(to_yaml(documents), nl=False)
