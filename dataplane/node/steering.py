"""Steering: which packets reach the queues, kept in the kernel as rules, sets and device groups.

`rendering` says what the rules are; here they are installed, compared, changed and taken away. The
order of every change is such that a packet meets either what was in force or what comes after it,
and never a pod with half of its state: what lets a pod's packets through (its entry in the spoof
set) is there before what checks them (the group bit), and leaves after it.
"""

from __future__ import annotations

import errno
import itertools
import re
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dataplane.addresses import Prefix, family_of, format_address, parse_address
from dataplane.config import AgentConfig, Fail, IptablesVariant, MarkLayout, Mode
from dataplane.errors import KernelError
from dataplane.model import Key
from dataplane.node import ipset, iptables, other_engines, tagged_frames
from dataplane.node.interfaces import Kind, Placement
from dataplane.node.ipset import SetSpec
from dataplane.node.iptables import SavedTable, Tool
from dataplane.node.rendering import (
    COUNTED,
    FAMILIES,
    GROUP_CHECKED,
    GROUP_EGRESS,
    GROUP_INGRESS,
    GROUP_MASK,
    SET_PREFIX,
    Options,
    Port,
    TableRules,
    render,
    set_name,
)
from dataplane.node.rtnetlink import LinkMessage, RouteSocket
from dataplane.reasons import BY_TEXT, Reason

VARIANTS = (IptablesVariant.NFT, IptablesVariant.LEGACY)
# In the order in which members are added; they are removed in reverse.
SET_KINDS = {
    "spoof": "hash:net,iface",
    "service": "hash:net",
    "egress": "hash:ip",
    "ingress": "hash:ip",
    "bound": "hash:ip",
    "watched": "hash:ip",
    "hooked": "hash:ip",
}
# What iptables and ipset take as a name as it stands: no wildcard, no separator, no blank.
_SAFE_NAME = re.compile(r"[A-Za-z0-9_.@-]{1,15}")
_COMMANDS = {4: "iptables", 6: "ip6tables"}


@dataclass(frozen=True, slots=True)
class SteeredPod:
    """A pod of this node and what its interface is to be steered for.

    `egress`, `ingress`: isolated in that direction. `spoof_check`: what comes from its interface must
    carry one of `addresses`. Every pod known is listed, isolated or not: the check is for all.
    """

    key: Key
    placement: Placement
    addresses: tuple[bytes, ...]
    egress: bool
    ingress: bool
    spoof_check: bool = True


def group_bits(pods: Iterable[SteeredPod]) -> dict[int, int]:
    """Our bits of the device group of each routed pod's link, by ifindex."""
    bits: dict[int, int] = {}
    for pod in pods:
        if pod.placement.kind is not Kind.BRIDGED:
            bits[pod.placement.ifindex] = (
                bits.get(pod.placement.ifindex, 0)
                | (GROUP_EGRESS if pod.egress else 0)
                | (GROUP_INGRESS if pod.ingress else 0)
                | (GROUP_CHECKED if pod.spoof_check else 0)
            )
    return bits


def bridge_ports(pods: Iterable[SteeredPod]) -> tuple[Port, ...]:
    """The pods on bridges, as the rules need them."""
    return tuple(
        sorted(
            Port(pod.placement.name, tuple(sorted(pod.addresses)), pod.egress, pod.ingress, pod.spoof_check)
            for pod in pods
            if pod.placement.kind is Kind.BRIDGED
        )
    )


def set_members(
    pods: Iterable[SteeredPod],
    services: Iterable[Prefix],
    families: Iterable[int],
    watched: Iterable[bytes] = (),
    hooked: Iterable[bytes] = (),
) -> dict[str, set[str]]:
    """Members of every set, as ipset prints them; sets in the order in which they are to be filled."""
    families = tuple(families)
    members: dict[str, set[str]] = {
        set_name(kind, family): set() for kind in SET_KINDS for family in families
    }

    def put(kind: str, family: int, member: str) -> None:
        if family in families:
            members[set_name(kind, family)].add(member)

    for pod in pods:
        for address in pod.addresses:
            family, text = family_of(address), format_address(address)
            if pod.placement.kind is not Kind.BRIDGED:
                if pod.spoof_check:
                    put("spoof", family, f"{text},{pod.placement.name}")
                continue
            if pod.egress:
                put("egress", family, text)
            if pod.ingress:
                put("ingress", family, text)
            if pod.spoof_check:
                put("bound", family, text)
    for service in services:
        full = service.length == len(service.network) * 8
        put("service", service.family, format_address(service.network) if full else str(service))
    for kind, addresses in (("watched", watched), ("hooked", hooked)):
        for address in addresses:
            put(kind, family_of(address), format_address(address))
    return members


