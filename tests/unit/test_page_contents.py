"""The page of `matrix -o html`, without a browser: what is packed into it, and its colours."""

from __future__ import annotations

import base64
import itertools
import json
import re
import zlib
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dataplane.addresses import Prefix, parse_address
from dataplane.model import (
    ContainerPort,
    Direction,
    IPBlock,
    Key,
    LabelSelector,
    Namespace,
    NetworkPolicy,
    NetworkPolicyPeer,
    NetworkPolicyPort,
    NetworkPolicyRule,
    Pod,
    PodEndpoint,
    PolicyEndpoint,
    Rule,
    Snapshot,
)
from dataplane.policy.explain import parse_port
from dataplane.policy.matrix import reachability
from dataplane.policy.resolve import in_force
from dataplane.policy.why import About, Whys
from dataplane.reasons import Reason
from dataplane.report import explanations
from dataplane.report.page import render
from dataplane.sources.directory import read_paths

ROOT = Path(__file__).parents[2]
CSS = (ROOT / "dataplane/report/assets/page.css").read_text()


class Unpacked:
    """The data of a page, read as its script reads it."""

    def __init__(self, page: str) -> None:
        (packed,) = re.findall(r'<script type="text/plain" id="data">([^<]*)</script>', page)
        plain = zlib.decompress(base64.b64decode(packed, validate=True))
        at = 4 + int.from_bytes(plain[:4], "little")
        self.head: dict[str, Any] = json.loads(plain[4:at])
        self.arrays: dict[str, array[int]] = {}
        for name, kind, count in self.head["arrays"]:
            at += -at % 4
            values = array({"u8": "B", "u16": "H", "u32": "I"}[kind])
            values.frombytes(plain[at : at + count * values.itemsize])
            self.arrays[name] = values
            at += count * values.itemsize
        assert at == len(plain)

    def answer(self, side: str, port: int, source: int, destination: int) -> Any:
        own, other = (source, destination) if side == "egress" else (destination, source)
        of = self.arrays[f"{side}WhyOf{port}"][own]
        return self.head["answers"][
            self.arrays[f"{side}WhyLines{port}"][of * len(self.head["places"]) + other]
        ]

    def told(
        self, side: str, port: int, source: int, destination: int
    ) -> tuple[list[Any], list[str]] | str | None:
        """The answer in words: candidates and how many more, or the place of the rule that allows."""
        answer = self.answer(side, port, source, destination)
        texts, policies = self.head["texts"], self.head["policies"]
        if answer is None:
            return None
        if isinstance(answer, int):
            return str(texts[answer])
        candidates = [self.head["candidates"][number] for number in answer[0]]
        return (
            [
                (policies[policy], texts[place], about, texts[text])
                for policy, place, about, text in candidates
            ],
            [texts[number] for number in answer[1]],
        )


def unpacked(known: Snapshot, ports: Sequence[str], externals: Sequence[str] = ()) -> Unpacked:
    resolved = in_force(known)
    reach = reachability(resolved, [parse_port(port) for port in ports], externals)
    return Unpacked(render(reach, known, resolved, ["dump.yaml"]))


def pod(namespace: str, name: str, address: str, port: int = 0, **labels: str) -> Pod:
    return Pod(
        Key(namespace, name),
        uid=name,
        ips=(parse_address(address),),
        host_ips=(parse_address("192.0.2.1"),),
        labels=labels,
        ports=(ContainerPort("http", 6, port),) if port else (),
    )


