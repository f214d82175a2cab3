"""Which PolicyEndpoints of a cluster reach the store, whatever the order in which things become known."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from dataplane.addresses import parse_address
from dataplane.model import Key
from dataplane.sources.kubernetes_feed import Outlet
from dataplane.sources.kubernetes_slices import Slices
from dataplane.sources.store import Store

HERE, THERE = "10.0.0.1", "10.0.0.2"
NODE = parse_address(HERE)
Raw = dict[str, Any]


def raw(name: str, policy: str, *pods: tuple[str, str], cidr: str = "10.9.0.0/16", **annotations: str) -> Raw:
    """A slice; `pods` are (name, host)."""
    return {
        "metadata": {
            "name": name,
            "namespace": "x",
            "annotations": annotations,
            "managedFields": [{"much": "noise"}],
        },
        "spec": {
            "policyRef": {"name": policy, "namespace": "x"},
            "podIsolation": ["Ingress"],
            "podSelectorEndpoints": [
                {"name": pod, "namespace": "x", "podIP": f"10.1.0.{ord(pod[0])}", "hostIP": host}
                for pod, host in pods
            ],
            "ingress": [{"cidr": cidr}],
        },
    }


def made(published: bool = True) -> tuple[Store, Slices]:
    store = Store()
    outlet = Outlet(store, "kubernetes")
    slices = Slices(outlet)
    if published:
        outlet.publish()
    slices.locate([], [NODE])
    return store, slices


def names(store: Store) -> list[str]:
    return [endpoint.key.name for endpoint in store.snapshot().policy_endpoints]


def selected(store: Store) -> set[tuple[str, str]]:
    """(slice, pod) of every endpoint in the store."""
    return {
        (endpoint.key.name, each.pod.name)
        for endpoint in store.snapshot().policy_endpoints
        for each in endpoint.endpoints
    }


def test_only_policies_that_select_a_pod_of_this_node_are_kept() -> None:
    store, slices = made()
    slices.changed(raw("here", "p", ("a", HERE), ("b", THERE)))
    slices.changed(raw("rules", "p"))
    slices.changed(raw("there", "q", ("b", THERE)))
    slices.changed(raw("nobody", "r"))
    assert names(store) == ["here", "rules"]
    assert selected(store) == {("here", "a")}  # endpoints elsewhere are left out
    assert len(slices) == 4
    assert Key("x", "q") in slices


def test_a_policy_comes_and_goes_with_its_last_local_pod() -> None:
    store, slices = made()
    slices.changed(raw("rules", "p"))
    assert names(store) == []
    slices.changed(raw("pods", "p", ("a", HERE)))
    assert names(store) == ["pods", "rules"]
    slices.changed(raw("pods", "p", ("a", THERE)))
    assert names(store) == []
    slices.changed(raw("pods", "p", ("a", HERE)))
    slices.gone(raw("pods", "p"))
    assert names(store) == []


def test_a_pod_known_to_be_here_counts_whatever_its_host_in_the_slice() -> None:
    store, slices = made()
    slices.changed(raw("s", "p", ("a", THERE), ("b", THERE)))
    assert names(store) == []
    slices.locate([Key("x", "b")], [NODE])
    assert selected(store) == {("s", "b")}
    slices.locate([Key("x", "a"), Key("x", "b")], [NODE])
    assert selected(store) == {("s", "a"), ("s", "b")}
    slices.locate([], [NODE])
    assert names(store) == []


def test_a_slice_whose_hosts_cannot_be_read_concerns_every_node() -> None:
    store, slices = made()
    slices.changed(raw("s", "p", ("a", "nonsense")))
    assert selected(store) == {("s", "a")}


def test_a_slice_that_moves_to_another_policy() -> None:
    store, slices = made()
    slices.changed(raw("s", "p", ("a", HERE)))
    slices.changed(raw("t", "q", ("b", THERE)))
    slices.changed(raw("s", "q"))
    assert names(store) == []
    slices.changed(raw("s", "q", ("a", HERE)))
    assert names(store) == ["s", "t"]


def test_an_unusable_slice_keeps_its_last_good_version() -> None:
    store, slices = made()
    slices.changed(raw("s", "p", ("a", HERE)))
    slices.changed({"metadata": {"name": "s", "namespace": "x"}, "spec": {"policyRef": 7}})
    snapshot = store.snapshot()
    assert [endpoint.key.name for endpoint in snapshot.policy_endpoints] == ["s"]
    assert [problem.object for problem in snapshot.problems] == ["PolicyEndpoint x/s"]
    slices.locate([Key("x", "z")], [NODE])
    assert names(store) == ["s"]
    slices.changed(raw("s", "p", ("a", HERE), cidr="10.8.0.0/16"))
    assert store.snapshot().problems == ()
    slices.gone(raw("s", "p"))
    assert names(store) == []


def test_bad_rules_are_reported_only_where_they_matter() -> None:
    store, slices = made()
    slices.changed(raw("there", "q", ("b", THERE), cidr="nonsense"))
    assert store.snapshot().problems == ()
    slices.changed(raw("here", "p", ("a", HERE), cidr="nonsense"))
    assert [problem.field for problem in store.snapshot().problems] == ["spec.ingress[0].cidr"]


def test_a_list_takes_the_place_of_everything_in_one_step() -> None:
    store, slices = made()
    slices.changed(raw("old", "p", ("a", HERE)))
    slices.changed(raw("kept", "q", ("b", HERE)))
    before = store.snapshot()
    slices.begin_list()
    slices.listed(raw("kept", "q", ("b", HERE)))
    slices.listed(raw("new", "r", ("c", HERE)))
    slices.listed(raw("withdrawn", "r", ("c", HERE)))
    slices.unlisted(raw("withdrawn", "r"))
    assert store.settled
    assert store.snapshot() == before
    slices.end_list()
    assert names(store) == ["kept", "new"]


def test_deletions_are_not_believed_while_the_kind_itself_is_deleted() -> None:
    store, slices = made()
    slices.changed(raw("s", "p", ("a", HERE)))
    slices.frozen = True
    slices.gone(raw("s", "p"))
    assert names(store) == ["s"]


def test_nothing_reaches_the_store_before_it_is_published() -> None:
    store = Store()
    outlet = Outlet(store, "kubernetes")
    heard: list[float | None] = []
    slices = Slices(outlet, heard.append)
    slices.locate([], [NODE])
    slices.changed(raw("s", "p", ("a", HERE)))
    assert (names(store), heard) == ([], [])
    outlet.publish()
    assert names(store) == ["s"]
    stamp = {"networking.k8s.aws/last-change-trigger-time": "1970-01-01T00:01:40Z"}
    slices.changed(raw("s", "p", ("a", HERE), **stamp))
    slices.changed(raw("there", "q", ("b", THERE), **stamp))
    assert heard == [100.0]


PODS = ["a", "b", "c"]
STEPS = st.lists(
    st.one_of(
        st.tuples(
            st.just("put"),
            st.sampled_from(["s1", "s2", "s3"]),
            st.sampled_from(["p", "q"]),
            st.lists(st.tuples(st.sampled_from(PODS), st.sampled_from([HERE, THERE])), max_size=2),
        ),
        st.tuples(st.just("gone"), st.sampled_from(["s1", "s2", "s3"])),
        st.tuples(st.just("locate"), st.sets(st.sampled_from(PODS))),
        st.tuples(st.just("list")),
    ),
    max_size=20,
)


@given(STEPS)
def test_what_is_kept_depends_on_what_is_there_and_not_on_how_it_came(steps: list[Any]) -> None:
    store, slices = made()
    there: dict[str, tuple[str, list[tuple[str, str]]]] = {}
    local: set[str] = set()
    for step in steps:
        match step:
            case ("put", name, policy, pods):
                there[name] = (policy, pods)
                slices.changed(raw(name, policy, *pods))
            case ("gone", name):
                there.pop(name, None)
                slices.gone(raw(name, "-"))
            case ("locate", pods):
                local = pods
                slices.locate([Key("x", pod) for pod in pods], [NODE])
            case ("list",):
                slices.begin_list()
                for name, (policy, pods) in there.items():
                    slices.listed(raw(name, policy, *pods))
                slices.end_list()
    here = {
        name: {pod for pod, host in pods if host == HERE or pod in local} for name, (_, pods) in there.items()
    }
    policies = {there[name][0] for name, pods in here.items() if pods}
    kept = {name for name, (policy, _) in there.items() if policy in policies}
    assert names(store) == sorted(kept)
    assert selected(store) == {(name, pod) for name in kept for pod in here[name]}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
FIELDS = ("policyRef", "podSelectorEndpoints", "podIsolation", "ingress", "egress")
ENTRIES = st.fixed_dictionaries({}, optional=dict.fromkeys(("name", "namespace", "hostIP", "podIP"), JSON))


@given(
    JSON
    | st.fixed_dictionaries({}, optional=dict.fromkeys(FIELDS, JSON))
    | st.fixed_dictionaries({"policyRef": ENTRIES, "podSelectorEndpoints": st.lists(ENTRIES, max_size=2)}),
    JSON,
)
def test_whatever_a_slice_holds_the_others_stay(spec: Any, metadata: Any) -> None:
    store, slices = made()
    slices.changed(raw("good", "p", ("a", HERE)))
    bad = {"metadata": {"name": "bad", "namespace": "x", "labels": metadata, "annotations": metadata}}
    slices.changed({**bad, "spec": spec})
    slices.begin_list()
    slices.listed(raw("good", "p", ("a", HERE)))
    slices.listed({**bad, "spec": spec})
    slices.end_list()
    slices.locate([Key("x", "a"), Key("x", "b")], [NODE])
    assert "good" in names(store)
    slices.gone({**bad, "spec": spec})
    assert names(store) == ["good"]
