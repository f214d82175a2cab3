"""The verdict for one packet that somebody asks about, by the engine that judges real packets.

Builds the packet, asks the compiled engine, and puts names to its answer: which policy, which rule.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dataplane._engine import judge
from dataplane._rules import RuleTable
from dataplane.addresses import family_of, format_address
from dataplane.errors import InputError
from dataplane.model import (
    PROTOCOL_NAMES,
    PROTOCOLS,
    Direction,
    Key,
    Rule,
    Snapshot,
)
from dataplane.policy.compile import Compiler, PodEntry, rule_of
from dataplane.policy.effective import effective_rules
from dataplane.reasons import Reason
from dataplane.verdict import End, Verdict

ICMP = {4: 1, 6: 58}
EPHEMERAL_PORT = 40000  # the source port of the question; no rule looks at it


@dataclass(frozen=True, slots=True)
class Port:
    """What `--port` named: IP protocol number and port. ICMP: None, its number depends on the family."""

    protocol: int | None
    number: int

    def __str__(self) -> str:
        return "ICMP" if self.protocol is None else f"{self.number}/{PROTOCOL_NAMES[self.protocol]}"


def parse_port(text: str) -> Port:
    """`80/TCP`, `53/udp`, `9/SCTP`, `80` (TCP) or `ICMP`."""
    if text.upper() in ("ICMP", "ICMPV6"):
        return Port(None, 0)
    number, _, protocol = text.partition("/")
    protocol = protocol.upper() or "TCP"
    if (
        protocol not in PROTOCOLS
        or not number.isascii()
        or not number.isdigit()
        or not 0 < int(number) < 65536
    ):
        raise InputError(f"--port {text}: write it as 80/TCP, 53/UDP, 9999/SCTP or ICMP")
    return Port(PROTOCOLS[protocol], int(number))


def parse_family(text: str | None) -> int | None:
    """4, 6, or None for "whichever both ends have"."""
    return int(text) if text in ("4", "6") else None


@dataclass(frozen=True, slots=True)
class Peer:
    """One end of the question: a pod, an address, or both where the address is a pod's.

    `node_ips`: the addresses of the node a pod runs on, as far as they are known.
    """

    addresses: tuple[bytes, ...]
    pod: Key | None = None
    node_ips: frozenset[bytes] = frozenset()

    def address(self, family: int) -> bytes | None:
        """Its first address of a family."""
        return next((address for address in self.addresses if family_of(address) == family), None)


def known_pods(snapshot: Snapshot, own_node: frozenset[bytes] = frozenset()) -> dict[Key, Peer]:
    """Every pod that the objects name, wherever it runs; `own_node` is added to local pods' node."""
    nodes: dict[Key, set[bytes]] = {}
    for endpoint in snapshot.policy_endpoints:
        for pod, _pod_ip, host_ip in endpoint.endpoints:
            nodes.setdefault(pod, set()).add(host_ip)
    for pod_object in snapshot.pods:
        nodes.setdefault(pod_object.key, set()).update(pod_object.host_ips)
    peers = {}
    for key, rules in effective_rules(snapshot, None).items():
        hosts = frozenset(nodes.get(key, ()))
        peers[key] = Peer(rules.addresses, key, hosts | own_node if hosts & own_node else hosts)
    return peers


def build_packet(src: bytes, dst: bytes, port: Port) -> bytes:
    """The first packet of such a flow: TCP SYN, an empty UDP datagram, SCTP INIT, ICMP echo request."""
    family = family_of(src)
    protocol = ICMP[family] if port.protocol is None else port.protocol
    match protocol:
        case 6:
            payload = struct.pack("!HHIIBBHHH", EPHEMERAL_PORT, port.number, 0, 0, 5 << 4, 2, 65535, 0, 0)
        case 17:
            payload = struct.pack("!HHHH", EPHEMERAL_PORT, port.number, 8, 0)
        case 132:
            payload = struct.pack("!HHII", EPHEMERAL_PORT, port.number, 0, 0)
            payload += struct.pack("!BBHIIHHI", 1, 0, 20, 1, 65535, 1, 1, 0)
        case _:
            payload = struct.pack("!BBHHH", 8 if family == 4 else 128, 0, 0, 1, 1)
    if family == 4:
        header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(payload), 0, 0, 64, protocol, 0)
    else:
        header = struct.pack("!IHBB", 6 << 28, len(payload), protocol, 64)
    return header + src + dst + payload


def describe_rule(rule: Rule) -> dict[str, Any]:
    """A rule as the contract's JSON shape."""
    return {
        "index": rule.index,
        "cidr": str(rule.cidr),
        "except": [str(prefix) for prefix in rule.excepts],
        "ports": [str(port) for port in rule.ports],
    }


DENYING = {Reason.NO_RULE, Reason.SPOOFED, Reason.MALFORMED, Reason.FRAGMENT, Reason.INVALID, Reason.NO_TABLE}


