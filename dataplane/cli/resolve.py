"""`podgate resolve`: NetworkPolicies as the PolicyEndpoints that enforce them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click


def _yaml(documents: list[dict[str, Any]]) -> str:
    import yaml

    class Dumper(yaml.SafeDumper):
        """Quotes what one reader or another of YAML takes for a number: `1e3`, `22:22`, `0777`."""

        def ignore_aliases(self, data: Any) -> bool:
            return True

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
        style = None if value[:1].isalpha() else '"'
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)

    Dumper.add_representer(str, text)
    return yaml.dump_all(documents, Dumper=Dumper, sort_keys=False, explicit_start=True)


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
    from dataplane.policy.resolve import policy_endpoints
    from dataplane.sources.directory import read_paths
    from dataplane.sources.manifest import manifest

    snapshot = read_paths(paths)
    for problem in snapshot.problems:
        click.echo(f"podgate: warning: {problem}", err=True)
    policies = {policy.key: policy for policy in snapshot.network_policies}
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
        click.echo(_yaml(documents), nl=False)
