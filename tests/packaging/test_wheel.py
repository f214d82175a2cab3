"""The sdist and the wheel: complete, the same from either side, and fit for use outside of a checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import time
import tomllib
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
SUFFIX: str = sysconfig.get_config_var("EXT_SUFFIX")
EXAMPLES = "share/podgate/examples"
CRDS = "share/podgate/crds"
SOURCES = sorted((ROOT / "ext/dataplane").glob("*.pyx"))
# Translated and compiled from the sdist. The others are translated, which needs every .pxd, but their
# binaries come from the checkout: that saves a minute.
COMPILED = "_flows"
NEWER = time.time() + 86400
# What a checkout holds beside its sources. Compared with names, so that a test needs no git.
NOT_SOURCES = shutil.ignore_patterns(
    ".*", "build", "dist", "*.egg-info", "__pycache__", "*.so", "results", "floor"
)


def run(argv: Sequence[str | Path], cwd: Path) -> str:
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(argv, cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, f"{argv}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build(kind: str, tree: Path, out: Path) -> Path:
    """Through the build backend, as pip does it, with the tools of this environment."""
    out.mkdir(exist_ok=True)
    code = f"import sys; from setuptools.build_meta import build_{kind} as build; build(sys.argv[1])"
    run([sys.executable, "-W", "ignore", "-c", code, out], tree)
    (made,) = out.iterdir()
    return made


def export(to: Path) -> Path:
    shutil.copytree(ROOT, to, ignore=NOT_SOURCES)
    for pattern in ("*.c", "*.html"):
        for generated in (to / "ext").rglob(pattern):
            generated.unlink()
    return to


def seed(tree: Path, names: Sequence[str]) -> None:
    platform = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    target = tree / f"build/lib.{platform}/dataplane"
    target.mkdir(parents=True)
    for name in names:
        shutil.copy(ROOT / f"dataplane/{name}{SUFFIX}", target)
        os.utime(target / f"{name}{SUFFIX}", (NEWER, NEWER))


@dataclass(frozen=True)
class Built:
    sdist: Path
    from_tree: Path
    from_sdist: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    home = tmp_path_factory.mktemp("wheel")
    names = [source.stem for source in SOURCES]
    tree = export(home / "tree")
    sdist = build("sdist", tree, home / "sdist")
    seed(tree, names)
    for generated in (ROOT / "ext/dataplane").glob("*.c"):
        shutil.copy(generated, tree / "ext/dataplane")
        os.utime(tree / "ext/dataplane" / generated.name, (NEWER, NEWER))
    from_tree = build("wheel", tree, home / "from-tree")
    with tarfile.open(sdist) as archive:
        # The filter came with Python 3.11.4, and Debian 12 has 3.11.2; the archive is our own.
        archive.extractall(home, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    unpacked = home / f"podgate-{VERSION}"
    seed(unpacked, [name for name in names if name != COMPILED])
    return Built(sdist, from_tree, build("wheel", unpacked, home / "from-sdist"))


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_sdist_builds_the_same_wheel(built: Built) -> None:
    assert built.from_tree.name == built.from_sdist.name
    with zipfile.ZipFile(built.from_tree) as one, zipfile.ZipFile(built.from_sdist) as other:
        assert set(one.namelist()) == set(other.namelist())
        for name in one.namelist():
            # A compiled file holds the path it was built in, and RECORD its checksum.
            if not name.endswith((".so", "/RECORD")):
                assert one.read(name) == other.read(name), name


def test_the_sdist_holds_sources_only(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"ext/dataplane/{path.name}" for path in (ROOT / "ext/dataplane").glob("*.p[yx][xd]")} <= held
    assert {"LICENSE", "README.md", "pyproject.toml"} <= held
    assert not [name for name in held if name.endswith((".so", ".c", ".pyc"))]


def test_the_wheel_holds_what_a_user_needs(built: Built) -> None:
    held = names(built.from_sdist)
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "dataplane").rglob("*.py")}
    report = ROOT / "dataplane/report/assets"
    assets = {path.relative_to(ROOT).as_posix() for path in report.iterdir()}
    stubs = {f"dataplane/{source.stem}.pyi" for source in SOURCES}
    extensions = {f"dataplane/{source.stem}{SUFFIX}" for source in SOURCES}
    data = f"podgate-{VERSION}.data/data/{EXAMPLES}"
    source = ROOT / "deploy/examples"
    files = [*source.rglob("*.yaml"), *source.rglob("*.py")]
    examples = {f"{data}/{path.relative_to(source).as_posix()}" for path in files}
    definitions = (ROOT / "deploy/crds").glob("policyendpoints.*.yaml")
    crds = {f"podgate-{VERSION}.data/data/{CRDS}/{path.name}" for path in definitions}
    info = f"podgate-{VERSION}.dist-info"
    facts = {
        f"{info}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt")
    }
    expected = modules | assets | stubs | extensions | examples | crds | facts
    assert len(extensions) == 9
    assert {path.rpartition(".")[2] for path in assets} == {"html", "css", "js"}
    assert held == expected | {"dataplane/py.typed", f"{info}/licenses/LICENSE"}


def test_the_wheel_works_outside_of_a_checkout(built: Built, tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    run([sys.executable, "-m", "venv", "--without-pip", venv], tmp_path)
    python, podgate = venv / "bin/python", venv / "bin/podgate"
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    run([*pip, "install", "--quiet", "--no-index", "--no-deps", built.from_sdist], tmp_path)
    # What podgate depends on, from this environment. A directory named in a .pth file is searched, but its
    # own .pth files are not read: the checkout, installed there as editable, stays out of reach.
    (site,) = venv.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")

    assert run([podgate, "--version"], tmp_path) == f"podgate {VERSION}\n"
    modules = ", ".join(f"dataplane.{source.stem} as m{i}" for i, source in enumerate(SOURCES))
    loaded = ", ".join(f"m{i}" for i in range(len(SOURCES)))
    files = run([python, "-c", f"import {modules}; print(*(m.__file__ for m in ({loaded})))"], tmp_path)
    assert all(Path(file).is_relative_to(venv) for file in files.split())

    lookup = "from dataplane.lab.demo import _examples; print(_examples('stars'))"
    examples = Path(run([python, "-c", lookup], tmp_path).strip())
    assert examples.resolve() == (venv / EXAMPLES / "stars").resolve()
    shutil.copytree(examples, tmp_path / "stars")
    for source, port, expected in (
        ("stars/frontend", "6379/TCP", "allow"),
        ("client/client", "6379/TCP", "deny"),
    ):
        query = ["--from", source, "--to", "stars/backend", "--port", port, "--expect", expected]
        assert expected in run([podgate, "explain", "stars", *query], tmp_path)

    lookup = "from dataplane.controller.prerequisites import definition; print(definition()['spec']['group'])"
    assert run([python, "-c", lookup], tmp_path) == "networking.k8s.aws\n"

    page = run([podgate, "matrix", "stars", "--port", "80/TCP", "-o", "html"], tmp_path)
    for asset in (ROOT / "dataplane/report/assets").glob("page.[jc]s*"):
        assert asset.read_text() in page