def choose_variant(
    requested: IptablesVariant,
    installed: Collection[IptablesVariant],
    kube_chains: Mapping[IptablesVariant, int],
) -> IptablesVariant:
    """The variant to write to: the one asked for, else the one with kube-proxy's chains, else nft.

    KernelError when it is not installed.
    """
    if requested is not IptablesVariant.AUTO:
        if requested not in installed:
            raise KernelError(
                f"iptables-{requested} is not installed; on Debian and Ubuntu: apt-get install iptables"
            )
        return requested
    if not installed:
        raise KernelError("iptables is not installed; on Debian and Ubuntu: apt-get install iptables")
    # max takes the first of equals, so nft.
    return max(
        (variant for variant in VARIANTS if variant in installed), key=lambda it: kube_chains.get(it, 0)
    )


def adopted_ports(saved: Iterable[Mapping[str, SavedTable]]) -> tuple[Port, ...]:
    """The bridge ports that rules of an earlier run name, so that they stay in force until the first
    `apply` knows better."""
    addresses: dict[str, set[bytes]] = {}
    flags: dict[str, set[str]] = {"egress": set(), "ingress": set(), "checked": set()}
    kinds = {
        "PODGATE-FROM-PORT-EGRESS": "egress",
        "PODGATE-FROM-PORT-INGRESS": "ingress",
        "PODGATE-PORT-OTHER": "checked",
    }
    for tables in saved:
        for table in tables.values():
            for chain, rules in table.chains.items():
                if not chain.startswith("PODGATE-"):
                    continue
                for rule in rules:
                    words = shlex.split(rule.text)
                    if "--physdev-in" not in words[:-1]:
                        continue
                    name = words[words.index("--physdev-in") + 1]
                    addresses.setdefault(name, set())
                    if chain in kinds:
                        flags[kinds[chain]].add(name)
                    elif words[0] == "-s":
                        addresses[name].add(parse_address(words[1].partition("/")[0]))
    return tuple(
        Port(
            name,
            tuple(sorted(addresses[name])),
            name in flags["egress"],
            name in flags["ingress"],
            name in flags["checked"],
        )
        for name in sorted(addresses)
    )


def watch_queue(config: AgentConfig) -> int:
    """The queue that is shown packets which need no verdict: the one after those that judge."""
    return config.queue_base + config.queues


def hook_queue(config: AgentConfig) -> int:
    """The queue of a user's hook: the one after the watch queue."""
    return watch_queue(config) + 1


