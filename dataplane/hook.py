"""What a hook file of `podgate intercept` imports.

    from dataplane.hook import ALLOW, DROP, Seen, delay

    def on_packet(packet, seen):
        if seen.dst_port == 53:
            return delay(0.2)

`on_packet` is called for every packet that FILTER selects, one after the other. `packet` is a scapy
packet, IP or IPv6 outermost (a `Raw` layer where that is cut short); `seen` says what the rules say of it.
What it returns decides:

    None              no opinion: as the rules say
    ALLOW, DROP       the packet goes on, or not, whatever the rules say
    delay(seconds)    it waits, then the rules of that moment decide
    a scapy packet    goes on in the place of `packet`; lengths and checksums are made to fit
    bytes             the same, exactly as they are, from the IP header on
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


class Decision(enum.Enum):
    """A verdict of a hook."""

    ALLOW = "allow"
    DROP = "drop"


ALLOW, DROP = Decision.ALLOW, Decision.DROP


@dataclass(frozen=True, slots=True)
class Delay:
    """How long a packet waits."""

    seconds: float


def delay(seconds: float) -> Delay:
    """Let the packet wait for 0 to 10 seconds; then the rules of that moment decide."""
    return Delay(seconds)


class Seen:
    """What the engine proposes for a packet: the fields of a record of `podgate trace` as attributes.

    `verdict` ("allow" or "deny"), `reason`, `direction`, `policy`, `rule`, `egress`, `ingress`, `src`,
    `src_port`, `src_pod`, `dst`, `dst_port`, `dst_pod`, `protocol`, `tcp_flags`, `icmp_type`, `reply`,
    `bytes`, `generation`, `ts` and others; None where a packet has no such thing. `record` has all.
    """

    def __init__(self, record: Mapping[str, Any], counts: Counter[str]) -> None:
        self.record = record
        self._counts = counts

    def __getattr__(self, name: str) -> Any:
        record = self.__dict__.get("record", {})
        if name not in record:
            raise AttributeError(f"a packet has no {name!r}; it has {', '.join(sorted(record))}")
        return record[name]

    def count(self, name: str, amount: int = 1) -> int:
        """Add to a count of your own, which is told at the end; its value now."""
        self._counts[str(name)] += amount
        return self._counts[str(name)]
