"""Who can reach whom, by the tables that the engine judges packets with.

Pods share compiled rule sets, and a rule set's answer depends on the peer's address and the port
alone. So each rule set is asked once per peer and port, not once per pair of pods; what two pods of
one rule set still differ in is whether the peer is their own node.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter

from dataplane._rules import RuleSet, RuleTable
from dataplane.addresses import family_of, parse_address
from dataplane.errors import InputError
from dataplane.model import PROTOCOLS, Direction, Key, Pod, Snapshot
from dataplane.policy.compile import Compiler, rule_of
from dataplane.policy.effective import isolating_policies
from dataplane.policy.explain import ICMP, Peer, Port, known_pods, table_of_everything
from dataplane.reachability import (
    ALLOWED,
    AUDITED,
    BOTH_DENIED,
    EGRESS_DENIED,
    INGRESS_DENIED,
    NOT_JUDGED,
    EndVerdict,
    Lines,
    Place,
    Reachability,
)
from dataplane.reasons import Reason

COMMON_PORTS = 3
_NOBODY: frozenset[bytes] = frozenset()
# A cell as a number: 1, the egress end denies, plus 2, the ingress end denies, plus 4, an end in audit would.
_AUDIT = 4
_MARKS = bytes.maketrans(
    bytes(range(8)),
    "".join(
        [
            *(ALLOWED, EGRESS_DENIED, INGRESS_DENIED, BOTH_DENIED),
            *(AUDITED, EGRESS_DENIED, INGRESS_DENIED, BOTH_DENIED),
        ]
    ).encode(),
)


@dataclass(frozen=True, slots=True)
class _End:
    """A place with what judges it. Rule sets are None for an end that is not isolated, or no pod."""

    place: Place
    judged: bool  # a pod that policies are enforced for: neither outside nor on its host's network
    ingress: RuleSet | None = None
    egress: RuleSet | None = None
    node_ips: frozenset[bytes] = _NOBODY
    audit: frozenset[Direction] = frozenset()

    def rules(self, direction: Direction) -> RuleSet | None:
        return self.ingress if direction is Direction.INGRESS else self.egress


# What two ends must have in common to have one line: rule set, audit, own node, and being somebody's node.
_LineKey = tuple[bool, RuleSet | None, bool, frozenset[bytes], bytes | None]


def reachability(
    snapshot: Snapshot,
    ports: Sequence[Port],
    externals: Sequence[str] = (),
    family: int | None = None,
) -> Reachability:
    """The matrix of every live pod and of the addresses `externals`, for each of `ports`.

    `snapshot` holds the PolicyEndpoints in force (`resolve.in_force`). `family` 4 or 6; default: that
    of the first address of the first pod. Pods without an address of that family are left out.
    InputError when an external cannot be used, or no pod has an address.
    """
    ends, left_out, chosen = _ends(snapshot, externals, family)
    verdicts = _Verdicts()
    sides = {direction: _Side(direction, ends, verdicts) for direction in Direction}
    marks: dict[str, tuple[str, ...]] = {}
    lines: dict[Direction, dict[str, Lines]] = {direction: {} for direction in Direction}
    for port in dict.fromkeys(ports):
        protocol = ICMP[chosen] if port.protocol is None else port.protocol
        for direction, side in sides.items():
            lines[direction][str(port)] = side.lines(protocol, port.number)
        marks[str(port)] = _marks(
            ends, lines[Direction.EGRESS][str(port)], lines[Direction.INGRESS][str(port)], verdicts.all
        )
    return Reachability(
        family=chosen,
        places=tuple(end.place for end in ends),
        marks=marks,
        verdicts=tuple(verdicts.all),
        egress=lines[Direction.EGRESS],
        ingress=lines[Direction.INGRESS],
        left_out=left_out,
    )


def common_ports(pods: Iterable[Pod]) -> tuple[list[Port], list[Port]]:
    """The ports to ask about where nobody says which: those most pods declare, and the others.

    Both in the order of their numbers. Without any, 80/TCP.
    """
    declared = Counter(
        Port(port.protocol, port.port)
        for pod in pods
        if not pod.finished
        for port in {(port.protocol, port.port): port for port in pod.ports}.values()
    )
    ranked = sorted(declared, key=lambda port: (-declared[port], port.number, str(port)))
    by_number = partial(sorted, key=lambda port: (port.number, str(port)))
    return by_number(ranked[:COMMON_PORTS]) or [Port(PROTOCOLS["TCP"], 80)], by_number(ranked[COMMON_PORTS:])


def _ends(
    snapshot: Snapshot, externals: Sequence[str], family: int | None
) -> tuple[list[_End], tuple[Key, ...], int]:
    """The rows, the pods that have none, and the family."""
    objects = {pod.key: pod for pod in snapshot.pods}
    pods = known_pods(snapshot)
    peers = pods | {
        pod.key: Peer(pod.ips or pod.host_ips, pod.key)
        for pod in snapshot.pods
        if pod.host_network and not pod.finished
    }
    if family is None:
        family = _first_family(snapshot, pods, peers)
    table = table_of_everything(snapshot, Compiler())
    compiled = {entry.key: index for index, entry in enumerate(table.pods)}
    isolated = isolating_policies(snapshot)
    ends: list[_End] = []
    left_out: list[Key] = []
    for key, peer in sorted(peers.items(), key=itemgetter(0)):
        address = peer.address(family)
        if address is None:
            left_out.append(key)
            continue
        known = objects.get(key)
        place = Place(
            str(key),
            address,
            key,
            host_network=key not in pods,
            labels=known.labels if known else {},
            isolated_by={direction: isolated[direction].get(key, ()) for direction in Direction}
            if key in pods
            else {},
        )
        ends.append(_pod_end(place, peer, table, compiled.get(key)))
    if left_out and not ends:
        raise InputError(f"no pod has an IPv{family} address; see --family")
    if not ends:
        raise InputError(
            "no pod among these objects: give the cluster's pods too, for example from"
            " `kubectl get netpol,pods,ns,svc -A -o yaml`"
        )
    ends += _external_ends(externals, family, ends)
    return ends, tuple(left_out), family


def _first_family(snapshot: Snapshot, pods: dict[Key, Peer], peers: dict[Key, Peer]) -> int:
    """That of the first pod's first address as its status lists them; hostNetwork pods count last."""
    stated = {pod.key: pod.ips for pod in snapshot.pods}
    for group in (pods, peers):
        for key in sorted(group):
            # A pod may have lost an address it still lists to a newer pod.
            owned = group[key].addresses
            for address in (*stated.get(key, ()), *owned):
                if address in owned:
                    return family_of(address)
    return 4


