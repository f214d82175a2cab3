# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The native queue backend: one NFQUEUE, one netlink socket, one thread that never holds the GIL.

Theory of operation. The thread blocks in recvmmsg for up to 64 packets, judges them in the order
they came, and answers the whole burst with one sendto before it receives again; the kernel
reinjects the packets inside that sendto. Between worker_enter and worker_leave lies exactly one
burst, its sendto included, so that "no worker announces an older table" means: no packet that the
older table let through is still on its way into conntrack.

Answers are packed: a run of packets with the same verdict and mark is one NFQNL_MSG_VERDICT_BATCH,
which covers every queued id up to its own. The kernel numbers packets under the queue's lock in the
order it puts them on the socket (net/netfilter/nfnetlink_queue.c, __nfqnl_enqueue_packet), so all
ids before a run belong to runs earlier in the same send. The one thing that breaks this is a packet
nobody answered; `unanswered` then puts a drop for everything older in front of the next answer, so
that an accepted run never lets through what was not judged, and nothing stays queued for ever.
"""

import errno as errno_module
import os

cimport cython
from libc.errno cimport errno, EINTR, EAGAIN, ENOBUFS, ENOENT
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint16_t, uint32_t, int32_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset
from posix.unistd cimport close

from dataplane._engine cimport (
    BIT_EGRESS, BIT_INGRESS, Worker, is_answered, path_t, verdict_t, worker_enter, worker_judge,
    worker_leave, worker_t,
)
from dataplane._netlink cimport (
    AF_NETLINK, connect, get_u16, get_u32, htonl, htons, MSG_DONTWAIT, NETLINK_CAP_ACK,
    NETLINK_NETFILTER, NETLINK_NO_ENOBUFS, NFGEN_HEADER, NFNETLINK_V0, NLA_TYPE_BITS, NLM_F_REQUEST,
    NLMSG_ERROR, NLMSG_HEADER, nlmsghdr_t, ntohl, send, setsockopt, SO_RCVBUFFORCE, SOCK_CLOEXEC,
    SOCK_RAW, sockaddr, sockaddr_nl_t, socket, SOL_NETLINK, SOL_SOCKET,
)

from dataplane.errors import KernelError

cdef extern from *:
    """
    #include <sched.h>
    #include <linux/netfilter.h>
    #include <linux/netfilter/nfnetlink_queue.h>

    static inline int flag_read(int *flag) { return __atomic_load_n(flag, __ATOMIC_ACQUIRE); }
    static inline void flag_set(int *flag) { __atomic_store_n(flag, 1, __ATOMIC_RELEASE); }
    static inline unsigned long long count_read(unsigned long long *n) {
        return __atomic_load_n(n, __ATOMIC_RELAXED);
    }
    /* One writer: the queue's thread. */
    static inline void count_up(unsigned long long *n) {
        __atomic_store_n(n, *n + 1, __ATOMIC_RELAXED);
    }

    #pragma pack(push, 1)
    struct verdict_message {           /* what sendto carries, once per packet or run */
        struct nlmsghdr nl;
        struct nfgenmsg nf;
        unsigned short verdict_len, verdict_type;
        unsigned int verdict, id;
        unsigned short mark_len, mark_type;
        unsigned int mark;
    };
    #pragma pack(pop)
    """
    int flag_read(int *flag) noexcept nogil
    void flag_set(int *flag) noexcept nogil
    unsigned long long count_read(unsigned long long *n) noexcept nogil
    void count_up(unsigned long long *n) noexcept nogil

    struct nfgenmsg_t "nfgenmsg":
        uint8_t nfgen_family
        uint8_t version
        uint16_t res_id
    struct verdict_message_t "verdict_message":
        nlmsghdr_t nl
        nfgenmsg_t nf
        uint16_t verdict_len
        uint16_t verdict_type
        uint32_t verdict
        uint32_t id
        uint16_t mark_len
        uint16_t mark_type
        uint32_t mark

    struct iovec:
        void *iov_base
        size_t iov_len
    struct msghdr:
        iovec *msg_iov
        size_t msg_iovlen
    struct mmsghdr:
        msghdr msg_hdr
        unsigned int msg_len

    int sched_yield() noexcept nogil
    int getsockopt(int fd, int level, int name, void *value, unsigned int *length) noexcept nogil
    int getsockname(int fd, sockaddr *address, unsigned int *length) noexcept nogil
    int recvmmsg(int fd, mmsghdr *messages, unsigned int n, int flags, void *timeout) noexcept nogil

    enum:
        SO_RCVBUF, MSG_WAITFORONE, NLM_F_ACK, NLMSG_NOOP, NLMSG_MIN_TYPE, NFNL_SUBSYS_QUEUE
        NFQNL_MSG_PACKET, NFQNL_MSG_VERDICT, NFQNL_MSG_CONFIG, NFQNL_MSG_VERDICT_BATCH
        NFQA_PACKET_HDR, NFQA_VERDICT_HDR, NFQA_MARK, NFQA_IFINDEX_INDEV, NFQA_IFINDEX_OUTDEV
        NFQA_IFINDEX_PHYSINDEV, NFQA_IFINDEX_PHYSOUTDEV, NFQA_PAYLOAD, NFQA_CAP_LEN
        NFQA_CFG_CMD, NFQA_CFG_PARAMS, NFQA_CFG_QUEUE_MAXLEN, NFQA_CFG_MASK, NFQA_CFG_FLAGS
        NFQNL_CFG_CMD_BIND, NFQNL_COPY_PACKET, NFQA_CFG_F_FAIL_OPEN, NFQA_CFG_F_GSO
        NF_DROP, NF_ACCEPT

# 64: more does not measure faster, and the first packet of a burst waits for its last.
cdef enum:
    BURST = 64
    # The copied headers and about 200 bytes of attributes; a longer message would lose its tail,
    # and the packet is then denied as malformed.
    MESSAGE_SIZE = 1024
    # IPv6 extension headers can pass 128 bytes; what is longer still cannot be parsed and is denied.
    COPY_RANGE = 256
    # What one queued packet takes of the socket's buffer (skb->truesize of the message, 832 to
    # 1,280 bytes on 6.18), with room for longer attributes.
    SOCKET_BYTES = 2048
    STOP_SEQ = 0x7FFFFFFF
    DRAIN_ROUNDS = 64

# One queued packet as its message tells it.
cdef struct queued_t:
    uint32_t id                   # valid where has_id
    uint32_t mark                 # the packet's own; absent = 0
    uint32_t wire                 # bytes of the packet, of which `length` are at `payload`
    const uint8_t *payload
    uint32_t length
    path_t path
    uint8_t has_id
    uint8_t whole                 # the message is well-formed to its end

cdef struct answer_t:
    uint32_t id
    uint32_t verdict              # NF_ACCEPT, NF_DROP
    uint32_t mark

cdef struct losses_t:
    unsigned long long overruns      # ENOBUFS: no room (only where NO_ENOBUFS is refused)
    unsigned long long unreadable    # messages that were no packet we could read
    unsigned long long gone          # verdicts for packets the kernel had flushed (ENOENT)
    unsigned long long refused       # verdicts the kernel refused for another reason
    unsigned long long send_errors   # bursts that could not be answered at once
    unsigned long long bursts
    unsigned long long packets

cdef struct queue_t:
    int fd
    int stopping                  # atomic
    uint16_t number
    uint8_t offload
    uint8_t unanswered            # a packet got no answer: drop what is older before the next one
    uint32_t mark_egress
    uint32_t mark_ingress
    uint32_t mark_reply
    uint32_t seq                  # of the configuration message that waits for its ACK
    int acked                     # 1: the ACK came
    int ack_error                 # positive errno
    worker_t *worker
    losses_t losses
    mmsghdr messages[BURST]
    iovec vectors[BURST]
    answer_t answers[BURST]
    verdict_message_t out[2 * BURST]
    uint8_t *buffers


cdef int parse_packet(const uint8_t *message, size_t length, queued_t *out) noexcept nogil:
    """Read one NFQNL_MSG_PACKET from its netlink header on; `length` bytes are there.

    Always leaves `out` usable; returns whether there is an id to answer.
    """
    cdef size_t at = NLMSG_HEADER + NFGEN_HEADER
    cdef size_t size
    cdef uint16_t kind
    cdef const uint8_t *value
    cdef uint32_t captured_of = 0
    cdef uint32_t indev = 0
    cdef uint32_t outdev = 0
    cdef uint32_t physin = 0
    cdef uint32_t physout = 0
    memset(out, 0, sizeof(queued_t))
    if length < at:
        return 0
    while at + 4 <= length:
        size = get_u16(message + at)
        kind = get_u16(message + at + 2) & NLA_TYPE_BITS
        if size < 4 or size > length - at:
            break
        value = message + at + 4
        size -= 4
        if kind == NFQA_PACKET_HDR:
            if size >= 7:         # __be32 id, __be16 hw_protocol, __u8 hook, packed
                out.id = ntohl(get_u32(value))
                out.path.hook = value[6]
                out.has_id = 1
        elif kind == NFQA_PAYLOAD:
            out.payload = value
            out.length = <uint32_t> size
        elif size >= 4:
            if kind == NFQA_MARK:
                out.mark = ntohl(get_u32(value))
            elif kind == NFQA_IFINDEX_INDEV:
                indev = ntohl(get_u32(value))
            elif kind == NFQA_IFINDEX_OUTDEV:
                outdev = ntohl(get_u32(value))
            elif kind == NFQA_IFINDEX_PHYSINDEV:
                physin = ntohl(get_u32(value))
            elif kind == NFQA_IFINDEX_PHYSOUTDEV:
                physout = ntohl(get_u32(value))
            elif kind == NFQA_CAP_LEN:
                captured_of = ntohl(get_u32(value))
        at += (size + 4 + 3) & ~<size_t> 3
    out.whole = at >= length
    # The kernel sends CAP_LEN (the whole packet's length) only where it copied less.
    out.wire = captured_of if captured_of > out.length else out.length
    out.path.indev = physin if physin else indev
    out.path.outdev = physout if physout else outdev
    return out.has_id


cdef size_t encode(uint16_t number, const answer_t *answers, size_t n, int end_older, uint32_t older,
                   verdict_message_t *out) noexcept nogil:
    """Pack answers in order; returns how many messages. Room for n + 1 is needed.

    `end_older`: first the verdict `older` for whatever was queued before them.
    """
    cdef size_t i = 0
    cdef size_t last
    cdef size_t count = 0
    if n == 0:
        return 0
    if end_older:
        put(number, &out[count], NFQNL_MSG_VERDICT_BATCH, older, answers[0].id - 1, 0)
        count += 1
    while i < n:
        last = i
        while (last + 1 < n and answers[last + 1].verdict == answers[i].verdict
               and answers[last + 1].mark == answers[i].mark):
            last += 1
        put(number, &out[count], NFQNL_MSG_VERDICT if last == i else NFQNL_MSG_VERDICT_BATCH,
            answers[i].verdict, answers[last].id, answers[i].mark)
        count += 1
        i = last + 1
    return count


cdef void put(uint16_t number, verdict_message_t *message, int kind, uint32_t verdict, uint32_t packet_id,
              uint32_t mark) noexcept nogil:
    message.nl.nlmsg_len = sizeof(verdict_message_t)
    message.nl.nlmsg_type = <uint16_t> (NFNL_SUBSYS_QUEUE << 8 | kind)
    message.nl.nlmsg_flags = NLM_F_REQUEST
    message.nl.nlmsg_seq = 0
    message.nl.nlmsg_pid = 0
    message.nf.nfgen_family = 0
    message.nf.version = NFNETLINK_V0
    message.nf.res_id = htons(number)
    message.verdict_len = 12
    message.verdict_type = NFQA_VERDICT_HDR
    message.verdict = htonl(verdict)
    message.id = htonl(packet_id)
    message.mark_len = 8
    message.mark_type = NFQA_MARK
    message.mark = htonl(mark)


cdef void answer(queue_t *q, size_t n) noexcept nogil:
    """Send the burst's answers; one by one where the kernel has no memory for all at once."""
    cdef size_t i
    cdef size_t count
    cdef int _try
    cdef int failed = 0
    cdef uint32_t older = NF_ACCEPT if q.worker.audit or q.worker.observer else NF_DROP
    if n == 0:
        return
    count = encode(q.number, q.answers, n, q.unanswered, older, q.out)
    q.unanswered = 0
    if transmit(q.fd, q.out, count):
        return
    count_up(&q.losses.send_errors)
    # Oldest first, each with a single verdict: one that fails must not be covered by a later batch.
    for i in range(n):
        put(q.number, &q.out[0], NFQNL_MSG_VERDICT, q.answers[i].verdict, q.answers[i].id, q.answers[i].mark)
        for _try in range(8):
            if transmit(q.fd, q.out, 1):
                break
            sched_yield()
        else:
            failed = 1
    if failed:
        q.unanswered = 1


