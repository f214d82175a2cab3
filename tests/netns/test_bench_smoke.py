"""The whole-path benchmark runs, measures every path and leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.netns
BENCH = Path(__file__).resolve().parents[2] / "bench" / "whole_path.py"


def test_quick_run(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root: run the tests with sudo")
    missing = [tool for tool in ("ip", "iptables-restore", "ipset", "cc") if not shutil.which(tool)]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: install iproute2, iptables, ipset and gcc")
    target = tmp_path / "quick.json"
    with subprocess.Popen(
        [sys.executable, str(BENCH), "--quick", "--rules", "100", "--json", str(target)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        output, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors
    assert "too short to judge" in output
    samples = json.loads(target.read_text())["samples"]
    assert set(samples) == {"udp", "tcp", "connect"}
    for path, (sample,) in samples["udp"].items():
        assert sample["cpu_us"] > 0, path
        assert sample["lost"] == 0, path
        assert (sample["queue_us"] > 0) == (path not in ("plain", "accept")), path
    assert all(sample["gbit"] > 0 for (sample,) in samples["tcp"].values())
    assert all(0 < sample["p50"] <= sample["p99"] for (sample,) in samples["connect"].values())
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert f"pgb{process.pid}-" not in left


def test_bad_options_are_one_line() -> None:
    done = subprocess.run(
        [sys.executable, str(BENCH), "--rounds", "0"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert "Traceback" not in done.stderr
