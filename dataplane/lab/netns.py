"""Named network namespaces, and doing something inside one without leaving one's own.

The network namespace belongs to a thread (setns(2)), so work inside another one runs on a thread of
its own; sockets made there keep their namespace when they come back.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from dataplane.errors import KernelError

RUN = Path("/run/netns")
CLONE_NEWNET = 0x40000000
CLONE_NEWNS = 0x00020000
CLONE_NEWUSER = 0x10000000

_libc = ctypes.CDLL(None, use_errno=True)
_T = TypeVar("_T")


def setns(path: str | Path, kind: int) -> None:
    """Move the calling thread into a namespace (os.setns exists from Python 3.12 only)."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _libc.setns(fd, kind):
            number = ctypes.get_errno()
            raise OSError(number, f"setns {path}: {os.strerror(number)}")
    finally:
        os.close(fd)


def inside(name: str, function: Callable[[], _T]) -> _T:
    """What `function` returns when it runs in the network namespace `name`; its exceptions too."""
    result: list[_T] = []
    failure: list[BaseException] = []

    def work() -> None:
        try:
            setns(RUN / name, CLONE_NEWNET)
            result.append(function())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=work, name=f"netns-{name}")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return result[0]


def make_socket(name: str, family: int, kind: int, protocol: int = 0) -> socket.socket:
    """A non-blocking socket of the network namespace `name`."""
    made = inside(name, lambda: socket.socket(family, kind | socket.SOCK_NONBLOCK, protocol))
    made.setblocking(False)
    return made


def write_sysctls(name: str, values: Iterable[tuple[str, str]]) -> None:
    """Set `net` sysctls, given as paths below /proc/sys/net, in the namespace `name`.

    One that this kernel does not have is left out: the lab asks for no more than the kernel offers.
    """

    def write() -> None:
        for path, value in values:
            with contextlib.suppress(FileNotFoundError):
                (Path("/proc/sys/net") / path).write_text(value)

    inside(name, write)


def ip(lines: Iterable[str], *, netns: str | None = None, family: int = 0, force: bool = False) -> None:
    """Run `ip` command lines in one go. KernelError holds the first complaint of `ip`.

    `force` goes on after a failing line and swallows its complaint: for removal.
    """
    text = "\n".join(lines)
    if not text:
        return
    argv = ["ip"]
    if netns is not None:
        argv += ["-n", netns]
    if family:
        argv.append(f"-{family}")
    if force:
        argv.append("-force")
    try:
        done = subprocess.run([*argv, "-batch", "-"], input=text, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise KernelError("the lab needs the `ip` command: install the package iproute2") from None
    if done.returncode and not force:
        complaint = " ".join(done.stderr.split())
        raise KernelError(f"ip {'-n ' + netns if netns else ''}: {complaint or done.returncode}")


def exists(name: str) -> bool:
    return (RUN / name).exists()


def identity(name: str) -> tuple[int, int] | None:
    """Device and inode that tell a namespace apart, as /proc/PID/ns/net shows them. None: no such."""
    try:
        status = os.stat(RUN / name)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def processes(names: Iterable[str]) -> list[int]:
    """Processes that run in any of these namespaces, without the calling process and its parents."""
    wanted = {found for name in names if (found := identity(name))}
    spared = set()
    pid = os.getpid()
    while pid > 1 and pid not in spared:
        spared.add(pid)
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            break
        pid = int(stat.rpartition(")")[2].split()[1])
    result = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) in spared:
            continue
        with contextlib.suppress(OSError):
            status = os.stat(entry / "ns/net")
            if (status.st_dev, status.st_ino) in wanted:
                result.append(int(entry.name))
    return result


def started_at(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot: with the pid, it names one process for good."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else int(fields[19])
