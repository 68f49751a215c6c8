#!/usr/bin/env python3
"""Vaurien, the chaos TCP proxy.

Vaurien sits between an application and a backend (MySQL, PostgreSQL, Redis, memcached, an HTTP
API) and misbehaves on purpose. A test through Vaurien shows whether the application survives a
restart of the database, a cache that is down, and replies that are slow, cut, reset or wrong.

    python3 vaurien.py demo
    python3 vaurien.py --local localhost:8000 --distant google.com:80 \\
                       --behavior 20:delay,5:error
    python3 vaurien.py --help

This file needs only the standard library of Python 3.6 or newer.

The path of a chunk (the bytes that one recv has returned):

                     one Connection
                     +-----------------------------------------------------------+
    client socket    |  chain: (now, UPSTREAM, data) -> events                   |   backend socket
       recv -------->|  up:    chain -> delay queue ... until due ... send ----->|   send
       send <--------|  down:  send <- ... delay queue <- chain <- recv <--------|<- recv
                     +-----------------------------------------------------------+
    Loop: wakes for ready sockets, for the next due chunk, and for calls of other threads

A handler is a function that receives one event, which includes the time, and yields the events
that take the place of this event. A handler never blocks, reads no clock and uses no socket. Only
a "blocking handler" may block: a class, as in Vaurien 0.1, that runs in a thread of its own.

Each section uses only the sections above it. `grep -n '^# -- ' vaurien.py` lists the sections:

    vocabulary    Events, Checks
    extend here   Handlers, Options, Protocols
    engine        Rules, Chain, Delay queue, Loop, Sockets, Certificates, TLS,
                  Connection
    service       Log, Proxy, Metrics, Page, Control, Toxiproxy, Interface, pytest
    programs      Command line, Demo, vaurienctl, Main

Glossary:

    client, backend        the program that connects to Vaurien, and the server behind Vaurien
    upstream, downstream   towards the backend, towards the client
    event                  (t, to, data): the due time, the direction, and bytes or a signal
    exchange               a request and its reply
    boundary               a position in a stream where a request or reply begins or ends
    head                   the first bytes of a request or reply, which tell its kind and length
    row                    a part of a reply: a row, an element of an array, a chunk or an event
    framer                 finds the boundaries in one direction of a connection

    rule                   a handler with options, and the fields that say when it acts
    behavior               rules of a proxy that share one draw: at most one of them acts
    toxic                  a rule of a proxy with a name and a draw of its own
    toxicity               the probability that a toxic acts, from 0 to 1
    block                  the rules that a test sets for the body of a `with` statement
    installed rule         a rule that a proxy uses now. A block may replace the behavior
    draw                   the random number that decides whether a rule acts. The seed determines
                           all draws
    window                 a period in which a rule acts, given by `start` and `duration`
    sleep                  a rule sleeps outside of its windows: the rule does not act
    wake                   a rule wakes when a window begins, or when the percentage rises
    ramp                   the beginning of a window, while the percentage rises from 0
    ttl                    the time to live, after which a rule is removed
    schedule               the windows of a rule, its ramp and its ttl
    Accept                 how a proxy treats new clients: accept, refuse or drop them, and when
    fault record           an entry of the log and the API: a rule has acted on a request, a window
                           of the rule has begun or ended, or its ttl has ended

    per-request rule       a rule that is drawn for each request: the field `per` is "request"
    per-connection rule    a rule that is drawn once for each connection
    active rule            a rule drawn for one request or connection, with its state
    delays                 which rules have delayed an event, and by how many seconds: a tuple of
                           (rule, seconds, from_open), see Chain.process
    chain                  the active rules of a connection, in order
    delay queue            the bytes of one direction, each chunk with its due time
    link                   a delay queue with its two sockets: the source and the target
    budget                 the limit for the bytes in all delay queues of a loop together
    fast path              recv and send in one callback
    slow path              from recv through the chain and the delay queue to send

To add

    a handler      a function with @handler in the section Handlers
    a protocol     a class with @protocol in the section Protocols
    a route        a function with @route in the section Control
    a setting      one line in SETTINGS, in the section Command line
    a rule field   one line in RULE_FIELDS, in the section Options, and code for its meaning in
                   Rule or Chain

PYTEST_DONT_REWRITE: pytest loads this file as a plugin, but must not rewrite its assertions.
"""
import argparse
import atexit
import contextlib
import errno
import functools
import gc
import heapq
import importlib
import itertools
import logging
import math
import os
import random
import re
import select
import selectors
import signal
import socket
import stat
import struct
import sys
import threading
import time
import types
import warnings
from collections import ChainMap, Counter, OrderedDict, deque, namedtuple
from selectors import EVENT_READ, EVENT_WRITE

MYPY = False                    # type checkers assume True. Importing `typing` would take time
if MYPY:
    from typing import Any, Callable, ContextManager, Dict, Iterable, Iterator  # noqa: I001
    from typing import List, NamedTuple, Optional, Sequence, Tuple, TypeVar, Union
    from typing import Counter as CounterOf
    Function = TypeVar("Function", bound=Callable[..., Any])
    Handler = Union[str, Callable[..., Any]]
    OptionValue = Union[bool, int, float, str]
    Address = Union[str, Tuple[str, int]]
    Behavior = Union[str, Dict[Handler, float], Sequence[Tuple[float, Handler]],
                     Sequence[Dict[str, Any]]]

try:
    import fcntl
except ImportError:             # Windows has no fcntl
    fcntl = None                # type: ignore[assignment]


class LazyModule:
    """A module that is imported on first use, because each import slows down the start."""

    def __init__(self, name):
        self.name = name

    def __getattr__(self, attribute):
        return getattr(importlib.import_module(self.name), attribute)


(array, asyncio, base64, configparser, difflib, hashlib, hmac, http_client, http_server, inspect,
 ipaddress, json, secrets, shlex, ssl, subprocess, tempfile, textwrap, urls) = map(
    LazyModule, ["array", "asyncio", "base64", "configparser", "difflib", "hashlib", "hmac",
                 "http.client", "http.server", "inspect", "ipaddress", "json", "secrets", "shlex",
                 "ssl", "subprocess", "tempfile", "textwrap", "urllib.parse"])

__version__ = "3.0.0"

# The public names. Names that are not in this list may change in any version.
__all__ = [     # noqa: RUF022
    "Proxy", "Client", "Fault", "FaultRecord", "start_proxy", "stop_proxy",     # tests
    "handler", "BaseHandler", "rate_limited", "only_direction", "changes_replies",  # handlers
    "UPSTREAM", "DOWNSTREAM", "NEVER", "OPEN", "EOF", "RESET", "END_OF_MESSAGE", "END_OF_ROW",
    "Signal",
    "main", "main_ctl",
]

log = logging.getLogger("vaurien")

LINUX = sys.platform.startswith("linux")

# Sizes, in bytes
CHUNK = 256 * 1024              # the largest recv. In benchmarks, a larger recv is not faster
PARSED_CHUNK = 8 * 1024         # the largest recv that a protocol parses, in 50 ms at most
HELD_MAX = 16 * 1024 * 1024     # limit of a delay queue while a rule delays bytes: 16 ms at 1 GB/s
HELD_MAX_IDLE = 256 * 1024      # limit of a delay queue while no rule delays bytes
HELD_TOTAL = 512 * 1024 * 1024  # the most bytes in all delay queues of a loop together
HELD_MIN = 4 * 1024             # each delay queue may hold this many bytes, even above HELD_TOTAL
HELD_LOW = HELD_MIN // 2        # a delay queue with at most this many bytes is never full
JOINED_MAX = 64 * 1024          # late chunks are joined up to about this size
READ_MIN = 16 * 1024            # the least room in a delay queue for which the proxy calls recv
MATCH_MAX = 64 * 1024           # `match` searches this many bytes of a request, from its beginning
BEGINNING_MAX = 80              # a fault record shows this many bytes of a request
HEAD_MAX = 64 * 1024            # the longest head of a request or reply (nginx: 32 KiB)
CACHED_HEAD_MAX = 1024          # the longest HTTP head that a connection need not parse twice
BULK_READ = 64 * 1024           # the smallest recv that counts as bulk data
COPY_MAX = 8 * 1024             # the largest chunk that the proxy compares with a whole message
KERNEL_PIPE_SIZE = 1024 * 1024  # a pipe for splice: the largest that Linux permits (man 7 pipe)
SEGMENT = 1448                  # the data of a TCP segment on Ethernet, with time stamps
STATSD_PACKET_MAX = 1400        # the largest UDP packet to send. Networks fragment larger packets

# Memory, in bytes. The numbers in brackets are measurements on Python 3.6 and on 3.13
CHUNK_OVERHEAD = 400            # for a queued chunk, without its data (398, 336)
EXCHANGE_OVERHEAD = 450         # for an exchange that waits for its reply (433, 363)
ACTIVE_RULE_OVERHEAD = 4000     # for an active rule of a waiting exchange (at most 3,560)
KEPT_MIN = 8 * 1024             # requests of a connection that need less memory are not counted
EXPANSION = 1000                # for each byte of requests like b"PING\r\n", with an active rule
STATEMENTS_MAX = 1024 * 1024    # limit for a connection's prepared statements and for its portals
STATEMENT_OVERHEAD = 210        # for a prepared statement, without its text (210, 155)

# Counts
SPLICE_AFTER = 4                # a link uses splice after this many bulk reads
KERNEL_PIPES_POOLED = 16        # empty pipes that a loop keeps for later bulk data
BACKLOG = 4096                  # connections that wait for accept() (at most net.core.somaxconn)
ACCEPT_BURST = 64               # connections accepted before the loop serves other sockets
FILLERS_MAX = 16                # connections that fill the backlog of a listener in mode `drop`
SPARE_FDS = 8                   # free file descriptors that a listener needs to accept again
CONTROL_FDS = 32                # file descriptors reserved for the control server, at most
FDS_MIN = 32                    # `serve` does not start if the limit of file descriptors is lower
FAULT_RECORDS_KEPT = 10000      # newest fault records that each proxy keeps
LOG_LINES_MAX = 10000           # lines of the log that wait to be written, at most
RULE_CHANGES_KEPT = 1000        # newest changes of the rules that each proxy keeps
LATENCIES_KEPT = 1000           # newest replies whose latency each proxy keeps
GC_THRESHOLD = 100000           # new objects between two runs of Python's garbage collector

# Times, in seconds
FILL_TIMEOUT = 0.002            # limit for a connect that fills a backlog (usual time: 0.1 ms)
LINGER_TIMEOUT = 5.0            # time for a client to close after an error reply (as in nginx)
RETRY_DELAY = 1.0               # time until a new try after file descriptors ran out (as asyncio)
ACCEPT_TIMEOUT = 30.0           # time without free descriptors until waiting clients are reset
PRECISE_WAIT = 0.005            # when a timer is due in less, the loop uses a more precise wait
SELECT_OVERSHOOT = 0.00015      # select() returns later than requested by this time
MATCH_TIMEOUT = 0.1             # CPU time of the longest search for `match`
MAX_WAIT = 3600.0               # the longest wait of the selector. epoll permits 24 days
HEAD_TIMEOUT = 10.0             # the proxy holds an incomplete head of a request for this time
UNRECOGNIZED_MAX = 0.3          # time in which the first bytes of a client must show the protocol
RATE_BACKLOG = 0.1              # a link is slow if the data in its delay queue needs more time
LOG_CLOSE_TIMEOUT = 1.0         # time to write the last lines of the log at exit
SLOW_CALL = 0.5                 # the log warns if a call of a handler takes longer
WAIT_PAUSE = 0.01               # a thread that waits for a fault checks in these intervals
STATSD_INTERVAL = 1.0           # time between two reports to the StatsD server
LATENCY_AGE_MAX = 10.0          # the age of the oldest latency that the percentiles include


# -- Events -------------------------------------------------------------------
#
# An event is a tuple (t, to, data):
#
#   t       the time when the event is due, in seconds of the loop's clock
#   to      the direction: UPSTREAM or DOWNSTREAM
#   data    bytes, or a signal about the stream itself

UPSTREAM = "upstream"       # direction: towards the backend
DOWNSTREAM = "downstream"   # direction: towards the client
DIRECTIONS = (UPSTREAM, DOWNSTREAM)
NEVER = math.inf            # due time of an event that waits for the removal of its rule


class Signal(bytes):
    """The data of an event without bytes.

    A handler that only delays, counts or cuts bytes needs no code for signals, because a signal
    has the length 0, and each slice of a signal is the signal itself. A handler recognises a
    signal by its identity: `data is EOF`.
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

    # All signals have the bytes b"". So == compares the identity of signals, and not their bytes.
    __eq__, __ne__, __hash__ = object.__eq__, object.__ne__, object.__hash__


# A per-connection rule gets an OPEN for each direction when the client connects, when the rule
# begins to act, and when the options of the rule change. The proxy connects to the backend when
# the UPSTREAM OPEN of the new client is due.
OPEN = Signal("OPEN")
# The sender of this direction has closed or reset its socket, and sends no more bytes. After an
# EOF in both directions, the proxy closes the connection.
EOF = Signal("EOF")
RESET = Signal("RESET")     # the proxy drops all data and resets both sockets
# In a connection with a protocol, END_OF_MESSAGE follows each request and each reply. END_OF_ROW
# follows each row of a reply while an installed rule has the option `rows`.
END_OF_MESSAGE = END = Signal("END_OF_MESSAGE")     # END is an older name, for users' handlers
END_OF_ROW = Signal("END_OF_ROW")


# -- Checks -------------------------------------------------------------------
#
# A check is a function that parses one value of a user: a text or a JSON value. For an invalid
# value, a check raises ValueError with the end of a sentence: "must be ...". The caller puts the
# name of the option, key or field before this text.

INT64_MAX = 2 ** 63 - 1     # the largest number that Toxiproxy accepts (int64 in Go)
NAME_MAX = 255              # the most characters in the name of a proxy or toxic
TIME_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}    # {unit: seconds in a unit}
SECONDS_MIN, SECONDS_MAX = 0.001, 1e9   # the limits of a time. 0 is valid too
YES, NO = ("yes", "true", "on", "1"), ("no", "false", "off", "0")
TOKEN_VARIABLE = "VAURIEN_HTTP_TOKEN"   # the environment variable that replaces --http-token


class InputError(ValueError):
    """Invalid input of a user.

    errors    [(field, sentence)]: each invalid field, and a sentence that says what is wrong.
    """

    def __init__(self, errors):
        super().__init__("; ".join(sentence for _, sentence in errors))
        self.errors = errors


def check_field(name, check, *args):
    """Return check(*args). Raises InputError with "NAME must be ..." if the check fails."""
    try:
        return check(*args)
    except ValueError as error:
        raise InputError([(name, "%s %s" % (name, error))]) from None


def format_exception(exc):
    """Return "Type: message", or "Type" if the __str__ of a user's exception class fails."""
    try:
        return "%s: %s" % (type(exc).__name__, exc)
    except BaseException:
        return type(exc).__name__


def escape_control_chars(text):
    """Return the text with unprintable characters escaped, as in Python's repr."""
    if text.isprintable():      # the usual case, without a loop
        return text
    return "".join(char if char.isprintable() else ascii(char).strip("'") for char in text)


def printable(data):
    """Return the first bytes of a request as a short text, with control characters escaped."""
    return escape_control_chars(data.decode("utf-8", "backslashreplace"))[:BEGINNING_MAX]


def number_check(type_, expected, valid=lambda number: number >= 0):
    """Return a function check(value) that converts a number or a text to `type_`, int or float.

    expected    the description of a valid number, for the error: "a whole number, 0 or more".
    valid       a function that returns whether a number is valid. Numbers that are infinite or NaN
                are always invalid.
    """
    def check(value):
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            number = type_(value)
            if isinstance(value, str):
                # Python's int and float accept "1_0", and digits that are not ASCII.
                accepted = "_" not in value and max(value) < "\x80"
            else:                               # int(2.5) is rounded, and int(True) is 1
                accepted = number == value and not isinstance(value, bool)
            is_finite = -math.inf < number < math.inf   # math.isfinite(10 ** 400) raises
            if accepted and is_finite and valid(number):
                return number
        raise ValueError("must be %s, not %r" % (expected, value))
    return check


def did_you_mean(word, choices):
    """Return " (did you mean X?)" if one of the choices resembles an unknown word, otherwise "".

    word    the unknown word of a user: a text or a JSON value.
    """
    if not isinstance(word, str):
        return ""
    by_lower_case = {choice.lower(): choice for choice in choices}
    similar = difflib.get_close_matches(word.lower(), by_lower_case, n=1, cutoff=0.7)
    return " (did you mean %s?)" % by_lower_case[similar[0]] if similar else ""


def choice_check(*choices):
    """Return a function check(value) that accepts only the given texts."""
    def check(value):
        if value not in choices:
            raise ValueError("must be one of %s, not %r%s" % (
                ", ".join(choices), value, did_you_mean(value, choices)))
        return value
    check.choices = choices     # type: ignore    # for the page, which shows them as a list
    return check


def check_yes_no(value):
    """Convert a boolean, or a text that configparser accepts as a boolean, to a bool."""
    text = str(value).strip().lower()
    if text not in YES and text not in NO:
        raise ValueError("must be yes or no, not %r" % (value,))
    return text in YES


def check_text(value):
    """Convert a text or a whole number to text."""
    if isinstance(value, bool) or not isinstance(value, (str, int)):    # a bool is an int
        raise ValueError("must be text, not %r" % (value,))
    return str(value)


def check_file(text):
    """Check the path of a file. The file need not exist."""
    if not isinstance(text, str) or not text or "\0" in text:
        raise ValueError("must be the path of a file, not %r" % (text,))
    return text


def check_name(name):
    """Check the name of a proxy or a toxic. Names must be printable: the log contains them."""
    if len(name) > NAME_MAX or not name.isprintable():
        raise ValueError("must be at most %d printable characters, not %r"
                         % (NAME_MAX, name[:50]))
    return name


def check_token(text):
    """Check a bearer token (RFC 6750, 2.1). The error omits the token: tokens are secret."""
    if not re.fullmatch("[A-Za-z0-9._~+/-]+=*", text):
        raise ValueError("must consist of letters, digits and ._~+/- and may end in =")
    return text


check_count = number_check(int, "a whole number, 0 or more")
check_amount = number_check(float, "a number, 0 or more")
check_percent = number_check(float, "a number from 0 to 100", lambda value: 0 <= value <= 100)
check_port = number_check(int, "a port from 0 to 65535", lambda value: 0 <= value <= 65535)
check_toxicity = number_check(float, "a number from 0 to 1", lambda value: 0 <= value <= 1)
check_timeout = number_check(float, "a number of seconds, more than 0", lambda value: value > 0)


def check_reuse_port(value):
    """Check the N of --reuse-port N: this process is the Nth that listens on its port."""
    if not LINUX or not hasattr(socket, "SO_REUSEPORT"):
        raise ValueError("needs Linux, which spreads connections over the processes on a port")
    return number_check(int, "the number of this process, 1 or more", lambda n: n >= 1)(value)


def check_seconds(value):
    """Convert a number of seconds, or a text like "90s", "5m", "1h" or "500ms", to seconds."""
    number, unit = value, "s"
    match = isinstance(value, str) and re.fullmatch(r"(.*[0-9.])\s*(ms|s|m|h)\s*", value)
    if match:                                   # a text with a unit
        number, unit = match.groups()
    with contextlib.suppress(ValueError):       # the error below has examples
        seconds = check_amount(number) * TIME_UNITS[unit]
        if seconds == 0 or SECONDS_MIN <= seconds <= SECONDS_MAX:
            return seconds
    raise ValueError("must be 0, or a time from 1ms to 1e9s, like 90, 90s, 5m, 1h or 500ms, not %r"
                     % (value,))


def format_value(value):
    """Format an option's value as the command line accepts it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


# -- Handlers -----------------------------------------------------------------
#
# A handler is a generator function. A chain calls the handler with one event. The handler yields
# the events that take the place of this event: for example the same event at a later time, fewer
# or other bytes, an event in the other direction, or no event. The arguments:
#
#   state    the ActiveRule: the memory of the handler for one request or one connection. An
#            ActiveRule is a Counter: a key that was never set has the value 0. Attributes:
#              random            a random.Random that the seed determines.
#              request           the number of this request (or connection) at the proxy, counted
#                                from 1 since the rule was installed.
#              request_number    the number of the current request in its connection.
#              stream            the direction of the events that the handler receives: UPSTREAM,
#                                DOWNSTREAM or "both".
#              shared            a Counter that all states of this rule at this proxy share.
#              protocol          the Protocol of the connection, or None for tcp.
#              protocol_lost     True after the connection has fallen back to tcp.
#              current_request   the Request that the event belongs to. None without a protocol,
#                                and while the client connects.
#              received_at       the time when the proxy received the event.
#              draw              the random number that decided that the rule acts.
#              drawn_options     {option: value} for the fault record: options that the user left
#                                empty, with the values that the handler has drawn.
#   t        the due time of the event: `received_at` plus the delays by earlier rules. A handler
#            must not yield an event that is due before t.
#   to       UPSTREAM or DOWNSTREAM. To reply to the sender of the event, a handler yields an event
#            of the opposite direction.
#   data     bytes, or a signal: OPEN, EOF, END_OF_MESSAGE or END_OF_ROW. A handler may also yield
#            RESET.
#   *, ...   the options. The default of an option determines the type of the option: bool, int,
#            float or str. The docstring of the handler has a line of help for each option.
#
# A complete handler. The command line, ini files and the HTTP API accept lose and percent_lost:
#
#     @handler
#     def lose(state, t, to, data, *, percent_lost=10):
#         """A connection that loses chunks.
#
#         percent_lost    percentage of chunks that are lost
#         """
#         if not data or state.random.random() * 100 >= percent_lost:
#             yield t, to, data
#
# A user's handler is in a module of the user. The command line takes the dotted path of the
# handler, like my_module.lose. In a test, @vaurien.handler registers the handler.

HANDLERS = OrderedDict()        # {name: handler}


def handler(function: "Function") -> "Function":
    """Register a handler under the name of its function. Returns the function unchanged."""
    HANDLERS[function.__name__] = function
    return function


def with_attributes(**attributes: "Any") -> "Callable[[Function], Function]":
    """Return a decorator that sets attributes of a handler. All attributes are optional:

    option_checks       {option: check} for options that accept only some values (section Checks).
    held_max            the most bytes of one recv, for a handler with @rate_limited. The limit of
                        the delay queue is the same while the handler delays bytes by more than
                        RATE_BACKLOG. The default is HELD_MAX_IDLE.
    keeps_due_time      True: the handler stores in state[to] the earliest due time of the next
                        chunk. state[to] includes the delays by earlier rules. When an earlier rule
                        is removed, Chain.reset_due_times reduces state[to].
    on_dropped          a function (rule, to, size) to call when the proxy drops a chunk that the
                        handler has delayed.
    fixed_delay         for a handler that only delays: a function (options) that returns the
                        seconds by which all chunks are delayed, or 0 if chunks have no common
                        delay. Connection.delay adds it without a call of the handler.
    link_rate           for a handler with @rate_limited: a function (options) that returns (bytes
                        per second, the most bytes of a piece), or None. Connection.delay delays a
                        piece without a call of the handler: ActiveRule.transfer does the same as
                        the handler `bandwidth`.
    joins_chunks        True: chunks that the handler has yielded may be sent together if they are
                        due. This is done if all rules of a proxy permit this, and one of them has
                        a rate limit: only rate limits cut bytes into many chunks.
    """
    def decorate(function):
        for name, value in attributes.items():
            setattr(function, name, value)
        return function
    return decorate


def rate_limited(function: "Function") -> "Function":
    """Mark a handler that delays chunks like a slow link.

    The handler sets state[to] to the time when the slow link has sent all chunks so far. While
    state[to] is far in the future, DelayQueue.read_limit lets the proxy read little.
    """
    return with_attributes(rate_limited=True, keeps_due_time=True)(function)


def only_direction(
        choose: "Callable[[Dict[str, Any]], str]") -> "Callable[[Function], Function]":
    """Return a decorator for a handler that needs events of one direction only.

    choose    a function (options) that returns the direction, for a rule without the field stream
    """
    return with_attributes(choose_direction=choose)


def changes_replies(function: "Function") -> "Function":
    """Mark a handler of replies. A rule with the handler must not have stream="upstream"."""
    return with_attributes(changes_replies=True)(function)


@handler
def dummy(state, t, to, data):
    """A healthy backend: everything passes."""
    yield t, to, data


@handler
@with_attributes(keeps_due_time=True)
@only_direction(lambda options: UPSTREAM if options["before"] else DOWNSTREAM)
def delay(state, t, to, data, *, sleep=1.0, before=True):
    """A slow backend: each request, or its reply, is delayed.

    sleep    seconds to wait
    before   yes: delay connecting and the request; no: delay the first byte of the reply
    """
    if data is OPEN:            # the client connects, or the rule has new options
        state[to] = t + sleep
        state["delayed_request"] = 0    # the next bytes count as the first bytes of a request
    elif data and state["delayed_request"] != state.request_number:     # the first bytes
        state[to] = t + sleep
        state["delayed_request"] = state.request_number
    yield max(t, state[to]), to, data       # later bytes do not overtake the first bytes


@handler
@changes_replies
def error(state, t, to, data, *, inject=False, warmup=0, kind=""):
    """A broken backend: replies with random bytes or, with a protocol, with a real error.

    inject   yes: insert 100 random bytes into the middle of the valid reply
    warmup   number of requests of the proxy that pass before the first one fails
    kind     an error of the protocol, like 503, LOADING, 1213 or 57P01; default: one is drawn
    """
    if state.request <= warmup:
        yield t, to, data
    elif inject:                    # change the first chunk of the reply
        if data and to == DOWNSTREAM and state["failed_request"] != state.request_number:
            state["failed_request"] = state.request_number
            middle = len(data) // 2
            data = data[:middle] + random_bytes(state.random, 100) + data[middle:]
        yield t, to, data
    elif state.protocol_lost:       # a proxy with a protocol never sends random bytes
        yield t, to, data
    elif state.protocol:
        yield from state.protocol.reply_with_error(state, t, to, data, kind)
    elif to == UPSTREAM or not data:
        yield t, to, data
    elif state["failed_request"] != state.request_number:   # later chunks of the reply are dropped
        state["failed_request"] = state.request_number
        line_end = b"\r\n"          # for clients that wait for a whole line
        yield t, to, random_bytes(state.random, 998) + line_end


@handler
@changes_replies
def transient(state, t, to, data, *, agitate=1, inject=False, warmup=0, kind=""):
    """A backend that recovers: the first requests fail, later ones succeed.

    agitate  number of requests of the proxy that fail
    inject   yes: insert 100 random bytes into the middle of the valid reply
    warmup   number of requests of the proxy that pass before the first one fails
    kind     an error of the protocol, like 503, LOADING, 1213 or 57P01; default: one is drawn
    """
    # state["number"] is the number of this request, counted from 1 after the warmup.
    connecting = state.protocol and not state.current_request
    is_request_after_warmup = data and not connecting and state.request > warmup
    if is_request_after_warmup and not state["number"]:
        state.shared["last_number"] += 1
        state["number"] = state.shared["last_number"]
    if 1 <= state["number"] <= agitate:
        yield from error(state, t, to, data, inject=inject, kind=kind)
    else:
        yield t, to, data


@handler
def hang(state, t, to, data):
    """A stuck backend: requests are read but get no reply, and no byte is lost.

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
    else:                       # the reply begins, or the backend has closed without a reply
        yield from close_both(t)


@handler
@changes_replies
@only_direction(lambda options: DOWNSTREAM)
@with_attributes(option_checks={"how": choice_check("close", "reset", "hang")})
def cut(state, t, to, data, *, bytes=0, rows=0, how="close"):
    """A backend that dies while it replies: only the first part of each reply passes.

    bytes    number of bytes of the reply that pass, without the bytes of whole rows
    rows     with a protocol: number of whole rows that pass, like rows of a result, elements of
             an array (Redis), chunks or events of a text/event-stream (HTTP)
    how      close; reset (RST); or hang: the rest waits until the rule is removed
    """
    if state["request"] != state.request_number:        # the first event of a reply
        state.clear()
        state["request"] = state.request_number
    if data is END_OF_ROW:
        state["rows"] += 1
    in_whole_rows = state["rows"] < rows
    is_signal = not data
    if is_signal or in_whole_rows:
        yield t, to, data
        return
    allowed = max(0, bytes - state["passed"])   # state["passed"] does not count whole rows
    passing, rest = data[:allowed], data[allowed:]
    state["passed"] += len(passing)
    if passing:
        yield t, to, passing
    if rest and how == "hang":
        yield NEVER, to, rest
    elif rest and not state["cut"]:     # after the cut, bytes are dropped
        state["cut"] = 1
        if how == "reset":
            yield t, to, RESET
        else:
            yield from close_both(t)


# Many handlers below have the names of Toxiproxy's toxics, with the same options and units. By
# default, a toxic is drawn for each connection, and gets the downstream events. A rule of a
# behavior is drawn for each request, and gets the events of both directions.

HANDLERS["noop"] = dummy        # Toxiproxy's name


def pareto_deviation(rng):
    """Draw a number by Pareto's distribution, shifted to the mean 0.

    As in netem: a number with the shape 3 and the minimum 1, minus its mean 1.5, times 4 / 3.
    """
    return ((1 - rng.random()) ** (-1 / 3) - 1.5) * 4 / 3


def draw_lognormal(rng, mean, deviation):
    """Draw a number by the lognormal distribution with this mean and standard deviation."""
    if not mean:                # never divide by 0
        return 0
    log_variance = math.log1p((deviation / mean) ** 2)      # the variance of the logarithm
    return mean * math.exp(rng.gauss(0, 1) * math.sqrt(log_variance) - log_variance / 2)


# {distribution: a function (rng, mean, jitter) that draws a delay in milliseconds}. The formulas
# of pareto and paretonormal are from iproute2 (netem/pareto.c and netem/paretonormal.c).
DISTRIBUTIONS = OrderedDict((
    ("uniform", lambda rng, mean, jitter: mean + rng.uniform(-jitter, jitter)),
    ("normal", lambda rng, mean, jitter: rng.gauss(mean, jitter)),
    ("pareto", lambda rng, mean, jitter: mean + jitter * pareto_deviation(rng)),
    ("paretonormal", lambda rng, mean, jitter: mean + jitter * (
        rng.gauss(0, 1) / 4 + pareto_deviation(rng) * 3 / 4)),
    ("lognormal", draw_lognormal),
))


@handler
@with_attributes(
    option_checks={"distribution": choice_check(*DISTRIBUTIONS)},
    joins_chunks=True,
    fixed_delay=lambda options: 0 if options["jitter"] else max(0, options["latency"]) / 1000)
def latency(state, t, to, data, *, latency=0, jitter=0, distribution="uniform"):
    """A longer link: every chunk arrives later, at an unchanged data rate.

    latency       milliseconds added to each chunk
    jitter        the standard deviation of the latency in milliseconds; with uniform: the largest
                  deviation
    distribution  uniform, normal, pareto, paretonormal (as in netem) or lognormal
    """
    if data:
        milliseconds = latency
        if jitter:
            milliseconds = DISTRIBUTIONS[distribution](state.random, latency, jitter)
        t += max(0, milliseconds) / 1000
    yield t, to, data


def cancel_transfer(rule, to, size):
    """Give back the time that a shared link has reserved for `size` bytes: they are dropped."""
    rate = rule.options["rate"]
    if rule.options["shared"] and rate:
        rule.shared[to] -= size / (rate * 1000)


def piece_bytes(bytes_per_ms):
    """Return the most bytes of a piece of `bandwidth`, which sends the bytes evenly, in pieces.

    A piece is as long as one TCP segment. On a fast link a piece is longer, so that it takes
    10 ms, and on a slow link shorter, so that it takes 100 ms.
    """
    return int(max(10 * bytes_per_ms, min(SEGMENT, 100 * bytes_per_ms)))


def link_rate(options):
    """Return (bytes per second, the most bytes of a piece) of `bandwidth`.

    Returns None if the link is shared or has no rate: then only the handler can delay bytes.
    """
    bytes_per_ms = options["rate"]      # the same number as kilobytes per second
    if bytes_per_ms <= 0 or options["shared"]:
        return None
    return 1000 * bytes_per_ms, piece_bytes(bytes_per_ms)


@handler
@rate_limited
@with_attributes(on_dropped=cancel_transfer, held_max=READ_MIN, joins_chunks=True,
                 link_rate=link_rate)
def bandwidth(state, t, to, data, *, rate=0, shared=False):
    """A slower link: the data rate is limited, separately in each direction.

    rate     kilobytes (1000 bytes) per second; 0 lets nothing through
    shared   yes: one link for all connections of the proxy, first come, first served
    """
    # state[to] is the time when the link has sent all chunks of this connection so far.
    # state.shared[to] is the time when a shared link has sent all chunks of all connections. On a
    # shared link, the time for a chunk begins at `received_at` and not at t: other connections do
    # not wait while an earlier rule delays the chunk.
    if data is OPEN:            # the options may be new: forget the delay by the old options
        state[to] = t
    for piece in split_chunk(data, piece_bytes(rate)):
        if piece:
            seconds = len(piece) / (1000 * rate) if rate > 0 else NEVER
            state[to] = max(t, state[to]) + seconds
            if shared and t < NEVER:        # a chunk held by `hang` takes no time of the link
                state.shared[to] = max(state.received_at, state.shared[to]) + seconds
                state[to] = max(state[to], state.shared[to])
        yield max(t, state[to]), to, piece


@handler
@rate_limited
def slicer(state, t, to, data, *, average_size=0, size_variation=0, delay=0):
    """A link of small packets: every chunk is cut into pieces.

    average_size    bytes of a piece; 0 cuts nothing
    size_variation  bytes by which the size of a piece differs from average_size at most
    delay           microseconds after each piece
    """
    # state[to] is the earliest time of the next piece.
    if data is OPEN:            # the options may be new: forget the delay by the old options
        state[to] = t
    rng = state.random if size_variation else None
    for piece in split_chunk(data, average_size, size_variation, rng):
        due = max(t, state[to])
        yield due, to, piece
        if piece:
            state[to] = due + delay / 1000000


@handler
def slow_close(state, t, to, data, *, delay=0):
    """A slow close: the end of the stream arrives later.

    delay    milliseconds to wait
    """
    if data is EOF:
        t += delay / 1000
    yield t, to, data


@handler
def timeout(state, t, to, data, *, timeout=0):
    """A dead link: all bytes are lost, and after a time the connection is closed.

    The removal of the rule also closes the connection, because bytes are missing.

    timeout  milliseconds after the rule begins to act; 0 never closes
    """
    is_first = "began" not in state
    state.setdefault("began", t)
    # With new options, OPEN comes again. The EOFs yielded for the first OPEN were dropped then.
    if is_first or data is OPEN:
        close_at = state["began"] + timeout / 1000 if timeout > 0 else NEVER
        yield from close_both(close_at)     # the removal of the rule makes both EOFs due
    if not data:                # a signal. Bytes are dropped
        yield t, to, data


@handler
def reset_peer(state, t, to, data, *, timeout=0):
    """A broken connection: the first bytes, or the end of the stream, cause a reset (RST).

    timeout  milliseconds before the reset
    """
    if data is OPEN:
        yield t, to, data
    elif not state["reset"]:    # events after the RESET are dropped
        state["reset"] = 1
        yield t + timeout / 1000, to, RESET


@handler
def limit_data(state, t, to, data, *, bytes=0):
    """A link that breaks: a number of bytes pass, then the connection is closed.

    bytes    number of bytes, counted separately in each direction
    """
    if not data:
        yield t, to, data
        return
    passing = data[:max(0, bytes - state[to])]      # state[to] is the number of passed bytes
    state[to] += len(passing)
    yield t, to, passing        # may be b"", which the delay queue ignores
    if state[to] >= bytes:
        yield from close_both(t)


# Without an acknowledgement, TCP sends a segment again after the retransmission time-out (RTO). In
# Linux, the RTO is a round trip plus RTO_MIN seconds. Each further time-out of the segment doubles
# the RTO, up to RTO_MAX seconds.
RTO_MIN, RTO_MAX = 0.2, 120.0
RETRANSMISSIONS = 15    # of one segment, at most: the default of Linux (man 7 tcp, tcp_retries2)
BURST_MAX = 100         # limit for the mean number of segments that are lost in a row
CWND_MAX = 4144         # limit of the congestion window, in segments: 6 MiB (tcp_rmem in Linux)


# The network between a TcpSender and its receiver:
#
# rtt                the round trip (RTT), in seconds
# loss_rate          the share of the segments that are lost
# loss_after_loss    the probability that a segment is lost if the segment before was lost
# rng                a random.Random that draws the losses
TcpPath = namedtuple("TcpPath", "rtt loss_rate loss_after_loss rng")


class TcpSender:
    """The sender of one direction, in TCP with the congestion control of Reno (RFC 5681).

    The receiver acknowledges each segment. A segment is in flight until its acknowledgement comes,
    a round trip (RTT) after the segment. cwnd, the congestion window, is the most segments that
    may be in flight. Example: cwnd is 10, the RTT is 100 ms, and a chunk has 10 segments.

        0 ms      The sender sends all 10 segments. The network loses segment 4. Segments 1 to 3
                  are delivered. Segments 5 to 10 wait in the receiver, as TCP keeps the order.
        100 ms    Acknowledgements of segments 5 to 10 report the loss. The sender sends segment 4
                  again, and halves cwnd. Segments 4 to 10 are delivered, 100 ms late.

    Only the delays by losses are simulated: a segment that is not lost arrives without a delay.
    """

    def __init__(self):
        self.sent = 0.0             # the time when the last segment was sent
        self.in_flight = deque()    # the time of the acknowledgement of each segment in flight
        self.cwnd = 10.0            # in segments; the first value is that of RFC 6928
        self.ssthresh = math.inf    # slow start ends at this cwnd: see wait_to_send
        self.pending_loss = None    # a loss that must still reduce cwnd: "fast repair", "time-out"
        self.recovers_until = 0.0   # until this time, a fast repair does not reduce cwnd again
        self.last_lost = False      # whether the last segment was lost

    def send(self, t, path, behind, is_bulk):
        """Send a segment at t, or later if cwnd is full. Returns when the segment arrives.

        behind     the number of later segments of the same chunk
        is_bulk    whether more chunks are likely to follow soon
        """
        sent = self.wait_to_send(t)
        if not self.draw_loss(path):
            self.in_flight.append(sent + path.rtt)
            return sent
        delay, timed_out = self.draw_repair(path, behind, is_bulk)
        if sent >= self.recovers_until:     # the first loss since the last repair
            self.recovers_until = sent + delay
            self.pending_loss = "fast repair"
        if timed_out:
            self.pending_loss = "time-out"
        # A real sender reduces cwnd an RTT later. Here, a bulk transfer would then have 1.01 to
        # 1.12 of the throughput of Mathis' formula (packet_loss). If cwnd is reduced at once, the
        # transfer has 0.82 to 0.92 of this throughput. Linux has 0.82 to 0.94.
        if is_bulk:
            self.reduce_cwnd()
        # During a fast repair, which takes 1 RTT, later segments are acknowledged as usual. During
        # a longer repair, the sender gets no acknowledgements.
        acknowledgement_delay = delay if delay > path.rtt else 0
        self.in_flight.append(sent + path.rtt + acknowledgement_delay)
        return sent + delay

    def wait_to_send(self, t):
        """Return when the sender can send a segment: at t, or when cwnd permits. Updates cwnd.

        Below ssthresh (slow start), each acknowledgement adds 1 to cwnd: cwnd doubles in an RTT.
        From ssthresh on, each acknowledgement adds 1 / cwnd: cwnd grows by 1 in an RTT.
        """
        in_flight, now = self.in_flight, max(t, self.sent)
        may_grow = 2 * len(in_flight) >= self.cwnd      # only if half of cwnd is in use
        while in_flight and (in_flight[0] <= now or len(in_flight) >= self.cwnd):
            if may_grow and self.cwnd < CWND_MAX:
                in_slow_start = self.cwnd < self.ssthresh
                self.cwnd += 1 if in_slow_start else 1 / self.cwnd
            now = max(now, in_flight.popleft())     # the time of the acknowledgement
            if now > self.sent:     # time has passed since a loss: the sender knows of the loss
                self.reduce_cwnd()
        self.sent = now
        return now

    def reduce_cwnd(self):
        """If a loss is pending, reduce cwnd by RFC 5681 (sections 3.1 and 3.2)."""
        if self.pending_loss:
            in_flight = len(self.in_flight) + 1     # with the segment that is sent next
            self.ssthresh = max(2.0, in_flight / 2)
            self.cwnd = 1.0 if self.pending_loss == "time-out" else self.ssthresh
            self.pending_loss = None

    def draw_loss(self, path):
        """Draw whether a segment is lost. By Gilbert's model, losses come in bursts."""
        if self.last_lost:
            probability = path.loss_after_loss
        else:       # with this probability, loss_rate is the share of all segments that are lost
            probability = (path.loss_rate * (1 - path.loss_after_loss)
                           / max(1 - path.loss_rate, 1e-9))     # never divide by 0
        self.last_lost = path.rng.random() < probability
        return self.last_lost

    def draw_repair(self, path, behind, is_bulk):
        """Return (delay of a lost segment in seconds, whether a time-out has repaired the loss).

        behind     the number of later segments of the same chunk
        is_bulk    whether more chunks follow soon

        The delays were measured with Linux 6.18:

            three or more segments follow          1 RTT: three acknowledgements report the loss
            some segments follow or are in flight  2 RTT (tail loss probe, RFC 8985), but at most
                                                   the retransmission time-out
            no other segment is in flight          RTT + 200 ms: the retransmission time-out
            a retransmission is lost too           1, 2, 4 ... times the time-out in addition
        """
        timeout = path.rtt + RTO_MIN
        most_following = self.cwnd - 1      # cwnd segments may be in flight, with the lost one
        following = most_following if is_bulk else min(behind, most_following)
        if following >= 3:
            delay, timed_out = path.rtt, False
        elif (behind or self.in_flight) and 2 * path.rtt < timeout:
            delay, timed_out = 2 * path.rtt, False
        else:
            delay, timed_out = timeout, True
        for count in range(RETRANSMISSIONS):
            if path.rng.random() >= path.loss_rate:     # the retransmission arrives
                break
            delay += min(timeout * 2 ** count, RTO_MAX)
            timed_out = True
        return delay, timed_out


@handler
@rate_limited
@with_attributes(option_checks={
    "loss_rate": check_toxicity, "correlation": check_toxicity,
    "burst": number_check(float, "a number, 1 or more", lambda burst: burst >= 1)})
def packet_loss(state, t, to, data, *, loss_rate=0.0, correlation=0.0, rtt=100, burst=1.0):
    """A link that loses packets, as TCP shows it: no byte is lost, but bytes arrive later.

    TCP sends a lost packet again. With rtt=100, the packet and the later bytes arrive 100 ms late
    if three packets follow, and 300 ms late if the packet is alone. Each loss slows the sender
    down: with rtt=100 and loss_rate=0.01, a bulk transfer gets at most 177 kB/s. The formula is
    1.22 * 1448 bytes / (rtt * sqrt(loss_rate)) (Mathis, 1997).

    loss_rate    share of the packets that are lost, from 0 to 1
    correlation  added to loss_rate for the packet after a lost packet, from 0 to 1
    rtt          milliseconds of a round trip: the time until an acknowledgement arrives
    burst        mean number of packets that are lost in a row; alternative to correlation
    """
    # state[to] is the time when the last segment arrives.
    sender = state["sender " + to]      # 0 for the first event
    if data is OPEN or not sender:
        sender = state["sender " + to] = TcpSender()
    if data is OPEN:
        state[to] = t
    if not (data and loss_rate):
        yield max(t, state[to]), to, data
        return
    if state[to] < sender.sent:         # Chain.reset_due_times has reduced state[to]
        sender.sent = state[to]
        sender.in_flight.clear()
    # A burst that ends after each segment with probability 1 / n has n segments on average.
    loss_after_loss = min(max(loss_rate + correlation, 1 - 1 / burst), 1 - 1 / BURST_MAX)
    path = TcpPath(rtt / 1000, loss_rate, loss_after_loss, state.random)
    earlier_chunk_waits = sender.sent > t
    is_bulk = len(data) >= READ_MIN or earlier_chunk_waits      # further chunks are likely
    # Segments that arrive at one time are yielded as one chunk, which begins at `start`.
    start = 0
    for offset in range(0, len(data), SEGMENT):
        behind = (len(data) - offset - 1) // SEGMENT
        arrival = sender.send(t, path, behind, is_bulk)
        if arrival > state[to]:         # later than the segments before
            if offset > start:
                yield max(t, state[to]), to, data[start:offset]
            start, state[to] = offset, arrival
    yield max(t, state[to]), to, data[start:]


# rates     kbit/s: (upstream, downstream)
# delays    milliseconds: (upstream, downstream)
# loss      the share of the packets that are lost, from 0 to 1
Network = namedtuple("Network", "rates delays loss")
# Sources. If a source has only one latency, each direction gets half of the latency:
#
#   ATC                Facebook's Augmented Traffic Control, utils/profiles
#   NLC                Apple's Network Link Conditioner
#   Chrome, Firefox    the network throttling in the developer tools of these browsers
#   comcast            the program comcast: the README of github.com/tylertreat/comcast
NETWORKS = OrderedDict((
    ("2g", Network((18, 20), (650, 650), 0.02)),            # ATC 2G-DevelopingRural
    ("2g-urban", Network((32, 35), (650, 650), 0)),         # ATC 2G-DevelopingUrban
    ("gprs", Network((20, 50), (250, 250), 0.02)),          # Firefox; the loss of comcast
    ("edge", Network((200, 240), (440, 400), 0)),           # NLC, ATC Edge-Average
    ("edge-good", Network((200, 250), (370, 350), 0)),      # ATC
    ("edge-lossy", Network((200, 240), (440, 400), 0.01)),  # ATC
    ("3g", Network((330, 780), (100, 100), 0)),             # NLC, ATC 3G-Average
    ("3g-good", Network((420, 850), (100, 90), 0)),         # ATC
    ("3g-lossy", Network((750, 750), (125, 125), 0.015)),   # comcast 3G/HSDPA
    ("slow-3g", Network((400, 400), (1000, 1000), 0)),      # Chrome Slow 3G
    ("fast-3g", Network((675, 1440), (281, 281), 0)),       # Chrome Fast 3G
    ("4g", Network((1350, 8100), (82, 83), 0)),             # Chrome Fast 4G
    ("lte", Network((10000, 50000), (65, 50), 0)),          # NLC
    ("dial-up", Network((40, 40), (92, 93), 0.02)),         # comcast
    ("dsl", Network((256, 2000), (5, 5), 0)),               # NLC, ATC
    ("dsl-poor", Network((2000, 2000), (35, 35), 0.02)),    # comcast
    ("cable", Network((1000, 6000), (2, 2), 0)),            # ATC
    ("wifi", Network((33000, 40000), (1, 1), 0)),           # NLC
    ("wifi-lossy", Network((30000, 30000), (20, 20), 0.002)),    # comcast
    # A geostationary satellite: the delays are from RFC 2488 (section 2), the loss from comcast,
    # and the rates from advertisements of providers
    ("satellite", Network((3000, 25000), (279, 279), 0.002)),
    ("very-bad", Network((1000, 1000), (500, 500), 0.1)),   # NLC Very Bad Network
))
check_network = choice_check(*NETWORKS)


@handler
@rate_limited
@with_attributes(option_checks={"profile": check_network})
def network(state, t, to, data, *, profile="3g"):
    """A network with a name: its latency, its data rate and its packet loss, both ways.

    Connecting takes a round trip. In an ini file, a toxic with this handler needs stream = both.

    profile  2g, 2g-urban, gprs, edge, edge-good, edge-lossy, 3g, 3g-good, 3g-lossy, slow-3g,
             fast-3g, 4g, lte, dial-up, dsl, dsl-poor, cable, wifi, wifi-lossy, satellite or
             very-bad
    """
    rates, delays, loss = NETWORKS[profile]
    index, rtt = DIRECTIONS.index(to), sum(delays)
    if data is OPEN and to == UPSTREAM:
        t += rtt / 1000         # connecting takes a round trip
    events = [(t, to, data)]
    # The events pass through these handlers in order. Each handler has a state of its own.
    steps: "Any" = [(packet_loss, {"loss_rate": loss, "rtt": rtt}),
                    (bandwidth, {"rate": rates[index] / 8}),        # kbit to kilobytes
                    (latency, {"latency": delays[index]})]
    for function, options in steps:
        substate = state.substate(function.__name__)
        if data is not OPEN:            # Chain.reset_due_times reduces only state[to]
            substate[to] = min(substate[to], state[to])
        received, events = events, []
        for event in received:
            events += function(substate, *event, **options)
    state[to], _, _ = events[-1]        # the time when the last bytes arrive
    yield from events


PIECES_MAX = 1000   # the most pieces of one chunk. A piece takes CHUNK_OVERHEAD and a system call


def split_chunk(data, size, variation=0, rng=None):
    """Yield the pieces of a chunk. Yields signals unchanged, and chunks too if `size` is 0.

    size         the bytes of a piece. The pieces are larger if a chunk would have more than
                 PIECES_MAX pieces
    variation    the largest difference between a piece and `size`, in bytes
    rng          a random.Random that draws the differences; None: all pieces have `size` bytes
    """
    if not data or size <= 0:
        yield data
        return
    smallest_size = max(1, len(data) // PIECES_MAX)
    start = 0
    while start < len(data):
        piece_size = rng.randint(size - variation, size + variation) if rng else size
        end = start + max(smallest_size, piece_size)
        yield data[start:end]
        start = end


def close_both(t):
    """Yield the events that close the connection at t: an EOF in each direction."""
    yield t, DOWNSTREAM, EOF
    yield t, UPSTREAM, EOF


def random_bytes(rng, size):
    """Return random bytes from a random.Random. (The method randbytes needs Python 3.9.)"""
    return rng.getrandbits(8 * size).to_bytes(size, "little")


# -- Options ------------------------------------------------------------------
#
# This section has the base class of blocking handlers, functions that read the options of a
# handler from its declaration, the rule fields, and the import of users' handlers. A parameter
# `function` is a handler: a generator function, or a subclass of BaseHandler.

class BaseHandler:
    """A blocking handler: it runs in a thread of its own, gets the sockets, and may block.

    name       a second name under which load_handler registers the class, or "".
    options    {option: (help, type, default)}.

    One object serves all connections of a proxy. Several threads call the object at one time.
    """

    name = ""
    options: dict = {}
    blocking = True     # for is_blocking_handler

    def __init__(self, settings: "Optional[Dict[str, OptionValue]]" = None,
                 proxy: "Any" = None) -> None:
        """Create the handler for a ProxyServer. `settings` is {option: value}."""
        self.settings = dict(settings or {})
        self.proxy = proxy
        self.logger = log

    def __call__(self, client_sock: "socket.socket", backend_sock: "socket.socket",
                 to_backend: bool) -> None:
        """Receive from one peer, which has sent data, and send to the other peer.

        to_backend    True: receive from the client. False: receive from the backend.

        If the handler leaves data unread, Vaurien calls the handler again at once. Data that the
        handler reads and does not send is lost. The sockets are valid during this call only. If
        the handler raises an exception or closes a socket, Vaurien closes the connection.
        """
        raise NotImplementedError

    def update_settings(self, settings: "Dict[str, OptionValue]") -> None:
        """Change the values of some options. `settings` is {option: value}."""
        self.settings.update(settings)

    def option(self, name: str) -> "Any":
        """Return an option's value, converted to its declared type. Raises ValueError."""
        if name not in self.options:
            raise ValueError("unknown option %r%s: there are %s" % (
                name, did_you_mean(name, self.options), ", ".join(sorted(self.options)) or "none"))
        _, type_, default = self.options[name]
        value = self.settings.get(name, default)
        return check_yes_no(value) if type_ is bool else type_(value)

    def _get_data(self, client_sock: "socket.socket",
                  backend_sock: "Optional[socket.socket]" = None, to_backend: bool = True,
                  buffer: int = CHUNK) -> bytes:
        """Receive from the client if `to_backend` is True, otherwise from the backend.

        buffer    the most bytes to receive.

        Returns b"" at the end of the stream or after an error.
        """
        # Without a `backend_sock`, receive from `client_sock`.
        source = client_sock if to_backend or backend_sock is None else backend_sock
        try:
            return source.recv(buffer)
        except OSError:
            return b""


def is_blocking_handler(function):
    """Return whether a handler is a subclass of BaseHandler."""
    # issubclass is False if the class inherits from BaseHandler in a second import of this file.
    return isinstance(function, type) and getattr(function, "blocking", False)


def handler_options(function):
    """Return the options of a handler: {option: default}."""
    if is_blocking_handler(function):   # the declared default of a float option may be 1, not 1.0
        return {name: type_(default) for name, (_, type_, default) in function.options.items()}
    return getattr(function, "__kwdefaults__", None) or {}      # the parameters after the *


def summary(function):
    """Return the first line of a handler's docstring, or "" if Python runs with -OO."""
    return (inspect.getdoc(function) or "").partition("\n")[0]


def option_help(function):
    """Return {option: help} of a handler, without the options that have no help."""
    if is_blocking_handler(function):
        return {name: help_text for name, (help_text, _, _) in function.options.items()}
    # Example: "rate     kilobytes per second;\n         0 lets nothing through"
    entries = re.findall(r"^(\w+) {2,}(\S.*(?:\n +\S.*)*)$", inspect.getdoc(function) or "",
                         re.MULTILINE)
    return {name: " ".join(help_text.split()) for name, help_text in entries
            if name in handler_options(function)}


def get_handler(name):
    """Return the handler with a name. Raises ValueError if no handler has the name."""
    if isinstance(name, str) and name in HANDLERS:
        return HANDLERS[name]
    raise ValueError(unknown_handler(name))


def unknown_handler(name):
    """Return an error text for a name that no handler has."""
    shown = name[:50] if isinstance(name, str) else name    # a JSON value may have any type
    return "unknown handler %r%s: there are %s" % (
        shown, did_you_mean(shown, HANDLERS), ", ".join(sorted(HANDLERS)))


def check_option(handler_name, option, value):
    """Return the value of an option, converted to the type of the option.

    value    a text or a JSON value.

    Raises ValueError with the end of a sentence, like a check.
    """
    function = get_handler(handler_name)
    defaults = handler_options(function)
    if option not in defaults:
        choices = [*defaults, *RULE_FIELDS]     # the user may have misspelled a rule field
        raise ValueError("is not an option of %s%s: it has %s" % (
            handler_name, did_you_mean(option, choices), ", ".join(sorted(defaults)) or "none"))
    checks = getattr(function, "option_checks", {})
    if option in checks:
        return checks[option](value)
    type_ = type(defaults[option])
    if type_ is str:
        return check_text(value)
    if type_ is bool:
        return check_yes_no(value)
    number = check_count(value) if type_ is int else check_amount(value)
    if number > INT64_MAX:      # an option is also an attribute in Toxiproxy's API
        raise ValueError("must be less than 2**63, not %r" % (value,))
    return number


def check_match(text):
    """Compile a regular expression for a search in the bytes of a request."""
    if not isinstance(text, str) or not text:
        raise ValueError("must be a regular expression, not %r" % (text,))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")     # a FutureWarning, for example about "[["
            return re.compile(text.encode("utf-8"))     # requests are bytes
    except (re.error, UnicodeError, RecursionError, OverflowError) as error:
        raise ValueError("must be a regular expression, not %r: %s" % (text, error)) from None


# The fields of each rule, without the handler and the handler's options: {name: Field}. To add a
# field, add a line to RULE_FIELDS, and code for the meaning of the field in Rule or Chain.
# Constructors, JSON, ini files, the command line, the help and the comparison of rules use
# RULE_FIELDS.
Field = namedtuple("Field", "check default help")
RULE_FIELDS = OrderedDict((name, Field(*others)) for name, *others in [
    ("percent", check_percent, 100.0, "how often the rule acts, from 0 to 100"),
    ("per", choice_check("request", "connection"), "request",
     "request: draw for each request; connection: draw once for each connection"),
    ("stream", choice_check("both", UPSTREAM, DOWNSTREAM), "both",
     "direction of the events that the handler receives: both, upstream or downstream"),
    ("match", check_match, None, "a regular expression that must be found in a request"),
    ("after", check_count, 0, "number of requests to leave alone first, of all clients together"),
    ("times", check_count, 0,
     "number of requests to act on at most, of all clients together; 0 is no limit"),
    ("of", check_count, 0, "with times: act on the first `times` of every `of` requests"),
    ("start", check_seconds, 0.0,
     "seconds, or a time like 90s, 5m, 1h or 500ms, until the rule begins to act"),
    ("duration", check_seconds, 0.0, "seconds from start until the rule stops; 0 is no limit"),
    ("every", check_seconds, 0.0, "seconds after which start and duration repeat; 0 is never"),
    ("ramp", check_seconds, 0.0, "seconds in which the percentage rises from 0 to its value"),
    ("ttl", check_seconds, 0.0,
     "seconds after which the rule is removed, counted from its last change; 0 is never"),
])


# {field: default} of a Rule's attributes. In place of `percent`, a Rule has draw_min and draw_max.
FIELD_DEFAULTS = OrderedDict((name, field.default) for name, field in RULE_FIELDS.items()
                             if name != "percent")


def is_rule_field(function, key):
    """Return whether a key of a rule is a rule field, and not an option of the handler."""
    return key in RULE_FIELDS and key not in handler_options(function)


def load_handler(name, path):
    """Import a user's handler by its dotted path and register it under a name. Raises ValueError.

    A BaseHandler is also registered under the `name` of its class, if the name is free.
    The control API must not call this function, because an import runs code.
    """
    module_name, _, attribute = path.rpartition(".")
    with contextlib.suppress(OSError):      # the working directory may have been removed
        # The installed command `vaurien` does not search the working directory for modules.
        if os.getcwd() not in sys.path and "" not in sys.path:
            sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except (Exception, SystemExit) as exc:      # the user's module may raise anything
        one_line = " ".join(format_exception(exc).split())
        raise ValueError("cannot import %r: %s" % (path, one_line)) from None
    check_handler(path, function)
    HANDLERS[name] = function
    if is_blocking_handler(function) and function.name:
        HANDLERS.setdefault(function.name, function)


def local_handler(handler):
    """Return the name of a handler. Register the handler if necessary. Raises ValueError.

    handler    a name, a dotted path, or the handler itself.
    """
    if isinstance(handler, str):
        if handler not in HANDLERS and "." in handler:
            load_handler(handler, handler)
        get_handler(handler)            # raises ValueError for an unknown handler
        return handler
    # A BaseHandler may have a `name`. A functools.partial has no __name__.
    name = getattr(handler, "name", "") or getattr(handler, "__name__", repr(handler))
    registered = HANDLERS.get(name)
    if registered is handler:
        return name
    check_handler(name, handler)
    if registered is not None and registered.__module__ == __name__:    # a handler of this file
        raise ValueError("%r is a handler of Vaurien: give your handler another name" % name)
    HANDLERS[name] = handler    # the handler replaces a user's handler of the same name
    return name


def check_handler(path, function):
    """Raise ValueError if an object of a user cannot be used as a handler.

    path    the dotted path or the name of the object, for the error.
    """
    expected = ("it must be a function (state, t, to, data, *, option=default ...), or a class "
                "that inherits from vaurien.handlers.BaseHandler")
    try:
        check_signature(function)
        options = handler_options(function)
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError("%r is not a handler: %s: %s" % (path, error, expected)) from None
    for option, default in options.items():
        if type(default) not in (bool, int, float, str):
            raise ValueError("%r: the default of option %r must be a yes/no, a number "
                             "or text, not %r" % (path, option, default))
        if option in ("name", "percent"):       # an option may hide any other rule field
            raise ValueError("%r: an option cannot be called %r: each rule has a field of that "
                             "name" % (path, option))


def check_signature(function):
    """Raise TypeError if a user's object cannot be called as a handler (state, t, to, data)."""
    if is_blocking_handler(function):
        return
    if isinstance(function, type):
        raise TypeError("it is a class that does not inherit from BaseHandler")
    signature = inspect.signature(function)
    signature.bind("state", "t", "to", "data")      # raises TypeError
    for parameter in list(signature.parameters.values())[4:]:
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            raise TypeError("%r is no option, because it comes before the *" % parameter.name)


# -- Protocols ----------------------------------------------------------------
#
# A protocol finds the requests in the client's bytes and the replies in the backend's bytes, and
# makes the error replies of a failing server. Protocols use no sockets, clocks or threads.
#
# Each protocol has two readers, the generators `requests` and `replies`. A Framer feeds bytes to
# a reader. A reader yields either a demand for the next bytes, or a boundary at this position:
#
#   an int              skip this many bytes.
#   NeedBytes(count)    receive `count` bytes, as the value of the yield.
#   NeedMatch(pattern)  receive the bytes up to the end of the pattern's first match.
#   SkipUntil(marker)   skip all bytes up to the end of the next marker.
#   a Request           the bytes since the last END_OF_MESSAGE are the head of this request.
#   CONTINUATION        the bytes since the last END_OF_MESSAGE belong to the previous request.
#   END_OF_MESSAGE      a request or a reply ends here.
#   END_OF_ROW          a row of a reply ends here, only if `counts_rows` is set.
#   TLS_BEGINS          the further bytes of this direction are in TLS, only if `joins_tls` is set.
#
# After TLS_BEGINS, the chain drops the reader, and starts a new reader for the decrypted bytes. A
# reader raises ProtocolError at bytes that are not of the protocol, and when another protocol
# follows. After a ProtocolError, the connection continues as tcp.
#
# After each boundary, the ProtocolChain updates the queue of exchanges. Then the reader continues,
# and calls `awaited_exchanges` or `awaited_request` to read the queue. A reader may change
# `replies` and `info` of a Request in the queue, and nothing else in the queue.
#
# The smallest protocol: a request is a line, and a reply is a line.
#
#     @protocol
#     class Lines(Protocol):
#         """A protocol of lines."""
#         errors = {"busy": "BUSY"}
#         default_errors = ("busy",)
#
#         def requests(self):
#             while True:
#                 line = yield LINE
#                 yield Request(text=line, name="LINE")
#                 yield END_OF_MESSAGE
#
#         def replies(self):
#             while True:
#                 yield LINE
#                 yield END_OF_MESSAGE

PROTOCOLS = OrderedDict(tcp=None)               # {name: subclass of Protocol, or None}
CONTINUATION = Signal("CONTINUATION")
TLS_BEGINS = Signal("TLS_BEGINS")
UNLIMITED = 1 << 62             # a reader yields this int to skip all further bytes


def protocol(class_):
    """Register a Protocol class under its name in lower case, and return the class."""
    PROTOCOLS[class_.__name__.lower()] = class_
    return class_


class ProtocolError(Exception):
    """The bytes are not of the protocol. The log shows the text of this exception."""


# A demand has the method `take`. The Framer calls `take` with each chunk until a value comes:
#
#   offset, value, buffered = demand.take(buffered, data, offset, size)
#
#   buffered             the bytes kept from earlier chunks: b"" in the first call.
#   data[offset:size]    the bytes of the chunk that are still to take.
#   offset, returned     the offset behind the taken bytes.
#   value                the result of the reader's `yield`. None: take() needs one more chunk.

class NeedBytes(int):
    """Asks for a number of bytes: NeedBytes(5) asks for 5 bytes."""

    def take(self, buffered, data, offset, size):
        """Return (offset, value, buffered): see the table above NeedBytes."""
        missing = self - len(buffered)      # a NeedBytes is an int
        end = min(size, offset + missing)
        received = buffered + data[offset:end]
        return (end, received, b"") if len(received) == self else (end, None, received)


class NeedMatch:
    """Asks for the bytes up to the end of a pattern's first match.

    end      the pattern whose first match ends the input.
    start    a pattern that must match the input, also while the input is incomplete. If a group
             of `start` matches, the input is certainly of the protocol.
    error    the text of the ProtocolError for input that `start` does not match.
    """

    __slots__ = ("search", "match_start", "error")

    def __init__(self, end, start=b"", error=""):
        self.search, self.error = re.compile(end).search, error
        self.match_start = re.compile(start).match if start else None

    def take(self, buffered, data, offset, size):
        """Return (offset, value, buffered): see above NeedBytes. Raises ProtocolError."""
        if buffered:
            joined = buffered + data[offset:size]
            match = self.search(joined)
            received = joined[:match.end()] if match else joined
        else:                               # search in the data, without a copy
            match = self.search(data, offset, size)
            received = bytes(data[offset:match.end() if match else size])
        if len(received) > HEAD_MAX:
            raise ProtocolError("a head of more than %d bytes" % HEAD_MAX)
        if self.match_start and not self.match_start(received):
            is_tls = received[:1] == b"\x16"        # the type of a handshake record
            raise ProtocolError("TLS" if is_tls else self.error)
        if not match:
            return size, None, received
        return offset + len(received) - len(buffered), received, b""


class SkipUntil(namedtuple("SkipUntil", "marker tail")):
    """Asks to skip all bytes up to the end of the next marker.

    marker    the bytes to search for.
    tail      the last bytes before the skipped bytes: the marker may begin in `tail`.
    """

    __slots__ = ()

    def take(self, buffered, data, offset, size):
        """Return (size, None, buffered) until the marker has come, then (offset, b"", b"")."""
        searched = (buffered or self.tail) + data[offset:size]      # `tail` in the first call
        _, marker, after = searched.partition(self.marker)
        if not marker:                  # the last bytes may be the beginning of a marker
            return size, None, searched[1 - len(self.marker):]
        return size - len(after), b"", b""


def beginning_with(*parts):
    """Return the pattern `start` of a NeedMatch whose input begins with these patterns.

    Incomplete input may end after any of the patterns. The last pattern is a group: the group
    shows that the beginning is complete. For example, beginning_with(b"a", b"b") matches b"",
    b"a", b"ab" and b"abc". Only for b"ab" and b"abc", the group matches too.
    """
    expression = b"(%s)" % parts[-1]
    for part in reversed(parts[:-1]):
        expression = b"%s(?:\\Z|%s)" % (part, expression)
    return b"\\Z|" + expression         # for the example: \Z|a(?:\Z|(b))


PRINTABLE = rb"[^\0-\x08\x0b\x0c\x0e-\x1f\x7f]"     # a byte that is no control character
# Bytes without control characters. Only the first 256 bytes are checked, to save time.
TEXT = rb"(?:%s{256}|%s{0,255}\Z)" % (PRINTABLE, PRINTABLE)
LINE = NeedMatch(rb"\n")
COMMAND_LINE = NeedMatch(rb"\n", TEXT, "a control character in a command")


class Request:
    """A request of a protocol. A reader makes the Request as soon as the head is complete.

    text           the bytes in which `match` searches.
    name           the command: a str, or for MySQL an int.
    replies        whether the backend replies to the request.
    info           data that the protocol keeps until the reply: see the class of each protocol.
    independent    True: rules are drawn for the request. False: the active rules of the previous
                   request act on this request.
    """

    __slots__ = ("text", "name", "replies", "info", "independent")

    def __init__(self, text, name, replies=True, info=None, independent=True):
        self.text, self.name, self.replies, self.info = text, name, replies, info
        self.independent = independent


NO_REQUEST = Request(b"", "")       # for a reply that belongs to no request


class Reply(namedtuple("Reply", "data closes substitute")):
    """An error reply to a request, or to a client that connects.

    data          the bytes that the client gets.
    closes        whether the proxy closes the connection after `data`.
    substitute    the bytes that the backend gets in place of the request, or b"".
    """

    __slots__ = ()

    def __new__(cls, data, closes=False, substitute=b""):
        return super().__new__(cls, data, closes, substitute)


Refusal = namedtuple("Refusal", "active_rule reply")    # the rule that replies, and its Reply


class Framer:
    """Finds the boundaries of requests, or of replies, in the bytes of one direction.

    awaiting       the last value that the reader has yielded: a demand or a boundary.
    buffered       the bytes that have arrived for an incomplete demand.
    at_boundary    whether all bytes so far belong to complete messages.
    """

    __slots__ = ("reader", "parse_whole", "awaiting", "buffered", "at_boundary")

    def __init__(self, reader, parse_whole):
        self.parse_whole = parse_whole      # Protocol.parse_whole_request or parse_whole_reply
        self.restart(reader)

    def restart(self, reader):
        """Replace the reader. Drops the buffered bytes."""
        self.reader = reader
        self.awaiting = next(reader)
        self.buffered = b""
        self.at_boundary = True

    def skips(self, size):
        """Return whether the reader skips more than `size` bytes, without any boundary."""
        return type(self.awaiting) is int and self.awaiting > size

    def recognizes(self, head):
        """Return whether the bytes of an incomplete head are certainly of the protocol.

        This is certain if the reader has accepted some of the bytes, such as a line, or if the
        group in the pattern of a NeedMatch matches, such as a whole request line of HTTP.
        """
        if len(self.buffered) < len(head):      # the reader has accepted the bytes before
            return True
        if type(self.awaiting) is not NeedMatch or not self.awaiting.match_start:
            return False
        match = self.awaiting.match_start(self.buffered)
        return match is not None and match.lastindex is not None    # the group has matched

    def whole_message(self, data):
        """Return ((offset, boundary), ...) of data that is exactly one message of a simple form.

        Is faster than `feed`, and finds the same boundaries. Returns None for all other
        data, such as the rest of an incomplete message. Raises ProtocolError.
        """
        parsed = self.parse_whole(data) if self.at_boundary else None
        if not parsed:
            return None
        message_end = (len(data), END_OF_MESSAGE)
        if type(parsed) is Request:         # the whole data is the head
            return (len(data), parsed), message_end
        return (message_end,)               # a reply

    def feed(self, data, size):
        """Parse the first `size` bytes of data. Yield (offset, boundary) for each boundary.

        data    bytes, or a memoryview of the beginning of a bytearray.

        Between two boundaries, the caller updates the queue of exchanges. Raises ProtocolError.
        """
        if type(data) is memoryview:
            data = data.obj                 # the bytearray. A memoryview has no find()
        offset = 0
        message_end = -1                    # offset of the last END_OF_MESSAGE
        while True:
            awaiting, value = self.awaiting, None       # value: the input for the reader
            type_ = type(awaiting)
            if type_ is int:
                if awaiting > size - offset:            # skip more bytes than are left
                    self.awaiting -= size - offset
                    break
                offset += awaiting
            elif type_ is Signal or type_ is Request:   # a boundary
                if awaiting is END_OF_MESSAGE:
                    message_end = offset
                yield offset, awaiting
            else:
                offset, value, self.buffered = awaiting.take(self.buffered, data, offset, size)
                if value is None:
                    break
            self.awaiting = self.reader.send(value)
        self.at_boundary = message_end == size          # for whole_message


def read_opaque():
    """Skip all bytes: a reader for a stream without boundaries."""
    yield UNLIMITED


class Protocol:
    """The protocol of one connection, with the state of its two readers.

    An error is named by its kind, such as "503" or "LOADING".
    """

    # The errors
    errors: dict = {}               # {kind: data for `encode_error`}
    default_errors: tuple = ()      # kinds that the handler `error` draws for requests
    connect_errors: tuple = ()      # kinds for a client that connects
    fatal_errors: tuple = ()        # kinds after which a server closes the connection
    overload_error = ""             # the kind for a client beyond max_connections. "": only close
    never_fail: tuple = ()          # names of requests to which a server sends no errors
    # The messages
    server_first = False            # a greeting or handshake comes first, and counts as request 1
    credentials: tuple = ()         # names of requests with passwords, which no fault record shows
    has_rows = False                # replies have rows
    counts_rows = False             # a rule needs the rows. Set by the ProtocolChain
    # TLS
    alpn: tuple = ()                # names of the protocol in ALPN (RFC 7301)
    starts_tls = False              # TLS may begin within a connection
    joins_tls = False               # the proxy decrypts TLS within a connection. Set by Connection

    def __init__(self, host=b""):
        self.host = host            # the new value of Host header fields. b"": replace no value
        self.exchanges: deque = deque()     # the queue, which the ProtocolChain updates
        self.refusable = None       # at each event: the Exchange that a rule may refuse, or None
        self.request_framer = Framer(self.requests(), self.parse_whole_request)
        self.reply_framer = Framer(self.replies(), self.parse_whole_reply)

    def awaited_exchanges(self):
        """Return the exchanges that await a reply from the backend, in order."""
        return [exchange for exchange in self.exchanges if exchange.awaits_reply()]

    def awaited_request(self):
        """Return the Request whose reply comes next.

        Returns NO_REQUEST if no reply is awaited, or if a greeting or handshake comes first.
        """
        for exchange in self.exchanges:
            if exchange.awaits_reply():
                return exchange.request or NO_REQUEST
        return NO_REQUEST

    def beginning(self, request):
        """Return the first bytes of a request's text, for a fault record."""
        if request.name in self.credentials:    # the text may have a password
            return request.name.encode()
        return request.text[:BEGINNING_MAX]

    # Each protocol must define `requests` and `replies`.

    def requests(self):
        """Find the requests: this reader gets the client's bytes."""
        raise NotImplementedError

    def replies(self):
        """Find the replies: this reader gets the backend's bytes."""
        raise NotImplementedError

    def parse_whole_request(self, data):
        """Return the Request if data is exactly one request of a simple form, otherwise None.

        A simple form needs no reader, such as an HTTP request without a body. A request without a
        reply has no simple form. Changes no state if the result is None. Raises ProtocolError.
        """
        return None

    def parse_whole_reply(self, data):
        """Return whether data is exactly one reply of a simple form."""
        return False

    def rewrite_head(self, head):
        """Return the bytes that the backend gets for the head of a request."""
        return head

    def connect_error(self, kind, data):
        """Return the Reply to a client that connects.

        data    OPEN, or the first bytes that the client has sent.

        Returns None if a server would not reply to `data` with this error.
        """
        if kind not in self.connect_errors or data is not OPEN:
            return None
        return Reply(self.encode_error(kind), closes=True)

    def refuse_client(self, received):
        """Return the Reply to a client beyond max_connections.

        received    OPEN, or the bytes that the client has sent since the last Reply to the client.

        Returns None if a server would reply only after more bytes.
        """
        if not self.overload_error:
            return Reply(b"", closes=True)
        return self.connect_error(self.overload_error, received)

    def error_reply(self, kind, request):
        """Return the Reply to a request that fails with an error of this kind.

        Returns None if a server would not reply to the request with this error.
        """
        closes = kind in self.fatal_errors
        if kind in self.connect_errors and not closes:      # 421 of SMTP is in both tuples
            return None
        if request.name in self.never_fail or not request.replies:
            return None
        substitute = b"" if closes else self.make_substitute(kind, request)
        return Reply(self.encode_error(kind), closes, substitute)

    def make_substitute(self, kind, request):
        """Return the bytes that the backend gets in place of a request that fails, or b"".

        The backend will get these bytes, so this method may update the state of the protocol.
        """
        return b""

    def finish_reply(self, reply, request):
        """Return the bytes of a Reply. Some protocols insert a sequence number or a status."""
        return reply.data

    def encode_error(self, kind):
        """Return the bytes of an error of this kind."""
        return self.errors[kind].encode() + b"\r\n"

    # A rule sends an error when a failing server would send the error:
    #
    #   at once                        to a client that connects.
    #   after the request's head       if the error closes the connection.
    #   after the request              if the backend gets no substitute for the request.
    #   after the substitute's reply   if the backend gets a substitute for the request.
    #
    # A rule can refuse a request only at the event with the head of the request. The Exchange of a
    # refused request has a Refusal, which names the rule. At the later events of the Exchange, the
    # ProtocolChain calls finish_refusal in place of the handler of the rule. Other rules get the
    # events that a failing server would cause.

    def reply_with_error(self, state, t, to, data, kind):
        """Yield the events that the handler `error` makes of one event (t, to, data).

        Refuses the request whose head is in the event, or the client that connects. The event
        passes unchanged if a server would not fail at this event.

        state    the active rule that has the handler.
        kind     the kind of the error, or "": draw the kind.
        """
        exchange, request, reply = self.refusable, None, None
        if exchange and to == UPSTREAM and (data or data is OPEN):      # not EOF or END_OF_MESSAGE
            request = exchange.request              # None if the client connects
            kind = kind or self.draw_kind(state, request)
            reply = self.error_reply(kind, request) if request else self.connect_error(kind, data)
        if reply is None:
            yield t, to, data
            return
        state.drawn_options = {"kind": kind}        # for the fault record
        is_refused = request or reply.closes        # Postgres may first refuse only encryption
        if is_refused:
            exchange.refusal = Refusal(state, reply)
            self.refusable = None                   # no other rule can refuse the request
        if request and not reply.closes:
            return                                  # finish_refusal sends the error
        if reply.data:
            yield t, DOWNSTREAM, reply.data
        if reply.closes:
            yield from close_both(t)

    def draw_kind(self, state, request):
        """Draw the kind of an error. Returns "" for no error.

        state      the active rule that has the handler `error`.
        request    None for a client that connects.
        """
        if request:
            return state.random.choice(self.default_errors)
        if not self.server_first or not self.connect_errors:    # connecting counts as no request
            return ""
        # Postgres draws at each message of a login. `state.draw` gives the same kind each time.
        return self.connect_errors[state.draw % len(self.connect_errors)]

    def finish_refusal(self, exchange, t, to, data):
        """Yield the events that replace one event of an exchange with a refused request.

        Drops the request, and the backend's reply to the substitute. At the end of the request,
        sends the substitute. Sends the error at the end of the reply to the substitute, or at the
        end of a request without a substitute.
        """
        reply = exchange.refusal.reply
        if to == UPSTREAM:
            is_dropped = not exchange.complete      # bytes after the end of the request pass
        else:                                       # `forwarded`: the backend has the substitute
            is_reply_to_substitute = exchange.forwarded and not exchange.reply_done
            is_dropped = reply.closes or is_reply_to_substitute
        if data is EOF or data is OPEN or not is_dropped:
            yield t, to, data
        elif data is END_OF_MESSAGE and not reply.closes:   # an error that closes has been sent
            if to == UPSTREAM and reply.substitute:
                yield t, UPSTREAM, reply.substitute
            else:
                yield t, DOWNSTREAM, self.finish_reply(reply, exchange.request)


def parse_length(text, largest=1 << 60):
    """Parse a length in decimal digits.

    text       bytes. White space around the digits is ignored.
    largest    the largest valid length.

    Raises ProtocolError if the text is not a valid length.
    """
    text = text.strip()
    # int() is slow for a long text, and therefore comes last.
    if not text.isdigit() or len(text) > 18 or int(text) > largest:
        raise ProtocolError("%r is not a length" % text[:20])
    return int(text)


# The header fields of an HTTP request:
#
#   text                 the line feed of the request line, and the header fields.
#   rewritten            `text` with the new value of the Host header field, or `text` itself.
#   close, keep_alive    see Http.connection_options.
HeaderFields = namedtuple("HeaderFields", "text rewritten close keep_alive")


@protocol
class Http(Protocol):
    """HTTP/1.0 and 1.1 (RFC 9112).

    Request.info tells whether the server closes the connection after the reply.
    """

    alpn = ("http/1.1",)
    errors = {
        "500": "Internal Server Error", "502": "Bad Gateway", "503": "Service Unavailable",
        "504": "Gateway Timeout", "429": "Too Many Requests"}
    default_errors = ("500", "502", "503", "504")
    overload_error = "503"
    has_rows = True                 # chunks, or events of a text/event-stream
    HEAD_END = rb"\n\r?\n"
    REQUEST_LINE = re.compile(rb"\s*([A-Z]+) [^ \r\n]+ HTTP/1\.([01])\r?\n")
    # Each character of "HTTP/1." is a pattern: an incomplete head may end after each of them.
    REQUEST_HEAD = NeedMatch(HEAD_END, beginning_with(
        rb"\s*", rb"[A-Z]+", rb" ", rb"[^ \r\n]+", rb" ", *rb"H T T P / 1 \. [01] \r? \n".split()),
        "no request line of HTTP/1")
    REPLY_HEAD = NeedMatch(HEAD_END, beginning_with(
        *rb"H T T P / 1 \. [01]".split(), rb" ", rb"\d", rb"\d", rb"\d"),
        "no status line of HTTP/1")
    STATUS_WITH_BODY = re.compile(rb"HTTP/1\.[01] (200|[45]\d\d)")      # not all statuses
    LENGTH = re.compile(rb"(?im)^content-length[ \t]*:[ \t]*(\d+)[ \t]*\r?$")
    CHUNKED = re.compile(rb"(?im)^transfer-encoding[ \t]*:.*chunked[ \t]*\r?$")
    CLOSE = re.compile(rb"(?im)^connection[ \t]*:.*\bclose\b")
    KEEP_ALIVE = re.compile(rb"(?im)^connection[ \t]*:.*\bkeep-alive\b")
    CHUNK_SIZE = re.compile(rb"[ \t]*([0-9A-Fa-f]{1,15})[ \t]*[;\r\n]")
    HOST = re.compile(rb"(?i)\nhost:[ \t\r]*([^\n]*[^ \t\r\n])?")
    EXPECT = re.compile(rb"(?im)^expect[ \t]*:.*100-continue")
    EVENT_STREAM = re.compile(rb"(?im)^content-type[ \t]*:[ \t]*text/event-stream\b")
    # The last parsed messages are kept, because clients and backends repeat their messages.
    last_request: tuple = (None, None)         # the bytes of a request, and its Request
    last_fields = HeaderFields(None, None, False, False)
    last_reply: tuple = (None, 0)              # the head of a reply, and the size of its body
    line_is_empty = False      # no byte of the current line of a text/event-stream has been read

    def requests(self):
        """Find the requests: a head, and a body if the head announces one."""
        empty_size = 0                      # bytes of empty lines before the request line
        while True:
            head = yield self.REQUEST_HEAD
            if not head.strip():            # empty lines belong to the head of the next request
                empty_size += len(head)
                if empty_size > HEAD_MAX:
                    raise ProtocolError("empty lines of more than %d bytes" % HEAD_MAX)
                continue
            empty_size = 0
            yield self.make_request(head, *self.connection_options(head))
            yield from self.read_body(head, default_length=0)
            yield END_OF_MESSAGE

    def beginning(self, request):
        """Return the request line: other lines can have passwords."""
        request_line, _, _ = super().beginning(request).partition(b"\n")
        return request_line

    def make_request(self, head, close, keep_alive):
        """Return the Request of a head. `close` and `keep_alive`: see connection_options."""
        match = self.REQUEST_LINE.match(head)
        if not match:
            raise ProtocolError(self.REQUEST_HEAD.error)
        method, minor_version = match.groups()
        # In HTTP/1.0, the server closes the connection unless the client asks for keep-alive.
        server_closes = close or (minor_version == b"0" and not keep_alive)
        text = head.strip().replace(b"\r\n", b"\n")     # so that `$` in `match` finds line ends
        return Request(text, method.decode(), info=server_closes)

    def connection_options(self, head):
        """Return (close, keep_alive): whether the Connection header field has these options.

        `close` is also True for "Expect: 100-continue", because the client sends the body only
        after a reply. An error of a rule must not wait for the body, and closes the connection.
        """
        lower_head = head.lower()           # a search for bytes is faster than the patterns
        if b"\nconnection" not in lower_head and b"\nexpect" not in lower_head:
            return False, False
        return (bool(self.CLOSE.search(head) or self.EXPECT.search(head)),
                bool(self.KEEP_ALIVE.search(head)))

    def parse_whole_request(self, data):
        """Return the Request if data is exactly one request without a body, otherwise None."""
        last_data, request = self.last_request
        if data != last_data:
            if not data[:1].isalpha():          # empty lines need the reader `requests`
                return None
            header_text, fields = data[data.find(b"\n"):], self.last_fields
            if header_text != fields.text:      # most requests repeat the header fields
                fields = self.parse_fields(header_text)
                if fields is None:              # the request may have a body
                    return None
            request = self.make_request(data, fields.close, fields.keep_alive)
            if len(data) <= CACHED_HEAD_MAX:
                self.last_request, self.last_fields = (data, request), fields
        # Return a copy, because the chain changes the text of each Request.
        return Request(request.text, request.name, True, request.info)     # True: has a reply

    def parse_fields(self, text):
        """Return the HeaderFields of a request. `text`: see HeaderFields.

        Returns None if `text` is not one whole head without a body.
        """
        lower_text = text.lower()
        _, head_end, rest = text.partition(b"\n\r\n")      # an empty line ends the head
        is_one_head = head_end and not rest and b"\n\n" not in text     # "\n\n" also ends a head
        has_body = b"\ncontent-length" in lower_text or b"\ntransfer-encoding" in lower_text
        if not is_one_head or has_body:
            return None
        return HeaderFields(text, self.rewrite_head(text), *self.connection_options(text))

    def replies(self):
        """Find the replies: a head, and a body unless the method or the status excludes one."""
        while True:
            head = yield self.REPLY_HEAD    # the pattern has checked the digits of the status
            status = int(head[len(b"HTTP/1.1 "):][:3])
            method = self.awaited_request().name
            if status == 101 or (method == "CONNECT" and 200 <= status < 300):
                raise ProtocolError("another protocol follows")
            if status < 200:                # an interim reply, before the final reply
                continue
            if method != "HEAD" and status not in (204, 304):   # all other replies have a body
                rows = ""
                if self.counts_rows:
                    rows = "events" if self.EVENT_STREAM.search(head) else "chunks"
                yield from self.read_body(head, default_length=UNLIMITED, rows=rows)
            yield END_OF_MESSAGE

    def parse_whole_reply(self, data):
        """Return whether data is exactly one reply with a Content-Length."""
        if self.awaited_request().name in ("", "HEAD", "CONNECT"):      # "": no reply is awaited
            return False
        head_size = data.find(b"\n\r\n") + len(b"\n\r\n")       # 2 for an incomplete head
        head_and_size = data[:head_size], len(data) - head_size     # the size of the body
        if head_and_size != self.last_reply:
            if not self.announces_body(*head_and_size):
                return False
            self.last_reply = head_and_size if head_size <= CACHED_HEAD_MAX else (None, 0)
        return True

    def announces_body(self, head, size):
        """Return whether a head surely has a body of `size` bytes. If not, `replies` parses it."""
        lower_head = head.lower()
        _, _, after_name = lower_head.partition(b"\ncontent-length")
        return (after_name.startswith(b": %d\r\n" % size)
                and b"\n\n" not in head        # "\n\n" would end the head earlier
                and b"\ntransfer-encoding" not in lower_head
                and self.STATUS_WITH_BODY.match(head) is not None)

    def read_body(self, head, default_length, rows=""):
        """Read the body that follows a head.

        default_length    the size of the body if the head does not tell the size.
        rows              which rows to report: "chunks", "events", or "" for no rows.
        """
        lower_head = head.lower()           # a search for bytes is faster than the patterns
        if b"\ntransfer-encoding" in lower_head and self.CHUNKED.search(head):
            yield from self.read_chunked_body(rows)
            return
        match = self.LENGTH.search(head) if b"\ncontent-length" in lower_head else None
        size = parse_length(match.group(1)) if match else default_length
        if rows == "events":
            yield from self.read_events(size)       # END_OF_MESSAGE ends the last row too
        else:
            yield size

    def read_events(self, size):
        """Read `size` bytes of a text/event-stream. An empty line ends an event.

        Yields END_OF_ROW where an event ends. But if an event ends at the end of the `size` bytes,
        returns True instead.
        """
        row_ends = False
        for index in range(size):
            byte = yield NeedBytes(1)
            row_ends = byte == b"\n" and self.line_is_empty     # the line is "\n" or "\r\n"
            self.line_is_empty = byte == b"\n" or (byte == b"\r" and self.line_is_empty)
            if row_ends and index < size - 1:
                yield END_OF_ROW
        return row_ends

    def read_chunked_body(self, rows):
        """Read a chunked body and its trailer. `rows`: "chunks", "events", or "" for no rows."""
        while True:
            line = yield LINE
            match = self.CHUNK_SIZE.match(line)
            if not match:
                raise ProtocolError("%r is not a chunk" % line[:20])
            size = int(match.group(1), 16)
            if not size:
                break
            if rows == "events":            # an event may begin in one chunk and end in another
                row_ends, unread = (yield from self.read_events(size)), 0
            else:
                row_ends, unread = rows == "chunks", size
            yield unread + len(b"\r\n")     # the line end of a chunk belongs to the row
            if row_ends:
                yield END_OF_ROW
        while (yield LINE).strip():         # trailer fields, up to an empty line
            pass

    def rewrite_head(self, head):
        """Return the head with the new value of the Host header field, or `head` itself."""
        if not self.host:
            return head
        fields_offset, last = head.find(b"\n"), self.last_fields
        if head[fields_offset:] == last.text:       # the header fields of the last request
            return head if last.rewritten is last.text else head[:fields_offset] + last.rewritten
        match = self.HOST.search(head)
        value = match and match.group(1)
        if not value or value.lower() == self.host:
            return head
        return head[:match.start(1)] + self.host + head[match.end(1):]

    def refuse_client(self, received):
        """Return the Reply to the first bytes of a request."""
        if not received:                    # OPEN: HTTP has no reply before a request
            return None
        name = "HEAD" if received.startswith(b"HEAD ") else ""
        request = Request(received, name, info=True)    # True: the reply closes the connection
        return self.error_reply(self.overload_error, request)

    def error_reply(self, kind, request):
        """Return the Reply to a request. Any request can fail with an error of any kind."""
        closes = request.info               # the server closes the connection after the reply
        status = "%s %s" % (kind, self.errors[kind])
        body = status + "\n"
        lines = ["HTTP/1.1 " + status, "Content-Type: text/plain",
                 "Content-Length: %d" % len(body)]
        if kind in ("429", "503"):
            lines.append("Retry-After: 5")
        if closes:
            lines.append("Connection: close")
        head = "\r\n".join(lines) + "\r\n\r\n"
        reply = head if request.name == "HEAD" else head + body
        return Reply(reply.encode(), closes=closes)


@protocol
class Redis(Protocol):
    """RESP2, RESP3 and inline commands (redis.io, protocol specification).

    Request.info tells whether the command is in a transaction.
    """

    errors = {
        "LOADING": "Redis is loading the dataset in memory",
        "BUSY": "Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN "
                "NOSAVE.",
        "OOM": "command not allowed when used memory > 'maxmemory'.",
        "READONLY": "You can't write against a read only replica.",
        "MISCONF": "Redis is configured to save RDB snapshots, but it's currently unable to "
                   "persist to disk. Commands that may modify the data set are disabled, "
                   "because this instance is configured to report errors during writes if RDB "
                   "snapshotting fails (stop-writes-on-bgsave-error option). Please check the "
                   "Redis logs for details about the RDB error.",
        "MASTERDOWN": "Link with MASTER is down and replica-serve-stale-data is set to 'no'.",
        "NOREPLICAS": "Not enough good replicas to write.",
        "CLUSTERDOWN": "The cluster is down", "MOVED": "3999 127.0.0.1:6381",
        "ASK": "3999 127.0.0.1:6381",
        "TRYAGAIN": "Multiple keys request during rehashing of slot",
        "NOAUTH": "Authentication required.",
        "MAXCLIENTS": "max number of clients reached"}
    default_errors = ("LOADING", "BUSY", "OOM", "READONLY", "MISCONF", "CLUSTERDOWN")
    connect_errors = ("MAXCLIENTS",)
    never_fail = ("QUIT", "RESET", "MULTI", "EXEC", "DISCARD")
    credentials = ("ACL", "AUTH", "CONFIG", "HELLO", "MIGRATE")
    overload_error = "MAXCLIENTS"
    # Commands after which the server sends data without a request
    SERVER_PUSH = {"SUBSCRIBE", "PSUBSCRIBE", "SSUBSCRIBE", "MONITOR", "SYNC", "PSYNC",
                   "REPLCONF"}
    # Commands that may change how the connection continues: see change_mode
    MODE_COMMANDS = SERVER_PUSH | {"CLIENT", "MULTI", "EXEC", "DISCARD", "RESET"}
    STRINGS = (b"$", b"=", b"!")
    VALUES_PER_ITEM = {b"*": 1, b"~": 1, b"%": 2}       # of arrays, sets and maps (key and value)
    has_rows = True         # the items of the reply, but not the items of nested values
    UNKNOWN_COMMAND = b"*1\r\n$7\r\nvaurien\r\n"
    REPLY_LINE = NeedMatch(rb"\n", beginning_with(rb"[$=!*~%|+:_#,(-]"), "no type of a reply")
    in_multi = False        # the client is in a transaction, between MULTI and EXEC or DISCARD

    def requests(self):
        """Find the commands: arrays of bulk strings, and lines of text (inline commands)."""
        while True:
            line = yield COMMAND_LINE
            if line[:1] == b"*":
                yield from self.read_array(line)
            else:
                yield self.make_request(line.split())
            yield END_OF_MESSAGE

    def read_array(self, line):
        """Read a command that is an array of bulk strings, after the first line of the array.

        Yields the Request at the end of the array, or after MATCH_MAX bytes of the arguments.
        """
        is_null = line[1:2] == b"-"
        count = 0 if is_null else parse_length(line[1:], largest=1 << 20)
        args, text_left = [], MATCH_MAX     # how many bytes of arguments `match` still searches
        for index in range(count):
            size = self.argument_size((yield LINE))
            if size > text_left:
                args.append((yield NeedBytes(text_left)))
                yield self.make_request(args)
                yield size - text_left + len(b"\r\n")       # skip the rest of the argument
                for _ in range(index + 1, count):           # skip the arguments after it
                    yield self.argument_size((yield LINE)) + len(b"\r\n")
                return
            argument = yield NeedBytes(size + len(b"\r\n"))
            args.append(argument[:size])
            text_left -= size
        yield self.make_request(args)

    def argument_size(self, line):
        """Return the size of an argument: b"$3\\r\\n" begins an argument of 3 bytes."""
        if line[:1] != b"$":
            raise ProtocolError("%r in a command" % line[:20])
        return parse_length(line[1:])

    def parse_whole_request(self, data):
        """Return the Request if data is exactly one array of bulk strings, otherwise None."""
        # b"*2\r\n$3\r\nGET\r\n$1\r\na\r\n" becomes the lines *2, $3, GET, $1, a and an empty line.
        lines = data.split(b"\r\n")
        args = lines[2:-1:2]
        if not args or lines[-1] or lines[0] != b"*%d" % len(args):
            return None
        if lines[1:-1:2] != [b"$%d" % len(arg) for arg in args]:
            return None
        return self.make_request(args)

    def make_request(self, args):
        """Return the Request of a command. Raises ProtocolError: see change_mode."""
        name = args[0].upper().decode("latin-1") if args else ""
        is_in_transaction = self.in_multi
        if name in self.MODE_COMMANDS:
            self.change_mode(name, args)
        has_reply = bool(args)              # Redis ignores an empty command
        return Request(b" ".join(args), name, has_reply, is_in_transaction)

    def change_mode(self, name, args):
        """Set `in_multi` for the next command.

        Raises ProtocolError at a command after which replies and requests do not alternate.
        """
        ends_parsing = name in self.SERVER_PUSH
        if name == "CLIENT" and len(args) > 1:
            ends_parsing = args[1].upper() in (b"REPLY", b"TRACKING")
        if ends_parsing:
            raise ProtocolError("after %s, replies and requests do not alternate" % name)
        if name != "CLIENT":
            self.in_multi = name == "MULTI"

    def replies(self):
        """Find the replies. A reply is one value, which may have nested values."""
        while True:
            line = yield self.REPLY_LINE
            while line[:1] == b"|":             # attributes come before the value that has them
                yield from self.read_values(2 * parse_length(line[1:]))     # names and values
                line = yield self.REPLY_LINE
            if line[:1] in self.STRINGS:
                yield self.string_size(line)
            elif line[:1] in self.VALUES_PER_ITEM:
                yield from (self.read_rows(line) if self.counts_rows
                            else self.read_values(self.nested_values(line)))
            yield END_OF_MESSAGE

    def read_rows(self, line):
        """Read the items of a value, after its first line. Yields END_OF_ROW after each item."""
        row_size = self.VALUES_PER_ITEM[line[:1]]
        for _ in range(self.nested_values(line) // row_size):
            yield from self.read_values(row_size)
            yield END_OF_ROW

    def read_values(self, count):
        """Read values, and the values nested in them."""
        strings, reply_line = self.STRINGS, self.REPLY_LINE
        while count:
            line = yield reply_line
            count -= 1
            if line[:1] in strings:
                yield self.string_size(line)
            else:
                count += self.nested_values(line)

    def string_size(self, line):
        """Return how many bytes of a string follow its first line."""
        has_size = line[1:2] not in (b"-", b"?")        # null and streamed strings have no size
        return parse_length(line[1:]) + len(b"\r\n") if has_size else 0

    def nested_values(self, line):
        """Return how many values belong to a value, after its first line."""
        if line[:1] == b"|":                # attributes, and then the value that has them
            return 2 * parse_length(line[1:]) + 1
        is_null = line[1:2] == b"-"         # the size -1
        if line[:1] not in self.VALUES_PER_ITEM or is_null:
            return 0
        return parse_length(line[1:]) * self.VALUES_PER_ITEM[line[:1]]

    def parse_whole_reply(self, data):
        """Return whether data is exactly one line or one bulk string."""
        type_, line_end = data[:1], data.find(b"\n") + 1
        if type_ in (b"+", b"-", b":"):
            return line_end == len(data)
        size = data[1:line_end - 2]
        if type_ != b"$" or data[line_end - 2:line_end] != b"\r\n" or not size.isdigit():
            return False
        # Nine digits suffice for the size of a chunk of data. int() of many digits is slow.
        return line_end + int(size[:9]) + len(b"\r\n") == len(data)

    def encode_error(self, kind):
        # Redis has no code of its own for too many clients, and sends the general code ERR.
        code = "ERR" if kind == "MAXCLIENTS" else kind
        return ("-%s %s\r\n" % (code, self.errors[kind])).encode()

    def make_substitute(self, kind, request):
        """Return an unknown command for a command in a transaction, so that the EXEC fails."""
        is_in_transaction = request.info
        return self.UNKNOWN_COMMAND if is_in_transaction else b""


@protocol
class Memcache(Protocol):
    """The text protocol of memcached, with its meta commands (doc/protocol.txt).

    A quiet meta command gets a reply only in some cases. A client sends `mn` after quiet commands,
    because the reply to `mn` shows that no replies to quiet commands will follow. If a rule
    refuses a command after quiet commands, the backend gets `mn` in place of the command. The
    client gets the error after the reply to `mn`, and after all replies to quiet commands.

    If `mn` has replaced the request, Request.info has the last bytes from the backend, because the
    reply to `mn` may begin in these bytes. Otherwise, Request.info is None.
    """

    errors = {
        "SERVER_ERROR": "SERVER_ERROR out of memory",
        "OUT_OF_MEMORY": "SERVER_ERROR out of memory storing object",
        "WRITING": "SERVER_ERROR out of memory writing get response",
        "TOO_LARGE": "SERVER_ERROR object too large for cache",
        "CLIENT_ERROR": "CLIENT_ERROR bad data chunk", "ERROR": "ERROR",
        "TOO_MANY": "ERROR Too many open connections"}
    default_errors = ("SERVER_ERROR",)
    connect_errors = ("TOO_MANY",)
    never_fail = ("mn",)
    overload_error = "TOO_MANY"
    # {command with a body: which word of the command is the size of the body}
    SIZE_INDEX = {"set": 4, "add": 4, "replace": 4, "append": 4, "prepend": 4, "cas": 4, "ms": 2}
    GET = {"get", "gets", "gat", "gats"}
    META = {"mg", "ms", "md", "ma", "me", "mn"}
    MN, MN_REPLY = b"mn\r\n", b"MN\r\n"
    COMMAND_LINE = NeedMatch(rb"\n", rb"(?!\x80)" + TEXT,
                             "the binary protocol, or a control character in a command")
    REPLY_LINE = NeedMatch(rb"\n", beginning_with(rb"[0-9A-Za-z]"), "no line of a reply")
    quiet_sent = False      # the backend has got a quiet command, and no `mn` after it

    def requests(self):
        """Find the commands: lines, some of them with a body."""
        while True:
            line = yield self.COMMAND_LINE
            words = line.split()
            name = words[0].decode("latin-1") if words else ""
            if name in ("watch", "lru_crawler"):
                raise ProtocolError("%s starts server push" % name)
            body_size = self.body_size(name, words)
            # The flags of a meta command follow the key. A flag is a letter with a value.
            flags = [word[:1] for word in words[2:]] if name in self.META else []
            is_quiet = b"q" in flags
            is_noreply = words[-1:] == [b"noreply"] and name not in self.GET    # in a GET: a key
            gets_no_reply = is_quiet or is_noreply or name == "quit"
            request = Request(line.strip(), name, replies=not gets_no_reply)
            yield request       # a rule may refuse the request now: see make_substitute
            if is_quiet:
                self.quiet_sent = True
            elif self.is_mn(request):       # its reply comes after all replies to quiet commands
                self.quiet_sent = False
            yield body_size
            yield END_OF_MESSAGE

    def body_size(self, name, words):
        """Return the size of a command's body with its line end. Returns 0 without a body."""
        index = self.SIZE_INDEX.get(name)
        if index is None or index >= len(words):        # memcached reads no body without a size
            return 0
        return parse_length(words[index]) + len(b"\r\n")

    def replies(self):
        """Find the replies: one line, or several lines, some of them with a body."""
        while True:
            line = yield self.REPLY_LINE
            words, request = line.split(), self.awaited_request()
            type_ = words[0]
            if type_ == b"VALUE" and len(words) > 3:
                yield parse_length(words[3]) + len(b"\r\n")
                continue                    # the reply ends with an END line
            if type_ == b"VA" and len(words) > 1:
                yield parse_length(words[1]) + len(b"\r\n")
            is_statistic = type_ in (b"STAT", b"ITEM", b"PREFIX")       # an END line follows
            is_quiet_reply = self.is_mn(request) and type_ != b"MN"     # an MN line follows
            if not is_statistic and not is_quiet_reply:
                yield END_OF_MESSAGE

    def is_mn(self, request):
        """Return whether the request is `mn`, or the backend gets `mn` in place of the request."""
        return request.name == "mn" or request.info is not None

    def make_substitute(self, kind, request):
        """Return `mn` if the backend has got quiet commands, otherwise b""."""
        if not self.quiet_sent:
            return b""
        request.info = b""                  # shows that `mn` has replaced the request
        return self.MN

    def finish_refusal(self, exchange, t, to, data):
        """Let the replies to quiet commands pass. Drop only the reply to `mn`."""
        request = exchange.request          # None if a client that connects was refused
        replaced_by_mn = request and request.info is not None
        awaits_mn_reply = replaced_by_mn and to == DOWNSTREAM and not exchange.reply_done
        if awaits_mn_reply and (data or data is EOF):
            yield from self.pass_quiet_replies(request, t, data)
        else:                               # at END_OF_MESSAGE, the client gets the error
            yield from super().finish_refusal(exchange, t, to, data)

    def pass_quiet_replies(self, request, t, data):
        """Yield events with the bytes from the backend that cannot be the reply to `mn`.

        data    bytes from the backend, or EOF.
        """
        if data is EOF:                 # the backend has sent no reply to `mn`
            passed, request.info = request.info, b""
        else:
            received, size = request.info + data, len(self.MN_REPLY)
            passed, request.info = received[:-size], received[-size:]
        if passed:
            yield t, DOWNSTREAM, passed
        if data is EOF:
            yield t, DOWNSTREAM, EOF


class StatementTexts(OrderedDict):
    """The texts of the prepared statements of a connection, {key: text}.

    A client may prepare any number of statements, and may drop statements by SQL, but no SQL is
    parsed. Therefore the least recently used texts are forgotten when all texts together take more
    than STATEMENTS_MAX bytes. In place of a forgotten text, `match` searches in b"".
    """

    size = 0            # bytes of memory that all texts take

    def __setitem__(self, key, text):
        self.forget(key)
        super().__setitem__(key, text)
        self.size += len(key) + len(text) + STATEMENT_OVERHEAD
        while self.size > STATEMENTS_MAX:
            self.forget(next(iter(self)))       # the least recently used text

    def forget(self, key):
        """Forget the text with this key, if there is one."""
        if key in self:
            self.size -= len(key) + len(self[key]) + STATEMENT_OVERHEAD
            del self[key]

    def use(self, key):
        """Return the text with this key, or b"". The text becomes the most recently used text."""
        if key not in self:
            return b""
        self.move_to_end(key)
        return self[key]


def mysql_packet(sequence, body):
    """Return a packet of MySQL's protocol."""
    return len(body).to_bytes(3, "little") + bytes([sequence]) + body


def mysql_header(header):
    """Return (size of the body, sequence number) of the header of a packet."""
    return int.from_bytes(header[:3], "little"), header[3]


def mysql_integer(data, offset):
    """Return (number, offset of the next byte) of a length-encoded integer.

    The first byte is the number, or tells the size of a number that follows. If data ends too
    early, each missing byte is read as 0.
    """
    first_byte = data[offset] if offset < len(data) else 0
    start = offset + 1
    size = {0xfc: 2, 0xfd: 3, 0xfe: 8}.get(first_byte)
    if size is None:
        return first_byte, start
    return int.from_bytes(data[start:start + size], "little"), start + size


class SkipRows:
    """Asks to skip packets while each packet is one whole row.

    This is faster than a NeedBytes for each packet.

    left    how many bytes of the last row have not arrived.
    """

    __slots__ = ("left",)

    HEADER = struct.Struct("<IB")       # the size (3 bytes) with the sequence number, and the type

    def __init__(self):
        self.left = 0

    def take(self, buffered, data, offset, size):
        """Return (size, None, b""), or at another packet (offset of the packet, b"", b"")."""
        offset += self.left
        unpack_from = self.HEADER.unpack_from
        while offset + 5 <= size:
            size_and_sequence, type_ = unpack_from(data, offset)
            body_size = size_and_sequence & 0xFFFFFF
            # An EOF, an ERR, or a row that continues in the next packet
            if type_ >= 0xFE or body_size == 0xFFFFFF:
                break
            offset += 4 + body_size
        if offset < size:               # the reader parses the packet at `offset`
            return offset, b"", b""
        self.left = offset - size
        return size, None, b""


class MysqlCommand:
    """The data that Mysql keeps of a command until the reply ends.

    text            the SQL of the command, or of the prepared statement that the command executes.
    statement_id    the id of the prepared statement.
    sequence        the sequence number of the last packet of the command: for finish_reply.
    substitutes     how many commands the backend gets in place of a refused command.
    """

    __slots__ = ("text", "statement_id", "sequence", "substitutes")

    def __init__(self, text=b"", statement_id=b""):
        self.text, self.statement_id, self.sequence, self.substitutes = text, statement_id, 0, 0


@protocol
class Mysql(Protocol):
    """The client/server protocol of MySQL and MariaDB.

    A packet has a header of 4 bytes: the size of the body (3 bytes, little-endian), and the
    sequence number. The body of a command is one byte for the command, and its arguments.

    The reply to PREPARE has these packets: OK, parameters, [EOF], columns, [EOF]. The packets in
    brackets may be missing. The reply to a query is one result, or several results:

        OK, ERR or EOF                      a result without rows.
        count, columns, [EOF], rows, EOF    a result with rows. The last EOF may be an OK.
        LOCAL INFILE, OK                    the client sends a file before the OK.

    The status in the last OK or EOF of a result tells whether another result follows. If the
    status in the first EOF says that a cursor is open, no rows follow.

    Request.info is a MysqlCommand.
    """

    errors = {
        "1205": ("HY000", "Lock wait timeout exceeded; try restarting transaction"),
        "1213": ("40001", "Deadlock found when trying to get lock; try restarting transaction"),
        "1317": ("70100", "Query execution was interrupted"),
        "3024": ("HY000", "Query execution was interrupted, maximum statement execution time "
                          "exceeded"),
        "1969": ("70100", "Query execution was interrupted (max_statement_time exceeded)"),
        "1290": ("HY000", "The MySQL server is running with the --read-only option so it cannot "
                          "execute this statement"),
        "1203": ("42000", "User has already more than 'max_user_connections' active "
                          "connections"),
        "1053": ("08S01", "Server shutdown in progress"),
        "1927": ("70100", "Connection was killed"),
        "4031": ("HY000", "The client was disconnected by the server because of inactivity. See "
                          "wait_timeout and interactive_timeout for configuring this behavior."),
        "1040": ("08004", "Too many connections"),
        "1129": ("HY000", "Host is blocked because of many connection errors; unblock with "
                          "'mysqladmin flush-hosts'")}
    default_errors = ("1205", "1213", "1317", "1290")
    connect_errors = ("1040", "1129")
    overload_error = "1040"
    fatal_errors = ("1053", "1927", "4031")
    server_first = starts_tls = True
    # Commands
    QUIT, QUERY, FIELD_LIST, STATISTICS, PROCESS_INFO, CHANGE_USER = (
        0x01, 0x03, 0x04, 0x09, 0x0a, 0x11)
    PREPARE, EXECUTE, SEND_LONG_DATA, CLOSE, RESET, FETCH, BULK_EXECUTE = (
        0x16, 0x17, 0x18, 0x19, 0x1a, 0x1c, 0xfa)
    WITHOUT_REPLY = {QUIT, SEND_LONG_DATA, CLOSE}
    EXECUTES = {EXECUTE, BULK_EXECUTE}
    WITH_RESULTS = {QUERY, PROCESS_INFO, EXECUTE, BULK_EXECUTE}
    # BINLOG_DUMP, TABLE_DUMP, BINLOG_DUMP_GTID, CLONE, SUBSCRIBE_GROUP_REPLICATION_STREAM
    SERVER_PUSH = {0x12, 0x13, 0x1e, 0x20, 0x21}
    # Types of the backend's packets: the first byte of the body
    OK, LOCAL_INFILE, EOF, ERR = b"\x00", b"\xfb", b"\xfe", b"\xff"
    PROGRESS_REPORT = b"\xff\xff\xff"      # MariaDB: such an ERR comes before the reply
    EOF_SIZE = 5                            # an OK with the type of an EOF is longer
    # Flags of a status
    MORE_RESULTS, CURSOR_EXISTS = 0x08, 0x40
    # Capability flags of the login
    CLIENT_SSL = 0x800
    CLIENT_COMPRESS = 0x20 | 1 << 26        # zlib, zstd
    CLIENT_DEPRECATE_EOF, CLIENT_QUERY_ATTRIBUTES = 1 << 24, 1 << 27
    DEADLOCK = "1213"
    has_rows = True
    LAST_PREPARED = b"\xff\xff\xff\xff"     # MariaDB: the id means the last prepared statement
    PACKET_MAX = 0xFFFFFF                   # a body of this size continues in the next packet
    HEAD_SIZE = 256                         # the most bytes of a backend's packet that are parsed

    def __init__(self, host=b""):
        self.statements = StatementTexts()      # {id: text}
        self.prepared = b""                 # the text of the last PREPARE
        self.loading = False                # the client sends the data of LOCAL INFILE
        self.server_flags = 0xFFFFFFFF      # capability flags of the backend. All, until known
        self.flags = 0                      # capability flags of both client and backend
        self.capabilities_known = False     # the client has sent its first login packet
        super().__init__(host)

    def requests(self):
        """Find the commands. A packet without a command continues a command, or the login."""
        while True:
            size, sequence = mysql_header((yield NeedBytes(4)))
            if size > HEAD_MAX and not self.capabilities_known:     # perhaps bytes of TLS
                raise ProtocolError("no packet of a login")
            is_command = sequence == 0 and size > 0 and not self.loading
            if not is_command:
                yield from self.read_continuation(size, sequence)
                continue
            body = yield NeedBytes(min(size, MATCH_MAX))
            request = self.make_request(body)
            yield request
            yield size - len(body)
            while size == self.PACKET_MAX:      # the command continues in another packet
                size, request.info.sequence = mysql_header((yield NeedBytes(4)))
                yield size
            yield END_OF_MESSAGE

    def read_continuation(self, size, sequence):
        """Read the body of a packet (size, sequence) of the login, or of data of LOCAL INFILE."""
        if not size:
            self.loading = False            # an empty packet ends the data of LOCAL INFILE
        yield CONTINUATION
        is_first_login_packet = sequence > 0 and not self.capabilities_known
        size_left = (yield from self.read_capabilities(size)) if is_first_login_packet else size
        yield size_left
        yield END_OF_MESSAGE

    def read_capabilities(self, size):
        """Read the capability flags: the first 4 bytes of a login packet.

        size    the number of bytes in the packet's body.

        Returns how many bytes of the body are left.
        """
        head = yield NeedBytes(min(4, size))
        flags, size_left = int.from_bytes(head, "little"), size - len(head)
        is_ssl_request = size == 32 and flags & self.CLIENT_SSL     # a login is longer
        if is_ssl_request:
            if not self.joins_tls:
                raise ProtocolError("TLS follows")
            yield size_left
            yield END_OF_MESSAGE
            yield TLS_BEGINS                # the chain starts a new reader, and drops this reader
        if flags & self.CLIENT_COMPRESS:
            raise ProtocolError("compression follows")
        self.capabilities_known, self.flags = True, flags & self.server_flags
        return size_left

    def make_request(self, body):
        """Return the Request of a command. Raises ProtocolError if replication follows."""
        command, statement_id = body[0], body[1:5]      # only some commands have such an id
        text = self.note_statement(body)
        if command in self.SERVER_PUSH:
            raise ProtocolError("replication follows")
        return Request(text, command, replies=command not in self.WITHOUT_REPLY,
                       info=MysqlCommand(text, statement_id))

    def note_statement(self, body):
        """Return the SQL of a command, or of the prepared statement that the command executes.

        Returns b"" for commands without SQL. Keeps the SQL of a PREPARE. Forgets the SQL of a
        statement that a CLOSE names.
        """
        command, statement_id = body[0], body[1:5]
        if command == self.QUERY:
            # Query attributes come before the SQL: usually b"\0\1", which is an empty list.
            has_attributes = self.flags & self.CLIENT_QUERY_ATTRIBUTES
            sql_offset = 3 if has_attributes and body[1:3] == b"\0\1" else 1
            return body[sql_offset:]
        if command == self.PREPARE:
            self.prepared = body[1:]
            return self.prepared
        if command in self.EXECUTES:
            if statement_id == self.LAST_PREPARED:
                return self.prepared
            return self.statements.use(statement_id)
        if command == self.CLOSE:
            self.statements.forget(statement_id)
        return b""

    def replies(self):
        """Find the greeting, the login and the replies, and skip all other packets."""
        while True:
            size, head = yield from self.read_packet()
            request = self.awaited_request()
            if request is not NO_REQUEST:
                yield from self.read_reply(request, size, head)
                yield END_OF_MESSAGE
            elif self.awaited_exchanges():      # the packet is the greeting of the backend
                self.note_greeting(head)
                yield END_OF_MESSAGE
                yield from self.read_login()

    def note_greeting(self, head):
        """Keep the capability flags of the greeting."""
        # protocol (1 byte), version, zero byte, connection id (4), nonce (8), filler (1), lower
        # flags (2), character set (1), status (2), upper flags (2)
        _, _, fields = head.partition(b"\0")
        lower, upper = fields[13:15], fields[18:20]
        self.server_flags = int.from_bytes(lower + upper, "little")

    def read_login(self):
        """Read the packets of a login, up to an OK or ERR."""
        head = b""
        while head[:1] not in (self.OK, self.ERR):
            _, head = yield from self.read_packet()

    def read_packet(self):
        """Read a packet, and the packets that continue its body. Skips progress reports.

        Returns (size, head): the size of the first packet's body, and its first HEAD_SIZE bytes.
        """
        while True:
            size, _ = mysql_header((yield NeedBytes(4)))
            head = yield NeedBytes(min(size, self.HEAD_SIZE))
            yield size - len(head)
            last_size = size
            while last_size == self.PACKET_MAX:
                last_size, _ = mysql_header((yield NeedBytes(4)))
                yield last_size
            if not head.startswith(self.PROGRESS_REPORT):
                return size, head

    def read_reply(self, request, size, head):
        """Read the rest of a reply, after its first packet (size, head)."""
        command, type_ = request.name, head[:1]
        if request.info.substitutes:        # the reply to each substitute is one packet
            for _ in range(1, request.info.substitutes):
                yield from self.read_packet()
        elif type_ == self.ERR or command == self.STATISTICS:
            pass                            # the reply is one packet
        elif command in self.WITH_RESULTS:
            yield from self.read_results(size, head)
        elif command == self.PREPARE:
            yield from self.read_prepared(request, head)
        elif command in (self.FIELD_LIST, self.FETCH):
            yield from self.read_rows(size, head)
        elif command == self.CHANGE_USER and type_ != self.OK:
            yield from self.read_login()
        elif type_ not in (self.OK, self.EOF):      # any other reply is one OK or EOF
            raise ProtocolError("an unknown reply to command %d" % command)

    def read_results(self, size, head):
        """Read the rest of a reply that has results, after its first packet (size, head)."""
        while True:
            self.loading = head[:1] == self.LOCAL_INFILE        # the client sends a file now
            if head[:1] in (self.OK, self.ERR):
                status = self.status(size, head)
            elif self.loading:
                status = self.MORE_RESULTS      # the OK or ERR after the file
            else:
                status = yield from self.read_result(size, head)
            if not status & self.MORE_RESULTS:
                return
            size, head = yield from self.read_packet()

    def read_result(self, size, head):
        """Read the rest of a result with rows, after its first packet (size, head).

        Returns the status of the result.
        """
        column_count, end = mysql_integer(head, 0)
        # MariaDB sends the count and a 0, without the columns, if the client has the columns.
        omits_columns = size == end + 1 and head[end] == 0
        if not omits_columns:
            for _ in range(column_count):
                yield from self.read_packet()
        size, head = yield from self.read_packet()
        if head[:1] == self.EOF and size == self.EOF_SIZE:
            status = self.status(size, head)
            if status & self.CURSOR_EXISTS:     # the client gets the rows later, by FETCH
                return status
            size, head = yield from self.read_packet()
        return (yield from self.read_rows(size, head))

    def read_rows(self, size, head):
        """Read rows from the packet (size, head) on. Returns the status after the last row."""
        while self.is_row(size, head):
            if self.counts_rows:
                yield END_OF_ROW
            else:
                yield SkipRows()
            size, head = yield from self.read_packet()
        return self.status(size, head)

    def is_row(self, size, head):
        """Return whether a packet is a row, and not the EOF or ERR after the rows."""
        # A row begins like an EOF if the first value of the row has 16 MiB or more.
        return head[:1] not in (self.EOF, self.ERR) or size == self.PACKET_MAX

    def read_prepared(self, request, head):
        """Read the parameters and the columns in the reply to PREPARE. Keep the statement's text.

        head    a zero byte, the id (4 bytes), the numbers of columns (2) and of parameters (2)
        """
        statement_id, column_count, parameter_count = head[1:5], head[5:7], head[7:9]
        self.statements[statement_id] = request.info.text
        eof_count = 0 if self.flags & self.CLIENT_DEPRECATE_EOF else 1
        for number in parameter_count, column_count:
            count = int.from_bytes(number, "little")
            packets = count + eof_count if count else 0     # no EOF follows an empty list
            for _ in range(packets):
                yield from self.read_packet()

    def status(self, size, head):
        """Return the status flags in an OK or EOF. Returns 0 for an ERR."""
        if head[:1] == self.ERR:
            return 0
        offset = 3                              # in an EOF, after the number of warnings
        if size != self.EOF_SIZE:               # in an OK, after the affected rows and the last id
            _, offset = mysql_integer(head, 1)
            _, offset = mysql_integer(head, offset)
        return int.from_bytes(head[offset:offset + 2], "little")

    def encode_error(self, kind):
        """Return an ERR packet."""
        sqlstate, text = self.errors[kind]
        code = self.ERR + int(kind).to_bytes(2, "little")
        if kind in self.connect_errors:     # before the login, an ERR has no SQLSTATE
            return mysql_packet(0, code + text.encode())
        # 1 is the sequence number of a reply to one packet. finish_reply sets any other number.
        return mysql_packet(1, code + ("#" + sqlstate + text).encode())

    def make_substitute(self, kind, request):
        """Return commands after which the backend has the same state as after an error."""
        commands, statement_id = [], request.info.statement_id
        if request.name == self.PREPARE:
            # After a PREPARE that fails, LAST_PREPARED is no valid id.
            commands.append(bytes([self.PREPARE]) + b"vaurien")
        elif request.name in self.EXECUTES and statement_id != self.LAST_PREPARED:
            # An EXECUTE uses up the data of SEND_LONG_DATA, and a RESET removes the data.
            commands.append(bytes([self.RESET]) + statement_id)
        if kind == self.DEADLOCK:           # a deadlock rolls back the whole transaction
            commands.append(bytes([self.QUERY]) + b"ROLLBACK")
        request.info.substitutes = len(commands)
        return b"".join(mysql_packet(0, body) for body in commands)

    def finish_reply(self, reply, request):
        """Return the packet of the reply, with the next sequence number after the request."""
        size, body = reply.data[:3], reply.data[4:]
        return size + bytes([(request.info.sequence + 1) % 256]) + body


def pg_message(type_, body):
    """Return a message of PostgreSQL's protocol."""
    return type_ + struct.pack(">I", 4 + len(body)) + body


class PostgresReply:
    """The data that Postgres keeps of a request until the reply ends.

    end_types     the types of messages that can end the reply to an EXECUTE, otherwise b"".
    bound         whether BindComplete has arrived.
    copy_ended    whether the client has sent CopyDone or CopyFail after the request.
    """

    __slots__ = ("end_types", "bound", "copy_ended")

    def __init__(self, end_types=b""):
        self.end_types, self.bound, self.copy_ended = end_types, False, False


@protocol
class Postgres(Protocol):
    """The frontend/backend protocol 3 of PostgreSQL.

    A message is its type (1 byte), a size (4 bytes), and a body. The size counts the body and the
    4 bytes of the size.

    A simple query is one Query message. An extended query is a batch of messages: Parse, Bind,
    Describe, Execute, and a Sync at the end. A Bind makes a portal from a prepared statement, and
    an Execute runs a portal. After an error, the backend skips all messages up to the next Sync.

    Messages that are not in this table, such as Parse, belong to the next request:

        Request.name    messages of the request    last message of the reply
        QUERY           Query or FunctionCall      ReadyForQuery
        EXECUTE         Bind and its Execute       CommandComplete or an error
        EXECUTE         Bind without an Execute    BindComplete or an error
        EXECUTE         Execute without a Bind     CommandComplete or an error
        SYNC            Sync                       ReadyForQuery

    Request.info is a PostgresReply.
    """

    errors = {
        "57014": "canceling statement due to statement timeout",
        "40001": "could not serialize access due to concurrent update",
        "40P01": "deadlock detected", "55P03": "canceling statement due to lock timeout",
        "25006": "cannot execute INSERT in a read-only transaction",
        "53100": "could not extend file: No space left on device", "53200": "out of memory",
        "57P01": "terminating connection due to administrator command",
        "25P03": "terminating connection due to idle-in-transaction timeout",
        "57P05": "terminating connection due to idle-session timeout",
        "57P03": "the database system is starting up",
        "53300": "sorry, too many clients already"}
    alpn = ("postgresql",)
    starts_tls = True
    default_errors = ("57014", "40001", "40P01", "55P03")
    connect_errors = ("57P03", "53300")
    overload_error = "53300"
    fatal_errors = ("57P01", "25P03", "57P05")
    never_fail = ("SYNC",)
    server_first = has_rows = True
    # Codes of first messages. The code of a startup message is a version.
    TLS, GSS, CANCEL = 80877103, 80877104, 80877102
    # Types of the client's messages
    QUERY, PARSE, BIND, EXECUTE, SYNC, CLOSE = b"Q", b"P", b"B", b"E", b"S", b"C"
    WITH_TEXT = b"QPBEC"            # messages with SQL, or with the name of a statement or portal
    REQUESTS = b"QFSBE"             # Query, FunctionCall, Sync, Bind, Execute
    CONTINUATIONS = b"dcfpHX"       # CopyData, CopyDone, CopyFail, password, Flush, Terminate
    COPY_ENDS = b"cf"               # CopyDone, CopyFail
    # Types of the backend's messages
    READY, ERROR = b"Z", b"E"       # ReadyForQuery, ErrorResponse
    COPY_RESPONSES = b"GW"          # CopyInResponse, CopyBothResponse
    BIND_COMPLETE = b"2"
    BIND_ENDS = b"2E"               # BindComplete, ErrorResponse: for a Bind without its Execute
    ROWS = b"Dd"                    # DataRow, CopyData
    EXECUTE_ENDS = b"CIsE"          # CommandComplete, EmptyQuery, PortalSuspended, ErrorResponse
    IDLE, FAILED = b"I", b"E"       # ReadyForQuery: no transaction, a failed transaction
    # Statements that end a transaction
    ROLLBACK = re.compile(rb"(?i)\s*(rollback|abort)\b")
    COMMIT = re.compile(rb"(?i)\s*(commit|end)\b")
    # Substitutes for a simple query
    INVALID_QUERY = pg_message(QUERY, b"vaurien\0")
    ROLLBACK_QUERY = pg_message(QUERY, b"ROLLBACK\0")
    # Substitutes for an extended query. INVALID_PARSE makes the backend skip to the Sync.
    INVALID_PARSE = pg_message(PARSE, b"vaurien\0" + b"vaurien\0" + bytes(2))
    ROLLBACK_BATCH = (pg_message(PARSE, b"\0" + b"ROLLBACK\0" + bytes(2))
                      + pg_message(BIND, bytes(8)) + pg_message(EXECUTE, bytes(5))
                      + INVALID_PARSE)

    def __init__(self, host=b""):
        self.statements = StatementTexts()      # {name: text}
        self.portals = StatementTexts()         # {name: text of the portal's statement}
        self.last_request = Request(b"", "", info=PostgresReply())     # the client's last request
        self.bound_portal = None    # the portal of a Bind that waits for its Execute, or None
        self.encryption_requested = False       # the backend replies with one byte, no message
        self.status = self.IDLE     # the status of the transaction in the last ReadyForQuery
        self.skipping = False       # the backend skips all messages up to the next Sync
        self.copying = False        # the backend reads COPY data, and ignores Sync
        super().__init__(host)

    def requests(self):
        """Find the startup messages and the requests."""
        yield from self.read_startup()
        while True:
            yield from self.read_request()

    def read_startup(self):
        """Read the messages before the first Request, up to and with the startup message."""
        while True:
            size, code = struct.unpack(">II", (yield NeedBytes(8)))
            is_startup = code >> 16 == 3        # the code is a version 3.x
            asks_for_encryption = code in (self.TLS, self.GSS)
            if not (is_startup or asks_for_encryption or code == self.CANCEL):
                raise ProtocolError("no startup message")
            if asks_for_encryption:
                # The reply is one byte, but the reader in use awaits 5 bytes: use a new reader.
                self.encryption_requested = True        # the new reader awaits one byte
                self.reply_framer.restart(self.replies())
            yield CONTINUATION
            yield max(0, size - 8)
            yield END_OF_MESSAGE
            if is_startup:
                return

    def read_request(self):
        """Read messages, up to the first message that makes or continues a request."""
        boundary = None
        while boundary is None:
            type_, message_size = struct.unpack(">cI", (yield NeedBytes(5)))
            size, body = message_size - 4, b""
            if not type_.isalpha() or size < 0:
                raise ProtocolError("%r is not a message" % type_)
            if type_ in self.WITH_TEXT:
                body = yield NeedBytes(min(size, MATCH_MAX))
            boundary = self.make_boundary(type_, body)
            if boundary is not None:
                yield boundary
            yield size - len(body)
        yield END_OF_MESSAGE

    def make_boundary(self, type_, body):
        """Return the Request that the message (type_, body) begins. Update the state.

        Returns CONTINUATION if the message belongs to the last request. Returns None if the
        message belongs to the next request, as a Parse before its Bind.
        """
        if type_ in self.CONTINUATIONS:
            if type_ in self.COPY_ENDS:
                self.last_request.info.copy_ended = True
                self.copying = False
            return CONTINUATION
        self.note_names(type_, body)
        if type_ not in self.REQUESTS:
            return None
        portal, _, _ = body.partition(b"\0")        # only Bind and Execute have a portal
        waiting_portal = self.bound_portal          # None unless the last request is a Bind
        self.bound_portal = portal if type_ == self.BIND else None
        if type_ == self.EXECUTE and portal == waiting_portal:
            return CONTINUATION                     # a Bind and its Execute are one request
        if waiting_portal is not None:
            self.expect_no_execute(self.last_request)
        self.last_request = self.make_request(type_, body, portal)
        return self.last_request

    def expect_no_execute(self, request):
        """Expect only a BindComplete as the reply to a Bind without an Execute."""
        if request.info.end_types == self.ERROR:    # the backend gets a substitute, and no Bind
            return
        request.info.end_types = self.BIND_ENDS
        if request.info.bound:              # the BindComplete has arrived already
            request.replies = False

    def note_names(self, type_, body):
        """Update `statements` and `portals` after the message (type_, body)."""
        if type_ == self.PARSE:         # the name of the statement, its SQL, and more fields
            name, _, rest = body.partition(b"\0")
            sql, _, _ = rest.partition(b"\0")
            self.statements[name] = sql
        elif type_ == self.CLOSE:       # S for a statement or P for a portal, and the name
            texts = self.statements if body[:1] == b"S" else self.portals
            texts.forget(body[1:-1])    # without the zero byte at the end
        elif type_ == self.BIND:        # the names of the portal and the statement, and more
            portal, _, rest = body.partition(b"\0")
            statement, _, _ = rest.partition(b"\0")
            self.portals[portal] = self.statements.use(statement)

    def make_request(self, type_, body, portal):
        """Return the Request that the message (type_, body) begins."""
        if type_ in (self.BIND, self.EXECUTE):
            return Request(self.portals.use(portal), "EXECUTE", replies=not self.skipping,
                           info=PostgresReply(self.EXECUTE_ENDS))
        if type_ == self.SYNC:
            self.skipping = False
            follows_execute = self.last_request.name == "EXECUTE"   # its rules act on the Sync too
            return Request(b"", "SYNC", replies=not self.copying, info=PostgresReply(),
                           independent=not follows_execute)
        return Request(body.rstrip(b"\0"), "QUERY", replies=not self.skipping,
                       info=PostgresReply())

    def replies(self):
        """Find the replies, and update the state for each message."""
        while True:
            if self.encryption_requested:
                yield from self.read_encryption_reply()
                continue
            type_, message_size = struct.unpack(">cI", (yield NeedBytes(5)))
            if not type_.isalnum():
                raise ProtocolError("%r is not a message" % type_)
            size = message_size - 4
            status_size = 1 if type_ == self.READY else 0
            if size < status_size:
                raise ProtocolError("a message cannot have the size %d" % message_size)
            if type_ == self.READY:
                self.status = yield NeedBytes(status_size)
            yield size - status_size
            if self.counts_rows and type_ in self.ROWS:
                yield END_OF_ROW
            if self.note_message(type_):
                yield END_OF_MESSAGE

    def note_message(self, type_):
        """Update the state for a message. Returns whether the message ends a reply.

        READY ends each reply. A reply to EXECUTE also ends with one of its `end_types`. After an
        ERROR, the backend skips all messages up to the Sync.
        """
        if type_ == self.READY:
            return True
        if type_ == self.ERROR and not self.awaited_exchanges():
            self.skip_to_sync()             # a Parse has failed, and its Bind has not come yet
            return False
        request = self.awaited_request()
        if request.name != "EXECUTE":
            return False
        if type_ in request.info.end_types:
            if type_ == self.ERROR:
                self.skip_to_sync()         # while the EXECUTE is still in the queue
            return True
        if type_ in self.COPY_RESPONSES:
            self.begin_copy()
        elif type_ == self.BIND_COMPLETE:
            request.info.bound = True
        return False

    def read_encryption_reply(self):
        """Read the one byte that accepts or refuses encryption."""
        self.encryption_requested = False
        reply = yield NeedBytes(1)
        accepts_tls, accepts_gss = reply == b"S", reply == b"G"
        if accepts_tls and self.joins_tls:
            yield TLS_BEGINS
        elif accepts_tls or accepts_gss:
            raise ProtocolError("encryption follows")

    def begin_copy(self):
        """Expect no replies to Syncs in the COPY data, which the backend now begins to read."""
        copy, *later = [exchange.request for exchange in self.awaited_exchanges()]
        copy_ended = copy.info.copy_ended
        for request in later:
            if copy_ended:
                break
            request.replies = False                 # the backend ignores a Sync in COPY data
            copy_ended = request.info.copy_ended    # after this Sync
        self.copying = not copy_ended

    def skip_to_sync(self):
        """After an error, expect no reply to the requests before the next Sync."""
        self.copying = False                    # an error ends a COPY
        for exchange in self.awaited_exchanges()[1:]:       # the first exchange gets the error
            if exchange.request.name == "SYNC":
                return
            exchange.request.replies = False
        self.skipping = True                    # the client has not sent the Sync yet

    def finish_reply(self, reply, request):
        """Add a ReadyForQuery, with the backend's last status, to the error of a simple query."""
        if request.name != "QUERY":
            return reply.data
        return reply.data + pg_message(self.READY, self.status)

    def encode_error(self, kind):
        """Return an ErrorResponse: the severity (twice), the SQLSTATE and the message."""
        is_fatal = kind in self.fatal_errors or kind in self.connect_errors
        severity = "FATAL" if is_fatal else "ERROR"
        fields = [("S", severity), ("V", severity), ("C", kind), ("M", self.errors[kind])]
        body = "".join("%s%s\0" % field for field in fields) + "\0"
        return pg_message(self.ERROR, body.encode())

    def connect_error(self, kind, data):
        """Return the Reply to a client that connects. A request for encryption gets no error."""
        if kind not in self.connect_errors:
            return None
        if data is OPEN:
            return Reply(b"")                       # wait for the first message
        code = int.from_bytes(data[4:8], "big")     # after the size
        if code in (self.TLS, self.GSS):
            return Reply(b"N")                      # no encryption. The startup message follows
        return Reply(self.encode_error(kind), closes=True)

    def refuse_client(self, received):
        """Return the Reply to a first message, or None if its size and code have not come yet."""
        return super().refuse_client(received) if len(received) >= 8 else None

    def error_reply(self, kind, request):
        """Return the Reply to a request, or None if only a fatal error can happen."""
        # A ROLLBACK, or a request in a failed transaction, can only have a fatal error.
        only_fatal = self.status == self.FAILED or self.ROLLBACK.match(request.text)
        if only_fatal and kind not in self.fatal_errors:
            return None
        return super().error_reply(kind, request)

    def make_substitute(self, kind, request):
        """Return messages after which the transaction has the same state as after an error.

        A failed COMMIT ends the transaction, so a ROLLBACK replaces the COMMIT. An invalid
        statement replaces any other statement, and makes the transaction fail.
        """
        is_commit = self.COMMIT.match(request.text)
        if request.name == "QUERY":
            return self.ROLLBACK_QUERY if is_commit else self.INVALID_QUERY
        # Both batches end with INVALID_PARSE: the backend replies with an ErrorResponse, and then
        # skips to the Sync.
        self.skipping = True
        request.info.end_types = self.ERROR
        return self.ROLLBACK_BATCH if is_commit else self.INVALID_PARSE


@protocol
class Smtp(Protocol):
    """SMTP with PIPELINING and CHUNKING (RFC 5321, 2920, 3030)."""

    errors = {
        "450": "4.2.1 mailbox busy",
        "451": "4.3.0 Requested action aborted: local error in processing",
        "452": "4.3.1 Insufficient system storage",
        "421": "4.3.2 Service not available, closing transmission channel",
        "454": "4.7.0 TLS not available due to temporary reason",
        "552": "5.3.4 Message size exceeds fixed limit",
        "554": "5.7.1 Transaction failed"}
    default_errors = ("450", "451", "452")
    connect_errors = fatal_errors = ("421",)
    never_fail = ("QUIT", "MESSAGE")    # a rule can refuse the DATA before a MESSAGE
    overload_error = "421"
    server_first = starts_tls = True
    credentials = ("AUTH",)
    REPLY_LINE = NeedMatch(rb"\n", beginning_with(rb"\d", rb"\d", rb"\d", rb"[ \r\n-]"),
                           "no reply code")
    auth_continues = False          # the client's next line belongs to AUTH, and is no command

    def requests(self):
        """Find the commands. After DATA, read_message takes the place of this reader."""
        while True:
            line = yield COMMAND_LINE
            if self.auth_continues:
                self.auth_continues = False
                yield CONTINUATION
                yield END_OF_MESSAGE
                continue
            words = line.split()
            name = words[0].upper().decode("latin-1") if words else ""
            yield Request(line.strip(), name)
            if name == "BDAT" and len(words) > 1:       # a part of a message follows
                yield parse_length(words[1])
            yield END_OF_MESSAGE

    def read_message(self):
        """Read the message after DATA, which is a request, and then the further requests."""
        first = yield NeedBytes(1)      # wait until the client begins to send the message
        yield Request(b"", "MESSAGE")
        # A line with only a dot ends the message. Because of `tail`, this may be the first line.
        yield SkipUntil(b"\r\n.\r\n", tail=b"\r\n" + first)
        yield END_OF_MESSAGE
        yield from self.requests()

    def replies(self):
        """Find the replies. A reply is one line, or several lines."""
        while True:
            line = yield self.REPLY_LINE
            code, separator = line[:3], line[3:4]
            if separator == b"-":           # more lines of the reply follow
                continue
            if code == b"334":              # the backend asks for another line of AUTH
                self.auth_continues = True
                continue
            name = self.awaited_request().name
            if name == "STARTTLS" and code == b"220":
                if not self.joins_tls:
                    raise ProtocolError("TLS follows")
                yield END_OF_MESSAGE
                yield TLS_BEGINS            # the chain starts a new reader, and drops this reader
            if name == "DATA" and code == b"354":
                # The client sends the message only after this reply.
                self.request_framer.restart(self.read_message())
            yield END_OF_MESSAGE

    def encode_error(self, kind):
        return ("%s %s\r\n" % (kind, self.errors[kind])).encode()

    def make_substitute(self, kind, request):
        """Return RSET for DATA and BDAT, so that the backend forgets the sender and recipients."""
        return b"RSET\r\n" if request.name in ("DATA", "BDAT") else b""


@protocol
class Tls(Protocol):
    """The TLS handshake. The proxy does not decrypt, and needs no certificate (RFC 8446).

    The request is the ClientHello. `match` searches in the server name of the client (SNI), the
    application protocols (ALPN) and the TLS versions, for example in
    "db.example h2,http/1.1 TLSv1.3,TLSv1.2". A field that the client does not send is "-". All
    bytes after the ClientHello continue the request.
    """

    # {kind: AlertDescription} of RFC 8446, section 6
    errors = {
        "handshake_failure": 40, "protocol_version": 70, "internal_error": 80,
        "unrecognized_name": 112, "bad_certificate": 42, "certificate_revoked": 44,
        "certificate_expired": 45, "certificate_unknown": 46, "unknown_ca": 48,
        "access_denied": 49, "insufficient_security": 71, "certificate_required": 116,
        "no_application_protocol": 120}
    default_errors = ("handshake_failure", "protocol_version", "internal_error",
                      "unrecognized_name")
    fatal_errors = tuple(errors)
    VERSIONS = {b"\3\1": b"TLSv1.0", b"\3\2": b"TLSv1.1", b"\3\3": b"TLSv1.2",
                b"\3\4": b"TLSv1.3"}
    SNI, ALPN, SUPPORTED_VERSIONS = 0, 16, 43       # types of extensions
    CLIENT_HELLO = 1            # a HandshakeType
    RECORD_MAX = 1 << 14        # bytes of a record, without its header

    def requests(self):
        """Find the ClientHello, which may come in several records, and skip all other bytes."""
        hello, hello_size = b"", 4      # the header has 4 bytes: a type, and the size of the rest
        while len(hello) < hello_size:
            record_header = yield NeedBytes(5)
            size = int.from_bytes(record_header[3:], "big")
            is_handshake = record_header[:2] == b"\x16\3"   # the type, and the major version
            if not is_handshake or size == 0 or size > self.RECORD_MAX:
                raise ProtocolError("no ClientHello of TLS")
            hello += yield NeedBytes(size)
            if hello[0] != self.CLIENT_HELLO or len(hello) > HEAD_MAX:
                raise ProtocolError("no ClientHello of TLS")
            if len(hello) >= 4:
                hello_size = 4 + int.from_bytes(hello[1:4], "big")
        try:
            text = self.describe_hello(hello)
        except IndexError:
            raise ProtocolError("a malformed ClientHello of TLS") from None
        yield Request(text, "CLIENT_HELLO")
        yield END_OF_MESSAGE
        yield NeedBytes(1)                      # wait until the client sends more bytes
        yield CONTINUATION
        yield UNLIMITED

    def replies(self):
        return read_opaque()

    def describe_hello(self, hello):
        """Return the text for `match`. Raises IndexError if the ClientHello is malformed."""
        names, protocols = [], []
        versions = [hello[4:6]]                 # the highest version of a client before TLS 1.3
        for type_, body in self.read_extensions(hello):
            if type_ == self.SNI:
                names = [body[5:]]              # after the sizes of list and name, and a type
            elif type_ == self.ALPN:
                position = 2                    # after the size of the list
                while position < len(body):
                    end = position + 1 + body[position]
                    protocols.append(body[position + 1:end])
                    position = end
            elif type_ == self.SUPPORTED_VERSIONS:
                # The first byte of this list of versions is the size of the list.
                versions = [body[index:index + 2] for index in range(1, len(body), 2)]
        version_names = [self.VERSIONS[code] for code in versions if code in self.VERSIONS]
        return b" ".join(b",".join(field) or b"-" for field in (names, protocols, version_names))

    def read_extensions(self, hello):
        """Yield (type, body) for each extension of a ClientHello.

        Raises IndexError if the ClientHello is malformed.
        """
        position = 4 + 2 + 32                   # after the header, the version and random bytes
        # The code skips three fields. Each field begins with its size, in 1 or 2 bytes.
        position += 1 + hello[position]         # the session id
        cipher_suites_size = int.from_bytes(hello[position:position + 2], "big")
        position += 2 + cipher_suites_size
        position += 1 + hello[position]         # the compression methods
        position += 2                           # only the size, before the extensions
        while position + 4 <= len(hello):
            type_, size = struct.unpack_from(">HH", hello, position)
            position += 4 + size
            yield type_, hello[position - size:position]

    def encode_error(self, kind):
        """Return an alert record of TLS 1.2. All clients accept this version in an alert."""
        alert, version, size, fatal = 21, (3, 3), (0, 2), 2
        return bytes([alert, *version, *size, fatal, self.errors[kind]])


# {name of a server: name of its protocol}
PROTOCOL_ALIASES = {"memcached": "memcache", "postgresql": "postgres", "mariadb": "mysql"}


def check_protocol(text):
    """Check the name of a protocol, or an alias. Returns the name of the protocol."""
    is_str = isinstance(text, str)      # a value of JSON may be a list, and not hashable
    name = PROTOCOL_ALIASES.get(text, text) if is_str else text
    return choice_check(*PROTOCOLS)(name)


# -- Rules --------------------------------------------------------------------
#
# A rule is a handler with options, and with fields that say when it acts. The installed rules of a
# proxy are those of the behavior, of open blocks and of toxics. For each request (or connection) a
# number is drawn, which decides whether the rule acts. An ActiveRule is the state of a
# rule for one request or connection.

PERCENT_SUM_MAX = 100.000001        # percentages that add up to 100 may exceed 100 by rounding
DRAW_TO_PERCENT = 100 / 2 ** 64     # a drawn number (64 bits) * DRAW_TO_PERCENT is a percentage
DRAW_BATCH = struct.Struct(">8Q")   # one blake2b hash (64 bytes) has 8 numbers of 64 bits


# The state of a schedule at one time.
#
# active         True in a window.
# share          the factor for the percentage of a rule: 0 outside of windows, and 1 in a window.
#                During a ramp, the share rises from 0 to 1.
# until          the time of the next change of `active`, or NEVER.
# next_change    the time of the next change of `active` or `share`, or NEVER.
Moment = namedtuple("Moment", "active share until next_change")

RAMP_STEPS = 100        # a ramp has this many steps ...
RAMP_STEP_MIN = 0.01    # ... or fewer, so that a step takes at least this many seconds


class Scheduled:
    """The base class of Rule and Accept: objects that act in windows. The schedule of an object:

        since      start        start + duration    start + every
          |          |                 |                  |            |
          |  sleeps  |   1st window    |      sleeps      | 2nd window |
                      ramp: the share rises from 0 to 1

    The proxy sets a timer for Moment.next_change and `expires`. All times are seconds of the
    loop's clock.
    """

    start = duration = every = ramp = ttl = 0.0     # seconds, as in RULE_FIELDS. 0 has no effect
    since: "Any" = None     # the time when begin_schedule was called
    expires = NEVER         # the end of the ttl
    moment: Moment          # the current Moment. An open proxy updates `moment`

    def __init__(self, **fields):       # each field becomes an attribute
        for name, value in fields.items():
            setattr(self, name, value)
        self.set_active(not self.has_windows())

    def has_schedule(self):
        """Return whether a window, a ramp or a ttl is set."""
        return bool(self.has_windows() or self.ramp or self.ttl)

    def has_windows(self):
        """Return whether the object acts only in windows."""
        return bool(self.start or self.duration)

    def begin_schedule(self, now):
        """Start the schedule at the time `now`. ProxyServer.update_moment must follow."""
        self.since = now
        self.renew_ttl(now)
        self.set_active(not self.has_windows())     # inactive: update_moment sees a window begin

    def renew_ttl(self, now):
        """Begin the ttl again, at the time `now`."""
        self.expires = now + self.ttl if self.ttl else NEVER

    def set_active(self, active):
        """Set the Moment that holds until the schedule starts."""
        self.set_moment(Moment(active, share=1.0, until=NEVER, next_change=NEVER))

    def set_moment(self, moment):
        """Set the current Moment. Rule extends this method."""
        self.moment = moment

    def moment_at(self, now):
        """Return the Moment of the time `now`."""
        first_begin = self.since + self.start
        if now < first_begin:
            return Moment(active=False, share=0.0, until=first_begin, next_change=first_begin)
        begin, next_begin = first_begin, NEVER      # of the newest window, and of the next window
        if self.every:
            count = count_periods(first_begin, self.every, now)
            begin = first_begin + self.every * count
            next_begin = first_begin + self.every * (count + 1)
        # Windows without pauses are one endless window, unless a ramp rises in each window.
        endless = not self.duration or (self.duration == self.every and not self.ramp)
        end = NEVER if endless else begin + self.duration
        if now >= end:
            return Moment(active=False, share=0.0, until=next_begin, next_change=next_begin)
        share, next_rise = self.ramp_share(begin, now)
        return Moment(active=True, share=share, until=end, next_change=min(end, next_rise))

    def ramp_share(self, window_begin, now):
        """Return (share of the percentage that the ramp has reached, time of the next share)."""
        if not self.ramp:
            return 1.0, NEVER
        step_count = max(1, min(RAMP_STEPS, int(self.ramp / RAMP_STEP_MIN)))
        step_seconds = self.ramp / step_count
        steps_done = count_periods(window_begin, step_seconds, now)
        if steps_done >= step_count:
            return 1.0, NEVER
        return steps_done / step_count, window_begin + step_seconds * (steps_done + 1)

    def times_to_json(self, to_unix):
        """Return {"active": bool, "until": time}, or {} if there is no schedule.

        to_unix    a function that converts a time of the loop's clock to seconds since 1970.

        "active" is True in a window. At the time "until", "active" changes or the ttl ends.
        "until" is None if there is no such time.
        """
        if not self.has_schedule():
            return {}
        until = min(self.moment.until, self.expires)
        return {"active": self.moment.active, "until": to_unix(until) if until < NEVER else None}


def count_periods(begin, period, now):
    """Return how many whole periods of `period` seconds have passed from `begin` to `now`."""
    count = int((now - begin) // period)
    # At the exact end of a period, the quotient may be rounded down.
    if now >= begin + period * (count + 1):
        count += 1
    return count


def without_moment(json_object):
    """Return the JSON object of a rule without the keys `active` and `until` of times_to_json.

    So a client may send back the rules that it has received. If times_to_json cannot have made
    the values, the keys stay, and the caller refuses the unknown keys.
    """
    has_active = isinstance(json_object.get("active"), bool)
    until = json_object.get("until")
    has_until = "until" in json_object and (until is None or type(until) in (int, float))
    if not has_active or not has_until:
        return json_object
    return OrderedDict((key, value) for key, value in json_object.items()
                       if key not in ("active", "until"))


class SearchTimeout(Exception):
    """A search for `match` has used more than MATCH_TIMEOUT seconds of CPU time."""


class SearchLimit:
    """A time limit for the searches in the body of `with SEARCH_LIMIT:`, in the main thread only.

    With an expression like (a+)+b, the time of a search doubles with each character. A timer of
    the kernel sends an OS signal when a search takes too long. The signal handler raises an
    exception, which ends the search. No other thread could end a search, because the module `re`
    holds the GIL. Slow expressions are hard to recognise, so they cannot be refused: (a+)+ alone
    is fast, and a*a*a*a*b is slow.

    The timer counts CPU time, so a busy machine ends no search. Signal handlers run only in the
    main thread. The proxies of a test run in other threads, and may hang in a search.
    """

    enabled = False         # True in the command `serve`, whose proxies run in the main thread
    searching = False       # a search is going on

    def enable(self):
        """Install the signal handler. Python permits this only in the main thread."""
        if hasattr(signal, "setitimer"):        # Windows does not have setitimer
            signal.signal(signal.SIGVTALRM, self.on_signal)
            self.enabled = True

    def on_signal(self, *_):
        """End the search, unless the search has ended before the signal came."""
        if self.searching:
            raise SearchTimeout

    def __enter__(self):
        if self.enabled:
            self.searching = True
            signal.setitimer(signal.ITIMER_VIRTUAL, MATCH_TIMEOUT)

    def __exit__(self, *exception):
        if self.enabled:
            self.searching = False
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)


SEARCH_LIMIT = SearchLimit()


class Rule(Scheduled):
    """A handler with its options, and the fields that say when it acts.

    name                the handler's name.
    options             {option: value}.
    draw_min, draw_max  percent. In a window, the rule acts if the drawn number, as a percentage,
                        is at least draw_min and less than draw_max.
    draw_key            a text. Rules with the same draw key get the same drawn number. If their
                        percentages do not overlap, at most one of these rules acts.
    fields              {field: value}: the RULE_FIELDS except percent, as attributes.
    """

    toxic = None            # the name of the Toxic that the rule belongs to
    block = None            # the number of the Block that the rule belongs to
    instance = None         # the BaseHandler object of the rule, if the handler is blocking
    match_failed = False    # a search has taken too long: see `matches`
    slow_logged = False     # the log has a warning already that the handler is slow
    error_logged = False    # the log has a traceback of the handler already

    per: str
    stream: str
    match: "re.Pattern"
    after: int
    times: int
    of: int

    def __init__(self, name, options=None, draw_min=0.0, draw_max=100.0, draw_key="behavior",
                 **fields):
        self.name = name
        self.handler = get_handler(name)
        self.draw_min, self.draw_max, self.draw_key = draw_min, draw_max, draw_key
        super().__init__(**dict(FIELD_DEFAULTS, **fields))
        self.set_options(dict(handler_options(self.handler), **options or {}))
        # The most requests to act on, or 0 for no limit. The method `selects` handles `of`.
        self.limit = 0 if self.of else self.times
        # Attributes of the handler: see with_attributes
        self.keeps_due_time = getattr(self.handler, "keeps_due_time", False)
        self.rate_limited = getattr(self.handler, "rate_limited", False)
        self.held_max = getattr(self.handler, "held_max", HELD_MAX_IDLE)
        self.joins_chunks = getattr(self.handler, "joins_chunks", False)
        self.on_dropped = getattr(self.handler, "on_dropped", None)
        self.blocking = is_blocking_handler(self.handler)   # not called by chains
        self.drawn_count = 0        # number of requests (or connections) with a draw of the rule
        self.acted_count = 0        # number of requests (or connections) the rule has acted on
        self.shared = Counter()     # state.shared of the handler, for all connections

    def set_options(self, options):
        """Replace the options, and the attributes that are computed from them.

        with_attributes explains `fixed_delay` and `link_rate`. The handler gets only the events of
        `directions`.
        """
        self.options = options
        fixed_delay = getattr(self.handler, "fixed_delay", None)
        self.fixed_delay = fixed_delay(options) if fixed_delay else 0
        link_rate = getattr(self.handler, "link_rate", None)
        self.link_rate = link_rate(options) if link_rate else None
        stream = self.stream
        choose = getattr(self.handler, "choose_direction", None)
        if choose and stream == "both":     # the handler needs one direction: see only_direction
            stream = choose(options)
        self.directions = DIRECTIONS if stream == "both" else (stream,)

    def is_drawn_at_beginning(self):
        """Return whether the rule is drawn at the beginning of each request."""
        return self.per == "request" and not self.match     # `match` needs bytes of the request

    def matches(self, data):
        """Return whether `match` is found in the first bytes of a request.

        After a search that took too long, the rule matches no more requests.
        """
        if self.match_failed:
            return False
        try:
            with SEARCH_LIMIT:
                return self.match.search(data) is not None
        except SearchTimeout:
            self.match_failed = True
            log.error("rule %s: it acts on no more requests, because the search for match took "
                      "more than %g s of CPU time in %d bytes", self, MATCH_TIMEOUT, len(data))
            return False

    def includes(self, number):
        """Return whether a drawn number makes the rule act now."""
        return self.draw_min <= number * DRAW_TO_PERCENT < self.acting_max

    def selects(self, count):
        """Return whether `after`, `times` and `of` let the rule act on a request.

        count    the number of the request, among the requests with a draw of this rule.
        """
        index = count - self.after - 1      # 0 for the first request that `after` permits
        if index < 0:
            return False
        return self.of == 0 or index % self.of < self.times     # e.g. the first 2 of every 10

    def set_moment(self, moment):
        """Set the current Moment, and acting_max, the upper limit of `includes`."""
        super().set_moment(moment)
        self.acting_max = self.draw_max
        if moment.share < 1:
            self.acting_max = self.draw_min + moment.share * (self.draw_max - self.draw_min)

    def set_draw_max(self, draw_max):
        """Set draw_max, and so the percentage."""
        self.draw_max = draw_max
        self.set_moment(self.moment)        # computes acting_max

    def sleeps(self):
        """Return whether the percentage is 0 now: outside of windows, or when a ramp begins."""
        return self.moment.share == 0

    def own_fields(self):
        """Return {field: value} of the rule fields that differ from their defaults."""
        defaults = FIELD_DEFAULTS.copy()    # without `percent`
        if self.toxic:
            defaults.update(Toxic.DEFAULTS)
            del defaults["stream"]          # callers show the stream of each toxic
        return OrderedDict((field, self.field_to_json(field))
                           for field, default in defaults.items()
                           if getattr(self, field) != default)

    def field_to_json(self, field):
        """Return the JSON value of a field: for `match`, the text of the expression."""
        value = getattr(self, field)
        return value.pattern.decode() if field == "match" and value else value

    def describe_handler(self, drawn_options=None):
        """Return text: the handler, its options, and the fields that differ from their defaults.

        drawn_options    {option: value} that replace options: see ActiveRule.drawn_options.
        """
        words = [self.name]
        options = describe_options(self.handler, dict(self.options, **drawn_options or {}))
        if options:
            words.append(options)
        for field, value in self.own_fields().items():
            words.append("%s=%s" % (field, repr(value) if field == "match" else value))
        return " ".join(words)

    def __str__(self):
        """Return the rule as text. For a toxic, this includes the name, percentage and stream."""
        text = self.describe_handler()
        if not self.toxic:
            return text
        percent = self.draw_max - self.draw_min
        return "toxic %s (%g:%s %s)" % (self.toxic, percent, self.stream, text)

    def describe_fault(self, drawn_options):
        """Return the rule as text for a fault record: see describe_handler."""
        text = self.describe_handler(drawn_options)
        if self.toxic:
            text += " toxic=%s stream=%s" % (self.toxic, self.stream)
        return text

    def to_json(self):
        """Return options and fields as a dict for `read_rules`. A toxic has the key "toxic"."""
        table = dict(self.options, name=self.name, percent=self.draw_max - self.draw_min)
        for field in FIELD_DEFAULTS:        # an option takes precedence: see is_rule_field
            table.setdefault(field, self.field_to_json(field))
        if table["match"] is None:          # read_rules accepts only a text
            del table["match"]
        if self.toxic:
            table["toxic"] = self.toxic
        return table


def describe_options(function, options):
    """Return options as text, like "sleep=1.0".

    Booleans and texts are left out if they have the default value. Numbers are always shown.
    """
    defaults, words = handler_options(function), []
    for option, value in options.items():
        is_number = not isinstance(value, (bool, str))
        if is_number or value != defaults[option]:
            words.append("%s=%s" % (option, format_value(value)))
    return " ".join(words)


class ActiveRule(Counter):
    """The state of a rule for one request or connection: handlers get this object as `state`.

    The section Handlers describes the public attributes. `acts` is False while a rule with `match`
    still searches the request, and if a per-connection rule does not act on this connection.
    """

    request_number = 0
    received_at = 0.0
    protocol = current_request = None
    protocol_lost = False
    generator = None                    # the value of `random`, after its first use
    drawn_options: dict = {}            # {option: value}, set by a handler that draws the value

    def __init__(self, rule, request, draw=0, acts=True, match_buffer=None):
        # To save time, Counter.__init__ is not called: Counter.__init__ would only add counts.
        self.rule = rule
        self.shared = rule.shared
        self.stream = rule.stream
        self.request = request          # rule.drawn_count at the time of the draw
        self.draw = draw                # the drawn number, which is also the seed of `random`
        self.acts = acts
        self.match_buffer = match_buffer    # the bytes searched for `match`; None after the draw
        self.has_acted = False          # the rule has changed an event of this request

    @property
    def random(self):
        """A random.Random with the drawn number as its seed. Most handlers need none."""
        if self.generator is None:
            self.generator = random.Random(self.draw)
        return self.generator

    # Older names of four attributes, for users' handlers
    turn = property(lambda self: self.request_number)
    asked = property(lambda self: self.current_request)
    opaque = property(lambda self: self.protocol_lost)
    chance = property(lambda self: self.draw)

    def substate(self, name):
        """Return the state for another handler that the handler of this rule calls.

        name    the name of the other handler.
        """
        substates: "Any" = self     # a Counter can have other values than counts
        if name not in substates:
            substates[name] = ActiveRule(self.rule, self.request, self.draw)
            substates[name].generator = self.random     # both handlers share one generator
        return substates[name]

    def transfer(self, t, to, size):
        """Return the seconds by which the handler would delay a piece that comes at t.

        A rule with a `link_rate` is a slow link. The piece waits until state[to], when the earlier
        pieces are sent. Then state[to] is set to the time when this piece is sent. Without a
        `link_rate`, the rule has a `fixed_delay`.
        """
        rule = self.rule
        if not rule.link_rate:
            return rule.fixed_delay
        bytes_per_second, _ = rule.link_rate
        self[to] = max(t, self[to]) + size / bytes_per_second
        return self[to] - t

    def set_acts(self, acts):
        """Set `acts`, and clear the state if `acts` changes. Returns whether the rule begins."""
        if acts == self.acts:
            return False
        self.acts = acts
        self.clear()
        self.generator = None
        return acts

    def may_act(self):
        """Return whether `times` lets the rule act on this request."""
        if self.has_acted:          # this request is counted already
            return True
        return self.rule.limit == 0 or self.rule.acted_count < self.rule.limit

    def is_over(self):
        """Return whether the rule no longer acts on this request, because the rule sleeps now."""
        return self.acts and self.rule.sleeps()

    def mark_acted(self):
        """Count this request in rule.acted_count, only once. Returns whether the count rises."""
        if self.has_acted:
            return False
        self.has_acted = True
        self.rule.acted_count += 1
        return True


# The size of the cache is limited, because toxics may get new names again and again.
@functools.lru_cache(maxsize=1024, typed=True)
def hash_prefix(seed, proxy_name, draw_key):
    """Return the hash of the three arguments. RuleSet.draw_batch adds further inputs."""
    return hashlib.blake2b(("%s %s %s " % (seed, proxy_name, draw_key)).encode())


class RuleSet:
    """The installed rules of one proxy, and the numbers that are drawn for them.

    A drawn number depends only on the seed, the name of the proxy, the draw key, the number of
    the connection and the number of the request in the connection. Threads, timing and the
    version of Python have no influence. With --reuse-port, each process draws other numbers,
    because the seed of the second process is "SEED/2", and so on.

    The fields `after` and `times` and the options `warmup` and `agitate` count the requests of
    all connections, because many clients open a connection for each request. If several clients
    send at the same time, their timing decides which requests are selected.
    """

    def __init__(self, seed, proxy_name):
        self.seed, self.proxy_name = seed, proxy_name
        self.replay = None      # a Replay that replaces the draws, or None
        self.install([])
        self.request_count = 0  # number of requests that have begun at this proxy

    def install(self, rules):
        """Replace the installed rules. Rules act in the order of the list."""
        self.installed = rules
        # Whether a handler needs the signal END_OF_ROW.
        self.counts_rows = any(rule.options.get("rows") for rule in rules)
        # With a rate limit, no recv is larger than the limit of a slow link's delay queue. The
        # queue may hold HELD_LOW more bytes, because the fast path does not ask read_limit.
        self.recv_size = max([rule.held_max for rule in rules if rule.rate_limited] or [CHUNK])
        # Whether Chain.delaying_rules may return any rules.
        self.has_delaying_rule = any(rule.fixed_delay or rule.link_rate for rule in rules)
        # Whether delay queues join chunks that are due: see with_attributes.
        self.joins_chunks = (any(rule.rate_limited for rule in rules)
                             and all(rule.joins_chunks for rule in rules))
        # Whether Chain.begin_batch may draw the numbers for 8 requests at once.
        self.draw_ahead = not self.replay and all(rule.is_drawn_at_beginning() for rule in rules)
        # Whether the requests of one connection may have different active rules.
        self.changes_by_request = any(rule.per == "request" or rule.match for rule in rules)

    def set_replay(self, replay):
        """Replace the draws by a Replay. None: draw numbers again."""
        self.replay = replay
        self.install(self.installed)        # computes draw_ahead

    def draw_batch(self, draw_key, connection, batch):
        """Return the drawn numbers of 8 successive requests: a tuple of 8 ints of 64 bits.

        connection    the number of the connection.
        batch         0: the connection itself and the requests 1 to 7; 1: the requests 8 to 15 ...
        """
        batch_hash = hash_prefix(self.seed, self.proxy_name, draw_key).copy()  # of a cached hash
        batch_hash.update(b"%d %d" % (connection, batch))
        return DRAW_BATCH.unpack(batch_hash.digest())


# The key of a recorded fault.
#
# proxy         the name of the proxy.
# connection    the number of the connection.
# request       the number of the request in the connection; 0 for a per-connection rule.
# rule          JSON text: the dict of Rule.to_json without the percentage.
FaultKey = namedtuple("FaultKey", "proxy connection request rule")


def fault_key(proxy, connection, request, rule_json):
    """Return the FaultKey of a rule that acts on a request.

    rule_json    the dict that Rule.to_json returns.
    """
    is_per_request = rule_json["per"] == "request"
    text = json.dumps({field: value for field, value in rule_json.items() if field != "percent"},
                      sort_keys=True)
    return FaultKey(proxy, connection, request if is_per_request else 0, text)


class Replay:
    """The faults that a Recorder has written, for another run with the same rules.

    A run with a Replay draws no numbers. A rule acts on a request or a connection if the rule has
    acted on the same request or connection in the recorded run. Percentages, `match`, `after`,
    `times` and `of` have no effect. Connections are numbered as they arrive. So if clients
    connect at the same time, their timing decides which client gets which faults.
    """

    def __init__(self, path):
        """Read a file that a Recorder has written. Raises ValueError."""
        self.path = path
        self.faults = OrderedDict()     # {FaultKey: (drawn number, Rule.drawn_count)}
        self.made = set()               # the FaultKeys of the faults that were made again
        try:
            with open(path, encoding="utf-8") as file:
                for line_number, line in enumerate(file, 1):
                    self.add_line(line_number, line)
        except OSError as error:
            raise ValueError("cannot read %s: %s" % (path, error.strerror)) from None
        except UnicodeDecodeError:
            raise ValueError("%s is not a file that --record has written" % path) from None

    def add_line(self, line_number, line):
        """Add the fault in a line of the recorded file. Raises ValueError."""
        try:
            record = json.loads(line)
            connection, request, draw, drawn_count = (
                check_count(record[name]) for name in ("connection", "request", "draw", "count"))
            key = fault_key(record["proxy"], connection, request, record["rule"])
            self.faults[key] = draw, drawn_count
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise ValueError("line %d of %s is not a fault that --record has written"
                             % (line_number, self.path)) from None

    def rules(self, proxy):
        """Return (rules, toxics) that have made the faults of a proxy. Raises ValueError."""
        texts = OrderedDict.fromkeys(key.rule for key in self.faults if key.proxy == proxy)
        rules, toxics = [], []
        for table in map(json.loads, texts):
            handler_name, toxic_name = table.pop("name", None), table.pop("toxic", None)
            if toxic_name is None:      # a Replay ignores the percentage
                rules += read_rules([dict(table, name=handler_name, percent=0)])
            else:
                toxics.append(make_flat_toxic(handler_name, toxic_name, table))
        return rules, toxics

    def draw(self, proxy, connection, request, rule):
        """Return (drawn number, whether the rule acts, Rule.drawn_count), as recorded.

        proxy, connection, request    as in FaultKey.
        """
        key = fault_key(proxy, connection, request, rule.to_json())
        if key not in self.faults:          # the rule has not acted in the recorded run
            return 0, False, 0
        number, drawn_count = self.faults[key]
        return number, True, drawn_count

    def mark_made(self, proxy, connection, request, rule):
        """Note that a rule has acted, for `summary`."""
        self.made.add(fault_key(proxy, connection, request, rule.to_json()))

    def summary(self, proxy):
        """Return (text about the faults of a proxy, whether all faults were made again)."""
        recorded = [key for key in self.faults if key.proxy == proxy]
        missing = [key for key in recorded if key not in self.made]
        text = "replay: %d of %d faults were made again" % (len(recorded) - len(missing),
                                                             len(recorded))
        if missing:
            first = missing[0]
            text += "; not on connection %d" % first.connection
            if first.request:           # 0 for a per-connection rule
                text += ", request %d" % first.request
            text += ": %s" % json.loads(first.rule).get("name")
        return text, not missing


class Toxic:
    """A rule with a name, and with a draw of its own.

    type_       the name of the handler.
    name        a text, unique on the proxy.
    toxicity    the probability that the rule acts, from 0 to 1.
    attributes  {option: value} as the user wrote them. Negative numbers act as 0.
    stream      "upstream", "downstream" or "both", in upper or lower case.
    fields      other RULE_FIELDS of the rule.
    """

    # Two rule fields have Toxiproxy's defaults, and not the defaults in RULE_FIELDS.
    DEFAULTS = {"per": "connection", "stream": DOWNSTREAM}

    def __init__(self, type_, name, toxicity=1.0, attributes=None, stream=DOWNSTREAM, **fields):
        self.name = name
        self.stream = stream        # as the user wrote it
        fields = dict(self.DEFAULTS, **dict(fields, stream=stream.lower()))
        self.rule = Rule(type_, draw_key="toxic " + name, **fields)
        self.rule.toxic = name
        self.attributes = dict(self.rule.options)       # the default of each option
        self.update(toxicity, attributes or {})

    def update(self, toxicity, attributes):
        """Set the toxicity and some attributes, and so the percentage and options of the rule."""
        self.toxicity = toxicity
        self.attributes.update(attributes)
        options = self.attributes.copy()
        for option, value in self.attributes.items():
            if not isinstance(value, str) and value < 0:    # Toxiproxy treats -5 like 0
                options[option] = type(value)(0)
        self.rule.set_options(options)
        self.rule.set_draw_max(100.0 * toxicity)

    def same_rule(self, other):
        """Return whether another toxic has the same type, stream and fields except the ttl."""
        fields = dict(self.rule.own_fields(), ttl=0)
        other_fields = dict(other.rule.own_fields(), ttl=0)
        return (self.stream, self.rule.name, fields) == (
            other.stream, other.rule.name, other_fields)

    def __str__(self):
        return str(self.rule)


class Accept(Scheduled):
    """How a proxy accepts new clients, and when.

    mode      a mode of Listener in a window: "normal", "refuse" or "drop".
    fields    {field: seconds} of the ACCEPT_FIELDS that are not 0.
    """

    # A fault record needs these attributes of a Rule, and `options`.
    name = "accept"
    toxic = block = None
    stream = "both"

    def __init__(self, mode="normal", fields=None):
        self.mode, self.fields = mode, fields or {}
        self.options = {"mode": mode}       # for fault records
        super().__init__(**self.fields)
        # A listener opens before the schedule begins: in mode "normal" if `start` is not 0.
        self.set_active(not self.start)

    def current_mode(self):
        """Return the mode at this time. Outside of windows, the mode is "normal"."""
        return self.mode if self.moment.active else "normal"

    def to_text(self):
        """Return the text that `check_accept` parses."""
        return " ".join([self.mode, *("%s=%g" % field for field in self.fields.items())])

    def __str__(self):
        return "accept " + self.to_text()

    def to_json(self, to_unix):
        """Return the mode, or a dict of the mode and the fields if there are fields.

        to_unix    a function that converts a time of the loop's clock to seconds since 1970.
        """
        if not self.fields:
            return self.mode
        return dict(self.fields, mode=self.mode, **self.times_to_json(to_unix))


ACCEPT_MODES = ["normal", "refuse", "drop"]
ACCEPT_FIELDS = ["start", "duration", "every", "ttl"]


def check_accept(value):
    """Return the Accept of a text or a JSON object. Raises ValueError.

    value    "refuse start=2 duration=5", or {"mode": "refuse", "start": 2, "duration": 5}.
    """
    try:
        mode, fields = split_accept(value)
        if mode in ACCEPT_MODES:
            fields = check_accept_fields(mode, fields)
    except ValueError as error:
        raise ValueError("cannot be %r: %s" % (value, error)) from None
    if mode not in ACCEPT_MODES:
        raise ValueError("must be normal, refuse or drop, and perhaps times, like \"refuse "
                         "duration=5\", not %r" % (value,))
    if mode == "drop" and os.name == "nt":
        raise ValueError("cannot be drop on Windows, which resets clients that find the backlog "
                         "full: use refuse")
    return Accept(mode, fields)


def split_accept(value):
    """Return (mode, {field: value}) of a text or a JSON object. The values are not checked.

    Raises ValueError for a text whose words are not NAME=VALUE.
    """
    if isinstance(value, dict):
        fields = dict(without_moment(value))    # the dict may be a result of Accept.to_json
        return fields.pop("mode", None), fields
    if isinstance(value, str):
        mode, *words = value.split() or [""]
        return mode, parse_assignments(words)
    return None, {}         # the caller refuses the mode None


def check_accept_fields(mode, fields):
    """Return {field: seconds} of the fields that are not 0. Raises InputError."""
    checked, errors = {}, []
    for name, value in fields.items():
        if name in ACCEPT_FIELDS:
            check_into(checked, errors, name, check_seconds, value)
        else:
            errors.append((name, "%s is not known here%s: there are %s" % (
                name, did_you_mean(name, ACCEPT_FIELDS), ", ".join(ACCEPT_FIELDS))))
    if fields and mode == "normal":
        errors.append(("mode", "normal has no times, but refuse and drop have them"))
    errors += check_times(checked)
    if errors:
        raise InputError(errors)
    return OrderedDict((name, checked[name]) for name in ACCEPT_FIELDS if checked.get(name))


def parse_behavior(text):
    """Parse "20:delay,5:error" into [(20.0, "delay"), (5.0, "error")].

    The percentages are shares of the requests. If their sum is below 100, the other requests pass
    unchanged. Raises ValueError.
    """
    pairs = []
    for item in text.split(","):
        percent, colon, name = item.strip().partition(":")
        if not colon or not name.strip():
            raise ValueError("must be PERCENT:HANDLER[,PERCENT:HANDLER ...], "
                             "like 20:delay,5:error, not %r" % text)
        try:
            pairs.append((check_percent(percent), name.strip()))
        except ValueError:
            raise ValueError("must be PERCENT:HANDLER with a percentage from 0 to 100, not %r"
                             % item.strip()) from None
    total = sum(percent for percent, _ in pairs)
    if total > PERCENT_SUM_MAX:
        raise ValueError("must add up to 100 percent at most, not %g: %r: at most one "
                         "handler acts on a request; to combine faults, use --fault or toxics"
                         % (total, text))
    return pairs


def parse_assignments(texts):
    """Return {name: value} of texts of the form NAME=VALUE. Raises ValueError."""
    fields = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name or name in fields:
            raise ValueError("%r must be NAME=VALUE, each name once" % text)
        fields[name] = value
    return fields


def parse_rule_words(words):
    """Return (handler name, {name: text}) of the words that describe a rule. Raises ValueError.

    words    like ["delay", "sleep=2", "times=3"] or ["delay.sleep=2", "times=3"].
    """
    target, equals, value = words[0].partition("=")
    if not equals:
        return target, parse_assignments(words[1:])
    handler_name, dot, name = target.rpartition(".")
    if not dot or not handler_name:
        raise ValueError("%r must be HANDLER, or HANDLER.NAME=VALUE" % words[0])
    return handler_name, parse_assignments([name + "=" + value, *words[1:]])


def behavior_tables(behavior, options=None, resolve=lambda name: name):
    """Return a behavior as the argument of `read_rules`: one dict for each rule.

    behavior    "PERCENT:HANDLER,...", {handler: percent}, [(percent, handler)] or [dict].
    options     {handler: {option: value}}.
    resolve     a function: resolve(handler) returns the name of a handler, because a behavior in
                Python may contain the handler function. May raise ValueError.

    Raises ValueError. Callers put the name of a setting before the message.
    """
    refusal = ValueError("must be PERCENT:HANDLER[,PERCENT:HANDLER ...], like 20:delay,5:error, "
                         "{handler: percent} or [(percent, handler)], not %r" % (behavior,))
    if isinstance(behavior, str):
        behavior = parse_behavior(behavior)
    elif isinstance(behavior, dict):
        behavior = [(percent, handler) for handler, percent in behavior.items()]
    if not isinstance(behavior, (list, tuple)):
        raise refusal
    tables = []
    for item in behavior:
        if isinstance(item, dict) and "name" in item:
            tables.append(dict(item, name=resolve(item["name"])))
        elif isinstance(item, (list, tuple)) and len(item) == 2 and not isinstance(item[0], str):
            # A text as the first item is a handler: the order (handler, percent) is wrong.
            percent, name = item[0], resolve(item[1])
            tables.append(dict((options or {}).get(name, {}), name=name, percent=percent))
        else:
            raise refusal
    return tables


def check_fields(name, function, fields):
    """Return [(field, sentence)] of the errors in the fields of one rule.

    name        the name of the handler.
    function    the handler.
    fields      {field: checked value}.
    """
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
    return errors + check_times(fields)


def check_times(fields):
    """Return [(field, sentence)] of the times and counts that do not fit together."""
    errors = []
    duration, every = fields.get("duration", 0), fields.get("every", 0)
    times, of = fields.get("times", 0), fields.get("of", 0)
    if every and not duration:
        errors.append(("every", "every needs duration: the seconds of each window"))
    elif every and every < duration:
        errors.append(("every", "every must be at least the duration of %g seconds, not %g"
                       % (duration, every)))
    if of and (times == 0 or times > of):
        errors.append(("of", "of needs times, from 1 to %d: of=%d times=1 acts on one of %d "
                             "requests" % (of, of, of)))
    return errors


def check_into(target, errors, key, check, *args):
    """Set target[key] to check(*args), or append (key, sentence) to errors if the check fails."""
    try:
        target[key] = check(*args)
    except ValueError as error:
        errors.append((key, "%s %s" % (key, error)))


def read_rules(tables):
    """Return the rules of one behavior: at most one rule acts on a request.

    tables    one dict for each rule: {"name": the name of the handler, key: value}. A key is an
              option or a rule field. Missing keys have their default.

    Raises InputError with one sentence for each error.
    """
    # Each rule gets a range of the drawn numbers. A range begins where the previous range ends.
    rules, total, errors = [], 0.0, []
    for table in tables:
        options, fields, table_errors = check_table(table)
        errors += table_errors
        default = 0.0 if "percent" in table else 100.0      # an invalid percentage counts as 0
        percent = fields.pop("percent", default)
        if not errors and get_handler(table["name"]) is not dummy:      # dummy needs no rule
            rules.append(Rule(table["name"], options, draw_min=total, draw_max=total + percent,
                              **fields))
        total += percent
    if total > PERCENT_SUM_MAX:
        errors.append(("percent", "percent must add up to 100 at most, not %g: to combine faults, "
                                  "use --fault or toxics" % total))
    if errors:
        raise InputError(errors)
    return rules


def check_table(table):
    """Check the dict of one rule: see read_rules.

    Returns ({option: checked value}, {field: checked value}, [(key of an error, sentence)]).
    """
    options, fields, errors = {}, {}, []
    name = table.get("name")
    try:
        function = get_handler(name)
    except ValueError as error:
        function = None         # without a handler, only the rule fields can be checked
        errors.append(("name", str(error)))
    for key, value in table.items():
        if is_rule_field(function, key):
            check_into(fields, errors, key, RULE_FIELDS[key].check, value)
        elif function and key != "name":
            check_into(options, errors, key, check_option, name, key, value)
    return options, fields, errors + check_fields(name, function, fields)


# The attributes of toxics that may be negative. Toxiproxy treats negative numbers like 0.
MAY_BE_NEGATIVE = {"latency", "jitter", "delay", "timeout", "bytes"}


def check_attribute(type_, name, value):
    """Return the value of an option, as check_option does, but allow some negative numbers."""
    if type(value) is int and value < 0 and name in MAY_BE_NEGATIVE:
        return value
    return check_option(type_, name, value)


def make_toxic(type_, name, fields, attributes, toxiproxy=False):
    """Check all values of a toxic, and return the Toxic. Values may be JSON values or text.

    type_        the name of the handler.
    fields       {field: value} of RULE_FIELDS and "toxicity".
    attributes   {option: value}.
    toxiproxy    True: accept any toxicity, and negative numbers, as Toxiproxy's server does.

    Raises InputError with one (field or option, sentence) for each error.
    """
    checks = {key: field.check for key, field in RULE_FIELDS.items()}
    checks["toxicity"] = float if toxiproxy else check_toxicity     # float accepts any toxicity
    check_value = check_attribute if toxiproxy else check_option
    checked, values, errors = {}, {}, []
    for key, value in fields.items():
        if key in checks:
            check_into(checked, errors, key, checks[key], value)
        else:
            known = ["name", "type", "attributes", *checks]
            errors.append((key, "%s is not a field of a toxic%s: there are %s"
                           % (key, did_you_mean(key, known), ", ".join(known))))
    for option, value in attributes.items():
        check_into(values, errors, option, check_value, type_, option, value)
    if "toxicity" in checked and "percent" in checked:
        errors.append(("percent", "percent and toxicity mean the same: give one of them"))
    errors += check_fields(type_, get_handler(type_), checked)
    if errors:
        raise InputError(errors)
    percent = checked.pop("percent", 100.0)
    toxicity = checked.pop("toxicity", percent / 100)
    return Toxic(type_, name, toxicity, values, **checked)


def make_flat_toxic(type_, name, values, defaults=()):
    """Return a Toxic, from a dict that has fields and options together.

    type_       the name of the handler.
    values      {rule field, toxicity or option: JSON value or text}.
    defaults    {rule field: value} for rule fields that are not in `values`.

    Raises InputError, or ValueError for an unknown handler.
    """
    function, fields, attributes = get_handler(type_), dict(defaults), {}
    for key, value in values.items():
        if key == "toxicity" or is_rule_field(function, key):
            fields[key] = value
        else:
            attributes[key] = value
    return make_toxic(type_, name, fields, attributes)


# -- Chain --------------------------------------------------------------------
#
# A chain runs the events of one connection through the active rules, one rule after the other. A
# chain has no delay queue and no timer.
#
# The class Chain is for tcp, ProtocolChain for connections with a protocol, and RefusingChain for
# clients beyond max_connections. A Connection calls the same methods of all three classes:
#
#   start()                        called when a client has connected.
#   direction_changed(to)          called before bytes whose direction is not `last_direction`.
#   pass_through(to, data)         fast path: returns the bytes to forward, or None if a rule may
#                                  act on the bytes.
#   process_bytes(now, to, data)   slow path: returns the events that the rules make of bytes.
#   process(now, to, signal)       returns the events that the rules make of a signal.
#   give_up_head(now)              called when the time `head_deadline` has come.
#
# After a change of the installed rules, a Connection calls, in this order:
#
#   rules_changed(new, changed, woken)    returns the changed and woken rules that begin now.
#   release(removed, changed)             undoes the delays by removed and changed rules.
#   reset_due_times(to, latest)           called only if a delay was undone.
#   process_open(now, directions, rules)  returns the events that rules make of OPEN when the rules
#                                         begin.

NOTHING: list = []      # the empty list of all chains without an active rule, to save memory


class Chain:
    """The active rules of one connection.

    Without a protocol, the bytes are not parsed. Request 1 begins when the client connects. A
    later request begins each time that the client sends after the backend has sent.
    """

    __slots__ = ("rule_set", "connection", "request_count", "current_number", "current_request",
                 "last_direction", "active_rules", "undrawn", "per_connection", "batch",
                 "batch_hits", "newly_acted", "modified", "answered_early", "kept", "beginning",
                 "protocol", "protocol_lost", "protocol_error", "successor", "head_deadline",
                 "encrypted")

    def __init__(self, rule_set, connection):
        self.rule_set = rule_set        # the RuleSet of the proxy
        self.connection = connection    # the number of the connection
        # Requests
        self.request_count = 0          # requests that have begun in this connection
        self.current_number = 0         # the number of the request whose event is being processed
        self.current_request = None     # the Request with this number. Only in a ProtocolChain
        self.last_direction = None      # the direction of the last bytes. None before any bytes
        # Rules and draws
        # The active rules of the current request, in order. The list itself never changes: each
        # change makes a new list. So Link.delay_rules can tell whether the rules are the same.
        self.active_rules = NOTHING
        self.undrawn = NOTHING          # rules to draw for request 1 when its first bytes come
        self.per_connection = {}        # {per-connection rule: its ActiveRule}
        self.batch = -1                 # the number of the last batch drawn. -1: no batch
        self.batch_hits = NOTHING       # for each request of the batch: [(rule, drawn number)]
        # Read and reset by the connection
        self.newly_acted = []           # [(ActiveRule, request number, text)], for fault records
        self.modified = False           # False: all new events are bytes to forward at once
        self.answered_early = False     # a rule has replied in the backend's place
        self.kept = 0                   # memory of exchanges, queued events and a held head
        # (number, first bytes) of the last request with active rules. Not in a ProtocolChain
        self.beginning = 0, b""
        # The protocol
        self.protocol = None            # the Protocol. Only in a ProtocolChain
        self.protocol_lost = False      # True after a fall back from a protocol to tcp
        self.protocol_error = ""        # the reason of the fall back. The connection logs this
        self.successor = None           # the Chain that replaces this one, after a fall back
        self.head_deadline = NEVER      # when to call give_up_head
        self.encrypted = None           # the bytes after the boundary TLS_BEGINS, or None

    def start(self):
        """Begin the first request, because a client has connected."""
        self.begin_request()

    def begin_request(self):
        """Count a request, and draw the rules for it, unless the same rules stay active."""
        rule_set = self.rule_set
        rule_set.request_count += 1
        request = self.request_count = self.current_number = self.request_count + 1
        if not rule_set.installed:
            self.active_rules = NOTHING
        elif rule_set.draw_ahead:       # faster than draw_rule, with the same result
            if request // 8 != self.batch:
                self.begin_batch(request // 8)
            for rule in rule_set.installed:
                rule.drawn_count += 1
            hits = self.batch_hits[request % 8]     # [(rule, drawn number)], often empty
            self.active_rules = NOTHING if not hits else [
                ActiveRule(rule, rule.drawn_count, number) for rule, number in hits
                if rule.selects(rule.drawn_count)]
        elif request == 1 or rule_set.changes_by_request:
            for active in self.per_connection.values():
                if active.match_buffer:         # search only the bytes of the new request
                    active.match_buffer = b""
            self.active_rules = self.collect()

    def direction_changed(self, to):
        """Set last_direction. Begin a request if the client sends after the backend has sent.

        Returns request_count. A ProtocolChain counts a request when its head is complete.
        """
        last, self.last_direction = self.last_direction, to
        if last is DOWNSTREAM:          # the client sends now
            self.begin_request()
        elif last is None and self.undrawn:     # the first bytes of the connection
            self.draw_more(self.undrawn)
        return self.request_count

    # Drawing

    def begin_batch(self, batch):
        """Draw all rules for the 8 requests of a batch: see RuleSet.draw_batch."""
        self.batch, self.batch_hits = batch, [[] for _ in range(8)]
        for rule in self.rule_set.installed:
            numbers = self.rule_set.draw_batch(rule.draw_key, self.connection, batch)
            for hits, number in zip(self.batch_hits, numbers):
                if rule.includes(number):
                    hits.append((rule, number))

    def draw_number(self, rule):
        """Draw the number that decides whether a rule acts on the current request.

        Returns (drawn number, whether the rule acts, Rule.drawn_count).
        """
        # A per-connection rule is drawn for request 0. The first request has the number 1.
        request = self.request_count if rule.per == "request" else 0
        rule_set = self.rule_set
        if rule_set.replay:
            return rule_set.replay.draw(rule_set.proxy_name, self.connection, request, rule)
        batch, index = divmod(request, 8)
        number = rule_set.draw_batch(rule.draw_key, self.connection, batch)[index]
        acts = rule.includes(number) and rule.selects(rule.drawn_count)
        return number, acts, rule.drawn_count

    def draw_rule(self, rule):
        """Count a draw of a rule. Returns an ActiveRule or None, as make_active does.

        A rule with `match` is not drawn yet: see find_match.
        """
        if rule.match:
            return ActiveRule(rule, rule.drawn_count, acts=False, match_buffer=b"")
        rule.drawn_count += 1
        return self.make_active(rule)

    def make_active(self, rule):
        """Draw a rule. Returns an ActiveRule, or None for a per-request rule that does not act."""
        number, acts, drawn_count = self.draw_number(rule)
        if not acts and rule.per == "request":
            return None
        return ActiveRule(rule, drawn_count, number, acts)

    def collect(self, drawn=None):
        """Return the active rules of the current request, in the order of the rules.

        drawn    {per-request rule: its ActiveRule, or None if the rule does not act}: the rules
                 of a request that has begun. None: draw all per-request rules.
        """
        collected = []
        for rule in self.rule_set.installed:
            if rule.per == "connection":
                active = self.connection_rule(rule)
            else:
                active = self.draw_rule(rule) if drawn is None else drawn.get(rule)
            # A rule with a match_buffer still searches the request, and may act later.
            if active is not None and (active.acts or active.match_buffer is not None):
                collected.append(active)
        return collected

    def connection_rule(self, rule):
        """Return the ActiveRule of a per-connection rule. Draw the rule if it is not drawn yet.

        Returns None if a ProtocolChain has not found `match` in a request of the connection yet.
        """
        active = self.per_connection.get(rule)
        if active is None:
            active = self.draw_rule(rule)
            if active is not None:
                self.per_connection[rule] = active
        return active

    def draw_more(self, rules):
        """Draw more rules for the current request, and keep the current active rules."""
        drawn = {active.rule: active for active in self.active_rules}
        drawn.update((rule, self.draw_rule(rule)) for rule in rules if rule.per == "request")
        self.active_rules = self.collect(drawn)     # draws per-connection rules

    def rules_changed(self, new, changed=(), woken=()):
        """Apply a change of the installed rules.

        new        rules that were not installed before.
        changed    rules that keep their state, with new options or percentages.
        woken      rules whose percentage rises because of their schedule.

        A new or woken per-connection rule begins now. A new or woken per-request rule begins with
        the next request, or with the current request if no byte has come yet. Rules that are no
        longer installed, or that sleep now, stop.

        Returns the changed and woken per-connection rules that begin now.
        """
        self.batch = -1                 # the batch was drawn for the earlier rules
        installed = self.rule_set.installed
        self.per_connection = {rule: active for rule, active in self.per_connection.items()
                               if rule in installed}
        begun = self.update_per_connection(changed)
        self.undrawn = [rule for rule in [*self.undrawn, *new] if rule in installed]
        drawn = {active.rule: active for active in self.active_rules if not active.is_over()}
        if self.last_direction is None:         # request 1 has no bytes yet
            for rule in set(woken) - {*drawn, *self.undrawn}:   # the rules that did not act
                if rule.is_drawn_at_beginning():
                    drawn[rule] = self.make_active(rule)    # begin_request has counted the draw
        self.active_rules = self.collect(drawn)             # draws new per-connection rules
        return begun

    def update_per_connection(self, changed):
        """Let per-connection rules start or stop acting. Returns the rules that start.

        changed    the rules with new options or percentages.
        """
        begun = []
        for rule, active in self.per_connection.items():
            may_change = rule in changed or rule.has_schedule()
            is_drawn = active.match_buffer is None      # otherwise, find_match will draw the rule
            if not may_change or not is_drawn:
                continue
            if self.rule_set.replay:    # draw_number() asks the Replay, which ignores the schedule
                _, acts_if_awake, _ = self.draw_number(rule)
                acts = acts_if_awake and not rule.sleeps()
            else:                       # includes() is False while the rule sleeps
                acts = rule.includes(active.draw) and rule.selects(active.request)
            begins = active.set_acts(acts)
            if begins:
                begun.append(rule)
        return begun

    def release(self, removed, changed):
        return False                    # only a ProtocolChain has queued events

    def reset_due_times(self, to, latest):
        """Lower the due times that rules keep for a direction to `latest`, if they are later.

        latest    the due time of the last chunk in the delay queue, after delays were undone.
        """
        for active in self.all_active_rules():
            if active.rule.keeps_due_time and active.acts:
                active[to] = min(active[to], latest)    # state[to] in the code of a handler

    def all_active_rules(self):
        """Return the active rules of all requests that may still get events."""
        return self.active_rules

    def blocking_rule(self):
        """Return the first active rule with a blocking handler, or None."""
        return next((active for active in self.active_rules
                     if active.rule.blocking and active.may_act()), None)

    # Processing

    def pass_through(self, to, data):
        """Fast path: return the bytes, or None if an active rule may act on the bytes."""
        if to is UPSTREAM:
            self.note_beginning(data)
        for active in self.active_rules:
            # A rule with a match_buffer still searches the request, and needs the bytes.
            if to in active.rule.directions or active.match_buffer is not None:
                return None
        return data

    def delaying_rules(self, to):
        """Return the active rules that only delay bytes of the direction `to`, as a list.

        ActiveRule.transfer returns the delay by each of these rules. Returns None if the caller
        must call pass_through and process_bytes.
        """
        delaying = []
        for active in self.active_rules:
            rule = active.rule
            if not active.has_acted:        # must make a fault record, or searches for `match`
                return None
            if rule.per == "request":       # the bytes of the next request may have no delay
                return None
            if to in rule.directions:
                if not rule.fixed_delay and not rule.link_rate:     # the handler must be called
                    return None
                delaying.append(active)
        return delaying

    def note_beginning(self, data):
        """Store the first bytes of the current request, for fault records."""
        number, _ = self.beginning
        if number != self.request_count:
            self.beginning = self.request_count, bytes(data[:BEGINNING_MAX])

    def request_text(self):
        """Return the first bytes of the request whose event is being processed.

        Returns b"" if no bytes of the request have come, or if no rule was active at that time.
        """
        number, text = self.beginning
        return text if number == self.current_number else b""

    def recv_size(self, to):
        """Return how many bytes to receive at once."""
        return self.rule_set.recv_size

    def process_bytes(self, now, to, data):
        """Slow path: return the events that the rules make of bytes: see `process`."""
        return self.process(now, to, data)

    def give_up_head(self, now):
        return []                       # without a protocol, no head is held

    def process(self, now, to, data):
        """Run bytes or a signal through the active rules.

        Returns [(t, to, data, delays)]. `delays` has a tuple (rule, seconds, from_open) for each
        rule that has delayed the event. from_open is True if the rule yielded the event for OPEN.
        """
        return self.run_chain(self.active_rules, now, to, [(now, to, data, ())])

    def process_open(self, now, directions, rules=None):
        """Give the signal OPEN to rules that begin now, or whose options have changed.

        directions    the directions in which the rules get OPEN.
        rules         the rules that begin. None: all per-connection rules, for a new connection.

        Returns the events that the rules yield in place of OPEN, or in addition to OPEN. OPEN is
        not returned, because the connection is open already.
        """
        rules = self.per_connection if rules is None else rules
        all_events = []
        for index, active in enumerate(self.active_rules):
            if active.rule not in rules:
                continue
            later_rules = self.active_rules[index + 1:]
            for to in directions:
                events = self.run_chain([active], now, to, [(now, to, OPEN, ())], opening=True)
                if events == [(now, to, RESET, ())]:    # the handler has failed: only reset
                    return events
                events = [(t, direction, data, delays) for t, direction, data, delays in events
                          if data is not OPEN]
                all_events += self.run_chain(later_rules, now, to, events)
        return all_events

    def run_chain(self, active_rules, now, to, events, opening=False):
        """Run events through some active rules, one rule after the other.

        to         the direction of the RESET after an exception.
        events     [(t, to, data, delays)]: see `process`.
        opening    True only if process_open gives the event OPEN to new or changed rules.

        If a handler raises an exception, the only event is a RESET.
        """
        for active in active_rules:
            active.received_at = now    # for handlers
            if active.rule.blocking:    # the handler gets the sockets: see Connection.hand_off
                continue
            try:
                if len(events) == 1:    # the usual case, which is faster
                    events = self.run_rule(active, events[0], opening)
                else:
                    events = [made for event in events
                              for made in self.run_rule(active, event, opening)]
            except BaseException as exc:    # of the handler: Ctrl-C raises nothing, see Loop.stop
                # Only the first error of a rule is logged with a traceback.
                log.error("connection %d, request %d: handler %s failed and the connection is "
                          "reset: %s", self.connection, self.current_number, active.rule.name,
                          format_exception(exc), exc_info=not active.rule.error_logged)
                active.rule.error_logged = True
                self.modified = True
                return [(now, to, RESET, ())]
        return events

    def run_rule(self, active, event, opening):
        """Return the events that one active rule makes of one event: see run_chain."""
        t, to, data, delays = event
        rule = active.rule
        if not active.acts:
            self.find_match(active, to, data)       # may set active.acts
            if not active.acts:
                return [event]
        # Most rules have no limit, and do not need the call of may_act.
        if to not in rule.directions or (rule.limit and not active.may_act()):
            return [event]
        active.request_number, active.current_request = self.current_number, self.current_request
        active.protocol, active.protocol_lost = self.protocol, self.protocol_lost
        events = self.call_handler(active, t, to, data)
        if events == [(t, to, data)]:
            return [event]
        self.note_changes(active, to, events, opening)
        # This rule has delayed each event that is due later than t. The bool is from_open.
        return [(due, direction, made, delays if due == t else
                 delays + ((rule, due - t, data is OPEN and made is not OPEN),))
                for due, direction, made in events]

    def call_handler(self, active, t, to, data):
        """Return the events that a handler makes of one event. No returned event is due before t.

        Logs a warning, once for each rule, if the call was slow. Raises TypeError if the handler
        does not yield events.
        """
        rule, began = active.rule, time.perf_counter()
        made = rule.handler(active, t, to, data, **rule.options)
        if made is None:
            raise TypeError("a handler must yield (t, to, data), not return None")
        made = list(made)
        seconds = time.perf_counter() - began
        if seconds > SLOW_CALL and not rule.slow_logged:
            rule.slow_logged = True
            log.warning("handler %s took %.1f s for one event, while all connections waited: a "
                        "handler must not block, but yield a later time", rule.name, seconds)
        try:
            return [(due if due > t else t, direction, item) for due, direction, item in made]
        except (TypeError, ValueError):
            raise TypeError("a handler must yield (t, to, data), not %s"
                            % ", ".join(map(repr, made))[:200]) from None

    def note_changes(self, active, to, events, opening):
        """Note that a rule has replaced an event. Raises TypeError for invalid new events.

        to         the direction of the old event.
        events     the new events.
        opening    as in run_chain.
        """
        self.modified = True
        for _, direction, data in events:
            # Not `is`: the direction may be an equal text that a user's handler has made.
            if direction not in DIRECTIONS or not isinstance(data, bytes):
                raise TypeError("a handler must yield (t, to, data), not (t, %r, %r)"
                                % (direction, data))
            if data and direction == DOWNSTREAM:
                self.last_direction = DOWNSTREAM    # counts like a reply of the backend
                self.answered_early = self.answered_early or to == UPSTREAM
        only_delays_open = opening and all(data is OPEN for _, _, data in events)
        if not active.has_acted and not only_delays_open:   # a delay of OPEN is not a fault
            active.mark_acted()
            self.newly_acted.append((active, self.current_number, self.request_text()))

    def find_match(self, active, to, data):
        """Search the client's bytes for `match`, and draw the rule if the request matches."""
        rule, buffered = active.rule, active.match_buffer
        if to == DOWNSTREAM or not data or buffered is None or len(buffered) >= MATCH_MAX:
            return                      # nothing to search, or the rule is drawn already
        active.match_buffer = buffered + data[:MATCH_MAX - len(buffered)]
        # A Replay knows the requests on which the rule acts, so no search is needed.
        if not self.rule_set.replay and not rule.matches(active.match_buffer):
            return
        rule.drawn_count += 1
        active.draw, active.acts, active.request = self.draw_number(rule)
        active.match_buffer = None      # None: the rule is drawn


class RefusingChain(Chain):
    """The chain of a client beyond max_connections: no rule acts, and no backend is connected.

    With a protocol, the client gets the error of a server with too many connections before the
    connection is closed.
    """

    __slots__ = ("refusing_protocol", "received")

    def __init__(self, rule_set, connection, protocol):
        super().__init__(rule_set, connection)
        # The Protocol that makes the error, or None. Chain.protocol stays None: nothing is parsed.
        self.refusing_protocol = protocol
        self.received = b""             # the client's bytes since the last reply

    def rules_changed(self, new, changed=(), woken=()):
        return []                       # no rule begins

    def pass_through(self, to, data):
        return None                     # no byte is for the backend

    def process(self, now, to, data):
        """Return the events that refuse the client.

        data    OPEN, EOF, or bytes of the client.
        """
        self.modified = True            # no bytes of the client are forwarded
        if data is EOF:
            return [(now, to, data, ())]
        self.received += data           # OPEN is empty
        protocol, received = self.refusing_protocol, self.received or OPEN
        reply = protocol.refuse_client(received) if protocol else Reply(b"", closes=True)
        if reply is None:               # a server would wait for more bytes
            return []
        self.received = b""
        self.answered_early = bool(reply.data)      # finish() lets the client read the reply
        events = [(now, DOWNSTREAM, reply.data)]
        if reply.closes:                # a client may go on after Postgres's "no encryption"
            events += close_both(now)
        return [(t, direction, made, ()) for t, direction, made in events]


class Exchange:
    """A request of a protocol, and its reply.

    An error reply of a rule waits in `queued_events` of the exchange until the exchange is the
    first of its connection. So the replies to pipelined requests stay in order.
    """

    __slots__ = ("number", "active_rules", "request", "handshake", "queued_events", "forwarded",
                 "complete", "reply_done", "refusal", "kept")

    def __init__(self, number, active_rules, request, handshake=False):
        self.restart(number, active_rules, request, handshake)

    def restart(self, number, active_rules, request, handshake=False):
        """Begin a new exchange in this object, which is faster than a new object."""
        self.number = number            # the number of the request in the connection
        self.active_rules = active_rules
        self.request = request          # a Request, or None before the first request
        self.handshake = handshake      # the server's greeting counts as the reply
        self.queued_events = []         # [(start, to, data, delays)], as in DelayQueue.put
        self.forwarded = False          # the backend gets some bytes of the request
        self.complete = False           # the request has ended
        self.reply_done = False         # the reply has ended
        self.refusal = None             # the Refusal, if a rule refuses the request
        self.kept = 0                   # the memory of this exchange, a part of Chain.kept

    def is_done(self):
        """Return whether the reply has ended, or whether the backend will send no reply."""
        if self.reply_done:
            return True
        if not self.complete:
            return False
        # The backend sends no reply to a request that a rule has dropped.
        backend_replies = self.forwarded and self.request.replies
        return not backend_replies

    def is_connecting(self):
        """Return whether the client connects: no request has begun, and no greeting has ended."""
        return self.request is None and not self.reply_done

    def awaits_reply(self):
        """Return whether a reply or a greeting of the backend must still come."""
        has_reply = self.request.replies if self.request else self.handshake
        return bool(has_reply) and not self.is_done()


class ProtocolChain(Chain):
    """A chain whose protocol finds the boundaries of requests and replies.

    Theory of operation. `exchanges` is a queue. The client's bytes belong to the last exchange,
    and the backend's bytes to the first exchange. Each direction has a Framer, which finds the
    boundaries. Each boundary changes the queue before the Framer continues to parse:

        direction   boundary         change
        upstream    Request          a new exchange is appended. Rules are drawn for the request.
        upstream    CONTINUATION     none. The bytes belong to the last exchange, whose request is
                                     complete. No rule can refuse a complete request.
        upstream    END_OF_MESSAGE   the request of the last exchange is complete.
        downstream  END_OF_MESSAGE   the reply of the first exchange is done.
        both        TLS_BEGINS       none, but the later bytes are encrypted.
        downstream  END_OF_ROW       none.

    After each change, done exchanges are removed from the front of the queue, but never the last
    exchange. An exchange releases its `queued_events` when it becomes the first.

    While any rule is installed, the head of a request is held until the head is complete. So
    rules can act on whole requests. The parsing ends if a head is incomplete after
    UNRECOGNIZED_MAX, and the client may speak another protocol. If the client certainly speaks
    the protocol, an incomplete head is forwarded after HEAD_TIMEOUT, the parsing continues, and no
    per-request rule acts on the request.

    A rule can refuse a request when the rule gets the head: see Exchange.refusal.

    Invariants, whenever rules are added, removed or changed:
    1. Each request gets one reply: from the rule that has refused the request, or from the
       backend if no rule has refused the request. A request that needs no reply gets none.
    2. Replies leave in the order of their requests.
    3. The backend gets all requests that were not refused, whole and in order. In place of a
       refused request, the backend may get other bytes: see Reply.substitute.
    4. Only one rule can refuse a request: at the first event of the request, while the backend
       has got no byte of the request.
    5. A rule that has refused a request sends the reply even if the rule is removed or changed.
    6. Events in delay queues and exchanges wait only for installed rules that do not sleep. After
       delays were undone, no rule keeps a due time after the due time of the last queued chunk.
    7. After a refusal that closes the connection, the backend gets no further bytes. After a
       rule has closed or reset the connection, the client gets no further replies.
    """

    __slots__ = ("exchanges", "current_exchange", "head", "in_request", "head_forwarded",
                 "last_affected", "drops_requests", "drops_replies", "recognized")

    def __init__(self, rule_set, connection, protocol):
        super().__init__(rule_set, connection)
        self.protocol = protocol
        protocol.counts_rows = rule_set.counts_rows
        self.exchanges = protocol.exchanges     # the queue, which the protocol reads too
        self.current_exchange = None    # the exchange whose event is being processed
        self.head = b""             # the bytes of an incomplete head that are held
        self.in_request = False     # the next bytes of the client continue a request
        self.head_forwarded = False     # bytes of an incomplete head have been forwarded
        self.drops_requests = False     # the backend gets no further bytes: see invariant 7
        self.drops_replies = False      # the client gets no further replies: see invariant 7
        self.recognized = False     # the client has sent bytes that can only be of the protocol
        self.last_affected = None   # the last exchange that had active rules or queued events

    def start(self):
        """Begin request 1 and its exchange, because a client has connected."""
        self.begin_request()
        first = Exchange(self.request_count, self.active_rules, request=None,
                         handshake=self.protocol.server_first)
        self.exchanges.append(first)
        self.current_exchange = first
        self.last_affected = first if self.active_rules else None

    def direction_changed(self, to):
        self.last_direction = to        # requests begin where the protocol finds them
        return self.request_count

    def draw_rule(self, rule):
        """Count a draw of a rule. Returns an ActiveRule or None, as make_active does.

        If the request does not match, nothing is drawn or counted.
        """
        if rule.match and not self.is_matched_by(rule):
            return None
        rule.drawn_count += 1
        return self.make_active(rule)

    def is_matched_by(self, rule):
        """Return whether `match` of a rule is found in the current request."""
        if not self.current_request:    # the client has sent no head yet
            return False
        # A Replay knows the requests on which the rule acts, so no search is needed.
        return bool(self.rule_set.replay) or rule.matches(self.current_request.text[:MATCH_MAX])

    def rules_changed(self, new, changed=(), woken=()):
        """Apply a change of the installed rules to all exchanges: see Chain.rules_changed."""
        # The caller then calls process_open: a rule may refuse a client that has sent no byte.
        last = self.exchanges[-1]
        self.set_exchange(
            last, is_refusable=last.request is None and self.last_direction is None)
        begun = super().rules_changed(new, changed, woken)
        self.protocol.counts_rows = self.rule_set.counts_rows
        self.last_affected = None
        for exchange in self.exchanges:
            exchange.active_rules = self.remaining_rules(exchange)
            if exchange.active_rules or exchange.queued_events:
                self.last_affected = exchange
        return begun

    def remaining_rules(self, exchange):
        """Return the active rules of an exchange after the installed rules have changed.

        The last exchange gets `self.active_rules`. Each earlier exchange keeps its active rules,
        but loses those that are no longer installed or that sleep now. A rule that has refused the
        request stays in any case, because this rule sends the reply.
        """
        if exchange is self.exchanges[-1]:
            rules = self.active_rules
        else:
            rules = [active for active in exchange.active_rules
                     if active.rule in self.rule_set.installed and not active.is_over()]
        refusal = exchange.refusal
        # `in` would compare the counts, because an ActiveRule is a Counter.
        if refusal and not any(active is refusal.active_rule for active in rules):
            rules = [refusal.active_rule, *rules]   # first: the others get the events of this rule
        return rules

    def set_exchange(self, exchange, is_refusable):
        """Set the exchange of the next event.

        is_refusable    whether a rule may refuse the request, or the client, at the next event.
        """
        self.current_exchange = exchange
        self.current_request, self.current_number = exchange.request, exchange.number
        may_refuse = is_refusable and not exchange.refusal
        self.protocol.refusable = exchange if may_refuse else None      # for reply_with_error

    def release(self, removed, changed):
        """Undo the delays that removed and changed rules have given to events in exchanges.

        Returns whether a delay was undone.
        """
        rules, released = [*removed, *changed], False
        for exchange in self.exchanges:
            for index, (start, to, data, delays) in enumerate(exchange.queued_events):
                remaining = tuple((rule, seconds, from_open) for rule, seconds, from_open in delays
                                  if rule not in rules)
                exchange.queued_events[index] = start, to, data, remaining
                released = released or remaining != delays
        return released

    def all_active_rules(self):
        return [active for exchange in self.exchanges for active in exchange.active_rules]

    # Boundaries

    def apply_boundary(self, to, boundary):
        """Change the queue of exchanges: see the table of the class."""
        if boundary is END_OF_MESSAGE:
            if to is UPSTREAM:
                self.end_request()
            else:
                self.exchanges[0].reply_done = True
        elif boundary is TLS_BEGINS:
            self.encrypted = b""            # split_encrypted sets the bytes
        elif boundary is not END_OF_ROW:    # a Request or CONTINUATION
            self.in_request = True
            if not self.recognized:
                self.recognize()
            if boundary is not CONTINUATION:
                self.begin_exchange(boundary)

    def begin_exchange(self, request):
        """Draw the rules for a request whose head is complete, and begin the exchange."""
        last = self.exchanges[-1]
        # `start` has begun request 1: the handshake, or this Request if there is no handshake.
        is_begun = last.request is None and not last.handshake
        self.draw_for(request, is_begun)
        if is_begun:
            last.request, last.active_rules = request, self.active_rules
            last.reply_done = False     # bytes that came before request 1 are no reply
        elif len(self.exchanges) == 1 and not last.active_rules and last.is_done():
            # The new exchange takes the object and the place of the only exchange, which is done.
            self.kept -= last.kept
            self.last_affected = None
            last.restart(self.request_count, self.active_rules, request)
        else:                           # the memory of further exchanges is counted
            last = Exchange(self.request_count, self.active_rules, request)
            self.exchanges.append(last)
            overhead = EXCHANGE_OVERHEAD + ACTIVE_RULE_OVERHEAD * len(self.active_rules)
            self.count_memory(last, overhead)
        if self.active_rules:
            self.last_affected = last

    def draw_for(self, request, is_begun):
        """Set `current_request` and `active_rules` for a request whose head is complete.

        is_begun    whether `start` has begun the request, and has drawn rules for the request.

        A request that is not independent keeps the active rules of the previous request.
        """
        self.current_request = request
        if is_begun:
            not_drawn = [rule for rule in self.rule_set.installed       # `match` needs the head
                         if rule.match or rule in self.undrawn]
            if not_drawn:
                self.draw_more(not_drawn)
        elif request.independent:
            self.begin_request()
        if self.head_forwarded:         # too late for per-request rules: see HEAD_TIMEOUT
            self.active_rules = [active for active in self.active_rules
                                 if active.rule.per == "connection"]

    def recognize(self):
        """Note that the client speaks the protocol: the limit for a held head is HEAD_TIMEOUT."""
        self.recognized, self.head_deadline = True, NEVER

    def end_request(self):
        """Note that the request of the last exchange has ended."""
        last = self.exchanges[-1]
        self.in_request = self.head_forwarded = False
        if last.request is not None:
            last.complete = True
            # To save memory, keep only the beginning of the text, for fault records.
            last.request.text = self.protocol.beginning(last.request) if last.active_rules else b""

    def count_memory(self, exchange, size):
        """Count `size` bytes of memory for an exchange, until the exchange is removed."""
        exchange.kept += size
        self.kept += size

    def release_done(self, now):
        """Remove done exchanges from the front of the queue, but never the last exchange.

        Returns the events that were queued in each exchange that has become the first.
        """
        events = []
        while len(self.exchanges) > 1 and self.exchanges[0].is_done():
            done = self.exchanges.popleft()
            self.kept -= done.kept
            if done is self.last_affected:      # no later exchange has rules or queued events
                self.last_affected = None
            if self.exchanges[0].queued_events:
                events += self.take_queued(self.exchanges[0], now)
        return events

    def take_queued(self, exchange, now):
        """Remove the queued events of an exchange. Returns [(due time, to, data, delays)]."""
        events = []
        for start, to, data, delays in exchange.queued_events:
            due = start + sum(seconds for _, seconds, _ in delays)
            events.append((max(now, due), to, data, delays))
        exchange.queued_events = []
        self.modified = self.modified or bool(events)       # for the delay queues
        return events

    # Bytes

    def request_text(self):
        return self.protocol.beginning(self.current_request) if self.current_request else b""

    def exchange_of(self, to):
        """Return the exchange to which the next bytes of a direction belong."""
        return self.exchanges[-1 if to is UPSTREAM else 0]

    def framer(self, to):
        """Return the Framer that parses the bytes of a direction."""
        return self.protocol.request_framer if to is UPSTREAM else self.protocol.reply_framer

    def recv_size(self, to):
        """Return how many bytes to receive at once: bytes to skip, and PARSED_CHUNK to parse."""
        awaiting = self.framer(to).awaiting     # an int: the Framer skips this many bytes
        skipped = awaiting if type(awaiting) is int else 0
        return min(self.rule_set.recv_size, PARSED_CHUNK + skipped)

    def may_pass(self, to, size):
        """Return whether no rule can act on the next bytes, so that the fast path is allowed."""
        # Rules and queued events need the slow path. A held head must leave before the next bytes.
        needs_slow_path = self.last_affected or self.head
        if to is UPSTREAM:              # rules would be drawn for a request that begins
            needs_slow_path = needs_slow_path or self.rule_set.installed or self.drops_requests
        # The rest of a request or reply without rules may pass in any case.
        return not needs_slow_path or self.is_inside(to, size)

    def is_inside(self, to, size):
        """Return whether the next bytes are inside a request or reply on which no rule acts."""
        if to is UPSTREAM and (self.drops_requests or not self.in_request):
            return False                # the bytes are dropped, or begin a request
        return not self.exchange_of(to).active_rules and self.framer(to).skips(size)

    def pass_through(self, to, data):
        """Fast path for bytes on which no rule can act: only find and apply the boundaries.

        Returns `data` itself to forward `data` unchanged. Returns other bytes to forward if a Host
        header is rewritten, TLS begins, or the parsing ends. Returns None, and changes nothing, if
        the bytes need the slow path.
        """
        size, end = len(data), 0        # end: the offset of the last boundary
        if not self.may_pass(to, size):
            return None
        try:
            if size <= COPY_MAX:
                pass_whole = self.pass_whole_request if to is UPSTREAM else self.pass_whole_reply
                passed = pass_whole(data)
                if passed is not None:
                    return passed
            if to is UPSTREAM and self.protocol.host and not self.is_inside(to, size):
                return None             # a head may have to be rewritten
            for offset, boundary in self.framer(to).feed(data, size):
                end = offset
                self.apply_boundary(to, boundary)
                if to is UPSTREAM:
                    self.exchanges[-1].forwarded = True
                self.release_done(0.0)      # no queued event gets this time: see may_pass
                if self.encrypted is not None:
                    return self.split_encrypted(to, bytes(data), end)
        except ProtocolError as error:
            copy = bytes(data)          # tells the connection that the parsing has ended
            self.process_part(0.0, to, copy[end:])      # no rule acts: these two calls only return
            self.fall_back(0.0, to, str(error))         # events with bytes of `copy`
            return copy
        if to is UPSTREAM:              # further bytes after the end of a request begin a head
            self.head_forwarded = end < size and not self.in_request
        return data

    def pass_whole_request(self, data):
        """Apply the boundaries of data that is exactly one request, faster than Framer.feed.

        Returns the bytes to forward: `data`, or other bytes if a Host header is rewritten. Returns
        None, and changes nothing, if the data is not one request of a simple form.
        """
        framer, message = self.protocol.request_framer, bytes(data)
        request = framer.parse_whole(message) if framer.at_boundary else None
        if request is None:
            return None
        self.apply_boundary(UPSTREAM, request)
        self.exchanges[-1].forwarded = True
        self.end_request()
        if len(self.exchanges) > 1:         # with pipelined requests, the first may be done now
            self.release_done(0.0)          # no queued event gets this time
        return self.protocol.rewrite_head(message) if self.protocol.host else data

    def pass_whole_reply(self, data):
        """Apply the boundary of data that is exactly one reply, faster than Framer.feed.

        Returns `data`. Returns None, and changes nothing, if the data is not one reply of a simple
        form.
        """
        framer = self.protocol.reply_framer
        if not framer.at_boundary or not framer.parse_whole(bytes(data)):
            return None
        self.exchanges[0].reply_done = True
        if len(self.exchanges) > 1:
            self.release_done(0.0)
        return data

    def process_bytes(self, now, to, data):
        """Slow path: return the events that the rules make of bytes and their boundaries."""
        events, start = [], 0           # start: the offset of the last boundary
        if self.drops(to):
            return events
        try:
            framer = self.framer(to)
            boundaries = None
            if len(data) <= COPY_MAX and not self.protocol.counts_rows:
                # whole_message is faster than `feed`, but does not find END_OF_ROW.
                boundaries = framer.whole_message(data)
            for offset, boundary in boundaries or framer.feed(data, len(data)):
                if offset > start:
                    events += self.process_part(now, to, data[start:offset])
                events += self.process_boundary(now, to, boundary)
                start = offset
                if self.drops(to):
                    return events
                if self.encrypted is not None:      # the bytes before TLS_BEGINS are in `events`
                    self.split_encrypted(to, data, start)
                    return events
        except ProtocolError as error:
            events += self.process_part(now, to, data[start:])
            return events + self.fall_back(now, to, str(error))
        return events + self.process_part(now, to, data[start:])

    def split_encrypted(self, to, data, end):
        """Store the encrypted bytes of `data`, and return the bytes before the encrypted bytes.

        end    the offset of the boundary TLS_BEGINS in `data`.
        """
        self.encrypted = data[end:]
        protocol = self.protocol
        self.framer(to).restart(protocol.requests() if to is UPSTREAM else protocol.replies())
        return data[:end]

    def drops(self, to):
        """Return whether further bytes of a direction are dropped: see invariant 7."""
        return self.drops_requests if to is UPSTREAM else self.drops_replies

    def process_part(self, now, to, data):
        """Process bytes that contain no boundary. The bytes of a head are held."""
        if not data:
            return []
        if to is UPSTREAM and not self.in_request:
            self.hold_head(now, data)
            return []
        return self.process_in_exchange(now, to, data)

    def hold_head(self, now, data):
        """Add bytes to the held head, and limit the time to wait for the whole head."""
        self.head += data
        self.kept += 2 * len(data)      # twice, because the Framer has a copy
        if not self.recognized and self.protocol.request_framer.recognizes(self.head):
            self.recognize()
        limit = HEAD_TIMEOUT if self.recognized else UNRECOGNIZED_MAX
        self.head_deadline = min(self.head_deadline, now + limit)
        self.modified = True            # so that the caller sets a timer

    def take_head(self):
        """Remove and return the bytes of the held head."""
        head, self.head, self.head_deadline = self.head, b"", NEVER
        self.kept -= 2 * len(head)
        return head

    def give_up_head(self, now):
        """Return the events that forward an incomplete head. Called at `head_deadline`."""
        if self.recognized:
            self.head_forwarded = True
            return self.flush_head(now)
        return self.fall_back(
            now, UPSTREAM, "no whole line or message in the first %g s" % UNRECOGNIZED_MAX)

    def process_boundary(self, now, to, boundary):
        """Apply a boundary. Returns the events of rules, and queued events that may leave now."""
        if boundary is END_OF_MESSAGE or boundary is END_OF_ROW:
            # Rules get the signal first: apply_boundary may end the exchange.
            events = self.process_in_exchange(now, to, boundary)
            self.apply_boundary(to, boundary)
            return events + self.release_done(now)
        self.apply_boundary(to, boundary)
        if boundary is TLS_BEGINS:
            return []
        # At a Request or CONTINUATION, the held head is complete.
        events, head = self.release_done(now), self.take_head()
        is_request = boundary is not CONTINUATION
        if is_request:
            head = self.protocol.rewrite_head(head)
        is_refusable = is_request and not self.head_forwarded   # the backend has got no byte
        if head:
            events += self.process_in_exchange(now, to, head, is_refusable)
        return events

    def process_in_exchange(self, now, to, data, is_refusable=False):
        """Run bytes or a signal through the active rules of the exchange to which they belong.

        is_refusable    whether the data is the whole head of a request that a rule may refuse.

        Returns the events that the rules make, without the events that queue_replies has queued.
        """
        exchange = self.exchange_of(to)
        # While a client connects, a rule may refuse the client at any data.
        self.set_exchange(exchange, is_refusable or (to is UPSTREAM and exchange.is_connecting()))
        # CONTINUATION bytes, like COPY data or a password, come after a complete request.
        is_continuation = to is UPSTREAM and exchange.complete
        if data is END_OF_MESSAGE and (is_continuation or not exchange.active_rules):
            return []                   # only rules get the signal, once for each request
        events = []
        for event in self.run_chain(exchange.active_rules, now, to, [(now, to, data, ())]):
            _, direction, made, _ = event
            if made is END_OF_MESSAGE or made is END_OF_ROW:    # signals only for rules
                continue
            events.append(event)
            if made and direction == UPSTREAM and not is_continuation:
                exchange.forwarded = True
        if exchange is not self.exchanges[0]:       # replies to earlier requests must leave first
            events = self.queue_replies(exchange, now, data, events)
        if self.modified:               # a rule may have made EOF or RESET
            self.note_end(now, data, events)
        return events

    def queue_replies(self, exchange, start, original, events):
        """Queue the replies and signals of rules until `exchange` is the first in the queue.

        start       the time when `original` came.
        original    the bytes or the signal that the rules have replaced by `events`.

        Returns the events that are not queued: bytes for the backend, and an unchanged signal of
        the client.
        """
        may_leave = []
        for event in events:
            _, to, made, delays = event
            is_signal_of_rule = not made and made is not original
            if to == UPSTREAM and not is_signal_of_rule:
                may_leave.append(event)
            else:
                exchange.queued_events.append((start, to, made, delays))
                self.count_memory(exchange, len(made) + CHUNK_OVERHEAD)
                if made is EOF and to == UPSTREAM:      # the rule closes the connection
                    self.drops_requests = True
        return may_leave

    def note_end(self, now, original, events):
        """Set drops_replies if a rule closes or resets the connection to the client now.

        original    the bytes or the signal that the rules have replaced by `events`.
        """
        if original is EOF:             # the client or the backend has closed, not a rule
            return
        for due, to, data, _ in events:
            ends_replies = data is RESET or (data is EOF and to == DOWNSTREAM)
            if ends_replies and due <= now:     # a later end waits in the delay queue
                self.drops_replies = True

    def run_rule(self, active, event, opening):
        """Return the events that one active rule makes of one event: see run_chain.

        After a rule has refused the request, the protocol makes the events in place of the
        handler.
        """
        exchange = self.current_exchange
        if exchange.refusal and exchange.refusal.active_rule is active:
            t, to, data, delays = event
            events = list(self.protocol.finish_refusal(exchange, t, to, data))
            if events == [(t, to, data)]:
                return [event]
            self.note_changes(active, to, events, opening)
            return [(due, direction, made, delays) for due, direction, made in events]
        events = super().run_rule(active, event, opening)     # may refuse the request
        if exchange.refusal and exchange.refusal.reply.closes:
            self.drops_requests = True
        return events

    def process(self, now, to, data):
        """Run a signal through the active rules. A held head is forwarded before the signal."""
        events = self.flush_head(now) if to is UPSTREAM else []
        return events + self.process_in_exchange(now, to, data)

    def flush_head(self, now):
        """Return [the event that forwards the held head], or []. No rule acts on the event."""
        head = self.take_head()
        return [(now, UPSTREAM, head, ())] if head else []

    def fall_back(self, now, to, error):
        """Stop parsing, because bytes were not of the protocol. Continue as tcp.

        error    the reason, as text. The connection logs this text.

        Stores a tcp Chain in `successor`, which replaces this chain. There is no successor if the
        client has sent the bytes, but a rule must still send an error to this client. Then this
        chain forwards the further bytes of the client unparsed, and still parses the replies.

        Returns the queued events, and the events that forward the held head.
        """
        self.protocol_error = error
        self.modified = True
        if to is UPSTREAM and self.owes_error():
            self.protocol.request_framer.restart(read_opaque())
            self.in_request = True      # so that the further bytes are not held as a head
            return self.flush_head(now)
        self.successor = chain = self.make_successor()
        events = [event for exchange in self.exchanges
                  for event in self.take_queued(exchange, now)]
        if self.head:
            # The head begins a request. `start` has already begun the first request.
            is_begun = not self.exchanges[-1].request and not self.protocol.server_first
            if not is_begun:
                chain.begin_request()
            events += chain.process(now, UPSTREAM, self.head)
        return events

    def owes_error(self):
        """Return whether an error of a rule must still be sent to the client."""
        for exchange in self.exchanges:
            # `queued_events` are of rules: error replies, and signals that end the connection.
            if exchange.queued_events:
                return True
            # The error follows the backend's reply to the substitute. This reply is awaited.
            if exchange.refusal and exchange.complete and exchange.awaits_reply():
                return True
        return False

    def make_successor(self):
        """Return a Chain that continues as tcp, with the same active rules."""
        chain = Chain(self.rule_set, self.connection)
        chain.protocol_lost = True
        chain.request_count = self.request_count
        chain.current_number = self.request_count       # later bytes belong to the last request
        chain.last_direction = self.last_direction
        chain.active_rules, chain.per_connection = self.active_rules, self.per_connection
        chain.newly_acted, chain.answered_early = self.newly_acted, self.answered_early
        return chain


# -- Delay queue --------------------------------------------------------------
#
# A delay queue holds the bytes of one direction on their way from one socket to the other socket.
# Each chunk has its due time. The budget limits the bytes in all delay queues of a loop together.
# This section uses no sockets.

class Budget:
    """The limit for the bytes in all delay queues of a loop together.

    HELD_MIN bytes are reserved for each queue. The bytes that are neither held nor reserved are
    free. A queue may hold 1 / SHARES of the free bytes.
    """

    __slots__ = ("total", "held", "queues", "fast_path_limit")
    SHARES = 8

    def __init__(self, total=HELD_TOTAL):
        self.total = total              # the limit, in bytes
        self.held = 0                   # bytes counted in all queues together
        self.queues = 0                 # the number of queues
        # While `held` is at most this number, each queue may hold the bytes of the largest read.
        # The fast path checks this number, because a call of `allowance` would be slower.
        self.fast_path_limit = total - self.SHARES * max(HELD_MAX_IDLE, KERNEL_PIPE_SIZE)

    def add_queue(self):
        """Reserve HELD_MIN bytes for one more queue."""
        self.queues += 1
        self.fast_path_limit -= HELD_MIN

    def remove_queue(self):
        """End the reservation of add_queue."""
        self.queues -= 1
        self.fast_path_limit += HELD_MIN

    def allowance(self, bound):
        """Return the most bytes that one queue may hold now.

        bound    the limit of the queue, in bytes, however many bytes are free
        """
        free = self.total - self.held - self.queues * HELD_MIN
        return max(HELD_MIN, min(bound, free // self.SHARES))


NO_CHUNKS: "deque" = deque()     # the empty send_buffer of most delay queues, to save memory


class DelayQueue:
    """The bytes of one direction that wait to be sent, each chunk with its due time.

    `queue` holds the events that are not due yet. `send_buffer` holds the chunks that are due and
    wait until the target accepts them. A change of the rules affects only `queue`.
    """

    __slots__ = ("to", "budget", "queue", "order", "latest", "rate_limited_until", "send_buffer",
                 "held", "kept", "has_replies", "forwarded", "buffered_in", "buffered_out", "eof",
                 "write_closed")

    def __init__(self, to, budget):
        self.to = to            # the direction
        self.budget = budget
        self.queue = []         # heap of (due, order, data, start, delays): see `put`
        self.order = 0          # the number of the last event put: the order of events that have
                                #   equal due times
        self.latest = 0.0       # the due time of the last byte in the queue
        self.rate_limited_until = 0.0   # when the last byte would be due if only rate limits acted
        self.send_buffer = NO_CHUNKS    # chunks and EOF: see append_due
        self.held = 0           # bytes in queue and send_buffer, and CHUNK_OVERHEAD for each item
        self.kept = 0           # memory of the chain, in bytes, that the budget counts: see `keep`
        self.has_replies = False        # some held bytes are from rules, like error replies
        self.forwarded = 0      # all bytes that went from source to target on the fast path
        self.buffered_in = 0    # all other bytes from the source
        self.buffered_out = 0   # all other bytes to the target
        self.eof = False        # the source has sent an EOF
        self.write_closed = False       # no more bytes may be sent to the target
        budget.add_queue()

    @property
    def received(self):
        """Total bytes from the source."""
        return self.forwarded + self.buffered_in

    @property
    def sent(self):
        """Total bytes to the target."""
        return self.forwarded + self.buffered_out

    def put(self, t, data, start, delays=()):
        """Queue an event. Bytes and EOF keep their order, but a RESET overtakes them.

        t         when the event is due
        start     when the proxy received the bytes or the signal that caused the event
        delays    the rules that have delayed the event, in the form of Chain.process
        """
        if not data and not isinstance(data, Signal):       # a handler may yield b""
            return
        if self.write_closed and (data or data is EOF):
            self.tell_dropped(data, delays)
            return
        if t < self.latest and data is not RESET:
            t = self.latest
        if data or data is OPEN:        # an EOF does not delay bytes that are put after the EOF
            self.latest = t
        due_by_rate = start             # when the event would be due if only rate limits acted
        for rule, seconds, _ in delays:
            if rule.rate_limited:
                due_by_rate += seconds
        if due_by_rate > self.rate_limited_until:
            self.rate_limited_until = due_by_rate
        self.order += 1
        self.charge(len(data))
        heapq.heappush(self.queue, (t, self.order, data, start, delays))

    def put_chunk(self, t, data, start, delays):
        """Queue bytes like `put`, but faster.

        `data` is not empty, no EOF was sent, and no rule in `delays` has a rate limit.
        """
        if t < self.latest:
            t = self.latest
        self.latest = t
        self.order += 1
        size = len(data) + CHUNK_OVERHEAD
        self.held += size
        self.budget.held += size
        heapq.heappush(self.queue, (t, self.order, data, start, delays))

    def charge(self, size):
        """Count a chunk of `size` bytes, and its overhead, as held."""
        self.held += size + CHUNK_OVERHEAD
        self.budget.held += size + CHUNK_OVERHEAD

    def credit(self, size):
        """Count `size` fewer bytes as held. For a whole chunk, `size` includes CHUNK_OVERHEAD."""
        self.held -= size
        self.budget.held -= size
        self.has_replies = self.has_replies and self.held > 0

    def keep(self, size):
        """Set `kept`, the bytes of memory that the chain uses for requests from the source."""
        self.budget.held += size - self.kept
        self.kept = size

    def append_due(self, data):
        """Append a chunk or EOF to send_buffer."""
        if self.send_buffer is NO_CHUNKS:       # all empty delay queues share this deque
            self.send_buffer = deque()
        self.send_buffer.append(data)

    def pop_next(self, now, joins):
        """Remove the first event, which must be due, and return its bytes or signal.

        joins    whether to join the bytes of the due chunks, up to about JOINED_MAX bytes: a late
                 loop catches up faster with one large send
        """
        _, _, data, _, _ = heapq.heappop(self.queue)
        if not joins or not data:
            return data
        chunks, size = [data], len(data)
        while self.queue and size < JOINED_MAX:
            due, _, data, _, _ = self.queue[0]
            if due > now or not data:
                break
            heapq.heappop(self.queue)
            chunks.append(data)
            size += len(data)
            self.credit(CHUNK_OVERHEAD)
        return b"".join(chunks)

    def pop_due(self, now, joins):
        """Move due chunks and EOFs into send_buffer. Returns the other signals that are due.

        joins    as in pop_next
        """
        signals = []
        while self.queue and self.queue[0][0] <= now:
            data = self.pop_next(now, joins)
            if data:
                self.append_due(memoryview(data))
            elif data is EOF:
                self.append_due(data)
            else:
                self.credit(CHUNK_OVERHEAD)
                signals.append(data)
        return signals

    def next_time(self, now):
        """Return the time for the timer: when an event is due or when reading resumes.

        If a rate limit has stopped the reading, read_limit() permits more bytes from `resume` on.
        """
        if not self.queue:
            return NEVER
        due, resume = self.queue[0][0], self.rate_limited_until - RATE_BACKLOG
        return resume if now < resume < due else due

    def consume(self, size):
        """Remove `size` bytes of the first chunk in send_buffer, after they were sent.

        size    0 for an EOF
        """
        rest = self.send_buffer[0][size:]   # of a memoryview or KernelPipe. EOF[0:] is EOF: false
        self.buffered_out += size
        if rest:
            self.send_buffer[0] = rest
            self.credit(size)
        else:
            self.send_buffer.popleft()
            self.credit(size + CHUNK_OVERHEAD)

    def release(self, removed, changed=()):
        """Undo the delays that removed or changed rules have caused. Other delays remain.

        Drops events that a changed rule has yielded for OPEN, as the rule will get OPEN again.
        Returns whether an event had a delay by a removed or changed rule.
        """
        rules = [*removed, *changed]
        if not any(rule in rules for *_, delays in self.queue for rule, _, _ in delays):
            return False
        entries, self.queue, had_replies = self.queue, [], self.has_replies
        self.latest = self.rate_limited_until = 0.0         # `put` computes both again
        entries.sort(key=lambda entry: entry[1])    # by `order`: bytes keep their order
        for _, _, data, start, delays in entries:
            self.credit(len(data) + CHUNK_OVERHEAD)
            is_outdated = any(from_open and rule in changed for rule, _, from_open in delays)
            if is_outdated:
                continue
            remaining = tuple(delay for delay in delays if delay[0] not in rules)
            self.put(start + sum(seconds for _, seconds, _ in remaining), data, start, remaining)
        self.has_replies = had_replies and self.held > 0    # `credit` may have reset has_replies
        return True

    def is_full(self, clock):
        """Return whether no bytes may be read into this queue now."""
        return (self.held > HELD_LOW or self.kept > 0) and self.read_limit(clock) <= 0

    def read_limit(self, clock):
        """Return how many bytes may be read into this queue now, or 0 if the queue is full.

        While the proxy does not read, TCP slows the sender down (backpressure). The queue may hold

            HELD_MAX_IDLE    while no rule delays bytes, or the first bytes are never due
            HELD_MAX         while rules delay bytes
            Rule.held_max    while a rule with a rate limit delays bytes by more than RATE_BACKLOG:
                             the sender must soon slow down to this rate
        """
        bound = HELD_MAX_IDLE
        if self.queue:
            first_due, _, _, _, delays = self.queue[0]
            if first_due < NEVER:
                is_rate_limited = self.rate_limited_until - RATE_BACKLOG > clock()
                bound = HELD_MAX
                if is_rate_limited:
                    bound = max([rule.held_max for rule, _, _ in delays if rule.rate_limited],
                                default=HELD_MAX_IDLE)
        allowance = self.budget.allowance(bound)
        room = allowance - self.held - CHUNK_OVERHEAD
        if self.kept:
            # Kept bytes do not count for `bound`, because replies free the kept bytes even while
            # the source is not read. Held and kept bytes together have the limit HELD_MAX.
            room = min(room, self.budget.allowance(HELD_MAX) - self.held - self.kept)
        # Many small reads would be slow, and rules like `slicer` would get only small chunks.
        is_room_too_small = room < min(READ_MIN, allowance / 2)
        return 0 if is_room_too_small else min(CHUNK, room)

    def tell_dropped(self, data, delays):
        """Tell the rules that have delayed a chunk that the proxy drops the chunk."""
        for rule, _, _ in delays:
            if rule.on_dropped:
                rule.on_dropped(rule, self.to, len(data))

    def discard(self):
        """Drop all bytes and signals that are held."""
        for _, _, data, _, delays in self.queue:
            self.tell_dropped(data, delays)
        self.queue, self.send_buffer = [], NO_CHUNKS
        self.credit(self.held)

    def close(self):
        """Drop all held data, and let the budget count nothing for this queue."""
        if self.held:
            self.discard()
        if self.kept:
            self.keep(0)
        self.budget.remove_queue()


# -- Loop ---------------------------------------------------------------------
#
# A loop runs in one thread. A loop has a selector for the sockets, a heap of timers, and a queue
# of calls from other threads. Other threads may call only `run_sync`, `call_soon_threadsafe`,
# `run_in_thread` and `stop`. A loop owns the resources that its connections share: the receive
# buffer, the budget and the kernel pipes.

def capture(function, *args):
    """Call a function. Returns (result, None), or (None, exception) if the function raises."""
    try:
        return function(*args), None
    except BaseException as exc:
        return None, exc


class StandardSelector:
    """The watched sockets of a Loop, and a selector of the standard library that watches them."""

    MASKS = [0, 1, 2, 3]    # MASKS[events] is the poller's number for `events`: here the same

    def __init__(self, poller):
        """poller: a selector of the standard library. For EpollSelector: a select.epoll()."""
        self.poller = poller
        self.close = poller.close
        self.fileno = getattr(poller, "fileno", None)       # a SelectSelector has no descriptor
        self.watched = {}       # {descriptor of a watched socket: callback}

    def watch(self, sock, events, callback):
        """Call callback(ready_events) whenever a socket is ready for one of `events`.

        events    EVENT_READ, EVENT_WRITE or both

        After an error of the socket, ready_events may also have an event that is not in `events`.
        """
        fd = sock.fileno()
        if fd in self.watched:
            self.poller.modify(fd, self.MASKS[events])
        else:
            self.poller.register(fd, self.MASKS[events])
        self.watched[fd] = callback

    def unwatch(self, sock):
        """Stop watching a socket. Does nothing if it is not watched.

        Call this function before the socket is closed. A closed socket has no descriptor.
        """
        fd = sock.fileno()
        if fd in self.watched:
            del self.watched[fd]
            self.poller.unregister(fd)

    def select(self, timeout=None):
        """Wait `timeout` seconds at most. Returns [(callback, events)] of the ready sockets."""
        # Look up all callbacks before any of them runs. A callback may close a socket and open
        # another socket, which gets the same descriptor.
        return [(self.watched[key.fd], events) for key, events in self.poller.select(timeout)]


class EpollSelector(StandardSelector):
    """The watched sockets of a Loop, and select.epoll: faster than selectors.EpollSelector.

    - A poll takes memory for MAX_EVENTS events, and not for an event of each registered socket.
    - `select` calls no Python function for an event.
    - Before `select` sleeps, `select` polls in a busy loop for SPIN_TIME: see `spin_then_sleep`.
    """

    # For epoll: EPOLLIN (1) for EVENT_READ (1), EPOLLOUT (4) for EVENT_WRITE (2), and both (5) for
    # BOTH_EVENTS (3).
    MASKS = [0, 1, 4, 5]
    # {mask from epoll: events}. 17 is EPOLLIN | EPOLLHUP: the peer has closed. 25 is EPOLLIN |
    # EPOLLERR | EPOLLHUP: the peer has reset the connection. Each other mask, such as the mask of
    # a connect() that has failed, counts as BOTH_EVENTS: see `select`.
    READY = {1: EVENT_READ, 4: EVENT_WRITE, 17: EVENT_READ, 25: EVENT_READ}
    BOTH_EVENTS = EVENT_READ | EVENT_WRITE
    MAX_EVENTS = 256        # the most events of one poll, so that timers do not wait too long
    SPIN_TIME = 0.00008     # seconds in the busy loop: about the time that a process needs to
                            #   fall asleep and to wake up
    PREEMPTED = 0.001       # if the busy loop takes more seconds, another process has had the CPU
    BACKOFF_MAX = 8         # the largest value of `skips` after a busy loop without events
    BACKOFF_PREEMPTED = 512     # the value of `skips` after another process has had the CPU

    def __init__(self, clock=time.monotonic):
        super().__init__(select.epoll())
        self.clock = clock
        self.skips = 0      # how many more sleeps begin without a busy loop
        self.backoff = 0    # the first value of `skips` after the last busy loop

    def select(self, timeout=None):
        """Wait `timeout` seconds at most. Returns [(callback, events)] of the ready sockets."""
        events = self.poller.poll(0, self.MAX_EVENTS)   # without a sleep
        if not events and timeout != 0:
            events = self.spin_then_sleep(-1 if timeout is None else timeout)   # -1: no time-out
        watched, to_events, both = self.watched, self.READY.get, self.BOTH_EVENTS
        return [(watched[fd], to_events(mask, both)) for fd, mask in events]

    def spin_then_sleep(self, timeout):
        """Poll in a busy loop for SPIN_TIME, then sleep. Returns the events of epoll.poll().

        timeout    the most seconds to sleep; -1: without a limit

        Many peers reply faster than a process falls asleep and wakes up. The busy loop receives
        such replies sooner. Without a reply, the busy loop costs as much CPU time as falling
        asleep and waking up (Karlin et al., Empirical Studies of Competitive Spinning, 1991).
        After a busy loop without events, the next `skips` calls only sleep.
        """
        if self.skips:
            self.skips -= 1
            return self.poller.poll(timeout, self.MAX_EVENTS)
        clock, events, elapsed = self.clock, [], 0.0
        began = clock()
        while not events and elapsed < self.SPIN_TIME:
            os.sched_yield()            # the peer may need this CPU
            events = self.poller.poll(0, self.MAX_EVENTS)
            elapsed = clock() - began
        if elapsed > self.PREEMPTED:    # another process has had the CPU for a whole time slice
            self.backoff = self.skips = self.BACKOFF_PREEMPTED
            return events               # even if the list is empty: a timer may be due
        # After successive busy loops without events, `skips` is 1, 2, 4, 8, 8 ...
        self.backoff = 0 if events else min(self.BACKOFF_MAX, max(1, 2 * self.backoff))
        self.skips = self.backoff
        return events or self.poller.poll(timeout, self.MAX_EVENTS)


def raise_fd_limit():
    """Raise this process's limit of file descriptors as far as permitted (man 2 getrlimit).

    Returns the new limit, or 0 if the limit is unknown.
    """
    try:
        import resource
    except ImportError:                 # Windows does not have this module
        return 0
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for limit in hard, 10240:           # macOS accepts 10240 at most, even if `hard` is higher
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            return limit
        except (ValueError, OSError):   # this limit is too high
            pass
    return soft


def fds_available(limit):
    """Open files to find out whether SPARE_FDS descriptors below a limit are free."""
    fds = []
    try:
        while len(fds) < SPARE_FDS:
            fds.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        return False
    finally:
        for fd in fds:
            os.close(fd)
    return max(fds) < limit         # the kernel hands out the lowest free descriptors


# A timer is a list, because a heap compares lists faster than objects. The indexes of its items:
#   DUE         the time when the timer is due
#   ORDER       a number that orders timers with the same due time
#   CALLBACK    the function to call at this time; None after the call or after `cancel`
DUE, ORDER, CALLBACK = range(3)


class Loop:
    """Watches sockets, runs timers, and runs the calls of other threads."""

    FD_SETSIZE = 1024       # select() accepts only descriptors below this number
    REBUILD_MIN = 100       # fewer cancelled timers are no reason to rebuild the heap of timers

    # Whether this process has ever run out of file descriptors (for all loops together). If True,
    # listeners check that descriptors are free before they accept a connection.
    fds_exhausted = False

    # Listeners accept connections only while descriptors below this limit are free. Descriptors
    # from this limit on are for the control server.
    fd_limit = math.inf

    def __init__(self, clock=time.monotonic, selector=None):
        """selector: a selector of the standard library. None: EpollSelector, if possible."""
        self.clock = clock
        if selector is None and not hasattr(select, "epoll"):
            selector = selectors.DefaultSelector()
        self.selector: "Any" = StandardSelector(selector) if selector else EpollSelector()
        self.watched = self.selector.watched    # see StandardSelector, also for the two methods
        self.watch, self.unwatch = self.selector.watch, self.selector.unwatch
        self.timers = []                    # a heap of timers: see DUE
        self.order = 0                      # the ORDER of the last timer
        self.cancelled_count = 0            # number of cancelled timers in the heap
        self.calls = deque()                # (function, args) queued by other threads
        self.pid = os.getpid()              # the process that has created the loop
        self.running = True                 # False after `stop`
        self.ended = False                  # whether `run` has returned
        # Shared by the connections of this loop
        self.budget = Budget()
        self.buffer = bytearray(CHUNK)      # the buffer for all calls of recv_into
        self.view = memoryview(self.buffer)
        self.pipe_pool = []                 # empty KernelPipes
        self.wakeup_send, self.wakeup_recv = socket.socketpair()
        self.wakeup_send.setblocking(False)
        self.wakeup_recv.setblocking(False)
        self.watch(self.wakeup_recv, EVENT_READ, self.on_wakeup)
        # epoll rounds a time-out to milliseconds, but select() only to microseconds. So a short
        # `wait` calls select() for the list precise_fds, which has the epoll object's descriptor.
        fileno = self.selector.fileno
        self.precise_fds = [fileno()] if fileno and fileno() < self.FD_SETSIZE else None
        # select() can watch 512 sockets on Windows. On other systems, select() can only watch
        # descriptors below FD_SETSIZE, and 500 sockets leave enough descriptors for files.
        self.socket_limit = 500 if isinstance(selector, selectors.SelectSelector) else math.inf

    def capacity_error(self):
        """Return why the loop cannot serve one more connection, or "" if the loop can."""
        if len(self.watched) + 2 > self.socket_limit:       # 2 sockets for the connection
            return "select() takes no more sockets"
        if Loop.fds_exhausted and not fds_available(self.fd_limit):
            return "too few descriptors are left"
        return ""

    def call_at(self, t, callback):
        """Call callback() at the time t of the loop's clock. Returns the timer, for `cancel`."""
        self.order += 1
        timer = [t, self.order, callback]
        heapq.heappush(self.timers, timer)
        return timer

    def cancel(self, timer):
        """Cancel a timer. Does nothing if `timer` is None, has called back, or is cancelled."""
        if not timer or not timer[CALLBACK]:
            return
        timer[CALLBACK] = None      # the timer stays in the heap for now
        self.cancelled_count += 1
        # Rebuild the heap if more than half of the timers in the heap are cancelled.
        if self.cancelled_count > max(self.REBUILD_MIN, len(self.timers) // 2):
            self.timers = [entry for entry in self.timers if entry[CALLBACK]]
            heapq.heapify(self.timers)
            self.cancelled_count = 0
        # The loop must not wake up for cancelled timers: remove them from the top of the heap.
        while self.timers and not self.timers[0][CALLBACK]:
            heapq.heappop(self.timers)
            self.cancelled_count -= 1

    def run(self):
        """Run until `stop` is called."""
        try:
            while self.running:
                for callback, events in self.wait():
                    callback(events)
                    if self.calls:      # run calls of other threads before the other callbacks
                        self.run_queued()
                if self.timers:
                    self.run_timers()
        finally:
            self.ended = True

    def wait(self):
        """Wait until sockets are ready, or until the next timer is due.

        Returns [(callback, events)] of the ready sockets. May return [] before the timer is due:
        `run` calls `wait` again.
        """
        if not self.timers:
            return self.selector.select()       # without a time-out the kernel sets no timer
        timeout = max(0, self.timers[0][DUE] - self.clock())
        if timeout > PRECISE_WAIT:
            # epoll is not precise: return early, and let the next call use select.select().
            return self.selector.select(min(MAX_WAIT, timeout - PRECISE_WAIT / 2))
        if timeout == 0 or self.precise_fds is None:
            return self.selector.select(timeout)
        if timeout > SELECT_OVERSHOOT:
            select.select(self.precise_fds, [], [], timeout - SELECT_OVERSHOOT)
        return self.selector.select(0)

    def run_timers(self):
        """Call the callbacks of the timers that are due."""
        now = self.clock()
        while self.timers and self.timers[0][DUE] <= now:
            timer = heapq.heappop(self.timers)
            callback = timer[CALLBACK]
            timer[CALLBACK] = None          # cancel() has no effect any more
            if callback:
                callback()
            else:                           # the timer was cancelled
                self.cancelled_count -= 1

    def call_soon_threadsafe(self, function, *args):
        """Queue a call of function(*args) for the loop's thread, and wake up the loop.

        A handler of an OS signal may call this function too.
        """
        self.calls.append((function, args))
        # send() fails if the loop is closed. send() also fails if the buffer is full, but then the
        # bytes in the buffer wake up the loop.
        with contextlib.suppress(OSError):
            self.wakeup_send.send(b"!")

    def on_wakeup(self, events):
        """Run the queued calls. Drops the bytes with which other threads wake up the loop."""
        with contextlib.suppress(BlockingIOError):
            self.wakeup_recv.recv(4096)
        self.run_queued()

    def run_queued(self):
        """Run the calls that other threads have queued."""
        while self.calls:
            function, args = self.calls.popleft()
            function(*args)

    def run_sync(self, function, *args):
        """Run a function in the loop's thread, and return its result.

        Only other threads may call run_sync: the loop's thread would wait for itself. Raises the
        function's exception, or RuntimeError if the loop has ended or runs in another process.
        """
        self.check_process()
        done, outcome = threading.Event(), []

        def run():
            outcome.extend(capture(function, *args))
            done.set()

        self.call_soon_threadsafe(run)
        # A loop that has ended does not run the call: check `ended` every second.
        while not done.wait(0 if self.ended else 1):
            # The loop may have run the call between the check of `done` and the end of the loop.
            if self.ended and not done.is_set():
                raise RuntimeError("the loop has ended")
        result, exc = outcome
        if exc:
            raise exc
        return result

    def is_forked(self):
        """Return whether this process is a fork of the process that has created the loop.

        A fork has no thread that runs the loop, but shares the epoll object of the loop. If the
        fork stopped watching a socket, the loop would get no more events of the socket.
        """
        return self.pid != os.getpid()

    def check_process(self):
        """Raise RuntimeError if this process is a fork: see is_forked."""
        if self.is_forked():
            raise RuntimeError("the proxy runs in process %d: a fork of that process can only "
                               "connect to the proxy" % self.pid)

    def run_in_thread(self, function, on_done):
        """Run a function in a new thread, then call on_done(result, exc) in the loop's thread.

        `exc` is the exception that the function has raised, or None.
        """
        def run():
            result, exc = capture(function)
            self.call_soon_threadsafe(on_done, result, exc)

        thread = threading.Thread(target=run, daemon=True)
        try:
            thread.start()
        except RuntimeError as exc:     # the system allows no more threads
            self.call_soon_threadsafe(on_done, None, exc)

    def stop(self):
        """Let `run` return. A handler of an OS signal may call this function too."""
        self.running = False
        self.call_soon_threadsafe(int)  # wakes up the loop; int() has no effect

    def close(self):
        """Free the descriptors of the loop, after `run` has returned."""
        self.selector.close()
        self.wakeup_send.close()
        self.wakeup_recv.close()
        while self.pipe_pool:
            self.pipe_pool.pop().close()


# -- Sockets ------------------------------------------------------------------
#
# Addresses as text (HOST:PORT) and as socket addresses, the listener, the non-blocking connect,
# and the pipes in the kernel.

LOOPBACK = ("127.0.0.1", "::1")     # the addresses of the name localhost (RFC 6761, 6.3)
WILDCARD = ("0.0.0.0", "::")        # a listener on these has all addresses of this machine
# {wildcard address: the loopback address that a connect to the wildcard address reaches}
LOOPBACK_OF = dict(zip(WILDCARD, LOOPBACK))

# The base class of socket.socket, which takes twice the time of a RawSocket to create and close.
RawSocket = socket.SocketType
SOCK_NONBLOCK = getattr(socket, "SOCK_NONBLOCK", 0)     # macOS and Windows lack this flag
HAVE_SPLICE = hasattr(os, "splice")     # Linux, with Python 3.10 or newer
F_SETPIPE_SZ = 1031                     # of linux/fcntl.h; Python 3.9 and older lack the name
SO_ATTACH_FILTER, SO_DETACH_FILTER = 26, 27     # of asm-generic/socket.h
BPF_RET = 0x06                          # of linux/bpf_common.h
# After these errors, the process or the whole system has no file descriptors left.
FD_EXHAUSTED = {errno.EMFILE, errno.ENFILE}
# After these errors of splice, a link uses recv: no data has come, or this system or this socket
# does not support splice.
SPLICE_UNAVAILABLE = {errno.EAGAIN, errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.EBADF}
# After these errors of a non-blocking connect(), the kernel continues to connect.
CONNECT_PENDING = {errno.EINPROGRESS, errno.EALREADY, errno.EWOULDBLOCK}


def parse_address(text, min_port=1):
    """Parse HOST:PORT, [::1]:8000 or :8000 into (host, port). Raises ValueError.

    min_port    the smallest valid port: 1 for a connect, and 0 for a listener.
    """
    shown = hide_password(text)
    message = "must be HOST:PORT, like localhost:8000, [::1]:8000 or :8000, not %r" % shown
    if "://" in text:
        raise ValueError(url_error(text))
    if "/" in text:
        raise ValueError(message)
    host, colon, port = text.strip().rpartition(":")
    if re.fullmatch(r"\[.*:.*\]", host):            # an IPv6 address in brackets
        host = host[1:-1]
    elif re.search(r"[][:]", host):                 # brackets or colons in other places
        raise ValueError("must be [HOST]:PORT if the host is an IPv6 address, like "
                         "[::1]:8000, not %r" % shown)
    if not colon or not re.fullmatch("[0-9]{1,5}", port):
        raise ValueError(message)
    if not min_port <= int(port) <= 65535:
        raise ValueError("must have a port from %d to 65535, not %r" % (min_port, shown))
    if not is_valid_host(host):
        raise ValueError(message)
    return host, int(port)


# {scheme of a backend with TLS: its default port, or None}
TLS_SCHEMES = {"tls": None, "https": 443, "rediss": 6379, "smtps": 465, "ldaps": 636,
               "amqps": 5671, "mqtts": 8883}


def parse_backend(text):
    """Parse the address of a backend: HOST:PORT, or for TLS a URL like tls://db.example:443.

    Returns (host, port), or (host, port, "tls") for a URL. Raises ValueError.
    """
    scheme, separator, location = text.strip().partition("://")
    scheme = scheme.lower()
    if not separator or scheme not in TLS_SCHEMES:
        return parse_address(text)
    location = location[:-1] if location.endswith("/") else location
    lacks_port = re.fullmatch(r"\[[^]]*\]|[^:/]*", location)    # only [ADDRESS], or only a name
    default_port = TLS_SCHEMES[scheme]
    if lacks_port and default_port:
        location = "%s:%d" % (location, default_port)
    try:
        host, port = parse_address(location)
    except ValueError:
        raise ValueError("must be like %s://HOST:PORT, without a path or a user, not %r"
                         % (scheme, hide_password(text))) from None
    require_ssl()
    return host, port, "tls"


def require_ssl(prefix=""):
    """Raise ValueError if this Python has no module ssl.

    prefix    the beginning of the error, like "tls-cert ".
    """
    try:
        ssl.SSLContext                      # noqa: B018 (this imports the module)
    except ImportError:
        raise ValueError("%sneeds the module ssl, which this Python does not have" % prefix
                         ) from None


def url_error(text):
    """Return the error message for SCHEME://[USER:PASSWORD@][HOST][:PORT] instead of HOST:PORT."""
    scheme, host, port = re.match(
        r"(.*?)://(?:.*@)?(\[[^]]*\]|[^/:?#]*)(?::(\d+))?", text, re.DOTALL).groups()
    default_port = {"http": "80", "https": "443"}.get(scheme.lower(), "PORT")
    return ("must be HOST:PORT, without a scheme or a path, like %s:%s, not the URL %r"
            % (host or "localhost", port or default_port, hide_password(text)))


def hide_password(text):
    """Return an address or a URL with three dots in place of the user and the password.

    The dots replace all text before the last "@", except the scheme: a password may contain "@"
    and "/". So redis://me:p@ss@db:6379 becomes redis://...@db:6379.
    """
    return re.sub(r"\A([^:/@]*://)?.*@", r"\1...@", text, flags=re.DOTALL)


# Parses the address of a listener. Port 0 means any free port.
parse_listener = functools.partial(parse_address, min_port=0)


def encode_host(host):
    """Return a host name as bytes. Raises UnicodeError.

    ASCII names do not need the codec idna, whose import takes 5 ms.
    """
    return host.encode("ascii" if re.fullmatch("[!-~]*", host) else "idna")


def is_valid_host(host):
    """Return whether a host is empty, an IPv6 address, or a name that a resolver accepts.

    A name has at most 253 bytes, and consists of labels of 1 to 63 bytes with dots between the
    labels. One more dot may follow the name.
    """
    if ":" in host:
        return bool(re.fullmatch(r"[0-9A-Fa-f:.]+(%[\w.-]+)?", host))
    try:
        name = encode_host(host).decode("ascii")
    except UnicodeError:
        return False
    has_valid_labels = bool(re.fullmatch(r"([\w-]{1,63}(\.[\w-]{1,63})*\.?)?", name))
    return has_valid_labels and len(name.rstrip(".")) <= 253


def normalize_host(host):
    """Return a host name in a form that can be compared: in lower case and IDNA-encoded.

    The result has no final dot. A name that IDNA cannot encode is only converted to lower case.
    """
    try:
        return host.lower().rstrip(".").encode("idna").decode("ascii")
    except UnicodeError:
        return host.lower()


def is_loopback(host):
    """Return whether an IP address is one of this machine's loopback addresses."""
    return host == "::1" or host.startswith("127.")


def is_own_address(host):
    """Return whether an IP address belongs to this machine: whether bind() accepts the address."""
    if is_loopback(host):
        return True
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with contextlib.closing(socket.socket(family, socket.SOCK_STREAM)) as sock:
            sock.bind((host, 0))
    except OSError:
        return False
    return True


def is_wildcard(host):
    """Return whether a host stands for all addresses of this machine: "", 0.0.0.0 or ::.

    A listener on a wildcard host has a socket for IPv4 and a socket for IPv6, as in Toxiproxy.
    """
    addresses = resolve_numeric((host, 0))      # for the host "0", the address 0.0.0.0
    return host == "" or any(ip in WILDCARD for _, (ip, *_) in addresses)


def check_backend(backend, local_addresses):
    """Raise ValueError if a connect to the backend would reach a listener of the proxy.

    local_addresses    the (host, port) of each listener.

    Does not check a backend whose name needs a resolver.
    """
    reached = reached_addresses(backend)
    for local_host, local_port in local_addresses:
        if is_wildcard(local_host):
            reaches_listener = any(port == local_port and is_own_address(host)
                                   for host, port in reached)
        else:
            listener_addresses = reached_addresses((local_host, local_port))
            reaches_listener = not reached.isdisjoint(listener_addresses)
        if reaches_listener:
            raise ValueError("%s is the proxy's own address: the proxy would connect to itself"
                             % format_address(backend))


def reached_addresses(address):
    """Return the addresses that a connect to (host, port) reaches: a set of (host, port).

    The set is empty if the host needs a resolver.
    """
    reached = set()
    for _, (host, port, *_) in resolve_numeric(address):
        host = re.sub("^::ffff:(?=.*[.])", "", host)    # ::ffff:127.0.0.1 means 127.0.0.1
        reached.add((LOOPBACK_OF.get(host, host), port))    # 0.0.0.0 reaches 127.0.0.1
    return reached


def format_address(address):
    """Return an address as text, like db.example:80, [::1]:80 or tls://db.example:443.

    address    (host, port), (host, port, "tls"), or a socket address, which has more fields
               for IPv6. The port of an address from parse_upstream may also be the name of a
               service, or "" for no port.
    """
    host, port = address[:2]
    scheme = "tls://" if address[2:] == ("tls",) else ""
    shown_host = "[%s]" % host if ":" in host else host
    return scheme + (shown_host if port == "" else "%s:%s" % (shown_host, port))


def resolve(address, wildcard=LOOPBACK, flags=0):
    """Return the socket addresses of (host, port, ...) as [(family, address)], the best first.

    wildcard    the addresses for an empty host.
    flags       for getaddrinfo().

    Raises OSError.
    """
    host, port = address[:2]
    if port == "":                      # parse_upstream permits an address without a port
        raise OSError(errno.EINVAL, "missing port in address")
    known_hosts = {"localhost": LOOPBACK, "": wildcard}.get(host.lower())
    if known_hosts:
        flags |= socket.AI_NUMERICHOST      # getaddrinfo() uses no resolver for IP addresses
    addresses = []
    for host_or_ip in known_hosts or [host]:
        for family, _, _, _, sockaddr in socket.getaddrinfo(
                encode_host(host_or_ip), port, type=socket.SOCK_STREAM, flags=flags):
            if (family, sockaddr) not in addresses:
                addresses.append((family, sockaddr))
    return addresses


def resolve_numeric(address):
    """Return the socket addresses of (host, port, ...), or [] if a resolver is needed.

    An IP address, localhost and an empty host need no resolver.
    """
    try:
        return resolve(address, flags=socket.AI_NUMERICHOST)
    except OSError:
        return []


def address_unavailable(error):
    """Return whether an error means that this machine has no such address, or has no IPv6."""
    return error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL, errno.EINVAL)


class CannotListen(OSError):
    """Listening on an address has failed.

    address    the address, as text.
    reason     the system's error message.
    setting    the setting with the address, such as "--http-port", "" if no setting is known.
    """

    setting = ""

    def __init__(self, error, address, mode="normal"):
        """`error` is an OSError: the reason why a Listener cannot have the mode `mode`."""
        self.address = format_address(address)
        self.reason = error.strerror or str(error)
        if mode != "normal":
            self.reason = "cannot %s clients: %s" % (mode, self.reason)
        super().__init__(error.errno, "cannot listen on %s: %s" % (self.address, self.reason))

    @classmethod
    @contextlib.contextmanager
    def naming(cls, setting):
        """Set `setting` in a CannotListen that the body of the `with` statement raises."""
        try:
            yield
        except cls as error:
            error.setting = setting
            raise


class Listener:
    """Accepts connections on all addresses of a host, on one port. Runs in the loop's thread.

    The kernel replies to a connect before any program knows the client. Therefore a mode applies
    to all new clients. Open connections continue. The modes are:

      normal    The sockets listen, and the loop watches the sockets. A connect succeeds.
      refuse    The sockets are bound, but do not listen. A connect gets ECONNREFUSED (RST).
      drop      Fillers keep the backlogs full. A filler is a connection of the listener to itself.
                A connect gets no reply until the mode is normal again. The loop does not watch the
                sockets, because the fillers make all sockets readable.

    With reuse_port, the kernel spreads new connects over the listening sockets of several
    processes. A process with the mode refuse gets no connects. The mode drop uses no fillers,
    because the kernel could connect a filler to another process. Instead, a packet filter discards
    the connects to this process.
    """

    last_warning = -RETRY_DELAY     # when any listener last warned that it cannot accept
    burst = 1.0                     # the most connections that the next `accept` accepts

    def __init__(self, local, on_accept, mode="normal", reuse_port=None):
        """Bind the port. Raises CannotListen.

        on_accept     function that is called with the socket and the address of each client.
        reuse_port    the number of this process among the processes on the port, or None.
        """
        self.local = local
        self.on_accept = on_accept
        self.mode = mode
        self.reuse_port = reuse_port
        self.locks = []                 # sockets whose names are locks: see lock_number
        self.fillers = {}               # {local address of a filler: its socket}
        self.paused_since = None        # when accepting was paused; None if it is not paused
        self.bind()

    def __str__(self):
        return " and ".join(format_address(sock.getsockname()) for sock in self.sockets)

    def address(self):
        """Return the socket address of the first socket."""
        return self.sockets[0].getsockname()

    def bind(self):
        """Bind the port, or, after `close`, bind the same port again. Raises CannotListen."""
        self.loop = None                        # set by `open`
        self.sockets = listen(self.local, self.reuse_port)
        host, _ = self.local
        _, bound_port, *_ = self.address()
        self.local = host, bound_port           # for port 0, the kernel has picked a port
        wanted_mode = self.mode
        self.mode = "normal"                    # the mode of the sockets that listen() returns
        try:
            if self.reuse_port:
                self.lock_number()
            self.set_mode(wanted_mode)
        except CannotListen:
            self.close()
            raise

    def lock_number(self):
        """Claim the number `reuse_port` for this process, at each address of the listener.

        Raises CannotListen if another process has the number. Each lock is an abstract socket
        (man 7 unix). Its name has the address and the number. Two sockets in a network namespace
        cannot have the same name. The kernel frees the name when the process ends.
        """
        for sock in self.sockets:
            address = sock.getsockname()
            try:
                lock = RawSocket(socket.AF_UNIX, socket.SOCK_STREAM)
                self.locks.append(lock)
                lock.bind("\0vaurien %s %d" % (format_address(address), self.reuse_port))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    error = OSError(error.errno, "another proxy at this address has the same "
                                                 "number: --reuse-port %d" % self.reuse_port)
                raise CannotListen(error, address) from None

    def open(self, loop):
        """Begin to accept connections."""
        self.loop = loop
        for sock in self.sockets:
            self.watch(sock)

    def watch(self, sock):
        """In the mode normal, let the loop call `accept` when a client waits."""
        if self.mode == "normal":
            self.loop.watch(sock, EVENT_READ, functools.partial(self.accept, sock))

    def set_mode(self, mode):
        """Change the mode. After a failure, sets the mode normal and raises CannotListen."""
        if mode == self.mode:
            return
        # Connected fillers stay in `fillers`, so that accept_one() finds and closes both ends.
        for address, filler in list(self.fillers.items()):
            if not is_connected(filler):
                del self.fillers[address]
                filler.close()
        for sock in self.sockets:               # first, return to the mode normal
            self.listen_again(sock)
        self.mode = mode
        if mode != "normal":
            self.leave_normal(mode)
        elif self.loop:
            for sock in self.sockets:
                self.watch(sock)

    def leave_normal(self, mode):
        """Let the kernel refuse or drop connects, after the clients that wait are accepted.

        If no descriptor is left for a client that waits, the mode refuse resets the client, and
        the mode drop lets the client wait.
        """
        for index, sock in enumerate(self.sockets):
            if self.loop:                       # after `open`
                self.accept_backlog(sock)
            address = sock.getsockname()
            try:
                if mode == "refuse":
                    self.sockets[index] = refuse_connects(sock)
                elif self.reuse_port:
                    set_drop_filter(sock)
                else:
                    self.fill_backlog(sock)
            except OSError as error:
                self.set_mode("normal")
                raise CannotListen(error, address, mode) from None

    def accept_backlog(self, sock):
        """Accept all clients that wait, and stop watching the socket."""
        self.loop.unwatch(sock)
        for _ in range(BACKLOG):
            if not self.accept_one(sock):
                return

    def listen_again(self, sock):
        """End the mode refuse or drop of a socket. Raises CannotListen."""
        try:
            set_reuse_address(sock, 1)          # refuse_connects() has set the option to 0
            if self.reuse_port:                 # set_drop_filter() may have set a filter
                with contextlib.suppress(FileNotFoundError):    # no filter is set
                    sock.setsockopt(socket.SOL_SOCKET, SO_DETACH_FILTER, 0)
            sock.listen(BACKLOG)
        except OSError as error:
            raise CannotListen(error, sock.getsockname()) from None

    def fill_backlog(self, sock):
        """Connect to a listening socket until a connect gets no reply. Raises OSError.

        While the backlog is full, the kernel drops each SYN (man 2 listen).
        """
        # While a backlog of 0 is empty, Linux treats each SYN as part of a SYN flood, and replies
        # with a SYN cookie. So the first filler connects before listen(0).
        self.add_filler(sock)
        sock.listen(0 if LINUX else 1)      # room for one. On macOS, 0 means the largest backlog
        for _ in range(FILLERS_MAX):
            if not is_connected(self.add_filler(sock)):
                return
        raise OSError(errno.ENOTSUP, "this system accepts clients beyond the backlog")

    def add_filler(self, sock):
        """Connect a new filler to a listening socket. Returns the filler. Raises OSError.

        Waits FILL_TIMEOUT at most for a reply. A slow kernel may accept the filler even later.
        """
        filler = RawSocket(sock.family, socket.SOCK_STREAM)
        try:
            host, *rest = sock.getsockname()
            host = LOOPBACK_OF.get(host, host)          # 127.0.0.1 for 0.0.0.0
            filler.settimeout(FILL_TIMEOUT)
            with contextlib.suppress(socket.timeout):
                filler.connect((host, *rest))
            self.fillers[filler.getsockname()] = filler
        except OSError:
            filler.close()
            raise
        return filler

    def accept(self, sock, events):
        """Accept the connections that wait, `burst` at most.

        The next burst is larger if `burst` connections waited, and smaller if fewer waited. An
        accept() without a waiting connection wastes a system call.
        """
        burst = self.burst
        self.burst = max(1.0, burst / 2)            # if the loop ends early
        for _ in range(int(burst)):
            # An earlier callback may have closed the socket, or changed the mode.
            is_accepting = sock in self.sockets and self.mode == "normal"
            if not is_accepting or not self.accept_one(sock):
                return
        self.burst = min(ACCEPT_BURST, 1.25 * burst)

    def accept_one(self, sock):
        """Accept a connection. Returns False if no connection waits.

        If no descriptors or no memory are left, calls `pause` and returns False.
        """
        reason = self.loop.capacity_error()
        if reason:
            self.pause(sock, reason)
            return False
        try:
            # accept() would create a socket.socket, which is slower than a RawSocket.
            fd, peer = sock._accept()
            client = RawSocket(sock.family, socket.SOCK_STREAM, 0, fd)
        except BlockingIOError:                 # no connection waits
            return False
        except ConnectionError:                 # the client has closed its connection
            return True
        except OSError as error:                # no descriptors or no memory are left
            if error.errno in FD_EXHAUSTED:
                Loop.fds_exhausted = True       # from now on, capacity_error() checks descriptors
            self.pause(sock, error.strerror)
            return False
        self.paused_since = None
        if fd + SPARE_FDS >= self.loop.fd_limit:
            Loop.fds_exhausted = True
        if self.fillers and peer in self.fillers:   # the other end of a filler
            self.fillers.pop(peer).close()
            client.close()
            return True
        try:
            # On macOS, `peer` is empty if the client has closed the connection. Then getpeername()
            # raises OSError.
            self.on_accept(client, peer or client.getpeername())
        except OSError:
            client.close()
        return True

    def pause(self, sock, reason):
        """Stop accepting for RETRY_DELAY. Logs the reason, at most once in RETRY_DELAY.

        After ACCEPT_TIMEOUT without an accepted client, resets the clients that wait. Otherwise,
        two proxies that are each the backend of the other could wait forever for descriptors.
        """
        self.loop.unwatch(sock)
        now = self.loop.clock()
        if self.paused_since is None:
            self.paused_since = now
        elif now - self.paused_since > ACCEPT_TIMEOUT:
            self.reset_waiting(sock)
        if now - Listener.last_warning >= RETRY_DELAY:
            Listener.last_warning = now
            log.warning("cannot accept on %s: %s: trying again in %g s", self, reason,
                        RETRY_DELAY)
        self.loop.call_at(now + RETRY_DELAY, functools.partial(self.resume, sock))

    def resume(self, sock):
        """Accept again after a pause, unless the socket is closed."""
        try:
            if sock in self.sockets:
                self.watch(sock)
        except OSError as error:        # the selector takes no more sockets
            self.pause(sock, error.strerror)

    @staticmethod
    def reset_waiting(sock):
        """Reset the clients that wait for accept(), ACCEPT_BURST at most."""
        with contextlib.suppress(OSError):      # no client waits, or no descriptor is left
            for _ in range(ACCEPT_BURST):
                fd, _ = sock._accept()
                client = RawSocket(sock.family, socket.SOCK_STREAM, 0, fd)
                reset_on_close(client)
                client.close()

    def close(self):
        """Close all sockets, which frees the port."""
        for sock in self.sockets:
            if self.loop:
                self.loop.unwatch(sock)
            sock.close()
        for sock in [*self.fillers.values(), *self.locks]:
            sock.close()
        self.sockets, self.fillers, self.locks = [], {}, []


def set_reuse_address(sock, value):
    """Set SO_REUSEADDR, except on Windows, where the option lets two processes use one port."""
    if os.name == "posix":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, value)


def set_drop_filter(sock):
    """Let Linux discard all packets to a listening socket. Raises OSError.

    The filter is a program of one instruction: accept 0 bytes of the packet
    (linux/Documentation/networking/filter.rst).
    """
    sock_filter = struct.pack("=HBBI", BPF_RET, 0, 0, 0)    # code, two unused jumps, 0 bytes
    program = array.array("B", sock_filter)
    address, _ = program.buffer_info()
    sock_fprog = struct.pack("HP", 1, address)      # the number of instructions, and a pointer
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, sock_fprog)


def refuse_connects(sock):
    """Let the kernel refuse connects to a listening socket, but keep the port. Raises OSError.

    Returns the socket that keeps the port: `sock` on Linux, and a new socket on other systems.
    While SO_REUSEADDR is 0, no other program can bind the port.
    """
    family, address = sock.family, sock.getsockname()
    set_reuse_address(sock, 0)
    try:
        sock.shutdown(socket.SHUT_RD)           # the opposite of listen(), only on Linux
    except OSError:
        sock.close()
        sock = bind_socket(family, address)
        set_reuse_address(sock, 0)
    return sock


def is_connected(sock):
    """Return whether the connect() of a socket has succeeded."""
    try:
        return bool(sock.getpeername())
    except OSError:
        return False


def listen(local, reuse_port=None):
    """Return sockets that listen on every address of (host, port), all on one port.

    Port 0 means any port that is free on all addresses. Raises CannotListen.
    """
    # For port 0, the kernel picks a port that is free on the first address. If the port is in use
    # on the second address, another attempt gets another port.
    _, port = local
    attempts = 20 if port == 0 else 1
    for _ in range(attempts):
        sockets, failure = try_listen(local, reuse_port)
        if failure is None or (sockets and address_unavailable(failure)):   # IPv6 may be missing
            return sockets
        for sock in sockets:
            sock.close()
        if failure.errno != errno.EADDRINUSE:
            break
    raise failure


def try_listen(local, reuse_port=None):
    """Listen on the addresses of (host, port), in order.

    Skips addresses that this machine lacks, and stops at any other error. Returns (sockets,
    failure). The failure is the CannotListen for the last error, or None.
    """
    host, port = local
    if is_wildcard(host):
        host = ""                               # for "", `resolve` returns WILDCARD
    try:
        addresses = resolve((host, port), WILDCARD)
    except OSError as error:
        return [], CannotListen(error, local)
    sockets, failure = [], None
    for family, (ip, _, *ipv6_fields) in addresses:
        address = (ip, port, *ipv6_fields)
        try:
            sockets.append(bind_listener(family, address, reuse_port))
            port = sockets[0].getsockname()[1]  # if it was 0: the port that the kernel has picked
        except OSError as error:
            failure = CannotListen(error, address)
            if not address_unavailable(error):
                break
    return sockets, failure


def set_stream_options(sock):
    """Let a TCP socket send small chunks at once, and keep urgent bytes in the stream.

    Without SO_OOBINLINE, recv() skips a byte that the peer has sent with MSG_OOB (man 7 tcp).
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)


LINGER_ZERO = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)      # a struct linger: on, 0 s


def reset_on_close(sock):
    """Let close() send RST instead of FIN, by SO_LINGER with a time of 0 (man 7 socket)."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_ZERO)
    except OSError:                         # the socket has failed already
        pass


def bind_listener(family, address, reuse_port=None):
    """Return a socket that listens on one address. Raises OSError."""
    _, port, *_ = address
    if LINUX and port == 0:
        # If the kernel chose the port of the listening socket, shutdown() in refuse_connects()
        # would free the port. So let the kernel choose a port for `other`, close `other`, and use
        # its port.
        with contextlib.closing(bind_socket(family, address)) as other:
            address = other.getsockname()
    sock = bind_socket(family, address, reuse_port)
    try:
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


def bind_socket(family, address, reuse_port=None):
    """Return a socket bound to one address, with the options of a listener. Raises OSError."""
    sock = RawSocket(family, socket.SOCK_STREAM)
    try:
        set_reuse_address(sock, 1)
        if reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if LINUX:                       # accepted sockets inherit the options
            set_stream_options(sock)
        sock.setblocking(False)
        sock.bind(address)
    except OSError:
        sock.close()
        raise
    return sock


def first_address(local):
    """Return the first address of a listener at (host, port), as text. Raises CannotListen.

    The text for a wildcard host is like [::]:8000, as in Toxiproxy.
    """
    host, port = local
    if is_wildcard(host):
        return format_address(("::", port))
    try:
        _, address = resolve(local)[0]
        return format_address(address)
    except OSError as error:
        raise CannotListen(error, local) from None


class KernelPipe:
    """A pipe in the kernel, through which splice moves bytes between sockets without a copy.

    A delay queue uses a pipe like a bytes object: len(pipe) is the number of bytes in the pipe.
    After n bytes have been sent, pipe[n:] subtracts n from len(pipe) and returns the pipe.
    """

    __slots__ = ("read_fd", "write_fd", "held")

    def __init__(self, fd_limit=math.inf):
        """Create the pipe. Raises OSError if no descriptors below fd_limit are left."""
        self.read_fd, self.write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.held = 0
        if max(self.read_fd, self.write_fd) >= fd_limit:
            self.close()
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        # If the pipes of the user have reached a limit (man 7 pipe), the call fails, and the pipe
        # keeps its smaller default size.
        with contextlib.suppress(OSError):
            fcntl.fcntl(self.write_fd, F_SETPIPE_SZ, KERNEL_PIPE_SIZE)

    def __len__(self):
        return self.held

    def __getitem__(self, unsent):
        sent = unsent.start             # `unsent` is slice(n, None)
        self.held -= sent
        return self

    def splice_from(self, source):
        """Receive n bytes into the empty pipe, and return n. Raises OSError like recv()."""
        self.held = os.splice(source.fileno(), self.write_fd, KERNEL_PIPE_SIZE,
                              flags=os.SPLICE_F_NONBLOCK)
        return self.held

    def splice_to(self, target):
        """Send n bytes of the pipe, and return n. Raises OSError like send()."""
        return os.splice(self.read_fd, target.fileno(), self.held, flags=os.SPLICE_F_NONBLOCK)

    def close(self):
        os.close(self.read_fd)
        os.close(self.write_fd)


def start_connect(family, address, fd_limit):
    """Start to connect, without waiting. Raises OSError.

    fd_limit    the descriptor of the socket must be below this number.

    Returns (socket, pending). If pending is False, the socket is connected.
    """
    sock = RawSocket(family, socket.SOCK_STREAM | SOCK_NONBLOCK)
    try:
        if sock.fileno() >= fd_limit:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        if not SOCK_NONBLOCK:
            sock.setblocking(False)
        set_stream_options(sock)
        error = sock.connect_ex(address)
        if error == errno.EINPROGRESS and LINUX:
            # The first connect() to a backend on this machine returns EINPROGRESS, although the
            # socket is connected. A second connect() returns 0.
            error = sock.connect_ex(address)
        if not error:
            error = self_connect_error(sock, address)
    except OSError:
        sock.close()
        raise
    if error and error not in CONNECT_PENDING:
        sock.close()
        raise OSError(error, socket_strerror(error))
    pending = error != 0
    return sock, pending


def connect_error(sock):
    """Return the error number of a connect() that has ended, or 0 after success."""
    error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if error:
        return error
    try:
        return self_connect_error(sock, sock.getpeername())
    except OSError:             # the backend has reset the connection: recv() reports the reset
        return 0


def self_connect_error(sock, peer):
    """Return ECONNREFUSED if a socket is connected to itself, and 0 if not.

    peer    the address that the socket has connected to.

    If no backend listens on a port of this machine, the kernel may give the port to the socket
    that connects, and connect the socket to itself (simultaneous open, RFC 9293, 3.5).
    """
    if sock.getsockname() != peer:
        return 0
    reset_on_close(sock)            # so that the caller's close() frees the port at once
    return errno.ECONNREFUSED


def socket_strerror(error):
    """Return the message for an error number of a socket function.

    On Windows, os.strerror() does not know these numbers, but socket.errorTab does.
    """
    return getattr(socket, "errorTab", {}).get(error) or os.strerror(error)


# -- Certificates -------------------------------------------------------------
#
# Certificates for tests. The keys are of the elliptic curve P-256, the signatures are ECDSA with
# SHA-256 (FIPS 186-4), and the encoding is DER (X.690). The keys are for tests only, because an
# attacker could compute a key from the duration of the arithmetic. A key exists only in the memory
# of this process, except while SSLContext.load_cert_chain reads the key from a temporary file.

# {fault of a certificate: arguments of Authority.issue}
CERTIFICATE_FAULTS: "OrderedDict[str, Dict[str, Any]]" = OrderedDict((
    ("expired", {"days": (-30, -1)}),
    ("not_yet_valid", {"days": (2, 30)}),
    ("self_signed", {"signed_by": "itself"}),
    ("wrong_host", {"host": "wrong-host.invalid"}),
    ("untrusted", {"signed_by": "another CA"}),
))

# The parameters of the curve (FIPS 186-4, D.1.2.3), and the object identifiers of X.509.
P256_PRIME = 2 ** 256 - 2 ** 224 + 2 ** 192 + 2 ** 96 - 1
P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
P256_GENERATOR = (0x6B17D1F2E12C4247F8BCE6E563A440F277037D812DEB33A0F4A13945D898C296,
                  0x4FE342E2FE1A7F9B8EE7EB4A7C0F9E162BCE33576B315ECECBB6406837BF51F5)
P256_OID, PUBLIC_KEY_OID = "1.2.840.10045.3.1.7", "1.2.840.10045.2.1"
ECDSA_SHA256_OID = "1.2.840.10045.4.3.2"
BASIC_CONSTRAINTS, KEY_USAGE, SUBJECT_KEY_ID = "2.5.29.19", "2.5.29.15", "2.5.29.14"
AUTHORITY_KEY_ID, EXTENDED_KEY_USAGE, ALTERNATIVE_NAMES = "2.5.29.35", "2.5.29.37", "2.5.29.17"
SERVER_AUTH, CLIENT_AUTH = "1.3.6.1.5.5.7.3.1", "1.3.6.1.5.5.7.3.2"
COMMON_NAME = "2.5.4.3"


def multiply_generator(factor):
    """Return the point (x, y) that is `factor` times the generator of P-256, 0 < factor < order.

    The method is "double and add". Jacobian coordinates x, y, z stand for the point (x / z^2,
    y / z^3), so that only the end needs a division. See the Explicit-Formulas Database.
    """
    point = (*P256_GENERATOR, 1)
    for bit in bin(factor)[3:]:         # the bits after "0b1"
        point = double_point(*point)
        if bit == "1":
            point = add_generator(*point)
    x, y, z = point
    inverse = invert(z, P256_PRIME)
    return x * inverse ** 2 % P256_PRIME, y * inverse ** 3 % P256_PRIME


def double_point(x, y, z):
    """Return 2 times a point in Jacobian coordinates (the formula dbl-2001-b)."""
    p = P256_PRIME
    delta, gamma = z * z % p, y * y % p
    beta, alpha = x * gamma % p, 3 * (x - delta) * (x + delta) % p
    x3 = (alpha * alpha - 8 * beta) % p
    y3 = (alpha * (4 * beta - x3) - 8 * gamma * gamma) % p
    return x3, y3, 2 * y * z % p


def add_generator(x, y, z):
    """Return the generator plus a point in Jacobian coordinates (the formula madd)."""
    p, (gx, gy) = P256_PRIME, P256_GENERATOR
    zz = z * z % p
    h, r = (gx * zz - x) % p, (gy * zz * z - y) % p
    hh = h * h % p
    hhh, v = h * hh % p, x * hh % p
    x3 = (r * r - hhh - 2 * v) % p
    y3 = (r * (v - x3) - y * hhh) % p
    return x3, y3, z * h % p


def invert(number, prime):
    """Return 1 / number modulo a prime, by Fermat's little theorem."""
    return pow(number, prime - 2, prime)


def sign(key, message):
    """Return the ECDSA signature (r, s) of a message, in DER (SEC 1, 4.1.3)."""
    digest = int.from_bytes(hashlib.sha256(message).digest(), "big")
    nonce = secrets.randbelow(P256_ORDER - 1) + 1
    x, _ = multiply_generator(nonce)
    r = x % P256_ORDER
    s = invert(nonce, P256_ORDER) * (digest + r * key) % P256_ORDER
    return der(SEQUENCE, der_int(r), der_int(s))


# Tags of DER
INTEGER, BIT_STRING, OCTET_STRING, OID, UTF8_STRING = 0x02, 0x03, 0x04, 0x06, 0x0C
UTC_TIME, SEQUENCE, SET = 0x17, 0x30, 0x31
TRUE = b"\1\1\xff"


def der(tag, *parts):
    """Return a value in DER: the tag, the size of all parts together, and the parts."""
    body = b"".join(parts)
    size = len(body)
    if size < 128:
        encoded_size = bytes([size])
    else:                               # 300 is 82 01 2C: 82 means that 2 bytes follow
        size_bytes = size.to_bytes((size.bit_length() + 7) // 8, "big")
        encoded_size = bytes([0x80 | len(size_bytes)]) + size_bytes
    return bytes([tag]) + encoded_size + body


def der_int(number):
    """Return a positive number in DER."""
    size = number.bit_length() // 8 + 1     # the first bit is 0: the sign of a positive number
    return der(INTEGER, number.to_bytes(size, "big"))


def der_oid(text):
    """Return an object identifier like 1.2.840 in DER (X.690, 8.19).

    The first two numbers share a byte. The other numbers have base 128. The highest bit of a byte
    is 1 if the number continues. For example, 840 = 6 * 128 + 72 has the bytes 128 + 6 and 72.
    """
    first, second, *others = map(int, text.split("."))
    encoded = bytes([40 * first + second])
    for number in others:
        digits = [number & 127]
        while number > 127:
            number >>= 7
            digits.insert(0, number & 127 | 128)
        encoded += bytes(digits)
    return der(OID, encoded)


def der_bits(data):
    """Return bytes as a bit string in DER."""
    return der(BIT_STRING, b"\0", data)     # 0 unused bits in the last byte


def der_name(common_name):
    """Return an X.501 name in DER that has only a common name."""
    text = common_name[:64].encode()        # at most 64 characters (RFC 5280, appendix A)
    return der(SEQUENCE, der(SET, der(SEQUENCE, der_oid(COMMON_NAME), der(UTF8_STRING, text))))


def der_extension(oid, value, critical=b""):
    """Return an X.509 extension in DER. `critical` is TRUE if peers must know the extension."""
    return der(SEQUENCE, der_oid(oid), critical, der(OCTET_STRING, value))


def alternative_name(host):
    """Return the GeneralName of an address or a name (RFC 5280, 4.2.1.6)."""
    try:
        return der(0x87, ipaddress.ip_address(host).packed)     # an iPAddress
    except ValueError:
        return der(0x82, host.encode("idna"))                   # a dNSName


def encode_point(point):
    """Return a point as 65 bytes: 4 for the uncompressed form, x, and y (SEC 1, 2.3.3)."""
    return b"\4" + b"".join(number.to_bytes(32, "big") for number in point)


def make_certificate(subject, issuer, hosts=(), days=(-1, 3650)):
    """Return an X.509 certificate (RFC 5280) in PEM.

    subject, issuer    (common name, key, encoded public key).
    hosts              names and addresses of the subject. A CA has none.
    days               when the validity begins and ends, in days from now.
    """
    (name, _, public), (issuer_name, issuer_key, issuer_public) = subject, issuer
    serial_number = secrets.randbits(119) + 2 ** 119        # always 120 bits
    algorithm = der(SEQUENCE, der_oid(ECDSA_SHA256_OID))
    times = [time.strftime("%y%m%d%H%M%SZ", time.gmtime(time.time() + day * 86400)).encode()
             for day in days]
    key_algorithm = der(SEQUENCE, der_oid(PUBLIC_KEY_OID), der_oid(P256_OID))
    body = der(
        SEQUENCE,
        der(0xA0, der_int(2)),                      # the optional field [0]: version 3
        der_int(serial_number),
        algorithm,
        der_name(issuer_name),
        der(SEQUENCE, *(der(UTC_TIME, t) for t in times)),
        der_name(name),
        der(SEQUENCE, key_algorithm, der_bits(public)),
        der(0xA3, der(SEQUENCE, *make_extensions(public, issuer_public, hosts))))   # field [3]
    return to_pem("CERTIFICATE", der(SEQUENCE, body, algorithm, der_bits(sign(issuer_key, body))))


def make_extensions(public, issuer_public, hosts):
    """Return the extensions of a certificate, each in DER (RFC 5280, 4.2.1)."""
    is_ca = not hosts
    # The number of unused bits, and the bits keyCertSign and cRLSign, or digitalSignature.
    usage = b"\1\6" if is_ca else b"\7\x80"
    key_id, issuer_key_id = (hashlib.sha1(key).digest() for key in (public, issuer_public))
    extensions = [
        der_extension(BASIC_CONSTRAINTS, der(SEQUENCE, TRUE if is_ca else b""), TRUE),
        der_extension(KEY_USAGE, der(BIT_STRING, usage), TRUE),
        der_extension(SUBJECT_KEY_ID, der(OCTET_STRING, key_id)),
        der_extension(AUTHORITY_KEY_ID, der(SEQUENCE, der(0x80, issuer_key_id)))]   # keyIdentifier
    if not is_ca:
        purposes = der(SEQUENCE, der_oid(SERVER_AUTH), der_oid(CLIENT_AUTH))
        names = der(SEQUENCE, *map(alternative_name, hosts))
        extensions += [der_extension(EXTENDED_KEY_USAGE, purposes),
                       der_extension(ALTERNATIVE_NAMES, names)]
    return extensions


def encode_key(key, public):
    """Return a private key in PEM (RFC 5915)."""
    return to_pem("EC PRIVATE KEY", der(
        SEQUENCE, der_int(1), der(OCTET_STRING, key.to_bytes(32, "big")),   # version 1, privateKey
        der(0xA0, der_oid(P256_OID)), der(0xA1, der_bits(public))))         # curve, publicKey


def to_pem(label, data):
    """Return data as a PEM block with a label, like CERTIFICATE (RFC 7468)."""
    text = base64.b64encode(data).decode()
    lines = "\n".join(text[index:index + 64] for index in range(0, len(text), 64))
    return "-----BEGIN %s-----\n%s\n-----END %s-----\n" % (label, lines, label)


class Authority:
    """A certificate authority (CA) for this run of the program, and a second CA for faults.

    Keys and certificates are made on first use. Any thread may call `pem` and `issue`.
    """

    def __init__(self):
        self.lock = threading.Lock()    # so that two threads never make two keys of a CA
        self.identities = {}        # {role: (common name, key, encoded public key)}
        self.ca_pem = ""            # the certificate of the CA

    def pem(self):
        """Return the certificate of the CA."""
        with self.lock:
            if not self.ca_pem:
                ca = self.identity("CA")
                self.ca_pem = make_certificate(subject=ca, issuer=ca)
            return self.ca_pem

    def identity(self, role):
        """Return the (common name, key, encoded public key) of a role. The caller holds `lock`.

        role    "CA", "another CA" or "host".
        """
        if role not in self.identities:
            key = secrets.randbelow(P256_ORDER - 1) + 1
            self.identities[role] = "vaurien " + role, key, encode_point(multiply_generator(key))
        return self.identities[role]

    def issue(self, host, days=(-1, 397), signed_by="CA"):
        """Return a certificate for a host, and the key of the certificate, in PEM.

        host         a name or an address.
        days         when the validity begins and ends, in days from now.
        signed_by    "CA", "another CA", or "itself".

        A certificate for an address in LOOPBACK is valid for localhost and all of LOOPBACK.
        """
        with self.lock:
            _, key, public = self.identity("host")      # all hosts share one key
            hosts = [host, "localhost", *LOOPBACK] if host in LOOPBACK else [host]
            subject = host, key, public
            issuer = subject if signed_by == "itself" else self.identity(signed_by)
            return make_certificate(subject, issuer, hosts, days) + encode_key(key, public)


AUTHORITY = Authority()


# -- TLS ----------------------------------------------------------------------
#
# The TLS settings of a proxy, and TlsSocket, which a Connection uses like a plain socket.

TLS_VERSIONS = ("1.0", "1.1", "1.2", "1.3")
PEM_MAX = 16 * 1024 * 1024          # the most bytes that are read from a PEM file
NAMES_MAX = 1000                    # the most names for which a proxy keeps a certificate


def check_certificate(text):
    return text if text == "auto" else check_file(text)


def check_tls_name(text):
    if not text or not is_valid_host(text):
        raise ValueError("must be a host name, like db.example, not %r" % text)
    return text


TlsField = namedtuple("TlsField", "check metavar help")
# The TLS settings of a proxy: {field: TlsField}. The flag of the field "cert" is --tls-cert.
TLS_FIELDS = OrderedDict((name, TlsField(*field)) for name, *field in [
    ("cert", check_certificate, "FILE|auto",
     "clients must use TLS: PEM file with the certificate for the clients; auto makes a "
     "certificate for each name that a client asks for"),
    ("key", check_file, "FILE", "PEM file with the key of this certificate, if the key is in "
                                "another file"),
    ("client_ca", check_file, "FILE", "clients must have a certificate of a CA in this PEM file"),
    ("fault", choice_check(*CERTIFICATE_FAULTS), "FAULT",
     "make certificates like auto, but with a fault: " + ", ".join(CERTIFICATE_FAULTS)),
    ("max_version", choice_check(*TLS_VERSIONS), "VERSION",
     "highest TLS version for clients: " + ", ".join(TLS_VERSIONS)),
    ("ca", check_file, "FILE", "PEM file with the CAs that may have signed the backend's "
                               "certificate; by default, the CAs of the system"),
    ("verify", check_yes_no, "YES|NO",
     "whether to check the backend's certificate; by default, yes"),
    ("sni", check_tls_name, "NAME", "name that the proxy asks the backend for, and that the "
                                    "backend's certificate must have; by default, the backend's "
                                    "host"),
    ("client_cert", check_file, "FILE", "PEM file with a certificate that the proxy shows to "
                                        "the backend"),
    ("client_key", check_file, "FILE", "PEM file with the key of this certificate, if the key "
                                       "is in another file")])


def check_tls(value):
    """Check the TLS settings of a proxy: {field: value}. Raises ValueError."""
    if not isinstance(value, dict):
        raise ValueError('must be like {"cert": "auto"}, not %r' % (value,))
    fields = OrderedDict()
    for name, given in value.items():
        if name not in TLS_FIELDS:
            raise ValueError("has no field %r%s: there are %s" % (
                name, did_you_mean(name, TLS_FIELDS), ", ".join(TLS_FIELDS)))
        if given is not None:
            fields[name] = check_field(name, TLS_FIELDS[name].check, str(given))
    return fields


class TlsConfig:
    """The TLS settings of a proxy, and the SSLContexts for its clients and its backend.

    fields             {name in TLS_FIELDS: value} of the settings that are not None.
    clients_use_tls    whether clients must use TLS. A `fault` is in the certificate for clients.
    cert_file          the file with the certificate for clients, or "" to make certificates.
    """

    def __init__(self, fields, alpn=()):
        """Check the fields, and read the files that the fields name. Raises InputError.

        alpn    the names of the application protocols that the proxy accepts (RFC 7301).
        """
        self.fields = OrderedDict((name, value) for name, value in fields.items()
                                  if value is not None)
        self.alpn = list(alpn)
        self.clients_use_tls = "cert" in self.fields or "fault" in self.fields
        cert = self.fields.get("cert", "auto")
        self.cert_file = "" if cert == "auto" else cert
        # lru_cache as a decorator of the methods would keep each TlsConfig in memory.
        self.cached_context = functools.lru_cache(NAMES_MAX)(self.make_accept_context)
        self.connect_context = functools.lru_cache(1)(self.make_connect_context)
        try:
            self.check()
        except ValueError as error:
            raise InputError([("tls", str(error))]) from None

    def check(self):
        """Check that the fields fit together, and read the files. Raises ValueError."""
        fields = self.fields
        if fields:                      # the error names the first field
            first_field, *_ = fields
            require_ssl("tls-%s " % first_field.replace("_", "-"))
        if "fault" in fields and self.cert_file:
            raise ValueError("tls-fault makes the certificates itself: leave tls-cert out")
        if "key" in fields and not self.cert_file:
            raise ValueError("tls-key needs tls-cert, with the file of a certificate")
        for name in "client_ca", "max_version":
            if name in fields and not self.clients_use_tls:
                raise ValueError("tls-%s needs tls-cert" % name.replace("_", "-"))
        if "client_key" in fields and "client_cert" not in fields:
            raise ValueError("tls-client-key needs tls-client-cert")
        if self.clients_use_tls:
            self.accept_context(LOOPBACK[0])    # reads the files for clients
        if "ca" in fields or "client_cert" in fields:
            self.connect_context()              # reads the files for the backend

    def accept_context(self, host):
        """Return the SSLContext for a client.

        host    the name that the client asks for, or else the address that the client has reached.
        """
        needs_host = not self.cert_file     # the certificate in a file is for all hosts
        return self.cached_context(host if needs_host else "")

    def make_accept_context(self, host):
        """Return a new SSLContext for clients.

        host    the host of a new certificate. A certificate in cert_file is used for all hosts.
        """
        fields = self.fields
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        if self.cert_file:
            load_certificate(context, self.cert_file, fields.get("key"), "tls-cert", "tls-key")
        else:
            self.load_new_certificate(context, host)
            context.set_servername_callback(self.on_server_name)
        # Forbid a second handshake, which TlsSocket cannot handle. Python 3.6 lacks this option.
        context.options |= getattr(ssl, "OP_NO_RENEGOTIATION", 0)
        if hasattr(context, "num_tickets"):     # since Python 3.8
            # Send no session tickets after the handshake. A client that only sends would not
            # read the tickets, and the client's close() with unread bytes would send RST.
            context.num_tickets = 0
        if "client_ca" in fields:
            load_cas(context, fields["client_ca"], "tls-client-ca")
            context.verify_mode = ssl.CERT_REQUIRED
        if "max_version" in fields:
            limit_version(context, fields["max_version"])
        if self.alpn:
            context.set_alpn_protocols(self.alpn)
        return context

    def load_new_certificate(self, context, host):
        """Let a context use a new certificate for a host, with the fault of --tls-fault if any."""
        arguments = {"host": host}
        if "fault" in self.fields:
            arguments.update(CERTIFICATE_FAULTS[self.fields["fault"]])
        fd, path = tempfile.mkstemp()       # only this user may read the file
        try:
            with open(fd, "w") as file:
                file.write(AUTHORITY.issue(**arguments))
            context.load_cert_chain(path)
        finally:
            os.unlink(path)

    def on_server_name(self, ssl_object, name, context):
        """If the client asks for a name, use the certificate for this name."""
        if name and is_valid_host(name):
            ssl_object.context = self.accept_context(name.lower())

    def make_connect_context(self):
        """Return an SSLContext for the backend."""
        fields = self.fields
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if not fields.get("verify", True):
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        elif "ca" in fields:
            load_cas(context, fields["ca"], "tls-ca")
        else:
            context.load_default_certs()
        if "client_cert" in fields:
            load_certificate(context, fields["client_cert"], fields.get("client_key"),
                             "tls-client-cert", "tls-client-key")
        if self.alpn:
            context.set_alpn_protocols(self.alpn)
        return context

    def server_name(self, host):
        """Return the server name that the proxy sends to a backend (SNI, RFC 6066, 3)."""
        return self.fields.get("sni") or host.rstrip(".") or "localhost"


def require_pem(path, label, setting):
    """Raise ValueError if a file has no PEM block with this label, like CERTIFICATE."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise ValueError("it is no regular file")   # a FIFO would block open()
        with open(path, encoding="latin-1") as file:
            text = file.read(PEM_MAX)
    except (OSError, ValueError) as error:
        raise ValueError("%s: cannot read %s: %s"
                         % (setting, path, getattr(error, "strerror", error))) from None
    if not re.search("-----BEGIN [A-Z ]*%s-----" % label, text):
        raise ValueError("%s must be a PEM file with a line -----BEGIN %s-----, not %s"
                         % (setting, label, path))


def load_cas(context, path, setting):
    """Let a context trust the CAs in a file. Raises ValueError."""
    require_pem(path, "CERTIFICATE", setting)
    try:
        context.load_verify_locations(path)
    except OSError as error:
        raise ValueError("%s: %s: %s" % (setting, path, tls_error_text(error))) from None
    if not context.cert_store_stats()["x509_ca"]:
        raise ValueError("%s must have the certificate of a CA, not only of hosts: %s"
                         % (setting, path))


def load_certificate(context, path, key_path, setting, key_setting):
    """Let a context use the certificate and the key in these files. Raises ValueError.

    key_path                the file with the key, or None if the key is in the file `path`.
    setting, key_setting    the settings with the files, for errors, like "tls-cert".
    """
    key_path = key_path or path
    require_pem(path, "CERTIFICATE", setting)
    require_pem(key_path, "PRIVATE KEY", key_setting)

    def refuse_password():          # by default, OpenSSL asks for a password on the terminal
        raise ValueError("%s must have no password: %s" % (key_setting, key_path))
    try:
        context.load_cert_chain(path, key_path, refuse_password)
    except OSError as error:
        if getattr(error, "reason", None) == "KEY_VALUES_MISMATCH":
            raise ValueError("%s: the key in %s does not fit the certificate in %s"
                             % (key_setting, key_path, path)) from None
        raise ValueError("%s: cannot use %s: %s" % (setting, path, tls_error_text(error))
                         ) from None


def limit_version(context, max_version):
    """Let a context use no TLS version above max_version."""
    with warnings.catch_warnings():
        # Python 3.6 has only the options OP_NO_TLSv1 ..., which are deprecated since Python 3.7.
        warnings.simplefilter("ignore", DeprecationWarning)
        newer_versions = TLS_VERSIONS[TLS_VERSIONS.index(max_version) + 1:]
        for version in newer_versions:
            suffix = version.replace(".0", "").replace(".", "_")    # "1_2" for "1.2"
            context.options |= getattr(ssl, "OP_NO_TLSv" + suffix)
        if max_version in ("1.0", "1.1"):
            # OpenSSL permits TLS 1.0 and TLS 1.1 only with the security level 0.
            context.set_ciphers("ALL:@SECLEVEL=0")
            if hasattr(ssl, "TLSVersion"):      # since Python 3.7
                context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED


def tls_error_text(error):
    """Return the reason of an SSLError or a CertificateError.

    The text "[SSL: REASON] reason (_ssl.c:1007)" becomes "reason".
    """
    return re.sub(r"^\[.*?\] | \(_ssl[.]c:\d+\)$", "", str(error)) or type(error).__name__


class TlsSocket:
    """TLS on a non-blocking socket. A Connection uses a TlsSocket like a plain socket.

    A TlsSocket has an SSLObject, which encrypts and decrypts, and two buffers for ciphertext.
    An SSLSocket does not fit: shutdown() loses the state of TLS, unwrap() fails while data
    arrives, and no selector reports the decrypted bytes that an SSLSocket holds.

    is_open               whether the handshake has succeeded.
    error                 the reason why TLS has failed, or "".
    ended                 whether the peer has ended its stream.
    lacks_close_notify    whether the peer has ended its stream without close_notify.
    skip_close_notify     the owner sets this, so that `shutdown` sends no close_notify.
    readable              whether the owner should call `recv_into` without an event of the socket.

    on_change() tells the owner to call `interest` again. A timer calls on_change() when the
    handshake has ended, when ciphertext begins to wait, and when `readable` becomes true.

    At most SEND_BATCH bytes of ciphertext wait for the socket. `recv_into` returns all decrypted
    bytes, which may be one record (16 KiB) more than `size`.
    """

    ALERT, HANDSHAKE = 21, 22       # types of records, and the first byte of a record
    RECV_MAX = 64 * 1024            # the most bytes in the buffer `incoming`, which never shrinks
    SEND_BATCH = 4 * 16384          # bytes that are encrypted for one send: 4 records

    def __init__(self, sock, loop, on_change, timeout, context, server_side=False,
                 server_hostname=None, received=b""):
        """Begin the handshake, which may take `timeout` seconds.

        on_change          function without arguments, in which the owner calls `interest` again.
        context            an SSLContext of TlsConfig.
        server_side        True for a client's socket, and False for a backend's socket.
        server_hostname    the name that the backend is asked for, or None for a client's socket.
        received           the first bytes of TLS, if the caller has received them already.
        """
        self.sock, self.loop, self.on_change, self.timeout = sock, loop, on_change, timeout
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.engine = context.wrap_bio(self.incoming, self.outgoing, server_side, server_hostname)
        self.unsent = b""           # ciphertext that the socket has not taken yet
        self.send_error = ()        # (errno, message) of the first failed send: the peer is lost
        self.is_open = self.ended = self.readable = False
        self.lacks_close_notify = self.skip_close_notify = False
        self.error = ""
        self.begun = False          # whether the peer has sent bytes
        self.closing = False        # whether shutdown() was called: close_notify and FIN follow
        self.made_close_notify = False      # whether close_notify is encrypted
        self.fin_sent = False
        self.resets = False         # whether close() sends RST
        self.awaits_write = False   # whether the loop watches the socket for EVENT_WRITE
        self.change_timer = None    # the timer that calls on_change()
        self.deadline = loop.call_at(loop.clock() + timeout, lambda: self.fail("timed out"))
        self.continue_handshake(received)

    def __getattr__(self, name):    # fileno, getpeername, getsockopt, family ...
        return getattr(self.sock, name)

    def setsockopt(self, level, option, value):
        if (level, option) == (socket.SOL_SOCKET, socket.SO_LINGER):
            self.resets = True      # only reset_on_close() sets this option
        self.sock.setsockopt(level, option, value)

    def note_change(self):
        """Let a timer call on_change(), unless the timer is already set."""
        is_set = self.change_timer and self.change_timer[CALLBACK]  # None after the timer's call
        if not is_set:
            self.change_timer = self.loop.call_at(self.loop.clock(), self.on_change)

    def interest(self, wanted):
        """Set awaits_write, and return the events for which the owner must watch the socket.

        wanted    the events for which the owner would watch a socket without TLS.
        """
        # During the handshake, the owner cannot send, and EVENT_WRITE would occur all the time.
        events = wanted if self.is_open else EVENT_READ
        if self.unsent:
            events |= EVENT_WRITE
        self.awaits_write = bool(events & EVENT_WRITE)
        if self.readable and wanted & EVENT_READ:
            self.note_change()          # no event of the socket will tell the owner to read
        return events

    # The handshake

    def shake_hands(self):
        """Receive bytes for the handshake.

        After a failed handshake, drops the bytes. A close with unread bytes would send RST, and
        RST could destroy the alert to the peer.
        """
        end_reason = "closed by the peer"
        try:
            data = self.sock.recv(self.RECV_MAX)
        except BlockingIOError:         # the event was EVENT_WRITE only
            self.push_quietly()
            return
        except OSError as error:
            data, end_reason = b"", error.strerror or ""
        if not data:
            self.ended = True
            self.fail(end_reason)
        elif not self.error:
            self.continue_handshake(data)

    def continue_handshake(self, data):
        """Process bytes of the peer, and send the reply. `data` is b"" if no bytes have come."""
        if data and not self.begun:
            self.begun = True
            record_type = data[0]
            if record_type not in (self.ALERT, self.HANDSHAKE):
                self.fail("the peer speaks no TLS, but has sent %r" % data[:16])
                return
        self.incoming.write(data)
        try:
            self.engine.do_handshake()
        except ssl.SSLWantReadError:
            self.push_quietly()
        except (OSError, ssl.CertificateError) as error:
            # On Python 3.6, a CertificateError is no OSError, but a ValueError.
            self.fail(tls_error_text(error))
        else:
            self.is_open = True
            self.readable = True        # `incoming` may contain data after the handshake
            self.loop.cancel(self.deadline)
            self.push_quietly()
            self.note_change()

    def fail(self, reason):
        """End the handshake with an error, and send the alert if OpenSSL has made an alert."""
        self.error = self.error or reason       # the first reason counts
        self.loop.cancel(self.deadline)
        self.push_quietly()
        self.note_change()

    # The methods of a socket

    def fileno(self):
        return self.sock.fileno()

    def recv_into(self, buffer, size):
        """Receive at most `size` bytes of ciphertext, and decrypt them into the buffer.

        Returns the number of decrypted bytes, or 0 at the end of the stream. Raises OSError.
        """
        needs_recv = not self.readable      # if readable, `incoming` may have ciphertext already
        self.readable = False
        count = 0
        if not self.error and not self.ended:
            has_fin = False
            if needs_recv:
                ciphertext = self.sock.recv(min(size, self.RECV_MAX))
                self.incoming.write(ciphertext)
                has_fin = not ciphertext
            count = self.decrypt(memoryview(buffer), has_fin)
            self.push_quietly()             # OpenSSL may have made a reply or an alert
        if count and (self.ended or self.error):
            self.readable = True            # the next call reports the end or the error
            self.note_change()
        if not count and self.error:
            raise OSError(errno.ECONNABORTED, self.error)
        if not count and not self.ended:
            raise BlockingIOError(errno.EAGAIN, "no complete record")
        return count

    def decrypt(self, view, has_fin):
        """Decrypt all complete records into a memoryview. Returns the number of decrypted bytes.

        has_fin    whether the peer has sent FIN, so that no more records can come.

        Sets `ended` after close_notify or FIN, and `error` after an alert or an invalid record.
        """
        count = 0
        has_close_notify = False
        try:
            while not has_close_notify:
                size = self.engine.read(len(view) - count, view[count:])
                count += size
                has_close_notify = size == 0        # read() returns 0 after close_notify
        except ssl.SSLZeroReturnError:      # instead of 0, if this side has sent close_notify
            has_close_notify = True
        except ssl.SSLWantReadError:        # no complete record is left
            self.lacks_close_notify = has_fin
        except OSError as error:            # an alert, or an invalid record
            self.error = tls_error_text(error)
        self.ended = has_close_notify or self.lacks_close_notify
        return count

    def send(self, data):
        """Encrypt and send bytes. Returns the number of encrypted bytes. Raises OSError."""
        if self.error:
            raise OSError(errno.EPIPE, self.error)
        if not self.is_open or not self.send_ciphertext():
            raise BlockingIOError(errno.EAGAIN, "ciphertext waits")
        encrypted = 0
        while encrypted < len(data) and not self.unsent:
            batch_end = min(len(data), encrypted + self.SEND_BATCH)
            while encrypted < batch_end:
                encrypted += self.engine.write(data[encrypted:batch_end])   # one record, 16 KiB
            self.send_ciphertext()          # sets `unsent` if the socket takes no more
        return encrypted

    def push(self):
        """Send the ciphertext that waits. Raises OSError.

        After a call of `shutdown`, also send close_notify and FIN as soon as possible.
        """
        all_sent = self.send_ciphertext()
        if not all_sent or not self.closing:
            return
        needs_close_notify = not (self.made_close_notify or self.skip_close_notify or self.error)
        if needs_close_notify:
            # unwrap() fails in the handshake, and while received bytes are unread. Both the end of
            # the handshake and recv_into() call `push` again.
            has_unread_bytes = self.readable and not self.ended
            if not self.is_open or has_unread_bytes:
                return
            self.made_close_notify = True
            # unwrap() encrypts close_notify, and raises if the peer has sent no close_notify yet.
            with contextlib.suppress(OSError, ValueError):
                self.engine.unwrap()
        if self.send_ciphertext() and not self.fin_sent:
            self.fin_sent = True
            self.sock.shutdown(socket.SHUT_WR)

    def send_ciphertext(self):
        """Send the ciphertext. Returns False if ciphertext still waits. Raises OSError."""
        if self.send_error:
            raise OSError(*self.send_error)
        self.unsent = self.unsent or self.outgoing.read()
        while self.unsent:
            try:
                sent = self.sock.send(self.unsent)
            except BlockingIOError:
                if not self.awaits_write:
                    self.note_change()      # on_change() lets the owner watch for EVENT_WRITE
                return False
            except OSError as error:
                self.unsent, self.send_error = b"", error.args  # `interest` needs no EVENT_WRITE
                raise
            self.unsent = self.unsent[sent:] or self.outgoing.read()
        return True

    def push_quietly(self):
        """Call `push`, and ignore an OSError, which the next send() raises again."""
        with contextlib.suppress(OSError):
            self.push()

    def shutdown(self, how):
        """Send close_notify and FIN when the handshake has ended and no ciphertext waits.

        `how` is SHUT_WR in every call.
        """
        self.closing = True
        self.push()

    def close(self):
        """Close the socket. If `resets` is False, first complete a pending `shutdown`."""
        self.loop.cancel(self.change_timer)
        self.loop.cancel(self.deadline)
        can_send = self.is_open and self.loop.running and not self.resets and not self.error
        owes_fin = self.closing and not self.fin_sent
        if not can_send or not owes_fin:
            self.close_now()
            return
        self.deadline = self.loop.call_at(self.loop.clock() + self.timeout, self.close_now)
        self.awaits_write = True
        try:
            self.loop.watch(self.sock, EVENT_WRITE, self.on_writable)
        except OSError:                 # the selector takes no more sockets
            self.close_now()

    def on_writable(self, events):
        """Continue to send after `close`. Close the socket after FIN, or after an error."""
        self.readable = False           # the owner reads no more: push() need not wait
        try:
            self.push()
        except OSError:
            self.close_now()
            return
        if self.fin_sent:
            self.close_now()

    def close_now(self):
        """Close the socket at once, and drop ciphertext that waits."""
        self.loop.cancel(self.deadline)
        self.loop.unwatch(self.sock)
        self.sock.close()


# -- Connection ---------------------------------------------------------------
#
# A connection has a client's socket, a backend's socket, and two links between these sockets. The
# loop's thread runs the code of this section, except blocking handlers: see HandOff.
#
# The phase of a connection:
#
#     WAITING -> CONNECTING -> CONNECTED <-> HANDED_OFF        and from each phase -> CLOSED
#                                  `-> LINGERING
#
#   WAITING      a rule delays the connect to the backend.
#   CONNECTING   the backend's name is being resolved, or connect() is pending.
#   CONNECTED    both sockets are open; only this phase has a fast path.
#   HANDED_OFF   a blocking handler works on the sockets.
#   LINGERING    the client has got its last bytes and FIN, but has not closed its side yet.
#   CLOSED       both sockets are closed.
#
# The endings of a connection:
#
#   event                               effect
#   a peer closes its side              EOF goes through the chain, and FIN to the other peer
#   both peers have closed their sides  close
#   a peer resets: recv or send fails   both sockets are reset, after the data that this peer has
#                                       sent is delivered
#   the client resets, but its data is  both sockets are reset at once
#     never due or waits for connect()
#   a rule closes both sides            lingering close if a rule has replied to a request,
#                                       otherwise close
#   a rule resets the connection        both sockets are reset
#   a handler raises an exception       both sockets are reset
#   the backend cannot be connected     close
#   the proxy stops or is changed       close

WAITING, CONNECTING, CONNECTED = "waiting", "connecting", "connected"
HANDED_OFF, LINGERING, CLOSED = "handed off", "lingering", "closed"

# The start value of `bulk_reads` for a link that must not use splice, for example because of TLS.
# A link that counts from this value never reaches SPLICE_AFTER.
NO_SPLICE = -(1 << 60)


class Link(DelayQueue):
    """One direction of a connection: a source, a target, and the delay queue between them."""

    __slots__ = ("source", "source_reset", "target", "watched", "fast_events", "bulk_reads",
                 "recv_size", "request_time", "measure_from", "delay_rules", "delaying",
                 "fixed_delays", "piece_max")

    def __init__(self, to, budget, recv_size):
        DelayQueue.__init__(self, to, budget)       # faster than super()
        self.recv_size = recv_size      # the most bytes to receive at once
        self.source = None      # the socket or TlsSocket of the sender; None before connect()
        self.source_reset = False       # the source has reset the connection
        self.target = None      # the socket or TlsSocket of the receiver; None until connected
        self.watched = 0        # the events for which the loop watches the source
        self.fast_events = 0    # EVENT_READ if the fast path is open, otherwise 0
        self.bulk_reads = 0 if HAVE_SPLICE else NO_SPLICE   # reads of BULK_READ bytes or more
        # A cache: while Chain.active_rules is the list delay_rules, only the rules in `delaying`
        # act on this direction, and only delay its bytes.
        self.delay_rules = None
        self.delaying = NOTHING         # the result of Chain.delaying_rules
        self.piece_max = 0              # a handler must cut a chunk with more bytes
        self.fixed_delays = ()          # the `delays` of each chunk; () if a rule has a link_rate
        self.measure_from = sys.maxsize     # upstream: the request_count of the next measurement
        self.request_time = 0.0     # downstream: when the measured request came, or 0

    def put_piece(self, now, data):
        """Let the rules in `delaying` delay a chunk that comes now, and queue the chunk."""
        due = now
        delays: tuple = ()
        for active in self.delaying:
            seconds = active.transfer(due, self.to, len(data))
            due += seconds
            delays += ((active.rule, seconds, False),)      # False: from_open
        self.put(due, data, now, delays)

    def buffer_due(self, data):
        """Append bytes to send_buffer. `data` is a memoryview or a KernelPipe."""
        self.buffered_in += len(data)
        self.charge(len(data))
        self.append_due(data)

    def discard(self):
        """Drop all held bytes and signals, and close the kernel pipes that hold bytes."""
        for data in self.send_buffer:
            if isinstance(data, KernelPipe):
                data.close()
        super().discard()


class HandOff:
    """A call of a blocking handler, in a thread of its own.

    The handler gets duplicates of the connection's two sockets, and expects that their recv() and
    send() wait. But a duplicate shares the flag O_NONBLOCK with the socket of the loop. Therefore
    `run` gives each duplicate a time-out: Python itself waits if a socket has a time-out.
    """

    def __init__(self, connection, rule, to_backend):
        """Duplicate the sockets. Raises OSError if no descriptors are left.

        to_backend    True if the client has sent bytes that wait, False if the backend has.
        """
        self.connection, self.rule, self.to_backend = connection, rule, to_backend
        self.socks = [socket.fromfd(sock.fileno(), sock.family, socket.SOCK_STREAM)
                      for sock in (connection.client, connection.backend)]

    def run(self):
        """Call the handler, in its thread. Returns whether both sockets are still open.

        Raises the exceptions of the handler.
        """
        try:
            for sock in self.socks:
                sock.settimeout(MAX_WAIT)
            client, backend = self.socks
            self.rule.instance(client, backend, self.to_backend)
            return all(sock.fileno() >= 0 for sock in self.socks)   # -1 after a close
        finally:
            self.close()                # only the duplicates; the connection keeps its sockets

    def on_done(self, left_open, exc):
        """In the loop's thread: continue or close the connection after the call of the handler.

        left_open    the result of `run`, or None.
        exc          the exception of `run` or of the thread's start, or None.
        """
        self.close()                    # if the thread did not start, `run` has not done this
        if exc:
            self.log_failure(exc)
        close_reason = "" if left_open else "closed by %s" % self.rule.name
        self.connection.take_back(close_reason)

    def log_failure(self, exc):
        """Log an exception of the handler. Only the first bug of each rule gets a traceback."""
        connection, rule = self.connection, self.rule
        is_bug = not isinstance(exc, OSError)       # an OSError most likely means a closed socket
        needs_traceback = is_bug and not rule.error_logged
        log.log(logging.ERROR if is_bug else logging.INFO,
                "connection %d, request %d: handler %s failed and the connection is closed: %s",
                connection.number, connection.chain.request_count, rule.name,
                format_exception(exc), exc_info=exc if needs_traceback else None)
        rule.error_logged = rule.error_logged or is_bug

    def close(self):
        """Close the duplicates. The connection's own sockets stay open."""
        for sock in self.socks:
            sock.close()


class Connection:
    """A client's socket, a backend's socket, and the data between these sockets.

    up      the Link from the client to the backend.
    down    the Link from the backend to the client.
    """

    __slots__ = ("proxy", "loop", "number", "peer", "chain", "up", "down", "client", "backend",
                 "phase", "announcing_link", "addresses", "connect_deadline", "reset_reason",
                 "faults", "records_without_text", "timer", "deadline_timer", "began", "has_tls")

    def __init__(self, proxy, number, client, peer):
        """Create the chain and the links. The caller must call `start` or `refuse` next.

        number    how many connections the proxy has accepted, including this connection.
        client    the client's socket.
        peer      the client's address.
        """
        self.proxy = proxy
        self.loop = proxy.loop
        self.number = number
        self.peer = peer
        if proxy.protocol:
            protocol = proxy.protocol(proxy.host_header())
            protocol.joins_tls = proxy.joins_tls()      # whether to decrypt after STARTTLS
            self.chain: Chain = ProtocolChain(proxy.rules, number, protocol)
        else:
            self.chain = Chain(proxy.rules, number)
        self.up = Link(UPSTREAM, self.loop.budget, self.chain.recv_size(UPSTREAM))
        self.down = Link(DOWNSTREAM, self.loop.budget, self.chain.recv_size(DOWNSTREAM))
        self.up.measure_from = proxy.latencies.draw_distance()
        self.client = self.up.source = self.down.target = client    # None after `close`
        self.backend = None             # the backend's socket; None before connect()
        self.phase = WAITING
        self.addresses = []             # the backend's addresses that have not been tried yet
        self.connect_deadline = None    # the time when the proxy gives up all connects
        self.reset_reason = ""          # after recv or send has failed: why to reset both sockets
        self.faults = ()                # names of the handlers that have acted
        self.records_without_text = ()  # numbers of the FaultRecords that add_text() completes
        self.timer = None               # calls on_timer when the next event is due
        self.deadline_timer = None      # see set_deadline
        self.began = self.loop.clock()
        self.announcing_link = None     # the link with the announcement of TLS: see begin_tls
        self.has_tls = False            # whether a peer uses TLS with the proxy
        if proxy.tls.clients_use_tls and not proxy.joins_tls():     # TLS from the first byte
            self.start_tls(self.up)

    @property
    def name(self):
        """The client's address, as text."""
        return format_address(self.peer)

    def start(self):
        """Give OPEN to the active rules. If no rule is active, connect to the backend at once."""
        now = self.began
        self.chain.start()
        if self.chain.active_rules:
            events = self.chain.process(now, UPSTREAM, OPEN)    # has an OPEN: see end_waiting
            self.enqueue(now, events + self.chain.process_open(now, [DOWNSTREAM]))  # has no OPEN
        else:
            self.connect_backend()
            self.update_interest()
            if self.up.fast_events:     # most clients have sent a request already
                self.on_ready(self.up, EVENT_READ)

    def refuse(self):
        """Refuse a client beyond max_connections: see RefusingChain.

        If the client sends nothing, the proxy closes the connection after the setting `timeout`.
        """
        self.chain = RefusingChain(self.proxy.rules, self.number, self.chain.protocol)
        self.set_deadline(self.began + self.proxy.timeout, lambda: self.close("refused"))
        # In a protocol whose server speaks first, the chain answers OPEN with the error.
        self.process_signal(UPSTREAM, OPEN)

    # Reading

    def on_ready(self, link, events):
        """Receive once from a link's source, and forward the bytes or queue them.

        events    the events that the source is ready for. prepare_read handles EVENT_WRITE.

        Each call receives only once, so that a fast sender does not delay other connections.

        If the fast path is open, this function sends the bytes at once. Without an active rule,
        the fast path makes no events, and reads the clock only to measure a latency.
        """
        loop, chain, budget, limit = self.loop, self.chain, link.budget, link.recv_size
        # prepare_read() handles all cases except a plain read on an open fast path.
        if (events != link.fast_events or link.bulk_reads >= SPLICE_AFTER
                or budget.held > budget.fast_path_limit):
            limit = self.prepare_read(link, events)
            if not limit:
                return
        try:
            size = link.source.recv_into(loop.buffer, limit)
        except OSError as error:
            self.on_recv_error(link, error)
            return
        if not size:
            self.on_eof(link)
            return
        # direction_changed() may begin a request, and returns request_count. A sample is measured.
        if chain.last_direction is not link.to and (
                chain.direction_changed(link.to) >= link.measure_from):
            self.begin_measurement()
        data = loop.view[:size]
        if chain.protocol or chain.active_rules or not link.fast_events:
            data = self.process_received(link, data, size)
            if not data:
                return
            size = len(data)
        else:                           # send the bytes as they are
            link.bulk_reads += size >= BULK_READ        # True counts as 1
        try:
            sent = link.target.send(data)
        except OSError as error:
            self.on_forward_error(link, data, error)
            return
        link.forwarded += sent
        if sent < size or link.request_time:
            self.after_send(link, data[sent:])

    def begin_measurement(self):
        """Begin to measure the latency of a request, and draw the next request to measure.

        Does nothing if another request is being measured.
        """
        if not self.down.request_time:      # `down`: the reply ends the measurement
            self.down.request_time = self.loop.clock()
            distance = self.proxy.latencies.draw_distance()
            self.up.measure_from = self.chain.request_count + distance

    def end_measurement(self):
        """Record the latency of the measured request: its first reply bytes have been sent."""
        self.proxy.latencies.add(self.loop.clock(), self.down.request_time)
        self.down.request_time = 0.0

    def prepare_read(self, link, events):
        """Handle the cases in which on_ready cannot simply receive.

        events    the events that the source is ready for; all events if the source has an error.

        Returns the most bytes to receive now, or 0 if on_ready must not receive.
        """
        if self.phase is CLOSED:        # by an earlier callback of this select()
            return 0
        if self.phase is CONNECTING and link is self.down:
            self.on_connected()         # the event reports the end of connect()
            return 0
        if isinstance(link.source, TlsSocket) and not self.advance_tls(link):
            return 0                    # the event was for the handshake
        if events & link.watched & EVENT_WRITE:     # the source takes bytes again
            self.pump()                 # may close the source
        if not events & EVENT_READ or link.source is None:
            return 0
        if link.fast_events and link.bulk_reads >= SPLICE_AFTER and self.splice(link):
            return 0                    # splice() has replaced recv()
        limit = link.read_limit(self.loop.clock)
        if limit <= 0 or self.phase is HANDED_OFF:
            self.update_interest()      # stops reading
            return 0
        if self.proxy.has_blocking and self.hand_off(link):
            return 0                    # a blocking handler will read the bytes
        return min(limit, link.recv_size, self.parse_limit(link))

    def parse_limit(self, link):
        """Return the most bytes to receive, so that the parsed requests fit in the free memory."""
        parses_requests = link is self.up and link.recv_size <= PARSED_CHUNK
        if not parses_requests:
            return CHUNK                # the most that on_ready ever receives
        free_memory = link.budget.allowance(HELD_MAX) - link.held - link.kept
        return max(1, free_memory // EXPANSION)     # not 0: read_limit() decides whether to read

    def process_received(self, link, data, size):
        """Run `size` received bytes through the chain.

        Returns the bytes that on_ready must send, or None if all bytes were queued or dropped.
        on_ready counts the sent bytes in `forwarded`. All other bytes are counted in `buffered_in`
        here, or in the functions below.
        """
        chain = self.chain
        if not link.fast_events:
            if self.phase is LINGERING:     # the client has got its last reply: drop the bytes
                link.buffered_in += size
                return None
        elif link.delay_rules is chain.active_rules:    # see find_delays
            return self.delay(link, data)
        passed = chain.pass_through(link.to, data)      # often `data` itself
        if chain.protocol and (size >= PARSED_CHUNK or link.recv_size > PARSED_CHUNK):
            link.recv_size = chain.recv_size(link.to)   # a long body may have begun or ended
        to_send = passed
        if passed is None:              # a rule may act
            to_send = self.run_rules(link, data)
        elif passed is not data or not link.fast_events:    # changed bytes, or no fast path
            self.after_parsing(link)
            to_send = self.send_or_queue(link, size, passed)
        if chain.protocol is None:
            self.find_delays(link)      # for the next chunk
        # If the bytes were queued, update_interest() has charged the kept bytes. After a fall
        # back, self.chain is not `chain` any more.
        elif (self.chain.kept > KEPT_MIN or self.up.kept) and to_send is not None:
            self.kept_changed()
        return to_send

    def run_rules(self, link, data):
        """Run received bytes through the active rules.

        Returns the bytes to send at once, or None if events were queued instead.
        """
        now, chain = self.loop.clock(), self.chain
        chain.modified = False          # a rule that changes an event sets `modified`
        events = chain.process_bytes(now, link.to, bytes(data))
        self.after_parsing(link)
        if not chain.modified:          # all events are bytes for the target, due now
            to_send = b"".join([chunk for _, _, chunk, _ in events])
            return self.send_or_queue(link, len(data), to_send)
        link.buffered_in += len(data)
        self.enqueue(now, events, link)
        return None

    def find_delays(self, link):
        """If the active rules only delay a link's bytes, let `delay` process the next chunks."""
        chain = self.chain
        is_found = link.delay_rules is chain.active_rules
        if is_found or not chain.rule_set.has_delaying_rule:
            return
        delaying = chain.delaying_rules(link.to)
        if delaying is None:
            return
        rules = [active.rule for active in delaying]
        link.delay_rules, link.delaying = chain.active_rules, delaying
        pieces = [rule.link_rate[1] for rule in rules if rule.link_rate]    # of slow links
        link.piece_max = min(pieces, default=sys.maxsize)
        link.fixed_delays = () if pieces else tuple(
            (rule, rule.fixed_delay, False) for rule in rules)              # False: from_open

    def delay(self, link, data):
        """Queue bytes that rules only delay. This is faster than `run_rules`.

        Returns None, or `data` to send at once if the rules do not act on this direction.

        `fast_events` stays set although bytes are held, so that further chunks come here too. No
        chunk overtakes the held bytes: when the rules change, rules_changed() calls pump(), which
        closes the fast path.
        """
        if link is self.up:
            self.chain.note_beginning(data)
        if not link.delaying:
            return data
        size, now = len(data), self.loop.clock()
        if size > link.piece_max:       # a handler must cut the chunk
            return self.run_rules(link, data)
        link.buffered_in += size
        if link.fixed_delays:
            due = now
            for _, seconds, _ in link.fixed_delays:
                due += seconds
            link.put_chunk(due, bytes(data), now, link.fixed_delays)
        else:
            link.put_piece(now, bytes(data))
        if link.held > HELD_LOW:        # pump() stops the reading if the link is full
            self.pump()
        elif not self.timer:            # no other data is due at any time
            self.timer = self.loop.call_at(link.latest, self.on_timer)
        elif link.latest < self.timer[DUE]:     # the timer is for the other link
            self.set_timer(now)
        return None

    def send_or_queue(self, link, size, to_send):
        """Return `to_send` if the fast path is open. Otherwise queue `to_send`, and return None.

        size       the number of bytes received.
        to_send    the bytes to send: the received bytes, perhaps with another Host header.
        """
        if link.fast_events:            # on_ready will count len(to_send) as received
            link.buffered_in += size - len(to_send)
            return to_send
        now = self.loop.clock()
        link.buffered_in += size
        self.enqueue(now, [(now, link.to, bytes(to_send), ())], link)
        return None

    def after_parsing(self, link):
        """Handle a protocol error, or the beginning of TLS, that the parser has found."""
        if self.chain.protocol_error:
            self.on_protocol_error()
        if self.chain.encrypted is not None:
            self.begin_tls(link)

    def charge_kept(self):
        """Charge the budget for the memory that the chain keeps for exchanges.

        After the backend's EOF, nothing is charged. A charge could fill the budget, and stop the
        reading from the client. No reply would ever free the memory.
        """
        is_charged = self.chain.kept > KEPT_MIN and not self.down.eof
        self.up.keep(self.chain.kept if is_charged else 0)

    def kept_changed(self):
        """Charge the budget for kept memory. Stop or resume reading from the client if needed."""
        self.charge_kept()
        reads_client = bool(self.up.watched & EVENT_READ)
        if self.wants_read(self.up, self.down) != reads_client:
            self.update_interest()

    def on_forward_error(self, link, data, error):
        """Handle an error of send() on the fast path: no byte of `data` was sent."""
        if isinstance(error, BlockingIOError):
            self.buffer_unsent(link, data)
        else:
            link.buffered_in += len(data)       # count dropped bytes as received, too
            self.on_send_error(link)
            self.pump()

    def after_send(self, link, unsent):
        """Buffer the unsent bytes. If a latency is being measured, end the measurement."""
        if link.request_time:
            self.end_measurement()
        if unsent:
            self.buffer_unsent(link, unsent)

    def buffer_unsent(self, link, data):
        """Buffer bytes of the fast path that the target does not accept now."""
        link.buffer_due(memoryview(bytes(data)))    # a copy, because loop.buffer is used again
        self.update_interest()

    def on_protocol_error(self):
        """Log that bytes were not of the protocol. Continue as tcp: see ProtocolChain.fall_back.

        The chain may have made a successor, a Chain for tcp. Otherwise the chain itself continues.
        """
        chain = self.chain
        log.info("%sconnection %d, request %d: protocol parsing stopped, continuing as tcp: %s",
                 self.proxy.log_prefix, self.number, chain.request_count, chain.protocol_error)
        chain.protocol_error = ""
        if chain.successor:
            self.chain = chain.successor
            self.set_recv_sizes()

    def set_recv_sizes(self):
        """Set the sizes of recv for both links, because the chain or its rules have changed."""
        for link in self.up, self.down:
            link.recv_size = self.chain.recv_size(link.to)

    def splice(self, link):
        """Forward bulk data through a kernel pipe, without a copy: a kind of fast path.

        Returns False if the caller must call recv in place of splice.
        """
        pool, chain = self.loop.pipe_pool, self.chain
        if chain.active_rules or chain.protocol or chain.last_direction is not link.to:
            return False                # the chain must get the bytes
        try:
            pipe = pool.pop() if pool else KernelPipe(self.loop.fd_limit)
        except OSError:                 # no descriptors
            link.bulk_reads = 0
            return False
        size = 0
        try:
            size = pipe.splice_from(link.source)
        except OSError as error:
            if error.errno not in SPLICE_UNAVAILABLE:
                self.on_recv_error(link, error)
        if size < BULK_READ:            # for small data, recv is faster
            link.bulk_reads = 0
        if not size:
            self.release_pipe(pipe)
            return link.eof             # True after on_recv_error: recv() must not follow
        link.buffer_due(pipe)
        self.flush(link)
        if link.send_buffer or link.write_closed:       # the target takes no more, or has gone
            self.pump()
        return True

    def release_pipe(self, pipe):
        """Return an empty kernel pipe to the pool. If the pool is full, close the pipe."""
        if len(self.loop.pipe_pool) < KERNEL_PIPES_POOLED:
            self.loop.pipe_pool.append(pipe)
        else:
            pipe.close()

    def on_eof(self, link):
        """Handle the EOF of a link's source. On the fast path, half-close the target at once."""
        link.eof = True
        if self.chain.protocol or self.chain.active_rules or not link.fast_events:
            self.process_signal(link.to, EOF)
            return
        self.close_write(link)
        back = self.down if link is self.up else self.up
        if back.write_closed:
            self.finish()
        else:
            # The source of `back` needs no other events, unless its ciphertext waits. Then the
            # TlsSocket calls on_tls_change.
            link.fast_events = 0
            self.watch(link, self.wanted_events(link, back))

    def hand_off(self, link):
        """Let an active blocking handler read the bytes that wait in a link's source.

        Returns False if no bytes wait or no blocking handler is active: on_ready must go on. Until
        an active handler can start, wants_read() stops the reading.
        """
        data = b""
        with contextlib.suppress(OSError):
            data = link.source.recv(BEGINNING_MAX, socket.MSG_PEEK)     # leaves the bytes unread
        if not data:                    # on_ready() handles an EOF and an error
            return False
        if self.chain.last_direction is not link.to:
            self.chain.direction_changed(link.to)       # may begin a request, and draw its rules
        active = self.chain.blocking_rule()
        if active is None:
            return False
        if link is self.up:
            self.chain.note_beginning(data)     # for the fault record
        if self.can_start_handler():
            self.start_handler(link, active)
        self.update_interest()
        return True

    def start_handler(self, link, active):
        """Call the blocking handler of an active rule in a new thread: see HandOff."""
        try:
            handoff = HandOff(self, active.rule, link is self.up)
        except OSError as error:        # no descriptors
            self.reset("no handler: %s" % error.strerror)
            return
        self.phase = HANDED_OFF
        if active.mark_acted():
            self.proxy.record_fault(self, active, self.chain.request_count,
                                    self.chain.request_text())
        self.loop.run_in_thread(handoff.run, handoff.on_done)

    def can_start_handler(self):
        """Return whether both peers are connected and no data is held."""
        return self.phase is CONNECTED and not (self.up.held or self.down.held)

    def take_back(self, close_reason):
        """Use the sockets again, after a blocking handler has finished.

        close_reason    why to close the connection; "" to continue.
        """
        if self.phase is CLOSED:        # closed while the handler ran
            return
        self.phase = CONNECTED
        for sock in (self.client, self.backend):
            sock.setblocking(False)     # the handler may have made the duplicates blocking
        if close_reason:
            self.close(close_reason)
        else:
            self.pump()

    # Queueing and sending

    def process_signal(self, to, signal):
        """Run a signal through the chain, and queue the events that result."""
        now = self.loop.clock()
        self.enqueue(now, self.chain.process(now, to, signal))

    def enqueue(self, now, events, received_by=None):
        """Put the chain's events into the delay queues, record faults, and send due data.

        received_by    the link whose received bytes have caused the events; None for a signal.
        """
        for t, to, data, delays in events:
            link = self.up if to == UPSTREAM else self.down
            link.put(t, data, now, delays)
            # An event that goes back to the sender of the bytes is a reply of a rule.
            is_reply = received_by is not None and link is not received_by
            if is_reply and link.held:      # put() may have dropped the event
                link.has_replies = True
        newly_acted, self.chain.newly_acted = self.chain.newly_acted, []
        for active, request, beginning in newly_acted:
            self.proxy.record_fault(self, active, request, beginning)
        if self.records_without_text:
            self.add_text()
        self.pump()

    def add_text(self):
        """Add the first bytes of request 1 to the FaultRecords that were made before they came."""
        if self.chain.current_number == 1:
            text = self.chain.request_text()
            if not text:                # the bytes have not come yet
                return
            self.proxy.set_record_text(self.records_without_text, text)
        self.records_without_text = ()  # after request 1, the records stay without text

    def rules_changed(self, new, removed, changed, woken=()):
        """Apply a change of the installed rules.

        new        rules that have just been installed.
        removed    rules that are not installed any more, or that begin to sleep.
        changed    rules with new options or percentages.
        woken      rules whose percentage rises now because of their schedule.
        """
        now = self.loop.clock()
        begun = self.chain.rules_changed(new, changed, woken)   # rules that begin to act
        self.set_recv_sizes()
        undone_in_chain = self.chain.release(removed, changed)  # whether delays were undone
        for link in self.up, self.down:
            undone_in_link = link.release(removed, changed)
            if undone_in_link or undone_in_chain:
                # The due times that other rules keep contain the undone delays: lower these times.
                self.chain.reset_due_times(link.to, max(now, link.latest))
        opened = [*new, *changed, *begun]
        self.enqueue(now, self.chain.process_open(now, [UPSTREAM, DOWNSTREAM], opened))

    def on_timer(self):
        """Send the data that is due. Release a held head if its time limit is over.

        Data and FIN for the client come first, as in send_due: after an error of the backend, the
        client would get no FIN.
        """
        self.timer = None
        now = self.loop.clock()
        if self.chain.head_deadline <= now:     # NEVER if no head is held
            events = self.chain.give_up_head(now)       # may end the parsing
            self.after_parsing(self.up)
            self.enqueue(now, events)
        elif self.send_chunks(self.down, now) and self.send_chunks(self.up, now):
            self.set_timer(now)
        else:
            self.pump()

    def send_chunks(self, link, now):
        """Send a link's chunks that are due. This is faster than pump().

        Returns False if pump() must be called next: a signal is due, the target does not take all
        bytes, or update_interest() may have something to do.
        """
        queue = link.queue
        if not queue:
            return True
        if link.target is None or link.write_closed or link.send_buffer or link.has_replies:
            return False
        joins = self.chain.rule_set.joins_chunks
        while queue and queue[0][0] <= now:
            is_signal = not queue[0][2]
            if is_signal or not self.send_chunk(link, link.pop_next(now, joins)):
                return False
        if not queue and not link.fast_events:
            return False                # pump() may open the fast path
        # If the link is not read although it is not full, pump() resumes the reading.
        return bool(link.watched & EVENT_READ or link.eof or link.is_full(self.loop.clock))

    def send_chunk(self, link, data):
        """Send bytes that pop_next has returned. Returns whether the target takes all of them."""
        try:
            sent = link.target.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.on_send_error(link)
            return False
        link.buffered_out += sent
        if sent and link.request_time:
            self.end_measurement()
        if sent < len(data):
            link.credit(sent)
            link.append_due(memoryview(data)[sent:])
            return False
        link.credit(sent + CHUNK_OVERHEAD)
        return True

    def pump(self):
        """Send all data that is due. End the connection, or set the timer and watched events.

        The slow path always ends with a call of this function.
        """
        now = self.loop.clock()
        signals = self.send_due(now)
        if self.phase is CLOSED:        # by a connect that has failed at once
            return
        if RESET in signals:
            self.reset("reset by a fault")
        elif self.up.write_closed and self.down.write_closed:
            self.finish()
        else:
            if self.announcing_link is not None:
                self.continue_tls()
            self.update_interest()
            self.set_timer(now)

    def send_due(self, now):
        """Send all data that is due, as far as the targets take the data.

        Returns the list of OPEN and RESET signals that are due.
        """
        up, down, signals, joins = self.up, self.down, [], self.chain.rule_set.joins_chunks
        if up.queue:
            signals += up.pop_due(now, joins)       # moves due bytes and EOFs to send_buffer
        if down.queue:
            signals += down.pop_due(now, joins)
        if self.phase is WAITING and (signals or up.send_buffer):   # OPEN, RESET or client data
            self.end_waiting(now, signals)
        if down.send_buffer:
            self.flush(down)
        if up.send_buffer:
            self.flush(up)
        return signals

    def end_waiting(self, now, signals):
        """Connect to the backend if OPEN or bytes of the client are due.

        If only the client's EOF is due, end the connection without a backend. pump() handles a
        RESET.
        """
        has_bytes = any(data is not EOF for data in self.up.send_buffer)
        has_eof = EOF in self.up.send_buffer
        if OPEN in signals or has_bytes:
            self.connect_backend()
        elif has_eof:
            self.up.discard()
            self.up.write_closed = True
            self.down.put(now, EOF, now)        # for the client

    def flush(self, link):
        """Send the data of send_buffer, until the target takes no more."""
        target = link.target
        while link.send_buffer and target is not None:
            data = link.send_buffer[0]
            try:
                if link.write_closed:       # EOF was sent: drop the data after EOF
                    link.send_buffer.popleft()
                    link.credit(len(data) + CHUNK_OVERHEAD)     # consume() would count it as sent
                elif data is EOF:
                    link.consume(0)         # removes EOF
                    self.close_write(link)
                elif isinstance(data, KernelPipe):
                    link.consume(data.splice_to(target))
                    if not data.held:       # the pipe is empty
                        self.release_pipe(data)
                else:
                    link.consume(target.send(data))
                    if link.request_time:
                        self.end_measurement()
            except BlockingIOError:
                return
            except OSError:
                self.on_send_error(link)    # empties send_buffer

    def close_write(self, link):
        """Half-close the target: send FIN, and with TLS close_notify before FIN."""
        link.write_closed = True
        is_tls = isinstance(link.target, TlsSocket)
        if is_tls:
            link.target.skip_close_notify = self.is_truncated(link)
        if self.reset_reason:
            return                              # finish() will send RST instead of FIN
        if not is_tls and self.up.write_closed and self.down.write_closed:
            return                              # finish() will close the socket: this sends FIN
        try:
            link.target.shutdown(socket.SHUT_WR)
        except OSError:
            self.on_send_error(link)

    # Interest in socket events

    def update_interest(self):
        """Watch both sockets for the events that matter now, and open or close the fast path."""
        if self.phase is CLOSED:
            return
        up, down = self.up, self.down
        if self.chain.kept > KEPT_MIN or up.kept:
            self.charge_kept()
        allows_fast_path = self.allows_fast_path()
        is_simple = not (up.held or down.held or up.kept or self.has_tls)
        for link, back in (up, down), (down, up):   # the source of `link` is the target of `back`
            is_unused = not (link.held or link.eof or link.write_closed)
            link.fast_events = EVENT_READ if allows_fast_path and is_unused else 0
            if link.fast_events and is_simple:
                events = EVENT_READ         # the result of `wanted_events`, but faster
            else:
                events = self.wanted_events(link, back)
            if events != link.watched:
                self.watch(link, events)

    def allows_fast_path(self):
        """Return whether both fast paths may be open. A pending TLS handshake closes both."""
        return (self.phase is CONNECTED and not self.proxy.has_blocking
                and (not self.has_tls or self.tls_is_open()))

    def wanted_events(self, link, back):
        """Return the events that matter now for a link's source.

        back    the link in the other direction, whose target is the source of `link`.
        """
        source = link.source
        if source is None:                  # the backend's socket before connect()
            return 0
        if self.phase is CONNECTING and link is self.down:
            events = EVENT_WRITE            # a socket is writable when its connect() has ended
        else:
            events = EVENT_READ if self.wants_read(link, back) else 0
        if back.send_buffer:
            events |= EVENT_WRITE
        return source.interest(events) if isinstance(source, TlsSocket) else events

    def watch(self, link, events):
        """Watch a link's source for `events`, or stop watching the source if `events` is 0.

        If the kernel cannot watch the source, the loop soon resets the connection, but not at
        once, because the callers still use the sockets. Linux limits the number of watched
        sockets: see max_user_watches in man 7 epoll.
        """
        link.watched = events
        if not events:
            self.loop.unwatch(link.source)
            return
        try:
            # A partial of a bound method, such as self.on_ready, would be slower.
            callback = functools.partial(Connection.on_ready, self, link)
            self.loop.watch(link.source, events, callback)
        except OSError as error:
            log.warning("%sconnection %d: reset, because its socket cannot be watched: %s",
                        self.proxy.log_prefix, self.number, error.strerror)
            reason = "refused: %s" % error.strerror
            self.loop.call_at(self.loop.clock(), lambda: self.reset(reason))

    def wants_read(self, link, back):
        """Return whether to read from a link's source.

        back    the link in the other direction, whose target is the source of `link`.
        """
        clock = self.loop.clock
        if link.eof or link.is_full(clock):     # a sender that is not read slows down
            return False
        if back.has_replies and back.is_full(clock):
            return False                        # the source must first read the replies of rules
        if link.write_closed and self.reset_reason:
            return False                        # recv or send of the target has failed
        if self.announcing_link is link or self.phase is HANDED_OFF:
            return False                        # TLS begins, or a blocking handler reads
        if self.proxy.has_blocking and self.chain.blocking_rule() is not None:
            return self.can_start_handler()     # the next recv would start the handler
        return True

    def set_timer(self, now):
        """Set the timer for the next event that is due, or for the time limit of a held head."""
        up, down = self.up, self.down
        due = self.chain.head_deadline
        if up.queue:
            due = min(due, up.next_time(now))
        if down.queue:
            due = min(due, down.next_time(now))
        if self.timer and self.timer[DUE] != due:
            self.loop.cancel(self.timer)
            self.timer = None
        if due < NEVER and not self.timer:
            self.timer = self.loop.call_at(due, self.on_timer)

    # TLS

    def start_tls(self, link, received=b""):
        """Replace a link's source by a TlsSocket, which begins the handshake.

        link        self.up for TLS with the client, self.down for TLS with the backend.
        received    the first bytes of TLS, if they have come already.
        """
        config, serves_client = self.proxy.tls, link is self.up
        if serves_client:
            back, server_name = self.down, None     # back: the link that sends to this peer
            local_host = self.client.getsockname()[0]   # the address that the client uses
            context = config.accept_context(local_host)
        else:
            backend_host = self.proxy.backend[0]
            back, server_name = self.up, config.server_name(backend_host)
            context = config.connect_context()
        if link.watched:        # update_interest() will watch the TlsSocket instead
            self.loop.unwatch(link.source)
            link.watched = 0
        link.source = back.target = TlsSocket(
            link.source, self.loop, functools.partial(self.on_tls_change, link),
            self.proxy.timeout, context, serves_client, server_name, received)
        self.client, self.backend = self.up.source, self.down.source    # one is now a TlsSocket
        self.up.fast_events = self.down.fast_events = 0     # until the handshake has ended
        self.up.bulk_reads = self.down.bulk_reads = NO_SPLICE
        self.has_tls = True

    def tls_is_open(self):
        """Return whether no TLS handshake is pending."""
        return all(source.is_open for source in (self.client, self.backend)
                   if isinstance(source, TlsSocket))

    def begin_tls(self, link):
        """Begin TLS with a link's source, which has announced TLS in the protocol (STARTTLS).

        The announcement itself goes to the target without TLS. When the announcement is sent,
        continue_tls begins TLS with the target.
        """
        self.announcing_link = link
        self.start_tls(link, received=self.chain.encrypted)
        self.chain.encrypted = None
        link.source.note_change()       # soon calls pump(), which calls continue_tls()

    def continue_tls(self):
        """Begin TLS with the receiver of the announcement, after the announcement was sent."""
        link = self.announcing_link
        if not link.held:
            self.announcing_link = None
            receiver_link = self.down if link is self.up else self.up
            self.start_tls(receiver_link)

    def advance_tls(self, link):
        """Handle an event of a link's TlsSocket: continue the handshake, or send ciphertext.

        Returns whether the handshake had ended before the event.
        """
        source = link.source
        if not source.is_open:
            source.shake_hands()        # at the end, this calls on_tls_change
            return False
        try:
            source.push()
        except OSError:
            back = self.down if link is self.up else self.up    # the TlsSocket is its target
            self.on_send_error(back)
        return True

    def on_tls_change(self, link):
        """React to a new state of a link's TlsSocket, which calls this function by a timer."""
        source = link.source
        if source.error and not source.is_open:
            self.on_handshake_failed(link, source)
            return
        self.pump()                     # may close the connection
        if source.readable and self.phase is not CLOSED and link.watched & EVENT_READ:
            self.on_ready(link, EVENT_READ)

    def on_handshake_failed(self, link, source):
        """Close the connection after a failed handshake.

        A client can first read the alert that `source` has sent: linger() waits until the client
        closes its side. Then on_tls_change calls this function again.
        """
        if link is self.down:
            self.connect_failed("TLS handshake: %s" % source.error)
            return
        if self.phase is not LINGERING:         # the first call
            log.info("%sconnection %d: TLS handshake with the client failed: %s (client %s)",
                     self.proxy.log_prefix, self.number, source.error, self.name)
            for failed in self.up, self.down:   # neither link can decrypt or encrypt data
                failed.discard()
                failed.eof = failed.write_closed = True
            self.linger()
        if source.ended:                        # the client has closed its side
            self.close("no TLS")

    def is_truncated(self, link):
        """Return whether a link's stream ends without close_notify, as if the sender had died."""
        if link.eof:                            # the target sees the same end as the proxy
            return isinstance(link.source, TlsSocket) and link.source.lacks_close_notify
        rule_has_replied = self.chain.answered_early
        return not rule_has_replied             # a rule ends the stream

    # Connecting to the backend

    def connect_backend(self):
        """Resolve the backend's name, then try one address after the other."""
        self.phase = CONNECTING
        self.connect_deadline = self.loop.clock() + self.proxy.timeout
        if self.proxy.addresses:        # the backend is an IP address: no name to resolve
            self.addresses = list(self.proxy.addresses)
            self.connect_next(None)     # sets the deadline if connect() is pending
        else:
            self.set_deadline(self.connect_deadline, lambda: self.connect_failed("timed out"))
            self.proxy.resolve_backend(self.on_resolved)

    def on_resolved(self, addresses, error):
        """Connect to the addresses of the backend's name, unless the resolver has failed.

        addresses    [(family, address)], or None after an error.
        error        the exception of the resolver, or None.
        """
        if self.phase is not CONNECTING:    # the connection has ended in the meantime
            return
        self.addresses = list(addresses or ())
        reason = getattr(error, "strerror", error)      # a RuntimeError has no strerror
        self.connect_again(reason)

    def connect_again(self, reason):
        """Close the socket that has failed to connect, if any, and try the next address.

        reason    why an earlier address has failed, as text; None if there is no reason yet.
        """
        self.close_backend()
        self.connect_next(reason)
        self.pump()

    def connect_next(self, reason):
        """Start to connect to the next address.

        reason    why an earlier address has failed, as text; None if there is no reason yet.
        """
        while self.addresses:
            family, sockaddr = self.addresses.pop(0)
            try:
                self.backend, pending = start_connect(family, sockaddr, self.loop.fd_limit)
            except OSError as error:
                if error.errno in FD_EXHAUSTED:     # try this address again later
                    Loop.fds_exhausted = True
                    self.addresses.insert(0, (family, sockaddr))
                    self.set_deadline(self.loop.clock() + RETRY_DELAY, self.retry_connect)
                    return
                # The error of a missing IPv6 must not replace the error of an IPv4 address.
                if reason is None or not address_unavailable(error):
                    reason = error.strerror
                continue
            self.down.source = self.backend
            if pending:
                self.limit_connect()
            else:
                self.set_connected()
            return
        self.connect_failed(reason or "no address found")

    def limit_connect(self):
        """Limit the time of the pending connect(), to leave time for the untried addresses."""
        now, address_count = self.loop.clock(), 1 + len(self.addresses)
        share = (self.connect_deadline - now) / address_count
        self.set_deadline(now + share, lambda: self.connect_again("timed out"))

    def set_deadline(self, t, callback):
        """Call callback() at the time t. Cancel the earlier deadline of the connection."""
        self.loop.cancel(self.deadline_timer)
        self.deadline_timer = self.loop.call_at(t, callback)

    def retry_connect(self):
        """Try to connect again, because file descriptors may be free now."""
        if self.loop.clock() < self.connect_deadline:
            self.connect_again(None)
        else:
            self.connect_failed(os.strerror(errno.EMFILE))

    def on_connected(self):
        """Handle the end of a pending connect(), which has succeeded or failed."""
        error = connect_error(self.backend)
        if error:
            self.connect_again(socket_strerror(error))
        else:
            self.set_connected()
            self.pump()

    def set_connected(self):
        """Use the backend's socket, which is connected now. Begin TLS if the backend needs TLS."""
        self.phase = CONNECTED
        self.up.target = self.backend
        self.loop.cancel(self.deadline_timer)       # start_tls() sets another time limit
        needs_tls = len(self.proxy.backend) > 2     # (host, port, "tls")
        if needs_tls and self.proxy.has_blocking:
            self.connect_failed("a blocking handler works without TLS only")
        elif needs_tls:
            self.start_tls(self.down)

    def connect_failed(self, reason):
        """Log and count that the backend could not be connected, and close the connection."""
        self.proxy.on_connect_failed(self, reason)
        self.close("no backend")

    # Endings: see the table at the top of the section

    def on_recv_error(self, link, error):
        """Handle an error of recv(): the source has gone. Reset the target after the held data."""
        if isinstance(error, BlockingIOError):      # not a failure: no bytes have come yet
            return
        peer, back = ("client", self.down) if link is self.up else ("backend", self.up)
        link.source_reset = isinstance(error, ConnectionResetError)
        self.reset_reason = ("reset by %s" % peer if link.source_reset
                             else "%s lost: %s" % (peer, error.strerror))
        if back.held:
            back.discard()          # the source can receive no data
        back.write_closed = True
        link.eof = True             # splice() returns `eof`, to prevent a recv()
        cannot_send = link.latest == NEVER or self.phase is CONNECTING
        if link is self.up and cannot_send:     # do not keep the data of the lost client
            self.reset(self.reset_reason)
        else:
            self.on_eof(link)       # reset_reason is set, so that finish() resets the target

    def on_send_error(self, link):
        """Handle an error of send(): the target has gone."""
        link.discard()
        link.write_closed = True
        peer = "backend" if link is self.up else "client"
        # finish() resets both sockets after the data that the target has sent is delivered.
        self.reset_reason = self.reset_reason or "reset by %s" % peer

    def finish(self):
        """End the connection, because nothing more can be sent in either direction."""
        if self.reset_reason:
            self.reset(self.reset_reason)
        elif self.up.eof and self.down.eof:
            self.close("closed")
        elif self.chain.answered_early and not self.up.eof:
            self.linger()               # a rule has replied, and the client may still send
        else:                           # a rule has ended the connection
            faults = [active.rule.name for active in self.chain.active_rules if active.has_acted]
            self.close("closed by %s" % (" and ".join(faults) or "a fault"))

    def linger(self):
        """Send FIN, and wait until the client closes its side, but LINGER_TIMEOUT at most.

        A close with unread bytes would send RST, and RST could destroy the reply of the rule.
        """
        self.close_backend()
        self.down.eof = True            # after the client's EOF, finish() calls close()
        if self.phase is not LINGERING:     # finish() may call this function again
            self.phase = LINGERING
            with contextlib.suppress(OSError):
                self.client.shutdown(socket.SHUT_WR)
            self.set_deadline(self.loop.clock() + LINGER_TIMEOUT,
                              lambda: self.close("closed by a fault"))
        self.update_interest()

    def close_backend(self):
        """Close the backend's socket, if there is one, and the fast path."""
        if self.backend is not None:
            if self.down.watched:
                self.loop.unwatch(self.backend)
            self.backend.close()
            self.backend = self.down.source = self.up.target = None
            self.up.fast_events = self.down.fast_events = self.down.watched = 0

    def reset(self, reason):
        """Close both sockets in such a way that the kernel sends RST. The log shows the reason."""
        for link in self.up, self.down:
            if link.source is not None and not link.source_reset:
                reset_on_close(link.source)
        self.close(reason)

    def close(self, reason):
        """Close both sockets. The log shows the reason."""
        if self.phase is CLOSED:
            return
        if self.phase is HANDED_OFF:    # wake up the blocking handler if it waits in recv()
            for sock in (self.client, self.backend):
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
        self.phase = CLOSED
        self.close_backend()
        if self.up.watched:
            self.loop.unwatch(self.client)
        self.client.close()
        self.client = self.up.source = self.down.target = None
        self.loop.cancel(self.timer)
        self.loop.cancel(self.deadline_timer)
        self.proxy.on_connection_closed(self, reason)
        self.up.close()
        self.down.close()

    # For the log, the API and the metrics

    def backend_name(self):
        """Return the address of the backend as text: the connected address, or the setting."""
        try:
            return format_address(self.backend.getpeername())
        except (AttributeError, OSError):       # no socket yet, or not connected
            return format_address(self.proxy.backend)

    def add_bytes(self, totals):
        """Add the counts of bytes of this connection to the counts in `totals`.

        totals    [from the client, to the backend, from the backend, to the client].
        """
        up, down = self.up, self.down       # the sums are faster than up.received and up.sent
        totals[0] += up.forwarded + up.buffered_in
        totals[1] += up.forwarded + up.buffered_out
        totals[2] += down.forwarded + down.buffered_in
        totals[3] += down.forwarded + down.buffered_out


# -- Log ----------------------------------------------------------------------
#
# This section contains the formats of the log, a thread that writes lines to a file, and the
# recording of faults.

class Formatter(logging.Formatter):
    """A log formatter that writes a message in one line, and indents a traceback.

    Control characters are escaped, because messages may contain bytes that a peer has sent.
    """

    def formatMessage(self, record):
        record.message = escape_control_chars(record.message)
        return super().formatMessage(record)

    def formatException(self, exc_info):
        lines = super().formatException(exc_info).split("\n")
        return "\n".join("    " + escape_control_chars(line) for line in lines)


class JsonFormatter(logging.Formatter):
    """A log formatter that writes a message as a JSON object in one line."""

    converter = time.gmtime  # type: ignore     # formatTime() calls this: the times are UTC
    default_time_format, default_msec_format = "%Y-%m-%dT%H:%M:%S", "%s.%03dZ"

    def format(self, record):
        line = OrderedDict(time=self.formatTime(record), level=record.levelname.lower(),
                           message=record.getMessage())
        if hasattr(record, "fault"):    # set by a log call with extra={"fault": fault record}
            line["fault"] = record.fault._asdict()
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


LOG_FORMATTERS = OrderedDict((      # {format of --log-format: its formatter}
    ("text", Formatter("%(asctime)s %(levelname)s %(message)s")), ("json", JsonFormatter())))


class LogThread(logging.Handler):
    """A log handler that writes the lines in a thread of its own, to a file descriptor.

    The loop must not block, but a write blocks while a pipe is full or a disk is busy. A
    non-blocking stderr is no solution: stderr would become non-blocking for other processes too.
    When Python exits, the module logging calls `close`.
    """

    def __init__(self, fd, on_error=None):
        """Create the thread. on_error(error) gets the first OSError. Later ones are ignored."""
        super().__init__()
        self.fd = fd
        self.on_error = on_error
        self.lines = deque()            # lines that are not written yet
        self.dropped = 0                # number of lines dropped since the last write
        self.closing = False
        self.changed = threading.Condition()    # guards lines, dropped and closing
        self.thread = threading.Thread(target=self.write_lines, name="log", daemon=True)

    def emit(self, record):
        """Queue the line of a record. The first call starts the thread."""
        try:
            line = self.format(record)
            if not self.closing and not self.thread.is_alive():
                self.thread.start()
        except Exception:
            self.handleError(record)        # prints the exception to stderr
            return
        with self.changed:
            if len(self.lines) < LOG_LINES_MAX:
                self.lines.append(line)
            else:
                self.dropped += 1
            self.changed.notify()

    def close(self):
        """Wait until the thread has written all lines, but LOG_CLOSE_TIMEOUT at most."""
        with self.changed:
            self.closing = True
            self.changed.notify()
        if self.thread.is_alive():
            self.thread.join(LOG_CLOSE_TIMEOUT)
        super().close()

    def write_lines(self):
        """Write all lines, in order, until `close` is called. Runs in the thread."""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.lines or self.closing)
                if not self.lines:
                    return
                lines, self.lines = self.lines, deque()
                dropped, self.dropped = self.dropped, 0
            if dropped:
                lines.append(self.format(log.makeRecord(
                    log.name, logging.WARNING, "", 0, "%d log lines were dropped here, because "
                    "the log could not be written fast enough", (dropped,), None)))
            text = "\n".join(lines) + "\n"
            try:
                self.write(text.encode("utf-8", "backslashreplace"))
            except OSError as error:    # the disk is full, or the pipe is closed
                if self.on_error:
                    self.on_error(error)
                    self.on_error = None

    def write(self, data):
        """Write all data. Raises OSError."""
        while data:
            try:
                data = data[os.write(self.fd, data):]
            except BlockingIOError:     # another process has made the open file non-blocking
                select.select([], [self.fd], [])


class Recorder:
    """Writes each fault of the proxies to a file, as a line with a JSON object.

    path    the file, which Replay can read.
    """

    def __init__(self, path):
        self.path = path
        self.is_new = True              # until the first `open` has emptied the file
        self.log_thread = None          # the LogThread that writes, while the file is open

    def open(self):
        """Open the file if it is not open. Raises OSError."""
        if self.log_thread:
            return
        try:
            fd = self.open_and_lock()
        except OSError as error:
            raise OSError(error.errno, "cannot record to %s: %s"
                          % (self.path, error.strerror)) from None
        self.log_thread = LogThread(fd, on_error=lambda error: log.error(
            "cannot record to %s: %s: the file lacks faults", self.path, error.strerror))

    def open_and_lock(self):
        """Open and lock the file, and return its descriptor. The first call empties the file.

        Raises OSError, for example if another process has locked the file.
        """
        fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        if not stat.S_ISREG(os.fstat(fd).st_mode):      # a pipe or a device needs no lock
            return fd
        if fcntl:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                os.close(fd)
                raise OSError(error.errno, "another proxy records to this file: each process "
                                           "needs a file of its own") from None
            except OSError:             # the file system has no locks: record without a lock
                pass
        if self.is_new:
            os.ftruncate(fd, 0)
        self.is_new = False
        return fd

    def write(self, record, active):
        """Write a FaultRecord, and the values of its ActiveRule that Replay needs."""
        line = json.dumps(dict(record._asdict(), rule=active.rule.to_json(), draw=active.draw,
                               count=active.request))   # for Replay: see Rule.drawn_count
        # A "%" in `line` does no harm: a LogRecord without arguments is not formatted.
        self.log_thread.handle(logging.makeLogRecord({"msg": line}))

    def close(self):
        """Write the faults that wait, and close the file."""
        if self.log_thread:
            self.log_thread.close()
            if not self.log_thread.thread.is_alive():   # a thread that still writes needs the fd
                os.close(self.log_thread.fd)
            self.log_thread = None


# -- Proxy --------------------------------------------------------------------
#
# A proxy keeps the state that its connections share: the listener, the rules, the counts, and
# the fault records. A ProxyTable holds the proxies of one process. A comment such as "In the
# loop's thread" says where the methods below the comment run while a proxy is open.

# Type checkers read the class FaultRecord. The program uses the namedtuple FaultRecord. If the
# field `change` is set, connection and request are 0, and client and text are empty.
if MYPY:
    class FaultRecord(NamedTuple):
        number: int
        time: float
        proxy: str
        connection: int
        client: str
        request: int
        handler: str
        options: "Dict[str, OptionValue]"   # options of the handler, and drawn values
        toxic: "Optional[str]" = None       # the name of the rule's toxic, if any
        block: "Optional[int]" = None       # the number of the rule's Block, if any
        change: "Optional[str]" = None      # a key of CHANGES if the schedule changed the rule
        stream: str = "both"                # the stream of the rule
        text: str = ""                      # the first bytes of the request, printable, or ""
else:
    FaultRecord = namedtuple("FaultRecord", "number time proxy connection client request handler "
                                            "options toxic block change stream text")
    FaultRecord.__new__.__defaults__ = (None, None, None, "both", "")

# {FaultRecord.change: its text in the log and in the report of pytest}
CHANGES = {"begins": "a window begins", "ends": "the window ends",
           "expires": "removed, because its ttl has expired"}

# The rules of a proxy after its start, or after a change of the rules.
#
# after         the number of the last fault record before the change.
# connection    the number of the last client before the change.
# rules         the new rules, in the form of Rule.to_json.
RuleChange = namedtuple("RuleChange", "after time proxy connection rules")

# A block of a test: rules that act instead of the behavior while the block is open.
#
# rules    the list of rules, which share one draw.
# only     True: the rules of earlier blocks do not act while this block is open.
Block = namedtuple("Block", "rules only")


QUANTILES = OrderedDict((("p50", 0.5), ("p95", 0.95)))     # {name of a percentile: its share}


class Latencies:
    """The latencies of a proxy in the last LATENCY_AGE_MAX seconds.

    A latency is the time from a request to the first byte of its reply that the client gets. An
    idle proxy measures every request. A busy proxy measures a random sample, because to measure
    each request would cost 4 % of a round trip.
    """

    SAMPLES_PER_STEP = 64

    def __init__(self):
        self.samples = deque(maxlen=LATENCIES_KEPT)     # (time of the reply, time of the request)
        self.random = random.Random(0)      # a user may have seeded the generator of the module

    def draw_distance(self):
        """Return the distance to the next measured request, in requests. 0 has the effect of 1.

        The distance is random. On average, the distance grows with the number of samples.
        """
        mean = len(self.samples) // self.SAMPLES_PER_STEP
        return int(2 * mean * self.random.random()) if mean else 0

    def add(self, replied, asked):
        """Add a sample: the times of a reply and of its request. Remove the old samples."""
        while self.samples and self.samples[0][0] < replied - LATENCY_AGE_MAX:
            self.samples.popleft()
        self.samples.append((replied, asked))

    def percentiles(self, now):
        """Return {name: seconds}, or {} if no sample is of the last LATENCY_AGE_MAX seconds."""
        latencies = sorted(replied - asked for replied, asked in self.samples
                           if replied >= now - LATENCY_AGE_MAX)
        percentiles = OrderedDict()
        if latencies:
            for name, share in QUANTILES.items():
                rank = math.ceil(len(latencies) * share)        # counted from 1
                percentiles[name] = latencies[rank - 1]
        return percentiles


class ProxyServer:
    """A proxy in a loop: the listener, the rules, the counts, and the fault records.

    distant            the backend, (host, port); the proxy connects to it for each client.
    local              the (host, port) to listen on; port 0 means any free port.
    behavior           in one of the forms that behavior_tables takes.
    toxics             rules that act beside the behavior: [Toxic].
    enabled            whether a ProxyTable opens the port of the proxy.
    accept             how new clients are accepted: an Accept.
    max_connections    the most clients that are served at a time; 0 is no limit.
    tls                {field: value} of TLS_FIELDS.
    reuse_port         the number of this process, if several processes share the port, or None.

    The other arguments are those of Proxy. Raises ValueError.
    """

    def __init__(self, distant, local=("localhost", 0), behavior="100:dummy", options=None,
                 name="vaurien", seed=None, timeout=30.0, protocol="tcp",
                 overwrite_host_header=True, toxics=(), enabled=True, accept=None,
                 max_connections=0, tls=None, reuse_port=None):
        self.name = name
        self.log_prefix = "" if name == "vaurien" else name + ": "      # the start of log lines
        self.protocol = PROTOCOLS[check_protocol(protocol)]     # None for tcp
        self.overwrite_host_header = overwrite_host_header
        self.tls = TlsConfig(tls or {}, self.protocol.alpn if self.protocol else ())
        self.reuse_port = reuse_port
        self.check_port(local)
        self.local = local
        self.listen = format_address(local)         # as text; set_listener() sets the real port
        self.accept = accept or Accept()
        self.enabled, self.max_connections, self.timeout = enabled, max_connections, timeout
        self.seed = random.SystemRandom().getrandbits(32) if seed is None else seed
        # The processes that share a port draw different numbers: process 2 with the seed "7/2".
        rule_seed = self.seed if reuse_port in (None, 1) else "%d/%d" % (self.seed, reuse_port)
        self.rules = RuleSet(rule_seed, name)
        # Check the options of all handlers, even of handlers that are not in the behavior.
        read_rules([dict(values, name=handler, percent=0)
                    for handler, values in (options or {}).items()])
        self.blocks_begun = 0               # the number of the last Block
        self.install_rules(read_rules(behavior_tables(behavior, options)), blocks=OrderedDict(),
                           toxics=list(toxics))
        self.loop = None                    # set by `open`
        self.rule_timer = None              # the timer for the next change by a schedule
        self.listener = None                # None while disabled
        self.set_backend(distant)
        self.connections = {}               # {number: Connection} of the open connections
        self.accepted = 0                   # number of clients, including refused clients
        self.refused = 0                    # number of clients beyond max_connections
        self.open_refused = set()           # numbers of the open connections of refused clients
        self.faults = Counter()             # {handler: number of its faults}
        self.kinds = Counter()              # {(handler, kind): number of these faults}
        self.failures = 0                   # connections for which the backend was not reached
        self.closed_bytes = [0, 0, 0, 0]    # of closed connections: see Connection.add_bytes
        self.fault_records = deque(maxlen=FAULT_RECORDS_KEPT)
        self.fault_count = 0                # the number of the last FaultRecord
        self.rule_changes = deque(maxlen=RULE_CHANGES_KEPT)     # RuleChanges
        self.fault_recorded = threading.Condition()     # guards and announces the FaultRecords
        self.latencies = Latencies()
        self.recorder = None                # set by ProxyTable.open_proxy, like rules.replay
        self.lookups = {}                   # {backend: callbacks that wait for its addresses}
        self.lock = threading.RLock()       # held during changes that take several steps

    # In any thread

    def check_port(self, local):
        """Raise InputError for (host, 0) if processes share the port."""
        _, port = local
        if self.reuse_port and port == 0:
            raise InputError([("listen", "reuse-port needs a port, not 0: each process would get "
                                         "a port of its own")])

    def describe_seed(self):
        """Return the settings that decide the draws: "seed 7", or "seed 7, reuse-port 2"."""
        return "seed %s%s" % (self.seed, ", reuse-port %d" % self.reuse_port
                              if self.reuse_port else "")

    def next_records(self, since, seconds):
        """Return the FaultRecords with a number greater than `since`, the oldest first.

        Waits for the first record, `seconds` at most.
        """
        with self.fault_recorded:
            if self.fault_count <= since:
                self.fault_recorded.wait(seconds)
            return self.records_since(since)

    def records_since(self, since):
        """Return the FaultRecords with a number greater than `since`, the oldest first."""
        with self.fault_recorded:
            newest_first = list(itertools.takewhile(lambda record: record.number > since,
                                                    reversed(self.fault_records)))
        return newest_first[::-1]

    # In the loop's thread: listening

    def bind(self):
        """Bind the port. Raises OSError, whose message contains the address."""
        self.set_listener(Listener(self.local, self.on_accept, self.accept.current_mode(),
                                   self.reuse_port))

    def set_listener(self, listener):
        """Set the listener, whose port is bound, and the addresses `local` and `listen`."""
        self.listener, self.local = listener, listener.local
        host, port = self.local
        # Toxiproxy writes the wildcard address as [::].
        self.listen = format_address(("::", port) if is_wildcard(host) else listener.address())

    def open(self, loop):
        """Begin the schedules, accept clients if the port is bound, and log the settings."""
        self.loop = loop
        self.record_rule_change()
        self.begin_schedules()
        if self.listener:
            self.listener.open(loop)
            self.apply_accept()
            log.info("%slistening on %s for %s: %s; %s%s", self.log_prefix, self.listener,
                     format_address(self.backend), self.describe(), self.describe_seed(),
                     "" if self.accept.mode == "normal" else "; %s" % self.accept)
        if self.joins_tls() and self.protocol is Postgres and not self.tls.cert_file:
            log.info("%spostgres: a client that logs in with SCRAM needs channel_binding=disable, "
                     "because it does not get the certificate of the backend", self.log_prefix)

    def set_accept(self, accept):
        """Use an Accept. Raises CannotListen, and changes nothing, if the listener fails."""
        before, self.accept = self.accept, accept
        if accept is before:
            return
        try:
            self.apply_accept()
        except CannotListen:            # the listener may be closed: restore the earlier mode
            self.accept = before
            with contextlib.suppress(CannotListen):
                self.apply_accept()
            raise
        has_schedule = bool(accept.fields)      # even with the same text, a schedule begins again
        if has_schedule or accept.to_text() != before.to_text():
            log.info("%saccept: %s", self.log_prefix, accept.to_text())
        self.begin_schedules()

    def apply_accept(self):
        """Give the listener the mode that `accept` has at this time. Raises CannotListen."""
        if self.listener:
            self.listener.set_mode(self.accept.current_mode())

    def stop_listening(self, reason):
        """Close the listener and every connection. The log shows the reason."""
        if self.listener:
            self.listener.close()
            self.listener = None
        self.drop_connections(reason)

    def drop_connections(self, reason):
        """Close every connection. The log shows the reason."""
        for connection in list(self.connections.values()):
            connection.close(reason)

    def on_accept(self, client, peer):
        """Start a connection for a client, with its socket `client` and its address `peer`."""
        client.setblocking(False)
        if not LINUX:           # on Linux, the socket inherits these options from the listener
            set_stream_options(client)
        self.accepted += 1
        connection = self.connections[self.accepted] = Connection(
            self, self.accepted, client, peer)
        is_beyond_limit = self.max_connections and self.served_count() > self.max_connections
        if not is_beyond_limit:
            connection.start()
            return
        self.refused += 1
        self.open_refused.add(connection.number)
        log.info("%sconnection %d: refused: max_connections is %d (client %s)",
                 self.log_prefix, connection.number, self.max_connections, connection.name)
        connection.refuse()

    def served_count(self):
        """Return the number of open connections, without the refused connections."""
        return len(self.connections) - len(self.open_refused)

    def apply_change(self, local, backend, enabled, listener, accept):
        """Change the addresses, `enabled` and `accept`. Close the connections if necessary.

        local       the new address. An enabled proxy at a new address needs a new listener.
        backend     a backend that check_backend has accepted.
        listener    a new Listener at `local`. None: an enabled proxy keeps its listener.

        Raises CannotListen, and changes nothing, if the listener cannot have the mode of `accept`.
        """
        self.set_accept(accept)
        reason = "%s by the control" % ("changed" if enabled else "disabled")
        if listener or not enabled:         # the proxy no longer needs the old listener
            self.stop_listening(reason)
        elif backend != self.backend:
            self.drop_connections(reason)
        self.set_checked_backend(backend)
        was_enabled, self.enabled = self.enabled, enabled
        if listener:
            self.set_listener(listener)
            self.open(self.loop)
        elif not enabled and local != self.local:       # the next bind() uses `local`
            self.local, self.listen = local, format_address(local)
        if was_enabled != enabled:
            log.info("proxy %s: %s by the control", self.name,
                     "enabled" if enabled else "disabled")

    def close(self):
        """Close the listener and every connection."""
        self.stop_listening("stopped")
        if not self.loop:               # the proxy was bound, but never opened
            return
        self.loop.cancel(self.rule_timer)
        for rule in self.scheduled_rules():
            rule.since = None           # begin_schedules() starts the schedule at the next open
        log.info("%sstopped: connections: %d, requests: %d, faults: %s", self.log_prefix,
                 self.accepted, self.rules.request_count,
                 ", ".join("%d %s" % (count, name) for name, count in self.faults.items())
                 or "none")
        if self.rules.replay:
            text, complete = self.rules.replay.summary(self.name)
            log.log(logging.INFO if complete else logging.WARNING, "%s%s", self.log_prefix, text)

    # In the loop's thread: the backend

    def set_backend(self, backend):
        """Use a backend for new clients. Raises ValueError for the proxy's own address."""
        local_addresses = [self.local]
        if self.listener:
            local_addresses += [sock.getsockname()[:2] for sock in self.listener.sockets]
        check_backend(backend, local_addresses)
        self.set_checked_backend(backend)

    def set_checked_backend(self, backend):
        """Use a backend for new clients. check_backend has accepted the backend."""
        is_tls = len(backend) > 2           # (host, port, "tls")
        if is_tls:
            self.tls.connect_context()      # now, because the first call takes milliseconds
        self.backend = backend
        self.addresses = resolve_numeric(backend)       # empty if a resolver is needed

    def resolve_backend(self, on_resolved):
        """Resolve the backend's name in a thread, then call on_resolved(addresses, error).

        Either `addresses` or `error` is None. Clients that wait at the same time share one lookup.
        """
        backend = self.backend
        if backend in self.lookups:
            self.lookups[backend].append(on_resolved)
            return
        self.lookups[backend] = [on_resolved]

        def on_done(addresses, error):
            for callback in self.lookups.pop(backend):
                callback(addresses, error)

        self.loop.run_in_thread(lambda: resolve(backend), on_done)

    def set_protocol(self, protocol, overwrite_host_header, tls):
        """Change these settings. Close the open connections if a setting has another value."""
        before = self.protocol, self.overwrite_host_header, self.tls.fields
        if before != (protocol, overwrite_host_header, tls.fields):
            self.protocol, self.overwrite_host_header = protocol, overwrite_host_header
            self.tls = tls
            self.drop_connections("changed by the control")

    def protocol_name(self):
        """Return the name of the protocol, such as "tcp"."""
        return self.protocol.__name__.lower() if self.protocol else "tcp"

    def joins_tls(self):
        """Return whether the proxy decrypts TLS that begins within a connection (STARTTLS)."""
        backend_is_tls = len(self.backend) > 2      # TLS from the start
        return bool(self.tls.clients_use_tls and self.protocol and self.protocol.starts_tls
                    and not backend_is_tls)

    def host_header(self):
        """Return the Host header that the backend gets, or b"" to forward the client's header."""
        if not self.overwrite_host_header or self.protocol is not Http:
            return b""
        host, port, *tls = self.backend
        if isinstance(port, str):       # the name of a service, but the header needs a number
            return b""
        value = format_address((host or "localhost", port))
        default_port = ":443" if tls else ":80"         # HTTP clients leave out this port
        return re.sub(default_port + "$", "", value).lower().encode("utf-8")

    # In the loop's thread: rules

    def acting_rules(self):
        """Return [the rules of each block that acts], or [the behavior] if no block acts.

        The rules of one list share one draw.
        """
        acting = []
        for block in self.blocks.values():
            if block.only:
                acting.clear()
            acting.append(block.rules)
        return acting or [self.behavior]

    def describe(self):
        """Return the behavior and the toxics as text: "20:delay sleep=1.0, 80:dummy"."""
        acting = "; ".join(describe_shares(rules) for rules in self.acting_rules() if rules)
        return ", ".join([acting or "100:dummy", *map(str, self.toxics)])

    def handler_names(self):
        """Return the names of the handlers in acting_rules(), joined by commas."""
        return ",".join(rule.name for rules in self.acting_rules() for rule in rules) or "dummy"

    def use_rules_of(self, replay):
        """Install the rules of a Replay, unless the user has set rules. Raises ValueError."""
        if all(rule.name == "dummy" for rule in self.all_rules()):     # the default
            try:
                rules, toxics = replay.rules(self.name)
                self.install_rules(rules, OrderedDict(), toxics)
            except ValueError as error:
                raise ValueError("a rule of %s is not valid here: %s" % (replay.path, error)
                                 ) from None

    def set_rules(self, rules):
        """Use these rules as the behavior, and end the open blocks."""
        self.replace_rules(rules, OrderedDict(), self.toxics)

    def begin_block(self, rules, only):
        """Let the rules of a block act. Returns the number of the block.

        The block gets the first draw key that no open block has: "behavior", "block 1", "block 2"
        ... With the same seed, a test draws the same numbers even if other tests run before.
        """
        number = self.blocks_begun + 1
        used_keys = {rule.draw_key for block in self.blocks.values() for rule in block.rules}
        draw_key, index = "behavior", 0
        while draw_key in used_keys:
            index += 1
            draw_key = "block %d" % index
        for rule in rules:
            rule.block, rule.draw_key = number, draw_key
        blocks = OrderedDict(self.blocks)
        blocks[number] = Block(rules, only)
        self.replace_rules(self.behavior, blocks, self.toxics)
        self.blocks_begun = number      # only if replace_rules() has accepted the rules
        return number

    def end_block(self, number):
        """Remove the rules of a block, unless a ttl has ended the block already."""
        if number in self.blocks:
            blocks = OrderedDict(self.blocks)
            del blocks[number]
            self.replace_rules(self.behavior, blocks, self.toxics)

    def set_toxics(self, toxics):
        """Replace the toxics. A current toxic with the same rule remains, and keeps its state.

        Raises InputError, and changes nothing, if a toxic is not valid for this proxy.
        """
        current = {toxic.name: toxic for toxic in self.toxics}
        toxics_after, kept = [], []     # kept: [(current toxic, new toxic with the same rule)]
        for toxic in toxics:            # check all toxics before the first change
            self.check_rule(toxic.rule)
            old = current.get(toxic.name)
            if old is not None and old.same_rule(toxic):
                toxics_after.append(old)
                kept.append((old, toxic))
            else:
                self.create_instance(toxic.rule)
                toxics_after.append(toxic)
        changed_rules = [old.rule for old, new in kept if self.update_toxic(old, new)]
        self.replace_rules(self.behavior, self.blocks, toxics_after, changed_rules)

    def update_toxic(self, toxic, new):
        """Give a toxic the ttl, toxicity and attributes of `new`, a toxic with the same rule.

        Returns whether the toxicity or the attributes have changed.
        """
        if new is not toxic:            # a request has set this toxic: its ttl begins again
            toxic.rule.ttl = new.rule.ttl
            toxic.rule.renew_ttl(self.loop.clock())
        if (new.toxicity, new.attributes) == (toxic.toxicity, toxic.attributes):
            return False
        toxic.update(new.toxicity, new.attributes)
        if toxic.rule.instance:
            toxic.rule.instance.update_settings(toxic.rule.options)
        return True

    def replace_rules(self, behavior, blocks, toxics, changed=()):
        """Install the rules of the behavior, blocks and toxics, also on open connections.

        changed    installed rules whose options have changed.

        A new rule does not affect data that is already in transit. Data that a removed or
        changed rule was delaying is released at once. Raises InputError.
        """
        before = self.rules.installed
        self.install_rules(behavior, blocks, toxics)
        after = self.rules.installed
        removed = [rule for rule in before if rule not in after]
        new = [rule for rule in after if rule not in before]
        self.record_rule_change()
        log.info("%srules: %s", self.log_prefix, self.describe())
        self.begin_schedules()
        self.change_connections(new, removed, changed)

    def record_rule_change(self):
        """Record the installed rules, so that a user can repeat a run with the same changes."""
        self.rule_changes.append(RuleChange(
            self.fault_count, time.time(), self.name, self.accepted,
            [rule.to_json() for rule in self.rules.installed]))

    def change_connections(self, new, removed, changed, woken=()):
        """Apply a change of the rules to the open connections: see Connection.rules_changed."""
        for rule in [*removed, *changed]:
            # `bandwidth` stores in `shared` when its last delayed chunk is due. It is due now.
            rule.shared.pop(UPSTREAM, None)
            rule.shared.pop(DOWNSTREAM, None)
        for connection in list(self.connections.values()):
            connection.rules_changed(new, removed, changed, woken)

    def all_rules(self):
        """Return the rules of the behavior, of the open blocks, and of the toxics."""
        return [*self.behavior, *(rule for block in self.blocks.values() for rule in block.rules),
                *(toxic.rule for toxic in self.toxics)]

    def scheduled_rules(self):
        """Return the rules that have a schedule, and the Accept if it has a schedule."""
        return [rule for rule in [*self.all_rules(), self.accept] if rule.has_schedule()]

    def begin_schedules(self):
        """Start the schedules of new rules, and set the timer for all schedules."""
        now = self.loop.clock()
        for rule in self.scheduled_rules():
            if rule.since is None:      # the schedule has not begun
                rule.begin_schedule(now)
                if self.update_moment(rule, now):
                    self.record_window(rule)
        self.set_rule_timer()

    def update_moment(self, rule, now):
        """Set rule.moment, the state of the rule's schedule at the time `now`.

        Returns whether a window of the rule begins or ends now.
        """
        before = rule.moment
        rule.set_moment(rule.moment_at(now))
        return rule.moment.active != before.active

    def record_window(self, rule):
        """Record that a window of a rule begins or ends now."""
        self.record_change(rule, "begins" if rule.moment.active else "ends")

    def set_rule_timer(self):
        """Set the timer for the next change of a rule by its schedule, if there is one."""
        self.loop.cancel(self.rule_timer)
        due = min([min(rule.moment.next_change, rule.expires)
                   for rule in self.scheduled_rules()], default=NEVER)
        if due < NEVER:
            self.rule_timer = self.loop.call_at(due, self.on_rule_timer)

    def on_rule_timer(self):
        """Follow the schedules: windows begin and end, ramps rise, and rules expire."""
        now = self.loop.clock()
        expired, asleep, woken, accept_changed = [], [], [], False
        for rule in self.scheduled_rules():
            if rule.expires <= now:
                expired.append(rule)
                continue
            share_before = rule.moment.share    # of the percentage: 0 outside of windows
            window_changed = self.update_moment(rule, now)
            if rule is self.accept:         # no connection uses an Accept
                accept_changed = window_changed
                continue
            if window_changed:
                self.record_window(rule)
            if share_before > 0 and rule.sleeps():
                asleep.append(rule)
            elif rule.moment.share > share_before:
                woken.append(rule)
        if asleep or woken:
            self.change_connections(new=[], removed=asleep, changed=[], woken=woken)
        if expired:
            self.remove_expired(expired)
        self.set_rule_timer()
        self.follow_accept(accept_changed)

    def follow_accept(self, window_changed):
        """Change the mode of the listener. Then record the window of `accept`, if it has changed.

        A test may wait for the record and then connect, so the mode must change before.
        """
        try:
            self.apply_accept()
        except CannotListen as error:
            log.warning("%s%s", self.log_prefix, error.strerror)
        if window_changed:
            self.record_window(self.accept)

    def remove_expired(self, rules):
        """Remove rules whose ttl has ended. If a rule of a block expires, remove the block.

        rules    may contain self.accept.
        """
        for rule in rules:
            self.record_change(rule, "expires")
        if self.accept in rules:
            self.accept = Accept()
            if len(rules) == 1:         # no other rule has expired
                return
        behavior = [rule for rule in self.behavior if rule not in rules]
        blocks = OrderedDict((number, block) for number, block in self.blocks.items()
                             if set(rules).isdisjoint(block.rules))
        toxics = [toxic for toxic in self.toxics if toxic.rule not in rules]
        self.replace_rules(behavior, blocks, toxics)

    def install_rules(self, behavior, blocks, toxics):
        """Set the behavior, the open blocks and the toxics, and install their rules.

        behavior    a list of rules; they are not installed while a block is open.
        blocks      {number: Block}, the oldest first.
        toxics      a list of toxics, in the order in which they act.

        Raises InputError, and changes nothing, if a rule does not fit the protocol.
        """
        for rules in [behavior, *(block.rules for block in blocks.values()),
                      [toxic.rule for toxic in toxics]]:
            for rule in rules:
                self.check_rule(rule)
                self.create_instance(rule)
        self.behavior, self.blocks, self.toxics = behavior, blocks, toxics
        acting = itertools.chain.from_iterable(self.acting_rules())
        installed = [*acting, *(toxic.rule for toxic in toxics)]
        self.rules.install(installed)
        self.has_blocking = any(rule.blocking for rule in installed)

    def create_instance(self, rule):
        """Create rule.instance: the object of a blocking handler. Raises InputError."""
        if rule.blocking and rule.instance is None:
            try:
                rule.instance = rule.handler(rule.options, self)
            except Exception as exc:            # the user's class may raise anything
                raise InputError([("name", "%s cannot be created: %s" % (
                    rule.name, format_exception(exc)))]) from None

    def check_rule(self, rule):
        """Raise InputError if a rule does not fit the proxy's protocol."""
        if rule.blocking and (self.protocol or self.tls.clients_use_tls):
            raise InputError([("name", "%s is a blocking handler: it works with --protocol tcp "
                                       "only, and without TLS" % rule.name)])
        has_rows = self.protocol and self.protocol.has_rows
        if rule.handler is cut and rule.options["rows"] and not has_rows:
            suitable = [name for name, protocol in PROTOCOLS.items()
                        if protocol and protocol.has_rows]
            raise InputError([("rows", "rows needs --protocol %s: %s has no rows"
                               % (" or ".join(suitable), self.protocol_name()))])
        if rule.handler in (error, transient):
            self.check_error_rule(rule)

    def check_error_rule(self, rule):
        """Raise InputError if a rule of `error` or `transient` does not fit the protocol."""
        kind = rule.options["kind"]
        if kind and self.protocol is None:
            raise InputError([("kind", "kind needs --protocol: tcp has no error of the kind %r"
                               % kind)])
        if kind and kind not in self.protocol.errors:
            raise InputError([("kind", "kind must be one of %s, the errors of %s, not %r%s" % (
                ", ".join(self.protocol.errors), self.protocol_name(), kind,
                did_you_mean(kind, self.protocol.errors)))])
        # With `inject`, the backend replies, and the rule inserts bytes into the reply.
        replies_for_backend = self.protocol and not rule.options["inject"]
        if replies_for_backend and rule.stream != "both":
            raise InputError([("stream", "stream must be both for %s, because this handler "
                                         "replies instead of the backend" % rule.name)])

    # For the connections of the proxy, in the loop's thread

    def record_fault(self, connection, active, request, beginning):
        """Count, record and log that an ActiveRule has acted on a request.

        beginning    the first bytes of the request, or b"" if they are unknown.
        """
        rule = active.rule
        options = dict(rule.options, **active.drawn_options)
        self.faults[rule.name] += 1
        if options.get("kind"):
            self.kinds[rule.name, str(options["kind"])] += 1
        connection.faults = (*connection.faults, rule.name)[-100:]     # the last 100
        record = self.add_record(rule, options, connection.number, connection.name, request,
                                 text=printable(beginning))
        if self.recorder:
            self.recorder.write(record, active)
        if self.rules.replay:
            self.rules.replay.mark_made(self.name, connection.number, request, rule)
        if not beginning and request == 1:      # Connection.add_text() will complete the record
            connection.records_without_text = (*connection.records_without_text, record.number)
        if log.isEnabledFor(logging.INFO):      # otherwise, the texts need not be made
            self.log_fault(connection, active, record)

    def log_fault(self, connection, active, record):
        """Log that an ActiveRule has acted on a request."""
        shown_text = ", " + record.text if record.text else ""
        is_remote = not is_loopback(connection.peer[0])
        shown_client = " (client %s)" % connection.name if is_remote else ""
        log.info("%s%s: connection %d, request %d%s%s", self.log_prefix,
                 active.rule.describe_fault(active.drawn_options), record.connection,
                 record.request, shown_text, shown_client, extra={"fault": record})

    def record_change(self, rule, change):
        """Record and log a change of a rule by its schedule. `change` is a key of CHANGES."""
        record = self.add_record(rule, dict(rule.options), change=change)
        log.info("%s%s: %s", self.log_prefix, rule, CHANGES[change], extra={"fault": record})

    def add_record(self, rule, options, connection=0, client="", request=0, change=None, text=""):
        """Add a FaultRecord, and wake up the threads that wait for one. Returns the record."""
        with self.fault_recorded:
            record = FaultRecord(self.fault_count + 1, time.time(), self.name, connection, client,
                                 request, rule.name, options, rule.toxic, rule.block, change,
                                 rule.stream, text)
            self.fault_records.append(record)
            self.fault_count += 1
            self.fault_recorded.notify_all()
        return record

    def set_record_text(self, numbers, beginning):
        """Add the first bytes of a request to the FaultRecords with these numbers."""
        with self.fault_recorded:
            oldest_number = self.fault_records[0].number
            for number in numbers:
                index = number - oldest_number
                if index >= 0:          # otherwise the record has been removed
                    record = self.fault_records[index]
                    self.fault_records[index] = record._replace(text=printable(beginning))

    def to_unix(self, t):
        """Convert a time of the loop's clock to seconds since 1970."""
        return round(t + time.time() - self.loop.clock(), 3)

    def on_connect_failed(self, connection, reason):
        """Count and log that a connection cannot reach the backend."""
        self.failures += 1
        log.warning("%sconnection %d: cannot connect to backend %s: %s (client %s)",
                    self.log_prefix, connection.number, format_address(self.backend), reason,
                    connection.name)

    def on_connection_closed(self, connection, reason):
        """Remove and log a closed connection. Keep the counts of its bytes."""
        del self.connections[connection.number]
        if connection.number in self.open_refused:
            self.open_refused.remove(connection.number)
            reason = "refused"
        connection.add_bytes(self.closed_bytes)
        if log.isEnabledFor(logging.DEBUG):
            log.debug("%sconnection %d, client %s: %s after %.3f s, %d bytes up, %d bytes down, "
                      "requests: %d", self.log_prefix, connection.number, connection.name,
                      reason, self.loop.clock() - connection.began, connection.up.received,
                      connection.down.received, connection.chain.request_count)

    # In the loop's thread: called by the control server

    def list_connections(self, numbers=None):
        """Return a list with a dict for each open connection.

        numbers    the numbers of the wanted connections; None for all.
        """
        now = self.loop.clock()
        if numbers is None:
            numbers = self.connections
        return [{
            "number": connection.number, "client": connection.name,
            "backend": connection.backend_name(),
            "connected": connection.backend is not None and connection.phase is not CONNECTING,
            "age": round(now - connection.began, 3),
            "bytes_up": connection.up.received, "bytes_down": connection.down.received,
            "requests": connection.chain.request_count,
            "held_up": connection.up.held + connection.up.kept,     # kept: the parsed requests
            "held_down": connection.down.held,
            "faults": list(connection.faults),
        } for connection in map(self.connections.get, numbers) if connection]

    def close_connection(self, number, reset=False):
        """Close or reset a connection. Returns False if no connection has this number."""
        connection = self.connections.get(number)
        if not connection:
            return False
        close, done = (connection.reset, "reset") if reset else (connection.close, "closed")
        close("%s by the control" % done)
        log.info("%sconnection %d: %s by the control (client %s)", self.log_prefix, number, done,
                 connection.name)
        return True

    def byte_counts(self):
        """Return the bytes of all connections: {(direction, "received" or "sent"): bytes}."""
        totals = list(self.closed_bytes)
        for connection in self.connections.values():
            connection.add_bytes(totals)
        up_received, up_sent, down_received, down_sent = totals
        return {(UPSTREAM, "received"): up_received, (UPSTREAM, "sent"): up_sent,
                (DOWNSTREAM, "received"): down_received, (DOWNSTREAM, "sent"): down_sent}


def wait_for_records(next_records, since, matches, count, timeout):
    """Wait until `count` FaultRecords match, but at most `timeout` seconds.

    next_records    a function like ProxyServer.next_records.
    since           the number of a record: only later records are counted.
    matches         function that returns whether a record is counted.

    Returns the records that match, the oldest first.
    """
    deadline, found, last_number = time.monotonic() + timeout, [], since
    while True:
        records = next_records(last_number, max(0, deadline - time.monotonic()))
        found += filter(matches, records)
        if len(found) >= count or time.monotonic() >= deadline:
            return found
        if records:
            last_number = records[-1].number
        time.sleep(WAIT_PAUSE)          # several records may come in this time


def describe_shares(rules):
    """Return rules that share one draw as text: "20:delay sleep=1.0, 80:dummy"."""
    percents = [rule.draw_max - rule.draw_min for rule in rules]
    parts = ["%g:%s" % (percent, rule) for percent, rule in zip(percents, rules)]
    rest = 100 - sum(percents)
    if rest > 0.000001:             # more than a rounding error
        parts.append("%g:dummy" % rest)
    return ", ".join(parts)


class ProxyTable(OrderedDict):
    """The proxies of one process, in one loop: {name: ProxyServer}.

    recorder    a Recorder of the faults, or None.
    replay      a Replay that replaces the draws, or None.
    shared      settings of proxies that are created later: seed (None: draw a seed), timeout,
                reuse_port.

    A thread that changes a proxy in several steps holds the proxy's `lock` during all steps.
    """

    def __init__(self, proxies=(), recorder=None, replay=None, **shared):
        super().__init__((proxy.name, proxy) for proxy in proxies)
        self.recorder, self.replay = recorder, replay
        self.shared = shared
        if shared.get("seed") is None:
            shared["seed"] = random.SystemRandom().getrandbits(32)
        self.warnings = []              # about the --config file; `open` logs them
        self.loop = None

    def bind(self):
        """Bind the ports of the enabled proxies, and open the recording. Raises OSError."""
        if self.recorder:
            self.recorder.open()
        for proxy in self.values():
            setting = "--local" if proxy.name == "vaurien" else "proxy " + proxy.name
            if proxy.enabled:
                with CannotListen.naming(setting):
                    proxy.bind()

    def open(self, loop):
        """Open the proxies in this loop."""
        self.loop = loop
        if not self:
            log.info("no proxy yet: POST /proxies creates one; seed %s", self.shared["seed"])
        for text in self.warnings:
            log.warning("%s", text)
        if self.replay:
            log.info("replay: %d faults of %s", len(self.replay.faults), self.replay.path)
        for proxy in self.values():
            self.open_proxy(proxy)

    def open_proxy(self, proxy):
        """Open a proxy, with the recorder and the replay of the table."""
        proxy.recorder = self.recorder
        proxy.rules.set_replay(self.replay)
        proxy.open(self.loop)

    def close(self):
        """Close the proxies and the recording."""
        for proxy in self.values():
            proxy.close()
        if self.recorder:
            self.recorder.close()

    # Not in the loop's thread. Except for `add`, the caller holds the proxy's `lock`

    def add(self, proxy):
        """Add a proxy, and open it if it is enabled. Returns False if the name is taken.

        Raises OSError, or RuntimeError if the loop has ended.
        """
        if proxy.name in self:
            return False
        reason = self.loop.capacity_error()
        if reason:
            raise CannotListen(OSError(errno.EMFILE, reason), proxy.local)
        added = False
        try:
            if proxy.enabled:
                proxy.bind()
            added = self.loop.run_sync(self.add_and_open, proxy)
        finally:                # another thread may have taken the name, or the loop has ended
            if not added and proxy.listener:
                proxy.listener.close()
        return added

    def add_and_open(self, proxy):
        """In the loop's thread: add and open a proxy. Returns False if the name is taken."""
        if proxy.name in self:
            return False
        self.open_proxy(proxy)
        self[proxy.name] = proxy
        return True

    def remove(self, proxy):
        """Remove and close a proxy."""
        self.loop.run_sync(lambda: self.pop(proxy.name).close())

    def change(self, proxy, local=None, backend=None, enabled=None, accept=None,
               max_connections=None):
        """Change these settings of a proxy.

        An argument that is None changes nothing. Connections are closed only if an address
        changes or the proxy is disabled. Raises OSError or InputError.
        """
        local = local or proxy.local
        proxy.check_port(local)
        # Another text of the same address, such as localhost:80 for 127.0.0.1:80, is no change.
        if local != proxy.local and first_address(local) == proxy.listen:
            local = proxy.local
        enabled = proxy.enabled if enabled is None else enabled
        accept = accept or proxy.accept
        listener = None
        if enabled and (local != proxy.local or not proxy.enabled):
            listener = self.rebind(proxy, local, accept)
        proxy.loop.run_sync(proxy.apply_change, local, backend or proxy.backend, enabled,
                            listener, accept)
        if max_connections is not None:
            proxy.max_connections = max_connections

    def reset(self, proxy):
        """Enable a proxy, accept clients, end all blocks, and remove all rules. Raises OSError."""
        self.change(proxy, enabled=True, accept=Accept())
        proxy.loop.run_sync(proxy.set_rules, [])
        proxy.loop.run_sync(proxy.set_toxics, [])

    def rebind(self, proxy, local, accept):
        """Return a new listener at local, with the mode of `accept`. Raises CannotListen.

        If the port stays the same, the old listener is closed first. If the new listener fails,
        the old listener is opened again.
        """
        (_, old_port), (_, new_port) = proxy.local, local
        conflicting = proxy.listener if old_port == new_port else None
        if conflicting:
            proxy.loop.run_sync(conflicting.close)
        try:
            return Listener(local, proxy.on_accept, accept.current_mode(), proxy.reuse_port)
        except CannotListen:
            if conflicting:
                self.bind_again(proxy, conflicting)
            raise

    def bind_again(self, proxy, listener):
        """Bind a listener of a proxy again. If this fails, disable the proxy."""
        try:
            listener.bind()
        except CannotListen as error:
            log.warning("%sdisabled: %s", proxy.log_prefix, error.strerror)
            self.change(proxy, enabled=False)
        else:
            proxy.loop.run_sync(listener.open, proxy.loop)


# -- Metrics ------------------------------------------------------------------
#
# The metrics of all proxies, for Prometheus (GET /metrics) and for StatsD.

def measure_bytes(proxy, name):
    """Return [(labels, bytes)] for both directions. `name` is "received" or "sent"."""
    byte_counts = proxy.byte_counts()
    return [({"direction": direction, "listener": proxy.listen,
              "upstream": format_address(proxy.backend)}, byte_counts[direction, name])
            for direction in (UPSTREAM, DOWNSTREAM)]


# {name for Prometheus: (kind, help, read)}. The function read(proxy) returns [(labels, value)].
METRICS: "OrderedDict[str, Sequence[Any]]" = OrderedDict((name, metric) for name, *metric in [
    ("toxiproxy_proxy_received_bytes_total", "counter",
     "Bytes from the client (upstream) and from the backend (downstream).",
     lambda proxy: measure_bytes(proxy, "received")),
    ("toxiproxy_proxy_sent_bytes_total", "counter",
     "Bytes to the backend (upstream) and to the client (downstream).",
     lambda proxy: measure_bytes(proxy, "sent")),
    ("vaurien_connections_total", "counter", "Clients accepted.",
     lambda proxy: [({}, proxy.accepted)]),
    ("vaurien_connections_open", "gauge", "Connections that are open.",
     lambda proxy: [({}, len(proxy.connections))]),
    ("vaurien_refused_connections_total", "counter", "Clients beyond max_connections, refused.",
     lambda proxy: [({}, proxy.refused)]),
    ("vaurien_requests_total", "counter", "Requests that have begun.",
     lambda proxy: [({}, proxy.rules.request_count)]),
    ("vaurien_faults_total", "counter", "Requests or connections that a handler acted on.",
     lambda proxy: [({"handler": name}, count) for name, count in sorted(proxy.faults.items())]),
    ("vaurien_fault_kinds_total", "counter", "Faults of handlers with the option kind.",
     lambda proxy: [({"handler": name, "kind": kind}, count)
                    for (name, kind), count in sorted(proxy.kinds.items())]),
    ("vaurien_backend_failures_total", "counter", "Clients whose backend could not be reached.",
     lambda proxy: [({}, proxy.failures)]),
    ("vaurien_latency_seconds", "gauge", "Seconds from a request to the first byte of its reply: "
     "percentiles of a sample of the last %g seconds." % LATENCY_AGE_MAX,
     lambda proxy: [({"quantile": "%g" % QUANTILES[name]}, seconds) for name, seconds
                    in proxy.latencies.percentiles(proxy.loop.clock()).items()])])


def measure(proxy):
    """Return the metrics of a proxy: {name: [(labels, value)]}. Runs in the loop's thread."""
    return {name: [(dict(labels, proxy=proxy.name), value) for labels, value in read(proxy)]
            for name, (_, _, read) in METRICS.items()}


def format_metric(value):
    """Return a count, or a number of seconds, as text without an exponent."""
    return "%d" % value if isinstance(value, int) else "%.6f" % value


class Statsd:
    """Sends the metrics of all proxies to a StatsD server by UDP, every STATSD_INTERVAL seconds.

    The line for a counter has the increase (vaurien.PROXY.requests:3|c), and the line for a gauge
    has the value. All methods except `connect` run in the loop's thread.
    """

    CONNECT_RETRY_DELAY = 60        # seconds

    def __init__(self, address, proxies):
        self.address = address
        self.proxies = proxies      # {name: proxy}
        self.loop = None            # set by `open`
        self.sock = None            # set by `on_connected`
        self.last_values = {}       # {(proxy, name): value} when the metrics were last sent

    def bind(self):
        """Do nothing. `serve` calls `bind` of each service, but a Statsd listens on no port."""

    def open(self, loop):
        """Start to connect to the server."""
        self.loop = loop
        loop.run_in_thread(self.connect, self.on_connected)

    def connect(self):
        """Return a socket for the server. Runs in a thread, because it may use a resolver."""
        family, address = resolve(self.address)[0]
        sock = socket.socket(family, socket.SOCK_DGRAM)
        sock.setblocking(False)
        sock.connect(address)
        return sock

    def on_connected(self, sock, error):
        """Start to send, or connect again later if `connect` has failed."""
        if error:
            log.warning("statsd: cannot connect to %s: %s", format_address(self.address), error)
            self.loop.call_at(self.loop.clock() + self.CONNECT_RETRY_DELAY,
                              lambda: self.open(self.loop))
            return
        self.sock = sock
        self.on_timer()

    def on_timer(self):
        """Send the metrics, now and every STATSD_INTERVAL seconds until `close`."""
        if self.sock:
            self.send()
            self.loop.call_at(self.loop.clock() + STATSD_INTERVAL, self.on_timer)

    def send(self):
        """Send all metrics, in packets of at most STATSD_PACKET_MAX bytes."""
        packet = b""
        for line in map(str.encode, self.metric_lines()):
            longer_packet = packet + b"\n" + line if packet else line
            if packet and len(longer_packet) > STATSD_PACKET_MAX:
                self.send_packet(packet)
                packet = line
            else:
                packet = longer_packet
        if packet:
            self.send_packet(packet)

    def send_packet(self, packet):
        with contextlib.suppress(OSError):      # for example, no server is listening
            self.sock.send(packet)

    def metric_lines(self):
        """Return a line for each gauge, and for each counter that grew since the last call."""
        lines, new_values = [], {}
        for proxy in list(self.proxies.values()):
            for metric, values in measure(proxy).items():
                kind, _, _ = METRICS[metric]
                for labels, value in values:
                    name = self.metric_name(metric, labels)
                    new_values[proxy, name] = value
                    increase = value - self.last_values.get((proxy, name), 0)
                    if kind == "gauge":
                        lines.append("%s:%s|g" % (name, format_metric(value)))
                    elif increase:
                        lines.append("%s:%d|c" % (name, increase))
        self.last_values = new_values
        return lines

    def metric_name(self, metric, labels):
        """Return the StatsD name of a metric, like vaurien.PROXY.received_bytes.upstream.

        metric, labels    from measure().
        """
        short_name = re.sub("^(vaurien|toxiproxy_proxy)_|_total$", "", metric)
        parts = ["vaurien", labels["proxy"], short_name]
        parts += [labels[label] for label in ("direction", "handler", "kind") if label in labels]
        if "quantile" in labels:
            parts.append("p%g" % (100 * float(labels["quantile"])))
        return ".".join(re.sub(r"[^\w-]", "_", part) for part in parts)

    def close(self):
        """Send the last metrics, and close the socket."""
        if self.sock:
            self.send()
            self.sock.close()
            self.sock = None


# -- Page ---------------------------------------------------------------------
#
# The web page of the control server: HTML, a style sheet and a script in one text. The page polls
# `GET /status` each second while it is visible, and makes its forms from `GET /declarations`. The
# page loads no other file, and therefore works offline.
#
# Names, SQL and keys on the page come from peers, and may contain HTML. Therefore the script
# writes every text as a text node, which a browser never parses as HTML. The header
# Content-Security-Policy forbids every script and style sheet without the right nonce attribute.
# The server replaces NONCE with new random characters in each response.

PAGE = r"""<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Vaurien</title>
<style nonce="NONCE">
:root { color-scheme: light dark; --ground: #f3f5f8; --card: #fff; --text: #1b1f24;
  --soft: #57606a; --line: #d3d9e0; --accent: #0a56b4; --second: #8a3ab0; --good: #14653a;
  --bad: #b3241b; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #0e1217; --card: #171c23; --text: #e6edf3; --soft: #9ba6b2;
    --line: #333c47; --accent: #74b6ff; --second: #d3a0f5; --good: #63d08b;
    --bad: #ff938a; } }
* { box-sizing: border-box; }
[hidden] { display: none !important; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; background: var(--ground);
  color: var(--text); font: 15px/1.45 system-ui, sans-serif; overflow-wrap: anywhere; }
h1, h2, h3, p, dl, dd, ul { margin: 0; padding: 0; list-style: none; }
p { padding: .3rem 0; }
h1 { font-size: 1.4rem; }
h3, summary { margin: 1.2rem 0 .4rem; font-size: 1rem; font-weight: 600; }
form > h3 { margin-top: 0; }
header, .row { display: flex; flex-wrap: wrap; align-items: center; gap: .5rem .6rem; }
header > :last-child, .spread > :last-child { margin-left: auto; }
article, .notice, form { margin-top: 1rem; padding: 1rem; background: var(--card);
  border: 1px solid var(--line); border-radius: 10px; }
.soft, dt, small, thead, td::before, tbody th::before { color: var(--soft); }
.error, .bad, .active b, .badge { color: var(--bad); }
button, input, select { min-height: 2.1rem; padding: .2rem .7rem; font: inherit; color: inherit;
  background: var(--card); border: 1px solid var(--soft); border-radius: 6px; }
[type=radio], [type=checkbox] { min-height: 0; margin: 0 .3rem 0 0; vertical-align: -.1rem; }
button { cursor: pointer; }
button:hover { border-color: currentColor; box-shadow: 0 0 0 1px; }
button.main, [aria-pressed=true] { background: var(--accent); color: var(--card); }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
.fold { padding: 0 .2rem; border: 0; font-size: 1.15rem; font-weight: 600; text-align: left; }
.fold::before { content: "\25b8\a0"; }
[aria-expanded=true]::before { content: "\25be\a0"; }
.badge { padding: .05rem .6rem; border: 1px solid; border-radius: 1rem; }
.badge.on { color: var(--good); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .8rem;
  margin: .7rem 0; }
.big { font-size: 1.2rem; white-space: nowrap; font-variant-numeric: tabular-nums; }
svg { display: block; width: 100%; height: 2.2rem; margin: .1rem 0; color: var(--accent);
  border-bottom: 1px solid var(--line); }
svg :nth-child(n + 3) { color: var(--second); }
polyline { fill: none; stroke: currentColor; vector-effect: non-scaling-stroke; }
polygon { fill: currentColor; opacity: .13; }
table { width: 100%; border-collapse: collapse; font-size: .93rem; }
th, td { padding: .3rem .8rem .3rem 0; text-align: left; border-bottom: 1px solid var(--line); }
.scroll { max-height: 24rem; overflow: auto; }
thead th { position: sticky; top: 0; background: var(--card); }
td button { min-height: 1.8rem; margin-right: .3rem; }
.fields { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr));
  gap: .8rem 1.2rem; margin: .6rem 0; }
.fields label { display: block; font-weight: 600; }
.fields select, .fields input:not([type=checkbox]) { width: 100%; }
.fields small { display: block; }
[aria-invalid] { border: 2px solid var(--bad); }
dialog { max-width: 28rem; padding: 1.2rem; background: var(--card); color: var(--text);
  border: 1px solid var(--line); border-radius: 10px; }
dialog::backdrop { background: #0008; }
dialog .row { margin-top: 1rem; justify-content: flex-end; }
@media (max-width: 44rem) {
  body { padding: .6rem; }
  button, select, td button, input:not([type=radio], [type=checkbox]) { min-height: 2.6rem; }
  .tiles { grid-template-columns: 1fr 1fr; }
  .spread > :last-child { margin-left: 0; }
  table, tbody, tr, td, tbody th { display: block; border: 0; }
  thead { position: absolute; clip-path: inset(50%); }
  tr { padding: .5rem 0; border-bottom: 1px solid var(--line); }
  td, tbody th { display: flex; padding: .1rem 0; }
  td:empty { display: none; }
  td::before, tbody th::before { content: attr(data-head); flex: 0 0 6.5rem; font-weight: 400; }
}
</style>
<header>
  <h1>Vaurien</h1>
  <span class="soft" id="state" role="status">loading</span>
  <button id="heal" class="bad">Heal everything</button>
</header>
<noscript><p class="notice">This page needs JavaScript.</p></noscript>
<p id="alert" class="notice error" role="alert" hidden></p>
<form id="login" class="row" hidden>
  <label for="token">The token of this server (<code>--http-token</code>)</label>
  <input id="token" type="password" autocomplete="off" required>
  <button class="main">Use this token</button>
</form>
<main id="proxies"></main>
<dialog id="ask" aria-labelledby="question">
  <p id="question"></p>
  <div class="row"><button id="no">Cancel</button><button id="yes" class="main">Yes</button></div>
</dialog>
<script nonce="NONCE">
"use strict";
const SAMPLES = 60;             // points of a chart
const RECORDS = 200;            // the most rows in the table of fault records
const NEWEST = 100;             // the most rows in the table of connections
const PERIOD = 1;               // seconds from one poll to the next
const STATES = {on: "serves clients", refuse: "a new connect is refused",
                drop: "a new connect gets no reply", off: "closed: all connections have ended"};
const QUICK = {         // quick faults: {name of button and toxic: [handler, options, per]}
  slow: ["delay", {sleep: 1}, "request"], hang: ["hang", {}, "connection"],
  down: ["blackout", {}, "connection"], error: ["error", {}, "request"]};
const views = new Map();        // {name of a proxy: its article}
let declarations;               // the response of GET /declarations
let retry;                      // a function that ends the pause after a failed poll
let answer;                     // a function that takes the answer in the dialog: true is yes
let ids = 0;                    // number of ids that this script has made

// Texts

const number = (value, unit) => (value < 10 ? +value.toFixed(1) : Math.round(value)) + unit;

// Return a value with a unit. Each unit is a thousand times the unit before.
function scaled(value, ...units) {
  for (; value >= 1000 && units.length > 1; units.shift()) value /= 1000;
  return number(value, units[0]);
}
const count = value => scaled(value, "", "k", "M", "G");
const bytes = value => scaled(value, " B", " kB", " MB", " GB", " TB");
const upDown = (up, down) => `\u2191 ${bytes(up)} \u2193 ${bytes(down)}`;
const time = s => s < 1 ? number(1000 * s, " ms") : s < 100 ? number(s, " s") :
  s < 6000 ? number(s / 60, " min") : number(s / 3600, " h");
const clock = unix => new Date(1000 * unix).toTimeString().slice(0, 8);

// Return the settings of a rule as text, like "sleep=2 after=10": each option and rule field that
// differs from its default, and each number above 0 among the options.
function settings(rule) {
  // A fault record may be about `accept`, which is no handler. Its only option is `mode`.
  const {options} = declarations.handlers[rule.name] || {options: {mode: {}}};
  const isShown = ([name, value]) => {
    if (name in options)
      return value !== options[name].default || (value > 0 && value !== true);
    // Other columns of the table show percent and ttl.
    const field = declarations.fields[name];
    return field && !["percent", "ttl"].includes(name) && value !== field.default;
  };
  return Object.entries(rule).filter(isShown).map(([name, value]) =>
    `${name}=${value === true ? "yes" : value === false ? "no" : value}`).join(" ");
}

// Return how long a rule still acts or sleeps. Times are in seconds since 1970.
function timeLeft({active, until}, now) {
  if (until == null) return active === false ? "over" : "";
  const left = time(Math.max(0, until - now));
  return `${active ? "for" : "sleeps for"} ${left}, until ${clock(until)}`;
}

// Elements

// Return a new element. A value of `attributes` is a text, a boolean, or, for the name of an
// event, the function to call.
function el(tag, attributes = {}, ...children) {
  const space = /^(svg|poly)/.test(tag) ? "http://www.w3.org/2000/svg"
                                        : "http://www.w3.org/1999/xhtml";
  const element = document.createElementNS(space, tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (typeof value === "boolean") element.toggleAttribute(name, value);
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

const $ = id => document.getElementById(id);
// Change the text of an element. The same text is not set again, because a user may have
// selected it.
const put = (element, text) => element.textContent === text || (element.textContent = text);
const button = (text, click, more) => el("button", {type: "button", click, ...more}, text);
const choices = texts => texts.map(text => el("option", {}, text));

// Return an input with its label and help.
function labelled(text, input, help = "") {
  input.id = "input" + ++ids;
  input.setAttribute("aria-describedby", input.id + "help");
  return el("div", {}, el("label", {for: input.id}, text), input,
            el("small", {id: input.id + "help"}, help));
}

// Let `parent` have one child for each item, in the same order. key(item) identifies an item, and
// make(item) returns a new child. An item that already has a child keeps this child, because a
// new one would not have the focus.
function sync(parent, items, key, make) {
  const keys = items.map(key), wanted = new Set(keys);
  // Remove the children without an item, and all but the first child of an item.
  for (const child of [...parent.children]) if (!wanted.delete(child.key)) child.remove();
  const kept = new Map([...parent.children].map(child => [child.key, child]));
  items.forEach((item, index) => {
    const child = kept.get(keys[index]) || make(item);
    child.key = keys[index];
    if (parent.children[index] !== child) parent.insertBefore(child, parent.children[index]);
    child.show(item);
  });
}

// Return a table. Its method show(items) shows a row for each item. `columns` is {column head:
// a function that returns the text of an item}. buttons(item) returns the buttons of the last
// cell. key(item) identifies an item.
function table(caption, key, columns, buttons = () => []) {
  const heads = Object.keys(columns), cells = Object.values(columns);
  const body = el("tbody"), label = {"aria-label": caption};
  const head = el("tr", {}, ...heads.map(text => el("th", {scope: "col"}, text)));
  const element = el("div", {class: "scroll", tabindex: "0", role: "region", ...label},
                     el("table", label, el("thead", {}, head), body));
  function make(item) {
    const row = el("tr", {}, ...heads.map((text, index) => el(index ? "td" : "th", {
      "data-head": text, ...index ? {} : {scope: "row"}})));
    row.lastChild.append(...buttons(item));
    row.show = item => cells.forEach(
      (cell, index) => cell && put(row.children[index], cell(item)));
    return row;
  }
  element.show = items => sync(body, items, key, make);
  return element;
}

// Return an element with a title, a text, and a chart of the last SAMPLES values. unit(value)
// returns a value as text. `lines` are the names of the lines of the chart. The method `show`
// takes the text, a note below the chart, and a new value for each line.
function tile(title, unit, ...lines) {
  const shapes = lines.flatMap(() => [el("polygon"), el("polyline")]), samples = [];
  const chart = el("svg", {viewBox: `0 0 ${SAMPLES - 1} 20`, preserveAspectRatio: "none",
                           role: "img"}, ...shapes);
  const big = el("dd", {class: "big"}), note = el("dd", {class: "soft"});
  const element = el("div", {}, el("dt", {}, title), big, el("dd", {}, chart), note);
  element.show = (text, noteText, ...values) => {
    put(big, text);
    put(note, noteText);
    samples.push(values);
    samples.splice(0, samples.length - SAMPLES);    // a negative count removes nothing
    const most = Math.max(...samples.flat()), start = SAMPLES - samples.length;
    lines.forEach((_, line) => {
      const points = samples.map((sample, index) =>
        `${start + index},${19 - 18 * sample[line] / (most || 1)}`).join(" ");
      shapes[2 * line].setAttribute("points", `${start},20 ${points} ${SAMPLES - 1},20`);
      shapes[2 * line + 1].setAttribute("points", points);
    });
    chart.setAttribute("aria-label",
                       `${lines.join(", ")} in the last minute: ${unit(most)} at most`);
  };
  return element;
}

// Requests

// Send a request, and return the JSON value of the response. Throws an Error with the server's
// message and the HTTP status if the server refuses the request.
async function call(method, path, body) {
  const token = sessionStorage.getItem("token");
  const response = await fetch(path, {
    method, cache: "no-store", redirect: "error", body: body && JSON.stringify(body),
    headers: {"X-Fetch-Site": "same-origin", ...token && {Authorization: "Bearer " + token}}});
  const text = await response.text();
  if (response.ok) return text && JSON.parse(text);
  const value = text.startsWith("{") ? JSON.parse(text) : {error: text};
  const message = value.errors ? value.errors.map(error => error.description).join("; ")
                               : value.error.replace(/^bad request body: /, "");
  throw Object.assign(new Error(message), {status: response.status});
}

const query = name => "?proxy=" + encodeURIComponent(name);
const path = (...names) => "/proxies/" + names.map(encodeURIComponent).join("/");

// Change the rules of a behavior. change(rules, indices) changes the array `rules`. The handler
// dummy has no row in the table of rules, so `indices` maps the index of a row to its rule.
async function changeRules(name, change) {
  const {rules} = await call("GET", "/rules" + query(name));
  change(rules, rules.flatMap((rule, index) => rule.name === "dummy" ? [] : [index]));
  await call("PUT", "/rules" + query(name), {rules});
}

// Call `change`, which sends requests, and refresh the page at once. If there is a question, the
// user must confirm it first, with the button `verb`.
async function act(change, question, verb) {
  if (question) {
    put($("question"), question);
    put($("yes"), verb);
    $("ask").showModal();
    if (!await new Promise(done => answer = done)) return;
  }
  let message = "";
  try {
    await change();
    await refresh(0);
  } catch (error) {
    message = error.message;
  }
  put($("alert"), message);
  $("alert").hidden = !message;
}

const refreshNow = () => act(() => {});

// Return how a proxy accepts clients: {name: a name of STATES, active, until}. The server sends
// `accept` as a text, or as an object if it has times.
function stateOf({enabled, accept}) {
  const mode = accept.mode || accept, name = !enabled ? "off" : mode === "normal" ? "on" : mode;
  return {name, active: accept.active, until: accept.until};
}

// Each function from here to makeProxy returns an element that is a part of a proxy's article.
// The element's method show(status) shows the status of the proxy. Some elements need data that
// the status does not have: their method `fetch` requests these data and shows them.

function tileList() {
  const tiles = {
    open: tile("Connections", count, "connections"),
    requests: tile("Requests", count, "requests per second"),
    bytes: tile("Bytes per second", bytes, "bytes per second to the backend", "to the client"),
    faults: tile("Faults", count, "faults per second"),
    latency: tile("Time to the reply", time, "median", "95th percentile")};
  const element = el("dl", {class: "tiles"}, ...Object.values(tiles));
  element.show = ({open, counts, rates, latency: {p50, p95} = {}}) => {
    if (!("requests" in rates)) return;
    tiles.open.show(count(open), count(counts.connections) + " in all", open);
    for (const key of ["requests", "faults"])
      tiles[key].show(count(rates[key]) + "/s", count(counts[key]) + " in all", rates[key]);
    tiles.bytes.show(upDown(rates.bytes_up, rates.bytes_down),
                     upDown(counts.bytes_up, counts.bytes_down) + " in all",
                     rates.bytes_up, rates.bytes_down);
    tiles.latency.show(p50 == null ? "\u2013" : `${time(p50)}, ${time(p95)}`,
                       "median, 95th percentile", p50 || 0, p95 || 0);
  };
  return element;
}

// Return the list of the installed rules. If the proxy will change its state at a known time, the
// state is the first item.
function activeList() {
  const element = el("ul", {class: "row active", "aria-label": "active faults"});
  element.show = proxy => {
    const state = stateOf(proxy), shown = [...state.until ? [state] : [], ...proxy.installed];
    const item = rule => el("li", {}, el("b", {}, rule.toxic || rule.name), " ",
      ("percent" in rule ? `${rule.percent} % ` : "") + timeLeft(rule, proxy.time));
    element.replaceChildren(...shown.length ? shown.map(item) : [el("li", {}, "no fault")]);
  };
  return element;
}

function stateButtons(name) {
  const buttons = Object.keys(STATES).map(state => button(state, () => act(
    () => call("POST", path(name), state === "off" ? {enabled: false} : {
      enabled: true, accept: state === "on" ? "normal" : state}),
    state === "off" && `Turn ${name} off? All its connections are closed.`, "Turn off"),
    {title: STATES[state]}));
  const element = el("div", {class: "row", role: "group", "aria-label": "new clients"},
                     ...buttons);
  element.show = proxy => {
    for (const item of buttons)
      item.setAttribute("aria-pressed", item.textContent === stateOf(proxy).name);
  };
  return element;
}

// Return the table of the rules and toxics, with the form that changes them.
function faultTable(name) {
  const formPlace = el("div");
  let proxy;
  const edit = rule => formPlace.replaceChildren(
    faultForm(proxy, rule, () => formPlace.replaceChildren()));
  const rows = table("rules and toxics",
    rule => JSON.stringify([rule.toxic, rule.block, rule.index, rule.name]), {
      Fault: rule => rule.toxic || rule.name,
      Kind: rule => rule.block ? "block of a test" : rule.toxic ? "toxic: " + rule.name : "rule",
      Settings: settings, Percent: rule => rule.percent + " %",
      Time: rule => timeLeft(rule, proxy.time) || "until removed", Actions: null},
    rule => rule.block ? [] : [
      // `rule` may have older options: the button was made for an earlier status.
      button("Change", () => edit(proxy.installed.find(
        other => other.toxic === rule.toxic && other.index === rule.index))),
      button("Remove", () => act(() => rule.toxic
        ? call("DELETE", path(name, "toxics", rule.toxic))
        : changeRules(name, (rules, indices) => rules.splice(indices[rule.index], 1)),
        `Remove ${rule.toxic || rule.name} from ${name}?`, "Remove"), {class: "bad"})]);
  const element = el("div", {}, el("h3", {}, "Rules and toxics"), rows,
                     el("p", {}, button("Add a fault", () => edit())), formPlace);
  element.show = status => {
    proxy = status;
    let index = 0;                      // the position of a rule in the behavior
    for (const rule of proxy.installed) if (!rule.toxic && !rule.block) rule.index = index++;
    rows.show(proxy.installed);
  };
  return element;
}

function connectionList(name) {
  const rows = table("connections", item => item.number, {
    Number: item => String(item.number), Client: item => item.client,
    Backend: item => item.backend + (item.connected ? "" : " (waits)"),
    Age: item => time(item.age), Bytes: item => upDown(item.bytes_up, item.bytes_down),
    Held: item => bytes(item.held_up + item.held_down), Requests: item => count(item.requests),
    Faults: item => item.faults.slice(-3).join(", "), Actions: null},
    item => ["Close", "Reset"].map(verb => button(verb, () => act(
      () => call("DELETE", `/connections/${item.number}${query(name)}&reset=${
        verb === "Reset" ? "yes" : "no"}`),
      `${verb} connection ${item.number} of ${name}?`, verb), {class: "bad"})));
  const all = el("input", {type: "checkbox", change: refreshNow}), shown = el("span");
  const element = el("details", {toggle: refreshNow}, el("summary", {}, "Connections"),
    el("div", {class: "row soft"}, el("label", {}, all, "all"), shown), rows);
  element.fetch = async proxy => {
    if (!element.open) return;
    const {connections} = await call("GET", "/connections" + query(name)
                                            + (all.checked ? "" : "&newest=" + NEWEST));
    rows.show(connections.reverse());
    put(shown, `${connections.length} of ${proxy.open}, the newest first`);
  };
  return element;
}

function recordList(name) {
  let records = [];
  const rows = table("fault records", item => item.number, {
    Number: item => String(item.number), Time: item => clock(item.time),
    Fault: item => `${item.handler} ${item.change || ""}`,
    Options: item => settings({...item.options, name: item.handler}),
    Toxic: item => item.toxic || "", Connection: item => String(item.connection || ""),
    Request: item => String(item.request || ""), Text: item => item.text});
  const filter = el("input", {type: "search", input: show});
  const element = el("div", {}, el("h3", {}, "Fault records"),
    el("div", {class: "row"}, el("label", {}, "Filter ", filter)), rows);

  function show() {
    const text = filter.value.toLowerCase();
    rows.show(records.filter(item => JSON.stringify(item).toLowerCase().includes(text)));
  }

  element.fetch = async proxy => {
    const newest = () => records.length ? records[0].number : 0;
    // A new proxy has the name of a removed one. Its fault records begin with number 1 again.
    if (newest() > proxy.faults) records = [];
    const {events} = await call("GET", `/events${query(name)}&since=${
      Math.max(newest(), proxy.faults - RECORDS)}`);
    records = [...events.filter(item => item.number > newest()).reverse(), ...records]
      .slice(0, RECORDS);
    show();
  };
  return element;
}

// Return the article of a proxy.
function makeProxy({name, protocol}) {
  let proxy;                            // the newest status of the proxy
  const tiles = tileList(), active = activeList(), states = stateButtons(name);
  const faults = faultTable(name), connections = connectionList(name), records = recordList(name);
  const body = el("div", {id: "body" + ++ids, hidden: true},
    quickFaults(name, protocol, () => proxy), el("h3", {}, "New clients"), states, faults,
    connections, records);
  const fold = button(name, () => article.unfold(body.hidden), {
    class: "fold", "aria-expanded": "false", "aria-controls": body.id});
  const badge = el("span"), addresses = el("span", {class: "soft"});
  const article = el("article", {"aria-label": name},
    el("div", {class: "row spread"}, el("h2", {}, fold), badge, addresses), tiles, active, body);

  article.unfold = open => {
    fold.setAttribute("aria-expanded", open);
    body.hidden = !open;
    if (open) refreshNow();
  };
  article.show = status => {
    proxy = status;
    const state = stateOf(proxy).name;
    badge.className = "badge " + state;
    put(badge, state);
    put(addresses, `${proxy.listen} \u2192 ${proxy.backend} \u00b7 ${protocol}`);
    for (const part of [tiles, active, states, faults]) part.show(proxy);
  };
  article.fetch = async () => {
    if (body.hidden) return;
    await connections.fetch(proxy);
    await records.fetch(proxy);
  };
  views.set(name, article);
  return article;
}

// Return a button for each quick fault. The button adds a toxic with its own name. If this toxic
// exists, the button sets its options, and its ttl begins again. proxy() returns the newest
// status of the proxy.
function quickFaults(name, protocol, proxy) {
  const kinds = declarations.kinds[protocol] || [], group = "time" + ++ids;
  const times = [["for 30 s", 30], ["for 5 min", 300], ["until removed", 0]].map(
    ([text, value], index) => el("label", {}, el("input", {
      type: "radio", name: group, value, checked: !index}), text));
  const kind = el("select", {"aria-label": "kind of error", hidden: !kinds.length},
                  el("option", {value: ""}, "any kind"), ...choices(kinds));
  const ttl = () => +times.find(label => label.firstChild.checked).firstChild.value;
  const quick = text => act(() => {
    const [type, options, per] = QUICK[text];
    const attributes = {...options, ...text === "error" && kinds.length && {kind: kind.value}};
    const exists = proxy().installed.some(rule => rule.toxic === text && rule.name === type);
    return exists ? call("POST", path(name, "toxics", text), {attributes, ttl: ttl()})
      : call("POST", path(name, "toxics"),
             {name: text, type, attributes, per, stream: "both", ttl: ttl()});
  });
  return el("div", {}, el("h3", {}, "Quick faults"), el("div", {class: "row"},
    ...["slow", "hang", "down"].map(text => button(text, () => quick(text))),
    button("refuse", () => act(() => call("PUT", "/proxy" + query(name), {
      accept: {mode: "refuse", ttl: ttl()}}))),
    button("error", () => quick("error")), kind,
    el("div", {class: "row", role: "radiogroup", "aria-label": "time"}, ...times)));
}

// Return an element with an input for each declared option or rule field. Its attribute `byName`
// is {name: input}. Its method `read` returns {name: value}. `values` are the first values of
// the inputs, and `kinds` the suggestions for the option `kind`.
function inputs(declared, values, kinds) {
  const element = el("div", {class: "fields"}), byName = element.byName = {};
  for (const [name, {type, default: unset, help, choices: texts}] of Object.entries(declared)) {
    const input = byName[name] = texts.length ? el("select", {}, ...choices(texts)) : el("input",
      {type: {bool: "checkbox", int: "number", float: "number"}[type] || "text",
       step: type === "int" ? "1" : "any"});
    element.append(labelled(name, input, help));
    if (type === "bool") input.checked = values[name] ?? unset;
    else input.value = values[name] ?? unset ?? "";
    if (name === "kind" && kinds) {
      input.setAttribute("list", input.id + "kinds");
      element.append(el("datalist", {id: input.id + "kinds"}, ...choices(kinds)));
    }
  }
  element.read = () => Object.fromEntries(Object.entries(byName).map(([name, input]) => [name,
    input.type === "checkbox" ? input.checked : input.value === "" ? declared[name].default
      : input.type === "number" ? +input.value : input.value]));
  return element;
}

// Return a form that changes `rule`, or, without a rule, a form that adds a fault. close() removes
// the form.
function faultForm({name, protocol}, rule, close) {
  const {handlers, fields, kinds} = declarations;
  const type = el("select", {change: build}, ...choices(Object.keys(handlers)));
  const kind = el("select", {change: build}, ...choices(["toxic", "rule"]));
  const toxicName = el("input"), place = el("div");
  const failure = el("p", {class: "error", role: "alert"});
  const namePlace = labelled("Name", toxicName, "any name; default: the fault and its stream");
  const form = el("form", {submit}, el("h3", {}, rule ? "Change a fault" : "Add a fault"),
    el("div", {class: "fields", hidden: Boolean(rule)}, labelled("Fault", type),
       labelled("Add as", kind, "toxic: acts beside all other faults; rule: at most one rule acts "
                              + "on a request"), namePlace),
    place, failure, el("div", {class: "row"}, el("button", {class: "main"}, rule ? "Save" : "Add"),
                       button("Cancel", close)));
  let options, when;
  type.value = rule ? rule.name : "delay";
  kind.value = !rule || rule.toxic ? "toxic" : "rule";

  function build() {
    const isToxic = kind.value === "toxic", handler = handlers[type.value];
    namePlace.hidden = !isToxic;
    options = inputs(handler.options, rule || {}, kinds[protocol]);
    // The server can change only two rule fields of an existing toxic.
    const canSet = key => !(key in handler.options)
      && (!rule || !isToxic || ["percent", "ttl"].includes(key));
    const shown = Object.entries(fields).filter(([key]) => canSet(key))
      .map(([key, field]) => [key, {...field, type: "str"}]);       // a text, like 90s
    when = inputs(Object.fromEntries(shown), rule || {});
    place.replaceChildren(el("p", {}, handler.help), options, el("details", {open: Boolean(rule)},
      el("summary", {}, "When it acts"), when));
  }

  function save() {
    const attributes = options.read(), all = Object.entries(when.read());
    const chosen = Object.fromEntries(all.filter(([key, value]) => value !== null
      && (rule || value !== String(fields[key].default))));
    if (kind.value === "rule")
      return changeRules(name, (rules, indices) => rules.splice(
        rule ? indices[rule.index] : rules.length, 1,
        {name: type.value, ...attributes, ...chosen}));
    return rule ? call("POST", path(name, "toxics", rule.toxic), {attributes, ...chosen})
      : call("POST", path(name, "toxics"), {
        ...toxicName.value && {name: toxicName.value}, type: type.value, attributes,
        per: "request", stream: "both", ...chosen});
  }

  async function submit(event) {
    event.preventDefault();
    const all = {...when.byName, ...options.byName};
    Object.values(all).forEach(input => input.removeAttribute("aria-invalid"));
    try {
      await save();
      close();
      await refresh(0);
    } catch (error) {
      put(failure, error.message);
      for (const key of error.message.split("; ").map(text => text.split(" ")[0]))
        if (key in all) all[key].setAttribute("aria-invalid", "true");
    }
  }

  build();
  return form;
}

// Polling

// Request the status of all proxies, and show it. The server counts for this number of seconds to
// measure the rates. With 0, it responds at once, without rates.
async function refresh(seconds) {
  declarations = declarations || await call("GET", "/declarations");
  const {version, proxies} = await call("GET", "/status?seconds=" + seconds);
  const first = !views.size;
  sync($("proxies"), proxies, proxy => `${proxy.protocol} ${proxy.name}`, makeProxy);
  const names = proxies.map(proxy => proxy.name);
  [...views.keys()].filter(name => !names.includes(name)).forEach(name => views.delete(name));
  if (first && names.length === 1) views.get(names[0]).unfold(true);
  put($("state"), `${version} \u00b7 ` + (names.length ? `proxies: ${names.length}`
                                          : "no proxy yet: POST /proxies creates one"));
  $("state").className = "soft";
  $("login").hidden = true;
  await Promise.all([...views.values()].map(view => view.fetch()));
}

// Refresh the page again and again while it is visible. After a failed poll, wait for PERIOD. If
// the server needs a token, wait until the user enters it.
async function poll() {
  for (let seconds = 0; ; ) {
    try {
      while (document.hidden) await new Promise(
        done => document.addEventListener("visibilitychange", done, {once: true}));
      await refresh(seconds);
      seconds = PERIOD;
    } catch (error) {
      seconds = 0;
      const {status, message} = error, token = sessionStorage.getItem("token");
      put($("state"), status === 401 ? token ? "the server refuses this token" : "needs its token"
          : status ? message : "no reply: " + message);
      $("state").className = "error";
      $("login").hidden = status !== 401;
      await new Promise(done => {
        retry = done;
        if (status !== 401) setTimeout(done, 1000 * PERIOD);
      });
    }
  }
}

$("login").addEventListener("submit", event => {
  event.preventDefault();
  sessionStorage.setItem("token", $("token").value);
  $("token").value = "";
  retry();
});
$("heal").addEventListener("click", () => act(
  () => Promise.all([...views.keys()].map(name => call("POST", "/proxy/reset" + query(name)))),
  "Remove all rules and toxics of all proxies, and serve all clients?", "Heal everything"));
for (const id of ["yes", "no"]) $(id).addEventListener("click", () => {
  answer(id === "yes");
  $("ask").close();
});
$("ask").addEventListener("cancel", () => answer(false));       // Esc
poll();
</script>
"""


# -- Control ------------------------------------------------------------------
#
# The HTTP control server, with which tests change running proxies. handle_request has all steps
# between a request and its response.
#
# A dialect is a format of results and errors: the format of Vaurien or of Toxiproxy. Each route
# has a dialect.
#
# Threads: the control server's loop has a thread of its own. The loop accepts clients, and
# disconnects clients that exceed a time limit. Each client has a client thread, which reads the
# client's requests and calls the functions of routes. A route's function changes a proxy only by
# `proxy.loop.run_sync(function, ...)`: the loop of the proxies calls `function`.
#
# `GET /` lists each route with the first line of the docstring of the route's function.

ROUTES = OrderedDict()          # {path: {method: Route}}. A segment in capitals matches any text
DIALECTS = []                   # [(prefix of a path, Dialect)] for errors about unknown paths
REQUEST_BODY_MAX = 1 << 20      # bytes of a request's body
REQUEST_HEAD_MAX = 1 << 16      # bytes of a request's headers
INT_DIGITS_MAX = 400            # digits of an integer in a body; the largest float has 309
CLIENTS_MAX = 512               # clients connected at a time
KEEP_ALIVE_SHARE = 0.5          # while more than this share of `max_clients` is connected, each
                                #   response closes its connection
IDLE_TIMEOUT = 60.0             # seconds to wait for the next request, as in Toxiproxy
READ_TIMEOUT = 10.0             # seconds to wait for the next bytes of a request
REQUEST_TIMEOUT = 30.0          # seconds for a request and its response, see RequestHandler
EVENTS_WAIT_MAX = 20.0          # the longest wait of `GET /events`, less than REQUEST_TIMEOUT
MEASURE_MAX = 10.0              # seconds for which `GET /status` measures rates at most
NO_HEADERS = types.MappingProxyType({})
PAGE_HEADER = "X-Fetch-Site"    # the web page sends this header with the value "same-origin"

# DNS rebinding is an attack on this server: the host name of the attacker's page resolves to the
# address of this server. Therefore a browser lets the page send requests to this server. The Host
# header of the requests has the attacker's host name. Attackers from the Internet cannot register
# names in the following domains.
UNREBINDABLE = (".localhost",       # this machine (RFC 6761)
                ".local",           # names of multicast DNS (RFC 6762)
                ".internal",        # private networks (ICANN)
                ".test",            # tests (RFC 6761)
                ".home.arpa",       # home networks (RFC 8375)
                ".svc")             # services in Kubernetes

# The argument of a route's function.
#
# control    the Control that received the request.
# proxy      the ProxyServer that the path or ?proxy=NAME names, by default the first proxy, or
#            None if there is no such proxy.
# names      the variable parts of the path: {"PROXY": "redis"} for the route /proxies/PROXY and
#            the path /proxies/redis.
# query      {key: value} of the query, without the key `proxy`.
# body       the body as text.
# headers    {name: value}, or another object with the method `get`.
ApiRequest = namedtuple("ApiRequest", "control proxy names query body headers")
ApiResponse = namedtuple("ApiResponse", "status headers text")
# A function with @route, and the arguments of `route`.
Route = namedtuple("Route", "function example query needs_proxy dialect status")


class ApiError(Exception):
    """An error response.

    status      the HTTP status.
    location    the part of the request with the error: "body", "querystring", "header", "path"
                or "method"; "request" if the request breaks the rules of HTTP or exceeds a
                limit; "server" for an internal error.
    name        the field, parameter or header with the error, or "".
    headers     additional headers of the response.
    errors      [(location, name, description)]; several entries only for an InputError.
    """

    def __init__(self, status, location, name, description, headers=()):
        super().__init__(description)
        self.status, self.location, self.headers = status, location, dict(headers)
        self.errors = [(location, name, description)]


class Dialect:
    """A format of results and errors. The base class has the format of Vaurien 1.x."""

    head_as_get = True              # whether a route for GET also accepts HEAD
    on_invalid_utf8 = "strict"      # for a body: bytes.decode raises UnicodeDecodeError

    def render(self, result, status):
        """Return the ApiResponse for the result of a route: text, a JSON value, or None."""
        if isinstance(result, str):
            return ApiResponse(status, {"Content-Type": "text/plain; charset=utf-8"}, result)
        text = json.dumps({"status": "ok"} if result is None else result)
        return ApiResponse(status, {"Content-Type": "application/json"}, text)

    def to_api_error(self, exc):
        """Return the ApiError for an exception of a route's function, or None for a bug."""
        if isinstance(exc, ApiError):
            return exc
        if isinstance(exc, CannotListen):
            return ApiError(500, "server", "", exc.strerror)
        if isinstance(exc, InputError):
            error = ApiError(400, "body", "", str(exc))
            error.errors = [("body", field, sentence) for field, sentence in exc.errors]
            return error
        return None         # the exception is a bug

    def render_error(self, error):
        """Return the ApiResponse for an ApiError."""
        headers = dict(error.headers, **{"Content-Type": "application/json"})
        return ApiResponse(error.status, headers, json.dumps({"status": "error", "errors": [
            {"location": location, "name": name, "description": description}
            for location, name, description in error.errors]}))


VAURIEN_1 = Dialect()


def route(methods, paths, example="", query=(), needs_proxy=True, dialect=VAURIEN_1, status=200):
    """Return a decorator that registers a function for all these methods and paths.

    methods, paths    words in one text, with spaces between the words.
    example           an example of the query (GET) or of the body (other methods), for `GET /`.
    query             the keys that a query may have besides `proxy`. None accepts all keys.
    needs_proxy       True: a request is refused if its proxy does not exist.
    dialect           the Dialect of results and errors.
    status            the status of the response to a successful request.

    The function takes an ApiRequest, and returns an ApiResponse or an argument for Dialect.render.
    To refuse a request, the function raises ApiError or InputError.
    """
    def register(function):
        for path in paths.split():
            for method in methods.split():
                ROUTES.setdefault(path, OrderedDict())[method] = Route(
                    function, example, query, needs_proxy, dialect, status)
        return function
    return register


# From a request to its response

def handle_request(control, method, target, read_body, headers=NO_HEADERS):
    """Return the ApiResponse to a request.

    target       the path and the query.
    read_body    a function that returns the body as bytes, called only after the access check.

    Raises only ConnectionError. Each other exception becomes an error response.
    """
    without_fragment, _, _ = target.partition("#")
    path, _, query = without_fragment.partition("?")
    # A client that appends "/proxies" to "http://host/" requests "//proxies".
    path = re.sub("^//+", "/", path)
    routes, names, dialect = find_routes(path, control.dialect)
    try:
        is_page = path == "/" and method in ("GET", "HEAD") and accepts_html(headers)
        control.check_access(headers, is_page)
        body = read_body()      # also for an unknown path: an unread body ends the connection
        chosen_route = choose_route(routes, method, path, dialect)
        request = read_request(control, chosen_route, path, names, query, body, headers)
        result = chosen_route.function(request)
        if isinstance(result, ApiResponse):
            return result
        return dialect.render(result, chosen_route.status)
    except ConnectionError:
        raise
    except BaseException as exc:
        # BaseException, because a user's handler may raise SystemExit. Ctrl-C does not raise
        # KeyboardInterrupt: the signal handler only calls Loop.stop.
        return error_response(exc, dialect, method, target)


def error_response(exc, dialect, method, target):
    """Return the ApiResponse for an exception. Logs an unexpected exception."""
    error = dialect.to_api_error(exc)
    if error is None:
        log.exception("control: %r %r failed", method[:20], target[:200])
        error = ApiError(500, "server", "", format_exception(exc))
    return dialect.render_error(error)


def find_routes(path, default_dialect):
    """Return (routes, names, dialect) for a path.

    routes     {method: Route}, empty if the path is unknown.
    names      the result of match_segments.
    dialect    the Dialect of the routes. For an unknown path, the Dialect of its prefix in
               DIALECTS, and without such a prefix `default_dialect`.
    """
    segments = path.split("/")
    for pattern, routes in ROUTES.items():
        names = match_segments(pattern.split("/"), segments)
        if names is not None:
            any_route = next(iter(routes.values()))     # all routes of a path have one dialect
            return routes, names, any_route.dialect
    for prefix, dialect in DIALECTS:
        if path.startswith(prefix):
            return {}, {}, dialect
    return {}, {}, default_dialect


def match_segments(pattern, segments):
    """Return the names in a path, or None if the path does not match the path of a route.

    For example, ["", "proxies", "PROXY"] and ["", "proxies", "redis"] give {"PROXY": "redis"}.
    """
    if len(pattern) != len(segments):
        return None
    names = {}
    for expected, segment in zip(pattern, segments):
        if expected.isupper() and segment:      # a name is never empty
            names[expected] = urls.unquote(segment)
        elif segment != expected:
            return None
    return names


def choose_route(routes, method, path, dialect):
    """Return the Route for a method.

    Raises ApiError with status 404 if the path is unknown, or 405 if the path has no route for
    the method.
    """
    if not routes:
        raise ApiError(404, "path", "path", "there is no %s: there are %s"
                       % (path[:200], ", ".join(ROUTES)))
    route_method = "GET" if method == "HEAD" and dialect.head_as_get else method
    if route_method not in routes:
        allowed = ", ".join(sorted(routes))
        raise ApiError(405, "method", method[:20], "%s takes %s" % (path, allowed),
                       {"Allow": allowed})
    return routes[route_method]


def read_request(control, chosen_route, path, names, query_text, body, headers):
    """Return the ApiRequest for a Route. Raises ApiError."""
    try:
        text = body.decode("utf-8", chosen_route.dialect.on_invalid_utf8)
    except UnicodeDecodeError as error:
        raise ApiError(400, "body", "", "the body must be UTF-8: %s" % error) from None
    query = dict(urls.parse_qsl(query_text, keep_blank_values=True))
    first_proxy_name = next(iter(control.proxies), "")
    name_in_query = query.pop("proxy", first_proxy_name)
    proxy_name = names.get("PROXY", name_in_query)
    proxy = control.proxies.get(proxy_name)
    if proxy is None and chosen_route.needs_proxy:
        raise missing_proxy_error(control.proxies, proxy_name[:200], "PROXY" in names)
    accepted_keys = query if chosen_route.query is None else chosen_route.query
    unknown_keys = sorted(set(query) - set(accepted_keys))
    if unknown_keys:
        key = unknown_keys[0]
        raise ApiError(400, "querystring", key,
                       "%s does not know %r in a query" % (path, key[:200]))
    return ApiRequest(control, proxy, names, query, text, headers)


def missing_proxy_error(proxies, name, is_in_path):
    """Return the ApiError for the name of a proxy that does not exist."""
    status, location = (404, "path") if is_in_path else (400, "querystring")
    return ApiError(status, location, "proxy", "there is no proxy %r%s: there are %s" % (
        name, did_you_mean(name, proxies), ", ".join(proxies) or "none yet"))


def parse_json_object(body):
    """Parse a body, which must be a JSON object. Returns a dict. Raises InputError."""
    try:
        value = json.loads(body, parse_int=parse_short_int)
    except (ValueError, RecursionError) as error:
        raise InputError([("", "the body must be JSON: %s" % error)]) from None
    if not isinstance(value, dict):
        raise InputError([("", "the body must be a JSON object, like "
                               "{\"name\": \"delay\", \"sleep\": 2}")])
    return value


def parse_short_int(text):
    """Return int(text). Raises ValueError for more than INT_DIGITS_MAX digits.

    The time of int() grows with the square of the number of digits.
    """
    if len(text) > INT_DIGITS_MAX:
        raise ValueError("an integer may have %d digits at most, not %d"
                         % (INT_DIGITS_MAX, len(text)))
    return int(text)


# The routes of Vaurien

@route("GET", "/", needs_proxy=False)
def index(request):
    """List all routes, or return the web page if the client accepts text/html."""
    if accepts_html(request.headers):
        return page_response()
    lines = ["Vaurien %s control API, one example each." % __version__, ""]
    for path, routes in ROUTES.items():
        for method, listed_route in routes.items():
            lines.append("%-6s %-28s %s" % (method, path, summary(listed_route.function)))
            lines.append("     curl " + curl_arguments(
                request.control.url, method, path, listed_route.example))
    proxies = ", ".join("%s (%s)" % (proxy.name, proxy.describe_seed())
                        for proxy in request.control.proxies.values())
    lines += ["", "Handlers: %s." % ", ".join(HANDLERS),
              "Proxies: %s; ?proxy=NAME picks one, default: the first." % (proxies or "none yet")]
    return "\n".join(lines) + "\n"


def accepts_html(headers):
    """Return whether the client is a browser that loads a page. curl sends `Accept: */*`."""
    return "text/html" in headers.get("Accept", "").lower()


def page_response():
    """Return the ApiResponse with the web page."""
    nonce = os.urandom(16).hex()        # the browser runs only scripts and styles with this nonce
    return ApiResponse(200, {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": (
            "default-src 'none'; script-src 'nonce-{0}'; style-src 'nonce-{0}'; "
            "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
            "require-trusted-types-for 'script'; trusted-types 'none'".format(nonce)),
        "X-Frame-Options": "DENY", "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer", "Cross-Origin-Opener-Policy": "same-origin",
        "Cache-Control": "no-store", "Vary": "Accept"}, PAGE.replace("NONCE", nonce))


def curl_arguments(url, method, path, example):
    """Return the arguments of curl for the example of a Route."""
    if method == "GET":
        return url + path + example         # the example is a query
    data = "-d '%s' " % example if example else ""
    method_is_implied = method == "POST" and data       # by -d
    return "%s%s%s%s" % ("" if method_is_implied else "-X %s " % method, data, url, path)


@route("GET", "/handler")
def get_handler_name(request):
    """Return the name of the current handler, as text."""
    return request.proxy.handler_names()


@route("POST", "/handler", '{"name": "delay", "sleep": 2}')
def set_handler(request):
    """Set a handler: a bare name, or JSON with its options and percent."""
    text = request.body.strip()
    is_json = text.startswith(("{", "[", '"'))      # the error for a list or text is about JSON
    set_rules(request, [parse_json_object(text) if is_json else {"name": text}])
    return "ok"


@route("GET", "/handlers", needs_proxy=False)
def list_handlers(request):
    """Return the names of all handlers."""
    return {"handlers": list(HANDLERS)}


@route("GET", "/declarations", needs_proxy=False)
def list_declarations(request):
    """Return the declarations of handlers and rule fields, and each protocol's kinds of errors."""
    handlers = OrderedDict()
    for name, function in HANDLERS.items():
        helps, checks = option_help(function), getattr(function, "option_checks", {})
        options = OrderedDict(
            (option, declaration(default, helps.get(option, ""), checks.get(option)))
            for option, default in handler_options(function).items())
        handlers[name] = {"help": summary(function), "options": options}
    fields = OrderedDict((name, declaration(field.default, field.help, field.check))
                         for name, field in RULE_FIELDS.items())
    kinds = {name: list(protocol.errors) if protocol else []        # PROTOCOLS["tcp"] is None
             for name, protocol in PROTOCOLS.items()}
    return {"handlers": handlers, "fields": fields, "kinds": kinds}


def declaration(default, help_text, check):
    """Return the declaration of an option or a rule field as a JSON value."""
    type_ = str if default is None else type(default)
    return {"type": type_.__name__, "default": default, "help": help_text,
            "choices": list(getattr(check, "choices", ()))}


@route("GET", "/behavior")
def get_behavior(request):
    """Return the name of the current handler, as JSON."""
    return {"behavior": request.proxy.handler_names()}


@route("PUT", "/behavior", '{"name": "delay", "sleep": 2, "percent": 20}')
def set_behavior(request):
    """Set a handler: JSON with its name, options and percent."""
    set_rules(request, [parse_json_object(request.body)])


@route("GET", "/behaviors", needs_proxy=False)
def list_behaviors(request):
    """Return the names of all handlers."""
    return {"behaviors": list(HANDLERS)}


@route("GET", "/rules")
def get_rules(request):
    """Return the rules of the behavior with all options and fields, open blocks, and the seed."""
    proxy = request.proxy
    blocks = [{"block": number, "only": block.only, "rules": rules_to_json(proxy, block.rules)}
              for number, block in proxy.blocks.items()]
    return {"rules": rules_to_json(proxy, proxy.behavior), "seed": proxy.seed, "blocks": blocks}


def rules_to_json(proxy, rules):
    """Return the rules of a behavior or block in the form that `PUT /rules` accepts.

    A rule acts on draws from draw_min to draw_max. In `PUT /rules`, each range begins where the
    previous range ends. So a dummy rule stands for each gap between two rules.
    """
    rule_dicts, previous_max = [], 0.0
    for rule in rules:
        gap = rule.draw_min - previous_max
        if gap > 0:
            rule_dicts.append({"name": "dummy", "percent": gap})
        rule_dicts.append(dict(rule.to_json(), **rule.times_to_json(proxy.to_unix)))
        previous_max = rule.draw_max
    return rule_dicts


@route("PUT", "/rules",
       '{"rules": [{"name": "delay", "percent": 20}, {"name": "hang", "percent": 5}]}')
def put_rules(request):
    """Replace the rules of the behavior. At most one rule acts on a request."""
    body = parse_json_object(request.body)
    rule_dicts = body.get("rules")
    is_list = isinstance(rule_dicts, list) and all(isinstance(rule, dict) for rule in rule_dicts)
    # A client may send back the result of `GET /rules`. So the keys `seed` and `blocks`, and the
    # keys `active` and `until` of rules, are ignored.
    if not is_list or not set(body) <= {"rules", "seed", "blocks"}:
        raise InputError([("rules", "the body must be "
                                    "{\"rules\": [{\"name\": ..., \"percent\": ...}, ...]}")])
    set_rules(request, [without_moment(rule) for rule in rule_dicts])


def set_rules(request, rule_dicts):
    """Replace the behavior of the request's proxy by these rules. Raises InputError."""
    request.proxy.loop.run_sync(request.proxy.set_rules, read_rules(rule_dicts))


@route("POST", "/blocks", '{"name": "delay", "sleep": 2}', query=["only"], status=201)
def begin_block(request):
    """Begin a block with one rule; ?only=yes stops earlier blocks until this block ends."""
    rules = read_rules([parse_json_object(request.body)])
    only = check_query(request, "only", False, check_yes_no)
    return {"block": request.proxy.loop.run_sync(request.proxy.begin_block, rules, only)}


@route("DELETE", "/blocks/BLOCK")
def end_block(request):
    """End a block. The behavior acts again when no block is open."""
    number = check_part("path", "block", check_count, request.names["BLOCK"])
    request.proxy.loop.run_sync(request.proxy.end_block, number)


@route("GET", "/proxy")
def get_status(request):
    """Return the addresses and the state of a proxy."""
    return request.proxy.loop.run_sync(state_to_json, request.proxy)


def state_to_json(proxy):
    """Return the state of a proxy as a JSON value. Called in the loop's thread."""
    return OrderedDict([
        ("name", proxy.name), ("listen", proxy.listen), ("backend", format_address(proxy.backend)),
        ("enabled", proxy.enabled), ("accept", proxy.accept.to_json(proxy.to_unix)),
        ("max_connections", proxy.max_connections), ("reuse_port", proxy.reuse_port),
        ("rules", proxy.describe()), ("faults", proxy.fault_count)])


@route("GET", "/status", "?seconds=1", query=["seconds"], needs_proxy=False)
def measure_status(request):
    """Return state, counts, latency and rules of all proxies; ?seconds=N measures rates, too."""
    seconds = check_query(request, "seconds", 0, number_check(
        float, "0, or a number of seconds from 0.01 to %g" % MEASURE_MAX,
        lambda value: value == 0 or 0.01 <= value <= MEASURE_MAX))
    proxies = list(request.control.proxies.values())
    earlier = {}
    if seconds:
        earlier = {proxy: proxy.loop.run_sync(count_all, proxy) for proxy in proxies}
        time.sleep(seconds)
    try:
        return {"version": __version__, "proxies": [
            proxy.loop.run_sync(status_to_json, proxy, earlier.get(proxy)) for proxy in proxies
            if request.control.proxies.get(proxy.name) is proxy]}   # not removed meanwhile
    except RuntimeError:    # from run_sync: the proxies have stopped, so there is no response
        raise ConnectionAbortedError from None


def count_all(proxy):
    """Return (the time of the loop's clock, {name: count since the start of the proxy})."""
    byte_counts = proxy.byte_counts()
    return proxy.loop.clock(), OrderedDict([
        ("connections", proxy.accepted), ("requests", proxy.rules.request_count),
        ("faults", sum(proxy.faults.values())), ("failures", proxy.failures),
        ("bytes_up", byte_counts[UPSTREAM, "received"]),
        ("bytes_down", byte_counts[DOWNSTREAM, "received"])])


def status_to_json(proxy, earlier):
    """Return the state, the counts, the rates and the installed rules of a proxy as a JSON value.

    earlier    an earlier result of count_all, to compute rates. None leaves `rates` empty.
    """
    now, counts = count_all(proxy)
    rates = {}
    if earlier:
        earlier_time, earlier_counts = earlier
        rates = {name: round((counts[name] - count) / (now - earlier_time), 3)
                 for name, count in earlier_counts.items()}
    return OrderedDict(
        state_to_json(proxy), protocol=proxy.protocol_name(), time=round(time.time(), 3),
        open=len(proxy.connections), counts=counts, rates=rates,
        latency={name: round(seconds, 6) for name, seconds in
                 proxy.latencies.percentiles(now).items()},
        kinds=[{"handler": handler, "kind": kind, "count": count}
               for (handler, kind), count in sorted(proxy.kinds.items())],
        installed=[dict(rule.to_json(), block=rule.block, **rule.times_to_json(proxy.to_unix))
                   for rule in proxy.rules.installed])


@route("PUT", "/proxy", '{"accept": "refuse"}')
def put_status(request):
    """Change how new clients are accepted, or how many are served at a time."""
    changes = check_values(parse_json_object(request.body),
                           {"accept": check_accept, "max_connections": check_count})
    with request.proxy.lock:
        request.control.proxies.change(request.proxy, **changes)


def check_values(json_object, checks):
    """Return the checked values of a JSON object: {name: value}. Raises InputError.

    checks    {name: check} of all known names.
    """
    values, errors = {}, []
    for name in sorted(json_object):
        if name in checks:
            check_into(values, errors, name, checks[name], json_object[name])
        else:
            errors.append((name, "%s is not known here, only %s" % (name, ", ".join(checks))))
    if errors:
        raise InputError(errors)
    return values


@route("POST", "/proxy/reset")
def reset_proxy(request):
    """Enable a proxy, accept clients, and remove rules and toxics. Connections stay open."""
    with request.proxy.lock:
        request.control.proxies.reset(request.proxy)


@route("GET", "/ca.pem", needs_proxy=False)
def get_ca(request):
    """Return the certificate of the CA that tls-cert auto uses, as PEM text."""
    return AUTHORITY.pem()


@route("GET", "/backend")
def get_backend(request):
    """Return the backend of new connections."""
    return {"backend": format_address(request.proxy.backend)}


@route("PUT", "/backend", '{"backend": "localhost:80"}')
def set_backend(request):
    """Set the backend of new connections. Open connections keep their backend."""
    proxy, body = request.proxy, parse_json_object(request.body)
    body.setdefault("backend", "")      # a missing backend: parse_backend refuses ""
    values = check_values(body, {"backend": lambda value: parse_backend(str(value))})
    # proxy.set_backend raises ValueError for the proxy's own address. check_field adds "backend".
    check_field("backend", proxy.loop.run_sync, proxy.set_backend, values["backend"])


@route("GET", "/connections /proxies/PROXY/connections", "?newest=100", query=["newest"])
def list_connections(request):
    """Return the open connections with the bytes that each holds; ?newest=N: only the last N."""
    proxy = request.proxy
    numbers = proxy.loop.run_sync(list, proxy.connections)      # the lowest is the oldest
    newest = check_query(request, "newest", len(numbers), check_count)
    first_newest = max(0, len(numbers) - newest)
    connections = []
    # The loop forwards no data while it lists connections, so it lists 100 at a time (0.3 ms).
    for first in range(first_newest, len(numbers), 100):
        connections += proxy.loop.run_sync(proxy.list_connections, numbers[first:first + 100])
    return {"connections": connections}


@route("DELETE", "/connections/NUMBER /proxies/PROXY/connections/NUMBER", query=["reset"])
def close_connection(request):
    """Close a connection, or reset it with ?reset=yes."""
    number = check_part("path", "number", check_count, request.names["NUMBER"])
    reset = check_query(request, "reset", False, check_yes_no)
    if not request.proxy.loop.run_sync(request.proxy.close_connection, number, reset):
        raise ApiError(404, "path", "number", "there is no open connection %d" % number)


@route("GET", "/events /proxies/PROXY/events", "?since=0", query=["since", "handler", "wait"])
def list_events(request):
    """Return the fault records after number ?since=N; ?wait=SECONDS waits for the first.

    ?handler=NAME selects the faults of a handler, without records about its windows. Accept has
    no faults: ?handler=accept selects the records about its windows.
    """
    since = check_query(request, "since", 0, check_count)
    seconds = check_query(request, "wait", 0, number_check(
        float, "a number of seconds from 0 to %g" % EVENTS_WAIT_MAX,
        lambda value: 0 <= value <= EVENTS_WAIT_MAX))
    name = check_query(request, "handler", None, choice_check(*HANDLERS, Accept.name))

    def matches(record):
        is_fault = record.change is None
        return name is None or (record.handler == name and (is_fault or name == Accept.name))

    must_wait = seconds > 0
    wait_limit = request.control.wait_limit
    may_wait = must_wait and wait_limit.acquire(blocking=False)
    if must_wait and not may_wait:
        raise ApiError(503, "querystring", "wait", "too many clients wait: try again without wait")
    try:
        records = wait_for_records(request.proxy.next_records, since, matches, count=1,
                                   timeout=seconds)
    finally:
        if may_wait:
            wait_limit.release()
    return {"events": [record._asdict() for record in records]}


def check_query(request, name, default, check):
    """Return a checked value of the query, or the default for an absent key. Raises ApiError."""
    if name not in request.query:
        return default
    return check_part("querystring", name, check, request.query[name])


def check_part(location, name, check, value):
    """Return check(value). Raises ApiError with this location and name if the check fails."""
    try:
        return check(value)
    except ValueError as error:
        raise ApiError(400, location, name, "%s %s" % (name, error)) from None


@route("GET", "/changes /proxies/PROXY/changes")
def list_changes(request):
    """Return the seed, and the rules at the start and after each change, to repeat a run."""
    changes = request.proxy.loop.run_sync(lambda: list(request.proxy.rule_changes))
    return {"seed": request.proxy.seed, "changes": [change._asdict() for change in changes]}


# The server

class Control:
    """The control server.

    local      the (host, port) to listen on.
    proxies    the ProxyTable that the routes show and change.
    token      the bearer token that clients must send, or None if clients need no token.
    names      further host names of the server, for is_own_host.
    dialect    the Dialect of errors about unknown paths, except for paths in DIALECTS.
    """

    def __init__(self, local, proxies, token=None, names=(), dialect=VAURIEN_1):
        self.local, self.proxies, self.token, self.dialect = local, proxies, token, dialect
        local_host, _ = local           # may be "", which is no name
        self.names = set(map(normalize_host, [local_host, *names])) - {""}
        self.listener = None
        self.url = ""
        self.clients = OrderedDict()        # {socket: Session}, the least recently used first
        self.max_clients = CLIENTS_MAX
        # While many clients wait in list_events, half of the threads are free for other requests.
        self.wait_limit = threading.Semaphore(CLIENTS_MAX // 2)
        self.last_refusal_log = 0.0         # the time of the last log line about a refused request
        self.loop = None

    def bind(self):
        """Listen. Raises CannotListen."""
        with CannotListen.naming("--http-port"):
            self.listener = Listener(self.local, self.on_accept)
        host, _ = self.local
        _, port, *_ = self.listener.address()       # a free port if the port of `local` is 0
        self.url = "http://" + format_address(("localhost" if is_wildcard(host) else host, port))

    def open(self, proxies_loop):
        """Start to accept clients, in a new thread with a loop of its own.

        proxies_loop    the loop of the proxies. The control server responds even while the loop
                        of the proxies is busy, or has used up its file descriptors.
        """
        # A class statement would import http.server early, and slow down the start.
        self.request_handler_class = type(
            "HttpRequestHandler", (RequestHandler, http_server.BaseHTTPRequestHandler), {})
        fd_limit = raise_fd_limit() or 4 * CLIENTS_MAX      # 0: unknown, so assume enough
        quarter = fd_limit // 4         # the proxies need most of the file descriptors
        self.max_clients = max(4, min(CLIENTS_MAX, quarter))
        # The proxies leave the last file descriptors to the control server.
        proxies_loop.fd_limit = fd_limit - min(CONTROL_FDS, quarter)
        self.loop = Loop()
        self.listener.open(self.loop)
        self.thread = threading.Thread(target=self.loop.run, name="control", daemon=True)
        self.thread.start()
        log.info("control on %s", self.listener)
        if not self.token:
            self.warn_about_missing_token()

    def warn_about_missing_token(self):
        """Log a warning if clients on other machines can reach the server."""
        hosts = [sock.getsockname()[0] for sock in self.listener.sockets]
        if not all(map(is_loopback, hosts)):
            log.warning(
                "control: the control server on %s is open to everyone: a client that reaches it "
                "can create proxies to all addresses that this machine reaches, internal ones "
                "too; to require a token, set --http-token", self.listener)

    def close(self):
        """Close the server, even if `bind` or `open` has failed."""
        if self.loop:                   # None before `open`
            self.loop.stop()
            self.thread.join()          # the loop is not thread-safe: wait until it has ended
        if self.listener:
            self.listener.close()       # removes its sockets from the loop
        if self.loop:
            self.loop.close()

    # Access

    def check_access(self, headers, is_page):
        """Permit a request with these headers, or log and raise an ApiError.

        is_page    whether the request is for the web page. The page has no data, so the page
                   needs no token, and may be opened by a link on another site.
        """
        try:
            if not self.token:
                self.check_host(headers)
                self.check_origin(headers, is_page)
            elif not is_page:
                self.check_token(headers)       # enough, as no page of another site knows it
        except ApiError as error:
            now = time.monotonic()
            if now - self.last_refusal_log >= 1:        # log at most once a second
                self.last_refusal_log = now
                log.warning("control: request refused: %s", error)
            raise

    def check_token(self, headers):
        """Raise ApiError unless the client has sent the token."""
        scheme, _, token = headers.get("Authorization", "").partition(" ")
        # compare_digest, because the time of == shows how many of the first bytes are right.
        is_right = hmac.compare_digest(token.strip().encode("utf-8", "replace"),
                                       self.token.encode("utf-8"))
        if scheme.lower() != "bearer" or not is_right:
            raise ApiError(401, "header", "Authorization", "Authorization must be Bearer TOKEN, "
                           "where TOKEN is the value of --http-token",
                           {"WWW-Authenticate": "Bearer"})

    def check_host(self, headers):
        """Raise ApiError if a request may be a part of DNS rebinding: see UNREBINDABLE."""
        host = headers.get("Host", "localhost")     # browsers always send Host
        if not self.is_own_host(host):
            names = "".join(" (%s)" % name for name in sorted(self.names))
            raise ApiError(403, "header", "Host", "Host must be an address, a name without a dot, "
                           "a name under %s, or an --http-name%s, not %r"
                           % (", ".join(UNREBINDABLE), names, host[:200]))

    def check_origin(self, headers, is_page):
        """Raise ApiError if a page of another site has sent the request.

        Browsers send the site of the page in Origin (RFC 6454). Sec-Fetch-Site (Fetch Metadata) is
        "none" if the user has typed the address. Another site may link to the web page (is_page).
        """
        host = headers.get("Host", "localhost").lower()
        origin = headers.get("Origin")
        if origin is not None and origin.lower() not in ("http://" + host, "https://" + host):
            raise ApiError(403, "header", "Origin",
                           "cross-origin request from %r refused" % origin[:200])
        is_cross_site = headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin")
        if is_cross_site and not is_page:
            raise ApiError(403, "header", "Sec-Fetch-Site", "cross-site request refused")

    def is_own_host(self, host):
        """Return whether a Host header is one of `names`, or a host that no attacker can have.

        Attackers cannot register IP addresses, names without a dot, or names in UNREBINDABLE.
        """
        name = normalize_host(re.sub(r":\d*$", "", host.strip()))       # without the port
        is_without_dot = re.fullmatch(r"[a-z0-9_-]{1,63}", name)
        is_unrebindable = name.endswith(UNREBINDABLE) and is_valid_host(name)
        if name in self.names or is_without_dot or is_unrebindable:
            return True
        is_bracketed = name.startswith("[") and name.endswith("]")      # an IPv6 address
        address = name[1:-1] if is_bracketed else name
        may_be_address = re.fullmatch("[0-9a-f.:]{1,45}", address)
        return bool(may_be_address and resolve_numeric((address, 0)))   # [] if it is no address

    # Clients

    def on_accept(self, raw_socket, peer):
        """Start a client thread. If there are too many clients, first disconnect a client."""
        while len(self.clients) >= self.max_clients:
            self.disconnect_least_used()
        # The client thread needs methods of socket.socket that raw_socket lacks, like makefile.
        client = socket.socket(raw_socket.family, socket.SOCK_STREAM, 0, raw_socket.detach())
        client.settimeout(READ_TIMEOUT)
        session = self.clients[client] = Session(self, client)
        self.loop.run_in_thread(lambda: self.serve(session, peer),
                                on_done=lambda _, error: self.on_client_done(session, error))

    def disconnect_least_used(self):
        """Disconnect the client that has been idle longest.

        If each client has an open request, disconnect the client with the oldest request.
        """
        sessions = list(self.clients.values())      # the least recently used client first
        idle = [session for session in sessions if not session.timer]   # without an open request
        least_used = idle[0] if idle else sessions[0]
        del self.clients[least_used.client]
        least_used.disconnect()

    def serve(self, session, peer):
        """Respond to the requests of a client, and close the connection, in a client thread."""
        with session.client as client:
            self.request_handler_class(client, peer, session)   # __init__ handles all requests
            client.shutdown(socket.SHUT_WR)
            # Read until the client closes. A close with unread bytes would send RST, and the RST
            # could destroy the last response on its way to the client.
            session.set_deadline(LINGER_TIMEOUT)
            client.settimeout(1)        # for each recv
            for _ in range(1000):       # a limit, because a client may send without end
                if not client.recv(65536):
                    break

    def on_client_done(self, session, error):
        """Close the socket of a client after the end, or a failed start, of the client thread.

        error    the exception that ended the thread, or None.
        """
        self.clients.pop(session.client, None)
        self.loop.cancel(session.timer)
        session.client.close()
        if error and not isinstance(error, OSError):        # OSError: the network failed
            log.error("control: %s", format_exception(error))


class Session:
    """A client of the control server.

    timer    calls `disconnect` at the deadline of the client's request. None between requests.

    Only the loop's thread uses `timer`: client threads call set_deadline.
    """

    def __init__(self, control, client):
        self.control, self.client, self.timer = control, client, None

    def set_deadline(self, seconds):
        """Disconnect the client after `seconds`. None cancels an earlier deadline.

        Called in the client's thread, at the beginning and at the end of each request.
        """
        loop = self.control.loop
        t = None if seconds is None else loop.clock() + seconds
        loop.call_soon_threadsafe(self.apply_deadline, t)

    def apply_deadline(self, t):
        """In the loop's thread: set the timer to t or None. The client counts as used now."""
        loop = self.control.loop
        loop.cancel(self.timer)
        self.timer = None if t is None else loop.call_at(t, self.disconnect)
        if self.client in self.control.clients:     # disconnect_least_used may have removed it
            self.control.clients.move_to_end(self.client)

    def disconnect(self):
        """In the loop's thread: shut the connection down, which ends a waiting client thread."""
        with contextlib.suppress(OSError):
            self.client.shutdown(socket.SHUT_RDWR)


class LimitedReader:
    """A binary file whose readline returns at most `bytes_left` bytes in all, and then raises."""

    def __init__(self, file):
        self.file = file
        self.bytes_left = math.inf          # parse_request sets the limit

    def __getattr__(self, name):
        return getattr(self.file, name)

    def readline(self, size):
        line = self.file.readline(min(size, self.bytes_left + 1))   # + 1 detects a longer line
        self.bytes_left -= len(line)
        if self.bytes_left < 0:
            raise http_client.LineTooLong("head")       # http.server then sends status 431
        return line


class RequestHandler:
    """Reads the requests of one client and writes the responses, in the client's thread.

    A mixin for BaseHTTPRequestHandler. The attribute `server` is the Session.

    Time limits: IDLE_TIMEOUT for the first byte of a request, READ_TIMEOUT for each further read
    and write, and REQUEST_TIMEOUT from the first byte of a request to the end of its response.
    Without REQUEST_TIMEOUT, a client could keep its thread busy by sending a byte every 9 seconds.
    """

    protocol_version = "HTTP/1.1"
    server_version = "vaurien/" + __version__
    disable_nagle_algorithm = True
    wbufsize = -1                   # buffer: head and body of a response leave in one segment
    command = requestline = ""      # send_error reads these names even before the first request
    server: Session
    rfile: LimitedReader

    def __getattr__(self, name):
        """Return `respond` for do_GET, do_PUT and so on, the methods that http.server calls."""
        if name.startswith("do_"):
            return self.respond
        raise AttributeError(name)

    def setup(self):
        super().setup()  # type: ignore
        self.rfile = LimitedReader(self.rfile)

    def finish(self):
        try:
            super().finish()  # type: ignore
        finally:
            self.rfile.close()      # if the last flush fails, super().finish() leaves rfile open

    def handle(self):
        """Respond to all requests of the client."""
        self.close_connection = False
        has_request = self.wait_for_request()
        if not has_request:
            self.send_error(408, "no request within %g seconds" % IDLE_TIMEOUT)
        while has_request:
            self.server.set_deadline(REQUEST_TIMEOUT)
            self.handle_one_request()
            self.server.set_deadline(None)
            has_request = not self.close_connection and self.wait_for_request()

    def wait_for_request(self):
        """Wait for the first byte of a request, or for EOF. Returns False after IDLE_TIMEOUT."""
        self.connection.settimeout(IDLE_TIMEOUT)
        try:
            self.rfile.peek(1)
        except socket.timeout:
            return False
        self.connection.settimeout(READ_TIMEOUT)
        return True

    def parse_request(self):
        """Parse a head of REQUEST_HEAD_MAX bytes at most. Returns whether the head is valid."""
        self.rfile.bytes_left = REQUEST_HEAD_MAX
        valid = super().parse_request()  # type: ignore
        self.rfile.bytes_left = math.inf
        return valid

    def respond(self):
        """Send the response to one request."""
        control = self.server.control
        self.body_read = False          # until read_body has returned
        response = handle_request(control, self.command, self.path, self.read_body, self.headers)
        is_crowded = len(control.clients) > KEEP_ALIVE_SHARE * control.max_clients
        others_need_room = is_crowded or Loop.fds_exhausted
        # An unread body must not be parsed as the next request.
        if others_need_room or not self.body_read:
            self.close_connection = True
        self.send_api_response(response)

    def read_body(self):
        """Return the body. Raises ApiError, or ConnectionError if the client disconnects."""
        is_chunked = self.headers.get("Transfer-Encoding", "").lower() == "chunked"
        try:
            body = self.read_chunked_body() if is_chunked else self.read_plain_body()
            self.body_read = True
            return body
        except socket.timeout:
            raise http_error(408, "the body did not arrive in time") from None
        except OSError as error:
            raise ConnectionAbortedError(str(error)) from None

    def read_plain_body(self):
        """Return a body of Content-Length bytes. Raises ApiError or OSError."""
        if self.headers.get("Transfer-Encoding"):       # but not "chunked", see read_body
            raise http_error(411, "a body needs Content-Length or Transfer-Encoding: chunked")
        if self.headers.get("Content-Encoding", "identity") != "identity":
            raise http_error(415, "a body must not have a Content-Encoding")
        length_text = self.headers.get("Content-Length", "0")
        if not re.fullmatch("[0-9]{1,18}", length_text):
            raise http_error(400, "Content-Length must be a number")
        length = int(length_text)
        if length > REQUEST_BODY_MAX:
            raise http_error(413, "a body may have %d bytes at most" % REQUEST_BODY_MAX)
        self.wfile.flush()      # sends "100 Continue" to a client that waits
        body = self.rfile.read(length)
        if len(body) < length:
            raise ConnectionAbortedError("the client has closed within a request")
        return body

    def read_chunked_body(self):
        """Return a body in HTTP chunks (RFC 9112, 7.1). Raises ApiError or OSError."""
        self.wfile.flush()      # sends "100 Continue" to a client that waits
        body = bytearray()
        while True:
            size_text, _, _ = self.rfile.readline(100).partition(b";")      # ignore extensions
            if not re.fullmatch(b"[0-9A-Fa-f]{1,8}", size_text.strip()):
                raise http_error(400, "a chunk must begin with its length")
            size = int(size_text, 16)
            if not size:                        # the last chunk
                break
            if len(body) + size > REQUEST_BODY_MAX:
                raise http_error(413, "a body may have %d bytes at most" % REQUEST_BODY_MAX)
            body += self.rfile.read(size)
            if self.rfile.read(2) != b"\r\n":
                raise http_error(400, "a chunk must have as many bytes as its length says")
        while self.rfile.readline(1000).strip():        # ignore trailers
            pass
        return body

    def send_api_response(self, response):
        """Write an ApiResponse to the client."""
        data = response.text.encode("utf-8")
        self.send_response(response.status)
        for name, value in response.headers.items():
            self.send_header(name, value)
        self.send_header("X-Toxiproxy-Request-Id", os.urandom(10).hex())    # as in Toxiproxy
        if response.status != 204:      # a response with status 204 has no body
            self.send_header("Content-Length", str(len(data)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def send_error(self, code, message=None, explain=None):
        """Send an error response to a request that http.server or `handle` could not read."""
        self.close_connection = True
        self.request_version = self.protocol_version    # not HTTP/0.9, which has no headers
        self.send_api_response(VAURIEN_1.render_error(http_error(code, message or explain or "")))
        self.wfile.flush()

    def log_message(self, message, *args):
        log.debug("control: %s: %s", self.client_address[0], message % args)


def http_error(status, description):
    """Return an ApiError for a request that breaks the rules of HTTP or exceeds a limit."""
    return ApiError(status, "request", "", description)


# -- Toxiproxy ----------------------------------------------------------------
#
# The API of Toxiproxy 2.12: named proxies, and toxics on these proxies. A toxic is a rule with a
# name. The type of a toxic is the name of a handler. Errors have the texts of Toxiproxy's server.
# Bodies follow the rules of Go's JSON decoder:
#
#   * Keys may be in upper or lower case.
#   * Unknown keys are ignored.
#   * A key with the value null counts as absent.
#   * A value of a wrong type is an error.
#
# The functions that read bodies raise InputError or ApiError. The response for an InputError has
# status 400 and a text that begins with "bad request body".
#
# Threads: during a request that changes a proxy, the client thread holds the proxy's lock.
# Therefore two requests never change a proxy at the same time.
#
# Listings: typed clients (Java, .NET, Rust ...) fail if a listing has a toxic that Toxiproxy
# lacks (see exists_in_toxiproxy). These toxics are Vaurien's own toxics:
#
#   * The JSON object of a proxy has Vaurien's own toxics under the key `rules`.
#   * GET /proxies/PROXY/toxics does not list Vaurien's own toxics.
#   * A request with ?all=1 in its query lists all toxics together, without the key `rules`.
#   * PUT /proxies/PROXY/toxics and requests about one toxic return all toxics.
#
# A client may send the JSON object of a proxy back: requests that create a proxy accept `rules`.
#
# A new rule field needs no change in this section.

# An error of Go's JSON decoder, with Go's names of the received and the expected type. Example:
# "json: cannot unmarshal string into Go struct field Proxy.enabled of type bool"
GO_TYPE_ERROR = "json: cannot unmarshal %s into Go %s of type %s"
JSON_TYPES = {str: "string", bool: "bool", int: "number", float: "number", list: "array",
              dict: "object", type(None): "null"}       # names of received types
GO_TYPES = {str: "string", bool: "bool", int: "int64", float: "float64", list: "[]", dict: "{}"}
# The lowest and the highest number that Go accepts.
GO_RANGES = {int: (-INT64_MAX - 1, INT64_MAX), float: (-sys.float_info.max, sys.float_info.max)}
# The names of Go's types for readers who do not know Go.
PLAIN_TYPES = {"string": "text", "bool": "true or false", "int64": "a whole number",
               "float64": "a number", "[]": "a list", "{}": "an object",
               "[]toxiproxy.Proxy": "a list of proxies", "toxiproxy.Proxy": "an object",
               "toxics.ToxicWrapper": "an object", "attributes": "an object"}
# The types of Toxiproxy's toxics, with their attributes.
TOXIPROXY_TYPES = {
    "noop": (), "latency": ("latency", "jitter"), "bandwidth": ("rate",),
    "slicer": ("average_size", "size_variation", "delay"), "slow_close": ("delay",),
    "timeout": ("timeout",), "reset_peer": ("timeout",), "limit_data": ("bytes",),
    "packet_loss": ("loss_rate", "correlation")}
UNRELEASED_TYPES = {"packet_loss"}      # on Toxiproxy's main branch, but unknown to clients
# The fields of a proxy, with their types. None: several types are valid, see PROXY_CHECKS.
PROXY_FIELDS = OrderedDict((("name", str), ("listen", str), ("upstream", str),
                            ("enabled", bool), ("toxics", list), ("rules", list),
                            ("protocol", str), ("accept", None), ("max_connections", int),
                            ("tls", dict)))
# The checks of ProxyServer's arguments: {name: check}. A user of the class Proxy can set all
# arguments. A client of Toxiproxy's API can set only the arguments in PROXY_FIELDS.
PROXY_CHECKS = OrderedDict((
    ("timeout", check_timeout), ("protocol", check_protocol),
    ("overwrite_host_header", check_yes_no), ("enabled", check_yes_no), ("accept", check_accept),
    ("max_connections", check_count), ("tls", check_tls)))
PROXY_KEYS = [*PROXY_FIELDS, "logger"]      # known keys; Toxiproxy's listings have Logger
TOXIC_FIELDS = OrderedDict((("name", str), ("type", str), ("stream", str), ("toxicity", float),
                            ("attributes", dict)))
TOXIC_KEYS = OrderedDict.fromkeys([*TOXIC_FIELDS, *RULE_FIELDS])


class ToxiproxyDialect(Dialect):
    """Compact JSON, and errors as {"error": ..., "status": ...} with the type text/plain."""

    head_as_get = False
    on_invalid_utf8 = "replace"     # bytes.decode replaces invalid bytes
    # {ApiError.location: body}. Toxiproxy sends no JSON for an unknown path or method.
    router_texts = {"path": "404 page not found\n", "method": ""}

    def render(self, result, status):
        """Return the ApiResponse for a result. None gives a response with status 204."""
        if result is None:
            return ApiResponse(204, {}, "")
        return ApiResponse(status, {"Content-Type": "application/json"}, dump_json(result))

    def to_api_error(self, exc):
        if isinstance(exc, CannotListen):
            reason = exc.reason.lower()     # Go's texts for errno are in lower case
            return toxiproxy_error(500, "listen tcp %s: bind: %s" % (exc.address, reason))
        if isinstance(exc, InputError):
            return toxiproxy_error(400, "bad request body: %s" % exc)
        return super().to_api_error(exc)

    def render_error(self, error):
        if error.location in self.router_texts:
            return text_response(error.status, self.router_texts[error.location])
        return text_response(error.status, dump_json(error_to_json(error)) + "\n", error.headers)


TOXIPROXY = ToxiproxyDialect()
DIALECTS.append(("/proxies/", TOXIPROXY))


def toxiproxy_error(status, message):
    """Return an ApiError as in Toxiproxy: with only a status and a message."""
    return ApiError(status, "", "", message)


def error_to_json(error):
    """Return the JSON value that Toxiproxy sends for an ApiError."""
    return OrderedDict((("error", str(error)), ("status", error.status)))


def text_response(status, text, headers=NO_HEADERS):
    """Return an ApiResponse with the headers of the function http.Error in Go, and `headers`."""
    return ApiResponse(status, {"Content-Type": "text/plain; charset=utf-8",
                                "X-Content-Type-Options": "nosniff", **headers}, text)


def dump_json(value):
    """Return a value as JSON without spaces, as Go's encoder does."""
    return json.dumps(value, separators=(",", ":"))


def toxiproxy_route(methods, path, example="", status=200):
    """Return a decorator that registers a function for these methods of a path.

    The function takes the ApiRequest, and the ProxyServer and the Toxic that the path names. The
    function returns a JSON value, None for status 204, or an ApiResponse.
    """
    def register(function):
        call = functools.partial(call_route_function, function, needs_lock=methods != "GET")
        functools.update_wrapper(call, function)        # for the docstring
        # query=None accepts all keys, as Toxiproxy does. needs_proxy=False lets find_path_objects
        # raise Toxiproxy's error if the proxy does not exist.
        route(methods, path, example, query=None, needs_proxy=False, dialect=TOXIPROXY,
              status=status)(call)
        return function
    return register


def call_route_function(function, request, needs_lock):
    """Return the result of a route's function, or refuse a browser that shows another site's page.

    needs_lock    True: hold the lock of the path's proxy during the call.
    """
    is_browser = request.headers.get("User-Agent", "").startswith("Mozilla/")
    if is_browser and not is_from_own_page(request.headers):
        # Toxiproxy's server sends this response to all browsers.
        return text_response(403, "User agent not allowed\n")
    proxy = request.proxy if "PROXY" in request.names else None
    no_lock = contextlib.ExitStack()
    with proxy.lock if proxy and needs_lock else no_lock:
        return function(request, *find_path_objects(request))


def is_from_own_page(headers):
    """Return whether a browser's request comes from the page of the control server itself.

    A request that a page of another site sends has "same-origin" in neither header:

    Sec-Fetch-Site    Browsers set this header themselves, but only for https and for localhost.
    PAGE_HEADER       Only the control server's page sets this header. The browser asks for
                      permission (CORS) before a page of another site may set the header, and the
                      control server refuses.
    """
    return "same-origin" in (headers.get("Sec-Fetch-Site"), headers.get(PAGE_HEADER))


def find_path_objects(request):
    """Return the objects that the path names: [], [ProxyServer] or [ProxyServer, Toxic].

    Raises ApiError.
    """
    if "PROXY" not in request.names:
        return []
    proxy = request.proxy
    # While the client thread waited for the lock, another request may have removed the proxy.
    if proxy is None or request.control.proxies.get(proxy.name) is not proxy:
        raise toxiproxy_error(404, "proxy not found")
    if "TOXIC" not in request.names:
        return [proxy]
    for toxic in proxy.toxics:
        if toxic.name == request.names["TOXIC"]:
            return [proxy, toxic]
    raise toxiproxy_error(404, "toxic not found")


# Reading

def bad_body(text):
    """Return an InputError that names no field."""
    return InputError([("", text)])


@contextlib.contextmanager
def error_suffix(suffix):
    """Append a suffix to the text of an InputError or ApiError that the `with` block raises."""
    try:
        yield
    except InputError as error:
        raise bad_body("%s%s" % (error, suffix)) from None
    except ApiError as error:
        raise toxiproxy_error(error.status, "%s%s" % (error, suffix)) from None


def read_json(text, ignore_rest=True):
    """Return the JSON value at the beginning of a text. Raises InputError.

    ignore_rest    True: ignore text after the value, as Go does. False: refuse such text.
    """
    def refuse_constant(name):
        raise ValueError("invalid number %s" % name)        # NaN or Infinity
    text = text.lstrip(" \t\r\n")
    if not text:
        raise bad_body("EOF")
    decoder = json.JSONDecoder(parse_int=parse_short_int, parse_constant=refuse_constant)
    try:
        if not ignore_rest:
            return decoder.decode(text)
        value, _ = decoder.raw_decode(text)
        return value
    except json.JSONDecodeError as error:
        is_cut_off = (error.pos >= len(text.rstrip())           # the error is at the end
                      or error.msg.startswith("Unterminated string"))   # no closing quote
        raise bad_body("unexpected EOF" if is_cut_off else "invalid JSON: %s" % error) from None
    except RecursionError:
        raise bad_body("nested too deeply") from None
    except ValueError as error:     # from refuse_constant or parse_short_int
        raise bad_body(str(error)) from None


def read_value(value, type_, field_path):
    """Return a JSON value, which must have the expected type.

    type_         the expected type. If a float is expected, an int is converted to float.
    field_path    Go's name of the struct and the field, for the error: "Proxy.enabled".

    Raises InputError if the value has another type, or is a number outside of Go's range.
    """
    if is_valid_in_go(value, type_):
        return type_(value)
    received = JSON_TYPES[type(value)]
    if received == "number" and type_ in GO_RANGES:
        received = "number %s" % str(value)[:50]
    raise bad_body(GO_TYPE_ERROR % (received, "struct field " + field_path, GO_TYPES[type_]))


def is_valid_in_go(value, type_):
    """Return whether Go's decoder accepts a JSON value where `type_` is expected."""
    is_int_for_float = type_ is float and type(value) is int
    if type(value) is not type_ and not is_int_for_float:       # not isinstance: True is no int
        return False
    if type_ not in GO_RANGES:
        return True
    lowest, highest = GO_RANGES[type_]
    return lowest <= value <= highest


def read_object(value, struct, known=None):
    """Return a JSON object as a dict, without the keys whose value is null.

    value     the JSON object. null counts as {}.
    struct    Go's name of the object's type, for the error.
    known     the keys to return, in upper or lower case; without `known`, all keys as written.

    Raises InputError if the value is not an object.
    """
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise bad_body(GO_TYPE_ERROR % (JSON_TYPES[type(value)], "value", struct))
    fields = {key: item for key, item in value.items() if item is not None}
    if known is None:
        return fields
    known_by_lower_case = {key.lower(): key for key in known}
    return {known_by_lower_case[key.lower()]: item for key, item in fields.items()
            if key.lower() in known_by_lower_case}


def read_fields(json_object, types, struct):
    """Return {key: result of read_value} for the keys of a JSON object. Raises InputError.

    types     {key: expected type}. A key that is absent from `types` may have any value.
    struct    Go's name of the object's type, for the error.
    """
    fields = {}
    for key, value in json_object.items():
        type_ = types.get(key)
        fields[key] = read_value(value, type_, "%s.%s" % (struct, key)) if type_ else value
    return fields


def read_proxy_fields(value):
    """Return the known fields of a JSON object for a proxy: {name: value}. Raises InputError."""
    json_object = read_object(value, "toxiproxy.Proxy", PROXY_FIELDS)
    fields = read_fields(json_object, PROXY_FIELDS, "Proxy")
    if fields.get("listen") == "":      # means all addresses and a free port, as in Go
        fields["listen"] = ":0"
    return fields


def read_proxies(text, proxies):
    """Read a JSON array of proxies. Raises InputError or ApiError.

    Returns [(ProxyServer, result of read_proxy_fields, JSON object)]. No proxy is open yet.
    """
    values = read_json(text)
    values = [] if values is None else values
    if not isinstance(values, list):
        raise bad_body(GO_TYPE_ERROR % (JSON_TYPES[type(values)], "value", "[]toxiproxy.Proxy"))
    # As in Go's decoder, errors in types are reported before errors in values.
    all_fields = [read_proxy_fields(value) for value in values]
    new_proxies, names = [], set()
    for index, fields in enumerate(all_fields, 1):
        with error_suffix(" at proxy %d" % index):
            new_proxies.append(make_proxy(fields, proxies))
    for index, proxy in enumerate(new_proxies, 1):
        if proxy.name in names:
            raise bad_body("duplicate proxy name %r at proxy %d" % (proxy.name, index))
        names.add(proxy.name)
    return list(zip(new_proxies, all_fields, values))


def check_proxy_fields(fields):
    """Return the checked values of the fields in PROXY_CHECKS, if present. Raises InputError."""
    return {name: check_field(name, check, fields[name])
            for name, check in PROXY_CHECKS.items() if name in fields}


def make_proxy(fields, proxies):
    """Return a new ProxyServer, which is not open yet. Raises InputError or ApiError.

    fields     the result of read_proxy_fields.
    proxies    the ProxyTable, for its shared settings.
    """
    for name in "name", "upstream":
        if not fields.get(name):
            raise toxiproxy_error(400, "missing required field: %s" % name)
    check_field("name", check_name, fields["name"])
    toxics = []     # a listing has toxics that Toxiproxy lacks under the key `rules`
    for index, value in enumerate([*fields.get("toxics", ()), *fields.get("rules", ())], 1):
        with error_suffix(" (toxic %d of proxy %s)" % (index, fields["name"])):
            toxics.append(read_toxic(value))
    check_unique_names(toxics)
    local = read_listen(fields.get("listen", ":0"), "listen tcp: ")
    backend = check_field("upstream", parse_upstream, fields["upstream"])
    check_field("upstream", check_backend, backend, [local])
    return ProxyServer(backend, local, name=fields["name"], toxics=toxics, **proxies.shared,
                       **check_proxy_fields(fields))


def check_unique_names(toxics):
    """Raise ApiError if two toxics have the same name."""
    if len({toxic.name for toxic in toxics}) < len(toxics):
        raise toxiproxy_error(409, "toxic already exists")


def parse_upstream(text):
    """Parse the address of a backend. Returns (host, port). Raises ValueError.

    The port is a number, the name of a service like "http", or "" if the text has no port.
    Toxiproxy checks the port only when a client connects.
    """
    try:
        return parse_backend(text)
    except ValueError:
        host, _, port = text.partition(":")
        is_service_or_missing = re.fullmatch("([A-Za-z][A-Za-z0-9-]*)?", port)
        if host and is_valid_host(host) and is_service_or_missing:
            return host, port
        raise


def read_listen(text, prefix=""):
    """Return the (host, port) of an address to listen on.

    text      "HOST:PORT" or "HOST:SERVICE", like "localhost:http".
    prefix    the beginning of the text of an ApiError.

    Raises ApiError for an error that Go's net package knows, and InputError for other errors.
    """
    host, colon, port = text.rpartition(":")
    is_service = colon and re.fullmatch("[A-Za-z][A-Za-z0-9-]*", port)
    if is_service:
        try:
            text = "%s:%d" % (host, socket.getservbyname(port, "tcp"))
        except OSError:
            raise toxiproxy_error(500, "%slookup tcp/%s: unknown port" % (prefix, port)) from None
    try:
        return parse_listener(text)
    except ValueError as error:
        if not colon:
            raise toxiproxy_error(500, "%saddress %s: missing port in address"
                                  % (prefix, text)) from None
        is_host_valid = ":" not in host and is_valid_host(host)
        is_port_too_high = re.fullmatch(r"\d{5,}", port)    # parse_listener accepts up to 65535
        if is_host_valid and is_port_too_high:
            raise toxiproxy_error(500, "%saddress %s: invalid port" % (prefix, port)) from None
        raise InputError([("listen", "listen %s" % error)]) from None


def read_toxic_object(value, known):
    """Call read_object for the JSON object of a toxic, and return the result. Raises InputError.

    known    the keys to return; without `known`, all keys.
    """
    if isinstance(value, dict):
        value = without_moment(value)       # the value may come from a listing
    json_object = read_object(value, "toxics.ToxicWrapper", known)
    if json_object.get("attributes") == []:     # PHP encodes an empty array like this
        json_object["attributes"] = {}
    return json_object


def read_toxic(value, strict=False):
    """Return the Toxic that a JSON object describes. Raises InputError or ApiError.

    strict    True: refuse three kinds of input that Toxiproxy accepts: unknown keys, a toxicity
              that is not from 0 to 1, and negative numbers.
    """
    json_object = read_toxic_object(value, None if strict else TOXIC_KEYS)
    fields = read_fields(json_object, TOXIC_FIELDS, "ToxicWrapper")
    type_ = fields.pop("type", "")
    stream = fields.pop("stream", DOWNSTREAM if type_ in TOXIPROXY_TYPES else "both")
    if stream.lower() not in ("both", UPSTREAM, DOWNSTREAM):
        raise toxiproxy_error(400, "stream was invalid, can be either upstream or downstream")
    if type_ not in HANDLERS:
        details = ": " + unknown_handler(type_) if strict else ""
        raise toxiproxy_error(400, "invalid toxic type" + details)
    name = fields.pop("name", "") or "%s_%s" % (type_, stream)
    check_field("name", check_name, name)
    attributes = read_attributes(type_, fields.pop("attributes", {}), strict)
    # If `strict` is True, `fields` may have unknown keys, which make_toxic refuses.
    toxic = make_toxic(type_, name, dict(fields, stream=stream.lower()), attributes,
                       toxiproxy=not strict)
    toxic.stream = stream       # as the client wrote it, perhaps in upper case
    return toxic


def read_attributes(type_, value, strict=False):
    """Return the options of a handler in a JSON object: {option: value}. Raises InputError.

    strict    False: ignore unknown keys. True: return unknown keys, too. make_toxic refuses them.
    """
    types = {option: type(default)
             for option, default in handler_options(HANDLERS[type_]).items()}
    known = None if strict else types
    return read_fields(read_object(value, "attributes", known), types, ".attributes")


def in_plain_words(message):
    """Return a message with plain words in place of each error of the form GO_TYPE_ERROR.

    The example at GO_TYPE_ERROR becomes "enabled must be true or false, not string".
    """
    # The place of the value: `value`, or for the field "enabled": `struct field Proxy.enabled`.
    place = r"(?:value|struct field \S*?(?P<field>\w+))"
    pattern = GO_TYPE_ERROR % (r"(?P<received>.+?)", place, r"(?P<type>\S+)")

    def replace(match):
        subject = match.group("field") or "it"      # without a field, the whole JSON value
        return "%s must be %s, not %s" % (
            subject, PLAIN_TYPES[match.group("type")], match.group("received"))

    return re.sub(pattern, replace, message)


# Warnings about a JSON object that make_proxy, read_toxic or copy_toxic has accepted

def log_warnings(texts):
    for text in texts:
        log.warning("%s", text)


def proxy_warnings(value):
    """Yield the warnings about a JSON object that creates a proxy."""
    fields = read_object(value, "", PROXY_FIELDS)
    source = "proxy %s" % fields["name"]
    yield from unknown_key_warnings(value, PROXY_KEYS, source)
    if not fields.get("listen"):
        yield ("%s: listen is missing, so the proxy accepts clients from all machines; with "
               "localhost:0 it accepts only clients of this machine" % source)
    if ":" not in fields["upstream"]:
        yield "%s: upstream %r has no port, so the proxy cannot connect to it" % (
            source, fields["upstream"])
    for toxic in [*fields.get("toxics", ()), *fields.get("rules", ())]:
        yield from toxic_warnings(toxic, source)


def toxic_warnings(value, source, type_=None):
    """Yield the warnings about a JSON object for a toxic.

    source    the beginning of each warning: "proxy redis".
    type_     the type of the existing toxic that the object changes, or None for a new toxic.
    """
    fields = read_toxic_object(value, TOXIC_KEYS)
    type_ = type_ or fields["type"]
    source = "%s, toxic %s" % (source, fields.get("name") or type_)
    yield from unknown_key_warnings(read_toxic_object(value, None), TOXIC_KEYS, source)
    yield from unknown_key_warnings(fields.get("attributes"), handler_options(HANDLERS[type_]),
                                    source + ", attributes")
    if not 0 <= fields.get("toxicity", 1) <= 1:
        yield "%s: toxicity is a probability from 0 to 1, not %g" % (source, fields["toxicity"])


def unknown_key_warnings(value, known, source):
    """Yield a warning for each unknown key of a JSON object.

    source    the beginning of each warning: "proxy redis, toxic slow".
    """
    known = [key.lower() for key in known]
    keys = [key.lower() for key in read_object(value, "")]
    for key in OrderedDict.fromkeys(keys):      # each key once
        if key not in known:
            yield "%s: the unknown key %r%s is ignored: there are %s" % (
                source, key[:50], did_you_mean(key, known), ", ".join(known) or "none")


# Writing

def toxic_to_json(proxy, toxic):
    """Return a toxic as a JSON object: Toxiproxy's keys, followed by Vaurien's keys."""
    toxicity = toxic.toxicity
    if toxicity == int(toxicity):
        toxicity = int(toxicity)        # 1 and not 1.0, as in Toxiproxy
    fields = OrderedDict((("attributes", attributes_to_json(toxic)), ("name", toxic.name),
                          ("type", toxic.rule.name), ("stream", toxic.stream),
                          ("toxicity", toxicity)))
    fields.update(toxic.rule.own_fields())
    fields.update(toxic.rule.times_to_json(proxy.to_unix))
    return fields


def attributes_to_json(toxic):
    """Return the attributes of a toxic, without defaults of attributes that Toxiproxy lacks.

    Typed clients (Java, .NET, Rust ...) may fail if a toxic has an attribute that Toxiproxy lacks.
    """
    if toxic.rule.name not in TOXIPROXY_TYPES:
        return dict(toxic.attributes)
    known = TOXIPROXY_TYPES[toxic.rule.name]
    defaults = handler_options(toxic.rule.handler)
    return OrderedDict((name, value) for name, value in toxic.attributes.items()
                       if name in known or value != defaults[name])


def exists_in_toxiproxy(toxic):
    """Return whether a release of Toxiproxy knows the type, attributes and stream of a toxic.

    Toxiproxy knows no rule field except the stream.
    """
    type_ = toxic.rule.name
    if type_ not in TOXIPROXY_TYPES or type_ in UNRELEASED_TYPES:
        return False
    other_attributes = set(attributes_to_json(toxic)) - set(TOXIPROXY_TYPES[type_])
    return not other_attributes and toxic.rule.stream != "both" and not toxic.rule.own_fields()


def toxics_to_json(proxy, toxics):
    """Return toxics of a proxy as JSON objects, sorted by direction, as in Toxiproxy."""
    order = [UPSTREAM, DOWNSTREAM, "both"]
    return [toxic_to_json(proxy, toxic)
            for toxic in sorted(toxics, key=lambda toxic: order.index(toxic.rule.stream))]


def listed_toxics(proxy, request):
    """Return the toxics for the key `toxics` of a proxy. ?all=1 adds Vaurien's own toxics."""
    list_all = request.query.get("all") == "1"
    return [toxic for toxic in proxy.toxics if list_all or exists_in_toxiproxy(toxic)]


def proxy_to_json(proxy, request):
    """Return a proxy as a JSON object. The request may have ?all=1 (see listed_toxics)."""
    def to_json():
        listed = listed_toxics(proxy, request)
        others = [toxic for toxic in proxy.toxics if toxic not in listed]
        accept = proxy.accept.to_json(proxy.to_unix)
        fields = OrderedDict((
            ("name", proxy.name), ("listen", proxy.listen),
            ("upstream", format_address(proxy.backend)), ("enabled", proxy.enabled),
            ("toxics", toxics_to_json(proxy, listed))))
        extensions = (("rules", toxics_to_json(proxy, others)),     # Vaurien's own keys
                      ("protocol", proxy.protocol_name() if proxy.protocol else ""),
                      ("accept", "" if accept == "normal" else accept),
                      ("max_connections", proxy.max_connections), ("tls", proxy.tls.fields))
        fields.update((name, value) for name, value in extensions if value)     # not "" or 0
        return fields
    return proxy.loop.run_sync(to_json)


# The routes

@toxiproxy_route("GET", "/proxies")
def list_proxies(request):
    """Return all proxies with their toxics; ?all=1 includes toxics that Toxiproxy lacks."""
    proxies = dict(request.control.proxies)     # a copy: other threads may remove proxies
    return OrderedDict((name, proxy_to_json(proxies[name], request)) for name in sorted(proxies))


@toxiproxy_route("POST", "/proxies", '{"name": "redis", "listen": "localhost:26379", '
                                     '"upstream": "localhost:6379"}', status=201)
def create_proxy(request):
    """Create a proxy, which may have toxics."""
    proxies = request.control.proxies
    value = read_json(request.body)
    proxy = make_proxy(read_proxy_fields(value), proxies)
    if not proxies.add(proxy):
        raise toxiproxy_error(409, "proxy already exists")
    log_warnings(proxy_warnings(value))
    return proxy_to_json(proxy, request)


@toxiproxy_route("GET", "/proxies/PROXY")
def get_proxy(request, proxy):
    """Return a proxy with its toxics."""
    return proxy_to_json(proxy, request)


@toxiproxy_route("POST PATCH", "/proxies/PROXY", '{"enabled": false}')
def update_proxy(request, proxy):
    """Change listen, upstream, enabled, accept or max_connections of a proxy. Toxics stay."""
    json_object = read_json(request.body)
    fields = read_proxy_fields(json_object)
    local, backend = proxy.local, proxy.backend
    if fields.get("listen", proxy.listen) != proxy.listen:
        local = read_listen(fields["listen"])
    if fields.get("upstream"):          # "" changes nothing
        backend = check_field("upstream", parse_upstream, fields["upstream"])
    check_field("upstream", check_backend, backend, [local])
    # A client may send `protocol` and `tls` as in a listing, but cannot change their values.
    for name, current in ("protocol", proxy.protocol_name()), ("tls", proxy.tls.fields):
        requested = check_field(name, PROXY_CHECKS[name], fields.get(name, current))
        if requested != current:
            raise bad_body("%s cannot be changed: delete the proxy and create it again" % name)
    checked = check_proxy_fields(fields)
    request.control.proxies.change(proxy, local, backend, checked.get("enabled"),
                                   checked.get("accept"), checked.get("max_connections"))
    log_warnings(unknown_key_warnings(json_object, PROXY_KEYS, "proxy " + proxy.name))
    return proxy_to_json(proxy, request)


@toxiproxy_route("DELETE", "/proxies/PROXY")
def delete_proxy(request, proxy):
    """Remove a proxy and close its connections."""
    request.control.proxies.remove(proxy)


@toxiproxy_route("GET", "/proxies/PROXY/toxics")
def list_toxics(request, proxy):
    """Return the toxics of a proxy; ?all=1 includes toxics that Toxiproxy lacks."""
    return proxy.loop.run_sync(lambda: toxics_to_json(proxy, listed_toxics(proxy, request)))


@toxiproxy_route("POST", "/proxies/PROXY/toxics",
                 '{"type": "latency", "attributes": {"latency": 200}}')
def create_toxic(request, proxy):
    """Add a toxic, also to open connections; ?strict=1 refuses unknown keys."""
    value = read_json(request.body)
    toxic = read_toxic(value, strict=request.query.get("strict") == "1")
    toxics = [*proxy.toxics, toxic]
    check_unique_names(toxics)
    proxy.loop.run_sync(proxy.set_toxics, toxics)
    log_warnings(toxic_warnings(value, "proxy " + proxy.name))
    return toxic_to_json(proxy, toxic)


@toxiproxy_route("PUT", "/proxies/PROXY/toxics",
                 '[{"type": "latency", "attributes": {"latency": 200}}]')
def put_toxics(request, proxy):
    """Replace all toxics of a proxy. Unknown keys are refused."""
    values = read_value(read_json(request.body, ignore_rest=False), list, "toxics")
    toxics = [read_listed_toxic(proxy, value) for value in values]
    check_unique_names(toxics)
    proxy.loop.run_sync(proxy.set_toxics, toxics)
    return proxy.loop.run_sync(toxics_to_json, proxy, proxy.toxics)


def read_listed_toxic(proxy, value):
    """Return the Toxic that a JSON object describes.

    For an unchanged toxic of a listing, the result is the existing Toxic object of the proxy,
    because a new Toxic object would begin the ttl again.
    """
    toxic = read_toxic(value, strict=True)
    is_listed = "active" in value       # only a toxic of a listing has this key
    if not is_listed:
        return toxic
    fields = without_moment(toxic_to_json(proxy, toxic))
    return next((existing for existing in proxy.toxics
                 if without_moment(toxic_to_json(proxy, existing)) == fields), toxic)


@toxiproxy_route("GET", "/proxies/PROXY/toxics/TOXIC")
def get_toxic(request, proxy, toxic):
    """Return a toxic."""
    return toxic_to_json(proxy, toxic)


@toxiproxy_route("POST PATCH", "/proxies/PROXY/toxics/TOXIC", '{"attributes": {"latency": 100}}')
def update_toxic(request, proxy, toxic):
    """Change the toxicity or some of the attributes of a toxic."""
    value = read_json(request.body)
    changed = copy_toxic(toxic, value)
    proxy.loop.run_sync(proxy.set_toxics, [changed if other is toxic else other
                                           for other in proxy.toxics])
    log_warnings(toxic_warnings(value, "proxy " + proxy.name, toxic.rule.name))
    return toxic_to_json(proxy, toxic)      # set_toxics has copied the changed values to `toxic`


def copy_toxic(toxic, value):
    """Return a new Toxic like `toxic`, with the changes in a JSON object. Raises InputError."""
    changeable = [key for key in TOXIC_KEYS if key not in ("name", "type", "stream")]
    fields = read_fields(read_toxic_object(value, changeable), TOXIC_FIELDS, "")
    sent_attributes = read_attributes(toxic.rule.name, fields.pop("attributes", {}))
    if "toxicity" not in fields and "percent" not in fields:    # percent is 100 * toxicity
        fields["toxicity"] = toxic.toxicity
    rule_fields = toxic.rule.own_fields()       # without the stream
    changed = make_toxic(toxic.rule.name, toxic.name,
                         dict(rule_fields, **fields, stream=toxic.rule.stream),
                         sent_attributes, toxiproxy=True)
    changed.stream = toxic.stream       # as its creator wrote it, perhaps in upper case
    refuse_changed_fields(rule_fields, changed.rule.own_fields())
    # make_toxic has checked only sent_attributes. The other attributes keep their values.
    changed.update(changed.toxicity, dict(toxic.attributes, **sent_attributes))
    return changed


def refuse_changed_fields(before, after):
    """Raise InputError if a rule field, except ttl, has changed."""
    for name in RULE_FIELDS:
        if before.get(name) != after.get(name) and name != "ttl":
            raise bad_body("%s cannot be changed: remove the toxic and add it again" % name)


@toxiproxy_route("DELETE", "/proxies/PROXY/toxics/TOXIC")
def delete_toxic(request, proxy, toxic):
    """Remove a toxic, and send at once the data that the toxic has delayed."""
    proxy.loop.run_sync(proxy.set_toxics, [other for other in proxy.toxics if other is not toxic])


@toxiproxy_route("POST", "/populate", '[{"name": "redis", "listen": "localhost:26379", '
                                      '"upstream": "localhost:6379", '
                                      '"toxics": [{"type": "latency"}]}]')
def populate(request):
    """Create or change several proxies. If a proxy in the body is invalid, nothing is changed."""
    proxies, populated, status, result = request.control.proxies, [], 201, OrderedDict()
    try:
        for proxy, fields, value in read_proxies(request.body, proxies):
            populated.append(add_or_update_proxy(proxies, proxy, fields))
            log_warnings(proxy_warnings(value))
    except (InputError, ApiError, CannotListen) as exc:
        error = TOXIPROXY.to_api_error(exc)
        status, result = error.status, error_to_json(error)
    # If a proxy cannot listen, `populated` has the earlier proxies. Go writes [] as null.
    result["proxies"] = [proxy_to_json(proxy, request) for proxy in populated] or None
    return TOXIPROXY.render(result, status)


def add_or_update_proxy(proxies, proxy, fields):
    """Add a proxy, or update the existing proxy of this name. Raises CannotListen.

    fields    the fields of the JSON object that describes `proxy`.

    Returns the added or updated proxy.
    """
    while not proxies.add(proxy):       # again if another request has removed the existing proxy
        existing = proxies.get(proxy.name)
        if existing and update_existing(proxies, existing, proxy, fields):
            return existing
    return proxy


def update_existing(proxies, existing, proxy, fields):
    """Update a proxy. Returns False, without a change, if another request has removed the proxy.

    existing    the proxy to update.
    proxy       a ProxyServer with the new values, which is never opened.
    fields      the fields of the JSON object that describes `proxy`.

    If must_replace returns True, all settings and toxics change, and the rules of the behavior are
    removed. Otherwise, only the toxics, accept and max_connections change, if `fields` has them.
    """
    with existing.lock:
        if proxies.get(proxy.name) is not existing:
            return False
        if must_replace(existing, proxy):
            changed_fields = PROXY_FIELDS
            proxies.change(existing, proxy.local, proxy.backend, proxy.enabled, proxy.accept,
                           proxy.max_connections)
            existing.loop.run_sync(existing.set_rules, [])
            existing.loop.run_sync(existing.set_protocol, proxy.protocol,
                                   proxy.overwrite_host_header, proxy.tls)
        else:
            changed_fields = fields
            proxies.change(existing, **{name: getattr(proxy, name)
                                        for name in ("accept", "max_connections")
                                        if name in fields})
        toxics = replace_toxics(existing.toxics, proxy.toxics, changed_fields)
        if toxics != existing.toxics:
            existing.loop.run_sync(existing.set_toxics, toxics)
        return True


def must_replace(existing, proxy):
    """Return whether the addresses, protocol or TLS options of two proxies differ."""
    # existing.listen has the IP address once the proxy has listened, and the host name before.
    return (existing.listen not in (proxy.listen, first_address(proxy.local))
            or existing.backend != proxy.backend or existing.protocol is not proxy.protocol
            or existing.tls.fields != proxy.tls.fields)


def replace_toxics(current, new, fields):
    """Return the new toxics, and the current toxics that the new toxics do not replace.

    fields    the fields that change. The field "toxics" replaces the current toxics that exist in
              Toxiproxy. The field "rules" replaces the current toxics that do not.

    A new toxic always replaces a current toxic of the same name.
    """
    new_names = {toxic.name for toxic in new}
    kept = []
    for toxic in current:
        key = "toxics" if exists_in_toxiproxy(toxic) else "rules"
        if key not in fields and toxic.name not in new_names:
            kept.append(toxic)
    # Toxics of Toxiproxy come first. If `fields` has "rules", `kept` has only these toxics.
    return kept + new if "rules" in fields else new + kept


@toxiproxy_route("POST", "/reset")
def reset(request):
    """Enable all proxies, accept clients, and remove all toxics. Connections stay open."""
    proxies = request.control.proxies
    for proxy in list(proxies.values()):
        with proxy.lock:
            if proxies.get(proxy.name) is proxy:        # not removed meanwhile
                proxies.change(proxy, enabled=True, accept=Accept())
                proxy.loop.run_sync(proxy.set_toxics, [])


@toxiproxy_route("GET", "/version")
def version(request):
    """Return the version. Toxiproxy's clients accept a version from 2.6.0 on."""
    return ApiResponse(200, {"Content-Type": "application/json;charset=utf-8"},
                       '{"version": "%s"}\n' % __version__)


@toxiproxy_route("GET", "/metrics")
def metrics(request):
    """Return the metrics of all proxies, for Prometheus."""
    measurements = [proxy.loop.run_sync(measure, proxy)
                    for proxy in list(request.control.proxies.values())]
    lines = []
    for metric, (type_, help_text, _) in METRICS.items():
        lines += ["# HELP %s %s" % (metric, help_text), "# TYPE %s %s" % (metric, type_)]
        lines += ["%s{%s} %s" % (metric, format_labels(labels), format_metric(value))
                  for measurement in measurements for labels, value in measurement[metric]]
    return ApiResponse(200, {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"},
                       "\n".join(lines) + "\n")


def format_labels(labels):
    """Return labels in the text format of Prometheus, like name="value"."""
    def escape(value):
        return str(value).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return ",".join('%s="%s"' % (name, escape(value)) for name, value in sorted(labels.items()))


# -- Interface ----------------------------------------------------------------
#
# Tests use a Proxy or a Client, which have the same methods: those of Interface. A Proxy runs in
# the process of the test. A Client sends requests to the control server of a proxy in another
# process, or on another host. start_proxy and stop_proxy start and stop the process of a proxy.
#
# Several threads may share a Proxy or a Client. A Proxy has a loop in a thread of its own. A
# Client opens a connection for each request.
#
# To add a method that only calls other methods, add the method to Interface. To add a method that
# needs the proxy itself, write the docstring in Interface, a call in the loop's thread in Proxy,
# and a request in Client.

class Fault:
    """A `with` block, in a test, during which a handler acts. The block counts its faults.

        with proxy.handler("delay", sleep=2) as fault:
            ...
            fault.wait()                # until the handler has acted
        assert fault.count == 1

    The methods `handler`, `with_handler` and `toxic` of Proxy and Client return a Fault.
    """

    def __init__(self, interface, handler_name, begin, end, key_field):
        self.name: str = handler_name
        self._interface = interface
        self._begin = begin         # begin() begins the block, and returns the key of the block
        self._end = end             # end(key) ends the block
        self._key = None            # the number of the block, or the name of the toxic
        self._key_field = key_field     # the field of a FaultRecord with the key: block or toxic
        # The FaultRecords of the block have numbers greater than _since, up to _until.
        self._since = 0
        self._until: float = 0      # math.inf while the block is open

    def __enter__(self) -> "Fault":
        self._since = self._interface._last_record()
        self._until = math.inf
        self._key = self._begin()
        self._interface._open_faults.append(self)
        return self

    def __exit__(self, *exception: object) -> None:
        self._interface._open_faults.remove(self)
        self._end(self._key)
        self._until = self._interface._last_record()

    def __repr__(self):
        return "<Fault %s: %d>" % (self.name, self.count)

    def events(self) -> "List[FaultRecord]":
        """Return the fault records of this block, the oldest first."""
        return list(filter(self._has_caused, self._interface.events(self._since)))

    @property
    def count(self) -> int:
        """The number of requests, or of connections, on which the handler has acted."""
        return len(self.events())

    def wait(self, timeout: float = 5, count: int = 1) -> FaultRecord:
        """Wait until the handler has acted in this block.

        timeout    seconds to wait at most.
        count      the number of faults to wait for.

        Returns the FaultRecord of fault number `count` of this block. Raises TimeoutError.
        """
        return self._interface._wait_for_fault(self.name, self._since, self._has_caused, count,
                                               timeout)

    async def wait_async(self, timeout: float = 5, count: int = 1) -> FaultRecord:
        """Wait as `wait` does, without blocking the event loop of asyncio."""
        return await run_in_executor(self.wait, timeout, count)

    def _has_caused(self, record):
        """Return whether a FaultRecord is of a fault that this block has caused."""
        is_fault = record.change is None
        is_of_block = getattr(record, self._key_field) == self._key
        return is_fault and is_of_block and self._since < record.number <= self._until


async def run_in_executor(function, *args):
    """Run a blocking function in a thread of asyncio's executor. Returns its result."""
    return await asyncio.get_event_loop().run_in_executor(None, function, *args)


class Interface:
    """The methods that Proxy and Client share.

    A handler is given by its name, like "delay", or as the function or class itself. Keyword
    arguments set the options of the handler, and the rule fields percent, per, stream, match,
    after, times, of, start, duration, every, ramp and ttl. Times are numbers of seconds, or texts
    like "90s", "5m" or "500ms".

    Invalid arguments raise ValueError.
    """

    def __init__(self):
        self._open_faults = []  # the Faults whose `with` block is open, the outermost first
        self._since_reset = 0   # the number of the last FaultRecord before the last reset

    # Faults during a `with` block

    def handler(self, name: "Handler", **fields: "OptionValue") -> Fault:
        """Return a `with` block in which a handler acts instead of the behavior.

            with proxy.handler("error", percent=20, times=3) as fault:
                ...

        If blocks are nested, the handlers of all open blocks act, each with a draw of its own. In
        a block of the handler `dummy`, only toxics act. When the last block has ended, the
        behavior acts again. Blocks do not affect toxics. Blocks may end in any order.

        Raises RuntimeError if the proxy is not running.
        """
        name = self._handler_name(name)
        return self._block(dict(fields, name=name), replaces_outer_blocks=(name == "dummy"))

    def with_handler(self, name: "Handler", **fields: "OptionValue") -> Fault:
        """Return a `with` block in which only this handler acts, as in Vaurien 1.x.

        The handlers of outer blocks do not act during this block.
        """
        return self._block(dict(fields, name=self._handler_name(name)),
                           replaces_outer_blocks=True)

    def toxic(self, type: "Handler", name: "Optional[str]" = None, **fields: "Any") -> Fault:
        """Return a `with` block with a toxic, which acts beside the behavior and other toxics.

            with proxy.toxic("latency", latency=200, jitter=50):
                ...

        The method `add_toxic` documents the arguments.
        """
        self._check_running()
        return Fault(self, self._handler_name(type), key_field="toxic",
                     begin=lambda: self.add_toxic(type, name, **fields), end=self._discard_toxic)

    @contextlib.contextmanager
    def down(self) -> "Iterator[None]":
        """Close the port and all connections during a `with` block, as if the backend were down.

        After the block, the proxy listens on the same port again.
        """
        self.disable()
        try:
            yield
        finally:
            self.enable()

    def refusing(self, **times: "Union[float, str]") -> "ContextManager[None]":
        """Refuse new clients during a `with` block, as if no server listened on the port.

        times    start, duration, every and ttl of the windows in which clients are refused. By
                 default, clients are refused during the whole block.

        A new connect fails with ECONNREFUSED at once. Open connections continue.
        """
        return self._accepting("refuse", times)

    def dropping(self, **times: "Union[float, str]") -> "ContextManager[None]":
        """Let connects of new clients time out during a `with` block.

        times    start, duration, every and ttl of the windows in which connects time out. By
                 default, connects time out during the whole block.

        A new connect gets no reply, as if a firewall dropped the packets. The client's TCP repeats
        the SYN, first after one second. The first SYN after the block connects the client. Open
        connections continue. This method raises OSError on Windows.
        """
        return self._accepting("drop", times)

    @contextlib.contextmanager
    def _accepting(self, accept, times):
        """Set how new clients are accepted during a `with` block."""
        before = self.get_accept()
        self.set_accept(accept, **times)
        try:
            yield
        finally:
            self.set_accept(before)

    # Faults without a `with` block

    def set_behavior(self, behavior: "Union[Behavior, Handler]",
                     options: "Optional[Dict[str, Dict[str, OptionValue]]]" = None,
                     **fields: "OptionValue") -> None:
        """Replace the behavior.

        behavior    "20:delay,5:error", {"delay": 20, "error": 5}, [(20, "delay"), (5, "error")],
                    or a single handler, which by default acts on all requests.
        options     options of the handlers: {handler: {option: value}}.
        fields      options and rule fields of a single handler.

        Open `with` blocks end: their handlers do not act any more.
        """
        is_name = isinstance(behavior, str) and ":" not in behavior
        is_single_handler = is_name or callable(behavior)
        if is_single_handler:
            name = self._handler_name(behavior)
            values = (options or {}).get(name, {})
            tables = [{**values, **fields, "name": name}]
        elif fields:
            raise ValueError("%s needs a single handler: use options={handler: {option: value}}"
                             % ", ".join(fields))
        else:
            tables = check_field("behavior", behavior_tables, behavior, options,
                                 self._handler_name)
        self._set_rules(tables)

    def set_handler(self, name: "Handler", **fields: "OptionValue") -> None:
        """Replace the behavior by one handler, as in Vaurien 1.x."""
        self._set_rules([dict(fields, name=self._handler_name(name))])

    def add_toxic(self, type: "Handler", name: "Optional[str]" = None, **fields: "Any") -> str:
        """Add a toxic: a rule with a name, which acts beside the behavior and other toxics.

        type      the handler, like "latency".
        name      the name of the toxic. The default is like "latency_downstream".
        fields    options of the handler, and rule fields. A `toxicity` from 0 to 1 may replace
                  `percent`.

        By default, a toxic is drawn for each connection. Toxics with a type of Toxiproxy, like
        latency, act downstream by default.

        Returns the name. Raises ValueError if the proxy has a toxic of this name already.
        """
        fields.update(type=self._handler_name(type), name=name)
        return self._add_toxic(toxic_table(fields))

    def remove_toxic(self, name: str) -> None:
        """Remove a toxic. The data that the toxic delays is sent at once.

        Raises ValueError if there is no toxic of this name.
        """
        raise NotImplementedError

    def close_connection(self, number: int, reset: bool = False) -> None:
        """Close an open connection, or reset it.

        number    the number of the connection: see `connections`.

        Raises ValueError if there is no open connection of this number.
        """
        raise NotImplementedError

    def reset(self) -> None:
        """Enable the proxy, accept clients, remove all rules and toxics, and end all blocks.

        Connections, the backend and the fault records stay. By default, `count` and `wait_for`
        ignore faults from before the reset.
        """
        raise NotImplementedError

    def enable(self) -> None:
        """Listen again after `disable`. Raises OSError if the proxy cannot listen."""
        self._set_enabled(True)

    def disable(self) -> None:
        """Close the port and all connections, until `enable` is called."""
        self._set_enabled(False)

    def set_accept(self, accept: str, **times: "Union[float, str]") -> None:
        """Set how new clients are accepted, until the next change.

        accept    "normal", "refuse" (a connect fails at once), or "drop" (a connect times out).
                  The text may contain the times: "refuse duration=5".
        times     the windows in which clients are refused or dropped: start, duration, every and
                  ttl, as for a rule.

        Raises OSError if this operating system cannot refuse or drop connects.
        """
        self._set_accept(dict(times, mode=accept) if times else accept)

    def set_backend(self, backend: "Address") -> None:
        """Connect new clients to another backend: "HOST:PORT" or (host, port)."""
        raise NotImplementedError

    # Observing

    def wait_for(self, name: "Optional[Handler]" = None, timeout: float = 5,
                 since: "Optional[int]" = None, times: int = 1,
                 match: "Optional[str]" = None) -> FaultRecord:
        """Wait until a handler has acted. Returns the FaultRecord of fault number `times`.

        timeout    seconds to wait at most.
        times      the number of faults to wait for.

        The method `count` documents the arguments name, since and match. Raises TimeoutError.
        """
        timeout = check_field("timeout", check_amount, timeout)
        times = check_field("times", number_check(int, "a whole number, 1 or more",
                                                  lambda times: times >= 1), times)
        since, matches = self._selection(name, since, match)
        subject = "any handler" if name is None else self._handler_name(name)
        return self._wait_for_fault(subject, since, matches, times, timeout)

    async def wait_for_async(self, name: "Optional[Handler]" = None, timeout: float = 5,
                             since: "Optional[int]" = None, times: int = 1,
                             match: "Optional[str]" = None) -> FaultRecord:
        """Wait as `wait_for` does, without blocking the event loop of asyncio."""
        return await run_in_executor(self.wait_for, name, timeout, since, times, match)

    def count(self, name: "Optional[Handler]" = None, match: "Optional[str]" = None,
              since: "Optional[int]" = None) -> int:
        """Return how often a handler has acted.

        name     the handler. By default, the faults of all handlers are counted.
        match    a regular expression for the field `text` of a fault record: the beginning of the
                 request, 80 characters at most.
        since    the number of a fault record: only faults after this record are counted. By
                 default, the faults since the beginning of the innermost open `with` block of the
                 handler are counted. If the handler has no open block, the innermost open block of
                 any handler is used. If no block is open, faults since the last reset are counted.
        """
        since, matches = self._selection(name, since, match)
        return len(list(filter(matches, self.events(since))))

    def events(self, since: int = 0) -> "List[FaultRecord]":
        """Return the fault records with a number greater than `since`, the oldest first.

        In the record of a fault, the field `change` is None. A record whose `change` is "begins"
        or "ends" is about a window of a rule. A record whose `change` is "expires" is about the
        ttl of a rule. The proxy keeps the last 10,000 records.
        """
        raise NotImplementedError

    def connections(self) -> "List[Dict[str, Any]]":
        """Return one dict for each open connection, as `GET /connections` does."""
        raise NotImplementedError

    def address(self) -> "Tuple[str, int]":
        """Return the (host, port) that clients connect to."""
        raise NotImplementedError

    def get_backend(self) -> str:
        """Return the backend of new connections, as HOST:PORT."""
        raise NotImplementedError

    def get_accept(self) -> str:
        """Return how new clients are accepted, as text for set_accept: "refuse duration=5"."""
        raise NotImplementedError

    def get_handler(self) -> str:
        """Return the names of the handlers of the behavior or of open blocks, joined by commas."""
        raise NotImplementedError

    def list_handlers(self) -> "List[str]":
        """Return the names of all handlers."""
        raise NotImplementedError

    def describe(self) -> str:
        """Return the rules as text, like "20:delay sleep=1.0, 80:dummy"."""
        raise NotImplementedError

    def list_toxics(self) -> "List[Dict[str, Any]]":
        """Return one dict for each toxic, in the JSON form of Toxiproxy's API."""
        raise NotImplementedError

    # The names of Vaurien 1.9

    def get_behavior(self) -> str:
        """Return the result of `get_handler`."""
        return self.get_handler()

    def list_behaviors(self) -> "List[str]":
        """Return the result of `list_handlers`."""
        return self.list_handlers()

    with_behavior = with_handler

    # Methods that Proxy and Client implement

    _handler_name: "Callable[[Any], str]"   # (handler: its name, function or class) -> name
    _set_rules: "Callable[[Any], None]"     # (tables of read_rules)
    _add_toxic: "Callable[[Any], str]"      # (result of toxic_table) -> name
    _set_accept: "Callable[[Any], None]"    # (argument of check_accept)
    _set_enabled: "Callable[[bool], None]"
    _begin_block: "Callable[[Any, bool], int]"      # (table of read_rules, only) -> number
    _end_block: "Callable[[int], None]"     # (number)
    _last_record: "Callable[[], int]"       # () -> number of the last FaultRecord
    _wait_for_records: ("Callable[[int, Callable[[FaultRecord], bool], int, float],"
                        " List[FaultRecord]]")      # (since, matches, count, timeout)

    # For Fault

    def _wait_for_fault(self, subject, since, matches, count, timeout):
        """Wait until `count` faults match. Returns the FaultRecord of fault number `count`.

        Raises TimeoutError with a message that begins with `subject`. The function
        wait_for_records documents the other arguments.
        """
        found = self._wait_for_records(since, matches, count, timeout)
        if len(found) >= count:
            return found[count - 1]
        shortfall = "" if count == 1 else " %d times, but %d," % (count, len(found))
        faults = Counter(record.handler for record in self.events(since) if record.change is None)
        fault_counts = ", ".join("%d %s" % (number, handler) for handler, number in faults.items())
        raise TimeoutError("%s has not acted%s in %g seconds; faults: %s"
                           % (subject, shortfall, timeout, fault_counts or "none"))

    def _selection(self, name, since, match):
        """Convert arguments of `count` into (since, matches). Raises ValueError.

        matches(record) returns whether a FaultRecord with a number above `since` is counted.
        """
        if name is not None:
            name = self._handler_name(name)
            if name not in self.list_handlers():
                raise ValueError(unknown_handler(name))
        pattern = check_optional("match", check_match, match)
        since = check_optional("since", check_count, since)
        if since is None:
            since = self._default_since(name)

        def matches(record):
            is_fault = record.change is None
            is_of_handler = name is None or name == record.handler
            has_text = pattern is None or bool(pattern.search(record.text.encode("utf-8")))
            return is_fault and is_of_handler and has_text
        return since, matches

    def _default_since(self, handler_name):
        """Return the default of the argument `since` of `count`, as documented there."""
        blocks_of_handler = [fault for fault in self._open_faults if fault.name == handler_name]
        blocks = blocks_of_handler or self._open_faults
        return blocks[-1]._since if blocks else self._since_reset

    def _block(self, table, replaces_outer_blocks):
        """Return the Fault for a block. `table` is the rule of the block, for read_rules."""
        self._check_running()
        return Fault(self, table["name"], key_field="block", end=self._end_block,
                     begin=lambda: self._begin_block(table, replaces_outer_blocks))

    def _discard_toxic(self, name):
        """Remove a toxic if the proxy still has the toxic."""
        with contextlib.suppress(ValueError):       # raised if reset() has removed the toxic
            self.remove_toxic(name)

    def _check_running(self):
        """Raise RuntimeError if the proxy is not running."""


def toxic_table(fields):
    """Return a toxic in the JSON form of Toxiproxy's API, with all options in `attributes`.

    {"type": "latency", "latency": 9} becomes {"type": "latency", "attributes": {"latency": 9}}.
    The dict `fields` may have options in `attributes` already.
    """
    table, attributes = {}, dict(fields.get("attributes") or {})
    handler_function = HANDLERS.get(fields.get("type"))     # None if only the server has it
    for key, value in fields.items():
        if key in TOXIC_FIELDS or is_rule_field(handler_function, key):
            table[key] = value
        else:
            attributes[key] = value
    table["attributes"] = attributes
    return table


def make_local_toxic(toxic):
    """Return the Toxic for a dict like {"type": "latency", "latency": 9}. Raises ValueError.

    The type may be the name of a handler, or the function or class of a handler.
    """
    if not isinstance(toxic, dict) or not toxic.get("type"):
        raise ValueError("a toxic must be a dict like {'type': 'latency', 'latency': 200}, not %r"
                         % (toxic,))
    table = toxic_table(dict(toxic, type=local_handler(toxic["type"])))
    try:
        json_value = json.loads(json.dumps(table))      # has lists in place of tuples, like JSON
        return read_toxic(json_value, strict=True)
    except TypeError as error:          # json cannot encode a value
        raise ValueError("toxic %r: %s" % (table["type"], error)) from None
    except (InputError, ApiError) as error:
        raise ValueError("toxic %r: %s" % (table["type"], in_plain_words(str(error)))) from None


def parse_endpoint(address, parse):
    """Parse an address with the function `parse`, which takes "HOST:PORT". Raises ValueError.

    address    "HOST:PORT", (host, port), or the four items of an IPv6 socket's address.
    """
    if isinstance(address, (tuple, list)) and len(address) in (2, 4):
        host, port, *_ = address
        if isinstance(host, str) and isinstance(port, (int, str)):
            is_ipv6 = ":" in host
            address = ("[%s]:%s" if is_ipv6 else "%s:%s") % (host, port)
    if not isinstance(address, str):
        raise ValueError("must be HOST:PORT or (host, port), like localhost:6379, not %r"
                         % (address,))
    return parse(address)


def check_optional(name, check, value):
    """Check a value that may be None. Returns the checked value, or None. Raises ValueError."""
    return None if value is None else check_field(name, check, value)


def check_handler_options(options):
    """Check {handler: {option: value}}. Returns {handler name: {option: value}}.

    Raises ValueError.
    """
    is_valid = isinstance(options, dict) and all(
        isinstance(values, dict) for values in options.values())
    if not is_valid:
        raise ValueError("must be {handler: {option: value}}, not %r" % (options,))
    return {local_handler(handler): values for handler, values in options.items()}


class Proxy(Interface):
    """A chaos proxy in front of one backend, in a thread of this process.

        with Proxy("localhost:6379") as proxy:
            redis = Redis(port=proxy.port)
            with proxy.handler("delay", sleep=2) as fault:
                ...
            assert fault.count == 1

    The proxy runs from `start` to `stop`, or during a `with` or an `async with` block. After
    `stop`, the proxy can start again. In a fork of this process, `stop` has no effect, and methods
    that need the proxy raise RuntimeError.

    Args:
        distant     the backend, "HOST:PORT" or (host, port); the proxy makes a connection to the
                    backend for each client.
        local       the address to listen on, "HOST:PORT" or (host, port). Port 0 picks a free
                    port.
        behavior    the percentage of requests on which each handler acts:
                    "PERCENT:HANDLER,...", {handler: percent}, or [(percent, handler)]. A handler
                    is a name or a dotted path like "mine.stutter". The dict and the list may also
                    have the function itself.
        options     options of the handlers: {handler: {option: value}}.
        name        the name of the proxy, for the log and for the draws.
        seed        a whole number: with the same seed, a test gets the same faults. If the seed
                    is None, Vaurien draws a seed.
        timeout     seconds to connect to the backend, for all its addresses together.
        protocol    the application protocol: tcp, http, redis, memcache, mysql, postgres, smtp
                    or tls.
        overwrite_host_header
                    for http: whether the proxy replaces the Host header of requests by the
                    backend's name.
        toxics      rules beside the behavior, with the arguments of add_toxic:
                    [{"type": "latency", "latency": 200}].
        enabled     False: do not listen until `enable` is called.
        tls         {"cert": "auto", "max_version": "1.2"}: the options of `vaurien --help tls`.
        accept      how new clients are accepted, as in set_accept.
        max_connections
                    the most clients at a time; 0 is no limit. Clients above the limit get the
                    protocol's error for too many connections, or a closed connection.
        record      a file to write the faults to.
        replay      a file that `record` has written: do not draw faults, but repeat the faults of
                    this file, on the same connections and requests.
        reuse_port  if several processes share the port (only on Linux): the number of this
                    process, 1 or more. Processes with different numbers have different draws.

    Raises:
        ValueError      an argument is invalid; the message names the argument.
        OSError         `start` or `enable` cannot listen, or `start` cannot write a recording.
        RuntimeError    the proxy is not running, or `start` is called while the proxy runs.
        TimeoutError    `wait_for` has waited too long.
    """

    def __init__(self, distant: "Address", local: "Address" = "localhost:0",
                 behavior: "Behavior" = "100:dummy",
                 options: "Optional[Dict[str, Dict[str, OptionValue]]]" = None,
                 name: str = "vaurien", seed: "Optional[int]" = None, timeout: float = 30.0,
                 protocol: str = "tcp", overwrite_host_header: bool = True,
                 toxics: "Iterable[Dict[str, Any]]" = (), enabled: bool = True,
                 accept: str = "normal", max_connections: int = 0,
                 tls: "Optional[Dict[str, Any]]" = None, record: "Optional[str]" = None,
                 replay: "Optional[str]" = None, reuse_port: "Optional[int]" = None) -> None:
        super().__init__()
        options = check_field("options", check_handler_options, options or {})
        self._server = ProxyServer(
            distant=check_field("distant", parse_endpoint, distant, parse_backend),
            local=check_field("local", parse_endpoint, local, parse_listener),
            behavior=check_field("behavior", behavior_tables, behavior, options, local_handler),
            options=options,
            name=check_field("name", lambda name: check_name(check_text(name)), name),
            seed=check_optional("seed", check_count, seed),
            toxics=[make_local_toxic(toxic) for toxic in toxics],
            reuse_port=check_optional("reuse_port", check_reuse_port, reuse_port),
            **check_proxy_fields({
                "timeout": timeout, "protocol": protocol,
                "overwrite_host_header": overwrite_host_header, "enabled": enabled,
                "accept": accept, "max_connections": max_connections, "tls": tls or {}}))
        self._proxies = ProxyTable([self._server], *make_recording(record, replay))
        self._thread: "Optional[threading.Thread]" = None

    # Start and stop

    def start(self) -> "Proxy":
        """Listen, and run the proxy in a new thread. Returns the proxy itself.

        Raises OSError if the proxy cannot listen, and RuntimeError if it runs already.
        """
        if self._thread:
            raise RuntimeError("the proxy is running already")
        self._proxies.bind()
        loop = Loop()
        self._proxies.open(loop)
        self._thread = threading.Thread(target=loop.run, name=self.name, daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        """Close the port and all connections, and wait until the proxy's thread has ended.

        Does nothing if the proxy is not running.
        """
        if self._runs_in_this_process():
            loop = self._server.loop
            loop.stop()
            self._thread.join()         # from now on, only this thread uses the proxy and the loop
            self._thread = None
            self._proxies.close()
            loop.close()

    def _runs_in_this_process(self):
        return self._thread and not self._server.loop.is_forked()

    def __enter__(self) -> "Proxy":
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.stop()

    async def __aenter__(self) -> "Proxy":
        return self.start()                 # waits for no peer, and does not block the event loop

    async def __aexit__(self, *exception: object) -> None:
        await run_in_executor(self.stop)

    def __repr__(self):
        local = self._server.listener or ("disabled" if self._thread else "not running")
        return "<Proxy %s %s -> %s: %s>" % (self.name, local, self.get_backend(), self.describe())

    # Values. The docstrings of the methods are in Interface

    @property
    def port(self) -> int:
        """The port on which the proxy listens. Raises RuntimeError if the proxy is not running."""
        _, port = self.address()
        return port

    @property
    def name(self) -> str:
        """The name of the proxy."""
        return self._server.name

    @property
    def seed(self) -> int:
        """The seed of the draws."""
        return self._server.seed

    @property
    def ca(self) -> str:
        """The certificate (PEM) of the CA that signs the certificates of `--tls-cert auto`."""
        return AUTHORITY.pem()

    @property
    def accepted(self) -> int:
        """The number of clients that have connected."""
        return self._server.accepted

    @property
    def failures(self) -> int:
        """The number of connections for which the proxy could not connect to the backend."""
        return self._server.failures

    @property
    def faults(self) -> "CounterOf[str]":
        """{handler: number of requests or connections on which the handler has acted}."""
        return Counter(self._server.faults)

    def address(self) -> "Tuple[str, int]":
        self._check_running()
        host, port = self._server.local
        if not port:                    # the proxy has not listened yet: local is (host, 0)
            raise RuntimeError("the proxy has no port before it is enabled")
        if self._server.listener:
            host, *_ = self._server.listener.address()      # the IP address of a host name
        if host in ("", *WILDCARD):     # all addresses of this machine
            host = "localhost"
        return host, port

    def get_backend(self) -> str:
        return format_address(self._server.backend)

    def get_accept(self) -> str:
        return self._server.accept.to_text()

    def get_handler(self) -> str:
        return self._server.handler_names()

    def list_handlers(self) -> "List[str]":
        return list(HANDLERS)

    def describe(self) -> str:
        return self._server.describe()

    def events(self, since: int = 0) -> "List[FaultRecord]":
        return self._server.records_since(since)

    def list_toxics(self) -> "List[Dict[str, Any]]":
        return self._call(toxics_to_json, self._server, self._server.toxics)

    def connections(self) -> "List[Dict[str, Any]]":
        return self._call(self._server.list_connections)

    # Changes

    def set_backend(self, backend: "Address") -> None:
        address = check_field("backend", parse_endpoint, backend, parse_backend)
        check_field("backend", self._call, self._server.set_backend, address)

    def remove_toxic(self, name: str) -> None:
        def remove():
            names = [toxic.name for toxic in self._server.toxics]
            if name not in names:
                raise ValueError("there is no toxic %r: there are %s"
                                 % (name, ", ".join(names) or "none"))
            self._server.set_toxics([toxic for toxic in self._server.toxics
                                     if toxic.name != name])
        self._call(remove)

    def close_connection(self, number: int, reset: bool = False) -> None:
        if not self._call(self._server.close_connection, number, reset):
            raise ValueError("there is no open connection %d" % number)

    def reset(self) -> None:
        self._change(ProxyTable.reset)
        self._since_reset = self._last_record()

    # For Interface

    def _set_enabled(self, enabled):
        self._change(ProxyTable.change, enabled=enabled)

    def _set_accept(self, accept):
        self._change(ProxyTable.change, accept=check_field("accept", check_accept, accept))

    def _change(self, method, **arguments):
        """Call a method of ProxyTable for this proxy, while this thread holds the proxy's lock."""
        self._check_running()
        with self._server.lock:
            method(self._proxies, self._server, **arguments)

    def _check_running(self):
        """Raise RuntimeError if the proxy is not running, or if its own thread calls this."""
        if not self._thread:
            raise RuntimeError('the proxy is not running; use "with" or start()')
        if self._thread is threading.current_thread():      # the thread would wait for itself
            raise RuntimeError("a handler cannot call a method of its proxy")

    def _call(self, function, *args):
        """Call a function in the loop's thread. Returns its result."""
        self._check_running()
        return self._server.loop.run_sync(function, *args)

    def _handler_name(self, handler):
        return local_handler(handler)

    def _set_rules(self, tables):
        self._call(self._server.set_rules, read_rules(tables))

    def _add_toxic(self, table):
        new = make_local_toxic(table)

        def add():
            if any(toxic.name == new.name for toxic in self._server.toxics):
                raise ValueError("there is a toxic %r already" % new.name)
            self._server.set_toxics([*self._server.toxics, new])
        self._call(add)
        return new.name

    def _begin_block(self, table, only):
        return self._call(self._server.begin_block, read_rules([table]), only)

    def _end_block(self, number):
        if self._runs_in_this_process():        # the proxy may end before the block
            self._call(self._server.end_block, number)

    def _last_record(self):
        return self._server.fault_count

    def _wait_for_records(self, since, matches, count, timeout):
        if self._thread:
            self._server.loop.check_process()   # raises RuntimeError in a fork: no loop runs there
        else:
            timeout = 0         # there are no new faults while the proxy does not run
        return wait_for_records(self._server.next_records, since, matches, count, timeout)


def check_path(path):
    """Return a path as text. Accepts an object like a pathlib.Path, too. Raises ValueError."""
    return check_file(os.fspath(path) if isinstance(path, os.PathLike) else path)


def make_recording(record, replay):
    """Return (Recorder, Replay) for two paths. Raises ValueError.

    A path may be None. Then the Recorder or the Replay is None.
    """
    record = check_optional("record", check_path, record)
    replay = check_optional("replay", check_path, replay)
    if record and record == replay:
        raise ValueError("record and replay need different files")
    return Recorder(record) if record else None, Replay(replay) if replay else None


class Client(Interface):
    """A client of the control server of a proxy that was started with --http.

    Args:
        host, port    the address of the control server.
        scheme        http or https.
        proxy         the name of the proxy to control; by default, the server's first proxy.
        token         the --http-token of the server, or None.

    Raises:
        ValueError      the server refuses a request; the message is from the server.
        OSError         no control server listens on this address.
        TimeoutError    `wait_for` has waited too long.
    """

    def __init__(self, host: str = "localhost", port: int = 8080, scheme: str = "http",
                 proxy: "Optional[str]" = None, token: "Optional[str]" = None) -> None:
        super().__init__()
        self.host, self.port, self.scheme = host, int(port), scheme
        self.proxy = proxy
        self.token = check_field("token", check_token, token) if token else None

    def __repr__(self):
        return "<Client %s://%s%s>" % (self.scheme, format_address((self.host, self.port)),
                                       " proxy %s" % self.proxy if self.proxy else "")

    def request(self, method: str, path: str, body: "Any" = None, **query: "Any") -> "Any":
        """Send a request. Returns the JSON value, or the text, of the response.

        body     a value that is sent as JSON; None for no body.
        query    the keys and values of the query.

        Raises ValueError if the server refuses the request, and OSError if there is no server.
        """
        if self.proxy is not None:
            query["proxy"] = self.proxy
        if query:
            path += "?" + urls.urlencode(query)
        response, text = self._exchange(method, path, None if body is None else json.dumps(body))
        is_error = response.status >= 400
        has_json_type = response.getheader("Content-Type", "").startswith("application/json")
        is_toxiproxy_error = is_error and text.startswith("{")  # JSON, but its type is text/plain
        try:
            value = json.loads(text) if has_json_type or is_toxiproxy_error else text
        except (ValueError, RecursionError):
            raise OSError("not a vaurien control server") from None
        if is_error:
            raise ValueError(error_text(value) or "HTTP %d: %s" % (response.status, value))
        return value

    ask = request       # the method's name in earlier versions

    @property
    def ca(self) -> str:
        """The certificate (PEM) of the CA that signs the certificates of `--tls-cert auto`."""
        return self.request("GET", "/ca.pem")

    def _exchange(self, method, path, body):
        """Send a request on a new connection. Returns (HTTPResponse, text of its body)."""
        connection_class = {
            "http": http_client.HTTPConnection,
            "https": getattr(http_client, "HTTPSConnection", None),     # missing without ssl
        }.get(self.scheme)
        if connection_class is None:
            raise ValueError("scheme must be http or https, not %r" % self.scheme)
        headers = {"Authorization": "Bearer " + self.token} if self.token else {}
        connection = connection_class(self.host, self.port, timeout=30)
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response, response.read().decode("utf-8", "replace")
        except http_client.HTTPException as error:
            raise OSError("%s:%d is not an HTTP server: %s"
                          % (self.host, self.port, error)) from None
        finally:
            connection.close()

    # Values. The docstrings of the methods are in Interface

    def address(self) -> "Tuple[str, int]":
        host, port = parse_listener(self._status()["listen"])
        if host in ("", *WILDCARD):     # all addresses of the server's machine
            host = self.host
        return host, port

    def get_backend(self) -> str:
        return self.request("GET", "/backend")["backend"]

    def get_accept(self) -> str:
        return check_accept(self._status()["accept"]).to_text()

    def get_handler(self) -> str:
        return self.request("GET", "/behavior")["behavior"]

    def list_handlers(self) -> "List[str]":
        return self.request("GET", "/handlers")["handlers"]

    def describe(self) -> str:
        return self._status()["rules"]

    def events(self, since: int = 0) -> "List[FaultRecord]":
        return self._records(since=since)

    def list_toxics(self) -> "List[Dict[str, Any]]":
        return self.request("GET", self._proxy_path() + "/toxics", all=1)

    def connections(self) -> "List[Dict[str, Any]]":
        return self.request("GET", "/connections")["connections"]

    # Changes

    def set_backend(self, backend: "Address") -> None:
        address = check_field("backend", parse_endpoint, backend, parse_backend)
        self.request("PUT", "/backend", {"backend": format_address(address)})

    def remove_toxic(self, name: str) -> None:
        self.request("DELETE", "%s/toxics/%s" % (self._proxy_path(), urls.quote(name, safe="")))

    def close_connection(self, number: int, reset: bool = False) -> None:
        self.request("DELETE", "/connections/%d" % number, reset="yes" if reset else "no")

    def reset(self) -> None:
        self.request("POST", "/proxy/reset")
        self._since_reset = self._last_record()

    # For Interface

    def _set_enabled(self, enabled):
        self.request("POST", self._proxy_path(), {"enabled": enabled})

    def _set_accept(self, accept):
        self.request("PUT", "/proxy", {"accept": accept})

    def _status(self):
        """Return the addresses and the state of the proxy: the result of `GET /proxy`."""
        return self.request("GET", "/proxy")

    def _proxy_path(self):
        """Return the path of the proxy in Toxiproxy's API."""
        return "/proxies/" + urls.quote(self._status()["name"], safe="")

    def _handler_name(self, handler):
        """Return the name of a handler. The server checks the name."""
        if isinstance(handler, str):
            return handler
        handler_name = getattr(handler, "name", "")     # some classes of handlers have a name
        return handler_name or getattr(handler, "__name__", repr(handler))

    def _set_rules(self, tables):
        self.request("PUT", "/rules", {"rules": tables})

    def _add_toxic(self, table):
        return self.request("POST", self._proxy_path() + "/toxics", table, strict=1)["name"]

    def _begin_block(self, table, only):
        return self.request("POST", "/blocks", table, only="yes" if only else "no")["block"]

    def _end_block(self, number):
        self.request("DELETE", "/blocks/%d" % number)

    def _last_record(self):
        return self._status()["faults"]

    def _wait_for_records(self, since, matches, count, timeout):
        def next_records(since, seconds):
            # The server waits at most EVENTS_WAIT_MAX. wait_for_records repeats this call.
            return self._records(since=since, wait="%.3f" % min(seconds, EVENTS_WAIT_MAX))
        return wait_for_records(next_records, since, matches, count, timeout)

    def _records(self, **query):
        """Return the FaultRecords that `GET /events` returns for a query."""
        return [FaultRecord(**record)
                for record in self.request("GET", "/events", **query)["events"]]


def error_text(value):
    """Return the text of an error of the control server, or "" if the JSON value is no error."""
    if not isinstance(value, dict):
        return ""
    if "errors" in value:               # the format of Vaurien's own routes
        return "; ".join(error["description"] for error in value["errors"])
    return str(value.get("error", ""))  # the format of Toxiproxy's routes


# The program of the process that start_proxy starts. The program imports this file as a module,
# and calls `main`. The first two arguments of the program are the module's name in the process of
# the test, and the path of this file. A user's handler may import the module as `vaurien`, or by
# its name in the test. sys.modules has both names, so Python does not import this file twice.
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
STARTED_PROCESSES = {}      # {pid: (Popen, pid of the process that called start_proxy)}


class ProxyProcess(int):
    """The result of start_proxy: the pid of the process of a proxy.

    port         the port of the proxy.
    http_port    the port of the control server; 0 if there is no control server.
    """

    port = http_port = 0


def start_proxy(host: str = "localhost", port: int = 8888, http: bool = True, warmup: float = 2,
                *, proxy_host: str = "localhost", proxy_port: int = 8000,
                backend_host: "Optional[str]" = None, backend_port: "Optional[int]" = None,
                protocol: str = "tcp", http_host: str = "localhost", http_port: int = 8080,
                http_token: "Optional[str]" = None, options: "Optional[Sequence[Any]]" = None,
                log_level: str = "info", log_output: str = "-") -> "ProxyProcess":
    """Start a proxy in a process of its own, and wait until it listens.

    host, port       the backend; backend_host and backend_port are other names of host and port.
    proxy_host, proxy_port
                     the address on which the proxy listens; port 0 picks a free port.
    http             whether to start the control server, on http_host and http_port.
    http_token       the bearer token that clients of the control server must send, or None.
    warmup           seconds to wait, at most, until the proxy listens.
    options          further arguments of the command line, like ["--behavior", "20:delay"].

    Returns the pid of the process. The pid has the attributes `port` and `http_port`: see
    ProxyProcess. Raises RuntimeError with the error of the proxy, if the proxy cannot start.

    The proxy runs until `stop_proxy` is called, or until this process ends or is killed.
    """
    backend = format_address((backend_host or host, int(backend_port or port)))
    if isinstance(options, str):
        raise ValueError("options must be a list of arguments, not %r" % options)
    if http_token and not http:
        raise ValueError("http_token needs http=True")
    arguments = ["--backend", backend, "--protocol", protocol,
                 "--proxy", format_address((proxy_host, int(proxy_port))),
                 "--log-level", log_level, "--log-output", log_output]
    if http:
        arguments += ["--http", "--http-host", http_host, "--http-port", str(http_port)]
    environment = dict(os.environ)
    if http_token:
        environment[TOKEN_VARIABLE] = http_token
    return start_process([*arguments, *map(str, options or ())], environment, warmup)


def start_process(arguments, environment, seconds):
    """Start a process of the command `vaurien`, and wait `seconds` until the proxy listens.

    Returns a ProxyProcess. Raises RuntimeError if the proxy does not listen in time.
    """
    program = [sys.executable, "-c", BOOTSTRAP, __name__, os.path.abspath(__file__)]
    # With --attached, the new process prints "ready" and the addresses when the proxy listens, and
    # ends when its parent process ends.
    process = subprocess.Popen(
        [*program, "--attached", *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        universal_newlines=True, env=environment)
    STARTED_PROCESSES[process.pid] = process, os.getpid()
    try:
        addresses = wait_until_ready(process, seconds)
    except BaseException:       # also KeyboardInterrupt: leave no process behind
        stop_proxy(process.pid)
        raise
    pid = ProxyProcess(process.pid)
    first_address, *_ = addresses["proxies"].values()
    _, pid.port = parse_address(first_address)
    if addresses["control"]:
        _, pid.http_port = parse_address(addresses["control"])
    return pid


def wait_until_ready(process, seconds):
    """Return the addresses that a new process prints with announce_ready.

    Raises RuntimeError if the process does not print the addresses in time. The error contains the
    last line that the process has printed.
    """
    lines = []      # of stdout, up to the addresses: [..., "ready", addresses as JSON]

    def is_ready():
        return lines[-2:-1] == ["ready"]

    def read_lines():
        for line in process.stdout:
            lines.append(line.strip())
            if is_ready():
                return

    # The thread makes a time limit possible: a read of a pipe has none.
    reader = threading.Thread(target=read_lines, daemon=True)
    reader.start()
    reader.join(seconds)
    if not is_ready():
        raise RuntimeError("the proxy did not start: %s" % (
            lines[-1] if lines else "no output within %s seconds" % seconds))
    return json.loads(lines[-1])


def stop_proxy(pid: int) -> None:
    """Stop a proxy that `start_proxy` has started, and wait until its process has ended.

    Raises ValueError if `start_proxy` has not returned this pid.
    """
    if not isinstance(pid, int) or pid not in STARTED_PROCESSES:
        raise ValueError("no proxy was started as process %r" % (pid,))
    process, _ = STARTED_PROCESSES.pop(pid)
    with contextlib.suppress(OSError):      # raised if other code has waited for the process
        process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:       # a user's handler ignores SIGTERM
        process.kill()
        process.wait()
    process.stdin.close()
    process.stdout.close()


@atexit.register
def stop_started_proxies():
    """At the end of this process, stop the proxies that this process has started."""
    for pid, (_, starter_pid) in list(STARTED_PROCESSES.items()):
        if starter_pid == os.getpid():      # a fork has a copy of the entries of its parent
            stop_proxy(pid)


# -- pytest -------------------------------------------------------------------
#
# This module is also a plugin of pytest. To load the plugin, write `pytest_plugins = ["vaurien"]`
# in the conftest.py of the top directory. pytest calls the functions and methods whose names
# begin with `pytest_`.

RECORDS_REPORTED = 100      # the most fault records of a proxy in the report of a failed test


def pytest_addoption(parser):
    """Add the option --vaurien-seed to pytest's command line."""
    with contextlib.suppress(ValueError):   # raised if a copy of this module has added the option
        parser.getgroup("vaurien").addoption(
            "--vaurien-seed", metavar="N",
            help="seed of the proxies of the fixture vaurien; by default, a random seed")


def pytest_configure(config):
    """Register the plugin. Without --vaurien-seed, draw a seed for all tests."""
    import pytest  # type: ignore       # not at the top: only this plugin needs pytest
    # The option is missing if pytest has loaded this plugin after the call of pytest_addoption.
    seed = getattr(config.option, "vaurien_seed", None)
    if seed is None:
        seed = random.SystemRandom().getrandbits(32)
    try:
        seed = check_count(seed)
    except ValueError as error:
        raise pytest.UsageError("--vaurien-seed %s" % error) from None
    config.option.vaurien_seed = seed       # pytest-xdist passes the options to its processes
    config.pluginmanager.register(make_pytest_plugin(pytest, seed))


def make_pytest_plugin(pytest, seed):
    """Return the plugin: an object with the fixture and the hooks.

    pytest    the module pytest, whose decorators the class needs.
    seed      the seed of proxies for which the test gives no seed.
    """
    class PytestPlugin:
        def __init__(self):
            self.proxies = {}       # {test item: [Proxy that the fixture has started]}

        def pytest_report_header(self):
            """Return the line that pytest prints before the first test."""
            return "vaurien: --vaurien-seed=%d" % seed

        @pytest.fixture
        def vaurien(self, request):
            """A function that starts a Proxy, and stops the Proxy when the test ends."""
            proxies = self.proxies[request.node] = []
            with contextlib.ExitStack() as stack:       # stops the proxies after the test
                def start(distant, *args, **kwargs):
                    kwargs.setdefault("seed", seed)
                    proxy = stack.enter_context(Proxy(distant, *args, **kwargs))
                    proxies.append(proxy)
                    return proxy
                yield start

        @pytest.hookimpl(hookwrapper=True)
        def pytest_runtest_makereport(self, item, call):
            """Add the faults of a test's proxies to the report of a failed test.

            pytest makes three reports for each test: "setup", "call" and "teardown".
            """
            outcome = yield                     # pytest makes the report here
            report = outcome.get_result()
            proxies = self.proxies.get(item, ())
            if report.when == "teardown":       # the last report of the test
                self.proxies.pop(item, None)
            if report.failed and proxies:
                report.sections.append(("vaurien", "\n".join(map(report_faults, proxies))))

    return PytestPlugin()


def report_faults(proxy):
    """Return the rules and the newest fault records of a Proxy as text."""
    records = proxy.events()
    lines = ["%s -> %s: %s; seed %d; faults: %d" % (
        proxy.name, proxy.get_backend(), proxy.describe(), proxy.seed, proxy.count())]
    if len(records) > RECORDS_REPORTED:
        lines.append("  ... the last %d of %d records:" % (RECORDS_REPORTED, len(records)))
    lines += ["  " + describe_record(record) for record in records[-RECORDS_REPORTED:]]
    return "\n".join(lines)


def describe_record(record):
    """Return a FaultRecord as one line of text."""
    words = [record.handler]
    if record.handler in HANDLERS:      # not "accept", as in the records of an Accept
        words.append(describe_options(HANDLERS[record.handler], record.options))
    if record.toxic:
        words.append("toxic=%s stream=%s" % (record.toxic, record.stream))
    if record.change:
        details = CHANGES[record.change]        # like "a window begins"
    else:
        details = "connection %d, request %d" % (record.connection, record.request)
        if record.text:
            details += ", " + record.text
    return "%d. %s: %s" % (record.number, " ".join(filter(None, words)), details)


# -- Command line -------------------------------------------------------------
#
# The commands `vaurien` and `vaurien serve` read the command line and the --config file, create
# the proxies, and run them.
#
# The table SETTINGS declares the settings. The signature of a handler declares the handler's
# options. The flags, the keys of the ini file and the help are generated from these declarations.
# The command line overrides the file, and the file overrides the defaults.
#
# A setting is a text until the `check` function of the setting parses the text. For an invalid
# text, the check raises ValueError with the end of a sentence, like "must be a host". The method
# SourcedText.parse adds the source of the text: "--http-host must be a host".
#
# To add a setting, add a line to SETTINGS.

# The declaration of a setting:
#
# flags      the flags on the command line. The keys of the ini file are the flags without "--".
# scope      proxy           each proxy has a value of its own.
#            shared          as proxy, but the section [vaurien] sets the default of all proxies,
#                            also of proxies that the API creates.
#            process         the process has one value.
#            command line    the process has one value. Only the command line can set the value.
# default    the text to parse if the setting is not given. None: the value is then None.
# check      the function that parses the text.
# metavar    the placeholder of the value in the help. If the metavar is None, the flag takes no
#            value, and in the file the value is yes or no. If the metavar ends with " ...", the
#            flag may be repeated, and the check gets a text with a line for each value.
# help       the text for --help.
Setting = namedtuple("Setting", "flags scope default check metavar help")


def check_host(text):
    """Return the text if it is a host name or an IP address. Raises ValueError."""
    if not is_valid_host(text):
        raise ValueError("must be a host, like localhost or 127.0.0.1, not %r" % text)
    return text


def check_names(text):
    """Parse "a.example,b.example" into a list of host names. Raises ValueError."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        has_port = ":" in name
        if not name or has_port or not is_valid_host(name):
            raise ValueError("must be NAME[,NAME ...], like chaos.example, not %r" % text)
    return names


def check_log_level(text):
    """Return a log level in the form of `logging`: "info" becomes "INFO". Raises ValueError."""
    check = choice_check("debug", "info", "warning", "error", "critical")
    return check(text.lower()).upper()


def import_handler(name):
    """Import a user's handler, like mine.stutter, if HANDLERS does not have the handler yet.

    Raises ValueError with the end of a sentence: "names the unknown handler 'x': there are ...".
    """
    if name not in HANDLERS and "." in name:
        load_handler(name, path=name)
    if name not in HANDLERS:
        raise ValueError("names the %s; your own needs path.to.callable" % unknown_handler(name))


def check_behavior(text):
    """Parse "20:delay,5:mine.stutter" into [(20.0, "delay"), ...], and import users' handlers."""
    behavior = parse_behavior(text)
    for _, name in behavior:
        import_handler(name)
    return behavior


def check_faults(text):
    """Parse lines like "error percent=20" into Toxics, and import users' handlers."""
    if not text.strip():
        raise ValueError("must be HANDLER [NAME=VALUE ...], not %r" % text)
    toxics = OrderedDict()
    for line in text.splitlines():
        try:
            words = shlex.split(line)
            if words:                   # no empty line
                toxic = parse_fault(words, taken_names=toxics)
                set_once(toxics, toxic.name, toxic, "the name %s" % toxic.name)
        except ValueError as error:
            raise ValueError("%r: %s" % (line.strip(), error)) from None
    return list(toxics.values())


def parse_fault(words, taken_names):
    """Return the Toxic for the words of a fault: HANDLER, NAME=VALUE, ... Raises ValueError.

    taken_names    the names of other faults. If the words set no name, the default name differs.
    """
    type_, texts = parse_rule_words(words)
    import_handler(type_)
    name = texts.pop("name", None)
    if not name:            # the default is `delay`, or `delay_2` if the name `delay` is taken
        name, number = type_, 1
        while name in taken_names:
            number += 1
            name = "%s_%d" % (type_, number)
    # Without these two fields, make_flat_toxic would use Toxic.DEFAULTS, the defaults of the API.
    defaults = {"per": "request", "stream": "both"}
    return make_flat_toxic(type_, check_field("name", check_name, name), texts, defaults)


def settings_table(rows):
    """Return {name: Setting} for rows (name, "FLAG ...", scope, default, check, metavar, help)."""
    return OrderedDict((name, Setting(flags.split(), *others)) for name, flags, *others in rows)


SETTINGS = settings_table([
    ("config", "--config", "command line", None, check_file, "FILE",
     "ini file, or file with Toxiproxy's JSON; the command line overrides the file"),
    ("local", "--local --proxy", "proxy", "localhost:8000", parse_listener, "HOST:PORT",
     "address to listen on; with port 0, the system picks a free port"),
    ("distant", "--distant --backend", "proxy", "localhost:80", parse_backend, "HOST:PORT",
     "address of the backend; to use TLS, write tls://HOST:PORT"),
    ("behavior", "--behavior", "proxy", "100:dummy", check_behavior, "PERCENT:HANDLER,...",
     "handlers, each with the percentage of requests on which it acts"),
    ("toxics", "--fault", "proxy", None, check_faults, "HANDLER ...",
     "a handler that acts beside the behavior, with options and rule fields, like \"error "
     "percent=20 kind=503\"; repeat --fault to add more handlers"),
    ("network", "--network", "proxy", None, check_network, "PROFILE",
     "imitate a network like 3g, dsl or satellite: its latency, data rate and packet loss; see "
     "--help network"),
    ("protocol", "--protocol", "proxy", "tcp", check_protocol, "NAME",
     "application protocol: " + ", ".join(PROTOCOLS)),
    ("overwrite_host_header", "--protocol-http-overwrite-host-header", "proxy", "yes",
     check_yes_no, "YES|NO",
     "with --protocol http: replace the Host header with the backend's address"),
    ("accept", "--accept", "proxy", "normal", check_accept, "MODE",
     "how to accept new clients: normal, refuse (a connect fails) or drop (a connect times out); "
     "for 5 seconds only, write \"refuse duration=5\""),
    ("max_connections", "--max-connections", "proxy", "0", check_count, "N",
     "the most clients to serve at a time; 0 is no limit"),
    *(("tls_" + name, "--tls-" + name.replace("_", "-"), "proxy", None, *field)
      for name, field in TLS_FIELDS.items()),
    ("tls-ca-out", "--tls-ca-out", "process", None, check_file, "FILE",
     "write the certificate of the CA of --tls-cert auto to this PEM file"),
    ("seed", "--seed", "shared", None, check_count, "N",
     "the same seed gives the same faults; by default, vaurien draws a seed and logs it"),
    ("timeout", "--timeout", "shared", "30", check_timeout, "SECONDS",
     "time limit for a connect to the backend, for all its addresses together"),
    ("reuse_port", "--reuse-port", "shared", None, check_reuse_port, "N",
     "share the port with other processes, on Linux; give each process another number N, 1 or "
     "more; the draws depend on N"),
    ("http", "--http", "process", "no", check_yes_no, None, "start the HTTP control server"),
    ("http-host", "--http-host", "process", "localhost", check_host, "HOST",
     "address of the control server"),
    ("http-port", "--http-port", "process", "8080", check_port, "PORT",
     "port of the control server; with 0, the system picks a free port"),
    ("http-token", "--http-token", "process", None, check_token, "TOKEN",
     "clients must send the header Authorization: Bearer TOKEN; to hide the token from other "
     "users of the machine, set $%s instead" % TOKEN_VARIABLE),
    ("http-name", "--http-name", "process", None, check_names, "NAME,...",
     "further names to accept in the Host header; the server always accepts IP addresses, "
     "--http-host, names without a dot, and names under " + ", ".join(UNREBINDABLE)),
    ("statsd", "--statsd", "process", None, parse_address, "HOST:PORT",
     "send all counts to this StatsD server, by UDP, each second"),
    ("record", "--record", "process", None, check_file, "FILE",
     "write each fault to this file, for --replay"),
    ("replay", "--replay", "process", None, check_file, "FILE",
     "repeat the faults of a file that --record has written, on the same connections and "
     "requests; the percentages have no effect"),
    ("log-level", "--log-level", "process", "info", check_log_level, "LEVEL",
     "lowest level to log: debug, info, warning, error or critical"),
    ("log-output", "--log-output", "process", "-", check_file, "FILE",
     "file to log to; - is stderr"),
    ("log-format", "--log-format", "process", "text", choice_check(*LOG_FORMATTERS), "FORMAT",
     "text, or json: each line is an object; the object of a fault has the fault record"),
    ("attached", "--attached", "command line", "no", check_yes_no, None,
     "for supervisors: print \"ready\" on stdout when the proxies listen, and exit when stdin "
     "closes"),
])


def with_scope(settings, *scopes):
    """Return the settings that have one of the scopes."""
    return OrderedDict((name, setting) for name, setting in settings.items()
                       if setting.scope in scopes)


SHARED_SETTINGS = with_scope(SETTINGS, "shared")
PROXY_SETTINGS = with_scope(SETTINGS, "proxy", "shared")
FILE_SETTINGS = with_scope(SETTINGS, "proxy", "shared", "process")
SERVE_SETTINGS = with_scope(SETTINGS, "shared", "process", "command line")
del SERVE_SETTINGS["http"]      # the control server always runs
# Like Toxiproxy's server, `vaurien serve` has the flags --host and --port, and the port 8474.
SERVE_SETTINGS["http-host"] = SETTINGS["http-host"]._replace(flags=["--http-host", "--host"])
SERVE_SETTINGS["http-port"] = SETTINGS["http-port"]._replace(
    flags=["--http-port", "--port"], default="8474")
ADDRESS_SETTINGS = {"local", "distant"}     # in [vaurien], they define the proxy `vaurien`

METAVARS = {bool: "YES|NO", int: "N", float: "NUMBER", str: "TEXT"}     # {type of an option: ...}
PROXY_INTRODUCTION = """\
Vaurien is a chaos TCP proxy. It sits between an application and a backend, and misbehaves
on purpose: requests are delayed, fail, hang or get lost.

examples:
  vaurien demo                                      see it at work
  vaurien --distant localhost:6379 --local localhost:6380 --behavior 20:delay
  vaurien --distant localhost:6379 --local localhost:6380 \\
          --behavior 20:delay,5:error --handlers.delay.sleep 2 --protocol redis
  vaurien --config vaurien.ini --http               change it with curl or vaurienctl

other commands, each with --help:
  vaurien serve    run a server for Toxiproxy's clients, which create the proxies
  vaurien demo     run a backend, a proxy and clients, and print the response times
  vaurien ctl      control a proxy that was started with --http; the same as vaurienctl"""
HELP_WIDTH = 99             # columns of the help
HELP_COLUMN = 31            # the column where the second column of the help begins


class SourcedText:
    """A text from the user, and its source: a flag like "--local", or "FILE: [SECTION] KEY"."""

    def __init__(self, source, text):
        self.source, self.text = source, text

    def parse(self, check, *args):
        """Return check(*args, text). Raises ValueError with "SOURCE must be ..."."""
        return check_field(self.source, check, *args, self.text)


class Parser(argparse.ArgumentParser):
    """A parser of the command line. The parser returns texts, and no default values."""

    def __init__(self, settings, prog):
        super().__init__(
            prog=prog, add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS,
            conflict_handler="resolve",     # if two handlers have the same flag, the last wins
            # Without a fixed width, argparse would spend time on the import of shutil.
            formatter_class=functools.partial(argparse.HelpFormatter, width=HELP_WIDTH))
        self.settings = settings
        self.add_argument("--version", action="version", version="vaurien " + __version__)
        self.add_argument("-h", "--help", nargs="?", const="")      # "": --help without a topic
        for name, setting in settings.items():
            if not setting.metavar:
                self.add_argument(*setting.flags, dest=name, action="store_const", const="yes")
            else:
                action = "append" if setting.metavar.endswith(" ...") else "store"
                self.add_argument(*setting.flags, dest=name, action=action)

    def parse_known_args(self, args=None, namespace=None):
        """Parse arguments. Toxiproxy's long options begin with one dash, like -host=0.0.0.0."""
        end = args.index("--") if "--" in args else len(args)       # no options after "--"
        one_dash_and_two_letters = "^-(?=[a-z]{2})"         # not -h, which has one letter
        options = [re.sub(one_dash_and_two_letters, "--", text) for text in args[:end]]
        return super().parse_known_args(options + args[end:], namespace)

    def error(self, message):
        """Raise ValueError. argparse calls this method for a wrong command line."""
        raise ValueError("%s (see %s --help)" % (message, self.prog))

    def read_settings(self, values):
        """Return the settings of a command line: {name: SourcedText}.

        values    {name: text}, the result of argparse. For a flag that may be repeated, the value
                  is a list of texts.
        """
        texts = {}
        for name, setting in self.settings.items():
            if name in values:
                value = values[name]
                text = "\n".join(value) if isinstance(value, list) else value
                texts[name] = SourcedText(setting.flags[0], text)
        return texts

    def refuse(self, unknown_arguments):
        """Raise ValueError. The error explains the first unknown argument."""
        flag, _, _ = unknown_arguments[0].partition("=")
        handler_flag = HANDLER_FLAG.match(flag)
        if handler_flag:
            name = handler_flag.group("name") or handler_flag.group("old_name")
            option = handler_flag.group("option").replace("-", "_")
            check_field(flag, import_handler, name)     # raises if the handler is unknown
            check_field(flag, check_handler_option, name, option, "")   # if the option is unknown
        flags = ["--version", "--help"]
        for setting in self.settings.values():
            flags += setting.flags
        self.error("unrecognized arguments: %s%s" % (
            " ".join(unknown_arguments), did_you_mean(flag, flags)))

    def add_handler_options(self):
        """Add the flags that set options and rule fields of the handlers."""
        for name, function in HANDLERS.items():
            for option in [*handler_options(function), *settable_fields(function)]:
                self.add_argument(*option_flags(name, option), dest="%s.%s" % (name, option))


# The help of argparse would list every option of every handler. The help of Vaurien is shorter:
# `--help` lists the handlers, and `--help NAME` lists the options of one handler.

def command_help(prog, introduction, settings):
    """Return the help of a command: the introduction, the settings in groups, the handlers."""
    groups = OrderedDict((title, []) for title in ("proxy", "control server", "process"))
    for name, setting in settings.items():
        if name.startswith("tls"):
            continue                            # `--help tls` lists the settings for TLS
        if name.startswith("http"):
            title = "control server"
        elif setting.scope in ("proxy", "shared"):
            title = "proxy"
        else:
            title = "process"
        groups[title].append(setting_row(setting))
    lines = ["usage: %s [OPTION ...]" % prog, "", introduction]
    for title, rows in groups.items():
        if rows:
            lines += ["", title + ":", *format_rows(rows)]
    if "behavior" in settings:
        lines += ["", "handlers, for --behavior and --fault:"]
        lines += ["  %-12s%s" % (name, summary(function)) for name, function in HANDLERS.items()]
    lines += ["", "vaurien --help NAME explains a handler or a protocol. vaurien --help tls lists "
                  "the options", "for TLS."]
    return "\n".join(lines)


def setting_row(setting):
    """Return (flags, help) of a setting, for format_rows."""
    flags = ", ".join(setting.flags)
    if not setting.metavar:
        return flags, setting.help
    return "%s %s" % (flags, setting.metavar), text_with_default(setting.help, setting.default)


def topic_help(name):
    """Return the help of a handler or a protocol. Raises ValueError for an unknown name."""
    protocol_class = PROTOCOLS.get(PROTOCOL_ALIASES.get(name, name))
    if protocol_class:          # PROTOCOLS["tcp"] is None: "tcp" is refused below
        return protocol_help(protocol_class)
    import_handler(name)
    function = HANDLERS[name]
    lines = ["%s: %s" % (name, summary(function)), "",
             "usage: vaurien --behavior PERCENT:%s [OPTION ...]" % name,
             "       vaurien --fault \"%s [NAME=VALUE ...]\"" % name]
    prefix, help_texts = "--handlers.%s." % name, option_help(function)
    rows = []
    for option, default in handler_options(function).items():
        text = text_with_default(help_texts.get(option, ""), format_value(default))
        rows.append(("%s%s %s" % (prefix, option, METAVARS[type(default)]), text))
    if rows:
        lines += ["", "options:", *format_rows(rows)]
    rows = []
    for field in settable_fields(function):
        text = text_with_default(RULE_FIELDS[field].help, RULE_FIELDS[field].default)
        rows.append((prefix + field, text))
    lines += ["", "options of every handler:", *format_rows(rows), "",
              "The ini file has these options in the section [handler:%s], without %s "
              "before" % (name, prefix), "their names."]
    return "\n".join(lines)


def protocol_help(class_):
    """Return the help of a protocol."""
    closing_kinds = [kind for kind in class_.errors
                     if kind in class_.fatal_errors or kind in class_.connect_errors]
    rows = [("kinds of errors", ", ".join(class_.errors)),
            ("drawn without a kind", ", ".join(class_.default_errors))]
    if closing_kinds:
        rows.append(("close the connection", ", ".join(closing_kinds)))
    name = class_.__name__.lower()
    lines = ["%s: %s" % (name, summary(class_)), "",
             "usage: vaurien --protocol %s --behavior PERCENT:error "
             "--handlers.error.kind KIND" % name, "", *format_rows(rows)]
    if class_ is Tls:
        tls_settings = [setting for name, setting in SETTINGS.items() if name.startswith("tls")]
        lines += ["", "options for TLS with the clients (--tls-cert and the options after it), "
                  "and for TLS with a", "backend of --distant tls://HOST:PORT (--tls-ca and the "
                  "options after it):", *format_rows(map(setting_row, tls_settings))]
    return "\n".join(lines)


def text_with_default(text, default):
    return text if default in (None, "") else "%s (default: %s)" % (text, default)


def format_rows(rows):
    """Return the lines of a table of the help. A row is (flag, help)."""
    lines, indent = [], " " * HELP_COLUMN
    for flag, text in rows:
        first_column = "  " + flag
        if len(first_column) > HELP_COLUMN - 2:     # the help begins in the next line
            lines.append(first_column)
            first_column = ""
        lines += textwrap.wrap(text, HELP_WIDTH, initial_indent=first_column.ljust(HELP_COLUMN),
                               subsequent_indent=indent) or [first_column]  # wrap("") is []
    return lines


def settable_fields(function):
    """Return the names of the rule fields with a flag like --handlers.delay.times.

    The argument `function` is the handler. If an option of the handler has the name of a rule
    field, the flag sets the option. `percent`, which --behavior sets, is not in FIELD_DEFAULTS.
    """
    return [field for field in FIELD_DEFAULTS if is_rule_field(function, field)]


def option_flags(handler_name, option):
    """Return the flags for an option of a handler: the flag in the help, then those of 1.x."""
    flags = ["--handlers.%s.%s" % (handler_name, option),
             "--behavior-%s-%s" % (handler_name, option),
             "--behavior-%s-%s" % (handler_name, option.replace("_", "-"))]
    return list(OrderedDict.fromkeys(flags))        # without duplicates


# matches --handlers.mine.stutter.max_size, --behavior-stutter-max_size and
# --behavior-stutter-max-size
HANDLER_FLAG = re.compile(
    r"--(?:handlers\.(?P<name>.+)\.|behavior-(?P<old_name>[^-]+)-)(?P<option>[^.]+)$")


def check_handler_option(handler_name, option, text):
    """Check a text for an option or rule field of a handler, as check_field calls a check."""
    if not is_rule_field(HANDLERS[handler_name], option):
        check_option(handler_name, option, text)
    elif option == "percent":
        raise ValueError("is set in the behavior, like 20:%s" % handler_name)
    else:
        RULE_FIELDS[option].check(text)


class ParsedConfig:
    """The content of the command line and of the --config file. The texts are SourcedTexts."""

    def __init__(self):
        self.arguments = {}                     # settings of the command line: {setting: text}
        self.vaurien_section = {}               # settings of [vaurien]: {setting: text}
        self.proxy_sections = OrderedDict()     # of [proxy:NAME]: {proxy name: {setting: text}}
        self.options = {}       # options and rule fields: {handler name: {option: text}}
        self.toxics = []        # of [toxic:NAME]: [(Toxic, text of the proxy name or None)]
        self.json_file = None   # the path and the text of a JSON file, as a SourcedText

    def global_settings(self):
        """Return the settings of [vaurien] and of the command line, which overrides [vaurien]."""
        return ChainMap(self.arguments, self.vaurien_section)

    def check_settings(self, command_settings):
        """Check all settings, also settings of the file that the command line overrides.

        Raises ValueError. The checks of --behavior and --fault import users' handlers.
        """
        for texts in [self.arguments, self.vaurien_section, *self.proxy_sections.values()]:
            for name, sourced in texts.items():
                # The file may have settings for which the command has no flag.
                setting = command_settings.get(name) or SETTINGS[name]
                sourced.parse(setting.check)


def read_arguments(argv, settings, prog="vaurien", introduction=""):
    """Return the ParsedConfig of a command line and of its --config file. Raises ValueError.

    The argument `introduction` is the beginning of the help. With --help, this function prints the
    help and raises SystemExit.

    The command line is parsed twice. After the first pass, check_settings imports the users'
    handlers that --behavior and --fault name. The second pass knows the flags of all handlers.
    """
    parser = Parser(settings, prog)
    namespace, _ = parser.parse_known_args(argv)
    values = vars(namespace)
    arguments = parser.read_settings(values)
    config = ParsedConfig()
    if "config" in arguments:
        config = read_config(arguments["config"].parse(check_file))
    config.arguments = arguments
    config.check_settings(settings)
    if "help" in values:
        topic = values["help"]          # may be a user's handler that the file has imported
        if topic:
            text = check_field("--help", topic_help, topic)
        else:
            text = command_help(prog, introduction, settings)
        print_safe(text, sys.stdout)
        raise SystemExit(0)
    parser.add_handler_options()
    namespace, unknown_arguments = parser.parse_known_args(argv)
    if unknown_arguments:
        parser.refuse(unknown_arguments)
    add_options(config, vars(namespace))
    return config


def add_options(config, values):
    """Add the handlers' options of a command line to the options of the file. Raises ValueError.

    values    {key: text}. A key is HANDLER.OPTION, or the name of a setting.
    """
    for name, text in values.items():
        if "." in name:
            handler_name, _, option = name.rpartition(".")      # HANDLER may be a dotted path
            first_flag, *_ = option_flags(handler_name, option)
            check_field(first_flag, check_handler_option, handler_name, option, text)
            options = config.options.setdefault(handler_name, {})
            options[option] = SourcedText(first_flag, text)


def read_config(path):
    """Return the ParsedConfig of a file, JSON or ini. Raises ValueError."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
    except OSError as error:
        raise ValueError("cannot read %s: %s" % (path, error.strerror)) from None
    except ValueError as error:         # the file is not UTF-8
        raise ValueError("cannot read %s: %s" % (path, error)) from None
    is_json = re.match(r"\s*(\{|\[\s*[]{])", text)      # no ini file begins with {, [{ or []
    if is_json:
        config = ParsedConfig()
        config.json_file = SourcedText(path, text)
        return config
    return read_ini(path, text)


def read_ini(path, text):
    """Return the ParsedConfig of an ini file, and import its handlers. Raises ValueError."""
    config, proxy_sections, toxic_sections = ParsedConfig(), OrderedDict(), OrderedDict()
    for title, texts in parse_ini(path, text):
        source = "%s: [%s]" % (path, title)
        kind, _, name = (part.strip() for part in title.partition(":"))
        if title.strip() == "vaurien":
            set_once(proxy_sections, "vaurien", settings_by_name(texts, FILE_SETTINGS), source)
        elif kind == "proxy" and name:
            set_once(proxy_sections, name, settings_by_name(texts, PROXY_SETTINGS), source)
        elif kind in ("handler", "behavior") and name:      # [behavior:NAME]: Vaurien 1.x
            read_ini_handler(name, source, texts, config.options)
        elif kind == "toxic" and name:
            set_once(toxic_sections, name, texts, source)
        else:
            raise ValueError("%s is not a section%s: there are [vaurien], [proxy:NAME], "
                             "[handler:NAME] and [toxic:NAME]" % (source, did_you_mean(
                                 kind, ["vaurien", "proxy", "handler", "toxic"])))
    # A file cannot have [vaurien] and [proxy:vaurien]: they are two titles of the same section.
    config.vaurien_section = proxy_sections.pop("vaurien", {})
    config.proxy_sections = proxy_sections
    # Toxics are read last, because a toxic may use a handler that a later section imports.
    config.toxics = [read_ini_toxic(name, "%s: [toxic:%s]" % (path, name), texts)
                     for name, texts in toxic_sections.items()]
    return config


def parse_ini(path, text):
    """Yield (title, {key: SourcedText}) for each section of an ini file. Raises ValueError."""
    parser = configparser.ConfigParser(
        default_section="",             # no section sets defaults for all sections
        interpolation=None)             # expand_env replaces ${NAME}
    parser.optionxform = str  # type: ignore    # keep the case of keys
    try:
        parser.read_string(text, path)
    except (ValueError, configparser.Error) as error:
        raise ValueError("cannot read %s: %s" % (path, " ".join(str(error).split()))) from None
    for title in parser.sections():
        check_field("%s: the name of a section" % path, check_name, title)
        texts = {}
        for key, value in parser.items(title):
            source = "%s: [%s] %s" % (path, title, key)
            texts[key] = SourcedText(source, check_field(source, expand_env, value))
        yield title, texts


def read_ini_handler(name, source, texts, options):
    """Import the handler of a section [handler:NAME], and add the section's options to `options`.

    Raises ValueError.
    """
    if "callable" in texts:             # the dotted path of a user's handler
        texts.pop("callable").parse(load_handler, name)
    check_field(source, import_handler, name)
    for option, text in texts.items():
        text.parse(check_handler_option, name, option)
        set_once(options.setdefault(name, {}), option, text, text.source)


def read_ini_toxic(name, source, texts):
    """Return (Toxic, proxy name) of a section [toxic:NAME]. Raises ValueError.

    The proxy name is a SourcedText, or None if the section has no key `proxy`.
    """
    proxy_name = texts.pop("proxy", None)
    if "type" not in texts:
        raise ValueError("%s needs type = HANDLER: there are %s"
                         % (source, ", ".join(sorted(HANDLERS))))
    type_ = texts.pop("type")
    type_.parse(import_handler)
    plain_texts = {key: text.text for key, text in texts.items()}
    toxic = check_field(source, make_flat_toxic, type_.text, name, plain_texts)
    return toxic, proxy_name


def expand_env(text):
    """Replace each ${NAME} by the value of the environment variable NAME. Raises ValueError."""
    def value_of(reference_match):
        name = reference_match.group(1)
        if name not in os.environ:
            raise ValueError("needs ${%s}, which is not set in the environment" % name)
        return os.environ[name]

    reference = r"\$\{([^}]*)\}"
    without_references = re.sub(reference, "", text)
    if "${" in without_references:
        raise ValueError("has a ${ without its }: %r" % text)
    return re.sub(reference, value_of, text)


def settings_by_name(texts, settings):
    """Return the settings of an ini section: {name: SourcedText}. Raises ValueError.

    texts    {key: SourcedText}. The key of the setting with the flag --http-port is http-port or
             http_port.
    """
    names = {}          # {flag without "--": name of the setting}
    for name, setting in settings.items():
        names.update((flag.lstrip("-"), name) for flag in setting.flags)
    named_texts = {}
    for key, text in texts.items():
        flag = key.replace("_", "-")
        if flag not in names:
            raise ValueError("%s is not a setting%s: there are %s" % (
                text.source, did_you_mean(flag, names), ", ".join(names)))
        set_once(named_texts, names[flag], text, text.source)
    return named_texts


def set_once(target, key, value, subject):
    """Set target[key]. If target has the key, raise ValueError: "SUBJECT is set twice"."""
    if key in target:
        raise ValueError("%s is set twice" % subject)
    target[key] = value


def resolve_settings(texts, settings):
    """Return {name: parsed value} for all settings. Raises ValueError.

    texts    {name: SourcedText} of the settings that are given. The others have their defaults.
    """
    values = {}
    for name, setting in settings.items():
        if name in texts:
            values[name] = texts[name].parse(setting.check)
        elif setting.default is None:
            values[name] = None
        else:
            values[name] = setting.check(setting.default)
    return values


def has_vaurien_proxy(config, needs_proxy):
    """Return whether there is a proxy `vaurien`, beside the proxies of [proxy:NAME] sections."""
    if config.proxy_sections:       # then --local and --distant do not define a further proxy
        return bool(ADDRESS_SETTINGS & set(config.vaurien_section))
    if ADDRESS_SETTINGS & set(config.global_settings()):
        return True
    return needs_proxy and not config.json_file     # no setting and no file defines a proxy


def proxy_settings(config, needs_proxy):
    """Return the settings of each proxy: {name: ChainMap of {setting: SourcedText}}.

    Raises ValueError if it is unclear which proxy --local or --distant is for.
    """
    settings, arguments = OrderedDict(), dict(config.arguments)
    if has_vaurien_proxy(config, needs_proxy):
        settings["vaurien"] = config.global_settings()
        for name in ADDRESS_SETTINGS:
            arguments.pop(name, None)       # --local and --distant are for `vaurien` only
        inherited_names = set(SHARED_SETTINGS)      # [vaurien] has its other settings for itself
    else:                                   # [vaurien] is no proxy, and only has defaults
        inherited_names = {*SHARED_SETTINGS, "behavior", "network", "toxics"}
        if len(config.proxy_sections) > 1 and ADDRESS_SETTINGS & set(arguments):
            raise ValueError("--local and --distant are ambiguous: the file has the proxies %s"
                             % ", ".join(config.proxy_sections))
    inherited = {name: text for name, text in config.vaurien_section.items()
                 if name in inherited_names}
    for name, section in config.proxy_sections.items():
        settings[name] = ChainMap(arguments, section, inherited)    # earlier dicts override
    return settings


def make_proxies(config, needs_proxy=True):
    """Return a ProxyTable with the proxies of a ParsedConfig. Raises ValueError.

    needs_proxy    True: if the user configures no proxy, make a proxy with default addresses.
    """
    proxies = ProxyTable(**resolve_settings(config.global_settings(), SHARED_SETTINGS))
    options = option_texts(config)
    for name, texts in proxy_settings(config, needs_proxy).items():
        values = resolve_settings(texts, PROXY_SETTINGS)
        faults = values["toxics"] or []
        values["toxics"] = [*network_toxics(values.pop("network"), faults), *faults]
        if values["seed"] is None:
            values["seed"] = proxies.shared["seed"]     # drawn by ProxyTable
        values["tls"] = {field: values.pop("tls_" + field) for field in TLS_FIELDS}
        try:
            proxies[name] = ProxyServer(name=name, options=options, **values)
        except ValueError as error:
            if name == "vaurien":       # the invalid setting may be from the command line
                raise
            raise ValueError("[proxy:%s] %s" % (name, error)) from None
    if config.json_file:
        read_json_proxies(config, proxies)
    for toxic, proxy_name in config.toxics:
        attach_toxic(proxies, toxic, proxy_name)
    return proxies


def network_toxics(profile, faults):
    """Return a list with the toxic for the profile of --network, or [] without a profile.

    Raises ValueError if a fault has the name `network`.
    """
    if not profile:
        return []
    if "network" in [fault.name for fault in faults]:
        raise ValueError("the fault network needs another name, because --network has it")
    return [make_toxic("network", name="network", fields={"stream": "both"},
                       attributes={"profile": profile})]


def option_texts(config):
    """Return the options of the handlers: {handler name: {option: text}}. Raises ValueError."""
    all_texts = {}
    for name, options in config.options.items():
        texts = {option: sourced.text for option, sourced in options.items()}
        try:
            read_rules([dict(texts, name=name)])    # checks whether the options fit together
        except InputError as error:
            option, sentence = error.errors[0]      # ("sleep", "sleep must be a number ...")
            raise ValueError(options[option].source + sentence[len(option):]) from None
        all_texts[name] = texts
    return all_texts


def unused_options(config, used_handlers):
    """Return where the options that have no effect were set, like "FILE: [SECTION] KEY".

    used_handlers    the names of the handlers in all behaviors. Toxics have their own options.

    Raises ValueError if an option of the command line has no effect. In the file, an option
    without effect is no error, because other command lines may use the same file.
    """
    unused = []
    for name, options in config.options.items():
        if name in used_handlers:
            continue
        for option, sourced in options.items():
            is_flag = sourced.source.startswith("--")
            if is_flag:
                raise ValueError(
                    "%s has no effect: add %s to the behavior, like --behavior 20:%s, or use "
                    "--fault %s.%s=%s" % (sourced.source, name, name, name, option, sourced.text))
            unused.append(sourced.source)
    return unused


def read_json_proxies(config, proxies):
    """Add the proxies of a file with Toxiproxy's JSON to the ProxyTable. Raises ValueError."""
    if not proxies:     # otherwise, the arguments are for the proxy of --local and --distant
        for name, text in config.arguments.items():
            if SETTINGS[name].scope == "proxy":
                raise ValueError("%s has no effect on the proxies of a JSON file, which have "
                                 "toxics of their own" % text.source)
    problem = "cannot read %s:" % config.json_file.source
    try:
        for proxy, _fields, json_object in read_proxies(config.json_file.text, proxies):
            set_once(proxies, proxy.name, proxy, "%s %s" % (problem, proxy.name))
            proxies.warnings += proxy_warnings(json_object)
    except (ApiError, InputError) as error:
        raise ValueError("%s %s" % (problem, in_plain_words(str(error)))) from None


def attach_toxic(proxies, toxic, proxy_name):
    """Add a toxic of the ini file to a proxy. Raises ValueError.

    proxy_name    a SourcedText. If the name is None, there must be exactly one proxy.
    """
    source = "[toxic:%s]" % toxic.name
    if not proxies:
        raise ValueError("%s needs a proxy, but there is none" % source)
    if proxy_name:
        existing_name = proxy_name.parse(choice_check(*proxies))
        proxy = proxies[existing_name]
    elif len(proxies) == 1:
        proxy, = proxies.values()
    else:
        raise ValueError("%s needs proxy = one of %s" % (source, ", ".join(proxies)))
    if toxic.name in [fault.name for fault in proxy.toxics]:
        raise ValueError("%s needs another name, because a fault has it" % source)
    # install_rules raises ValueError if the toxic does not fit the protocol.
    check_field(source, proxy.install_rules, proxy.behavior, proxy.blocks, [*proxy.toxics, toxic])


def start_log(level, output, format_):
    """Log to the file `output`, or to stderr if `output` is "-". Raises ValueError."""
    fd = 2                              # stderr
    if output != "-":
        try:
            fd = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise ValueError("cannot log to %s: %s" % (output, error.strerror)) from None
    log_handler = LogThread(fd)
    log_handler.setFormatter(LOG_FORMATTERS[format_])
    logging.raiseExceptions = False     # print no traceback if a line cannot be formatted
    log.addHandler(log_handler)
    log.setLevel(level)
    log.propagate = False               # handlers of the root logger would write each line again


def is_main_thread():
    """Return whether this is the main thread. Only the main thread can handle OS signals."""
    return threading.current_thread() is threading.main_thread()


def serve(services, attached):
    """Run services (proxies, the control server ...) until an OS signal stops them. Returns 0.

    attached    whether to print "ready" when all services listen, and to stop also when stdin
                closes or the parent process ends.

    Raises OSError if a service cannot listen, or if the system permits too few descriptors.
    """
    fd_limit = raise_fd_limit()
    if 0 < fd_limit < FDS_MIN:          # 0 means that the limit is unknown
        raise OSError("%d descriptors are too few: at least %d are needed (ulimit -n)"
                      % (fd_limit, FDS_MIN))
    parent_pid = os.getppid()           # read before "ready": the parent may exit after "ready"
    loop = Loop()
    if is_main_thread():
        handle_signals(loop)
        SEARCH_LIMIT.enable()       # the time limit for searches of `match`
    try:
        for service in services:        # if a bind fails, no service has accepted a connection
            service.bind()
        for service in services:
            service.open(loop)
        reduce_garbage_collection()
        if attached:
            announce_ready(services)
            loop.run_in_thread(wait_for_stdin_end, lambda *_: loop.stop())
            watch_parent(loop, parent_pid)
        loop.run()
    finally:
        for service in services:
            service.close()
        if is_main_thread():
            signal.set_wakeup_fd(-1)    # the loop closes the descriptor that handle_signals set
        loop.close()
    return 0


def reduce_garbage_collection():
    """Let Python search less often for objects that refer to each other in a cycle.

    The objects of connections are in no cycle. With Python's default threshold (700 to 2,000 new
    objects), the garbage collector takes 15 % of the time of 1,000 delayed requests.
    """
    gc.set_threshold(GC_THRESHOLD)
    gc.collect()
    if hasattr(gc, "freeze"):           # later collections skip all objects that exist now
        gc.freeze()


def handle_signals(loop):
    """Stop a loop when an OS signal arrives: SIGTERM, SIGINT (Ctrl-C) or SIGHUP.

    The kernel sends SIGHUP when the terminal closes. If nohup has started this process, SIGHUP
    stays without effect.
    """
    signums = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signums.append(signal.SIGHUP)
    for signum in signums:
        signal.signal(signum, lambda *_: loop.stop())
    # On Windows, a byte on the wakeup socket ends select(), but a signal does not. With
    # set_wakeup_fd, Python writes a byte when a signal arrives.
    signal.set_wakeup_fd(loop.wakeup_send.fileno())


def announce_ready(services):
    """Print "ready" and the addresses for the parent process, then redirect stdout to stderr.

    The addresses are a line of JSON: {"proxies": {name: "HOST:PORT"}, "control": "HOST:PORT"}.
    Without a control server, "control" is null.

    The parent process does not read more than "ready" and the addresses. Without the redirection,
    the output of handlers would fill the pipe, and then `print` would block the proxy.
    """
    addresses = {"proxies": {}, "control": None}
    for service in services:
        if isinstance(service, ProxyTable):
            addresses["proxies"] = {proxy.name: proxy.listen for proxy in service.values()}
        elif isinstance(service, Control):
            addresses["control"] = format_address(service.listener.address())
    print("ready\n" + json.dumps(addresses), flush=True)
    stdout_fd, stderr_fd = 1, 2
    with contextlib.suppress(OSError):      # stderr may be closed
        os.dup2(stderr_fd, stdout_fd)


def watch_parent(loop, parent_pid):
    """Check each half second whether the parent process has ended, and if so, stop the loop.

    If the parent is killed, stdin may stay open, because another child of the parent may hold the
    other end of the pipe.
    """
    if os.getppid() == parent_pid:
        loop.call_at(loop.clock() + 0.5, lambda: watch_parent(loop, parent_pid))
    else:                   # when a parent ends, the kernel gives its child another parent
        loop.stop()


def wait_for_stdin_end():
    """Read stdin until its end, and discard the bytes.

    sys.stdin.read would hold a lock that Python needs for its exit. os.read uses no lock.
    """
    stdin_fd = 0
    while os.read(stdin_fd, 4096):
        pass


# The function of a command checks the arguments of the command line, raises ValueError for bad
# input, and returns a second function. `main` calls the second function, which does the work and
# returns the exit status.

SERVE_INTRODUCTION = """\
Run a server for Toxiproxy's clients, which create and remove proxies through its API.

The file of --config may define proxies that exist from the start. The file is an ini file,
or has Toxiproxy's JSON. The flags of Toxiproxy's server work too, for example -host=0.0.0.0.
-proxy-metrics and -runtime-metrics change nothing: GET /metrics is always enabled."""


def proxy_command(argv):
    """The command `vaurien [OPTION ...]`: run the proxies of the command line and of the file."""
    config = read_arguments(argv, SETTINGS, "vaurien", PROXY_INTRODUCTION)
    values = resolve_process_settings(config, SETTINGS)
    for name, sourced in config.global_settings().items():
        if name.startswith("http-") and not values["http"]:
            raise ValueError("%s needs --http" % sourced.source)
    proxies = make_proxies(config)
    if not proxies and not values["http"]:      # the file is an empty JSON list
        raise ValueError("%s defines no proxy: add one, or set --http to create them through "
                         "the API" % config.arguments["config"].text)
    return prepare(config, proxies, values)


def serve_command(argv):
    """The command `vaurien serve`: run the control server, and the proxies of the file."""
    # Toxiproxy's flags for metrics have no effect, because GET /metrics is always enabled.
    argv = [text for text in argv
            if not re.fullmatch("--?(proxy|runtime)-metrics(=.*)?", text)]
    config = read_arguments(argv, SERVE_SETTINGS, "vaurien serve", SERVE_INTRODUCTION)
    values = resolve_process_settings(config, SERVE_SETTINGS)
    values["http"] = True
    return prepare(config, make_proxies(config, needs_proxy=False), values, TOXIPROXY)


def resolve_process_settings(config, settings):
    """Return the parsed values of the settings with the scope `process`: {name: value}."""
    return resolve_settings(config.global_settings(), with_scope(settings, "process"))


def prepare(config, proxies, values, dialect=VAURIEN_1):
    """Prepare the recording, the services and the log. Returns a function that runs the services.

    values     parsed values of the settings with the scope `process`: {name: value}.
    dialect    the Dialect of the control server's errors.
    """
    proxies.recorder, proxies.replay = make_recording(values["record"], values["replay"])
    # A test sets its rules through the control server. Without a control server, a replay of the
    # test's faults needs the rules of the recording.
    if proxies.replay and not values["http"]:
        for proxy in proxies.values():
            proxy.use_rules_of(proxies.replay)
    used_handlers = {rule.name for proxy in proxies.values() for rule in proxy.behavior}
    unused = unused_options(config, used_handlers)      # may raise ValueError: not after start_log
    services = [proxies]
    if values["http"]:
        services.append(Control((values["http-host"], values["http-port"]), proxies,
                                get_token(values["http-token"]), values["http-name"] or (),
                                dialect))
    if values["tls-ca-out"]:
        write_ca(values["tls-ca-out"])
    if values["statsd"]:
        services.append(Statsd(values["statsd"], proxies))
    start_log(values["log-level"], values["log-output"], values["log-format"])
    for source in unused:
        log.warning("%s has no effect: no behavior has this handler", source)
    return lambda: serve(services, "attached" in config.arguments)


def write_ca(path):
    """Write the CA certificate for --tls-cert auto to a file. Raises ValueError."""
    try:
        with open(path, "w", encoding="ascii") as file:
            file.write(AUTHORITY.pem())
    except OSError as error:
        raise ValueError("--tls-ca-out: cannot write %s: %s" % (path, error.strerror)) from None


def get_token(option_text):
    """Return the token of --http-token or of the environment, or None. Raises ValueError."""
    source, text = "--http-token", option_text
    if not text:
        source, text = TOKEN_VARIABLE, os.environ.get(TOKEN_VARIABLE)
    return check_field(source, check_token, text) if text else None


def print_error(message, status, attached=False, prog="vaurien"):
    """Print an error in one line on stderr. Returns `status`, the exit status.

    attached    whether to print the error on stdout, too, because a supervisor reads stdout.
    prog        the name of the command, at the start of the line.
    """
    text = escape_control_chars(" ".join(str(message).split()))
    print_safe("%s: %s" % (prog, text), sys.stderr)
    if attached:
        print_safe(text, sys.stdout)
    return status


def print_safe(text, file):
    """Print a text to sys.stdout or sys.stderr. Escapes characters that the encoding lacks."""
    if file is None:                    # the stream was closed when Python started
        return
    encoding = getattr(file, "encoding", None) or "ascii"       # a user's stream may have none
    print(text.encode(encoding, "backslashreplace").decode(encoding), file=file, flush=True)


# -- Demo ---------------------------------------------------------------------
#
# `vaurien demo` runs a backend, a proxy and clients in one process. Each client makes one request
# on a connection of its own. The output is a histogram of the response times, and a comparison of
# the requests with a fault and the requests without a fault.

DEMO_BODY = b"Hello from the backend of the demo.\n" * 8
DEMO_SECONDS = 1.5                  # seconds in which all requests start, at even intervals
DEMO_TIMEOUT = 3.0                  # time limit of a client for connect, send and recv
DEMO_INTRODUCTION = """\
Run a backend, a proxy and clients in one process. Each client makes one request through
the proxy, and the handlers act on some of the requests. A histogram shows the response
times."""
DEMO_NEXT_STEP = """\
Next: try --behavior 20:error, or put vaurien in front of a backend of your own:
vaurien --local localhost:8000 --distant HOST:PORT --behavior 20:delay"""
DEMO_SETTINGS = OrderedDict((
    ("behavior", SETTINGS["behavior"]._replace(default="20:delay")),
    ("seed", SETTINGS["seed"]._replace(default="2", help="the same seed gives the same faults")),
    ("requests", Setting(
        ["--requests"], "process", "120",
        number_check(int, "a whole number from 10 to 1000", lambda count: 10 <= count <= 1000),
        "N", "number of requests to make")),
))

# The bars of the histogram: (limit in seconds, label). A request belongs to the first bar whose
# limit is above the response time.
BARS = ((0.001, "under 1 ms"), (0.002, "1 - 2 ms"), (0.005, "2 - 5 ms"), (0.01, "5 - 10 ms"),
        (0.02, "10 - 20 ms"), (0.05, "20 - 50 ms"), (0.1, "50 - 100 ms"), (0.2, "100 - 200 ms"),
        (0.5, "200 - 500 ms"), (1, "0.5 - 1 s"), (2, "1 - 2 s"), (5, "2 - 5 s"),
        (math.inf, "over 5 s"))
HISTOGRAM_WIDTH = 70                # columns of a label and its bar together
PROGRESS_WIDTH = 40                 # columns of the progress bar

# The result of one request:
#
# client     the client's address, as text.
# began      the time.time() when the request began.
# seconds    the duration of the request.
# failure    the reason why the request failed, or "" if it succeeded.
Outcome = namedtuple("Outcome", "client began seconds failure")


def demo_command(argv):
    """Return a function that runs `vaurien demo`. Raises ValueError."""
    config = read_arguments(argv, DEMO_SETTINGS, "vaurien demo", DEMO_INTRODUCTION)
    values = resolve_settings(config.arguments, DEMO_SETTINGS)
    unused_options(config, {name for _, name in values["behavior"]})    # raises if there are any
    return lambda: run_demo(values["requests"], behavior=values["behavior"], seed=values["seed"],
                            options=option_texts(config))


def run_demo(count, **proxy_arguments):
    """Make `count` requests through a Proxy, and print the results. Returns the exit status."""
    if is_main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)   # SIGTERM acts like Ctrl-C
    backend = start_backend()
    try:
        with Proxy(backend.server_address, **proxy_arguments) as proxy:
            print("A backend on %s, and vaurien in front of it on 127.0.0.1:%d:\n"
                  "%s; seed %s.\n%d requests:\n"
                  % (format_address(backend.server_address), proxy.port, proxy.describe(),
                     proxy.seed, count), flush=True)
            outcomes = make_requests(proxy.port, count)
            faults = match_faults(outcomes, proxy.events())
    finally:
        backend.shutdown()
        backend.server_close()
    print("\n".join([*format_histogram(outcomes), "", *summarize(outcomes, faults), "",
                     DEMO_NEXT_STEP]))
    return 0


def start_backend():
    """Start an HTTP server that replies to each GET request with DEMO_BODY. Returns the server."""
    # Only the demo needs these modules, and each import slows down the start.
    import http.server
    import socketserver

    class Backend(socketserver.ThreadingMixIn, socketserver.TCPServer):
        daemon_threads = True
        request_queue_size = 128        # connections that wait for accept(), at most

        def handle_error(self, request, client_address):
            """Print no traceback, because the proxy breaks connections on purpose."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(DEMO_BODY)))
            self.end_headers()
            self.wfile.write(DEMO_BODY)

        def log_message(self, *args):
            """Print nothing about a request."""

    backend = Backend(("127.0.0.1", 0), Handler)
    threading.Thread(target=backend.serve_forever, kwargs={"poll_interval": 0.05},
                     daemon=True).start()
    return backend


def make_requests(port, count):
    """Make `count` requests, each in a thread of its own, and return a list of Outcomes."""
    outcomes = []
    threads = [threading.Thread(target=lambda: outcomes.append(make_request(port)), daemon=True)
               for _ in range(count)]
    start = time.monotonic()
    try:
        for index, thread in enumerate(threads):
            start_at = start + index * DEMO_SECONDS / count
            time.sleep(max(0, start_at - time.monotonic()))
            thread.start()
            show_progress(len(outcomes), count)
        for thread in threads:
            while thread.is_alive():
                thread.join(0.05)           # wait 50 ms at most, then update the progress bar
                show_progress(len(outcomes), count)
    finally:
        overwrite_line("")          # erase the progress bar
    return outcomes


def show_progress(done, count):
    """Show a progress bar: `done` of `count` requests have an Outcome."""
    bar = "#" * (PROGRESS_WIDTH * done // count)
    overwrite_line("[%-*s] %d/%d" % (PROGRESS_WIDTH, bar, done, count))


def overwrite_line(text):
    """Replace the current line of stderr by a text, if stderr is a terminal."""
    if sys.stderr is not None and sys.stderr.isatty():
        # \r moves the cursor to the start of the line. Spaces up to column 60 hide the old text.
        sys.stderr.write("\r%-60s\r" % text)
        sys.stderr.flush()


def make_request(port):
    """Make a GET request on a new connection, and return its Outcome."""
    connection = http_client.HTTPConnection("127.0.0.1", port, timeout=DEMO_TIMEOUT)
    client, failure = "", ""
    began, start = time.time(), time.monotonic()
    try:
        connection.connect()
        client = format_address(connection.sock.getsockname())
        connection.request("GET", "/")
        response = connection.getresponse()
        if response.read() != DEMO_BODY or response.status != 200:
            failure = "a wrong answer"
    except socket.timeout:
        failure = "no answer in %g s" % DEMO_TIMEOUT
    except (ConnectionError, http_client.IncompleteRead):
        failure = "connection closed"
    except (http_client.HTTPException, ValueError):
        failure = "a wrong answer"
    except OSError as error:            # for example, no free file descriptor
        failure = error.strerror or "no connection"
    finally:
        connection.close()
    return Outcome(client, began, time.monotonic() - start, failure)


def match_faults(outcomes, records):
    """Return the requests that met a fault: {Outcome: name of the handler}.

    records    fault records of the proxy.

    This function also compares times, because a later client may get the port of an earlier one.
    """
    return {outcome: record.handler for outcome in outcomes for record in records
            if record.client == outcome.client
            and outcome.began <= record.time <= outcome.began + outcome.seconds}


def format_histogram(outcomes):
    """Return the lines of the histogram: a line for each bar, then for each reason of a failure.

    Bars without requests at the start and the end are left out.
    """
    counts = Counter(bar_index(outcome.seconds) for outcome in answered_only(outcomes))
    rows, lines = [], []            # rows: [(label, number of requests)]
    if counts:
        lines.append("answered in")
        for index in range(min(counts), max(counts) + 1):
            _, label = BARS[index]
            rows.append((label, counts[index]))
    rows += sorted(count_failures(outcomes).items())
    label_width = max(len(label) for label, _ in rows)
    largest_count = max(count for _, count in rows)
    # A bar has a column for each request, or fewer columns if the largest count does not fit.
    columns_per_request = min(1.0, (HISTOGRAM_WIDTH - label_width) / largest_count)
    for label, count in rows:
        line = "  %*s" % (label_width, label)
        if count:
            columns = max(1, int(count * columns_per_request))
            line += "  %s %d" % ("#" * columns, count)
        lines.append(line)
    return lines


def bar_index(seconds):
    """Return the index in BARS of the bar for a response time."""
    return next(index for index, (limit, _) in enumerate(BARS) if seconds < limit)


def count_failures(outcomes):
    """Return {failure: number of requests with the failure}."""
    return Counter(outcome.failure for outcome in outcomes if outcome.failure)


def answered_only(outcomes):
    """Return the Outcomes of the requests that got the right response."""
    return [outcome for outcome in outcomes if not outcome.failure]


def summarize(outcomes, faults):
    """Return sentences about the requests with a fault, and about the requests without a fault.

    faults    {Outcome: name of the handler} of the requests that met a fault.
    """
    unaffected = [outcome for outcome in outcomes if outcome not in faults]
    answered, failures = answered_only(unaffected), count_failures(unaffected)
    normal_seconds = median_seconds(answered)
    lines = []
    for handler_name in sorted(set(faults.values())):
        affected = [outcome for outcome in outcomes if faults.get(outcome) == handler_name]
        lines.append("%d of %d requests %s." % (
            len(affected), len(outcomes), describe_fault(handler_name, affected, normal_seconds)))
    if answered:
        lines.append("%s %d were answered in %s at the median." % (
            "The other" if faults else "All", len(answered), format_seconds(normal_seconds)))
    if failures:
        lines.append("%d failed without a fault: %s." % (
            sum(failures.values()), ", ".join(sorted(failures))))
    return lines


def describe_fault(handler_name, affected, normal_seconds):
    """Return a text like "were delayed (delay), by 1.00 s at the median".

    affected          Outcomes of the requests on which the handler acted.
    normal_seconds    median time of the answered requests without a fault, or 0 if there are none.

    If a request has failed or `normal_seconds` is 0: "met error: 5 x a wrong answer".
    """
    answered, failures = answered_only(affected), count_failures(affected)
    if normal_seconds and not failures:
        delay = max(0, median_seconds(answered) - normal_seconds)
        return "were delayed (%s), by %s at the median" % (handler_name, format_seconds(delay))
    parts = ["%d x %s" % (count, failure) for failure, count in sorted(failures.items())]
    if answered:
        parts.append("%d x answered, in %s at the median"
                     % (len(answered), format_seconds(median_seconds(answered))))
    return "met %s: %s" % (handler_name, ", ".join(parts))


def median_seconds(outcomes):
    """Return the median time of requests, or 0.0 for an empty list."""
    import statistics
    return statistics.median_high(outcome.seconds for outcome in outcomes) if outcomes else 0.0


def format_seconds(seconds):
    """Return a time as text: milliseconds below 0.1 s, seconds above."""
    return "%.1f ms" % (seconds * 1000) if seconds < 0.1 else "%.2f s" % seconds


# -- vaurienctl ---------------------------------------------------------------
#
# The command `vaurienctl` controls a running proxy over HTTP. Each action is a line in CTL_ACTIONS
# with a function that uses a Client. Users who have only this file call the command `vaurien ctl`.

CTL_INTRODUCTION = """\
Control a proxy that was started with --http, or the proxies of `vaurien serve`.

examples:
  vaurienctl set-handler delay sleep=2 percent=20
  vaurienctl set-rules 20:delay sleep=2 5:error kind=503
  vaurienctl --proxy redis add-toxic latency name=slow latency=200 stream=upstream
  vaurienctl --host http://localhost:8474 proxies"""


def parse_host(text):
    """Parse SCHEME://HOST:PORT into (host, port, scheme). Raises ValueError.

    The defaults of the parts are http, localhost and 8080.
    """
    scheme, _, address = text.rpartition("://")
    address = address.rstrip("/")
    has_port = re.search(r":\d+$", address)
    host, port = parse_address(address if has_port else address + ":8080")
    if scheme not in ("", "http", "https"):
        raise ValueError("must be http://HOST:PORT, not %r" % text)
    return host or "localhost", port, scheme or "http"


CTL_SETTINGS = settings_table([
    ("host", "--host", "command line", "http://localhost:8080", parse_host, "URL",
     "URL of the control server"),
    ("proxy", "--proxy", "command line", None, str, "NAME",
     "name of the proxy (default: the first proxy)"),
    ("http-token", "--http-token", "command line", None, str, "TOKEN",
     "token of the control server (default: $%s)" % TOKEN_VARIABLE),
])

# An action of vaurienctl:
#
# function    takes a Client and the arguments of the action, and returns the text to print.
# arguments   the names of the arguments, as --help shows them.
# help        the text for --help.
# check       called with the list of arguments, before `function`. Raises ValueError for invalid
#             arguments. The default, Python's list(), permits all arguments.
Action = namedtuple("Action", "function arguments help check")
Action.__new__.__defaults__ = (list,)


def check_handler_fields(words):
    """Check the arguments of set-handler. Raises ValueError."""
    _, texts = parse_rule_words(words)
    if "name" in texts:         # in the JSON object of a rule, `name` is the name of the handler
        raise ValueError("'name=' must be left out: the first argument is the name")


def parse_rule_texts(texts):
    """Return the arguments of set-rules as rules for `PUT /rules`. Raises ValueError.

    texts    PERCENT:HANDLER begins a rule, and NAME=VALUE belongs to the last rule, for example
             ["20:delay", "sleep=2", "5:error"].
    """
    rules = []
    for text in texts:
        name, equals, value = text.partition("=")
        if equals and rules and name not in rules[-1]:
            rules[-1][name] = value
        else:   # PERCENT:HANDLER. parse_behavior refuses a NAME=VALUE without a rule or with a
                # NAME that the rule already has.
            rules += [{"name": handler_name, "percent": percent}
                      for percent, handler_name in parse_behavior(text)]
    return rules


def change_text(client, text):
    """Return a text about a change, with the proxy's name if the server has several proxies."""
    if len(client.request("GET", "/proxies")) == 1:
        return text
    return "%s on proxy %s" % (text, client.request("GET", "/proxy")["name"])


def ctl_set_handler(client, name, *assignments):
    """Replace the behavior by one rule. An assignment is an option or a rule field: NAME=VALUE."""
    handler_name, texts = parse_rule_words([name, *assignments])
    # The values stay text, because only the server knows the types of options.
    client.request("PUT", "/behavior", dict(texts, name=handler_name))
    return change_text(client, "Handler changed to \"%s\"" % handler_name)


def ctl_rules(client):
    """Return the rules and toxics of the proxy as text."""
    return client.request("GET", "/proxy")["rules"]


def ctl_set_rules(client, first, *others):
    """Set the rules of the behavior from at least one text, like "20:delay", "sleep=2"."""
    client.request("PUT", "/rules", {"rules": parse_rule_texts([first, *others])})
    return change_text(client, "Rules changed to %s" % ctl_rules(client))


def ctl_backend(client, backend=None):
    """Change the backend if `backend` is given, and return the address of the backend."""
    if backend:
        client.set_backend(backend)
    return client.get_backend()


def ctl_accept(client, *words):
    """Set the Accept from words like "refuse", "ttl=5". Without words, return the Accept."""
    if not words:
        return client.get_accept()
    client.set_accept(" ".join(words))
    return change_text(client, "Accept changed to %s" % client.get_accept())


def ctl_proxies(client):
    """Return a line for each proxy with the name, the addresses and the rules."""
    lines = []
    for name, proxy in client.request("GET", "/proxies").items():
        proxy_client = Client(client.host, client.port, client.scheme, name, client.token)
        state = proxy["listen"] if proxy["enabled"] else "disabled"
        if "accept" in proxy:           # the server leaves out the mode "normal"
            state += " (%s)" % check_accept(proxy["accept"])    # the text is like "accept refuse"
        lines.append("%s: %s for %s: %s" % (
            name, state, proxy["upstream"], ctl_rules(proxy_client)))
    return "\n".join(lines)


def set_toxic_fields(toxic, texts):
    """Set fields and attributes of a toxic. Raises ValueError for an invalid text.

    toxic    the JSON object of the toxic, which this function changes.
    texts    {field or attribute: text}.
    """
    function = HANDLERS.get(toxic["type"])  # None: only the server knows this handler
    attributes = toxic["attributes"]
    for name, text in texts.items():
        if name == "toxicity":      # checked here: like Toxiproxy, the server accepts any number
            toxic[name] = check_field(name, check_toxicity, text)
        elif name in ("name", "stream") or is_rule_field(function, name):
            toxic[name] = text
        elif name in handler_options(function):     # convert the text to the type of the option
            attributes[name] = check_field(name, check_option, toxic["type"], name, text)
        else:       # an attribute of unknown type: true, false and numbers get their JSON type
            is_json = re.fullmatch(r"true|false|\d+(\.\d+)?", text)
            attributes[name] = json.loads(text) if is_json else text


def ctl_add_toxic(client, type_, *assignments):
    """Add a toxic. An assignment is a field or an attribute of the toxic: NAME=VALUE."""
    handler_name, texts = parse_rule_words([type_, *assignments])
    toxic = {"type": handler_name, "attributes": {}}
    set_toxic_fields(toxic, texts)
    return change_text(client, "Toxic added: %s" % client._add_toxic(toxic))


def find_toxic(toxics, name):
    """Return the JSON object of the toxic `name`. Raises ValueError for an unknown name."""
    for toxic in toxics:
        if toxic["name"] == name:
            return toxic
    names = [toxic["name"] for toxic in toxics]
    raise ValueError("unknown toxic %r%s: there are %s" % (
        name, did_you_mean(name, names), ", ".join(names) or "none"))


def ctl_update_toxic(client, name, *assignments):
    """Change a toxic. An assignment is a field or an attribute of the toxic: NAME=VALUE."""
    toxics = client.list_toxics()
    set_toxic_fields(find_toxic(toxics, name), parse_assignments(assignments))
    # This request replaces all toxics, because the server then refuses an unknown attribute. In a
    # request that changes one toxic, the server ignores an unknown attribute, as Toxiproxy does.
    client.request("PUT", client._proxy_path() + "/toxics", toxics)
    return change_text(client, "Toxic changed: %s" % name)


def ctl_remove_toxic(client, name):
    """Remove a toxic."""
    find_toxic(client.list_toxics(), name)      # for an unknown name, the error lists all names
    client.remove_toxic(name)
    return change_text(client, "Toxic removed: %s" % name)


def ctl_close(client, number, how="close"):
    """Close the open connection `number`, or reset it if `how` is "reset"."""
    check_field("how", choice_check("close", "reset"), how)
    reset = how == "reset"
    client.close_connection(check_field("number", check_count, number), reset)
    return change_text(client, "Connection %s: %s" % (number, "reset" if reset else "closed"))


def change_action(method, text):
    """Return a function for CTL_ACTIONS that calls a method of Client.

    text    the text to print after the call.
    """
    def action(client):
        method(client)
        return change_text(client, text)
    return action


def json_lines(values):
    """Return JSON values as text, each in a line of its own."""
    return "\n".join(map(json.dumps, values))


CTL_ACTIONS: dict = OrderedDict((name, Action(*action)) for name, *action in [
    ("rules", ctl_rules, "", "print the rules: behavior and toxics"),
    ("set-handler", ctl_set_handler, "HANDLER [NAME=VALUE ...]",
     "set the only rule; NAME is an option or a rule field", check_handler_fields),
    ("set-rules", ctl_set_rules, "PERCENT:HANDLER [NAME=VALUE ...] ...", "set several rules",
     parse_rule_texts),
    ("get-handler", Client.get_handler, "", "print the name of the active handler"),
    ("list-handlers", lambda client: ", ".join(client.list_handlers()), "",
     "print the names of all handlers"),
    ("toxics", lambda client: json_lines(client.list_toxics()), "", "print the toxics, as JSON"),
    ("add-toxic", ctl_add_toxic, "TYPE [NAME=VALUE ...]",
     "add a toxic; NAME may also be name, stream or toxicity", parse_rule_words),
    ("update-toxic", ctl_update_toxic, "TOXIC NAME=VALUE ...",
     "change the toxicity or options of a toxic", lambda args: parse_assignments(args[1:])),
    ("remove-toxic", ctl_remove_toxic, "TOXIC", "remove a toxic"),
    ("enable", change_action(Client.enable, "Enabled"), "", "listen again"),
    ("disable", change_action(Client.disable, "Disabled"), "",
     "stop listening, and close all connections"),
    ("accept", ctl_accept, "[MODE [NAME=VALUE ...]]",
     "print or set how the proxy accepts clients: normal, refuse or drop; NAME is start, "
     "duration, every or ttl"),
    ("reset", change_action(Client.reset, "Reset"), "",
     "enable the proxy, accept clients, and remove its rules and toxics"),
    ("proxies", ctl_proxies, "", "print all proxies with their rules"),
    ("backend", ctl_backend, "[HOST:PORT]", "print or set the backend of new connections"),
    ("events", lambda client: json_lines(client.request("GET", "/events")["events"]), "",
     "print the fault records, as JSON"),
    ("connections", lambda client: json_lines(client.connections()), "",
     "print the open connections, as JSON"),
    ("close", ctl_close, "NUMBER [reset]", "close or reset an open connection"),
])
# The names of Vaurien 1.x
CTL_ALIASES = {"get-behavior": "get-handler", "set-behavior": "set-handler",
               "list-behaviors": "list-handlers"}


def ctl_help():
    """Return the help of vaurienctl."""
    actions = [("%s %s" % (name, action.arguments), action.help)
               for name, action in CTL_ACTIONS.items()]
    options = [setting_row(setting) for setting in CTL_SETTINGS.values()]
    options.append(("--version", "print the version"))
    return "\n".join(["usage: vaurienctl [OPTION ...] ACTION [ARGUMENT ...]", "",
                      CTL_INTRODUCTION, "", "actions:", *format_rows(actions), "",
                      "options:", *format_rows(options), "",
                      "%s are the names of Vaurien 1.x." % ", ".join(CTL_ALIASES)])


def ctl_command(argv):
    """Return a function that runs an action of vaurienctl. Raises ValueError.

    For the option --help, this function prints the help and raises SystemExit.
    """
    parser = Parser(CTL_SETTINGS, "vaurienctl")
    parser.add_argument("action", nargs="?", default="")
    parser.add_argument("args", nargs="*", default=[])
    namespace, unknown = parser.parse_known_args(argv)
    if "help" in namespace:
        print_safe(ctl_help(), sys.stdout)
        raise SystemExit(0)
    flags = [text for text in unknown if text.startswith("-")]
    if flags:
        parser.refuse(flags)                # raises ValueError
    action = find_action(namespace.action)
    # argparse puts words after an option into `unknown`: `delay` in `set-handler --proxy a delay`
    args = [*namespace.args, *unknown]
    values = resolve_settings(parser.read_settings(vars(namespace)), CTL_SETTINGS)
    host, port, scheme = values["host"]
    client = Client(host, port, scheme, values["proxy"], get_token(values["http-token"]))
    try:
        inspect.signature(action.function).bind(client, *args)  # checks the number of arguments
        action.check(args)
    except (TypeError, ValueError) as error:
        raise ValueError("%s: %s (see vaurienctl --help)" % (namespace.action, error)) from None
    return lambda: run_action(action.function, client, args)


def find_action(name_or_alias):
    """Return the Action of a name or an alias. Raises ValueError for an unknown name."""
    name = CTL_ALIASES.get(name_or_alias, name_or_alias)
    if name not in CTL_ACTIONS:
        raise ValueError("unknown action %r%s: there are %s (see vaurienctl --help)" % (
            name, did_you_mean(name, CTL_ACTIONS), ", ".join(CTL_ACTIONS)))
    return CTL_ACTIONS[name]


def run_action(function, client, args):
    """Call the function of an action, print the text or the error, and return the exit status."""
    server = format_address((client.host, client.port))
    try:
        text = function(client, *args)
    except ValueError as error:             # an argument is invalid
        message = str(error)
    except (AttributeError, KeyError, TypeError):       # the JSON is not from a control server
        message = "%s is not a vaurien control server" % server
    except OSError as error:
        message = "no response from %s: %s" % (server, error.strerror or error)
    else:
        if text:
            print_safe(text, sys.stdout)
        return 0
    return print_error(message, 1, prog="vaurienctl")


# -- Main ---------------------------------------------------------------------
#
# The program chooses the command, runs the command, and prints errors in one line.

COMMANDS = {"serve": serve_command, "demo": demo_command, "ctl": ctl_command}


def main(argv: "Optional[Sequence[str]]" = None) -> int:
    """Run a command line. Returns the exit status: 0, 1 for a network error, 2 for bad input."""
    open_standard_fds()
    argv = list(sys.argv[1:] if argv is None else argv)
    attached = "--attached" in argv         # print errors to stdout, too: see print_error
    prog = "vaurienctl" if argv[:1] == ["ctl"] else "vaurien"
    try:
        try:
            command, arguments = choose_command(argv)
            run = command(arguments)
        except ValueError as error:     # bad input. In run(), a ValueError is a bug
            return print_error(error, 2, attached, prog)
        return run()
    except KeyboardInterrupt:
        return 0
    except BrokenPipeError:     # the reader of stdout has closed the pipe
        # Without dup2, Python's flush of stdout at exit would fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        message = str(error.strerror or error)
        setting = getattr(error, "setting", "")     # of a CannotListen, for example "--local"
        if setting:
            message += " (%s)" % setting
        return print_error(message, 1, attached, prog)


def choose_command(argv):
    """Return (the function of the command, its arguments). Raises ValueError."""
    if not argv or argv[0].startswith("-"):
        return proxy_command, argv
    name = argv[0]
    if name in HANDLERS or PROTOCOLS.get(name):     # PROTOCOLS["tcp"] is None: it has no help
        raise ValueError("%s is not a command: see vaurien --help %s" % (name, name))
    if name not in COMMANDS:
        raise ValueError("unknown command %r%s: there are %s (see vaurien --help)" % (
            name, did_you_mean(name, COMMANDS), ", ".join(COMMANDS)))
    return COMMANDS[name], argv[1:]


def open_standard_fds():
    """Open /dev/null in place of a closed stdin, stdout or stderr.

    If a socket got the descriptor of a closed stdout, the program's output would go to a peer.
    """
    while True:
        fd = os.open(os.devnull, os.O_RDWR)     # returns the lowest free descriptor
        if fd > 2:      # the descriptors 0 to 2 are open: stdin, stdout and stderr
            os.close(fd)
            return


def main_ctl() -> int:
    """Run the command vaurienctl. Returns the exit status."""
    return main(["ctl", *sys.argv[1:]])


# Make `from vaurien.handlers import BaseHandler` work, although vaurien is a single module. The
# user may have imported this file under another name than vaurien.
handlers = types.ModuleType(__name__ + ".handlers", "The base class of blocking handlers.")
handlers.BaseHandler = BaseHandler      # type: ignore
sys.modules[handlers.__name__] = handlers


if __name__ == "__main__":
    # A user's handler that imports vaurien must get this module, and not a second copy.
    sys.modules.setdefault("vaurien", sys.modules["__main__"])
    sys.modules.setdefault("vaurien.handlers", handlers)
    sys.exit(main())