class Steering:
    """The agent's rules, sets and device groups in the network namespace of the calling thread.

    Every method runs the system's tools and blocks for some milliseconds; none is thread-safe.
    Errors are KernelError with the tool's own words.
    """

    def __init__(self, config: AgentConfig, *, ipv6: bool | None = None) -> None:
        """`ipv6`: whether there is any here; by default the kernel is asked."""
        self.config = config
        self._ipv6 = ipv6_enabled() if ipv6 is None else ipv6
        self.variant = IptablesVariant.AUTO  # known after detect()
        self.problems: list[str] = []  # of the last detect(): for people, none stops enforcement
        self._tools: dict[int, Tool] = {}
        self._options = Options(
            marks=config.marks,
            queues=(config.queue_base, config.queue_base + config.queues - 1),
            fail_open=config.fail is Fail.OPEN,
            offload=config.offload,
            strict=config.mode is Mode.STRICT,
            veth_prefix=config.veth_prefix,
            audit=config.audit,
            reject=config.rejects,
        )
        self._ports: tuple[Port, ...] = ()
        self._untagged: frozenset[str] | None = None  # ports whose tagged frames are dropped; None: not yet
        self.unguarded: str | None = None  # why tagged frames get past the rules
        self._unwritten = True  # the rules in the kernel may be others than _rules()
        self._sets: dict[str, set[str]] | None = None  # as last applied; None: not yet
        self._groups: dict[int, int] | None = None  # None: whatever an earlier run left, until apply()
        self._applied: tuple[object, ...] | None = None  # what apply() was last given, once it was done
        self._replaced: dict[str, int] = dict.fromkeys(COUNTED, 0)  # counted by rules that are gone

    @property
    def families(self) -> tuple[int, ...]:
        """The address families that are steered: 4, and 6 unless the machine has no IPv6."""
        return tuple(self._tools)

    def detect(self) -> None:
        """Find out which tools to use. Changes nothing. KernelError says what is missing."""
        self.problems = []
        found = {variant: iptables.find_tool(variant, 4) for variant in VARIANTS}
        installed = {variant: tool for variant, tool in found.items() if tool is not None}
        asked = self.config.iptables
        chains = {
            variant: iptables.chain_names(tool)
            for variant, tool in installed.items()
            if asked in (IptablesVariant.AUTO, variant)
        }
        kube = {variant: iptables.kube_chains(names) for variant, names in chains.items()}
        self.variant = choose_variant(self.config.iptables, installed, kube)
        self._tools = {4: installed[self.variant]}
        if self._ipv6:
            tool = iptables.find_tool(self.variant, 6)
            if tool is None:
                raise KernelError(
                    f"ip6tables-{self.variant} is not installed, so IPv6 could not be judged; on Debian and"
                    " Ubuntu: apt-get install iptables"
                )
            self._tools[6] = tool
        else:
            self.problems.append("IPv6 is off on this machine (ipv6.disable=1): only IPv4 is enforced")
        for family, tool in self._tools.items():
            foreign = iptables.foreign_marks(tool.read(), self.config.marks.mask)
            self.problems += [
                f"{_COMMANDS[family]}: {text}; choose others with --mark-mask" for text in foreign
            ]
        self.problems += [
            f"{sign}: what it denies stays denied, and is not explained here; take it off this node"
            for sign in other_engines.signs(itertools.chain(*chains.values()))
        ]

    def install(self, not_pods: Iterable[str] = ()) -> bool:
        """Put rules and sets in place, taking over what an earlier run left. Tells whether it changed any.

        Nobody is steered anew by this: sets and device groups keep what they hold until `apply`. Only
        in strict mode the interfaces of pods are closed from here on; `not_pods` as in `apply`.
        """
        if not self._tools:
            self.detect()
        self._options, self._applied = self._options_for(not_pods), None
        changed = self._make_sets()
        saved = {family: tool.read() for family, tool in self._tools.items()}
        self._ports = adopted_ports(saved.values())
        try:
            changed = self._write_rules(saved) or changed
        except KernelError as error:
            if not self._options.reject:
                raise
            raise KernelError(f"{error}; --reject needs xt_REJECT and xt_limit in the kernel") from None
        return _remove_rules(variant for variant in VARIANTS if variant is not self.variant) != [] or changed

    def apply(
        self,
        pods: Sequence[SteeredPod],
        services: Iterable[Prefix] = (),
        not_pods: Iterable[str] = (),
        watched: Collection[bytes] = (),
        hooked: Collection[bytes] = (),
    ) -> bool:
        """Steer these pods and no others. `services`: local service addresses; `not_pods`: names of links
        that only look like a pod's (strict mode, `interfaces.lookalikes`); `watched`: addresses whose
        packets are shown to the watch queue (`watch_queue`) where no verdict is needed; `hooked`: addresses
        whose packets all go to the hook's queue (`hook_queue`).

        False when that is what was last applied: the kernel is not asked then. What others have changed
        since, `keep_groups` and `verify` find.
        """
        services, not_pods = frozenset(services), frozenset(not_pods)
        asked = (tuple(pods), services, not_pods, frozenset(watched), frozenset(hooked))
        if asked == self._applied and not self._unwritten and self.unguarded is None:
            return False
        for pod in pods:
            if not _SAFE_NAME.fullmatch(pod.placement.name):
                raise KernelError(
                    f"pod {pod.key}: iptables cannot match the name of its interface, {pod.placement.name!r}"
                )
        wanted = set_members(pods, services, self.families, watched, hooked)
        ports = bridge_ports(pods)
        options = self._options_for(not_pods, watch=bool(watched), hook=bool(hooked))
        # What was applied is still there, or `verify` will put it back; else nobody knows.
        present = self._sets if self._applied is not None and self._sets is not None else self._present_sets()
        self._applied = None
        adds, removals = ipset.change(wanted, present)
        ipset.restore(adds)
        if self._unwritten or ports != self._ports or options != self._options:
            self._ports, self._options = ports, options
            self._write_rules({family: tool.read() for family, tool in self._tools.items()})
        self._groups = group_bits(pods)
        self.keep_groups()
        ipset.restore(removals)
        self._sets = wanted
        if self._no_tags(ports) != self._untagged:
            self._drop_tagged_frames()
        self._applied = asked
        return True

    def _no_tags(self, ports: Iterable[Port]) -> frozenset[str]:
        """The ports whose tagged frames are dropped."""
        return frozenset(() if self.config.audit else (port.name for port in ports))

    def _drop_tagged_frames(self) -> None:
        ports = self._no_tags(self._ports)
        try:
            tagged_frames.put(self.variant, ports)
            self._untagged, self.unguarded = ports, None
        except KernelError as error:  # all other traffic is judged all the same
            self._untagged, self.unguarded = None, str(error)

    def end_guests(self) -> None:
        """No packet goes to the watch queue or the hook's any more; all else stays as it is."""
        if self._options.watch is None and self._options.hook is None:
            return
        self._options, self._applied = replace(self._options, watch=None, hook=None), None
        self._write_rules({family: tool.read() for family, tool in self._tools.items()})

    def keep_groups(self) -> list[str]:
        """Put the device groups right that somebody changed since `apply`; names those links."""
        if self._groups is None:
            return []
        with RouteSocket() as route:
            wrong = _wrong_groups(route, self._groups)
            for link, bits in wrong:
                _set_group(route, link, bits)
        return [link.name for link, _ in wrong]

    def verify(self, *, repair: bool = False) -> list[str]:
        """What others changed of ours, one line each. With `repair`, put it right.

        Without, it may run beside another method in another thread; it then may see a change half done.
        """
        found: list[str] = []
        wanted_sets = self._sets or {}
        present = ipset.read(SET_PREFIX)
        for name, members in wanted_sets.items():
            if name not in present:
                found.append(f"ipset {name} is gone")
            elif present[name].members != members:
                missing, more = members - present[name].members, present[name].members - members
                found.append(f"ipset {name} was changed: {len(missing)} members missing, {len(more)} added")
        saved = {family: tool.read() for family, tool in self._tools.items()}
        for family, tables in saved.items():
            found += [
                f"{_COMMANDS[family]} {text}" for text in iptables.differences(tables, self._rules(family))
            ]
        found += [
            f"{link.name}: our bits of its device group are {link.group & GROUP_MASK:#x}, not {bits:#x}"
            for link, bits in self._wrong_groups()
        ]
        if self._untagged is not None:
            found += tagged_frames.differences(self.variant, self._untagged)
        if found and repair:
            self._applied = None
            self._drop_tagged_frames()
            self._make_sets()
            adds, removals = ipset.change(wanted_sets, self._present_sets())
            ipset.restore(adds)
            self._write_rules(saved)
            self.keep_groups()
            ipset.restore(removals)
            self._sets = wanted_sets
        return found

    def counters(self) -> dict[Reason, int]:
        """Packets the rules themselves dropped, by reason: spoofed, invalid, no-table."""
        saved = [tool.read(("raw", "mangle")) for tool in self._tools.values()]
        return {
            BY_TEXT[word]: self._replaced[word] + sum(iptables.counts(tables, word) for tables in saved)
            for word in COUNTED
        }

    def remove(self) -> list[str]:
        """Take everything of ours out of this network namespace; says what that was, one line each."""
        self._sets, self._ports, self._groups, self._untagged = None, (), None, None
        self._applied = None
        return remove_everything()

    def _options_for(self, not_pods: Iterable[str], *, watch: bool = False, hook: bool = False) -> Options:
        names = tuple(sorted(name for name in not_pods if _SAFE_NAME.fullmatch(name)))
        return replace(
            self._options,
            not_pods=names if self._options.strict else (),
            watch=watch_queue(self.config) if watch else None,
            hook=hook_queue(self.config) if hook else None,
        )

    def _rules(self, family: int) -> dict[str, TableRules]:
        return render(self._options, self._ports, family)

    def _write_rules(self, saved: Mapping[int, Mapping[str, SavedTable]]) -> bool:
        changed = False
        self._unwritten = True
        for family, tool in self._tools.items():
            wanted = self._rules(family)
            text = iptables.plan(saved[family], wanted)
            if not text:
                continue
            changed = True
            try:
                tool.apply(text)
            except KernelError:
                # A rule that was to go may have been taken by somebody else since it was read.
                tool.apply(iptables.plan(tool.read(), wanted))
            after = tool.read()
            wrong = iptables.differences(after, wanted, order=False)
            if wrong:
                raise KernelError(
                    f"{tool.restore_program} said it was done, but {wrong[0]}; another program may be"
                    " changing the same rules"
                )
            for word in COUNTED:
                self._replaced[word] += iptables.counts(saved[family], word) - iptables.counts(after, word)
        self._unwritten = False
        return changed

    def _make_sets(self) -> bool:
        specs = [
            SetSpec(set_name(kind, family), type_, family)
            for kind, type_ in SET_KINDS.items()
            for family in self.families
        ]
        present = ipset.read(SET_PREFIX)
        missing = [spec for spec in specs if spec.name not in present]
        for spec in specs:
            if spec.name in present and present[spec.name].kind != spec.kind:
                raise KernelError(
                    f"ipset {spec.name} exists with type {present[spec.name].kind} instead of {spec.kind};"
                    " run: podgate cleanup"
                )
        ipset.create(missing)
        if self._sets is None:
            self._sets = {spec.name: set() for spec in specs} | {
                name: saved.members for name, saved in present.items()
            }
        return bool(missing)

    def _present_sets(self) -> dict[str, set[str]]:
        return {name: saved.members for name, saved in ipset.read(SET_PREFIX).items()}

    def _wrong_groups(self) -> list[tuple[LinkMessage, int]]:
        if self._groups is None:
            return []
        with RouteSocket() as route:
            return _wrong_groups(route, self._groups)


