"""Options of the commands that run as services: each also comes from the environment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from dataplane.config import BindAddress

Command = TypeVar("Command", bound=Callable[..., Any])


class BindAddressType(click.ParamType[BindAddress | None]):
    name = "[IP]:PORT"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> BindAddress | None:
        try:
            return BindAddress.parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def option(name: str, **settings: Any) -> Callable[[Command], Command]:
    """An option that also comes from PODGATE_<NAME>."""
    variable = "PODGATE_" + name.lstrip("-").split("/")[0].upper().replace("-", "_")
    extra = settings.pop("also", [])
    return click.option(name, envvar=[variable, *extra], show_default=True, show_envvar=True, **settings)


kubeconfig_option = option(
    "--kubeconfig",
    also=["KUBECONFIG"],
    metavar="PATH",
    help="How to reach the API server. Default: the pod's ServiceAccount, else ~/.kube/config.",
)


def service_options(
    *, coalesce: str, coalesce_ms: int, coalesce_limit_ms: int, metrics: str, health: str
) -> Callable[[Command], Command]:
    """The options that every service has, with these defaults. `coalesce`: what waits for changes to end."""
    options: list[Callable[[Any], Any]] = [
        option(
            "--coalesce-ms",
            type=click.IntRange(0, 10_000),
            default=coalesce_ms,
            help=f"{coalesce} when none has followed for so long.",
        ),
        option(
            "--coalesce-limit-ms",
            type=click.IntRange(0, 60_000),
            default=coalesce_limit_ms,
            help="… and at the latest so long after the first one.",
        ),
        option(
            "--metrics-bind-addr",
            type=BindAddressType(),
            default=metrics,
            help="Serve metrics for Prometheus there, at /metrics. 0: do not.",
        ),
        option(
            "--health-probe-bind-addr",
            type=BindAddressType(),
            default=health,
            help="Answer probes there, at /healthz and /readyz. 0: do not.",
        ),
        click.option(
            "--log-format", type=click.Choice(["text", "json"]), default="text", envvar="PODGATE_LOG_FORMAT"
        ),
    ]

    def add(command: Command) -> Command:
        for each in reversed(options):
            command = each(command)
        return command

    return add
