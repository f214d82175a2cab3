"""Labs without root: inside a user namespace in which the caller is root.

A holder process keeps the user, mount and network namespaces of one lab alive; every later command
moves itself in there and then works as it would for root. /run is private in there, so `ip netns`,
the lab's files and iptables' lock need no rights outside.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

from dataplane.errors import InputError, KernelError
from dataplane.lab import netns
from dataplane.lab.topology import check_name

_MS_BIND, _MS_REC = 4096, 16384
_entered: list[Path] = []  # the registry entry of the lab whose namespaces this process is in


def needed() -> bool:
    """Whether the caller has to go through a user namespace: it is not root."""
    return os.geteuid() != 0


def registry() -> Path:
    """Where this user's holders are listed: a directory that nobody else can have prepared."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    base = Path(runtime) if runtime and os.access(runtime, os.W_OK) else Path("/tmp")
    path = base / f"podgate-lab-{os.geteuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise KernelError(f"{path}: is not a private directory of yours; remove it")
    return path


def names() -> list[str]:
    """The labs of this user that have a living holder; entries of dead ones are removed."""
    return [path.stem for path in sorted(registry().glob("*.json")) if _alive(path) is not None]


def create(name: str, *, die_with_parent: bool = False) -> None:
    """Start a holder for a lab. KernelError: this kernel does not allow it to this user."""
    path = registry() / f"{check_name(name)}.json"
    if _alive(path) is not None:
        raise InputError(f"a lab named {name} is up already; end it with: podgate lab down --name {name}")
    argv = ["unshare", "--user", "--map-root-user", "--mount", "--net"]
    argv += [sys.executable, "-m", "dataplane.lab.rootless", str(os.getpid() if die_with_parent else 0)]
    # Imported as here, installed or not.
    own = str(Path(__file__).resolve().parents[2])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (own, os.environ.get("PYTHONPATH"))))}
    try:
        holder = subprocess.Popen(
            argv,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            text=True,
        )
    except FileNotFoundError:
        raise KernelError("a lab without root needs `unshare` (package util-linux)") from None
    assert holder.stdout is not None
    assert holder.stderr is not None
    if holder.stdout.readline() != "ready\n":
        lines = holder.stderr.read().strip().splitlines()
        holder.wait()
        raise KernelError(
            "a lab needs root here: this machine does not let you make namespaces of your own"
            f" ({lines[-1] if lines else 'no message'}); run it with sudo"
        )
    path.write_text(json.dumps({"pid": holder.pid, "started": netns.started_at(holder.pid)}))


def enter(name: str) -> None:
    """Move this process into the namespaces of a lab. InputError: no such lab is up.

    The kernel allows that to a process with one thread only.
    """
    path = registry() / f"{check_name(name)}.json"
    pid = _alive(path)
    if pid is None:
        up = ", ".join(names()) or "none"
        raise InputError(
            f"no lab named {name} is up (up: {up}); make one with: podgate lab up PATH --name {name}"
        )
    here = os.open(".", os.O_PATH)
    # The user namespace comes first: it gives the right to the others.
    for kind, flag in (
        ("user", netns.CLONE_NEWUSER),
        ("mnt", netns.CLONE_NEWNS),
        ("net", netns.CLONE_NEWNET),
    ):
        netns.setns(f"/proc/{pid}/ns/{kind}", flag)
    os.fchdir(here)  # a new mount namespace puts us at its root
    os.close(here)
    _entered.append(path)


def end_holder() -> None:
    """End the holder of the namespaces this process has entered; nothing can be done in them after."""
    for path in _entered:
        pid = _alive(path)
        if pid is not None:
            began = netns.started_at(pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
            deadline = time.monotonic() + 5
            while netns.started_at(pid) == began and time.monotonic() < deadline:
                time.sleep(0.005)
        path.unlink(missing_ok=True)
    _entered.clear()


def _alive(path: Path) -> int | None:
    try:
        raw = json.loads(path.read_text())
        pid, started = int(raw["pid"]), int(raw["started"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        pid, started = 0, 0
    if pid and netns.started_at(pid) == started:
        return pid
    path.unlink(missing_ok=True)
    return None


def _mount(source: str, target: str, kind: str, flags: int, data: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode()):
        number = ctypes.get_errno()
        raise OSError(number, f"mount {target}: {os.strerror(number)}")


def _private_run() -> None:
    """An empty /run of our own that still shows what was in it, except what the lab writes itself."""
    old = os.open("/run", os.O_PATH | os.O_DIRECTORY)
    entries = [entry for entry in os.scandir("/run") if entry.is_dir(follow_symlinks=False)]
    _mount("podgate", "/run", "tmpfs", 0, "mode=755")
    for entry in entries:
        if entry.name in ("netns", "podgate", "lock"):
            continue
        target = Path("/run", entry.name)
        target.mkdir()
        # Directories we may not look into stay empty.
        with contextlib.suppress(OSError):
            _mount(f"/proc/self/fd/{old}/{entry.name}", str(target), "", _MS_BIND | _MS_REC, "")
    os.close(old)
    Path("/run/netns").mkdir()


def _hold(parent: int) -> None:
    """Keep the namespaces until told to end, or until `parent` (a pid, 0: nobody) is gone."""
    if parent:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    _private_run()
    netns.ip(["link set lo up"])
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):  # whoever reads our output must not wait for us
        os.dup2(null, fd)
    while True:
        signal.pause()


if __name__ == "__main__":
    _hold(int(sys.argv[1]))
