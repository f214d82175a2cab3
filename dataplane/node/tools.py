"""Running the system's firewall tools, with errors a person can act on."""

from __future__ import annotations

import itertools
import shutil
import subprocess
from collections.abc import Sequence

from dataplane.errors import KernelError

SYSTEM_PATHS = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
TIMEOUT_S = 60.0


def find(name: str) -> str | None:
    """The path of a program, also where PATH has no sbin; None when it is not installed."""
    return shutil.which(name) or shutil.which(name, path=SYSTEM_PATHS)


def run(command: Sequence[str], stdin: str | None = None) -> str:
    """The standard output of a program. KernelError with the program's own words when it fails."""
    try:
        done = subprocess.run(
            command, input=stdin, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except FileNotFoundError:
        raise KernelError(f"{command[0]}: not installed; install the package that has it") from None
    except subprocess.TimeoutExpired:
        raise KernelError(
            f"{' '.join(command)}: no answer after {TIMEOUT_S:.0f} s; another program may hold its lock"
        ) from None
    if done.returncode:
        words = " ".join(done.stderr.split()) or f"exit status {done.returncode}"
        raise KernelError(f"{' '.join(command)}: {words}{_line_in_error(words, stdin)}")
    return done.stdout


def _line_in_error(words: str, stdin: str | None) -> str:
    """The input line an error speaks of by number, since nobody else can look it up."""
    lines = (stdin or "").splitlines()
    parts = words.lower().replace(":", " ").split()
    for word, number in itertools.pairwise(parts):
        if word == "line" and number.isdigit() and 0 < int(number) <= len(lines):
            return f" ({lines[int(number) - 1]})"
    return ""
