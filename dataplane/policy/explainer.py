"""All that `podgate explain` answers: the verdict, why, and what would allow what is denied.

Finds the ends that a person names, and says so when they are not what they look like: a Service, a
finished pod, a pod on its host's network, a Service's port.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from dataplane._rules import RuleTable
from dataplane.addresses import family_of, parse_address
from dataplane.errors import InputError
from dataplane.model import Direction, Key, Pod, PortRange, Service, Snapshot
from dataplane.policy.explain import ICMP, Peer, Port, explain, known_pods, parse_family, parse_port
from dataplane.policy.suggest import Suggestions
from dataplane.policy.why import SHOWN, Candidate, Whys
from dataplane.reasons import Reason

NAMES_SHOWN = 10  # of pods, in one line


class Explainer:
    """Explains packets by one table and the objects that it was made from.

    `known`: the objects as they were read; `resolved`: the same with the PolicyEndpoints of their
    NetworkPolicies; `own_node`: this node's addresses, for an agent's table.
    """

    def __init__(
        self, table: RuleTable, known: Snapshot, resolved: Snapshot, own_node: frozenset[bytes] = frozenset()
    ) -> None:
        self._table = table
        self._known = known
        self._pods = known_pods(resolved, own_node)
        self._whys = Whys(known, resolved)
        self._suggestions = Suggestions(known, self._whys)

    def explain(
        self, source: str, destination: str, port: str, family: str | None, *, everything: bool = False
    ) -> dict[str, Any]:
        """What `podgate explain -o json` prints of a packet; arguments as its options have them.

        Besides the verdict: each end's isolating policies; of an end that a rule allows, where that is
        written; of one that is denied, or would be but for an audit, why each candidate rule did not match
        (`everything`: all of them, else the nearest) and a policy that would allow it; and notes on what
        was asked.
        """
        ends = {
            Direction.EGRESS: find_peer(source, self._pods, self._known, "--from"),
            Direction.INGRESS: find_peer(destination, self._pods, self._known, "--to"),
        }
        asked = parse_port(port)
        answer = explain(
            self._table, ends[Direction.EGRESS], ends[Direction.INGRESS], asked, parse_family(family)
        )
        port_notes = self._port_notes(ends[Direction.INGRESS], asked)
        answer["notes"] = [*self._end_notes(source, destination, ends, answer), *port_notes]
        answer["suggestions"] = []
        for direction, (own, other) in {
            Direction.EGRESS: ("from", "to"),
            Direction.INGRESS: ("to", "from"),
        }.items():
            pod = ends[direction].pod
            end = answer[direction]
            end["policies"] = [str(each) for each in self._whys.policies(pod, direction)] if pod else []
            peer = parse_address(answer[other]["ip"])
            if pod is None:
                continue
            number = ICMP[family_of(peer)] if asked.protocol is None else asked.protocol
            names = (answer[other]["pod"] or answer[other]["ip"], answer[other]["ip"], answer[own]["pod"])
            if end["reason"] == Reason.POLICY_RULE.text:
                policy = Key(*end["policy"].split("/"))
                written = self._whys.allowed(
                    pod, direction, peer, number, asked.number, policy, end["rule"]["index"]
                )
                end["field"] = written.field
            elif end["reason"] in (Reason.NO_RULE.text, Reason.AUDIT.text):
                shown = None if everything else SHOWN
                why = self._whys.denied(pod, direction, peer, number, asked.number, shown)
                end["candidates"] = [_describe_candidate(each, names) for each in why.candidates]
                end["more"] = [
                    {"reason": each.miss.value, "count": each.number, "sentence": each.sentence}
                    for each in why.more
                ]
                made = self._suggestions.allow(pod, direction, peer, asked.protocol, asked.number)
                made = replace(made, comments=(*made.comments, *port_notes))
                answer["suggestions"].append(
                    {
                        "direction": direction.value,
                        "comments": list(made.comments),
                        "manifest": made.document(),
                        "yaml": made.yaml(),
                    }
                )
        return answer

    def _end_notes(
        self, source: str, destination: str, ends: Mapping[Direction, Peer], answer: Mapping[str, Any]
    ) -> list[str]:
        """What the reader may not know of the ends that were named."""
        notes = []
        for text, direction, end in (
            (source, Direction.EGRESS, answer["from"]),
            (destination, Direction.INGRESS, answer["to"]),
        ):
            if "/" in text and end["pod"] is None:
                notes.append(
                    f"{text} is on its node's network: no policy isolates it; others see {end['ip']}"
                )
            reason, pod = answer[direction]["reason"], ends[direction].pod
            if pod is not None and reason == Reason.NOT_A_POD.text:
                notes.append(f"{text} is not on this node: its {direction} is judged where it runs")
            if pod is not None and reason == Reason.NO_RULE.text and not self._whys.policies(pod, direction):
                notes.append(f"no policy isolates {text} for {direction}: strict mode isolates every pod")
        address = parse_address(answer["to"]["ip"])
        for service in self._known.services:
            if address in service.cluster_ips:
                behind = _behind(service, self._known)
                notes.append(
                    f"{answer['to']['ip']} is the ClusterIP of Service {service.key}; {_SENT_ON}: "
                    + (f"ask for one of {_few(behind)}" if behind else "none is behind it here")
                )
        return notes

    def _port_notes(self, destination: Peer, port: Port) -> list[str]:
        """Says so when `port` is a Service's, and the pod behind it gets it at another."""
        pod = next((pod for pod in self._known.pods if pod.key == destination.pod), None)
        if pod is None or any(
            (each.protocol, each.port) == (port.protocol, port.number) for each in pod.ports
        ):
            return []
        notes = []
        for service in self._known.services:
            target = _target(service, pod, port) if _is_behind(service, pod) else None
            if target is not None and target.first != port.number:
                notes.append(
                    f"{port} is a port of Service {service.key}, which leads to {target} of {pod.key}:"
                    f" ask for --port {target}"
                )
        return notes


