"""What this machine's kernel and tools offer: tried out in a network namespace made for it.

The probes install the very rules the agent would install and open the very sockets it would open,
so that "ok" means more than that a module exists. The namespace vanishes with the thread that made
it; the caller's own is only read.
"""

from __future__ import annotations

import ctypes
import enum
import os
import platform
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dataplane.addresses import parse_address
from dataplane.config import IptablesVariant, MarkLayout
from dataplane.errors import KernelError
from dataplane.node import conntrack, ipset, iptables, other_engines, tools
from dataplane.node.ipset import SetSpec
from dataplane.node.rendering import FAMILIES, GROUP_EGRESS, Options, Port, render, set_name
from dataplane.node.rtnetlink import RouteSocket
from dataplane.node.steering import SET_KINDS, VARIANTS, choose_variant, ipv6_enabled

CLONE_NEWNET = 0x40000000
CAP_NET_ADMIN = 12
BRIDGE_SETTING = Path("/proc/sys/net/bridge/bridge-nf-call-iptables")
_UDP_RACE_FIXED = (6, 12)


class State(enum.StrEnum):
    """OK: there. LACKS: podgate can do without, with the loss named. MISSING: podgate cannot work."""

    OK = "ok"
    LACKS = "lacks"
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at: what was found and, unless it is OK, what to do."""

    name: str
    state: State
    found: str
    remedy: str = ""


def machine() -> list[Check]:
    """Every check, in an order in which later ones rest on earlier ones. Changes nothing."""
    checks = [_privileges(), _kernel(), *_programs(), _ipv6()]
    if any(check.state is State.MISSING for check in checks):
        # The probes would only repeat it in worse words.
        return checks
    tried = _in_new_namespace(lambda: list(_probes()))
    return [*checks, *tried, _node_variant(), _other_engines(), _bridge(), _unprivileged()]


def _privileges() -> Check:
    effective = re.search(
        r"^CapEff:\s*([0-9a-f]+)", Path("/proc/thread-self/status").read_text(), re.MULTILINE
    )
    if effective and int(effective[1], 16) >> CAP_NET_ADMIN & 1:
        return Check("privileges", State.OK, "CAP_NET_ADMIN")
    return Check(
        "privileges",
        State.MISSING,
        f"uid {os.geteuid()} without CAP_NET_ADMIN",
        "run it as root, or give the container the capability NET_ADMIN",
    )


def _kernel() -> Check:
    release = platform.release()
    numbers = tuple(int(part) for part in re.findall(r"\d+", release)[:2])
    if numbers >= _UDP_RACE_FIXED:
        return Check("kernel", State.OK, release)
    return Check(
        "kernel",
        State.LACKS,
        release,
        "before 6.12 the kernel loses one of two UDP packets that race on one socket while queued (DNS: A and"
        " AAAA); use 6.12 or newer, or a kernel with commit 8af79d3edb5f",
    )


def _programs() -> Iterator[Check]:
    found = [
        f"{'iptables' if family == 4 else 'ip6tables'}-{variant}"
        for variant in VARIANTS
        for family in FAMILIES
        if iptables.find_tool(variant, family) is not None
    ]
    complete = any({f"iptables-{variant}", f"ip6tables-{variant}"} <= set(found) for variant in VARIANTS)
    yield Check(
        "iptables",
        State.OK if complete else State.MISSING,
        ", ".join(found) or "not installed",
        "" if complete else "apt-get install iptables",
    )
    there = ipset.installed()
    yield Check(
        "ipset",
        State.OK if there else State.MISSING,
        tools.find("ipset") or "not installed",
        "" if there else "apt-get install ipset",
    )
    ebtables = tools.find("ebtables-nft-restore") or tools.find("ebtables-restore")
    yield Check(
        "ebtables",
        State.OK if ebtables else State.LACKS,
        ebtables or "not installed",
        "" if ebtables else "only pods on a bridge need it (VLAN-tagged frames): apt-get install ebtables",
    )


def _ipv6() -> Check:
    if ipv6_enabled():
        return Check("IPv6", State.OK, "on")
    return Check(
        "IPv6", State.LACKS, "off", "pods without IPv6 need nothing; else boot without ipv6.disable=1"
    )


def _in_new_namespace(work: Callable[[], list[Check]]) -> list[Check]:
    """Run `work` in a thread of its own in a network namespace of its own."""
    found: list[Check] = []

    def inside() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(CLONE_NEWNET):
            found.append(
                Check(
                    "network namespace",
                    State.LACKS,
                    f"nothing could be tried out: {os.strerror(ctypes.get_errno())}",
                    "the agent works without CAP_SYS_ADMIN; to try out what the kernel offers, beside this"
                    " machine's own rules, takes it: run this on the node as root",
                )
            )
            return
        found.extend(work())

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    return found


def _try(name: str, work: Callable[[], str], remedy: str, *, needed: bool = True) -> Check:
    try:
        return Check(name, State.OK, work())
    except (KernelError, OSError) as error:
        return Check(name, State.MISSING if needed else State.LACKS, str(error), remedy)


def _probes() -> Iterator[Check]:
    families = FAMILIES if ipv6_enabled() else FAMILIES[:1]
    yield _try(
        "IP sets",
        lambda: _make_sets(families),
        "the kernel needs ip_set with hash:ip, hash:net and hash:net,iface (CONFIG_IP_SET_HASH_NETIFACE)",
    )
    yield _try("device groups", _device_group, "the kernel needs rtnetlink with IFLA_GROUP")
    installed = [
        variant
        for variant in VARIANTS
        if all(iptables.find_tool(variant, family) is not None for family in families)
    ]
    results = [
        _try(
            f"rules, iptables-{variant}",
            lambda variant=variant: _install_rules(variant, families),  # type: ignore[misc]
            "the kernel needs xt_NFQUEUE, xt_set, xt_devgroup, xt_conntrack, xt_connmark, xt_mark, xt_comment"
            + (" and nft_compat" if variant is IptablesVariant.NFT else " and the raw and mangle tables"),
        )
        for variant in installed
    ]
    # One variant is enough; the other's absence is only worth a word.
    works = any(check.state is State.OK for check in results)
    for check in results:
        lost = State.LACKS if works and check.state is State.MISSING else check.state
        yield Check(check.name, lost, check.found, check.remedy)
    if BRIDGE_SETTING.exists():
        # Else not even tried: xt_physdev loads br_netfilter, which would change what the whole machine
        # does with bridged packets.
        yield _try(
            "rules for bridges",
            lambda: _install_rules(installed[0], families, bridged=True),
            "only needed for pods on a bridge: the kernel needs xt_physdev",
            needed=False,
        )
    if installed:
        yield _try(
            "rules for --reject",
            lambda: _install_rules(installed[0], families, kinds=(Options(reject=True),)),
            "only needed for --reject: the kernel needs xt_REJECT (ipt_REJECT, ip6t_REJECT) and xt_limit",
            needed=False,
        )
    yield _try("queue", _bind_queue, "the kernel needs nfnetlink_queue (CONFIG_NETFILTER_NETLINK_QUEUE)")
    yield _try(
        "conntrack",
        lambda: f"ctnetlink, {len(conntrack.flows(MarkLayout()))} flows here",
        "the kernel needs nf_conntrack_netlink and CONFIG_NF_CONNTRACK_MARK",
    )


def _make_sets(families: tuple[int, ...]) -> str:
    ipset.create(
        SetSpec(set_name(kind, family), type_, family)
        for kind, type_ in SET_KINDS.items()
        for family in families
    )
    return ", ".join(sorted(set(SET_KINDS.values())))


def _device_group() -> str:
    with RouteSocket() as route:
        loopback = next(link for link in route.links() if link.name == "lo")
        route.set_group(loopback.ifindex, GROUP_EGRESS)
        if not any(link.name == "lo" and link.group == GROUP_EGRESS for link in route.links()):
            raise KernelError("the kernel took a device group and does not show it")
        route.set_group(loopback.ifindex, 0)
    return "set and read back"


_KINDS = (Options(), Options(queues=(0, 3), fail_open=True, strict=True))


def _install_rules(
    variant: IptablesVariant,
    families: tuple[int, ...],
    *,
    bridged: bool = False,
    kinds: tuple[Options, ...] = _KINDS,
) -> str:
    ports = (Port("veth0", (parse_address("192.0.2.1"),), True, True, True),) if bridged else ()
    rules = 0
    for options in kinds:
        for family in families:
            tool = iptables.find_tool(variant, family)
            assert tool is not None
            wanted = render(options, ports, family)
            tool.apply(iptables.plan(tool.read(), wanted))
            wrong = iptables.differences(tool.read(), wanted)
            if wrong:
                raise KernelError(f"installed, but read back differently: {wrong[0]}")
            rules += sum(len(body) for table in wanted.values() for body in table.chains.values())
            tool.apply(iptables.plan(tool.read(), {}))
    return f"{rules} rules installed, read back and removed"


def _bind_queue() -> str:
    from dataplane._engine import Publisher, Worker
    from dataplane._nfqueue import NativeQueue

    marks = MarkLayout()
    queue = NativeQueue(
        Worker(Publisher()),
        0,
        mark_egress=marks.egress,
        mark_ingress=marks.ingress,
        mark_reply=marks.reply,
    )
    try:
        queue.bind()
    finally:
        queue.close()
    return "bound"


def _node_variant() -> Check:
    """Which variant this node uses: reads the caller's namespace, changes nothing."""
    installed = {
        variant: tool for variant in VARIANTS if (tool := iptables.find_tool(variant, 4)) is not None
    }
    try:
        chains = {variant: iptables.chain_names(tool) for variant, tool in installed.items()}
        kube = {variant: iptables.kube_chains(names) for variant, names in chains.items()}
        chosen = choose_variant(IptablesVariant.AUTO, installed, kube)
        foreign = iptables.foreign_marks(installed[chosen].read(), MarkLayout().mask)
    except KernelError as error:
        return Check("this node's rules", State.LACKS, str(error), "mend it, or choose with --iptables")
    why = "kube-proxy's chains are there" if kube[chosen] else "no kube-proxy chains in any variant"
    if foreign:
        return Check("this node's rules", State.LACKS, foreign[0], "choose other bits with --mark-mask")
    return Check("this node's rules", State.OK, f"--iptables auto takes {chosen}: {why}")


def _other_engines() -> Check:
    tools_here = (iptables.find_tool(variant, 4) for variant in VARIANTS)
    try:
        chains = [name for tool in tools_here if tool is not None for name in iptables.chain_names(tool)]
        signs = other_engines.signs(chains)
    except KernelError as error:
        return Check("other engines", State.LACKS, str(error), "mend it")
    if not signs:
        return Check("other engines", State.OK, "no sign of one")
    return Check(
        "other engines",
        State.LACKS,
        "; ".join(signs),
        "let one engine enforce policies: take the other off this node (restart it afterwards, or remove its"
        " chains and programs)",
    )


def _bridge() -> Check:
    if BRIDGE_SETTING.exists():
        return Check("br_netfilter", State.OK, "loaded")
    return Check(
        "br_netfilter", State.LACKS, "not loaded", "only needed for pods on a bridge: modprobe br_netfilter"
    )


def _unprivileged() -> Check:
    try:
        allowed = int(Path("/proc/sys/user/max_user_namespaces").read_text()) > 0
    except (OSError, ValueError):
        allowed = False
    if allowed:
        return Check("user namespaces", State.OK, "allowed: the lab can run without root")
    return Check("user namespaces", State.LACKS, "not allowed", "only needed to run the lab without root")
