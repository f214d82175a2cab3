"""From PolicyEndpoints to rules per pod: joining slices, uniting policies, owning addresses."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import permutations

import pytest

from dataplane.addresses import parse_address as address
from dataplane.addresses import parse_prefix
from dataplane.model import (
    ANNOTATION_MODE,
    Direction,
    Key,
    Namespace,
    NetworkPolicy,
    Pod,
    PodEndpoint,
    PolicyEndpoint,
    PolicyHead,
    Rule,
    Snapshot,
)
from dataplane.policy.effective import PodRules, changed_pods, effective_rules

NODE, OTHER_NODE = "192.0.2.1", "192.0.2.2"
HERE = frozenset({address(NODE)})
INGRESS, EGRESS = Direction.INGRESS, Direction.EGRESS
A, B, C = Key("x", "a"), Key("x", "b"), Key("x", "c")


def endpoint(pod: Key, ip: str, host: str = NODE) -> PodEndpoint:
    return PodEndpoint(pod, address(ip) if ip else b"", address(host) if host else b"")


def cidrs(*texts: str) -> tuple[Rule, ...]:
    return tuple(Rule(parse_prefix(text)[0], index=index) for index, text in enumerate(texts))


def piece(
    name: str,
    policy: str = "p",
    *endpoints: PodEndpoint,
    isolates: Iterable[Direction] = (INGRESS,),
    ingress: tuple[Rule, ...] = (),
    egress: tuple[Rule, ...] = (),
    group: str | None = None,
    changed_at: float | None = None,
) -> PolicyEndpoint:
    return PolicyEndpoint(
        Key("x", name), Key("x", policy), frozenset(isolates), endpoints, ingress, egress, group, changed_at
    )


def live(
    key: Key,
    *ips: str,
    host: str = NODE,
    created_at: float | None = None,
    finished: bool = False,
    host_network: bool = False,
) -> Pod:
    return Pod(
        key,
        host_ips=(address(host),) if host else (),
        ips=tuple(address(ip) for ip in ips),
        created_at=created_at,
        finished=finished,
        host_network=host_network,
    )


def snapshot(*objects: PolicyEndpoint | Pod) -> Snapshot:
    return Snapshot(
        tuple(sorted((o for o in objects if isinstance(o, PolicyEndpoint)), key=lambda o: o.key)),
        tuple(sorted((o for o in objects if isinstance(o, Pod)), key=lambda o: o.key)),
    )


def allowed(rules: object) -> list[tuple[str, int, str]]:
    """(policy, index, cidr) of each rule."""
    assert hasattr(rules, "rules")
    return [(policy.name, rule.index, str(rule.cidr)) for policy, rule in rules.rules]


def test_rules_and_pods_in_different_slices_belong_together() -> None:
    result = effective_rules(
        snapshot(
            piece("p-1", "p", endpoint(A, "10.0.0.1")),
            piece(
                "p-2", "p", endpoint(B, "10.0.0.2"), isolates=(), ingress=cidrs("10.1.0.0/16", "10.2.0.0/16")
            ),
            piece("p-3", "p", isolates=(), ingress=cidrs("10.3.0.0/16")),
        ),
        HERE,
    )
    expected = [("p", 0, "10.1.0.0/16"), ("p", 1, "10.2.0.0/16"), ("p", 2, "10.3.0.0/16")]
    assert allowed(result[A].ingress) == allowed(result[B].ingress) == expected
    assert result[A].ingress is result[B].ingress
    assert result[A].egress is None
    assert result[A].addresses == (address("10.0.0.1"),)


def test_slices_of_equal_name_prefix_but_other_policy_stay_apart() -> None:
    result = effective_rules(
        snapshot(
            piece("p-1", "p", endpoint(A, "10.0.0.1")),
            piece("p-2", "q", isolates=(INGRESS,), ingress=cidrs("10.1.0.0/16")),
        ),
        HERE,
    )
    assert allowed(result[A].ingress) == []
    assert set(result) == {A}


def test_port_groups_are_joined_each_by_itself() -> None:
    result = effective_rules(
        snapshot(
            piece("p-1", "p", endpoint(A, "10.0.0.1"), group="g1", ingress=cidrs("10.1.0.0/16")),
            piece("p-2", "p", endpoint(B, "10.0.0.2"), group="g2", ingress=cidrs("10.2.0.0/16")),
            piece("p-3", "p", group="g2", ingress=cidrs("10.3.0.0/16")),
        ),
        HERE,
    )
    assert allowed(result[A].ingress) == [("p", 0, "10.1.0.0/16")]
    assert allowed(result[B].ingress) == [("p", 0, "10.2.0.0/16"), ("p", 1, "10.3.0.0/16")]


def test_policies_are_united() -> None:
    result = effective_rules(
        snapshot(
            piece("q-1", "q", endpoint(A, "10.0.0.1"), ingress=cidrs("10.2.0.0/16")),
            piece("p-1", "p", endpoint(A, "10.0.0.1"), ingress=cidrs("10.1.0.0/16")),
            piece("r-1", "r", endpoint(A, "10.0.0.1"), isolates=(EGRESS,)),
        ),
        HERE,
    )
    assert allowed(result[A].ingress) == [("p", 0, "10.1.0.0/16"), ("q", 0, "10.2.0.0/16")]
    assert allowed(result[A].egress) == []


def test_rules_of_a_direction_their_policy_does_not_isolate_open_nothing() -> None:
    result = effective_rules(
        snapshot(
            piece("p-1", "p", endpoint(A, "10.0.0.1"), isolates=(INGRESS,), egress=cidrs("0.0.0.0/0")),
            piece("q-1", "q", endpoint(A, "10.0.0.1"), isolates=(EGRESS,)),
        ),
        HERE,
    )
    assert allowed(result[A].egress) == []


def test_no_isolation_leaves_a_pod_open() -> None:
    result = effective_rules(snapshot(piece("p-1", "p", endpoint(A, "10.0.0.1"), isolates=())), HERE)
    assert result[A].ingress is None
    assert result[A].egress is None


def test_equal_rules_of_different_pods_are_one_object() -> None:
    # a and b are selected by different sets of policies that come to the same for ingress.
    result = effective_rules(
        snapshot(
            piece("p-1", "p", endpoint(A, "10.0.0.1"), endpoint(B, "10.0.0.2"), ingress=cidrs("10.1.0.0/16")),
            piece("q-1", "q", endpoint(B, "10.0.0.2"), isolates=(EGRESS,)),
        ),
        HERE,
    )
    assert result[A].ingress is result[B].ingress
    assert result[A].egress is not result[B].egress


def test_only_pods_of_this_node() -> None:
    objects = snapshot(
        piece("p-1", "p", endpoint(A, "10.0.0.1"), endpoint(B, "10.0.0.2", OTHER_NODE)),
    )
    assert set(effective_rules(objects, HERE)) == {A}
    assert set(effective_rules(objects, frozenset())) == set()
    assert set(effective_rules(objects, None)) == {A, B}


def test_a_pod_object_knows_better_where_it_runs() -> None:
    objects = snapshot(
        piece("p-1", "p", endpoint(A, "10.0.0.1", OTHER_NODE), endpoint(B, "10.0.0.2", NODE)),
        live(A, "10.0.0.1", host=NODE),
        live(B, "10.0.0.2", host=OTHER_NODE),
    )
    assert set(effective_rules(objects, HERE)) == {A}


def test_an_unreadable_host_ip_frees_no_pod() -> None:
    assert set(effective_rules(snapshot(piece("p-1", "p", endpoint(A, "10.0.0.1", ""))), HERE)) == {A}


@pytest.mark.parametrize(
    "entry", [endpoint(A, NODE, NODE), endpoint(A, "192.0.2.200", NODE)], ids=["hostIP", "other family"]
)
def test_host_network_entries_are_skipped(entry: PodEndpoint) -> None:
    here = HERE | {address("192.0.2.200")}
    assert effective_rules(snapshot(piece("p-1", "p", entry)), here) == {}


def test_host_network_pod_is_never_a_subject() -> None:
    objects = snapshot(piece("p-1", "p", endpoint(A, "10.0.0.1")), live(A, NODE, host_network=True))
    assert effective_rules(objects, HERE) == {}


def test_finished_pod_is_gone_and_its_address_free() -> None:
    objects = snapshot(
        piece("p-1", "p", endpoint(A, "10.0.0.1"), endpoint(B, "10.0.0.1")),
        live(A, "10.0.0.1", finished=True, created_at=9.0),
        live(B, "10.0.0.1", created_at=1.0),
    )
    result = effective_rules(objects, HERE)
    assert set(result) == {B}
    assert result[B].addresses == (address("10.0.0.1"),)


def test_both_families_come_from_the_pod_object() -> None:
    objects = snapshot(piece("p-1", "p", endpoint(A, "10.0.0.1")), live(A, "2001:db8::1", "10.0.0.1"))
    assert effective_rules(objects, HERE)[A].addresses == (address("10.0.0.1"), address("2001:db8::1"))


def test_addresses_are_gathered_over_slices() -> None:
    objects = snapshot(
        piece("p-1", "p", endpoint(A, "10.0.0.1")), piece("q-1", "q", endpoint(A, "2001:db8::1"))
    )
    assert effective_rules(objects, HERE)[A].addresses == (address("10.0.0.1"), address("2001:db8::1"))


def test_stale_address_of_a_recreated_pod_is_not_its_own() -> None:
    objects = snapshot(piece("p-1", "p", endpoint(A, "10.0.0.1")), live(A, "10.0.0.7"))
    assert effective_rules(objects, HERE)[A].addresses == (address("10.0.0.7"),)


def test_a_reused_address_belongs_to_the_newest_live_pod() -> None:
    objects = snapshot(
        piece("p-1", "p", endpoint(A, "10.0.0.1")),
        piece("q-1", "q", endpoint(B, "10.0.0.1"), isolates=(EGRESS,)),
        live(A, "10.0.0.1", created_at=1.0),
        live(B, "10.0.0.1", created_at=2.0),
    )
    result = effective_rules(objects, HERE)
    assert result[A].addresses == ()
    assert result[B].addresses == (address("10.0.0.1"),)
    assert result[B].ingress is None


def test_a_reused_address_leaves_the_pod_that_only_a_policy_endpoint_remembers() -> None:
    objects = snapshot(piece("p-1", "p", endpoint(A, "10.0.0.1"), changed_at=99.0), live(B, "10.0.0.1"))
    result = effective_rules(objects, HERE)
    assert result[A].addresses == ()
    assert result[B].addresses == (address("10.0.0.1"),)


def test_without_pod_objects_the_later_change_has_the_address() -> None:
    def owner(first: float, second: float) -> list[Key]:
        objects = snapshot(
            piece("p-1", "p", endpoint(A, "10.0.0.1"), changed_at=first),
            piece("q-1", "q", endpoint(B, "10.0.0.1"), changed_at=second),
        )
        return [pod for pod, rules in effective_rules(objects, HERE).items() if rules.addresses]

    assert owner(1.0, 2.0) == [B]
    assert owner(2.0, 1.0) == [A]
    assert owner(1.0, 1.0) == [B]  # the same whatever the order


def test_order_of_slices_in_the_snapshot_does_not_matter() -> None:
    pieces = [
        piece("p-2", "p", endpoint(A, "10.0.0.1"), ingress=cidrs("10.2.0.0/16")),
        piece("p-1", "p", ingress=cidrs("10.1.0.0/16", "10.9.0.0/16")),
        piece("q-1", "q", endpoint(A, "10.0.0.1"), ingress=cidrs("10.3.0.0/16")),
    ]
    results = [effective_rules(Snapshot(order), HERE) for order in permutations(pieces)]
    assert all(result == results[0] for result in results)
    assert [index for _, index, _ in allowed(results[0][A].ingress)] == [0, 1, 2, 0]


def test_pods_that_no_policy_selects_are_known_by_their_objects() -> None:
    objects = snapshot(
        piece("p-1", "p", endpoint(A, "10.0.0.1")),
        live(A, "10.0.0.1"),
        live(B, "10.0.0.2", "2001:db8::2"),
        live(C, "10.0.0.3", host=OTHER_NODE),
        live(Key("x", "d"), "10.0.0.4", finished=True),
        live(Key("x", "e"), NODE, host_network=True),
    )
    result = effective_rules(objects, HERE)
    ips = (address("10.0.0.2"), address("2001:db8::2"))
    assert result[B] == PodRules(B, ips, None, None, live(B, "10.0.0.2", "2001:db8::2"))
    assert [(pod, rules.isolated) for pod, rules in result.items()] == [(A, True), (B, False)]
    assert list(effective_rules(objects, None)) == [A, B, C]


def test_changed_pods() -> None:
    def result(*texts: str, ip: str = "10.0.0.1") -> dict[Key, object]:
        objects = snapshot(
            piece("p-1", "p", endpoint(A, ip), ingress=cidrs(*texts)),
            piece("q-1", "q", endpoint(B, "10.0.0.2")),
        )
        return dict(effective_rules(objects, HERE))

    before = effective_rules(snapshot(), HERE)
    one = result("10.1.0.0/16")
    assert changed_pods(before, one) == {A, B}  # type: ignore[arg-type]
    assert changed_pods(one, result("10.1.0.0/16")) == set()  # type: ignore[arg-type]
    assert changed_pods(one, result("10.2.0.0/16")) == {A}  # type: ignore[arg-type]
    assert changed_pods(one, result("10.1.0.0/16", ip="10.0.0.9")) == {A}  # type: ignore[arg-type]
    assert changed_pods(one, before) == {A, B}  # type: ignore[arg-type]


AUDIT, ENFORCE = {ANNOTATION_MODE: "audit"}, {ANNOTATION_MODE: "enforce"}


def test_a_direction_is_in_audit_while_all_policies_that_isolate_it_are() -> None:
    both = (INGRESS, EGRESS)
    objects = snapshot(
        piece("p-1", "p", endpoint(A, "10.0.0.1"), endpoint(B, "10.0.0.2"), isolates=both),
        piece("q-1", "q", endpoint(B, "10.0.0.2"), isolates=(EGRESS,), egress=cidrs("10.1.0.0/16")),
    )
    head = replace(objects, policy_heads=(PolicyHead(Key("x", "p"), AUDIT),))
    result = effective_rules(head, HERE)
    assert result[A].audit == {INGRESS, EGRESS}
    assert result[B].audit == {INGRESS}
    # What q allows counts as ever, and so does what p would.
    assert allowed(result[B].egress) == [("q", 0, "10.1.0.0/16")]
    assert (result[B].ingress_policies, result[B].egress_policies) == (
        (Key("x", "p"),),
        (Key("x", "p"), Key("x", "q")),
    )
    whole = replace(objects, network_policies=(NetworkPolicy(Key("x", "p"), annotations=AUDIT),))
    assert effective_rules(whole, HERE) == result
    assert changed_pods(effective_rules(objects, HERE), result) == {A, B}


def test_a_policy_has_its_own_word_before_its_namespaces() -> None:
    objects = snapshot(piece("p-1", "p", endpoint(A, "10.0.0.1")), piece("q-1", "q", endpoint(B, "10.0.0.2")))
    spaced = replace(objects, namespaces=(Namespace("x", {}, AUDIT), Namespace("y", {}, AUDIT)))
    assert [pod.audit for pod in effective_rules(spaced, HERE).values()] == [{INGRESS}, {INGRESS}]
    enforced = replace(spaced, policy_heads=(PolicyHead(Key("x", "p"), ENFORCE),))
    assert [pod.audit for pod in effective_rules(enforced, HERE).values()] == [frozenset(), {INGRESS}]
    elsewhere = replace(objects, namespaces=(Namespace("y", {}, AUDIT),))
    assert [pod.audit for pod in effective_rules(elsewhere, HERE).values()] == [frozenset()] * 2
