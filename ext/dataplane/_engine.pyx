# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: initializedcheck=False, auto_pickle=False
"""The verdict engine. `_engine.pxd` is the readable face and holds the theory of operation.

Order of checks, and what each answers:

 1. decode: what cannot be read is denied (`malformed`, `fragment`);
 2. no table: denied; whoever wants traffic before there are rules does not queue it;
 3. turn a reply round, so that a flow is judged as its originator opened it, whoever speaks;
 4. spoofed: a source that is not the sending pod's is denied before anything looks at addresses;
 5. neighbour discovery, a pod to itself, own node: never a matter of policy;
 6. the flow cache, then the rules of both ends.

1 to 5 are decided per packet, so what the cache holds depends on its key alone.

An end in audit, that is whose isolating policies all are, denies nothing: what none of its rules allows
passes with the reason `audit`. A worker in audit lets everything pass that 1 to 6 deny.
"""
cimport cython
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t, int32_t
from libc.stddef cimport size_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset

from dataplane._packet cimport (PKT_FIRST_FRAGMENT, PKT_ICMP_ERROR, PKT_ND, addr_t, decode, flow_to_python,
                                flow_t, packet_t, unpack_address)
from dataplane._reasons cimport (R_AUDIT, R_COUNT, R_HOOK, R_NEIGHBOUR_DISCOVERY, R_NO_RULE, R_NO_TABLE,
                                 R_NONE, R_NOT_A_POD, R_NOT_ISOLATED, R_OWN_NODE, R_POLICY_RULE, R_RELATED,
                                 R_REPLY, R_SAME_POD, R_SPOOFED, reason_t)
from dataplane._rules cimport (MAX_LANES, POD_BRANCH, POD_EGRESS_AUDIT, POD_EGRESS_ISOLATED,
                               POD_INGRESS_AUDIT, POD_INGRESS_ISOLATED, POD_SPOOF_CHECK, POD_UNKNOWN,
                               SIDE_EGRESS, SIDE_INGRESS, TALLY_ALLOWED, TALLY_NO_RULE, TALLY_NO_TABLE,
                               TALLY_OUTCOMES, TALLY_SPOOFED, RuleTable, pod_t, ruleset_find,
                               table_is_own_node, table_pod_by_address, table_pod_by_device,
                               table_pod_has_address, table_t)
from dataplane._flows cimport (cache_find, cache_free, cache_new, cache_put, cache_t, flow_key_t,
                               flow_value_t)

import os
import time
import weakref
from collections import OrderedDict

from dataplane.model import Direction
from dataplane.reasons import Reason
from dataplane.verdict import End, Event, Packet, Verdict

cdef extern from *:
    """
    #include <time.h>
    #define engine_get_table(slot) __atomic_load_n((slot), __ATOMIC_SEQ_CST)
    #define engine_set_table(slot, value) __atomic_store_n((slot), (value), __ATOMIC_SEQ_CST)
    #define engine_get_u32(slot) __atomic_load_n((slot), __ATOMIC_RELAXED)
    #define engine_set_u32(slot, value) __atomic_store_n((slot), (value), __ATOMIC_RELAXED)
    #define engine_get_u64(slot) __atomic_load_n((slot), __ATOMIC_ACQUIRE)
    #define engine_set_u64(slot, value) __atomic_store_n((slot), (value), __ATOMIC_RELEASE)
    static inline uint64_t engine_realtime(void) {
        struct timespec now;
        clock_gettime(CLOCK_REALTIME, &now);
        return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
    }
    """
    table_t *get_table "engine_get_table" (table_t **slot) noexcept nogil
    void set_table "engine_set_table" (table_t **slot, table_t *value) noexcept nogil
    uint32_t get_u32 "engine_get_u32" (uint32_t *slot) noexcept nogil
    void set_u32 "engine_set_u32" (uint32_t *slot, uint32_t value) noexcept nogil
    uint64_t get_u64 "engine_get_u64" (uint64_t *slot) noexcept nogil
    void set_u64 "engine_set_u64" (uint64_t *slot, uint64_t value) noexcept nogil
    uint8_t *get_bytes "engine_get_u64" (uint8_t **slot) noexcept nogil
    void set_bytes "engine_set_u64" (uint8_t **slot, uint8_t *value) noexcept nogil
    uint64_t realtime "engine_realtime" () noexcept nogil

cdef enum:
    # How many generations of pods are kept for events read late: at one change per second and a
    # reader that polls more often than that, events never meet a table that is gone.
    RECENT_TABLES = 8
    RING_MAX = 1 << 20


# ---- one flow ----------------------------------------------------------------------------------

cdef void turn_round(flow_t *flow) noexcept nogil:
    cdef addr_t address = flow.src
    cdef uint16_t port
    cdef uint8_t kind
    flow.src = flow.dst
    flow.dst = address
    if flow.has_ports:
        port = flow.sport
        flow.sport = flow.dport
        flow.dport = port
        return
    # ICMP: the request that the reply answers, so that both are one flow.
    kind = <uint8_t>(flow.dport >> 8)
    if flow.family == 4 and flow.protocol == 1:
        if kind == 0:             # echo
            flow.dport = 8 << 8
        elif kind == 14 or kind == 16 or kind == 18:      # timestamp, information, address mask
            flow.dport = <uint16_t>((kind - 1) << 8)
    elif flow.family == 6 and flow.protocol == 58 and kind == 129:
        flow.dport = 128 << 8


