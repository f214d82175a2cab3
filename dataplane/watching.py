"""Looking at every packet of some pods, those that need no verdict too.

The packets that rules judge go where they always go. What the rules let pass (flows in the kernel,
pods that no policy isolates) is shown to one queue more, which lets all of it pass and records what
the engine says of it. Nothing depends on that queue: when it is full, or nobody listens any more,
its packets go on. Its rules are part of every plan made while somebody looks, and of no other: an
agent that starts anew takes them away.
"""

from __future__ import annotations

from dataplane._engine import Publisher
from dataplane.config import AgentConfig, Backend, Fail
from dataplane.errors import KernelError
from dataplane.node.queues import QueueSet
from dataplane.node.steering import watch_queue
from dataplane.observe.live import LiveVerdicts
from dataplane.plan import Choice, Plan

CACHE_ENTRIES = 8192


class Watching:
    """Who looks at which pods, and the queue that their packets are shown to."""

    def __init__(
        self, config: AgentConfig, publisher: Publisher, live: LiveVerdicts, ring_entries: int
    ) -> None:
        self._config = config
        self._publisher = publisher
        self._live = live
        self._ring_entries = ring_entries
        self._choices: list[Choice] = []
        self._queue: QueueSet | None = None

    def add(self, choice: Choice) -> None:
        """`choice` says which of the pods known here are looked at, now and whenever they change."""
        self._choices.append(choice)

    def remove(self, choice: Choice) -> None:
        """Undo `add`."""
        if choice in self._choices:
            self._choices.remove(choice)

    def addresses(self, plan: Plan) -> frozenset[bytes]:
        """The addresses of the pods that somebody looks at now."""
        return plan.addresses_of(self._choices)

    def prepare(self) -> QueueSet:
        """The queue, not yet ours. For the event loop's thread. KernelError when there can be none."""
        if self._queue is None:
            number = watch_queue(self._config)
            if number > 0xFFFF:
                raise KernelError(
                    f"there is no queue {number} to look at packets with: choose a lower --queue-base"
                )
            try:
                self._queue = QueueSet(
                    self._publisher,
                    backend=Backend.NATIVE,
                    numbers=[number],
                    marks=self._config.marks,
                    fail=Fail.OPEN,
                    offload=False,
                    cache_entries=CACHE_ENTRIES,
                    ring_entries=self._ring_entries,
                    observer=True,
                )
            except ValueError as error:  # as many queues as there can be already
                raise KernelError(f"no queue more to look at packets with: {error}") from None
            self._live.add(self._queue.workers[0])
        return self._queue

    def stop_queue(self) -> None:
        """Give the queue back, once no rule names it. Blocks until its thread has ended."""
        if self._queue is not None and self._queue.running:
            self._queue.stop()
