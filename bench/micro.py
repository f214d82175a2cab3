"""Nanoseconds per verdict of the engine, without any kernel: decode, flow miss, flow hit; and compile time.

Run: .venv/bin/python bench/micro.py [--json FILE] [--rules 10,1000,100000] [--repeat 5]

A verdict is worker_judge on packets laid out as in a receive buffer, in bursts of 64, in one C loop:
  miss   decode, cache looked up in vain, both ends' rules searched for random peers, result cached
  plain  the same without any flow cache (decode and both rule lookups)
  hit    decode and a cached verdict, 1,024 flows
Figures are the best of --repeat runs: noise only ever adds. Aim: miss at most 300 ns,
hit at most 120 ns, miss within a factor of 3 from 10 to 100,000 rules.
"""

from __future__ import annotations

import argparse
import json
import random
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dataplane._engine import Publisher, Worker
from dataplane._rules import RuleSet
from dataplane.addresses import Prefix, parse_address
from dataplane.model import Key, PortRange, Rule
from dataplane.policy.compile import Compiler, PodEntry
from dataplane.policy.effective import DirectionRules

TCP = 6
HERE, THERE = 11, 12  # interface indices of the two pods
Judged = tuple[bytes, int, int, bool]


def packet(src: bytes, dst: bytes, sport: int, dport: int) -> bytes:
    """A TCP SYN. Addresses are packed."""
    tcp = struct.pack("!HHIIBBHHH", sport, dport, 0, 0, 0x50, 2, 0xFFFF, 0, 0)
    if len(src) == 4:
        return struct.pack("!BBHHHBBH4s4s", 0x45, 0, 40, 0, 0, 64, TCP, 0, src, dst) + tcp
    return struct.pack("!IHBB16s16s", 6 << 28, len(tcp), TCP, 64, src, dst) + tcp


def rules_of(n: int, size: int, rng: random.Random) -> tuple[Rule, ...]:
    """Rules for `n` random full-length prefixes of `size` bytes, each one of ten ports."""
    peers = {rng.randbytes(size) for _ in range(n)}
    while len(peers) < n:
        peers.add(rng.randbytes(size))
    return tuple(
        Rule(Prefix(peer, 8 * size), (), (PortRange(TCP, 8000 + i % 10, 8000 + i % 10),), i)
        for i, peer in enumerate(sorted(peers))
    )


def best(repeat: int, run: Callable[[], float]) -> float:
    """The least of several runs."""
    return min(run() for _ in range(repeat))


def verdicts(n: int, size: int, repeat: int) -> dict[str, Any]:
    """Measure verdicts between two pods with `n` rules each; half the packets match a rule."""
    rng = random.Random(n)
    here = parse_address("10.0.0.1" if size == 4 else "fd00::1")
    rules = rules_of(n, size, rng)
    policy = Key("bench", "policy")
    outward = tuple((policy, rule) for rule in rules)
    # Its own rule set, so that a verdict looks into two.
    inward = tuple((policy, rule) for rule in (*rules_of(n, size, rng), _any(size)))
    entries = [
        PodEntry(Key("bench", "a"), (here,), (HERE,), egress=DirectionRules(outward)),
        PodEntry(Key("bench", "b"), (), (THERE,), ingress=DirectionRules(inward)),
    ]
    began = time.perf_counter()
    table = Compiler().table(1, entries, ())
    compiled = time.perf_counter() - began
    publisher = Publisher()
    publisher.publish(table)

    def load(count: int) -> list[Judged]:
        out = []
        for i in range(count):
            rule = rules[rng.randrange(n)]
            peer, port = (rule.cidr.network, rule.ports[0].first) if i % 2 else (rng.randbytes(size), 8000)
            out.append((packet(here, peer, rng.randrange(1024, 65536), port), HERE, THERE, False))
        return out

    many, few = load(60_000), load(1024)
    uncached = Worker(publisher, cache_entries=0)
    # Far fewer entries than flows: every look into the cache fails, and every verdict is stored.
    missing = Worker(publisher, cache_entries=4096)
    hitting = Worker(publisher)
    hitting.bench_judge(few)
    result = {
        "rules": n,
        "family": 4 if size == 4 else 6,
        "plain_ns": best(repeat, lambda: uncached.bench_judge(many)),
        "miss_ns": best(repeat, lambda: missing.bench_judge(many)),
        "hit_ns": best(repeat, lambda: hitting.bench_judge(few, rounds=60)),
        "table_bytes": table.nbytes + sum(rs.nbytes for rs in table.rulesets),
        "compile_ms": compiled * 1000,
    }
    hits, misses = missing.cache_stats()
    result["miss_share"] = misses / (hits + misses)
    return result


