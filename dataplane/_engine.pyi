from collections.abc import Callable, Sequence
from typing import Self, final

from dataplane._rules import RuleTable
from dataplane.policy.compile import PodEntry
from dataplane.reasons import Reason
from dataplane.verdict import End as End
from dataplane.verdict import Event as Event
from dataplane.verdict import Packet as Packet
from dataplane.verdict import Verdict as Verdict

def judge(
    table: RuleTable | None,
    packet: bytes,
    *,
    indev: int = 0,
    outdev: int = 0,
    hook: int = 2,
    reply: bool = False,
    wire: int | None = None,
) -> Verdict: ...
def judge_flow(
    table: RuleTable | None, src: bytes, dst: bytes, protocol: int, sport: int, dport: int
) -> Verdict: ...

@final
class Publisher:
    on_retired: Callable[[RuleTable], None] | None
    def __new__(cls) -> Self: ...
    @property
    def table(self) -> RuleTable | None: ...
    @property
    def held(self) -> int: ...
    def publish(self, table: RuleTable | None) -> None: ...
    def pods(self, generation: int) -> tuple[PodEntry, ...] | None: ...
    def quiesced(self) -> bool: ...

@final
class Worker:
    @property
    def publisher(self) -> Publisher: ...
    capture: int
    keep_bytes: bool
    reject: bool
    @property
    def audit(self) -> bool: ...
    @property
    def events_lost(self) -> int: ...
    def __new__(
        cls,
        publisher: Publisher,
        *,
        cache_entries: int = 65536,
        ring_entries: int = 0,
        seed: int | None = None,
        observer: bool = False,
        audit: bool = False,
    ) -> Self: ...
    def judge(
        self,
        packet: bytes,
        *,
        indev: int = 0,
        outdev: int = 0,
        hook: int = 2,
        reply: bool = False,
        wire: int | None = None,
    ) -> Verdict: ...
    def propose(
        self,
        packet: bytes,
        *,
        indev: int = 0,
        outdev: int = 0,
        hook: int = 2,
        reply: bool = False,
        wire: int | None = None,
    ) -> Event: ...
    def override(
        self,
        packet: bytes,
        allow: bool,
        *,
        indev: int = 0,
        outdev: int = 0,
        hook: int = 2,
        reply: bool = False,
        wire: int | None = None,
    ) -> Event: ...
    def enter(self) -> None: ...
    def leave(self) -> None: ...
    def counters(self) -> dict[tuple[bool, str, Reason], tuple[int, int]]: ...
    def cache_stats(self) -> tuple[int, int]: ...
    def events(self, limit: int = 1024) -> list[Event]: ...
    def bench_judge(
        self, packets: Sequence[tuple[bytes, int, int, bool]], *, rounds: int = 1, burst: int = 64
    ) -> float: ...
