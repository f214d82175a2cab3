"""`podgate agent`: runs the node agent in the foreground."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Any

import click

from dataplane.addresses import parse_address
from dataplane.cli.client import control_option
from dataplane.cli.options import kubeconfig_option, option, service_options
from dataplane.config import (
    VPC_CNI_SOCKET,
    AgentConfig,
    Backend,
    Fail,
    IptablesVariant,
    MarkLayout,
    Mode,
    OnStop,
    PodNames,
    Resolve,
)
from dataplane.errors import InputError

CLUSTER = "kubernetes"  # as --source


class _Address(click.ParamType[bytes]):
    name = "IP"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> bytes:
        if isinstance(value, bytes):
            return value
        try:
            return parse_address(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def _choice(kind: type[StrEnum]) -> click.Choice[str]:
    return click.Choice([member.value for member in kind])


@click.command(
    epilog="Example:  podgate agent --source ./policies --node-ip 10.0.0.1 --node-ip fd00::1\n\n"
    "In a cluster:  podgate agent --source kubernetes --node-name $NODE_NAME"
)
@option(
    "--source",
    multiple=True,
    required=True,
    metavar="PATH|kubernetes",
    help="A file or directory of YAML, watched; repeatable. Or kubernetes: the cluster's API server"
    " (a directory of that name: ./kubernetes).",
)
@kubeconfig_option
@option(
    "--resolve",
    type=_choice(Resolve),
    default=Resolve.AUTO.value,
    help="Turn NetworkPolicies into rules here. auto: where no PolicyEndpoints are served (in files: for"
    " policies that have none). always: and ignore PolicyEndpoints. never: only PolicyEndpoints count.",
)
@option(
    "--pod-names",
    type=_choice(PodNames),
    default=PodNames.LOCAL.value,
    help="Whose names events show. cluster: of pods on other nodes too, by a watch of all pods.",
)
@option(
    "--node-ip",
    multiple=True,
    type=_Address(),
    also=["NODE_IP"],
    help="An address by which objects name this node (hostIP). Repeatable. Default: this node's own.",
)
@option(
    "--node-name",
    also=["NODE_NAME"],
    help="This node's name, as its Node object has it; needed with --source kubernetes.",
)
@option(
    "--mode",
    type=_choice(Mode),
    default=Mode.STANDARD.value,
    also=["NETWORK_POLICY_ENFORCING_MODE"],
    help="strict: pods are isolated from their first packet, whether or not a policy selects them.",
)
@option(
    "--fail",
    type=_choice(Fail),
    default=Fail.CLOSED.value,
    help="What becomes of steered packets that nobody can judge: dropped, or let through.",
)
@option(
    "--audit/--no-audit",
    default=False,
    help="Judge, count and log what would be denied, and drop nothing at all, whatever other options say.",
)
@option(
    "--reject/--no-reject",
    default=False,
    help="Answer what policies deny, so that clients fail at once: TCP RST, else ICMP administratively"
    " prohibited; 100 per second at most. Without, it is dropped silently.",
)
@option(
    "--flow-log",
    metavar="PATH|-",
    help="Write a JSON line there for each flow judged, packet denied and flow ended; - is stdout. A file may"
    " be rotated. Default: off.",
)
@option(
    "--flow-log-rate",
    type=click.FloatRange(min=0),
    default=100.0,
    help="Lines per second of each reason, ten times as many at once; what is more is counted. 0: no limit.",
)
@option("--queues", type=click.IntRange(1, 64), default=1, help="Queues, one thread each.")
@option("--queue-base", type=click.IntRange(0, 65472), default=0, help="Number of the first queue.")
@option(
    "--backend",
    type=_choice(Backend),
    default=Backend.NATIVE.value,
    help="native: our netlink loop. netfilterqueue: the NetfilterQueue package, about ten times slower.",
)
@option(
    "--offload/--no-offload",
    default=True,
    help="Let the kernel pass the rest of a flow once it is judged, or inspect every packet.",
)
@option(
    "--spoof-check",
    type=click.Choice(["on", "off"]),
    default="on",
    help="Drop packets from pods whose source is not one of the pod's addresses.",
)
@option(
    "--iptables",
    type=_choice(IptablesVariant),
    default=IptablesVariant.AUTO.value,
    help="auto: the variant that holds kube-proxy's chains, else nft.",
)
@option(
    "--mark-mask",
    default="0x70000000",
    help="Three bits of packet and connection mark that no other program uses.",
)
@option("--veth-prefix", default="eni", help="How the CNI names pods' host interfaces (VPC CNI: eni).")
@option(
    "--on-stop",
    type=_choice(OnStop),
    default=OnStop.AUTO.value,
    help="Keep our rules in the kernel or take them away; auto: keep on SIGTERM, clean on Ctrl-C.",
)
@option(
    "--cni-socket",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="PATH",
    help="Answer the Amazon VPC CNI here when it makes and removes pods. It calls"
    f" {VPC_CNI_SOCKET}, if NETWORK_POLICY_ENFORCING_MODE is set on it, and makes no pods"
    " while nobody answers. Default: off.",
)
@option(
    "--take-over/--no-take-over",
    default=False,
    help="Where an agent runs already, get everything ready, then have it hand over (a rolling update)."
    " Without, a second agent ends.",
)
@service_options(
    coalesce="Put a change of objects in force",
    coalesce_ms=20,
    coalesce_limit_ms=200,
    metrics=":8162",
    health=":8163",
)
@option("--verify-seconds", type=click.FloatRange(min=0.05), default=10.0, hidden=True)
@control_option
def command(log_format: str, **options: Any) -> None:
    """Enforce policies on the pods of this network namespace, in the foreground.

    Reads PolicyEndpoint and Pod objects, steers isolated pods' packets into NFQUEUE and judges
    them. Needs root (CAP_NET_ADMIN and CAP_NET_RAW).
    """
    try:
        mask = int(options.pop("mark_mask"), 0)
    except ValueError:
        raise InputError("--mark-mask: write it as a number, for example 0x70000000") from None
    cluster = options["source"] == (CLUSTER,)
    if CLUSTER in options["source"] and not cluster:
        raise InputError("--source kubernetes: stands alone, it cannot be combined with files")
    if cluster and not options["node_name"]:
        raise InputError(
            "--source kubernetes needs --node-name (or NODE_NAME): the name of this node's Node object"
        )
    config = AgentConfig(
        sources=() if cluster else tuple(map(Path, options["source"])),
        kubeconfig=options["kubeconfig"],
        resolve=Resolve(options["resolve"]),
        pod_names=PodNames(options["pod_names"]),
        quiet=options["coalesce_ms"] / 1000,
        quiet_limit=options["coalesce_limit_ms"] / 1000,
        node_ips=options["node_ip"],
        node_name=options["node_name"] or os.uname().nodename,
        mode=Mode(options["mode"]),
        fail=Fail(options["fail"]),
        queues=options["queues"],
        audit=options["audit"],
        reject=options["reject"],
        flow_log=options["flow_log"] or None,
        flow_log_rate=options["flow_log_rate"],
        queue_base=options["queue_base"],
        backend=Backend(options["backend"]),
        offload=options["offload"],
        spoof_check=options["spoof_check"] == "on",
        iptables=IptablesVariant(options["iptables"]),
        marks=MarkLayout.from_mask(mask),
        veth_prefix=options["veth_prefix"],
        on_stop=OnStop(options["on_stop"]),
        control=options["control"],
        metrics=options["metrics_bind_addr"],
        health=options["health_probe_bind_addr"],
        cni_socket=options["cni_socket"],
        take_over=options["take_over"],
        verify_seconds=options["verify_seconds"],
    )
    for source in config.sources:
        if not source.exists():
            raise InputError(f"--source {source}: no such file or directory")

    import uvloop

    from dataplane.agent import Agent
    from dataplane.observe.log import configure

    configure(log_format)
    # Steering works line by line in other programs' output; their language must be known.
    os.environ["LC_ALL"] = "C"
    uvloop.run(Agent(config).run())
