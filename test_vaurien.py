"""Tests of vaurien.py. `python3 -m unittest` runs all of them; the standard library is enough.

The tests follow the sections of vaurien.py: handlers, protocols, rules, loop, addresses,
connections, proxies, control server, Toxiproxy API, client and command line. Each section
begins with tests without sockets, which feed events to handlers and chains. Tests with
real sockets follow. Many of them compare a connection through the proxy with a direct
one. The last tests use real servers with their own client libraries. A test is skipped
if its server or its library is not installed.

    python3 -m unittest                         # all tests
    python3 -m unittest test_vaurien.TestRules  # one class
    VAURIEN_PLAIN=1 python3 -m unittest         # as on a system with select() and IPv4 only
    VAURIEN_EXAMPLES=300 python3 -m unittest    # also TestHypothesis, with 300 examples

The soak test, the load test and the benchmark in the folder .ci use the helpers below.
"""
import asyncio
import contextlib
import errno
import functools
import glob
import hashlib
import http.client
import http.server
import importlib
import importlib.util
import inspect
import io
import itertools
import json
import logging
import math
import operator
import os
import pathlib
import random
import re
import select
import selectors
import shlex
import shutil
import signal
import smtplib
import socket
import socketserver
import ssl
import stat
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import unittest
import urllib.parse
import warnings
from collections import Counter, namedtuple
from unittest import mock

try:
    import pwd
except ImportError:          # Windows has no such module
    pass


class NoIPv6(socket.socket):
    """A socket class that refuses IPv6, as on a system without it.

    TestUnusualSystems also runs the source of this class in another process.
    """

    def __init__(self, *args, **kwargs):
        if args and args[0] == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
        super().__init__(*args, **kwargs)


# Simulate a system that has only select() and IPv4. This must precede `import vaurien`,
# because vaurien looks for these functions when it is imported.
if os.environ.get("VAURIEN_PLAIN"):
    for module, names in ((select, "epoll kqueue devpoll"), (os, "splice pipe2"),
                          (socket, "SOCK_NONBLOCK")):
        for name in names.split():
            vars(module).pop(name, None)
    for name in "Default", "Epoll", "Poll", "Kqueue", "Devpoll":
        setattr(selectors, name + "Selector", selectors.SelectSelector)
    sys.modules.update({"fcntl": None, "resource": None})       # importing them fails
    socket.socket = socket.SocketType = NoIPv6

# Write the bytecode of vaurien.py, even if PYTHONDONTWRITEBYTECODE is set: otherwise, each process
# that a test starts compiles the file again. tearDownModule removes bytecode that is new.
HERE = os.path.dirname(os.path.abspath(__file__))
FILE = os.path.join(HERE, "vaurien.py")
BYTECODE = importlib.util.cache_from_source(FILE)
BYTECODE_IS_NEW = not os.path.exists(BYTECODE)
with mock.patch.object(sys, "dont_write_bytecode", False):
    import vaurien
from vaurien import DOWNSTREAM, EOF, HANDLERS, NEVER, OPEN, RESET, UPSTREAM  # noqa: E402

TIMEOUT = 30        # seconds to wait for a peer or a thread before a test fails
ERROR_SIZE = 1000       # random bytes that the handler `error` sends on tcp
INJECTED_SIZE = 100     # random bytes that `error` with inject=yes inserts into a reply


# -- Tools --------------------------------------------------------------------
#
#   wait_until(condition)        poll until another thread has made a condition true
#   rules_from(behavior)         return the rules of a text like "20:delay"
#   set_behavior(proxy, ...)     give such rules to a running proxy
#   chain_of(*rules)             a Chain whose rules are active: for tests without sockets
#   process_event(chain, ...)    run an event through a Chain; return the first result
#   registered(function)         a context manager: the function is a handler in its block
#   backend_server(serve)        a context manager: a backend that calls serve(sock) in threads
#   running_proxy(serve, ...)    a context manager: a proxy in front of such a backend
#   SimulatedLoop                the timers of a loop, with a simulated clock
#   StoppedClock                 a clock that a test moves, for a loop in another thread
#   OpenProxy                    the class of this proxy: a Proxy with the internals
#   proxy_with_control(...)      a context manager: the same with a control server and a Client
#   connect(port)                a client socket
#   connected_client(proxy)      a context manager: a client socket
#   echo                         the `serve` of most tests
#   read_..., send_and_read...   send and receive on blocking sockets
#   TempDirTestCase              base class of tests that write files

def setUpModule():
    """Silence the log of the proxies under test. Tests of the log use assertLogs."""
    logging.getLogger("vaurien").setLevel(logging.CRITICAL)


EARLY_STARTS = {}       # {class of tests: a ThreadedCall of its method `start`}


def load_tests(loader, tests, pattern):
    """Begin to start the slowest servers. They start while the first tests run.

    unittest calls this function if it loads all tests of this module.
    """
    lock = threading.Lock()

    def start(case):
        with lock:      # only one start at a time, because the tests need CPU time, too
            case.start()

    for case in TestBrowser, TestMariaDB, TestPostgreSQL:
        EARLY_STARTS[case] = ThreadedCall(start, case).__enter__()
    return tests


def start_or_wait(case):
    """Call case.start(), or wait for the call that load_tests has begun."""
    if case in EARLY_STARTS:
        EARLY_STARTS.pop(case).result()
    else:
        case.start()


def tearDownModule():
    for case in list(EARLY_STARTS):         # its tests did not run
        with contextlib.suppress(unittest.SkipTest):
            start_or_wait(case)
            case.stop()
    if BYTECODE_IS_NEW:
        with contextlib.suppress(OSError):
            os.remove(BYTECODE)


def wait_until(condition):
    """Poll condition() until another thread has made it true.

    Raises AssertionError after TIMEOUT seconds.
    """
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError("the condition was still false after %d seconds" % TIMEOUT)
        time.sleep(0.001)


@functools.lru_cache(maxsize=64)
def random_data(size, seed=0):
    """Return `size` random bytes, always the same for the same seed."""
    if size == 0:
        return b""          # getrandbits(0) fails before Python 3.9
    return random.Random(seed).getrandbits(8 * size).to_bytes(size, "big")


# Rules, chains and handlers

def rules_from(behavior, options=None):
    """Return the rules of a text like "20:delay,5:error".

    options    {handler: {option: value}}
    """
    options = options or {}
    return vaurien.read_rules([{**options.get(name, {}), "name": name, "percent": percent}
                               for percent, name in vaurien.parse_behavior(behavior)])


def set_behavior(proxy, behavior, **options):
    """Replace the rules of a running proxy by those of a text like "20:delay,5:error".

    options    for each handler, a keyword argument {option: value}
    """
    proxy.loop.run_sync(proxy.set_rules, rules_from(behavior, options))


def rule_set_of(*rules, seed=1, name="test"):
    """Return the RuleSet of a proxy that has this name, this seed and these rules."""
    rule_set = vaurien.RuleSet(seed, name)
    rule_set.install(list(rules))
    return rule_set


def chain_of(*rules):
    """Return a Chain with these rules whose first request has begun."""
    chain = vaurien.Chain(rule_set_of(*rules), 1)
    chain.begin_request()
    return chain


Event = namedtuple("Event", "t to data delays")


def process_event(chain, t, to, data):
    """Run an event through a chain. Return the first of the resulting events, as an Event."""
    return Event(*chain.process(t, to, data)[0])


@contextlib.contextmanager
def registered(function):
    """Register a handler, and remove it at the end of the block."""
    vaurien.handler(function)
    try:
        yield function
    finally:
        del HANDLERS[function.__name__]


class Passes(vaurien.BaseHandler):
    """A blocking handler that forwards all data unchanged."""

    def __call__(self, client_sock, backend_sock, to_backend):
        data = self._get_data(client_sock, backend_sock, to_backend)
        (backend_sock if to_backend else client_sock).sendall(data)


class ThreadedCall:
    """A context manager: a call of a function in a thread. It waits for its end."""

    def __init__(self, function, *args, **kwargs):
        self.outcome = []
        self.thread = threading.Thread(
            target=lambda: self.outcome.extend(vaurien.capture(
                functools.partial(function, *args, **kwargs))))

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *exception):
        self.thread.join(TIMEOUT)

    def result(self):
        """Return the result of the call, or raise its exception."""
        self.thread.join(TIMEOUT)
        value, exc = self.outcome
        if exc:
            raise exc
        return value


# Ports and addresses

def listening_socket(port=0):
    """Return a socket that listens on 127.0.0.1; for port 0, the kernel chooses the port."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.bind(("127.0.0.1", port))
    sock.listen(vaurien.BACKLOG)
    return sock


def has_ipv6():
    """Return whether this machine can bind the IPv6 loopback address."""
    with contextlib.suppress(OSError):
        with contextlib.closing(socket.socket(socket.AF_INET6)) as sock:
            sock.bind(("::1", 0))
            return True
    return False


def unused_port():
    """Return a free port below the ephemeral range, from which the kernel takes clients' ports."""
    addresses = [(socket.AF_INET, "127.0.0.1")]
    if has_ipv6():
        addresses.append((socket.AF_INET6, "::1"))
    while True:
        port = random.SystemRandom().randrange(10000, 32000)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):     # port in use
            for family, host in addresses:
                sock = stack.enter_context(contextlib.closing(socket.socket(family)))
                sock.bind((host, port))
            return port


@contextlib.contextmanager
def silent_address():
    """Yield a port where connect() neither succeeds nor fails: the accept queue is full.

    Linux drops further SYN segments. Skips the test if this system accepts them.
    """
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(contextlib.closing(socket.socket()))
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        clients = [stack.enter_context(contextlib.closing(socket.socket())) for _ in range(5)]
        for client in clients:
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        _, connected, _ = select.select([], [clients[-1]], [], 0.02)
        if connected:
            raise unittest.SkipTest("this system accepts every connection")
        yield listener.getsockname()[1]


# Sockets of clients and of backends

def connect(port, host="127.0.0.1"):
    """Return a connected, blocking client socket with a timeout and TCP_NODELAY."""
    sock = socket.create_connection((host, port), TIMEOUT)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def connected_client(proxy):
    """Return a context manager: a client socket of a proxy, closed at the end of the block."""
    return contextlib.closing(connect(proxy.port))


def read_exactly(sock, size):
    """Read and return exactly `size` bytes.

    Raises EOFError, with the bytes received until then, if the peer closes earlier.
    """
    data = bytearray()
    while len(data) < size:
        chunk = sock.recv(size - len(data))
        if not chunk:
            raise EOFError(bytes(data))
        data += chunk
    return bytes(data)


class Received(namedtuple("Received", "size sha1 ending")):
    """The data that a socket received until its peer closed the connection.

    size      count of bytes
    sha1      SHA-1 of the bytes, as hexadecimal digits
    ending    "eof" if the peer sent FIN; "reset" if it sent RST, or if recv() failed otherwise;
              "truncated" if FIN came without close_notify of TLS
    """


EMPTY_EOF = Received(0, hashlib.sha1().hexdigest(), "eof")


def read_until_close(sock):
    """Read until the peer closes the connection. Returns a Received object."""
    digest, size = hashlib.sha1(), 0
    while True:
        try:
            data = sock.recv(1 << 16)
        except socket.timeout:
            raise
        except ssl.SSLEOFError:
            return Received(size, digest.hexdigest(), "truncated")
        except OSError:
            return Received(size, digest.hexdigest(), "reset")
        if not data:
            return Received(size, digest.hexdigest(), "eof")
        digest.update(data)
        size += len(data)


def send_and_read(sock, data):
    """Send data, then read and return a reply of the same length."""
    sock.sendall(data)
    return read_exactly(sock, len(data))


def send_and_read_pending(sock, data, size):
    """Send data while an earlier reply of `size` bytes is still unread.

    Returns this reply, followed by a second reply of the same length as `data`.
    """
    sock.sendall(data)
    return read_exactly(sock, size + len(data))


def send_and_read_all(sock, data):
    """Send data and FIN in a thread, and read until the peer closes. Returns a Received object."""
    def send():
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=send)
    thread.start()
    received = read_until_close(sock)
    thread.join(TIMEOUT)
    return received


def close_with_reset(sock):
    """Close a socket with RST instead of FIN."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


# Backends, proxies and control servers

def echo(sock):
    """Serve a connection of a backend: send all received data back, until the client closes."""
    with contextlib.suppress(OSError):
        while True:
            data = sock.recv(65536)
            if not data:
                return
            sock.sendall(data)


def greet_urgently(sock):
    """Send a greeting with an urgent byte, then echo, with the urgent bytes of the client."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
    sock.sendall(b"hello")
    sock.send(b"!", socket.MSG_OOB)
    sock.sendall(b"?")
    echo(sock)


@contextlib.contextmanager
def backend_server(serve):
    """Run a backend that calls serve(sock) in a separate thread for each connection.

    Yields (port, results). `results` is a list, to which the return value of each call is
    appended when the call ends.
    """
    listener, results, threads = listening_socket(), [], []

    def start_thread(function, *args):
        # Python 3.13 keeps the stack of a thread that has ended as long as its Thread exists.
        threads[:] = [thread for thread in threads if thread.is_alive()]
        threads.append(threading.Thread(target=function, args=args, daemon=True))
        threads[-1].start()

    def serve_and_close(sock):
        with sock:
            results.append(serve(sock))

    def accept_connections():
        with contextlib.suppress(OSError):
            while True:
                sock, _ = listener.accept()
                sock.settimeout(TIMEOUT)
                start_thread(serve_and_close, sock)

    start_thread(accept_connections)
    try:
        yield listener.getsockname()[1], results
    finally:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for thread in threads:
            thread.join(TIMEOUT)


class OpenProxy(vaurien.Proxy):
    """A Proxy with the attributes of its ProxyServer, for tests of the internals.

    `connections` has the Connections themselves: {number: Connection}.
    """

    connections = property(lambda self: self._server.connections)
    thread = property(lambda self: self._thread)

    def __getattr__(self, name):
        return getattr(self._server, name)


@contextlib.contextmanager
def running_proxy(serve, behavior="100:dummy", loop_class=None, **arguments):
    """Run a proxy in front of a backend_server(serve).

    loop_class    replaces vaurien.Loop
    arguments     further arguments of vaurien.Proxy

    Yields the proxy. Its attribute `backend_results` is the list of results of backend_server.
    """
    with backend_server(serve) as (port, results), contextlib.ExitStack() as stack:
        if loop_class:
            stack.enter_context(mock.patch.object(vaurien, "Loop", loop_class))
        proxy = stack.enter_context(OpenProxy("127.0.0.1:%d" % port, "127.0.0.1:0",
                                                  behavior, **arguments))
        proxy.backend_results = results
        yield proxy


class SelectLoop(vaurien.Loop):
    """A loop that uses select(), as on a system without epoll and kqueue."""

    def __init__(self):
        super().__init__(selector=selectors.SelectSelector())


class SimulatedLoop(vaurien.Loop):
    """The timers of a loop, with a clock that moves only when `advance` is called."""

    def __init__(self):
        self.now, self.timers, self.order, self.cancelled_count = 0.0, [], 0, 0

    def clock(self):
        return self.now

    def advance(self, seconds):
        """Let time pass, and run each timer at its time."""
        end = self.now + seconds
        while self.timers and self.timers[0][0] <= end:
            self.now = max(self.now, self.timers[0][0])
            self.run_timers()
        self.now = end


class StoppedClock:
    """A clock for a loop that runs in another thread. It moves only when `advance` is called."""

    def __init__(self, loop):
        self.loop, self.now = loop, loop.clock()
        loop.run_sync(setattr, loop, "clock", lambda: self.now)

    def advance(self, seconds):
        """Let time pass, and wake up the loop, which then runs the timers that are due."""
        self.now += seconds
        self.loop.run_sync(int)


class StandardLoop(vaurien.Loop):
    """A loop that uses the default selector of the standard library."""

    def __init__(self):
        super().__init__(selector=selectors.DefaultSelector())


def proxy_table(*proxies):
    """Return a ProxyTable, for a control server, of proxies that run in the same loop."""
    table = vaurien.ProxyTable([proxy._server for proxy in proxies])
    table.loop = proxies[0].loop if proxies else None
    return table


@contextlib.contextmanager
def proxy_with_control(serve=echo, behavior="100:dummy", token=None, others=(), **arguments):
    """Run a proxy as running_proxy does, and a control server in the proxy's loop.

    token     the token of the control server
    others    further open proxies that it controls

    Yields (proxy, client). `client` is a vaurien.Client of the control server.
    """
    with running_proxy(serve, behavior, **arguments) as proxy:
        control = vaurien.Control(("127.0.0.1", 0), proxy_table(proxy, *others), token)
        control.bind()
        proxy.loop.run_sync(control.open, proxy.loop)
        port = control.listener.sockets[0].getsockname()[1]
        try:
            yield proxy, vaurien.Client("127.0.0.1", port, token=token)
        finally:
            proxy.loop.run_sync(control.close)


# Files, programs and packages

INI = """
[vaurien]
distant = google.com:80
local = localhost:8000
behavior = 20:delay

[handler:delay]
sleep = 2
"""


class TempDirTestCase(unittest.TestCase):
    """Tests that write files. Each test runs in an empty directory, which is removed after it."""

    def setUp(self):
        self.folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.folder)
        previous = os.getcwd()
        os.chdir(self.folder)
        self.addCleanup(os.chdir, previous)

    def write(self, name, text):
        """Write a file, and return its name."""
        with open(name, "w", encoding="utf-8") as file:
            file.write(text)
        return name


def make_server_folder():
    """Make a folder for the files of a server: in memory if there is room. Returns its path.

    A database writes its files with fsync(), which takes seconds while the disk is busy.
    """
    memory = "/dev/shm"
    has_room = os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 500 << 20
    return tempfile.mkdtemp(dir=memory if has_room else None)


def read_text(path):
    """Return the text of a file."""
    with open(path, encoding="utf-8") as file:
        return file.read()


def copy_module(path):
    """Copy vaurien.py and its bytecode to this path."""
    bytecode = importlib.util.cache_from_source(path)
    os.makedirs(os.path.dirname(bytecode), exist_ok=True)
    shutil.copy2(FILE, path)        # with its time of change, which the bytecode contains
    with contextlib.suppress(OSError):
        shutil.copy(BYTECODE, bytecode)


def module_environment():
    """Return an environment in which `python -m vaurien` runs vaurien.py, from any folder."""
    paths = [HERE, os.environ.get("PYTHONPATH")]
    return dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, paths)))


def quiet_popen(*args, popen=subprocess.Popen, **kwargs):
    """Start a process whose stderr is discarded. Tests patch subprocess.Popen with this function.

    `popen` is bound to the real Popen when this module is imported.
    """
    return popen(*args, stderr=subprocess.DEVNULL, **kwargs)


def find_program(*names):
    """Return the path of the first of these programs that is installed, or None.

    Debian installs servers in directories that are not on the PATH of users.
    """
    directories = [os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"]
    directories += sorted(glob.glob("/usr/lib/postgresql/*/bin"), reverse=True)
    paths = (shutil.which(name, path=os.pathsep.join(directories)) for name in names)
    return next(filter(None, paths), None)


def popen_user_kwargs(name):
    """Return keyword arguments that make Popen run a program as this user, if we are root.

    PostgreSQL's server refuses to run as root. Returns {} if this process is not root.
    """
    if os.name != "posix" or os.getuid() != 0:
        return {}
    user = pwd.getpwnam(name)

    def set_ids():
        os.setgroups([])
        os.setgid(user.pw_gid)
        os.setuid(user.pw_uid)
    return {"preexec_fn": set_ids}


def descendants(pid):
    """Return the ids of a process and of its descendants. Linux only: it reads /proc."""
    pids = [pid]
    for parent in pids:         # the loop also visits the children that it appends
        with contextlib.suppress(OSError):
            for thread in os.listdir("/proc/%d/task" % parent):
                with open("/proc/%d/task/%s/children" % (parent, thread)) as file:
                    pids += map(int, file.read().split())
    return pids


def cpu_seconds(pid):
    """Return the CPU time of a process and its descendants, including ended children."""
    ticks = 0
    for process in descendants(pid):
        with contextlib.suppress(OSError), open("/proc/%d/stat" % process) as file:
            fields = file.read().rpartition(")")[2].split()     # man 5 proc
            utime, stime, children_utime, children_stime = map(int, fields[11:15])
            ticks += utime + stime
            if process == pid:
                ticks += children_utime + children_stime        # of children that have ended
    return ticks / os.sysconf("SC_CLK_TCK")


def import_package(name):
    """Import and return a package from PyPI. Skip the test if the package is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")     # the package's own warnings
            return importlib.import_module(name)
    except ImportError:
        raise unittest.SkipTest("no %s" % name) from None


# -- Handlers -------------------------------------------------------------------


class TestHandlers(unittest.TestCase):
    """The events that each handler yields for given events, without sockets and sleeping."""

    def run_handler(self, name, *events, **options):
        """Run the events of one request through a handler; return the events that it yields."""
        chain = chain_of(vaurien.Rule(name, options))
        return [(round(t, 3), to, data)
                for event in events for t, to, data, _ in chain.process(*event)]

    def test_dummy_passes_all_events(self):
        events = [(0, UPSTREAM, OPEN), (1, UPSTREAM, b"q"), (2, DOWNSTREAM, b"a"),
                  (3, UPSTREAM, EOF), (4, DOWNSTREAM, EOF), (5, DOWNSTREAM, RESET)]
        self.assertEqual(self.run_handler("dummy", *events), events)

    def test_delay_waits_before_connecting_to_the_backend(self):
        self.assertEqual(
            self.run_handler("delay", (0, UPSTREAM, OPEN), (0.1, UPSTREAM, b"q"),
                             (0.2, UPSTREAM, b"r"), (5, DOWNSTREAM, b"a"), (5.5, DOWNSTREAM, b"b"),
                             sleep=2.0),
            [(2, UPSTREAM, OPEN), (2.1, UPSTREAM, b"q"), (2.1, UPSTREAM, b"r"),
             (5, DOWNSTREAM, b"a"), (5.5, DOWNSTREAM, b"b")])

    def test_delay_waits_again_before_a_first_request_long_after_the_connect(self):
        self.assertEqual(self.run_handler("delay", (0, UPSTREAM, OPEN), (60, UPSTREAM, b"q")),
                         [(1, UPSTREAM, OPEN), (61, UPSTREAM, b"q")])

    def test_delay_waits_once_for_each_request_and_not_before_eof(self):
        self.assertEqual(
            self.run_handler("delay", (0, UPSTREAM, b"q"), (3, UPSTREAM, b"r"),
                             (4, DOWNSTREAM, b"a"), (9, UPSTREAM, EOF)),
            [(1, UPSTREAM, b"q"), (3, UPSTREAM, b"r"), (4, DOWNSTREAM, b"a"), (9, UPSTREAM, EOF)])

    def test_delay_with_before_no_waits_before_the_first_byte_of_the_reply(self):
        self.assertEqual(
            self.run_handler("delay", (0, UPSTREAM, OPEN), (0, UPSTREAM, b"q"),
                             (5, DOWNSTREAM, b"a"), (5.5, DOWNSTREAM, b"b"), (7, DOWNSTREAM, b"c"),
                             (8, DOWNSTREAM, EOF), before=False),
            [(0, UPSTREAM, OPEN), (0, UPSTREAM, b"q"), (6, DOWNSTREAM, b"a"),
             (6, DOWNSTREAM, b"b"), (7, DOWNSTREAM, b"c"), (8, DOWNSTREAM, EOF)])

    def test_delay_per_connection_waits_before_each_request(self):
        chain = chain_of(vaurien.Rule("delay", per="connection"))
        due_times = []
        for t, to, data in [(0, UPSTREAM, b"q"), (2, DOWNSTREAM, b"a"), (3, UPSTREAM, b"r"),
                            (3.5, UPSTREAM, b"s")]:
            if to != chain.last_direction:
                chain.direction_changed(to)
            due_times.append(process_event(chain, t, to, data).t)
        self.assertEqual(due_times, [1, 2, 4, 4])

    def test_error_replaces_the_reply_with_random_bytes(self):
        *to_backend, (t, to, reply), end = self.run_handler(
            "error", (0, UPSTREAM, OPEN), (0, UPSTREAM, b"q"), (1, DOWNSTREAM, b"valid"),
            (2, DOWNSTREAM, b"more"), (3, DOWNSTREAM, EOF))
        self.assertEqual(to_backend, [(0, UPSTREAM, OPEN), (0, UPSTREAM, b"q")])
        self.assertEqual((t, to, len(reply)), (1, DOWNSTREAM, ERROR_SIZE))
        self.assertEqual(end, (3, DOWNSTREAM, EOF))
        self.assertNotIn(b"valid", reply)
        distinct_bytes = set(reply)
        self.assertGreater(len(distinct_bytes), 200)

    def test_error_sends_the_same_bytes_for_the_same_seed(self):
        events = (0, UPSTREAM, b"q"), (1, DOWNSTREAM, b"a")
        self.assertEqual(self.run_handler("error", *events), self.run_handler("error", *events))

    def test_error_with_inject_puts_100_bytes_into_the_middle_of_the_reply(self):
        _, (_, _, reply), after = self.run_handler(
            "error", (0, UPSTREAM, b"q"), (1, DOWNSTREAM, b"leftright"),
            (2, DOWNSTREAM, b"more"), inject=True)
        self.assertEqual(len(reply), len(b"leftright") + INJECTED_SIZE)
        self.assertEqual((reply[:4], reply[-5:]), (b"left", b"right"))
        self.assertEqual(after, (2, DOWNSTREAM, b"more"))

    def test_error_does_not_change_the_requests_of_the_warmup(self):
        for request, is_changed in (1, False), (2, False), (3, True), (4, True):
            with self.subTest(request=request):
                chain = chain_of(vaurien.Rule("error", {"warmup": 2}))
                while chain.request_count < request:
                    chain.begin_request()
                chain.process(0, UPSTREAM, b"q")
                reply = process_event(chain, 1, DOWNSTREAM, b"a").data
                self.assertEqual(reply != b"a", is_changed)

    def test_transient_fails_and_then_succeeds(self):
        chain = chain_of(vaurien.Rule("transient", {"agitate": 2, "warmup": 1}))
        replies_changed = []
        for _ in range(6):
            chain.process(0, UPSTREAM, b"q")
            replies_changed.append(process_event(chain, 1, DOWNSTREAM, b"a").data != b"a")
            chain.begin_request()
        self.assertEqual(replies_changed, [False, True, True, False, False, False])

    def test_transient_does_not_count_a_connection_without_data(self):
        chain = chain_of(vaurien.Rule("transient"))
        chain.process(0, UPSTREAM, OPEN)
        chain.process(0, UPSTREAM, EOF)
        chain.begin_request()
        chain.process(0, UPSTREAM, b"q")
        self.assertNotEqual(process_event(chain, 1, DOWNSTREAM, b"a").data, b"a")

    def test_transient_counts_the_requests_of_all_connections(self):
        rule_set = rule_set_of(vaurien.Rule("transient", {"agitate": 3}))
        chains = [vaurien.Chain(rule_set, connection) for connection in range(5)]
        failed_count = 0
        for chain in chains:
            chain.begin_request()
            chain.process(0, UPSTREAM, b"q")
            failed_count += process_event(chain, 1, DOWNSTREAM, b"a").data != b"a"
        self.assertEqual(failed_count, 3)

    def test_hang_delays_all_events_until_it_is_removed(self):
        self.assertEqual(
            self.run_handler("hang", (0, UPSTREAM, OPEN), (1, UPSTREAM, b"q"), (2, UPSTREAM, EOF)),
            [(NEVER, UPSTREAM, OPEN), (NEVER, UPSTREAM, b"q"), (NEVER, UPSTREAM, EOF)])

    def test_blackout_closes_without_connecting_to_the_backend(self):
        self.assertEqual(self.run_handler("blackout", (0, UPSTREAM, OPEN)),
                         [(0, DOWNSTREAM, EOF), (0, UPSTREAM, EOF)])

    def test_abort_forwards_the_request_and_closes_instead_of_replying(self):
        self.assertEqual(
            self.run_handler("abort", (0, UPSTREAM, OPEN), (0, UPSTREAM, b"q"),
                             (1, DOWNSTREAM, b"a")),
            [(0, UPSTREAM, OPEN), (0, UPSTREAM, b"q"), (1, DOWNSTREAM, EOF), (1, UPSTREAM, EOF)])


    def test_cut_passes_the_first_bytes_of_a_reply_and_then_ends_the_connection(self):
        before = [(0, UPSTREAM, OPEN), (0, UPSTREAM, b"q"), (1, DOWNSTREAM, b"ab")]
        for how, size, expected in [
                ("close", 3, [(2, DOWNSTREAM, b"c"), (2, DOWNSTREAM, EOF), (2, UPSTREAM, EOF)]),
                ("reset", 3, [(2, DOWNSTREAM, b"c"), (2, DOWNSTREAM, RESET)]),
                ("hang", 3, [(2, DOWNSTREAM, b"c"), (NEVER, DOWNSTREAM, b"d"),
                             (NEVER, DOWNSTREAM, b"e")]),
                ("reset", 2, [(2, DOWNSTREAM, RESET)]),
                ("close", 5, [(2, DOWNSTREAM, b"cd"), (3, DOWNSTREAM, b"e")])]:
            with self.subTest(how, size=size):
                self.assertEqual(
                    self.run_handler("cut", *before, (2, DOWNSTREAM, b"cd"), (3, DOWNSTREAM, b"e"),
                                     bytes=size, how=how),
                    before + expected)

    def test_cut_without_options_ends_the_connection_in_place_of_the_reply(self):
        self.assertEqual(self.run_handler("cut", (0, UPSTREAM, b"q"), (1, DOWNSTREAM, b"a")),
                         [(0, UPSTREAM, b"q"), (1, DOWNSTREAM, EOF), (1, UPSTREAM, EOF)])

    def test_cut_per_connection_counts_the_bytes_of_each_reply(self):
        chain = chain_of(vaurien.Rule("cut", {"bytes": 3}, per="connection"))
        sent = []
        for to, data in [(UPSTREAM, b"q"), (DOWNSTREAM, b"ab"), (UPSTREAM, b"r"),
                         (DOWNSTREAM, b"cd"), (DOWNSTREAM, b"ef")]:
            if to != chain.last_direction:
                chain.direction_changed(to)
            sent += [data for _, to, data, _ in chain.process(0, to, data)]
        self.assertEqual(sent, [b"q", b"ab", b"r", b"cd", b"e", EOF, EOF])


class TestToxics(unittest.TestCase):
    """The events that each of Toxiproxy's toxics yields for given events.

    The units of the options are those of Toxiproxy.
    """

    def run_toxic(self, name, *events, stream="both", **options):
        """Run the events of one connection through a toxic; return the events that it yields."""
        chain = chain_of(vaurien.Rule(name, options, per="connection", stream=stream))
        yielded = chain.process_open(0, [UPSTREAM, DOWNSTREAM])
        for event in events:
            yielded += chain.process(*event)
        return [(round(t, 6), to, data) for t, to, data, _ in yielded]

    def test_latency_delays_each_chunk_by_milliseconds(self):
        self.assertEqual(
            self.run_toxic("latency", (0, UPSTREAM, OPEN), (1, DOWNSTREAM, b"a"),
                           (1.05, DOWNSTREAM, b"b"), (2, DOWNSTREAM, EOF), latency=200),
            [(0, UPSTREAM, OPEN), (1.2, DOWNSTREAM, b"a"), (1.25, DOWNSTREAM, b"b"),
             (2, DOWNSTREAM, EOF)])

    def test_jitter_varies_the_latency_and_a_delay_is_never_negative(self):
        def delays(latency):
            """Return 200 delays with a jitter of 50 ms, in seconds."""
            events = [(0, UPSTREAM, b"q")] * 200
            return [t for t, _, _ in self.run_toxic("latency", *events,
                                                    latency=latency, jitter=50)]

        around_100_ms = delays(100)
        self.assertTrue(0.05 <= min(around_100_ms) < 0.07, around_100_ms)
        self.assertTrue(0.13 < max(around_100_ms) <= 0.15, around_100_ms)
        self.assertEqual(min(delays(10)), 0)

    def test_the_distributions_of_the_latency(self):
        def delays(distribution, latency=100, jitter=20):
            """Return 10,000 delays in milliseconds, sorted."""
            options = {"latency": latency, "jitter": jitter, "distribution": distribution}
            state = vaurien.ActiveRule(vaurien.Rule("latency", options), 1, draw=1)
            return sorted(1000 * t for _ in range(10000) for t, _, _ in HANDLERS["latency"](
                state, 0, UPSTREAM, b"q", **options))

        # Two medians follow from the formulas: the mean - 0.32 times the jitter (pareto), and
        # the mean / sqrt(1 + (jitter / mean)^2) (lognormal). One is measured (paretonormal).
        for distribution, median in [("uniform", 100), ("normal", 100), ("pareto", 93.6),
                                     ("paretonormal", 96.0), ("lognormal", 98.1)]:
            with self.subTest(distribution):
                drawn = delays(distribution)
                self.assertEqual(drawn, delays(distribution))
                self.assertAlmostEqual(sum(drawn) / 10000, 100, delta=2)
                self.assertAlmostEqual(drawn[5000], median, delta=1)
        spread = [delays(distribution) for distribution in ("normal", "lognormal")]
        for drawn in spread:
            variance = sum((delay - 100) ** 2 for delay in drawn) / 10000
            self.assertAlmostEqual(math.sqrt(variance), 20, delta=0.7)
        for distribution in vaurien.DISTRIBUTIONS:
            with self.subTest(distribution, jitter="more than the latency"):
                self.assertEqual(delays(distribution, latency=1, jitter=50)[0],
                                 0 if distribution != "lognormal" else mock.ANY)
                self.assertEqual(delays(distribution, 30, jitter=0), [30] * 10000)
        self.assertEqual(set(delays("lognormal", latency=0)), {0})

    def test_the_default_distribution_draws_as_random_uniform_does(self):
        events = [(0, UPSTREAM, b"q")] * 5
        chain = chain_of(vaurien.Rule("latency", {"latency": 9, "jitter": 5}))
        rng = random.Random(chain.active_rules[0].draw)
        self.assertEqual([process_event(chain, *event).t for event in events],
                         [(9 + rng.uniform(-5, 5)) / 1000 for _ in events])

    def test_bandwidth_is_1000_bytes_per_kilobyte_in_each_direction(self):
        events = self.run_toxic("bandwidth", (0, UPSTREAM, bytes(5000)),
                                (0, DOWNSTREAM, b"a" * 100), (1, UPSTREAM, bytes(1000)), rate=1)
        self.assertEqual(sum(len(data) for _, _, data in events), 6100)
        last_times = {to: t for t, to, _ in events}
        self.assertEqual(last_times, {DOWNSTREAM: 0.1, UPSTREAM: 6})

    def test_bandwidth_sends_pieces_of_10_ms_or_a_packet_or_100_ms(self):
        for rate, largest in (1000, 10000), (100, 1448), (10, 1000):
            events = self.run_toxic("bandwidth", (0, UPSTREAM, bytes(20000)), rate=rate)
            self.assertEqual(max(len(data) for _, _, data in events), largest)

    def test_bandwidth_that_was_not_used_is_lost(self):
        *_, (last_time, _, _) = self.run_toxic("bandwidth", (0, UPSTREAM, bytes(1000)),
                                               (10, UPSTREAM, bytes(1000)), rate=1)
        self.assertEqual(last_time, 11)

    def test_bandwidth_0_delays_all_events_until_it_is_removed(self):
        self.assertEqual(self.run_toxic("bandwidth", (0, UPSTREAM, b"q"), (1, UPSTREAM, EOF)),
                         [(NEVER, UPSTREAM, b"q"), (NEVER, UPSTREAM, EOF)])

    def test_slicer_splits_chunks_and_waits_after_each_piece(self):
        events = self.run_toxic("slicer", (1, DOWNSTREAM, b"abcdefgh"), (1, DOWNSTREAM, b"i"),
                                (1, DOWNSTREAM, EOF), average_size=3, delay=1000)
        self.assertEqual(events, [
            (1, DOWNSTREAM, b"abc"), (1.001, DOWNSTREAM, b"def"), (1.002, DOWNSTREAM, b"gh"),
            (1.003, DOWNSTREAM, b"i"), (1.004, DOWNSTREAM, EOF)])

    def test_slicer_varies_the_sizes_of_the_pieces(self):
        data = random_data(100000)
        events = self.run_toxic("slicer", (1, DOWNSTREAM, data),
                                average_size=500, size_variation=100)
        sizes = [len(piece) for _, _, piece in events]
        distinct_sizes = set(sizes)
        self.assertEqual(b"".join(piece for _, _, piece in events), data)
        self.assertTrue(all(400 <= size <= 600 for size in sizes[:-1]), sizes)
        self.assertGreater(len(distinct_sizes), 50)

    def test_slicer_accepts_sizes_that_crash_toxiproxy(self):
        for size, variation in [(0, 0), (0, 5), (1, 1), (1, 10 ** 18), (10 ** 18, 1), (5, 5),
                                (3, 7)]:
            with self.subTest(size=size, variation=variation):
                events = self.run_toxic("slicer", (1, DOWNSTREAM, b"abcdefgh"),
                                        average_size=size, size_variation=variation)
                self.assertEqual(b"".join(data for _, _, data in events), b"abcdefgh")
                self.assertTrue(all(data for _, _, data in events))

    def test_the_number_of_pieces_of_a_chunk_is_limited(self):
        for name, options in ("slicer", {"average_size": 1}), ("bandwidth", {"rate": 1}):
            with self.subTest(name):
                events = self.run_toxic(name, (1, DOWNSTREAM, bytes(vaurien.CHUNK)), **options)
                self.assertLessEqual(len(events), vaurien.PIECES_MAX + 1)
                self.assertEqual(sum(len(data) for _, _, data in events), vaurien.CHUNK)

    def test_slow_close_delays_only_eof(self):
        self.assertEqual(
            self.run_toxic("slow_close", (1, DOWNSTREAM, b"a"), (2, DOWNSTREAM, EOF), delay=500),
            [(1, DOWNSTREAM, b"a"), (2.5, DOWNSTREAM, EOF)])

    def test_a_timeout_toxic_counts_from_its_beginning_and_not_from_each_chunk(self):
        events = self.run_toxic("timeout", (0.4, DOWNSTREAM, b"a"), (0.6, DOWNSTREAM, b"b"),
                                stream=DOWNSTREAM, timeout=700)
        self.assertEqual(events, [(0.7, DOWNSTREAM, EOF), (0.7, UPSTREAM, EOF)])

    def test_a_timeout_toxic_of_0_drops_all_data_and_closes_when_it_is_removed(self):
        rule = vaurien.Rule("timeout", per="connection", stream=DOWNSTREAM)
        queue = vaurien.DelayQueue(DOWNSTREAM, vaurien.Budget())
        chain = chain_of(rule)
        events = chain.process_open(0, [DOWNSTREAM]) + chain.process(1, DOWNSTREAM, b"a")
        for t, to, data, delays in events:
            if to == DOWNSTREAM:
                queue.put(t, data, 0, delays)
        years_later = 10 ** 9
        signals = queue.pop_due(years_later, False)
        self.assertEqual((signals, list(queue.send_buffer)), ([], []))
        queue.release([rule])
        queue.pop_due(2, False)
        self.assertEqual(list(queue.send_buffer), [EOF])

    def test_a_timeout_toxic_passes_eof(self):
        events = self.run_toxic("timeout", (1, DOWNSTREAM, b"a"), (2, DOWNSTREAM, EOF),
                                stream=DOWNSTREAM)
        # Closing is due when the toxic is removed.
        self.assertEqual(events, [(NEVER, DOWNSTREAM, EOF), (NEVER, UPSTREAM, EOF),
                                  (2, DOWNSTREAM, EOF)])

    def test_reset_peer_replaces_all_events_of_the_backend_with_one_reset(self):
        for first_data in b"a", EOF:
            with self.subTest(first_data=first_data):
                self.assertEqual(
                    self.run_toxic("reset_peer", (0, UPSTREAM, OPEN), (1, DOWNSTREAM, first_data),
                                   (1.1, DOWNSTREAM, b"b"), (1.2, DOWNSTREAM, EOF), timeout=500),
                    [(0, UPSTREAM, OPEN), (1.5, DOWNSTREAM, RESET)])

    def test_limit_data_passes_exactly_this_number_of_bytes(self):
        for limit, passed_bytes in (0, b""), (3, b"abc"), (5, b"abcde"):
            with self.subTest(limit=limit):
                events = self.run_toxic("limit_data", (1, DOWNSTREAM, b"a"),
                                        (2, DOWNSTREAM, b"bcde"), (3, DOWNSTREAM, b"f"),
                                        stream=DOWNSTREAM, bytes=limit)
                eof_index = next(index for index, (_, _, data) in enumerate(events)
                                 if data is EOF)
                before_eof = b"".join(data for _, _, data in events[:eof_index])
                self.assertEqual(before_eof, passed_bytes)
                self.assertEqual({to for _, to, data in events if data is EOF},
                                 {UPSTREAM, DOWNSTREAM})
                self.assertEqual(b"".join(data for _, _, data in events), passed_bytes)

    def test_a_rule_per_connection_gets_open_in_each_of_its_directions(self):
        received_events = []

        def recorder(state, t, to, data):
            received_events.append((t, to, data))
            yield t, to, data

        with registered(recorder):
            for stream in "both", UPSTREAM, DOWNSTREAM:
                with self.subTest(stream=stream):
                    received_events.clear()
                    chain = chain_of(vaurien.Rule("recorder", per="connection", stream=stream))
                    self.assertEqual(chain.process_open(3, [UPSTREAM, DOWNSTREAM]), [])
                    directions = [UPSTREAM, DOWNSTREAM] if stream == "both" else [stream]
                    self.assertEqual(received_events, [(3, to, OPEN) for to in directions])
            received_events.clear()
            chain_of(vaurien.Rule("recorder")).process_open(3, [UPSTREAM, DOWNSTREAM])
            self.assertEqual(received_events, [])

    def test_events_emitted_on_open_pass_through_the_next_rules(self):
        chain = chain_of(
            vaurien.Rule("blackout", per="connection", draw_key="a"),
            vaurien.Rule("slow_close", {"delay": 5000}, per="connection", draw_key="b"))
        self.assertEqual({(t, to, data) for t, to, data, _ in chain.process_open(1, [DOWNSTREAM])},
                         {(6, DOWNSTREAM, EOF), (6, UPSTREAM, EOF)})


class TestPacketLoss(unittest.TestCase):
    """The handler packet_loss does what a sender of TCP makes of lost packets."""

    class Draws:
        """Random numbers with which these segments are lost, and `again` retransmissions."""

        def __init__(self, lost, again=0):
            self.draws = itertools.chain.from_iterable(
                [0.0] * (again + 1) * (index in lost) + [1.0] for index in itertools.count())

        def random(self):
            return next(self.draws)

    def chain(self, draws=None, seed=1, **options):
        rule = vaurien.Rule("packet_loss", options, per="connection", stream=DOWNSTREAM)
        chain = vaurien.Chain(rule_set_of(rule, seed=seed), 1)
        chain.begin_request()
        chain.process_open(0, [DOWNSTREAM])
        if draws:
            chain.active_rules[0].generator = draws
        return chain

    def arrivals(self, chain, t, segments):
        """Send so many segments at t. Returns {how much later they arrive: their number}."""
        arrivals = Counter()
        for due, _, data, _ in chain.process(t, DOWNSTREAM, bytes(segments * vaurien.SEGMENT)):
            arrivals[round(due - t, 3)] += len(data) // vaurien.SEGMENT
        return arrivals

    def test_a_lost_segment_arrives_when_tcp_has_repaired_the_loss(self):
        for case, segments, lost, again, expected in [
                ("no loss", 10, [], 0, {0: 10}),
                ("the only segment: RTT + 200 ms", 1, [0], 0, {0.3: 1}),
                ("the only segment, twice", 1, [0], 1, {0.6: 1}),
                ("the only segment, three times", 1, [0], 2, {1.2: 1}),
                ("nine behind it: RTT", 10, [0], 0, {0.1: 10}),
                ("three behind it: RTT", 10, [6], 0, {0: 6, 0.1: 4}),
                ("the last of ten: 2 RTT", 10, [9], 0, {0: 9, 0.2: 1}),
                ("nine behind it, twice: RTT, and a time-out", 10, [0], 1, {0.4: 10}),
                ("a window of 10, then the acknowledgements", 25, [], 0, {0: 10, 0.1: 15})]:
            with self.subTest(case):
                chain = self.chain(self.Draws(lost, again), loss_rate=0.01)
                self.assertEqual(self.arrivals(chain, 5, segments), expected)

    def test_stalls_of_lone_segments(self):
        chain, stalls = self.chain(loss_rate=0.05, rtt=40), Counter()
        for t in range(0, 400000, 100):
            stalls += self.arrivals(chain, t, 1)
        self.assertLessEqual(set(stalls), {0, 0.24, 0.48, 0.96, 1.92})
        self.assertAlmostEqual(1 - stalls[0] / 4000, 0.05, delta=0.01)

    def test_a_bulk_transfer_has_the_throughput_of_reno(self):
        """Mathis et al. 1997: MSS / RTT * 1.2247 / sqrt(p). Linux's Reno reaches 0.82 to 0.94."""
        for rtt, loss_rate, segments in [
                (100, 0.001, 80000), (50, 0.005, 30000), (100, 0.01, 20000), (200, 0.02, 15000),
                (50, 0.02, 15000)]:
            with self.subTest(rtt=rtt, loss_rate=loss_rate):
                chain, t, size = self.chain(loss_rate=loss_rate, rtt=rtt), 0, 0
                while size < segments * vaurien.SEGMENT:
                    *_, (end, _, _, _) = chain.process(t, DOWNSTREAM, bytes(65536))
                    t, size = max(t, end - vaurien.RATE_BACKLOG), size + 65536
                mathis = vaurien.SEGMENT / (rtt / 1000) * 1.2247 / math.sqrt(loss_rate)
                self.assertTrue(0.7 < size / end / mathis < 1.0, size / end / mathis)

    def test_loss_rate_is_the_share_of_lost_packets_with_any_mean_burst(self):
        for stay, burst in (0.02, 1.02), (0.5, 2), (0.9, 10):
            with self.subTest(stay=stay):
                sender = vaurien.TcpSender()
                path = vaurien.TcpPath(0.1, 0.02, stay, random.Random(1))
                losses = [sender.draw_loss(path) for _ in range(200000)]
                bursts = [len(list(group)) for lost, group in itertools.groupby(losses) if lost]
                self.assertAlmostEqual(sum(losses) / 200000, 0.02, delta=0.002)
                self.assertAlmostEqual(sum(bursts) / len(bursts), burst, delta=burst / 10)

    def test_all_options_are_harmless_at_their_limits(self):
        for options in [{}, {"loss_rate": 1.0}, {"loss_rate": 1.0, "rtt": 0},
                        {"loss_rate": 0.5, "correlation": 1.0}, {"loss_rate": 0.5, "burst": 1.0},
                        {"loss_rate": 0.5, "burst": 1e9, "rtt": 10 ** 9}]:
            with self.subTest(options):
                chain, data, latest = self.chain(**options), random_data(100000), 0
                events = [event for t in range(3)
                          for event in chain.process(t, DOWNSTREAM, data)]
                self.assertEqual(b"".join(data for _, _, data, _ in events), data * 3)
                self.assertEqual([t for t, _, _, _ in events], sorted(t for t, _, _, _ in events))
                self.assertLess(events[-1][0], NEVER)
                self.assertGreaterEqual(chain.process(9, DOWNSTREAM, EOF)[0][0], latest)

    def test_the_sender_goes_on_when_the_delays_of_other_rules_are_over(self):
        chain = self.chain(self.Draws([]), loss_rate=0.01)
        self.assertEqual(self.arrivals(chain, 100, 10), {0: 10})    # a rule has delayed these
        chain.reset_due_times(DOWNSTREAM, 3)
        self.assertEqual(self.arrivals(chain, 5, 10), {0: 10})

    def test_the_window_has_a_limit(self):
        chain = self.chain(self.Draws([]), loss_rate=0.01)
        chain.process(0, DOWNSTREAM, bytes(20 << 20))
        sender = chain.active_rules[0]["sender downstream"]
        self.assertLessEqual(len(sender.in_flight), vaurien.CWND_MAX + 1)

    def test_content_and_order_are_intact(self):
        data = random_data(400000)
        with running_proxy(echo) as proxy, connected_client(proxy) as sock:
            for stream in "upstream", "downstream":
                proxy.add_toxic("packet_loss", name=stream, stream=stream, loss_rate=0.03, rtt=2)
            received = send_and_read_all(sock, data)
            self.assertEqual(received, Received(len(data), hashlib.sha1(data).hexdigest(), "eof"))
            self.assertEqual(proxy.faults, {"packet_loss": 2})


class TestNetwork(unittest.TestCase):
    """The handler network has the latency, the rate and the loss of its profile, both ways."""

    def chain(self, profile, *before):
        chain = chain_of(*before, vaurien.Rule("network", {"profile": profile}, per="connection"))
        chain.process_open(0, [UPSTREAM, DOWNSTREAM])
        return chain

    def arrival(self, chain, t, to, size):
        """Send `size` bytes. Returns when the last one arrives, in ms."""
        *_, (due, _, _, _) = chain.process(t, to, bytes(size))
        return round(due * 1000)

    def test_a_request_and_a_reply_on_3g(self):
        """3g: 330 and 780 kbit/s, 100 ms each way. Connecting takes a round trip."""
        chain = self.chain("3g")
        self.assertEqual(chain.process(0, UPSTREAM, OPEN)[0][:3], (0.2, UPSTREAM, OPEN))
        self.assertEqual(self.arrival(chain, 0, UPSTREAM, 4125), 200 + 100 + 100)
        self.assertEqual(self.arrival(chain, 1, DOWNSTREAM, 9750), 1000 + 100 + 100)
        self.assertEqual(self.arrival(chain, 1, DOWNSTREAM, 9750), 1000 + 200 + 100)
        self.assertEqual(self.arrival(chain, 9, DOWNSTREAM, 0), 9000)

    def test_every_profile_has_its_numbers(self):
        for profile, (rates, delays, loss) in vaurien.NETWORKS.items():
            for to, rate, delay in zip([UPSTREAM, DOWNSTREAM], rates, delays):
                with self.subTest(profile, to=to):
                    chain, size = self.chain(profile), rate * 125 // 10     # a tenth of a second
                    arrival = self.arrival(chain, 100, to, size)
                    if loss:
                        self.assertGreaterEqual(arrival, 100000 + 100 + delay - 1)
                    else:
                        self.assertAlmostEqual(arrival, 100000 + 100 + delay, delta=1)

    def test_the_profiles_are_in_the_help(self):
        text = vaurien.option_help(HANDLERS["network"])["profile"]
        self.assertEqual(re.split(", | or ", text), list(vaurien.NETWORKS))

    def test_the_network_goes_on_when_the_delays_of_other_rules_are_over(self):
        for profile in "3g", "very-bad":
            chain = self.chain(profile)
            self.arrival(chain, 60, DOWNSTREAM, 100)        # a rule has delayed these bytes
            chain.reset_due_times(DOWNSTREAM, 2)
            self.assertLess(self.arrival(chain, 3, DOWNSTREAM, 100), 30000)

    def test_content_is_intact_and_no_byte_is_early(self):
        data = random_data(20000)
        with running_proxy(echo) as proxy, connected_client(proxy) as sock:
            proxy.add_toxic("network", profile="wifi-lossy", stream="both")
            began = time.monotonic()
            self.assertEqual(send_and_read(sock, data), data)
            self.assertGreaterEqual(time.monotonic() - began, 0.04)


class TestHandlerLaws(unittest.TestCase):
    """Laws that hold for every registered handler, so for new ones too."""

    EVENTS = [(0, UPSTREAM, OPEN), (1, DOWNSTREAM, b"hello"), (2, UPSTREAM, b"question"),
              (3, UPSTREAM, b"more"), (4, DOWNSTREAM, b"answer"), (5, DOWNSTREAM, b"b"),
              (6, DOWNSTREAM, EOF), (7, UPSTREAM, EOF), (8, UPSTREAM, RESET)]

    def test_every_option_has_a_line_of_help_and_a_supported_type(self):
        for name, function in HANDLERS.items():
            with self.subTest(name):
                self.assertTrue(vaurien.summary(function))
                self.assertEqual(set(vaurien.option_help(function)),
                                 set(vaurien.handler_options(function)))
                vaurien.check_handler(name, function)

    def test_every_handler_accepts_every_event_and_never_yields_an_earlier_time(self):
        for name in HANDLERS:
            for start in range(len(self.EVENTS)):
                for stream in "both", UPSTREAM, DOWNSTREAM:
                    with self.subTest(name, start=start, stream=stream):
                        self.check_events(name, stream, self.EVENTS[start:])

    def check_events(self, name, stream, events):
        """Run events through a handler, and check each event that it yields."""
        chain = chain_of(vaurien.Rule(name, stream=stream))
        with mock.patch.object(vaurien.log, "exception", side_effect=AssertionError(name)):
            for now, direction, received_data in events:
                for t, to, data, delays in chain.process(now, direction, received_data):
                    self.assertGreaterEqual(t, now)
                    self.assertIn(to, (UPSTREAM, DOWNSTREAM))
                    self.assertIsInstance(data, bytes)
                    self.assertEqual(now + sum(seconds for _, seconds, _ in delays), t)

    def test_a_handler_that_only_delays_loses_no_data_when_it_is_released(self):
        for name in "delay", "hang", "dummy":
            with self.subTest(name):
                rule = vaurien.Rule(name)
                chain = chain_of(rule)
                queue = vaurien.DelayQueue(UPSTREAM, vaurien.Budget())
                for now, to, data in self.EVENTS:
                    if to == UPSTREAM and data is not RESET:
                        for t, _, yielded_data, delays in chain.process(now, to, data):
                            queue.put(t, yielded_data, now, delays)
                queue.release([rule])
                self.assertEqual(queue.pop_due(7.5, False), [OPEN])     # after the EOF at 7
                self.assertEqual(list(queue.send_buffer), [b"question", b"more", EOF])

    def test_transfer_delays_a_piece_like_the_handler(self):
        """ActiveRule.transfer and a call of the handler give the same due times."""
        for rate, piece_max in [(1, 100), (10, 1000), (100, vaurien.SEGMENT), (1000, 10000)]:
            with self.subTest(rate=rate):
                rule = vaurien.Rule("bandwidth", {"rate": rate}, per="connection")
                self.assertEqual(rule.link_rate, (rate * 1000, piece_max))
                chain, active = chain_of(rule), vaurien.ActiveRule(rule, 1)
                for t, size in [(0, 1), (0, piece_max), (0, piece_max), (1000, 1), (1000.001, 2)]:
                    (due, _, _, _), = chain.process(t, DOWNSTREAM, bytes(size))
                    self.assertAlmostEqual(t + active.transfer(t, DOWNSTREAM, size), due)
        for options in {"rate": 0}, {"rate": 5, "shared": True}:
            self.assertIsNone(vaurien.Rule("bandwidth", options).link_rate)

    def test_a_handler_delays_each_chunk_by_its_fixed_delay(self):
        for latency, jitter, seconds in (20, 0, 0.02), (20, 5, 0), (0, 0, 0), (-20, 0, 0):
            with self.subTest(latency=latency, jitter=jitter):
                rule = vaurien.Rule("latency", {"latency": latency, "jitter": jitter})
                self.assertEqual(rule.fixed_delay, seconds)
                if seconds:
                    self.assertEqual(chain_of(rule).process(0, UPSTREAM, b"question"), [
                        (seconds, UPSTREAM, b"question", ((rule, seconds, False),))])


# -- Protocols ------------------------------------------------------------------
HTTP_GET = b"GET / HTTP/1.1\r\n\r\n"
HTTP_GET_HOST = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
HTTP_GET_1_0 = b"GET / HTTP/1.0\r\n\r\n"
HTTP_OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"
HTTP_OK_EMPTY = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
HTTP_CHUNKED = b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"

PING = b"PING\r\n"                              # the inline commands of Redis
PONG = b"+PONG\r\n"
REDIS_PING = b"*1\r\n$4\r\nPING\r\n"
REDIS_GET_A = b"*2\r\n$3\r\nGET\r\n$1\r\na\r\n"
REDIS_HELLO = b"$5\r\nhello\r\n"
REDIS_OOM = b"-OOM command not allowed when used memory > 'maxmemory'.\r\n"

MEMCACHE_NO_MEMORY = b"SERVER_ERROR out of memory\r\n"


def mysql_packet(sequence_number, body):
    """Return a packet of the MySQL client/server protocol."""
    return len(body).to_bytes(3, "little") + bytes([sequence_number]) + body


def mysql_query(text):
    """Return COM_QUERY."""
    return mysql_packet(0, b"\x03" + text)


def mysql_prepare(text):
    """Return COM_STMT_PREPARE."""
    return mysql_packet(0, b"\x16" + text)


def mysql_execute(statement_id):
    """Return COM_STMT_EXECUTE for a statement's id of 4 bytes."""
    return mysql_packet(0, b"\x17" + statement_id + b"\0\1\0\0\0")


def mysql_login(flags, rest):
    """Return the client's handshake response. If `rest` is empty, it is an SSL request.

    flags    the client's capability flags
    rest     the bytes after the head, which begin with the user's name
    """
    return mysql_packet(1, struct.pack("<I", flags) + bytes(28) + rest)


MYSQL_LOGIN = mysql_login(0x0A285, b"root\0\0")
MYSQL_QUIT = mysql_packet(0, b"\x01")                       # COM_QUIT
MYSQL_PING = mysql_packet(0, b"\x0e")                       # COM_PING
MYSQL_CLOSE_1 = mysql_packet(0, b"\x19" b"\1\0\0\0")        # COM_STMT_CLOSE, statement 1
MYSQL_LAST_PREPARED = b"\xff\xff\xff\xff"       # MariaDB: the id of the last prepared statement
MYSQL_OK_BODY = b"\0\0\0\2\0\0\0"
MYSQL_OK = mysql_packet(1, MYSQL_OK_BODY)
MYSQL_OK_MORE = mysql_packet(1, b"\0\0\0" b"\x0a\0\0\0")      # another result follows
MYSQL_ERR = mysql_packet(1, b"\xff\x28\x04#42000no")
MYSQL_EOF = mysql_packet(1, b"\xfe\0\0\2\0")
MYSQL_EOF_MORE = mysql_packet(1, b"\xfe\0\0\x0a\0")
MYSQL_EOF_CURSOR = mysql_packet(1, b"\xfe\0\0\x42\0")
MYSQL_ROWS_END = mysql_packet(1, b"\xfe\0\0\2\0\0\0")      # an OK in the place of an EOF
MYSQL_COLUMN = mysql_packet(1, b"\3def" + bytes(20))
MYSQL_ROW = mysql_packet(1, b"\1a")


def mysql_result(*values):
    """Return the reply to a query: a result of one column."""
    rows = b"".join(mysql_packet(1, bytes([len(value)]) + value) for value in values)
    return mysql_packet(1, b"\1") + MYSQL_COLUMN + MYSQL_EOF + rows + MYSQL_EOF


def pg_message(type_byte, body=b""):
    """Return a message of the PostgreSQL frontend/backend protocol."""
    return type_byte + struct.pack(">I", 4 + len(body)) + body


def pg_query(text):
    return pg_message(b"Q", text + b"\0")


def pg_parse(statement, text):
    return pg_message(b"P", statement + b"\0" + text + b"\0\0\0")


def pg_bind(statement):
    return pg_message(b"B", b"\0" + statement + b"\0" + bytes(6))


PG_STARTUP = struct.pack(">II", 16, 196608) + b"user\0x\0\0"
PG_SSL_REQUEST = struct.pack(">II", 8, 80877103)
PG_EXECUTE = pg_message(b"E", bytes(5))
PG_SYNC = pg_message(b"S")
PG_PARSE_COMPLETE = pg_message(b"1")
PG_BIND_COMPLETE = pg_message(b"2")
PG_SELECTED_1 = pg_message(b"C", b"SELECT 1\0")
PG_ERROR = pg_message(b"E", b"SERROR\0\0")
PG_READY = pg_message(b"Z", b"I")               # idle
PG_READY_FAILED = pg_message(b"Z", b"E")        # in a failed transaction

TLS_HELLO = b"\x16\x03\x01"                     # the beginning of a record


def tls_hello(*extensions, split=0):
    """Return a ClientHello with these (type, body), in two records if split is not 0."""
    body = b"".join(struct.pack(">HH", type_, len(data)) + data for type_, data in extensions)
    hello = (b"\3\3" + bytes(32) + b"\2id" + b"\0\2\x13\1" + b"\1\0"
             + struct.pack(">H", len(body)) + body)
    hello = b"\1" + struct.pack(">I", len(hello))[1:] + hello
    return b"".join(TLS_HELLO + struct.pack(">H", len(part)) + part
                    for part in (hello[:split], hello[split:]) if part)


TLS_NAME = (0, b"\0\x0d\0\0\x0a" b"db.example")
TLS_PROTOCOLS = (16, b"\0\x0c\2h2\x08http/1.1")
TLS_VERSIONS = (43, b"\6\x1a\x1a\3\4\3\3")        # the first one means nothing (RFC 8701)
SPECIAL_BYTES = b"\r\n\0*$ 019abQZS\xff-"       # bytes that have a meaning to the parsers


PARSED_PROTOCOLS = [name for name in vaurien.PROTOCOLS if name != "tcp"]


def joined_messages(rows):
    """Return the bytes of all rows of an entry of TestFraming.REQUESTS."""
    return b"".join(data for data, _ in rows)


def error_bytes(protocol, kind):
    """Return the bytes that a server of this protocol sends to report an error."""
    return vaurien.PROTOCOLS[protocol]().encode_error(kind)


def error_rule(kind=None, match=None, **fields):
    """Return a rule of the error handler: for all requests, or for those that match a pattern."""
    return vaurien.Rule("error", {"kind": kind} if kind else None,
                        match=re.compile(match) if match else None, **fields)


def matching_rule(name, match, **fields):
    """Return a rule of a handler, for requests that match a pattern."""
    return vaurien.Rule(name, match=re.compile(match), **fields)


def undrawn_rule(name):
    """Return a rule that is drawn for no request."""
    return vaurien.Rule(name, draw_max=0)


def request_info(protocol):
    """Return the Request.info of a new request."""
    return {"mysql": vaurien.MysqlCommand(), "postgres": vaurien.PostgresReply(
        vaurien.Postgres.EXECUTE_ENDS)}.get(protocol)


class ProtocolReader:
    """A protocol object with its two framers, but without a chain: a test feeds the framers.

    Tests use Framer, and a queue of exchanges without a chain, only through this class.
    """

    def __init__(self, protocol, pending=None, host=b""):
        """Make the protocol object of this protocol name.

        pending    the requests that wait for a reply. None means those of a new connection:
                   its handshake if the server sends first, and otherwise none
        """
        self.protocol = vaurien.PROTOCOLS[protocol](host)
        self.errors = {UPSTREAM: "", DOWNSTREAM: ""}
        if pending is None and self.protocol.server_first:
            self.protocol.exchanges.append(vaurien.Exchange(0, [], None, handshake=True))
        for request in pending or ():
            self.add_pending(request)

    def add_pending(self, request):
        """Append a complete request, which waits for its reply."""
        exchange = vaurien.Exchange(0, [], request)
        exchange.forwarded = exchange.complete = True
        self.protocol.exchanges.append(exchange)

    def pending_count(self):
        return len(self.protocol.awaited_exchanges())

    def framer(self, to):
        return self.protocol.request_framer if to == UPSTREAM else self.protocol.reply_framer

    def feed(self, to, data, parse_whole=False):
        """Feed data to a framer. Return the boundaries in it: [(offset, Request or Signal)].

        parse_whole    first try to recognize the data as one whole message of a common form
        """
        boundaries = []
        if self.errors[to]:
            return boundaries
        framer = self.framer(to)
        try:
            whole = framer.whole_message(data) if parse_whole else None
            for boundary in whole or framer.feed(data, len(data)):
                boundaries.append(boundary)
                is_end = boundary[1] is vaurien.END_OF_MESSAGE
                if is_end and to == DOWNSTREAM and self.protocol.awaited_exchanges():
                    self.protocol.awaited_exchanges()[0].reply_done = True
        except vaurien.ProtocolError as error:
            self.errors[to] = str(error)
        return boundaries

    def feed_request(self, data):
        """Feed one whole request to the framer, and return its Request object."""
        (_, request), _end = self.feed(UPSTREAM, data)
        return request

    def error(self, to):
        """Return the reason why a direction is no longer parsed, or an empty text."""
        return self.errors[to]

    def at_boundary(self, to):
        return self.framer(to).at_boundary

    def buffered_size(self, to):
        return len(self.framer(to).buffered)


class TestFraming(unittest.TestCase):
    """Requests and replies begin and end at the same bytes in any split of a stream."""

    # [(protocol, case, rows)]. A row is a message of a client: (bytes, request). `request` is
    # (text, name) of the request that begins with the message, or None if none begins.
    REQUESTS = [
        ("redis", "arrays and inline commands", [
            (b"*2\r\n" b"$3\r\nget\r\n" b"$1\r\na\r\n", (b"get a", "GET")),
            (b"PING x\r\n", (b"PING x", "PING")),
            (b"*3\r\n" b"$3\r\nSET\r\n" b"$1\r\nb\r\n" b"$5\r\nhe\r\nl\r\n",
             (b"SET b he\r\nl", "SET"))]),
        ("http", "bodies of all kinds", [
            (b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n", (b"GET /a HTTP/1.1\nHost: x", "GET")),
            (b"POST /b HTTP/1.1\r\ncontent-length: 5\r\n\r\n" b"he\n\nl",
             (b"POST /b HTTP/1.1\ncontent-length: 5", "POST")),
            (b"PUT / HTTP/1.1\r\nTransfer-Encoding: gzip, chunked\r\n\r\n"
             b"3;x=y\r\nabc\r\n" b"A\r\n0123456789\r\n" b"0\r\nX: y\r\n\r\n",
             (b"PUT / HTTP/1.1\nTransfer-Encoding: gzip, chunked", "PUT")),
            (b"HEAD / HTTP/1.0\n\n", (b"HEAD / HTTP/1.0", "HEAD"))]),
        ("memcache", "text and meta commands", [
            (b"get a b\r\n", (b"get a b", "get")),
            (b"set a 0 0 5\r\n" b"he\r\nl\r\n", (b"set a 0 0 5", "set")),
            (b"cas b 0 0 1 77 noreply\r\n" b"x\r\n", (b"cas b 0 0 1 77 noreply", "cas")),
            (b"ms c 3 T0\r\n" b"abc\r\n", (b"ms c 3 T0", "ms")),
            (b"set a 0 0\r\n", (b"set a 0 0", "set")),           # without a size: no body
            (b"mg c v q\r\n", (b"mg c v q", "mg")),
            (b"mn\r\n", (b"mn", "mn")),
            (b"bogus\r\n", (b"bogus", "bogus"))]),
        ("memcache", "keys with unusual bytes or names", [
            (b"set voil\xc3\xa0x 0 0 5\r\n" b"hello\r\n", (b"set voil\xc3\xa0x 0 0 5", "set")),
            (b"get noreply\r\n", (b"get noreply", "get"))]),
        ("http", "empty lines between requests", [
            (b"\r\n\r\n" b"GET / HTTP/1.1\r\n\r\n", (b"GET / HTTP/1.1", "GET")),
            (b"\r\n" b"GET /b HTTP/1.1\r\n\r\n", (b"GET /b HTTP/1.1", "GET"))]),
        ("mysql", "login and statements", [
            (MYSQL_LOGIN, None),
            (mysql_query(b"SELECT 1"), (b"SELECT 1", 3)),
            (MYSQL_PING, (b"", 14)),
            (mysql_prepare(b"SELECT ?"), (b"SELECT ?", 22)),
            (MYSQL_QUIT, (b"", 1))]),
        ("postgres", "startup, simple and extended queries", [
            (PG_SSL_REQUEST, None),
            (PG_STARTUP, None),
            (pg_message(b"p", b"secret\0"), None),
            (pg_query(b"SELECT 1"), (b"SELECT 1", "QUERY")),
            (pg_parse(b"s", b"SELECT $1") + pg_message(b"D", b"Ss\0") + PG_SYNC, (b"", "SYNC")),
            (pg_bind(b"s") + pg_message(b"D", b"P\0") + PG_EXECUTE, (b"SELECT $1", "EXECUTE")),
            (pg_message(b"H") + PG_SYNC, (b"", "SYNC")),
            (pg_message(b"X"), None)]),
        ("smtp", "commands and a chunk", [
            (b"EHLO x\r\n", (b"EHLO x", "EHLO")),
            (b"MAIL FROM:<a@b>\r\n", (b"MAIL FROM:<a@b>", "MAIL")),
            (b"bdat 5 LAST\r\n" b"he\r\nl", (b"bdat 5 LAST", "BDAT")),
            (b"QUIT\r\n", (b"QUIT", "QUIT"))]),
        ("tls", "a ClientHello", [
            (tls_hello(TLS_NAME, (99, b"x"), TLS_PROTOCOLS, TLS_VERSIONS),
             (b"db.example h2,http/1.1 TLSv1.3,TLSv1.2", "CLIENT_HELLO"))]),
        ("tls", "a ClientHello without extensions, in two records", [
            (tls_hello(split=9), (b"- - TLSv1.2", "CLIENT_HELLO"))])]

    # [(protocol, rows)]. A row is (name of a request, bytes of its reply).
    REPLIES = [
        ("redis", [
            ("GET", b"+OK\r\n"),
            ("GET", b"$5\r\nhe\r\nl\r\n"),
            ("GET", b"*3\r\n" b":1\r\n" b"*1\r\n$-1\r\n" b"*-1\r\n"),
            ("GET", b"%1\r\n" b"+a\r\n" b"~1\r\n_\r\n"),
            ("GET", b"|1\r\n" b"+k\r\n+v\r\n" b"=6\r\ntxt:ab\r\n")]),
        ("http", [
            ("GET", b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n" b"a\n\n"),
            ("HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 300\r\n\r\n"),
            ("GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 3\r\n\r\n"),
            ("GET", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
                    b"1\r\na\r\n" b"0\r\nX: y\r\n\r\n"),
            ("PUT", b"HTTP/1.1 100 Continue\r\n\r\n" b"HTTP/1.1 204 No Content\r\n\r\n")]),
        ("memcache", [
            ("get", b"VALUE a 0 5\r\nhe\r\nl\r\n" b"VALUE b 0 3 7\r\nEND\r\n" b"END\r\n"),
            ("set", b"STORED\r\n"),
            ("stats", b"STAT a 1\r\n" b"STAT b END\r\n" b"END\r\n"),
            ("ms", b"HD\r\n"),
            ("mg", b"VA 3 x\r\nabc\r\n"),
            ("mn", b"MN\r\n")]),
        ("mysql", [
            (3, MYSQL_OK),
            (3, MYSQL_ERR),
            (3, mysql_result(b"a", b"", b"\xfe\xff")),
            (3, mysql_result()),
            # Without the first EOF, and with an OK in the place of the last one
            (3, mysql_packet(1, b"\2") + MYSQL_COLUMN * 2 + MYSQL_ROW * 3 + MYSQL_ROWS_END),
            (3, mysql_packet(1, b"\1") + MYSQL_COLUMN + MYSQL_ROWS_END),
            (3, mysql_packet(1, b"\xfc\3\0") + MYSQL_COLUMN * 3 + MYSQL_ROW + MYSQL_ERR),
            # Several results; a null value begins a row
            (3, MYSQL_OK_MORE + mysql_packet(1, b"\1") + MYSQL_COLUMN + MYSQL_EOF
             + mysql_packet(1, b"\xfb") + MYSQL_EOF_MORE + MYSQL_OK),
            # A progress report, and then an OK
            (3, mysql_packet(1, b"\xff\xff\xff\1\1\2\0\0\0") + MYSQL_OK),
            # The reply after a local file
            (3, mysql_packet(1, b"\xfbname") + MYSQL_OK),
            (9, mysql_packet(1, b"Uptime: 1")),
            (14, MYSQL_OK),
            # PREPARE with two parameters and one column
            (0x16, mysql_packet(1, b"\0" b"\1\0\0\0" b"\1\0\2\0\0\0\0")
             + MYSQL_COLUMN * 2 + MYSQL_EOF + MYSQL_COLUMN + MYSQL_EOF),
            (0x16, mysql_packet(1, b"\0" b"\1\0\0\0" b"\0\0\0\0\0\0\0")),
            # EXECUTE with binary rows, without known columns, and with a cursor; FETCH
            (0x17, mysql_packet(1, b"\1") + MYSQL_COLUMN + MYSQL_EOF
             + mysql_packet(1, b"\0\0\1a") + MYSQL_EOF),
            (0x17, mysql_packet(1, b"\1\0") + MYSQL_ROW + MYSQL_ROWS_END),
            (0x17, mysql_packet(1, b"\1") + MYSQL_COLUMN + MYSQL_EOF_CURSOR),
            (0x1c, mysql_packet(1, b"\0\0\1a") * 2 + MYSQL_EOF),
            (0x1c, MYSQL_EOF),
            # CHANGE_USER with another round of the login
            (0x11, mysql_packet(1, b"\xfeplugin\0nonce") + MYSQL_OK)]),
        ("postgres", [
            ("QUERY", pg_message(b"T", b"x") + pg_message(b"D", b"Z") + PG_SELECTED_1 + PG_READY),
            ("EXECUTE", PG_PARSE_COMPLETE + PG_BIND_COMPLETE + pg_message(b"n")
             + pg_message(b"C", b"INSERT 0 1\0")),
            ("EXECUTE", PG_ERROR),
            ("SYNC", PG_READY)]),
        ("smtp", [
            ("HELO", b"250 hi\r\n"),
            ("EHLO", b"250-a\r\n250-b\r\n250 c\r\n"),
            ("MAIL", b"450 no\r\n")])]

    # [(protocol, name of a request, pieces of its reply)]. A row ends after the pieces marked ROW.
    ROW = object()
    REPLY_ROWS = [
        ("redis", "GET", [b"$5\r\nhello\r\n"]),
        ("redis", "LRANGE", [b"*3\r\n:1\r\n", ROW, b"*2\r\n$1\r\na\r\n*1\r\n+b\r\n", ROW,
                             b"*-1\r\n", ROW]),
        ("redis", "HGETALL", [b"|1\r\n+k\r\n*1\r\n+v\r\n%2\r\n+a\r\n:1\r\n", ROW,
                              b"+b\r\n~1\r\n_\r\n", ROW]),
        ("redis", "KEYS", [b"*0\r\n"]),
        ("mysql", 3, [mysql_packet(1, b"\1") + MYSQL_COLUMN + MYSQL_EOF + MYSQL_ROW, ROW,
                      mysql_packet(1, b"\xfb"), ROW, MYSQL_EOF_MORE + mysql_packet(1, b"\1")
                      + MYSQL_COLUMN + MYSQL_EOF + MYSQL_ROW, ROW, MYSQL_ERR]),
        ("mysql", 0x17, [mysql_packet(1, b"\1\0") + MYSQL_ROW, ROW, MYSQL_ROWS_END]),
        ("mysql", 0x1c, [mysql_packet(1, b"\0\0\1a"), ROW, MYSQL_EOF]),
        ("mysql", 14, [MYSQL_OK]),
        ("postgres", "QUERY", [pg_message(b"T", b"x") + pg_message(b"D", b"1"), ROW,
                               pg_message(b"D", b"2"), ROW, PG_SELECTED_1 + PG_READY]),
        ("postgres", "EXECUTE", [pg_message(b"H", b"x") + pg_message(b"d", b"1\n"), ROW,
                                 pg_message(b"c") + PG_SELECTED_1]),
        ("http", "GET", [HTTP_OK]),
        ("http", "HEAD", [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"]),
        ("http", "GET", [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
                         b"3\r\na\n\n\r\n", ROW, b"1;x=y\r\nd\r\n", ROW, b"0\r\nX: y\r\n\r\n"]),
        ("http", "GET", [b"HTTP/1.1 200 OK\r\nContent-Length: 21\r\n"
                         b"content-type: text/event-stream; charset=utf-8\r\n\r\n"
                         b"data: 1\n\n", ROW, b"data: 2\r\n\r\n", ROW, b"d"]),
        ("http", "GET", [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n"
                         b"Content-Type:text/event-stream\r\n\r\n"
                         b"10\r\ndata: 1\r\nid: 1\r\n\r\n" b"4\r\n\r\n", ROW, b"da\r\n"
                         b"7\r\nta: 2\n\n\r\n", ROW, b"0\r\n\r\n"])]

    # {protocol: (pieces of a client's messages, pieces of a backend's messages)}
    SAMPLES = {
        "redis": ([
            REDIS_GET_A,
            REDIS_PING,
            PING,
        ], [
            b"+OK\r\n",
            REDIS_HELLO,
            b"$-1\r\n",
            b":1\r\n",
            b"$22\r\n",
            b"$2dd",
            b"$12\nxxx",
            b"$0\r\n\r\n",
        ]),
        "http": ([
            HTTP_GET_HOST,
            b"HEAD /a HTTP/1.0\r\nHost: x\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: foo\n\r\n",
            b"GET / HTTP/1.0\r\nconnection: keep-alive\r\n\r\n",
            b"POST / HTTP/1.1\r\nContent-Length: 2\r\n\r\n",
            b"hi",
        ], [
            HTTP_OK,
            b"HTTP/1.1 200 OK\nContent-Length: 2\n\r\nhi",
            b"HTTP/1.1 404 X\r\n\r\n",
        ])}

    def read_boundaries(self, protocol, data, sizes, to=UPSTREAM, pending=()):
        """Return the boundaries in data that arrives in pieces of these sizes.

        A boundary is (offset, Signal) or (offset, (text, name) of a request). If the data does
        not conform to the protocol, the last item is an error text.
        """
        reader = ProtocolReader(protocol, pending)
        boundaries, start = [], 0
        for size in sizes:
            piece_type = bytearray if size % 2 else bytes       # a framer accepts both
            piece = piece_type(data[start:start + size])
            for offset, boundary in reader.feed(to, piece):
                if not isinstance(boundary, vaurien.Signal):
                    boundary = (bytes(boundary.text), boundary.name)
                boundaries.append((start + offset, boundary))
            start += size
            if reader.error(to):
                return boundaries + [reader.error(to)]
        return boundaries

    def splits(self, data):
        """Yield the sizes of the pieces for each split: single bytes, then 20 random splits."""
        yield [1] * len(data)
        for seed in range(20):
            rng, sizes = random.Random(seed), []
            while sum(sizes) < len(data):
                sizes.append(rng.randint(1, 30))
            yield sizes

    def check_splits(self, case, boundaries, protocol, data, to=UPSTREAM, pending=()):
        """Check that the boundaries are the same in all splits of the data."""
        for index, sizes in enumerate(self.splits(data)):
            with self.subTest(protocol, case=case, split=index):
                self.assertEqual(self.read_boundaries(protocol, data, sizes, to, pending),
                                 boundaries)

    def test_boundaries_of_requests(self):
        for protocol, case, rows in self.REQUESTS:
            with self.subTest(protocol, case=case):
                data = joined_messages(rows)
                boundaries = self.read_boundaries(protocol, data, [len(data)])
                requests = [boundary for _, boundary in boundaries if isinstance(boundary, tuple)]
                self.assertEqual(requests, [request for _, request in rows if request])
                self.assertEqual(boundaries[-1], (len(data), vaurien.END_OF_MESSAGE))
                self.check_splits(case, boundaries, protocol, data)

    def test_boundaries_of_replies(self):
        for protocol, rows in self.REPLIES:
            with self.subTest(protocol):
                info = request_info(protocol)
                pending = [vaurien.Request(b"", name, info=info) for name, _ in rows]
                data, boundaries = b"", []
                for _, reply in rows:
                    data += reply
                    boundaries.append((len(data), vaurien.END_OF_MESSAGE))
                self.assertEqual(
                    self.read_boundaries(protocol, data, [len(data)], DOWNSTREAM, pending),
                    boundaries)
                self.check_splits("replies", boundaries, protocol, data, DOWNSTREAM, pending)

    def test_the_rows_of_mysql_may_be_larger_than_a_packet(self):
        """The second packet of a row may begin like an EOF, and may be empty."""
        largest = mysql_packet(1, b"\xfe" + bytes(0xFFFFFE))
        first = mysql_packet(1, b"\1") + MYSQL_COLUMN + MYSQL_EOF
        for rest in mysql_packet(2, b"\xfe\0"), mysql_packet(2, b""):
            with self.subTest(rest=rest):
                data = first + MYSQL_ROW + largest + rest + MYSQL_ROW + MYSQL_EOF
                cut = len(first + MYSQL_ROW + largest)
                for sizes in [len(data)], [cut - 1, 2, 3, len(data)], [cut + 4, len(data)]:
                    request = vaurien.Request(b"", 3, info=vaurien.MysqlCommand())
                    self.assertEqual(
                        self.read_boundaries("mysql", data, sizes, DOWNSTREAM, [request]),
                        [(len(data), vaurien.END_OF_MESSAGE)])

    def random_messages(self, rng, samples):
        """Return [(name of a request, bytes)]. The bytes are joined, changed and cut samples."""
        messages = []
        message_count = rng.choice([1, 1, 4])       # several, to test the caches of framers
        for _ in range(message_count):
            sample_count, change_count = rng.choice([1, 1, 2]), rng.choice([0, 0, 1, 2])
            data = bytearray(b"".join(rng.choice(samples) for _ in range(sample_count)))
            for _ in range(change_count):
                start = rng.randrange(len(data) + 1)
                data[start:start + rng.randint(0, 2)] = rng.choice(
                    [b"", b"\r", b"\n", b"\r\n", b"1", b"$", b"x"])
            name = rng.choice(["GET", "GET", "HEAD"])
            end = rng.choice([len(data), len(data), rng.randrange(len(data) + 1)])
            messages.append((name, bytes(data[:end])))
        return messages

    def read_messages(self, protocol, to, messages, parse_whole):
        """Feed [(name of a request, bytes)] to a new reader, and return the reader and a result.

        The result is (boundaries, error text, count of pending requests). A boundary at which a
        request begins has all fields of the request, and its rewritten head.
        """
        reader = ProtocolReader(protocol, host=b"other:1" if protocol == "http" else b"")
        boundaries = []
        for name, data in messages:
            if to == DOWNSTREAM:
                reader.add_pending(vaurien.Request(b"", name))
            for offset, boundary in reader.feed(to, data, parse_whole):
                if not isinstance(boundary, vaurien.Signal):
                    boundary = (boundary.text, boundary.name, boundary.info,
                                reader.protocol.rewrite_head(data[:offset]))
                boundaries.append((offset, boundary))
        return reader, (boundaries, reader.error(to), reader.pending_count())

    def test_whole_messages_are_parsed_like_pieces_of_messages(self):
        """The shortcut for whole messages and the parser of pieces agree on random messages."""
        rng, combinations = random.Random(1), set()
        for protocol, (client_samples, backend_samples) in self.SAMPLES.items():
            for to, samples in (UPSTREAM, client_samples), (DOWNSTREAM, backend_samples):
                with self.subTest(protocol, to=to):
                    for _ in range(2000):
                        messages = self.random_messages(rng, samples)
                        results = []
                        for parse_whole in True, False:
                            reader, result = self.read_messages(
                                protocol, to, messages, parse_whole)
                            results.append(result)
                            combinations.add(
                                (protocol, to, reader.at_boundary(to), len(messages)))
                        with_shortcut, without_shortcut = results
                        self.assertEqual(with_shortcut, without_shortcut, messages)
        self.assertEqual(len(combinations), 2 ** 4)         # all combinations have occurred

    def test_rows_of_replies_end_at_the_same_bytes_in_any_split_if_they_are_counted(self):
        for protocol, name, parts in self.REPLY_ROWS:
            data, ends = b"", []
            for part in parts:
                if part is self.ROW:
                    ends.append((len(data), vaurien.END_OF_ROW))
                else:
                    data += part
            for counts_rows in True, False:
                expected = [end for end in ends if counts_rows] + [
                    (len(data), vaurien.END_OF_MESSAGE)]
                for size in 1, 3, len(data):
                    with self.subTest(protocol, data=data, counts_rows=counts_rows, size=size):
                        reader = ProtocolReader(protocol, [
                            vaurien.Request(b"", name, info=request_info(protocol))])
                        reader.protocol.counts_rows = counts_rows
                        found = [(start + offset, boundary)
                                 for start in range(0, len(data), size)
                                 for offset, boundary in reader.feed(
                                     DOWNSTREAM, data[start:start + size])]
                        self.assertEqual((found, reader.error(DOWNSTREAM)), (expected, ""))

    def test_requests_without_a_reply_are_recognized(self):
        for protocol, data, has_reply in [
                ("memcache", b"set a 0 0 1 noreply\r\nx\r\n", False),
                ("memcache", b"quit\r\n", False),
                ("memcache", b"mg a q\r\n", False),
                ("memcache", b"mg a v\r\n", True),
                ("redis", b"*0\r\n", False),
                ("redis", b"\r\n", False),
                ("redis", PING, True),
                ("mysql", MYSQL_CLOSE_1, False),
                ("mysql", MYSQL_QUIT, False),
                ("mysql", MYSQL_PING, True)]:
            with self.subTest(protocol, data=data):
                self.assertEqual(ProtocolReader(protocol).feed_request(data).replies, has_reply)

    def test_a_body_of_any_size_is_not_buffered(self):
        block = bytes(1 << 20)
        for protocol, head in [
                ("http", b"POST / HTTP/1.1\r\nContent-Length: 1099511627776\r\n\r\n"),
                ("memcache", b"set a 0 0 1000000000\r\n"),
                ("redis", b"*2\r\n$3\r\nSET\r\n$1000000000\r\n"),
                ("postgres", PG_STARTUP + b"Q\x7f\0\0\0SELECT 1"),
                ("mysql", MYSQL_LOGIN + b"\xff\xff\xff\0\x03SELECT 1")]:
            with self.subTest(protocol):
                reader = ProtocolReader(protocol)
                for data in [head] + [block] * 10:
                    reader.feed(UPSTREAM, data)
                self.assertLessEqual(reader.buffered_size(UPSTREAM), vaurien.MATCH_MAX)
                self.assertEqual(reader.error(UPSTREAM), "")

    def ends_of_mail(self, body, sizes):
        """Feed a mail in pieces of these sizes; return the offsets of the ends of messages."""
        reader = ProtocolReader("smtp", [vaurien.Request(b"DATA", "DATA")])
        reader.feed(DOWNSTREAM, b"354 go\r\n")
        ends, start = [], 0
        for size in sizes:
            for offset, boundary in reader.feed(UPSTREAM, body[start:start + size]):
                if boundary is vaurien.END_OF_MESSAGE:
                    ends.append(start + offset)
            start += size
        return ends

    def test_a_mail_message_ends_at_a_single_dot(self):
        for body, length in [
                (b".\r\n" b"RSET\r\n", 3),
                (b"a\r\n.\r\n" b"RSET\r\n", 6),
                (b"..\r\n.x\r\n\n.\r\n\r\n.\r\n" b"RSET\r\n", 17),
                (b".\r\n" b"x\r\n..\r\n.x\r\n\r\n.\r\nQUIT\r\n", 3)]:
            for index, sizes in enumerate([[len(body)], *self.splits(body)]):
                with self.subTest(body=body, split=index):
                    first_end, *_ = self.ends_of_mail(body, sizes)
                    self.assertEqual(first_end, length)

    def test_bytes_that_do_not_conform_to_the_protocol_are_recognized(self):
        for protocol, to, data in [
                ("http", UPSTREAM, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
                ("http", UPSTREAM, TLS_HELLO + bytes(300) + b"\n\n"),
                ("http", UPSTREAM, b"x" * 70000),
                ("http", DOWNSTREAM, b"HTTP/1.1 101 Switching Protocols\r\n\r\n"),
                ("redis", UPSTREAM, b"SUBSCRIBE a\r\n"),
                ("redis", UPSTREAM, b"*1\r\n$7\r\nmonitor\r\n"),
                ("redis", UPSTREAM, b"*2\r\n$6\r\nclient\r\n$5\r\nreply\r\n"),
                ("redis", UPSTREAM, b"*2\r\nx\r\n"),
                ("redis", UPSTREAM, b"*x\r\n"),
                ("redis", UPSTREAM, b"*1\r\n:3\r\n"),
                ("redis", DOWNSTREAM, b"hello\r\n"),
                ("redis", DOWNSTREAM, b">2\r\n"),
                ("memcache", UPSTREAM, b"\x80\n"),
                ("memcache", UPSTREAM, b"set a 0 0 x\r\n"),
                ("mysql", UPSTREAM, mysql_login(0xAA85, b"")),          # TLS
                ("mysql", UPSTREAM, mysql_login(0xA2A5, b"")),          # zlib compression
                ("mysql", UPSTREAM, mysql_login(0xA285 | 1 << 26, b"root\0\0")),     # zstd
                ("postgres", UPSTREAM, TLS_HELLO + bytes(5)),
                ("postgres", UPSTREAM, struct.pack(">II", 16, 80877107)),   # unknown request code
                ("postgres", DOWNSTREAM, b"\0\0\0\0\5"),                # no type of a message
                ("tls", UPSTREAM, TLS_HELLO + b"\0\1\2"),                   # a ServerHello
                ("tls", UPSTREAM, TLS_HELLO + b"\0\4\1\0\0\0"),              # of no bytes
                ("tls", UPSTREAM, TLS_HELLO + b"\xff\xff"),                  # too long
                ("smtp", DOWNSTREAM, b"hello\r\n")]:
            with self.subTest(protocol, to=to, data=data[:40]):
                *_, error = self.read_boundaries(protocol, data, [len(data)], to)
                self.assertIsInstance(error, str)

    def test_the_beginning_of_other_bytes_is_recognized_at_once(self):
        """Readers waited for the end of a line or a head that never came."""
        for protocol, to, data in [
                *((name, UPSTREAM, TLS_HELLO) for name in ("http", "redis", "memcache", "smtp")),
                ("http", UPSTREAM, b"hello"),
                ("http", UPSTREAM, b"GET /" + b"x" * 300 + b" HTTP/2"),
                ("http", UPSTREAM, b"GET /\r\n"),                   # HTTP/0.9
                ("http", UPSTREAM, b"GET / HTTP/1.1\rHost: x\r\r"),
                ("http", UPSTREAM, bytes(1)),
                ("http", DOWNSTREAM, b"\x15"),                      # an alert of TLS
                ("http", DOWNSTREAM, b"<html>"),
                ("http", DOWNSTREAM, b"HTTP/1.1 2x"),
                ("redis", UPSTREAM, b"get \0"),
                ("redis", DOWNSTREAM, b"hello"),
                ("memcache", UPSTREAM, b"\x80\x0b"),                # the binary protocol
                ("memcache", UPSTREAM, b"get \x7f"),
                ("memcache", DOWNSTREAM, b"\x81\x0b"),
                ("smtp", UPSTREAM, b"EHLO \x01"),
                ("smtp", DOWNSTREAM, b"25x"),
                ("tls", UPSTREAM, b"GET /")]:
            with self.subTest(protocol, to=to, data=data):
                for sizes in [len(data)], [1] * len(data):
                    self.assertIsInstance(
                        self.read_boundaries(protocol, data, sizes, to)[-1], str)

    def test_encryption_that_the_backend_accepts_ends_the_protocol(self):
        reader = ProtocolReader("postgres")
        reader.feed(UPSTREAM, PG_SSL_REQUEST)
        reader.feed(DOWNSTREAM, b"S")
        self.assertEqual(reader.error(DOWNSTREAM), "encryption follows")
        reader = ProtocolReader("smtp", [vaurien.Request(b"STARTTLS", "STARTTLS")])
        reader.feed(DOWNSTREAM, b"220 go\r\n")
        self.assertEqual(reader.error(DOWNSTREAM), "TLS follows")

    def test_encryption_in_which_the_proxy_takes_part(self):
        request = mysql_login(0xAA85, b"")
        starttls = [vaurien.Request(b"STARTTLS", "STARTTLS")]
        for protocol, pending, to, data, before in [
                ("postgres", None, DOWNSTREAM, b"S", PG_SSL_REQUEST),
                ("smtp", starttls, DOWNSTREAM, b"220 go\r\n", b""),
                ("mysql", None, UPSTREAM, request, b"")]:
            for sizes in [len(data)], [1] * len(data):
                with self.subTest(protocol, pieces=len(sizes)):
                    reader = ProtocolReader(protocol, pending)
                    reader.protocol.joins_tls = True
                    reader.feed(UPSTREAM, before)
                    boundaries = [boundary for index in range(len(sizes)) for boundary in
                                  reader.feed(to, data[index * sizes[0]:(index + 1) * sizes[0]])]
                    self.assertIn((sizes[-1], vaurien.TLS_BEGINS), boundaries)

    def test_tls_that_begins_with_the_bytes_of_its_announcement(self):
        """MySQL's clients send SSLRequest and ClientHello at once. The login follows in TLS."""
        request = mysql_login(0xAA85, b"")
        for rules in [], [vaurien.Rule("delay"), error_rule("1213")]:
            for split in 0, 5, len(request), len(request) + 3:
                with self.subTest(rules=len(rules), split=split):
                    play = Playbook(self, "mysql", rules)
                    play.reader.protocol.joins_tls = True
                    data = request + TLS_HELLO
                    got = play.client(data[:split]).to_backend if split else b""
                    if play.chain.encrypted is None:
                        got += play.client(data[split:]).to_backend
                        self.assertEqual(play.chain.encrypted, data[max(split, len(request)):])
                    self.assertEqual(got[:len(request)], request)
                    play.chain.encrypted = None
                    login = mysql_packet(2, MYSQL_LOGIN[4:])
                    play.client(login).assert_passes()
                    play.backend(MYSQL_OK).assert_passes()

    def test_random_bytes_raise_nothing_and_are_parsed_alike_in_pieces(self):
        for protocol in PARSED_PROTOCOLS:
            samples = [joined_messages(rows) for name, _, rows in self.REQUESTS
                       if name == protocol]
            with self.subTest(protocol):
                for seed in range(120):
                    rng = random.Random("%s %d" % (protocol, seed))
                    data = bytearray(rng.choice(samples) if seed % 2 else b"")
                    for _ in range(rng.randint(1, 20)):
                        data.insert(rng.randint(0, len(data)), rng.choice(SPECIAL_BYTES))
                    for to in UPSTREAM, DOWNSTREAM:
                        self.assertEqual(
                            self.read_boundaries(protocol, data, [1] * len(data), to),
                            self.read_boundaries(protocol, data, [len(data)], to),
                            (to, bytes(data)))

    def test_a_head_that_is_too_long_is_rejected_whole_and_in_pieces(self):
        data = b"GET / HTTP/1.1\r\nX: " + b"x" * 70000 + b"\r\n\r\n"
        for sizes in [len(data)], [60000, len(data) - 60000]:
            with self.subTest(sizes=sizes):
                reader, start = ProtocolReader("http"), 0
                for size in sizes:
                    reader.feed(UPSTREAM, data[start:start + size])
                    start += size
                self.assertTrue(reader.error(UPSTREAM))

    def test_a_chunk_without_a_valid_size_is_rejected(self):
        for size in b"-6", b"+6", b"0x6", b"1_0", b"", b" ":
            with self.subTest(size=size):
                reader = ProtocolReader("http")
                reader.feed(UPSTREAM, HTTP_CHUNKED + size + b"\r\n")
                self.assertIn("is not a chunk", reader.error(UPSTREAM))

    def test_prepared_statements_match_by_their_text(self):
        reader = ProtocolReader("mysql", pending=())
        reader.add_pending(reader.feed_request(mysql_prepare(b"SELECT ? FROM carts")))
        reader.feed(DOWNSTREAM, mysql_packet(1, b"\0" b"\7\0\0\0" b"\1\0\1\0\0\0\0"))
        request = reader.feed_request(mysql_execute(b"\7\0\0\0"))
        self.assertEqual(request.text, b"SELECT ? FROM carts")

    def test_closed_and_replaced_statements_are_forgotten(self):
        reader = ProtocolReader("postgres")
        reader.feed(UPSTREAM, PG_STARTUP)
        for index in range(9):
            reader.feed(UPSTREAM, pg_parse(b"a%d" % index, b"SELECT")
                        + pg_message(b"C", b"Sa%d\0" % index))
        reader.feed(UPSTREAM, pg_parse(b"", b"x" * 70000))
        self.assertEqual(list(reader.protocol.statements), [b""])
        reader = ProtocolReader("mysql", pending=())
        reader.protocol.statements[b"\1\0\0\0"] = b"SELECT"
        reader.feed(UPSTREAM, MYSQL_CLOSE_1)
        self.assertEqual(reader.protocol.statements, {})
        self.assertEqual(reader.protocol.statements.size, 0)

    def test_the_least_recently_used_statements_are_forgotten(self):
        """A client may prepare any number of statements, and drop them by SQL."""
        reader = ProtocolReader("postgres")
        reader.feed(UPSTREAM, PG_STARTUP)
        text = b"SELECT used" + b"x" * 1000
        reader.feed(UPSTREAM, pg_parse(b"used", text))
        for index in range(2000):
            reader.feed(UPSTREAM, pg_parse(b"a%d" % index, b"x" * 1000) + pg_bind(b"used")
                        + PG_EXECUTE)
        for texts in reader.protocol.statements, reader.protocol.portals:
            self.assertLessEqual(texts.size, vaurien.STATEMENTS_MAX)
        self.assertEqual(reader.protocol.statements.use(b"used"), text)
        self.assertEqual(reader.protocol.statements.use(b"a0"), b"")
        self.assertGreater(len(reader.protocol.statements), 800)


class Output:
    """The events that a chain yields for data from one peer, with assertions about them.

    received      the data, which the peer sent in the direction `to`
    events        [(t, to, data, delays)]
    fast          whether all data passed on the fast path
    sent          [(to, data)]: adjacent bytes of one direction are joined, each signal is separate
    to_backend    all bytes that the backend gets
    to_client     all bytes that the client gets
    """

    CLOSE = [(DOWNSTREAM, EOF), (UPSTREAM, EOF)]        # the events that close a connection

    def __init__(self, test, to, received, events, fast=False):
        self.test, self.to, self.received = test, to, received
        self.events, self.fast = events, fast
        self.sent = self.join_adjacent(events)
        self.to_backend = b"".join(data for to, data in self.sent if to == UPSTREAM)
        self.to_client = b"".join(data for to, data in self.sent if to == DOWNSTREAM)

    def join_adjacent(self, events):
        """Return the value of `sent` for these events."""
        def group_key(to_and_data):
            to, data = to_and_data
            return to, bool(data)           # signals have no bytes

        sent = []
        to_and_data_pairs = [(to, data) for _, to, data, _ in events]
        for (to, has_bytes), group in itertools.groupby(to_and_data_pairs, group_key):
            if has_bytes:
                sent.append((to, b"".join(data for _, data in group)))
            else:
                sent += group
        return sent

    def times(self):
        return [t for t, _, _, _ in self.events]

    def assert_sent(self, *sent, closes=False):
        """Check the value of `sent`, to which `closes` adds the events that close."""
        self.test.assertEqual(self.sent, list(sent) + (self.CLOSE if closes else []))

    def assert_passes(self):
        """Check that the received data is forwarded unchanged, and that nothing else is sent."""
        self.assert_becomes(self.received)

    def assert_becomes(self, data, closes=False):
        """Check that `data` is forwarded in place of the received data, and nothing else is sent.

        Empty bytes mean that nothing is forwarded.
        """
        forwards = data or isinstance(data, vaurien.Signal)
        self.assert_sent(*([(self.to, data)] if forwards else []), closes=closes)

    def assert_held(self):
        """Check that nothing is sent."""
        self.assert_sent()

    def assert_replied(self, reply, closes=False):
        """Check that the client gets this reply, and that nothing else is sent."""
        self.assert_sent((DOWNSTREAM, reply), closes=closes)

    def assert_reply_matches(self, pattern, closes=False):
        """Check that the client gets a reply that matches, and that nothing else is sent."""
        self.test.assertRegex(self.to_client, pattern)
        self.assert_replied(self.to_client, closes)


class Playbook:
    """A conversation of a client and a backend through a ProtocolChain, without sockets.

        play = Playbook(test, "redis", [error_rule("OOM", match=b"bad")])
        play.client(b"get 1\r\nget bad\r\n").assert_becomes(b"get 1\r\n")
        play.backend(b"$1\r\na\r\n").assert_becomes(b"$1\r\na\r\n" + REDIS_OOM)

    Tests use ProtocolChain only through this class. `send` calls the chain as Connection does;
    the other methods read and change the state of the chain.
    """

    def __init__(self, test, protocol, rules=(), greeted=True, host=b""):
        """Begin a connection.

        greeted    whether a backend that sends first has sent its greeting
        host       the Host header that the backend expects
        """
        self.test = test
        self.rules = rule_set_of(*rules)
        self.reader = ProtocolReader(protocol, pending=(), host=host)
        self.chain = vaurien.ProtocolChain(self.rules, 1, self.reader.protocol)
        self.tcp = None     # the Chain that replaces self.chain after a fallback to tcp
        self.chain.start()
        if greeted:
            self.chain.exchanges[0].reply_done = self.reader.protocol.server_first

    # Events for the chain.

    def client(self, data, sizes=None):
        """Send data as the client does; return the Output.

        sizes    those of the pieces in which the data arrives; default: one piece
        """
        return self.send(UPSTREAM, data, sizes)

    def backend(self, data, sizes=None):
        """Send data as the backend does; return the Output. `sizes` is as in `client`."""
        return self.send(DOWNSTREAM, data, sizes)

    def open(self):
        """Connect the client; return the Output."""
        return self.output(UPSTREAM, OPEN, self.chain.process(0, UPSTREAM, OPEN))

    def output(self, to, data, events, fast=False):
        return Output(self.test, to, data, events, fast)

    def try_fast_path(self, to, data, parse_whole=True):
        """Pass bytes to the fast path, as Connection does first.

        parse_whole    whether the framer first tries to recognize a whole message

        Returns the bytes that are forwarded at once, or None if the slow path must follow.
        """
        if not parse_whole:
            self.reader.framer(to).parse_whole = lambda data: None
        passed = self.chain.pass_through(to, data)
        self.follow_successor()
        return passed

    def run_slow_path(self, to, data):
        """Pass bytes to the slow path; return the events."""
        self.chain.modified = False
        events = self.chain.process_bytes(0, to, data)
        self.follow_successor()
        return events

    def follow_successor(self):
        """Continue with the Chain for plain tcp, if the chain has fallen back."""
        self.tcp = self.chain.successor

    def send(self, to, data, sizes=None):
        """Send data as a peer does, on the fast path if possible; return the Output."""
        events, fast, start = [], True, 0
        for size in sizes or [len(data)]:
            piece = data[start:start + size]
            start += size
            if self.tcp:
                events += self.tcp.process(0, to, piece)
                continue
            passed = self.try_fast_path(to, piece)
            if passed is None:
                fast = False
                events += self.run_slow_path(to, piece)
            elif passed:
                events.append((0, to, passed, ()))
        return self.output(to, data, events, fast)

    def wait(self, seconds):
        """Let time pass after data that came at 0; return the Output of the chain's timer."""
        events = []
        if not self.tcp and self.chain.head_deadline <= seconds:
            events = self.chain.give_up_head(seconds)
            self.follow_successor()
        return self.output(UPSTREAM, b"", events)

    def fall_back(self):
        """Make the connection fall back to tcp; return the resulting events."""
        events = self.chain.fall_back(0, DOWNSTREAM, "the test says so")
        self.follow_successor()
        return events

    def process_open(self, rule):
        """Give OPEN to a rule that was added to the open connection; return the events."""
        return self.chain.process_open(0, [UPSTREAM, DOWNSTREAM], [rule])

    def replace_rules(self, *rules):
        """Replace the installed rules of the open connection; return the resulting events."""
        before = self.rules.installed
        self.rules.install(list(rules))
        return self.rules_changed([rule for rule in rules if rule not in before],
                                  [rule for rule in before if rule not in rules])

    def change_rule(self, rule, draw_max=100.0, **options):
        """Change the percentage and the options of an installed rule; return the events."""
        rule.set_draw_max(draw_max)
        rule.set_options(dict(rule.options, **options))
        return self.rules_changed(changed=[rule])

    def rules_changed(self, added=(), removed=(), changed=()):
        """Tell the chain that the installed rules have changed, as Connection does."""
        self.chain.rules_changed(added, changed)
        self.chain.release(removed, changed)
        return self.chain.process_open(0, [UPSTREAM, DOWNSTREAM], [*added, *changed])

    # The state of the chain.

    def set_first_reply_complete(self):
        """Mark the first exchange as complete, which begins when the client connects."""
        self.chain.exchanges[0].reply_done = True

    def has_modified(self):
        """Return whether the rules have changed or delayed any of the last bytes."""
        return self.chain.modified

    def held_head(self):
        """Return the bytes of an incomplete request's head, which the chain keeps."""
        return b"" if self.tcp else self.chain.head

    def exchange_count(self):
        return len(self.chain.exchanges)

    def newly_acted(self):
        return self.chain.newly_acted

    def last_request(self):
        return self.chain.exchanges[-1].request

    def last_request_is_current(self):
        return self.chain.current_request is self.chain.exchanges[-1].request

    def last_request_is_forwarded(self):
        return self.chain.exchanges[-1].forwarded

    def drawn_request_count(self):
        """Return the count of requests for which rules were drawn."""
        return self.rules.request_count

    def state(self):
        """Return the state that the fast path and the slow path must change in the same way."""
        chain = self.chain
        exchanges = [(exchange.number, exchange.forwarded, exchange.complete, exchange.reply_done,
                      exchange.request and (exchange.request.name, exchange.request.text))
                     for exchange in chain.exchanges]
        return (chain.request_count, chain.current_number, chain.in_request, chain.head_forwarded,
                self.drawn_request_count(), self.reader.pending_count(), exchanges)


class TestProtocolChain(unittest.TestCase):
    """The effects of rules on the requests and replies of a protocol, as playbooks."""

    def play(self, protocol, *rules, **arguments):
        """Return the playbook of a new connection, with further arguments of Playbook."""
        return Playbook(self, protocol, rules, **arguments)

    def play_postgres(self, *rules):
        """Return the playbook of a PostgreSQL connection after its startup message."""
        play = self.play("postgres", *rules)
        play.reader.feed(UPSTREAM, PG_STARTUP)
        return play

    # Bytes that no rule acts on.

    def test_no_byte_is_lost_or_changed(self):
        for case, rules in [("no rules", []),
                            ("delay", [vaurien.Rule("delay", {"sleep": 1.0})]),
                            ("never drawn", [undrawn_rule("error")]),
                            ("never matches", [matching_rule("hang", b"nope")])]:
            for protocol, messages, rows in TestFraming.REQUESTS:
                data = joined_messages(rows)
                for sizes in [len(data)], [1] * len(data):
                    with self.subTest(protocol, rules=case, messages=messages, pieces=len(sizes)):
                        self.play(protocol, *rules).client(data, sizes).assert_passes()

    def test_random_bytes_are_forwarded(self):
        for protocol in PARSED_PROTOCOLS:
            for seed in range(50):
                rng = random.Random("%s %d" % (protocol, seed))
                data = bytes(rng.choice(SPECIAL_BYTES) for _ in range(100))
                for to in UPSTREAM, DOWNSTREAM:
                    with self.subTest(protocol, to=to, seed=seed):
                        play = self.play(protocol, vaurien.Rule("delay"))
                        output = play.send(to, data)
                        if to == UPSTREAM:
                            self.assertEqual(output.to_backend + play.held_head(), data)
                        else:
                            self.assertEqual(output.to_client, data)

    def test_an_error_does_not_act_on_requests_without_a_reply(self):
        for protocol, data in [("memcache", b"set a 0 0 1 noreply\r\nx\r\n"),
                               ("memcache", b"quit\r\n"),
                               ("mysql", MYSQL_CLOSE_1),
                               ("redis", b"QUIT\r\n"),
                               ("smtp", b"QUIT\r\n")]:
            with self.subTest(protocol, data=data):
                play = self.play(protocol, error_rule())
                play.set_first_reply_complete()
                play.client(data).assert_passes()
                self.assertEqual(play.newly_acted(), [])

    # Replies that are cut.

    def test_a_reply_is_cut_after_so_many_rows_and_bytes(self):
        for protocol, name, parts in TestFraming.REPLY_ROWS:
            rows = [b""]
            for part in parts:
                if part is TestFraming.ROW:
                    rows.append(b"")
                else:
                    rows[-1] += part
            reply = b"".join(rows)
            for options, passed in [
                    ({"bytes": 6}, 6), ({"bytes": len(reply)}, len(reply)),
                    ({"rows": len(rows)}, len(reply)),
                    ({"rows": 1}, len(rows[0] if len(rows) > 1 else reply)),
                    ({"rows": 1, "bytes": 2}, len(rows[0]) + 2 if len(rows) > 1 else len(reply))]:
                for sizes in [len(reply)], [1] * len(reply):
                    with self.subTest(protocol, reply=reply, options=options, pieces=len(sizes)):
                        play = self.play(protocol, vaurien.Rule("cut", options))
                        play.reader.add_pending(vaurien.Request(
                            b"", name, info=request_info(protocol)))
                        play.chain.exchanges.popleft()
                        play.chain.exchanges[0].active_rules = play.chain.active_rules
                        play.backend(reply, sizes).assert_sent(
                            (DOWNSTREAM, reply[:passed]), closes=passed < len(reply))

    def test_a_cut_acts_on_the_replies_of_its_requests_only(self):
        play = self.play("redis", vaurien.Rule("cut", {"rows": 1}, match=re.compile(b"^b")))
        play.client(b"a\r\nb\r\nc\r\n").assert_passes()
        play.backend(b"*2\r\n:1\r\n:2\r\n").assert_passes()
        play.backend(b"*2\r\n:1\r\n:2\r\n*1\r\n:3\r\n").assert_sent(
            (DOWNSTREAM, b"*2\r\n:1\r\n"), (DOWNSTREAM, EOF), (UPSTREAM, EOF))

    def test_rows_are_counted_only_while_a_rule_needs_them(self):
        play = self.play("postgres", vaurien.Rule("cut", {"bytes": 9999}))
        self.assertFalse(play.reader.protocol.counts_rows)
        play.replace_rules(vaurien.Rule("cut", {"rows": 1}))
        self.assertTrue(play.reader.protocol.counts_rows)
        play.replace_rules()
        self.assertFalse(play.reader.protocol.counts_rows)

    # When an error is sent.

    def test_errors_keep_their_places_among_pipelined_replies(self):
        play = self.play("redis", error_rule("OOM", match=b"bad"))
        play.client(b"get 1\r\n" b"get bad\r\n" b"get 2\r\n" b"get bad\r\n" b"get bad\r\n"
                    b"get 3\r\n").assert_becomes(b"get 1\r\n" b"get 2\r\n" b"get 3\r\n")
        play.backend(b"$1\r\n").assert_passes()
        play.backend(b"a\r\n").assert_becomes(b"a\r\n" + REDIS_OOM)
        play.backend(b"$1\r\nb\r\n" b"$1\r\n").assert_becomes(
            b"$1\r\nb\r\n" + REDIS_OOM * 2 + b"$1\r\n")
        play.backend(b"c\r\n").assert_passes()
        self.assertEqual(play.exchange_count(), 1)

    def test_an_error_follows_a_reply_that_ends_several_exchanges(self):
        """It was lost if the reply had fewer bytes than 2 for each of these exchanges."""
        play = self.play("memcache", error_rule(match=b"bad"))
        passed = b"get a\r\n" + b"set b 0 0 1 noreply\r\nx\r\n" * 3
        play.client(passed + b"get bad\r\n").assert_becomes(passed)
        play.backend(b"END\r\n").assert_becomes(b"END\r\n" + MEMCACHE_NO_MEMORY)
        play.client(b"get b\r\n").assert_passes()

        play = self.play_postgres(error_rule("57P01", match=b"bad"))
        play.client((pg_parse(b"", b"SELECT 1") + pg_bind(b"") + PG_EXECUTE) * 50 + PG_SYNC
                    + pg_query(b"bad"))
        self.assertIn(b"C57P01\0", play.backend(PG_ERROR + PG_READY).to_client)

    def test_an_error_is_sent_when_the_request_is_complete(self):
        play = self.play("memcache", error_rule())
        play.client(b"set a 0 0 3\r\nab").assert_held()
        play.client(b"c\r\n").assert_replied(MEMCACHE_NO_MEMORY)

    def test_a_head_is_held_until_it_is_complete(self):
        play = self.play("http", error_rule("503", match=b"(?m)^X-Bad"))
        play.client(b"GET / HTTP/1.1\r\nX-B").assert_held()
        play.client(b"etter: 1\r\n\r\n").assert_becomes(b"GET / HTTP/1.1\r\nX-Better: 1\r\n\r\n")
        # The second request waits until the first one has its reply.
        play.client(b"POST / HTTP/1.1\r\nX-Bad: 1\r\nContent-Length: 2\r\n\r\nab").assert_held()
        output = play.backend(b"HTTP/1.1 204 No\r\n\r\n")
        self.assertIn(b"503 Service Unavailable\r\n", output.to_client)

    def test_nothing_follows_an_error_that_closes(self):
        play = self.play("redis", error_rule(match=b"bad"))
        with mock.patch.object(play.reader.protocol, "error_reply",
                               lambda kind, request: vaurien.Reply(b"-BYE\r\n", closes=True)):
            play.client(b"GET 1\r\n" b"GET bad\r\n" b"SET 2 2\r\n").assert_becomes(b"GET 1\r\n")
            play.client(b"SET 3 3\r\n").assert_held()
            play.backend(b"+A\r\n").assert_becomes(b"+A\r\n" b"-BYE\r\n", closes=True)

    def test_a_client_that_waits_for_100_continue_is_answered_at_once(self):
        play = self.play("http", error_rule("503"))
        play.client(b"POST / HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n"
                    ).assert_reply_matches(rb"\AHTTP/1\.1 503", closes=True)
        play.client(b"12345").assert_held()

    def test_empty_lines_before_an_http_request_get_no_reply(self):
        bad = HTTP_GET.replace(b"/", b"/bad", 1)
        for empty_lines in b"\r\n", b"\r\n\r\n", b"\r\n" * 5:
            with self.subTest(empty_lines):
                play = self.play("http", error_rule("503", match=b"/bad"))
                for _ in range(3):
                    play.client(empty_lines)
                    play.client(bad).assert_reply_matches(rb"\AHTTP/1\.1 503")
                play.client(empty_lines + HTTP_GET).assert_passes()
                play.backend(HTTP_OK).assert_passes()

    def test_rules_act_on_each_request(self):
        play = self.play("redis", matching_rule("hang", b"^get"))
        self.assertEqual(play.client(b"ping\r\n" b"get a\r\n").times(), [0, NEVER])

    def test_transient_errors_end(self):
        busy = error_bytes("redis", "BUSY")
        play = self.play("redis", vaurien.Rule("transient", {"agitate": 2, "kind": "BUSY"}))
        play.open().assert_passes()
        play.client(PING).assert_replied(busy)
        play.client(PING).assert_replied(busy)
        play.client(PING).assert_passes()
        play.client(PING).assert_passes()

    def test_after_and_times_limit_an_error_to_some_requests(self):
        busy = error_bytes("redis", "BUSY")
        play = self.play("redis", error_rule("BUSY", after=1, times=2))
        for has_error in False, True, True, False, False:
            if has_error:
                play.client(PING).assert_replied(busy)
            else:
                play.client(PING).assert_passes()
                play.backend(PONG).assert_passes()

    # The bytes of errors.

    def test_the_bytes_of_errors_of_each_protocol(self):
        for protocol, kind, request, reply in [
                ("mysql", "1205", mysql_query(b"SELECT 1"),
                 mysql_packet(1, b"\xff\xb5\x04#HY000Lock wait timeout exceeded; "
                                 b"try restarting transaction")),
                ("redis", "LOADING", PING, b"-LOADING Redis is loading the dataset in memory\r\n"),
                ("smtp", "450", b"MAIL FROM:<a>\r\n", b"450 4.2.1 mailbox busy\r\n"),
                ("http", "429", HTTP_GET,
                 b"HTTP/1.1 429 Too Many Requests\r\n"
                 b"Content-Type: text/plain\r\nContent-Length: 22\r\nRetry-After: 5\r\n\r\n"
                 b"429 Too Many Requests\n"),
                ("http", "500", b"HEAD / HTTP/1.1\r\n\r\n",
                 b"HTTP/1.1 500 Internal Server Error\r\n"
                 b"Content-Type: text/plain\r\nContent-Length: 26\r\n\r\n")]:
            with self.subTest(protocol, kind=kind):
                self.play(protocol, error_rule(kind)).client(request).assert_replied(reply)

    def test_errors_that_close_the_connection(self):
        for protocol, kind, request, pattern in [
                ("mysql", "1053", mysql_query(b"SELECT 1"), b"shutdown in progress"),
                ("postgres", "57P01", pg_query(b"SELECT 1"), b"57P01"),
                ("smtp", "421", b"NOOP\r\n", b"421"),
                ("http", "503", b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n", b"503"),
                ("http", "503", HTTP_GET_1_0, b"503")]:
            with self.subTest(protocol, request=request):
                rule = error_rule(kind)
                play = (self.play_postgres(rule) if protocol == "postgres" else
                        self.play(protocol, rule))
                play.client(request).assert_reply_matches(pattern, closes=True)

    def test_errors_when_a_client_connects(self):
        for protocol, kind, reply in [
                ("mysql", "1040", mysql_packet(0, b"\xff\x10\x04Too many connections")),
                ("redis", "MAXCLIENTS", b"-ERR max number of clients reached\r\n"),
                ("memcache", "TOO_MANY", b"ERROR Too many open connections\r\n"),
                ("smtp", "421",
                 b"421 4.3.2 Service not available, closing transmission channel\r\n")]:
            with self.subTest(protocol):
                output = self.play(protocol, error_rule(kind), greeted=False).open()
                output.assert_replied(reply, closes=True)
                self.assertEqual(len(output.events), 3)         # the reply and two EOFs

    def test_postgres_reports_a_connect_error_after_the_startup_message(self):
        play = self.play("postgres", error_rule("53300"), greeted=False)
        play.open().assert_held()
        play.client(PG_SSL_REQUEST).assert_replied(b"N")
        play.client(PG_STARTUP).assert_reply_matches(
            rb"\AE[^E]*SFATAL\0VFATAL\0C53300\0Msorry, too many clients already\0\0", closes=True)

    def test_the_error_tables_are_consistent(self):
        for protocol in PARSED_PROTOCOLS:
            cls = vaurien.PROTOCOLS[protocol]
            with self.subTest(protocol):
                self.assertLessEqual(set(cls.default_errors), set(cls.errors))
                self.assertLessEqual(set(cls.connect_errors), set(cls.errors))
                self.assertLessEqual(set(cls.fatal_errors), set(cls.errors))

    def test_without_a_kind_one_of_the_default_errors_is_drawn(self):
        play, error_codes = self.play("redis", error_rule()), set()
        play.open().assert_passes()
        for _ in range(60):
            code, _, _ = play.client(PING).to_client.partition(b" ")
            error_codes.add(code)
        self.assertEqual(error_codes,
                         {b"-" + kind.encode() for kind in vaurien.Redis.default_errors})

    # Transactions, batches and statements: the backend gets other bytes in the request's place.

    def test_a_redis_transaction_with_an_error_is_aborted(self):
        play = self.play("redis", error_rule("OOM", match=b"^SET"))
        play.client(b"MULTI\r\n" b"CLIENT ID\r\n" b"SET a 1\r\n" b"EXEC\r\n").assert_becomes(
            b"MULTI\r\n" b"CLIENT ID\r\n" b"*1\r\n$7\r\nvaurien\r\n" b"EXEC\r\n")
        aborted = b"-EXECABORT Transaction discarded\r\n"
        before = b"+OK\r\n" b"+QUEUED\r\n"
        play.backend(before + b"-ERR unknown command\r\n" + aborted).assert_becomes(
            before + REDIS_OOM + aborted)

    def test_a_mysql_deadlock_rolls_back(self):
        play = self.play("mysql", error_rule("1213"))
        play.client(mysql_query(b"UPDATE t")).assert_becomes(mysql_query(b"ROLLBACK"))
        play.backend(MYSQL_OK).assert_reply_matches(b"Deadlock found")

    def test_an_error_in_a_postgres_batch_skips_all_messages_up_to_sync(self):
        play = self.play_postgres(error_rule("40001", match=b"bad"))
        good = pg_parse(b"a", b"good") + pg_bind(b"a") + PG_EXECUTE
        bad = pg_parse(b"b", b"bad") + pg_bind(b"b") + PG_EXECUTE
        output = play.client(good + bad + good + PG_SYNC)
        self.assertEqual(output.to_client, b"")
        self.assertNotIn(b"bad", output.to_backend)
        # One Parse message with an error of syntax; "vaurien" is both its name and its query.
        self.assertEqual(output.to_backend.count(b"vaurien"), 2)
        done = PG_PARSE_COMPLETE + PG_BIND_COMPLETE + PG_SELECTED_1
        syntax_error = pg_message(b"E", b"SERROR\0C42601\0\0")
        play.backend(done + syntax_error + PG_READY_FAILED).assert_becomes(
            done + error_bytes("postgres", "40001") + PG_READY_FAILED)
        play.client(good + PG_SYNC).assert_passes()
        play.backend(done + PG_READY).assert_passes()

    def test_postgres_transactions_end(self):
        play = self.play_postgres(error_rule("40001"))
        for query, forwarded, ready in [(b"ROLLBACK", b"ROLLBACK", PG_READY),
                                        (b"COMMIT", b"ROLLBACK", PG_READY),
                                        (b"end", b"ROLLBACK", PG_READY),
                                        (b"SELECT 1", b"vaurien", PG_READY_FAILED)]:
            play.client(pg_query(query)).assert_becomes(pg_query(forwarded))
            play.backend(pg_message(b"C", b"ROLLBACK\0") + ready)
        # The transaction has failed already, so the backend itself replies with an error.
        play.client(pg_query(b"SELECT 2")).assert_passes()

    def test_requests_after_a_failed_execute_get_no_reply_up_to_sync(self):
        """After an error of a pipelined batch, each later reply belongs to its own request."""
        begin, query = (pg_parse(b"", text) + pg_bind(b"") + PG_EXECUTE
                        for text in (b"BEGIN", b"SELECT 7"))
        error = error_bytes("postgres", "57014")
        with self.subTest("two errors of a rule"):
            play = self.play_postgres(error_rule("57014"))
            play.client(begin + query + PG_SYNC)
            play.backend(PG_ERROR + PG_READY).assert_becomes(error + PG_READY)
            play.client(pg_query(b"SELECT 1"))
            play.backend(PG_ERROR + PG_READY).assert_becomes(error + PG_READY)
        with self.subTest("an error of the backend, then one of a rule"):
            play = self.play_postgres(error_rule("57014", match=b"SELECT 7"))
            play.client(begin + query + PG_SYNC)
            play.backend(PG_ERROR + PG_READY).assert_passes()
            play.client(pg_query(b"SELECT 1"))
            play.backend(PG_SELECTED_1 + PG_READY).assert_passes()
            play.client(pg_query(b"SELECT 7"))
            play.backend(PG_ERROR + PG_READY).assert_becomes(error + PG_READY)
            play.client(pg_query(b"SELECT 8"))
            play.backend(PG_SELECTED_1 + PG_READY).assert_passes()

    def test_rules_are_drawn_once_for_an_execute_and_its_sync(self):
        batch = pg_parse(b"", b"SELECT 1") + pg_bind(b"") + PG_EXECUTE + PG_SYNC
        for case, messages, count in [("a batch", batch, 1), ("only a Sync", PG_SYNC, 1),
                                      ("two batches", batch * 2, 2),
                                      ("a query and a Sync", pg_query(b"SELECT 1") + PG_SYNC, 2)]:
            with self.subTest(case):
                play = self.play_postgres(vaurien.Rule("dummy"))
                connecting = play.chain.request_count
                play.client(messages)
                self.assertEqual(play.chain.request_count - connecting, count)

    def test_copy_by_an_extended_query_ignores_sync(self):
        """The Sync during COPY gets no reply. So the reply at the end belongs to `bad`."""
        play = self.play_postgres(error_rule("40001", match=b"bad"))
        play.client(pg_parse(b"", b"COPY t FROM STDIN") + pg_bind(b"") + PG_EXECUTE + PG_SYNC)
        play.backend(PG_PARSE_COMPLETE + PG_BIND_COMPLETE + pg_message(b"G", b"\0\0\0"))
        play.client(pg_message(b"d", b"1\n") + pg_message(b"c") + PG_SYNC)
        play.backend(pg_message(b"C", b"COPY 1\0") + PG_READY)
        play.client(pg_query(b"bad"))
        play.backend(PG_ERROR + PG_READY).assert_becomes(
            error_bytes("postgres", "40001") + PG_READY)

    def test_copy_data_may_come_before_the_backend_asks_for_it(self):
        """Only a Sync before the end of the data is ignored, not the requests after that."""
        copy = pg_parse(b"", b"COPY t FROM STDIN") + pg_bind(b"") + PG_EXECUTE
        data = pg_message(b"d", b"1\n") + pg_message(b"c")
        for case, messages in [("one Sync", copy + data + PG_SYNC),
                               ("another Sync", copy + PG_SYNC + data + PG_SYNC)]:
            with self.subTest(case):
                play = self.play_postgres(error_rule("40001", match=b"bad"))
                play.client(messages + pg_query(b"bad"))
                play.backend(PG_PARSE_COMPLETE + PG_BIND_COMPLETE + pg_message(b"G", b"\0\0\0")
                             + pg_message(b"C", b"COPY 1\0") + PG_READY).assert_passes()
                play.backend(PG_ERROR + PG_READY).assert_becomes(
                    error_bytes("postgres", "40001") + PG_READY)

    def test_each_ready_for_query_belongs_to_its_sync(self):
        """A reply that belongs to no statement, or a statement without a reply, shifts nothing."""
        parse, bind = pg_parse(b"", b"SELECT 7"), pg_bind(b"")
        describe, flush = pg_message(b"D", b"P\0"), pg_message(b"H")
        parsed, suspended = PG_PARSE_COMPLETE + PG_BIND_COMPLETE, pg_message(b"s")
        copy_in, copy_data = pg_message(b"G", b"\0\0\0"), pg_message(b"d", b"1\n")
        copied = pg_message(b"C", b"COPY 1\0")
        for case, parts in [
                ("a Parse fails before its Bind arrives",
                 [(parse, PG_ERROR), (bind + PG_EXECUTE + PG_SYNC, PG_READY)]),
                ("a Parse fails after Flush",
                 [(parse + flush, PG_ERROR), (bind + PG_EXECUTE + PG_SYNC, PG_READY)]),
                ("a Parse fails before Sync", [(parse + PG_SYNC, PG_ERROR + PG_READY)]),
                ("a Bind fails before its Execute arrives",
                 [(parse + bind, PG_ERROR), (describe + PG_EXECUTE + PG_SYNC, PG_READY)]),
                ("a Bind without an Execute fails before its Sync arrives",
                 [(parse + bind, PG_ERROR), (describe + PG_SYNC, PG_READY)]),
                ("a Bind has no Execute", [(parse + bind + PG_SYNC, parsed + PG_READY)]),
                ("the Execute comes after Sync",
                 [(parse + bind + PG_SYNC, parsed + PG_READY),
                  (PG_EXECUTE + PG_SYNC, PG_SELECTED_1 + PG_READY)]),
                ("a portal is executed in two parts",
                 [(parse + bind + PG_EXECUTE + PG_EXECUTE + PG_SYNC,
                   parsed + suspended + PG_SELECTED_1 + PG_READY)]),
                ("a Bind without an Execute is skipped",
                 [(parse, PG_ERROR), (bind + PG_SYNC, PG_READY)]),
                ("a Sync is sent during COPY",
                 [(parse + bind + PG_EXECUTE + PG_SYNC, parsed + copy_in),
                  (copy_data + PG_SYNC + pg_message(b"c") + PG_SYNC, copied + PG_READY)]),
                ("COPY fails before the client ends it",
                 [(parse + bind + PG_EXECUTE + PG_SYNC, parsed + copy_in),
                  (copy_data, PG_ERROR), (PG_SYNC, PG_READY)])]:
            for rules in [], [error_rule("57014", match=b"bad")]:
                with self.subTest(case, rules=len(rules)):
                    play = self.play_postgres(*rules)
                    for client_data, backend_data in parts:
                        play.client(client_data)
                        play.backend(backend_data).assert_passes()
                    play.replace_rules(error_rule("57014", match=b"bad"))
                    play.client(pg_query(b"good") + pg_query(b"bad")).assert_becomes(
                        pg_query(b"good") + pg_query(b"vaurien"))
                    play.backend(PG_SELECTED_1 + PG_READY).assert_passes()
                    play.backend(PG_ERROR + PG_READY).assert_becomes(
                        error_bytes("postgres", "57014") + PG_READY)

    def test_the_error_of_a_rule_does_not_belong_to_an_earlier_bind_without_an_execute(self):
        """The client got the backend's error about the substitute, for the Bind."""
        error = error_bytes("postgres", "57014")
        prepared = pg_parse(b"", b"SELECT 7") + pg_bind(b"")
        parsed = PG_PARSE_COMPLETE + PG_BIND_COMPLETE
        for case, request, reply, expected in [
                ("a batch", pg_parse(b"", b"bad") + pg_bind(b"") + PG_EXECUTE + PG_SYNC,
                 PG_ERROR + PG_READY, error + PG_READY),
                ("a query", pg_query(b"bad"), PG_ERROR + PG_READY, error + PG_READY)]:
            with self.subTest(case):
                play = self.play_postgres(error_rule("57014", match=b"bad"))
                play.client(prepared + request)
                play.backend(parsed + reply).assert_becomes(parsed + expected)
                play.client(pg_query(b"good")).assert_passes()
                play.backend(PG_SELECTED_1 + PG_READY).assert_passes()
                self.assertEqual(play.exchange_count(), 1)

    def test_a_refused_commit_makes_the_backend_skip_the_rest_of_the_batch(self):
        """The ROLLBACK in its place succeeds. Without an error after it, the rest would run."""
        play = self.play_postgres(error_rule("57014", match=b"^COMMIT"))
        begin, commit, insert = (pg_parse(b"", text) + pg_bind(b"") + PG_EXECUTE
                                 for text in (b"BEGIN", b"COMMIT", b"INSERT"))
        rollback = pg_parse(b"", b"ROLLBACK") + pg_bind(b"") + PG_EXECUTE
        error = pg_parse(b"vaurien", b"vaurien")
        play.client(begin + commit + insert + PG_SYNC).assert_becomes(
            begin + rollback + error + PG_EXECUTE + insert + PG_SYNC)
        done = PG_PARSE_COMPLETE + PG_BIND_COMPLETE + PG_SELECTED_1
        play.backend(done + done + PG_ERROR + PG_READY).assert_becomes(
            done + error_bytes("postgres", "57014") + PG_READY)
        play.client(begin + PG_SYNC).assert_passes()
        play.backend(done + PG_READY).assert_passes()

    def test_a_rule_refuses_no_request_after_another_one_of_the_same_batch(self):
        """The backend skips these requests, so the client gets no reply to them."""
        play = self.play_postgres(error_rule("57014"))
        query = pg_parse(b"", b"SELECT 1") + pg_bind(b"") + PG_EXECUTE
        for _ in range(2):
            play.client(query + query + query + PG_SYNC)
            play.backend(PG_ERROR + PG_READY).assert_becomes(
                error_bytes("postgres", "57014") + PG_READY)
        self.assertEqual([number for _, number, _ in play.newly_acted()], [2, 5])

    def test_rules_act_on_the_bytes_that_continue_a_request(self):
        play = self.play_postgres(
            vaurien.Rule("bandwidth", {"rate": 1}, per="connection", stream="upstream"))
        play.client(pg_query(b"COPY t FROM STDIN"))
        play.backend(pg_message(b"G", b"\0\0\0")).assert_passes()
        copy_data = pg_message(b"d", bytes(1000))
        output = play.client(copy_data)
        output.assert_passes()
        self.assertGreaterEqual(output.times()[-1], len(copy_data) / 1000)

    def test_the_sync_of_a_refused_bind_reaches_the_backend(self):
        play = self.play_postgres(error_rule("57014"))
        describe = pg_message(b"D", b"P\0")
        play.client(pg_parse(b"", b"SELECT 1") + pg_bind(b"") + describe + PG_SYNC
                    ).assert_becomes(pg_parse(b"vaurien", b"vaurien") + describe + PG_SYNC)
        play.backend(PG_ERROR + PG_READY).assert_becomes(
            error_bytes("postgres", "57014") + PG_READY)

    def test_a_mysql_error_has_the_sequence_number_after_the_last_packet(self):
        play = self.play("mysql", error_rule("1205"))
        play.client(MYSQL_LOGIN)
        # A request continues in a second packet if the first one has the maximum length.
        play.client(mysql_query(bytes(0xFFFFFE))).assert_held()
        output = play.client(mysql_packet(1, b"x" * 5))
        sequence_number = output.to_client[3]       # bytes 0 to 2 are the length
        self.assertEqual(sequence_number, 2)

    def test_the_backend_gets_the_substitute_of_a_long_mysql_statement_when_it_ends(self):
        """Its reply came before the last packet, so the error had a wrong sequence number."""
        play = self.play("mysql", error_rule("1213"))
        play.client(MYSQL_LOGIN)
        play.client(mysql_query(bytes(0xFFFFFE))).assert_held()
        play.client(mysql_packet(1, b"x" * 5)).assert_becomes(mysql_query(b"ROLLBACK"))
        self.assertEqual(play.backend(MYSQL_OK).to_client[3], 2)

    def test_mysql_statements_that_fail(self):
        # An EXECUTE of the last statement that follows must not execute an earlier one.
        play = self.play("mysql", error_rule("1205", match=b"^SELECT"))
        play.client(mysql_prepare(b"SELECT ?")).assert_becomes(mysql_prepare(b"vaurien"))
        play.backend(MYSQL_ERR).assert_reply_matches(b"Lock wait")
        play = self.play("mysql", error_rule("1205", match=b"nothing"))
        play.client(mysql_prepare(b"SELECT ?"))
        request = play.reader.feed_request(mysql_execute(MYSQL_LAST_PREPARED))
        self.assertEqual(request.text, b"SELECT ?")
        # The backend resets the statement (COM_STMT_RESET) in place of executing it.
        play = self.play("mysql", error_rule("1205"))
        play.client(mysql_execute(b"\7\0\0\0")).assert_becomes(
            mysql_packet(0, b"\x1a" b"\7\0\0\0"))

    def test_each_mysql_reply_belongs_to_its_pipelined_statement(self):
        for kind in "1205", "1213":
            with self.subTest(kind):
                play = self.play("mysql", error_rule(kind, match=b"bad"))
                rollback = mysql_query(b"ROLLBACK") if kind == "1213" else b""
                error = error_bytes("mysql", kind)
                play.client(mysql_query(b"one") + mysql_query(b"bad") + mysql_query(b"two")
                            + MYSQL_CLOSE_1 + mysql_query(b"bad")).assert_becomes(
                    mysql_query(b"one") + rollback + mysql_query(b"two") + MYSQL_CLOSE_1
                    + rollback)
                substitute = MYSQL_OK if rollback else b""
                play.backend(mysql_result(b"1")[:-3]).assert_passes()
                play.backend(mysql_result(b"1")[-3:] + substitute).assert_becomes(
                    mysql_result(b"1")[-3:] + error)
                play.backend(mysql_result(b"2", b"3") + substitute).assert_becomes(
                    mysql_result(b"2", b"3") + error)
                play.client(mysql_query(b"three")).assert_passes()
                self.assertEqual(play.exchange_count(), 1)

    def test_a_mysql_deadlock_of_a_prepared_statement_has_two_substitutes(self):
        play = self.play("mysql", error_rule("1213"))
        play.client(mysql_execute(b"\7\0\0\0") + mysql_prepare(b"SELECT ?")).assert_becomes(
            mysql_packet(0, b"\x1a" b"\7\0\0\0") + mysql_query(b"ROLLBACK")
            + mysql_prepare(b"vaurien") + mysql_query(b"ROLLBACK"))
        error = error_bytes("mysql", "1213")
        play.backend(MYSQL_OK).assert_held()
        play.backend(MYSQL_OK).assert_becomes(error)
        play.backend(MYSQL_ERR + MYSQL_OK).assert_becomes(error)

    def test_a_mysql_error_has_the_sequence_number_of_its_own_request(self):
        play = self.play("mysql", error_rule("1205", match=b"bad"))
        play.client(MYSQL_LOGIN)
        play.client(mysql_query(b"one") + mysql_query(b"bad" + bytes(0xFFFFFB))
                    + mysql_packet(1, b"x") + mysql_query(b"two"))
        output = play.backend(MYSQL_OK)
        self.assertEqual(output.to_client[len(MYSQL_OK) + 3], 2)

    def test_a_postgres_message_of_an_impossible_size_is_not_of_the_protocol(self):
        for message in b"Z\0\0\0\4", b"T\0\0\0\3":
            play = self.play("postgres", error_rule("57014"))
            play.client(PG_STARTUP)
            play.backend(message).assert_passes()
            self.assertIn("cannot have the size", play.chain.protocol_error)

    def test_mysql_replication_continues_as_tcp(self):
        play = self.play("mysql", error_rule("1205"))
        play.client(mysql_packet(0, b"\x12" + bytes(10))).assert_passes()
        self.assertEqual(play.chain.protocol_error, "replication follows")

    def test_mysql_statements_prepared_and_executed_without_waiting_leave_the_queue(self):
        play = self.play("mysql", error_rule("1205", match=b"bad"))
        play.client(MYSQL_LOGIN + mysql_prepare(b"SELECT 1") + mysql_execute(MYSQL_LAST_PREPARED))
        play.backend(mysql_packet(1, b"\0" b"\1\0\0\0" b"\0\0\0\0\0\0\0") + MYSQL_OK)
        play.client(mysql_query(b"good"))
        play.backend(MYSQL_OK)
        play.client(mysql_query(b"bad")).assert_reply_matches(b"Lock wait")

    def test_a_local_file_is_part_of_one_mysql_request(self):
        play = self.play("mysql", error_rule("1205", match=b"data"))
        play.client(MYSQL_LOGIN + mysql_query(b"LOAD"))
        play.backend(mysql_packet(1, b"\xfbfile"))
        # The sequence number of the last packet is 600 % 256 == 88. Its empty body ends the file.
        play.client(b"".join(mysql_packet(index % 256, b"\3data") for index in range(2, 600))
                    + mysql_packet(88, b"")).assert_passes()
        play.backend(mysql_packet(89, MYSQL_OK_BODY))
        play.client(mysql_query(b"data")).assert_reply_matches(b"Lock wait")

    def test_a_dialogue_of_smtp_auth_is_one_request(self):
        play = self.play("smtp", error_rule("450", match=b"dXNl"))
        for command, reply in [(b"AUTH LOGIN\r\n", b"334 VXNl\r\n"),
                               (b"dXNlcg==\r\n", b"334 UGFz\r\n"),
                               (b"dXNl\r\n", b"235 ok\r\n")]:
            play.client(command).assert_passes()
            play.backend(reply).assert_passes()
        play.client(b"dXNl\r\n").assert_reply_matches(rb"\A450")

    def test_an_smtp_client_that_sends_before_the_greeting(self):
        for rules in [], [undrawn_rule("delay")]:
            with self.subTest(rules=rules):
                play = self.play("smtp", *rules, greeted=False)
                play.client(b"EHLO x\r\n" b"MAIL a\r\n" b"RCPT b\r\n" b"DATA\r\n")
                play.backend(b"220 hi\r\n" b"250 ok\r\n" b"250 ok\r\n" b"250 ok\r\n" b"354 go\r\n")
                play.client(b"body\r\n" b".\r\n")
                self.assertEqual(play.last_request().name, "MESSAGE")

    def test_replies_to_quiet_memcache_commands(self):
        play = self.play("memcache", error_rule("ERROR", match=b"^set"))
        play.client(b"mg a v q\r\n" b"ms b 1 q\r\nx\r\n" b"mn\r\n" b"get x\r\n"
                    b"set y 0 0 1\r\n1\r\n")
        play.backend(b"VA 1\r\n1\r\n" b"NS\r\n" b"MN\r\n").assert_passes()
        play.backend(b"END\r\n").assert_becomes(b"END\r\n" b"ERROR\r\n")

    def test_an_error_comes_after_the_replies_to_quiet_memcache_commands(self):
        """It came before them, because a quiet command did not wait for its reply."""
        hits = b"VA 2 ka\r\nAA\r\n" b"HD\r\n"
        for case, requests, replies in [
                ("hits", b"", hits),
                ("no hit", b"", b""),
                ("a get", b"get b\r\n", hits + b"VALUE b 0 2\r\nMN\r\nEND\r\n"),
                ("a meta command", b"mg b v\r\n", b"VA 2\r\nMN\r\n"),
                ("a meta command after hits", b"mg b v\r\n" b"get c\r\n",
                 hits + b"VA 2\r\nMN\r\n" b"END\r\n")]:
            quiet, refused = b"mg a v q k\r\n" b"mg c q\r\n" + requests, b"set y 0 0 1\r\n1\r\n"
            for size in 1, 3, 1000:
                with self.subTest(case, size=size):
                    play = self.play("memcache", error_rule(match=b"^set"))
                    play.client(quiet + refused * 2 + b"mn\r\n").assert_becomes(
                        quiet + b"mn\r\n" * 2)
                    data = replies + b"MN\r\n"
                    play.backend(data, [size] * len(data)).assert_becomes(
                        replies + MEMCACHE_NO_MEMORY * 2)
                    play.backend(b"MN\r\n").assert_passes()
                    self.assertEqual(play.exchange_count(), 1)

    def test_the_host_header_names_the_backend(self):
        for request, forwarded in [
                (b"GET / HTTP/1.1\r\nA: b\r\nhost:  localhost:8000\r\n\r\n",
                 b"GET / HTTP/1.1\r\nA: b\r\nhost:  google.com\r\n\r\n"),
                (b"GET / HTTP/1.1\r\nHost: Google.com\r\n\r\n",) * 2,
                (HTTP_GET_1_0,) * 2,
                (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n" b"Host: x\r\n",
                 b"POST / HTTP/1.1\r\nHost: google.com\r\nContent-Length: 9\r\n\r\n"
                 b"Host: x\r\n")]:
            for rules in [], [undrawn_rule("delay")]:
                for sizes in [len(request)], [1] * len(request):
                    with self.subTest(request=request, rules=rules, pieces=len(sizes)):
                        play = self.play("http", *rules, host=b"google.com")
                        for _ in range(2):
                            play.client(request, sizes).assert_becomes(forwarded)
                            play.backend(HTTP_OK_EMPTY)

    def test_received_and_sent_bytes_differ_if_the_host_header_is_replaced(self):
        request = b"GET / HTTP/1.1\r\nHost: %s\r\n\r\n"
        with running_proxy(echo, protocol="http") as proxy, connected_client(proxy) as sock:
            sent = request % b"a-host-with-a-long-name"
            received = request % proxy.host_header()
            sock.sendall(sent)
            self.assertEqual(read_exactly(sock, len(received)), received)
            up = proxy.connections[1].up
            counts = proxy.loop.run_sync(lambda: (up.received, up.sent))
            self.assertEqual(counts, (len(sent), len(received)))

    def test_the_value_of_the_host_header(self):
        for backend, host in [(("google.com", 80), b"google.com"),
                              (("::1", 8000), b"[::1]:8000"),
                              (("", 81), b"localhost:81")]:
            with self.subTest(backend=backend):
                self.assertEqual(
                    OpenProxy(backend, ("", 9), protocol="http").host_header(), host)
        proxy = OpenProxy(("x", 1), ("", 9), protocol="http", overwrite_host_header=False)
        self.assertEqual(proxy.host_header(), b"")

    # Rules that are added or removed while a connection is open.

    def test_a_new_rule_does_not_act_on_a_request_whose_head_was_partly_forwarded(self):
        play = self.play("http")
        play.client(b"GET / HT").assert_passes()
        play.replace_rules(error_rule())
        play.client(b"TP/1.1\r\n\r\n").assert_passes()
        play.client(HTTP_GET).assert_held()

    def test_a_rule_that_is_removed_still_sends_its_errors_for_earlier_requests(self):
        play = self.play("memcache", error_rule())
        play.client(b"set a 0 0 8\r\nabc").assert_held()
        play.replace_rules()
        play.client(b"defgh\r\n").assert_replied(MEMCACHE_NO_MEMORY)
        play.client(b"get a\r\n").assert_passes()
        play = self.play("redis", error_rule("OOM", match=b"SET"))
        play.client(b"MULTI\r\n" b"SET a 1\r\n")
        play.backend(b"+OK\r\n").assert_passes()
        play.replace_rules()
        play.backend(b"-ERR unknown command\r\n").assert_replied(REDIS_OOM)

    def test_a_new_rule_does_not_act_on_a_request_that_was_already_forwarded(self):
        for case, first, rest, reply in [
                ("complete", b"get a\r\n", b"", b"END\r\n"),
                ("in its body", b"set a 0 0 8\r\nabc", b"defgh\r\n", b"STORED\r\n"),
                ("in its head", b"ge", b"t a\r\n", b"END\r\n")]:
            with self.subTest(case):
                play = self.play("memcache")
                play.client(first).assert_passes()
                play.replace_rules(error_rule(per="connection"))
                play.client(rest).assert_passes()
                play.backend(reply).assert_passes()
                play.client(b"get b\r\n").assert_replied(MEMCACHE_NO_MEMORY)

    def test_a_new_rule_does_not_act_on_pipelined_requests_that_were_forwarded(self):
        """The rule began with the reply to an earlier request. It sent a substitute for it."""
        rule = vaurien.Rule("latency", {"latency": 1})
        for protocol, requests, replies, kind in [
                ("postgres", [pg_query(b"SELECT 1"), pg_query(b"SELECT 2")],
                 [PG_SELECTED_1 + PG_READY] * 2, "57014"),
                ("smtp", [b"BDAT 3\r\nabc", b"NOOP\r\n"], [b"250 ok\r\n"] * 2, "451")]:
            with self.subTest(protocol):
                play = (self.play_postgres if protocol == "postgres" else
                        functools.partial(self.play, protocol))(rule)
                play.client(b"".join(requests)).assert_passes()
                play.backend(replies[0]).assert_passes()
                new_rule = error_rule(kind, per="connection")
                self.assertEqual(play.replace_rules(rule, new_rule), [])
                play.backend(replies[1]).assert_passes()
                self.assertEqual(new_rule.acted_count, 0)

    def test_one_of_two_errors_on_a_request_is_sent(self):
        """The second rule dropped the substitute of the first, or the reply to it."""
        for protocol, kinds, before, request, forwarded, reply, expected in [
                ("http", ["503", "500"], b"", HTTP_GET, b"", b"", b"503"),
                ("memcache", ["ERROR", "SERVER_ERROR"], b"", b"get a\r\n", b"", b"", b"ERROR\r\n"),
                ("redis", ["OOM", "BUSY"], b"MULTI\r\n", b"SET a 1\r\n",
                 b"*1\r\n$7\r\nvaurien\r\n", b"-ERR unknown\r\n", REDIS_OOM),
                ("smtp", ["451", "452"], b"", b"DATA\r\n", b"RSET\r\n", b"250 ok\r\n", b"451 "),
                ("mysql", ["1213", "1205"], b"", mysql_query(b"SELECT 1"),
                 mysql_query(b"ROLLBACK"), MYSQL_OK, b"Deadlock"),
                ("postgres", ["57014", "40001"], b"", pg_query(b"SELECT 1"),
                 pg_query(b"vaurien"), PG_ERROR + PG_READY, b"57014")]:
            with self.subTest(protocol):
                rules = [error_rule(kind) for kind in kinds]
                play = (self.play_postgres if protocol == "postgres" else
                        functools.partial(self.play, protocol))(*rules)
                if before:
                    play.client(before).assert_passes()
                    play.backend(b"+OK\r\n")
                output = play.client(request)
                self.assertEqual(output.to_backend, forwarded)
                sent = output.to_client + play.backend(reply).to_client
                self.assertEqual(sent.count(expected), 1 if protocol != "http" else 2)
                self.assertEqual([rule.acted_count for rule in rules], [1, 0])
                self.assertEqual(play.reader.pending_count(), 0)

    def test_a_changed_rule_finishes_the_error_that_it_has_begun(self):
        """The backend got the rest of the request without its beginning."""
        head, body = b"POST / HTTP/1.1\r\nContent-Length: 8\r\n\r\nab", b"cdefgh"
        for change in [{"draw_max": 0}, {"inject": True}, {"warmup": 9}, {"kind": "500"}]:
            with self.subTest(**change):
                rule = error_rule("503", per="connection")
                play = self.play("http", rule)
                play.client(head).assert_held()
                self.assertEqual(play.change_rule(rule, **change), [])
                play.client(body).assert_reply_matches(rb"\AHTTP/1\.1 503")

    def test_a_rule_that_begins_to_act_within_a_request_does_not_refuse_it(self):
        rule = undrawn_rule("error")
        rule.per = "connection"
        play = self.play("memcache", rule)
        play.client(b"set a 0 0 8\r\nabc").assert_passes()
        play.change_rule(rule)
        play.client(b"defgh\r\n").assert_passes()
        play.backend(b"STORED\r\n").assert_passes()
        play.client(b"get a\r\n").assert_replied(MEMCACHE_NO_MEMORY)

    def test_an_error_that_waits_for_its_turn_keeps_its_delays(self):
        """Its time was ignored when the backend had replied to the earlier requests."""
        play = self.play("redis", error_rule("OOM", match=b"bad"),
                         vaurien.Rule("latency", {"latency": 1500}, match=re.compile(b"bad")))
        play.client(b"get a\r\n" b"bad\r\n").assert_becomes(b"get a\r\n")
        output = play.backend(b"+A\r\n")
        self.assertEqual(output.to_client, b"+A\r\n" + REDIS_OOM)
        self.assertEqual(output.times(), [0, 1.5])
        self.assertTrue(play.has_modified())    # otherwise Connection ignores the times

    def test_a_removed_rule_releases_an_error_that_waits_for_its_turn(self):
        """The error was never sent, and so no later reply was."""
        hang, latency = matching_rule("hang", b"bad"), vaurien.Rule("latency", {"latency": 500})
        error = error_rule("OOM", match=b"bad")
        for remaining in [error, latency], [error], []:
            with self.subTest(count=len(remaining)):
                play = self.play("redis", hang, error, latency)
                play.client(b"get a\r\n" b"bad\r\n")
                play.replace_rules(*remaining)
                output = play.backend(b"+A\r\n")
                self.assertEqual(output.to_client, b"+A\r\n" + REDIS_OOM)
                self.assertEqual(output.times()[-1], 0)

    def test_no_request_passes_after_an_error_that_closes(self):
        """The end of the stream is delayed, but the server reads no further request."""
        play = self.play("smtp", error_rule("421", match=b"bad"))
        play.client(b"bad\r\n").assert_reply_matches(b"421", closes=True)
        play.replace_rules()
        play.client(b"NOOP\r\n").assert_held()

    def test_empty_lines_after_an_error_are_not_answered(self):
        play = self.play("http", error_rule("503"))
        play.client(HTTP_GET).assert_reply_matches(b"503")
        play.client(b"\r\n\r\n").assert_held()
        play.client(HTTP_GET).assert_reply_matches(b"503")

    def test_a_rule_per_connection_acts_from_its_first_match_on(self):
        play = self.play("redis", error_rule("OOM", match=b"bad", per="connection"))
        for _ in range(2):
            play.client(PING).assert_passes()
            play.backend(PONG).assert_passes()
        play.client(b"bad\r\n").assert_replied(REDIS_OOM)
        play.client(PING).assert_replied(REDIS_OOM)

    def test_a_rule_per_connection_that_never_matched_does_not_act_after_a_fallback(self):
        play = self.play("redis", matching_rule("delay", b"bad", per="connection"))
        play.client(PING).assert_passes()
        play.fall_back()
        play.tcp.begin_request()

    def test_replies_of_complete_requests_are_forgotten(self):
        play = self.play("redis", error_rule(per="connection"))
        play.client(PING * 100)
        self.assertEqual(play.exchange_count(), 1)

    # Connections that fall back to tcp.

    def test_a_head_that_is_not_recognized_is_not_held_for_long(self):
        for protocol, data in [("http", b"GET"), ("http", b"\r\nGET / HTTP/1.1\r"),
                               ("redis", b"hello there"), ("redis", b"*"), ("memcache", b"get a"),
                               ("postgres", b"\0\0"), ("smtp", b"EHLO"), ("mysql", b"hi\n")]:
            for pieces in [len(data)], [1] * len(data):
                with self.subTest(protocol, data=data, pieces=len(pieces)):
                    play = self.play(protocol, vaurien.Rule("delay", {"sleep": 1.0}))
                    play.client(data, pieces).assert_held()
                    play.wait(0.9 * vaurien.UNRECOGNIZED_MAX).assert_held()
                    output = play.wait(vaurien.UNRECOGNIZED_MAX)
                    self.assertEqual(output.to_backend, data)
                    self.assertIn("first 0.3 s", play.chain.protocol_error)
                    self.assertEqual(len(set(output.times())), 1)
                    self.assertGreaterEqual(output.times()[0], 1.0)     # the rule acts on it

    def test_a_head_that_is_recognized_is_held_for_longer(self):
        """A client may type the header fields of a request, or pause within a later request."""
        for protocol, before, head, rest in [
                ("http", b"", b"GET / HTTP/1.1\r\nHo", b"st: x\r\n\r\n"),
                ("http", HTTP_GET, b"GE", b"T / HTTP/1.1\r\n\r\n"),
                ("redis", b"", b"*1\r\n", b"$4\r\nPING\r\n"),
                ("redis", PING, b"PI", b"NG\r\n"),
                ("mysql", MYSQL_LOGIN, b"\5", b"\0\0\0\x03quit"),
                ("postgres", PG_STARTUP, b"Q\0", b"\0\0\x0aquit\0\0")]:
            with self.subTest(protocol, head=head):
                play = self.play(protocol, vaurien.Rule("delay", {"sleep": 0.0}))
                play.client(before).assert_passes()
                play.client(head).assert_held()
                play.wait(0.9 * vaurien.HEAD_TIMEOUT).assert_held()
                play.client(rest).assert_becomes(head + rest)
                self.assertIsNone(play.tcp)

    def test_a_client_is_recognized_by_a_request_on_the_fast_path(self):
        for request in PING, b"*1\r\n$4\r\nPING\r\n":
            with self.subTest(request):
                play = self.play("redis")
                play.client(request).assert_passes()
                play.replace_rules(vaurien.Rule("delay", {"sleep": 0.0}))
                play.client(b"PI").assert_held()
                play.wait(0.9 * vaurien.HEAD_TIMEOUT).assert_held()

    def test_no_rule_per_request_acts_after_a_part_of_the_head_was_forwarded(self):
        play = self.play("redis", vaurien.Rule("delay", {"sleep": 1.0}))
        play.client(b"*1\r\n$4\r\nPI").assert_held()
        play.wait(vaurien.HEAD_TIMEOUT)
        self.assertEqual(play.client(b"NG\r\n").times(), [0])
        play.backend(PONG)
        self.assertEqual(play.client(PING).times(), [1.0])

    def test_replies_take_the_fast_path_again_after_the_last_request_with_a_rule(self):
        for pieces in [b"*1\r\n$4\r\nPING\r\n"], [b"*1\r\n$4\r\nPI", b"NG\r\n"]:
            with self.subTest(pieces=pieces):
                play = self.play("redis", vaurien.Rule("delay", {"sleep": 0.0}, times=1, of=100))
                for piece in pieces:
                    play.client(piece)
                    play.wait(vaurien.HEAD_TIMEOUT)
                play.backend(PONG)
                play.client(PING)
                self.assertTrue(play.backend(PONG).fast)

    def test_a_head_that_stays_incomplete_is_forwarded(self):
        """The backend may end such a request, and reply 408."""
        for protocol, head, rest, following in [
                ("http", b"GET / HTTP/1.1\r\nHo", b"st: x\r\n\r\n", HTTP_GET),
                ("redis", b"*1\r\n$4\r\nPI", b"NG\r\n", PING)]:
            with self.subTest(protocol):
                play = self.play(protocol, error_rule())
                play.client(head).assert_held()
                self.assertEqual(play.wait(vaurien.HEAD_TIMEOUT).to_backend, head)
                play.client(rest).assert_becomes(rest)          # too late for an error
                play.backend(HTTP_OK if protocol == "http" else PONG).assert_passes()
                self.assertIsNone(play.tcp)
                self.assertTrue(play.client(following).to_client)

    def test_nothing_follows_a_reply_that_is_cut(self):
        for how in "close", "reset":
            play = self.play("redis", vaurien.Rule("cut", {"bytes": 4, "how": how}))
            play.client(PING * 2)
            self.assertEqual(play.backend(PONG * 2).to_client, PONG[:4])
            self.assertEqual(len(play.newly_acted()), 1)

    def test_no_byte_is_held_without_a_rule(self):
        for protocol, data in [("http", b"GET /"), ("redis", b"hello"), ("memcache", b"get"),
                               ("smtp", b"EHLO"), ("mysql", b"\1"), ("postgres", b"\0")]:
            with self.subTest(protocol):
                self.play(protocol).client(data).assert_passes()

    def test_an_error_does_not_act_on_a_connection_that_is_encrypted(self):
        play = self.play("postgres", vaurien.Rule("error", stream="both"))
        play.reader.feed(UPSTREAM, TLS_HELLO + bytes(5))
        play.fall_back()
        play.tcp.begin_request()
        play.client(b"hello")
        self.assertEqual(play.backend(b"world").events, [(0, DOWNSTREAM, b"world", ())])

    def test_the_rules_of_the_last_request_do_not_act_after_a_fallback(self):
        play = self.play("redis", error_rule("OOM", match=b"^GET"))
        play.client(b"GET a\r\n").assert_reply_matches(b"OOM")
        data = b"SUBSCRIBE a\r\n"
        output = play.client(data)
        self.assertEqual([sent_data for _, _, sent_data, _ in output.events], [data])
        self.assertTrue(play.tcp)
        self.assertEqual(play.backend(b"*3\r\n").events, [(0, DOWNSTREAM, b"*3\r\n", ())])

    # The fast path.

    def test_the_body_of_a_request_takes_the_fast_path_if_no_rule_was_drawn(self):
        for rule, is_fast in (undrawn_rule("error"), True), (vaurien.Rule("delay"), False):
            with self.subTest(rule.name):
                play = self.play("http", rule)
                output = play.client(b"POST / HTTP/1.1\r\nContent-Length: 90\r\n\r\n")
                self.assertFalse(output.fast)
                for to, data in (UPSTREAM, bytes(50)), (DOWNSTREAM, b"HTTP/1.1 200 OK\r\n"):
                    passed = play.try_fast_path(to, data, parse_whole=False)
                    self.assertEqual(passed, data if is_fast else None)

    def test_no_request_passes_after_a_handler_has_half_closed(self):
        def half_closer(state, t, to, data):
            yield t, to, data
            if to == UPSTREAM and data:
                yield t, UPSTREAM, EOF

        with registered(half_closer):
            play = self.play("redis", vaurien.Rule("half_closer"))
        play.client(REDIS_PING * 2)
        play.backend(PONG * 2)
        play.replace_rules()
        play.client(REDIS_PING).assert_held()
        self.assertEqual(play.drawn_request_count(), 2)

    def test_no_byte_passes_after_a_handler_has_half_closed_within_a_request(self):
        def half_closer(state, t, to, data):
            yield t, to, data
            if data == b"ab":
                yield t, UPSTREAM, EOF

        with registered(half_closer):
            play = self.play("memcache", vaurien.Rule("half_closer"))
        play.client(b"get a\r\n" b"set b 0 0 8\r\nab").assert_passes()
        play.replace_rules()
        play.client(b"cd").assert_held()

    def test_pieces_that_only_look_like_whole_messages(self):
        for protocol, to, messages_before, pieces in [
                ("redis", UPSTREAM, 2, [b"*2\r\n$3\r\nGET\r\n$14\r\n", REDIS_PING, b"\r\n"]),
                ("redis", DOWNSTREAM, 3, [b"$5\r\n", b"+OK\r\n", b"\r\n"]),
                ("redis", UPSTREAM, 2, [b"*1\r\n$9\r\nSUBSCRIBE\r\n"]),
                ("redis", UPSTREAM, 2, [b"*0\r\n"]),
                ("http", DOWNSTREAM, 0, [b"HTTP/1.1 408 Late\r\nContent-Length: 0\r\n\r\n"])]:
            request, reply = {"redis": (PING, PONG), "http": (HTTP_GET, HTTP_OK_EMPTY)}[protocol]
            messages = [(UPSTREAM, request), (DOWNSTREAM, reply), (UPSTREAM, request)]
            steps = messages[:messages_before] + [(to, piece) for piece in pieces] + messages
            with self.subTest(protocol, to=to, pieces=pieces):
                self.assertEqual(self.history(protocol, steps, parse_whole=True),
                                 self.history(protocol, steps, parse_whole=False))

    def history(self, protocol, steps, parse_whole):
        """Pass bytes to the fast path. Return [(forwarded bytes, state)] of the steps.

        steps          [(to, bytes)]
        parse_whole    as in Playbook.try_fast_path

        If a step is a protocol error, the error is the last item of the result.
        """
        play, history = self.play(protocol), []
        for to, data in steps:
            passed = play.try_fast_path(to, data, parse_whole)
            error = play.chain.protocol_error
            if error:
                return history + [error]
            history.append((passed, play.state()))
        return history

    def random_steps(self, rng, request, reply):
        """Yield (to, bytes, count of messages) of a pipelining client and its backend."""
        pending_count = 0
        for _ in range(20):
            if pending_count and rng.random() < 0.5:
                count = rng.randint(1, pending_count)
                pending_count -= count
                yield DOWNSTREAM, reply * count, count
            else:
                count = rng.choice([1, 1, 1, 3])
                pending_count += count
                yield UPSTREAM, request * count, count

    def test_whole_messages_leave_the_same_state_as_pieces(self):
        rng, message_counts = random.Random(3), Counter()
        for protocol, request, reply in [("redis", REDIS_GET_A, REDIS_HELLO),
                                         ("http", HTTP_GET_HOST, HTTP_OK)]:
            for conversation in range(50):
                with self.subTest(protocol, conversation=conversation):
                    whole, split = self.play(protocol), self.play(protocol)
                    for to, data, message_count in self.random_steps(rng, request, reply):
                        message_counts[message_count] += 1
                        for play, size in (whole, len(data)), (split, 7):
                            for start in range(0, len(data), size):
                                piece = data[start:start + size]
                                self.assertEqual(play.try_fast_path(to, piece), piece)
                        self.assertEqual(whole.state(), split.state())
                    for play in whole, split:
                        # The backend has the last request already, so a new rule cannot act on it.
                        rule = error_rule(per="connection")
                        play.replace_rules(rule)
                        self.assertEqual(rule.acted_count, 0)
                        self.assertEqual(play.process_open(rule), [])
                        self.assertTrue(play.last_request_is_current())
        self.assertGreater(message_counts[3], 10)       # there were pipelines

    def test_long_pipelines_cost_the_same_for_each_request(self):
        play = self.play("redis", error_rule("OOM", match=b"A"))
        began = time.process_time()
        # This takes 2.5 s if the whole pipeline is searched for each request.
        play.client(b"B\r\nA\r\n" * 10000)
        self.assertLess(time.process_time() - began, 1.25)
        play = self.play("redis")
        play.client(PING * 10000)
        began = time.process_time()
        for _ in range(2500):
            play.backend(PONG)
        self.assertLess(time.process_time() - began, 0.25)


# Conversations that know what each peer must see, while rules are added, removed and changed

SUBSTITUTE, SKIPPED = "substitute", "skipped"


class Talk:
    """A pipelining client and its backend, without sockets: an oracle for what both must see.

    Each request contains its index, like b"id5.", and the backend's reply repeats it. An error
    of a rule contains none. The reply to a substitute contains b"LEAK": no client may see it.

    requests    [bytes]; those in `silent` get no reply
    log         what the backend has got: the index of a request, or SUBSTITUTE
    outcomes    what the client has got: the index of a request, None for an error, or SKIPPED
    problems    sentences
    """

    greeting = login = login_reply = b""
    prologue = 0            # replies that the client awaits before its first request
    first_number = 1        # of the first request, in the fault records
    INDEX = re.compile(rb"id(\d+)\.")
    SIZES = [0, 1, 20, 20, 20, 3000, 70000]

    def __init__(self, rng, count):
        self.rng, self.silent = rng, set()
        self.requests = [self.make_request(index, b"id%d." % index, b"x" * rng.choice(self.SIZES))
                         for index in range(count)]
        self.log, self.outcomes, self.problems = [], [], []
        self.sent_count = 0
        self.to_backend, self.to_client = b"", self.greeting        # bytes still to be sent
        self.unread = {UPSTREAM: b"", DOWNSTREAM: b""}              # incomplete messages

    # The client

    def write_requests(self):
        """Append to `to_backend` what the client sends now."""
        if self.prologue:
            if self.login and self.prologue == 1:
                self.to_backend, self.login = self.to_backend + self.login, b""
            return
        while self.sent_count < len(self.requests):
            self.to_backend += self.requests[self.sent_count]
            self.sent_count += 1

    def receive(self, data):
        """Read bytes that the client has got."""
        for message in self.messages(DOWNSTREAM, data, self.reply_size):
            if b"LEAK" in message:
                self.problems.append("the client got the reply to a substitute")
            if self.prologue:
                self.prologue -= self.ends_prologue(message)
            else:
                self.note_reply(message)

    def ends_prologue(self, message):
        return True

    def note_reply(self, message):
        match = self.INDEX.search(message)
        self.outcomes.append(int(match.group(1)) if match else None)

    def is_over(self):
        return len(self.outcomes) >= len(self.requests) - len(self.silent)

    # The backend

    def serve(self, data):
        """Read bytes that the backend has got, and append its replies to `to_client`."""
        for message in self.messages(UPSTREAM, data, self.request_size):
            if self.login_reply:
                self.to_client, self.login_reply = self.to_client + self.login_reply, b""
            elif self.is_substitute(message):
                self.log.append(SUBSTITUTE)
                self.to_client += self.reply(b"LEAK", message)
            else:
                self.serve_request(message)

    def serve_request(self, message):
        match = self.INDEX.search(message)
        index = int(match.group(1)) if match else -1
        if index < 0 or message != self.requests[index]:
            self.problems.append("the backend got %r" % message[:60])
            return
        self.log.append(index)
        if index not in self.silent:
            self.to_client += self.reply(match.group(), message)

    def is_substitute(self, message):
        return False

    # Both

    def messages(self, to, data, size_of):
        """Yield the whole messages of a direction."""
        unread, start = self.unread[to] + data, 0
        while start < len(unread):
            size = size_of(unread[start:])
            if not 0 < size <= len(unread) - start:
                break
            yield unread[start:start + size]
            start += size
        self.unread[to] = unread[start:]

    def check(self, faults):
        """Append to `problems` what is wrong after the end of the conversation.

        faults    [(whether it is a per-connection rule, request number)] of errors
        """
        answered = [index for index in range(len(self.requests)) if index not in self.silent]
        if len(self.outcomes) != len(answered):
            self.problems.append("%d of %d replies" % (len(self.outcomes), len(answered)))
        pairs = list(zip(answered, self.outcomes))
        wrong = [pair for pair in pairs if pair[1] not in (pair[0], None, SKIPPED)]
        if wrong:
            self.problems.append("request %d got the reply to %d" % wrong[0])
        accepted = sorted(self.silent.union(index for index, outcome in pairs if index == outcome))
        got = [entry for entry in self.log if entry is not SUBSTITUTE]
        if got != accepted:
            self.problems.append("the backend got %s, the client has the replies of %s"
                                 % (got, accepted))
        if any(self.unread.values()):
            self.problems.append("incomplete messages: %r" % {
                to: unread[:60] for to, unread in self.unread.items()})
        self.check_faults(pairs, faults)

    def check_faults(self, pairs, faults):
        """Compare the fault records of errors with the errors that the client has seen."""
        numbers = {outcome: {index + self.first_number for index, seen in pairs if seen is outcome}
                   for outcome in (None, SKIPPED)}
        for_request = {number for per_connection, number in faults if not per_connection}
        begun = min([number for per_connection, number in faults if per_connection],
                    default=math.inf)
        unseen = {number for _, number in faults} - numbers[None] - numbers[SKIPPED]
        unrecorded = {number for number in numbers[None] - for_request if number < begun}
        if unseen or unrecorded:
            self.problems.append("fault records without an error: %s, errors without one: %s"
                                 % (sorted(unseen), sorted(unrecorded)))


class HttpTalk(Talk):
    def make_request(self, index, token, filler):
        return b"POST /%s HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s" % (token, len(filler), filler)

    def reply(self, token, request):
        body = token * self.rng.choice([1, 1, 500])
        return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)

    def request_size(self, data):
        head, end, _ = data.partition(b"\r\n\r\n")
        match = re.search(rb"Content-Length: (\d+)", head)
        return len(head + end) + int(match.group(1)) if end else 0

    reply_size = request_size


class RedisTalk(Talk):
    SUBSTITUTES = (b"*1\r\n$7\r\nvaurien\r\n",)
    in_multi = False

    def make_request(self, index, token, filler):
        if not self.in_multi and self.rng.random() < 0.1:
            self.in_multi = True
            return b"MULTI %s\r\n" % token
        if self.in_multi and self.rng.random() < 0.3:
            self.in_multi = False
            return b"EXEC %s\r\n" % token
        if self.rng.random() < 0.3:
            return b"GET %s\r\n" % token
        args = [b"SET", token, filler]
        return b"*3\r\n" + b"".join(b"$%d\r\n%s\r\n" % (len(arg), arg) for arg in args)

    def reply(self, token, request):
        body = token * self.rng.choice([1, 500])
        return self.rng.choice([b"+%s\r\n" % token, b"$%d\r\n%s\r\n" % (len(body), body)])

    def is_substitute(self, message):
        return message in self.SUBSTITUTES

    def request_size(self, data):
        if data[:1] != b"*":
            return data.find(b"\n") + 1
        if len(data) < 4:
            return 0
        offset = 4
        for _ in range(int(data[1:2])):
            line_end = data.find(b"\r\n", offset)
            if line_end < 0:
                return 0
            offset = line_end + 2 + int(data[offset + 1:line_end]) + 2
        return offset

    def reply_size(self, data):
        line, end, _ = data.partition(b"\r\n")
        body_size = int(line[1:]) + 2 if end and line[:1] == b"$" else 0
        return len(line) + 2 + body_size if end else 0


class MemcacheTalk(Talk):
    def make_request(self, index, token, filler):
        if self.rng.random() < 0.5:
            return b"get %s\r\n" % token
        quiet = b" noreply" if self.rng.random() < 0.2 else b""
        if quiet:
            self.silent.add(index)
        return b"set %s 0 0 %d%s\r\n%s\r\n" % (token, len(filler), quiet, filler)

    def reply(self, token, request):
        if request[:3] == b"set":
            return b"STORED %s\r\n" % token
        body = token * self.rng.choice([1, 500])
        return b"VALUE %s 0 %d\r\n%s\r\nEND\r\n" % (token, len(body), body)

    def request_size(self, data):
        line, end, _ = data.partition(b"\r\n")
        body_size = int(line.split()[4]) + 2 if end and line[:3] == b"set" else 0
        return len(line) + 2 + body_size if end else 0

    def reply_size(self, data):
        line, end, _ = data.partition(b"\r\n")
        rest_size = int(line.split()[3]) + 7 if end and line[:5] == b"VALUE" else 0
        return len(line) + 2 + rest_size if end else 0


class SmtpTalk(Talk):
    greeting, prologue, first_number = b"220 hello\r\n", 1, 2

    def make_request(self, index, token, filler):
        if self.rng.random() < 0.5:
            return b"NOOP %s\r\n" % token
        return b"BDAT %d\r\n%s" % (len(token + filler), token + filler)

    def reply(self, token, request):
        return self.rng.choice([b"250 %s\r\n", b"250-more\r\n250 %s\r\n"]) % token

    def is_substitute(self, message):
        return message == b"RSET\r\n"

    def request_size(self, data):
        line, end, _ = data.partition(b"\r\n")
        body_size = int(line.split()[1]) if end and line[:4] == b"BDAT" else 0
        return len(line) + 2 + body_size if end else 0

    def reply_size(self, data):
        match = re.match(rb"(?:\d+-.*\r\n)*\d+ .*\r\n", data)
        return match.end() if match else 0


class MysqlTalk(Talk):
    greeting, login = mysql_packet(0, b"\x0a5.5\0" + bytes(40)), MYSQL_LOGIN
    login_reply = mysql_packet(2, MYSQL_OK_BODY)
    prologue, first_number = 2, 2

    def make_request(self, index, token, filler):
        if self.rng.random() < 0.3:
            return mysql_packet(0, b"\x17" + struct.pack("<I", index + 1) + token)
        return mysql_query(b"SELECT " + token + filler)

    def reply(self, token, request):
        if self.rng.random() < 0.5 or token == b"LEAK":
            return mysql_packet(1, MYSQL_OK_BODY + token)
        rows = [b"\1x"] * self.rng.randint(0, 20)
        end = MYSQL_EOF[4:]
        packets = [b"\1", b"column " + token, end, *rows, end]
        return b"".join(mysql_packet(number, body) for number, body in enumerate(packets, 1))

    def is_substitute(self, message):
        return message[4:5] == b"\x1a" or message[4:] == b"\x03ROLLBACK"

    def request_size(self, data):
        return len(data) > 3 and 4 + int.from_bytes(data[:3], "little")

    def reply_size(self, data):
        size = packet = self.request_size(data)
        eofs_left = 2 if data[4:5] == b"\1" else 0
        while packet and eofs_left:
            packet = self.request_size(data[size:])
            eofs_left -= data[size + 4:size + 5] == b"\xfe"
            size += packet
        return packet and size


class PostgresTalk(Talk):
    login, login_reply = PG_STARTUP, pg_message(b"R", bytes(4)) + PG_READY
    prologue, first_number = 1, 2
    batch_left = 0              # requests of the batch that the client is writing
    skips = failed = False      # the backend skips to Sync; the client has got an error
    statement = b""             # that the backend has parsed last

    def __init__(self, rng, count):
        self.batches = []       # index of the last request of each batch or query
        super().__init__(rng, count)
        if self.batch_left:     # an unfinished batch
            self.requests[-1] += PG_SYNC
            self.batches.append(count - 1)

    def make_request(self, index, token, filler):
        if not self.batch_left and self.rng.random() < 0.5:
            self.batches.append(index)
            return pg_query(b"SELECT " + token + filler)
        self.batch_left = (self.batch_left or self.rng.randint(1, 4)) - 1
        request = pg_parse(b"", b"SELECT " + token + filler) + pg_bind(b"") + PG_EXECUTE
        if not self.batch_left:
            self.batches.append(index)
            request += PG_SYNC
        return request

    def request_size(self, data):
        start = 0 if self.login_reply else 1        # the startup message has no type
        return len(data) > 4 and start + int.from_bytes(data[start:start + 4], "big")

    def reply_size(self, data):
        return len(data) > 4 and 1 + int.from_bytes(data[1:5], "big")

    def is_substitute(self, message):
        return not self.skips and message[:1] in b"QP" and b"vaurien" in message

    def reply(self, token, request):
        self.skips = request[:1] == b"P"
        return pg_message(b"E", b"SLEAK\0\0") + (b"" if self.skips else PG_READY)

    def serve_request(self, message):
        type_ = message[:1]
        if type_ == b"S":
            self.skips = False
            self.to_client += PG_READY
        elif self.skips:
            return
        elif type_ in b"PB":
            self.statement = message if type_ == b"P" else self.statement
            self.to_client += PG_PARSE_COMPLETE if type_ == b"P" else PG_BIND_COMPLETE
        else:
            text = message if type_ == b"Q" else self.statement
            index = int(self.INDEX.search(text).group(1))
            if text not in self.requests[index]:
                self.problems.append("the backend got %r" % message[:60])
            self.log.append(index)
            self.to_client += pg_message(b"C", b"SELECT id%d.\0" % index) + (
                PG_READY if type_ == b"Q" else b"")

    def ends_prologue(self, message):
        return message[:1] == b"Z"

    def is_over(self):
        return not self.batches

    def note_reply(self, message):
        if message[:1] in b"CE":
            super().note_reply(message)
            self.failed = self.outcomes[-1] is None
        elif message[:1] == b"Z":
            count = self.batches.pop(0) + 1
            if self.failed:
                self.outcomes += [SKIPPED] * (count - len(self.outcomes))
            self.failed = False
            if len(self.outcomes) != count:
                self.problems.append("%d replies before the end of request %d"
                                     % (len(self.outcomes), count - 1))


TALKS = {"http": HttpTalk, "redis": RedisTalk, "memcache": MemcacheTalk,
         "smtp": SmtpTalk, "mysql": MysqlTalk, "postgres": PostgresTalk}


def random_toxic(rng, protocol, name):
    """Return a toxic that may delay, cut, or refuse requests, and loses no bytes otherwise."""
    type_ = rng.choice(["error"] * 6 + ["transient", "delay", "latency", "hang", "bandwidth",
                                        "slicer", "packet_loss", "network", "cut"])
    attributes = {"delay": {"sleep": rng.choice([0.001, 0.01])},
                  "latency": {"latency": rng.choice([1, 10]), "jitter": rng.choice([0, 1])},
                  "bandwidth": {"rate": rng.choice([0, 10000]), "shared": rng.random() < 0.5},
                  "packet_loss": {"loss_rate": 0.3, "rtt": rng.choice([0, 10])},
                  "network": {"profile": "wifi-lossy"},
                  "cut": {"how": "hang", "bytes": rng.choice([0, 10, 1000]), "rows": rng.choice(
                      [0, 1, 2]) if vaurien.PROTOCOLS[protocol].has_rows else 0},
                  "slicer": {"average_size": rng.choice([1000, 10000]), "size_variation": 500,
                             "delay": rng.choice([0, 10])}}.get(type_, {})
    if type_ in ("error", "transient"):
        attributes = {"kind": rng.choice(vaurien.PROTOCOLS[protocol].default_errors)}
        if type_ == "transient":
            attributes["agitate"] = rng.randint(1, 5)
    fields = {"per": rng.choice(["request", "connection"]), "stream": "both",
              "after": rng.choice([0, 0, 0, 3]), "times": rng.choice([0, 0, 0, 3])}
    if rng.random() < 0.3:
        fields["match"] = re.compile(rb"id\d*[02468]\.")
    if rng.random() < 0.3:
        fields.update(rng.choice([
            {"start": 0.02}, {"duration": 0.02}, {"ttl": 0.03}, {"ramp": 0.04},
            {"start": 0.01, "duration": 0.02, "every": 0.03, "ramp": 0.01}]))
    return vaurien.Toxic(type_, name, rng.choice([0, 0.3, 0.7, 1, 1]), attributes, **fields)


def change_toxics(rng, protocol, toxics):
    """Return other toxics: one was added, removed or changed, or they changed places."""
    toxics = list(toxics)
    action = rng.choice(["add", "remove", "change", "change", "move"])
    if (action == "add" and len(toxics) < 5) or not toxics:
        toxics.insert(rng.randint(0, len(toxics)),
                      random_toxic(rng, protocol, "t%d" % rng.getrandbits(32)))
        return toxics
    index = rng.randrange(len(toxics))
    toxic = toxics.pop(index)
    if action == "change":
        other = random_toxic(rng, protocol, "")
        attributes = other.attributes if other.rule.name == toxic.rule.name else toxic.attributes
        fields = {field: getattr(toxic.rule, field)
                  for field in ("per", "after", "times", "match", "ramp", *vaurien.ACCEPT_FIELDS)}
        toxics.insert(index, vaurien.Toxic(toxic.rule.name, toxic.name, rng.choice([0, 0.5, 1]),
                                           attributes, stream="both", **fields))
    elif action == "move":
        toxics.insert(rng.randint(0, len(toxics)), toxic)
    return toxics


class Simulation:
    """The connections of a proxy with a protocol, one after the other, without sockets.

    It does as Connection does. Its clock only moves when `advance` is called.
    """

    now = property(lambda self: self.proxy.loop.now)

    def __init__(self, protocol, seed):
        self.rng = random.Random("%s %d" % (protocol, seed))
        self.protocol, self.faults = protocol, []
        self.proxy = vaurien.ProxyServer(("127.0.0.1", 9), ("127.0.0.1", 8), protocol=protocol,
                                         seed=seed)
        self.proxy.loop = SimulatedLoop()
        self.proxy.connections = {1: self}      # whose rules_changed the proxy calls
        self.talk = TALKS[protocol](self.rng, self.rng.randint(1, 12))
        self.chain = vaurien.ProtocolChain(self.proxy.rules, 1, vaurien.PROTOCOLS[protocol]())
        budget = vaurien.Budget()
        self.up, self.down = (vaurien.DelayQueue(to, budget) for to in (UPSTREAM, DOWNSTREAM))
        self.chain.start()
        self.enqueue(self.chain.process(0.0, UPSTREAM, OPEN)
                     + self.chain.process_open(0.0, [DOWNSTREAM]))

    def enqueue(self, events):
        for t, to, data, delays in events:
            (self.up if to == UPSTREAM else self.down).put(t, data, self.now, delays)
        newly_acted, self.chain.newly_acted = self.chain.newly_acted, []
        self.faults += [(active.rule.per == "connection", number)
                        for active, number, _ in newly_acted
                        if active.rule.name in ("error", "transient")]

    def rules_changed(self, new, removed, changed, woken=()):
        begun = self.chain.rules_changed(new, changed, woken)
        released = self.chain.release(removed, changed)
        for queue in self.up, self.down:
            if queue.release(removed, changed) or released:
                self.chain.reset_due_times(queue.to, max(self.now, queue.latest))
        self.enqueue(self.chain.process_open(self.now, [UPSTREAM, DOWNSTREAM],
                                             [*new, *changed, *begun]))

    def pass_bytes(self, to, data):
        """A peer has sent these bytes."""
        if self.chain.last_direction is not to:
            self.chain.direction_changed(to)
        passed = self.chain.pass_through(to, data)
        self.enqueue(self.chain.process_bytes(self.now, to, data) if passed is None
                     else [(self.now, to, passed, ())])
        if self.chain.protocol_error:
            self.talk.problems.append("protocol error: " + self.chain.protocol_error)
            self.chain.protocol_error = ""

    def advance(self, seconds):
        """Let time pass, and give both peers the bytes that are due."""
        self.proxy.loop.advance(seconds)
        for queue, read in (self.up, self.talk.serve), (self.down, self.talk.receive):
            queue.pop_due(self.now, False)
            while queue.send_buffer:
                data = queue.send_buffer[0]
                queue.consume(len(data))
                read(bytes(data))
        self.talk.write_requests()

    def step(self):
        """Let one thing happen, at random."""
        talk, size = self.talk, self.rng.choice([1, 10, 100, 1000, 100000])
        action = self.rng.random()
        if action < 0.3:
            data, talk.to_backend = talk.to_backend[:size], talk.to_backend[size:]
            if data:
                self.pass_bytes(UPSTREAM, data)
        elif action < 0.6:
            data, talk.to_client = talk.to_client[:size], talk.to_client[size:]
            if data:
                self.pass_bytes(DOWNSTREAM, data)
        elif action < 0.8:
            self.advance(self.rng.choice([0, 0, 0.001, 0.02]))
        else:
            self.proxy.set_toxics(change_toxics(self.rng, self.protocol, self.proxy.toxics))

    def run(self):
        """Hold the conversation. Returns its problems."""
        for _ in range(self.rng.choice([20, 100, 300])):
            self.step()
        self.proxy.set_toxics([])
        for _ in range(3000):
            self.step_without_rules()
            if self.talk.is_over() and not (self.up.queue or self.down.queue
                                            or self.talk.to_backend or self.talk.to_client):
                break
        self.talk.check(self.faults)
        return self.talk.problems

    def step_without_rules(self):
        talk = self.talk
        for to, attribute in (UPSTREAM, "to_backend"), (DOWNSTREAM, "to_client"):
            data = getattr(talk, attribute)
            setattr(talk, attribute, b"")
            if data:
                self.pass_bytes(to, data)
        self.advance(0.1)


class TestRuleChanges(unittest.TestCase):
    """Each request is answered once and in order, whenever rules change: see ProtocolChain."""

    def test_random_changes_within_random_conversations(self):
        outcomes = Counter()
        for protocol in TALKS:
            for seed in range(60):
                simulation = Simulation(protocol, seed)
                with self.subTest(protocol, seed=seed):
                    self.assertEqual(simulation.run(), [])
                for index in simulation.talk.outcomes:
                    outcomes["error" if index is None else "reply"] += 1
        self.assertGreater(outcomes["error"], 200)
        self.assertGreater(outcomes["reply"], 300)


class TestProtocols(unittest.TestCase):
    """Protocols on real sockets."""

    def test_a_client_that_closes_without_sending_is_forgotten(self):
        with running_proxy(echo, "100:error", protocol="postgres") as proxy:
            connect(proxy.port).close()
            wait_until(lambda: proxy.accepted and not proxy.connections)

    def test_bytes_after_the_last_reply_are_no_request(self):
        with running_proxy(echo, "100:error", options={"error": {"kind": "503"}},
                           protocol="http") as proxy, connected_client(proxy) as sock:
            sock.sendall(HTTP_GET_1_0)
            self.assertEqual(read_until_close(sock).ending, "eof")
            for _ in range(3):
                sock.sendall(HTTP_GET_1_0)
                time.sleep(0.02)
            self.assertEqual(proxy.faults, {"error": 1})

    def test_a_kind_that_is_drawn_is_in_the_log_and_in_the_fault_record(self):
        with running_proxy(echo, "100:error", protocol="redis") as proxy, \
                self.assertLogs("vaurien", "INFO") as logged, connected_client(proxy) as sock:
            sock.sendall(b"PING\r\n")
            reply = sock.makefile("rb").readline()
            kind = proxy.wait_for("error").options["kind"]
            self.assertEqual(reply, vaurien.Redis().encode_error(kind))
        self.assertIn(":error warmup=0 kind=%s: connection 1, " % kind, logged.output[0])

    def test_a_kind_that_is_drawn_for_a_client_that_connects(self):
        with running_proxy(echo, "100:error", protocol="smtp") as proxy, \
                connected_client(proxy) as sock:
            reply = sock.makefile("rb").readline()
            kind = proxy.wait_for("error").options["kind"]
            self.assertEqual(reply[:3], kind.encode()[:3])

    def test_errors_need_both_streams(self):
        with self.assertRaisesRegex(ValueError, "stream must be both"):
            OpenProxy("x:1", protocol="redis", toxics=[{"type": "error", "stream": "downstream"}])
        OpenProxy("x:1", protocol="redis", toxics=[{"type": "error", "stream": "both"}])

    def test_kinds_that_a_protocol_does_not_have_are_rejected(self):
        for protocol, message in [
                ("redis", "kind must be one of LOADING, BUSY"),
                ("tcp", "kind needs --protocol: tcp has no error of the kind '503'")]:
            with self.subTest(protocol), self.assertRaisesRegex(ValueError, message):
                OpenProxy("x:1", protocol=protocol, behavior="1:error",
                              options={"error": {"kind": "503"}})

    def test_protocols_that_do_not_exist_are_rejected(self):
        message = "must be one of tcp, http, redis, memcache, mysql, postgres, smtp, tls, " \
                  "not 'nope'"
        with self.assertRaisesRegex(ValueError, message):
            OpenProxy("x:1", protocol="nope")

    def test_blocking_handlers_need_tcp(self):
        with registered(Passes), self.assertRaisesRegex(
                ValueError, "it works with --protocol tcp only"):
            OpenProxy("x:1", protocol="redis", behavior="1:Passes")

    def test_http_with_keep_alive(self):
        def echo_bodies(sock):
            """Reply to each HTTP request with the body of the request."""
            file = sock.makefile("rb")
            while file.readline():
                length = 0
                for line in iter(file.readline, b"\r\n"):
                    if line.lower().startswith(b"content-length:"):
                        length = int(line.split(b":")[1])
                body = file.read(length)
                head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body)
                sock.sendall(head + body)

        with running_proxy(echo_bodies, protocol="http") as proxy:
            client = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=TIMEOUT)
            with contextlib.closing(client):
                for kind in [None, *vaurien.Http.errors, None]:
                    with proxy.handler("error", kind=kind) if kind else proxy.handler("dummy"):
                        for body in b"", b"x" * 3000000:
                            client.request("POST", "/", body)
                            response = client.getresponse()
                            self.assertEqual(response.status, int(kind or 200))
                            is_echo = response.read() == body
                            self.assertEqual(is_echo, not kind)
            self.assertEqual(proxy.accepted, 1)

    def test_an_error_that_closes_arrives_while_the_client_still_sends(self):
        with running_proxy(echo, protocol="http") as proxy, connected_client(proxy) as sock:
            with proxy.handler("error", kind="503"):
                sock.sendall(b"POST / HTTP/1.1\r\nExpect: 100-continue\r\n"
                             b"Content-Length: 10\r\n\r\n")
                sock.sendall(b"0123456789")
                response = b""
                while b"503 Service Unavailable\n" not in response:
                    response += sock.recv(65536)
                sock.sendall(bytes(3000000))
                self.assertEqual(read_until_close(sock), EMPTY_EOF)

    def test_errors_that_wait_are_sent_before_later_bytes_of_tcp(self):
        def reply_after_get_bad(sock):
            received = b""
            while b"GET bad" not in received:
                received += sock.recv(100)
            sock.sendall(b"+A\r\n" b"*1\r\n:1\r\n")
            read_until_close(sock)

        with running_proxy(reply_after_get_bad, protocol="redis") as proxy:
            with connected_client(proxy) as sock, proxy.handler("error", kind="OOM", match="bad"):
                sock.sendall(b"GET a\r\n" b"GET bad\r\n" b"SUBSCRIBE x\r\n")
                proxy.wait_for("error")
                sock.sendall(b"GET bad\r\n")
                replies = b"+A\r\n" + REDIS_OOM + b"*1\r\n:1\r\n"
                self.assertEqual(read_exactly(sock, len(replies)), replies)

    def test_a_connection_falls_back_to_tcp(self):
        data = random_data(300000)
        for protocol in PARSED_PROTOCOLS:
            for behavior in "100:dummy", "0:hang":
                with self.subTest(protocol, behavior=behavior), \
                        running_proxy(echo, behavior, protocol=protocol) as proxy, \
                        connected_client(proxy) as sock:
                    received = send_and_read_all(sock, b"\n\n" * 5 + data)
                    self.assertEqual(received[::2], (10 + len(data), "eof"))

    def test_tls_passes_although_a_protocol_is_expected(self):
        """With a rule, and with http also without one, the handshake hung."""
        hello = TLS_HELLO + bytes(100)
        for protocol in PARSED_PROTOCOLS:
            for behavior in "100:dummy", "0:delay", "0:error":
                with self.subTest(protocol, behavior=behavior), \
                        running_proxy(echo, behavior, protocol=protocol) as proxy, \
                        connected_client(proxy) as sock:
                    self.assertEqual(send_and_read(sock, hello), hello)

    def test_a_client_that_sends_no_whole_line_is_served_as_tcp(self):
        for protocol, behavior in ("http", "100:dummy"), ("redis", "0:delay"), ("smtp", "0:error"):
            with self.subTest(protocol), self.assertLogs("vaurien", "INFO") as logs, \
                    mock.patch.object(vaurien, "UNRECOGNIZED_MAX", 0.02), \
                    running_proxy(echo, behavior, protocol=protocol) as proxy, \
                    connected_client(proxy) as sock:
                began = time.monotonic()
                self.assertEqual(send_and_read(sock, b"HELLO"), b"HELLO")
                self.assertGreaterEqual(time.monotonic() - began, vaurien.UNRECOGNIZED_MAX)
                self.assertEqual(send_and_read(sock, b"THERE"), b"THERE")
                self.assertIn("continuing as tcp: no whole line", "\n".join(logs.output))

    def test_a_backend_that_sends_first(self):
        greeting = b"220 hello\r\n"

        def greet_and_echo(sock):
            sock.sendall(greeting)
            echo(sock)

        with running_proxy(greet_and_echo, protocol="smtp") as proxy, \
                connected_client(proxy) as sock:
            self.assertEqual(read_exactly(sock, len(greeting)), greeting)
            with proxy.handler("delay", sleep=0.05):
                began = time.monotonic()
                send_and_read(sock, b"250 NOOP\r\n")
                self.assertGreaterEqual(time.monotonic() - began, 0.05)

    def test_large_values_pass_with_little_memory(self):
        class RecordingBudget(vaurien.Budget):
            held_max = 0

            def allowance(self, bound):
                self.held_max = max(self.held_max, self.held)
                return super().allowance(bound)

        data = bytes(8 << 20)
        for protocol, head in [
                ("redis", b"*2\r\n$4\r\nECHO\r\n$%d\r\n" % len(data)),
                ("http", b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(data)),
                ("memcache", b"set a 0 0 %d\r\n" % len(data))]:
            for behavior in "100:dummy", "0:hang":
                with self.subTest(protocol, behavior=behavior), \
                        mock.patch.object(vaurien, "Budget", RecordingBudget), \
                        running_proxy(echo, behavior, protocol=protocol) as proxy, \
                        connected_client(proxy) as sock:
                    request = head + data + b"\r\n"
                    self.assertEqual(send_and_read_all(sock, request).size, len(request))
                    self.assertLessEqual(proxy.loop.budget.held_max,
                                         4 * vaurien.HELD_MAX_IDLE + 4 * vaurien.CHUNK)


class TestTlsHandshake(unittest.TestCase):
    """--protocol tls: faults of the handshake, seen by the client of Python's ssl."""

    @staticmethod
    def shake_hands(port, name="db.example"):
        """Begin TLS. Returns the error, as text."""
        context = client_context()
        context.set_alpn_protocols(["h2"])
        with connect(port) as sock:
            try:
                context.wrap_socket(sock, server_hostname=name)
            except OSError as error:
                return str(error)

    def test_the_client_names_each_alert(self):
        for kind in vaurien.Tls.errors:
            with self.subTest(kind), running_proxy(
                    echo, "100:error", options={"error": {"kind": kind}}, protocol="tls") as proxy:
                self.assertIn(kind.replace("_", " "), self.shake_hands(proxy.port))

    def test_match_selects_the_name_the_application_protocol_and_the_version(self):
        for match, count in ("^db[.]example ", 1), ("^other", 0), (" h2 ", 1), ("TLSv1.3", 1):
            with self.subTest(match), running_proxy(echo, protocol="tls") as proxy:
                with proxy.handler("error", kind="unknown_ca", match=match) as fault:
                    said = self.shake_hands(proxy.port)
                self.assertEqual(("unknown ca" in said, fault.count), (count == 1, count))

    def test_the_connection_passes_after_the_handshake(self):
        data = tls_hello(TLS_NAME) + random_data(300000)
        for behavior, count in ("100:delay", 1), ("100:dummy", 0):
            with self.subTest(behavior), running_proxy(
                    echo, behavior, options={"delay": {"sleep": 0.05}},
                    protocol="tls") as proxy:
                with connected_client(proxy) as sock:
                    began = time.monotonic()
                    self.assertEqual(send_and_read(sock, data[:200]), data[:200])
                    self.assertGreaterEqual(time.monotonic() - began, count * 0.05)
                    self.assertEqual(send_and_read_all(sock, data[200:]).size, len(data) - 200)
                self.assertEqual(sum(proxy.faults.values()), count)

    def test_plain_bytes_pass(self):
        with running_proxy(echo, "100:error", protocol="tls") as proxy, \
                self.assertLogs("vaurien", "INFO") as logged, connected_client(proxy) as sock:
            self.assertEqual(send_and_read(sock, HTTP_GET), HTTP_GET)
        self.assertIn("continuing as tcp: no ClientHello of TLS", "\n".join(logged.output))


# -- Rules and chain ------------------------------------------------------------


def stall(state, t, to, data, *, after=1, match="x"):
    """A handler with options that have the names of rule fields.

    after    a number
    match    a text
    """
    yield t + after, to, data


class TestRuleFields(TempDirTestCase):
    """Every rule has the fields of RULE_FIELDS, unless its handler has an option of that name."""

    def test_an_option_of_the_handler_wins_over_a_field_of_the_same_name(self):
        with registered(stall):
            rule, = vaurien.read_rules([{"name": "stall", "after": 7, "match": "(", "times": 2}])
            self.assertEqual((rule.options, rule.after, rule.match, rule.times),
                             ({"after": 7, "match": "("}, 0, None, 2))
            self.assertEqual(vaurien.read_rules([rule.to_json()])[0].to_json(), rule.to_json())
            toxic = vaurien.make_toxic("stall", "s", {"after": 3}, {"after": 4})
            self.assertEqual((toxic.rule.after, toxic.rule.options["after"]), (3, 4))
            with OpenProxy("127.0.0.1:9") as proxy, proxy.handler("stall", after=5):
                self.assertEqual(proxy.rules.installed[0].options["after"], 5)

    def test_an_option_of_the_handler_wins_on_the_command_line_and_in_a_file(self):
        with registered(stall):
            arguments = ["--behavior", "100:stall", "--handlers.stall.after", "2"]
            file = self.write("v.ini", "[vaurien]\nbehavior = 100:stall\n"
                                       "[handler:stall]\nafter = 2\n"
                                       "[toxic:t]\ntype = stall\nafter = 2\ntimes = 1\n")
            for argv, count in (arguments, 1), (["--config", file], 2):
                with self.subTest(argv[0]):
                    config = vaurien.read_arguments(argv, vaurien.SETTINGS)
                    proxy = vaurien.make_proxies(config)["vaurien"]
                    self.assertEqual([(rule.options["after"], rule.after)
                                      for rule in proxy.rules.installed], [(2, 0)] * count)

    def test_an_option_of_the_handler_wins_in_a_recording(self):
        with registered(stall):
            rule = vaurien.make_toxic("stall", "s", {}, {"after": 7, "match": "("}).rule
            path = self.write("faults", json.dumps(
                {"proxy": "p", "connection": 1, "request": 1, "draw": 0, "count": 1,
                 "rule": rule.to_json()}))
            rules, (toxic,) = vaurien.Replay(path).rules("p")
            self.assertEqual(rules, [])
            self.assertEqual(toxic.rule.to_json(), rule.to_json())

    def test_a_new_field_needs_one_line(self):
        field = vaurien.Field(vaurien.check_count, 5, "a number of nothing")
        with mock.patch.dict(vaurien.RULE_FIELDS, nothing=field), \
                mock.patch.dict(vaurien.FIELD_DEFAULTS, nothing=5):     # made from RULE_FIELDS
            with self.subTest("a new field"):
                default, = vaurien.read_rules([{"name": "delay"}])
                rule, = vaurien.read_rules([{"name": "delay", "nothing": "7"}])
                self.assertEqual((default.nothing, rule.nothing, rule.to_json()["nothing"]),
                                 (5, 7, 7))
                toxics = [vaurien.make_toxic("latency", "l", fields, {})
                          for fields in ({}, {"nothing": 5}, {"nothing": 7})]
                self.assertTrue(toxics[0].same_rule(toxics[1]))
                self.assertFalse(toxics[0].same_rule(toxics[2]))
                self.assertEqual(toxics[2].rule.own_fields(), {"nothing": 7})
                config = vaurien.read_arguments(
                    ["--behavior", "5:delay", "--handlers.delay.nothing", "3"], vaurien.SETTINGS)
                rule, = vaurien.make_proxies(config)["vaurien"].rules.installed
                self.assertEqual(rule.nothing, 3)
                with self.assertRaisesRegex(ValueError, "nothing must be a whole number"):
                    vaurien.read_rules([{"name": "delay", "nothing": "x"}])


class TestRules(unittest.TestCase):
    """The requests on which rules act."""

    def test_draws_for_ever_new_toxics_use_a_bounded_memory(self):
        """Each name that was ever drawn kept its hash: 14 MiB after 20,000 long names."""
        rule_set = rule_set_of()
        first = rule_set.draw_batch("toxic 0", 1, 0)
        for index in range(5000):
            rule_set.draw_batch("toxic %d" % index, 1, 0)
        cache = vaurien.hash_prefix.cache_info()
        self.assertLessEqual(cache.currsize, 1024)
        self.assertEqual(rule_set.draw_batch("toxic 0", 1, 0), first)

    def test_behaviors_are_parsed(self):
        for text, behavior in [
                ("20:delay", [(20, "delay")]),
                (" 20:delay , 5:error", [(20, "delay"), (5, "error")]),
                ("0.5:hang", [(0.5, "hang")]),
                ("100:dummy", [(100, "dummy")]),
                ("33.3:delay,33.3:error,33.4:hang",
                 [(33.3, "delay"), (33.3, "error"), (33.4, "hang")]),
                ("0:delay", [(0, "delay")]),
                ("20:path.to.callable", [(20, "path.to.callable")])]:
            with self.subTest(text):
                self.assertEqual(vaurien.parse_behavior(text), behavior)

    def test_bad_behaviors_are_refused(self):
        for text in ["", "delay", "20", "20:", ":delay", "x:delay", "-1:delay", "101:delay",
                     "nan:delay", "inf:delay", "60:delay,60:error", "20:delay,", ",20:delay",
                     "20 delay"]:
            with self.subTest(text), self.assertRaisesRegex(ValueError, "^must .*not.*'"):
                vaurien.parse_behavior(text)

    def rule_set(self, behavior, **options):
        """Return the RuleSet of a behavior."""
        return rule_set_of(*rules_from(behavior), **options)

    CONNECTIONS, REQUESTS = 40, 50          # requests of each connection

    def draw_requests(self, rule_set, connections=CONNECTIONS, requests=REQUESTS):
        """Begin requests on connections 1, 2 ..., and check that at most one rule acts on each.

        Returns {(connection, request): handler} of the requests on which a rule acts.
        """
        handlers = {}
        for connection in range(1, connections + 1):
            chain = vaurien.Chain(rule_set, connection)
            for request in range(1, requests + 1):
                chain.begin_request()
                self.assertLessEqual(len(chain.active_rules), 1)
                for active_rule in chain.active_rules:
                    handlers[connection, request] = active_rule.rule.name
        return handlers

    def test_at_most_one_rule_acts_and_the_percentages_are_kept(self):
        counts = Counter(self.draw_requests(self.rule_set("20:delay,5:error")).values())
        total = self.CONNECTIONS * self.REQUESTS
        self.assertAlmostEqual(counts["delay"] / total, 0.20, delta=0.04)
        self.assertAlmostEqual(counts["error"] / total, 0.05, delta=0.03)

    def test_0_percent_is_never_and_100_percent_is_always(self):
        self.assertEqual(self.draw_requests(self.rule_set("0:delay")), {})
        self.assertEqual(len(self.draw_requests(self.rule_set("100:delay"))),
                         self.CONNECTIONS * self.REQUESTS)

    def test_the_same_seed_gives_the_same_faults_in_any_order_of_requests(self):
        expected = self.draw_requests(self.rule_set("20:delay,5:error"))
        rule_set, handlers = self.rule_set("20:delay,5:error"), {}
        chains = {connection: vaurien.Chain(rule_set, connection)
                  for connection in range(1, self.CONNECTIONS + 1)}
        shuffled_connections = list(chains) * self.REQUESTS
        random.Random(7).shuffle(shuffled_connections)
        for connection in shuffled_connections:
            chain = chains[connection]
            chain.begin_request()
            for active_rule in chain.active_rules:
                handlers[connection, chain.request_count] = active_rule.rule.name
        self.assertEqual(handlers, expected)

    def test_the_draws_are_the_same_on_every_python(self):
        handlers = self.draw_requests(self.rule_set("20:delay"), connections=1, requests=20)
        self.assertEqual(sorted(handlers), [(1, 2), (1, 6), (1, 13)])

    def test_only_the_draws_decide_and_each_request_is_counted(self):
        for behavior, fields in [("20:delay,5:error", {}), ("20:delay", {"after": 7}),
                                 ("0:delay", {}), ("100:delay", {"after": 9}),
                                 ("3:hang,1:error", {}), ("50:delay", {"times": 2})]:
            with self.subTest(behavior, **fields):
                self.check_draws(behavior, fields)

    def check_draws(self, behavior, fields):
        """Check the active rules of 59 requests against their draws.

        A rule is added at request 20 and removed at request 27. Each is in the middle of a
        block of 8 requests that are drawn together.
        """
        rule_set = self.rule_set(behavior)
        for rule in rule_set.installed:
            for name, value in fields.items():
                setattr(rule, name, value)
        connection, (added_rule,) = 3, rules_from("30:abort")
        chain = vaurien.Chain(rule_set, connection)
        for request in range(1, 60):
            if request == 20:
                rule_set.install(rule_set.installed + [added_rule])
                chain.rules_changed([added_rule])
            if request == 27:
                rule_set.install(rule_set.installed[:-1])
                chain.rules_changed([])
            chain.begin_request()
            batch, index = divmod(request, 8)
            draw = rule_set.draw_batch("behavior", connection, batch)[index]
            percent = 100 * draw / 2 ** 64
            self.assertEqual([active_rule.rule for active_rule in chain.active_rules],
                             [rule for rule in rule_set.installed
                              if rule.draw_min <= percent < rule.draw_max
                              and rule.drawn_count > rule.after], request)
            self.assertEqual([active_rule.request for active_rule in chain.active_rules],
                             [active_rule.rule.drawn_count for active_rule in chain.active_rules])
            self.assertEqual([rule.drawn_count for rule in rule_set.installed],
                             [request - 19 if rule is added_rule else request
                              for rule in rule_set.installed])

    def test_a_rule_that_has_changed_is_drawn_again(self):
        rule_set = self.rule_set("0:delay")
        chain = vaurien.Chain(rule_set, 1)
        for _ in range(9):
            chain.begin_request()
        rule_set.installed[0].set_draw_max(100.0)
        chain.rules_changed([], rule_set.installed)
        chain.begin_request()
        self.assertEqual([active_rule.rule for active_rule in chain.active_rules],
                         rule_set.installed)

    def test_another_seed_and_another_proxy_give_other_draws(self):
        handlers = self.draw_requests(self.rule_set("20:delay"))
        for arguments in {"seed": 2}, {"name": "other"}:
            with self.subTest(**arguments):
                rule_set = self.rule_set("20:delay", **arguments)
                self.assertNotEqual(self.draw_requests(rule_set), handlers)

    def test_rules_with_different_draw_keys_are_drawn_independently(self):
        rule_set = rule_set_of(vaurien.Rule("delay", draw_min=0, draw_max=50, draw_key="a"),
                               vaurien.Rule("hang", draw_min=0, draw_max=50, draw_key="b"))
        combinations = set()
        for connection in range(100):
            chain = vaurien.Chain(rule_set, connection)
            chain.begin_request()
            combinations.add(tuple(active_rule.rule.name for active_rule in chain.active_rules))
        self.assertEqual(combinations, {(), ("delay",), ("hang",), ("delay", "hang")})

    def test_a_rule_per_connection_is_drawn_once_for_each(self):
        rule_set = rule_set_of(vaurien.Rule("delay", draw_min=0, draw_max=50, per="connection"))
        for connection in range(50):
            with self.subTest(connection=connection):
                chain = vaurien.Chain(rule_set, connection)
                chain.begin_request()
                first_active = list(chain.active_rules)
                for _ in range(5):
                    chain.begin_request()
                    self.assertEqual(list(chain.active_rules), first_active)

    def test_str_of_a_rule_is_its_description_in_the_log(self):
        self.assertEqual(str(vaurien.Rule("delay", {"sleep": 2.0})), "delay sleep=2.0")
        self.assertEqual(str(vaurien.Rule("delay", {"before": False})),
                         "delay sleep=1.0 before=no")
        self.assertEqual(str(vaurien.Rule("hang")), "hang")


class FakeConnection:
    """A connection of a proxy without sockets: a Chain, and the data that its rules hold."""

    def __init__(self, proxy, number=1):
        self.chain = vaurien.Chain(proxy.rules, number)
        self.chain.start()
        self.released, self.opened = [], []     # rules, in the order of the changes

    def rules_changed(self, new, removed, changed, woken=()):
        self.opened += [*new, *changed, *self.chain.rules_changed(new, changed, woken)]
        self.released += removed

    def acting(self):
        """Return the names of the handlers that act on the current request."""
        return [active.rule.name for active in self.chain.active_rules if active.acts]

    def next_request(self):
        """Begin a request. Returns the names of the handlers that act on it."""
        self.chain.direction_changed(DOWNSTREAM)
        self.chain.direction_changed(UPSTREAM)
        return self.acting()

    def close(self, reason):
        pass


class TestSchedules(unittest.TestCase):
    """The fields start, duration, every, ramp, ttl and of. The clock is simulated."""

    def proxy(self, *rules, toxics=(), **arguments):
        """Return a ProxyServer in a SimulatedLoop, with a behavior of these tables."""
        proxy = vaurien.ProxyServer(("127.0.0.1", 9), ("127.0.0.1", 8), list(rules), seed=1,
                                    toxics=list(toxics), **arguments)
        proxy.open(SimulatedLoop())
        return proxy

    def connected(self, proxy):
        """Return a FakeConnection of a proxy."""
        connection = proxy.connections[1] = FakeConnection(proxy)
        return connection

    def changes(self, proxy):
        return [(record.handler, record.change) for record in proxy.fault_records]

    def test_moments_of_a_schedule(self):
        for fields, moments in [
                ({}, [(0, True, 1, NEVER, NEVER)]),
                ({"start": 5}, [(0, False, 0, 5, 5), (4.9, False, 0, 5, 5),
                                (5, True, 1, NEVER, NEVER)]),
                ({"duration": 3}, [(0, True, 1, 3, 3), (2.9, True, 1, 3, 3),
                                   (3, False, 0, NEVER, NEVER)]),
                ({"start": 5, "duration": 3}, [(4, False, 0, 5, 5), (5, True, 1, 8, 8),
                                               (8, False, 0, NEVER, NEVER)]),
                ({"start": 5, "duration": 3, "every": 10},
                 [(4, False, 0, 5, 5), (7, True, 1, 8, 8), (8, False, 0, 15, 15),
                  (15, True, 1, 18, 18), (18, False, 0, 25, 25), (1016, True, 1, 1018, 1018)]),
                ({"duration": 2, "every": 2}, [(0, True, 1, NEVER, NEVER),
                                               (2, True, 1, NEVER, NEVER)]),
                ({"ramp": 10}, [(0, True, 0, NEVER, 0.1), (2.5, True, 0.25, NEVER, 2.6),
                                (9.9, True, 0.99, NEVER, 10), (10, True, 1, NEVER, NEVER)]),
                ({"start": 5, "duration": 4, "every": 4, "ramp": 4},
                 [(7, True, 0.5, 9, 7.04), (9, True, 0, 13, 9.04), (11, True, 0.5, 13, 11.04)]),
                ({"duration": 5, "ramp": 10}, [(4.95, True, 0.49, 5, 5), (5, False, 0, NEVER,
                                                                         NEVER)]),
                ({"ramp": 0.03}, [(0, True, 0, NEVER, 0.01), (0.02, True, 2 / 3, NEVER, 0.03)]),
                ({"ramp": 0.001}, [(0, True, 0, NEVER, 0.001), (0.001, True, 1, NEVER, NEVER)]),
                ({"ttl": 7}, [(0, True, 1, NEVER, NEVER), (99, True, 1, NEVER, NEVER)])]:
            for since in 0, 1e6 + 1 / 3:
                schedule = vaurien.Scheduled(**fields)
                schedule.begin_schedule(since)
                for t, active, *numbers in moments:
                    with self.subTest(since=since, t=t, **fields):
                        moment = schedule.moment_at(since + t)
                        self.assertEqual(moment.active, active)
                        numbers[1:] = [since + number for number in numbers[1:]]
                        for found, number in zip(moment[1:], numbers):
                            self.assertTrue(found == number or abs(found - number) < 1e-6,
                                            moment)

    def test_the_moment_of_each_change_differs_from_the_moment_before(self):
        """Otherwise a timer for next_change would be set again and again, for the same time."""
        rng = random.Random(5)
        for _ in range(300):
            every = rng.choice([1 / 3, 0.1, 0.7, 3])
            schedule = vaurien.Scheduled(start=rng.choice([0, 0.1, 1 / 7]), every=every,
                                        duration=every * rng.choice([0.1, 1 / 3, 0.9, 1]),
                                        ramp=rng.choice([0, 0, 0.05]))
            now = rng.random() * 10 ** rng.randint(0, 9)
            schedule.begin_schedule(now)
            moment = schedule.moment_at(now)
            for _ in range(50):
                if moment.next_change == NEVER:
                    break
                self.assertGreater(moment.next_change, now)
                now, before = moment.next_change, moment
                moment = schedule.moment_at(now)
                self.assertNotEqual(moment, before)

    def test_times_are_numbers_of_seconds_or_texts_with_a_unit(self):
        for value, seconds in [(0, 0), (1.5, 1.5), ("2", 2), ("90s", 90), ("5m", 300),
                               ("1h", 3600), ("500ms", 0.5), ("1.5 m", 90), ("0s", 0),
                               ("1e3", 1000)]:
            with self.subTest(value):
                self.assertEqual(vaurien.check_seconds(value), seconds)
        for value in [-1, "-1s", "x", "", "s", "5d", "5 min", "nan", "inf", math.inf, math.nan,
                      True, None, [], {}, "0.5ms", 1e-9, 1e10, 10 ** 400, "1e999h", "5mm",
                      "5m s", "1_0", "1_0s", "\uff11"]:
            with self.subTest(value), self.assertRaisesRegex(
                    ValueError, "must be 0, or a time from 1ms to 1e9s, like 90, 90s, 5m, 1h or "
                                "500ms, not "):
                vaurien.check_seconds(value)

    def test_fields_that_do_not_fit_together_are_refused(self):
        for fields, sentence in [
                ({"every": 5}, "every needs duration: the seconds of each window"),
                ({"every": 5, "duration": 6},
                 "every must be at least the duration of 6 seconds, not 5"),
                ({"of": 5}, "of needs times, from 1 to 5: of=5 times=1 acts on one of 5 requests"),
                ({"of": 5, "times": 6}, "of needs times, from 1 to 5: of=5 times=1 acts on one "
                                        "of 5 requests"),
                ({"start": "soon"}, "start must be 0, or a time from 1ms to 1e9s, like 90, 90s, "
                                    "5m, 1h or 500ms, not 'soon'")]:
            with self.subTest(**fields):
                with self.assertRaises(vaurien.InputError) as caught:
                    vaurien.read_rules([dict(fields, name="delay")])
                self.assertEqual(str(caught.exception), sentence)
                with self.assertRaises(vaurien.InputError) as caught:
                    vaurien.make_toxic("delay", "d", fields, {})
                self.assertEqual(str(caught.exception), sentence)
        self.assertTrue(vaurien.read_rules([{"name": "delay", "every": 5, "duration": 5}]))

    def test_a_rule_acts_in_its_windows_only(self):
        for per in "request", "connection":
            with self.subTest(per):
                proxy = self.proxy({"name": "delay", "per": per, "start": 5, "duration": 3,
                                    "every": 10})
                connection, acted = self.connected(proxy), []
                for second in range(20):
                    if connection.next_request():
                        acted.append(second)
                    proxy.loop.advance(1)
                self.assertEqual(acted, [5, 6, 7, 15, 16, 17])
                self.assertEqual(self.changes(proxy), [("delay", "begins"), ("delay", "ends")] * 2)
                self.assertEqual([record[3:6] for record in proxy.fault_records], [(0, "", 0)] * 4)
                self.assertEqual(proxy.faults, {})

    def test_the_end_of_a_window_ends_the_fault_of_the_current_request(self):
        proxy = self.proxy({"name": "hang", "duration": 3}, {"name": "hang", "percent": 0})
        connection, rule = self.connected(proxy), proxy.behavior[0]
        self.assertEqual(self.changes(proxy), [("hang", "begins")])
        self.assertEqual(connection.next_request(), ["hang"])
        proxy.loop.advance(2.9)
        self.assertEqual((connection.acting(), connection.released), (["hang"], []))
        proxy.loop.advance(0.1)
        self.assertEqual((connection.acting(), connection.released), ([], [rule]))

    def test_a_window_begins_on_open_connections(self):
        """A per-connection rule begins at once. Another one waits for the next request."""
        for per, last_direction, acting in [("connection", DOWNSTREAM, ["delay"]),
                                            ("connection", None, ["delay"]),
                                            ("request", DOWNSTREAM, []),
                                            ("request", None, ["delay"])]:
            with self.subTest(per, last_direction=last_direction):
                proxy = self.proxy({"name": "delay", "per": per, "start": 5})
                connection = self.connected(proxy)
                connection.chain.last_direction = last_direction
                proxy.loop.advance(5)
                self.assertEqual(connection.acting(), acting)
                self.assertEqual(connection.opened,
                                 proxy.behavior if per == "connection" else [])
                self.assertEqual(proxy.behavior[0].drawn_count, 1)      # not drawn again

    def test_draws_do_not_depend_on_the_schedule(self):
        fields = {"name": "delay", "percent": 50, "after": 3, "times": 2, "of": 3}
        for per in "request", "connection":
            expected, found = [], []
            for schedule, acted in ({}, expected), ({"start": 40, "duration": 20, "every": 30},
                                                    found):
                proxy = self.proxy(dict(fields, per=per, **schedule))
                for second in range(100):
                    connection = FakeConnection(proxy, second // 2)
                    acted += [(second, request) for request in range(5)
                              if connection.next_request()]
                    proxy.loop.advance(1)
            self.assertEqual(found, [act for act in expected if 40 <= act[0] < 60
                                     or 70 <= act[0] < 90], per)
            self.assertGreater(len(found), 10)

    def test_a_ramp_lets_the_percentage_rise(self):
        proxy = self.proxy({"name": "delay", "percent": 80, "ramp": 100}, {"name": "hang",
                                                                        "percent": 20})
        acted = []
        for second in range(101):
            names = [name for number in range(400)
                     for name in FakeConnection(proxy, number).acting()]
            acted.append(names.count("delay"))
            self.assertLess(abs(names.count("delay") / 400 - 0.8 * second / 100), 0.06)
            self.assertLess(abs(names.count("hang") / 400 - 0.2), 0.06)
            proxy.loop.advance(1)
        self.assertEqual(acted, sorted(acted))
        self.assertEqual(proxy.loop.timers, [])

    def test_a_ramp_reaches_open_connections(self):
        """A connection begins to act when the percentage reaches the number drawn for it."""
        proxy = self.proxy({"name": "delay", "per": "connection", "ramp": 100})
        connections = [FakeConnection(proxy, number) for number in range(200)]
        proxy.connections = dict(enumerate(connections))
        for _ in range(101):
            self.assertEqual(
                [connection.acting() for connection in connections],
                [FakeConnection(proxy, number).acting() for number in range(200)])
            proxy.loop.advance(1)
        for connection in connections:
            self.assertEqual((connection.acting(), connection.opened, connection.released),
                             (["delay"], proxy.behavior, []))

    def test_a_ramp_does_not_disturb_a_rule_that_acts_already(self):
        proxy = self.proxy({"name": "delay", "ramp": 1})
        connection, states = self.connected(proxy), []
        for _ in range(110):
            proxy.loop.advance(0.01)
            states += connection.chain.active_rules
        self.assertGreater(len(states), 10)
        self.assertTrue(all(state is states[0] for state in states))

    def test_each_window_begins_with_an_empty_state(self):
        proxy = self.proxy({"name": "delay", "per": "connection", "duration": 3, "every": 5})
        connection, counts = self.connected(proxy), []
        for _ in range(11):
            for state in connection.chain.active_rules:
                state["seconds"] += 1
                counts.append(state["seconds"])
            proxy.loop.advance(1)
        self.assertEqual(counts, [1, 2, 3, 1, 2, 3, 1])

    def test_the_requests_that_after_times_and_of_select(self):
        for fields, selected in [({}, [1, 2, 3, 4, 5, 6, 7]), ({"after": 2}, [3, 4, 5, 6, 7]),
                                 ({"times": 2}, [1, 2, 3, 4, 5, 6, 7]),     # counts other requests
                                 ({"times": 1, "of": 3}, [1, 4, 7]),
                                 ({"times": 2, "of": 2}, [1, 2, 3, 4, 5, 6, 7]),
                                 ({"times": 2, "of": 3, "after": 1}, [2, 3, 5, 6])]:
            with self.subTest(**fields):
                rule, = vaurien.read_rules([dict(fields, name="delay")])
                self.assertEqual([count for count in range(1, 8) if rule.selects(count)],
                                 selected)

    def test_times_of_acts_on_the_first_requests_of_each_group(self):
        proxy = self.proxy({"name": "delay", "after": 1, "times": 3, "of": 5})
        connection = self.connected(proxy)
        self.assertEqual([bool(connection.next_request()) for _ in range(12)],
                         [True, True, True, False, False] * 2 + [True, True])

    def test_a_rule_is_removed_at_the_end_of_its_ttl(self):
        toxic = vaurien.make_toxic("latency", "slow", {"ttl": 7}, {"latency": 100})
        proxy = self.proxy({"name": "delay", "percent": 20, "ttl": "5s"},
                           {"name": "hang", "percent": 30}, toxics=[toxic])
        connection = self.connected(proxy)
        proxy.loop.advance(1)
        number = proxy.begin_block(vaurien.read_rules([{"name": "error", "ttl": 2}]), only=True)
        proxy.loop.advance(1.9)
        self.assertEqual(proxy.handler_names(), "error")
        proxy.loop.advance(0.1)
        self.assertEqual(proxy.handler_names(), "delay,hang")
        proxy.end_block(number)                 # has no effect
        proxy.loop.advance(2)
        self.assertEqual(proxy.describe(), "30:hang, 70:dummy, " + str(toxic))
        self.assertEqual((proxy.behavior[0].draw_min, proxy.behavior[0].draw_max), (20, 50))
        proxy.loop.advance(2)
        self.assertEqual((proxy.describe(), proxy.loop.timers), ("30:hang, 70:dummy", []))
        self.assertEqual(self.changes(proxy), [("error", "expires"), ("delay", "expires"),
                                               ("latency", "expires")])
        self.assertEqual(connection.released[-1], toxic.rule)
        self.assertEqual([record.toxic for record in proxy.fault_records], [None, None, "slow"])

    def test_each_update_restarts_the_ttl_but_not_the_windows(self):
        def toxic(latency):
            return vaurien.make_toxic("latency", "slow", {"start": 3, "duration": 9, "ttl": 10},
                                      {"latency": latency})

        proxy, first = self.proxy(toxics=[toxic(1)]), []
        for latency in 1, 2, 2:
            proxy.loop.advance(8)
            first += [proxy.toxics[0].rule.moment.active]
            proxy.set_toxics([toxic(latency)])
        proxy.set_toxics([*proxy.toxics, vaurien.make_toxic("noop", "n", {}, {})])     # no update
        self.assertEqual(first, [True, False, False])
        proxy.loop.advance(9.9)
        self.assertEqual(len(proxy.toxics), 2)
        proxy.loop.advance(0.1)
        self.assertEqual([toxic.name for toxic in proxy.toxics], ["n"])

    def test_no_timer_is_left_behind(self):
        fields = {"name": "delay", "start": 5, "duration": 3, "every": 10, "ttl": 1000}
        toxic = vaurien.make_toxic("latency", "slow", {"ramp": 100, "ttl": 10}, {})
        for end in (lambda proxy: proxy.replace_rules([], {}, []), lambda proxy: proxy.close()):
            proxy = self.proxy(fields, toxics=[toxic])
            proxy.loop.advance(6)
            self.assertEqual(len(proxy.loop.timers), 1)
            proxy.set_rules(vaurien.read_rules([fields]))
            self.assertEqual(len(proxy.loop.timers), 1)
            end(proxy)
            self.assertEqual(proxy.loop.timers, [])

    def test_a_sleeping_rule_needs_no_wakeups(self):
        proxy = self.proxy({"name": "delay", "start": 3600, "duration": 60})
        with mock.patch.object(proxy, "update_moment", side_effect=proxy.update_moment) as update:
            for until, count in (3599, 0), (3600, 1), (3659, 1), (3660, 2), (1e6, 2):
                proxy.loop.advance(until - proxy.loop.now)
                self.assertEqual(update.call_count, count)

    def test_a_proxy_that_opens_again_begins_all_times_anew(self):
        proxy = self.proxy({"name": "delay", "start": 5})
        proxy.loop.advance(6)
        self.assertEqual(self.connected(proxy).acting(), ["delay"])
        proxy.close()
        proxy.open(SimulatedLoop())
        self.assertEqual(self.connected(proxy).acting(), [])
        proxy.loop.advance(5)
        self.assertEqual(self.connected(proxy).acting(), ["delay"])

    def test_held_data_goes_on_at_the_end_of_the_window(self):
        for protocol, question in ("tcp", b"question"), ("redis", b"+PING\r\n"):
            for type_ in "handler", "toxic":
                for duration in 0.1, 10:
                    with self.subTest(protocol, type=type_), \
                            running_proxy(echo, protocol=protocol) as proxy, \
                            connected_client(proxy) as sock:
                        began = time.monotonic()
                        with getattr(proxy, type_)("hang", duration=duration) as fault:
                            self.assertEqual(send_and_read(sock, question), question)
                            if not fault.count and duration == 0.1:
                                continue    # a busy machine: the window was over
                            self.assertGreaterEqual(time.monotonic() - began, duration)
                            self.assertEqual(send_and_read(sock, question), question)
                        self.assertEqual((fault.count, len(proxy.events())), (1, 3))
                        with self.assertRaises(TimeoutError):   # the other records do not count
                            proxy.wait_for("hang", timeout=0, since=proxy.events()[1].number)
                        break

    def test_a_window_reaches_an_open_connection_that_is_idle(self):
        with running_proxy(echo) as proxy, connected_client(proxy) as sock:
            send_and_read(sock, b"question")
            began = time.monotonic()
            proxy.add_toxic("timeout", timeout=1, start="50ms")
            self.assertEqual(read_until_close(sock), EMPTY_EOF)
            self.assertGreaterEqual(time.monotonic() - began, 0.05)

    def test_a_ttl_of_a_client_heals_the_proxy(self):
        with proxy_with_control() as (proxy, client), connected_client(proxy) as sock:
            began = time.monotonic()
            client.handler("hang", ttl=0.1).__enter__()         # and the test crashes
            client.add_toxic("hang", ttl="0.1s")
            self.assertEqual(send_and_read(sock, b"question"), b"question")
            self.assertGreaterEqual(time.monotonic() - began, 0.1)
            wait_until(lambda: client.describe() == "100:dummy")
            self.assertEqual(sum(record.change == "expires" for record in client.events()), 2)


class TestMatch(unittest.TestCase):
    """Rules with a regular expression act only on requests that match it."""

    def process_requests(self, chain, *requests):
        """Run requests through a chain; return for each one whether a hang acts on it."""
        hangs = []
        for request in requests:
            chain.direction_changed(UPSTREAM)
            hangs.append(process_event(chain, 0, UPSTREAM, request).t == NEVER)
            chain.direction_changed(DOWNSTREAM)
        return hangs

    def test_a_rule_acts_from_the_bytes_that_complete_the_match(self):
        chain = chain_of(vaurien.Rule("hang", match=vaurien.check_match("GET /cart")))
        self.assertEqual(process_event(chain, 0, UPSTREAM, OPEN).t, 0)
        self.assertEqual(process_event(chain, 0, UPSTREAM, b"GET /").t, 0)
        self.assertEqual(process_event(chain, 1, UPSTREAM, b"cart HTTP/1.1").t, NEVER)
        self.assertEqual(process_event(chain, 1, DOWNSTREAM, b"a").t, NEVER)

    def test_a_match_does_not_span_two_requests(self):
        chain = chain_of(vaurien.Rule("hang", match=vaurien.check_match("ab")))
        self.assertEqual(self.process_requests(chain, b"a", b"b", b"ab", b"xx"),
                         [False, False, True, False])

    def test_after_and_times_count_the_requests_that_match(self):
        rule = vaurien.Rule("hang", match=vaurien.check_match("hit"), after=1, times=2)
        self.assertEqual(
            self.process_requests(chain_of(rule),
                                  b"miss", b"hit", b"miss", b"hit", b"hit", b"hit"),
            [False, False, False, True, True, False])

    def test_a_rule_per_connection_that_is_changed_still_waits_for_its_match(self):
        rule = matching_rule("hang", b"x", per="connection")
        rule_set = rule_set_of(rule)
        for connection in 1, 2:         # the rule has been drawn already for the second one
            chain = vaurien.Chain(rule_set, connection)
            chain.begin_request()
            self.assertEqual(chain.rules_changed([], [rule]), [])
            self.assertEqual(process_event(chain, 0, UPSTREAM, b"a").t, 0)
            self.assertEqual(process_event(chain, 0, UPSTREAM, b"x").t, NEVER)

    def test_a_rule_per_connection_acts_from_the_first_request_that_matches(self):
        rule = vaurien.Rule("hang", match=vaurien.check_match("^hit"), per="connection")
        self.assertEqual(self.process_requests(chain_of(rule), b"mi", b"hit", b"miss"),
                         [False, True, True])

    def test_the_percentage_applies_to_the_requests_that_match(self):
        rule_set = rule_set_of(vaurien.Rule("hang", draw_max=30, match=vaurien.check_match("hit")))
        hang_count = 0
        for connection in range(300):
            chain = vaurien.Chain(rule_set, connection)
            chain.begin_request()
            hang_count += process_event(chain, 0, UPSTREAM, b"hit").t == NEVER
        self.assertTrue(60 < hang_count < 120, hang_count)

    def test_only_the_first_bytes_of_a_long_request_are_searched(self):
        chain = chain_of(vaurien.Rule("hang", match=vaurien.check_match("hit")))
        chain.process(0, UPSTREAM, bytes(vaurien.MATCH_MAX))
        self.assertEqual(process_event(chain, 0, UPSTREAM, b"hit").t, 0)

    def test_bad_expressions_are_refused(self):
        for text in "(", "", 5, None, "a{99999999999}", "\ud800", "(?P<a>x)(?P<a>y)":
            with self.subTest(text=text):
                with self.assertRaisesRegex(ValueError, "must be a regular expression"):
                    vaurien.check_match(text)
        expression = vaurien.check_match("^SELECT .* FROM carts")
        self.assertTrue(expression.search(b"SELECT 1 FROM carts"))

    def test_a_rule_of_a_running_proxy_can_have_an_expression(self):
        with running_proxy(echo) as proxy, connected_client(proxy) as sock:
            with proxy.handler("hang", match="^slow"):
                send_and_read(sock, b"quick")
                sock.sendall(b"slow")
                proxy.wait_for("hang")
            self.assertEqual(read_exactly(sock, 4), b"slow")


class TestChain(unittest.TestCase):
    """Events pass through all active rules, in the order of the rules."""

    def test_a_rule_at_its_limit_acts_on_the_rest_of_a_request(self):
        chain, times = chain_of(vaurien.Rule("delay", {"sleep": 1}, times=1)), []
        for direction in [UPSTREAM, DOWNSTREAM, UPSTREAM]:
            chain.direction_changed(direction)
            times += [process_event(chain, 5, UPSTREAM, b"a").t for _ in range(2)]
        self.assertEqual(times, [6, 6, 6, 6, 5, 5])

    def test_each_rule_gets_the_events_that_the_previous_one_yielded(self):
        one = vaurien.Rule("delay", {"sleep": 1.0}, draw_key="a")
        two = vaurien.Rule("delay", {"sleep": 2.0}, draw_key="b")
        self.assertEqual(chain_of(one, two).process(0, UPSTREAM, b"q"),
                         [(3.0, UPSTREAM, b"q", ((one, 1.0, False), (two, 2.0, False)))])

    def test_only_rules_that_do_nothing_else_are_delaying_rules(self):
        def latency(milliseconds, per="connection", **fields):
            return vaurien.Rule("latency", {"latency": milliseconds}, per=per,
                                draw_key=str(milliseconds), **fields)

        def bandwidth(**options):
            return vaurien.Rule("bandwidth", options, per="connection", draw_key="bandwidth")

        slicer = vaurien.Rule("slicer", {"average_size": 2}, per="connection")
        for rules, indexes in [([latency(1)], [0]),
                               ([latency(1), latency(2)], [0, 1]),
                               ([latency(1), bandwidth(rate=1)], [0, 1]),
                               ([latency(1), latency(2, stream=UPSTREAM)], [0]),
                               ([latency(1, stream=UPSTREAM)], []),     # replies pass
                               ([latency(1), latency(0)], None),        # latency 0 never acts
                               ([latency(1), bandwidth(rate=0)], None),
                               ([latency(1), bandwidth(rate=1, shared=True)], None),
                               ([latency(1), slicer], None),
                               ([latency(1), latency(2, match=re.compile(b"x"))], None),
                               ([latency(1, "request")], None)]:    # another request may have none
            with self.subTest(list(map(str, rules))):
                chain = chain_of(*rules)
                self.assertIsNone(chain.delaying_rules(DOWNSTREAM))      # no rule has acted yet
                chain.process(0, UPSTREAM, b"request")
                chain.process(0, DOWNSTREAM, b"reply")
                delaying = chain.delaying_rules(DOWNSTREAM)
                self.assertEqual(delaying and [active.rule for active in delaying],
                                 indexes and [rules[index] for index in indexes])

    def test_a_rule_does_not_get_events_of_the_other_stream(self):
        chain = chain_of(vaurien.Rule("hang", stream=DOWNSTREAM))
        self.assertEqual(chain.process(0, UPSTREAM, b"q"), [(0, UPSTREAM, b"q", ())])
        self.assertEqual(process_event(chain, 0, DOWNSTREAM, b"a").t, NEVER)

    def test_a_handler_of_one_direction_gets_events_of_this_direction_only(self):
        for options, stream, direction in [({}, "both", UPSTREAM),
                                           ({"before": False}, "both", DOWNSTREAM),
                                           ({}, DOWNSTREAM, DOWNSTREAM),
                                           ({"before": False}, UPSTREAM, UPSTREAM)]:
            with self.subTest(stream=stream, **options):
                chain = chain_of(vaurien.Rule("delay", options, stream=stream))
                for to in UPSTREAM, DOWNSTREAM:
                    passed = chain.pass_through(to, b"x")
                    self.assertEqual(passed, None if to == direction else b"x")
                for to in UPSTREAM, DOWNSTREAM:
                    due = process_event(chain, 3, to, b"x").t
                    self.assertEqual(due, 4 if to == direction else 3)

    def test_a_handler_of_both_directions_gets_replies_too(self):
        self.assertIsNone(chain_of(vaurien.Rule("hang")).pass_through(DOWNSTREAM, b"x"))

    def test_a_rule_of_the_replies_gets_a_request_that_must_be_searched(self):
        rule = vaurien.Rule("delay", {"before": False}, match=re.compile(b"x"))
        self.assertIsNone(chain_of(rule).pass_through(UPSTREAM, b"x"))

    def test_an_option_may_change_the_direction_of_a_rule(self):
        toxic = vaurien.Toxic("delay", "d", stream="both")
        self.assertEqual(toxic.rule.directions, (UPSTREAM,))
        toxic.update(1.0, {"before": False})
        self.assertEqual(toxic.rule.directions, (DOWNSTREAM,))

    def test_a_fault_is_recorded_once_and_only_when_it_changes_an_event(self):
        chain = chain_of(vaurien.Rule("error", {"warmup": 1}))
        chain.process(0, UPSTREAM, b"q")
        chain.process(0, DOWNSTREAM, b"a")
        self.assertEqual(chain.newly_acted, [])
        chain.begin_request()
        for event in (0, UPSTREAM, b"q"), (0, DOWNSTREAM, b"a"), (0, DOWNSTREAM, b"b"):
            chain.process(*event)
        self.assertEqual([(active.rule.name, request) for active, request, _ in chain.newly_acted],
                         [("error", 2)])

    def test_a_bug_in_a_handler_resets_the_connection_and_is_logged_with_its_name(self):
        def returns_none(state, t, to, data):
            return None

        def yields_no_direction(state, t, to, data):
            yield t, "sideways", data

        def yields_no_bytes(state, t, to, data):
            yield t, to, "text"

        def raises(state, t, to, data):
            raise KeyError("x")
            yield

        for function in returns_none, yields_no_direction, yields_no_bytes, raises:
            name = function.__name__
            with self.subTest(name):
                with registered(function), self.assertLogs("vaurien", "ERROR") as logged:
                    chain = chain_of(vaurien.Rule(name), vaurien.Rule("hang", draw_key="b"))
                    self.assertEqual(chain.process(3, UPSTREAM, b"q"), [(3, UPSTREAM, RESET, ())])
                self.assertIn("handler %s failed" % name, logged.output[0])

    def test_the_error_for_a_handler_says_what_it_must_yield(self):
        def returns_none(state, t, to, data):
            return None

        def yields_two(state, t, to, data):
            yield to, data

        def yields_no_time(state, t, to, data):
            yield "soon", to, data

        for function, text in (
                (returns_none, "not return None"),
                (yields_two, "a handler must yield (t, to, data), not ('upstream', b'q')"),
                (yields_no_time, "must yield (t, to, data), not ('soon', 'upstream', b'q')")):
            with self.subTest(function.__name__), registered(function), \
                    self.assertLogs("vaurien", "ERROR") as logged:
                chain_of(vaurien.Rule(function.__name__)).process(3, UPSTREAM, b"q")
            self.assertIn("TypeError: a handler must yield (t, to, data)", logged.output[0])
            self.assertIn(text, logged.output[0])

    def test_a_handler_that_blocks_the_loop_is_logged_once(self):
        def sleeps(state, t, to, data):
            clock.return_value += 0.7           # as with time.sleep(0.7)
            yield t, to, data

        with registered(sleeps), mock.patch.object(vaurien.time, "perf_counter") as clock, \
                self.assertLogs("vaurien", "WARNING") as logged:
            clock.return_value = 0.0
            chain = chain_of(vaurien.Rule("sleeps"))
            chain.process(3, UPSTREAM, b"q")
            chain.process(3, UPSTREAM, b"q")
        line, = logged.output
        self.assertIn("handler sleeps took 0.7 s for one event", line)

    def test_a_handler_that_raises_any_exception_resets_only_its_connection(self):
        """An exception that is no Exception ended the loop, and so all connections."""
        class Odd(BaseException):
            def __str__(self):
                raise self

        def fails(state, t, to, data):
            if data:
                raise exception
            yield t, to, data

        # pytest.fail and asyncio.CancelledError derive from BaseException, too.
        with registered(fails), running_proxy(echo) as proxy, connected_client(proxy) as other:
            for exception in KeyboardInterrupt(), SystemExit(3), GeneratorExit(), Odd():
                name = type(exception).__name__
                with self.subTest(name), connected_client(proxy) as sock:
                    with self.assertLogs("vaurien", "ERROR") as logged, proxy.handler("fails"):
                        sock.sendall(b"x")
                        self.assertEqual(read_until_close(sock).ending, "reset")
                    self.assertIn("handler fails failed", logged.output[0])
                    self.assertIn(name, logged.output[0])
                    send_and_read(other, b"question")

    def test_a_handler_may_return_a_list_and_an_earlier_time_means_now(self):
        def early(state, t, to, data):
            return [(t - 5, to, data), (math.nan, to, b"x")]        # NaN means now, too

        with registered(early):
            chain = chain_of(vaurien.Rule("early"))
            self.assertEqual(chain.process(3, UPSTREAM, b"q"),
                             [(3, UPSTREAM, b"q", ()), (3, UPSTREAM, b"x", ())])

    def test_a_handler_that_only_yields_an_earlier_time_has_changed_nothing(self):
        def early(state, t, to, data):
            yield 0, to, data

        with registered(early):
            chain = chain_of(vaurien.Rule("early"))
            self.assertEqual(chain.process(3, UPSTREAM, b"q"), [(3, UPSTREAM, b"q", ())])
            self.assertEqual((chain.newly_acted, chain.modified), ([], False))

    def test_a_request_begins_when_the_client_sends_after_the_backend_has_sent(self):
        with running_proxy(echo) as proxy, connected_client(proxy) as sock:
            for _ in range(3):
                send_and_read(sock, b"q")
            chain = next(iter(proxy.connections.values())).chain
            self.assertEqual(chain.request_count, 3)


# -- Delay queue ----------------------------------------------------------------


class TestDelayQueue(unittest.TestCase):
    """The queue of the chunks of one direction, each with its due time."""

    def setUp(self):
        self.budget = vaurien.Budget()
        self.queue = vaurien.DelayQueue(UPSTREAM, self.budget)

    def fill(self, queue, due):
        """Put as many bytes as possible into a queue at time 0, all with this due time."""
        def clock():
            return 0

        while queue.read_limit(clock) > 0:
            queue.put(due, bytes(queue.read_limit(clock)), 0)

    def test_a_queue_is_read_into_again_once_there_is_room_for_more_than_a_few_bytes(self):
        """Otherwise each small read becomes a piece of the slicer: half of average_size."""
        for total in vaurien.HELD_TOTAL, 0:         # also while only HELD_MIN is allowed
            with self.subTest(total=total):
                queue = vaurien.DelayQueue(UPSTREAM, vaurien.Budget(total))
                self.fill(queue, NEVER)
                read_sizes = []
                while queue.held > 100:
                    queue.credit(100)
                    read_sizes.append(queue.read_limit(lambda: 0))
                self.assertEqual(read_sizes[0], 0)
                smallest = min(size for size in read_sizes if size)
                allowance = queue.budget.allowance(vaurien.HELD_MAX_IDLE)
                self.assertGreaterEqual(smallest, min(vaurien.READ_MIN, allowance / 2))

    def test_bytes_keep_their_order_whatever_their_due_times(self):
        for due, data in (5, b"a"), (2, b"b"), (9, b"c"), (3, EOF):
            self.queue.put(due, data, 0)
        self.queue.pop_due(4, False)
        self.assertEqual(list(self.queue.send_buffer), [])
        self.queue.pop_due(5, False)
        self.assertEqual(list(self.queue.send_buffer), [b"a", b"b"])
        self.queue.pop_due(9, False)
        self.assertEqual(list(self.queue.send_buffer), [b"a", b"b", b"c", EOF])

    def test_chunks_that_are_due_are_joined_if_the_rules_permit_this(self):
        overhead = vaurien.CHUNK_OVERHEAD
        for joins, chunks in (False, [b"a", b"bc", EOF, b"d"]), (True, [b"abc", EOF, b"d"]):
            with self.subTest(joins=joins):
                queue = vaurien.DelayQueue(UPSTREAM, vaurien.Budget())
                for due, data in [(1, b"a"), (2, b"bc"), (2, EOF), (2, b"d"), (3, b"later")]:
                    queue.put(due, data, 0)
                self.assertEqual(queue.pop_due(2, joins), [])
                self.assertEqual(list(queue.send_buffer), chunks)
                self.assertEqual(queue.held, 9 + (len(chunks) + 1) * overhead)
                self.assertEqual(queue.budget.held, queue.held)

    def test_put_chunk_queues_bytes_like_put(self):
        delays = ((vaurien.Rule("latency"), 0.5, False),)
        results = []
        for name in "put", "put_chunk":
            queue = vaurien.DelayQueue(UPSTREAM, vaurien.Budget())
            for due, data in [(2, b"a"), (1, b"bc"), (3, b"d")]:
                getattr(queue, name)(due, data, due - 0.5, delays)
            results.append((queue.queue, queue.latest, queue.held, queue.budget.held))
        self.assertEqual(*results)

    def test_joined_chunks_have_a_limit(self):
        size = vaurien.JOINED_MAX // 4
        for _ in range(6):
            self.queue.put(1, bytes(size), 0)
        self.queue.pop_due(1, True)
        self.assertEqual(list(map(len, self.queue.send_buffer)), [4 * size, 2 * size])

    def test_replies_of_rules_stay_known_as_such_if_one_of_two_delays_is_undone(self):
        first, second = vaurien.Rule("delay"), vaurien.Rule("latency")
        self.queue.put(9, b"reply", 0, ((first, 4, False), (second, 5, False)))
        self.queue.has_replies = True
        self.assertTrue(self.queue.release([first]))
        self.assertTrue(self.queue.has_replies)
        self.queue.pop_due(5, False)
        self.queue.consume(len(b"reply"))
        self.assertFalse(self.queue.has_replies)

    def test_reset_overtakes_bytes(self):
        self.queue.put(9, b"a", 0)
        self.queue.put(3, RESET, 0)
        self.assertEqual(self.queue.pop_due(3, False), [RESET])

    def test_an_eof_that_is_due_later_does_not_delay_bytes(self):
        self.queue.put(9, EOF, 0)
        self.queue.put(3, b"a", 3)
        self.queue.pop_due(3, False)
        self.assertEqual(list(self.queue.send_buffer), [b"a"])

    def test_release_ends_the_delays_of_one_rule_and_keeps_the_other_delays(self):
        def delay(rule, seconds):
            """Return the entry of `delays` for a delay that does not result from OPEN."""
            return rule, seconds, False

        one, two, three = (vaurien.Rule("delay") for _ in range(3))
        self.queue.put(NEVER, b"a", 1, (delay(one, NEVER),))
        self.queue.put(2, b"b", 2)                   # delayed only by its position behind a
        self.queue.put(NEVER, b"c", 3, (delay(two, 4), delay(one, NEVER)))
        self.queue.put(NEVER, b"d", 4, (delay(three, NEVER),))
        self.queue.release([one])
        self.assertEqual(self.queue.pop_due(3.5, False), [])
        self.assertEqual(list(self.queue.send_buffer), [b"a", b"b"])
        self.queue.pop_due(7, False)
        self.assertEqual(list(self.queue.send_buffer), [b"a", b"b", b"c"])
        self.assertEqual(self.queue.next_time(NEVER), NEVER)
        self.queue.release([three])
        self.queue.pop_due(7, False)
        self.assertEqual(list(self.queue.send_buffer), [b"a", b"b", b"c", b"d"])

    def test_queued_bytes_are_counted_until_they_are_sent(self):
        overhead = vaurien.CHUNK_OVERHEAD
        self.queue.put(1, b"abc", 0)
        self.queue.put(9, b"def", 0)
        self.assertEqual(self.budget.held, 6 + 2 * overhead)
        self.queue.pop_due(1, False)
        self.queue.consume(1)
        first_chunk, = self.queue.send_buffer
        self.assertEqual((bytes(first_chunk), self.budget.held), (b"bc", 5 + 2 * overhead))
        self.queue.consume(2)
        self.assertEqual(self.budget.held, 3 + overhead)
        self.queue.close()
        self.assertEqual((self.budget.held, self.budget.queues), (0, 0))

    def test_a_queue_whose_socket_is_shut_down_takes_no_more_bytes(self):
        self.queue.write_closed = True
        self.queue.put(1, b"abc", 0)
        self.queue.put(1, RESET, 0)
        self.assertEqual((self.queue.pop_due(1, False), self.queue.held), ([RESET], 0))

    def test_a_queue_holds_fewer_bytes_if_they_are_never_due(self):
        for due, limit in (NEVER, vaurien.HELD_MAX_IDLE), (5, vaurien.HELD_MAX):
            with self.subTest(due=due):
                queue = vaurien.DelayQueue(UPSTREAM, vaurien.Budget())
                self.fill(queue, due)
                self.assertLessEqual(queue.held, limit)
                self.assertGreater(queue.held, limit // 2)

    def test_queues_share_a_budget_without_exceeding_it_and_each_may_hold_something(self):
        budget = vaurien.Budget(32 * 1024 * 1024)
        queues = [vaurien.DelayQueue(UPSTREAM, budget) for _ in range(4000)]
        for queue in queues:
            self.fill(queue, due=5)
            self.assertLessEqual(budget.held, budget.total)
            self.assertGreater(queue.held, 0)


class TestRateLimits(unittest.TestCase):
    """Reading stops if many bytes wait for a rate-limited link, but not if they are only late."""

    def test_latency_does_not_limit_the_bandwidth(self):
        queue = vaurien.DelayQueue(DOWNSTREAM, vaurien.Budget())
        chain = chain_of(vaurien.Rule("bandwidth", {"rate": 5000}, draw_key="a"),
                         vaurien.Rule("latency", {"latency": 1000}, draw_key="b"))
        for step in range(50):              # the data of one second at this rate
            now = step / 50
            self.assertGreater(queue.read_limit(lambda: now), 0)
            for t, _, data, delays in chain.process(now, DOWNSTREAM, bytes(100000)):
                queue.put(t, data, now, delays)
        self.assertGreater(queue.held, 4900000)

    def test_a_rate_limited_queue_permits_reading_again_as_time_passes(self):
        queue = vaurien.DelayQueue(DOWNSTREAM, vaurien.Budget())
        chain = chain_of(vaurien.Rule("bandwidth", {"rate": 1000}, draw_key="a"),
                         vaurien.Rule("latency", {"latency": 1000}, draw_key="b"))
        for t, _, data, delays in chain.process(0, DOWNSTREAM, bytes(500000)):
            queue.put(t, data, 0, delays)
        self.assertEqual(queue.read_limit(lambda: 0), 0)
        self.assertAlmostEqual(queue.next_time(0), 0.4)
        self.assertGreater(queue.read_limit(lambda: 0.41), 0)
        self.assertAlmostEqual(queue.next_time(0.41), 1.01)     # the first piece is due

    def test_bandwidth_alone_receives_little_at_once(self):
        """packet_loss needs whole segments, and slicer whole pieces."""
        bandwidth, slicer, latency = (
            vaurien.Rule(name, draw_key=name) for name in ("bandwidth", "slicer", "latency"))
        for rules, recv_size in [([bandwidth, latency], vaurien.READ_MIN),
                                 ([bandwidth, slicer], vaurien.CHUNK), ([slicer], vaurien.CHUNK),
                                 ([latency], vaurien.CHUNK), ([], vaurien.CHUNK)]:
            self.assertEqual(rule_set_of(*rules).recv_size, recv_size)

    def transfer(self, seed, rule, size):
        """Return the seconds that a transfer takes, and the seconds if the proxy holds all of it.

        Both are simulated. In the first case, the proxy reads as much as its delay queue permits.
        """
        queue = vaurien.DelayQueue(DOWNSTREAM, vaurien.Budget())
        chain, whole = (vaurien.Chain(rule_set_of(rule, seed=seed), 1) for _ in range(2))
        for each in chain, whole:
            each.begin_request()
            each.process_open(0.0, [DOWNSTREAM])
        now = 0.0
        while queue.buffered_out < size:
            limit = min(queue.read_limit(lambda: now), chain.recv_size(DOWNSTREAM))
            for t, _, data, delays in chain.process(now, DOWNSTREAM, bytes(limit)):
                queue.put(t, data, now, delays)
            if not limit:
                now = max(now, queue.next_time(now))
            queue.pop_due(now, False)
            while queue.send_buffer:
                queue.consume(len(queue.send_buffer[0]))
        return now, whole.process(0.0, DOWNSTREAM, bytes(size))[-1][0]

    def test_a_delay_queue_holds_enough_for_the_sender_of_a_network_with_losses(self):
        for profile, size in [("satellite", 1000000), ("very-bad", 100000)]:
            rule = vaurien.Rule("network", {"profile": profile}, per="connection")
            times = [self.transfer(seed, rule, size) for seed in range(6)]
            seconds, seconds_if_held = map(sum, zip(*times))
            with self.subTest(profile):
                self.assertLess(seconds, 1.25 * seconds_if_held)

    def shared_link(self, *before):
        """Return a function with which connections receive through one link of 1 KB/s.

        before    rules that act before it

        send(connection, now, size, request) lets the client send a request, and the backend
        reply at `now` with `size` bytes. It returns when the last byte of them arrives.
        """
        rule_set = rule_set_of(*before, vaurien.Rule(
            "bandwidth", {"rate": 1, "shared": True}, per="connection", draw_key="b",
            stream=DOWNSTREAM))
        chains = {}

        def send(connection, now, size, request=b"q"):
            if connection not in chains:
                chains[connection] = vaurien.Chain(rule_set, connection)
                chains[connection].begin_request()
                chains[connection].process_open(now, [DOWNSTREAM])
            chains[connection].process(now, UPSTREAM, request)
            return round(chains[connection].process(now, DOWNSTREAM, bytes(size))[-1][0], 6)

        return send

    def test_connections_share_a_link_first_come_first_served(self):
        send = self.shared_link()
        self.assertEqual([send(1, 0, 500), send(2, 0, 500), send(1, 0, 1000), send(3, 1.5, 100),
                          send(2, 10, 100)], [0.5, 1.0, 2.0, 2.1, 10.1])

    def test_chunks_that_other_rules_delay_block_no_other_connection_on_a_shared_link(self):
        send = self.shared_link(
            vaurien.Rule("latency", {"latency": 60000}, match=re.compile(b"slow")),
            vaurien.Rule("hang", match=re.compile(b"stuck"), draw_key="h"))
        self.assertEqual([send(1, 0, 100, b"slow"), send(2, 0, 100), send(3, 0, 100, b"stuck"),
                          send(4, 0, 100), send(1, 1, 100, b"slow")],
                         [60.1, 0.2, NEVER, 0.3, 61.1])

    def test_a_connection_that_closes_gives_its_time_on_a_shared_link_back(self):
        def serve(sock):
            while True:
                size = sock.recv(100)
                if not size:
                    return
                sock.sendall(bytes(int(size)))

        with running_proxy(serve) as proxy:
            proxy.add_toxic("bandwidth", rate=1, shared=True, stream="downstream")
            shared = proxy.toxics[0].rule.shared
            with connected_client(proxy) as closing, connected_client(proxy) as other:
                closing.sendall(b"100000")
                wait_until(lambda: shared[DOWNSTREAM] > proxy.loop.clock() + 5)
                closing.close()
                wait_until(lambda: len(proxy.connections) == 1)
                self.assertLess(shared[DOWNSTREAM], proxy.loop.clock() + 1)
                other.sendall(b"10")
                self.assertEqual(read_exactly(other, 10), bytes(10))

    def test_a_shared_link_is_idle_after_its_rate_has_changed(self):
        with running_proxy(echo) as proxy, connected_client(proxy) as sock:
            for rate in 0, 1000:
                proxy.loop.run_sync(proxy.set_toxics, [vaurien.Toxic(
                    "bandwidth", "b", attributes={"rate": rate, "shared": True})])
                if not rate:
                    sock.sendall(b"one")
                    proxy.wait_for("bandwidth")
            self.assertEqual(read_exactly(sock, 3), b"one")
            self.assertEqual(send_and_read(sock, b"two"), b"two")

    def test_a_rate_limit_behind_a_hang_is_idle_when_the_hang_is_removed(self):
        with running_proxy(echo) as proxy, connected_client(proxy) as sock:
            toxics = [
                vaurien.Toxic(kind, kind, attributes=attributes, stream="both")
                for kind, attributes in (("bandwidth", {"rate": 100000}),
                                         ("slicer", {"average_size": 3, "delay": 1}))]
            proxy.loop.run_sync(proxy.set_toxics, toxics)
            with proxy.handler("hang"):
                sock.sendall(b"one")
                proxy.wait_for("hang")
            self.assertEqual(read_exactly(sock, 3), b"one")
            send_and_read(sock, b"two")


# -- Loop -----------------------------------------------------------------------


class TestLoop(unittest.TestCase):
    """Timers, calls from other threads, and busy-polling."""

    class FakeEpoll:
        """A replacement for select.epoll, with a clock that each poll advances."""

        def __init__(self):
            self.now = 0.0          # seconds
            self.duration = 0.0     # seconds that each poll takes
            self.results = []       # the events of the next polls; later polls return no events
            self.timeouts = []      # the timeouts of the previous polls

        def poll(self, timeout, max_events):
            self.timeouts.append(timeout)
            self.now += self.duration
            return self.results.pop(0) if self.results else []

    @unittest.skipUnless(hasattr(select, "epoll"), "no epoll here")
    def test_epoll_is_polled_several_times_before_the_thread_sleeps(self):
        def select_once(*results, duration=0.00001, timeout=None):
            """Call select(). Return the count of polls that did not sleep, and if one slept.

            results     the events that each poll returns
            duration    seconds that each poll takes
            """
            fake.duration, fake.results, fake.timeouts = duration, list(results), []
            selector.select(timeout)
            slept = fake.timeouts[-1] != 0          # only the last poll may sleep
            return len(fake.timeouts) - slept, slept

        fake, fd = self.FakeEpoll(), 7
        ready = [(fd, 1)]                           # EPOLLIN
        selector = vaurien.EpollSelector(lambda: fake.now)
        selector.close()
        selector.poller, selector.watched = fake, {fd: None}
        with mock.patch.object(os, "sched_yield") as sched_yield:
            self.assertEqual(select_once(ready), (1, False))
            self.assertFalse(sched_yield.called)
            self.assertEqual(select_once([], [], [], ready), (4, False))
            self.assertEqual(sched_yield.call_count, 3)     # before each further poll
            self.assertEqual(select_once(timeout=0), (1, False))
            self.assertEqual(select_once(ready, timeout=2.5), (1, False))
            # If busy polling has found no events, later calls sleep without busy polling. The
            # count of these calls doubles each time.
            polls_expected = 1 + round(selector.SPIN_TIME / 0.00001)
            for skips in 1, 2, 4, 8, 8:
                polls, slept = select_once()
                self.assertTrue(slept)
                self.assertIn(polls, (polls_expected, polls_expected + 1))
                self.assertEqual([select_once() for _ in range(skips)], [(1, True)] * skips)
            self.assertEqual(select_once([], [], ready), (3, False))
            polls, slept = select_once(timeout=2.5)
            self.assertEqual((polls > 2, slept, fake.timeouts[-1]), (True, True, 2.5))
            self.assertEqual(select_once(), (1, True))
            # A poll that took this long was preempted: other processes need the CPU. So the
            # selector stops busy polling for a while, even though there were events.
            self.assertEqual(select_once([], ready, duration=0.0011), (2, False))
            self.assertEqual({select_once() for _ in range(selector.BACKOFF_PREEMPTED)},
                             {(1, True)})
            self.assertGreater(select_once()[0], 2)
            self.assertEqual({select_once() for _ in range(selector.BACKOFF_MAX)}, {(1, True)})
            # The selector does not sleep after a preempted poll, because a timer may be due.
            self.assertEqual(select_once(duration=0.0011, timeout=2.5), (2, False))

    def test_timers_call_back_in_order_and_not_before_their_time(self):
        loop, calls = vaurien.Loop(), []
        start = loop.clock()

        def record(delay):
            calls.append((delay, loop.clock() - start))

        for delay in 0.03, 0.001, 0.012, 0.0:
            loop.call_at(start + delay, functools.partial(record, delay))
        loop.cancel(loop.call_at(start + 0.002, functools.partial(record, "cancelled")))
        loop.call_at(start + 0.04, loop.stop)
        loop.run()
        loop.close()
        self.assertEqual([delay for delay, _ in calls], [0.0, 0.001, 0.012, 0.03])
        for delay, elapsed in calls:
            self.assertGreaterEqual(elapsed, delay)

    def test_cancelled_timers_are_removed_from_the_heap(self):
        loop = vaurien.Loop()
        timers = [loop.call_at(1e9 + second, int) for second in range(10)]
        for second in range(10000):
            loop.cancel(loop.call_at(1e9 - second, int))
            self.assertLess(len(loop.timers), 300)
        for timer in timers:
            self.assertIn(timer, loop.timers)
            loop.cancel(timer)
            loop.cancel(timer)          # cancelling twice has no effect
        loop.close()

    def test_a_timer_years_ahead_does_not_overflow_the_timeout(self):
        loop = vaurien.Loop()
        loop.call_at(1e300, loop.stop)
        loop.call_soon_threadsafe(loop.stop)
        loop.run()
        loop.close()

    def test_calls_do_not_wait_for_all_ready_sockets(self):
        loop, order = vaurien.Loop(), []

        def on_readable(events):
            order.append("socket")
            loop.call_soon_threadsafe(order.append, "call")
            if len(order) > 5:
                loop.stop()

        pairs = [socket.socketpair() for _ in range(3)]
        for one, two in pairs:
            two.send(b"x")
            loop.watch(one, selectors.EVENT_READ, on_readable)
        loop.run()
        self.assertEqual(order[:4], ["socket", "call"] * 2)
        loop.close()
        for pair in pairs:
            for sock in pair:
                sock.close()

    def test_run_sync_runs_in_the_thread_of_the_loop_and_returns_the_result(self):
        loop = vaurien.Loop()
        thread = threading.Thread(target=loop.run)
        thread.start()
        self.assertIs(loop.run_sync(threading.current_thread), thread)
        with self.assertRaises(ZeroDivisionError):
            loop.run_sync(lambda: 1 // 0)
        loop.stop()
        thread.join(TIMEOUT)
        loop.close()

    def test_run_sync_fails_if_the_loop_has_ended(self):
        loop = vaurien.Loop()
        loop.stop()
        loop.run()
        with self.assertRaisesRegex(RuntimeError, "ended"):
            loop.run_sync(int)
        loop.close()

    def test_run_in_thread_does_not_block_the_loop(self):
        loop, outcomes, gate = vaurien.Loop(), [], threading.Event()
        loop_thread = threading.Thread(target=loop.run)
        loop_thread.start()
        loop.run_sync(loop.run_in_thread, gate.wait,
                      lambda result, error: (outcomes.append((result, error)), loop.stop()))
        loop.run_sync(loop.run_in_thread, lambda: 1 // 0,
                      lambda result, error: outcomes.append((result, error)))
        while not outcomes:
            loop.run_sync(int)                  # the loop is running during gate.wait
        gate.set()
        loop_thread.join(TIMEOUT)
        loop.close()
        (no_result, error), of_wait = outcomes
        self.assertIsNone(no_result)
        self.assertIsInstance(error, ZeroDivisionError)
        self.assertEqual(of_wait, (True, None))


# -- Sockets --------------------------------------------------------------------


class TestAddresses(unittest.TestCase):
    """The addresses of listeners and of backends."""

    def test_addresses_are_parsed(self):
        for text, address in [
                ("localhost:8000", ("localhost", 8000)),
                ("[::1]:8000", ("::1", 8000)),
                (":8000", ("", 8000)),
                ("127.0.0.1:65535", ("127.0.0.1", 65535)),
                ("a-b.example.org.:1", ("a-b.example.org.", 1)),
                ("[fe80::1%eth0]:80", ("fe80::1%eth0", 80)),
                ("b\u00fccher.example:80", ("b\u00fccher.example", 80))]:
            with self.subTest(text):
                self.assertEqual(vaurien.parse_address(text), address)
        self.assertEqual(vaurien.parse_listener("localhost:0"), ("localhost", 0))

    def test_the_first_address_of_a_listener(self):
        for local, address in [(("", 80), "[::]:80"), (("0.0.0.0", 80), "[::]:80"),
                               (("127.0.0.1", 80), "127.0.0.1:80"),
                               (("localhost", 80), "127.0.0.1:80")]:
            with self.subTest(local):
                self.assertEqual(vaurien.first_address(local), address)
        error = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        with mock.patch.object(vaurien, "resolve", side_effect=error):
            self.assertRaisesRegex(vaurien.CannotListen, "cannot listen on some.example:80: Name",
                                   vaurien.first_address, ("some.example", 80))

    def test_bad_addresses_are_refused(self):
        for text in ["", "localhost", "8000", "localhost:", "localhost:x", "localhost:-1",
                     "localhost:65536", "localhost:0", "localhost:99999999999", "::1:8000",
                     "[::1]", "[::1]8000", "[localhost]:80", "local host:80", "localhost:80 x",
                     "a" * 64 + ".b:80", "a..b:80", "user@host:80", "localhost:80/path",
                     "host\n:80", "host\0:80", "localhost:8\u00b2", "localhost:+80"]:
            with self.subTest(text), self.assertRaisesRegex(ValueError, "^must "):
                vaurien.parse_address(text)

    def test_the_error_for_a_url_names_the_address_to_use_instead(self):
        for url, address in [("https://example.org/path", "example.org:443"),
                             ("http://example.org", "example.org:80"),
                             ("http://user:pw@example.org:81/x?y", "example.org:81"),
                             ("redis://localhost:6379/0", "localhost:6379"),
                             ("http://[::1]:80/", "[::1]:80")]:
            with self.subTest(url), self.assertRaisesRegex(
                    ValueError, "like %s, not the URL" % re.escape(address)):
                vaurien.parse_address(url)

    def test_no_error_shows_a_password(self):
        for text in ["http://user:secret@host:81/x", "http://user:secret/secret@host",
                     "http://user:secret@secret@host", "redis://:secret://secret@[::1]:6379/0",
                     "user:secret@host:80", "user:secret@host:99999", "user:secret/x@host:1"]:
            with self.subTest(text), self.assertRaises(ValueError) as raised:
                vaurien.parse_address(text)
            self.assertNotIn("secret", str(raised.exception))
            self.assertIn("@", str(raised.exception))

    def test_arguments_of_proxy_are_checked_like_options(self):
        with self.assertRaisesRegex(ValueError, "unknown handler 'nope'"):
            OpenProxy("localhost:9", behavior="20:nope")
        with self.assertRaisesRegex(ValueError, "must be a number, 0 or more, not 'x'"):
            OpenProxy("localhost:9", behavior="20:delay", options={"delay": {"sleep": "x"}})

    def test_a_proxy_that_would_connect_to_itself_is_refused(self):
        for local, distant in [("localhost:8000", "127.0.0.1:8000"), (":8000", "localhost:8000"),
                               ("127.0.0.1:8000", ":8000"), ("0.0.0.0:8000", "[::1]:8000"),
                               ("[::]:8000", "127.0.0.2:8000"), ("[::1]:8000", "[::]:8000"),
                               ("127.0.0.1:8000", "0.0.0.0:8000"), ("[::]:8000", "0.0.0.0:8000"),
                               ("127.0.0.1:8000", "[::ffff:7f00:1]:8000"),
                               (":8000", "[::ffff:127.0.0.1]:8000")]:
            with self.subTest(local=local, distant=distant):
                with self.assertRaisesRegex(ValueError, "is the proxy's own address"):
                    OpenProxy(distant, local)
        with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sock:
            with contextlib.suppress(OSError):      # no network: then this is 0.0.0.0
                sock.connect(("192.0.2.1", 9))      # sends nothing
            own_address = "%s:8000" % sock.getsockname()[0]
        with self.assertRaisesRegex(ValueError, "is the proxy's own address"):
            OpenProxy(own_address, "[::]:8000")
        OpenProxy("192.0.2.1:8000", ":8000")                # another machine
        OpenProxy("127.0.0.1:8000", "127.0.0.2:8000")       # another address
        OpenProxy("10.0.0.1:8000", "0.0.0.0:8000")          # perhaps another machine
        OpenProxy("localhost:8000", "localhost:0")          # another port


# -- Connection ---------------------------------------------------------------
#
# The oracle for the proxy is the same conversation over a direct connection.


class Conversations:
    """Conversations of a client and a backend: a class with two functions for each of them.

    The functions are called on the class, so they have no `self`. client(sock) acts as the
    client on its end of the connection, and backend(sock) as the backend on the other end. Each
    returns the data it received, and how the connection ended.
    """

    class ClientHalfCloses:
        def client(sock):
            sock.sendall(random_data(100000))
            sock.shutdown(socket.SHUT_WR)
            return read_until_close(sock)

        def backend(sock):
            received = read_until_close(sock)
            sock.sendall(random_data(50000, 1))
            return received

    class BackendSendsFirst:
        def client(sock):
            greeting = read_exactly(sock, len(b"greetings"))
            sock.sendall(b"thanks")
            return greeting, read_until_close(sock)

        def backend(sock):
            sock.sendall(b"greetings")
            return read_exactly(sock, len(b"thanks"))

    class BackendHalfCloses:
        def client(sock):
            received = read_until_close(sock)
            sock.sendall(random_data(300000))
            sock.close()
            return received

        def backend(sock):
            sock.sendall(random_data(1000))
            sock.shutdown(socket.SHUT_WR)
            return read_until_close(sock)

    class BothSendAtOnce:
        def client(sock):
            return send_and_read_all(sock, random_data(3000000))

        def backend(sock):
            return send_and_read_all(sock, random_data(5000000, 1))

    class RoundTrips:
        def client(sock):
            replies = [send_and_read(sock, random_data(1 + index * 37, index))
                       for index in range(100)]
            return hashlib.sha1(b"".join(replies)).hexdigest()

        def backend(sock):
            echo(sock)

    class ClientResets:
        def client(sock):
            reply = send_and_read(sock, b"question")
            close_with_reset(sock)
            return reply

        def backend(sock):
            sock.sendall(read_exactly(sock, len(b"question")))
            return read_until_close(sock)

    class BackendResets:
        def client(sock):
            sock.sendall(b"question")
            reply = read_exactly(sock, len(b"half"))
            sock.sendall(b"go")
            return reply, read_until_close(sock)

        def backend(sock):
            read_exactly(sock, len(b"question"))
            sock.sendall(b"half")
            read_exactly(sock, len(b"go"))
            close_with_reset(sock)

    class BackendRepliesAndResets:
        def client(sock):
            sock.sendall(b"question")
            return read_until_close(sock)

        def backend(sock):
            read_exactly(sock, len(b"question"))
            sock.sendall(random_data(1000))
            close_with_reset(sock)

    class BackendClosesWithoutReply:
        def client(sock):
            sock.sendall(b"question")
            return read_until_close(sock)

        def backend(sock):
            return read_exactly(sock, len(b"question"))

    class ClientSendsNothing:
        def client(sock):
            sock.shutdown(socket.SHUT_WR)
            return read_until_close(sock)

        def backend(sock):
            return read_until_close(sock)

    class SlowDownload:
        def client(sock):
            sock.sendall(b"go")
            read_exactly(sock, 1000)    # any first part of the download
            time.sleep(0.02)    # the backend fills the client's receive window in this time
            return read_until_close(sock)

        def backend(sock):
            read_exactly(sock, len(b"go"))
            sock.sendall(random_data(8000000))

    class Upload:
        def client(sock):
            sock.sendall(random_data(4000000))
            reply = read_exactly(sock, len(b"go"))
            sock.sendall(random_data(4000000, 1))
            sock.shutdown(socket.SHUT_WR)
            return reply, read_until_close(sock)

        def backend(sock):
            time.sleep(0.02)
            first = read_exactly(sock, 4000000)
            sock.sendall(b"go")
            return hashlib.sha1(first).hexdigest(), read_until_close(sock)


CONVERSATION_NAMES = sorted(name for name, value in vars(Conversations).items()
                            if isinstance(value, type))


def hold_conversation(name, port, results, connect=connect):
    """Hold a conversation with the server on this port.

    results    the list to which backend_server appends the result of the backend
    connect    returns a client for a port

    Returns the result of the client and the result of the backend.
    """
    with contextlib.closing(connect(port)) as sock:
        client_result = getattr(Conversations, name).client(sock)
    deadline = time.monotonic() + TIMEOUT
    while not results and time.monotonic() < deadline:
        time.sleep(0.001)
    return client_result, results[-1] if results else "the backend returned nothing"


@functools.lru_cache(maxsize=None)
def hold_conversation_directly(name):
    """Hold a conversation over a direct connection. Returns the results of both sides."""
    with backend_server(getattr(Conversations, name).backend) as (port, results):
        return hold_conversation(name, port, results)


class TestOracle(unittest.TestCase):
    """Both sides receive the same bytes and the same end as over a direct connection."""

    def compare(self, behavior, loop_class=None, options=None):
        """Check that each conversation has the same results as over a direct connection."""
        for name in CONVERSATION_NAMES:
            serve = getattr(Conversations, name).backend
            with self.subTest(name, behavior=behavior):
                direct_results = hold_conversation_directly(name)
                with running_proxy(serve, behavior, loop_class, options=options) as proxy:
                    self.assertEqual(hold_conversation(name, proxy.port, proxy.backend_results),
                                     direct_results)
                    wait_until(lambda: not proxy.connections)
                    self.assertEqual((proxy.loop.budget.held, proxy.loop.budget.queues), (0, 0))

    def test_fast_path_with_a_rule_that_does_nothing(self):
        self.compare("100:dummy")

    def test_fast_path_with_a_rule_that_is_never_drawn(self):
        self.compare("0:hang")

    def test_slow_path_without_a_delay(self):
        self.compare("100:delay", options={"delay": {"sleep": 0.0}})

    def test_delay_of_half_the_requests(self):
        self.compare("50:delay", options={"delay": {"sleep": 0.001}})

    def test_delay_of_half_the_replies(self):
        self.compare("50:delay", options={"delay": {"sleep": 0.001, "before": False}})

    def test_delay_with_select(self):
        self.compare("50:delay", SelectLoop, options={"delay": {"sleep": 0.001}})

    def test_fast_path_with_select_and_without_splice(self):
        with mock.patch.object(vaurien, "HAVE_SPLICE", False):
            self.compare("100:dummy", SelectLoop)

    def test_fast_path_with_the_default_selector_of_the_standard_library(self):
        self.compare("100:dummy", StandardLoop)


class TlsPeer:
    """TLS on a blocking socket: an independent peer of TlsSocket, which knows half-closes.

    One thread may send while another one receives. recv() raises SSLEOFError at a FIN without
    close_notify.
    """

    def __init__(self, sock, context, server_side=False, name=None):
        """Shake hands. Raises OSError."""
        self.sock, self.lock, self.send_lock = sock, threading.Lock(), threading.Lock()
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.engine = context.wrap_bio(self.incoming, self.outgoing, server_side, name)
        self.has_closed, self.unread = False, b""
        try:
            self.call(self.engine.do_handshake)
        except (OSError, ValueError):
            self.flush()                    # an alert
            sock.close()
            raise

    def __getattr__(self, name):            # setsockopt, settimeout ...
        return getattr(self.sock, name)

    def flush(self):
        with self.send_lock:
            with self.lock:
                data = self.outgoing.read()
            if data:                        # sendall(b"") would fail after shutdown()
                self.sock.sendall(data)

    def call(self, function, *args):
        """Call a function of the engine until it has got the bytes that it needs."""
        while True:
            try:
                with self.lock:
                    result = function(*args)
                self.flush()
                return result
            except ssl.SSLWantReadError:
                self.flush()
            data = self.sock.recv(65536)
            if not data:
                raise ssl.SSLEOFError(ssl.SSL_ERROR_EOF, "no close_notify")
            with self.lock:
                self.incoming.write(data)

    def setsockopt(self, level, option, value):
        self.has_closed = self.has_closed or option == socket.SO_LINGER     # close_with_reset
        self.sock.setsockopt(level, option, value)

    def recv(self, size):
        def read():
            data, self.unread = self.unread, b""
            return data or self.engine.read(size)
        try:
            return self.call(read)
        except ssl.SSLZeroReturnError:
            return b""

    def sendall(self, data):
        for start in range(0, len(data), 65536):
            part, taken = data[start:start + 65536], 0
            with self.lock:
                while taken < len(part):
                    taken += self.engine.write(part[taken:])
            self.flush()

    def shutdown(self, how):
        """Send close_notify and FIN. Receiving goes on."""
        self.has_closed = True
        with self.lock:
            with contextlib.suppress(OSError):      # unwrap() would fail at records not read yet
                for data in iter(functools.partial(self.engine.read, 1 << 20), b""):
                    self.unread += data
            with contextlib.suppress(OSError):
                self.engine.unwrap()
        self.flush()
        self.sock.shutdown(socket.SHUT_WR)

    def close(self):
        with contextlib.suppress(OSError):
            if not self.has_closed:
                self.shutdown(socket.SHUT_WR)
        self.sock.close()

    __enter__, __exit__ = (lambda self: self), (lambda self, *exc: self.close())


def server_context(host="localhost", version=None, **fields):
    """Return a context with a certificate from the CA of vaurien. `fields` are TLS settings."""
    if version:
        fields["max_version"] = version
    context = vaurien.TlsConfig(dict(fields, cert="auto")).accept_context(host)
    context.set_servername_callback(None)       # this one, whatever name the client asks for
    return context


def client_context(ca=None):
    """Return a context that trusts the CA of vaurien only."""
    return ssl.create_default_context(cadata=ca or vaurien.AUTHORITY.pem())


def tls_server(serve, **arguments):
    """Return a `serve` for backend_server that calls serve(TlsPeer). See server_context."""
    context = server_context(**arguments)

    def shake_hands_and_serve(sock):
        try:
            peer = TlsPeer(sock, context, server_side=True)
        except OSError:
            return None
        with peer:
            return serve(peer)
    return shake_hands_and_serve


@contextlib.contextmanager
def tls_proxy(serve, accepts, connects, version=None, behavior="100:dummy", **arguments):
    """Run a proxy with TLS on one side or on both, in front of a backend_server.

    accepts, connects    whether the clients, and the backend, use TLS of this version

    Yields (proxy, connect): connect() returns a client, a socket or a TlsPeer.
    """
    with tempfile.NamedTemporaryFile("w") as ca, contextlib.ExitStack() as stack:
        ca.write(vaurien.AUTHORITY.pem())
        ca.flush()
        tls = dict(arguments.pop("tls", {}), ca=ca.name)
        if accepts:
            tls.update(cert="auto", max_version=version)
        serve = tls_server(serve, version=version) if connects else serve
        port, results = stack.enter_context(backend_server(serve))
        proxy = stack.enter_context(OpenProxy(
            ("tls://localhost:%d" if connects else "127.0.0.1:%d") % port, "127.0.0.1:0", behavior,
            tls=tls, **arguments))
        proxy.backend_results = results

        def connect_client():
            sock = connect(proxy.port)
            return TlsPeer(sock, client_context(proxy.ca), name="localhost") if accepts else sock
        yield proxy, connect_client


class TestTls(TempDirTestCase):
    """TLS with the clients, with the backend, and with both."""

    def setUp(self):
        super().setUp()
        self.ca = self.write("ca.pem", vaurien.AUTHORITY.pem())

    # (name, whether the clients use TLS, whether the backend does)
    MODES = [("clients", True, False), ("backend", False, True), ("both", True, True)]

    def test_conversations_are_the_same_as_over_a_direct_connection(self):
        for name in CONVERSATION_NAMES:
            serve = getattr(Conversations, name).backend
            direct = hold_conversation_directly(name)
            for version, (mode, accepts, connects) in [
                    *zip(["1.3"] * 3, self.MODES), ("1.2", self.MODES[2])]:
                with self.subTest(name, tls=mode, version=version), tls_proxy(
                        serve, accepts, connects, version) as (proxy, connect_client):
                    self.assertEqual(hold_conversation(
                        name, None, proxy.backend_results, lambda _: connect_client()), direct)
                    wait_until(lambda: not proxy.connections)
                    self.assertEqual((proxy.loop.budget.held, proxy.loop.budget.queues), (0, 0))

    def test_addresses_of_backends(self):
        for text, backend in [
                ("tls://db.example:5432", ("db.example", 5432, "tls")),
                ("https://api.example/", ("api.example", 443, "tls")),
                ("https://[::1]", ("::1", 443, "tls")),
                ("REDISS://cache", ("cache", 6379, "tls")),
                ("localhost:80", ("localhost", 80))]:
            with self.subTest(text):
                self.assertEqual(vaurien.parse_backend(text), backend)
        self.assertEqual(vaurien.format_address(("::1", 443, "tls")), "tls://[::1]:443")
        for text in "tls://db.example", "https://a/path", "https://me:secret@a", "http://a", "tls://":
            with self.subTest(text), self.assertRaisesRegex(ValueError, "^must ") as raised:
                vaurien.parse_backend(text)
            self.assertNotIn("secret", str(raised.exception))

    def test_a_python_without_ssl_says_so(self):
        with mock.patch.object(vaurien, "ssl", vaurien.LazyModule("no_such_module")):
            with self.assertRaisesRegex(ValueError, "needs the module ssl"):
                vaurien.parse_backend("tls://x:1")
            with self.assertRaisesRegex(ValueError, "^tls-cert needs the module ssl"):
                OpenProxy("x:1", tls={"cert": "auto"})

    # Certificates

    def test_a_certificate_is_made_for_the_name_or_the_address_that_a_client_asks_for(self):
        with tls_proxy(echo, True, False) as (proxy, _):
            for name in "localhost", "127.0.0.1", "db.example", "x" * 60 + ".long.example":
                with self.subTest(name), client_context(proxy.ca).wrap_socket(
                        connect(proxy.port), server_hostname=name) as sock:     # checks the name
                    self.assertEqual(send_and_read(sock, b"hello"), b"hello")
            self.assertEqual(proxy.tls.cached_context.cache_info().currsize, 4)

    def test_a_client_names_each_fault_of_a_certificate(self):
        says = {"expired": "expired", "not_yet_valid": "not yet valid", "wrong_host": "match",
                "self_signed": "self.signed", "untrusted": "unable to get local issuer"}
        for fault in vaurien.CERTIFICATE_FAULTS:
            with self.subTest(fault), tls_proxy(
                    echo, True, False, tls={"fault": fault}) as (_, connect_client), \
                    self.assertLogs("vaurien", "INFO") as logged:
                vaurien.log.info("a log for each version of Python")
                with self.assertRaises((ssl.SSLError, ssl.CertificateError)) as raised:
                    connect_client()
                if sys.version_info >= (3, 7) or fault == "wrong_host":     # 3.6 gives no reason
                    self.assertRegex(str(raised.exception), says[fault])
                if sys.version_info >= (3, 7) or fault != "wrong_host":     # 3.6 checks it later
                    text = "TLS handshake with the client failed: "
                    wait_until(lambda: text in "".join(logged.output))

    def test_no_newer_version_than_the_maximum(self):
        for version in "1.2", "1.3":
            with self.subTest(version), tls_proxy(echo, True, False, version) as (proxy, _), \
                    client_context().wrap_socket(connect(proxy.port),
                                                 server_hostname="localhost") as sock:
                self.assertEqual(sock.version(), "TLSv" + version)
        with tls_proxy(echo, True, False, "1.1") as (proxy, connect_client):
            with self.assertRaises(ssl.SSLError):       # an unsupported protocol, or signature
                connect_client()

    def test_clients_and_the_proxy_show_certificates(self):
        me = self.write("me.pem", vaurien.AUTHORITY.issue("me"))
        serve = tls_server(echo, client_ca=self.ca)
        context = client_context()
        context.load_cert_chain(me)
        with backend_server(serve) as (port, _), OpenProxy(
                "tls://localhost:%d" % port, tls={"cert": "auto", "client_ca": self.ca,
                                                  "ca": self.ca, "client_cert": me}) as proxy:
            with TlsPeer(connect(proxy.port), context, name="localhost") as peer:
                self.assertEqual(send_and_read(peer, b"hello"), b"hello")
            with self.assertLogs("vaurien", "INFO") as logged:
                with self.assertRaisesRegex(OSError, "alert|ALERT"):
                    with TlsPeer(connect(proxy.port), client_context(), name="localhost") as peer:
                        send_and_read(peer, b"hello")
                wait_until(lambda: "peer did not return a certificate" in "".join(logged.output))

    def test_the_key_is_in_a_file_for_a_moment_only(self):
        made = []

        def mkstemp():
            fd, path = make()
            made.append((stat.S_IMODE(os.stat(path).st_mode), path))
            return fd, path

        make = tempfile.mkstemp
        with mock.patch.object(tempfile, "mkstemp", mkstemp):
            vaurien.TlsConfig({"cert": "auto"})
        ((mode, path),) = made
        self.assertEqual((mode, os.path.exists(path)), (0o600, False))

    # The backend

    def test_the_certificate_of_the_backend_is_checked(self):
        for host, fields, error in [
                ("localhost", {}, "verify failed"),
                ("localhost", {"verify": False}, ""),
                ("localhost", {"ca": self.ca}, ""),
                ("db.example", {"ca": self.ca, "sni": "db.example"}, ""),
                ("db.example", {"ca": self.ca}, "match")]:
            with self.subTest(fields, host=host), self.assertLogs("vaurien", "INFO") as logged, \
                    backend_server(tls_server(echo, host=host)) as (port, _), \
                    OpenProxy("tls://localhost:%d" % port, tls=fields) as proxy, \
                    connected_client(proxy) as sock:
                sock.sendall(b"hello")
                if not error:
                    self.assertEqual(read_exactly(sock, 5), b"hello")
                else:
                    self.assertEqual(read_until_close(sock).size, 0)
                    self.assertRegex(logged.output[-1], "cannot connect to backend tls://localhost"
                                     ":[0-9]+: TLS handshake: .*%s" % error)
                self.assertEqual(proxy.failures, len(error) > 0)

    def test_a_backend_without_tls_is_named(self):
        with self.assertLogs("vaurien", "INFO") as logged, \
                backend_server(lambda sock: sock.sendall(b"220 hello\r\n")) as (port, _), \
                OpenProxy("tls://localhost:%d" % port) as proxy, connected_client(proxy) as sock:
            self.assertEqual(read_until_close(sock).size, 0)
        self.assertIn("the peer speaks no TLS, but has sent b'220 hello", logged.output[1])

    # Handshakes that fail

    def test_a_client_without_tls_is_closed_and_named(self):
        with tls_proxy(echo, True, False) as (proxy, _), \
                self.assertLogs("vaurien", "INFO") as logged:
            with connected_client(proxy) as sock:
                sock.sendall(HTTP_GET)
                read_until_close(sock)
            wait_until(lambda: not proxy.connections)
        self.assertIn("the peer speaks no TLS, but has sent b'GET / HTTP", logged.output[0])

    def test_a_handshake_that_hangs_costs_no_wakeup_and_has_a_deadline(self):
        def greet(sock):                # the greeting waits for the handshake
            sock.sendall(b"220 hello\r\n")
            read_until_close(sock)
        began = time.monotonic()
        with tls_proxy(greet, True, False, timeout=0.3) as (proxy, _), \
                connected_client(proxy) as sock, self.assertLogs("vaurien", "INFO") as logged:
            sock.sendall(TLS_HELLO)
            wait_until(lambda: proxy.connections and proxy.connections[1].client.begun
                       and proxy.connections[1].down.held)
            with mock.patch.object(vaurien.TlsSocket, "shake_hands") as shake_hands:
                time.sleep(0.05)
                self.assertEqual(shake_hands.call_count, 0)
            read_until_close(sock)
            self.assertGreaterEqual(time.monotonic() - began, 0.3)
        self.assertIn("TLS handshake with the client failed: timed out", logged.output[0])

    def test_any_beginning_of_a_handshake_leaves_nothing(self):
        """Clients send a part of a ClientHello, whole or with a wrong byte, and close."""
        client = vaurien.TlsConfig({}).connect_context()
        outgoing = ssl.MemoryBIO()
        engine = client.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="localhost")
        with self.assertRaises(ssl.SSLWantReadError):
            engine.do_handshake()
        hello = outgoing.read()
        with tls_proxy(echo, True, False) as (proxy, _):
            for index in range(0, len(hello), 7):
                for data in hello[:index], hello[:index] + b"\x7f" + hello[index + 1:]:
                    with connected_client(proxy) as sock:
                        sock.sendall(data)
                        sock.shutdown(socket.SHUT_WR)
                        read_until_close(sock)
            wait_until(lambda: not proxy.connections)
            self.assertEqual((proxy.loop.budget.held, proxy.loop.budget.queues), (0, 0))
            self.assertEqual(len(proxy.loop.watched), 1 + len(proxy.listener.sockets))

    # Endings

    def test_truncation_is_passed_on(self):
        def serve(sock):
            read_exactly(sock, 1)
            sock.sendall(b"half of a reply")
            sock.has_closed = True          # so that TlsPeer sends no close_notify
        for version in "1.2", "1.3":
            with self.subTest(version), tls_proxy(serve, True, True, version) as (
                    _, connect_client), connect_client() as peer:
                peer.sendall(b"?")
                received = read_until_close(peer)
                self.assertEqual((received.size, received.ending), (15, "truncated"))

    def test_a_stream_that_a_rule_ends_is_truncated_but_not_after_a_reply(self):
        for name, options, protocol, ending in [
                ("limit_data", {"bytes": 100}, "tcp", "truncated"),
                ("error", {"kind": "MAXCLIENTS"}, "redis", "eof")]:
            with self.subTest(name), tls_proxy(
                    echo, True, False, behavior="100:" + name, protocol=protocol,
                    options={name: options}) as (_, connect_client), connect_client() as peer:
                peer.sendall(bytes(200))
                self.assertEqual(read_until_close(peer).ending, ending)

    def test_ciphertext_that_waits_is_sent_without_a_close(self):
        """All bytes of the reply wait as ciphertext, and none in the delay queue."""
        data = random_data(60000)

        def reply(sock):
            read_exactly(sock, len(b"go"))
            sock.sendall(data)
            read_exactly(sock, len(b"bye"))

        with tls_proxy(reply, True, False) as (proxy, _), socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.settimeout(TIMEOUT)
            sock.connect(("127.0.0.1", proxy.port))
            wait_until(lambda: proxy.connections)
            connection = proxy.connections[1]
            connection.client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            with TlsPeer(sock, client_context(), name="localhost") as peer:
                peer.sendall(b"go")
                wait_until(lambda: proxy.loop.run_sync(
                    lambda: connection.down.received == len(data) and not connection.down.held))
                self.assertTrue(connection.client.unsent)
                self.assertEqual(read_exactly(peer, len(data)), data)
                peer.sendall(b"bye")
                self.assertEqual(read_until_close(peer), EMPTY_EOF)

    def test_ciphertext_that_waits_is_sent_before_the_close(self):
        """The proxy closes the connection, while most of one batch of ciphertext waits."""
        data = random_data(60000)
        with tls_proxy(lambda sock: sock.sendall(data), True, False) as (proxy, _), \
                socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.settimeout(TIMEOUT)
            sock.connect(("127.0.0.1", proxy.port))
            wait_until(lambda: proxy.connections)
            client = proxy.connections[1].client
            client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            with TlsPeer(sock, client_context(), name="localhost") as peer:
                peer.shutdown(socket.SHUT_WR)
                wait_until(lambda: not proxy.connections)
                self.assertFalse(client.fin_sent)
                self.assertEqual(read_exactly(peer, len(data)), data)
                self.assertEqual(read_until_close(peer), EMPTY_EOF)

    def test_a_stalled_client_holds_little_memory(self):
        def serve(sock):
            with contextlib.suppress(OSError):
                while True:
                    sock.sendall(bytes(1 << 20))
        with tls_proxy(serve, True, True) as (proxy, connect_client), connect_client():
            wait_until(lambda: proxy.connections[1].down.held > vaurien.HELD_MAX_IDLE - 20000)
            sock, size = proxy.connections[1].client, 0
            while size != proxy.connections[1].down.received:
                size = proxy.connections[1].down.received
                time.sleep(0.02)
            self.assertLessEqual(proxy.connections[1].down.held, vaurien.HELD_MAX_IDLE + 20000)
            self.assertLessEqual(len(sock.unsent) + sock.outgoing.pending, 5 * 16384)
            self.assertLessEqual(proxy.connections[1].backend.incoming.pending, 17000)

    def test_bytes_that_are_not_of_tls_end_the_connection(self):
        results = []

        def serve(sock):
            results.append(read_until_close(sock))
        with tls_proxy(serve, True, False) as (proxy, connect_client), connect_client() as peer:
            peer.sendall(b"hello")
            peer.sock.sendall(b"no record of TLS" * 5)
            peer.has_closed = True
            wait_until(lambda: results and not proxy.connections)
            self.assertEqual((results[0].size, results[0].ending), (5, "reset"))

    # Rules and protocols

    def test_errors_of_a_protocol_and_match_work_on_encrypted_requests(self):
        def serve(sock):
            while True:
                data = sock.recv(65536)
                if not data:
                    return
                sock.sendall(HTTP_OK * data.count(b"\r\n\r\n"))
        for mode, accepts, connects in self.MODES:
            with self.subTest(mode), tls_proxy(serve, accepts, connects, protocol="http") as (
                    proxy, connect_client), contextlib.closing(connect_client()) as sock:
                with proxy.handler("error", kind="503", match="^GET /cart") as fault:
                    for path, status in (b"/", b"200"), (b"/cart", b"503"), (b"/", b"200"):
                        sock.sendall(b"GET %s HTTP/1.1\r\nHost: x\r\n\r\n" % path)
                        head = b""
                        while b"\r\n\r\n" not in head:
                            head += sock.recv(65536)
                        self.assertEqual(head.split()[1], status)
                        if status == b"200" and not head.endswith(b"hi"):
                            read_exactly(sock, 2)
                        elif status == b"503":
                            size = int(re.search(rb"(?i)content-length: (\d+)", head).group(1))
                            body = head.partition(b"\r\n\r\n")[2]
                            self.assertEqual(len(body), size)
                    self.assertEqual(fault.count, 1)

    def test_the_application_protocol_is_that_of_the_protocol(self):
        for protocol, name in ("http", "http/1.1"), ("tcp", None):
            context = client_context()
            context.set_alpn_protocols(["h2", "http/1.1"])
            with self.subTest(protocol), tls_proxy(echo, True, False, protocol=protocol) as (
                    proxy, _), context.wrap_socket(connect(proxy.port),
                                                   server_hostname="localhost") as sock:
                self.assertEqual(sock.selected_alpn_protocol(), name)

    # For each protocol: (protocol, kind of an error, greeting, request for TLS, reply, login,
    # reply, query, reply to the query)
    UPGRADES = [
        ("postgres", "57P01", b"", PG_SSL_REQUEST, b"S", PG_STARTUP,
         pg_message(b"R", bytes(4)) + PG_READY, pg_query(b"SELECT 1"),
         pg_message(b"C", b"SELECT 1\0") + PG_READY),
        ("mysql", "1205", mysql_packet(0, b"\x0a5.5\0" + bytes(40)), mysql_login(0xAA85, b""), b"",
         mysql_packet(2, MYSQL_LOGIN[4:]), mysql_packet(3, MYSQL_OK_BODY),
         mysql_query(b"SELECT 1"), MYSQL_OK),
        ("smtp", "451", b"220 hello\r\n", b"STARTTLS\r\n", b"220 go\r\n", b"EHLO x\r\n",
         b"250 x\r\n", b"NOOP\r\n", b"250 ok\r\n")]

    def test_tls_that_begins_within_a_connection(self):
        for protocol, kind, *texts in self.UPGRADES:
            greeting, request, agreement, login, welcome, query, reply = texts
            context = server_context()

            def serve(sock):
                sock.sendall(greeting)
                read_exactly(sock, len(request))
                sock.sendall(agreement)
                with TlsPeer(sock, context, server_side=True) as peer:
                    for text, answer in (login, welcome), (query, reply):
                        read_exactly(peer, len(text))
                        peer.sendall(answer)
                    read_until_close(peer)
            for behavior in "100:dummy", "100:delay":
                with self.subTest(protocol, behavior=behavior), tls_proxy(
                        serve, True, False, protocol=protocol, behavior=behavior,
                        tls={"verify": False}, options={"delay": {"sleep": 0.02}}) as (
                        proxy, _), connected_client(proxy) as sock:
                    read_exactly(sock, len(greeting))
                    sock.sendall(request)
                    read_exactly(sock, len(agreement))
                    peer = TlsPeer(sock, client_context(), name="localhost")
                    for text, answer in (login, welcome), (query, reply):
                        peer.sendall(text)
                        self.assertEqual(read_exactly(peer, len(answer)), answer)
                    with proxy.handler("error", kind=kind):
                        peer.sendall(query)
                        self.assertIn(kind.encode() if protocol != "mysql" else b"Lock wait",
                                      peer.recv(65536))

    def test_rules_act_on_the_decrypted_bytes(self):
        with tls_proxy(echo, True, True, behavior="100:slicer",
                       options={"slicer": {"average_size": 10}}) as (_, connect_client), \
                connect_client() as peer:
            data = random_data(3000)
            peer.sendall(data)
            self.assertEqual(len(peer.recv(3000)), 10)
            self.assertEqual(read_exactly(peer, 2990), data[10:])

    # Settings

    def test_settings_of_the_command_line_and_of_a_file(self):
        ini = self.write("v.ini", "[proxy:a]\nlocal=localhost:0\ndistant=rediss://cache\n"
                                  "tls-cert=auto\ntls_verify=no\n")
        for argv, fields in [
                (["--config", ini], {"cert": "auto", "verify": False}),
                (["--config", ini, "--tls-max-version", "1.2"],
                 {"cert": "auto", "verify": False, "max_version": "1.2"}),
                (["--distant", "tls://x:1", "--tls-ca", self.ca], {"ca": self.ca})]:
            config = vaurien.read_arguments(argv, vaurien.SETTINGS)
            proxy, = vaurien.make_proxies(config).values()
            self.assertEqual((proxy.tls.fields, proxy.backend[2]), (fields, "tls"))

    def test_postgres_has_a_hint_about_scram(self):
        for tls, count in ({"cert": "auto"}, 1), ({}, 0):
            with self.subTest(tls), self.assertLogs("vaurien", "INFO") as logged, \
                    OpenProxy("localhost:1", protocol="postgres", tls=tls):
                pass
            self.assertEqual(str(logged.output).count("needs channel_binding=disable"), count)

    def test_settings_that_do_not_fit_are_refused(self):
        pem = vaurien.AUTHORITY.issue("x")
        first, second = self.write("1.pem", pem), self.write("2.pem", pem.partition("-----\n")[2])
        self.addCleanup(vaurien.AUTHORITY.__init__)
        vaurien.AUTHORITY.__init__()
        other = self.write("other.pem", vaurien.AUTHORITY.issue("x"))
        for fields, text in [
                ({"cert": "none.pem"}, "tls-cert: cannot read none.pem: No such file"),
                ({"cert": self.folder}, "tls-cert: cannot read .*: it is no regular file"),
                ({"cert": second}, "tls-cert must be a PEM file with a line -----BEGIN CERTIFI"),
                ({"cert": self.ca}, "tls-key must be a PEM file with a line -----BEGIN PRIVATE"),
                ({"cert": first, "key": other}, "tls-key: the key in other.pem does not fit the"),
                ({"cert": first, "fault": "expired"}, "tls-fault makes the certificates itself"),
                ({"client_ca": self.ca}, "tls-client-ca needs tls-cert"),
                ({"key": first}, "tls-key needs tls-cert, with the file of a certificate"),
                ({"max_version": 1.2}, "tls-max-version needs tls-cert"),
                ({"client_key": first}, "tls-client-key needs tls-client-cert"),
                ({"ca": first}, "tls-ca must have the certificate of a CA, not only of hosts"),
                ({"max_version": "1.4"}, "tls max_version must be one of 1.0, 1.1, 1.2, 1.3"),
                ({"sni": "a b"}, "tls sni must be a host name"),
                ({"verify": "maybe"}, "tls verify must be yes or no"),
                ("auto", "tls must be like {\"cert\": \"auto\"}, not 'auto'")]:
            with self.subTest(fields), self.assertRaisesRegex(ValueError, text):
                OpenProxy("x:1", tls=fields)
        OpenProxy("x:1", tls={"cert": first, "client_ca": self.ca, "max_version": 1.2})

    def test_the_ca_is_at_a_url_and_in_a_file(self):
        with proxy_with_control() as (proxy, client):
            self.assertEqual(client.ca, proxy.ca)
        vaurien.write_ca("out.pem")
        self.assertEqual(read_text("out.pem"), proxy.ca)
        with self.assertRaisesRegex(ValueError, "--tls-ca-out: cannot write no/out.pem: No such"):
            vaurien.write_ca("no/out.pem")

    def test_a_listing_has_the_settings_and_populate_changes_them(self):
        with proxy_with_control() as (_, client):
            fields = {"name": "x", "listen": "127.0.0.1:0", "upstream": "tls://localhost:1"}
            tls = {"cert": "auto", "max_version": "1.2"}
            made = client.request("POST", "/proxies", dict(fields, tls=tls))
            self.assertEqual((made["tls"], made["upstream"]), (tls, "tls://localhost:1"))
            with self.assertRaisesRegex(ValueError, "tls cannot be changed"):
                client.request("PATCH", "/proxies/x", {"tls": {"cert": "auto"}})
            client.request("PATCH", "/proxies/x", {"tls": tls})
            made["tls"] = {"fault": "expired"}
            client.request("POST", "/populate", [made])
            self.assertEqual(client.request("GET", "/proxies/x")["tls"], {"fault": "expired"})
            client.request("DELETE", "/proxies/x")

    def test_blocking_handlers_are_refused(self):
        with registered(Passes), self.assertRaisesRegex(ValueError, "and without TLS"):
            OpenProxy("x:1", behavior="100:Passes", tls={"cert": "auto"})
        with registered(Passes), tls_proxy(echo, False, True, behavior="100:Passes") as (
                proxy, connect_client), contextlib.closing(connect_client()) as sock:
            self.assertEqual(read_until_close(sock).size, 0)
            self.assertEqual(proxy.failures, 1)


class TestTlsSocket(unittest.TestCase):
    """A TlsSocket without a connection. The test is its peer and its loop."""

    def setUp(self):
        self.loop = vaurien.Loop()
        self.addCleanup(self.loop.close)
        sock, self.peer = socket.socketpair()
        self.addCleanup(self.peer.close)
        self.addCleanup(sock.close)
        sock.setblocking(False)
        self.peer.settimeout(TIMEOUT)
        self.changes = []
        self.tls = vaurien.TlsSocket(sock, self.loop, lambda: self.changes.append(1), 9,
                                     server_context(), server_side=True)
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.client = client_context().wrap_bio(self.incoming, self.outgoing,
                                                server_hostname="localhost")

    def open(self, data=b""):
        """Shake hands. The client sends data together with its last message."""
        while True:
            with contextlib.suppress(ssl.SSLWantReadError):
                self.client.do_handshake()
                break
            self.peer.sendall(self.outgoing.read())
            self.tls.shake_hands()
            self.incoming.write(self.peer.recv(65536))
        if data:
            self.client.write(data)
        self.peer.sendall(self.outgoing.read())
        self.tls.shake_hands()
        self.assertTrue(self.tls.is_open)
        self.loop.run_timers()
        self.assertEqual(len(self.changes), 1)

    def receive(self):
        buffer = bytearray(1 << 18)
        return bytes(buffer[:self.tls.recv_into(buffer, 1 << 16)])

    def test_bytes_with_the_last_message_are_announced_when_they_are_wanted(self):
        self.open(b"early")
        self.assertEqual(self.tls.interest(0), 0)
        self.loop.run_timers()
        self.assertEqual(len(self.changes), 1)
        self.tls.interest(vaurien.EVENT_READ)
        self.loop.run_timers()
        self.assertEqual(len(self.changes), 2)
        self.assertEqual(self.receive(), b"early")
        with self.assertRaises(BlockingIOError):
            self.receive()

    def test_a_shutdown_waits_until_such_bytes_are_received(self):
        self.open(b"early")
        self.tls.shutdown(socket.SHUT_WR)
        self.assertFalse(self.tls.fin_sent)
        self.assertEqual(self.receive(), b"early")
        self.assertTrue(self.tls.fin_sent)
        self.incoming.write(self.peer.recv(65536))
        self.assertEqual((self.client.read(9), self.peer.recv(9)), (b"", b""))

    def test_ciphertext_that_waits_is_announced_once(self):
        self.open()
        for option in socket.SO_SNDBUF, socket.SO_RCVBUF:
            self.tls.setsockopt(socket.SOL_SOCKET, option, 4096)
        self.assertEqual(self.tls.send(memoryview(bytes(60000))), 60000)
        self.loop.run_timers()
        self.assertEqual(len(self.changes), 2)
        self.assertEqual(self.tls.interest(0), vaurien.EVENT_WRITE)
        with self.assertRaises(BlockingIOError):
            self.tls.send(memoryview(b"more"))
        self.loop.run_timers()
        self.assertEqual(len(self.changes), 2)

    def test_ciphertext_for_a_lost_peer_waits_for_no_event(self):
        """Such an event would occur all the time."""
        self.open()
        self.tls.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        self.assertEqual(self.tls.send(memoryview(bytes(600000))), vaurien.TlsSocket.SEND_BATCH)
        self.assertEqual(self.tls.interest(0), vaurien.EVENT_WRITE)
        self.peer.close()
        for _ in range(2):              # the stream has lost bytes: no further send succeeds
            with self.assertRaises(BrokenPipeError):
                self.tls.push()
            self.assertEqual(self.tls.interest(0), 0)

    def test_a_reset_does_not_wait_for_ciphertext(self):
        for reset in False, True:
            with self.subTest(reset=reset):
                self.setUp()
                self.open()
                self.tls.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
                self.tls.send(memoryview(bytes(60000)))
                self.tls.shutdown(socket.SHUT_WR)
                if reset:
                    vaurien.reset_on_close(self.tls)
                self.tls.close()
                self.assertEqual(self.tls.fileno() < 0, reset)
                self.tls.close_now()

    def test_a_client_gets_no_session_tickets(self):
        self.open()
        got_ticket, _, _ = select.select([self.peer], [], [], 0)
        self.assertEqual(bool(got_ticket), sys.version_info < (3, 8))   # which cannot omit them


class DownloadMixin:
    """A large download through a proxy."""

    def download(self, data, stages=()):
        """Download data through a proxy, and return the bytes that arrive.

        stages    functions that are called with the proxy, at equal distances in the data

        Sets self.pooled_pipes to the count of kernel pipes that the loop keeps at the end.
        """
        def send_on_request(sock):
            read_exactly(sock, len(b"go"))
            sock.sendall(data)

        with running_proxy(send_on_request) as proxy, connected_client(proxy) as sock:
            sock.sendall(b"go")
            received = bytearray()
            for stage in stages:
                received += read_exactly(sock, len(data) // (len(stages) + 1))
                stage(proxy)
            while True:
                piece = sock.recv(1 << 16)
                if not piece:
                    self.pooled_pipes = len(proxy.loop.pipe_pool)
                    return bytes(received)
                received += piece


def recording_socket(sent):
    """Return a RawSocket class that appends the bytes of each send() to the list `sent`."""
    class RecordingSocket(vaurien.RawSocket):
        def send(self, data, *flags):
            sent.append(bytes(data))
            return super().send(data, *flags)
    return RecordingSocket


class TestFastPath(DownloadMixin, unittest.TestCase):
    """Bytes that no fault changes are sent in the callback that received them."""

    @mock.patch.object(vaurien.Latencies, "draw_distance", lambda self: sys.maxsize)
    def test_fast_path_reads_no_clock_and_leaves_the_selector_alone(self):
        """Only the latency of a sample needs a clock."""
        calls = Counter()

        def counted(name, function):
            """Return a function that counts a call, and then calls `function`."""
            def count_and_call(*args):
                calls[name] += 1
                return function(*args)
            return count_and_call

        with running_proxy(echo) as proxy, connected_client(proxy) as sock:
            send_and_read(sock, b"question")
            loop = proxy.loop

            def install_counters():
                loop.clock = counted("clock", loop.clock)
                loop.watch = counted("watch", loop.watch)
            loop.run_sync(install_counters)
            with mock.patch.object(vaurien.DelayQueue, "put",
                                   counted("put", vaurien.DelayQueue.put)):
                for index in range(100):
                    send_and_read(sock, random_data(1 + index))
            self.assertEqual(calls, Counter())
            self.assertEqual(loop.run_sync(lambda: proxy.rules.request_count), 101)
            set_behavior(proxy, "100:delay", delay={"sleep": 0.0})
            self.assertTrue(calls["clock"])         # the counters work

    def test_only_the_first_chunk_that_rules_only_delay_goes_through_the_chain(self):
        processed, process = [], vaurien.Chain.process

        def recorded_process(chain, now, to, data):
            processed.append(bytes(data))
            return process(chain, now, to, data)

        latency = {"type": "latency", "latency": 1}
        for toxic, seconds_min in [({"type": "latency", "name": "two", "latency": 2}, 0.003),
                                   ({"type": "bandwidth", "rate": 4}, 0.003),
                                   ({"type": "bandwidth", "rate": 30000}, 0.001)]:
            del processed[:]
            with self.subTest(toxic), \
                    mock.patch.object(vaurien.Chain, "process", recorded_process), \
                    running_proxy(echo, toxics=[latency, toxic]) as proxy, \
                    connected_client(proxy) as sock:
                for index in range(20):
                    began = time.monotonic()
                    self.assertEqual(send_and_read(sock, b"chunk %02d" % index),
                                     b"chunk %02d" % index)
                    self.assertGreaterEqual(time.monotonic() - began, seconds_min)
                self.assertEqual([data for data in processed if data], [b"chunk 00"])
                # The data is more than a link may hold, but not for the rate of 4 KB/s.
                data = random_data(10000 if toxic.get("rate") == 4 else 3000000)
                received = send_and_read_all(sock, data)
                self.assertEqual(received, Received(
                    len(data), hashlib.sha1(data).hexdigest(), "eof"))

    def test_chunks_of_a_slow_link_come_at_its_rate(self):
        """Small chunks are pieces; a large chunk between them is cut. All wait for each other."""
        sizes = [10, 20, 2500, 30, 40]
        with running_proxy(echo, toxics=[{"type": "bandwidth", "rate": 10}]) as proxy, \
                connected_client(proxy) as sock:
            loop, clock = proxy.loop, StoppedClock(proxy.loop)
            wait_until(lambda: proxy.connections)
            down = next(iter(proxy.connections.values())).down
            sock.sendall(b"x")
            wait_until(lambda: loop.run_sync(lambda: down.received) == 1)
            clock.advance(1)
            self.assertEqual(read_exactly(sock, 1), b"x")
            began, received = clock.now, 1
            for size in sizes:
                sock.sendall(bytes(size))
                received += size
                wait_until(lambda: loop.run_sync(lambda: down.received) == received)
                # The reading resumes shortly before this time: see DelayQueue.next_time.
                self.assertAlmostEqual(loop.run_sync(lambda: down.rate_limited_until - began),
                                       (received - 1) / 10000)
            due_times = loop.run_sync(lambda: [entry[0] - began for entry in sorted(down.queue)])
            ends = [10, 30, 1030, 2030, 2530, 2560, 2600]
            self.assertEqual(len(due_times), len(ends))
            for due, end in zip(due_times, ends):
                self.assertAlmostEqual(due, end / 10000)
            loop.run_sync(proxy.set_toxics, [])
            read_exactly(sock, 2600)

    def test_chunks_with_a_fixed_delay_are_released_in_order(self):
        """The clock stands still, so nothing but the removal of the toxic releases them."""
        toxics = [{"type": "latency", "latency": 5000}]
        with running_proxy(echo, toxics=toxics) as proxy, connected_client(proxy) as sock:
            loop, clock = proxy.loop, StoppedClock(proxy.loop)
            wait_until(lambda: proxy.connections)
            down = next(iter(proxy.connections.values())).down

            def send(data):
                size = down.received + len(data)
                sock.sendall(data)
                wait_until(lambda: loop.run_sync(lambda: down.received) == size)

            send(b"first,")
            clock.advance(5)
            self.assertEqual(read_exactly(sock, 6), b"first,")
            for data in b"second,", b"third,", b"fourth,":
                send(data)
            self.assertEqual((len(down.queue), down.fast_events), (3, vaurien.EVENT_READ))
            loop.run_sync(proxy.set_toxics, [])
            self.assertEqual(read_exactly(sock, 20), b"second,third,fourth,")
            self.assertEqual(send_and_read(sock, b"fifth"), b"fifth")

    def test_neither_fast_path_is_open_while_the_backend_shakes_hands(self):
        def read_all(sock):
            while sock.recv(1 << 16):
                pass

        with backend_server(read_all) as (port, _), \
                OpenProxy("tls://127.0.0.1:%d" % port, "127.0.0.1:0") as proxy, \
                connected_client(proxy):
            wait_until(lambda: [connection for connection in proxy.connections.values()
                                if connection.phase is vaurien.CONNECTED])
            connection = proxy.connections[1]
            self.assertEqual(proxy.loop.run_sync(
                lambda: (connection.up.fast_events, connection.down.fast_events)), (0, 0))

    def test_late_pieces_are_sent_one_by_one_or_together(self):
        """The clock stands still, and then all pieces are late."""
        bandwidth = {"type": "bandwidth", "rate": 10}
        slicer = {"type": "slicer", "average_size": 1000, "delay": 1000}
        latency = {"type": "latency", "latency": 1}
        for toxics, sizes in [([bandwidth], [3000]), ([latency, bandwidth], [3000]),
                              ([slicer], [1000] * 3), ([latency, slicer], [1000] * 3),
                              ([slicer, bandwidth], [1000] * 3)]:
            names = [toxic["type"] for toxic in toxics]
            sent = []
            with self.subTest(names), \
                    mock.patch.object(vaurien, "RawSocket", recording_socket(sent)), \
                    running_proxy(echo, toxics=toxics) as proxy, connected_client(proxy) as sock:
                clock = StoppedClock(proxy.loop)
                sock.sendall(bytes(3000))
                wait_until(lambda: sum(connection.down.received
                                       for connection in proxy.connections.values()) == 3000)
                clock.advance(5)
                read_exactly(sock, 3000)
                # The first send() is the request.
                self.assertEqual([len(data) for data in sent], [3000, *sizes])

    def test_pieces_of_a_slicer_without_a_delay_are_sent_one_by_one(self):
        sent = []
        with mock.patch.object(vaurien, "RawSocket", recording_socket(sent)), \
                running_proxy(echo, "100:slicer",
                              options={"slicer": {"average_size": 10}}) as proxy, \
                connected_client(proxy) as sock:
            for _ in range(3):
                sent.clear()
                send_and_read(sock, b"0123456789abcdefghij")
                self.assertEqual(sent[:2], [b"0123456789", b"abcdefghij"])

    def test_a_rule_that_is_added_before_a_reply_knows_the_request(self):
        """The bytes of the request went past the rules, because no rule acts on requests."""
        released = threading.Event()

        def serve(sock):
            for _ in range(3):
                data = sock.recv(100)
                if data == b"question":
                    released.wait(TIMEOUT)
                sock.sendall(data)

        toxics = [{"type": "latency", "name": "first", "latency": 1}]
        with running_proxy(serve, toxics=toxics) as proxy, connected_client(proxy) as sock:
            send_and_read(sock, b"one")
            send_and_read(sock, b"two")
            sock.sendall(b"question")
            wait_until(lambda: proxy.connections[1].up.received == len(b"onetwoquestion"))
            second = vaurien.make_toxic("latency", "second", {}, {"latency": 1})
            proxy.loop.run_sync(proxy.set_toxics, [*proxy.toxics, second])
            released.set()
            read_exactly(sock, len(b"question"))
            self.assertEqual([(record.toxic, record.text) for record in proxy.events()],
                             [("first", "one"), ("second", "question")])

    def test_reading_resumes_before_the_first_delayed_byte_is_due(self):
        """The bandwidth stops the reading for a moment, but the latency does not."""
        toxics = [{"type": "latency", "latency": 9000, "stream": "upstream"},
                  {"type": "bandwidth", "rate": 100, "stream": "upstream"}]
        with running_proxy(echo, toxics=toxics) as proxy, connected_client(proxy) as sock:
            loop, clock = proxy.loop, StoppedClock(proxy.loop)
            sock.sendall(bytes(1 << 16))
            wait_until(lambda: proxy.connections)
            up = proxy.connections[1].up
            wait_until(lambda: loop.run_sync(
                lambda: up.held and not up.watched & vaurien.EVENT_READ))
            size = up.received
            self.assertLess(size, 1 << 16)
            while size < 1 << 16:
                clock.advance(1)
                wait_until(lambda: up.received > size)
                self.assertEqual(up.sent, 0)
                size = up.received

    def test_delayed_bytes_behind_an_eof_are_dropped(self):
        """A rule half-closes the backend while a request is delayed. Another request follows."""
        toxics = [{"type": "latency", "name": "up", "latency": 100, "stream": "upstream"},
                  {"type": "limit_data", "bytes": 5},
                  {"type": "latency", "name": "down", "latency": 1000}]
        with running_proxy(echo, toxics=toxics) as proxy, connected_client(proxy) as sock:
            clock = StoppedClock(proxy.loop)
            wait_until(lambda: proxy.connections)
            up, down = proxy.connections[1].up, proxy.connections[1].down

            def wait_for(condition):
                wait_until(lambda: proxy.loop.run_sync(condition))

            sock.sendall(b"first")
            wait_for(lambda: up.received == 5)
            clock.advance(0.09)
            sock.sendall(b"second")
            wait_for(lambda: up.received == 11)
            clock.advance(0.06)                     # "first" is due, and `limit_data` acts
            wait_for(lambda: EOF in [data for _, _, data, *_ in up.queue])
            sock.sendall(b"third")                  # comes after the EOF of limit_data
            wait_for(lambda: up.received == 16)
            clock.advance(0.05)                     # "second" and the EOF are due
            wait_for(lambda: up.write_closed and down.eof)
            self.assertEqual(up.sent, 11)
            clock.advance(0.1)                      # "third" is due
            wait_for(lambda: not up.queue)
            clock.advance(2)
            self.assertEqual(read_exactly(sock, 5), b"first")
            self.assertEqual(sock.recv(100), b"")

    def test_a_delayed_chunk_that_is_due_waits_for_the_backend(self):
        lookup_may_end = threading.Event()

        def resolve(address, *_):
            _, port = address
            lookup_may_end.wait(TIMEOUT)
            return [(socket.AF_INET, ("127.0.0.1", port))]

        toxics = [{"type": "latency", "latency": 1, "stream": "upstream"}]
        with backend_server(echo) as (port, _), \
                OpenProxy("slow.invalid:%d" % port, "127.0.0.1:0", toxics=toxics) as proxy, \
                mock.patch.object(vaurien, "resolve_numeric", lambda *_: []), \
                mock.patch.object(vaurien, "resolve", resolve), connected_client(proxy) as sock:
            wait_until(lambda: proxy.lookups)
            sock.sendall(b"question")
            up = proxy.connections[1].up
            wait_until(lambda: proxy.loop.run_sync(lambda: bool(up.send_buffer)))
            lookup_may_end.set()
            self.assertEqual(read_exactly(sock, 8), b"question")

    def test_a_delayed_chunk_that_cannot_be_sent_is_not_sent_again(self):
        sent = []

        def serve(sock):
            sock.sendall(sock.recv(100))
            sock.recv(100)
            sock.sendall(b"fails")

        class FailingSocket(vaurien.RawSocket):
            def send(self, data, *flags):
                sent.append(bytes(data))
                if data == b"fails":
                    raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))
                return super().send(data, *flags)

        toxics = [{"type": "latency", "latency": 1}]
        with mock.patch.object(vaurien, "RawSocket", FailingSocket), \
                running_proxy(serve, toxics=toxics) as proxy, \
                connected_client(proxy) as sock:
            self.assertEqual(send_and_read(sock, b"passes"), b"passes")
            sock.sendall(b"please")
            wait_until(lambda: b"fails" in sent)
            proxy.loop.run_sync(int)                # after the callback that has failed
            self.assertEqual(sent, [b"passes", b"passes", b"please", b"fails"])

    def test_a_due_chunk_is_sent_behind_the_bytes_that_the_client_has_not_taken(self):
        """The client takes bytes again, and the timer runs before the selector reports this."""
        size = 8 << 20

        def serve(sock):
            while sock.recv(100):
                sock.sendall(bytes(size))
                sock.recv(100)
                sock.sendall(b"end")

        received = []
        toxics = [{"type": "latency", "latency": 1000}]
        with running_proxy(serve, toxics=toxics) as proxy, connected_client(proxy) as sock:
            loop, clock = proxy.loop, StoppedClock(proxy.loop)
            sock.sendall(b"large")
            wait_until(lambda: proxy.connections and proxy.connections[1].down.received == size)
            connection, down = proxy.connections[1], proxy.connections[1].down
            clock.advance(0.5)
            sock.sendall(b"small")
            wait_until(lambda: down.received == size + 3)
            clock.advance(0.5)                      # the large reply is due, the small one is not
            wait_until(lambda: loop.run_sync(lambda: bool(down.send_buffer)))
            self.assertEqual(loop.run_sync(lambda: down.request_time), 0.0)
            self.assertEqual(len(proxy.latencies.samples), 1)       # of the large reply

            def read_and_call_back():
                clock.now += 1                      # in the loop's thread
                while sock in select.select([sock], [], [], 0.1)[0]:
                    received.append(sock.recv(1 << 20))
                connection.on_timer()

            loop.run_sync(read_and_call_back)
            received.append(read_exactly(sock, size + 3 - len(b"".join(received))))
        self.assertEqual(b"".join(received)[-5:], b"\0\0end")

    def test_bytes_on_which_a_handler_raises_are_not_sent(self):
        def buggy(state, t, to, data):
            if data == b"bad":
                raise KeyError("bug")
            yield t, to, data

        received = []

        def recording_echo(sock):
            with contextlib.suppress(OSError):
                while True:
                    received.append(sock.recv(100))
                    sock.sendall(received[-1])

        with registered(buggy), running_proxy(recording_echo, "100:buggy") as proxy, \
                connected_client(proxy) as sock:
            self.assertEqual(send_and_read(sock, b"good"), b"good")
            with self.assertLogs("vaurien", "ERROR"):
                sock.sendall(b"bad")
                self.assertEqual(read_until_close(sock).ending, "reset")
            self.assertNotIn(b"bad", received)

    def test_bytes_that_an_active_rule_does_not_change_take_the_fast_path(self):
        with running_proxy(echo, "100:latency") as proxy, connected_client(proxy) as sock:
            send_and_read(sock, b"question")
            with mock.patch.object(vaurien.DelayQueue, "put", side_effect=AssertionError):
                for index in range(100):
                    send_and_read(sock, random_data(1 + index))
            set_behavior(proxy, "100:latency", latency={"latency": 5})
            start = time.monotonic()
            send_and_read(sock, b"question")
            self.assertGreaterEqual(time.monotonic() - start, 0.01)

    def test_bulk_without_splice(self):
        data = random_data(1 << 20) * 30
        with mock.patch.object(vaurien, "HAVE_SPLICE", False):
            self.assertEqual(self.download(data), data)
            self.assertEqual(self.pooled_pipes, 0)

    def test_bulk_while_faults_are_added_and_removed(self):
        data = random_data(1 << 20) * 30

        def toxic_setter(*toxics):
            """Return a function that gives these toxics, (kind, attributes), to a proxy."""
            return lambda proxy: proxy.loop.run_sync(proxy.set_toxics, [
                vaurien.Toxic(kind, kind, attributes=attributes) for kind, attributes in toxics])

        stages = [
            toxic_setter(),
            toxic_setter(("latency", {"latency": 5})),
            toxic_setter(("slicer", {"average_size": 1000})),
            toxic_setter(("noop", {})),
            toxic_setter(),
            toxic_setter(("bandwidth", {"rate": 1000000})),
            toxic_setter(),
        ] * 2
        self.assertEqual(self.download(data, stages), data)


class TestSplice(DownloadMixin, unittest.TestCase):
    """The fast path of bulk data, on systems with splice(2).

    In these tests, splicing begins with the first byte.
    """

    def setUp(self):
        patch = mock.patch.object(vaurien, "SPLICE_AFTER", 0)
        patch.start()
        self.addCleanup(patch.stop)

    def test_bulk_goes_through_a_kernel_pipe(self):
        data = random_data(1 << 20) * 30
        for full_reads in 0, 4:
            with self.subTest(full_reads=full_reads):
                with mock.patch.object(vaurien, "SPLICE_AFTER", full_reads):
                    self.assertEqual(self.download(data, [lambda proxy: None] * 3), data)
                if full_reads == 0:         # otherwise there may have been no full reads
                    self.assertTrue(self.pooled_pipes)
                self.assertLessEqual(self.pooled_pipes, vaurien.KERNEL_PIPES_POOLED)

    def test_bulk_arrives_where_the_system_refuses_a_pipe_or_a_splice(self):
        data = random_data(1 << 20) * 10
        for name, code in [("pipe2", errno.EMFILE),
                           ("splice", errno.EINVAL),
                           ("splice", errno.ENOSYS)]:
            error = OSError(code, os.strerror(code))
            with self.subTest(name, error=errno.errorcode[code]):
                with mock.patch.object(os, name, side_effect=error) as refused:
                    self.assertEqual(self.download(data), data)
                self.assertTrue(refused.called)
        with self.subTest("F_SETPIPE_SZ"), mock.patch.object(vaurien, "F_SETPIPE_SZ", -1):
            self.assertEqual(self.download(data), data)

    def test_pipes_are_closed_or_pooled_if_the_client_closes_while_they_are_full(self):
        def send_on_request(sock):
            with contextlib.suppress(OSError):
                read_exactly(sock, len(b"go"))
                sock.sendall(random_data(1 << 20) * 24)

        def has_full_pipe(proxy):
            return any(isinstance(data, vaurien.KernelPipe)
                       for connection in list(proxy.connections.values())
                       for data in list(connection.down.send_buffer))

        def descriptor_count():
            return len(os.listdir("/proc/self/fd"))

        for close in close_with_reset, socket.socket.close:
            with self.subTest(close.__name__), running_proxy(send_on_request) as proxy:
                count_before = descriptor_count()
                for _ in range(5):
                    with connected_client(proxy) as sock:
                        sock.sendall(b"go")
                        read_exactly(sock, 1 << 20)
                        wait_until(lambda: has_full_pipe(proxy))
                        close(sock)
                        wait_until(lambda: not proxy.connections)
                self.assertEqual(proxy.loop.budget.held, 0)
                pooled_pipes = proxy.loop.run_sync(lambda: len(proxy.loop.pipe_pool))
                wait_until(lambda: descriptor_count() <= count_before + 2 * pooled_pipes)


if not vaurien.HAVE_SPLICE:
    del TestSplice


# -- Proxy ----------------------------------------------------------------------


class TestProxyFaults(unittest.TestCase):
    """The effects of a proxy's rules on a client and a backend."""

    def test_delay_delays_the_requests_it_is_drawn_for(self):
        options = {"delay": {"sleep": 0.01}}
        with running_proxy(echo, "30:delay", seed=1, options=options) as proxy:
            late_requests = set()
            with connected_client(proxy) as sock:
                for request in range(1, 41):
                    start = time.monotonic()
                    send_and_read(sock, b"question")
                    if time.monotonic() - start >= 0.01:
                        late_requests.add(request)
            drawn_requests = {record.request for record in proxy.events()}
            self.assertTrue(5 < len(drawn_requests) < 25)
            self.assertLessEqual(drawn_requests, late_requests)         # is a subset

    def test_the_same_seed_delays_the_same_of_200_requests(self):
        options = {"delay": {"sleep": 0.001}}
        runs = []
        for _ in range(2):
            with running_proxy(echo, "20:delay", seed=1, options=options) as proxy:
                for _ in range(20):
                    with connected_client(proxy) as sock:
                        for _ in range(10):
                            send_and_read(sock, b"question")
                runs.append([(record.connection, record.request) for record in proxy.events()])
        first_run, second_run = runs
        self.assertEqual(first_run, second_run)
        self.assertTrue(20 < len(first_run) < 70, len(first_run))

    def test_delay_waits_before_connecting_to_the_backend_or_before_the_reply(self):
        for before in True, False:
            with self.subTest(before=before):
                accept_times = []

                def record_time_and_echo(sock):
                    accept_times.append(time.monotonic())
                    echo(sock)

                options = {"delay": {"sleep": 0.1, "before": before}}
                with running_proxy(record_time_and_echo, "100:delay", options=options) as proxy:
                    start = time.monotonic()
                    with connected_client(proxy) as sock:
                        send_and_read(sock, b"question")
                        self.assertGreaterEqual(time.monotonic() - start, 0.1)
                connected_late = accept_times[0] - start >= 0.1
                self.assertEqual(connected_late, before)

    def test_a_reply_is_cut_and_the_connection_closed_or_reset(self):
        for how, ending in ("close", "eof"), ("reset", "reset"):
            with self.subTest(how), running_proxy(echo) as proxy, \
                    connected_client(proxy) as sock, proxy.handler("cut", bytes=4, how=how):
                self.assertEqual(send_and_read(sock, b"abc"), b"abc")
                sock.sendall(b"question")
                received = read_until_close(sock)
                self.assertEqual((received.size, received.ending), (4, ending))
                self.assertEqual(proxy.faults, {"cut": 1})

    def test_a_reply_that_hangs_in_its_middle_is_completed_when_the_rule_is_removed(self):
        with running_proxy(echo) as proxy, connected_client(proxy) as sock:
            with proxy.handler("cut", bytes=4, how="hang"):
                sock.sendall(b"question")
                self.assertEqual(read_exactly(sock, 4), b"ques")
                wait_until(lambda: proxy.loop.budget.held)
            self.assertEqual(read_exactly(sock, 4), b"tion")
            self.assertEqual(send_and_read(sock, b"again"), b"again")

    def test_blackout_closes_the_client_without_connecting_to_the_backend(self):
        with running_proxy(echo, "100:blackout") as proxy:
            with connected_client(proxy) as sock:
                self.assertEqual(read_until_close(sock).size, 0)
            wait_until(lambda: not proxy.connections)
            self.assertEqual(proxy.backend_results, [])
            self.assertEqual(proxy.faults, {"blackout": 1})

    def test_blackout_in_the_middle_of_a_connection_closes_both_sides(self):
        with running_proxy(echo) as proxy, connected_client(proxy) as sock:
            send_and_read(sock, b"question")
            set_behavior(proxy, "100:blackout")
            sock.sendall(b"another")
            self.assertEqual(read_until_close(sock).size, 0)
            wait_until(lambda: not proxy.connections and proxy.backend_results)

    def test_abort_delivers_the_request_and_then_closes_the_client(self):
        def reply_once(sock):
            request = read_exactly(sock, len(b"question"))
            sock.sendall(b"answer")
            read_until_close(sock)
            return request

        with running_proxy(reply_once, "100:abort") as proxy, connected_client(proxy) as sock:
            sock.sendall(b"question")
            self.assertEqual(read_until_close(sock).size, 0)
            wait_until(lambda: proxy.backend_results)
            self.assertEqual(proxy.backend_results, [b"question"])

    def test_error_replaces_the_reply_and_the_next_request_works(self):
        with running_proxy(echo, "100:error") as proxy, connected_client(proxy) as sock:
            sock.sendall(b"question")
            self.assertNotIn(b"question", read_exactly(sock, ERROR_SIZE))
            set_behavior(proxy, "100:dummy")
            self.assertEqual(send_and_read(sock, b"question"), b"question")

    def test_error_injects_into_the_valid_reply(self):
        with running_proxy(echo, "100:error", options={"error": {"inject": True}}) as proxy:
            with connected_client(proxy) as sock:
                sock.sendall(b"leftright")
                reply = read_exactly(sock, len(b"leftright") + INJECTED_SIZE)
                self.assertEqual((reply[:4], reply[-5:]), (b"left", b"right"))

    def test_transient_fails_once_for_the_whole_proxy(self):
        with running_proxy(echo, "100:transient") as proxy:
            with connected_client(proxy) as one, connected_client(proxy) as two:
                one.sendall(b"question")
                self.assertNotIn(b"question", read_exactly(one, ERROR_SIZE))
                for sock in one, two, one:
                    self.assertEqual(send_and_read(sock, b"question"), b"question")

    def test_a_delay_behind_a_rule_that_held_all_bytes_does_not_hold_them_for_ever(self):
        """The delay kept the time that the removed rule had given the first bytes."""
        for type_ in "hang", "bandwidth":
            toxics = [{"type": type_, "stream": "both"},
                      {"type": "delay", "sleep": 0.001, "stream": "both"}]
            with self.subTest(type_), running_proxy(echo, toxics=toxics) as proxy, \
                    connected_client(proxy) as sock:
                sock.sendall(b"abc")
                wait_until(lambda: proxy.loop.run_sync(proxy.list_connections)[0]["bytes_up"] == 3)
                proxy.loop.run_sync(proxy.set_toxics, proxy.toxics[1:])
                self.assertEqual(send_and_read_all(sock, b"def").size, 6)

    def test_hang_delivers_all_bytes_after_it_is_removed(self):
        data = random_data(3000000)
        with running_proxy(echo, "100:hang") as proxy, connected_client(proxy) as sock:
            thread = threading.Thread(target=sock.sendall, args=(data,))
            thread.start()
            budget = proxy.loop.budget
            wait_until(lambda: budget.held > vaurien.HELD_MAX_IDLE // 2)
            self.assertEqual(proxy.backend_results, [])
            set_behavior(proxy, "100:dummy")
            self.assertEqual(read_exactly(sock, len(data)), data)
            thread.join(TIMEOUT)
            sock.shutdown(socket.SHUT_WR)
            self.assertEqual(read_until_close(sock).ending, "eof")

    def test_a_new_rule_acts_on_the_first_request_of_a_connection_that_was_already_open(self):
        with running_proxy(echo) as proxy, connected_client(proxy) as sock:
            wait_until(lambda: proxy.connections)
            set_behavior(proxy, "100:error")
            sock.sendall(b"question")
            self.assertNotIn(b"question", read_exactly(sock, ERROR_SIZE))

    def test_hang_keeps_its_bytes_while_another_rule_is_added(self):
        hang = vaurien.Rule("hang")
        with running_proxy(echo) as proxy, connected_client(proxy) as sock:
            proxy.loop.run_sync(proxy.set_rules, [hang])
            sock.sendall(b"question")
            wait_until(lambda: proxy.loop.budget.held)
            delay = vaurien.Rule("delay", {"sleep": 0.0}, draw_key="b")
            proxy.loop.run_sync(proxy.set_rules, [hang, delay])
            self.assertTrue(proxy.loop.budget.held)
            self.assertFalse(select.select([sock], [], [], 0.05)[0])
            proxy.loop.run_sync(proxy.set_rules, [])
            self.assertEqual(read_exactly(sock, 8), b"question")

    def test_a_delayed_reply_arrives_although_the_backend_has_closed(self):
        def reply_and_close(sock):
            read_exactly(sock, len(b"question"))
            sock.sendall(b"answer")

        options = {"delay": {"sleep": 0.1, "before": False}}
        with running_proxy(reply_and_close, "100:delay", options=options) as proxy, \
                connected_client(proxy) as sock:
            sock.sendall(b"question")
            wait_until(lambda: proxy.backend_results)           # the backend has closed
            for _ in range(5):
                sock.sendall(b"more")
                time.sleep(0.01)
            self.assertEqual(read_exactly(sock, len(b"answer")), b"answer")

    def test_hang_does_not_keep_the_connection_of_a_client_that_resets(self):
        with running_proxy(echo, "100:hang") as proxy:
            sock = connect(proxy.port)
            sock.sendall(b"question")
            wait_until(lambda: proxy.loop.budget.held > vaurien.CHUNK_OVERHEAD * 2)
            close_with_reset(sock)
            wait_until(lambda: not proxy.connections)


class TestProxyBackpressure(unittest.TestCase):
    """The proxy holds a limited number of bytes. At the limit, it stops reading."""

    def test_a_full_buffer_costs_no_cpu_time(self):
        """The loop does not watch a socket that must not be read, so the loop sleeps."""
        with running_proxy(echo, "100:hang") as proxy, connected_client(proxy) as sock:
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    sock.send(bytes(1 << 16))
            wait_until(lambda: proxy.loop.budget.held > vaurien.HELD_MAX_IDLE // 2)
            iterations, run_timers = [], proxy.loop.run_timers
            proxy.loop.run_timers = lambda: (iterations.append(1), run_timers())
            time.sleep(0.1)
            proxy.loop.run_sync(int)
            self.assertLess(len(iterations), 10)

    def test_a_slow_reader_slows_the_sender_down(self):
        """The memory of the fast path and of the slow path is limited, and no byte is lost."""
        held_limit = 2 * max(vaurien.HELD_MAX_IDLE, vaurien.KERNEL_PIPE_SIZE)
        unlimited = 1 << 27         # bytes that only a proxy without backpressure would read
        for behavior in "100:dummy", "100:hang":
            may_read = threading.Event()

            def read_late(sock):
                may_read.wait(TIMEOUT)
                return read_until_close(sock)

            with self.subTest(behavior), running_proxy(read_late, behavior) as proxy, \
                    connected_client(proxy) as sock:
                sock.setblocking(False)
                data, sent_count = random_data(1 << 16), 0
                while sent_count < unlimited and select.select([], [sock], [], 0.05)[1]:
                    with contextlib.suppress(BlockingIOError):
                        sent_count += sock.send(data[sent_count % len(data):])
                    self.assertLessEqual(proxy.loop.budget.held, held_limit)
                self.assertLess(sent_count, unlimited)
                wait_until(lambda: proxy.loop.budget.held > vaurien.CHUNK_OVERHEAD * 2)
                may_read.set()
                set_behavior(proxy, "100:dummy")
                sock.close()
                wait_until(lambda: proxy.backend_results)
                received, = proxy.backend_results
                self.assertEqual(received.size, sent_count)

    def test_a_slow_reader_does_not_block_other_connections(self):
        size = 20000000

        def send_much(sock):
            sock.sendall(random_data(size))

        with running_proxy(send_much) as proxy, connected_client(proxy) as slow, \
                connected_client(proxy) as quick:
            self.assertEqual(read_until_close(quick).size, size)
            self.assertEqual(read_until_close(slow).size, size)

    def test_the_budget_gets_back_the_bytes_that_are_sent(self):
        size = 20000000

        def send_and_wait(sock):
            sock.sendall(random_data(size))
            return read_until_close(sock)

        with running_proxy(send_and_wait) as proxy, connected_client(proxy) as sock:
            wait_until(lambda: proxy.loop.budget.held)
            read_exactly(sock, size)
            wait_until(lambda: not proxy.loop.run_sync(lambda: proxy.loop.budget.held))

    def test_a_delay_does_not_limit_the_bandwidth(self):
        """The proxy holds 8 MiB of delayed bytes before the backend receives the first one."""
        data = random_data(8 << 20)
        options = {"delay": {"sleep": 30.0}}
        with running_proxy(read_until_close, "100:delay", options=options) as proxy:
            with connected_client(proxy) as sock:
                sock.sendall(data)
                self.assertEqual(proxy.backend_results, [])
                set_behavior(proxy, "100:dummy")
                sock.shutdown(socket.SHUT_WR)
                wait_until(lambda: proxy.backend_results)
        self.assertEqual(proxy.backend_results,
                         [Received(len(data), hashlib.sha1(data).hexdigest(), "eof")])


class TestProxyConnects(unittest.TestCase):
    """Resolution of the backend's name, and the connection to the backend."""

    def test_the_connect_timeout_ends_when_the_backend_is_connected(self):
        with running_proxy(echo, timeout=0.05) as proxy, connected_client(proxy) as sock:
            send_and_read(sock, b"question")
            self.assertFalse(select.select([sock], [], [], 0.1)[0])
            send_and_read(sock, b"question")

    def test_a_refused_connection_closes_the_client_and_logs_one_line(self):
        with OpenProxy("127.0.0.1:%d" % unused_port(), "127.0.0.1:0") as proxy:
            with self.assertLogs("vaurien", "WARNING") as logged, connected_client(proxy) as sock:
                self.assertEqual(read_until_close(sock).size, 0)
                wait_until(lambda: not proxy.connections)
        self.assertEqual(len(logged.output), 1)
        self.assertIn("cannot connect to backend 127.0.0.1:", logged.output[0])
        self.assertIn("Connection refused", logged.output[0])
        self.assertEqual(proxy.failures, 1)

    def test_a_socket_that_connects_to_itself_counts_as_refused(self):
        """Without a backend on a local port, a socket may get this port and connect to itself."""
        class SelfConnecting(socket.SocketType):
            reports_success = True      # whether connect_ex() returns 0

            def connect_ex(self, address):
                with contextlib.suppress(OSError):      # it is bound already
                    self.bind(address)
                error = super().connect_ex(address)
                return error if self.reports_success else errno.EINPROGRESS

        for reports_success in True, False:
            with self.subTest(reports_success=reports_success), \
                    mock.patch.object(SelfConnecting, "reports_success", reports_success), \
                    mock.patch.object(vaurien, "RawSocket", SelfConnecting), \
                    OpenProxy("127.0.0.1:%d" % unused_port(), "127.0.0.1:0") as proxy, \
                    self.assertLogs("vaurien", "WARNING") as logged, \
                    connected_client(proxy) as sock:
                sock.sendall(b"question")
                self.assertEqual(read_until_close(sock).size, 0)
                wait_until(lambda: not proxy.connections)
                self.assertIn("Connection refused", *logged.output)
                # The backend can listen on its port.
                _, port = proxy.backend
                with contextlib.closing(socket.socket()) as backend:
                    backend.bind(("127.0.0.1", port))
                    backend.listen(1)

    def test_every_address_of_the_backend_is_tried(self):
        with backend_server(echo) as (port, _), silent_address() as silent:
            with OpenProxy("127.0.0.1:%d" % port, "127.0.0.1:0", timeout=0.6) as proxy:
                addresses = [(socket.AF_INET, ("127.0.0.1", unused_port())),
                             (socket.AF_INET, ("127.0.0.1", silent)),
                             (socket.AF_INET, ("127.0.0.1", port))]
                with mock.patch.object(vaurien, "resolve_numeric", lambda *_: addresses):
                    with connected_client(proxy) as sock:
                        self.assertEqual(send_and_read(sock, b"question"), b"question")

    def test_each_address_of_the_backend_has_its_share_of_the_time(self):
        with silent_address() as silent, OpenProxy("some.example:1", "127.0.0.1:0",
                                                   timeout=60) as proxy:
            addresses = [(socket.AF_INET, ("127.0.0.1", silent))] * 3
            with mock.patch.object(vaurien, "resolve", lambda *args, **kwargs: addresses):
                with connected_client(proxy):
                    before = proxy.loop.clock()
                    wait_until(lambda: any(connection.backend
                                           for connection in proxy.connections.values()))
                    connection, = proxy.connections.values()
                    due = proxy.loop.run_sync(
                        lambda: connection.deadline_timer[vaurien.DUE])
                    self.assertGreaterEqual(due, connection.connect_deadline - 60 + 20)
                    self.assertLessEqual(due, before + (connection.connect_deadline - before) / 3
                                         + (proxy.loop.clock() - before))

    def test_a_silent_backend_times_out_and_does_not_block_other_connections(self):
        with silent_address() as silent, backend_server(echo) as (port, _):
            with OpenProxy("127.0.0.1:%d" % silent, "127.0.0.1:0", timeout=0.1) as proxy:
                start = time.monotonic()
                with self.assertLogs("vaurien", "WARNING") as logged, \
                        connected_client(proxy) as waiting:
                    wait_until(lambda: proxy.connections)
                    proxy.set_backend(("127.0.0.1", port))
                    with connected_client(proxy) as sock:
                        self.assertEqual(send_and_read(sock, b"question"), b"question")
                    read_until_close(waiting)
                    self.assertGreaterEqual(time.monotonic() - start, 0.1)
                self.assertIn("timed out", logged.output[0])

    def test_a_name_is_resolved_in_a_thread_and_once_for_all_waiting_connections(self):
        gate, names = threading.Event(), []

        def resolve(address, *_, **__):
            name, port = address
            names.append(name)
            gate.wait(TIMEOUT)
            return [(socket.AF_INET, ("127.0.0.1", port))]

        with backend_server(echo) as (port, _), \
                OpenProxy("name.invalid:%d" % port, "127.0.0.1:0") as proxy, \
                mock.patch.object(vaurien, "resolve_numeric", lambda *_: []), \
                mock.patch.object(vaurien, "resolve", resolve), \
                contextlib.ExitStack() as stack:
            socks = [stack.enter_context(connected_client(proxy)) for _ in range(5)]
            for sock in socks:
                sock.sendall(b"question")
            wait_until(lambda: len(proxy.connections) == 5)
            proxy.loop.run_sync(int)            # the loop is not blocked
            gate.set()
            for sock in socks:
                self.assertEqual(read_exactly(sock, 8), b"question")
        self.assertEqual(names, ["name.invalid"])

    def test_an_unknown_name_closes_the_client(self):
        def resolve(*_, **__):
            raise socket.gaierror(-2, "Name or service not known")

        with OpenProxy("name.invalid:80", "127.0.0.1:0") as proxy:
            with mock.patch.object(vaurien, "resolve_numeric", lambda *_: []), \
                    mock.patch.object(vaurien, "resolve", resolve), \
                    self.assertLogs("vaurien", "WARNING") as logged, \
                    connected_client(proxy) as sock:
                self.assertEqual(read_until_close(sock).size, 0)
        self.assertIn("Name or service not known", logged.output[0])

    def test_a_thread_that_cannot_start_is_an_error_of_its_task(self):
        loop, outcomes = vaurien.Loop(), []
        with mock.patch.object(threading.Thread, "start", side_effect=RuntimeError("no thread")):
            loop.run_in_thread(
                int, lambda result, error: (outcomes.append((result, error)), loop.stop()))
        loop.run()
        loop.close()
        (result, error), = outcomes
        self.assertIsNone(result)
        self.assertEqual(str(error), "no thread")


class TestProxyListener(unittest.TestCase):
    """Listening sockets, and the clients they accept."""

    def test_localhost_listens_on_one_port_in_both_address_families(self):
        with backend_server(echo) as (port, _), OpenProxy("localhost:%d" % port) as proxy:
            families = [listener.family for listener in proxy.listener.sockets]
            for listener in proxy.listener.sockets:
                host, port, *_ = listener.getsockname()
                with self.subTest(host), contextlib.closing(connect(port, host)) as sock:
                    self.assertEqual(port, proxy.port)
                    self.assertEqual(send_and_read(sock, b"question"), b"question")
            self.assertIn(socket.AF_INET, families)
            if has_ipv6():
                self.assertIn(socket.AF_INET6, families)

    def test_localhost_listens_on_ipv4_alone_on_a_machine_without_ipv6(self):
        real_bind_listener = vaurien.bind_listener

        def bind_listener(family, *args):
            if family == socket.AF_INET6:
                raise OSError(errno.EADDRNOTAVAIL, "Cannot assign requested address")
            return real_bind_listener(family, *args)

        with mock.patch.object(vaurien, "bind_listener", bind_listener):
            with OpenProxy("127.0.0.1:9") as proxy:
                self.assertEqual(len(proxy.listener.sockets), 1)

    def test_a_port_in_use_is_an_error_that_names_it_and_leaves_nothing_open(self):
        with contextlib.closing(socket.socket()) as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen(1)
            port = taken.getsockname()[1]
            with self.assertRaisesRegex(OSError, "cannot listen on 127.0.0.1:%d: Address" % port):
                OpenProxy("127.0.0.1:9", "localhost:%d" % port).__enter__()

    def test_tcp_nodelay_is_set_on_both_sides(self):
        with running_proxy(echo) as proxy, connected_client(proxy) as sock:
            send_and_read(sock, b"question")
            connection, = proxy.connections.values()
            for side in "client", "backend":
                with self.subTest(side):
                    side_socket = getattr(connection, side)
                    self.assertTrue(side_socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    def test_urgent_bytes_keep_their_place_in_the_stream(self):
        with running_proxy(greet_urgently) as proxy, connected_client(proxy) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
            self.assertEqual(read_exactly(sock, 7), b"hello!?")
            sock.sendall(b"abc")
            sock.send(b"!", socket.MSG_OOB)
            sock.sendall(b"def")
            self.assertEqual(read_exactly(sock, 7), b"abc!def")

    def test_accepting_pauses_while_no_descriptor_is_free(self):
        with running_proxy(echo) as proxy, connected_client(proxy) as open_before:
            send_and_read(open_before, b"question")
            listener = proxy.listener.sockets[0]
            error = OSError(errno.EMFILE, "Too many open files")
            with mock.patch.object(vaurien, "RETRY_DELAY", 0.05), \
                    self.assertLogs("vaurien", "WARNING") as logged:
                proxy.loop.run_sync(lambda: (proxy.loop.unwatch(listener),
                                             proxy.listener.pause(listener, error)))
                self.assertEqual(send_and_read(open_before, b"question"), b"question")
                with connected_client(proxy) as sock:
                    self.assertEqual(send_and_read(sock, b"question"), b"question")
            self.assertIn("Too many open files", logged.output[0])

    def test_accepting_pauses_while_the_selector_is_full(self):
        with mock.patch.object(vaurien, "RETRY_DELAY", 0.05), \
                running_proxy(echo, loop_class=SelectLoop) as proxy:
            # The listener, the wakeup socket, and the two sockets of each of two connections.
            proxy.loop.socket_limit = 6
            with connected_client(proxy) as one, connected_client(proxy) as two:
                for sock in one, two:
                    send_and_read(sock, b"question")
                with self.assertLogs("vaurien", "WARNING"), connected_client(proxy) as three:
                    three.sendall(b"question")
                    wait_until(lambda: proxy.listener.last_warning)
                    one.close()
                    self.assertEqual(read_exactly(three, 8), b"question")

    def test_the_accept_burst_grows_while_clients_wait_and_halves_when_none_is_left(self):
        fd_and_address = -1, ("127.0.0.1", 1)
        listener = mock.Mock(_accept=mock.Mock(return_value=fd_and_address))
        with running_proxy(echo) as proxy, mock.patch.object(vaurien, "RawSocket"), \
                mock.patch.object(proxy.listener, "on_accept") as on_accept:
            burst_sizes = []

            def accept_burst():
                proxy.loop.run_sync(proxy.listener.accept, listener, selectors.EVENT_READ)
                burst_sizes.append(on_accept.call_count - sum(burst_sizes))

            proxy.listener.sockets.append(listener)
            for _ in range(30):
                accept_burst()
            # The first bursts accept one client each: a single client costs one system call.
            self.assertEqual(burst_sizes[:4], [1, 1, 1, 1])
            self.assertEqual(burst_sizes[-1], vaurien.ACCEPT_BURST)
            self.assertEqual(burst_sizes, sorted(burst_sizes))
            listener._accept.side_effect = [fd_and_address, BlockingIOError()]
            accept_burst()
            listener._accept.side_effect = None
            accept_burst()
            self.assertEqual(burst_sizes[-2:], [1, vaurien.ACCEPT_BURST // 2])
            proxy.listener.sockets.remove(listener)

    def test_a_request_sent_before_the_accept_is_forwarded_in_the_same_iteration(self):
        with contextlib.ExitStack() as stack:
            listener = stack.enter_context(contextlib.closing(listening_socket()))
            proxy = OpenProxy("127.0.0.1:%d" % listener.getsockname()[1], "127.0.0.1:0")
            proxy.bind()
            client = stack.enter_context(contextlib.closing(connect(proxy.local[1])))
            client.sendall(b"question")
            loop = vaurien.Loop()
            stack.callback(loop.close)
            stack.callback(proxy.close)
            proxy.open(loop)
            (callback, events), = loop.selector.select(TIMEOUT)
            callback(events)
            if vaurien.LINUX:       # other systems may still be connecting to the backend
                listener.settimeout(TIMEOUT)
                backend = stack.enter_context(contextlib.closing(listener.accept()[0]))
                backend.settimeout(TIMEOUT)
                self.assertEqual(read_exactly(backend, 8), b"question")

    def test_a_client_that_resets_before_it_is_accepted_is_closed(self):
        client = mock.Mock(getpeername=mock.Mock(side_effect=OSError("gone")))
        with running_proxy(echo) as proxy:
            listener = mock.Mock(_accept=mock.Mock(
                side_effect=[(-1, None), ConnectionAbortedError(), BlockingIOError()]))
            proxy.listener.sockets.append(listener)
            proxy.listener.burst = 3
            with mock.patch.object(vaurien, "RawSocket", return_value=client):
                proxy.loop.run_sync(proxy.listener.accept, listener, selectors.EVENT_READ)
            self.assertEqual(listener._accept.call_count, 3)
            proxy.listener.sockets.remove(listener)
            client.close.assert_called_once_with()
            # An event of a listener that has been closed has no effect.
            proxy.loop.run_sync(proxy.listener.accept, listener, selectors.EVENT_READ)
            with connected_client(proxy) as sock:
                send_and_read(sock, b"question")


class TestAccept(unittest.TestCase):
    """New clients while `accept` is normal, refuse or drop."""

    HOSTS = ["127.0.0.1", "::1"] if has_ipv6() else ["127.0.0.1"]

    @contextlib.contextmanager
    def proxy(self):
        """Yield (proxy on localhost, a client that was connected before)."""
        with backend_server(echo) as (port, _), \
                OpenProxy("127.0.0.1:%d" % port) as proxy, connected_client(proxy) as sock:
            send_and_read(sock, b"question")
            yield proxy, sock

    def assert_refused(self, port):
        for host in self.HOSTS:
            with self.subTest(host), self.assertRaises(ConnectionRefusedError):
                connect(port, host)

    def assert_served(self, port):
        for host in self.HOSTS:
            with self.subTest(host), contextlib.closing(connect(port, host)) as sock:
                self.assertEqual(send_and_read(sock, b"question"), b"question")

    @contextlib.contextmanager
    def waiting_clients(self, port):
        """Yield a client for each address; none is connected. Each sends a question."""
        with contextlib.ExitStack() as stack:
            socks = []
            for host in self.HOSTS:
                family = socket.AF_INET6 if ":" in host else socket.AF_INET
                sock = stack.enter_context(contextlib.closing(socket.socket(family)))
                sock.setblocking(False)
                sock.connect_ex((host, port))
                socks.append(sock)
            self.assertEqual(select.select([], socks, socks, 0.03), ([], [], []))
            yield socks

    def assert_dropped(self, port):
        with self.waiting_clients(port):
            pass

    def test_connects_are_refused_or_dropped_and_open_connections_continue(self):
        checks = {"normal": self.assert_served, "refuse": self.assert_refused,
                  "drop": self.assert_dropped}
        with self.proxy() as (proxy, sock):
            # Each mode follows each other one, and itself.
            for before, after in itertools.product(checks, repeat=2):
                with self.subTest("%s, then %s" % (before, after)):
                    for accept in before, after, after:
                        proxy.set_accept(accept)
                    accepted = proxy.accepted
                    checks[after](proxy.port)
                    self.assertEqual(proxy.get_accept(), after)
                    self.assertEqual(proxy.accepted - accepted,
                                     len(self.HOSTS) if after == "normal" else 0)
                    self.assertEqual(send_and_read(sock, b"question"), b"question")
                    self.assertEqual(proxy.loop.run_sync(
                        lambda: [listener.fileno() in proxy.loop.watched
                                 for listener in proxy.listener.sockets]),
                        [after == "normal"] * len(self.HOSTS))

    @classmethod
    def setUpClass(cls):
        """Start clients that wait. They try again after a second; other tests run meanwhile."""
        case, cls.stack = cls(), contextlib.ExitStack()
        proxy, _ = cls.stack.enter_context(case.proxy())
        with proxy.dropping():
            cls.socks = cls.stack.enter_context(case.waiting_clients(proxy.port))
        case.assert_served(proxy.port)          # a new connect does not wait

    @classmethod
    def tearDownClass(cls):
        cls.stack.close()

    def test_waiting_clients_are_connected_after_the_block(self):
        for sock in self.socks:
            sock.setblocking(True)
            sock.settimeout(TIMEOUT)
            self.assertTrue(select.select([], [sock], [], TIMEOUT)[1])
            self.assertEqual(send_and_read(sock, b"question"), b"question")

    def test_clients_in_the_backlog_are_served(self):
        for accept in "refuse", "drop":
            with self.subTest(accept), self.proxy() as (proxy, _), \
                    contextlib.ExitStack() as stack:

                port = proxy.port

                def fill_backlog():
                    """Connect while the loop cannot accept, because this runs in its thread."""
                    socks = [stack.enter_context(contextlib.closing(connect(port, host)))
                             for host in self.HOSTS for _ in range(100)]
                    proxy._server.set_accept(vaurien.Accept(accept))
                    return socks

                socks = proxy.loop.run_sync(fill_backlog)
                for sock in socks:
                    self.assertEqual(send_and_read(sock, b"question"), b"question")
                self.assertEqual(proxy.accepted, 1 + len(socks))

    def test_fillers_are_no_clients_and_are_closed(self):
        with self.proxy() as (proxy, _):
            with self.assertLogs("vaurien", "DEBUG") as logged:
                for _ in range(5):
                    with proxy.dropping():
                        fillers = dict(proxy.listener.fillers)
                        self.assertEqual(len(proxy.connections), 1)
                    self.assertGreaterEqual(len(fillers), len(self.HOSTS))
                    wait_until(lambda: not proxy.listener.fillers)
                    self.assertEqual([filler.fileno() for filler in fillers.values()],
                                     [-1] * len(fillers))
            self.assertEqual([line.partition("vaurien:")[2] for line in logged.output],
                             ["accept: drop", "accept: normal"] * 5)
            self.assertEqual((proxy.accepted, proxy.events()), (1, []))

    def test_a_filler_that_hangs_is_closed_before_it_could_connect(self):
        with self.proxy() as (proxy, _):

            def drop_and_heal():
                proxy._server.set_accept(vaurien.Accept("drop"))
                hanging = [filler for filler in proxy.listener.fillers.values()
                           if not vaurien.is_connected(filler)]
                proxy._server.set_accept(vaurien.Accept())
                return [filler.fileno() for filler in hanging]

            self.assertEqual(proxy.loop.run_sync(drop_and_heal), [-1] * len(self.HOSTS))

    def test_a_proxy_that_stops_closes_the_fillers(self):
        with self.proxy() as (proxy, _):
            proxy.set_accept("drop")
            fillers = list(proxy.listener.fillers.values())
        self.assertEqual([filler.fileno() for filler in fillers], [-1] * len(fillers))

    def test_no_other_program_can_take_the_port_of_a_proxy_that_refuses(self):
        class Unlike(socket.SocketType):
            """On other systems than Linux, shutdown() of a listening socket fails."""
            def shutdown(self, how):
                if how == socket.SHUT_RD:
                    raise OSError(errno.ENOTCONN, "Socket is not connected")
                super().shutdown(how)

        for raw_socket in vaurien.RawSocket, Unlike:
            with self.subTest(raw_socket), \
                    mock.patch.object(vaurien, "RawSocket", raw_socket), \
                    self.proxy() as (proxy, sock):
                port = proxy.port
                with proxy.refusing():
                    self.assert_refused(port)
                    for host in self.HOSTS:
                        family = socket.AF_INET6 if ":" in host else socket.AF_INET
                        with contextlib.closing(socket.socket(family)) as other, \
                                self.assertRaises(OSError) as caught:
                            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                            other.bind((host, port))
                        self.assertEqual(caught.exception.errno, errno.EADDRINUSE)
                self.assertEqual(proxy.port, port)
                self.assert_served(port)
                self.assertEqual(send_and_read(sock, b"question"), b"question")

    def test_a_proxy_may_begin_with_each_mode(self):
        for accept, check in ("refuse", self.assert_refused), ("drop", self.assert_dropped):
            with self.subTest(accept), backend_server(echo) as (port, _), \
                    self.assertLogs("vaurien", "INFO") as logged, \
                    OpenProxy("127.0.0.1:%d" % port, accept=accept) as proxy:
                self.assertRegex(logged.output[0], "listening on .*; accept %s$" % accept)
                check(proxy.port)
                proxy.set_accept("normal")
                self.assert_served(proxy.port)
                self.assertEqual(proxy.accepted, len(self.HOSTS))

    def test_a_disabled_proxy_keeps_the_mode_and_a_moved_one_too(self):
        with self.proxy() as (proxy, _):
            proxy.set_accept("refuse")
            with proxy.down():
                self.assert_refused(proxy.port)
                proxy.set_accept("drop")
                self.assert_refused(proxy.port)
            self.assert_dropped(proxy.port)
            before = proxy.port
            proxy._proxies.change(proxy._server, ("localhost", 0), proxy.backend, enabled=True)
            self.assertNotEqual(proxy.port, before)
            self.assert_refused(before)
            self.assert_dropped(proxy.port)
            proxy.set_accept("normal")
            self.assert_served(proxy.port)

    def test_blocks_restore_the_mode_from_before_and_reset_ends_it(self):
        with self.proxy() as (proxy, _):
            with proxy.refusing():
                with proxy.dropping():
                    self.assertEqual(proxy.get_accept(), "drop")
                self.assertEqual(proxy.get_accept(), "refuse")
                self.assert_refused(proxy.port)
            self.assertEqual(proxy.get_accept(), "normal")
            proxy.set_accept("drop")
            proxy.reset()
            self.assertEqual(proxy.get_accept(), "normal")
            self.assert_served(proxy.port)

    def test_accepting_that_pauses_does_not_begin_again_in_another_mode(self):
        with mock.patch.object(vaurien, "RETRY_DELAY", 0.02), self.proxy() as (proxy, _):
            listener, loop = proxy.listener, proxy.loop
            loop.run_sync(lambda: [listener.pause(sock, "no descriptors")
                                   for sock in listener.sockets])
            proxy.set_accept("drop")
            resumed = threading.Event()
            loop.run_sync(lambda: loop.call_at(loop.clock() + 0.02, resumed.set))
            self.assertTrue(resumed.wait(TIMEOUT))
            self.assertTrue(loop.run_sync(lambda: {sock.fileno() for sock in listener.sockets}
                                          .isdisjoint(loop.watched)))
            # An event from before the change is too late.
            loop.run_sync(listener.accept, listener.sockets[0], selectors.EVENT_READ)
            self.assert_dropped(proxy.port)
            proxy.set_accept("normal")
            self.assert_served(proxy.port)

    def test_a_mode_that_is_not_possible_is_an_error_and_changes_nothing(self):
        no_descriptors = OSError(errno.EMFILE, "Too many open files")
        for patch, message in (
                (mock.patch.object(vaurien, "is_connected", return_value=True),
                 "cannot drop clients: this system accepts clients beyond the backlog"),
                (mock.patch.object(vaurien.Listener, "add_filler", side_effect=no_descriptors),
                 "cannot drop clients: Too many open files")):
            with self.subTest(message), self.proxy() as (proxy, _):
                with patch, self.assertRaisesRegex(OSError, message):
                    proxy.set_accept("drop")
                self.assertEqual(proxy.get_accept(), "normal")
                self.assert_served(proxy.port)
                proxy.set_accept("refuse")
                with patch, self.assertRaises(OSError):
                    proxy.set_accept("drop")
                self.assertEqual(proxy.get_accept(), "refuse")
                self.assert_refused(proxy.port)
                with patch, self.assertRaisesRegex(OSError, message):
                    OpenProxy("127.0.0.1:9", accept="drop").start()

    def test_a_mode_has_windows_like_a_rule(self):
        for text, modes, changes in (
                ("normal", "nnnnnnnn", []),
                ("refuse", "rrrrrrrr", []),
                ("refuse duration=3", "rrrnnnnn", ["begins", "ends"]),
                ("drop start=2", "nndddddd", ["begins"]),
                ("drop start=2 duration=3", "nndddnnn", ["begins", "ends"]),
                ("refuse start=1 duration=2 every=4", "nrrnnrrn", ["begins", "ends"] * 2),
                ("refuse ttl=3", "rrrnnnnn", ["expires"]),
                ("refuse duration=1 every=2 ttl=4", "rnrnnnnn",
                 ["begins", "ends", "begins", "ends", "expires"])):
            with self.subTest(text):
                loop, accept = SimulatedLoop(), vaurien.check_accept(text)
                proxy = vaurien.ProxyServer(("127.0.0.1", 9), accept=accept)
                first_mode = accept.current_mode()      # which `bind` uses
                proxy.open(loop)
                proxy.listener = listener = mock.Mock()
                proxy.apply_accept()
                seen = ""
                for _ in modes:
                    seen += listener.set_mode.call_args[0][0][0]
                    loop.advance(1)
                self.assertEqual((first_mode[0], seen), (modes[0], modes))
                self.assertEqual([record.change for record in proxy.fault_records], changes)
                self.assertEqual({(record.handler, record.options["mode"])
                                  for record in proxy.fault_records},
                                 {("accept", accept.mode)} if changes else set())
                self.assertEqual(bool(loop.timers), "every=4" in text)
                proxy.set_accept(vaurien.Accept())
                self.assertEqual(listener.set_mode.call_args[0], ("normal",))
                loop.advance(100)
                self.assertEqual((loop.timers, len(proxy.fault_records)), ([], len(changes)))
                self.assertEqual(len(proxy.rule_changes), 1)        # at the start

    def test_a_window_begins_and_ends_while_the_proxy_runs(self):
        with self.proxy() as (proxy, _):
            with self.assertLogs("vaurien", "INFO") as logged, \
                    proxy.refusing(start=0.05, duration="50ms"):
                began = time.monotonic()
                try:
                    for host in self.HOSTS:
                        with contextlib.closing(connect(proxy.port, host)) as sock:
                            send_and_read(sock, b"question")
                except ConnectionRefusedError:          # a busy machine: the window has begun
                    self.assertGreaterEqual(time.monotonic() - began, 0.04)
                wait_until(lambda: len(proxy.events()) == 1)
                self.assertGreaterEqual(time.monotonic() - began, 0.04)
                wait_until(lambda: len(proxy.events()) == 2)
                self.assertGreaterEqual(time.monotonic() - began, 0.09)
                self.assert_served(proxy.port)
            self.assertEqual([line.partition("vaurien:")[2] for line in logged.output], [
                "accept: refuse start=0.05 duration=0.05",
                "accept refuse start=0.05 duration=0.05: a window begins",
                "accept refuse start=0.05 duration=0.05: the window ends", "accept: normal"])
            proxy.set_accept("refuse duration=1h")
            self.assert_refused(proxy.port)
            with self.assertLogs("vaurien", "INFO") as logged, proxy.down():
                pass
            self.assertFalse([line for line in logged.output if "accept:" in line])
            self.assert_refused(proxy.port)             # still in the same window
            self.assertEqual([record.change for record in proxy.events()],
                             ["begins", "ends", "begins"])
            self.assertEqual(proxy.get_accept(), "refuse duration=3600")

    def test_a_window_is_recorded_after_the_listener_has_changed(self):
        """A test that had waited for the record could still be refused."""
        modes, record_change = [], vaurien.ProxyServer.record_change

        def recorded_change(server, rule, change):
            modes.append((change, server.listener.mode))
            record_change(server, rule, change)

        with mock.patch.object(vaurien.ProxyServer, "record_change", recorded_change), \
                self.proxy() as (proxy, _):
            clock = StoppedClock(proxy.loop)    # a busy machine could miss a short window
            with proxy.refusing(start=1, duration=1):
                for count in 1, 2:
                    clock.advance(1)
                    wait_until(lambda: len(modes) == count)
        self.assertEqual(modes, [("begins", "refuse"), ("ends", "normal")])

    def test_all_times_begin_anew_when_a_proxy_starts_again(self):
        proxy = OpenProxy("127.0.0.1:9", accept="refuse duration=1h")
        begun = []
        for _ in range(2):
            with proxy:
                self.assert_refused(proxy.port)
                begun.append(proxy.accept.since)
            # Also if the last window had ended
            proxy.accept.set_moment(vaurien.Moment(False, 0, NEVER, NEVER))
        self.assertLess(*begun)

    def test_a_mode_that_is_not_possible_in_a_window_is_a_warning(self):
        with self.proxy() as (proxy, _), self.assertLogs("vaurien", "WARNING") as logged, \
                mock.patch.object(vaurien.Listener, "add_filler", side_effect=OSError("why")):
            proxy.set_accept("drop", start=0.001, duration=3600)
            wait_until(lambda: logged.output)
            self.assertIn("cannot drop clients: why", *logged.output)
            self.assert_served(proxy.port)

    def test_the_apis_show_whether_a_window_is_open_and_until_when(self):
        with proxy_with_control() as (_, client):
            began = time.time()
            client.set_accept("refuse", start=0, duration=60, every=90)
            for path in "/proxy", "/proxies/vaurien":
                shown = client.request("GET", path)["accept"]
                self.assertTrue(began + 59 < shown.pop("until") < time.time() + 61)
                self.assertEqual(shown, {"mode": "refuse", "duration": 60, "every": 90,
                                         "active": True})
            self.assertEqual(client.get_accept(), "refuse duration=60 every=90")
            # A client may send back the value that it has got.
            accept = client.request("GET", "/proxy")["accept"]
            client.request("PATCH", "/proxies/vaurien", {"accept": accept})
            self.assertEqual(client.get_accept(), "refuse duration=60 every=90")
            client.set_accept("drop duration=60")
            with client.refusing():
                self.assertEqual(client.get_accept(), "refuse")
            self.assertEqual(client.get_accept(), "drop duration=60")
            with self.assertRaisesRegex(ValueError, "speed is not known here"):
                client.set_accept("drop", speed=5)

    def test_drop_is_refused_on_windows(self):
        with mock.patch.object(os, "name", "nt"):
            with self.assertRaisesRegex(ValueError, "cannot be drop on Windows"):
                vaurien.check_accept("drop")
            self.assertEqual(vaurien.check_accept("refuse").mode, "refuse")

    def test_the_control_server_and_a_client_change_the_mode(self):
        with proxy_with_control() as (proxy, client):
            with client.refusing(), self.assertRaises(ConnectionRefusedError):
                connect(proxy.port)
            with connected_client(proxy) as sock:
                send_and_read(sock, b"question")
            client.set_accept("drop")
            self.assertEqual(client.request("GET", "/proxy")["accept"], "drop")
            self.assertEqual(client.get_accept(), proxy.get_accept())
            client.reset()
            self.assertEqual(client.get_accept(), "normal")
            for body, message in (({"accept": "no"}, "accept must be normal, refuse or drop"),
                                  ({"accept": "drop", "enabled": False}, "enabled is not known")):
                with self.subTest(body), self.assertRaisesRegex(ValueError, message):
                    client.request("PUT", "/proxy", body)
            self.assertEqual(client.get_accept(), "normal")
            with mock.patch.object(vaurien.Listener, "add_filler", side_effect=OSError("why")), \
                    self.assertRaisesRegex(ValueError, "cannot drop clients: why"):
                client.request("PUT", "/proxy", {"accept": "drop", "max_connections": 7})
            self.assertEqual(proxy.max_connections, 0)


@unittest.skipUnless(vaurien.LINUX and hasattr(socket, "SO_REUSEPORT"), "not on this system")
class TestReusePort(TempDirTestCase):
    """Proxies that share a port, each with a number of its own."""

    HOSTS = TestAccept.HOSTS

    def setUp(self):
        super().setUp()
        self.port = unused_port()

    @contextlib.contextmanager
    def two_proxies(self, **arguments):
        """Run two proxies on the port, in front of the same backend."""
        with backend_server(echo) as (backend_port, _), contextlib.ExitStack() as stack:
            yield [stack.enter_context(OpenProxy(
                "127.0.0.1:%d" % backend_port, "localhost:%d" % self.port, reuse_port=number,
                **arguments)) for number in (1, 2)]

    def connect_to_all(self, proxies):
        """Connect to the port until each of the proxies has got a client at each address."""
        for host in self.HOSTS:
            before = [proxy.accepted for proxy in proxies]

            def all_have_accepted(host=host, before=before):
                with contextlib.closing(connect(self.port, host)) as sock:
                    self.assertEqual(send_and_read(sock, b"question"), b"question")
                return all(proxy.accepted > count for proxy, count in zip(proxies, before))

            wait_until(all_have_accepted)

    def test_two_processes_on_one_port_have_clients_rules_and_control_ports_of_their_own(self):
        with backend_server(echo) as (backend_port, _), contextlib.ExitStack() as stack:
            clients = []
            for number in 1, 2:
                pid = vaurien.start_proxy(
                    port=backend_port, backend_host="127.0.0.1", proxy_host="127.0.0.1",
                    proxy_port=self.port, http_port=0, log_output="log", warmup=TIMEOUT,
                    options=["--reuse-port", number, "--seed", 3, "--record", "%d.json" % number])
                stack.callback(vaurien.stop_proxy, pid)
                clients.append(vaurien.Client("127.0.0.1", pid.http_port))
            clients[1].set_handler("delay", sleep=0.001)

            def counts():
                return [client.request("GET", "/status")["proxies"][0]["counts"]["requests"]
                        for client in clients]

            requests = 0
            while not all(counts()):
                requests += 1
                with contextlib.closing(connect(self.port)) as sock:
                    self.assertEqual(send_and_read(sock, b"question"), b"question")
            self.assertEqual(sum(counts()), requests)
            self.assertEqual([client.request("GET", "/proxy")["reuse_port"]
                              for client in clients], [1, 2])
            faults = [0, counts()[1]]
            self.assertEqual([len(client.events()) for client in clients], faults)
        self.assertEqual([len(read_text(name).splitlines()) for name in ("1.json", "2.json")],
                         faults)
        self.assertRegex(read_text("log"), "; seed 3, reuse-port 2\n")

    def test_the_first_process_has_the_draws_of_a_proxy_alone_and_the_others_differ(self):
        def draws(number):
            proxy = vaurien.ProxyServer(("127.0.0.1", 9), ("127.0.0.1", 8), name="n", seed=7,
                                        reuse_port=number)
            return proxy.rules.draw_batch("behavior", 5, 1)

        self.assertEqual(draws(1), draws(None))
        for number in 2, 3, 10 ** 20:
            digest = hashlib.blake2b(b"7/%d n behavior 5 1" % number).digest()
            self.assertEqual(draws(number), vaurien.DRAW_BATCH.unpack(digest))

    def test_the_kernel_spreads_clients_and_each_mode_acts_on_the_share_of_its_proxy(self):
        with self.two_proxies() as (one, two):
            self.connect_to_all([one, two])
            accepted = one.accepted
            one.set_accept("refuse")
            for _ in range(20):             # the other proxy gets them all
                self.connect_to_all([two])
            self.assertEqual(one.accepted, accepted)
            one.set_accept("normal")
            self.connect_to_all([one, two])
            accepted = one.accepted
            one.set_accept("drop")
            self.assertEqual(one.listener.fillers, {})
            self.assert_some_are_dropped()
            self.assertEqual(one.accepted, accepted)
            for mode in "refuse", "drop", "normal":
                one.set_accept(mode)
            self.connect_to_all([one, two])

    def assert_some_are_dropped(self):
        """Connect until a connect gets no reply, and until one succeeds."""
        seen = set()
        with contextlib.ExitStack() as stack:
            while len(seen) < 2:
                sock = stack.enter_context(contextlib.closing(socket.socket()))
                sock.setblocking(False)
                sock.connect_ex(("127.0.0.1", self.port))
                seen.add(select.select([], [sock], [], 0.02) == ([], [sock], []))

    def test_all_connects_are_refused_or_dropped_if_all_proxies_do_so(self):
        for mode, error in ("refuse", ConnectionRefusedError), ("drop", socket.timeout):
            with self.two_proxies(accept=mode) as proxies:
                for host, _ in itertools.product(self.HOSTS, range(4)):
                    with self.subTest(mode), self.assertRaises(error):
                        socket.create_connection((host, self.port), 0.02).close()
                self.assertEqual([proxy.accepted for proxy in proxies], [0, 0])

    def test_a_number_that_another_proxy_has_is_an_error_until_that_proxy_stops(self):
        twin = OpenProxy("127.0.0.1:9", "127.0.0.1:%d" % self.port, reuse_port=2)
        with self.two_proxies() as (one, two):
            with self.assertRaisesRegex(OSError, "cannot listen on 127.0.0.1:%d: another proxy "
                                        "at this address has the same number: --reuse-port 2$"
                                        % self.port):
                twin.start()
            self.connect_to_all([one, two])
            two.disable()
            with twin, self.assertRaisesRegex(OSError, "the same number"):
                two.enable()
            two.enable()
            one.reset()
            self.connect_to_all([one, two])

    def test_a_port_of_a_program_that_does_not_share_it_is_in_use(self):
        def assert_in_use(port, bind):
            with self.assertRaisesRegex(OSError, "127.0.0.1:%d: Address already in use" % port):
                bind()

        with contextlib.closing(listening_socket()) as taken:
            port = taken.getsockname()[1]
            assert_in_use(port, OpenProxy("127.0.0.1:9", "127.0.0.1:%d" % port,
                                          reuse_port=1).start)
        with self.two_proxies():
            address = "127.0.0.1", self.port
            assert_in_use(self.port, OpenProxy("127.0.0.1:9", address).start)
            assert_in_use(self.port, vaurien.Control(address, vaurien.ProxyTable()).bind)

    def test_wrong_values_are_refused(self):
        for local, number, message in (
                (self.port, 0, "reuse_port must be the number of this process, 1 or more, not 0"),
                (self.port, True, "reuse_port must be the number of this process"),
                (self.port, "one", "reuse_port must be the number of this process"),
                (0, 1, "reuse-port needs a port, not 0")):
            with self.subTest(number), self.assertRaisesRegex(ValueError, message):
                vaurien.Proxy("127.0.0.1:9", ("127.0.0.1", local), reuse_port=number)

    @unittest.skipUnless(vaurien.fcntl, "this system cannot lock a file in this way")
    def test_two_proxies_cannot_record_to_one_file(self):
        self.write("faults", "old")
        one = OpenProxy("127.0.0.1:9", record="faults")
        with one:
            self.assertEqual(read_text("faults"), "")
            self.write("faults", "new")
            with self.assertRaisesRegex(OSError, "cannot record to faults: another proxy records "
                                                 "to this file: each process needs a file of "):
                OpenProxy("127.0.0.1:9", record="faults").start()
            self.assertEqual(read_text("faults"), "new")
        with one:                       # appends
            self.assertEqual(read_text("faults"), "new")
        with mock.patch.object(vaurien.fcntl, "flock", side_effect=OSError(errno.ENOLCK, "none")):
            for _ in range(2):          # a file system without locks
                self.addCleanup(OpenProxy("127.0.0.1:9", record="faults").start().stop)
        for _ in range(2):
            self.addCleanup(OpenProxy("127.0.0.1:9", record=os.devnull).start().stop)

    def test_proxies_of_the_apis_share_their_ports_too(self):
        message = "reuse-port needs a port, not 0: each process would get a port of its own"
        with contextlib.ExitStack() as stack:
            clients = []
            for number in 1, 2:
                loop, proxies = vaurien.Loop(), vaurien.ProxyTable(seed=1, reuse_port=number)
                control = vaurien.Control(("127.0.0.1", 0), proxies, dialect=vaurien.TOXIPROXY)
                control.bind()
                thread = threading.Thread(target=loop.run, daemon=True)
                thread.start()
                for close in (loop.close, proxies.close, control.close, thread.join, loop.stop):
                    stack.callback(close)
                for service in proxies, control:
                    loop.run_sync(service.open, loop)
                client = vaurien.Client("127.0.0.1", control.listener.address()[1])
                clients.append(client)
                listen = "127.0.0.1:%d" % self.port
                client.request("POST", "/proxies", {"name": "a", "listen": listen,
                                                    "upstream": "127.0.0.1:9"})
                for listen in "127.0.0.1:0", "":
                    with self.assertRaisesRegex(ValueError, message):
                        client.request("POST", "/proxies", {"name": "b", "listen": listen,
                                                            "upstream": "127.0.0.1:9"})
                with self.assertRaisesRegex(ValueError, message):
                    client.request("POST", "/proxies/a", {"listen": "127.0.0.1:0"})
                self.assertEqual(client.request("GET", "/proxies/a")["listen"],
                                 "127.0.0.1:%d" % self.port)
                self.assertIn("a (seed 1, reuse-port %d)" % number, client.request("GET", "/"))
            with self.assertRaisesRegex(ValueError, "the same number"):
                clients[0].request("POST", "/proxies", {
                    "name": "b", "listen": "127.0.0.1:%d" % self.port,
                    "upstream": "127.0.0.1:9"})


class TestMaxConnections(unittest.TestCase):
    """Clients beyond max_connections get the protocol's own error, and are closed."""

    STARTUP = struct.pack(">II", 9, 3 << 16) + b"\0"      # of PostgreSQL's protocol 3
    UNAVAILABLE = (b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: text/plain\r\n"
                   b"Content-Length: 24\r\nRetry-After: 5\r\nConnection: close\r\n\r\n")
    # (protocol, parts that the client sends, bytes that it gets)
    REFUSALS = [
        ("tcp", [], b""), ("tls", [], b""),
        ("redis", [b"PING\r\n"], b"-ERR max number of clients reached\r\n"),
        ("memcache", [], b"ERROR Too many open connections\r\n"),
        ("mysql", [], mysql_packet(0, b"\xff\x10\x04Too many connections")),
        ("smtp", [], b"421 4.3.2 Service not available, closing transmission channel\r\n"),
        ("postgres", [STARTUP], error_bytes("postgres", "53300")),
        ("postgres", [b"\0\0\0\x08\x04", b"\xd2\x16\x2f", STARTUP],    # a request for TLS first
         b"N" + error_bytes("postgres", "53300")),
        ("http", [b"GET / HTTP/1.1\r\n\r\n"], UNAVAILABLE + b"503 Service Unavailable\n"),
        ("http", [b"HEAD / HTTP/1.1\r\n\r\n"], UNAVAILABLE)]

    @contextlib.contextmanager
    def full_proxy(self, protocol="tcp", behavior="100:dummy", **arguments):
        """Yield (a proxy that serves one client, that client)."""
        with running_proxy(echo, behavior, protocol=protocol, max_connections=1,
                           **arguments) as proxy, connected_client(proxy) as first:
            wait_until(lambda: proxy.connections)
            yield proxy, first

    def test_every_protocol_has_its_refusal(self):
        self.assertEqual({protocol for protocol, _, _ in self.REFUSALS}, set(vaurien.PROTOCOLS))
        for protocol, parts, expected in self.REFUSALS:
            with self.subTest(protocol, parts=parts), \
                    self.full_proxy(protocol) as (proxy, _), \
                    self.assertLogs("vaurien", "DEBUG") as logged, \
                    connected_client(proxy) as sock:
                size = 0
                for part in parts:
                    sock.sendall(part)
                    size += len(part)
                    wait_until(lambda: any(     # the parts arrive one by one
                        connection.up.received == size
                        for connection in list(proxy.connections.values())[1:]))
                received = read_until_close(sock)
                self.assertEqual((received.size, received.sha1),
                                 (len(expected), hashlib.sha1(expected).hexdigest()))
                sock.close()
                wait_until(lambda: len(proxy.connections) == 1)
            self.assertEqual((proxy.accepted, proxy.refused, proxy.rules.request_count,
                              proxy.events()), (2, 1, 1, []))
            self.assertRegex(logged.output[0],
                             r"connection 2: refused: max_connections is 1 \(client 127.0")
            self.assertIn(": refused after", logged.output[1])

    def test_clients_are_served_again_when_one_has_gone(self):
        """Refused clients that stay do not count."""
        with self.full_proxy("redis") as (proxy, first), connected_client(proxy) as refused, \
                connected_client(proxy) as silent:
            for sock in refused, silent:
                self.assertTrue(select.select([sock], [], [], TIMEOUT)[0])
            self.assertEqual(len(proxy.connections), 3)
            first.close()
            wait_until(lambda: 1 not in proxy.connections)
            with connected_client(proxy) as sock:
                self.assertEqual(send_and_read(sock, b"PING\r\n"), b"PING\r\n")
            self.assertEqual((proxy.accepted, proxy.refused), (4, 2))

    def test_no_rule_acts_on_a_client_that_is_refused(self):
        with self.full_proxy("postgres", "100:hang") as (proxy, _), \
                connected_client(proxy) as sock:
            wait_until(lambda: 2 in proxy.connections)
            proxy.add_toxic("reset_peer")
            with proxy.handler("blackout", per="connection"):
                sock.sendall(self.STARTUP)
                self.assertEqual(read_exactly(sock, 9)[:1], b"E")
                drawn = {rule.name: rule.drawn_count for rule in proxy.rules.installed}
            self.assertEqual(drawn, {"blackout": 1, "reset_peer": 1})
            self.assertLessEqual({record.connection for record in proxy.events()}, {1})

    def test_a_refused_client_that_resets_or_sends_nothing_is_closed(self):
        with self.full_proxy("http", timeout=0.05) as (proxy, _), \
                connected_client(proxy) as silent, connected_client(proxy) as resetting:
            wait_until(lambda: proxy.refused == 2)
            close_with_reset(resetting)
            self.assertEqual(read_until_close(silent), EMPTY_EOF)
            wait_until(lambda: len(proxy.connections) == 1)
            self.assertEqual(proxy.open_refused, set())

    def test_the_limit_is_changed_while_the_proxy_runs(self):
        with proxy_with_control(max_connections=1) as (proxy, client), \
                connected_client(proxy) as first:
            send_and_read(first, b"question")
            with connected_client(proxy) as sock:
                self.assertEqual(read_until_close(sock), EMPTY_EOF)
            self.assertIn('vaurien_refused_connections_total{proxy="vaurien"} 1',
                          client.request("GET", "/metrics"))
            for method, path in ("PUT", "/proxy"), ("PATCH", "/proxies/vaurien"):
                for limit in 2, 0:
                    client.request(method, path, {"max_connections": limit})
                    self.assertEqual(client.request("GET", "/proxy")["max_connections"], limit)
                    self.assertEqual(client.request("GET", "/proxies/vaurien").get(
                        "max_connections", 0), limit)
                    with connected_client(proxy) as sock:
                        send_and_read(sock, b"question")
                    wait_until(lambda: len(proxy.connections) == 1)
                for value in -1, 1.5, "no", True:
                    with self.subTest(path, value=value), self.assertRaises(ValueError):
                        client.request(method, path, {"max_connections": value})
            self.assertNotIn("max_connections", client.request("GET", "/proxies/vaurien"))


class TestLatencies(unittest.TestCase):
    """The times from requests to the first bytes of their replies."""

    def test_percentiles(self):
        for seconds, expected in (
                ([], {}), ([3], {"p50": 3, "p95": 3}), ([1, 2], {"p50": 1, "p95": 2}),
                (range(1, 101), {"p50": 50, "p95": 95}),
                (range(100, 0, -1), {"p50": 50, "p95": 95})):
            with self.subTest(seconds):
                latencies = vaurien.Latencies()
                for value in seconds:
                    latencies.add(1000, 1000 - value)
                self.assertEqual(latencies.percentiles(1000), expected)

    def test_old_samples_do_not_count(self):
        latencies, window = vaurien.Latencies(), vaurien.LATENCY_AGE_MAX
        latencies.add(100, 98)
        self.assertEqual(latencies.percentiles(100 + window)["p50"], 2)
        self.assertEqual(latencies.percentiles(101 + window), {})
        latencies.add(101 + window, 100 + window)
        self.assertEqual(len(latencies.samples), 1)

    def test_a_busy_proxy_measures_a_sample(self):
        latencies = vaurien.Latencies()
        skips = []
        for count in range(2 * vaurien.LATENCIES_KEPT):
            latencies.add(0.001 * count, 0)
            skips.append(latencies.draw_distance())
        self.assertEqual(len(latencies.samples), vaurien.LATENCIES_KEPT)
        self.assertEqual(set(skips[:vaurien.Latencies.SAMPLES_PER_STEP - 1]), {0})
        last = skips[-500:]
        self.assertTrue(10 < sum(last) / len(last) < 20, last)
        self.assertGreater(len(set(last)), 20)

    def check_count(self, proxy, sock, conversation, count, least=0.0):
        """Converse on a socket, and check how many latencies are measured, each `least` or more.

        conversation    [(bytes to send, size of the reply)]
        """
        before = len(proxy.latencies.samples)
        for sent, size in conversation:
            sock.sendall(sent)
            read_exactly(sock, size)
        wait_until(lambda: len(proxy.latencies.samples) >= before + count)
        samples = list(proxy.latencies.samples)[before:]
        self.assertEqual(len(samples), count)
        self.assertGreaterEqual(min(replied - asked for replied, asked in samples), least)

    def test_each_request_of_an_idle_proxy_is_measured(self):
        http_request = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
        http_reply = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"

        def serve_http(sock):
            while sock.recv(65536):
                sock.sendall(http_reply)

        tcp = [(b"question", 8)] * 5
        http = [(http_request, len(http_reply))] * 5
        sleep = {"delay": {"sleep": 0.01}}
        for serve, protocol, conversation in ((echo, "tcp", tcp), (serve_http, "http", http)):
            for behavior, least in (("100:dummy", 0.0), ("100:delay", 0.01)):
                with self.subTest(protocol, behavior=behavior), running_proxy(
                        serve, behavior, protocol=protocol, options=sleep) as proxy, \
                        connected_client(proxy) as sock:
                    self.check_count(proxy, sock, conversation, 5, least)

    def test_the_reply_of_a_rule_is_measured(self):
        with running_proxy(echo, "100:error", protocol="redis") as proxy, \
                connected_client(proxy) as sock:
            sock.sendall(b"PING\r\n" * 2)
            wait_until(lambda: proxy.latencies.samples)

    def test_the_first_byte_of_a_reply_counts(self):
        go_on = threading.Event()

        def serve(sock):
            sock.sendall(b"greeting")           # is no reply
            read_exactly(sock, 8)
            sock.sendall(b"first")
            go_on.wait(TIMEOUT)
            sock.sendall(b"last")

        with running_proxy(serve) as proxy, connected_client(proxy) as sock:
            read_exactly(sock, 8)
            self.check_count(proxy, sock, [(b"question", 5)], 1)
            go_on.set()
            read_exactly(sock, 4)
            self.assertEqual(len(proxy.latencies.samples), 1)

    def test_a_request_before_the_reply_to_another_one_is_not_measured(self):
        options = {"delay": {"sleep": 0.05, "before": False}}
        with running_proxy(echo, "100:delay", options=options) as proxy, \
                connected_client(proxy) as sock:
            sock.sendall(b"question")
            wait_until(lambda: proxy.connections and (
                proxy.connections[1].chain.last_direction is DOWNSTREAM))
            self.check_count(proxy, sock, [(b"question", 16)], 1, 0.05)

    def test_numbers_of_the_control_server(self):
        with proxy_with_control(echo, "100:error", protocol="redis", seed=1, options={
                "error": {"kind": "OOM"}}) as (proxy, client):
            metrics = client.request("GET", "/metrics")
            self.assertNotIn("vaurien_latency_seconds{", metrics)
            with connected_client(proxy) as sock:
                sock.sendall(b"PING\r\n")
                wait_until(lambda: proxy.latencies.samples)
            metrics = client.request("GET", "/metrics")
            self.assertIn('vaurien_fault_kinds_total{handler="error",kind="OOM",proxy="vaurien"}'
                          ' 1\n', metrics)
            for quantile in "0.5", "0.95":
                self.assertRegex(metrics, r'\nvaurien_latency_seconds{proxy="vaurien",'
                                          r'quantile="%s"} 0\.\d{6}\n' % quantile)
            status, = client.request("GET", "/status")["proxies"]
            self.assertEqual(status["kinds"], [{"handler": "error", "kind": "OOM", "count": 1}])
            self.assertEqual(list(status["latency"]), ["p50", "p95"])
            self.assertGreater(status["latency"]["p50"], 0)
            lines = vaurien.Statsd(("localhost", 1), {"vaurien": proxy._server}).metric_lines()
        self.assertIn("vaurien.vaurien.fault_kinds.error.OOM:1|c", lines)
        self.assertEqual([line.partition(":")[0] for line in lines if "latency" in line],
                         ["vaurien.vaurien.latency_seconds.p50",
                          "vaurien.vaurien.latency_seconds.p95"])


class TestFaultRecords(unittest.TestCase):
    """The record of a fault shows the request that it acted on."""

    def texts(self, requests, behavior="100:delay", before=True, **arguments):
        """Send requests one after the other on one connection. Returns the texts of the faults."""
        options = {"delay": {"sleep": 0.001, "before": before}}
        with running_proxy(echo, behavior, options=options, **arguments) as proxy, \
                connected_client(proxy) as sock:
            for data in requests:
                send_and_read(sock, data)
            wait_until(lambda: all(record.text for record in proxy.events()))
            return [record.text for record in proxy.events()]

    def test_the_first_bytes_of_a_request(self):
        redis = "*%d\r\n$%d\r\n%s\r\n$%d\r\n%s\r\n"
        get, auth = [(redis % (2, len(name), name, len(key), key)).encode()
                     for name, key in (("GET", "user:42"), ("auth", "secret"))]
        head = b"PUT /%s HTTP/1.1\r\nAuthorization: Basic secret\r\nContent-Length: 0\r\n\r\n"
        for protocol, data, text in (
                ("tcp", b"question", "question"),
                ("tcp", b"a\r\n\0\xff\xc3\xa9\x1b[0m", "a\\r\\n\\x00\\xff\xe9\\x1b[0m"),
                ("tcp", b"x" * 500, "x" * 80), ("tcp", b"\0" * 500, "\\x00" * 20),
                ("redis", get, "GET user:42"), ("redis", auth, "AUTH"),
                ("redis", b"PING " + b"x" * 500 + b"\r\n", "PING " + "x" * 75),
                ("memcache", b"get user:42\r\n", "get user:42"),
                ("http", head % b"cart", "PUT /cart HTTP/1.1"),
                ("http", head % (b"x" * 100), "PUT /" + "x" * 75)):
            repeated = 1 if protocol in ("http", "memcache") else 2     # no reply is an echo
            for before in (True, False) if repeated == 2 else (True,):
                with self.subTest(protocol, text=text, before=before):
                    texts = self.texts([data] * repeated, before=before, protocol=protocol)
                    self.assertEqual(texts, [text] * repeated)

    def test_the_text_of_a_request_without_an_active_rule_is_not_kept(self):
        for behavior, kept in (("0:delay", b""), ("100:delay", b"get user:42")):
            chain = vaurien.ProtocolChain(rule_set_of(*rules_from(behavior)), 1,
                                          vaurien.Memcache())
            chain.start()
            chain.process_bytes(0, UPSTREAM, b"get user:42\r\n")
            self.assertEqual(chain.exchanges[0].request.text, kept)

    def test_the_text_for_a_blocking_handler(self):
        with registered(Passes):
            self.assertEqual(self.texts([b"question"], "100:Passes"), ["question"])

    def test_a_fault_before_the_first_bytes_of_a_request(self):
        """Its record has the text as soon as the bytes have come."""
        with running_proxy(echo, "100:delay", options={"delay": {"sleep": 0.001}}) as proxy, \
                connected_client(proxy) as sock:
            self.assertEqual(proxy.wait_for("delay", TIMEOUT).text, "")
            sock.sendall(b"question")
            wait_until(lambda: proxy.events()[0].text == "question")

    def test_a_request_without_bytes_has_no_text(self):
        """The backend sends first, so the first bytes of the client begin request 2."""
        def serve(sock):
            sock.sendall(b"greeting")
            echo(sock)

        with running_proxy(serve, "100:delay", options={"delay": {"sleep": 0.001}}) as proxy, \
                connected_client(proxy) as sock:
            read_exactly(sock, 8)
            send_and_read(sock, b"question")
            self.assertEqual([record.text for record in proxy.events()], ["", "question"])
            self.assertEqual(proxy.connections[1].records_without_text, ())

    def test_a_record_has_the_toxic_and_its_stream(self):
        toxics = [{"type": "latency", "name": "slow", "latency": 1}]
        with running_proxy(echo, toxics=toxics) as proxy, connected_client(proxy) as sock:
            send_and_read(sock, b"question")
            record, = proxy.events()
        self.assertEqual((record.toxic, record.stream, record.text),
                         ("slow", "downstream", "question"))

    def test_not_all_clients_of_the_control_server_may_wait(self):
        with running_proxy(echo) as proxy:
            control = vaurien.Control(("localhost", 0), proxy_table(proxy))
            control.wait_limit = threading.Semaphore(1)

            def status(target):
                return vaurien.handle_request(control, "GET", target, bytes).status

            self.assertEqual(status("/events?wait=0.001"), 200)
            with control.wait_limit:
                self.assertEqual(status("/events?wait=0.001"), 503)
                self.assertEqual(status("/events"), 200)
            self.assertEqual(status("/events?wait=0.001"), 200)

    def test_the_log_shows_the_addresses_of_remote_clients_only(self):
        with running_proxy(echo) as proxy, mock.patch.object(vaurien, "is_loopback") as loopback:
            active = vaurien.ActiveRule(vaurien.Rule("delay"), 1)
            connection = mock.Mock(number=1, faults=(), records_without_text=(),
                                   peer=("192.0.2.1", 5))
            connection.name = "192.0.2.1:5"
            for loopback.return_value, suffix in ((True, ""), (False, " (client 192.0.2.1:5)")):
                with self.assertLogs("vaurien", "INFO") as logged:
                    proxy.loop.run_sync(proxy.record_fault, connection, active, 1, b"a\n")
                self.assertEqual(logged.output, ["INFO:vaurien:delay sleep=1.0: connection 1, "
                                                 "request 1, a\\n" + suffix])

    def test_a_record_that_is_gone_gets_no_text(self):
        proxy = vaurien.ProxyServer(("127.0.0.1", 9), ("127.0.0.1", 0))
        with mock.patch.object(vaurien, "FAULT_RECORDS_KEPT", 2):
            proxy.fault_records = vaurien.deque(maxlen=2)
            for request in range(3):
                proxy.add_record(vaurien.Rule("delay"), {}, 1, "a:1", request)
            proxy.set_record_text([1], b"gone")
            proxy.set_record_text([2], b"text")
        self.assertEqual([(record.number, record.text) for record in proxy.fault_records],
                         [(2, "text"), (3, "")])

    def test_events_wait_for_the_first_record_of_a_handler(self):
        with proxy_with_control(echo, "100:delay", options={"delay": {"sleep": 0.001}}) as (
                proxy, client), connected_client(proxy) as sock:
            def get(**query):
                return [record["number"] for record in
                        client.request("GET", "/events", **query)["events"]]

            proxy.wait_for("delay", TIMEOUT)
            self.assertEqual(get(wait=20), [1])
            self.assertEqual(get(handler="delay"), [1])
            self.assertEqual(get(handler="error"), [])
            began = time.monotonic()
            self.assertEqual(get(since=1, wait=0.05), [])
            self.assertEqual(get(handler="error", wait=0.05), [])
            self.assertGreaterEqual(time.monotonic() - began, 0.1)
            with ThreadedCall(get, since=1, wait=20) as call, \
                    ThreadedCall(get, since=1, wait=20, handler="error") as other:
                send_and_read(sock, b"question")
                send_and_read(sock, b"question")
                self.assertEqual(call.result(), [2])
                self.assertTrue(other.thread.is_alive())
                proxy.loop.run_sync(proxy.add_record, vaurien.Rule("error"), {}, 1, "a:1", 3)
                self.assertEqual(other.result(), [proxy.fault_count])
            for query, text in (({"wait": "21"}, "wait must be a number of seconds from 0 to 20"),
                                ({"handler": "dely"}, "handler must be one of .* delay?")):
                with self.subTest(query), self.assertRaisesRegex(ValueError, text):
                    get(**query)


class TestProxyLifecycle(unittest.TestCase):
    """The end of a proxy, the end of its connections, and the log."""

    def test_leaving_the_block_closes_everything(self):
        with backend_server(echo) as (backend_port, results):
            with OpenProxy("127.0.0.1:%d" % backend_port, "127.0.0.1:0") as proxy:
                port, thread, sock = proxy.port, proxy.thread, connect(proxy.port)
                send_and_read(sock, b"question")
            self.assertEqual(read_until_close(sock).size, 0)
            sock.close()
            wait_until(lambda: results)
            with self.assertRaises(OSError):
                connect(port)
        self.assertFalse(thread.is_alive())

    def test_a_proxy_that_cannot_be_added_leaves_no_port_open(self):
        table = vaurien.ProxyTable(seed=1)
        table.loop = vaurien.Loop()
        table.loop.stop()
        table.loop.run()
        table.loop.close()
        proxy = vaurien.ProxyServer(("127.0.0.1", 9), ("127.0.0.1", 0))
        with self.assertRaisesRegex(RuntimeError, "the loop has ended"):
            table.add(proxy)
        self.assertEqual((proxy.listener.sockets, dict(table)), ([], {}))

    def test_a_proxy_that_loses_its_port_during_a_change_is_disabled(self):
        """The old listener is closed first, and another program takes its port meanwhile."""
        with running_proxy(echo) as proxy, connected_client(proxy) as sock, \
                contextlib.ExitStack() as stack:
            send_and_read(sock, b"question")
            table, port, taken = proxy_table(proxy), proxy.port, []

            def bind_listener(family, address, reuse_port):
                if not taken:
                    taken.append(stack.enter_context(
                        contextlib.closing(listening_socket(port=port))))
                raise OSError(errno.EADDRINUSE, "Address already in use")

            with self.assertLogs("vaurien", "WARNING") as logged, \
                    mock.patch.object(vaurien, "bind_listener", bind_listener), \
                    self.assertRaisesRegex(vaurien.CannotListen, "Address already in use"):
                table.change(proxy._server, ("", port), proxy.backend, enabled=True)
            self.assertIn("disabled: cannot listen on 127.0.0.1:%d" % port, logged.output[0])
            self.assertEqual((proxy.enabled, proxy.listener), (False, None))
            self.assertEqual(read_until_close(sock).size, 0)
            stack.close()
            table.change(proxy._server, proxy.local, proxy.backend, enabled=True)
            self.assertEqual(proxy.port, port)
            with connected_client(proxy) as sock:
                send_and_read(sock, b"question")

    def test_leaving_the_block_closes_everything_even_after_a_crash(self):
        def crash():
            raise SystemExit

        with running_proxy(echo) as proxy:
            sock = connect(proxy.port)
            send_and_read(sock, b"question")
            proxy.loop.call_soon_threadsafe(crash)
            proxy.thread.join(TIMEOUT)
        self.assertEqual(read_until_close(sock).size, 0)
        sock.close()
        self.assertIsNone(proxy.listener)

    def test_nothing_leaks(self):
        with running_proxy(echo, "20:delay,10:blackout,10:error,10:abort",
                           options={"delay": {"sleep": 0.001}}) as proxy:
            def run_connections():
                """Run 100 connections; return (watched sockets, bytes held, delay queues)."""
                for _ in range(100):
                    with connected_client(proxy) as sock, \
                            contextlib.suppress(OSError, EOFError):
                        send_and_read(sock, b"question")
                wait_until(lambda: not proxy.connections)
                return proxy.loop.run_sync(lambda: (
                    len(proxy.loop.watched),
                    proxy.loop.budget.held, proxy.loop.budget.queues))
            # Two sockets are left: the listener and the wakeup socket.
            self.assertEqual(run_connections(), (2, 0, 0))
            self.assertEqual(run_connections(), (2, 0, 0))
            self.assertGreater(len(proxy.faults), 2)

    def test_the_log_lists_each_fault_and_the_end_of_the_connection(self):
        options = {"delay": {"sleep": 0.001}}
        with running_proxy(echo, "100:delay", seed=7, options=options) as proxy:
            with self.assertLogs("vaurien", "DEBUG") as logged:
                with connected_client(proxy) as sock:
                    send_and_read(sock, b"question")
                    client = "127.0.0.1:%d" % sock.getsockname()[1]
                wait_until(lambda: not proxy.connections)
        fault_line, end_line = logged.output
        self.assertEqual("INFO:vaurien:delay sleep=0.001: connection 1, request 1", fault_line)
        self.assertRegex(end_line, "client %s: closed after [0-9.]+ s, 8 bytes up, "
                                   "8 bytes down, requests: 1" % client)

    def test_the_log_shows_all_that_determines_a_fault(self):
        """Two toxics of one type look alike without their names, streams and rule fields."""
        toxics = [vaurien.Toxic("latency", "up", 1.0, {"latency": 1}, "upstream", times=5),
                  vaurien.Toxic("latency", "down", 0.5, {"latency": 1})]
        with running_proxy(echo) as proxy:
            proxy.loop.run_sync(proxy.set_toxics, toxics[:1])
            with self.assertLogs("vaurien", "INFO") as logged:
                proxy.loop.run_sync(proxy.set_toxics, toxics)
                with proxy.handler("delay", sleep=0.001, match="^q u", after=1, times=3), \
                        connected_client(proxy) as sock:
                    send_and_read(sock, b"q u")
                    send_and_read(sock, b"q u")
        up = "toxic up (100:upstream latency latency=1 jitter=0 times=5)"
        down = "toxic down (50:downstream latency latency=1 jitter=0)"
        delay = "delay sleep=0.001 match='^q u' after=1 times=3"
        for text in ("rules: 100:dummy, %s, %s" % (up, down),
                     "rules: 100:%s, %s, %s" % (delay, up, down),
                     "latency latency=1 jitter=0 times=5 toxic=up stream=upstream: connection 1, "
                     "request 1, q u",
                     delay + ": connection 1, request 2, q u"):
            with self.subTest(text):
                self.assertIn("INFO:vaurien:" + text, logged.output)
        self.assertLessEqual({"up", None}, {record.toxic for record in proxy.events()})

    def test_the_log_names_the_fault_that_ended_a_connection(self):
        with running_proxy(echo, "100:blackout") as proxy:
            with self.assertLogs("vaurien", "DEBUG") as logged:
                with connected_client(proxy) as sock:
                    read_until_close(sock)
                wait_until(lambda: not proxy.connections)
        _fault_line, end_line = logged.output
        self.assertIn("closed by blackout after", end_line)


class TestInProcess(unittest.TestCase):
    """The Python API of a proxy that runs in the process of the test."""

    def test_handler_replaces_the_rules_during_a_with_block(self):
        with running_proxy(echo, "5:hang") as proxy:
            rules_before = list(proxy.rules.installed)
            with proxy.handler("delay", sleep=2, percent=20, per="connection"):
                self.assertEqual(proxy.describe(), "20:delay sleep=2.0 per=connection, 80:dummy")
            self.assertEqual(proxy.rules.installed, rules_before)
            with self.assertRaises(KeyError), proxy.handler("error"):
                raise KeyError
            self.assertEqual(proxy.rules.installed, rules_before)

    def test_handler_refuses_unknown_names_and_options(self):
        with running_proxy(echo) as proxy:
            with self.assertRaisesRegex(ValueError, "unknown handler 'nope'"):
                with proxy.handler("nope"):
                    pass
            with self.assertRaisesRegex(ValueError, "dely is not an option of delay"):
                with proxy.handler("delay", dely=1):
                    pass

    def test_times_and_after_limit_a_rule(self):
        with running_proxy(echo) as proxy, connected_client(proxy) as sock:
            send_and_read(sock, b"question")
            errors = []         # for each request, whether the reply is an error
            with proxy.handler("error", times=2, after=3):
                for _ in range(8):
                    reply = send_and_read(sock, b"question")
                    is_error = reply != b"question"
                    if is_error:
                        read_exactly(sock, ERROR_SIZE - len(reply))
                    errors.append(is_error)
            self.assertEqual(errors, [False] * 3 + [True] * 2 + [False] * 3)

    def test_a_connection_that_sends_nothing_uses_up_neither_times_nor_after(self):
        with running_proxy(echo) as proxy, contextlib.ExitStack() as stack:
            silent, first, second = (stack.enter_context(connected_client(proxy))
                                     for _ in range(3))
            wait_until(lambda: len(proxy.connections) == 3)
            with proxy.handler("error", times=1, after=1):
                silent.close()
                wait_until(lambda: len(proxy.connections) == 2)
                send_and_read(first, b"question")
                second.sendall(b"question")
                self.assertNotIn(b"question", read_exactly(second, ERROR_SIZE))
                send_and_read(first, b"question")
            self.assertEqual(proxy.faults, {"error": 1})

    def test_with_blocks_may_end_in_any_order(self):
        with running_proxy(echo) as proxy:
            one, two = proxy.handler("hang"), proxy.handler("delay")
            one.__enter__()
            two.__enter__()
            one.__exit__(None, None, None)
            self.assertEqual(proxy.handler_names(), "delay")
            two.__exit__(None, None, None)
            self.assertEqual(proxy.handler_names(), "dummy")

    def test_a_handler_that_is_set_within_a_with_block_stays(self):
        with proxy_with_control() as (proxy, client):
            with proxy.handler("hang"):
                client.set_handler("delay")
            self.assertEqual(proxy.handler_names(), "delay")
            with proxy.handler("hang"):
                pass
            self.assertEqual(proxy.handler_names(), "delay")

    def test_invalid_options_are_refused(self):
        for options in {"dlay": {"sleep": 1}}, {"delay": {"slep": 1}}, {"delay": {"sleep": "x"}}:
            with self.subTest(options), self.assertRaises(ValueError):
                OpenProxy("localhost:9", options=options)

    @unittest.skipUnless(hasattr(os, "fork"), "no fork here")
    def test_a_forked_process_that_leaves_the_block_does_not_affect_the_proxy(self):
        """The fork shares the selector: if it unregistered sockets, the proxy would be deaf."""
        program = textwrap.dedent("""
            import os, signal, socket, sys, warnings
            warnings.simplefilter("ignore", DeprecationWarning)     # of fork() while threads run
            sys.path.insert(0, %r)
            import vaurien

            def ask(sock):
                sock.settimeout(%d)
                sock.sendall(b"question")
                print(sock.recv(100).decode(), flush=True)

            with vaurien.Proxy("127.0.0.1:%d", "127.0.0.1:0") as proxy:
                with proxy.handler("delay", sleep=0.001):
                    open_before = socket.create_connection(("127.0.0.1", proxy.port))
                    ask(open_before)
                    child_pid = os.fork()
                    if child_pid == 0:
                        signal.alarm(%d)        # ends the fork, also if this test fails
                        for method, argument in [(proxy.wait_for, "delay"),
                                                 (proxy.handler("hang").__enter__, None)]:
                            try:
                                method(*[argument] if argument else [])
                            except RuntimeError as error:
                                print(error, flush=True)
                        ask(socket.create_connection(("127.0.0.1", proxy.port)))
                        sys.exit(3)
                    _, status = os.waitpid(child_pid, 0)
                    print(os.WEXITSTATUS(status))
                    ask(open_before)
                    ask(socket.create_connection(("127.0.0.1", proxy.port)))
                print(proxy.describe())
                thread = proxy._thread
            print(thread.is_alive())
            """)
        with backend_server(echo) as (port, _):
            output = subprocess.check_output(
                [sys.executable, "-c", program % (HERE, TIMEOUT, port, TIMEOUT)], timeout=TIMEOUT,
                universal_newlines=True)
        lines = output.splitlines()
        for line in lines[1:3]:
            self.assertRegex(line, r"^the proxy runs in process \d+: a fork of that ")
        del lines[1:3]
        self.assertEqual(lines, ["question", "question", "3", "question", "question",
                                 "100:dummy", "False"])

    def test_wait_for_a_fault(self):
        with running_proxy(echo) as proxy, connected_client(proxy) as sock:
            with proxy.handler("delay", sleep=0.001):
                with self.assertRaisesRegex(TimeoutError, "delay has not acted in 0.01 seconds"):
                    proxy.wait_for("delay", timeout=0.01)
                thread = threading.Thread(target=send_and_read, args=(sock, b"question"))
                thread.start()
                record = proxy.wait_for("delay", timeout=TIMEOUT)
                thread.join(TIMEOUT)
            self.assertEqual((record.handler, record.options["sleep"]), ("delay", 0.001))
            self.assertEqual(proxy.wait_for("delay"), record)
            with self.assertRaises(TimeoutError):
                proxy.wait_for("delay", timeout=0.01, since=record.number)
            with self.assertRaises(ValueError):
                proxy.wait_for("nope")

    def test_ten_proxies_are_independent(self):
        with backend_server(echo) as (port, _), contextlib.ExitStack() as stack:
            proxies = [stack.enter_context(OpenProxy("127.0.0.1:%d" % port, "127.0.0.1:0"))
                       for _ in range(10)]
            self.assertEqual(len({proxy.port for proxy in proxies}), 10)
            with proxies[0].handler("blackout"):
                for proxy in proxies[1:]:
                    with self.subTest(proxy.port), connected_client(proxy) as sock:
                        send_and_read(sock, b"question")


class TestBlockingHandlers(unittest.TestCase):
    """Blocking handlers: classes whose instances use the sockets in a separate thread."""

    @contextlib.contextmanager
    def proxy_with(self, cls, serve=echo, **fields):
        """Run a proxy in front of a backend_server(serve), with a rule for this handler class."""
        with registered(cls), running_proxy(serve) as proxy:
            with proxy.handler(cls.__name__, **fields):
                yield proxy

    def test_base_handler_can_be_imported_from_vaurien_handlers(self):
        from vaurien.handlers import BaseHandler
        self.assertIs(BaseHandler, vaurien.BaseHandler)

    def test_the_documented_form_of_a_handler_class(self):
        class Super(vaurien.BaseHandler):
            name = "super"
            options = {"sleep": ("Delay in seconds", float, 1),
                       "loud": ("Upper case", bool, False)}

            def __call__(self, client_sock, backend_sock, to_backend):
                data = self._get_data(client_sock, backend_sock, to_backend)
                if data:
                    if not to_backend:
                        time.sleep(self.option("sleep"))
                        data = data.upper() if self.option("loud") else data
                    (backend_sock if to_backend else client_sock).sendall(data)

        with self.proxy_with(Super, sleep=0.03, loud=True) as proxy, \
                connected_client(proxy) as sock:
            for _ in range(3):
                began = time.monotonic()
                sock.sendall(b"question")
                self.assertEqual(read_exactly(sock, 8), b"QUESTION")
                self.assertGreaterEqual(time.monotonic() - began, 0.03)
            self.assertEqual(proxy.faults, {"Super": 3})
            sock.shutdown(socket.SHUT_WR)
            self.assertEqual(read_until_close(sock).ending, "eof")

    def test_a_handler_has_options_settings_and_its_proxy(self):
        class Plain(vaurien.BaseHandler):
            options = {"sleep": ("Seconds", int, 1), "on": ("Whether", bool, "no")}

        plain = Plain({"sleep": "2"}, proxy="the proxy")
        self.assertEqual((plain.option("sleep"), plain.option("on"), plain.proxy),
                         (2, False, "the proxy"))
        plain.update_settings({"on": "yes"})
        self.assertEqual((plain.option("on"), plain.settings),
                         (True, {"sleep": "2", "on": "yes"}))

    def test_ten_handlers_block_at_the_same_time_and_the_loop_goes_on(self):
        barrier = threading.Barrier(11)

        class WaitsAtBarrier(Passes):
            def __call__(self, client_sock, backend_sock, to_backend):
                if to_backend:
                    barrier.wait(TIMEOUT)
                super().__call__(client_sock, backend_sock, to_backend)

        with self.proxy_with(WaitsAtBarrier) as proxy, contextlib.ExitStack() as stack:
            socks = [stack.enter_context(connected_client(proxy)) for _ in range(10)]
            for sock in socks:
                sock.sendall(b"question")
            wait_until(lambda: barrier.n_waiting == 10)
            with proxy.handler("dummy"), connected_client(proxy) as other:
                send_and_read(other, b"question")
            barrier.wait(TIMEOUT)           # as the eleventh thread: all threads continue
            for index, sock in enumerate(socks):
                with self.subTest(index):
                    self.assertEqual(read_exactly(sock, 8), b"question")

    def test_an_exception_ends_only_the_connection_of_its_handler(self):
        class Fails(vaurien.BaseHandler):
            def __call__(self, client_sock, backend_sock, to_backend):
                if client_sock.recv(8) == b"question":
                    raise KeyError("no idea")
                backend_sock.sendall(b"dropped")

        with self.proxy_with(Fails) as proxy, connected_client(proxy) as one, \
                connected_client(proxy) as two:
            with self.assertLogs("vaurien", "ERROR") as logged:
                one.sendall(b"question")
                self.assertEqual(read_until_close(one).size, 0)
            self.assertIn("handler Fails failed", logged.output[0])
            with proxy.handler("dummy"):
                send_and_read(two, b"another")

    def test_system_exit_ends_only_the_connection_of_its_handler(self):
        class Exits(vaurien.BaseHandler):
            def __call__(self, client_sock, backend_sock, to_backend):
                raise SystemExit(5)

        with self.proxy_with(Exits) as proxy, connected_client(proxy) as sock:
            with self.assertLogs("vaurien", "ERROR"):
                sock.sendall(b"question")
                read_until_close(sock)
            wait_until(lambda: not proxy.connections)

    def test_a_class_whose_constructor_fails_is_refused(self):
        class Fails(vaurien.BaseHandler):
            def __init__(self, settings, proxy):
                raise KeyError("no idea")

        with registered(Fails), proxy_with_control() as (proxy, client):
            for name, set_handler in [
                    ("client", lambda: client.set_handler("Fails")),
                    ("proxy", lambda: proxy.handler("Fails").__enter__())]:
                with self.subTest(name), self.assertRaisesRegex(
                        ValueError, "Fails cannot be created: KeyError: 'no idea'"):
                    set_handler()
            self.assertEqual(proxy.handler_names(), "dummy")
            toxics = [vaurien.Toxic("latency", "a"), vaurien.Toxic("noop", "b")]
            proxy.loop.run_sync(proxy.set_toxics, toxics)
            with self.assertRaisesRegex(ValueError, "Fails cannot be created"):
                proxy.loop.run_sync(proxy.set_toxics, [
                    vaurien.Toxic("latency", "a", 0.5),
                    vaurien.Toxic("Fails", "b", stream="both")])
            self.assertEqual((proxy.toxics, proxy.toxics[0].toxicity), (toxics, 1.0))
            proxy.loop.run_sync(proxy.set_toxics, [])
            with proxy.handler("delay"):
                pass
            self.assertEqual(proxy.handler_names(), "dummy")

    def test_a_rule_for_one_stream_is_refused(self):
        class Super(vaurien.BaseHandler):
            pass

        with registered(Super), \
                self.assertRaisesRegex(ValueError, "stream must be both for Super"):
            vaurien.read_rules([{"name": "Super", "stream": "upstream"}])

    def test_a_handler_that_closes_a_socket_ends_the_connection(self):
        class Closes(vaurien.BaseHandler):
            def __call__(self, client_sock, backend_sock, to_backend):
                client_sock.close()

        with self.proxy_with(Closes) as proxy, connected_client(proxy) as sock:
            sock.sendall(b"question")
            read_until_close(sock)
            wait_until(lambda: not proxy.connections and proxy.backend_results)

    def test_three_megabytes_pass_through_a_handler_in_both_directions(self):
        data = random_data(3000000)
        with self.proxy_with(Passes) as proxy, connected_client(proxy) as sock:
            thread = threading.Thread(target=sock.sendall, args=(data,))
            thread.start()
            is_same = read_exactly(sock, len(data)) == data
            self.assertTrue(is_same)        # assertEqual would print the data
            thread.join(TIMEOUT)

    def test_the_loop_sleeps_during_a_name_lookup_and_while_a_handler_blocks(self):
        lookup_may_end, handler_may_end = threading.Event(), threading.Event()

        class Waits(Passes):
            def __call__(self, client_sock, backend_sock, to_backend):
                handler_may_end.wait(TIMEOUT)
                super().__call__(client_sock, backend_sock, to_backend)

        def check_loop_sleeps(loop, reason):
            """Check that the loop runs fewer than 8 iterations in 0.05 seconds."""
            iterations, run_timers = [], loop.run_timers
            loop.run_timers = lambda: (iterations.append(1), run_timers())
            time.sleep(0.05)
            loop.run_timers = run_timers
            self.assertLess(len(iterations), 8, reason)

        def resolve(address, *_):
            _, port = address
            lookup_may_end.wait(TIMEOUT)
            return [(socket.AF_INET, ("127.0.0.1", port))]

        with backend_server(echo) as (port, _), registered(Waits), \
                OpenProxy("slow.invalid:%d" % port, "127.0.0.1:0") as proxy, \
                mock.patch.object(vaurien, "resolve_numeric", lambda *_: []), \
                mock.patch.object(vaurien, "resolve", resolve), connected_client(proxy) as sock:
            wait_until(lambda: proxy.lookups)
            proxy.loop.run_sync(proxy.set_rules, rules_from("100:Waits"))
            sock.sendall(b"question")
            check_loop_sleeps(proxy.loop, "name lookup")
            lookup_may_end.set()
            proxy.wait_for("Waits", TIMEOUT)
            check_loop_sleeps(proxy.loop, "handler")
            handler_may_end.set()
            self.assertEqual(read_exactly(sock, 8), b"question")

    def test_a_handler_that_makes_its_sockets_blocking_does_not_block_the_loop(self):
        class Blocks(Passes):
            def __call__(self, client_sock, backend_sock, to_backend):
                client_sock.setblocking(True)
                backend_sock.setblocking(True)
                super().__call__(client_sock, backend_sock, to_backend)

        size = 30000000

        def echo_once_then_send_much(sock):
            sock.sendall(read_exactly(sock, len(b"question")))
            read_exactly(sock, len(b"question"))
            sock.sendall(bytes(size))

        with self.proxy_with(Blocks, echo_once_then_send_much) as proxy, \
                connected_client(proxy) as sock:
            send_and_read(sock, b"question")
            with proxy.handler("dummy"):
                sock.sendall(b"question")
                wait_until(lambda: proxy.loop.budget.held > vaurien.HELD_MAX_IDLE // 2)
                self.assertEqual(len(read_exactly(sock, size)), size)

    def test_closing_the_proxy_ends_a_handler_that_waits_for_a_peer(self):
        class Waits(vaurien.BaseHandler):
            def __call__(self, client_sock, backend_sock, to_backend):
                client_sock.recv(100)
                client_sock.recv(100)           # the client sends no more

        with self.proxy_with(Waits) as proxy:
            thread_count = threading.active_count()
            with connected_client(proxy) as sock:
                sock.sendall(b"question")
                proxy.wait_for("Waits", TIMEOUT)
                proxy.loop.run_sync(proxy.close)
                read_until_close(sock)
                wait_until(lambda: threading.active_count() <= thread_count)

    def test_the_percentages_of_blocking_and_other_handlers_are_kept(self):
        with registered(Passes), \
                running_proxy(echo, "40:Passes,30:delay", seed=1,
                              options={"delay": {"sleep": 0.002}}) as proxy:
            with connected_client(proxy) as sock:
                for index in range(60):
                    send_and_read(sock, b"question %d" % index)
            self.assertTrue(10 < proxy.faults["Passes"] < 40)
            self.assertTrue(5 < proxy.faults["delay"] < 35)

    def test_a_handler_waits_until_delayed_data_is_sent(self):
        options = {"delay": {"sleep": 0.02, "before": False}}
        with registered(Passes), \
                running_proxy(echo, "50:Passes,50:delay", seed=1, options=options) as proxy, \
                connected_client(proxy) as sock:
            for index in range(10):
                first, second = b"one %02d " % index, b"two %02d " % index
                sock.sendall(first)
                time.sleep(0.005)       # the proxy receives the reply, and may delay it
                self.assertEqual(send_and_read_pending(sock, second, len(first)), first + second)
            self.assertEqual(set(proxy.faults), {"Passes", "delay"})

    def test_an_option_that_a_handler_does_not_have(self):
        class Slow(vaurien.BaseHandler):
            options = {"sleep": ("Delay in seconds", float, 1)}

        self.assertEqual(Slow({"sleep": "2"}).option("sleep"), 2.0)
        with self.assertRaisesRegex(ValueError, r"unknown option 'slep' \(did you mean sleep\?\)"):
            Slow().option("slep")

    def test_an_option_that_is_not_keyword_only_is_refused(self):
        def mine(state, t, to, data, sleep=1):
            yield t + sleep, to, data

        with self.assertRaisesRegex(ValueError, "'sleep' is no option, because it comes before"):
            vaurien.check_handler("mine", mine)

    def test_an_option_with_the_name_of_a_rule_field_is_refused(self):
        class Taken(vaurien.BaseHandler):
            options = {"percent": ("Percentage", int, 1)}

        with self.assertRaisesRegex(ValueError, "an option cannot be called 'percent'"):
            vaurien.check_handler("x", Taken)

    def test_an_option_without_a_type_is_refused(self):
        def untyped(state, t, to, data, *, size=None):
            yield t, to, data

        with self.assertRaisesRegex(ValueError, "the default of option 'size' must be a yes/no"):
            vaurien.check_handler("untyped", untyped)

    def test_fields_that_a_blocking_handler_does_not_support_are_refused(self):
        with registered(Passes), self.assertRaises(vaurien.InputError) as caught:
            vaurien.read_rules([{"name": "Passes", "stream": "upstream", "match": "x"}])
        self.assertEqual([field for field, _ in caught.exception.errors], ["stream", "match"])


# -- Page -----------------------------------------------------------------------


class TestPage(unittest.TestCase):
    """The page as a response, and its source. TestBrowser uses it in a browser."""

    # A page that only writes texts needs none of these.
    FORBIDDEN = [
        "innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "DOMParser",
        "createContextualFragment", r"\beval\b", r"\bFunction\(", r"\bimport\b", "srcdoc",
        r"""setTimeout\(["'`]""",
        "localStorage", r"\bcookie\b", "postMessage", "window.open", r"\blocation\b",
        r"<[^>]*\son\w+\s*=", r"<[^>]*\sstyle\s*=", "javascript:", "<iframe", "<a ", "<link",
        r"\bsrc\b", r"\bhref\b", r"url\(", "@import",
        r"https?://(?!www[.]w3[.]org/(2000/svg|1999/xhtml)\")"]

    def get(self, headers, method="GET", path="/", token=None):
        control = vaurien.Control(("localhost", 0), proxy_table(), token)
        return vaurien.handle_request(control, method, path, no_body, headers)

    def test_a_browser_gets_the_page_and_other_clients_the_list_of_routes(self):
        chromium = ("text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,"
                    "image/webp,*/*;q=0.8")
        for accept, path, is_page in (
                (chromium, "/", True), ("text/html", "/", True), ("Text/HTML", "/?a#b", True),
                ("*/*", "/", False), ("application/json", "/", False), ("", "/", False),
                (None, "/", False), (chromium, "/handlers", False)):
            for method in "GET", "HEAD":
                with self.subTest(accept, path=path, method=method):
                    path = "/" if is_page else path
                    response = self.get({} if accept is None else {"Accept": accept}, method, path)
                    self.assertEqual(response.status, 200)
                    self.assertEqual("<!DOCTYPE html>" in response.text, is_page)
                    expected = "text/html; charset=utf-8" if is_page else "text/plain"
                    if path == "/":
                        self.assertIn(expected, response.headers["Content-Type"])

    def test_the_headers_allow_only_the_script_and_the_style_of_this_response(self):
        nonces = set()
        for _ in range(3):
            response = self.get({"Accept": "text/html"})
            policy = dict(directive.split(" ", 1) for directive in
                          response.headers["Content-Security-Policy"].split("; "))
            nonce, = set(re.findall('nonce="(.*?)"', response.text))
            nonces.add(nonce)
            self.assertEqual(policy, {
                "default-src": "'none'", "script-src": "'nonce-%s'" % nonce,
                "style-src": "'nonce-%s'" % nonce, "connect-src": "'self'", "base-uri": "'none'",
                "form-action": "'none'", "frame-ancestors": "'none'",
                "require-trusted-types-for": "'script'", "trusted-types": "'none'"})
            self.assertEqual(response.text.count(nonce), 2)
            self.assertNotIn("NONCE", response.text)
        self.assertEqual(len(nonces), 3)
        for name, value in (
                ("X-Frame-Options", "DENY"), ("X-Content-Type-Options", "nosniff"),
                ("Referrer-Policy", "no-referrer"), ("Cache-Control", "no-store"),
                ("Cross-Origin-Opener-Policy", "same-origin"), ("Vary", "Accept")):
            with self.subTest(name):
                self.assertEqual(response.headers[name], value)

    def test_who_gets_the_page(self):
        for name, headers, token, status in (
                ("typed address", {"Sec-Fetch-Site": "none"}, None, 200),
                ("link of another site", {"Sec-Fetch-Site": "cross-site"}, None, 200),
                ("DNS rebinding", {"Host": "evil.example"}, None, 403),
                ("script of another site", {"Origin": "http://evil.example"}, None, 403),
                ("a token is needed, for the data", {}, "s3cret", 200)):
            with self.subTest(name):
                response = self.get(dict({"Accept": "text/html", "Host": "localhost"}, **headers),
                                    token=token)
                self.assertEqual(response.status, status)
                self.assertEqual("<script nonce=" in response.text, status == 200)
                self.assertNotIn("s3cret", response.text)
        for method, path, headers in (
                ("GET", "/", {"Accept": "*/*"}), ("POST", "/", {"Accept": "text/html"}),
                ("GET", "/status", {"Accept": "text/html"})):
            with self.subTest(method, path=path):
                self.assertEqual(self.get(headers, method, path, token="s3cret").status, 401)

    def test_the_source_only_writes_texts_and_loads_nothing(self):
        for pattern in self.FORBIDDEN:
            with self.subTest(pattern):
                self.assertEqual(re.findall(pattern, vaurien.PAGE), [])
        self.assertEqual(len(re.findall("<script", vaurien.PAGE)), 1)
        self.assertEqual(len(re.findall("<style", vaurien.PAGE)), 1)
        self.assertLessEqual(max(map(len, vaurien.PAGE.splitlines())), 99)

    def test_the_source_of_the_page_is_ascii(self):
        self.assertEqual(vaurien.PAGE.encode("ascii").decode(), vaurien.PAGE)

    def test_texts_have_a_contrast_of_at_least_4_5(self):
        """By the formula of WCAG 2.1, in both colour schemes."""
        def luminance(color):
            color = color if len(color) == 6 else "".join(2 * digit for digit in color)
            channels = [int(color[index:index + 2], 16) / 255 for index in (0, 2, 4)]
            linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4
                      for value in channels]
            return sum(map(operator.mul, linear, (0.2126, 0.7152, 0.0722)))

        style, = re.findall("<style.*?</style>", vaurien.PAGE, re.DOTALL)
        light, dark = (dict(re.findall("--([a-z]+): #([0-9a-f]+)", scheme))
                       for scheme in re.findall(":root {(.*?)}", style, re.DOTALL))
        self.assertEqual(set(light), set(dark))
        for scheme in light, dark:
            for text in "text", "soft", "accent", "second", "good", "bad":
                for ground in "ground", "card":
                    with self.subTest(text, ground=ground):
                        brighter, darker = sorted(
                            (luminance(scheme[name]) for name in (text, ground)), reverse=True)
                        self.assertGreaterEqual((brighter + 0.05) / (darker + 0.05), 4.5)


# -- Control --------------------------------------------------------------------


def no_body():
    """Return the empty body of a request. Tests pass this function as `read_body`."""
    return b""


def send_raw(client, data):
    """Send bytes to the control server of a client.

    Returns the bytes received until the server closes or resets the connection.
    """
    response = bytearray()
    with contextlib.closing(connect(client.port)) as sock:
        sock.sendall(data)
        with contextlib.suppress(ConnectionError):
            for received in iter(lambda: sock.recv(65536), b""):
                response += received
    return bytes(response)


def http_status(response):
    """Return the status code of the bytes of an HTTP response."""
    return int(response.split()[1])


class TestRoutes(unittest.TestCase):
    """Each route of the control API, called as a function: no HTTP is involved."""

    def setUp(self):
        stack = contextlib.ExitStack()
        self.addCleanup(stack.close)
        # No test connects to the backends.
        self.one = stack.enter_context(OpenProxy(
            "127.0.0.1:9", "127.0.0.1:0", "20:delay,5:hang", {"delay": {"sleep": 2}}, "one"))
        self.two = stack.enter_context(OpenProxy("127.0.0.1:9", "127.0.0.1:0", name="two"))
        self.control = vaurien.Control(("localhost", 0), proxy_table(self.one, self.two))
        self.control.url = "http://localhost:8080"

    def request(self, method, target, body=b"", status=200):
        """Handle a request, and check the status of the response.

        Returns the body of the response: parsed if it is JSON, otherwise the text.
        """
        response = vaurien.handle_request(self.control, method, target, read_body=lambda: body)
        self.assertEqual(response.status, status, response.text)
        if response.headers["Content-Type"] == "application/json":
            return json.loads(response.text)
        return response.text

    def request_errors(self, method, target, body=b"", status=400):
        """Handle a request that must be refused with this status.

        Returns [(location, name, description)]: the errors that the response lists.
        """
        response = self.request(method, target, body, status)
        self.assertEqual(response["status"], "error")
        return [(error["location"], error["name"], error["description"])
                for error in response["errors"]]

    def check_errors(self, *cases):
        """Check that each request is refused with one error, and that no rule has changed.

        cases    (method, target, body, location and name of the error, part of its description)
        """
        for method, target, body, location, name, text in cases:
            with self.subTest(text, request=(method, target, body[:80])):
                (error_location, error_name, description), = self.request_errors(
                    method, target, body)
                self.assertEqual((error_location, error_name), (location, name))
                self.assertIn(text, description)
        self.assertEqual(self.one.describe(), "20:delay sleep=2.0, 5:hang, 75:dummy")

    def test_api_of_vaurien_0_1(self):
        self.assertEqual(self.request("GET", "/handler"), "delay,hang")
        self.assertEqual(self.request("POST", "/handler", b"delay"), "ok")
        self.assertEqual(self.request("GET", "/handler"), "delay")
        self.assertEqual(self.one.describe(), "100:delay sleep=1.0")
        self.assertEqual(self.request("POST", "/handler", b'{"name": "delay", "sleep": 2}'), "ok")
        self.assertEqual(self.one.describe(), "100:delay sleep=2.0")
        self.assertEqual(self.request("GET", "/handlers"), {"handlers": list(HANDLERS)})

    def test_api_of_vaurien_1(self):
        self.assertEqual(self.request("GET", "/behavior?proxy=two"), {"behavior": "dummy"})
        self.assertEqual(self.request("PUT", "/behavior", b'{"name": "delay", "sleep": 2}'),
                         {"status": "ok"})
        self.assertEqual(self.request("GET", "/behavior"), {"behavior": "delay"})
        self.assertEqual(self.request("GET", "/behaviors"), {"behaviors": list(HANDLERS)})
        self.assertEqual(self.request("GET", "/backend"), {"backend": "127.0.0.1:9"})
        self.assertEqual(self.request("PUT", "/backend", b'{"backend": "[::1]:80"}'),
                         {"status": "ok"})
        self.assertEqual(self.request("GET", "/backend"), {"backend": "[::1]:80"})

    def test_a_new_behavior_keeps_no_option_of_the_previous_one(self):
        self.request("PUT", "/behavior",
                     b'{"name": "delay", "sleep": 2, "before": false, "percent": 5}')
        self.assertEqual(self.one.describe(), "5:delay sleep=2.0 before=no, 95:dummy")
        self.request("PUT", "/behavior", b'{"name": "delay"}')
        self.assertEqual(self.one.describe(), "100:delay sleep=1.0")
        self.request("POST", "/handler", b"dummy")
        self.assertEqual(self.one.rules.installed, [])

    def test_fields_of_a_rule(self):
        self.request("PUT", "/behavior",
                     b'{"name": "error", "percent": 20, "per": "connection", '
                     b'"stream": "downstream", "after": 3, "times": 2}')
        rule, = self.one.rules.installed
        self.assertEqual((rule.draw_min, rule.draw_max,
                          rule.per, rule.stream, rule.after, rule.times),
                         (0, 20, "connection", "downstream", 3, 2))

    def test_put_of_the_result_of_get_restores_the_rules(self):
        rules = self.request("GET", "/rules")
        self.assertEqual([rule["percent"] for rule in rules["rules"]], [20, 5])
        self.request("POST", "/handler", b"blackout")
        self.request("PUT", "/rules", json.dumps(rules).encode())
        self.assertEqual(self.one.describe(), "20:delay sleep=2.0, 5:hang, 75:dummy")

    def test_get_shows_whether_a_rule_is_in_a_window_and_until_when(self):
        for fields, active, seconds in [({"start": "90s"}, False, 90),
                                        ({"duration": 60}, True, 60),
                                        ({"duration": 60, "ttl": "5s"}, True, 5),
                                        ({"start": 5, "ttl": 2}, False, 2),
                                        ({"ramp": 10}, True, None)]:
            with self.subTest(**fields):
                before = time.time()
                self.request("PUT", "/behavior", json.dumps(dict(fields, name="delay")).encode())
                rules = self.request("GET", "/rules")
                rule, = rules["rules"]
                self.assertIs(rule["active"], active)
                if seconds is None:
                    self.assertIsNone(rule["until"])
                else:
                    self.assertGreaterEqual(rule["until"], before + seconds - 0.1)
                    self.assertLessEqual(rule["until"], time.time() + seconds + 0.1)
                self.request("PUT", "/rules", json.dumps(rules).encode())
                self.assertEqual(self.request("GET", "/rules")["rules"][0]["active"], active)
        set_behavior(self.one, "20:delay,5:hang", delay={"sleep": 2})
        self.assertNotIn("active", self.request("GET", "/rules")["rules"][0])
        self.check_errors(
            ("PUT", "/rules", b'{"rules": [{"name": "delay", "until": 5}]}', "body", "until",
             "until is not an option of delay"),
            ("PUT", "/rules", b'{"rules": [{"name": "delay", "active": "yes"}]}', "body",
             "active", "active is not an option of delay"),
            ("PUT", "/behavior", b'{"name": "delay", "every": 5}', "body", "every",
             "every needs duration"))

    def test_put_of_the_result_of_get_restores_the_position_of_dummy(self):
        behavior = [(20, "delay"), (30, "dummy"), (5, "error")]
        with OpenProxy("127.0.0.1:9", "127.0.0.1:0", behavior) as proxy:
            self.control.proxies = proxy_table(proxy)
            rules = self.request("GET", "/rules")
            self.request("PUT", "/rules", json.dumps(rules).encode())
            draws = [(rule.draw_min, rule.draw_max) for rule in proxy.rules.installed]
            self.assertEqual(draws, [(0, 20), (50, 55)])    # from 20 to 50: dummy

    def test_rules_of_open_blocks_are_listed_apart_from_those_of_the_behavior(self):
        rules = self.request("GET", "/rules")["rules"]
        numbers = [self.request("POST", "/blocks?only=" + only, b'{"name": "hang"}',
                                status=201)["block"] for only in ("no", "yes")]
        listing = self.request("GET", "/rules")
        self.assertEqual(listing["rules"], rules)
        blocks = [(block["block"], block["only"], [rule["name"] for rule in block["rules"]])
                  for block in listing["blocks"]]
        self.assertEqual(blocks, [(numbers[0], False, ["hang"]), (numbers[1], True, ["hang"])])
        self.request("PUT", "/rules", json.dumps(listing).encode())
        self.assertEqual(self.request("GET", "/rules"), dict(listing, blocks=[]))

    def test_the_seed_and_the_changes_of_the_rules_repeat_a_run(self):
        self.assertEqual(self.request("GET", "/rules")["seed"], self.one.seed)
        toxic = vaurien.Toxic("latency", "slow", 0.5, {"latency": 1})
        self.one.loop.run_sync(self.one.set_toxics, [toxic])
        self.request("PUT", "/behavior", b'{"name": "delay", "sleep": 2, "match": "^a"}')
        response = self.request("GET", "/changes")
        self.assertEqual(response["seed"], self.one.seed)
        changes = response["changes"]
        self.assertEqual([[(rule["name"], rule["percent"], rule.get("toxic"))
                           for rule in change["rules"]] for change in changes],
                         [[("delay", 20, None), ("hang", 5, None)],
                          [("delay", 20, None), ("hang", 5, None), ("latency", 50, "slow")],
                          [("delay", 100, None), ("latency", 50, "slow")]])
        self.assertEqual((changes[2]["rules"][0]["match"], changes[2]["rules"][0]["sleep"]),
                         ("^a", 2))
        self.assertEqual([(change["after"], change["connection"]) for change in changes],
                         [(0, 0)] * 3)

    def test_the_declarations_are_those_of_the_handlers_and_rule_fields(self):
        declarations = self.request("GET", "/declarations")
        self.assertEqual(list(declarations["handlers"]), list(HANDLERS))
        self.assertEqual(list(declarations["fields"]), list(vaurien.RULE_FIELDS))
        self.assertEqual(declarations["kinds"]["redis"], list(vaurien.Redis.errors))
        for name, function in HANDLERS.items():
            listed = declarations["handlers"][name]
            self.assertEqual(listed["help"], vaurien.summary(function))
            options = vaurien.handler_options(function)
            self.assertEqual({option: value["default"]
                              for option, value in listed["options"].items()}, options)
            for option, value in listed["options"].items():
                with self.subTest(name, option=option):
                    self.assertEqual(value["type"], type(options[option]).__name__)
                    self.assertTrue(value["help"])
                    for choice in value["choices"]:
                        vaurien.check_option(name, option, choice)
        for field, expected in (
                ("percent", ("float", 100, [])), ("match", ("str", None, [])),
                ("per", ("str", "request", ["request", "connection"]))):
            listed = declarations["fields"][field]
            self.assertEqual((listed["type"], listed["default"], listed["choices"]), expected)

    def test_the_status_of_all_proxies(self):
        self.request("POST", "/proxies/two/toxics",
                     b'{"type": "latency", "name": "slow", "ttl": 60}')
        status = self.request("GET", "/status")
        self.assertEqual(status["version"], vaurien.__version__)
        one, two = status["proxies"]
        state = self.request("GET", "/proxy?proxy=two")
        self.assertEqual({name: two[name] for name in state}, state)
        self.assertEqual((two["protocol"], two["open"], two["rates"]), ("tcp", 0, {}))
        self.assertEqual(two["counts"]["requests"], 0)
        self.assertEqual([(rule["name"], rule["percent"]) for rule in one["installed"]],
                         [("delay", 20), ("hang", 5)])
        toxic, = two["installed"]
        self.assertEqual((toxic["name"], toxic["toxic"], toxic["active"]),
                         ("latency", "slow", True))
        self.assertTrue(0 < toxic["until"] - two["time"] <= 60)

    def test_the_rates_of_a_time(self):
        """The counts grow during the measurement, which time.sleep begins."""
        def measure(seconds, sleep=time.sleep):
            self.one.rules.request_count += 500
            self.one.closed_bytes[0] += 1000
            sleep(0.01)

        with mock.patch.object(time, "sleep", measure):
            one, two = self.request("GET", "/status?seconds=1")["proxies"]
        rates = one["rates"]
        self.assertEqual(list(rates), list(one["counts"]))
        self.assertTrue(0 < rates["requests"] < 50000, rates)
        self.assertAlmostEqual(rates["bytes_up"], 2 * rates["requests"], 1)
        self.assertEqual((rates["faults"], set(two["rates"].values())), (0, {0}))
        self.check_errors(*(("GET", "/status?seconds=" + text, b"", "querystring", "seconds",
                             "0, or a number of seconds from 0.01 to 10")
                            for text in ("11", "-1", "0.001", "nan", "x")))

    def test_the_query_selects_one_of_several_proxies(self):
        self.request("POST", "/handler?proxy=two", b"blackout")
        self.assertEqual(self.request("GET", "/handler?proxy=two"), "blackout")
        self.assertEqual(self.request("GET", "/handler"), "delay,hang")

    def test_index_lists_all_routes_and_proxies(self):
        text = self.request("GET", "/")
        for path in vaurien.ROUTES:
            with self.subTest(path):
                self.assertIn("http://localhost:8080" + path, text)
        self.assertIn("Proxies: one (seed %s), two (seed %s);" % (self.one.seed, self.two.seed),
                      text)

    def test_errors_in_the_name_of_a_handler(self):
        self.check_errors(
            ("POST", "/handler", b"nope",
             "body", "name", "unknown handler 'nope'"),
            ("POST", "/handler", b"",
             "body", "name", "unknown handler ''"),
            ("PUT", "/behavior", b'{"sleep": 2}',
             "body", "name", "unknown handler None"),
            ("PUT", "/behavior", b'{"name": ["x"]}',
             "body", "name", "unknown handler ['x']"))

    def test_errors_in_the_options_of_a_handler(self):
        self.check_errors(
            ("PUT", "/behavior", b'{"name": "delay", "dely": 2}',
             "body", "dely", "dely is not an option of delay: it has before, sleep"),
            ("PUT", "/behavior", b'{"name": "delay", "sleep": true}',
             "body", "sleep", "sleep must be a number, 0 or more, not True"),
            ("PUT", "/behavior", b'{"name": "delay", "sleep": NaN}',
             "body", "sleep", "not nan"),
            ("PUT", "/behavior", b'{"name": "delay", "sleep": 1e999}',
             "body", "sleep", "not inf"),
            ("PUT", "/behavior", b'{"name": "delay", "sleep": null}',
             "body", "sleep", "not None"),
            ("PUT", "/behavior", b'{"name": "delay", "before": 7}',
             "body", "before", "yes or no"))

    def test_errors_in_the_fields_of_a_rule(self):
        self.check_errors(
            ("PUT", "/behavior", b'{"name": "delay", "percent": 101}',
             "body", "percent", "percent must be a number from 0 to 100, not 101"),
            ("PUT", "/behavior", b'{"name": "delay", "per": "chunk"}',
             "body", "per", "per must be one of request, connection, not 'chunk'"),
            ("PUT", "/behavior", b'{"name": "error", "times": -1}',
             "body", "times", "times must"),
            ("PUT", "/rules", b'{"rules": 5}',
             "body", "rules", "the body must be"),
            ("PUT", "/rules",
             b'{"rules": [{"name": "delay", "percent": 60}, {"name": "hang", "percent": 60}]}',
             "body", "percent", "percent must add up to 100 at most, not 120: to combine faults, "
                                "use --fault or toxics"))

    def test_errors_in_the_form_of_a_body(self):
        self.check_errors(
            ("PUT", "/behavior", b"delay",
             "body", "", "the body must be JSON"),
            ("PUT", "/behavior", b"[" * 100000,
             "body", "", "the body must be JSON"),
            ("PUT", "/behavior", b"[]",
             "body", "", "the body must be a JSON object"),
            ("PUT", "/behavior", b"\xff",
             "body", "", "the body must be UTF-8"),
            ("PUT", "/behavior", b'{"name": "error", "warmup": 1' + b"0" * 500 + b"}",
             "body", "", "400 digits at most, not 501"))

    def test_errors_in_a_backend(self):
        self.check_errors(
            ("PUT", "/backend", b"{}",
             "body", "backend", "backend must be HOST:PORT"),
            ("PUT", "/backend", b'{"backend": "http://x/"}',
             "body", "backend", "like x:80"),
            ("PUT", "/backend", b'{"backend": "x:1", "y": 2}',
             "body", "y", "y is not known"))

    def test_errors_in_a_query(self):
        self.check_errors(
            ("GET", "/handler?proxy=nope", b"",
             "querystring", "proxy", "there are one, two"),
            ("GET", "/handler?x=1", b"",
             "querystring", "x", "does not know 'x'"),
            ("GET", "/events?since=x", b"",
             "querystring", "since", "since must be"),
            ("POST", "/blocks?only=x", b'{"name": "hang"}',
             "querystring", "only", "only must be yes or no, not 'x'"))

    def test_errors_in_a_path(self):
        self.check_errors(
            ("DELETE", "/blocks/x", b"",
             "path", "block", "block must be a whole number"),
            ("DELETE", "/connections/x", b"",
             "path", "number", "number must be a whole number"))
        (location, name, text), = self.request_errors("GET", "/proxies/on/events", status=404)
        self.assertEqual((location, name), ("path", "proxy"))
        self.assertIn("there is no proxy 'on' (did you mean one?)", text)

    def test_a_response_lists_all_errors_of_its_request(self):
        for target, body, names in [
                ("/behavior", b'{"name": "delay", "sleep": -1, "x": 1, "per": 2}',
                 {"sleep", "x", "per"}),
                ("/behavior", b'{"name": "nope", "percent": 200}', {"name", "percent"}),
                ("/backend", b'{"backend": "x", "y": 1, "z": 2}', {"backend", "y", "z"})]:
            with self.subTest(body):
                errors = self.request_errors("PUT", target, body)
                self.assertEqual({name for _, name, _ in errors}, names)

    def test_the_proxys_own_address_is_refused_as_its_backend(self):
        (_, name, description), = self.request_errors(
            "PUT", "/backend", b'{"backend": "127.0.0.1:%d"}' % self.one.port)
        self.assertEqual(name, "backend")
        self.assertIn("is the proxy's own address", description)

    def test_unknown_paths_and_methods(self):
        for method, path, status, text in [
                ("GET", "/nope", 404, "there is no /nope"),
                ("PATCH", "/handler", 405, "/handler takes GET, POST")]:
            with self.subTest(method, path=path):
                (_, _, description), = self.request_errors(method, path, status=status)
                self.assertIn(text, description)

    def test_head_is_handled_as_get(self):
        self.assertEqual(self.request("HEAD", "/behavior?proxy=two"), {"behavior": "dummy"})


class TestControl(unittest.TestCase):
    """The control server over HTTP, with clients that send anything or nothing."""

    def test_malformed_requests_get_a_4xx_and_disturb_no_connection(self):
        with proxy_with_control() as (proxy, client), connected_client(proxy) as sock:
            send_and_read(sock, b"question")
            for name, data, status in [
                    ("no method", b"nonsense\r\n\r\n", 400),
                    ("version", b"GET / HTTP/9.9.9\r\n\r\n", 400),
                    ("method", b"BREW /handler HTTP/1.1\r\nConnection: close\r\n\r\n", 405),
                    ("long path", b"GET /" + b"x" * 70000 + b" HTTP/1.1\r\n\r\n", 414),
                    ("path", b"GET /%ff%00/.. HTTP/1.1\r\nConnection: close\r\n\r\n", 404),
                    ("length is not a number",
                     b"POST /handler HTTP/1.1\r\nContent-Length: x\r\n\r\n", 400),
                    ("negative length",
                     b"POST /handler HTTP/1.1\r\nContent-Length: -5\r\n\r\n", 400),
                    ("body of more than 1 MiB",
                     b"POST /handler HTTP/1.1\r\nContent-Length: 1048577\r\n\r\n", 413),
                    ("transfer encoding",
                     b"POST /handler HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n5\r\ndelay\r\n",
                     411),
                    ("content encoding",
                     b"POST /handler HTTP/1.1\r\nContent-Encoding: gzip\r\n"
                     b"Content-Length: 5\r\n\r\ndelay", 415)]:
                with self.subTest(name):
                    response = send_raw(client, data)
                    self.assertEqual(http_status(response), status)
                    _, _, body = response.partition(b"\r\n\r\n")
                    self.assertEqual(json.loads(body.decode())["status"], "error")
            self.assertEqual(client.get_handler(), "dummy")
            send_and_read(sock, b"question")

    def test_a_body_of_one_mebibyte_is_read(self):
        size = 1 << 20
        with proxy_with_control() as (_, client):
            response = send_raw(
                client,
                b"POST /handler HTTP/1.0\r\nContent-Length: %d\r\n\r\n" % size + b"x" * size)
            self.assertEqual(http_status(response), 400)    # no handler has this name

    def test_idle_clients_get_a_408_and_do_not_delay_other_clients(self):
        with mock.patch.object(vaurien, "IDLE_TIMEOUT", 0.2), \
                mock.patch.object(vaurien, "READ_TIMEOUT", 0.2), \
                proxy_with_control() as (_, client), \
                contextlib.closing(connect(client.port)) as silent, \
                contextlib.closing(connect(client.port)) as partial:
            partial.sendall(b"POST /handler HTTP/1.1\r\nContent-Length: 5\r\n\r\nde")
            self.assertEqual(client.get_handler(), "dummy")
            for name, sock in ("silent", silent), ("partial", partial):
                with self.subTest(name):
                    self.assertEqual(http_status(sock.recv(1000)), 408)

    def test_a_client_may_be_idle_longer_than_a_request_may_pause(self):
        with mock.patch.object(vaurien, "READ_TIMEOUT", 0.1), \
                proxy_with_control() as (_, client):
            idle = http.client.HTTPConnection("127.0.0.1", client.port, timeout=TIMEOUT)
            with contextlib.closing(idle):
                idle.request("GET", "/handler")
                self.assertEqual(idle.getresponse().read(), b"dummy")
                # This response comes after READ_TIMEOUT, in which the other client is idle.
                partial = send_raw(
                    client, b"POST /handler HTTP/1.1\r\nContent-Length: 5\r\n\r\nde")
                self.assertEqual(http_status(partial), 408)
                with mock.patch.object(idle, "auto_open", 0):       # do not reconnect
                    idle.request("GET", "/handler")
                    self.assertEqual(idle.getresponse().read(), b"dummy")

    def test_the_client_that_is_idle_longest_is_closed_if_there_are_too_many(self):
        control = vaurien.Control(("localhost", 0), proxy_table())
        control.loop = mock.Mock()
        sessions = {name: vaurien.Session(control, mock.Mock())
                    for name in ["used", "first request", "second request", "idle", "newest"]}
        control.clients.update((session.client, session) for session in sessions.values())
        for name, t in ("first request", 30), ("second request", 31), ("used", 32), ("used", None):
            sessions[name].apply_deadline(t)
        for name in "idle", "newest", "used", "first request", "second request":
            with self.subTest(name):
                control.disconnect_least_used()
                sessions[name].client.shutdown.assert_called_once_with(socket.SHUT_RDWR)
        self.assertEqual(len(control.clients), 0)

    def test_many_clients_reconnect_after_each_response_instead_of_being_closed(self):
        with mock.patch.object(vaurien, "CLIENTS_MAX", 4), \
                proxy_with_control() as (_, client), contextlib.ExitStack() as stack:
            for expected in None, None, "close":
                connection = http.client.HTTPConnection("127.0.0.1", client.port,
                                                        timeout=TIMEOUT)
                stack.enter_context(contextlib.closing(connection))
                connection.request("GET", "/handler")
                response = connection.getresponse()
                self.assertEqual(response.read(), b"dummy")
                self.assertEqual(response.getheader("Connection"), expected)

    def test_silent_clients_do_not_keep_others_out(self):
        with mock.patch.object(vaurien, "CLIENTS_MAX", 4), \
                proxy_with_control() as (_, client), contextlib.ExitStack() as stack:
            silent_socks = [stack.enter_context(contextlib.closing(connect(client.port)))
                            for _ in range(12)]
            for _ in range(6):
                self.assertEqual(client.get_handler(), "dummy")
            self.assertEqual(silent_socks[0].recv(1000), b"")       # the oldest one is closed

    def test_the_server_goes_on_after_a_thread_could_not_be_started(self):
        with proxy_with_control() as (_, client):
            with self.assertLogs("vaurien", "ERROR") as logged:
                with mock.patch.object(threading.Thread, "start",
                                       side_effect=RuntimeError("none")):
                    with self.assertRaises(OSError):
                        client.get_handler()
                    wait_until(lambda: logged.output)
            self.assertEqual(client.get_handler(), "dummy")

    def test_a_client_that_waits_for_100_continue(self):
        with proxy_with_control() as (_, client), \
                contextlib.closing(connect(client.port)) as sock:
            sock.sendall(b"POST /handler HTTP/1.1\r\n"
                         b"Expect: 100-continue\r\n"
                         b"Content-Length: 5\r\n\r\n")
            self.assertEqual(sock.recv(1000), b"HTTP/1.1 100 Continue\r\n\r\n")
            sock.sendall(b"delay")
            self.assertEqual(http_status(sock.recv(1000)), 200)

    def test_a_client_that_sends_too_large_a_body_receives_the_response(self):
        with proxy_with_control() as (_, client):
            with self.assertRaisesRegex(ValueError, "a body may have 1048576 bytes at most"):
                client.set_handler("delay", sleep="x" * 5000000)

    def test_an_exception_in_a_route_is_a_500(self):
        def fail(request):
            raise KeyError("no idea")

        route = vaurien.ROUTES["/handler"]["GET"]._replace(function=fail)
        with proxy_with_control() as (_, client), self.assertLogs("vaurien", "ERROR"):
            with mock.patch.dict(vaurien.ROUTES["/handler"], GET=route):
                with self.assertRaisesRegex(ValueError, "KeyError: 'no idea'"):
                    client.ask("GET", "/handler")

    def test_setting_the_backend_while_the_old_name_is_looked_up(self):
        lookup_may_end, real_resolve = threading.Event(), vaurien.resolve

        def resolve(address, *args, **kwargs):
            host, port = address
            if host == "slow.invalid":
                lookup_may_end.wait(TIMEOUT)
                return real_resolve(("127.0.0.1", port))
            return real_resolve(address, *args, **kwargs)

        def resolve_numeric(address, *_):
            return []           # each address needs a lookup

        def serve_with(data):
            def serve(sock):
                sock.sendall(data)
                read_until_close(sock)
            return serve

        with backend_server(serve_with(b"old")) as (old_port, _), \
                backend_server(serve_with(b"new")) as (new_port, _), \
                OpenProxy("slow.invalid:%d" % old_port, "127.0.0.1:0") as proxy, \
                mock.patch.object(vaurien, "resolve", resolve), \
                mock.patch.object(vaurien, "resolve_numeric", resolve_numeric), \
                connected_client(proxy) as first_client:
            wait_until(lambda: proxy.lookups)
            proxy.set_backend(("127.0.0.1", new_port))
            with connected_client(proxy) as second_client:
                self.assertEqual(read_exactly(second_client, 3), b"new")
            lookup_may_end.set()
            self.assertEqual(read_exactly(first_client, 3), b"old")

    def test_one_connection_carries_several_requests(self):
        with proxy_with_control() as (_, client):
            connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=TIMEOUT)
            with contextlib.closing(connection):
                connection.connect()
                sock, bodies = connection.sock, []
                for method, path, body in [("GET", "/handler", None),
                                           ("POST", "/handler", "delay"),
                                           ("PUT", "/behavior", "nonsense"),
                                           ("HEAD", "/", None),
                                           ("GET", "/behavior", None)]:
                    connection.request(method, path, body)
                    bodies.append(connection.getresponse().read())
                    self.assertIs(connection.sock, sock)
                self.assertEqual(bodies[-1], b'{"behavior": "delay"}')

    def test_the_server_responds_although_the_proxys_peers_are_stuck(self):
        """One client never reads, 200 connections hang, and the new backend never accepts."""
        def send_50_mb(sock):
            with contextlib.suppress(OSError):
                sock.sendall(bytes(50000000))

        with proxy_with_control(send_50_mb) as (proxy, client), contextlib.ExitStack() as stack:
            stack.enter_context(connected_client(proxy))
            wait_until(lambda: proxy.loop.budget.held)
            client.set_handler("hang")
            hanging_socks = [stack.enter_context(connected_client(proxy)) for _ in range(200)]
            for sock in hanging_socks:
                sock.sendall(bytes(10000))
            wait_until(lambda: proxy.faults["hang"] == 200)
            with silent_address() as silent_port:
                client.set_backend("127.0.0.1:%d" % silent_port)
                for name in "delay", "hang", "dummy":
                    with self.subTest(name):
                        client.set_handler(name)
                        self.assertEqual(client.get_handler(), name)
                connections = client.connections()
                self.assertEqual(len(connections), 201)
                self.assertFalse(all(connection["connected"] for connection in connections))
                self.assertTrue(any(connection["held_down"] for connection in connections))

    def test_connections_lists_the_open_connections(self):
        with proxy_with_control() as (proxy, client), connected_client(proxy) as sock:
            send_and_read(sock, b"question")
            client.set_handler("delay", sleep=0.001)
            send_and_read(sock, b"another")
            connection, = client.connections()
            self.assertEqual(connection["client"], "127.0.0.1:%d" % sock.getsockname()[1])
            self.assertEqual(connection["backend"], vaurien.format_address(proxy.backend))
            size = len(b"question" + b"another")
            self.assertEqual((connection["bytes_up"], connection["bytes_down"]), (size, size))
            self.assertEqual((connection["requests"], connection["faults"]), (2, ["delay"]))
            self.assertTrue(connection["connected"])
            self.assertGreaterEqual(connection["age"], 0)
            with connected_client(proxy):
                wait_until(lambda: len(proxy.connections) == 2)
                for newest, numbers in (0, []), (1, [2]), (5, [1, 2]):
                    self.assertEqual([connection["number"] for connection in client.request(
                        "GET", "/connections", newest=newest)["connections"]], numbers)
                with self.assertRaisesRegex(ValueError, "newest must be a whole number"):
                    client.request("GET", "/connections", newest="-1")

    def test_events_lists_the_fault_records(self):
        options = {"sleep": 0.001, "before": True}
        with proxy_with_control(behavior="100:delay", options={"delay": options}) as (
                proxy, client):
            with connected_client(proxy) as sock:
                for _ in range(3):
                    send_and_read(sock, b"question")
            records = client.events()
            self.assertEqual(
                [(record.number, record.connection, record.request, record.handler,
                  record.options) for record in records],
                [(index, 1, index, "delay", options) for index in (1, 2, 3)])
            self.assertEqual(client.events(since=2), records[2:])

    def test_new_connections_go_to_the_new_backend(self):
        def reply_in_upper_case(sock):
            sock.sendall(read_exactly(sock, 8).upper())
            echo(sock)

        with proxy_with_control() as (proxy, client), \
                backend_server(reply_in_upper_case) as (port, _), \
                connected_client(proxy) as old_client:
            send_and_read(old_client, b"question")
            client.set_backend("127.0.0.1:%d" % port)
            self.assertEqual(client.get_backend(), "127.0.0.1:%d" % port)
            with connected_client(proxy) as new_client:
                new_client.sendall(b"question")
                self.assertEqual(read_exactly(new_client, 8), b"QUESTION")
            self.assertEqual(send_and_read(old_client, b"question"), b"question")


class TestAccess(TempDirTestCase):
    """Access control and time limits of the control server."""

    def request_status(self, headers, local="localhost", token=None, names=()):
        """Return the status of the response to a request with these headers.

        The other arguments are those of vaurien.Control; `local` is a host.
        """
        control = vaurien.Control((local, 0), proxy_table(), token, names)
        return vaurien.handle_request(control, "GET", "/handlers", no_body, headers).status

    def check_header(self, name, cases, headers=None, **settings):
        """Check the status for each value of a header.

        cases       (value of the header, expected status)
        headers     further headers of the request
        settings    keyword arguments of request_status
        """
        for value, expected in cases:
            with self.subTest("%s: %s" % (name, value[:50])):
                status = self.request_status(dict(headers or {}, **{name: value}), **settings)
                self.assertEqual(status, expected)

    def test_host_header_must_be_an_address_or_a_name_of_the_server(self):
        self.check_header("Host", [
            ("localhost", 200),
            ("localhost:8080", 200),
            ("LOCALHOST.:1", 200),
            ("127.0.0.1:8080", 200),
            ("[::1]:8080", 200),
            ("::1", 403),
            ("10.1.2.3", 200),
            ("evil.example", 403),
            ("evil.example:8080", 403),
            ("localhost.evil.example", 403),
            ("127.0.0.1.evil.example", 403),
            ("", 403),
            (":8080", 403),
            ("[", 403),
            ("1.2.3", 200),         # a short form of the address 1.2.0.3
            # Names that an attacker cannot register: docker compose and Kubernetes use them.
            ("toxiproxy:8474", 200),
            ("Chaos_1.:8474", 200),
            ("toxiproxy.localhost", 200),
            ("host.docker.internal:8474", 200),
            ("toxiproxy.default.svc", 200),
            ("toxiproxy.default.svc.cluster.local:8474", 200),
            ("build-1.test", 200),
            ("printer.home.arpa", 200),
            ("toxiproxy.default", 403),
            ("local.evil.example", 403),
            ("evil.notlocal", 403),
            ("evil.example/.local", 403),
            ("..local", 403),
            ("a" * 10000, 403),
            ("a" * 300 + ".local", 403),
            ("a b", 403),
            ("\0", 403),
            ("voil\xe0", 200),      # xn--voil-0qa
        ])
        with self.subTest("no Host header"):        # HTTP/1.0, which no browser sends
            self.assertEqual(self.request_status({}), 200)
        for local, host, names, expected in [
                ("chaos", "chaos:1", (), 200),
                ("chaos.example", "chaos.example:1", (), 200),
                ("", "chaos.example:1", (), 403),
                ("", "Chaos.Example:1", ["x", "chaos.example"], 200)]:
            with self.subTest(local=local, host=host, names=names):
                status = self.request_status({"Host": host}, local=local, names=names)
                self.assertEqual(status, expected)

    def test_origin_header_must_be_the_server_itself(self):
        self.check_header("Origin", [
            ("http://localhost:8080", 200),
            ("https://localhost:8080", 200),
            ("HTTP://LOCALHOST:8080", 200),
            ("null", 403),
            ("", 403),
            ("http://localhost", 403),
            ("http://localhost:3000", 403),
            ("http://evil.example", 403),
            ("file://", 403),
        ], headers={"Host": "localhost:8080"})
        self.check_header("Sec-Fetch-Site", [
            ("none", 200),
            ("same-origin", 200),
            ("same-site", 403),
            ("cross-site", 403),
        ], headers={"Host": "localhost"})

    def test_token_is_required_in_the_authorization_header(self):
        self.check_header("Authorization", [
            ("Bearer s3cret", 200),
            ("bearer  s3cret ", 200),
            ("Bearer s3cre", 401),
            ("Bearer s3crett", 401),
            ("s3cret", 401),
            ("", 401),
            ("Basic s3cret", 401),
            ("Bearer \xff\u2603", 401),
        ], token="s3cret")
        self.assertEqual(self.request_status({"Host": "localhost"}, token="s3cret"), 401)
        # A page of another site cannot know the token, so the Host header is not checked.
        headers = {"Host": "chaos.example", "Authorization": "Bearer s3cret"}
        self.assertEqual(self.request_status(headers, local="", token="s3cret"), 200)
        control = vaurien.Control(("localhost", 0), proxy_table(), "s3cret")
        response = vaurien.handle_request(control, "GET", "/", no_body)
        self.assertEqual(response.headers["WWW-Authenticate"], "Bearer")
        self.assertNotIn("s3cret", response.text)

    def test_host_and_origin_are_checked_for_each_method_over_http(self):
        request = (b"%s /handler HTTP/1.1\r\n"
                   b"%s\r\n"
                   b"Connection: close\r\n"
                   b"Content-Length: 5\r\n"
                   b"\r\n"
                   b"delay")
        with proxy_with_control() as (_, client):
            for headers, allowed in [
                    (b"Host: evil.example", False),
                    (b"Host: 127.0.0.1\r\nOrigin: http://evil.example", False),
                    (b"Host: 127.0.0.1", True)]:
                for method, status in (b"GET", 200), (b"OPTIONS", 405), (b"POST", 200):
                    with self.subTest(method, headers=headers):
                        response = send_raw(client, request % (method, headers))
                        self.assertEqual(http_status(response), status if allowed else 403,
                                         response)
                        self.assertNotIn(b"access-control", response.lower())
            # Only the allowed POST request has set the handler.
            self.assertEqual(client.get_handler(), "delay")

    def test_a_token_from_the_file_protects_a_started_proxy(self):
        path = self.write("v.ini", "[vaurien]\nhttp-token=${TOKEN}\n")
        http_port = unused_port()
        with backend_server(echo) as (port, _):
            with mock.patch.dict(os.environ, {"TOKEN": "s3cret=="}):
                pid = vaurien.start_proxy("127.0.0.1", port, warmup=TIMEOUT,
                                          proxy_port=unused_port(), http_port=http_port,
                                          log_level="error", options=["--config", path])
            self.addCleanup(vaurien.stop_proxy, pid)
            client = vaurien.Client(port=http_port, token="s3cret==")
            self.assertEqual(client.get_handler(), "dummy")
            with self.assertRaisesRegex(ValueError, "Authorization must be Bearer"):
                vaurien.Client(port=http_port).get_handler()
            ctl = ["ctl", "--host", "localhost:%d" % http_port]
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                self.assertEqual(
                    vaurien.main([*ctl, "--http-token", "s3cret==", "get-handler"]), 0)
                with mock.patch.dict(os.environ, {"VAURIEN_HTTP_TOKEN": "s3cret=="}):
                    self.assertEqual(vaurien.main([*ctl, "get-handler"]), 0)
            self.assertEqual(out.getvalue(), "dummy\ndummy\n")

    def test_a_warning_is_logged_if_other_machines_have_access_without_a_token(self):
        for local, token, warns in [
                ("127.0.0.1", None, False),
                ("localhost", None, False),
                ("0.0.0.0", None, True),
                ("0.0.0.0", "x", False)]:
            with self.subTest(local, token=token):
                control = vaurien.Control((local, 0), proxy_table(), token)
                control.bind()
                lines = []
                with mock.patch.object(vaurien.log, "warning",
                                       lambda text, *args: lines.append(text % args)):
                    control.open(proxies_loop=mock.Mock())
                control.close()
                self.assertEqual(any("--http-token" in line for line in lines), warns)

    def test_the_total_size_of_the_headers_is_limited(self):
        with proxy_with_control() as (_, client):
            headers = b"".join(b"X-%d: %s\r\n" % (index, b"x" * 60000) for index in range(5))
            response = send_raw(client, b"GET /handler HTTP/1.1\r\n" + headers + b"\r\n")
            if response:        # the client may receive an RST before it reads the response
                self.assertEqual(http_status(response), 431)
            self.assertEqual(client.get_handler(), "dummy")

    def test_a_refusal_has_the_error_format_of_its_route(self):
        control = vaurien.Control(("localhost", 0), proxy_table())
        # Toxiproxy's routes have one `error`, and vaurien's a list of `errors`.
        for path, key in [
                ("/proxies", "error"),
                ("/proxies/a/toxics?x=1", "error"),
                ("/handlers", "errors"),
                ("/nope", "errors")]:
            with self.subTest(path):
                response = vaurien.handle_request(control, "GET", path, no_body,
                                                  {"Host": "toxiproxy.example:8474"})
                self.assertEqual(response.status, 403)
                self.assertIn(key, json.loads(response.text))
                self.assertIn("--http-name", response.text)

    def test_names_are_compared_as_browsers_send_them(self):
        for name, host in [
                ("Chaos.Example.", "chaos.example:1"),
                ("b\xfccher.example", "xn--bcher-kva.example"),
                ("b\xfccher.example", "B\xfccher.example.")]:
            with self.subTest(name, host=host):
                status = self.request_status({"Host": host}, local="",
                                             names=vaurien.check_names(name))
                self.assertEqual(status, 200)

    def test_no_error_message_contains_a_token(self):
        for case, check in [("server", vaurien.check_token),
                            ("client", lambda text: vaurien.Client(token=text))]:
            with self.subTest(case):
                with self.assertRaises(ValueError) as caught:
                    check("S3cr\net")
                self.assertNotIn("S3cr", str(caught.exception))
        with self.assertRaisesRegex(ValueError, "http_token needs http=True"):
            vaurien.start_proxy(http=False, http_token="s3cret")

    def test_two_requests_that_create_the_same_proxy_at_once_get_201_or_409(self):
        with proxy_with_control() as (proxy, client):
            statuses = []

            def post(path, body):
                connection = http.client.HTTPConnection("127.0.0.1", client.port,
                                                        timeout=TIMEOUT)
                connection.request("POST", path, json.dumps(body))
                statuses.append(connection.getresponse().status)
                connection.close()

            for index in range(20):
                fields = {"name": "twice %d" % index, "listen": "127.0.0.1:0",
                          "upstream": "127.0.0.1:9"}
                threads = [threading.Thread(target=post, args=("/proxies", fields)),
                           threading.Thread(target=post, args=("/populate", [fields]))]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join(TIMEOUT)
            self.assertEqual(set(statuses) - {201, 409}, set())
            for name in client.ask("GET", "/proxies"):
                if name != proxy.name:
                    client.ask("DELETE", "/proxies/" + urllib.parse.quote(name))

    def test_a_request_that_takes_too_long_is_closed(self):
        timeout = 0.15
        partial_requests = [b"G",
                            b"GET / HTTP/1.1\r\nX: ",
                            b"POST /handler HTTP/1.1\r\nContent-Length: 1000\r\n\r\n"]

        def is_closed_after_another_byte(sock):
            try:
                sock.sendall(b"x")
                readable, _, _ = select.select([sock], [], [], 0.02)
                return readable and not sock.recv(65536)
            except ConnectionError:
                return True

        with mock.patch.object(vaurien, "REQUEST_TIMEOUT", timeout), \
                proxy_with_control() as (_, client):
            with contextlib.ExitStack() as stack:
                start, open_socks = time.monotonic(), []
                for request in partial_requests:
                    sock = stack.enter_context(contextlib.closing(connect(client.port)))
                    sock.sendall(request)
                    open_socks.append(sock)
                while open_socks:
                    open_socks = [sock for sock in open_socks
                                  if not is_closed_after_another_byte(sock)]
                    self.assertLess(time.monotonic() - start, TIMEOUT)
                self.assertGreaterEqual(time.monotonic() - start, timeout)
            self.assertEqual(client.get_handler(), "dummy")

    def test_a_client_cannot_forge_a_line_of_the_log(self):
        forged = "x\n2026-01-01 00:00:00,000 INFO forged\r\x1b[2J\u2028\x85"
        record = logging.makeLogRecord({"msg": "control: %s failed", "args": (forged,)})
        try:
            raise ValueError(forged)
        except ValueError:
            record.exc_info = sys.exc_info()
        lines = vaurien.Formatter("%(asctime)s %(message)s").format(record).splitlines()
        self.assertIn("\\n2026", lines[0])
        for line in lines[1:]:
            self.assertTrue(line.startswith("    ") and line.isprintable(), line)
        self.assertEqual(vaurien.escape_control_chars("voil\xe0 \u2603"), "voil\xe0 \u2603")


# -- Toxiproxy ------------------------------------------------------------------


class ToxiproxyTestCase(unittest.TestCase):
    """Base class of the tests that control proxies with Toxiproxy's HTTP API."""

    def setUp(self):
        self.stack = contextlib.ExitStack()
        self.addCleanup(self.stack.close)
        self.loop = vaurien.Loop()
        thread = threading.Thread(target=self.loop.run, daemon=True)
        thread.start()
        self.proxies = vaurien.ProxyTable(seed=1)
        self.control = vaurien.Control(("127.0.0.1", 0), self.proxies,
                                       dialect=vaurien.TOXIPROXY)
        self.control.bind()
        self.port = self.control.listener.sockets[0].getsockname()[1]
        self.loop.run_sync(self.proxies.open, self.loop)
        self.loop.run_sync(self.control.open, self.loop)

        def close_all():
            self.loop.stop()
            thread.join()
            self.control.close()
            self.proxies.close()
            self.loop.close()
        self.addCleanup(close_all)

    def request(self, method, path, body=None, status=200):
        """Send a request to the control server and check the status of the response.

        A `body` that is not a string is sent as JSON. Returns the body of the response,
        parsed if it is JSON. Stores the headers of the response in `self.headers`.
        """
        if not isinstance(body, (str, type(None))):
            body = json.dumps(body)
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT)
        with contextlib.closing(connection):
            connection.request(method, path, body)
            response = connection.getresponse()
            text = response.read().decode("utf-8")
        self.assertEqual(response.status, status, text)
        self.headers = response.headers
        return json.loads(text) if text[:1] in ("{", "[") else text

    def request_error(self, method, path, body, status):
        """Send a request that the control server must refuse. Returns the error text."""
        response = self.request(method, path, body, status)
        self.assertEqual(response["status"], status)
        return response["error"]

    def check_errors(self, method, path, cases):
        """Check that requests are refused. cases: (body, status, part of the error text)."""
        for body, status, text in cases:
            with self.subTest(body=str(body)[:80]):
                self.assertIn(text, self.request_error(method, path, body, status))

    def start_backend(self, serve=echo):
        """Start a backend_server. Returns its address, and the list of results of `serve`."""
        port, results = self.stack.enter_context(backend_server(serve))
        return "127.0.0.1:%d" % port, results

    def create_proxy(self, serve=echo, name="p", **fields):
        """Create a proxy through the API, in front of a new backend. Returns its port.

        `self.backend_results` becomes the list of results of the backend.
        """
        upstream, self.backend_results = self.start_backend(serve)
        fields = dict({"name": name, "listen": "127.0.0.1:0", "upstream": upstream}, **fields)
        return self.port_of(self.request("POST", "/proxies", fields, 201))

    @staticmethod
    def port_of(proxy):
        """Return the port that a proxy listens on. `proxy` is a JSON object of the API."""
        _, _, port = proxy["listen"].rpartition(":")
        return int(port)

    def connect(self, port):
        """Return a client socket. It is closed at the end of the test."""
        return self.stack.enter_context(contextlib.closing(connect(port)))

    def occupy_address(self):
        """Listen until the end of the test. Returns the address, which no proxy can bind."""
        sock = vaurien.bind_listener(socket.AF_INET, ("127.0.0.1", 0))
        self.stack.enter_context(contextlib.closing(sock))
        return "127.0.0.1:%d" % sock.getsockname()[1]

    def add_toxic(self, type_, status=200, proxy="p", stream="downstream", attributes=None,
                  **fields):
        """Add a toxic through the API. Returns the JSON object of the response."""
        fields.update(type=type_, stream=stream, attributes=attributes or {})
        return self.request("POST", "/proxies/%s/toxics" % proxy, fields, status)

    def wait_for_backends(self):
        """Wait until proxy p has connected each client to the backend. Returns the proxy.

        The proxy must have at least one client.
        """
        proxy = self.proxies["p"]
        wait_until(lambda: proxy.connections and all(
            connection.backend and connection.phase is not vaurien.CONNECTING
            for connection in list(proxy.connections.values())))
        return proxy

    def wait_for_connection(self):
        """Wait until proxy p has connected its only client. Returns (proxy, connection)."""
        proxy = self.wait_for_backends()
        connection, = proxy.connections.values()
        return proxy, connection

    @staticmethod
    def wait_until_received(proxy, connection):
        """Wait until the proxy has received bytes from the backend."""
        wait_until(lambda: proxy.loop.run_sync(lambda: connection.down.received) > 0)

    @staticmethod
    def wait_until_delayed(proxy, connection):
        """Wait until the proxy delays bytes for the client. Returns their due time."""
        wait_until(lambda: proxy.loop.run_sync(connection.down.next_time, NEVER) < NEVER)
        return proxy.loop.run_sync(connection.down.next_time, NEVER)


class TestToxiproxyApi(ToxiproxyTestCase):
    """Status codes, JSON fields, error texts and defaults of Toxiproxy 2.12."""

    def test_proxies_are_created_listed_and_deleted(self):
        self.assertEqual(self.request("GET", "/proxies"), {})
        proxy = self.request("POST", "/proxies", {
            "name": "b", "listen": "localhost:0", "upstream": "localhost:6379"}, 201)
        self.assertRegex(proxy["listen"], r"^127\.0\.0\.1:\d+$")
        self.assertEqual(proxy, {
            "name": "b", "listen": proxy["listen"], "upstream": "localhost:6379",
            "enabled": True, "toxics": []})
        self.assertEqual(list(proxy), ["name", "listen", "upstream", "enabled", "toxics"])
        self.assertEqual(self.headers["Content-Type"], "application/json")
        self.assertTrue(self.headers["X-Toxiproxy-Request-Id"])
        self.assertEqual(self.request("GET", "/proxies/b"), proxy)
        self.request("POST", "/proxies", {"name": "a", "upstream": "localhost:1"}, 201)
        self.assertEqual(list(self.request("GET", "/proxies")), ["a", "b"])
        self.assertEqual(self.request("DELETE", "/proxies/b", status=204), "")
        self.assertEqual(self.request_error("GET", "/proxies/b", None, 404), "proxy not found")
        with self.assertRaises(ConnectionRefusedError):
            connect(self.port_of(proxy))

    def test_a_proxy_refuses_new_clients_until_reset(self):
        """A typed client may not know `accept`, so it is left out while it is normal."""
        port = self.create_proxy(accept="refuse")
        with self.assertRaises(ConnectionRefusedError):
            connect(port)
        normal = {key: value for key, value in self.request("GET", "/proxies/p").items()
                  if key != "accept"}
        for method, path, body, accept in (
                ("GET", "/proxies/p", None, "refuse"),
                ("POST", "/proxies/p", {}, "refuse"),
                ("PATCH", "/proxies/p", {"accept": "normal"}, "normal"),
                ("POST", "/proxies/p", {"ACCEPT": "drop", "enabled": True}, "drop"),
                ("POST", "/populate", [normal], "drop"),
                ("POST", "/populate", [dict(normal, accept="refuse")], "refuse"),
                ("POST", "/reset", None, "normal"),
                ("PATCH", "/proxies/p", {"accept": "refuse", "enabled": False}, "refuse"),
                ("PATCH", "/proxies/p", {"enabled": True}, "refuse"),
                ("PATCH", "/proxies/p", {"listen": "127.0.0.1:0", "accept": "drop"}, "drop"),
                # A proxy with another upstream is a new one.
                ("POST", "/populate", [dict(normal, upstream="127.0.0.1:9")], "normal")):
            with self.subTest(method=method, path=path, body=body):
                status = {"/populate": 201, "/reset": 204}.get(path, 200)
                self.request(method, path, body, status)
                proxy = self.request("GET", "/proxies/p")
                self.assertEqual(proxy.get("accept", "normal"), accept)
                self.assertEqual("accept" in proxy, accept != "normal")
                if proxy["enabled"]:
                    self.assertEqual(self.proxies["p"].listener.mode, accept)
        cases = [({"accept": value, "enabled": False}, 400, "accept must be normal, refuse or")
                 for value in ("no", 1, [], {"duration": 1})]
        self.check_errors("PATCH", "/proxies/p", cases)
        self.check_errors("POST", "/populate", [([dict(normal, **body)], status, text)
                                                for body, status, text in cases])
        self.assertTrue(self.proxies["p"].enabled)
        with mock.patch.object(vaurien.Listener, "add_filler", side_effect=OSError("why")):
            self.check_errors("PATCH", "/proxies/p", [
                ({"accept": "drop", "upstream": "127.0.0.1:1"}, 500, "cannot drop clients: why")])
        self.assertEqual(self.request("GET", "/proxies/p")["upstream"], "127.0.0.1:9")

    def test_missing_and_null_fields_have_defaults_and_names_ignore_case(self):
        proxy = self.request("POST", "/proxies", {
            "name": "a", "upstream": "localhost:1", "listen": None, "enabled": None}, 201)
        self.assertRegex(proxy["listen"], r"^\[::\]:\d+$")
        self.assertIs(proxy["enabled"], True)
        proxy = self.request("POST", "/proxies", {
            "NAME": "b", "Upstream": "localhost:1", "listen": "localhost:3310",
            "enabled": False, "x": 1}, 201)
        self.assertEqual((proxy["name"], proxy["listen"], proxy["enabled"]),
                         ("b", "localhost:3310", False))

    def test_invalid_proxies_are_refused(self):
        in_use = self.occupy_address()
        self.create_proxy()
        for body, status, text in [
                ("", 400, "bad request body: EOF"),
                ('{"name": "x', 400, "bad request body: unexpected EOF"),
                ('{"name": "x",', 400, "bad request body: unexpected EOF"),
                ("nope", 400, "bad request body: invalid JSON"),
                ("[]", 400, "bad request body: json: "
                            "cannot unmarshal array into Go value of type toxiproxy.Proxy"),
                ('{"name": 5}', 400,
                 "bad request body: json: "
                 "cannot unmarshal number into Go struct field Proxy.name of type string"),
                ('{"name": "x", "enabled": "yes"}', 400,
                 "bad request body: json: "
                 "cannot unmarshal string into Go struct field Proxy.enabled of type bool"),
                ('{"tls": 5, "enabled": 5}', 400, "Proxy.tls"),     # the first error, as in Go
                ('{"enabled": 5, "tls": 5}', 400, "Proxy.enabled"),
                ("{}", 400, "missing required field: name"),
                ('{"name": ""}', 400, "missing required field: name"),
                ('{"name": "x"}', 400, "missing required field: upstream"),
                ({"name": "p", "upstream": "localhost:1", "listen": "localhost:0"}, 409,
                 "proxy already exists"),
                ({"name": "x", "upstream": "localhost:1", "listen": in_use}, 500,
                 "listen tcp %s: bind: address already in use" % in_use),
                ({"name": "x", "upstream": "localhost:1", "listen": "local373"}, 500,
                 "listen tcp: address local373: missing port in address"),
                ({"name": "x", "upstream": "localhost:1", "listen": "localhost:99999"}, 500,
                 "listen tcp: address 99999: invalid port"),
                ({"name": "x", "upstream": "localhost:1", "listen": "localhost:noservice"}, 500,
                 "listen tcp: lookup tcp/noservice: unknown port"),
                ({"name": "x", "upstream": "localhost:99999"}, 400,
                 "bad request body: upstream must have a port from 1 to 65535"),
                ({"name": "x", "upstream": "local host"}, 400,
                 "bad request body: upstream must be HOST:PORT"),
                ({"name": "x", "upstream": "localhost:1", "listen": "no host:12345"}, 400,
                 "listen must be HOST:PORT"),
                ({"name": "x", "upstream": "https://example.com/a"}, 400,
                 "bad request body: upstream must be like https://HOST:PORT, without a path"),
                ({"name": "x", "upstream": "x:1", "tls": {"cert": 1}}, 400,
                 "bad request body: tls-cert: cannot read 1: No such file or directory"),
                ({"name": "x", "upstream": "x:1", "tls": {"cret": "auto"}}, 400,
                 "bad request body: tls has no field 'cret' (did you mean cert?)"),
                ({"name": "x", "upstream": "x:1", "tls": {"fault": "old"}}, 400,
                 "bad request body: tls fault must be one of expired, "),
                ({"name": "x", "upstream": "x:1", "tls": {"key": "x"}}, 400,
                 "bad request body: tls-key needs tls-cert, with the file of a certificate"),
                ({"name": "x", "listen": "localhost:7", "upstream": "localhost:7"}, 400,
                 "is the proxy's own address"),
                ({"name": "a\nb", "upstream": "localhost:1"}, 400,
                 "bad request body: name must be"),
                ({"name": "x" * 10240, "upstream": "localhost:1"}, 400,
                 "bad request body: name must be"),
                ('{"name": "\\ud800", "upstream": "localhost:1"}', 400,
                 "bad request body: name must be"),
                ("[" * 100000, 400, "bad request body")]:
            with self.subTest(body=str(body)[:80]):
                self.assertIn(text, self.request_error("POST", "/proxies", body, status))
                self.assertEqual(self.headers["Content-Type"], "text/plain; charset=utf-8")
        self.assertEqual(list(self.request("GET", "/proxies")), ["p"])

    def test_text_after_the_first_json_value_is_ignored(self):
        self.request("POST", "/proxies", '{"name": "a", "upstream": "localhost:1"} and more', 201)

    def test_wrong_methods_and_paths_are_refused(self):
        self.create_proxy()
        for method, path in [("PUT", "/proxies/p"), ("HEAD", "/proxies"), ("DELETE", "/proxies"),
                             ("GET", "/populate")]:
            with self.subTest(method=method, path=path):
                self.assertEqual(self.request(method, path, status=405), "")
        for path in ["/proxies/", "/proxies/p/", "/proxies/p/toxics/", "/nope",
                     "/proxies/p/toxics/t/u"]:
            with self.subTest(path=path):
                self.assertEqual(self.request("GET", path, status=404), "404 page not found\n")
                self.assertEqual(self.headers["Content-Type"], "text/plain; charset=utf-8")
        self.assertEqual(list(self.request("GET", "//proxies")), ["p"])

    def test_the_version_is_one_that_clients_accept(self):
        self.assertEqual(self.request("GET", "/version"), {"version": vaurien.__version__})
        self.assertRegex(vaurien.__version__, r"^([3-9]|2\.([6-9]|\d\d))[.]")      # 2.6 or later

    def test_browsers_are_refused(self):
        for headers, status in (
                ({}, 403),
                ({"Sec-Fetch-Site": "none"}, 403),
                ({"X-Fetch-Site": "cross-site"}, 403),
                # The control server's own page. Not all browsers send Sec-Fetch-Site.
                ({"Sec-Fetch-Site": "same-origin"}, 200),
                ({"X-Fetch-Site": "same-origin"}, 200),
                ({"X-Fetch-Site": "same-origin", "Sec-Fetch-Site": "cross-site"}, 403),
                ({"X-Fetch-Site": "same-origin", "Origin": "http://evil.example"}, 403)):
            with self.subTest(headers):
                response = vaurien.handle_request(
                    self.control, "GET", "/proxies", no_body,
                    dict(headers, **{"User-Agent": "Mozilla/5.0 (X11)", "Host": "localhost"}))
                self.assertEqual(response.status, status)
                if headers == {}:
                    self.assertEqual(response.text, "User agent not allowed\n")

    def test_quoted_names_with_any_characters_select_the_proxy(self):
        for name in "a b", "a/b", "ü", "100%", "?#":
            with self.subTest(name):
                self.create_proxy(name=name)
                path = "/proxies/" + urllib.parse.quote(name, safe="")
                self.assertEqual(self.request("GET", path)["name"], name)

    def test_an_update_without_changes_keeps_the_connections(self):
        port = self.create_proxy()
        sock = self.connect(port)
        send_and_read(sock, b"question")
        upstream = self.request("GET", "/proxies/p")["upstream"]
        for body in [{}, {"enabled": True}, {"name": "other"},
                     {"listen": "127.0.0.1:%d" % port, "upstream": upstream, "enabled": None}]:
            for method in "POST", "PATCH":
                with self.subTest(method, body=body):
                    self.assertEqual(self.request(method, "/proxies/p", body)["name"], "p")
        send_and_read(sock, b"question")

    def test_a_proxy_keeps_its_port_and_its_toxics_while_it_is_disabled(self):
        port = self.create_proxy()
        self.add_toxic("latency", attributes={"latency": 1})
        sock = self.connect(port)
        send_and_read(sock, b"question")
        with self.assertLogs("vaurien", "INFO") as logged:
            proxy = self.request("POST", "/proxies/p", {"enabled": False})
            self.request("POST", "/proxies/p", {"enabled": False})
        self.assertEqual([record.getMessage() for record in logged.records],
                         ["proxy p: disabled by the control"])
        self.assertEqual((proxy["enabled"], proxy["listen"]), (False, "127.0.0.1:%d" % port))
        self.assertEqual(read_until_close(sock), EMPTY_EOF)
        with self.assertRaises(ConnectionRefusedError):
            connect(port)
        with self.assertLogs("vaurien", "INFO") as logged:
            proxy = self.request("PATCH", "/proxies/p", {"enabled": True})
        self.assertIn("proxy p: enabled by the control", logged.records[-1].getMessage())
        self.assertEqual((proxy["listen"], len(proxy["toxics"])), ("127.0.0.1:%d" % port, 1))
        send_and_read(self.connect(port), b"question")

    def test_a_proxy_on_localhost_listens_on_both_families_after_it_is_enabled(self):
        if not has_ipv6():
            self.skipTest("no IPv6")
        port = self.create_proxy(listen="localhost:0")
        self.request("POST", "/proxies/p", {"enabled": False})
        self.request("POST", "/proxies/p", {"enabled": True})
        with contextlib.closing(connect(port, "::1")) as sock:
            send_and_read(sock, b"question")

    def test_all_addresses_of_both_families_are_one_listen_address(self):
        """Toxiproxy's README has "[::]:18080", and clients that connect to 127.0.0.1:18080."""
        upstream, _ = self.start_backend()
        hosts = ["127.0.0.1", "::1"] if has_ipv6() else ["127.0.0.1"]
        for listen in "[::]:0", "0.0.0.0:0", ":0", "", "[0::0]:0":
            with self.subTest(listen):
                proxy = self.request("POST", "/proxies", {
                    "name": "p", "listen": listen, "upstream": upstream}, 201)
                port = self.port_of(proxy)
                self.assertEqual(proxy["listen"], "[::]:%d" % port)
                sock = self.connect(port)
                send_and_read(sock, b"question")
                # All spellings are the same address, so the connection survives.
                for same in proxy["listen"], "0.0.0.0:%d" % port, ":%d" % port:
                    changed = self.request("POST", "/proxies/p", {"listen": same})
                    self.assertEqual(changed, proxy)
                self.request("POST", "/populate", [proxy], 201)
                send_and_read(sock, b"question")
                # A listing that is sent back creates the same proxy.
                self.request("DELETE", "/proxies/p", status=204)
                self.assertEqual(self.request("POST", "/proxies", proxy, 201), proxy)
                for host in hosts:
                    with contextlib.closing(connect(port, host)) as sock:
                        send_and_read(sock, b"question")
                self.request("DELETE", "/proxies/p", status=204)

    def test_an_upstream_without_a_port_fails_when_a_client_connects(self):
        for upstream, reason in [("one.example", "missing port in address"),
                                 ("localhost:noservice", "")]:
            with self.subTest(upstream):
                with self.assertLogs("vaurien", "WARNING") as logged:
                    proxy = self.request("POST", "/proxies", {
                        "name": "p", "listen": "127.0.0.1:0", "upstream": upstream}, 201)
                    self.assertEqual(proxy["upstream"], upstream)
                    self.assertEqual(read_until_close(self.connect(self.port_of(proxy))).size, 0)
                    wait_until(lambda: "cannot connect to backend" in logged.output[-1])
                self.assertIn("to backend %s: %s" % (upstream, reason), logged.output[-1])
                self.assertEqual("has no port" in logged.output[0], "one" in upstream)
                upstream, _ = self.start_backend()
                self.request("POST", "/proxies/p", {"upstream": upstream})
                send_and_read(self.connect(self.port_of(proxy)), b"question")
                self.request("DELETE", "/proxies/p", status=204)

    def test_services_have_names(self):
        upstream, _ = self.start_backend()
        with mock.patch.object(socket, "getservbyname", return_value=0):
            proxy = self.request("POST", "/proxies", {
                "name": "p", "listen": "127.0.0.1:http", "upstream": upstream}, 201)
        send_and_read(self.connect(self.port_of(proxy)), b"question")
        proxy = self.request("POST", "/proxies/p", {"upstream": "localhost:http"})
        self.assertEqual(proxy["upstream"], "localhost:http")
        self.assertIn(("127.0.0.1", 80), [
            address for _, address in vaurien.resolve(self.proxies["p"].backend)])

    def test_a_new_upstream_closes_the_connections_and_keeps_the_port(self):
        port = self.create_proxy()
        sock = self.connect(port)
        send_and_read(sock, b"question")
        upstream, _ = self.start_backend(lambda sock: sock.sendall(b"other"))
        self.request("POST", "/proxies/p", {"upstream": upstream})
        self.assertEqual(read_until_close(sock).size, 0)
        self.assertEqual(read_exactly(self.connect(port), 5), b"other")

    def test_a_refused_update_changes_nothing_and_a_new_port_closes_the_connections(self):
        port = self.create_proxy()
        sock = self.connect(port)
        send_and_read(sock, b"question")
        error = self.request_error("POST", "/proxies/p", {"listen": self.occupy_address()}, 500)
        self.assertIn("address already in use", error)
        for body, status in [({"listen": "bad"}, 500),
                             ({"listen": "127.0.0.1:99999"}, 500),
                             ({"upstream": "bad:99999"}, 400),
                             ({"enabled": 5}, 400),
                             ({"upstream": "127.0.0.1:%d" % port}, 400)]:
            with self.subTest(body):
                self.request_error("POST", "/proxies/p", body, status)
        send_and_read(sock, b"question")
        new_port = self.port_of(self.request("POST", "/proxies/p", {"listen": "127.0.0.1:0"}))
        self.assertNotEqual(new_port, port)
        send_and_read(self.connect(new_port), b"question")
        self.assertEqual(read_until_close(sock).size, 0)

    def test_a_proxy_moves_to_another_address_with_the_same_port(self):
        port = self.create_proxy()
        proxy = self.request("POST", "/proxies/p", {"listen": "0.0.0.0:%d" % port})
        self.assertEqual(proxy["listen"], "[::]:%d" % port)
        send_and_read(self.connect(port), b"question")
        sock = self.connect(port)
        send_and_read(sock, b"question")
        # If the new address cannot be bound, the proxy listens on the old one again.
        restored = vaurien.bind_listener(socket.AF_INET, ("127.0.0.1", 0))
        error = vaurien.CannotListen(OSError(errno.EADDRINUSE, "Address already in use"),
                                     ("127.0.0.1", port))
        with mock.patch.object(vaurien, "listen", side_effect=[error, [restored]]):
            self.request_error("POST", "/proxies/p", {"listen": "127.0.0.1:%d" % port}, 500)
        send_and_read(self.connect(restored.getsockname()[1]), b"question")
        send_and_read(sock, b"question")

    def test_toxics_have_toxiproxys_defaults(self):
        self.create_proxy()
        toxic = self.request("POST", "/proxies/p/toxics", {"type": "latency"})
        self.assertEqual(json.dumps(toxic), json.dumps({
            "attributes": {"latency": 0, "jitter": 0}, "name": "latency_downstream",
            "type": "latency", "stream": "downstream", "toxicity": 1}))
        toxic = self.request("POST", "/proxies/p/toxics", {
            "type": "latency", "stream": "UPSTREAM", "toxicity": 5,
            "attributes": {"LATENCY": -5, "jitter": None, "x": 1}})
        self.assertEqual(
            (toxic["name"], toxic["stream"], toxic["toxicity"], toxic["attributes"]),
            ("latency_UPSTREAM", "UPSTREAM", 5, {"latency": -5, "jitter": 0}))
        # PHP encodes an empty array of attributes as [].
        self.request("POST", "/proxies/p/toxics", '{"type": "noop", "attributes": []}')
        self.request("PATCH", "/proxies/p/toxics/latency_UPSTREAM", '{"attributes": []}')
        toxics = self.request("GET", "/proxies/p/toxics")
        self.assertEqual([toxic["name"] for toxic in toxics],
                         ["latency_UPSTREAM", "latency_downstream", "noop_downstream"])
        self.assertEqual(self.request("GET", "/proxies/p")["toxics"], toxics)

    def test_listings_have_only_toxics_that_typed_clients_know(self):
        """A client with a type for each toxic fails if a listing has another one."""
        self.create_proxy()
        known = [self.add_toxic(type_) for type_ in sorted(vaurien.TOXIPROXY_TYPES)
                 if type_ not in vaurien.UNRELEASED_TYPES]
        known.insert(0, self.add_toxic("latency", stream="UPSTREAM"))
        others = [self.add_toxic("hang"),
                  self.add_toxic("noop", name="matching", match="x"),
                  self.add_toxic("latency", stream="both")]
        fields = self.request("GET", "/proxies/p?all=1")
        self.assertEqual(fields["toxics"], known + others)
        self.assertNotIn("rules", fields)
        for response in (
                self.request("GET", "/proxies/p"),
                self.request("GET", "/proxies")["p"],
                self.request("PATCH", "/proxies/p", {}),
                self.request("POST", "/populate", [fields], 201)["proxies"][0]):
            self.assertEqual((response["toxics"], response["rules"]), (known, others))
        self.assertEqual(self.request("GET", "/proxies/p/toxics"), known)
        self.assertEqual(self.request("GET", "/proxies/p/toxics?all=1"), known + others)
        self.assertEqual(self.request("GET", "/proxies?all=1"), {"p": fields})
        self.assertEqual(self.request("GET", "/proxies/p/toxics/matching"), others[1])
        # A listing that is sent back restores all toxics.
        self.request("DELETE", "/proxies/p", status=204)
        self.assertEqual(self.request("POST", "/proxies", response, 201), response)
        for toxic in others:
            self.request("DELETE", "/proxies/p/toxics/" + toxic["name"], status=204)
        self.assertNotIn("rules", self.request("GET", "/proxies/p"))

    def test_input_that_has_no_effect_is_logged(self):
        upstream = "127.0.0.1:9"
        for method, path, body, expected in [
                ("POST", "/proxies",
                 {"name": "p", "upstream": upstream, "toxic": [], "Logger": {},
                  "toxics": [{"type": "latency", "attributes": {"Latncy": 3, "JITTER": 1}}]},
                 ["proxy p: the unknown key 'toxic' (did you mean toxics?) is ignored: there are "
                  "name, listen",
                  "proxy p: listen is missing, so the proxy accepts clients from all machines",
                  "proxy p, toxic latency, attributes: the unknown key 'latncy' (did you mean "
                  "latency?) is ignored: there are latency, jitter"]),
                ("POST", "/populate",
                 [{"name": "q", "upstream": upstream, "listen": "127.0.0.1:0", "x": 1},
                  {"name": "r", "upstream": upstream, "listen": ""}],
                 ["proxy q: the unknown key 'x' is ignored",
                  "proxy r: listen is missing"]),
                ("POST", "/proxies/p", {"enable": True},
                 ["proxy p: the unknown key 'enable' (did you mean enabled?) is ignored"]),
                ("POST", "/proxies/p/toxics",
                 {"type": "noop", "name": "n", "toxicity": 20, "attribute": {}, "match": "x"},
                 ["proxy p, toxic n: the unknown key 'attribute' (did you mean attributes?)",
                  "proxy p, toxic n: toxicity is a probability from 0 to 1, not 20"]),
                ("PATCH", "/proxies/p/toxics/latency_downstream",
                 {"name": "x", "toxicity": -1, "attributes": {"rate": 1}},
                 ["proxy p, toxic x, attributes: the unknown key 'rate' is ignored",
                  "proxy p, toxic x: toxicity is a probability from 0 to 1, not -1"])]:
            with self.subTest(body=body), self.assertLogs("vaurien", "WARNING") as logged:
                self.request(method, path, body, 201 if path in ("/proxies", "/populate") else 200)
                messages = [record.getMessage() for record in logged.records]
                self.assertEqual(len(messages), len(expected), messages)
                for message, text in zip(messages, expected):
                    self.assertIn(text, message)

    def test_every_handler_is_a_toxic(self):
        self.create_proxy()
        for type_, function in HANDLERS.items():
            with self.subTest(type_):
                toxic = self.add_toxic(type_)
                expected = dict(vaurien.handler_options(function))
                for own in {"latency": ["distribution"], "bandwidth": ["shared"],
                            "packet_loss": ["rtt", "burst"]}.get(type_, []):
                    del expected[own]       # Toxiproxy lacks it, and it has its default
                self.assertEqual((toxic["type"], toxic["attributes"]), (type_, expected))

    def test_attributes_that_toxiproxy_lacks_are_listed_only_if_they_are_set(self):
        self.create_proxy()
        path = "/proxies/p/toxics/latency_downstream"
        self.add_toxic("latency", attributes={"latency": 5})
        for attributes, listed in [({"distribution": "pareto"}, []),
                                   ({"distribution": "uniform"}, [{"latency": 5, "jitter": 0}])]:
            with self.subTest(attributes):
                self.request("PATCH", path, {"attributes": attributes})
                self.assertEqual(self.request("GET", path)["attributes"].get("distribution"),
                                 "pareto" if attributes["distribution"] == "pareto" else None)
                toxics = self.request("GET", "/proxies/p/toxics")
                self.assertEqual([toxic["attributes"] for toxic in toxics], listed)
        response = self.request("PATCH", path, {"attributes": {"distribution": "paretto"}}, 400)
        self.assertIn("distribution must be one of uniform, normal, pareto, paretonormal, "
                      "lognormal, not 'paretto' (did you mean pareto?)", response["error"])

    def test_packet_loss_has_the_spelling_of_toxiproxys_main_branch(self):
        self.create_proxy()
        toxic = self.add_toxic("packet_loss", attributes={"loss_rate": 0.5, "correlation": 1})
        self.assertEqual((toxic["name"], toxic["stream"], toxic["attributes"]), (
            "packet_loss_downstream", "downstream", {"loss_rate": 0.5, "correlation": 1.0}))
        # The releases of Toxiproxy have no such type, nor have their typed clients.
        fields = self.request("GET", "/proxies/p")
        self.assertEqual((fields["toxics"], fields["rules"]), ([], [toxic]))
        path = "/proxies/p/toxics/packet_loss_downstream"
        changed = self.request("PATCH", path, {"attributes": {"rtt": 40}})
        self.assertEqual(changed["attributes"], {"loss_rate": 0.5, "correlation": 1.0, "rtt": 40})
        for attributes in {"loss_rate": 1.5}, {"loss_rate": -0.1}, {"correlation": 2}:
            (key, value), = attributes.items()
            response = self.request("PATCH", path, {"attributes": attributes}, 400)
            self.assertIn("%s must be a number from 0 to 1, not %r" % (key, float(value)),
                          response["error"])

    def test_a_toxic_is_changed_and_removed(self):
        self.create_proxy()
        self.add_toxic("latency", attributes={"latency": 100, "jitter": 10})
        path = "/proxies/p/toxics/latency_downstream"
        ignored = {"name": "x", "type": "noop", "stream": "upstream", "toxicity": None}
        for method, body, expected in [
                ("POST", {"attributes": {"latency": 5}}, (5, 10, 1)),
                ("PATCH", {"toxicity": 0.5}, (5, 10, 0.5)),
                ("PATCH", ignored, (5, 10, 0.5)),
                ("PATCH", {}, (5, 10, 0.5))]:
            with self.subTest(method, body=body):
                toxic = self.request(method, path, body)
                attributes = toxic["attributes"]
                self.assertEqual(
                    (attributes["latency"], attributes["jitter"], toxic["toxicity"]), expected)
                self.assertEqual((toxic["name"], toxic["stream"]),
                                 ("latency_downstream", "downstream"))
                self.assertEqual(self.request("GET", path), toxic)
        self.assertEqual(self.request("DELETE", path, status=204), "")
        for missing_path, error in [(path, "toxic not found"),
                                    (path.replace("/p/", "/q/"), "proxy not found")]:
            for method in "GET", "DELETE", "POST", "PATCH":
                with self.subTest(method, path=missing_path):
                    self.assertEqual(self.request_error(method, missing_path, "{}", 404), error)

    def test_invalid_toxics_are_refused(self):
        self.create_proxy()
        self.add_toxic("latency")
        invalid_stream = "stream was invalid, can be either upstream or downstream"
        self.check_errors("POST", "/proxies/p/toxics", [
            ("", 400, "bad request body: EOF"),
            ("{}", 400, "invalid toxic type"),
            ({"type": "nope"}, 400, "invalid toxic type"),
            ({"type": "os.system"}, 400, "invalid toxic type"),
            ({"type": "latency", "stream": ""}, 400, invalid_stream),
            ({"type": "nope", "stream": "x"}, 400, invalid_stream),
            ({"type": "latency"}, 409, "toxic already exists"),
            ({"type": "latency", "name": "latency_downstream", "stream": "upstream"}, 409,
             "toxic already exists"),
            ({"type": "slicer", "toxicity": "1"}, 400,
             "bad request body: json: "
             "cannot unmarshal string into Go struct field ToxicWrapper.toxicity of type float64"),
            ({"type": "slicer", "percent": 5, "toxicity": 1}, 400,
             "percent and toxicity mean the same"),
            ({"type": "slicer", "percent": 500}, 400,
             "percent must be a number from 0 to 100, not 500"),
            ({"type": "slicer", "per": "chunk"}, 400,
             "per must be one of request, connection, not 'chunk'"),
            ({"type": "slicer", "match": "("}, 400, "match must be a regular expression, not '('"),
            ({"type": "slicer", "times": -1}, 400,
             "times must be a whole number, 0 or more, not -1"),
            ({"type": "slicer", "attributes": [1]}, 400, "cannot unmarshal array")])
        self.assertEqual(len(self.request("GET", "/proxies/p/toxics")), 1)

    def test_invalid_attributes_are_refused(self):
        self.create_proxy()
        self.add_toxic("latency")
        for type_, attribute, value in [
                ("latency", "latency", "5"),
                ("latency", "latency", 5.5),
                ("latency", "latency", 5.0),
                ("latency", "jitter", True),
                ("bandwidth", "rate", -1),
                ("slicer", "average_size", -1),
                ("slicer", "size_variation", -3),
                ("latency", "latency", 2 ** 63),
                ("bandwidth", "rate", 10 ** 300),
                ("delay", "sleep", -1),
                ("delay", "sleep", "2"),
                ("delay", "before", 1)]:
            with self.subTest(type=type_, attribute=attribute, value=value):
                error = self.request_error("POST", "/proxies/p/toxics", {
                    "type": type_, "name": "x", "attributes": {attribute: value}}, 400)
                self.assertIn("bad request body", error)
                self.assertIn(attribute, error)
        for value in "NaN", "Infinity", "-Infinity", "1e999":
            for template in ('{"type": "delay", "attributes": {"sleep": %s}}',
                             '{"type": "noop", "toxicity": %s}'):
                body = template % value
                with self.subTest(body):
                    self.request_error("POST", "/proxies/p/toxics", body, 400)
        self.assertEqual(len(self.request("GET", "/proxies/p/toxics")), 1)

    def test_a_proxy_has_a_protocol(self):
        def serve(sock):
            while sock.recv(100):
                sock.sendall(b"+PONG\r\n")

        sock = self.connect(self.create_proxy(serve, protocol="redis"))
        self.assertEqual(self.request("GET", "/proxies/p")["protocol"], "redis")
        self.add_toxic("error", stream="both", per="request", match="bad",
                       attributes={"kind": "OOM"})
        for command, reply in [(b"PING\r\n", b"+PONG\r\n"),
                               (b"GET bad\r\n", vaurien.Redis().encode_error("OOM")),
                               (b"PING\r\n", b"+PONG\r\n")]:
            sock.sendall(command)
            self.assertEqual(read_exactly(sock, len(reply)), reply)
        toxic = {"type": "error", "name": "x"}
        self.check_errors("POST", "/proxies/p/toxics", [
            (dict(toxic, stream="both", attributes={"kind": "503"}), 400,
             "kind must be one of LOADING, BUSY"),
            (dict(toxic, stream="downstream"), 400, "stream must be both for error")])
        self.assertIn("protocol must be one of tcp, http", self.request_error(
            "POST", "/proxies", {"name": "q", "upstream": "x:1", "protocol": "nope"}, 400))
        self.assertIn("protocol cannot be changed", self.request_error(
            "PATCH", "/proxies/p", {"protocol": "http"}, 400))
        unchanged = self.request("PATCH", "/proxies/p", {"protocol": "redis"})
        # /populate replaces the proxy. The new one has protocol tcp, which is the default.
        new, = self.request("POST", "/populate", [{
            "name": "p", "listen": "127.0.0.1:%d" % self.proxies["p"].local[1],
            "upstream": unchanged["upstream"]}], 201)["proxies"]
        self.assertNotIn("protocol", new)
        self.assertEqual(read_until_close(sock).size, 0)

    def test_a_toxic_has_the_fields_of_a_rule(self):
        self.create_proxy()
        toxic = self.add_toxic("hang", percent=50, per="request", after=3, times=2, match="^GET")
        self.assertEqual(
            (toxic["toxicity"], toxic["per"], toxic["after"], toxic["times"], toxic["match"]),
            (0.5, "request", 3, 2, "^GET"))
        rule, = self.proxies["p"].rules.installed
        self.assertEqual((rule.draw_max, rule.per, rule.after, rule.times, rule.stream),
                         (50, "request", 3, 2, DOWNSTREAM))

    def test_a_toxic_has_a_schedule_and_a_ttl(self):
        self.create_proxy()
        before = time.time()
        toxic = self.add_toxic("latency", start="1h", duration=60, ttl="2h")
        self.assertEqual([toxic[key] for key in ("start", "duration", "ttl", "active")],
                         [3600, 60, 7200, False])
        self.assertGreaterEqual(toxic["until"], before + 3600 - 0.1)
        self.assertEqual(self.request("GET", "/proxies/p/toxics"), [])      # Toxiproxy's JSON
        rules = self.request("GET", "/proxies/p")["rules"]
        self.assertEqual([rule["name"] for rule in rules], ["latency_downstream"])
        toxics = self.request("PUT", "/proxies/p/toxics", rules)            # sent back
        self.assertEqual([toxics[0][key] for key in ("start", "ttl", "active")],
                         [3600, 7200, False])
        # The ttl goes on if nothing has changed in a listing, and otherwise it begins again.
        schedule = self.proxies["p"].toxics[0].rule
        expires = schedule.expires
        self.request("PUT", "/proxies/p/toxics", toxics)
        self.assertEqual(schedule.expires, expires)
        toxics[0]["toxicity"] = 0.5
        self.request("PUT", "/proxies/p/toxics", toxics)
        self.assertGreater(schedule.expires, expires)
        expires = schedule.expires
        for key in "active", "until":
            del toxics[0][key]
        self.request("PUT", "/proxies/p/toxics", toxics)
        self.assertGreater(schedule.expires, expires)
        path = "/proxies/p/toxics/latency_downstream"
        self.assertEqual(self.request("PATCH", path, {"ttl": "5m"})["ttl"], 300)
        self.assertNotIn("ttl", self.request("PATCH", path, {"ttl": 0}))
        self.assertEqual(self.request("GET", path)["active"], False)
        self.check_errors("PATCH", path, [
            ({"start": 5}, 400, "start cannot be changed"),
            ({"ttl": "x"}, 400, "ttl must be 0, or a time from 1ms"),
            ({"every": 5}, 400, "every must be at least the duration of 60 seconds, not 5")])
        self.assertEqual(set(self.add_toxic("noop")),
                         {"attributes", "name", "type", "stream", "toxicity"})

    def test_a_toxic_whose_window_never_ends_can_be_sent_back(self):
        self.create_proxy()
        toxic = self.add_toxic("latency", ramp=10)
        self.assertEqual((toxic["active"], toxic["until"]), (True, None))
        self.assertEqual(self.request("PUT", "/proxies/p/toxics", [toxic]), [toxic])
        self.assertEqual(list(vaurien.toxic_warnings(toxic, "p")), [])

    def test_all_toxics_are_replaced_in_one_request(self):
        self.create_proxy()
        self.add_toxic("latency")
        toxics = self.request("PUT", "/proxies/p/toxics", [
            {"type": "noop", "stream": "both"}, {"type": "latency", "toxicity": 0.5}])
        self.assertEqual([(toxic["type"], toxic["toxicity"]) for toxic in toxics],
                         [("latency", 0.5), ("noop", 1)])
        self.check_errors("PUT", "/proxies/p/toxics", [
            ([{"type": "noop", "nope": 1}], 400,
             "nope is not a field of a toxic: there are name, type"),
            ([{"type": "latency", "attributes": {"latence": 1}}], 400,
             "latence is not an option of latency (did you mean latency?): it has distribution"),
            ({}, 400, "cannot unmarshal object"),
            ([5], 400, "cannot unmarshal number"),
            ("[] x", 400, "bad request body"),
            ([{"type": "noop"}, {"type": "nope"}], 400,
             "invalid toxic type: unknown handler 'nope'"),
            ([{"type": "noop", "toxicity": 7}], 400,
             "toxicity must be a number from 0 to 1, not 7"),
            ([{"TYPE": "noop"}], 400, "invalid toxic type"),
            ([{"type": "latency", "attributes": {"latency": -5}}], 400,
             "latency must be a whole number, 0 or more, not -5")])
        self.request_error("PUT", "/proxies/p/toxics", [{"type": "noop"}, {"type": "noop"}], 409)
        self.assertEqual(self.request("GET", "/proxies/p/toxics?all=1"), toxics)
        self.assertEqual(self.request("PUT", "/proxies/p/toxics", []), [])
        self.request_error("PUT", "/proxies/q/toxics", [], 404)

    def test_unchanged_toxics_keep_their_state(self):
        sock = self.connect(self.create_proxy())
        toxics = [{"type": "latency", "attributes": {"latency": 3600000}},
                  {"type": "limit_data", "attributes": {"bytes": 10}}]
        self.request("PUT", "/proxies/p/toxics", toxics)
        sock.sendall(b"question")
        proxy, connection = self.wait_for_connection()
        due = self.wait_until_delayed(proxy, connection)
        upstream = self.request("GET", "/proxies/p")["upstream"]
        self.request("PUT", "/proxies/p/toxics", toxics + [{"type": "noop"}])
        self.request("POST", "/populate", [{
            "name": "p", "listen": "127.0.0.1:%d" % proxy.local[1], "upstream": upstream,
            "toxics": toxics}], 201)
        self.request("PATCH", "/proxies/p/toxics/latency_downstream", {})
        self.assertEqual(proxy.loop.run_sync(connection.down.next_time, NEVER), due)
        toxics[0]["attributes"]["latency"] = 1
        self.request("PUT", "/proxies/p/toxics", toxics)
        self.assertEqual(read_exactly(sock, 8), b"question")
        sock.sendall(b"question")
        self.assertEqual(read_until_close(sock).size, 2)      # 10 minus the 8 bytes before

    def test_invalid_changes_of_a_toxic_are_refused(self):
        self.create_proxy()
        self.add_toxic("latency")
        path = "/proxies/p/toxics/latency_downstream"
        self.check_errors("PATCH", path, [
            ({"percent": 500}, 400, "percent must be"),
            ({"percent": 5, "toxicity": 1}, 400, "mean the same"),
            ({"match": "("}, 400, "match must"),
            ({"after": 3}, 400, "after cannot be changed")])
        self.assertEqual(self.request("PATCH", path, {"percent": 50})["toxicity"], 0.5)

    def test_a_refused_change_of_a_toxic_changes_nothing(self):
        """The installed rule had the refused option, and every later change was refused too."""
        self.create_proxy()
        self.add_toxic("error")
        path = "/proxies/p/toxics/error_downstream"
        before = self.request("GET", path)
        self.check_errors("PATCH", path, [({"attributes": {"kind": "500"}}, 400, "kind needs")])
        self.check_errors("PUT", "/proxies/p/toxics", [
            ([dict(before, toxicity=0.5), {"type": "cut", "attributes": {"rows": 1}}], 400,
             "rows needs")])
        self.assertEqual(self.request("GET", path), before)
        self.add_toxic("noop")

    def test_vauriens_delay_applies_to_each_request_on_any_stream(self):
        sock = self.connect(self.create_proxy())
        for attributes in {"sleep": 0.005}, {"sleep": 0.005, "before": False}:
            for stream in None, "upstream", "downstream":
                with self.subTest(stream, attributes=attributes):
                    toxic = self.request("POST", "/proxies/p/toxics", {
                        "type": "delay", "stream": stream, "attributes": attributes})
                    self.assertEqual(toxic["stream"], stream or "both")
                    for _ in range(3):
                        began = time.monotonic()
                        send_and_read(sock, b"question")
                        self.assertGreaterEqual(time.monotonic() - began, 0.005)
                    path = "/proxies/p/toxics/delay_%s" % (stream or "both")
                    self.request("DELETE", path, status=204)

    def test_vauriens_errors_reply_on_both_streams_or_downstream(self):
        sock = self.connect(self.create_proxy())
        for stream in None, "downstream":
            with self.subTest(stream):
                toxic = self.request("POST", "/proxies/p/toxics",
                                     {"type": "error", "stream": stream})
                for _ in range(3):
                    sock.sendall(b"question")
                    self.assertNotIn(b"question", read_exactly(sock, ERROR_SIZE))
                self.request("DELETE", "/proxies/p/toxics/" + toxic["name"], status=204)
        self.check_errors("POST", "/proxies/p/toxics", [
            ({"type": type_, "stream": "upstream"}, 400,
             "stream must be both or downstream for %s" % type_)
            for type_ in ("error", "transient", "abort")])

    def test_proxy_is_not_an_alias_of_the_first_proxy(self):
        self.create_proxy()
        self.request_error("DELETE", "/proxies/PROXY", None, 404)

    def test_a_request_body_may_be_chunked(self):
        head = (b"POST /proxies HTTP/1.1\r\n"
                b"Host: localhost\r\n"
                b"Connection: close\r\n"
                b"Transfer-Encoding: chunked\r\n"
                b"\r\n")
        valid = (b'5\r\n{"nam\r\n'
                 b'1e;x=y\r\ne": "a", "upstream": "x:1"}   \r\n'
                 b'0\r\n'
                 b'X: y\r\n'
                 b'\r\n')
        for name, chunks, status in [("valid", valid, 201),
                                     ("no size", b"x\r\n", 400),
                                     ("negative size", b"-1\r\n", 400),
                                     ("wrong size", b"2\r\nabcd", 400),
                                     ("too large", b"fffffff\r\n", 413)]:
            with self.subTest(name), contextlib.closing(connect(self.port)) as sock:
                sock.sendall(head + chunks)
                self.assertEqual(http_status(sock.recv(65536)), status)

    def test_a_proxy_is_created_with_its_toxics(self):
        port = self.create_proxy(toxics=[{"type": "limit_data", "attributes": {"bytes": 0}},
                                         {"type": "noop", "stream": "upstream"}])
        sock = self.connect(port)
        sock.sendall(b"question")
        self.assertEqual(read_until_close(sock).size, 0)
        self.assertEqual(len(self.request("GET", "/proxies/p")["toxics"]), 2)
        for toxics, status in [([{"type": "nope"}], 400),
                               ([{"type": "noop"}, {"type": "noop"}], 409),
                               (5, 400)]:
            with self.subTest(toxics):
                self.request_error("POST", "/proxies", {
                    "name": "q", "upstream": "localhost:1", "toxics": toxics}, status)
        self.request_error("GET", "/proxies/q", None, 404)

    def test_populate_creates_proxies(self):
        one = {"name": "one", "listen": "127.0.0.1:0", "upstream": "localhost:1"}
        two = {"name": "two", "listen": "127.0.0.1:0", "upstream": "localhost:2"}
        self.assertEqual(self.request("POST", "/populate", "[]", 201), {"proxies": None})
        proxies = self.request("POST", "/populate", [
            one, dict(two, enabled=False, toxics=[{"type": "noop"}])], 201)["proxies"]
        self.assertEqual(
            [(proxy["name"], proxy["enabled"], len(proxy["toxics"])) for proxy in proxies],
            [("one", True, 0), ("two", False, 1)])
        self.assertEqual(list(self.request("GET", "/proxies")), ["one", "two"])
        three, four = dict(one, name="three"), dict(two, name="four")
        for body, text in [
                ([one, {"name": ""}], "missing required field: name at proxy 2"),
                ([{"name": "x"}], "missing required field: upstream at proxy 1"),
                ([three, dict(four, toxics=[{"type": "nope"}])], "invalid toxic type"),
                ([three, three], "duplicate proxy name 'three' at proxy 2"),
                ("{}", "cannot unmarshal object"),
                ("", "bad request body: EOF")]:
            with self.subTest(text):
                response = self.request("POST", "/populate", body, 400)
                self.assertIn(text, response["error"])
                self.assertEqual(
                    (response["status"], response["proxies"], self.headers["Content-Type"]),
                    (400, None, "application/json"))
        self.assertEqual(list(self.request("GET", "/proxies")), ["one", "two"])

    def test_populate_stops_at_the_first_address_that_cannot_be_bound(self):
        response = self.request("POST", "/populate", [
            {"name": "a", "listen": "127.0.0.1:0", "upstream": "localhost:1"},
            {"name": "b", "listen": self.occupy_address(), "upstream": "localhost:1"},
            {"name": "c", "listen": "127.0.0.1:0", "upstream": "localhost:1"}], 500)
        self.assertIn("address already in use", response["error"])
        self.assertEqual([proxy["name"] for proxy in response["proxies"]], ["a"])
        self.assertEqual(list(self.request("GET", "/proxies")), ["a"])

    def test_a_slow_lookup_of_a_name_to_listen_on_delays_no_other_change(self):
        self.create_proxy()
        gate, waiting, responses = threading.Event(), threading.Event(), []
        self.stack.callback(gate.set)
        real_resolve = vaurien.resolve

        def resolve(address, *args, **kwargs):
            host, port = address
            if host == "slow.example":
                waiting.set()
                gate.wait(TIMEOUT)
            return real_resolve(("127.0.0.1", port), *args, **kwargs)

        def run(*args):
            responses.append(self.request(*args))

        slow = {"name": "s", "listen": "slow.example:0", "upstream": "127.0.0.1:1"}
        self.create_proxy(name="q")
        with mock.patch.object(vaurien, "resolve", resolve):
            for method, path, body, status in [
                    ("POST", "/proxies", slow, 201),
                    ("POST", "/proxies/q", {"listen": "slow.example:0"}, 200),
                    ("POST", "/populate", [dict(slow, name="t")], 201)]:
                with self.subTest(path):
                    gate.clear()
                    waiting.clear()
                    thread = threading.Thread(target=run, args=(method, path, body, status))
                    thread.start()
                    self.assertTrue(waiting.wait(TIMEOUT))
                    self.add_toxic("noop")
                    self.request("DELETE", "/proxies/p/toxics/noop_downstream", status=204)
                    self.request("POST", "/proxies/p", {"enabled": False})
                    self.request("POST", "/proxies/p", {"enabled": True})
                    self.assertTrue(thread.is_alive())
                    gate.set()
                    thread.join(TIMEOUT)
            self.assertEqual(len(responses), 3)
        self.assertEqual(set(self.request("GET", "/proxies")), {"p", "q", "s", "t"})

    def test_of_two_proxies_with_one_name_created_at_once_one_is_refused(self):
        """The second request passes the check of the name before the first one has added it."""
        real_bind, added = vaurien.ProxyServer.bind, []

        def bind(proxy):
            if not added:
                added.append(proxy)
                self.create_proxy(name=proxy.name)
            real_bind(proxy)

        fields = {"name": "p", "listen": "127.0.0.1:0", "upstream": "127.0.0.1:1"}
        with mock.patch.object(vaurien.ProxyServer, "bind", bind):
            self.assertEqual(self.request_error("POST", "/proxies", fields, 409),
                             "proxy already exists")
        refused, = added
        self.assertEqual(refused.listener.sockets, [])
        self.assertIsNot(self.proxies["p"], refused)

    def test_populate_keeps_the_connections_of_an_unchanged_proxy(self):
        port = self.create_proxy()
        upstream = self.request("GET", "/proxies/p")["upstream"]
        self.add_toxic("noop")
        sock = self.connect(port)
        send_and_read(sock, b"question")
        same = {"name": "p", "listen": "127.0.0.1:%d" % port, "upstream": upstream}
        for body, toxic_count in [(same, 1),
                                  (dict(same, enabled=False, toxics=None), 1),
                                  (dict(same, toxics=[]), 0)]:
            proxy, = self.request("POST", "/populate", [body], 201)["proxies"]
            self.assertEqual((proxy["enabled"], len(proxy["toxics"])), (True, toxic_count))
            send_and_read(sock, b"question")
        self.add_toxic("noop")
        upstream, _ = self.start_backend()
        proxy, = self.request("POST", "/populate", [dict(same, upstream=upstream)],
                              201)["proxies"]
        self.assertEqual((proxy["upstream"], proxy["toxics"]), (upstream, []))
        self.assertEqual(read_until_close(sock).size, 0)

    def test_populate_replaces_only_the_toxics_of_the_keys_that_it_has(self):
        """A typed client knows only `toxics`: what it sends back would remove the rules."""
        self.create_proxy()
        self.add_toxic("noop")
        self.add_toxic("hang")
        listing = self.request("GET", "/proxies/p")
        for keys, toxics, rules in [(["toxics"], [], ["hang"]), (["rules"], ["noop"], []),
                                    (["toxics", "rules"], [], []), ([], ["noop"], ["hang"])]:
            with self.subTest(keys=keys):
                self.request("POST", "/populate", [listing], 201)
                body = {key: [] if key in ("toxics", "rules") else value
                        for key, value in listing.items()
                        if key in keys or key not in ("toxics", "rules")}
                proxy, = self.request("POST", "/populate", [body], 201)["proxies"]
                self.assertEqual(
                    ([toxic["type"] for toxic in proxy["toxics"]],
                     [toxic["type"] for toxic in proxy.get("rules", [])]), (toxics, rules))

    def test_reset_enables_all_proxies_and_removes_all_toxics(self):
        port = self.create_proxy()
        self.create_proxy(name="q")
        self.add_toxic("noop")
        sock = self.connect(port)
        send_and_read(sock, b"question")
        self.request("POST", "/proxies/q", {"enabled": False})
        self.assertEqual(self.request("POST", "/reset", status=204), "")
        proxies = self.request("GET", "/proxies").values()
        self.assertEqual([(proxy["enabled"], proxy["toxics"]) for proxy in proxies],
                         [(True, [])] * 2)
        send_and_read(sock, b"question")

    def test_the_handler_of_the_first_proxy_is_independent_of_its_toxics(self):
        response = self.request("GET", "/handler", status=400)
        self.assertIn("there are none yet", response["errors"][0]["description"])
        self.create_proxy()
        self.add_toxic("latency")
        self.assertEqual(self.request("GET", "/handler"), "dummy")
        self.assertEqual(self.request("POST", "/handler", "delay"), "ok")
        rules = self.request("GET", "/rules")["rules"]
        self.assertEqual([rule["name"] for rule in rules], ["delay"])
        self.assertEqual(self.proxies["p"].describe(),
                         "100:delay sleep=1.0, "
                         "toxic latency_downstream (100:downstream latency latency=0 jitter=0)")
        self.assertEqual(self.request("POST", "/handler", "dummy"), "ok")
        self.assertEqual(len(self.request("GET", "/proxies/p/toxics")), 1)

    def test_events_and_connections_of_one_proxy(self):
        self.create_proxy(name="q")
        sock = self.connect(self.create_proxy())
        self.add_toxic("delay", stream="both", attributes={"sleep": 0.001})
        send_and_read(sock, b"question")
        record = self.request("GET", "/proxies/p/events?since=0")["events"][0]
        self.assertEqual((record["handler"], record["proxy"]), ("delay", "p"))
        self.assertEqual(self.request("GET", "/proxies/q/events")["events"], [])
        connections = self.request("GET", "/proxies/p/connections")["connections"]
        self.assertEqual(len(connections), 1)
        self.request("GET", "/proxies/nope/events", status=404)

    def test_metrics_include_open_connections(self):
        sock = self.connect(self.create_proxy(name='p"\\'))
        send_and_read(sock, b"question")
        metrics = self.request("GET", "/metrics")
        # name{label="value",label="value"} count
        sample = re.compile(r'^(\w+)\{((?:\w+="(?:[^"\\]|\\.)*",?)*)\} ([\d.]+)$')
        values = {}         # {(name, directions): count}; `directions` has one item at most
        for line in metrics.splitlines():
            if not line.startswith("# "):
                name, labels, count = sample.match(line).groups()
                directions = tuple(re.findall(r'direction="(\w+)"', labels))
                values[name, directions] = float(count)
        self.assertEqual(values["toxiproxy_proxy_received_bytes_total", ("upstream",)], 8)
        self.assertEqual(values["toxiproxy_proxy_sent_bytes_total", ("downstream",)], 8)
        self.assertEqual(values["vaurien_connections_open", ()], 1)
        self.assertEqual(values["vaurien_requests_total", ()], 1)
        self.assertIn('{direction="upstream",listener="127.0.0.1:', metrics)

    def test_bytes_of_ended_connections_are_counted_on_the_fast_and_the_slow_path(self):
        port = self.create_proxy()
        size = 300000               # bytes of each of the three connections
        for toxics in ([],
                       [{"type": "slicer", "attributes": {"average_size": 1000}}],
                       [{"type": "latency", "attributes": {"latency": 1}}]):
            with self.subTest(toxics):
                self.request("PUT", "/proxies/p/toxics", toxics)
                with contextlib.closing(connect(port)) as sock:
                    self.assertEqual(send_and_read_all(sock, random_data(size)).size, size)
        wait_until(lambda: not self.proxies["p"].connections)
        self.assertEqual(self.proxies["p"].byte_counts(), {
            (direction, counter): 3 * size
            for direction in (UPSTREAM, DOWNSTREAM) for counter in ("received", "sent")})

    def test_bytes_that_a_fault_drops_are_counted_as_received_and_not_as_sent(self):
        sock = self.connect(self.create_proxy())
        self.add_toxic("timeout")
        sock.sendall(b"question")
        proxy = self.proxies["p"]
        wait_until(lambda: proxy.loop.run_sync(proxy.byte_counts)[DOWNSTREAM, "received"] == 8)
        self.assertEqual(proxy.loop.run_sync(proxy.byte_counts)[DOWNSTREAM, "sent"], 0)

    def test_statsd_counters_are_sent_as_differences(self):
        udp_sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with contextlib.closing(udp_sock), mock.patch.object(vaurien, "STATSD_INTERVAL", 0.1):
            udp_sock.bind(("127.0.0.1", 0))
            udp_sock.settimeout(TIMEOUT)
            sock = self.connect(self.create_proxy(name="my.proxy"))
            self.add_toxic("noop", proxy="my.proxy")
            self.add_toxic("delay", proxy="my.proxy", stream="both", attributes={"sleep": 0.001})
            send_and_read(sock, b"question")
            statsd = vaurien.Statsd(udp_sock.getsockname(), self.proxies)
            self.loop.run_sync(statsd.open, self.loop)
            lines = udp_sock.recv(65536).decode().split("\n")
            for line in ("vaurien.my_proxy.connections:1|c",
                         "vaurien.my_proxy.connections_open:1|g",
                         "vaurien.my_proxy.requests:1|c",
                         "vaurien.my_proxy.faults.delay:1|c",
                         "vaurien.my_proxy.received_bytes.upstream:8|c"):
                with self.subTest(line):
                    self.assertIn(line, lines)
            send_and_read(sock, b"question")
            lines = []
            while "vaurien.my_proxy.requests:1|c" not in lines:
                lines = udp_sock.recv(65536).decode().split("\n")
                self.assertNotIn("vaurien.my_proxy.connections:1|c", lines)
            self.loop.run_sync(statsd.close)

    def test_statsd_packets_are_not_larger_than_the_maximum(self):
        class RecordingSocket:
            def __init__(self):
                self.packets = []

            def send(self, packet):
                self.packets.append(packet)

        proxy_count = 40
        for index in range(proxy_count):
            long_name = "p%d" % index + "x" * 100
            self.request("POST", "/proxies", {
                "name": long_name, "upstream": "localhost:1", "enabled": False}, 201)
        statsd = vaurien.Statsd(("localhost", 1), self.proxies)
        statsd.sock = RecordingSocket()
        statsd.send()
        packets = statsd.sock.packets
        self.assertLessEqual(max(map(len, packets)), vaurien.STATSD_PACKET_MAX)
        self.assertEqual(sum(packet.count(b"connections_open") for packet in packets),
                         proxy_count)


class TestDefects(ToxiproxyTestCase):
    """Defects of Toxiproxy 2.12 that this server does not have. #N is an issue of Toxiproxy."""

    # [(type, attributes)] of toxics that change the timing of the bytes, and nothing else.
    TIMING_TOXICS = [("latency", {"latency": 5, "jitter": 3}),
                ("bandwidth", {"rate": 100000}),
                ("slow_close", {"delay": 5}),
                ("slicer", {"average_size": 100, "size_variation": 50}),
                ("limit_data", {"bytes": 10 ** 9}),
                ("noop", {}),
                ("delay", {"sleep": 0.001})]

    def test_half_close_passes_with_every_toxic(self):
        """Toxiproxy closes both directions at the first EOF, and the reply is lost."""
        def serve(sock):
            received = read_until_close(sock)
            sock.sendall(("%d %s %s" % received).encode())
            return received.ending

        port = self.create_proxy(serve)
        data = random_data(20000)
        reply = b"20000 %s eof" % hashlib.sha1(data).hexdigest().encode()
        expected = Received(len(reply), hashlib.sha1(reply).hexdigest(), "eof")
        for stream in "upstream", "downstream", "both":
            for type_, attributes in self.TIMING_TOXICS:
                with self.subTest(type_, stream=stream):
                    self.request("PUT", "/proxies/p/toxics", [
                        {"type": type_, "stream": stream, "attributes": attributes}])
                    sock = self.connect(port)
                    sock.sendall(data)
                    sock.shutdown(socket.SHUT_WR)
                    self.assertEqual(read_until_close(sock), expected)

    def test_half_close_passes_with_a_timeout_on_the_other_stream(self):
        sock = self.connect(self.create_proxy(lambda sock: read_until_close(sock).ending))
        self.add_toxic("timeout", stream="downstream")
        sock.shutdown(socket.SHUT_WR)
        wait_until(lambda: self.backend_results)
        self.assertEqual(self.backend_results, ["eof"])

    def test_reset_peer_resets_open_connections(self):
        """Toxiproxy sends FIN, because it sets SO_LINGER only when a connection begins."""
        sock = self.connect(self.create_proxy())
        send_and_read(sock, b"question")
        self.add_toxic("reset_peer")
        sock.sendall(b"question")
        self.assertEqual(read_until_close(sock).ending, "reset")

    def test_reset_peer_resets_the_client_and_the_backend(self):
        backend_endings = []

        def serve(sock):
            sock.sendall(b"hello")
            backend_endings.append(read_until_close(sock).ending)

        port = self.create_proxy(serve, toxics=[{"type": "reset_peer"}])
        try:
            client_ending = read_until_close(self.connect(port)).ending
        except ConnectionResetError:    # the reset came before connect() returned
            client_ending = "reset"
        self.assertEqual(client_ending, "reset")
        wait_until(lambda: backend_endings)
        self.assertEqual(backend_endings, ["reset"])

    def test_a_toxic_of_toxicity_0_has_no_effect(self):
        """#603: in Toxiproxy, a reset_peer of toxicity 0 still resets at a normal close."""
        toxics = [{"type": type_, "toxicity": 0, "stream": "both"} for type_ in HANDLERS]
        sock = self.connect(self.create_proxy(toxics=toxics))
        send_and_read(sock, b"question")
        sock.shutdown(socket.SHUT_WR)
        self.assertEqual(read_until_close(sock).ending, "eof")
        self.assertFalse(self.proxies["p"].faults)

    def test_changing_one_toxic_does_not_affect_the_bytes_that_another_delays(self):
        """In Toxiproxy, adding toxic B makes toxic A release its chunk and draw its toxicity."""
        sock = self.connect(self.create_proxy())
        self.add_toxic("latency", name="a", attributes={"latency": 3600000})
        sock.sendall(b"question")
        proxy, connection = self.wait_for_connection()
        due = self.wait_until_delayed(proxy, connection)
        for method, path, body, status in [
                ("POST", "", {"type": "latency", "name": "b", "attributes": {"latency": 5}}, 200),
                ("POST", "/b", {"attributes": {"latency": 9}}, 200),
                ("PATCH", "/b", {"toxicity": 0}, 200),
                ("POST", "", {"type": "bandwidth"}, 200),
                ("DELETE", "/b", None, 204)]:
            with self.subTest(method, path=path, body=body):
                self.request(method, "/proxies/p/toxics" + path, body, status)
                self.assertEqual(proxy.loop.run_sync(connection.down.next_time, NEVER), due)
        self.request("DELETE", "/proxies/p/toxics/a", status=204)
        self.assertEqual(read_exactly(sock, 8), b"question")

    def test_a_changed_toxic_keeps_the_draws_of_the_connections(self):
        port = self.create_proxy(toxics=[{"type": "hang", "toxicity": 0.5, "stream": "upstream"}])
        proxy = self.proxies["p"]
        for _ in range(20):
            self.connect(port)
        wait_until(lambda: len(proxy.connections) == 20)

        def affected_connections():
            """Return the keys of the connections that the toxic applies to."""
            return proxy.loop.run_sync(lambda: {
                key for key, connection in proxy.connections.items()
                if connection.chain.active_rules})

        path = "/proxies/p/toxics/hang_upstream"
        before = affected_connections()
        self.assertTrue(2 < len(before) < 18)
        self.request("POST", path, {})
        self.add_toxic("noop", toxicity=0)
        self.assertEqual(affected_connections(), before)
        self.request("POST", path, {"toxicity": 1})
        self.assertEqual(len(affected_connections()), 20)
        self.request("POST", path, {"toxicity": 0.5})
        self.assertEqual(affected_connections(), before)
        self.assertEqual(len(proxy.connections), 20)

    def test_a_changed_toxic_does_not_apply_to_a_connection_that_after_exempts(self):
        """A proxy evaluates `after` when it accepts a connection, and not when a toxic changes."""
        port = self.create_proxy(toxics=[
            {"type": "limit_data", "after": 1, "attributes": {"bytes": 0}}])
        first = self.connect(port)
        send_and_read(first, b"question")
        second = self.connect(port)
        second.sendall(b"question")
        self.assertEqual(read_until_close(second).size, 0)
        for body in {"attributes": {"bytes": 1}}, {"toxicity": 0}, {"toxicity": 1}:
            self.request("PATCH", "/proxies/p/toxics/limit_data_downstream", body)
        send_and_read(first, b"question")

    def test_a_connection_without_bytes_has_no_fault_record(self):
        port = self.create_proxy(toxics=[{"type": "delay", "stream": "downstream"}])
        sock = self.connect(port)
        self.wait_for_backends()
        self.assertEqual(self.request("GET", "/proxies/p/events")["events"], [])
        sock.close()

    def test_a_failing_handler_resets_the_connection_although_another_toxic_hangs(self):
        def failing(state, t, to, data):
            raise KeyError("no idea")
            yield       # makes this function a generator

        with registered(failing):
            sock = self.connect(self.create_proxy())
            send_and_read(sock, b"question")
            self.request("PUT", "/proxies/p/toxics", [{"type": "failing"}, {"type": "hang"}])
            self.assertEqual(read_until_close(sock).ending, "reset")

    def test_a_changed_latency_releases_the_delayed_bytes(self):
        sock = self.connect(self.create_proxy())
        self.add_toxic("latency", attributes={"latency": 3600000})
        sock.sendall(b"question")
        self.wait_until_delayed(*self.wait_for_connection())
        self.request("PATCH", "/proxies/p/toxics/latency_downstream",
                     {"attributes": {"latency": 1}})
        self.assertEqual(read_exactly(sock, 8), b"question")
        send_and_read(sock, b"question")

    def test_a_changed_rate_applies_to_the_queued_bytes(self):
        sock = self.connect(self.create_proxy())
        self.add_toxic("bandwidth", attributes={"rate": 1})
        sock.sendall(bytes(100000))         # 100 seconds at a rate of 1 kB/s
        self.wait_until_received(*self.wait_for_connection())
        self.request("PATCH", "/proxies/p/toxics/bandwidth_downstream",
                     {"attributes": {"rate": 1000000}})
        self.assertEqual(read_exactly(sock, 100000), bytes(100000))
        send_and_read(sock, b"question")

    def test_a_changed_timeout_still_counts_from_its_beginning(self):
        sock = self.connect(self.create_proxy())
        send_and_read(sock, b"question")
        self.add_toxic("timeout", attributes={"timeout": 3600000})
        proxy, connection = self.wait_for_connection()
        path = "/proxies/p/toxics/timeout_downstream"
        first_due = proxy.loop.run_sync(connection.down.next_time, NEVER)
        self.request("PATCH", path, {"attributes": {"timeout": 7200000}})
        new_due = proxy.loop.run_sync(connection.down.next_time, NEVER)
        self.assertAlmostEqual(new_due, first_due + 3600, places=3)     # one hour more
        self.assertEqual(len(proxy.loop.run_sync(lambda: list(proxy.connections))), 1)
        self.request("PATCH", path, {"attributes": {"timeout": 1}})
        self.assertEqual(read_until_close(sock).size, 0)

    def test_a_timeout_closes_an_idle_connection(self):
        sock = self.connect(self.create_proxy())
        send_and_read(sock, b"question")
        began = time.monotonic()
        self.add_toxic("timeout", attributes={"timeout": 100})
        received = read_until_close(sock)
        self.assertEqual((received.size, received.ending), (0, "eof"))
        self.assertGreaterEqual(time.monotonic() - began, 0.1)

    def test_a_timeout_closes_a_new_connection_without_bytes(self):
        port = self.create_proxy(toxics=[{"type": "timeout", "attributes": {"timeout": 100}}])
        began = time.monotonic()
        received = read_until_close(self.connect(port))
        self.assertEqual((received.size, received.ending), (0, "eof"))
        self.assertGreaterEqual(time.monotonic() - began, 0.1)

    def test_removing_a_timeout_closes_the_connection(self):
        sock = self.connect(self.create_proxy())
        self.add_toxic("timeout")
        sock.sendall(b"question")
        self.wait_for_backends()
        self.request("DELETE", "/proxies/p/toxics/timeout_downstream", status=204)
        self.assertEqual(read_until_close(sock).size, 0)

    def test_a_changed_limit_data_keeps_its_count(self):
        sock = self.connect(self.create_proxy())
        self.add_toxic("limit_data", attributes={"bytes": 10})
        send_and_read(sock, b"question")
        self.request("PATCH", "/proxies/p/toxics/limit_data_downstream",
                     {"attributes": {"bytes": 12}})
        sock.sendall(b"question")
        self.assertEqual(read_until_close(sock).size, 4)       # 12 minus the 8 bytes before

    def test_a_toxic_is_removed_while_the_client_does_not_read(self):
        """#88, #159, #210, #412, #500, #558: Toxiproxy's API hangs for 25 s or without end."""
        def serve(sock):
            with contextlib.suppress(OSError):
                sock.sendall(bytes(50000000))

        for type_, attributes in [("latency", {"latency": 3600000}),
                                  ("bandwidth", {"rate": 1}),
                                  ("slicer", {"average_size": 1, "delay": 10 ** 6}),
                                  ("bandwidth", {}),
                                  ("slow_close", {"delay": 3600000}),
                                  ("timeout", {}),
                                  ("hang", {})]:
            with self.subTest(type_, attributes=attributes):
                sock = self.connect(self.create_proxy(serve))
                self.add_toxic(type_, attributes=attributes)
                self.wait_until_received(*self.wait_for_connection())
                path = "/proxies/p/toxics/%s_downstream" % type_
                self.request("PATCH", path, {"toxicity": 1})
                self.request("DELETE", path, status=204)
                self.request("DELETE", "/proxies/p", status=204)
                sock.close()

    def test_a_toxic_with_a_long_delay_is_removed_after_the_client_has_reset(self):
        """Toxiproxy removes a reset_peer only after its timeout."""
        port = self.create_proxy()
        for type_, attributes in [("latency", {"latency": 3600000}),
                                  ("reset_peer", {"timeout": 3600000}),
                                  ("slow_close", {"delay": 3600000})]:
            with self.subTest(type_):
                self.add_toxic(type_, attributes=attributes)
                sock = connect(port)
                sock.sendall(b"question")
                proxy, connection = self.wait_for_connection()
                self.wait_until_received(proxy, connection)
                close_with_reset(sock)
                self.request("DELETE", "/proxies/p/toxics/%s_downstream" % type_, status=204)
                wait_until(lambda: not proxy.connections)

    def test_attributes_that_crash_toxiproxy_are_harmless(self):
        """#178, #541, #770. This server refuses a rate of -1, at which Toxiproxy crashes, too."""
        port = self.create_proxy()
        for type_, attributes in [
                ("slicer", {}),
                ("slicer", {"average_size": 5, "size_variation": 5}),
                ("slicer", {"average_size": 1, "size_variation": 2 ** 62}),
                ("slicer", {"average_size": 2 ** 62}),
                ("latency", {"latency": -5, "jitter": -5}),
                ("latency", {"jitter": 3}),
                ("bandwidth", {"rate": 2 ** 63 - 1}),
                ("limit_data", {"bytes": 2 ** 63 - 1}),
                ("slow_close", {"delay": -1})]:
            with self.subTest(type_, attributes=attributes), \
                    self.assertLogs("vaurien", "INFO") as logs:
                self.request("PUT", "/proxies/p/toxics", [])
                self.add_toxic(type_, stream="both", attributes=attributes)
                with contextlib.closing(connect(port)) as sock:
                    send_and_read(sock, b"a request of more than one byte")
                self.request("PUT", "/proxies/p/toxics", [])
                self.assertEqual([record.getMessage() for record in logs.records
                                  if record.levelno >= logging.ERROR], [])

    def test_an_unreachable_backend_does_not_block_another_proxy(self):
        """Toxiproxy connects to the backend in its accept loop, without a timeout."""
        with silent_address() as silent_port:
            port = self.port_of(self.request("POST", "/proxies", {
                "name": "dead", "listen": "127.0.0.1:0",
                "upstream": "127.0.0.1:%d" % silent_port}, 201))
            for _ in range(100):
                self.connect(port)
            send_and_read(self.connect(self.create_proxy()), b"question")
            wait_until(lambda: len(self.proxies["dead"].connections) == 100)
            self.request("DELETE", "/proxies/dead", status=204)

    def test_the_seed_decides_the_draws(self):
        """The option -seed has no effect in Toxiproxy."""
        replies_of_runs = []
        for _ in range(2):
            port = self.create_proxy(toxics=[
                {"type": "limit_data", "toxicity": 0.5, "attributes": {"bytes": 0}}])
            replies = []
            for _ in range(30):
                with contextlib.closing(connect(port)) as sock:
                    sock.sendall(b"question")
                    replies.append(sock.recv(8))
            replies_of_runs.append(replies)
            self.request("DELETE", "/proxies/p", status=204)
        first_replies, second_replies = replies_of_runs
        self.assertEqual(first_replies, second_replies)
        self.assertEqual(set(first_replies), {b"", b"question"})

    def test_a_refused_proxy_releases_its_port(self):
        """#69: in Toxiproxy, the port of a refused proxy stays in use."""
        self.create_proxy()
        address = "127.0.0.1:%d" % unused_port()
        self.request_error("POST", "/proxies", {
            "name": "p", "listen": address, "upstream": "localhost:1"}, 409)
        self.request("POST", "/proxies", {
            "name": "q", "listen": address, "upstream": "localhost:1"}, 201)

    def test_a_rate_limit_blocks_the_sender_and_a_latency_does_not(self):
        mebibyte = 1 << 20
        size = 12 * mebibyte

        def serve(sock):
            sock.settimeout(TIMEOUT)
            with contextlib.suppress(OSError):
                sock.sendall(bytes(size))
            return sock.recv(1)

        for type_, attributes, received_min, received_max in [
                ("bandwidth", {"rate": 1}, 0, 2 * mebibyte),
                ("latency", {"latency": 3600000}, 8 * mebibyte, 17 * mebibyte)]:
            with self.subTest(type_):
                port = self.create_proxy(serve, toxics=[
                    {"type": type_, "attributes": attributes}])
                sock = self.connect(port)
                proxy, connection = self.wait_for_connection()

                def has_stopped_reading():
                    return connection.down.watched == 0 or connection.down.received == size

                wait_until(lambda: proxy.loop.run_sync(has_stopped_reading))
                received = connection.down.received
                self.assertTrue(received_min <= received <= received_max, received)
                self.request("DELETE", "/proxies/p", status=204)
                sock.close()


# -- Client ---------------------------------------------------------------------


class TestClient(unittest.TestCase):
    """The Python client of the control server."""

    def test_behavior_and_handler_are_two_names_for_the_same_setting(self):
        with proxy_with_control() as (proxy, client):
            self.assertEqual(client.list_handlers(), list(HANDLERS))
            client.set_behavior("delay", sleep=2)
            self.assertEqual((client.get_behavior(), client.get_handler()), ("delay", "delay"))
            self.assertEqual(proxy.describe(), "100:delay sleep=2.0")

    def test_with_handler_restores_the_previous_rules(self):
        before = "20:delay sleep=2.0 before=no, 5:hang, 75:dummy"
        options = {"delay": {"sleep": 2, "before": False}}
        with proxy_with_control(behavior="20:delay,5:hang", options=options) as (proxy, client):
            with client.with_handler("error", inject=True, percent=30):
                self.assertEqual(proxy.describe(), "30:error inject=yes warmup=0, 70:dummy")
                with client.with_behavior("blackout"):
                    self.assertEqual(client.get_handler(), "blackout")
                self.assertEqual(client.get_handler(), "error")
            self.assertEqual(proxy.describe(), before)
            with self.assertRaises(KeyError), client.with_handler("blackout"):
                raise KeyError
            self.assertEqual(proxy.describe(), before)

    def test_a_refused_request_raises_value_error_with_the_text_of_the_server(self):
        with proxy_with_control() as (_, client):
            with self.assertRaisesRegex(ValueError, "unknown handler 'nope'"):
                client.set_handler("nope")
            with self.assertRaisesRegex(ValueError, "sleep must be a number, 0 or more, not 'x'"):
                client.set_handler("delay", sleep="x")
            with self.assertRaisesRegex(ValueError, "there is no proxy 'x'"):
                vaurien.Client("127.0.0.1", client.port, proxy="x").get_handler()
            with self.assertRaisesRegex(ValueError, "scheme must be"):
                vaurien.Client("127.0.0.1", client.port, "ftp").get_handler()

    def test_a_missing_or_foreign_server_raises_os_error(self):
        with self.assertRaises(OSError):
            vaurien.Client("127.0.0.1", unused_port()).get_handler()
        with backend_server(lambda sock: sock.sendall(b"220 smtp\r\n\r\n")) as (port, _):
            with self.assertRaises(OSError):
                vaurien.Client("127.0.0.1", port).get_handler()


class TestInterface(TempDirTestCase):
    """The methods of Proxy and Client. Most tests run against both of them."""

    def each(self, **arguments):
        """Yield (interface, proxy) in a subTest: a Proxy, and a Client of another proxy.

        proxy    the Proxy that runs in this process
        """
        for class_name in "Proxy", "Client":
            with self.subTest(class_name), proxy_with_control(**arguments) as (proxy, client):
                yield (client if class_name == "Client" else proxy), proxy

    @staticmethod
    def ask(interface):
        """Connect, send a request, and return whether the reply is the backend's."""
        host, port = interface.address()
        with contextlib.closing(connect(port, host)) as sock:
            try:
                return send_and_read(sock, b"question") == b"question"
            except (OSError, EOFError):
                return False

    def test_wrong_arguments_of_a_toxic_and_of_a_wait_are_refused(self):
        for interface, _ in self.each():
            for fields, error in (({"latncy": 3}, "latncy"), ({"toxicity": 20}, "toxicity"),
                                  ({"latency": -5}, "latency")):
                with self.assertRaisesRegex(ValueError, error):
                    interface.add_toxic("latency", **fields)
            self.assertEqual(interface.list_toxics(), [])
            for arguments in ({"times": 0}, {"times": "x"}, {"timeout": None}, {"timeout": -1},
                              {"since": "x"}, {"since": -1}):
                name, = arguments
                with self.assertRaisesRegex(ValueError, name + " must be"):
                    interface.wait_for("delay", **arguments)

    def test_one_scenario_for_proxy_and_client(self):
        for interface, proxy in self.each(behavior={"hang": 5}, seed=1):
            before = interface.describe()
            with interface.handler("delay", sleep=0.001) as fault:
                self.assertTrue(self.ask(interface))
                self.assertEqual(fault.wait(TIMEOUT), interface.wait_for("delay", TIMEOUT))
                self.assertEqual(interface.get_handler(), "delay")
            self.assertTrue(interface.describe() == before != "100:dummy")
            interface.set_behavior({"abort": 100})
            self.assertFalse(self.ask(interface))
            self.assertEqual([record.handler for record in interface.events(fault.count)],
                             ["abort"])
            self.assertEqual([record.handler for record in fault.events()], ["delay"])
            interface.reset()
            self.assertEqual(interface.describe(), "100:dummy")
            with interface.toxic("latency", latency=1) as fault:
                self.assertTrue(self.ask(interface))
                self.assertEqual(fault.wait(TIMEOUT).toxic, "latency_downstream")
                self.assertEqual(interface.list_toxics(), [
                    {"name": "latency_downstream", "type": "latency", "stream": "downstream",
                     "toxicity": 1, "attributes": {"latency": 1, "jitter": 0}}])
            self.assertEqual(interface.list_toxics(), [])
            name = interface.add_toxic("abort", "cut", toxicity=1)
            self.assertFalse(self.ask(interface))
            interface.remove_toxic(name)
            self.assertTrue(self.ask(interface))
            with self.assertRaisesRegex(ValueError, "not found|no toxic 'cut'"):
                interface.remove_toxic("cut")
            with interface.down():
                with self.assertRaises(OSError):
                    connect(interface.address()[1])
            self.assertTrue(self.ask(interface))
            wait_until(lambda: not proxy.connections)
            with contextlib.closing(connect(interface.address()[1])) as sock:
                send_and_read(sock, b"question")
                connections = vaurien.Proxy.connections(proxy) if interface is proxy else \
                    interface.connections()
                self.assertEqual([item["requests"] for item in connections], [1])
            interface.set_backend(("127.0.0.1", 9))
            self.assertEqual(interface.get_backend(), "127.0.0.1:9")

    def test_a_connection_is_closed_or_reset(self):
        for interface, proxy in self.each():
            for reset, ending in (False, b""), (True, "reset"):
                with self.subTest(ending), contextlib.closing(
                        connect(interface.address()[1])) as sock, connected_client(proxy) as other:
                    send_and_read(sock, b"question")
                    send_and_read(other, b"question")
                    closed, kept = sorted(proxy.connections)
                    interface.close_connection(closed, reset=reset)
                    try:
                        received = sock.recv(1)
                    except ConnectionResetError:
                        received = "reset"
                    self.assertEqual(received, ending)
                    send_and_read(other, b"question")
                    self.assertEqual(list(proxy.connections), [kept])
                    with self.assertRaisesRegex(ValueError, "no open connection %d" % closed):
                        interface.close_connection(closed)
                wait_until(lambda: not proxy.connections)

    def test_count_and_wait_for_select_by_handler_text_and_number(self):
        for interface, _ in self.each():
            self.assertEqual(interface.count(), 0)
            with interface.handler("delay", sleep=0.001, before=False):
                for _ in range(3):
                    self.ask(interface)
                for kwargs, count in (
                        ({}, 3), ({"name": "delay"}, 3), ({"name": "error"}, 0),
                        ({"match": "^quest"}, 3), ({"name": "delay", "match": "^uest"}, 0),
                        ({"since": 1}, 2), ({"since": 3}, 0)):
                    with self.subTest(kwargs):
                        self.assertEqual(interface.count(**kwargs), count)
                self.assertEqual(interface.wait_for("delay", TIMEOUT, times=2).number, 2)
                self.assertEqual(interface.wait_for(times=3, match="n$").number, 3)
                for kwargs, text in (
                        ({"times": 4}, "^delay has not acted 4 times, but 3, in 0.01 seconds; "
                                       "faults: 3 delay$"),
                        ({"match": "nope"}, "^delay has not acted in 0.01 seconds; faults: 3"),
                        ({"since": 3}, "faults: none$")):
                    with self.subTest(kwargs), self.assertRaisesRegex(TimeoutError, text):
                        interface.wait_for("delay", 0.01, **kwargs)
            with interface.handler("error", inject=True):
                self.assertEqual(interface.count(), 0)
            self.assertEqual(interface.count(), 3)
            for kwargs, text in (({"name": "nope"}, "unknown handler 'nope'"),
                                 ({"match": "("}, r"match must be a regular expression, not '\(")):
                with self.subTest(kwargs), self.assertRaisesRegex(ValueError, text):
                    interface.count(**kwargs)
                with self.assertRaisesRegex(ValueError, text):
                    interface.wait_for(**kwargs)

    def test_wait_for_ends_when_the_last_of_several_faults_comes(self):
        for interface, _ in self.each():
            with interface.handler("delay", sleep=0.001), ThreadedCall(
                    interface.wait_for, "delay", TIMEOUT, times=3) as call:
                for _ in range(3):
                    self.assertTrue(call.thread.is_alive())
                    self.ask(interface)
                self.assertEqual(call.result().number, 3)

    def test_wait_for_in_a_block_means_this_block(self):
        for interface, _ in self.each():
            with interface.handler("delay", sleep=0.001):
                self.ask(interface)
                interface.wait_for("delay", TIMEOUT)
            self.assertEqual(interface.wait_for("delay").number, 1)
            block = interface.handler("delay", sleep=0.001)
            self.assertEqual(block.count, 0)
            with block as fault:
                for wait in fault.wait, functools.partial(interface.wait_for, "delay"):
                    with self.assertRaisesRegex(TimeoutError, "delay has not acted"):
                        wait(timeout=0)
                self.ask(interface)
                self.assertEqual(interface.wait_for("delay", TIMEOUT).number, 2)
            self.assertEqual(fault.count, 1)
            interface.reset()
            with self.assertRaises(TimeoutError):
                interface.wait_for("delay", timeout=0)

    def test_blocks_add_up_except_dummy_and_with_handler(self):
        for interface, _ in self.each():
            with interface.handler("delay", sleep=0.3), interface.handler("hang", percent=20):
                self.assertEqual(interface.describe(),
                                 "100:delay sleep=0.3; 20:hang, 80:dummy")
                with interface.handler("dummy"):
                    self.assertEqual(interface.describe(), "100:dummy")
                with interface.with_handler("abort"):
                    self.assertEqual(interface.get_handler(), "abort")
                self.assertEqual(interface.get_handler(), "delay,hang")
            self.assertEqual(interface.get_handler(), "dummy")

    def test_both_handlers_of_nested_blocks_act(self):
        with running_proxy(echo) as proxy:
            with proxy.handler("delay", sleep=0.001) as outer, \
                    proxy.handler("latency", latency=1) as inner:
                self.assertTrue(self.ask(proxy))
                self.assertEqual((outer.wait(TIMEOUT).handler, inner.wait(TIMEOUT).handler),
                                 ("delay", "latency"))

    def test_a_proxy_that_does_not_run_says_so(self):
        proxy = vaurien.Proxy("127.0.0.1:9")
        for name, use in (
                ("port", lambda: proxy.port), ("handler", lambda: proxy.handler("delay")),
                ("toxic", lambda: proxy.toxic("latency")), ("reset", proxy.reset),
                ("set_backend", lambda: proxy.set_backend("127.0.0.1:10")),
                ("connections", proxy.connections), ("down", proxy.down().__enter__)):
            with self.subTest(name), self.assertRaisesRegex(
                    RuntimeError, r'not running; use "with" or start\(\)'):
                use()
        self.assertEqual(proxy.events(), [])
        self.assertIn("<Proxy vaurien not running -> 127.0.0.1:9: 100:dummy>", repr(proxy))
        proxy.stop()

    def test_start_and_stop(self):
        proxy = vaurien.Proxy("127.0.0.1:9", "127.0.0.1:0", enabled=False)
        for _ in range(2):
            self.assertIs(proxy.start(), proxy)
            with self.assertRaisesRegex(RuntimeError, "running already"):
                proxy.start()
            proxy.enable()
            self.assertIn(":%d ->" % proxy.port, repr(proxy))
            connect(proxy.port).close()
            port = proxy.port
            proxy.stop()
            with self.assertRaises(OSError):
                connect(port)

    def test_a_proxy_that_is_not_enabled_does_not_listen(self):
        with vaurien.Proxy("127.0.0.1:9", enabled=False) as proxy:
            self.assertIsNone(proxy._server.listener)
            with self.assertRaisesRegex(RuntimeError, "no port before it is enabled"):
                proxy.address()

    def test_clients_can_connect_to_the_address(self):
        for local, host in (("127.0.0.1:0", "127.0.0.1"), ("[::1]:0", "::1"), (":0", "localhost")):
            if host == "::1" and not has_ipv6():
                continue
            with self.subTest(local), vaurien.Proxy("127.0.0.1:9", local) as proxy:
                self.assertEqual(proxy.address(), (host, proxy.port))
                socket.create_connection(proxy.address()).close()

    def test_invalid_arguments_are_named(self):
        for arguments, message in (
                ({"distant": 6379}, "distant must be HOST:PORT or .host, port., .* not 6379"),
                ({"local": 8000}, "local must be HOST:PORT or"),
                ({"distant": "x"}, "distant must be HOST:PORT"),
                ({"behavior": 20}, "behavior must be PERCENT:HANDLER"),
                ({"behavior": [("delay", 20)]}, "behavior must be .* or .*percent, handler"),
                ({"behavior": {"dealy": 20}}, "behavior unknown handler 'dealy'"),
                ({"seed": "abc"}, "seed must be a whole number"),
                ({"timeout": 0}, "timeout must be a number of seconds"),
                ({"protocol": "nope"}, "protocol must be one of"),
                ({"options": {"delay": 1}}, "options must be {handler"),
                ({"toxics": ["latency"]}, "a toxic must be a dict like"),
                ({"toxics": [{"type": "latency", "latncy": 1}]}, "latncy is not an option"),
                ({"toxics": [{"type": "latency", "latency": "x"}]}, "latency must be a")):
            with self.subTest(arguments), self.assertRaisesRegex(ValueError, message):
                vaurien.Proxy(**dict({"distant": "127.0.0.1:9"}, **arguments))

    def test_forms_of_arguments(self):
        proxy = vaurien.Proxy(("127.0.0.1", "16379"), behavior={"delay": 20, "hang": 5},
                              toxics=[{"type": "latency", "attributes": {"latency": 200}},
                                      {"type": "abort", "toxicity": 0.5, "name": "cut"}])
        self.assertEqual(proxy.get_backend(), "127.0.0.1:16379")
        self.assertRegex(proxy.describe(), "^20:delay sleep=1.0, 5:hang, 75:dummy, "
                                           "toxic latency_downstream .*latency=200.*toxic cut ")

    def test_handlers_as_functions_and_dotted_paths(self):
        def stutter_function(state, t, to, data):
            yield t, to, data

        self.write("mine_api.py", "def stutter(state, t, to, data):\n    yield t, to, data\n")
        self.addCleanup(HANDLERS.pop, "stutter_function")
        self.addCleanup(HANDLERS.pop, "mine_api.stutter")
        with vaurien.Proxy("127.0.0.1:9", behavior="100:mine_api.stutter") as proxy:
            self.assertEqual(proxy.get_handler(), "mine_api.stutter")
            with proxy.handler(stutter_function):
                self.assertEqual(proxy.get_handler(), "stutter_function")
            proxy.set_behavior([(20, stutter_function)])
            self.assertEqual(proxy.describe(), "20:stutter_function, 80:dummy")
            with self.assertRaisesRegex(ValueError, "is not a handler"):
                proxy.handler(20)

            def delay(state, t, to, data):
                yield t, to, data
            with self.assertRaisesRegex(ValueError, "give your handler another name"):
                proxy.handler(delay)

    def test_asyncio(self):
        async def scenario(port):
            async with vaurien.Proxy(("127.0.0.1", port), "127.0.0.1:0") as proxy:
                with proxy.handler("abort") as fault:
                    _, writer = await asyncio.open_connection(*proxy.address())
                    writer.write(b"question")
                    record = await proxy.wait_for_async("abort", TIMEOUT)
                    self.assertEqual(await fault.wait_async(TIMEOUT), record)
                    writer.close()

        loop = asyncio.new_event_loop()
        with backend_server(echo) as (port, _), contextlib.closing(loop):
            loop.run_until_complete(scenario(port))

    def test_events_is_a_copy(self):
        for interface, _ in self.each(behavior="100:abort"):
            self.ask(interface)
            interface.events().clear()
            self.assertEqual(len(interface.events()), 1)

    def test_public_names(self):
        self.assertLess(len(vaurien.__all__), 30)
        for name in vaurien.__all__:
            with self.subTest(name):
                self.assertTrue(hasattr(vaurien, name))
        for cls in vaurien.Proxy, vaurien.Client, vaurien.Fault:
            for name in dir(cls):
                if not name.startswith("_") and callable(getattr(cls, name)):
                    with self.subTest("%s.%s" % (cls.__name__, name)):
                        self.assertTrue(inspect.getdoc(getattr(cls, name)))
                        self.assertIn("return", getattr(cls, name).__annotations__)

    TYPED = """
        import asyncio
        from typing import Any, Dict, List
        import vaurien

        @vaurien.handler
        def lose(state: Any, t: float, to: str, data: bytes) -> Any:
            yield t, to, data

        def scenario(proxy: vaurien.Proxy, client: vaurien.Client) -> int:
            with proxy.handler("delay", sleep=2) as fault, client.toxic("latency", latency=2):
                record: vaurien.FaultRecord = fault.wait(1)
                client.set_behavior({"delay": 20})
                number: int = record.number
            with proxy.down(), proxy.handler(lose):
                records: List[vaurien.FaultRecord] = proxy.events(since=number)
                connections: List[Dict[str, Any]] = client.connections()
            return len(records) + len(connections) + proxy.port

        async def main() -> None:
            async with vaurien.Proxy(("localhost", 6379), behavior=[(20, "delay")]) as proxy:
                await proxy.wait_for_async("delay", timeout=1)

        with vaurien.Proxy("localhost:6379", toxics=[{"type": "latency"}]) as proxy:
            scenario(proxy, vaurien.Client(proxy="a"))
        pid = vaurien.start_proxy(proxy_port=0)
        print(pid.port)
        vaurien.stop_proxy(pid)
    """

    def check_with_mypy(self):
        """Check that `mypy --strict` accepts a test with public names. `.ci/run` calls this."""
        import mypy.api
        self.write("typed.py", textwrap.dedent(self.TYPED))
        copy_module("vaurien.py")
        output, errors, status = mypy.api.run(
            ["--strict", "--follow-imports=silent", "--no-incremental", "typed.py"])
        self.assertEqual((status, errors), (0, ""), output)

    if importlib.util.find_spec("mypy"):
        test_mypy_strict_accepts_a_test_with_public_names = check_with_mypy


class TestReplay(TempDirTestCase):
    """A run writes its faults, and another one makes the same faults again."""

    @unittest.skipUnless(os.path.exists("/dev/full"), "no device that is always full")
    def test_a_recording_that_cannot_be_written_is_logged_once(self):
        with backend_server(echo) as (port, _), self.assertLogs("vaurien", "ERROR") as logs:
            with vaurien.Proxy(("127.0.0.1", port), record="/dev/full") as proxy:
                for _ in range(2):
                    with proxy.handler("delay", sleep=0.001), connected_client(proxy) as sock:
                        send_and_read(sock, b"question")
        self.assertEqual(len(logs.output), 1)
        self.assertIn("cannot record to /dev/full: ", logs.output[0])

    CLIENTS, REQUESTS = 30, 8
    BEHAVIOR = [{"name": "delay", "percent": 20, "sleep": 0.001},
                {"name": "error", "percent": 15},
                {"name": "delay", "percent": 15, "sleep": 0.002, "match": "PING"},
                {"name": "transient", "percent": 10, "agitate": 5, "after": 50, "times": 10}]
    TOXICS = [{"type": "latency", "name": "slow", "latency": 1, "percent": 30},
              {"type": "delay", "name": "late", "sleep": 0.001, "percent": 30, "before": False,
               "per": "request"}]

    @staticmethod
    def serve_redis(sock):
        with contextlib.suppress(OSError), sock.makefile("rb") as file:
            for _ in file:
                sock.sendall(b"+PONG\r\n")

    def converse(self, proxy):
        """Send the requests of all clients at the same time, with several texts."""
        barrier = threading.Barrier(self.CLIENTS)

        def run_client(index):
            barrier.wait(TIMEOUT)
            with connected_client(proxy) as sock, sock.makefile("rb") as file:
                for number in range(self.REQUESTS):
                    sock.sendall(b"PING %d\r\n" % index if (index + number) % 2 else b"GET x\r\n")
                    file.readline()

        threads = [threading.Thread(target=run_client, args=(index,))
                   for index in range(self.CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(TIMEOUT)

    def run_proxy(self, protocol, percents=None, **recording):
        """Run a proxy and its clients. Returns the result of count_faults.

        percents    that the rules get, in place of their own
        """
        with running_proxy(self.serve_redis, protocol=protocol, seed=5 if percents else 1,
                           **recording) as proxy:
            rules = [dict(rule) for rule in self.BEHAVIOR if protocol == "redis"
                     or rule["name"] == "delay"]
            toxics = [dict(toxic) for toxic in self.TOXICS]
            for rule, percent in zip([*rules, *toxics], percents or ()):
                rule["percent"] = percent
            proxy._set_rules(rules)
            for toxic in toxics:
                proxy.add_toxic(**toxic)
            self.converse(proxy)
            return self.count_faults(proxy)

    @staticmethod
    def count_faults(proxy):
        """Return a Counter of the fields that a recorded and a replayed run have in common."""
        return Counter((record.connection, record.request, record.handler, record.toxic,
                        record.stream, json.dumps(record.options, sort_keys=True))
                       for record in proxy.events())

    def test_the_same_faults_with_concurrent_clients_and_other_percentages(self):
        for protocol in "redis", "tcp":
            made = self.run_proxy(protocol, record="run.jsonl")
            self.assertGreater(len(made), 100)
            self.assertEqual(len(read_text("run.jsonl").splitlines()), sum(made.values()))
            for percents in [0] * 6, [100, 0, 0, 0, 100, 100], [1, 2, 3, 4, 5, 6]:
                with self.subTest(protocol, percents=percents):
                    replayed = self.run_proxy(protocol, percents, replay="run.jsonl",
                                              record="again.jsonl")
                    self.assertEqual((made - replayed, replayed - made), ({}, {}))
            self.assertEqual(self.run_proxy(protocol, [0] * 6, replay="again.jsonl"), made)

    def test_blocks_begin_and_end_as_in_the_recorded_run(self):
        for number, recording in enumerate(({"record": "run.jsonl"}, {"replay": "run.jsonl"})):
            with running_proxy(echo, **recording) as proxy, connected_client(proxy) as sock:
                send_and_read(sock, b"question")
                with proxy.handler("hang", percent=100 if number == 0 else 1) as fault:
                    sock.sendall(b"question")
                    fault.wait(TIMEOUT)
                read_exactly(sock, 8)
                with proxy.handler("delay", sleep=0.001, match="second"):
                    send_and_read(sock, b"second")
                self.assertEqual([(record.request, record.handler) for record in proxy.events()],
                                 [(2, "hang"), (3, "delay")])

    def test_a_toxic_acts_on_its_connections_whatever_its_toxicity_becomes(self):
        for recording, toxicities in (({"record": "run.jsonl"}, (1, 1)),
                                      ({"replay": "run.jsonl"}, (0, 0.5))):
            with running_proxy(echo, **recording) as proxy:
                first, second = (
                    vaurien.Toxic("latency", "slow", toxicity, {"latency": 20})
                    for toxicity in toxicities)
                proxy.loop.run_sync(proxy.set_toxics, [first])
                with connected_client(proxy) as sock:
                    send_and_read(sock, b"question")
                    proxy.loop.run_sync(proxy.set_toxics, [second])
                    began = time.monotonic()
                    send_and_read(sock, b"question")
                    self.assertGreaterEqual(time.monotonic() - began, 0.02)
                self.assertEqual(len(proxy.events()), 1)
                if "record" in recording:
                    proxy.loop.run_sync(proxy.set_toxics, [])
                with connected_client(proxy) as sock:       # has no fault in either run
                    send_and_read(sock, b"question")
                self.assertEqual(len(proxy.events()), 1)

    def test_a_proxy_without_rules_uses_those_of_the_file(self):
        made = self.run_proxy("redis", record="run.jsonl")
        with backend_server(self.serve_redis) as (port, _):
            proxy = OpenProxy("127.0.0.1:%d" % port, "127.0.0.1:0", protocol="redis",
                              replay="run.jsonl")
            proxy.use_rules_of(proxy._proxies.replay)
            with proxy:
                self.converse(proxy)
                replayed = self.count_faults(proxy)
        self.assertEqual((made - replayed, replayed - made), ({}, {}))

    def test_the_command_line_uses_the_rules_of_the_file_if_there_is_no_api(self):
        self.run_proxy("tcp", [100] + [0] * 5, record="run.jsonl")
        for options, rules in (([], "0:delay sleep=0.001, 100:dummy"), (["--http"], "100:dummy"),
                               (["--behavior", "5:hang"], "5:hang, 95:dummy")):
            with self.subTest(options), mock.patch.object(vaurien, "start_log"), \
                    mock.patch.object(vaurien, "serve") as serve:
                vaurien.proxy_command(["--replay", "run.jsonl", *options])()
                (proxies, *_), _ = serve.call_args[0]
                self.assertEqual(proxies["vaurien"].describe(), rules)

    def test_rules_that_are_set_stay(self):
        self.run_proxy("redis", record="run.jsonl")
        replay = vaurien.Replay("run.jsonl")
        proxy = vaurien.ProxyServer(("127.0.0.1", 1), behavior="20:hang")
        proxy.use_rules_of(replay)
        self.assertEqual(proxy.describe(), "20:hang, 80:dummy")
        proxy = vaurien.ProxyServer(("127.0.0.1", 1), protocol="tcp")
        replay = vaurien.Replay(self.write("bad.jsonl", read_text("run.jsonl").replace(
            '"sleep": 0.001', '"slep": 0.001')))
        with self.assertRaisesRegex(ValueError, "^a rule of bad.jsonl is not valid here: .*slep"):
            proxy.use_rules_of(replay)

    def test_faults_that_are_not_made_again_are_in_the_log(self):
        with running_proxy(echo, "100:delay", record="run.jsonl",
                           options={"delay": {"sleep": 0.001}}) as proxy:
            with connected_client(proxy) as sock:
                send_and_read(sock, b"question")
                send_and_read(sock, b"question")
        for behavior, sleep, level, text in (
                ("0:delay", 0.001, "INFO", "replay: 2 of 2 faults were made again"),
                ("100:delay", 0.002, "WARNING", "replay: 0 of 2 faults were made again; not on "
                                                "connection 1, request 1: delay")):
            with self.subTest(text), self.assertLogs("vaurien", "INFO") as logged:
                with running_proxy(echo, behavior, options={"delay": {"sleep": sleep}},
                                   replay="run.jsonl") as proxy, connected_client(proxy) as sock:
                    send_and_read(sock, b"question")
                    send_and_read(sock, b"question")
            self.assertEqual(logged.output[-1], "%s:vaurien:%s" % (level, text))
            self.assertEqual(logged.output[0], "INFO:vaurien:replay: 2 faults of run.jsonl")

    def test_a_proxy_that_starts_again_appends_to_its_recording(self):
        with backend_server(echo) as (port, _):
            proxy = vaurien.Proxy("127.0.0.1:%d" % port, behavior="100:delay",
                                  options={"delay": {"sleep": 0.001}},
                                  record=pathlib.Path("run.jsonl"))
            for count in (1, 2):
                with proxy:
                    with connected_client(proxy) as sock:
                        send_and_read(sock, b"question")
                lines = [json.loads(line) for line in read_text("run.jsonl").splitlines()]
                self.assertEqual([line["connection"] for line in lines], [1, 2][:count])

    def test_a_recording_is_opened_once(self):
        """A second attempt to start, after a port was in use, needs no second descriptor."""
        recorder = vaurien.Recorder("run.jsonl")
        recorder.open()
        thread = recorder.log_thread
        recorder.open()
        self.assertIs(recorder.log_thread, thread)
        recorder.close()
        recorder.close()

    def test_bad_files(self):
        with running_proxy(echo, "100:delay", record="run.jsonl",
                           options={"delay": {"sleep": 0.001}}) as proxy, \
                connected_client(proxy) as sock:
            send_and_read(sock, b"question")
        good = read_text("run.jsonl")
        for text, line in (("{}", 1), ("x", 1), ("", 0), ("\n", 1), (good + "[]\n", 2),
                           (good + good[:-20], 2), (good.replace('"rule"', '"rules"'), 1),
                           (good.replace('"connection": 1', '"connection": -1'), 1),
                           (good.replace('"proxy": "vaurien"', '"proxy": []'), 1),
                           ("[" * 100000, 1)):
            self.write("bad.jsonl", text)
            with self.subTest(text[:200]):
                if line:
                    with self.assertRaisesRegex(ValueError, "^line %d of bad.jsonl is not a fault "
                                                            "that --record has written$" % line):
                        vaurien.Proxy("localhost:1", replay="bad.jsonl")
                else:
                    self.assertEqual(vaurien.Replay("bad.jsonl").faults, {})
        with open("bad.jsonl", "wb") as file:
            file.write(b"\xff\xfe")
        for arguments, text in (
                ({"replay": "bad.jsonl"}, "bad.jsonl is not a file that --record has written"),
                ({"replay": "none"}, "cannot read none: No such file or directory"),
                ({"replay": "."}, "cannot read .: Is a directory"),
                ({"record": 5}, "record must be the path of a file, not 5"),
                ({"replay": ""}, "replay must be the path of a file, not ''"),
                ({"replay": "run.jsonl", "record": "run.jsonl"},
                 "record and replay need different files")):
            with self.subTest(arguments), self.assertRaisesRegex(ValueError, "^%s$" % text):
                vaurien.Proxy("localhost:1", **arguments)
        for _ in range(2):      # nothing is left open by the first attempt
            with self.assertRaisesRegex(OSError, "cannot record to none/x: No such file"):
                vaurien.Proxy("localhost:1", record="none/x").start()


class TestPytestPlugin(TempDirTestCase):
    """The plugin of pytest: a fixture, an option, and the faults of a test that fails."""

    TESTS = """
        import socket

        def ask(proxy):
            with socket.create_connection(proxy.address()) as sock:
                for _ in range(2):
                    sock.sendall(b"GET user:42")
                    assert sock.recv(100) == b"GET user:42"

        def test_fails(vaurien):
            proxy = vaurien("127.0.0.1:PORT", behavior="100:delay", name="cache",
                            options={"delay": {"sleep": 0.001}})
            unused = vaurien("127.0.0.1:PORT", seed=5)
            ask(proxy)
            proxy.wait_for("delay", times=2)
            with open("ports", "w") as file:
                file.write("%d %d" % (proxy.port, unused.port))
            assert proxy.count("delay", match="^GET") == 3

        def test_passes(vaurien):
            with open("ports") as file:
                for port in map(int, file.read().split()):
                    with socket.socket() as sock:
                        assert sock.connect_ex(("127.0.0.1", port)), "the proxy runs"
            with vaurien("127.0.0.1:PORT").handler("delay", sleep=0.001) as fault:
                assert not fault.count

        def test_has_no_proxy():
            assert False
    """

    def run_python(self, *argv, cwd=None):
        """Run Python in an empty environment. Returns (exit status, output)."""
        environment = dict(os.environ, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1", PYTHONPATH=self.copies)
        # Without the last one, pytest keeps the copy in the form into which it rewrites a plugin.
        for name in "PYTEST_ADDOPTS", "COLUMNS", "PYTHONDONTWRITEBYTECODE":
            environment.pop(name, None)
        process = subprocess.run([sys.executable, *argv], env=environment, cwd=cwd,
                                 stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                 universal_newlines=True, timeout=TIMEOUT)
        return process.returncode, process.stdout

    @classmethod
    def setUpClass(cls):
        cls.copies = tempfile.mkdtemp()
        for name in "vaurien.py", "shop/chaos.py":
            copy_module(os.path.join(cls.copies, name))

    @classmethod
    def tearDownClass(cls):
        shutil.rmtree(cls.copies)

    def run_pytest(self, module, *argv, tests=TESTS):
        """Run tests with pytest and the plugin, a copy with this name. Returns its output."""
        # A folder of its own: pytest keeps the bytecode of tests, and takes it again for a file
        # of the same second and size.
        folder = tempfile.mkdtemp(dir=self.folder)
        self.write(os.path.join(folder, "conftest.py"), "pytest_plugins = [%r]\n" % module)
        with backend_server(echo) as (port, _):
            self.write(os.path.join(folder, "test_it.py"),
                       textwrap.dedent(tests).replace("PORT", str(port)))
            return self.run_python("-m", "pytest", "-W", "error", "-p", "no:cacheprovider", *argv,
                                   cwd=folder)

    def check_reports(self):
        modes = {"vaurien": "rewrite", "shop.chaos": "plain"}   # of pytest, for assertions
        calls = {module: ThreadedCall(self.run_pytest, module, "--vaurien-seed=7",
                                      "--assert=" + mode).__enter__()
                 for module, mode in modes.items()}
        for module, call in calls.items():
            with self.subTest(module):
                status, output = call.result()
                self.assertEqual(status, 1, output)
                self.assertIn("2 failed, 1 passed", output)
                self.assertIn("\nvaurien: --vaurien-seed=7\n", output)
                self.assertEqual(len(re.findall("^-+ vaurien -+$", output, re.MULTILINE)), 1)
                output = re.sub(r"127\.0\.0\.1:\d+", "BACKEND", output)
                for line in ("cache -> BACKEND: 100:delay sleep=0.001; seed 7; faults: 2",
                             "  1. delay sleep=0.001: connection 1, request 1, GET user:42",
                             "  2. delay sleep=0.001: connection 1, request 2, GET user:42",
                             "vaurien -> BACKEND: 100:dummy; seed 5; faults: 0"):
                    self.assertIn("\n%s\n" % line, output)

    def check_seeds(self):
        test = "def test_it(vaurien):\n    print(vaurien('localhost:1').seed)"
        with ThreadedCall(self.run_pytest, "vaurien", "--vaurien-seed=x") as bad_call:
            _, output = self.run_pytest("vaurien", "-s", tests=test)
        shown, used = re.search(r"--vaurien-seed=(\d+)\n(?:.*\n)*.*?(\d+)\n\.", output).groups()
        self.assertEqual(shown, used)
        status, output = bad_call.result()
        self.assertEqual((status, output.strip()), (4, "ERROR: --vaurien-seed must be a whole "
                                                       "number, 0 or more, not 'x'"))

    if importlib.util.find_spec("pytest"):
        test_a_test_that_fails_reports_its_faults = check_reports
        test_the_seed_is_shown_and_checked = check_seeds

    def test_importing_the_module_does_not_import_pytest(self):
        program = "import sys, vaurien; print('pytest' in sys.modules)"
        self.assertEqual(self.run_python("-W", "error", "-c", program), (0, "False\n"))

    def test_a_report_shows_the_newest_records(self):
        with running_proxy(echo, name="a", seed=1) as proxy:
            slow, delay = vaurien.Toxic("latency", "slow").rule, vaurien.Rule("delay")
            for number in range(5):
                proxy.add_record(slow, {"latency": 1, "jitter": 0}, 1, "a:1", number, text="GET x")
            proxy.add_record(delay, {"sleep": 1.0}, change="ends")
            with mock.patch.object(vaurien, "RECORDS_REPORTED", 2):
                lines = vaurien.report_faults(proxy).split("\n")
        self.assertEqual(lines[1:], [
            "  ... the last 2 of 6 records:",
            "  5. latency latency=1 jitter=0 toxic=slow stream=downstream: connection 1, "
            "request 4, GET x",
            "  6. delay sleep=1.0: the window ends"])
        self.assertRegex(lines[0], "^a -> 127.0.0.1:.*: 100:dummy; seed 1; faults: 5$")


class TestStartProxy(TempDirTestCase):
    """start_proxy() and stop_proxy(): a proxy in a process of its own."""

    def start(self, **options):
        """Start a proxy; return its pid, its port and a Client of its control server."""
        proxy_port, http_port = unused_port(), unused_port()
        pid = vaurien.start_proxy(proxy_port=proxy_port, http_port=http_port, log_output="v.log",
                                  warmup=TIMEOUT, **options)
        self.addCleanup(lambda: pid in vaurien.STARTED_PROCESSES and vaurien.stop_proxy(pid))
        return pid, proxy_port, vaurien.Client(port=http_port)

    def check_start_fails(self, message, **options):
        """Check that start_proxy with these options raises RuntimeError.

        message    a regular expression that matches the text of the exception
        """
        with mock.patch.object(subprocess, "Popen", quiet_popen), \
                self.assertRaisesRegex(RuntimeError, message):
            vaurien.start_proxy(warmup=TIMEOUT, **options)

    def connect_fails(self, port):
        """Try to connect to a port, and return whether this fails."""
        try:
            connect(port).close()
        except OSError:
            return True
        return False

    def has_control(self, port):
        """Return whether a control server responds on this port."""
        try:
            vaurien.Client("127.0.0.1", port).get_handler()
        except OSError:
            return False
        return True

    def test_both_ports_are_open_when_start_proxy_returns(self):
        with backend_server(echo) as (port, backend_results):
            pid, proxy_port, client = self.start(host="127.0.0.1", port=port)
            self.assertEqual(client.get_handler(), "dummy")
            # start_proxy has not connected to the backend.
            self.assertEqual(backend_results, [])
            with contextlib.closing(connect(proxy_port)) as sock:
                send_and_read(sock, b"question")
                with client.with_handler("blackout"):
                    sock.sendall(b"question")
                    read_until_close(sock)
            vaurien.stop_proxy(pid)
            with self.assertRaises(OSError):
                connect(proxy_port)

    def test_ports_that_were_picked_are_told(self):
        with backend_server(echo) as (port, _):
            pid = vaurien.start_proxy(port=port, proxy_port=0, http_port=0, log_output="v.log",
                                      warmup=TIMEOUT)
            self.addCleanup(vaurien.stop_proxy, pid)
            self.assertEqual(vaurien.Client(port=pid.http_port).address()[1], pid.port)
            with contextlib.closing(connect(pid.port)) as sock:
                send_and_read(sock, b"question")

    def test_backend_host_and_port_are_synonyms_and_options_are_arguments(self):
        with backend_server(echo) as (port, _):
            _, _, client = self.start(backend_host="127.0.0.1", backend_port=port,
                                      options=["--behavior", "20:delay", "--seed", "3"])
            self.assertEqual(client.get_backend(), "127.0.0.1:%d" % port)
            self.assertEqual(client.get_handler(), "delay")

    def test_an_exception_says_why_a_proxy_did_not_start(self):
        with contextlib.closing(listening_socket()) as listener:
            port = listener.getsockname()[1]
            self.check_start_fails(
                "did not start: cannot listen on 127.0.0.1:%d: Address" % port,
                proxy_port=port, http=False)
        self.check_start_fails(
            "did not start: --behavior names the unknown handler 'nope'",
            proxy_port=0, http=False, options=["--behavior", "1:nope"])
        self.check_start_fails(
            "did not start: --protocol must be one of tcp, http",
            protocol="nope")
        self.assertEqual(vaurien.STARTED_PROCESSES, {})

    def test_stop_proxy_refuses_an_unknown_pid(self):
        with self.assertRaisesRegex(ValueError, "no proxy was started as process 1"):
            vaurien.stop_proxy(1)

    def test_the_proxy_ends_when_its_parent_is_killed(self):
        port = unused_port()
        program = textwrap.dedent("""
            import sys
            sys.path.insert(0, %r)
            import vaurien
            vaurien.start_proxy(proxy_port=%d, http=False, log_output='v.log', warmup=%d)
            print('up', flush=True)
            input()
            """) % (HERE, port, TIMEOUT)
        parent = subprocess.Popen([sys.executable, "-c", program],
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        with parent:
            self.assertEqual(parent.stdout.readline().strip(), b"up")
            connect(port).close()
            parent.kill()
        wait_until(lambda: self.connect_fails(port))

    @unittest.skipUnless(hasattr(os, "fork"), "no fork here")
    def test_the_proxy_ends_when_its_parent_is_killed_but_a_fork_lives_on(self):
        port = unused_port()
        program = textwrap.dedent("""
            import os, sys, warnings
            # Python 3.12 warns of fork() while threads run. The thread that has read the
            # proxy's output may just be ending.
            warnings.simplefilter("ignore", DeprecationWarning)
            sys.path.insert(0, %r)
            import vaurien
            vaurien.start_proxy(proxy_port=%d, http=False, log_output='v.log', warmup=%d)
            child_pid = os.fork()
            if child_pid:
                print(child_pid, flush=True)
            sys.stdin.read()
            """) % (HERE, port, TIMEOUT)
        parent = subprocess.Popen([sys.executable, "-c", program],
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        with parent:
            child_pid = int(parent.stdout.readline())
            self.addCleanup(os.kill, child_pid, signal.SIGKILL)
            connect(port).close()
            parent.kill()
            wait_until(lambda: self.connect_fails(port))

    def test_a_handler_that_prints_much_does_not_block(self):
        self.write("prints.py", textwrap.dedent("""
            def print_much(state, t, to, data):
                print("x" * 10000)
                yield t, to, data
            """))
        with backend_server(echo) as (port, _), \
                mock.patch.object(subprocess, "Popen", quiet_popen):
            _, proxy_port, _ = self.start(port=port,
                                          options=["--behavior", "100:prints.print_much"])
            with contextlib.closing(connect(proxy_port)) as sock:
                for _ in range(30):
                    send_and_read(sock, b"question")

    VENDORED_HANDLERS = """
        from vaurien import EOF
        from pack.chaos.handlers import BaseHandler

        class Super(BaseHandler):
            name = "super"

            def __call__(self, client_sock, backend_sock, to_backend):
                data = self._get_data(client_sock, backend_sock, to_backend)
                (backend_sock if to_backend else client_sock).sendall(data.upper())

        def late_end(state, t, to, data):
            if data is EOF:
                yield t, to, b"the end"
            yield t, to, data
    """

    def test_handlers_import_a_vendored_copy_under_both_names(self):
        """Handlers import the copy pack/chaos.py as `vaurien` and as `pack.chaos`.

        pack/logging.py must not replace the standard module `logging`.
        """
        os.makedirs("pack")
        copy_module("pack/chaos.py")
        self.write("pack/__init__.py", "")
        self.write("pack/logging.py", "")
        self.write("pack/mine.py", textwrap.dedent(self.VENDORED_HANDLERS))
        program = textwrap.dedent("""
            from pack import chaos
            pid = chaos.start_proxy(port=%d, proxy_port=%d, http_port=%d, log_output="v.log",
                                    warmup=%d, options=["--behavior", "100:pack.mine.%s"])
            input()
            """)
        for name, reply in ("Super", b"QUESTION"), ("late_end", b"question"):
            with self.subTest(name), backend_server(echo) as (port, _):
                proxy_port, http_port = unused_port(), unused_port()
                source = program % (port, proxy_port, http_port, TIMEOUT, name)
                with subprocess.Popen([sys.executable, "-c", source],
                                      stdin=subprocess.PIPE) as parent:
                    wait_until(lambda: self.has_control(http_port))
                    with contextlib.closing(connect(proxy_port)) as sock:
                        sock.sendall(b"question")
                        self.assertEqual(read_exactly(sock, 8), reply)
                        if name == "late_end":
                            sock.shutdown(socket.SHUT_WR)
                            ends = b"the end" * 2       # one for each direction
                            self.assertEqual(read_exactly(sock, len(ends)), ends)
                    parent.kill()

    def test_a_copy_in_a_package_within_a_package(self):
        os.makedirs("pack/age")
        copy_module("pack/age/chaos.py")
        for folder in "pack", "pack/age":
            self.write(folder + "/__init__.py", "")
        proxy_port, http_port = unused_port(), unused_port()
        program = textwrap.dedent("""
            from pack.age.chaos.handlers import BaseHandler
            from pack.age import chaos
            assert BaseHandler is chaos.BaseHandler
            pid = chaos.start_proxy(proxy_port=%d, http_port=%d, log_output="v.log", warmup=%d)
            print(chaos.Client(port=%d).get_handler())
            chaos.stop_proxy(pid)
            """) % (proxy_port, http_port, TIMEOUT, http_port)
        out = subprocess.check_output([sys.executable, "-c", program])
        self.assertEqual(out.strip(), b"dummy")


# -- Command line, demo and vaurienctl ------------------------------------------


class TestSettings(TempDirTestCase):
    """Proxies as the command line and the files configure them; no socket is opened."""

    def proxies(self, *argv):
        """Return the proxies that these arguments configure."""
        settings = vaurien.read_arguments(list(argv), vaurien.SETTINGS)
        return list(vaurien.make_proxies(settings).values())

    def proxy(self, *argv):
        """Return the only proxy that these arguments configure."""
        proxy, = self.proxies(*argv)
        return proxy

    def options(self, *argv):
        """Return the options of each rule of the only proxy."""
        return [rule.options for rule in self.proxy(*argv).rules.installed]

    def test_defaults(self):
        proxy = self.proxy()
        self.assertEqual((proxy.local, proxy.backend, proxy.rules.installed, proxy.timeout),
                         (("localhost", 8000), ("localhost", 80), [], 30.0))

    def test_local_is_a_synonym_of_proxy_and_distant_of_backend(self):
        for argv in (["--local", "localhost:1", "--distant", "google.com:2"],
                     ["--proxy", "localhost:1", "--backend=google.com:2"]):
            with self.subTest(argv):
                proxy = self.proxy(*argv)
                self.assertEqual((proxy.local, proxy.backend),
                                 (("localhost", 1), ("google.com", 2)))

    def test_spellings_of_a_handler_option(self):
        for argv in (["--handlers.delay.sleep", "2"],
                     ["--handlers.delay.sleep=2"],
                     ["--behavior-delay-sleep", "2"],
                     ["--behavior-delay-sleep=2"]):
            with self.subTest(argv):
                self.assertEqual(self.options("--behavior", "20:delay", *argv),
                                 [{"sleep": 2.0, "before": True}])

    def test_spellings_of_yes_and_no(self):
        for text, value in (("yes", True), ("no", False), ("TRUE", True), ("off", False),
                            ("0", False)):
            with self.subTest(text):
                self.assertEqual(
                    self.options("--behavior", "20:delay", "--handlers.delay.before", text),
                    [{"sleep": 1.0, "before": value}])

    def test_documented_ini_file(self):
        proxy = self.proxy("--config", self.write("v.ini", INI))
        self.assertEqual((proxy.local, proxy.backend), (("localhost", 8000), ("google.com", 80)))
        self.assertEqual(proxy.describe(), "20:delay sleep=2.0, 80:dummy")

    def test_alternative_spellings_in_an_ini_file(self):
        proxy = self.proxy("--config", self.write("v.ini", textwrap.dedent("""
            [vaurien]
            backend: [::1]:80
            proxy = :0
            behavior = 20:delay,
                       5:error
            seed = 7
            timeout = 1.5
            log_level = debug
            [behavior:delay]
            sleep = 2
            before = no
            """)))
        self.assertEqual((proxy.local, proxy.backend, proxy.seed, proxy.timeout),
                         (("", 0), ("::1", 80), 7, 1.5))
        self.assertEqual(proxy.describe(),
                         "20:delay sleep=2.0 before=no, 5:error warmup=0, 75:dummy")

    def test_arguments_override_the_file_and_the_file_overrides_the_defaults(self):
        path = self.write("v.ini", INI)
        proxy = self.proxy("--config", path, "--distant", "example.org:81",
                           "--behavior", "5:delay", "--handlers.delay.sleep", "3")
        self.assertEqual((proxy.local, proxy.backend), (("localhost", 8000), ("example.org", 81)))
        self.assertEqual(proxy.describe(), "5:delay sleep=3.0, 95:dummy")

    def test_each_proxy_has_its_own_accept(self):
        self.assertEqual(self.proxy("--accept", "drop ttl=1m").accept.to_text(), "drop ttl=60")
        path = self.write("v.ini", "[proxy:a]\naccept = refuse\n[proxy:b]\nlocal = localhost:1")
        self.assertEqual([proxy.accept.mode for proxy in self.proxies("--config", path)],
                         ["refuse", "normal"])
        path = self.write("v.json", json.dumps([{"name": "a", "upstream": "b:1",
                                                 "accept": "refuse"}]))
        self.assertEqual(self.proxy("--config", path).accept.to_text(), "refuse")

    @unittest.skipUnless(vaurien.LINUX, "not on this system")
    def test_the_proxies_of_a_process_share_their_ports_with_the_same_number(self):
        self.write("v.ini", "[vaurien]\nreuse-port = 2\n[proxy:a]\nlocal = :1\n"
                            "[proxy:b]\nlocal = :2\nreuse-port = 3")
        for argv, numbers in ([], [2, 3]), (["--reuse-port", "4"], [4, 4]):
            proxies = self.proxies("--config", "v.ini", *argv)
            self.assertEqual([proxy.reuse_port for proxy in proxies], numbers)

    def test_each_proxy_has_its_own_max_connections(self):
        self.assertEqual(self.proxy("--max-connections", "5").max_connections, 5)
        path = self.write("v.ini", "[proxy:a]\nmax-connections = 2\n"
                                   "[proxy:b]\nlocal = localhost:1")
        self.assertEqual([proxy.max_connections for proxy in self.proxies("--config", path)],
                         [2, 0])
        path = self.write("v.json", json.dumps([{"name": "a", "upstream": "b:1",
                                                 "max_connections": 3}]))
        self.assertEqual(self.proxy("--config", path).max_connections, 3)

    def test_environment_variables_are_expanded_in_a_file(self):
        path = self.write("v.ini", "[vaurien]\ndistant = ${BACKEND_HOST}:${BACKEND_PORT}\n")
        with mock.patch.dict(os.environ, BACKEND_HOST="example.org", BACKEND_PORT="81"):
            self.assertEqual(self.proxy("--config", path).backend, ("example.org", 81))

    def test_several_proxies_in_one_file(self):
        path = self.write("v.ini", textwrap.dedent("""
            [vaurien]
            seed = 5
            behavior = 10:hang
            [proxy:redis]
            local = localhost:1
            distant = localhost:6379
            behavior = 20:delay
            [proxy:sql]
            proxy = localhost:2
            backend = localhost:3306
            timeout = 3
            """))
        redis, sql = self.proxies("--config", path)
        self.assertEqual((redis.name, redis.local, redis.backend, redis.describe(), redis.seed),
                         ("redis", ("localhost", 1), ("localhost", 6379),
                          "20:delay sleep=1.0, 80:dummy", 5))
        self.assertEqual((sql.name, sql.local, sql.describe(), sql.timeout, sql.seed),
                         ("sql", ("localhost", 2), "10:hang, 90:dummy", 3.0, 5))
        proxies = self.proxies("--config", path, "--behavior", "1:error")
        self.assertEqual({proxy.describe() for proxy in proxies}, {"1:error warmup=0, 99:dummy"})
        with self.assertRaisesRegex(ValueError, "--local and --distant are ambiguous: the file "
                                                "has the proxies redis, sql"):
            self.proxies("--config", path, "--local", "localhost:3")

    def test_protocol_settings(self):
        path = self.write("v.ini", (
            "[vaurien]\n"
            "protocol = http\n"
            "protocol_http_overwrite_host_header = no\n"))
        proxy = self.proxy("--config", path)
        self.assertEqual((proxy.protocol, proxy.overwrite_host_header), (vaurien.Http, False))
        argv = ["--protocol", "redis", "--behavior", "5:error", "--handlers.error.kind"]
        proxy = self.proxy(*argv, "OOM")
        self.assertEqual((proxy.protocol, proxy.describe()),
                         (vaurien.Redis, "5:error warmup=0 kind=OOM, 95:dummy"))
        with self.assertRaisesRegex(ValueError, "kind must be one of LOADING"):
            self.proxy(*argv, "1213")

    def test_a_protocol_has_the_names_of_its_servers_too(self):
        for alias, class_ in (("memcached", vaurien.Memcache), ("postgresql", vaurien.Postgres),
                              ("mariadb", vaurien.Mysql)):
            with self.subTest(alias):
                self.assertIs(self.proxy("--protocol", alias).protocol, class_)

    def test_fields_of_a_rule_are_set_beside_the_options_of_its_handler(self):
        path = self.write("v.ini", (
            "[vaurien]\n"
            "behavior = 20:error,5:delay\n"
            "[handler:error]\n"
            "match = ^SELECT .* FROM carts\n"
            "times = 3\n"))
        error, delay = self.proxy("--config", path, "--handlers.delay.after", "2",
                                  "--behavior-delay-per=connection").rules.installed
        self.assertEqual((error.match.pattern, error.times, error.after),
                         (b"^SELECT .* FROM carts", 3, 0))
        self.assertEqual((delay.match, delay.after, delay.per), (None, 2, "connection"))
        self.assertEqual(delay.draw_max - delay.draw_min, 5)
        for argv in (["--handlers.error.match", "("],
                     ["--handlers.error.times=-1"],
                     ["--handlers.error.per", "chunk"]):
            with self.subTest(argv), self.assertRaisesRegex(
                    ValueError, "^--handlers.error.(match|times|per) must be"):
                self.proxy("--behavior", "1:error", *argv)
        with self.assertRaisesRegex(
                ValueError, "--handlers.error.percent is set in the behavior, like 20:error"):
            self.proxy("--handlers.error.percent", "5")

    def test_faults_with_draws_of_their_own(self):
        for fault, description in [
                ("hang", "hang (100:both hang"),
                ("latency.latency=100", "latency (100:both latency latency=100 jitter=0"),
                ("latency.latency=100 jitter=5 percent=20",
                 "latency (20:both latency latency=100 jitter=5"),
                ("error.percent=20", "error (20:both error warmup=0"),
                ("hang name=stuck toxicity=0.5", "stuck (50:both hang"),
                ("hang 'name=a b' \"match=^GET /cart\" stream=downstream times=3 of=5",
                 "a b (100:downstream hang match='^GET /cart' times=3 of=5"),
                ("  error   start=5s duration=3 every=1m ramp=1 ttl=1h  ",
                 "error (100:both error warmup=0 start=5.0 duration=3.0 every=60.0 ramp=1.0 "
                 "ttl=3600.0"),
                ("test_vaurien.stall.after=2",
                 "test_vaurien.stall (100:both test_vaurien.stall after=2")]:
            with self.subTest(fault), mock.patch.dict(HANDLERS):
                text = "100:dummy, toxic %s)" % description
                for argv in ["--fault", fault], [
                        "--config", self.write("v.ini", "[vaurien]\nfault = %s\n" % fault)]:
                    rule, = self.proxy(*argv).rules.installed
                    self.assertEqual(rule.per, "request")
                    self.assertEqual(self.proxy(*argv).describe().replace(" per=request", ""),
                                     text)

    def test_faults_add_up(self):
        file = self.write("v.ini", "[vaurien]\nbehavior = 20:error\n"
                                   "fault = latency\n    # faster\n\n    bandwidth.rate=100\n")
        for argv, names in [
                (["--fault", "latency", "--fault=latency", "--fault", "latency name=x",
                  "--fault", "hang"], ["latency", "latency_2", "x", "hang"]),
                (["--config", file], [None, "latency", "bandwidth"]),
                (["--config", file, "--fault", "hang"], [None, "hang"])]:
            with self.subTest(argv):
                rules = self.proxy(*argv).rules.installed
                self.assertEqual([rule.toxic for rule in rules], names)
                self.assertEqual(len({rule.draw_key for rule in rules}), len(rules))
        path = self.write("w.ini", "[vaurien]\nfault = hang\n[proxy:a]\nlocal = :1\n"
                                   "[proxy:b]\nlocal = :2\nfault = latency\n")
        for argv, names in ([], [["hang"], ["latency"]]), (["--fault", "error"], [["error"]] * 2):
            proxies = self.proxies("--config", path, *argv)
            self.assertEqual([[rule.name for rule in proxy.rules.installed] for proxy in proxies],
                             names)
        self.assertIsNot(proxies[0].rules.installed[0], proxies[1].rules.installed[0])

    def test_a_network_acts_beside_behavior_and_faults(self):
        file = self.write("v.ini", "[vaurien]\nnetwork = dsl\n")
        for argv, names in [
                (["--network", "3g"], [(None, "3g")]),
                (["--network", "3g", "--behavior", "5:error", "--fault", "hang"],
                 [("error", None), (None, "3g"), ("hang", None)]),
                (["--config", file], [(None, "dsl")]),
                (["--config", file, "--network", "lte"], [(None, "lte")])]:
            with self.subTest(argv):
                rules = self.proxy(*argv).rules.installed
                self.assertEqual(
                    [(None if rule.name == "network" else rule.name, rule.options.get("profile"))
                     for rule in rules], names)
                network, = (rule for rule in rules if rule.name == "network")
                self.assertEqual((network.toxic, network.per, network.stream),
                                 ("network", "connection", "both"))
        path = self.write("w.ini", "[vaurien]\nnetwork = 3g\n[proxy:a]\nlocal = :1\n"
                                   "[proxy:b]\nlocal = :2\nnetwork = wifi\n")
        self.assertEqual([proxy.toxics[0].attributes["profile"]
                          for proxy in self.proxies("--config", path)], ["3g", "wifi"])

    def test_faults_act_together(self):
        config = vaurien.read_arguments(["--fault", "latency.latency=100",
                                         "--fault", "slicer.average_size=1"], vaurien.SETTINGS)
        chain = vaurien.Chain(vaurien.make_proxies(config)["vaurien"].rules, 1)
        chain.begin_request()
        events = chain.process(0, UPSTREAM, b"ab")
        self.assertEqual([event[:3] for event in events],
                         [(0.1, UPSTREAM, b"a"), (0.1, UPSTREAM, b"b")])

    def test_toxics_in_a_file(self):
        path = self.write("v.ini", textwrap.dedent("""
            [toxic:slow]
            type = latency
            stream = upstream
            latency = 200
            toxicity = 0.5
            [toxic:lost]
            type = hang
            match = ^SELECT .* FROM carts
            percent = 20
            per = request
            times = 3
            """))
        proxy = self.proxy("--config", path)
        self.assertEqual(proxy.describe(), (
            "100:dummy, "
            "toxic slow (50:upstream latency latency=200 jitter=0), "
            "toxic lost (20:downstream hang per=request match='^SELECT .* FROM carts' times=3)"))
        _, lost = proxy.rules.installed
        self.assertEqual((lost.per, lost.times, lost.match.pattern),
                         ("request", 3, b"^SELECT .* FROM carts"))

    def test_a_toxic_in_a_file_may_name_its_proxy(self):
        path = self.write("v.ini", (
            "[proxy:a]\nlocal=:1\n"
            "[proxy:b]\nlocal=:2\n"
            "[toxic:x]\nproxy=b\ntype=noop\n"))
        a, b = self.proxies("--config", path)
        self.assertEqual((len(a.toxics), len(b.toxics)), (0, 1))

    def test_toxiproxy_json_file(self):
        path = self.write("toxiproxy.json", json.dumps([
            {"name": "redis", "listen": "[::]:26379", "upstream": "localhost:6379", "x": 1},
            {"name": "sql", "listen": "localhost:0", "upstream": "localhost:3306",
             "enabled": False,
             "toxics": [{"type": "latency", "attributes": {"latency": 5}}]}]))
        redis, sql = self.proxies("--config", path, "--seed", "7")
        self.assertEqual((redis.name, redis.local, redis.backend, redis.enabled, redis.seed),
                         ("redis", ("::", 26379), ("localhost", 6379), True, 7))
        self.assertEqual((sql.enabled, sql.describe()), (False, (
            "100:dummy, "
            "toxic latency_downstream (100:downstream latency latency=5 jitter=0)")))
        proxies = self.proxies("--config", path, "--local", "localhost:1")
        self.assertEqual([proxy.name for proxy in proxies], ["vaurien", "redis", "sql"])

    def test_keys_of_a_toxiproxy_json_file_that_have_no_effect_are_logged(self):
        path = self.write("t.json", json.dumps([
            {"name": "p", "listen": "localhost:0", "upstream": "localhost:1", "toxic": []}]))
        settings = vaurien.read_arguments(["--config", path], vaurien.SERVE_SETTINGS)
        proxies = vaurien.make_proxies(settings, needs_proxy=False)
        loop = vaurien.Loop()
        self.addCleanup(loop.close)
        with self.assertLogs("vaurien", "WARNING") as logged:
            proxies.open(loop)
        self.assertIn("the unknown key 'toxic' (did you mean toxics?)", logged.output[0])

    def test_toxiproxy_json_file_without_proxies(self):
        for text in " [ ] ", "[]":
            with self.subTest(text):
                path = self.write("empty.json", text)
                self.assertEqual(self.proxies("--config", path), [])

    def test_serve_needs_no_proxy(self):
        settings = vaurien.read_arguments(["--seed=5"], vaurien.SERVE_SETTINGS)
        self.assertEqual(len(vaurien.make_proxies(settings, needs_proxy=False)), 0)
        path = self.write("v.ini", (
            "[vaurien]\n"
            "seed = 3\n"
            "http-port = 1\n"
            "[proxy:a]\n"
            "local = :1\n"))
        settings = vaurien.read_arguments(["--config", path], vaurien.SERVE_SETTINGS)
        proxies = vaurien.make_proxies(settings, needs_proxy=False)
        self.assertEqual((list(proxies), proxies.shared["seed"], proxies["a"].seed), (["a"], 3, 3))

    def test_the_flags_of_toxiproxys_server(self):
        with mock.patch.object(vaurien, "start_log"), \
                mock.patch.object(vaurien, "serve") as serve:
            for argv in (["-host=0.0.0.0", "-port=1", "-seed", "5", "-proxy-metrics"],
                         ["--host", "0.0.0.0", "--port", "1", "-seed=5", "-runtime-metrics=true"]):
                with self.subTest(argv):
                    self.assertEqual(vaurien.main(["serve", *argv]), serve.return_value)
                    (proxies, control), _ = serve.call_args[0]
                    self.assertEqual((control.local, proxies.shared["seed"]), (("0.0.0.0", 1), 5))
        for flag, text in ("-version", "vaurien 3"), ("-help", "usage: vaurien serve"):
            output = io.StringIO()
            with self.subTest(flag), contextlib.redirect_stdout(output):
                with self.assertRaises(SystemExit) as exited:
                    vaurien.main(["serve", flag])
                self.assertFalse(exited.exception.code)
                self.assertIn(text, output.getvalue())

    def test_arguments_override_the_only_proxy_of_a_file(self):
        path = self.write("v.ini", (
            "[proxy:redis]\n"
            "local = localhost:1\n"
            "distant = localhost:2\n"))
        proxy = self.proxy("--config", path, "--distant", "localhost:3")
        self.assertEqual((proxy.name, proxy.local, proxy.backend),
                         ("redis", ("localhost", 1), ("localhost", 3)))

    def test_other_proxies_do_not_inherit_the_behavior_of_a_vaurien_section_with_a_proxy(self):
        path = self.write("v.ini", INI + "[proxy:redis]\nlocal = localhost:1\n")
        self.assertEqual([proxy.describe() for proxy in self.proxies("--config", path)],
                         ["20:delay sleep=2.0, 80:dummy", "100:dummy"])

    def test_options_of_a_handler_in_a_users_module(self):
        module = "mine_%d" % os.getpid()
        self.write(module + ".py", textwrap.dedent("""
            def shout(state, t, to, data, *, loud=1, the_word="hey", wait=0.5, on=True):
                yield t + wait, to, data.upper() if data else data
            """))
        name = module + ".shout"
        self.addCleanup(HANDLERS.pop, name, None)
        self.assertEqual(
            self.options("--behavior", "20:" + name,
                         "--handlers.%s.loud=3" % name,
                         "--behavior-%s-the-word=ho" % name),
            [{"loud": 3, "the_word": "ho", "wait": 0.5, "on": True}])
        self.addCleanup(HANDLERS.pop, "shout", None)
        path = self.write("v.ini", (
            "[vaurien]\n"
            "behavior = 20:shout\n"
            "[handler:shout]\n"
            "callable = %s\n"
            "wait = 2\n") % name)
        self.assertEqual(self.options("--config", path, "--handlers.shout.on", "no"),
                         [{"loud": 1, "the_word": "hey", "wait": 2.0, "on": False}])


class TestBadInput(TempDirTestCase):
    """Bad input ends with status 2 and one line: the setting, the problem and the remedy."""

    def run_refused(self, *argv, ini=None):
        """Run vaurien with arguments that it must refuse. Returns the error message.

        ini    the text of a configuration file for --config
        """
        if ini is not None:
            argv = ("--config", self.write("v.ini", ini), *argv)
        output = io.StringIO()
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output), \
                mock.patch.object(vaurien, "serve", self.fail):
            self.assertEqual(vaurien.main(list(argv)), 2, argv)
        line = output.getvalue()
        self.assertRegex(line, "^vaurien: [^\n]+\n$")
        return line[len("vaurien: "):-len("\n")]

    def check_arguments(self, *cases):
        """Check that arguments are refused. cases: (arguments, part of the error message)."""
        for argv, text in cases:
            with self.subTest(argv):
                self.assertIn(text, self.run_refused(*argv))

    def check_files(self, *cases):
        """Check that files are refused. cases: (text of the file, part of the error message)."""
        for ini, text in cases:
            with self.subTest(file=ini):
                self.assertIn(text, self.run_refused(ini=ini))

    def test_addresses_in_arguments(self):
        self.check_arguments(
            (["--local", "nope"],
             "--local must be HOST:PORT, like localhost:8000"),
            (["--distant", "https://example.org/path"],
             "--distant must be like https://HOST:PORT, without a path or a user, not 'https://"),
            (["--distant", "localhost:0"],
             "--distant must have a port from 1 to 65535"),
            (["--backend", "x:1", "--proxy", ":99999"],
             "--local must have a port from 0"),
            (["--local", "${X:80"],
             "--local must be HOST:PORT"),
            (["--distant", "postgresql://me:secret@db/x"],
             "like db:PORT, not the URL 'postgresql://...@db/x'"),
            (["--local", "localhost:9", "--distant", "127.0.0.1:9"],
             "is the proxy's own address"))

    def test_accept_in_arguments_and_files(self):
        for text, message in (
                ("reject", "accept must be normal, refuse or drop, and perhaps times, like "
                           "\"refuse duration=5\", not 'reject'"),
                ("refuse 5", "accept cannot be 'refuse 5': '5' must be NAME=VALUE"),
                ("drop every=x", "accept cannot be 'drop every=x': every must be 0, or a time"),
                ("drop every=1", "accept cannot be 'drop every=1': every needs duration"),
                ("drop duraton=1", "accept cannot be 'drop duraton=1': duraton is not known here "
                                   "(did you mean duration?): there are start, duration, every, "
                                   "ttl"),
                ("normal ttl=1", "normal has no times, but refuse and drop have them")):
            self.check_arguments((["--accept", text], message))
            self.check_files(("[proxy:a]\naccept = " + text, message))

    def test_max_connections_in_arguments(self):
        self.check_arguments((["--max-connections", "some"],
                              "--max-connections must be a whole number, 0 or more, not 'some'"))

    @unittest.skipUnless(vaurien.LINUX, "not on this system")
    def test_reuse_port_in_arguments_and_files(self):
        self.check_arguments(*(
            (["--reuse-port", text],
             "--reuse-port must be the number of this process, 1 or more, not %r" % text)
            for text in ("0", "-1", "1.5", "yes", "")))
        port_0 = "reuse-port needs a port, not 0: each process would get a port of its own"
        self.check_arguments((["--reuse-port", "2", "--local", "localhost:0"], port_0))
        self.check_files(("[proxy:a]\nlocal = :0\nreuse-port = 1", "[proxy:a] " + port_0),
                         ("[proxy:a]\nlocal = :1\nreuse-port = no",
                          "v.ini: [proxy:a] reuse-port must be the number"))
        self.write("proxies.json", json.dumps([{"name": "a", "upstream": "localhost:1"}]))
        self.check_arguments((["serve", "--reuse-port", "1", "--config", "proxies.json"], port_0))
        with mock.patch.object(vaurien, "LINUX", False):
            self.check_arguments((["--reuse-port", "1"], "--reuse-port needs Linux, which "))

    def test_behavior_in_arguments(self):
        self.check_arguments(
            (["--behavior", "60:delay,60:error"],
             "--behavior must add up to 100 percent at most"),
            (["--behavior", "20:nope"],
             "--behavior names the unknown handler 'nope'"),
            (["--behavior", "20"],
             "--behavior must be PERCENT:HANDLER"),
            (["--behavior", "20:no.such.thing"],
             "--behavior cannot import 'no.such.thing': ModuleNotFoundError"),
            (["--behavior", "20:os.nope"],
             "--behavior cannot import 'os.nope': AttributeError"),
            (["--behavior", "20:os.sep"],
             "'os.sep' is not a handler"),
            (["--behavior", "20:threading.Thread"],
             "'threading.Thread' is not a handler"),
            (["--behavior", "20:os.getcwd"],
             "it must be a function (state, t, to, data, *"))

    def test_options_of_handlers_in_arguments(self):
        self.check_arguments(
            (["--handlers.delay.sleep", "fast"],
             "--handlers.delay.sleep must be a number, 0 or more, not 'fast'"),
            (["--handlers.delay.sleep", "-1"],
             "must be a number, 0 or more, not '-1'"),
            (["--handlers.delay.sleep", "nan"],
             "must be a number, 0 or more, not 'nan'"),
            (["--handlers.delay.sleep", "1e999"],
             "must be a number, 0 or more, not '1e999'"),
            (["--handlers.delay.sleep", "1_0"],
             "must be a number, 0 or more, not '1_0'"),
            (["--handlers.delay.sleep", "\uff11"],     # a digit of a Japanese typeface
             "must be a number, 0 or more, not '"),
            (["--handlers.delay.start", "1_0s"],
             "or 500ms, not '1_0s'"),
            (["--handlers.delay.after", "1_0"],
             "must be a whole number, 0 or more, not '1_0'"),
            (["--behavior", "1_0:delay"],
             "--behavior must be PERCENT:HANDLER"),
            (["--behavior-delay-before", "perhaps"],
             "--handlers.delay.before must be yes or no, not 'perhaps'"),
            (["--handlers.error.warmup", "1.5"],
             "must be a whole number, 0 or more, not '1.5'"),
            (["--handlers.delay.dely", "1"],
             "--handlers.delay.dely is not an option of delay: it has before, sleep"),
            (["--behavior-latency-sleep=1"],
             "--behavior-latency-sleep is not an option of latency: it has distribution, jitter, "
             "latency"),
            (["--handlers.delay.tims", "1"],
             "--handlers.delay.tims is not an option of delay (did you mean times?)"),
            (["--handlers.latncy.latency", "1"],
             "--handlers.latncy.latency names the unknown handler 'latncy' (did you mean "))

    def test_options_of_a_handler_that_no_behavior_has(self):
        """The proxy started, and never showed the fault that the user had described."""
        text = "--handlers.latency.latency has no effect: add latency to the behavior"
        for argv in (["--behavior", "20:delay"], ["serve"], ["demo"]):
            with self.subTest(argv):
                self.assertIn(text, self.run_refused(*argv, "--handlers.latency.latency", "3"))
        # A file may have options for the behaviors of several command lines.
        path = self.write("v.ini", "[vaurien]\nbehavior=20:delay\n[handler:hang]\nafter=3\n"
                                   "[handler:delay]\nsleep=3\n")
        with mock.patch.object(vaurien, "start_log"), mock.patch.object(vaurien, "serve"), \
                self.assertLogs("vaurien", "WARNING") as logged:
            self.assertIsNot(vaurien.main(["--config", path]), 2)
        self.assertEqual(logged.output, [
            "WARNING:vaurien:%s: [handler:hang] after has no effect: no behavior has this handler"
            % path])

    def test_other_settings_in_arguments(self):
        self.check_arguments(
            (["--seed", "x"],
             "--seed must be a whole number, 0 or more, not 'x'"),
            (["--timeout", "0"],
             "--timeout must be a number of seconds, more than 0, not '0'"),
            (["--timeout", "-1"],
             "--timeout must be a number of seconds, more than 0"),
            (["--log-level", "loud"],
             "--log-level must be one of debug, info"),
            (["--replay", "none"], "cannot read none: No such file or directory"),
            (["--record", "x", "--replay", "x"], "record and replay need different files"),
            (["--log-format", "xml"], "--log-format must be one of text, json, not 'xml'"),
            (["--log-output", "/no/such/folder/x"],
             "cannot log to /no/such/folder/x: No such"),
            (["--config", "/no/such.ini"],
             "cannot read /no/such.ini: No such file"),
            (["--config", ""],
             "--config must be the path of a file, not ''"))

    def test_unknown_arguments(self):
        self.check_arguments(
            (["--a\nb"],
             "unrecognized arguments: --a b"),
            (["--nope"],
             "unrecognized arguments: --nope"),
            (["nope"],
             "unknown command 'nope': there are serve, demo, ctl"),
            (["--loc", "localhost:1"],
             "unrecognized arguments"),
            (["--local"],
             "argument --local/--proxy: expected one argument"))

    def test_an_unknown_name_that_resembles_a_known_one(self):
        """The error for a name with a typing error suggests the name that was meant."""
        self.check_arguments(
            (["--behavior", "20:dealy"],
             "unknown handler 'dealy' (did you mean delay?): there are abort"),
            (["--protocol", "Redsi"],
             "not 'Redsi' (did you mean redis?)"),
            (["--protocol", "redis", "--behavior", "1:error", "--handlers.error.kind", "loadin"],
             "not 'loadin' (did you mean LOADING?)"),
            (["--log-lvel", "debug"],
             "unrecognized arguments: --log-lvel debug (did you mean --log-level?)"),
            (["server"],
             "unknown command 'server' (did you mean serve?)"))
        self.check_files(
            ("[vaurien]\nbehaviour = 1:delay\n",
             "[vaurien] behaviour is not a setting (did you mean behavior?): there are"),
            ("[toxics:a]\n",
             "[toxics:a] is not a section (did you mean toxic?): there are"),
            ("[toxic:a]\ntype = latncy\n",
             "unknown handler 'latncy' (did you mean latency?)"),
            ("[toxic:a]\ntype = noop\nproxy = vaurin\n",
             "must be one of vaurien, not 'vaurin' (did you mean vaurien?)"))

    def test_faults_that_shall_act_together_in_one_behavior(self):
        self.check_arguments(
            (["--behavior", "100:latency,100:bandwidth"],
             "at most one handler acts on a request; to combine faults, use --fault or toxics"))

    def test_networks(self):
        self.check_arguments(
            (["--network", "3gg"], "--network must be one of 2g, 2g-urban, gprs, edge, "),
            (["--network", "satelite"], "not 'satelite' (did you mean satellite?)"),
            (["--network", "3g", "--fault", "network.profile=dsl"],
             "the fault network needs another name, because --network has it"),
            (["--fault", "network.profile=modem"], "profile must be one of 2g, "),
            (["--fault", ""], "--fault must be HANDLER [NAME=VALUE ...], not ''"),
            (["--fault", "packet_loss burst=0.5"], "burst must be a number, 1 or more"))
        self.check_files(
            ("[vaurien]\nnetwork = wfi\n", "[vaurien] network must be one of"),
            ("[vaurien]\nnetwork = 3g\n[toxic:network]\ntype = hang\n",
             "[toxic:network] needs another name, because a fault has it"))

    def test_faults(self):
        self.check_arguments(
            (["--fault", "latenzy"], "--fault 'latenzy': names the unknown handler 'latenzy' (did "
                                     "you mean latency?)"),
            (["--fault", "20:latency"], "names the unknown handler '20:latency'"),
            (["--fault", "hang", "--fault", "latency.foo=1"],
             "--fault 'latency.foo=1': foo is not an option of latency: it has distribution"),
            (["--fault", "latency latency=x"],
             "--fault 'latency latency=x': latency must be a whole number"),
            (["--fault", "latency.latency=1 latency=2"],
             "'latency=2' must be NAME=VALUE, each name once"),
            (["--fault", "hang 5"], "'5' must be NAME=VALUE, each name once"),
            (["--fault", "latency=5"], "'latency=5' must be HANDLER, or HANDLER.NAME=VALUE"),
            (["--fault", ".x=5"], "'.x=5' must be HANDLER, or HANDLER.NAME=VALUE"),
            (["--fault", "hang =5"], "'=5' must be NAME=VALUE"),
            (["--fault", "hang 'match=x"], "--fault \"hang 'match=x\": No closing quotation"),
            (["--fault", "hang name=a", "--fault", "error name=a"], "the name a is set twice"),
            (["--fault", "hang 'name=a\tb'"], "name must be at most 255 printable characters"),
            (["--fault", "hang percent=5 toxicity=1"], "percent and toxicity mean the same"),
            (["--fault", "hang percent=101"], "percent must be a number from 0 to 100"),
            (["--fault", "hang start=soon"], "start must be 0, or a time from 1ms to 1e9s"),
            (["--fault", "hang every=5"], "every needs duration"),
            (["--fault", "hang of=5"], "of needs times, from 1 to 5"),
            (["--fault", "error kind=LOADING"], "kind needs --protocol"),
            (["--fault", "cut rows=2"],
             "rows needs --protocol http or redis or mysql or postgres: tcp has no rows"),
            (["--fault", "cut rows=2", "--protocol", "smtp"], "smtp has no rows"),
            (["--fault", "cut how=rest"],
             "how must be one of close, reset, hang, not 'rest' (did you mean reset?)"),
            (["--fault", "cut", "--handlers.cut.stream", "upstream"],
             "stream must be both or downstream for cut, because it changes replies"),
            (["--fault", "hang", "--handlers.hang.after", "3"],
             "or use --fault hang.after=3"),
            (["--behavior", "5:hang", "--handlers.hang.every", "3"],
             "--handlers.hang.every needs duration"),
            (["--behavior", "5:hang", "--handlers.hang.start", "x"],
             "--handlers.hang.start must be 0, or a time from 1ms"))
        self.check_files(
            ("[vaurien]\nfault = hang\n nope\n", "v.ini: [vaurien] fault 'nope': names the "
                                                  "unknown handler 'nope'"),
            ("[vaurien]\nfault = hang\n[toxic:hang]\ntype = noop\n",
             "[toxic:hang] needs another name, because a fault has it"),
            ("[handler:hang]\nstart = x\n", "v.ini: [handler:hang] start must be 0, or a time"),
            ("[handler:hang]\nevery = 5\n", "v.ini: [handler:hang] every needs duration"),
            ("[proxy:a]\n[behavior:hang]\nduration = 5\nof = 3\n",
             "v.ini: [behavior:hang] of needs times"),
            ("[handler:cut]\nstream = upstream\n", "v.ini: [handler:cut] stream must be both or"))

    def test_arguments_that_a_json_file_leaves_without_effect(self):
        path = self.write("t.json", '[{"name": "p", "listen": "", "upstream": "localhost:1"}]')
        for argv in ["--fault", "hang"], ["--behavior", "5:hang"], ["--protocol", "http"]:
            with self.subTest(argv):
                self.assertEqual(
                    self.run_refused("--config", path, *argv), argv[0] + " has no effect on the "
                    "proxies of a JSON file, which have toxics of their own")

    def test_arguments_of_the_demo(self):
        self.check_arguments(
            (["demo", "--requests", "0"],
             "--requests must be a whole number from 10 to 1000"),
            (["demo", "--behavior", "20:nope"],
             "--behavior names the unknown handler 'nope'"),
            (["demo", "--distant", "x:1"],
             "unrecognized arguments: --distant"))

    def test_structure_of_a_file(self):
        self.check_files(
            ("[nope]\n",
             "v.ini: [nope] is not a section"),
            ("[DEFAULT]\nlocal = x:1\n",
             "[DEFAULT] is not a section"),
            ("[proxy:]\n",
             "[proxy:] is not a section"),
            ("local = x:1\n",
             "cannot read v.ini: File contains no section headers"),
            ("[vaurien]\nlocal\n",
             "cannot read v.ini: Source contains parsing errors"),
            ("[vaurien]\n[vaurien]\n",
             "cannot read v.ini: While reading"),
            ("[proxy:a]\n[proxy: a]\n",
             "v.ini: [proxy: a] is set twice"))

    def test_settings_in_a_file(self):
        self.check_files(
            ("[vaurien]\nnope = 1\n",
             "v.ini: [vaurien] nope is not a setting: there are local"),
            ("[vaurien]\nlocal = x\n",
             "v.ini: [vaurien] local must be HOST:PORT"),
            ("[vaurien]\nproxy = x\n",
             "v.ini: [vaurien] proxy must be HOST:PORT"),
            ("[vaurien]\nlocal = x:1\nproxy = x:1\n",
             "[vaurien] proxy is set twice"),
            ("[vaurien]\nlocal = \n",
             "[vaurien] local must be HOST:PORT"),
            ("[vaurien]\nbehavior = 20:nope\n",
             "[vaurien] behavior names the unknown handler"),
            ("[vaurien]\nbehavior = 20:delay,60:error,60:hang",
             "must add up to 100 percent"),
            ("[vaurien]\nlog-level = loud\n",
             "v.ini: [vaurien] log-level must be one of"),
            ("[vaurien]\nstatsd = x\n",
             "v.ini: [vaurien] statsd must be HOST:PORT"),
            ("[proxy:a]\nlog-level = info\n",
             "v.ini: [proxy:a] log-level is not a setting"),
            ("[proxy:a]\nseed = x\n",
             "v.ini: [proxy:a] seed must be a whole number"))

    def test_environment_variables_in_a_file(self):
        self.check_files(
            ("[vaurien]\nlocal = ${NO_SUCH_NAME}:1\n",
             "v.ini: [vaurien] local needs ${NO_SUCH_NAME}, which is not set"),
            ("[vaurien]\nlocal = ${HOME:1\n",
             "[vaurien] local has a ${ without its }"))

    def test_handlers_in_a_file(self):
        self.check_files(
            ("[handler:delay]\ndely = 1\n",
             "v.ini: [handler:delay] dely is not an option of delay: it has before, sleep"),
            ("[handler:hang]\nx = 1\n",
             "is not an option of hang: it has none"),
            ("[handler:delay]\nsleep = fast\n",
             "v.ini: [handler:delay] sleep must be a number"),
            ("[handler:delay]\nsleep = 1\n[behavior:delay]\nsleep = 1\n",
             "sleep is set twice"),
            ("[handler:nope]\n",
             "v.ini: [handler:nope] names the unknown handler 'nope'"),
            ("[handler:x]\ncallable = no.such\n",
             "[handler:x] callable cannot import 'no.such'"))

    def test_toxics_in_a_file(self):
        self.check_files(
            ("[toxic:a]\n",
             "v.ini: [toxic:a] needs type = HANDLER: there are abort"),
            ("[toxic:a]\ntype = noop\n[toxic: a]\ntype = noop\n",
             "[toxic: a] is set twice"),
            ("[toxic:a]\ntype = latency\nlatence = 1\n",
             "v.ini: [toxic:a] latence is not an option of latency"),
            ("[toxic:a]\ntype = latency\nlatency = -1\n",
             "v.ini: [toxic:a] latency must be a whole number, 0 or more"),
            ("[toxic:a]\ntype = noop\ntoxicity = 2\n",
             "v.ini: [toxic:a] toxicity must be a number from 0 to 1"),
            ("[toxic:a]\ntype = noop\ntoxicity = 1\npercent = 2\n",
             "percent and toxicity mean the same"),
            ("[toxic:a]\ntype = noop\nmatch = (\n",
             "v.ini: [toxic:a] match must be a regular expression"),
            ("[toxic:a]\ntype = noop\nproxy = b\n",
             "v.ini: [toxic:a] proxy must be one of vaurien, not 'b'"),
            ("[proxy:a]\n[proxy:b]\n[toxic:c]\ntype = noop\n",
             "[toxic:c] needs proxy = one of a, b"))

    def test_json_file_of_toxiproxy(self):
        self.check_files(
            ("[{",
             "cannot read v.ini: unexpected EOF"),
            ("{}",
             "cannot read v.ini: it must be a list of proxies, not object"),
            ('[{"name": "a", "upstream": "x:1", "enabled": "yes"}]',
             "cannot read v.ini: enabled must be true or false, not string"),
            ('[{"name": "a", "upstream": "x:1", "toxics": [{"type": "latency", '
             '"attributes": {"latency": 1.5}}]}]',
             "latency must be a whole number, not number 1.5 (toxic 1 of proxy a)"),
            ('[{"name": "a"}]',
             "cannot read v.ini: missing required field: upstream at proxy 1"),
            ('[{"name": "a", "upstream": "x:1", "listen": "x"}]',
             "cannot read v.ini: listen tcp: address x: missing port"),
            ('[{"name": "a", "upstream": "http://x/"}]',
             "cannot read v.ini: upstream must be HOST:PORT, without a scheme"))

    def test_settings_of_a_file_are_checked_even_if_they_are_overridden(self):
        for ini, argv in [
                ("[vaurien]\nseed = x\n", ["--seed", "1"]),
                ("[vaurien]\nbehavior = 20:nope\n", ["--behavior", "1:delay"]),
                ("[vaurien]\ndistant = http://x\n", ["--distant", "h:1"]),
                ("[vaurien]\ntimeout = x\n[proxy:a]\ntimeout = 1\n", []),
                ("[handler:delay]\nsleep = x\n", ["--handlers.delay.sleep", "1"])]:
            with self.subTest(file=ini):
                self.assertIn("v.ini: [", self.run_refused(*argv, ini=ini))

    def test_a_module_that_calls_exit_when_imported(self):
        module = "leaves_%d" % os.getpid()
        self.write(module + ".py", "import sys\nsys.exit(3)\n")
        self.assertIn("SystemExit: 3", self.run_refused("--behavior", "1:%s.x" % module))

    def test_a_file_that_is_not_utf_8(self):
        with open("v.ini", "wb") as file:
            file.write(b"[vaurien]\nlocal = \xff\xfe:1\n")
        self.assertIn("cannot read v.ini: 'utf-8' codec", self.run_refused("--config", "v.ini"))

    def test_a_value_that_looks_like_a_format_string(self):
        for text in "%", "%s", "%(x)s", "{}", "\\", "\u00fc":
            with self.subTest(value=text):
                self.run_refused("--behavior", text)
                self.run_refused(ini="[vaurien]\nbehavior = %s\n" % text)

    def test_parsers_accept_random_texts_or_raise_value_error(self):
        rng = random.Random(5)
        alphabet = "0123456789:.,[]%-/ \t\nadelyx@\u00e9\0"
        for _ in range(3000):
            text = "".join(rng.choice(alphabet) for _ in range(rng.randrange(12)))
            for parse in vaurien.parse_address, vaurien.parse_listener, vaurien.parse_behavior:
                with self.subTest(text, parser=parse), contextlib.suppress(ValueError):
                    parse(text)


class TestProcess(TempDirTestCase):
    """The program in a process of its own, as a user starts it."""

    def start(self, *argv, program=("-m", "vaurien"), **popen_options):
        """Start vaurien with these arguments. The process is killed at the end of the test."""
        process = subprocess.Popen([sys.executable, *program, *argv],
                                   stderr=subprocess.PIPE, stdout=subprocess.PIPE,
                                   env=module_environment(), universal_newlines=True,
                                   **popen_options)
        self.addCleanup(self.kill, process)
        return process

    def kill(self, process):
        """Kill a process, and close its pipes."""
        process.kill()
        process.wait(TIMEOUT)
        process.stdout.close()
        process.stderr.close()

    def run_to_end(self, *argv):
        """Run vaurien until it exits; return (status, stdout, stderr)."""
        process = self.start(*argv)
        out, err = process.communicate(timeout=TIMEOUT)
        return process.returncode, out, err

    def read_listening_ports(self, process):
        """Read the next line of the log, "listening on ... for ...". Returns its ports."""
        line = process.stderr.readline()
        self.assertIn("listening on", line)
        addresses, _, _ = line.partition(" for ")
        return [int(port) for port in re.findall(r"(?:127\.0\.0\.1|\]):(\d+)", addresses)]

    def check_one_request_and_stop(self, signum):
        """Start a proxy, send one request, and stop the proxy with this OS signal."""
        with backend_server(echo) as (backend_port, _):
            process = self.start("--local", "localhost:0",
                                 "--distant", "localhost:%d" % backend_port,
                                 "--behavior", "100:delay", "--handlers.delay.sleep=0.01",
                                 "--seed", "3")
            # The IPv4 and the IPv6 address of localhost have the same port.
            port, = set(self.read_listening_ports(process))
            with contextlib.closing(connect(port)) as sock:
                began = time.monotonic()
                self.assertEqual(send_and_read(sock, b"question"), b"question")
                self.assertGreaterEqual(time.monotonic() - began, 0.01)
                process.send_signal(signum)
                self.assertEqual(read_until_close(sock).size, 0)
            out, err = process.communicate(timeout=TIMEOUT)
            self.assertEqual((process.returncode, out), (0, ""))
            self.assertIn("delay sleep=0.01: connection 1, request 1", err)
            self.assertRegex(err, "stopped: connections: 1, requests: 1, faults: 1 delay\n$")
            self.assertNotIn("Traceback", err)

    def test_a_request_is_delayed_and_a_signal_stops_the_proxy(self):
        # If nohup has started the tests, SIGHUP is ignored, and the process would inherit this.
        self.addCleanup(signal.signal, signal.SIGHUP,
                        signal.signal(signal.SIGHUP, signal.SIG_DFL))
        for signum in signal.SIGTERM, signal.SIGINT, signal.SIGHUP:
            with self.subTest(signum.name):
                self.check_one_request_and_stop(signum)

    def test_sigterm_stops_at_once_although_connections_are_open(self):
        with backend_server(echo) as (backend_port, _), silent_address() as silent_port:
            self.write("v.ini", (
                "[proxy:a]\nlocal=127.0.0.1:0\ndistant=127.0.0.1:%d\nbehavior=100:hang\n"
                "[proxy:b]\nlocal=127.0.0.1:0\ndistant=127.0.0.1:%d\n")
                % (backend_port, silent_port))
            process = self.start("--config", "v.ini")
            port_a, = self.read_listening_ports(process)        # its client hangs
            port_b, = self.read_listening_ports(process)        # its client waits for a connect()
            socks = [connect(port_a), connect(port_b)]
            for sock in socks:
                sock.sendall(b"question")
            self.assertIn("hang", process.stderr.readline())
            process.terminate()
            process.communicate(timeout=TIMEOUT)
            self.assertEqual(process.returncode, 0)
            for sock in socks:
                sock.close()

    def test_attached_process_stops_when_its_stdin_is_closed(self):
        process = self.start("--attached", "--local", "127.0.0.1:0", stdin=subprocess.PIPE)
        self.assertEqual(process.stdout.readline(), "ready\n")
        process.stdin.close()
        self.assertEqual(process.wait(TIMEOUT), 0)

    def test_the_start_imports_only_what_a_plain_proxy_needs(self):
        """Each of these modules would take some milliseconds."""
        program = ("import sys; before = set(sys.modules); import vaurien; "
                   "vaurien.serve = lambda services, attached: services[0].bind(); "
                   "vaurien.main(['--local', 'localhost:0', '--distant', 'localhost:1']); "
                   "print(*set(sys.modules) - before)")
        imported = subprocess.check_output([sys.executable, "-c", program], cwd=HERE).split()
        self.assertIn(b"vaurien", imported)
        for name in (b"asyncio", b"configparser", b"encodings.idna", b"http.client", b"inspect",
                     b"json", b"ssl", b"subprocess", b"tempfile", b"typing"):
            self.assertNotIn(name, imported)

    def test_serve_with_and_without_proxies(self):
        self.write("toxiproxy.json", json.dumps([
            {"name": "a", "listen": "127.0.0.1:0", "upstream": "localhost:1"}]))
        processes = [(self.start("serve", *argv), names) for argv, names in [
            (["--http-port", "0"], []), (["-port=0", "-config", "toxiproxy.json"], ["a"])]]
        for process, names in processes:
            with self.subTest(process.args):
                line = ""
                while "control on" not in line:
                    line = process.stderr.readline()
                port = int(re.search(r"127\.0\.0\.1:(\d+)", line).group(1))
                client = vaurien.Client("127.0.0.1", port)
                self.assertEqual(list(client.ask("GET", "/proxies")), names)
                client.ask("POST", "/proxies", {
                    "name": "b", "upstream": "localhost:1", "listen": "127.0.0.1:0"})
                process.terminate()
                self.assertEqual(process.wait(TIMEOUT), 0)

    def test_a_port_in_use_is_an_error(self):
        with contextlib.closing(listening_socket()) as listener:
            port = listener.getsockname()[1]
            self.write("v.ini", (
                "[proxy:a]\nlocal=127.0.0.1:0\n"
                "[proxy:b]\nlocal=localhost:%d\n") % port)
            status, _, err = self.run_to_end("--config", "v.ini")
        self.assertEqual(status, 1)
        self.assertRegex(
            err, r"^vaurien: cannot listen on 127.0.0.1:%d: Address[^\n]* \(proxy b\)\n$" % port)

    def test_a_port_in_use_names_the_option_that_set_it(self):
        with contextlib.closing(listening_socket()) as listener:
            port = listener.getsockname()[1]
            for option, argv in (
                    ("--local", ["--local", "127.0.0.1:%d" % port]),
                    ("--http-port", ["--local", "127.0.0.1:0", "--http",
                                     "--http-host", "127.0.0.1", "--http-port", str(port)])):
                with self.subTest(option):
                    status, _, err = self.run_to_end(*argv)
                    self.assertEqual(status, 1)
                    self.assertRegex(err, r"\(%s\)\n$" % option)

    def test_sighup_stays_ignored_under_nohup(self):
        self.addCleanup(signal.signal, signal.SIGHUP,
                        signal.signal(signal.SIGHUP, signal.SIG_IGN))   # the process inherits it
        process = self.start("--local", "127.0.0.1:0", "--http", "--http-port", "0")
        port, = self.read_listening_ports(process)
        process.send_signal(signal.SIGHUP)
        # The control server replies after the signal has been delivered.
        control_port = int(re.search(r":(\d+)\n", process.stderr.readline()).group(1))
        client = vaurien.Client("localhost", control_port)
        for _ in range(10):
            self.assertEqual(client.get_handler(), "dummy")
        connect(port).close()
        process.terminate()
        process.communicate(timeout=TIMEOUT)
        self.assertEqual(process.returncode, 0)

    @staticmethod
    def shrink_pipe(pipe):
        """Make the kernel's buffer of a pipe as small as possible. Returns its size in bytes."""
        with contextlib.suppress(ImportError, OSError):
            import fcntl
            return fcntl.fcntl(pipe, 1031, 4096)        # F_SETPIPE_SZ, on Linux
        return 64 * 1024

    def test_a_log_that_is_not_read_does_not_block_the_proxy(self):
        """stderr was a pipe that was full: everything stopped, and SIGTERM had no effect."""
        program = "-c", "import vaurien; vaurien.LOG_CLOSE_TIMEOUT = 0.1; vaurien.main()"
        with backend_server(echo) as (backend_port, _):
            process = self.start("--local", "127.0.0.1:0",
                                 "--distant", "127.0.0.1:%d" % backend_port,
                                 "--behavior", "100:slicer",
                                 "--handlers.slicer.average_size", "30", program=program)
            port, = self.read_listening_ports(process)
            pipe_size = self.shrink_pipe(process.stderr)
            with contextlib.closing(connect(port)) as sock:
                for _ in range(2 * pipe_size // 100):
                    send_and_read(sock, b"q" * 60)
        process.terminate()
        self.assertEqual(process.wait(TIMEOUT), 0)

    @unittest.skipUnless(hasattr(signal, "setitimer"), "no interval timers on this system")
    def test_an_expression_that_takes_for_ever_does_not_stop_the_proxy(self):
        """Only SIGKILL ended a proxy that searched for (a+)+b."""
        with backend_server(echo) as (backend_port, _):
            processes = [self.start("--local", "127.0.0.1:0", "--protocol", protocol,
                                    "--distant", "127.0.0.1:%d" % backend_port,
                                    "--behavior", "100:delay", "--handlers.delay.match", "(a+)+b")
                         for protocol in ("tcp", "redis")]
            for process in processes:
                with self.subTest(process.args):
                    port, = self.read_listening_ports(process)
                    with contextlib.closing(connect(port)) as sock:
                        for _ in range(2):
                            send_and_read(sock, b"GET " + 60 * b"a" + b"\r\n")
                    process.terminate()
                    _, err = process.communicate(timeout=TIMEOUT)
                    self.assertEqual(process.returncode, 0)
                    self.assertEqual(err.count("it acts on no more requests"), 1)

    def test_log_output_names_the_file_of_the_log(self):
        process = self.start("--local", "127.0.0.1:0", "--log-output", "v.log",
                             "--log-level", "DEBUG")
        wait_until(lambda: os.path.exists("v.log") and os.path.getsize("v.log"))
        process.terminate()
        self.assertEqual(process.communicate(timeout=TIMEOUT), ("", ""))
        self.assertRegex(read_text("v.log"), "INFO listening on .*; seed [0-9]+\n.*INFO stopped")

    def test_log_format_json_applies_to_all_lines(self):
        process = self.start("--local", "127.0.0.1:0", "--log-format", "json")
        process.stderr.readline()
        process.terminate()
        _, err = process.communicate(timeout=TIMEOUT)
        self.assertRegex(json.loads(err)["message"], "^stopped")

    def test_version(self):
        processes = [self.start(*argv) for argv in (
            ["--version"], ["ctl", "--version"], ["--config", "nowhere", "--version"])]
        for process in processes:
            with self.subTest(process.args):
                out, err = process.communicate(timeout=TIMEOUT)
                self.assertEqual((process.returncode, out, err), (0, "vaurien 3.0.0\n", ""))

    def run_help(self, *argv):
        """Run vaurien with these arguments, which print a help. Returns its lines."""
        status, out, err = self.run_to_end(*argv)
        self.assertEqual((status, err), (0, ""))
        return out.splitlines()

    def run_help_here(self, *argv):
        """Do as run_help does, but in this process, which takes less time."""
        with contextlib.redirect_stdout(io.StringIO()) as out, \
                contextlib.redirect_stderr(io.StringIO()) as err, \
                self.assertRaises(SystemExit) as exited:
            vaurien.main(list(argv))
        self.assertEqual((exited.exception.code, err.getvalue()), (0, ""))
        return out.getvalue().splitlines()

    def test_help_fits_two_screens_and_has_one_line_for_each_handler(self):
        tls_lines = self.run_help_here("--help", "tls")
        for argv, settings in ((["--help"], vaurien.SETTINGS), (["-h"], vaurien.SETTINGS),
                               (["demo", "--help"], vaurien.DEMO_SETTINGS),
                               (["serve", "--help"], vaurien.SERVE_SETTINGS)):
            lines = self.run_help_here(*argv)
            with self.subTest(argv):
                self.assertLessEqual(len(lines), 100)       # 50 on each screen
                self.assertLessEqual(max(map(len, lines)), 99)
                for name, setting in settings.items():
                    shown_in = tls_lines if name.startswith("tls") else lines
                    self.assertIn("  " + ", ".join(setting.flags), "\n".join(shown_in))
            for name, function in HANDLERS.items() if "behavior" in settings else ():
                with self.subTest(argv, handler=name):
                    self.assertIn("  %-12s%s" % (name, vaurien.summary(function)), lines)

    def test_help_of_a_handler_has_its_options(self):
        for name, function in HANDLERS.items():
            text = vaurien.topic_help(name)
            for option in [*vaurien.handler_options(function), "times"]:
                with self.subTest(name, option=option):
                    self.assertIn("  --handlers.%s.%s" % (name, option), text)
        self.assertIn("  --handlers.delay.sleep NUMBER", self.run_help("--help", "delay"))
        module = "helped_%d" % os.getpid()
        self.write(module + ".py", "def mine(state, t, to, data, *, speed=3):\n    yield\n")
        self.assertTrue(any("mine.speed N" in line
                            for line in self.run_help("--help", module + ".mine")))

    def test_help_of_a_protocol_has_its_errors(self):
        for name, class_ in vaurien.PROTOCOLS.items():
            for kind in class_.errors if class_ else ():
                with self.subTest(name, kind=kind):
                    self.assertIn(kind, vaurien.topic_help(name))

    def test_help_of_an_unknown_topic(self):
        for argv, text in ((["--help", "dely"], "handler 'dely' (did you mean delay?)"),
                           (["delay", "--help"], "see vaurien --help delay")):
            status, _, err = self.run_to_end(*argv)
            with self.subTest(argv):
                self.assertEqual(status, 2)
                self.assertIn(text, err)

    def test_help_without_docstrings(self):
        process = subprocess.Popen([sys.executable, "-OO", FILE, "--help", "delay"],
                                   stdout=subprocess.PIPE)
        out, _ = process.communicate(timeout=TIMEOUT)
        self.assertIn(b"--handlers.delay.sleep", out)
        self.assertEqual(process.returncode, 0)

    def test_a_users_handler_imports_the_running_module(self):
        """The program runs as __main__; `import vaurien` must not load a second copy."""
        self.write("mine.py", textwrap.dedent("""
            import vaurien

            def late_end(state, t, to, data):
                assert vaurien.EOF is not vaurien.OPEN
                if data is vaurien.EOF and to == vaurien.DOWNSTREAM:
                    yield t, to, b"the end"
                yield t, to, data
            """))
        with backend_server(lambda sock: sock.sendall(read_exactly(sock, 8))) as (port, _):
            process = self.start("--local", "127.0.0.1:0", "--distant", "127.0.0.1:%d" % port,
                                 "--behavior", "100:mine.late_end")
            proxy_port, = self.read_listening_ports(process)
            with contextlib.closing(connect(proxy_port)) as sock:
                sock.sendall(b"question")
                reply = b"question" + b"the end"
                self.assertEqual(read_exactly(sock, len(reply)), reply)
            process.terminate()
            process.wait(TIMEOUT)

    def test_demo(self):
        program = "-c", "import vaurien; vaurien.DEMO_SECONDS = 0.3; vaurien.main()"
        processes = [self.start("demo", "--requests", "60", *argv, program=program) for argv in [
            ("--handlers.delay.sleep", "0.2"), ("--behavior", "30:blackout,20:error")]]
        outputs = []
        for process in processes:
            out, err = process.communicate(timeout=TIMEOUT)
            outputs.append(out)
            with self.subTest(process.args):
                self.assertEqual((process.returncode, err), (0, ""))
                self.assertLessEqual(max(map(len, out.splitlines())), 80)
        output_with_delays, output_with_failures = outputs
        for out in outputs:
            self.assertTrue(out.endswith(vaurien.DEMO_NEXT_STEP + "\n"), out)
        self.check_output_with_delays(output_with_delays)
        self.check_output_with_failures(output_with_failures)

    def check_output_with_delays(self, out):
        """Check the output of the demo: some of the 60 requests were delayed by 0.2 s."""
        delayed, total, seconds = re.search(
            r"^(\d+) of (\d+) requests were delayed \(delay\), by ([0-9.]+) s at the median\.$",
            out, re.MULTILINE).groups()
        self.assertEqual(total, "60")
        self.assertTrue(4 < int(delayed) < 25)
        self.assertGreaterEqual(float(seconds), 0.2)
        self.assertRegex(out, r"The other %d were answered in [0-9.]+ m?s at the median\."
                         % (60 - int(delayed)))
        self.assertRegex(out, r"\n +(200 - 500 ms|0\.5 - 1 s)  #+ \d+\n")

    def check_output_with_failures(self, out):
        """Check the output of the demo: some of the 60 requests met a blackout or an error."""
        self.assertRegex(out, r"(\d+) of 60 requests met blackout: \1 x connection closed\.\n")
        self.assertRegex(out, r"(\d+) of 60 requests met error: \1 x a wrong answer\.\n")
        self.assertRegex(out, r"\n +connection closed  #+ \d+\n")

    def test_demo_assigns_a_fault_to_the_latest_connection_from_its_client_port(self):
        first = vaurien.Outcome(client="a:1", began=10.0, seconds=1.0, failure="")
        second = vaurien.Outcome(client="a:1", began=12.0, seconds=1.0, failure="")
        record = vaurien.FaultRecord(number=1, time=12.5, proxy="p", connection=2, client="a:1",
                                     request=1, handler="delay", options={})
        self.assertEqual(vaurien.match_faults([first, second], [record]), {second: "delay"})

    def test_demo_describes_requests_of_which_only_some_were_answered(self):
        answered = vaurien.Outcome(client="a:1", began=1.0, seconds=0.05, failure="")
        failed = vaurien.Outcome(client="a:2", began=1.0, seconds=1.0, failure="a wrong answer")
        for outcomes, normal_seconds, text in [
                ([answered, failed], 0.01, "met delay: 1 x a wrong answer, "
                                           "1 x answered, in 50.0 ms at the median"),
                ([answered], 0, "met delay: 1 x answered, in 50.0 ms at the median"),
                ([answered], 0.01, "were delayed (delay), by 40.0 ms at the median")]:
            with self.subTest(text):
                self.assertEqual(vaurien.describe_fault("delay", outcomes, normal_seconds), text)


class TestLogThread(unittest.TestCase):
    """The thread that writes the log."""

    def setUp(self):
        read_fd, self.write_fd = os.pipe()
        self.file = os.fdopen(read_fd, encoding="utf-8")
        self.addCleanup(self.file.close)
        self.log_thread = vaurien.LogThread(self.write_fd)
        self.log_thread.setFormatter(vaurien.Formatter("%(levelname)s %(message)s"))

    def log(self, *messages):
        for message in messages:
            self.log_thread.handle(vaurien.log.makeRecord(
                "vaurien", logging.INFO, "", 0, message, (), None))

    def close(self):
        """Close the log thread and the pipe. Returns the lines that are left in the pipe."""
        self.log_thread.close()
        os.close(self.write_fd)
        return self.file.read().splitlines()

    def test_all_lines_are_written_in_order_before_the_exit(self):
        messages = ["line %d \u00fc" % number for number in range(1000)]
        self.log(*messages)
        self.assertEqual(self.close(), ["INFO " + message for message in messages])

    def test_lines_beyond_the_limit_are_dropped_and_counted(self):
        with mock.patch.object(vaurien, "LOG_LINES_MAX", 5):
            self.log("x" * (1 << 20))           # larger than a pipe: the thread blocks
            wait_until(lambda: not self.log_thread.lines)
            self.log(*"abcdefgh")
            self.assertEqual(self.file.readline(), "INFO %s\n" % ("x" * (1 << 20)))
        self.assertEqual(self.close(), ["INFO a", "INFO b", "INFO c", "INFO d", "INFO e",
                                        "WARNING 3 log lines were dropped here, because the log "
                                        "could not be written fast enough"])

    def test_json_lines_have_fault_records_and_tracebacks(self):
        self.log_thread.setFormatter(vaurien.LOG_FORMATTERS["json"])
        record = vaurien.FaultRecord(1, 0.0, "p", 2, "a:1", 3, "delay", {"sleep": 1.0})
        self.log_thread.handle(vaurien.log.makeRecord(
            "vaurien", logging.INFO, "", 0, "a\n\u00fc %d", (5,), None, extra={"fault": record}))
        try:
            raise ValueError("x")
        except ValueError:
            self.log_thread.handle(vaurien.log.makeRecord(
                "vaurien", logging.ERROR, "", 0, "b", (), sys.exc_info()))
        fault, failure = map(json.loads, self.close())
        self.assertRegex(fault.pop("time"), r"^20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d\d\dZ$")
        self.assertEqual(fault, {"level": "info", "message": "a\n\u00fc 5",
                                 "fault": json.loads(json.dumps(record._asdict()))})
        self.assertEqual((failure["level"], failure["message"]), ("error", "b"))
        self.assertTrue(failure["traceback"].endswith("ValueError: x"))

    def test_a_pipe_that_another_process_has_made_non_blocking(self):
        os.set_blocking(self.write_fd, False)
        self.log("x" * (1 << 20), "y")
        self.assertEqual(len(self.file.readline()), len("INFO \n") + (1 << 20))
        self.assertEqual(self.close(), ["INFO y"])

    def test_a_closed_pipe_is_no_error(self):
        self.file.close()
        self.log("a", "b")
        self.log_thread.close()
        os.close(self.write_fd)


class TestCtl(unittest.TestCase):
    """The command vaurienctl."""

    def run_ctl(self, client, *argv):
        """Run vaurienctl with these arguments; return (status, stdout, stderr)."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = vaurien.main(["ctl", *argv, "--host", "http://127.0.0.1:%d" % client.port])
        return status, out.getvalue().strip(), err.getvalue().strip()

    def test_actions(self):
        with proxy_with_control() as (proxy, client):
            self.assertEqual(self.run_ctl(client, "list-handlers"), (0, ", ".join(HANDLERS), ""))
            self.assertEqual(self.run_ctl(client, "get-handler"), (0, "dummy", ""))
            self.assertEqual(self.run_ctl(client, "set-handler", "blackout"),
                             (0, 'Handler changed to "blackout"', ""))
            status, _, _ = self.run_ctl(client, "set-behavior", "delay",
                                        "sleep=0.001", "percent=100", "before=no")
            self.assertEqual(status, 0)
            self.assertEqual(proxy.describe(), "100:delay sleep=0.001 before=no")
            with connected_client(proxy) as sock:
                send_and_read(sock, b"question")
                _, out, _ = self.run_ctl(client, "connections")
                self.assertIn('"bytes_up": 8', out)
                for argv, output in ((["1", "cut"], "how must be one of close, reset, not 'cut'"),
                                     (["x"], "number must be a whole number"),
                                     (["9"], "there is no open connection 9")):
                    status, _, error = self.run_ctl(client, "close", *argv)
                    self.assertEqual(status, 1)
                    self.assertIn(output, error)
                self.assertEqual(self.run_ctl(client, "close", "1", "reset"),
                                 (0, "Connection 1: reset", ""))
            _, out, _ = self.run_ctl(client, "events")
            self.assertIn('"handler": "delay"', out)
            backend = vaurien.format_address(proxy.backend)
            self.assertEqual(self.run_ctl(client, "backend"), (0, backend, ""))
            self.assertEqual(self.run_ctl(client, "backend", "localhost:9"),
                             (0, "localhost:9", ""))

    def check_actions(self, client, *cases):
        """Run actions that must succeed. cases: (arguments, output)."""
        for argv, output in cases:
            with self.subTest(argv):
                self.assertEqual(self.run_ctl(client, *argv), (0, output, ""))

    def test_rules_with_options(self):
        rules = "20:delay sleep=2.0, 5:error warmup=0 match='^GET' times=3, 75:dummy"
        with proxy_with_control() as (_, client):
            self.check_actions(
                client,
                (["set-rules", "20:delay", "sleep=2", "5:error", "match=^GET", "times=3"],
                 "Rules changed to " + rules),
                (["rules"], rules),
                (["get-handler"], "delay,error"),
                (["set-rules", "20:delay,5:hang", "times=3"],
                 "Rules changed to 20:delay sleep=1.0, 5:hang times=3, 75:dummy"),
                (["reset"], "Reset"),
                (["rules"], "100:dummy"))

    def test_toxics(self):
        with proxy_with_control() as (_, client):
            self.check_actions(
                client,
                (["toxics"], ""),
                (["add-toxic", "latency", "name=slow", "latency=200", "stream=upstream",
                  "toxicity=0.5"], "Toxic added: slow"),
                (["add-toxic", "hang.times=3", "percent=20"], "Toxic added: hang_both"),
                (["rules"], "100:dummy, toxic slow (50:upstream latency latency=200 jitter=0), "
                            "toxic hang_both (20:both hang times=3)"),
                (["update-toxic", "slow", "jitter=5", "toxicity=1"], "Toxic changed: slow"),
                (["remove-toxic", "hang_both"], "Toxic removed: hang_both"),
                (["rules"], "100:dummy, toxic slow (100:upstream latency latency=200 jitter=5)"))
            _, out, _ = self.run_ctl(client, "toxics")
            self.assertEqual(json.loads(out)["attributes"], {"latency": 200, "jitter": 5})

    def test_adding_and_removing_a_toxic_keeps_those_that_another_client_adds(self):
        list_toxics, added = vaurien.Client.list_toxics, []

        def list_then_add(ctl_client):
            toxics = list_toxics(ctl_client)
            added.append(client.add_toxic("noop", "other%d" % len(added)))
            return toxics

        with proxy_with_control() as (_, client):
            with mock.patch.object(vaurien.Client, "list_toxics", list_then_add):
                self.check_actions(
                    client,
                    (["add-toxic", "noop", "name=a"], "Toxic added: a"),
                    (["remove-toxic", "a"], "Toxic removed: a"))
            self.assertEqual([toxic["name"] for toxic in client.list_toxics()], added)

    def test_times(self):
        with proxy_with_control() as (_, client):
            self.check_actions(
                client,
                (["set-rules", "20:delay", "start=5s", "5:error", "times=3", "of=5", "ttl=1h"],
                 "Rules changed to 20:delay sleep=1.0 start=5.0, 5:error warmup=0 times=3 of=5 "
                 "ttl=3600.0, 75:dummy"),
                (["add-toxic", "noop", "name=a", "duration=1h", "every=2h"], "Toxic added: a"),
                (["add-toxic", "noop", "name=b", "ttl=1h"], "Toxic added: b"),
                (["update-toxic", "a", "ttl=5m"], "Toxic changed: a"))
            self.assertEqual([(toxic["name"], toxic["active"], toxic["ttl"]) for toxic in map(
                json.loads, self.run_ctl(client, "toxics")[1].splitlines())],
                [("a", True, 300), ("b", True, 3600)])
            self.assertEqual(json.loads(self.run_ctl(client, "events")[1])["change"], "begins")
            self.assertEqual(
                self.run_ctl(client, "add-toxic", "noop", "start=soon"),
                (1, "", "vaurienctl: bad request body: start must be 0, or a time from 1ms to "
                        "1e9s, like 90, 90s, 5m, 1h or 500ms, not 'soon'"))

    def test_a_proxy_is_disabled_and_enabled(self):
        with proxy_with_control() as (proxy, client):
            backend = vaurien.format_address(proxy.backend)
            self.check_actions(
                client,
                (["disable"], "Disabled"),
                (["proxies"], "vaurien: disabled for %s: 100:dummy" % backend),
                (["enable"], "Enabled"),
                (["proxies"], "vaurien: %s for %s: 100:dummy" % (proxy.listen, backend)))

    def test_a_proxy_refuses_clients(self):
        with proxy_with_control() as (proxy, client):
            backend = vaurien.format_address(proxy.backend)
            self.check_actions(
                client,
                (["accept"], "normal"),
                (["accept", "refuse"], "Accept changed to refuse"),
                (["accept", "drop", "start=1h", "duration=5"],
                 "Accept changed to drop start=3600 duration=5"),
                (["accept"], "drop start=3600 duration=5"),
                (["accept", "refuse"], "Accept changed to refuse"),
                (["proxies"], "vaurien: %s (accept refuse) for %s: 100:dummy"
                 % (proxy.listen, backend)),
                (["reset"], "Reset"),
                (["accept"], "normal"))
            self.assertEqual(self.run_ctl(client, "accept", "no"), (
                1, "", "vaurienctl: accept must be normal, refuse or drop, and perhaps times, "
                       "like \"refuse duration=5\", not 'no'"))

    def test_an_answer_names_the_proxy_if_there_are_several(self):
        with proxy_with_control() as (_, client):
            client.request("POST", "/proxies", {
                "name": "b", "listen": "127.0.0.1:0", "upstream": "127.0.0.1:9"})
            self.check_actions(
                client,
                (["set-handler", "hang"], 'Handler changed to "hang" on proxy vaurien'),
                (["set-handler", "delay", "--proxy", "b"],
                 'Handler changed to "delay" on proxy b'),
                (["rules", "--proxy", "b"], "100:delay sleep=1.0"),
                (["add-toxic", "noop", "name=x", "--proxy", "b"], "Toxic added: x on proxy b"))
            client.request("DELETE", "/proxies/b")

    def test_help_lists_all_actions(self):
        out = io.StringIO()
        with contextlib.redirect_stdout(out), self.assertRaises(SystemExit):
            vaurien.main(["ctl", "--help"])
        for name in [*vaurien.CTL_ACTIONS, *vaurien.CTL_ALIASES]:
            with self.subTest(name):
                self.assertIn(name, out.getvalue())

    def test_errors(self):
        with proxy_with_control() as (_, client):
            for argv, expected_status, text in [
                    (["set-handler", "nope"],
                     1, "unknown handler 'nope'"),
                    (["set-handler", "delay", "sleep=x"],
                     1, "sleep must be a number"),
                    (["backend", "x"],
                     1, "backend must be HOST:PORT"),
                    (["set-handler"],
                     2, "set-handler: missing a required argument: 'name'"),
                    (["set-handler", "delay", "sleep"],
                     2, "'sleep' must be NAME=VALUE"),
                    (["set-handler", "delay", "sleep=1", "sleep=2"],
                     2, "each name once"),
                    (["set-handler", "delay", "name=hang"],
                     2, "'name=' must be left out"),
                    (["set-handler", "delay", "self=1"],
                     1, "self is not an option of delay"),
                    (["get-handler", "--nope"],
                     2, "unrecognized arguments: --nope"),
                    (["get-handler", "x"],
                     2, "get-handler: too many positional arguments"),
                    (["add-toxc"],
                     2, "unknown action 'add-toxc' (did you mean add-toxic?): there are rules"),
                    ([],
                     2, "unknown action '': there are rules"),
                    (["get-handler", "--prxy", "a"],
                     2, "unrecognized arguments: --prxy (did you mean --proxy?)"),
                    (["get-handler", "--proxy", "nope"],
                     1, "there is no proxy 'nope': there are vaurien"),
                    (["set-rules", "delay"],
                     2, "set-rules: must be PERCENT:HANDLER"),
                    (["set-rules", "20:delay", "slep=3"],
                     1, "slep is not an option of delay (did you mean sleep?)"),
                    (["add-toxic", "latncy"],
                     1, "unknown handler 'latncy' (did you mean latency?)"),
                    (["add-toxic", "latency", "latncy=3"],
                     1, "latncy is not an option of latency (did you mean latency?)"),
                    (["add-toxic", "latency", "latency=x"],
                     1, "latency must be a whole number, 0 or more, not 'x'"),
                    (["add-toxic", "latency", "toxicity=20"],
                     1, "toxicity must be a number from 0 to 1"),
                    (["remove-toxic", "slow"],
                     1, "unknown toxic 'slow': there are none")]:
                with self.subTest(argv):
                    status, out, err = self.run_ctl(client, *argv)
                    self.assertEqual((status, out), (expected_status, ""))
                    self.assertRegex(err, "^vaurienctl: [^\n]*%s[^\n]*$" % re.escape(text))

    def test_arguments_of_an_action_may_follow_options(self):
        with proxy_with_control() as (proxy, client), contextlib.redirect_stdout(io.StringIO()):
            host = "127.0.0.1:%d" % client.port
            status = vaurien.main(["ctl", "set-handler", "--host", host, "delay", "sleep=2"])
            self.assertEqual(status, 0)
            self.assertEqual(proxy.describe(), "100:delay sleep=2.0")

    def test_long_options_may_begin_with_one_dash(self):
        """vaurienctl read -host as -h with the value "ost", and printed its help."""
        with proxy_with_control() as (_, client):
            host = "http://127.0.0.1:%d" % client.port
            for argv, expected in (
                    (["-host=" + host, "get-handler"], (0, "dummy", "")),
                    (["get-handler", "-host", host, "-proxy=vaurien"], (0, "dummy", "")),
                    (["-hsot=x", "get-handler"],
                     (2, "", "unrecognized arguments: --hsot=x (did you mean --host?)")),
                    (["--host", host, "remove-toxic", "--", "-slow"],
                     (1, "", "unknown toxic '-slow': there are none"))):
                out, err = io.StringIO(), io.StringIO()
                with self.subTest(argv), contextlib.redirect_stdout(out), \
                        contextlib.redirect_stderr(err):
                    status = vaurien.main(["ctl", *argv])
                    expected_status, expected_out, expected_err = expected
                    self.assertEqual((status, out.getvalue().strip()),
                                     (expected_status, expected_out))
                    self.assertIn(expected_err, err.getvalue())

    def test_no_server(self):
        status, _, err = self.run_ctl(vaurien.Client(port=unused_port()), "get-handler")
        self.assertEqual(status, 1)
        self.assertRegex(
            err, "^vaurienctl: no response from 127.0.0.1:[0-9]+: Connection refused$")

    def test_parse_host(self):
        for text, address in [("http://localhost:8080", ("localhost", 8080, "http")),
                              ("localhost", ("localhost", 8080, "http")),
                              ("https://[::1]:1/", ("::1", 1, "https")),
                              (":81", ("localhost", 81, "http"))]:
            with self.subTest(text):
                self.assertEqual(vaurien.parse_host(text), address)
        for text in "ftp://x:1", "http://x:y", "x y:1":
            with self.subTest(text), self.assertRaises(ValueError):
                vaurien.parse_host(text)


# -- README ---------------------------------------------------------------------


class TestReadme(unittest.TestCase):
    """The tables of README.md are complete, and its commands and examples work."""

    def setUp(self):
        self.text = read_text(os.path.join(HERE, "README.md"))
        self.reference = read_text(os.path.join(HERE, ".github", "REFERENCE.md"))

    def code_block(self, start, text=None):
        """Return the code of the indented block that begins with `start`, without the indent.

        text    of the page; by default, README.md
        """
        text = text or self.text
        text = text[text.index("    " + start):]
        return textwrap.dedent(re.match(r"(?:(?: {4}.*)?\n)+", text).group())

    def test_the_table_of_handlers_matches_the_registry(self):
        for name, function in HANDLERS.items():
            with self.subTest(name):
                options = ", ".join(
                    "`%s` (%s)" % (option, vaurien.format_value(default))
                    for option, default in vaurien.handler_options(function).items())
                row = "| `%s` | %s | %s |" % (name, vaurien.summary(function), options)
                row = row.replace("|  |", "| |")        # of a handler without options
                self.assertIn(row, self.text)

    def test_the_table_of_protocols_matches_the_registry(self):
        protocols = dict(vaurien.PROTOCOLS)
        del protocols["tcp"]        # not in the table
        for name, protocol in protocols.items():
            with self.subTest(name):
                row, = (line for line in self.reference.splitlines()
                        if line.startswith("| `%s` | `" % name))
                quoted = set(re.findall("`([^`]*)`", row))
                self.assertEqual(sorted(quoted - {name}), sorted(protocol.errors))

    def test_every_option_of_the_command_line_is_mentioned(self):
        for setting in [*vaurien.SETTINGS.values(), *vaurien.SERVE_SETTINGS.values()]:
            for flag in setting.flags:
                with self.subTest(flag):
                    self.assertIn("`%s`" % flag, self.reference)

    def test_every_rule_field_is_in_the_reference(self):
        for name in vaurien.RULE_FIELDS:
            with self.subTest(name):
                self.assertIn("\n| `%s` | " % name, self.reference)

    def test_the_commands_are_valid(self):
        lines = (self.text + self.reference).replace("\\\n", " ").splitlines()
        commands = [line.strip(" &").replace("$n", "2") for line in lines      # $n is of a loop
                    if re.match(" +vaurien --", line)]
        self.assertGreater(len(commands), 5)
        for command in commands:
            # mine.py is a file of the reader, and HOST:PORT an address.
            if not re.search("mine[.]|HOST:PORT|--help", command):
                with self.subTest(command):
                    settings = vaurien.read_arguments(shlex.split(command)[1:], vaurien.SETTINGS)
                    self.assertTrue(vaurien.make_proxies(settings), command)

    def test_the_files_that_it_shows_and_links_to_exist(self):
        for path, anchor in re.findall(r"\]\((?!https?:|#)([^)#]+)#?([^)]*)\)", self.text):
            with self.subTest(path, anchor=anchor):
                size = os.path.getsize(os.path.join(HERE, *path.split("/")))
                self.assertLess(size, 150000)
                if anchor:
                    heads = re.findall("^## (.*)$", self.reference, re.MULTILINE)
                    self.assertIn(anchor, [re.sub("[^a-z0-9-]", "", head.lower().replace(" ", "-"))
                                           for head in heads])

    def test_the_scenario_of_a_restart(self):
        config = vaurien.read_ini("restart.ini", self.code_block(
            "[vaurien]\n    local = localhost:6380"))
        proxy = vaurien.make_proxies(config)["vaurien"]
        loop, acts, modes = SimulatedLoop(), [], []
        proxy.open(loop)
        for second in range(10):
            connection = FakeConnection(proxy)
            acts += [second] if connection.acting() == ["error"] else []
            modes.append(proxy.accept.current_mode())
            loop.advance(1)
        self.assertEqual(acts, [5, 6, 7])
        self.assertEqual(modes, ["refuse"] * 5 + ["normal"] * 5)
        self.assertEqual(loop.timers, [])

    def test_the_test_case_of_the_original_documentation(self):
        with backend_server(echo) as (port, _):
            ports = {"proxy_port": unused_port(), "http_port": unused_port()}
            namespace = {
                "unittest": unittest,
                "start_proxy": functools.partial(vaurien.start_proxy, warmup=TIMEOUT,
                                                 log_output="-", log_level="critical", **ports),
                "stop_proxy": vaurien.stop_proxy,
                "Client": functools.partial(vaurien.Client, port=ports["http_port"]),
            }
            import_line = "from vaurien import Client, start_proxy, stop_proxy"
            source = self.code_block(import_line, self.reference)
            # The example uses the default ports. The namespace uses free ones instead.
            source = source.replace(import_line, "").replace("8888", str(port))
            exec(source, namespace)
            result = unittest.TestResult()
            test = unittest.defaultTestLoader.loadTestsFromTestCase(namespace["MyTest"])
            test.run(result)
            self.assertEqual((result.testsRun, result.errors, result.failures), (1, [], []))

    def test_the_failing_test_and_its_mend(self):
        """The test fails while `page` waits for the cache, and passes with a time limit."""
        def page(cache_port):
            with contextlib.closing(connect(cache_port)) as sock:
                sock.settimeout(cache_timeout)
                with contextlib.suppress(socket.timeout):
                    send_and_read(sock, b"question")

        with backend_server(echo) as (port, _):
            source = self.code_block("import time\n    import unittest")
            source = source.replace("localhost:6379", "127.0.0.1:%d" % port)
            namespace = {"page": page}
            # The test that fails need not wait as long as a reader's.
            quick = source.replace("sleep=2", "sleep=0.1").replace("began, 1", "began, 0.1")
            self.assertEqual(len(set(source.split()) - set(quick.split())), 2)
            for cache_timeout, code, failures in (      # noqa: B007 (page reads it)
                    (TIMEOUT, quick, 1), (0.1, source, 0)):
                exec(code, namespace)
                result = unittest.TestResult()
                unittest.defaultTestLoader.loadTestsFromTestCase(namespace["TestPage"]).run(result)
                self.assertEqual((len(result.failures), result.errors), (failures, []))

    def test_the_example_with_asyncio(self):
        with backend_server(echo) as (port, _):
            source = self.code_block("async with vaurien.Proxy")
            source = source.replace("localhost:6379", "127.0.0.1:%d" % port)
            source = source.replace("...", "connect(proxy.port).close()")
            namespace = {"vaurien": vaurien, "connect": connect}
            exec("async def main():\n" + textwrap.indent(source, "    "), namespace)
            loop = asyncio.new_event_loop()
            self.addCleanup(loop.close)
            loop.run_until_complete(namespace["main"]())

    def test_the_examples_with_vaurienctl(self):
        with proxy_with_control() as (_, client):
            session = self.code_block("$ vaurienctl set-rules")
            for command, output in re.findall(r"\$ vaurienctl (.*)\n([^$]*)", session):
                with self.subTest(command), contextlib.redirect_stdout(io.StringIO()) as out:
                    vaurien.main(["ctl", "--host", "http://localhost:%d" % client.port,
                                  *shlex.split(command)])
                self.assertEqual(out.getvalue().strip(), output.strip())

    def test_the_example_of_a_blocking_handler(self):
        namespace = {}
        page = read_text(os.path.join(HERE, ".github", "HANDLERS.md"))
        exec(self.code_block("import time\n    from vaurien.handlers", page), namespace)
        with registered(namespace["MySuperHandler"]), running_proxy(echo) as proxy, \
                connected_client(proxy) as sock:
            with proxy.handler("MySuperHandler", sleep=0):
                send_and_read(sock, b"question")
            self.assertEqual(proxy.faults, {"MySuperHandler": 1})

    @staticmethod
    def parse_curl(argv):
        """Return (method, target, body) of the request that a curl command sends.

        The body is the value of the option -d, which may be a part of the same argument.
        """
        method, body = "GET", ""
        for index, argument in enumerate(argv):
            if argument.startswith("-d"):
                method, body = "POST", argument[len("-d"):] or argv[index + 1]
        if "-X" in argv:
            method = argv[argv.index("-X") + 1]
        return method, argv[-1][len("http://localhost:8080"):], body

    def test_the_examples_with_curl(self):
        with proxy_with_control() as (proxy, _):
            control = vaurien.Control(("localhost", 0), proxy_table(proxy))
            for command, output in re.findall(r"\n    \$ curl (.*)\n    (?!\$)(.*)", self.text):
                # Replace the port of the example by any free port, and restore it in the output.
                command = command.replace("localhost:26379", "127.0.0.1:0")
                method, target, body = self.parse_curl(shlex.split(command))
                response = vaurien.handle_request(control, method, target, body.encode)
                self.assertEqual(re.sub("127.0.0.1:[0-9]+", "127.0.0.1:26379", response.text),
                                 output, command)
            control.proxies.remove(control.proxies["redis"])

    def test_the_example_of_a_handler(self):
        _, _, source = self.text.partition("into `mine.py`:\n\n")
        source, _, _ = source.partition("\nand run")
        namespace = {}
        exec(textwrap.dedent(source), namespace)
        with registered(namespace["stutter"]):
            chain = chain_of(vaurien.Rule("stutter", {"pause": 0.2}))
            reply = [(t, to, data) for t, to, data, _ in chain.process(
                1, DOWNSTREAM, b"leftright")]
            self.assertEqual(reply, [(1, DOWNSTREAM, b"left"), (1.2, DOWNSTREAM, b"right")])
            (t, to, data, _), *_ = chain.process(1, UPSTREAM, b"q")
            self.assertEqual((t, to, data), (1, UPSTREAM, b"q"))


# -- Hostile peers, exhausted resources, unusual systems ------------------------


class TestFloods(unittest.TestCase):
    """Buffered bytes have a limit under any load, and nothing leaks."""

    # Options with which a handler delays or forwards all bytes: {handler: {option: value}}
    OPTIONS = {
        "latency": {"latency": 3600000},
        "bandwidth": {"rate": 1},
        "slicer": {"average_size": 10, "delay": 1000000},
        "delay": {"sleep": 3600.0},
        "slow_close": {"delay": 1000},
        "limit_data": {"bytes": 1 << 60},
        "transient": {"agitate": 1 << 30},
    }

    def check_flood(self, handler):
        """Send up to 16 MiB through a rule to a backend that does not read them yet."""
        flood_size, piece = 16 << 20, bytes(256 << 10)
        reading_may_begin = threading.Event()

        def serve(sock):
            if reading_may_begin.wait(TIMEOUT):
                read_until_close(sock)

        options = {handler: self.OPTIONS.get(handler, {})}
        with mock.patch.object(vaurien, "HELD_MAX", 4 << 20), \
                running_proxy(serve, "100:" + handler, options=options) as proxy:
            budget = proxy.loop.budget
            with connected_client(proxy) as sock, contextlib.suppress(ConnectionError):
                sock.setblocking(False)
                sent = held_peak = 0
                while sent < flood_size and select.select([], [sock], [], 0.02)[1]:
                    sent += sock.send(piece)
                    held_peak = max(held_peak, budget.held)
                self.assertLessEqual(held_peak, vaurien.HELD_MAX + 2 * vaurien.KERNEL_PIPE_SIZE)
            reading_may_begin.set()
            proxy.loop.run_sync(proxy.set_rules, [])
            wait_until(lambda: not proxy.connections)
            timers = proxy.loop.run_sync(lambda: len(proxy.loop.timers))
            self.assertEqual((budget.held, budget.queues, timers), (0, 0, 0))

    def test_the_limit_of_a_connection_holds_with_each_handler(self):
        for name, function in HANDLERS.items():
            if not vaurien.is_blocking_handler(function):
                with self.subTest(name):
                    self.check_flood(name)

    def test_requests_and_replies_of_rules_have_a_limit(self):
        """A client that pipelined and did not read made the proxy hold 150 bytes for each byte."""
        limit, flood = 2 << 20, 64 << 20

        def read_silently(sock):
            while sock.recv(65536) and not stopped.is_set():
                pass

        for case, behavior, after in [("replies that the client does not read", "100:error", 0),
                                      ("replies behind an open request", "100:error", 1),
                                      ("requests without a reply", "100:dummy", 0)]:
            for protocol, request in ("redis", PING), ("http", HTTP_GET):
                stopped = threading.Event()
                with self.subTest(case, protocol=protocol), \
                        mock.patch.object(vaurien, "HELD_MAX", limit), \
                        running_proxy(read_silently, behavior, protocol=protocol,
                                      options={"error": {"after": after}}) as proxy, \
                        connected_client(proxy) as sock:
                    budget, sent, held_peak = proxy.loop.budget, 0, 0
                    sock.setblocking(False)
                    while sent < flood and select.select([], [sock], [], 0.05)[1]:
                        sent += sock.send(request * 1000)
                        held_peak = max(held_peak, budget.held)
                    self.assertLess(sent, flood)        # the client is not read any more
                    wait_until(lambda: budget.held > vaurien.HELD_MAX_IDLE // 2)
                    self.assertLess(max(held_peak, budget.held),
                                    limit + vaurien.PARSED_CHUNK * vaurien.EXPANSION)
                    proxy.loop.run_sync(proxy.drop_connections, "the test ends")
                    self.assertEqual((budget.held, budget.queues), (0, 0))
                    stopped.set()

    def test_reading_continues_when_the_client_reads_and_the_backend_replies(self):
        def reply(sock):
            size = 0
            for chunk in iter(lambda: sock.recv(65536), b""):
                count = (size + len(chunk)) // len(PING) - size // len(PING)
                size += len(chunk)
                sock.sendall(PONG * count)

        for behavior, answer in ("100:error", error_bytes("redis", "OOM")), ("100:dummy", PONG):
            with self.subTest(behavior), mock.patch.object(vaurien, "HELD_MAX", 1 << 16), \
                    running_proxy(reply, behavior, protocol="redis",
                                  options={"error": {"kind": "OOM"}}) as proxy, \
                    connected_client(proxy) as sock:
                received = send_and_read_all(sock, PING * 5000)
                self.assertEqual(received.size, 5000 * len(answer))

    def test_a_pipeline_is_parsed_in_small_pieces_and_a_body_is_not(self):
        """40,000 requests in one recv kept all other connections waiting for a second."""
        body_size = 4 << 20
        upload = b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % body_size + bytes(body_size)
        for protocol, data, is_small in ("redis", PING * 5000, True), ("http", upload, False):
            for behavior in "100:dummy", "0:delay":
                sizes = []

                class RecordingChain(vaurien.ProtocolChain):
                    def pass_through(self, to, data, sizes=sizes):
                        sizes.append(len(data))
                        return super().pass_through(to, data)

                with self.subTest(protocol, behavior=behavior), \
                        mock.patch.object(vaurien, "ProtocolChain", RecordingChain), \
                        running_proxy(read_until_close, behavior, protocol=protocol) as proxy:
                    with connected_client(proxy) as sock:
                        sock.sendall(data)
                        sock.shutdown(socket.SHUT_WR)
                        read_until_close(sock)
                    self.assertEqual(sum(sizes), len(data))
                    self.assertEqual(max(sizes) <= vaurien.PARSED_CHUNK, is_small)

    def test_the_limit_of_all_connections_holds(self):
        """Ten connections share the budget; each of them receives all its bytes."""
        total = 2 << 20
        options = {"delay": {"sleep": 0.03}}
        # The patch replaces the default of the argument `total`.
        with mock.patch.object(vaurien.Budget.__init__, "__defaults__", (total,)), \
                running_proxy(echo, "100:delay", options=options) as proxy, \
                contextlib.ExitStack() as stack:
            budget, held_sizes = proxy.loop.budget, []
            self.assertEqual(budget.total, total)
            socks = [stack.enter_context(connected_client(proxy)) for _ in range(10)]
            for sock in socks:
                sock.setblocking(False)
            sent = dict.fromkeys(socks, 0)

            def send_pieces():
                for sock in select.select([], socks, [], 0)[1]:
                    sent[sock] += sock.send(bytes(1 << 14))
                held_sizes.append(budget.held)

            def has_held_enough():
                send_pieces()
                return max(held_sizes) > total // 8

            wait_until(has_held_enough)
            for _ in range(50):
                send_pieces()
            self.assertLessEqual(max(held_sizes), total)
            for sock in socks:
                sock.settimeout(TIMEOUT)
                self.assertEqual(len(read_exactly(sock, sent[sock])), sent[sock])

    @staticmethod
    def open_fd_count():
        """Return how many descriptors this process has open, or 0 if /proc does not tell."""
        return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0

    def test_many_short_connections_leak_nothing(self):
        with running_proxy(echo) as proxy:
            def resources_after_100_connections():
                """Return the counts of (watched sockets, held bytes, timers)."""
                for _ in range(100):
                    with connected_client(proxy) as sock:
                        send_and_read(sock, b"question")
                wait_until(lambda: not proxy.connections)
                return proxy.loop.run_sync(lambda: (
                    len(proxy.loop.watched), proxy.loop.budget.held, len(proxy.loop.timers)))

            idle = (2, 0, 0)        # watched: the listener and the loop's wakeup socket
            self.assertEqual(resources_after_100_connections(), idle)
            fds_before = self.open_fd_count()
            self.assertEqual(resources_after_100_connections(), idle)
            wait_until(lambda: self.open_fd_count() <= fds_before)

    def reset_connection(self, proxy, command, resetter, hangs):
        """Connect, send a command to resetting_backend, and reset the connection.

        resetter    "client", "half-closed client", or "backend", which resets on command
        hangs       whether the proxy holds back the commands; then the client must reset
        """
        with contextlib.closing(connect(proxy.port)) as sock:
            sock.sendall(command)
            if resetter == "backend" and not hangs:
                sock.sendall(b"r")
                read_until_close(sock)
                return
            select.select([sock], [], [], 0.01)
            if resetter == "half-closed client":
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_WR)
            close_with_reset(sock)

    @staticmethod
    def resetting_backend(sock):
        """Serve a connection: the first command is one byte, and the second may be "r".

        The reply to "m" is 4 MiB, and to another byte the same byte. "r" is a reset.
        """
        with contextlib.suppress(OSError, EOFError):
            command = read_exactly(sock, 1)
            sock.sendall(bytes(4 << 20) if command == b"m" else command)
            if read_exactly(sock, 1) == b"r":
                close_with_reset(sock)
                return
            read_until_close(sock)

    def test_a_reset_of_either_side_in_the_middle_of_a_fault_leaks_nothing(self):
        cases = [
            ("dummy", {}, b"q"),
            ("dummy", {}, b"m"),
            ("latency", {"latency": 50}, b"m"),
            ("delay", {"sleep": 0.05}, b"q"),
            ("bandwidth", {"rate": 50000}, b"m"),
            ("slicer", {"average_size": 100}, b"m"),
            ("hang", {}, b"q"),
            ("Passes", {}, b"q"),
        ]
        with registered(Passes):
            for name, options, command in cases:
                with running_proxy(self.resetting_backend, "100:" + name,
                                   options={name: options} if options else None) as proxy:
                    for resetter in "client", "half-closed client", "backend":
                        with self.subTest(name, command=command, resetter=resetter):
                            self.reset_connection(proxy, command, resetter, name == "hang")
                    # The proxy does not read from a half-closed client, and a hang sends
                    # nothing to it. So the proxy notices its reset only after the hang.
                    if name == "hang":
                        proxy.loop.run_sync(proxy.set_rules, [])
                    with self.subTest(name, command=command):
                        wait_until(lambda: not proxy.connections)
                        budget = proxy.loop.budget
                        self.assertEqual((budget.held, budget.queues), (0, 0))
                        # The listener and the loop's wakeup socket
                        self.assertEqual(len(proxy.loop.watched), 2)

    def test_a_client_may_leave_while_the_proxy_connects_to_the_backend(self):
        with silent_address() as port, \
                OpenProxy("127.0.0.1:%d" % port, "127.0.0.1:0") as proxy:
            def phases():
                return [connection.phase for connection in list(proxy.connections.values())]

            for close in close_with_reset, socket.socket.close:
                with self.subTest(close.__name__), connected_client(proxy) as sock:
                    sock.sendall(b"question")
                    wait_until(lambda: phases() == [vaurien.CONNECTING])
                    close(sock)
                    if close is close_with_reset:
                        wait_until(lambda: not proxy.connections)
            proxy.loop.run_sync(proxy.drop_connections, "test")
            self.assertEqual((proxy.loop.budget.held, proxy.loop.budget.queues), (0, 0))


class TestDescriptors(TempDirTestCase):
    """The proxy waits while the process has no free descriptor."""

    def start_with_descriptors(self, stack, limit, port, backend_port, log_path, *arguments):
        """Start a proxy that may open `limit` descriptors, and wait until it listens.

        When it has none left, it tries again each 0.03 s.

        arguments    further ones of the command line

        Returns the process, which ends when `stack` is closed.
        """
        process = subprocess.Popen([
            "sh", "-c", "ulimit -n %d; exec \"$@\"" % limit, "sh", sys.executable, "-c",
            "import vaurien; vaurien.RETRY_DELAY = 0.03; vaurien.main()",
            "--local", "127.0.0.1:%d" % port, "--distant", "127.0.0.1:%d" % backend_port,
            "--log-output", log_path, *arguments], cwd=HERE)
        stack.callback(process.wait)
        stack.callback(process.terminate)
        wait_until(lambda: os.path.exists(log_path) and "listening" in read_text(log_path))
        return process

    @unittest.skipUnless(hasattr(os, "fork"), "no limit of descriptors on this system")
    def test_accepting_pauses_and_continues(self):
        log_path, port = os.path.join(self.folder, "log"), unused_port()
        with backend_server(echo) as (backend_port, _), contextlib.ExitStack() as stack:
            process = self.start_with_descriptors(stack, 64, port, backend_port, log_path)
            start, cpu_start = time.monotonic(), cpu_seconds(process.pid)
            socks = [stack.enter_context(contextlib.closing(connect(port))) for _ in range(60)]
            for sock in socks:
                sock.sendall(b"question")
            wait_until(lambda: "trying again" in read_text(log_path))
            accepted = self.wait_for_replies(socks)
            waiting = [sock for sock in socks if sock not in accepted]
            # The proxy serves these connections while it cannot accept the others.
            for sock in accepted:
                self.assertEqual(read_exactly(sock, 8), b"question")
                send_and_read(sock, b"again")
            self.assertTrue(10 < len(accepted) < 40, len(accepted))
            readable, _, _ = select.select(waiting[-5:], [], [], 0.1)
            self.assertEqual(readable, [])
            cpu_used = cpu_seconds(process.pid) - cpu_start
            self.assertLess(cpu_used, 0.5 * (time.monotonic() - start))     # no busy loop
            for sock in accepted:
                sock.close()
            # The proxy now accepts the waiting connections.
            for sock in waiting:
                self.assertEqual(read_exactly(sock, 8), b"question")
                sock.close()
            log = read_text(log_path)
            # One warning each 0.03 s
            self.assertLessEqual(log.count("\n"), (time.monotonic() - start) / 0.03 + 3, log)
            self.assertNotIn("cannot connect", log)
            self.assertIn("cannot accept on 127.0.0.1:%d: " % port, log)

    @unittest.skipUnless(hasattr(os, "fork"), "no limit of descriptors on this system")
    def test_the_control_server_has_descriptors_of_its_own(self):
        """It removes the fault whose connections have used up all others."""
        log_path, port, http_port = os.path.join(self.folder, "log"), unused_port(), unused_port()
        with backend_server(echo) as (backend_port, _), contextlib.ExitStack() as stack:
            self.start_with_descriptors(
                stack, 80, port, backend_port, log_path, "--behavior", "100:hang", "--http",
                "--http-port", "%d" % http_port)
            for _ in range(60):
                with contextlib.closing(connect(port)) as sock:     # gives up, politely
                    sock.sendall(b"question")
            wait_until(lambda: "trying again" in read_text(log_path))
            client = vaurien.Client(port=http_port)
            for _ in range(10):
                self.assertEqual(client.get_handler(), "hang")
            client.set_handler("dummy")
            with contextlib.closing(connect(port)) as sock:
                send_and_read(sock, b"question")

    def test_clients_that_wait_too_long_are_reset(self):
        """So two proxies that are the backends of each other give back all descriptors."""
        self.addCleanup(setattr, vaurien.Loop, "fds_exhausted", False)
        with mock.patch.object(vaurien, "ACCEPT_TIMEOUT", 0.1), \
                mock.patch.object(vaurien, "RETRY_DELAY", 0.02), \
                OpenProxy("127.0.0.1:1", "127.0.0.1:0") as first, \
                OpenProxy("127.0.0.1:%d" % first.port, "127.0.0.1:0") as second:
            first.set_backend("127.0.0.1:%d" % second.port)
            fd = os.open(os.devnull, os.O_RDONLY)
            os.close(fd)
            first.loop.fd_limit = second.loop.fd_limit = fd + 50
            with connected_client(first) as sock:
                sock.sendall(b"question")
                wait_until(lambda: vaurien.Loop.fds_exhausted)
            wait_until(lambda: not first.connections and not second.connections)
            self.assertGreater(first.accepted, 5)

    @unittest.skipUnless(hasattr(os, "fork"), "no limit of descriptors on this system")
    def test_a_limit_that_is_too_low_is_one_line_and_status_1(self):
        process = subprocess.run(
            ["sh", "-c", "ulimit -n 24; exec \"$@\"", "sh", sys.executable, "-m", "vaurien",
             "--local", "localhost:0"], cwd=HERE, stderr=subprocess.PIPE, universal_newlines=True)
        self.assertEqual(process.returncode, 1)
        self.assertEqual(process.stderr, "vaurien: 24 descriptors are too few: at least 32 are "
                                         "needed (ulimit -n)\n")

    @staticmethod
    def wait_for_replies(socks):
        """Wait for replies until none has arrived for 0.1 s. Returns the sockets with a reply."""
        with_reply = []
        while True:
            without_reply = [sock for sock in socks if sock not in with_reply]
            readable, _, _ = select.select(without_reply, [], [], 0.1)
            if not readable:
                return with_reply
            with_reply += readable

    @contextlib.contextmanager
    def no_descriptor_for_connects(self, count):
        """Let the first `count` connects to a backend fail, as if no descriptor were free."""
        real_start_connect, failed = vaurien.start_connect, []

        def start_connect(*args):
            if len(failed) < count:
                failed.append(args)
                raise OSError(errno.EMFILE, "Too many open files")
            return real_start_connect(*args)

        with mock.patch.object(vaurien, "start_connect", start_connect):
            yield

    def test_the_timer_of_a_connect_that_waited_for_a_descriptor_is_cancelled(self):
        self.addCleanup(setattr, vaurien.Loop, "fds_exhausted", False)
        with backend_server(echo) as (port, _), \
                OpenProxy("some.example:1", "127.0.0.1:0", timeout=0.1) as proxy:
            addresses = [(socket.AF_INET, ("127.0.0.1", port))]
            with mock.patch.object(vaurien, "RETRY_DELAY", 0.02), \
                    self.no_descriptor_for_connects(1), \
                    mock.patch.object(vaurien, "resolve", lambda *args, **kwargs: addresses), \
                    connected_client(proxy) as sock:
                start = time.monotonic()
                while time.monotonic() < start + 0.15:
                    send_and_read(sock, b"question")
                timers = proxy.loop.run_sync(lambda: len(proxy.loop.timers))
                self.assertEqual((proxy.failures, timers), (0, 0))

    def test_a_connect_waits_for_a_descriptor_until_the_timeout(self):
        self.addCleanup(setattr, vaurien.Loop, "fds_exhausted", False)
        for case, failing_connects, timeout, reply, seconds_min in [
                ("a descriptor gets free", 1, TIMEOUT, b"question", 0.02),
                ("no descriptor gets free", math.inf, 0.15, b"", 0.13)]:
            with self.subTest(case), mock.patch.object(vaurien, "RETRY_DELAY", 0.02), \
                    running_proxy(echo, timeout=timeout) as proxy:
                with self.no_descriptor_for_connects(failing_connects), \
                        connected_client(proxy) as sock:
                    start = time.monotonic()
                    sock.sendall(b"question")
                    self.assertEqual(sock.recv(100), reply)
                    self.assertGreaterEqual(time.monotonic() - start, seconds_min)
                self.assertTrue(vaurien.Loop.fds_exhausted)

    @contextlib.contextmanager
    def full_selector(self, loop, refused):
        """Refuse to watch the new sockets with these numbers: 1 is the next new socket.

        The kernel does so at a limit for all processes of a user (fs.epoll.max_user_watches).
        """
        real_watch, numbers = loop.watch, itertools.count(1)

        def watch(sock, *args):
            is_new = sock.fileno() not in loop.watched
            if is_new and next(numbers) in refused:
                raise OSError(errno.ENOSPC, "No space left on device")
            real_watch(sock, *args)

        with mock.patch.object(loop, "watch", watch):
            yield

    def test_a_socket_that_cannot_be_watched_ends_its_own_connection_only(self):
        for by_name in True, False:     # a name is resolved later, an address connects at once
            with contextlib.ExitStack() as stack:
                port, _ = stack.enter_context(backend_server(echo))
                backend = "some.example:1" if by_name else "127.0.0.1:%d" % port
                proxy = stack.enter_context(OpenProxy(backend, "127.0.0.1:0"))
                stack.enter_context(mock.patch.object(vaurien, "resolve", lambda *args, **kwargs: [
                    (socket.AF_INET, ("127.0.0.1", port))]))
                open_before = stack.enter_context(connected_client(proxy))
                send_and_read(open_before, b"question")
                for number, case in enumerate(["the client's socket", "the backend's socket"], 1):
                    with self.subTest(case, by_name=by_name), \
                            self.full_selector(proxy.loop, [number]), \
                            self.assertLogs("vaurien", "WARNING") as logged:
                        # connect() itself may meet the reset.
                        with contextlib.suppress(ConnectionResetError), \
                                connected_client(proxy) as sock:
                            self.assertEqual(read_until_close(sock).ending, "reset")
                        send_and_read(open_before, b"question")
                        with connected_client(proxy) as sock:
                            send_and_read(sock, b"question")
                        self.assertIn("cannot be watched: No space left", logged.output[0])

    def test_a_socket_that_cannot_be_watched_leaves_no_timer_and_no_bytes(self):
        """The client has sent the beginning of a head, for which a timer waits."""
        with backend_server(echo) as (port, _), \
                OpenProxy("127.0.0.1:%d" % port, "127.0.0.1:0", "100:delay", protocol="http",
                          options={"delay": {"sleep": 0.2}}) as proxy, \
                self.full_selector(proxy.loop, [2]), \
                self.assertLogs("vaurien", "WARNING"):
            with connected_client(proxy) as sock:
                sock.sendall(b"GET / HT")
                self.assertEqual(read_until_close(sock).ending, "reset")
            wait_until(lambda: not proxy.connections)
            self.assertEqual(proxy.loop.run_sync(lambda: (
                proxy.loop.timers, proxy.loop.budget.held, proxy.loop.budget.queues)), ([], 0, 0))

    def test_a_listener_that_cannot_be_watched_again_tries_again(self):
        with running_proxy(echo) as proxy, mock.patch.object(vaurien, "RETRY_DELAY", 0.02):
            with self.full_selector(proxy.loop, [1, 2]), \
                    self.assertLogs("vaurien", "WARNING") as logged:
                proxy.loop.run_sync(proxy.listener.pause, proxy.listener.sockets[0], "a test")
                with connected_client(proxy) as sock:
                    send_and_read(sock, b"question")
            self.assertIn("No space left", logged.output[-1])


UnusualSystem = namedtuple("UnusualSystem", "command popen_options closed_fds")


class TestUnusualSystems(TempDirTestCase):
    """The program starts, forwards bytes and exits with 0 on systems that lack something."""

    # This program removes the optional parts of the standard library, then runs vaurien.py.
    BARE_PROGRAM = """
import errno, os, runpy, select, signal, socket, sys
for module, names in [
        (select, "epoll poll kqueue devpoll"),
        (os, "splice pipe2 fork sched_getaffinity"),
        (socket, "SOCK_NONBLOCK SOCK_CLOEXEC")]:
    for name in names.split():
        module.__dict__.pop(name, None)
for name in "fcntl", "resource", "pwd", "ssl":
    sys.modules[name] = None
import selectors
selectors.DefaultSelector = selectors.SelectSelector
class NoIPv6(socket.socket):
""" + inspect.getsource(NoIPv6.__init__) + """
socket.socket = NoIPv6
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""

    def systems(self):
        """Return {name: UnusualSystem}."""
        unusual_folder = os.path.join(self.folder, "a folder, voil\xe0")
        read_only_folder = os.path.join(self.folder, "read-only")
        os.mkdir(unusual_folder)
        os.mkdir(read_only_folder, 0o555)
        copy = shutil.copy(FILE, os.path.join(unusual_folder, "vaurien.py"))
        small_env = {name: value for name, value in os.environ.items()
                     if name not in ("HOME", "LANG", "LC_ALL", "PYTHONIOENCODING", "PYTHONUTF8")}
        c_env = dict(small_env, LC_ALL="C", PYTHONCOERCECLOCALE="0")
        bad_path = os.pathsep.join([self.folder + "/nope", "\x01", FILE, HERE, unusual_folder])
        path_env = dict(os.environ, PYTHONPATH=bad_path)
        log_to_full_disk = ["--log-output", "/dev/full"] if os.path.exists("/dev/full") else []
        python = sys.executable
        module, in_here = [python, "-m", "vaurien"], {"cwd": HERE}
        systems = {
            "-OO": UnusualSystem([python, "-OO", FILE], {}, []),
            "-I, no site": UnusualSystem([python, "-I", "-S", FILE], {}, []),   # -I implies -E
            "locale C": UnusualSystem([python, copy], {"env": c_env}, []),
            "read-only, no home": UnusualSystem(
                [python, copy], {"cwd": read_only_folder, "env": small_env}, []),
            "PYTHONPATH": UnusualSystem(module, {"env": path_env}, []),
            "stdin closed": UnusualSystem(module, in_here, [0]),
            "stdout closed": UnusualSystem(module, in_here, [1]),
            "all closed": UnusualSystem(module, in_here, [0, 1, 2]),
            "the disk is full": UnusualSystem([*module, *log_to_full_disk], in_here, []),
            "bare": UnusualSystem([python, "-c", self.BARE_PROGRAM, "vaurien"], in_here, []),
        }
        # Descriptors are closed by a preexec_fn, which only POSIX systems support.
        return {name: system for name, system in systems.items()
                if os.name == "posix" or not system.closed_fds}

    def start(self, stack, backend_port, system):
        """Start the program on a system, until `stack` is closed. Returns (port, process)."""
        def close_descriptors():
            for fd in system.closed_fds:
                os.close(fd)

        port = unused_port()
        popen_options = dict(system.popen_options)
        if system.closed_fds:
            popen_options["preexec_fn"] = close_descriptors
        process = subprocess.Popen(
            [*system.command, "--local", "localhost:%d" % port,
             "--distant", "localhost:%d" % backend_port,
             "--behavior", "50:delay", "--handlers.delay.sleep", "0.001",
             "--http", "--http-port", "0"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            **popen_options)
        stack.callback(process.stderr.close)
        stack.callback(process.wait)
        stack.callback(process.kill)
        return port, process

    def check(self, port, process):
        """Check that the program listens, forwards bytes and exits with 0 on SIGTERM."""
        def is_listening():
            if process.poll() is not None:
                self.fail("status %d: %s" % (process.returncode, process.stderr.read()))
            try:
                connect(port).close()
            except OSError:
                return False
            return True

        wait_until(is_listening)
        with contextlib.closing(connect(port)) as sock:
            for index in range(10):
                send_and_read(sock, random_data(1 + index * 1000))
        process.terminate()
        _, err = process.communicate(timeout=TIMEOUT)
        self.assertEqual(process.returncode, 0, err)
        self.assertNotIn(b"Traceback", err)

    def test_the_program_works_on_each_system(self):
        with backend_server(echo) as (backend_port, _), contextlib.ExitStack() as stack:
            started_systems = {name: self.start(stack, backend_port, system)
                               for name, system in self.systems().items()}
            for name, (port, process) in started_systems.items():
                with self.subTest(name):
                    self.check(port, process)

    def test_the_program_works_outside_the_main_thread(self):
        """Python lets only the main thread set handlers of OS signals."""
        with backend_server(echo) as (backend_port, _):
            port, loops = unused_port(), []

            class RecordedLoop(vaurien.Loop):
                def __init__(self):
                    super().__init__()
                    loops.append(self)

            argv = ["--local", "127.0.0.1:%d" % port, "--distant", "127.0.0.1:%d" % backend_port]
            with mock.patch.object(vaurien, "Loop", RecordedLoop), \
                    mock.patch.object(vaurien, "start_log"):
                thread = threading.Thread(target=vaurien.main, args=(argv,))
                thread.start()
                wait_until(lambda: loops)
                loop, = loops
                # The loop then watches its wakeup socket and the listener.
                wait_until(lambda: len(loop.watched) == 2)
                with contextlib.closing(connect(port)) as sock:
                    send_and_read(sock, b"question")
                loop.stop()
                thread.join(TIMEOUT)
                self.assertFalse(thread.is_alive())


class TestUnusualInput(TempDirTestCase):
    """Unusual files, folders, expressions, exceptions, terminals and servers."""

    def run_main(self, *argv):
        """Run the program. Returns its status, and the only line that it wrote to stderr."""
        err = io.StringIO()
        with contextlib.redirect_stderr(err):
            status = vaurien.main(list(argv))
        line, = err.getvalue().splitlines()
        self.assertTrue(line.isprintable(), line)
        return status, line

    def test_a_bad_file_is_one_line_and_status_2(self):
        for case, text, pattern in [
                ("token without http",
                 "[vaurien]\nhttp-token = x\n",
                 "http-token needs --http"),
                ("empty list",
                 "[]",
                 "defines no proxy: add one, or set --http"),
                ("long name",
                 "[proxy:%s]\nlocal=:0\n" % ("x" * 300),
                 "must be at most 255 printable characters"),
                ("control character in a name",
                 "[proxy:a\x1b[31m]\nlocal=:0\n",
                 "printable characters"),
                ("kind without a protocol",
                 "[vaurien]\nlocal=:0\n"
                 "[toxic:x]\ntype=error\nkind=abc\n",
                 r"\[toxic:x\] kind needs --protocol: tcp"),
                ("kind of another protocol",
                 "[proxy:p]\nlocal=:0\nprotocol=redis\nbehavior=1:error\n"
                 "[handler:error]\nkind=abc\n",
                 r"\[proxy:p\] kind must be one of LOADING"),
                ("address in the second proxy",
                 '[{"name": "a", "upstream": "x:1"}, {"name": "b", "upstream": "x:y z"}]',
                 "at proxy 2")]:
            with self.subTest(case):
                status, line = self.run_main("--config", self.write("v.ini", text))
                self.assertEqual(status, 2, line)
                self.assertRegex(line, pattern)

    def test_the_current_folder_may_be_deleted(self):
        os.mkdir("gone")
        os.chdir("gone")
        os.rmdir("../gone")
        status, line = self.run_main("--behavior", "20:foo.bar")
        self.assertEqual(status, 2)
        self.assertIn("--behavior cannot import 'foo.bar'", line)

    def test_check_match_emits_no_warning_of_python(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            self.assertTrue(vaurien.check_match("[[a]").search(b"a"))

    def test_print_safe_writes_characters_that_the_terminal_cannot_encode(self):
        for encoding in "ascii", "latin-1", "utf-8":
            with self.subTest(encoding):
                out = io.TextIOWrapper(io.BytesIO(), encoding)
                vaurien.print_safe("voil\xe0 \u2603", out)
                self.assertIn(b"voil", out.buffer.getvalue())
        vaurien.print_safe("no output", None)

    def test_format_exception_of_an_exception_whose_str_raises(self):
        class Unprintable(Exception):
            def __str__(self):
                raise ZeroDivisionError

        self.assertEqual(vaurien.format_exception(Unprintable()), "Unprintable")
        self.assertEqual(vaurien.format_exception(ValueError("x")), "ValueError: x")

    def test_ctl_names_the_server_that_is_not_vaurien(self):
        head = (b"HTTP/1.0 200 OK\r\n"
                b"Content-Type: application/json\r\n"
                b"Content-Length: %d\r\n"
                b"\r\n")
        for body in b"[" * 100000, b"{", b'{"x": 1}':
            def serve(sock):
                sock.recv(65536)
                sock.sendall(head % len(body) + body)

            with self.subTest(body[:10]), backend_server(serve) as (port, _):
                host = "127.0.0.1:%d" % port
                status, line = self.run_main("ctl", "--host", host, "get-handler")
                self.assertEqual(status, 1)
                self.assertIn(host, line)

    def test_a_python_without_ssl_supports_http_alone(self):
        with proxy_with_control() as (_, client), \
                mock.patch.object(http.client, "HTTPSConnection", create=True):
            del http.client.HTTPSConnection
            self.assertEqual(client.get_handler(), "dummy")
            with self.assertRaisesRegex(ValueError, "scheme must be http or https"):
                vaurien.Client(scheme="https").get_handler()
            http.client.HTTPSConnection = None      # without ssl, the patch deletes this attribute


class TestEnvironmentChanges(unittest.TestCase):
    """The backend or the clock changes while the proxy runs."""

    def test_a_backend_may_restart(self):
        port = unused_port()
        with OpenProxy("127.0.0.1:%d" % port, "127.0.0.1:0") as proxy:
            for _ in range(3):
                with connected_client(proxy) as sock:       # the backend refuses the connection
                    self.assertEqual(read_until_close(sock).size, 0)
                listener = listening_socket(port)
                with connected_client(proxy) as sock, contextlib.closing(listener):
                    backend, _ = listener.accept()
                    sock.sendall(b"question")
                    self.assertEqual(read_exactly(backend, 8), b"question")
                    backend.sendall(b"answer")
                    self.assertEqual(read_exactly(sock, 6), b"answer")
                    close_with_reset(backend)
                    self.assertEqual(read_until_close(sock).ending, "reset")
            self.assertEqual(proxy.failures, 3)

    def test_a_backend_may_move_to_another_address(self):
        """The name of the backend is resolved for each client."""
        with backend_server(lambda sock: sock.sendall(b"one")) as (port_one, _), \
                backend_server(lambda sock: sock.sendall(b"two")) as (port_two, _), \
                OpenProxy("moves.example:1", "127.0.0.1:0") as proxy:
            for port, reply in (port_one, b"one"), (port_two, b"two"), (port_one, b"one"):
                addresses = [(socket.AF_INET, ("127.0.0.1", port))]
                with mock.patch.object(vaurien, "resolve", lambda *args, **kwargs: addresses), \
                        connected_client(proxy) as sock:
                    self.assertEqual(read_exactly(sock, 3), reply)

    def test_a_jump_of_the_system_clock_changes_no_delay(self):
        with running_proxy(echo, "100:delay", options={"delay": {"sleep": 0.02}}) as proxy, \
                connected_client(proxy) as sock:
            send_and_read(sock, b"question")
            for now in 0.0, 4e9, -1e9:
                with self.subTest(now), mock.patch.object(time, "time", lambda now=now: now):
                    start = time.monotonic()
                    send_and_read(sock, b"question")
                    self.assertGreaterEqual(time.monotonic() - start, 0.02)
            self.assertEqual([event.time for event in proxy.events()][1:], [0.0, 4e9, -1e9])


class TestHypothesis(unittest.TestCase):
    """Bad input that hypothesis generates. The number of examples is VAURIEN_EXAMPLES."""

    def setUp(self):
        import hypothesis
        self.hypothesis = hypothesis
        self.strategies = hypothesis.strategies
        suppressed = list(hypothesis.HealthCheck) if sys.version_info >= (3, 8) else []
        self.settings = hypothesis.settings(
            max_examples=int(os.environ["VAURIEN_EXAMPLES"]), deadline=None, database=None,
            suppress_health_check=suppressed)

    def call_with_examples(self, function, strategy):
        """Call a function with many values that a strategy generates."""
        self.hypothesis.given(strategy)(self.settings(function))()

    def json_values(self):
        """Return a strategy for nested values that JSON can represent."""
        st = self.strategies
        scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text()

        def containers(items):
            return (st.lists(items, max_size=3)
                    | st.dictionaries(st.text(max_size=8), items, max_size=3))
        return st.recursive(scalars, containers, max_leaves=8)

    def test_text_is_valid_or_a_value_error(self):
        for parse in [vaurien.parse_address, vaurien.parse_behavior, vaurien.check_match,
                      vaurien.parse_host, vaurien.check_names, vaurien.expand_env]:
            def check(text):
                with contextlib.suppress(ValueError):
                    parse(text)

            with self.subTest(parse.__name__):
                self.call_with_examples(check, self.strategies.text())

    def test_json_is_valid_or_an_error_of_the_api(self):
        def check(value):
            with contextlib.suppress(vaurien.ApiError, vaurien.InputError):
                vaurien.read_toxic(vaurien.read_json(json.dumps(value)), strict=True)
            with contextlib.suppress(vaurien.ApiError, vaurien.InputError):
                vaurien.read_proxy_fields(vaurien.read_json(json.dumps(value)))
            if isinstance(value, dict):
                with contextlib.suppress(vaurien.InputError):
                    vaurien.read_rules([value])

        self.call_with_examples(check, self.json_values())

    def test_no_path_is_an_internal_error(self):
        control = vaurien.Control(("localhost", 0), vaurien.ProxyTable([], seed=1))

        def check(text):
            response = vaurien.handle_request(control, "GET", "/" + text, no_body)
            self.assertLess(response.status, 500)

        self.call_with_examples(check, self.strategies.text())

    def test_message_boundaries_are_within_the_data(self):
        def check(data):
            for name, protocol in vaurien.PROTOCOLS.items():
                if not protocol:        # tcp has no framers
                    continue
                parser = protocol()
                for framer in parser.request_framer, parser.reply_framer:
                    with contextlib.suppress(vaurien.ProtocolError):
                        for offset, _ in framer.feed(data, len(data)):
                            self.assertTrue(0 <= offset <= len(data), name)

        self.call_with_examples(check, self.strategies.binary(max_size=300))


if "VAURIEN_EXAMPLES" not in os.environ:        # these tests are slow
    del TestHypothesis


class TestFuzz(TempDirTestCase):
    """Random input: each result is valid or a documented error."""

    FRAGMENTS = [
        # characters, numbers and hosts
        "", " ", "localhost", ":", "80", "[::1]", "0.0.0.0", "-1", "99999", "1e999", "nan", "inf",
        "\0", "\n", "\xe0", "\u2603", "\ud800", "/", "%", "${X}",
        # behaviors and JSON
        "20:delay", "error", ",", "{", "}", "[", "]", '"', "name", "percent", "match", "(", "null",
        "1" * 500, "x" * 10240,
        # ini files
        "=", "#", ";", "proxy:a", "vaurien", "handler:delay", "sleep", "toxic:t", "type",
        "latency", "local", "behavior",
        # paths
        "?", "&", "proxies", "toxics", "true", "-", ".", "callable",
    ]

    def random_text(self, rng):
        """Return up to 8 fragments, joined."""
        return "".join(rng.choice(self.FRAGMENTS) for _ in range(rng.randint(0, 8)))

    def test_texts_and_values_of_options_are_valid_or_a_value_error(self):
        text_checks = [
            vaurien.parse_address, vaurien.parse_listener, vaurien.parse_behavior,
            vaurien.parse_host, vaurien.check_match, vaurien.check_names, vaurien.check_token,
            vaurien.check_host, vaurien.check_file, vaurien.check_log_level, vaurien.check_yes_no,
            vaurien.expand_env, vaurien.check_protocol]
        value_checks = [
            vaurien.check_count, vaurien.check_percent, vaurien.check_port,
            vaurien.check_timeout, vaurien.check_toxicity,
            *(functools.partial(vaurien.check_option, name, option)
              for name, function in HANDLERS.items()
              for option in vaurien.handler_options(function))]
        rng = random.Random(1)
        for _ in range(100):
            text = self.random_text(rng)
            for check in text_checks + value_checks:
                with self.subTest(str(check), text=ascii(text)):
                    try:
                        check(text)
                    except ValueError as error:
                        self.assertTrue(str(error))
        for value in [None, True, [], {}, -1, 1.5, float("nan"), float("inf"), -float("inf"),
                      10 ** 400, b"x"]:
            for check in value_checks:
                with self.subTest(str(check), value=value), contextlib.suppress(ValueError):
                    check(value)

    def test_files_are_valid_or_a_value_error(self):
        templates = [
            "[%s]",
            "%s",
            "%s = 1",
            "sleep = %s",
            "[proxy:%s]\nlocal = :0",
            "[handler:%s]",
            "[toxic:%s]",
            "behavior = %s",
        ]
        rng = random.Random(2)
        for _ in range(200):
            text = "\n".join(rng.choice(templates) % self.random_text(rng)
                             for _ in range(rng.randint(1, 5)))
            text = text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
            path = self.write("random.ini", text)
            with self.subTest(text=ascii(text)), contextlib.suppress(ValueError):
                vaurien.make_proxies(vaurien.read_arguments(["--config", path], vaurien.SETTINGS))

    def random_json(self, rng):
        """Return the text of a JSON object of up to 4 fields."""
        names = ["name", "listen", "upstream", "toxics", "type", "enabled", "percent", "rules",
                 "backend"]
        values = [-1, 1e308, 10 ** 30, None, True, [], [{}], {"a": []}]
        fields = {}
        for _ in range(rng.randint(0, 4)):
            value = rng.choice([self.random_text(rng), *values])
            fields[rng.choice([*names, self.random_text(rng)])] = value
        return json.dumps(fields)

    def random_request(self, rng):
        """Return the arguments of handle_request: (method, path, read_body, headers)."""
        path = rng.choice(list(vaurien.ROUTES))
        if rng.random() < 0.5:
            path = path.replace("PROXY", self.random_text(rng))
            path = path.replace("TOXIC", self.random_text(rng))
            path += "?" + self.random_text(rng)
        if rng.random() < 0.3:
            body = self.random_text(rng)
        else:
            body = self.random_json(rng)
        headers = {}
        if rng.random() < 0.1:
            name = rng.choice(["Host", "Origin", "User-Agent", "Authorization",
                                     "Sec-Fetch-Site"])
            headers[name] = self.random_text(rng)
        method = rng.choice(["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD",
                                   self.random_text(rng)])
        read_body = functools.partial(body.encode, "utf-8", "surrogatepass")
        return method, path, read_body, headers

    def test_requests_have_a_response_and_no_internal_error(self):
        proxies = vaurien.ProxyTable([], seed=1)
        proxies.loop = mock.Mock(capacity_error=lambda: "closed for the test",
                                 call=lambda function, *args: function(*args))
        control = vaurien.Control(("localhost", 0), proxies)
        rng, statuses = random.Random(3), set()
        for index in range(2000):
            request = self.random_request(rng)
            with self.subTest(index, request=ascii(request)):
                response = vaurien.handle_request(control, *request)
                statuses.add(response.status)
                if response.status == 500:
                    self.assertIn("closed for the test", response.text)
        common = {400, 403, 404, 405}
        self.assertEqual(common - statuses, set())
        self.assertTrue(statuses - common - {200})      # there is at least one other


# -- Soak -----------------------------------------------------------------------
#
# Random conversations pass through random faults, which are added, changed and removed
# meanwhile. Each peer must receive the bytes that the other peer sent, in order and from the
# first one on. It must receive all of them, unless a fault or a peer has cut the connection.
# The seed determines the data and the faults. `.ci/soak.py` runs this for longer than TestSoak.

# Toxics that deliver all bytes in the end: {type: {attribute: mean value}}
PRESERVING_TOXICS = {
    "dummy": {},
    "noop": {},
    "hang": {},                     # delivers the bytes when the toxic is removed
    "delay": {"sleep": 0.01},
    "latency": {"latency": 20, "jitter": 20},
    "bandwidth": {"rate": 20000, "shared": True},
    "packet_loss": {"loss_rate": 0.01, "rtt": 2},
    "slicer": {"average_size": 2000, "size_variation": 1000, "delay": 50},
    "slow_close": {"delay": 20},
}
# Toxics that may end a connection early: {type: {attribute: mean value}}. Their `per` is
# "connection": for one request they would drop bytes in the middle, if another toxic delays the
# end of the connection and the next request passes meanwhile.
CUTTING_TOXICS = {
    "blackout": {},
    "abort": {},
    "timeout": {"timeout": 30},
    "reset_peer": {"timeout": 20},
    "limit_data": {"bytes": 100000},
    "cut": {"bytes": 100000},
}
ONE_OR_MORE = ("rate", "average_size")      # attributes that cannot be 0
BOTH_STREAMS = ("blackout", "abort", "hang", "delay", "dummy")      # their stream is "both"
SOAK_DATA_MAX = 1 << 21             # bytes of one direction of a conversation

# The data that a peer sends, whether it resets the connection afterwards, its random numbers
SoakPlan = namedtuple("SoakPlan", "data resets rng")


class SoakProxy(OpenProxy):
    """A proxy that keeps for each closed connection its faults and why it was closed."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.closed = {}            # {client's address: (names of handlers, reason)}
        on_connection_closed = self._server.on_connection_closed

        def record_closed(connection, reason):
            on_connection_closed(connection, reason)
            self.closed[connection.name] = set(connection.faults), reason

        self._server.on_connection_closed = record_closed


class SoakPeer:
    """One end of a conversation: it sends random pieces of its data while it receives."""

    def __init__(self, sock, plan):
        self.sock = sock
        self.data, self.resets, self.rng = plan
        self.read_size = self.rng.choice([100, 4096, 1 << 18])
        self.received = bytearray()
        self.sent = 0                   # bytes of the data
        self.write_closed = False
        self.paused_until = 0.0         # time before which no bytes are sent

    def run(self):
        """Send and receive until the connection ends. Returns the ending.

        The ending is "eof", "reset" (by either peer) or "timeout".
        """
        try:
            self.sock.setblocking(False)
            ending = self.exchange()
            if ending == "eof" and not self.write_closed:       # the other peer still reads
                self.sock.settimeout(TIMEOUT)
                self.sock.sendall(self.data[self.sent:])
                self.close_write()
            return ending
        except BlockingIOError:
            return "timeout"
        except OSError:
            return "reset"

    def exchange(self):
        """Send and receive until the other peer closes, or this one resets the connection.

        Returns "eof", "reset" or "timeout". Raises OSError if the other peer resets.
        """
        while True:
            paused = not self.write_closed and time.monotonic() < self.paused_until
            writers = [] if paused or self.write_closed else [self.sock]
            timeout = 0.001 if paused else 4 * TIMEOUT
            readable, writable, _ = select.select([self.sock], writers, [], timeout)
            if writable:
                self.send_piece()
                if self.sock.fileno() == -1:        # close_write has reset the connection
                    return "reset"
            if readable:
                data = self.sock.recv(self.read_size)
                if not data:
                    return "eof"
                self.received += data
            elif not writable and not paused:
                return "timeout"

    def send_piece(self):
        """Send some of the remaining data. If none remains, call close_write."""
        if self.sent == len(self.data):
            self.close_write()
            return
        size = self.rng.randint(1, self.rng.choice([10, 1000, 1 << 18]))
        self.sent += self.sock.send(self.data[self.sent:self.sent + size])
        if self.rng.random() < 0.1:
            self.paused_until = time.monotonic() + self.rng.random() / 100

    def close_write(self):
        """Shut down the sending side, or reset the connection if the plan says so."""
        self.write_closed = True
        if self.resets:
            close_with_reset(self.sock)
        else:
            self.sock.shutdown(socket.SHUT_WR)


class Soak:
    """Conversations in several threads through a proxy whose toxics change all the time.

    count     {"conversations": count, "bytes": count received, "chains": count of changes,
              "cut" and "reset": count of conversations that a fault or a peer has ended}
    errors    a sentence for each error; the first one stops the run
    """

    def __init__(self, seed):
        self.seed = seed
        self.pool = random_data(SOAK_DATA_MAX, seed)
        self.backend_results = {}       # {index: (bytes received, ending)}
        self.count = Counter()
        self.errors = []
        self.stopped = threading.Event()

    def plan(self, index, side):
        """Return the SoakPlan of a side, "client" or "backend", of a conversation."""
        rng = random.Random("%d %d %s" % (self.seed, index, side))
        large = SOAK_DATA_MAX if rng.random() < 0.1 else 300000
        size = rng.randint(0, rng.choice([0, 1, 100, 5000, 100000, large]))
        start = rng.randint(0, SOAK_DATA_MAX - size)
        return SoakPlan(self.pool[start:start + size], rng.random() < 0.1, rng)

    def serve(self, sock):
        """Serve a connection of the backend. The client first sends the conversation's index."""
        with contextlib.suppress(OSError, EOFError):
            index, = struct.unpack(">Q", read_exactly(sock, 8))
            peer = SoakPeer(sock, self.plan(index, "backend"))
            ending = peer.run()
            self.backend_results[index] = bytes(peer.received), ending

    def converse(self, proxy, index):
        """Run a conversation through the proxy, and check the bytes both peers have received."""
        plans = {side: self.plan(index, side) for side in ("client", "backend")}
        with contextlib.closing(connect(proxy.port)) as sock:
            client_address = vaurien.format_address(sock.getsockname())
            with contextlib.suppress(OSError):
                sock.sendall(struct.pack(">Q", index))
            client = SoakPeer(sock, plans["client"])
            client_ending = client.run()
        wait_until(lambda: client_address in proxy.closed)
        faults, reason = proxy.closed.pop(client_address)
        cut = not faults.isdisjoint(CUTTING_TOXICS)
        reset = plans["client"].resets or plans["backend"].resets
        whole = not cut and not reset
        if whole:
            wait_until(lambda: index in self.backend_results)
        results = {"client": (bytes(client.received), client_ending),
                   "backend": self.backend_results.pop(index, (b"", "eof"))}
        for side, sender in ("client", "backend"), ("backend", "client"):
            received, ending = results[side]
            error = self.compare(plans[sender].data, received, ending, whole)
            if error:
                self.errors.append("conversation %d: the %s %s, faults %s, ended: %s" % (
                    index, side, error, sorted(faults), reason))
            self.count["bytes"] += len(received)
        self.count.update(conversations=1, cut=cut, reset=reset)

    @staticmethod
    def compare(sent, received, ending, whole):
        """Compare the bytes a peer received with the bytes sent. Returns an error, or None.

        whole    whether all bytes and the EOF must have arrived; otherwise a prefix is enough
        """
        is_complete = received == sent and ending == "eof"
        is_prefix = sent.startswith(received) and ending != "timeout"
        if is_complete or (is_prefix and not whole):
            return None
        differences = (offset for offset, (received_byte, sent_byte)
                       in enumerate(zip(received, sent)) if received_byte != sent_byte)
        difference = next(differences, "none")
        return "received %d of %d bytes (%s, first difference at %s)" % (
            len(received), len(sent), ending, difference)

    def random_toxics(self, rng):
        """Return random toxics; most of them deliver all bytes."""
        return [self.random_toxic(rng, index)
                for index in range(rng.choice([0, 0, 1, 1, 2, 3, 4]))]

    def random_toxic(self, rng, index):
        """Return a random toxic. The index makes its name unique."""
        mean_values = CUTTING_TOXICS if rng.random() < 0.1 else PRESERVING_TOXICS
        type_ = rng.choice(sorted(mean_values))
        attributes = {}
        for attribute, mean_value in mean_values[type_].items():
            value = type(mean_value)(mean_value * rng.random() * 2)     # an int or a float
            attributes[attribute] = max(1, value) if attribute in ONE_OR_MORE else value
        stream = rng.choice(["upstream", "downstream", "both"])
        return vaurien.Toxic(type_, "%s %d" % (type_, index),
                             toxicity=rng.choice([0.2, 1.0]), attributes=attributes,
                             stream="both" if type_ in BOTH_STREAMS else stream,
                             per="connection" if mean_values is CUTTING_TOXICS else
                             rng.choice(["connection", "request"]),
                             after=rng.choice([0, 0, 3]),
                             times=rng.choice([0, 0, 5]))

    def run(self, seconds, workers=8):
        """Run for this time, or until the first error. Returns the errors."""
        with backend_server(self.serve) as (port, _), SoakProxy(
                "127.0.0.1:%d" % port, "127.0.0.1:0", seed=self.seed) as proxy:
            indexes = itertools.count(1)        # next() is atomic
            threads = [threading.Thread(target=self.work, args=(proxy, indexes), daemon=True)
                       for _ in range(workers)]
            for thread in threads:
                thread.start()
            self.change_toxics(proxy, seconds)
            self.stopped.set()
            for thread in threads:
                thread.join(8 * TIMEOUT)
            wait_until(lambda: not proxy.connections)
            self.check_leaks(proxy.loop)
        return self.errors

    def work(self, proxy, indexes):
        """Run one conversation after another, in a thread of its own."""
        while not self.stopped.is_set() and not self.errors:
            try:
                self.converse(proxy, next(indexes))
            except Exception as exc:
                self.errors.append(repr(exc))

    def change_toxics(self, proxy, seconds):
        """Change the toxics again and again for this time, and remove them in the end."""
        rng = random.Random(self.seed)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self.errors:
            proxy.loop.run_sync(proxy.set_toxics, self.random_toxics(rng))
            self.count["chains"] += 1
            self.stopped.wait(rng.random() / 20)
        proxy.loop.run_sync(proxy.set_toxics, [])

    def check_leaks(self, loop):
        """Add an error unless the loop is as it was before the first connection.

        It still watches the proxy's listener and its own wakeup socket.
        """
        counts = loop.run_sync(lambda: (loop.budget.held, loop.budget.queues, len(loop.watched),
                                        len(loop.timers)))
        if counts != (0, 0, 2, 0):
            self.errors.append("left over: %d bytes held, %d delay queues, %d sockets watched, "
                               "%d timers" % counts)


class TestSoak(unittest.TestCase):
    """Short runs of Soak, and runs in which it must detect an error."""

    def test_a_short_run_has_no_errors(self):
        for seed, splice in (1, vaurien.HAVE_SPLICE), (2, False):
            with self.subTest(seed=seed), mock.patch.object(vaurien, "HAVE_SPLICE", splice):
                soak = Soak(seed)
                self.assertEqual(soak.run(0.2), [])
                self.assertGreater(soak.count["conversations"], 5)

    def run_with_handler(self, function):
        """Run Soak while a handler acts on all connections. Returns the errors."""
        def toxics(self, rng):
            return [vaurien.Toxic(function.__name__, "x")]

        with registered(function), mock.patch.object(Soak, "random_toxics", toxics):
            return Soak(1).run(TIMEOUT)

    def test_a_changed_byte_is_an_error(self):
        def change(state, t, to, data):
            if len(data) > 1000:
                middle = 500
                changed_byte = bytes([data[middle] ^ 1])
                data = data[:middle] + changed_byte + data[middle + 1:]
            yield t, to, data

        first_error, *_ = self.run_with_handler(change)
        self.assertRegex(first_error, "first difference at [0-9]+")

    def test_a_lost_byte_is_an_error(self):
        def lose(state, t, to, data):
            yield t, to, data[:-1] if len(data) > 1 else data

        self.assertTrue(self.run_with_handler(lose))


# -- Real clients of Toxiproxy --------------------------------------------------


class TestToxiproxyClients(ToxiproxyTestCase):
    """Client libraries of Toxiproxy control this server."""

    def test_python(self):
        """toxiproxy-python, from PyPI."""
        toxiproxy = import_package("toxiproxy")
        exceptions = import_package("toxiproxy.exceptions")
        server = toxiproxy.Toxiproxy()
        server.update_api_consumer("127.0.0.1", self.port)
        self.assertTrue(server.running())
        self.assertIn(b"version", server.version())
        upstream, _ = self.start_backend()
        proxy = server.create(upstream=upstream, name="p")
        port = self.port_of({"listen": proxy.listen})
        send_and_read(self.connect(port), b"question")
        with self.assertRaises(exceptions.ProxyExists):
            toxiproxy.api.APIConsumer.post("/proxies", json={"name": "p", "upstream": upstream})
        proxy.add_toxic(type="latency", attributes={"latency": 50})
        self.assertEqual(proxy.get_toxic("latency_downstream").attributes,
                         {"latency": 50, "jitter": 0})
        began = time.monotonic()
        send_and_read(self.connect(port), b"question")
        self.assertGreaterEqual(time.monotonic() - began, 0.05)
        with self.assertRaises(exceptions.InvalidToxic):
            proxy.add_toxic(type="nope")
        with proxy.down(), self.assertRaises(ConnectionRefusedError):
            connect(port)
        proxy.disable()
        server.reset()
        self.assertEqual(proxy.toxics(), {})
        send_and_read(self.connect(port), b"question")
        proxy.add_toxic(type="noop", stream="upstream")
        self.assertTrue(proxy.destroy_toxic("noop_upstream"))
        populated, = server.populate([
            {"name": "a", "upstream": upstream, "listen": "127.0.0.1:0"}])
        port = self.port_of({"listen": populated.listen})
        send_and_read(self.connect(port), b"question")
        self.assertEqual(set(server.proxies()), {"p", "a"})
        server.destroy_all()
        self.assertEqual(server.proxies(), {})
        with self.assertRaises(exceptions.NotFound):
            proxy.destroy()

    # The arguments of this script are the URL of the control server and the backend's address.
    NODE_SCRIPT = """
        const assert = require("assert");
        const {Toxiproxy} = require("toxiproxy-node-client");
        (async () => {
            const server = new Toxiproxy(process.argv[2]), upstream = process.argv[3];
            assert.match(await server.getVersion(), /version/);
            const fields = {name: "p", listen: "localhost:0", upstream};
            const proxy = await server.createProxy(fields);
            const attributesOf = {
                latency: {latency: 1000, jitter: 100},
                bandwidth: {rate: 1000},
                slow_close: {delay: 1000},
                timeout: {timeout: 5000},
                slicer: {average_size: 1000, delay: 1000, size_variation: 1000},
                reset_peer: {timeout: 1000},
                limit_data: {bytes: 42},
            };
            for (const type in attributesOf) {
                const attributes = attributesOf[type];
                const toxic = await proxy.addToxic({type, attributes});
                assert.deepEqual(toxic.attributes, attributes);
                assert.deepEqual((await proxy.getToxic(toxic.name)).toJson(), toxic.toJson());
                const changed = await toxic.update({toxicity: 0.5, attributes: {}});
                assert.deepEqual([changed.toxicity, changed.attributes], [0.5, attributes]);
                await changed.remove();
            }
            await assert.rejects(server.createProxy(fields), /status code 409/);
            await assert.rejects(proxy.getToxic("latency_downstream"), /status code 404/);
            const listen = proxy.listen;
            const disabled = await proxy.update({enabled: false, listen, upstream});
            assert.equal(disabled.enabled, false);
            const moved = await proxy.update({enabled: true, listen, upstream: "somehost:12345"});
            assert.deepEqual([moved.enabled, moved.upstream], [true, "somehost:12345"]);
            const both = await server.populate([
                {name: "a", listen: "127.0.0.1:0", upstream},
                {name: "b", listen: "127.0.0.1:0", upstream},
            ]);
            assert.deepEqual(Object.keys(both), ["a", "b"]);
            await server.reset();
            const all = await server.getAll();
            assert.deepEqual(Object.keys(all), ["a", "b", "p"]);
            for (const name in all) { await all[name].remove(); }
            console.log("done");
        })().catch(error => { console.error(error); process.exit(1); });
    """

    def test_node(self):
        """toxiproxy-node-client, from npm, in a folder of NODE_PATH or in the current folder."""
        node = shutil.which("node")
        if not node or subprocess.call([node, "-e", "require('toxiproxy-node-client'); fetch"],
                                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
            raise unittest.SkipTest("no toxiproxy-node-client")
        upstream, _ = self.start_backend()
        output = subprocess.check_output(
            [node, "-", "http://127.0.0.1:%d" % self.port, upstream], input=self.NODE_SCRIPT,
            universal_newlines=True, timeout=TIMEOUT, stderr=subprocess.STDOUT)
        self.assertEqual(output, "done\n")


# -- Real servers with their real drivers ---------------------------------------


LARGE_VALUE = 33 << 20      # bytes: more than two of MySQL's largest packets, of 16 MiB


class RealServerTests:
    """Tests of a proxy between a real driver and a real server: the same for each backend.

    A subclass has these methods:

        start_server()          start the server on cls.port and return its process
        connect(port, timeout)  return a connected client of the driver
        query(client, value)    let the server evaluate an integer and return the result
        transfer(client, data)  let the server send this data, and return the data received

    It has these attributes. Each error is (kind of the fault, path of the exception that the
    driver raises, part of its text); the path is relative to the driver's package.

        driver_name, protocol   the driver's package, and the protocol of the proxy
        errors                  a list of errors after which the connection is usable
        closing_errors          a list of errors after which the connection is closed
        connect_errors          a list of errors while connecting
        connection_lost         the exception that the driver raises for a lost connection
        timed_out               the exception that it raises when no reply comes in time
    """

    value_size = 8 << 20            # bytes of the value that passes in protocol tcp
    framed_value_size = 4 << 20     # bytes of the value that passes in the server's protocol
    has_rows = False                # whether query_rows gets rows
    reconnects = False              # whether the driver opens a new connection after an error
    backend_tls = False             # whether the server takes part in TLS

    process = folder = None

    @classmethod
    def start(cls):
        """Begin to start the server on an unused port."""
        cls.folder = cls.folder or make_server_folder()
        cls.port = unused_port()
        try:
            cls.process = cls.start_server()
        except BaseException:
            cls.stop()
            raise

    @classmethod
    def stop(cls):
        cls.stop_server()
        shutil.rmtree(cls.folder, ignore_errors=True)

    @classmethod
    def setUpClass(cls):
        cls.driver = cls.import_driver()
        try:
            for _ in range(3):      # another process may have bound the port first
                start_or_wait(cls)
                if cls.wait_until_ready():
                    return
                cls.stop_server()
            raise AssertionError("%s: the server does not start" % cls.__name__)
        except BaseException:
            cls.tearDownClass()
            raise

    @classmethod
    def tearDownClass(cls):
        cls.stop()

    @classmethod
    def stop_server(cls):
        if cls.process:
            cls.process.kill()
            cls.process.wait()

    @classmethod
    def import_driver(cls):
        return import_package(cls.driver_name)

    @classmethod
    def wait_until_ready(cls):
        """Wait for a query to succeed. Returns False if the server exits, or on timeout."""
        deadline = time.monotonic() + TIMEOUT
        while time.monotonic() < deadline and cls.process.poll() is None:
            try:
                client = cls.connect(cls.port)
                try:
                    cls.query(client, 1)
                    return True
                finally:
                    cls.disconnect(client)
            except Exception:
                time.sleep(0.02)
        return False

    @classmethod
    def popen(cls, *argv, **kwargs):
        """Start a program of the server. Skips the tests if its path is None."""
        if not argv[0]:
            raise unittest.SkipTest("%s: no server" % cls.__name__)
        return subprocess.Popen(argv, cwd=cls.folder, stdin=subprocess.DEVNULL,
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **kwargs)

    def start_proxy(self, behavior="100:dummy", protocol="tcp", **options):
        """Start a proxy before the server, until the end of the test. Returns the proxy.

        options    {handler: {option: value}}
        """
        # Some drivers use TLS if the server has it.
        tls = {"cert": "auto", "verify": False} if self.backend_tls and protocol != "tcp" else {}
        proxy = OpenProxy("127.0.0.1:%d" % self.port, "127.0.0.1:0", behavior, options,
                              protocol=protocol, seed=1, tls=tls)
        proxy.__enter__()
        self.addCleanup(proxy.__exit__)
        return proxy

    def connect_client(self, proxy, timeout=TIMEOUT):
        """Connect through a proxy, until the end of the test. Returns the driver's client."""
        client = self.connect(proxy.port, timeout)
        self.addCleanup(self.disconnect, client)
        return client

    @staticmethod
    def disconnect(client):
        with contextlib.suppress(Exception):
            client.close()

    def error_class(self, paths):
        """Return the first of these exception classes that this version of the driver has.

        paths    separated by slashes, and relative to the driver's package
        """
        for path in paths.split("/"):
            module, _, name = ("%s.%s" % (self.driver_name, path)).rpartition(".")
            with contextlib.suppress(AttributeError):
                return getattr(importlib.import_module(module), name)
        raise AssertionError("%s has none of %s" % (self.driver_name, paths))

    @staticmethod
    def value(size):
        """Return a value of this size: random bytes, then random hexadecimal digits.

        MariaDB takes half as long to parse digits as to parse other bytes.
        """
        return random_data(1 << 20, 7) + random_data((size - (1 << 20)) // 2, 8).hex().encode()

    def test_hundreds_of_queries_pass(self):
        client = self.connect_client(self.start_proxy())
        for value in range(300):
            self.assertEqual(self.query(client, value), value)

    def test_hundreds_of_queries_pass_on_the_slow_path(self):
        client = self.connect_client(self.start_proxy("100:delay", delay={"sleep": 0.0}))
        for value in range(300):
            self.assertEqual(self.query(client, value), value)

    def test_a_large_value_passes_unchanged(self):
        data = self.value(self.value_size)
        client = self.connect_client(self.start_proxy("100:delay", delay={"sleep": 0.001}))
        with mock.patch.object(vaurien, "HELD_MAX", 1 << 20):       # less than the value
            # assertEqual would format both values when they differ.
            self.assertTrue(self.transfer(client, data) == data)

    def test_queries_and_a_large_value_pass_in_the_servers_protocol(self):
        data = self.value(self.framed_value_size)
        # Without a rule, and with a rule that is never drawn
        for behavior in "100:dummy", "0:hang":
            with self.subTest(behavior):
                client = self.connect_client(self.start_proxy(behavior, self.protocol))
                for value in range(50):
                    self.assertEqual(self.query(client, value), value)
                self.assertTrue(self.transfer(client, data) == data)

    def test_the_driver_raises_its_own_error_and_the_next_query_works(self):
        """The next query uses the same connection, unless the driver opens a new one."""
        for kind, exception_path, text in self.errors:
            with self.subTest(kind):
                proxy = self.start_proxy(protocol=self.protocol)
                client = self.connect_client(proxy)
                self.query(client, 1)
                with proxy.handler("error", kind=kind):
                    with self.assertRaises(self.error_class(exception_path)) as caught:
                        self.query(client, 2)
                    self.assertIn(text, str(caught.exception))
                    self.assertIs(type(caught.exception), self.error_class(exception_path))
                self.assertEqual(self.query(client, 3), 3)
                self.assertEqual(proxy.accepted, 1 + self.reconnects)

    def test_the_driver_raises_its_own_error_and_the_next_connection_works(self):
        for kind, exception_path, text in self.closing_errors:
            with self.subTest(kind):
                proxy = self.start_proxy(protocol=self.protocol)
                client = self.connect_client(proxy)
                self.query(client, 1)
                with proxy.handler("error", kind=kind):
                    with self.assertRaises(self.error_class(exception_path)) as caught:
                        self.query(client, 2)
                    self.assertRegex(str(caught.exception), text)
                self.assertEqual(self.query(self.connect_client(proxy), 3), 3)

    def test_the_driver_raises_its_own_error_while_connecting(self):
        for kind, exception_path, text in self.connect_errors:
            with self.subTest(kind):
                proxy = self.start_proxy(protocol=self.protocol)
                with proxy.handler("error", kind=kind):
                    with self.assertRaises(self.error_class(exception_path)) as caught:
                        self.query(self.connect_client(proxy), 2)
                    self.assertRegex(str(caught.exception), text)
                self.assertEqual(self.query(self.connect_client(proxy), 3), 3)

    def test_the_driver_raises_its_own_error_beyond_max_connections(self):
        kind = vaurien.PROTOCOLS[self.protocol].overload_error
        exception_path, text = {error_kind: rest for error_kind, *rest in
                                [*self.errors, *self.connect_errors]}[kind]
        proxy = self.start_proxy(protocol=self.protocol)
        proxy._server.max_connections = 1
        with connected_client(proxy):
            wait_until(lambda: proxy.connections)
            with self.assertRaises(self.error_class(exception_path)) as caught:
                self.query(self.connect_client(proxy), 2)
            self.assertRegex(str(caught.exception), text)
            self.assertEqual((proxy.refused > 0, proxy.events()), (True, []))
        wait_until(lambda: len(proxy.connections) == len(proxy.open_refused))
        self.assertEqual(self.query(self.connect_client(proxy), 3), 3)

    def test_a_transient_error_occurs_twice_and_then_the_query_succeeds(self):
        kind, exception_path, _ = self.errors[0]
        proxy = self.start_proxy(protocol=self.protocol)
        client = self.connect_client(proxy)
        self.query(client, 1)
        with proxy.handler("transient", agitate=2, kind=kind):
            for _ in range(2):
                with self.assertRaises(self.error_class(exception_path)):
                    self.query(client, 2)
            self.assertEqual(self.query(client, 3), 3)

    def test_the_driver_reports_a_blackout_as_a_lost_connection(self):
        proxy = self.start_proxy()
        client = self.connect_client(proxy)
        self.query(client, 1)
        set_behavior(proxy, "100:blackout")
        with self.assertRaises(self.connection_lost):
            self.query(client, 2)
        with self.assertRaises(self.connection_lost):
            self.query(self.connect_client(proxy), 3)
        self.assertGreaterEqual(proxy.faults["blackout"], 2)

    def test_the_driver_reports_a_reply_that_is_cut_as_a_lost_connection(self):
        for how in "close", "reset":
            for options in {"bytes": 5}, {"rows": 2}, {"rows": 2, "bytes": 2}:
                if "rows" in options and not self.has_rows:
                    continue
                with self.subTest(how, **options):
                    proxy = self.start_proxy(protocol=self.protocol)
                    client = self.connect_client(proxy)
                    self.assertEqual(self.query_rows(client), [1, 2, 3, 4])
                    with proxy.handler("cut", how=how, **options):
                        with self.assertRaises(self.reply_cut):
                            self.query_rows(client)
                    self.assertEqual(proxy.faults, {"cut": 1})
                    self.assertEqual(self.query_rows(self.connect_client(proxy)), [1, 2, 3, 4])

    def test_a_reply_with_fewer_rows_than_a_cut_passes(self):
        if not self.has_rows:
            return
        proxy = self.start_proxy(protocol=self.protocol)
        client = self.connect_client(proxy)
        self.query_rows(client)
        with proxy.handler("cut", rows=5):
            self.assertEqual(self.query_rows(client), [1, 2, 3, 4])
        self.assertEqual(proxy.faults, {})

    @property
    def reply_cut(self):
        """The exception that the driver raises if the server dies in the middle of a reply."""
        return self.connection_lost

    @classmethod
    def query_rows(cls, client):
        """Let the server reply with 4 rows, if the protocol has rows. Returns them."""
        return [cls.query(client, value) for value in (1, 2, 3, 4)]

    def test_a_query_is_delayed(self):
        proxy = self.start_proxy()
        client = self.connect_client(proxy)
        self.query(client, 1)
        set_behavior(proxy, "100:delay", delay={"sleep": 0.03})
        began = time.monotonic()
        self.assertEqual(self.query(client, 2), 2)
        self.assertGreaterEqual(time.monotonic() - began, 0.03)

    def test_the_driver_times_out_when_a_query_hangs(self):
        proxy = self.start_proxy()
        client = self.connect_client(proxy, timeout=0.15)
        self.query(client, 1)
        set_behavior(proxy, "100:hang")
        with self.assertRaises(self.timed_out):
            self.query_with_timeout(client, proxy)
        set_behavior(proxy, "100:dummy")
        self.assertEqual(self.query(self.connect_client(proxy), 3), 3)

    def query_with_timeout(self, client, proxy):
        """Send a request that times out, because the proxy hangs.

        client    has a timeout of 0.15 seconds
        proxy     for a subclass whose driver has a timeout only for connecting
        """
        return self.query(client, 2)

    def test_a_hanging_query_completes_when_the_fault_is_removed(self):
        proxy, results = self.start_proxy(), []
        client = self.connect_client(proxy)
        self.query(client, 1)
        set_behavior(proxy, "100:hang")
        thread = threading.Thread(target=lambda: results.append(self.query(client, 2)))
        thread.start()
        wait_until(lambda: proxy.loop.budget.held)
        self.assertEqual(results, [])
        set_behavior(proxy, "100:dummy")
        thread.join(TIMEOUT)
        self.assertEqual(results, [2])
        self.assertEqual(self.query(client, 3), 3)


class RealTlsTests(RealServerTests):
    """Tests of a driver that uses TLS. A subclass has connect_tls(port, path of the CA) too."""

    @classmethod
    def write_tls_files(cls):
        """Write a certificate of the server with its key, and the CA. Returns their paths."""
        paths = [os.path.join(cls.folder, name) for name in ("server.pem", "ca.pem")]
        for path, text in zip(paths, [vaurien.AUTHORITY.issue("127.0.0.1"),
                                      vaurien.AUTHORITY.pem()]):
            with open(path, "w") as file:
                file.write(text)
            os.chmod(path, 0o600 if path == paths[0] else 0o644)
        return paths

    def test_errors_on_encrypted_connections(self):
        _, ca = self.write_tls_files()
        tls = {"cert": "auto", "ca": ca}
        with OpenProxy("127.0.0.1:%d" % self.port, "127.0.0.1:0", protocol=self.protocol,
                       tls=tls) as proxy:
            client = self.connect_tls(proxy.port, ca)
            self.addCleanup(self.disconnect, client)
            for value in range(100):
                self.assertEqual(self.query(client, value), value)
            for kind, exception, text in self.errors:
                with self.subTest(kind):
                    with proxy.handler("error", kind=kind), self.assertRaisesRegex(
                            self.error_class(exception), text):
                        self.query(client, 1)
                    self.assertEqual(self.query(client, 2), 2)
            with proxy.handler("delay", sleep=0.01):
                other = self.connect_tls(proxy.port, ca)
                self.assertEqual(self.query(other, 3), 3)
                self.disconnect(other)
            connection = proxy.connections[1]
            sockets = [connection.client] + [connection.backend] * self.backend_tls
            self.assertEqual({type(sock) for sock in sockets}, {vaurien.TlsSocket})
            self.disconnect(client)


class TestHTTP(RealServerTests, unittest.TestCase):
    """http.client and http.server, of the standard library."""

    driver_name = "http.client"
    protocol = "http"
    framed_value_size = RealServerTests.value_size      # the server has one file
    reconnects = True
    errors = [(kind, "HTTPException", kind) for kind in ("500", "502", "503", "504", "429")]
    closing_errors = []
    connect_errors = []
    connection_lost = (ConnectionError, http.client.BadStatusLine)
    reply_cut = (ConnectionError, http.client.HTTPException)
    timed_out = socket.timeout

    @classmethod
    def start_server(cls):
        for value in range(300):
            with open(os.path.join(cls.folder, str(value)), "w") as file:
                file.write(str(value))
        with open(os.path.join(cls.folder, "large"), "wb") as file:
            file.write(cls.value(cls.value_size))
        return cls.popen(sys.executable, "-W", "ignore", "-m", "http.server", str(cls.port),
                         "--bind", "127.0.0.1")

    @classmethod
    def connect(cls, port, timeout=TIMEOUT):
        return http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)

    @classmethod
    def query(cls, client, value):
        client.request("GET", "/%d" % value)
        response = client.getresponse()
        text = response.read()
        if response.status != 200:
            raise http.client.HTTPException("%d %s" % (response.status, response.reason))
        return int(text)

    def transfer(self, client, data):
        client.request("GET", "/large")
        return client.getresponse().read()


class TestRedis(RealTlsTests, unittest.TestCase):
    """redis-py and Redis."""

    driver_name = "redis"
    protocol = "redis"
    has_rows = True
    errors = [
        ("OOM", "exceptions.OutOfMemoryError/exceptions.ResponseError", "maxmemory"),
        ("READONLY", "exceptions.ReadOnlyError", "read only replica"),
        ("BUSY", "exceptions.ResponseError", "BUSY Redis is busy running a script"),
        ("NOREPLICAS", "exceptions.ResponseError", "NOREPLICAS")]
    # The driver closes the connection when it receives LOADING.
    closing_errors = [("LOADING", "exceptions.BusyLoadingError", "loading the dataset")]
    # redis-py 4 does not read an error that arrives before its first command.
    connect_errors = [("MAXCLIENTS", "exceptions.ConnectionError",
                       "max number of clients|Connection not ready")]

    @property
    def connection_lost(self):
        return self.driver.exceptions.ConnectionError

    @property
    def timed_out(self):
        return self.driver.exceptions.TimeoutError

    @classmethod
    def start_server(cls):
        return cls.popen(find_program("redis-server"), "--port", str(cls.port),
                         "--bind", "127.0.0.1", "--save", "", "--dir", cls.folder)

    @classmethod
    def connect(cls, port, timeout=TIMEOUT, **ssl_arguments):
        from redis.backoff import NoBackoff
        from redis.retry import Retry
        return cls.driver.Redis("127.0.0.1", port, socket_timeout=timeout,
                                retry=Retry(NoBackoff(), 0), **ssl_arguments)

    @classmethod
    def connect_tls(cls, port, ca):
        return cls.connect(port, ssl=True, ssl_ca_certs=ca)

    @classmethod
    def query(cls, client, value):
        client.set("key", value)
        return int(client.get("key"))

    def transfer(self, client, data):
        client.set("large", data)
        return client.get("large")

    @classmethod
    def query_rows(cls, client):
        client.delete("rows")
        client.rpush("rows", 1, 2, 3, 4)
        return [int(row) for row in client.lrange("rows", 0, -1)]

    def test_only_the_commands_of_a_pipeline_that_were_drawn_fail(self):
        proxy = self.start_proxy(protocol="redis")
        client = self.connect_client(proxy)
        client.flushall()
        with proxy.handler("error", percent=20, kind="OOM"):
            pipeline = client.pipeline(transaction=False)
            for index in range(100):
                pipeline.set("n%d" % index, index)
            results = pipeline.execute(raise_on_error=False)
        failed = [index for index, result in enumerate(results) if isinstance(result, Exception)]
        # Other commands precede the pipeline. This is the number of its first command.
        first_request = min(event.request for event in proxy.events()) - failed[0]
        self.assertEqual([event.request - first_request for event in proxy.events()], failed)
        self.assertTrue(5 < len(failed) < 40)
        missing = [index for index in range(100) if client.get("n%d" % index) is None]
        self.assertEqual(missing, failed)

    def test_a_command_that_fails_in_a_transaction_aborts_it(self):
        proxy = self.start_proxy(protocol="redis")
        client = self.connect_client(proxy)
        client.delete("k", "m")
        with proxy.handler("error", kind="OOM", match="(?i)^set m"):
            pipeline = client.pipeline(transaction=True)
            pipeline.set("k", 1)
            pipeline.set("m", 1)
            with self.assertRaises(self.driver.exceptions.ResponseError):
                pipeline.execute()
        self.assertIsNone(client.get("k"))
        self.assertIsNone(client.get("m"))
        self.assertEqual(self.query(client, 5), 5)

    def test_subscriptions_pass(self):
        client = self.connect_client(self.start_proxy("0:hang", "redis"))
        subscriber = client.pubsub()
        self.addCleanup(subscriber.close)
        subscriber.subscribe("here")
        self.assertEqual(subscriber.get_message(timeout=TIMEOUT)["type"], "subscribe")
        client.publish("here", "hello")
        self.assertEqual(subscriber.get_message(timeout=TIMEOUT)["data"], b"hello")


class TestMemcached(RealServerTests, unittest.TestCase):
    """pymemcache and memcached."""

    driver_name = "pymemcache"
    protocol = "memcache"
    reconnects = True
    errors = [
        ("SERVER_ERROR", "exceptions.MemcacheServerError", "out of memory"),
        ("OUT_OF_MEMORY", "exceptions.MemcacheServerError", "storing object"),
        ("CLIENT_ERROR", "exceptions.MemcacheClientError", "bad data chunk")]
    closing_errors = []
    connect_errors = [("TOO_MANY", "exceptions.MemcacheUnknownCommandError", ".*")]
    timed_out = socket.timeout

    @property
    def connection_lost(self):
        return (ConnectionError, self.driver.exceptions.MemcacheUnexpectedCloseError)

    @classmethod
    def start_server(cls):
        user = ["-u", "nobody"] * (os.getuid() == 0)
        return cls.popen(find_program("memcached"), "-p", str(cls.port), "-l", "127.0.0.1",
                         "-U", "0", "-I", "128m", "-m", "1024", *user)

    @classmethod
    def connect(cls, port, timeout=TIMEOUT):
        return cls.driver.Client(("127.0.0.1", port), connect_timeout=timeout, timeout=timeout)

    @classmethod
    def query(cls, client, value):
        client.set("key", str(value), noreply=False)
        return int(client.get("key"))

    def transfer(self, client, data):
        client.set("large", data, noreply=False)
        return client.get("large")


class TestPostgreSQL(RealTlsTests, unittest.TestCase):
    """psycopg, pg8000 and PostgreSQL."""

    driver_name = "psycopg"
    protocol = "postgres"
    has_rows = True
    errors = [
        ("40P01", "errors.DeadlockDetected", "deadlock detected"),
        ("57014", "errors.QueryCanceled", "statement timeout"),
        ("40001", "errors.SerializationFailure", "could not serialize"),
        ("53100", "errors.DiskFull", "No space left")]
    closing_errors = [
        ("57P01", "OperationalError", "administrator command"),
        ("57P05", "OperationalError", "idle-session")]
    connect_errors = [
        ("53300", "OperationalError", "too many clients"),
        ("57P03", "OperationalError", "starting up")]

    @property
    def connection_lost(self):
        return self.driver.OperationalError

    timed_out = connection_lost

    @classmethod
    def start_server(cls):
        if not find_program("initdb"):
            raise unittest.SkipTest("no PostgreSQL server")
        user = popen_user_kwargs("postgres")
        data = os.path.join(cls.folder, "data%d" % cls.port)
        certificate, _ = cls.write_tls_files()
        if user:
            shutil.chown(cls.folder, "postgres")
            shutil.chown(certificate, "postgres")
        initdb = cls.popen(find_program("initdb"), "-D", data, "-A", "trust", "-U", "postgres",
                           "--no-sync", "-E", "UTF8", "--locale=C", **user)
        initdb.wait(TIMEOUT)
        return cls.popen(find_program("postgres"), "-D", data, "-p", str(cls.port),
                         "-h", "127.0.0.1", "-k", cls.folder, "-c", "fsync=off",
                         "-c", "dynamic_shared_memory_type=mmap", "-c", "ssl=on",
                         "-c", "ssl_cert_file=" + certificate, "-c", "ssl_key_file=" + certificate,
                         **user)

    @classmethod
    def connect(cls, port, timeout=TIMEOUT, sslmode="disable", **ssl_arguments):
        return cls.driver.connect(host="localhost", hostaddr="127.0.0.1", port=port,
                                  user="postgres", dbname="postgres",
                                  connect_timeout=max(2, int(timeout)), autocommit=True,
                                  sslmode=sslmode, gssencmode="disable", **ssl_arguments)

    backend_tls = True

    @classmethod
    def connect_tls(cls, port, ca):
        return cls.connect(port, sslmode="verify-full", sslrootcert=ca)

    def connect_pg8000(self, port):
        import pg8000.native
        client = pg8000.native.Connection("postgres", host="127.0.0.1", port=port)
        self.addCleanup(self.disconnect, client)
        return client

    @classmethod
    def query(cls, client, value):
        return client.execute("SELECT %s::int", (value,)).fetchone()[0]

    @classmethod
    def setUpClass(cls):
        cls.driver = cls.import_driver()
        # The driver limits only the time to connect, to 2 s or more. Meanwhile, the server starts,
        # and other tests run.
        cls.hanging_proxy = OpenProxy("127.0.0.1:1", behavior="100:hang").start()
        cls.hanging_connect = ThreadedCall(cls.connect, cls.hanging_proxy.port, 2).__enter__()
        super().setUpClass()

    @classmethod
    def tearDownClass(cls):
        cls.hanging_proxy.stop()
        cls.hanging_connect.__exit__()
        super().tearDownClass()

    def query_with_timeout(self, client, proxy):
        self.hanging_connect.result()

    def transfer(self, client, data):
        return client.execute("SELECT %b::bytea", (data,), binary=True).fetchone()[0]

    @classmethod
    def query_rows(cls, client):
        return [row for row, in client.execute("SELECT generate_series(1, 4)").fetchall()]

    def client_with_empty_table(self, proxy):
        """Return a client. Its database has an empty table t with the column i."""
        client = self.connect_client(proxy)
        client.execute("DROP TABLE IF EXISTS t")
        client.execute("CREATE TABLE t (i int)")
        return client

    def test_a_transaction_fails_as_a_whole(self):
        proxy = self.start_proxy(protocol="postgres")
        client = self.client_with_empty_table(proxy)
        for query, parameters in [("INSERT INTO t VALUES (2)", None),
                                  ("INSERT INTO t VALUES (%s)", (2,))]:
            with self.subTest(query):
                client.execute("BEGIN")
                client.execute("INSERT INTO t VALUES (1)")
                with proxy.handler("error", kind="40001", match="^INSERT"), \
                        self.assertRaises(self.driver.errors.SerializationFailure):
                    client.execute(query, parameters)
                with self.assertRaises(self.driver.errors.InFailedSqlTransaction):
                    client.execute("SELECT 1")
                client.execute("ROLLBACK")
                self.assertEqual(client.execute("SELECT count(*) FROM t").fetchone()[0], 0)

    def test_match_applies_to_the_text_of_a_prepared_statement(self):
        proxy = self.start_proxy(protocol="postgres")
        client = self.connect_client(proxy)
        for value in range(8):      # the driver prepares the statement from the sixth query on
            self.query(client, value)
        with proxy.handler("error", kind="57014", match=r"^SELECT \$1::int"):
            with self.assertRaises(self.driver.errors.QueryCanceled):
                self.query(client, 8)
            self.assertEqual(client.execute("SELECT 1").fetchone(), (1,))
        self.assertEqual(self.query(client, 9), 9)

    def test_only_the_queries_of_a_pipeline_that_were_drawn_fail(self):
        proxy = self.start_proxy(protocol="postgres")
        if not hasattr(self.driver, "Pipeline") or not self.driver.Pipeline.is_supported():
            self.check_drawn_queries_of_pg8000(proxy)
            return
        client = self.client_with_empty_table(proxy)
        failed = []
        with proxy.handler("error", kind="40001", percent=20), client.pipeline() as pipeline:
            for value in range(40):
                client.cursor().execute("INSERT INTO t VALUES (%s)", (value,))
                try:
                    pipeline.sync()
                except self.driver.errors.SerializationFailure:
                    failed.append(value)
        inserted = {value for value, in client.execute("SELECT i FROM t").fetchall()}
        self.assertEqual(len(proxy.events()), 40 - len(inserted))
        self.assertTrue(2 < len(proxy.events()) < 20)
        self.assertTrue(failed)

    def check_drawn_queries_of_pg8000(self, proxy):
        """Check that each query that was drawn fails, without a pipeline."""
        client = self.connect_pg8000(proxy.port)
        failed = []
        with proxy.handler("error", kind="40001", percent=20):
            for value in range(40):
                try:
                    result = client.run("SELECT cast(:v as int)", v=value)
                except Exception as exc:
                    self.assertIn("40001", str(exc))
                    failed.append(value)
                else:
                    self.assertEqual(result, [[value]])
        self.assertEqual(len(proxy.events()), len(failed))

    def test_a_refused_commit_skips_the_rest_of_a_pipeline(self):
        proxy = self.start_proxy(protocol="postgres")
        client = self.client_with_empty_table(proxy)
        if not hasattr(self.driver, "Pipeline") or not self.driver.Pipeline.is_supported():
            self.check_refused_commit_of_a_batch(proxy, client)
            return
        with proxy.handler("error", kind="57014", match="^COMMIT"):
            with self.assertRaises(self.driver.errors.QueryCanceled), client.pipeline():
                for query in ("BEGIN", "INSERT INTO t VALUES (1)", "COMMIT",
                              "INSERT INTO t VALUES (2)"):
                    client.execute(query)
        self.assertEqual(client.execute("SELECT i FROM t").fetchall(), [])

    def check_refused_commit_of_a_batch(self, proxy, client):
        """Check the same without a driver that has pipelines."""
        batch = b"".join(
            pg_parse(b"", text) + pg_bind(b"") + PG_EXECUTE
            for text in (b"BEGIN", b"INSERT INTO t VALUES (1)", b"COMMIT",
                         b"INSERT INTO t VALUES (2)"))
        startup = struct.pack(">I", 196608) + b"user\0postgres\0\0"
        with connect(proxy.port) as raw, proxy.handler("error", kind="57014", match="^COMMIT"):
            for data in struct.pack(">I", 4 + len(startup)) + startup, batch + PG_SYNC:
                raw.sendall(data)
                received = b""
                while PG_READY not in received:
                    received += raw.recv(65536)
        self.assertIn(error_bytes("postgres", "57014"), received)
        self.assertEqual(client.execute("SELECT i FROM t").fetchall(), [])

    def test_pg8000_raises_its_own_error(self):
        import pg8000.exceptions
        proxy = self.start_proxy(protocol="postgres")
        client = self.connect_pg8000(proxy.port)
        for query, parameters in ("SELECT 1", {}), ("SELECT cast(:v as int)", {"v": 1}):
            with self.subTest(query):
                self.assertEqual(client.run(query, **parameters), [[1]])
                with proxy.handler("error", kind="40P01"):
                    with self.assertRaises(pg8000.exceptions.DatabaseError) as caught:
                        client.run(query, **parameters)
                    self.assertIn("deadlock detected", str(caught.exception))
                self.assertEqual(client.run(query, **parameters), [[1]])

    def test_copy_passes(self):
        proxy = self.start_proxy(protocol="postgres")
        client = self.client_with_empty_table(proxy)
        with proxy.handler("error", match="^nothing"):
            with client.cursor().copy("COPY t FROM STDIN") as copy:
                for value in range(1000):
                    copy.write_row([value])
            with client.cursor().copy("COPY t TO STDOUT") as copy:
                line_count = sum(bytes(data).count(b"\n") for data in copy)
                self.assertEqual(line_count, 1000)


class TestMariaDB(RealTlsTests, unittest.TestCase):
    """PyMySQL, MySQL Connector/Python and MariaDB."""

    driver_name = "pymysql"
    protocol = "mysql"
    has_rows = True
    framed_value_size = LARGE_VALUE
    errors = [
        ("1213", "err.OperationalError", "1213, 'Deadlock found"),
        ("1205", "err.OperationalError", "1205, 'Lock wait timeout"),
        ("1290", "err.OperationalError", "--read-only"),
        ("1969", "err.OperationalError", "max_statement_time")]
    closing_errors = [
        ("1053", "err.OperationalError", "1053, 'Server shutdown in progress'"),
        ("1927", "err.OperationalError", "Connection was killed")]
    connect_errors = [
        ("1040", "err.OperationalError", "ny connections"),
        ("1129", "err.OperationalError", "connection errors; unblock")]

    @property
    def connection_lost(self):
        return self.driver.err.OperationalError

    timed_out = connection_lost

    @classmethod
    def start_server(cls):
        install = find_program("mariadb-install-db", "mysql_install_db")
        if not install:
            raise unittest.SkipTest("no MariaDB server")
        data = os.path.join(cls.folder, "data%d" % cls.port)
        user = ["--user=root"] * (os.getuid() == 0)
        certificate, ca = cls.write_tls_files()
        log_size = "--innodb-log-file-size=4M"
        cls.popen(install, "--no-defaults", "--datadir=" + data, "--skip-test-db", log_size,
                  "--auth-root-authentication-method=normal", *user).wait(TIMEOUT * 2)
        return cls.popen(find_program("mariadbd", "mysqld"), "--no-defaults", "--datadir=" + data,
                         log_size, "--port=%d" % cls.port, "--bind-address=127.0.0.1",
                         "--socket=" + os.path.join(cls.folder, "s"),
                         "--pid-file=" + data + ".pid",
                         "--max-allowed-packet=256M", "--innodb-flush-log-at-trx-commit=0",
                         "--innodb-buffer-pool-size=64M", "--skip-name-resolve",
                         "--ssl-cert=" + certificate, "--ssl-key=" + certificate, "--ssl-ca=" + ca,
                         *user)

    @classmethod
    def connect(cls, port, timeout=TIMEOUT, **ssl_arguments):
        ssl_arguments = ssl_arguments or {"ssl_disabled": True}
        return cls.driver.connect(host="127.0.0.1", port=port, user="root", password="",
                                  connect_timeout=max(1, int(timeout)), read_timeout=timeout,
                                  max_allowed_packet=256 << 20, **ssl_arguments)

    backend_tls = True

    @classmethod
    def connect_tls(cls, port, ca):
        return cls.connect(port, ssl={"ca": ca})

    @classmethod
    def query(cls, client, value):
        with client.cursor() as cursor:
            cursor.execute("SELECT %s", (value,))
            return cursor.fetchone()[0]

    def transfer(self, client, data):
        with client.cursor() as cursor:
            # As a parameter, the driver would escape the bytes, which takes seconds.
            literal = data.replace(b"\\", b"\\\\").replace(b"'", b"\\'")
            cursor.execute(b"SELECT CAST(_binary'%s' AS BINARY)" % literal)
            return cursor.fetchone()[0]

    @classmethod
    def query_rows(cls, client):
        with client.cursor() as cursor:
            cursor.execute("SELECT 1 UNION ALL SELECT 2 UNION ALL SELECT 3 UNION ALL SELECT 4")
            return [row for row, in cursor.fetchall()]

    def test_the_rows_before_a_cut_arrive_at_an_unbuffered_cursor(self):
        proxy = self.start_proxy(protocol="mysql")
        client = self.connect_client(proxy)
        cursor = client.cursor(self.driver.cursors.SSCursor)
        with proxy.handler("cut", rows=2):
            cursor.execute("SELECT 1 UNION ALL SELECT 2 UNION ALL SELECT 3")
            self.assertEqual([cursor.fetchone(), cursor.fetchone()], [(1,), (2,)])
            with self.assertRaises(self.connection_lost):
                cursor.fetchone()
            cursor._result.unbuffered_active = False    # its destructor reads no more rows

    def test_a_deadlock_rolls_the_transaction_back_and_a_lock_timeout_does_not(self):
        proxy = self.start_proxy(protocol="mysql")
        client = self.connect_client(proxy)
        with client.cursor() as cursor:
            cursor.execute("CREATE DATABASE IF NOT EXISTS d")
            cursor.execute("CREATE OR REPLACE TABLE d.t (i int) ENGINE=InnoDB")
            for kind, rows in ("1205", [(1,), (3,)]), ("1213", [(3,)]):
                with self.subTest(kind):
                    cursor.execute("TRUNCATE d.t")
                    cursor.execute("BEGIN")
                    cursor.execute("INSERT INTO d.t VALUES (1)")
                    with proxy.handler("error", kind=kind, match="^INSERT"), \
                            self.assertRaises(self.driver.err.OperationalError):
                        cursor.execute("INSERT INTO d.t VALUES (2)")
                    cursor.execute("INSERT INTO d.t VALUES (3)")
                    cursor.execute("COMMIT")
                    cursor.execute("SELECT i FROM d.t ORDER BY i")
                    self.assertEqual(list(cursor.fetchall()), rows)

    NODE_SCRIPT = textwrap.dedent("""\
        const mariadb = require("mariadb");

        async function run(port) {
            const client = await mariadb.createConnection(
                {host: "127.0.0.1", port, user: "root"});
            // The statements are sent without waiting. Some are prepared in the same way.
            const outcome = (reply) => reply.then(
                (rows) => String(Object.values(rows[0])[0]), (error) => "error:" + error.errno);
            const replies = [];
            for (let value = 0; value < 10; value++) {
                replies.push(outcome(client.query(`SELECT ${value} /* q${value} */`)));
                replies.push(outcome(client.execute(`SELECT ${value} + ? /* p${value} */`, [10])));
            }
            console.log((await Promise.all(replies)).join(" "));
            client.destroy();
        }

        async function runEach(ports) {
            for (const port of ports) await run(+port);
        }
        runEach(process.argv.slice(2));
        """)

    def test_node_gets_the_reply_to_each_pipelined_statement(self):
        """mariadb, from npm, in a folder of NODE_PATH or in the current folder."""
        node = shutil.which("node")
        if not node or subprocess.call([node, "-e", "require('mariadb')"],
                                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
            raise unittest.SkipTest("no mariadb for Node")
        cases = list(itertools.product(
            ("1205", "1213"), (("q3", {6}), ("[qp]3", {6, 7}), ("p[49]", {9, 19}))))
        ports = [str(self.start_proxy("100:error", "mysql",
                                      error={"kind": kind, "match": match}).port)
                 for kind, (match, _) in cases]
        output = subprocess.check_output(
            [node, "-", *ports], input=self.NODE_SCRIPT,
            universal_newlines=True, timeout=TIMEOUT, stderr=subprocess.STDOUT)
        values = [str(value) for pair in zip(range(10), range(10, 20)) for value in pair]
        self.assertEqual(len(output.splitlines()), len(cases), output)
        for (kind, (match, failed)), line in zip(cases, output.splitlines()):
            with self.subTest(kind, match=match):
                self.assertEqual(line.split(), [
                    "error:" + kind if index in failed else value
                    for index, value in enumerate(values)])

    def test_a_prepared_statement_of_mysql_connector_fails(self):
        import mysql.connector
        proxy = self.start_proxy(protocol="mysql")
        client = mysql.connector.connect(host="127.0.0.1", port=proxy.port, user="root",
                                         use_pure=True, ssl_disabled=True)
        self.addCleanup(self.disconnect, client)
        cursor = client.cursor(prepared=True)

        def query(value):
            cursor.execute("SELECT %s + 40", (value,))
            (result,), = cursor.fetchall()
            return int(result)

        self.assertEqual(query(2), 42)
        with proxy.handler("error", kind="1213", match="40$"), \
                self.assertRaises(mysql.connector.Error) as caught:
            query(3)
        self.assertEqual((caught.exception.errno, caught.exception.sqlstate), (1213, "40001"))
        self.assertEqual(query(4), 44)


class TestSmtp(unittest.TestCase):
    """smtplib, of the standard library, and aiosmtpd."""

    def setUp(self):
        aiosmtpd = import_package("aiosmtpd.controller")
        sizes = self.sizes = []             # of the messages that the server has received

        class SizeRecorder:
            async def handle_DATA(self, server, session, envelope):
                sizes.append(len(envelope.content))
                return "250 OK"

        port = unused_port()
        controller = aiosmtpd.Controller(SizeRecorder(), hostname="127.0.0.1", port=port,
                                         data_size_limit=1 << 28, tls_context=server_context())
        controller.start()
        self.addCleanup(controller.stop)
        self.proxy = OpenProxy("127.0.0.1:%d" % port, "127.0.0.1:0", protocol="smtp", seed=1,
                               tls={"cert": "auto", "verify": False})
        self.proxy.__enter__()
        self.addCleanup(self.proxy.__exit__)

    def connect(self):
        """Return a client of the proxy. It is closed at the end of the test."""
        client = smtplib.SMTP("127.0.0.1", self.proxy.port, timeout=TIMEOUT)
        self.addCleanup(client.close)
        return client

    def send(self, client, text="Subject: hello\r\n\r\n.dot\r\n"):
        """Send a message."""
        client.sendmail("a@example.com", ["b@example.com"], text)

    def test_smtplib_raises_its_own_error_and_the_next_message_is_sent(self):
        client = self.connect()
        for kind in "450", "451", "452":
            for match, exception in [("(?i)^mail", smtplib.SMTPSenderRefused),
                                     ("(?i)^rcpt", smtplib.SMTPRecipientsRefused),
                                     ("(?i)^data", smtplib.SMTPDataError)]:
                with self.subTest(kind, match=match):
                    with self.proxy.handler("error", kind=kind, match=match), \
                            self.assertRaises(exception) as caught:
                        self.send(client)
                    self.assertIn(kind, str(caught.exception))
                    self.send(client)
        self.assertEqual(self.proxy.accepted, 1)
        self.assertEqual(len(self.sizes), 3 * 3)        # one for each subtest

    def test_errors_after_starttls(self):
        client = self.connect()
        client.starttls(context=client_context())
        for kind in "450", "451":
            with self.proxy.handler("error", kind=kind, match="(?i)^mail"):
                with self.assertRaises(smtplib.SMTPSenderRefused):
                    self.send(client)
            self.send(client)
        connection, = self.proxy.connections.values()
        self.assertEqual({type(connection.client), type(connection.backend)}, {vaurien.TlsSocket})

    def test_error_421_closes_the_connection(self):
        client = self.connect()
        self.send(client)
        with self.proxy.handler("error", kind="421"):
            with self.assertRaises(smtplib.SMTPSenderRefused) as caught:
                self.send(client)
            self.assertEqual(caught.exception.smtp_code, 421)
            with self.assertRaises(smtplib.SMTPServerDisconnected):
                client.noop()
            with self.assertRaises(smtplib.SMTPConnectError):
                self.connect()
        self.send(self.connect())

    def test_a_large_message_passes(self):
        body = ("x" * 70 + "\r\n") * 50000
        with self.proxy.handler("error", match="^nothing"):
            self.send(self.connect(), "Subject: hello\r\n\r\n" + body)
        size, = self.sizes
        self.assertGreater(size, len(body))

    def test_a_transient_error_occurs_twice_and_then_the_message_is_sent(self):
        client = self.connect()
        with self.proxy.handler("transient", agitate=2, kind="451", match="(?i)^mail"):
            for _ in range(2):
                with self.assertRaises(smtplib.SMTPSenderRefused):
                    self.send(client)
            self.send(client)


class TestRequests(unittest.TestCase):
    """requests, from PyPI, and the demo backend."""

    def test_an_event_stream_is_cut_after_so_many_events(self):
        requests = import_package("requests")

        def serve(sock):
            sock.recv(65536)
            sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
                         b"Transfer-Encoding: chunked\r\n\r\n"
                         + b"9\r\ndata: x\n\n\r\n" * 5 + b"0\r\n\r\n")
            read_until_close(sock)

        for how in "close", "reset":
            with self.subTest(how), running_proxy(serve, protocol="http") as proxy, \
                    requests.Session() as session, proxy.handler("cut", rows=3, how=how):
                reply = session.get("http://127.0.0.1:%d/" % proxy.port, stream=True)
                received = b""
                with self.assertRaises(requests.exceptions.ChunkedEncodingError):
                    for data in reply.iter_content(1):
                        received += data
                self.assertEqual(received, b"data: x\n\n" * 3)

    def test_errors_are_http_responses_and_the_connection_stays_open(self):
        requests = import_package("requests")
        backend = vaurien.start_backend()
        self.addCleanup(backend.server_close)
        self.addCleanup(backend.shutdown)
        backend.RequestHandlerClass.protocol_version = "HTTP/1.1"
        backend.RequestHandlerClass.wbufsize = -1       # one send for the head and the body
        with OpenProxy(backend.server_address, "127.0.0.1:0", protocol="http") as proxy, \
                requests.Session() as session:
            url = "http://127.0.0.1:%d/" % proxy.port
            self.assertEqual(session.get(url).content, vaurien.DEMO_BODY)
            for kind in vaurien.Http.errors:
                with self.subTest(kind), proxy.handler("error", kind=kind, match="^GET /cart"):
                    response = session.get(url + "cart")
                    retry_after = "5" if kind in ("429", "503") else None
                    self.assertEqual((response.status_code, response.headers.get("Retry-After")),
                                     (int(kind), retry_after))
                    self.assertEqual(session.get(url).content, vaurien.DEMO_BODY)
            self.assertEqual(proxy.accepted, 1)


# -- The page in a browser -------------------------------------------------------


class Browser:
    """A headless Chromium, driven through the WebDriver protocol (W3C) of its chromedriver.

    Raises SkipTest if one of them is not installed.
    """

    def __init__(self):
        programs = (find_program("chromium", "chromium-browser", "google-chrome"),
                    find_program("chromedriver"))
        if not all(programs):
            raise unittest.SkipTest("no chromium")
        self.folder = make_server_folder()
        self.port = unused_port()
        self.process = subprocess.Popen(
            [programs[1], "--port=%d" % self.port], stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=self.folder)
        self.session = ""
        # The sandbox works neither for root nor in many containers. All pages are of these tests.
        arguments = ["headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run",
                     "disable-sync", "disable-background-networking", "disable-component-update",
                     "disable-dev-shm-usage", "window-size=1280,1000",
                     "user-data-dir=" + self.folder]
        try:
            wait_until(self.is_ready)
            self.session = "/session/" + self.send("POST", "/session", capabilities={
                "alwaysMatch": {"goog:chromeOptions": {
                    "binary": programs[0], "args": ["--" + text for text in arguments]},
                    "goog:loggingPrefs": {"browser": "ALL"}}})["sessionId"]
        except BaseException:
            self.close()
            raise

    def is_ready(self):
        with contextlib.suppress(OSError):
            return self.send("GET", "/status")["ready"]

    def send(self, method, path, **body):
        """Send a command of WebDriver. Returns its value."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            connection.request(method, self.session + path,
                               json.dumps(body) if method == "POST" else None)
            value = json.loads(connection.getresponse().read().decode())["value"]
        if isinstance(value, dict) and "error" in value:
            raise AssertionError(value["message"])
        return value

    def open(self, url):
        self.send("POST", "/url", url=url)

    def run(self, script, *args):
        """Return the value of a JavaScript expression; `arguments` has the arguments."""
        return self.send("POST", "/execute/sync", script="return " + script, args=list(args))

    def wait_for(self, expression, *args):
        """Wait, in the page, until a JavaScript expression is true. Returns its value."""
        return self.send("POST", "/execute/async", args=list(args), script="""
            const done = arguments[arguments.length - 1];
            const check = () => {
                const value = %s;
                if (value) done(value); else setTimeout(check, 5);
            };
            check();""" % expression)

    def find(self, xpath, function="node => node"):
        """Wait for an element that is shown. Returns the value of a JavaScript function of it."""
        return self.wait_for("""(() => {
            const nodes = document.evaluate(XPATH, document, null, 7, null);
            for (let index = 0; index < nodes.snapshotLength; index++) {
                const node = nodes.snapshotItem(index);
                if ((node.closest("select") || node).checkVisibility()) return (FUNCTION)(node);
            }})()""".replace("XPATH", json.dumps(xpath)).replace("FUNCTION", function))

    def find_path(self, xpath):
        """Wait for an element that is shown, and return its path for `send`."""
        return "/element/" + next(iter(self.find(xpath).values()))

    def click(self, xpath):
        """Click as a user does: this fails if the element is hidden or covered.

        The click of WebDriver takes 70 messages, and misses an element that moves meanwhile.
        """
        if "//option" in xpath:
            return self.send("POST", self.find_path(xpath) + "/click")
        self.find(xpath, """node => {
            node.scrollIntoView({block: "nearest"});
            const {x, y, width, height} = node.getBoundingClientRect();
            const top = document.elementFromPoint(x + width / 2, y + height / 2);
            if (!node.contains(top)) throw new Error("covered by " + top?.outerHTML);
            node.focus();
            node.click();
            return true;
        }""")

    def press(self, text, within="//main"):
        """Click the button with this text."""
        self.click("%s//button[normalize-space()='%s']" % (within, text))

    def type(self, xpath, text):
        path = self.find_path(xpath)
        self.run("document.evaluate(arguments[0], document, null, 9).singleNodeValue.select()",
                 xpath)
        self.send("POST", path + "/value", text=text)       # replaces the selected text

    def type_into(self, label, text):
        self.type("//form//*[@id=//label[.='%s']/@for]" % label, text)

    def wait_for_text(self, text, within="main"):
        self.wait_for("document.querySelector(arguments[1])?.innerText.includes(arguments[0])",
                      text, within)

    def log(self):
        """Return the new messages in the browser's console, as text."""
        return [entry["message"] for entry in self.send("POST", "/se/log", type="browser")]

    def close(self):
        with contextlib.suppress(OSError, AssertionError):
            if self.session:
                self.send("DELETE", "")
        self.process.kill()
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


class TestBrowser(unittest.TestCase):
    """The page in a real browser. Every change is checked at the proxy."""

    @classmethod
    def start(cls):
        cls.browser = Browser()

    @classmethod
    def stop(cls):
        cls.browser.close()

    @classmethod
    def setUpClass(cls):
        start_or_wait(cls)

    @classmethod
    def tearDownClass(cls):
        cls.stop()

    def setUp(self):
        self.stack = contextlib.ExitStack()
        self.addCleanup(self.stack.close)

    def open_page(self, **arguments):
        """Open the page of a proxy_with_control. Returns the proxy."""
        proxy, self.client = self.stack.enter_context(proxy_with_control(**arguments))
        self.stack.enter_context(mock.patch.object(vaurien, "PAGE", self.fast_page()))
        self.stack.callback(self.leave)
        self.url = "http://127.0.0.1:%d/" % self.client.port
        self.browser.open(self.url)
        if not self.client.token:
            # The first data move what is below them, and a click could miss it.
            self.browser.wait_for("document.querySelector('polyline')?.getAttribute('points')"
                                  "?.includes(' ')")
        return proxy

    @staticmethod
    def fast_page():
        """Return the page, but it polls each 0.02 s instead of each second."""
        before, period, after = vaurien.PAGE.partition("PERIOD = 1;")
        assert period
        return before + "PERIOD = 0.02;" + after

    def leave(self):
        """Stop the page, and check that it has broken no rule of its policy."""
        messages = self.browser.log()
        # A hidden page does not poll. The next test opens its own page in place of this one.
        self.browser.run("[Object.defineProperty(document, 'hidden', {value: true}), stop()]")
        unexpected = [text for text in messages if "the server responded with" not in text]
        self.assertEqual(unexpected, [])

    def confirm(self, verb):
        """Press a button of the dialog. Returns its question."""
        question = self.browser.run("document.getElementById('question').textContent")
        self.browser.press(verb, "//dialog")
        return question

    def test_the_overview_is_live(self):
        name = "<script>alert(1)</script>"
        other = self.stack.enter_context(OpenProxy(
            "127.0.0.1:9", name=name, enabled=False,
            behavior=[(5, "delay"), (7, "delay")]))
        proxy = self.open_page(others=[other], behavior="100:delay",
                               options={"delay": {"sleep": 0.001}})
        browser = self.browser
        browser.wait_for_text("delay 100 %")
        for text in name, "on", "off", proxy.listen, "tcp", "delay 5 %", "delay 7 %":
            browser.wait_for_text(text)
        self.assertEqual(browser.run("document.scripts.length"), 1)
        with connected_client(proxy) as sock:
            for expected in 1, 2:
                send_and_read(sock, b"question")
                browser.wait_for_text("%d in all" % expected)
            for text in "\u2191 16 B \u2193 16 B in all", "1 in all":
                browser.wait_for_text(text)
        browser.wait_for("document.querySelectorAll('svg')[1].ariaLabel.startsWith("
                         "'requests per second in the last minute')")
        browser.wait_for("document.querySelectorAll('polyline')[1].getAttribute('points')"
                         ".includes(' ')")
        self.assertEqual(browser.run("document.querySelectorAll('.active li').length"), 3)

    def test_quick_faults(self):
        proxy = self.open_page(protocol="redis")
        browser = self.browser
        for button, described, times in (
                ("slow", "toxic slow (100:both delay sleep=1.0 ttl=30.0)", "for 30 s"),
                ("hang", "toxic hang (100:both hang per=connection ttl=300.0)", "for 5 min"),
                ("down", "toxic down (100:both blackout", "until removed"),
                ("error", "toxic error (100:both error warmup=0 kind=LOADING", None)):
            with self.subTest(button):
                if times:
                    browser.click("//label[.='%s']" % times)
                else:
                    browser.click("//option[.='LOADING']")
                browser.press(button)
                wait_until(lambda: described.split(" per=")[0].split(" ttl")[0]
                           in proxy.describe())
                browser.wait_for_text(button + " 100 %", "main .active")
        self.assertEqual([toxic.rule.ttl for toxic in proxy.toxics], [30, 300, 0, 0])
        browser.click("//label[.='for 30 s']")
        browser.press("down")           # the same toxic begins again, with a time
        wait_until(lambda: [toxic.rule.ttl for toxic in proxy.toxics] == [30, 300, 30, 0])
        browser.press("refuse")
        wait_until(lambda: proxy.accept.current_mode() == "refuse")
        browser.wait_for_text("refuse for", "main .active")
        self.assertEqual(proxy.accept.fields, {"ttl": 30})

    def test_the_form_of_a_toxic(self):
        proxy = self.open_page()
        browser = self.browser
        browser.press("Add a fault")
        browser.click("//option[.='latency']")
        browser.type_into("latency", "200")
        browser.type_into("Name", "far <b>")
        browser.click("//summary[.='When it acts']")
        browser.type_into("percent", "150")
        browser.press("Add")
        browser.wait_for_text("percent must be a number from 0 to 100", "main form")
        self.assertEqual(browser.run("[...document.querySelectorAll('[aria-invalid]')].map("
                                     "input => input.labels[0].textContent)"), ["percent"])
        browser.type_into("percent", "50")
        browser.type_into("match", "^GET")
        browser.press("Add")
        text = "toxic far <b> (50:both latency latency=200 jitter=0 "
        wait_until(lambda: text in proxy.describe())
        toxic, = proxy.toxics
        self.assertEqual((toxic.rule.match.pattern, toxic.rule.per), (b"^GET", "request"))
        browser.press("Change")
        browser.type_into("jitter", "7")
        browser.press("Save")
        wait_until(lambda: "jitter=7" in proxy.describe())
        browser.press("Remove")
        self.assertIn("Remove far <b> from", self.confirm("Cancel"))
        browser.press("Remove")
        self.assertEqual(len(proxy.toxics), 1)
        self.confirm("Remove")
        wait_until(lambda: proxy.describe() == "100:dummy")

    def test_the_form_of_a_rule(self):
        proxy = self.open_page(behavior="20:delay", protocol="redis")
        browser = self.browser
        for kind, text in ("NOPE", "kind must be one of"), ("LOADING", ""):
            browser.press("Add a fault")
            browser.click("//option[.='error']")
            browser.click("//option[.='rule']")
            browser.click("//summary[.='When it acts']")
            browser.type_into("kind", kind)
            browser.type_into("percent", "5")
            browser.press("Add", "//form")
            if text:
                browser.wait_for_text(text, "main form")
                browser.press("Cancel")
        added = "20:delay sleep=1.0, 5:error warmup=0 kind=LOADING, 75:dummy"
        wait_until(lambda: proxy.describe() == added)
        browser.click("(//main//button[.='Change'])[2]")
        browser.type_into("warmup", "3")
        browser.press("Save")
        wait_until(lambda: proxy.describe() == added.replace("warmup=0", "warmup=3"))
        for name, rules, shown in (
                ("delay", "5:error warmup=3 kind=LOADING, 95:dummy", "error 5 %"),
                ("error", "100:dummy", "no fault")):
            browser.click("(//main//button[.='Remove'])[1]")
            self.assertIn("Remove %s from" % name, self.confirm("Remove"))
            wait_until(lambda: proxy.describe() == rules)
            browser.wait_for_text(shown, "main .active")
            browser.wait_for("document.querySelector('.active').children.length === 1")

    def test_on_off_refuse_and_drop(self):
        proxy = self.open_page()
        group = "//*[@aria-label='new clients']"
        for state, expected in (("refuse", (True, "refuse")), ("drop", (True, "drop")),
                                ("on", (True, "normal")), ("off", (False, "normal")),
                                ("on", (True, "normal"))):
            with self.subTest(state):
                self.browser.press(state, group)
                if state == "off":
                    self.assertIn("All its connections are closed", self.confirm("Turn off"))
                wait_until(lambda: (proxy.enabled, proxy.accept.mode) == expected)
                self.browser.find(group + "//button[@aria-pressed='true'][.='%s']" % state)

    def test_connections_are_closed_and_reset(self):
        proxy = self.open_page()
        browser = self.browser
        with connected_client(proxy) as first, connected_client(proxy) as second:
            for sock in first, second:
                send_and_read(sock, b"question")
            browser.click("//summary[.='Connections']")
            browser.wait_for_text("127.0.0.1:%d" % first.getsockname()[1])
            browser.click("//tr[th='1']//button[.='Close']")
            self.assertIn("Close connection 1 of", self.confirm("Close"))
            self.assertEqual(read_until_close(first), EMPTY_EOF)
            browser.click("//tr[th='2']//button[.='Reset']")
            self.confirm("Reset")
            self.assertEqual(read_until_close(second).ending, "reset")

    def test_fault_records_are_live_and_filtered(self):
        proxy = self.open_page(behavior="100:delay", options={"delay": {"sleep": 0.001}})
        browser = self.browser
        with connected_client(proxy) as sock:
            for _ in range(3):
                send_and_read(sock, b"question")
            numbers = ("[...document.querySelectorAll('[aria-label=\"fault records\"] tbody th')]"
                       ".map(cell => cell.textContent).join() === '%s'")
            browser.wait_for(numbers % "3,2,1")
            with proxy.handler("latency", latency=1):
                send_and_read(sock, b"question")
            browser.wait_for(numbers % "4,3,2,1")
            browser.type("//input[@type='search']", "latency")
            browser.wait_for(numbers % "4")

    def test_heal_everything(self):
        other = self.stack.enter_context(OpenProxy("127.0.0.1:9", behavior="100:hang",
                                                   name="a/b ?", accept="refuse"))
        proxy = self.open_page(others=[other], behavior="20:delay")
        proxy.add_toxic("latency")
        for verb, healed in ("Cancel", False), ("Heal everything", True):
            self.browser.press("Heal everything", "//header")
            self.confirm(verb)
            if healed:
                wait_until(lambda: proxy.describe() == other.describe() == "100:dummy")
                wait_until(lambda: other.accept.mode == "normal")
            else:
                self.assertIn("latency", proxy.describe())

    def test_each_question_of_the_dialog_has_its_own_answer(self):
        proxy = self.open_page(behavior="20:delay")
        # The second question precedes the event that the first one is closed.
        self.browser.run("['heal', 'no', 'heal'].forEach(id => document.getElementById(id)"
                         ".click())")
        self.confirm("Heal everything")
        wait_until(lambda: proxy.describe() == "100:dummy")

    def test_a_token_is_typed_into_the_page(self):
        self.open_page(token="s3cret")
        browser = self.browser
        browser.run("sessionStorage.clear()")
        browser.wait_for_text("needs its token", "header")
        for token in "wrong", "s3cret":
            browser.type("//input[@type='password']", token)
            browser.press("Use this token", "//form")
            browser.wait_for("sessionStorage.getItem('token') === arguments[0]", token)
            browser.wait_for_text("refuses this token" if token == "wrong" else "proxies: 1",
                                  "header")
        browser.wait_for_text("no fault")
        browser.press("slow")
        browser.wait_for_text("slow 100 %")
        browser.open(self.url)          # the token is still known
        browser.wait_for_text("slow 100 %")
        self.assertEqual(browser.run("location.href"), self.url)
        self.assertEqual(browser.run("document.cookie + JSON.stringify(localStorage)"), "{}")
        self.assertFalse(browser.run("document.getElementById('login').checkVisibility()"))

    def test_a_server_that_does_not_reply(self):
        self.open_page()
        self.browser.wait_for_text("proxies: 1", "header")
        self.browser.run("window.reply = window.fetch")
        self.browser.run("window.fetch = () => Promise.reject(new Error('gone'))")
        self.browser.wait_for_text("no reply: gone", "header .error")
        self.browser.run("window.fetch = window.reply")
        self.browser.wait_for_text("proxies: 1", "header .soft")

    def test_the_page_of_another_site_can_change_nothing(self):
        proxy = self.open_page()
        attacks = """
            async () => {
              const results = [], options = [{}, {mode: "no-cors"},
                {headers: {"X-Fetch-Site": "same-origin"}}];
              for (const more of options)
                for (const [method, path, body] of [
                    ["POST", "handler", "hang"], ["POST", "reset"], ["GET", "status"],
                    ["POST", "proxies/vaurien/toxics", '{"type": "hang"}'], ["GET", "proxies"]])
                  try {
                    const response = await fetch(URL + path, {method, body, ...more});
                    results.push(await response.text());
                  } catch (error) { results.push(""); }
              const form = document.createElement("form");
              form.action = URL + "handler"; form.method = "POST"; form.enctype = "text/plain";
              form.target = "frame";
              const frame = document.createElement("iframe");
              frame.name = "frame"; frame.src = URL;
              document.body.append(form, frame);
              await new Promise(done => frame.onload = done);
              let text = "";
              try { text = frame.contentDocument.body.innerText; } catch (_) { }
              form.submit();
              await new Promise(done => frame.onload = done);
              return results.join("") + text;
            }""".replace("URL", json.dumps(self.url))
        class Site(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.send_header("Content-Type", "text/html")
                self.end_headers()

            def log_message(self, *_):
                pass

        class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
            daemon_threads = True       # a browser opens connections without a request, too

        server = self.stack.enter_context(contextlib.closing(Server(("127.0.0.1", 0), Site)))
        server.close = server.server_close
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        self.stack.callback(server.shutdown)
        self.leave()
        for host in "127.0.0.1", "localhost":
            with self.subTest(host):
                self.browser.open("http://%s:%d/" % (host, server.server_port))
                self.assertEqual(self.browser.run("(%s)()" % attacks), "")
        self.browser.log()              # has the refusals
        self.assertEqual(proxy.describe(), "100:dummy")
        self.assertEqual(len(proxy.rule_changes), 1)

    def test_hundreds_of_connections(self):
        proxy = self.open_page()
        total = 200         # twice as many as the page shows at first
        socks = [self.stack.enter_context(connected_client(proxy)) for _ in range(total)]
        wait_until(lambda: len(proxy.connections) == total)
        browser = self.browser
        browser.click("//summary[.='Connections']")
        count = "document.querySelectorAll('[aria-label=\"connections\"] tbody tr').length === %d"
        browser.wait_for(count % 100)
        browser.wait_for_text("100 of %d, the newest first" % total)
        browser.click("//label[.='all']")
        browser.wait_for(count % total)
        for sock in socks[::20]:
            send_and_read(sock, b"question")

    def test_the_page_is_usable_by_keyboard_and_screen_reader(self):
        proxy = self.open_page()
        browser = self.browser
        browser.press("Add a fault")
        browser.click("//summary[.='When it acts']")
        browser.click("//summary[.='Connections']")
        for expected, expression in (
                ([], "inputs.filter(input => !input.labels.length && !input.ariaLabel)"
                     ".map(input => input.outerHTML)"),
                ([], "buttons.filter(button => !button.textContent).length ? 1 : []"),
                ([], "[...document.querySelectorAll('thead th')].filter(head => "
                     "head.scope !== 'col').map(head => head.outerHTML)"),
                ([], "[...document.querySelectorAll('svg')].filter(chart => "
                     "chart.role !== 'img').map(chart => chart.outerHTML)"),
                ("en", "document.documentElement.lang")):
            with self.subTest(expression):
                self.assertEqual(browser.run(
                    "(() => { const inputs = [...document.querySelectorAll('input, select')];"
                    "const buttons = [...document.querySelectorAll('button')];"
                    "return %s; })()" % expression), expected)
        tab, enter = "\ue004", "\ue007"
        browser.run("document.querySelector('#heal').focus()")
        reached = set()
        for _ in range(60):
            browser.send("POST", "/actions", actions=[{
                "type": "key", "id": "keyboard",
                "actions": [{"type": type_, "value": tab} for type_ in ("keyDown", "keyUp")]}])
            reached.add(browser.run("document.activeElement.textContent"))
            if browser.run("document.activeElement.textContent") == "slow":
                break
        else:
            self.fail("no tab stop at the button: %s" % reached)
        browser.send("POST", "/actions", actions=[{
            "type": "key", "id": "keyboard",
            "actions": [{"type": type_, "value": enter} for type_ in ("keyDown", "keyUp")]}])
        wait_until(lambda: "toxic slow" in proxy.describe())
        # A poll does not take the focus away.
        browser.wait_for_text("slow 100 %")
        self.assertEqual(browser.run("document.activeElement.textContent"), "slow")

    def test_no_other_resource_is_loaded_and_only_listed_routes_are_used(self):
        self.open_page()
        self.browser.click("//summary[.='Connections']")
        self.browser.wait_for_text("the newest first")
        urls = self.browser.run("performance.getEntriesByType('resource').map(item => item.name)")
        self.assertTrue(urls)
        for url in urls:
            with self.subTest(url):
                self.assertTrue(url.startswith(self.url), url)
                path = "/" + url[len(self.url):].partition("?")[0]
                routes, _, _ = vaurien.find_routes(path, None)
                self.assertTrue(routes)


if __name__ == "__main__":
    unittest.main()
