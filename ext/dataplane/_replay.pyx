# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: initializedcheck=False, auto_pickle=False
"""A capture through the engine.

What the kernel knows of a live packet, a capture does not say: the interfaces it passed, and whether
it is a reply. Pods are found by their addresses, so nothing is taken for forged; and a table of all
flows of the capture, here, says who opened each.

A packet that was captured at several places of its way (tcpdump -i any, a bridge and its ports)
counts once: the same bytes from the network header on, but for what routers change, within a moment,
under another link header or with another hop limit. What is sent twice in truth has the same ones.
"""
cimport cython
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stddef cimport size_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memset

from dataplane._engine cimport (DIR_EGRESS, DIR_INGRESS, HOOK_FORWARD, Publisher, Worker, event_t,
                                event_to_python, judge_flow, turn_round, verdict_t,
                                verdict_to_python, worker_enter, worker_judge, worker_leave)
from dataplane._packet cimport (PKT_FIRST_FRAGMENT, PKT_ICMP_ERROR, addr_t, decode, flow_t,
                                flow_to_python, packet_t, unpack_address)
from dataplane._pcap cimport (READ_END, READ_FAILED, READ_OTHER, Capture, Filter, capture_next,
                              filter_matches, read_t, record_t)
from dataplane._reasons cimport (R_COUNT, R_FRAGMENT, R_MALFORMED, R_NONE, R_NOT_A_POD, R_OWN_NODE,
                                 reason_t)
from dataplane._rules cimport table_pod_by_address, table_t

import os

import dataplane._pcap as pcap
from dataplane.reasons import Reason
from dataplane.verdict import Began, Conversation

cdef extern from *:
    """
    /* Folds a product of 128 bits, so that every bit of both reaches every bit of the result. */
    static inline uint64_t replay_mix(uint64_t a, uint64_t b) {
        unsigned __int128 product = (unsigned __int128)a * b;
        return (uint64_t)product ^ (uint64_t)(product >> 64);
    }
    """
    uint64_t mix "replay_mix" (uint64_t a, uint64_t b) noexcept nogil

cdef enum:
    NO_FLOW = 0xFFFFFFFF
    SEEN_SLOTS = 1 << 16          # packets that a later sighting is compared with
    SEEN_NS = 5000000             # how long a packet takes through a node, queue and engine included
    SEEN_BYTES = 192              # of the transport header and what follows
    FRAGMENT_SLOTS = 1 << 12
    EPHEMERAL = 32768             # Linux's net.ipv4.ip_local_port_range begins here
    PRIVILEGED = 1024
    IP_ICMP = 1
    IP_TCP = 6
    IP_UDP = 17
    IP_DCCP = 33
    IP_FRAGMENT = 44
    IP_ICMPV6 = 58
    IP_SCTP = 132
    TCP_FIN = 1
    TCP_SYN = 2
    TCP_RST = 4
    TCP_ACK = 16

cdef enum began_t:                # dataplane.verdict.Began
    OPENED = 0
    ANSWERED = 1
    BY_PORTS = 2
    BY_SENDER = 3

# Which of a packet's two ways it goes.
cdef enum way_t:
    ORIGINAL = 0
    REPLY = 1

cdef struct conversation_t:
    flow_t key                    # the same for both ways
    verdict_t verdict
    uint64_t first_ns
    uint64_t last_ns
    uint64_t packets[2]           # by way_t
    uint64_t bytes[2]
    uint64_t related
    uint32_t opened
    uint8_t turned                # the originator's packets have the key turned round
    uint8_t began                 # began_t
    uint8_t own_node
    uint8_t closed                # a FIN or RST was seen
    uint8_t answered              # a reply that is no RST was seen

cdef struct seen_t:
    uint64_t digest
    uint64_t place                # link header and hop limit
    uint64_t when_ns

cdef struct fragment_t:
    uint64_t digest
    uint32_t conversation
    uint8_t way

cdef struct totals_t:
    uint64_t packets[2][32]       # [allow][reason_t]
    uint64_t bytes[2][32]
    uint64_t unmatched            # the filter left them out
    uint64_t again                # seen at another place before
    uint64_t cut                  # captured too little of it to judge
    uint64_t stray                # ICMP errors about flows that the capture does not have
    uint64_t first_ns
    uint64_t last_ns

