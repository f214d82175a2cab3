"""`podgate intercept` when something goes wrong: the hook, its process, the agent, or what they are told."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from pathlib import Path

import aiohttp
import pytest
from conftest import PODGATE, AgentFactory, LabFactory, import_path
from interceptor import PATIENT, SERVED, Intercept, all_rules, hook_rules, members, web
from objects import until
from packets import Stream
from traffic import arrives, passes, received, udp

from dataplane.errors import InputError
from dataplane.interception import MOST_WAITING

pytestmark = pytest.mark.netns

# Hangs for ever with its first packet, and says so.
HANGS = """
import time

def on_packet(packet, seen):
    print("asked", flush=True)
    while True:
        time.sleep(1)
"""


def test_a_hook_that_raises_leaves_packets_to_the_rules(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/a", "x/b"])
    running = agent(one, web(one))
    source, target = udp(one, "x/b", 7001), udp(one, "x/a", SERVED)
    to = (one.address("x/a"), SERVED)
    code = """
def share(packet):
    return 1 / packet.version.bit_count() - 1 / 0

def on_packet(packet, seen):
    if b"exit" in bytes(packet):
        raise SystemExit("enough")
    return share(packet)
"""
    with Intercept(running, code, *PATIENT, "pod=x/a") as hook:
        for word in (b"one", b"two", b"exit"):
            source.sendto(word, to)
            assert received(target, 20, 1) == [word]
        rows = hook.wait(3, hook="error")
        assert hook.end() == 0
    assert all((row["verdict"], row["reason"]) == ("allow", "policy-rule") for row in rows)
    assert "hook.py:4: ZeroDivisionError: division by zero" in rows[0]["why"]
    # The first of each kind with the author's own lines, and nobody else's.
    assert hook.said.count("ZeroDivisionError") == 1
    assert hook.said.count("SystemExit: enough") == 1
    assert hook.said.count("in on_packet") == 2
    assert "return 1 / packet.version.bit_count() - 1 / 0" in hook.said
    assert "dataplane/" not in hook.said
    assert hook.summary["error"] == 3


def test_an_endless_hook_costs_one_time_limit_and_ends_by_ctrl_c(
    lab: LabFactory, agent: AgentFactory
) -> None:
    one = lab(["x/a", "x/b"])
    running = agent(one, web(one))
    code = """
def on_packet(packet, seen):
    while True:
        pass
"""
    with (
        Stream(one, "x/b", "x/a", port=SERVED) as stream,
        Intercept(running, code, "--timeout", "0.05", "pod=x/a") as hook,
    ):
        # Its packets waited once; those that come while it hangs are not put to it.
        stream.assert_flows(100)
        assert hook.end() == 0
        stream.assert_flows(20)
    assert hook.summary["timeout"] > 0
    assert hook.summary["busy"] > 0
    assert "waiting" not in hook.said
    assert not hook.of(hook="allow") + hook.of(hook="drop")


def test_a_hook_that_swallows_ctrl_c_is_killed_by_the_next(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/a", "x/b"])
    running = agent(one, web(one))
    source, target = udp(one, "x/b", 7001), udp(one, "x/a", SERVED)
    to = (one.address("x/a"), SERVED)
    code = """
import time

def on_packet(packet, seen):
    print("asked", flush=True)
    while True:
        try:
            time.sleep(1)
        except BaseException:
            print("no", flush=True)
