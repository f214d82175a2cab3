"""The iptables rules that steer pods' packets into the queues, as text. Pure: no I/O, no history.

Every packet path ends in one of four ways: not steered (accepted untouched), queued for a verdict,
already judged (its connection carries the bits its steered ends need), or dropped with a reason.

    raw PREROUTING     forged sources of known pods are dropped before anything looks at them: a flow
                       that lives in the kernel is not bound to an interface, so another pod could ride it
    mangle FORWARD     after DNAT, before `filter`. Steered ends that were not judged yet → PODGATE-QUEUE
    mangle INPUT       the same for local service addresses, egress end only
    mangle POSTROUTING, filter INPUT
                       the verdict's mark is saved to the connection; our bits leave the packet

Packets that need no verdict can be shown to a queue all the same, for people who want to see them all:
PODGATE-WATCH comes after everything above, so that nothing there depends on it, and what it queues
passes when nobody listens. Its rules are there only while somebody looks.

All packets of some pods can be given to a user's hook: PODGATE-HOOK comes first in mangle, so that flows
in the kernel and denials are among them. Its queue judges by the same rules, so it is as closed as ours.

Which ends are steered is told by bits of the interface's device group (routed pods) or by sets and
physdev rules (pods on a bridge), never by a source address a pod could choose.

Rules are written exactly as iptables-save prints them, so that reading back is comparing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from dataplane.addresses import Prefix, format_address
from dataplane.config import MarkLayout

# Bits of a link's device group (netlink IFLA_GROUP); the others belong to whoever set them.
GROUP_EGRESS = 0x10000000  # the pod behind the link is isolated for egress
GROUP_INGRESS = 0x20000000  # … for ingress
GROUP_CHECKED = 0x40000000  # what comes from the link must carry an address of its pod
GROUP_MASK = GROUP_EGRESS | GROUP_INGRESS | GROUP_CHECKED
GROUP_ISOLATED = GROUP_EGRESS | GROUP_INGRESS

CHAIN_PREFIX = "PODGATE-"
SET_PREFIX = "podgate-"
COMMENT = "-m comment --comment podgate"
# Rules whose packet counters are told to people, by the word in their comment.
COUNTED = ("spoofed", "invalid", "no-table")
FAMILIES = (4, 6)
TABLES = ("raw", "filter", "mangle")  # in the order in which they are written: mangle starts steering
BUCKET = 12  # rules of one sub-chain of bridge ports

Rules = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Options:
    """What the rules depend on besides the ports of a bridge.

    `queues` are the first and last queue number. `not_pods`: links that strict mode must not take for
    pods not yet known although their names begin like a pod's. `audit`: no rule drops; what one would
    have dropped is counted. `reject`: what a verdict marks with all three bits is dropped, and answered.
    """

    marks: MarkLayout = field(default_factory=MarkLayout)
    queues: tuple[int, int] = (0, 0)
    fail_open: bool = False
    offload: bool = True
    strict: bool = False
    veth_prefix: str = "eni"
    not_pods: tuple[str, ...] = ()
    audit: bool = False
    watch: int | None = None  # the queue that is shown what no rule queues of watched pods
    hook: int | None = None  # the queue that gets all packets of hooked pods
    reject: bool = False


@dataclass(frozen=True, slots=True, order=True)
class Port:
    """A bridge port with a pod behind it: its link's name and the pod's addresses."""

    name: str
    addresses: tuple[bytes, ...]
    egress: bool
    ingress: bool
    checked: bool


@dataclass(frozen=True, slots=True)
class TableRules:
    """Chains of ours in one table, by name, and the built-in chains that jump to one of them first."""

    chains: dict[str, Rules] = field(default_factory=dict)
    jumps: dict[str, str] = field(default_factory=dict)


def jump(chain: str) -> str:
    """The rule by which a built-in chain enters ours."""
    return f"{COMMENT} -j {chain}"


def set_name(kind: str, family: int) -> str:
    """`spoof`: (pod address, link); `service`: local service addresses; `egress`, `ingress`, `bound`:
    addresses of pods on bridges that are isolated, or whose source is checked; `watched`: addresses of
    pods of which every packet is looked at; `hooked`: of pods whose packets go to a user's hook."""
    return f"{SET_PREFIX}{kind}-{family}"