cdef inline void clear(verdict_t *out) noexcept nogil:
    memset(out, 0, sizeof(verdict_t))
    out.egress_rule = -1
    out.ingress_rule = -1
    out.egress_pod = -1
    out.ingress_pod = -1


cdef inline void deny(verdict_t *out, uint8_t reason, uint8_t direction) noexcept nogil:
    out.allow = 0
    out.reason = reason
    out.direction = direction
    out.bits = 0


# The pod behind an interface. Packets that are routed onto a bridge do not say which port they
# will leave by: there, and only there, the address tells the pod.
cdef inline int32_t pod_at(const table_t *table, uint32_t device, uint8_t family,
                           const addr_t *address) noexcept nogil:
    cdef int32_t pod = table_pod_by_device(table, device)
    if pod < 0 and table.n_bridged and device:
        pod = table_pod_by_address(table, family, address)
        if pod >= 0 and table.pods[pod].bridge != device:
            pod = -1
    return pod


cdef inline uint8_t judge_end(const table_t *table, int32_t pod, uint32_t isolated, const flow_t *flow,
                              int32_t *rule) noexcept nogil:
    cdef const pod_t *p
    cdef uint16_t port = flow.dport if flow.has_ports else 0
    cdef uint32_t audit
    if pod < 0:
        return R_NOT_A_POD
    p = &table.pods[pod]
    if p.flags & POD_UNKNOWN:
        return R_NO_TABLE
    if not p.flags & isolated:
        return R_NOT_ISOLATED
    if isolated == POD_EGRESS_ISOLATED:
        rule[0] = ruleset_find(p.egress, flow.family, &flow.dst, flow.protocol, port)
        audit = POD_EGRESS_AUDIT
    else:
        rule[0] = ruleset_find(p.ingress, flow.family, &flow.src, flow.protocol, port)
        audit = POD_INGRESS_AUDIT
    if rule[0] >= 0:
        return R_POLICY_RULE
    return R_AUDIT if p.flags & audit else R_NO_RULE


# Whether the kernel may pass the rest of a flow as far as this end is concerned.
cdef inline bint is_judged(uint8_t reason) noexcept nogil:
    return reason == R_POLICY_RULE or reason == R_AUDIT


# Both ends of a flow in its original direction. The pods are set already.
cdef inline void judge_ends(const table_t *table, const flow_t *flow, verdict_t *out) noexcept nogil:
    cdef uint8_t egress = judge_end(table, out.egress_pod, POD_EGRESS_ISOLATED, flow, &out.egress_rule)
    cdef uint8_t ingress = judge_end(table, out.ingress_pod, POD_INGRESS_ISOLATED, flow, &out.ingress_rule)
    out.egress_reason = egress
    out.ingress_reason = ingress
    if egress == R_NO_RULE or egress == R_NO_TABLE:
        deny(out, egress, DIR_EGRESS)
        return
    if ingress == R_NO_RULE or ingress == R_NO_TABLE:
        deny(out, ingress, DIR_INGRESS)
        return
    out.allow = 1
    # A sweep of live flows finds their pods by address. What a pod routes for others carries none of
    # its own: no bit, so that such a flow meets the rules in force with every packet.
    if is_judged(egress) and table_pod_has_address(table, out.egress_pod, flow.family, &flow.src):
        out.bits |= BIT_EGRESS
    if is_judged(ingress) and table_pod_has_address(table, out.ingress_pod, flow.family, &flow.dst):
        out.bits |= BIT_INGRESS
    if egress == R_AUDIT or ingress == R_AUDIT:
        out.reason = R_AUDIT
        out.audited = R_NO_RULE
        out.direction = DIR_EGRESS if egress == R_AUDIT else DIR_INGRESS
    elif egress == R_POLICY_RULE or (egress == R_NOT_ISOLATED and ingress != R_POLICY_RULE):
        out.reason = egress
        out.direction = DIR_EGRESS
    elif ingress == R_POLICY_RULE or ingress == R_NOT_ISOLATED:
        out.reason = ingress
        out.direction = DIR_INGRESS
    else:
        out.reason = R_NOT_A_POD
        out.direction = DIR_NONE


# Allowed whatever the rules say. The bits cover the ends that are isolated: they need not be asked again.
cdef inline void exempt(const table_t *table, uint8_t reason, verdict_t *out) noexcept nogil:
    out.allow = 1
    out.reason = reason
    out.egress_reason = reason if out.egress_pod >= 0 else <uint8_t>R_NOT_A_POD
    out.ingress_reason = reason if out.ingress_pod >= 0 else <uint8_t>R_NOT_A_POD
    out.direction = (DIR_EGRESS if out.egress_pod >= 0
                     else DIR_INGRESS if out.ingress_pod >= 0 else DIR_NONE)
    if out.egress_pod >= 0 and table.pods[out.egress_pod].flags & POD_EGRESS_ISOLATED:
        out.bits |= BIT_EGRESS
    if out.ingress_pod >= 0 and table.pods[out.ingress_pod].flags & POD_INGRESS_ISOLATED:
        out.bits |= BIT_INGRESS