def mixed() -> Snapshot:
    """Everything by which policies tell peers apart: labels, namespaces, named ports, blocks, addresses."""
    web = NetworkPolicyPeer(LabelSelector.of({"app": "web"}))
    elsewhere = NetworkPolicyPeer(LabelSelector.of({"app": "web"}), LabelSelector.of({"team": "one"}))
    half = NetworkPolicyPeer(
        None, None, IPBlock(Prefix(parse_address("10.0.0.0"), 29), (Prefix(parse_address("10.0.0.6"), 31),))
    )
    http = (NetworkPolicyPort(6, "http"),)
    policies = (
        NetworkPolicy(
            Key("a", "both"),
            policy_types=frozenset(Direction),
            ingress=(
                NetworkPolicyRule((web, elsewhere), http),
                NetworkPolicyRule((half,), (NetworkPolicyPort(17, 53),)),
            ),
            egress=(
                NetworkPolicyRule((web, elsewhere, half), http),
                NetworkPolicyRule((), (NetworkPolicyPort(17, 53),)),
            ),
        ),
        NetworkPolicy(Key("b", "deny"), policy_types=frozenset({Direction.INGRESS})),
        NetworkPolicy(Key("c", "given"), policy_types=frozenset({Direction.INGRESS})),
    )
    given = PolicyEndpoint(
        Key("c", "given-x"),
        Key("c", "given"),
        frozenset({Direction.INGRESS}),
        (PodEndpoint(Key("c", "web-1"), parse_address("10.0.0.9"), parse_address("192.0.2.1")),),
        ingress=(
            Rule(Prefix(parse_address("10.0.0.1"), 32)),
            Rule(Prefix(parse_address("10.0.0.4"), 30), index=1),
        ),
    )
    pods = (
        pod("a", "web-1", "10.0.0.1", 80, app="web", pod="1"),
        pod("a", "web-2", "10.0.0.2", 8080, app="web", pod="2"),
        pod("a", "db-1", "10.0.0.3", app="db", pod="3"),
        pod("b", "web-1", "10.0.0.4", 80, app="web"),
        pod("b", "web-2", "10.0.0.5", 80, app="web"),
        pod("b", "job-1", "10.0.0.6"),
        pod("b", "job-2", "10.0.0.7"),
        pod("c", "job-1", "10.0.0.8"),
        pod("c", "web-1", "10.0.0.9", 80, app="web"),
        Pod(
            Key("c", "host"),
            ips=(parse_address("192.0.2.7"),),
            host_ips=(parse_address("192.0.2.7"),),
            host_network=True,
        ),
        Pod(
            Key("c", "host-2"),
            ips=(parse_address("192.0.2.7"),),
            host_ips=(parse_address("192.0.2.7"),),
            host_network=True,
            labels={"app": "web"},
        ),
    )
    return Snapshot(
        policy_endpoints=(given,),
        pods=tuple(sorted(pods, key=lambda each: each.key)),
        network_policies=policies,
        namespaces=(Namespace("a"), Namespace("b", {"team": "one"}), Namespace("c", {"team": "one"})),
    )


@pytest.mark.parametrize("which", ["mixed", "shop"])
def test_every_cell_holds_what_its_pods_would_be_told(which: str) -> None:
    """Pods are asked about together; no cell may show another pair's reason."""
    known = mixed() if which == "mixed" else read_paths([ROOT / "docs/shop.yaml"]).snapshot
    ports, externals = ["80/TCP", "8080/TCP", "53/UDP", "ICMP"], ["203.0.113.9", "10.0.0.77"]
    resolved = in_force(known)
    reach = reachability(resolved, [parse_port(port) for port in ports], externals)
    page = Unpacked(render(reach, known, resolved, ["dump.yaml"]))
    whys = Whys(known, resolved)
    abouts = [About.RULE, About.PEER, About.ADDRESS, About.OWN]
    seen = set()
    for number, text in enumerate(ports):
        port = parse_port(text)
        protocol = 1 if port.protocol is None else port.protocol
        for source, sender in enumerate(reach.places):
            for destination, receiver in enumerate(reach.places):
                ends = reach.ends(text, source, destination)
                if ends is None or source == destination:
                    continue
                for side, own, other, end in (
                    ("egress", sender, receiver, ends[0]),
                    ("ingress", receiver, sender, ends[1]),
                ):
                    found = page.told(side, number, source, destination)
                    seen.add((side, end.reason))
                    packet = (Direction(side), other.address, protocol, port.number)
                    if end.reason is Reason.POLICY_RULE:
                        assert own.pod is not None
                        assert end.policy is not None
                        assert end.rule is not None
                        expected = whys.allowed(own.pod, *packet, end.policy, end.rule.index)
                        assert found == expected.field
                    elif end.reason is Reason.NO_RULE:
                        assert own.pod is not None
                        why = whys.denied(own.pod, *packet)
                        told = [
                            (str(c.policy), c.field, abouts.index(c.about), c.text) for c in why.candidates
                        ]
                        assert found == (told, [each.sentence for each in why.more])
                    else:
                        assert found is None
    sides = {"egress", "ingress"}
    assert {(side, reason) for side in sides for reason in (Reason.POLICY_RULE, Reason.NO_RULE)} <= seen


