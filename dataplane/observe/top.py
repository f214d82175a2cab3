"""What `podgate top` shows: rates, denials and talkers, made of records and answers as they come in.

It computes only: records are those of the agent's trace stream, statuses and flows its answers, and times
are seconds of one monotonic clock that the caller reads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dataplane.observe.lines import Record, decision, end, protocol

WINDOW_SECONDS = 10.0
MOST_DENIALS = 1000  # rows that are remembered; the one that was silent longest goes first
MOST_FLOWS = 50_000  # flows whose bytes are remembered between two answers
RECENT = 500  # records of the latest verdicts
_NO_VERDICT = "queue-full"  # a counter of packets that nobody judged

Ends = tuple[str, str, str]  # who, to whom (with the port that was asked for), protocol


class Rate:
    """A sum per second over the last `WINDOW_SECONDS`, or since it began if that is less."""

    def __init__(self) -> None:
        self._began: float | None = None
        self._steps: deque[tuple[float, float]] = deque()
        self._sum = 0.0

    def begin(self, now: float) -> None:
        """Counting begins: nothing has come before, whatever `add` is told later."""
        if self._began is None:
            self._began = now

    def add(self, now: float, amount: float = 1) -> None:
        self.begin(now)
        # Of each tenth of a second one step: a flood must not fill the memory.
        if self._steps and now - self._steps[-1][0] < 0.1:
            when, so_far = self._steps.pop()
            self._steps.append((when, so_far + amount))
        else:
            self._steps.append((now, amount))
        self._sum += amount

    def at(self, now: float) -> float:
        while self._steps and self._steps[0][0] <= now - WINDOW_SECONDS:
            self._sum -= self._steps.popleft()[1]
        if self._began is None or not self._steps:
            return 0.0
        return self._sum / min(WINDOW_SECONDS, max(now - self._began, 1.0))


@dataclass(slots=True)
class Denial:
    """Packets that one end of one pod denied for the same policies. `last` is the latest of them."""

    pod: str
    direction: str
    why: str
    verdict: str  # deny, or audit where it passed all the same
    last: Record
    packets: int = 0
    rate: Rate = field(default_factory=Rate)
    seen: float = 0.0

    @property
    def peer(self) -> str:
        """The other end of the latest packet, as `web → :5432 TCP SYN`."""
        return f"{end(self.last, 'src')} > {end(self.last, 'dst')}  {protocol(self.last)}"


@dataclass(slots=True)
class Talker:
    """All live flows from one end to one port of another, both ways. Bytes are None where nobody counts."""

    ends: Ends
    last: Mapping[str, Any]  # a row of the answer `flows`
    flows: int = 0
    packets: int | None = None
    bytes: int | None = None
    rate: float = 0.0  # bytes per second


@dataclass(frozen=True, slots=True)
class Overview:
    """The numbers above the tables."""

    verdicts: float  # per second, by the agent's counters
    by_reason: tuple[tuple[str, float], ...]  # the same for each reason, most first
    denied: float  # packets per second, of the records
    depth: int  # packets that wait in the queues now
    deepest: int  # … at most, since the view began
    dropped: int  # by full queues and sockets, since the agent began
    lost: int  # records that could not be shown


class Top:
    """The state of the view. One per filter: what was selected otherwise must not be mixed in."""

    def __init__(self, now: float) -> None:
        self.status: Mapping[str, Any] | None = None
        self.recent: deque[tuple[int, Record]] = deque(maxlen=RECENT)  # numbered, latest last
        self.lost = 0
        self._records = 0
        self._denied = Rate()
        self._denied.begin(now)
        self._began = now
        self._reasons: dict[str, Rate] = {}
        self._denials: dict[tuple[str, ...], Denial] = {}
        self._deepest = 0
        self._bytes: dict[tuple[Any, ...], int] = {}
        self._flows_known = False
        self._rates: dict[Ends, Rate] = {}
        self._talkers: list[Talker] = []

    def add_record(self, record: Record, now: float) -> None:
        """A record of the trace stream: a verdict, or how many were lost."""
        if "lost" in record:
            self.lost += record["lost"]
            return
        if "verdict" not in record:
            return  # the stream's beginning
        self._records += 1
        self.recent.append((self._records, record))
        if record["verdict"] == "deny" or record.get("would_deny"):
            self._add_denial(record, now)

    def _add_denial(self, record: Record, now: float) -> None:
        denied = record["verdict"] == "deny"
        direction = record.get("direction") or ""
        reason = str(record["reason"] if denied else record["would_deny"])
        policies = record.get("policies") or ()
        pod = _pod(record, direction)
        verdict = "deny" if denied else "audit"
        key = (verdict, direction, pod, reason, *policies)
        one = self._denials.pop(key, None)
        if one is None:
            if len(self._denials) >= MOST_DENIALS:
                del self._denials[next(iter(self._denials))]
            why = f"{reason} ({', '.join(policies)})" if policies else reason
            one = Denial(pod, direction, why, verdict, record)
            one.rate.begin(self._began)
        self._denials[key] = one  # the latest last
        one.packets += 1
        one.last, one.seen = record, now
        one.rate.add(now)
        if denied:
            self._denied.add(now)

    def add_status(self, status: Mapping[str, Any], now: float) -> None:
        """The agent's answer `status`. Counters of an agent that began anew count from nought."""
        before = self.status
        if before is None or before.get("pid") != status.get("pid"):
            self._reasons = {}
        else:
            # Only differences count: what was before the view began is no rate.
            known = before["counters"]
            for reason, packets in status["counters"].items():
                if more := max(packets - known.get(reason, 0), 0):
                    self._rate(reason, now).add(now, more)
        for reason in status["counters"]:
            self._rate(reason, now)
        self.status = status
        self._deepest = max(self._deepest, self._depth())

    def _rate(self, reason: str, now: float) -> Rate:
        if reason not in self._reasons:
            self._reasons[reason] = Rate()
            self._reasons[reason].begin(now)
        return self._reasons[reason]

    def _depth(self) -> int:
        return sum(queue["depth"] for queue in self.status["queues"]) if self.status else 0

    def add_flows(self, rows: Iterable[Mapping[str, Any]], now: float) -> None:
        """The agent's answer `flows`: all live flows that are selected."""
        talkers: dict[Ends, Talker] = {}
        counted: dict[tuple[Any, ...], int] = {}
        for row in rows:
            ends = (_host(row, "src"), end(row, "dst"), str(row["protocol"]))
            one = talkers.setdefault(ends, Talker(ends, row))
            one.flows += 1
            if row["bytes"] is None:
                continue
            size = row["bytes"] + (row["reply_bytes"] or 0)
            one.bytes = (one.bytes or 0) + size
            one.packets = (one.packets or 0) + row["packets"] + (row["reply_packets"] or 0)
            flow = (row["src"], row["src_port"], row["dst"], row["dst_port"], row["protocol"])
            if len(counted) < MOST_FLOWS:
                counted[flow] = size
                before = self._bytes.get(flow)
                # A flow that is new since the last answer has sent all of its bytes since then.
                more = size - before if before is not None and before <= size else size
                if more and (before is not None or self._flows_known):
                    self._rates.setdefault(ends, Rate()).begin(self._began)
                    self._rates[ends].add(now, more)
        # Where not all were remembered, one that is not known need not be new.
        self._bytes, self._flows_known = counted, len(counted) < MOST_FLOWS
        self._rates = {ends: rate for ends, rate in self._rates.items() if ends in talkers}
        self._talkers = list(talkers.values())

    # -- what is shown

    def overview(self, now: float) -> Overview:
        rates = [(name, rate.at(now)) for name, rate in self._reasons.items() if name != _NO_VERDICT]
        queues = self.status["queues"] if self.status else []
        return Overview(
            verdicts=sum(rate for _, rate in rates),
            by_reason=tuple(sorted(((name, rate) for name, rate in rates if rate), key=lambda one: -one[1])),
            denied=self._denied.at(now),
            depth=self._depth(),
            deepest=self._deepest,
            dropped=sum(queue["dropped"] + queue["user_dropped"] for queue in queues),
            lost=self.lost,
        )

    def denials(self, now: float) -> list[Denial]:
        """Those of the last seconds first, the most frequent of them first; then by their number."""
        return sorted(self._denials.values(), key=lambda one: (-one.rate.at(now), -one.packets, -one.seen))

    def talkers(self, now: float) -> list[Talker]:
        """Those that send the most now first, then by what they have sent, then by their flows."""
        for one in self._talkers:
            rate = self._rates.get(one.ends)
            one.rate = rate.at(now) if rate else 0.0
        return sorted(self._talkers, key=lambda one: (-one.rate, -(one.bytes or 0), -one.flows, one.ends))