"""
    with Intercept(running, code, "--timeout", "0.05", "pod=x/a") as hook:
        source.sendto(b"x", to)
        until(lambda: "asked" in hook.lines, timeout=20, what="the hook is asked")
        hook.process.send_signal(signal.SIGINT)
        until(lambda: "no" in hook.lines, timeout=20, what="it takes no notice")
        assert hook.end() == -signal.SIGINT
    until(lambda: not hook_rules(one), what="the rules are as before")
    assert passes(source, to, target)


def test_packets_that_wait_go_on_when_the_hooks_process_is_killed(
    lab: LabFactory, agent: AgentFactory
) -> None:
    one = lab(["x/a", "x/b"])
    running = agent(one, web(one))
    before = all_rules(one)
    source, target = udp(one, "x/b", 7001), udp(one, "x/a", SERVED)
    to = (one.address("x/a"), SERVED)
    with (
        Stream(one, "x/b", "x/a", port=SERVED) as stream,
        Intercept(running, HANGS, *PATIENT, "pod=x/a", "udp") as hook,
    ):
        words = [f"{number}".encode() for number in range(MOST_WAITING + 20)]
        for word in words:
            source.sendto(word, to)
        until(lambda: "asked" in hook.lines, timeout=20, what="the hook is asked")
        # For no more is there room.
        assert received(target, 5, 20) == words[MOST_WAITING:]
        assert not received(target, 0)
        assert hook.end(signal.SIGKILL) == -signal.SIGKILL
        # All of them at once, in their order: long before their time has run out.
        assert received(target, 5, MOST_WAITING) == words[:MOST_WAITING]
        until(lambda: all_rules(one) == before and not members(one, 4), what="all is as before")
        stream.assert_flows(20)
        assert stream.retransmitted == 0


def test_a_hooks_process_that_is_stopped_holds_nothing_up(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/a", "x/b"])
    running = agent(one, web(one))
    with (
        Stream(one, "x/b", "x/a", port=SERVED) as stream,
        Intercept(running, "def on_packet(packet, seen): pass", "--timeout", "0.1", "pod=x/a") as hook,
    ):
        hook.wait(10)
        hook.process.send_signal(signal.SIGSTOP)
        stream.assert_flows(200)
        hook.process.send_signal(signal.SIGCONT)
        count = len(hook.of(hook="engine"))
        # It is asked again once it has caught up.
        until(lambda: len(hook.of(hook="engine")) > count + 20, timeout=20, what="it is asked again")
    assert hook.summary["busy"] > 0


def test_the_agents_end_gives_every_packet_its_verdict(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/a", "x/b"])
    running = agent(one, web(one))
    source, target = udp(one, "x/b", 7001), udp(one, "x/a", SERVED)
    with Intercept(running, HANGS, *PATIENT, "pod=x/a", "udp") as hook:
        source.sendto(b"waits", (one.address("x/a"), SERVED))
        until(lambda: "asked" in hook.lines, timeout=20, what="the hook is asked")
        assert running.terminate() == 0
        assert received(target, 5, 1) == [b"waits"]
        assert not hook_rules(one)
        assert hook.end() in (0, 1)  # it hung: whether it has read of the end is not known


def test_the_command_says_that_the_agent_ended(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/a", "x/b"])
    running = agent(one, web(one))
    with Intercept(running, "def on_packet(packet, seen): pass", "pod=x/a") as hook:
        running.terminate()
        assert hook.ended() == 1
    assert hook.lines[-1] == f"podgate: the agent at {running.control} ended: the agent ends"


def test_an_agent_that_was_killed_finds_the_rules_and_takes_them_away(
    lab: LabFactory, agent: AgentFactory
) -> None:
    one = lab(["x/a", "x/b"])
    running = agent(one, web(one))
    before = all_rules(one)
    source, target = udp(one, "x/b", 7001), udp(one, "x/a", SERVED)
    to = (one.address("x/a"), SERVED)
    with Intercept(running, "def on_packet(packet, seen): pass", *PATIENT, "pod=x/a") as hook:
        assert passes(source, to, target)
        running.kill()
        assert hook.ended() == 1
    # Closed: what nobody judges does not pass.
    assert hook_rules(one)
    assert not arrives(source, to, target)
    running.start()
    assert passes(source, to, target)
    until(lambda: all_rules(one) == before and not members(one, 4), what="all is as before")


def test_of_an_agent_that_fails_open_everything_passes(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/a", "x/b"])
    running = agent(one, web(one), options=["--fail", "open"])
    with Stream(one, "x/b", "x/a", port=SERVED) as stream:
        with Intercept(running, "def on_packet(packet, seen): pass", "pod=x/a") as hook:
            hook.wait(5)
            running.kill()
            assert hook.ended() == 1
        assert hook_rules(one)
        stream.assert_flows(20)


def test_what_cannot_be_is_refused_and_told(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/a", "x/b"])
    running = agent(one, web(one))
    source, target = udp(one, "x/b", 7001), udp(one, "x/a", SERVED)
    to = (one.address("x/a"), SERVED)
    code = """
def on_packet(packet, seen):
    word = bytes(packet.payload.payload).decode()
    if word == "address":
        packet.dst = "192.0.2.1"
        return packet
    if word == "junk":
        return b"junk"
    if word == "long":
        return packet / (b"x" * 2000)
    if word == "years":
        return delay(1e9)
    if word == "number":
        return 7
    if word.startswith("large"):
        return packet
