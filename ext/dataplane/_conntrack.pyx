# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The kernel's conntrack table as the list of live flows: read it, judge it again, take bits back.

Theory of operation. A sweep dumps the flows that carry one of our two bits (the kernel filters by
mark), judges each as FORWARD sees its originator's packets, and takes both bits of a denied flow
back with an update that carries only the tuple, mark 0 and our mask: every other bit stays, and the
flow's next packet, from either side, is queued again.

A dump walks every bucket of the kernel's hash table, which takes 8 ms for its usual 262,144 even
when they are empty, and about 2 µs for each flow it tells. So a table with few flows is dumped once,
whole. Else two filtered dumps, because the kernel's filter is one value under one mask: flows with I
alone first, then those with E. Bits are only ever added while a sweep runs (by verdicts of the table
already in force), so a flow whose I bit is joined by E between the dumps is still met by the second;
the other order would miss it.

The kernel deletes or reuses entries while we read. An update for a flow that is gone is ENOENT; one
that meets a newer flow with the same tuple only has it judged once more.
"""

import errno as errno_module
import os

cimport cython
from libc.errno cimport errno, EAGAIN, EBADMSG, EINTR, ENOBUFS, ENOENT
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t, int32_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset
from posix.unistd cimport close

from dataplane._engine cimport judge_flow, verdict_t
from dataplane._reasons cimport R_AUDIT
from dataplane._netlink cimport (
    AF_NETLINK, connect, get_u16, get_u32, htonl, MSG_DONTWAIT, NETLINK_CAP_ACK, NETLINK_NETFILTER,
    NETLINK_NO_ENOBUFS, NFGEN_HEADER, NFNETLINK_V0, NLA_TYPE_BITS, NLM_F_REQUEST, NLMSG_ERROR,
    NLMSG_HEADER, nlmsghdr_t, ntohl, ntohs, send, setsockopt, SO_RCVBUFFORCE, SOCK_CLOEXEC, SOCK_RAW,
    sockaddr, sockaddr_nl_t, socket, SOL_NETLINK, SOL_SOCKET,
)
from dataplane._packet cimport addr_t, flow_t
from dataplane._rules cimport RuleTable, table_t

from dataplane.errors import KernelError

cdef extern from *:
    """
    #include <endian.h>
    #include <linux/netfilter/nfnetlink_conntrack.h>

    #ifndef NLM_F_DUMP_INTR
    #define NLM_F_DUMP_INTR 16
    #endif

    static inline unsigned long long get_be64(const void *at) {
        unsigned long long v; memcpy(&v, at, 8); return be64toh(v);
    }
    """
    uint64_t get_be64(const void *at) noexcept nogil

    ssize_t recv(int fd, void *data, size_t length, int flags) noexcept nogil

    enum:
        NLM_F_DUMP, NLM_F_DUMP_INTR, NLMSG_DONE, NLMSG_OVERRUN
        NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_NEW, IPCTNL_MSG_CT_GET, IPCTNL_MSG_CT_DELETE
        CTA_TUPLE_ORIG, CTA_TUPLE_REPLY, CTA_STATUS, CTA_PROTOINFO, CTA_TIMEOUT, CTA_MARK
        CTA_COUNTERS_ORIG, CTA_COUNTERS_REPLY, CTA_ZONE, CTA_MARK_MASK
        CTA_TUPLE_IP, CTA_TUPLE_PROTO
        CTA_IP_V4_SRC, CTA_IP_V4_DST, CTA_IP_V6_SRC, CTA_IP_V6_DST
        CTA_PROTO_NUM, CTA_PROTO_SRC_PORT, CTA_PROTO_DST_PORT
        CTA_PROTO_ICMP_ID, CTA_PROTO_ICMP_TYPE, CTA_PROTO_ICMP_CODE
        CTA_PROTO_ICMPV6_ID, CTA_PROTO_ICMPV6_TYPE, CTA_PROTO_ICMPV6_CODE
        CTA_COUNTERS_PACKETS, CTA_COUNTERS_BYTES

cdef enum:
    NLA_NESTED = 0x8000
    READ_SIZE = 65536             # a dump fills at most 32 KiB per recv
    WRITE_SIZE = 32768            # several hundred updates per send
    TUPLE_MAX = 128               # a v6 tuple with its zone takes 96 bytes
    DUMP_TRIES = 8
    FEW_FLOWS = 4000

# One direction of an entry, as its attributes tell it.
cdef struct tuple_t:
    addr_t src
    addr_t dst
    uint16_t sport
    uint16_t dport
    uint16_t icmp_id
    uint8_t icmp_type
    uint8_t icmp_code
    uint8_t protocol
    uint8_t family                # 0: no addresses could be read
    uint8_t has_ports
    uint8_t has_icmp

cdef struct entry_t:
    tuple_t orig
    tuple_t reply
    const uint8_t *tuple          # the payload of CTA_TUPLE_ORIG, to send back as it came
    const uint8_t *protoinfo
    uint16_t tuple_size
    uint16_t protoinfo_size
    uint16_t zone                 # network order, as it came
    uint8_t has_zone
    uint8_t has_counters
    uint32_t mark
    uint32_t status
    uint32_t timeout
    uint64_t packets[2]
    uint64_t bytes[2]

cdef struct key_t:                # an address to look for
    addr_t address
    uint8_t family

cdef struct sweep_t:
    int dump_fd
    int update_fd
    int error                     # errno of the first update the kernel refused, 0: none
    uint32_t saved                # both bits
    uint32_t seq
    const table_t *table          # NULL: clear whatever the table says
    key_t *keys                   # sorted; NULL: every flow
    size_t n_keys
    uint64_t seen
    uint64_t cleared
    uint64_t audited              # of those: let through by an audit
    uint64_t gone
    uint8_t *read_buffer
    uint8_t *write_buffer
    size_t used


cdef bint next_attribute(const uint8_t **at, size_t *left, uint16_t *kind, const uint8_t **value,
                         uint16_t *size) noexcept nogil:
    """Step over one attribute; false at the end and at anything malformed."""
    cdef size_t length
    cdef size_t step
    if left[0] < 4:
        return False
    length = get_u16(at[0])
    if length < 4 or length > left[0]:
        return False
    kind[0] = get_u16(at[0] + 2) & NLA_TYPE_BITS
    value[0] = at[0] + 4
    size[0] = <uint16_t> (length - 4)
    step = (length + 3) & ~<size_t> 3
    if step > left[0]:
        step = left[0]
    at[0] += step
    left[0] -= step
    return True


cdef void read_address(const uint8_t *value, bint six, addr_t *out) noexcept nogil:
    if six:
        out.high = get_be64(value)
        out.low = get_be64(value + 8)
    else:
        out.high = 0
        out.low = ntohl(get_u32(value))


cdef void read_tuple(const uint8_t *at, size_t left, tuple_t *out) noexcept nogil:
    cdef uint16_t kind = 0
    cdef uint16_t size = 0
    cdef const uint8_t *value = NULL
    cdef const uint8_t *inner
    cdef size_t inner_left
    cdef uint16_t outer
    cdef int seen = 0
    while next_attribute(&at, &left, &kind, &value, &size):
        outer = kind
        inner = value
        inner_left = size
        while next_attribute(&inner, &inner_left, &kind, &value, &size):
            if outer == CTA_TUPLE_IP:
                if kind == CTA_IP_V4_SRC and size == 4:
                    read_address(value, False, &out.src)
                    seen |= 1
                elif kind == CTA_IP_V4_DST and size == 4:
                    read_address(value, False, &out.dst)
                    seen |= 2
                elif kind == CTA_IP_V6_SRC and size == 16:
                    read_address(value, True, &out.src)
                    seen |= 4
                elif kind == CTA_IP_V6_DST and size == 16:
                    read_address(value, True, &out.dst)
                    seen |= 8
            elif outer == CTA_TUPLE_PROTO:
                if kind == CTA_PROTO_NUM and size >= 1:
                    out.protocol = value[0]
                elif kind == CTA_PROTO_SRC_PORT and size >= 2:
                    out.sport = ntohs(get_u16(value))
                    out.has_ports = 1
                elif kind == CTA_PROTO_DST_PORT and size >= 2:
                    out.dport = ntohs(get_u16(value))
                    out.has_ports = 1
                elif (kind == CTA_PROTO_ICMP_ID or kind == CTA_PROTO_ICMPV6_ID) and size >= 2:
                    out.icmp_id = ntohs(get_u16(value))
                    out.has_icmp = 1
                elif (kind == CTA_PROTO_ICMP_TYPE or kind == CTA_PROTO_ICMPV6_TYPE) and size >= 1:
                    out.icmp_type = value[0]
                    out.has_icmp = 1
                elif (kind == CTA_PROTO_ICMP_CODE or kind == CTA_PROTO_ICMPV6_CODE) and size >= 1:
                    out.icmp_code = value[0]
                    out.has_icmp = 1
    if seen == 3:
        out.family = 4
    elif seen == 12:
        out.family = 6
    # Anything else stays 0: half a tuple must never look like an address of zeros.


cdef void read_counters(const uint8_t *at, size_t left, uint64_t *packets, uint64_t *octets) noexcept nogil:
    cdef uint16_t kind = 0
    cdef uint16_t size = 0
    cdef const uint8_t *value = NULL
    while next_attribute(&at, &left, &kind, &value, &size):
        if size == 8 and kind == CTA_COUNTERS_PACKETS:
            packets[0] = get_be64(value)
        elif size == 8 and kind == CTA_COUNTERS_BYTES:
            octets[0] = get_be64(value)


cdef void read_entry(const uint8_t *at, size_t left, entry_t *out) noexcept nogil:
    """The attributes of one entry. What is missing or malformed stays 0."""
    cdef uint16_t kind = 0
    cdef uint16_t size = 0
    cdef const uint8_t *value = NULL
    memset(out, 0, sizeof(entry_t))
    while next_attribute(&at, &left, &kind, &value, &size):
        if kind == CTA_TUPLE_ORIG:
            out.tuple = value
            out.tuple_size = size
            read_tuple(value, size, &out.orig)
        elif kind == CTA_TUPLE_REPLY:
            read_tuple(value, size, &out.reply)
        elif kind == CTA_MARK and size >= 4:
            out.mark = ntohl(get_u32(value))
        elif kind == CTA_STATUS and size >= 4:
            out.status = ntohl(get_u32(value))
        elif kind == CTA_TIMEOUT and size >= 4:
            out.timeout = ntohl(get_u32(value))
        elif kind == CTA_ZONE and size >= 2:
            out.zone = get_u16(value)
            out.has_zone = 1
        elif kind == CTA_PROTOINFO:
            out.protoinfo = value
            out.protoinfo_size = size
        elif kind == CTA_COUNTERS_ORIG:
            read_counters(value, size, &out.packets[0], &out.bytes[0])
            out.has_counters = 1
        elif kind == CTA_COUNTERS_REPLY:
            read_counters(value, size, &out.packets[1], &out.bytes[1])
            out.has_counters = 1


cdef bint forward_flow(const entry_t *entry, flow_t *out) noexcept nogil:
    """The flow as its originator's packets cross FORWARD: after destination, before source translation."""
    memset(out, 0, sizeof(flow_t))
    if not entry.orig.family or entry.orig.family != entry.reply.family:
        return False
    out.src = entry.orig.src
    out.dst = entry.reply.src
    out.family = entry.orig.family
    out.protocol = entry.orig.protocol
    # GRE and a few more have keys where others have ports; rules speak of ports of these only.
    if entry.orig.protocol in (6, 17, 132, 136, 33):
        if not entry.orig.has_ports or not entry.reply.has_ports:
            return False
        out.has_ports = 1
        out.sport = entry.orig.sport
        out.dport = entry.reply.sport
    elif entry.orig.has_icmp:
        out.sport = entry.orig.icmp_id
        out.dport = <uint16_t> (entry.orig.icmp_type << 8 | entry.orig.icmp_code)
    return True


