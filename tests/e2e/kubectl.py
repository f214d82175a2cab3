"""kubectl, as a program sees it."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping
from typing import Any

Raw = Mapping[str, Any]


class KubectlError(Exception):
    """kubectl said no; its own words."""


def last_words(text: str) -> str:
    """What kubectl says to people, without its log."""
    return "\n".join(line for line in text.splitlines() if not re.match(r"[IWEF]\d{4} ", line)).strip()


class Kubectl:
    """Runs kubectl against the cluster that KUBECONFIG names."""

    def __init__(self, program: str = "kubectl") -> None:
        self.program = program

    def __call__(self, *arguments: str, stdin: str | None = None, seconds: float = 60) -> str:
        """What it prints. KubectlError when it fails, or takes longer than `seconds`."""
        argv = [self.program, *arguments]
        try:
            # A Ctrl-C is ours to act on: what is under way is finished first.
            done = subprocess.run(
                argv,
                input=stdin,
                capture_output=True,
                text=True,
                check=False,
                timeout=seconds,
                start_new_session=True,
            )
        except FileNotFoundError:
            raise KubectlError(
                f"{self.program}: not found; install kubectl, or name it by KUBECTL="
            ) from None
        except subprocess.TimeoutExpired:
            raise KubectlError(f"{' '.join(argv)[:200]}: no answer within {seconds:.0f} s") from None
        if done.returncode:
            raise KubectlError(f"{' '.join(argv)[:200]}: {last_words(done.stderr) or done.stdout.strip()}")
        return done.stdout

    def get(self, *arguments: str) -> Any:
        return json.loads(self("get", *arguments, "-o", "json"))

    def apply(self, *objects: Raw) -> None:
        listed = {"apiVersion": "v1", "kind": "List", "items": list(objects)}
        self("apply", "-f", "-", stdin=json.dumps(listed))