def _pod_end(place: Place, peer: Peer, table: RuleTable, index: int | None) -> _End:
    if index is None:
        return _End(place, judged=False)
    audit = table.pods[index].audit
    return _End(place, True, table.ingress(index), table.egress(index), peer.node_ips, audit)


def _external_ends(externals: Sequence[str], family: int, pods: Iterable[_End]) -> list[_End]:
    holders = {end.place.address: end.place.name for end in pods if end.judged}
    found: dict[bytes, _End] = {}
    for text in externals:
        try:
            address = parse_address(text)
        except ValueError as error:
            raise InputError(f"--external: {error}") from None
        if family_of(address) != family:
            raise InputError(f"--external {text}: not an IPv{family} address; see --family")
        if address in holders:
            raise InputError(
                f"--external {text}: the address of pod {holders[address]}, which has its own row"
            )
        found.setdefault(address, _End(Place(text, address), judged=False))
    return list(found.values())


class _Verdicts:
    """Every distinct answer of an end, numbered."""

    def __init__(self) -> None:
        self.all: list[EndVerdict] = []
        self._numbers: dict[EndVerdict, int] = {}
        self._of_rules: dict[tuple[RuleSet, bool], dict[int, int]] = defaultdict(dict)

    def number(self, verdict: EndVerdict) -> int:
        number = self._numbers.setdefault(verdict, len(self.all))
        if number == len(self.all):
            self.all.append(verdict)
        return number

    def of_rules(self, rules: RuleSet, audit: bool, found: Iterable[int]) -> list[int]:
        """The numbers of what `RuleSet.find` answered."""
        known = self._of_rules[rules, audit]
        numbers = []
        for rule_id in found:
            number = known.get(rule_id)
            if number is None:
                verdict = (
                    EndVerdict(Reason.AUDIT if audit else Reason.NO_RULE)
                    if rule_id < 0
                    else EndVerdict(Reason.POLICY_RULE, *rule_of(rules, rule_id))
                )
                number = known[rule_id] = self.number(verdict)
            numbers.append(number)
        return numbers