"""
    said = {
        "address": "keeps its addresses, protocol and ports",
        "junk": "cannot be read (malformed)",
        "long": "bytes are more than the way out takes (1500)",
        "years": "a delay must be 0 to 10 seconds",
        "number": "on_packet returned int",
        # Put together of fragments, and more than the queue is given of a packet.
        "large" * 1500: "only 4016 of its 7528 bytes were there to rewrite",
    }
    with Intercept(running, code, *PATIENT, "pod=x/a", "udp") as hook:
        for count, (word, why) in enumerate(said.items(), 1):
            source.sendto(word.encode(), to)
            assert received(target, 20, 1) == [word.encode()]
            until(lambda n=count: len(hook.rows) >= n, timeout=20, what=word)  # type: ignore[misc]
            row = hook.rows[-1]
            assert row["hook"] == ("error" if word == "number" else "refused")
            assert (row["verdict"], row["reason"]) == ("allow", "policy-rule")
            assert why in row["why"]
            assert why in hook.said
    assert hook.summary["refused"] == 5


def test_one_at_a_time(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/a", "x/b"])
    running = agent(one, web(one))
    code = "def on_packet(packet, seen): pass"
    with Intercept(running, code, "pod=x/a"):
        second = Intercept(running, code, "pod=x/b")
        assert second.ended() == 2
        assert second.lines[-1] == (
            "podgate: somebody intercepts packets already: one `podgate intercept` at a time"
        )
    with Intercept(running, code, "pod=x/b"):
        pass


def test_bad_input_is_one_line(lab: LabFactory, agent: AgentFactory, tmp_path: Path) -> None:
    running = agent(lab(["x/a"]))
    file = tmp_path / "hook.py"
    file.write_text("def on_packet(packet, seen): pass\n")
    for argv, said in (
        (["pod=z/nobody"], "podgate: FILTER: no pod of this node is meant; known here: x/a"),
        (["host", "not.a.name.invalid"], "podgate: FILTER: 'host not.a.name.invalid' is no pcap-filter"),
    ):
        done = running.podgate("intercept", "--hook", str(file), *argv, check=False)
        assert done.returncode == 2
        assert done.stderr.startswith(said)
        assert len(done.stderr.splitlines()) == 1
        assert done.stdout == ""


def test_nonsense_from_a_client_costs_no_packet(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/a", "x/b"])
    running = agent(one, web(one))
    source, target = udp(one, "x/b", 7001), udp(one, "x/a", SERVED)
    to = (one.address("x/a"), SERVED)

    async def talk() -> dict[str, int]:
        connector = aiohttp.UnixConnector(path=str(running.control))
        query = {"filter": "pod=x/a udp", "timeout": "10"}
        async with (
            asyncio.timeout(30),
            aiohttp.ClientSession(connector=connector) as session,
            session.ws_connect("http://agent/intercept", params=query) as ws,
        ):
            assert "began" in await ws.receive_json()
            for text in ("", "{", "[[]]", '{"id": 10}', '{"id": "x"}', '{"id": 1e400}', '{"end": 1}'):
                await ws.send_str(text)
            await ws.send_bytes(b"\xff")
            refusals = [await ws.receive_json() for _ in range(7)]
            assert all(list(one) == ["refused"] for one in refusals)
            source.sendto(b"x", to)
            asked = await ws.receive_json()
            assert (asked["packet"]["dst_pod"], asked["packet"]["verdict"]) == ("x/a", "allow")
            await ws.send_json({"id": asked["id"], "delay": 10**400})
            told = await ws.receive_json()
            assert (told["did"], told["record"]["verdict"]) == ("refused", "allow")
            await ws.send_json({"id": asked["id"], "verdict": "drop"})  # too late: it has its verdict
            await ws.send_json({"end": True})
            summary: dict[str, int] = (await ws.receive_json())["summary"]
            return summary

    assert asyncio.run(talk()) == {"asked": 1, "refused": 1, "nonsense": 7}
    assert received(target, 5, 1) == [b"x"]
    assert "Traceback" not in running.text()


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ({"timeout": "soon"}, "timeout=soon: 0.001 to 10 seconds"),
        ({"timeout": "nan"}, "timeout=nan: 0.001 to 10 seconds"),
        ({"filter": "verdict=maybe"}, "FILTER: 'verdict=maybe'"),
    ],
)
def test_a_query_that_cannot_be_is_refused(
    query: dict[str, str], said: str, lab: LabFactory, agent: AgentFactory
) -> None:
    running = agent(lab(["x/a"]))

    async def talk() -> dict[str, str]:
        connector = aiohttp.UnixConnector(path=str(running.control))
        async with (
            asyncio.timeout(30),
            aiohttp.ClientSession(connector=connector) as session,
            session.ws_connect("http://agent/intercept", params=query) as ws,
        ):
            answer: dict[str, str] = await ws.receive_json()
            return answer

    answer = asyncio.run(talk())
    assert said in answer["error"]
    with pytest.raises(InputError, match="is a WebSocket"):
        running.ask("intercept")


def test_without_an_agent(lab: LabFactory, tmp_path: Path) -> None:
    file = tmp_path / "hook.py"
    file.write_text("def on_packet(packet, seen): pass\n")
    line = (*PODGATE, "intercept", "--hook", str(file), "--control", str(tmp_path / "none.sock"))
    environment = {**os.environ, "PYTHONPATH": import_path()}
    done = subprocess.run(line, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1
    assert "no agent at" in done.stderr
