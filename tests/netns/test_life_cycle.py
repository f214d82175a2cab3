"""An agent that crashes, stops, starts again, meets another one, or is disturbed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from conftest import PODGATE, AgentFactory, LabFactory, RunningAgent, import_path
from objects import allow, anywhere, deny, pod, policy, select, until
from traffic import Stream, arrives, passes, received, sending, udp

from dataplane.addresses import format_address
from dataplane.lab.probe import connect
from dataplane.lab.topology import Topology, Wire
from dataplane.lab.world import Lab
from dataplane.model import Key

pytestmark = pytest.mark.netns
OUR_BITS = 0x70000000


def traces(lab: Lab) -> list[str]:
    """What there is of ours in the node's kernel."""
    found = []
    for variant in ("nft", "legacy"):
        for tool in ("iptables", "ip6tables"):
            saved = lab.run("node", f"{tool}-{variant}-save", check=False).stdout
            found += [f"{tool}-{variant}: {line}" for line in saved.splitlines() if "PODGATE" in line]
    found += [name for name in lab.run("node", "ipset", "list", "-n").stdout.split() if "podgate" in name]
    for link in json.loads(lab.run("node", "ip", "-j", "link").stdout):
        name = link.get("group", "default")
        if name != "default" and int(name, 0) & OUR_BITS:
            found.append(f"group of {link['ifname']}: {name}")
    for family in ("ipv4", "ipv6"):
        flows = lab.run("node", "conntrack", "-L", "-f", family, check=False).stdout
        for flow in flows.splitlines():
            marks = [word for word in flow.split() if word.startswith("mark=")]
            if any(int(mark[5:]) & OUR_BITS for mark in marks):
                found.append(flow)
    return found


def start_another(agent: RunningAgent, *options: str) -> subprocess.CompletedProcess[str]:
    """A second agent beside the one that runs, expected to give up."""
    argv = [
        "env",
        f"PYTHONPATH={import_path()}",
        *PODGATE,
        "agent",
        "--source",
        str(agent.directory),
        *options,
    ]
    return agent.lab.run("node", *argv, check=False)


def one_line(text: str) -> bool:
    return text.count("\n") == 1 and text.startswith("podgate: ") and "Traceback" not in text


