"""`podgate controller`: writes a cluster's PolicyEndpoints, in the foreground."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dataplane.cli.options import kubeconfig_option, option, service_options
from dataplane.errors import InputError
from dataplane.sources.fields import SUBDOMAIN

OWN_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")  # in a pod
DEFAULT_NAMESPACE = "kube-system"


@click.command(
    epilog="Example:  podgate controller --kubeconfig ~/.kube/config\n\n"
    "In a cluster:  kubectl apply -k deploy/controller"
)
@kubeconfig_option
@option(
    "--install-crd/--no-install-crd",
    default=True,
    help="Have the API server serve PolicyEndpoints, where it does not yet. Without, end there.",
)
@option(
    "--lease-namespace",
    metavar="NAMESPACE",
    help="Where the Lease is that one of several controllers holds. Default: the pod's, else"
    f" {DEFAULT_NAMESPACE}.",
)
@option("--lease-name", default="podgate-controller", metavar="NAME", help="The name of that Lease.")
@option(
    "--writes-per-second",
    type=click.IntRange(1, 10_000),
    default=100,
    help="Requests that write, at most; what more there is waits its turn.",
)
@service_options(
    coalesce="Resolve a change of objects",
    coalesce_ms=100,
    coalesce_limit_ms=500,
    metrics=":8164",
    health=":8165",
)
def command(log_format: str, lease_namespace: str | None, **options: Any) -> None:
    """Turn a cluster's NetworkPolicies into PolicyEndpoints, in the foreground.

    Only where nobody does: EKS has a controller of its own, and agents resolve NetworkPolicies themselves
    where no PolicyEndpoints are served. Of several controllers one writes. Ends with exit code 1 where
    somebody else writes PolicyEndpoints, and never touches an object that it did not make.
    """
    if lease_namespace is None:
        lease_namespace = _own_namespace() or DEFAULT_NAMESPACE
    for name, value in (("--lease-namespace", lease_namespace), ("--lease-name", options["lease_name"])):
        if not SUBDOMAIN.fullmatch(value):
            raise InputError(f"{name} {value!r} is not a Kubernetes name")

    import uvloop

    from dataplane.controller.controller import Controller, ControllerConfig
    from dataplane.observe.log import configure

    configure(log_format)
    config = ControllerConfig(
        kubeconfig=options["kubeconfig"],
        install_crd=options["install_crd"],
        lease_namespace=lease_namespace,
        lease_name=options["lease_name"],
        quiet=options["coalesce_ms"] / 1000,
        quiet_limit=options["coalesce_limit_ms"] / 1000,
        writes_per_second=options["writes_per_second"],
        metrics=options["metrics_bind_addr"],
        health=options["health_probe_bind_addr"],
    )

    uvloop.run(Controller(config).run())


def _own_namespace() -> str | None:
    try:
        return OWN_NAMESPACE.read_text().strip() or None
    except OSError:
        return None
