"""The flow log: a line for each flow that is judged, each packet denied, and each flow that ends.

Three threads share the work. The event loop's takes verdict events out of the rings, as for any other
reader, and keeps them within the limits. Ours turns them into lines, hears from the kernel which flows
have ended, and writes; it may wait for a disk, they may not.
"""

from __future__ import annotations

import json
import os
import select
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from dataplane._engine import judge_flow
from dataplane._rules import RuleTable
from dataplane.enforcement import Enforcement
from dataplane.errors import KernelError
from dataplane.model import Key
from dataplane.node.conntrack import EndedFlows, LiveFlow
from dataplane.observe.events import describe_ends, describe_event, describe_verdict, has_ports
from dataplane.observe.flowlog import Limit, LineFile
from dataplane.observe.live import CAPTURE
from dataplane.observe.log import get_logger
from dataplane.reasons import Reason
from dataplane.verdict import Event, Flow

Names = Mapping[bytes, Key]

TELL_SECONDS = 10.0  # how often is told what was suppressed or lost
WAITING = 65536  # events that wait for our thread at most
STOP_SECONDS = 2.0
END = "end"  # the kind of a limit, beside the reasons
# What passes so is told packet by packet: it says nothing of its flow.
_KINDS = {Reason.AUDIT: "audit", Reason.HOOK: "hook"}
# Allowed without a rule being asked, packet by packet: no flow of anybody's begins with them.
_NO_FLOW = {Reason.NEIGHBOUR_DISCOVERY, Reason.RELATED}


