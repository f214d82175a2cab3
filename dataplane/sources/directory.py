"""Objects from files and directories, once or followed as they change.

A directory means every `*.yaml`, `*.yml` and `*.json` file in it and in its subdirectories. Names
that begin with a dot are left out: editors' files, `.git`, and the `..data` of a mounted ConfigMap,
whose files are reached by the links beside it. A path that is named itself is read whatever its name.

What holds while files are being changed:

* A file that is open for writing is not read before it is closed (or HOLD seconds passed since its
  last change): half of a file may be valid and mean more than the whole.
* A file that cannot be read or parsed, or that became empty, keeps what it held last; a program that
  rewrites a file in place empties it first. A file that is deleted takes its objects along.
* A directory that cannot be read, or a named path that vanishes, keeps everything that it held.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from inotify_simple import Event, INotify, flags

from dataplane.errors import InputError
from dataplane.model import Problem, Snapshot
from dataplane.sources.contents import Contents, read_contents, summary
from dataplane.sources.store import Store, identity

MAX_FILE = 128 * 1024 * 1024
MAX_DIRECTORIES = 10_000
SUFFIXES = (".yaml", ".yml", ".json")
HOLD = 1.0  # seconds that a file may stay open for writing without a change before it is read

# A file changed this shortly before it was read may change again without another time stamp: file
# systems keep time in steps of a kernel tick (up to 10 ms), some of 2 s are not used for this.
_RACY_NS = 50_000_000
_SETTLE = 0.005  # seconds between the first event and looking, so that one change is one look
# What a directory lists, and what its files hold. IN_CLOSE_WRITE tells a finished file from one still
# being written: a `cidr` cut short is a wider `cidr`.
_NAMES = flags.MOVED_FROM | flags.MOVED_TO | flags.CREATE | flags.DELETE | flags.DELETE_SELF | flags.MOVE_SELF
_FILES = _NAMES | flags.MODIFY | flags.ATTRIB | flags.CLOSE_WRITE
_LOOK_AGAIN = 1.0  # seconds, where inotify is not to be had
_STILL_KEPT = "what was read from it before stays in force"

_GONE = (errno.ENOENT, errno.ENOTDIR)

_Signature = tuple[int, int, int, int, int]


class Place(NamedTuple):
    """Where an object is written: a file, and the line it begins in where that is known."""

    source: str
    line: int | None


class Reading(NamedTuple):
    """What files hold. `places`: of each object that has a name, by identity (`store.identity`).

    `skipped` says which kinds have no meaning here, in one line; empty when there are none.
    """

    snapshot: Snapshot
    places: dict[str, Place]
    skipped: str


def read_paths(paths: Sequence[Path]) -> Reading:
    """Everything in files and directories, read once. InputError when a path cannot be read."""
    store = Store()
    places: dict[str, Place] = {}

    def note(origin: str, contents: Contents) -> None:
        for name in {*map(identity, contents.objects), *contents.lines}:
            # Of several files that hold an object the last by name counts, as in the store.
            if name not in places or places[name].source <= origin:
                places[name] = Place(origin, contents.lines.get(name))

    source = DirectorySource(paths, store, watch=False, note=note)
    source.load()
    return Reading(store.snapshot(), places, summary(source.skipped))


@dataclass(slots=True)
class _File:
    """A file that has been read: what it was, to tell whether it changed."""

    signature: _Signature
    racy: bool  # it may have changed since without showing in the signature
    digest: bytes
    skipped: Counter[str]


@dataclass(slots=True)
class _Listing:
    """What the paths hold at one moment."""

    files: dict[str, str] = field(default_factory=dict)  # real path → the path to read it by
    broken: dict[str, str] = field(default_factory=dict)  # directory or named path → why it cannot be read
    watches: dict[str, _Watch] = field(default_factory=dict)  # by real directory

    def watch(self, directory: str) -> _Watch:
        return self.watches.setdefault(directory, _Watch(directory))


@dataclass(slots=True)
class _Watch:
    """What matters of a directory: some entries or all that are named like ours; their content too?"""

    directory: str
    names: set[str] = field(default_factory=set)
    every: bool = False
    mask: int = _NAMES

    def matters(self, event: Event) -> bool:
        if not event.name or event.name in self.names:
            return True
        if event.mask & _NAMES or event.mask & flags.ISDIR:
            return self.every
        return self.every and event.name.endswith(SUFFIXES)


@dataclass(slots=True)
class _Change:
    """What an origin holds now; None: it is gone."""

    origin: str
    contents: Contents | None
    path: str = ""  # of the file it was read from
    before: _File | None = None  # what was known of that file


class DirectorySource:
    """Keeps `store` in step with files and directories. One origin per file."""

    def __init__(
        self,
        paths: Sequence[Path],
        store: Store,
        *,
        hold: float = HOLD,
        watch: bool = True,
        note: Callable[[str, Contents], None] | None = None,
    ) -> None:
        """`note` is told what each file holds when it is read."""
        self._roots = [os.path.abspath(path) for path in paths]
        self._shown = {os.path.abspath(path): str(path) for path in paths}
        self._store = store
        self._hold = hold
        self._note = note
        self._known: dict[str, _File] = {}  # by the path it is read by
        self._broken: dict[str, str] = {}
        self._writing: dict[str, float] = {}  # real path → until when it is left alone (monotonic)
        self._watches: dict[int, _Watch] = {}
        self._blind = ""  # why changes cannot be watched
        self._wake = asyncio.Event()
        self._watcher = self._open() if watch else None
        self._skipped: Counter[str] = Counter()

    @property
    def skipped(self) -> Counter[str]:
        """Kinds in these files that mean nothing here, and how many of each (`contents.summary`)."""
        return self._skipped

    def load(self) -> None:
        """Read everything once. InputError when a named path cannot be read.

        What changes from here on is not missed, though it is noticed only by `run`.
        """
        listing = self._list()
        for root in self._roots:
            if root in listing.broken:
                raise InputError(f"{self._shown[root]}: cannot be read: {listing.broken[root]}")
        if self._watch(listing):
            listing = self._list()  # something may have changed before the watches stood
        self._apply(list(self._changes(listing, frozenset())))

    async def run(self) -> None:
        """Follow changes until cancelled."""
        loop = asyncio.get_running_loop()
        watcher = self._watcher
        try:
            if watcher is not None:
                loop.add_reader(watcher.fileno(), self._on_events)
            while True:
                self._on_events()
                now = time.monotonic()
                self._writing = {path: until for path, until in self._writing.items() if until > now}
                changes, listing = await asyncio.to_thread(self._look, frozenset(self._writing))
                self._on_events()
                self._apply(changes)
                if self._watch(listing):
                    continue  # something may have changed before the new watches stood
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), self._patience())
                await asyncio.sleep(_SETTLE)
                self._wake.clear()
        finally:
            if watcher is not None:
                loop.remove_reader(watcher.fileno())
                watcher.close()
                self._watcher = None

    # --- looking ----------------------------------------------------------------------------------

    def _look(self, writing: frozenset[str]) -> tuple[list[_Change], _Listing]:
        listing = self._list()
        return list(self._changes(listing, writing)), listing

    def _list(self) -> _Listing:
        listing = _Listing()
        for root in self._roots:
            _note_ancestors(root, listing)
            try:
                status = os.stat(root)
                if stat.S_ISDIR(status.st_mode):
                    self._list_directory(root, listing)
                else:
                    if not os.access(root, os.R_OK):
                        raise OSError(errno.EACCES, os.strerror(errno.EACCES))
                    if status.st_size > MAX_FILE:
                        raise OSError(0, f"larger than {MAX_FILE >> 20} MiB; split it")
                    _note_file(root, listing)
            except OSError as error:
                listing.broken[root] = _reason(error)
        return listing

    def _list_directory(self, root: str, listing: _Listing) -> None:
        seen: set[tuple[int, int]] = set()  # links may lead in circles
        waiting = [root]
        while waiting:
            directory = waiting.pop()
            try:
                status = os.stat(directory)
                if (status.st_dev, status.st_ino) in seen:
                    continue
                seen.add((status.st_dev, status.st_ino))
                if len(seen) > MAX_DIRECTORIES:
                    raise OSError(0, f"more than {MAX_DIRECTORIES} directories")
                watch = listing.watch(os.path.realpath(directory))
                watch.every, watch.mask = True, _FILES
                with os.scandir(directory) as entries:
                    for entry in sorted(entries, key=lambda entry: entry.name):
                        if entry.name.startswith("."):
                            continue
                        if _is_directory(entry):
                            waiting.append(entry.path)
                        elif entry.name.endswith(SUFFIXES) and _is_file(entry):
                            _note_file(entry.path, listing)
            except OSError as error:
                if directory != root and error.errno in _GONE:  # it went while we looked
                    continue
                listing.broken[directory] = _reason(error)

    # --- reading ----------------------------------------------------------------------------------

    def _changes(self, listing: _Listing, writing: frozenset[str]) -> Iterator[_Change]:
        """What differs from what was read before; notes it as read. `writing`: leave these alone."""
        if self._blind:
            listing.broken["inotify"] = self._blind
        for place, reason in sorted(listing.broken.items()):
            if self._broken.get(place) != reason:
                shown = "" if place == "inotify" else self._show(place)
                text = reason if not shown else f"cannot be read: {reason}; {_STILL_KEPT}"
                problem = Problem(shown, "", "", text)
                yield _Change(_place(place), Contents(problems=[problem]))
        for place in sorted(self._broken.keys() - listing.broken.keys()):
            yield _Change(_place(place), None)
        self._broken = listing.broken

        current = set(listing.files.values())
        for real, path in sorted(listing.files.items(), key=lambda item: item[1]):
            if real not in writing:
                change = self._read(path)
                if change is not None:
                    yield change
        for path in sorted(self._known.keys() - current):
            if not any(path == place or path.startswith(f"{place}/") for place in listing.broken):
                del self._known[path]
                yield _Change(self._show(path), None)

    def _read(self, path: str) -> _Change | None:
        """What the file holds, or None when that has not changed."""
        known = self._known.get(path)
        origin = self._show(path)
        try:
            if known is not None:
                status = os.stat(path)
                if not known.racy and _signature(status) == known.signature:
                    return None
                if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
                    return None  # a pipe is read once
            data, signature = _read_file(path)
        except FileNotFoundError:
            if not os.path.islink(path):
                return None  # gone since the directory was listed: there will be an event
            return self._unusable(path, "cannot be read: it is a link to nothing")
        except OSError as error:
            return self._unusable(path, f"cannot be read: {_reason(error)}")
        digest = hashlib.blake2b(data, digest_size=16).digest()
        racy = time.time_ns() - max(signature[2], signature[3]) < _RACY_NS
        if known is not None and known.digest == digest:
            self._known[path] = _File(signature, racy, digest, known.skipped)
            return None
        if known is not None and not data.strip():
            skipped = known.skipped
            contents = Contents(problems=[Problem(origin, "", "", "is empty")])
        else:
            contents = read_contents(data, origin, only_json=path.endswith(".json"))
            skipped = contents.skipped
        self._known[path] = _File(signature, racy, digest, skipped)
        return _Change(origin, contents, path, known)

    def _unusable(self, path: str, reason: str) -> _Change:
        known = self._known.get(path)
        origin = self._show(path)
        skipped: Counter[str] = known.skipped if known is not None else Counter()
        self._known[path] = _File((0, 0, 0, 0, 0), True, b"", skipped)
        return _Change(origin, Contents(problems=[Problem(origin, "", "", reason)]), path, known)

    def _apply(self, changes: list[_Change]) -> None:
        for change in changes:
            if change.path and self._writing and os.path.realpath(change.path) in self._writing:
                # Somebody began to write while it was read: not this, but what it will be.
                if change.before is None:
                    self._known.pop(change.path, None)
                else:
                    self._known[change.path] = change.before
            elif change.contents is None:
                self._store.remove(change.origin)
            else:
                self._store.replace(change.origin, change.contents.objects, change.contents.problems)
                if self._note is not None:
                    self._note(change.origin, change.contents)
        self._skipped = Counter()
        for known in self._known.values():
            self._skipped.update(known.skipped)

    def _show(self, path: str) -> str:
        """The path as the user gave it; what is no text or no plain character is escaped: paths are
        printed, and a file's name must not move the terminal's cursor."""
        for root in self._roots:
            if path == root or path.startswith(f"{root}/"):
                path = self._shown[root].rstrip("/") + path[len(root) :] or path
                break
        text = os.fsencode(path).decode("utf-8", "backslashreplace")
        return "".join(
            character if character.isprintable() else character.encode("unicode_escape").decode()
            for character in text
        )

    # --- watching -----------------------------------------------------------------------------------

    def _open(self) -> INotify | None:
        try:
            return INotify(nonblocking=True)
        except OSError as error:
            self._blind = f"files cannot be watched ({_reason(error)}); looking at them every second"
            return None

    def _watch(self, listing: _Listing) -> bool:
        """Watch what the listing asks for. Whether anything is watched that was not before."""
        watcher = self._watcher
        if watcher is None:
            return False
        wanted: dict[int, _Watch] = {}
        blind = ""
        for path, watch in sorted(listing.watches.items()):
            try:
                wanted[watcher.add_watch(path, watch.mask | flags.ONLYDIR | flags.MASK_ADD)] = watch
            except OSError as error:
                if error.errno not in (*_GONE, errno.EACCES):  # of those the listing tells
                    blind = f"{path} cannot be watched ({_reason(error)}"
                    blind += "; raise fs.inotify.max_user_watches" if error.errno == errno.ENOSPC else ""
                    blind += "); looking at the files every second"
        new = bool(wanted.keys() - self._watches.keys()) or blind != self._blind
        for gone in self._watches.keys() - wanted.keys():
            with contextlib.suppress(OSError):  # gone already, with its directory
                watcher.rm_watch(gone)
        self._watches = wanted
        self._blind = blind
        return new

    def _on_events(self) -> None:
        now = time.monotonic()
        for event in self._watcher.read(timeout=0) if self._watcher is not None else ():
            watch = self._watches.get(event.wd)
            if event.mask & flags.IGNORED:
                self._watches.pop(event.wd, None)
            if watch is not None and not watch.matters(event):
                continue
            path = os.path.join(watch.directory if watch is not None else "", event.name)
            if event.mask & flags.ISDIR or not event.name:
                pass
            elif event.mask & flags.MODIFY or (event.mask & flags.CREATE and _just_made(path)):
                self._writing[path] = now + self._hold
            elif not event.mask & flags.ATTRIB:
                self._writing.pop(path, None)
            self._wake.set()

    def _patience(self) -> float | None:
        """Seconds after which to look even without an event."""
        waits = [until - time.monotonic() for until in self._writing.values()]
        if self._blind:
            waits.append(_LOOK_AGAIN)
        return max(min(waits), 0.001) if waits else None


def _note_file(path: str, listing: _Listing) -> None:
    real = os.path.realpath(path)
    listing.files.setdefault(real, path)
    watch = listing.watch(os.path.dirname(real))
    watch.names.add(os.path.basename(real))
    watch.mask = _FILES


def _note_ancestors(path: str, listing: _Listing) -> None:
    """Every directory on the way to a named path: it may be renamed, deleted and made again."""
    while (parent := os.path.dirname(path)) != path:
        if os.path.isdir(parent):
            listing.watch(os.path.realpath(parent)).names.add(os.path.basename(path))
        path = parent


def _is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _is_file(entry: os.DirEntry[str]) -> bool:
    """A regular file, or a link that leads nowhere: that is worth a word. Not a pipe or device."""
    try:
        return entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))
    except OSError:
        return True


def _just_made(path: str) -> bool:
    """Whether a new entry is a file that somebody is about to fill: not a link, soft or hard."""
    try:
        status = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1


def _place(place: str) -> str:
    """The origin of problems about a directory; no file is called so."""
    return f"\0{place}"


def _signature(status: os.stat_result) -> _Signature:
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size


def _read_file(path: str) -> tuple[bytes, _Signature]:
    # O_NONBLOCK: a FIFO without a writer must not stop us.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise OSError(0, "it is a directory")
        if stat.S_ISREG(status.st_mode) and status.st_size > MAX_FILE:
            raise OSError(0, f"larger than {MAX_FILE >> 20} MiB; split it")
        if not stat.S_ISREG(status.st_mode):
            os.set_blocking(descriptor, True)
        data = file.read(MAX_FILE + 1)
        if len(data) > MAX_FILE:
            raise OSError(0, f"larger than {MAX_FILE >> 20} MiB; split it")
        return data, _signature(status)


def _reason(error: OSError) -> str:
    text = error.strerror or str(error)
    return text[:1].lower() + text[1:]