cdef int compare(const key_t *key, uint8_t family, const addr_t *address) noexcept nogil:
    if key.family != family:
        return -1 if key.family < family else 1
    if key.address.high != address.high:
        return -1 if key.address.high < address.high else 1
    if key.address.low != address.low:
        return -1 if key.address.low < address.low else 1
    return 0


cdef bint listed(const sweep_t *s, uint8_t family, const addr_t *address) noexcept nogil:
    cdef size_t low = 0
    cdef size_t high = s.n_keys
    cdef size_t middle
    cdef int order
    while low < high:
        middle = (low + high) >> 1
        order = compare(&s.keys[middle], family, address)
        if order == 0:
            return True
        if order < 0:
            low = middle + 1
        else:
            high = middle
    return False


cdef size_t put_attribute(uint8_t *at, uint16_t kind, const void *value, uint16_t size) noexcept nogil:
    cdef uint16_t length = <uint16_t> (size + 4)
    cdef size_t padded = (<size_t> length + 3) & ~<size_t> 3
    memset(at, 0, padded)
    memcpy(at, &length, 2)
    memcpy(at + 2, &kind, 2)
    memcpy(at + 4, value, size)
    return padded


cdef size_t put_header(uint8_t *at, int kind, int flags, uint32_t seq, uint8_t family) noexcept nogil:
    cdef nlmsghdr_t header
    memset(&header, 0, sizeof(header))
    header.nlmsg_type = <uint16_t> (NFNL_SUBSYS_CTNETLINK << 8 | kind)
    header.nlmsg_flags = <uint16_t> flags
    header.nlmsg_seq = seq
    memcpy(at, &header, NLMSG_HEADER)
    at[16] = family               # AF_INET, AF_INET6, or 0 for both
    at[17] = NFNETLINK_V0
    at[18] = 0
    at[19] = 0
    return NLMSG_HEADER + NFGEN_HEADER