@contextlib.contextmanager
def stopped(agent: RunningAgent) -> Iterator[None]:
    """The agent does nothing, while it holds its queues."""
    assert agent.process is not None
    os.kill(agent.process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(agent.process.pid, signal.SIGCONT)


# --- a crash -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [4, 6])
def test_killed_and_started_again(lab: LabFactory, agent: AgentFactory, family: int) -> None:
    one = lab(["x/a", "x/b", "x/c"])
    daemon = agent(one, policy("x", "a", select(one, "x/a"), ingress=allow(one, "x/b", "x/c")))
    kept, ended = (Stream(one, name, "x/a", family=family) for name in ("x/b", "x/c"))
    daemon.kill()
    assert kept.flows()
    assert ended.flows()
    # Nobody can judge: a new flow waits, and is dropped as the queue has no reader.
    target, to = udp(one, "x/a", 9000, family=family), (one.address("x/a", family), 9000)
    b, c = udp(one, "x/b", 5000, family=family), udp(one, "x/c", 5000, family=family)
    assert not arrives(b, to, target)
    assert connect(one, "node", "x/a", family=family).reached
    assert connect(one, "x/b", "x/c", family=family).reached, "nobody isolates c"
    daemon.write(policy("x", "a", select(one, "x/a"), ingress=allow(one, "x/b")))
    daemon.start()
    assert ended.silent()
    assert kept.flows()
    assert passes(b, to, target)
    assert not arrives(c, to, target)


def test_a_policy_that_begins_while_nobody_runs(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/a", "x/b", "x/c"])
    daemon = agent(one, policy("x", "a", select(one, "x/a"), ingress=allow(one, "x/b")))
    stream = Stream(one, "x/a", "x/c")
    daemon.kill()
    # Isolation of another pod and direction, and one that ends.
    daemon.write(policy("x", "c", select(one, "x/c"), ingress=allow(one, "x/b")))
    daemon.start()
    assert stream.silent()
    assert connect(one, "x/c", "x/a").reached
    assert not connect(one, "x/a", "x/c", timeout=0.5).reached


def test_an_address_passes_on_while_nobody_runs(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/old", "x/server"])
    daemon = agent(one, policy("x", "old", select(one, "x/old"), egress=allow(one, "x/server"), ingress=[]))
    server, old = udp(one, "x/server", 9000), one.pod("x/old")
    client = udp(one, "x/old", 5000)
    assert passes(client, (one.address("x/server"), 9000), server)
    client.close()
    daemon.kill()
    one.remove_pod("x/old")
    one.add_pod(pod("x/new", *(format_address(ip) for ip in old.ips)))
    daemon.write(deny(one, "x/new"))
    daemon.write_pods()
    daemon.start()
    heir = udp(one, "x/new", 5000)
    assert not arrives(server, (one.address("x/new"), 5000), heir)
    assert not arrives(heir, (one.address("x/server"), 9000), server)


def test_killed_with_fail_open(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/a", "x/b"])
    daemon = agent(one, deny(one, "x/a"), options=["--fail", "open"])
    assert daemon.status()["fail"] == "open"
    target, to = udp(one, "x/a", 9000), (one.address("x/a"), 9000)
    b = udp(one, "x/b", 5000)
    assert not arrives(b, to, target)
    daemon.kill()
    assert passes(b, to, target)
    daemon.start()
    assert not arrives(b, to, target), "what passed unjudged is judged again"


# --- an orderly end ------------------------------------------------------------------------------


def test_sigterm_leaves_rules_for_the_next_agent(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/a", "x/b", "x/c"])
    daemon = agent(one, policy("x", "a", select(one, "x/a"), ingress=allow(one, "x/b")))
    stream = Stream(one, "x/b", "x/a")
    assert daemon.terminate() == 0
    assert not daemon.control.exists()
    assert "rules stay in the kernel for the next agent" in daemon.text()
    assert "remove_with='podgate cleanup'" in daemon.text()
    assert stream.flows()
    for source in ("x/b", "x/c"):
        assert not connect(one, source, "x/a", timeout=0.4).reached
    daemon.start()
    assert "kept as found" in daemon.text()
    assert stream.flows()
    assert connect(one, "x/b", "x/a").reached


@pytest.mark.parametrize("variant", ["nft", "legacy"])
def test_on_stop_clean_leaves_nothing(lab: LabFactory, agent: AgentFactory, variant: str) -> None:
    one = lab(["x/a", "x/b", "x/d"], Topology(wires={Key("x", "d"): Wire.BRIDGE}))
    before = rules_of_others(one)
    daemon = agent(one, deny(one, "x/a", "x/d"), options=["--on-stop", "clean", "--iptables", variant])
    assert daemon.status()["iptables"] == variant
    daemon.write(policy("x", "a", select(one, "x/a", "x/d"), ingress=allow(one, "x/b")))
    flow = Stream(one, "x/b", "x/a")
    assert traces(one)
    assert daemon.process is not None
    daemon.process.send_signal(signal.SIGINT)
    assert daemon.process.wait(15) == 0
    assert traces(one) == []
    assert rules_of_others(one) == before
    assert not daemon.control.exists()
    assert flow.flows()
    assert connect(one, "x/b", "x/a").reached


def test_stopped_in_the_middle_of_a_change(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/a", "x/b"])
    daemon = agent(one, options=["--on-stop", "clean"])
    for milliseconds in (40, 70):
        daemon.write(deny(one, "x/a", name=f"deny-{milliseconds}"), wait=False)
        time.sleep(milliseconds / 1000)  # the change is being written to the kernel about now
        assert daemon.process is not None
        daemon.process.send_signal(signal.SIGINT)
        assert daemon.process.wait(15) == 0
        assert traces(one) == []
        assert "Traceback" not in daemon.text()
        daemon.start()


def rules_of_others(lab: Lab) -> list[str]:
    found = []
    for tool in ("iptables", "ip6tables"):
        saved = lab.run("node", f"{tool}-nft-save").stdout
        found += [line for line in saved.splitlines() if line.startswith("-A") and "PODGATE" not in line]
    return found


@pytest.mark.parametrize("variant", ["nft", "legacy"])
def test_cleanup_after_a_crash_leaves_nothing(lab: LabFactory, agent: AgentFactory, variant: str) -> None:
    one = lab(["x/a", "x/b", "x/d"], Topology(wires={Key("x", "d"): Wire.BRIDGE}))
    before = rules_of_others(one)
    daemon = agent(
        one, policy("x", "p", select(one, "x/a", "x/d"), ingress=allow(one, "x/b")),
        options=["--iptables", variant],
    )  # fmt: skip
    flow = Stream(one, "x/b", "x/a")
    daemon.kill()
    assert traces(one)
    done = daemon.podgate("cleanup", check=False)
    assert done.returncode == 0, done.stderr
    assert traces(one) == []
    assert rules_of_others(one) == before
    assert not daemon.control.exists()
    assert flow.flows()
    again = daemon.podgate("cleanup", check=False)
    assert again.returncode == 0


# --- another agent -------------------------------------------------------------------------------

OTHER_OPTIONS: dict[str, Sequence[str]] = {
    "queues": ["--queues", "2"],
    "other-queue": ["--queue-base", "7"],
    "no-offload": ["--no-offload"],
    "mark-mask": ["--mark-mask", "0x07000000"],
    "legacy": ["--iptables", "legacy"],
    "netfilterqueue": ["--backend", "netfilterqueue"],
}


@pytest.mark.parametrize("options", OTHER_OPTIONS.values(), ids=OTHER_OPTIONS)
def test_other_options_take_over_without_a_gap(
    lab: LabFactory, agent: AgentFactory, options: Sequence[str]
) -> None:
    one = lab(["x/a", "x/b", "x/c"])
    daemon = agent(one, policy("x", "a", select(one, "x/a"), ingress=allow(one, "x/b")))
    stream = Stream(one, "x/b", "x/a")
    target, to = udp(one, "x/a", 9000), (one.address("x/a"), 9000)
    with sending(udp(one, "x/c", 5000), to):
        daemon.terminate()
        daemon.options = tuple(options)
        daemon.start()
        assert received(target, 0.2) == []
    assert stream.flows()
    assert passes(udp(one, "x/b", 5001), to, target)
    assert not arrives(udp(one, "x/c", 5001), to, target)
    stream_after = Stream(one, "x/b", "x/a")
    daemon.write(policy("x", "a", select(one, "x/a"), ingress=[]))
    assert stream_after.silent()
    assert stream.silent()


def test_a_second_agent_gives_up(lab: LabFactory, agent: AgentFactory, tmp_path: Path) -> None:
    one = lab(["x/a", "x/b"])
    daemon = agent(one, deny(one, "x/a"))
    before = one.run("node", "iptables-nft-save").stdout.count("PODGATE")
    same_socket = start_another(daemon, "--control", str(daemon.control))
    assert same_socket.returncode == 2
    assert one_line(same_socket.stderr)
    assert "another agent is running here" in same_socket.stderr
    silent = ("--metrics-bind-addr", "0", "--health-probe-bind-addr", "0")
    same_queue = start_another(daemon, "--control", str(tmp_path / "other.sock"), *silent)
    assert same_queue.returncode == 2
    assert one_line(same_queue.stderr), same_queue.stderr
    assert "queue 0" in same_queue.stderr
    # Not even one that would clean up behind itself takes the first one's rules away.
    cleaning = start_another(daemon, "--control", str(tmp_path / "c.sock"), "--on-stop", "clean", *silent)
    assert cleaning.returncode == 2
    # The first one feels nothing.
    assert daemon.status()["ready"]
    assert one.run("node", "iptables-nft-save").stdout.count("PODGATE") == before
    assert not connect(one, "x/b", "x/a", timeout=0.4).reached


def test_not_ready_says_why(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/a", "x/b"])
    one.run("node", "ip", "link", "add", "kube-ipvs0", "type", "veth", "peer", "name", "peer0")
    daemon = agent(one, deny(one, "x/a"), wait=False)
    until(lambda: "not ready" in daemon.text(), 15, "it has looked at the links")
    done = daemon.podgate("status", "--wait-ready", "0.3", check=False)
    assert done.returncode == 1
    assert one_line(done.stderr), done.stderr
    assert "IPVS" in done.stderr
    one.run("node", "ip", "link", "del", "kube-ipvs0")
    done = daemon.podgate("status", "--wait-ready", "5")
    assert done.stdout.startswith("ready")


# --- strict mode ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [4, 6])
def test_strict_mode(lab: LabFactory, agent: AgentFactory, family: int) -> None:
    one = lab(["x/a", "x/b", "x/c"])
    daemon = agent(
        one,
        policy("x", "a", select(one, "x/a"), ingress=allow(one, "x/b"), egress=[]),
        policy("x", "b", select(one, "x/b"), egress=anywhere()),
        options=["--mode", "strict"],
    )
    assert daemon.status()["mode"] == "strict"
    # c has no policy: isolated both ways, while its node still reaches it.
    for source, destination in (("x/b", "x/c"), ("x/c", "x/a"), ("outside", "x/c"), ("x/c", "outside")):
        assert not connect(one, source, destination, family=family, timeout=0.3).reached
    assert connect(one, "node", "x/c", family=family).reached
    with one.serving([one.node], [(6, 9000)]):
        assert connect(one, "x/c", "node", "9000/TCP", family=family).reached
    assert connect(one, "x/b", "x/a", family=family).reached
    assert not connect(one, "x/a", "x/b", family=family, timeout=0.3).reached
    # A pod that no object names yet: its interface is closed from its first packet.
    one.add_pod(pod("x/new"))
    new, b = udp(one, "x/new", 9000, family=family), udp(one, "x/b", 9001, family=family)
    assert not arrives(b, (one.address("x/new", family), 9000), new)
    assert not arrives(new, (one.address("x/b", family), 9001), b)
    assert daemon.status()["counters"]["no-table"] > 0
    assert connect(one, "node", "x/new", family=family).reached
    with one.serving([one.node], [(17, 9002)]):
        assert not connect(one, "x/new", "outside", "53/UDP", family=family, timeout=0.3).reached
    daemon.write_pods()
    daemon.write(
        policy("x", "new", select(one, "x/new"), ingress=allow(one, "x/b"), egress=[]),
        policy("x", "b", select(one, "x/b"), egress=anywhere()),
    )
    assert passes(b, (one.address("x/new", family), 9000), new)


def test_from_strict_to_standard(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/a", "x/b"])
    daemon = agent(one, options=["--mode", "strict"])
    assert not connect(one, "x/a", "x/b", timeout=0.3).reached
    daemon.terminate()
    daemon.options = ()
    daemon.start()
    assert connect(one, "x/a", "x/b").reached


# --- a full queue --------------------------------------------------------------------------------


@pytest.mark.parametrize("fail", ["closed", "open"])
def test_a_full_queue(lab: LabFactory, agent: AgentFactory, fail: str) -> None:
    one = lab(["x/a", "x/b"])
    daemon = agent(one, policy("x", "a", select(one, "x/a"), ingress=[]), options=["--fail", fail])
    target, to = udp(one, "x/a", 9000), (one.address("x/a"), 9000)
    b = udp(one, "x/b", 5000)
    with stopped(daemon):
        for _ in range(6000):
            with contextlib.suppress(OSError):
                b.sendto(b"flood", to)
        passed = len(received(target, 1.0))
    if fail == "open":
        # Those that found no room; the ones that wait are judged.
        assert passed > 0
    else:
        assert passed == 0
        until(lambda: daemon.status()["counters"].get("queue-full", 0) > 0, what="counted")
        queue = daemon.status()["queues"][0]
        assert queue["dropped"] + queue["user_dropped"] > 0
    until(lambda: daemon.status()["queues"][0]["depth"] == 0, what="the queue is empty")
    assert received(target, 0.2) == []
    assert daemon.status()["counters"]["no-rule"] > 0
    assert daemon.status()["ready"]


# --- others change our rules ---------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["nft", "legacy"])
def test_what_others_change_is_put_back(lab: LabFactory, agent: AgentFactory, variant: str) -> None:
    one = lab(["x/a", "x/b"])
    daemon = agent(
        one, policy("x", "a", select(one, "x/a"), ingress=[]),
        options=["--verify-seconds", "0.2", "--iptables", variant],
    )  # fmt: skip
    device = one.pod("x/a").device
    group = one.run("node", "ip", "-j", "link", "show", "dev", device).stdout
    tool = f"iptables-{variant}"
    wanted = one.run("node", f"{tool}-save").stdout
    jump = "-m comment --comment podgate -j PODGATE-FORWARD"
    disturbances = {
        "the jump to PODGATE-FORWARD is gone": f"{tool} -t mangle -D FORWARD {jump}",
        "rules stand before the jump": f"{tool} -t mangle -I FORWARD -j ACCEPT",
        "chain PODGATE-FORWARD was changed": f"{tool} -t mangle -F PODGATE-FORWARD",
        "chain PODGATE-QUEUE was changed": f"{tool} -t mangle -I PODGATE-QUEUE -j ACCEPT",
        "podgate-spoof-4 was changed": "ipset flush podgate-spoof-4",
    }
    for sign, command in disturbances.items():
        logged = daemon.text().count("others changed our rules")
        one.run("node", *command.split())
        until(lambda: daemon.text().count("others changed our rules") > logged, what=sign)  # noqa: B023
        last = [line for line in daemon.text().splitlines() if "others changed our rules" in line][-1]
        assert sign in last
        if "ACCEPT" in command and "FORWARD" in command:
            one.run("node", tool, "-t", "mangle", "-D", "FORWARD", "-j", "ACCEPT")
        assert not connect(one, "x/b", "x/a", timeout=0.3).reached, sign
        assert connect(one, "x/a", "x/b").reached, sign

    def words(text: str) -> list[str]:
        return sorted(line for line in text.splitlines() if line.startswith("-A"))

    until(lambda: words(one.run("node", f"{tool}-save").stdout) == words(wanted), what="all is as it was")
    assert one.run("node", "ip", "-j", "link", "show", "dev", device).stdout == group
    assert daemon.status()["ready"]


def test_a_device_group_is_put_back_at_once(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/a", "x/b"])
    daemon = agent(one, deny(one, "x/a", directions="ingress"), options=["--verify-seconds", "600"])
    device = one.pod("x/a").device
    before = one.run("node", "ip", "-j", "link", "show", "dev", device).stdout
    one.run("node", "ip", "link", "set", device, "group", "7")
    until(lambda: "others changed our device groups" in daemon.text())
    assert not connect(one, "x/b", "x/a", timeout=0.3).reached
    one.run("node", "ip", "link", "set", device, "group", "0")
    until(lambda: one.run("node", "ip", "-j", "link", "show", "dev", device).stdout == before)
    assert not connect(one, "x/b", "x/a", timeout=0.3).reached


def test_a_destroyed_set_is_made_again(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/a", "x/b"])
    daemon = agent(one, deny(one, "x/a", directions="ingress"), options=["--verify-seconds", "0.2"])
    for tool in ("iptables", "ip6tables"):
        one.run("node", tool, "-t", "raw", "-F", "PODGATE-SOURCE")
        one.run("node", tool, "-t", "mangle", "-F", "PODGATE-INPUT")
    # Refused when the agent was quicker, and the set is in use again.
    one.run("node", "ipset", "destroy", "podgate-spoof-4", check=False)
    until(lambda: "others changed our rules" in daemon.text())
    until(lambda: "podgate-spoof-4" in one.run("node", "ipset", "list", "-n").stdout)
    until(lambda: connect(one, "x/a", "x/b", timeout=0.3).reached)
    until(lambda: not connect(one, "x/b", "x/a", timeout=0.3).reached)


def test_a_thousand_status_questions_disturb_nothing(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/a", "x/b"])
    daemon = agent(one, policy("x", "a", select(one, "x/a"), ingress=allow(one, "x/b")))
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(10):
                daemon.ask("flows")
                daemon.ask("rules", pod="x/a")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    assert connect(one, "x/b", "x/a").reached
    for thread in threads:
        thread.join()
    assert failures == []
