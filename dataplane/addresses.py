"""IP addresses and prefixes as packed bytes: 4 bytes for IPv4, 16 for IPv6, network order.

Packed bytes compare, hash and reach the compiled engine without conversion; `ipaddress` objects
take about ten times as long to make, which counts with 100,000 prefixes.
"""

from __future__ import annotations

import socket
from typing import NamedTuple

BITS = {4: 32, 16: 128}
MAPPED = bytes(10) + b"\xff\xff"  # ::ffff:0:0/96, IPv4 in IPv6 clothes (RFC 4291 §2.5.5.2)


class Prefix(NamedTuple):
    """A network: its lowest address and the length of its prefix in bits."""

    network: bytes
    length: int

    @property
    def family(self) -> int:
        """4 or 6."""
        return 4 if len(self.network) == 4 else 6

    @property
    def last(self) -> bytes:
        """The highest address of the network."""
        bits = BITS[len(self.network)]
        span = (1 << (bits - self.length)) - 1
        return (int.from_bytes(self.network) | span).to_bytes(len(self.network))

    def __contains__(self, address: object) -> bool:
        return (
            isinstance(address, bytes)
            and len(address) == len(self.network)
            and self.network <= address <= self.last
        )

    def covers(self, other: Prefix) -> bool:
        """Whether every address of `other` is in this prefix."""
        return other.length >= self.length and other.network in self

    def __str__(self) -> str:
        return f"{format_address(self.network)}/{self.length}"


def family_of(address: bytes) -> int:
    """4 or 6."""
    return 4 if len(address) == 4 else 6


def format_address(address: bytes) -> str:
    """The usual text of a packed address."""
    return socket.inet_ntop(socket.AF_INET if len(address) == 4 else socket.AF_INET6, address)


def parse_address(text: object) -> bytes:
    """A packed address from its text. ValueError says what is wrong with it."""
    if not isinstance(text, str):
        raise ValueError(f"{text!r} is not an IP address")
    try:
        packed = socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)
    except (OSError, ValueError):  # ValueError: an embedded NUL
        raise ValueError(f"{text!r} is not an IP address") from None
    if packed.startswith(MAPPED):
        # The packets of such an "IPv6" address are IPv4 packets; a rule on it would never match.
        raise ValueError(f"{text!r} is an IPv4-mapped IPv6 address; write it as IPv4")
    return packed


def parse_prefix(text: object) -> tuple[Prefix, bool]:
    """A prefix from `address/length`, or from a bare address (its length is then full).

    The second value tells whether host bits were set; they are cleared, as the API server's own
    reading of a CIDR does (net.ParseCIDR). ValueError says what is wrong.
    """
    if not isinstance(text, str):
        raise ValueError(f"{text!r} is not a CIDR")
    head, slash, tail = text.partition("/")
    address = parse_address(head)
    bits = BITS[len(address)]
    if not slash:
        return Prefix(address, bits), False
    if not (tail.isascii() and tail.isdigit()) or len(tail) > 3 or (len(tail) > 1 and tail[0] == "0"):
        raise ValueError(f"{text!r} is not a CIDR: the prefix length must be a number")
    length = int(tail)
    if length > bits:
        raise ValueError(f"{text!r} is not a CIDR: the prefix length must be at most {bits}")
    number = int.from_bytes(address)
    network = number >> (bits - length) << (bits - length)
    return Prefix(network.to_bytes(len(address)), length), network != number
