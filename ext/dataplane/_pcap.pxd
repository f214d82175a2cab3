# Captures and packet filters by libpcap: offline files, pcap or pcapng, and pcap-filter expressions.
# Whatever a file holds, reading it ends with records, an end or a message (pcap(3PCAP), savefile(5)).
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdio cimport FILE

cdef extern from "<pcap/pcap.h>" nogil:
    ctypedef struct pcap_t:
        pass
    struct bpf_program:
        pass

# One packet of a capture, from its network header on.
cdef struct record_t:
    uint64_t when_ns              # since the epoch; 0 where the file's time is none
    const uint8_t *data           # good until the next record is read
    uint32_t captured             # bytes at `data`
    uint32_t wire                 # bytes the packet had, at least `captured`
    uint32_t link                 # bytes of link header before `data`

cdef enum read_t:
    READ_FAILED = -1              # what is left cannot be read; Capture.error says why
    READ_END = 0
    READ_PACKET = 1               # an IP packet
    READ_OTHER = 2                # a frame that carries no IP, or is cut before its network header

# Reads one record. `out` is set for READ_PACKET only. One thread at a time.
cdef read_t capture_next(pcap_t *handle, int linktype, record_t *out) noexcept nogil

# Whether a packet of the program's link type matches. Any number of threads at a time.
cdef bint filter_matches(const bpf_program *program, const uint8_t *data, uint32_t captured,
                         uint32_t wire) noexcept nogil

cdef class Capture:
    cdef pcap_t *handle
    cdef readonly int linktype
    cdef readonly uint64_t packets
    cdef readonly uint64_t others
    cdef bint ended
    cdef str _error
    cdef object take(self, read_t how, const record_t *record)
    cdef bint finish(self) except False

cdef class Filter:
    cdef bpf_program program
    cdef bint compiled
    cdef readonly str expression
    cdef readonly int linktype
