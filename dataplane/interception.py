"""Packets of some pods given to a user's hook before they get their verdict.

Everything here happens on the event loop, so that packets, answers and time limits never meet in the
middle of each other. A packet that a hook says nothing useful about, or not in time, gets the engine's
verdict by the rules of that moment: a change of policy is never undone by a packet that waited. What
cannot be parsed, forged sources and what keeps links alive are no hook's to decide.

The rules that fill the queue are part of every plan made while somebody intercepts, and of no other:
an agent that starts anew takes them away. The queue itself outlives them a little, for packets that
were on their way into it.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from dataplane._engine import Publisher, Worker
from dataplane.config import AgentConfig, Fail
from dataplane.errors import InputError, KernelError
from dataplane.hook_answers import Answer, Wish, check_rewritten
from dataplane.node.steering import hook_queue
from dataplane.observe.live import LiveVerdicts
from dataplane.plan import Choice, Plan
from dataplane.reasons import Reason
from dataplane.verdict import Event, Verdict

if TYPE_CHECKING:
    from dataplane.node.hook_queue import HeldPacket, HookQueue

CACHE_ENTRIES = 8192
MOST_WAITING = 128  # packets that a hook is asked about at a time: Python answers so many in a time limit
MOST_DELAYED = 1024
MOST_READS = 128  # turns of reading what is left in the queue at its end
LINGER_SECONDS = 0.5  # the queue is ours for so long after the rules that fill it have gone
# Proposals that no hook can change.
OURS = frozenset(
    {Reason.MALFORMED, Reason.FRAGMENT, Reason.SPOOFED, Reason.NO_TABLE, Reason.NEIGHBOUR_DISCOVERY}
)


class Hook(Protocol):
    """The user's hook as the queue sees it. Nothing here may wait."""

    @property
    def timeout(self) -> float:
        """Seconds within which it must answer."""

    def wants(self, proposal: Event) -> bool:
        """Whether it is to be asked about a packet."""

    def ask(self, number: int, proposal: Event) -> None:
        """Ask it; `Interception.answer` is told the answer."""

    def told(self, number: int, did: str, event: Event, why: str) -> None:
        """What became of a packet that it was asked about: a `Wish`, or `timeout`, `refused` or `ended`.
        `why`: more about it, in words, or nothing."""

    def passed_over(self, why: str) -> None:
        """It was not asked about a packet that it wants: `busy`, or `full`."""

    def ended(self, why: str) -> None:
        """It will not be asked any more, and did not ask for that."""


@dataclass(slots=True)
class _Held:
    """A packet whose hook was asked, or which is being delayed."""

    number: int
    packet: HeldPacket
    proposal: Event
    timer: asyncio.TimerHandle


