"""Invariant: whatever bytes arrive, decoding ends, reads nothing behind them, and a verdict has a reason."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator

import pytest
from guard_page import GuardPage

from dataplane._engine import Publisher, Worker
from dataplane._packet import decode_packet
from dataplane.addresses import Prefix
from dataplane.model import Key, PortRange, Rule
from dataplane.policy.compile import Compiler, PodEntry
from dataplane.policy.effective import DirectionRules
from dataplane.reasons import Reason
from dataplane.verdict import Packet

POD4, POD6 = b"\x0a\0\0\1", b"\xfd" + bytes(15)
PEER4, PEER6 = b"\x0a\0\0\2", b"\xfd" + bytes(14) + b"\2"
DEVICE, UPLINK = 11, 2
EXTENSIONS = (0, 43, 44, 51, 60, 135, 139, 140)
UPPER = (1, 6, 17, 33, 47, 50, 58, 59, 132, 136, 255)


def upper(rng: random.Random, protocol: int, family: int, depth: int) -> bytes:
    if protocol == 6:
        return struct.pack("!HHIIBBHHH", 1234, 80, 0, 0, 0x50, 2, 0, 0, 0)
    if protocol == 17:
        return struct.pack("!HHHH", 1234, 80, 8, 0)
    if protocol in (1, 58):
        kind = rng.choice(
            [0, 3, 4, 5, 8, 11, 12] if protocol == 1 else [1, 2, 3, 4, 100, 128, 129, 133, 135, 143]
        )
        quoted = packet(rng, family, depth + 1, back=True) if depth < 2 else b""
        return bytes([kind, 0]) + rng.randbytes(6) + quoted
    return rng.randbytes(rng.randrange(24))


def packet(rng: random.Random, family: int, depth: int = 0, back: bool = False) -> bytes:
    """A packet that mostly holds together: extension chains, quoted packets, fragments."""
    protocol = rng.choice(UPPER)
    body = upper(rng, protocol, family, depth)
    src, dst = (POD4, PEER4) if family == 4 else (POD6, PEER6)
    if back:
        src, dst = dst, src
    if family == 4:
        options = bytes(4 * rng.choice([0, 0, 0, 1, 10]))
        size = 20 + len(options) + len(body)
        fragment = rng.choice([0, 0, 0, 0x2000, 1, 0x4000])
        head = struct.pack("!BBHHHBBH", 0x45 + len(options) // 4, 0, size, 0, fragment, 64, protocol, 0)
        return head + src + dst + options + body
    chain = b""
    for _ in range(rng.choice([0, 0, 1, 2, 5, 17])):
        kind = rng.choice(EXTENSIONS)
        units = rng.choice([0, 0, 1, 3])
        if kind == 44:
            extension = bytes([protocol, 0]) + struct.pack("!HI", rng.choice([0, 0, 1, 8]), 7)
        elif kind == 51:
            extension = bytes([protocol, 4]) + rng.randbytes(22)
        elif kind == 0 and rng.random() < 0.3:
            extension = bytes([protocol, 0, 0xC2, 4]) + struct.pack("!I", rng.choice([70_000, 1, 65_536]))
        else:
            extension = bytes([protocol, units]) + bytes(6 + 8 * units)
        protocol, chain = kind, extension + chain
    size = rng.choice([len(chain) + len(body)] * 6 + [0])
    hops = rng.choice([1, 64, 255])
    return struct.pack("!IHBB", 6 << 28, size, protocol, hops) + src + dst + chain + body


def mutated(rng: random.Random, data: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice([0, 1, 1, 2, 8])):
        at = rng.randrange(len(out)) if rng.random() < 0.5 else rng.randrange(min(len(out), 48))
        out[at] = rng.choice([0, 1, 255, rng.randrange(256), out[at] ^ 1 << rng.randrange(8)])
    if rng.random() < 0.3:
        del out[rng.randrange(len(out)) :]
    return bytes(out)


def cases(seed: int, count: int) -> Iterator[tuple[bytes, int]]:
    """(captured bytes, length on the wire)"""
    rng = random.Random(seed)
    for _ in range(count):
        if rng.random() < 0.2:
            data = bytes([rng.choice([0x45, 0x4F, 0x60, rng.randrange(256)])]) + rng.randbytes(
                rng.randrange(160)
            )
        else:
            data = mutated(rng, packet(rng, rng.choice([4, 6])))
        yield data, len(data) + rng.choice([0, 0, 0, 1, 1400, 70_000])


def check(found: Packet, data: bytes, wire: int) -> None:
    assert found.reason in (Reason.NONE, Reason.MALFORMED, Reason.FRAGMENT)
    if found.reason is not Reason.NONE:
        return
    flow = found.flow
    assert len(flow.src) == len(flow.dst) == (4 if data[0] >> 4 == 4 else 16)
    assert found.l4_offset <= len(data)
    assert found.l4_offset <= found.length <= wire
    assert flow.has_ports == (flow.protocol in (6, 17, 33, 132, 136))
    if flow.has_ports:
        assert struct.unpack_from("!HH", data, found.l4_offset) == (flow.sport, flow.dport)
    if found.inner is not None:
        assert flow.protocol == (1 if len(flow.src) == 4 else 58)
        assert found.inner.src == flow.dst
    if found.neighbour_discovery:
        assert flow.protocol == 58
        assert found.hop_limit in (1, 255)


@pytest.mark.parametrize("seed", range(8))
def test_decode_anything(seed: int, guard: GuardPage) -> None:
    good = 0
    for data, wire in cases(seed, 5000):
        found = guard.decode(data, wire)
        check(found, data, wire)
        good += found.reason is Reason.NONE
    assert good > 500  # the generator is no mere noise


@pytest.mark.parametrize("seed", range(8, 12))
def test_every_verdict_has_a_reason(seed: int) -> None:
    rules = DirectionRules(
        ((Key("x", "p"), Rule(Prefix(bytes(4), 0), (), (PortRange(6, 80, 80), PortRange(17, 0, 65535)))),)
    )
    entry = PodEntry(Key("x", "a"), (POD4, POD6), (DEVICE,), ingress=rules, egress=rules)
    publisher = Publisher()
    publisher.publish(Compiler().table(1, [entry], [PEER4]))
    worker = Worker(publisher, cache_entries=64, ring_entries=16)
    worker.capture = 3
    rng = random.Random(seed)
    seen = set()
    for count, (data, wire) in enumerate(cases(seed, 5000), 1):
        indev, outdev = rng.choice([(DEVICE, UPLINK), (UPLINK, DEVICE), (DEVICE, DEVICE), (0, 0)])
        reply, hook = rng.random() < 0.4, rng.choice([1, 2])
        verdict = worker.judge(data, indev=indev, outdev=outdev, hook=hook, reply=reply, wire=wire)
        assert verdict.reason is not Reason.NONE
        assert 0 <= verdict.bits <= 3
        assert verdict.allow or verdict.bits == 0
        decoded = decode_packet(data, wire)
        if decoded.reason is not Reason.NONE:
            assert (verdict.allow, verdict.reason) == (False, decoded.reason)
        elif decoded.inner is not None:
            assert verdict.bits == 0
            assert not verdict.cached
        if count % 16 == 0:
            assert worker.events()[-1].verdict == verdict
        seen.add(verdict.reason)
    assert worker.events_lost == 0
    assert sum(packets for packets, _ in worker.counters().values()) == 5000
    assert len(seen) >= 8, seen
