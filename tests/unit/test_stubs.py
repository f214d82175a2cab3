"""The type stubs say what the compiled modules have."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


ALLOWED = ["--allowlist", "tests/stubtest-allowlist.txt", "--ignore-unused-allowlist"]
MODULES = [f"dataplane.{path.stem}" for path in sorted((ROOT / "dataplane").glob("_*.pyi"))]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("module", MODULES)
def test_stub_matches_the_compiled_module(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mypy.stubtest", module, *ALLOWED],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_compiled_module_has_a_stub() -> None:
    compiled = {f"dataplane.{path.stem}" for path in (ROOT / "ext" / "dataplane").glob("_*.pyx")}
    assert compiled == set(MODULES)
