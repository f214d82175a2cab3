"""Why every end of every cell says what it says, in a size that fits a page.

Most pods are of the same few workloads, so most cells have the same explanation. Pods that share their
policies and peers that these policies cannot tell apart are asked about once (`policy.why`); a cell then
holds the number of an answer. What remains may still be too much where every pod is selected by policies
of its own: then the explanations that serve most pods are kept.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dataplane.addresses import Prefix
from dataplane.model import Direction, IPBlock, Key, Pod, Snapshot
from dataplane.policy.explain import ICMP, parse_port
from dataplane.policy.normalize import NormalPolicy, NormalRule, PodPeer, normalize
from dataplane.policy.resolve import namespace_labels
from dataplane.policy.selectors import matches
from dataplane.policy.why import About, Candidate, Whys
from dataplane.reachability import EndVerdict, Place, Reachability
from dataplane.reasons import Reason

QUESTIONS = 120_000  # asked for one page: some seconds of work and a few megabytes
NONE = 0  # no answer: there is nothing to explain, or it was too much
_BLOCKS = 64  # of one set of policies; with more, peers are told apart by their addresses

_ABOUT = {About.RULE: 0, About.PEER: 1, About.ADDRESS: 2, About.OWN: 3}


@dataclass(slots=True)
class Texts:
    """Texts by number, each once."""

    all: list[str] = field(default_factory=list)
    _numbers: dict[str, int] = field(default_factory=dict)

    def number(self, text: str) -> int:
        """The number of `text`, a new one if it has none yet."""
        number = self._numbers.setdefault(text, len(self.all))
        if number == len(self.all):
            self.all.append(text)
        return number


@dataclass(frozen=True, slots=True)
class Side:
    """The answers of one direction: `lines[port][of[own]][other]`, indices of places."""

    of: tuple[int, ...]
    lines: Mapping[str, Sequence[array[int]]]


@dataclass(frozen=True, slots=True)
class Explanations:
    """What a page tells of its cells. `left_out`: how many questions were too many for it.

    `answers`: None at NONE; for an allowed end the number of a text, the place of the rule; for a denied
    one `[candidates, more]`, indices of `candidates` and numbers of texts. `candidates`: policy (an index
    into `policies`), place, whom the text is about (0 nobody, 1 the other end, 2 its address, 3 the own
    pod) and text, the last and the place as numbers of texts.
    """

    sides: Mapping[Direction, Side]
    answers: Sequence[Any]
    candidates: Sequence[tuple[int, int, int, int]]
    left_out: int


def explanations(
    reach: Reachability, known: Snapshot, resolved: Snapshot, policies: Mapping[Key, int], texts: Texts
) -> Explanations:
    """Explain every cell of `reach`, as far as QUESTIONS goes.

    `known`: the objects as they were read; `resolved`: the same with every PolicyEndpoint in force, what
    `reach` was made from. `policies` numbers all policies; new texts go to `texts`.
    """
    asking = _Asking(Whys(known, resolved), reach, policies, texts)
    places = _Places(reach.places, known, asking.whys)
    subjects: list[tuple[Direction, int, _Subject]] = []
    sides: dict[Direction, Side] = {}
    for direction in Direction:
        of, found = _subjects(direction, places, asking.whys)
        nothing = array("I", bytes(4 * len(places.all)))
        sides[direction] = Side(of, {port: [nothing] * len(found) for port in reach.ports})
        subjects += [(direction, index, subject) for index, subject in enumerate(found)]
    # If it is too much, what is left out should concern few pods.
    subjects.sort(key=lambda each: -each[2].pods)
    for direction, index, subject in subjects:
        if subject.pod is None:
            continue
        numbers = places.told_apart(subject)
        verdicts = reach.egress if direction is Direction.EGRESS else reach.ingress
        for port, lines in sides[direction].lines.items():
            line = verdicts[port].lines[verdicts[port].of[subject.place]]
            lines[index] = asking.line(subject.pod, direction, port, numbers, line)  # type: ignore[index]
    return Explanations(sides, asking.answers, asking.candidates, asking.left_out)


class _Sight:
    """What some policies see of a peer, in one direction: of two peers with equal keys they say the same."""

    def __init__(
        self,
        policies: Sequence[NormalPolicy],
        direction: Direction,
        namespaces: Mapping[str, Mapping[str, str]],
    ) -> None:
        ingress = direction is Direction.INGRESS
        rules: list[NormalRule] = []
        for policy in policies:
            rules += policy.ingress if ingress else policy.egress
        peers = {peer for rule in rules for peer in rule.peers or ()}
        named = any(rule.names for rule in rules)
        self.own_ports = named and ingress  # named ports are looked up on the destination
        self._peer_ports = named and not ingress
        self._namespaces = namespaces
        self._selectors = [peer for peer in peers if isinstance(peer, PodPeer)]
        blocks = [peer for peer in peers if isinstance(peer, IPBlock)]
        self._prefixes: list[Prefix] | None = None
        if len(blocks) <= _BLOCKS:
            self._prefixes = sorted({prefix for block in blocks for prefix in (block.cidr, *block.excepts)})
        self._labels: dict[str, tuple[str, ...]] = {}

    def key(self, pod: Pod, address: bytes) -> Hashable:
        """What these policies see of a pod that is alone with its address."""
        namespace = pod.key.namespace
        names = self._labels.get(namespace)
        if names is None:
            # Of a pod whose namespace it does not mean, a selector does not look at the labels.
            labels = self._namespaces.get(namespace, {})
            met = [peer for peer in self._selectors if matches(peer.namespaces, labels)]
            names = tuple(sorted({each.key for peer in met for each in peer.pods.requirements}))
            self._labels[namespace] = names
        return (
            namespace,
            tuple([pod.labels.get(name) for name in names]),
            pod.ports if self._peer_ports else (),
            pod.host_network,
            address
            if self._prefixes is None
            else tuple([number for number, prefix in enumerate(self._prefixes) if address in prefix]),
        )


@dataclass(frozen=True, slots=True)
class _Subject:
    """Pods that have policies, rules and the named ports these ask for in common, in one direction.

    `pod` is one of them (None: not isolated, nothing to explain), `place` its index, `pods` how many
    they are. `sight` is None where policies are known as PolicyEndpoints: these see addresses only.
    """

    pod: Key | None
    place: int
    pods: int
    sight: _Sight | None


class _Places:
    """The rows and columns, and how policies tell them apart."""

    def __init__(self, places: Sequence[Place], known: Snapshot, whys: Whys) -> None:
        self.all = places
        self.objects = {pod.key: pod for pod in known.pods}
        given = {endpoint.policy for endpoint in known.policy_endpoints}
        self._written = {
            policy.key: normalize(policy) for policy in known.network_policies if policy.key not in given
        }
        self._namespaces = namespace_labels(known)
        # By its labels a place is told apart only when it is a pod that shares its address with nobody.
        self._alone: list[Pod | None] = []
        for place in places:
            pod = self.objects.get(place.pod) if place.pod else None
            self._alone.append(pod if pod is not None and whys.holders(place.address) == [pod] else None)
        self._sights: dict[tuple[Direction, tuple[Key, ...]], _Sight | None] = {}
        self._numbers: dict[int, list[int]] = {}

    def sight(self, direction: Direction, policies: tuple[Key, ...]) -> _Sight | None:
        """What these policies see; None where one of them is known as PolicyEndpoints."""
        if (direction, policies) not in self._sights:
            written = [self._written[key] for key in policies if key in self._written]
            whole = len(written) == len(policies)
            sight = _Sight(written, direction, self._namespaces) if whole else None
            self._sights[direction, policies] = sight
        return self._sights[direction, policies]

    def told_apart(self, subject: _Subject) -> list[int]:
        """A number for every place, equal where the subject's policies see no difference."""
        sight = subject.sight
        if sight is None:
            return list(range(len(self.all)))
        found = self._numbers.get(id(sight))
        if found is None:
            keys: dict[Hashable, int] = {}
            found = self._numbers[id(sight)] = [
                keys.setdefault(sight.key(pod, place.address) if pod else place.address, len(keys))
                for place, pod in zip(self.all, self._alone, strict=True)
            ]
        return found


