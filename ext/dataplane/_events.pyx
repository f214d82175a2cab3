# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: initializedcheck=False, auto_pickle=False
"""Taking events out of a worker's ring, and leaving out at once what no reader wants.

To Python an event is some twenty objects. On a busy node nearly all packets may be of no interest,
so what can be told from the event itself is told here, before any of them is made.
"""
cimport cython
from libc.stdint cimport uint8_t, uint32_t, uint64_t, int32_t

from dataplane._engine cimport (CAPTURE_ALL, EVENT_BYTES, Worker, event_t, event_to_python, events_head,
                                events_took, is_captured)
from dataplane._pcap cimport Filter, filter_matches

cdef enum:
    ROOM = 1 << 30                # nobody has said how much there is


@cython.final
cdef class EventFilter:
    """What an event must be to be wanted; more than that may be asked of it afterwards.

    `capture`: a capture level; `verdicts`: bit 0 denied, bit 1 allowed; `reasons` and `directions`: a
    bit for each number of `Reason` and of the engine's direction (0 none, 1 ingress, 2 egress);
    `packets`: what the packet must match; `pods`: a function from a table's pods to bytes, one for each
    pod, not 0 where a packet of that pod is wanted. An event about no pod known here is wanted whatever
    `pods` says. While `room` is 0 no event is made for it; those that were are counted in `missed`.
    """

    cdef public Py_ssize_t room
    cdef readonly uint64_t missed
    cdef uint32_t capture
    cdef uint32_t verdicts
    cdef uint64_t reasons
    cdef uint32_t directions
    cdef Filter packets
    cdef object pods
    cdef uint32_t generation      # that `marks` is of
    cdef bytes marks

    def __cinit__(self, *, capture=CAPTURE_ALL, verdicts=3, reasons=0xFFFFFFFFFFFFFFFF, directions=7,
                  Filter packets=None, pods=None):
        self.capture = capture
        self.verdicts = verdicts
        self.reasons = reasons
        self.directions = directions
        self.packets = packets
        self.pods = pods
        self.marks = None
        self.room = ROOM

    cdef bint look_up(self, uint32_t generation, object publisher) except False:
        pods = publisher.pods(generation)
        self.marks = bytes(self.pods(pods)) if pods is not None else None
        self.generation = generation
        return True

    cdef inline bint marked(self, int32_t pod):
        return pod >= 0 and pod < len(self.marks) and (<const uint8_t *>self.marks)[pod] != 0

    cdef bint wants(self, const event_t *event, const uint8_t *kept, object publisher) except -1:
        if not is_captured(self.capture, &event.verdict):
            return False
        if not self.verdicts >> (1 if event.verdict.allow else 0) & 1:
            return False
        if not self.reasons >> event.verdict.reason & 1:
            return False
        if not self.directions >> event.verdict.direction & 1:
            return False
        if self.pods is not None and (event.verdict.egress_pod >= 0 or event.verdict.ingress_pod >= 0):
            if self.generation != event.generation or self.marks is None:
                self.look_up(event.generation, publisher)
            # Of a table that nobody remembers any more the pods cannot be told.
            if self.marks is not None and not (self.marked(event.verdict.egress_pod)
                                               or self.marked(event.verdict.ingress_pod)):
                return False
        if self.packets is not None:
            return filter_matches(&self.packets.program, kept, event.kept if kept != NULL else 0,
                                  event.packet.length)
        return True


def take(Worker worker not None, limit, list filters not None):
    """Take events out of the ring, oldest first, until `limit` of them were wanted by one of `filters`.

    The wanted ones as a list of `Event`; the others are gone. One thread at a time.
    """
    cdef uint64_t head = events_head(worker)
    cdef uint64_t tail = worker.c.ring_tail
    cdef uint64_t slot
    cdef size_t most = limit
    cdef size_t n = 0
    cdef event_t *event
    cdef const uint8_t *kept
    cdef const uint8_t *bytes_of
    cdef EventFilter one
    cdef bint wanted
    publisher = worker.publisher
    found = []
    kept = worker.c.kept
    while tail != head and n < most:
        slot = tail & worker.c.ring_mask
        event = &worker.c.ring[slot]
        bytes_of = kept + slot * EVENT_BYTES if kept != NULL else NULL
        wanted = False
        for one in filters:
            if not one.wants(event, bytes_of, publisher):
                continue
            if one.room > 0:
                one.room -= 1
                wanted = True
            else:
                one.missed += 1
        if wanted:
            data = (<const char *>bytes_of)[:event.kept] if bytes_of != NULL and event.kept else b""
            found.append(event_to_python(event, publisher, data))
            n += 1
        tail += 1
        events_took(worker, tail)
    return found
