# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: initializedcheck=False, auto_pickle=False
"""The flow cache. `_flows.pxd` is the readable face; this is how.

A bucket is one header line and eight entries of one cache line each. The header holds 16 bits of
each entry's hash, generation and interface, and the order of use: a miss reads one line, a hit two.
What the header says is a hint; the entry decides.

The hash is SipHash-1-3 with a secret key. With a hash that can be computed by outsiders a pod
could choose ports so that its flows, or its victim's, all meet in one bucket.
"""
cimport cython
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memset

from dataplane._memory cimport block_new
from dataplane._packet cimport unpack_address

import os

cdef enum:
    WAYS = 8
    LINE = 64

cdef struct entry_t:              # 64 bytes
    uint64_t addresses[4]         # src.high, src.low, dst.high, dst.low
    uint64_t devices              # indev << 32 | outdev
    uint64_t rest                 # ports, protocol, family, has_ports, hook
    uint32_t generation           # 0: empty
    uint32_t egress_rule
    uint32_t ingress_rule
    uint8_t answer                # verdict | bits << 1 | direction << 3
    uint8_t reason
    uint8_t egress_reason
    uint8_t ingress_reason

cdef struct bucket_t:             # 9 lines
    uint16_t tags[WAYS]
    uint16_t generations[WAYS]    # low bits
    uint16_t devices[WAYS]        # of the in-device: whose flood it is
    uint8_t ranks[WAYS]           # 0: used last … 7: longest ago; always a permutation
    uint8_t spare[8]
    entry_t entries[WAYS]

cdef struct cache_t:
    uint64_t key0
    uint64_t key1
    uint64_t mask                 # buckets - 1
    bucket_t *buckets


cdef inline uint64_t rotate(uint64_t x, int by) noexcept nogil:
    return (x << by) | (x >> (64 - by))


cdef inline void sip_round(uint64_t *v) noexcept nogil:
    v[0] += v[1]
    v[1] = rotate(v[1], 13) ^ v[0]
    v[0] = rotate(v[0], 32)
    v[2] += v[3]
    v[3] = rotate(v[3], 16) ^ v[2]
    v[0] += v[3]
    v[3] = rotate(v[3], 21) ^ v[0]
    v[2] += v[1]
    v[1] = rotate(v[1], 17) ^ v[2]
    v[2] = rotate(v[2], 32)


# The key's fields, packed; the hash is over these six words (IPv4: the high words are left out).
cdef inline uint64_t digest(const cache_t *cache, const flow_key_t *key, entry_t *packed) noexcept nogil:
    cdef uint64_t v[4]
    cdef uint64_t words[6]
    cdef int i, first = 0
    packed.addresses[0] = key.flow.src.high
    packed.addresses[1] = key.flow.src.low
    packed.addresses[2] = key.flow.dst.high
    packed.addresses[3] = key.flow.dst.low
    packed.devices = <uint64_t>key.indev << 32 | key.outdev
    packed.rest = (<uint64_t>key.flow.sport << 48 | <uint64_t>key.flow.dport << 32
                   | <uint64_t>key.flow.protocol << 24 | <uint64_t>key.flow.family << 16
                   | <uint64_t>key.flow.has_ports << 8 | key.hook)
    words[0] = packed.addresses[0]
    words[1] = packed.addresses[2]
    if key.flow.family == 4:
        words[2] = packed.addresses[1] << 32 | packed.addresses[3]
        first = 2
        words[3] = packed.devices
        words[4] = packed.rest
    else:
        words[2] = packed.addresses[1]
        words[3] = packed.addresses[3]
        words[4] = packed.devices
        words[5] = packed.rest
    v[0] = cache.key0 ^ <uint64_t>0x736F6D6570736575
    v[1] = cache.key1 ^ <uint64_t>0x646F72616E646F6D
    v[2] = cache.key0 ^ <uint64_t>0x6C7967656E657261
    v[3] = cache.key1 ^ <uint64_t>0x7465646279746573
    for i in range(first, 5 if first else 6):
        v[3] ^= words[i]
        sip_round(v)
        v[0] ^= words[i]
    v[2] ^= 0xFF
    sip_round(v)
    sip_round(v)
    sip_round(v)
    return v[0] ^ v[1] ^ v[2] ^ v[3]


