"""The demo: it ends well by itself, says so when packets do otherwise, and leaves nothing behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import PODGATE, ROOT, import_path
from objects import until

from dataplane.lab import demo, netns, world

pytestmark = [pytest.mark.netns, pytest.mark.timeout(120)]

EXAMPLES = ROOT / "deploy/examples/stars"


def _start() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*PODGATE, "lab", "demo", "stars"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": import_path()},
        # A test runner in the background passes on that SIGINT is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def _lines(name: str) -> list[str]:
    return (EXAMPLES / name).read_text().splitlines(keepends=True)


def _left(pid: int) -> list[str]:
    """What is left of a demo: namespaces, state, processes."""
    name = f"demo-{pid}"
    spaces = [space.name for space in netns.RUN.glob(f"{name}-*")]
    processes = [
        path.parent.name for path in Path("/proc").glob("[0-9]*/cmdline") if name.encode() in _read(path)
    ]
    return [*spaces, *processes, *(found for found in world.names() if found == name)]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_the_demo_ends_well_and_leaves_nothing() -> None:
    process = _start()
    out, err = process.communicate(timeout=90)
    assert process.returncode == 0, out + err
    assert out.isascii(), "colour and drawing characters are for terminals"
    assert out.count("All 24 connections did what the policies say.") == 5
    assert "policy-rule of stars/backend" in out
    assert "policy-rule of stars/allow-ui" in out
    assert "policy-rule of stars/frontend" in out, "by the name of the port"
    shown = "head -n 8 deploy/examples/stars/01-default-deny.yaml\n"
    assert out.partition(shown)[2].startswith("".join(_lines("01-default-deny.yaml")[:8]))
    shown = "cat deploy/examples/stars/03-backend-from-frontend.yaml\n"
    assert out.partition(shown)[2].startswith("".join(_lines("03-backend-from-frontend.yaml")))
    assert "no-rule" in out
    assert "client/client is in namespace client" in out, "why the backend's rule does not match"
    for line in demo.NEXT:
        assert f"$ {line}\n" in out
        argv = [*PODGATE, *line.split()[1:]]
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert "were cut" in out
    assert not _left(process.pid)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_nothing(number: signal.Signals) -> None:
    process = _start()
    until(lambda: any(_agents(process.pid)), 20, "the agent of the demo")
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert "Traceback" not in err
    assert not _left(process.pid)


def _agents(pid: int) -> list[int]:
    return netns.processes([f"demo-{pid}-node"])


def test_packets_that_do_otherwise_end_the_demo(
    tmp_path: Path, lab_name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    examples = tmp_path / "examples"
    shutil.copytree(EXAMPLES, examples)
    broken = examples / "03-backend-from-frontend.yaml"
    text = broken.read_text()
    frontend, everybody = "matchLabels: {app: frontend}", "matchLabels: {}\n          namespaceSelector: {}"
    assert text.count(frontend) == 1
    broken.write_text(text.replace(frontend, everybody))
    began = time.monotonic()
    with pytest.raises(demo.DemoFailed, match="client reaches backend on IPv4, and must not") as failure:
        demo._Demo(lab_name, examples).play()
    assert failure.value.exit_code == 1
    assert "\n" not in str(failure.value)
    assert time.monotonic() - began < 30
    assert lab_name not in world.names()
    assert not list(netns.RUN.glob(f"{lab_name}-*"))
    capsys.readouterr()


def test_a_demo_that_was_killed_is_swept_by_the_next() -> None:
    process = _start()
    until(lambda: any(_agents(process.pid)), 20, "the agent of the demo")
    process.kill()
    process.communicate()
    until(lambda: not _agents(process.pid), 10, "the agent to end with the demo")
    assert _left(process.pid)
    demo._sweep()
    assert not _left(process.pid)