class _Side:
    """All ends of one direction, by what they answer alike."""

    def __init__(self, direction: Direction, ends: Sequence[_End], verdicts: _Verdicts) -> None:
        self._ends = ends
        self._verdicts = verdicts
        self._addresses = [end.place.address for end in ends]
        seen = frozenset(self._addresses)
        nodes = frozenset().union(*(end.node_ips for end in ends))
        keys: dict[_LineKey, int] = {}
        of = []
        for end in ends:
            address = end.place.address if end.place.address in nodes else None
            audit = direction in end.audit
            key = (end.judged, end.rules(direction), audit, end.node_ips & seen, address)
            of.append(keys.setdefault(key, len(keys)))
        self._of = tuple(of)
        self._keys = tuple(keys)

    def lines(self, protocol: int, port: int) -> Lines:
        """What they answer at (IP protocol number, port)."""
        answers: dict[tuple[RuleSet, bool], list[int]] = {}
        return Lines(self._of, tuple(tuple(self._line(key, protocol, port, answers)) for key in self._keys))

    def _line(
        self, key: _LineKey, protocol: int, port: int, answers: dict[tuple[RuleSet, bool], list[int]]
    ) -> list[int]:
        judged, rules, audit, node_ips, address = key
        if rules is None:
            reason = Reason.NOT_ISOLATED if judged else Reason.NOT_A_POD
            line = [self._verdicts.number(EndVerdict(reason))] * len(self._ends)
        else:
            if (rules, audit) not in answers:
                find = rules.find
                answers[rules, audit] = self._verdicts.of_rules(
                    rules, audit, [find(peer, protocol, port) for peer in self._addresses]
                )
            line = answers[rules, audit]
        if node_ips or address is not None:
            # Packets between a pod and its own node do not pass FORWARD: nobody judges them.
            own = self._verdicts.number(EndVerdict(Reason.OWN_NODE))
            line = [
                own if peer in node_ips or address in end.node_ips else number
                for number, peer, end in zip(line, self._addresses, self._ends, strict=True)
            ]
        return line


def _marks(
    ends: Sequence[_End], egress: Lines, ingress: Lines, verdicts: Sequence[EndVerdict]
) -> tuple[str, ...]:
    audited = [_AUDIT if verdict.reason is Reason.AUDIT else 0 for verdict in verdicts]
    at_egress = [audit or 1 - verdict.allow for audit, verdict in zip(audited, verdicts, strict=True)]
    at_ingress = [audit or 2 - 2 * verdict.allow for audit, verdict in zip(audited, verdicts, strict=True)]
    sent = [bytes(map(at_egress.__getitem__, line)) for line in egress.lines]
    # By source, then by distinct ingress line: what a row needs lies together.
    received = zip(*([at_ingress[number] for number in line] for line in ingress.lines), strict=True)
    size = len(ends)
    outside = next((index for index, end in enumerate(ends) if end.place.pod is None), size)
    rows = []
    for source, answers in enumerate(received):
        arrives = bytes(map(answers.__getitem__, ingress.of))
        both = int.from_bytes(sent[egress.of[source]]) | int.from_bytes(arrives)
        row = both.to_bytes(size).translate(_MARKS).decode("ascii")
        if source >= outside:
            row = row[:outside] + NOT_JUDGED * (size - outside)
        rows.append(row[:source] + ALLOWED + row[source + 1 :])
    return tuple(rows)