class FlowLog:
    """Writes while `run` runs. `lines`, `suppressed` and `lost` are there to be counted."""

    def __init__(
        self, enforcement: Enforcement, names: Callable[[], Names], target: str, rate: float
    ) -> None:
        """`names`: the pods that addresses belong to. `rate`: lines per second of each reason, 0: all."""
        self.lines: Counter[str] = Counter()  # written, by event
        self._enforcement = enforcement
        self._names = names
        self._node = enforcement.config.node_name
        self._log = get_logger()
        self._file = LineFile(target, self._log)
        self._verdicts, self._ends = Limit(rate), Limit(rate)
        self._lost = Counter(reader=0, ring=0, kernel=0)
        self._waiting: deque[tuple[Event, Names]] = deque()
        self._wake = -1
        self._stopping = False
        self._told: Counter[tuple[str, str]] = Counter()
        self._policed: tuple[RuleTable | None, frozenset[bytes]] = (None, frozenset())

    @property
    def suppressed(self) -> Mapping[str, int]:
        """Lines over the limit, by reason; `end` for flows that ended."""
        # dict: a copy in one step, whoever counts meanwhile.
        return Counter(dict(self._verdicts.suppressed)) + Counter(dict(self._ends.suppressed))

    @property
    def lost(self) -> Mapping[str, int]:
        """Lines that should have been there. write: the file could not be written. reader: we were too slow.
        ring: the queue threads were too busy to keep the event. kernel: times that it had to leave out flows
        that ended; nobody knows how many."""
        return Counter(dict(self._lost)) + Counter(write=self._file.lost)

    def open(self) -> None:
        """InputError when the file cannot be written to."""
        self._file.open()

    async def run(self) -> None:
        """Write until cancelled."""
        ended = self._listen()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        thread = threading.Thread(target=self._work, args=(ended,), name="podgate-flowlog", daemon=True)
        thread.start()
        try:
            with self._enforcement.live.read(CAPTURE["misses"], self._wanted) as reader:
                while True:
                    events, names = await reader.take(), self._names()
                    room = WAITING - len(self._waiting)
                    self._waiting.extend((event, names) for event in events[:room])
                    self._lost["reader"] += max(0, len(events) - room)
                    self._lost["ring"] = reader.lost.ring
                    os.eventfd_write(self._wake, 1)
        finally:
            self._stopping = True
            os.eventfd_write(self._wake, 1)
            thread.join(STOP_SECONDS)  # a pipe that nobody reads may hold it up for ever
            if not thread.is_alive():
                self._file.close()
                os.close(self._wake)
                if ended is not None:
                    ended.close()

    def _listen(self) -> EndedFlows | None:
        try:
            ended = EndedFlows(self._enforcement.config.marks)
        except KernelError as error:
            self._log.error("flow log without the ends of flows", problem=str(error))
            return None
        if not ended.counted:
            self._log.info(
                "flow log without packets and bytes: the kernel does not count them",
                do="sysctl net.netfilter.nf_conntrack_acct=1",
            )
        return ended

    def _wanted(self, event: Event) -> bool:
        reason = event.verdict.reason
        return reason not in _NO_FLOW and self._verdicts.allow(reason.text)

    # --- our thread -----------------------------------------------------------------------------------

    def _work(self, ended: EndedFlows | None) -> None:
        try:
            self._write(ended)
        except Exception as error:  # packets are judged all the same; what is not written counts as lost
            self._log.error("flow log has stopped", problem=str(error) or type(error).__name__)

    def _write(self, ended: EndedFlows | None) -> None:
        tell_at = time.monotonic() + TELL_SECONDS
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        if ended is not None:
            poll.register(ended.fileno(), select.POLLIN)
        while True:
            poll.poll(1000)
            stopping = self._stopping
            with suppress(BlockingIOError):
                os.eventfd_read(self._wake)
            records = [*self._begun(), *(self._over(ended) if ended is not None else ())]
            now = time.monotonic()
            if stopping or now >= tell_at:
                records += self._untold()
                tell_at = now + TELL_SECONDS
            if records:
                self._put(records)
            else:
                self._file.look()
            if stopping:
                return

    def _put(self, records: list[dict[str, Any]]) -> None:
        lines = [json.dumps(record, separators=(",", ":")).encode() + b"\n" for record in records]
        written = self._file.write(lines)
        for record in records[:written]:
            self.lines[record["event"]] += 1

    def _begun(self) -> Iterator[dict[str, Any]]:
        while self._waiting:
            event, names = self._waiting.popleft()
            verdict = event.verdict
            kind = "deny" if not verdict.allow else _KINDS.get(verdict.reason, "flow")
            yield {"event": kind, **describe_event(event, names, self._node)}

    def _over(self, ended: EndedFlows) -> Iterator[dict[str, Any]]:
        table = self._enforcement.publisher.table
        flows = ended.read()
        self._lost["kernel"] = ended.overruns
        if table is None:
            return
        names, policed = self._names(), self._policed_addresses(table)
        for flow in flows:
            # The originator before, the responder after translation: what pods' interfaces saw.
            if flow.src not in policed and flow.reply_src not in policed:
                continue
            if self._ends.allow(END):
                yield self._describe_end(flow, table, names)

    def _policed_addresses(self, table: RuleTable) -> frozenset[bytes]:
        """Those of isolated pods: nothing is said of the others when their flows begin."""
        if self._policed[0] is not table:
            pods = [pod for pod in table.pods if pod.ingress is not None or pod.egress is not None]
            self._policed = (table, frozenset(address for pod in pods for address in pod.addresses))
        return self._policed[1]

    def _describe_end(self, flow: LiveFlow, table: RuleTable, names: Names) -> dict[str, Any]:
        src, sport, dst, dport = flow.src, flow.sport, flow.reply_src, flow.reply_sport
        verdict = judge_flow(table, src, dst, flow.protocol, sport, dport)
        ends = Flow(src, dst, flow.protocol, sport, dport, has_ports(flow.protocol))
        return {
            "event": END,
            "ts": _now(),
            **describe_verdict(verdict),
            **describe_ends(ends, names),
            "node": self._node,
            "generation": table.generation,
            "packets": flow.packets,
            "bytes": flow.bytes,
            "reply_packets": flow.reply_packets,
            "reply_bytes": flow.reply_bytes,
        }

    def _untold(self) -> Iterator[dict[str, Any]]:
        """What was suppressed or lost since it was told last."""
        for kind, counts in (("suppressed", self.suppressed), ("lost", self.lost)):
            for what, count in counts.items():
                more = count - self._told[kind, what]
                if more:
                    self._told[kind, what] = count
                    yield {
                        "event": kind,
                        "ts": _now(),
                        **dict.fromkeys(_FIELDS),
                        "reason": what if kind == "suppressed" else None,
                        "where": what if kind == "lost" else None,
                        "count": more,
                        "node": self._node,
                    }


_FIELDS = (
    *("verdict", "reason", "direction", "policy", "src", "src_port", "dst", "dst_port", "protocol"),
    *("src_pod", "dst_pod"),
)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")