def test_what_is_too_much_is_left_out_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    known = mixed()
    whole = unpacked(known, ["80/TCP"])
    monkeypatch.setattr(explanations, "QUESTIONS", 10)
    cut = unpacked(known, ["80/TCP"])
    size = len(cut.head["places"])
    pairs = [
        (side, a, b) for side in ("egress", "ingress") for a, b in itertools.product(range(size), repeat=2)
    ]
    both = [(whole.told(side, 0, a, b), cut.told(side, 0, a, b)) for side, a, b in pairs]
    assert any(one is not None and other is None for one, other in both)
    assert any(other is not None for _, other in both)
    assert all(other is None or one == other for one, other in both)
    assert cut.arrays["marks0"] == whole.arrays["marks0"]
    assert cut.arrays["ingressLines0"] == whole.arrays["ingressLines0"]


def test_the_counts_leave_out_the_diagonal_and_what_is_not_judged() -> None:
    pods = (pod("a", "one", "10.0.0.1"), pod("a", "two", "10.0.0.2"))
    closed = NetworkPolicy(Key("a", "closed"), policy_types=frozenset({Direction.INGRESS}))
    page = unpacked(
        Snapshot(pods=pods, network_policies=(closed,)), ["80/TCP"], ["203.0.113.1", "203.0.113.2"]
    )
    # Allowed: each pod to each address outside. Denied: the pods with each other, and from outside.
    assert page.head["counts"] == [[4, 6]]
    assert list(page.arrays["marks0"][:4]) == [4, 2, 0, 0]
    assert list(page.arrays["marks0"][8:12]) == [2, 2, 4, 5]


def test_what_cannot_be_seen_is_written_out() -> None:
    pods = (pod("a", "x\u202egnp.exe\n\x1b[31m", "10.0.0.1"),)
    page = unpacked(Snapshot(pods=pods), ["80/TCP"])
    assert page.head["places"][0]["n"] == r"x\u202egnp.exe\u000a\u001b[31m"


def test_the_command_survives_a_shell() -> None:
    known = Snapshot(pods=(pod("a", "one", "10.0.0.1"),))
    resolved = in_force(known)
    reach = reachability(resolved, [parse_port("80/TCP")])
    page = Unpacked(render(reach, known, resolved, ["my dump.yaml", "-o.yaml", "$(id)"]))
    assert page.head["command"] == "podgate explain 'my dump.yaml' ./-o.yaml '$(id)'"


# --- colours -----------------------------------------------------------------------------------------

# Machado, Oliveira, Fernandes (2009): what the colour-blind see, severity 1, on linear RGB.
VISION = {
    "usual": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": (
        (0.152286, 1.052583, -0.204868),
        (0.114503, 0.786281, 0.099216),
        (-0.003882, -0.048116, 1.051998),
    ),
    "deuteranopia": (
        (0.367322, 0.860646, -0.227968),
        (0.280085, 0.672501, 0.047413),
        (-0.011820, 0.042940, 0.968881),
    ),
    "tritanopia": (
        (1.255528, -0.076749, -0.178779),
        (-0.078411, 0.930809, 0.147602),
        (0.004733, 0.691367, 0.303900),
    ),
}
STATES = ("allowed", "partly", "egress", "ingress", "both", "self", "unjudged")


def lab(colour: str, vision: str) -> tuple[float, float, float]:
    """CIE L*a*b* of `#rrggbb` as somebody sees it."""
    linear = []
    for at in (1, 3, 5):
        value = int(colour[at : at + 2], 16) / 255
        linear.append(value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4)
    red, green, blue = (
        max(0.0, min(1.0, sum(a * b for a, b in zip(row, linear, strict=True)))) for row in VISION[vision]
    )
    x = (0.4124564 * red + 0.3575761 * green + 0.1804375 * blue) / 0.95047
    y = 0.2126729 * red + 0.7151522 * green + 0.0721750 * blue
    z = (0.0193339 * red + 0.1191920 * green + 0.9503041 * blue) / 1.08883
    x, y, z = (t ** (1 / 3) if t > 216 / 24389 else (24389 / 27 * t + 16) / 116 for t in (x, y, z))
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("vision", VISION)
def test_the_colour_blind_can_tell_the_states_apart(vision: str, scheme: str) -> None:
    light, _, dark = CSS.partition("@media (prefers-color-scheme: dark)")
    colours = dict(re.findall(r"--([a-z]+): (#[0-9a-f]{6})", light if scheme == "light" else dark))
    seen = {state: lab(colours[state], vision) for state in STATES}
    for one, other in itertools.combinations(STATES, 2):
        distance = sum((a - b) ** 2 for a, b in zip(seen[one], seen[other], strict=True)) ** 0.5
        assert distance > 20, f"{one} and {other} look alike: {distance:.0f}"
