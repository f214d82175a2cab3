# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: initializedcheck=False, auto_pickle=False
"""Decoding of IPv4 and IPv6 packets. `_packet.pxd` is the readable face; this is how.

Every function takes the bytes it may read as (pointer, end) and compares before it reads. What is
behind the end of the captured bytes is unknown, and unknown is malformed: a firewall that guesses
is a firewall that can be told what to guess.
"""
from libc.stdint cimport int64_t
from libc.string cimport memset
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer

from dataplane._reasons cimport reason_t, R_NONE, R_MALFORMED, R_FRAGMENT

from dataplane.reasons import Reason
from dataplane.verdict import Flow, Packet

cdef enum:
    IP_HOP_BY_HOP = 0
    IP_ICMP = 1
    IP_TCP = 6
    IP_UDP = 17
    IP_DCCP = 33
    IP_ROUTING = 43
    IP_FRAGMENT = 44
    IP_AH = 51
    IP_ICMPV6 = 58
    IP_DESTINATION = 60
    IP_SCTP = 132
    IP_MOBILITY = 135
    IP_UDPLITE = 136
    IP_HIP = 139
    IP_SHIM6 = 140

    # More than any real packet carries (RFC 8200 §4.1 lists seven); a longer chain is an attack on us.
    MAX_EXTENSIONS = 16
    JUMBO_OPTION = 0xC2           # RFC 2675 §2

# Where the network header led to.
cdef struct network_t:
    size_t upper                  # offset of the upper-layer header
    size_t end                    # bytes that may be read: captured, and part of the packet
    size_t length                 # of the whole packet
    uint8_t protocol
    uint8_t hop_limit
    uint8_t first_fragment


cdef inline uint16_t be16(const uint8_t *p) noexcept nogil:
    return <uint16_t>((<uint32_t>p[0] << 8) | p[1])


cdef inline uint32_t be32(const uint8_t *p) noexcept nogil:
    return (<uint32_t>p[0] << 24) | (<uint32_t>p[1] << 16) | (<uint32_t>p[2] << 8) | p[3]


cdef inline uint64_t be64(const uint8_t *p) noexcept nogil:
    return (<uint64_t>be32(p) << 32) | be32(p + 4)


# `quoted`: the packet inside an ICMP error, cut off where its quoter pleased, so its length field
# says nothing about what must be there.
cdef reason_t network4(const uint8_t *data, size_t captured, size_t wire, bint quoted,
                       flow_t *flow, network_t *net) noexcept nogil:
    cdef size_t header, total
    cdef uint16_t fragment
    if captured < 20:
        return R_MALFORMED
    header = <size_t>(data[0] & 0x0F) << 2
    flow.family = 4
    flow.src.low = be32(data + 12)
    flow.dst.low = be32(data + 16)
    flow.protocol = data[9]
    net.hop_limit = data[8]
    if header < 20 or header > captured:
        return R_MALFORMED
    total = be16(data + 2)
    if quoted:
        total = captured
    elif total == 0 and wire > 65535:
        total = wire              # BIG TCP: longer than the field can say (kernel: iph_totlen)
    if total < header or total > wire:
        return R_MALFORMED
    net.length = total
    net.end = captured if captured < total else total
    net.upper = header
    net.protocol = data[9]
    fragment = be16(data + 6)
    if fragment & 0x1FFF:
        return R_FRAGMENT
    net.first_fragment = (fragment & 0x2000) != 0
    return R_NONE


# The jumbo payload length in a hop-by-hop header of `size` bytes; 0: none; -1: the options overrun it.
cdef int64_t jumbo_length(const uint8_t *header, size_t size) noexcept nogil:
    cdef size_t at = 2, option
    cdef int64_t found = 0
    while at < size:
        if header[at] == 0:       # Pad1
            at += 1
            continue
        if at + 2 > size:
            return -1
        option = <size_t>header[at + 1] + 2
        if at + option > size:
            return -1
        if header[at] == JUMBO_OPTION:
            if option != 6 or found:
                return -1
            found = be32(header + at + 2)
            if found <= 65535:    # RFC 2675 §3: an error
                return -1
        at += option
    return found


