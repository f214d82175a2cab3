"""The controller's objects, its view of those that are there, and its list of what to do."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataplane.addresses import Prefix, parse_address, parse_prefix
from dataplane.controller import objects
from dataplane.controller.inventory import Inventory
from dataplane.controller.slices import Contents, Found, Head, Slice
from dataplane.controller.worklist import LAST_RETRY, Worklist
from dataplane.model import (
    Direction,
    Key,
    LabelSelector,
    NetworkPolicy,
    Pod,
    PodEndpoint,
    PortRange,
    Snapshot,
)
from dataplane.policy.resolve import Entry, Resolver
from dataplane.sources.objects import parse_time

Raw = dict[str, Any]
WEB = Key("x", "web")
HEAD = Head(WEB, "uid-1", '{"matchLabels": {"app": "web"}}', frozenset(Direction))


def prefix(text: str) -> Prefix:
    return parse_prefix(text)[0]


def entry(cidr: str, *ports: int, excepts: tuple[str, ...] = ()) -> Entry:
    return prefix(cidr), tuple(map(prefix, excepts)), tuple(PortRange(6, p, p) for p in ports)


def endpoint(name: str, address: str, host: str = "10.0.0.1") -> PodEndpoint:
    return PodEndpoint(Key("x", name), parse_address(address), parse_address(host) if host else b"")


CONTENTS = Contents(
    (endpoint("a", "10.1.0.1"), endpoint("a", "fd00::1", "fd00::ff"), endpoint("b", "10.1.0.2", "")),
    (entry("10.2.0.0/16", 80, excepts=("10.2.3.0/24",)), entry("fd00::2/128")),
    (entry("0.0.0.0/0"), (prefix("::/0"), (), (PortRange(17, 0, 65535), PortRange(132, 5, 9)))),
)


def kept(made: Raw, name: str = "web-1", version: int = 1) -> Raw:
    """An object as the API server would have it."""
    raw: Raw = json.loads(json.dumps(made))
    raw["metadata"] |= {"name": name, "uid": f"uid-{name}", "resourceVersion": str(version)}
    return raw


def patched(raw: Raw, changes: list[Raw]) -> Raw:
    made: Raw = json.loads(json.dumps(raw))
    for change in changes:
        *path, last = change["path"].split("/")[1:]
        target = made
        for part in path:
            target = target[part]
        target[last] = change["value"]
    return made


# --- objects ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [None, "g-0123"])
def test_what_is_written_is_read_as_it_was(group: str | None) -> None:
    part = Slice(HEAD, group, CONTENTS)
    raw = kept(objects.body(part, "2026-01-31T12:00:00.5Z"))
    assert objects.is_ours(raw)
    assert objects.read(raw) == Found("web-1", "uid-web-1", "1", part, clean=True)
    assert raw["metadata"]["generateName"] == "web-"
    assert raw["metadata"]["ownerReferences"] == [
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "name": "web",
            "uid": "uid-1",
            "controller": True,
            "blockOwnerDeletion": True,
        }
    ]
    # The definition requires all four.
    assert {frozenset(one) for one in raw["spec"]["podSelectorEndpoints"]} == {
        frozenset(("hostIP", "podIP", "name", "namespace"))
    }


@pytest.mark.parametrize(
    "meddle",
    [
        lambda raw: raw["spec"]["ingress"][0].pop("except"),
        lambda raw: raw["spec"]["ingress"].append({"cidr": "10.9.0.0/16"}),
        lambda raw: raw["spec"]["egress"].append({"domainName": "example.com"}),
        lambda raw: raw["spec"]["podSelectorEndpoints"].clear(),
        lambda raw: raw["spec"].update(podIsolation=["Ingress"]),
        lambda raw: raw["spec"].update(podSelector={}),
        lambda raw: raw["spec"].update(somethingNew=1),
        lambda raw: raw["spec"]["ingress"][0].update(somethingNew=1),
        lambda raw: raw["metadata"]["ownerReferences"].clear(),
        lambda raw: raw["metadata"].pop("ownerReferences"),
        lambda raw: raw["metadata"]["ownerReferences"][0].update(uid="uid-2"),
        lambda raw: raw["spec"].update(policyRef={"name": "other", "namespace": "x"}),
        lambda raw: raw["spec"].update(policyRef={"name": "web", "namespace": "y"}),
        lambda raw: raw.update(spec="nothing"),
    ],
)
def test_whatever_somebody_changes_shows(meddle: Callable[[Raw], object]) -> None:
    part = Slice(HEAD, None, CONTENTS)
    raw = kept(objects.body(part, "-"))
    meddle(raw)
    found = objects.read(raw)
    assert not found.clean or found.slice != part


def test_a_patch_makes_it_what_it_is_to_be_and_leaves_others_labels() -> None:
    raw = kept(objects.body(Slice(HEAD, None, CONTENTS), "then"))
    raw["metadata"]["labels"]["team"] = "blue"
    after = Slice(HEAD._replace(selector="{}", uid="uid-2"), None, Contents(CONTENTS.endpoints[:1]))
    changes = objects.patch(objects.read(raw), after, "now")
    assert {"op": "add", "path": "/metadata/resourceVersion", "value": "1"} in changes
    made = patched(raw, changes)
    assert objects.read(made).slice == after
    assert objects.read(made).clean
    assert made["metadata"]["labels"]["team"] == "blue"
    assert made["metadata"]["annotations"] == {"networking.k8s.aws/last-change-trigger-time": "now"}


@pytest.mark.parametrize(("labels", "ours"), [(None, False), ([], False), ({"app": "x"}, False)])
def test_without_our_label_an_object_is_not_ours(labels: object, ours: bool) -> None:
    assert objects.is_ours({"metadata": {"labels": labels}}) is ours


def test_pods_without_an_address_of_their_own_are_not_named() -> None:
    policy = NetworkPolicy(WEB, uid="uid-1", pod_selector=LabelSelector.of({"app": "web"}))
    old, new = (
        Pod(Key("x", name), ips=(parse_address("10.1.0.1"),), labels={"app": "web"}, created_at=float(age))
        for age, name in enumerate(("old", "new"))
    )
    resolver = Resolver()
    resolver.update(Snapshot(pods=(new, old), network_policies=(policy,)))
    desired = objects.desired(policy, resolver.made[WEB])
    assert [one.pod.name for one in desired.groups[None].endpoints] == ["new"]
    assert desired.head == Head(WEB, "uid-1", HEAD.selector, frozenset({Direction.INGRESS}))


@given(st.floats(0, 4e9))
def test_the_trigger_time_is_what_agents_read(since: float) -> None:
    assert parse_time(objects.trigger_time(since)) == pytest.approx(since, abs=1e-6)


# --- the inventory --------------------------------------------------------------------------------------


class Seen:
    """An inventory, and what it has told."""

    def __init__(self) -> None:
        self.policies: list[Key] = []
        self.foreign = 0
        self.inventory = Inventory(self.policies.append, self._foreign)

    def _foreign(self) -> None:
        self.foreign += 1

    def list(self, *found: Raw) -> None:
        self.inventory.begin_list()
        for raw in found:
            self.inventory.listed(raw)
        self.inventory.end_list()

    def names(self, policy: Key = WEB) -> list[str]:
        return sorted(one.name for one in self.inventory.of(policy))


def ours(name: str, version: int = 1, policy: str = "web") -> Raw:
    head = HEAD._replace(policy=Key("x", policy))
    return kept(objects.body(Slice(head, None, CONTENTS), "-"), name, version)


def foreign(name: str) -> Raw:
    raw = ours(name)
    del raw["metadata"]["labels"]
    return raw


def test_our_own_writes_echo_is_no_news() -> None:
    seen = Seen()
    seen.list()
    seen.inventory.wrote("x", objects.read(ours("web-1", 5)))
    seen.inventory.changed(ours("web-1", 5))
    seen.inventory.changed(ours("web-1", 4))  # an earlier one, late
    assert (seen.policies, seen.names()) == ([], ["web-1"])
    seen.inventory.changed(ours("web-1", 6))
    assert seen.policies == [WEB]


def test_an_object_that_moves_to_another_policy_concerns_both() -> None:
    seen = Seen()
    seen.list(ours("web-1"))
    seen.policies.clear()
    seen.inventory.changed(ours("web-1", 2, "other"))
    assert sorted(seen.policies) == [Key("x", "other"), WEB]
    assert (seen.names(), seen.names(Key("x", "other"))) == ([], ["web-1"])


def test_what_a_list_no_longer_has_is_gone_unless_it_was_written_meanwhile() -> None:
    seen = Seen()
    seen.list(ours("web-1"), ours("web-2"))
    seen.policies.clear()
    seen.inventory.begin_list()
    seen.inventory.wrote("x", objects.read(ours("web-3", 9)))
    seen.inventory.wrote("x", objects.read(ours("web-2", 9)))
    seen.inventory.listed(ours("web-2"))
    seen.inventory.end_list()
    assert seen.names() == ["web-2", "web-3"]
    assert {one.version for one in seen.inventory.of(WEB)} == {"9"}
    assert seen.policies == [WEB]  # web-1 was taken away


def test_somebody_elses_objects_are_told_once_and_when_they_are_gone() -> None:
    seen = Seen()
    seen.list(ours("web-1"))
    assert seen.inventory.foreign is None
    seen.inventory.changed(foreign("theirs-1"))
    seen.inventory.changed(foreign("theirs-2"))
    assert (seen.foreign, seen.inventory.foreign) == (1, "PolicyEndpoint x/theirs-1 and others")
    seen.inventory.gone(foreign("theirs-1"))
    assert seen.inventory.foreign == "PolicyEndpoint x/theirs-2"
    seen.list(ours("web-1"))
    assert (seen.foreign, seen.inventory.foreign) == (2, None)


def test_an_object_whose_label_somebody_takes_is_no_longer_ours() -> None:
    seen = Seen()
    seen.list(ours("web-1"))
    seen.inventory.changed(foreign("web-1"))
    assert (seen.names(), seen.inventory.foreign) == ([], "PolicyEndpoint x/web-1")
    seen.inventory.changed(ours("web-1", 3))
    assert (seen.names(), seen.inventory.foreign) == (["web-1"], None)


_events = st.lists(
    st.tuples(
        st.sampled_from(["changed", "gone", "wrote", "removed", "list"]),
        st.integers(1, 3),
        st.sampled_from(["web", "other"]),
        st.booleans(),
    ),
    max_size=30,
)


@given(_events)
@settings(max_examples=200)
def test_by_policy_and_in_all_are_the_same(events: list[tuple[str, int, str, bool]]) -> None:
    seen = Seen()
    seen.list()
    there: dict[str, Raw] = {}
    for version, (event, number, policy, mine) in enumerate(events, 1):
        name = f"o-{number}"
        raw = ours(name, version, policy) if mine else foreign(name)
        raw["metadata"]["resourceVersion"] = str(version)
        match event:
            case "changed":
                there[name] = raw
                seen.inventory.changed(raw)
            case "gone":
                there.pop(name, None)
                seen.inventory.gone(raw)
            case "wrote" if mine:
                there[name] = raw
                seen.inventory.wrote("x", objects.read(raw))
                seen.inventory.changed(raw)
            case "removed":
                if there.pop(name, None) is not None:
                    seen.inventory.removed("x", name)
                    seen.inventory.gone(raw)
            case "list":
                seen.list(*there.values())
        mine_now = {name for name, one in there.items() if objects.is_ours(one)}
        assert len(seen.inventory) == len(mine_now)
        assert {n for policy in seen.inventory.policies for n in seen.names(policy)} == mine_now
        assert (seen.inventory.foreign is None) is (len(mine_now) == len(there))


# --- the list of what to do -----------------------------------------------------------------------------


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 20))


def test_a_policy_is_taken_once_with_its_oldest_change() -> None:
    async def work() -> None:
        todo = Worklist()
        todo.add(WEB, 7.0)
        todo.add(WEB, 5.0)
        todo.add(WEB, 9.0)
        assert len(todo) == 1
        assert await todo.take() == (WEB, 5.0)
        # While it is at work, it is not given to another worker …
        todo.add(WEB, 11.0)
        other = asyncio.create_task(todo.take())
        await asyncio.sleep(0)
        assert not other.done()
        # … but comes again.
        todo.done(WEB)
        assert await other == (WEB, 11.0)

    run(work())


def test_what_failed_comes_again_and_at_once_when_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        todo = Worklist()
        todo.add(WEB, 1.0)
        await todo.take()
        todo.retry(WEB, 1.0)
        assert todo.failing == {WEB: 1}
        assert await todo.take() == (WEB, 1.0)
        todo.retry(WEB, 1.0, after=1000.0)
        todo.add(WEB, 2.0)
        assert await todo.take() == (WEB, 1.0)
        todo.done(WEB)
        assert (todo.failing, len(todo)) == ({}, 0)

    run(work())


def test_days_of_failures_wait_no_longer_than_the_longest_wait() -> None:
    async def work() -> None:
        todo = Worklist()
        waits = [todo.retry(WEB, 1.0) for _ in range(2000)]
        assert max(waits) <= LAST_RETRY
        assert waits[0] < 1
        todo.close()

    run(work())


def test_a_closed_list_gives_nothing() -> None:
    async def work() -> None:
        todo = Worklist()
        waiting = [asyncio.create_task(todo.take()) for _ in range(3)]
        await asyncio.sleep(0)
        todo.close()
        todo.add(WEB, 1.0)
        assert await asyncio.gather(*waiting) == [None] * 3
        assert await todo.take() is None

    run(work())
