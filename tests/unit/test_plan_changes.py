"""Plans one after another: as made from scratch, and what no change concerns is the same object."""

from __future__ import annotations

from typing import NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st

from dataplane.addresses import parse_address, parse_prefix
from dataplane.config import AgentConfig, Mode
from dataplane.model import Direction, Key, Pod, PodEndpoint, PolicyEndpoint, Rule, Snapshot
from dataplane.node.interfaces import HostRoute, Link, LinkState, host_veth_name
from dataplane.plan import ANNOTATION_SPOOF_CHECK, Planner, make_plan

NODE = parse_address("192.0.2.1")
PODS = tuple(Key("x", name) for name in "abc")
IPS = tuple(parse_address(ip) for ip in ("10.0.0.1", "10.0.0.2", "10.0.0.3", "2001:db8::1"))
RULES = tuple(
    Rule(parse_prefix(text)[0], index=index) for index, text in enumerate(("0.0.0.0/0", "10.1.0.0/16"))
)
CONFIGS = (
    AgentConfig((), node_ips=(NODE,)),
    AgentConfig((), node_ips=(NODE,), mode=Mode.STRICT),
    AgentConfig((), node_ips=(NODE,), spoof_check=False),
    AgentConfig((), node_ips=(NODE,), veth_prefix="cali"),
)


class Step(NamedTuple):
    config: AgentConfig
    snapshot: Snapshot
    links: LinkState


@st.composite
def pods(draw: st.DrawFn, key: Key) -> Pod:
    return Pod(
        key,
        host_ips=(NODE,),
        ips=tuple(draw(st.lists(st.sampled_from(IPS), max_size=2, unique=True))),
        created_at=draw(st.sampled_from((None, 1.0, 2.0))),
        strict=draw(st.integers(0, 5)) == 0,
        annotations=draw(st.sampled_from(({}, {}, {ANNOTATION_SPOOF_CHECK: "off"}))),
    )


@st.composite
def slices(draw: st.DrawFn, name: str) -> PolicyEndpoint:
    selected = draw(st.lists(st.tuples(st.sampled_from(PODS), st.sampled_from(IPS)), max_size=2))
    return PolicyEndpoint(
        Key("x", name),
        Key("x", name),
        draw(st.frozensets(st.sampled_from(Direction), min_size=1)),
        tuple(PodEndpoint(pod, address, NODE) for pod, address in selected),
        tuple(rule for rule in RULES if draw(st.booleans())),
    )


@st.composite
def links(draw: st.DrawFn) -> LinkState:
    known = {
        index: Link(index, host_veth_name(draw(st.sampled_from(PODS)), prefix), "veth", group=group)
        for index, prefix, group in draw(
            st.lists(
                st.tuples(st.integers(5, 9), st.sampled_from(("eni", "cali")), st.integers(0, 1)), max_size=4
            )
        )
    }
    known |= {4: Link(4, "veth4", "veth"), 3: Link(3, "eth0")}
    routes = draw(st.frozensets(st.builds(HostRoute, st.sampled_from(IPS), st.sampled_from(sorted(known)))))
    return LinkState(known, host_routes=routes)


@st.composite
def histories(draw: st.DrawFn) -> list[Step]:
    """What did not change from one step to the next is the same object."""
    known: dict[Key, Pod] = {}
    pieces: dict[str, PolicyEndpoint] = {}
    config, state = CONFIGS[0], LinkState()
    made = []
    for _ in range(draw(st.integers(2, 6))):
        match draw(st.sampled_from(("pod", "pod", "slice", "slice", "links", "config", "nothing"))):
            case "pod":
                key = draw(st.sampled_from(PODS))
                known[key] = draw(pods(key))
            case "slice":
                name = draw(st.sampled_from("pq"))
                pieces[name] = draw(slices(name))
            case "links":
                state = draw(links())
            case "config":
                config = draw(st.sampled_from(CONFIGS))
        snapshot = Snapshot(
            tuple(pieces[name] for name in sorted(pieces)), tuple(known[key] for key in sorted(known))
        )
        made.append(Step(config, snapshot, state))
    return made


@settings(max_examples=300, deadline=None)
@given(histories())
def test_every_plan_is_what_a_fresh_look_gives(history: list[Step]) -> None:
    planner = Planner()
    for config, snapshot, state in history:
        plan = planner.plan(config, snapshot, state)
        assert plan == make_plan(config, snapshot, state)
        assert [entry.key for entry in plan.entries] == sorted(plan.placements)


def test_a_change_of_rules_leaves_other_pods_as_they_are() -> None:
    here = [Pod(key, host_ips=(NODE,), ips=(ip,)) for key, ip in zip(PODS, IPS, strict=False)]
    state = LinkState(
        {index: Link(index, host_veth_name(key, "eni"), "veth") for index, key in enumerate(PODS, 5)}
    )
    piece = PolicyEndpoint(
        Key("x", "p"),
        Key("x", "p"),
        frozenset({Direction.INGRESS}),
        (PodEndpoint(PODS[0], IPS[0], NODE),),
        RULES[:1],
    )
    changed = PolicyEndpoint(piece.key, piece.policy, piece.isolates, piece.endpoints, RULES)
    planner = Planner()
    before = planner.plan(CONFIGS[0], Snapshot((piece,), tuple(here)), state)
    after = planner.plan(CONFIGS[0], Snapshot((changed,), tuple(here)), state)
    assert after.placements is before.placements
    assert after.entries[0] != before.entries[0]
    assert all(now is was for now, was in zip(after.entries[1:], before.entries[1:], strict=True))
    assert after.steered == before.steered