cdef inline bint is_same_pod(const table_t *table, const flow_t *flow, const verdict_t *out) noexcept nogil:
    return (out.egress_pod >= 0 and out.egress_pod == out.ingress_pod
            and table_pod_has_address(table, out.egress_pod, flow.family, &flow.src)
            and table_pod_has_address(table, out.egress_pod, flow.family, &flow.dst))


cdef inline bint is_link_local_or_unspecified(const flow_t *flow) noexcept nogil:
    return flow.src.high >> 54 == 0x3FA or (flow.src.high == 0 and flow.src.low == 0)


# Strict mode meets interfaces before it knows their pod: no address to check against, and the
# verdict then is that nothing is known, not that something is forged.
cdef inline bint must_prove_source(const pod_t *pod) noexcept nogil:
    return pod.flags & POD_SPOOF_CHECK and (pod.n_addresses != 0 or not pod.flags & POD_UNKNOWN)


# The verdict for a decoded packet. `worker` NULL, or one without a cache: from the rules.
cdef void judge_packet(const table_t *table, worker_t *worker, const packet_t *packet, const path_t *path,
                       verdict_t *out) noexcept nogil:
    cdef cache_t *cache = worker.cache if worker != NULL else NULL
    cdef flow_key_t key
    cdef flow_value_t value
    cdef flow_t *flow = &key.flow
    cdef int32_t sender
    cdef bint error = packet.flags & PKT_ICMP_ERROR != 0
    cdef bint local = path.hook == HOOK_LOCAL_IN
    key.hook = path.hook
    if path.reply:
        key.indev = path.outdev
        key.outdev = path.indev
    else:
        key.indev = path.indev
        key.outdev = path.outdev
    if error:
        # An error travels against the packet it quotes: as a reply it quotes the original direction.
        key.flow = packet.inner
        if not path.reply:
            turn_round(flow)
    else:
        key.flow = packet.flow
        if path.reply:
            turn_round(flow)
    out.egress_pod = pod_at(table, key.indev, flow.family, &flow.src)
    out.ingress_pod = pod_at(table, key.outdev, flow.family, &flow.dst)

    # The sender is the pod behind the packet's own in-device: the responder's, in a reply.
    sender = out.ingress_pod if path.reply else out.egress_pod
    if sender >= 0 and must_prove_source(&table.pods[sender]):
        if not table_pod_has_address(table, sender, packet.flow.family, &packet.flow.src):
            if not (packet.flags & PKT_ND and is_link_local_or_unspecified(&packet.flow)):
                if path.reply:
                    out.ingress_reason = R_SPOOFED
                    deny(out, R_SPOOFED, DIR_INGRESS)
                else:
                    out.egress_reason = R_SPOOFED
                    deny(out, R_SPOOFED, DIR_EGRESS)
                return
    if local:
        out.ingress_pod = -1      # the node itself receives
    if packet.flags & PKT_ND:
        out.allow = 1
        out.reason = R_NEIGHBOUR_DISCOVERY
        return
    if is_same_pod(table, flow, out):
        exempt(table, R_SAME_POD, out)
    elif not local and not path.reply and out.egress_pod >= 0 and (
            table.pods[out.egress_pod].flags & POD_BRANCH) and (
            table_is_own_node(table, flow.family, &flow.dst)):
        # Only branch interfaces send own-node traffic through FORWARD.
        exempt(table, R_OWN_NODE, out)
    elif not local and path.reply and out.egress_pod < 0 and table.n_own and (
            table_is_own_node(table, flow.family, &flow.src)):
        # The node opened the flow: its source came from no pod's interface.
        exempt(table, R_OWN_NODE, out)
    elif not local and not path.reply and out.ingress_pod >= 0 and out.egress_pod < 0 and (
            table.pods[out.ingress_pod].uplink) and (
            table.pods[out.ingress_pod].uplink == key.indev) and (
            table_is_own_node(table, flow.family, &flow.src)):
        # What a node sends to its branch pod leaves and comes back by the pod's own uplink. From any
        # other interface, one that is not known to be a pod's yet included, the source may be forged.
        exempt(table, R_OWN_NODE, out)
    else:
        if error or cache == NULL:
            judge_ends(table, flow, out)
        elif cache_find(cache, &key, table.generation, &value):
            worker.cache_hits += 1
            out.cached = 1
            out.allow = value.verdict
            out.reason = value.reason
            out.audited = R_NO_RULE if out.reason == R_AUDIT else R_NONE
            out.bits = value.bits
            out.direction = value.direction
            out.egress_reason = value.egress_reason
            out.ingress_reason = value.ingress_reason
            out.egress_rule = <int32_t>value.egress_rule
            out.ingress_rule = <int32_t>value.ingress_rule
        else:
            worker.cache_misses += 1
            judge_ends(table, flow, out)
            value.verdict = out.allow
            value.reason = out.reason
            value.bits = out.bits
            value.direction = out.direction
            value.egress_reason = out.egress_reason
            value.ingress_reason = out.ingress_reason
            value.egress_rule = <uint32_t>out.egress_rule
            value.ingress_rule = <uint32_t>out.ingress_rule
            cache_put(cache, &key, table.generation, &value)
        if out.allow and error:
            out.reason = R_RELATED
            out.audited = R_NONE
        elif out.allow and path.reply and out.reason != R_AUDIT:
            out.reason = R_REPLY
    if error:
        # conntrack files an error under the flow it quotes: a bit would open a flow nobody judged.
        out.bits = 0