def render(options: Options, ports: Sequence[Port], family: int) -> dict[str, TableRules]:
    """Every rule of one family (4 or 6), by table. Equal input gives equal output."""
    ports = sorted(ports)
    return {
        "raw": _raw(options, ports, family),
        "filter": _filter(options, family),
        "mangle": _mangle(options, ports, family),
    }


def _hex(value: int, mask: int | None = None) -> str:
    return f"{value:#x}" if mask is None else f"{value:#x}/{mask:#x}"


def _counted(options: Options, reason: str, passed: str = "") -> str:
    """Count and drop. `passed`: what is done instead in audit; by default the next rule comes."""
    return f'-m comment --comment "podgate: {reason}"{passed if options.audit else " -j DROP"}'


def _invalid(options: Options) -> str:
    # Accepted, like what a queue lets through: in a bridge's chains it would be counted at each end.
    return f"-m conntrack --ctstate INVALID {_counted(options, 'invalid', ' -j ACCEPT')}"


def _raw(options: Options, ports: Sequence[Port], family: int) -> TableRules:
    # Link-local and unspecified sources belong to neighbour discovery and duplicate address
    # detection; no router forwards them (RFC 4291 §2.5.2, §2.5.6).
    exempt = ("-s fe80::/10 -j RETURN", "-s ::/128 -j RETURN") if family == 6 else ()
    enter = [f"{_groups('src', GROUP_CHECKED)} -j PODGATE-SOURCE"]
    chains: dict[str, Rules] = {
        "PODGATE-SOURCE": (
            f"-m set --match-set {set_name('spoof', family)} src,src -j RETURN",
            *exempt,
            _counted(options, "spoofed"),
        )
    }
    checked = [port for port in ports if port.checked]
    if checked:
        enter.append("-m physdev --physdev-is-in -j PODGATE-PORT")
        chains |= _port_sources(options, checked, family, exempt)
    chains["PODGATE-PREROUTING"] = tuple(enter)
    return TableRules(chains, {"PREROUTING": "PODGATE-PREROUTING"})


def _port_sources(options: Options, ports: Sequence[Port], family: int, exempt: Rules) -> dict[str, Rules]:
    """Which source each bridge port may use: found by address, through sub-chains of a few rules.

    No set can do this: hash:net,iface has `physdev:` entries, but the set match of iptables has no
    way to ask for them (IPSET_FLAG_PHYSDEV; net/netfilter/xt_set.c never sets it).
    """
    own = [(address, port.name) for port in ports for address in port.addresses if _is(address, family)]
    leaves = list(_leaves(sorted(own), 0))
    enter = list(exempt)
    chains: dict[str, Rules] = {}
    for number, (prefix, members) in enumerate(leaves):
        # Goto: RETURN in the sub-chain then leaves PODGATE-PORT as well.
        enter.append(f"-s {prefix} -g PODGATE-PORT-{number}" if prefix else f"-g PODGATE-PORT-{number}")
        chains[f"PODGATE-PORT-{number}"] = (
            *(
                f"-s {format_address(address)}/{len(address) * 8} -m physdev --physdev-in {name} -j RETURN"
                for address, name in members
            ),
            "-g PODGATE-PORT-OTHER",
        )
    return chains | {
        "PODGATE-PORT": (*enter, "-g PODGATE-PORT-OTHER"),
        "PODGATE-PORT-OTHER": tuple(
            f"-m physdev --physdev-in {port.name} -j PODGATE-FORGED" for port in ports
        ),
        "PODGATE-FORGED": (_counted(options, "spoofed"),),
    }