cdef void put_length(uint8_t *at, size_t length) noexcept nogil:
    cdef uint32_t value = <uint32_t> length
    memcpy(at, &value, 4)


cdef size_t put_clear(uint8_t *at, const entry_t *entry, uint32_t saved) noexcept nogil:
    """One update: mark = mark & ~saved (ctnetlink_change_mark), nothing else of the entry changes."""
    cdef uint32_t word
    # Without NLM_F_CREATE: an entry that has gone is not made anew.
    cdef size_t used = put_header(at, IPCTNL_MSG_CT_NEW, NLM_F_REQUEST, 0,
                                  10 if entry.orig.family == 6 else 2)
    used += put_attribute(at + used, CTA_TUPLE_ORIG | NLA_NESTED, entry.tuple, entry.tuple_size)
    if entry.has_zone:
        used += put_attribute(at + used, CTA_ZONE, &entry.zone, 2)
    word = 0
    used += put_attribute(at + used, CTA_MARK, &word, 4)
    word = htonl(saved)
    used += put_attribute(at + used, CTA_MARK_MASK, &word, 4)
    put_length(at, used)
    return used


cdef int flush(sweep_t *s) noexcept nogil:
    """Send the collected updates and read what the kernel refused. 0, or the errno of the send."""
    cdef ssize_t n
    cdef size_t at
    cdef size_t size
    cdef int32_t error
    if not s.used:
        return 0
    while True:
        n = send(s.update_fd, s.write_buffer, s.used, 0)
        if n >= 0:
            break
        if errno != EINTR:
            return errno
    s.used = 0
    while True:
        n = recv(s.update_fd, s.write_buffer, WRITE_SIZE, MSG_DONTWAIT)
        if n < 0:
            if errno == EINTR or errno == ENOBUFS:
                continue
            return 0
        at = 0
        while at + NLMSG_HEADER + 4 <= <size_t> n:
            size = get_u32(s.write_buffer + at)
            if size < NLMSG_HEADER + 4:
                break
            if get_u16(s.write_buffer + at + 4) == NLMSG_ERROR:
                error = -<int32_t> get_u32(s.write_buffer + at + NLMSG_HEADER)
                if error == ENOENT:
                    s.gone += 1
                elif error and not s.error:
                    s.error = error
            at += (size + 3) & ~<size_t> 3