cdef void judge_bytes(const table_t *table, worker_t *worker, const uint8_t *data, size_t captured,
                      size_t wire, const path_t *path, packet_t *packet, verdict_t *out) noexcept nogil:
    cdef reason_t bad = decode(data, captured, wire, packet)
    clear(out)
    if bad != R_NONE:
        deny(out, <uint8_t>bad, DIR_NONE)
    elif table == NULL:
        deny(out, R_NO_TABLE, DIR_NONE)
    else:
        judge_packet(table, worker, packet, path, out)


cdef void judge_flow(const table_t *table, const flow_t *flow, verdict_t *out) noexcept nogil:
    clear(out)
    if table == NULL:
        deny(out, R_NO_TABLE, DIR_NONE)
        return
    out.egress_pod = table_pod_by_address(table, flow.family, &flow.src)
    out.ingress_pod = table_pod_by_address(table, flow.family, &flow.dst)
    if is_same_pod(table, flow, out):
        exempt(table, R_SAME_POD, out)
    elif out.egress_pod >= 0 and table.pods[out.egress_pod].flags & POD_BRANCH and (
            table_is_own_node(table, flow.family, &flow.dst)):
        exempt(table, R_OWN_NODE, out)
    elif out.egress_pod < 0 and out.ingress_pod >= 0 and table.pods[out.ingress_pod].flags & POD_BRANCH and (
            table_is_own_node(table, flow.family, &flow.src)):
        exempt(table, R_OWN_NODE, out)
    else:
        judge_ends(table, flow, out)


# ---- a worker ----------------------------------------------------------------------------------

cdef void worker_enter(worker_t *worker) noexcept nogil:
    cdef table_t *table
    # Announce first, look again after: a publisher that had not seen the announcement when it
    # looked for readers has changed `current` before, and then we see that.
    while True:
        table = get_table(worker.current)
        set_table(&worker.hazard, table)
        if get_table(worker.current) == table:
            break
    worker.table = table
    worker.tally = table.tallies[worker.lane] if table != NULL and not worker.observer else NULL


cdef void worker_leave(worker_t *worker) noexcept nogil:
    worker.table = NULL
    worker.tally = NULL
    set_table(&worker.hazard, NULL)


cdef void record(worker_t *worker, const packet_t *packet, const path_t *path, const verdict_t *verdict,
                 const uint8_t *data, size_t captured, bint keep) noexcept nogil:
    cdef uint64_t head = worker.ring_head
    cdef event_t *event
    cdef uint8_t *kept
    if worker.ring == NULL:
        return
    if head - get_u64(&worker.ring_tail) > worker.ring_mask:
        set_u64(&worker.ring_lost, worker.ring_lost + 1)
        return
    event = &worker.ring[head & worker.ring_mask]
    event.when_ns = realtime()
    event.packet = packet[0]
    event.path = path[0]
    event.verdict = verdict[0]
    event.generation = worker.table.generation if worker.table != NULL else 0
    event.kept = 0
    kept = get_bytes(&worker.kept) if keep else NULL
    if kept != NULL and captured:
        event.kept = <uint32_t>captured if captured < EVENT_BYTES else <uint32_t>EVENT_BYTES
        memcpy(kept + (head & worker.ring_mask) * EVENT_BYTES, data, event.kept)
    set_u64(&worker.ring_head, head + 1)


cdef inline void count_end(worker_t *worker, int32_t pod, size_t side, uint8_t reason,
                           int32_t rule) noexcept nogil:
    cdef size_t place
    if pod < 0:
        return
    place = 2 * <size_t>pod + side
    if reason == R_POLICY_RULE and rule >= 0:
        worker.tally[place * TALLY_OUTCOMES + TALLY_ALLOWED] += 1
        worker.tally[worker.table.rule_tallies[place] + <size_t>rule] += 1
    elif reason == R_NO_RULE or reason == R_AUDIT:
        worker.tally[place * TALLY_OUTCOMES + TALLY_NO_RULE] += 1
    elif reason == R_SPOOFED:
        worker.tally[place * TALLY_OUTCOMES + TALLY_SPOOFED] += 1
    elif reason == R_NO_TABLE:
        worker.tally[place * TALLY_OUTCOMES + TALLY_NO_TABLE] += 1


