"""What the page of `matrix -o html` leaves out when every pod has policies of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from dataplane.addresses import Prefix
from dataplane.model import (
    Direction,
    IPBlock,
    Key,
    LabelSelector,
    NetworkPolicy,
    NetworkPolicyPeer,
    NetworkPolicyPort,
    NetworkPolicyRule,
    Pod,
    Snapshot,
)
from dataplane.policy.explain import parse_port
from dataplane.policy.matrix import reachability
from dataplane.policy.resolve import in_force
from dataplane.reachability import Reachability
from dataplane.reasons import Reason
from dataplane.report import explanations
from dataplane.report.explanations import NONE, Explanations, Texts

PODS = 9
PORTS = ("80/TCP", "53/UDP")
# Each pod takes 80/TCP from the next one: an answer for that, one for the same pod on 53/UDP.
ALLOWED = NEAR = PODS


def ring(blocks: int = 0) -> Snapshot:
    """Pods in a ring, each with a policy of its own that lets in the next one on one port."""
    pods, policies = [], []
    for number in range(PODS):
        labels = {"app": f"app-{number}"}
        pods.append(
            Pod(
                Key("a", f"pod-{number}"),
                ips=(bytes([10, 0, 0, number + 1]),),
                host_ips=(b"\xc0\x00\x02\x01",),
                labels=labels,
            )
        )
        following = LabelSelector.of({"app": f"app-{(number + 1) % PODS}"})
        peers = [NetworkPolicyPeer(following)]
        peers += [
            NetworkPolicyPeer(None, None, IPBlock(Prefix(bytes([203, 0, 113, each]), 32)))
            for each in range(blocks)
        ]
        policies.append(
            NetworkPolicy(
                Key("a", f"policy-{number}"),
                pod_selector=LabelSelector.of(labels),
                policy_types=frozenset({Direction.INGRESS}),
                ingress=(NetworkPolicyRule(tuple(peers), (NetworkPolicyPort(6, 80),)),),
            )
        )
    return Snapshot(pods=tuple(pods), network_policies=tuple(policies))


def explained(known: Snapshot) -> tuple[Reachability, Explanations]:
    resolved = in_force(known)
    reach = reachability(resolved, [parse_port(port) for port in PORTS])
    numbers = {policy.key: number for number, policy in enumerate(known.network_policies)}
    return reach, explanations.explanations(reach, known, resolved, numbers, Texts())


def answers(reach: Reachability, told: Explanations) -> Iterator[tuple[str, int, int, Reason, int]]:
    """Port, source, destination, what the ingress end says and its answer, where there is one to give."""
    side = told.sides[Direction.INGRESS]
    for port in PORTS:
        for source in range(PODS):
            for destination in range(PODS):
                ends = reach.ends(port, source, destination)
                if ends is not None and source != destination:
                    answer = side.lines[port][side.of[destination]][source]
                    yield port, source, destination, ends[1].reason, answer


@pytest.mark.parametrize("blocks", [0, 100])
def test_what_is_allowed_comes_first_then_the_near_misses(
    monkeypatch: pytest.MonkeyPatch, blocks: int
) -> None:
    monkeypatch.setattr(explanations, "QUESTIONS", ALLOWED + NEAR)
    for port, source, destination, reason, answer in answers(*explained(ring(blocks))):
        following = source == (destination + 1) % PODS
        assert (reason is Reason.POLICY_RULE) is (following and port == "80/TCP")
        assert (answer != NONE) is following


def test_the_rest_is_answered_as_far_as_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explanations, "QUESTIONS", ALLOWED + NEAR + 5)
    reach, told = explained(ring())
    far = [
        answer
        for _, source, destination, _, answer in answers(reach, told)
        if source != (destination + 1) % PODS
    ]
    assert sum(answer != NONE for answer in far) == 5


def test_nothing_is_left_out_of_what_is_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explanations, "QUESTIONS", PODS * (PODS - 1) * len(PORTS))
    assert all(answer != NONE for *_, answer in answers(*explained(ring())))


def test_pods_that_policies_cannot_tell_apart_are_asked_about_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = ring()
    alike = tuple(
        Pod(pod.key, ips=pod.ips, host_ips=pod.host_ips, labels={"app": "app-0"}) for pod in known.pods
    )
    # One kind of pod, and only policy-0 isolates: not from itself, so one answer a port.
    monkeypatch.setattr(explanations, "QUESTIONS", len(PORTS))
    reach, told = explained(Snapshot(pods=alike, network_policies=known.network_policies))
    assert all(answer != NONE for *_, answer in answers(reach, told))


def test_labels_that_no_rule_of_theirs_asked_for_tell_allowed_peers_not_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    everybody = NetworkPolicyRule((NetworkPolicyPeer(LabelSelector()),))
    first = ring().network_policies[0]
    open_ = replace(first, ingress=(*first.ingress, everybody))
    # pod-0 lets in all others: the next one by its first rule on 80/TCP, the rest by its second.
    # On 53/UDP the next one is a question of its own too: a rule that it matches but for the port.
    monkeypatch.setattr(explanations, "QUESTIONS", 4)
    reach, told = explained(replace(ring(), network_policies=(open_,)))
    found = list(answers(reach, told))
    side = told.sides[Direction.INGRESS]
    texts = {
        (port, source): side.lines[port][side.of[0]][source] for port, source, to, _, _ in found if to == 0
    }
    assert NONE not in texts.values()
    assert texts["80/TCP", 1] != texts["80/TCP", 2] == texts["53/UDP", 1]
