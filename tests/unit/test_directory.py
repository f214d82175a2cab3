"""Files and directories on disk, read once and followed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from dataplane.errors import InputError
from dataplane.model import Snapshot
from dataplane.sources import directory
from dataplane.sources.directory import DirectorySource, Place, read_paths
from dataplane.sources.store import Store


def policy(name: str = "p", cidr: str = "10.0.0.1/32") -> str:
    return f"""\
apiVersion: networking.k8s.aws/v1alpha1
kind: PolicyEndpoint
metadata:
  creationTimestamp: 2026-01-31T12:00:00Z
  name: {name}
  namespace: x
spec:
  policyRef:
    name: {name}
    namespace: x
  podIsolation:
  - Ingress
  podSelectorEndpoints:
  - hostIP: 192.0.2.1
    name: a
    namespace: x
    podIP: 10.0.0.5
  ingress:
  - cidr: {cidr}
"""


def cidrs(snapshot: Snapshot) -> dict[str, str]:
    """PolicyEndpoint → the cidr of its only rule."""
    return {p.key.name: ",".join(str(rule.cidr) for rule in p.ingress) for p in snapshot.policy_endpoints}


def lines(snapshot: Snapshot) -> list[str]:
    return [str(problem) for problem in snapshot.problems]


# --- once ---------------------------------------------------------------------------------------------


def test_file_and_directories(tmp_path: Path) -> None:
    (tmp_path / "d" / "deep" / "er").mkdir(parents=True)
    (tmp_path / "d" / "a.yaml").write_text(policy("a"))
    (tmp_path / "d" / "b.yml").write_text(policy("b"))
    (tmp_path / "d" / "deep" / "er" / "c.yaml").write_text(policy("c"))
    (tmp_path / "single.txt").write_text(policy("single"))
    for name in ("notes.txt", "a.yaml~", ".hidden.yaml", "a.yaml.swp"):
        (tmp_path / "d" / name).write_text(policy("never"))
    (tmp_path / "d" / ".git").mkdir()
    (tmp_path / "d" / ".git" / "x.yaml").write_text(policy("never"))
    snapshot = read_paths([tmp_path / "d", tmp_path / "single.txt"]).snapshot
    assert set(cidrs(snapshot)) == {"a", "b", "c", "single"}
    assert snapshot.problems == ()


def test_the_same_file_by_two_paths_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(policy("a"))
    (tmp_path / "b.yaml").symlink_to("a.yaml")
    snapshot = read_paths([tmp_path, tmp_path / "a.yaml", tmp_path]).snapshot
    assert cidrs(snapshot) == {"a": "10.0.0.1/32"}
    assert snapshot.problems == ()


def test_paths_show_as_they_were_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.yaml").write_text("a: [")
    monkeypatch.chdir(tmp_path)
    assert [p.source for p in read_paths([Path("d")]).snapshot.problems] == ["d/a.yaml"]
    assert [p.source for p in read_paths([Path("d/a.yaml")]).snapshot.problems] == ["d/a.yaml"]


@pytest.mark.parametrize("name", ["missing", "missing/a.yaml", "file/a.yaml"])
def test_path_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot be read: no(t a directory| such file)"):
        read_paths([tmp_path / name])


def test_bad_document_spares_the_rest(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(policy("a") + "---\n]\n---\n" + policy("b"))
    (tmp_path / "c.json").write_text("{")
    (tmp_path / "d.yaml").write_bytes(b"\xff")
    snapshot = read_paths([tmp_path]).snapshot
    assert set(cidrs(snapshot)) == {"a", "b"}
    assert [Path(p.source).name for p in snapshot.problems] == ["a.yaml", "c.json", "d.yaml"]


def test_file_beyond_the_limit_is_refused_quickly(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(policy("a"))
    with (tmp_path / "huge.yaml").open("wb") as file:
        file.truncate(directory.MAX_FILE + 1)
    start = time.monotonic()
    snapshot = read_paths([tmp_path]).snapshot
    assert time.monotonic() - start < 5
    assert cidrs(snapshot) == {"a": "10.0.0.1/32"}
    assert lines(snapshot) == [f"{tmp_path}/huge.yaml: cannot be read: larger than 128 MiB; split it"]
    with pytest.raises(InputError, match="larger than 128 MiB"):
        read_paths([tmp_path / "huge.yaml"])


def test_links_in_circles_and_to_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(policy("a"))
    (tmp_path / "again").symlink_to(".")
    (tmp_path / "self.yaml").symlink_to("self.yaml")
    (tmp_path / "nothing.yaml").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.yaml")
    snapshot = read_paths([tmp_path]).snapshot
    assert cidrs(snapshot) == {"a": "10.0.0.1/32"}
    assert [Path(p.source).name for p in snapshot.problems] == ["nothing.yaml", "self.yaml"]


def test_name_that_is_no_text(tmp_path: Path) -> None:
    with open(os.fsencode(tmp_path) + b"/\xff.yaml", "w") as file:
        file.write("[")
    (line,) = lines(read_paths([tmp_path]).snapshot)
    assert line.encode()
    assert "\\xff.yaml" in line


def test_kinds_without_meaning_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("kind: Secret\n---\nkind: Secret\n---\n" + policy("a"))
    store = Store()
    source = DirectorySource([tmp_path], store)
    source.load()
    assert source.skipped == {"Secret": 2}
    assert store.snapshot().problems == ()


# --- followed -----------------------------------------------------------------------------------------


class Following:
    """A running source; `until` waits for a snapshot that fulfils a condition."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.latest = store.snapshot()
        self.seen = [self.latest]

    async def until(self, condition: Callable[[Snapshot], bool], seconds: float = 10) -> Snapshot:
        async with asyncio.timeout(seconds):
            while not condition(self.latest):
                await self.store.wait_change()
                self.latest = self.store.snapshot()
                self.seen.append(self.latest)
        return self.latest

    async def until_cidrs(self, **expected: str) -> Snapshot:
        try:
            return await self.until(lambda snapshot: cidrs(snapshot) == expected)
        except TimeoutError:
            raise AssertionError(f"{cidrs(self.latest)} is not {expected}: {self.latest.problems}") from None


