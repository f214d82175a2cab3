"""The command line. Each command is a module of its own, imported only when it is called."""

from __future__ import annotations

import importlib
import os
import sys

import click

from dataplane.errors import PodgateError

FAULT = 70  # EX_SOFTWARE of sysexits.h: neither "no" nor bad input

# name → module in this package; the module's `command` is the click command.
COMMANDS = {
    "agent": "agent",
    "controller": "controller",
    "status": "status",
    "resolve": "resolve",
    "explain": "explain",
    "check": "check",
    "matrix": "matrix",
    "replay": "replay",
    "advise": "advise",
    "rules": "rules",
    "flows": "flows",
    "trace": "trace",
    "intercept": "intercept",
    "top": "top",
    "audit-report": "audit_report",
    "doctor": "doctor",
    "cleanup": "cleanup",
    "lab": "lab",
}


class LazyGroup(click.Group):
    """A group that imports a command's module when it is needed, so that `--help` stays quick."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"dataplane.cli.{COMMANDS[cmd_name]}")
        command = module.command
        assert isinstance(command, click.Command)
        return command


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="podgate", message="podgate %(version)s")
def cli() -> None:
    """podgate enforces Kubernetes NetworkPolicy on pods, and says why a packet was dropped.

    \b
    Try it without a cluster:   podgate lab demo
    Enforce a directory:        podgate agent --source policies/ --node-ip 10.0.0.1
    Ask the running agent:      podgate status
    """


def main() -> None:
    """Entry point of `podgate`. Errors are one line on stderr; no traceback reaches a user."""
    try:
        sys.exit(cli.main(standalone_mode=False) or 0)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.exceptions.NoArgsIsHelpError as nothing_asked:
        print(nothing_asked.format_message())
        sys.exit(2)
    except click.UsageError as error:
        message = " ".join(error.format_message().split()).rstrip(".")
        help_of = f"; see `{error.ctx.command_path} --help`" if error.ctx else ""
        print(f"podgate: {message}{help_of}", file=sys.stderr)
        sys.exit(2)
    except click.ClickException as error:
        message = error.format_message().strip().replace("\n", " ")
        print(f"podgate: {message}", file=sys.stderr)
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except PodgateError as error:
        print(f"podgate: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # The reader (head, less) went away; Python must not complain about it at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as fault:
        if os.environ.get("PODGATE_TRACEBACK"):
            raise
        what = f"{type(fault).__name__}: {fault}".replace("\n", " ")
        print(
            f"podgate: a fault of podgate itself, please report it: {what} (PODGATE_TRACEBACK=1 shows where)",
            file=sys.stderr,
        )
        sys.exit(FAULT)