cdef struct replay_t:
    conversation_t *conversations
    uint32_t n
    uint32_t room
    uint32_t *slots               # of conversations, NO_FLOW: empty; open addressing
    uint32_t mask
    seen_t *seen
    fragment_t *fragments
    uint64_t seed
    totals_t totals
    const uint32_t *devices       # by pod
    const uint32_t *first_node    # by pod, and one more: where its nodes' addresses begin
    const addr_t *nodes
    const uint8_t *node_families


# ---- what a packet's bytes say -----------------------------------------------------------------

cdef inline uint16_t be16(const uint8_t *p) noexcept nogil:
    return <uint16_t>((<uint32_t>p[0] << 8) | p[1])


cdef inline uint64_t digest_bytes(uint64_t h, const uint8_t *data, size_t length) noexcept nogil:
    cdef size_t at = 0
    cdef uint64_t word
    cdef int i
    while at + 8 <= length:
        word = 0
        for i in range(8):
            word = word << 8 | data[at + i]
        h = mix(h ^ word, <uint64_t>0x9E3779B97F4A7C15)
        at += 8
    word = length
    while at < length:
        word = word << 8 | data[at]
        at += 1
    return mix(h ^ word, <uint64_t>0xA0761D6478BD642F)


cdef inline uint64_t digest_flow(uint64_t seed, const flow_t *flow) noexcept nogil:
    cdef uint64_t h = mix(seed ^ flow.src.low, <uint64_t>0x9E3779B97F4A7C15 ^ seed)
    h = mix(h ^ flow.dst.low, <uint64_t>0xE7037ED1A0B428DB)
    if flow.family == 6:
        h = mix(h ^ flow.src.high, <uint64_t>0x8EBC6AF09C88C6E3)
        h = mix(h ^ flow.dst.high, <uint64_t>0x589965CC75374CC3)
    return mix(h ^ (<uint64_t>flow.sport << 48 | <uint64_t>flow.dport << 32
                    | <uint64_t>flow.protocol << 8 | flow.family), <uint64_t>0x1D8E4E27C47D124F)


cdef inline bint same_flow(const flow_t *a, const flow_t *b) noexcept nogil:
    return ((a.src.low ^ b.src.low) | (a.dst.low ^ b.dst.low) | (a.src.high ^ b.src.high)
            | (a.dst.high ^ b.dst.high) | <uint64_t>(a.sport ^ b.sport) | <uint64_t>(a.dport ^ b.dport)
            | <uint64_t>(a.protocol ^ b.protocol) | <uint64_t>(a.family ^ b.family)) == 0


cdef inline bint is_icmp(const flow_t *flow) noexcept nogil:
    return flow.protocol == (IP_ICMP if flow.family == 4 else IP_ICMPV6)


# An answer that names its request: echo, timestamp, information, address mask.
cdef inline bint is_icmp_reply(const flow_t *flow) noexcept nogil:
    cdef int kind = flow.dport >> 8
    if flow.family == 6:
        return kind == 129
    return kind == 0 or kind == 14 or kind == 16 or kind == 18


# The same key for both ways of a flow; the result says whether the key is the packet's flow turned round.
cdef inline bint key_of(const flow_t *flow, flow_t *key) noexcept nogil:
    cdef bint turned
    key[0] = flow[0]
    if is_icmp(flow):
        turned = is_icmp_reply(flow)
    elif flow.src.high != flow.dst.high:
        turned = flow.src.high > flow.dst.high
    elif flow.src.low != flow.dst.low:
        turned = flow.src.low > flow.dst.low
    else:
        turned = flow.sport > flow.dport
    if turned:
        turn_round(key)
    return turned


# The packet identifier that its fragments share; whether there is one.
cdef bint fragment_id(const uint8_t *data, size_t captured, uint64_t *identifier) noexcept nogil:
    cdef size_t at = 40
    cdef uint8_t protocol
    cdef int _
    if captured < 20:
        return False
    if data[0] >> 4 == 4:
        identifier[0] = <uint64_t>be16(data + 4) << 8 | data[9]
        return True
    if captured < 40:
        return False
    protocol = data[6]
    for _ in range(8):
        if captured < at + 8:
            return False
        if protocol == IP_FRAGMENT:
            identifier[0] = <uint64_t>be16(data + at + 4) << 16 | be16(data + at + 6)
            return True
        protocol = data[at]
        at += (<size_t>data[at + 1] + 1) << 3
    return False