def _leaves(
    members: Sequence[tuple[bytes, str]], depth: int
) -> Iterator[tuple[Prefix | None, Sequence[tuple[bytes, str]]]]:
    """Split sorted addresses into disjoint prefixes of at most BUCKET members each."""
    if not members:
        return
    first = members[0][0]
    bits = len(first) * 8
    if len(members) <= BUCKET or depth == bits:
        length = depth
        network = int.from_bytes(first) >> (bits - length) << (bits - length)
        yield (Prefix(network.to_bytes(len(first)), length) if length else None), members
        return
    position = bits - 1 - depth
    middle = next(
        (at for at, (address, _) in enumerate(members) if int.from_bytes(address) >> position & 1),
        len(members),
    )
    yield from _leaves(members[:middle], depth + 1)
    yield from _leaves(members[middle:], depth + 1)


def _is(address: bytes, family: int) -> bool:
    return len(address) == (4 if family == 4 else 16)


ANSWERS = "100/sec"  # and as many at once: a flood of denied packets must not become one of answers


def _filter(options: Options, family: int) -> TableRules:
    chains: dict[str, Rules] = {"PODGATE-INPUT-SAVE": _save(options, answer=True)}
    jumps = {"INPUT": "PODGATE-INPUT-SAVE"}
    if options.reject:
        # REJECT works in `filter` only. It answers no RST, no ICMP error, no fragment and no broadcast.
        prohibited = "icmp-admin-prohibited" if family == 4 else "icmp6-adm-prohibited"
        chains |= {
            "PODGATE-FORWARD-REJECT": (f"{_denied(options)} -j PODGATE-REJECT",),
            "PODGATE-REJECT": (
                f"-m limit --limit {ANSWERS} --limit-burst {ANSWERS.partition('/')[0]} -j PODGATE-ANSWER",
                "-j DROP",
            ),
            "PODGATE-ANSWER": (
                "-p tcp -j REJECT --reject-with tcp-reset",
                f"-j REJECT --reject-with {prohibited}",
            ),
        }
        jumps["FORWARD"] = "PODGATE-FORWARD-REJECT"
    return TableRules(chains, jumps)


def _denied(options: Options) -> str:
    """A verdict sets E and I alone: all three bits are the mark of what is to be answered."""
    return f"-m mark --mark {_hex(options.marks.mask, options.marks.mask)}"


def _save(options: Options, *, answer: bool = False) -> Rules:
    """Keep the verdict's bits in the connection, then take ours off the packet.

    A packet that is to be answered gets no further, whatever became of the rules that answer; with
    `answer` they are asked first.
    """
    marks = options.marks
    targets = ("PODGATE-REJECT", "DROP") if answer else ("DROP",)
    rejecting = [f"{_denied(options)} -j {target}" for target in targets if options.reject]
    saving = (
        [
            # One bit at a time: saving with a mask of both would wipe the bit this verdict did not see.
            f"-m mark --mark {_hex(bit, bit)} -j CONNMARK --set-xmark {_hex(bit, bit)}"
            for bit in (marks.egress, marks.ingress)
        ]
        if options.offload
        else []
    )
    return (
        f"-m mark --mark {_hex(0, marks.mask)} -j RETURN",
        *rejecting,
        *saving,
        f"-j MARK --set-xmark {_hex(0, marks.mask)}",
    )


