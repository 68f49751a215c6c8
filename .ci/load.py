#!/usr/bin/env python3
"""Load test: open many connections, and check that their resources are released.

    python3 .ci/load.py                     # the same as: 10000 100000 2000
    python3 .ci/load.py CONNECTIONS SHORT BURST

Opens CONNECTIONS idle connections twice, then SHORT connections one after another, then BURST
connections at the same moment. Prints the proxy's memory, descriptors and threads after each
step. Fails if the number of descriptors does not return to that of the idle proxy. Needs Linux,
because it reads /proc.
"""
import argparse
import contextlib
import os
import socket
import time

from bench import Target, resident_bytes, start_load, vaurien_command

import vaurien
from test_vaurien import TIMEOUT, send_and_read, wait_until


class LoadTest:
    """A proxy, and the number of descriptors that it has open while idle."""

    def __init__(self, stack):
        backend, clients = start_load(stack)
        self.proxy = Target(vaurien_command(), backend, clients, stack)
        with contextlib.ExitStack() as idle:
            self.proxy.open_idle(100, 0, idle)
        time.sleep(0.2)         # for the proxy to see that all connections are closed
        self.idle_fds = self.entries("fd")

    def entries(self, name):
        """Return the number of entries of a directory in /proc/PID."""
        return len(os.listdir("/proc/%d/%s" % (self.proxy.pid, name)))

    def memory(self):
        return resident_bytes(self.proxy.pid) / (1 << 20)

    def report(self, title):
        """Wait until the proxy is idle again, and print its figures."""
        wait_until(lambda: self.entries("fd") == self.idle_fds)
        print("%-50s %6.1f MiB, %d descriptors, %d threads" % (
            title, self.memory(), self.idle_fds, self.entries("task")), flush=True)

    def many_connections(self, count):
        """Open idle connections, and close them."""
        with contextlib.ExitStack() as stack:
            each = self.proxy.open_idle(count, 0, stack)
            print("%-50s %6.1f MiB, %.0f bytes each" % (
                "%d connections at once" % count, self.memory(), each), flush=True)
        self.report("after they have closed")

    def short_connections(self, count):
        """Make short connections, 16 at the same time, for five seconds at a time."""
        done = 0
        while done < count:
            done += int(5 * self.proxy.measure("connect", 16, 5)[0])
        self.report("after %d short connections" % done)

    def burst(self, count):
        """Start connections at the same moment, then make one exchange on each."""
        socks = [socket.socket() for _ in range(count)]
        for sock in socks:
            sock.setblocking(False)
            sock.connect_ex(("127.0.0.1", self.proxy.port))
        for sock in socks:
            sock.settimeout(TIMEOUT)
            send_and_read(sock, b"request")
            sock.close()
        self.report("after %d connections at the same moment" % count)


def main():
    parser = argparse.ArgumentParser(
        description="Open many connections to a proxy, and check that it releases them all.")
    parser.add_argument("connections", type=int, nargs="?", default=10000,
                        help="idle connections at once, as far as the limit of descriptors allows")
    parser.add_argument("short", type=int, nargs="?", default=100000,
                        help="connections one after another")
    parser.add_argument("burst", type=int, nargs="?", default=2000,
                        help="connections at the same moment")
    args = parser.parse_args()
    fds = vaurien.raise_fd_limit() or 1000
    with contextlib.ExitStack() as stack:
        test = LoadTest(stack)
        test.report("after 200 connections")
        for _ in range(2):
            test.many_connections(min(args.connections, (fds - 300) // 2))
        test.short_connections(args.short)
        test.burst(args.burst)


if __name__ == "__main__":
    main()
