# The flow cache: verdicts already given, so that a flow's next packet need not be looked up again.
# One per queue thread, never shared. Bounded: 8-way buckets of one entry per cache line.
#
# It is no list of live flows (the kernel's conntrack table is): an entry may vanish at any moment,
# and one whose generation is not the table's is worth nothing.
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from dataplane._packet cimport flow_t

# A flow as its originator's packets have it (the caller turns replies round first), and the
# interfaces they pass. Bound to the interfaces, so a pod that forges another's tuple cannot hit.
cdef struct flow_key_t:
    flow_t flow
    uint32_t indev
    uint32_t outdev
    uint8_t hook

cdef struct flow_value_t:
    uint32_t egress_rule
    uint32_t ingress_rule
    uint8_t verdict
    uint8_t reason
    uint8_t bits
    uint8_t egress_reason
    uint8_t ingress_reason
    uint8_t direction

cdef struct cache_t     # opaque; defined in _flows.pyx

cdef cache_t *cache_new(uint32_t entries, uint64_t seed) noexcept nogil    # NULL without memory
cdef void cache_free(cache_t *cache) noexcept nogil
cdef bint cache_find(cache_t *cache, const flow_key_t *key, uint32_t generation,
                     flow_value_t *out) noexcept nogil
# Eviction: an entry of another generation first; else the longest unused of the newcomer's own
# interface when that interface holds half the bucket or more, so that a flood evicts itself; else
# the longest unused.
cdef void cache_put(cache_t *cache, const flow_key_t *key, uint32_t generation,
                    const flow_value_t *value) noexcept nogil