def _mangle(options: Options, ports: Sequence[Port], family: int) -> TableRules:
    marks = options.marks
    # What comes with our bits set did not get them from a verdict.
    clean = f"-m mark ! --mark {_hex(0, marks.mask)} -j MARK --set-xmark {_hex(0, marks.mask)}"
    service = f"-m set ! --match-set {set_name('service', family)} dst -j RETURN"
    expected = _expected(options, family)
    forward: list[str] = []
    entry = [clean, service, *expected]
    chains: dict[str, Rules] = {
        "PODGATE-QUEUE": _queue(options),
        "PODGATE-POSTROUTING": _save(options),
    }
    if options.strict:
        inward = [f"-i {name}+ -j PODGATE-UNKNOWN-IN" for name in _pod_names(options)]
        forward += [*inward, *(f"-o {name}+ -j PODGATE-UNKNOWN-OUT" for name in _pod_names(options))]
        entry += inward
        chains |= _unknown(options)
    if options.offload:
        # Both ends judged: no rule below can queue it, and most packets of a busy node are such.
        forward.append(
            f"-m connmark --mark {_hex(marks.saved, marks.saved)} -m conntrack ! --ctstate RELATED -j RETURN"
        )
    forward += [clean, *expected]
    if ports:
        forward.append("-j PODGATE-BRIDGE")
        entry += _bridge_from(ports, family, GROUP_EGRESS)
        chains |= _bridge(options, ports, family)
    forward += _forward(options)
    entry += _input(options)
    chains |= {"PODGATE-FORWARD": tuple(forward), "PODGATE-INPUT": tuple(entry)}
    if options.watch is not None:
        chains |= _watch(options, chains, service, family)
    if options.hook is not None:
        chains |= _hook(options, chains, (clean, *expected), service, family)
    return TableRules(
        chains,
        {"FORWARD": "PODGATE-FORWARD", "INPUT": "PODGATE-INPUT", "POSTROUTING": "PODGATE-POSTROUTING"},
    )


def _watch(options: Options, chains: dict[str, Rules], service: str, family: int) -> dict[str, Rules]:
    """What the chains let pass unjudged of watched pods is queued too, for somebody who looks on."""
    reply, watched = options.marks.reply, set_name("watched", family)
    return {
        "PODGATE-STEER": chains["PODGATE-FORWARD"],
        "PODGATE-STEER-INPUT": chains["PODGATE-INPUT"],
        "PODGATE-FORWARD": ("-j PODGATE-STEER", "-j PODGATE-WATCH"),
        "PODGATE-INPUT": ("-j PODGATE-STEER-INPUT", service, "-j PODGATE-WATCH"),
        "PODGATE-WATCH": tuple(
            f"-m set --match-set {watched} {side} -j PODGATE-WATCHED" for side in ("src", "dst")
        ),
        "PODGATE-WATCHED": (
            f"-m conntrack --ctdir REPLY -j MARK --set-xmark {_hex(reply, reply)}",
            f"-j NFQUEUE --queue-num {options.watch} --queue-bypass",
        ),
    }


def _hook(
    options: Options, chains: dict[str, Rules], before: Rules, service: str, family: int
) -> dict[str, Rules]:
    """Before anything is steered, all packets of hooked pods go to the hook's queue.

    What the chains drop by themselves stays theirs. `before`: the rules that every packet to be judged
    must have met.
    """
    reply, hooked = options.marks.reply, set_name("hooked", family)
    source, destination = (f"-m set --match-set {hooked} {side} -j PODGATE-HOOKED" for side in ("src", "dst"))
    unknown = [
        f"{flag} {name}+ -j PODGATE-UNKNOWN-{way}"
        for way, flag in (("IN", "-i"), ("OUT", "-o"))
        for name in _pod_names(options)
        if options.strict
    ]
    bypass = " --queue-bypass" if options.fail_open else ""
    return {
        "PODGATE-FORWARD": ("-j PODGATE-HOOK", *chains["PODGATE-FORWARD"]),
        "PODGATE-INPUT": ("-j PODGATE-HOOK-INPUT", *chains["PODGATE-INPUT"]),
        "PODGATE-HOOK": (source, destination),
        "PODGATE-HOOK-INPUT": (service, source),
        "PODGATE-HOOKED": (
            "-m conntrack --ctstate INVALID -j RETURN",
            *unknown,
            *before,
            f"-m conntrack --ctdir REPLY -j MARK --set-xmark {_hex(reply, reply)}",
            f"-j NFQUEUE --queue-num {options.hook}{bypass}",
        ),
    }


