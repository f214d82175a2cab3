# Netlink as both packet-path sockets use it: the queue's and conntrack's. Declarations only; layouts
# are the kernel's (linux/netlink.h, linux/netfilter/nfnetlink.h).
from libc.stddef cimport size_t
from libc.stdint cimport uint16_t, uint32_t

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE 1
    #endif
    #include <arpa/inet.h>
    #include <string.h>
    #include <sys/socket.h>
    #include <linux/netlink.h>
    #include <linux/netfilter/nfnetlink.h>

    #ifndef NETLINK_CAP_ACK
    #define NETLINK_CAP_ACK 10
    #endif
    /* Attributes are aligned to 4 in a buffer aligned to 8, but test faces pass any pointer. */
    static inline unsigned int get_u32(const void *at) { unsigned int v; memcpy(&v, at, 4); return v; }
    static inline unsigned short get_u16(const void *at) { unsigned short v; memcpy(&v, at, 2); return v; }
    """
    uint32_t get_u32(const void *at) noexcept nogil
    uint16_t get_u16(const void *at) noexcept nogil

    struct nlmsghdr_t "nlmsghdr":
        uint32_t nlmsg_len
        uint16_t nlmsg_type
        uint16_t nlmsg_flags
        uint32_t nlmsg_seq
        uint32_t nlmsg_pid

    struct sockaddr:
        pass
    struct sockaddr_nl_t "sockaddr_nl":
        uint16_t nl_family
        uint32_t nl_pid
        uint32_t nl_groups

    uint32_t ntohl(uint32_t value) noexcept nogil
    uint32_t htonl(uint32_t value) noexcept nogil
    uint16_t ntohs(uint16_t value) noexcept nogil
    uint16_t htons(uint16_t value) noexcept nogil
    int socket(int domain, int type, int protocol) noexcept nogil
    int connect(int fd, const sockaddr *address, unsigned int length) noexcept nogil
    int setsockopt(int fd, int level, int name, const void *value, unsigned int length) noexcept nogil
    ssize_t send(int fd, const void *data, size_t length, int flags) noexcept nogil

    enum:
        AF_NETLINK, SOCK_RAW, SOCK_CLOEXEC, SOL_SOCKET, SO_RCVBUFFORCE, MSG_DONTWAIT
        SOL_NETLINK, NETLINK_NETFILTER, NETLINK_NO_ENOBUFS, NETLINK_CAP_ACK
        NLM_F_REQUEST, NLMSG_ERROR, NFNETLINK_V0

cdef enum:
    NLMSG_HEADER = 16             # struct nlmsghdr
    NFGEN_HEADER = 4              # struct nfgenmsg
    NLA_TYPE_BITS = 0x3FFF        # of nla_type, without NLA_F_NESTED and NLA_F_NET_BYTEORDER