cdef inline bint same_key(const entry_t *a, const entry_t *b) noexcept nogil:
    return ((a.addresses[0] ^ b.addresses[0]) | (a.addresses[1] ^ b.addresses[1])
            | (a.addresses[2] ^ b.addresses[2]) | (a.addresses[3] ^ b.addresses[3])
            | (a.devices ^ b.devices) | (a.rest ^ b.rest)) == 0


cdef inline void touch(bucket_t *bucket, int way) noexcept nogil:
    cdef uint8_t rank = bucket.ranks[way]
    cdef int i
    if rank == 0:
        return
    for i in range(WAYS):
        bucket.ranks[i] += bucket.ranks[i] < rank
    bucket.ranks[way] = 0


# The ways whose tag is `tag`, one bit each.
cdef inline uint32_t matching(const bucket_t *bucket, uint16_t tag) noexcept nogil:
    cdef uint32_t found = 0
    cdef int i
    for i in range(WAYS):
        found |= <uint32_t>(bucket.tags[i] == tag) << i
    return found


cdef cache_t *cache_new(uint32_t entries, uint64_t seed) noexcept nogil:
    cdef cache_t *cache = <cache_t *>block_new(sizeof(cache_t))
    cdef uint64_t buckets = 1, i
    cdef int way
    cdef uint64_t state = seed
    if cache == NULL:
        return NULL
    while buckets * WAYS < entries:
        buckets *= 2
    cache.buckets = <bucket_t *>block_new(buckets * sizeof(bucket_t))
    if cache.buckets == NULL:
        free(cache)
        return NULL
    memset(cache.buckets, 0, buckets * sizeof(bucket_t))
    for i in range(buckets):
        for way in range(WAYS):
            cache.buckets[i].ranks[way] = <uint8_t>way
    cache.mask = buckets - 1
    # splitmix64: two independent words out of one seed.
    for i in range(2):
        state += <uint64_t>0x9E3779B97F4A7C15
        seed = (state ^ (state >> 30)) * <uint64_t>0xBF58476D1CE4E5B9
        seed = (seed ^ (seed >> 27)) * <uint64_t>0x94D049BB133111EB
        seed ^= seed >> 31
        if i == 0:
            cache.key0 = seed
        else:
            cache.key1 = seed
    return cache


cdef void cache_free(cache_t *cache) noexcept nogil:
    if cache != NULL:
        free(cache.buckets)
        free(cache)


cdef bint cache_find(cache_t *cache, const flow_key_t *key, uint32_t generation,
                     flow_value_t *out) noexcept nogil:
    cdef entry_t packed
    cdef entry_t *entry
    cdef bucket_t *bucket
    cdef uint64_t h = digest(cache, key, &packed)
    cdef uint32_t ways
    cdef int way
    bucket = &cache.buckets[h & cache.mask]
    ways = matching(bucket, <uint16_t>(h >> 48))
    way = 0
    while ways:
        if ways & 1:
            entry = &bucket.entries[way]
            if entry.generation == generation and same_key(entry, &packed):
                touch(bucket, way)
                out.egress_rule = entry.egress_rule
                out.ingress_rule = entry.ingress_rule
                out.verdict = entry.answer & 1
                out.bits = (entry.answer >> 1) & 3
                out.direction = (entry.answer >> 3) & 3
                out.reason = entry.reason
                out.egress_reason = entry.egress_reason
                out.ingress_reason = entry.ingress_reason
                return True
        ways >>= 1
        way += 1
    return False


# Whom a newcomer of `device` replaces.
cdef inline int victim(const bucket_t *bucket, uint16_t device, uint16_t generation) noexcept nogil:
    cdef int i, mine = 0, oldest = 0, own = 0, stale = -1
    cdef int own_rank = -1, stale_rank = -1
    for i in range(WAYS):
        if bucket.ranks[i] == WAYS - 1:
            oldest = i
        if bucket.generations[i] != generation:
            if bucket.ranks[i] > stale_rank:
                stale_rank = bucket.ranks[i]
                stale = i
        elif bucket.devices[i] == device:
            mine += 1
            if bucket.ranks[i] > own_rank:
                own_rank = bucket.ranks[i]
                own = i
    if stale >= 0:
        return stale
    return own if 2 * mine >= WAYS else oldest


