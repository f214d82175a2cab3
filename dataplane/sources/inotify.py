"""File system events from the kernel (inotify(7)), readable by an event loop.

Used directly because two things are needed that portable watchers hide: IN_CLOSE_WRITE, which tells
a finished file from one still being written (a `cidr` cut short is a wider `cidr`), and watches that
are known to stand before the directory is read.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from typing import NamedTuple

# include/uapi/linux/inotify.h
MODIFY = 0x00000002
ATTRIB = 0x00000004
CLOSE_WRITE = 0x00000008
MOVED_FROM = 0x00000040
MOVED_TO = 0x00000080
CREATE = 0x00000100
DELETE = 0x00000200
DELETE_SELF = 0x00000400
MOVE_SELF = 0x00000800
OVERFLOW = 0x00004000
IGNORED = 0x00008000
ONLYDIR = 0x01000000
MASK_ADD = 0x20000000
ISDIR = 0x40000000

NAMES = MOVED_FROM | MOVED_TO | CREATE | DELETE | DELETE_SELF | MOVE_SELF  # what a directory lists
FILES = NAMES | MODIFY | ATTRIB | CLOSE_WRITE  # and what its files hold

_EVENT = struct.Struct("=iIII")  # wd, mask, cookie, length of the name
_NONBLOCK, _CLOEXEC = os.O_NONBLOCK, os.O_CLOEXEC
_BUFFER = 64 * 1024

_libc = ctypes.CDLL(None, use_errno=True)


class Event(NamedTuple):
    """`watch` is what `Inotify.watch` returned, -1 on overflow; `name` is the entry in that directory."""

    watch: int
    mask: int
    name: str


class Inotify:
    """One inotify instance. OSError where the kernel refuses: EMFILE and ENOSPC mean its limits."""

    def __init__(self) -> None:
        self._fd = -1
        self._fd = _libc.inotify_init1(_NONBLOCK | _CLOEXEC)
        if self._fd < 0:
            raise _error("inotify")

    def fileno(self) -> int:
        return self._fd

    def watch(self, directory: str, mask: int) -> int:
        """Watch a directory; one that is watched already gets the further events."""
        wanted = mask | ONLYDIR | MASK_ADD
        watch: int = _libc.inotify_add_watch(self._fd, os.fsencode(directory), ctypes.c_uint32(wanted))
        if watch < 0:
            raise _error(directory)
        return watch

    def unwatch(self, watch: int) -> None:
        # It may be gone already, with its directory.
        _libc.inotify_rm_watch(self._fd, watch)

    def read(self) -> list[Event]:
        """The events that are waiting; empty when there are none."""
        try:
            data = os.read(self._fd, _BUFFER)
        except BlockingIOError:
            return []
        events: list[Event] = []
        offset = 0
        while offset + _EVENT.size <= len(data):
            watch, mask, _, length = _EVENT.unpack_from(data, offset)
            offset += _EVENT.size
            name = data[offset : offset + length].rstrip(b"\0")
            events.append(Event(watch, mask, os.fsdecode(name)))
            offset += length
        return events

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _error(what: str) -> OSError:
    number = ctypes.get_errno() or errno.EIO
    return OSError(number, os.strerror(number), what)
