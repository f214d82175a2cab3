# Compiled rules. A RuleSet is what one direction of one pod allows: disjoint address intervals,
# sorted, each with one merged set of (protocol, port) ranges. A RuleTable is everything the engine
# needs for this node's pods. Both are immutable once made and are shared between threads, but for the
# table's tallies, of which each thread has its own.
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t, int32_t

from dataplane._packet cimport addr_t, flow_t

# Ports are searched as one number, protocol << 16 | port; a protocol without ports has port 0.
# A rule without ports covers 0 .. 0xFFFFFF: every protocol and every port.
cdef struct port_range_t:
    uint32_t first
    uint32_t last         # inclusive
    uint32_t slot         # index into the cell's rule ids: which rule allows this range

# What one address interval allows: ranges[first_range : first_range + n_ranges], sorted, disjoint.
# Most cells have one range: there the rule stands in the cell, one memory access less.
cdef struct cell_t:
    uint32_t first_range
    uint32_t n_ranges
    uint32_t first_rule_id    # rule_ids[first_rule_id + slot] is the rule that allows; n_ranges 1: the rule

# One family of a RuleSet. Interval i is [starts[i], starts[i + 1] - 1]; the first start is the
# lowest address of the family, the last interval ends at its highest.
#
# A rule that spans many intervals is not repeated in each: cells form a tree of radix 64 over the
# intervals, and a rule stands in the highest blocks that it covers whole. What interval i allows is
# the union of cells[level][i >> (6 * level)] over all levels; there is one level unless rules
# overlap so much that copies would outgrow the rules.
cdef enum:
    MAX_LEVELS = 4
    LEVEL_BITS = 6
    STRIDE = 16

cdef struct family_t:
    uint32_t n                    # intervals, at least 1
    uint32_t levels               # 1 .. MAX_LEVELS
    uint32_t n_tops
    const uint32_t *starts4       # IPv4; filled up to a multiple of STRIDE with the highest address
    const addr_t *starts6         # IPv6, likewise
    const uint32_t *tops4         # every STRIDEth start: dense, so that a search stays in fast memory
    const addr_t *tops6
    const uint32_t *cells[4]      # per level and block: index into RuleSet's cells; 0 allows nothing

cdef struct ruleset_t:
    family_t v4
    family_t v6
    const cell_t *cells
    const port_range_t *ranges
    const uint32_t *rule_ids

# The rule of `rules` that allows `peer` at (protocol, port), or -1. The lowest rule id that matches.
cdef int32_t ruleset_find(const ruleset_t *rules, uint8_t family, const addr_t *peer,
                          uint8_t protocol, uint16_t port) noexcept nogil

cdef class RuleSet:
    cdef ruleset_t c
    cdef readonly object rules        # tuple of what it was compiled from; rule id = index
    cdef readonly object tag          # the caller's own: what the rules are to it
    cdef void *block
    cdef object __weakref__       # weak references are allowed
    cdef readonly Py_ssize_t nbytes

cdef enum pod_flag_t:
    POD_INGRESS_ISOLATED = 1          # `ingress` is valid
    POD_EGRESS_ISOLATED = 2           # `egress` is valid
    POD_SPOOF_CHECK = 4               # a packet from its interface must carry one of its addresses
    POD_BRANCH = 8                    # on a branch interface: own-node traffic passes FORWARD
    POD_UNKNOWN = 16                  # strict mode: an interface no policy has been read for yet
    POD_INGRESS_AUDIT = 32            # what its ingress rules do not allow is let through, as R_AUDIT
    POD_EGRESS_AUDIT = 64

cdef struct pod_t:
    const ruleset_t *ingress
    const ruleset_t *egress
    uint32_t flags                    # pod_flag_t
    uint32_t first_address            # addresses[first_address : first_address + n_addresses]
    uint32_t n_addresses
    uint32_t bridge                   # ifindex of the bridge its interface is a port of, 0: routed
    uint32_t uplink                   # ifindex of its branch interface's way out of the node, 0: none

cdef struct address_t:
    addr_t address
    uint32_t pod                      # index into pods
    uint8_t family

# What is counted per pod and side: a tally is uint64_t[n_pods][2 sides][TALLY_OUTCOMES], one cache line
# a pod, and behind that one number per rule of each distinct (side, RuleSet).
cdef enum:
    MAX_LANES = 64                # tallies of one table: threads that count at a time
    SIDE_INGRESS = 0
    SIDE_EGRESS = 1
    TALLY_ALLOWED = 0             # a rule allowed it
    TALLY_NO_RULE = 1
    TALLY_SPOOFED = 2
    TALLY_NO_TABLE = 3
    TALLY_OUTCOMES = 4

cdef struct table_t:
    uint32_t generation               # 1, 2, …; 0 is never used
    uint32_t n_pods
    uint32_t n_addresses
    uint32_t n_own
    uint32_t n_bridged            # pods with a bridge
    uint32_t device_mask              # size of the device hash - 1, a power of two - 1
    const pod_t *pods
    const address_t *addresses    # grouped by pod
    const address_t *by_address   # the same, sorted by (family, address, pod)
    const address_t *own_node         # this node's own addresses, sorted; `pod` unused
    const uint32_t *device_keys       # open addressing: ifindex, 0 = empty
    const uint32_t *device_pods       # index into pods
    const size_t *rule_tallies    # [n_pods][2]: where in a tally the numbers of its rules begin
    size_t tally_words
    uint64_t *tallies[64]         # MAX_LANES, by lane; NULL: nobody counts there

# Index of the pod behind an interface or with an address, or -1.
cdef int32_t table_pod_by_device(const table_t *table, uint32_t ifindex) noexcept nogil
cdef int32_t table_pod_by_address(const table_t *table, uint8_t family, const addr_t *address) noexcept nogil
cdef bint table_is_own_node(const table_t *table, uint8_t family, const addr_t *address) noexcept nogil
cdef bint table_pod_has_address(const table_t *table, uint32_t pod, uint8_t family,
                                const addr_t *address) noexcept nogil

cdef class RuleTable:
    cdef table_t c
    cdef readonly object pods         # tuple of the PodEntry objects it was made from, by pod index
    cdef readonly object own_addresses
    cdef object _rulesets             # keeps alive what the pods point to
    cdef list _counted                # (direction, RuleSet) in the order of their numbers in a tally
    cdef void *block
    cdef uint64_t *seen               # a tally: what `take_tally` has told
    cdef object __weakref__       # weak references are allowed
    cdef readonly Py_ssize_t nbytes
    cdef bint open_lane(self, uint32_t lane) except False