cdef reason_t network6(const uint8_t *data, size_t captured, size_t wire, bint quoted,
                       flow_t *flow, network_t *net) noexcept nogil:
    cdef size_t total, at, size
    cdef uint16_t payload, fragment
    cdef uint8_t protocol
    cdef int64_t jumbo
    cdef int _
    if captured < 40:
        return R_MALFORMED
    flow.family = 6
    flow.src.high = be64(data + 8)
    flow.src.low = be64(data + 16)
    flow.dst.high = be64(data + 24)
    flow.dst.low = be64(data + 32)
    net.hop_limit = data[7]
    protocol = data[6]
    flow.protocol = protocol
    payload = be16(data + 4)
    total = 40 + <size_t>payload
    if quoted:
        total = captured
    elif payload == 0:
        if protocol == IP_HOP_BY_HOP:
            total = wire          # a jumbogram; its option is checked below
        elif wire > 40 + 65535:
            total = wire          # BIG TCP without the option, as newer kernels keep it
    if total > wire:
        return R_MALFORMED
    net.length = total
    net.end = captured if captured < total else total
    at = 40
    for _ in range(MAX_EXTENSIONS + 1):
        if protocol == IP_FRAGMENT:
            if net.end - at < 8:
                return R_MALFORMED
            if not quoted and payload == 0:
                return R_MALFORMED        # RFC 2675 §3: no fragments of jumbograms
            fragment = be16(data + at + 2)
            protocol = data[at]
            if fragment & 0xFFF8:
                flow.protocol = protocol
                return R_FRAGMENT
            net.first_fragment = fragment & 1
            size = 8
        elif (protocol == IP_HOP_BY_HOP or protocol == IP_ROUTING or protocol == IP_DESTINATION
              or protocol == IP_MOBILITY or protocol == IP_HIP or protocol == IP_SHIM6
              or protocol == IP_AH):
            if net.end - at < 8:
                return R_MALFORMED
            if protocol == IP_AH:
                size = (<size_t>data[at + 1] + 2) << 2        # RFC 4302 §2.2: in words, minus two
                if size < 12:
                    return R_MALFORMED
            else:
                size = (<size_t>data[at + 1] + 1) << 3
            if net.end - at < size:
                return R_MALFORMED
            if protocol == IP_HOP_BY_HOP:
                if at != 40:
                    return R_MALFORMED    # RFC 8200 §4.1: right behind the IPv6 header only
                jumbo = jumbo_length(data + at, size)
                if jumbo < 0:
                    return R_MALFORMED
                if not quoted:
                    if jumbo:
                        if payload != 0 or <size_t>jumbo + 40 > wire:
                            return R_MALFORMED
                        net.length = <size_t>jumbo + 40
                        net.end = captured if captured < net.length else net.length
                    elif payload == 0 and wire <= 40 + 65535:
                        return R_MALFORMED        # a header in a payload of no bytes
            elif protocol == IP_ROUTING and data[at + 2] == 0 and data[at + 3] != 0:
                # RFC 5095: type 0 makes the packet go on to addresses the policy never saw.
                return R_MALFORMED
            protocol = data[at]
        else:
            net.upper = at
            net.protocol = protocol
            flow.protocol = protocol
            return R_NONE
        at += size
        flow.protocol = protocol
    return R_MALFORMED


cdef inline bint icmp4_is_error(uint8_t kind) noexcept nogil:
    # As nf_conntrack_proto_icmp.c: unreachable, source quench, redirect, time exceeded, parameter problem.
    return kind == 3 or kind == 4 or kind == 5 or kind == 11 or kind == 12


cdef inline bint icmp4_has_id(uint8_t kind) noexcept nogil:
    return kind == 0 or kind == 8 or (13 <= kind <= 18)


# The ports of a packet, or what stands for them in ICMP: the caller has checked for the bytes.
cdef inline void identify(const uint8_t *header, flow_t *flow) noexcept nogil:
    flow.sport = be16(header)
    flow.dport = be16(header + 2)
    flow.has_ports = 1