# Denials at the end that decided; what rules allowed, at every end that was asked.
cdef void count_ends(worker_t *worker, const verdict_t *out) noexcept nogil:
    if out.reason == R_RELATED:
        return                    # judged by the rules of another packet's flow
    if out.allow or out.direction == DIR_EGRESS:
        count_end(worker, out.egress_pod, SIDE_EGRESS, out.egress_reason, out.egress_rule)
    if out.allow or out.direction == DIR_INGRESS:
        count_end(worker, out.ingress_pod, SIDE_INGRESS, out.ingress_reason, out.ingress_rule)


# Counts a verdict, and records it where somebody asks for that.
cdef inline void account(worker_t *worker, const packet_t *packet, const uint8_t *data, size_t captured,
                         size_t wire, const path_t *path, const verdict_t *out) noexcept nogil:
    cdef uint32_t capture
    worker.packets[out.allow][out.direction][out.reason] += 1
    worker.bytes[out.allow][out.direction][out.reason] += wire
    # A flow that is allowed and known costs nothing here.
    if worker.tally != NULL and not (out.allow and out.cached):
        count_ends(worker, out)
    capture = get_u32(&worker.capture)
    if capture and is_captured(capture & CAPTURE_LEVEL, out):
        record(worker, packet, path, out, data, captured, capture & CAPTURE_BYTES != 0)


cdef inline void let_through_in_audit(const worker_t *worker, verdict_t *out) noexcept nogil:
    if worker.audit and not out.allow:
        out.audited = out.reason
        out.reason = R_AUDIT
        out.allow = 1


cdef void worker_judge(worker_t *worker, const uint8_t *data, size_t captured, size_t wire,
                       const path_t *path, verdict_t *out) noexcept nogil:
    cdef packet_t packet
    judge_bytes(worker.table, worker, data, captured, wire, path, &packet, out)
    if worker.observer:
        out.allow = 1
        out.bits = 0
    else:
        let_through_in_audit(worker, out)
    account(worker, &packet, data, captured, wire, path, out)


cdef bint is_answered(worker_t *worker, const verdict_t *verdict) noexcept nogil:
    return not verdict.allow and verdict.reason == R_NO_RULE and get_u32(&worker.reject) != 0


# ---- Python faces ------------------------------------------------------------------------------

cdef tuple REASONS = tuple(Reason)
cdef tuple DIRECTIONS = (None, Direction.INGRESS, Direction.EGRESS)


cdef object end_to_python(object pods, int32_t pod, uint8_t reason, int32_t rule):
    return End(pods[pod] if pods is not None and pod >= 0 else None, REASONS[reason], rule)


cdef object verdict_to_python(const verdict_t *verdict, object pods):
    return Verdict(
        verdict.allow != 0, REASONS[verdict.reason], DIRECTIONS[verdict.direction], verdict.bits,
        verdict.cached != 0,
        end_to_python(pods, verdict.egress_pod, verdict.egress_reason, verdict.egress_rule),
        end_to_python(pods, verdict.ingress_pod, verdict.ingress_reason, verdict.ingress_rule),
        REASONS[verdict.audited],
    )


cdef bint read_path(path_t *path, indev, outdev, hook, reply) except False:
    if hook not in (HOOK_LOCAL_IN, HOOK_FORWARD):
        raise ValueError(f"hook is {hook!r}, must be 1 (LOCAL_IN) or 2 (FORWARD)")
    memset(path, 0, sizeof(path_t))
    path.indev = indev
    path.outdev = outdev
    path.hook = hook
    path.reply = bool(reply)
    return True


cdef size_t wire_length(bytes packet, object wire) except? 0:
    if wire is None:
        return <size_t>len(packet)
    if wire < len(packet):
        raise ValueError(f"wire is {wire}, shorter than the {len(packet)} bytes captured")
    return wire


def judge(RuleTable table, bytes packet not None, *, indev=0, outdev=0, hook=2, reply=False, wire=None):
    """The verdict of `table` (None: there is none) for one IP packet: no cache, no counters.

    `indev` and `outdev` are interface indices (0 unknown), `hook` 1 for LOCAL_IN or 2 for FORWARD,
    `reply` whether conntrack says REPLY, `wire` the packet's length when only a part was captured.
    """
    cdef path_t path
    cdef packet_t decoded
    cdef verdict_t verdict
    cdef const uint8_t *data = packet
    read_path(&path, indev, outdev, hook, reply)
    judge_bytes(&table.c if table is not None else NULL, NULL, data, <size_t>len(packet),
                wire_length(packet, wire), &path, &decoded, &verdict)
    return verdict_to_python(&verdict, table.pods if table is not None else None)


cdef bint has_ports(int protocol) noexcept:
    return protocol == 6 or protocol == 17 or protocol == 33 or protocol == 132 or protocol == 136


# `judge_flow` is the C function's name.
def _judge_flow(RuleTable table, bytes src not None, bytes dst not None, protocol, sport, dport):
    """The verdict for a live flow known by its addresses alone, as its originator's packets have it.

    For protocols without ports `sport` and `dport` mean nothing. ValueError when the families differ.
    """
    cdef flow_t flow
    cdef verdict_t verdict
    if len(src) != len(dst):
        raise ValueError("src and dst must be of one family")
    memset(&flow, 0, sizeof(flow_t))
    unpack_address(src, &flow.src)
    unpack_address(dst, &flow.dst)
    flow.family = 4 if len(src) == 4 else 6
    flow.protocol = protocol
    flow.sport = sport
    flow.dport = dport
    flow.has_ports = has_ports(protocol)
    judge_flow(&table.c if table is not None else NULL, &flow, &verdict)
    return verdict_to_python(&verdict, table.pods if table is not None else None)


