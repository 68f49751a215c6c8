#!/usr/bin/env python3
"""Benchmark of vaurien and of other TCP proxies in front of the same backend.

    python3 .ci/bench.py            # five rounds
    python3 .ci/bench.py --quick    # two short rounds: about half a minute

The other proxies are haproxy, nginx, socat and toxiproxy-server, if they are installed. "bare"
is a forwarder in Python that makes the necessary system calls and nothing else: the limit of
what Python can do. "direct" is a connection to the backend without a proxy.

The table shows the medians of all rounds, and two ratios for each other proxy: its rate, and its
CPU time for each unit of work. Only ratios can be compared between machines.

Each round starts new proxy processes, because the memory layout of a process affects its
speed. Each round has a random order of its own, because the proxy that is measured before has an
effect: in a fixed order, two processes with the same code differed by a quarter. The backend and
the clients are generator.c, so a C compiler is needed, and Linux.
"""
import argparse
import contextlib
import json
import os
import random
import select
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict, namedtuple

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))

import vaurien  # noqa: E402
from test_vaurien import (  # noqa: E402
    FILE,
    connect,
    cpu_seconds,
    descendants,
    find_program,
    send_and_read,
    unused_port,
    wait_until,
)

MIB = 1 << 20
REQUEST = bytes(64)             # the backend echoes it
STREAM_REQUEST = b"stream"      # the reply is an endless stream of zeros


# -- Bare ---------------------------------------------------------------------