# Who opened a flow whose first packet this is: ORIGINAL when its sender did.
cdef way_t opening(const packet_t *packet, const uint8_t *data, size_t captured,
                   uint8_t *began) noexcept nogil:
    cdef const flow_t *flow = &packet.flow
    cdef size_t at = packet.l4_offset
    cdef int kind
    began[0] = OPENED
    if is_icmp(flow):
        if is_icmp_reply(flow):
            began[0] = ANSWERED
            return REPLY
        return ORIGINAL
    if not flow.has_ports:
        return ORIGINAL
    if flow.protocol == IP_TCP:
        if packet.tcp_flags & TCP_SYN:
            if not packet.tcp_flags & TCP_ACK:
                return ORIGINAL
            began[0] = ANSWERED
            return REPLY
    elif flow.protocol == IP_SCTP:
        kind = data[at + 12] if captured > at + 12 else 0
        if kind == 1:             # INIT
            return ORIGINAL
        if kind == 2:             # INIT ACK
            began[0] = ANSWERED
            return REPLY
    elif flow.protocol == IP_DCCP:
        kind = (data[at + 8] >> 1) & 0xF if captured > at + 8 else 15
        if kind == 0:             # Request
            return ORIGINAL
        if kind == 1:             # Response
            began[0] = ANSWERED
            return REPLY
    elif not (flow.sport < PRIVILEGED and flow.dport >= EPHEMERAL):
        return ORIGINAL           # UDP says nothing; only an answer of a service looks like one
    began[0] = BY_PORTS
    if (flow.sport < EPHEMERAL) != (flow.dport < EPHEMERAL):
        return REPLY if flow.sport < EPHEMERAL else ORIGINAL
    if flow.sport == flow.dport:
        began[0] = BY_SENDER
        return ORIGINAL
    return REPLY if flow.sport < flow.dport else ORIGINAL


# ---- the table of flows ------------------------------------------------------------------------

cdef uint32_t find(const replay_t *replay, const flow_t *key, uint32_t *slot) noexcept nogil:
    cdef uint32_t at = <uint32_t>(digest_flow(replay.seed, key) & replay.mask)
    while replay.slots[at] != NO_FLOW:
        if same_flow(&replay.conversations[replay.slots[at]].key, key):
            break
        at = (at + 1) & replay.mask
    slot[0] = at
    return replay.slots[at]


# Twice the room. False without memory: then nothing has changed.
cdef bint grow(replay_t *replay) noexcept nogil:
    cdef uint32_t room = 2 * replay.room
    cdef uint32_t mask = 4 * replay.room - 1
    cdef uint32_t i, slot
    cdef conversation_t *conversations
    cdef uint32_t *slots
    cdef uint32_t *before = replay.slots
    if replay.room >= 1 << 29:
        return False
    slots = <uint32_t *>malloc((<size_t>mask + 1) * sizeof(uint32_t))
    if slots == NULL:
        return False
    conversations = <conversation_t *>realloc(replay.conversations, <size_t>room * sizeof(conversation_t))
    if conversations == NULL:
        free(slots)
        return False
    memset(slots, 0xFF, (<size_t>mask + 1) * sizeof(uint32_t))
    replay.conversations = conversations
    replay.room = room
    replay.slots = slots
    replay.mask = mask
    for i in range(replay.n):     # a later flow of the same key is the one that goes on
        find(replay, &conversations[i].key, &slot)
        slots[slot] = i
    free(before)
    return True


cdef inline uint32_t device_of(const replay_t *replay, const table_t *table, uint8_t family,
                               const addr_t *address) noexcept nogil:
    cdef int32_t pod = table_pod_by_address(table, family, address)
    return replay.devices[pod] if pod >= 0 else 0