def _wrong_groups(route: RouteSocket, wanted: Mapping[int, int]) -> list[tuple[LinkMessage, int]]:
    return [
        (link, bits)
        for link in route.links()
        if link.group & GROUP_MASK != (bits := wanted.get(link.ifindex, 0))
    ]


def _set_group(route: RouteSocket, link: LinkMessage, bits: int) -> None:
    try:
        route.set_group(link.ifindex, link.group & ~GROUP_MASK | bits)
    except OSError as error:
        if error.errno != errno.ENODEV:  # gone meanwhile: nothing left to steer
            raise KernelError(f"{link.name}: cannot set its device group: {error.strerror}") from error


def ipv6_enabled() -> bool:
    """Whether the kernel speaks IPv6 at all."""
    return Path("/proc/thread-self/net/if_inet6").exists()


def _remove_rules(variants: Iterable[IptablesVariant]) -> list[str]:
    """Remove our rules from these variants; one line for each table that had some."""
    removed = []
    for variant in variants:
        for family in FAMILIES if ipv6_enabled() else FAMILIES[:1]:
            tool = iptables.find_tool(variant, family)
            if tool is None:
                continue
            present = tool.read()
            text = iptables.plan(present, {})
            if not text:
                continue
            tool.apply(text)
            for table, saved in present.items():
                chains = sum(iptables.is_ours(chain) for chain in saved.chains)
                if chains:
                    removed.append(f"{_COMMANDS[family]} ({variant}): {chains} chains of table {table}")
    return removed


