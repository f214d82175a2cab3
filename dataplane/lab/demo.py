"""`podgate lab demo`: NetworkPolicies on this machine, with real packets ("stars" of the EKS user guide).

Every step changes the directory that a running agent watches, sends real packets between all pods
on IPv4 and IPv6, and compares what arrives with what the policies say. A difference ends the demo
with exit code 1. Nothing is left behind, however it ends.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from dataplane.addresses import format_address
from dataplane.cli.client import ask as ask_agent
from dataplane.errors import AgentUnreachable, InputError, PodgateError
from dataplane.lab import rootless, world
from dataplane.lab.probe import Answer, Flow, Port, ask
from dataplane.lab.view import cell, fancy
from dataplane.lab.world import Lab
from dataplane.model import Pod
from dataplane.reachability import ALLOWED, DENIED
from dataplane.sources.directory import read_paths

FAMILIES = (4, 6)
READY_SECONDS = 20.0
FOLLOW_SECONDS = 5.0
CUT_SECONDS = 1.0
SLICE = 0.1  # seconds per character of the streams' picture
PODGATE = (sys.executable, "-c", "from dataplane.cli import main; main()")
WHY = {"no-rule": "no-rule (no policy allows it)"}


class DemoFailed(PodgateError):
    """Real packets did not do what the policies say: exit 1."""

    exit_code = 1


@dataclass(frozen=True, slots=True)
class Step:
    """One change to the directory and what must follow from it.

    `allowed` holds who must reach whom, by pod name (`a>b`), on the port that b serves; everything
    else must not. `show` lists the packets whose verdicts are printed.
    """

    title: str
    why: str
    allowed: str
    add: str | None = None
    show: tuple[str, ...] = ()
    explain: tuple[str, str, str] | None = None


NAMES = {
    "client": "client/client",
    "frontend": "stars/frontend",
    "backend": "stars/backend",
    "management-ui": "management-ui/management-ui",
}
EVERYBODY = " ".join(f"{a}>{b}" for a in NAMES for b in NAMES if a != b)
TO_UI = "client>management-ui frontend>management-ui backend>management-ui"
FROM_UI = "management-ui>client management-ui>frontend management-ui>backend"

STEPS = (
    Step(
        "Before any policy",
        "Nobody is isolated, so everybody reaches everybody; no packet goes through a queue.",
        EVERYBODY,
    ),
    Step(
        "Default deny",
        "A NetworkPolicy without rules isolates the pods of its namespace; stars and client get one each. "
        "Nothing reaches their pods now, on IPv4 or IPv6. No policy selects the UI: it stays open.",
        TO_UI,
        add="01-default-deny.yaml",
        show=("client>frontend", "management-ui>backend"),
    ),
    Step(
        "The UI may look at every pod",
        "Policies add up: a connection is allowed when any rule of any policy for the pod matches. These "
        "allow a whole namespace, on every port.",
        f"{TO_UI} {FROM_UI}",
        add="02-allow-ui.yaml",
        show=("management-ui>frontend", "client>frontend"),
    ),
    Step(
        "The backend serves the frontend",
        "Pods chosen by label, one port. The client still cannot pass the frontend by.",
        f"{TO_UI} {FROM_UI} frontend>backend",
        add="03-backend-from-frontend.yaml",
        show=("frontend>backend", "client>backend"),
        explain=("client/client", "stars/backend", "6379/TCP"),
    ),
    Step(
        "The frontend serves the client",
        "One item with both selectors: those pods in those namespaces. Now the application works, and only "
        "along its own path: client, frontend, backend.",
        f"{TO_UI} {FROM_UI} frontend>backend client>frontend",
        add="04-frontend-from-client.yaml",
        show=("client>frontend", "client>backend"),
    ),
)
NEXT = (
    "podgate matrix deploy/examples/stars --port 80/TCP --port 6379/TCP",
    "podgate check deploy/examples/stars",
    "podgate resolve deploy/examples/stars",
)
CUT = "04-frontend-from-client.yaml"


def play(which: str) -> int:
    """Run a demo; the exit code. InputError: no demo of this name."""
    if which != "stars":
        raise InputError(f"no demo named {which!r}; there is: stars")
    examples = _examples(which)
    name = f"demo-{os.getpid()}"
    if rootless.needed():
        rootless.create(name, die_with_parent=True)
        rootless.enter(name)
    _sweep()
    # Ended politely by somebody else, the demo still has to clean up.
    signal.signal(signal.SIGTERM, _interrupted)
    signal.signal(signal.SIGHUP, _interrupted)
    try:
        _Demo(name, examples).play()
    finally:
        rootless.end_holder()
    return 0


def _interrupted(number: int, _frame: object) -> NoReturn:
    raise SystemExit(128 + number)


def _environment() -> dict[str, str]:
    """For podgate processes of ours: the package is found as it was found here, installed or not."""
    own = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (own, os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path}


def _deaf() -> None:
    # From here on a second Ctrl-C would only interrupt the cleaning up.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def _examples(which: str) -> Path:
    own = Path(__file__).resolve().parents[2] / "deploy/examples" / which
    if own.is_dir():
        return own
    # Not below sys.prefix: `pip install --user` and Debian's pip put data elsewhere.
    with contextlib.suppress(metadata.PackageNotFoundError):
        for file in metadata.files("podgate") or ():
            if file.parent.match(f"share/podgate/examples/{which}"):
                return Path(os.path.normpath(str(file.locate()))).parent
    raise InputError(f"the files of the demo are not there: {own}; run it from a checkout of podgate")


def _sweep() -> None:
    """Take down demos whose process was killed."""
    for name in world.names():
        prefix, _, pid = name.rpartition("-")
        if prefix == "demo" and pid.isdigit() and not Path("/proc", pid).exists():
            with contextlib.suppress(PodgateError):
                world.down(name)


@dataclass(slots=True)
class _Stream:
    """A TCP connection over which the server keeps sending."""

    label: str
    source: str
    family: int
    sock: socket.socket
    arrivals: list[tuple[float, int]] = field(default_factory=list)

    def last(self) -> float:
        return self.arrivals[-1][0] if self.arrivals else 0.0

    def total(self) -> int:
        return sum(count for _, count in self.arrivals)


class _Demo:
    def __init__(self, name: str, examples: Path) -> None:
        self.name = name
        self.examples = examples
        # In the lab's own directory: they go when it goes, after a SIGKILL too.
        self.policies = world.HOME / name / "policies"
        self.control = world.HOME / name / "control.sock"
        self.log = world.HOME / name / "agent.log"
        self.console = Console(highlight=False)
        self.agent: subprocess.Popen[bytes] | None = None
        self.probed = 0
        self.slowest = 0.0

    def play(self) -> None:
        began = time.monotonic()
        self._head()
        pods = read_paths([self.examples / "pods.yaml"]).snapshot.pods
        with contextlib.ExitStack() as ending:
            lab = ending.enter_context(Lab.up(self.name, pods, tied=True))
            self._pods(lab, pods)
            self.policies.mkdir()
            shutil.copy(self.examples / "pods.yaml", self.policies)
            ending.callback(self._stop_agent)
            self._start_agent(lab)
            ending.callback(_deaf)
            with _Events(self.control) as events:
                for number, step in enumerate(STEPS, 1):
                    self._step(lab, events, number, step)
                self._cut(lab, events, len(STEPS) + 1)
            dropped = self._queue_losses()
        self._foot(time.monotonic() - began, dropped)

    # -- the agent

    def _start_agent(self, lab: Lab) -> None:
        node_ips = [option for ip in lab.node_ips for option in ("--node-ip", format_address(ip))]
        self._type("podgate lab exec node -- podgate agent --source policies/ " + " ".join(node_ips))
        argv = [*PODGATE, "agent"]
        argv += ["--source", str(self.policies), "--control", str(self.control), *node_ips]
        began = time.monotonic()
        with self.log.open("wb") as log:
            self.agent = lab.popen(
                "node",
                *world.TIED,
                *argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the demo, which then ends the agent
                env=_environment(),
            )
        status = self._wait(lambda status: bool(status["ready"]), READY_SECONDS, "get ready")
        self._say(
            f"The agent is ready after {time.monotonic() - began:.1f} s"
            f" (iptables-{status['iptables']}, {status['backend']} queue).",
            style="dim",
        )

    def _stop_agent(self) -> None:
        if self.agent is None:
            return
        if self.agent.poll() is None:
            self.agent.terminate()
        try:
            self.agent.wait(5)
        except subprocess.TimeoutExpired:
            self.agent.kill()
            self.agent.wait()

    def _status(self) -> dict[str, Any]:
        result: dict[str, Any] = ask_agent(self.control, "status")
        return result

    def _wait(self, condition: Callable[[dict[str, Any]], bool], seconds: float, what: str) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        problem = ""
        while time.monotonic() < deadline:
            assert self.agent is not None
            if self.agent.poll() is not None:
                raise DemoFailed(f"demo: the agent ended with {self.agent.returncode}: {self._last_log()}")
            try:
                status = self._status()
                if condition(status):
                    return status
                problem = "; ".join(status["problems"])
            except AgentUnreachable:
                pass
            time.sleep(0.002)
        raise DemoFailed(f"demo: the agent did not {what} in {seconds:g} s: {problem or self._last_log()}")

    def _last_log(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it logged nothing"

    def _queue_losses(self) -> int:
        return sum(queue["dropped"] + queue["user_dropped"] for queue in self._status()["queues"])

    def _change(self, add: str | None = None, remove: str | None = None) -> float:
        """Change the watched directory; seconds until the agent says that it is in force."""
        before = self._status()["generation"]
        began = time.monotonic()
        if add:
            # In one step, as `cp` on the same file system could not: half a file is no policy.
            shutil.copy(self.examples / add, self.policies / f".{add}")
            (self.policies / f".{add}").rename(self.policies / add)
        if remove:
            (self.policies / remove).unlink()
        self._wait(lambda status: status["generation"] > before, FOLLOW_SECONDS, "follow the change")
        took = time.monotonic() - began
        self.slowest = max(self.slowest, took)
        return took

    # -- steps

    def _step(self, lab: Lab, events: _Events, number: int, step: Step) -> None:
        self._say()
        self._title(f"{number}. {step.title}")
        self._say(step.why)
        if step.add:
            self._policy(step.add)
            self._type(f"cp deploy/examples/stars/{step.add} policies/")
            took = self._change(add=step.add)
            self._say(f"In force after {1000 * took:.0f} ms.", style="dim")
        self._type("podgate lab probe")
        events.forget()
        answers = self._probe(lab)
        self._matrix(answers)
        self._packets(events, answers, step.show)
        self._verify(step.title, answers, step.allowed.split())
        if step.explain:
            self._explain(*step.explain)

    def _probe(self, lab: Lab) -> dict[tuple[str, str, int], Answer]:
        """Everybody to everybody, each on the port that the destination serves, on both families."""
        wanted = [(a, b, family) for a in NAMES for b in NAMES if a != b for family in FAMILIES]
        flows = []
        for a, b, family in wanted:
            source, destination = lab.pod(NAMES[a]), lab.pod(NAMES[b])
            port = destination.ports[0]
            own, other = (
                next(ip for ip in pod.ips if len(ip) == (4 if family == 4 else 16))
                for pod in (source, destination)
            )
            flows.append(Flow(source.netns, own, other, Port(port.protocol, port.port)))
        answers = dict(zip(wanted, ask(flows), strict=True))
        self.probed += len(answers)
        return answers

    def _verify(
        self, title: str, answers: Mapping[tuple[str, str, int], Answer], allowed: Sequence[str]
    ) -> None:
        for (a, b, family), answer in answers.items():
            wanted = f"{a}>{b}" in allowed
            if answer.reached != wanted:
                did, should = ("reaches", "must not") if answer.reached else ("does not reach", "must")
                raise DemoFailed(
                    f'demo: in step "{title}" {a} {did} {b} on IPv{family}, and {should};'
                    f" the agent's last word: {self._last_log()}"
                )
            if answer.reached and answer.by != NAMES[b]:
                raise DemoFailed(f'demo: in step "{title}" {answer.by} answered for {b} on IPv{family}')
        self._say(f"All {len(answers)} connections did what the policies say.", style="green")

    def _cut(self, lab: Lab, events: _Events, number: int) -> None:
        self._say()
        self._title(f"{number}. A policy goes while a connection is open")
        self._say(
            "The frontend keeps sending to the client and to the UI. A policy change judges open "
            "connections again: one that is no longer allowed is cut, the other does not notice."
        )
        with contextlib.ExitStack() as closing:
            streams = [
                closing.enter_context(_streaming(lab, source, "frontend", family))
                for source, family in (
                    ("client", 4),
                    ("client", 6),
                    ("management-ui", 4),
                    ("management-ui", 6),
                )
            ]
            began = time.monotonic()
            _receive(streams, began + 10 * SLICE)
            silent = [stream for stream in streams if not stream.arrivals]
            if silent:
                raise DemoFailed(f"demo: nothing arrives at {silent[0].source} although it is allowed")
            self._type(f"rm policies/{CUT}")
            events.forget()
            changed = time.monotonic()
            with ThreadPoolExecutor(1) as beside:
                change = beside.submit(self._change, remove=CUT)
                _receive(streams, changed + CUT_SECONDS + 10 * SLICE)
                change.result()
        self._streams(streams, began, changed)
        for stream in streams:
            after = stream.last() - changed
            if stream.source == "client" and after > CUT_SECONDS:
                raise DemoFailed(f"demo: the connection of client (IPv{stream.family}) was not cut")
            if stream.source != "client" and after < CUT_SECONDS:
                raise DemoFailed(f"demo: the connection of management-ui (IPv{stream.family}) was disturbed")
        cut = max(stream.last() for stream in streams if stream.source == "client") - changed
        self._say(
            f"The client's connections were cut {1000 * max(cut, 0):.0f} ms after the file was removed;"
            " the UI's lost nothing.",
            style="green",
        )
        self._packet_table(
            row for family in FAMILIES if (row := events.last("client", "frontend", family)) is not None
        )

    # -- what people see

    @property
    def _fancy(self) -> bool:
        return fancy(self.console)

    def _head(self) -> None:
        self._say()
        self._title("podgate: NetworkPolicy on real packets")
        typed = "grey lines" if self._fancy else "lines that begin with $"
        self._say(
            'The "stars" example of the EKS user guide: a client, a frontend, a backend and a management '
            "UI, each in a network namespace wired as the Amazon VPC CNI wires a pod. Everything you see "
            f"was measured; the {typed} can be typed."
        )

    def _pods(self, lab: Lab, pods: Iterable[Pod]) -> None:
        self._type("podgate lab up deploy/examples/stars/pods.yaml")
        table = self._table("pod", "serves", "IPv4", "IPv6", "device on the node")
        for pod in pods:
            one = lab.pod(pod.key)
            port = Port(one.ports[0].protocol, one.ports[0].port)
            table.add_row(
                str(pod.key), str(port), lab.address(pod.key, 4), lab.address(pod.key, 6), one.device
            )
        self._say(table)

    def _policy(self, name: str) -> None:
        """The file, or its first document where it holds several."""
        text, more, _ = (self.examples / name).read_text().partition("---\n")
        show = f"head -n {text.count(chr(10))}" if more else "cat"
        self._type(f"{show} deploy/examples/stars/{name}")
        self._say(Text(text.rstrip()))

    def _matrix(self, answers: Mapping[tuple[str, str, int], Answer]) -> None:
        table = self._table("from \\ to", *NAMES)
        for column in table.columns[1:]:
            column.justify = "center"
        for a in NAMES:
            row: list[Text] = []
            for b in NAMES:
                if a == b:
                    row.append(Text(""))
                    continue
                marks = [ALLOWED if answers[a, b, family].reached else DENIED for family in FAMILIES]
                row.append(Text(" ").join(cell(mark, self.console) for mark in marks))
            table.add_row(Text(a), *row)
        self._say(table)
        legend = Text("Each cell: IPv4 IPv6.  ", style="dim")
        for mark, word in ((ALLOWED, "answered  "), (DENIED, "no answer")):
            legend += cell(mark, self.console) + Text(f" {word}", style="dim")
        self._say(legend)

    def _packets(
        self,
        events: _Events,
        answers: Mapping[tuple[str, str, int], Answer],
        show: Sequence[str],
    ) -> None:
        pairs = [tuple(pair.split(">")) for pair in show]
        wanted = [(a, b, family) for a, b in pairs for family in FAMILIES if (a, b, family) in answers]
        if not wanted:
            return
        events.wait(lambda: all(events.last(*one) for one in wanted))
        self._packet_table(row for one in wanted if (row := events.last(*one)) is not None)

    def _packet_table(self, rows: Iterable[Mapping[str, Any]]) -> None:
        rows = list(rows)
        if not rows:
            return
        table = self._table("verdict", "packet", "why")
        for row in rows:
            allowed = row["verdict"] == "allow"
            colour = ("bold green" if allowed else "bold red") if self._fancy else ""
            why = WHY.get(row["reason"], row["reason"])
            if row["policy"]:
                why += f" of {row['policy']}"
            table.add_row(Text(row["verdict"], style=colour), Text(_packet(row)), Text(why))
        self._say(table)

    def _explain(self, source: str, destination: str, port: str) -> None:
        query = ["--from", source, "--to", destination, "--port", port]
        self._type(f"podgate explain policies/ {' '.join(query)}")
        argv = [*PODGATE, "explain", str(self.policies), *query]
        done = subprocess.run(argv, capture_output=True, text=True, check=False, env=_environment())
        if done.returncode:
            raise DemoFailed(f"demo: explain failed: {done.stderr.strip()}")
        # Below an empty line: the policy that would allow it, a screenful that is not the demo's story.
        text, more, _ = done.stdout.rstrip().partition("\n\n")
        if not self._fancy:
            text = text.replace("→", "->")
        self._say(Text(text), soft_wrap=True)
        if more:
            self._say("(and, as YAML, the smallest policy that would allow it)", style="dim")

    def _streams(self, streams: Sequence[_Stream], began: float, changed: float) -> None:
        table = self._table(
            "frontend sends to", "0.1 s per mark; | = the policy is removed", "bytes after it"
        )
        full, empty = ("█", "·") if self._fancy else ("#", ".")
        for stream in streams:
            picture = Text()
            for start, stop, border in (
                (began, changed, True),
                (changed, changed + CUT_SECONDS + 10 * SLICE, False),
            ):
                for index in range(max(1, round((stop - start) / SLICE))):
                    low = start + index * SLICE
                    arrived = any(low <= when < low + SLICE for when, _ in stream.arrivals)
                    style = ("green" if arrived else "red") if self._fancy else ""
                    picture.append(full if arrived else empty, style=style)
                if border:
                    picture.append("|", style="bold")
            after = sum(count for when, count in stream.arrivals if when >= changed)
            table.add_row(Text(stream.label), picture, f"{after}")
        self._say(table)

    def _foot(self, seconds: float, dropped: int) -> None:
        self._say()
        self._title("Done")
        self._say(
            f"{self.probed} connections and 4 streams did what the policies say. Every change was in force "
            f"within {1000 * self.slowest:.0f} ms; {dropped} packets lost in queues; {seconds:.0f} s in all. "
            "The pods, the agent and its rules are gone."
        )
        self._say("The same files, without a lab:")
        for line in NEXT:
            self._type(line)

    def _say(self, what: RenderableType = "", style: str = "", soft_wrap: bool = False) -> None:
        if self._fancy:
            self.console.print(what, style=style, soft_wrap=soft_wrap)
            return
        # In a file or a log, neither colour nor the blanks that fill up table cells are of use.
        with self.console.capture() as capture:
            self.console.print(what, soft_wrap=soft_wrap)
        for line in capture.get().splitlines():
            self.console.out(line.rstrip())

    def _title(self, text: str) -> None:
        self._say(Text(text, style="bold"))
        self._say(Text(("─" if self._fancy else "-") * len(text), style="dim"))

    def _type(self, line: str) -> None:
        self._say(Text(f"$ {line}", style="dim"), soft_wrap=True)

    def _table(self, *headings: str) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        for heading in headings:
            table.add_column(heading, overflow="fold")
        return table


class _Events:
    """The agent's verdicts as they happen (`GET /events`), kept in the background."""

    def __init__(self, control: Path) -> None:
        self._control = control
        self._rows: list[dict[str, Any]] = []
        self._arrived = threading.Condition()
        self._sock: socket.socket | None = None

    def __enter__(self) -> _Events:
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.connect(str(self._control))
        self._sock.sendall(b"GET /events?capture=misses HTTP/1.1\r\nHost: agent\r\n\r\n")
        response = http.client.HTTPResponse(self._sock, method="GET")
        threading.Thread(target=self._read, args=(response,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._sock is not None:
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)
            self._sock.close()

    def _read(self, response: http.client.HTTPResponse) -> None:
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError, AttributeError):
            response.begin()
            while line := response.readline():
                if line.strip():
                    with self._arrived:
                        self._rows.append(json.loads(line))
                        self._arrived.notify_all()

    def forget(self) -> None:
        """Only what comes from now on counts."""
        with self._arrived:
            self._rows.clear()

    def wait(self, condition: Callable[[], bool], seconds: float = 1.0) -> bool:
        with self._arrived:
            return bool(self._arrived.wait_for(condition, seconds))

    def last(self, source: str, destination: str, family: int) -> dict[str, Any] | None:
        """The newest verdict about packets from one pod to the other, replies left out."""
        pair = (NAMES[source], NAMES[destination])
        found = [
            row
            for row in self._rows
            if (row["src_pod"], row["dst_pod"]) == pair
            and not row.get("reply")
            and (":" in (row["src"] or "")) is (family == 6)
        ]
        return found[-1] if found else None