cdef int visit(sweep_t *s, const entry_t *entry) noexcept nogil:
    cdef flow_t flow
    cdef verdict_t verdict
    cdef bint readable
    cdef int status
    if not entry.mark & s.saved:
        return 0                  # a kernel that does not filter dumps every flow
    readable = forward_flow(entry, &flow)
    if s.keys != NULL and readable:
        if not listed(s, flow.family, &flow.src) and not listed(s, flow.family, &flow.dst):
            return 0
    s.seen += 1
    if s.table != NULL and readable:
        judge_flow(s.table, &flow, &verdict)
        # What only an audit lets through is judged anew, and told, after each change that concerns it.
        if verdict.allow and verdict.reason != R_AUDIT:
            return 0
        s.audited += verdict.allow
    # A flow that cannot be read cannot be allowed; without its tuple it cannot be named either.
    if entry.tuple == NULL or entry.tuple_size > TUPLE_MAX:
        return 0
    if s.used + 256 > WRITE_SIZE:
        status = flush(s)
        if status:
            return status
    s.used += put_clear(s.write_buffer + s.used, entry, s.saved)
    s.cleared += 1
    return 0


cdef size_t put_dump(uint8_t *at, uint32_t seq, uint32_t mark, uint32_t mask) noexcept nogil:
    cdef uint32_t word
    cdef size_t used = put_header(at, IPCTNL_MSG_CT_GET, NLM_F_REQUEST | NLM_F_DUMP, seq, 0)
    word = htonl(mark)
    used += put_attribute(at + used, CTA_MARK, &word, 4)
    word = htonl(mask)
    used += put_attribute(at + used, CTA_MARK_MASK, &word, 4)
    put_length(at, used)
    return used


