/* The backend and the clients of bench.py, in C, so that they take less time than any proxy.

   generator backend    print the backend's port, and serve until the process is killed
   generator client     do the jobs on stdin. Each is a line "WORKLOAD PORT CONNECTIONS SECONDS";
                        the result is a line of JSON: [units done, seconds, median latency, 99th
                        percentile]. A unit is an exchange, or a MiB of "bulk" */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MIB (1 << 20)
#define MAX_EVENTS 256
#define MAX_LATENCIES (1 << 22)

typedef struct { const char *name, *request, *reply; size_t request_size, reply_size; } Exchange;

#define EXCHANGE(name, request, reply) {name, request, reply, sizeof request - 1, sizeof reply - 1}
static const Exchange EXCHANGES[] = {
    EXCHANGE("redis", "*2\r\n$3\r\nGET\r\n$7\r\nuser:42\r\n", "$5\r\nhello\r\n"),
    EXCHANGE("http",
             "GET /cart HTTP/1.1\r\nHost: localhost:8000\r\nAccept: */*\r\nUser-Agent: bench\r\n\r\n",
             "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 5\r\n\r\nhello"),
};
static const char ZEROS[64], STREAM_REQUEST[] = "stream";
static const Exchange ECHO = {"tcp", ZEROS, ZEROS, sizeof ZEROS, sizeof ZEROS};

static char buffer[MIB];
static const char zeros[MIB];
static int poller;
static struct epoll_event events[MAX_EVENTS];

static void fail(const char *what) { perror(what); exit(1); }

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static int new_socket(void) {
    int one = 1, sock = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (sock < 0) fail("socket");
    setsockopt(sock, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    return sock;
}

static void watch(int sock, uint32_t mask, uint64_t data, int change) {
    struct epoll_event event = {.events = mask, .data.u64 = data};
    if (epoll_ctl(poller, change ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, sock, &event)) fail("epoll_ctl");
}

/* -- Backend ------------------------------------------------------------------------------- */

static void send_reply(int sock, ssize_t size) {
    const Exchange *exchange = NULL;
    for (size_t i = 0; i < sizeof EXCHANGES / sizeof *EXCHANGES; i++)
        if (buffer[0] == EXCHANGES[i].request[0]) exchange = &EXCHANGES[i];
    if (exchange)
        send(sock, exchange->reply, exchange->reply_size, MSG_NOSIGNAL);
    else
        send(sock, buffer, size, MSG_NOSIGNAL);
}

static void run_backend(void) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof address;
    int listener = new_socket();
    if (bind(listener, (void *)&address, length) || listen(listener, 4096)) fail("listen");
    getsockname(listener, (void *)&address, &length);
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);
    watch(listener, EPOLLIN, listener, 0);
    for (;;) {
        int count = epoll_wait(poller, events, MAX_EVENTS, -1);
        for (int i = 0; i < count; i++) {
            int sock = events[i].data.u64, one = 1;
            if (sock == listener) {
                while ((sock = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
                    setsockopt(sock, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
                    watch(sock, EPOLLIN, sock, 0);
                }
                continue;
            }
            if (events[i].events & EPOLLOUT) {      /* a stream of zeros without an end */
                if (send(sock, zeros, sizeof zeros, MSG_NOSIGNAL) < 0 && errno != EAGAIN)
                    close(sock);
                continue;
            }
            ssize_t size = recv(sock, buffer, sizeof buffer, 0);
            if (size == 0 || (size < 0 && errno != EAGAIN))
                close(sock);
            else if (size > 0 && memcmp(buffer, STREAM_REQUEST, strlen(STREAM_REQUEST)) == 0)
                watch(sock, EPOLLOUT, sock, 1);
            else if (size > 0)
                send_reply(sock, size);
        }
    }
}

/* -- Clients -------------------------------------------------------------------------------- */

typedef struct { int sock; size_t missing; double began; } Slot;    /* one exchange under way */

static float latencies[MAX_LATENCIES];
static size_t latency_count;

static void add_latency(double seconds) {
    if (latency_count < MAX_LATENCIES) latencies[latency_count++] = seconds;
}

static int compare(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

static void start_connect(Slot *slot, int index, int port, size_t reply_size, uint32_t mask) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port),
                                  .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    slot->began = now();
    slot->missing = reply_size;
    slot->sock = new_socket();
    if (connect(slot->sock, (void *)&address, sizeof address) && errno != EINPROGRESS)
        fail("connect");
    watch(slot->sock, mask, index, 0);
}

static void end_connection(Slot *slot, int with_reset) {
    struct linger linger = {1, 0};
    if (with_reset) setsockopt(slot->sock, SOL_SOCKET, SO_LINGER, &linger, sizeof linger);
    close(slot->sock);
}