def _packet(row: Mapping[str, Any]) -> str:
    """`client 10.1.0.10:50812 -> frontend:80`, with names where they are known."""
    short = {name: label for label, name in NAMES.items()}
    ends = []
    for end in ("src", "dst"):
        name = short.get(row[f"{end}_pod"] or "", row[end])
        ends.append(f"{name}:{row[f'{end}_port']}")
    return f"IPv{6 if ':' in row['src'] else 4} {ends[0]} > {ends[1]}"


@contextlib.contextmanager
def _streaming(lab: Lab, source: str, destination: str, family: int) -> Iterator[_Stream]:
    kind = socket.AF_INET if family == 4 else socket.AF_INET6
    target = lab.pod(NAMES[destination])
    with lab.make_socket(NAMES[source], kind, socket.SOCK_STREAM) as sock:
        sock.settimeout(3)
        try:
            sock.connect((lab.address(target.key, family), target.ports[0].port))
            sock.sendall(b"stream\n")
        except OSError as error:
            raise DemoFailed(
                f"demo: {source} cannot connect to {destination} on IPv{family}: {error}"
            ) from None
        sock.setblocking(False)
        yield _Stream(f"{source} IPv{family}", source, family, sock)


def _receive(streams: Sequence[_Stream], until: float) -> None:
    by_socket = {stream.sock: stream for stream in streams}
    while (left := until - time.monotonic()) > 0:
        for sock in select.select(list(by_socket), [], [], left)[0]:
            stream = by_socket[sock]
            try:
                data = sock.recv(65536)
            except OSError:
                data = b""
            if not data:
                del by_socket[sock]
                break
            stream.arrivals.append((time.monotonic(), len(data)))
