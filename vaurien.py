#!/usr/bin/env python3
"""Vaurien, the chaos TCP proxy: a chaos monkey for TCP connections.

It stands between an application and a backend (MySQL, PostgreSQL, Redis,
memcached, an HTTP API) and misbehaves on purpose, so that a test can ask: does
my application survive when the database restarts, when the cache is down, when
answers are slow, cut, reset, wrong?

    python3 vaurien.py demo
    python3 vaurien.py --local localhost:8000 --distant google.com:80 \\
                       --behavior 20:delay,5:error
    python3 vaurien.py --help

This one file is all there is: the standard library, Python 3.6 or newer.

The road of a chunk:

                     one Connection
                     +------------------------------------------------------------+
      client socket  |   Line.carry: (now, UPSTREAM, data) -> events              |  backend socket
        recv  ------>|   Pipe[UPSTREAM].put(t, data) ... until due ... flush ---->|  send
      send  <--------|   <- flush <- Pipe[DOWNSTREAM] <- Line.carry <-------------|<------ recv
                     +------------------------------------------------------------+
      Loop: wakes for ready sockets, for the next due chunk, for other threads' calls

A handler is a function of one timed event that yields the events to pass on
instead. It never sleeps, reads no clock and touches no socket: time is a value.
`grep -n '^# -- ' vaurien.py` is the table of contents; each room uses only the
rooms above it.
"""
import argparse
import atexit
import contextlib
import errno
import functools
import gc
import heapq
import importlib
import logging
import math
import os
import random
import re
import select
import selectors
import signal
import socket
import struct
import sys
import threading
import time
import types
import warnings
from collections import ChainMap, Counter, OrderedDict, deque, namedtuple
from selectors import EVENT_READ, EVENT_WRITE

try:
    import fcntl
except ImportError:             # Windows has none
    pass


class LazyModule:
    """A module that is imported when something of it is used: the start is not to wait for it."""

    def __init__(self, name):
        self.name = name

    def __getattr__(self, attribute):
        return getattr(importlib.import_module(self.name), attribute)


configparser, hashlib, hmac, inspect, json, subprocess, urls = map(LazyModule, [
    "configparser", "hashlib", "hmac", "inspect", "json", "subprocess", "urllib.parse"])

__version__ = "3.0.0"

log = logging.getLogger("vaurien")

CHUNK = 256 * 1024              # one recv at most; larger ones gained nothing when measured
HELD_MAX = 16 * 1024 * 1024     # what one pipe may hold while it flows: 1 GB/s for 16 ms.
                                #   Smaller, and latency becomes a bandwidth limit
HELD_MAX_IDLE = 256 * 1024         # the same where nothing is delayed, or nothing is ever due
HELD_TOTAL = 512 * 1024 * 1024  # what all pipes of a loop may hold together
HELD_MIN = 4 * 1024           # what each pipe is sure of, however full the others are
MATCH_WINDOW = 64 * 1024           # of a request, that an expression is looked for in
KERNEL_PIPE_SIZE = 1024 * 1024              # bytes in a pipe of the kernel's; what it allows without root
KERNEL_PIPES_POOLED = 16                 # empty ones, for the next who need one
BULK_READ = 64 * 1024                # bytes in one read that are much
SPLICE_AFTER = 4                        # such reads after which a pipe of the kernel's is worth its while
COPY_MAX = 8 * 1024                # bytes that cost nothing to copy
CACHED_HEAD_MAX = 1024               # of a head, in case the next one is the same
CHUNK_OVERHEAD = 400                # what keeping one chunk costs besides its bytes: 398 on
                                #   Python 3.6, 336 on 3.13 (measured)
BACKLOG = 4096                  # for listen; the kernel caps it (net.core.somaxconn)
LINUX = sys.platform.startswith("linux")
ACCEPT_BURST = 64                      # connections accepted in a row before others have their turn
LINGER_TIMEOUT = 5.0                    # seconds for a client to close after an error (as nginx has it)
RETRY_DELAY = 1.0                     # seconds until what failed for lack of descriptors is tried again
SPARE_FDS = 8                       # descriptors: a client, a backend, a resolver, two pipes ...
PRECISE_WAIT = 0.005                    # seconds before an alarm from which waiting is exact
SELECT_OVERSHOOT = 0.00015                 # seconds by which select() wakes up later than it is asked to
MAX_WAIT = 3600.0                # seconds of one wait: epoll's timeout is a C int of ms
RATE_BACKLOG = 0.1                    # seconds that may wait for a thin wire before its source feels it
STATSD_INTERVAL = 1.0              # seconds between two reports
STATSD_PACKET_MAX = 1400            # bytes of one, so that it is not cut on its way
FAULT_RECORDS_KEPT = 10000             # faults that acted, remembered by each proxy


# -- Events -------------------------------------------------------------------
#
# An event is (t, to, data): when it is due, in seconds of the loop's clock; which
# way it goes; and bytes, or a signal that tells of the stream itself.

UPSTREAM, DOWNSTREAM = "upstream", "downstream"     # towards the backend, the client
NEVER = math.inf                                    # due when the fault is removed


class Signal(bytes):
    """An event without bytes.

    It has length 0 and cannot be cut, so a handler that only delays, counts or
    slices need not know of signals; one that cares asks `data is EOF`.
    """

    name: str

    def __new__(cls, name):
        self = super().__new__(cls)
        self.name = name
        return self

    def __repr__(self):
        return self.name

    def __getitem__(self, key):
        return self

    __eq__, __ne__, __hash__ = object.__eq__, object.__ne__, object.__hash__


OPEN = Signal("OPEN")       # a client is here; upstream, this calls the backend. A fault that
                            #   was drawn for the connection sees it each way, and again
                            #   when it has been changed
EOF = Signal("EOF")         # no more bytes this way: half-close; both ways: close
RESET = Signal("RESET")     # forget what is under way, reset both sockets
END_OF_MESSAGE = Signal("END")         # of a request, of a reply, where there is a protocol; goes no further
CONTINUATION = Signal("MORE")       # what goes on with the request before; for protocols alone


# -- Checks -------------------------------------------------------------------
#
# Validators. User input is checked where it enters, whether it is text or a JSON value.
# A check returns the parsed value. Otherwise it raises ValueError with the end of a
# sentence ("must be ..."); the caller knows the option, key or field to put before it.

INT64_MAX = 2 ** 63 - 1     # the largest number that Toxiproxy accepts (int64 in Go)
NAME_MAX = 255              # characters of a name
TOKEN_VARIABLE = "VAURIEN_HTTP_TOKEN"   # environment variable; other users cannot read it


class InputError(ValueError):
    """Bad user input: one (field, sentence) for each error.

    The command line, the control API and Toxiproxy's API each render it in their own form.
    """

    def __init__(self, errors):
        super().__init__("; ".join(sentence for _, sentence in errors))
        self.errors = errors


def format_exception(exc):
    """Return "Type: message", or only the type if the exception's own __str__ fails."""
    try:
        return "%s: %s" % (type(exc).__name__, exc)
    except Exception:
        return type(exc).__name__


def not_negative(value):
    return value >= 0


def check_number(value, type_, expected, valid=not_negative):
    """Convert to a finite number of a type; Raises ValueError unless valid(number).

    value       a number or text
    expected    for the error: "a whole number, 0 or more"
    """
    try:
        converted = type_(value)
        if (isinstance(value, (str, type_)) or converted == value) \
                and not isinstance(value, bool) and valid(converted) and converted != math.inf:
            return converted
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError("must be %s, not %r" % (expected, value))


def number_check(type_, expected, valid=not_negative):
    """Return a check that accepts such numbers only."""
    return lambda value: check_number(value, type_, expected, valid)


def choice_check(*choices):
    """Return a check that accepts these texts only."""
    def check(value):
        if value not in choices:
            raise ValueError("must be one of %s, not %r" % (", ".join(choices), value))
        return value
    return check


def check_yes_no(value):
    states = configparser.ConfigParser.BOOLEAN_STATES
    if str(value).strip().lower() not in states:
        raise ValueError("must be yes or no, not %r" % (value,))
    return states[str(value).strip().lower()]


def check_name(name):
    """Check the name of a proxy or a toxic. It appears in log lines, so it must be printable."""
    if len(name) > NAME_MAX or not name.isprintable():
        raise ValueError("must be at most %d printable characters, not %r"
                         % (NAME_MAX, name[:50]))
    return name


def check_token(text):
    """Check a bearer token (RFC 6750, 2.1). It is a secret, so the error does not repeat it."""
    if not re.fullmatch("[A-Za-z0-9._~+/-]+=*", text):
        raise ValueError("must consist of letters, digits and ._~+/- and may end in =")
    return text


check_count = number_check(int, "a whole number, 0 or more")
check_percent = number_check(float, "a number from 0 to 100", lambda value: 0 <= value <= 100)
check_port = number_check(int, "a port from 0 to 65535", lambda value: 0 <= value <= 65535)
check_toxicity = number_check(float, "a number from 0 to 1", lambda value: 0 <= value <= 1)
check_timeout = number_check(float, "a number of seconds, more than 0", lambda value: value > 0)


def format_value(value):
    """Format an option's value as the command line accepts it."""
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


# -- Handlers -----------------------------------------------------------------
#
# A handler is a generator function of one event. It yields the events to pass on
# instead: later, cut, changed, sent the other way, or none at all.
#
#   state    the memory of one drawn fault (for one request, or one connection): a Counter,
#            so a key that was never set is 0. Its attributes:
#              random            a random.Random that is repeatable by --seed
#              request           the number of this request (or connection) at the proxy,
#                                counted from 1 since the rule became active
#              request_number    the number of the current request in its connection
#              stream            the events it receives: UPSTREAM, DOWNSTREAM or "both"
#              shared            a Counter shared by all states of this rule at this proxy
#              protocol          the Protocol of the connection; None for tcp
#              protocol_lost     True after the connection has fallen back to tcp
#              current_request   the Request that the event belongs to; None without a
#                                protocol, and while the client connects
#              replies           {Request: Reply or None}: the error replies of `error`
#   t        when the event happens; yielding an earlier time means t
#   to       UPSTREAM or DOWNSTREAM; yield the opposite one to reply
#   data     bytes, or a signal: OPEN or EOF (a reset by a peer arrives as EOF). A handler
#            may yield RESET. A rule drawn for the connection receives OPEN in each direction
#            when it begins, also on a connection that is open already, and again when its
#            options change. With a protocol, END_OF_MESSAGE follows each request and reply
#   *, ...   its options: the default gives the type (bool, int, float, str), the
#            docstring one line of help each
#
# The smallest handler, complete with command line, ini file, both APIs and help:
#
#     @handler
#     def lose(state, t, to, data, *, percent_lost=10):
#         """A connection that loses chunks.
#
#         percent_lost    how many chunks are lost, in percent
#         """
#         if not data or state.random.random() * 100 >= percent_lost:
#             yield t, to, data
#
# To add one, write it in this section. A user's own module imports `handler` from here, or
# names the function by its dotted path on the command line.

HANDLERS = OrderedDict()


def handler(function):
    """Register a handler under its own name. Returns the function unchanged."""
    HANDLERS[function.__name__] = function
    return function


def rate_limited(function):
    """Mark a handler that queues chunks for a slow link and keeps the queue's end in state[to].

    DelayQueue.read_limit then slows the source down soon. When queued chunks are released,
    Chain.reset_rate_limits sets the end back.
    """
    function.rate_limited = True
    return function


def only_direction(choose):
    """Mark a handler that only needs events of the direction choose(options).

    It applies unless the rule itself names a stream.
    """
    def mark(function):
        function.choose_direction = choose
        return function
    return mark


def changes_replies(function):
    """Mark a handler that acts on replies: a rule for the upstream stream would never act."""
    function.changes_replies = True
    return function


@handler
def dummy(state, t, to, data):
    """A healthy backend: everything passes."""
    yield t, to, data


@handler
@only_direction(lambda options: UPSTREAM if options["before"] else DOWNSTREAM)
def delay(state, t, to, data, *, sleep=1.0, before=True):
    """A slow backend: each request, or its reply, is delayed.

    sleep    seconds
    before   yes: delay connecting and the request; no: delay the first byte of the reply
    """
    if data is OPEN or (data and state["delayed"] != state.request_number):
        state["until"] = t + sleep      # first for OPEN, then for the first byte
        state["delayed"] = state.request_number if data else 0
    yield max(t, state["until"]), to, data


@handler
@changes_replies
def error(state, t, to, data, *, inject=False, warmup=0, kind=""):
    """A broken backend: replies with random bytes or, with a protocol, with a real error.

    inject   yes: insert 100 random bytes into the middle of the valid reply instead
    warmup   number of requests of the proxy to leave alone first
    kind     an error of the protocol, like 503, LOADING, 1213 or 57P01; default: drawn
    """
    if state.request <= warmup or (state.protocol_lost and not inject):
        yield t, to, data
    elif state.protocol and not inject:
        yield from state.protocol.reply_with_error(state, t, to, data, kind)
    elif to == UPSTREAM or not data:
        yield t, to, data
    elif state["answered"] != state.request_number:
        state["answered"] = state.request_number
        if inject:
            middle = len(data) // 2
            yield t, to, data[:middle] + random_bytes(state.random, 100) + data[middle:]
        else:
            # The last two bytes end a line, so that a client that reads lines returns.
            yield t, to, random_bytes(state.random, 998) + b"\r\n"
    elif inject:
        yield t, to, data


@handler
@changes_replies
def transient(state, t, to, data, *, agitate=1, inject=False, warmup=0, kind=""):
    """A backend that recovers: the first requests fail, later ones succeed.

    agitate  number of requests of the proxy that fail
    inject   as in error
    warmup   as in error: number of requests that pass before the first one fails
    kind     as in error
    """
    if data and not state["counted"] and state.request > warmup and (
            state.current_request or not state.protocol):
        state.shared["failed"] += 1         # a connection that sends nothing does not count
        state["counted"] = state.shared["failed"]
    if 1 <= state["counted"] <= agitate:
        yield from error(state, t, to, data, inject=inject, warmup=warmup, kind=kind)
    else:
        yield t, to, data


@handler
def hang(state, t, to, data):
    """A stuck backend: requests are read but never answered, and no byte is lost.

    When the rule is removed, the held bytes are delivered.
    """
    yield NEVER, to, data


@handler
def blackout(state, t, to, data):
    """No backend: the client's connection is closed at once."""
    yield from close_both(t)


@handler
@changes_replies
def abort(state, t, to, data):
    """A lost reply: the backend gets the request, then the client's connection is closed."""
    if to == UPSTREAM or data is OPEN:
        yield t, to, data
    else:
        yield from close_both(t)


# Toxiproxy's toxics, with its names and units. As toxics they are drawn for a connection and
# act on one stream. In a behavior they are drawn for a request and act on both.

HANDLERS["noop"] = dummy


@handler
def latency(state, t, to, data, *, latency=0, jitter=0):
    """A longer link: every chunk arrives later, and no chunk waits for another.

    latency  milliseconds added to each chunk
    jitter   milliseconds more or less, drawn for each chunk
    """
    if data:
        t += max(0, latency + (state.random.uniform(-jitter, jitter) if jitter else 0)) / 1000
    yield t, to, data


@handler
@rate_limited
def bandwidth(state, t, to, data, *, rate=0):
    """A slower link: chunks queue for it, separately in each direction.

    rate     kilobytes (1000 bytes) per second; 0 lets nothing through
    """
    if data is OPEN:
        state[to] = t
    for piece in split_chunk(data, rate * 10, rate * 10):   # 10 ms of data each
        if piece:
            state[to] = max(t, state[to]) + len(piece) / (rate * 1000) if rate > 0 else NEVER
        yield max(t, state[to]), to, piece


@handler
@rate_limited
def slicer(state, t, to, data, *, average_size=0, size_variation=0, delay=0):
    """A link of small packets: every chunk is cut into pieces.

    average_size    bytes of a piece; 0 cuts nothing
    size_variation  bytes more or less, drawn for each piece
    delay           microseconds after each piece
    """
    if data is OPEN:
        state[to] = t
    largest = average_size + size_variation if average_size > 0 else 0
    for piece in split_chunk(data, average_size - size_variation, largest,
                             state.random if largest and size_variation > 0 else None):
        t = max(t, state[to])
        yield t, to, piece
        if piece:
            state[to] = t + delay / 1000000


@handler
def slow_close(state, t, to, data, *, delay=0):
    """A slow close: the end of the stream arrives later.

    delay    milliseconds
    """
    yield t + delay / 1000 if data is EOF else t, to, data


@handler
def timeout(state, t, to, data, *, timeout=0):
    """A dead link: all bytes are lost, and after a time the connection is closed.

    Removing the rule closes the connection too, because bytes are missing in it.

    timeout  milliseconds after the rule begins to act; 0 never closes
    """
    if data is OPEN or "began" not in state:
        state.setdefault("began", t)
        until = state["began"] + timeout / 1000 if timeout > 0 else NEVER
        yield from close_both(until)
    if not data:
        yield t, to, data


@handler
def reset_peer(state, t, to, data, *, timeout=0):
    """A broken connection: the first bytes, or the end of the stream, cause a reset (RST).

    timeout  milliseconds before the reset
    """
    if data is OPEN:
        yield t, to, data
    elif not state["hit"]:
        state["hit"] = 1
        yield t + timeout / 1000, to, RESET


@handler
def limit_data(state, t, to, data, *, bytes=0):
    """A link that breaks: a number of bytes pass, then the connection is closed.

    bytes    how many, counted separately in each direction
    """
    if not data:
        yield t, to, data
        return
    piece = data[:max(0, bytes - state[to])]
    state[to] += len(piece)
    yield t, to, piece
    if state[to] >= bytes:
        yield from close_both(t)


PIECES_MAX = 1000   # of one chunk: each piece costs CHUNK_OVERHEAD bytes and a system call


