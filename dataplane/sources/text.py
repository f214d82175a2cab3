"""YAML and JSON text to plain values, read as Kubernetes reads them and safe on hostile input.

PyYAML's own loaders follow YAML 1.1: `22:22` becomes 1342, `on` becomes true, a date becomes an
object. Here a plain scalar is null, true/false, a decimal number, or text, and keys are text. The
parser is libyaml; values are built from its events, so that depth, number of values and what
aliases expand to are bounded while reading, before memory is used.

A map with a key twice has two meanings. It becomes an `Unreadable` in its place: whoever looks at
it finds no map there, and the rest of the document goes on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

import yaml
from yaml.cyaml import CParser  # type: ignore[attr-defined]

MAX_DEPTH = 64  # Kubernetes objects need about 15
MAX_DOCUMENTS = 100_000  # in one file; each costs some 10 µs even when it is empty
MAX_VALUES = 6_000_000  # in one file: about 128 MiB of what kubectl prints as YAML
MAX_EXPANDED = 1_000_000  # values that aliases may stand for ("billion laughs")

_MAX_KNOWN = 65_536  # different scalars of which equal ones share one value

_TOO_MANY = f"more than {MAX_VALUES} values; split the file"
_MARKER = re.compile(r"^---(?=[ \t\r\n]|\Z)", re.MULTILINE)
# Possessive: a way back for each of a million lines takes gigabytes.
_DIRECTIVES = re.compile(r"(?:[ \t]*(?:#[^\n]*)?\r?(?:\n|\Z)|%[^\n]*(?:\n|\Z))++")
_INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9]{0,29})")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+)")
_WORDS: dict[str, object] = {"": None, "~": None, "null": None, "Null": None, "NULL": None}
_WORDS |= {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_NUMERIC = frozenset("0123456789+-.")
_TAG = "tag:yaml.org,2002:"
_TAGGED = {"null": type(None), "bool": bool, "int": int, "float": float}


class TextError(ValueError):
    """A document cannot be parsed: one line, with the line number where there is one."""


class _LimitError(TextError):
    """A bound is broken: reading it another way would not help."""


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Stands where a value has no single meaning."""

    reason: str

    def __repr__(self) -> str:
        return self.reason


class Located(dict[str, object]):
    """A map that knows the line of its file it begins in: a document, or an item of a List."""

    __slots__ = ("line",)
    line: int


