"""The matrix that is computed from policies: every expectation is written from their meaning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from dataplane.addresses import Prefix, parse_address, parse_prefix
from dataplane.cli.matrix import summary
from dataplane.errors import InputError
from dataplane.model import (
    ANNOTATION_MODE,
    EVERYTHING,
    ContainerPort,
    Direction,
    IPBlock,
    Key,
    LabelSelector,
    NetworkPolicy,
    NetworkPolicyPeer,
    NetworkPolicyPort,
    NetworkPolicyRule,
    Pod,
    PodEndpoint,
    PolicyEndpoint,
    PortRange,
    Rule,
    Snapshot,
)
from dataplane.policy.explain import parse_port
from dataplane.policy.matrix import reachability
from dataplane.policy.resolve import in_force
from dataplane.reachability import EndVerdict, Reachability
from dataplane.reasons import Reason

INGRESS, EGRESS, BOTH = frozenset({Direction.INGRESS}), frozenset({Direction.EGRESS}), frozenset(Direction)
OUTSIDE = "203.0.113.9"


def pod(name: str, *ips: str, node: str = "192.0.2.1", port: int = 80, host_network: bool = False) -> Pod:
    key = Key(*name.split("/"))
    return Pod(
        key,
        ips=tuple(map(parse_address, ips)),
        host_ips=(parse_address(node),),
        host_network=host_network,
        labels={"pod": key.name},
        ports=(ContainerPort("http", 6, port),),
    )


A, B = pod("x/a", "10.0.0.1", "fd00::1"), pod("x/b", "10.0.0.2", "fd00::2")
C, D = pod("y/c", "10.0.0.3", "fd00::3", node="192.0.2.2"), pod("y/d", "10.0.0.4", "fd00::4", port=8080)


def policy(
    name: str,
    types: frozenset[Direction],
    *peers: NetworkPolicyPeer,
    selects: str | None = None,
    port: int | str | None = None,
) -> NetworkPolicy:
    """Isolates the pod called `selects`, or all; allows each of `peers` (an empty one: anybody)."""
    ports = (NetworkPolicyPort(None, port),) if port is not None else ()
    rules = tuple(NetworkPolicyRule(() if peer == NetworkPolicyPeer() else (peer,), ports) for peer in peers)
    return NetworkPolicy(
        Key(*name.split("/")),
        LabelSelector.of({"pod": selects}) if selects else EVERYTHING,
        types,
        rules if Direction.INGRESS in types else (),
        rules if Direction.EGRESS in types else (),
    )


ANYBODY = NetworkPolicyPeer()
SAME_NAMESPACE = NetworkPolicyPeer(EVERYTHING)
EVERY_NAMESPACE = NetworkPolicyPeer(namespace_selector=EVERYTHING)


def named(name: str) -> NetworkPolicyPeer:
    return NetworkPolicyPeer(LabelSelector.of({"pod": name}), EVERYTHING)


def block(cidr: str, *excepts: str) -> NetworkPolicyPeer:
    prefixes = [parse_prefix(text)[0] for text in (cidr, *excepts)]
    return NetworkPolicyPeer(ip_block=IPBlock(prefixes[0], tuple(prefixes[1:])))


def reach(
    *policies: NetworkPolicy,
    pods: Sequence[Pod] = (A, B, C, D),
    ports: Sequence[str] = ("80/TCP",),
    externals: Sequence[str] = (),
    family: int | None = None,
) -> Reachability:
    snapshot = Snapshot(
        pods=tuple(sorted(pods, key=lambda each: each.key)),
        network_policies=tuple(sorted(policies, key=lambda each: each.key)),
    )
    return reachability(in_force(snapshot), [parse_port(port) for port in ports], externals, family)


OPEN = ("....",) * 4


@pytest.mark.parametrize(
    ("policies", "expected"),
    [
        ((), OPEN),
        ((policy("x/deny", INGRESS),), (".I..", "I...", "II..", "II..")),
        ((policy("x/deny", EGRESS),), (".EEE", "E.EE", "....", "....")),
        ((policy("x/deny", BOTH),), (".XEE", "X.EE", "II..", "II..")),
        ((policy("x/deny", EGRESS), policy("y/deny", INGRESS)), (".EXX", "E.XX", "...I", "..I.")),
        ((policy("x/own", INGRESS, SAME_NAMESPACE),), ("....", "....", "II..", "II..")),
        ((policy("x/all", INGRESS, EVERY_NAMESPACE),), OPEN),
        ((policy("x/from-c", INGRESS, named("c"), selects="a"),), ("....", "I...", "....", "I...")),
        ((policy("x/to-c", EGRESS, named("c"), selects="a"),), (".E.E", "....", "....", "....")),
        # What one policy denies another allows.
        (
            (policy("x/deny", INGRESS), policy("x/from-c", INGRESS, named("c"))),
            (".I..", "I...", "....", "II.."),
        ),
        # Both ends must allow: a may send to c, which takes from d only.
        (
            (
                policy("x/to-c", EGRESS, named("c"), selects="a"),
                policy("y/c", INGRESS, named("d"), selects="c"),
            ),
            (".EIE", "..I.", "....", "...."),
        ),
        # .2 and .3 are inside the block, .3 inside its except.
        ((policy("x/b", EGRESS, block("10.0.0.2/31", "10.0.0.3/32"), selects="a"),), ("..EE", *OPEN[1:])),
    ],
)
def test_who_reaches_whom(policies: Sequence[NetworkPolicy], expected: tuple[str, ...]) -> None:
    result = reach(*policies)
    assert result.order == ("x/a", "x/b", "y/c", "y/d")
    assert result.marks == {"80/TCP": expected}
    denied = tuple(row.replace("E", "X").replace("I", "X") for row in expected)
    assert result.matrix().cells == {"80/TCP": denied}


def test_each_port_has_its_own_table() -> None:
    # http is 80 on a and b but 8080 on d; c sends nowhere.
    result = reach(
        policy("x/http", INGRESS, ANYBODY, port="http"),
        policy("y/http", INGRESS, ANYBODY, port="http"),
        policy("y/quiet", EGRESS, selects="c"),
        ports=("80/TCP", "8080", "8080/TCP", "80/udp", "icmp"),
    )
    assert result.ports == ("80/TCP", "8080/TCP", "80/UDP", "ICMP")
    assert result.marks["80/TCP"] == ("...I", "...I", "EE.X", "....")
    assert result.marks["8080/TCP"] == (".II.", "I.I.", "XX.E", "III.")
    for port in ("80/UDP", "ICMP"):
        assert result.marks[port] == (".III", "I.II", "XX.X", "III.")


@pytest.mark.parametrize("family", [4, 6])
def test_icmp_passes_only_a_rule_without_ports(family: int) -> None:
    rules = (
        policy("x/a", INGRESS, named("b"), selects="a"),
        policy("x/b", INGRESS, named("a"), selects="b", port=80),
    )
    result = reach(*rules, pods=(A, B), ports=("ICMP",), family=family)
    assert result.marks == {"ICMP": (".I", "..")}


def test_addresses_outside() -> None:
    result = reach(
        policy("x/web", INGRESS, block("203.0.113.0/24"), selects="a"),
        policy("x/quiet", EGRESS, named("c"), selects="b"),
        pods=(A, B, C),
        externals=("198.51.100.7", OUTSIDE, "198.51.100.7"),
    )
    assert result.order == ("x/a", "x/b", "y/c", "198.51.100.7", OUTSIDE)
    assert result.marks["80/TCP"] == (".....", "X..EE", "I....", "I...-", "...-.")
    assert result.ends("80/TCP", 3, 4) is None
    assert result.ends("80/TCP", 3, 3) is None
    assert [(name, list(places)) for name, places in result.namespaces()] == [
        ("x", [0, 1]),
        ("y", [2]),
        (None, [3, 4]),
    ]


def test_traffic_between_a_pod_and_its_own_node_is_never_blocked() -> None:
    agent = pod("y/agent", "192.0.2.2", node="192.0.2.2", host_network=True)
    other = pod("y/other", "192.0.2.1", host_network=True)
    closed = (policy("x/deny", BOTH), policy("y/deny", BOTH))
    result = reach(*closed, pods=(A, C, agent, other), externals=("192.0.2.3",))
    assert result.order == ("x/a", "y/agent", "y/c", "y/other", "192.0.2.3")
    # a is on other's node, c on agent's; policies never select hostNetwork pods.
    assert result.marks["80/TCP"] == (".EX.E", "I....", "X..EE", "..I..", "I.I..")
    own = EndVerdict(Reason.OWN_NODE)
    assert result.ends("80/TCP", 0, 3) == result.ends("80/TCP", 3, 0) == (own, own)
    assert result.ends("80/TCP", 1, 3) == (EndVerdict(Reason.NOT_A_POD),) * 2
    assert [place.host_network for place in result.places] == [False, True, False, True, False]
    assert result.places[1].isolated_by == {}


def test_the_address_of_a_node_is_the_own_node_of_its_pods_only() -> None:
    result = reach(
        policy("x/deny", INGRESS), policy("y/deny", INGRESS), pods=(A, C), externals=("192.0.2.1",)
    )
    assert result.marks["80/TCP"] == (".I.", "I..", ".I.")


def test_a_pod_without_ips_on_its_hosts_network_counts_as_the_node() -> None:
    result = reach(pods=(A, pod("y/agent", host_network=True)), externals=("192.0.2.1",))
    assert result.order == ("x/a", "y/agent", "192.0.2.1")
    assert result.places[1].address == result.places[2].address == parse_address("192.0.2.1")


def test_ends_name_the_policy_and_rule_that_decided() -> None:
    result = reach(
        policy("x/from-c", INGRESS, named("c"), selects="a", port=80),
        policy("x/deny", INGRESS),
        policy("y/deny", EGRESS, selects="d"),
    )
    rule = Rule(Prefix(parse_address("10.0.0.3"), 32), (), (PortRange(6, 80, 80),), 0)
    assert result.ends("80/TCP", 2, 0) == (
        EndVerdict(Reason.NOT_ISOLATED),
        EndVerdict(Reason.POLICY_RULE, Key("x", "from-c"), rule),
    )
    assert result.ends("80/TCP", 3, 0) == (EndVerdict(Reason.NO_RULE), EndVerdict(Reason.NO_RULE))
    assert result.ends("80/TCP", 1, 1) == (EndVerdict(Reason.SAME_POD), EndVerdict(Reason.SAME_POD))
    isolated = {place.name: place.isolated_by for place in result.places}
    deny, from_c = Key("x", "deny"), Key("x", "from-c")
    assert isolated["x/a"] == {Direction.INGRESS: (deny, from_c), Direction.EGRESS: ()}
    assert isolated["x/b"] == {Direction.INGRESS: (deny,), Direction.EGRESS: ()}
    assert isolated["y/d"] == {Direction.INGRESS: (), Direction.EGRESS: (Key("y", "deny"),)}
    assert result.places[0].labels == {"pod": "a"}


def test_pods_that_share_rules_share_lines() -> None:
    pods = [pod(f"x/p{n:02}", f"10.0.0.{n}") for n in range(1, 41)]
    result = reach(policy("x/own", INGRESS, named("p01")), pods=pods)
    ingress, egress = result.ingress["80/TCP"], result.egress["80/TCP"]
    assert (len(ingress.lines), len(egress.lines)) == (1, 1)
    assert ingress.of == egress.of == (0,) * 40
    # Not isolated, the one rule, no rule.
    assert len(result.verdicts) == 3
    assert result.marks["80/TCP"][0] == "." * 40
    assert result.marks["80/TCP"][1] == "I.".ljust(40, "I")


def test_slices_of_one_policy_isolate_together() -> None:
    # One slice holds the pods, the other what isolates them.
    ref, host = Key("x", "p"), parse_address("192.0.2.1")
    one = PolicyEndpoint(Key("x", "p-1"), ref, frozenset(), (PodEndpoint(A.key, A.ips[0], host),))
    two = PolicyEndpoint(Key("x", "p-2"), ref, INGRESS)
    # c is known from a PolicyEndpoint alone.
    three = PolicyEndpoint(Key("y", "q-1"), Key("y", "q"), EGRESS, (PodEndpoint(C.key, C.ips[0], host),))
    result = reachability(Snapshot((one, two, three), (A,)), [parse_port("80")])
    assert result.order == ("x/a", "y/c")
    assert result.marks["80/TCP"] == ("..", "X.")
    assert result.places[0].isolated_by == {Direction.INGRESS: (ref,), Direction.EGRESS: ()}
    assert result.places[1].labels == {}


def test_family_is_that_of_the_first_pods_first_address() -> None:
    six_first = pod("x/a", "fd00::1", "10.0.0.1")
    four_only = pod("x/b", "10.0.0.2")
    result = reach(pods=(six_first, four_only, C))
    assert (result.family, result.order, result.left_out) == (6, ("x/a", "y/c"), (Key("x", "b"),))
    assert reach(pods=(six_first, four_only), family=4).order == ("x/a", "x/b")
    # hostNetwork pods do not choose while there are others.
    node = pod("a/agent", "2001:db8::1", node="2001:db8::1", host_network=True)
    assert reach(pods=(node, A)).family == 4
    assert reach(pods=(node,)).family == 6


def test_pods_that_own_no_address_are_left_out() -> None:
    finished = replace(pod("x/done", "10.0.0.9"), finished=True)
    older = replace(pod("x/older", "10.0.0.8"), created_at=1.0)
    newer = replace(pod("x/newer", "10.0.0.8"), created_at=2.0)
    result = reach(pods=(finished, older, newer, pod("x/pending")))
    assert result.order == ("x/newer",)
    assert result.left_out == (Key("x", "older"), Key("x", "pending"))


@pytest.mark.parametrize(
    ("pods", "externals", "family", "message"),
    [
        ((), (), None, "no pod among these objects.*kubectl get netpol,pods,ns,svc -A -o yaml"),
        ((pod("x/a", "10.0.0.1"),), (), 6, "no pod has an IPv6 address; see --family"),
        ((A,), ("10.0.0",), None, "--external: '10.0.0' is not an IP address"),
        ((A,), ("2001:db8::9",), None, "--external 2001:db8::9: not an IPv4 address; see --family"),
        ((A,), ("10.0.0.1",), None, "--external 10.0.0.1: the address of pod x/a"),
    ],
)
def test_what_cannot_be_answered(
    pods: Sequence[Pod], externals: Sequence[str], family: int | None, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        reach(pods=pods, externals=externals, family=family)


def test_what_only_an_audit_lets_through() -> None:
    audit = {ANNOTATION_MODE: "audit"}
    into_a = replace(policy("x/p", INGRESS, selects="a"), annotations=audit)
    snapshot = in_force(
        Snapshot(pods=(A, B, C), network_policies=(into_a, policy("x/q", EGRESS, selects="b")))
    )
    found = reachability(snapshot, [parse_port("80/TCP")])
    assert found.marks["80/TCP"] == ("...", "E.E", "a..")
    # People's scripts are told what packets do.
    assert found.matrix().cells["80/TCP"] == ("...", "X.X", "...")
    egress, ingress = found.ends("80/TCP", 2, 0) or (None, None)
    assert ingress is not None
    assert egress == EndVerdict(Reason.NOT_ISOLATED)
    assert (ingress.reason, ingress.allow) == (Reason.AUDIT, True)
    assert summary(found.marks["80/TCP"]) == (
        "4 of 6 pairs allowed (1 by an audit only), 2 denied (2 by egress)"
    )
