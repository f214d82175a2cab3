"""Writing the flow log: JSON lines to a file or stdout, within limits, whatever becomes of the file.

Whoever rotates the file moves or removes it: the next line goes to a new one. A file that cannot be
written loses lines, which are counted and said once; nothing waits for it but the thread that writes.
"""

from __future__ import annotations

import os
import stat
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from dataplane.errors import InputError
from dataplane.observe.log import Logger

STDOUT = "-"
LOOK_SECONDS = 1.0  # how often is looked whether the file is still where it was
BURST_SECONDS = 10.0  # a reason that was silent may come at once so long at its rate


class Limit:
    """So many lines per second of each kind; what is more is counted. For one thread."""

    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`rate` 0: no limit."""
        self._rate = rate
        self._clock = clock
        self._room: dict[str, tuple[float, float]] = {}  # lines, and at what time
        self.suppressed: Counter[str] = Counter()

    def allow(self, kind: str) -> bool:
        """Whether one more may be written now."""
        if not self._rate:
            return True
        now, full = self._clock(), max(1.0, self._rate * BURST_SECONDS)
        room, since = self._room.get(kind, (full, now))
        room = min(full, room + (now - since) * self._rate)
        allowed = room >= 1
        self._room[kind] = (room - 1 if allowed else room, now)
        if not allowed:
            self.suppressed[kind] += 1
        return allowed


class LineFile:
    """Lines appended to a file that others may rotate, or to stdout (`-`). For one thread at a time."""

    def __init__(self, target: str, log: Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self.lost = 0  # lines that could not be written
        self._target = target
        self._log = log
        self._clock = clock
        self._fd = -1
        self._looked = 0.0
        self._torn = False  # the last line in the file has no end
        self._said: str | None = None

    def open(self) -> None:
        """InputError when it cannot be written to."""
        try:
            self._fd = os.dup(1) if self._target == STDOUT else _open(self._target)
        except OSError as error:
            raise InputError(f"--flow-log {self._target}: {error.strerror}") from None
        self._looked = self._clock()

    def write(self, lines: Sequence[bytes]) -> int:
        """Append lines, which end with a newline; how many got there. Never raises."""
        self.look()
        data = (b"\n" if self._torn else b"") + b"".join(lines)
        done, fault = 0, None
        try:
            while done < len(data):
                done += os.write(self._fd, data[done:])
        except OSError as error:
            fault = error.strerror or str(error)
        if done:
            self._torn = data[done - 1 : done] != b"\n"
        written = data[:done].count(b"\n") - (1 if data[:1] == b"\n" and done else 0)
        self.lost += len(lines) - written
        self._tell(fault)
        return written

    def look(self) -> None:
        """Follow a rotation."""
        now = self._clock()
        if self._target == STDOUT or now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        try:
            here = os.fstat(self._fd)
            try:
                there = os.stat(self._target)
                if (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino):
                    return
            except FileNotFoundError:
                pass
            new = _open(self._target)
        except OSError as error:  # what is open can still be written to
            self._tell(f"{error.strerror}; the old file is written on")
            return
        os.close(self._fd)
        self._fd, self._torn = new, False

    def close(self) -> None:
        """More than once is no error."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _tell(self, fault: str | None) -> None:
        if fault == self._said:
            return
        if fault is not None:
            self._log.error("flow log", file=self._target, problem=fault, lines_lost=self.lost)
        else:
            self._log.info("flow log is written again", file=self._target, lines_lost=self.lost)
        self._said = fault


def _open(target: str) -> int:
    # A FIFO without a reader must not hold up the agent.
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    fd = os.open(Path(target), flags, 0o640)
    if stat.S_ISFIFO(os.fstat(fd).st_mode) or stat.S_ISCHR(os.fstat(fd).st_mode):
        os.set_blocking(fd, True)
    return fd