def split_chunk(data, smallest, largest, generator=None):
    """Yield the pieces of a chunk, each of `largest` bytes or, with a generator, of a drawn size.

    Pieces are larger than that if there would be more than PIECES_MAX of them. A signal, or
    a chunk with `largest` 0, is one piece.
    """
    minimum = max(1, len(data) // PIECES_MAX)
    start = 0
    while largest > 0 and start < len(data):
        size = max(minimum, generator.randint(smallest, largest) if generator else largest)
        yield data[start:start + size]
        start += size
    if not start:
        yield data


def close_both(t):
    """Yield the events that close the connection at t, as a server does."""
    yield t, DOWNSTREAM, EOF
    yield t, UPSTREAM, EOF


def random_bytes(generator, size):
    """Return random bytes (Random.randbytes exists only since Python 3.9)."""
    return generator.getrandbits(8 * size).to_bytes(size, "little")


# -- Options ------------------------------------------------------------------
#
# A handler's declaration, read: its options with types, defaults and help; the fields that
# every rule has; blocking handlers; and users' handlers, imported by a dotted path.

class BaseHandler:
    """A blocking handler: it receives the sockets and may block, in a thread of its own.

    name       the name it is registered under
    options    {option: (help, type, default)}

    One object serves all connections of a proxy, several at the same time.
    """

    name = ""
    options: dict = {}
    blocking = True         # recognises a subclass even if it imports another copy of this file

    def __init__(self, settings=None, proxy=None):
        self.settings = dict(settings or {})
        self.proxy = proxy
        self.logger = log

    def __call__(self, client_sock, backend_sock, to_backend):
        """Handle readable data: from the client if to_backend, else from the backend.

        The source has data to read. If the handler leaves some unread, it is called again
        at once. Data that is read and not sent is lost. The sockets are valid during this
        call only. An exception, or closing one of them, ends the connection.
        """
        raise NotImplementedError

    def update_settings(self, settings):
        self.settings.update(settings)

    def option(self, name):
        """Return an option's value, converted to its declared type."""
        _, type_, default = self.options[name]
        value = self.settings.get(name, default)
        return check_yes_no(value) if type_ is bool else type_(value)

    def _get_data(self, client_sock, backend_sock=None, to_backend=True, buffer=CHUNK):
        """Receive from the source. Returns b"" at the end of the stream or after an error."""
        try:
            return (client_sock if to_backend else backend_sock).recv(buffer)
        except OSError:
            return b""


def is_blocking_handler(function):
    """Return whether this is a subclass of BaseHandler, in this or another copy of the file."""
    return isinstance(function, type) and getattr(function, "blocking", False)


def handler_options(function):
    """Return the options of a handler: {option: default}."""
    if is_blocking_handler(function):
        return {name: type_(default) for name, (_, type_, default) in function.options.items()}
    return getattr(function, "__kwdefaults__", None) or {}


def summary(function):
    """Return the first line of a function's docstring. Empty under -OO."""
    return (inspect.getdoc(function) or "").partition("\n")[0]


def option_help(function):
    """Return the line of help for each option: {option: help}."""
    if is_blocking_handler(function):
        return {name: text for name, (text, _, _) in function.options.items()}
    lines = re.findall(r"^(\w+) {2,}(\S.*)$", inspect.getdoc(function) or "", re.MULTILINE)
    return {name: text for name, text in lines if name in handler_options(function)}


def get_handler(name):
    """Return the handler of that name. Raises ValueError if there is none."""
    if not isinstance(name, str) or name not in HANDLERS:
        name = name[:50] if isinstance(name, str) else name
        raise ValueError("unknown handler %r: there are %s" % (name, ", ".join(sorted(HANDLERS))))
    return HANDLERS[name]


def check_option(name, option, value):
    """Convert an option of a handler, given with its type or as text.

    Raises ValueError with the end of a sentence that begins with the option's name.
    """
    defaults = handler_options(get_handler(name))
    if option not in defaults:
        raise ValueError("is not an option of %s: it has %s"
                         % (name, ", ".join(sorted(defaults)) or "none"))
    type_ = type(defaults[option])
    if type_ is str and isinstance(value, (str, int)) and not isinstance(value, bool):
        return str(value)
    if type_ is bool:
        return check_yes_no(value)
    checked = check_number(value, type_, {int: "a whole number, 0 or more",
                                          float: "a number, 0 or more", str: "text"}[type_])
    if checked > INT64_MAX:
        raise ValueError("must be less than 2**63, not %r" % (value,))
    return checked


def check_match(text):
    """Compile a regular expression for the bytes of a request."""
    if not isinstance(text, str) or not text:
        raise ValueError("must be a regular expression, not %r" % (text,))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")     # constructs whose meaning may change in Python
            return re.compile(text.encode("utf-8"))
    except (re.error, UnicodeError, RecursionError, OverflowError) as error:
        raise ValueError("must be a regular expression, not %r: %s" % (text, error)) from None


# The fields that each rule has beside its handler and options. To add one, add a line here and
# its meaning in Rule or Chain. Constructors, JSON, ini files, the command line, its help and
# the comparison of rules all follow from this table.
Field = namedtuple("Field", "check default help")
RULE_FIELDS = OrderedDict((
    ("percent", Field(check_percent, 100.0, "how often the rule acts, from 0 to 100")),
    ("per", Field(choice_check("request", "connection"), "request",
                  "request or connection: what the percentage is drawn for")),
    ("stream", Field(choice_check("both", UPSTREAM, DOWNSTREAM), "both",
                     "both, upstream or downstream: which events the handler receives")),
    ("match", Field(check_match, None, "a regular expression that a request must contain")),
    ("after", Field(check_count, 0, "number of requests to leave alone first")),
    ("times", Field(check_count, 0, "number of requests to act on at most; 0 is no limit")),
))


def is_rule_field(function, key):
    """Return whether a key names a rule field. A handler's own option of that name wins."""
    return key in RULE_FIELDS and key not in handler_options(function)


def load_handler(name, path):
    """Import a user's handler by its dotted path and register it under a name.

    Only the command line and ini files do this. Raises ValueError.
    """
    module, _, attribute = path.rpartition(".")
    with contextlib.suppress(OSError):      # the working directory may have been removed
        if os.getcwd() not in sys.path and "" not in sys.path:
            sys.path.insert(0, os.getcwd())     # an installed `vaurien` lacks it
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as exc:      # the user's module may raise anything
        raise ValueError("cannot import %r: %s" % (
            path, " ".join(format_exception(exc).split()))) from None
    check_handler(path, function)
    HANDLERS[name] = function
    if is_blocking_handler(function) and function.name:
        HANDLERS.setdefault(function.name, function)


def check_handler(path, function):
    """Raise ValueError unless the object can be called as a handler."""
    expected = ("it must be a function (state, t, to, data, *, option=default ...), or a class "
                "that inherits from vaurien.handlers.BaseHandler")
    try:
        if isinstance(function, type) and not is_blocking_handler(function):
            raise TypeError("it is a class without that base")
        if not is_blocking_handler(function):
            inspect.signature(function).bind(None, None, None, None)
        options = handler_options(function)
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError("%r is not a handler: %s: %s" % (path, error, expected)) from None
    for option, default in options.items():
        if type(default) not in (bool, int, float, str):
            raise ValueError("%r: the default of option %r must be a yes/no, a number "
                             "or text, not %r" % (path, option, default))
        if option in ("name", "percent"):       # these two are needed to name and draw any rule
            raise ValueError("%r: an option cannot be called %r: that is a field of its rule"
                             % (path, option))


# -- Protocols ----------------------------------------------------------------
#
# What tells one request from the next in the client's bytes and one reply from the next
# in the backend's, and what a real server says when it fails. A protocol only reads what
# passes, and knows of no socket, clock or thread.
#
# Its two readers are generators, one for each way. They yield what they need next, are sent
# it, and mark where they are:
#
#   a number       so many bytes pass by
#   Take(number)   so many bytes are sent to it
#   Past(bytes)    all bytes up to the end of these pass by
#   a pattern      the bytes up to the end of its first match are sent to it, HEARD_MAX at most
#   a Request      what has passed since the last END is the head of a request: now it can
#                  be said what it is, and nothing of it need have been let through
#   MORE           what has passed since the last END goes on with the request before
#   END            here a request, or a reply, ends
#
# NotOurs is raised where bytes are not, or no longer, of the protocol: the connection goes
# on as plain tcp.
#
# A reader has read a whole chunk before anybody follows its marks (FramedLine.read). So the
# two know of each other through `pending` alone, the Requests that the backend is to answer;
# those without a reply are only in the line's row.

PROTOCOLS = OrderedDict((("tcp", None),))       # {name: class}
LINE = re.compile(rb"\n")
HEADERS = re.compile(rb"\n\r?\n")
PATTERN = type(LINE)
UNLIMITED = 1 << 62               # bytes that are of no more interest


def protocol(function):
    """Register a protocol under its own name, in small letters."""
    PROTOCOLS[function.__name__.lower()] = function
    return function


class NeedBytes(int):
    """So many bytes, to be looked at."""


class SkipUntil:
    """All bytes up to the end of these, of which some may have gone by."""

    __slots__ = ("words", "tail")

    def __init__(self, words, tail=b""):
        self.words, self.tail = words, tail


class ProtocolError(Exception):
    """These bytes are not of the protocol; the words are for the log."""


class Request:
    """What is known of a request when its head has come.

    text      what `match` is looked for in
    name      its command, in capitals
    replies   whether the backend answers it
    info      what else its protocol wants to know of it
    draws     whether dice are thrown for it; else it shares the lot of the one before
    """

    __slots__ = ("text", "name", "replies", "info", "draws")

    def __init__(self, text, name, replies=True, info=None, draws=True):
        self.text, self.name, self.replies, self.info = text, name, replies, info
        self.draws = draws


class Reply(namedtuple("Reply", "data closes substitute")):
    """How a fault answers a request.

    data       what is said in the backend's place
    closes     whether the connection is closed then
    instead    what the backend gets in the request's place, if it has to know
    """

    __slots__ = ()

    def __new__(cls, data, closes=False, substitute=b""):
        return super().__new__(cls, data, closes, substitute)


class Framer:
    """Where requests, or replies, begin and end in the bytes of one way, split as they come."""

    __slots__ = ("reader", "whole", "need", "kept", "between", "lost")

    def __init__(self, reader, whole=lambda data: None):
        """whole(bytes) knows usual messages that come alone, at one look: see Protocol."""
        self.reader = reader
        self.whole = whole
        self.need = next(reader)
        self.kept = b""             # of what is needed, from earlier pieces
        self.between = True         # whether all so far was whole messages
        self.lost = ""              # why the bytes are not the protocol's any more

    def usual(self, data):
        """The usual message that these bytes are, no more and no less; or None.

        It is a Request, or True of a reply; `feed` is told of it, if its marks are needed.
        """
        try:
            return self.whole(data) if self.between else None
        except ProtocolError as problem:
            self.lost = str(problem)
            return None

    def feed(self, data, size, found=None):
        """The marks in the first `size` of these bytes: [(offset, mark)].

        found    what `usual` has said of them
        """
        if found:
            return [(size, END_OF_MESSAGE)] if found is True else [(size, found), (size, END_OF_MESSAGE)]
        marks = []
        if self.lost:
            return marks
        try:
            self.read(data, size, marks)
        except ProtocolError as problem:
            self.lost = str(problem)
        if marks or self.between:
            self.between = bool(marks) and marks[-1] == (size, END_OF_MESSAGE)
        return marks

    def read(self, data, size, marks):
        at, need, kept, send = 0, self.need, self.kept, self.reader.send
        while True:
            kind = type(need)
            if kind is PATTERN and not kept:
                match = need.search(data, at, size)
                end = match.end() if match else size
                found = bytes(data[at:end])
                if len(found) > MATCH_WINDOW:
                    raise ProtocolError("a head of more than %d bytes" % MATCH_WINDOW)
                at = end
                if not match:
                    kept = found
                    break
                need = send(found)
            elif kind is PATTERN:
                text = kept + data[at:size]
                match = need.search(text)
                end = match.end() if match else len(text)
                if end > MATCH_WINDOW:
                    raise ProtocolError("a head of more than %d bytes" % MATCH_WINDOW)
                at += end - len(kept)
                if not match:
                    kept = text
                    break
                kept = b""
                need = send(bytes(text[:end]))
            elif kind is int:
                if need > size - at:
                    need -= size - at
                    break
                at += need
                need = send(None)
            elif kind is NeedBytes:
                found = kept + data[at:min(size, at + need - len(kept))]
                at += len(found) - len(kept)
                kept = found
                if len(kept) < need:
                    break
                kept = b""
                need = send(bytes(found))
            elif kind is SkipUntil:
                words, tail = need.words, need.tail
                near = tail + data[at:min(size, at + len(words) - 1)]
                found, start = near.find(words), at - len(tail)
                if found < 0:
                    found, start = data.find(words, at, size), 0
                if found < 0:
                    end = tail + data[max(at, size - len(words) + 1):size]
                    need.tail = bytes(end[-len(words) + 1:])
                    break
                at = start + found + len(words)
                need = send(None)
            else:
                marks.append((at, need))
                need = send(None)
        self.need, self.kept = need, kept


def read_opaque():
    """A reader to whom all is the same."""
    yield UNLIMITED


class Protocol:
    """What a connection's protocol has read of it.

    errors    {kind: what is said}: by the protocol's own names
    usual     the kinds that are drawn from where none is named
    greeting  the kinds that come when a client connects, in the place of all else
    closing   the kinds after which a server closes
    speaks    whether the backend speaks first, or is asked who it is: connecting is then
              a request by itself
    """

    errors: dict = {}
    default_errors: tuple = ()
    connect_errors: tuple = ()
    fatal_errors: tuple = ()
    server_first = False

    def __init__(self, host=b""):
        self.host = host            # what a request is to name in the client's words, if anything
        # Requests that the backend has, and has not answered; None stands for connecting.
        self.pending: deque = deque([None] if self.server_first else [])
        self.up = Framer(self.requests(), self.whole_request)
        self.down = Framer(self.replies(), self.whole_reply)

    def first(self):
        """The Request that is answered next; None while somebody connects."""
        return self.pending[0] if self.pending else None

    def ended(self):
        """A reply has come to its end."""
        return self.pending.popleft() if self.pending else None

    def requests(self):
        """The reader of the client's bytes."""
        raise NotImplementedError

    def replies(self):
        """The reader of the backend's bytes."""
        raise NotImplementedError

    def whole_request(self, data):
        """The Request that these bytes are, no more and no less, if it is a usual one.

        That draws, and is answered. Or None, and nothing is done. Raises NotOurs.
        """
        return None

    def whole_reply(self, data):
        """True if these bytes are a usual reply, which has `ended`; or None, and it has not."""
        return None

    def rewrite_head(self, head):
        """The head of a request as it is to go on."""
        return head

    def connect_error(self, kind, data):
        """The Reply to a client that connects, or None if that is no time for this kind.

        data    OPEN, or what it has said
        """
        return Reply(self.encode_error(kind), True) if kind in self.connect_errors else None

    def reply_with_error(self, state, t, to, data, kind):
        """Yield the events of a server that fails, as it happens in three moments.

        It refuses a client that connects. It replies to a request with an error when the
        request ends. Or, if the backend got a substitute for the request, when the backend's
        reply to that ends. An event for which a real server would not fail passes.
        """
        if state.current_request is None:
            yield from self.fail_connect(state, t, to, data, kind)
        else:
            if state.current_request not in state.replies:
                yield from self.begin_error(state, t, kind)
            yield from self.end_error(state, t, to, data)

    def fail_connect(self, state, t, to, data, kind):
        """A client connects: refuse it, or pass the event if this is no time to do so."""
        if to == DOWNSTREAM or data is EOF:
            yield t, to, data
            return
        if state["refused"]:
            return
        defaults = (self.connect_errors or self.fatal_errors) if self.server_first else ()
        kinds = [kind] if kind else defaults
        reply = None
        if kinds and data is not END_OF_MESSAGE:
            reply = self.connect_error(kinds[state.draw % len(kinds)], data)
        if reply is None:
            yield t, to, data
            return
        if reply.data:
            yield t, DOWNSTREAM, reply.data
        if reply.closes:
            state["refused"] = 1
            yield from close_both(t)

    def begin_error(self, state, t, kind):
        """A request begins: choose the reply to it, which may be None."""
        request = state.current_request
        reply = self.error_reply(kind or state.random.choice(self.default_errors), request)
        state.replies[request] = reply
        if reply and reply.closes:          # without waiting for the rest of the request
            state.replies[request] = Reply(b"")
            yield t, DOWNSTREAM, reply.data
            yield from close_both(t)
        elif reply and reply.substitute:
            yield t, UPSTREAM, reply.substitute

    def end_error(self, state, t, to, data):
        """Drop the request, or the reply to its substitute, and send the error at its end."""
        reply = state.replies[state.current_request]
        if reply is None or data is EOF or data is OPEN or (
                to == DOWNSTREAM and not reply.substitute):
            yield t, to, data
        elif data is END_OF_MESSAGE and reply.data and to == (
                DOWNSTREAM if reply.substitute else UPSTREAM):
            yield t, DOWNSTREAM, self.finish_reply(reply, state.current_request)

    def finish_reply(self, reply, request):
        """What is said when the request is complete, and what the backend got instead answered."""
        return reply.data

    def error_reply(self, kind, request):
        """The Reply to a request, or None if a server would not answer it so."""
        if kind in self.connect_errors or not request.replies:
            return None
        return Reply(self.encode_error(kind), kind in self.fatal_errors)

    def encode_error(self, kind):
        return self.errors[kind].encode() + b"\r\n"


def parse_length(text, most=1 << 60):
    """A number as protocols write it. Raises NotOurs."""
    text = text.strip()
    if not text.isdigit() or len(text) > 18 or int(text) > most:
        raise ProtocolError("%r is no length" % text[:20])
    return int(text)


@protocol
class Http(Protocol):
    """HTTP/1.0 and 1.1 (RFC 9112)."""

    errors = OrderedDict((
        ("500", "Internal Server Error"), ("502", "Bad Gateway"), ("503", "Service Unavailable"),
        ("504", "Gateway Timeout"), ("429", "Too Many Requests")))
    default_errors = ("500", "502", "503", "504")
    FIRST = re.compile(rb"\s*([A-Z]+) [^ \r\n]+ HTTP/1\.([01])\r?\n")
    STATUS = re.compile(rb"HTTP/1\.[01] (\d\d\d)")
    USUAL = re.compile(rb"HTTP/1\.[01] (200|[45]\d\d)")
    LENGTH = re.compile(rb"(?im)^content-length[ \t]*:[ \t]*(\d+)[ \t]*\r?$")
    CHUNKED = re.compile(rb"(?im)^transfer-encoding[ \t]*:.*chunked[ \t]*\r?$")
    CLOSE = re.compile(rb"(?im)^connection[ \t]*:.*\bclose\b")
    ALIVE = re.compile(rb"(?im)^connection[ \t]*:.*\bkeep-alive\b")
    SIZE = re.compile(rb"[ \t]*([0-9A-Fa-f]{1,15})[ \t]*[;\r\n]")
    EXPECT = re.compile(rb"(?im)^expect[ \t]*:.*100-continue")
    # Many a client asks again and again the same, or with the same fields, and is answered so.
    # What came alone last, up to REMEMBERED bytes: a request, and the Request made of it; its
    # fields, as they go on, and what they say; the head of a reply, and its length.
    asked: tuple = (None, None)
    fields: tuple = (None, None, False, False)
    answered: tuple = (None, 0)

    def requests(self):
        while True:
            head = yield HEADERS
            if not head.strip():            # empty lines before a request mean nothing
                yield CONTINUATION
                yield END_OF_MESSAGE
                continue
            yield self.request(head, *self.lasts(head, head.lower()))
            yield from self.body(head, 0)
            yield END_OF_MESSAGE

    def request(self, head, closes, alive):
        """The Request of a head whose fields say so."""
        first = self.FIRST.match(head)
        if not first:
            raise ProtocolError("no request line of HTTP/1")
        return Request(head.strip().replace(b"\r\n", b"\n"), first.group(1).decode(),
                       info=closes or (first.group(2) == b"0" and not alive))

    def lasts(self, head, low):
        """What its fields say: (whether it is the last on its connection, whether it is not).

        low     the same in small letters, to look for words in
        """
        if b"\nconnection" not in low and b"\nexpect" not in low:
            return False, False
        return (bool(self.CLOSE.search(head) or self.EXPECT.search(head)),
                bool(self.ALIVE.search(head)))

    def whole_request(self, data):
        same, request = self.asked
        if data != same:
            text = data[data.find(b"\n"):]
            fields = self.fields if text == self.fields[0] else self.read_fields(text)
            if not fields or not data[:1].isalpha():
                return None
            request = self.request(data, *fields[2:])
            if len(data) <= CACHED_HEAD_MAX:
                self.asked, self.fields = (data, request), fields
        return Request(request.text, request.name, info=request.info)

    def read_fields(self, text):
        """What `fields` remembers of usual ones, from the line's end before them; or None."""
        low = text.lower()
        if (text[-3:] != b"\n\r\n" or text.find(b"\n\r\n") < len(text) - 3 or b"\n\n" in text
                or b"\ncontent-length" in low or b"\ntransfer-encoding" in low):
            return None
        return (text, self.rewrite_head(text), *self.lasts(text, low))

    def replies(self):
        while True:
            head = yield HEADERS
            found = self.STATUS.match(head)
            if not found:
                raise ProtocolError("no status line of HTTP/1")
            status, request = int(found.group(1)), self.first()
            name = request.name if request else ""
            if status == 101 or (name == "CONNECT" and 200 <= status < 300):
                raise ProtocolError("another protocol from here")
            if status >= 200:
                if name != "HEAD" and status not in (204, 304):
                    yield from self.body(head, UNLIMITED)
                self.ended()
                yield END_OF_MESSAGE

    def whole_reply(self, data):
        request, end = self.first(), data.find(b"\n\r\n") + 3
        if not request or request.name in ("HEAD", "CONNECT"):
            return None
        head, length = data[:end], len(data) - end
        if (head, length) != self.answered:
            low = head.lower()
            at = low.find(b"\ncontent-length")
            if (at < 0 or not low.startswith(b": %d\r\n" % length, at + len(b"\ncontent-length"))
                    or not self.USUAL.match(head) or b"\n\n" in low
                    or b"\ntransfer-encoding" in low):
                return None
            self.answered = (head, length) if end <= CACHED_HEAD_MAX else (None, 0)
        self.ended()
        return True

    def body(self, head, usual):
        """What follows a head; usual is its length where nothing is said of it."""
        low = head.lower()
        if b"\ntransfer-encoding" in low and self.CHUNKED.search(head):
            size = 1
            while size:
                line = yield LINE
                found = self.SIZE.match(line)
                if not found:
                    raise ProtocolError("%r is no chunk" % line[:20])
                size = int(found.group(1), 16)
                if size:
                    yield size + 2
            while (yield LINE).strip():     # trailers
                pass
        else:
            length = b"\ncontent-length" in low and self.LENGTH.search(head)
            yield parse_length(length.group(1)) if length else usual

    def rewrite_head(self, head):
        start = head.find(b"\n")
        fields, named = self.fields[:2]
        if head[start:] == fields:
            return head if named is fields else head[:start] + named
        at = head.lower().find(b"\nhost:") + len(b"\nhost:") if self.host else 0
        named = head[at:head.find(b"\n", at)].strip(b" \t\r")
        if at < len(b"\nhost:") or named.lower() == self.host:
            return head
        return head[:at] + head[at:].replace(named, self.host, 1) if named else head

    def error_reply(self, kind, request):
        words = "%s %s" % (kind, self.errors[kind])
        body = "" if request.name == "HEAD" else words + "\n"
        head = ["HTTP/1.1 " + words, "Content-Type: text/plain", "Content-Length: %d"
                % (len(words) + 1)]
        head += ["Retry-After: 5"] * (kind in ("429", "503"))
        head += ["Connection: close"] * request.info
        return Reply(("\r\n".join(head) + "\r\n\r\n" + body).encode(), request.info)


@protocol
class Redis(Protocol):
    """RESP2 and RESP3, and inline commands (redis.io, protocol specification)."""

    errors = OrderedDict((
        ("LOADING", "Redis is loading the dataset in memory"),
        ("BUSY", "Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN "
                 "NOSAVE."),
        ("OOM", "command not allowed when used memory > 'maxmemory'."),
        ("READONLY", "You can't write against a read only replica."),
        ("MISCONF", "Redis is configured to save RDB snapshots, but it's currently unable to "
                    "persist to disk. Commands that may modify the data set are disabled, "
                    "because this instance is configured to report errors during writes if RDB "
                    "snapshotting fails (stop-writes-on-bgsave-error option). Please check the "
                    "Redis logs for details about the RDB error."),
        ("MASTERDOWN", "Link with MASTER is down and replica-serve-stale-data is set to 'no'."),
        ("NOREPLICAS", "Not enough good replicas to write."),
        ("CLUSTERDOWN", "The cluster is down"), ("MOVED", "3999 127.0.0.1:6381"),
        ("ASK", "3999 127.0.0.1:6381"),
        ("TRYAGAIN", "Multiple keys request during rehashing of slot"),
        ("NOAUTH", "Authentication required."),
        ("MAXCLIENTS", "max number of clients reached")))
    default_errors = ("LOADING", "BUSY", "OOM", "READONLY", "MISCONF", "CLUSTERDOWN")
    connect_errors = ("MAXCLIENTS",)
    # From these on the backend speaks when it likes.
    PUSHES = {"SUBSCRIBE", "PSUBSCRIBE", "SSUBSCRIBE", "MONITOR", "SYNC", "PSYNC", "REPLCONF"}

    def __init__(self, host=b""):
        self.queueing = False       # between MULTI and EXEC
        super().__init__(host)

    def requests(self):
        while True:
            line = yield LINE
            words, room, said = [], MATCH_WINDOW, False
            if line[:1] == b"*":
                number_check = 0 if line[1:2] == b"-" else parse_length(line[1:], 1 << 20)
                for _ in range(number_check):
                    line = yield LINE
                    if line[:1] != b"$":
                        raise ProtocolError("%r in a command" % line[:20])
                    size = parse_length(line[1:])
                    if size <= room:
                        words.append((yield NeedBytes(size + 2))[:size])
                        room -= size
                        continue
                    words.append((yield NeedBytes(room)))
                    if not said:
                        said = True         # its name and more is known: enough
                        yield self.request(words)
                    yield size - room + 2
                    room = 0
            else:
                words = line.split()
            if not said:
                yield self.request(words)
            yield END_OF_MESSAGE

    def whole_request(self, data):
        parts = data.split(b"\r\n")     # *2, $3, GET, $5, hello, and nothing
        words = parts[2:-1:2]
        if not words or parts[-1] or parts[0] != b"*%d" % len(words) or parts[1:-1:2] != [
                b"$%d" % len(word) for word in words]:
            return None
        return self.request(words)

    def request(self, words):
        name = words[0].upper().decode("latin-1") if words else ""
        if name in self.PUSHES or (name == "CLIENT" and words[1:2]
                                   and words[1].upper() in (b"REPLY", b"TRACKING")):
            raise ProtocolError("%s: from here it pushes" % name)
        request = Request(b" ".join(words), name, bool(words), self.queueing)
        if name in ("MULTI", "EXEC", "DISCARD", "RESET"):
            self.queueing = name == "MULTI"
        return request

    def replies(self):
        while True:
            left = 1
            while left:
                line = yield LINE
                kind, left = line[:1], left - 1
                if kind in (b"$", b"=", b"!"):
                    if line[1:2] not in (b"-", b"?"):
                        yield parse_length(line[1:]) + 2
                elif kind in (b"*", b"~", b"%"):
                    if line[1:2] != b"-":
                        left += parse_length(line[1:]) * (1 + (kind == b"%"))
                elif kind == b"|":          # attributes, then what they are of
                    left += 2 * parse_length(line[1:]) + 1
                elif kind not in (b"+", b"-", b":", b"_", b"#", b",", b"("):
                    raise ProtocolError("%r is no reply" % line[:20])
            self.ended()
            yield END_OF_MESSAGE

    def whole_reply(self, data):
        end, kind = data.find(b"\n") + 1, data[:1]
        if not (kind in (b"+", b"-", b":") and 0 < end == len(data)):
            size = data[1:end - 2]
            if kind != b"$" or data[end - 2:end] != b"\r\n" or not size.isdigit() or (
                    end + int(size[:9]) + 2 != len(data)):
                return None
        self.ended()
        return True

    def encode_error(self, kind):
        name = "ERR" if kind == "MAXCLIENTS" else kind
        return ("-%s %s\r\n" % (name, self.errors[kind])).encode()

    def error_reply(self, kind, request):
        # A server in trouble refuses what a transaction queues, and EXEC then tells of it.
        if request.name in ("QUIT", "RESET", "MULTI", "EXEC", "DISCARD"):
            return None
        # A command that is refused spoils its transaction: the backend gets one that it refuses.
        reply = super().error_reply(kind, request)
        return reply and reply._replace(
            substitute=b"*1\r\n$7\r\nvaurien\r\n" if request.info else b"")


@protocol
class Memcache(Protocol):
    """The text protocol of memcached, with its meta commands (doc/protocol.txt)."""

    errors = OrderedDict((
        ("SERVER_ERROR", "SERVER_ERROR out of memory"),
        ("OUT_OF_MEMORY", "SERVER_ERROR out of memory storing object"),
        ("WRITING", "SERVER_ERROR out of memory writing get response"),
        ("TOO_LARGE", "SERVER_ERROR object too large for cache"),
        ("CLIENT_ERROR", "CLIENT_ERROR bad data chunk"), ("ERROR", "ERROR"),
        ("TOO_MANY", "ERROR Too many open connections")))
    default_errors = ("SERVER_ERROR",)
    connect_errors = ("TOO_MANY",)
    STORE = {"set", "add", "replace", "append", "prepend", "cas"}
    GET = {"get", "gets", "gat", "gats"}
    META = {"mg", "ms", "md", "ma", "me", "mn"}

    def requests(self):
        while True:
            line = yield LINE
            if line[:1] == b"\x80":
                raise ProtocolError("the binary protocol")
            words = line.split()
            name = words[0].decode("latin-1") if words else ""
            if name in ("watch", "lru_crawler"):
                raise ProtocolError("%s: from here it pushes" % name)
            size = 4 if name in self.STORE else 2
            body = 0
            if name in self.STORE or name == "ms":
                if len(words) <= size:
                    name = ""               # it is answered with an error
                else:
                    body = parse_length(words[size]) + 2
            # A quiet meta command is answered or not: whoever sends one waits for `mn`.
            quiet = name in self.META and b"q" in [word[:1] for word in words[2:]]
            silent = words[-1:] == [b"noreply"] and name not in self.GET
            replies = not (silent or quiet or name == "quit")
            yield Request(line.strip(), name, replies, quiet)
            yield body
            yield END_OF_MESSAGE

    def replies(self):
        while True:
            line = yield LINE
            words = line.split() or [b""]
            request = self.first()
            name = request.name if request else ""
            if words[0] == b"VALUE" and len(words) > 3:
                yield parse_length(words[3]) + 2
            elif words[0] == b"VA" and len(words) > 1:
                yield parse_length(words[1]) + 2
                if name != "mn":            # or else of a quiet one before
                    self.ended()
                    yield END_OF_MESSAGE
            elif name == "mn" and words[0] != b"MN":
                continue                    # of a quiet one before
            elif not (words[0] in (b"STAT", b"ITEM", b"PREFIX") and name not in self.GET):
                self.ended()
                yield END_OF_MESSAGE

    def error_reply(self, kind, request):
        if request.name == "mn":            # it says that all before it is done
            return None
        return super().error_reply(kind, request)


@protocol
class Mysql(Protocol):
    """MySQL's and MariaDB's client/server protocol."""

    errors = OrderedDict((
        ("1205", ("HY000", "Lock wait timeout exceeded; try restarting transaction")),
        ("1213", ("40001", "Deadlock found when trying to get lock; try restarting transaction")),
        ("1317", ("70100", "Query execution was interrupted")),
        ("3024", ("HY000", "Query execution was interrupted, maximum statement execution time "
                           "exceeded")),
        ("1969", ("70100", "Query execution was interrupted (max_statement_time exceeded)")),
        ("1290", ("HY000", "The MySQL server is running with the --read-only option so it cannot "
                           "execute this statement")),
        ("1203", ("42000", "User has already more than 'max_user_connections' active "
                           "connections")),
        ("1053", ("08S01", "Server shutdown in progress")),
        ("1927", ("70100", "Connection was killed")),
        ("4031", ("HY000", "The client was disconnected by the server because of inactivity. See "
                           "wait_timeout and interactive_timeout for configuring this behavior.")),
        ("1040", ("08004", "Too many connections")),
        ("1129", ("HY000", "Host is blocked because of many connection errors; unblock with "
                           "'mysqladmin flush-hosts'"))))
    default_errors = ("1205", "1213", "1317", "1290")
    connect_errors = ("1040", "1129")
    fatal_errors = ("1053", "1927", "4031")
    server_first = True
    QUERY, PREPARE, EXECUTE, CLOSE = 3, 0x16, 0x17, 0x19
    SILENT = {0x01, 0x18, CLOSE}            # QUIT, STMT_SEND_LONG_DATA

    def __init__(self, host=b""):
        self.statements = {}                # {number: text} of those that are prepared
        self.prepared = b""                 # the last text that was
        self.loading = False                # whether the client sends a LOCAL INFILE
        self.seq = 0                        # of the client's last packet
        super().__init__(host)

    def requests(self):
        known = False                       # whether the client has said what it can
        while True:
            head = yield NeedBytes(4)
            size = int.from_bytes(head[:3], "little")
            if head[3] or not size or self.loading:
                self.loading = self.loading and size > 0
                yield CONTINUATION                  # it goes on with logging in, or with LOCAL INFILE
                if head[3] and not known:
                    flags = yield NeedBytes(min(4, size))
                    size -= len(flags)
                    known = True
                    flags = int.from_bytes(flags, "little")
                    if size == 28 and flags & 0x800:
                        raise ProtocolError("TLS from here")
                    if flags & 0x20:
                        raise ProtocolError("compression from here")
                yield size
                yield END_OF_MESSAGE
                continue
            first = yield NeedBytes(min(size, MATCH_WINDOW))
            yield self.request(first)
            yield size - len(first)
            self.seq = 0
            while size == 0xFFFFFF:
                head = yield NeedBytes(4)
                size, self.seq = int.from_bytes(head[:3], "little"), head[3]
                yield size
            yield END_OF_MESSAGE

    def request(self, first):
        command, text = first[0], b""
        if command in (self.QUERY, self.PREPARE):
            text = first[1:]
            if command == self.PREPARE:
                self.prepared = text
        elif command == self.EXECUTE:           # -1 is the one that was prepared last
            text = (self.prepared if first[1:5] == b"\xff\xff\xff\xff" else
                    self.statements.get(first[1:5], b""))
        elif command == self.CLOSE:
            self.statements.pop(first[1:5], None)
        self.down = Framer(self.replies())      # one at a time: all before is answered
        for request in filter(None, self.pending):
            request.replies = False
        self.pending.clear()
        return Request(text, command, command not in self.SILENT,
                       first[1:5] if command == self.EXECUTE else text)

    def replies(self):
        """The first packet of a reply: the rest is over when the next request comes."""
        head = yield NeedBytes(4)
        size = int.from_bytes(head[:3], "little")
        first = yield NeedBytes(min(size, 5))
        request = self.first()
        if request and request.name == self.PREPARE and first[:1] == b"\0":
            self.statements[first[1:5]] = request.info
        self.loading = bool(request and request.name == self.QUERY and first[:1] == b"\xfb")
        yield size - len(first)
        self.ended()
        yield END_OF_MESSAGE
        yield UNLIMITED

    def encode_error(self, kind):
        state, words = self.errors[kind]
        body = b"\xff" + int(kind).to_bytes(2, "little")
        seq = int(kind not in self.connect_errors)        # before the greeting there is no state either
        body += (("#" + state) * seq + words).encode()
        return len(body).to_bytes(3, "little") + bytes([seq]) + body

    def error_reply(self, kind, request):
        # A deadlock rolls the whole transaction back, in the backend too.
        undo = b"\x09\0\0\0\x03ROLLBACK" if kind == "1213" else b""
        if request.name == self.EXECUTE and not undo and request.info != b"\xff\xff\xff\xff":
            undo = b"\5\0\0\0\x1a" + request.info      # as EXECUTE does: forget long data
        reply = super().error_reply(kind, request)
        return reply and reply._replace(substitute=undo)

    def finish_reply(self, reply, request):
        """With the number that follows the client's last packet."""
        return reply.data[:3] + bytes([(self.seq + 1) % 256]) + reply.data[4:]


def pg_message(kind, body):
    """A message of PostgreSQL's."""
    return kind + struct.pack(">I", 4 + len(body)) + body


@protocol
class Postgres(Protocol):
    """PostgreSQL's frontend/backend protocol 3."""

    errors = OrderedDict((
        ("57014", "canceling statement due to statement timeout"),
        ("40001", "could not serialize access due to concurrent update"),
        ("40P01", "deadlock detected"), ("55P03", "canceling statement due to lock timeout"),
        ("25006", "cannot execute INSERT in a read-only transaction"),
        ("53100", "could not extend file: No space left on device"), ("53200", "out of memory"),
        ("57P01", "terminating connection due to administrator command"),
        ("25P03", "terminating connection due to idle-in-transaction timeout"),
        ("57P05", "terminating connection due to idle-session timeout"),
        ("57P03", "the database system is starting up"),
        ("53300", "sorry, too many clients already")))
    default_errors = ("57014", "40001", "40P01", "55P03")
    connect_errors = ("57P03", "53300")
    fatal_errors = ("57P01", "25P03", "57P05")
    server_first = True
    TLS, GSS, CANCEL = 80877103, 80877104, 80877102
    UNDONE = re.compile(rb"(?i)\s*(rollback|abort)\b")
    DONE = re.compile(rb"(?i)\s*(commit|end)\b")

    def __init__(self, host=b""):
        self.statements, self.portals = {}, {}      # {name: text}
        self.asked = False          # for TLS or GSS encryption: the reply is one byte
        self.status = b"I"          # of the transaction: idle, in one, in a failed one
        self.skipping = False       # whether all is left out up to the next Sync
        self.executed = False       # whether something was, since the last Sync
        self.copying = False        # whether the backend reads COPY's data: it ignores Sync
        super().__init__(host)

    def requests(self):
        while True:
            size, code = struct.unpack(">II", (yield NeedBytes(8)))
            if code not in (self.TLS, self.GSS, self.CANCEL) and code >> 16 != 3:
                raise ProtocolError("no start-up message")
            if code in (self.TLS, self.GSS):
                self.asked = True
                self.down = Framer(self.replies())      # nothing is on its way
            yield CONTINUATION
            yield max(0, size - 8)
            yield END_OF_MESSAGE
            if code >> 16 == 3:
                break
        while True:
            yield from self.batch()

    def batch(self):
        """The messages up to one that is answered as a whole."""
        request = None
        while True:
            kind, size = struct.unpack(">cI", (yield NeedBytes(5)))
            size -= 4
            if not kind.isalpha() or size < 0:
                raise ProtocolError("%r is no message" % kind)
            if kind in b"dcfpHX" and not request:       # COPY's data, a password, Flush, the end
                self.copying = self.copying and kind not in b"cf"
                yield CONTINUATION
                yield size
                yield END_OF_MESSAGE
                return
            text = yield NeedBytes(min(size, MATCH_WINDOW))
            if kind == b"P":
                name, query = [*text.split(b"\0", 2), b""][:2]
                self.statements[name] = query
            elif kind == b"C":
                table = self.statements if text[:1] == b"S" else self.portals
                table.pop(text[1:-1], None)
            elif kind == b"B" and text.count(b"\0") > 1:
                portal, name = text.split(b"\0")[:2]
                self.portals[portal] = self.statements.get(name, b"")
                if not request:
                    request = Request(self.portals[portal], "EXECUTE", not self.skipping)
                    yield request
            elif kind in b"QFSE" and not request:
                name = {b"Q": "QUERY", b"F": "QUERY", b"S": "SYNC"}.get(kind, "EXECUTE")
                text = (text if kind == b"Q" else self.portals.get(text.split(b"\0")[0], b"")
                        if kind == b"E" else b"")
                request = Request(text.rstrip(b"\0"), name,
                                  not (self.skipping and name == "EXECUTE")
                                  and not (self.copying and name == "SYNC"),
                                  draws=not (name == "SYNC" and self.executed))
                yield request
            yield size - min(size, MATCH_WINDOW)
            if kind in b"QFSE":
                self.executed = kind == b"E"
                if kind == b"S":
                    self.skipping = False
                    request.name, request.replies = "SYNC", not self.copying
                yield END_OF_MESSAGE
                return

    def replies(self):
        while True:
            if self.asked:
                self.asked = False
                if (yield NeedBytes(1)) in b"SG":
                    raise ProtocolError("encryption from here")
                continue
            kind, size = struct.unpack(">cI", (yield NeedBytes(5)))
            if not kind.isalnum():
                raise ProtocolError("%r is no message" % kind)
            if kind == b"Z":
                self.status = yield NeedBytes(1)
                size -= 1
            yield max(0, size - 4)
            request = self.first()
            if kind == b"Z":
                self.ended()
                yield END_OF_MESSAGE
            elif request and request.name == "EXECUTE" and kind in b"GW":
                self.copying = True
                self.pending.popleft()
                for other in self.pending:          # a Sync that it will not see
                    other.replies = False
                self.pending = deque([request])
            elif request and request.name == "EXECUTE" and kind in b"CIsE":
                self.ended()
                if kind == b"E":
                    self.skip()
                yield END_OF_MESSAGE

    def skip(self):
        """After an error, all is left out up to the next Sync."""
        while self.pending:
            request = self.pending[0]
            if request is None or request.name == "SYNC":
                return
            request.replies = False
            self.pending.popleft()
        self.skipping = True

    def finish_reply(self, reply, request):
        """The error, and for a simple query that the backend is ready again, in its own words."""
        ready = b"Z\0\0\0\5" + self.status if request.name == "QUERY" else b""
        return reply.data + ready

    def encode_error(self, kind):
        severity = "FATAL" if kind in self.fatal_errors or kind in self.connect_errors else "ERROR"
        body = ("S%s\0V%s\0C%s\0M%s\0\0" % (severity, severity, kind, self.errors[kind])).encode()
        return pg_message(b"E", body)

    def connect_error(self, kind, data):
        """It says so when it knows who is there; no encryption until then."""
        if kind not in self.connect_errors:
            return None
        if not data:
            return Reply(b"")
        asks = data[4:8] in (struct.pack(">I", self.TLS), struct.pack(">I", self.GSS))
        return Reply(b"N") if asks else Reply(self.encode_error(kind), True)

    def error_reply(self, kind, request):
        if kind in self.connect_errors or request.name == "SYNC":
            return None
        if kind in self.fatal_errors:
            return Reply(self.encode_error(kind), True)
        if self.status == b"E" or self.UNDONE.match(request.text):
            return None             # what has failed is only left
        if self.DONE.match(request.text):       # a COMMIT that fails has rolled back
            instead = pg_message(b"Q", b"ROLLBACK\0") if request.name == "QUERY" else (
                pg_message(b"P", b"\0ROLLBACK\0\0\0") + pg_message(b"B", b"\0\0\0\0\0\0\0\0")
                + pg_message(b"E", b"\0\0\0\0\0"))
            return Reply(self.encode_error(kind), False, instead)
        # The backend fails as well, so that it is where the client believes it to be: in a
        # failed transaction, or leaving out all up to the next Sync. Its words are replaced.
        instead = (pg_message(b"Q", b"vaurien\0") if request.name == "QUERY" else
                   pg_message(b"P", b"vaurien\0vaurien\0\0\0"))
        return Reply(self.encode_error(kind), False, instead)


@protocol
class Smtp(Protocol):
    """SMTP with PIPELINING and CHUNKING (RFC 5321, 2920, 3030)."""

    errors = OrderedDict((
        ("450", "4.2.1 mailbox busy"),
        ("451", "4.3.0 Requested action aborted: local error in processing"),
        ("452", "4.3.1 Insufficient system storage"),
        ("421", "4.3.2 Service not available, closing transmission channel"),
        ("454", "4.7.0 TLS not available due to temporary reason"),
        ("552", "5.3.4 Message size exceeds fixed limit"),
        ("554", "5.7.1 Transaction failed")))
    default_errors = ("450", "451", "452")
    fatal_errors = ("421",)
    server_first = True
    asks = False                # whether the backend wants to know more, for AUTH

    def requests(self, message=False):
        while True:
            if message:                     # after DATA was answered by 354
                first = yield NeedBytes(1)
                yield Request(b"", "MESSAGE")
                yield SkipUntil(b"\r\n.\r\n", b"\r\n" + first)
                message = False
                yield END_OF_MESSAGE
                continue
            line = yield LINE
            if self.asks:                   # AUTH goes on
                self.asks = False
                yield CONTINUATION
                yield END_OF_MESSAGE
                continue
            words = line.decode("latin-1").split()
            name = words[0].upper() if words else ""
            yield Request(line.strip(), name)
            if name == "BDAT" and len(words) > 1:
                yield parse_length(words[1].encode())
            yield END_OF_MESSAGE

    def replies(self):
        while True:
            line = yield LINE
            if not line[:3].isdigit():
                raise ProtocolError("%r is no reply" % line[:20])
            if line[3:4] == b"-":
                continue
            if line[:3] == b"334":
                self.asks = True
                continue
            request = self.first()
            name = request.name if request else ""
            if name == "STARTTLS" and line[:3] == b"220":
                raise ProtocolError("TLS from here")
            if name == "DATA" and line[:3] == b"354":
                self.up = Framer(self.requests(message=True))   # nothing of it has come yet
            self.ended()
            yield END_OF_MESSAGE

    def encode_error(self, kind):
        return ("%s %s\r\n" % (kind, self.errors[kind])).encode()

    def connect_error(self, kind, data):
        return Reply(self.encode_error(kind), True) if kind in self.fatal_errors else None

    def error_reply(self, kind, request):
        if request.name in ("QUIT", "MESSAGE"):
            return None             # the backend waits for the message: it is DATA that fails
        undo = b"RSET\r\n" if request.name in ("DATA", "BDAT") else b""
        return super().error_reply(kind, request)._replace(substitute=undo)


check_protocol = choice_check(*PROTOCOLS)


# -- Rules --------------------------------------------------------------------
#
# A rule is a handler with options, active on a proxy, and the fields that say when it acts.
# A toxic is a rule with a name of its own. A draw decides whether a rule acts: a number that
# depends on the seed and on what it is drawn for, and on nothing else. This section knows no
# connections and no sockets.

PERCENT_SUM_MAX = 100.000001        # percent: 33.3 three times and 0.1 count as 100
DRAW_TO_PERCENT = 100 / 2 ** 64     # a draw is a whole number of 64 bits
DRAW_BLOCK = struct.Struct(">8Q")   # the 8 draws of one blake2b hash


class Rule:
    """A handler with its options, active on a proxy, and when it acts.

    name                the handler's name
    options             {option: value}
    draw_min, draw_max  percent: the rule acts if its draw is at least draw_min, below draw_max
    draw_key            names the draw; rules with the same key share one draw, so that at
                        most one of them acts
    fields              those of RULE_FIELDS, each an attribute of its name, but for percent
    """

    __slots__ = ("name", "handler", "options", "draw_min", "draw_max", "draw_key", "direction",
                 "rate_limited", "blocking", "drawn_count", "activations", "shared",
                 "error_logged", "instance",
                 *(field for field in RULE_FIELDS if field != "percent"))

    per: str
    stream: str
    match: "re.Pattern"
    after: int
    times: int

    def __init__(self, name, options=None, draw_min=0.0, draw_max=100.0, draw_key="behavior",
                 **fields):
        self.name = name
        self.handler = get_handler(name)
        self.draw_min, self.draw_max, self.draw_key = draw_min, draw_max, draw_key
        for field, (_, default, _) in RULE_FIELDS.items():
            if field != "percent":
                setattr(self, field, fields.pop(field, default))
        if fields:
            raise TypeError("a rule has no field %s" % ", ".join(fields))
        self.set_options(dict(handler_options(self.handler), **options or {}))
        self.rate_limited = getattr(self.handler, "rate_limited", False)
        self.blocking = is_blocking_handler(self.handler)   # it is no part of the chain
        self.drawn_count = 0        # requests, or connections, that it was drawn for
        self.activations = 0        # how many of them it has acted on
        self.shared = Counter()     # for the handler, across connections
        self.error_logged = False   # a traceback of the handler is in the log already
        self.instance = None        # of a blocking handler: the object that is called

    def set_options(self, options):
        """Replace the options. The direction of the events it receives may follow from them."""
        self.options = options
        choose = getattr(self.handler, "choose_direction", None)
        self.direction = choose(options) if choose and self.stream == "both" else self.stream

    def includes(self, draw):
        """Return whether the rule acts for this draw."""
        return self.draw_min <= draw * DRAW_TO_PERCENT < self.draw_max

    def __str__(self):
        """The handler and its options; a yes/no or a text only if it differs from its default."""
        defaults = handler_options(self.handler)
        shown = ["%s=%s" % (option, format_value(value))
                 for option, value in self.options.items()
                 if value != defaults[option] or not isinstance(value, (bool, str))]
        return " ".join([self.name] + shown)

    def to_json(self):
        """Return options and fields as one flat object, as `read_rules` accepts it."""
        table = dict(self.options, name=self.name, percent=self.draw_max - self.draw_min)
        for field in RULE_FIELDS:
            value = table.get(field, getattr(self, field, None))
            if value is not None:       # `match` is kept compiled
                table[field] = value.pattern.decode() if hasattr(value, "pattern") else value
        return table


class Toxic:
    """A rule on a proxy with a name, and so a draw, of its own, beside the behavior.

    name        unique on its proxy
    toxicity    how often it acts, from 0 to 1
    attributes  {option: value} as the user wrote them; negative numbers act as 0
    stream      "upstream", "downstream" or "both", in upper or lower case
    fields      other fields of its rule: per, match, after, times
    """

    # Toxiproxy's defaults, where they differ from those of RULE_FIELDS.
    DEFAULTS = {"per": "connection", "stream": DOWNSTREAM}

    def __init__(self, type_, name, toxicity=1.0, attributes=None, stream=DOWNSTREAM, **fields):
        self.name = name
        self.stream = stream        # as the user wrote it
        fields = dict(self.DEFAULTS, **fields)
        self.rule = Rule(type_, draw_key="toxic " + name, **dict(fields, stream=stream.lower()))
        self.attributes = dict(self.rule.options)
        self.set(toxicity, attributes or {})

    def set(self, toxicity, attributes):
        self.toxicity = toxicity
        self.attributes.update(attributes)
        self.rule.set_options({option: value if isinstance(value, str) else
                               max(value, type(value)())
                               for option, value in self.attributes.items()})
        self.rule.draw_max = 100.0 * toxicity

    def own_fields(self):
        """Return the rule fields that are not Toxiproxy's and differ from their defaults."""
        defaults = {name: self.DEFAULTS.get(name, field.default)
                    for name, field in RULE_FIELDS.items() if name not in ("percent", "stream")}
        return OrderedDict((name, getattr(self.rule, name)) for name in defaults
                           if getattr(self.rule, name) != defaults[name])

    def same_rule(self, other):
        """Return whether it differs from another in its toxicity and attributes at most."""
        return (self.stream, self.rule.name, self.own_fields()) == (
            other.stream, other.rule.name, other.own_fields())

    def __str__(self):
        return "%s (%g:%s %s)" % (self.name, 100 * self.toxicity, self.rule.stream, self.rule)


def parse_behavior(text):
    """Parse "20:delay,5:error" into [(20.0, "delay"), (5.0, "error")].

    The percentages are of the requests; the rest up to 100 passes unchanged.
    Raises ValueError.
    """
    shares = []
    for part in text.split(","):
        percent, colon, name = part.strip().partition(":")
        if not colon or not name.strip():
            raise ValueError("must be PERCENT:HANDLER[,PERCENT:HANDLER ...], "
                             "like 20:delay,5:error, not %r" % text)
        try:
            shares.append((check_percent(percent), name.strip()))
        except ValueError:
            raise ValueError("must be PERCENT:HANDLER with a percentage from 0 to 100, not %r"
                             % part.strip()) from None
    total = sum(percent for percent, _ in shares)
    if total > PERCENT_SUM_MAX:
        raise ValueError("must add up to 100 percent at most, not %g: %r" % (total, text))
    return shares


def check_fields(name, function, fields):
    """Return an error for each field with which a handler would not act: [(field, sentence)]."""
    errors = []
    stream = fields.get("stream", "both")
    if getattr(function, "changes_replies", False) and stream == UPSTREAM:
        errors.append(("stream", "stream must be both or downstream for %s, because it changes "
                                 "replies" % name))
    if is_blocking_handler(function):
        if stream != "both":
            errors.append(("stream", "stream must be both for %s, because it is a blocking "
                                     "handler" % name))
        if "match" in fields:
            errors.append(("match", "match is not possible for %s, because it is a blocking "
                                    "handler" % name))
    return errors


def read_rules(tables):
    """Return the rules of one behavior: they share one draw, so at most one of them acts.

    tables    [{"name": ..., and each option or rule field that differs from its default}]

    Raises InputError with one sentence for each error.
    """
    rules, draw_min, errors = [], 0.0, []
    for table in tables:
        fields, options = {}, {}
        name = table.get("name")
        try:
            function = get_handler(name)
        except ValueError as error:
            errors.append(("name", str(error)))
            function = None
        for key, value in table.items():
            try:
                if is_rule_field(function, key):
                    fields[key] = RULE_FIELDS[key].check(value)
                elif function and key != "name":
                    options[key] = check_option(name, key, value)
            except ValueError as error:
                errors.append((key, "%s %s" % (key, error)))
        errors += check_fields(name, function, fields)
        percent = fields.pop("percent", 100.0)
        if function and function is not dummy and not errors:   # dummy needs no rule
            rules.append(Rule(name, options, draw_min, draw_min + percent, **fields))
        draw_min += percent
    if draw_min > PERCENT_SUM_MAX:
        errors.append(("percent", "percent must add up to 100 at most, not %g" % draw_min))
    if errors:
        raise InputError(errors)
    return rules


def make_toxic(type_, name, fields, attributes, toxiproxy=False):
    """Return a Toxic made of unchecked values, each given as a JSON value or as text.

    fields       {"toxicity" or "percent", "stream" or another rule field: value}
    attributes   {option: value}
    toxiproxy    whether to accept what Toxiproxy's server accepts: any toxicity, negative
                 numbers, a stream in upper case

    Raises InputError: one (field or option, sentence) for each error.
    """
    checked, errors, values = {}, [], {}

    def check(target, key, function, *args):
        try:
            target[key] = function(*args)
        except ValueError as error:
            errors.append((key, "%s %s" % (key, error)))

    for key, value in fields.items():
        if key == "toxicity":
            check(checked, key, float if toxiproxy else check_toxicity, value)
        elif key == "stream":
            check(checked, key, RULE_FIELDS[key].check, value.lower() if toxiproxy else value)
        elif key in RULE_FIELDS:
            check(checked, key, RULE_FIELDS[key].check, value)
        else:
            errors.append((key, "%s is not a field of a toxic" % key))
    for option, value in attributes.items():
        if toxiproxy and type(value) is int and value < 0 and option in MAY_BE_NEGATIVE:
            values[option] = value
        else:
            check(values, option, check_option, type_, option, value)
    if "toxicity" in checked and "percent" in checked:
        errors.append(("percent", "percent and toxicity mean the same: give one of them"))
    errors += check_fields(type_, get_handler(type_), checked)
    if errors:
        raise InputError(errors)
    toxicity = checked.pop("toxicity", checked.pop("percent", 100.0) / 100)
    stream = fields["stream"] if "stream" in checked else DOWNSTREAM
    checked.pop("stream", None)
    return Toxic(type_, name, toxicity, values, stream, **checked)


# Toxiproxy accepts negative numbers for these attributes; they act as 0.
MAY_BE_NEGATIVE = {"latency", "jitter", "delay", "timeout", "bytes"}


class State(Counter):
    """A handler's memory of what its fault was drawn for; see the room of handlers."""

    request_number = 0
    protocol = current_request = generator = None
    protocol_lost = False                  # whether a connection has left its protocol: TLS

    def __init__(self, rule, draw, number_check):       # a Counter's own would only cost time
        self.shared = rule.shared
        self.stream = rule.stream
        self.request = number_check
        self.replies = {}           # {Request: Reply or None}, of `error`
        self.draw = draw

    @property
    def random(self):
        if self.generator is None:      # most handlers never ask
            self.generator = random.Random(self.draw)
        return self.generator


class ActiveRule:
    """A rule at work on one request or one connection, with its memory."""

    __slots__ = ("rule", "state", "match_buffer", "number", "acted")

    def __init__(self, rule, state=None, heard=None):
        self.rule = rule
        self.state = state      # None where it does not act
        self.match_buffer = heard      # of a request that may yet match; None when that is decided
        self.number = rule.drawn_count
        self.acted = False      # whether it has changed anything yet

    def may_act(self):
        """Whether it has begun to, or its rule may do so once more."""
        return self.acted or not 0 < self.rule.times <= self.rule.activations

    def act(self):
        """It changes something; returns whether that is for the first time."""
        first, self.acted = not self.acted, True
        self.rule.activations += first
        return first


class RuleSet:
    """The rules armed on one proxy, and its dice.

    Every draw is a pure function of the seed, the proxy's name, the dice's name, the
    connection's number and the request's number in it, so that neither threads nor
    timing change it: the same seed gives the same faults, on every Python. One hash
    throws the dice for 8 requests in a row.
    """

    def __init__(self, seed, proxy):
        self.seed, self.proxy = seed, proxy
        self.armed = []
        self.requests = 0       # begun at this proxy
        self.draw_key = {}          # name: a hash of all but the numbers

    def throw(self, dice, connection, block):
        """How the dice fall for a block of 8 requests: whole numbers of 64 bits.

        block    0 for the connection (request 0) and requests 1 to 7, 1 for 8 to 15 ...
        """
        throw = self.draw_key.get(dice)
        if throw is None:
            words = "%s %s %s " % (self.seed, self.proxy, dice)
            throw = self.draw_key[dice] = hashlib.blake2b(words.encode())
        throw = throw.copy()
        throw.update(b"%d %d" % (connection, block))
        return DRAW_BLOCK.unpack(throw.digest())

    def draw_rule(self, rule, connection, request, number_check):
        """A state if the rule acts on this request (request 0: this connection), or None.

        number   of the requests, or connections, that its dice were thrown for
        """
        if number_check <= rule.after:
            return None
        chance = self.throw(rule.draw_key, connection, request // 8)[request % 8]
        return State(rule, chance, number_check) if rule.includes(chance) else None

    def draw_ahead(self, connection, first):
        """Which rules act on a connection's requests, from this one to the end of its block.

        {request: [(rule, chance)]}; None where it is not the dice alone that decide.
        """
        found = {}
        for rule in self.armed:
            if rule.match or rule.per == "connection":
                return None
            chances = self.throw(rule.draw_key, connection, first // 8)
            for request in range(first, (first | 7) + 1):
                if rule.includes(chances[request % 8]):
                    found.setdefault(request, []).append((rule, chances[request % 8]))
        return found


class Chain:
    """What the rules make of one connection's events.

    A request begins when the connection opens, and again each time the client
    speaks after the backend has: that needs no parsing and is right for every
    protocol that takes turns.
    """

    __slots__ = ("rules", "connection", "request", "last_direction", "active", "late", "per_connection", "activated",
                 "number", "opaque", "protocol", "asked", "answered_early", "modified", "drawn_ahead",
                 "drawn_until")
    drawn_until: float

    def __init__(self, rules, connection):
        self.rules = rules
        self.protocol = None            # see FramedLine
        self.opaque = False             # whether it was one, and its protocol is over
        self.asked = None               # the Request that the events at hand belong to
        self.answered_early = False             # whether a client has been answered in the backend's place
        self.modified = False            # whether a step has changed what it saw
        self.connection = connection    # its number
        self.request = 0                # the number of the request under way
        self.drawn_ahead = None            # which rules act on the next requests: see Rules.foresee
        self.drawn_until = 0                # the first request after those
        self.last_direction = None             # which way its last bytes went, if there were any
        self.active = []                 # drawn for the request under way, in rule order
        self.late = []                  # rules that came before anybody spoke in it
        self.per_connection = {}               # per connection: {rule: step}
        self.activated = []                  # (rule, request) where one has acted for the first time
        self.number = 0                 # of the request that the events at hand belong to

    def begin(self):
        """A request begins: throw the dice for it."""
        self.request += 1
        self.number = self.request
        self.rules.requests += 1
        self.late = []
        if not self.rules.armed:
            self.active = []
            return
        if self.request >= self.drawn_until:
            self.drawn_ahead = self.rules.draw_ahead(self.connection, self.request)
            self.drawn_until = NEVER if self.drawn_ahead is None else (self.request | 7) + 1
        if self.drawn_ahead is None:
            for step in self.per_connection.values():
                if step and step.match_buffer:
                    step.match_buffer = b""
            self.active = self.drawn(self.draw)
            return
        for rule in self.rules.armed:
            rule.drawn_count += 1
        acting = self.drawn_ahead.get(self.request)
        self.active = [ActiveRule(rule, State(rule, chance, rule.drawn_count)) for rule, chance in acting
                      if rule.drawn_count > rule.after] if acting else []

    def turn(self, to):
        """The other side speaks: bytes go this way, and the last ones did not."""
        speaker, self.last_direction = self.last_direction, to
        if speaker is DOWNSTREAM:
            self.begin()
        elif speaker is None and self.late:
            self.redraw(self.late)

    def by_rule(self):
        return {step.rule: step for step in self.active}

    def rules_changed(self, new, changed=()):
        """The rules are others, or have changed: steps whose rule is gone go.

        New ones begin with the next request, or with this one if nobody has spoken yet;
        those drawn per connection at once. One that has changed keeps its memory.
        """
        at_work = self.by_rule()
        self.drawn_until = 0
        self.per_connection = {rule: self.per_connection[rule] for rule in self.per_connection
                        if rule in self.rules.armed}
        for rule in changed:
            step = self.per_connection.get(rule)
            if step and step.match_buffer is None:
                state = self.rules.draw_rule(rule, self.connection, 0, step.number)
                step.state = state if step.state is None or state is None else step.state
        self.late = [rule for rule in [*self.late, *new] if rule in self.rules.armed]
        self.active = self.drawn(at_work.get)

    def free(self, to, latest):
        """What was on its way has been released: thin wires have nothing queued after latest."""
        for step in self.active:
            if step.rule.rate_limited and step.state is not None:
                step.state[to] = min(step.state[to], latest)

    def draw(self, rule):
        """A step, that may act on the request under way, or when that matches."""
        if rule.match:
            return ActiveRule(rule, heard=b"")
        state = self.throw(rule)
        return ActiveRule(rule, state) if state is not None or rule.per == "connection" else None

    def throw(self, rule):
        """A state if the dice of the request under way, or of the connection, fall so; or None."""
        rule.drawn_count += 1
        return self.rules.draw_rule(rule, self.connection,
                                 self.request if rule.per == "request" else 0, rule.drawn_count)

    def redraw(self, rules):
        """Draw these rules for the request under way; the others stay as they were drawn."""
        at_work = self.by_rule()
        self.active = self.drawn(lambda rule: self.draw(rule) if rule in rules
                                else at_work.get(rule))

    def drawn(self, for_request):
        """The steps of the request under way, in the order of their rules."""
        steps = []
        for rule in self.rules.armed:
            if rule.per == "request":
                step = for_request(rule)
            elif rule in self.per_connection and not self.awaits_match(rule):
                step = self.per_connection[rule]
            else:
                step = self.per_connection[rule] = self.draw(rule)
            if step and (step.state is not None or step.match_buffer is not None):
                steps.append(step)
        return steps

    def awaits_match(self, rule):
        """Whether a rule that is drawn per connection is still to be drawn: for a FramedLine."""
        return False

    def observes(self, to):
        """Whether any step at work is to see the bytes of this way."""
        for step in self.active:
            if step.rule.direction in ("both", to) or step.match_buffer is not None:
                return True
        return False

    def blocking(self):
        """The first step at work that wants the sockets themselves, or None."""
        return next((step for step in self.active if step.rule.blocking and step.may_act()), None)

    def process(self, t, to, data):
        """What has become of an event after the last step: [(t, to, data, holds)].

        holds is which rules have put it off, by how much, and whether they have made it
        when they were shown OPEN: ((rule, seconds, made), ...).
        """
        return self.run_chain(self.active, t, to, [(t, to, data, ())])

    def process_open(self, t, ways, rules=None):
        """Show OPEN to the faults drawn for the connection; what comes of it, but OPEN.

        rules   those that begin now, or have changed, while it is open; None for all
        """
        found = []
        for place, step in enumerate(self.active):
            if step.rule.per == "connection" if rules is None else step.rule in rules:
                for to in ways:
                    made = self.run_chain([step], t, to, [(t, to, OPEN, ())], shown=True)
                    if made == [(t, to, RESET, ())]:
                        return made         # a bug: nobody holds that up
                    made = [event for event in made if event[2] is not OPEN]
                    found += self.run_chain(self.active[place + 1:], t, to, made)
        return found

    def run_chain(self, steps, t, to, events, shown=False):
        """What these steps make of the events that came of one at t; a bug resets."""
        for step in steps:
            if step.rule.blocking:
                continue                # it gets the sockets: see Connection.lend
            try:
                events = (self.run_rule(step, events[0], shown) if len(events) == 1 else
                          [out for event in events for out in self.run_rule(step, event, shown)])
            except (Exception, SystemExit) as problem:
                log.error("connection %d, request %d: handler %s failed and the connection is "
                          "reset: %s", self.connection, self.number, step.rule.name,
                          format_exception(problem), exc_info=not step.rule.error_logged)
                step.rule.error_logged = self.modified = True
                return [(t, to, RESET, ())]
        return events

    def run_rule(self, step, event, shown):
        """What a step makes of one event."""
        t, to, data, holds = event
        rule = step.rule
        if step.state is None and not self.matches(step, to, data):
            return [event]
        if rule.direction not in ("both", to) or (rule.times and not step.may_act()):
            return [event]
        state = step.state
        state.request_number, state.current_request = self.number, self.asked
        state.protocol, state.protocol_lost = self.protocol, self.opaque
        events = [(due if due > t else t, way, out) for due, way, out
                  in rule.handler(state, t, to, data, **rule.options)]
        if events == [(t, to, data)]:
            return [event]
        self.modified = True
        for _, way, out in events:
            if way not in (UPSTREAM, DOWNSTREAM) or not isinstance(out, bytes):
                raise TypeError("a handler yields (t, to, data), not (t, %r, %r)" % (way, out))
            if way == DOWNSTREAM and out:
                self.last_direction = DOWNSTREAM
                self.answered_early = self.answered_early or to == UPSTREAM
        if not shown or any(event[2] is not OPEN for event in events):
            if step.act():
                self.activated.append((rule, self.number))
        return [(due, way, out, holds if due == t else
                 holds + ((rule, due - t, data is OPEN and out is not OPEN),))
                for due, way, out in events]

    def matches(self, step, to, data):
        """Whether what the client has said by now is what the rule waits for, and it is drawn."""
        if to == UPSTREAM and data and step.match_buffer is not None and len(step.match_buffer) < MATCH_WINDOW:
            step.match_buffer += data[:MATCH_WINDOW - len(step.match_buffer)]
            if step.rule.match.search(step.match_buffer):
                step.state = self.throw(step.rule)
                step.match_buffer, step.number = None, step.rule.drawn_count
        return step.state is not None


class Exchange:
    """A request and its answer, of a connection whose protocol tells them apart.

    What a fault answers in the backend's place waits here until it is the first in the
    row: so replies stay in order, however many requests are under way.
    """

    __slots__ = ("number", "active", "request", "waiting", "sent", "complete", "over")

    def __init__(self, number_check, steps, request):
        self.number = number_check
        self.active = steps
        self.request = request      # None while the client connects
        self.waiting = []           # events, as in Line.carry
        self.sent = False           # whether the backend gets anything of it
        self.complete = False       # whether the request has come to its end
        self.over = False           # whether the reply has

    def is_done(self):
        return self.over or (self.complete and not (self.sent and self.request.replies))


class ProtocolChain(Chain):
    """A line whose protocol says where requests and replies begin and end.

    Bytes of the client belong to the last exchange of the row, bytes of the backend to
    the first. The head of a request is held until it is known what it is, where any
    rule is armed; then its dice are thrown.
    """

    __slots__ = ("exchanges", "head", "in_request", "head_forwarded", "busy", "closing")

    def __init__(self, rules, connection, protocol):
        super().__init__(rules, connection)
        self.protocol = protocol
        self.exchanges = deque()
        self.head = b""             # of a request that is not known yet
        self.in_request = False         # whether the client is in the middle of a request
        self.head_forwarded = False         # whether some of its head has gone through already
        self.closing = False        # whether an error that closes waits for its turn
        self.busy = None            # the last in the row on which a fault that is gone is at work

    def begin(self):
        """A client connects; until it is known what it asks, where it speaks first."""
        super().begin()
        self.exchanges.append(Exchange(self.request, self.active, None))

    def append(self, request):
        """A request has begun."""
        last = self.exchanges[-1]
        self.asked = request
        connects = last.request is None and not self.protocol.server_first
        if connects and self.rules.armed:
            self.redraw([*self.late, *(rule for rule in self.rules.armed if rule.match)])
            self.late = []
        elif not connects and request.draws:
            super().begin()
        if self.head_forwarded:                 # too late for those that want all of it
            self.active = [step for step in self.active if step.rule.per == "connection"]
        if connects:
            last.request, last.active = request, self.active
        else:
            self.exchanges.append(Exchange(self.request, self.active, request))
        if self.head_forwarded:
            self.spare(self.exchanges[-1])

    def draw(self, rule):
        """A step, if the request is known and matches, where the rule says what it waits for."""
        if rule.match and not (self.asked and rule.match.search(self.asked.text[:MATCH_WINDOW])):
            return None
        return ActiveRule(rule, self.throw(rule))

    def awaits_match(self, rule):
        return rule.match and self.per_connection[rule] is None

    def rules_changed(self, new, changed=()):
        super().rules_changed(new, changed)
        last, self.busy = self.exchanges[-1], None
        for exchange in self.exchanges:       # what they have answered for, they finish
            exchange.active = [step for step in exchange.active
                              if (step.rule in self.rules.armed and exchange is not last)
                              or (step.state is not None
                                  and step.state.replies.get(exchange.request))]
            if exchange is last:
                exchange.active += [step for step in self.active if step not in exchange.active]
            if exchange.active or exchange.waiting:
                self.busy = exchange
        if last.sent:
            self.spare(last)

    def spare(self, exchange):
        """The backend has some of this request: it is too late to answer in its place."""
        for step in exchange.active:
            if step.state is not None:
                step.state.replies.setdefault(exchange.request, None)

    def leave(self):
        """Let the first of the row go, if it is over and not the last; whether it has gone."""
        if len(self.exchanges) == 1 or not self.exchanges[0].is_done():
            return False
        gone = self.exchanges.popleft()
        for step in gone.active:
            if step.state is not None:
                step.state.replies.pop(gone.request, None)
        if gone is self.busy:
            self.busy = None
        return True

    def turn(self, to):
        self.last_direction = to               # requests begin where the protocol says

    def pass_through(self, to, data, marks):
        """What goes on of bytes with these marks, which are followed, if no fault is at work.

        None if one may be, and nothing is done.
        """
        row = self.exchanges
        if not marks and not self.closing and (self.in_request or to == DOWNSTREAM):
            # The middle of a request, or of a reply: what it draws is drawn.
            return None if row[-1 if to == UPSTREAM else 0].active else data
        if self.rules.armed or self.head or self.busy or self.closing:
            return None
        if to == DOWNSTREAM:
            for _ in marks:             # the end of a reply, each
                row[0].over = True
                while len(row) > 1 and self.leave():
                    pass
            return data
        size = len(data)
        if self.protocol.host:          # a head is to go on as a whole
            mark = marks[0][1] if marks else None
            if type(mark) is not Request or (len(marks) > 1 and marks[1:] != [(size, END_OF_MESSAGE)]):
                return None
            head = bytes(data[:marks[0][0]])
            named = self.protocol.rewrite_head(head)
            if named is not head:
                data = named + data[len(head):]
        for _, mark in marks:
            self.follow(to, mark)
            row[-1].sent = True
            while len(row) > 1 and self.leave():
                pass
        if not self.in_request and (not marks or marks[-1][0] < size):
            self.head_forwarded = True
        return data

    def pass_whole(self, to, found, data):
        """What goes on of a usual message where nothing is armed, and no other request under way.

        That is what `quiet` makes of it, for less. None if it is not so, and nothing is done.

        found    what the message is: see Frames.usual
        """
        last = self.exchanges[-1]
        if (self.rules.armed or self.busy or self.closing or len(self.exchanges) > 1
                or last.request is None):
            return None
        if to == DOWNSTREAM:
            last.over = True
            return data
        if not last.over:
            return None
        self.asked = found
        super().begin()
        self.protocol.pending.append(found)
        last.number, last.request, last.active = self.request, found, self.active
        last.sent = True                # and complete it is, as the one before
        last.over = False
        found.text = b""
        return self.protocol.rewrite_head(data) if self.protocol.host else data

    def follow(self, to, mark):
        """Where the row stands after a mark."""
        if to == DOWNSTREAM:
            self.exchanges[0].over = True
        elif mark is END_OF_MESSAGE:
            last = self.exchanges[-1]
            last.complete = last.request is not None
            pending = self.protocol.pending
            if last.complete and not last.sent and pending and pending[-1] is last.request:
                pending.pop()
            if last.complete:
                last.request.text = b""         # nothing is looked for in it any more
            self.in_request = self.head_forwarded = False
        else:
            self.in_request = True
            if mark is not CONTINUATION:
                if mark.replies:
                    self.protocol.pending.append(mark)
                self.append(mark)

    def read(self, now, to, data, marks):
        """What becomes of bytes with these marks: [(t, to, data, holds)], as in carry."""
        events, at = [], 0
        for offset, mark in [*marks, (len(data), None)]:
            if self.closing and to == UPSTREAM:
                break                   # a server would not read it any more
            piece, at = data[at:offset], offset
            if to == UPSTREAM and not self.in_request:
                self.head += piece
            elif piece:
                events += self.process_piece(now, to, piece)
            if mark is END_OF_MESSAGE:
                events += self.process_piece(now, to, END_OF_MESSAGE)
                self.follow(to, END_OF_MESSAGE)
                events += self.release_finished(now)
            elif mark is not None:
                self.follow(to, mark)
                events += self.release_finished(now)
                head, self.head = self.head, b""
                if mark is not CONTINUATION:
                    head = self.protocol.rewrite_head(head)
                events += self.process_piece(now, to, head) if head else []
        return events

    def process_piece(self, now, to, data):
        """What becomes of bytes, or a signal, of the exchange that they belong to."""
        exchange = self.exchanges[-1 if to == UPSTREAM else 0]
        self.asked, self.number = exchange.request, exchange.number
        events = []
        # What goes on with a request that was complete is no longer its fault's.
        steps = [] if to == UPSTREAM and exchange.complete and data else exchange.active
        for event in self.run_chain(steps, now, to, [(now, to, data, ())]):
            _, way, out, _ = event
            exchange.sent = exchange.sent or (way == UPSTREAM and bool(out))
            if out is END_OF_MESSAGE:
                continue
            if exchange is not self.exchanges[0] and (way == DOWNSTREAM or not (out or out is data)):
                exchange.waiting.append(event)
                self.closing = self.closing or (way == UPSTREAM and out is EOF)
            else:
                events.append(event)
        return events

    def release_finished(self, now):
        """Let those that are over go; what the next one has said already follows."""
        events = []
        while self.leave():
            first = self.exchanges[0]
            events += [(max(t, now), to, data, holds) for t, to, data, holds in first.waiting]
            first.waiting = []
        return events

    def process(self, t, to, data):
        """As in Line: for signals; before the end comes what was held of a head."""
        return (self.flush_head(t) if to == UPSTREAM else []) + self.process_piece(t, to, data)

    def flush_head(self, t):
        """What was held of a head goes on as it is."""
        head, self.head = self.head, b""
        return [(t, UPSTREAM, head, ())] if head else []

    def stop_parsing(self, now):
        """What the client says from now on passes as it is, while errors wait for their turn."""
        self.protocol.up = Framer(read_opaque())
        self.in_request = True
        return self.flush_head(now)

    def fall_back_to_tcp(self, now):
        """(a Line, events): the connection goes on as plain tcp."""
        line = Chain(self.rules, self.connection)
        line.request, line.last_direction, line.opaque = self.request, self.last_direction, True
        line.per_connection = {rule: step for rule, step in self.per_connection.items() if step}
        line.active, line.activated, line.answered_early = self.active, self.activated, self.answered_early
        events = [event for exchange in self.exchanges for event in exchange.waiting]
        line.number = line.request
        if self.head:
            if self.exchanges[-1].request or self.protocol.server_first:
                line.begin()            # it is a request that was not one of the protocol's
            events += line.process(now, UPSTREAM, self.head)
        return line, events


class Budget:
    """The bytes that all pipes of a loop may hold together: a bound that is never passed.

    As it fills, each pipe gets less: an eighth of what is left, and HELD_LEAST at
    least, which is set aside for each.
    """

    __slots__ = ("total", "held", "pipes", "fast_path_limit")

    def __init__(self, total=HELD_TOTAL):
        self.total = total
        self.held = 0
        self.pipes = 0
        # Held bytes up to which a read on the straight road fits, whatever it brings.
        self.fast_path_limit = total - 8 * max(HELD_MAX_IDLE, KERNEL_PIPE_SIZE)

    def allowance(self, bound):
        """What one pipe may hold, bound at most."""
        left = self.total - self.held - self.pipes * HELD_MIN
        return max(HELD_MIN, min(bound, left // 8))


class DelayQueue:
    """The bytes of one direction on their way, each with the time it is due.

    What is due and cannot be sent yet moves from the queue to `out`; from then on it
    is no longer the handlers' business.
    """

    __slots__ = ("to", "budget", "queue", "order", "latest", "rate_limited_until", "out", "held",
                 "passed", "taken", "given", "over", "done")
    out: deque

    def __init__(self, to, budget):
        self.to = to
        self.budget = budget
        self.queue = []         # a heap of (due, order, data, start, holds)
        self.order = 0          # what is due at the same time leaves as it came
        self.latest = 0.0       # when the last byte put in is due
        self.rate_limited_until = 0.0   # until when what is there queues for a thin wire
        self.out = ()  # type: ignore   # bytes, and EOF, that are due; a deque once there are any
        self.held = 0           # what queue and out hold, as the budget counts it
        self.passed = 0         # bytes that have gone straight from the source to the target
        self.taken = 0          # other bytes from the source, ever
        self.given = 0          # other bytes to the target, ever
        self.over = False       # the source has said EOF
        self.done = False       # nothing more goes to the target: what still comes is dropped
        budget.pipes += 1
        budget.fast_path_limit -= HELD_MIN

    @property
    def received(self):
        """Bytes from the source, ever."""
        return self.passed + self.taken

    def put(self, t, data, start, holds=()):
        """Bytes and EOF keep their order, as in TCP; RESET overtakes.

        t        when it is due
        start    when it came; holds says what put it off since, as in Line.carry
        """
        if not data and not isinstance(data, Signal):
            return
        if self.done and (data or data is EOF):
            return
        if data is not RESET:
            t = max(t, self.latest)
        # An EOF set for later does not hold up what comes before it.
        if data or data is OPEN:
            self.latest = t
        self.rate_limited_until = max(self.rate_limited_until,
                              start + sum(hold[1] for hold in holds if hold[0].rate_limited))
        self.order += 1
        self.hold(len(data))
        heapq.heappush(self.queue, (t, self.order, data, start, holds))

    def hold(self, size):
        self.held += size + CHUNK_OVERHEAD
        self.budget.held += size + CHUNK_OVERHEAD

    def wait(self, data):
        """Bytes, or EOF, are due, and cannot be sent yet."""
        if not self.out:
            self.out = deque()
        self.out.append(data)

    def credit(self, size):
        self.held -= size
        self.budget.held -= size

    def due(self, now):
        """Take out, in order, what is due by now; bytes and EOF go to `out`.

        Returns the other signals.
        """
        signals = []
        while self.queue and self.queue[0][0] <= now:
            data = heapq.heappop(self.queue)[2]
            if data:
                self.wait(memoryview(data))
            elif data is EOF:
                self.wait(data)
            else:
                self.credit(CHUNK_OVERHEAD)
                signals.append(data)
        return signals

    def next_due(self):
        return self.queue[0][0] if self.queue else NEVER

    def resume_reading_at(self, now):
        """When a thin wire lets the source go on, if it does not now; see `room`."""
        return self.rate_limited_until - RATE_BACKLOG if self.queue and now < self.rate_limited_until - RATE_BACKLOG else NEVER

    def sent(self, size):
        """The first `size` bytes of out's first chunk are sent."""
        rest = self.out.popleft()[size:]        # a memoryview, EOF, or a Duct, that is cut so
        self.given += size
        self.credit(size)
        if rest:
            self.out.appendleft(rest)
        else:
            self.credit(CHUNK_OVERHEAD)

    def release(self, gone, changed=()):
        """Let go at once, in order, what these rules hold; what others hold stays.

        What a rule that has changed had made when it was shown OPEN is dropped: it is
        shown OPEN again. Returns whether there was anything.
        """
        rules = [*gone, *changed]
        if not any(rule in rules for entry in self.queue for rule, _, _ in entry[4]):
            return False
        entries, self.queue, self.latest, self.rate_limited_until = self.queue, [], 0.0, 0.0
        for _, _, data, start, holds in sorted(entries, key=lambda entry: entry[1]):
            self.credit(len(data) + CHUNK_OVERHEAD)
            if any(made and rule in changed for rule, _, made in holds):
                continue
            holds = tuple(hold for hold in holds if hold[0] not in rules)
            self.put(start + sum(hold[1] for hold in holds), data, start, holds)
        return True

    def room(self, clock):
        """How many bytes may be read into this pipe now: its source's backpressure.

        Much, where it flows; little, where nothing is due, or where what is there waits
        for a thin wire: a sender is to feel that. The clock is not read where nothing is held.
        """
        bound = HELD_MAX_IDLE
        if self.queue and self.queue[0][0] < NEVER and self.rate_limited_until - RATE_BACKLOG <= clock():
            bound = HELD_MAX
        return min(CHUNK, self.budget.allowance(bound) - self.held - CHUNK_OVERHEAD)

    def drop(self):
        """Forget what is under way."""
        self.queue, self.out = [], ()  # type: ignore
        self.credit(self.held)

    def close(self):
        if self.held:
            self.drop()
        self.budget.pipes -= 1
        self.budget.fast_path_limit += HELD_MIN


# -- Loop ---------------------------------------------------------------------
#
# One thread, one selector: ready sockets, one heap of alarms, and a door through
# which other threads hand in functions to call.

def capture(function, *args):
    """(result, None) or (None, exception): to be carried into another thread."""
    try:
        return function(*args), None
    except BaseException as problem:        # it is for the other thread to judge
        return None, problem


new_key = functools.partial(tuple.__new__, selectors.SelectorKey)      # no call in Python


class EpollSelector(selectors.BaseSelector):
    """As selectors.EpollSelector, for less: it does not ask for as many events as there are
    sockets, what it makes for each event is one tuple, and it looks again before it sleeps.
    """

    MASKS = [0, 1, 4, 5]                    # EVENT_READ and EVENT_WRITE as EPOLLIN and EPOLLOUT
    # EPOLLIN, EPOLLOUT, and EPOLLIN with EPOLLHUP; or else both: an error is to be found.
    READY = {1: EVENT_READ, 4: EVENT_WRITE, 17: EVENT_READ}
    MAX_EVENTS = 256                              # events at a time: alarms are not to wait for more
    SPIN_TIME = 0.00008     # seconds; falling asleep and waking up cost about as many, as measured
    PREEMPTED = 0.001        # seconds after which others were given the processor meanwhile
    BACKOFF_MAX = 8           # sleeps without another look, at most, where looking was in vain
    BACKOFF_PREEMPTED = 512    # and where the processor is others': a look may cost a slice of its time

    def __init__(self, clock=time.monotonic):
        self.epoll = select.epoll()
        self.keys = {}
        self.clock = clock
        self.skips = 0      # sleeps to come without another look
        self.backoff = 0       # how many they were when looking was last in vain; 0 when it was not

    def fileno(self):
        return self.epoll.fileno()

    def close(self):
        self.epoll.close()

    def register(self, fileobj, events, data=None):
        fd = fileobj.fileno()
        self.epoll.register(fd, self.MASKS[events])
        key = self.keys[fd] = new_key((fileobj, fd, events, data))
        return key

    def modify(self, fileobj, events, data=None):
        fd = fileobj.fileno()
        self.epoll.modify(fd, self.MASKS[events])
        key = self.keys[fd] = new_key((fileobj, fd, events, data))
        return key

    def unregister(self, fileobj):
        fd = fileobj.fileno()
        self.epoll.unregister(fd)
        return self.keys.pop(fd)

    def select(self, timeout=None):
        poll = self.epoll.poll
        events = poll(0, self.MAX_EVENTS)
        if not events and timeout != 0:
            events = self.busy_poll()
            if events is None:
                events = poll(-1 if timeout is None else timeout, self.MAX_EVENTS)
        # The keys as they are now: an earlier callback may give a number to another socket.
        keys, ready = self.keys, self.READY.get
        return [(keys[fd], ready(mask, 3)) for fd, mask in events]

    def busy_poll(self):
        """Events that come while one would fall asleep; None if it is time to. Others go first.

        Many a peer answers sooner than that. Who waits for as long as sleeping costs, and
        then sleeps, pays at most twice the least (Karlin et al., Empirical Studies of
        Competitive Spinning, 1991).
        """
        if self.skips:
            self.skips -= 1
            return None
        clock, events, passed = self.clock, [], 0.0
        began = clock()
        while not events and passed < self.SPIN_TIME:
            os.sched_yield()
            events = self.epoll.poll(0, self.MAX_EVENTS)
            passed = clock() - began
        if passed > self.PREEMPTED:
            self.backoff = self.skips = self.BACKOFF_PREEMPTED
            return events               # if there are none: an alarm may be due by now
        self.backoff = self.skips = 0 if events else min(self.BACKOFF_MAX, 2 * self.backoff or 1)
        return events or None

    def get_map(self):
        return self.keys


def raise_fd_limit():
    """Have as many descriptors as we may: two for each connection (man 2 getrlimit).

    Returns how many, or 0 where that cannot be known.
    """
    try:
        import resource
    except ImportError:                 # Windows has none
        return 0
    have, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    for wanted in most, 10240:          # macOS takes no more, whatever it says is the most
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))
            return wanted
        except (ValueError, OSError):
            pass                        # then with what there is
    return have


def fds_available():
    """Whether there are SPARE descriptors: found out by having them."""
    found = []
    try:
        while len(found) < SPARE_FDS:
            found.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        return False
    finally:
        for number_check in found:
            os.close(number_check)
    return True


class Loop:
    """Watches sockets, rings alarms, and calls what other threads hand in."""

    fds_exhausted = False      # whether descriptors have run out: then who accepts looks for some first

    def __init__(self, clock=time.monotonic, selector=None):
        self.clock = clock
        self.selector = selector or (EpollSelector if hasattr(select, "epoll")
                                     else selectors.DefaultSelector)()
        self.watched = set()                # sockets
        self.timers = []                    # a heap of [t, order, callback or None]
        self.order = 0
        self.cancelled = 0                  # how many of the alarms will not ring
        self.calls = deque()                # functions from other threads
        self.running = True
        self.closed = False
        self.budget = Budget()
        self.buffer = bytearray(CHUNK)      # every recv reads into this one
        self.view = memoryview(self.buffer)
        self.pipe_pool = []                     # empty ones, to be used again
        self.wakeup_send, self.wakeup_recv = socket.socketpair()
        self.wakeup_send.setblocking(False)
        self.wakeup_recv.setblocking(False)
        self.watch(self.wakeup_recv, EVENT_READ, self.on_wakeup)
        # An epoll or kqueue descriptor can itself be selected, which waits by the
        # microsecond where epoll rounds up to the millisecond. FD_SETSIZE bounds it.
        fileno = getattr(self.selector, "fileno", None)
        self.precise_fds = [fileno()] if fileno and fileno() < 1024 else None
        # Windows' select() takes 512 sockets, others' descriptors below 1024.
        self.limit = 500 if isinstance(self.selector, selectors.SelectSelector) else math.inf

    def watch(self, sock, events, callback=None):
        """Call back with the events sock is ready for; for none, forget the socket.

        More events than it is watched for mean that there is an error to be found.
        """
        # To ask the selector would cost a system call: it words an error that nobody reads.
        known = sock in self.watched
        if events and known:
            self.selector.modify(sock, events, callback)
        elif events:
            self.selector.register(sock, events, callback)
            self.watched.add(sock)
        elif known:
            self.watched.remove(sock)
            self.selector.unregister(sock)

    def capacity_error(self):
        """Why there is no room for one more connection and what it may need; "" if there is."""
        if len(self.watched) + 2 > self.limit:
            return "select() takes no more sockets"
        return "too few descriptors are left" if Loop.fds_exhausted and not fds_available() else ""

    def call_at(self, t, callback):
        """Call back at t. Returns the alarm, for `cancel`."""
        self.order += 1
        alarm = [t, self.order, callback]
        heapq.heappush(self.timers, alarm)
        return alarm

    def cancel(self, alarm):
        """The alarm, if there is one, will not ring; the heap is swept when half of it is such."""
        if not alarm or not alarm[2]:
            return
        alarm[2] = None
        self.cancelled += 1
        if self.cancelled > max(100, len(self.timers) // 2):
            self.timers = [alarm for alarm in self.timers if alarm[2]]
            heapq.heapify(self.timers)
            self.cancelled = 0
        while self.timers and not self.timers[0][2]:    # or else the loop would read the clock
            heapq.heappop(self.timers)
            self.cancelled -= 1

    def run(self):
        """Until `stop`."""
        try:
            while self.running:
                for key, events in self.wait():
                    key.data(events)
                    if self.calls:      # nobody waits for hundreds of busy sockets
                        self.run_queued()
                if self.timers:
                    self.run_timers()
        finally:
            self.closed = True

    def wait(self):
        """Ready sockets, or none when the next alarm is due."""
        if not self.timers:
            return self.selector.select()       # a time-out is a timer of the kernel's to set
        seconds = self.timers[0][0] - self.clock()
        if seconds > PRECISE_WAIT:
            return self.selector.select(min(MAX_WAIT, seconds - PRECISE_WAIT / 2))
        if seconds > 0 and self.precise_fds:
            if seconds > SELECT_OVERSHOOT:
                select.select(self.precise_fds, [], [], seconds - SELECT_OVERSHOOT)
            seconds = 0                 # the rest, if any, passes in turns of the loop
        return self.selector.select(max(0, seconds))

    def run_timers(self):
        now = self.clock()
        while self.timers and self.timers[0][0] <= now:
            alarm = heapq.heappop(self.timers)
            callback, alarm[2] = alarm[2], None
            if callback:
                callback()
            else:
                self.cancelled -= 1

    def call_soon_threadsafe(self, function, *args):
        """From any thread, or a signal: have function called in the loop's thread."""
        self.calls.append((function, args))
        try:
            self.wakeup_send.send(b"!")
        except BlockingIOError:
            pass                        # full of wake-ups already
        except OSError:
            pass                        # closed: nobody is left to call

    def on_wakeup(self, events):
        with contextlib.suppress(BlockingIOError):
            self.wakeup_recv.recv(4096)
        self.run_queued()

    def run_queued(self):
        while self.calls:
            function, args = self.calls.popleft()
            function(*args)

    def run_sync(self, function, *args):
        """Run function in the loop's thread and return its result.

        For other threads: called from the loop's own it would wait for itself.
        Raises what function raises; RuntimeError if the loop has ended.
        """
        done, outcome = threading.Event(), []

        def answer():
            outcome.extend(capture(function, *args))
            done.set()

        self.call_soon_threadsafe(answer)
        while not done.wait(0 if self.closed else 1):
            if self.closed:
                raise RuntimeError("the loop has ended")
        result, problem = outcome
        if problem:
            raise problem
        return result

    def run_in_thread(self, function, then):
        """Run function in a thread of its own; then(result, problem) in the loop's."""
        thread = threading.Thread(target=lambda: self.call_soon_threadsafe(then, *capture(function)), daemon=True)
        try:
            thread.start()
        except RuntimeError as problem:     # no more threads
            self.call_soon_threadsafe(then, None, problem)

    def stop(self):
        """From any thread, or a signal."""
        self.running = False
        self.call_soon_threadsafe(int)

    def close(self):
        self.selector.close()
        self.wakeup_send.close()
        self.wakeup_recv.close()
        while self.pipe_pool:
            self.pipe_pool.pop().close()


# -- Addresses ----------------------------------------------------------------
#
# HOST:PORT as people write it, and the socket addresses it stands for.

LOOPBACK = ("127.0.0.1", "::1")     # what localhost is, whatever the hosts file says (RFC 6761)
WILDCARD = ("0.0.0.0", "::")


def parse_address(text, listens=False):
    """Read HOST:PORT, [::1]:8000 or :8000 into (host, port). Raises ValueError.

    listens    whether port 0, a free one, makes sense
    """
    wanted = "must be HOST:PORT, like localhost:8000, [::1]:8000 or :8000, not %r" % text
    if "://" in text:
        scheme, host, port = re.match(
            r"(.*?)://(?:[^/@]*@)?(\[[^]]*\]|[^/:?#]*)(?::(\d+))?", text, re.DOTALL).groups()
        usual = {"http": "80", "https": "443"}.get(scheme.lower(), "PORT")
        raise ValueError("must be HOST:PORT, without a scheme or a path, like %s:%s, not the "
                         "URL %r" % (host or "localhost", port or usual,
                                     re.sub("//[^/@]*@", "//...@", text)))
    if "/" in text:
        raise ValueError(wanted)
    host, colon, port = text.strip().rpartition(":")
    if host.startswith("[") and host.endswith("]") and ":" in host:
        host = host[1:-1]
    elif ":" in host or "[" in host or "]" in host:
        raise ValueError("must be [HOST]:PORT where the host is an IPv6 address, like "
                         "[::1]:8000, not %r" % text)
    if not colon or not re.fullmatch("[0-9]{1,5}", port):
        raise ValueError(wanted)
    if not (0 if listens else 1) <= int(port) <= 65535:
        raise ValueError("must have a port from %d to 65535, not %r" % (not listens, text))
    if not is_valid_host(host):
        raise ValueError(wanted)
    return host, int(port)


def parse_listener(text):
    """As `parse_address`, where port 0 stands for a free one."""
    return parse_address(text, listens=True)


def is_valid_host(host):
    """Whether host can be asked of a resolver: nothing, or labels of 1 to 63 bytes, 253 in all."""
    if ":" in host:
        return bool(re.fullmatch(r"[0-9A-Fa-f:.]+(%[\w.-]+)?", host))
    try:
        name = host if re.fullmatch("[!-~]*", host) else host.encode("idna").decode("ascii")
    except UnicodeError:
        return False
    return len(name) <= 254 and bool(re.fullmatch(r"([\w-]{1,63}(\.[\w-]{1,63})*\.?)?", name))


def same_endpoint(local, backend):
    """Whether a listener at local would be reached by calling backend, as far as numbers tell."""
    here = {address[:2] for _, address in resolve_numeric(local, WILDCARD) or ()}
    there = {address[:2] for _, address in resolve_numeric(backend) or ()}
    if here & {(host, local[1]) for host in WILDCARD}:
        here |= {(host, local[1]) for host in LOOPBACK}
    return bool(here & there)


def check_backend(backend, listeners):
    """Refuse, with a ValueError, a backend that is where we listen, at one of these."""
    if any(same_endpoint(address, backend) for address in listeners):
        raise ValueError("%s is the address that is listened on: the proxy would call itself"
                         % format_address(backend))


def format_address(address):
    """(host, port, ...) as a person writes it."""
    host, port = address[:2]
    return "[%s]:%d" % (host, port) if ":" in host else "%s:%d" % (host, port)


def resolve(address, everywhere=LOOPBACK, flags=0):
    """The socket addresses of (host, port), in order: [(family, address)]. Raises OSError.

    everywhere    what no host at all stands for
    """
    host, port = address
    found = []
    names = {"localhost": LOOPBACK, "": everywhere}.get(host.lower(), [host])
    for name in names:
        for family, _, _, _, address in socket.getaddrinfo(
                name, port, type=socket.SOCK_STREAM,
                flags=flags if len(names) == 1 else socket.AI_NUMERICHOST):
            if (family, address) not in found:
                found.append((family, address))
    return found


def resolve_numeric(address, everywhere=LOOPBACK):
    """As `resolve`, where no resolver is needed for it; None where one is."""
    try:
        return resolve(address, everywhere, flags=socket.AI_NUMERICHOST)
    except OSError:
        return None


def address_unavailable(problem):
    """Whether the machine lacks the address family or the address, as without IPv6."""
    return problem.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL, errno.EINVAL)


# -- Connection ---------------------------------------------------------------
#
# Two sockets and the two roads between them. The methods come in the order in which
# a chunk meets them.

HAVE_SPLICE = hasattr(os, "splice")         # Linux, with Python 3.10 or newer
F_SETPIPE_SZ = 1031                     # of linux/fcntl.h; in the module fcntl since Python 3.10
SOCK_NONBLOCK = getattr(socket, "SOCK_NONBLOCK", 0)
# What socket.socket is made from: all that a proxy needs, and half as long to make and close.
RawSocket = socket.SocketType
FD_EXHAUSTED = {errno.EMFILE, errno.ENFILE}      # descriptors
# What splice says where recv will do: nothing is there, or this system, or a socket, cannot.
SPLICE_UNAVAILABLE = {errno.EAGAIN, errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.EBADF}
CONNECT_PENDING = {errno.EINPROGRESS, errno.EALREADY, errno.EWOULDBLOCK}      # what connect says then


class KernelPipe:
    """A pipe of the kernel's: bytes go through it from socket to socket, and are not copied.

    Like bytes it has a length, and can be cut in front when they are sent.
    """

    __slots__ = ("out", "into", "held")

    def __init__(self):
        """Raises OSError where there are no descriptors."""
        self.out, self.into = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.held = 0
        with contextlib.suppress(OSError):      # some systems bound all pipes together (man 7
            fcntl.fcntl(self.into, F_SETPIPE_SZ, KERNEL_PIPE_SIZE)      # pipe): then it is a smaller one

    def __len__(self):
        return self.held

    def __getitem__(self, sent):
        self.held -= sent.start
        return self

    def fill(self, source):
        """Take in what has come to a socket; returns how many bytes. Raises OSError, as recv."""
        self.held = os.splice(source.fileno(), self.into, KERNEL_PIPE_SIZE, flags=os.SPLICE_F_NONBLOCK)
        return self.held

    def send_to(self, target):
        """Returns how many bytes a socket has taken. Raises OSError, as send."""
        return os.splice(self.out, target.fileno(), self.held, flags=os.SPLICE_F_NONBLOCK)

    def close(self):
        os.close(self.out)
        os.close(self.into)


class Link(DelayQueue):
    """One direction of a connection: a pipe, and the socket that it begins at."""

    __slots__ = ("source", "watched", "fast_target", "full")

    def __init__(self, to, budget):
        super().__init__(to, budget)
        self.source = None      # a socket
        self.watched = 0        # what it is watched for, be it to read from it or to write to it
        self.fast_target = None    # the target, a socket, while nothing stands between the two
        self.full = 0           # how often much has come at a time

    def keep(self, data):
        """What has come on the straight road, and does not leave at once."""
        self.taken += len(data)
        self.hold(len(data))
        self.wait(data)

    def drop(self):
        for data in self.out:
            if isinstance(data, KernelPipe):
                data.close()
        super().drop()


class Connection:
    """A client, the backend called for it, and what is under way between them."""

    __slots__ = ("proxy", "loop", "number", "peer", "line", "up", "down", "client", "backend",
                 "addresses", "deadline", "connect_started", "connecting", "reset_reason", "handed_off", "faults",
                 "alarm", "deadline_timer", "lingering", "began")

    def __init__(self, proxy, number_check, client, peer):
        self.proxy = proxy
        self.loop = proxy.loop
        self.number = number_check
        self.peer = peer                # the client's address
        self.line = (ProtocolChain(proxy.rules, number_check, proxy.protocol(proxy.host_header()))
                     if proxy.protocol else Chain(proxy.rules, number_check))
        self.up = Link(UPSTREAM, self.loop.budget)
        self.down = Link(DOWNSTREAM, self.loop.budget)
        self.client = self.up.source = client       # a socket; None when all is over
        self.backend = None             # a socket, once called; it is where down begins
        self.addresses = None           # of the backend, still to try
        self.deadline = None            # for connecting to it
        self.connect_started = False            # whether the backend has been called
        self.connecting = False
        self.reset_reason = ""                  # how a peer went; a reset follows what it had said
        self.handed_off = False               # a blocking handler has the sockets
        self.faults = None              # names of the handlers that acted on it
        self.alarm = None               # for what is due next
        self.deadline_timer = None            # for connecting, and for lingering
        self.lingering = False            # all is said, but the client has not closed
        self.began = self.loop.clock()

    @property
    def name(self):
        """The client's address, as a person writes it."""
        return format_address(self.peer)

    def start(self):
        """A client is here."""
        now = self.began
        self.line.begin()
        if self.line.active:
            self.place(now, self.line.process(now, UPSTREAM, OPEN)
                       + self.line.process_open(now, [DOWNSTREAM]))
        else:
            self.connect_backend()
            self.watch()
            if self.up.fast_target:        # many a client has asked by now
                self.ready(self.up, EVENT_READ)

    def ready(self, way, events):
        """The straight road: bytes leave from where they came in, as soon as they have come.

        It is open while nothing is under way: `watch` says so. No queue, no clock and, where
        no fault has been drawn, no event; one recv for each wake-up, for a fast sender must
        not starve the others. What the target does not take waits. Events other than
        EVENT_READ alone are something to write, or an error: see Epoll.READY.
        """
        target, loop, line = way.fast_target, self.loop, self.line
        if target is None or events != EVENT_READ or loop.budget.held > loop.budget.fast_path_limit:
            self.wake(way, events)
            return
        if way.full >= SPLICE_AFTER and self.splice(way, target):
            return
        try:
            size = way.source.recv_into(loop.buffer)
        except BlockingIOError:
            return
        except OSError as problem:
            self.lost(way, problem)
            return
        if not size:
            self.end(way, target)
            return
        if line.last_direction is not way.to:
            line.turn(way.to)
        data = loop.view[:size]
        if line.protocol or line.active:
            data = self.at_once(way, data)
            if not data:
                return
        elif size >= BULK_READ and HAVE_SPLICE:
            way.full += 1
        try:
            sent = target.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            way.taken += len(data)
            self.on_send_error(way)
            self.advance()
            return
        way.passed += sent
        if sent < len(data):
            way.keep(memoryview(bytes(data[sent:])))
            self.watch()

    def splice(self, way, target):
        """The straight road of bulk: the bytes do not even come here. False if none did so."""
        size, ducts = 0, self.loop.pipe_pool
        line = self.line
        if line.active or line.protocol or line.last_direction is not way.to:
            return False                # somebody is to see them
        try:
            duct = ducts.pop() if ducts else KernelPipe()
        except OSError:                 # no descriptors
            way.full = 0
            return False
        try:
            size = duct.fill(way.source)
        except OSError as problem:
            if problem.errno not in SPLICE_UNAVAILABLE:
                self.lost(way, problem)
        if size < BULK_READ:
            way.full = 0
        if not size:
            self.release_pipe(duct)
            return self.client is None or way.over
        way.keep(duct)
        self.flush(way, target)
        if way.out or way.done:
            self.advance()
        return True

    def release_pipe(self, duct):
        """It is empty: let others use it."""
        if len(self.loop.pipe_pool) < KERNEL_PIPES_POOLED:
            self.loop.pipe_pool.append(duct)
        else:
            duct.close()

    def end(self, way, target):
        """The source has said EOF where the straight road is open."""
        way.over = True
        if self.line.protocol or self.line.active:
            self.take(way.to, EOF)
            return
        way.done = True
        if self.up.done and self.down.done:
            self.finish()
            return
        try:
            target.shutdown(socket.SHUT_WR)
        except OSError:
            self.on_send_error(way)
            self.advance()
        else:
            self.watch([(way, self.down if way is self.up else self.up)])

    def wake(self, way, events):
        """A socket is ready, and there is more to it than the straight road."""
        if self.client is None:         # closed by an earlier callback of this select()
            return
        if way is self.down and self.connecting:
            self.connected()
            return
        if events & EVENT_WRITE:
            self.advance()
        if events & EVENT_READ and way.source is not None:
            self.receive(way)

    def receive(self, way):
        """As `ready`, for what may have to be held, and has to find room."""
        room = way.room(self.loop.clock)
        if room <= 0 or self.handed_off:      # ready since before the pipe filled up
            self.watch()
            return
        if self.proxy.has_blocking and self.hand_off(way):
            return
        try:
            # What is to be held is read into bytes of its own: one copy less.
            data = (way.source.recv(room) if way.queue else
                    bytes(self.loop.view[:way.source.recv_into(self.loop.buffer, room)]))
        except BlockingIOError:
            return
        except OSError as problem:
            self.lost(way, problem)
            return
        if not data:
            way.over = True
            self.take(way.to, EOF)
        elif self.lingering:
            way.taken += len(data)
        else:
            if self.line.last_direction is not way.to:
                self.line.turn(way.to)
            data = self.at_once(way, data)
            if data:
                way.taken += len(data)
                now = self.loop.clock()
                self.place(now, [(now, way.to, data, ())])

    def at_once(self, way, data):
        """What is to leave now, where no fault touches what has come.

        Or else it is in the pipes already, or held, and nothing is returned. What is not
        returned as it was is counted here as received.

        data    a view of the loop's buffer, or bytes
        """
        line, size = self.line, len(data)
        protocol = line.protocol
        if protocol:
            frames = protocol.up if way is self.up else protocol.down
            found = out = None
            if size <= COPY_MAX:           # several will look at it
                data = bytes(data)
                found = frames.usual(data)
            if found:
                out = line.pass_whole(way.to, found, data)      # type: ignore
            if out is None:
                marks = frames.feed(data if type(data) is bytes else self.loop.buffer, size, found)
                out = None if frames.lost else line.pass_through(way.to, data, marks)  # type: ignore
            if out is not None:
                way.taken += size - len(out)
                return out
            assert isinstance(line, ProtocolChain)
            data, now, line.modified = bytes(data), self.loop.clock(), False
            events = line.read(now, way.to, data, marks)
            if frames.lost:
                log.info("%sconnection %d, request %d: goes on as plain tcp: %s",
                         self.proxy.label, self.number, line.request, frames.lost)
                if way is self.up and any(exchange.waiting for exchange in line.exchanges):
                    events += line.stop_parsing(now)
                else:
                    self.line, held = line.fall_back_to_tcp(now)
                    events += held
                line.modified = True     # another line may have done so
        elif line.active:
            if not line.observes(way.to):
                return data
            data, now, line.modified = bytes(data), self.loop.clock(), False
            events = line.process(now, way.to, data)
            if not line.modified:
                return data
        else:
            return data
        if not line.modified and all(to == way.to and out for _, to, out, _ in events):
            out = b"".join([event[2] for event in events])
            way.taken += size - len(out)
            return out
        way.taken += size
        self.place(now, events)
        return None

    def hand_off(self, way):
        """Leave what has come to a blocking handler, if one was drawn for this request.

        Returns whether it has the sockets, or gets them when the backend is there and
        nothing is under way any more.
        """
        try:
            if not way.source.recv(1, socket.MSG_PEEK):
                return False            # the end is not for it
        except OSError:
            return False                # receive finds out
        if self.line.last_direction is not way.to:
            self.line.turn(way.to)
        step = self.line.blocking()
        if step is None:
            return False
        if self.is_drained():
            try:
                socks = [socket.fromfd(sock.fileno(), sock.family, socket.SOCK_STREAM)
                         for sock in (self.client, self.backend)]
            except OSError as problem:  # no descriptors
                self.reset("no handler: %s" % problem.strerror)
                return True
            self.handed_off = True
            if step.act():
                self.proxy.record(self, step.rule, self.line.request)
            self.loop.run_in_thread(lambda: run_blocking_handler(step.rule, socks, way.to == UPSTREAM),
                           lambda done, problem: self.take_back(step.rule, socks, done, problem))
        self.watch()
        return True

    def is_drained(self):
        """Whether there is a backend, and nothing under way that a handler would overtake."""
        return self.backend is not None and not self.connecting and not (
            self.up.queue or self.up.out or self.down.queue or self.down.out)

    def take_back(self, rule, socks, open, problem):
        """A blocking handler has done its work; open tells whether it left the sockets open."""
        self.handed_off = False
        for sock in socks:
            sock.close()
        if problem:
            gone = isinstance(problem, OSError)         # most likely a peer, not a bug
            log.log(logging.INFO if gone else logging.ERROR,
                    "connection %d, request %d: handler %s failed and the connection is closed: "
                    "%s", self.number, self.line.request, rule.name, format_exception(problem),
                    exc_info=not (rule.error_logged or gone) and problem)
            rule.error_logged = rule.error_logged or not gone
        if self.client is None:
            return
        for sock in (self.client, self.backend):
            sock.setblocking(False)     # whatever it has done to them
        if problem or not open:
            self.close("closed by %s" % rule.name)
        else:
            self.advance()

    def take(self, to, data):
        """An event comes: carry it down the line."""
        now = self.loop.clock()
        self.place(now, self.line.process(now, to, data))

    def place(self, now, events):
        """Put into the pipes what has become of an event, and see what follows."""
        for t, way, out, holds in events:
            (self.up if way == UPSTREAM else self.down).put(t, out, now, holds)
        news, self.line.activated = self.line.activated, []
        for rule, request in news:
            self.proxy.record(self, rule, request)
        self.advance()

    def rules_changed(self, new, gone, changed):
        """The rules are others: what those hold that are gone, or have changed, goes on."""
        now = self.loop.clock()
        self.line.rules_changed(new, changed)
        for pipe in self.up, self.down:
            if pipe.release(gone, changed):
                self.line.free(pipe.to, pipe.latest)
        self.place(now, self.line.process_open(now, [UPSTREAM, DOWNSTREAM], [*new, *changed]))

    def ring(self):
        self.alarm = None
        self.advance()

    def advance(self):
        """Move what is due, and see what follows. All that leaves the straight road comes here."""
        up, down, now = self.up, self.down, self.loop.clock()
        signals = up.due(now) + down.due(now) if up.queue or down.queue else ()
        if not self.connect_started and (OPEN in signals or any(up.out)):
            self.connect_backend()
        elif not self.connect_started and up.out:           # EOF for a backend that was never called
            up.drop()
            up.done = True
            down.put(now, EOF, now)                 # nobody is there to answer
        if down.out:
            self.flush(down, self.client)
        if up.out:
            self.flush(up, None if self.connecting else self.backend)
        if self.client is None:
            return
        if RESET in signals:
            self.reset("reset by a fault")
        elif not (up.done and down.done):
            self.watch()
            if up.queue or down.queue or self.alarm:
                self.set_alarm(now)
        else:
            self.finish()

    def finish(self):
        """Nothing more goes either way."""
        if self.reset_reason:
            self.reset(self.reset_reason)
        elif self.up.over and self.down.over:
            self.close("closed")
        elif self.line.answered_early and not self.up.over:
            self.linger()
        else:
            faults = [step.rule.name for step in self.line.active if step.acted]
            self.close("closed by %s" % (" and ".join(faults) or "a fault"))

    def linger(self):
        """Hear the client out: to close over what is unread would destroy the answer."""
        self.close_backend()
        self.down.over = True
        self.watch()
        if not self.lingering:
            self.lingering = True
            with contextlib.suppress(OSError):
                self.client.shutdown(socket.SHUT_WR)
            self.wait_for(self.loop.clock() + LINGER_TIMEOUT, lambda: self.close("closed by a fault"))

    def flush(self, way, target):
        """Send what is due, until the target takes no more."""
        while way.out and target is not None and self.client is not None:
            data = way.out[0]
            try:
                if way.done:
                    way.out.popleft()
                    way.credit(len(data) + CHUNK_OVERHEAD)
                elif data is EOF:
                    way.sent(0)
                    way.done = True
                    # Or else a reset, or a close, is what follows.
                    if not (self.reset_reason or (self.up.done and self.down.done)):
                        target.shutdown(socket.SHUT_WR)
                elif isinstance(data, KernelPipe):
                    way.sent(data.send_to(target))
                    if not data:
                        self.release_pipe(data)
                else:
                    way.sent(target.send(data))
            except BlockingIOError:
                return
            except OSError:
                self.on_send_error(way)

    def watch(self, ways=()):
        """What the two sockets are watched for, and where the straight road is open, as things
        stand; it is decided here alone.

        ways    (one, the other), if it is known that only that one's source may be concerned
        """
        if self.client is None:
            return
        up, down, lends = self.up, self.down, self.proxy.has_blocking
        busy = self.handed_off or (lends and self.line.blocking() and not self.is_drained())
        clear = not (self.connecting or lends or self.handed_off or self.lingering)
        for way, back in ways or ((up, down), (down, up)):
            source = way.source
            if source is None:
                continue
            if self.connecting and way is down:
                events = EVENT_WRITE
            elif (way.over or busy or (way.held and way.room(self.loop.clock) <= 0)
                    or (way.done and self.reset_reason)):   # what nobody will get is not read: its
                events = 0                          # sender, too, is to feel that
            else:
                events = EVENT_READ
            if back.out:
                events |= EVENT_WRITE
            free = clear and not (way.held or way.over or way.done)
            way.fast_target = back.source if free else None
            if events != way.watched:
                way.watched = events
                self.loop.watch(source, events, functools.partial(self.ready, way))

    def set_alarm(self, now):
        """For what is due next, if it ever is."""
        due = min(self.up.next_due(), self.down.next_due(),
                  self.up.resume_reading_at(now), self.down.resume_reading_at(now))
        if self.alarm and self.alarm[0] != due:
            self.loop.cancel(self.alarm)
            self.alarm = None
        if due < NEVER and not self.alarm:
            self.alarm = self.loop.call_at(due, self.ring)

    def connect_backend(self):
        """Call the backend: find its addresses, then try one after the other."""
        self.connect_started = self.connecting = True
        self.deadline = self.loop.clock() + self.proxy.timeout
        if self.proxy.addresses:
            self.addresses = list(self.proxy.addresses)
            self.connect_next(None)
        else:
            self.wait_for(self.deadline, lambda: self.fail("timed out"))
            self.proxy.resolve_backend(self.found)

    def found(self, addresses, problem):
        if self.client is None or self.backend is not None or not self.connecting:
            return                      # it has ended, or given up, while the name was resolved
        self.addresses = list(addresses or ())
        self.connect_next(problem)
        self.advance()

    def connect_next(self, problem):
        """Connect to the next address, without waiting; problem is how the last one failed."""
        while self.addresses:
            address = self.addresses.pop(0)
            try:
                self.backend, self.connecting = start_connect(*address)
            except OSError as failed:
                if failed.errno in FD_EXHAUSTED:
                    Loop.fds_exhausted = True
                    self.addresses.insert(0, address)
                    self.wait_for(self.loop.clock() + RETRY_DELAY, self.try_again)
                    return
                if problem is None or not address_unavailable(failed):
                    problem = failed
                continue
            self.down.source = self.backend
            if self.connecting:
                # Each address has its share of the time, so that a silent one does not
                # keep the others from being tried.
                now = self.loop.clock()
                share = (self.deadline - now) / (1 + len(self.addresses))
                self.wait_for(now + share, self.on_connect_timeout)
            elif self.deadline_timer:
                self.loop.cancel(self.deadline_timer)
            return
        self.fail(getattr(problem, "strerror", None) or problem or "no address found")

    def wait_for(self, t, callback):
        """Be patient until then with this, and no longer with what was waited for before."""
        self.loop.cancel(self.deadline_timer)
        self.deadline_timer = self.loop.call_at(t, callback)

    def try_again(self):
        """There may be a descriptor now."""
        if self.loop.clock() < self.deadline:
            self.connect_next(None)
            self.advance()
        else:
            self.fail(os.strerror(errno.EMFILE))

    def connected(self):
        """The backend has answered the call, with a yes or a no."""
        number_check = self.backend.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if number_check:
            self.close_backend()
            self.connect_next(OSError(number_check, socket_strerror(number_check)))
        else:
            self.connecting = False
            self.loop.cancel(self.deadline_timer)
        self.advance()

    def on_connect_timeout(self):
        self.close_backend()
        self.connect_next("timed out")
        self.advance()

    def close_backend(self):
        if self.backend is not None:
            if self.down.watched:
                self.loop.watch(self.backend, 0)
            self.backend.close()
            self.backend = self.down.source = self.up.fast_target = self.down.fast_target = None
            self.down.watched = 0

    def fail(self, problem):
        """No backend to be had: the client is closed."""
        self.proxy.failed(self, problem)
        self.close("no backend")

    def lost(self, pipe, problem):
        """A recv has failed: the source is gone, and takes no more from the other side.

        An RST received is an RST passed on, after what was said before it. Only what
        hangs, or waits for a backend to answer the call, is dropped: nobody waits for it.
        """
        who = "client" if pipe is self.up else "backend"
        reset = isinstance(problem, ConnectionResetError)
        self.reset_reason = "reset by %s" % who if reset else "%s lost: %s" % (who, problem.strerror)
        pipe.over = True
        other = self.down if pipe is self.up else self.up
        other.drop()
        other.done = True
        if pipe is self.up and (pipe.latest == NEVER or self.connecting):
            self.reset(self.reset_reason)
        else:
            self.take(pipe.to, EOF)

    def on_send_error(self, pipe):
        """A send has failed: the target is gone.

        What it had said before may still wait to be read, as a peer without a proxy
        would read it; then comes the reset.
        """
        pipe.drop()
        pipe.done = True
        self.reset_reason = self.reset_reason or "reset by %s" % ("backend" if pipe is self.up else "client")

    def backend_name(self):
        """The address of its backend, or what is called for it."""
        try:
            return format_address(self.backend.getpeername())
        except (AttributeError, OSError):       # not called, not connected
            return format_address(self.proxy.backend)

    def count(self, totals):
        """Add its bytes: [from the client, to the backend, from the backend, to the client]."""
        up, down = self.up, self.down
        totals[0] += up.passed + up.taken
        totals[1] += up.passed + up.given
        totals[2] += down.passed + down.taken
        totals[3] += down.passed + down.given

    def reset(self, how):
        """Close both sockets with RST: linger on, for 0 seconds (man 7 socket, SO_LINGER)."""
        at_once = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)
        for sock in (self.client, self.backend):
            if sock is not None:
                try:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
                except OSError:
                    pass                # it is gone already
        self.close(how)

    def close(self, how):
        """All is over; how says what ended it."""
        if self.client is None:
            return
        if self.handed_off:                   # wake up who waits in a recv of theirs
            for sock in (self.client, self.backend):
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
        self.close_backend()
        if self.up.watched:
            self.loop.watch(self.client, 0)
        self.client.close()
        self.client = self.up.source = None
        for alarm in self.alarm, self.deadline_timer:
            if alarm:
                self.loop.cancel(alarm)
        self.proxy.ended(self, how)
        self.up.close()
        self.down.close()


def start_connect(family, address):
    """(a socket, whether it is still connecting): nobody waits. Raises OSError."""
    sock = RawSocket(family, socket.SOCK_STREAM | SOCK_NONBLOCK)
    try:
        if not SOCK_NONBLOCK:
            sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        number_check = sock.connect_ex(address)
        if number_check == errno.EINPROGRESS and LINUX:       # asked again, it knows: a backend on
            number_check = sock.connect_ex(address)           # this machine has answered by now
    except OSError:
        sock.close()
        raise
    if number_check and number_check not in CONNECT_PENDING:
        sock.close()
        raise OSError(number_check, socket_strerror(number_check))
    return sock, number_check != 0


def socket_strerror(number_check):
    """What an error number of a socket means."""
    return getattr(socket, "errorTab", {}).get(number_check) or os.strerror(number_check)   # Windows' own


def run_blocking_handler(rule, socks, to_backend):
    """Call a blocking handler, in a thread of its own. Returns whether it left the sockets open.

    socks are duplicates with a time-out: the descriptors stay non-blocking, Python waits.
    """
    try:
        for sock in socks:
            sock.settimeout(MAX_WAIT)
        rule.instance(socks[0], socks[1], to_backend)
        return all(sock.fileno() >= 0 for sock in socks)
    finally:
        for sock in socks:
            sock.close()


# -- Proxy --------------------------------------------------------------------
#
# Who listens and accepts, for a proxy and for its control; the proxy, which keeps what
# belongs to all its connections: the rules, the counts, the record of the faults that acted;
# and the proxies of one process.

class Listener:
    """Accepts, on every address of a host, all on one port."""

    last_warning = -RETRY_DELAY         # when one last said that it cannot
    burst = 1.0                 # clients taken in a row, as many as there seem to be

    def __init__(self, local, welcome):
        """Have the port; welcome(client, peer) gets who comes. Raises OSError."""
        self.sockets = listen(local)
        self.welcome = welcome
        self.loop = None

    def __str__(self):
        return " and ".join(format_address(sock.getsockname()) for sock in self.sockets)

    def open(self, loop):
        self.loop = loop
        for sock in self.sockets:
            self.watch(sock)

    def watch(self, sock):
        self.loop.watch(sock, EVENT_READ, functools.partial(self.accept, sock))

    def accept(self, sock, events):
        """Take in who waits, a burst at most; to find nobody costs a system call, too."""
        burst, self.burst = self.burst, max(1.0, self.burst / 2)
        for _ in range(int(burst)):
            if sock not in self.sockets:            # closed earlier in this select()
                return
            why = self.loop.capacity_error()
            if why:
                self.pause(sock, why)
                return
            try:
                number_check, peer = sock._accept()       # all that accept() of its subclass calls
                client = RawSocket(sock.family, socket.SOCK_STREAM, 0, number_check)
            except BlockingIOError:
                return
            except ConnectionError:
                continue                            # it has gone again already
            except OSError as problem:              # no descriptors, no memory
                Loop.fds_exhausted = Loop.fds_exhausted or problem.errno in FD_EXHAUSTED
                self.pause(sock, problem.strerror)
                return
            try:
                self.welcome(client, peer or client.getpeername())
            except OSError:                         # likewise; macOS then has no peer
                client.close()
        self.burst = min(ACCEPT_BURST, 1.25 * burst)

    def pause(self, sock, why):
        """Accept nobody for a while; those who are here go on. All listeners say so once."""
        now = self.loop.clock()
        if now - Listener.last_warning >= RETRY_DELAY:
            Listener.last_warning = now
            log.warning("cannot accept on %s: %s: trying again in %g s", self, why, RETRY_DELAY)
        self.loop.watch(sock, 0)
        self.loop.call_at(now + RETRY_DELAY, lambda: sock in self.sockets and self.watch(sock))

    def close(self):
        for sock in self.sockets:
            if self.loop:
                self.loop.watch(sock, 0)
            sock.close()
        self.sockets = []


def listen(local):
    """Sockets that listen on every address of (host, port), all on one port.

    Port 0 picks a port that is free on all of them. Raises OSError, the address in
    its words, and then nothing is left open.
    """
    tries = 20 if local[1] == 0 else 1      # a free port may be taken on the next address
    while True:
        sockets, problem, tries = [], None, tries - 1
        try:
            for family, address in resolve(local, everywhere=WILDCARD):
                if sockets:                 # the port that the first one got
                    address = (address[0], sockets[0].getsockname()[1]) + address[2:]
                try:
                    sockets.append(bind_listener(family, address))
                except OSError as refused:
                    problem = CannotListen(refused, address)
                    if not address_unavailable(refused):
                        break
        except OSError as unknown:
            problem = CannotListen(unknown, local)
        if problem is None or (sockets and address_unavailable(problem)):
            return sockets
        for sock in sockets:
            sock.close()
        if not tries or problem.errno != errno.EADDRINUSE:
            raise problem


class CannotListen(OSError):
    """No listener at an address, and why."""

    def __init__(self, problem, address):
        self.address = format_address(address)
        self.reason = problem.strerror or str(problem)
        super().__init__(problem.errno, "cannot listen on %s: %s" % (self.address, self.reason))


def bind_listener(family, address):
    sock = RawSocket(family, socket.SOCK_STREAM)
    try:
        if os.name == "posix":          # elsewhere it means that two may listen on one port
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if LINUX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setblocking(False)
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


FaultRecord = namedtuple("FaultRecord", "number time proxy connection client request handler options")


class Proxy:
    """A chaos proxy in front of one backend.

        with Proxy("localhost:6379") as proxy:
            redis = Redis(port=proxy.port)
            with proxy.handler("delay", sleep=2):
                ...

    distant    the backend, "HOST:PORT" or (host, port), called anew for each client
    local      where to listen, likewise; port 0 picks a free one
    behavior   "PERCENT:HANDLER,..." of the requests, or [(percent, handler)]
    options    {handler: {option: value}}
    name       in the log, and in the dice
    seed       any whole number: the same seed gives the same faults; None draws one
    timeout    seconds to connect to the backend, for all of its addresses
    protocol   what is spoken: tcp, http, redis, memcache, mysql, postgres or smtp
    overwrite_host_header
               of http: whether the backend is asked for by its own name
    toxics     rules beside the behavior: [Toxic]
    enabled    whether it listens, once it is bound

    Raises ValueError for what cannot be understood, OSError for what cannot be
    listened on. Used as a context it runs in a thread of its own; everything is
    closed at its end.
    """

    def __init__(self, distant, local="localhost:0", behavior="100:dummy", options=None,
                 name="vaurien", seed=None, timeout=30.0, protocol="tcp",
                 overwrite_host_header=True, toxics=(), enabled=True):
        self.name = name
        self.protocol = PROTOCOLS[check_protocol(protocol)]
        self.overwrite_host_header = overwrite_host_header
        self.label = "" if name == "vaurien" else name + ": "
        self.local = parse_listener(local) if isinstance(local, str) else local
        self.listen = format_address(self.local)      # as it was given, then as it is
        self.enabled = enabled
        chosen = parse_behavior(behavior) if isinstance(behavior, str) else behavior
        self.timeout = check_timeout(timeout)
        self.seed = random.SystemRandom().getrandbits(32) if seed is None else seed
        self.rules = RuleSet(self.seed, name)
        options = options or {}
        read_rules([dict(table, name=handler, percent=0) for handler, table in options.items()])
        self.behaviors = [read_rules([dict(options.get(handler, {}), name=handler, percent=percent)
                                  for percent, handler in chosen])]
        self.toxics = list(toxics)          # in the order in which they act
        self.arm(self.behaviors, self.toxics)
        self.loop = None
        self.listener = None
        self.set_backend(distant)
        self.connections = {}               # {number: Connection}, those that are open
        self.accepted = 0
        self.faults = Counter()             # {handler: requests or connections it acted on}
        self.failures = 0                   # to connect to the backend
        self.closed_bytes = [0, 0, 0, 0]            # bytes of those gone, as Connection.count has it
        self.events = deque(maxlen=FAULT_RECORDS_KEPT)
        self.fault_count = 0
        self.acted = threading.Condition()  # notified of each event
        self.lookups = {}                    # {backend: who waits for its addresses}

    # For other threads

    def __enter__(self):
        self.bind()
        loop = Loop()
        self.open(loop)
        self.thread = threading.Thread(target=loop.run, name=self.name, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *exception):
        self.loop.stop()
        self.thread.join()
        self.close()                    # nobody else is in the loop any more
        self.loop.close()

    @property
    def port(self):
        """The port listened on."""
        return self.listener.sockets[0].getsockname()[1]

    @contextlib.contextmanager
    def handler(self, name, **fields):
        """Have a handler act for the time of a block, and then what acted before.

        fields    its options, and percent, per, stream, after, times: see Rule

        Raises ValueError for what cannot be understood.
        """
        rules = read_rules([dict(fields, name=name)])
        self.loop.run_sync(self.push, rules)
        try:
            yield self
        finally:
            self.loop.run_sync(self.pop, rules)

    def wait_for(self, name, timeout=5, since=0):
        """Wait until a handler has acted, and return the Event; TimeoutError otherwise.

        since    the number of an event: only later ones count
        """
        def found():
            return next((event for event in list(self.events)
                         if event.number > since and event.handler == name), None)
        get_handler(name)
        with self.acted:
            event = self.acted.wait_for(found, timeout)
        if not event:
            raise TimeoutError("%s has not acted in %g seconds" % (name, timeout))
        return event

    # In the loop's thread

    def bind(self):
        """Have a port. Raises OSError, with the address in its words."""
        self.set_listener(self.local, Listener(self.local, self.welcome))

    def set_listener(self, local, listener):
        """Take over a listener; one that got a free port keeps it for the next time."""
        self.listener = listener
        address = listener.sockets[0].getsockname()
        self.local = local[0], address[1]
        # An empty host is all addresses, which Toxiproxy calls [::].
        self.listen = format_address(address if local[0] else ("::", address[1]))

    def open(self, loop):
        """Begin to accept, if it is enabled."""
        self.loop = loop
        if self.listener:
            self.listener.open(loop)
            log.info("%slistening on %s for %s: %s; seed %s", self.label, self.listener,
                     format_address(self.backend), self.describe(), self.seed)

    def stop_listening(self, how):
        """No longer listen, and close every connection."""
        if self.listener:
            self.listener.close()
            self.listener = None
        self.drop_connections(how)

    def drop_connections(self, how):
        for connection in list(self.connections.values()):
            connection.close(how)

    def describe(self):
        """The behavior and the toxics in words: "20:delay sleep=1.0, 80:dummy"."""
        behavior = self.behaviors[-1]
        words = ["%g:%s" % (rule.draw_max - rule.draw_min, rule) for rule in behavior]
        rest = 100 - sum(rule.draw_max - rule.draw_min for rule in behavior)
        return ", ".join(words + ["%g:dummy" % rest] * (rest > 0.000001)
                         + ["toxic %s" % toxic for toxic in self.toxics])

    def handler_names(self):
        """The name of the handler that acts, or the names."""
        return ",".join(rule.name for rule in self.behaviors[-1]) or "dummy"

    def welcome(self, client, peer):
        """Somebody has come."""
        client.setblocking(False)
        if not LINUX:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.accepted += 1
        connection = Connection(self, self.accepted, client, peer)
        self.connections[self.accepted] = connection
        try:
            connection.start()
        except OSError as problem:      # the selector takes no more
            connection.close("refused: %s" % problem.strerror)

    def set_backend(self, distant):
        """Have new connections go to HOST:PORT. Raises ValueError."""
        backend = parse_address(distant) if isinstance(distant, str) else distant
        here = [self.local] + ([sock.getsockname()[:2] for sock in self.listener.sockets]
                               if self.listener else [])
        check_backend(backend, here)
        self.set_backend_address(backend)

    def set_backend_address(self, backend):
        self.backend = backend
        self.addresses = resolve_numeric(backend)       # None where it is a name

    def resolve_backend(self, then):
        """then(addresses, problem), later, of a backend that has a name.

        It is asked for anew when a client comes, once for all who wait for it.
        """
        backend = self.backend
        waiting = self.lookups.setdefault(backend, [])
        waiting.append(then)
        if len(waiting) == 1:
            self.loop.run_in_thread(lambda: resolve(backend), lambda addresses, problem:
                           self.on_resolved(backend, addresses, problem))

    def on_resolved(self, backend, addresses, problem):
        for then in self.lookups.pop(backend):
            then(addresses, problem)

    def set_rules(self, rules):
        """Have these rules act from now on; blocks of `handler` that end later change nothing."""
        self.switch([rules], self.toxics)

    def push(self, rules):
        """A block of `handler` begins: its rules act until it ends, or another begins."""
        self.switch(self.behaviors + [rules], self.toxics)

    def pop(self, rules):
        """It ends, in whatever order they do: the one that began last acts now."""
        self.switch([block for block in self.behaviors if block is not rules], self.toxics)

    def set_toxics(self, toxics):
        """Have these toxics, and no others, from now on.

        One that is there already stays; it lets go of what it holds, and keeps its
        memory, if its toxicity or an attribute has changed.
        """
        kept, changed = [], []
        known = {toxic.name: toxic for toxic in self.toxics}
        for toxic in toxics:
            old = known.get(toxic.name, toxic)
            if not old.same_rule(toxic):
                old = toxic
            elif (old.toxicity, old.attributes) != (toxic.toxicity, toxic.attributes):
                old.set(toxic.toxicity, toxic.attributes)
                changed.append(old.rule)
                if old.rule.instance:
                    old.rule.instance.update_settings(old.rule.options)
            kept.append(old)
        self.switch(self.behaviors, kept, changed)

    def switch(self, stack, toxics, changed=()):
        """Arm the rules on top of the stack, and those of the toxics, and no others.

        Adding one touches nothing that is under way; what a rule that goes, or has
        changed, was holding goes on at once. Open connections follow from their next
        request, or from this one if nobody has spoken in it yet; at once where a rule is
        drawn per connection. Raises BadRule.
        """
        before = self.rules.armed
        self.arm(stack, toxics)
        self.behaviors, self.toxics = stack, toxics
        after = self.rules.armed
        gone = [rule for rule in before if rule not in after]
        new = [rule for rule in after if rule not in before]
        log.info("%srules: %s", self.label, self.describe())
        for connection in list(self.connections.values()):
            connection.rules_changed(new, gone, changed)

    def arm(self, stack, toxics):
        """Have the rules, and the objects of those whose handlers have the class form."""
        rules = stack[-1] + [toxic.rule for toxic in toxics]
        for rule in rules:
            self.check_kind(rule)
            if rule.blocking and rule.instance is None:
                try:
                    rule.instance = rule.handler(rule.options, self)
                except Exception as problem:        # the user's class may do anything
                    raise InputError([("name", "%s cannot be made: %s" % (
                        rule.name, format_exception(problem)))]) from None
        self.rules.armed = rules
        self.has_blocking = any(rule.blocking for rule in rules)

    def set_protocol(self, protocol, overwrite_host_header):
        """Have new connections speak another one; those that are open are closed."""
        if (protocol, overwrite_host_header) != (self.protocol, self.overwrite_host_header):
            self.protocol, self.overwrite_host_header = protocol, overwrite_host_header
            self.drop_connections("changed by the control")

    def protocol_name(self):
        return self.protocol.__name__.lower() if self.protocol else "tcp"

    def host_header(self):
        """What a request is to name the backend, or nothing."""
        if not self.overwrite_host_header or self.protocol is not Http:
            return b""
        host, port = self.backend
        named = format_address((host or "localhost", port))
        return (named[:-len(":80")] if port == 80 else named).lower().encode("utf-8")

    def check_kind(self, rule):
        """Refuse, with BadRule, what the protocol does not know."""
        kind = rule.options.get("kind") if rule.handler in (error, transient) else ""
        if kind and (self.protocol is None or kind not in self.protocol.errors):
            if self.protocol is None:
                raise InputError([("kind", "kind %r is for a protocol: tcp has no kinds of errors"
                                % kind)])
            raise InputError([("kind", "kind must be one of %s, which %s has, not %r" % (
                ", ".join(self.protocol.errors), self.protocol_name(), kind))])
        if (rule.handler in (error, transient) and self.protocol and rule.stream != "both"
                and not rule.options["inject"]):
            raise InputError([("stream", "stream must be both for %s, which answers in the backend's "
                                      "place" % rule.name)])
        if rule.blocking and self.protocol:
            raise InputError([("name", "%s gets the sockets: it is for protocol tcp" % rule.name)])

    def apply_change(self, local, backend, enabled, listener):
        """Have other addresses; listener is a new one, or None where the old one does."""
        if listener or not enabled or backend != self.backend:
            self.drop_connections("%s by the control" % ("changed" if enabled else "disabled"))
        if self.listener and (listener or not enabled):
            self.stop_listening("changed")
        self.set_backend_address(backend)
        self.enabled = enabled
        if listener:
            self.set_listener(local, listener)
            self.open(self.loop)
        elif not enabled and local != self.local:
            self.local, self.listen = local, format_address(local)

    def record(self, connection, rule, request):
        """A fault has acted on a request."""
        self.fault_count += 1
        self.faults[rule.name] += 1
        connection.faults = [*(connection.faults or []), rule.name][-100:]
        with self.acted:
            self.events.append(FaultRecord(self.fault_count, time.time(), self.name, connection.number,
                                     connection.name, request, rule.name,
                                     dict(rule.options)))
            self.acted.notify_all()
        log.info("%sconnection %d, client %s, request %d: %s", self.label, connection.number,
                 connection.name, request, rule)

    def failed(self, connection, problem):
        """The backend could not be connected to."""
        self.failures += 1
        log.warning("%sconnection %d, client %s: cannot connect to backend %s: %s", self.label,
                    connection.number, connection.name, format_address(self.backend), problem)

    def ended(self, connection, how):
        del self.connections[connection.number]
        connection.count(self.closed_bytes)
        if log.isEnabledFor(logging.DEBUG):
            log.debug("%sconnection %d, client %s: %s after %.3f s, %d bytes up, %d bytes down, "
                      "requests: %d", self.label, connection.number, connection.name, how,
                      self.loop.clock() - connection.began, connection.up.received,
                      connection.down.received, connection.line.request)

    def list_connections(self):
        """What is open, a table each."""
        now = self.loop.clock()
        return [{
            "number": connection.number, "client": connection.name,
            "backend": connection.backend_name(),
            "connected": connection.backend is not None and not connection.connecting,
            "age": round(now - connection.began, 3),
            "bytes_up": connection.up.received, "bytes_down": connection.down.received,
            "requests": connection.line.request,
            "held_up": connection.up.held, "held_down": connection.down.held,
            "faults": connection.faults or [],
        } for connection in self.connections.values()]

    def metrics(self):
        """What there is to count: {metric: [(labels, value)]}."""
        mine = {"proxy": self.name}
        traffic = self.byte_counts()
        found = {"vaurien_connections_total": [(mine, self.accepted)],
                 "vaurien_connections_open": [(mine, len(self.connections))],
                 "vaurien_requests_total": [(mine, self.rules.requests)],
                 "vaurien_faults_total": [(dict(mine, handler=name), number_check)
                                          for name, number_check in sorted(self.faults.items())],
                 "vaurien_backend_failures_total": [(mine, self.failures)]}
        for what in "received", "sent":
            found["toxiproxy_proxy_%s_bytes_total" % what] = [
                (dict(mine, direction=way, listener=self.listen,
                      upstream=format_address(self.backend)), traffic[way, what])
                for way in (UPSTREAM, DOWNSTREAM)]
        return found

    def byte_counts(self):
        """{(way, "received" or "sent"): bytes} up to now."""
        found = list(self.closed_bytes)
        for connection in self.connections.values():
            connection.count(found)
        places = [(way, what) for way in (UPSTREAM, DOWNSTREAM) for what in ("received", "sent")]
        return dict(zip(places, found))

    def close(self):
        """Stop listening and close every connection."""
        if not self.loop:
            if self.listener:
                self.listener.close()
            return
        self.stop_listening("stopped")
        log.info("%sstopped: connections: %d, requests: %d, faults: %s", self.label,
                 self.accepted, self.rules.requests,
                 ", ".join("%d %s" % (n, name) for name, n in self.faults.items()) or "none")


# What is counted of each proxy: {name: (kind, help)}, as Prometheus names it; see Proxy.measure.
METRICS = OrderedDict((
    ("toxiproxy_proxy_received_bytes_total", (
        "counter", "Bytes from the client (upstream) and from the backend (downstream).")),
    ("toxiproxy_proxy_sent_bytes_total", (
        "counter", "Bytes to the backend (upstream) and to the client (downstream).")),
    ("vaurien_connections_total", ("counter", "Clients accepted.")),
    ("vaurien_connections_open", ("gauge", "Connections that are open.")),
    ("vaurien_requests_total", ("counter", "Requests begun.")),
    ("vaurien_faults_total", ("counter", "Requests or connections that a handler acted on.")),
    ("vaurien_backend_failures_total", ("counter", "Backends that could not be connected to.")),
))


class Statsd:
    """Sends the counts of all proxies to a StatsD server, by UDP, each STATSD_EVERY seconds.

    A counter goes out as what it has grown by (vaurien.PROXY.requests:3|c), a gauge as it is.
    """

    def __init__(self, address, proxies):
        self.address = address
        self.proxies = proxies
        self.loop = self.sock = None
        self.sent = {}              # {(proxy, name): value} as it was told before

    def bind(self):
        pass                        # it listens nowhere

    def open(self, loop):
        self.loop = loop
        loop.run_in_thread(self.call, self.called)

    def call(self):
        family, address = resolve(self.address)[0]
        sock = socket.socket(family, socket.SOCK_DGRAM)
        sock.setblocking(False)
        sock.connect(address)
        return sock

    def called(self, sock, problem):
        if problem:
            log.warning("statsd: cannot call %s: %s", format_address(self.address), problem)
            self.loop.call_at(self.loop.clock() + 60, lambda: self.open(self.loop))
            return
        self.sock = sock
        self.ring()

    def ring(self):
        if self.sock:
            self.send()
            self.loop.call_at(self.loop.clock() + STATSD_INTERVAL, self.ring)

    def send(self):
        lines, before, self.sent = [], self.sent, {}
        for proxy in list(self.proxies.values()):
            for metric, found in proxy.metrics().items():
                for labels, value in found:
                    name = self.name(metric, labels)
                    self.sent[proxy, name] = value
                    grown = value - before.get((proxy, name), 0)
                    if METRICS[metric][0] == "gauge":
                        lines.append("%s:%d|g" % (name, value))
                    elif grown:
                        lines.append("%s:%d|c" % (name, grown))
        packet = b""
        for line in [*lines, ""]:
            if packet and (not line or len(packet) + len(line) > STATSD_PACKET_MAX):
                with contextlib.suppress(OSError):          # nobody listens: it is UDP
                    self.sock.send(packet)
                packet = b""
            packet += b"\n" * bool(packet) + line.encode()

    def name(self, metric, labels):
        """vaurien.PROXY.received_bytes.upstream of toxiproxy_proxy_received_bytes_total{...}."""
        words = [labels["proxy"], re.sub("^(vaurien|toxiproxy_proxy)_|_total$", "", metric),
                 labels.get("direction") or labels.get("handler")]
        return ".".join(["vaurien"] + [re.sub(r"[^\w-]", "_", word) for word in words if word])

    def close(self):
        if self.sock:
            self.send()
            self.sock.close()
            self.sock = None


class ProxyTable(OrderedDict):
    """The proxies of one process, in one loop: {name: Proxy}.

    seed, timeout    for those that are made while it runs, as in Proxy

    They change in the loop only, which waits for no peer; a thread that makes several
    steps of it holds `changing` meanwhile.
    """

    def __init__(self, proxies=(), seed=None, timeout=30.0):
        super().__init__((proxy.name, proxy) for proxy in proxies)
        self.seed = random.SystemRandom().getrandbits(32) if seed is None else seed
        self.timeout = timeout
        self.loop = None
        self.lock = threading.RLock()

    def bind(self):
        """Have the ports. Raises OSError, with the address in its words."""
        for proxy in self.values():
            if proxy.enabled:
                proxy.bind()

    def open(self, loop):
        self.loop = loop
        if not self:
            log.info("no proxy yet: POST /proxies makes one; seed %s", self.seed)
        for proxy in self.values():
            proxy.open(loop)

    def close(self):
        for proxy in self.values():
            proxy.close()

    # For other threads, that hold `changing`

    def add(self, proxy):
        """One more, that accepts if it is enabled; False if the name is taken. Raises OSError."""
        if proxy.name in self:
            return False
        why = self.loop.capacity_error()
        if why:
            raise CannotListen(OSError(errno.EMFILE, why), proxy.local)
        if proxy.enabled:
            proxy.bind()
        return self.loop.run_sync(self.welcome, proxy)

    def welcome(self, proxy):
        proxy.open(self.loop)
        self[proxy.name] = proxy
        return True

    def remove(self, proxy):
        self.loop.run_sync(lambda: self.pop(proxy.name).close())

    def change(self, proxy, local, backend, enabled):
        """Give a proxy other addresses, or have it enabled or not. Raises OSError.

        What stays as it is goes on; a change of an address closes its connections. If
        it cannot listen there, it stays where it is.
        """
        moved = local != proxy.local and first_address(local) != proxy.listen
        if not moved:
            local = proxy.local
        listener = None
        if enabled and (moved or not proxy.enabled):
            listener = self.rebind(proxy, local)
        proxy.loop.run_sync(proxy.apply_change, local, backend, enabled, listener)

    def rebind(self, proxy, local):
        """A listener at local, though the proxy may have that port on another address."""
        old = proxy.listener if local[1] == proxy.local[1] else None
        if old:
            proxy.loop.run_sync(old.close)
        try:
            return Listener(local, proxy.welcome)
        except CannotListen:
            if old:
                old.sockets = listen(proxy.local)
                proxy.loop.run_sync(old.open, proxy.loop)
            raise


def first_address(local):
    """Where a listener at local would be, as Toxiproxy writes it. Raises OSError."""
    if not local[0]:
        return format_address(("::", local[1]))
    try:
        return format_address(resolve(local)[0][1])
    except OSError as problem:
        raise CannotListen(problem, local) from None


# -- Control ------------------------------------------------------------------
#
# HTTP for a test that drives the proxy while it runs. A route is a function of a
# question that returns the answer: a dict goes out as JSON, a str as text, an Answer as it
# is. To add one, write it here: `GET /` lists them. The loop accepts; a short-lived thread
# reads the question and answers it, and says `loop.call` for all that touches a proxy.

ROUTES = OrderedDict()          # {path: {method: function}}; a part in capitals is any name
REQUEST_BODY_MAX = 1 << 20              # bytes of a question's body
REQUEST_HEAD_MAX = 1 << 16              # and of its head
CLIENTS_MAX = 256               # connections at a time
IDLE_TIMEOUT = 10.0                # seconds that a connection may say nothing
REQUEST_TIMEOUT = 30.0              # seconds in which a question is asked, answered and heard

# What a route is asked: the control, {part of the path: name}, the other words of the query
# beside proxy, the body's text, the headers. The proxy is the one that is chosen, by the
# path or by ?proxy=NAME, or the first; None if there is none.
ApiRequest = namedtuple("ApiRequest", "control proxy names query body headers")
ApiResponse = namedtuple("ApiResponse", "status headers text")


class ApiError(Exception):
    """An answer that is an error: a status, and (location, name, description) of each."""

    def __init__(self, status, errors, headers=()):
        super().__init__("; ".join(description for _, _, description in errors))
        self.status, self.errors, self.headers = status, errors, dict(headers)

    def answer(self):
        """The Answer, in the form of 1.x."""
        headers = dict(self.headers, **{"Content-Type": "application/json"})
        return ApiResponse(self.status, headers, json.dumps({"status": "error", "errors": [
            {"location": location, "name": name, "description": description}
            for location, name, description in self.errors]}))

    @classmethod
    def wrong_method(cls, method, path, methods):
        allowed = ", ".join(sorted(methods))
        return cls(405, [("method", method[:20], "%s takes %s" % (path, allowed))],
                   {"Allow": allowed}).answer()


def route(method, path, example="", query=(), needs_proxy=True, form=ApiError):
    """Register a function for a method of a path.

    example        what curl is told to send
    query          the words of a query, beside proxy, that it knows; None for any
    needs_proxy    whether it is about one
    form           how this path refuses what is asked
    """
    def register(function):
        function.example, function.query = example, query
        function.needs_proxy, function.form = needs_proxy, form
        ROUTES.setdefault(path, OrderedDict())[method] = function
        return function
    return register


def bad_request(name, description, location="body", status=400):
    raise ApiError(status, [(location, name, description)])


def parse_json_object(body):
    """The JSON object in a body. Raises Refused."""
    try:
        table = json.loads(body, parse_int=short_int)
    except (ValueError, RecursionError) as problem:
        bad_request("", "the body must be JSON: %s" % problem)
    if not isinstance(table, dict):
        bad_request("", "the body must be a JSON object, like {\"name\": \"delay\", \"sleep\": 2}")
    return table


def short_int(text):
    """A number that is not there to keep us busy: reading takes the square of its length."""
    if len(text) > 400:
        raise ValueError("a number of %d digits" % len(text))
    return int(text)


def set_rules(question, tables):
    """Have the proxy use these rules and no others. Raises Refused."""
    try:
        question.proxy.loop.run_sync(question.proxy.set_rules, read_rules(tables))
    except InputError as bad:
        raise ApiError(400, [("body", name, words) for name, words in bad.errors]) from None


@route("GET", "/", needs_proxy=False)
def index(question):
    """This list."""
    lines = ["Vaurien %s: what can be asked, with an example each." % __version__, ""]
    for path, methods in ROUTES.items():
        for method, function in methods.items():
            lines.append("%-6s %-28s %s" % (method, path, summary(function)))
            lines.append("     curl %s%s%s%s" % (
                "" if method == "GET" or (method == "POST" and function.example)
                else "-X %s " % method,
                "-d '%s' " % function.example if method != "GET" and function.example else "",
                question.control.url, path + (function.example if method == "GET" else "")))
    lines += ["", "The handlers: %s." % ", ".join(HANDLERS),
              "The proxies: %s; ?proxy=NAME picks one, the first is usual."
              % (", ".join(question.control.proxies) or "none yet")]
    return "\n".join(lines) + "\n"


@route("GET", "/handler")
def get_name(question):
    """The name of the handler that acts, as text."""
    return question.proxy.handler_names()


@route("POST", "/handler", '{"name": "delay", "sleep": 2}')
def set_by_name(question):
    """Set a handler: a bare name, or JSON with its options and percent."""
    text = question.body.strip()
    if text[:1] in ("{", "[", '"'):
        table = parse_json_object(text)
    else:
        table = {"name": text}
    set_rules(question, [table])
    return "ok"


@route("GET", "/handlers", needs_proxy=False)
def list_handlers(question):
    """The names of all handlers."""
    return {"handlers": list(HANDLERS)}


@route("GET", "/behavior")
def get_behavior(question):
    """As GET /handler, as JSON."""
    return {"behavior": question.proxy.handler_names()}


@route("PUT", "/behavior", '{"name": "delay", "sleep": 2, "percent": 20}')
def set_behavior(question):
    """As POST /handler, as JSON."""
    set_rules(question, [parse_json_object(question.body)])
    return {"status": "ok"}


@route("GET", "/behaviors", needs_proxy=False)
def list_behaviors(question):
    """As GET /handlers."""
    return {"behaviors": list(HANDLERS)}


@route("GET", "/rules")
def get_rules(question):
    """The rules of the behavior, with every option and field."""
    tables, low = [], 0.0
    for rule in question.proxy.behaviors[-1]:
        if rule.draw_min > low:              # dummy's share, so that the dice fall the same again
            tables.append({"name": "dummy", "percent": rule.draw_min - low})
        tables.append(rule.to_json())
        low = rule.draw_max
    return {"rules": tables}


@route("PUT", "/rules",
       '{"rules": [{"name": "delay", "percent": 20}, {"name": "hang", "percent": 5}]}')
def put_rules(question):
    """Set several at once: one throw of the dice, at most one of them acts."""
    table = parse_json_object(question.body)
    tables = table.pop("rules", None)
    if table or not isinstance(tables, list) or not all(isinstance(rule, dict) for rule in tables):
        bad_request("rules", "the body must be {\"rules\": [{\"name\": ..., \"percent\": ...}, ...]}")
    set_rules(question, tables)
    return {"status": "ok"}


@route("GET", "/backend")
def get_backend(question):
    """The backend that new connections go to."""
    return {"backend": format_address(question.proxy.backend)}


@route("PUT", "/backend", '{"backend": "localhost:80"}')
def set_backend(question):
    """Set it; connections that are open stay where they are."""
    table = parse_json_object(question.body)
    errors = [("body", name, "%s is not known here: give backend" % name)
              for name in sorted(set(table) - {"backend"})]
    try:
        backend = parse_address(str(table.get("backend", "")))
        if not errors:
            question.proxy.loop.run_sync(question.proxy.set_backend, backend)
    except ValueError as problem:
        errors.append(("body", "backend", "backend %s" % problem))
    if errors:
        raise ApiError(400, errors)
    return {"status": "ok"}


@route("GET", "/proxies/PROXY/connections")
@route("GET", "/connections")
def list_connections(question):
    """What is open, and what is held in it."""
    return {"connections": question.proxy.loop.run_sync(question.proxy.list_connections)}


@route("GET", "/proxies/PROXY/events", "?since=0", query=["since"])
@route("GET", "/events", "?since=0", query=["since"])
def list_events(question):
    """The faults that acted, those after number `since`."""
    try:
        since = check_count(question.query.get("since", "0"))
    except ValueError as problem:
        bad_request("since", "since %s" % problem, "querystring")
    events = question.proxy.loop.run_sync(lambda: list(question.proxy.events))
    return {"events": [event._asdict() for event in events if event.number > since]}


def check_access(control, target, headers):
    """The Answer to who must not drive us, in the form of what is asked for; or None."""
    try:
        control.authorize(headers)
    except ApiError as refused:
        methods, _ = find_route(target.partition("?")[0])
        like_toxiproxy = any(function.form is ToxiproxyError for function in methods.values())
        answer = (ToxiproxyError(refused.status, str(refused)) if like_toxiproxy else refused).answer()
        control.complain(refused)
        return answer._replace(headers=dict(answer.headers, **refused.headers))
    return None


def handle_request(control, method, target, body, headers=None):
    """The Answer to one question. Nothing else may come of it."""
    try:
        refusal = check_access(control, target, headers or {})
        if refusal:
            return refusal
        answer = dispatch(control, method, target, body, headers or {})
    except ApiError as refused:
        return refused.answer()
    except Exception as problem:
        log.exception("control: %r %r failed", method[:20], target[:200])
        return ApiError(500, [("server", "", format_exception(problem))]).answer()
    if isinstance(answer, ApiResponse):
        return answer
    if isinstance(answer, str):
        return ApiResponse(200, {"Content-Type": "text/plain; charset=utf-8"}, answer)
    return ApiResponse(200, {"Content-Type": "application/json"}, json.dumps(answer))


def dispatch(control, method, target, body, headers):
    """Find the route and ask it. Raises Refused."""
    path, _, words = target.partition("#")[0].partition("?")
    methods, names = find_route(path)
    if not methods and path.startswith("/proxies/"):
        return text_response(404, "404 page not found\n")
    if not methods:
        bad_request("path", "there is no %s: there are %s" % (path[:200], ", ".join(ROUTES)),
               "path", 404)
    form = next(iter(methods.values())).form
    function = methods.get("GET" if method == "HEAD" and form is ApiError else method)
    if function is None:
        return form.wrong_method(method, path, methods)
    try:
        text = body.decode("utf-8", "strict" if form is ApiError else "replace")
    except UnicodeDecodeError as problem:
        bad_request("", "the body must be UTF-8: %s" % problem)
    query = dict(urls.parse_qsl(words, keep_blank_values=True))
    name = names.get("PROXY", query.pop("proxy", None))
    proxies = control.proxies
    proxy = proxies.get(next(iter(proxies), None) if name is None else name)
    if proxy is None and function.needs_proxy:
        bad_request("proxy", "there is no proxy %r: there are %s" % (
            (name or "")[:200], ", ".join(proxies) or "none yet"), "querystring",
            404 if "PROXY" in names else 400)
    for word in sorted(query):
        if function.query is not None and word not in function.query:
            bad_request(word, "%s does not know %r in a query" % (path, word[:200]), "querystring")
    return function(ApiRequest(control, proxy, names, query, text, headers))


def find_route(path):
    """({method: function}, {part in capitals: name}) of a path."""
    parts = path.split("/")
    for known, methods in ROUTES.items():
        wanted = known.split("/")
        if len(wanted) == len(parts) and all(
                part == want or (part and want.isupper()) for part, want in zip(parts, wanted)):
            return methods, {want: urls.unquote(part)
                             for part, want in zip(parts, wanted) if want.isupper()}
    return {}, {}


class Control:
    """The control server: a loop of its own, in a thread of its own, accepts; threads answer.

    token    what who drives it must bear; None for no token
    names    that it may be called by, beside its addresses, localhost and its own host
    """

    def __init__(self, local, proxies, token=None, names=()):
        self.local = local
        self.proxies = proxies
        self.token = token
        self.names = {"localhost", *map(normalize_host, [local[0], *names])} - {""}
        self.listener = None
        self.url = ""
        self.clients = OrderedDict()        # {socket: Talk}, the oldest first
        self.max_clients = CLIENTS_MAX             # of them
        self.sweeping = False
        self.last_warning = 0.0               # when the log last said that somebody was refused
        self.loop = None

    def bind(self):
        """Have a port. Raises OSError, with the address in its words."""
        self.listener = Listener(self.local, self.welcome)
        port = self.listener.sockets[0].getsockname()[1]
        self.url = "http://%s" % format_address((self.local[0] or "localhost", port))

    def open(self, loop):
        """Begin to answer; the proxies' loop may be busy."""
        self.talk = make_request_handler()
        self.max_clients = max(4, min(CLIENTS_MAX, (raise_fd_limit() or CLIENTS_MAX * 4) // 4))
        self.loop = Loop()
        self.listener.open(self.loop)
        self.thread = threading.Thread(target=self.loop.run, name="control", daemon=True)
        self.thread.start()
        log.info("control on %s", self.listener)
        if not self.token and not all(is_loopback(sock.getsockname())
                                      for sock in self.listener.sockets):
            log.warning("control: whoever reaches %s can drive it: give a --http-token",
                        self.listener)

    def authorize(self, headers):
        """Refuse who must not drive us; no page in a browser may. Raises Refused.

        Who bears the token may; no page knows it. Without a token a page is known by its
        Host, which is a name that its owner has given our address (DNS rebinding), or by
        where it comes from (RFC 6454, Origin; Fetch Metadata, Sec-Fetch-Site).
        """
        if self.token:
            scheme, _, word = headers.get("Authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(
                    word.strip().encode("utf-8", "replace"), self.token.encode("utf-8")):
                raise ApiError(401, [("header", "Authorization",
                                     "Authorization must be Bearer and the --http-token")],
                              {"WWW-Authenticate": "Bearer"})
            return
        host = headers.get("Host", "localhost")
        if not self.is_own_host(host):
            bad_request("Host", "Host must be an address, %s or another --http-name, not %r"
                   % (", ".join(sorted(self.names)), host[:200]), "header", 403)
        origin = headers.get("Origin", "http://" + host)
        if origin.lower() not in ("http://" + host.lower(), "https://" + host.lower()):
            bad_request("Origin", "no page of %r may drive this" % origin[:200], "header", 403)
        if headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
            bad_request("Sec-Fetch-Site", "no page from elsewhere may drive this", "header", 403)

    def complain(self, refused):
        """Say who was refused, once a second at most: somebody may wonder why."""
        now = time.monotonic()
        if now - self.last_warning >= 1:
            self.last_warning = now
            log.warning("control: a question was refused: %s", refused)

    def is_own_host(self, host):
        """Whether that is a Host that it may be called by."""
        name = normalize_host(re.sub(r":\d*$", "", host.strip()))
        bare = name[1:-1] if name.startswith("[") and name.endswith("]") else name
        return name in self.names or (bool(re.fullmatch("[0-9a-f.:]{1,45}", bare))
                                      and resolve_numeric((bare, 0)) is not None)

    def welcome(self, client, peer):
        """Have a thread answer a client; the oldest makes room if there are too many."""
        while len(self.clients) >= self.max_clients:
            oldest, _ = self.clients.popitem(last=False)
            with contextlib.suppress(OSError):
                oldest.shutdown(socket.SHUT_RDWR)
        client = socket.socket(client.family, socket.SOCK_STREAM, 0, client.detach())
        client.settimeout(IDLE_TIMEOUT)
        talk = self.clients[client] = Session(self)
        self.loop.run_in_thread(lambda: self.answer(client, peer, talk),
                       lambda done, problem: self.leave(client, problem))
        if not self.sweeping:
            self.close_expired()

    def close_expired(self):
        """Hang up on who takes too long, a byte at a time or not at all."""
        now = self.loop.clock()
        for client, talk in self.clients.items():
            if talk.until < now:
                with contextlib.suppress(OSError):
                    client.shutdown(socket.SHUT_RDWR)
        self.sweeping = bool(self.clients)
        if self.sweeping:
            self.loop.call_at(now + 1, self.close_expired)

    def answer(self, client, peer, talk):
        """Talk, then linger: to close over what is unread would destroy the last answer."""
        with client:
            self.talk(client, peer, talk)
            client.shutdown(socket.SHUT_WR)
            talk.set_deadline(LINGER_TIMEOUT)
            client.settimeout(1)
            for _ in range(1000):
                if not client.recv(65536):
                    break

    def leave(self, client, problem):
        self.clients.pop(client, None)
        client.close()                  # again, where there was no thread to do it
        if problem and not isinstance(problem, OSError):
            log.error("control: %s", format_exception(problem))

    def close(self):
        if self.loop:
            self.loop.stop()
            self.thread.join()
        if self.listener:
            self.listener.close()
        if self.loop:
            self.loop.close()


class Session:
    """What a connection to the control server knows of it, and until when it must be done."""

    def __init__(self, control):
        self.control = control
        self.set_deadline(IDLE_TIMEOUT)

    def set_deadline(self, seconds):
        """What is being done must be done in so many seconds."""
        self.until = self.control.loop.clock() + seconds


def normalize_host(host):
    """A host's name as a Host header has it: in small letters, its dot at the end left out."""
    try:
        return host.lower().rstrip(".").encode("idna").decode("ascii")
    except UnicodeError:
        return host.lower()


def is_loopback(address):
    return address[0] == "::1" or address[0].startswith("127.")


class LimitedReader:
    """The head of a question, as a file of HEAD_MAX bytes at most."""

    def __init__(self, file, too_long):
        self.file, self.too_long = file, too_long
        self.left = REQUEST_HEAD_MAX

    def readline(self, size):
        line = self.file.readline(min(size, self.left + 1))
        self.left -= len(line)
        if self.left < 0:
            raise self.too_long("head")
        return line


def make_request_handler():
    """The request handler of http.server that puts every question to `respond`."""
    import http.client  # late: few commands need them, and they take their time
    import http.server

    class Talker(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        server_version = "vaurien/" + __version__
        disable_nagle_algorithm = True
        wbufsize = -1                   # the head and the body leave together
        command = requestline = ""      # until it is known
        server: Session  # type: ignore

        def handle(self):
            try:
                self.rfile.peek(1)  # type: ignore
            except socket.timeout:
                self.send_error(408, "nothing was asked in %g seconds" % IDLE_TIMEOUT)
                return
            super().handle()

        def handle_one_request(self):
            self.server.set_deadline(IDLE_TIMEOUT)
            try:
                self.rfile.peek(1)  # type: ignore
            except socket.timeout:
                self.close_connection = True
                return
            self.server.set_deadline(REQUEST_TIMEOUT)
            super().handle_one_request()

        def parse_request(self):
            file = self.rfile
            self.rfile = LimitedReader(file, http.client.LineTooLong)  # type: ignore
            try:
                return super().parse_request()
            finally:
                self.rfile = file

        def __getattr__(self, name):    # any method: it is for the routes to refuse
            if name.startswith("do_"):
                return self.answer
            raise AttributeError(name)

        def answer(self):
            refusal = check_access(self.server.control, self.path, self.headers)
            if refusal:
                self.close_connection = True    # its body is not read
                self.reply(*refusal)
                return
            try:
                body = self.read_body()
            except socket.timeout:
                self.send_error(408, "the body did not come")
            else:
                if body is not None:
                    self.reply(*handle_request(self.server.control, self.command, self.path, body,
                                        self.headers))

        def read_body(self):
            """The body; or None, and it is answered."""
            length = self.headers.get("Content-Length", "0")
            if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
                return self.read_chunks()
            if self.headers.get("Transfer-Encoding"):
                self.send_error(411, "a body must come with its Content-Length, or in chunks")
            elif self.headers.get("Content-Encoding", "identity") != "identity":
                self.send_error(415, "a body must come as it is, without Content-Encoding")
            elif not re.fullmatch("[0-9]{1,18}", length):
                self.send_error(400, "Content-Length must be a number")
            elif int(length) > REQUEST_BODY_MAX:
                self.send_error(413, "a body may have %d bytes at most" % REQUEST_BODY_MAX)
            else:
                self.wfile.flush()      # a "100 Continue"
                body = self.rfile.read(int(length))
                if len(body) == int(length):
                    return body
                self.close_connection = True
            return None

        def read_chunks(self):
            """As read_body, of one in chunks (RFC 9112, 7.1)."""
            self.wfile.flush()
            body, size = bytearray(), 1
            while size:
                line = self.rfile.readline(100).split(b";")[0].strip()
                if not re.fullmatch(b"[0-9A-Fa-f]{1,8}", line):
                    self.send_error(400, "a chunk must begin with its length")
                    return None
                size = int(line, 16)
                if len(body) + size > REQUEST_BODY_MAX:
                    self.send_error(413, "a body may have %d bytes at most" % REQUEST_BODY_MAX)
                    return None
                body += self.rfile.read(size)
                if size and self.rfile.read(2) != b"\r\n":
                    self.send_error(400, "a chunk must be as long as it says")
                    return None
            while self.rfile.readline(1000).strip():        # trailers
                pass
            return body

        def reply(self, status, headers, text):
            data = text.encode("utf-8")
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("X-Toxiproxy-Request-Id", os.urandom(10).hex())
            if status != 204:
                self.send_header("Content-Length", str(len(data)))
            if self.close_connection:
                self.send_header("Connection", "close")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def send_error(self, code, message=None, explain=None):
            self.close_connection = True
            self.request_version = self.protocol_version    # whatever was asked for
            self.reply(*ApiError(code, [("request", "", message or explain or "")]).answer())
            self.wfile.flush()

        def log_message(self, form, *args):
            log.debug("control: %s: %s", self.client_address[0], form % args)

    return Talker


# -- Toxiproxy ----------------------------------------------------------------
#
# Its API, as its clients know it (2.12): named proxies, and toxics on them. A toxic is a rule;
# its type is a handler. What is read is read as its server does: keys in any case, unknown
# ones ignored, null for what is not given, numbers only as what they are.

STREAM_WORDS = "stream was invalid, can be either upstream or downstream"
GO_TYPES = {str: "string", bool: "bool", int: "int64", float: "float64", list: "[]", dict: "{}"}
JSON_TYPES = {str: "string", bool: "bool", int: "number", float: "number", list: "array",
              dict: "object", type(None): "null"}
TOXIPROXY_TYPES = {"noop", "latency", "bandwidth", "slicer", "slow_close", "timeout", "reset_peer",
              "limit_data"}
# As in the original these may be negative, which is as 0; where it crashed, it is refused.
PROXY_FIELDS = OrderedDict((("name", str), ("listen", str), ("upstream", str),
                            ("enabled", bool), ("toxics", list), ("protocol", str)))
TOXIC_FIELDS = OrderedDict((("name", str), ("type", str), ("stream", str), ("toxicity", float),
                            ("attributes", dict)))


class ToxiproxyError(ApiError):
    """An answer that is an error, in Toxiproxy's form."""

    def __init__(self, status, message):
        super().__init__(status, [("", "", message)])
        self.message = message

    def table(self):
        return OrderedDict((("error", self.message), ("status", self.status)))

    def answer(self):
        return text_response(self.status, dump_json(self.table()) + "\n")

    @classmethod
    def wrong_method(cls, method, path, methods):
        return text_response(405, "")


def text_response(status, text):
    return ApiResponse(status, {"Content-Type": "text/plain; charset=utf-8",
                           "X-Content-Type-Options": "nosniff"}, text)


def dump_json(value):
    return json.dumps(value, separators=(",", ":"))


def toxiproxy_route(method, path, example="", status=200):
    """Register a function of a question; what it returns goes out as JSON, None as 204."""
    def register(function):
        def answer(question):
            agent = question.headers.get("User-Agent", "")
            if agent.startswith("Mozilla/"):        # as the original has it
                return text_response(403, "User agent not allowed\n")
            with toxiproxy_errors():
                found = function(question)
            if isinstance(found, ApiResponse):
                return found
            if found is None:
                return ApiResponse(204, {}, "")
            return ApiResponse(status, {"Content-Type": "application/json"}, dump_json(found))
        answer.__doc__ = function.__doc__
        route(method, path, example, query=None, needs_proxy=False, form=ToxiproxyError)(answer)
        return function
    return register


@contextlib.contextmanager
def toxiproxy_errors():
    """An ApiError in the place of what a proxy raises."""
    try:
        yield
    except CannotListen as problem:
        raise ToxiproxyError(500, "listen tcp %s: bind: %s"
                       % (problem.address, problem.reason.lower())) from None
    except ValueError as problem:
        raise bad_body(problem) from None


# Reading

def bad_body(words):
    return ToxiproxyError(400, "bad request body: %s" % words)


def check_field(name, check, *resolve_settings):
    """What check makes of a field. Raises ApiError, that names it."""
    try:
        return check(*resolve_settings)
    except ValueError as problem:
        raise bad_body("%s %s" % (name, problem)) from None


def read_json(text, strict=False):
    """The first JSON value in a text; what follows it is ignored, or refused. Raises ApiError."""
    def constant(name):
        raise ValueError("invalid number %s" % name)
    text = text.lstrip(" \t\r\n")
    if not text:
        raise bad_body("EOF")
    try:
        decoder = json.JSONDecoder(parse_int=short_int, parse_constant=constant)
        return decoder.decode(text) if strict else decoder.raw_decode(text)[0]
    except json.JSONDecodeError as problem:
        cut_off = problem.pos >= len(text.rstrip()) or problem.msg.startswith("Unterminated")
        raise bad_body("unexpected EOF" if cut_off else "invalid JSON: %s" % problem) from None
    except RecursionError:
        raise bad_body("nested too deeply") from None
    except ValueError as problem:
        raise bad_body(problem) from None


def read_value(value, kind, place):
    """A value of that kind and no other. Raises ApiError, in the words of the original."""
    fits = type(value) is kind or (kind is float and type(value) is int)
    if fits and kind is int:
        fits = -INT64_MAX - 1 <= value <= INT64_MAX
    elif fits and kind is float:
        fits = abs(value) <= sys.float_info.max
    if not fits:
        what = JSON_TYPES[type(value)]
        if what == "number" and kind in (int, float):
            what = "number %s" % str(value)[:50]
        raise bad_body("json: cannot unmarshal %s into Go struct field %s of type %s"
                       % (what, place, GO_TYPES[kind]))
    return float(value) if kind is float else value


def read_object(value, struct, strict=False):
    """A JSON object, its keys in any case if not strict; null is not given. Raises ApiError."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise bad_body("json: cannot unmarshal %s into Go value of type %s"
                       % (JSON_TYPES[type(value)], struct))
    return {key if strict else key.lower(): given
            for key, given in value.items() if given is not None}


def read_fields(table, kinds, struct):
    return {name: read_value(table[name], kind, "%s.%s" % (struct, name))
            for name, kind in kinds.items() if name in table}


def read_proxy(value):
    """The fields of a proxy that are given. Raises ApiError."""
    fields = read_fields(read_object(value, "toxiproxy.Proxy"), PROXY_FIELDS, "Proxy")
    if not fields.get("listen", "x"):
        fields["listen"] = ":0"
    return fields


def make_proxy(fields, proxies, place=""):
    """A proxy, not open yet, of the fields of `read_proxy`. Raises ApiError."""
    for name in "name", "upstream":
        if not fields.get(name):
            raise ToxiproxyError(400, "missing required field: %s%s" % (name, place))
    check_field("name", check_name, fields["name"])
    toxics = []
    for number_check, table in enumerate(fields.get("toxics", ()), 1):
        try:
            toxics.append(read_toxic(table))
        except ToxiproxyError as problem:
            raise ToxiproxyError(problem.status, "%s (toxic %d of proxy %s)" % (
                problem.message, number_check, fields["name"])) from None
    check_unique(toxics)
    local = read_listen(fields.get("listen", ":0"), "listen tcp: ")
    backend = check_field("upstream", parse_address, fields["upstream"])
    check_field("upstream", check_backend, backend, [local])
    protocol = check_field("protocol", check_protocol, fields.get("protocol", "tcp"))
    try:
        return Proxy(backend, local, name=fields["name"], seed=proxies.seed,
                     timeout=proxies.timeout, protocol=protocol, toxics=toxics,
                     enabled=fields.get("enabled", True))
    except ValueError as problem:
        raise bad_body(problem) from None


def check_unique(toxics):
    names = [toxic.name for toxic in toxics]
    if len(set(names)) < len(names):
        raise ToxiproxyError(409, "toxic already exists")


def read_listen(text, prefix=""):
    """(host, port) of an address to listen on. Raises ApiError, in the words of the original."""
    try:
        return parse_listener(text)
    except ValueError as problem:
        if ":" not in text:
            raise ToxiproxyError(500, "%saddress %s: missing port in address" % (prefix, text)) from None
        if re.fullmatch(r"[^:]*:\d{5,}", text):
            raise ToxiproxyError(500, "%saddress %s: invalid port"
                           % (prefix, text.rpartition(":")[2])) from None
        raise bad_body("listen %s" % problem) from None


def read_toxic(value, strict=False):
    """A Toxic of a JSON object. Raises ApiError.

    strict    whether what is unknown, or out of range, is refused
    """
    table = read_object(value, "toxics.ToxicWrapper", strict)
    fields = read_fields(table, TOXIC_FIELDS, "ToxicWrapper")
    kind = fields.get("type", "")
    # Toxiproxy's own have a stream unless it is said; the others see both.
    usual = "both" if kind in HANDLERS and kind not in TOXIPROXY_TYPES else DOWNSTREAM
    stream = fields.get("stream", usual)
    if stream.lower() not in (UPSTREAM, DOWNSTREAM, "both"):
        raise ToxiproxyError(400, STREAM_WORDS)
    if kind not in HANDLERS:
        raise ToxiproxyError(400, "invalid toxic type" + ": %r: there are %s" % (
            kind, ", ".join(HANDLERS)) * strict)
    name = fields.get("name") or "%s_%s" % (kind, stream)
    check_field("name", check_name, name)
    for key in table:
        if strict and key not in TOXIC_FIELDS and key not in RULE_FIELDS:
            raise bad_body("%s is not a field of a toxic: they are %s" % (
                key, ", ".join(OrderedDict([*TOXIC_FIELDS.items(), *RULE_FIELDS.items()]))))
    rule_fields = read_rule_fields(table)
    for _, words in check_fields(kind, HANDLERS[kind], dict(rule_fields, stream=stream.lower())):
        raise bad_body(words)
    toxicity = read_toxicity(fields, rule_fields, 1.0)
    if strict and not 0 <= toxicity <= 1:
        raise bad_body("toxicity must be a number from 0 to 1, not %r" % toxicity)
    attributes = read_attributes(kind, fields.get("attributes", {}), strict)
    return Toxic(kind, name, toxicity, attributes, stream, **rule_fields)


def read_rule_fields(table):
    """The fields of a rule, but for stream, that a table has. Raises ApiError."""
    return {key: check_field(key, field.check, table[key]) for key, field in RULE_FIELDS.items()
            if key in table and key != "stream"}


def read_toxicity(fields, rule_fields, usual):
    """From 0 to 1; a percent means the same."""
    percent = rule_fields.pop("percent", None)
    if percent is None:
        return fields.get("toxicity", usual)
    if "toxicity" in fields:
        raise bad_body("percent and toxicity say the same: give one of them")
    return percent / 100


def read_attributes(kind, value, strict=False):
    """The options of a handler that are given in a JSON object. Raises ApiError."""
    usual = handler_options(HANDLERS[kind])
    known = {option if strict else option.lower(): option for option in usual}
    found = {}
    for key, given in read_object(value, "attributes", strict).items():
        if key not in known:
            if strict:
                raise bad_body("%s is not an attribute of %s: it has %s"
                               % (key, kind, ", ".join(sorted(usual)) or "none"))
            continue
        option = known[key]
        number_check = read_value(given, type(usual[option]), ".attributes." + option)
        if strict or not (option in MAY_BE_NEGATIVE and type(number_check) is int and number_check < 0):
            check_field(option, check_option, kind, option, number_check)
        found[option] = number_check
    return found


# Writing

def toxic_to_json(toxic):
    rule = toxic.rule
    table = OrderedDict((("attributes", toxic.attributes), ("name", toxic.name),
                         ("type", rule.name), ("stream", toxic.stream),
                         ("toxicity", toxic.toxicity)))
    fields = rule.to_json()
    usual = {"per": "connection", "match": None, "after": 0, "times": 0}
    table.update((name, fields[name]) for name in usual
                 if fields.get(name, usual[name]) != usual[name])
    return table


def toxics_to_json(proxy):
    """Those of upstream first, each in the order they were made."""
    order = [UPSTREAM, DOWNSTREAM, "both"]
    return [toxic_to_json(toxic)
            for toxic in sorted(proxy.toxics, key=lambda toxic: order.index(toxic.rule.stream))]


def proxy_to_json(proxy):
    own = [("protocol", proxy.protocol_name())] if proxy.protocol else []
    return proxy.loop.run_sync(lambda: OrderedDict([
        ("name", proxy.name), ("listen", proxy.listen), ("upstream", format_address(proxy.backend)),
        ("enabled", proxy.enabled), ("toxics", toxics_to_json(proxy)), *own]))


# The routes

def find_proxy(question):
    proxy = question.proxy
    if proxy is None or question.control.proxies.get(proxy.name) is not proxy:
        raise ToxiproxyError(404, "proxy not found")
    return proxy


def find_toxic(question):
    for toxic in find_proxy(question).toxics:
        if toxic.name == question.names["TOXIC"]:
            return toxic
    raise ToxiproxyError(404, "toxic not found")


@toxiproxy_route("GET", "/proxies")
def list_proxies(question):
    """All proxies, with their toxics."""
    proxies = dict(question.control.proxies)
    return OrderedDict((name, proxy_to_json(proxies[name])) for name in sorted(proxies))


@toxiproxy_route("POST", "/proxies", '{"name": "redis", "listen": "localhost:26379", '
                         '"upstream": "localhost:6379"}', status=201)
def create_proxy(question):
    """Make one; `toxics` are on it before anybody can come."""
    fields = read_proxy(read_json(question.body))
    proxies = question.control.proxies
    proxy = make_proxy(fields, proxies)
    with proxies.lock:
        if not proxies.add(proxy):
            raise ToxiproxyError(409, "proxy already exists")
        return proxy_to_json(proxy)


@toxiproxy_route("GET", "/proxies/PROXY")
def get_proxy(question):
    """One of them."""
    return proxy_to_json(find_proxy(question))


@toxiproxy_route("PATCH", "/proxies/PROXY", '{"enabled": false}')
@toxiproxy_route("POST", "/proxies/PROXY", '{"enabled": false}')
def update_proxy(question):
    """Change listen, upstream or enabled; its toxics stay as they are."""
    find_proxy(question)
    fields = read_proxy(read_json(question.body))
    with question.control.proxies.lock:
        proxy = find_proxy(question)
        change_proxy(question.control.proxies, proxy, fields, fields.get("enabled", proxy.enabled))
        return proxy_to_json(proxy)


def change_proxy(proxies, proxy, fields, enabled):
    local, backend = proxy.local, proxy.backend
    if fields.get("listen", proxy.listen) != proxy.listen:
        local = read_listen(fields["listen"])
    if fields.get("upstream"):
        backend = check_field("upstream", parse_address, fields["upstream"])
    check_field("upstream", check_backend, backend, [local])
    if "protocol" in fields and PROTOCOLS.get(fields["protocol"], "") is not proxy.protocol:
        raise bad_body("protocol cannot be changed: delete the proxy, and make it anew")
    proxies.change(proxy, local, backend, enabled)


@toxiproxy_route("DELETE", "/proxies/PROXY")
def delete_proxy(question):
    """Remove it, and close its connections."""
    with question.control.proxies.lock:
        question.control.proxies.remove(find_proxy(question))


@toxiproxy_route("GET", "/proxies/PROXY/toxics")
def list_toxics(question):
    """Its toxics."""
    proxy = find_proxy(question)
    return proxy.loop.run_sync(toxics_to_json, proxy)


@toxiproxy_route("POST", "/proxies/PROXY/toxics", '{"type": "latency", "attributes": {"latency": 200}}')
def create_toxic(question):
    """Add one: from now on, on open connections too."""
    find_proxy(question)
    toxic = read_toxic(read_json(question.body))
    with question.control.proxies.lock:
        proxy = find_proxy(question)
        toxics = [*proxy.toxics, toxic]
        check_unique(toxics)
        proxy.loop.run_sync(proxy.set_toxics, toxics)
    return toxic_to_json(toxic)


@toxiproxy_route("PUT", "/proxies/PROXY/toxics", '[{"type": "latency", "attributes": {"latency": 200}}]')
def put_toxics(question):
    """Have these and no others; what is unknown in them is refused."""
    find_proxy(question)
    tables = read_value(read_json(question.body, strict=True), list, "toxics")
    toxics = [read_toxic(table, strict=True) for table in tables]
    check_unique(toxics)
    with question.control.proxies.lock:
        proxy = find_proxy(question)
        proxy.loop.run_sync(proxy.set_toxics, toxics)
        return proxy.loop.run_sync(toxics_to_json, proxy)


@toxiproxy_route("GET", "/proxies/PROXY/toxics/TOXIC")
def get_toxic(question):
    """One of them."""
    return toxic_to_json(find_toxic(question))


@toxiproxy_route("PATCH", "/proxies/PROXY/toxics/TOXIC", '{"attributes": {"latency": 100}}')
@toxiproxy_route("POST", "/proxies/PROXY/toxics/TOXIC", '{"attributes": {"latency": 100}}')
def update_toxic(question):
    """Change its toxicity, or some of its attributes."""
    find_toxic(question)
    table = read_object(read_json(question.body), "toxics.ToxicWrapper")
    fields = read_fields(table, OrderedDict((("toxicity", float), ("attributes", dict))), "")
    rule_fields = read_rule_fields(table)
    with question.control.proxies.lock:
        toxic, proxy = find_toxic(question), question.proxy
        rule = toxic.rule
        toxicity = read_toxicity(fields, rule_fields, toxic.toxicity)
        for name, value in rule_fields.items():
            if value != getattr(rule, name):
                raise bad_body("%s cannot be changed: remove the toxic, and add it anew" % name)
        attributes = read_attributes(rule.name, fields.get("attributes", {}))
        changed = Toxic(rule.name, toxic.name, toxicity, dict(toxic.attributes, **attributes),
                        toxic.stream, per=rule.per, match=rule.match, after=rule.after,
                        times=rule.times)
        proxy.loop.run_sync(proxy.set_toxics, [changed if other is toxic else other
                                           for other in proxy.toxics])
        return toxic_to_json(toxic)


@toxiproxy_route("DELETE", "/proxies/PROXY/toxics/TOXIC")
def delete_toxic(question):
    """Remove it: what it holds goes on at once."""
    with question.control.proxies.lock:
        toxic, proxy = find_toxic(question), question.proxy
        proxy.loop.run_sync(proxy.set_toxics, [other for other in proxy.toxics if other is not toxic])


@toxiproxy_route("POST", "/populate", '[{"name": "redis", "listen": "localhost:26379", '
                          '"upstream": "localhost:6379", "toxics": [{"type": "latency"}]}]')
def populate(question):
    """Have these proxies, beside those that are there; nothing is done if one is wrong."""
    made = []
    try:
        for proxy, fields in read_proxies(question.body, question.control.proxies):
            with toxiproxy_errors():
                made.append(upsert_proxy(question.control.proxies, proxy, fields))
    except ToxiproxyError as problem:
        return ApiResponse(problem.status, {"Content-Type": "application/json"}, dump_json(OrderedDict(
            problem.table(), proxies=[proxy_to_json(proxy) for proxy in made] or None)))
    return ApiResponse(201, {"Content-Type": "application/json"},
                  dump_json({"proxies": [proxy_to_json(proxy) for proxy in made] or None}))


def read_proxies(text, proxies):
    """The proxies in a JSON array, not open yet: [(Proxy, fields)]. Raises ApiError."""
    tables = read_json(text)
    if tables is None:
        tables = []
    if not isinstance(tables, list):
        raise bad_body("json: cannot unmarshal %s into Go value of type []toxiproxy.Proxy"
                       % JSON_TYPES[type(tables)])
    everything = [read_proxy(table) for table in tables]
    found = []
    for number_check, fields in enumerate(everything, 1):
        place = " at proxy %d" % number_check
        try:
            found.append((make_proxy(fields, proxies, place), fields))
        except ToxiproxyError as problem:
            words = re.sub(re.escape(place) + "$", "", problem.message) + place
            raise ToxiproxyError(problem.status, words) from None
    names = [proxy.name for proxy, _ in found]
    for number_check, name in enumerate(names, 1):
        if name in names[:number_check - 1]:
            raise bad_body("duplicate proxy name %r at proxy %d" % (name, number_check))
    return found


def upsert_proxy(proxies, proxy, fields):
    """Have a proxy; one that is there and has these addresses stays, but for its toxics."""
    with proxies.lock:
        known = proxies.get(proxy.name)
        if known is None:
            proxies.add(proxy)
            return proxy
        same = (known.backend == proxy.backend and known.protocol is proxy.protocol
                and known.listen in (proxy.listen, first_address(proxy.local)))
        if not same:
            proxies.change(known, proxy.local, proxy.backend, proxy.enabled)
            known.loop.run_sync(known.set_rules, [])
            known.loop.run_sync(known.set_protocol, proxy.protocol, True)
        if not same or "toxics" in fields:
            known.loop.run_sync(known.set_toxics, proxy.toxics)
        return known


@toxiproxy_route("POST", "/reset")
def reset(question):
    """Enable all proxies, remove all toxics; connections stay."""
    proxies = question.control.proxies
    with proxies.lock:
        for proxy in list(proxies.values()):
            change_proxy(proxies, proxy, {}, True)
            proxy.loop.run_sync(proxy.set_toxics, [])


@toxiproxy_route("GET", "/version")
def version(question):
    """Which version this is: at least what clients ask of Toxiproxy."""
    return ApiResponse(200, {"Content-Type": "application/json;charset=utf-8"},
                  '{"version": "%s"}\n' % __version__)


@toxiproxy_route("GET", "/metrics")
def metrics(question):
    """All counts, for Prometheus."""
    measured = [proxy.loop.run_sync(proxy.metrics)
                for proxy in list(question.control.proxies.values())]
    lines = []
    for name, (kind, words) in METRICS.items():
        lines += ["# HELP %s %s" % (name, words), "# TYPE %s %s" % (name, kind)]
        lines += ["%s{%s} %d" % (name, ",".join('%s="%s"' % (label, escape(str(text)))
                                                for label, text in sorted(labels.items())), value)
                  for found in measured for labels, value in found[name]]
    return ApiResponse(200, {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"},
                  "\n".join(lines) + "\n")


def escape(text):
    """A label's value in Prometheus' text."""
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


# -- Client -------------------------------------------------------------------
#
# The other end of Control, for a test in another process or on another host; and
# start_proxy and stop_proxy, that run this very file in a process of its own.

class Client:
    """Drives a proxy that was started with --http.

    A refusal is a ValueError with the server's words; no server is an OSError.
    """

    def __init__(self, host="localhost", port=8080, scheme="http", proxy=None, token=None):
        self.host, self.port, self.scheme = host, int(port), scheme
        self.proxy = proxy              # its name, where there are several
        try:
            self.token = token and check_token(token)       # of --http-token
        except ValueError as problem:
            raise ValueError("token %s" % problem) from None

    def ask(self, method, path, body=None, **query):
        """Ask the server; returns its JSON, or its text."""
        import http.client  # late: it takes its time to import
        kind = {"http": "HTTPConnection", "https": "HTTPSConnection"}.get(self.scheme, "")
        if not hasattr(http.client, kind):      # https needs Python's ssl
            raise ValueError("scheme must be http or https, not %r" % self.scheme)
        if self.proxy is not None:
            query["proxy"] = self.proxy
        if query:
            path += "?" + urls.urlencode(query)
        connection = getattr(http.client, kind)(self.host, self.port, timeout=30)
        try:
            connection.request(method, path, None if body is None else json.dumps(body),
                               {"Authorization": "Bearer " + self.token} if self.token else {})
            response = connection.getresponse()
            text = response.read().decode("utf-8", "replace")
        except http.client.HTTPException as problem:
            raise OSError("%s:%d does not speak HTTP: %s" % (
                self.host, self.port, problem)) from None
        finally:
            connection.close()
        if response.getheader("Content-Type", "").startswith("application/json"):
            try:
                text = json.loads(text)
            except (ValueError, RecursionError):
                raise OSError("it is no vaurien") from None
        if response.status >= 400:
            errors = text.get("errors") if isinstance(text, dict) else None
            raise ValueError("; ".join(error["description"] for error in errors) if errors
                             else "HTTP %d: %s" % (response.status, text))
        return text

    def set_handler(self, name, **options):
        """Set a handler, with its options, percent and other fields of a rule."""
        self.ask("PUT", "/behavior", dict(options, name=name))

    def get_handler(self):
        """The name of the handler that acts."""
        return self.ask("GET", "/behavior")["behavior"]

    def list_handlers(self):
        return self.ask("GET", "/handlers")["handlers"]

    @contextlib.contextmanager
    def with_handler(self, name, **options):
        """Set a handler for the time of a block, then what was there before."""
        before = self.ask("GET", "/rules")
        self.set_handler(name, **options)
        try:
            yield
        finally:
            self.ask("PUT", "/rules", before)

    set_behavior, get_behavior = set_handler, get_handler
    list_behaviors, with_behavior = list_handlers, with_handler

    def get_backend(self):
        return self.ask("GET", "/backend")["backend"]

    def set_backend(self, backend):
        """Have new connections go to HOST:PORT."""
        self.ask("PUT", "/backend", {"backend": backend})

    def events(self, since=0):
        """The faults that acted, those after number `since`: a list of dicts."""
        return self.ask("GET", "/events", since=since)["events"]

    def connections(self):
        """What is open: a list of dicts."""
        return self.ask("GET", "/connections")["connections"]


# Runs this very file under the name it was imported by, so that a handler of the user's
# that imports it by that name, or as vaurien, gets the same module.
BOOTSTRAP = """\
import importlib.util, sys
spec = importlib.util.spec_from_file_location(*sys.argv[1:3])
del sys.argv[1:3]
module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
sys.modules.setdefault("vaurien", module)
spec.loader.exec_module(module)
sys.modules.setdefault("vaurien.handlers", module.handlers)
sys.exit(module.main())
"""
STARTED_PROCESSES = {}            # {pid: (Popen, who started it)} of start_proxy


def start_proxy(host="localhost", port=8888, http=True, warmup=2, *, proxy_host="localhost",
                proxy_port=8000, backend_host=None, backend_port=None, protocol="tcp",
                http_host="localhost", http_port=8080, http_token=None, options=None,
                log_level="info", log_output="-"):
    """Start a proxy in a process of its own, and return its pid when it listens.

    host, port       the backend (backend_host and backend_port mean the same)
    http             whether it can be driven by a Client, at http_host and http_port,
                     by who knows the http_token, if there is one
    warmup           seconds to wait for it, at the longest
    options          more words for the command line, like ["--behavior", "20:delay"]

    Raises RuntimeError, in the words of the proxy, if it cannot start. It ends with
    `stop_proxy`, or when this process does, however that ends.
    """
    backend = format_address((backend_host or host, int(backend_port or port)))
    if isinstance(options, str):
        raise ValueError("options must be a list of words, not %r" % options)
    words = [sys.executable, "-c", BOOTSTRAP, __name__, os.path.abspath(__file__), "--attached",
             "--backend", backend, "--protocol", protocol,
             "--proxy", format_address((proxy_host, int(proxy_port))), "--log-level", log_level,
             "--log-output", log_output]
    if http:
        words += ["--http", "--http-host", http_host, "--http-port", str(http_port)]
    elif http_token:
        raise ValueError("http_token is for http, which is not wanted")
    environment = dict(os.environ, **{TOKEN_VARIABLE: http_token} if http_token else {})
    process = subprocess.Popen([*words, *map(str, options or ())], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, universal_newlines=True, env=environment)
    STARTED_PROCESSES[process.pid] = process, os.getpid()
    said = ["it said nothing in %s seconds" % warmup]

    def listen_to_it():
        for line in process.stdout:
            said.append(line.strip())
            if line == "ready\n":
                break

    reader = threading.Thread(target=listen_to_it, daemon=True)
    try:
        reader.start()
        reader.join(warmup)
        if said[-1] != "ready":
            raise RuntimeError("the proxy did not start: %s" % said[-1])
    except BaseException:
        stop_proxy(process.pid)
        raise
    return process.pid


def stop_proxy(pid):
    """Stop a proxy of `start_proxy`, and wait for its end. ValueError if it is none."""
    if not isinstance(pid, int) or pid not in STARTED_PROCESSES:
        raise ValueError("no proxy was started as process %r" % (pid,))
    process, _ = STARTED_PROCESSES.pop(pid)
    with contextlib.suppress(OSError):      # somebody else has waited for it
        process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:       # a handler of the user's does not let it end
        process.kill()
        process.wait()
    process.stdin.close()
    process.stdout.close()


@atexit.register
def stop_all():
    for pid, (_, starter) in list(STARTED_PROCESSES.items()):
        if starter == os.getpid():          # and not a fork of it
            stop_proxy(pid)


# -- Command line -------------------------------------------------------------
#
# Every setting is declared once, here, and every handler's options once, in its
# signature. The parser, the ini file's keys and the help are made from them.
# The command line wins over the file, the file over the defaults.

# How a setting is spelt, its default, and the function that checks its text, which
# raises ValueError with the end of a sentence: "must be ...". No metavar: it takes
# no value on the command line, and yes or no in a file.
Setting = namedtuple("Setting", "flags default check metavar help")


def check_host(text):
    if not is_valid_host(text):
        raise ValueError("must be a host, like localhost or 127.0.0.1, not %r" % text)
    return text


def check_names(text):
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if not name or ":" in name or not is_valid_host(name):
            raise ValueError("must be NAME[,NAME ...], like chaos.example, not %r" % text)
    return names


def get_token(text):
    """The checked token of an option, or of the environment; None if there is none."""
    given = SourcedText("--http-token", text) if text else SourcedText(TOKEN_VARIABLE, os.environ.get(TOKEN_VARIABLE))
    return given.check(check_token) if given.text else None


def check_log_level(text):
    return choice_check("debug", "info", "warning", "error", "critical")(text.lower()).upper()


def check_file(text):
    if not text or "\0" in text:
        raise ValueError("must name a file, not %r" % text)
    return text


PROXY_SETTINGS = OrderedDict((
    ("local", Setting(("--local", "--proxy"), "localhost:8000", parse_listener, "HOST:PORT",
                      "where to listen; port 0 picks a free one")),
    ("distant", Setting(("--distant", "--backend"), "localhost:80", parse_address, "HOST:PORT",
                        "the backend to pass everything to")),
    ("behavior", Setting(("--behavior",), "100:dummy", parse_behavior, "PERCENT:HANDLER,...",
                         "which handlers act, on how many of the requests")),
    ("protocol", Setting(("--protocol",), "tcp", check_protocol, "NAME",
                         "what is spoken: " + ", ".join(PROTOCOLS))),
    ("overwrite_host_header", Setting((
        "--protocol-http-overwrite-host-header",), "yes", check_yes_no, "YES|NO",
        "of http: ask for the backend by its own name, not by the proxy's")),
    ("seed", Setting(("--seed",), None, check_count, "N",
                     "the same seed gives the same faults; drawn and logged if not given")),
    ("timeout", Setting(("--timeout",), "30", check_timeout, "SECONDS",
                        "for connecting to the backend")),
))
PROCESS_SETTINGS = OrderedDict((
    ("http", Setting(("--http",), "no", check_yes_no, None, "let it be driven while it runs")),
    ("http-host", Setting(("--http-host",), "localhost", check_host, "HOST",
                          "where to be driven from")),
    ("http-port", Setting(("--http-port",), "8080", check_port, "PORT",
                          "likewise; 0 picks a free one")),
    ("http-token", Setting(("--http-token",), None, check_token, "TOKEN",
                           "who drives it must send it: Authorization: Bearer TOKEN")),
    ("http-name", Setting(("--http-name",), None, check_names, "NAME,...",
                          "names that it is reached by, beside addresses and localhost")),
    ("statsd", Setting(("--statsd",), None, parse_address, "HOST:PORT",
                       "a StatsD server to send counts to, by UDP")),
    ("log-level", Setting(("--log-level",), "info", check_log_level, "LEVEL",
                          "debug, info, warning, error or critical")),
    ("log-output", Setting(("--log-output",), "-", check_file, "FILE",
                           "where to log to; - is stderr")),
))
FILE_SETTINGS = OrderedDict(list(PROXY_SETTINGS.items()) + list(PROCESS_SETTINGS.items()))
CONFIG = Setting(("--config",), None, check_file, "FILE",
                 "an ini file, or proxies as JSON; the command line wins over it")
ATTACHED = Setting(("--attached",), "no", check_yes_no, None,
                   "for what starts it: say ready on stdout, stop when stdin ends")
SETTINGS = OrderedDict([("config", CONFIG), *FILE_SETTINGS.items(), ("attached", ATTACHED)])
SERVE_SETTINGS = OrderedDict([
    ("config", CONFIG._replace(flags=("--config", "-config"))),
    ("http-host", FILE_SETTINGS["http-host"]._replace(flags=("--http-host", "--host", "-host"))),
    ("http-port", FILE_SETTINGS["http-port"]._replace(flags=("--http-port", "--port", "-port"),
                                                      default="8474")),
    ("seed", FILE_SETTINGS["seed"]._replace(flags=("--seed", "-seed")))]
    + [(name, SETTINGS[name]) for name in ("http-token", "http-name", "timeout", "statsd",
                                           "log-level", "log-output", "attached")])
DEMO_SETTINGS = OrderedDict((
    ("behavior", PROXY_SETTINGS["behavior"]._replace(default="20:delay")),
    ("seed", PROXY_SETTINGS["seed"]._replace(default="2",
                                             help="the same seed gives the same faults")),
    ("requests", Setting(("--requests",), "120", number_check(
        int, "a whole number from 10 to 1000", lambda count: 10 <= count <= 1000), "N", "how many to make")),
))
METAVARS = {bool: "YES|NO", int: "N", float: "NUMBER", str: "TEXT"}
EXAMPLES = """\
Every handler has the fields of a rule, too, like --handlers.error.match '^SELECT':
  match   a regular expression that a request must contain
  after   how many requests it leaves alone first
  times   on how many it acts at most
  per     request or connection: what the percent is of
  stream  both, upstream or downstream: what it sees

examples:
  vaurien --local localhost:8000 --distant google.com:80 --behavior 20:delay
  vaurien --local localhost:8000 --distant google.com:80 \\
          --behavior 20:delay,5:error --handlers.delay.sleep 2
  vaurien --config vaurien.ini
  vaurien serve                  for Toxiproxy's clients: proxies made through its API
  vaurien demo                   see it at work, with nothing else installed
  vaurien demo --help"""


class SourcedText:
    """A text of the user's, and where it was found, for the complaint."""

    def __init__(self, where, text):
        self.where, self.text = where, text

    def check(self, check, *names):
        """What check makes of names and the text. Raises ValueError, and says where."""
        try:
            return check(*names, self.text)
        except ValueError as problem:
            raise ValueError("%s %s" % (self.where, problem)) from None


class Parser(argparse.ArgumentParser):
    """An argument parser that complains in one line, and keeps texts as they are."""

    def __init__(self, settings, **words):
        super().__init__(allow_abbrev=False, argument_default=argparse.SUPPRESS,
                         conflict_handler="resolve",
                         formatter_class=argparse.RawDescriptionHelpFormatter, **words)
        self.add_argument("--version", action="version", version="vaurien " + __version__)
        for name, setting in settings.items():
            usual = "" if setting.default is None else " (%s)" % setting.default
            if setting.metavar:
                self.add_argument(*setting.flags, dest=name, metavar=setting.metavar,
                                  help=setting.help + usual)
            else:
                self.add_argument(*setting.flags, dest=name, help=setting.help,
                                  action="store_const", const="yes")

    def error(self, message):
        raise ValueError("%s (see %s --help)" % (message, self.prog))

    def add_handlers(self, helps):
        """A group for each handler, an argument for each of its options; helps: with its help."""
        for name, function in HANDLERS.items():
            words = option_help(function) if helps else {}
            group = self.add_argument_group(name, helps and summary(function).replace("%", "%%"))
            for option, default in handler_options(function).items():
                usual = format_value(default)
                group.add_argument(*option_flags(name, option), dest="%s.%s" % (name, option),
                                   metavar=METAVARS[type(default)],
                                   help=("%s (%s)" % (words.get(option, ""), usual))
                                   .replace("%", "%%"))
            for field in OPTION_FIELDS:         # as in the epilog: the same for each of them
                group.add_argument(*option_flags(name, field), dest="%s.%s" % (name, field),
                                   help=argparse.SUPPRESS)


OPTION_FIELDS = [field for field in RULE_FIELDS if field != "percent"]


def check_handler_option(name, option, text):
    """As `check_option`; a field of the rule, that stays as it is given, is one too."""
    if option in OPTION_FIELDS:
        RULE_FIELDS[option].check(text)
        return text
    return check_option(name, option, text)


def option_flags(name, option):
    """The spellings of a handler's option, of version 0.1 and of 1.x."""
    return ["--handlers.%s.%s" % (name, option), "--behavior-%s-%s" % (name, option)] + [
        "--behavior-%s-%s" % (name, option.replace("_", "-"))] * ("_" in option)


# What the command line gives, {setting: Given}; the sections of the file, {proxy: {setting:
# Given}}; the handlers' options of both, {(handler, option): Given}; the file's toxics,
# [(Toxic, the name of its proxy as Given, or None)]; the file's text as Given, if it is JSON.
ParsedConfig = namedtuple("ParsedConfig", "given sections options toxics json")


def read_arguments(argv, settings, description=None, **words):
    """Read the command line, and the ini file that it names. Raises ValueError.

    Handlers of the user's are imported first, so that the parser knows their options.
    Returns what was Found.
    """
    first = vars(Parser(settings, add_help=False, prog=words.get("prog"))
                 .parse_known_args(argv)[0])
    given = {name: SourcedText(settings[name].flags[0], text) for name, text in first.items()}
    sections, options, toxics, entries = {}, {}, [], None
    if "config" in given:
        path = given["config"].check(check_file)
        text = read_file(path)
        if re.match(r"\s*(\{|\[\s*[]{])", text):        # no section of an ini file begins so
            entries = SourcedText("cannot read %s:" % path, text)
        else:
            sections, options, toxics = read_ini(path, text)
    known = ChainMap(settings, FILE_SETTINGS)
    for section in [given, *sections.values()]:
        for name, text in section.items():      # those that others win over, too
            text.check(find_handlers if name == "behavior" else known[name].check)
    helps = "-h" in argv or "--help" in argv        # or else no text is made for it
    parser = Parser(settings, description=helps and description and description(), **words)
    parser.add_handlers(helps)
    for name, text in vars(parser.parse_args(argv)).items():
        handler_name, _, option = name.rpartition(".")
        if handler_name:
            options[handler_name, option] = SourcedText(option_flags(handler_name, option)[0], text)
    return ParsedConfig(given, sections, options, toxics, entries)


def read_file(path):
    try:
        with open(path, encoding="utf-8-sig") as file:
            return file.read()
    except (OSError, ValueError) as problem:
        words = getattr(problem, "strerror", None) or " ".join(str(problem).split())
        raise ValueError("cannot read %s: %s" % (path, words)) from None


def read_ini(path, text):
    """Read an ini file, and import the handlers it names: as `read_arguments` returns it.

    Raises ValueError, in one line, for anything that is not understood.
    """
    # No section holds defaults for others, and ${NAME} is the environment's.
    parser = configparser.ConfigParser(interpolation=None, default_section="")
    parser.optionxform = str  # type: ignore    # keys as they are written
    try:
        parser.read_string(text, path)
    except (ValueError, configparser.Error) as problem:
        raise ValueError("cannot read %s: %s" % (path, " ".join(str(problem).split()))) from None
    sections, options, toxics = OrderedDict(), OrderedDict(), OrderedDict()
    for title in parser.sections():
        where = "%s: [%s]" % (path, title)
        given = {key: SourcedText("%s %s" % (where, key), text) for key, text in parser.items(title)}
        for text in given.values():
            text.text = text.check(expand_env)
        kind, _, name = (word.strip() for word in title.partition(":"))
        SourcedText("%s: the name of a section" % path, title).check(check_name)
        if title.strip() == "vaurien":
            set_once(sections, "vaurien", where, settings_by_name(given, FILE_SETTINGS))
        elif kind == "proxy" and name:
            set_once(sections, name, where, settings_by_name(given, PROXY_SETTINGS))
        elif kind in ("handler", "behavior") and name:
            if "callable" in given:
                given.pop("callable").check(load_handler, name)
            SourcedText(where, name).check(find_handler)
            for option, text in given.items():
                text.check(check_handler_option, name, option)
                set_once(options, (name, option), text.where, text)
        elif kind == "toxic" and name:
            set_once(toxics, name, where, given)
        else:
            raise ValueError("%s is not a section: they are [vaurien], [proxy:NAME], "
                             "[handler:NAME] and [toxic:NAME]" % where)
    return sections, options, [read_ini_toxic("%s: [toxic:%s]" % (path, name), name, given)
                               for name, given in toxics.items()]


def read_ini_toxic(where, name, given):
    """(Toxic, the Given name of its proxy or None) of a section. Raises ValueError."""
    place = given.pop("proxy", None)
    kind = given.pop("type", SourcedText(where + " type", ""))
    kind.check(find_handler)
    toxicity, fields, attributes = 1.0, {}, {}
    for key, text in given.items():
        if key == "toxicity":
            toxicity = text.check(check_toxicity)
        elif key in RULE_FIELDS:
            fields[key] = text.check(RULE_FIELDS[key].check)
        else:
            attributes[key] = text.check(check_option, kind.text, key)
    if "percent" in fields:
        if "toxicity" in given:
            raise ValueError("%s percent and toxicity say the same: give one of them" % where)
        toxicity = fields.pop("percent") / 100
    for _, words in check_fields(kind.text, HANDLERS[kind.text], fields):
        raise ValueError("%s %s" % (where, words))
    return Toxic(kind.text, name, toxicity, attributes, **fields), place


def expand_env(text):
    """Put environment variables in the place of ${NAME}. Raises ValueError."""
    def value(match):
        if match.group(1) not in os.environ:
            raise ValueError("needs ${%s}, which is not set in the environment" % match.group(1))
        return os.environ[match.group(1)]
    if "${" in re.sub(r"\$\{[^}]*\}", "", text):
        raise ValueError("has a ${ without its }: %r" % text)
    return re.sub(r"\$\{([^}]*)\}", value, text)


def settings_by_name(given, settings):
    """{setting: Given} of {key: Given}; a key is a flag without its dashes. Raises ValueError."""
    keys = {flag.lstrip("-"): name for name in settings for flag in settings[name].flags}
    found = {}
    for key, text in given.items():
        if key.replace("_", "-") not in keys:
            raise ValueError("%s is not a setting: here are %s" % (text.where, ", ".join(keys)))
        set_once(found, keys[key.replace("_", "-")], text.where, text)
    return found


def set_once(table, key, where, value):
    """Refuse, with a ValueError, to be told a thing twice."""
    if key in table:
        raise ValueError("%s says again what is said before" % where)
    table[key] = value


def find_handler(name):
    """Import a handler that is given by its dotted path. Raises ValueError."""
    if name not in HANDLERS and "." in name:
        load_handler(name, name)
    if name not in HANDLERS:
        raise ValueError("names the unknown handler %r: one of %s, or a path.to.callable"
                         % (name, ", ".join(sorted(HANDLERS))))


def find_handlers(behavior):
    for _, name in parse_behavior(behavior):
        find_handler(name)


def resolve_settings(given, settings):
    """The checked values of settings, their defaults where nothing was given."""
    found = {}
    for name, setting in settings.items():
        usual = SourcedText(setting.flags[0], setting.default)
        text = given.get(name, usual)
        found[name] = None if text.text is None else text.check(setting.check)
    return found


def option_values(options):
    """The checked options of the handlers: {handler: {option: value}}."""
    found = {}
    for (name, option), given in options.items():
        found.setdefault(name, {})[option] = given.check(check_handler_option, name, option)
    return found


def make_proxies(found, needs_one=True):
    """The Proxies of what `read_arguments` has found, not open yet. Raises ValueError.

    Where there are [proxy:NAME] sections, [vaurien] is one more proxy only if it says
    where it listens or what it calls. Its seed and its timeout hold for all of them, and
    so does its behavior if it is not one more.
    """
    given, sections = found.given, dict(found.sections)
    own = sections.pop("vaurien", {})
    one_more = "local" in own or "distant" in own or (
        found.json and ("local" in given or "distant" in given)) or (
        needs_one and not sections and not found.json)
    for_all = {name: own[name] for name in ["seed", "timeout"] + ["behavior"] * (not one_more)
               if name in own}
    common = {name: given[name] for name in given if name not in ("local", "distant")}
    if len(sections) == 1 and not one_more:
        common = given
    elif not one_more and len(common) < len(given):
        raise ValueError("--local and --distant do not say which proxy of the file they are for: "
                         "there are %s" % ", ".join(sections))
    chosen = [("vaurien", ChainMap(given, own))] if one_more else []
    chosen += [(name, ChainMap(common, section, for_all)) for name, section in sections.items()]
    checked = option_values(found.options)
    usual = resolve_settings(ChainMap(given, own), PROXY_SETTINGS)
    proxies = ProxyTable(seed=usual["seed"], timeout=usual["timeout"])
    for name, texts in chosen:
        value = resolve_settings(texts, PROXY_SETTINGS)
        if value["seed"] is None:
            value["seed"] = proxies.seed
        try:
            proxies[name] = Proxy(name=name, options=checked, **value)
        except ValueError as problem:
            raise ValueError(problem if name == "vaurien" else "[proxy:%s] %s" % (
                name, problem)) from None
    try:
        for proxy, _ in read_proxies(found.json.text, proxies) if found.json else ():
            set_once(proxies, proxy.name, "%s %s" % (found.json.where, proxy.name), proxy)
    except ToxiproxyError as problem:
        words = re.sub("^bad request body: ", "", problem.message)
        raise ValueError("%s %s" % (found.json.where, words)) from None
    attach_toxics(proxies, found.toxics)
    return proxies


def attach_toxics(proxies, toxics):
    """Give each toxic of the file to its proxy. Raises ValueError."""
    for toxic, place in toxics:
        if place is None and len(proxies) != 1:
            raise ValueError("[toxic:%s] must say proxy = one of %s" % (
                toxic.name, ", ".join(proxies) or "those that are there: there is none"))
        if place is not None and place.text not in proxies:
            raise ValueError("%s must be one of %s, not %r" % (
                place.where, ", ".join(proxies) or "those that are there (there is none)",
                place.text))
        proxy = proxies[place.text if place else next(iter(proxies))]
        proxy.toxics.append(toxic)
        try:
            proxy.arm(proxy.behaviors, proxy.toxics)
        except ValueError as problem:
            raise ValueError("[toxic:%s] %s" % (toxic.name, problem)) from None


class Formatter(logging.Formatter):
    """One line is one event, whatever a peer has had written into it."""

    def formatMessage(self, record):
        record.message = escape_control_chars(record.message)
        return super().formatMessage(record)

    def formatException(self, exc_info):
        lines = super().formatException(exc_info).split("\n")
        return "\n".join("    " + escape_control_chars(line) for line in lines)


def escape_control_chars(text):
    """A text in one line, its other characters as they are written in Python."""
    return text if text.isprintable() else "".join(
        letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def start_log(level, output):
    """Log to a file, or to stderr. Raises ValueError."""
    try:
        handler = (logging.StreamHandler() if output == "-" else
                   logging.FileHandler(output, encoding="utf-8"))
    except OSError as problem:
        raise ValueError("cannot log to %s: %s" % (output, problem.strerror)) from None
    handler.setFormatter(Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.raiseExceptions = False     # a full disk ends the log, not the proxy
    log.addHandler(handler)
    log.setLevel(level)
    log.propagate = False


def fill_standard_descriptors():
    """Those of stdin, stdout and stderr that are closed are not for sockets to have."""
    number_check = 0
    while number_check <= 2:
        number_check = os.open(os.devnull, os.O_RDWR)
    os.close(number_check)


def is_main_thread():
    """Whether this one can catch signals."""
    return threading.current_thread() is threading.main_thread()


def serve(places, attached):
    """Run proxies, and their control, until SIGTERM or Ctrl-C.

    Raises OSError where one of them cannot listen; then nothing has been accepted.
    """
    raise_fd_limit()
    parent = os.getppid()               # asked before anybody is told that we are here
    loop = Loop()
    catches = is_main_thread()
    if catches:
        for number_check in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number_check, lambda *_: loop.stop())
        signal.set_wakeup_fd(loop.wakeup_send.fileno())   # Windows' select() sleeps through a signal
    try:
        for place in places:
            place.bind()
        for place in places:
            place.open(loop)
        gc.collect()
        if hasattr(gc, "freeze"):           # what is there stays: it need not be looked at again
            gc.freeze()
        if attached:
            print("ready", flush=True)
            with contextlib.suppress(OSError):      # nobody reads on: a handler's prints go to
                os.dup2(2, 1)                       # stderr, if there is one
            loop.run_in_thread(wait_for_stdin, lambda *_: loop.stop())
            watch_parent(loop, parent)
        loop.run()
    finally:
        for place in places:
            place.close()
        if catches:
            signal.set_wakeup_fd(-1)
        loop.close()
    return 0


def watch_parent(loop, parent):
    """Stop with the process that has started us, though a fork of it keeps our stdin open."""
    if os.getppid() == parent:
        loop.call_at(loop.clock() + 0.5, lambda: watch_parent(loop, parent))
    else:
        loop.stop()


def wait_for_stdin():
    """Return when stdin ends. Not through sys.stdin: its lock must be free when we exit."""
    while os.read(0, 4096):
        pass


def run(argv):
    """The main job: proxies, until they are told to stop. Returns it, to be done."""
    found = read_arguments(argv, SETTINGS, prog="vaurien", epilog=EXAMPLES,
                           description=program_description)
    given = found.given
    process = resolve_settings(ChainMap(given, found.sections.get("vaurien", {})), PROCESS_SETTINGS)
    own = found.sections.get("vaurien", {})
    for name in "http-host", "http-port", "http-token", "http-name":
        if (name in given or name in own) and not process["http"]:
            where = given[name] if name in given else own[name]
            raise ValueError("%s is for http, which is not given" % where.where)
    proxies = make_proxies(found)
    if not proxies and not process["http"]:
        raise ValueError("%s has no proxy in it, and without --http none can be made"
                         % given["config"].text)
    return prepare(proxies, process, "attached" in given)


def run_server(argv):
    """A server for Toxiproxy's clients: proxies come and go while it runs.

    It has the proxies of its file, be that Toxiproxy's JSON or an ini file of vaurien's,
    and those that are made through its API.
    """
    found = read_arguments(argv, SERVE_SETTINGS, prog="vaurien serve",
                           description=lambda: inspect.getdoc(run_server))
    given = found.given
    settings = OrderedDict((name, SERVE_SETTINGS.get(name, setting))
                           for name, setting in PROCESS_SETTINGS.items())
    process = resolve_settings(ChainMap(given, found.sections.get("vaurien", {})), settings)
    process["http"] = True
    return prepare(make_proxies(found, needs_one=False), process, "attached" in given)


def prepare(proxies, process, attached):
    """What is to be run, once all that was given is understood."""
    places = [proxies]
    if process["http"]:
        places.append(Control((process["http-host"], process["http-port"]), proxies,
                              get_token(process["http-token"]), process["http-name"] or ()))
    if process["statsd"]:
        places.append(Statsd(process["statsd"], proxies))
    start_log(process["log-level"], process["log-output"])
    return lambda: serve(places, attached)


def program_description():
    """The first paragraphs of the module's docstring; empty under -OO."""
    return (__doc__ or "").partition("\n\n    ")[0]


# The demo: a backend, a proxy and clients in one process.

DEMO_BODY = b"Hello from the backend of the demo.\n" * 8
DEMO_SECONDS = 1.5                    # seconds over which the demo's requests begin
DEMO_TIMEOUT = 3.0                   # seconds a client of the demo waits for an answer


def demo(argv):
    """See it at work: an embedded HTTP backend, the proxy in front of it, a histogram."""
    found = read_arguments(argv, DEMO_SETTINGS, prog="vaurien demo",
                           description=lambda: demo.__doc__)
    value = resolve_settings(found.given, DEMO_SETTINGS)
    return lambda: show_demo(value, option_values(found.options))


def show_demo(value, options):
    if is_main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    backend = start_backend()
    try:
        with Proxy(backend.server_address, behavior=value["behavior"], seed=value["seed"],
                   options=options) as proxy:
            print("A backend on %s, and vaurien in front of it on 127.0.0.1:%d:\n"
                  "%s; seed %s.\n%d requests:\n"
                  % (format_address(backend.server_address), proxy.port, proxy.describe(),
                     proxy.seed, value["requests"]), flush=True)
            outcomes = make_requests(proxy.port, value["requests"])
            met = match_events(outcomes, proxy.events)
    finally:
        backend.shutdown()
        backend.server_close()
    print("\n".join([*draw_histogram(outcomes), "", *summarize(outcomes, met)]))
    return 0


def start_backend():
    """An HTTP server in a thread of its own, that answers everything with ANSWER."""
    import http.server
    import socketserver

    class Backend(socketserver.ThreadingMixIn, socketserver.TCPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, request, client_address):
            pass            # a client that is cut off is what the demo shows

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(DEMO_BODY)))
            self.end_headers()
            self.wfile.write(DEMO_BODY)

        def log_message(self, *args):
            pass

    backend = Backend(("127.0.0.1", 0), Handler)
    threading.Thread(target=backend.serve_forever, args=(0.05,), daemon=True).start()
    return backend


# client: its address; began: when, as time.time() has it; words: how it failed, or "".
Outcome = namedtuple("Outcome", "client began seconds words")


def make_request(port):
    """One GET on a connection of its own."""
    import http.client
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEMO_TIMEOUT)
    client, words, start = "", "", time.time()
    began = time.monotonic()
    try:
        connection.connect()
        client = format_address(connection.sock.getsockname())
        connection.request("GET", "/")
        response = connection.getresponse()
        if response.read() != DEMO_BODY or response.status != 200:
            words = "a wrong answer"
    except socket.timeout:
        words = "no answer in %g s" % DEMO_TIMEOUT
    except (ConnectionError, http.client.IncompleteRead):
        words = "connection closed"
    except (http.client.HTTPException, ValueError):
        words = "a wrong answer"
    except OSError as problem:          # no descriptors
        words = problem.strerror or "no connection"
    finally:
        connection.close()
    return Outcome(client, start, time.monotonic() - began, words)


def match_events(outcomes, events):
    """{outcome: handler} of those that met a fault: a port may be a client's again later."""
    return {outcome: event.handler for outcome in outcomes for event in events
            if event.client == outcome.client
            and outcome.began <= event.time <= outcome.began + outcome.seconds}


def make_requests(port, number_check):
    """Make the requests, evenly spread, with a progress bar where somebody looks."""
    looks = sys.stderr is not None and sys.stderr.isatty()
    outcomes = []
    threads = [threading.Thread(target=lambda: outcomes.append(make_request(port)), daemon=True)
               for _ in range(number_check)]
    began = time.monotonic()
    try:
        for started, thread in enumerate(threads):
            time.sleep(max(0, began + started * DEMO_SECONDS / number_check - time.monotonic()))
            thread.start()
            if looks:
                show_progress(len(outcomes), number_check)
        for thread in threads:
            while thread.is_alive():
                thread.join(0.05)
                if looks:
                    show_progress(len(outcomes), number_check)
    finally:
        if looks:
            sys.stderr.write("\r%60s\r" % "")
    return outcomes


def show_progress(done, number_check):
    sys.stderr.write("\r[%-40s] %d/%d" % ("#" * (40 * done // number_check), done, number_check))
    sys.stderr.flush()


def draw_histogram(outcomes):
    """Lines: how many requests were answered in what time, how many failed and how."""
    steps = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, math.inf]
    names = ["under 1 ms", "1 - 2 ms", "2 - 5 ms", "5 - 10 ms", "10 - 20 ms", "20 - 50 ms",
             "50 - 100 ms", "100 - 200 ms", "200 - 500 ms", "0.5 - 1 s", "1 - 2 s", "2 - 5 s",
             "over 5 s"]
    answered = Counter(min(step for step in steps if outcome.seconds < step)
                       for outcome in outcomes if not outcome.words)
    rows = [(name, answered[step]) for name, step in zip(names, steps)
            if answered and min(answered) <= step <= max(answered)]
    rows += sorted(Counter(outcome.words for outcome in outcomes if outcome.words).items())
    widest = max(len(name) for name, _ in rows)
    scale = min(1.0, (70 - widest) / max(number_check for _, number_check in rows))
    lines = ["answered in"] if answered else []
    for name, number_check in rows:
        bar = "#" * max(number_check > 0, int(number_check * scale))
        lines.append("  %*s  %s %d" % (widest, name, bar, number_check) if number_check
                     else "  %*s" % (widest, name))
    return lines


def format_seconds(seconds):
    return "%.1f ms" % (seconds * 1000) if seconds < 0.1 else "%.2f s" % seconds


def median(numbers):
    return sorted(numbers)[len(numbers) // 2]


def summarize(outcomes, met):
    """What happened, in plain words: to those that met a fault, and to the others.

    met    {outcome: handler}
    """
    total = len(outcomes)
    calm = [outcome.seconds for outcome in outcomes
            if outcome not in met and not outcome.words]
    usual = median(calm) if calm else 0.0
    lines = []
    for name in sorted(set(met.values())):
        mine = [outcome for outcome in outcomes if met.get(outcome) == name]
        times = [outcome.seconds for outcome in mine if not outcome.words]
        failed = Counter(outcome.words for outcome in mine if outcome.words)
        ends = ["%d x %s" % (number_check, words) for words, number_check in sorted(failed.items())]
        if times and calm and not failed:
            lines.append("%d of %d requests were delayed (%s), by %s at the median."
                         % (len(mine), total, name, format_seconds(max(0, median(times) - usual))))
            continue
        if times:
            ends.append("%d x answered, in %s at the median" % (len(times),
                                                                format_seconds(median(times))))
        lines.append("%d of %d requests met %s: %s." % (len(mine), total, name, ", ".join(ends)))
    if calm:
        lines.append("%s %d were answered in %s at the median."
                     % ("The other" if met else "All", len(calm), format_seconds(usual)))
    odd = [outcome for outcome in outcomes if outcome.words and outcome not in met]
    if odd:
        lines.append("%d failed without a fault: %s." % (len(odd), odd[0].words))
    return lines


# vaurienctl: what Client does, by hand.

CTL_EXAMPLES = """\
examples:
  vaurienctl list-handlers
  vaurienctl get-handler
  vaurienctl set-handler blackout
  vaurienctl set-handler delay sleep=2 percent=20
  vaurienctl events
  vaurienctl connections
  vaurienctl backend
  vaurienctl backend localhost:6379"""


def ctl_set(client, name, *fields):
    """Options and fields as NAME=VALUE; the server knows their types."""
    client.ask("PUT", "/behavior", dict([field.split("=", 1) for field in fields], name=name))
    return "Handler changed to \"%s\"" % name


def ctl_backend(client, backend=None):
    if backend:
        client.set_backend(backend)
    return client.get_backend()


CTL = OrderedDict((
    ("list-handlers", lambda client: ", ".join(client.list_handlers())),
    ("get-handler", Client.get_handler), ("set-handler", ctl_set),
    ("list-behaviors", lambda client: ", ".join(client.list_behaviors())),
    ("get-behavior", Client.get_behavior), ("set-behavior", ctl_set),
    ("events", lambda client: "\n".join(map(json.dumps, client.events()))),
    ("connections", lambda client: "\n".join(map(json.dumps, client.connections()))),
    ("backend", ctl_backend)))


def ctl(argv):
    """Drive a proxy that was started with --http."""
    parser = Parser({}, prog="vaurienctl", description=ctl.__doc__, epilog=CTL_EXAMPLES)
    parser.add_argument("action", choices=list(CTL), metavar="ACTION", help=", ".join(CTL))
    parser.add_argument("words", nargs="*", metavar="WORD", default=[],
                        help="a handler, and what is to be set")
    parser.add_argument("--host", default="http://localhost:8080", metavar="URL",
                        help="where the proxy is driven from (http://localhost:8080)")
    parser.add_argument("--http-token", metavar="TOKEN",
                        help="the proxy's; $%s if not given" % TOKEN_VARIABLE)
    parser.add_argument("--proxy", metavar="NAME", default=None,
                        help="which proxy, if there are several (the first)")
    said, rest = parser.parse_known_args(argv)      # words may stand behind options, too
    for word in rest:
        if word.startswith("-"):
            parser.error("unrecognized arguments: %s" % word)
    said.words += rest
    host, port, scheme = SourcedText("--host", said.host).check(parse_host)
    client = Client(host, port, scheme, said.proxy, get_token(vars(said).get("http_token")))
    action = CTL[said.action]
    try:
        inspect.signature(action).bind(client, *said.words)  # type: ignore
        names = [word.partition("=")[0] for word in said.words[1:]]
        for word, name in zip(said.words[1:], names):
            if "=" not in word or name == "name" or names.count(name) > 1:
                raise TypeError("%r must be NAME=VALUE, each name once" % word)
    except TypeError as problem:
        raise ValueError("%s: %s (see vaurienctl --help)" % (said.action, problem)) from None
    return lambda: ctl_do(action, client, said.words)


def ctl_do(action, client, words):
    try:
        answer = action(client, *words)
    except ValueError as problem:
        return print_error(problem, 1)
    except (KeyError, TypeError):
        return print_error("%s is no vaurien" % format_address((client.host, client.port)), 1)
    except OSError as problem:
        return print_error("no answer from %s: %s" % (format_address((client.host, client.port)),
                                                   problem.strerror or problem), 1)
    if answer:
        print_safe(answer, sys.stdout)
    return 0


def parse_host(text):
    """Read SCHEME://HOST:PORT, the scheme and the port may lack, into Client's arguments."""
    scheme, _, rest = text.rpartition("://")
    rest = rest.rstrip("/")
    if not re.search(r":\d+$", rest):
        rest += ":8080"
    host, port = parse_address(rest)
    if scheme not in ("", "http", "https"):
        raise ValueError("must be http://HOST:PORT, not %r" % text)
    return host or "localhost", port, scheme or "http"


# From its words to what is to be done.
COMMANDS = {"serve": run_server, "demo": demo, "ctl": ctl}


def main(argv=None):
    """The command line. Returns the exit status: 0, 1 for the network, 2 for bad input."""
    fill_standard_descriptors()
    argv = sys.argv[1:] if argv is None else list(argv)
    attached = "--attached" in argv
    try:
        command = COMMANDS[argv.pop(0)] if argv and argv[0] in COMMANDS else run
        try:
            job = command(argv)
        except ValueError as problem:
            return print_error(problem, 2, attached)
        return job()
    except KeyboardInterrupt:
        return 0
    except BrokenPipeError:             # nobody reads what we say: say no more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as problem:
        return print_error(problem.strerror or problem, 1, attached)


def print_error(problem, status, attached=False):
    """Say it in one line; to what has started us, too."""
    words = escape_control_chars(" ".join(str(problem).split()))
    print_safe("vaurien: %s" % words, sys.stderr)
    if attached:
        print_safe(words, sys.stdout)
    return status


def print_safe(text, file):
    """Print a text, whatever the file's encoding has no letters for."""
    if file is None:                    # it is closed
        return
    encoding = getattr(file, "encoding", None) or "ascii"
    print(text.encode(encoding, "backslashreplace").decode(encoding), file=file, flush=True)


def main_ctl():
    """The command vaurienctl."""
    return main(["ctl", *sys.argv[1:]])


# `from vaurien.handlers import BaseHandler` works although this is one module, under
# whatever name it was imported.
handlers = types.ModuleType(__name__ + ".handlers", "The class form of a handler.")
handlers.BaseHandler = BaseHandler      # type: ignore
sys.modules[handlers.__name__] = handlers


if __name__ == "__main__":
    # A user's handler that imports vaurien gets this module, not a second one.
    sys.modules.setdefault("vaurien", sys.modules["__main__"])
    sys.modules.setdefault("vaurien.handlers", handlers)
    sys.exit(main())
