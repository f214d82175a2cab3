"""`podgate top` in a real terminal, with an agent that denies real packets."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import PODGATE, AgentFactory, LabFactory, RunningAgent, import_path
from objects import allow, policy, select, until

from dataplane.lab.probe import connect

pytestmark = pytest.mark.netns

SECONDS = 30.0  # a busy machine; nothing here waits for so long by itself


class Terminal:
    """A shell in a tmux server of its own."""

    def __init__(self, server: str, directory: Path) -> None:
        self._server = server
        environment = {
            **os.environ,
            "PYTHONPATH": import_path(),
            "LC_ALL": "C.UTF-8",
            "TMUX_TMPDIR": str(directory),
        }
        for name in ("TMUX", "COLUMNS", "LINES"):  # of whoever runs the tests: the size is tmux's
            environment.pop(name, None)
        self._environment = environment
        self._tmux("-f", "/dev/null", "new-session", "-d", "-x", "150", "-y", "40", "sh")

    def _tmux(self, *argv: str) -> str:
        line = ["tmux", "-L", self._server, *argv]
        return subprocess.run(
            line, env=self._environment, capture_output=True, text=True, check=True, timeout=SECONDS
        ).stdout

    def keys(self, *keys: str) -> None:
        self._tmux("send-keys", *keys)

    def types(self, text: str) -> None:
        self._tmux("send-keys", "-l", text)

    def screen(self) -> str:
        return self._tmux("capture-pane", "-p")

    def alternate(self) -> bool:
        """Whether a program has the terminal's second screen."""
        return self._tmux("display-message", "-p", "#{alternate_on}").strip() == "1"

    def shows(self, *patterns: str) -> str:
        """The screen once it shows all of these."""

        def found() -> str | None:
            screen = self.screen()
            return screen if all(re.search(pattern, screen) for pattern in patterns) else None

        try:
            screen = until(found, SECONDS)
        except AssertionError:
            raise AssertionError(f"the screen never shows {patterns}:\n{self.screen()}") from None
        assert isinstance(screen, str)
        return screen

    def hides(self, text: str) -> None:
        """Wait until the screen does not show it."""
        until(lambda: text not in self.screen(), SECONDS, f"the screen without {text}")

    def close(self) -> None:
        self._tmux("kill-server")


@pytest.fixture
def terminal(lab_name: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Terminal]:
    if shutil.which("tmux") is None:
        pytest.skip("needs tmux: apt-get install tmux")
    one = Terminal(f"podgate-{lab_name}", tmp_path_factory.mktemp("tmux"))
    try:
        one.shows(r"[#$]")  # the shell reads
        yield one
    finally:
        one.close()


def top(running: RunningAgent, *argv: str) -> str:
    return shlex.join([*PODGATE, "top", *argv, "--control", str(running.control)])


def test_denied_traffic_appears_and_is_explained(
    lab: LabFactory, agent: AgentFactory, terminal: Terminal
) -> None:
    one = lab(["x/server", "x/client", "y/other"])
    rules = policy("x", "web", select(one, "x/server"), ingress=allow(one, "x/client", ports=["80/TCP"]))
    running = agent(one, rules)
    terminal.types(top(running) + "; echo ended with $?")
    terminal.keys("Enter")
    terminal.shows(r"ready, generation \d+, 1 pod under 1 policy", "Denials", "enter explain")
    assert terminal.alternate()

    def denied() -> object:
        # Again and again: what came before the view listened, it cannot show.
        assert not connect(one, "y/other", "x/server").reached
        denial = r"deny +x/server +ingress +no-rule \(x/web\) +y/other:\d+ > x/server:80"
        return re.search(denial, terminal.screen())

    until(denied, SECONDS, "the denial on the screen")
    assert connect(one, "x/client", "x/server").reached

    terminal.keys("Enter")
    terminal.shows(
        r"DENY  y/other \(.*\) → x/server \(.*\)  80/TCP",
        "isolated by x/web",
        r"The smallest policy that would allow it",
    )
    terminal.keys("Escape")
    terminal.hides("DENY")  # keys that follow at once would be one with Escape

    terminal.keys("Tab")
    terminal.shows(r"x/client +x/server:80 +TCP +allow +policy-rule \(x/web\)")
    terminal.keys("Tab")
    terminal.shows(r"allow +x/client:\d+ +x/server:80 +TCP SYN +ingress: policy-rule of x/web")

    terminal.keys("/")
    terminal.shows("empty shows all")
    terminal.types("verdict=maybe")
    terminal.keys("Enter")
    terminal.shows(r"FILTER: .*verdict=maybe")
    terminal.keys("C-u")
    terminal.shows("empty shows all")  # text that follows at once may be there before the key acts
    terminal.types("from=x/client")
    terminal.keys("Enter")
    terminal.shows(r"Filter: from=x/client\.")
    terminal.keys("q")
    screen = terminal.shows("ended with 0")
    assert not terminal.alternate()
    assert "Top talkers" not in screen


def test_an_agent_that_goes_away_is_waited_for(
    lab: LabFactory, agent: AgentFactory, terminal: Terminal
) -> None:
    one = lab(["x/server", "x/client"])
    running = agent(one, policy("x", "web", select(one, "x/server"), ingress=[]))
    terminal.types(top(running) + "; echo ended with $?")
    terminal.keys("Enter")
    terminal.shows("ready, generation")
    running.terminate()
    terminal.shows(r"(?s)the agent at .*;\s+trying\s+again")
    running.start()
    terminal.hides("trying again")
    assert not connect(one, "x/client", "x/server").reached
    terminal.shows(r"deny +x/server +ingress +no-rule \(x/web\)")
    terminal.keys("q")
    terminal.shows("ended with 0")


def test_without_a_terminal_a_snapshot_is_printed(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/server", "x/client"])
    rules = policy("x", "web", select(one, "x/server"), ingress=allow(one, "x/client", ports=["80/TCP"]))
    running = agent(one, rules)
    assert connect(one, "x/client", "x/server").reached
    printed = running.podgate("top", "--seconds", "1").stdout
    assert re.search(r"^ready, generation \d+, 1 pod under 1 policy", printed)
    assert re.search(r"x/client +x/server:80 +TCP +allow +policy-rule \(x/web\)", printed)
    assert "\x1b" not in printed
    nothing = running.podgate("top", "--seconds", "1", "to=x/client").stdout
    assert "x/server:80" not in nothing


def test_flows_are_selected_by_their_conditions(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/server", "x/client", "x/other"])
    rules = policy("x", "web", select(one, "x/server"), ingress=allow(one, "x/client", ports=["80/TCP"]))
    running = agent(one, rules)
    assert connect(one, "x/client", "x/server").reached
    assert connect(one, "x/other", "x/client").reached

    def pairs(text: str) -> set[tuple[str, str]]:
        return {(row["src_pod"], row["dst_pod"]) for row in running.ask("flows", filter=text)}

    assert pairs("") == {("x/client", "x/server"), ("x/other", "x/client")}
    assert pairs("policy=x/web") == {("x/client", "x/server")}
    assert pairs("from=x/other") == {("x/other", "x/client")}
    assert pairs("verdict=deny") == set()
    refused = running.podgate("top", "--once", "verdict=perhaps", check=False)
    assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1)


def test_without_an_agent_it_says_so_in_one_line(tmp_path: Path) -> None:
    line = [*PODGATE, "top", "--control", str(tmp_path / "none.sock")]
    done = subprocess.run(
        line, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": import_path()}
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "no agent at" in done.stderr