def describe_end(end: End, direction: Direction) -> dict[str, Any]:
    """One end of a verdict as the contract's JSON shape: verdict, reason, policy, rule."""
    found = end.pod.rule(direction, end.rule_id) if end.pod is not None else None
    policy, rule = (str(found[0]), describe_rule(found[1])) if found else (None, None)
    return {
        "verdict": "deny" if end.reason in DENYING else "allow",
        "reason": end.reason.text if end.reason is not Reason.NONE else Reason.NOT_A_POD.text,
        "policy": policy,
        "rule": rule,
    }


def describe_verdict(verdict: Verdict) -> dict[str, Any]:
    """A verdict with both ends, in the contract's JSON shape."""
    return {
        "verdict": "allow" if verdict.allow else "deny",
        "egress": describe_end(verdict.egress, Direction.EGRESS),
        "ingress": describe_end(verdict.ingress, Direction.INGRESS),
    }


def choose_family(source: Peer, destination: Peer, wanted: int | None) -> int:
    """The family both ends have; the one of the source's first address if both have two."""
    for family in [wanted] if wanted else [family_of(address) for address in source.addresses]:
        if source.address(family) and destination.address(family):
            return family
    raise InputError(
        "--from and --to have no address of the same family" + (f" (IPv{wanted})" if wanted else "")
    )


def _constant(reason: Reason) -> dict[str, Any]:
    end = {"verdict": "allow", "reason": reason.text, "policy": None, "rule": None}
    return {"verdict": "allow", "egress": dict(end), "ingress": dict(end)}


def explain(
    table: RuleTable,
    source: Peer,
    destination: Peer,
    port: Port,
    family: int | None = None,
) -> dict[str, Any]:
    """The engine's verdict for the first packet from `source` to `destination`, both ends judged.

    An end that is its counterpart's own node is never judged: those packets do not pass FORWARD.
    """
    chosen = choose_family(source, destination, family)
    src, dst = source.address(chosen), destination.address(chosen)
    assert src is not None
    assert dst is not None
    if source.pod is not None and source.pod == destination.pod:
        answer = _constant(Reason.SAME_POD)
    elif src in destination.node_ips or dst in source.node_ips:
        answer = _constant(Reason.OWN_NODE)
    else:
        entries = {entry.key: entry for entry in table.pods}
        answer = describe_verdict(
            judge(
                table,
                build_packet(src, dst, port),
                indev=_device(entries, source.pod),
                outdev=_device(entries, destination.pod),
            )
        )
        # The first denial decides a real packet; a person asking wants to know about both ends.
        if answer["egress"]["verdict"] == "deny" and destination.pod in entries:
            alone = judge(table, build_packet(src, dst, port), outdev=_device(entries, destination.pod))
            answer["ingress"] = describe_verdict(alone)["ingress"]
    answer["from"] = {"pod": str(source.pod) if source.pod else None, "ip": format_address(src)}
    answer["to"] = {"pod": str(destination.pod) if destination.pod else None, "ip": format_address(dst)}
    answer["port"] = str(port)
    return answer


def _device(entries: Mapping[Key, PodEntry], pod: Key | None) -> int:
    entry = entries.get(pod) if pod is not None else None
    return entry.devices[0] if entry is not None and entry.devices else 0


def describe_rules(table: RuleTable, pod: int) -> dict[str, Any]:
    """What `podgate rules` shows of a pod: its policies' rules and what they compile to, per direction.

    `pod` is its index in `table.pods`.
    """
    entry = table.pods[pod]
    answer: dict[str, Any] = {
        "pod": str(entry.key),
        "addresses": [format_address(address) for address in entry.addresses],
    }
    for direction, rules, compiled in (
        ("ingress", entry.ingress, table.ingress(pod)),
        ("egress", entry.egress, table.egress(pod)),
    ):
        if rules is None or compiled is None:
            answer[direction] = None
            continue
        answer[direction] = {
            "audit": direction in entry.audit,
            "rules": [{"policy": str(policy), **describe_rule(rule)} for policy, rule in rules.rules],
            "intervals": [
                {
                    "peer": interval.peer,
                    "allowed": [
                        {
                            "ports": str(allowed),
                            "policy": str(rule_of(compiled, allowed.rule_id)[0]),
                            "rule": rule_of(compiled, allowed.rule_id)[1].index,
                        }
                        for allowed in interval.allowed
                    ],
                }
                for family in (4, 6)
                for interval in compiled.intervals(family)
                if interval.allowed
            ],
        }
    return answer


def table_of_everything(snapshot: Snapshot, compiler: Compiler) -> RuleTable:
    """One table with every pod the objects name, whatever its node, behind made-up devices."""
    entries = [
        PodEntry(
            key,
            pod.addresses,
            (device,),
            pod.ingress,
            pod.egress,
            audit=pod.audit,
            ingress_policies=pod.ingress_policies,
            egress_policies=pod.egress_policies,
        )
        for device, (key, pod) in enumerate(effective_rules(snapshot, None).items(), start=1)
    ]
    return compiler.table(1, entries, ())
