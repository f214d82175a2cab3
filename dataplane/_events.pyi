from collections.abc import Callable, Sequence
from typing import Self, final

from dataplane._engine import Worker
from dataplane._pcap import Filter
from dataplane.policy.compile import PodEntry
from dataplane.verdict import Event

@final
class EventFilter:
    room: int
    @property
    def missed(self) -> int: ...
    def __new__(
        cls,
        *,
        capture: int = 3,
        verdicts: int = 3,
        reasons: int = ...,
        directions: int = 7,
        packets: Filter | None = None,
        pods: Callable[[Sequence[PodEntry]], bytes] | None = None,
    ) -> Self: ...

def take(worker: Worker, limit: int, filters: list[EventFilter]) -> list[Event]: ...
