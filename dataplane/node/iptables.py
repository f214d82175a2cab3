"""iptables in both its variants: which one this node uses, what is there, and changes in one commit.

A change is computed from what iptables-save shows and applied by one `iptables-restore --noflush`
per family. Each table is replaced in one step: packets meet the old rules or the new ones. Built-in
chains are never created anew nor flushed, which would drop every packet that waits in a queue.
"""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from dataplane.config import IptablesVariant
from dataplane.errors import KernelError
from dataplane.node import tools
from dataplane.node.rendering import CHAIN_PREFIX, TABLES, TableRules, jump

LOCK_WAIT_S = "30"  # of the legacy variant's xtables lock


class SavedRule(NamedTuple):
    """A rule as iptables-save prints it, without its `-A chain`, and its counters."""

    text: str
    packets: int = 0
    bytes: int = 0


@dataclass
class SavedTable:
    """Chains of one table. Built-in chains are those with a policy."""

    chains: dict[str, list[SavedRule]] = field(default_factory=dict)
    builtin: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Tool:
    """The programs of one variant and family (4 or 6)."""

    variant: IptablesVariant
    family: int
    save_program: str
    restore_program: str

    def tables(self) -> list[str]:
        """Names of the tables that exist. Looking must not create any."""
        if self.variant is IptablesVariant.LEGACY:
            names = Path(
                "/proc/thread-self/net", "ip_tables_names" if self.family == 4 else "ip6_tables_names"
            )
            try:
                return names.read_text().split()
            except OSError:
                return []
        return list(parse_save(tools.run([self.save_program])))

    def read(self, tables: Sequence[str] | None = None) -> dict[str, SavedTable]:
        """The tables of this network namespace, by default those podgate writes to, with counters."""
        found: dict[str, SavedTable] = {}
        if tables is None:
            tables = TABLES
        present = set(self.tables()) if self.variant is IptablesVariant.LEGACY else set(tables)
        for table in tables:
            if table in present:
                output = tools.run([self.save_program, "-c", "-t", table])
                if "is incompatible, use 'nft' tool" in output:
                    raise KernelError(
                        f"{self.save_program}: table {table} holds rules that iptables cannot read; somebody"
                        f" changed it with nft"
                    )
                found.update(parse_save(output))
        return found

    def apply(self, text: str) -> None:
        """Give `text` to iptables-restore. KernelError with its words and the line it refused."""
        if text:
            tools.run([self.restore_program, "--noflush", "-w", LOCK_WAIT_S], text)


def find_tool(variant: IptablesVariant, family: int) -> Tool | None:
    """The programs of a variant and family, None when they are not installed."""
    name = "iptables" if family == 4 else "ip6tables"
    save, restore = (tools.find(f"{name}-{variant}-{what}") for what in ("save", "restore"))
    if save and restore:
        return Tool(variant, family, save, restore)
    # A distribution with one variant only has it under the plain name.
    plain = tools.find(name)
    save, restore = tools.find(f"{name}-save"), tools.find(f"{name}-restore")
    if plain and save and restore:
        is_nft = "nf_tables" in tools.run([plain, "--version"])
        if is_nft == (variant is IptablesVariant.NFT):
            return Tool(variant, family, save, restore)
    return None


_DECLARATION = re.compile(r":(\S+) (\S+)")
_RULE = re.compile(r"(?:\[(\d+):(\d+)\] )?-A (\S+) ?(.*)")


def parse_save(text: str) -> dict[str, SavedTable]:
    """What iptables-save (with or without -c) printed, by table."""
    tables: dict[str, SavedTable] = {}
    table = SavedTable()
    for line in text.splitlines():
        if line.startswith("*"):
            table = tables.setdefault(line[1:].strip(), SavedTable())
        elif declared := _DECLARATION.match(line):
            table.chains.setdefault(declared[1], [])
            if declared[2] != "-":
                table.builtin.add(declared[1])
        elif rule := _RULE.match(line):
            packets, bytes_, chain, body = rule.groups()
            table.chains.setdefault(chain, []).append(SavedRule(body, int(packets or 0), int(bytes_ or 0)))
    return tables


