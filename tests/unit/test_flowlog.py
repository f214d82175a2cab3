"""The flow log's file: rotated, full, torn; and its limits."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dataplane.errors import InputError
from dataplane.observe.flowlog import BURST_SECONDS, LOOK_SECONDS, Limit, LineFile


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Log:
    """What people are told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, object]] = []

    def error(self, event: str, **fields: object) -> None:
        self.told.append((event, fields.get("problem")))

    def info(self, event: str, **fields: object) -> None:
        self.told.append((event, fields["lines_lost"]))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def log() -> Log:
    return Log()


def opened(path: Path | str, log: Log, clock: Clock) -> LineFile:
    file = LineFile(str(path), log, clock)  # type: ignore[arg-type]
    file.open()
    return file


@pytest.mark.parametrize("how", ["moved", "removed", "replaced"])
def test_a_rotated_file_is_left_for_a_new_one(tmp_path: Path, log: Log, clock: Clock, how: str) -> None:
    path = tmp_path / "flows"
    file = opened(path, log, clock)
    assert file.write([b"a\n", b"b\n"]) == 2
    old = tmp_path / "flows.1"
    if how == "removed":
        path.unlink()
    else:
        path.rename(old)
    if how == "replaced":
        path.write_bytes(b"new\n")
    file.write([b"c\n"])  # within the second the old one still takes it
    clock.now += LOOK_SECONDS
    assert file.write([b"d\n"]) == 1
    assert path.read_bytes() == (b"new\nd\n" if how == "replaced" else b"d\n")
    if how != "removed":
        assert old.read_bytes() == b"a\nb\nc\n"
    assert (file.lost, log.told) == (0, [])
    file.close()


def test_a_truncated_file_is_appended_to(tmp_path: Path, log: Log, clock: Clock) -> None:
    path = tmp_path / "flows"
    file = opened(path, log, clock)
    file.write([b"a\n"] * 100)
    os.truncate(path, 0)
    file.write([b"b\n"])
    assert path.read_bytes() == b"b\n"


def test_where_no_new_file_can_be_made_the_old_one_is_written_on(
    tmp_path: Path, log: Log, clock: Clock
) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    file = opened(folder / "flows", log, clock)
    folder.rename(tmp_path / "there")
    for line in (b"a\n", b"b\n"):
        clock.now += LOOK_SECONDS
        assert file.write([line]) == 1
    assert (tmp_path / "there" / "flows").read_bytes() == b"a\nb\n"
    assert file.lost == 0


def test_a_full_disk_is_said_once_and_loses_lines(log: Log, clock: Clock) -> None:
    file = opened("/dev/full", log, clock)
    assert [file.write([b"a\n", b"b\n"]) for _ in range(3)] == [0, 0, 0]
    assert file.lost == 6
    assert log.told == [("flow log", "No space left on device")]


def test_a_line_that_was_cut_off_does_not_spoil_the_next(
    tmp_path: Path, log: Log, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "flows"
    file = opened(path, log, clock)
    write, room = os.write, [9]

    def short(fd: int, data: bytes) -> int:
        taken = min(len(data), room[0])
        if not taken:
            raise OSError(28, "No space left on device")
        room[0] -= taken
        return write(fd, data[:taken])

    monkeypatch.setattr(os, "write", short)
    assert file.write([b"first\n", b"second\n"]) == 1
    assert file.write([b"third\n"]) == 0
    room[0] = 1000
    assert file.write([b"fourth\n"]) == 1
    assert path.read_bytes() == b"first\nsec\nfourth\n"
    assert file.lost == 2
    assert log.told == [("flow log", "No space left on device"), ("flow log is written again", 2)]


@pytest.mark.parametrize("target", ["missing/flows", "."])
def test_what_cannot_be_opened_is_said_at_once(tmp_path: Path, log: Log, clock: Clock, target: str) -> None:
    with pytest.raises(InputError, match="--flow-log"):
        opened(tmp_path / target, log, clock)


def test_a_fifo_without_a_reader_does_not_hold_anybody_up(tmp_path: Path, log: Log, clock: Clock) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(InputError):
        opened(tmp_path / "fifo", log, clock)


def test_a_limit_is_for_each_kind_and_counts(clock: Clock) -> None:
    limit = Limit(2.0, clock)
    burst = int(2 * BURST_SECONDS)
    assert sum(limit.allow("no-rule") for _ in range(1000)) == burst
    assert limit.allow("spoofed")
    assert dict(limit.suppressed) == {"no-rule": 1000 - burst}
    clock.now += 3.0
    assert sum(limit.allow("no-rule") for _ in range(1000)) == 6
    clock.now += 1000.0
    assert sum(limit.allow("no-rule") for _ in range(1000)) == burst
    assert all(Limit(0.0, clock).allow("no-rule") for _ in range(10_000))