globals()["judge_flow"] = _judge_flow


@cython.final
cdef class Publisher:
    """Holds the table in force. `publish` may be called from one thread at a time, with the GIL.

    `on_retired` is called with every table that no worker can count in any more.
    """

    def __cinit__(self):
        self._tables = []
        self._workers = []
        self._recent = OrderedDict()

    def publish(self, RuleTable table):
        """Put a table in force; None: there is none. Packets judged from now on meet it.

        The old one is freed once no worker announces it any more (`quiesced`). ValueError when the
        table's generation is not above those before: flow caches tell tables apart by it.
        """
        if table is not None:
            if table is not self.table:
                if table.c.generation <= self._newest:
                    raise ValueError(
                        f"generation {table.c.generation} is not above {self._newest}, published before")
                self.open_lanes(table)
                self._tables.append(table)
                self._newest = table.c.generation
                self._recent[table.c.generation] = table.pods
                while len(self._recent) > RECENT_TABLES:
                    self._recent.popitem(last=False)
            set_table(&self.current, &table.c)
        else:
            set_table(&self.current, NULL)
        self.drop_unseen()

    @property
    def table(self):
        """The table in force, or None."""
        cdef table_t *current = get_table(&self.current)
        for table in self._tables:
            if &(<RuleTable>table).c == current:
                return table
        return None

    def pods(self, generation):
        """The pods of a recent table by pod index, None when it is no longer known."""
        return self._recent.get(generation)

    cdef bint open_lanes(self, RuleTable table) except False:
        for reference in self._workers:
            worker = reference()
            if worker is not None:
                table.open_lane((<Worker>worker).c.lane)
        return True

    cdef bint drop_unseen(self) except False:
        cdef table_t *current = get_table(&self.current)
        cdef table_t *seen
        cdef list keep = []
        cdef list retired = []
        cdef set announced = set()
        cdef list alive = []
        for reference in self._workers:
            worker = reference()
            if worker is not None:
                alive.append(reference)
                announced.add(<size_t>get_table(&(<Worker>worker).c.hazard))
        self._workers = alive
        for table in self._tables:
            seen = &(<RuleTable>table).c
            if seen == current or <size_t>seen in announced:
                keep.append(table)
            else:
                retired.append(table)
        self._tables = keep
        if self.on_retired is not None:
            for table in retired:
                self.on_retired(table)
        return True

    def quiesced(self):
        """Whether no worker still judges by an older table than the one in force. Frees those."""
        self.drop_unseen()
        return len(self._tables) <= (1 if get_table(&self.current) != NULL else 0)

    @property
    def held(self):
        """How many tables are in memory: the one in force, and those that workers still announce."""
        return len(self._tables)