cdef size_t skip(queue_t *q, size_t n) noexcept nogil:
    """A message without a readable id: answer what came before, and drop it with the next answer."""
    count_up(&q.losses.unreadable)
    answer(q, n)
    q.unanswered = 1
    return 0


cdef bint transmit(int fd, const verdict_message_t *messages, size_t count) noexcept nogil:
    cdef ssize_t sent
    while True:
        sent = send(fd, messages, count * sizeof(verdict_message_t), 0)
        if sent >= 0:
            return True
        if errno != EINTR:
            return False


cdef void read_error(queue_t *q, const uint8_t *message, size_t length) noexcept nogil:
    """NLMSG_ERROR: the ACK of a configuration, or a verdict the kernel could not use."""
    cdef int32_t error
    cdef uint32_t seq
    if length < NLMSG_HEADER + 4 + NLMSG_HEADER:
        count_up(&q.losses.unreadable)
        return
    error = -<int32_t> get_u32(message + NLMSG_HEADER)
    seq = get_u32(message + NLMSG_HEADER + 4 + 8)      # of the message the error is about
    if seq == 0:
        if error == ENOENT:
            count_up(&q.losses.gone)
        elif error:
            count_up(&q.losses.refused)
    elif seq == q.seq:
        q.ack_error = error
        q.acked = 1


