"""What a person sees while a command works."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any


def progress(text: str) -> AbstractContextManager[Any]:
    """A moving line on stderr, gone when the work is done; nothing where that is no terminal."""
    if not sys.stderr.isatty():
        return nullcontext()
    from rich.console import Console
    from rich.text import Text

    return Console(stderr=True).status(Text(text))
