/* Traffic between two network namespaces from one process, so that its CPU time is all of it.
 *
 *   traffic CLIENT_NS SERVER_NS SERVER_IP udp SECONDS WINDOW FLOWS
 *       64-byte IP packets from FLOWS sockets in turn, at most WINDOW in flight: a packet counts
 *       when the server's socket has it, so nothing is measured that was dropped on the way. At
 *       real-time priority where it may: a node's packets come from softirq, which no process
 *       preempts; at ordinary priority the queue's thread preempts the sender every few packets.
 *   traffic CLIENT_NS SERVER_NS SERVER_IP tcp SECONDS
 *       one bulk transfer.
 *   traffic CLIENT_NS SERVER_NS SERVER_IP connect COUNT
 *       COUNT connections one after the other, each closed with a reset; the time of connect().
 *
 * IPv4, server ports 5000 (udp), 5001 (tcp), 5002..5009 (connect). Prints one JSON object.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { BATCH = 16, PAYLOAD = 36, MAX_FLOWS = 1024, CONNECT_PORTS = 8, BLOCK = 1 << 18 };

static struct sockaddr_in server = {.sin_family = AF_INET};

static void fail(const char *what)
{
	fprintf(stderr, "traffic: %s: %s\n", what, strerror(errno));
	exit(1);
}

static void enter(const char *name)
{
	char path[256];
	int fd;

	snprintf(path, sizeof(path), "/run/netns/%s", name);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0 || setns(fd, CLONE_NEWNET) < 0)
		fail(path);
	close(fd);
}

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

static double cpu(void)
{
	struct timespec t;

	clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

static int udp(const char *client_ns, const char *server_ns, double seconds, int window, int flows)
{
	static char data[BATCH][2048];
	static int out[MAX_FLOWS];
	struct iovec vectors[BATCH];
	struct mmsghdr sending[BATCH] = {0}, receiving[BATCH] = {0};
	long sent = 0, received = 0, lost = 0, flow = 0;
	double start, cpu0, end;
	int in, room = 8 << 20;

	if (flows < 1 || flows > MAX_FLOWS)
		flows = 1;
	sched_setscheduler(0, SCHED_FIFO, &(struct sched_param){.sched_priority = 1});
	enter(server_ns);
	in = socket(AF_INET, SOCK_DGRAM, 0);
	server.sin_port = htons(5000);
	setsockopt(in, SOL_SOCKET, SO_RCVBUFFORCE, &room, sizeof(room));
	if (bind(in, (void *)&server, sizeof(server)) < 0)
		fail("bind");
	enter(client_ns);
	for (int i = 0; i < flows; i++) {
		out[i] = socket(AF_INET, SOCK_DGRAM, 0);
		setsockopt(out[i], SOL_SOCKET, SO_SNDBUFFORCE, &room, sizeof(room));
		if (connect(out[i], (void *)&server, sizeof(server)) < 0)
			fail("connect");
	}
	for (int i = 0; i < BATCH; i++) {
		vectors[i] = (struct iovec){data[i], PAYLOAD};
		sending[i].msg_hdr.msg_iov = receiving[i].msg_hdr.msg_iov = &vectors[i];
		sending[i].msg_hdr.msg_iovlen = receiving[i].msg_hdr.msg_iovlen = 1;
	}
	start = now();
	cpu0 = cpu();
	end = start + seconds;
	/* Fill the window, then sleep while the node works: a sleep, not poll(), because waking at every
	 * packet that arrives would make the scheduler what is measured. */
	while (now() < end) {
		int n, idle = 0;

		while (sent - received - lost + BATCH <= window) {
			n = sendmmsg(out[flow++ % flows], sending, BATCH, 0);
			if (n < 0 && errno != ENOBUFS && errno != EAGAIN)
				fail("sendmmsg");
			if (n <= 0)
				break;
			sent += n;
		}
		while (sent - received - lost > window / 2) {
			long before = received;

			nanosleep(&(struct timespec){.tv_nsec = 200000}, NULL);
			while ((n = recvmmsg(in, receiving, BATCH, MSG_DONTWAIT, NULL)) > 0)
				received += n;
			idle = received == before ? idle + 1 : 0;
			if (idle == 500)
				lost = sent - received;    /* dropped on the way: free the window */
		}
	}
	printf("{\"packets\": %ld, \"lost\": %ld, \"seconds\": %.6f, \"cpu\": %.6f}\n", received, lost,
	       now() - start, cpu() - cpu0);
	return 0;
}

