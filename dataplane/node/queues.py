"""The NFQUEUEs of this node: one thread each, on either backend."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from dataplane._engine import Publisher, Worker
from dataplane._nfqueue import NativeQueue
from dataplane.config import Backend, Fail, MarkLayout
from dataplane.errors import KernelError

# A thread that does not stop within this many seconds is stuck in the kernel; nothing here blocks
# for longer than one burst.
STOP_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class QueueStats:
    """One queue as the kernel counts it (/proc/net/netfilter/nfnetlink_queue).

    `depth`: packets waiting for a verdict. `dropped`: found the queue at its maximum length.
    `user_dropped`: found the socket's buffer full. Both only grow; with fail open such packets are
    let through and counted nowhere.
    """

    num: int
    depth: int
    dropped: int
    user_dropped: int


class Queue(Protocol):
    """What a backend offers for one queue."""

    @property
    def number(self) -> int: ...

    def bind(self) -> None: ...
    def run(self) -> None: ...
    def stop(self) -> None: ...
    def close(self) -> None: ...
    def losses(self) -> dict[str, int]: ...


class QueueSet:
    """The queues of the network namespace that `start` is called in.

    Every queue has a Worker of its own, published to by `publisher`. `audit`: nothing is dropped. With
    `observer` they let every packet pass and only record what the rules say of it.
    """

    def __init__(
        self,
        publisher: Publisher,
        *,
        backend: Backend,
        numbers: Sequence[int],
        marks: MarkLayout,
        fail: Fail,
        offload: bool,
        cache_entries: int = 65536,
        ring_entries: int = 0,
        audit: bool = False,
        maxlen: int = 4096,
        observer: bool = False,
    ) -> None:
        self.workers: list[Worker] = []
        self._queues: list[Queue] = []
        self._threads: list[threading.Thread] = []
        self._failures: dict[int, str] = {}
        self._proc = -1
        self._stopping = False
        for number in numbers:
            worker = Worker(
                publisher,
                cache_entries=cache_entries,
                ring_entries=ring_entries,
                audit=audit,
                observer=observer,
            )
            self.workers.append(worker)
            self._queues.append(
                _queue(
                    backend,
                    worker,
                    number,
                    marks=marks,
                    fail_open=fail is Fail.OPEN,
                    offload=offload,
                    maxlen=maxlen,
                )
            )

    def start(self) -> None:
        """Take every queue and start its thread. KernelError names the queue that cannot be had."""
        self._stopping = False
        self._failures.clear()
        bound: list[Queue] = []
        try:
            # Opened now, so that later reads are of this network namespace from any thread.
            self._proc = open_proc()
            for queue in self._queues:
                queue.bind()
                bound.append(queue)
        except BaseException:
            for queue in bound:
                queue.close()
            self._close_proc()
            raise
        self._threads = [
            threading.Thread(target=self._run, args=(queue,), name=f"podgate-q{queue.number}", daemon=True)
            for queue in self._queues
        ]
        for thread in self._threads:
            thread.start()

    @property
    def running(self) -> bool:
        """Whether the queues are ours: between `start` and `stop`."""
        return bool(self._threads)

    def _run(self, queue: Queue) -> None:
        try:
            queue.run()
        except Exception as error:  # the thread's end must be seen, whatever ended it
            self._failures[queue.number] = str(error) or type(error).__name__
        else:
            if not self._stopping:
                self._failures[queue.number] = "it ended by itself"

    def stop(self) -> None:
        """Judge what has been delivered, end the threads and give the queues back."""
        self._stopping = True
        for queue in self._queues:
            queue.stop()
        stuck = []
        for thread, queue in zip(self._threads, self._queues, strict=False):
            thread.join(STOP_SECONDS)
            if thread.is_alive():
                stuck.append(queue.number)
            else:
                queue.close()
        self._threads = []
        self._close_proc()
        if stuck:
            raise KernelError(
                f"queue {', '.join(map(str, stuck))}: the thread does not stop; end this process"
            )

    def _close_proc(self) -> None:
        if self._proc >= 0:
            os.close(self._proc)
            self._proc = -1

    def stats(self) -> list[QueueStats]:
        """One entry per queue that the kernel knows, in our order."""
        if self._proc < 0:
            return []
        known = read_stats(self._proc)
        return [known[queue.number] for queue in self._queues if queue.number in known]

    def losses(self) -> dict[str, int]:
        """What the loops themselves counted, summed over the queues."""
        total: dict[str, int] = {}
        for queue in self._queues:
            for name, count in queue.losses().items():
                total[name] = total.get(name, 0) + count
        return total

    def dead(self) -> list[str]:
        """One line per queue that will not be judged again without a restart."""
        problems = []
        known = {stats.num for stats in self.stats()}
        for queue, thread in zip(self._queues, self._threads, strict=False):
            if queue.number in self._failures:
                problems.append(f"queue {queue.number}: its thread stopped: {self._failures[queue.number]}")
            elif not thread.is_alive():
                problems.append(f"queue {queue.number}: its thread stopped")
            elif queue.number not in known:
                problems.append(f"queue {queue.number}: the kernel no longer knows it; restart the agent")
        return problems

    def healthy(self) -> list[str]:
        """One line per thing that is wrong; empty when every queue is being judged."""
        if not self._threads:
            return ["the queues are not started"]
        problems = self.dead()
        outcome = "let through" if any(worker.audit for worker in self.workers) else "dropped"
        for queue in self._queues:
            if failed := queue.losses().get("failed_judgements"):
                problems.append(
                    f"queue {queue.number}: {failed} packets could not be judged and were {outcome}"
                )
        return problems


def _queue(
    backend: Backend,
    worker: Worker,
    number: int,
    *,
    marks: MarkLayout,
    fail_open: bool,
    offload: bool,
    maxlen: int,
) -> Queue:
    if backend is Backend.NATIVE:
        return NativeQueue(
            worker,
            number,
            mark_egress=marks.egress,
            mark_ingress=marks.ingress,
            mark_reply=marks.reply,
            offload=offload,
            fail_open=fail_open,
            maxlen=maxlen,
        )
    try:
        from dataplane.node.netfilterqueue_backend import PlainQueue
    except ImportError as error:
        raise KernelError(
            f"--backend netfilterqueue: {error}; install libnetfilter-queue1 and the NetfilterQueue package"
        ) from None
    return PlainQueue(worker, number, marks=marks, offload=offload, fail_open=fail_open, maxlen=maxlen)


def open_proc() -> int:
    """The proc file of this network namespace that `read_stats` reads. KernelError without queues."""
    try:
        return os.open("/proc/thread-self/net/netfilter/nfnetlink_queue", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise KernelError(
            f"/proc/net/netfilter/nfnetlink_queue: {error.strerror}; the kernel needs "
            "CONFIG_NETFILTER_NETLINK_QUEUE"
        ) from None


def read_stats(proc: int) -> dict[int, QueueStats]:
    """Every queue of the namespace that `proc`, the open proc file, belongs to.

    Columns: queue, portid, depth, copy mode, copy range, dropped, user dropped, last id, 1
    (net/netfilter/nfnetlink_queue.c, seq_show).
    """
    text = b""
    while chunk := os.pread(proc, 65536, len(text)):
        text += chunk
    known = {}
    for line in text.decode("ascii").splitlines():
        fields = [int(field) for field in line.split()]
        if len(fields) >= 8:
            known[fields[0]] = QueueStats(fields[0], fields[2], fields[5], fields[6])
    return known
