"""Defaults of a NetworkPolicy, as the API server and the API's documentation have them."""

from __future__ import annotations

import pytest

from dataplane.model import (
    EVERYTHING,
    Direction,
    Key,
    LabelSelector,
    NetworkPolicy,
    NetworkPolicyPeer,
    NetworkPolicyPort,
    NetworkPolicyRule,
    PortRange,
)
from dataplane.policy.normalize import NamedPort, NormalRule, PodPeer, normalize

IN, EG = Direction.INGRESS, Direction.EGRESS
ANY = NetworkPolicyRule()


def policy(
    types: set[Direction] | None = None,
    ingress: tuple[NetworkPolicyRule, ...] = (),
    egress: tuple[NetworkPolicyRule, ...] = (),
) -> NetworkPolicy:
    return NetworkPolicy(
        Key("x", "p"), EVERYTHING, None if types is None else frozenset(types), ingress, egress
    )


@pytest.mark.parametrize(
    ("given", "isolates"),
    [
        (policy(), {IN}),
        (policy(set()), {IN}),
        (policy(ingress=(ANY,)), {IN}),
        (policy(egress=(ANY,)), {IN, EG}),
        (policy({EG}), {EG}),
        (policy({EG}, ingress=(ANY,)), {EG}),
        (policy({IN}, egress=(ANY,)), {IN}),
    ],
)
def test_policy_types(given: NetworkPolicy, isolates: set[Direction]) -> None:
    normal = normalize(given)
    assert normal.isolates == isolates
    assert bool(normal.ingress) == (bool(given.ingress) and IN in isolates)
    assert bool(normal.egress) == (bool(given.egress) and EG in isolates)


def one(rule: NetworkPolicyRule) -> NormalRule:
    (normal,) = normalize(policy({IN}, ingress=(rule,))).ingress
    return normal


def test_an_empty_rule_allows_anybody_every_port() -> None:
    assert one(ANY) == NormalRule(None, True, (), ())


def test_ports() -> None:
    rule = one(
        NetworkPolicyRule(
            (),
            (
                NetworkPolicyPort(None, 80),
                NetworkPolicyPort(6, 80),
                NetworkPolicyPort(17, 5, 9),
                NetworkPolicyPort(None, "http"),
                NetworkPolicyPort(132, "http"),
            ),
        )
    )
    assert rule.numbers == (PortRange(6, 80, 80), PortRange(17, 5, 9))
    assert rule.names == (NamedPort("http", 6), NamedPort("http", 132))
    assert not rule.every_port
    # `ports: [{}]` is all of TCP, not everything.
    assert one(NetworkPolicyRule((), (NetworkPolicyPort(),))).numbers == (PortRange(6, 0, 65535),)


def test_peers() -> None:
    red = LabelSelector.of({"team": "red"})
    own = LabelSelector.of({"kubernetes.io/metadata.name": "x"})
    assert one(NetworkPolicyRule((NetworkPolicyPeer(red),))).peers == (PodPeer(own, red),)
    assert one(NetworkPolicyRule((NetworkPolicyPeer(None, red),))).peers == (PodPeer(red, EVERYTHING),)
    assert one(NetworkPolicyRule((NetworkPolicyPeer(red, EVERYTHING),))).peers == (PodPeer(EVERYTHING, red),)


def test_a_rule_of_unusable_peers_is_not_a_rule_for_anybody() -> None:
    assert one(NetworkPolicyRule((NetworkPolicyPeer(),))).peers == ()
