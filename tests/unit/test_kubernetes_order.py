"""However a policy's slices are cut, ordered and repeated: the same rules for the pods of this node."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from dataplane.addresses import parse_address
from dataplane.model import Key
from dataplane.policy.effective import effective_rules
from dataplane.sources.kubernetes_feed import Outlet
from dataplane.sources.kubernetes_slices import Slices
from dataplane.sources.store import Store

Raw = dict[str, Any]
HERE = "10.0.0.1"
NODE_IPS = frozenset((parse_address(HERE),))
PODS = ("a", "b", "c", "far")  # the last runs elsewhere
CIDRS = ("10.8.0.0/16", "10.9.0.0/16", "192.0.2.7/32", "2001:db8::/64")


def entry(pod: str) -> Raw:
    host = "10.0.0.2" if pod == "far" else HERE
    return {"name": pod, "namespace": "x", "podIP": f"10.1.0.{ord(pod[0])}", "hostIP": host}


@st.composite
def arrivals(draw: st.DrawFn) -> tuple[dict[str, tuple[set[str], set[str]]], list[Raw]]:
    """Policies (pods, cidrs) and the events by which they become known: cut into slices, shuffled,
    repeated, preceded by what was true before."""
    policies: dict[str, tuple[set[str], set[str]]] = {}
    last: list[Raw] = []
    earlier: list[Raw] = []
    for policy in draw(st.sets(st.sampled_from(("p", "q")), min_size=1)):
        pods = draw(st.sets(st.sampled_from(PODS)))
        cidrs = draw(st.sets(st.sampled_from(CIDRS)))
        policies[policy] = pods, cidrs
        count = draw(st.integers(1, 4))
        slices: list[tuple[list[str], list[str]]] = [([], []) for _ in range(count)]
        for pod in sorted(pods):
            slices[draw(st.integers(0, count - 1))][0].append(pod)
        for cidr in sorted(cidrs):
            slices[draw(st.integers(0, count - 1))][1].append(cidr)
        for number, (own_pods, own_cidrs) in enumerate(slices):
            last.append(raw(policy, number, own_pods, own_cidrs))
            if draw(st.booleans()):  # what it held before
                old = draw(st.sets(st.sampled_from(PODS)))
                earlier.append(raw(policy, number, sorted(old), ["203.0.113.0/24"]))
    repeated = draw(st.lists(st.sampled_from(last), max_size=4))
    return policies, [*draw(st.permutations(earlier)), *draw(st.permutations([*last, *repeated]))]


def raw(policy: str, number: int, pods: list[str], cidrs: list[str]) -> Raw:
    return {
        "metadata": {"name": f"{policy}-{number}", "namespace": "x"},
        "spec": {
            "policyRef": {"name": policy, "namespace": "x"},
            "podIsolation": ["Ingress"],
            "podSelectorEndpoints": [entry(pod) for pod in pods],
            "ingress": [{"cidr": cidr} for cidr in cidrs],
        },
    }


@given(arrivals())
def test_order_repetition_and_cuts_leave_no_trace(
    case: tuple[dict[str, tuple[set[str], set[str]]], list[Raw]],
) -> None:
    policies, events = case
    store = Store()
    outlet = Outlet(store, "kubernetes")
    slices = Slices(outlet)
    outlet.publish()
    slices.locate([], NODE_IPS)
    for event in events:
        slices.changed(event)
        effective_rules(store.snapshot(), NODE_IPS)  # nothing is remembered of what came on the way
    found = {
        pod.name: None if rules.ingress is None else {str(rule.cidr) for _, rule in rules.ingress.rules}
        for pod, rules in effective_rules(store.snapshot(), NODE_IPS).items()
        if rules.ingress is not None or rules.egress is not None
    }
    expected = {
        pod: {cidr for pods, cidrs in policies.values() if pod in pods for cidr in cidrs}
        for pod in PODS[:-1]
        if any(pod in pods for pods, _ in policies.values())
    }
    assert found == expected
    assert all(Key("x", policy) in slices for policy in policies)
