"""What a user's hook may answer about a packet, as it comes from another process: checked, word by word.

An answer is one JSON object. `id` is the packet's number; at most one of the others is there, and none
means that the hook has no opinion.

    verdict   "allow" or "drop"
    packet    base64 of the packet that goes on in its place
    delay     seconds, after which the rules of that moment decide
    error     what went wrong in the hook, in words
"""

from __future__ import annotations

import base64
import binascii
import enum
import json
from dataclasses import dataclass

from dataplane._packet import decode_packet
from dataplane.reasons import Reason

LONGEST_DELAY = 10.0  # seconds
LONGEST_PACKET = 0xFFFF  # bytes; in base64 it has room in one message of a dialogue
LONGEST_ERROR = 200  # characters
MOST_NUMBER = 1 << 53  # what every JSON reader keeps exactly


class Wish(enum.StrEnum):
    """What a hook wants of a packet."""

    ENGINE = "engine"  # no opinion: as the rules say
    ALLOW = "allow"
    DROP = "drop"
    REWRITE = "rewrite"
    DELAY = "delay"
    ERROR = "error"  # it failed: as the rules say


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer about the packet `number`. `packet`, `delay` and `error` belong to their wishes."""

    number: int
    wish: Wish
    packet: bytes = b""
    delay: float = 0.0
    error: str = ""


def packet_number(message: object) -> int:
    """The packet that an answer is about. ValueError when it does not say."""
    number = message.get("id") if isinstance(message, dict) else None
    if type(number) is not int or not 0 <= number < MOST_NUMBER:
        raise ValueError("an answer must be an object with the packet's number as `id`")
    return number


def read_json(text: str) -> object:
    """The value that a text is. ValueError when it is none, or nested without end."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("an answer is nested too deeply") from None


def read_answer(message: object) -> Answer:
    """An answer as it was decoded from JSON. ValueError says what is wrong with it."""
    number = packet_number(message)
    assert isinstance(message, dict)
    words = sorted(map(str, message.keys() - {"id"}))
    if not words:
        return Answer(number, Wish.ENGINE)
    if len(words) > 1:
        raise ValueError(f"an answer has one wish, not {len(words)}")
    word, value = words[0], message[words[0]]
    if word == "verdict":
        if value not in ("allow", "drop"):
            raise ValueError("a verdict must be allow or drop")
        return Answer(number, Wish(value))
    if word == "packet":
        return Answer(number, Wish.REWRITE, packet=_bytes(value))
    if word == "delay":
        return Answer(number, Wish.DELAY, delay=_seconds(value))
    if word == "error":
        return Answer(number, Wish.ERROR, error=" ".join(str(value)[:LONGEST_ERROR].split()))
    raise ValueError("an answer's wish must be verdict, packet, delay or error")


def _bytes(value: object) -> bytes:
    if not isinstance(value, str):
        raise ValueError("a packet must be base64 text")
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("a packet must be base64 text") from None


def _seconds(value: object) -> float:
    # No bool, no NaN, and no integer that is too large for a float.
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= LONGEST_DELAY:
        return float(value)
    raise ValueError(f"a delay must be 0 to {LONGEST_DELAY:g} seconds")


def check_rewritten(old: bytes, new: bytes, longest: int) -> None:
    """Whether `new` may go on in the place of the whole packet `old`. ValueError says why not.

    It must be one packet of the same flow: its connection is known to the kernel by the old addresses
    and ports, and rules were asked about those. `longest`: the MTU of the way out; what came longer was
    put together of fragments, and may leave so.
    """
    if len(new) > max(longest, len(old)):
        raise ValueError(f"{len(new)} bytes are more than the way out takes ({longest})")
    before, after = decode_packet(old), decode_packet(new)
    if after.reason is not Reason.NONE:
        raise ValueError(f"the rewritten packet cannot be read ({after.reason.text})")
    if _said_length(new) != len(new):
        raise ValueError(f"its header says {_said_length(new)} bytes, and it has {len(new)}")
    if (before.flow, before.inner) != (after.flow, after.inner):
        raise ValueError("a rewritten packet keeps its addresses, protocol and ports")


def _said_length(packet: bytes) -> int:
    """The length in the IP header of a packet that can be read; a jumbogram says 40."""
    if packet[0] >> 4 == 4:
        return int.from_bytes(packet[2:4])
    return 40 + int.from_bytes(packet[4:6])
