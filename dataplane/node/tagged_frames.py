"""Frames by which a pod on a bridge would get past every rule of iptables, dropped on the bridge.

br_netfilter shows iptables no frame with a VLAN tag (with bridge-nf-filter-vlan-tagged those with one
tag, but not those with two). A receiver takes a tag of VLAN 0 for none at all (IEEE 802.1Q: a priority
tag; net/core/dev.c, check_vlan_id), twice over: a pod that tags so would reach what policy denies,
and the node would route its packets without knowing which port they came from.

So tagged frames from and to the ports of pods are dropped by ebtables. A frame without a tag meets
two comparisons of its type and no more. Everything acts in the calling thread's network namespace.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from dataplane.config import IptablesVariant
from dataplane.errors import KernelError
from dataplane.node import tools

TAGS = ("0x8100", "0x88a8")  # 802.1Q, 802.1ad


@dataclass(frozen=True, slots=True)
class _Chain:
    """A chain of ours: its table, the built-in chain that jumps to it, and what its rules match."""

    table: str
    entered_from: str
    name: str
    flag: str


# PREROUTING: also what goes to the bridge itself. FORWARD: what comes from a port that is no pod's.
_CHAINS = (
    _Chain("nat", "PREROUTING", "PODGATE-TAGGED-FROM", "-i"),
    _Chain("filter", "FORWARD", "PODGATE-TAGGED-TO", "-o"),
)


def differences(variant: IptablesVariant, ports: Collection[str]) -> list[str]:
    """What is not as `put` leaves it, one line each."""
    saved = _read(variant, needed=bool(ports))
    if saved is None:
        return []
    return [
        f"ebtables chain {chain.name} was changed" for chain in _CHAINS if not _as_wanted(saved, chain, ports)
    ]


def put(variant: IptablesVariant, ports: Collection[str]) -> None:
    """Drop tagged frames from and to these ports, and of no others. KernelError says what is missing."""
    saved = _read(variant, needed=bool(ports))
    if not ports and (saved is None or not any(chain.name in saved for chain in _CHAINS)):
        return
    if saved is None:
        raise KernelError(
            "pods are on a bridge, and ebtables is not installed: they could pass VLAN-tagged frames by the"
            " rules; on Debian and Ubuntu: apt-get install iptables ebtables"
        )
    lines = []
    for chain in _CHAINS:
        if _as_wanted(saved, chain, ports):
            continue
        # Naming the chain empties it; what follows is one step with that.
        lines += [f"*{chain.table}", f":{chain.name} RETURN"]
        lines += [f"-A {chain.name} {chain.flag} {port} -j DROP" for port in sorted(ports)]
        if _jumps(saved, chain) < len(TAGS):
            lines += [f"-A {chain.entered_from} -p {tag} -j {chain.name}" for tag in TAGS]
    if lines:
        tools.run([_program(variant, "restore"), "--noflush"], "\n".join([*lines, ""]))


def remove() -> list[str]:
    """Take our chains away, whoever left them; one line for each."""
    removed = []
    for variant in (IptablesVariant.NFT, IptablesVariant.LEGACY):
        saved = _read(variant, needed=False)
        for chain in _CHAINS if saved else ():
            if saved is None or chain.name not in saved:
                continue
            ebtables = [_program(variant, ""), "-t", chain.table]
            for rule in saved.get(chain.entered_from, ()):
                if rule[-1] == chain.name:
                    tools.run([*ebtables, "-D", chain.entered_from, *rule])
            tools.run([*ebtables, "-F", chain.name])
            tools.run([*ebtables, "-X", chain.name])
            removed.append(f"ebtables: chain {chain.name}")
    return removed


def _as_wanted(saved: dict[str, list[list[str]]], chain: _Chain, ports: Collection[str]) -> bool:
    dropped = {rule[1] for rule in saved.get(chain.name, ()) if rule[0] == chain.flag}
    return dropped == set(ports) and (not ports or _jumps(saved, chain) >= len(TAGS))


def _jumps(saved: dict[str, list[list[str]]], chain: _Chain) -> int:
    return sum(rule[-1] == chain.name for rule in saved.get(chain.entered_from, ()))


def _read(variant: IptablesVariant, *, needed: bool) -> dict[str, list[list[str]]] | None:
    """Rules by chain, as words; chain names of ours do not clash. None: not installed.

    Where nothing is `needed` of it, a kernel without it has none of our rules.
    """
    program = _program(variant, "save")
    if not program or not _program(variant, "restore"):
        return None
    saved: dict[str, list[list[str]]] = {}
    table = ""
    try:
        text = tools.run([program])
    except KernelError:
        if needed:
            raise
        return None
    for words in _lines(text):
        if words[0].startswith("*"):
            table = words[0][1:]
        elif words[0].startswith(":") and any(chain.table == table for chain in _CHAINS):
            saved.setdefault(words[0][1:], [])
        elif words[0] == "-A" and any(chain.table == table for chain in _CHAINS):
            saved.setdefault(words[1], []).append(words[2:])
    return saved


def _lines(text: str) -> Iterator[list[str]]:
    for line in text.splitlines():
        words = line.split()
        if words and not words[0].startswith("#"):
            yield words


def _program(variant: IptablesVariant, what: str) -> str:
    """The path of ebtables, ebtables-save or ebtables-restore; empty when it is not installed."""
    tail = f"-{what}" if what else ""
    # Kernels and distributions have one of the two; rules of both are obeyed.
    return tools.find(f"ebtables-{variant}{tail}") or tools.find(f"ebtables{tail}") or ""
