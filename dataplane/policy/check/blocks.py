"""ipBlock: addresses that change, addresses that no packet carries, and excepts without effect."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence

from dataplane.addresses import BITS, format_address, parse_prefix
from dataplane.model import Direction, IPBlock, Key
from dataplane.policy.check.dns import DnsServers
from dataplane.policy.check.findings import Check, Finding, Severity
from dataplane.policy.check.world import RuleAt, World, names

HOLDS_PODS = Check(
    "ip-block-holds-pods",
    Severity.WARNING,
    "An ipBlock names pods by their addresses",
    "A pod's address changes when the pod is replaced, and another pod may get it. Found for blocks of a "
    "single address, and for blocks of at most 256 IPv4 addresses (2^48 IPv6) that hold addresses of pods "
    "outside their `except`. Silent for wider blocks, which mean a network, and for hostNetwork pods.",
)
HOLDS_CLUSTER_IPS = Check(
    "ip-block-holds-cluster-ips",
    Severity.WARNING,
    "An ipBlock names Services by their ClusterIPs",
    "Packets to a ClusterIP are judged after translation to a pod's address, and nothing is ever sent from "
    "one: such a block matches no packet. Silent for whole private or public ranges, for blocks that hold "
    "addresses of pods or nodes too, and for the DNS Service's where node-local DNS runs.",
)
EXCEPT_OUTSIDE = Check(
    "except-outside-cidr",
    Severity.ERROR,
    "An except outside its cidr",
    "`except` takes addresses out of its own `cidr`; one that is not inside has no effect.",
)
EXCEPT_ALL = Check(
    "except-holds-cidr",
    Severity.ERROR,
    "An except takes out the whole cidr",
    "The `except` holds every address of the `cidr`: the block matches nothing.",
)
CHECKS = (HOLDS_PODS, HOLDS_CLUSTER_IPS, EXCEPT_OUTSIDE, EXCEPT_ALL)

_NARROW = {4: 24, 6: 80}
_WIDE = tuple(
    parse_prefix(text)[0]
    for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7", "fd00::/8")
)


def find(world: World) -> Iterator[Finding]:
    """What is to say about ipBlocks."""
    live = [pod for pod in world.snapshot.pods if not pod.finished]
    pods = _Held((address, pod.key) for pod in live if not pod.host_network for address in pod.ips)
    nodes = _Held((address, pod.key) for pod in live for address in pod.host_ips)
    services = _Held(
        (address, service.key) for service in world.snapshot.services for address in service.cluster_ips
    )
    dns = DnsServers(world)
    local = frozenset(dns.cluster_ips) if dns.node_local else frozenset()
    for rule in world.every_rule():
        for peer in rule.peers():
            if isinstance(peer.normal, IPBlock):
                yield from _excepts(rule, peer.field, peer.normal)
                yield from _pods(rule, peer.field, peer.normal, pods)
                if not pods.any(peer.normal) and not nodes.any(peer.normal):
                    yield from _services(rule, peer.field, peer.normal, services, local)


class _Held:
    """Addresses and whose they are, found by block."""

    def __init__(self, entries: Iterable[tuple[bytes, Key]]) -> None:
        by_family: dict[int, list[tuple[bytes, Key]]] = {4: [], 16: []}
        for address, key in entries:
            by_family[len(address)].append((address, key))
        self._entries = {size: sorted(held) for size, held in by_family.items()}
        self._addresses = {size: [each for each, _ in held] for size, held in self._entries.items()}

    def any(self, block: IPBlock) -> bool:
        """Whether an address is in the block's cidr, excepts or not."""
        size = len(block.cidr.network)
        start = bisect_left(self._addresses[size], block.cidr.network)
        return start < len(self._addresses[size]) and self._addresses[size][start] in block.cidr

    def within(self, block: IPBlock) -> list[tuple[bytes, Key]]:
        """What the block matches."""
        size = len(block.cidr.network)
        addresses = self._addresses[size]
        found = self._entries[size][
            bisect_left(addresses, block.cidr.network) : bisect_right(addresses, block.cidr.last)
        ]
        return [each for each in found if not any(each[0] in hole for hole in block.excepts)]


def _pods(rule: RuleAt, field: str, block: IPBlock, pods: _Held) -> Iterator[Finding]:
    if block.cidr.length < _NARROW[block.cidr.family]:
        return
    held = pods.within(block)
    if held:
        single = block.cidr.length == BITS[len(block.cidr.network)]
        keys = sorted({key for _, key in held})
        message = f"{block.cidr} is the address of pod {keys[0]}" if single else _holding(block, "pods", keys)
        yield HOLDS_PODS.at(
            rule.policy.key,
            f"{field}.ipBlock.cidr",
            f"{message}; addresses of pods change",
            "write a podSelector, with a namespaceSelector for pods of other namespaces",
        )


def _services(
    rule: RuleAt, field: str, block: IPBlock, services: _Held, local: frozenset[bytes]
) -> Iterator[Finding]:
    if block.cidr.length == 0 or any(block.cidr.covers(wide) for wide in _WIDE):
        return
    held = services.within(block)
    # Packets to node-local DNS on the DNS Service's address are not translated.
    if not held or any(address in local for address, _ in held):
        return
    keys = sorted({key for _, key in held})
    single = block.cidr.length == BITS[len(block.cidr.network)]
    what = f"{format_address(held[0][0])} is the ClusterIP of Service {keys[0]}"
    message = what if single else _holding(block, "ClusterIPs of Services", keys)
    outgoing = rule.direction is Direction.EGRESS
    yield HOLDS_CLUSTER_IPS.at(
        rule.policy.key,
        f"{field}.ipBlock.cidr",
        f"{message}; "
        + ("packets are judged by the pod's address" if outgoing else "nothing comes from one"),
        "write selectors for the pods behind the Service, and their port" if outgoing else "write selectors",
    )


def _holding(block: IPBlock, what: str, keys: Sequence[Key]) -> str:
    return f"{block.cidr} holds {what} ({names(keys)})"


def _excepts(rule: RuleAt, field: str, block: IPBlock) -> Iterator[Finding]:
    for index, hole in enumerate(block.excepts):
        where = f"{field}.ipBlock.except[{index}]"
        if hole.covers(block.cidr):
            yield EXCEPT_ALL.at(
                rule.policy.key,
                where,
                f"{hole} holds the whole cidr {block.cidr}: the block matches nothing",
                "make the except smaller, or remove the peer",
            )
        elif not block.cidr.covers(hole):
            yield EXCEPT_OUTSIDE.at(
                rule.policy.key,
                where,
                f"{hole} is outside cidr {block.cidr} and has no effect",
                "correct one of the two, or remove the except",
            )
