"""Asking the running agent: HTTP on its unix socket, with the standard library alone (quick to start)."""

from __future__ import annotations

import http.client
import json
import socket
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import urlencode

import click

from dataplane.config import DEFAULT_CONTROL
from dataplane.errors import AgentUnreachable, InputError

TIMEOUT_SECONDS = 10.0

control_option = click.option(
    "--control",
    type=click.Path(path_type=Path),
    default=DEFAULT_CONTROL,
    envvar="PODGATE_CONTROL",
    show_default=True,
    show_envvar=True,
    help="The running agent's control socket.",
)

output_option = click.option(
    "-o",
    "--output",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="Text for people, JSON for machines.",
)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("agent", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def is_own(control: Path) -> bool:
    """Whether an agent answers that is in our PID namespace: in this container, that is."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(TIMEOUT_SECONDS)
        try:
            probe.connect(str(control))
            credentials = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        except OSError:
            return False
    # unix(7): who listens, as seen from here; the kernel has no number for one of another namespace.
    return bool(struct.unpack("3i", credentials)[0])


@contextmanager
def streaming(
    control: Path, what: str, query: Mapping[str, str] = MappingProxyType({})
) -> Iterator[Iterator[Any]]:
    """The items of the agent's stream /`what`, as they come; the iterator ends when the agent does.

    AgentUnreachable when no agent answers, InputError when it refuses.
    """
    connection = _UnixConnection(control, TIMEOUT_SECONDS)
    try:
        with _saying_what_failed(control):
            connection.request("GET", f"/{what}?{urlencode(query)}")
            response = connection.getresponse()
            if response.status != 200:
                raise _refusal(response.status, json.loads(response.read()))
        connection.sock.settimeout(None)  # silence is no fault from here on
        yield _lines(response)
    finally:
        connection.close()


def _lines(response: http.client.HTTPResponse) -> Iterator[Any]:
    # An agent that is killed ends in the middle of whatever it was writing.
    with suppress(OSError, http.client.HTTPException):
        while line := response.readline():
            if not line.endswith(b"\n"):
                return
            yield json.loads(line)


def ask(
    control: Path,
    what: str,
    query: Mapping[str, str] = MappingProxyType({}),
    timeout: float = TIMEOUT_SECONDS,
) -> Any:
    """The agent's answer to GET /`what`. AgentUnreachable when no agent answers."""
    connection = _UnixConnection(control, timeout)
    try:
        with _saying_what_failed(control):
            connection.request("GET", f"/{what}?{urlencode(query)}")
            response = connection.getresponse()
            body = json.loads(response.read())
    finally:
        connection.close()
    if response.status != 200:
        raise _refusal(response.status, body)
    return body


@contextmanager
def _saying_what_failed(control: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise AgentUnreachable(
            f"no agent at {control}: start one with `podgate agent`, or name its socket with --control"
        ) from None
    except PermissionError:
        raise AgentUnreachable(f"{control}: permission denied; the agent's socket is root's") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise AgentUnreachable(f"the agent at {control} does not answer: {error}") from None


def _refusal(status: int, body: Any) -> InputError:
    said = body.get("error") if isinstance(body, dict) else None
    return InputError(said or f"the agent answered {status}")
