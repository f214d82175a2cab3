/* The floor: the same netlink loop as ext/dataplane/_nfqueue.pyx, in plain C, that accepts all.
 *
 *   floor QUEUE MAXLEN MARK_OR MARK_CLEAR
 *
 * Binds QUEUE in the network namespace it is started in and accepts every packet with the mark
 * (packet mark & ~MARK_CLEAR) | MARK_OR. Same receive burst (64), copy range (256), GSO, buffers,
 * packed answers. Whatever an engine adds stands above this. Prints "ready" once bound.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <linux/netfilter.h>
#include <linux/netfilter/nfnetlink.h>
#include <linux/netfilter/nfnetlink_queue.h>
#include <linux/netlink.h>

enum { BURST = 64, MESSAGE_SIZE = 1024, COPY_RANGE = 256, SOCKET_BYTES = 2048 };

#pragma pack(push, 1)
struct verdict {
	struct nlmsghdr nl;
	struct nfgenmsg nf;
	uint16_t verdict_len, verdict_type;
	uint32_t verdict, id;
	uint16_t mark_len, mark_type;
	uint32_t mark;
};
#pragma pack(pop)

static int fd;
static uint16_t queue;

static void fail(const char *what)
{
	fprintf(stderr, "floor: queue %u: %s: %s\n", queue, what, strerror(errno));
	exit(1);
}

static size_t put(uint8_t *at, uint16_t kind, const void *value, uint16_t size)
{
	uint16_t length = size + 4;

	memcpy(at, &length, 2);
	memcpy(at + 2, &kind, 2);
	memcpy(at + 4, value, size);
	return (length + 3) & ~3;
}

/* One configuration message; what arrives with its ACK is lost, so nothing may be steered yet. */
static void configure(const uint8_t *attributes, size_t size)
{
	uint8_t message[128] = {0}, reply[4096];
	struct nlmsghdr *nl = (void *)message;
	struct nfgenmsg *nf = (void *)(message + 16);

	nl->nlmsg_len = 20 + size;
	nl->nlmsg_type = NFNL_SUBSYS_QUEUE << 8 | NFQNL_MSG_CONFIG;
	nl->nlmsg_flags = NLM_F_REQUEST | NLM_F_ACK;
	nf->res_id = htons(queue);
	memcpy(message + 20, attributes, size);
	if (send(fd, message, nl->nlmsg_len, 0) < 0 || recv(fd, reply, sizeof(reply), 0) < 20)
		fail("configuration");
	errno = -*(int32_t *)(reply + 16);
	if (errno)
		fail("configuration");
}

int main(int argc, char **argv)
{
	static uint8_t buffers[BURST][MESSAGE_SIZE];
	static struct verdict out[BURST];
	struct mmsghdr messages[BURST] = {0};
	struct iovec vectors[BURST];
	struct sockaddr_nl kernel = {.nl_family = AF_NETLINK};
	uint8_t attributes[64] = {0};
	uint32_t ids[BURST], marks[BURST], mark_or, mark_clear, maxlen, word;
	size_t used;
	int one = 1, room;

	if (argc != 5) {
		fprintf(stderr, "usage: floor QUEUE MAXLEN MARK_OR MARK_CLEAR\n");
		return 2;
	}
	queue = atoi(argv[1]);
	maxlen = atoi(argv[2]);
	mark_or = strtoul(argv[3], NULL, 0);
	mark_clear = strtoul(argv[4], NULL, 0);
	room = maxlen * (SOCKET_BYTES / 2);

	fd = socket(AF_NETLINK, SOCK_RAW, NETLINK_NETFILTER);
	if (fd < 0 || connect(fd, (void *)&kernel, sizeof(kernel)) < 0)
		fail("socket");
	if (setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &room, sizeof(room)) < 0)
		fail("SO_RCVBUFFORCE");
	setsockopt(fd, SOL_NETLINK, NETLINK_NO_ENOBUFS, &one, sizeof(one));

	used = put(attributes, NFQA_CFG_CMD, &(struct nfqnl_msg_config_cmd){.command = NFQNL_CFG_CMD_BIND}, 4);
	word = htonl(maxlen);
	used += put(attributes + used, NFQA_CFG_QUEUE_MAXLEN, &word, 4);
	word = htonl(NFQA_CFG_F_GSO);
	used += put(attributes + used, NFQA_CFG_MASK, &word, 4);
	used += put(attributes + used, NFQA_CFG_FLAGS, &word, 4);
	configure(attributes, used);
	memset(attributes, 0, sizeof(attributes));
	used = put(attributes, NFQA_CFG_PARAMS,
		   &(struct nfqnl_msg_config_params){.copy_range = htonl(COPY_RANGE), .copy_mode = NFQNL_COPY_PACKET}, 5);
	configure(attributes, used);

	for (int i = 0; i < BURST; i++) {
		vectors[i] = (struct iovec){buffers[i], MESSAGE_SIZE};
		messages[i].msg_hdr.msg_iov = &vectors[i];
		messages[i].msg_hdr.msg_iovlen = 1;
		out[i].nl.nlmsg_len = sizeof(struct verdict);
		out[i].nl.nlmsg_flags = NLM_F_REQUEST;
		out[i].nf.res_id = htons(queue);
		out[i].verdict_len = 12;
		out[i].verdict_type = NFQA_VERDICT_HDR;
		out[i].verdict = htonl(NF_ACCEPT);
		out[i].mark_len = 8;
		out[i].mark_type = NFQA_MARK;
	}
	puts("ready");
	fflush(stdout);

	for (;;) {
		int received = recvmmsg(fd, messages, BURST, MSG_WAITFORONE, NULL);
		int n = 0, count = 0;

		if (received < 0) {
			if (errno == EINTR || errno == ENOBUFS)
				continue;
			fail("recvmmsg");
		}
		for (int i = 0; i < received; i++) {
			const struct nlmsghdr *nl = (void *)buffers[i];
			uint32_t length = messages[i].msg_len, at = 20, mark = 0, id = 0;
			int has_id = 0;

			if (length < 20 || nl->nlmsg_type != (NFNL_SUBSYS_QUEUE << 8 | NFQNL_MSG_PACKET))
				continue;
			while (at + 4 <= length) {
				uint16_t size = *(uint16_t *)(buffers[i] + at);
				uint16_t kind = *(uint16_t *)(buffers[i] + at + 2) & 0x3FFF;

				if (size < 4 || size > length - at)
					break;
				if (kind == NFQA_PACKET_HDR && size >= 11) {
					id = ntohl(*(uint32_t *)(buffers[i] + at + 4));
					has_id = 1;
				} else if (kind == NFQA_MARK && size >= 8) {
					mark = ntohl(*(uint32_t *)(buffers[i] + at + 4));
				}
				at += (size + 3) & ~3;
			}
			if (!has_id)
				continue;
			ids[n] = id;
			marks[n++] = (mark & ~mark_clear) | mark_or;
		}
		for (int i = 0; i < n; i++) {
			int first = i;

			while (i + 1 < n && marks[i + 1] == marks[first])
				i++;
			out[count].nl.nlmsg_type = NFNL_SUBSYS_QUEUE << 8 |
				(i == first ? NFQNL_MSG_VERDICT : NFQNL_MSG_VERDICT_BATCH);
			out[count].id = htonl(ids[i]);
			out[count++].mark = htonl(marks[first]);
		}
		if (count && send(fd, out, count * sizeof(struct verdict), 0) < 0)
			fail("send");
	}
}
