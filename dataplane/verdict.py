"""What the compiled engine hands to Python: decoded packets, verdicts and events.

Addresses are packed bytes (`dataplane.addresses`); times are nanoseconds since the epoch.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, NamedTuple

from dataplane.addresses import BITS, Prefix, format_address
from dataplane.model import PROTOCOL_NAMES, Direction
from dataplane.reasons import Reason

if TYPE_CHECKING:
    from dataplane.policy.compile import PodEntry

EVERY_PORT = 0xFFFF
EVERY_PROTOCOL = 0xFF


class Flow(NamedTuple):
    """One direction of a flow. `src` and `dst` are empty where the packet was too short to say.

    Ports are 0 without `has_ports`, but for ICMP: `sport` is the identifier of messages that have
    one, `dport` is type * 256 + code.
    """

    src: bytes
    dst: bytes
    protocol: int
    sport: int
    dport: int
    has_ports: bool


class Packet(NamedTuple):
    """A decoded packet. Only `reason`, `flow` and `length` mean something unless `reason` is NONE."""

    reason: Reason  # NONE, MALFORMED or FRAGMENT
    flow: Flow
    inner: Flow | None  # the flow an ICMP error is about, as the quoted packet has it
    length: int  # bytes on the wire, network header included
    l4_offset: int
    hop_limit: int
    tcp_flags: int
    icmp_type: int
    icmp_code: int
    first_fragment: bool
    neighbour_discovery: bool


class End(NamedTuple):
    """One end of a flow as the engine judged it.

    `rule_id` is an index into `pod.egress.rules` or `pod.ingress.rules`, -1 when no rule matched.
    """

    pod: PodEntry | None
    reason: Reason
    rule_id: int


class Verdict(NamedTuple):
    """Allow or deny, with the reason in one word and what each end said.

    `direction` is the end that decided, None when neither did. `bits`: 1 the egress end was judged
    by its rules, 2 the ingress end was (what the kernel may remember of the flow). `audited`: why it
    would be denied, where only an audit lets it through.
    """

    allow: bool
    reason: Reason
    direction: Direction | None
    bits: int
    cached: bool
    egress: End
    ingress: End
    audited: Reason = Reason.NONE


class Event(NamedTuple):
    """A verdict as it happened. `packet` is as it was on the wire, whatever its direction.

    The pods of `verdict` are those of the table of `generation`. They are None (with `known`
    False) when that table is no longer among the publisher's recent ones; reasons and rule ids stay.
    `data`: the beginning of the packet from its network header on, where a reader asked for it.
    """

    when_ns: int  # CLOCK_REALTIME
    packet: Packet
    indev: int
    outdev: int
    hook: int  # NF_INET_LOCAL_IN 1, NF_INET_FORWARD 2
    reply: bool
    generation: int  # 0: there was no table
    known: bool
    verdict: Verdict
    data: bytes = b""


class Began(enum.IntEnum):
    """How a capture told which end opened a flow. Only `OPENED` flows began within the capture."""

    OPENED = 0  # its first packet says so (a SYN, an echo request), or says nothing else (UDP)
    ANSWERED = 1  # its first packet answers one that the capture lacks: a SYN-ACK, an echo reply
    BY_PORTS = 2  # the end with the service's port, or the lower one, is taken to have been asked
    BY_SENDER = 3  # the ports tell nothing: whoever was seen first is taken to have opened it


class Conversation(NamedTuple):
    """A flow of a capture with its verdict. `flow` is as its originator's packets have it.

    `packets` and `bytes` (of IP packets, headers included) are of the originator and of the replies;
    `related` counts ICMP errors about it, which are in neither. `answered`: the other end sent something
    that does not refuse it, as a TCP RST does. `opened` counts the packets that
    opened it, such as SYNs: a port that is used again gives no new flow. Times are nanoseconds.
    """

    flow: Flow
    began: Began
    opened: int
    first_ns: int
    last_ns: int
    packets: tuple[int, int]
    bytes: tuple[int, int]
    related: int
    answered: bool
    verdict: Verdict


class Allowed(NamedTuple):
    """A range of (protocol, port), as protocol * 65536 + port, and the rule that allows it."""

    first: int
    last: int
    rule_id: int

    def __str__(self) -> str:
        """The range in people's words, e.g. `80/TCP` or `every port`."""
        low, high = self.first >> 16, self.last >> 16
        if (self.first, self.last) == (0, EVERY_PROTOCOL << 16 | EVERY_PORT):
            return "every port"
        if low == high:
            return _ports(low, self.first & EVERY_PORT, self.last & EVERY_PORT)
        parts = []
        if self.first & EVERY_PORT:
            parts.append(_ports(low, self.first & EVERY_PORT, EVERY_PORT))
            low += 1
        tail = None
        if self.last & EVERY_PORT != EVERY_PORT:
            tail = _ports(high, 0, self.last & EVERY_PORT)
            high -= 1
        if low == high:
            parts.append(_ports(low, 0, EVERY_PORT))
        elif low < high:
            parts.append(f"protocols {low}-{high}")
        if tail:
            parts.append(tail)
        return ", ".join(parts)


class Interval(NamedTuple):
    """Addresses `first` to `last` that a rule set treats alike; what it does not list is denied."""

    first: bytes
    last: bytes
    allowed: tuple[Allowed, ...]

    @property
    def peer(self) -> str:
        """The addresses as a prefix where they are one, else as `first-last`."""
        low, high = int.from_bytes(self.first), int.from_bytes(self.last)
        span = high - low + 1
        if span & (span - 1) == 0 and low % span == 0:
            return str(Prefix(self.first, BITS[len(self.first)] - span.bit_length() + 1))
        return f"{format_address(self.first)}-{format_address(self.last)}"


def _ports(protocol: int, first: int, last: int) -> str:
    name = PROTOCOL_NAMES.get(protocol, f"protocol {protocol}")
    if (first, last) == (0, EVERY_PORT):
        return name
    return f"{first}/{name}" if first == last else f"{first}-{last}/{name}"