cdef void cache_put(cache_t *cache, const flow_key_t *key, uint32_t generation,
                    const flow_value_t *value) noexcept nogil:
    cdef entry_t packed
    cdef bucket_t *bucket
    cdef entry_t *entry
    cdef uint64_t h = digest(cache, key, &packed)
    cdef uint16_t tag = <uint16_t>(h >> 48)
    cdef uint16_t device = <uint16_t>(key.indev ^ (key.indev >> 16))
    cdef uint32_t ways
    cdef int way = 0
    bucket = &cache.buckets[h & cache.mask]
    ways = matching(bucket, tag)
    while ways:
        if ways & 1 and same_key(&bucket.entries[way], &packed):
            break
        ways >>= 1
        way += 1
    if not ways:
        # Generations are compared by their low bits; an empty entry's 0 is never the current one's
        # but for 1 in 65,536, when it only is not preferred.
        way = victim(bucket, device, <uint16_t>generation)
    packed.generation = generation
    packed.egress_rule = value.egress_rule
    packed.ingress_rule = value.ingress_rule
    packed.answer = (value.verdict & 1) | (value.bits & 3) << 1 | (value.direction & 3) << 3
    packed.reason = value.reason
    packed.egress_reason = value.egress_reason
    packed.ingress_reason = value.ingress_reason
    entry = &bucket.entries[way]
    entry[0] = packed
    bucket.tags[way] = tag
    bucket.generations[way] = <uint16_t>generation
    bucket.devices[way] = device
    touch(bucket, way)


@cython.final
cdef class FlowCache:
    """The flow cache, for tests and measurements. Room for at least `entries` flows.

    `seed` (64 bits) keys the hash; by default it is random.
    """
    cdef cache_t *cache

    def __cinit__(self, entries=65536, seed=None):
        if not 1 <= entries <= 1 << 28:
            raise ValueError(f"entries is {entries}, must be 1 to 2**28")
        if seed is None:
            seed = int.from_bytes(os.urandom(8), "little")
        self.cache = cache_new(entries, <uint64_t>(seed & 0xFFFFFFFFFFFFFFFF))
        if self.cache == NULL:
            raise MemoryError

    def __dealloc__(self):
        cache_free(self.cache)

    @property
    def capacity(self):
        """How many flows fit."""
        return (self.cache.mask + 1) * WAYS

    @property
    def nbytes(self):
        """Memory of the entries."""
        return (self.cache.mask + 1) * sizeof(bucket_t)

    cdef bint key(self, object flow, indev, outdev, hook, flow_key_t *key) except False:
        memset(key, 0, sizeof(flow_key_t))
        unpack_address(flow.src, &key.flow.src)
        unpack_address(flow.dst, &key.flow.dst)
        key.flow.family = 4 if len(flow.src) == 4 else 6
        key.flow.protocol = flow.protocol
        key.flow.sport = flow.sport
        key.flow.dport = flow.dport
        key.flow.has_ports = flow.has_ports
        key.indev = indev
        key.outdev = outdev
        key.hook = hook
        return True

    def bucket_of(self, flow, *, indev=0, outdev=0, hook=2):
        """The bucket where the flow's entry would stand: an index."""
        cdef flow_key_t key
        cdef entry_t packed
        self.key(flow, indev, outdev, hook, &key)
        return digest(self.cache, &key, &packed) & self.cache.mask

    def put(self, flow, value, *, generation, indev=0, outdev=0, hook=2):
        """Remember a verdict: (verdict, reason, bits, direction, egress_reason, ingress_reason,
        egress_rule, ingress_rule), all small integers."""
        cdef flow_key_t key
        cdef flow_value_t v
        self.key(flow, indev, outdev, hook, &key)
        (v.verdict, v.reason, v.bits, v.direction, v.egress_reason, v.ingress_reason,
         v.egress_rule, v.ingress_rule) = value
        cache_put(self.cache, &key, generation, &v)

    def get(self, flow, *, generation, indev=0, outdev=0, hook=2):
        """What `put` remembered for this flow, interfaces, hook and generation, else None."""
        cdef flow_key_t key
        cdef flow_value_t v
        self.key(flow, indev, outdev, hook, &key)
        if not cache_find(self.cache, &key, generation, &v):
            return None
        return (v.verdict, v.reason, v.bits, v.direction, v.egress_reason, v.ingress_reason,
                v.egress_rule, v.ingress_rule)
