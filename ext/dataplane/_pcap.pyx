# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: initializedcheck=False, auto_pickle=False
"""Captures and packet filters by libpcap. `_pcap.pxd` is the readable face; this is how."""
cimport cython
from libc.errno cimport errno
from libc.stdint cimport uint16_t
from libc.stdio cimport fclose, fdopen
from libc.string cimport memset
from posix.unistd cimport close, dup

import os

cdef extern from "<pcap/pcap.h>" nogil:
    enum:
        PCAP_ERRBUF_SIZE
        PCAP_TSTAMP_PRECISION_NANO
        PCAP_NETMASK_UNKNOWN
        DLT_NULL
        DLT_EN10MB
        DLT_RAW
        DLT_LOOP
        DLT_LINUX_SLL
        DLT_LINUX_SLL2
        DLT_IPV4
        DLT_IPV6
    struct timeval:
        long tv_sec
        long tv_usec
    struct pcap_pkthdr:
        timeval ts
        uint32_t caplen
        uint32_t len
    pcap_t *pcap_fopen_offline_with_tstamp_precision(FILE *file, unsigned int precision, char *problem)
    pcap_t *pcap_open_dead(int linktype, int snaplen)
    void pcap_close(pcap_t *handle)
    int pcap_datalink(pcap_t *handle)
    int pcap_next_ex(pcap_t *handle, pcap_pkthdr **header, const uint8_t **data)
    char *pcap_geterr(pcap_t *handle)
    const char *pcap_datalink_val_to_description(int linktype)
    int pcap_compile(pcap_t *handle, bpf_program *program, const char *expression, int optimize,
                     uint32_t netmask)
    void pcap_freecode(bpf_program *program)
    int pcap_offline_filter(const bpf_program *program, const pcap_pkthdr *header, const uint8_t *data)

cdef enum:
    ETHER_IPV4 = 0x0800
    ETHER_IPV6 = 0x86DD
    ETHER_VLAN = 0x8100
    ETHER_SERVICE_VLAN = 0x88A8
    ETHER_OLD_SERVICE_VLAN = 0x9100
    ARPHRD_NETLINK = 824          # its protocol field names a netlink family (LINKTYPE_LINUX_SLL)
    MAX_TAGS = 4
    SNAPLEN = 262144              # the longest packet that libpcap reads from a file
    LAST_SECOND = 18446744072     # before 2**64 nanoseconds: the year 2554

RAW_IP = DLT_RAW
DESCRIPTIONS = {
    DLT_EN10MB: "Ethernet",
    DLT_LINUX_SLL: "Linux cooked",
    DLT_LINUX_SLL2: "Linux cooked v2",
    DLT_RAW: "raw IP",
    DLT_IPV4: "raw IPv4",
    DLT_IPV6: "raw IPv6",
    DLT_NULL: "BSD loopback",
    DLT_LOOP: "OpenBSD loopback",
}


cdef inline uint16_t be16(const uint8_t *p) noexcept nogil:
    return <uint16_t>((<uint32_t>p[0] << 8) | p[1])


# AF_INET and the numbers of AF_INET6 in the systems that write such captures (LINKTYPE_NULL).
cdef inline bint is_ip_family(uint32_t family) noexcept nogil:
    return family == 2 or family == 10 or family == 24 or family == 28 or family == 30


# Where the network header begins, or -1: no IP, or cut before it. Offsets: the link types' pages of
# tcpdump.org, and IEEE 802.1Q for tags.
cdef int network_offset(int linktype, const uint8_t *data, uint32_t captured) noexcept nogil:
    cdef uint32_t at
    cdef uint16_t kind
    cdef int _
    if linktype == DLT_RAW or linktype == DLT_IPV4 or linktype == DLT_IPV6:
        return 0 if captured else -1
    if linktype == DLT_NULL or linktype == DLT_LOOP:
        # In the byte order of whoever wrote it.
        if captured < 5 or not (is_ip_family(<uint32_t>be16(data) << 16 | be16(data + 2))
                                or is_ip_family(<uint32_t>data[3] << 24 | <uint32_t>data[2] << 16
                                                | <uint32_t>data[1] << 8 | data[0])):
            return -1
        return 4
    if linktype == DLT_EN10MB:
        at = 14
        if captured <= at:
            return -1
        kind = be16(data + 12)
    elif linktype == DLT_LINUX_SLL:
        at = 16
        if captured <= at or be16(data + 2) == ARPHRD_NETLINK:
            return -1
        kind = be16(data + 14)
    elif linktype == DLT_LINUX_SLL2:
        at = 20
        if captured <= at or be16(data + 8) == ARPHRD_NETLINK:
            return -1
        kind = be16(data)
    else:
        return -1
    for _ in range(MAX_TAGS):
        if kind == ETHER_IPV4 or kind == ETHER_IPV6:
            return <int>at
        if kind != ETHER_VLAN and kind != ETHER_SERVICE_VLAN and kind != ETHER_OLD_SERVICE_VLAN:
            return -1
        if captured <= at + 4:
            return -1
        kind = be16(data + at + 2)
        at += 4
    return -1


cdef read_t capture_next(pcap_t *handle, int linktype, record_t *out) noexcept nogil:
    cdef pcap_pkthdr *header
    cdef const uint8_t *data
    cdef int how = pcap_next_ex(handle, &header, &data)
    cdef int offset
    if how == -2:
        return READ_END
    if how != 1:
        return READ_FAILED
    offset = network_offset(linktype, data, header.caplen)
    if offset < 0:
        return READ_OTHER
    # With PRECISION_NANO tv_usec holds nanoseconds.
    if 0 <= header.ts.tv_usec < 1000000000 and <uint64_t>header.ts.tv_sec <= <uint64_t>LAST_SECOND:
        out.when_ns = <uint64_t>header.ts.tv_sec * 1000000000u + <uint64_t>header.ts.tv_usec
    else:
        out.when_ns = 0
    out.data = data + offset
    out.link = <uint32_t>offset
    out.captured = header.caplen - <uint32_t>offset
    out.wire = header.len - <uint32_t>offset if header.len > header.caplen else out.captured
    return READ_PACKET