cdef void handle(queue_t *q, int received) noexcept nogil:
    """One burst: judge what was received, answer it, and only then let go of the table."""
    cdef int i
    cdef size_t n = 0
    cdef size_t at
    cdef size_t length
    cdef size_t size
    cdef uint16_t kind
    cdef uint32_t mark
    cdef uint32_t ours = q.mark_egress | q.mark_ingress | q.mark_reply
    cdef const uint8_t *data
    cdef queued_t packet
    cdef verdict_t verdict
    worker_enter(q.worker)
    for i in range(received):
        data = <const uint8_t *> q.vectors[i].iov_base
        length = q.messages[i].msg_len
        if length > MESSAGE_SIZE:
            length = MESSAGE_SIZE
        at = 0
        while at + NLMSG_HEADER <= length:
            size = get_u32(data + at)
            if size < NLMSG_HEADER:
                n = skip(q, n)
                break
            if size > length - at:
                size = length - at              # cut short: the id comes first and is still there
            kind = get_u16(data + at + 4)
            if kind == (NFNL_SUBSYS_QUEUE << 8 | NFQNL_MSG_PACKET):
                if n == BURST:
                    answer(q, n)
                    n = 0
                if parse_packet(data + at, size, &packet):
                    packet.path.reply = 1 if packet.mark & q.mark_reply else 0
                    if packet.whole:
                        worker_judge(q.worker, packet.payload, packet.length, packet.wire,
                                     &packet.path, &verdict)
                    else:
                        count_up(&q.losses.unreadable)
                        worker_judge(q.worker, NULL, 0, 0, &packet.path, &verdict)
                        verdict.allow = q.worker.audit | q.worker.observer
                    # A verdict's mark replaces the packet's: give back what others put there.
                    mark = packet.mark & ~ours
                    if verdict.allow and q.offload:
                        if verdict.bits & BIT_EGRESS:
                            mark |= q.mark_egress
                        if verdict.bits & BIT_INGRESS:
                            mark |= q.mark_ingress
                    q.answers[n].id = packet.id
                    q.answers[n].verdict = NF_ACCEPT if verdict.allow else NF_DROP
                    q.answers[n].mark = mark if verdict.allow else 0
                    if is_answered(q.worker, &verdict):
                        # The rules behind the queue drop what has all three, and answer it.
                        q.answers[n].verdict = NF_ACCEPT
                        q.answers[n].mark = packet.mark | ours
                    n += 1
                    count_up(&q.losses.packets)
                else:
                    n = skip(q, n)
            elif kind == NLMSG_ERROR:
                read_error(q, data + at, size)
            at += (size + 3) & ~<size_t> 3
    answer(q, n)
    count_up(&q.losses.bursts)
    worker_leave(q.worker)