cdef inline void identify_icmp(const uint8_t *header, bint has_id, flow_t *flow) noexcept nogil:
    flow.sport = be16(header + 4) if has_id else 0
    flow.dport = be16(header)


# The flow of the packet quoted in an ICMP error: `captured` bytes at `data`, at least the network
# header and 8 bytes behind it (RFC 792, RFC 4443 §3).
cdef reason_t quoted_flow(const uint8_t *data, size_t captured, uint8_t family, flow_t *flow) noexcept nogil:
    cdef network_t net
    cdef reason_t bad
    cdef uint8_t protocol
    if captured < 1 or data[0] >> 4 != family:
        return R_MALFORMED
    net.first_fragment = 0
    if family == 4:
        bad = network4(data, captured, captured, True, flow, &net)
    else:
        bad = network6(data, captured, captured, True, flow, &net)
    if bad != R_NONE:
        return R_MALFORMED        # a later fragment names no flow either
    protocol = net.protocol
    if (protocol == IP_TCP or protocol == IP_UDP or protocol == IP_SCTP or protocol == IP_UDPLITE
            or protocol == IP_DCCP):
        if net.end - net.upper < 8:
            return R_MALFORMED
        identify(data + net.upper, flow)
    elif protocol == (IP_ICMP if family == 4 else IP_ICMPV6):
        if net.end - net.upper < 8:
            return R_MALFORMED
        data += net.upper
        # RFC 1122 §3.2.2, RFC 4443 §2.4: no error about an error.
        if (icmp4_is_error(data[0]) if family == 4 else data[0] < 128):
            return R_MALFORMED
        identify_icmp(data, icmp4_has_id(data[0]) if family == 4 else data[0] <= 129, flow)
    return R_NONE


cdef inline bint is_link_local(const addr_t *address) noexcept nogil:
    return address.high >> 54 == 0x3FA        # fe80::/10


cdef reason_t icmp(const uint8_t *data, const network_t *net, packet_t *out) noexcept nogil:
    cdef const uint8_t *header = data + net.upper
    cdef uint8_t kind
    cdef bint is_error, has_id
    if net.end - net.upper < 8:
        return R_MALFORMED
    kind = header[0]
    out.icmp_type = kind
    out.icmp_code = header[1]
    if out.flow.family == 4:
        is_error = icmp4_is_error(kind)
        has_id = icmp4_has_id(kind)
    else:
        is_error = kind < 128     # RFC 4443 §2.1
        has_id = kind == 128 or kind == 129
    identify_icmp(header, has_id, &out.flow)
    if is_error:
        if quoted_flow(header + 8, net.end - net.upper - 8, out.flow.family, &out.inner) != R_NONE:
            return R_MALFORMED
        # An error goes to whoever sent what it quotes. One that goes elsewhere quotes an allowed flow
        # to get to an address that is not (kernel: nf_conntrack_inet_error, "outer daddr mismatch").
        if out.inner.src.high != out.flow.dst.high or out.inner.src.low != out.flow.dst.low:
            return R_MALFORMED
        out.flags |= PKT_ICMP_ERROR
    elif out.flow.family == 6 and not net.first_fragment:      # RFC 6980: ND is never fragmented
        if 133 <= kind <= 137:
            # RFC 4861 §6.1, §7.1: 255 proves that no router forwarded it.
            if net.hop_limit == 255 and header[1] == 0:
                out.flags |= PKT_ND
        elif kind == 130 or kind == 131 or kind == 132 or kind == 143:
            # RFC 3810 §5; :: while the host has no address yet (RFC 3590).
            if net.hop_limit == 1 and (is_link_local(&out.flow.src)
                                       or (out.flow.src.high == 0 and out.flow.src.low == 0)):
                out.flags |= PKT_ND
    return R_NONE


