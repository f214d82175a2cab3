"""What `podgate agent` refuses before it does anything."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from dataplane.cli.agent import command
from dataplane.errors import InputError


def refused(*argv: str, **environment: str) -> str:
    names = ("NODE_NAME", "PODGATE_NODE_NAME", "KUBECONFIG", "PODGATE_SOURCE")
    clean = dict.fromkeys(names) | environment
    result = CliRunner().invoke(command, [*argv], env=clean, catch_exceptions=True)
    assert isinstance(result.exception, InputError), result.output
    return str(result.exception)


def test_a_cluster_needs_the_nodes_name() -> None:
    text = refused("--source", "kubernetes")
    assert text.startswith("--source kubernetes needs --node-name (or NODE_NAME)")


def test_a_cluster_stands_alone(tmp_path: Path) -> None:
    text = refused("--source", "kubernetes", "--source", str(tmp_path), "--node-name", "n")
    assert "stands alone" in text


def test_a_directory_may_be_called_kubernetes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert refused("--source", "./kubernetes") == "--source kubernetes: no such file or directory"


def test_a_kubeconfig_that_is_not_there(tmp_path: Path) -> None:
    path = str(tmp_path / "none")
    text = refused("--source", "kubernetes", "--node-name", "n", "--kubeconfig", path)
    assert text == f"kubeconfig {path}: no such file"
    text = refused("--source", "kubernetes", NODE_NAME="n", KUBECONFIG=path)
    assert text == f"kubeconfig {path}: no such file"


def test_a_node_name_that_is_none(tmp_path: Path) -> None:
    config = tmp_path / "kubeconfig"
    config.write_text("{}")
    text = refused("--source", "kubernetes", "--node-name", "../n", "--kubeconfig", str(config))
    assert text == "--node-name '../n' is not a Kubernetes name"
