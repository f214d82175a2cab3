"""podgate on a real cluster: `make e2e IMAGE=…`, or `python tests/e2e --image …`.

Installs the agents on the cluster that KUBECONFIG names, lets pods ask each other under one policy after
the other, has a denied packet explained, and removes everything again, however it ends. Exit status:
0 all as expected, 1 not, 2 it could not begin.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

from cases import CASES, Case, Cell
from installation import NAMESPACE, Installation, image_reference
from kubectl import Kubectl, KubectlError
from probes import Pods, Probe

IN_FORCE_SECONDS = 20.0  # a change takes well below a second; a busy cluster's controllers may take longer
SHOWN = 4  # wrong answers of a case


def say(text: str = "") -> None:
    print(text, flush=True)


def timed(what: str, act: Callable[[], str | None]) -> None:
    """Say what is under way, and when it is done how long that took."""
    print(f"{what} … ", end="", flush=True)
    started = time.monotonic()
    said = act()
    say(f"{said + ', ' if said else ''}{time.monotonic() - started:.0f} s")


def wrong(case: Case, answers: dict[Probe, bool]) -> list[Probe]:
    """Probes whose answer is not what the table says."""
    expected: dict[Cell, bool] = case.expected()
    return [one for one, reached in answers.items() if reached is not expected[one[:3]]]


class Run:
    """One run; what it finds wrong is in `failures`."""

    def __init__(self, kubectl: Kubectl, installation: Installation, pods: Pods) -> None:
        self.kubectl = kubectl
        self.installation = installation
        self.pods = pods
        self.failures = 0

    def all(self) -> None:
        timed("installing podgate", lambda: f"ready on {self.installation.install()} node(s)")
        timed("making four pods in two namespaces", self.pods.make)
        for case in CASES:
            self._check(case)
        self._explain()
        if unwell := self.pods.unwell():
            self._fail("kubelet's probes did not get through:\n  " + "\n  ".join(unwell))

    def _check(self, case: Case) -> None:
        print(f"{case.name} … ", end="", flush=True)
        self.pods.replace_policies(case.policies(self.pods.names))
        started = time.monotonic()
        while True:
            asked = time.monotonic()
            answers = self.pods.ask()
            bad = wrong(case, answers)
            if not bad or asked - started > IN_FORCE_SECONDS:
                break
        if not bad:
            say(f"{len(answers)} connections as expected")
            return
        self._fail(f"{len(bad)} of {len(answers)} connections are not as expected")
        for probe in bad[:SHOWN]:
            say(f"  {probe}: {'answered, must not' if answers[probe] else 'no answer, must be answered'}")
        say(f"  look closer (with KEEP=1 everything stays): {' '.join(self._explain_command(bad[0]))}")
        try:
            say(self._indent(self.kubectl(*self._explain_command(bad[0])[1:])))
        except KubectlError as error:
            say(f"  {error}")

    def _explain_command(self, probe: Probe, *more: str) -> list[str]:
        """kubectl's command line that asks the agent beside the destination."""
        agent = self.installation.agent_on(self.pods.nodes[probe.destination])
        source, destination = map(self.pods.full_name, (probe.source, probe.destination))
        if self.pods.nodes[probe.source] != self.pods.nodes[probe.destination]:  # known there by address
            source = next(
                one for one in self.pods.addresses[probe.source] if (":" in one) == (probe.family == 6)
            )
        what = ["podgate", "explain", "--from", source, "--to", destination, "--port", probe.port, *more]
        return ["kubectl", "exec", "-n", NAMESPACE, agent, "--", *what]

    def _explain(self) -> None:
        """A packet that default-deny drops, in the agent's own words."""
        deny = next(case for case in CASES if case.name.startswith("default-deny"))
        self.pods.replace_policies(deny.policies(self.pods.names))
        family = 6 if ":" in self.pods.addresses["x/a"][0] else 4
        command = self._explain_command(Probe("y/a", "x/a", "8080/TCP", family), "--expect", "deny")
        print("explaining a packet from y/a to x/a … ", end="", flush=True)
        deadline = time.monotonic() + IN_FORCE_SECONDS
        while True:
            try:
                said = self.kubectl(*command[1:])
                break
            except KubectlError as error:
                if time.monotonic() > deadline:
                    self._fail(f"{error}")
                    return
                time.sleep(0.5)
        say("denied")
        say("  $ " + " ".join(command))
        say(self._indent(said))

    def _fail(self, text: str) -> None:
        self.failures += 1
        say(f"FAILED: {text}")

    @staticmethod
    def _indent(text: str) -> str:
        return "\n".join(f"  {line}" for line in text.rstrip().splitlines())


