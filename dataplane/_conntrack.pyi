from collections.abc import Collection

from dataplane._rules import RuleTable

# (source, source port, destination, destination port), addresses packed
_End = tuple[bytes, int, bytes, int]
# (original, reply, protocol, (ICMP type, code, id), mark, status, timeout, zone, protocol
#  information, (packets, bytes, reply packets, reply bytes))
_Entry = tuple[
    _End,
    _End,
    int,
    tuple[int, int, int] | None,
    int,
    int,
    int,
    int,
    bytes,
    tuple[int, int, int, int] | None,
]

def sweep(
    table: RuleTable | None, egress: int, ingress: int, addresses: Collection[bytes] | None
) -> tuple[int, int]: ...
def dump(egress: int, ingress: int) -> list[_Entry]: ...
def parse(datagram: bytes, seq: int = 0, ended: bool = False) -> list[_Entry]: ...
def encode_clear(message: bytes, saved: int) -> bytes: ...
def has_few_flows() -> bool: ...
