/* An Ethernet switch between interfaces of one network namespace that keeps every frame for a fixed time.
 *
 *     delay_switch MICROSECONDS HOST_0_PORT HOST_1_PORT ...
 *
 * Addresses say where a frame goes: host i has the MAC address 02:ed:17:00:00:i (hosts.py sets it), so nothing is
 * learnt; any other destination (broadcast, multicast) goes to all other ports. Since all frames stay equally long,
 * one queue in order of arrival is enough. When it is full, frames wait in the sockets' buffers.
 * Frames pass with the kernel's offload header, so 64 KiB segments stay whole and checksums may be left to fill in.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <linux/virtio_net.h>
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>

enum { MAX_PORTS = 32, CAPACITY = 2048, HEADER = sizeof(struct virtio_net_hdr), FRAME = HEADER + 65536 + ETH_HLEN };

struct held {
    int64_t due_nanoseconds;
    int from, length;
    unsigned char bytes[FRAME];
};

static struct pollfd ports[MAX_PORTS];
static int num_ports;

static int64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000LL + time.tv_nsec;
}

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static int open_port(const char *name) {
    struct sockaddr_ll address = {.sll_family = AF_PACKET, .sll_protocol = htons(ETH_P_ALL)};
    int yes = 1, buffer_bytes = 32 << 20, port = socket(AF_PACKET, SOCK_RAW, 0);
    if (port < 0) fail("socket");
    if (!(address.sll_ifindex = if_nametoindex(name))) fail(name);
    if (setsockopt(port, SOL_PACKET, PACKET_VNET_HDR, &yes, sizeof yes)) fail("PACKET_VNET_HDR");
    if (setsockopt(port, SOL_PACKET, PACKET_IGNORE_OUTGOING, &yes, sizeof yes)) fail("PACKET_IGNORE_OUTGOING");
    if (setsockopt(port, SOL_SOCKET, SO_RCVBUFFORCE, &buffer_bytes, sizeof buffer_bytes)) fail("SO_RCVBUFFORCE");
    if (bind(port, (struct sockaddr *)&address, sizeof address)) fail("bind");
    return port;
}

static void forward(const struct held *frame) {
    static const unsigned char ours[5] = {0x02, 0xed, 0x17, 0x00, 0x00};
    const unsigned char *destination = frame->bytes + HEADER;
    int known = !memcmp(destination, ours, sizeof ours) && destination[5] < num_ports;
    for (int port = 0; port < num_ports; port++)
        if (port != frame->from && (!known || port == destination[5]))
            send(ports[port].fd, frame->bytes, frame->length, 0); /* a frame the port's queue drops is a lost frame */
}

int main(int argc, char **argv) {
    /* there at once: fresh memory would cost a page fault every 4 KiB while the hosts train on the same cores */
    struct held *queue = mmap(NULL, sizeof *queue * CAPACITY, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    uint64_t first = 0, end = 0; /* of what is held, modulo CAPACITY */
    num_ports = argc - 2;
    if (num_ports < 2 || num_ports > MAX_PORTS) {
        fprintf(stderr, "usage: delay_switch MICROSECONDS PORT PORT ... (at most %d ports)\n", MAX_PORTS);
        return 2;
    }
    if (queue == MAP_FAILED) fail("memory for the frames that are held");
    int64_t delay_nanoseconds = atoll(argv[1]) * 1000;
    for (int port = 0; port < num_ports; port++) ports[port].fd = open_port(argv[port + 2]);
    struct sched_param above_training = {.sched_priority = 1};
    if (sched_setscheduler(0, SCHED_FIFO, &above_training)) perror("no real-time priority, delays will vary");
    prctl(PR_SET_PDEATHSIG, SIGKILL); /* never left behind */
    puts("ready");
    fflush(stdout);
    for (;;) {
        for (int port = 0; port < num_ports; port++) ports[port].events = end - first < CAPACITY ? POLLIN : 0;
        int64_t wait = first < end ? queue[first % CAPACITY].due_nanoseconds - now() : 1000000000LL;
        struct timespec timeout = {wait > 0 ? wait / 1000000000LL : 0, wait > 0 ? wait % 1000000000LL : 0};
        if (ppoll(ports, num_ports, &timeout, NULL) < 0) fail("ppoll");
        for (int port = 0; port < num_ports; port++) {
            if (ports[port].revents & POLLERR) fail("a port is gone");
            while (ports[port].revents & POLLIN && end - first < CAPACITY) {
                struct held *frame = &queue[end % CAPACITY];
                frame->length = recv(ports[port].fd, frame->bytes, FRAME, MSG_DONTWAIT);
                if (frame->length < HEADER + ETH_HLEN) break;
                frame->due_nanoseconds = now() + delay_nanoseconds;
                frame->from = port;
                end++;
            }
        }
        while (first < end && queue[first % CAPACITY].due_nanoseconds <= now()) forward(&queue[first++ % CAPACITY]);
    }
}