def remove(installation: Installation, pods: Pods) -> list[str]:
    """Everything that a run makes; what is left."""
    left: list[str] = []

    def act() -> None:
        try:
            pods.remove()
        except KubectlError as error:
            left.append(f"namespaces podgate-e2e-…: {error}")
        left.extend(installation.remove())

    timed("removing everything", act)
    return left


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make e2e", description=__doc__)
    parser.add_argument(
        "--image", required=True, type=checked_image, help="podgate's image, as nodes pull it"
    )
    parser.add_argument(
        "--agent-env",
        nargs="*",
        default=[],
        type=checked_setting,
        metavar="NAME=VALUE",
        help="settings of the agents, for example PODGATE_VETH_PREFIX=cali",
    )
    parser.add_argument("--keep", action="store_true", help="leave everything, for a look at what failed")
    parser.add_argument("--remove", action="store_true", help="only remove what a run with --keep has left")
    parser.add_argument("--kubectl", default="kubectl", help="the program")
    return parser.parse_args(arguments)


def checked_image(text: str) -> str:
    try:
        image_reference(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def checked_setting(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r}: write it like PODGATE_VETH_PREFIX=cali")
    return name, value


def refuse(reason: str) -> NoReturn:
    print(f"podgate e2e: {reason}", file=sys.stderr)
    sys.exit(2)


def begin(kubectl: Kubectl, installation: Installation, replacing: bool) -> None:
    """What must be so before anything is made."""
    if shutil.which(kubectl.program) is None:
        refuse(f"{kubectl.program} is not here: install kubectl, or name it by KUBECTL=")
    try:
        nodes = kubectl.get("nodes")["items"]
        there = installation.is_there()
    except KubectlError as error:
        refuse(f"the cluster that KUBECONFIG names does not answer: {error}")
    if there and not replacing:
        refuse(f"podgate is installed in {NAMESPACE} already; this test would replace and remove it")
    versions = ", ".join(sorted({one["status"]["nodeInfo"]["kubeletVersion"] for one in nodes}))
    say(f"cluster of {len(nodes)} node(s), Kubernetes {versions}")


def interrupted(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def main() -> int:
    options = parse()
    kubectl = Kubectl(options.kubectl)
    installation = Installation(kubectl, options.image, dict(options.agent_env))
    pods = Pods(kubectl, options.image)
    begin(kubectl, installation, replacing=options.remove)
    if options.remove:
        left = remove(installation, pods)
        for what in left:
            say(f"LEFT: {what}")
        return 1 if left else 0
    run = Run(kubectl, installation, pods)
    started, status, left = time.monotonic(), 1, []
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupted)
    try:
        run.all()
        status = 1 if run.failures else 0
    except KubectlError as error:
        say(f"FAILED: {error}")
    except KeyboardInterrupt:
        say("interrupted")
        status = 130
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda *_: say("(removing what was made; this ends by itself)"))
        if options.keep:
            say("everything stays; to remove it: make e2e REMOVE=1 with the same variables")
        else:
            left = remove(installation, pods)
    for what in left:
        say(f"LEFT: {what}")
    verdict = {0: "all as expected", 130: "interrupted"}.get(status, "not as expected")
    say(f"{verdict}, {time.monotonic() - started:.0f} s in all")
    return status or (1 if left else 0)


if __name__ == "__main__":
    sys.exit(main())
