"""Why every end of every cell says what it says, in a size that fits a page.

Most pods are of the same few workloads, so most cells have the same explanation. Pods that share their
policies and peers that these policies cannot tell apart are asked about once (`policy.why`); a cell then
holds the number of an answer. What remains may still be too much where every pod is selected by policies
of its own. Then what is allowed comes first, and of what is denied the nearest misses: an end that takes
the same peer on another port. The rest follows as far as it goes, what serves most pods first.
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

QUESTIONS = 30_000  # asked for one page: some seconds of work and a few megabytes
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
    """What a page tells of its cells.

    `answers`: None at NONE; for an allowed end the number of a text, the place of the rule; for a denied
    one `[candidates, more]`, indices of `candidates` and numbers of texts. `candidates`: policy (an index
    into `policies`), place, whom the text is about (0 nobody, 1 the other end, 2 its address, 3 the own
    pod) and text, the last and the place as numbers of texts.
    """

    sides: Mapping[Direction, Side]
    answers: Sequence[Any]
    candidates: Sequence[tuple[int, int, int, int]]


def explanations(
    reach: Reachability, known: Snapshot, resolved: Snapshot, policies: Mapping[Key, int], texts: Texts
) -> Explanations:
    """Explain every cell of `reach`, as far as QUESTIONS goes.

    `known`: the objects as they were read; `resolved`: the same with every PolicyEndpoint in force, what
    `reach` was made from. `policies` numbers all policies; new texts go to `texts`.
    """
    whys = Whys(known, resolved)
    asking = _Asking(whys, reach, policies, texts)
    places = _Places(reach.places, known, whys)
    nothing = array("I", bytes(4 * len(places.all)))
    sides: dict[Direction, Side] = {}
    pending: list[_Pending] = []
    for direction in Direction:
        of, subjects = _subjects(direction, places, whys)
        verdicts = reach.egress if direction is Direction.EGRESS else reach.ingress
        lines = {port: [nothing] * len(subjects) for port in reach.ports}
        for index, subject in enumerate(subjects):
            if subject.pod is not None:
                said = {port: each.lines[each.of[subject.place]] for port, each in verdicts.items()}
                answers: dict[str, array[int]] = {}
                for port, line in lines.items():
                    line[index] = answers[port] = nothing[:]
                pending.append(_Pending(subject, subject.pod, direction, said, answers))
        sides[direction] = Side(of, lines)
    # If it is too much, what is left out should concern few pods.
    pending.sort(key=lambda each: -each.subject.pods)
    for choose in (asking.allowed, asking.near, asking.denied):
        # Of near misses every subject gets its share: the first ones might have enough for all.
        most = -(-asking.left // max(1, len(pending) * len(reach.ports)))
        share = most if choose == asking.near else None
        for asked in pending:
            for port in reach.ports:
                if asking.left:
                    asking.answer(asked, port, choose(asked, port), places, share)
    return Explanations(sides, asking.answers, asking.candidates)


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
        self.selectors = [peer for peer in peers if isinstance(peer, PodPeer)]
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
            met = [peer for peer in self.selectors if matches(peer.namespaces, labels)]
            names = tuple(sorted({each.key for peer in met for each in peer.pods.requirements}))
            self._labels[namespace] = names
        return (
            namespace,
            tuple([pod.labels.get(name) for name in names]),
            pod.host_network,
            self.beside_selectors(pod, address),
        )

    @property
    def selects_only(self) -> bool:
        """Whether nothing but selectors tells two peers apart, where these match the same."""
        return not self._peer_ports and self._prefixes == []

    def beside_selectors(self, pod: Pod, address: bytes) -> Hashable:
        """What they look at when all selectors match: named ports and the address."""
        return (
            pod.ports if self._peer_ports else (),
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


@dataclass(frozen=True, slots=True)
class _Pending:
    """What is asked of one subject, whose policies are those of `pod`, by port.

    `said`: the verdict about every place; `answers`: the answer, NONE until it is asked for; `known`: the
    answers so far, by how the place looks and by what is said of it.
    """

    subject: _Subject
    pod: Key
    direction: Direction
    said: Mapping[str, Sequence[int]]
    answers: Mapping[str, array[int]]
    known: dict[tuple[str, Hashable, Hashable], int] = field(default_factory=dict)


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
        self._numbers: dict[int, tuple[dict[int, int], dict[Hashable, int]]] = {}
        self._met: dict[int, list[Hashable]] = {}
        self._selected: dict[PodPeer, list[int]] = {}

    def sight(self, direction: Direction, policies: tuple[Key, ...]) -> _Sight | None:
        """What these policies see; None where one of them is known as PolicyEndpoints."""
        if (direction, policies) not in self._sights:
            written = [self._written[key] for key in policies if key in self._written]
            whole = len(written) == len(policies)
            sight = _Sight(written, direction, self._namespaces) if whole else None
            self._sights[direction, policies] = sight
        return self._sights[direction, policies]

    def told_apart(self, sight: _Sight | None, index: int) -> int:
        """Equal for places between which policies see no difference at all."""
        if sight is None:
            return index
        numbers, keys = self._numbers.setdefault(id(sight), ({}, {}))
        number = numbers.get(index)
        if number is None:
            pod, address = self._alone[index], self.all[index].address
            number = keys.setdefault(sight.key(pod, address) if pod else address, len(keys))
            numbers[index] = number
        return number

    def let_in(self, sight: _Sight | None, index: int) -> Hashable:
        """Equal for places that the same rules allow, whatever labels these saw."""
        if sight is None:
            return index
        if id(sight) not in self._met:
            bits = [0] * len(self.all)
            for number, peer in enumerate(sight.selectors):
                for each in self._members(peer):
                    bits[each] |= 1 << number
            found: list[Hashable] = list(bits)
            for each, pod in enumerate(self._alone):
                if pod is None:
                    found[each] = self.all[each].address
                elif not sight.selects_only:
                    found[each] = bits[each], sight.beside_selectors(pod, self.all[each].address)
            self._met[id(sight)] = found
        return self._met[id(sight)][index]

    def _members(self, peer: PodPeer) -> list[int]:
        """The places that a selector means."""
        found = self._selected.get(peer)
        if found is None:
            none: Mapping[str, str] = {}
            found = self._selected[peer] = [
                index
                for index, pod in enumerate(self._alone)
                if pod is not None
                and matches(peer.pods, pod.labels)
                and matches(peer.namespaces, self._namespaces.get(pod.key.namespace, none))
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

    @property
    def left(self) -> int:
        """Questions that may still be asked."""
        return QUESTIONS - self._asked

    def allowed(self, pending: _Pending, port: str) -> list[int]:
        """The places that a rule allows."""
        kinds = self._kinds
        return [index for index, said in enumerate(pending.said[port]) if isinstance(kinds[said], Key)]

    def near(self, pending: _Pending, port: str) -> list[int]:
        """The places that are denied, but that a rule allows on another of the ports."""
        kinds, said = self._kinds, pending.said[port]
        others = {index for other in pending.said if other != port for index in self.allowed(pending, other)}
        return sorted(index for index in others if kinds[said[index]] is True)

    def denied(self, pending: _Pending, port: str) -> list[int]:
        """The places that are denied."""
        kinds = self._kinds
        return [index for index, said in enumerate(pending.said[port]) if kinds[said] is True]

    def answer(
        self, pending: _Pending, port: str, others: Sequence[int], places: _Places, share: int | None
    ) -> None:
        """Answer about these places, as far as it goes: with `share` new questions at most."""
        said, answers, known = pending.said[port], pending.answers[port], pending.known
        subject, kinds = pending.subject, self._kinds
        left = self.left if share is None else min(share, self.left)
        itself = subject.place if subject.pods == 1 else -1
        for other in others:
            if answers[other] != NONE or other == itself:
                continue
            kind = kinds[said[other]]
            alike: Hashable
            if kind is True:
                alike = places.told_apart(subject.sight, other)
            else:
                alike = places.let_in(subject.sight, other)
            key = (port, alike, kind)
            number = known.get(key)
            if number is None:
                if not left:
                    break  # most of those alike stand together: they are done
                left -= 1
                verdict = self._verdicts[said[other]]
                number = self._ask(pending.pod, pending.direction, port, verdict, self._places[other])
                known[key] = number
            answers[other] = number

    def _ask(self, pod: Key, direction: Direction, port: str, verdict: EndVerdict, other: Place) -> int:
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
