"""From traffic that was recorded, a capture or a flow log, to policies that are proven to allow it."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, NamedTuple

from dataplane.addresses import family_of, format_address, parse_address
from dataplane.errors import InputError
from dataplane.model import PROTOCOLS, Key, LabelSelector, Pod, Service, Snapshot
from dataplane.observe.events import OTHER_PROTOCOLS
from dataplane.policy.advise import Advice, Seen
from dataplane.policy.explain import EPHEMERAL_PORT
from dataplane.policy.workloads import Workloads, word_of
from dataplane.reasons import Reason
from dataplane.replay import Policies
from dataplane.verdict import Began, Conversation, Flow

PROTOCOL_NUMBERS = PROTOCOLS | {name: number for number, name in OTHER_PROTOCOLS.items()}
HANDSHAKE = (PROTOCOLS["TCP"], PROTOCOLS["SCTP"])  # nothing is said before the other end has answered
NEVER_JUDGED = {Reason.OWN_NODE, Reason.SAME_POD, Reason.NEIGHBOUR_DISCOVERY}
PAIRS_ASKED = 200_000  # of pods, when it is told what else the advice allows


@dataclass(slots=True)
class Traffic:
    """What was seen, each with the number of its flows, and what is no part of it and why.

    `missing`: lines that a flow log says it has not, by why; `unreadable`: lines that are cut or torn.
    """

    seen: Counter[Seen] = field(default_factory=Counter)
    passed_over: Counter[str] = field(default_factory=Counter)
    missing: Counter[str] = field(default_factory=Counter)
    unreadable: int = 0


class Reader:
    """Turns records into who opened flows to whom, as far as policies have to do with it."""

    def __init__(self, policies: Policies) -> None:
        self._policies = policies
        self._live = {pod.key: pod for pod in policies.known.pods if not pod.finished}
        self._services: dict[bytes, Service] = {
            address: service for service in policies.known.services for address in service.cluster_ips
        }

    def capture(self, flows: Iterable[tuple[Conversation, int]], *, unanswered: bool = False) -> Traffic:
        """What a capture's flows (`Replay.talks`), judged by the policies at hand, say was let through.

        Of TCP and SCTP only what was answered was (a RST may be a firewall's); of other protocols also
        what these policies allow.
        """
        found = Traffic()
        for each, number in flows:
            flow, verdict = each.flow, each.verdict
            answered = each.answered or each.began is not Began.OPENED
            if verdict.reason in NEVER_JUDGED:
                continue
            if not answered and not unanswered and (flow.protocol in HANDSHAKE or not verdict.allow):
                found.passed_over["unanswered or refused"] += number
                continue
            self._take(found, flow.src, None, flow.dst, None, flow, number)
        return found

    def flow_log(self, lines: Iterable[str], name: str) -> Traffic:
        """What the JSON lines of a flow log say was let through, audits included.

        Lines that are no JSON, as a full disk leaves them, are counted. InputError when there are no
        others, and for a line of something else than a flow log.
        """
        found = Traffic()
        read = 0
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError:
                found.unreadable += 1
                continue
            try:
                self._record(found, record)
            except (KeyError, ValueError, TypeError, AttributeError) as error:
                raise InputError(f"{name}: line {number} is no flow log's: {_wrong(error)}") from None
            read += 1
        if not read:
            raise InputError(f"{name}: neither a capture nor a flow log: no line of it is JSON")
        return found

    def _record(self, found: Traffic, record: Any) -> None:
        if not isinstance(record, dict):
            raise TypeError("it is no JSON object")
        event = record.get("event")
        if event in ("suppressed", "lost"):
            found.missing[event] += int(record["count"])
            return
        # What an audit let through counts as wanted, unless it is what no policy could allow.
        unlawful = record.get("would_deny") not in (None, Reason.NO_RULE.text, Reason.NO_TABLE.text)
        if record["verdict"] != "allow" or unlawful:
            found.passed_over["denied"] += 1
            return
        reason = record["reason"]
        # A hook's packets pass, or not, for reasons of its own.
        if record.get("reply") or reason in (
            "reply",
            "related",
            "hook",
            *(each.text for each in NEVER_JUDGED),
        ):
            return
        protocol = record["protocol"]
        number = PROTOCOL_NUMBERS.get(protocol)
        if number is None:
            number = int(protocol)
        src, dst = parse_address(record["src"]), parse_address(record["dst"])
        port = record.get("dst_port")
        if port is not None and not (isinstance(port, int) and 0 <= port <= 65535):
            raise ValueError(f"dst_port is {port!r}")
        flow = Flow(src, dst, number, 0, port or 0, port is not None)
        ends = src, _key(record.get("src_pod")), dst, _key(record.get("dst_pod"))
        if event == "end":  # a line of its own told where it began, unless that was before the log
            over = Traffic()
            self._take(over, *ends, flow)
            found.seen.update({each: 1 for each in over.seen if each not in found.seen})
            return
        self._take(found, *ends, flow)

    def _take(
        self,
        found: Traffic,
        src: bytes,
        src_pod: Key | None,
        dst: bytes,
        dst_pod: Key | None,
        flow: Flow,
        number: int = 1,
    ) -> None:
        source, destination = self._pod(src, src_pod), self._pod(dst, dst_pod)
        for named, pod in ((src_pod, source), (dst_pod, destination)):
            if named is not None and pod is None:
                found.passed_over[f"of {named}, which is not in PATH"] += number
                return
        if source is not None and destination is None:
            service = self._services.get(dst)
            if service is not None:
                asked = Seen(src, source, dst, None, flow.protocol, flow.dport)
                self._to_service(found, asked, service, number)
                return
        if source is None and destination is None:
            found.passed_over["between addresses that are no pods here"] += number
            return
        port = flow.dport if flow.has_ports else 0
        found.seen[Seen(src, source, dst, destination, flow.protocol, port)] += number

    def _pod(self, address: bytes, named: Key | None) -> Key | None:
        """The pod at an end: by its name if the record has one, so that a new address does no harm."""
        if named is not None:
            pod = self._live.get(named)
            return named if pod is not None and not pod.host_network else None
        return self._policies.names.get(address)

    def _to_service(self, found: Traffic, each: Seen, service: Service, number: int) -> None:
        """Policies judge what is sent on: to each pod behind the Service that has an address."""
        behind = [
            (pod, target)
            for pod in self._live.values()
            if pod.key.namespace == service.key.namespace
            and service.selector
            and service.selector.items() <= pod.labels.items()
            for target in _targets(service, pod, each)
        ]
        if not behind:
            found.passed_over[f"to Service {service.key}, behind which is no pod here"] += number
        for pod, target in behind:
            same = [address for address in pod.ips if family_of(address) == family_of(each.source)]
            if same:
                sent_on = each._replace(destination=same[0], destination_pod=pod.key, port=target)
                found.seen[sent_on] += number


def _targets(service: Service, pod: Pod, each: Seen) -> Iterator[int]:
    for protocol, port, target in service.ports:
        if (protocol, port) != (each.protocol, each.port):
            continue
        if isinstance(target, int):
            yield target
        else:
            yield from (own.port for own in pod.ports if (own.name, own.protocol) == (target, protocol))


def _key(text: object) -> Key | None:
    if text is None:
        return None
    if not isinstance(text, str) or text.count("/") != 1:
        raise ValueError(f"{text!r} is no pod's namespace/name")
    return Key(*text.split("/"))


def _wrong(error: Exception) -> str:
    return f"it has no {error}" if isinstance(error, KeyError) else str(error)


# --- what the advice allows ------------------------------------------------------------------------------


class More(NamedTuple):
    """What else the advice allows: of `pairs` pods of two workloads, only `seen` were seen talking so."""

    source: str
    destination: str
    protocol: int
    port: int
    seen: int
    pairs: int


@dataclass(frozen=True, slots=True)
class Proof:
    """What became of the same traffic with the advice alone in force. `unasked`: pairs too many to ask."""

    denied: tuple[Seen, ...]
    more: tuple[More, ...]
    unasked: int


def prove(known: Snapshot, advice: Advice, seen: Iterable[Seen]) -> Proof:
    """Judge what was seen by the advice alone, and find what else it allows between the same workloads."""
    policies = tuple(sorted((each.policy for each in advice.policies), key=lambda policy: policy.key))
    judged = Policies(replace(known, network_policies=policies, policy_endpoints=()))
    left_out = set(advice.left_out)
    wanted = [each for each in seen if each not in left_out]
    by_name = _addresses(known)
    denied = tuple(
        each
        for each in wanted
        if not judged.verdict(
            _flow(
                _address(by_name, each.source_pod, each.source),
                _address(by_name, each.destination_pod, each.destination),
                each,
            )
        ).allow
    )
    more, unasked = _more(known, judged, wanted, by_name)
    return Proof(denied, tuple(more), unasked)


def _addresses(known: Snapshot) -> Mapping[Key, tuple[bytes, ...]]:
    return {pod.key: pod.ips for pod in known.pods if not pod.finished and not pod.host_network}


def _address(by_name: Mapping[Key, tuple[bytes, ...]], pod: Key | None, address: bytes) -> bytes:
    """A pod's address now: a flow log may be older than the pod."""
    if pod is None or address in by_name.get(pod, ()):
        return address
    return next((own for own in by_name.get(pod, ()) if family_of(own) == family_of(address)), address)


def _flow(src: bytes, dst: bytes, each: Seen) -> Flow:
    return Flow(src, dst, each.protocol, EPHEMERAL_PORT, each.port, True)


def _more(
    known: Snapshot, judged: Policies, seen: Iterable[Seen], by_name: Mapping[Key, tuple[bytes, ...]]
) -> tuple[list[More], int]:
    workloads = Workloads(known.pods)
    members: defaultdict[tuple[str, LabelSelector], list[Key]] = defaultdict(list)
    of: dict[Key, tuple[str, LabelSelector]] = {}
    for key, pod in workloads.live.items():
        of[key] = (key.namespace, workloads.selector_of(pod, []))
        members[of[key]].append(key)
    talks: defaultdict[tuple[Any, Any, int, int, int], set[tuple[Any, Any]]] = defaultdict(set)
    for each in seen:
        # An end is a workload, or an address outside.
        ends = [
            of[pod] if pod is not None else address
            for pod, address in (
                (each.source_pod, each.source),
                (each.destination_pod, each.destination),
            )
        ]
        pair = (each.source_pod or each.source, each.destination_pod or each.destination)
        talks[ends[0], ends[1], each.protocol, each.port, family_of(each.source)].add(pair)
    found, unasked, left = [], 0, PAIRS_ASKED
    for (source, destination, protocol, port, family), pairs in talks.items():
        sides = [members[end] if isinstance(end, tuple) else [end] for end in (source, destination)]
        number = len(sides[0]) * len(sides[1])
        if number == len(pairs):
            continue
        if number > left:
            unasked += number
            continue
        left -= number
        allowed = set()
        for pair in product(*sides):
            at = [
                next((ip for ip in by_name.get(end, ()) if family_of(ip) == family), None)
                if isinstance(end, Key)
                else end
                for end in pair
            ]
            if pair[0] == pair[1] or at[0] is None or at[1] is None:
                continue
            flow = Flow(at[0], at[1], protocol, EPHEMERAL_PORT, port, True)
            if judged.verdict(flow).allow:
                allowed.add(pair)
        if allowed - pairs:
            found.append(
                More(_told(source), _told(destination), protocol, port, len(pairs), len(allowed | pairs))
            )
    return sorted(set(found)), unasked


def _told(end: tuple[str, LabelSelector] | bytes) -> str:
    """`shop/web`: the workload by its namespace and the word for it."""
    if isinstance(end, bytes):
        return format_address(end)
    return f"{end[0]}/{word_of(end[1]) or '*'}"