_NUMBER = re.compile(r"0[xX][0-9a-fA-F]+|\d+")


def normalise(rule: str) -> tuple[tuple[str, ...], ...]:
    """A rule as its options with their values, in one order and one notation of numbers, so that two
    releases of iptables that print it differently compare equal."""
    options: list[list[str]] = []
    negated = False
    for word in shlex.split(rule):
        if word == "!":
            negated = True
        elif word.startswith("-") and len(word) > 1:
            options.append(["!", word] if negated else [word])
            negated = False
        elif options:
            options[-1].append(
                _NUMBER.sub(lambda number: str(int(number[0], 0 if "x" in number[0].lower() else 10)), word)
            )
    return tuple(sorted(tuple(option) for option in options))


def same_rules(saved: Sequence[SavedRule], wanted: Sequence[str]) -> bool:
    """Whether a chain holds exactly these rules."""
    return len(saved) == len(wanted) and all(
        has.text == want or normalise(has.text) == normalise(want)
        for has, want in zip(saved, wanted, strict=True)
    )


def is_ours(chain: str) -> bool:
    return chain.startswith(CHAIN_PREFIX)


def _target(rule: str) -> str | None:
    words = shlex.split(rule)
    for flag in ("-j", "-g"):
        if flag in words[:-1]:
            return words[words.index(flag) + 1]
    return None


def _jumps_to_us(rules: Sequence[SavedRule]) -> Iterator[tuple[int, SavedRule]]:
    """(position, rule) of rules of somebody else's chain that enter one of ours."""
    for position, rule in enumerate(rules):
        target = _target(rule.text)
        if target is not None and is_ours(target):
            yield position, rule


def plan(present: Mapping[str, SavedTable], wanted: Mapping[str, TableRules]) -> str:
    """The iptables-restore input that turns what is present of ours into what is wanted; empty if nothing
    has to change. Chains that are right already are not touched, so their counters go on."""
    parts = []
    for table in TABLES:
        lines = _plan_table(present.get(table, SavedTable()), wanted.get(table, TableRules()))
        if lines:
            parts += [f"*{table}", *lines, "COMMIT"]
    return "\n".join(parts) + "\n" if parts else ""


def _plan_table(present: SavedTable, wanted: TableRules) -> list[str]:
    declare: list[str] = []
    rules: list[str] = []
    for chain, body in wanted.chains.items():
        if chain not in present.chains or not same_rules(present.chains[chain], body):
            declare.append(f":{chain} - [0:0]")  # creates it, or empties it within this commit
            rules += [f"-A {chain} {rule}" for rule in body]
    for chain in dict.fromkeys([*present.chains, *wanted.jumps]):
        if is_ours(chain):
            continue
        found = list(_jumps_to_us(present.chains.get(chain, ())))
        target = wanted.jumps.get(chain)
        if (
            target is not None
            and len(found) == 1
            and found[0][0] == 0
            and same_rules([found[0][1]], [jump(target)])
        ):
            continue
        rules += [f"-D {chain} {rule.text}" for _, rule in found]
        if target is not None:
            rules.append(f"-I {chain} 1 {jump(target)}")
    leftover = [chain for chain in present.chains if is_ours(chain) and chain not in wanted.chains]
    rules += [f"-F {chain}" for chain in leftover] + [f"-X {chain}" for chain in leftover]
    return declare + rules