cdef int read_datagram(sweep_t *s, size_t received, int *interrupted) noexcept nogil:
    """-1: more to come; 0: the dump is complete; else an errno."""
    cdef size_t at = 0
    cdef size_t size
    cdef uint16_t kind
    cdef int error
    cdef entry_t entry
    cdef uint8_t *message
    while at + NLMSG_HEADER <= received:
        message = s.read_buffer + at
        size = get_u32(message)
        if size < NLMSG_HEADER or size > received - at:
            return EBADMSG
        if get_u32(message + 8) == s.seq:
            kind = get_u16(message + 4)
            if get_u16(message + 6) & NLM_F_DUMP_INTR:
                interrupted[0] = 1
            if kind == NLMSG_DONE or kind == NLMSG_ERROR:
                error = -<int32_t> get_u32(message + NLMSG_HEADER) if size >= NLMSG_HEADER + 4 else 0
                return error if error >= 0 else 0
            if kind == NLMSG_OVERRUN:
                return ENOBUFS
            if (kind == (NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_NEW)
                    and size >= NLMSG_HEADER + NFGEN_HEADER):
                read_entry(message + NLMSG_HEADER + NFGEN_HEADER, size - NLMSG_HEADER - NFGEN_HEADER,
                           &entry)
                error = visit(s, &entry)
                if error:
                    return error
        at += (size + 3) & ~<size_t> 3
    return -1


cdef int request(sweep_t *s, uint32_t mark, uint32_t mask) noexcept nogil:
    cdef uint8_t message[64]
    cdef size_t size
    s.seq += 1
    size = put_dump(message, s.seq, mark, mask)
    while send(s.dump_fd, message, size, 0) < 0:
        if errno != EINTR:
            return errno
    return 0


cdef int sweep_dump(sweep_t *s, uint32_t mark, uint32_t mask, int *interrupted) noexcept nogil:
    cdef ssize_t n
    cdef int status = request(s, mark, mask)
    if status:
        return status
    while True:
        n = recv(s.dump_fd, s.read_buffer, READ_SIZE, 0)
        if n < 0:
            if errno == EINTR:
                continue
            return errno
        status = read_datagram(s, <size_t> n, interrupted)
        if status >= 0:
            return status


cdef int run_sweep(sweep_t *s, uint32_t egress, uint32_t ingress, bint few) noexcept nogil:
    """0, or an errno. A dump the kernel calls interrupted may have missed flows: again from the start."""
    cdef int _try
    cdef int status
    cdef int interrupted
    for _try in range(DUMP_TRIES):
        interrupted = 0
        s.seen = 0
        if few:
            status = sweep_dump(s, 0, 0, &interrupted)
        else:
            status = sweep_dump(s, ingress, egress | ingress, &interrupted)
            if not status:
                status = sweep_dump(s, egress, egress, &interrupted)
        if not status:
            status = flush(s)
        if status:
            return status
        if not interrupted:
            return 0
    return EAGAIN


@cython.final
@cython.auto_pickle(False)
cdef class _Session:
    """Two netlink sockets and the buffers of one sweep."""

    cdef sweep_t s

    def __cinit__(self):
        self.s.dump_fd = self.s.update_fd = -1
        self.s.read_buffer = <uint8_t *> calloc(1, READ_SIZE)
        self.s.write_buffer = <uint8_t *> calloc(1, WRITE_SIZE)
        if self.s.read_buffer == NULL or self.s.write_buffer == NULL:
            raise MemoryError

    def __dealloc__(self):
        if self.s.dump_fd >= 0:
            close(self.s.dump_fd)
        if self.s.update_fd >= 0:
            close(self.s.update_fd)
        free(self.s.read_buffer)
        free(self.s.write_buffer)
        free(self.s.keys)

    cdef open(self):
        self.s.dump_fd = open_socket()
        self.s.update_fd = open_socket()

    cdef set_addresses(self, addresses):
        cdef size_t i
        ordered = sorted(set(addresses), key=lambda address: (len(address), address))
        # One more than needed: NULL means every flow, an empty list none.
        self.s.keys = <key_t *> calloc(len(ordered) + 1, sizeof(key_t))
        if self.s.keys == NULL:
            raise MemoryError
        for i, address in enumerate(ordered):
            if len(address) not in (4, 16):
                raise ValueError(f"{address!r} is not a packed address")
            self.s.keys[i].family = 4 if len(address) == 4 else 6
            read_address(<const uint8_t *> <const char *> address, len(address) == 16,
                         &self.s.keys[i].address)
        self.s.n_keys = len(ordered)