cdef reason_t decode(const uint8_t *data, size_t captured, size_t wire, packet_t *out) noexcept nogil:
    cdef network_t net
    cdef reason_t bad
    cdef size_t room
    cdef const uint8_t *header
    cdef uint16_t length
    memset(out, 0, sizeof(packet_t))
    out.length = <uint32_t>wire
    if captured < 1 or captured > wire:
        return R_MALFORMED
    net.first_fragment = 0
    net.hop_limit = 0
    if data[0] >> 4 == 4:
        bad = network4(data, captured, wire, False, &out.flow, &net)
    elif data[0] >> 4 == 6:
        bad = network6(data, captured, wire, False, &out.flow, &net)
    else:
        return R_MALFORMED
    out.hop_limit = net.hop_limit
    if bad != R_NONE:
        return bad
    out.length = <uint32_t>net.length
    out.l4_offset = <uint16_t>net.upper
    if net.first_fragment:
        out.flags |= PKT_FIRST_FRAGMENT
    header = data + net.upper
    room = net.end - net.upper
    if net.protocol == IP_TCP:
        # A first fragment too short for this hides its flags or ports in the second (RFC 1858).
        if room < 20:
            return R_MALFORMED
        length = <uint16_t>((header[12] >> 4) << 2)
        if length < 20 or length > net.length - net.upper:
            return R_MALFORMED
        identify(header, &out.flow)
        out.tcp_flags = header[13]
    elif net.protocol == IP_UDP:
        if room < 8:
            return R_MALFORMED
        length = be16(header + 4)
        if length < 8 and not (length == 0 and net.length > 65535):       # RFC 2675 §4
            return R_MALFORMED
        identify(header, &out.flow)
    elif net.protocol == IP_UDPLITE:
        if room < 8:
            return R_MALFORMED
        identify(header, &out.flow)
    elif net.protocol == IP_SCTP or net.protocol == IP_DCCP:
        if room < 12:
            return R_MALFORMED
        identify(header, &out.flow)
    elif net.protocol == (IP_ICMP if out.flow.family == 4 else IP_ICMPV6):
        return icmp(data, &net, out)
    # Any other protocol is judged by its number. IPv4's AH is one: conntrack does not look behind it.
    return R_NONE


cdef bytes packed_address(const addr_t *address, uint8_t family):
    cdef uint8_t raw[16]
    cdef int i
    for i in range(8):
        raw[i] = <uint8_t>(address.high >> (56 - 8 * i))
        raw[8 + i] = <uint8_t>(address.low >> (56 - 8 * i))
    if family == 4:
        return (<char *>raw)[12:16]
    if family == 6:
        return (<char *>raw)[:16]
    return b""


cdef bint unpack_address(bytes packed, addr_t *address) except False:
    cdef const uint8_t *raw = packed
    if len(packed) == 4:
        address.high = 0
        address.low = be32(raw)
    elif len(packed) == 16:
        address.high = be64(raw)
        address.low = be64(raw + 8)
    else:
        raise ValueError(f"{packed!r} is not a packed IP address: it must have 4 or 16 bytes")
    return True


cdef object flow_to_python(const flow_t *flow):
    return Flow(packed_address(&flow.src, flow.family), packed_address(&flow.dst, flow.family),
                flow.protocol, flow.sport, flow.dport, flow.has_ports != 0)


def decode_packet(data, wire=None):
    """Decode an IP packet, from its network header on.

    `data` is any contiguous buffer: what was captured. `wire` is the packet's length on the wire,
    by default that of `data`. Never raises because of what the packet holds: `Packet.reason` is
    `Reason.NONE` when it is good, else `MALFORMED` or `FRAGMENT`.
    """
    cdef Py_buffer view
    cdef packet_t packet
    cdef reason_t reason
    cdef size_t length
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        length = view.len if wire is None else wire
        if length < <size_t>view.len:
            raise ValueError(f"wire is {length}, shorter than the {view.len} bytes captured")
        with nogil:
            reason = decode(<const uint8_t *>view.buf, <size_t>view.len, length, &packet)
    finally:
        PyBuffer_Release(&view)
    return Packet(
        Reason(<int>reason),
        flow_to_python(&packet.flow),
        flow_to_python(&packet.inner) if packet.flags & PKT_ICMP_ERROR else None,
        packet.length,
        packet.l4_offset,
        packet.hop_limit,
        packet.tcp_flags,
        packet.icmp_type,
        packet.icmp_code,
        (packet.flags & PKT_FIRST_FRAGMENT) != 0,
        (packet.flags & PKT_ND) != 0,
    )
