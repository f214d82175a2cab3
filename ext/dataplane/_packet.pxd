# Decoding of IPv4 and IPv6 packets, from the network header on. Reads only what it has checked to
# be there, allocates nothing, never raises: the result is a reason, R_NONE when the packet is good.
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stddef cimport size_t

from dataplane._reasons cimport reason_t

# An address as two host-order words, so that it compares as a number. IPv4 lives in `low` alone.
cdef struct addr_t:
    uint64_t high
    uint64_t low

# What identifies a flow. All fields are always set; ports are 0 where `has_ports` is 0.
cdef struct flow_t:
    addr_t src
    addr_t dst
    uint16_t sport        # host order; ICMP echo: the identifier
    uint16_t dport        # host order; ICMP: type << 8 | code
    uint8_t protocol      # the upper-layer protocol, after all extension headers
    uint8_t family        # 4 or 6
    uint8_t has_ports     # TCP, UDP, SCTP, UDP-Lite, DCCP

cdef enum packet_flag_t:
    PKT_ICMP_ERROR = 1    # `inner` is valid: the flow the error is about, as its sender sent it
    PKT_FIRST_FRAGMENT = 2
    PKT_ND = 4            # neighbour discovery with hop limit 255, or MLD from a link-local source

cdef struct packet_t:
    flow_t flow
    flow_t inner          # valid when flags & PKT_ICMP_ERROR
    uint32_t length       # bytes of the whole IP packet on the wire
    uint16_t l4_offset    # of the upper-layer header, from the start of the IP header
    uint8_t flags         # packet_flag_t
    uint8_t hop_limit
    uint8_t tcp_flags     # valid for TCP
    uint8_t icmp_type     # valid for ICMP and ICMPv6
    uint8_t icmp_code

# Decodes `captured` bytes at `data` of a packet that had `wire` bytes (more than captured when the
# kernel copied only the headers; at least `captured`). Returns R_NONE, R_MALFORMED or R_FRAGMENT.
# On an error the addresses are set when they could be read, for the log; nothing else is promised.
cdef reason_t decode(const uint8_t *data, size_t captured, size_t wire, packet_t *out) noexcept nogil

# Between Python and C: packed addresses of 4 or 16 bytes (b"" for family 0), ValueError for others.
cdef bytes packed_address(const addr_t *address, uint8_t family)
cdef bint unpack_address(bytes packed, addr_t *address) except False
cdef object flow_to_python(const flow_t *flow)
