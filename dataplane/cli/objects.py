"""The objects that a command is given as files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dataplane.cli.progress import progress

if TYPE_CHECKING:
    from dataplane.sources.directory import Reading


def read_objects(paths: Sequence[Path], *, warn: bool = True) -> Reading:
    """Everything in `paths`. Says on stderr what was skipped, and with `warn` what is wrong with it.

    InputError when a path cannot be read.
    """
    from dataplane.sources.directory import read_paths

    with progress(f"Reading {' '.join(map(str, paths))}"):
        reading = read_paths(paths)
    if reading.skipped:
        click.echo(f"podgate: {reading.skipped}", err=True)
    if warn:
        for problem in reading.snapshot.problems:
            click.echo(f"podgate: warning: {problem}", err=True)
    return reading