cdef int open_socket() except -1:
    cdef sockaddr_nl_t address
    cdef int one = 1
    cdef int room = 1 << 20
    cdef int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_NETFILTER)
    if fd < 0:
        raise KernelError(f"no netfilter netlink socket: {os.strerror(errno)}; the kernel needs "
                          "CONFIG_NETFILTER_NETLINK")
    memset(&address, 0, sizeof(address))
    address.nl_family = AF_NETLINK
    if connect(fd, <const sockaddr *> &address, sizeof(address)) < 0:
        code = errno
        close(fd)
        raise KernelError(f"conntrack: netlink connect: {os.strerror(code)}")
    # Errors of a few hundred updates come at once; they are only counted.
    setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &room, sizeof(room))
    setsockopt(fd, SOL_NETLINK, NETLINK_NO_ENOBUFS, &one, sizeof(one))
    setsockopt(fd, SOL_NETLINK, NETLINK_CAP_ACK, &one, sizeof(one))
    return fd


cdef failure(int code, what):
    if code == errno_module.EPERM:
        return KernelError(f"conntrack {what}: needs root (CAP_NET_ADMIN) in this network namespace")
    if code in (errno_module.EINVAL, errno_module.EOPNOTSUPP):
        return KernelError(f"conntrack {what}: {os.strerror(code)}; the kernel needs CONFIG_NF_CT_NETLINK "
                           "and CONFIG_NF_CONNTRACK_MARK")
    return KernelError(f"conntrack {what}: {os.strerror(code)}")


def sweep(RuleTable table, unsigned int egress, unsigned int ingress, addresses):
    """Take the bits of flows that `table` denies, or of all where it is None.

    Flows from or to `addresses` (packed; None: every flow) that carry a bit are looked at. Returns
    (flows looked at, flows whose bits were taken). KernelError when the kernel refuses.
    """
    cdef _Session session = _Session()
    cdef int status
    cdef bint few = has_few_flows()
    session.open()
    if addresses is not None:
        session.set_addresses(addresses)
    session.s.saved = egress | ingress
    if table is not None:
        session.s.table = &table.c
    with nogil:
        status = run_sweep(&session.s, egress, ingress, few)
    if status:
        raise failure(status, "dump")
    if session.s.error:
        raise failure(session.s.error, "update")
    return session.s.seen, session.s.cleared - min(session.s.gone + session.s.audited, session.s.cleared)


def has_few_flows():
    """Whether one dump of this network namespace's whole table is quicker than two filtered ones."""
    try:
        with open("/proc/sys/net/netfilter/nf_conntrack_count") as count:
            return int(count.read()) < FEW_FLOWS
    except (OSError, ValueError):
        return False


cdef list describe(const uint8_t *data, size_t received, uint32_t seq, uint32_t wanted, uint16_t kind):
    """Every entry of a datagram's messages of one kind with one of the `wanted` bits (0: any), as tuples."""
    cdef size_t at = 0
    cdef size_t size
    cdef entry_t entry
    found = []
    while at + NLMSG_HEADER <= received:
        size = get_u32(data + at)
        if size < NLMSG_HEADER or size > received - at:
            break
        if (get_u32(data + at + 8) == seq and size >= NLMSG_HEADER + NFGEN_HEADER
                and get_u16(data + at + 4) == (NFNL_SUBSYS_CTNETLINK << 8 | kind)):
            read_entry(data + at + NLMSG_HEADER + NFGEN_HEADER, size - NLMSG_HEADER - NFGEN_HEADER,
                       &entry)
            if (not wanted or entry.mark & wanted) and entry.orig.family and entry.reply.family:
                found.append((
                    end(&entry.orig), end(&entry.reply), entry.orig.protocol,
                    (entry.orig.icmp_type, entry.orig.icmp_code, entry.orig.icmp_id)
                    if entry.orig.has_icmp else None,
                    entry.mark, entry.status, entry.timeout, ntohs(entry.zone),
                    (<const char *> entry.protoinfo)[:entry.protoinfo_size]
                    if entry.protoinfo != NULL else b"",
                    (entry.packets[0], entry.bytes[0], entry.packets[1], entry.bytes[1])
                    if entry.has_counters else None,
                ))
        at += (size + 3) & ~<size_t> 3
    return found