def _expected(options: Options, family: int) -> Rules:
    """A connection that a conntrack helper expects (FTP data …) begins with the mark of the one that
    announced it, our bits included (nf_conntrack_core.c, init_conntrack): nobody has judged it yet.

    An ICMP error is RELATED too, but its connection is the one it quotes.
    """
    if not options.offload:
        return ()
    icmp = "icmp" if family == 4 else "ipv6-icmp"
    wipe = f"-j CONNMARK --set-xmark {_hex(0, options.marks.saved)}"
    return (f"! -p {icmp} -m conntrack --ctstate RELATED {wipe}",)


def _queue(options: Options) -> Rules:
    first, last = options.queues
    # --queue-balance hashes addresses and protocol: both directions of a flow meet on one queue.
    number = f"--queue-num {first}" if first == last else f"--queue-balance {first}:{last}"
    bypass = " --queue-bypass" if options.fail_open else ""
    reply = options.marks.reply
    return (
        f"-m conntrack --ctdir REPLY -j MARK --set-xmark {_hex(reply, reply)}",
        f"-j NFQUEUE {number}{bypass}",
    )


def _unjudged(options: Options, bit: int) -> str:
    return f" -m connmark ! --mark {_hex(bit, bit)}" if options.offload else ""


def _groups(side: str, bits: int) -> str:
    return f"-m devgroup --{side}-group {_hex(bits, bits)}"


def _ends(options: Options, bits: int, inward: bool) -> list[str]:
    """What must be queued of the packets of an end that is isolated as `bits` say.

    `inward`: the packet comes from that end. In its ORIGINAL direction a packet comes from the pod
    whose egress counts and goes to the pod whose ingress counts; a REPLY the other way round.
    """
    egress, ingress = bits & GROUP_EGRESS, bits & GROUP_INGRESS
    rules = []
    if egress:
        direction = "ORIGINAL" if inward else "REPLY"
        rules.append(f"-m conntrack --ctdir {direction}{_unjudged(options, options.marks.egress)}")
    if ingress:
        direction = "REPLY" if inward else "ORIGINAL"
        rules.append(f"-m conntrack --ctdir {direction}{_unjudged(options, options.marks.ingress)}")
    if (egress and inward) or (ingress and not inward):
        # Untracked packets have no direction: each is judged as if it opened a flow.
        rules.append("-m conntrack --ctstate UNTRACKED")
    return rules


def _forward(options: Options) -> list[str]:
    isolated = _hex(0, GROUP_ISOLATED)
    rules = [
        f"-m devgroup --src-group {isolated} --dst-group {isolated} -j RETURN",
        # One of the two ends is isolated. What conntrack calls invalid belongs to no flow that could
        # have been judged; most of it could not even be parsed.
        _invalid(options),
    ]
    for side, bits in (
        ("src", GROUP_EGRESS),
        ("dst", GROUP_INGRESS),
        ("src", GROUP_INGRESS),
        ("dst", GROUP_EGRESS),
    ):
        rules += [
            f"{_groups(side, bits)} {end} -j PODGATE-QUEUE" for end in _ends(options, bits, side == "src")
        ]
    return rules


def _input(options: Options) -> list[str]:
    """Local service addresses: only the pod that asks is judged. Its replies to the node are not."""
    source = _groups("src", GROUP_EGRESS)
    return [
        f"{source} {_invalid(options)}",
        *(f"{source} {end} -j PODGATE-QUEUE" for end in _ends(options, GROUP_EGRESS, True)),
    ]


def _pod_names(options: Options) -> tuple[str, str]:
    return options.veth_prefix, "vlan"


