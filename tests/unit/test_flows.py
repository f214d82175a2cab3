"""The flow cache: exact keys, generations, bounded memory, and who is evicted by whom."""

from __future__ import annotations

import socket

import pytest

from dataplane._flows import FlowCache
from dataplane.verdict import Flow

VALUE = (1, 1, 3, 2, 1, 3, 70_000, 5)
DENY = (0, 2, 0, 1, 3, 2, 0xFFFFFFFF, 0xFFFFFFFF)
POD, OTHER, THIRD = 11, 12, 13
BASE = Flow(socket.inet_aton("10.0.0.1"), socket.inet_aton("10.0.0.2"), 6, 1000, 80, True)


def flow(number: int) -> Flow:
    return BASE._replace(src=number.to_bytes(4))


def one_bucket(count: int) -> tuple[FlowCache, list[Flow]]:
    """A cache, and flows that all meet in one bucket of it whatever their interface."""
    cache = FlowCache(8, seed=1)
    assert cache.capacity == 8
    return cache, [flow(number) for number in range(1, count + 1)]


def kept(cache: FlowCache, flows: list[Flow], indev: int, generation: int = 1) -> list[bool]:
    return [cache.get(f, generation=generation, indev=indev) is not None for f in flows]


def test_what_was_put_is_found_whole() -> None:
    cache = FlowCache(64)
    cache.put(BASE, VALUE, generation=1, indev=POD, outdev=OTHER)
    cache.put(BASE._replace(dport=81), DENY, generation=1, indev=POD, outdev=OTHER)
    assert cache.get(BASE, generation=1, indev=POD, outdev=OTHER) == VALUE
    assert cache.get(BASE._replace(dport=81), generation=1, indev=POD, outdev=OTHER) == DENY


VARIANTS = [
    BASE._replace(src=b"\x0a\0\0\3"),
    BASE._replace(dst=b"\x0a\0\0\3"),
    BASE._replace(protocol=17),
    BASE._replace(sport=1001),
    BASE._replace(dport=81),
    BASE._replace(has_ports=False),
    BASE._replace(src=bytes(12) + BASE.src, dst=bytes(12) + BASE.dst),  # the same numbers in IPv6
    Flow(BASE.dst, BASE.src, 6, 80, 1000, True),
]


@pytest.mark.parametrize("other", VARIANTS, ids=repr)
def test_every_field_of_the_flow_counts(other: Flow) -> None:
    cache = FlowCache(8)  # one bucket: only the comparison of keys tells flows apart
    cache.put(BASE, VALUE, generation=1)
    assert cache.get(other, generation=1) is None
    cache.put(other, DENY, generation=1)
    assert cache.get(BASE, generation=1) == VALUE
    assert cache.get(other, generation=1) == DENY


@pytest.mark.parametrize("path", [{"indev": OTHER}, {"outdev": OTHER}, {"hook": 1}], ids=repr)
def test_a_flow_is_bound_to_its_interfaces_and_hook(path: dict[str, int]) -> None:
    """A pod that forges another's 5-tuple must not ride its verdict."""
    cache = FlowCache(8)
    cache.put(BASE, VALUE, generation=1, indev=POD, outdev=0)
    assert cache.get(BASE, generation=1, **{"indev": POD, "outdev": 0} | path) is None


@pytest.mark.parametrize("half", ["src", "dst"])
def test_all_of_an_ipv6_address_counts(half: str) -> None:
    cache = FlowCache(8)
    base = BASE._replace(src=bytes(16), dst=bytes(16))
    cache.put(base, VALUE, generation=1)
    for at in range(16):
        changed = bytes(at) + b"\1" + bytes(15 - at)
        assert cache.get(base._replace(**{half: changed}), generation=1) is None


def test_another_generation_is_worth_nothing() -> None:
    cache = FlowCache(64)
    cache.put(BASE, VALUE, generation=5)
    # 65,541 has the same low bits: those are a hint only.
    assert [cache.get(BASE, generation=g) for g in (4, 6, 5 + 65_536)] == [None] * 3
    assert cache.get(BASE, generation=5) == VALUE