/* Connect all slots, send a request on each, and read its reply, before the time starts. A stream is
   not read yet. Short connections only begin to connect. */
static void open_slots(Slot *slots, int count, int port, const Exchange *exchange, int short_lived) {
    for (int i = 0; i < count; i++)
        start_connect(&slots[i], i, port, exchange->reply_size, short_lived ? EPOLLOUT : EPOLLIN);
    if (short_lived) return;
    for (int i = 0; i < count; i++) {
        while (send(slots[i].sock, exchange->request, exchange->request_size, MSG_NOSIGNAL) < 0)
            if (errno != EAGAIN && errno != ENOTCONN) fail("send");
    }
    for (int i = 0; i < count && exchange->reply_size > 1; i++) {
        size_t missing = exchange->reply_size;
        while (missing) {
            ssize_t size = recv(slots[i].sock, buffer, missing, 0);
            if (size == 0 || (size < 0 && errno != EAGAIN)) fail("recv");
            if (size > 0) missing -= size;
        }
    }
}

static void send_request(Slot *slot, const Exchange *exchange) {
    slot->missing = exchange->reply_size;
    if (send(slot->sock, exchange->request, exchange->request_size, MSG_NOSIGNAL) < 0) fail("send");
}

/* Run a workload. Returns the number of exchanges, or the MiB of the workload "bulk". */
static double run_workload(const char *name, int port, int count, double seconds, double *elapsed) {
    int bulk = !strcmp(name, "bulk"), reset = !strcmp(name, "reset");
    int short_lived = reset || !strcmp(name, "connect");
    Exchange exchange = ECHO;
    for (size_t i = 0; i < sizeof EXCHANGES / sizeof *EXCHANGES; i++)
        if (!strcmp(name, EXCHANGES[i].name)) exchange = EXCHANGES[i];
    if (bulk)
        exchange = (Exchange){"bulk", STREAM_REQUEST, zeros, strlen(STREAM_REQUEST), 1};
    Slot *slots = calloc(count, sizeof *slots);
    poller = epoll_create1(0);
    latency_count = 0;
    open_slots(slots, count, port, &exchange, short_lived);
    double began = now(), end = began + seconds, done = 0, t;
    for (int i = 0; i < count && !short_lived && !bulk; i++) {
        slots[i].began = now();
        send_request(&slots[i], &exchange);
    }
    while ((t = now()) < end) {
        int ready = epoll_wait(poller, events, MAX_EVENTS, (int)(1000 * (end - t)) + 1);
        for (int k = 0; k < ready; k++) {
            int i = events[k].data.u64;
            Slot *slot = &slots[i];
            if (events[k].events & EPOLLOUT) {      /* connected */
                watch(slot->sock, EPOLLIN, i, 1);
                send_request(slot, &exchange);
                continue;
            }
            ssize_t size = recv(slot->sock, buffer, sizeof buffer, 0);
            if (size < 0 && errno == EAGAIN) continue;
            if (size <= 0) fail("the proxy closed a connection: recv");
            if (bulk) {
                done += (double)size / MIB;
                continue;
            }
            slot->missing -= (size_t)size < slot->missing ? (size_t)size : slot->missing;
            if (slot->missing) continue;
            double time = now();
            done++;
            if (!short_lived) {
                add_latency(time - slot->began);
                slot->began = time;
                send_request(slot, &exchange);
                continue;
            }
            end_connection(slot, reset);
            add_latency(time - slot->began);
            start_connect(slot, i, port, exchange.reply_size, EPOLLOUT);
        }
    }
    *elapsed = now() - began;
    for (int i = 0; i < count; i++) end_connection(&slots[i], reset);
    close(poller);
    free(slots);
    return done;
}

static void run_client(void) {
    char name[16];
    int port, count;
    double seconds, elapsed;
    while (scanf("%15s %d %d %lf", name, &port, &count, &seconds) == 4) {
        double done = run_workload(name, port, count, seconds, &elapsed), median = 0, late = 0;
        qsort(latencies, latency_count, sizeof *latencies, compare);
        if (latency_count) {
            median = latencies[latency_count / 2];
            late = latencies[latency_count * 99 / 100];
        }
        printf("[%.6f, %.6f, %.9f, %.9f]\n", done, elapsed, median, late);
        fflush(stdout);
    }
}

int main(int argc, char **argv) {
    struct rlimit limit;
    signal(SIGPIPE, SIG_IGN);
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    if (argc == 2 && !strcmp(argv[1], "client")) {
        run_client();
        return 0;
    }
    poller = epoll_create1(0);
    run_backend();
}