cdef int receive(queue_t *q, int flags) noexcept nogil:
    """Messages received, or minus errno."""
    cdef int n = recvmmsg(q.fd, q.messages, BURST, flags, NULL)
    return n if n >= 0 else -errno


cdef int loop(queue_t *q) noexcept nogil:
    """Until stopped: 0, or the errno that ended it."""
    cdef int n
    cdef int _round
    while not flag_read(&q.stopping):
        n = receive(q, MSG_WAITFORONE)
        if n > 0:
            handle(q, n)
        elif n == -ENOBUFS:
            count_up(&q.losses.overruns)
        elif n < 0 and n != -EINTR and n != -EAGAIN:
            return -n
    # Closing the socket drops what is still queued, so judge what has already been delivered.
    for _round in range(DRAIN_ROUNDS):
        n = receive(q, MSG_DONTWAIT)
        if n <= 0:
            break
        handle(q, n)
    return 0


cdef size_t put_attribute(uint8_t *at, uint16_t kind, const void *value, uint16_t size) noexcept nogil:
    cdef uint16_t length = <uint16_t> (size + 4)
    memcpy(at, &length, 2)
    memcpy(at + 2, &kind, 2)
    memcpy(at + 4, value, size)
    return (<size_t> length + 3) & ~<size_t> 3


