"""A user's hook file: loaded, called for packets, and what it returns put into words for the agent."""

from __future__ import annotations

import base64
import inspect
import io
import linecache
import sys
import tokenize
import traceback
import types
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dataplane.errors import InputError
from dataplane.hook import Decision, Delay, Seen
from dataplane.hook_answers import LONGEST_ERROR, LONGEST_PACKET
from dataplane.observe.decode import scapy_packet

FUNCTION = "on_packet"
_MODULE = "podgate_hook"


class HookFile:
    """The function `on_packet` of a Python file. `say` is called with texts for the file's author."""

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        """Run the file. InputError with file, line and error when that fails or the function is missing."""
        self.path = path
        self._name = "<stdin>" if str(path) == "-" else str(path)
        self.counts: Counter[str] = Counter()  # the hook's own
        self._say = say
        self._failed: set[tuple[str, str]] = set()
        self._function = self._load()

    def answer(self, record: Mapping[str, Any], packet: bytes) -> dict[str, Any]:
        """Call the function; its answer in the form of `dataplane.hook_answers`, without the number.

        Whatever goes wrong in it becomes the answer `error`.
        """
        try:
            wish = self._function(scapy_packet(packet), Seen(record, self.counts))
            return _in_words(wish)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit too: one packet must not end it
            return {"error": self._failure(error)}

    @staticmethod
    def warm_up() -> None:
        """Load scapy, which takes a second: better now than when packets wait."""
        scapy_packet(b"")

    def _load(self) -> Callable[[Any, Seen], Any]:
        module = types.ModuleType(_MODULE)
        module.__file__ = self._name
        sys.modules[_MODULE] = module  # dataclasses and pickle look there
        sys.path.append(str(self.path.absolute().parent))  # its helpers; they hide nothing
        try:
            text = self._text()
            # Tracebacks show lines of what can be read only once, too.
            lines = text.splitlines(keepends=True)
            linecache.cache[self._name] = (len(text), None, lines, self._name)
            code = compile(text, self._name, "exec")
        except OSError as error:
            raise InputError(f"--hook {self.path}: {error.strerror or error}") from None
        except (SyntaxError, ValueError) as error:  # ValueError: null bytes
            line = f":{error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
            said = error.msg if isinstance(error, SyntaxError) else error
            raise InputError(f"--hook {self.path}{line}: {type(error).__name__}: {said}") from None
        try:
            exec(code, module.__dict__)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise InputError(f"--hook {self._where(error)}: {_named(error)}") from None
        function = getattr(module, FUNCTION, None)
        if not callable(function):
            raise InputError(f"--hook {self.path}: defines no function {FUNCTION}(packet, seen)")
        if inspect.iscoroutinefunction(function):
            raise InputError(f"--hook {self.path}: {FUNCTION} is async; it must be an ordinary function")
        try:
            inspect.signature(function).bind(None, None)
        except TypeError:
            raise InputError(f"--hook {self.path}: {FUNCTION} must take (packet, seen)") from None
        except ValueError:  # a compiled function that does not tell
            pass
        return function  # type: ignore[no-any-return]

    def _text(self) -> str:
        raw = sys.stdin.buffer.read() if self._name == "<stdin>" else self.path.read_bytes()
        encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
        return raw.decode(encoding)

    def _own_frames(self, error: BaseException) -> traceback.StackSummary:
        """The part of a traceback that lies in the file."""
        frames = traceback.extract_tb(error.__traceback__)
        return traceback.StackSummary.from_list([one for one in frames if one.filename == self._name])

    def _where(self, error: BaseException) -> str:
        frames = self._own_frames(error)
        return f"{self._name}:{frames[-1].lineno}" if frames else self._name

    def _failure(self, error: BaseException) -> str:
        """The error in one line. The first of its kind is shown with the lines that led to it."""
        where, said = self._where(error), _named(error)
        kind = (where, type(error).__name__)
        if kind not in self._failed:
            self._failed.add(kind)
            frames = "".join(self._own_frames(error).format()).rstrip()
            self._say(f"-- the hook failed; the rules decide about such packets --\n{frames}\n{said}".strip())
        return f"{where}: {said}"


def _named(error: BaseException) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".rstrip(": ").split())
    return text if len(text) <= LONGEST_ERROR else f"{text[:LONGEST_ERROR]}…"


def _in_words(wish: object) -> dict[str, Any]:
    from scapy.packet import Packet

    if wish is None:
        return {}
    if isinstance(wish, Decision):
        return {"verdict": wish.value}
    if isinstance(wish, Delay):
        return {"delay": float(wish.seconds)}
    if isinstance(wish, Packet):
        wish = rebuilt(wish)
    if isinstance(wish, (bytes, bytearray)):
        if len(wish) > LONGEST_PACKET:
            raise ValueError(
                f"a packet of {len(wish):,} bytes: there is none of more than {LONGEST_PACKET:,}"
            )
        return {"packet": base64.b64encode(wish).decode()}
    raise TypeError(
        f"{FUNCTION} returned {type(wish).__name__}; it returns None, ALLOW, DROP, delay(seconds), a packet"
        " or bytes"
    )


# What scapy fills in where it is not given, by layer.
_COMPUTED = {
    "IP": ("ihl", "len", "chksum"),
    "IPv6": ("plen",),
    "TCP": ("dataofs", "chksum"),
    "UDP": ("len", "chksum"),
    "ICMP": ("chksum",),
    "SCTP": ("chksum",),
}


def rebuilt(packet: Any) -> bytes:
    """The bytes of a scapy packet, its lengths and checksums computed anew.

    What an ICMP error quotes stays as it was, and so does what a fragment carries: its checksum is of
    the whole datagram.
    """
    from scapy.layers.inet import IP
    from scapy.layers.inet6 import IPv6ExtHdrFragment, _ICMPv6
    from scapy.packet import NoPayload

    copy = packet.copy()
    layer = copy
    while not isinstance(layer, NoPayload):
        name = type(layer).__name__
        if name.endswith(("error", "error6")):
            break
        fields = ("cksum",) if isinstance(layer, _ICMPv6) else _COMPUTED.get(name, ())
        for field in fields:
            layer.delfieldval(field)
        if isinstance(layer, IPv6ExtHdrFragment) or (type(layer) is IP and (layer.frag or layer.flags.MF)):
            break
        layer = layer.payload
    return bytes(copy)