@contextlib.asynccontextmanager
async def following(*paths: Path, hold: float = 5.0) -> AsyncIterator[Following]:
    store = Store()
    source = DirectorySource(paths, store, hold=hold)
    source.load()
    task = asyncio.create_task(source.run())
    try:
        yield Following(store)
        assert not task.done(), task
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(scenario)


def put(path: Path, text: str) -> None:
    """Replace a file by rename, as careful writers do."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    temporary.rename(path)


def test_edits_in_every_manner(tmp_path: Path) -> None:
    async def scenario() -> None:
        file = tmp_path / "a.yaml"
        file.write_text(policy("a", "10.0.0.1"))
        async with following(tmp_path) as follow:
            await follow.until_cidrs(a="10.0.0.1/32")
            file.write_text(policy("a", "10.0.0.2"))
            await follow.until_cidrs(a="10.0.0.2/32")
            put(file, policy("a", "10.0.0.3"))
            await follow.until_cidrs(a="10.0.0.3/32")
            with file.open("r+") as opened:
                opened.write(policy("a", "10.0.0.4"))
            await follow.until_cidrs(a="10.0.0.4/32")
            (tmp_path / "b.yaml").write_text(policy("b"))
            await follow.until_cidrs(a="10.0.0.4/32", b="10.0.0.1/32")
            file.unlink()
            await follow.until_cidrs(b="10.0.0.1/32")
            (tmp_path / "b.yaml").rename(tmp_path / "c.json~")
            await follow.until_cidrs()
            (tmp_path / "c.json~").rename(tmp_path / "c.yaml")
            await follow.until_cidrs(b="10.0.0.1/32")

    run(scenario())


def test_edits_that_follow_at_once_are_all_seen(tmp_path: Path) -> None:
    # Same length, same tick of the clock: the time stamps alone do not tell.
    async def scenario() -> None:
        file = tmp_path / "a.yaml"
        file.write_text(policy("a", "10.0.0.1"))
        async with following(tmp_path) as follow:
            for number in range(1, 60):
                file.write_text(policy("a", f"10.1.{number}.9"))
                if number % 7 == 0:
                    await asyncio.sleep(0)
            await follow.until_cidrs(a="10.1.59.9/32")

    run(scenario())


def test_edit_is_in_the_snapshot_within_100_ms(tmp_path: Path) -> None:
    async def scenario() -> None:
        file = tmp_path / "a.yaml"
        file.write_text(policy("a", "10.0.0.1"))
        async with following(tmp_path) as follow:
            file.write_text(policy("a", "10.0.0.2"))
            await follow.until_cidrs(a="10.0.0.2/32")
            delays = []
            for number in range(3, 14):
                start = time.monotonic()
                file.write_text(policy("a", f"10.0.0.{number}"))
                await follow.until_cidrs(a=f"10.0.0.{number}/32")
                delays.append(time.monotonic() - start)
            assert sorted(delays)[len(delays) // 2] < 0.1, delays

    run(scenario())


def test_file_is_not_read_while_it_is_being_written(tmp_path: Path) -> None:
    async def scenario() -> None:
        file = tmp_path / "a.yaml"
        file.write_text(policy("a", "10.0.0.0/24"))
        other = tmp_path / "z.yaml"
        async with following(tmp_path) as follow:
            await follow.until_cidrs(a="10.0.0.0/24")
            with file.open("w") as opened:
                # Up to here it is valid, and allows much more than it will.
                opened.write(policy("a", "10.0.0.0/2").rstrip("\n"))
                opened.flush()
                for number in range(5):  # others' changes make it look again and again
                    put(other, policy("z", f"10.9.0.{number}"))
                    await follow.until_cidrs(a="10.0.0.0/24", z=f"10.9.0.{number}/32")
                opened.write("5\n")
            await follow.until_cidrs(a="10.0.0.0/25", z="10.9.0.4/32")
            assert {cidrs(snapshot)["a"] for snapshot in follow.seen} == {"10.0.0.0/24", "10.0.0.0/25"}

    run(scenario())


def test_new_file_is_not_read_while_it_is_being_written(tmp_path: Path) -> None:
    async def scenario() -> None:
        (tmp_path / "z.yaml").write_text(policy("z", "10.9.0.1"))
        async with following(tmp_path) as follow:
            put(tmp_path / "z.yaml", policy("z", "10.9.0.2"))
            await follow.until_cidrs(z="10.9.0.2/32")  # the watches stand
            with (tmp_path / "a.yaml").open("w") as opened:
                opened.write(policy("a", "10.0.0.0/2").rstrip("\n"))
                opened.flush()
                put(tmp_path / "z.yaml", policy("z", "10.9.0.3"))
                await follow.until_cidrs(z="10.9.0.3/32")
                opened.write("5\n")
            await follow.until_cidrs(a="10.0.0.0/25", z="10.9.0.3/32")

    run(scenario())


def test_file_that_is_never_closed_is_read_in_the_end(tmp_path: Path) -> None:
    async def scenario() -> None:
        file = tmp_path / "a.yaml"
        file.write_text(policy("a", "10.0.0.1"))
        async with following(tmp_path, hold=0.2) as follow:
            with file.open("w") as opened:
                opened.write(policy("a", "10.0.0.2"))
                opened.flush()
                await follow.until_cidrs(a="10.0.0.2/32")

    run(scenario())


@pytest.mark.parametrize("text", ["a: [", "", "\n", "\x00", "- x\n", policy("a").replace("name: a\n", "", 1)])
def test_broken_file_keeps_its_last_good_content(tmp_path: Path, text: str) -> None:
    async def scenario() -> None:
        file = tmp_path / "a.yaml"
        file.write_text(policy("a", "10.0.0.1"))
        async with following(tmp_path) as follow:
            put(file, text)
            snapshot = await follow.until(lambda snapshot: bool(snapshot.problems))
            assert cidrs(snapshot) == {"a": "10.0.0.1/32"}
            assert all(p.source == str(file) for p in snapshot.problems)
            assert "stays in force" in lines(snapshot)[0]
            put(file, policy("a", "10.0.0.2"))
            assert (await follow.until_cidrs(a="10.0.0.2/32")).problems == ()
            put(file, "# nothing any more\n")
            assert (await follow.until_cidrs()).problems == ()

    run(scenario())


def test_broken_object_keeps_its_last_good_version(tmp_path: Path) -> None:
    async def scenario() -> None:
        file = tmp_path / "a.yaml"
        file.write_text(policy("a") + "---\n" + policy("b"))
        async with following(tmp_path) as follow:
            put(file, policy("a").replace("policyRef:", "policyref:") + "---\n" + policy("b", "10.0.0.2"))
            snapshot = await follow.until_cidrs(a="10.0.0.1/32", b="10.0.0.2/32")
            assert lines(snapshot) == [
                f"{file}: PolicyEndpoint x/a: spec.policyRef: missing; its last good version stays in force"
            ]

    run(scenario())


def test_new_subdirectory_is_followed(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with following(tmp_path) as follow:
            (tmp_path / "d" / "e").mkdir(parents=True)
            (tmp_path / "d" / "e" / "a.yaml").write_text(policy("a"))
            await follow.until_cidrs(a="10.0.0.1/32")
            (tmp_path / "d" / "e" / "a.yaml").write_text(policy("a", "10.0.0.2"))
            await follow.until_cidrs(a="10.0.0.2/32")
            (tmp_path / "d").rename(tmp_path / "f")
            await asyncio.sleep(0)
            put(tmp_path / "f" / "e" / "a.yaml", policy("a", "10.0.0.3"))
            await follow.until_cidrs(a="10.0.0.3/32")
            (tmp_path / "f").rename(tmp_path / ".hidden")
            await follow.until_cidrs()

    run(scenario())


def swap(mount: Path, number: int, files: dict[str, str]) -> None:
    """Change a mounted ConfigMap as kubelet does: a new directory, and `..data` renamed onto it."""
    fresh = mount / f"..2026_{number}"
    fresh.mkdir()
    for name, text in files.items():
        (fresh / name).write_text(text)
    old = (mount / "..data").readlink() if (mount / "..data").is_symlink() else None
    (mount / "..data_tmp").symlink_to(fresh.name)
    (mount / "..data_tmp").rename(mount / "..data")
    for name in files:
        if not (mount / name).is_symlink():
            (mount / name).symlink_to(Path("..data") / name)
    for entry in list(mount.iterdir()):
        if not entry.name.startswith("..") and entry.name not in files:
            entry.unlink()
    if old is not None:
        for entry in (mount / old).iterdir():
            entry.unlink()
        (mount / old).rmdir()


def test_mounted_config_map(tmp_path: Path) -> None:
    async def scenario() -> None:
        swap(tmp_path, 1, {"a.yaml": policy("a"), "b.yaml": policy("b")})
        async with following(tmp_path) as follow:
            await follow.until_cidrs(a="10.0.0.1/32", b="10.0.0.1/32")
            for number in range(2, 6):
                swap(tmp_path, number, {"a.yaml": policy("a", f"10.0.0.{number}"), "b.yaml": policy("b")})
                snapshot = await follow.until_cidrs(a=f"10.0.0.{number}/32", b="10.0.0.1/32")
            swap(tmp_path, 9, {"b.yaml": policy("b", "10.0.0.9")})
            snapshot = await follow.until_cidrs(b="10.0.0.9/32")
            assert snapshot.problems == ()

    run(scenario())


def test_link_to_a_file_elsewhere(tmp_path: Path) -> None:
    async def scenario() -> None:
        (tmp_path / "d").mkdir()
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "v1.txt").write_text(policy("a"))
        (tmp_path / "d" / "a.yaml").symlink_to(tmp_path / "elsewhere" / "v1.txt")
        async with following(tmp_path / "d") as follow:
            (tmp_path / "elsewhere" / "v1.txt").write_text(policy("a", "10.0.0.2"))
            await follow.until_cidrs(a="10.0.0.2/32")
            put(tmp_path / "elsewhere" / "v1.txt", policy("a", "10.0.0.3"))
            await follow.until_cidrs(a="10.0.0.3/32")
            (tmp_path / "elsewhere" / "v1.txt").unlink()
            snapshot = await follow.until(lambda snapshot: bool(snapshot.problems))
            assert cidrs(snapshot) == {"a": "10.0.0.3/32"}

    run(scenario())


def test_named_file_is_followed_through_replacement(tmp_path: Path) -> None:
    async def scenario() -> None:
        file = tmp_path / "rules"
        file.write_text(policy("a"))
        async with following(file) as follow:
            (tmp_path / "other.yaml").write_text(policy("never"))
            put(file, policy("a", "10.0.0.2"))
            await follow.until_cidrs(a="10.0.0.2/32")
            file.write_text(policy("a", "10.0.0.3"))
            await follow.until_cidrs(a="10.0.0.3/32")

    run(scenario())


@pytest.mark.parametrize("deep", [False, True])
def test_named_directory_that_vanishes_keeps_what_it_held(tmp_path: Path, deep: bool) -> None:
    async def scenario() -> None:
        source = tmp_path / "mnt" / "policies"
        source.mkdir(parents=True)
        (source / "a.yaml").write_text(policy("a"))
        async with following(source) as follow:
            (source if not deep else source.parent).rename(tmp_path / "gone")
            snapshot = await follow.until(lambda snapshot: bool(snapshot.problems))
            assert cidrs(snapshot) == {"a": "10.0.0.1/32"}
            assert lines(snapshot) == [
                f"{source}: cannot be read: no such file or directory; "
                "what was read from it before stays in force"
            ]
            source.mkdir(parents=True)
            (source / "b.yaml").write_text(policy("b"))
            assert (await follow.until_cidrs(b="10.0.0.1/32")).problems == ()

    run(scenario())


def test_link_to_a_directory_may_be_turned(tmp_path: Path) -> None:
    async def scenario() -> None:
        for number in (1, 2):
            (tmp_path / f"v{number}").mkdir()
            (tmp_path / f"v{number}" / "a.yaml").write_text(policy("a", f"10.0.0.{number}"))
        (tmp_path / "current").symlink_to("v1")
        async with following(tmp_path / "current") as follow:
            await follow.until_cidrs(a="10.0.0.1/32")
            (tmp_path / "next").symlink_to("v2")
            (tmp_path / "next").rename(tmp_path / "current")
            await follow.until_cidrs(a="10.0.0.2/32")

    run(scenario())


def test_a_change_between_load_and_run_is_seen(tmp_path: Path) -> None:
    async def scenario() -> None:
        file = tmp_path / "a.yaml"
        file.write_text(policy("a"))
        store = Store()
        source = DirectorySource([tmp_path], store)
        source.load()
        file.write_text(policy("a", "10.0.0.2"))
        follow = Following(store)
        task = asyncio.create_task(source.run())
        await follow.until_cidrs(a="10.0.0.2/32")
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    run(scenario())


def test_without_inotify_files_are_still_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(**_settings: bool) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(directory, "INotify", refused)

    async def scenario() -> None:
        file = tmp_path / "a.yaml"
        file.write_text(policy("a"))
        async with following(tmp_path) as follow:
            snapshot = await follow.until(lambda snapshot: bool(snapshot.problems))
            assert "looking at them every second" in lines(snapshot)[0]
            file.write_text(policy("a", "10.0.0.2"))
            await follow.until_cidrs(a="10.0.0.2/32")

    run(scenario())


def test_nothing_is_left_open(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(policy("a"))

    async def scenario() -> None:
        async with following(tmp_path) as follow:
            put(tmp_path / "a.yaml", policy("a", "10.0.0.2"))
            await follow.until_cidrs(a="10.0.0.2/32")

    def inotifies() -> int:
        kinds = []
        for link in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):
                kinds.append(os.readlink(link))
        return sum("inotify" in kind for kind in kinds)

    before = inotifies()
    run(scenario())
    assert inotifies() == before


def test_places_name_the_file_and_the_line_an_object_begins_in(tmp_path: Path) -> None:
    text = (
        "# a comment\n"
        "kind: Namespace\n"
        "apiVersion: v1\n"
        "metadata: {name: a}\n"
        "---\n"
        "---\n"
        "\n"
        "apiVersion: v1\n"
        "kind: List\n"
        "items:\n"
        "- kind: Namespace\n"
        "  metadata: {name: b}\n"
        "- kind: Pod\n"
        "  metadata: {name: c, namespace: b}\n"
        "- {kind: NetworkPolicy, metadata: {name: bad}, spec: {podSelector: 3}}\n"
    )
    (tmp_path / "1.yaml").write_text(text)
    one_line = '{"kind": "Namespace", "metadata": {"name": "%s"}}'
    (tmp_path / "2.json").write_text("\n" + one_line % "d" + "\n" + one_line % "a")
    snapshot, places, _ = read_paths([tmp_path])
    assert [namespace.name for namespace in snapshot.namespaces] == ["a", "b", "d"]
    first, second = str(tmp_path / "1.yaml"), str(tmp_path / "2.json")
    assert places == {
        "Namespace a": Place(second, 3),  # of several files the last counts
        "Namespace b": Place(first, 11),
        "Pod b/c": Place(first, 13),
        "NetworkPolicy default/bad": Place(first, 15),
        "Namespace d": Place(second, 2),
    }


def test_objects_of_a_json_list_have_a_file_and_no_line(tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    path.write_text('{"kind": "List", "items": [\n{"kind": "Namespace", "metadata": {"name": "a"}}]}')
    assert read_paths([path]).places == {"Namespace a": Place(str(path), None)}