def differences(
    present: Mapping[str, SavedTable], wanted: Mapping[str, TableRules], *, order: bool = True
) -> list[str]:
    """In plain words, what somebody else changed about our rules; without `order`, rules of others that
    went before ours are not mentioned."""
    found = []
    for table, rules in wanted.items():
        saved = present.get(table, SavedTable())
        for chain, target in rules.jumps.items():
            entries = saved.chains.get(chain, [])
            places = [place for place, rule in _jumps_to_us(entries) if _target(rule.text) == target]
            if not places:
                found.append(f"{table} {chain}: the jump to {target} is gone")
            elif places[0] != 0 and order:
                found.append(f"{table} {chain}: {places[0]} rules stand before the jump to {target}")
            elif len(places) > 1:
                found.append(f"{table} {chain}: {len(places)} jumps to {target}")
        for chain, body in rules.chains.items():
            if chain not in saved.chains:
                found.append(f"{table}: chain {chain} is gone")
            elif not same_rules(saved.chains[chain], body):
                found.append(f"{table}: chain {chain} was changed")
        found += [
            f"{table}: chain {chain} is not ours although its name says so"
            for chain in saved.chains
            if is_ours(chain) and chain not in rules.chains
        ]
    return found


def counts(present: Mapping[str, SavedTable], reason: str) -> int:
    """Packets that our rules dropped for a reason (the word in their comment)."""
    mark = f"podgate: {reason}"
    return sum(
        rule.packets
        for table in present.values()
        for chain, rules in table.chains.items()
        if is_ours(chain)
        for rule in rules
        if mark in shlex.split(rule.text)
    )


def skipped_rules(present: Mapping[str, SavedTable]) -> list[str]:
    """Rules of others that a packet with a verdict does not meet: a verdict resumes at the next hook
    function, past the rest of the chain it was queued from (net/netfilter/nfnetlink_queue.c)."""
    found = []
    mangle = present.get("mangle", SavedTable())
    for chain in ("FORWARD", "INPUT"):
        rules = [rule.text for rule in mangle.chains.get(chain, ()) if not is_ours(_target(rule.text) or "")]
        if rules:
            found.append(
                f"mangle {chain}: packets that were judged do not meet {len(rules)} rules of others there,"
                f" the first of them `{rules[0]}`"
            )
    return found


_MARK_VALUES = ("--set-xmark", "--set-mark", "--or-mark", "--and-mark", "--xor-mark", "--mark")
_MARK_MASKS = ("--nfmask", "--ctmask", "--mask")


def foreign_marks(present: Mapping[str, SavedTable], mask: int) -> list[str]:
    """Rules of others that test or write bits of the packet or connection mark that are ours."""
    found = []
    for table, saved in present.items():
        for chain, rules in saved.chains.items():
            if is_ours(chain):
                continue
            for rule in rules:
                bits = _mark_bits(shlex.split(rule.text)) & mask
                if bits:
                    found.append(f"{table} {chain}: `{rule.text}` uses mark bits {bits:#x}, which are ours")
    return found


def _mark_bits(words: Sequence[str]) -> int:
    """The mark bits a rule tests or writes."""
    if {"--restore-mark", "--save-mark"} & set(words) and not set(_MARK_MASKS) & set(words):
        return 0xFFFFFFFF
    bits = 0
    for option, value in itertools.pairwise(words):
        if option not in _MARK_VALUES and option not in _MARK_MASKS:
            continue
        number, slash, mask = value.partition("/")
        try:
            if option in _MARK_MASKS:
                bits |= int(number, 0)
            elif not slash:  # without a mask the whole mark is meant
                bits = 0xFFFFFFFF
            else:
                bits |= int(mask, 0) | (0 if option == "--mark" else int(number, 0))
        except ValueError:
            continue
    return bits


KUBE_CHAINS = (
    "KUBE-SERVICES",
    "KUBE-FORWARD",
    "KUBE-POSTROUTING",
    "KUBE-PROXY-CANARY",
    "KUBE-IPTABLES-HINT",
    "KUBE-KUBELET-CANARY",
)


def chain_names(tool: Tool) -> list[str]:
    """The chains of every table of this variant; a name is there once for each table that has it."""
    if tool.variant is IptablesVariant.LEGACY and not tool.tables():
        return []
    saved = parse_save(tools.run([tool.save_program]))
    return [chain for table in saved.values() for chain in table.chains]


def kube_chains(names: Iterable[str]) -> int:
    """How many of the chains are those that kube-proxy and kubelet make."""
    return sum(name in KUBE_CHAINS for name in names)