@cython.final
@cython.auto_pickle(False)
cdef class NativeQueue:
    """One queue of the network namespace that `bind` is called in, judged by `worker`.

    bind, then run in a thread of its own; stop from any other thread; close after run returned.
    """

    cdef queue_t *q
    cdef readonly Worker worker
    cdef readonly int number
    cdef readonly int maxlen
    cdef readonly bint fail_open
    cdef readonly int portid

    def __cinit__(self, Worker worker, int number, *, unsigned int mark_egress, unsigned int mark_ingress,
                  unsigned int mark_reply, bint offload=True, bint fail_open=False, int maxlen=4096):
        cdef int i
        if not 0 <= number <= 65535:
            raise ValueError(f"queue {number}: a queue number is 0 to 65535")
        if not 1 <= maxlen <= 1 << 20:
            raise ValueError(f"queue length {maxlen}: must be 1 to {1 << 20}")
        self.worker = worker
        self.number = number
        self.maxlen = maxlen
        self.fail_open = fail_open
        self.q = <queue_t *> calloc(1, sizeof(queue_t))
        if self.q == NULL:
            raise MemoryError
        self.q.fd = -1
        self.q.buffers = <uint8_t *> calloc(BURST, MESSAGE_SIZE)
        if self.q.buffers == NULL:
            raise MemoryError
        self.q.number = <uint16_t> number
        self.q.offload = offload
        self.q.mark_egress = <uint32_t> mark_egress
        self.q.mark_ingress = <uint32_t> mark_ingress
        self.q.mark_reply = <uint32_t> mark_reply
        self.q.worker = &worker.c
        for i in range(BURST):
            self.q.vectors[i].iov_base = self.q.buffers + i * MESSAGE_SIZE
            self.q.vectors[i].iov_len = MESSAGE_SIZE
            self.q.messages[i].msg_hdr.msg_iov = &self.q.vectors[i]
            self.q.messages[i].msg_hdr.msg_iovlen = 1

    def __dealloc__(self):
        if self.q != NULL:
            if self.q.fd >= 0:
                close(self.q.fd)
            free(self.q.buffers)
            free(self.q)

    def bind(self):
        """Open the socket and take the queue. KernelError says who holds it or what is missing."""
        cdef sockaddr_nl_t address
        cdef unsigned int length = sizeof(address)
        cdef int one = 1
        cdef int room = self.maxlen * (SOCKET_BYTES // 2)    # the kernel doubles what it is given
        cdef uint8_t attributes[64]
        cdef uint32_t word
        cdef uint8_t command[4]
        cdef uint8_t params[5]
        cdef size_t used
        if self.q.fd >= 0:
            raise KernelError(f"queue {self.number} is bound already")
        self.q.stopping = 0
        self.q.unanswered = 0
        self.q.fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_NETFILTER)
        if self.q.fd < 0:
            raise KernelError(f"no netfilter netlink socket: {os.strerror(errno)}; the kernel needs "
                              "CONFIG_NETFILTER_NETLINK")
        try:
            # Connected to the kernel (port 0): no process can slip us a message.
            memset(&address, 0, sizeof(address))
            address.nl_family = AF_NETLINK
            if connect(self.q.fd, <const sockaddr *> &address, sizeof(address)) < 0:
                raise KernelError(f"queue {self.number}: netlink connect: {os.strerror(errno)}")
            if getsockname(self.q.fd, <sockaddr *> &address, &length) == 0:
                self.portid = <int> address.nl_pid
            if setsockopt(self.q.fd, SOL_SOCKET, SO_RCVBUFFORCE, &room, sizeof(room)) < 0:
                setsockopt(self.q.fd, SOL_SOCKET, SO_RCVBUF, &room, sizeof(room))
            # Without these two an overflow turns into a receive error per packet, and errors quote
            # the whole verdict message.
            setsockopt(self.q.fd, SOL_NETLINK, NETLINK_NO_ENOBUFS, &one, sizeof(one))
            setsockopt(self.q.fd, SOL_NETLINK, NETLINK_CAP_ACK, &one, sizeof(one))

            memset(command, 0, 4)
            command[0] = NFQNL_CFG_CMD_BIND
            used = put_attribute(attributes, NFQA_CFG_CMD, command, 4)
            word = htonl(<uint32_t> self.maxlen)
            used += put_attribute(attributes + used, NFQA_CFG_QUEUE_MAXLEN, &word, 4)
            word = htonl(NFQA_CFG_F_GSO | NFQA_CFG_F_FAIL_OPEN)
            used += put_attribute(attributes + used, NFQA_CFG_MASK, &word, 4)
            word = htonl(NFQA_CFG_F_GSO | (NFQA_CFG_F_FAIL_OPEN if self.fail_open else 0))
            used += put_attribute(attributes + used, NFQA_CFG_FLAGS, &word, 4)
            self.configure(attributes, used, "cannot be bound")
            # Last: until a copy mode is set the kernel queues nothing, so no packet can arrive on a
            # queue whose length and flags are not yet in force.
            word = htonl(COPY_RANGE)
            memcpy(params, &word, 4)
            params[4] = NFQNL_COPY_PACKET
            memset(attributes, 0, sizeof(attributes))
            used = put_attribute(attributes, NFQA_CFG_PARAMS, params, 5)
            self.configure(attributes, used, "cannot be set to copy packets")
        except BaseException:
            self.close()
            raise

    cdef configure(self, const uint8_t *attributes, size_t size, what):
        cdef uint8_t message[128]
        cdef nlmsghdr_t header
        cdef nfgenmsg_t family
        cdef int n
        cdef int failure = 0
        self.q.seq += 1
        self.q.acked = 0
        memset(&header, 0, sizeof(header))
        header.nlmsg_len = <uint32_t> (NLMSG_HEADER + NFGEN_HEADER + size)
        header.nlmsg_type = NFNL_SUBSYS_QUEUE << 8 | NFQNL_MSG_CONFIG
        header.nlmsg_flags = NLM_F_REQUEST | NLM_F_ACK
        header.nlmsg_seq = self.q.seq
        memset(&family, 0, sizeof(family))
        family.version = NFNETLINK_V0
        family.res_id = htons(self.q.number)
        memcpy(message, &header, NLMSG_HEADER)
        memcpy(message + NLMSG_HEADER, &family, NFGEN_HEADER)
        memcpy(message + NLMSG_HEADER + NFGEN_HEADER, attributes, size)
        if send(self.q.fd, message, header.nlmsg_len, 0) < 0:
            failure = errno
        # The kernel answers inside send; packets that came in between are judged like any other.
        while not failure and not self.q.acked:
            n = receive(self.q, MSG_DONTWAIT)
            if n > 0:
                handle(self.q, n)
            elif n != -EINTR:
                failure = -n
        if not failure:
            failure = self.q.ack_error
        if not failure:
            return
        holder = holder_of(self.number)
        if holder is not None and holder != self.portid:
            raise KernelError(
                f"queue {self.number} is held by another process (netlink port {holder}, usually its "
                "process id): stop it, or choose other queue numbers with --queue-base")
        if failure == errno_module.EPERM:
            raise KernelError(f"queue {self.number} {what}: needs root (CAP_NET_ADMIN) in this network "
                              "namespace")
        if failure in (errno_module.EINVAL, errno_module.EOPNOTSUPP):
            raise KernelError(f"queue {self.number} {what}: {os.strerror(failure)}; the kernel needs "
                              "CONFIG_NETFILTER_NETLINK_QUEUE and version 3.10 or later")
        raise KernelError(f"queue {self.number} {what}: {os.strerror(failure)}")

    def run(self):
        """Judge packets until `stop`. KernelError when the socket fails."""
        cdef int result
        if self.q.fd < 0:
            raise KernelError(f"queue {self.number} is not bound")
        with nogil:
            result = loop(self.q)
        if result:
            raise KernelError(f"queue {self.number}: receiving packets failed: {os.strerror(result)}")

    def stop(self):
        """Make `run` return after the packets already delivered. From any thread."""
        cdef nlmsghdr_t header
        flag_set(&self.q.stopping)
        if self.q.fd < 0:
            return
        # The thread blocks in recvmmsg, and a NOOP's ACK is a message like any other. If the
        # socket has no room for it, the thread is not blocked.
        memset(&header, 0, sizeof(header))
        header.nlmsg_len = NLMSG_HEADER
        header.nlmsg_type = NLMSG_NOOP
        header.nlmsg_flags = NLM_F_REQUEST | NLM_F_ACK
        header.nlmsg_seq = STOP_SEQ
        send(self.q.fd, &header, NLMSG_HEADER, 0)

    def close(self):
        """Give the queue back; the kernel drops what is still in it. Not while `run` runs."""
        if self.q.fd >= 0:
            close(self.q.fd)
            self.q.fd = -1

    def losses(self):
        """Packets and messages that went wrong, and how many bursts and packets there were."""
        return {
            "overruns": count_read(&self.q.losses.overruns),
            "unreadable": count_read(&self.q.losses.unreadable),
            "gone": count_read(&self.q.losses.gone),
            "refused": count_read(&self.q.losses.refused),
            "send_errors": count_read(&self.q.losses.send_errors),
            "bursts": count_read(&self.q.losses.bursts),
            "packets": count_read(&self.q.losses.packets),
        }