static int listener(int port)
{
	int fd = socket(AF_INET, SOCK_STREAM, 0), one = 1;

	server.sin_port = htons(port);
	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	if (bind(fd, (void *)&server, sizeof(server)) < 0 || listen(fd, 1024) < 0)
		fail("listen");
	return fd;
}

static volatile long total;

static void *drain(void *argument)
{
	static char block[BLOCK];
	int fd = accept(*(int *)argument, NULL, NULL);
	ssize_t n;

	while ((n = recv(fd, block, sizeof(block), 0)) > 0)
		total += n;
	return NULL;
}

static int tcp(const char *client_ns, const char *server_ns, double seconds)
{
	static char block[BLOCK];
	pthread_t thread;
	double start, cpu0, end;
	long bytes;
	int listening, fd;

	enter(server_ns);
	listening = listener(5001);
	if (pthread_create(&thread, NULL, drain, &listening))
		fail("thread");
	enter(client_ns);
	fd = socket(AF_INET, SOCK_STREAM, 0);
	if (connect(fd, (void *)&server, sizeof(server)) < 0)
		fail("connect");
	start = now();
	cpu0 = cpu();
	end = start + seconds;
	/* A sender blocked by a path that lets nothing through must still come to an end. */
	setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &(struct timeval){.tv_sec = 1}, sizeof(struct timeval));
	while (now() < end)
		if (send(fd, block, sizeof(block), 0) < 0 && errno != EAGAIN)
			fail("send");
	bytes = total;
	printf("{\"bytes\": %ld, \"seconds\": %.6f, \"cpu\": %.6f}\n", bytes, now() - start, cpu() - cpu0);
	setsockopt(fd, SOL_SOCKET, SO_LINGER, &(struct linger){1, 0}, sizeof(struct linger));
	close(fd);
	fflush(stdout);
	_exit(0);
}

static void *take(void *argument)
{
	struct pollfd *listening = argument;

	for (;;) {
		poll(listening, CONNECT_PORTS, -1);
		for (int i = 0; i < CONNECT_PORTS; i++) {
			int fd;

			if (listening[i].revents & POLLIN && (fd = accept(listening[i].fd, NULL, NULL)) >= 0)
				close(fd);
		}
	}
	return NULL;
}

static int order(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return (x > y) - (x < y);
}

static int connects(const char *client_ns, const char *server_ns, int count)
{
	static struct pollfd listening[CONNECT_PORTS];
	double *took = calloc(count, sizeof(double)), start, cpu0, seconds, used;
	pthread_t thread;

	enter(server_ns);
	for (int i = 0; i < CONNECT_PORTS; i++)
		listening[i] = (struct pollfd){.fd = listener(5002 + i), .events = POLLIN};
	if (pthread_create(&thread, NULL, take, listening))
		fail("thread");
	enter(client_ns);
	start = now();
	cpu0 = cpu();
	for (int i = 0; i < count; i++) {
		int fd = socket(AF_INET, SOCK_STREAM, 0);
		double before;

		server.sin_port = htons(5002 + i % CONNECT_PORTS);
		setsockopt(fd, SOL_SOCKET, SO_LINGER, &(struct linger){1, 0}, sizeof(struct linger));
		before = now();
		if (connect(fd, (void *)&server, sizeof(server)) < 0)
			fail("connect");
		took[i] = now() - before;
		close(fd);
	}
	seconds = now() - start;
	used = cpu() - cpu0;
	qsort(took, count, sizeof(double), order);
	printf("{\"connections\": %d, \"seconds\": %.6f, \"cpu\": %.6f, \"p50\": %.3f, \"p99\": %.3f}\n", count,
	       seconds, used, took[count / 2] * 1e6, took[(long)count * 99 / 100] * 1e6);
	fflush(stdout);
	_exit(0);
}

int main(int argc, char **argv)
{
	if (argc >= 6 && inet_aton(argv[3], &server.sin_addr)) {
		if (!strcmp(argv[4], "udp") && argc == 8)
			return udp(argv[1], argv[2], atof(argv[5]), atoi(argv[6]), atoi(argv[7]));
		if (!strcmp(argv[4], "tcp") && argc == 6)
			return tcp(argv[1], argv[2], atof(argv[5]));
		if (!strcmp(argv[4], "connect") && argc == 6 && atoi(argv[5]) > 0)
			return connects(argv[1], argv[2], atoi(argv[5]));
	}
	fprintf(stderr, "usage: traffic CLIENT_NS SERVER_NS SERVER_IP udp SECONDS WINDOW FLOWS | tcp SECONDS | connect COUNT\n");
	return 2;
}
