"""Keeping the engine and the kernel in step with the objects and links known now.

Start order, so that nothing is ever judged by half the rules: the first table compiled and
published, then the queue threads bound; only then chains, sets and device groups, so that the
kernel's rules change when somebody can answer; last, live flows of an earlier run judged again.

Every later change runs the same steps from the present alone: compile, publish, wait until no queue
thread still uses the old table, steer: it is in force. Then live flows are judged again: the kernel
takes its time to list them. A step that the kernel refuses becomes a problem in `status` and is tried
again; until then the last good rules stay in force.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Protocol, TypeVar

from dataplane._engine import Publisher, Worker
from dataplane._rules import RuleTable
from dataplane.config import AgentConfig
from dataplane.errors import InputError, KernelError
from dataplane.interception import Hook, Interception
from dataplane.model import Problem, Snapshot
from dataplane.node import conntrack
from dataplane.node.interfaces import Interfaces, LinkState
from dataplane.node.queues import QueueSet
from dataplane.node.steering import Steering, installed_marks
from dataplane.observe.live import LiveVerdicts
from dataplane.observe.log import Logger, get_logger
from dataplane.plan import Choice, Plan, Planner, touched
from dataplane.policy.compile import Compiler
from dataplane.policy.resolve import Resolver, in_force
from dataplane.watching import Watching

RETRY_SECONDS = 2.0  # after a step that the kernel refused
SOLICIT_SECONDS = 0.5  # a pod on a bridge is asked for this often until its port is known
SOLICIT_AT_START_SECONDS = 1.0  # one that does not answer for so long is not there
QUIESCE_SECONDS = 0.0005  # a burst takes tens of microseconds …
QUIESCE_LIMIT_SECONDS = 5.0  # … so a thread that takes this long is stuck
RING_ENTRIES = 8192  # verdict events per queue thread

_T = TypeVar("_T")


class Objects(Protocol):
    """Where the objects come from (`sources.store.Store`)."""

    @property
    def settled(self) -> bool: ...
    def snapshot(self) -> Snapshot: ...
    async def wait_change(self) -> None: ...


class Enforcement:
    """The rules in force on this node, and what keeps them there."""

    def __init__(self, config: AgentConfig, objects: Objects) -> None:
        self.config = config
        self.log: Logger = get_logger()
        self.objects = objects
        self.interfaces = Interfaces()
        self.compiler = Compiler()
        self.publisher = Publisher()
        self.steering = Steering(config)
        self.queues = QueueSet(
            self.publisher,
            backend=config.backend,
            numbers=range(config.queue_base, config.queue_base + config.queues),
            marks=config.marks,
            fail=config.fail,
            offload=config.offload,
            ring_entries=RING_ENTRIES,
            audit=config.audit,
        )
        self.live = LiveVerdicts(self.queues.workers)
        self.watching = Watching(config, self.publisher, self.live, RING_ENTRIES)
        self.interception = Interception(config, self.publisher, self.live, RING_ENTRIES)
        self.resolver = Resolver()
        self._planner = Planner()
        self.known = Snapshot()  # the objects as the sources gave them
        self.snapshot = Snapshot()  # the same with the PolicyEndpoints of its NetworkPolicies
        self.in_force: Plan | None = None  # the last plan whose every step succeeded
        self.refused: str | None = None  # why the newest plan is not in force
        self.faults: list[str] = []  # what the last look at our own rules and threads found
        self.started = False  # the queues are ours; before that, rules found here are another agent's
        self.before_queues: Callable[[], Awaitable[None]] | None = None  # all is ready but the queues
        self.after_queues: Callable[[], Awaitable[None]] | None = None  # packets are judged
        # Called each time a change is in force for whatever begins from then on. The flows that were there
        # before, of which it may cut some, are judged again next.
        self.when_in_force: Callable[[], None] = lambda: None
        # Called when that is done too, with the seconds it took.
        self.when_flows_judged: Callable[[float], None] = lambda _seconds: None
        # Called with every new table, before it is published, and the seconds that making it took.
        self.when_compiled: Callable[[RuleTable, float], None] = lambda _table, _seconds: None
        # What else is known of pods, put into the objects of which plans are made.
        self.amend: Callable[[Snapshot, LinkState], Snapshot] = lambda snapshot, _state: snapshot
        self._groups_of = LinkState()  # the links when device groups were last looked at
        self._look = asyncio.Event()
        self._settling: list[asyncio.Future[bool]] = []
        self.generation = 0  # of the table in force, its rules in the kernel too, live flows judged by it
        self._tables = 0  # how many were made
        # What blocks on the kernel or its tools runs here, one call after the other: a change that was
        # under way when the agent was told to stop ends before its rules are taken away.
        self._kernel_thread = ThreadPoolExecutor(1, "podgate-kernel")

    @property
    def all_faults(self) -> list[str]:
        """What is wrong with our own rules and threads, or known not to be kept out by them."""
        unguarded = [self.steering.unguarded] if self.steering.unguarded else []
        return [*self.faults, *unguarded, *self.interception.problems]

    @property
    def ready(self) -> bool:
        """Whether everything known is in force and nothing is in the way of judging packets."""
        plan = self.in_force
        return plan is not None and not plan.problems and self.refused is None and not self.all_faults

    @property
    def workers(self) -> list[Worker]:
        """What has judged packets and counted the verdicts."""
        return [*self.queues.workers, *self.interception.workers]

    async def in_kernel_thread(self, call: Callable[[], _T]) -> _T:
        """The result of a blocking call, made in turn with all others that touch the kernel's rules."""
        return await asyncio.get_running_loop().run_in_executor(self._kernel_thread, call)

    async def stop(self, *, clean: bool) -> list[str]:
        """Take our rules away (`clean`), or leave them to the next agent; then end the queue threads.

        Says what was removed.
        """
        removed: list[str] = []
        try:
            if clean and self.started:
                # Rules first: whatever they still queue is answered while the threads live.
                removed = await self.in_kernel_thread(self._remove)
            elif self.started:
                # Nobody needs it any more. It does no harm where the kernel refuses.
                with suppress(KernelError):
                    await self.in_kernel_thread(self.steering.end_guests)
        finally:
            self.interception.close()
            await self.in_kernel_thread(self.watching.stop_queue)
            await self.in_kernel_thread(self.queues.stop)
            self._kernel_thread.shutdown()
            await self.interfaces.stop()
        return removed

    def _remove(self) -> list[str]:
        removed = self.steering.remove()
        conntrack.clear_all(self.config.marks)
        return removed

    async def run(self) -> None:
        """Put everything in force and keep it there, until cancelled.

        InputError when a queue is somebody else's; nothing has been changed then.
        """
        await self.interfaces.start()
        await self.in_kernel_thread(self.steering.detect)
        self._take_snapshot()
        await self._find_bridged_pods()
        for problem in self.steering.problems:
            self.log.warning("note", what=problem)
        plan = self._plan()
        self._publish(plan)
        if self.before_queues is not None:
            await self.before_queues()
        try:
            self.queues.start()
        except KernelError as error:  # nothing of ours is in the kernel yet, and nothing will be
            raise InputError(str(error)) from None
        self.started = True
        if self.after_queues is not None:
            await self.after_queues()
        earlier = await self.in_kernel_thread(installed_marks)
        built = await self.in_kernel_thread(lambda: self.steering.install(plan.not_pods))
        # Only now are the rules there that answer, and that let nothing pass that is to be answered.
        for worker in self.queues.workers:
            worker.reject = self.config.rejects
        if earlier not in (None, self.config.marks):
            await self.in_kernel_thread(lambda: conntrack.clear_all(earlier))  # nobody reads them now
        self.log.info(
            "rules in the kernel",
            iptables=str(self.steering.variant),
            state="built" if built else "kept as found",
        )
        verifying = asyncio.create_task(self._verify_at_times())
        try:
            while not verifying.done():
                settling, self._settling = self._settling, []
                self._look.clear()
                await self._reconcile()
                for waiter in settling:
                    if not waiter.done():
                        waiter.set_result(self.refused is None)
                self.interfaces.solicit(self._unplaced(self.in_force))
                await self._change(verifying)
            verifying.result()  # it never ends by itself: let its error out
        finally:
            verifying.cancel()

    def look(self) -> None:
        """Take up at once what the links are now, and what `amend` has to say."""
        self.interfaces.catch_up()
        self._look.set()

    async def settle(self) -> bool:
        """Wait until what is known now is in force; False when the kernel refuses it."""
        waiter: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._settling.append(waiter)
        self.look()
        return await waiter

    async def _settle_or(self, undo: Callable[[], None]) -> None:
        """Wait until what was just asked for is in force; else `undo` it. KernelError: the kernel refuses."""
        try:
            if not await self.settle():
                raise KernelError(f"the agent cannot change its rules now: {self.refused}")
        except BaseException:
            undo()
            raise

    async def watch(self, choice: Choice) -> None:
        """Show every packet of the pods that `choice` chooses to readers of `live`, until `unwatch`.

        KernelError when that cannot be had; nothing has changed then.
        """
        queue = self.watching.prepare()
        if not queue.running:
            await self.in_kernel_thread(queue.start)
        self.watching.add(choice)
        await self._settle_or(lambda: self.unwatch(choice))

    def unwatch(self, choice: Choice) -> None:
        """End what `watch` began. Returns before it is in force."""
        self.watching.remove(choice)
        self._look.set()

    @property
    def intercepted_pods(self) -> int:
        """How many pods' packets a user's hook is asked about."""
        plan = self.in_force
        if plan is None or not plan.hooked:
            return 0
        return sum(not plan.hooked.isdisjoint(plan.pods[key].addresses) for key in plan.placements)

    async def intercept(self, choice: Choice, hook: Hook) -> None:
        """Ask `hook` about the packets of the pods that `choice` chooses, until `end_interception`.

        KernelError when that cannot be had, InputError when somebody intercepts already; nothing has
        changed then.
        """
        self.interception.begin(choice, hook)
        await self._settle_or(lambda: self.end_interception(hook))

    def end_interception(self, hook: Hook) -> None:
        """End what `intercept` began: at once for `hook`; returns before its rules are gone."""
        self.interception.end(hook)
        self._look.set()

    async def _change(self, verifying: asyncio.Task[None]) -> None:
        """Wait for new objects or links, for the time to try again, or for the end of `verifying`."""
        waits = [
            asyncio.create_task(self.objects.wait_change()),
            asyncio.create_task(self.interfaces.wait_change()),
            asyncio.create_task(self._look.wait()),
        ]
        patience = None
        if self.refused is not None:
            patience = RETRY_SECONDS
        elif self._unplaced(self.in_force):
            patience = SOLICIT_SECONDS
        try:
            await asyncio.wait([*waits, verifying], timeout=patience, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    def _unplaced(self, plan: Plan | None) -> list[bytes]:
        """Addresses of pods of this node whose interface is not known, where a bridge may hide it."""
        links = self.interfaces.state.links.values()
        if plan is None or not any(link.kind == "bridge" for link in links):
            return []
        return [ip for key, pod in plan.pods.items() if key not in plan.placements for ip in pod.addresses]

    async def _find_bridged_pods(self) -> None:
        """Before the first rules: a pod that has been silent is in no table of its bridge."""
        deadline = time.monotonic() + SOLICIT_AT_START_SECONDS
        while (unplaced := self._unplaced(self._plan())) and time.monotonic() < deadline:
            self.interfaces.solicit(unplaced)
            with suppress(TimeoutError):
                await asyncio.wait_for(self.interfaces.wait_change(), SOLICIT_AT_START_SECONDS / 5)

    def _take_snapshot(self) -> bool:
        """Take up the objects known now; whether they changed."""
        old, self.known = self.known, self.objects.snapshot()
        if self.known == old:
            return False
        before = set(self.snapshot.problems)
        self.snapshot = in_force(self.known, self.resolver)
        for problem in self.snapshot.problems:
            if problem not in before:
                self._log_problem(problem)
        return True

    def _log_problem(self, problem: Problem) -> None:
        self.log.warning(
            "bad object",
            file=problem.source,
            object=problem.object,
            field=problem.field,
            reason=problem.reason,
        )

    def _plan(self) -> Plan:
        state = self.interfaces.state
        plan = self._planner.plan(self.config, self.amend(self.snapshot, state), state)
        return replace(plan, watched=self.watching.addresses(plan), hooked=self.interception.addresses(plan))

    def _publish(self, plan: Plan) -> RuleTable:
        self._tables += 1
        started = time.monotonic()
        table = self.compiler.table(self._tables, plan.entries, plan.own_node)
        self.when_compiled(table, time.monotonic() - started)
        self.publisher.publish(table)
        return table

    async def _reconcile(self) -> None:
        started = time.monotonic()
        # A link may have woken us in the middle of a change of objects: half a policy could open or
        # cut what neither the old nor the new one does.
        news = self.objects.settled and self._take_snapshot()
        plan, old = self._plan(), self.in_force
        try:
            if old is not None and not news and self.refused is None:
                if plan == old:
                    await self._steer(plan)
                    return
                if replace(plan, watched=old.watched, hooked=old.hooked) == old:
                    # Who looks at which packets changes no rule of any pod: table and flows stay as they are.
                    await self._steer(plan)
                    self.in_force = plan
                    self._steered(plan)
                    if plan.watched != old.watched:
                        self.log.info("pods of which every packet is looked at", addresses=len(plan.watched))
                    if plan.hooked != old.hooked:
                        self.log.info("pods whose packets a hook is asked about", addresses=len(plan.hooked))
                    return
            # New objects always make a new generation, so that whoever wrote them can wait for it.
            table = self._publish(plan)
            await self.in_kernel_thread(self._quiesce)
            await self._steer(plan)
            renewed, rejudged = touched(old, plan)
            if renewed and old is not None:
                await self.in_kernel_thread(lambda: conntrack.clear(self.config.marks, renewed))
            self.when_in_force()
            in_force = time.monotonic()
            # Flows that an earlier agent, or a plan that came into force by half, has let in: all.
            whose = None if old is None or self.refused is not None else rejudged
            seen, cut = await self.in_kernel_thread(lambda: self._judge_again(table, whose))
        except (KernelError, ValueError) as error:  # ValueError: no table can be made of the plan
            if self.refused != str(error):
                self.log.error("change not in force, will be tried again", error=str(error))
            self.refused = str(error)
            return
        self._steered(plan)
        self.in_force, self.refused, self.generation = plan, None, table.generation
        done = time.monotonic()
        self.when_flows_judged(done - in_force)
        self.log.info(
            "ready" if old is None else "rules in force",
            generation=table.generation,
            pods=plan.isolated,
            policies=plan.policies,
            ms=round((in_force - started) * 1000, 1),
            flows_judged_again=seen,
            flows_cut=cut,
            flows_ms=round((done - in_force) * 1000, 1),
        )
        for problem in plan.problems:
            if old is None or problem not in old.problems:
                self.log.error("not ready", problem=problem)

    def _quiesce(self) -> None:
        """Wait until no verdict of an older table is on its way into conntrack any more."""
        deadline = time.monotonic() + QUIESCE_LIMIT_SECONDS
        while not self.publisher.quiesced():
            if time.monotonic() > deadline:
                raise KernelError("a queue thread does not take up new rules; restart the agent")
            time.sleep(QUIESCE_SECONDS)

    def _judge_again(self, table: RuleTable, addresses: set[bytes] | None) -> tuple[int, int]:
        """Judge live flows from or to `addresses` (None: all); how many were looked at, and how many cut."""
        if addresses is not None and not addresses:
            return 0, 0
        swept = conntrack.rejudge(table, self.config.marks, addresses)
        return swept.seen, swept.cleared

    async def _steer(self, plan: Plan) -> None:
        links = self.interfaces.state
        steered = await self.in_kernel_thread(lambda: self._apply(plan))
        if not steered and links is not self._groups_of:
            # A pod whose link has lost its group is open, and the link's event may be what woke us.
            changed = await self.in_kernel_thread(self.steering.keep_groups)
            if changed:
                self.log.error("others changed our device groups; put back", links=" ".join(changed))
        self._groups_of = links

    def _apply(self, plan: Plan) -> bool:
        if plan.watched:
            queue = self.watching.prepare()
            if not queue.running:
                with suppress(KernelError):  # what it would be shown passes
                    queue.start()
        changed = self.steering.apply(plan.steered, plan.services, plan.not_pods, plan.watched, plan.hooked)
        if not plan.watched:
            self.watching.stop_queue()
        return changed

    def _steered(self, plan: Plan) -> None:
        if not plan.hooked:
            self.interception.release()

    async def _verify_at_times(self) -> None:
        while True:
            await asyncio.sleep(self.config.verify_seconds)
            await self._verify()
            self._look.set()  # the plan is made again too: no event tells of a sysctl

    async def _verify(self) -> None:
        """Put back what others changed of our rules, and notice queue threads that have ended."""
        faults = self.queues.healthy()
        try:
            # Reading everything takes long, and no change need wait for it. What a change under way makes
            # look wrong is right when its turn comes.
            changed = await asyncio.to_thread(self.steering.verify)
            if changed:
                changed = await self.in_kernel_thread(lambda: self.steering.verify(repair=True))
            if changed:
                self.log.error("others changed our rules; put back", what="; ".join(changed))
        except KernelError as error:
            faults.append(str(error))
        for fault in faults:
            if fault not in self.faults:
                self.log.error("fault", what=fault)
        self.faults = faults