_DUMP = "kubectl get netpol,pods,ns,svc -A -o yaml"
_SENT_ON = "packets are judged when they have been sent on to a pod"


def _target(service: Service, pod: Pod, port: Port) -> PortRange | None:
    """Where a Service sends its port on to on this pod; None for a port that it has not, or the pod lacks."""
    for protocol, number, target in service.ports:
        if (protocol, number) != (port.protocol, port.number):
            continue
        if isinstance(target, int):
            return PortRange(protocol, target, target)
        for each in pod.ports:
            if (each.name, each.protocol) == (target, protocol):
                return PortRange(protocol, each.port, each.port)
    return None


def _describe_candidate(candidate: Candidate, names: tuple[str, str, str]) -> dict[str, Any]:
    """`names`: the other end's pod or address, its address, and the pod at this end."""
    return {
        "policy": str(candidate.policy),
        "field": candidate.field,
        "reason": candidate.miss.value,
        "sentence": candidate.told(*names),
    }


def find_peer(text: str, pods: Mapping[Key, Peer], known: Snapshot, option: str) -> Peer:
    """The end that `namespace/pod` or an IP means. InputError when there is no such pod.

    A pod on its host's network is its node's address, and no pod to policies.
    """
    namespace, slash, name = text.partition("/")
    if slash:
        key = Key(namespace, name)
        peer = pods.get(key)
        if peer is not None and peer.addresses:
            return peer
        pod = next((pod for pod in known.pods if pod.key == key), None)
        if pod is not None and pod.host_network and not pod.finished and (pod.ips or pod.host_ips):
            return Peer(pod.ips or pod.host_ips)
        raise InputError(f"{option} {text}: {_no_such_pod(key, pod, pods, known)}")
    try:
        address = parse_address(text)
    except ValueError:
        raise InputError(f"{option} {text}: write it as namespace/pod or as an IP address") from None
    for peer in pods.values():
        if address in peer.addresses:
            return Peer((address,), peer.pod, peer.node_ips)
    return Peer((address,))


def _no_such_pod(key: Key, pod: Pod | None, pods: Mapping[Key, Peer], known: Snapshot) -> str:
    if pod is not None and pod.finished:
        return "a finished pod (Succeeded or Failed): it owns no address any more"
    if pod is not None:
        return "this pod has no address yet, or a newer pod has it now"
    service = next((service for service in known.services if service.key == key), None)
    if service is not None:
        behind = _behind(service, known)
        ask = f"ask for one of its pods: {_few(behind)}" if behind else "and no pod here is behind it"
        return f"a Service; {_SENT_ON}; {ask}"
    if not pods:
        return f"no pod is known here: give Pod objects too, for example from `{_DUMP}`"
    near = [
        each
        for each in sorted(pods)
        if pods[each].addresses and (each.name == key.name or each.namespace == key.namespace)
    ]
    return "no pod of that name with an address is known here; " + (
        f"did you mean one of {_few(near)}?" if near else "an IP address works too"
    )


def _few(keys: Sequence[Key]) -> str:
    shown = ", ".join(str(key) for key in keys[:NAMES_SHOWN])
    return shown + (f" and {len(keys) - NAMES_SHOWN} more" if len(keys) > NAMES_SHOWN else "")


def _behind(service: Service, known: Snapshot) -> list[Key]:
    return [pod.key for pod in known.pods if pod.ips and _is_behind(service, pod)]


def _is_behind(service: Service, pod: Pod) -> bool:
    return (
        bool(service.selector)
        and pod.key.namespace == service.key.namespace
        and not pod.finished
        and service.selector.items() <= pod.labels.items()
    )