def _unknown(options: Options) -> dict[str, Rules]:
    """Strict mode: a pod's interface without any of our bits is one no rules were made for yet."""
    chains = {}
    for way, flag, side in (("IN", "-i", "src"), ("OUT", "-o", "dst")):
        chains[f"PODGATE-UNKNOWN-{way}"] = (
            f"-m devgroup ! --{side}-group {_hex(0, GROUP_MASK)} -j RETURN",
            f"{flag} vlan.eth+ -j RETURN",  # the uplinks of branch interfaces
            *(f"{flag} {name} -j RETURN" for name in sorted(options.not_pods)),
            _counted(options, "no-table"),
        )
    return chains


# The chains that say what is queued of a packet from, or to, a bridged pod that is isolated so.
_BRIDGE_ENDS = {
    "PODGATE-FROM-EGRESS": (GROUP_EGRESS, True),
    "PODGATE-FROM-INGRESS": (GROUP_INGRESS, True),
    "PODGATE-TO-EGRESS": (GROUP_EGRESS, False),
    "PODGATE-TO-INGRESS": (GROUP_INGRESS, False),
}
_WORD = {GROUP_EGRESS: "egress", GROUP_INGRESS: "ingress"}


def _bridge(options: Options, ports: Sequence[Port], family: int) -> dict[str, Rules]:
    """Pods on a bridge, whose port the IP hooks do not see as the interface.

    ORIGINAL or REPLY, a packet leaves the pod behind the port it came from: found by its source
    address, which raw PREROUTING has bound to that port, or by the port itself where the source is
    nobody's (link-local, or the check is off for this pod). The pod it goes to is found by its
    destination address, since a packet that was routed to the bridge has no port yet; only a bridged
    packet to nobody's address (broadcast, multicast, link-local) is looked up by its port.
    """
    chains: dict[str, Rules] = {
        name: (
            _invalid(options),
            *(f"{end} -j PODGATE-QUEUE" for end in _ends(options, bits, inward)),
        )
        for name, (bits, inward) in _BRIDGE_ENDS.items()
    }
    rules = [*_bridge_from(ports, family, GROUP_EGRESS), *_bridge_from(ports, family, GROUP_INGRESS)]
    for bits in (GROUP_EGRESS, GROUP_INGRESS):
        word = _WORD[bits]
        rules.append(f"-m set --match-set {set_name(word, family)} dst -j PODGATE-TO-{word.upper()}")
        isolated = [port for port in ports if _isolated(port, bits)]
        rules.append(
            f"-m set ! --match-set {set_name('bound', family)} dst"
            f" -m physdev --physdev-is-bridged -j PODGATE-TO-PORT-{word.upper()}"
        )
        for way, flag in (("FROM", "--physdev-in"), ("TO", "--physdev-out")):
            chains[f"PODGATE-{way}-PORT-{word.upper()}"] = tuple(
                f"-m physdev{' --physdev-is-bridged' if way == 'TO' else ''} {flag} {port.name}"
                f" -j PODGATE-{way}-{word.upper()}"
                for port in isolated
            )
    chains["PODGATE-BRIDGE"] = tuple(rules)
    return chains


def _bridge_from(ports: Sequence[Port], family: int, bits: int) -> list[str]:
    word = _WORD[bits]
    chain = f"PODGATE-FROM-{word.upper()}"
    return [
        f"-m set --match-set {set_name(word, family)} src -j {chain}",
        f"-m set ! --match-set {set_name('bound', family)} src"
        f" -m physdev --physdev-is-in -j PODGATE-FROM-PORT-{word.upper()}",
        # Without the check a pod could name a bound address as its source.
        *(
            f"-m physdev --physdev-in {port.name} -j {chain}"
            for port in ports
            if not port.checked and _isolated(port, bits)
        ),
    ]


def _isolated(port: Port, bits: int) -> bool:
    return port.egress if bits == GROUP_EGRESS else port.ingress