@cython.final
cdef class Worker:
    """What one queue thread judges with: its flow cache, counters and event ring.

    `cache_entries` 0: no cache. `ring_entries` 0: no events; else rounded up to a power of two.
    `seed` keys the cache's hash, random by default. An `observer` lets every packet pass, whatever the
    rules say of it, and counts for no pod and no policy: for packets that nobody has to judge. `audit`:
    deny nothing; what would be denied has the reason `audit`. Not for several threads at once, but for
    `events`, `counters`, `capture`, `keep_bytes` and `reject`, which one other thread may use.
    """

    def __cinit__(self, Publisher publisher not None, *, cache_entries=65536, ring_entries=0, seed=None,
                  bint observer=False, bint audit=False):
        cdef uint64_t slots = 1
        memset(&self.c, 0, sizeof(worker_t))
        self.c.audit = audit
        if not 0 <= cache_entries <= 1 << 28:
            raise ValueError(f"cache_entries is {cache_entries}, must be 0 to 2**28")
        if not 0 <= ring_entries <= RING_MAX:
            raise ValueError(f"ring_entries is {ring_entries}, must be 0 to {RING_MAX}")
        if seed is None:
            seed = int.from_bytes(os.urandom(8), "little")
        if cache_entries:
            self.c.cache = cache_new(cache_entries, <uint64_t>(seed & 0xFFFFFFFFFFFFFFFF))
            if self.c.cache == NULL:
                raise MemoryError
        if ring_entries:
            while slots < ring_entries:
                slots *= 2
            self.c.ring = <event_t *>calloc(slots, sizeof(event_t))
            if self.c.ring == NULL:
                raise MemoryError
            self.c.ring_mask = <uint32_t>(slots - 1)
        self.c.observer = observer
        self.publisher = publisher
        self.c.current = &publisher.current
        taken = {(<Worker>other).c.lane for other in (known() for known in publisher._workers)
                 if other is not None}
        while self.c.lane in taken:
            self.c.lane += 1
        if self.c.lane >= MAX_LANES:
            raise ValueError(f"a publisher has at most {MAX_LANES} workers")
        for table in publisher._tables:
            (<RuleTable>table).open_lane(self.c.lane)
        publisher._workers.append(weakref.ref(self))

    def __dealloc__(self):
        cache_free(self.c.cache)
        free(self.c.ring)
        free(self.c.kept)

    def judge(self, bytes packet not None, *, indev=0, outdev=0, hook=2, reply=False, wire=None):
        """The verdict for one IP packet as a queue thread would give it: cached, counted, recorded.

        Arguments as for `judge` of this module.
        """
        cdef path_t path
        cdef verdict_t verdict
        cdef const uint8_t *data = packet
        cdef size_t length = wire_length(packet, wire)
        read_path(&path, indev, outdev, hook, reply)
        worker_enter(&self.c)
        pods = self.publisher._recent.get(self.c.table.generation) if self.c.table != NULL else None
        worker_judge(&self.c, data, <size_t>len(packet), length, &path, &verdict)
        worker_leave(&self.c)
        return verdict_to_python(&verdict, pods)

    def propose(self, bytes packet not None, *, indev=0, outdev=0, hook=2, reply=False, wire=None):
        """What `judge` would answer, as an `Event` with the whole packet: nothing is counted or recorded."""
        cdef path_t path
        cdef event_t event
        cdef const uint8_t *data = packet
        cdef size_t length = wire_length(packet, wire)
        read_path(&path, indev, outdev, hook, reply)
        worker_enter(&self.c)
        judge_bytes(self.c.table, NULL, data, <size_t>len(packet), length, &path, &event.packet,
                    &event.verdict)
        let_through_in_audit(&self.c, &event.verdict)
        return finished(self, &event, &path, packet)

    def override(self, bytes packet not None, allow, *, indev=0, outdev=0, hook=2, reply=False, wire=None):
        """A user's hook has decided: its verdict as an `Event`, counted and recorded with the reason `hook`.

        Of each end it says what the rules do; no pod and no policy is counted. In audit a packet that
        was to be dropped passes. A packet that cannot be parsed: ValueError.
        """
        cdef path_t path
        cdef event_t event
        cdef verdict_t *out = &event.verdict
        cdef const uint8_t *data = packet
        cdef size_t length = wire_length(packet, wire)
        read_path(&path, indev, outdev, hook, reply)
        worker_enter(&self.c)
        judge_bytes(self.c.table, NULL, data, <size_t>len(packet), length, &path, &event.packet, out)
        if out.reason == Reason.MALFORMED or out.reason == Reason.FRAGMENT:
            worker_leave(&self.c)
            raise ValueError("a packet that cannot be parsed is no hook's")
        out.allow = bool(allow)
        out.reason = R_HOOK
        out.direction = DIR_NONE
        out.bits = 0
        out.audited = R_NONE
        let_through_in_audit(&self.c, out)
        self.c.tally = NULL           # until worker_enter: no policy has decided
        account(&self.c, &event.packet, data, <size_t>len(packet), length, &path, out)
        return finished(self, &event, &path, packet)

    def enter(self):
        """Begin a burst: the table in force now is used until `leave`. For tests."""
        worker_enter(&self.c)

    def leave(self):
        """End a burst."""
        worker_leave(&self.c)

    def counters(self):
        """{(allow, "ingress" | "egress" | "", reason): (packets, bytes)} since the worker began.

        Only what has been counted. The direction is that of the end that decided.
        """
        cdef int allow, direction, reason
        found = {}
        for allow in range(2):
            for direction in range(3):
                for reason in range(<int>R_COUNT):
                    if self.c.packets[allow][direction][reason]:
                        name = DIRECTIONS[direction]
                        found[(bool(allow), "" if name is None else name.value, REASONS[reason])] = (
                            self.c.packets[allow][direction][reason], self.c.bytes[allow][direction][reason])
        return found

    def cache_stats(self):
        """(hits, misses) of the flow cache. Packets that never get to it count as neither."""
        return self.c.cache_hits, self.c.cache_misses

    @property
    def reject(self):
        """Whether queue threads hand what policies deny to the kernel's rules that answer and drop it.

        Those rules must be in force before: the packet is accepted, with all three marks.
        """
        return get_u32(&self.c.reject) != 0

    @reject.setter
    def reject(self, value):
        set_u32(&self.c.reject, 1 if value else 0)

    @property
    def audit(self):
        """Whether nothing is denied."""
        return self.c.audit != 0

    @property
    def capture(self):
        """Which packets become events: 0 none, 1 denied, 2 denied and not cached, 3 all."""
        return get_u32(&self.c.capture) & CAPTURE_LEVEL

    @capture.setter
    def capture(self, value):
        if not CAPTURE_NONE <= value <= CAPTURE_ALL:
            raise ValueError(f"capture is {value}, must be 0 to {CAPTURE_ALL}")
        set_u32(&self.c.capture, <uint32_t>value | (get_u32(&self.c.capture) & CAPTURE_BYTES))

    @property
    def keep_bytes(self):
        """Whether events come with the beginning of their packet, 256 bytes at most.

        That takes 256 bytes for each entry of the ring, from the first time on.
        """
        return get_u32(&self.c.capture) & CAPTURE_BYTES != 0

    @keep_bytes.setter
    def keep_bytes(self, value):
        cdef uint8_t *kept
        if value and self.c.ring != NULL and get_bytes(&self.c.kept) == NULL:
            kept = <uint8_t *>calloc(<size_t>self.c.ring_mask + 1, EVENT_BYTES)
            if kept == NULL:
                raise MemoryError
            set_bytes(&self.c.kept, kept)
        set_u32(&self.c.capture, (get_u32(&self.c.capture) & CAPTURE_LEVEL) | (CAPTURE_BYTES if value else 0))

    @property
    def events_lost(self):
        """Events that found the ring full."""
        return get_u64(&self.c.ring_lost)

    def events(self, limit=1024):
        """Take up to `limit` events out of the ring, oldest first: a list of `Event`."""
        cdef uint64_t head = get_u64(&self.c.ring_head)
        cdef uint64_t tail = self.c.ring_tail
        cdef uint64_t most = limit
        cdef uint64_t slot
        cdef event_t *event
        cdef uint8_t *kept = get_bytes(&self.c.kept)
        found = []
        while tail != head and most:
            slot = tail & self.c.ring_mask
            event = &self.c.ring[slot]
            data = b""
            if event.kept and kept != NULL:
                data = (<const char *>kept + slot * EVENT_BYTES)[:event.kept]
            found.append(event_to_python(event, self.publisher, data))
            tail += 1
            most -= 1
            set_u64(&self.c.ring_tail, tail)
        return found

    def bench_judge(self, packets, *, rounds=1, burst=64):
        """A measuring aid: judge every packet `rounds` times in C. Returns nanoseconds per packet.

        `packets` is a list of (packet, indev, outdev, reply). They are laid out as a queue thread's
        receive buffers are: one behind the other, each on its own cache line. The table is taken
        anew every `burst` packets.
        """
        cdef size_t n = len(packets), i, at, size = 0
        cdef size_t *offsets = <size_t *>malloc((n + 1) * 2 * sizeof(size_t))
        cdef path_t *paths = <path_t *>malloc((n + 1) * sizeof(path_t))
        cdef uint8_t *block
        cdef const uint8_t *raw
        cdef verdict_t verdict
        cdef long turns = rounds, _
        cdef size_t per_burst = burst
        if not n or burst < 1:
            raise ValueError("nothing to judge")
        for packet, *_rest in packets:
            size += (len(packet) + 63) // 64 * 64
        block = <uint8_t *>malloc(size)
        if offsets == NULL or paths == NULL or block == NULL:
            raise MemoryError
        at = 0
        i = 0
        for packet, indev, outdev, reply in packets:
            raw = packet
            memcpy(block + at, raw, len(packet))
            offsets[2 * i] = at
            offsets[2 * i + 1] = len(packet)
            read_path(&paths[i], indev, outdev, HOOK_FORWARD, reply)
            at += (len(packet) + 63) // 64 * 64
            i += 1
        began = time.perf_counter_ns()
        with nogil:
            for _ in range(turns):
                for i in range(n):
                    if i % per_burst == 0:
                        worker_enter(&self.c)
                    worker_judge(&self.c, block + offsets[2 * i], offsets[2 * i + 1], offsets[2 * i + 1],
                                 &paths[i], &verdict)
                    if i % per_burst == per_burst - 1:
                        worker_leave(&self.c)
                worker_leave(&self.c)
        took = time.perf_counter_ns() - began
        free(block)
        free(offsets)
        free(paths)
        return took / (n * turns)


