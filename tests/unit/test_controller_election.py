"""Who may write: never two at a time, whatever server and network do; and always somebody again."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import json
import random
import selectors
from collections.abc import Coroutine, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataplane.controller import election
from dataplane.controller.election import Election, Terms
from dataplane.sources.kubernetes_client import ApiFault

Raw = dict[str, Any]
PATH = "/apis/coordination.k8s.io/v1/namespaces/kube-system/leases"


class _Clock(selectors.SelectSelector):
    """Does not wait: time goes on at once."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        assert timeout is not None, "everybody waits, and nothing will ever happen"
        self.now += timeout
        return super().select(0)


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.clock = _Clock()
        super().__init__(self.clock)

    def time(self) -> float:
        return self.clock.now


def in_no_time(work: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine for which hours take milliseconds."""
    loop = _Loop()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(election, "now", loop.time)
        try:
            loop.run_until_complete(work)
        finally:
            for task in asyncio.all_tasks(loop):
                task.cancel()
            loop.run_until_complete(asyncio.sleep(0))
            loop.close()


class Log:
    """What a controller says, for nobody."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def info(self, line: str, **_: object) -> None:
        self.lines.append(line)

    warning = info


class Server:
    """One Lease, with the API server's own guard: a write of another version than the present one fails."""

    def __init__(self) -> None:
        self.lease: Raw | None = None
        self.candidates: list[Candidate] = []
        self.writes = 0

    def read(self) -> Raw:
        if self.lease is None:
            raise ApiFault("no Lease", 404)
        return json.loads(json.dumps(self.lease))

    def write(self, method: str, lease: Raw, writer: Candidate) -> Raw:
        if (method == "POST") is (self.lease is not None):
            raise ApiFault("conflict", 409)
        version = None if self.lease is None else self.lease["metadata"]["resourceVersion"]
        if lease["metadata"].get("resourceVersion") != version:
            raise ApiFault("conflict", 409)
        self.writes += 1
        metadata = {**lease["metadata"], "resourceVersion": str(self.writes), "uid": "1"}
        self.lease = json.loads(json.dumps({**lease, "metadata": metadata}))
        if lease["spec"]["holderIdentity"]:
            self.check(writer)
        return self.read()

    def check(self, writer: Candidate) -> None:
        """Nobody else may write any more, nor has a request under way."""
        now = asyncio.get_running_loop().time()
        for other in self.candidates:
            if other is not writer:
                one = other.election
                assert now >= one._until + one._terms.answer or one._until == 0, "two may write"


class Candidate:
    """An Election, and its way to the server: slow, lossy or cut."""

    def __init__(self, server: Server, name: str, faults: random.Random, log: Log | None = None) -> None:
        self.server, self.faults = server, faults
        self.cut = False
        self.slow = 0.0
        self.loss = 0.0
        self.election = Election(
            self,
            "kube-system",
            "podgate",
            name,
            log=log or Log(),  # type: ignore[arg-type]
        )
        server.candidates.append(self)

    async def get(self, path: str, _query: Raw) -> Raw:
        assert path == f"{PATH}/podgate"
        await self._way()
        found = self.server.read()
        await self._way()
        return found

    async def send(self, method: str, path: str, lease: Raw, _seconds: float) -> Raw:
        assert path == (PATH if method == "POST" else f"{PATH}/podgate")
        # It arrives whether or not we wait for it so long.
        return await asyncio.shield(asyncio.ensure_future(self._deliver(method, lease)))

    async def _deliver(self, method: str, lease: Raw) -> Raw:
        await self._way()
        found = self.server.write(method, lease, self)
        await self._way()
        return found

    async def _way(self) -> None:
        await asyncio.sleep(self.faults.uniform(0, self.slow))
        if self.cut:
            await asyncio.sleep(3600)
        if self.faults.random() < self.loss:
            raise ApiFault("the connection broke off")


@contextlib.contextmanager
def running(*candidates: Candidate) -> Iterator[dict[Candidate, asyncio.Task[None]]]:
    tasks = {one: asyncio.ensure_future(one.election.run()) for one in candidates}
    try:
        yield tasks
    finally:
        for task in tasks.values():
            task.cancel()


def leaders(*candidates: Candidate) -> list[str]:
    return [one.election.identity for one in candidates if one.election.leading]


def test_the_terms_leave_room_for_a_request() -> None:
    terms = Terms()
    assert terms.renew_within + terms.answer < terms.duration


def test_one_leads_and_stays() -> None:
    async def work() -> None:
        server, faults = Server(), random.Random(1)
        candidates = [Candidate(server, name, faults) for name in "abc"]
        with running(*candidates):
            await asyncio.sleep(3)
            first = leaders(*candidates)
            assert len(first) == 1
            for _ in range(200):
                await asyncio.sleep(1)
                assert leaders(*candidates) == first
            assert {one.election.holder for one in candidates} == set(first)

    in_no_time(work())


def test_a_leader_that_is_cut_off_stops_before_another_begins() -> None:
    async def work() -> None:
        server, faults = Server(), random.Random(2)
        one, other = (Candidate(server, name, faults) for name in "ab")
        with running(one):
            await asyncio.sleep(3)
            with running(other):
                await asyncio.sleep(10)
                assert leaders(one, other) == ["a"]
                one.cut = True
                await asyncio.sleep(9.1)
                assert leaders(one, other) == []
                await asyncio.sleep(12)
                assert leaders(one, other) == ["b"]
                assert server.lease is not None
                assert server.lease["spec"]["leaseTransitions"] == 1

    in_no_time(work())


def test_a_lease_that_is_released_is_taken_at_once() -> None:
    async def work() -> None:
        server, faults = Server(), random.Random(3)
        one, other = (Candidate(server, name, faults) for name in "ab")
        with running(one) as tasks:
            await asyncio.sleep(3)
            with running(other):
                await asyncio.sleep(5)
                assert leaders(one, other) == ["a"]
                tasks[one].cancel()
                await one.election.release()
                assert leaders(one, other) == []
                await asyncio.sleep(2.5)
                assert leaders(one, other) == ["b"]

    in_no_time(work())


def test_a_lease_whose_last_renewal_was_not_answered_is_released_all_the_same() -> None:
    async def work() -> None:
        server, faults = Server(), random.Random(4)
        one = Candidate(server, "a", faults)
        with running(one):
            await asyncio.sleep(5)
        assert server.lease is not None
        server.lease["metadata"]["resourceVersion"] = "77"
        await one.election.release()
        assert server.lease["spec"]["holderIdentity"] == ""

    in_no_time(work())


def test_who_never_led_releases_nothing() -> None:
    async def work() -> None:
        server, faults = Server(), random.Random(5)
        one, other = (Candidate(server, name, faults) for name in "ab")
        with running(one):
            await asyncio.sleep(3)
            with running(other):
                await asyncio.sleep(5)
            await other.election.release()
            assert server.lease is not None
            assert server.lease["spec"]["holderIdentity"] == "a"

    in_no_time(work())


def test_no_right_to_the_lease_is_said_once() -> None:
    async def work() -> None:
        log = Log()
        one = Candidate(Server(), "a", random.Random(6), log)

        async def refuse(*_: object) -> Raw:
            raise ApiFault("leases is forbidden", 403)

        one.get = refuse  # type: ignore[method-assign]
        with running(one):
            await asyncio.sleep(60)
        (line,) = log.lines
        assert 'resources: ["leases"], verbs: ["get", "create", "update"]' in line
        assert one.election.problem == line
        assert not one.election.leading

    in_no_time(work())


@given(seed=st.integers(0, 1 << 32), count=st.integers(2, 4))
@settings(max_examples=25, deadline=None)
def test_never_two_whatever_happens_and_somebody_once_it_is_quiet(seed: int, count: int) -> None:
    async def work() -> None:
        faults = random.Random(seed)
        server = Server()
        candidates = [Candidate(server, f"c{number}", faults) for number in range(count)]
        ends: list[tuple[float, int]] = []
        loop = asyncio.get_running_loop()
        with running(*candidates) as tasks:
            for _ in range(40):
                one = faults.choice(candidates)
                one.cut = faults.random() < 0.3
                one.slow = faults.choice([0.0, 0.5, 4.0, 12.0])
                one.loss = faults.choice([0.0, 0.0, 0.3])
                heapq.heappush(ends, (loop.time() + faults.uniform(0.1, 40), 0))
                until, _ = heapq.heappop(ends)
                while loop.time() < until:
                    await asyncio.sleep(0.5)
                    assert len(leaders(*candidates)) <= 1
                    for task in tasks.values():
                        assert not task.done(), task.exception()
            for one in candidates:
                one.cut, one.slow, one.loss = False, 0.0, 0.0
            await asyncio.sleep(60)
            assert len(leaders(*candidates)) == 1

    in_no_time(work())