class Interception:
    """Who intercepts which pods, and the queue that their packets come by. For the event loop's thread."""

    def __init__(
        self, config: AgentConfig, publisher: Publisher, live: LiveVerdicts, ring_entries: int
    ) -> None:
        self._config = config
        self._publisher = publisher
        self._live = live
        self._ring_entries = ring_entries
        self._choice: Choice | None = None
        self._hook: Hook | None = None
        self._queue: HookQueue | None = None
        self._worker: Worker | None = None
        self._fd = -1
        self._numbers = 0
        self._waiting: dict[int, _Held] = {}  # for an answer
        self._delayed: dict[int, _Held] = {}
        self._overdue: set[int] = set()  # asked about, not answered in time, and not yet since
        self._closing: asyncio.TimerHandle | None = None
        self._lost_before = 0  # in the kernel's queue whenever it was ours before
        self.faults: Counter[str] = Counter()  # what went wrong with packets, not for want of an answer

    @property
    def workers(self) -> list[Worker]:
        """What has counted verdicts of packets that a hook could have changed."""
        return [self._worker] if self._worker is not None else []

    def addresses(self, plan: Plan) -> frozenset[bytes]:
        """The addresses of the pods whose packets are intercepted now."""
        return plan.addresses_of([self._choice] if self._choice is not None else [])

    # --- beginning and end ----------------------------------------------------------------------------

    def begin(self, choice: Choice, hook: Hook) -> None:
        """Ask `hook` about packets from now on; the next plan has rules for the pods that `choice` chooses.

        InputError when somebody intercepts already, KernelError when the queue cannot be had.
        """
        if self._hook is not None:
            raise InputError("somebody intercepts packets already: one `podgate intercept` at a time")
        self._open()
        self._choice, self._hook = choice, hook
        self._overdue.clear()

    def end(self, hook: Hook) -> None:
        """The hook is asked no more; what waits gets its verdict now. More than once is no error."""
        if self._hook is not hook:
            return
        for held in [*self._delayed.values(), *self._waiting.values()]:
            self._engine(held, "ended")
        self._choice = self._hook = None

    def release(self) -> None:
        """No rule names the queue any more: give it back soon, unless somebody intercepts again."""
        if self._queue is not None and self._queue.is_open and self._closing is None:
            loop = asyncio.get_running_loop()
            self._closing = loop.call_later(LINGER_SECONDS, self._close_unless_wanted)

    def close(self) -> None:
        """Give every packet its verdict and the queue back."""
        if self._closing is not None:
            self._closing.cancel()
            self._closing = None
        self._end_by_force("the agent ends")
        queue = self._queue
        if queue is None or not queue.is_open:
            return
        asyncio.get_running_loop().remove_reader(self._fd)
        try:
            for _ in range(MOST_READS):
                if not queue.read():
                    break
        except OSError:
            self.faults["receiving"] += 1
        self._give_back(queue)

    def _end_by_force(self, why: str) -> None:
        if self._hook is not None:
            self._hook.ended(why)
            self.end(self._hook)

    def _close_unless_wanted(self) -> None:
        self._closing = None
        if self._hook is None:
            self.close()

    def _open(self) -> None:
        number = hook_queue(self._config)
        if number > 0xFFFF:
            raise KernelError(f"there is no queue {number} for a hook: choose a lower --queue-base")
        try:
            from dataplane.node.hook_queue import HookQueue
        except ImportError as error:
            raise KernelError(
                f"a hook needs the NetfilterQueue package: {error}; install libnetfilter-queue1 and it"
            ) from None
        if self._worker is None:
            try:
                self._worker = Worker(
                    self._publisher,
                    cache_entries=CACHE_ENTRIES,
                    ring_entries=self._ring_entries,
                    audit=self._config.audit,
                )
            except ValueError as error:  # as many queues as there can be already
                raise KernelError(f"no queue more for a hook: {error}") from None
            self._live.add(self._worker)
        self._worker.reject = self._config.rejects
        if self._queue is None:
            self._queue = HookQueue(
                number, self._take, marks=self._config.marks, fail_open=self._config.fail is Fail.OPEN
            )
        if not self._queue.is_open:
            self._fd = self._queue.open()
            asyncio.get_running_loop().add_reader(self._fd, self._read)

    # --- packets --------------------------------------------------------------------------------------

    def _read(self) -> None:
        assert self._queue is not None
        try:
            self._queue.read()
        except OSError as error:
            self.faults["receiving"] += 1
            self._end_by_force(f"queue {self._queue.number}: receiving packets failed: {error}")
            asyncio.get_running_loop().remove_reader(self._fd)
            self._give_back(self._queue)

    def _give_back(self, queue: HookQueue) -> None:
        self._lost_before = self.lost
        queue.close()

    def _take(self, packet: HeldPacket) -> None:
        hook = self._hook
        try:
            proposal = self._propose(packet) if hook is not None else None
            if hook is None or proposal is None or not self._wanted(hook, proposal):
                self._judge(packet)
                return
            full = len(self._waiting) >= MOST_WAITING or len(self._delayed) >= MOST_DELAYED
            if full or self._overdue:
                hook.passed_over("busy" if self._overdue else "full")
                self._judge(packet)
                return
        except Exception:
            self._fault(packet)
            return
        self._numbers += 1
        number = self._numbers
        timer = asyncio.get_running_loop().call_later(hook.timeout, self._too_late)
        held = self._waiting[number] = _Held(number, packet, proposal, timer)
        try:
            hook.ask(number, proposal)
        except Exception:
            self.faults["hook"] += 1
            self._engine(held, "ended")

    def _wanted(self, hook: Hook, proposal: Event) -> bool:
        try:
            return hook.wants(proposal)
        except Exception:  # a filter that cannot be asked must cost no packet
            self.faults["filter"] += 1
            return False

    def _propose(self, packet: HeldPacket) -> Event | None:
        """What the engine would say, None where no hook may say otherwise."""
        assert self._worker is not None
        proposal = self._worker.propose(packet.payload, **packet.path)
        return None if {proposal.verdict.reason, proposal.verdict.audited} & OURS else proposal

    def _too_late(self) -> None:
        """The oldest has waited too long. A hook is asked about one packet after the other: those behind it
        go on too, so that none is overtaken by what comes while the hook is busy."""
        for held in list(self._waiting.values()):
            self._overdue.add(held.number)
            self._engine(held, "timeout")

    def answer(self, answer: Answer) -> None:
        """The hook has answered. An answer about a packet that does not wait any more is none."""
        held = self._waiting.get(answer.number)
        if held is None:
            self._overdue.discard(answer.number)
            return
        if answer.wish is Wish.REWRITE:
            self._rewrite(held, answer.packet)
        elif answer.wish is Wish.DELAY:
            self._forget(held)
            self._delayed[held.number] = held
            loop = asyncio.get_running_loop()
            why = f"{answer.delay:g} s"
            held.timer = loop.call_later(answer.delay, self._engine, held, "delay", why)
        elif answer.wish in (Wish.ALLOW, Wish.DROP):
            self._override(held, str(answer.wish), answer.wish is Wish.ALLOW)
        else:
            self._engine(held, str(answer.wish), answer.error)

    def refuse(self, number: int, why: str) -> None:
        """What the hook said of a packet is of no use."""
        held = self._waiting.get(number)
        if held is None:
            self._overdue.discard(number)
            return
        self._engine(held, "refused", why)

    def alive(self) -> None:
        """The hook has said something that is about no packet: at least it does not hang."""
        self._overdue.clear()

    def _rewrite(self, held: _Held, new: bytes) -> None:
        packet = held.packet
        try:
            if not packet.whole:
                raise ValueError(
                    f"only {len(packet.payload)} of its {packet.path['wire']} bytes were there to rewrite"
                )
            from dataplane.node.hook_queue import longest_packet

            check_rewritten(packet.payload, new, longest_packet(packet.path["outdev"]))
        except ValueError as error:
            self._engine(held, "refused", str(error))
            return
        why = f"{len(packet.payload):,} to {len(new):,} bytes"
        self._override(held, "rewrite", True, why, new)

    # --- verdicts -------------------------------------------------------------------------------------

    def _override(
        self, held: _Held, did: str, allow: bool, why: str = "", payload: bytes | None = None
    ) -> None:
        assert self._worker is not None
        self._forget(held)
        packet = held.packet
        try:
            event = self._worker.override(packet.payload, allow, **packet.path)
            packet.give(event.verdict.allow, packet.mark & ~self._config.marks.mask, payload)
        except Exception:
            self._fault(packet)
            return
        self._tell(held, did, event, why)

    def _engine(self, held: _Held, did: str, why: str = "") -> None:
        """The engine's verdict, by the rules of this moment."""
        self._forget(held)
        try:
            verdict = self._judge(held.packet)
        except Exception:
            self._fault(held.packet)
            return
        table = self._publisher.table
        event = held.proposal._replace(
            when_ns=time.time_ns(), generation=table.generation if table else 0, known=True, verdict=verdict
        )
        self._tell(held, did, event, why)

    def _judge(self, packet: HeldPacket) -> Verdict:
        from dataplane.node.netfilterqueue_backend import kernel_answer

        worker = self._worker
        assert worker is not None
        verdict = worker.judge(packet.payload, **packet.path)
        # What a hook can touch is never left to the kernel: the next packet may be answered otherwise.
        answer = kernel_answer(verdict, packet.mark, self._config.marks, offload=False, reject=worker.reject)
        packet.give(*answer)
        return verdict

    def _fault(self, packet: HeldPacket) -> None:
        """No verdict could be found: dropped, in audit let through."""
        self.faults["failed_judgements"] += 1
        with suppress(RuntimeError):  # it has one, or there is no queue any more
            packet.give(self._config.audit, packet.mark & ~self._config.marks.mask)

    def _forget(self, held: _Held) -> None:
        held.timer.cancel()
        self._waiting.pop(held.number, None)
        self._delayed.pop(held.number, None)

    def _tell(self, held: _Held, did: str, event: Event, why: str) -> None:
        if self._hook is None:
            return
        try:
            self._hook.told(held.number, did, event, why)
        except Exception:  # the verdict has been given; other packets wait for theirs
            self.faults["hook"] += 1

    @property
    def lost(self) -> int:
        """Packets that found the kernel's queue full, since the start."""
        stats = self._queue.stats() if self._queue is not None else None
        return self._lost_before + (stats.dropped + stats.user_dropped if stats is not None else 0)

    @property
    def problems(self) -> list[str]:
        """One line per thing that went wrong with packets."""
        outcome = "let through" if self._config.audit else "dropped"
        failed = self.faults["failed_judgements"]
        return (
            [f"the hook's queue: {failed} packets could not be judged and were {outcome}"] if failed else []
        )