def test_a_flow_has_one_entry_over_generations() -> None:
    cache, flows = one_bucket(8)
    for f in flows[:7]:
        cache.put(f, VALUE, generation=1)
    for generation in range(1, 100):
        cache.put(flows[7], VALUE, generation=generation)
    assert kept(cache, flows[:7], 0) == [True] * 7


def test_the_stale_go_first() -> None:
    cache, flows = one_bucket(16)
    for f in flows[:8]:
        cache.put(f, VALUE, generation=2 if f in flows[2:4] else 1)
    for f in flows[8:14]:
        cache.put(f, VALUE, generation=2)
    assert kept(cache, flows[2:4] + flows[8:14], 0, generation=2) == [True] * 8
    assert kept(cache, flows[:2] + flows[4:8], 0) == [False] * 6


def test_the_longest_unused_goes_when_all_are_current() -> None:
    cache, flows = one_bucket(10)
    for f in flows[:8]:
        cache.put(
            f, VALUE, generation=1, indev=POD if f in flows[:3] else OTHER if f in flows[3:6] else THIRD
        )
    assert cache.get(flows[0], generation=1, indev=POD) is not None  # used again
    cache.put(flows[8], VALUE, generation=1, indev=4)
    cache.put(flows[9], VALUE, generation=1, indev=4)
    assert kept(cache, flows[:3], POD) == [True, False, False]


def test_a_flood_evicts_itself() -> None:
    """One pod that opens flows without end takes half a bucket, not its neighbours' entries."""
    cache, flows = one_bucket(3)
    for f in flows:
        cache.put(f, VALUE, generation=1, indev=POD)
    for number in range(1000, 3000):
        cache.put(flow(number), VALUE, generation=1, indev=OTHER)
    assert kept(cache, flows, POD) == [True] * 3
    assert sum(kept(cache, [flow(number) for number in range(1000, 3000)], OTHER)) == 5


def test_a_flood_into_a_full_cache_stops_at_half() -> None:
    cache = FlowCache(4096)
    quiet = [flow(number) for number in range(1200)]
    for f in quiet:
        cache.put(f, VALUE, generation=1, indev=POD)
    before = sum(kept(cache, quiet, POD))
    for number in range(10_000, 60_000):
        cache.put(flow(number), VALUE, generation=1, indev=OTHER)
    assert sum(kept(cache, quiet, POD)) >= 0.9 * before


def test_memory_is_bounded() -> None:
    cache = FlowCache(1000)
    assert cache.capacity == 1024
    before = cache.nbytes
    assert before <= cache.capacity * 72
    flows = [flow(number) for number in range(20_000)]
    for f in flows:
        cache.put(f, VALUE, generation=1)
    assert cache.nbytes == before
    assert 0.95 * cache.capacity <= sum(kept(cache, flows, 0)) <= cache.capacity


def test_flows_spread_evenly_under_any_seed() -> None:
    for seed in range(5):
        cache = FlowCache(8 * 64, seed=seed)
        counts = [0] * 64
        for number in range(6400):
            counts[cache.bucket_of(flow(number))] += 1
        assert min(counts) > 40
        assert max(counts) < 180


def test_collisions_crafted_for_one_seed_do_not_hold_for_another() -> None:
    known, unknown = FlowCache(8 * 256, seed=1), FlowCache(8 * 256, seed=2)
    crafted = [f for f in map(flow, range(30_000)) if known.bucket_of(f) == 7]
    assert len(crafted) > 60
    assert len({unknown.bucket_of(f) for f in crafted}) > 40


def test_default_seeds_differ() -> None:
    first, second = FlowCache(8 * 65_536), FlowCache(8 * 65_536)
    assert [first.bucket_of(flow(n)) for n in range(8)] != [second.bucket_of(flow(n)) for n in range(8)]


@pytest.mark.parametrize("entries", [0, -1, (1 << 28) + 1])
def test_sizes_out_of_range(entries: int) -> None:
    with pytest.raises(ValueError, match="entries is"):
        FlowCache(entries)
