"""What `podgate controller` takes and refuses, from the command line and the environment."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dataplane.cli import controller, main
from dataplane.config import BindAddress

ROOT = Path(__file__).parents[2]


def podgate(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    monkeypatch.setattr(sys, "argv", ["podgate", "controller", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither in a pod nor with anybody's kubeconfig."""
    for name in ("KUBECONFIG", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def test_every_option_comes_from_the_environment_too(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        "kubeconfig": ("/k", "/k"),
        "install_crd": ("false", False),
        "lease_namespace": ("podgate", "podgate"),
        "lease_name": ("one", "one"),
        "writes_per_second": ("7", 7),
        "coalesce_ms": ("5", 5),
        "coalesce_limit_ms": ("50", 50),
        "metrics_bind_addr": ("127.0.0.1:1", BindAddress("127.0.0.1", 1)),
        "health_probe_bind_addr": ("0", None),
        "log_format": ("json", "json"),
    }
    for name, (text, _) in given.items():
        monkeypatch.setenv(f"PODGATE_{name.upper()}", text)
    options = controller.command.make_context("controller", []).params
    assert options == {name: value for name, (_, value) in given.items()}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "podgate: no way to the API server: not in a pod, no --kubeconfig or KUBECONFIG"),
        (["--kubeconfig", "/nope"], "podgate: kubeconfig /nope: no such file"),
        (["--lease-name", "A_b"], "podgate: --lease-name 'A_b' is not a Kubernetes name"),
        (["--lease-namespace", "a/b"], "podgate: --lease-namespace 'a/b' is not a Kubernetes name"),
        (["--metrics-bind-addr", "8164"], "write it as :8162, 127.0.0.1:8162 or [::1]:8162, or 0"),
        (["--writes-per-second", "0"], "--writes-per-second"),
        (["--source", "x"], "--source"),
    ],
)
def test_what_cannot_be_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    assert podgate(monkeypatch, *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    kubeconfig = tmp_path / "kubeconfig"
    kubeconfig.write_text("{}")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        # In a process of its own: it configures the process's log.
        argv = [sys.executable, "-c", "from dataplane.cli import main; main()", "controller"]
        argv += ["--kubeconfig", str(kubeconfig), "--metrics-bind-addr", address]
        argv += ["--health-probe-bind-addr", "0"]
        done = subprocess.run(
            argv,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            cwd=ROOT,
        )
    assert done.returncode == 2
    assert f"podgate: --metrics-bind-addr {address}: the port is in use" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_its_own_namespace_is_where_the_lease_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(controller, "OWN_NAMESPACE", tmp_path / "namespace")
    assert controller._own_namespace() is None
    (tmp_path / "namespace").write_text("podgate-system\n")
    assert controller._own_namespace() == "podgate-system"