# Whether `address` is one of the node that the pod runs on.
cdef bint is_node_of(const replay_t *replay, int32_t pod, uint8_t family,
                     const addr_t *address) noexcept nogil:
    cdef uint32_t i
    for i in range(replay.first_node[pod], replay.first_node[pod + 1]):
        if (replay.node_families[i] == family and replay.nodes[i].low == address.low
                and replay.nodes[i].high == address.high):
            return True
    return False


# Traffic between a pod and its own node passes no queue: the engine never sees it.
cdef bint is_own_node(const replay_t *replay, const table_t *table, const flow_t *flow) noexcept nogil:
    cdef int32_t src = table_pod_by_address(table, flow.family, &flow.src)
    cdef int32_t dst = table_pod_by_address(table, flow.family, &flow.dst)
    if src >= 0 and dst < 0:
        return is_node_of(replay, src, flow.family, &flow.dst)
    return dst >= 0 and src < 0 and is_node_of(replay, dst, flow.family, &flow.src)


cdef void allow_own_node(const table_t *table, const flow_t *flow, verdict_t *out) noexcept nogil:
    memset(out, 0, sizeof(verdict_t))
    out.allow = 1
    out.reason = R_OWN_NODE
    out.egress_rule = -1
    out.ingress_rule = -1
    out.egress_pod = table_pod_by_address(table, flow.family, &flow.src)
    out.ingress_pod = table_pod_by_address(table, flow.family, &flow.dst)
    out.egress_reason = R_OWN_NODE if out.egress_pod >= 0 else R_NOT_A_POD
    out.ingress_reason = R_OWN_NODE if out.ingress_pod >= 0 else R_NOT_A_POD
    out.direction = DIR_EGRESS if out.egress_pod >= 0 else DIR_INGRESS


# A flow that this packet begins. NO_FLOW without memory.
cdef uint32_t begin(replay_t *replay, const table_t *table, const packet_t *packet, const record_t *record,
                    const flow_t *key, bint turned, uint32_t slot) noexcept nogil:
    cdef conversation_t *made
    cdef flow_t flow
    cdef way_t way
    if replay.n == replay.room:
        if not grow(replay):
            return NO_FLOW
        find(replay, key, &slot)
    made = &replay.conversations[replay.n]
    memset(made, 0, sizeof(conversation_t))
    made.key = key[0]
    way = opening(packet, record.data, record.captured, &made.began)
    # The packet is the key turned round or not, and goes the originator's way or not.
    made.turned = turned != (way == REPLY)
    made.first_ns = record.when_ns
    flow = made.key
    if made.turned:
        turn_round(&flow)
    made.own_node = is_own_node(replay, table, &flow)
    if made.own_node:
        allow_own_node(table, &flow, &made.verdict)
    else:
        judge_flow(table, &flow, &made.verdict)
    replay.slots[slot] = replay.n
    replay.n += 1
    return replay.n - 1


# ---- one packet --------------------------------------------------------------------------------

# Whether the same packet was seen at another place just before.
cdef bint seen_before(replay_t *replay, const packet_t *packet, const record_t *record,
                      reason_t bad) noexcept nogil:
    cdef const uint8_t *data = record.data
    cdef size_t captured = record.captured, at, rest
    cdef uint64_t h = digest_flow(replay.seed, &packet.flow), place
    cdef seen_t *seen
    cdef uint8_t checksum = 0
    at = packet.l4_offset if bad == R_NONE else 0
    if at == 0:                   # not decoded that far: behind the addresses
        at = 20 if data[0] >> 4 == 4 else 40
    if captured < at:
        return False
    if data[0] >> 4 == 4:
        h = mix(h ^ (<uint64_t>be16(data + 2) << 32 | <uint64_t>be16(data + 4) << 16 | be16(data + 6)),
                <uint64_t>0x9E3779B97F4A7C15)
        place = data[8]
    else:
        h = mix(h ^ (<uint64_t>be16(data + 4) << 16 | be16(data + 2)), <uint64_t>0x9E3779B97F4A7C15)
        place = data[7]
    rest = captured - at
    if rest > SEEN_BYTES:
        rest = SEEN_BYTES
    # Checksums are filled in on the way, by the interface that sends.
    if bad == R_NONE:
        checksum = 16 if packet.flow.protocol == IP_TCP else 6 if packet.flow.protocol == IP_UDP else 0
    if checksum and rest > checksum + 2u:
        h = digest_bytes(h, data + at, checksum)
        h = digest_bytes(h, data + at + checksum + 2, rest - checksum - 2)
    else:
        h = digest_bytes(h, data + at, rest)
    place = digest_bytes(mix(place ^ replay.seed, <uint64_t>0xE7037ED1A0B428DB), data - record.link,
                         record.link)
    seen = &replay.seen[h & (SEEN_SLOTS - 1)]
    if (seen.digest == h and seen.place != place and record.when_ns >= seen.when_ns
            and record.when_ns - seen.when_ns <= SEEN_NS):
        return True
    seen.digest = h
    seen.place = place
    seen.when_ns = record.when_ns
    return False