def _subjects(
    direction: Direction, places: _Places, whys: Whys
) -> tuple[tuple[int, ...], Sequence[_Subject]]:
    """Which subject each place is, and the subjects."""
    keys: dict[Hashable, int] = {}
    first: list[tuple[Key | None, int, _Sight | None]] = []
    of = []
    for index, place in enumerate(places.all):
        policies = whys.policies(place.pod, direction) if place.pod and not place.host_network else ()
        if place.pod is None or not policies:
            key: Hashable = None
            entry: tuple[Key | None, int, _Sight | None] = (None, index, None)
        else:
            rules = whys.rules[place.pod]
            sight = places.sight(direction, policies)
            pod = places.objects.get(place.pod)
            own_ports = pod.ports if pod is not None and (sight is None or sight.own_ports) else ()
            key = (policies, rules.egress if direction is Direction.EGRESS else rules.ingress, own_ports)
            entry = (place.pod, index, sight)
        number = keys.setdefault(key, len(first))
        if number == len(first):
            first.append(entry)
        of.append(number)
    sizes = Counter(of)
    return tuple(of), [
        _Subject(pod, index, sizes[number], sight) for number, (pod, index, sight) in enumerate(first)
    ]


class _Asking:
    """Asks, and numbers the answers, until it is enough for a page."""

    def __init__(self, whys: Whys, reach: Reachability, policies: Mapping[Key, int], texts: Texts) -> None:
        self.whys = whys
        self.answers: list[Any] = [None]
        self.candidates: list[tuple[int, int, int, int]] = []
        self.left_out = 0
        self._places = reach.places
        self._verdicts = reach.verdicts
        self._policies = policies
        self._texts = texts
        self._asked = 0
        self._answer_numbers: dict[Hashable, int] = {}
        self._candidate_numbers: dict[tuple[int, int, int, int], int] = {}
        # What an answer depends on of a verdict: a rule of one policy, or none; the rest needs no answer.
        self._kinds = [
            verdict.policy if verdict.reason is Reason.POLICY_RULE else verdict.reason is Reason.NO_RULE
            for verdict in reach.verdicts
        ]
        wanted = {port: parse_port(port) for port in reach.ports}
        self._packets = {
            port: (ICMP[reach.family] if each.protocol is None else each.protocol, each.number)
            for port, each in wanted.items()
        }

    def line(
        self, pod: Key, direction: Direction, port: str, numbers: Sequence[int], line: Sequence[int]
    ) -> array[int]:
        """The answers about one pod's end and every place, from its verdicts and from who is alike."""
        cells = list(zip(numbers, map(self._kinds.__getitem__, line), strict=True))
        # The last of those alike speaks for all of them.
        others = dict(zip(cells, range(len(cells)), strict=True))
        found = {
            cell: self._answer(pod, direction, port, self._verdicts[line[other]], self._places[other])
            for cell, other in others.items()
        }
        return array("I", map(found.__getitem__, cells))

    def _answer(self, pod: Key, direction: Direction, port: str, verdict: EndVerdict, other: Place) -> int:
        if verdict.reason not in (Reason.POLICY_RULE, Reason.NO_RULE):
            return NONE
        if self._asked >= QUESTIONS:
            self.left_out += 1
            return NONE
        self._asked += 1
        question = (pod, direction, other.address, *self._packets[port])
        answer: Any
        if verdict.policy is not None and verdict.rule is not None:
            place = self.whys.allowed(*question, verdict.policy, verdict.rule.index).field
            answer = self._texts.number(place)
            key: Hashable = answer
        else:
            why = self.whys.denied(*question)
            told = tuple([self._candidate(each) for each in why.candidates])
            more = tuple([self._texts.number(each.sentence) for each in why.more])
            answer = key = (told, more)
        number = self._answer_numbers.setdefault(key, len(self.answers))
        if number == len(self.answers):
            self.answers.append(answer)
        return number

    def _candidate(self, candidate: Candidate) -> int:
        entry = (
            self._policies[candidate.policy],
            self._texts.number(candidate.field),
            _ABOUT[candidate.about],
            self._texts.number(candidate.text),
        )
        number = self._candidate_numbers.setdefault(entry, len(self.candidates))
        if number == len(self.candidates):
            self.candidates.append(entry)
        return number