cdef end(const tuple_t *t):
    return pack_address(t.family, &t.src), t.sport, pack_address(t.family, &t.dst), t.dport


cdef pack_address(uint8_t family, const addr_t *address):
    if family == 4:
        return int(address.low).to_bytes(4, "big")
    return int(address.high).to_bytes(8, "big") + int(address.low).to_bytes(8, "big")


def dump(unsigned int egress, unsigned int ingress):
    """The flows that carry one of the bits (without bits: every flow), each once, as tuples.

    See dataplane.node.conntrack.
    """
    cdef _Session session = _Session()
    cdef int status
    session.open()
    for _ in range(DUMP_TRIES):
        found = {}
        interrupted = False
        passes = [(ingress, egress | ingress), (egress, egress)]
        if not egress | ingress or has_few_flows():
            passes = [(0, 0)]
        for mark, mask in passes:
            status = request(&session.s, mark, mask)
            if status:
                raise failure(status, "dump")
            while True:
                datagram = receive(session)
                status, broken = finished(datagram, session.s.seq)
                interrupted = interrupted or broken
                if status > 0:
                    raise failure(status, "dump")
                for flow in describe(datagram, len(datagram), session.s.seq, egress | ingress,
                                     IPCTNL_MSG_CT_NEW):
                    found[flow[0], flow[2], flow[3], flow[7]] = flow
                if status == 0:
                    break
        if not interrupted:
            return list(found.values())
    raise failure(errno_module.EAGAIN, "dump")


cdef bytes receive(_Session session):
    cdef ssize_t n
    while True:
        with nogil:
            n = recv(session.s.dump_fd, session.s.read_buffer, READ_SIZE, 0)
        if n >= 0:
            return (<const char *> session.s.read_buffer)[:n]
        if errno != EINTR:
            raise failure(errno, "dump")


cdef finished(bytes datagram, uint32_t seq):
    """(status, interrupted). Status -1: the dump goes on; 0: it ends here; else an errno."""
    cdef const uint8_t *data = <const uint8_t *> <const char *> datagram
    cdef size_t received = len(datagram)
    cdef size_t at = 0
    cdef size_t size
    cdef int32_t error
    interrupted = False
    while at + NLMSG_HEADER <= received:
        size = get_u32(data + at)
        if size < NLMSG_HEADER or size > received - at:
            return errno_module.EBADMSG, interrupted
        if get_u32(data + at + 8) == seq:
            if get_u16(data + at + 6) & NLM_F_DUMP_INTR:
                interrupted = True
            if get_u16(data + at + 4) in (NLMSG_DONE, NLMSG_ERROR):
                error = -<int32_t> get_u32(data + at + NLMSG_HEADER) if size >= NLMSG_HEADER + 4 else 0
                return error if error > 0 else 0, interrupted
        at += (size + 3) & ~<size_t> 3
    return -1, interrupted


def parse(bytes datagram not None, unsigned int seq=0, bint ended=False):
    """The entries of a netlink datagram: what `dump` reads from it, or flows that have `ended`."""
    return describe(<const uint8_t *> <const char *> datagram, len(datagram), seq, 0,
                    IPCTNL_MSG_CT_DELETE if ended else IPCTNL_MSG_CT_NEW)


def encode_clear(bytes message not None, unsigned int saved):
    """The update that would be sent for the one entry in a CT_NEW message, for tests; b"" for none."""
    cdef entry_t entry
    cdef uint8_t out[256]
    if len(message) < NLMSG_HEADER + NFGEN_HEADER:
        return b""
    read_entry(<const uint8_t *> <const char *> message + NLMSG_HEADER + NFGEN_HEADER,
               len(message) - NLMSG_HEADER - NFGEN_HEADER, &entry)
    if entry.tuple == NULL or entry.tuple_size > TUPLE_MAX:
        return b""
    return (<const char *> out)[:put_clear(out, &entry, saved)]