def _any(size: int) -> Rule:
    return Rule(Prefix(bytes(size), 0), (), (PortRange(TCP, 9, 9),), 1 << 20)


def decoding(repeat: int) -> float:
    """ns per packet that stops right behind decode: there is no table."""
    worker = Worker(Publisher(), cache_entries=0)
    rng = random.Random(0)
    few = [(packet(rng.randbytes(4), rng.randbytes(4), 1, 2), HERE, THERE, False) for _ in range(1024)]
    return best(repeat, lambda: worker.bench_judge(few, rounds=60))


def compiling(repeat: int) -> list[dict[str, Any]]:
    """Milliseconds to compile Rule objects, by shape."""
    rng = random.Random(7)
    wide = tuple(
        Rule(
            Prefix(bytes([i % 200, 0, 0, 0]), 8) if i % 2 else Prefix(bytes(4), 0),
            (),
            (PortRange(TCP, i + 1, i + 1),),
        )
        for i in range(300)
    )
    shapes = {
        "20,000 IPv4 rules": rules_of(20_000, 4, rng),
        "100,000 IPv4 rules": rules_of(100_000, 4, rng),
        "100,000 IPv6 rules": rules_of(100_000, 16, rng),
        "100,000 IPv4 under 300 wide ones": wide + rules_of(100_000, 4, rng),
    }
    rows = []
    for name, rules in shapes.items():

        def run(rules: tuple[Rule, ...] = rules) -> float:
            began = time.perf_counter()
            RuleSet(rules)
            return (time.perf_counter() - began) * 1000

        rows.append({"shape": name, "ms": best(repeat, run), "bytes": RuleSet(rules).nbytes})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE as well")
    parser.add_argument(
        "--rules", default="10,100,1000,10000,100000", help="rules per pod (default: %(default)s)"
    )
    parser.add_argument(
        "--repeat", type=int, default=5, help="runs to take the best of (default: %(default)s)"
    )
    options = parser.parse_args()
    decode = decoding(options.repeat)
    print(f"decode only: {decode:.0f} ns\n")
    print("family    rules  plain ns   miss ns   hit ns      table  compile ms")
    rows = []
    for size in (4, 16):
        for n in map(int, options.rules.split(",")):
            row = verdicts(n, size, options.repeat)
            rows.append(row)
            print(
                f"{'IPv' + str(row['family']):>6} {n:>8,} {row['plain_ns']:>9.0f} {row['miss_ns']:>9.0f}"
                f" {row['hit_ns']:>8.0f} {row['table_bytes'] / 1024:>6.0f} KiB {row['compile_ms']:>11.1f}"
            )
        part = [row for row in rows if row["family"] == (4 if size == 4 else 6)]
        print(f"       most rules / fewest: {part[-1]['miss_ns'] / part[0]['miss_ns']:.2f} x\n")
    shapes = compiling(options.repeat)
    for shape in shapes:
        print(f"compile {shape['shape']}: {shape['ms']:.0f} ms, {shape['bytes'] / 1024:.0f} KiB")
    if options.json:
        options.json.write_text(
            json.dumps({"decode_ns": decode, "verdicts": rows, "compile": shapes}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