def documents(data: bytes, *, only_json: bool = False) -> Iterator[object | TextError]:
    """The documents of a file in order; one that cannot be parsed is given as a TextError.

    Empty documents are left out. JSON is tried first where the text looks like it: it is also YAML,
    but is read far quicker as what it is.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        yield TextError(f"not UTF-8 text: byte {error.start} is {data[error.start]:#04x}; save it as UTF-8")
        return
    if only_json or text.lstrip()[:1] in ("{", "["):
        try:
            values = list(_json(text))
        except TextError as error:
            if only_json or isinstance(error, _LimitError):
                yield error
                return
        else:
            yield from values
            return
    line = number = 0
    size = _Size()
    for piece in _pieces(text):
        held = 0
        for document in _yaml(piece, line, size):
            if number + held == MAX_DOCUMENTS:
                yield _too_many_documents()
                return
            yield document
            if isinstance(document, _LimitError):
                return
            held += 1
        number += max(held, 1)  # an empty one costs as much
        if number > MAX_DOCUMENTS:
            yield _too_many_documents()
            return
        line += piece.count("\n")


def _too_many_documents() -> TextError:
    return _LimitError(f"more than {MAX_DOCUMENTS} documents; split the file")


# --- JSON -----------------------------------------------------------------------------------------


def _unique(pairs: list[tuple[str, object]]) -> object:
    whole = dict(pairs)
    if len(whole) == len(pairs):
        return whole
    seen: set[str] = set()
    twice = ""
    for twice, _ in pairs:
        if twice in seen:
            break
        seen.add(twice)
    return Unreadable(f"a map with the key {twice[:80]!r} twice")


def _number(text: str) -> object:
    return int(text) if len(text) <= 30 else Unreadable("a number beyond all bounds")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_int=_number)
_SPACE = re.compile(r"[ \t\r\n]*")


def _json(text: str) -> Iterator[object]:
    """One JSON value, or several one after another (as `jq` prints them)."""
    # Before memory is used, and so counted in texts too: at least as many as there are.
    if sum(map(text.count, ",[{")) > MAX_VALUES:
        raise _LimitError(_TOO_MANY)
    position = _SPACE.match(text).end()  # type: ignore[union-attr]  # it matches anything
    number = 0
    line = 1 + text.count("\n", 0, position)
    while position < len(text):
        start = position
        number += 1
        if number > MAX_DOCUMENTS:
            raise _too_many_documents()
        try:
            value, position = _DECODER.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise TextError(f"line {error.lineno}: not JSON: {error.msg}") from None
        except RecursionError:
            raise TextError("nested too deep") from None
        if isinstance(value, dict):
            value = Located(value)
            value.line = line
        yield value
        position = _SPACE.match(text, position).end()  # type: ignore[union-attr]
        line += text.count("\n", start, position)


# --- YAML -----------------------------------------------------------------------------------------


def _pieces(text: str) -> Iterator[str]:
    """The text cut at its `---` lines, so that an error in one document spares the others.

    YAML allows `---` at the start of a line as nothing but a document marker, not even inside
    quotes (YAML 1.2 §9.1.2, c-forbidden).
    """
    begin = 0
    for match in _MARKER.finditer(text):
        start = match.start()
        # Directives and comments belong to the document that follows.
        if not _DIRECTIVES.fullmatch(text, begin, start) and start > begin:
            yield text[begin:start]
            begin = start
    yield text[begin:]


def _yaml(text: str, line: int, size: _Size) -> Iterator[object | TextError]:
    """The documents of one piece; `line` lines and `size` come before it in the file."""
    parser = CParser(text)
    builder = _Builder(line, size)
    try:
        while (event := parser.get_event()) is not None:
            builder.feed(event)
            if isinstance(event, yaml.DocumentEndEvent):
                if builder.document is not None:
                    yield builder.document
                builder = _Builder(line, size)
    except TextError as error:
        mark = event.start_mark if event is not None else None
        where = f"line {line + mark.line + 1}: " if mark is not None else ""
        yield type(error)(f"{where}{error}")
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {line + mark.line + 1}: " if mark is not None else ""
        yield TextError(f"{where}not YAML: {error.problem or error.context}")
    except yaml.YAMLError as error:
        yield TextError(f"not YAML: {' '.join(str(error).split())[:200]}")
    finally:
        parser.dispose()


@dataclass(slots=True)
class _Size:
    """How many values were read from a file so far."""

    values: int = 0


class _Frame:
    """A map or list under construction."""

    __slots__ = ("anchor", "first", "items", "key", "members", "merges", "of_list", "twice")

    def __init__(
        self, anchor: str | None, first: int, members: dict[str, object] | None, *, of_list: bool
    ) -> None:
        self.anchor = anchor
        self.first = first  # the number of values before it
        self.items: list[object] = []
        self.members = members  # None: it is a list
        self.of_list = of_list  # the `items` of a document, and so the objects of a List
        self.key: str | None = None  # waits for its value
        self.merges: list[object] = []  # values of the key `<<`
        self.twice = ""

    def finish(self) -> object:
        if self.members is None:
            return self.items
        for merge in self.merges:
            # A map's own keys, and earlier maps, win (yaml.org/type/merge).
            for each in merge if isinstance(merge, list) else (merge,):
                if not isinstance(each, dict):
                    return Unreadable("a map whose key '<<' is not a map")
                for name, value in each.items():
                    self.members.setdefault(name, value)
        return Unreadable(f"a map with {self.twice} twice") if self.twice else self.members


class _Builder:
    """One document from its events, without recursion: depth costs no stack."""

    def __init__(self, line: int, size: _Size) -> None:
        self.document: object = None
        self._line = line  # how many lines come before it in the file
        self._open: list[_Frame] = []
        self._anchors: dict[str, tuple[object, int]] = {}  # value, how many values it stands for
        self._size = size
        self._expanded = 0
        # A dump says the same few thousand words a million times: equal ones are one object.
        self._names: dict[str, str] = {}
        self._known: dict[str, object] = {}

    def feed(self, event: yaml.Event) -> None:
        """Take the next event. TextError when the document breaks a bound or means nothing."""
        if isinstance(event, yaml.ScalarEvent):
            frame = self._open[-1] if self._open else None
            if frame is not None and frame.members is not None and frame.key is None:
                self._key(frame, event.value, plain=event.implicit[0])
            else:
                self._add(self._scalar(event), event.anchor, self._count(1))
        elif isinstance(event, yaml.CollectionStartEvent):
            self._start(event)
        elif isinstance(event, yaml.CollectionEndEvent):
            frame = self._open.pop()
            self._add(frame.finish(), frame.anchor, frame.first)
        elif isinstance(event, yaml.AliasEvent):
            self._alias(event.anchor or "")

    def _start(self, event: yaml.CollectionStartEvent) -> None:
        is_map = isinstance(event, yaml.MappingStartEvent)
        if event.tag not in (None, "!", _TAG + ("map" if is_map else "seq")):
            raise TextError(f"unknown tag {event.tag[:80]!r}")
        if self._open and self._open[-1].members is not None and self._open[-1].key is None:
            raise TextError("a map's key must be text")
        if len(self._open) >= MAX_DEPTH:
            raise TextError(f"nested deeper than {MAX_DEPTH} levels")
        frame = self._open[-1] if self._open else None
        members: dict[str, object] | None = None
        if is_map and (frame is None or frame.of_list):
            members = located = Located()
            located.line = self._line + (event.start_mark.line if event.start_mark else 0) + 1
        elif is_map:
            members = {}
        of_list = not is_map and len(self._open) == 1 and frame is not None and frame.key == "items"
        self._open.append(_Frame(event.anchor, self._count(1), members, of_list=of_list))

    def _count(self, values: int) -> int:
        """Count values in; returns how many came before."""
        before = self._size.values
        self._size.values += values
        if self._size.values > MAX_VALUES:
            raise _LimitError(_TOO_MANY)
        return before

    def _key(self, frame: _Frame, name: str, *, plain: bool) -> None:
        assert frame.members is not None
        if len(self._names) < _MAX_KNOWN:
            name = self._names.setdefault(name, name)
        if name in frame.members:
            frame.twice = f"the key {name[:80]!r}"
        frame.key = name
        if not (plain and name == "<<"):
            frame.members[name] = None  # holds its place: `a: {…}, a: …` is found at the second key

    def _alias(self, anchor: str) -> None:
        if anchor not in self._anchors:
            raise TextError(f"alias *{anchor[:80]} refers to nothing before it")
        value, size = self._anchors[anchor]
        self._expanded += size
        if self._expanded > MAX_EXPANDED:
            raise TextError(f"aliases stand for more than {MAX_EXPANDED} values")
        frame = self._open[-1] if self._open else None
        if frame is not None and frame.members is not None and frame.key is None:
            raise TextError("a map's key must be text")
        self._add(value, None, self._count(size))

    def _add(self, value: object, anchor: str | None, first: int) -> None:
        if anchor is not None:
            self._anchors[anchor] = (value, self._size.values - first)
        if not self._open:
            self.document = value
            return
        frame = self._open[-1]
        if frame.members is None:
            frame.items.append(value)
            return
        assert frame.key is not None
        if frame.key == "<<" and "<<" not in frame.members:
            frame.merges.append(value)
        else:
            frame.members[frame.key] = value
        frame.key = None

    def _scalar(self, event: yaml.ScalarEvent) -> object:
        text = event.value
        if event.tag is not None and event.tag not in ("!", _TAG + "str"):
            value = _plain(text)
            kind = event.tag.removeprefix(_TAG)
            if kind not in _TAGGED or type(value) is not _TAGGED[kind]:
                raise TextError(f"{text[:80]!r} is no {kind[:80]!r}")
            return value
        if not event.implicit[0]:
            return text
        if text in self._known:
            return self._known[text]
        value = _plain(text)
        if len(self._known) < _MAX_KNOWN:
            self._known[text] = value
        return value


def _plain(text: str) -> object:
    """A plain scalar: null, bool, int, float or text."""
    if text in _WORDS:
        return _WORDS[text]
    if text[0] not in _NUMERIC:
        return text
    if _INTEGER.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text) and len(text) < 400:
        return float(text)
    return text
