# The verdict engine: decode, flow cache, rules, verdict with its reason. Pure computation: no I/O.
#
# Theory of operation. A Publisher holds the table in force. Each queue thread owns one Worker and
# brackets every burst with worker_enter / worker_leave: enter takes the current table and announces
# it in the worker's hazard slot, leave clears the slot AFTER the burst's verdicts have been sent.
# A table may be freed, and live flows may be judged again from conntrack, once no worker announces
# an older one.
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t, int32_t
from libc.stddef cimport size_t

from dataplane._packet cimport packet_t, flow_t
from dataplane._reasons cimport R_AUDIT, reason_t
from dataplane._rules cimport table_t, RuleTable
from dataplane._flows cimport cache_t

cdef enum hook_t:                 # NF_INET_*, linux/netfilter.h
    HOOK_LOCAL_IN = 1
    HOOK_FORWARD = 2

cdef enum offload_bit_t:
    BIT_EGRESS = 1                # E: the egress of the originator's pod was judged
    BIT_INGRESS = 2               # I: the ingress of the responder's pod was judged

cdef enum direction_t:
    DIR_NONE = 0
    DIR_INGRESS = 1
    DIR_EGRESS = 2

# How a packet came. `indev` and `outdev` are the bridge ports where the packet crossed a bridge
# (NFQA_IFINDEX_PHYSINDEV / PHYSOUTDEV), else the devices; 0 = unknown or none.
cdef struct path_t:
    uint32_t indev
    uint32_t outdev
    uint8_t hook                  # hook_t
    uint8_t reply                 # 1: conntrack says this packet has the flow's REPLY direction

cdef struct verdict_t:
    uint8_t allow                 # 1 accept, 0 drop
    uint8_t reason                # reason_t: why, in one word
    uint8_t direction             # direction_t: the end that decided
    uint8_t bits                  # offload_bit_t: ends judged; only meaningful when allow
    uint8_t cached                # 1: from the flow cache
    uint8_t audited               # reason_t: why it would be denied but for the audit; R_NONE: it would not
    uint8_t egress_reason         # reason_t of each end; R_NONE: not reached
    uint8_t ingress_reason
    int32_t egress_rule           # rule id in the pod's RuleSet, -1: none
    int32_t ingress_rule
    int32_t egress_pod            # index into the table's pods, -1: no pod of this node
    int32_t ingress_pod

# What a reader of live verdicts sees. Fixed size; written by the queue thread, read by Python.
cdef struct event_t:
    uint64_t when_ns              # CLOCK_REALTIME
    packet_t packet
    path_t path
    verdict_t verdict
    uint32_t generation
    uint32_t kept                 # bytes of the packet that are kept beside the event

cdef enum capture_t:              # which packets become events
    CAPTURE_NONE = 0
    CAPTURE_DENIED = 1            # and what only an audit lets through, when it is evaluated
    CAPTURE_MISSES = 2            # denied, and allowed ones that were evaluated rather than cached
    CAPTURE_ALL = 3
    CAPTURE_LEVEL = 3             # the bits of the level
    CAPTURE_BYTES = 4             # besides: keep the beginning of each packet that becomes an event

cdef enum:
    EVENT_BYTES = 256             # kept of a packet at most: what the queues are given of it

cdef struct worker_t:
    cache_t *cache
    table_t *table                # valid between worker_enter and worker_leave; NULL: no table yet
    table_t *hazard               # atomic: what the publisher must not free
    table_t **current             # atomic: the publisher's slot
    event_t *ring                 # power-of-two ring, single producer, single consumer
    uint8_t *kept                 # atomic: EVENT_BYTES for each slot of the ring; NULL: nobody asked yet
    uint32_t ring_mask
    uint32_t capture              # a level and flags of capture_t, atomic
    uint64_t ring_head            # atomic, written by the worker
    uint64_t ring_tail            # atomic, written by the reader
    uint64_t ring_lost            # atomic: events that found the ring full
    uint64_t packets[2][3][32]    # [allow][direction_t][reason_t]
    uint64_t bytes[2][3][32]
    uint64_t cache_hits
    uint64_t cache_misses
    uint64_t *tally               # the table's tally of our lane, like `table`
    uint32_t lane                 # no other worker of the publisher has it
    uint8_t observer              # 1: its packets pass whatever the rules say, and are counted nowhere else
    uint8_t audit                 # 1: nothing is denied; what would be has the reason R_AUDIT
    uint32_t reject               # atomic: 1: what policies deny is answered, see `is_answered`

cdef void worker_enter(worker_t *worker) noexcept nogil
cdef void worker_leave(worker_t *worker) noexcept nogil

# The verdict for one packet; counts it, and records the event where capture asks for it. Between
# worker_enter and worker_leave only. Always leaves a verdict with a reason.
cdef void worker_judge(worker_t *worker, const uint8_t *data, size_t captured, size_t wire,
                       const path_t *path, verdict_t *out) noexcept nogil

# Whether a packet denied so is to be answered (TCP RST, ICMP prohibited): a rule was missing, so that its
# source has been proven where it can be. Nothing else is: a forged source would make us hit a victim.
cdef bint is_answered(worker_t *worker, const verdict_t *verdict) noexcept nogil

# The verdict for a live flow known by its addresses alone (conntrack has no interfaces), as its
# originator's packets have it after translation. No cache, no counters.
cdef void judge_flow(const table_t *table, const flow_t *flow, verdict_t *out) noexcept nogil

# Whether a verdict is recorded at a capture level.
cdef inline bint is_captured(uint32_t level, const verdict_t *verdict) noexcept nogil:
    return not verdict.allow or level == CAPTURE_ALL or (
        not verdict.cached and (level == CAPTURE_MISSES or verdict.reason == R_AUDIT))

# The flow of a packet's reply, seen from the other end: ICMP replies become the requests they answer.
cdef void turn_round(flow_t *flow) noexcept nogil

cdef class Publisher:
    cdef table_t *current         # atomic
    cdef list _tables             # every RuleTable a worker may still see, newest last
    cdef list _workers            # weak references
    cdef object _recent           # generation -> pods of the last tables, for events
    cdef uint32_t _newest
    cdef public object on_retired    # called with every table that no worker sees any more; None: nobody
    cdef object __weakref__       # weak references are allowed
    cdef bint open_lanes(self, RuleTable table) except False
    cdef bint drop_unseen(self) except False

cdef class Worker:
    cdef worker_t c
    cdef readonly Publisher publisher
    cdef object __weakref__       # weak references are allowed

# A verdict as dataplane.verdict.Verdict; `pods`: those of the table it was given by, or None.
cdef object verdict_to_python(const verdict_t *verdict, object pods)

# For the one reader of a worker's ring. Events from ring_tail to before the head are there to be read;
# `events_took` gives the room of those before `tail` back.
cdef uint64_t events_head(Worker worker)
cdef bint events_took(Worker worker, uint64_t tail) except False
# `data`: the beginning of the packet as far as it was kept.
cdef object event_to_python(const event_t *event, Publisher publisher, bytes data)
