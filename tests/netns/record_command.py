"""A command that prints records as JSON lines, in the node of a lab."""

from __future__ import annotations

import signal
import subprocess
from typing import Any

from conftest import PODGATE, RunningAgent, import_path
from objects import until


class RecordCommand:
    """The process, and the `rows` that it has printed so far; a context manager that ends it."""

    patience = 5.0  # seconds in which a record comes

    def __init__(self, running: RunningAgent, *argv: str) -> None:
        self.rows: list[dict[str, Any]] = []
        self.process = running.lab.popen(
            "node",
            "env",
            f"PYTHONPATH={import_path()}",
            *PODGATE,
            *argv,
            *("-o", "json", "--control", str(running.control)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self, number: int = signal.SIGINT) -> int:
        """End it by a signal; its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(number)
        return self.ended()

    def ended(self) -> int:
        """Its exit status once it has ended."""
        raise NotImplementedError

    def of(self, **fields: Any) -> list[dict[str, Any]]:
        return [row for row in list(self.rows) if all(row.get(name) == one for name, one in fields.items())]

    def wait(self, count: int = 1, **fields: Any) -> list[dict[str, Any]]:
        """The rows with these fields, once there are so many."""
        until(
            lambda: len(self.of(**fields)) >= count,
            timeout=self.patience,
            what=f"{count} records with {fields}: {self.rows[-5:]}",
        )
        return self.of(**fields)
