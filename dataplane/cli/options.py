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