def run_bare(port, backend):
    """Forward between clients of a port and the backend: no half-close, no full buffers."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen(4096)
    listener.setblocking(False)
    poller, peers, buffer = select.epoll(), {}, bytearray(1 << 18)
    view = memoryview(buffer)
    poller.register(listener, select.POLLIN)
    while True:
        for fd, _ in poller.poll():
            if fd == listener.fileno():
                accept_bare(listener, backend, poller, peers)
            elif fd in peers and not forward_bare(*peers[fd], buffer, view):
                for sock in peers[fd]:
                    del peers[sock.fileno()]
                    sock.close()


def accept_bare(listener, backend, poller, peers):
    """Accept all clients that wait, and connect to the backend for each."""
    with contextlib.suppress(BlockingIOError):
        while True:
            client = listener.accept()[0]
            client.setblocking(False)
            server = socket.socket()
            server.setblocking(False)
            server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            server.connect_ex(("127.0.0.1", backend))
            for source, target in (client, server), (server, client):
                peers[source.fileno()] = source, target
                poller.register(source, select.POLLIN)


def forward_bare(source, target, buffer, view):
    """Forward once. Returns whether the connection goes on."""
    try:
        size = source.recv_into(buffer)
        target.send(view[:size])
        return size > 0
    except BlockingIOError:
        return True
    except OSError:
        return False


# -- Processes ----------------------------------------------------------------

def start_generator(stack, program, role):
    """Start generator.c in a role; the stack kills it. Returns the Popen."""
    process = subprocess.Popen([program, role], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               universal_newlines=True)
    for function in process.stdout.close, process.wait, process.kill, process.stdin.close:
        stack.callback(function)        # called in reverse order
    return process


def start_load(stack):
    """Start the backend and the clients. Returns (the backend's port, the process of clients)."""
    compiler = find_program("cc") or find_program("gcc")
    if not compiler:
        sys.exit("a C compiler is needed, for generator.c: install gcc")
    program = os.path.join(stack.enter_context(tempfile.TemporaryDirectory()), "generator")
    subprocess.check_call([compiler, "-O2", "-o", program, os.path.join(HERE, "generator.c")])
    backend = start_generator(stack, program, "backend")
    return int(backend.stdout.readline()), start_generator(stack, program, "client")


def resident_bytes(pid):
    """Return the resident memory of a process and its descendants (man 5 proc, statm)."""
    total = 0
    for process in descendants(pid):
        with contextlib.suppress(OSError), open("/proc/%d/statm" % process) as file:
            total += int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return total


# Proxies. A function (folder, port, backend) writes the configuration of a proxy to a folder,
# and returns the command that starts it on a port, in front of the backend's port.

def vaurien_command(*options):
    """Return such a function for vaurien with these options."""
    def command(folder, port, backend):
        return [sys.executable, FILE, "--local", "127.0.0.1:%d" % port, "--distant",
                "127.0.0.1:%d" % backend, "--log-level", "error", *options]
    return command


def write_config(folder, text):
    path = os.path.join(folder, "config")
    with open(path, "w") as file:
        file.write(text)
    return path


def haproxy_command(folder, port, backend):
    return [find_program("haproxy"), "-db", "-f", write_config(folder, """
global
    nbthread 1
    maxconn 5000
defaults
    mode tcp
    timeout connect 5s
    timeout client 1h
    timeout server 1h
listen all
    bind 127.0.0.1:%d
    server one 127.0.0.1:%d
""" % (port, backend))]


def nginx_command(folder, port, backend):
    module = "/usr/lib/nginx/modules/ngx_stream_module.so"
    load = "load_module %s;" % module if os.path.exists(module) else ""
    return [find_program("nginx"), "-p", folder, "-c", write_config(folder, """
%s
worker_processes 1;
daemon off;
pid %s/nginx.pid;
error_log /dev/null crit;
events { worker_connections 20000; }
stream { server { listen 127.0.0.1:%d; proxy_pass 127.0.0.1:%d; tcp_nodelay on; } }
""" % (load, folder, port, backend))]


def socat_command(folder, port, backend):
    listen = "TCP-LISTEN:%d,bind=127.0.0.1,fork,reuseaddr,nodelay,backlog=1000" % port
    return [find_program("socat"), listen, "TCP:127.0.0.1:%d,nodelay" % backend]


def toxiproxy_command(folder, port, backend):
    config = [{"name": "p", "listen": "127.0.0.1:%d" % port,
               "upstream": "127.0.0.1:%d" % backend}]
    return [*TOXIPROXY, "-port", str(unused_port()),
            "-config", write_config(folder, json.dumps(config))]


# Each proxy has one thread. Toxiproxy gets this variable for Go's runtime.
TOXIPROXY = ["env", "GOMAXPROCS=1", find_program("toxiproxy-server") or ""]


def bare_command(folder, port, backend):
    return [sys.executable, os.path.abspath(__file__), "--bare", str(port), str(backend)]


OTHER_PROXIES = {       # {name: (program, function)}
    "bare": (sys.executable, bare_command),
    "haproxy": ("haproxy", haproxy_command),
    "nginx": ("nginx", nginx_command),
    "socat": ("socat", socat_command),
    "toxiproxy": ("toxiproxy-server", toxiproxy_command),
}


def two_processes(*argv):
    """Return a function that returns the command of two processes of vaurien on one port."""
    def command(folder, port, backend):
        script = """
            "$@" --reuse-port 1 & one=$!
            "$@" --reuse-port 2 & two=$!
            trap "kill $one $two" TERM
            wait
        """
        return ["sh", "-c", script, "sh", *vaurien_command(*argv)(folder, port, backend)]
    return command


VAURIEN_MODES = {       # {name: function}
    "vaurien": vaurien_command(),
    "20:delay": vaurien_command("--behavior", "20:delay", "--handlers.delay.sleep", "0"),
    "redis": vaurien_command("--protocol", "redis"),
    "http": vaurien_command("--protocol", "http"),
    "two": two_processes(),
    "redis, two": two_processes("--protocol", "redis"),
}
# Requests that begin with "wait" are delayed by an hour; all others pass.
CROWD_COMMAND = vaurien_command("--behavior", "100:delay", "--handlers.delay.sleep", "3600",
                                "--handlers.delay.match", "^wait")


class Target:
    """A port under test: that of a new proxy process, or of the backend itself.

    command    a function like vaurien_command(), or None for the backend
    """

    def __init__(self, command, backend, clients, stack):
        self.port, self.pid, self.clients = backend, None, clients
        if command:
            self.start(command, backend, stack)

    def start(self, command, backend, stack):
        folder = tempfile.mkdtemp()
        stack.callback(shutil.rmtree, folder, True)
        self.port = unused_port()
        self.run(command(folder, self.port, backend), stack)
        wait_until(self.accepts)

    def run(self, command, stack):
        """Run the command of a proxy; the stack ends it."""
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        stack.callback(process.wait)
        stack.callback(process.terminate)
        self.pid = process.pid

    def accepts(self):
        with contextlib.suppress(OSError):
            connect(self.port).close()
            return True
        return False

    def measure(self, workload, connections, seconds):
        """Run a workload on this number of connections.

        Returns (units per second, CPU microseconds per unit, median latency in ms, 99th
        percentile in ms).
        """
        cpu = cpu_seconds(self.pid) if self.pid else 0
        print(workload, self.port, connections, seconds, file=self.clients.stdin, flush=True)
        done, elapsed, median, late = json.loads(self.clients.stdout.readline())
        cpu = cpu_seconds(self.pid) - cpu if self.pid else 0
        return done / elapsed, cpu / max(done, 1) * 1e6, 1000 * median, 1000 * late

    def open_idle(self, count, waiting, stack):
        """Open idle connections, which the stack closes.

        waiting    how many of them send "wait"

        Returns how many bytes of memory each one costs the proxy.
        """
        for _ in range(100):        # the first connections also allocate memory that stays
            send_and_read(stack.enter_context(contextlib.closing(connect(self.port))), b"hello")
        before = resident_bytes(self.pid)
        for index in range(count):
            sock = stack.enter_context(contextlib.closing(connect(self.port)))
            if index < waiting:
                sock.sendall(b"wait")
            else:
                send_and_read(sock, b"hello")
        return (resident_bytes(self.pid) - before) / count


# -- Measurements -------------------------------------------------------------

# Arguments of Target.measure; `modes` of vaurien that are measured too; `others` is whether
# the other proxies are.
Workload = namedtuple("Workload", "title name connections unit modes others")
WORKLOADS = [
    Workload("round trips, 1 connection", "tcp", 1, "/s", ["20:delay"], True),
    Workload("round trips, 50 connections", "tcp", 50, "/s", ["20:delay", "two"], True),
    Workload("bulk, 1 connection", "bulk", 1, "MiB/s", [], True),
    Workload("bulk, 8 connections", "bulk", 8, "MiB/s", [], True),
    Workload("connect, request, close", "connect", 16, "/s", ["two"], True),
    Workload("connect, request, reset", "reset", 16, "/s", [], True),
    Workload("redis, 1 connection", "redis", 1, "/s", ["redis"], False),
    Workload("redis, 50 connections", "redis", 50, "/s", ["redis", "redis, two"], False),
    Workload("http, 1 connection", "http", 1, "/s", ["http"], False),
    Workload("http, 50 connections", "http", 50, "/s", ["http"], False),
]
# The same toxics of Vaurien and Toxiproxy, on many connections: see ToxicTarget.
ToxicWorkload = namedtuple("ToxicWorkload", "title name connections unit toxic")
LATENCY = {"type": "latency", "attributes": {"latency": 10}}
BANDWIDTH = {"type": "bandwidth", "attributes": {"rate": 10}}
TOXIC_WORKLOADS = [
    ToxicWorkload("latency 10, 100 connections", "tcp", 100, "/s", LATENCY),
    ToxicWorkload("latency 10, 1000", "tcp", 1000, "/s", LATENCY),
    ToxicWorkload("bandwidth 10, 1000", "tcp", 1000, "/s", BANDWIDTH),
    ToxicWorkload("bandwidth 10, 5000", "tcp", 5000, "/s", BANDWIDTH),
    ToxicWorkload("bandwidth 10, 5000, bulk", "bulk", 5000, "MiB/s", BANDWIDTH),
]
CROWD = 10000               # connections beside the one that is measured
CROWD_WAITING = 1000        # and those of them that have a delayed request

# How long to measure. The rounds and seconds are of the workloads, of those with a toxic, of the
# crowd and of the faults.
#
# idle     idle connections whose memory is measured
# crowd    part of CROWD
# trips    round trips with and without a latency
# rates    of `bandwidth`, in KB/s
Extent = namedtuple("Extent", "rounds seconds toxic_rounds toxic_seconds crowd_rounds "
                              "fault_rounds fault_seconds idle crowd trips rates")
FULL = Extent(rounds=5, seconds=0.8, toxic_rounds=3, toxic_seconds=3, crowd_rounds=5,
              fault_rounds=7, fault_seconds=3, idle=1000, crowd=1.0, trips=200,
              rates=(100, 10000, 100000))
QUICK = Extent(rounds=2, seconds=0.1, toxic_rounds=1, toxic_seconds=0.3, crowd_rounds=1,
               fault_rounds=1, fault_seconds=0.5, idle=500, crowd=0.2, trips=30, rates=(10000,))


class Bench:
    """The backend, the clients, and the measurements with them."""

    def __init__(self, extent, stack):
        self.extent = extent
        self.backend, self.clients = start_load(stack)
        self.commands = dict(VAURIEN_MODES, direct=None)
        self.others = ["direct"]
        for name, (program, command) in OTHER_PROXIES.items():
            if find_program(program):
                self.commands[name] = command
                self.others.append(name)

    def target(self, name, stack):
        return Target(self.commands[name], self.backend, self.clients, stack)

    def names(self, workload):
        """Return the names of the targets of a workload."""
        modes = [mode for mode in workload.modes if mode in VAURIEN_MODES]
        return ["vaurien", *modes, *(self.others if workload.others else ())]

    def workloads(self):
        """Run all workloads. Returns {(title, name): medians of Target.measure}."""
        results = defaultdict(list)
        for index in range(self.extent.rounds):
            with contextlib.ExitStack() as stack:
                targets = {name: self.target(name, stack) for name in self.commands}
                for workload in WORKLOADS:
                    show_progress("round %d of %d: %s" % (index + 1, self.extent.rounds,
                                                          workload.title))
                    names = self.names(workload)
                    random.Random("%d %s" % (index, workload.title)).shuffle(names)
                    for name in names:
                        results[workload.title, name].append(targets[name].measure(
                            workload.name, workload.connections, self.extent.seconds))
        return {key: medians(rows) for key, rows in results.items()}

    def memory(self):
        """Return {name: KiB for each idle connection}, without `bare`, and socat, which forks."""
        kib = {}
        for name in self.commands:
            if name in ("vaurien", *self.others) and name not in ("direct", "bare", "socat"):
                with contextlib.ExitStack() as stack:
                    show_progress("memory: %s" % name)
                    kib[name] = self.target(name, stack).open_idle(
                        self.extent.idle, 0, stack) / 1024
        return kib

    def toxics(self):
        """Run the workloads with a toxic. Returns {(title, name): medians of Target.measure}."""
        commands = {"vaurien": [sys.executable, FILE, "serve", "--log-level", "error"]}
        if "toxiproxy" in self.commands:
            commands["toxiproxy"] = TOXIPROXY
        results = defaultdict(list)
        for index in range(self.extent.toxic_rounds):
            for title, workload, connections, _, toxic in TOXIC_WORKLOADS:
                show_progress("round %d of %d: %s" % (index + 1, self.extent.toxic_rounds, title))
                for name in list(commands)[::-1 if index % 2 else 1]:
                    with contextlib.ExitStack() as stack:
                        target = ToxicTarget(commands[name], self.backend, self.clients, stack)
                        target.add_toxic(toxic)
                        results[title, name].append(target.measure(
                            workload, connections, self.extent.toxic_seconds))
        return {key: medians(rows) for key, rows in results.items()}

    def crowd(self, stack):
        """Measure round trips on one connection beside many idle ones.

        Returns (title, text of the figures).
        """
        fds = vaurien.raise_fd_limit() or 1000
        count = min(int(CROWD * self.extent.crowd), fds // 2 - 200)
        waiting = count * CROWD_WAITING // CROWD
        alone, crowded = (Target(CROWD_COMMAND, self.backend, self.clients, stack)
                          for _ in range(2))
        show_progress("%d connections" % count)
        crowded.open_idle(count, waiting, stack)
        rows = [target.measure("tcp", 1, self.extent.seconds)
                for _ in range(self.extent.crowd_rounds) for target in (alone, crowded)]
        (alone_rate, alone_cpu, *_), (rate, cpu, *_) = medians(rows[::2]), medians(rows[1::2])
        return ("1 connection beside %d, %d delayed" % (count, waiting),
                "%.0f /s, %.1f us CPU; alone %.0f /s, %.1f us: %.2f"
                % (rate, cpu, alone_rate, alone_cpu, rate / alone_rate))

    def faults(self, stack):
        """Measure how exact the faults are. Yields (title, text of the figure)."""
        results, control_port = defaultdict(list), unused_port()
        command = vaurien_command("--http", "--http-host", "127.0.0.1", "--http-port",
                                  str(control_port))
        proxy = FaultTarget(command, self.backend, self.clients, stack)
        proxy.control = vaurien.Client("127.0.0.1", control_port)
        for index in range(self.extent.fault_rounds):
            show_progress("faults, round %d of %d" % (index + 1, self.extent.fault_rounds))
            for name, value in self.fault_round(proxy):
                results[name].append(value)
        result = {name: statistics.median_high(values) for name, values in results.items()}
        yield "latency of 10 ms adds to a round trip", "%.3f ms" % result["added"]
        yield ("one connection with it, against without",
               "%.2f GB/s, %.2f" % (result["delayed bulk"] / 1e6, result["ratio"]))
        for rate in self.extent.rates:
            yield "bandwidth of %d KB/s is off by" % rate, "%+.2f %%" % result[rate]

    def fault_round(self, proxy):
        """Measure each fault once. Yields (name, value); the name of a rate is a number."""
        trips, seconds = self.extent.trips, self.extent.fault_seconds
        proxy.set_fault("dummy")
        latency, bulk = proxy.latency(10 * trips), proxy.bulk_rate(seconds)
        proxy.set_fault("latency", latency=10)
        yield "added", proxy.latency(trips) - latency
        delayed = proxy.bulk_rate(seconds)
        yield "delayed bulk", delayed
        yield "ratio", delayed / bulk
        for rate in self.extent.rates:
            proxy.set_fault("bandwidth", rate=rate)
            yield rate, 100 * (proxy.bulk_rate(seconds) / rate - 1)


class ToxicTarget(Target):
    """A proxy with a toxic, in a server that has the API of Toxiproxy."""

    def start(self, command, backend, stack):
        self.port, self.api_port = unused_port(), unused_port()
        self.run([*command, "-port", str(self.api_port)], stack)
        client = vaurien.Client("127.0.0.1", self.api_port)
        wait_until(lambda: vaurien.capture(client.request, "GET", "/version")[1] is None)
        client.request("POST", "/proxies", {
            "name": "p", "listen": "127.0.0.1:%d" % self.port,
            "upstream": "127.0.0.1:%d" % backend})

    def add_toxic(self, toxic):
        vaurien.Client("127.0.0.1", self.api_port).request("POST", "/proxies/p/toxics", toxic)


class FaultTarget(Target):
    """A proxy whose fault can be changed, measured from this process on one connection."""

    control = None      # a vaurien.Client

    def set_fault(self, name, **options):
        """Apply one fault to the downstream events of all new connections."""
        self.control.set_handler(name, per="connection", stream="downstream", **options)

    def latency(self, count):
        """Return the median time of this number of round trips, in milliseconds."""
        seconds = []
        with contextlib.closing(connect(self.port)) as sock:
            send_and_read(sock, REQUEST)
            for _ in range(count):
                start = time.perf_counter()
                send_and_read(sock, REQUEST)
                seconds.append(time.perf_counter() - start)
        return 1000 * statistics.median_high(seconds)

    def bulk_rate(self, seconds):
        """Return the KB/s of an endless stream, measured for this time."""
        buffer, size = bytearray(MIB), 0
        with contextlib.closing(connect(self.port)) as sock:
            sock.sendall(STREAM_REQUEST)
            sock.recv_into(buffer)
            start = now = time.perf_counter()
            while now - start < seconds:
                size += sock.recv_into(buffer)
                now = time.perf_counter()
        return size / (now - start) / 1000


def medians(rows):
    """Return the median of each column."""
    return [statistics.median_high(column) for column in zip(*rows)]


# -- Output -------------------------------------------------------------------

ROW = "%-28s %-10s %12s %7s %8s %8s %10s %6s"


def show_progress(text=""):
    """Replace the line on stderr that shows the progress."""
    print("\r%-70s\r%s" % ("", text), end="", file=sys.stderr, flush=True)


def print_row(title, name, unit, row, first):
    """Print the row of a proxy.

    row      (rate, CPU us, median ms, 99th percentile ms)
    first    that of vaurien, which the others are compared with
    """
    rate, cpu, median, late = row
    ratios = ["", ""]
    if row is not first:
        ratios = ["%.2f" % (ours / others) if others else ""
                  for ours, others in zip(first[:2], row[:2])]
    print(ROW % (title if row is first else "", name, "%.0f %s" % (rate, unit),
                 *("%.*f" % (digits, value) if value else ""
                   for digits, value in ((1, cpu), (3, median), (3, late))), *ratios))


def print_memory(kib):
    """Print the rows of the memory of a connection.

    kib    {name: KiB}, vaurien's first
    """
    for name, value in kib.items():
        print(ROW % (
            "memory, idle connection" if name == "vaurien" else "", name, "%.1f KiB" % value, "",
            "", "", "" if name == "vaurien" else "%.2f" % (kib["vaurien"] / value), ""))


def bench(extent):
    """Measure everything, then print the table."""
    vaurien.raise_fd_limit()
    with contextlib.ExitStack() as stack:
        measurements = Bench(extent, stack)
        results, kib = measurements.workloads(), measurements.memory()
        toxic_results = measurements.toxics()
        lines = [measurements.crowd(stack), *measurements.faults(stack)]
    show_progress()
    print("%83s" % "vaurien / proxy:")
    print(ROW % ("workload", "proxy", "rate", "CPU us", "p50 ms", "p99 ms", "rate", "CPU"))
    for workload in WORKLOADS:
        for name in measurements.names(workload):
            print_row(workload.title, name, workload.unit, results[workload.title, name],
                      results[workload.title, "vaurien"])
    for workload in TOXIC_WORKLOADS:
        for name in "vaurien", "toxiproxy":
            if (workload.title, name) in toxic_results:
                print_row(workload.title, name, workload.unit,
                          toxic_results[workload.title, name],
                          toxic_results[workload.title, "vaurien"])
    print_memory(kib)
    for title, text in lines:
        print("%-45s %s" % (title, text))


def main():
    parser = argparse.ArgumentParser(
        description="Compare vaurien with other TCP proxies in front of the same backend.")
    parser.add_argument("--quick", action="store_true", help="two short rounds only")
    # The process of the proxy "bare" gets its port and that of the backend.
    parser.add_argument("--bare", nargs=2, type=int, metavar="PORT", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.bare:
        run_bare(*args.bare)
    else:
        bench(QUICK if args.quick else FULL)


if __name__ == "__main__":
    main()