cdef uint64_t events_head(Worker worker):
    return get_u64(&worker.c.ring_head)


cdef bint events_took(Worker worker, uint64_t tail) except False:
    set_u64(&worker.c.ring_tail, tail)
    return True


# The event of a worker that has entered; it leaves.
cdef object finished(Worker worker, event_t *event, const path_t *path, bytes data):
    event.when_ns = realtime()
    event.path = path[0]
    event.generation = worker.c.table.generation if worker.c.table != NULL else 0
    worker_leave(&worker.c)
    return event_to_python(event, worker.publisher, data)


cdef object event_to_python(const event_t *event, Publisher publisher, bytes data):
    cdef const packet_t *p = &event.packet
    cdef uint8_t reason = event.verdict.audited if event.verdict.audited else event.verdict.reason
    cdef bint bad = reason == Reason.MALFORMED or reason == Reason.FRAGMENT
    pods = publisher._recent.get(event.generation)
    packet = Packet(
        REASONS[reason] if bad else Reason.NONE,
        flow_to_python(&p.flow),
        flow_to_python(&p.inner) if p.flags & PKT_ICMP_ERROR else None,
        p.length, p.l4_offset, p.hop_limit, p.tcp_flags, p.icmp_type, p.icmp_code,
        (p.flags & PKT_FIRST_FRAGMENT) != 0, (p.flags & PKT_ND) != 0,
    )
    return Event(event.when_ns, packet, event.path.indev, event.path.outdev, event.path.hook,
                 event.path.reply != 0, event.generation, pods is not None or event.generation == 0,
                 verdict_to_python(&event.verdict, pods), data)