def holder_of(number):
    """The netlink port that holds the queue in this thread's network namespace, or None."""
    try:
        with open("/proc/thread-self/net/netfilter/nfnetlink_queue") as lines:
            for line in lines:
                fields = line.split()
                if len(fields) > 1 and fields[0] == str(number):
                    return int(fields[1])
    except (OSError, ValueError):
        pass
    return None


def parse(bytes message not None):
    """What the loop reads from one packet message, for tests: None where there is no id.

    Else (id, mark, indev, outdev, hook, payload, wire, whole).
    """
    cdef queued_t packet
    if not parse_packet(<const uint8_t *> message, len(message), &packet):
        return None
    payload = (<const char *> packet.payload)[:packet.length] if packet.payload != NULL else b""
    return (packet.id, packet.mark, packet.path.indev, packet.path.outdev, packet.path.hook, payload,
            packet.wire, bool(packet.whole))


def encode_answers(int number, answers, bint drop_older=False):
    """The bytes the loop sends for a burst of (id, accept, mark), for tests."""
    cdef verdict_message_t out[BURST + 1]
    cdef answer_t packed[BURST]
    cdef size_t count = 0
    if len(answers) > BURST:
        raise ValueError(f"a burst has at most {BURST} packets")
    for packet_id, accept, mark in answers:
        packed[count].id = packet_id
        packed[count].verdict = NF_ACCEPT if accept else NF_DROP
        packed[count].mark = mark
        count += 1
    count = encode(<uint16_t> number, packed, count, drop_older, NF_DROP, out)
    return (<const char *> out)[:count * sizeof(verdict_message_t)]
