"""Which verdicts a reader wants to see: `verdict=deny pod=shop/db 'tcp port 5432'`.

    selection  = { condition | packets }            all of them must hold; "and" may stand between
    condition  = field ( "=" | "!=" ) value { "," value }        any of the values, or none with !=
    packets    = a pcap-filter(7) expression, of the packet from its network header on

A word that begins with the name of a field and "=" is a condition; everything else is left to
pcap-filter, words that follow each other as one expression, a quoted argument as one of its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import translate
from functools import lru_cache
from typing import NoReturn

from dataplane._events import EventFilter
from dataplane._pcap import Filter
from dataplane.addresses import parse_address
from dataplane.errors import InputError
from dataplane.model import Direction, Key
from dataplane.observe.events import isolating
from dataplane.observe.live import CAPTURE
from dataplane.policy.compile import PodEntry
from dataplane.reasons import BY_TEXT
from dataplane.verdict import Event

Names = Callable[[], Mapping[bytes, Key]]

# Field → what its values are.
FIELDS = {
    "verdict": "allow or deny",
    "reason": "a reason, for example no-rule",
    "direction": "ingress or egress: the end that decided",
    "policy": "NAMESPACE/NAME of a policy whose rule allowed it, or which isolates the pod that is denied",
    "pod": "NAMESPACE/NAME of a pod at either end",
    "namespace": "the namespace of a pod at either end",
    "from": "the sender: NAMESPACE/NAME or an IP address",
    "to": "the receiver: NAMESPACE/NAME or an IP address",
}
OF_PODS = ("pod", "namespace", "from", "to")
LONGEST = 8192  # characters of a whole selection
MOST = 64  # conditions
_CONDITION = re.compile(r"([A-Za-z][A-Za-z-]*)(!?=)([^=].*)?")
_NAME = re.compile(r"[A-Za-z0-9.*?-]+")
_AND, _OR, _NOT = ("and", "&&"), ("or", "||"), ("not", "!")


@dataclass(frozen=True, slots=True)
class Condition:
    """`field` has one of `values`, or with `negated` none of them."""

    field: str
    values: tuple[str, ...]
    negated: bool = False

    def __str__(self) -> str:
        return f"{self.field}{'!=' if self.negated else '='}{','.join(self.values)}"


@dataclass(frozen=True)
class Selection:
    """What `parse` read. `packets` is the whole pcap-filter expression, empty for every packet."""

    conditions: tuple[Condition, ...] = ()
    packets: str = ""

    @classmethod
    def parse(cls, words: Iterable[str]) -> Selection:
        """Read the arguments of a command, or one text. InputError says what is wrong with which word.

        What is left to pcap-filter is looked at by `compile` only: a host's name has to be looked up.
        """
        words = list(words)
        if sum(map(len, words)) > LONGEST:
            raise InputError(f"FILTER: longer than {LONGEST} characters")
        conditions: list[Condition] = []
        groups: list[list[str]] = [[]]
        for argument in words:
            parts = argument.split()
            if len(parts) > 1:
                groups.append([])
            for part in parts:
                if condition := _condition(part):
                    conditions.append(condition)
                    groups.append([])
                else:
                    groups[-1].append(part)
            if len(parts) > 1:
                groups.append([])
        if len(conditions) > MOST:
            raise InputError(f"FILTER: more than {MOST} conditions")
        expressions = [text for group in groups if (text := _expression(group, bool(conditions)))]
        packets = expressions[0] if len(expressions) == 1 else " and ".join(f"({one})" for one in expressions)
        return cls(tuple(conditions), packets)

    def __str__(self) -> str:
        """A text that `parse` reads as the same selection."""
        return " ".join([*map(str, self.conditions), *([self.packets] if self.packets else [])])

    def compile(self) -> Filter | None:
        """The pcap-filter part, None when there is none. May ask name servers. InputError."""
        if not self.packets:
            return None
        try:
            return Filter(self.packets)
        except ValueError as error:
            raise InputError(
                f"FILTER: {_shown(self.packets)} is no pcap-filter expression: {error}"
            ) from None

    @property
    def capture(self) -> int:
        """The least capture level that has everything selected."""
        only_denied = any(
            one.field == "verdict" and one.values == (("allow",) if one.negated else ("deny",))
            for one in self.conditions
        )
        return CAPTURE["denied" if only_denied else "all"]

    def wanted(self, names: Names, packets: Filter | None) -> Callable[[Event], bool] | None:
        """The selection as a function of events, which need their packet's bytes where `packets` (from
        `compile`) is not None. None: everything is wanted."""
        tests = [_TESTS[one.field](one, names) for one in self.conditions]
        if packets is not None:
            tests.append(lambda event: packets.matches(event.data, wire=event.packet.length))
        if not tests:
            return None
        if len(tests) == 1:
            return tests[0]

        return lambda event: all(test(event) for test in tests)

    def first_filter(self, packets: Filter | None, *, pods: bool = True) -> EventFilter:
        """What can be told of an event before it is made; `wanted` says the rest.

        `pods`: whether no pod but those of the table has a name here.
        """
        conditions = [one for one in self.conditions if _only_pods(one)] if pods else []
        matches = [_pattern(one.values) for one in conditions]

        def of_pods(entries: Sequence[PodEntry]) -> bytes:
            return bytes(any(match(entry.key) for match in matches) for entry in entries)

        return EventFilter(
            verdicts=self._bits("verdict", {"deny": 0, "allow": 1}),
            reasons=self._bits("reason", BY_TEXT),
            directions=self._bits("direction", {"": 0, "ingress": 1, "egress": 2}),
            packets=packets,
            pods=of_pods if matches else None,
        )

    def _bits(self, field: str, places: Mapping[str, int]) -> int:
        """A bit for each word that every condition of a field lets through."""
        left = set(places)
        for one in self.conditions:
            if one.field == field:
                left = left - set(one.values) if one.negated else left & set(one.values)
        return sum(1 << places[word] for word in left)

    def pods(self, known: Iterable[Key]) -> frozenset[Key]:
        """Those of the known pods whose packets must be looked at, so that none selected is missed."""
        known = list(known)
        chosen = [
            frozenset(key for key in known if _names_key(one, key))
            for one in self.conditions
            if _only_pods(one)
        ]
        # A packet meets every condition by one of its ends: looking at the fewest pods is enough.
        return min(filter(None, chosen), key=len, default=frozenset()) if chosen else frozenset(known)


def _only_pods(condition: Condition) -> bool:
    """Whether a packet must be of a pod that it names."""
    named = not condition.negated and condition.field in OF_PODS
    return named and not any(map(_is_address, condition.values))


def _condition(word: str) -> Condition | None:
    found = _CONDITION.fullmatch(word)
    if found is None:
        inside = re.search(rf"\b({'|'.join(FIELDS)})!?=", word)
        if inside:
            raise InputError(
                f"FILTER: {_shown(word)}: a condition stands by itself, as {inside[1]}=VALUE, and all must"
                f" hold; several values are written {inside[1]}=A,B and the opposite {inside[1]}!=A"
            )
        return None
    field, operator, text = found.groups()
    if field not in FIELDS:
        if field in ("len", "vlan"):  # pcap-filter's own words
            return None
        near = get_close_matches(field.lower(), FIELDS, 1)
        hint = f"did you mean {near[0]}=?" if near else f"fields are {', '.join(FIELDS)}"
        raise InputError(f"FILTER: {_shown(word)}: there is no such field; {hint}")
    values = tuple(text.split(",")) if text else ()
    if not values or not all(values):
        raise InputError(f"FILTER: {_shown(word)}: a value is missing; {field} is {FIELDS[field]}")
    for value in values:
        _check(word, field, value)
    return Condition(field, values, operator == "!=")


def _check(word: str, field: str, value: str) -> None:
    if field in _WORDS:
        if value not in _WORDS[field]:
            near = get_close_matches(value.lower(), _WORDS[field], 1)
            hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(_WORDS[field])}"
            _refuse(word, f"{_shown(value)} is no {field}; {hint}")
    elif field == "namespace":
        if not _NAME.fullmatch(value):
            _refuse(word, f"{_shown(value)} is no namespace's name; * stands for any part of it")
    elif field in ("from", "to") and _is_address(value):
        return
    elif len(parts := value.split("/")) != 2 or not all(map(_NAME.fullmatch, parts)):
        what = "NAMESPACE/NAME or an IP address" if field in ("from", "to") else "NAMESPACE/NAME"
        hint = f", for example {field}=*/{value[:60]}" if _NAME.fullmatch(value) else ""
        _refuse(word, f"{_shown(value)} is not {what}; * stands for any part{hint}")


def _refuse(word: str, what: str) -> NoReturn:
    raise InputError(f"FILTER: {_shown(word)}: {what}")


def _is_address(value: str) -> bool:
    try:
        parse_address(value)
    except ValueError:
        return False
    return True


def _expression(group: Sequence[str], beside_conditions: bool) -> str:
    """Words for pcap-filter, without the "and" that joins them to conditions beside them."""
    words = list(group)
    if beside_conditions:
        while words and words[0] in _AND:
            del words[0]
        while words and words[-1] in _AND:
            del words[-1]
        if words and (words[0] in _OR or words[-1] in _OR + _NOT):
            word = words[0] if words[0] in _OR else words[-1]
            raise InputError(
                f"FILTER: {_shown(word)} beside a condition: conditions must all hold; several values are"
                " written FIELD=A,B and the opposite FIELD!=A"
            )
    return " ".join(words)


def _shown(word: str) -> str:
    return repr(word if len(word) <= 60 else f"{word[:60]}…")


_WORDS: dict[str, tuple[str, ...]] = {
    "verdict": ("allow", "deny"),
    "reason": tuple(BY_TEXT),
    "direction": tuple(str(one) for one in Direction),
}


# --- tests of events: each returns a function of one event -----------------------------------------------

_Test = Callable[[Event], bool]


def _pattern(values: Iterable[str]) -> Callable[[Key], bool]:
    """Whether a key is one of these NAMESPACE/NAMEs or NAMESPACEs, in which * and ? stand for characters."""
    pairs = []
    for value in values:
        namespace, _, name = value.partition("/")
        pairs.append((re.compile(translate(namespace)), re.compile(translate(name or "*"))))
    return lambda key: any(one.match(key.namespace) and two.match(key.name) for one, two in pairs)


def _names_key(condition: Condition, key: Key) -> bool:
    return _pattern(condition.values)(key)


def _sender(event: Event, names: Mapping[bytes, Key]) -> Key | None:
    end = event.verdict.ingress if event.reply else event.verdict.egress
    return end.pod.key if end.pod is not None else names.get(event.packet.flow.src)


def _receiver(event: Event, names: Mapping[bytes, Key]) -> Key | None:
    end = event.verdict.egress if event.reply else event.verdict.ingress
    return end.pod.key if end.pod is not None else names.get(event.packet.flow.dst)


def _memo(matches: Callable[[Key], bool]) -> Callable[[Key | None], bool]:
    """A pattern of keys that remembers its answers: the same few pods are asked about again and again."""
    return lru_cache(4096)(lambda key: key is not None and matches(key))


def _test_verdict(condition: Condition, _names: Names) -> _Test:
    allow = {value == "allow" for value in condition.values}
    negated = condition.negated
    return lambda event: (event.verdict.allow in allow) is not negated


def _test_reason(condition: Condition, _names: Names) -> _Test:
    reasons = {BY_TEXT[value] for value in condition.values}
    negated = condition.negated
    return lambda event: (event.verdict.reason in reasons) is not negated


def _test_direction(condition: Condition, _names: Names) -> _Test:
    directions = {Direction(value) for value in condition.values}
    negated = condition.negated
    return lambda event: (event.verdict.direction in directions) is not negated


def _test_policy(condition: Condition, _names: Names) -> _Test:
    matches = _memo(_pattern(condition.values))
    negated = condition.negated

    def test(event: Event) -> bool:
        ends = ((event.verdict.egress, Direction.EGRESS), (event.verdict.ingress, Direction.INGRESS))
        found = (end.pod.rule(direction, end.rule_id) for end, direction in ends if end.pod is not None)
        by_rule = any(one is not None and matches(one[0]) for one in found)
        return (by_rule or any(map(matches, isolating(event.verdict)))) is not negated

    return test


def _test_ends(condition: Condition, names: Names) -> _Test:
    matches = _memo(_pattern(condition.values))
    negated = condition.negated

    def test(event: Event) -> bool:
        known = names()
        return (matches(_sender(event, known)) or matches(_receiver(event, known))) is not negated

    return test


def _test_side(condition: Condition, names: Names) -> _Test:
    sending, negated = condition.field == "from", condition.negated
    side = _sender if sending else _receiver
    addresses = {parse_address(value) for value in condition.values if _is_address(value)}
    matches = _memo(_pattern(value for value in condition.values if not _is_address(value)))

    def test(event: Event) -> bool:
        flow = event.packet.flow
        found = (flow.src if sending else flow.dst) in addresses or matches(side(event, names()))
        return found is not negated

    return test


_TESTS: dict[str, Callable[[Condition, Names], _Test]] = {
    "verdict": _test_verdict,
    "reason": _test_reason,
    "direction": _test_direction,
    "policy": _test_policy,
    "pod": _test_ends,
    "namespace": _test_ends,
    "from": _test_side,
    "to": _test_side,
}
