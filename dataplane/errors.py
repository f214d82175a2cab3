"""The errors that are meant for people. Each reads as one line: what, where, what to do."""

from __future__ import annotations


class PodgateError(Exception):
    """Something the user can mend. The command line prints it as one line and exits 2."""

    exit_code = 2


class InputError(PodgateError):
    """An object, file or option that cannot be used."""


class KernelError(PodgateError):
    """The kernel or a tool of this machine refused what the agent needs."""

    exit_code = 1


class AgentUnreachable(PodgateError):
    """No agent answers on the control socket."""

    exit_code = 1