cdef inline fragment_t *fragment_slot(const replay_t *replay, const packet_t *packet,
                                      const record_t *record, uint64_t *digest) noexcept nogil:
    cdef uint64_t identifier
    cdef flow_t ends = packet.flow
    if not fragment_id(record.data, record.captured, &identifier):
        return NULL
    ends.sport = 0
    ends.dport = 0
    # IPv6's later fragments name the protocol of a header in between.
    ends.protocol = 0
    digest[0] = digest_flow(replay.seed ^ identifier, &ends)
    return &replay.fragments[digest[0] & (FRAGMENT_SLOTS - 1)]


cdef enum step_t:
    STEP_NO_MEMORY = -1
    STEP_PASSED_OVER = 0
    STEP_JUDGED = 1


# One packet: its verdict is in `event`, counted with its flow.
cdef step_t step(replay_t *replay, Worker worker, const record_t *record, event_t *event) noexcept nogil:
    cdef packet_t *packet = &event.packet
    cdef const table_t *table = worker.c.table
    cdef conversation_t *its = NULL
    cdef fragment_t *fragment
    cdef flow_t key
    cdef uint64_t digest = 0
    cdef uint32_t slot, number = NO_FLOW
    cdef bint turned
    cdef way_t way = ORIGINAL
    cdef reason_t bad = decode(record.data, record.captured, record.wire, packet)
    cdef size_t length
    event.when_ns = record.when_ns
    event.generation = table.generation
    event.kept = 0
    if bad == R_MALFORMED and record.captured < record.wire:
        replay.totals.cut += 1
        return STEP_PASSED_OVER
    if bad != R_MALFORMED and seen_before(replay, packet, record, bad):
        replay.totals.again += 1
        return STEP_PASSED_OVER

    if bad == R_NONE and packet.flags & PKT_ICMP_ERROR:
        # It quotes a packet of its flow, against whose way it goes.
        turned = key_of(&packet.inner, &key)
        number = find(replay, &key, &slot)
        way = REPLY
        if number == NO_FLOW:
            replay.totals.stray += 1
        elif turned != replay.conversations[number].turned:
            way = ORIGINAL
    elif bad == R_NONE:
        turned = key_of(&packet.flow, &key)
        number = find(replay, &key, &slot)
        if number != NO_FLOW:
            its = &replay.conversations[number]
            way = REPLY if turned != its.turned else ORIGINAL
            if (packet.flow.protocol == IP_TCP and way == REPLY
                    and packet.tcp_flags & (TCP_SYN | TCP_ACK) == TCP_SYN
                    and (its.closed or its.began != OPENED)):
                number = NO_FLOW  # the other end opens one now
        if number == NO_FLOW:
            number = begin(replay, table, packet, record, &key, turned, slot)
            if number == NO_FLOW:
                return STEP_NO_MEMORY
            way = REPLY if turned != replay.conversations[number].turned else ORIGINAL
        if packet.flags & PKT_FIRST_FRAGMENT:
            fragment = fragment_slot(replay, packet, record, &digest)
            if fragment != NULL:
                fragment.digest = digest
                fragment.conversation = number
                fragment.way = way
    elif bad == R_FRAGMENT:
        # The kernel puts fragments together before anything is judged.
        fragment = fragment_slot(replay, packet, record, &digest)
        if fragment != NULL and fragment.digest == digest and fragment.conversation != NO_FLOW:
            number = fragment.conversation
            way = <way_t>fragment.way

    its = &replay.conversations[number] if number != NO_FLOW else NULL
    event.path.indev = device_of(replay, table, packet.flow.family, &packet.flow.src)
    event.path.outdev = device_of(replay, table, packet.flow.family, &packet.flow.dst)
    event.path.hook = HOOK_FORWARD
    event.path.reply = way == REPLY
    if its != NULL and (its.own_node or bad == R_FRAGMENT):
        event.verdict = its.verdict
    else:
        worker_judge(&worker.c, record.data, record.captured, record.wire, &event.path, &event.verdict)
        if its != NULL and not its.packets[0] and not its.packets[1] and way == ORIGINAL and (
                not packet.flags & PKT_ICMP_ERROR):
            its.verdict = event.verdict
    length = packet.length if bad == R_NONE else record.wire
    replay.totals.packets[event.verdict.allow][event.verdict.reason] += 1
    replay.totals.bytes[event.verdict.allow][event.verdict.reason] += length
    if not replay.totals.first_ns or record.when_ns < replay.totals.first_ns:
        replay.totals.first_ns = record.when_ns
    if record.when_ns > replay.totals.last_ns:
        replay.totals.last_ns = record.when_ns
    if its == NULL:
        return STEP_JUDGED
    if record.when_ns < its.first_ns:
        its.first_ns = record.when_ns
    if record.when_ns > its.last_ns:
        its.last_ns = record.when_ns
    if bad == R_NONE and packet.flags & PKT_ICMP_ERROR:
        its.related += 1
        return STEP_JUDGED
    if way == REPLY and not (bad == R_NONE and packet.flow.protocol == IP_TCP
                             and packet.tcp_flags & TCP_RST):
        its.answered = 1
    its.packets[<int>way] += 1
    its.bytes[<int>way] += length
    if bad == R_NONE and packet.flow.protocol == IP_TCP:
        if way == ORIGINAL and packet.tcp_flags & (TCP_SYN | TCP_ACK) == TCP_SYN:
            its.opened += 1
        if packet.tcp_flags & (TCP_FIN | TCP_RST):
            its.closed = 1
    elif its.began == OPENED and not its.opened:
        its.opened = 1
    return STEP_JUDGED