cdef bint filter_matches(const bpf_program *program, const uint8_t *data, uint32_t captured,
                         uint32_t wire) noexcept nogil:
    cdef pcap_pkthdr header
    memset(&header, 0, sizeof(header))
    header.caplen = captured
    header.len = wire
    return pcap_offline_filter(program, &header, data) != 0


cdef str text(const char *message):
    return (<bytes>message).decode("utf-8", "replace").strip()


@cython.final
cdef class Capture:
    """A capture file, pcap or pcapng, read from its beginning: iterate for its IP packets.

    `file` has a `fileno()`, which may be a pipe's; the caller may close it at once. Yields (when,
    packet, wire): nanoseconds since the epoch (0 where the file's time is none), the bytes captured
    from the network header on, and the length the packet had. Link types: Ethernet with or without
    VLAN tags, Linux cooked v1 and v2, raw IP, loopback. Frames that carry no IP are passed over and
    counted in `others`.

    A file that ends early, or goes on with what cannot be read, ends the iteration; `error` then says
    why. ValueError, with libpcap's words, for what is no capture, and for another link type.
    """

    def __cinit__(self, file not None):
        cdef char problem[PCAP_ERRBUF_SIZE + 1]
        cdef int number = dup(file.fileno())
        cdef FILE *stream
        cdef const char *described
        if number < 0:
            raise OSError(errno, os.strerror(errno))
        stream = fdopen(number, "rb")
        if stream == NULL:
            close(number)
            raise MemoryError
        memset(problem, 0, sizeof(problem))
        with nogil:
            self.handle = pcap_fopen_offline_with_tstamp_precision(
                stream, PCAP_TSTAMP_PRECISION_NANO, problem)
        if self.handle == NULL:
            fclose(stream)
            raise ValueError(text(problem))
        self.linktype = pcap_datalink(self.handle)
        if self.linktype not in DESCRIPTIONS:
            described = pcap_datalink_val_to_description(self.linktype)
            name = text(described) if described != NULL else "unknown"
            raise ValueError(f"link type {self.linktype} ({name}) is none of "
                             + ", ".join(DESCRIPTIONS.values()))

    def __dealloc__(self):
        if self.handle != NULL:
            pcap_close(self.handle)

    @property
    def link(self):
        """The link type in words: `Ethernet`, `Linux cooked` …"""
        return DESCRIPTIONS[self.linktype]

    @property
    def error(self):
        """Why reading ended before the file did, in libpcap's words; None: it did not."""
        return self._error

    # Ends reading after READ_FAILED.
    cdef bint finish(self) except False:
        self.ended = True
        self._error = text(pcap_geterr(self.handle))
        return True

    cdef object take(self, read_t how, const record_t *record):
        if how == READ_PACKET:
            self.packets += 1
            return record.when_ns, (<const char *>record.data)[:record.captured], record.wire
        self.ended = True
        if how == READ_FAILED:
            self.finish()
        return None

    def __iter__(self):
        return self

    def __next__(self):
        cdef record_t record
        cdef read_t how = READ_END
        if self.ended:
            raise StopIteration
        with nogil:
            while True:
                how = capture_next(self.handle, self.linktype, &record)
                if how != READ_OTHER:
                    break
                self.others += 1
        found = self.take(how, &record)
        if found is None:
            raise StopIteration
        return found


@cython.final
cdef class Filter:
    """A pcap-filter expression (pcap-filter(7)), compiled for packets of a link type: by default raw IP.

    The empty expression matches everything. A host name in it is looked up when it is compiled, which
    may take as long as the name servers take; the GIL is free meanwhile. ValueError, with libpcap's
    words, for what is no such expression.
    """

    def __cinit__(self, str expression not None, *, int linktype=RAW_IP):
        cdef bytes raw = expression.encode()
        cdef const char *words = raw
        cdef pcap_t *handle
        cdef int failed
        if b"\0" in raw:
            raise ValueError("a zero byte in the expression")
        handle = pcap_open_dead(linktype, SNAPLEN)
        if handle == NULL:
            raise MemoryError
        memset(&self.program, 0, sizeof(bpf_program))
        with nogil:
            failed = pcap_compile(handle, &self.program, words, 1, PCAP_NETMASK_UNKNOWN)
        problem = text(pcap_geterr(handle)) if failed else ""
        pcap_close(handle)
        if failed:
            raise ValueError(problem)
        self.compiled = True
        self.expression = expression
        self.linktype = linktype

    def __dealloc__(self):
        if self.compiled:
            pcap_freecode(&self.program)

    def __repr__(self):
        return f"Filter({self.expression!r})"

    def matches(self, bytes packet not None, *, wire=None):
        """Whether a packet matches, from its link header on (raw IP: the IP header).

        `wire`: the length it had, where only a part was captured.
        """
        cdef const uint8_t *data = packet
        cdef uint32_t captured = <uint32_t>len(packet)
        cdef uint32_t length = captured if wire is None else wire
        if length < captured:
            raise ValueError(f"wire is {length}, shorter than the {captured} bytes captured")
        return bool(filter_matches(&self.program, data, captured, length))
