"""`podgate intercept` in the node of a lab, and what it leaves in the kernel."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Self

from conftest import RunningAgent
from objects import Object, allow, policy, select, until
from record_command import RecordCommand

from dataplane.lab.world import Lab

SERVED = 8001
PATIENT = ["--timeout", "10"]  # where the test is not about time: a busy machine must not decide it
IMPORTS = "from dataplane.hook import ALLOW, DROP, delay\n"


class Intercept(RecordCommand):
    """`podgate intercept -v -o json` in the node; a context manager that begins when the agent says so."""

    patience = 20.0

    def __init__(self, running: RunningAgent, code: str | Path, *argv: str) -> None:
        """`code`: what the hook file says, after its imports; or the file itself."""
        self.lines: list[str] = []
        file = code if isinstance(code, Path) else running.directory.parent / "hook.py"
        if isinstance(code, str):
            file.write_text(IMPORTS + code)
        super().__init__(running, "intercept", "--hook", str(file), "-v", *argv)
        self._threads = [threading.Thread(target=self._rows), threading.Thread(target=self._said)]
        for thread in self._threads:
            thread.start()
        until(lambda: self.lines or self.process.poll() is not None, timeout=30, what="it begins")

    def _rows(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.endswith("\n"):  # else cut off by a signal
                self.rows.append(json.loads(line))

    def _said(self) -> None:
        assert self.process.stderr is not None
        self.lines += (line.rstrip("\n") for line in self.process.stderr)

    @property
    def said(self) -> str:
        return "\n".join(self.lines)

    def __enter__(self) -> Self:
        assert self.lines[0].startswith("Packets of "), self.said
        return self

    def ended(self) -> int:
        """Its exit status once it has ended."""
        status = self.process.wait(20)
        for thread in self._threads:
            thread.join(20)
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()
        return status

    @property
    def summary(self) -> dict[str, int]:
        """What it counted, once it has ended."""
        summary: dict[str, int] = self.rows[-1]["summary"]
        return summary


def hook_rules(lab: Lab) -> str:
    """What of the rules in the node concerns hooks."""
    saved = "".join(
        lab.run("node", f"{tool}-save", "-t", "mangle").stdout for tool in ("iptables", "ip6tables")
    )
    return "\n".join(line for line in saved.splitlines() if "HOOK" in line)


def all_rules(lab: Lab) -> list[str]:
    """Every rule of ours in the node."""
    saved = "".join(lab.run("node", f"{tool}-save").stdout for tool in ("iptables", "ip6tables"))
    return [line for line in saved.splitlines() if line.startswith("-A")]


def members(lab: Lab, family: int) -> list[str]:
    listed = lab.run("node", "ipset", "list", f"podgate-hooked-{family}").stdout
    return listed.split("Members:")[1].split()


def web(lab: Lab) -> Object:
    """x/b may open SERVED of x/a over TCP and UDP; nobody else anything."""
    ports = [f"{SERVED}/TCP", f"{SERVED}/UDP"]
    return policy("x", "web", select(lab, "x/a"), ingress=allow(lab, "x/b", ports=ports))
