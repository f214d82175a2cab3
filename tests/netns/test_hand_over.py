"""One agent takes over from another, as in a rolling update."""

from __future__ import annotations

import copy
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import PODGATE, AgentFactory, LabFactory, RunningAgent, import_path
from interceptor import SERVED, Intercept, all_rules, web
from objects import allow, policy, select, until
from packets import Stream as PacketStream
from traffic import Stream, arrives, passes, received, sending, udp

from dataplane.cli.client import is_own
from dataplane.lab.probe import connect

pytestmark = pytest.mark.netns

TookOver = Callable[..., RunningAgent]


def owner(daemon: RunningAgent) -> int:
    """The process that listens on the control socket; 0 when nobody does."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(daemon.control))
        except OSError:
            return 0
        return int.from_bytes(probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[:4], "little")


@pytest.fixture
def successor(tmp_path: Path) -> Iterator[TookOver]:
    """Starts a second agent beside one that runs; returns once it has taken over and is ready."""
    made: list[RunningAgent] = []

    def make(first: RunningAgent, *options: str, wait: bool = True) -> RunningAgent:
        second = copy.copy(first)
        second.log = tmp_path / f"agent-{len(made)}.log"
        second.options = (*first.options, *options, "--take-over")
        made.append(second)
        second.start(wait=False)
        if wait:
            assert second.process is not None
            pid = second.process.pid
            until(lambda: owner(second) == pid, timeout=15, what="the second agent's socket")
            second.wait_ready()
        return second

    yield make
    for one in made:
        one.close()


def exit_status(daemon: RunningAgent) -> int:
    assert daemon.process is not None
    return daemon.process.wait(15)


@pytest.mark.parametrize("family", [4, 6])
def test_verdicts_hold_all_along(
    lab: LabFactory, agent: AgentFactory, successor: TookOver, family: int
) -> None:
    one = lab(["x/a", "x/b", "x/c"])
    first = agent(one, policy("x", "a", select(one, "x/a"), ingress=allow(one, "x/b")))
    stream = Stream(one, "x/b", "x/a", family=family)
    refused, to = udp(one, "x/a", 9001, family=family), (one.address("x/a", family), 9001)
    with sending(udp(one, "x/c", 5001, family=family), to):
        second = successor(first)
        # The first one waits; it is stopped once the second one is ready.
        assert first.process is not None
        assert first.process.poll() is None
        assert stream.flows()
        assert first.terminate() == 0
    assert not received(refused, 0.2)
    assert stream.flows()
    assert "kept as found" in second.text()
    assert connect(one, "x/b", "x/a", family=family).reached
    second.write(policy("x", "a", select(one, "x/a"), ingress=allow(one, "x/c")))
    assert stream.silent()
    target, to = udp(one, "x/a", 9000, family=family), (one.address("x/a", family), 9000)
    assert passes(udp(one, "x/c", 5000, family=family), to, target)
    assert not arrives(udp(one, "x/b", 5000, family=family), to, target)


def test_the_first_cleans_up_nothing_of_the_second(
    lab: LabFactory, agent: AgentFactory, successor: TookOver
) -> None:
    one = lab(["x/a", "x/b"])
    first = agent(one, policy("x", "a", select(one, "x/a"), ingress=[]), options=["--on-stop", "clean"])
    second = successor(first)
    assert first.terminate() == 0
    assert "cleaned up" not in first.text()
    assert not connect(one, "x/b", "x/a", timeout=0.5).reached
    assert second.status()["ready"]
    assert second.terminate() == 0
    assert "cleaned up" in second.text()
    assert connect(one, "x/b", "x/a").reached


def test_the_second_goes_before_the_first_is_stopped(
    lab: LabFactory, agent: AgentFactory, successor: TookOver
) -> None:
    one = lab(["x/a", "x/b"])
    first = agent(one, policy("x", "a", select(one, "x/a"), ingress=[]))
    second = successor(first)
    second.kill()
    # A supervisor starts it again; it must not wait for ever.
    assert exit_status(first) == 1
    assert first.text().splitlines()[-1].startswith("podgate: the agent that took over has gone")
    assert not connect(one, "x/b", "x/a", timeout=0.5).reached
    first.start()
    assert first.status()["ready"]


def test_a_hook_of_the_first_is_asked_no_more(
    lab: LabFactory, agent: AgentFactory, successor: TookOver
) -> None:
    one = lab(["x/a", "x/b"])
    first = agent(one, web(one))
    before = all_rules(one)
    with PacketStream(one, "x/b", "x/a", port=SERVED) as stream:
        with Intercept(first, "def on_packet(packet, seen): pass", "pod=x/a") as hook:
            hook.wait(10)
            successor(first)
            assert hook.ended() == 1
        stream.assert_flows(20)
        assert all_rules(one) == before
        assert stream.retransmitted == 0


def test_nobody_to_take_over_from(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/a"])
    assert agent(one, options=["--take-over"]).status()["ready"]


def test_one_that_does_not_hand_over(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/a"])
    daemon = agent(one, start=False)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(daemon.control))
        listener.listen()
        done = threading.Event()

        def answer() -> None:
            while not done.is_set():
                connection, _ = listener.accept()
                with connection:
                    if connection.recv(4096):
                        connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 4\r\n\r\nnope")

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            daemon.options = ("--take-over",)
            daemon.start(wait=False)
            assert exit_status(daemon) == 2
            said = daemon.text().splitlines()[-1]
            assert said.startswith(f"podgate: --control {daemon.control}: another agent is running here")
            assert said.endswith("does not hand over: nope")
        finally:
            done.set()
            is_own(daemon.control)  # lets `accept` return
            thread.join()


def test_whose_agent_answers(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/a"])
    daemon = agent(one)
    assert daemon.podgate("status", "--is-own").stdout == ""
    inside = ("unshare", "--pid", "--fork", "env", f"PYTHONPATH={import_path()}", *PODGATE)
    other = one.run("node", *inside, "status", "--is-own", "--control", str(daemon.control), check=False)
    assert other.returncode == 1
    assert other.stderr == f"podgate: no agent of this container answers at {daemon.control}\n"
    assert os.getpid() != owner(daemon) == daemon.process.pid  # type: ignore[union-attr]
    daemon.kill()
    gone = daemon.podgate("status", "--is-own", check=False)
    assert gone.returncode == 1
