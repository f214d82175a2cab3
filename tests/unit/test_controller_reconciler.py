"""Which policies the controller writes, leaves and removes, and how it stops."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from dataplane.addresses import parse_address
from dataplane.controller import reconciler
from dataplane.controller.inventory import Inventory
from dataplane.controller.metrics import Metrics
from dataplane.controller.reconciler import Reconciler
from dataplane.controller.slices import Contents, Desired, Found, Head, Slice, Write
from dataplane.controller.writer import Moved, Refused, Stopped
from dataplane.model import Direction, Key, PodEndpoint
from dataplane.sources.kubernetes_client import ApiFault

WEB, DB, OLD = Key("x", "web"), Key("x", "db"), Key("x", "old")
POD = PodEndpoint(Key("x", "a"), parse_address("10.1.0.1"), parse_address("10.0.0.1"))


class Log:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def info(self, line: str, **about: object) -> None:
        self.lines.append(f"{line} {about}")

    error = info


class World:
    """A reconciler, and an API server that does as it is told."""

    def __init__(self) -> None:
        self.inventory = Inventory(lambda policy: self.reconciler.look_at([policy]), lambda: None)
        self.desired: dict[Key, Desired] = {}
        self.there: set[Key] = set()
        self.answers: list[Exception | asyncio.Event] = []  # to the next requests
        self.requests: list[tuple[Key, str]] = []
        self.log = Log()
        self.reconciler = Reconciler(
            self.inventory,
            self.desired.get,
            self.there.__contains__,
            self,  # type: ignore[arg-type]
            Metrics(),
            self.log,
        )

    def want(self, policy: Key) -> None:
        head = Head(policy, "uid", "{}", frozenset(Direction))
        self.there.add(policy)
        self.desired[policy] = Desired(head, {None: Contents((POD,))})

    def has(self, policy: Key) -> None:
        head = Head(policy, "uid", "{}", frozenset(Direction))
        found = Found(f"{policy.name}-1", "uid", "1", Slice(head, None, Contents((POD,))))
        self.inventory.wrote(policy.namespace, found)

    async def carry_out(self, policy: Key, writes: Iterable[Write], _trigger: str) -> int:
        count = 0
        for write in writes:
            if self.answers:
                answer = self.answers.pop(0)
                if isinstance(answer, asyncio.Event):
                    await answer.wait()
                else:
                    raise answer
            self.requests.append((policy, write.action))
            if write.slice is None:
                assert write.found is not None
                self.inventory.removed(policy.namespace, write.found.name)
            else:
                self.inventory.wrote(policy.namespace, Found(f"{policy.name}-1", "uid", "2", write.slice))
            count += 1
        return count

    async def until(self, condition: Callable[[], object]) -> None:
        for _ in range(2000):
            if condition():
                return
            await asyncio.sleep(0.005)
        raise AssertionError(self.log.lines)


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 20))


def test_policies_are_written_left_and_removed() -> None:
    async def work() -> None:
        world = World()
        world.want(WEB)
        world.has(DB)
        world.there.add(DB)  # it cannot be read: what it was stays in force
        world.has(OLD)
        term = asyncio.create_task(world.reconciler.run([WEB, DB, OLD]))
        await world.until(lambda: len(world.requests) == 2)
        assert sorted(world.requests) == [(OLD, "delete"), (WEB, "create")]
        assert world.inventory.policies == {WEB, DB}
        world.desired.pop(WEB)
        world.there.discard(WEB)
        world.reconciler.look_at([WEB], 1.0)
        await world.until(lambda: WEB not in world.inventory.policies)
        world.reconciler.stop()
        await term

    run(work())


def test_what_fails_is_said_once_and_tried_again() -> None:
    async def work() -> None:
        world = World()
        world.want(WEB)
        world.answers = [ApiFault("no", 403) for _ in range(3)]
        term = asyncio.create_task(world.reconciler.run([WEB]))
        await world.until(lambda: world.reconciler.problems)
        (problem,) = world.reconciler.problems
        assert problem.startswith("NetworkPolicy x/web cannot be written: not allowed to write")
        assert (world.reconciler.failing, world.reconciler.waiting) == (1, 1)
        assert len([line for line in world.log.lines if "cannot be written" in line]) == 1
        await world.until(lambda: world.requests)
        assert (world.reconciler.failing, world.reconciler.problems) == (0, [])
        world.reconciler.stop()
        await term

    run(work())


def test_an_object_that_was_changed_meanwhile_is_planned_again() -> None:
    async def work() -> None:
        world = World()
        world.want(WEB)
        world.answers = [Moved("409")]
        term = asyncio.create_task(world.reconciler.run([WEB]))
        await world.until(lambda: world.requests)
        assert world.reconciler.failing == 0
        world.reconciler.stop()
        await term

    run(work())


def test_a_policy_that_is_not_taken_at_all_fails() -> None:
    async def work() -> None:
        world = World()
        world.want(WEB)
        world.answers = [Refused("422"), Refused("422 again")]
        term = asyncio.create_task(world.reconciler.run([WEB]))
        await world.until(lambda: world.log.lines)
        assert (world.reconciler.failing, world.reconciler.limited) == (1, 0)
        await world.until(lambda: world.requests)
        world.reconciler.stop()
        await term

    run(work())


def test_the_write_under_way_is_finished_and_no_other_begins() -> None:
    async def work() -> None:
        world = World()
        policies = [Key("x", f"p-{number}") for number in range(3 * reconciler.WORKERS)]
        for policy in policies:
            world.want(policy)
        gate = asyncio.Event()
        world.answers = [gate] * len(policies)
        term = asyncio.create_task(world.reconciler.run(policies))
        await world.until(lambda: len(world.answers) == len(policies) - reconciler.WORKERS)
        world.reconciler.stop()
        await asyncio.sleep(0.01)
        assert not term.done()
        gate.set()
        await term
        assert len(world.requests) == reconciler.WORKERS
        assert world.reconciler.waiting == 0

    run(work())


def test_who_may_not_write_any_more_ends() -> None:
    async def work() -> None:
        world = World()
        world.want(WEB)
        world.answers = [Stopped()]
        await world.reconciler.run([WEB])
        assert (world.requests, world.reconciler.problems) == ([], [])

    run(work())


def test_one_policy_is_at_one_worker_at_a_time() -> None:
    async def work() -> None:
        world = World()
        world.want(WEB)
        gate = asyncio.Event()
        world.answers = [gate]
        term = asyncio.create_task(world.reconciler.run([WEB]))
        await world.until(lambda: not world.answers)
        for _ in range(20):
            world.reconciler.look_at([WEB])
            await asyncio.sleep(0)
        assert world.requests == []
        gate.set()
        await world.until(lambda: world.reconciler.waiting == 0)
        assert world.requests == [(WEB, "create")]
        world.reconciler.stop()
        await term

    run(work())