def installed_marks() -> MarkLayout | None:
    """The mark bits of the rules of ours that are in force here, None when there are none."""
    for variant in VARIANTS:
        tool = iptables.find_tool(variant, 4)
        if tool is None:
            continue
        for table in tool.read(("mangle",)).values():
            for rule in table.chains.get("PODGATE-POSTROUTING", ()):
                found = re.fullmatch(r"-j MARK --set-xmark 0x0/(0x[0-9a-f]+)", rule.text)
                if found:
                    return MarkLayout.from_mask(int(found[1], 16))
    return None


def remove_everything() -> list[str]:
    """Take all rules, device group bits and sets of ours out of this network namespace, whoever left them
    there; says what that was, one line each.

    Packets that wait in a queue stay there, unless no other rule needs conntrack: it then leaves the
    namespace, and the kernel drops every queued packet when hooks are taken away.
    """
    removed = _remove_rules(VARIANTS) + tagged_frames.remove()
    with RouteSocket() as route:
        for link, bits in _wrong_groups(route, {}):
            _set_group(route, link, bits)
            removed.append(f"device group bits {link.group & GROUP_MASK:#x} of {link.name}")
    names = list(ipset.read(SET_PREFIX)) if ipset.installed() else []
    ipset.destroy(names)
    if names:
        removed.append(f"{len(names)} IP sets")
    return removed