def _pod(record: Record, direction: str) -> str:
    """Whose end denied: the receiver's for ingress, and the other way round where a reply was denied."""
    judged = (record.get(direction) or {}).get("pod") if direction else None
    side = "src" if (direction == "egress") is not bool(record.get("reply")) else "dst"
    return str(judged or _host(record, side))


def _host(row: Record, side: str) -> str:
    return str(row.get(f"{side}_pod") or row.get(side) or "?")


def question(record: Record) -> dict[str, str] | None:
    """The agent's `explain` for the flow of a record, as its query; None for what it cannot be asked.

    By address, since a pod may have several. A reply is asked for as the packet it answers.
    """
    asked, other = ("dst", "src") if not record.get("reply") else ("src", "dst")
    source, destination = record.get(other), record.get(asked)
    kind = str(record["protocol"])
    if kind in ("ICMP", "ICMPv6"):
        port = "ICMP"
    elif kind in ("TCP", "UDP", "SCTP") and record.get(f"{asked}_port"):
        port = f"{record[f'{asked}_port']}/{kind}"
    else:
        return None
    if not source or not destination:
        return None
    return {"from": str(source), "to": str(destination), "port": port}


def recorded(record: Record) -> str:
    """What a record, or a row of `flows`, says by itself."""
    who = f"{end(record, 'src')} > {end(record, 'dst')}  {protocol(record)}"
    return f"{record['verdict']}  {who}\n{decision(record)}"


def per_second(rate: float) -> str:
    """`0`, `0.3`, `12`, `1,234`: as many digits as mean something."""
    return f"{rate:.1f}" if 0.05 <= rate < 10 else f"{rate:,.0f}"


def size(count: float | None) -> str:
    """Bytes for people: `812 B`, `1.2 MB`; `-` where nobody counts."""
    if count is None:
        return "-"
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"
