"""Objects that cannot be used, while real packets flow: nothing opens, and a line says what is wrong."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import yaml
from conftest import PODGATE, AgentFactory, LabFactory, RunningAgent, import_path
from objects import Object, PodLabels, allow, network_policy, policy, rule, select, until
from packets import check
from traffic import Stream, arrives, passes, udp

from dataplane.lab.probe import connect
from dataplane.lab.world import Lab

pytestmark = pytest.mark.netns


def log_of(agent: RunningAgent, *words: str) -> str:
    """The first log line that has all these words, once it is there."""

    def find() -> list[str]:
        return [line for line in agent.text().splitlines() if all(word in line for word in words)]

    return str(until(find, what=f"a line with {words}")[0])


@pytest.mark.parametrize(
    "text",
    ["kind: PolicyEndpoint\nspec: [unclosed\n", "\x00\x01\x02", "a: &x [*x\n", "- " * 2000 + "\n", "{'"],
    ids=["yaml", "bytes", "alias", "deep", "json"],
)
def test_a_broken_file_keeps_its_last_good_content(lab: LabFactory, agent: AgentFactory, text: str) -> None:
    one = lab(["x/a", "x/b", "x/c"])
    good = policy("x", "a", select(one, "x/a"), ingress=allow(one, "x/b"))
    daemon = agent(one, good)
    stream = Stream(one, "x/b", "x/a")
    daemon.write_text(text, wait=False)
    until(lambda: any("policies.yaml" in problem for problem in daemon.status()["problems"]))
    line = log_of(daemon, "policies.yaml", "bad object")
    assert "Traceback" not in daemon.text()
    assert len(line) < 1000
    assert stream.flows()
    assert connect(one, "x/b", "x/a").reached
    assert not connect(one, "x/c", "x/a", timeout=0.4).reached
    # Another file goes on being read, and the broken one is taken up again once mended.
    daemon.write(policy("x", "b", select(one, "x/b"), ingress=[]), file="more.yaml")
    assert not connect(one, "x/c", "x/b", timeout=0.4).reached
    daemon.write(policy("x", "a", select(one, "x/a"), ingress=allow(one, "x/c")))
    assert connect(one, "x/c", "x/a").reached
    assert daemon.status()["problems"] == []


def bad_rules(lab: Lab) -> dict[str, tuple[list[Object], str]]:
    """Rules of which nothing may open, and the field that the log line has to name."""
    b = lab.address("x/b")
    return {
        "cidr": ([{"cidr": "10.1.0.0/33"}], "spec.ingress[0].cidr"),
        "cidr-word": ([{"cidr": "everyone"}], "spec.ingress[0].cidr"),
        "cidr-none": ([{"ports": [{"protocol": "TCP", "port": 80}]}], "spec.ingress[0]"),
        "except": ([rule("0.0.0.0/0", except_=["10.1.0.0/99"])], "spec.ingress[0].except[0]"),
        "except-not-a-list": ([{"cidr": "0.0.0.0/0", "except": b}], "spec.ingress[0].except"),
        "port": ([{"cidr": b, "ports": [{"protocol": "UDP", "port": 90000}]}], "spec.ingress[0].ports[0]"),
        "port-word": (
            [{"cidr": b, "ports": [{"protocol": "UDP", "port": "dns"}]}],
            "spec.ingress[0].ports[0]",
        ),
        "protocol": ([{"cidr": b, "ports": [{"protocol": "GRE", "port": 9000}]}], "spec.ingress[0].ports[0]"),
        "end-port": (
            [{"cidr": b, "ports": [{"protocol": "UDP", "port": 9000, "endPort": 80}]}],
            "spec.ingress[0].ports[0]",
        ),
        "ports-not-a-list": ([{"cidr": b, "ports": {"port": 9000}}], "spec.ingress[0].ports"),
        "domain": ([{"domainName": "example.com"}], "spec.ingress[0]"),
    }


def test_a_bad_rule_never_opens(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/a", "x/b"])
    daemon = agent(one, policy("x", "a", select(one, "x/a"), ingress=[]))
    target, to = udp(one, "x/a", 9000), (one.address("x/a"), 9000)
    cases = bad_rules(one)
    daemon.write(
        *(policy("x", name, select(one, "x/a"), ingress=rules) for name, (rules, _) in cases.items())
    )
    assert not arrives(udp(one, "x/b", 5000), to, target)
    verdict = daemon.ask("explain", **{"from": "x/b", "to": "x/a", "port": "9000/UDP"})
    assert verdict["ingress"]["verdict"] == "deny"
    problems = daemon.status()["problems"]
    for name, (_, field) in cases.items():
        line = log_of(daemon, "bad object", f"x/{name}-1", f"field={field}")
        assert "policies.yaml" in line, name
        assert any(field in problem and f"x/{name}-1" in problem for problem in problems), name
    assert daemon.status()["ready"]
    # Good rules beside a bad one count, and so does what is left of a rule's ports.
    daemon.write(
        policy(
            "x", "a", select(one, "x/a"),
            ingress=[
                {"cidr": "nonsense"},
                {"cidr": one.address("x/b"), "ports": [{"port": -1}, {"protocol": "UDP", "port": 9000}]},
            ],
        )
    )  # fmt: skip
    assert passes(udp(one, "x/b", 5100), to, target)
    assert not connect(one, "x/b", "x/a", timeout=0.4).reached


def test_an_unusable_object_keeps_its_last_version(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/a", "x/b", "x/c"])
    good = policy("x", "a", select(one, "x/a"), ingress=allow(one, "x/b"))
    daemon = agent(one, good)
    for field, value in (("podIsolation", "Ingress"), ("podSelectorEndpoints", "all"), ("policyRef", None)):
        broken = {**good, "spec": {**good["spec"], field: value}}
        daemon.write(broken, wait=False)
        until(lambda: daemon.status()["problems"], what=field)
        assert connect(one, "x/b", "x/a").reached, field
        assert not connect(one, "x/c", "x/a", timeout=0.4).reached, field
        daemon.write(good, wait=False)
        until(lambda: not daemon.status()["problems"], what="mended")


WEB = {"podSelector": {"matchLabels": {"app": "web"}}}
LABELS: PodLabels = {"x/a": {"app": "web"}, "x/b": {"app": "client"}, "x/c": {"app": "other"}}
CLIENTS: Object = {"podSelector": {"matchLabels": {"app": "client"}}}
ONLY_CLIENTS = (("x/b", "x/a", "80/TCP", "."), ("x/c", "x/a", "80/TCP", "X"))
NOBODY = (("x/b", "x/a", "80/TCP", "X"), ("x/c", "x/a", "80/TCP", "X"))

# Updates of a policy in force that leave it as it was: nobody can say whom they select.
UNUSABLE: dict[str, tuple[Object, str]] = {
    "selector-typo": ({"podSelector": {"matchLabel": {"app": "web"}}}, "spec.podSelector.matchLabel"),
    "selector-number": ({"podSelector": {"matchLabels": {"app": 1}}}, "spec.podSelector.matchLabels[app]"),
    "operator": (
        {"podSelector": {"matchExpressions": [{"key": "app", "operator": "in", "values": ["web"]}]}},
        "spec.podSelector.matchExpressions[0].operator",
    ),
    "in-nothing": (
        {"podSelector": {"matchExpressions": [{"key": "app", "operator": "In", "values": []}]}},
        "spec.podSelector.matchExpressions[0].values",
    ),
    "exists-what": (
        {"podSelector": {"matchExpressions": [{"key": "app", "operator": "Exists", "values": ["web"]}]}},
        "spec.podSelector.matchExpressions[0].values",
    ),
    "spec": ("{}", "spec"),
}

# Rules of which nothing may open, in a policy that isolates all the same.
EMPTY: dict[str, tuple[object, str]] = {
    "no-rules": ("all", "spec.ingress"),
    "typo": ([{"form": [CLIENTS]}], "spec.ingress[0].form"),
    "peer-typo": ([{"from": [{"podSelektor": {}}]}], "spec.ingress[0].from[0].podSelektor"),
    "peer-selector": (
        [{"from": [{"podSelector": {"matchLabels": {"app": True}}}]}],
        "spec.ingress[0].from[0].podSelector.matchLabels[app]",
    ),
    "both-or-one": (
        [{"from": [{"podSelector": {}, "namespaceSelector": {"matchLabels": []}}]}],
        "spec.ingress[0].from[0].namespaceSelector.matchLabels",
    ),
    "cidr": ([{"from": [{"ipBlock": {"cidr": "0.0.0.0/33"}}]}], "spec.ingress[0].from[0].ipBlock.cidr"),
    "except": (
        [{"from": [{"ipBlock": {"cidr": "0.0.0.0/0", "except": ["::/0"]}}]}],
        "spec.ingress[0].from[0].ipBlock.except[0]",
    ),
    "port": ([{"ports": [{"port": 65536}]}], "spec.ingress[0].ports[0].port"),
    "port-text": ([{"ports": [{"port": "80"}]}], "spec.ingress[0].ports[0].port"),
    "protocol": ([{"ports": [{"protocol": "tcp", "port": 80}]}], "spec.ingress[0].ports[0].protocol"),
    "end": ([{"ports": [{"port": 80, "endPort": 79}]}], "spec.ingress[0].ports[0].endPort"),
    "end-name": ([{"ports": [{"port": "http", "endPort": 90}]}], "spec.ingress[0].ports[0].endPort"),
}  # fmt: skip


def test_a_broken_update_of_a_network_policy_keeps_it_in_force(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/a", "x/b", "x/c"])
    good = network_policy("x/web", {**WEB, "ingress": [{"from": [CLIENTS]}]})
    daemon = agent(one, good, start=False)
    daemon.write_pods(LABELS)
    daemon.start()
    streams = Stream(one, "x/b", "x/a"), Stream(one, "x/b", "x/a", family=6)
    for name, (change, field) in UNUSABLE.items():
        spec = {**good["spec"], **change} if isinstance(change, dict) else change
        daemon.write({**good, "spec": spec}, wait=False)
        (problem,) = until(lambda: daemon.status()["problems"], what=name)
        assert "NetworkPolicy x/web" in problem, name
        assert field in problem, name
        assert problem.endswith("its last good version stays in force"), name
        check(one, *ONLY_CLIENTS)
        daemon.write(good, wait=False)
        until(lambda: not daemon.status()["problems"], what="mended")
    assert all(stream.flows() for stream in streams)
    assert "Traceback" not in daemon.text()


def test_broken_rules_of_a_network_policy_allow_nothing(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/a", "x/b", "x/c"])
    daemon = agent(one, start=False)
    daemon.write_pods(LABELS)
    daemon.write(
        *(network_policy(f"x/{name}", {**WEB, "ingress": rules}) for name, (rules, _) in EMPTY.items())
    )
    daemon.start()
    check(one, *NOBODY)
    problems = daemon.status()["problems"]
    for name, (_, field) in EMPTY.items():
        assert any(f"NetworkPolicy x/{name}: " in each and field in each for each in problems), name
        assert "reason=" in log_of(daemon, "bad object", f"x/{name}'", field), name
    # A good peer beside a bad one counts; host bits are read as the API server reads them.
    mixed = [{"from": [{"podSelector": {"matchLabels": {"app": None}}}, CLIENTS]}]
    daemon.write(network_policy("x/mixed", {**WEB, "ingress": mixed}), file="more.yaml")
    check(one, *ONLY_CLIENTS)
    bits = [
        {"ipBlock": {"cidr": f"{one.address('x/c', family)}/{24 if family == 4 else 64}"}}
        for family in (4, 6)
    ]
    daemon.write(network_policy("x/bits", {**WEB, "ingress": [{"from": bits}]}), file="more.yaml")
    check(one, ("x/b", "x/a", "80/TCP", "."), ("x/c", "x/a", "80/TCP", "."))
    assert any("bits set after its prefix" in each for each in daemon.status()["problems"])


@pytest.mark.parametrize(
    "text",
    [
        "kind: NetworkPolicy\nspec: {podSelector: {\n",
        "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40)),
        '{"kind": "List", "items": [' * 10_000,
        "kind: List\nitems:\n- {kind: NetworkPolicy, kind: Pod}\n",
        "---\n" * 200_000,
    ],
    ids=["yaml", "bomb", "deep", "key-twice", "documents"],
)  # fmt: skip
def test_a_broken_file_keeps_its_network_policies(lab: LabFactory, agent: AgentFactory, text: str) -> None:
    one = lab(["x/a", "x/b", "x/c"])
    daemon = agent(one, network_policy("x/web", {**WEB, "ingress": [{"from": [CLIENTS]}]}), start=False)
    daemon.write_pods(LABELS)
    daemon.start()
    daemon.write_text(text, wait=False)
    (problem,) = until(lambda: daemon.status()["problems"])
    assert problem.endswith("what was read from here before stays in force")
    assert len(problem) < 500
    check(one, *ONLY_CLIENTS)


def test_a_network_policy_in_two_files(lab: LabFactory, agent: AgentFactory) -> None:
    """The last file by name counts, and a broken one there does not open what the other closes."""
    one = lab(["x/a", "x/b", "x/c"])
    good = network_policy("x/web", {**WEB, "ingress": [{"from": [CLIENTS]}]})
    closed = network_policy("x/web", {**WEB, "policyTypes": ["Ingress"]})
    daemon = agent(one, good, start=False)
    daemon.write_pods(LABELS)
    daemon.start()
    daemon.write(closed, file="z.yaml")
    check(one, *NOBODY)
    (problem,) = daemon.status()["problems"]
    assert "NetworkPolicy x/web: is also in" in problem
    assert "z.yaml, which counts" in problem
    daemon.write({**closed, "spec": {"podSelector": "all"}}, file="z.yaml", wait=False)
    until(lambda: any("podSelector" in each for each in daemon.status()["problems"]))
    check(one, *NOBODY)
    daemon.remove("z.yaml")
    check(one, *ONLY_CLIENTS)
    assert daemon.status()["problems"] == []
    # Twice in one file, with different contents: the last counts, as for `kubectl apply`.
    daemon.write(closed, good)
    (problem,) = daemon.status()["problems"]
    assert "is here more than once; the last one counts" in problem
    check(one, *ONLY_CLIENTS)


@pytest.mark.parametrize("what", ["missing", "unreadable", "directory-gone"])
def test_a_source_that_cannot_be_read_at_the_start(lab: LabFactory, what: str, tmp_path: Path) -> None:
    one = lab(["x/a"])
    source = tmp_path / "policies.yaml"
    if what == "unreadable":
        source.symlink_to(source)  # root may read everything but a loop
    elif what == "directory-gone":
        source = tmp_path / "gone" / "deeper"
    argv = ["agent", "--source", str(source), "--control", str(tmp_path / "c.sock")]
    done = one.run("node", "env", f"PYTHONPATH={import_path()}", *PODGATE, *argv, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert str(source) in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "c.sock").exists()
    assert "PODGATE" not in one.run("node", "iptables-save").stdout


def test_edits_take_effect_at_once(lab: LabFactory, agent: AgentFactory) -> None:
    one = lab(["x/a", "x/b"])
    shut = yaml.safe_dump(policy("x", "a", select(one, "x/a"), ingress=[]))
    open_ = yaml.safe_dump(policy("x", "a", select(one, "x/a"), ingress=allow(one, "x/b")))
    daemon = agent(one)
    daemon.write_text(shut)
    target, to = udp(one, "x/a", 9000), (one.address("x/a"), 9000)
    target.setblocking(False)
    took: list[float] = []
    for number in range(20):
        opens = number % 2 == 0
        new = daemon.directory / ".new"
        new.write_text(open_ if opens else shut)
        source = udp(one, "x/b", 6000 + number // 2)  # closed again under the flow that was let in
        began = time.monotonic()
        new.rename(daemon.directory / "policies.yaml")
        # Opened: the first datagram that arrives. Shut: no datagram sent after this moment arrives.
        last = began
        while time.monotonic() < began + 3:
            sent = time.monotonic()
            source.sendto(b"%d" % number, to)
            time.sleep(0.001)
            try:
                while target.recv(64):
                    last = sent
            except BlockingIOError:
                pass
            if (opens and last > began) or (not opens and sent > last + 0.25):
                break
        else:
            raise AssertionError(f"edit {number} takes no effect")
        took.append(last - began)
        source.close()
    took.sort()
    print(f"edit to effect: median {took[10] * 1000:.0f} ms, worst {took[-1] * 1000:.0f} ms")  # noqa: T201
    assert took[-1] < 1.0