# ---- flows taken together ----------------------------------------------------------------------

# The flow as its originator has it, and no port of theirs.
cdef void without_port(conversation_t *its) noexcept nogil:
    if its.turned:
        turn_round(&its.key)
        its.turned = 0
    its.key.sport = 0


cdef inline bint same_talk(const conversation_t *a, const conversation_t *b) noexcept nogil:
    return (same_flow(&a.key, &b.key) and a.verdict.allow == b.verdict.allow
            and a.verdict.reason == b.verdict.reason and a.began == b.began and a.answered == b.answered)


cdef void add(conversation_t *talk, const conversation_t *its) noexcept nogil:
    cdef int way
    for way in range(2):
        talk.packets[way] += its.packets[way]
        talk.bytes[way] += its.bytes[way]
    talk.related += its.related
    talk.opened += its.opened
    if its.first_ns < talk.first_ns:
        talk.first_ns = its.first_ns
    if its.last_ns > talk.last_ns:
        talk.last_ns = its.last_ns


# ---- Python face -------------------------------------------------------------------------------

cdef tuple REASONS = tuple(Reason)
cdef tuple BEGAN = tuple(Began)


@cython.final
cdef class Replay:
    """Captures through the table that `publisher` has in force, which stays the same meanwhile.

    Every pod of the table stands behind one device (`policy.explain.table_of_everything`). `nodes`:
    by pod, the packed addresses of the node it runs on. `chosen`: which packets, as raw IP.
    """
    cdef replay_t c
    cdef readonly Worker worker
    cdef Filter chosen
    cdef Publisher publisher
    cdef uint32_t *devices
    cdef uint32_t *first_node
    cdef addr_t *nodes
    cdef uint8_t *node_families

    def __cinit__(self, Publisher publisher not None, nodes, *, Filter chosen=None, seed=None):
        cdef size_t i = 0, j = 0
        table = publisher.table
        if table is None:
            raise ValueError("there is no table to judge by")
        pods = table.pods
        if len(nodes) != len(pods):
            raise ValueError(f"{len(nodes)} pods' nodes for {len(pods)} pods")
        if chosen is not None and chosen.linktype != pcap.RAW_IP:
            raise ValueError("the filter is not one of raw IP packets")
        self.publisher = publisher
        self.worker = Worker(publisher)
        self.chosen = chosen
        if seed is None:
            seed = int.from_bytes(os.urandom(8), "little")
        self.c.seed = <uint64_t>(seed & 0xFFFFFFFFFFFFFFFF) | 1
        self.c.room = 1 << 10
        self.c.mask = 2 * self.c.room - 1
        self.c.conversations = <conversation_t *>malloc(self.c.room * sizeof(conversation_t))
        self.c.slots = <uint32_t *>malloc((<size_t>self.c.mask + 1) * sizeof(uint32_t))
        self.c.seen = <seen_t *>calloc(SEEN_SLOTS, sizeof(seen_t))
        self.c.fragments = <fragment_t *>malloc(FRAGMENT_SLOTS * sizeof(fragment_t))
        count = sum(map(len, nodes))
        self.devices = <uint32_t *>malloc((len(pods) + 1) * sizeof(uint32_t))
        self.first_node = <uint32_t *>malloc((len(pods) + 1) * sizeof(uint32_t))
        self.nodes = <addr_t *>malloc((count + 1) * sizeof(addr_t))
        self.node_families = <uint8_t *>malloc(count + 1)
        if (self.c.conversations == NULL or self.c.slots == NULL or self.c.seen == NULL
                or self.c.fragments == NULL or self.devices == NULL or self.first_node == NULL
                or self.nodes == NULL or self.node_families == NULL):
            raise MemoryError
        memset(self.c.slots, 0xFF, (<size_t>self.c.mask + 1) * sizeof(uint32_t))
        memset(self.c.fragments, 0xFF, FRAGMENT_SLOTS * sizeof(fragment_t))
        for pod, addresses in zip(pods, nodes, strict=True):
            (self.devices[i],) = pod.devices
            self.first_node[i] = <uint32_t>j
            for address in addresses:
                unpack_address(address, &self.nodes[j])
                self.node_families[j] = 4 if len(address) == 4 else 6
                j += 1
            i += 1
        self.first_node[i] = <uint32_t>j
        self.c.devices = self.devices
        self.c.first_node = self.first_node
        self.c.nodes = self.nodes
        self.c.node_families = self.node_families

    def __dealloc__(self):
        free(self.c.conversations)
        free(self.c.slots)
        free(self.c.seen)
        free(self.c.fragments)
        free(self.devices)
        free(self.first_node)
        free(self.nodes)
        free(self.node_families)

    # Reads up to `limit` records, and stops after the first that was judged if `one`. READ_END and
    # READ_FAILED end the capture; MemoryError leaves what was read before.
    cdef read_t read(self, Capture capture, uint64_t limit, bint one, event_t *event, bint *judged) except *:
        cdef record_t record
        cdef read_t how = READ_OTHER
        cdef step_t done = STEP_PASSED_OVER
        cdef uint64_t left = limit
        judged[0] = False
        with nogil:
            worker_enter(&self.worker.c)
            while left:
                left -= 1
                how = capture_next(capture.handle, capture.linktype, &record)
                if how == READ_OTHER:
                    capture.others += 1
                    continue
                if how == READ_END or how == READ_FAILED:
                    break
                capture.packets += 1
                if self.chosen is not None and not filter_matches(
                        &self.chosen.program, record.data, record.captured, record.wire):
                    self.c.totals.unmatched += 1
                    continue
                done = step(&self.c, self.worker, &record, event)
                if done == STEP_NO_MEMORY:
                    break
                if one and done == STEP_JUDGED:
                    judged[0] = True
                    break
            worker_leave(&self.worker.c)
        if done == STEP_NO_MEMORY:
            raise MemoryError
        if how == READ_FAILED:
            capture.finish()
        elif how == READ_END:
            capture.ended = True
        return how

    def run(self, Capture capture not None, limit=1 << 17):
        """Judge up to `limit` records of the capture. False: it has ended."""
        cdef event_t event
        cdef bint judged
        if not capture.ended:
            self.read(capture, limit, False, &event, &judged)
        return not capture.ended

    def next(self, Capture capture not None):
        """Judge the next packet, and return its `Event`; None: the capture has ended.

        Its time is the capture's. Packets that are passed over (`unmatched`, `again`, `cut`) are no events.
        """
        cdef event_t event
        cdef bint judged = False
        while not capture.ended and not judged:
            self.read(capture, 1 << 17, True, &event, &judged)
        return event_to_python(&event, self.publisher, b"") if judged else None

    cdef object told(self, const conversation_t *its, object pods):
        cdef flow_t flow = its.key
        if its.turned:
            turn_round(&flow)
        return Conversation(
            flow_to_python(&flow), BEGAN[its.began], its.opened, its.first_ns, its.last_ns,
            (its.packets[0], its.packets[1]), (its.bytes[0], its.bytes[1]), its.related,
            its.answered != 0, verdict_to_python(&its.verdict, pods))

    def conversations(self):
        """The flows so far, in the order in which they were first seen: a list of `Conversation`."""
        cdef uint32_t i
        pods = self.publisher.table.pods
        return [self.told(&self.c.conversations[i], pods) for i in range(self.c.n)]

    def talks(self):
        """The flows so far, taken together where they differ by the originator's port alone.

        A list of (`Conversation`, flows): the first of them, with the counts and times of all. What
        tells them apart besides: how it was told who opened them, whether they were answered, and
        the verdict.
        """
        cdef uint32_t i, at, n = 0
        cdef uint32_t mask = 1023
        cdef conversation_t *talks
        cdef conversation_t *talk
        cdef conversation_t *its
        cdef uint32_t *flows
        cdef uint32_t *slots
        while mask < 2 * self.c.n:
            mask = 2 * mask + 1
        talks = <conversation_t *>malloc((<size_t>self.c.n + 1) * sizeof(conversation_t))
        flows = <uint32_t *>calloc(<size_t>self.c.n + 1, sizeof(uint32_t))
        slots = <uint32_t *>malloc((<size_t>mask + 1) * sizeof(uint32_t))
        try:
            if talks == NULL or flows == NULL or slots == NULL:
                raise MemoryError
            memset(slots, 0xFF, (<size_t>mask + 1) * sizeof(uint32_t))
            with nogil:
                for i in range(self.c.n):
                    its = &self.c.conversations[i]
                    talk = &talks[n]
                    talk[0] = its[0]
                    without_port(talk)
                    at = <uint32_t>(digest_flow(self.c.seed, &talk.key) & mask)
                    while slots[at] != NO_FLOW and not same_talk(&talks[slots[at]], talk):
                        at = (at + 1) & mask
                    if slots[at] == NO_FLOW:
                        slots[at] = n
                        n += 1
                    else:
                        add(&talks[slots[at]], its)
                    flows[slots[at]] += 1
            pods = self.publisher.table.pods
            return [(self.told(&talks[i], pods), flows[i]) for i in range(n)]
        finally:
            free(talks)
            free(flows)
            free(slots)

    def totals(self):
        """{(allow, reason): (packets, bytes)} of what was judged. Only what there was."""
        cdef int allow, reason
        found = {}
        for allow in range(2):
            for reason in range(<int>R_COUNT):
                if self.c.totals.packets[allow][reason]:
                    found[(bool(allow), REASONS[reason])] = (
                        self.c.totals.packets[allow][reason], self.c.totals.bytes[allow][reason])
        return found

    @property
    def unmatched(self):
        """Packets that the filter left out."""
        return self.c.totals.unmatched

    @property
    def again(self):
        """Packets that had been seen at another place just before, and are not counted again."""
        return self.c.totals.again

    @property
    def cut(self):
        """Packets of which too little was captured to judge them."""
        return self.c.totals.cut

    @property
    def stray(self):
        """ICMP errors about flows that are not in the capture."""
        return self.c.totals.stray

    @property
    def times(self):
        """(first, last) of the packets judged, in nanoseconds since the epoch."""
        return self.c.totals.first_ns, self.c.totals.last_ns
