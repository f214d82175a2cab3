"""Data flows one way: sources → policy → node and engine → observe. Imports must follow."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "dataplane"

# What puts the packages together.
ABOVE = {"lab", "cli", "agent", "enforcement", "plan", "answers", "cni", "controller"}
# package → packages of ours that it must not import
FORBIDDEN = {
    "sources": {"policy", "node", "observe", *ABOVE},
    "policy": {"sources", "node", "observe", *ABOVE},
    "node": {"sources", "observe", *ABOVE},
    "observe": {"sources", "node", *ABOVE},
    "replay": {"sources", "node", *ABOVE},
    "advice": {"sources", "node", *ABOVE},
    "lab": {"node", "observe", *ABOVE} - {"lab", "cli"},
    "plan": {"sources", "observe", *ABOVE} - {"plan"},
    "enforcement": {"sources", *ABOVE} - {"enforcement", "plan"},
    "answers": {"sources", "lab", "cli", "agent", "cni"},
    "telemetry": {"sources", "lab", "cli", "agent", "answers"},
    "flowlog": {"sources", "lab", "cli", "agent", "answers", "telemetry"},
    "audit": {"sources", "lab", "cli", "agent", "answers", "telemetry"},
    "watching": {"sources", "lab", "cli", "agent", "enforcement", "answers", "tracing", "cni"},
    "interception": {"sources", "lab", "cli", "agent", "enforcement", "answers", "tracing", "cni"},
    "intercepting": {"sources", "lab", "cli", "agent", "answers", "cni"},
    "tracing": {"sources", "lab", "cli", "agent", "answers", "cni"},
    "cni": {"sources", "lab", "cli", "agent", "answers", "controller"},
    "controller": {"node", "lab", "cli", "agent", "enforcement", "plan", "answers", "telemetry", "cni"},
}
# Modules that compute and must not touch the machine.
PURE = ["policy", "plan.py", "model.py", "addresses.py", "reasons.py", "hook.py", "hook_answers.py"]
IO_MODULES = {
    "subprocess",
    "socket",
    "asyncio",
    "threading",
    "inotify_simple",
    "aiohttp",
    "os",
    "pathlib",
}


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def files_of(name: str) -> list[Path]:
    path = PACKAGE / name
    return sorted(path.rglob("*.py")) if path.is_dir() else [PACKAGE / f"{name.removesuffix('.py')}.py"]


@pytest.mark.parametrize("package", FORBIDDEN)
def test_a_package_imports_only_what_lies_before_it(package: str) -> None:
    for path in files_of(package):
        ours = {name.split(".")[1] for name in imports(path) if name.startswith("dataplane.")}
        assert not ours & FORBIDDEN[package], f"{path} imports {ours & FORBIDDEN[package]}"


@pytest.mark.parametrize("package", PURE)
def test_computing_modules_do_no_input_or_output(package: str) -> None:
    for path in files_of(package):
        found = {name.split(".")[0] for name in imports(path)} & IO_MODULES
        # An address's text form is socket's inet_ntop: computation under an I/O module's name.
        assert found <= ({"socket"} if path.name == "addresses.py" else set()), f"{path} imports {found}"
