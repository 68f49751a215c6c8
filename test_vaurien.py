"""Tests of vaurien.py: `python3 -m unittest` runs them all, with the standard library alone.

From pure to real: handlers, rules and pipes as tables of events; the proxy on real
sockets against an oracle, the same conversation over a direct connection; the command
line in its own process; real servers with their real drivers, where they are installed.
"""
import contextlib
import errno
import functools
import glob
import hashlib
import http.client
import importlib
import io
import json
import logging
import math
import os
import random
import re
import select
import selectors
import shlex
import shutil
import signal
import smtplib
import socket
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
from collections import Counter
from unittest import mock

try:
    import pwd
except ImportError:          # Windows has none, and no server of ours
    pass

if os.environ.get("VAURIEN_PLAIN"):     # as on a machine that has nothing but select(), and IPv4
    for module, names in (select, "epoll kqueue devpoll"), (os, "splice pipe2"), (socket, "SOCK_NONBLOCK"):
        for name in names.split():
            module.__dict__.pop(name, None)
    for name in "DefaultSelector", "EpollSelector", "PollSelector", "KqueueSelector", "DevpollSelector":
        setattr(selectors, name, selectors.SelectSelector)
    sys.modules.update({"fcntl": None, "resource": None})

    class NoIPv6(socket.socket):
        def __init__(self, *args, **words):
            if args[:1] == (socket.AF_INET6,):
                raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
            super().__init__(*args, **words)
    socket.socket = socket.SocketType = NoIPv6

import vaurien
from vaurien import DOWNSTREAM, EOF, HANDLERS, NEVER, OPEN, RESET, UPSTREAM

HERE = os.path.dirname(os.path.abspath(__file__))
FILE = os.path.join(HERE, "vaurien.py")
PATIENCE = 30       # seconds after which a test gives up on a peer: no test waits that long


def setUpModule():
    logging.getLogger("vaurien").setLevel(logging.CRITICAL)


def rules_from(behavior, options=None):
    """The rules of "20:delay,5:error" with {handler: {option: value}}."""
    return vaurien.read_rules([dict((options or {}).get(name, {}), name=name, percent=percent)
                               for percent, name in vaurien.parse_behavior(behavior)])


def set_behavior(proxy, behavior, **options):
    """Have a running proxy use other rules."""
    proxy.loop.run_sync(proxy.set_rules, rules_from(behavior, options))


@contextlib.contextmanager
def registered(function):
    """A handler for the time of a test."""
    vaurien.handler(function)
    try:
        yield function
    finally:
        del HANDLERS[function.__name__]


# -- Pure: handlers, rules, lines and pipes -------------------------------------

def chain_of(*rules):
    """A line that these rules are drawn for, its first request begun."""
    armed = vaurien.RuleSet(1, "test")
    armed.armed = list(rules)
    line = vaurien.Chain(armed, 1)
    line.begin()
    return line


class TestHandlers(unittest.TestCase):
    """A fault is a table: events in, events out, with no socket and no sleep."""

    def play(self, name, *events, **options):
        """What a handler that acts makes of one request's events."""
        line = chain_of(vaurien.Rule(name, options))
        return [(round(t, 3), to, data) for event in events for t, to, data, _ in line.process(*event)]

    def test_dummy_passes_everything(self):
        events = [(0, UPSTREAM, OPEN), (1, UPSTREAM, b"q"), (2, DOWNSTREAM, b"a"),
                  (3, UPSTREAM, EOF), (4, DOWNSTREAM, EOF), (5, DOWNSTREAM, RESET)]
        self.assertEqual(self.play("dummy", *events), events)

    def test_delay_waits_before_the_backend_is_called(self):
        self.assertEqual(
            self.play("delay", (0, UPSTREAM, OPEN), (0.1, UPSTREAM, b"q"), (0.2, UPSTREAM, b"r"),
                      (5, DOWNSTREAM, b"a"), (5.5, DOWNSTREAM, b"b"), sleep=2.0),
            [(2, UPSTREAM, OPEN), (2.1, UPSTREAM, b"q"), (2.1, UPSTREAM, b"r"),
             (5, DOWNSTREAM, b"a"), (5.5, DOWNSTREAM, b"b")])

    def test_delay_of_a_request_on_a_connection_that_was_opened_long_before(self):
        self.assertEqual(self.play("delay", (0, UPSTREAM, OPEN), (60, UPSTREAM, b"q")),
                         [(1, UPSTREAM, OPEN), (61, UPSTREAM, b"q")])

    def test_delay_comes_once_for_a_request_and_never_for_its_end(self):
        self.assertEqual(
            self.play("delay", (0, UPSTREAM, b"q"), (3, UPSTREAM, b"r"), (4, DOWNSTREAM, b"a"),
                      (9, UPSTREAM, EOF)),
            [(1, UPSTREAM, b"q"), (3, UPSTREAM, b"r"), (4, DOWNSTREAM, b"a"), (9, UPSTREAM, EOF)])

    def test_delay_before_the_first_byte_of_the_answer(self):
        self.assertEqual(
            self.play("delay", (0, UPSTREAM, OPEN), (0, UPSTREAM, b"q"), (5, DOWNSTREAM, b"a"),
                      (5.5, DOWNSTREAM, b"b"), (7, DOWNSTREAM, b"c"), (8, DOWNSTREAM, EOF),
                      before=False),
            [(0, UPSTREAM, OPEN), (0, UPSTREAM, b"q"), (6, DOWNSTREAM, b"a"),
             (6, DOWNSTREAM, b"b"), (7, DOWNSTREAM, b"c"), (8, DOWNSTREAM, EOF)])

    def test_delay_drawn_for_a_connection_waits_in_each_of_its_turns(self):
        line = chain_of(vaurien.Rule("delay", per="connection"))
        times = []
        for t, to, data in [(0, UPSTREAM, b"q"), (2, DOWNSTREAM, b"a"), (3, UPSTREAM, b"r"), (3.5, UPSTREAM, b"s")]:
            if to != line.last_direction:
                line.turn(to)
            times.append(line.process(t, to, data)[0][0])
        self.assertEqual(times, [1, 2, 4, 4])

    def test_error_puts_random_bytes_in_the_place_of_the_answer(self):
        out = self.play("error", (0, UPSTREAM, OPEN), (0, UPSTREAM, b"q"), (1, DOWNSTREAM, b"valid"),
                        (2, DOWNSTREAM, b"more"), (3, DOWNSTREAM, EOF))
        self.assertEqual([event for event in out if event[1] == UPSTREAM],
                         [(0, UPSTREAM, OPEN), (0, UPSTREAM, b"q")])
        (t, _, noise), end = [event for event in out if event[1] == DOWNSTREAM]
        self.assertEqual((t, len(noise), end), (1, 1000, (3, DOWNSTREAM, EOF)))
        self.assertNotIn(b"valid", noise)
        self.assertGreater(len(set(noise)), 200)

    def test_error_is_the_same_for_the_same_seed(self):
        events = (0, UPSTREAM, b"q"), (1, DOWNSTREAM, b"a")
        self.assertEqual(self.play("error", *events), self.play("error", *events))

    def test_error_injects_100_bytes_into_the_middle_of_the_answer(self):
        out = self.play("error", (0, UPSTREAM, b"q"), (1, DOWNSTREAM, b"leftright"),
                        (2, DOWNSTREAM, b"more"), inject=True)
        self.assertEqual(len(out[1][2]), 109)
        self.assertEqual((out[1][2][:4], out[1][2][-5:]), (b"left", b"right"))
        self.assertEqual(out[2], (2, DOWNSTREAM, b"more"))

    def test_error_leaves_the_warm_up_alone(self):
        events = [(0, UPSTREAM, b"q"), (1, DOWNSTREAM, b"a")]
        for request, touched in (1, False), (2, False), (3, True), (4, True):
            line = chain_of(vaurien.Rule("error", {"warmup": 2}))
            while line.request < request:
                line.begin()
            out = [out for event in events for out in line.process(*event)]
            self.assertEqual(out[1][2] != b"a", touched, request)

    def test_transient_fails_and_then_succeeds(self):
        line = chain_of(vaurien.Rule("transient", {"agitate": 2, "warmup": 1}))
        failed = []
        for _ in range(6):
            line.process(0, UPSTREAM, b"q")
            failed.append(line.process(1, DOWNSTREAM, b"a")[0][2] != b"a")
            line.begin()
        self.assertEqual(failed, [False, True, True, False, False, False])

    def test_transient_does_not_count_a_connection_that_says_nothing(self):
        line = chain_of(vaurien.Rule("transient"))
        line.process(0, UPSTREAM, OPEN)
        line.process(0, UPSTREAM, EOF)
        line.begin()
        line.process(0, UPSTREAM, b"q")
        self.assertNotEqual(line.process(1, DOWNSTREAM, b"a")[0][2], b"a")

    def test_transient_counts_for_the_whole_proxy(self):
        armed = vaurien.RuleSet(1, "test")
        armed.armed = [vaurien.Rule("transient", {"agitate": 3})]
        lines = [vaurien.Chain(armed, number) for number in range(5)]
        failed = 0
        for line in lines:
            line.begin()
            line.process(0, UPSTREAM, b"q")
            failed += line.process(1, DOWNSTREAM, b"a")[0][2] != b"a"
        self.assertEqual(failed, 3)

    def test_hang_holds_everything_for_ever(self):
        self.assertEqual(self.play("hang", (0, UPSTREAM, OPEN), (1, UPSTREAM, b"q"), (2, UPSTREAM, EOF)),
                         [(NEVER, UPSTREAM, OPEN), (NEVER, UPSTREAM, b"q"), (NEVER, UPSTREAM, EOF)])

    def test_blackout_closes_before_the_backend_is_called(self):
        self.assertEqual(self.play("blackout", (0, UPSTREAM, OPEN)),
                         [(0, DOWNSTREAM, EOF), (0, UPSTREAM, EOF)])

    def test_abort_delivers_the_request_and_loses_the_answer(self):
        self.assertEqual(
            self.play("abort", (0, UPSTREAM, OPEN), (0, UPSTREAM, b"q"), (1, DOWNSTREAM, b"a")),
            [(0, UPSTREAM, OPEN), (0, UPSTREAM, b"q"), (1, DOWNSTREAM, EOF), (1, UPSTREAM, EOF)])


class TestLaws(unittest.TestCase):
    """What holds for every handler, those still to be written included."""

    EVENTS = [(0, UPSTREAM, OPEN), (1, DOWNSTREAM, b"hello"), (2, UPSTREAM, b"question"),
              (3, UPSTREAM, b"more"), (4, DOWNSTREAM, b"answer"), (5, DOWNSTREAM, b"b"),
              (6, DOWNSTREAM, EOF), (7, UPSTREAM, EOF), (8, UPSTREAM, RESET)]

    def test_every_option_has_a_line_of_help_and_a_type_we_can_read(self):
        for name, function in HANDLERS.items():
            self.assertTrue(vaurien.summary(function), name)
            self.assertEqual(set(vaurien.option_help(function)),
                             set(vaurien.handler_options(function)), name)
            vaurien.check_handler(name, function)

    def test_every_handler_survives_every_event_and_goes_forward_in_time(self):
        for name in HANDLERS:
            for start in range(len(self.EVENTS)):
                for stream in "both", UPSTREAM, DOWNSTREAM:
                    line = chain_of(vaurien.Rule(name, stream=stream))
                    with mock.patch.object(vaurien.log, "exception",
                                           side_effect=AssertionError(name)):
                        for event in self.EVENTS[start:]:
                            for t, to, data, holds in line.process(*event):
                                self.assertGreaterEqual(t, event[0])
                                self.assertIn(to, (UPSTREAM, DOWNSTREAM))
                                self.assertIsInstance(data, bytes)
                                self.assertEqual(event[0] + sum(s for _, s, _ in holds), t)

    def test_what_only_puts_off_loses_nothing_when_it_is_released(self):
        for name in "delay", "hang", "dummy":
            rule = vaurien.Rule(name)
            line = chain_of(rule)
            pipe = vaurien.DelayQueue(UPSTREAM, vaurien.Budget())
            for t, to, data in self.EVENTS:
                if to == UPSTREAM and data is not RESET:
                    for due, _, out, holds in line.process(t, to, data):
                        pipe.put(due, out, t, holds)
            pipe.release([rule])
            self.assertEqual(pipe.due(7.5), [OPEN], name)
            self.assertEqual(list(pipe.out), [b"question", b"more", EOF], name)


class TestRules(unittest.TestCase):

    def test_behaviors_are_read(self):
        for text, chosen in [
                ("20:delay", [(20, "delay")]), (" 20:delay , 5:error", [(20, "delay"), (5, "error")]),
                ("0.5:hang", [(0.5, "hang")]), ("100:dummy", [(100, "dummy")]),
                ("33.3:delay,33.3:error,33.4:hang", [(33.3, "delay"), (33.3, "error"), (33.4, "hang")]),
                ("0:delay", [(0, "delay")]), ("20:path.to.callable", [(20, "path.to.callable")])]:
            self.assertEqual(vaurien.parse_behavior(text), chosen)

    def test_bad_behaviors_are_refused(self):
        for text in ["", "delay", "20", "20:", ":delay", "x:delay", "-1:delay", "101:delay",
                     "nan:delay", "inf:delay", "60:delay,60:error", "20:delay,", ",20:delay",
                     "20 delay"]:
            with self.assertRaisesRegex(ValueError, "^must .*not.*'", msg=text):
                vaurien.parse_behavior(text)

    def rules(self, text, seed=1, name="test"):
        armed = vaurien.RuleSet(seed, name)
        armed.armed = rules_from(text)
        return armed

    def drawn(self, armed, connections=40, requests=50):
        """{(connection, request): handler} of those that a rule acts on."""
        found = {}
        for connection in range(1, connections + 1):
            line = vaurien.Chain(armed, connection)
            for request in range(1, requests + 1):
                line.begin()
                self.assertLessEqual(len(line.active), 1)
                for step in line.active:
                    found[connection, request] = step.rule.name
        return found

    def test_one_throw_decides_and_the_percents_are_kept(self):
        found = self.drawn(self.rules("20:delay,5:error"))
        names = list(found.values())
        self.assertAlmostEqual(names.count("delay") / 2000, 0.20, delta=0.04)
        self.assertAlmostEqual(names.count("error") / 2000, 0.05, delta=0.03)

    def test_0_percent_is_never_and_100_percent_is_always(self):
        self.assertEqual(self.drawn(self.rules("0:delay")), {})
        self.assertEqual(len(self.drawn(self.rules("100:delay"))), 2000)

    def test_the_same_seed_gives_the_same_faults_whatever_the_order(self):
        one = self.drawn(self.rules("20:delay,5:error"))
        armed, found = self.rules("20:delay,5:error"), {}
        lines = [vaurien.Chain(armed, number) for number in range(1, 41)]
        order = [number for number in range(40) for _ in range(50)]
        random.Random(7).shuffle(order)
        for number in order:
            lines[number].begin()
            for step in lines[number].active:
                found[number + 1, lines[number].request] = step.rule.name
        self.assertEqual(found, one)

    def test_the_draws_are_the_same_on_every_python(self):
        found = self.drawn(self.rules("20:delay"), connections=1, requests=20)
        self.assertEqual(sorted(found), [(1, 2), (1, 6), (1, 13)])

    def test_the_dice_alone_decide_and_each_request_is_counted(self):
        for text, fields in [("20:delay,5:error", {}), ("20:delay", {"after": 7}), ("0:delay", {}),
                             ("100:delay", {"after": 9}), ("3:hang,1:error", {}), ("50:delay", {"times": 2})]:
            rules = self.rules(text)
            for rule in rules.armed:
                for name, value in fields.items():
                    setattr(rule, name, value)
            line, other = vaurien.Chain(rules, 3), rules_from("30:abort")
            for request in range(1, 60):
                if request in (20, 27):         # in the midst of eight that were thrown together
                    rules.armed = rules.armed + other if request == 20 else rules.armed[:-1]
                    line.rules_changed(other if request == 20 else [])
                line.begin()
                percent = 100 * rules.throw("behavior", 3, request // 8)[request % 8] / 2 ** 64
                self.assertEqual([step.rule for step in line.active],
                                 [rule for rule in rules.armed if rule.draw_min <= percent < rule.draw_max
                                  and rule.drawn_count > rule.after], (text, request))
                self.assertEqual([step.state.request for step in line.active], [step.rule.drawn_count for step in line.active])
                self.assertEqual([rule.drawn_count for rule in rules.armed],
                                 [request - 19 if rule in other else request for rule in rules.armed])

    def test_a_rule_that_has_changed_is_drawn_anew(self):
        rules = self.rules("0:delay")
        line = vaurien.Chain(rules, 1)
        for _ in range(9):
            line.begin()
        rules.armed[0].draw_max = 100.0
        line.rules_changed([], rules.armed)
        line.begin()
        self.assertEqual([step.rule for step in line.active], rules.armed)

    def test_another_seed_another_proxy_another_request_draw_anew(self):
        one = self.drawn(self.rules("20:delay"))
        self.assertNotEqual(self.drawn(self.rules("20:delay", seed=2)), one)
        self.assertNotEqual(self.drawn(self.rules("20:delay", name="other")), one)

    def test_rules_with_dice_of_their_own_are_drawn_independently(self):
        armed = vaurien.RuleSet(1, "test")
        armed.armed = [vaurien.Rule("delay", draw_min=0, draw_max=50, draw_key="a"),
                       vaurien.Rule("hang", draw_min=0, draw_max=50, draw_key="b")]
        seen = set()
        for number in range(100):
            line = vaurien.Chain(armed, number)
            line.begin()
            seen.add(tuple(step.rule.name for step in line.active))
        self.assertEqual(seen, {(), ("delay",), ("hang",), ("delay", "hang")})

    def test_a_rule_per_connection_is_drawn_once_for_it(self):
        armed = vaurien.RuleSet(1, "test")
        armed.armed = [vaurien.Rule("delay", draw_min=0, draw_max=50, per="connection")]
        for number in range(50):
            line = vaurien.Chain(armed, number)
            line.begin()
            first = list(line.active)
            for _ in range(5):
                line.begin()
                self.assertEqual(list(line.active), first)

    def test_a_rule_says_what_it_is_as_the_log_does(self):
        self.assertEqual(str(vaurien.Rule("delay", {"sleep": 2.0})), "delay sleep=2.0")
        self.assertEqual(str(vaurien.Rule("delay", {"before": False})), "delay sleep=1.0 before=no")
        self.assertEqual(str(vaurien.Rule("hang")), "hang")


class TestLine(unittest.TestCase):

    def test_a_request_begins_when_the_client_speaks_after_the_backend_has(self):
        with running_proxy(echo) as proxy, connected_client(proxy) as sock:
            for _ in range(3):
                send_and_read(sock, b"q")
            line = next(iter(proxy.connections.values())).line
            self.assertEqual(line.request, 3)

    def test_a_fault_is_news_once_and_only_when_it_changes_something(self):
        line = chain_of(vaurien.Rule("error", {"warmup": 1}))
        line.process(0, UPSTREAM, b"q")
        line.process(0, DOWNSTREAM, b"a")
        self.assertEqual(line.activated, [])
        line.begin()
        for event in (0, UPSTREAM, b"q"), (0, DOWNSTREAM, b"a"), (0, DOWNSTREAM, b"b"):
            line.process(*event)
        self.assertEqual([(rule.name, number) for rule, number in line.activated], [("error", 2)])

    def test_a_bug_of_a_handler_resets_the_connection_and_says_its_name(self):
        def none(state, t, to, data):
            return None

        def wrong_way(state, t, to, data):
            yield t, "sideways", data

        def no_bytes(state, t, to, data):
            yield t, to, "text"

        def raises(state, t, to, data):
            raise KeyError("x")
            yield

        def leaves(state, t, to, data):
            raise SystemExit(3)
            yield

        for function in none, wrong_way, no_bytes, raises, leaves:
            with registered(function), self.assertLogs("vaurien", "ERROR") as logged:
                line = chain_of(vaurien.Rule(function.__name__), vaurien.Rule("hang", draw_key="b"))
                self.assertEqual(line.process(3, UPSTREAM, b"q"), [(3, UPSTREAM, RESET, ())])
            self.assertIn("handler %s failed" % function.__name__, logged.output[0])

    def test_a_handler_may_return_a_list_and_yield_a_time_that_has_passed(self):
        def early(state, t, to, data):
            return [(t - 5, to, data), (math.nan, to, b"x")]

        with registered(early):
            line = chain_of(vaurien.Rule("early"))
            self.assertEqual(line.process(3, UPSTREAM, b"q"),
                             [(3, UPSTREAM, b"q", ()), (3, UPSTREAM, b"x", ())])

    def test_what_only_names_a_time_that_has_passed_has_changed_nothing(self):
        def early(state, t, to, data):
            yield 0, to, data

        with registered(early):
            line = chain_of(vaurien.Rule("early"))
            self.assertEqual(line.process(3, UPSTREAM, b"q"), [(3, UPSTREAM, b"q", ())])
            self.assertEqual((line.activated, line.modified), ([], False))

    def test_a_handler_of_one_way_is_shown_no_other(self):
        for options, stream, sees in [({}, "both", UPSTREAM), ({"before": False}, "both", DOWNSTREAM),
                                      ({}, DOWNSTREAM, DOWNSTREAM), ({"before": False}, UPSTREAM, UPSTREAM)]:
            line = chain_of(vaurien.Rule("delay", options, stream=stream))
            self.assertEqual([line.observes(UPSTREAM), line.observes(DOWNSTREAM)], [sees == UPSTREAM, sees == DOWNSTREAM])
            for to in UPSTREAM, DOWNSTREAM:
                self.assertEqual(line.process(3, to, b"x")[0][0], 4 if to == sees else 3)
        self.assertTrue(chain_of(vaurien.Rule("delay", {"before": False}, match=re.compile(b"x"))).observes(UPSTREAM))     # to look for it
        self.assertTrue(chain_of(vaurien.Rule("hang")).observes(DOWNSTREAM))
        toxic = vaurien.Toxic("delay", "d", stream="both")
        self.assertEqual(toxic.rule.direction, UPSTREAM)
        toxic.set(1.0, {"before": False})
        self.assertEqual(toxic.rule.direction, DOWNSTREAM)

    def test_each_step_takes_what_the_one_before_it_gave(self):
        one, two = (vaurien.Rule("delay", {"sleep": seconds}, draw_key=name)
                    for seconds, name in ((1.0, "a"), (2.0, "b")))
        self.assertEqual(chain_of(one, two).process(0, UPSTREAM, b"q"),
                         [(3.0, UPSTREAM, b"q", ((one, 1.0, False), (two, 2.0, False)))])

    def test_a_stream_that_a_rule_does_not_see_passes_it_by(self):
        line = chain_of(vaurien.Rule("hang", stream=DOWNSTREAM))
        self.assertEqual(line.process(0, UPSTREAM, b"q"), [(0, UPSTREAM, b"q", ())])
        self.assertEqual(line.process(0, DOWNSTREAM, b"a")[0][0], NEVER)


class TestPipe(unittest.TestCase):

    def setUp(self):
        self.budget = vaurien.Budget()
        self.pipe = vaurien.DelayQueue(UPSTREAM, self.budget)

    def test_bytes_keep_their_order_whatever_their_times(self):
        for t, data in (5, b"a"), (2, b"b"), (9, b"c"), (3, EOF):
            self.pipe.put(t, data, 0)
        self.pipe.due(4)
        self.assertEqual(list(self.pipe.out), [])
        self.pipe.due(5)
        self.assertEqual(list(self.pipe.out), [b"a", b"b"])
        self.pipe.due(9)
        self.assertEqual(list(self.pipe.out), [b"a", b"b", b"c", EOF])

    def test_reset_overtakes(self):
        self.pipe.put(9, b"a", 0)
        self.pipe.put(3, RESET, 0)
        self.assertEqual(self.pipe.due(3), [RESET])

    def test_an_end_set_for_later_does_not_hold_up_what_comes_before_it(self):
        self.pipe.put(9, EOF, 0)
        self.pipe.put(3, b"a", 3)
        self.pipe.due(3)
        self.assertEqual(list(self.pipe.out), [b"a"])

    def test_release_lets_go_of_what_one_rule_holds_and_leaves_the_rest(self):
        one, two, three = (vaurien.Rule("delay") for _ in range(3))
        self.pipe.put(NEVER, b"a", 1, ((one, NEVER, False),))
        self.pipe.put(2, b"b", 2)                    # only behind a
        self.pipe.put(NEVER, b"c", 3, ((two, 4, False), (one, NEVER, False)))
        self.pipe.put(NEVER, b"d", 4, ((three, NEVER, False),))
        self.pipe.release([one])
        self.assertEqual(self.pipe.due(3.5), [])
        self.assertEqual(list(self.pipe.out), [b"a", b"b"])
        self.pipe.due(7)
        self.assertEqual(list(self.pipe.out), [b"a", b"b", b"c"])
        self.assertEqual(self.pipe.next_due(), NEVER)
        self.pipe.release([three])
        self.pipe.due(7)
        self.assertEqual(list(self.pipe.out), [b"a", b"b", b"c", b"d"])

    def test_what_is_held_is_counted_and_given_back(self):
        self.pipe.put(1, b"abc", 0)
        self.pipe.put(9, b"def", 0)
        self.assertEqual(self.budget.held, 6 + 2 * vaurien.CHUNK_OVERHEAD)
        self.pipe.due(1)
        self.pipe.sent(1)
        self.assertEqual((bytes(self.pipe.out[0]), self.budget.held), (b"bc", 5 + 2 * vaurien.CHUNK_OVERHEAD))
        self.pipe.sent(2)
        self.assertEqual(self.budget.held, 3 + vaurien.CHUNK_OVERHEAD)
        self.pipe.close()
        self.assertEqual((self.budget.held, self.budget.pipes), (0, 0))

    def test_after_the_end_nothing_more_is_taken(self):
        self.pipe.done = True
        self.pipe.put(1, b"abc", 0)
        self.pipe.put(1, RESET, 0)
        self.assertEqual((self.pipe.due(1), self.pipe.held), ([RESET], 0))

    def test_more_may_be_held_where_it_flows_than_where_it_stands(self):
        def fill(due):
            pipe = vaurien.DelayQueue(UPSTREAM, vaurien.Budget())
            while pipe.room(lambda: 0) > 0:
                pipe.put(due, bytes(pipe.room(lambda: 0)), 0)
            return pipe.held

        self.assertLessEqual(fill(NEVER), vaurien.HELD_MAX_IDLE)
        self.assertGreater(fill(NEVER), vaurien.HELD_MAX_IDLE // 2)
        self.assertLessEqual(fill(5), vaurien.HELD_MAX)
        self.assertGreater(fill(5), vaurien.HELD_MAX // 2)

    def test_the_budget_is_shared_and_never_passed_and_everybody_gets_something(self):
        budget = vaurien.Budget(32 * 1024 * 1024)
        pipes = [vaurien.DelayQueue(UPSTREAM, budget) for _ in range(4000)]
        for pipe in pipes:
            while pipe.room(lambda: 0) > 0:
                pipe.put(5, bytes(pipe.room(lambda: 0)), 0)
            self.assertLessEqual(budget.held, budget.total)
            self.assertGreater(pipe.held, 0)


class TestLoop(unittest.TestCase):

    def test_alarms_ring_in_order_and_not_before_their_time(self):
        loop, rung = vaurien.Loop(), []
        now = loop.clock()
        for late in 0.03, 0.001, 0.012, 0.0:
            loop.call_at(now + late, lambda late=late: rung.append((late, loop.clock() - now)))
        loop.cancel(loop.call_at(now + 0.002, lambda: rung.append("cancelled")))
        loop.call_at(now + 0.04, loop.stop)
        loop.run()
        loop.close()
        self.assertEqual([late for late, _ in rung], [0.0, 0.001, 0.012, 0.03])
        for late, rang in rung:
            self.assertGreaterEqual(rang, late)

    def test_cancelled_alarms_are_swept_out(self):
        loop = vaurien.Loop()
        kept = [loop.call_at(1e9 + number, int) for number in range(10)]
        for number in range(10000):
            loop.cancel(loop.call_at(1e9 - number, int))
            self.assertLess(len(loop.timers), 300)
        for alarm in kept:
            self.assertIn(alarm, loop.timers)
            loop.cancel(alarm)
            loop.cancel(alarm)
        loop.close()

    def test_a_call_does_not_wait_for_hundreds_of_busy_sockets(self):
        loop, order = vaurien.Loop(), []
        pairs = [socket.socketpair() for _ in range(3)]
        for one, two in pairs:
            two.send(b"x")
            loop.watch(one, selectors.EVENT_READ, lambda events: (
                order.append("socket"), loop.call_soon_threadsafe(order.append, "call"),
                len(order) > 5 and loop.stop()))
        loop.run()
        self.assertEqual(order[:4], ["socket", "call"] * 2)
        loop.close()
        for pair in pairs:
            for sock in pair:
                sock.close()

    def test_call_says_so_when_the_loop_has_ended(self):
        loop = vaurien.Loop()
        loop.stop()
        loop.run()
        with self.assertRaisesRegex(RuntimeError, "ended"):
            loop.run_sync(int)
        loop.close()

    @unittest.skipUnless(hasattr(select, "epoll"), "no epoll here")
    def test_it_looks_again_before_it_sleeps(self):
        now, polls = [0.0], []

        class Poll:                     # of an epoll; each look that finds nothing takes its time
            takes, found = 0.00001, []

            def poll(self, timeout, most):
                polls.append(timeout)
                now[0] += self.takes
                return self.found.pop(0) if self.found else []

        def select(*found, takes=0.00001, timeout=None):
            """How many looks there were, and whether one slept."""
            epoll.epoll.takes, epoll.epoll.found = takes, list(found)
            del polls[:]
            epoll.select(timeout)
            slept = polls[-1] != 0
            return len(polls) - slept, slept

        epoll = vaurien.EpollSelector(lambda: now[0])
        epoll.close()
        epoll.epoll, epoll.keys = Poll(), {7: "key"}
        here = [(7, 1)]
        with mock.patch.object(os, "sched_yield") as gives_way:
            self.assertEqual(select(here), (1, False))
            self.assertFalse(gives_way.called)
            self.assertEqual(select([], [], [], here), (4, False))
            self.assertEqual(gives_way.call_count, 3)       # to others first, each time
            self.assertEqual(select(timeout=0), (1, False))
            self.assertEqual(select(here, timeout=2.5), (1, False))
            most = 1 + round(epoll.SPIN_TIME / 0.00001)
            for skips in 1, 2, 4, 8, 8:                     # in vain: ever more sleeps without
                looks, slept = select()
                self.assertTrue(slept and most <= looks <= most + 1, looks)
                self.assertEqual([select() for _ in range(skips)], [(1, True)] * skips)
            self.assertEqual(select([], [], here), (3, False))
            looks, slept = select(timeout=2.5)
            self.assertEqual((looks > 2, slept, polls[-1]), (True, True, 2.5))
            self.assertEqual(select(), (1, True))
            # Who gets the processor back late leaves it to others, whatever has come meanwhile.
            self.assertEqual(select([], here, takes=0.0011), (2, False))
            self.assertEqual({select() for _ in range(epoll.BACKOFF_PREEMPTED)}, {(1, True)})
            self.assertGreater(select()[0], 2)
            self.assertEqual({select() for _ in range(epoll.BACKOFF_MAX)}, {(1, True)})
            self.assertEqual(select(takes=0.0011, timeout=2.5), (2, False))     # nor sleeps over an alarm

    def test_an_alarm_years_away_is_no_overflow(self):
        loop = vaurien.Loop()
        loop.call_at(1e300, loop.stop)
        loop.call_soon_threadsafe(loop.stop)
        loop.run()
        loop.close()

    def test_call_runs_in_the_loops_thread_and_hands_back_what_comes_of_it(self):
        loop = vaurien.Loop()
        thread = threading.Thread(target=loop.run)
        thread.start()
        self.assertIs(loop.run_sync(threading.current_thread), thread)
        with self.assertRaises(ZeroDivisionError):
            loop.run_sync(lambda: 1 // 0)
        loop.stop()
        thread.join(PATIENCE)
        loop.close()

    def test_what_blocks_runs_away_from_the_loop(self):
        loop, outcome, gate = vaurien.Loop(), [], threading.Event()
        thread = threading.Thread(target=loop.run)
        thread.start()
        loop.run_sync(loop.run_in_thread, gate.wait, lambda *result: (outcome.append(result), loop.stop()))
        loop.run_sync(loop.run_in_thread, lambda: 1 // 0, lambda _, problem: outcome.append(problem))
        while not outcome:
            loop.run_sync(int)                  # the loop goes on meanwhile
        self.assertIsInstance(outcome[0], ZeroDivisionError)
        gate.set()
        thread.join(PATIENCE)
        loop.close()
        self.assertEqual(outcome[1], (True, None))


class TestAddresses(unittest.TestCase):

    def test_addresses_are_read(self):
        for text, address in [
                ("localhost:8000", ("localhost", 8000)), ("[::1]:8000", ("::1", 8000)),
                (":8000", ("", 8000)), ("127.0.0.1:65535", ("127.0.0.1", 65535)),
                ("a-b.example.org.:1", ("a-b.example.org.", 1)),
                ("[fe80::1%eth0]:80", ("fe80::1%eth0", 80)), ("b\u00fccher.example:80", ("b\u00fccher.example", 80))]:
            self.assertEqual(vaurien.parse_address(text), address)
        self.assertEqual(vaurien.parse_listener("localhost:0"), ("localhost", 0))

    def test_bad_addresses_are_refused(self):
        for text in ["", "localhost", "8000", "localhost:", "localhost:x", "localhost:-1",
                     "localhost:65536", "localhost:0", "localhost:99999999999", "::1:8000", "[::1]",
                     "[::1]8000", "[localhost]:80", "local host:80", "localhost:80 x", "a" * 64 + ".b:80",
                     "a..b:80", "user@host:80", "localhost:80/path", "host\n:80", "host\0:80",
                     "localhost:8\u00b2", "localhost:+80"]:
            with self.assertRaisesRegex(ValueError, "^must ", msg=text):
                vaurien.parse_address(text)

    def test_a_url_gets_told_what_is_wanted_instead(self):
        for text, like in [("https://example.org/path", "example.org:443"),
                           ("http://example.org", "example.org:80"),
                           ("http://user:pw@example.org:81/x?y", "example.org:81"),
                           ("redis://localhost:6379/0", "localhost:6379"),
                           ("http://[::1]:80/", "[::1]:80")]:
            with self.assertRaisesRegex(ValueError, "like %s, not the URL" % re.escape(like)):
                vaurien.parse_address(text)

    def test_an_unknown_handler_is_an_error_in_python_too(self):
        with self.assertRaisesRegex(ValueError, "unknown handler 'nope': there are abort"):
            vaurien.Proxy("localhost:9", behavior="20:nope")
        with self.assertRaisesRegex(ValueError, "must be a number, 0 or more, not 'x'"):
            vaurien.Proxy("localhost:9", behavior="20:delay", options={"delay": {"sleep": "x"}})

    def test_what_only_calls_itself_is_refused(self):
        for local, distant in [("localhost:8000", "127.0.0.1:8000"), (":8000", "localhost:8000"),
                               ("127.0.0.1:8000", ":8000")]:
            with self.assertRaisesRegex(ValueError, "would call itself"):
                vaurien.Proxy(distant, local)
        vaurien.Proxy("127.0.0.1:8000", "127.0.0.2:8000")
        vaurien.Proxy("localhost:8000", "localhost:0")


# -- Real sockets: the proxy against an oracle -----------------------------------

@contextlib.contextmanager
def backend_server(talk):
    """A backend: talk(sock) for each connection, in a thread. Yields (port, what talk returned)."""
    listener, saw, threads = listening_socket(), [], []

    def work(sock):
        with sock:
            saw.append(talk(sock))

    def accept():
        with contextlib.suppress(OSError):
            while True:
                sock, _ = listener.accept()
                sock.settimeout(PATIENCE)
                threads.append(threading.Thread(target=work, args=(sock,), daemon=True))
                threads[-1].start()

    threads.append(threading.Thread(target=accept, daemon=True))
    threads[0].start()
    try:
        yield listener.getsockname()[1], saw
    finally:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for thread in threads:
            thread.join(PATIENCE)


@contextlib.contextmanager
def running_proxy(talk, behavior="100:dummy", loop=None, **words):
    """A proxy in front of a backend that talks so."""
    with backend_server(talk) as (port, saw):
        with contextlib.ExitStack() as stack:
            if loop:
                stack.enter_context(mock.patch.object(vaurien, "Loop", loop))
            proxy = stack.enter_context(vaurien.Proxy("127.0.0.1:%d" % port, "127.0.0.1:0",
                                                      behavior, **words))
            proxy.saw = saw
            yield proxy


def connect(port, host="127.0.0.1"):
    sock = socket.create_connection((host, port), PATIENCE)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def connected_client(proxy):
    return contextlib.closing(connect(proxy.port))


def echo(sock):
    """A backend that says again what it hears."""
    with contextlib.suppress(OSError):
        while True:
            data = sock.recv(65536)
            if not data:
                return
            sock.sendall(data)


def read_exactly(sock, size):
    """Exactly size bytes."""
    data = bytearray()
    while len(data) < size:
        piece = sock.recv(size - len(data))
        if not piece:
            raise EOFError(bytes(data))
        data += piece
    return bytes(data)


def send_and_read(sock, data):
    sock.sendall(data)
    return read_exactly(sock, len(data))


def send_and_read_exactly(sock, data, size):
    """Send data while an answer of that size is still to come; both answers."""
    sock.sendall(data)
    return read_exactly(sock, size + len(data))


def read_until_close(sock):
    """All that comes until the end, and how it ends: (size, digest, "eof" or "reset")."""
    digest, size = hashlib.sha1(), 0
    while True:
        try:
            data = sock.recv(1 << 16)
        except (ConnectionError, OSError) as problem:
            if isinstance(problem, socket.timeout):
                raise
            return size, digest.hexdigest(), "reset"
        if not data:
            return size, digest.hexdigest(), "eof"
        digest.update(data)
        size += len(data)


def close_with_reset(sock):
    """Close with RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


@functools.lru_cache(maxsize=64)
def random_data(size, seed=0):
    return random.Random(seed).getrandbits(8 * size).to_bytes(size, "big") if size else b""


def round_trip(sock, data):
    """Send data and hear all that comes, at the same time."""
    def send():
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
    thread = threading.Thread(target=send)
    thread.start()
    heard = read_until_close(sock)
    thread.join(PATIENCE)
    return heard


class Conversations:
    """Pairs of a client and a backend; each returns what it saw."""

    def half_close_client(sock):
        sock.sendall(random_data(100000))
        sock.shutdown(socket.SHUT_WR)
        return read_until_close(sock)

    def half_close_backend(sock):
        heard = read_until_close(sock)
        sock.sendall(random_data(50000, 1))
        return heard

    def server_first_client(sock):
        greeting = read_exactly(sock, 9)
        sock.sendall(b"thanks")
        return greeting, read_until_close(sock)

    def server_first_backend(sock):
        sock.sendall(b"greetings")
        return read_exactly(sock, 6)

    def backend_half_closes_client(sock):
        heard = read_until_close(sock)
        sock.sendall(random_data(300000))
        sock.close()
        return heard

    def backend_half_closes_backend(sock):
        sock.sendall(random_data(1000))
        sock.shutdown(socket.SHUT_WR)
        return read_until_close(sock)

    def both_at_once_client(sock):
        return round_trip(sock, random_data(3000000))

    def both_at_once_backend(sock):
        return round_trip(sock, random_data(5000000, 1))

    def turns_client(sock):
        said = [send_and_read(sock, random_data(1 + turn * 37, turn)) for turn in range(100)]
        return hashlib.sha1(b"".join(said)).hexdigest()

    def turns_backend(sock):
        echo(sock)

    def client_resets_client(sock):
        answer = send_and_read(sock, b"question")
        close_with_reset(sock)
        return answer

    def client_resets_backend(sock):
        sock.sendall(read_exactly(sock, 8))
        return read_until_close(sock)

    def backend_resets_client(sock):
        sock.sendall(b"question")
        answer = read_exactly(sock, 4)
        sock.sendall(b"go")
        return answer, read_until_close(sock)

    def backend_resets_backend(sock):
        read_exactly(sock, 8)
        sock.sendall(b"half")
        read_exactly(sock, 2)
        close_with_reset(sock)

    def answer_and_reset_client(sock):
        sock.sendall(b"question")
        return read_until_close(sock)

    def answer_and_reset_backend(sock):
        read_exactly(sock, 8)
        sock.sendall(random_data(1000))
        close_with_reset(sock)

    def backend_says_nothing_client(sock):
        sock.sendall(b"question")
        return read_until_close(sock)

    def backend_says_nothing_backend(sock):
        return read_exactly(sock, 8)

    def client_leaves_at_once_client(sock):
        sock.shutdown(socket.SHUT_WR)
        return read_until_close(sock)

    def client_leaves_at_once_backend(sock):
        return read_until_close(sock)

    def slow_reader_client(sock):
        sock.sendall(b"go")
        read_exactly(sock, 1000)
        select.select([], [], [], 0.2)      # the backend runs into a full window meanwhile
        return read_until_close(sock)

    def slow_reader_backend(sock):
        read_exactly(sock, 2)
        sock.sendall(random_data(8000000))

    def upload_client(sock):
        sock.sendall(random_data(4000000))
        said = read_exactly(sock, 2)
        sock.sendall(random_data(4000000, 1))
        sock.shutdown(socket.SHUT_WR)
        return said, read_until_close(sock)

    def upload_backend(sock):
        select.select([], [], [], 0.1)
        first = read_exactly(sock, 4000000)
        sock.sendall(b"go")
        return hashlib.sha1(first).hexdigest(), read_until_close(sock)


NAMES = sorted(name[:-len("_client")] for name in vars(Conversations) if name.endswith("_client"))


class SelectLoop(vaurien.Loop):
    """A loop on a machine that has nothing better than select()."""

    def __init__(self):
        super().__init__(selector=selectors.SelectSelector())


class StandardLoop(vaurien.Loop):
    """A loop with the best selector of the standard library."""

    def __init__(self):
        super().__init__(selector=selectors.DefaultSelector())


def hold_conversation(name, port, saw):
    """One conversation, as both sides saw it."""
    with contextlib.closing(connect(port)) as sock:
        client = getattr(Conversations, name + "_client")(sock)
    deadline = time.monotonic() + PATIENCE
    while not saw and time.monotonic() < deadline:
        time.sleep(0.001)
    return client, saw[-1] if saw else "the backend saw no end"


@functools.lru_cache(maxsize=None)
def hold_conversation_directly(name):
    """The same over a direct connection."""
    with backend_server(getattr(Conversations, name + "_backend")) as (port, saw):
        return hold_conversation(name, port, saw)


class TestOracle(unittest.TestCase):
    """The same bytes and the same ending as over a direct connection."""

    def compare(self, behavior, loop=None, options=None):
        for name in NAMES:
            talk = getattr(Conversations, name + "_backend")
            with self.subTest(name, behavior=behavior):
                direct = hold_conversation_directly(name)
                with running_proxy(talk, behavior, loop, options=options) as proxy:
                    self.assertEqual(hold_conversation(name, proxy.port, proxy.saw), direct)
                    wait_until(lambda: not proxy.connections)
                    self.assertEqual((proxy.loop.budget.held, proxy.loop.budget.pipes), (0, 0))

    def test_nothing_armed(self):
        self.compare("100:dummy")

    def test_nothing_drawn(self):
        self.compare("0:hang")

    def test_the_road_of_faults(self):
        self.compare("100:delay", options={"delay": {"sleep": 0.0}})

    def test_a_delay(self):
        self.compare("50:delay", options={"delay": {"sleep": 0.002}})

    def test_a_delay_of_the_answer(self):
        self.compare("50:delay", options={"delay": {"sleep": 0.002, "before": False}})

    def test_nothing_better_than_select(self):
        self.compare("50:delay", SelectLoop, options={"delay": {"sleep": 0.001}})

    def test_the_straight_road_without_epoll_and_splice(self):
        with mock.patch.object(vaurien, "HAVE_SPLICE", False):
            self.compare("100:dummy", SelectLoop)

    def test_the_selector_of_the_standard_library(self):
        self.compare("100:dummy", StandardLoop)


class BulkTestCase:

    def splice(self, data, stages=(), **words):
        """What a client hears that reads in as many stages, and does something after each."""
        with running_proxy(lambda sock: (read_exactly(sock, 2), sock.sendall(data)), **words) as proxy, connected_client(proxy) as sock:
            sock.sendall(b"go")
            heard = bytearray()
            for stage in stages:
                heard += read_exactly(sock, len(data) // (len(stages) + 1))
                stage(proxy)
            while True:
                piece = sock.recv(1 << 16)
                if not piece:
                    self.pipe_pool = len(proxy.loop.pipe_pool)
                    return bytes(heard)
                heard += piece


class TestStraightRoad(BulkTestCase, unittest.TestCase):

    def test_it_reads_no_clock_and_leaves_the_selector_alone(self):
        asked = Counter()

        def counted(name, function):
            def call(*args):
                asked[name] += 1
                return function(*args)
            return call

        with running_proxy(echo) as proxy, connected_client(proxy) as sock:
            send_and_read(sock, b"question")
            loop = proxy.loop

            def watch():
                loop.clock, loop.watch = counted("clock", loop.clock), counted("watch", loop.watch)
            loop.run_sync(watch)
            with mock.patch.object(vaurien.DelayQueue, "put", counted("put", vaurien.DelayQueue.put)):
                for turn in range(100):
                    send_and_read(sock, random_data(1 + turn))
            self.assertEqual(asked, Counter())
            self.assertEqual(loop.run_sync(lambda: proxy.rules.requests), 101)
            set_behavior(proxy, "100:delay", delay={"sleep": 0.0})
            self.assertTrue(asked["clock"])         # it can be counted

    def test_pieces_leave_one_by_one(self):
        sent = []

        class Sock(vaurien.RawSocket):
            def send(self, data, *flags):
                sent.append(bytes(data))
                return super().send(data, *flags)
        with mock.patch.object(vaurien, "RawSocket", Sock), running_proxy(
                echo, "100:slicer", options={"slicer": {"average_size": 10}}) as proxy, connected_client(proxy) as sock:
            for _ in range(3):
                sent.clear()
                send_and_read(sock, b"0123456789abcdefghij")
                self.assertEqual(sent[:2], [b"0123456789", b"abcdefghij"])

    def test_what_a_handler_fails_on_does_not_take_it(self):
        def buggy(state, t, to, data):
            if data == b"bad":
                raise KeyError("bug")
            yield t, to, data

        heard = []

        def listens(sock):
            with contextlib.suppress(OSError):
                while True:
                    heard.append(sock.recv(100))
                    sock.sendall(heard[-1])
        with registered(buggy), running_proxy(listens, "100:buggy") as proxy, connected_client(proxy) as sock:
            self.assertEqual(send_and_read(sock, b"good"), b"good")
            with self.assertLogs("vaurien", "ERROR"):
                sock.sendall(b"bad")
                self.assertEqual(read_until_close(sock)[2], "reset")
            self.assertNotIn(b"bad", heard)

    def test_what_a_fault_leaves_as_it_is_takes_it(self):
        with running_proxy(echo, "100:latency") as proxy, connected_client(proxy) as sock:
            send_and_read(sock, b"question")
            with mock.patch.object(vaurien.DelayQueue, "put", side_effect=AssertionError):
                for turn in range(100):
                    send_and_read(sock, random_data(1 + turn))
            set_behavior(proxy, "100:latency", latency={"latency": 5})
            began = time.monotonic()
            send_and_read(sock, b"question")
            self.assertGreaterEqual(time.monotonic() - began, 0.01)

    def test_bulk_without_it(self):
        data = random_data(1 << 20) * 30
        with mock.patch.object(vaurien, "HAVE_SPLICE", False):
            self.assertEqual(self.splice(data), data)
            self.assertEqual(self.pipe_pool, 0)

    def test_faults_that_come_and_go_while_it_does(self):
        data = random_data(1 << 20) * 30

        def have(*toxics):
            return lambda proxy: proxy.loop.run_sync(proxy.set_toxics, [
                vaurien.Toxic(kind, kind, attributes=attributes) for kind, attributes in toxics])
        stages = [have(), have(("latency", {"latency": 5})), have(("slicer", {"average_size": 1000})), have(("noop", {})), have(),
                  have(("bandwidth", {"rate": 1000000})), have()] * 2
        self.assertEqual(self.splice(data, stages), data)


class TestSplice(BulkTestCase, unittest.TestCase):
    """The straight road of bulk, where there is one; it is taken at once here."""

    def setUp(self):
        patch = mock.patch.object(vaurien, "SPLICE_AFTER", 0)
        patch.start()
        self.addCleanup(patch.stop)

    def test_bulk_goes_through_a_pipe_of_the_kernels(self):
        data = random_data(1 << 20) * 30
        for full in 0, 4:
            with mock.patch.object(vaurien, "SPLICE_AFTER", full):
                self.assertEqual(self.splice(data, [lambda proxy: None] * 3), data)
            self.assertTrue(self.pipe_pool or full)
            self.assertLessEqual(self.pipe_pool, vaurien.KERNEL_PIPES_POOLED)

    def test_a_system_that_will_not(self):
        data = random_data(1 << 20) * 10
        for name, problem in ("pipe2", errno.EMFILE), ("splice", errno.EINVAL), ("splice", errno.ENOSYS):
            with mock.patch.object(os, name, side_effect=OSError(problem, os.strerror(problem))) as refused:
                self.assertEqual(self.splice(data), data)
            self.assertTrue(refused.called)
        with mock.patch.object(vaurien, "F_SETPIPE_SZ", -1):
            self.assertEqual(self.splice(data), data)

    def test_a_peer_that_goes_while_a_pipe_is_full(self):
        for leave in close_with_reset, socket.socket.close:
            def talk(sock):
                with contextlib.suppress(OSError):
                    read_exactly(sock, 2)
                    sock.sendall(random_data(1 << 20) * 40)

            with running_proxy(talk) as proxy:
                before = len(os.listdir("/proc/self/fd"))
                for _ in range(5):
                    with connected_client(proxy) as sock:
                        sock.sendall(b"go")
                        read_exactly(sock, 10 << 20)
                        wait_until(lambda: any(isinstance(data, vaurien.KernelPipe) for connection in list(proxy.connections.values())
                                               for data in list(connection.down.out)))
                        leave(sock)
                        wait_until(lambda: not proxy.connections)
                self.assertEqual(proxy.loop.budget.held, 0)
                spare = 2 * proxy.loop.run_sync(lambda: len(proxy.loop.pipe_pool))
                wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before + spare)


if not vaurien.HAVE_SPLICE:
    del TestSplice


def wait_until(condition):
    """Poll for what another thread is about to do; a test's way to wait, never its clock."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError("waited in vain")
        time.sleep(0.001)


class TestProxy(unittest.TestCase):

    def test_delay_delays_each_request_that_it_is_drawn_for_and_no_other(self):
        with running_proxy(echo, "30:delay", seed=1, options={"delay": {"sleep": 0.05}}) as proxy:
            late = set()
            with connected_client(proxy) as sock:
                for request in range(1, 41):
                    began = time.monotonic()
                    send_and_read(sock, b"question")
                    if time.monotonic() - began >= 0.05:
                        late.add(request)
            drawn = {event.request for event in proxy.events}
            self.assertTrue(5 < len(drawn) < 25)
            self.assertLessEqual(drawn, late)

    def test_the_same_seed_delays_the_same_of_200_requests(self):
        runs = []
        for _ in range(2):
            with running_proxy(echo, "20:delay", seed=1, options={"delay": {"sleep": 0.001}}) as proxy:
                for _ in range(20):
                    with connected_client(proxy) as sock:
                        for _ in range(10):
                            send_and_read(sock, b"question")
                runs.append([(event.connection, event.request) for event in proxy.events])
        self.assertEqual(runs[0], runs[1])
        self.assertTrue(20 < len(runs[0]) < 70, len(runs[0]))

    def test_delay_before_the_backend_is_called_and_before_the_answer(self):
        for before in True, False:
            called = []

            def talk(sock):
                called.append(time.monotonic())
                echo(sock)

            with running_proxy(talk, "100:delay",
                          options={"delay": {"sleep": 0.1, "before": before}}) as proxy:
                began = time.monotonic()
                with connected_client(proxy) as sock:
                    send_and_read(sock, b"question")
                    self.assertGreaterEqual(time.monotonic() - began, 0.1)
            self.assertEqual(called[0] - began >= 0.1, before)

    def test_blackout_closes_at_once_and_the_backend_is_never_called(self):
        with running_proxy(echo, "100:blackout") as proxy:
            with connected_client(proxy) as sock:
                self.assertEqual(read_until_close(sock)[0], 0)
            wait_until(lambda: not proxy.connections)
            self.assertEqual(proxy.saw, [])
            self.assertEqual(proxy.faults, {"blackout": 1})

    def test_blackout_in_the_middle_of_a_connection(self):
        with running_proxy(echo) as proxy, connected_client(proxy) as sock:
            send_and_read(sock, b"question")
            set_behavior(proxy, "100:blackout")
            sock.sendall(b"another")
            self.assertEqual(read_until_close(sock)[0], 0)
            wait_until(lambda: not proxy.connections and proxy.saw)

    def test_abort_delivers_and_then_closes_the_client(self):
        got = []

        def talk(sock):
            got.append(read_exactly(sock, 8))
            sock.sendall(b"answer")
            read_until_close(sock)

        with running_proxy(talk, "100:abort") as proxy, connected_client(proxy) as sock:
            sock.sendall(b"question")
            self.assertEqual(read_until_close(sock)[0], 0)
            wait_until(lambda: proxy.saw)
            self.assertEqual(got, [b"question"])

    def test_error_replaces_the_answer_and_the_next_request_works(self):
        with running_proxy(echo, "100:error") as proxy, connected_client(proxy) as sock:
            sock.sendall(b"question")
            self.assertNotIn(b"question", read_exactly(sock, 1000))
            set_behavior(proxy, "100:dummy")
            self.assertEqual(send_and_read(sock, b"question"), b"question")

    def test_error_injects_into_the_valid_answer(self):
        with running_proxy(echo, "100:error", options={"error": {"inject": True}}) as proxy:
            with connected_client(proxy) as sock:
                sock.sendall(b"leftright")
                answer = read_exactly(sock, 109)
                self.assertEqual(answer[:4] + answer[104:], b"leftright")

    def test_transient_fails_once_for_the_whole_proxy(self):
        with running_proxy(echo, "100:transient") as proxy:
            with connected_client(proxy) as one, connected_client(proxy) as two:
                one.sendall(b"question")
                self.assertNotIn(b"question", read_exactly(one, 1000))
                for sock in one, two, one:
                    self.assertEqual(send_and_read(sock, b"question"), b"question")

    def test_what_hangs_goes_on_when_the_fault_is_removed(self):
        question = random_data(3000000)
        with running_proxy(echo, "100:hang") as proxy, connected_client(proxy) as sock:
            thread = threading.Thread(target=sock.sendall, args=(question,))
            thread.start()
            pipe = proxy.loop.budget
            wait_until(lambda: pipe.held > vaurien.HELD_MAX_IDLE // 2)
            self.assertEqual(proxy.saw, [])
            set_behavior(proxy, "100:dummy")
            self.assertEqual(read_exactly(sock, len(question)), question)
            thread.join(PATIENCE)
            sock.shutdown(socket.SHUT_WR)
            self.assertEqual(read_until_close(sock)[2], "eof")

    def test_a_fault_meets_the_first_request_of_a_connection_that_was_open_before(self):
        with running_proxy(echo) as proxy, connected_client(proxy) as sock:
            wait_until(lambda: proxy.connections)
            set_behavior(proxy, "100:error")
            sock.sendall(b"question")
            self.assertNotIn(b"question", read_exactly(sock, 1000))

    def test_what_hangs_stays_while_another_fault_is_added(self):
        hang = vaurien.Rule("hang")
        with running_proxy(echo) as proxy, connected_client(proxy) as sock:
            proxy.loop.run_sync(proxy.set_rules, [hang])
            sock.sendall(b"question")
            wait_until(lambda: proxy.loop.budget.held)
            proxy.loop.run_sync(proxy.set_rules, [hang, vaurien.Rule("delay", {"sleep": 0.0}, draw_key="b")])
            self.assertTrue(proxy.loop.budget.held)
            self.assertFalse(select.select([sock], [], [], 0.05)[0])
            proxy.loop.run_sync(proxy.set_rules, [])
            self.assertEqual(read_exactly(sock, 8), b"question")

    def test_what_a_backend_said_before_it_left_is_only_late(self):
        """An answer that is delayed is not lost when the client speaks to a closed backend."""
        def talk(sock):
            read_exactly(sock, 8)
            sock.sendall(b"answer")

        options = {"delay": {"sleep": 0.2, "before": False}}
        with running_proxy(talk, "100:delay", options=options) as proxy, connected_client(proxy) as sock:
            sock.sendall(b"question")
            wait_until(lambda: proxy.saw)
            for _ in range(5):
                sock.sendall(b"more")
                time.sleep(0.01)
            self.assertEqual(read_exactly(sock, 6), b"answer")

    def test_a_client_that_resets_is_not_kept_for_what_hangs(self):
        with running_proxy(echo, "100:hang") as proxy:
            sock = connect(proxy.port)
            sock.sendall(b"question")
            wait_until(lambda: proxy.loop.budget.held > vaurien.CHUNK_OVERHEAD * 2)
            close_with_reset(sock)
            wait_until(lambda: not proxy.connections)

    def test_a_pipe_that_is_full_costs_nothing(self):
        """Whoever cannot be read from is not watched: the loop sleeps."""
        with running_proxy(echo, "100:hang") as proxy, connected_client(proxy) as sock:
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    sock.send(bytes(1 << 16))
            wait_until(lambda: proxy.loop.budget.held > vaurien.HELD_MAX_IDLE // 2)
            turns, really = [], proxy.loop.run_timers
            proxy.loop.run_timers = lambda: (turns.append(1), really())
            time.sleep(0.2)
            proxy.loop.run_sync(int)
            self.assertLess(len(turns), 20)

    def test_the_time_to_connect_is_over_when_it_is_connected(self):
        with running_proxy(echo, timeout=0.05) as proxy, connected_client(proxy) as sock:
            send_and_read(sock, b"question")
            self.assertFalse(select.select([sock], [], [], 0.2)[0])
            send_and_read(sock, b"question")

    def test_a_slow_reader_slows_the_sender_down(self):
        """Memory stays bounded, whichever road, and nothing is lost in the end."""
        for behavior in "100:dummy", "100:hang":
            gate = threading.Event()

            def talk(sock):
                gate.wait(PATIENCE)
                return read_until_close(sock)

            with running_proxy(talk, behavior) as proxy, connected_client(proxy) as sock:
                sock.setblocking(False)
                data, sent = random_data(1 << 16), 0
                while select.select([], [sock], [], 0.3)[1] and sent < 1 << 27:
                    with contextlib.suppress(BlockingIOError):
                        sent += sock.send(data[sent % len(data):])
                    self.assertLessEqual(proxy.loop.budget.held, 2 * max(vaurien.HELD_MAX_IDLE, vaurien.KERNEL_PIPE_SIZE))
                self.assertLess(sent, 1 << 27)
                self.assertGreater(proxy.loop.budget.held, vaurien.CHUNK_OVERHEAD * 2)
                gate.set()
                set_behavior(proxy, "100:dummy")
                sock.close()
                wait_until(lambda: proxy.saw)
                self.assertEqual(proxy.saw[0][0], sent)

    def test_who_reads_slowly_holds_up_nobody_else(self):
        def talk(sock):
            sock.sendall(random_data(20000000))

        with running_proxy(talk) as proxy, connected_client(proxy) as slow, connected_client(proxy) as quick:
            self.assertEqual(read_until_close(quick)[0], 20000000)
            self.assertEqual(read_until_close(slow)[0], 20000000)

    def test_what_was_held_and_is_sent_is_given_back(self):
        def talk(sock):
            sock.sendall(random_data(20000000))
            return read_until_close(sock)

        with running_proxy(talk) as proxy, connected_client(proxy) as sock:
            wait_until(lambda: proxy.loop.budget.held)
            read_exactly(sock, 20000000)
            wait_until(lambda: not proxy.loop.run_sync(lambda: proxy.loop.budget.held))

    def test_a_delay_is_no_limit_to_the_bandwidth(self):
        """What is on its way is held: several MiB leave before the first byte arrives."""
        data = random_data(8 << 20)
        with running_proxy(read_until_close, "100:delay", options={"delay": {"sleep": 30.0}}) as proxy:
            with connected_client(proxy) as sock:
                sock.sendall(data)
                self.assertEqual(proxy.saw, [])
                set_behavior(proxy, "100:dummy")
                sock.shutdown(socket.SHUT_WR)
                wait_until(lambda: proxy.saw)
        self.assertEqual(proxy.saw[0], (len(data), hashlib.sha1(data).hexdigest(), "eof"))

    def test_no_backend_closes_the_client_and_says_so_in_one_line(self):
        with vaurien.Proxy("127.0.0.1:%d" % unused_port(), "127.0.0.1:0") as proxy:
            with self.assertLogs("vaurien", "WARNING") as logged, connected_client(proxy) as sock:
                self.assertEqual(read_until_close(sock)[0], 0)
                wait_until(lambda: not proxy.connections)
        self.assertEqual(len(logged.output), 1)
        self.assertIn("cannot connect to backend 127.0.0.1:", logged.output[0])
        self.assertIn("Connection refused", logged.output[0])
        self.assertEqual(proxy.failures, 1)

    def test_every_address_is_tried(self):
        with backend_server(echo) as (port, _), silent_address() as silent:
            with vaurien.Proxy("127.0.0.1:%d" % port, "127.0.0.1:0", timeout=0.6) as proxy:
                addresses = [(socket.AF_INET, ("127.0.0.1", unused_port())),
                             (socket.AF_INET, ("127.0.0.1", silent)),
                             (socket.AF_INET, ("127.0.0.1", port))]
                with mock.patch.object(vaurien, "resolve_numeric", lambda *_: addresses):
                    with connected_client(proxy) as sock:
                        self.assertEqual(send_and_read(sock, b"question"), b"question")

    def test_a_silent_backend_times_out_and_holds_up_nobody_else(self):
        with silent_address() as silent, backend_server(echo) as (port, _):
            with vaurien.Proxy("127.0.0.1:%d" % silent, "127.0.0.1:0", timeout=0.3) as proxy:
                began = time.monotonic()
                with self.assertLogs("vaurien", "WARNING") as logged, connected_client(proxy) as stuck:
                    proxy.loop.run_sync(proxy.set_backend, ("127.0.0.1", port))
                    with connected_client(proxy) as sock:
                        self.assertEqual(send_and_read(sock, b"question"), b"question")
                    read_until_close(stuck)
                    self.assertGreaterEqual(time.monotonic() - began, 0.3)
                self.assertIn("timed out", logged.output[0])

    def test_a_name_is_resolved_off_the_loop_once_for_all_who_wait(self):
        gate, asked = threading.Event(), []

        def resolve(address, *_, **__):
            asked.append(address[0])
            gate.wait(PATIENCE)
            return [(socket.AF_INET, ("127.0.0.1", address[1]))]

        with backend_server(echo) as (port, _), vaurien.Proxy("name.invalid:%d" % port, "127.0.0.1:0") as proxy:
            with mock.patch.object(vaurien, "resolve_numeric", lambda *_: None), \
                    mock.patch.object(vaurien, "resolve", resolve):
                with contextlib.ExitStack() as stack:
                    socks = [stack.enter_context(connected_client(proxy)) for _ in range(5)]
                    for sock in socks:
                        sock.sendall(b"question")
                    wait_until(lambda: len(proxy.connections) == 5)
                    proxy.loop.run_sync(int)            # the loop goes on meanwhile
                    gate.set()
                    for sock in socks:
                        self.assertEqual(read_exactly(sock, 8), b"question")
        self.assertEqual(asked, ["name.invalid"])

    def test_a_name_that_is_unknown_closes_the_client(self):
        def resolve(*_, **__):
            raise socket.gaierror(-2, "Name or service not known")

        with vaurien.Proxy("name.invalid:80", "127.0.0.1:0") as proxy:
            with mock.patch.object(vaurien, "resolve_numeric", lambda *_: None), \
                    mock.patch.object(vaurien, "resolve", resolve), \
                    self.assertLogs("vaurien", "WARNING") as logged, connected_client(proxy) as sock:
                self.assertEqual(read_until_close(sock)[0], 0)
        self.assertIn("Name or service not known", logged.output[0])

    def test_localhost_listens_on_both_families_on_one_port(self):
        with backend_server(echo) as (port, _), vaurien.Proxy("localhost:%d" % port) as proxy:
            families = [sock.family for sock in proxy.listener.sockets]
            self.assertEqual(len({sock.getsockname()[1] for sock in proxy.listener.sockets}), 1)
            for sock in proxy.listener.sockets:
                with contextlib.closing(connect(proxy.port, sock.getsockname()[0])) as client:
                    self.assertEqual(send_and_read(client, b"question"), b"question")
            self.assertIn(socket.AF_INET, families)
            if has_ipv6():
                self.assertIn(socket.AF_INET6, families)

    def test_a_machine_without_ipv6_listens_on_what_it_has(self):
        really = vaurien.bind_listener

        def bind_listener(family, address):
            if family == socket.AF_INET6:
                raise OSError(vaurien.errno.EADDRNOTAVAIL, "Cannot assign requested address")
            return really(family, address)

        with mock.patch.object(vaurien, "bind_listener", bind_listener):
            with vaurien.Proxy("127.0.0.1:9") as proxy:
                self.assertEqual(len(proxy.listener.sockets), 1)

    def test_a_port_in_use_is_an_error_that_names_it_and_leaves_nothing_open(self):
        with contextlib.closing(socket.socket()) as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen(1)
            port = taken.getsockname()[1]
            with self.assertRaisesRegex(OSError, "cannot listen on 127.0.0.1:%d: Address" % port):
                vaurien.Proxy("127.0.0.1:9", "localhost:%d" % port).__enter__()

    def test_leaving_the_block_closes_everything(self):
        with backend_server(echo) as (backend, saw):
            with vaurien.Proxy("127.0.0.1:%d" % backend, "127.0.0.1:0") as proxy:
                port, sock = proxy.port, connect(proxy.port)
                send_and_read(sock, b"question")
            self.assertEqual(read_until_close(sock)[0], 0)
            sock.close()
            wait_until(lambda: saw)
            with self.assertRaises(OSError):
                connect(port)
        self.assertFalse(proxy.thread.is_alive())

    def test_no_delay_of_nagles_on_either_side(self):
        with running_proxy(echo) as proxy, connected_client(proxy) as sock:
            send_and_read(sock, b"question")
            connection, = proxy.connections.values()
            for end in connection.client, connection.backend:
                self.assertTrue(end.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    def test_nothing_leaks(self):
        with running_proxy(echo, "20:delay,10:blackout,10:error,10:abort",
                      options={"delay": {"sleep": 0.001}}) as proxy:
            def some():
                for _ in range(100):
                    with connected_client(proxy) as sock, contextlib.suppress(OSError, EOFError):
                        send_and_read(sock, b"question")
                wait_until(lambda: not proxy.connections)
                return proxy.loop.run_sync(lambda: (len(proxy.loop.selector.get_map()),
                                                proxy.loop.budget.held, proxy.loop.budget.pipes))
            self.assertEqual(some(), (2, 0, 0))         # the listener and the door
            self.assertEqual(some(), (2, 0, 0))
            self.assertGreater(len(proxy.faults), 2)

    def test_no_descriptors_left_is_a_pause_and_no_end(self):
        with running_proxy(echo) as proxy, connected_client(proxy) as here:
            send_and_read(here, b"question")
            listener = proxy.listener.sockets[0]
            full = mock.Mock(accept=mock.Mock(
                side_effect=OSError(vaurien.errno.EMFILE, "Too many open files")))
            with mock.patch.object(vaurien, "RETRY_DELAY", 0.05), \
                    self.assertLogs("vaurien", "WARNING") as logged:
                proxy.loop.run_sync(lambda: (proxy.loop.watch(listener, 0), proxy.listener.pause(
                    listener, full.accept.side_effect)))
                self.assertEqual(send_and_read(here, b"question"), b"question")
                with connected_client(proxy) as sock:
                    self.assertEqual(send_and_read(sock, b"question"), b"question")
            self.assertIn("Too many open files", logged.output[0])

    def test_a_selector_that_takes_no_more_is_a_pause_too(self):
        with mock.patch.object(vaurien, "RETRY_DELAY", 0.05), running_proxy(echo, loop=SelectLoop) as proxy:
            proxy.loop.limit = 6
            with connected_client(proxy) as one, connected_client(proxy) as two:
                for sock in one, two:
                    send_and_read(sock, b"question")
                with self.assertLogs("vaurien", "WARNING"), connected_client(proxy) as three:
                    three.sendall(b"question")
                    wait_until(lambda: proxy.listener.last_warning)
                    one.close()
                    self.assertEqual(read_exactly(three, 8), b"question")

    def test_as_many_are_accepted_in_a_row_as_there_seem_to_be(self):
        with running_proxy(echo) as proxy, mock.patch.object(vaurien, "RawSocket"), mock.patch.object(proxy.listener, "welcome") as welcome:
            listener, taken = mock.Mock(_accept=mock.Mock(return_value=(-1, ("127.0.0.1", 1)))), []

            def accept():
                proxy.loop.run_sync(proxy.listener.accept, listener, selectors.EVENT_READ)
                taken.append(welcome.call_count - sum(taken))
            proxy.listener.sockets.append(listener)
            for _ in range(30):
                accept()
            self.assertEqual((taken[:4], taken[-1]), ([1, 1, 1, 1], vaurien.ACCEPT_BURST))     # one who comes alone costs one call
            self.assertEqual(taken, sorted(taken))
            listener._accept.side_effect = [(-1, ("127.0.0.1", 1)), BlockingIOError()]
            accept()
            listener._accept.side_effect = None
            accept()
            self.assertEqual(taken[-2:], [1, vaurien.ACCEPT_BURST // 2])
            proxy.listener.sockets.remove(listener)

    def test_who_has_asked_before_he_is_accepted_does_not_wait_for_another_turn(self):
        with contextlib.ExitStack() as stack:
            backend = stack.enter_context(contextlib.closing(listening_socket()))
            proxy = vaurien.Proxy("127.0.0.1:%d" % backend.getsockname()[1], "127.0.0.1:0")
            proxy.bind()
            sock = stack.enter_context(contextlib.closing(connect(proxy.port)))
            sock.sendall(b"question")
            loop = vaurien.Loop()
            stack.callback(loop.close)
            stack.callback(proxy.close)
            proxy.open(loop)
            (key, events), = loop.selector.select(PATIENCE)
            key.data(events)
            if vaurien.LINUX:               # others may still be calling the backend
                backend.settimeout(PATIENCE)
                asked = stack.enter_context(contextlib.closing(backend.accept()[0]))
                asked.settimeout(PATIENCE)
                self.assertEqual(read_exactly(asked, 8), b"question")

    def test_a_client_that_has_gone_before_it_is_accepted(self):
        gone = mock.Mock(getpeername=mock.Mock(side_effect=OSError("gone")))
        with running_proxy(echo) as proxy:
            listener = mock.Mock(_accept=mock.Mock(
                side_effect=[(-1, None), ConnectionAbortedError(), BlockingIOError()]))
            proxy.listener.sockets.append(listener)
            proxy.listener.burst = 3
            with mock.patch.object(vaurien, "RawSocket", return_value=gone):
                proxy.loop.run_sync(proxy.listener.accept, listener, selectors.EVENT_READ)
            self.assertEqual(listener._accept.call_count, 3)
            proxy.listener.sockets.remove(listener)
            gone.close.assert_called_once_with()
            proxy.loop.run_sync(proxy.listener.accept, listener, selectors.EVENT_READ)      # closed meanwhile: nothing happens
            with connected_client(proxy) as sock:
                send_and_read(sock, b"question")

    def test_no_more_threads_is_a_name_that_is_not_found(self):
        loop, outcome = vaurien.Loop(), []
        with mock.patch.object(threading.Thread, "start", side_effect=RuntimeError("no thread")):
            loop.run_in_thread(int, lambda *result: (outcome.extend(result), loop.stop()))
        loop.run()
        loop.close()
        self.assertEqual((outcome[0], str(outcome[1])), (None, "no thread"))

    def test_leaving_the_block_closes_everything_even_after_a_crash(self):
        def crash():
            raise SystemExit

        with running_proxy(echo) as proxy:
            sock = connect(proxy.port)
            send_and_read(sock, b"question")
            proxy.loop.call_soon_threadsafe(crash)
            proxy.thread.join(PATIENCE)
        self.assertEqual(read_until_close(sock)[0], 0)
        sock.close()
        self.assertIsNone(proxy.listener)

    def test_the_log_says_what_a_fault_did_and_how_a_connection_ended(self):
        with running_proxy(echo, "100:delay", seed=7, options={"delay": {"sleep": 0.001}}) as proxy:
            with self.assertLogs("vaurien", "DEBUG") as logged:
                with connected_client(proxy) as sock:
                    send_and_read(sock, b"question")
                    client = "127.0.0.1:%d" % sock.getsockname()[1]
                wait_until(lambda: not proxy.connections)
        self.assertIn("client %s, request 1: delay sleep=0.001" % client, logged.output[0])
        self.assertRegex(logged.output[1], "client %s: closed after [0-9.]+ s, 8 bytes up, "
                                           "8 bytes down, requests: 1" % client)

    def test_the_log_says_which_fault_ended_a_connection(self):
        with running_proxy(echo, "100:blackout") as proxy:
            with self.assertLogs("vaurien", "DEBUG") as logged:
                with connected_client(proxy) as sock:
                    read_until_close(sock)
                wait_until(lambda: not proxy.connections)
        self.assertIn("closed by blackout after", logged.output[1])


def listening_socket(port=0):
    """A socket that listens there."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.bind(("127.0.0.1", port))
    sock.listen(vaurien.BACKLOG)
    return sock


def unused_port():
    """A port that nobody listens on, below those that the system gives to whoever asks for one."""
    while True:
        port = random.SystemRandom().randrange(10000, 32000)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for family, host in [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")][:1 + has_ipv6()]:
                stack.enter_context(contextlib.closing(socket.socket(family))).bind((host, port))
            return port


@contextlib.contextmanager
def silent_address():
    """A port that answers no call: its queue of connections is full (Linux drops the rest)."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(contextlib.closing(socket.socket()))
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(5):
            sock = stack.enter_context(contextlib.closing(socket.socket()))
            sock.setblocking(False)
            sock.connect_ex(listener.getsockname())
        if not select.select([], [sock], [], 0.2)[1]:
            yield listener.getsockname()[1]
        else:
            raise unittest.SkipTest("this system takes every connection")


def has_ipv6():
    with contextlib.suppress(OSError):
        with contextlib.closing(socket.socket(socket.AF_INET6)) as sock:
            sock.bind(("::1", 0))
            return True
    return False


# -- The command line -------------------------------------------------------------

INI = """
[vaurien]
distant = google.com:80
local = localhost:8000
behavior = 20:delay

[handler:delay]
sleep = 2
"""


class TempDirTestCase(unittest.TestCase):
    """Tests that write files: each has a folder of its own, and is in it."""

    def setUp(self):
        self.folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.folder)
        here = os.getcwd()
        os.chdir(self.folder)
        self.addCleanup(os.chdir, here)

    def write(self, name, text):
        with open(name, "w", encoding="utf-8") as file:
            file.write(text)
        return name


class TestSettings(TempDirTestCase):
    """What the command line and the ini file come to, before anything is opened."""

    def proxies(self, *argv):
        found = vaurien.read_arguments(list(argv), vaurien.SETTINGS)
        return list(vaurien.make_proxies(found).values())

    def proxy(self, *argv):
        proxy, = self.proxies(*argv)
        return proxy

    def options(self, *argv):
        return [rule.options for rule in self.proxy(*argv).rules.armed]

    def test_the_defaults(self):
        proxy = self.proxy()
        self.assertEqual((proxy.local, proxy.backend, proxy.rules.armed, proxy.timeout),
                         (("localhost", 8000), ("localhost", 80), [], 30.0))

    def test_both_spellings(self):
        for argv in (["--local", "localhost:1", "--distant", "google.com:2"],
                     ["--proxy", "localhost:1", "--backend=google.com:2"]):
            proxy = self.proxy(*argv)
            self.assertEqual((proxy.local, proxy.backend), (("localhost", 1), ("google.com", 2)))

    def test_every_spelling_of_a_handlers_option(self):
        for argv in (["--handlers.delay.sleep", "2"], ["--handlers.delay.sleep=2"],
                     ["--behavior-delay-sleep", "2"], ["--behavior-delay-sleep=2"]):
            self.assertEqual(self.options("--behavior", "20:delay", *argv),
                             [{"sleep": 2.0, "before": True}])

    def test_yes_and_no(self):
        for word, value in ("yes", True), ("no", False), ("TRUE", True), ("off", False), ("0", False):
            self.assertEqual(self.options("--behavior", "20:delay", "--handlers.delay.before", word),
                             [{"sleep": 1.0, "before": value}])

    def test_the_documented_file(self):
        proxy = self.proxy("--config", self.write("v.ini", INI))
        self.assertEqual((proxy.local, proxy.backend), (("localhost", 8000), ("google.com", 80)))
        self.assertEqual(proxy.describe(), "20:delay sleep=2.0, 80:dummy")

    def test_the_other_spellings_in_a_file(self):
        proxy = self.proxy("--config", self.write("v.ini", """
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
            """.replace("\n            ", "\n")))
        self.assertEqual((proxy.local, proxy.backend, proxy.seed, proxy.timeout),
                         (("", 0), ("::1", 80), 7, 1.5))
        self.assertEqual(proxy.describe(), "20:delay sleep=2.0 before=no, 5:error warmup=0, 75:dummy")

    def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(self):
        path = self.write("v.ini", INI)
        proxy = self.proxy("--config", path, "--distant", "example.org:81", "--behavior", "5:delay",
                           "--handlers.delay.sleep", "3")
        self.assertEqual((proxy.local, proxy.backend), (("localhost", 8000), ("example.org", 81)))
        self.assertEqual(proxy.describe(), "5:delay sleep=3.0, 95:dummy")

    def test_the_environment_in_a_file(self):
        path = self.write("v.ini", "[vaurien]\ndistant = ${BACKEND_HOST}:${BACKEND_PORT}\n")
        with mock.patch.dict(os.environ, BACKEND_HOST="example.org", BACKEND_PORT="81"):
            self.assertEqual(self.proxy("--config", path).backend, ("example.org", 81))

    def test_several_proxies(self):
        path = self.write("v.ini", """
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
""")
        one, two = self.proxies("--config", path)
        self.assertEqual((one.name, one.local, one.backend, one.describe(), one.seed),
                         ("redis", ("localhost", 1), ("localhost", 6379),
                          "20:delay sleep=1.0, 80:dummy", 5))
        self.assertEqual((two.name, two.local, two.describe(), two.timeout, two.seed),
                         ("sql", ("localhost", 2), "10:hang, 90:dummy", 3.0, 5))
        found = self.proxies("--config", path, "--behavior", "1:error")
        self.assertEqual({proxy.describe() for proxy in found}, {"1:error warmup=0, 99:dummy"})
        with self.assertRaisesRegex(ValueError, "--local .* which proxy .* redis, sql"):
            self.proxies("--config", path, "--local", "localhost:3")

    def test_the_protocol(self):
        path = self.write("v.ini", "[vaurien]\nprotocol = http\nprotocol_http_overwrite_host_header = no\n")
        proxy = self.proxy("--config", path)
        self.assertEqual((proxy.protocol, proxy.overwrite_host_header), (vaurien.Http, False))
        proxy = self.proxy("--protocol", "redis", "--behavior", "5:error", "--handlers.error.kind", "OOM")
        self.assertEqual((proxy.protocol, proxy.describe()), (vaurien.Redis, "5:error warmup=0 kind=OOM, 95:dummy"))
        with self.assertRaisesRegex(ValueError, "kind must be one of LOADING"):
            self.proxy("--protocol", "redis", "--behavior", "5:error", "--handlers.error.kind", "1213")

    def test_the_fields_of_a_rule_beside_the_options_of_its_handler(self):
        path = self.write("v.ini", "[vaurien]\nbehavior = 20:error,5:delay\n[handler:error]\nmatch = ^SELECT .* FROM carts\ntimes = 3\n")
        one, two = self.proxy("--config", path, "--handlers.delay.after", "2", "--behavior-delay-per=connection").rules.armed
        self.assertEqual((one.match.pattern, one.times, one.after), (b"^SELECT .* FROM carts", 3, 0))
        self.assertEqual((two.match, two.after, two.per, two.draw_max - two.draw_min), (None, 2, "connection", 5))
        for words in ["--handlers.error.match", "("], ["--handlers.error.times=-1"], ["--handlers.error.per", "chunk"]:
            with self.assertRaisesRegex(ValueError, "^--handlers.error.(match|times|per) must be"):
                self.proxy("--behavior", "1:error", *words)
        with self.assertRaisesRegex(ValueError, "unrecognized arguments: --handlers.error.percent"):
            self.proxy("--handlers.error.percent", "5")

    def test_toxics_of_a_file(self):
        path = self.write("v.ini", """
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
""")
        proxy = self.proxy("--config", path)
        self.assertEqual(proxy.describe(), "100:dummy, toxic slow (50:upstream latency latency=200 jitter=0), toxic lost (20:downstream hang)")
        lost = proxy.rules.armed[1]
        self.assertEqual((lost.per, lost.times, lost.match.pattern), ("request", 3, b"^SELECT .* FROM carts"))
        path = self.write("v.ini", "[proxy:a]\nlocal=:1\n[proxy:b]\nlocal=:2\n[toxic:x]\nproxy=b\ntype=noop\n")
        self.assertEqual([len(proxy.toxics) for proxy in self.proxies("--config", path)], [0, 1])

    def test_proxies_of_toxiproxys_file(self):
        path = self.write("toxiproxy.json", json.dumps([
            {"name": "redis", "listen": "[::]:26379", "upstream": "localhost:6379", "x": 1},
            {"name": "sql", "listen": "localhost:0", "upstream": "localhost:3306", "enabled": False,
             "toxics": [{"type": "latency", "attributes": {"latency": 5}}]}]))
        one, two = self.proxies("--config", path, "--seed", "7")
        self.assertEqual((one.name, one.local, one.backend, one.enabled, one.seed),
                         ("redis", ("::", 26379), ("localhost", 6379), True, 7))
        self.assertEqual((two.enabled, two.describe()), (False, "100:dummy, toxic latency_downstream (100:downstream latency latency=5 jitter=0)"))
        self.assertEqual([proxy.name for proxy in self.proxies("--config", path, "--local", "localhost:1")], ["vaurien", "redis", "sql"])
        for empty in " [ ] ", "[]":
            self.assertEqual(self.proxies("--config", self.write("empty.json", empty)), [])

    def test_a_server_without_a_proxy(self):
        found = vaurien.read_arguments(["-host=127.0.0.1", "-port", "0", "-seed=5"], vaurien.SERVE_SETTINGS)
        self.assertEqual(len(vaurien.make_proxies(found, needs_one=False)), 0)
        path = self.write("v.ini", "[vaurien]\nseed = 3\nhttp-port = 1\n[proxy:a]\nlocal = :1\n")
        found = vaurien.read_arguments(["--config", path], vaurien.SERVE_SETTINGS)
        proxies = vaurien.make_proxies(found, needs_one=False)
        self.assertEqual((list(proxies), proxies.seed, proxies["a"].seed), (["a"], 3, 3))

    def test_the_command_line_wins_over_the_only_proxy_of_a_file(self):
        path = self.write("v.ini", "[proxy:redis]\nlocal = localhost:1\ndistant = localhost:2\n")
        proxy = self.proxy("--config", path, "--distant", "localhost:3")
        self.assertEqual((proxy.name, proxy.local, proxy.backend),
                         ("redis", ("localhost", 1), ("localhost", 3)))

    def test_vaurien_beside_others_keeps_its_behavior_for_itself(self):
        path = self.write("v.ini", INI + "[proxy:redis]\nlocal = localhost:1\n")
        self.assertEqual([proxy.describe() for proxy in self.proxies("--config", path)],
                         ["20:delay sleep=2.0, 80:dummy", "100:dummy"])

    def test_a_handler_of_the_users(self):
        self.write("mine_%d.py" % os.getpid(), """
def shout(state, t, to, data, *, loud=1, the_word="hey", wait=0.5, on=True):
    yield t + wait, to, data.upper() if data else data
""")
        path = "mine_%d.shout" % os.getpid()
        self.addCleanup(HANDLERS.pop, path, None)
        self.assertEqual(
            self.options("--behavior", "20:" + path, "--handlers.%s.loud=3" % path,
                         "--behavior-%s-the-word=ho" % path),
            [{"loud": 3, "the_word": "ho", "wait": 0.5, "on": True}])
        self.addCleanup(HANDLERS.pop, "shout", None)
        file = self.write("v.ini", "[vaurien]\nbehavior = 20:shout\n[handler:shout]\n"
                                   "callable = %s\nwait = 2\n" % path)
        self.assertEqual(self.options("--config", file, "--handlers.shout.on", "no"),
                         [{"loud": 1, "the_word": "hey", "wait": 2.0, "on": False}])


class TestBadInput(TempDirTestCase):
    """One line that names the thing, what is wrong, and what would be right; status 2."""

    def refused(self, *argv, **ini):
        if ini:
            argv = ("--config", self.write("v.ini", ini["ini"]), *argv)
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said), \
                mock.patch.object(vaurien, "serve", self.fail):
            self.assertEqual(vaurien.main(list(argv)), 2, argv)
        self.assertRegex(said.getvalue(), "^vaurien: [^\n]+\n$")
        return said.getvalue()[len("vaurien: "):-1]

    def test_the_command_line(self):
        for argv, words in [
                (["--local", "nope"], "--local must be HOST:PORT, like localhost:8000"),
                (["--distant", "https://example.org/path"],
                 "--distant must be HOST:PORT, without a scheme or a path, like example.org:443"),
                (["--distant", "localhost:0"], "--distant must have a port from 1 to 65535"),
                (["--backend", "x:1", "--proxy", ":99999"], "--local must have a port from 0"),
                (["--behavior", "60:delay,60:error"], "--behavior must add up to 100 percent at most"),
                (["--behavior", "20:nope"], "--behavior names the unknown handler 'nope': one of abort"),
                (["--behavior", "20"], "--behavior must be PERCENT:HANDLER"),
                (["--behavior", "20:no.such.thing"],
                 "--behavior cannot import 'no.such.thing': ModuleNotFoundError"),
                (["--behavior", "20:os.nope"], "--behavior cannot import 'os.nope': AttributeError"),
                (["--behavior", "20:os.sep"], "'os.sep' is no handler"),
                (["--behavior", "20:threading.Thread"], "'threading.Thread' is no handler"),
                (["--behavior", "20:os.getcwd"], "a handler is a function (state, t, to, data, *"),
                (["--handlers.delay.sleep", "fast"],
                 "--handlers.delay.sleep must be a number, 0 or more, not 'fast'"),
                (["--handlers.delay.sleep", "-1"], "must be a number, 0 or more, not '-1'"),
                (["--handlers.delay.sleep", "nan"], "must be a number, 0 or more, not 'nan'"),
                (["--handlers.delay.sleep", "1e999"], "must be a number, 0 or more, not '1e999'"),
                (["--behavior-delay-before", "perhaps"],
                 "--handlers.delay.before must be yes or no, not 'perhaps'"),
                (["--handlers.error.warmup", "1.5"], "must be a whole number, 0 or more, not '1.5'"),
                (["--handlers.delay.dely", "1"], "unrecognized arguments: --handlers.delay.dely"),
                (["--handlers.nope.sleep", "1"], "unrecognized arguments"),
                (["--seed", "x"], "--seed must be a whole number, 0 or more, not 'x'"),
                (["--timeout", "0"], "--timeout must be a number of seconds, more than 0, not '0'"),
                (["--timeout", "-1"], "--timeout must be a number of seconds, more than 0"),
                (["--log-level", "loud"], "--log-level must be one of debug, info"),
                (["--log-output", "/no/such/folder/x"], "cannot log to /no/such/folder/x: No such"),
                (["--config", "/no/such.ini"], "cannot read /no/such.ini: No such file"),
                (["--local", "${X:80"], "--local must be HOST:PORT"),
                (["--distant", "postgresql://me:secret@db/x"],
                 "like db:PORT, not the URL 'postgresql://...@db/x'"),
                (["--config", ""], "--config must name a file, not ''"),
                (["a\nb"], "unrecognized arguments: a b"),
                (["--nope"], "unrecognized arguments: --nope"), (["nope"], "unrecognized arguments"),
                (["--loc", "localhost:1"], "unrecognized arguments"),
                (["--local"], "argument --local/--proxy: expected one argument"),
                (["--local", "localhost:9", "--distant", "127.0.0.1:9"], "would call itself"),
                (["demo", "--requests", "0"], "--requests must be a whole number from 10 to 1000"),
                (["demo", "--behavior", "20:nope"], "--behavior names the unknown handler 'nope'"),
                (["demo", "--distant", "x:1"], "unrecognized arguments: --distant")]:
            with self.subTest(argv):
                self.assertIn(words, self.refused(*argv))

    def test_the_file(self):
        for ini, words in [
                ("[nope]\n", "v.ini: [nope] is not a section"),
                ("[DEFAULT]\nlocal = x:1\n", "[DEFAULT] is not a section"),
                ("[proxy:]\n", "[proxy:] is not a section"),
                ("local = x:1\n", "cannot read v.ini: File contains no section headers"),
                ("[vaurien]\nlocal\n", "cannot read v.ini: Source contains parsing errors"),
                ("[vaurien]\n[vaurien]\n", "cannot read v.ini: While reading"),
                ("[vaurien]\nnope = 1\n", "v.ini: [vaurien] nope is not a setting: here are local"),
                ("[vaurien]\nlocal = x\n", "v.ini: [vaurien] local must be HOST:PORT"),
                ("[vaurien]\nproxy = x\n", "v.ini: [vaurien] proxy must be HOST:PORT"),
                ("[vaurien]\nlocal = x:1\nproxy = x:1\n", "[vaurien] proxy says again"),
                ("[vaurien]\nbehavior = 20:nope\n", "[vaurien] behavior names the unknown handler"),
                ("[vaurien]\nlog-level = loud\n", "v.ini: [vaurien] log-level must be one of"),
                ("[proxy:a]\nlog-level = info\n", "v.ini: [proxy:a] log-level is not a setting"),
                ("[proxy:a]\nseed = x\n", "v.ini: [proxy:a] seed must be a whole number"),
                ("[proxy:a]\n[proxy: a]\n", "v.ini: [proxy: a] says again"),
                ("[handler:delay]\ndely = 1\n", "v.ini: [handler:delay] dely is not an option of "
                                                "delay: it has before, sleep"),
                ("[handler:hang]\nx = 1\n", "is not an option of hang: it has none"),
                ("[handler:delay]\nsleep = fast\n", "v.ini: [handler:delay] sleep must be a number"),
                ("[handler:delay]\nsleep = 1\n[behavior:delay]\nsleep = 1\n", "sleep says again"),
                ("[handler:nope]\n", "v.ini: [handler:nope] names the unknown handler 'nope'"),
                ("[handler:x]\ncallable = no.such\n", "[handler:x] callable cannot import 'no.such'"),
                ("[vaurien]\nlocal = ${NO_SUCH_NAME}:1\n",
                 "v.ini: [vaurien] local needs ${NO_SUCH_NAME}, which is not set"),
                ("[vaurien]\nlocal = ${HOME:1\n", "[vaurien] local has a ${ without its }"),
                ("[vaurien]\nlocal = \n", "[vaurien] local must be HOST:PORT"),
                ("[vaurien]\nbehavior = 20:delay,60:error,60:hang", "must add up to 100 percent"),
                ("[toxic:a]\n", "v.ini: [toxic:a] type names the unknown handler ''"),
                ("[toxic:a]\ntype = noop\n[toxic: a]\ntype = noop\n", "[toxic: a] says again"),
                ("[toxic:a]\ntype = latency\nlatence = 1\n", "v.ini: [toxic:a] latence is not an option of latency"),
                ("[toxic:a]\ntype = latency\nlatency = -1\n", "v.ini: [toxic:a] latency must be a whole number, 0 or more"),
                ("[toxic:a]\ntype = noop\ntoxicity = 2\n", "v.ini: [toxic:a] toxicity must be a number from 0 to 1"),
                ("[toxic:a]\ntype = noop\ntoxicity = 1\npercent = 2\n", "percent and toxicity say the same"),
                ("[toxic:a]\ntype = noop\nmatch = (\n", "v.ini: [toxic:a] match must be a regular expression"),
                ("[toxic:a]\ntype = noop\nproxy = b\n", "v.ini: [toxic:a] proxy must be one of vaurien, not 'b'"),
                ("[proxy:a]\n[proxy:b]\n[toxic:c]\ntype = noop\n", "[toxic:c] must say proxy = one of a, b"),
                ("[vaurien]\nstatsd = x\n", "v.ini: [vaurien] statsd must be HOST:PORT"),
                ("[{", "cannot read v.ini: unexpected EOF"), ("{}", "cannot read v.ini: json: cannot unmarshal object"),
                ('[{"name": "a"}]', "cannot read v.ini: missing required field: upstream at proxy 1"),
                ('[{"name": "a", "upstream": "x:1", "listen": "x"}]', "cannot read v.ini: listen tcp: address x: missing port"),
                ('[{"name": "a", "upstream": "http://x/"}]', "cannot read v.ini: upstream must be HOST:PORT, without a scheme")]:
            with self.subTest(ini):
                self.assertIn(words, self.refused(ini=ini))

    def test_what_the_command_line_wins_over_is_checked_all_the_same(self):
        for ini, argv in [("[vaurien]\nseed = x\n", ["--seed", "1"]),
                          ("[vaurien]\nbehavior = 20:nope\n", ["--behavior", "1:delay"]),
                          ("[vaurien]\ndistant = http://x\n", ["--distant", "h:1"]),
                          ("[vaurien]\ntimeout = x\n[proxy:a]\ntimeout = 1\n", []),
                          ("[handler:delay]\nsleep = x\n", ["--handlers.delay.sleep", "1"])]:
            self.assertIn("v.ini: [", self.refused(*argv, ini=ini))

    def test_a_module_that_exits_is_no_end_of_ours(self):
        self.write("leaves_%d.py" % os.getpid(), "import sys\nsys.exit(3)\n")
        self.assertIn("SystemExit: 3", self.refused("--behavior", "1:leaves_%d.x" % os.getpid()))

    def test_a_file_that_is_no_text(self):
        with open("v.ini", "wb") as file:
            file.write(b"[vaurien]\nlocal = \xff\xfe:1\n")
        self.assertIn("cannot read v.ini: 'utf-8' codec", self.refused("--config", "v.ini"))

    def test_a_value_that_looks_like_a_format(self):
        for text in "%", "%s", "%(x)s", "{}", "\\", "\u00fc":
            self.refused("--behavior", text)
            self.refused(ini="[vaurien]\nbehavior = %s\n" % text)

    def test_random_texts_are_refused_or_understood_but_never_more(self):
        chance = random.Random(5)
        alphabet = "0123456789:.,[]%-/ \t\nadelyx@\u00e9\0"
        for _ in range(3000):
            text = "".join(chance.choice(alphabet) for _ in range(chance.randrange(12)))
            for parse in vaurien.parse_address, vaurien.parse_listener, vaurien.parse_behavior:
                with contextlib.suppress(ValueError):
                    parse(text)


class TestProcess(TempDirTestCase):
    """The program as it is started by hand."""

    def start(self, *argv, **words):
        process = subprocess.Popen([sys.executable, FILE, *argv], stderr=subprocess.PIPE,
                                   stdout=subprocess.PIPE, universal_newlines=True, **words)
        self.addCleanup(self.end, process)
        return process

    def end(self, process):
        process.kill()
        process.wait(PATIENCE)
        process.stdout.close()
        process.stderr.close()

    def listening(self, process):
        """The ports named by the first line of the log."""
        line = process.stderr.readline()
        self.assertIn("listening on", line)
        return [int(port) for port in re.findall(r"(?:127\.0\.0\.1|\]):(\d+)", line.split(" for ")[0])]

    def test_the_main_job_and_the_end_by_each_signal(self):
        for number in signal.SIGTERM, signal.SIGINT:
            with backend_server(echo) as (port, _):
                process = self.start("--local", "localhost:0", "--distant", "localhost:%d" % port,
                                     "--behavior", "100:delay", "--handlers.delay.sleep=0.01",
                                     "--seed", "3")
                ports = self.listening(process)
                self.assertEqual(len(set(ports)), 1)
                with contextlib.closing(connect(ports[0])) as sock:
                    began = time.monotonic()
                    self.assertEqual(send_and_read(sock, b"question"), b"question")
                    self.assertGreaterEqual(time.monotonic() - began, 0.01)
                    process.send_signal(number)
                    self.assertEqual(read_until_close(sock)[0], 0)
                out, err = process.communicate(timeout=PATIENCE)
                self.assertEqual((process.returncode, out), (0, ""))
                self.assertIn("request 1: delay sleep=0.01\n", err)
                self.assertRegex(err, "stopped: connections: 1, requests: 1, faults: 1 delay\n$")
                self.assertNotIn("Traceback", err)

    def test_the_end_does_not_wait_for_anybody(self):
        with backend_server(echo) as (port, _), silent_address() as silent:
            self.write("v.ini", "[proxy:a]\nlocal=127.0.0.1:0\ndistant=127.0.0.1:%d\n"
                                "behavior=100:hang\n[proxy:b]\nlocal=127.0.0.1:0\n"
                                "distant=127.0.0.1:%d\n" % (port, silent))
            process = self.start("--config", "v.ini")
            socks = [connect(self.listening(process)[0]) for _ in range(2)]
            for sock in socks:
                sock.sendall(b"question")
            self.assertIn("hang", process.stderr.readline())
            process.terminate()
            process.communicate(timeout=PATIENCE)
            self.assertEqual(process.returncode, 0)
            for sock in socks:
                sock.close()

    def test_what_started_it_may_end_it_through_stdin(self):
        process = self.start("--attached", "--local", "127.0.0.1:0", stdin=subprocess.PIPE)
        self.assertEqual(process.stdout.readline(), "ready\n")
        process.stdin.close()
        self.assertEqual(process.wait(PATIENCE), 0)

    def test_a_server_for_toxiproxys_clients(self):
        self.write("toxiproxy.json", json.dumps([{"name": "a", "listen": "127.0.0.1:0", "upstream": "localhost:1"}]))
        for argv, names in (["--http-port", "0"], []), (["-port=0", "-config", "toxiproxy.json"], ["a"]):
            process = self.start("serve", *argv)
            while True:
                line = process.stderr.readline()
                if "control on" in line:
                    break
            port = int(re.search(r"127\.0\.0\.1:(\d+)", line).group(1))
            client = vaurien.Client("127.0.0.1", port)
            self.assertEqual(list(client.ask("GET", "/proxies")), names)
            client.ask("POST", "/proxies", {"name": "b", "upstream": "localhost:1", "listen": "127.0.0.1:0"})
            process.terminate()
            self.assertEqual(process.wait(PATIENCE), 0)

    def test_a_port_in_use(self):
        with contextlib.closing(socket.socket()) as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen(1)
            port = taken.getsockname()[1]
            self.write("v.ini", "[proxy:a]\nlocal=127.0.0.1:0\n[proxy:b]\nlocal=localhost:%d\n" % port)
            process = self.start("--config", "v.ini")
            _, err = process.communicate(timeout=PATIENCE)
        self.assertEqual(process.returncode, 1)
        self.assertRegex(err, "^vaurien: cannot listen on 127.0.0.1:%d: Address[^\n]*\n$" % port)

    def test_the_log_goes_where_it_is_told(self):
        process = self.start("--local", "127.0.0.1:0", "--log-output", "v.log", "--log-level", "DEBUG")
        wait_until(lambda: os.path.exists("v.log") and os.path.getsize("v.log"))
        process.terminate()
        self.assertEqual(process.communicate(timeout=PATIENCE), ("", ""))
        with open("v.log") as file:
            self.assertRegex(file.read(), "INFO listening on .*; seed [0-9]+\n.*INFO stopped")

    def run_it(self, *argv, **words):
        process = self.start(*argv, **words)
        out, err = process.communicate(timeout=PATIENCE)
        return process.returncode, out, err

    def test_version_and_help(self):
        for argv in ["--version"], ["ctl", "--version"], ["--config", "nowhere", "--version"]:
            self.assertEqual(self.run_it(*argv), (0, "vaurien 3.0.0\n", ""))
        for argv in ["--help"], ["demo", "--help"]:
            status, out, err = self.run_it(*argv)
            self.assertEqual((status, err), (0, ""))
            for name, function in HANDLERS.items():
                self.assertIn("\n%s:\n" % name, out)
                for option in vaurien.handler_options(function):
                    self.assertIn("--handlers.%s.%s" % (name, option), out)

    def test_without_docstrings(self):
        process = subprocess.Popen([sys.executable, "-OO", FILE, "--help"], stdout=subprocess.PIPE)
        self.assertIn(b"--handlers.delay.sleep", process.communicate(timeout=PATIENCE)[0])
        self.assertEqual(process.returncode, 0)

    def test_a_handler_of_the_users_shares_the_module(self):
        self.write("mine.py", """
import vaurien

def late_end(state, t, to, data):
    assert vaurien.EOF is not vaurien.OPEN
    if data is vaurien.EOF and to == vaurien.DOWNSTREAM:
        yield t, to, b"the end"
    yield t, to, data
""")
        with backend_server(lambda sock: sock.sendall(read_exactly(sock, 8))) as (port, _):
            process = self.start("--local", "127.0.0.1:0", "--distant", "127.0.0.1:%d" % port,
                                 "--behavior", "100:mine.late_end")
            with contextlib.closing(connect(self.listening(process)[0])) as sock:
                sock.sendall(b"question")
                self.assertEqual(read_exactly(sock, 15), b"questionthe end")
            process.terminate()
            process.wait(PATIENCE)

    def test_demo(self):
        started = [self.start("demo", "--requests", "60", *words) for words in [
            ("--handlers.delay.sleep", "0.3"), ("--behavior", "30:blackout,20:error")]]
        outs = []
        for process in started:
            out, err = process.communicate(timeout=PATIENCE)
            self.assertEqual((process.returncode, err), (0, ""))
            self.assertLessEqual(max(map(len, out.splitlines())), 80)
            outs.append(out)
        late, total, seconds = re.search(
            r"^(\d+) of (\d+) requests were delayed \(delay\), by ([0-9.]+) s at the median\.$",
            outs[0], re.MULTILINE).groups()
        self.assertEqual(total, "60")
        self.assertTrue(4 < int(late) < 25)
        self.assertGreater(float(seconds), 0.25)
        self.assertRegex(outs[0], r"The other %d were answered in [0-9.]+ m?s at the median\." % (60 - int(late)))
        self.assertRegex(outs[0], r"\n +(200 - 500 ms|0\.5 - 1 s)  #+ \d+\n")
        self.assertRegex(outs[1], r"(\d+) of 60 requests met blackout: \1 x connection closed\.\n")
        self.assertRegex(outs[1], r"(\d+) of 60 requests met error: \1 x a wrong answer\.\n")
        self.assertRegex(outs[1], r"\n +connection closed  #+ \d+\n")

    def test_a_port_that_is_a_clients_again(self):
        one, two = vaurien.Outcome("a:1", 10.0, 1.0, ""), vaurien.Outcome("a:1", 12.0, 1.0, "")
        event = vaurien.FaultRecord(1, 12.5, "p", 2, "a:1", 1, "delay", {})
        self.assertEqual(vaurien.match_events([one, two], [event]), {two: "delay"})


# -- Control, from outside and from code -------------------------------------------

def proxy_table(*proxies):
    """The proxies of a control server."""
    found = vaurien.ProxyTable(proxies)
    found.loop = proxies[0].loop if proxies else None
    return found


@contextlib.contextmanager
def proxy_with_control(talk=echo, behavior="100:dummy", **words):
    """A proxy and its control server, in one loop; yields (proxy, Client)."""
    with running_proxy(talk, behavior, **words) as proxy:
        control = vaurien.Control(("127.0.0.1", 0), proxy_table(proxy))
        control.bind()
        proxy.loop.run_sync(control.open, proxy.loop)
        port = control.listener.sockets[0].getsockname()[1]
        try:
            yield proxy, vaurien.Client("127.0.0.1", port)
        finally:
            proxy.loop.run_sync(control.close)


class TestRoutes(unittest.TestCase):
    """Every route as a table: a question in, an answer out, without HTTP."""

    def setUp(self):
        stack = contextlib.ExitStack()
        self.addCleanup(stack.close)
        self.one = stack.enter_context(vaurien.Proxy("127.0.0.1:9", "127.0.0.1:0", "20:delay,5:hang",
                                                     {"delay": {"sleep": 2}}, "one"))
        self.two = stack.enter_context(vaurien.Proxy("127.0.0.1:9", "127.0.0.1:0", name="two"))
        self.control = vaurien.Control(("localhost", 0), proxy_table(self.one, self.two))
        self.control.url = "http://localhost:8080"

    def ask(self, method, target, body=b"", status=200):
        found, headers, text = vaurien.handle_request(self.control, method, target, body)
        self.assertEqual(found, status, text)
        return json.loads(text) if headers["Content-Type"] == "application/json" else text

    def errors(self, *question, status=400):
        answer = self.ask(*question, status=status)
        self.assertEqual(answer["status"], "error")
        return [(error["location"], error["name"], error["description"])
                for error in answer["errors"]]

    def test_version_0_1(self):
        self.assertEqual(self.ask("GET", "/handler"), "delay,hang")
        self.assertEqual(self.ask("POST", "/handler", b"delay"), "ok")
        self.assertEqual(self.ask("GET", "/handler"), "delay")
        self.assertEqual(self.one.describe(), "100:delay sleep=1.0")
        self.assertEqual(self.ask("POST", "/handler", b'{"name": "delay", "sleep": 2}'), "ok")
        self.assertEqual(self.one.describe(), "100:delay sleep=2.0")
        self.assertEqual(self.ask("GET", "/handlers"), {"handlers": list(HANDLERS)})

    def test_version_1(self):
        self.assertEqual(self.ask("GET", "/behavior?proxy=two"), {"behavior": "dummy"})
        self.assertEqual(self.ask("PUT", "/behavior", b'{"name": "delay", "sleep": 2}'),
                         {"status": "ok"})
        self.assertEqual(self.ask("GET", "/behavior"), {"behavior": "delay"})
        self.assertEqual(self.ask("GET", "/behaviors"), {"behaviors": list(HANDLERS)})
        self.assertEqual(self.ask("GET", "/backend"), {"backend": "127.0.0.1:9"})
        self.assertEqual(self.ask("PUT", "/backend", b'{"backend": "[::1]:80"}'), {"status": "ok"})
        self.assertEqual(self.ask("GET", "/backend"), {"backend": "[::1]:80"})

    def test_nothing_of_an_earlier_call_sticks(self):
        self.ask("PUT", "/behavior", b'{"name": "delay", "sleep": 2, "before": false, "percent": 5}')
        self.assertEqual(self.one.describe(), "5:delay sleep=2.0 before=no, 95:dummy")
        self.ask("PUT", "/behavior", b'{"name": "delay"}')
        self.assertEqual(self.one.describe(), "100:delay sleep=1.0")
        self.ask("POST", "/handler", b"dummy")
        self.assertEqual(self.one.rules.armed, [])

    def test_the_fields_of_a_rule(self):
        self.ask("PUT", "/behavior", b'{"name": "error", "percent": 20, "per": "connection", '
                                     b'"stream": "downstream", "after": 3, "times": 2}')
        rule, = self.one.rules.armed
        self.assertEqual((rule.draw_min, rule.draw_max, rule.per, rule.stream, rule.after, rule.times),
                         (0, 20, "connection", "downstream", 3, 2))

    def test_rules_go_out_and_come_back(self):
        rules = self.ask("GET", "/rules")
        self.assertEqual([rule["percent"] for rule in rules["rules"]], [20, 5])
        self.ask("POST", "/handler", b"blackout")
        self.ask("PUT", "/rules", json.dumps(rules).encode())
        self.assertEqual(self.one.describe(), "20:delay sleep=2.0, 5:hang, 75:dummy")

    def test_the_share_of_dummy_comes_back_too(self):
        chosen = [(20, "delay"), (30, "dummy"), (5, "error")]
        with vaurien.Proxy("127.0.0.1:9", "127.0.0.1:0", chosen) as proxy:
            self.control.proxies = proxy_table(proxy)
            rules = self.ask("GET", "/rules")
            self.ask("PUT", "/rules", json.dumps(rules).encode())
            self.assertEqual([(rule.draw_min, rule.draw_max) for rule in proxy.rules.armed],
                             [(0, 20), (50, 55)])

    def test_one_of_several_proxies(self):
        self.ask("POST", "/handler?proxy=two", b"blackout")
        self.assertEqual(self.ask("GET", "/handler?proxy=two"), "blackout")
        self.assertEqual(self.ask("GET", "/handler"), "delay,hang")

    def test_the_list_of_all_this(self):
        text = self.ask("GET", "/")
        for path in vaurien.ROUTES:
            self.assertIn("http://localhost:8080" + path, text)
        self.assertIn("one, two", text)

    def test_refusals(self):
        for question, location, name, words in [
                (("POST", "/handler", b"nope"), "body", "name", "unknown handler 'nope': there are"),
                (("POST", "/handler", b""), "body", "name", "unknown handler ''"),
                (("PUT", "/behavior", b'{"sleep": 2}'), "body", "name", "unknown handler None"),
                (("PUT", "/behavior", b'{"name": ["x"]}'), "body", "name", "unknown handler ['x']"),
                (("PUT", "/behavior", b'{"name": "delay", "dely": 2}'), "body", "dely",
                 "dely is not an option of delay: it has before, sleep"),
                (("PUT", "/behavior", b'{"name": "delay", "sleep": true}'), "body", "sleep",
                 "sleep must be a number, 0 or more, not True"),
                (("PUT", "/behavior", b'{"name": "delay", "sleep": NaN}'), "body", "sleep", "not nan"),
                (("PUT", "/behavior", b'{"name": "delay", "sleep": 1e999}'), "body", "sleep", "not inf"),
                (("PUT", "/behavior", b'{"name": "delay", "sleep": null}'), "body", "sleep", "not None"),
                (("PUT", "/behavior", b'{"name": "delay", "before": 7}'), "body", "before", "yes or no"),
                (("PUT", "/behavior", b'{"name": "delay", "percent": 101}'), "body", "percent",
                 "percent must be a number from 0 to 100, not 101"),
                (("PUT", "/behavior", b'{"name": "delay", "per": "chunk"}'), "body", "per",
                 "per must be one of request, connection, not 'chunk'"),
                (("PUT", "/behavior", b'{"name": "error", "times": -1}'), "body", "times", "times must"),
                (("PUT", "/behavior", b"delay"), "body", "", "the body must be JSON"),
                (("PUT", "/behavior", b"[" * 100000), "body", "", "the body must be JSON"),
                (("PUT", "/behavior", b"[]"), "body", "", "the body must be a JSON object"),
                (("PUT", "/behavior", b"\xff"), "body", "", "the body must be UTF-8"),
                (("PUT", "/rules", b'{"rules": 5}'), "body", "rules", "the body must be"),
                (("PUT", "/rules", b'{"rules": [{"name": "delay", "percent": 60}, '
                                   b'{"name": "hang", "percent": 60}]}'), "body", "percent",
                 "percent must add up to 100 at most, not 120"),
                (("PUT", "/backend", b"{}"), "body", "backend", "backend must be HOST:PORT"),
                (("PUT", "/backend", b'{"backend": "http://x/"}'), "body", "backend", "like x:80"),
                (("PUT", "/backend", b'{"backend": "x:1", "y": 2}'), "body", "y", "y is not known"),
                (("PUT", "/behavior", b'{"name": "error", "warmup": 1' + b"0" * 500 + b"}"),
                 "body", "", "a number of 501 digits"),
                (("GET", "/handler?proxy=nope"), "querystring", "proxy", "there are one, two"),
                (("GET", "/handler?x=1"), "querystring", "x", "does not know 'x'"),
                (("GET", "/events?since=x"), "querystring", "since", "since must be")]:
            with self.subTest(question):
                (place, thing, description), = self.errors(*question)
                self.assertEqual((place, thing), (location, name))
                self.assertIn(words, description)
        self.assertEqual(self.one.describe(), "20:delay sleep=2.0, 5:hang, 75:dummy")

    def test_each_thing_that_is_wrong_is_named(self):
        found = self.errors("PUT", "/behavior", b'{"name": "delay", "sleep": -1, "x": 1, "per": 2}')
        self.assertEqual({name for _, name, _ in found}, {"sleep", "x", "per"})
        found = self.errors("PUT", "/behavior", b'{"name": "nope", "percent": 200}')
        self.assertEqual({name for _, name, _ in found}, {"name", "percent"})
        found = self.errors("PUT", "/backend", b'{"backend": "x", "y": 1, "z": 2}')
        self.assertEqual({name for _, name, _ in found}, {"backend", "y", "z"})

    def test_what_calls_itself_is_refused(self):
        (_, name, words), = self.errors(
            "PUT", "/backend", b'{"backend": "127.0.0.1:%d"}' % self.one.port)
        self.assertEqual(name, "backend")
        self.assertIn("would call itself", words)

    def test_other_paths_and_methods(self):
        self.assertIn("there is no /nope", self.errors("GET", "/nope", status=404)[0][2])
        self.assertIn("/handler takes GET, POST", self.errors("PATCH", "/handler", status=405)[0][2])
        self.assertEqual(self.ask("HEAD", "/behavior?proxy=two"), {"behavior": "dummy"})


class TestControl(unittest.TestCase):
    """The same over HTTP, with everything that a stranger may send."""

    def raw(self, client, data):
        """All that is answered to these bytes."""
        with contextlib.closing(connect(client.port)) as sock:
            sock.sendall(data)
            answer = b""
            while True:
                try:
                    piece = sock.recv(65536)
                except ConnectionError:
                    return answer
                if not piece:
                    return answer
                answer += piece

    def test_strange_requests_get_a_4xx_and_disturb_nothing(self):
        with proxy_with_control() as (proxy, client), connected_client(proxy) as sock:
            send_and_read(sock, b"question")
            for data, status in [
                    (b"nonsense\r\n\r\n", 400), (b"GET / HTTP/9.9.9\r\n\r\n", 400),
                    (b"BREW /handler HTTP/1.1\r\nConnection: close\r\n\r\n", 405),
                    (b"GET /" + b"x" * 70000 + b" HTTP/1.1\r\n\r\n", 414),
                    (b"GET /%ff%00/.. HTTP/1.1\r\nConnection: close\r\n\r\n", 404),
                    (b"POST /handler HTTP/1.1\r\nContent-Length: x\r\n\r\n", 400),
                    (b"POST /handler HTTP/1.1\r\nContent-Length: -5\r\n\r\n", 400),
                    (b"POST /handler HTTP/1.1\r\nContent-Length: 1048577\r\n\r\n", 413),
                    (b"POST /handler HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n5\r\ndelay\r\n", 411),
                    (b"POST /handler HTTP/1.1\r\nContent-Encoding: gzip\r\n"
                     b"Content-Length: 5\r\n\r\ndelay", 415)]:
                with self.subTest(data[:60]):
                    answer = self.raw(client, data)
                    self.assertEqual(int(answer.split()[1]), status)
                    self.assertEqual(json.loads(answer.split(b"\r\n\r\n")[1].decode())["status"], "error")
            self.assertEqual(client.get_handler(), "dummy")
            send_and_read(sock, b"question")

    def test_a_body_of_a_mebibyte_is_read(self):
        with proxy_with_control() as (_, client):
            answer = self.raw(client, b"POST /handler HTTP/1.0\r\nContent-Length: 1048576\r\n\r\n"
                              + b"x" * 1048576)
            self.assertEqual(answer.split()[1], b"400")

    def test_who_says_nothing_is_told_so_and_others_are_not_held_up(self):
        with mock.patch.object(vaurien, "IDLE_TIMEOUT", 0.2), proxy_with_control() as (_, client):
            with contextlib.closing(connect(client.port)) as silent, \
                    contextlib.closing(connect(client.port)) as half:
                half.sendall(b"POST /handler HTTP/1.1\r\nContent-Length: 5\r\n\r\nde")
                self.assertEqual(client.get_handler(), "dummy")
                for sock in silent, half:
                    self.assertEqual(sock.recv(1000).split()[1], b"408")

    def test_too_many_silent_ones_make_room(self):
        with mock.patch.object(vaurien, "CLIENTS_MAX", 4), proxy_with_control() as (_, client), \
                contextlib.ExitStack() as stack:
            silent = [stack.enter_context(contextlib.closing(connect(client.port)))
                      for _ in range(12)]
            for _ in range(6):
                self.assertEqual(client.get_handler(), "dummy")
            self.assertEqual(silent[0].recv(1000), b"")

    def test_no_more_threads_is_no_end_of_the_control(self):
        with proxy_with_control() as (_, client):
            with self.assertLogs("vaurien", "ERROR") as logged:
                with mock.patch.object(threading.Thread, "start", side_effect=RuntimeError("none")):
                    with self.assertRaises(OSError):
                        client.get_handler()
                    wait_until(lambda: logged.output)
            self.assertEqual(client.get_handler(), "dummy")

    def test_a_client_that_waits_for_100_continue(self):
        with proxy_with_control() as (_, client), contextlib.closing(connect(client.port)) as sock:
            sock.sendall(b"POST /handler HTTP/1.1\r\nExpect: 100-continue\r\n"
                         b"Content-Length: 5\r\n\r\n")
            self.assertEqual(sock.recv(1000), b"HTTP/1.1 100 Continue\r\n\r\n")
            sock.sendall(b"delay")
            self.assertEqual(sock.recv(1000).split()[1], b"200")

    def test_who_sends_too_much_gets_to_see_the_answer(self):
        with proxy_with_control() as (_, client):
            with self.assertRaisesRegex(ValueError, "a body may have 1048576 bytes at most"):
                client.set_handler("delay", sleep="x" * 5000000)

    def test_a_bug_in_a_route_is_a_500(self):
        def broken(question):
            raise KeyError("no idea")

        broken.form, broken.needs_proxy, broken.query = vaurien.ApiError, True, ()

        with proxy_with_control() as (_, client), self.assertLogs("vaurien", "ERROR"):
            with mock.patch.dict(vaurien.ROUTES["/handler"], GET=broken):
                with self.assertRaisesRegex(ValueError, "KeyError: 'no idea'"):
                    client.ask("GET", "/handler")

    def test_a_backend_that_is_set_while_the_old_name_is_looked_up(self):
        gate, really = threading.Event(), vaurien.resolve

        def resolve(address, *rest, **words):
            if address[0] == "slow.invalid":
                gate.wait(PATIENCE)
                return really(("127.0.0.1", address[1]))
            return really(address, *rest, **words)

        def resolve_numeric(address, *_):
            return None

        def says(words):
            return lambda sock: (sock.sendall(words), read_until_close(sock))

        with backend_server(says(b"old")) as (old, _), backend_server(says(b"new")) as (new, _), \
                vaurien.Proxy("slow.invalid:%d" % old, "127.0.0.1:0") as proxy, \
                mock.patch.object(vaurien, "resolve", resolve), \
                mock.patch.object(vaurien, "resolve_numeric", resolve_numeric), connected_client(proxy) as first:
            wait_until(lambda: proxy.lookups)
            proxy.loop.run_sync(proxy.set_backend, ("127.0.0.1", new))
            with connected_client(proxy) as second:
                self.assertEqual(read_exactly(second, 3), b"new")
            gate.set()
            self.assertEqual(read_exactly(first, 3), b"old")

    def test_one_connection_asks_many_times(self):
        with proxy_with_control() as (_, client):
            connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=PATIENCE)
            with contextlib.closing(connection):
                connection.connect()
                sock = connection.sock
                for method, path, body in [("GET", "/handler", None), ("POST", "/handler", "delay"),
                                           ("PUT", "/behavior", "nonsense"), ("HEAD", "/", None),
                                           ("GET", "/behavior", None)]:
                    connection.request(method, path, body)
                    answer = connection.getresponse().read()
                    self.assertIs(connection.sock, sock)
                self.assertEqual(answer, b'{"behavior": "delay"}')

    def test_it_answers_whatever_the_peers_do(self):
        """A client that never reads, a black hole for a backend, hundreds that hang."""
        def flood(sock):
            with contextlib.suppress(OSError):
                sock.sendall(bytes(50000000))

        with proxy_with_control(flood) as (proxy, client), contextlib.ExitStack() as stack:
            stack.enter_context(connected_client(proxy))
            wait_until(lambda: proxy.loop.budget.held)
            client.set_handler("hang")
            socks = [stack.enter_context(connected_client(proxy)) for _ in range(200)]
            for sock in socks:
                sock.sendall(bytes(10000))
            wait_until(lambda: proxy.faults["hang"] == 200)
            with silent_address() as silent:
                client.set_backend("127.0.0.1:%d" % silent)
                for name in "delay", "hang", "dummy":
                    client.set_handler(name)
                    self.assertEqual(client.get_handler(), name)
                stuck = client.connections()
                self.assertEqual(len(stuck), 201)
                self.assertFalse(all(one["connected"] for one in stuck))
                self.assertTrue(any(one["held_down"] for one in stuck))

    def test_the_connections_that_are_open(self):
        with proxy_with_control() as (proxy, client), connected_client(proxy) as sock:
            send_and_read(sock, b"question")
            client.set_handler("delay", sleep=0.001)
            send_and_read(sock, b"another")
            one, = client.connections()
            self.assertEqual(one["client"], "127.0.0.1:%d" % sock.getsockname()[1])
            self.assertEqual(one["backend"], vaurien.format_address(proxy.backend))
            self.assertEqual((one["bytes_up"], one["bytes_down"], one["requests"], one["faults"]),
                             (15, 15, 2, ["delay"]))
            self.assertTrue(one["connected"])
            self.assertGreaterEqual(one["age"], 0)

    def test_the_events(self):
        with proxy_with_control(behavior="100:delay", options={"delay": {"sleep": 0.001}}) as (proxy, client):
            with connected_client(proxy) as sock:
                for _ in range(3):
                    send_and_read(sock, b"question")
            events = client.events()
            self.assertEqual([(event["number"], event["connection"], event["request"],
                               event["handler"], event["options"]) for event in events],
                             [(number, 1, number, "delay", {"sleep": 0.001, "before": True})
                              for number in (1, 2, 3)])
            self.assertEqual(client.events(since=2), events[2:])

    def test_new_connections_go_to_a_new_backend(self):
        def shout(sock):
            sock.sendall(read_exactly(sock, 8).upper())
            echo(sock)

        with proxy_with_control() as (proxy, client), backend_server(shout) as (port, _), connected_client(proxy) as old:
            send_and_read(old, b"question")
            client.set_backend("127.0.0.1:%d" % port)
            self.assertEqual(client.get_backend(), "127.0.0.1:%d" % port)
            with connected_client(proxy) as new:
                new.sendall(b"question")
                self.assertEqual(read_exactly(new, 8), b"QUESTION")
            self.assertEqual(send_and_read(old, b"question"), b"question")


# -- Protocols: framing as tables and as a law, and what is answered -----------------

def packet(seq, body):
    """A packet of MySQL's."""
    return len(body).to_bytes(3, "little") + bytes([seq]) + body


def message(kind, body=b""):
    """A message of PostgreSQL's."""
    return kind + struct.pack(">I", 4 + len(body)) + body


STARTUP = struct.pack(">II", 16, 196608) + b"user\0x\0\0"
SSL_REQUEST = struct.pack(">II", 8, 80877103)
LOGIN = packet(1, struct.pack("<I", 0x0A285) + bytes(28) + b"root\0\0")


class TestFraming(unittest.TestCase):
    """Where requests and replies begin and end, whatever pieces the bytes come in."""

    # protocol: the client's bytes as [(text, name, how they end)] of their requests
    REQUESTS = [
        ("redis", b"*2\r\n$3\r\nget\r\n$1\r\na\r\nPING x\r\n*3\r\n$3\r\nSET\r\n$1\r\nb\r\n$5\r\nhe\r\nl\r\n",
         [(b"get a", "GET"), (b"PING x", "PING"), (b"SET b he\r\nl", "SET")]),
        ("http", b"GET /a HTTP/1.1\r\nHost: x\r\n\r\nPOST /b HTTP/1.1\r\ncontent-length: 5\r\n\r\nhe\n\nlPUT / HTTP/1.1\r\n"
         b"Transfer-Encoding: gzip, chunked\r\n\r\n3;x=y\r\nabc\r\nA\r\n0123456789\r\n0\r\nX: y\r\n\r\nHEAD / HTTP/1.0\n\n",
         [(b"GET /a HTTP/1.1\nHost: x", "GET"), (b"POST /b HTTP/1.1\ncontent-length: 5", "POST"),
          (b"PUT / HTTP/1.1\nTransfer-Encoding: gzip, chunked", "PUT"), (b"HEAD / HTTP/1.0", "HEAD")]),
        ("memcache", b"get a b\r\nset a 0 0 5\r\nhe\r\nl\r\ncas b 0 0 1 77 noreply\r\nx\r\nms c 3 T0\r\nabc\r\nmg c v q\r\nmn\r\nbogus\r\n",
         [(b"get a b", "get"), (b"set a 0 0 5", "set"), (b"cas b 0 0 1 77 noreply", "cas"), (b"ms c 3 T0", "ms"), (b"mg c v q", "mg"),
          (b"mn", "mn"), (b"bogus", "bogus")]),
        ("memcache", b"set voil\xc3\xa0x 0 0 5\r\nhello\r\nget noreply\r\n", [(b"set voil\xc3\xa0x 0 0 5", "set"), (b"get noreply", "get")]),
        ("http", b"\r\n\r\nGET / HTTP/1.1\r\n\r\n\r\nGET /b HTTP/1.1\r\n\r\n", [(b"GET / HTTP/1.1", "GET"), (b"GET /b HTTP/1.1", "GET")]),
        ("mysql", LOGIN + packet(0, b"\x03SELECT 1") + packet(0, b"\x0e") + packet(0, b"\x16SELECT ?") + packet(0, b"\x01"),
         [(b"SELECT 1", 3), (b"", 14), (b"SELECT ?", 22), (b"", 1)]),
        ("postgres", SSL_REQUEST + STARTUP + message(b"p", b"secret\0") + message(b"Q", b"SELECT 1\0")
         + message(b"P", b"s\0SELECT $1\0\0\0") + message(b"D", b"Ss\0") + message(b"S") + message(b"B", b"\0s\0\0\0\0\0\0\0")
         + message(b"D", b"P\0") + message(b"E", b"\0\0\0\0\0") + message(b"H") + message(b"S") + message(b"X"),
         [(b"SELECT 1", "QUERY"), (b"", "SYNC"), (b"SELECT $1", "EXECUTE"), (b"", "SYNC")]),
        ("smtp", b"EHLO x\r\nMAIL FROM:<a@b>\r\nbdat 5 LAST\r\nhe\r\nlQUIT\r\n",
         [(b"EHLO x", "EHLO"), (b"MAIL FROM:<a@b>", "MAIL"), (b"bdat 5 LAST", "BDAT"), (b"QUIT", "QUIT")])]

    # protocol: what was asked, and the lengths of its replies
    REPLIES = [
        ("redis", "GET GET GET GET GET", [b"+OK\r\n", b"$5\r\nhe\r\nl\r\n", b"*3\r\n:1\r\n*1\r\n$-1\r\n*-1\r\n",
                                          b"%1\r\n+a\r\n~1\r\n_\r\n", b"|1\r\n+k\r\n+v\r\n=6\r\ntxt:ab\r\n"]),
        ("http", "GET HEAD GET GET PUT", [b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\na\n\n", b"HTTP/1.1 200 OK\r\nContent-Length: 300\r\n\r\n",
                                          b"HTTP/1.1 304 Not Modified\r\nContent-Length: 3\r\n\r\n",
                                          b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\nX: y\r\n\r\n",
                                          b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n"]),
        ("memcache", "get set stats ms mg mn", [b"VALUE a 0 5\r\nhe\r\nl\r\nVALUE b 0 3 7\r\nEND\r\nEND\r\n", b"STORED\r\n", b"STAT a 1\r\nSTAT b END\r\nEND\r\n",
                                                b"HD\r\n", b"VA 3 x\r\nabc\r\n", b"MN\r\n"]),
        ("postgres", "QUERY EXECUTE EXECUTE SYNC", [
            message(b"T", b"x") + message(b"D", b"Z") + message(b"C", b"SELECT 1\0") + message(b"Z", b"I"),
            message(b"1") + message(b"2") + message(b"n") + message(b"C", b"INSERT 0 1\0"), message(b"E", b"SERROR\0\0"), message(b"Z", b"I")]),
        ("smtp", "HELO EHLO MAIL", [b"250 hi\r\n", b"250-a\r\n250-b\r\n250 c\r\n", b"450 no\r\n"])]

    def read(self, name, data, pieces, way="up", pending=()):
        """The marks in data that comes in such pieces."""
        protocol = vaurien.PROTOCOLS[name]()
        protocol.pending = vaurien.deque(pending)       # it is connected
        found, at = [], 0
        for size in pieces:
            frames = getattr(protocol, way)
            piece = (bytes, bytearray)[size % 2](data[at:at + size])
            for offset, mark in frames.feed(piece, len(piece)):
                found.append((at + offset, mark if isinstance(mark, vaurien.Signal) else (bytes(mark.text), mark.name)))
            at += size
            if frames.lost:
                return found + [frames.lost]
        return found

    def splits(self, data):
        yield [1] * len(data)
        for seed in range(20):
            generator, sizes = random.Random(seed), []
            while sum(sizes) < len(data):
                sizes.append(generator.randint(1, 30))
            yield sizes

    def test_requests(self):
        for name, data, wanted in self.REQUESTS:
            found = self.read(name, data, [len(data)])
            self.assertEqual([mark for _, mark in found if isinstance(mark, tuple)], wanted, name)
            self.assertEqual(found[-1], (len(data), vaurien.END_OF_MESSAGE), name)
            for sizes in self.splits(data):
                self.assertEqual(self.read(name, data, sizes), found, name)

    def test_replies(self):
        for name, asked, replies in self.REPLIES:
            data = b"".join(replies)
            pending = [vaurien.Request(b"", word) for word in asked.split()]
            ends = [(sum(map(len, replies[:number])), vaurien.END_OF_MESSAGE) for number in range(1, len(replies) + 1)]
            self.assertEqual(self.read(name, data, [len(data)], "down", pending), ends, name)
            for sizes in self.splits(data):
                self.assertEqual(self.read(name, data, sizes, "down", pending), ends, name)

    def test_one_look_sees_what_the_reader_sees(self):
        """whole_request and whole_reply against the generators, on messages that are cut, joined and spoilt."""
        generator, seen = random.Random(1), Counter()
        samples = {"redis": ([b"*2\r\n$3\r\nGET\r\n$1\r\na\r\n", b"*1\r\n$4\r\nPING\r\n", b"PING\r\n"],
                             [b"+OK\r\n", b"$5\r\nhello\r\n", b"$-1\r\n", b":1\r\n", b"$22\r\n", b"$2dd", b"$12\nxxx", b"$0\r\n\r\n"]),
                   "http": ([b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"HEAD /a HTTP/1.0\r\nHost: x\r\n\r\n", b"GET / HTTP/1.1\r\nHost: foo\n\r\n", b"GET / HTTP/1.0\r\nconnection: keep-alive\r\n\r\n", b"POST / HTTP/1.1\r\nContent-Length: 2\r\n\r\n", b"hi"],
                            [b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", b"HTTP/1.1 200 OK\nContent-Length: 2\n\r\nhi", b"HTTP/1.1 404 X\r\n\r\n"])}
        for name, ways in samples.items():
            for way, pieces in zip(("up", "down"), ways):
                for _ in range(2000):
                    messages = []
                    for _ in range(generator.choice([1, 1, 4])):        # more than one, for what is remembered
                        data = bytearray(b"".join(generator.choice(pieces) for _ in range(generator.choice([1, 1, 2]))))
                        for _ in range(generator.choice([0, 0, 1, 2])):
                            at = generator.randrange(len(data) + 1)
                            data[at:at + generator.randint(0, 2)] = generator.choice([b"", b"\r", b"\n", b"\r\n", b"1", b"$", b"x"])
                        messages.append((generator.choice(["GET", "GET", "HEAD"]), bytes(
                            data[:generator.choice([len(data), len(data), generator.randrange(len(data) + 1)])])))
                    found = []
                    for quick in True, False:
                        protocol = vaurien.PROTOCOLS[name](b"other:1" if name == "http" else b"")
                        frames, marks = getattr(protocol, way), []
                        for asked, data in messages:
                            protocol.pending += [vaurien.Request(b"", asked)] * (way == "down")
                            usual = frames.usual(data) if quick and not frames.lost else None
                            for at, mark in frames.feed(data, len(data), usual):
                                marks.append((at, mark if isinstance(mark, vaurien.Signal) else (
                                    mark.text, mark.name, mark.info, protocol.rewrite_head(data[:at]))))
                        found.append(marks + [frames.lost, len(protocol.pending)])
                        seen[name, way, frames.between, len(messages)] += 1
                    self.assertEqual(found[0], found[1], (name, way, messages))
        self.assertEqual(len(seen), 16)

    def test_what_is_answered_is_known(self):
        for name, data, silent in [("memcache", b"set a 0 0 1 noreply\r\nx\r\n", True), ("memcache", b"quit\r\n", True), ("memcache", b"mg a q\r\n", True),
                                   ("memcache", b"mg a v\r\n", False), ("redis", b"*0\r\n", True), ("redis", b"\r\n", True), ("redis", b"PING\r\n", False),
                                   ("mysql", packet(0, b"\x19\1\0\0\0"), True), ("mysql", packet(0, b"\x01"), True), ("mysql", packet(0, b"\x0e"), False)]:
            (_, request), _ = vaurien.PROTOCOLS[name]().up.feed(data, len(data))
            self.assertEqual(request.replies, not silent, data)

    def test_a_body_of_any_size_is_not_kept(self):
        block = bytes(1 << 20)
        for name, head in [("http", b"POST / HTTP/1.1\r\nContent-Length: 1099511627776\r\n\r\n"), ("memcache", b"set a 0 0 1000000000\r\n"),
                           ("redis", b"*2\r\n$3\r\nSET\r\n$1000000000\r\n"), ("postgres", STARTUP + b"Q\x7f\0\0\0SELECT 1"),
                           ("mysql", b"\xff\xff\xff\0\x03SELECT 1")]:
            frames = vaurien.PROTOCOLS[name]().up
            frames.feed(head, len(head))
            for _ in range(10):
                frames.feed(block, len(block))
            self.assertLessEqual(len(frames.kept), vaurien.MATCH_WINDOW)
            self.assertEqual(frames.lost, "")

    def test_the_end_of_a_message(self):
        data = b".\r\nx\r\n..\r\n.x\r\n\r\n.\r\nQUIT\r\n"
        for body, length in (b".\r\nRSET\r\n", 3), (b"a\r\n.\r\nRSET\r\n", 6), (b"..\r\n.x\r\n\n.\r\n\r\n.\r\nRSET\r\n", 17), (data, 3):
            for sizes in [[len(body)], *self.splits(body)]:
                protocol, found, at = vaurien.Smtp(), [], 0
                protocol.pending[0] = vaurien.Request(b"DATA", "DATA")
                protocol.down.feed(b"354 go\r\n", 8)
                for size in sizes:
                    found += [at + offset for offset, mark in protocol.up.feed(body[at:at + size], len(body[at:at + size])) if mark is vaurien.END_OF_MESSAGE]
                    at += size
                self.assertEqual(found[0], length, body)

    def test_what_is_not_the_protocol_is_known(self):
        for name, way, data in [
                ("http", "up", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), ("http", "up", b"\x16\x03\x01" + bytes(300) + b"\n\n"), ("http", "up", b"x" * 70000),
                ("http", "down", b"HTTP/1.1 101 Switching Protocols\r\n\r\n"), ("redis", "up", b"SUBSCRIBE a\r\n"), ("redis", "up", b"*1\r\n$7\r\nmonitor\r\n"),
                ("redis", "up", b"*2\r\n$6\r\nclient\r\n$5\r\nreply\r\n"), ("redis", "up", b"*2\r\nx\r\n"), ("redis", "up", b"*x\r\n"), ("redis", "down", b"hello\r\n"),
                ("redis", "down", b">2\r\n"), ("memcache", "up", b"\x80\n"), ("memcache", "up", b"set a 0 0 x\r\n"),
                ("mysql", "up", packet(1, struct.pack("<I", 0xAA85) + bytes(28))), ("mysql", "up", packet(1, struct.pack("<I", 0xA2A5) + bytes(28))),
                ("postgres", "up", b"\x16\x03\x01\0\0\0\0\0"), ("postgres", "up", struct.pack(">II", 16, 80877102 + 5)),
                ("smtp", "down", b"hello\r\n")]:
            self.assertIsInstance(self.read(name, data, [len(data)], way)[-1], str, data)
        protocol = vaurien.Postgres()
        protocol.up.feed(SSL_REQUEST, 8)
        protocol.down.feed(b"S", 1)
        self.assertEqual(protocol.down.lost, "encryption from here")
        protocol = vaurien.Smtp()
        protocol.pending[0] = vaurien.Request(b"STARTTLS", "STARTTLS")
        protocol.down.feed(b"220 go\r\n", 8)
        self.assertEqual(protocol.down.lost, "TLS from here")

    def test_random_bytes_never_raise(self):
        samples = {name: [data for kind, data, _ in self.REQUESTS if kind == name] for name in vaurien.PROTOCOLS}
        for name, kind in vaurien.PROTOCOLS.items():
            for seed in range(120 if kind else 0):
                generator = random.Random("%s %d" % (name, seed))
                data = bytearray(generator.choice(samples[name]) if seed % 2 else b"")
                for _ in range(generator.randint(1, 20)):
                    data.insert(generator.randint(0, len(data)), generator.choice(b"\r\n\0*$ 019abQZS\xff-"))
                for way in "up", "down":
                    sizes = next(split for split in [[len(data)], *self.splits(data)])
                    one = self.read(name, data, sizes, way)
                    self.assertEqual(self.read(name, data, [1] * len(data), way), one, (name, way, bytes(data)))


def passing(line, to, piece, whole=True):
    """(what goes on at once of a piece, or None; its marks; its frames), as in Connection.at_once."""
    frames = line.protocol.up if to == UPSTREAM else line.protocol.down
    found = frames.usual(piece) if whole else None
    out, marks = line.pass_whole(to, found, piece) if found else None, []
    if out is None:
        marks = frames.feed(piece, len(piece), found)
        out = None if frames.lost else line.pass_through(to, piece, marks)
    return out, marks, frames


class TestFramedLine(unittest.TestCase):
    """What faults make of the requests of a protocol, as tables."""

    def line(self, name, *rules):
        armed = vaurien.RuleSet(1, "test")
        armed.armed = list(rules)
        line = vaurien.ProtocolChain(armed, 1, vaurien.PROTOCOLS[name]())
        line.begin()
        line.exchanges[0].over = line.protocol.server_first         # it is connected
        line.protocol.pending.clear()
        return line

    def feed(self, line, to, data, sizes=None):
        """What becomes of the bytes: ({way: bytes}, the signals)."""
        out, signals, at = {UPSTREAM: b"", DOWNSTREAM: b""}, [], 0
        for size in sizes or [len(data)]:
            piece = data[at:at + size]
            at += size
            quiet, marks, frames = passing(line, to, piece)
            if quiet is not None:
                out[to] += quiet
                continue
            events = line.read(0, to, piece, marks)
            if frames.lost:
                events += line.fall_back_to_tcp(0)[1]
            for _, way, made, _ in events:
                out[way] += made
                signals += [made] * (not made)
        return out[UPSTREAM], out[DOWNSTREAM], signals

    def test_no_byte_is_lost_or_changed(self):
        later = vaurien.Rule("delay", {"sleep": 1.0})
        for rules in [], [later], [vaurien.Rule("error", draw_max=0)], [vaurien.Rule("hang", match=re.compile(b"nope"))]:
            for name, data, _ in TestFraming.REQUESTS:
                for sizes in [[len(data)], [1] * len(data)]:
                    self.assertEqual(self.feed(self.line(name, *rules), UPSTREAM, data, sizes), (data, b"", []), name)

    def test_random_bytes_are_passed_on(self):
        for name in list(vaurien.PROTOCOLS)[1:]:
            for seed in range(50):
                generator = random.Random("%s %d" % (name, seed))
                data = bytes(generator.choice(b"\r\n\0*$ 019abQZS\xff-") for _ in range(100))
                for to in UPSTREAM, DOWNSTREAM:
                    line = self.line(name, vaurien.Rule("delay"))
                    up, down, _ = self.feed(line, to, data)
                    held = line.head if to == UPSTREAM else b""
                    if line.protocol.up.lost or line.protocol.down.lost:
                        held = b""
                    self.assertEqual((up if to == UPSTREAM else down) + held, data, (name, to))

    def test_pipelined_answers_are_in_their_places(self):
        line = self.line("redis", vaurien.Rule("error", {"kind": "OOM"}, match=re.compile(b"bad")))
        up, down, _ = self.feed(line, UPSTREAM, b"get 1\r\nget bad\r\nget 2\r\nget bad\r\nget bad\r\nget 3\r\n")
        self.assertEqual((up, down), (b"get 1\r\nget 2\r\nget 3\r\n", b""))
        oom = b"-OOM command not allowed when used memory > 'maxmemory'.\r\n"
        found = b""
        for piece in b"$1\r\n", b"a\r\n", b"$1\r\nb\r\n$1\r\n", b"c\r\n":
            found += self.feed(line, DOWNSTREAM, piece)[1]
        self.assertEqual(found, b"$1\r\na\r\n" + oom + b"$1\r\nb\r\n" + oom + oom + b"$1\r\nc\r\n")
        self.assertEqual(len(line.exchanges), 1)

    def test_an_answer_that_nothing_is_before_is_said_at_once(self):
        line = self.line("memcache", vaurien.Rule("error"))
        self.assertEqual(self.feed(line, UPSTREAM, b"set a 0 0 3\r\nab"), (b"", b"", []))
        self.assertEqual(self.feed(line, UPSTREAM, b"c\r\n"), (b"", b"SERVER_ERROR out of memory\r\n", []))

    def test_a_head_is_held_until_it_is_known(self):
        line = self.line("http", vaurien.Rule("error", {"kind": "503"}, match=re.compile(b"(?m)^X-Bad")))
        self.assertEqual(self.feed(line, UPSTREAM, b"GET / HTTP/1.1\r\nX-B")[0], b"")
        self.assertEqual(self.feed(line, UPSTREAM, b"etter: 1\r\n\r\n")[0], b"GET / HTTP/1.1\r\nX-Better: 1\r\n\r\n")
        up, down, _ = self.feed(line, UPSTREAM, b"POST / HTTP/1.1\r\nX-Bad: 1\r\nContent-Length: 2\r\n\r\nab")
        self.assertEqual((up, down), (b"", b""))           # the first is not answered yet
        self.assertIn(b"503 Service Unavailable\r\n", self.feed(line, DOWNSTREAM, b"HTTP/1.1 204 No\r\n\r\n")[1])

    def test_what_is_not_answered_is_left_alone(self):
        for name, data in [("memcache", b"set a 0 0 1 noreply\r\nx\r\n"), ("memcache", b"quit\r\n"), ("mysql", packet(0, b"\x19\1\0\0\0")),
                           ("redis", b"QUIT\r\n"), ("smtp", b"QUIT\r\n")]:
            line = self.line(name, vaurien.Rule("error"))
            line.exchanges[0].over = True
            self.assertEqual(self.feed(line, UPSTREAM, data), (data, b"", []), data)
            self.assertEqual(line.activated, [])

    def test_the_answers_of_each_protocol(self):
        for name, kind, data, answer in [
                ("mysql", "1205", packet(0, b"\x03SELECT 1"), b"\x3f\0\0\x01\xff\xb5\x04#HY000Lock wait timeout exceeded; try restarting transaction"),
                ("redis", "LOADING", b"PING\r\n", b"-LOADING Redis is loading the dataset in memory\r\n"),
                ("smtp", "450", b"MAIL FROM:<a>\r\n", b"450 4.2.1 mailbox busy\r\n"),
                ("http", "429", b"GET / HTTP/1.1\r\n\r\n", b"HTTP/1.1 429 Too Many Requests\r\nContent-Type: text/plain\r\nContent-Length: 22\r\n"
                                                           b"Retry-After: 5\r\n\r\n429 Too Many Requests\n"),
                ("http", "500", b"HEAD / HTTP/1.1\r\n\r\n", b"HTTP/1.1 500 Internal Server Error\r\nContent-Type: text/plain\r\nContent-Length: 26\r\n\r\n")]:
            line = self.line(name, vaurien.Rule("error", {"kind": kind}))
            self.assertEqual(self.feed(line, UPSTREAM, data), (b"", answer, []))

    def test_errors_that_close(self):
        for name, kind, data in [("mysql", "1053", packet(0, b"\x03SELECT 1")), ("postgres", "57P01", message(b"Q", b"SELECT 1\0")), ("smtp", "421", b"NOOP\r\n"),
                                 ("http", "503", b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n"), ("http", "503", b"GET / HTTP/1.0\r\n\r\n")]:
            line = self.line(name, vaurien.Rule("error", {"kind": kind}))
            if name == "postgres":
                line.protocol.up.feed(STARTUP, len(STARTUP))
            up, down, signals = self.feed(line, UPSTREAM, data)
            self.assertEqual((up, signals), (b"", [EOF, EOF]), kind)
            self.assertIn(kind.encode() if name != "mysql" else b"shutdown in progress", down)

    def test_errors_when_a_client_connects(self):
        for name, kind, wanted in [("mysql", "1040", b"\x17\0\0\0\xff\x10\x04Too many connections"), ("redis", "MAXCLIENTS", b"-ERR max number of clients reached\r\n"),
                                   ("memcache", "TOO_MANY", b"ERROR Too many open connections\r\n"),
                                   ("smtp", "421", b"421 4.3.2 Service not available, closing transmission channel\r\n")]:
            line = self.line(name, vaurien.Rule("error", {"kind": kind}))
            self.assertEqual([event[1:3] for event in line.process(0, UPSTREAM, OPEN)], [(DOWNSTREAM, wanted), (DOWNSTREAM, EOF), (UPSTREAM, EOF)])
        line = self.line("postgres", vaurien.Rule("error", {"kind": "53300"}))
        self.assertEqual([event[2] for event in line.process(0, UPSTREAM, OPEN)], [])      # it is to say who it is
        self.assertEqual(self.feed(line, UPSTREAM, SSL_REQUEST), (b"", b"N", []))
        up, down, signals = self.feed(line, UPSTREAM, STARTUP)
        self.assertEqual((up, signals, down[:1]), (b"", [EOF, EOF], b"E"))
        self.assertIn(b"SFATAL\0VFATAL\0C53300\0Msorry, too many clients already\0\0", down)

    def test_without_a_kind_one_of_the_usual_is_drawn(self):
        for name, kind in list(vaurien.PROTOCOLS.items())[1:]:
            self.assertTrue(set(kind.usual) <= set(kind.errors) >= set(kind.greeting) | set(kind.closing), name)
        seen = set()
        line = self.line("redis", vaurien.Rule("error"))
        self.assertEqual(line.process(0, UPSTREAM, OPEN)[0][2], OPEN)
        for _ in range(60):
            seen.add(self.feed(line, UPSTREAM, b"PING\r\n")[1].split(b" ")[0])
        self.assertEqual(seen, {b"-" + kind.encode() for kind in vaurien.Redis.usual})

    def test_a_transaction_that_is_spoilt_stays_spoilt(self):
        line = self.line("redis", vaurien.Rule("error", {"kind": "OOM"}, match=re.compile(b"^SET")))
        self.assertEqual(self.feed(line, UPSTREAM, b"MULTI\r\nSET a 1\r\nEXEC\r\n")[0], b"MULTI\r\n*1\r\n$7\r\nvaurien\r\nEXEC\r\n")
        down = self.feed(line, DOWNSTREAM, b"+OK\r\n-ERR unknown command\r\n-EXECABORT Transaction discarded\r\n")[1]
        self.assertEqual(down, b"+OK\r\n-OOM command not allowed when used memory > 'maxmemory'.\r\n-EXECABORT Transaction discarded\r\n")

    def test_a_deadlock_rolls_back(self):
        line = self.line("mysql", vaurien.Rule("error", {"kind": "1213"}))
        self.assertEqual(self.feed(line, UPSTREAM, packet(0, b"\x03UPDATE t"))[0], packet(0, b"\x03ROLLBACK"))
        self.assertIn(b"Deadlock found", self.feed(line, DOWNSTREAM, packet(1, b"\0\0\0\2\0\0\0"))[1])

    def test_an_error_in_a_batch_leaves_out_all_up_to_sync(self):
        line = self.line("postgres", vaurien.Rule("error", {"kind": "40001"}, match=re.compile(b"bad")))
        line.protocol.up.feed(STARTUP, len(STARTUP))
        good = message(b"P", b"a\0good\0\0\0") + message(b"B", b"\0a\0\0\0\0\0\0\0") + message(b"E", b"\0\0\0\0\0")
        bad = message(b"P", b"b\0bad\0\0\0") + message(b"B", b"\0b\0\0\0\0\0\0\0") + message(b"E", b"\0\0\0\0\0")
        sync = message(b"S")
        up, down, _ = self.feed(line, UPSTREAM, good + bad + good + sync)
        self.assertEqual((up.count(b"vaurien"), up.count(b"bad"), down), (2, 0, b""))
        done = message(b"1") + message(b"2") + message(b"C", b"SELECT 1\0")
        up, down, _ = self.feed(line, DOWNSTREAM, done + message(b"E", b"SERROR\0C42601\0\0") + message(b"Z", b"E"))
        self.assertEqual(down, done + vaurien.Postgres().said("40001") + message(b"Z", b"E"))
        self.feed(line, UPSTREAM, good + sync)
        self.assertEqual(self.feed(line, DOWNSTREAM, done + message(b"Z", b"I"))[1], done + message(b"Z", b"I"))

    def test_prepared_statements_match_by_their_text(self):
        protocol = vaurien.Mysql()
        data = packet(0, b"\x16SELECT ? FROM carts")
        (_, request), _ = protocol.up.feed(data, len(data))
        protocol.pending.append(request)
        protocol.down.feed(packet(1, b"\0\7\0\0\0\1\0\1\0\0\0\0"), 16)
        data = packet(0, b"\x17\7\0\0\0\0\1\0\0\0")
        (_, request), _ = protocol.up.feed(data, len(data))
        self.assertEqual(request.text, b"SELECT ? FROM carts")

    def test_faults_act_on_each_request(self):
        line = self.line("redis", vaurien.Rule("hang", match=re.compile(b"^get")))
        self.assertEqual([event[0] for event in line.read(0, UPSTREAM, b"ping\r\nget a\r\n", line.protocol.up.feed(b"ping\r\nget a\r\n", 13))], [0, NEVER])
        line = self.line("redis", vaurien.Rule("transient", {"agitate": 2, "kind": "BUSY"}))
        line.process(0, UPSTREAM, OPEN)
        failed = [b"BUSY" in self.feed(line, UPSTREAM, b"PING\r\n")[1] for _ in range(4)]
        self.assertEqual(failed, [True, True, False, False])
        line = self.line("redis", vaurien.Rule("error", {"kind": "BUSY"}, after=1, times=2))
        failed = []
        for _ in range(5):
            up, down, _ = self.feed(line, UPSTREAM, b"PING\r\n")
            failed.append(b"BUSY" in down)
            self.feed(line, DOWNSTREAM, b"+PONG\r\n" * bool(up))
        self.assertEqual(failed, [False, True, True, False, False])

    def test_a_request_whose_head_went_through_before_the_fault_came(self):
        line = self.line("http")
        self.assertEqual(self.feed(line, UPSTREAM, b"GET / HT")[0], b"GET / HT")
        line.rules.armed = [vaurien.Rule("error")]
        line.rules_changed(line.rules.armed)
        self.assertEqual(self.feed(line, UPSTREAM, b"TP/1.1\r\n\r\n")[0], b"TP/1.1\r\n\r\n")
        self.assertEqual(self.feed(line, UPSTREAM, b"GET / HTTP/1.1\r\n\r\n")[0], b"")

    def test_errors_that_wait_are_said_before_what_comes_after_the_protocol(self):
        def talk(sock):
            heard = b""
            while b"GET bad" not in heard:
                heard += sock.recv(100)
            sock.sendall(b"+A\r\n*1\r\n:1\r\n")
            read_until_close(sock)

        with running_proxy(talk, protocol="redis") as proxy:
            with connected_client(proxy) as sock, proxy.handler("error", kind="OOM", match="bad"):
                sock.sendall(b"GET a\r\nGET bad\r\nSUBSCRIBE x\r\n")
                proxy.wait_for("error")
                sock.sendall(b"GET bad\r\n")
                answer = b"+A\r\n" + vaurien.Redis().said("OOM") + b"*1\r\n:1\r\n"
                self.assertEqual(read_exactly(sock, len(answer)), answer)

    def test_the_middle_of_what_drew_nothing_takes_the_straight_road(self):
        for rule, straight in (vaurien.Rule("error", draw_max=0), True), (vaurien.Rule("delay"), False):
            line = self.line("http", rule)
            head = b"POST / HTTP/1.1\r\nContent-Length: 90\r\n\r\n"
            marks = line.protocol.up.feed(head, len(head))
            self.assertIsNone(line.pass_through(UPSTREAM, head, marks))
            line.read(0, UPSTREAM, head, marks)
            for to, frames, data in (UPSTREAM, line.protocol.up, bytes(50)), (DOWNSTREAM, line.protocol.down, b"HTTP/1.1 200 OK\r\n"):
                self.assertEqual(line.pass_through(to, data, frames.feed(data, len(data))), data if straight else None)

    def test_nothing_follows_an_error_that_closes(self):
        line = self.line("redis", vaurien.Rule("error", {"kind": "LOADING"}, match=re.compile(b"none")))
        line.protocol.answer = lambda kind, request: vaurien.Reply(b"-BYE\r\n", True)
        line.rules.armed = [vaurien.Rule("error", match=re.compile(b"bad"))]
        line.rules_changed(line.rules.armed)
        self.assertEqual(self.feed(line, UPSTREAM, b"GET 1\r\nGET bad\r\nSET 2 2\r\n"), (b"GET 1\r\n", b"", []))
        self.assertEqual(self.feed(line, UPSTREAM, b"SET 3 3\r\n")[0], b"")
        self.assertEqual(self.feed(line, DOWNSTREAM, b"+A\r\n"), (b"", b"+A\r\n-BYE\r\n", [EOF, EOF]))

    def test_transactions_of_postgres_end(self):
        line = self.line("postgres", vaurien.Rule("error", {"kind": "40001"}))
        line.protocol.up.feed(STARTUP, len(STARTUP))
        for query, wanted in [(b"ROLLBACK", b"ROLLBACK"), (b"COMMIT", b"ROLLBACK"), (b"end", b"ROLLBACK"), (b"SELECT 1", b"vaurien")]:
            up, _, _ = self.feed(line, UPSTREAM, message(b"Q", query + b"\0"))
            self.assertEqual(up, message(b"Q", wanted + b"\0"))
            self.feed(line, DOWNSTREAM, message(b"C", b"ROLLBACK\0") + message(b"Z", b"E" if wanted == b"vaurien" else b"I"))
        self.assertEqual(self.feed(line, UPSTREAM, message(b"Q", b"SELECT 2\0"))[0], message(b"Q", b"SELECT 2\0"))

    def test_copy_by_extended_query_ignores_a_sync(self):
        line = self.line("postgres", vaurien.Rule("error", {"kind": "40001"}, match=re.compile(b"bad")))
        line.protocol.up.feed(STARTUP, len(STARTUP))
        execute = message(b"B", b"\0\0\0\0\0\0\0\0") + message(b"E", b"\0\0\0\0\0") + message(b"S")
        self.feed(line, UPSTREAM, message(b"P", b"\0COPY t FROM STDIN\0\0\0") + execute)
        self.feed(line, DOWNSTREAM, message(b"1") + message(b"2") + message(b"G", b"\0\0\0"))
        self.feed(line, UPSTREAM, message(b"d", b"1\n") + message(b"c") + message(b"S"))
        self.feed(line, DOWNSTREAM, message(b"C", b"COPY 1\0") + message(b"Z", b"I"))
        self.feed(line, UPSTREAM, message(b"Q", b"bad\0"))
        found = self.feed(line, DOWNSTREAM, message(b"E", b"SERROR\0\0") + message(b"Z", b"I"))[1]
        self.assertEqual(found, vaurien.Postgres().said("40001") + message(b"Z", b"I"))

    def test_packets_and_statements_of_mysql(self):
        line = self.line("mysql", vaurien.Rule("error", {"kind": "1205"}))
        self.feed(line, UPSTREAM, b"\xff\xff\xff\0\x03" + bytes(0xFFFFFE))
        self.assertEqual(self.feed(line, UPSTREAM, packet(1, b"x" * 5))[1][3], 2)
        line = self.line("mysql", vaurien.Rule("error", {"kind": "1205"}, match=re.compile(b"^SELECT")))
        self.feed(line, UPSTREAM, packet(0, b"\x16SELECT ?"))
        self.assertEqual(line.exchanges[-1].sent, False)
        line = self.line("mysql", vaurien.Rule("error", {"kind": "1205"}, match=re.compile(b"nothing")))
        self.feed(line, UPSTREAM, packet(0, b"\x16SELECT ?"))
        data = packet(0, b"\x17\xff\xff\xff\xff\0\1\0\0\0")
        (_, request), _ = line.protocol.up.feed(data, len(data))
        self.assertEqual(request.text, b"SELECT ?")
        line = self.line("mysql", vaurien.Rule("error", {"kind": "1205"}))
        self.assertEqual(self.feed(line, UPSTREAM, packet(0, b"\x17\7\0\0\0\0\1\0\0\0"))[0], packet(0, b"\x1a\7\0\0\0"))

    def test_an_error_is_none_of_a_connection_that_is_encrypted(self):
        line = self.line("postgres", vaurien.Rule("error", stream="both"))
        frames = line.protocol.up
        frames.feed(b"\x16\x03\x01\0\0\0\0\0", 8)
        plain, _ = line.fall_back_to_tcp(0)
        plain.begin()
        plain.process(0, UPSTREAM, b"hello")
        self.assertEqual(plain.process(0, DOWNSTREAM, b"world"), [(0, DOWNSTREAM, b"world", ())])

    def test_a_client_that_waits_to_be_asked_on(self):
        line = self.line("http", vaurien.Rule("error", {"kind": "503"}))
        up, down, signals = self.feed(line, UPSTREAM, b"POST / HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n")
        self.assertEqual((up, down[:12], signals), (b"", b"HTTP/1.1 503", [EOF, EOF]))
        self.assertEqual(self.feed(line, UPSTREAM, b"12345"), (b"", b"", []))

    def test_a_long_head_is_one_however_it_is_split(self):
        data = b"GET / HTTP/1.1\r\nX: " + b"x" * 70000 + b"\r\n\r\n"
        for sizes in [len(data)], [60000, len(data) - 60000]:
            protocol, at = vaurien.Http(), 0
            for size in sizes:
                protocol.up.feed(data[at:at + size], size)
                at += size
            self.assertTrue(protocol.up.lost)

    def test_the_host_header(self):
        armed = vaurien.RuleSet(1, "test")
        for rules in [], [vaurien.Rule("delay", draw_max=0)]:
            armed.armed = rules
            for data, wanted in [(b"GET / HTTP/1.1\r\nA: b\r\nhost:  localhost:8000\r\n\r\n", b"GET / HTTP/1.1\r\nA: b\r\nhost:  google.com\r\n\r\n"),
                                 (b"GET / HTTP/1.1\r\nHost: Google.com\r\n\r\n",) * 2, (b"GET / HTTP/1.0\r\n\r\n",) * 2,
                                 (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nHost: x\r\n", b"POST / HTTP/1.1\r\nHost: google.com\r\nContent-Length: 9\r\n\r\nHost: x\r\n")]:
                for sizes in [[len(data)], [1] * len(data)]:
                    line = vaurien.ProtocolChain(armed, 1, vaurien.Http(b"google.com"))
                    line.begin()
                    for _ in range(2):
                        self.assertEqual(self.feed(line, UPSTREAM, data, sizes)[0], wanted)
                        self.feed(line, DOWNSTREAM, b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        for backend, name in (("google.com", 80), b"google.com"), (("::1", 8000), b"[::1]:8000"), (("", 81), b"localhost:81"):
            self.assertEqual(vaurien.Proxy(backend, ("", 9), protocol="http").host_header(), name)
        self.assertEqual(vaurien.Proxy(("x", 1), ("", 9), protocol="http", overwrite_host_header=False).host_header(), b"")


    def test_nothing_passes_whole_after_an_end_that_waited(self):
        def farewell(state, t, to, data):
            yield t, to, data
            if to == UPSTREAM and data:
                yield t, UPSTREAM, EOF

        with registered(farewell):
            rule = vaurien.Rule("farewell")
        line, ping = self.line("redis", rule), b"*1\r\n$4\r\nPING\r\n"
        self.feed(line, UPSTREAM, ping * 2)
        self.feed(line, DOWNSTREAM, b"+PONG\r\n" * 2)
        self.armed(line)
        self.assertEqual(self.feed(line, UPSTREAM, ping), (b"", b"", []))
        self.assertEqual(line.rules.requests, 2)

    def test_what_is_whole_only_by_its_looks(self):
        for name, before, to, pieces in [
                ("redis", True, UPSTREAM, [b"*2\r\n$3\r\nGET\r\n$14\r\n", b"*1\r\n$4\r\nPING\r\n", b"\r\n"]),
                ("redis", True, DOWNSTREAM, [b"$5\r\n", b"+OK\r\n", b"\r\n"]), ("redis", True, UPSTREAM, [b"*1\r\n$9\r\nSUBSCRIBE\r\n"]),
                ("redis", True, UPSTREAM, [b"*0\r\n"]), ("http", False, DOWNSTREAM, [b"HTTP/1.1 408 Late\r\nContent-Length: 0\r\n\r\n"])]:
            ask, answer = {"redis": (b"PING\r\n", b"+PONG\r\n"), "http": (b"GET / HTTP/1.1\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")}[name]
            stands = []
            for whole in True, False:
                line = vaurien.ProtocolChain(vaurien.RuleSet(1, "test"), 1, vaurien.PROTOCOLS[name]())
                line.begin()
                talk = [(UPSTREAM, ask), (DOWNSTREAM, answer), (UPSTREAM, ask)]
                found = []
                for way, piece in talk[:before * (3 if to == DOWNSTREAM else 2)] + [(to, piece) for piece in pieces] + talk:
                    out, _, frames = passing(line, way, piece, whole)
                    if frames.lost:
                        found.append(frames.lost)
                        break
                    found.append((out, line.request, len(line.protocol.pending), line.in_request, line.head_forwarded,
                                  [(one.number, one.sent, one.complete, one.over) for one in line.exchanges]))
                stands.append(found)
            self.assertEqual(*stands)

    def test_what_passes_whole_leaves_the_row_as_what_comes_in_pieces(self):
        generator, talks = random.Random(3), Counter()
        for name, asked, answered in [("redis", b"*2\r\n$3\r\nGET\r\n$1\r\na\r\n", b"$5\r\nhello\r\n"),
                                      ("http", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")]:
            for _ in range(50):
                lines, open_requests = [], 0
                for _ in range(2):
                    lines.append(vaurien.ProtocolChain(vaurien.RuleSet(1, "test"), 1, vaurien.PROTOCOLS[name]()))
                    lines[-1].begin()
                for _ in range(20):
                    if open_requests and generator.random() < 0.5:
                        to, number = DOWNSTREAM, generator.randint(1, open_requests)
                        open_requests -= number
                    else:
                        to, number = UPSTREAM, generator.choice([1, 1, 1, 3])
                        open_requests += number
                    data, left = (asked if to == UPSTREAM else answered) * number, []
                    talks[number] += 1
                    for line, pieces in zip(lines, ([data], [data[at:at + 7] for at in range(0, len(data), 7)])):
                        for piece in pieces:
                            self.assertEqual(passing(line, to, piece)[0], piece)
                        left.append((line.request, line.rules.requests, line.in_request, line.head_forwarded, line.number, len(line.protocol.pending),
                                     [(one.number, one.sent, one.complete, one.over, one.request.name, one.request.text) for one in line.exchanges]))
                    self.assertEqual(left[0], left[1])
                acted = []
                for line in lines:              # it is too late to answer in the backend's place
                    rule = vaurien.Rule("error", per="connection")
                    self.armed(line, rule)
                    acted.append((rule.activations, line.process_open(0, [UPSTREAM, DOWNSTREAM], [rule]), line.asked is line.exchanges[-1].request))
                self.assertEqual(acted, [(0, [], True)] * 2)
        self.assertGreater(talks[3], 10)

    def armed(self, line, *rules):
        """The rules of an open connection are others."""
        new = [rule for rule in rules if rule not in line.rules.armed]
        line.rules.armed = list(rules)
        line.rules_changed(new)

    def test_an_expression_for_a_connection_that_does_not_match_at_once(self):
        line = self.line("redis", vaurien.Rule("error", {"kind": "OOM"}, per="connection", match=re.compile(b"bad")))
        for words, refused in (b"PING\r\n", False), (b"PING\r\n", False), (b"bad\r\n", True), (b"PING\r\n", True):
            self.assertEqual(b"OOM" in self.feed(line, UPSTREAM, words)[1], refused)
            self.feed(line, DOWNSTREAM, b"+PONG\r\n" * (not refused))
        line = self.line("redis", vaurien.Rule("delay", per="connection", match=re.compile(b"bad")))
        self.feed(line, UPSTREAM, b"PING\r\n")
        plain, _ = line.fall_back_to_tcp(0)
        plain.begin()

    def test_a_chunk_of_no_size(self):
        for size in b"-6", b"+6", b"0x6", b"1_0", b"", b" ":
            data = b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" + size + b"\r\n"
            frames = vaurien.Http().up
            frames.feed(data, len(data))
            self.assertIn("is no chunk", frames.lost, size)

    def test_a_fault_that_goes_finishes_what_it_has_begun(self):
        line = self.line("memcache", vaurien.Rule("error"))
        self.feed(line, UPSTREAM, b"set a 0 0 8\r\nabc")
        self.armed(line)
        self.assertEqual(self.feed(line, UPSTREAM, b"defgh\r\n"), (b"", b"SERVER_ERROR out of memory\r\n", []))
        self.assertEqual(self.feed(line, UPSTREAM, b"get a\r\n")[0], b"get a\r\n")
        line = self.line("redis", vaurien.Rule("error", {"kind": "OOM"}, match=re.compile(b"SET")))
        self.feed(line, UPSTREAM, b"MULTI\r\nSET a 1\r\n")
        self.feed(line, DOWNSTREAM, b"+OK\r\n")
        self.armed(line)
        self.assertEqual(self.feed(line, DOWNSTREAM, b"-ERR unknown command\r\n")[1][:5], b"-OOM ")

    def test_a_fault_that_comes_late_leaves_what_the_backend_has(self):
        for first, rest, reply in (b"get a\r\n", b"", b"END\r\n"), (b"set a 0 0 8\r\nabc", b"defgh\r\n", b"STORED\r\n"), (b"ge", b"t a\r\n", b"END\r\n"):
            line = self.line("memcache")
            self.feed(line, UPSTREAM, first)
            self.armed(line, vaurien.Rule("error", per="connection"))
            self.assertEqual(self.feed(line, UPSTREAM, rest)[:2], (rest, b""))
            self.assertEqual(self.feed(line, DOWNSTREAM, reply)[1], reply)
            self.assertEqual(self.feed(line, UPSTREAM, b"get b\r\n"), (b"", b"SERVER_ERROR out of memory\r\n", []))

    def test_what_has_been_answered_is_forgotten(self):
        rule = vaurien.Rule("error", per="connection")
        line = self.line("redis", rule)
        self.feed(line, UPSTREAM, b"PING\r\n" * 100)
        self.assertLessEqual(len(line.per_connection[rule].state.replies), 1)
        protocol = vaurien.Postgres()
        for data in [STARTUP] + [message(b"P", b"a%d\0SELECT\0\0\0" % number) + message(b"C", b"Sa%d\0" % number) for number in range(9)]:
            protocol.up.feed(data, len(data))
        data = message(b"P", b"\0" + b"x" * 70000 + b"\0\0\0")
        protocol.up.feed(data, len(data))
        self.assertEqual(list(protocol.statements), [b""])
        protocol = vaurien.Mysql()
        protocol.statements[b"\1\0\0\0"] = b"SELECT"
        protocol.up.feed(packet(0, b"\x19\1\0\0\0"), 9)
        self.assertEqual(protocol.statements, {})

    def test_a_client_that_speaks_before_it_is_greeted(self):
        armed = vaurien.RuleSet(1, "test")
        for rules in [], [vaurien.Rule("delay", draw_max=0)]:
            armed.armed = rules
            line = vaurien.ProtocolChain(armed, 1, vaurien.Smtp())
            line.begin()
            self.feed(line, UPSTREAM, b"EHLO x\r\nMAIL a\r\nRCPT b\r\nDATA\r\n")
            self.feed(line, DOWNSTREAM, b"220 hi\r\n250 ok\r\n250 ok\r\n250 ok\r\n354 go\r\n")
            self.feed(line, UPSTREAM, b"body\r\n.\r\n")
            self.assertEqual(line.exchanges[-1].request.name, "MESSAGE")

    def test_a_dialogue_of_auth_is_one_request(self):
        line = self.line("smtp", vaurien.Rule("error", {"kind": "450"}, match=re.compile(b"dXNl")))
        for words, reply in (b"AUTH LOGIN\r\n", b"334 VXNl\r\n"), (b"dXNlcg==\r\n", b"334 UGFz\r\n"), (b"dXNl\r\n", b"235 ok\r\n"):
            self.assertEqual(self.feed(line, UPSTREAM, words), (words, b"", []))
            self.assertEqual(self.feed(line, DOWNSTREAM, reply)[1], reply)
        self.assertEqual(self.feed(line, UPSTREAM, b"dXNl\r\n")[1][:3], b"450")

    def test_a_local_file_is_one_request(self):
        line = self.line("mysql", vaurien.Rule("error", {"kind": "1205"}, match=re.compile(b"data")))
        self.feed(line, UPSTREAM, LOGIN + packet(0, b"\3LOAD"))
        self.feed(line, DOWNSTREAM, packet(1, b"\xfbfile"))
        data = b"".join(packet(number % 256, b"\3data") for number in range(2, 600)) + packet(88, b"")
        self.assertEqual(self.feed(line, UPSTREAM, data), (data, b"", []))
        self.feed(line, DOWNSTREAM, packet(89, b"\0\0\0\2\0\0\0"))
        self.assertIn(b"Lock wait", self.feed(line, UPSTREAM, packet(0, b"\3data"))[1])

    def test_commands_of_mysql_that_did_not_wait_do_not_hold_up_later_ones(self):
        line = self.line("mysql", vaurien.Rule("error", {"kind": "1205"}, match=re.compile(b"bad")))
        self.feed(line, UPSTREAM, LOGIN + packet(0, b"\x16SELECT 1") + packet(0, b"\x17\xff\xff\xff\xff\0\1\0\0\0"))
        self.feed(line, DOWNSTREAM, packet(1, b"\0\1\0\0\0\0\0\0\0\0\0\0") + packet(1, b"\0\0\0\2\0\0\0"))
        self.feed(line, UPSTREAM, packet(0, b"\x03good"))
        self.feed(line, DOWNSTREAM, packet(1, b"\0\0\0\2\0\0\0"))
        self.assertIn(b"Lock wait", self.feed(line, UPSTREAM, packet(0, b"\x03bad"))[1])

    def test_quiet_commands_that_are_answered_after_all(self):
        line = self.line("memcache", vaurien.Rule("error", {"kind": "ERROR"}, match=re.compile(b"^set")))
        self.feed(line, UPSTREAM, b"mg a v q\r\nms b 1 q\r\nx\r\nmn\r\nget x\r\nset y 0 0 1\r\n1\r\n")
        replies = b"VA 1\r\n1\r\nNS\r\nMN\r\n"
        self.assertEqual(self.feed(line, DOWNSTREAM, replies)[1], replies)
        self.assertEqual(self.feed(line, DOWNSTREAM, b"END\r\n")[1], b"END\r\nERROR\r\n")

    def test_the_faults_of_the_last_request_are_not_those_of_what_comes_as_tcp(self):
        line = self.line("redis", vaurien.Rule("error", {"kind": "OOM"}, match=re.compile(b"^GET")))
        self.assertIn(b"OOM", self.feed(line, UPSTREAM, b"GET a\r\n")[1])
        data = b"SUBSCRIBE a\r\n"
        events = line.read(0, UPSTREAM, data, line.protocol.up.feed(data, len(data)))
        plain, more = line.fall_back_to_tcp(0)
        self.assertEqual([event[2] for event in events + more], [data])
        self.assertEqual(plain.process(0, DOWNSTREAM, b"*3\r\n"), [(0, DOWNSTREAM, b"*3\r\n", ())])

    def test_long_pipelines_take_no_longer_for_each(self):
        line = self.line("redis", vaurien.Rule("error", {"kind": "OOM"}, match=re.compile(b"A")))
        began = time.monotonic()
        self.feed(line, UPSTREAM, b"B\r\nA\r\n" * 20000)           # 10 s, where each is looked for among all
        self.assertLess(time.monotonic() - began, 5)
        line = self.line("redis")
        self.feed(line, UPSTREAM, b"PING\r\n" * 20000)
        began = time.monotonic()
        for _ in range(5000):
            self.feed(line, DOWNSTREAM, b"+PONG\r\n")
        self.assertLess(time.monotonic() - began, 1)


class TestProtocols(unittest.TestCase):
    """Protocols on real sockets."""

    def test_who_says_nothing_and_goes_is_forgotten(self):
        with running_proxy(echo, "100:error", protocol="postgres") as proxy:
            connect(proxy.port).close()
            wait_until(lambda: proxy.accepted and not proxy.connections)

    def test_what_is_said_after_the_last_answer_is_no_request(self):
        with running_proxy(echo, "100:error", options={"error": {"kind": "503"}}, protocol="http") as proxy, connected_client(proxy) as sock:
            sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
            self.assertEqual(read_until_close(sock)[2], "eof")
            for _ in range(3):
                sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
                time.sleep(0.02)
            self.assertEqual(proxy.faults, {"error": 1})

    def test_one_stream_is_not_enough_to_answer(self):
        with self.assertRaisesRegex(ValueError, "stream must be both"):
            vaurien.Proxy("x:1", protocol="redis", toxics=[vaurien.Toxic("error", "e")])
        vaurien.Proxy("x:1", protocol="redis", toxics=[vaurien.Toxic("error", "e", stream="both")])

    def test_kinds_that_a_protocol_does_not_have_are_refused(self):
        for protocol, words in ("redis", "kind must be one of LOADING, BUSY"), ("tcp", "kind '503' is for a protocol: tcp has no kinds of errors"):
            with self.assertRaisesRegex(ValueError, words):
                vaurien.Proxy("x:1", protocol=protocol, behavior="1:error", options={"error": {"kind": "503"}})
        with self.assertRaisesRegex(ValueError, "must be one of tcp, http, redis, memcache, mysql, postgres, smtp, not 'nope'"):
            vaurien.Proxy("x:1", protocol="nope")
        with registered(Passes), self.assertRaisesRegex(ValueError, "it is for protocol tcp"):
            vaurien.Proxy("x:1", protocol="redis", behavior="1:Passes")

    def test_http_with_keep_alive(self):
        def talk(sock):
            file = sock.makefile("rb")
            while file.readline():
                length = 0
                for line in iter(file.readline, b"\r\n"):
                    if line.lower().startswith(b"content-length:"):
                        length = int(line.split(b":")[1])
                body = file.read(length)
                sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

        with running_proxy(talk, protocol="http") as proxy:
            client = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=PATIENCE)
            with contextlib.closing(client):
                for kind in [None, *vaurien.Http.errors, None]:
                    with proxy.handler("error", kind=kind) if kind else proxy.handler("dummy"):
                        for body in b"", b"x" * 3000000:
                            client.request("POST", "/", body)
                            response = client.getresponse()
                            self.assertEqual(response.status, int(kind or 200))
                            self.assertEqual(response.read() == body, not kind)
            self.assertEqual(proxy.accepted, 1)

    def test_an_error_that_closes_is_heard_though_the_client_goes_on_sending(self):
        with running_proxy(echo, protocol="http") as proxy, connected_client(proxy) as sock:
            with proxy.handler("error", kind="503"):
                sock.sendall(b"POST / HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 10\r\n\r\n")
                sock.sendall(b"0123456789")
                found = b""
                while b"503 Service Unavailable\n" not in found:
                    found += sock.recv(65536)
                sock.sendall(bytes(3000000))
                self.assertEqual(read_until_close(sock)[0::2], (0, "eof"))

    def test_a_connection_goes_on_as_tcp(self):
        data = random_data(300000)
        for protocol in list(vaurien.PROTOCOLS)[1:]:
            for behavior in "100:dummy", "0:hang":
                with self.subTest(protocol, behavior=behavior), running_proxy(echo, behavior, protocol=protocol) as proxy, connected_client(proxy) as sock:
                    self.assertEqual(round_trip(sock, b"\n\n" * 5 + data)[0], 300010)

    def test_a_backend_that_speaks_first(self):
        def talk(sock):
            sock.sendall(b"220 hello\r\n")
            echo(sock)

        with running_proxy(talk, protocol="smtp") as proxy, connected_client(proxy) as sock:
            self.assertEqual(read_exactly(sock, 11), b"220 hello\r\n")
            with proxy.handler("delay", sleep=0.05):
                began = time.monotonic()
                send_and_read(sock, b"250 NOOP\r\n")
                self.assertGreaterEqual(time.monotonic() - began, 0.05)

    def test_large_values_pass_with_little_memory(self):
        class Small(vaurien.Budget):
            most = 0

            def allowance(self, bound):
                self.most = max(self.most, self.held)
                return super().allowance(bound)

        data = bytes(8 << 20)
        for protocol, head in [("redis", b"*2\r\n$4\r\nECHO\r\n$%d\r\n" % len(data)), ("http", b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(data)),
                               ("memcache", b"set a 0 0 %d\r\n" % len(data))]:
            for behavior in "100:dummy", "0:hang":
                with mock.patch.object(vaurien, "Budget", Small), running_proxy(echo, behavior, protocol=protocol) as proxy, connected_client(proxy) as sock:
                    self.assertEqual(round_trip(sock, head + data + b"\r\n")[0], len(head) + len(data) + 2)
                    self.assertLessEqual(proxy.loop.budget.most, 4 * vaurien.HELD_MAX_IDLE + 4 * vaurien.CHUNK)


# -- Toxiproxy: toxics, their API, and what the original gets wrong ------------------

class TestToxics(unittest.TestCase):
    """The handlers of Toxiproxy as tables, in its units."""

    def play(self, kind, *events, stream="both", **options):
        """What a toxic makes of one connection's events: [(t, to, data)]."""
        line = chain_of(vaurien.Rule(kind, options, per="connection", stream=stream))
        found = line.process_open(0, [UPSTREAM, DOWNSTREAM])
        for event in events:
            found += line.process(*event)
        return [(round(t, 6), to, data) for t, to, data, _ in found]

    def test_latency_is_milliseconds_and_none_waits_for_another(self):
        self.assertEqual(
            self.play("latency", (0, UPSTREAM, OPEN), (1, DOWNSTREAM, b"a"), (1.05, DOWNSTREAM, b"b"),
                      (2, DOWNSTREAM, EOF), latency=200),
            [(0, UPSTREAM, OPEN), (1.2, DOWNSTREAM, b"a"), (1.25, DOWNSTREAM, b"b"), (2, DOWNSTREAM, EOF)])

    def test_jitter_is_more_or_less_and_never_into_the_past(self):
        times = [t for t, _, _ in self.play("latency", *[(0, UPSTREAM, b"q")] * 200, latency=100, jitter=50)]
        self.assertTrue(0.05 <= min(times) < 0.07 and 0.13 < max(times) <= 0.15, times)
        times = [t for t, _, _ in self.play("latency", *[(0, UPSTREAM, b"q")] * 200, latency=10, jitter=50)]
        self.assertEqual(min(times), 0)

    def test_bandwidth_is_kilobytes_of_1000_bytes_and_each_way_has_its_own(self):
        found = self.play("bandwidth", (0, UPSTREAM, bytes(5000)), (0, DOWNSTREAM, b"a" * 100),
                          (1, UPSTREAM, bytes(1000)), rate=1)
        self.assertEqual(sum(len(data) for _, _, data in found), 6100)
        self.assertEqual([t for t, to, _ in found if to == DOWNSTREAM][-1], 0.1)
        self.assertEqual([t for t, to, _ in found if to == UPSTREAM][-1], 6)
        self.assertTrue(all(len(data) <= 10 for _, _, data in found))

    def test_bandwidth_is_idle_when_it_is_idle(self):
        found = self.play("bandwidth", (0, UPSTREAM, bytes(1000)), (10, UPSTREAM, bytes(1000)), rate=1)
        self.assertEqual(found[-1][0], 11)

    def test_no_bandwidth_holds_everything(self):
        self.assertEqual(self.play("bandwidth", (0, UPSTREAM, b"q"), (1, UPSTREAM, EOF)),
                         [(NEVER, UPSTREAM, b"q"), (NEVER, UPSTREAM, EOF)])

    def test_slicer_cuts_into_pieces_and_waits_after_each(self):
        found = self.play("slicer", (1, DOWNSTREAM, b"abcdefgh"), (1, DOWNSTREAM, b"i"), (1, DOWNSTREAM, EOF),
                          average_size=3, delay=1000)
        self.assertEqual(found, [(1, DOWNSTREAM, b"abc"), (1.001, DOWNSTREAM, b"def"), (1.002, DOWNSTREAM, b"gh"),
                                 (1.003, DOWNSTREAM, b"i"), (1.004, DOWNSTREAM, EOF)])

    def test_slicer_varies_its_pieces(self):
        data = random_data(100000)
        found = self.play("slicer", (1, DOWNSTREAM, data), average_size=500, size_variation=100)
        sizes = [len(piece) for _, _, piece in found]
        self.assertEqual(b"".join(piece for _, _, piece in found), data)
        self.assertTrue(all(400 <= size <= 600 for size in sizes[:-1]), sizes)
        self.assertGreater(len(set(sizes)), 50)

    def test_slicer_with_what_crashes_the_original(self):
        for size, variation in (0, 0), (0, 5), (1, 1), (1, 10 ** 18), (10 ** 18, 1), (5, 5), (3, 7):
            found = self.play("slicer", (1, DOWNSTREAM, b"abcdefgh"), average_size=size, size_variation=variation)
            self.assertEqual(b"".join(data for _, _, data in found), b"abcdefgh", (size, variation))
            self.assertTrue(all(data for _, _, data in found))

    def test_a_chunk_is_not_cut_into_more_pieces_than_there_is_memory_for(self):
        for kind, options in ("slicer", {"average_size": 1}), ("bandwidth", {"rate": 1}):
            found = self.play(kind, (1, DOWNSTREAM, bytes(vaurien.CHUNK)), **options)
            self.assertLessEqual(len(found), vaurien.PIECES_MAX + 1)
            self.assertEqual(sum(len(data) for _, _, data in found), vaurien.CHUNK)

    def test_slow_close_puts_off_the_end_alone(self):
        self.assertEqual(self.play("slow_close", (1, DOWNSTREAM, b"a"), (2, DOWNSTREAM, EOF), delay=500),
                         [(1, DOWNSTREAM, b"a"), (2.5, DOWNSTREAM, EOF)])

    def test_timeout_is_counted_from_when_it_began_and_not_anew_for_each_chunk(self):
        found = self.play("timeout", (0.4, DOWNSTREAM, b"a"), (0.6, DOWNSTREAM, b"b"), stream=DOWNSTREAM, timeout=700)
        self.assertEqual(found, [(0.7, DOWNSTREAM, EOF), (0.7, UPSTREAM, EOF)])

    def test_timeout_0_loses_everything_and_closes_when_it_is_removed(self):
        rule = vaurien.Rule("timeout", per="connection", stream=DOWNSTREAM)
        pipe = vaurien.DelayQueue(DOWNSTREAM, vaurien.Budget())
        line = chain_of(rule)
        for t, to, data, holds in line.process_open(0, [DOWNSTREAM]) + line.process(1, DOWNSTREAM, b"a"):
            if to == DOWNSTREAM:
                pipe.put(t, data, 0, holds)
        self.assertEqual((pipe.due(10 ** 9), list(pipe.out)), ([], []))
        pipe.release([rule])
        pipe.due(2)
        self.assertEqual(list(pipe.out), [EOF])

    def test_timeout_passes_the_end_on(self):
        found = self.play("timeout", (1, DOWNSTREAM, b"a"), (2, DOWNSTREAM, EOF), stream=DOWNSTREAM)
        self.assertEqual(found[2:], [(2, DOWNSTREAM, EOF)])

    def test_reset_peer_answers_what_comes_first_with_a_reset(self):
        for first in b"a", EOF:
            self.assertEqual(
                self.play("reset_peer", (0, UPSTREAM, OPEN), (1, DOWNSTREAM, first), (1.1, DOWNSTREAM, b"b"),
                          (1.2, DOWNSTREAM, EOF), timeout=500),
                [(0, UPSTREAM, OPEN), (1.5, DOWNSTREAM, RESET)])

    def test_limit_data_lets_exactly_so_much_through(self):
        for limit, passed in (0, b""), (3, b"abc"), (5, b"abcde"):
            found = self.play("limit_data", (1, DOWNSTREAM, b"a"), (2, DOWNSTREAM, b"bcde"),
                              (3, DOWNSTREAM, b"f"), stream=DOWNSTREAM, bytes=limit)
            passing = found[:found.index(next(event for event in found if event[2] is EOF))]
            self.assertEqual(b"".join(data for _, _, data in passing), passed)
            self.assertEqual({event[1] for event in found if event[2] is EOF}, {UPSTREAM, DOWNSTREAM})
            self.assertEqual(b"".join(data for _, _, data in found), passed)

    def test_a_fault_drawn_for_a_connection_is_shown_its_beginning_each_way(self):
        seen = []

        def watch(state, t, to, data):
            seen.append((t, to, data))
            yield t, to, data

        with registered(watch):
            for stream in "both", UPSTREAM, DOWNSTREAM:
                line = chain_of(vaurien.Rule("watch", per="connection", stream=stream))
                self.assertEqual(line.process_open(3, [UPSTREAM, DOWNSTREAM]), [])
                self.assertEqual(seen, [(3, way, OPEN) for way in (UPSTREAM, DOWNSTREAM) if stream in ("both", way)])
                seen.clear()
            chain_of(vaurien.Rule("watch")).process_open(3, [UPSTREAM, DOWNSTREAM])
            self.assertEqual(seen, [])

    def test_what_one_makes_of_the_beginning_goes_through_those_behind_it(self):
        line = chain_of(vaurien.Rule("blackout", per="connection", draw_key="a"),
                       vaurien.Rule("slow_close", {"delay": 5000}, per="connection", draw_key="b"))
        self.assertEqual({event[:3] for event in line.process_open(1, [DOWNSTREAM])},
                         {(6, DOWNSTREAM, EOF), (6, UPSTREAM, EOF)})


class TestThinWires(unittest.TestCase):
    """What queues for a wire, and what does not."""

    def test_a_thin_wire_behind_a_hang_is_free_when_that_is_gone(self):
        with running_proxy(echo) as proxy, connected_client(proxy) as sock:
            toxics = [vaurien.Toxic(kind, kind, attributes=attributes, stream="both")
                      for kind, attributes in (("bandwidth", {"rate": 100000}), ("slicer", {"average_size": 3, "delay": 1}))]
            proxy.loop.run_sync(proxy.set_toxics, toxics)
            with proxy.handler("hang"):
                sock.sendall(b"one")
                proxy.wait_for("hang")
            self.assertEqual(read_exactly(sock, 3), b"one")
            send_and_read(sock, b"two")

    def test_latency_is_no_limit_to_a_bandwidth(self):
        pipe = vaurien.DelayQueue(DOWNSTREAM, vaurien.Budget())
        line = chain_of(vaurien.Rule("bandwidth", {"rate": 5000}, draw_key="a"), vaurien.Rule("latency", {"latency": 1000}, draw_key="b"))
        for number in range(50):        # a second of what that wire carries
            self.assertGreater(pipe.room(lambda: number / 50), 0)
            for t, _, data, holds in line.process(number / 50, DOWNSTREAM, bytes(100000)):
                pipe.put(t, data, number / 50, holds)
        self.assertGreater(pipe.held, 4900000)

    def test_room_comes_back_by_the_clock(self):
        pipe = vaurien.DelayQueue(DOWNSTREAM, vaurien.Budget())
        line = chain_of(vaurien.Rule("bandwidth", {"rate": 1000}))
        for t, _, data, holds in line.process(0, DOWNSTREAM, bytes(500000)):
            pipe.put(t, data, 0, holds)
        self.assertLess(pipe.room(lambda: 0), 0)
        self.assertAlmostEqual(pipe.resume_reading_at(0), 0.4)
        self.assertGreater(pipe.room(lambda: 0.41), 0)
        self.assertEqual(pipe.resume_reading_at(0.41), NEVER)


class TestMatch(unittest.TestCase):
    """Rules that wait for what the request says."""

    def line(self, *rules):
        return chain_of(*rules)

    def test_it_acts_from_where_the_request_matches(self):
        line = chain_of(vaurien.Rule("hang", match=vaurien.check_match("GET /cart")))
        self.assertEqual(line.process(0, UPSTREAM, OPEN)[0][0], 0)
        self.assertEqual(line.process(0, UPSTREAM, b"GET /")[0][0], 0)
        self.assertEqual(line.process(1, UPSTREAM, b"cart HTTP/1.1")[0][0], NEVER)
        self.assertEqual(line.process(1, DOWNSTREAM, b"a")[0][0], NEVER)

    def test_each_request_is_looked_at_anew(self):
        line = chain_of(vaurien.Rule("hang", match=vaurien.check_match("ab")))
        held = []
        for text in b"a", b"b", b"ab", b"xx":
            line.turn(UPSTREAM)
            held.append(line.process(0, UPSTREAM, text)[0][0] == NEVER)
            line.turn(DOWNSTREAM)
        self.assertEqual(held, [False, False, True, False])

    def test_after_and_times_count_the_requests_that_match(self):
        rule = vaurien.Rule("hang", match=vaurien.check_match("hit"), after=1, times=2)
        line, held = chain_of(rule), []
        for text in b"miss", b"hit", b"miss", b"hit", b"hit", b"hit":
            line.turn(UPSTREAM)
            held.append(line.process(0, UPSTREAM, text)[0][0] == NEVER)
            line.turn(DOWNSTREAM)
        self.assertEqual(held, [False, False, False, True, True, False])

    def test_a_connection_is_hit_from_its_first_request_that_matches(self):
        line = chain_of(vaurien.Rule("hang", match=vaurien.check_match("^hit"), per="connection"))
        held = []
        for text in b"mi", b"hit", b"miss":
            line.turn(UPSTREAM)
            held.append(line.process(0, UPSTREAM, text)[0][0] == NEVER)
            line.turn(DOWNSTREAM)
        self.assertEqual(held, [False, True, True])

    def test_the_dice_decide_too(self):
        armed = vaurien.RuleSet(1, "test")
        armed.armed = [vaurien.Rule("hang", draw_max=30, match=vaurien.check_match("hit"))]
        hits = 0
        for number in range(300):
            line = vaurien.Chain(armed, number)
            line.begin()
            hits += line.process(0, UPSTREAM, b"hit")[0][0] == NEVER
        self.assertTrue(60 < hits < 120, hits)

    def test_it_looks_at_the_first_bytes_of_a_long_request_only(self):
        line = chain_of(vaurien.Rule("hang", match=vaurien.check_match("hit")))
        line.process(0, UPSTREAM, bytes(vaurien.MATCH_WINDOW))
        self.assertEqual(line.process(0, UPSTREAM, b"hit")[0][0], 0)

    def test_bad_expressions_are_refused(self):
        for text in "(", "", 5, None, "a{99999999999}", "\ud800", "(?P<a>x)(?P<a>y)":
            with self.assertRaisesRegex(ValueError, "must be a regular expression", msg=repr(text)):
                vaurien.check_match(text)
        self.assertTrue(vaurien.check_match("^SELECT .* FROM carts").search(b"SELECT 1 FROM carts"))

    def test_through_a_proxy(self):
        with running_proxy(echo) as proxy, connected_client(proxy) as sock:
            with proxy.handler("hang", match="^slow"):
                send_and_read(sock, b"quick")
                sock.sendall(b"slow")
                proxy.wait_for("hang")
            self.assertEqual(read_exactly(sock, 4), b"slow")


class ToxiproxyTestCase(unittest.TestCase):
    """Tests that speak to a control server as Toxiproxy's clients do."""

    def setUp(self):
        self.stack = contextlib.ExitStack()
        self.addCleanup(self.stack.close)
        self.loop = vaurien.Loop()
        thread = threading.Thread(target=self.loop.run, daemon=True)
        thread.start()
        self.proxies = vaurien.ProxyTable(seed=1)
        self.control = vaurien.Control(("127.0.0.1", 0), self.proxies)
        self.control.bind()
        self.port = self.control.listener.sockets[0].getsockname()[1]
        self.loop.run_sync(self.proxies.open, self.loop)
        self.loop.run_sync(self.control.open, self.loop)

        def end():
            self.loop.stop()
            thread.join()
            self.control.close()
            self.proxies.close()
            self.loop.close()
        self.addCleanup(end)

    def ask(self, method, path, body=None, status=200):
        """The JSON of an answer, or its text."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        with contextlib.closing(connection):
            connection.request(method, path, body if isinstance(body, (str, type(None))) else json.dumps(body))
            response = connection.getresponse()
            text = response.read().decode("utf-8")
        self.assertEqual(response.status, status, text)
        self.headers = response.headers
        return json.loads(text) if text[:1] in ("{", "[") else text

    def refused(self, method, path, body, status):
        """The words of an error."""
        found = self.ask(method, path, body, status)
        self.assertEqual(found["status"], status)
        return found["error"]

    def backend(self, talk=echo):
        port, saw = self.stack.enter_context(backend_server(talk))
        return "127.0.0.1:%d" % port, saw

    def create(self, talk=echo, name="p", **fields):
        """A proxy made through the API; its port."""
        upstream, self.saw = self.backend(talk)
        found = self.ask("POST", "/proxies", dict({"name": name, "listen": "127.0.0.1:0", "upstream": upstream}, **fields), 201)
        return int(found["listen"].rpartition(":")[2])

    def connect(self, port):
        return self.stack.enter_context(contextlib.closing(connect(port)))

    def toxic(self, kind, status=200, proxy="p", stream="downstream", attributes=None, **fields):
        return self.ask("POST", "/proxies/%s/toxics" % proxy,
                        dict(fields, type=kind, stream=stream, attributes=attributes or {}), status)

    def begun(self):
        """Wait until the clients that have connected are known to the proxy."""
        proxy = self.proxies["p"]
        wait_until(lambda: proxy.connections and all(
            connection.backend and not connection.connecting for connection in list(proxy.connections.values())))
        return proxy


class TestToxiproxyApi(ToxiproxyTestCase):
    """Status codes, shapes, words and defaults of Toxiproxy 2.12."""

    def test_proxies_come_and_go(self):
        self.assertEqual(self.ask("GET", "/proxies"), {})
        made = self.ask("POST", "/proxies", {"name": "b", "listen": "localhost:0", "upstream": "localhost:6379"}, 201)
        self.assertRegex(made["listen"], r"^127\.0\.0\.1:\d+$")
        self.assertEqual(made, {"name": "b", "listen": made["listen"], "upstream": "localhost:6379", "enabled": True, "toxics": []})
        self.assertEqual(list(made), ["name", "listen", "upstream", "enabled", "toxics"])
        self.assertEqual(self.headers["Content-Type"], "application/json")
        self.assertTrue(self.headers["X-Toxiproxy-Request-Id"])
        self.assertEqual(self.ask("GET", "/proxies/b"), made)
        self.ask("POST", "/proxies", {"name": "a", "upstream": "localhost:1"}, 201)
        self.assertEqual(list(self.ask("GET", "/proxies")), ["a", "b"])
        self.assertEqual(self.ask("DELETE", "/proxies/b", status=204), "")
        self.assertEqual(self.refused("GET", "/proxies/b", None, 404), "proxy not found")
        with self.assertRaises(ConnectionRefusedError):
            connect(int(made["listen"].split(":")[1]))

    def test_what_is_not_given(self):
        made = self.ask("POST", "/proxies", {"name": "a", "upstream": "localhost:1", "listen": None, "enabled": None}, 201)
        self.assertRegex(made["listen"], r"^\[::\]:\d+$")
        self.assertIs(made["enabled"], True)
        made = self.ask("POST", "/proxies", {"NAME": "b", "Upstream": "localhost:1", "listen": "localhost:3310",
                                             "enabled": False, "x": 1}, 201)
        self.assertEqual((made["name"], made["listen"], made["enabled"]), ("b", "localhost:3310", False))

    def test_refusals(self):
        taken = self.stack.enter_context(contextlib.closing(vaurien.bind_listener(socket.AF_INET, ("127.0.0.1", 0))))
        here = "127.0.0.1:%d" % taken.getsockname()[1]
        self.create()
        create = functools.partial(self.refused, "POST", "/proxies")
        for body, status, words in [
                ("", 400, "bad request body: EOF"),
                ('{"name": "x', 400, "bad request body: unexpected EOF"),
                ('{"name": "x",', 400, "bad request body: unexpected EOF"),
                ("nope", 400, "bad request body: invalid JSON"),
                ("[]", 400, "bad request body: json: cannot unmarshal array into Go value of type toxiproxy.Proxy"),
                ('{"name": 5}', 400, "bad request body: json: cannot unmarshal number into Go struct field Proxy.name of type string"),
                ('{"name": "x", "enabled": "yes"}', 400,
                 "bad request body: json: cannot unmarshal string into Go struct field Proxy.enabled of type bool"),
                ("{}", 400, "missing required field: name"),
                ('{"name": ""}', 400, "missing required field: name"),
                ('{"name": "x"}', 400, "missing required field: upstream"),
                ({"name": "p", "upstream": "localhost:1", "listen": "localhost:0"}, 409, "proxy already exists"),
                ({"name": "x", "upstream": "localhost:1", "listen": here}, 500,
                 "listen tcp %s: bind: address already in use" % here),
                ({"name": "x", "upstream": "localhost:1", "listen": "local373"}, 500,
                 "listen tcp: address local373: missing port in address"),
                ({"name": "x", "upstream": "localhost:1", "listen": "localhost:99999"}, 500,
                 "listen tcp: address 99999: invalid port"),
                ({"name": "x", "upstream": "https://example.com/a"}, 400,
                 "bad request body: upstream must be HOST:PORT, without a scheme or a path, like example.com:443"),
                ({"name": "x", "listen": "localhost:7", "upstream": "localhost:7"}, 400, "would call itself"),
                ({"name": "a\nb", "upstream": "localhost:1"}, 400, "bad request body: name must be"),
                ({"name": "x" * 10240, "upstream": "localhost:1"}, 400, "bad request body: name must be"),
                ('{"name": "\\ud800", "upstream": "localhost:1"}', 400, "bad request body: name must be"),
                ("[" * 100000, 400, "bad request body")]:
            with self.subTest(body=str(body)[:80]):
                self.assertIn(words, create(body, status))
                self.assertEqual(self.headers["Content-Type"], "text/plain; charset=utf-8")
        self.assertEqual(list(self.ask("GET", "/proxies")), ["p"])

    def test_what_follows_the_first_value_is_ignored(self):
        self.ask("POST", "/proxies", '{"name": "a", "upstream": "localhost:1"} and more', 201)

    def test_methods_and_paths(self):
        self.create()
        for method, path in ("PUT", "/proxies/p"), ("HEAD", "/proxies"), ("DELETE", "/proxies"), ("GET", "/populate"):
            self.assertEqual(self.ask(method, path, status=405), "")
        for path in "/proxies/", "/proxies/p/", "/proxies/p/toxics/", "/nope", "/proxies/p/toxics/t/u":
            self.ask("GET", path, status=404)
        self.assertEqual(self.ask("GET", "/version"), {"version": vaurien.__version__})
        self.assertRegex(vaurien.__version__, r"^([3-9]|2\.([6-9]|\d\d))[.]")     # what clients ask for

    def test_a_browser_is_turned_away(self):
        found = vaurien.handle_request(self.control, "GET", "/proxies", b"", {"User-Agent": "Mozilla/5.0 (X11)"})
        self.assertEqual((found.status, found.text), (403, "User agent not allowed\n"))

    def test_names_with_any_characters_can_be_addressed(self):
        for name in "a b", "a/b", "ü", "100%", "?#":
            self.create(name=name)
            self.assertEqual(self.ask("GET", "/proxies/" + urllib.parse.quote(name, safe=""))["name"], name)

    def test_an_update_that_changes_nothing_leaves_the_connections_alone(self):
        port = self.create()
        sock = self.connect(port)
        send_and_read(sock, b"question")
        upstream = self.ask("GET", "/proxies/p")["upstream"]
        for body in ({}, {"enabled": True}, {"listen": "127.0.0.1:%d" % port, "upstream": upstream, "enabled": None},
                     {"name": "other"}, {"listen": ""}):
            for method in "POST", "PATCH":
                if body != {"listen": ""}:
                    self.assertEqual(self.ask(method, "/proxies/p", body)["name"], "p")
        send_and_read(sock, b"question")

    def test_disabled_and_enabled_it_keeps_its_port_and_its_toxics(self):
        port = self.create()
        self.toxic("latency", attributes={"latency": 1})
        sock = self.connect(port)
        send_and_read(sock, b"question")
        found = self.ask("POST", "/proxies/p", {"enabled": False})
        self.assertEqual((found["enabled"], found["listen"]), (False, "127.0.0.1:%d" % port))
        self.assertEqual(read_until_close(sock), (0, hashlib.sha1().hexdigest(), "eof"))
        with self.assertRaises(ConnectionRefusedError):
            connect(port)
        found = self.ask("PATCH", "/proxies/p", {"enabled": True})
        self.assertEqual((found["listen"], len(found["toxics"])), ("127.0.0.1:%d" % port, 1))
        send_and_read(self.connect(port), b"question")

    def test_localhost_listens_on_both_families_again_when_it_is_enabled_again(self):
        if not has_ipv6():
            self.skipTest("no IPv6")
        port = self.create(listen="localhost:0")
        self.ask("POST", "/proxies/p", {"enabled": False})
        self.ask("POST", "/proxies/p", {"enabled": True})
        with contextlib.closing(connect(port, "::1")) as sock:
            send_and_read(sock, b"question")

    def test_another_upstream_closes_the_connections_and_keeps_the_port(self):
        port = self.create()
        sock = self.connect(port)
        send_and_read(sock, b"question")
        other, _ = self.backend(lambda sock: sock.sendall(b"other"))
        self.ask("POST", "/proxies/p", {"upstream": other})
        self.assertEqual(read_until_close(sock)[0], 0)
        self.assertEqual(read_exactly(self.connect(port), 5), b"other")

    def test_another_port_and_one_that_cannot_be_had(self):
        port = self.create()
        sock = self.connect(port)
        send_and_read(sock, b"question")
        taken = self.stack.enter_context(contextlib.closing(vaurien.bind_listener(socket.AF_INET, ("127.0.0.1", 0))))
        words = self.refused("POST", "/proxies/p", {"listen": "127.0.0.1:%d" % taken.getsockname()[1]}, 500)
        self.assertIn("address already in use", words)
        for body in {"listen": "bad"}, {"listen": "127.0.0.1:99999"}, {"upstream": "bad"}, {"enabled": 5}, {"upstream": "127.0.0.1:%d" % port}:
            self.refused("POST", "/proxies/p", body, 500 if "listen" in body else 400)
        send_and_read(sock, b"question")                 # nothing running was disturbed
        found = self.ask("POST", "/proxies/p", {"listen": "127.0.0.1:0"})
        new = int(found["listen"].split(":")[1])
        self.assertNotEqual(new, port)
        send_and_read(self.connect(new), b"question")
        self.assertEqual(read_until_close(sock)[0], 0)

    def test_the_same_port_on_other_addresses(self):
        port = self.create()
        self.assertEqual(self.ask("POST", "/proxies/p", {"listen": "0.0.0.0:%d" % port})["listen"], "0.0.0.0:%d" % port)
        send_and_read(self.connect(port), b"question")
        sock = self.connect(port)
        send_and_read(sock, b"question")
        again = vaurien.bind_listener(socket.AF_INET, ("127.0.0.1", 0))
        taken = vaurien.CannotListen(OSError(errno.EADDRINUSE, "Address already in use"), ("127.0.0.1", port))
        with mock.patch.object(vaurien, "listen", side_effect=[taken, [again]]):
            self.refused("POST", "/proxies/p", {"listen": "127.0.0.1:%d" % port}, 500)
        send_and_read(self.connect(again.getsockname()[1]), b"question")     # where it was before
        send_and_read(sock, b"question")

    def test_toxics_have_their_defaults(self):
        self.create()
        made = self.ask("POST", "/proxies/p/toxics", {"type": "latency"})
        self.assertEqual(json.dumps(made), json.dumps({
            "attributes": {"latency": 0, "jitter": 0}, "name": "latency_downstream", "type": "latency",
            "stream": "downstream", "toxicity": 1.0}))
        made = self.ask("POST", "/proxies/p/toxics", {
            "type": "latency", "stream": "UPSTREAM", "toxicity": 5, "attributes": {"LATENCY": -5, "jitter": None, "x": 1}})
        self.assertEqual((made["name"], made["stream"], made["toxicity"], made["attributes"]),
                         ("latency_UPSTREAM", "UPSTREAM", 5, {"latency": -5, "jitter": 0}))
        self.toxic("noop", stream="both")
        self.assertEqual([toxic["name"] for toxic in self.ask("GET", "/proxies/p/toxics")],
                         ["latency_UPSTREAM", "latency_downstream", "noop_both"])
        self.assertEqual(self.ask("GET", "/proxies/p")["toxics"], self.ask("GET", "/proxies/p/toxics"))

    def test_every_handler_is_a_toxic(self):
        self.create()
        for kind, function in HANDLERS.items():
            made = self.toxic(kind)
            self.assertEqual((made["type"], made["attributes"]), (kind, vaurien.handler_options(function)))

    def test_a_toxic_is_changed_and_removed(self):
        self.create()
        self.toxic("latency", attributes={"latency": 100, "jitter": 10})
        path = "/proxies/p/toxics/latency_downstream"
        for method, body, found in [
                ("POST", {"attributes": {"latency": 5}}, (5, 10, 1)), ("PATCH", {"toxicity": 0.5}, (5, 10, 0.5)),
                ("PATCH", {"name": "x", "type": "noop", "stream": "upstream", "toxicity": None}, (5, 10, 0.5)),
                ("PATCH", {}, (5, 10, 0.5))]:
            toxic = self.ask(method, path, body)
            self.assertEqual((toxic["attributes"]["latency"], toxic["attributes"]["jitter"], toxic["toxicity"]), found)
            self.assertEqual((toxic["name"], toxic["stream"]), ("latency_downstream", "downstream"))
        self.assertEqual(self.ask("GET", path), toxic)
        self.assertEqual(self.ask("DELETE", path, status=204), "")
        for method in "GET", "DELETE", "POST", "PATCH":
            self.assertEqual(self.refused(method, path, "{}", 404), "toxic not found")
        for method in "GET", "DELETE", "POST", "PATCH":
            self.assertEqual(self.refused(method, path.replace("/p/", "/q/"), "{}", 404), "proxy not found")

    def test_refused_toxics(self):
        self.create()
        self.toxic("latency")
        for body, status, words in [
                ("", 400, "bad request body: EOF"), ("{}", 400, "invalid toxic type"),
                ({"type": "nope"}, 400, "invalid toxic type"), ({"type": "os.system"}, 400, "invalid toxic type"),
                ({"type": "latency", "stream": ""}, 400, "stream was invalid, can be either upstream or downstream"),
                ({"type": "nope", "stream": "x"}, 400, "stream was invalid, can be either upstream or downstream"),
                ({"type": "latency"}, 409, "toxic already exists"),
                ({"type": "latency", "name": "latency_downstream", "stream": "upstream"}, 409, "toxic already exists"),
                ({"type": "slicer", "toxicity": "1"}, 400,
                 "bad request body: json: cannot unmarshal string into Go struct field ToxicWrapper.toxicity of type float64"),
                ({"type": "slicer", "percent": 5, "toxicity": 1}, 400, "percent and toxicity say the same"),
                ({"type": "slicer", "percent": 500}, 400, "percent must be a number from 0 to 100, not 500"),
                ({"type": "slicer", "per": "chunk"}, 400, "per must be one of request, connection, not 'chunk'"),
                ({"type": "slicer", "match": "("}, 400, "match must be a regular expression, not '('"),
                ({"type": "slicer", "times": -1}, 400, "times must be a whole number, 0 or more, not -1"),
                ({"type": "slicer", "attributes": []}, 400, "cannot unmarshal array")]:
            with self.subTest(body):
                self.assertIn(words, self.refused("POST", "/proxies/p/toxics", body, status))
        for kind, attribute, value in [
                ("latency", "latency", "5"), ("latency", "latency", 5.5), ("latency", "latency", 5.0), ("latency", "jitter", True),
                ("bandwidth", "rate", -1), ("slicer", "average_size", -1), ("slicer", "size_variation", -3), ("latency", "latency", 2 ** 63),
                ("bandwidth", "rate", 10 ** 300), ("delay", "sleep", -1), ("delay", "sleep", "2"), ("delay", "before", 1)]:
            with self.subTest(kind=kind, attribute=attribute, value=value):
                words = self.refused("POST", "/proxies/p/toxics", {"type": kind, "name": "x", "attributes": {attribute: value}}, 400)
                self.assertIn("bad request body", words)
                self.assertIn(attribute, words)
        for number in "NaN", "Infinity", "-Infinity", "1e999":
            self.refused("POST", "/proxies/p/toxics", '{"type": "delay", "attributes": {"sleep": %s}}' % number, 400)
            self.refused("POST", "/proxies/p/toxics", '{"type": "noop", "toxicity": %s}' % number, 400)
        self.assertEqual(len(self.ask("GET", "/proxies/p/toxics")), 1)

    def test_a_proxy_with_a_protocol(self):
        def talk(sock):
            while sock.recv(100):
                sock.sendall(b"+PONG\r\n")

        sock = self.connect(self.create(talk, protocol="redis"))
        self.assertEqual(self.ask("GET", "/proxies/p")["protocol"], "redis")
        self.toxic("error", stream="both", per="request", match="bad", attributes={"kind": "OOM"})
        for command, answer in (b"PING\r\n", b"+PONG\r\n"), (b"GET bad\r\n", vaurien.Redis().said("OOM")), (b"PING\r\n", b"+PONG\r\n"):
            sock.sendall(command)
            self.assertEqual(read_exactly(sock, len(answer)), answer)
        for body, words in [({"type": "error", "name": "x", "stream": "both", "attributes": {"kind": "503"}}, "kind must be one of LOADING, BUSY"),
                            ({"type": "error", "name": "x", "stream": "downstream"}, "stream must be both for error")]:
            self.assertIn(words, self.refused("POST", "/proxies/p/toxics", body, 400))
        self.assertIn("protocol must be one of tcp, http", self.refused("POST", "/proxies", {"name": "q", "upstream": "x:1", "protocol": "nope"}, 400))
        self.assertIn("protocol cannot be changed", self.refused("PATCH", "/proxies/p", {"protocol": "http"}, 400))
        self.ask("PATCH", "/proxies/p", {"protocol": "redis"})
        found = self.ask("POST", "/populate", [{"name": "p", "listen": "127.0.0.1:%d" % self.proxies["p"].port,
                                                "upstream": self.ask("GET", "/proxies/p")["upstream"]}], 201)["proxies"][0]
        self.assertNotIn("protocol", found)
        self.assertEqual(read_until_close(sock)[0], 0)

    def test_the_fields_of_a_rule(self):
        self.create()
        made = self.toxic("hang", percent=50, per="request", after=3, times=2, match="^GET")
        self.assertEqual((made["toxicity"], made["per"], made["after"], made["times"], made["match"]), (0.5, "request", 3, 2, "^GET"))
        rule, = self.proxies["p"].rules.armed
        self.assertEqual((rule.draw_max, rule.per, rule.after, rule.times, rule.stream), (50, "request", 3, 2, DOWNSTREAM))

    def test_all_toxics_are_replaced_in_one_call(self):
        self.create()
        self.toxic("latency")
        found = self.ask("PUT", "/proxies/p/toxics", [{"type": "noop", "stream": "both"}, {"type": "latency", "toxicity": 0.5}])
        self.assertEqual([(toxic["type"], toxic["toxicity"]) for toxic in found], [("latency", 0.5), ("noop", 1)])
        for body, words in [
                ([{"type": "noop", "nope": 1}], "nope is not a field of a toxic: they are name, type"),
                ([{"type": "latency", "attributes": {"latence": 1}}], "latence is not an attribute of latency: it has jitter, latency"),
                ({}, "cannot unmarshal object"), ([5], "cannot unmarshal number"), ("[] x", "bad request body"),
                ([{"type": "noop"}, {"type": "nope"}], "invalid toxic type: 'nope': there are dummy, delay"),
                ([{"type": "noop", "toxicity": 7}], "toxicity must be a number from 0 to 1, not 7"), ([{"TYPE": "noop"}], "invalid toxic type"),
                ([{"type": "latency", "attributes": {"latency": -5}}], "latency must be a whole number, 0 or more, not -5")]:
            self.assertIn(words, self.refused("PUT", "/proxies/p/toxics", body, 400))
        self.refused("PUT", "/proxies/p/toxics", [{"type": "noop"}, {"type": "noop"}], 409)
        self.assertEqual(self.ask("GET", "/proxies/p/toxics"), found)
        self.assertEqual(self.ask("PUT", "/proxies/p/toxics", []), [])
        self.refused("PUT", "/proxies/q/toxics", [], 404)

    def test_toxics_that_are_there_already_stay_as_they_are(self):
        sock = self.connect(self.create())
        same = [{"type": "latency", "attributes": {"latency": 3600000}}, {"type": "limit_data", "attributes": {"bytes": 10}}]
        self.ask("PUT", "/proxies/p/toxics", same)
        sock.sendall(b"question")
        proxy = self.begun()
        connection, = proxy.connections.values()
        wait_until(lambda: proxy.loop.run_sync(connection.down.next_due) < NEVER)
        due = proxy.loop.run_sync(connection.down.next_due)
        upstream = self.ask("GET", "/proxies/p")["upstream"]
        self.ask("PUT", "/proxies/p/toxics", same + [{"type": "noop"}])
        self.ask("POST", "/populate", [{"name": "p", "listen": "127.0.0.1:%d" % proxy.port, "upstream": upstream, "toxics": same}], 201)
        self.ask("PATCH", "/proxies/p/toxics/latency_downstream", {})
        self.assertEqual(proxy.loop.run_sync(connection.down.next_due), due)
        same[0]["attributes"]["latency"] = 1
        self.ask("PUT", "/proxies/p/toxics", same)
        self.assertEqual(read_exactly(sock, 8), b"question")
        sock.sendall(b"question")
        self.assertEqual(read_until_close(sock)[0], 2)          # limit_data has kept its count
        for body, words in [({"percent": 500}, "percent must be"), ({"percent": 5, "toxicity": 1}, "say the same"), ({"match": "("}, "match must"),
                            ({"after": 3}, "after cannot be changed")]:
            self.assertIn(words, self.refused("PATCH", "/proxies/p/toxics/latency_downstream", body, 400))
        self.assertEqual(self.ask("PATCH", "/proxies/p/toxics/latency_downstream", {"percent": 50})["toxicity"], 0.5)

    def test_handlers_of_our_own_are_toxics_of_both_streams(self):
        sock = self.connect(self.create())
        for kind, attributes in ("delay", {"sleep": 0.02}), ("delay", {"sleep": 0.02, "before": False}):
            for stream in None, "upstream", "downstream":
                made = self.ask("POST", "/proxies/p/toxics", {"type": kind, "stream": stream, "attributes": attributes})
                self.assertEqual(made["stream"], stream or "both")
                for _ in range(3):                  # each request, one delay
                    began = time.monotonic()
                    send_and_read(sock, b"question")
                    self.assertGreaterEqual(time.monotonic() - began, 0.02)
                self.ask("DELETE", "/proxies/p/toxics/delay_%s" % (stream or "both"), status=204)
        for stream in None, "downstream":
            made = self.ask("POST", "/proxies/p/toxics", {"type": "error", "stream": stream})
            for _ in range(3):
                sock.sendall(b"question")
                self.assertNotIn(b"question", read_exactly(sock, 1000))
            self.ask("DELETE", "/proxies/p/toxics/" + made["name"], status=204)
        for kind in "error", "transient", "abort":
            words = self.refused("POST", "/proxies/p/toxics", {"type": kind, "stream": "upstream"}, 400)
            self.assertIn("stream must be both or downstream for %s" % kind, words)

    def test_the_proxy_called_proxy(self):
        self.create()
        self.refused("DELETE", "/proxies/PROXY", None, 404)

    def test_a_body_in_chunks(self):
        head = b"POST /proxies HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
        for chunks, status in [(b'5\r\n{"nam\r\n1e;x=y\r\ne": "a", "upstream": "x:1"}   \r\n0\r\nX: y\r\n\r\n', b"201"),
                               (b"x\r\n", b"400"), (b"-1\r\n", b"400"), (b"2\r\nabcd", b"400"), (b"fffffff\r\n", b"413")]:
            with contextlib.closing(connect(self.port)) as sock:
                sock.sendall(head + chunks)
                self.assertEqual(sock.recv(65536)[9:12], status, chunks)

    def test_toxics_are_on_a_proxy_before_anybody_can_come(self):
        port = self.create(toxics=[{"type": "limit_data", "attributes": {"bytes": 0}}, {"type": "noop", "stream": "upstream"}])
        sock = self.connect(port)
        sock.sendall(b"question")
        self.assertEqual(read_until_close(sock)[0], 0)
        self.assertEqual(len(self.ask("GET", "/proxies/p")["toxics"]), 2)
        for toxics, status in ([{"type": "nope"}], 400), ([{"type": "noop"}, {"type": "noop"}], 409), (5, 400):
            self.refused("POST", "/proxies", {"name": "q", "upstream": "localhost:1", "toxics": toxics}, status)
        self.refused("GET", "/proxies/q", None, 404)

    def test_populate(self):
        one, two = ({"name": name, "listen": "127.0.0.1:0", "upstream": "localhost:%d" % port}
                    for name, port in (("one", 1), ("two", 2)))
        self.assertEqual(self.ask("POST", "/populate", "[]", 201), {"proxies": None})
        found = self.ask("POST", "/populate", [one, dict(two, enabled=False, toxics=[{"type": "noop"}])], 201)["proxies"]
        self.assertEqual([(proxy["name"], proxy["enabled"], len(proxy["toxics"])) for proxy in found], [("one", True, 0), ("two", False, 1)])
        self.assertEqual(list(self.ask("GET", "/proxies")), ["one", "two"])
        for body, words in [
                ([one, {"name": ""}], "missing required field: name at proxy 2"), ([{"name": "x"}], "missing required field: upstream at proxy 1"),
                ([dict(one, name="x"), dict(two, name="y", toxics=[{"type": "nope"}])], "invalid toxic type"),
                ([dict(one, name="x"), dict(one, name="x")], "duplicate proxy name 'x' at proxy 2"),
                ("{}", "cannot unmarshal object"), ("", "bad request body: EOF")]:
            found = self.ask("POST", "/populate", body, 400)
            self.assertIn(words, found["error"])
            self.assertEqual((found["status"], found["proxies"], self.headers["Content-Type"]), (400, None, "application/json"))
        self.assertEqual(list(self.ask("GET", "/proxies")), ["one", "two"])

    def test_populate_stops_at_the_first_port_that_cannot_be_had(self):
        taken = self.stack.enter_context(contextlib.closing(vaurien.bind_listener(socket.AF_INET, ("127.0.0.1", 0))))
        bodies = [{"name": name, "listen": listen, "upstream": "localhost:1"} for name, listen in [
            ("a", "127.0.0.1:0"), ("b", "127.0.0.1:%d" % taken.getsockname()[1]), ("c", "127.0.0.1:0")]]
        found = self.ask("POST", "/populate", bodies, 500)
        self.assertIn("address already in use", found["error"])
        self.assertEqual([proxy["name"] for proxy in found["proxies"]], ["a"])
        self.assertEqual(list(self.ask("GET", "/proxies")), ["a"])

    def test_populate_leaves_an_unchanged_proxy_alone(self):
        port = self.create()
        upstream = self.ask("GET", "/proxies/p")["upstream"]
        self.toxic("noop")
        sock = self.connect(port)
        send_and_read(sock, b"question")
        same = {"name": "p", "listen": "127.0.0.1:%d" % port, "upstream": upstream}
        for body, toxics in (same, 1), (dict(same, enabled=False, toxics=None), 1), (dict(same, toxics=[]), 0):
            found = self.ask("POST", "/populate", [body], 201)["proxies"][0]
            self.assertEqual((found["enabled"], len(found["toxics"])), (True, toxics))
            send_and_read(sock, b"question")
        self.toxic("noop")
        other, _ = self.backend()
        found = self.ask("POST", "/populate", [dict(same, upstream=other)], 201)["proxies"][0]
        self.assertEqual((found["upstream"], found["toxics"]), (other, []))
        self.assertEqual(read_until_close(sock)[0], 0)

    def test_reset(self):
        port = self.create()
        self.create(name="q")
        self.toxic("noop")
        sock = self.connect(port)
        send_and_read(sock, b"question")
        self.ask("POST", "/proxies/q", {"enabled": False})
        self.assertEqual(self.ask("POST", "/reset", status=204), "")
        self.assertEqual([(proxy["enabled"], proxy["toxics"]) for proxy in self.ask("GET", "/proxies").values()], [(True, [])] * 2)
        send_and_read(sock, b"question")

    def test_the_handler_of_the_first_proxy_beside_its_toxics(self):
        self.assertIn("there are none yet", self.ask("GET", "/handler", status=400)["errors"][0]["description"])
        self.create()
        self.toxic("latency")
        self.assertEqual(self.ask("GET", "/handler"), "dummy")
        self.assertEqual(self.ask("POST", "/handler", "delay"), "ok")
        self.assertEqual([rule["name"] for rule in self.ask("GET", "/rules")["rules"]], ["delay"])
        self.assertEqual(self.proxies["p"].describe(), "100:delay sleep=1.0, toxic latency_downstream (100:downstream latency latency=0 jitter=0)")
        self.assertEqual(self.ask("POST", "/handler", "dummy"), "ok")
        self.assertEqual(len(self.ask("GET", "/proxies/p/toxics")), 1)

    def test_events_and_connections_of_a_proxy(self):
        self.create(name="q")
        sock = self.connect(self.create())
        self.toxic("delay", stream="both", attributes={"sleep": 0.001})
        send_and_read(sock, b"question")
        event = self.ask("GET", "/proxies/p/events?since=0")["events"][0]
        self.assertEqual((event["handler"], event["proxy"]), ("delay", "p"))
        self.assertEqual(self.ask("GET", "/proxies/q/events")["events"], [])
        self.assertEqual(len(self.ask("GET", "/proxies/p/connections")["connections"]), 1)
        self.ask("GET", "/proxies/nope/events", status=404)

    def test_metrics_move_while_a_connection_lives(self):
        sock = self.connect(self.create(name='p"\\'))
        send_and_read(sock, b"question")
        sample = re.compile(r'^(\w+)\{((?:\w+="(?:[^"\\]|\\.)*",?)*)\} (\d+)$')
        found = {}
        for line in self.ask("GET", "/metrics").splitlines():
            if not line.startswith("# "):
                name, labels, value = sample.match(line).groups()
                found[name, tuple(re.findall(r'direction="(\w+)"', labels))] = int(value)
        self.assertEqual(found["toxiproxy_proxy_received_bytes_total", ("upstream",)], 8)
        self.assertEqual(found["toxiproxy_proxy_sent_bytes_total", ("downstream",)], 8)
        self.assertEqual(found["vaurien_connections_open", ()], 1)
        self.assertEqual(found["vaurien_requests_total", ()], 1)
        self.assertIn('{direction="upstream",listener="127.0.0.1:', self.ask("GET", "/metrics"))

    def test_bytes_are_counted_on_both_roads_and_stay_when_a_connection_ends(self):
        port = self.create()
        for toxics in [], [{"type": "slicer", "attributes": {"average_size": 1000}}], [{"type": "latency", "attributes": {"latency": 1}}]:
            self.ask("PUT", "/proxies/p/toxics", toxics)
            with contextlib.closing(connect(port)) as sock:
                self.assertEqual(round_trip(sock, random_data(300000))[0], 300000)
        wait_until(lambda: not self.proxies["p"].connections)
        self.assertEqual(self.proxies["p"].byte_counts(), {(way, what): 900000 for way in (UPSTREAM, DOWNSTREAM) for what in ("received", "sent")})

    def test_what_is_lost_is_received_and_not_sent(self):
        sock = self.connect(self.create())
        self.toxic("timeout")
        sock.sendall(b"question")
        proxy = self.proxies["p"]
        wait_until(lambda: proxy.loop.run_sync(proxy.byte_counts)[DOWNSTREAM, "received"] == 8)
        self.assertEqual(proxy.loop.run_sync(proxy.byte_counts)[DOWNSTREAM, "sent"], 0)

    def test_statsd(self):
        with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as server, \
                mock.patch.object(vaurien, "STATSD_INTERVAL", 0.1):
            server.bind(("127.0.0.1", 0))
            server.settimeout(PATIENCE)
            sock = self.connect(self.create(name="my.proxy"))
            self.toxic("noop", proxy="my.proxy")
            self.toxic("delay", proxy="my.proxy", stream="both", attributes={"sleep": 0.001})
            send_and_read(sock, b"question")
            statsd = vaurien.Statsd(server.getsockname(), self.proxies)
            self.loop.run_sync(statsd.open, self.loop)
            lines = server.recv(65536).decode().split("\n")
            for line in ("vaurien.my_proxy.connections:1|c", "vaurien.my_proxy.connections_open:1|g", "vaurien.my_proxy.requests:1|c",
                         "vaurien.my_proxy.faults.delay:1|c", "vaurien.my_proxy.received_bytes.upstream:8|c"):
                self.assertIn(line, lines)
            send_and_read(sock, b"question")
            lines = []
            while "vaurien.my_proxy.requests:1|c" not in lines:
                lines = server.recv(65536).decode().split("\n")
                self.assertNotIn("vaurien.my_proxy.connections:1|c", lines)
            self.loop.run_sync(statsd.close)

    def test_a_statsd_packet_is_not_cut_on_its_way(self):
        class Sock:
            sent = []

            def send(self, packet):
                self.sent.append(packet)

        for number in range(40):
            self.ask("POST", "/proxies", {"name": "p%d" % number + "x" * 100, "upstream": "localhost:1", "enabled": False}, 201)
        statsd = vaurien.Statsd(("localhost", 1), self.proxies)
        statsd.sock = Sock()
        statsd.send()
        self.assertLessEqual(max(map(len, Sock.sent)), vaurien.STATSD_PACKET_MAX)
        self.assertEqual(sum(packet.count(b"connections_open") for packet in Sock.sent), 40)


class TestDefects(ToxiproxyTestCase):
    """What Toxiproxy 2.12 gets wrong, a test for each: see its issues by these numbers."""

    QUIET = [("latency", {"latency": 5, "jitter": 3}), ("bandwidth", {"rate": 100000}), ("slow_close", {"delay": 5}),
             ("slicer", {"average_size": 100, "size_variation": 50}), ("limit_data", {"bytes": 10 ** 9}), ("noop", {}), ("delay", {"sleep": 0.001})]

    def test_half_close_survives_every_toxic(self):
        """The original closes a connection whole at the first EOF, and loses the answer."""
        def talk(sock):
            size, digest, end = read_until_close(sock)
            sock.sendall(("%d %s %s" % (size, digest, end)).encode())
            return end

        port = self.create(talk)
        data = random_data(20000)
        for stream in "upstream", "downstream", "both":
            for kind, attributes in self.QUIET:
                with self.subTest(kind, stream=stream):
                    self.ask("PUT", "/proxies/p/toxics", [{"type": kind, "stream": stream, "attributes": attributes}])
                    sock = self.connect(port)
                    sock.sendall(data)
                    sock.shutdown(socket.SHUT_WR)
                    answer = b"20000 %s eof" % hashlib.sha1(data).hexdigest().encode()
                    self.assertEqual(read_until_close(sock), (len(answer), hashlib.sha1(answer).hexdigest(), "eof"))

    def test_half_close_survives_the_timeout_of_the_other_stream(self):
        sock = self.connect(self.create(lambda sock: read_until_close(sock)[2]))
        self.toxic("timeout", stream="downstream")
        sock.shutdown(socket.SHUT_WR)
        wait_until(lambda: self.saw)
        self.assertEqual(self.saw, ["eof"])

    def test_reset_peer_resets_connections_that_are_open_already(self):
        """The original sends them FIN: it sets linger only when a connection begins."""
        sock = self.connect(self.create(lambda sock: echo(sock) or read_until_close(sock)))
        send_and_read(sock, b"question")
        self.toxic("reset_peer")
        sock.sendall(b"question")
        self.assertEqual(read_until_close(sock)[2], "reset")

    def test_reset_peer_resets_both_sides(self):
        ends = []

        def talk(sock):
            sock.sendall(b"hello")
            ends.append(read_until_close(sock)[2])

        port = self.create(talk, toxics=[{"type": "reset_peer"}])
        try:
            ending = read_until_close(self.connect(port))[2]
        except ConnectionResetError:    # before connect() has returned
            ending = "reset"
        self.assertEqual(ending, "reset")
        wait_until(lambda: ends)
        self.assertEqual(ends, ["reset"])

    def test_toxicity_0_is_as_if_absent(self):
        """#603: a reset_peer of toxicity 0 still resets normal closes."""
        toxics = [{"type": kind, "toxicity": 0, "stream": "both"} for kind in HANDLERS]
        port = self.create(lambda sock: echo(sock), toxics=toxics)
        sock = self.connect(port)
        send_and_read(sock, b"question")
        sock.shutdown(socket.SHUT_WR)
        self.assertEqual(read_until_close(sock)[2], "eof")
        self.assertFalse(self.proxies["p"].faults)

    def test_adding_or_changing_one_neither_releases_nor_delays_what_another_holds(self):
        """In the original, adding B wakes A up, which lets go of its chunk and draws anew."""
        sock = self.connect(self.create())
        hour = 3600000
        self.toxic("latency", name="a", attributes={"latency": hour})
        sock.sendall(b"question")
        proxy = self.begun()
        connection, = proxy.connections.values()
        wait_until(lambda: proxy.loop.run_sync(connection.down.next_due) < NEVER)
        due = proxy.loop.run_sync(connection.down.next_due)
        for method, path, body in [
                ("POST", "", {"type": "latency", "name": "b", "attributes": {"latency": 5}}), ("POST", "/b", {"attributes": {"latency": 9}}),
                ("PATCH", "/b", {"toxicity": 0}), ("POST", "", {"type": "bandwidth"}), ("DELETE", "/b", None)]:
            self.ask(method, "/proxies/p/toxics" + path, body, 204 if method == "DELETE" else 200)
            self.assertEqual(proxy.loop.run_sync(connection.down.next_due), due)
        self.ask("DELETE", "/proxies/p/toxics/a", status=204)
        self.assertEqual(read_exactly(sock, 8), b"question")

    def test_a_change_keeps_the_draw_of_a_connection(self):
        port = self.create(toxics=[{"type": "hang", "toxicity": 0.5, "stream": "upstream"}])
        proxy = self.proxies["p"]
        socks = [self.connect(port) for _ in range(20)]
        wait_until(lambda: len(proxy.connections) == 20)

        def drawn():
            return proxy.loop.run_sync(lambda: {number for number, connection in proxy.connections.items() if connection.line.active})
        before = drawn()
        self.assertTrue(2 < len(before) < 18)
        self.ask("POST", "/proxies/p/toxics/hang_upstream", {})
        self.toxic("noop", toxicity=0)
        self.assertEqual(drawn(), before)
        self.ask("POST", "/proxies/p/toxics/hang_upstream", {"toxicity": 1})
        self.assertEqual(len(drawn()), 20)
        self.ask("POST", "/proxies/p/toxics/hang_upstream", {"toxicity": 0.5})
        self.assertEqual(drawn(), before)
        self.assertEqual(len(socks), 20)

    def test_a_connection_that_was_left_alone_stays_so(self):
        """`after` is counted when a connection comes, and not anew by each change."""
        port = self.create(toxics=[{"type": "limit_data", "after": 1, "attributes": {"bytes": 0}}])
        first = self.connect(port)
        send_and_read(first, b"question")
        second = self.connect(port)
        second.sendall(b"question")
        self.assertEqual(read_until_close(second)[0], 0)
        for body in {"attributes": {"bytes": 1}}, {"toxicity": 0}, {"toxicity": 1}:
            self.ask("PATCH", "/proxies/p/toxics/limit_data_downstream", body)
        send_and_read(first, b"question")

    def test_a_fault_has_not_acted_where_nobody_has_spoken(self):
        port = self.create(toxics=[{"type": "delay", "stream": "downstream"}])
        sock = self.connect(port)
        self.begun()
        self.assertEqual(self.ask("GET", "/proxies/p/events")["events"], [])
        sock.close()

    def test_a_bug_resets_though_others_hold(self):
        def bad(state, t, to, data):
            raise KeyError("no idea")
            yield

        with registered(bad):
            sock = self.connect(self.create())
            send_and_read(sock, b"question")
            self.ask("PUT", "/proxies/p/toxics", [{"type": "bad"}, {"type": "hang"}])
            self.assertEqual(read_until_close(sock)[2], "reset")

    def test_a_changed_toxic_lets_go_of_what_it_holds(self):
        sock = self.connect(self.create())
        self.toxic("latency", attributes={"latency": 3600000})
        sock.sendall(b"question")
        proxy = self.begun()
        connection, = proxy.connections.values()
        wait_until(lambda: proxy.loop.run_sync(connection.down.next_due) < NEVER)
        self.ask("PATCH", "/proxies/p/toxics/latency_downstream", {"attributes": {"latency": 1}})
        self.assertEqual(read_exactly(sock, 8), b"question")
        send_and_read(sock, b"question")

    def test_a_thin_wire_that_is_made_thicker_is_free(self):
        sock = self.connect(self.create())
        self.toxic("bandwidth", attributes={"rate": 1})
        sock.sendall(bytes(100000))                 # 100 seconds of it
        proxy = self.begun()
        connection, = proxy.connections.values()
        wait_until(lambda: proxy.loop.run_sync(lambda: connection.down.received) > 0)
        self.ask("PATCH", "/proxies/p/toxics/bandwidth_downstream", {"attributes": {"rate": 1000000}})
        self.assertEqual(read_exactly(sock, 100000), bytes(100000))
        send_and_read(sock, b"question")

    def test_timeout_changed_is_still_counted_from_its_beginning(self):
        sock = self.connect(self.create())
        send_and_read(sock, b"question")
        self.toxic("timeout", attributes={"timeout": 3600000})
        proxy = self.begun()
        connection, = proxy.connections.values()
        first = proxy.loop.run_sync(connection.down.next_due)
        self.ask("PATCH", "/proxies/p/toxics/timeout_downstream", {"attributes": {"timeout": 7200000}})
        self.assertAlmostEqual(proxy.loop.run_sync(connection.down.next_due), first + 3600, places=3)
        self.assertEqual(len(proxy.loop.run_sync(lambda: list(proxy.connections))), 1)
        self.ask("PATCH", "/proxies/p/toxics/timeout_downstream", {"attributes": {"timeout": 1}})
        self.assertEqual(read_until_close(sock)[0], 0)

    def test_timeout_closes_a_connection_that_is_open_and_idle(self):
        sock = self.connect(self.create())
        send_and_read(sock, b"question")
        began = time.monotonic()
        self.toxic("timeout", attributes={"timeout": 100})
        self.assertEqual(read_until_close(sock)[0::2], (0, "eof"))
        self.assertGreaterEqual(time.monotonic() - began, 0.1)

    def test_timeout_closes_a_new_connection_where_nobody_speaks(self):
        port = self.create(toxics=[{"type": "timeout", "attributes": {"timeout": 100}}])
        began = time.monotonic()
        self.assertEqual(read_until_close(self.connect(port))[0::2], (0, "eof"))
        self.assertGreaterEqual(time.monotonic() - began, 0.1)

    def test_timeout_removed_closes_the_connection(self):
        sock = self.connect(self.create())
        self.toxic("timeout")
        sock.sendall(b"question")
        self.begun()
        self.ask("DELETE", "/proxies/p/toxics/timeout_downstream", status=204)
        self.assertEqual(read_until_close(sock)[0], 0)

    def test_limit_data_goes_on_counting_when_it_is_changed(self):
        sock = self.connect(self.create())
        self.toxic("limit_data", attributes={"bytes": 10})
        send_and_read(sock, b"question")
        self.ask("PATCH", "/proxies/p/toxics/limit_data_downstream", {"attributes": {"bytes": 12}})
        sock.sendall(b"question")
        self.assertEqual(read_until_close(sock)[0], 4)

    def test_removal_returns_while_the_peer_does_not_read(self):
        """#88, #159, #210, #412, #500, #558: the API hangs, 25 s and for ever."""
        def talk(sock):
            with contextlib.suppress(OSError):
                sock.sendall(bytes(50000000))

        for kind, attributes in [("latency", {"latency": 3600000}), ("bandwidth", {"rate": 1}), ("slicer", {"average_size": 1, "delay": 10 ** 6}),
                                 ("bandwidth", {}), ("slow_close", {"delay": 3600000}), ("timeout", {}), ("hang", {})]:
            with self.subTest(kind):
                port = self.create(talk)
                sock = self.connect(port)
                self.toxic(kind, attributes=attributes)
                proxy = self.begun()
                connection, = proxy.connections.values()
                wait_until(lambda: proxy.loop.run_sync(lambda: connection.down.received) > 0)
                self.ask("PATCH", "/proxies/p/toxics/%s_downstream" % kind, {"toxicity": 1})
                self.ask("DELETE", "/proxies/p/toxics/%s_downstream" % kind, status=204)
                self.ask("DELETE", "/proxies/p", status=204)
                sock.close()

    def test_removal_returns_while_the_peer_is_dead_or_a_delay_is_long(self):
        """A reset_peer is removed after its timeout, in the original."""
        port = self.create()
        for kind, attributes in ("latency", {"latency": 3600000}), ("reset_peer", {"timeout": 3600000}), ("slow_close", {"delay": 3600000}):
            self.toxic(kind, attributes=attributes)
            sock = connect(port)
            sock.sendall(b"question")
            proxy = self.begun()
            connection, = proxy.connections.values()
            wait_until(lambda: proxy.loop.run_sync(lambda: connection.down.received) > 0)
            close_with_reset(sock)
            self.ask("DELETE", "/proxies/p/toxics/%s_downstream" % kind, status=204)
            wait_until(lambda: not proxy.connections)

    def test_what_crashes_the_original_is_harmless_or_refused(self):
        """#178, #541, #770, and a bandwidth of rate -1."""
        port = self.create()
        for kind, attributes in [
                ("slicer", {}), ("slicer", {"average_size": 5, "size_variation": 5}), ("slicer", {"average_size": 1, "size_variation": 2 ** 62}),
                ("slicer", {"average_size": 2 ** 62}), ("latency", {"latency": -5, "jitter": -5}), ("latency", {"jitter": 3}),
                ("bandwidth", {"rate": 2 ** 63 - 1}), ("limit_data", {"bytes": 2 ** 63 - 1}), ("slow_close", {"delay": -1})]:
            self.ask("PUT", "/proxies/p/toxics", [])
            self.toxic(kind, stream="both", attributes=attributes)
            with contextlib.closing(connect(port)) as sock:
                send_and_read(sock, b"a question of more than one byte")
        with self.assertLogs("vaurien", "INFO"):        # nothing of it was a bug
            self.ask("PUT", "/proxies/p/toxics", [])

    def test_a_dead_upstream_holds_up_nobody_else(self):
        """The original calls the backend in its accept loop, without a time-out."""
        with silent_address() as hole:
            found = self.ask("POST", "/proxies", {"name": "dead", "listen": "127.0.0.1:0", "upstream": "127.0.0.1:%d" % hole}, 201)
            dead = [self.connect(int(found["listen"].split(":")[1])) for _ in range(100)]
            send_and_read(self.connect(self.create()), b"question")
            wait_until(lambda: len(self.proxies["dead"].connections) == 100)
            self.assertEqual(len(dead), 100)
            self.ask("DELETE", "/proxies/dead", status=204)

    def test_the_seed_is_honoured(self):
        """-seed has no effect in the original."""
        runs = []
        for _ in range(2):
            port = self.create(toxics=[{"type": "limit_data", "toxicity": 0.5, "attributes": {"bytes": 0}}])
            run = []
            for _ in range(30):
                with contextlib.closing(connect(port)) as sock:
                    sock.sendall(b"question")
                    run.append(sock.recv(8))
            runs.append(run)
            self.ask("DELETE", "/proxies/p", status=204)
        self.assertEqual(runs[0], runs[1])
        self.assertEqual(set(runs[0]), {b"", b"question"})

    def test_a_name_that_is_taken_leaks_nothing(self):
        """#69: the port of a proxy that is refused stays taken."""
        self.create()
        port = unused_port()
        self.refused("POST", "/proxies", {"name": "p", "listen": "127.0.0.1:%d" % port, "upstream": "localhost:1"}, 409)
        self.ask("POST", "/proxies", {"name": "q", "listen": "127.0.0.1:%d" % port, "upstream": "localhost:1"}, 201)

    def test_a_thin_wire_is_felt_by_the_sender_and_a_long_one_is_not(self):
        def pour(sock):
            sock.settimeout(PATIENCE)
            with contextlib.suppress(OSError):
                sock.sendall(bytes(12 << 20))
            return sock.recv(1)

        for toxics, least, most in [([("bandwidth", {"rate": 1})], 0, 2 << 20), ([("latency", {"latency": 3600000})], 8 << 20, 17 << 20)]:
            port = self.create(pour, toxics=[{"type": kind, "attributes": attributes} for kind, attributes in toxics])
            sock = self.connect(port)
            proxy = self.begun()
            connection, = proxy.connections.values()
            wait_until(lambda: proxy.loop.run_sync(lambda: connection.down.watched) == 0
                       or proxy.loop.run_sync(lambda: connection.down.received) == 12 << 20)
            self.assertTrue(least <= connection.down.received <= most, connection.down.received)
            self.ask("DELETE", "/proxies/p", status=204)
            sock.close()


class TestClient(unittest.TestCase):

    def test_both_words_for_it(self):
        with proxy_with_control() as (proxy, client):
            self.assertEqual(client.list_handlers(), list(HANDLERS))
            client.set_behavior("delay", sleep=2)
            self.assertEqual((client.get_behavior(), client.get_handler()), ("delay", "delay"))
            self.assertEqual(proxy.describe(), "100:delay sleep=2.0")

    def test_with_handler_puts_back_exactly_what_was_there(self):
        before = "20:delay sleep=2.0 before=no, 5:hang, 75:dummy"
        with proxy_with_control(behavior="20:delay,5:hang",
                    options={"delay": {"sleep": 2, "before": False}}) as (proxy, client):
            with client.with_handler("error", inject=True, percent=30):
                self.assertEqual(proxy.describe(), "30:error inject=yes warmup=0, 70:dummy")
                with client.with_behavior("blackout"):
                    self.assertEqual(client.get_handler(), "blackout")
                self.assertEqual(client.get_handler(), "error")
            self.assertEqual(proxy.describe(), before)
            with self.assertRaises(KeyError), client.with_handler("blackout"):
                raise KeyError
            self.assertEqual(proxy.describe(), before)

    def test_a_refusal_is_a_value_error_with_the_servers_words(self):
        with proxy_with_control() as (_, client):
            with self.assertRaisesRegex(ValueError, "unknown handler 'nope': there are abort"):
                client.set_handler("nope")
            with self.assertRaisesRegex(ValueError, "sleep must be a number, 0 or more, not 'x'"):
                client.set_handler("delay", sleep="x")
            with self.assertRaisesRegex(ValueError, "there is no proxy 'x'"):
                vaurien.Client("127.0.0.1", client.port, proxy="x").get_handler()
            with self.assertRaisesRegex(ValueError, "scheme must be"):
                vaurien.Client("127.0.0.1", client.port, "ftp").get_handler()

    def test_no_server_is_an_os_error(self):
        with self.assertRaises(OSError):
            vaurien.Client("127.0.0.1", unused_port()).get_handler()
        with backend_server(lambda sock: sock.sendall(b"220 smtp\r\n\r\n")) as (port, _):
            with self.assertRaises(OSError):
                vaurien.Client("127.0.0.1", port).get_handler()


class TestInProcess(unittest.TestCase):

    def test_a_handler_for_the_time_of_a_block(self):
        with running_proxy(echo, "5:hang") as proxy:
            before = list(proxy.rules.armed)
            with proxy.handler("delay", sleep=2, percent=20, per="connection"):
                self.assertEqual(proxy.describe(), "20:delay sleep=2.0, 80:dummy")
            self.assertEqual(proxy.rules.armed, before)
            with self.assertRaises(KeyError), proxy.handler("error"):
                raise KeyError
            self.assertEqual(proxy.rules.armed, before)
            with self.assertRaisesRegex(ValueError, "unknown handler 'nope'"):
                with proxy.handler("nope"):
                    pass
            with self.assertRaisesRegex(ValueError, "dely is not an option of delay"):
                with proxy.handler("delay", dely=1):
                    pass

    def test_so_many_times_after_so_many_requests(self):
        with running_proxy(echo) as proxy, connected_client(proxy) as sock:
            send_and_read(sock, b"question")
            failed = []
            with proxy.handler("error", times=2, after=3):
                for _ in range(8):
                    sock.sendall(b"question")
                    answer = read_exactly(sock, 8)
                    failed.append(answer != b"question")
                    if failed[-1]:
                        read_exactly(sock, 992)
            self.assertEqual(failed, [False] * 3 + [True] * 2 + [False] * 3)

    def test_a_connection_that_says_nothing_does_not_use_up_the_times(self):
        with running_proxy(echo) as proxy, contextlib.ExitStack() as stack:
            idle = [stack.enter_context(connected_client(proxy)) for _ in range(3)]
            wait_until(lambda: len(proxy.connections) == 3)
            with proxy.handler("error", times=1, after=1):
                idle[0].close()
                wait_until(lambda: len(proxy.connections) == 2)
                send_and_read(idle[1], b"question")
                idle[2].sendall(b"question")
                self.assertNotIn(b"question", read_exactly(idle[2], 1000))
                send_and_read(idle[1], b"question")
            self.assertEqual(proxy.faults, {"error": 1})

    def test_blocks_that_end_in_another_order(self):
        with running_proxy(echo) as proxy:
            one, two = proxy.handler("hang"), proxy.handler("delay")
            one.__enter__()
            two.__enter__()
            one.__exit__(None, None, None)
            self.assertEqual(proxy.handler_names(), "delay")
            two.__exit__(None, None, None)
            self.assertEqual(proxy.handler_names(), "dummy")

    def test_what_is_set_within_a_block_stays(self):
        with proxy_with_control() as (proxy, client):
            with proxy.handler("hang"):
                client.set_handler("delay")
            self.assertEqual(proxy.handler_names(), "delay")
            with proxy.handler("hang"):
                pass
            self.assertEqual(proxy.handler_names(), "delay")

    def test_options_of_handlers_that_are_not_there(self):
        for options in {"dlay": {"sleep": 1}}, {"delay": {"slep": 1}}, {"delay": {"sleep": "x"}}:
            with self.assertRaises(ValueError):
                vaurien.Proxy("localhost:9", options=options)

    def test_wait_for_a_fault(self):
        with running_proxy(echo) as proxy, connected_client(proxy) as sock:
            with proxy.handler("delay", sleep=0.001):
                with self.assertRaisesRegex(TimeoutError, "delay has not acted in 0.01 seconds"):
                    proxy.wait_for("delay", timeout=0.01)
                thread = threading.Thread(target=send_and_read, args=(sock, b"question"))
                thread.start()
                event = proxy.wait_for("delay", timeout=PATIENCE)
                thread.join(PATIENCE)
            self.assertEqual((event.handler, event.options["sleep"]), ("delay", 0.001))
            self.assertEqual(proxy.wait_for("delay"), event)
            with self.assertRaises(TimeoutError):
                proxy.wait_for("delay", timeout=0.01, since=event.number)
            with self.assertRaises(ValueError):
                proxy.wait_for("nope")

    def test_many_at_once(self):
        with backend_server(echo) as (port, _), contextlib.ExitStack() as stack:
            proxies = [stack.enter_context(vaurien.Proxy("127.0.0.1:%d" % port, "127.0.0.1:0"))
                       for _ in range(10)]
            self.assertEqual(len({proxy.port for proxy in proxies}), 10)
            with proxies[0].handler("blackout"):
                for proxy in proxies[1:]:
                    with connected_client(proxy) as sock:
                        send_and_read(sock, b"question")


class TestStartProxy(TempDirTestCase):
    """A proxy in a process of its own."""

    def start(self, **words):
        """The pid, the port of the proxy, and a Client."""
        proxy_port, http_port = unused_port(), unused_port()
        pid = vaurien.start_proxy(proxy_port=proxy_port, http_port=http_port, log_output="v.log",
                                  warmup=PATIENCE, **words)
        self.addCleanup(lambda: pid in vaurien.STARTED_PROCESSES and vaurien.stop_proxy(pid))
        return pid, proxy_port, vaurien.Client(port=http_port)

    def test_both_ports_answer_when_it_returns(self):
        with backend_server(echo) as (port, saw):
            pid, proxy_port, client = self.start(host="127.0.0.1", port=port)
            self.assertEqual(client.get_handler(), "dummy")
            self.assertEqual(saw, [])               # nobody has called the backend for that
            with contextlib.closing(connect(proxy_port)) as sock:
                send_and_read(sock, b"question")
                with client.with_handler("blackout"):
                    sock.sendall(b"question")
                    read_until_close(sock)
            vaurien.stop_proxy(pid)
            with self.assertRaises(OSError):
                connect(proxy_port)

    def test_the_other_names_of_the_backend_and_more_words(self):
        with backend_server(echo) as (port, _):
            _, _, client = self.start(backend_host="127.0.0.1", backend_port=port,
                                      options=["--behavior", "20:delay", "--seed", "3"])
            self.assertEqual(client.get_backend(), "127.0.0.1:%d" % port)
            self.assertEqual(client.get_handler(), "delay")

    def test_what_cannot_start_says_why(self):
        with contextlib.closing(socket.socket()) as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen(1)
            with mock.patch.object(subprocess, "Popen", quiet_popen), self.assertRaisesRegex(
                    RuntimeError, "did not start: cannot listen on 127.0.0.1:%d: Address"
                    % taken.getsockname()[1]):
                vaurien.start_proxy(proxy_port=taken.getsockname()[1], http=False, warmup=PATIENCE)
        with mock.patch.object(subprocess, "Popen", quiet_popen), self.assertRaisesRegex(
                RuntimeError, "did not start: --behavior names the unknown handler 'nope'"):
            vaurien.start_proxy(proxy_port=0, http=False, options=["--behavior", "1:nope"],
                                warmup=PATIENCE)
        with mock.patch.object(subprocess, "Popen", quiet_popen), self.assertRaisesRegex(
                RuntimeError, "did not start: --protocol must be one of tcp, http"):
            vaurien.start_proxy(protocol="nope", warmup=PATIENCE)
        self.assertEqual(vaurien.STARTED_PROCESSES, {})

    def test_an_unknown_pid(self):
        with self.assertRaisesRegex(ValueError, "no proxy was started as process 1"):
            vaurien.stop_proxy(1)

    def test_nothing_is_left_when_the_test_process_is_killed(self):
        port = unused_port()
        parent = subprocess.Popen(
            [sys.executable, "-c", "import sys; sys.path.insert(0, %r); import vaurien\n"
             "vaurien.start_proxy(proxy_port=%d, http=False, log_output='v.log', warmup=%d)\n"
             "print('up', flush=True); input()" % (HERE, port, PATIENCE)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        with parent:
            self.assertEqual(parent.stdout.readline().strip(), b"up")
            connect(port).close()
            parent.kill()

        def gone():
            try:
                connect(port).close()
            except OSError:
                return True
        wait_until(gone)

    @unittest.skipUnless(hasattr(os, "fork"), "no fork here")
    def test_nothing_is_left_when_a_fork_of_the_test_process_lives_on(self):
        port = unused_port()
        parent = subprocess.Popen(
            [sys.executable, "-c", "import os, sys; sys.path.insert(0, %r); import vaurien\n"
             "vaurien.start_proxy(proxy_port=%d, http=False, log_output='v.log', warmup=%d)\n"
             "child = os.fork()\n"
             "if child: print(child, flush=True)\n"
             "sys.stdin.read()" % (HERE, port, PATIENCE)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        with parent:
            child = int(parent.stdout.readline())
            self.addCleanup(os.kill, child, signal.SIGKILL)
            connect(port).close()
            parent.kill()

            def gone():
                try:
                    connect(port).close()
                except OSError:
                    return True
            wait_until(gone)

    def test_a_handler_that_prints_is_not_held_up(self):
        self.write("prints.py", """
def talk(state, t, to, data):
    print("x" * 10000)
    yield t, to, data
""")
        with backend_server(echo) as (port, _), mock.patch.object(subprocess, "Popen", quiet_popen):
            _, proxy_port, _ = self.start(port=port, options=["--behavior", "100:prints.talk"])
            with contextlib.closing(connect(proxy_port)) as sock:
                for _ in range(30):
                    send_and_read(sock, b"question")

    def test_handlers_of_a_vendored_copy(self):
        """They import it by the name it has there, and neighbouring files do not disturb it."""
        os.makedirs("pack")
        shutil.copy(FILE, "pack/chaos.py")
        self.write("pack/__init__.py", "")
        self.write("pack/logging.py", "")
        self.write("pack/mine.py", """
from vaurien import EOF
from pack.chaos.handlers import BaseHandler

class Super(BaseHandler):
    name = "super"
    def __call__(self, client_sock, backend_sock, to_backend):
        data = self._get_data(client_sock, backend_sock, to_backend)
        (backend_sock if to_backend else client_sock).sendall(data.upper())

def last(state, t, to, data):
    if data is EOF:
        yield t, to, b"the end"
    yield t, to, data
""")
        program = """
from pack import chaos
pid = chaos.start_proxy(port=%d, proxy_port=%d, http_port=%d, log_output="v.log", warmup=%d,
                        options=["--behavior", "100:pack.mine.%s"])
input()
"""
        for name, answer in ("Super", b"QUESTION"), ("last", b"question"):
            with backend_server(echo) as (port, _):
                one, two = unused_port(), unused_port()
                with subprocess.Popen([sys.executable, "-c", program % (port, one, two, PATIENCE, name)],
                                      stdin=subprocess.PIPE) as parent:
                    wait_until(lambda: self.answers(two))
                    with contextlib.closing(connect(one)) as sock:
                        sock.sendall(b"question")
                        self.assertEqual(read_exactly(sock, 8), answer)
                        if name == "last":
                            sock.shutdown(socket.SHUT_WR)
                            self.assertEqual(read_exactly(sock, 14), b"the endthe end")
                    parent.kill()

    def answers(self, port):
        try:
            return vaurien.Client("127.0.0.1", port).get_handler()
        except OSError:
            return False

    def test_vendored_under_another_name(self):
        os.makedirs("pack/age")
        shutil.copy(FILE, "pack/age/chaos.py")
        for folder in "pack", "pack/age":
            self.write(folder + "/__init__.py", "")
        program = """
from pack.age.chaos.handlers import BaseHandler
from pack.age import chaos
assert BaseHandler is chaos.BaseHandler
pid = chaos.start_proxy(proxy_port=%d, http_port=%d, log_output="v.log", warmup=%d)
print(chaos.Client(port=%d).get_handler())
chaos.stop_proxy(pid)
"""
        one, two = unused_port(), unused_port()
        out = subprocess.check_output([sys.executable, "-c", program % (one, two, PATIENCE, two)])
        self.assertEqual(out.strip(), b"dummy")


def quiet_popen(*args, really=subprocess.Popen, **words):
    return really(*args, stderr=subprocess.DEVNULL, **words)


class Passes(vaurien.BaseHandler):
    """A blocking handler that passes on what has come."""

    def __call__(self, client_sock, backend_sock, to_backend):
        data = self._get_data(client_sock, backend_sock, to_backend)
        (backend_sock if to_backend else client_sock).sendall(data)


class TestBlockingHandlers(unittest.TestCase):
    """The class form: it blocks, in a thread of its own, on real sockets."""

    @contextlib.contextmanager
    def armed(self, cls, talk=echo, **fields):
        with registered(cls), running_proxy(talk) as proxy:
            with proxy.handler(cls.__name__, **fields):
                yield proxy

    def test_from_vaurien_handlers_import(self):
        from vaurien.handlers import BaseHandler
        self.assertIs(BaseHandler, vaurien.BaseHandler)

    def test_the_documented_form(self):
        class Super(vaurien.BaseHandler):
            name = "super"
            options = {"sleep": ("Delay in seconds", float, 1), "loud": ("Upper case", bool, False)}

            def __call__(self, client_sock, backend_sock, to_backend):
                data = self._get_data(client_sock, backend_sock, to_backend)
                if data:
                    if not to_backend:
                        time.sleep(self.option("sleep"))
                        data = data.upper() if self.option("loud") else data
                    (backend_sock if to_backend else client_sock).sendall(data)

        with self.armed(Super, sleep=0.1, loud=True) as proxy, connected_client(proxy) as sock:
            for _ in range(3):
                began = time.monotonic()
                sock.sendall(b"question")
                self.assertEqual(read_exactly(sock, 8), b"QUESTION")
                self.assertGreaterEqual(time.monotonic() - began, 0.1)
            self.assertEqual(proxy.faults, {"Super": 3})
            sock.shutdown(socket.SHUT_WR)
            self.assertEqual(read_until_close(sock)[2], "eof")

    def test_options_settings_and_proxy(self):
        class Plain(vaurien.BaseHandler):
            options = {"sleep": ("Seconds", int, 1), "on": ("Whether", bool, "no")}

        plain = Plain({"sleep": "2"}, proxy="the proxy")
        self.assertEqual((plain.option("sleep"), plain.option("on"), plain.proxy),
                         (2, False, "the proxy"))
        plain.update_settings({"on": "yes"})
        self.assertEqual((plain.option("on"), plain.settings), (True, {"sleep": "2", "on": "yes"}))

    def test_ten_block_at_the_same_time_and_the_loop_goes_on(self):
        meeting = threading.Barrier(11)

        class Meets(Passes):
            def __call__(self, client_sock, backend_sock, to_backend):
                if to_backend:
                    meeting.wait(PATIENCE)
                super().__call__(client_sock, backend_sock, to_backend)

        with self.armed(Meets) as proxy, contextlib.ExitStack() as stack:
            socks = [stack.enter_context(connected_client(proxy)) for _ in range(10)]
            for sock in socks:
                sock.sendall(b"question")
            wait_until(lambda: meeting.n_waiting == 10)
            with proxy.handler("dummy"), connected_client(proxy) as other:
                send_and_read(other, b"question")
            meeting.wait(PATIENCE)
            for sock in socks:
                self.assertEqual(read_exactly(sock, 8), b"question")

    def test_what_it_raises_ends_that_connection_only(self):
        class Fails(vaurien.BaseHandler):
            def __call__(self, client_sock, backend_sock, to_backend):
                if client_sock.recv(8) == b"question":
                    raise KeyError("no idea")
                backend_sock.sendall(b"dropped")

        with self.armed(Fails) as proxy, connected_client(proxy) as one, connected_client(proxy) as two:
            with self.assertLogs("vaurien", "ERROR") as logged:
                one.sendall(b"question")
                self.assertEqual(read_until_close(one)[0], 0)
            self.assertIn("handler Fails failed", logged.output[0])
            with proxy.handler("dummy"):
                send_and_read(two, b"another")

    def test_one_that_leaves_is_no_end_of_anything_else(self):
        class Leaves(vaurien.BaseHandler):
            def __call__(self, client_sock, backend_sock, to_backend):
                raise SystemExit(5)

        with self.armed(Leaves) as proxy, connected_client(proxy) as sock:
            with self.assertLogs("vaurien", "ERROR"):
                sock.sendall(b"question")
                read_until_close(sock)
            wait_until(lambda: not proxy.connections)

    def test_one_that_cannot_be_made_is_refused(self):
        class Fails(vaurien.BaseHandler):
            def __init__(self, settings, proxy):
                raise KeyError("no idea")

        with registered(Fails), proxy_with_control() as (proxy, client):
            for set_it in lambda: client.set_handler("Fails"), lambda: proxy.handler("Fails").__enter__():
                with self.assertRaisesRegex(ValueError, "Fails cannot be made: KeyError: 'no idea'"):
                    set_it()
            self.assertEqual(proxy.handler_names(), "dummy")
            with proxy.handler("delay"):
                pass
            self.assertEqual(proxy.handler_names(), "dummy")

    def test_it_gets_the_sockets_and_so_both_streams(self):
        class Super(vaurien.BaseHandler):
            pass

        with registered(Super), self.assertRaisesRegex(ValueError, "stream must be both for Super"):
            vaurien.read_rules([{"name": "Super", "stream": "upstream"}])

    def test_a_socket_that_it_closes_ends_the_connection(self):
        class Closes(vaurien.BaseHandler):
            def __call__(self, client_sock, backend_sock, to_backend):
                client_sock.close()

        with self.armed(Closes) as proxy, connected_client(proxy) as sock:
            sock.sendall(b"question")
            read_until_close(sock)
            wait_until(lambda: not proxy.connections and proxy.saw)

    def test_large_answers_and_requests_pass_through_it(self):
        data = random_data(3000000)
        with self.armed(Passes) as proxy, connected_client(proxy) as sock:
            thread = threading.Thread(target=sock.sendall, args=(data,))
            thread.start()
            self.assertTrue(read_exactly(sock, len(data)) == data)
            thread.join(PATIENCE)

    def test_it_waits_for_the_backend_and_costs_nothing_meanwhile(self):
        gate, work = threading.Event(), threading.Event()

        class Waits(Passes):
            def __call__(self, client_sock, backend_sock, to_backend):
                work.wait(PATIENCE)
                super().__call__(client_sock, backend_sock, to_backend)

        def turns(loop, while_waiting):
            counted, really = [], loop.run_timers
            loop.run_timers = lambda: (counted.append(1), really())
            time.sleep(0.2)
            loop.run_timers = really
            self.assertLess(len(counted), 30, while_waiting)

        def resolve(address, *_):
            gate.wait(PATIENCE)
            return [(socket.AF_INET, ("127.0.0.1", address[1]))]

        with backend_server(echo) as (port, _), registered(Waits), \
                vaurien.Proxy("slow.invalid:%d" % port, "127.0.0.1:0") as proxy, \
                mock.patch.object(vaurien, "resolve_numeric", lambda *_: None), \
                mock.patch.object(vaurien, "resolve", resolve), connected_client(proxy) as sock:
            wait_until(lambda: proxy.lookups)
            proxy.loop.run_sync(proxy.set_rules, rules_from("100:Waits"))
            sock.sendall(b"question")
            turns(proxy.loop, "for the name")
            gate.set()
            proxy.wait_for("Waits", PATIENCE)
            turns(proxy.loop, "for the handler")
            work.set()
            self.assertEqual(read_exactly(sock, 8), b"question")

    def test_what_it_does_to_the_sockets_does_not_block_the_loop(self):
        class Blocks(Passes):
            def __call__(self, client_sock, backend_sock, to_backend):
                client_sock.setblocking(True)
                backend_sock.setblocking(True)
                super().__call__(client_sock, backend_sock, to_backend)

        def talk(sock):
            sock.sendall(read_exactly(sock, 8))
            read_exactly(sock, 8)
            sock.sendall(bytes(30000000))

        with self.armed(Blocks, talk) as proxy, connected_client(proxy) as sock:
            send_and_read(sock, b"question")
            with proxy.handler("dummy"):
                sock.sendall(b"question")
                wait_until(lambda: proxy.loop.budget.held > vaurien.HELD_MAX_IDLE // 2)
                self.assertEqual(len(read_exactly(sock, 30000000)), 30000000)

    def test_leaving_while_it_waits_for_a_peer(self):
        class Waits(vaurien.BaseHandler):
            def __call__(self, client_sock, backend_sock, to_backend):
                client_sock.recv(100)
                client_sock.recv(100)           # nothing will come

        with self.armed(Waits) as proxy, connected_client(proxy) as sock:
            sock.sendall(b"question")
            proxy.wait_for("Waits", PATIENCE)
            proxy.loop.run_sync(proxy.close)
            read_until_close(sock)
            wait_until(lambda: threading.active_count() < 20)

    def test_it_is_drawn_among_others(self):
        with registered(Passes), running_proxy(echo, "40:Passes,30:delay", seed=1,
                                         options={"delay": {"sleep": 0.002}}) as proxy:
            with connected_client(proxy) as sock:
                for number in range(60):
                    send_and_read(sock, b"question %d" % number)
            self.assertTrue(10 < proxy.faults["Passes"] < 40)
            self.assertTrue(5 < proxy.faults["delay"] < 35)

    def test_it_does_not_overtake_what_is_still_held(self):
        with registered(Passes), running_proxy(echo, "50:Passes,50:delay", seed=1, options={
                "delay": {"sleep": 0.03, "before": False}}) as proxy, connected_client(proxy) as sock:
            for number in range(20):
                sock.sendall(b"one %02d " % number)
                time.sleep(0.005)       # the answer is there, and perhaps held
                self.assertEqual(send_and_read_exactly(sock, b"two %02d " % number, 7),
                                 b"one %02d two %02d " % (number, number))
            self.assertEqual(set(proxy.faults), {"Passes", "delay"})

    def test_names_of_options_that_are_taken(self):
        class Taken(vaurien.BaseHandler):
            options = {"percent": ("?", int, 1)}

        with self.assertRaisesRegex(ValueError, "an option cannot be called 'percent'"):
            vaurien.check_handler("x", Taken)


class TestCtl(unittest.TestCase):
    """vaurienctl, as it is typed."""

    def ctl(self, client, *words):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = vaurien.main(["ctl", *words, "--host", "http://127.0.0.1:%d" % client.port])
        return status, out.getvalue().strip(), err.getvalue().strip()

    def test_all_it_can_do(self):
        with proxy_with_control() as (proxy, client):
            self.assertEqual(self.ctl(client, "list-handlers"), (0, ", ".join(HANDLERS), ""))
            self.assertEqual(self.ctl(client, "get-handler"), (0, "dummy", ""))
            self.assertEqual(self.ctl(client, "set-handler", "blackout"),
                             (0, 'Handler changed to "blackout"', ""))
            self.assertEqual(self.ctl(client, "set-behavior", "delay", "sleep=0.001", "percent=100",
                                      "before=no")[0], 0)
            self.assertEqual(proxy.describe(), "100:delay sleep=0.001 before=no")
            with connected_client(proxy) as sock:
                send_and_read(sock, b"question")
                self.assertIn('"bytes_up": 8', self.ctl(client, "connections")[1])
            self.assertIn('"handler": "delay"', self.ctl(client, "events")[1])
            backend = vaurien.format_address(proxy.backend)
            self.assertEqual(self.ctl(client, "backend"), (0, backend, ""))
            self.assertEqual(self.ctl(client, "backend", "localhost:9"), (0, "localhost:9", ""))

    def test_what_goes_wrong(self):
        with proxy_with_control() as (_, client):
            for words, status, said in [
                    (["set-handler", "nope"], 1, "unknown handler 'nope'"),
                    (["set-handler", "delay", "sleep=x"], 1, "sleep must be a number"),
                    (["backend", "x"], 1, "backend must be HOST:PORT"),
                    (["set-handler"], 2, "set-handler: missing a required argument: 'name'"),
                    (["set-handler", "delay", "sleep"], 2, "'sleep' must be NAME=VALUE"),
                    (["set-handler", "delay", "sleep=1", "sleep=2"], 2, "each name once"),
                    (["set-handler", "delay", "name=hang"], 2, "'name=hang' must be"),
                    (["set-handler", "delay", "self=1"], 1, "self is not an option of delay"),
                    (["get-handler", "--nope"], 2, "unrecognized arguments: --nope"),
                    (["get-handler", "x"], 2, "get-handler: too many positional arguments"),
                    (["nope"], 2, "invalid choice: 'nope'"), ([], 2, "required: ACTION")]:
                with self.subTest(words):
                    found, out, err = self.ctl(client, *words)
                    self.assertEqual((found, out), (status, ""))
                    self.assertRegex(err, "^vaurien: [^\n]*%s[^\n]*$" % re.escape(said))

    def test_words_may_stand_behind_options(self):
        with proxy_with_control() as (proxy, client), contextlib.redirect_stdout(io.StringIO()):
            self.assertEqual(vaurien.main(["ctl", "set-handler", "--host", "127.0.0.1:%d" % client.port,
                                           "delay", "sleep=2"]), 0)
            self.assertEqual(proxy.describe(), "100:delay sleep=2.0")

    def test_no_server(self):
        status, _, err = self.ctl(vaurien.Client(port=unused_port()), "get-handler")
        self.assertEqual(status, 1)
        self.assertRegex(err, "^vaurien: no answer from 127.0.0.1:[0-9]+: Connection refused$")

    def test_where_it_is(self):
        for text, found in [("http://localhost:8080", ("localhost", 8080, "http")),
                            ("localhost", ("localhost", 8080, "http")),
                            ("https://[::1]:1/", ("::1", 1, "https")),
                            (":81", ("localhost", 81, "http"))]:
            self.assertEqual(vaurien.parse_host(text), found)
        for text in "ftp://x:1", "http://x:y", "x y:1":
            with self.assertRaises(ValueError):
                vaurien.parse_host(text)


class TestReadme(unittest.TestCase):
    """What the README says is what is there."""

    def setUp(self):
        with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
            self.text = file.read()

    def test_the_table_of_handlers_is_the_registry(self):
        for name, function in HANDLERS.items():
            words = vaurien.option_help(function)
            options = "<br>".join("`%s` (%s): %s" % (option, vaurien.format_value(default), words[option])
                                  for option, default in vaurien.handler_options(function).items())
            row = "| `%s` | %s | %s |" % (name, vaurien.summary(function), options)
            self.assertIn(row.replace("  ", " "), self.text)

    def test_the_table_of_protocols_is_the_registry(self):
        for name, kind in list(vaurien.PROTOCOLS.items())[1:]:
            row, = (line for line in self.text.splitlines() if line.startswith("| `%s` | `" % name))
            self.assertEqual(sorted(set(re.findall("`([^`]*)`", row)) - {name}), sorted(kind.errors))

    def test_every_option_is_there(self):
        for setting in [*vaurien.SETTINGS.values(), *vaurien.SERVE_SETTINGS.values()]:
            for flag in setting.flags:
                self.assertIn("`%s`" % flag, self.text)

    def test_the_commands_are_understood(self):
        lines = self.text.replace("\\\n", " ").splitlines()
        commands = [line.strip() for line in lines if re.match(" +vaurien --", line)]
        self.assertGreater(len(commands), 5)
        for command in commands:
            if "mine." not in command and "--help" not in command:
                found = vaurien.read_arguments(shlex.split(command)[1:], vaurien.SETTINGS)
                self.assertTrue(vaurien.make_proxies(found), command)

    def code(self, start):
        """The indented block of the README that begins so, and its line."""
        text = self.text[self.text.index("    " + start):]
        return textwrap.dedent(re.match(r"(?:(?: {4}.*)?\n)+", text).group())

    def test_the_unittest_of_the_original_documentation(self):
        with backend_server(echo) as (port, _):
            ports = {"proxy_port": unused_port(), "http_port": unused_port()}
            start = functools.partial(vaurien.start_proxy, warmup=PATIENCE, log_output="-",
                                      log_level="critical", **ports)
            source = self.code("from vaurien import Client, start_proxy, stop_proxy")
            names = {"unittest": unittest}
            exec(source.replace("from vaurien import", "# ").replace("8888", str(port)), dict(
                names, start_proxy=start, stop_proxy=vaurien.stop_proxy,
                Client=functools.partial(vaurien.Client, port=ports["http_port"])), names)
            result = unittest.TestResult()
            unittest.defaultTestLoader.loadTestsFromTestCase(names["MyTest"]).run(result)
            self.assertEqual((result.testsRun, result.errors, result.failures), (1, [], []))

    def test_the_block_in_process(self):
        with backend_server(echo) as (port, _):
            source = self.code("import vaurien\n\n    with")
            source = source.replace("localhost:6379", "127.0.0.1:%d" % port).replace("sleep=2", "sleep=0.01")

            def redis(port):
                self.sock = connect(port)
                self.addCleanup(self.sock.close)
                return self

            here = "exchange(test.sock, b'q') if 'delay' in proxy.describe() else None"
            exec(source.replace("...", here), {"Redis": redis, "test": self, "exchange": send_and_read})

    def test_the_class_of_the_readme_works(self):
        names = {}
        exec(self.code("import time\n    from vaurien.handlers"), names)
        with registered(names["MySuperHandler"]), running_proxy(echo) as proxy, connected_client(proxy) as sock:
            with proxy.handler("MySuperHandler", sleep=0):
                send_and_read(sock, b"question")
            self.assertEqual(proxy.faults, {"MySuperHandler": 1})

    def test_the_curl_lines_are_answered_so(self):
        with proxy_with_control() as (proxy, _):
            control = vaurien.Control(("localhost", 0), proxy_table(proxy))
            for words, answer in re.findall(r"\n    \$ curl (.*)\n    (?!\$)(.*)", self.text):
                # Any free port, in the place of the one that is written there.
                words = shlex.split(words.replace("localhost:26379", "127.0.0.1:0"))
                method = words[words.index("-X") + 1] if "-X" in words else \
                    "POST" if any(word.startswith("-d") for word in words) else "GET"
                body = next((word[2:] or words[words.index(word) + 1] for word in words
                             if word.startswith("-d")), "")
                target = words[-1][len("http://localhost:8080"):]
                found = vaurien.handle_request(control, method, target, body.encode())
                self.assertEqual(re.sub("127.0.0.1:[0-9]+", "127.0.0.1:26379", found.text), answer)
            control.proxies.remove(control.proxies["redis"])

    def test_the_handler_of_the_readme_works(self):
        source = self.text.split("into `mine.py`:\n\n")[1].split("\nand run")[0]
        names = {}
        exec(textwrap.dedent(source), names)
        with registered(names["stutter"]):
            line = chain_of(vaurien.Rule("stutter", {"pause": 0.2}))
            self.assertEqual([event[:3] for event in line.process(1, DOWNSTREAM, b"leftright")],
                             [(1, DOWNSTREAM, b"left"), (1.2, DOWNSTREAM, b"right")])
            self.assertEqual(line.process(1, UPSTREAM, b"q")[0][:3], (1, UPSTREAM, b"q"))


def import_package(name):
    """A package from PyPI; the test is skipped where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")     # theirs, not ours
            return importlib.import_module(name)
    except ImportError:
        raise unittest.SkipTest("no %s" % name) from None


# -- Trusted: strangers, floods, odd machines ----------------------------------------

class TestStrangers(TempDirTestCase):
    """Who may drive the control server, and for how long."""

    def admitted(self, headers, local="localhost", token=None, names=()):
        """The status of what is answered to these headers."""
        control = vaurien.Control((local, 0), proxy_table(), token, names)
        return vaurien.handle_request(control, "GET", "/handlers", b"", headers)[0]

    def test_host(self):
        for host, wanted in [("localhost", 200), ("localhost:8080", 200), ("LOCALHOST.:1", 200), ("127.0.0.1:8080", 200), ("[::1]:8080", 200),
                             ("::1", 403), ("10.1.2.3", 200), ("evil.example", 403), ("evil.example:8080", 403), ("localhost.evil.example", 403),
                             ("127.0.0.1.evil.example", 403), ("", 403), (":8080", 403), ("[", 403), ("1.2.3", 200), ("a" * 10000, 403), ("\0", 403),
                             ("xn--", 403), ("voil\xe0", 403)]:
            self.assertEqual(self.admitted({"Host": host}), wanted, host[:50])
        self.assertEqual(self.admitted({}), 200)        # HTTP/1.0, no browser
        self.assertEqual(self.admitted({"Host": "chaos:1"}, local="chaos"), 200)
        self.assertEqual(self.admitted({"Host": "chaos:1"}, local=""), 403)
        self.assertEqual(self.admitted({"Host": "Chaos:1"}, local="", names=["x", "chaos"]), 200)

    def test_origin(self):
        for origin, wanted in [("http://localhost:8080", 200), ("https://localhost:8080", 200), ("HTTP://LOCALHOST:8080", 200), ("null", 403), ("", 403),
                               ("http://localhost", 403), ("http://localhost:3000", 403), ("http://evil.example", 403), ("file://", 403)]:
            self.assertEqual(self.admitted({"Host": "localhost:8080", "Origin": origin}), wanted, origin)
        for site, wanted in ("none", 200), ("same-origin", 200), ("same-site", 403), ("cross-site", 403):
            self.assertEqual(self.admitted({"Host": "localhost", "Sec-Fetch-Site": site}), wanted, site)

    def test_token(self):
        for given, wanted in [("Bearer s3cret", 200), ("bearer  s3cret ", 200), ("Bearer s3cre", 401), ("Bearer s3crett", 401), ("s3cret", 401), ("", 401),
                              ("Basic s3cret", 401), ("Bearer \xff\u2603", 401)]:
            self.assertEqual(self.admitted({"Authorization": given}, token="s3cret"), wanted, given)
        self.assertEqual(self.admitted({"Host": "localhost"}, token="s3cret"), 401)
        # Who knows it is no page, whatever it is called there.
        self.assertEqual(self.admitted({"Host": "chaos.example", "Authorization": "Bearer s3cret"}, local="", token="s3cret"), 200)
        answer = vaurien.handle_request(vaurien.Control(("localhost", 0), proxy_table(), "s3cret"), "GET", "/", b"")
        self.assertEqual((answer.headers["WWW-Authenticate"], "s3cret" in answer.text), ("Bearer", False))

    def test_over_http(self):
        with proxy_with_control() as (_, client):
            for head, status in [(b"Host: evil.example", b"403"), (b"Host: 127.0.0.1\r\nOrigin: http://evil.example", b"403"),
                                 (b"Host: 127.0.0.1", b"200")]:
                for method in b"GET", b"OPTIONS", b"POST":
                    answer = TestControl.raw(self, client, method + b" /handler HTTP/1.1\r\n" + head
                                             + b"\r\nConnection: close\r\nContent-Length: 5\r\n\r\ndelay")
                    wanted = b"405" if status == b"200" and method == b"OPTIONS" else status
                    self.assertEqual(answer.split()[1], wanted, answer)
                    self.assertNotIn(b"access-control", answer.lower())
            self.assertEqual(client.get_handler(), "delay")     # of those with status 200 alone

    def test_a_token_end_to_end(self):
        with backend_server(echo) as (port, _):
            toxiproxy_route = unused_port()
            with mock.patch.dict(os.environ, {"TOKEN": "s3cret=="}):
                pid = vaurien.start_proxy("127.0.0.1", port, warmup=PATIENCE, proxy_port=unused_port(), http_port=toxiproxy_route, log_level="error",
                                          options=["--config", self.write("v.ini", "[vaurien]\nhttp-token=${TOKEN}\n")])
            self.addCleanup(vaurien.stop_proxy, pid)
            self.assertEqual(vaurien.Client(port=toxiproxy_route, token="s3cret==").get_handler(), "dummy")
            with self.assertRaisesRegex(ValueError, "Authorization must be Bearer"):
                vaurien.Client(port=toxiproxy_route).get_handler()
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                self.assertEqual(vaurien.main(["ctl", "--host", "localhost:%d" % toxiproxy_route, "--http-token", "s3cret==", "get-handler"]), 0)
                with mock.patch.dict(os.environ, {"VAURIEN_HTTP_TOKEN": "s3cret=="}):
                    self.assertEqual(vaurien.main(["ctl", "--host", "localhost:%d" % toxiproxy_route, "get-handler"]), 0)
            self.assertEqual(out.getvalue(), "dummy\ndummy\n")

    def test_a_warning_where_others_can_reach_it(self):
        for local, token, wanted in ("127.0.0.1", None, False), ("localhost", None, False), ("0.0.0.0", None, True), ("0.0.0.0", "x", False):
            control = vaurien.Control((local, 0), proxy_table(), token)
            control.bind()
            logged = []
            with mock.patch.object(vaurien.log, "warning", lambda words, *args: logged.append(words % args)):
                control.open(None)
            control.close()
            self.assertEqual([line for line in logged if "--http-token" in line] != [], wanted, (local, token))

    def test_a_head_has_a_bound_in_sum(self):
        with proxy_with_control() as (_, client):
            head = b"".join(b"X-%d: %s\r\n" % (number, b"x" * 60000) for number in range(5))
            answer = TestControl.raw(self, client, b"GET /handler HTTP/1.1\r\n" + head + b"\r\n")
            self.assertEqual(answer.split()[1:2] or [b"431"], [b"431"])       # or a reset, that has overtaken it
            self.assertEqual(client.get_handler(), "dummy")

    def test_refusals_are_in_the_form_of_what_was_asked(self):
        control = vaurien.Control(("localhost", 0), proxy_table())
        for path, form in ("/proxies", "error"), ("/proxies/a/toxics?x=1", "error"), ("/handlers", "errors"), ("/nope", "errors"):
            status, _, text = vaurien.handle_request(control, "GET", path, b"", {"Host": "toxiproxy:8474"})
            self.assertEqual((status, form in json.loads(text), "--http-name" in text), (403, True, True), path)

    def test_names_as_browsers_write_them(self):
        for name, host in ("Chaos.Example.", "chaos.example:1"), ("b\xfccher.example", "xn--bcher-kva.example"), ("b\xfccher.example", "B\xfccher.example."):
            self.assertEqual(self.admitted({"Host": host}, local="", names=vaurien.check_names(name)), 200, name)

    def test_a_token_is_never_said(self):
        for check in vaurien.check_token, lambda text: vaurien.Client(token=text):
            with self.assertRaises(ValueError) as caught:
                check("S3cr\net")
            self.assertNotIn("S3cr", str(caught.exception))
        with self.assertRaisesRegex(ValueError, "http_token is for http"):
            vaurien.start_proxy(http=False, http_token="s3cret")

    def test_the_same_proxy_made_twice_at_once(self):
        with proxy_with_control() as (proxy, client):
            statuses = []

            def ask(path, body):
                connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=PATIENCE)
                connection.request("POST", path, json.dumps(body))
                statuses.append(connection.getresponse().status)
                connection.close()
            for number in range(20):
                table = {"name": "twice %d" % number, "listen": "127.0.0.1:0", "upstream": "127.0.0.1:9"}
                threads = [threading.Thread(target=ask, args=one) for one in (("/proxies", table), ("/populate", [table]))]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join(PATIENCE)
            self.assertLessEqual(set(statuses), {201, 409})
            for name in [name for name in client.ask("GET", "/proxies") if name != proxy.name]:
                with contextlib.suppress(ValueError, json.JSONDecodeError):
                    client.ask("DELETE", "/proxies/" + urllib.parse.quote(name))

    def test_who_takes_too_long_is_hung_up_on(self):
        with mock.patch.object(vaurien, "REQUEST_TIMEOUT", 0.3), proxy_with_control() as (_, client):
            with contextlib.ExitStack() as stack:
                start, talking = time.monotonic(), []
                for began in b"G", b"GET / HTTP/1.1\r\nX: ", b"POST /handler HTTP/1.1\r\nContent-Length: 1000\r\n\r\n":
                    talking.append(stack.enter_context(contextlib.closing(connect(client.port))))
                    talking[-1].sendall(began)
                while talking:
                    for sock in list(talking):
                        try:
                            sock.sendall(b"x")
                            if select.select([sock], [], [], 0.02)[0] and not sock.recv(65536):
                                talking.remove(sock)
                        except ConnectionError:
                            talking.remove(sock)
                    self.assertLess(time.monotonic() - start, PATIENCE)
                self.assertGreaterEqual(time.monotonic() - start, 0.3)
            self.assertEqual(client.get_handler(), "dummy")

    def test_a_line_of_the_log_cannot_be_forged(self):
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


class TestFloods(unittest.TestCase):
    """What is held has a bound, whatever comes, and nothing leaks."""

    OPTIONS = {"latency": {"latency": 3600000}, "bandwidth": {"rate": 1}, "slicer": {"average_size": 10, "delay": 1000000}, "delay": {"sleep": 3600.0},
               "slow_close": {"delay": 1000}, "limit_data": {"bytes": 1 << 60}, "transient": {"agitate": 1 << 30}}

    def test_a_reader_that_stopped(self):
        for name in [name for name, function in HANDLERS.items() if not vaurien.is_blocking_handler(function)]:
            gate = threading.Event()
            with running_proxy(lambda sock, gate=gate: gate.wait(PATIENCE) and read_until_close(sock), "100:" + name, options={name: self.OPTIONS.get(name, {})}) as proxy:
                budget = proxy.loop.budget
                with connected_client(proxy) as sock, contextlib.suppress(ConnectionError):
                    sock.setblocking(False)
                    data, sent, held = bytes(1 << 18), 0, 0
                    while sent < 1 << 25 and select.select([], [sock], [], 0.05)[1]:
                        sent += sock.send(data)
                        held = max(held, budget.held)
                    self.assertLessEqual(held, vaurien.HELD_MAX + 2 * vaurien.KERNEL_PIPE_SIZE, name)
                gate.set()
                proxy.loop.run_sync(proxy.set_rules, [])
                wait_until(lambda: not proxy.connections)
                self.assertEqual((budget.held, budget.pipes, proxy.loop.run_sync(lambda: len(proxy.loop.timers))), (0, 0, 0), name)

    def test_the_total_is_never_passed(self):
        """Many at once, each of which may hold much: the bound of all is kept, and each goes on."""
        total = 2 << 20
        with mock.patch.object(vaurien.Budget.__init__, "__defaults__", (total,)):
            with running_proxy(echo, "100:delay", options={"delay": {"sleep": 0.1}}) as proxy, contextlib.ExitStack() as stack:
                budget, seen = proxy.loop.budget, []
                self.assertEqual(budget.total, total)
                socks = [stack.enter_context(connected_client(proxy)) for _ in range(10)]
                for sock in socks:
                    sock.setblocking(False)
                sent = dict.fromkeys(socks, 0)
                def flood():
                    for sock in select.select([], socks, [], 0)[1]:
                        sent[sock] += sock.send(bytes(1 << 14))
                    seen.append(budget.held)
                    return max(seen) > total // 8
                wait_until(flood)
                for _ in range(50):
                    flood()
                self.assertLessEqual(max(seen), total)
                for sock in socks:
                    sock.settimeout(PATIENCE)
                    self.assertEqual(len(read_exactly(sock, sent[sock])), sent[sock])

    def test_many_short_ones(self):
        with running_proxy(echo) as proxy:
            def some():
                for _ in range(100):
                    with connected_client(proxy) as sock:
                        send_and_read(sock, b"question")
                wait_until(lambda: not proxy.connections)
                return proxy.loop.run_sync(lambda: (len(proxy.loop.watched), proxy.loop.budget.held, len(proxy.loop.timers), threading.active_count()))
            self.assertEqual(some()[:3], (2, 0, 0))
            before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
            self.assertEqual(some()[:3], (2, 0, 0))
            if before:
                wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before)

    def test_peers_that_vanish(self):
        """An RST from either side, in the middle of everything."""
        def backend(sock):
            with contextlib.suppress(OSError, EOFError):
                said = read_exactly(sock, 1)
                sock.sendall(bytes(1 << 22) if said == b"m" else said)
                if read_exactly(sock, 1) == b"r":
                    close_with_reset(sock)
                    return
                read_until_close(sock)

        states = [("100:dummy", {}, b"q"), ("100:dummy", {}, b"m"), ("100:latency", {"latency": 50}, b"m"), ("100:delay", {"sleep": 0.05}, b"q"),
                  ("100:bandwidth", {"rate": 50000}, b"m"), ("100:slicer", {"average_size": 100}, b"m"), ("100:hang", {}, b"q"),
                  ("100:Passes", {}, b"q")]
        with registered(Passes):
            for behavior, options, said in states:
                name = behavior[4:]
                with running_proxy(backend, behavior, options={name: options} if options else None) as proxy:
                    for leave in "client", "half-closed client", "backend":
                        with self.subTest(behavior, said=said, leave=leave), contextlib.closing(connect(proxy.port)) as sock:
                            sock.sendall(said)
                            if leave == "backend" and name != "hang":
                                sock.sendall(b"r")
                                read_until_close(sock)
                            else:
                                select.select([sock], [], [], 0.02)
                                with contextlib.suppress(OSError):
                                    if leave[0] == "h":
                                        sock.shutdown(socket.SHUT_WR)
                                close_with_reset(sock)
                    if name == "hang":          # a half-closed client that is gone cannot be told from one that waits
                        proxy.loop.run_sync(proxy.set_rules, [])
                    wait_until(lambda: not proxy.connections)
                    self.assertEqual((proxy.loop.budget.held, proxy.loop.budget.pipes, len(proxy.loop.watched)), (0, 0, 2))

    def test_a_client_that_vanishes_while_the_backend_is_called(self):
        with silent_address() as port, vaurien.Proxy("127.0.0.1:%d" % port, "127.0.0.1:0") as proxy:
            for leave in close_with_reset, socket.socket.close:
                with connected_client(proxy) as sock:
                    sock.sendall(b"question")
                    wait_until(lambda: [one.connecting for one in list(proxy.connections.values())] == [True])
                    leave(sock)
                    if leave is close_with_reset:
                        wait_until(lambda: not proxy.connections)
            proxy.loop.run_sync(proxy.drop_connections, "test")
            self.assertEqual((proxy.loop.budget.held, proxy.loop.budget.pipes), (0, 0))


class TestDescriptors(TempDirTestCase):
    """A process that may have few descriptors."""

    @unittest.skipUnless(hasattr(os, "fork"), "no such limit here")
    def test_accepting_pauses_and_goes_on(self):
        path = os.path.join(self.folder, "log")
        with backend_server(echo) as (backend, _), contextlib.ExitStack() as stack:
            port = unused_port()
            process = subprocess.Popen(["sh", "-c", "ulimit -n 64; exec \"$@\"", "sh", sys.executable, FILE, "--local", "127.0.0.1:%d" % port,
                                        "--distant", "127.0.0.1:%d" % backend, "--log-output", path])
            stack.callback(process.wait)
            stack.callback(process.terminate)
            wait_until(lambda: os.path.exists(path) and "listening" in open_and_read(path))
            began, used = time.monotonic(), cpu_seconds(process.pid)
            socks = [stack.enter_context(contextlib.closing(connect(port))) for _ in range(60)]
            for sock in socks:
                sock.sendall(b"question")
            wait_until(lambda: "trying again" in open_and_read(path))
            answered, more = [], True
            while more:
                more = select.select([sock for sock in socks if sock not in answered], [], [], 0.2)[0]
                answered += more
            for sock in answered:               # those that are here live, while others wait
                self.assertEqual(read_exactly(sock, 8), b"question")
                send_and_read(sock, b"again")
            self.assertTrue(10 < len(answered) < 40, len(answered))
            waiting = [sock for sock in socks if sock not in answered]
            self.assertEqual(select.select(waiting[-5:], [], [], 0.1)[0], [])
            used, taken = cpu_seconds(process.pid) - used, time.monotonic() - began
            self.assertLess(used, 0.5 * taken)                      # nothing spins
            for sock in answered:
                sock.close()
            for sock in waiting:
                self.assertEqual(read_exactly(sock, 8), b"question")        # in the end each has its turn
                sock.close()
            log = open_and_read(path)
            self.assertLessEqual(log.count("\n"), time.monotonic() - began + 3, log)
            self.assertNotIn("cannot connect", log)
            self.assertIn("cannot accept on 127.0.0.1:%d: " % port, log)

    def test_who_got_a_descriptor_late_is_left_alone(self):
        """The alarm of the call that waited rings for nobody."""
        real, refused = vaurien.start_connect, []

        def call(*address):
            if not refused:
                refused.append(address)
                raise OSError(errno.EMFILE, "Too many open files")
            return real(*address)

        with backend_server(echo) as (port, _), vaurien.Proxy("some.example:1", "127.0.0.1:0", timeout=0.3) as proxy:
            with mock.patch.object(vaurien, "RETRY_DELAY", 0.02), mock.patch.object(vaurien, "start_connect", call), \
                    mock.patch.object(vaurien, "resolve", lambda *args, **words: [(socket.AF_INET, ("127.0.0.1", port))]), connected_client(proxy) as sock:
                began = time.monotonic()
                while time.monotonic() < began + 0.5:
                    send_and_read(sock, b"question")
                self.assertEqual((proxy.failures, proxy.loop.run_sync(lambda: len(proxy.loop.timers))), (0, 0))
        vaurien.Loop.fds_exhausted = False

    def test_a_call_waits_for_a_descriptor(self):
        real = vaurien.start_connect
        for times, wanted in (1, b"question"), (10 ** 9, b""):
            with mock.patch.object(vaurien, "RETRY_DELAY", 0.05), running_proxy(echo, timeout=0.3) as proxy:
                refused = []

                def call(*address):
                    if len(refused) < times:
                        refused.append(address)
                        raise OSError(errno.EMFILE, "Too many open files")
                    return real(*address)
                with mock.patch.object(vaurien, "start_connect", call), connected_client(proxy) as sock:
                    began = time.monotonic()
                    sock.sendall(b"question")
                    self.assertEqual(sock.recv(100), wanted)
                    self.assertGreaterEqual(time.monotonic() - began, 0.05 if wanted else 0.25)
                self.assertTrue(vaurien.Loop.fds_exhausted)
        vaurien.Loop.fds_exhausted = False


def open_and_read(path):
    with open(path, encoding="utf-8") as file:
        return file.read()


class TestOddMachines(TempDirTestCase):
    """The program where something is missing or strange: it starts, passes bytes, and ends with 0."""

    # What a machine may lack, taken away before the module is loaded.
    BARE = """
import os, runpy, select, signal, socket, sys
for module, names in (select, "epoll poll kqueue devpoll"), (os, "splice pipe2 fork sched_getaffinity"), (socket, "SOCK_NONBLOCK SOCK_CLOEXEC"):
    for name in names.split():
        module.__dict__.pop(name, None)
for name in "fcntl", "resource", "pwd", "ssl":
    sys.modules[name] = None
import selectors
selectors.DefaultSelector = selectors.SelectSelector
class NoIPv6(socket.socket):
    def __init__(self, *args, **words):
        if args[:1] == (socket.AF_INET6,):
            raise OSError(97, "Address family not supported by protocol")
        super().__init__(*args, **words)
socket.socket = NoIPv6
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

    def test_them_all(self):
        strange = os.path.join(self.folder, "a folder, voil\xe0")
        nowhere = os.path.join(self.folder, "read-only")
        os.mkdir(strange)
        os.mkdir(nowhere, 0o555)
        copy = shutil.copy(FILE, os.path.join(strange, "vaurien.py"))
        plain = {name: value for name, value in os.environ.items() if name not in ("HOME", "LANG", "LC_ALL", "PYTHONIOENCODING", "PYTHONUTF8")}
        garbage = os.pathsep.join([self.folder + "/nope", "\x01", FILE, strange])
        full = ["--log-output", "/dev/full"] if os.path.exists("/dev/full") else []
        ways = {
            "-OO": ([sys.executable, "-OO", FILE], {}), "-I": ([sys.executable, "-I", FILE], {}),
            "no site": ([sys.executable, "-S", "-E", FILE], {}),
            "locale C": ([sys.executable, copy], {"env": dict(plain, LC_ALL="C", PYTHONCOERCECLOCALE="0")}),
            "read-only, no home": ([sys.executable, copy], {"cwd": nowhere, "env": plain}),
            "PYTHONPATH": ([sys.executable, FILE], {"env": dict(os.environ, PYTHONPATH=garbage)}),
            "stdin closed": ([sys.executable, FILE], {"close": [0]}), "stdout closed": ([sys.executable, FILE], {"close": [1]}),
            "all closed": ([sys.executable, FILE], {"close": [0, 1, 2]}),
            "the disk is full": ([sys.executable, FILE, *full], {}),
            "bare": ([sys.executable, "-c", self.BARE, FILE], {})}
        if os.name != "posix":
            ways = {name: (words, more) for name, (words, more) in ways.items() if "close" not in more}
        with backend_server(echo) as (backend, _), contextlib.ExitStack() as stack:
            started = {}
            for name, (words, more) in ways.items():
                port, close = unused_port(), more.pop("close", ())
                if close:
                    more["preexec_fn"] = functools.partial(lambda numbers: [os.close(number) for number in numbers], close)
                words = [*words, "--local", "localhost:%d" % port, "--distant", "localhost:%d" % backend, "--behavior", "50:delay",
                         "--handlers.delay.sleep", "0.01", "--http", "--http-port", "0"]
                process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **more)
                stack.callback(process.stderr.close)
                stack.callback(process.wait)
                stack.callback(process.kill)
                started[name] = port, process
            for name, (port, process) in started.items():
                with self.subTest(name):
                    def listens():
                        self.assertIsNone(process.poll(), process.poll() is not None and process.stderr.read())
                        with contextlib.suppress(OSError):
                            connect(port).close()
                            return True
                    wait_until(listens)
                    with contextlib.closing(connect(port)) as sock:
                        for turn in range(10):
                            send_and_read(sock, random_data(1 + turn * 1000))
                    process.terminate()
                    err = process.communicate(timeout=PATIENCE)[1]
                    self.assertEqual(process.returncode, 0, err)
                    self.assertNotIn(b"Traceback", err)

    def test_outside_the_main_thread(self):
        """Where no signal can be caught."""
        with backend_server(echo) as (backend, _):
            port, loops = unused_port(), []

            class Loop(vaurien.Loop):
                def __init__(self):
                    super().__init__()
                    loops.append(self)
            with mock.patch.object(vaurien, "Loop", Loop), mock.patch.object(vaurien, "start_log"):
                thread = threading.Thread(target=vaurien.main, args=(["--local", "127.0.0.1:%d" % port, "--distant", "127.0.0.1:%d" % backend],))
                thread.start()
                wait_until(lambda: loops and loops[0].calls is not None and len(loops[0].watched) > 1)
                with contextlib.closing(connect(port)) as sock:
                    send_and_read(sock, b"question")
                loops[0].stop()
                thread.join(PATIENCE)
                self.assertFalse(thread.is_alive())


class TestOddUsers(TempDirTestCase):
    """What is odd about input, and about where words go."""

    def refused(self, *argv):
        err = io.StringIO()
        with contextlib.redirect_stderr(err):
            status = vaurien.main(list(argv))
        line, = err.getvalue().splitlines()
        self.assertTrue(line.isprintable(), line)
        return status, line

    def test_files(self):
        for text, words in [("[vaurien]\nhttp-token = x\n", "http-token is for http, which is not given"), ("[]", "has no proxy in it"),
                            ("[proxy:%s]\nlocal=:0\n" % ("x" * 300), "must be at most 255 characters"), ("[proxy:a\x1b[31m]\nlocal=:0\n", "and printable ones"),
                            ("[vaurien]\nlocal=:0\n[toxic:x]\ntype=error\nkind=abc\n", r"\[toxic:x\] kind 'abc' is for a protocol"),
                            ("[proxy:p]\nlocal=:0\nprotocol=redis\nbehavior=1:error\n[handler:error]\nkind=abc\n", r"\[proxy:p\] kind must be one of LOADING"),
                            ('[{"name": "a", "upstream": "x:1"}, {"name": "b", "upstream": "x"}]', "at proxy 2")]:
            status, line = self.refused("--config", self.write("v.ini", text))
            self.assertEqual(status, 2, line)
            self.assertRegex(line, words)

    def test_no_folder(self):
        os.mkdir("gone")
        os.chdir("gone")
        os.rmdir("../gone")
        status, line = self.refused("--behavior", "20:foo.bar")
        self.assertEqual(status, 2)
        self.assertIn("--behavior cannot import 'foo.bar'", line)

    def test_an_expression_that_python_warns_of(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            self.assertTrue(vaurien.check_match("[[a]").search(b"a"))

    def test_words_that_the_terminal_has_no_letters_for(self):
        for encoding in "ascii", "latin-1", "utf-8":
            out = io.TextIOWrapper(io.BytesIO(), encoding)
            vaurien.print_safe("voil\xe0 \u2603", out)
            self.assertIn(b"voil", out.buffer.getvalue())
        vaurien.print_safe("nobody hears", None)

    def test_an_exception_that_fails_to_say_what_it_is(self):
        class Mute(Exception):
            def __str__(self):
                raise ZeroDivisionError
        self.assertEqual((vaurien.format_exception(Mute()), vaurien.format_exception(ValueError("x"))), ("Mute", "ValueError: x"))

    def test_a_server_that_is_no_vaurien(self):
        for body in b"[" * 100000, b"{", b'{"x": 1}':
            def talk(sock, body=body):
                sock.recv(65536)
                sock.sendall(b"HTTP/1.0 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            with backend_server(talk) as (port, _):
                status, line = self.refused("ctl", "--host", "127.0.0.1:%d" % port, "get-handler")
                self.assertEqual(status, 1)
                self.assertIn("127.0.0.1:%d" % port, line)

    def test_no_ssl(self):
        with proxy_with_control() as (_, client), mock.patch.object(http.client, "HTTPSConnection", create=True):
            del http.client.HTTPSConnection
            self.assertEqual(client.get_handler(), "dummy")
            with self.assertRaisesRegex(ValueError, "scheme must be http or https"):
                vaurien.Client(scheme="https").get_handler()
            http.client.HTTPSConnection = None      # for the patch to undo


class TestSurroundings(unittest.TestCase):
    """What the proxy itself depends on fails, and comes back."""

    def test_a_backend_that_restarts(self):
        port = unused_port()
        with vaurien.Proxy("127.0.0.1:%d" % port, "127.0.0.1:0") as proxy:
            for _ in range(3):
                with connected_client(proxy) as sock:
                    self.assertEqual(read_until_close(sock)[0], 0)          # refused: the client is closed
                listener = listening_socket(port)
                with connected_client(proxy) as sock, contextlib.closing(listener):
                    backend, _ = listener.accept()
                    sock.sendall(b"question")
                    self.assertEqual(read_exactly(backend, 8), b"question")
                    backend.sendall(b"answer")
                    self.assertEqual(read_exactly(sock, 6), b"answer")
                    close_with_reset(backend)
                    self.assertEqual(read_until_close(sock)[2], "reset")
            self.assertEqual(proxy.failures, 3)

    def test_a_backend_that_moves(self):
        """Its name is asked for anew for each client."""
        with backend_server(lambda sock: sock.sendall(b"one")) as (one, _), backend_server(lambda sock: sock.sendall(b"two")) as (two, _):
            with vaurien.Proxy("moves.example:1", "127.0.0.1:0") as proxy:
                for port, wanted in (one, b"one"), (two, b"two"), (one, b"one"):
                    found = [(socket.AF_INET, ("127.0.0.1", port))]
                    with mock.patch.object(vaurien, "resolve", lambda *args, **words: found), connected_client(proxy) as sock:
                        self.assertEqual(read_exactly(sock, 3), wanted)

    def test_a_clock_that_jumps(self):
        with running_proxy(echo, "100:delay", options={"delay": {"sleep": 0.02}}) as proxy, connected_client(proxy) as sock:
            send_and_read(sock, b"question")
            for now in 0.0, 4e9, -1e9:
                with mock.patch.object(time, "time", lambda now=now: now):
                    began = time.monotonic()
                    send_and_read(sock, b"question")
                    self.assertGreaterEqual(time.monotonic() - began, 0.02)
            self.assertEqual([event.time for event in proxy.events][1:], [0.0, 4e9, -1e9])


class TestHypothesis(unittest.TestCase):
    """Bad input, by a tool that looks for what breaks: with VAURIEN_EXAMPLES=300."""

    def test_it(self):
        import hypothesis
        some = hypothesis.strategies
        settings = hypothesis.settings(max_examples=int(os.environ["VAURIEN_EXAMPLES"]), deadline=None, database=None,
                                       suppress_health_check=list(hypothesis.HealthCheck) if sys.version_info >= (3, 8) else [])
        values = some.recursive(some.none() | some.booleans() | some.integers() | some.floats() | some.text(),
                                lambda inner: some.lists(inner, max_size=3) | some.dictionaries(some.text(max_size=8), inner, max_size=3), max_leaves=8)
        control = vaurien.Control(("localhost", 0), vaurien.ProxyTable([], seed=1))

        def only_value_errors(check):
            def capture(text):
                with contextlib.suppress(ValueError):
                    check(text)
            return capture

        def table(value):
            with contextlib.suppress(vaurien.ToxiproxyError):
                vaurien.read_toxic(vaurien.read_json(json.dumps(value)), strict=True)
            with contextlib.suppress(vaurien.ToxiproxyError):
                vaurien.read_proxy(vaurien.read_json(json.dumps(value)))
            if isinstance(value, dict):
                with contextlib.suppress(vaurien.InputError):
                    vaurien.read_rules([value])

        def target(text):
            self.assertLess(vaurien.handle_request(control, "GET", "/" + text, b"").status, 500)

        def framing(data):
            for name, kind in vaurien.PROTOCOLS.items():
                for way in ("up", "down") if kind else ():
                    frames = getattr(kind(), way)
                    whole = frames.feed(data, len(data))
                    self.assertTrue(all(0 <= offset <= len(data) for offset, _ in whole), name)

        for check in vaurien.parse_address, vaurien.parse_behavior, vaurien.check_match, vaurien.parse_host, vaurien.check_names, vaurien.expand_env:
            hypothesis.given(some.text())(settings(only_value_errors(check)))()
        hypothesis.given(values)(settings(table))()
        hypothesis.given(some.text())(settings(target))()
        hypothesis.given(some.binary(max_size=300))(settings(framing))()


if "VAURIEN_EXAMPLES" not in os.environ:        # it takes its time
    del TestHypothesis


class TestFuzz(TempDirTestCase):
    """Random input: what comes out is what is documented, and nothing else."""

    WORDS = ["", " ", "localhost", ":", "80", "[::1]", "0.0.0.0", "-1", "99999", "1e999", "nan", "inf", "\0", "\n", "\xe0", "\u2603", "\ud800", "/", "%", "${X}",
             "20:delay", "error", ",", "{", "}", "[", "]", '"', "name", "percent", "match", "(", "null", "1" * 500, "x" * 10240, "=", "#", ";", "proxy:a", "vaurien",
             "handler:delay", "sleep", "toxic:t", "type", "latency", "local", "behavior", "?", "&", "proxies", "toxics", "true", "-", ".", "callable"]

    def text(self, generator):
        return "".join(generator.choice(self.WORDS) for _ in range(generator.randint(0, 8)))

    def test_addresses_behaviors_and_values(self):
        checks = [vaurien.parse_address, vaurien.parse_listener, vaurien.parse_behavior, vaurien.parse_host, vaurien.check_match, vaurien.check_names,
                  vaurien.check_token, vaurien.check_host, vaurien.check_file, vaurien.check_log_level, vaurien.check_yes_no, vaurien.check_count,
                  vaurien.check_percent, vaurien.check_port, vaurien.check_timeout, vaurien.check_toxicity, vaurien.expand_env, vaurien.check_protocol,
                  *(functools.partial(vaurien.check_option, name, option) for name, function in HANDLERS.items()
                    for option in vaurien.handler_options(function))]
        generator = random.Random(1)
        for _ in range(100):
            text = self.text(generator)
            for check in checks:
                try:
                    check(text)
                except ValueError as problem:
                    self.assertTrue(str(problem), check)
        for value in None, True, [], {}, -1, 1.5, float("nan"), float("inf"), -float("inf"), 10 ** 400, b"x":
            for check in checks[11:]:
                if check not in (vaurien.expand_env, vaurien.check_protocol):
                    with contextlib.suppress(ValueError):
                        check(value)

    def test_files(self):
        generator = random.Random(2)
        for _ in range(200):
            text = "\n".join(generator.choice(["[%s]", "%s", "%s = 1", "sleep = %s", "[proxy:%s]\nlocal = :0", "[handler:%s]", "[toxic:%s]", "behavior = %s"])
                             % self.text(generator) for _ in range(generator.randint(1, 5)))
            path = self.write("random.ini", text.encode("utf-8", "surrogatepass").decode("utf-8", "replace"))
            with contextlib.suppress(ValueError):
                vaurien.make_proxies(vaurien.read_arguments(["--config", path], vaurien.SETTINGS))

    def test_questions(self):
        proxies = vaurien.ProxyTable([], seed=1)
        proxies.loop = mock.Mock(full=lambda: "closed for the test", call=lambda function, *args: function(*args))
        control = vaurien.Control(("localhost", 0), proxies)
        generator, seen = random.Random(3), Counter()
        paths = list(vaurien.ROUTES)
        for _ in range(2000):
            path = generator.choice(paths)
            if generator.random() < 0.5:
                path = path.replace("PROXY", self.text(generator)).replace("TOXIC", self.text(generator)) + "?" + self.text(generator)
            body = self.text(generator) if generator.random() < 0.3 else json.dumps({
                generator.choice(["name", "listen", "upstream", "toxics", "type", "enabled", "percent", "rules", "backend", self.text(generator)]):
                generator.choice([self.text(generator), -1, 1e308, 10 ** 30, None, True, [], [{}], {"a": []}]) for _ in range(generator.randint(0, 4))})
            headers = {generator.choice(["Host", "Origin", "User-Agent", "Authorization", "Sec-Fetch-Site"]): self.text(generator)} if generator.random() < 0.1 else {}
            answer = vaurien.handle_request(control, generator.choice(["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", self.text(generator)]), path,
                                     body.encode("utf-8", "surrogatepass"), headers)
            seen[answer.status] += 1
            if answer.status == 500:
                self.assertIn("closed for the test", answer.text + body)
        self.assertLess({200, 400, 403, 404, 405}, set(seen) | {200})



# -- Soak: python3 test_vaurien.py soak [--seconds N] [--seed N] -----------------------
#
# Random conversations through random chains of faults that come, change and go meanwhile. What
# arrives is what was sent, from its beginning, in order, once; all of it, where no fault has cut the
# connection. What is done is drawn from the seed, so that it can be done again.

KEEPING = {"dummy": {}, "delay": {"sleep": 0.01}, "latency": {"latency": 20, "jitter": 20}, "bandwidth": {"rate": 20000},
           "slicer": {"average_size": 2000, "size_variation": 1000, "delay": 50}, "slow_close": {"delay": 20}, "hang": {}, "noop": {}}
CUTTING = {"blackout": {}, "abort": {}, "timeout": {"timeout": 30}, "reset_peer": {"timeout": 20}, "limit_data": {"bytes": 100000}}
MOST = 1 << 21              # bytes of one way of a conversation


class SoakProxy(vaurien.Proxy):
    """A proxy that remembers which faults a connection that has ended had met."""

    def __init__(self, *args, **words):
        super().__init__(*args, **words)
        self.met = {}

    def ended(self, connection, how):
        super().ended(connection, how)
        self.met[connection.name] = set(connection.faults or ()), how


class Soak:
    """What both ends of a conversation do is drawn from its number."""

    def __init__(self, seed):
        self.seed = seed
        self.pool = random_data(MOST, seed)
        self.match_buffer = {}             # {number: (bytes, "eof" or "reset")} of the backend
        self.count = Counter()
        self.problems = []

    def plan(self, number, side):
        """(the bytes that a side says, in such pieces, and whether it resets in the end)."""
        generator = random.Random("%d %d %s" % (self.seed, number, side))
        size = generator.randint(0, generator.choice([0, 1, 100, 5000, 100000, MOST if generator.random() < 0.1 else 300000]))
        start = generator.randint(0, MOST - size)
        return self.pool[start:start + size], generator, generator.random() < 0.1

    def talk(self, sock, number, side):
        """Say what is planned, and hear the other; returns (bytes, how it ended)."""
        said, generator, resets = self.plan(number, side)
        heard, at, takes, pause = bytearray(), 0, generator.choice([100, 4096, 1 << 18]), 0.0
        sock.setblocking(False)
        try:
            while True:
                speaks = at is not None and time.monotonic() >= pause
                readable, writable, _ = select.select([sock], [sock] * speaks, [], PATIENCE * 4 if speaks or at is None else 0.001)
                if writable and at < len(said):
                    at += sock.send(said[at:at + generator.randint(1, generator.choice([10, 1000, 1 << 18]))])
                    if generator.random() < 0.1:
                        pause = time.monotonic() + generator.random() / 100
                elif writable and resets:
                    close_with_reset(sock)
                    return bytes(heard), "reset"
                elif writable:
                    sock.shutdown(socket.SHUT_WR)
                    at = None
                if readable:
                    data = sock.recv(takes)
                    if not data:
                        break
                    heard += data
                elif (speaks or at is None) and not writable:
                    return bytes(heard), "late"
            sock.settimeout(PATIENCE)
            while at is not None and at < len(said):        # the other has said all, and still hears
                sock.sendall(said[at:])
                at = len(said)
            if at is not None and resets:
                close_with_reset(sock)
            elif at is not None:
                sock.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            return bytes(heard), "late"
        except OSError:
            return bytes(heard), "reset"
        return bytes(heard), "eof"

    def backend(self, sock):
        with contextlib.suppress(OSError, EOFError):
            number = struct.unpack(">Q", read_exactly(sock, 8))[0]
            self.match_buffer[number] = self.talk(sock, number, "backend")

    def converse(self, proxy, number):
        with contextlib.closing(connect(proxy.port)) as sock:
            name = vaurien.format_address(sock.getsockname())
            with contextlib.suppress(OSError):
                sock.sendall(struct.pack(">Q", number))
            answer = self.talk(sock, number, "client")
        wait_until(lambda: name in proxy.met)
        faults, how = proxy.met.pop(name)
        cut = faults & set(CUTTING)
        resets = self.plan(number, "client")[2] or self.plan(number, "backend")[2]
        if not cut and not resets:
            wait_until(lambda: number in self.match_buffer)
        question = self.match_buffer.pop(number, (b"", "eof"))
        for side, (found, end), other in ("client", answer, "backend"), ("backend", question, "client"):
            wanted = self.plan(number, other)[0]
            whole = found == wanted and end == "eof"
            if end == "late" or not wanted.startswith(found) or not (whole or cut or resets):
                self.problems.append("conversation %d: the %s heard %d of %d bytes (%s, first difference at %s), faults %s, ended: %s" % (
                    number, side, len(found), len(wanted), end, next((at for at, pair in enumerate(zip(found, wanted)) if pair[0] != pair[1]), "none"),
                    sorted(faults), how))
            self.count["bytes"] += len(found)
        self.count["conversations"] += 1
        self.count["cut"] += bool(cut)
        self.count["reset"] += resets

    def chain(self, generator):
        """Toxics, drawn: mostly such that keep all bytes."""
        toxics = []
        for number in range(generator.choice([0, 0, 1, 1, 2, 3, 4])):
            kinds = CUTTING if generator.random() < 0.1 else KEEPING
            kind = generator.choice(sorted(kinds))
            attributes = {name: type(value)(value * generator.random() * 2) for name, value in kinds[kind].items()}
            attributes.update({name: max(1, attributes[name]) for name in ("rate", "average_size") if name in attributes})
            stream = "both" if kind in ("blackout", "abort", "hang", "delay", "dummy") else generator.choice(["upstream", "downstream", "both"])
            toxics.append(vaurien.Toxic(kind, "%s %d" % (kind, number), generator.choice([0.2, 1.0]), attributes, stream,
                                        per=generator.choice(["connection", "request"]), after=generator.choice([0, 0, 3]),
                                        times=generator.choice([0, 0, 5])))
        return toxics

    def run(self, seconds, workers=8, **words):
        """For so many seconds; returns what there was to complain about."""
        generator, numbers, over = random.Random(self.seed), iter(range(1, 1 << 60)), threading.Event()
        with backend_server(self.backend) as (port, _), SoakProxy("127.0.0.1:%d" % port, "127.0.0.1:0", seed=self.seed, **words) as proxy:
            def work():
                while not over.is_set() and not self.problems:
                    try:
                        self.converse(proxy, next(numbers))
                    except Exception as problem:
                        self.problems.append(repr(problem))
            threads = [threading.Thread(target=work, daemon=True) for _ in range(workers)]
            for thread in threads:
                thread.start()
            end = time.monotonic() + seconds
            while time.monotonic() < end and not self.problems:
                proxy.loop.run_sync(proxy.set_toxics, self.chain(generator))
                self.count["chains"] += 1
                over.wait(generator.random() / 20)
            over.set()
            proxy.loop.run_sync(proxy.set_toxics, [])
            for thread in threads:
                thread.join(8 * PATIENCE)
            wait_until(lambda: not proxy.connections)
            held = proxy.loop.run_sync(lambda: (proxy.loop.budget.held, proxy.loop.budget.pipes, len(proxy.loop.watched), len(proxy.loop.timers)))
            if held != (0, 0, 2, 0):
                self.problems.append("left: %r bytes held, pipes, sockets watched, alarms" % (held,))
        return self.problems


class TestSoak(unittest.TestCase):

    def test_a_moment_of_it(self):
        for seed, splices in (1, vaurien.HAVE_SPLICE), (2, False):
            with mock.patch.object(vaurien, "HAVE_SPLICE", splices):
                soak = Soak(seed)
                self.assertEqual(soak.run(0.5), [])
                self.assertGreater(soak.count["conversations"], 5)

    def test_a_byte_that_is_wrong_is_seen(self):
        def spoil(state, t, to, data):
            if len(data) > 1000:
                data = data[:500] + bytes([data[500] ^ 1]) + data[501:]
            yield t, to, data

        with registered(spoil), mock.patch.dict(KEEPING, {"noop": {}}), mock.patch.object(Soak, "chain", lambda self, generator: [vaurien.Toxic("spoil", "x")]):
            self.assertRegex(Soak(1).run(PATIENCE)[0], "first difference at 500|first difference at [0-9]+")

    def test_a_byte_that_is_lost_is_seen(self):
        def lose(state, t, to, data):
            yield t, to, data[:-1] if len(data) > 1 else data

        with registered(lose), mock.patch.object(Soak, "chain", lambda self, generator: [vaurien.Toxic("lose", "x")]):
            self.assertTrue(Soak(1).run(PATIENCE))


def soak_from(argv):
    """The status of a soak, as long as one likes."""
    import argparse
    parser = argparse.ArgumentParser(prog="test_vaurien.py soak")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(32))
    said = parser.parse_args(argv)
    setUpModule()
    soak = Soak(said.seed)
    print("soak, %g s, seed %d" % (said.seconds, said.seed), flush=True)
    problems = soak.run(said.seconds)
    print("%(conversations)d conversations, %(bytes)d bytes heard, %(chains)d chains of faults; %(cut)d were cut by a fault, %(reset)d by a peer"
          % soak.count)
    print("\n".join(problems) or "every byte accounted for")
    return 1 if problems else 0


# -- Real clients of Toxiproxy -------------------------------------------------------

class TestToxiproxyClients(ToxiproxyTestCase):
    """The clients that people have drive this server instead."""

    def test_python(self):
        """toxiproxy-python, from PyPI."""
        toxiproxy, theirs = import_package("toxiproxy"), import_package("toxiproxy.exceptions")
        server = toxiproxy.Toxiproxy()
        server.update_api_consumer("127.0.0.1", self.port)
        self.assertTrue(server.running())
        self.assertIn(b"version", server.version())
        upstream, _ = self.backend()
        proxy = server.create(upstream=upstream, name="p")
        port = int(proxy.listen.split(":")[1])
        send_and_read(self.connect(port), b"question")
        with self.assertRaises(theirs.ProxyExists):
            toxiproxy.api.APIConsumer.call_soon_threadsafe("/proxies", json={"name": "p", "upstream": upstream})
        proxy.add_toxic(type="latency", attributes={"latency": 50})
        self.assertEqual(proxy.get_toxic("latency_downstream").attributes, {"latency": 50, "jitter": 0})
        began = time.monotonic()
        send_and_read(self.connect(port), b"question")
        self.assertGreaterEqual(time.monotonic() - began, 0.05)
        with self.assertRaises(theirs.InvalidToxic):
            proxy.add_toxic(type="nope")
        with proxy.down(), self.assertRaises(ConnectionRefusedError):
            connect(port)
        proxy.disable()
        server.reset()
        self.assertEqual(proxy.toxics(), {})
        send_and_read(self.connect(port), b"question")
        proxy.add_toxic(type="noop", stream="upstream")
        self.assertTrue(proxy.destroy_toxic("noop_upstream"))
        made = server.populate([{"name": "a", "upstream": upstream, "listen": "127.0.0.1:0"}])
        send_and_read(self.connect(int(made[0].listen.split(":")[1])), b"question")
        self.assertEqual(set(server.proxies()), {"p", "a"})
        server.destroy_all()
        self.assertEqual(server.proxies(), {})
        with self.assertRaises(theirs.NotFound):
            proxy.destroy()

    NODE = """
        const assert = require("assert");
        const {Toxiproxy} = require("toxiproxy-node-client");
        (async () => {
            const server = new Toxiproxy(process.argv[2]), upstream = process.argv[3];
            assert.match(await server.getVersion(), /version/);
            const proxy = await server.createProxy({name: "p", listen: "localhost:0", upstream});
            const kinds = {latency: {latency: 1000, jitter: 100}, bandwidth: {rate: 1000}, slow_close: {delay: 1000},
                timeout: {timeout: 5000}, slicer: {average_size: 1000, delay: 1000, size_variation: 1000},
                reset_peer: {timeout: 1000}, limit_data: {bytes: 42}};
            for (const type in kinds) {
                const toxic = await proxy.addToxic({type, attributes: kinds[type]});
                assert.deepEqual(toxic.attributes, kinds[type]);
                assert.deepEqual((await proxy.getToxic(toxic.name)).toJson(), toxic.toJson());
                const changed = await toxic.update({toxicity: 0.5, attributes: {}});
                assert.deepEqual([changed.toxicity, changed.attributes], [0.5, kinds[type]]);
                await changed.remove();
            }
            await assert.rejects(server.createProxy({name: "p", listen: "localhost:0", upstream}), /status code 409/);
            await assert.rejects(proxy.getToxic("latency_downstream"), /status code 404/);
            assert.equal((await proxy.update({enabled: false, listen: proxy.listen, upstream})).enabled, false);
            const moved = await proxy.update({enabled: true, listen: proxy.listen, upstream: "somehost:12345"});
            assert.deepEqual([moved.enabled, moved.upstream], [true, "somehost:12345"]);
            const both = await server.populate([{name: "a", listen: "127.0.0.1:0", upstream}, {name: "b", listen: "127.0.0.1:0", upstream}]);
            assert.deepEqual(Object.keys(both), ["a", "b"]);
            await server.reset();
            const all = await server.getAll();
            assert.deepEqual(Object.keys(all), ["a", "b", "p"]);
            for (const name in all) { await all[name].remove(); }
            console.log("done");
        })().catch(problem => { console.error(problem); process.exit(1); });
    """

    def test_node(self):
        """toxiproxy-node-client, from npm: where NODE_PATH says, or here."""
        node = shutil.which("node")
        if not node or subprocess.call([node, "-e", "require('toxiproxy-node-client'); fetch"],
                                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
            raise unittest.SkipTest("no toxiproxy-node-client")
        upstream, _ = self.backend()
        said = subprocess.check_output([node, "-", "http://127.0.0.1:%d" % self.port, upstream], input=self.NODE,
                                       universal_newlines=True, timeout=PATIENCE, stderr=subprocess.STDOUT)
        self.assertEqual(said, "done\n")


# -- Real servers, with their real drivers -----------------------------------------

def find_program(*names):
    """The path of a program, in the places where servers are put; or None."""
    places = [os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"]
    places += sorted(glob.glob("/usr/lib/postgresql/*/bin"), reverse=True)
    return next(filter(None, (shutil.which(name, path=os.pathsep.join(places))
                              for name in names)), None)


def run_as(name):
    """Words for Popen: as root, run as that user, whom the folder is given to."""
    if os.name != "posix" or os.getuid() != 0:
        return {}
    user = pwd.getpwnam(name)

    def become():
        os.setgroups([])
        os.setgid(user.pw_gid)
        os.setuid(user.pw_uid)
    return {"preexec_fn": become}


LARGE = 36 << 20        # bytes: more than two of MySQL's largest packets


class RealServer:
    """What holds for every backend: its real server, its real driver, the proxy between.

    A subclass starts the server, connects with the driver, and says what the driver
    raises when the connection is lost, and when no answer comes in time.
    """

    size = 32 << 20
    framed = 4 << 20        # of a value that passes its protocol
    reconnects = False      # whether the driver does so after an error

    @classmethod
    def setUpClass(cls):
        cls.driver = cls.import_driver()
        cls.folder = tempfile.mkdtemp()
        cls.process = None
        try:
            for _ in range(3):                  # somebody else may have got the port
                cls.port = unused_port()
                cls.process = cls.start_server()
                if cls.answers():
                    return
                cls.stop_server()
            raise AssertionError("%s does not answer" % cls.__name__)
        except BaseException:
            cls.tearDownClass()
            raise

    @classmethod
    def tearDownClass(cls):
        cls.stop_server()
        shutil.rmtree(cls.folder, ignore_errors=True)

    @classmethod
    def stop_server(cls):
        if cls.process:
            cls.process.kill()
            cls.process.wait()

    @classmethod
    def import_driver(cls):
        return import_package(cls.driver_name)

    @classmethod
    def answers(cls):
        deadline = time.monotonic() + PATIENCE
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
    def popen(cls, *argv, **words):
        if not argv[0]:
            raise unittest.SkipTest("%s: no server" % cls.__name__)
        return subprocess.Popen(argv, cwd=cls.folder, stdin=subprocess.DEVNULL,
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **words)

    def proxy(self, behavior="100:dummy", protocol="tcp", **options):
        proxy = vaurien.Proxy("127.0.0.1:%d" % self.port, "127.0.0.1:0", behavior, options, protocol=protocol, seed=1)
        proxy.__enter__()
        self.addCleanup(proxy.__exit__)
        return proxy

    def client(self, proxy, timeout=PATIENCE):
        client = self.connect(proxy.port, timeout)
        self.addCleanup(self.disconnect, client)
        return client

    @staticmethod
    def disconnect(client):
        with contextlib.suppress(Exception):
            client.close()

    def test_a_few_hundred_queries_pass(self):
        client = self.client(self.proxy())
        for number in range(300):
            self.assertEqual(self.query(client, number), number)

    def test_a_few_hundred_queries_pass_on_the_road_of_faults(self):
        client = self.client(self.proxy("100:delay", delay={"sleep": 0.0}))
        for number in range(300):
            self.assertEqual(self.query(client, number), number)

    def test_a_large_value_passes_byte_for_byte(self):
        data = random_data(self.size, 7)
        client = self.client(self.proxy("100:delay", delay={"sleep": 0.001}))
        self.assertTrue(self.transfer(client, data) == data)       # no diff of 32 MiB, please

    def test_its_protocol_passes_everything(self):
        for behavior in "100:dummy", "0:hang":
            client = self.client(self.proxy(behavior, self.protocol))
            for number in range(200):
                self.assertEqual(self.query(client, number), number)
        data = random_data(self.framed, 7)
        self.assertTrue(self.transfer(client, data) == data)

    def test_errors_are_the_servers_to_the_driver(self):
        """The driver's own class for it, and the next query on the same connection works."""
        for kind, name, words in self.errors:
            proxy = self.proxy(protocol=self.protocol)
            client = self.client(proxy)
            self.query(client, 1)
            with self.subTest(kind), proxy.handler("error", kind=kind):
                with self.assertRaises(self.error_class(name)) as caught:
                    self.query(client, 2)
                self.assertIn(words, str(caught.exception))
                self.assertIs(type(caught.exception), self.error_class(name))
            self.assertEqual(self.query(client, 3), 3)
            self.assertEqual(proxy.accepted, 1 + self.reconnects)

    def test_errors_that_close(self):
        for kind, name, words in self.endings:
            proxy = self.proxy(protocol=self.protocol)
            client = self.client(proxy)
            self.query(client, 1)
            with self.subTest(kind), proxy.handler("error", kind=kind):
                with self.assertRaises(self.error_class(name)) as caught:
                    self.query(client, 2)
                self.assertIn(words, str(caught.exception))
            self.assertEqual(self.query(self.client(proxy), 3), 3)

    def test_errors_when_connecting(self):
        for kind, name, words in self.greetings:
            proxy = self.proxy(protocol=self.protocol)
            with self.subTest(kind), proxy.handler("error", kind=kind):
                with self.assertRaises(self.error_class(name)) as caught:
                    self.query(self.client(proxy), 2)
                self.assertIn(words, str(caught.exception))
            self.assertEqual(self.query(self.client(proxy), 3), 3)

    def test_it_fails_twice_and_then_succeeds(self):
        kind, name, _ = self.errors[0]
        proxy = self.proxy(protocol=self.protocol)
        client = self.client(proxy)
        self.query(client, 1)
        with proxy.handler("transient", agitate=2, kind=kind):
            for _ in range(2):
                with self.assertRaises(self.error_class(name)):
                    self.query(client, 2)
            self.assertEqual(self.query(client, 3), 3)

    def error_class(self, name):
        """The first of these, separated by slashes, that this version of the driver has."""
        for path in name.split("/"):
            module, _, name = ("%s.%s" % (self.driver_name, path)).rpartition(".")
            with contextlib.suppress(AttributeError):
                return getattr(importlib.import_module(module), name)

    def test_blackout_is_a_lost_connection_to_the_driver(self):
        proxy = self.proxy()
        client = self.client(proxy)
        self.query(client, 1)
        set_behavior(proxy, "100:blackout")
        with self.assertRaises(self.lost):
            self.query(client, 2)
        with self.assertRaises(self.lost):
            self.query(self.client(proxy), 3)
        self.assertGreaterEqual(proxy.faults["blackout"], 2)

    def test_delay_delays(self):
        proxy = self.proxy()
        client = self.client(proxy)
        self.query(client, 1)
        set_behavior(proxy, "100:delay", delay={"sleep": 0.1})
        began = time.monotonic()
        self.assertEqual(self.query(client, 2), 2)
        self.assertGreaterEqual(time.monotonic() - began, 0.1)

    def test_hang_runs_into_the_time_out_of_the_driver(self):
        proxy = self.proxy()
        client = self.client(proxy, timeout=0.3)
        self.query(client, 1)
        set_behavior(proxy, "100:hang")
        with self.assertRaises(self.late):
            self.query_in_time(client, proxy)
        set_behavior(proxy, "100:dummy")
        self.assertEqual(self.query(self.client(proxy), 3), 3)

    def query_in_time(self, client, proxy):
        return self.query(client, 2)

    def test_what_hangs_heals_when_the_fault_is_removed(self):
        proxy, answers = self.proxy(), []
        client = self.client(proxy)
        self.query(client, 1)
        set_behavior(proxy, "100:hang")
        thread = threading.Thread(target=lambda: answers.append(self.query(client, 2)))
        thread.start()
        wait_until(lambda: proxy.loop.budget.held)
        self.assertEqual(answers, [])
        set_behavior(proxy, "100:dummy")
        thread.join(PATIENCE)
        self.assertEqual(answers, [2])
        self.assertEqual(self.query(client, 3), 3)


class TestHTTP(RealServer, unittest.TestCase):
    driver_name = "http.client"
    protocol = "http"
    size = framed = LARGE
    reconnects = True
    errors = [(kind, "HTTPException", kind) for kind in ("500", "502", "503", "504", "429")]
    endings = greetings = []
    lost = (ConnectionError, http.client.BadStatusLine)
    late = socket.timeout

    @classmethod
    def start_server(cls):
        for number in range(300):
            with open(os.path.join(cls.folder, str(number)), "w") as file:
                file.write(str(number))
        with open(os.path.join(cls.folder, "large"), "wb") as file:
            file.write(random_data(cls.size, 7))
        return cls.popen(sys.executable, "-W", "ignore", "-m", "http.server", str(cls.port),
                         "--bind", "127.0.0.1")

    @classmethod
    def connect(cls, port, timeout=PATIENCE):
        return http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)

    @classmethod
    def query(cls, client, number):
        client.request("GET", "/%d" % number)
        answer = client.getresponse()
        text = answer.read()
        if answer.status != 200:
            raise http.client.HTTPException("%d %s" % (answer.status, answer.reason))
        return int(text)

    def transfer(self, client, data):
        client.request("GET", "/large")
        return client.getresponse().read()


class TestRedis(RealServer, unittest.TestCase):
    driver_name = "redis"
    protocol = "redis"
    errors = [("OOM", "exceptions.OutOfMemoryError/exceptions.ResponseError", "maxmemory"), ("READONLY", "exceptions.ReadOnlyError", "read only replica"),
              ("BUSY", "exceptions.ResponseError", "BUSY Redis is busy running a script"), ("NOREPLICAS", "exceptions.ResponseError", "NOREPLICAS")]
    endings = [("LOADING", "exceptions.BusyLoadingError", "loading the dataset")]     # this driver closes then
    greetings = [("MAXCLIENTS", "exceptions.ConnectionError", "max number of clients")]

    @property
    def lost(self):
        return self.driver.exceptions.ConnectionError

    @property
    def late(self):
        return self.driver.exceptions.TimeoutError

    @classmethod
    def start_server(cls):
        return cls.popen(find_program("redis-server"), "--port", str(cls.port), "--bind",
                         "127.0.0.1", "--save", "", "--dir", cls.folder)

    @classmethod
    def connect(cls, port, timeout=PATIENCE):
        from redis.backoff import NoBackoff
        from redis.retry import Retry
        return cls.driver.Redis("127.0.0.1", port, socket_timeout=timeout,
                                retry=Retry(NoBackoff(), 0))

    @classmethod
    def query(cls, client, number):
        client.set("key", number)
        return int(client.get("key"))

    def transfer(self, client, data):
        client.set("large", data)
        return client.get("large")

    def test_a_pipeline_fails_exactly_where_it_was_drawn(self):
        proxy = self.proxy(protocol="redis")
        client = self.client(proxy)
        client.flushall()
        with proxy.handler("error", percent=20, kind="OOM"):
            pipeline = client.pipeline(transaction=False)
            for number in range(100):
                pipeline.set("n%d" % number, number)
            found = pipeline.execute(raise_on_error=False)
        failed = [number for number, answer in enumerate(found) if isinstance(answer, Exception)]
        first = min(event.request for event in proxy.events) - failed[0]
        self.assertEqual([event.request - first for event in proxy.events], failed)
        self.assertTrue(5 < len(failed) < 40)
        self.assertEqual([number for number in range(100) if client.get("n%d" % number) is None], failed)

    def test_a_command_that_fails_in_a_transaction(self):
        proxy = self.proxy(protocol="redis")
        client = self.client(proxy)
        client.delete("m")
        with proxy.handler("error", kind="OOM", match="(?i)^set m"):
            pipeline = client.pipeline(transaction=True)
            pipeline.set("k", 1)
            pipeline.set("m", 1)
            with self.assertRaises(self.driver.exceptions.ResponseError):
                pipeline.execute()
        self.assertIsNone(client.get("m"))
        self.assertEqual(self.query(client, 5), 5)

    def test_subscriptions_pass(self):
        client = self.client(self.proxy("0:hang", "redis"))
        listener = client.pubsub()
        self.addCleanup(listener.close)
        listener.subscribe("here")
        self.assertEqual(listener.get_message(timeout=PATIENCE)["type"], "subscribe")
        client.publish("here", "hello")
        self.assertEqual(listener.get_message(timeout=PATIENCE)["data"], b"hello")


class TestMemcached(RealServer, unittest.TestCase):
    driver_name = "pymemcache"
    protocol = "memcache"
    reconnects = True
    errors = [("SERVER_ERROR", "exceptions.MemcacheServerError", "out of memory"), ("OUT_OF_MEMORY", "exceptions.MemcacheServerError", "storing object"),
              ("CLIENT_ERROR", "exceptions.MemcacheClientError", "bad data chunk")]
    endings = []
    greetings = [("TOO_MANY", "exceptions.MemcacheUnknownCommandError", "")]
    late = socket.timeout

    @property
    def lost(self):
        return (ConnectionError, self.driver.exceptions.MemcacheUnexpectedCloseError)

    @classmethod
    def start_server(cls):
        return cls.popen(find_program("memcached"), "-p", str(cls.port), "-l", "127.0.0.1", "-U",
                         "0", "-I", "128m", "-m", "1024", *["-u", "nobody"] * (os.getuid() == 0))

    @classmethod
    def connect(cls, port, timeout=PATIENCE):
        return cls.driver.Client(("127.0.0.1", port), connect_timeout=timeout, timeout=timeout)

    @classmethod
    def query(cls, client, number):
        client.set("key", str(number), noreply=False)
        return int(client.get("key"))

    def transfer(self, client, data):
        client.set("large", data, noreply=False)
        return client.get("large")


class TestPostgreSQL(RealServer, unittest.TestCase):
    driver_name = "psycopg"
    protocol = "postgres"
    errors = [("40P01", "errors.DeadlockDetected", "deadlock detected"), ("57014", "errors.QueryCanceled", "statement timeout"),
              ("40001", "errors.SerializationFailure", "could not serialize"), ("53100", "errors.DiskFull", "No space left")]
    endings = [("57P01", "OperationalError", "administrator command"), ("57P05", "OperationalError", "idle-session")]
    greetings = [("53300", "OperationalError", "too many clients"), ("57P03", "OperationalError", "starting up")]

    @property
    def lost(self):
        return self.driver.OperationalError

    late = lost

    @classmethod
    def start_server(cls):
        if not find_program("initdb"):
            raise unittest.SkipTest("no PostgreSQL server")
        user = run_as("postgres")
        data = os.path.join(cls.folder, "data%d" % cls.port)
        if user:
            shutil.chown(cls.folder, "postgres")
        cls.popen(find_program("initdb"), "-D", data, "-A", "trust", "-U", "postgres", "--no-sync",
                  "-E", "UTF8", "--locale=C", **user).wait(PATIENCE)
        return cls.popen(find_program("postgres"), "-D", data, "-p", str(cls.port), "-h",
                         "127.0.0.1", "-k", cls.folder, "-c", "fsync=off", **user)

    @classmethod
    def connect(cls, port, timeout=PATIENCE):
        return cls.driver.connect(host="127.0.0.1", port=port, user="postgres", dbname="postgres",
                                  connect_timeout=max(2, int(timeout)), autocommit=True,
                                  sslmode="disable", gssencmode="disable")

    @classmethod
    def query(cls, client, number):
        return client.execute("SELECT %s::int", (number,)).fetchone()[0]

    def query_in_time(self, client, proxy):
        # The time-out that this driver has is for connecting, 2 seconds at least.
        self.connect(proxy.port, 2)

    def transfer(self, client, data):
        return client.execute("SELECT %b::bytea", (data,), binary=True).fetchone()[0]

    def test_a_transaction_fails_as_a_whole(self):
        proxy = self.proxy(protocol="postgres")
        client = self.client(proxy)
        client.execute("DROP TABLE IF EXISTS t")
        client.execute("CREATE TABLE t (i int)")
        for query, values in ("INSERT INTO t VALUES (2)", None), ("INSERT INTO t VALUES (%s)", (2,)):
            client.execute("BEGIN")
            client.execute("INSERT INTO t VALUES (1)")
            with proxy.handler("error", kind="40001", match="^INSERT"), self.assertRaises(self.driver.errors.SerializationFailure):
                client.execute(query, values)
            with self.assertRaises(self.driver.errors.InFailedSqlTransaction):
                client.execute("SELECT 1")
            client.execute("ROLLBACK")
            self.assertEqual(client.execute("SELECT count(*) FROM t").fetchone()[0], 0)

    def test_prepared_statements_match_by_their_text(self):
        proxy = self.proxy(protocol="postgres")
        client = self.client(proxy)
        for number in range(8):                     # prepared from the sixth on
            self.query(client, number)
        with proxy.handler("error", kind="57014", match=r"^SELECT \$1::int"):
            with self.assertRaises(self.driver.errors.QueryCanceled):
                self.query(client, 8)
            self.assertEqual(client.execute("SELECT 1").fetchone(), (1,))
        self.assertEqual(self.query(client, 9), 9)

    def test_a_pipeline_fails_exactly_where_it_was_drawn(self):
        proxy = self.proxy(protocol="postgres")
        if not hasattr(self.driver, "Pipeline") or not self.driver.Pipeline.is_supported():
            client = self.connect_pg8000(proxy.port)    # this driver has none: another one, query by query
            failed = []
            with proxy.handler("error", kind="40001", percent=20):
                for number in range(40):
                    try:
                        self.assertEqual(client.run("SELECT cast(:v as int)", v=number), [[number]])
                    except Exception as problem:
                        self.assertIn("40001", str(problem))
                        failed.append(number)
            self.assertEqual(len(proxy.events), len(failed))
            return
        client = self.client(proxy)
        client.execute("DROP TABLE IF EXISTS t")
        client.execute("CREATE TABLE t (i int)")
        failed = []
        with proxy.handler("error", kind="40001", percent=20), client.pipeline() as pipeline:
            for number in range(40):
                client.cursor().execute("INSERT INTO t VALUES (%s)", (number,))
                try:
                    pipeline.sync()
                except self.driver.errors.SerializationFailure:
                    failed.append(number)
        there = {row[0] for row in client.execute("SELECT i FROM t").fetchall()}
        self.assertEqual(len(proxy.events), 40 - len(there))
        self.assertTrue(2 < len(proxy.events) < 20)
        self.assertTrue(failed)

    def connect_pg8000(self, port):
        import pg8000.native
        client = pg8000.native.Connection("postgres", host="127.0.0.1", port=port)
        self.addCleanup(self.disconnect, client)
        return client

    def test_another_driver(self):
        import pg8000.exceptions
        proxy = self.proxy(protocol="postgres")
        client = self.connect_pg8000(proxy.port)
        for query, words in ("SELECT 1", {}), ("SELECT cast(:v as int)", {"v": 1}):
            self.assertEqual(client.run(query, **words), [[1]])
            with proxy.handler("error", kind="40P01"):
                with self.assertRaises(pg8000.exceptions.DatabaseError) as caught:
                    client.run(query, **words)
                self.assertIn("deadlock detected", str(caught.exception))
            self.assertEqual(client.run(query, **words), [[1]])

    def test_copy_passes(self):
        proxy = self.proxy(protocol="postgres")
        client = self.client(proxy)
        client.execute("DROP TABLE IF EXISTS t")
        client.execute("CREATE TABLE t (i int)")
        with proxy.handler("error", match="^nothing"):
            with client.cursor().copy("COPY t FROM STDIN") as copy:
                for number in range(1000):
                    copy.write_row([number])
            with client.cursor().copy("COPY t TO STDOUT") as copy:
                self.assertEqual(sum(bytes(data).count(b"\n") for data in copy), 1000)


class TestMariaDB(RealServer, unittest.TestCase):
    driver_name = "pymysql"
    protocol = "mysql"
    framed = LARGE
    errors = [("1213", "err.OperationalError", "1213, 'Deadlock found"), ("1205", "err.OperationalError", "1205, 'Lock wait timeout"),
              ("1290", "err.OperationalError", "--read-only"), ("1969", "err.OperationalError", "max_statement_time")]
    endings = [("1053", "err.OperationalError", "1053, 'Server shutdown in progress'"), ("1927", "err.OperationalError", "Connection was killed")]
    greetings = [("1040", "err.OperationalError", "ny connections"), ("1129", "err.OperationalError", "connection errors; unblock")]

    @property
    def lost(self):
        return self.driver.err.OperationalError

    late = lost

    @classmethod
    def start_server(cls):
        install = find_program("mariadb-install-db", "mysql_install_db")
        if not install:
            raise unittest.SkipTest("no MariaDB server")
        data = os.path.join(cls.folder, "data%d" % cls.port)
        user = ["--user=root"] * (os.getuid() == 0)
        cls.popen(install, "--no-defaults", "--datadir=" + data, "--skip-test-db",
                  "--auth-root-authentication-method=normal", *user).wait(PATIENCE * 2)
        return cls.popen(find_program("mariadbd", "mysqld"), "--no-defaults", "--datadir=" + data,
                         "--port=%d" % cls.port, "--bind-address=127.0.0.1",
                         "--socket=" + os.path.join(cls.folder, "s"), "--pid-file=" + data + ".pid",
                         "--max-allowed-packet=256M", "--innodb-flush-log-at-trx-commit=0",
                         "--innodb-buffer-pool-size=64M", "--skip-name-resolve", *user)

    @classmethod
    def connect(cls, port, timeout=PATIENCE):
        return cls.driver.connect(host="127.0.0.1", port=port, user="root", password="",
                                  connect_timeout=max(1, int(timeout)), read_timeout=timeout,
                                  max_allowed_packet=256 << 20)

    @classmethod
    def query(cls, client, number):
        with client.cursor() as cursor:
            cursor.execute("SELECT %s", (number,))
            return cursor.fetchone()[0]

    def transfer(self, client, data):
        with client.cursor() as cursor:
            cursor.execute("SELECT CAST(%s AS BINARY)", (data,))
            return cursor.fetchone()[0]

    def test_a_deadlock_rolls_the_transaction_back_and_a_lock_wait_does_not(self):
        proxy = self.proxy(protocol="mysql")
        client = self.client(proxy)
        with client.cursor() as cursor:
            cursor.execute("CREATE DATABASE IF NOT EXISTS d")
            cursor.execute("CREATE OR REPLACE TABLE d.t (i int) ENGINE=InnoDB")
            for kind, left in ("1205", [(1,), (3,)]), ("1213", [(3,)]):
                cursor.execute("TRUNCATE d.t")
                cursor.execute("BEGIN")
                cursor.execute("INSERT INTO d.t VALUES (1)")
                with proxy.handler("error", kind=kind, match="^INSERT"), self.assertRaises(self.driver.err.OperationalError):
                    cursor.execute("INSERT INTO d.t VALUES (2)")
                cursor.execute("INSERT INTO d.t VALUES (3)")
                cursor.execute("COMMIT")
                cursor.execute("SELECT i FROM d.t ORDER BY i")
                self.assertEqual(list(cursor.fetchall()), left)

    def test_another_driver_and_its_prepared_statements(self):
        import mysql.connector
        proxy = self.proxy(protocol="mysql")
        client = mysql.connector.connect(host="127.0.0.1", port=proxy.port, user="root", use_pure=True, ssl_disabled=True)
        self.addCleanup(self.disconnect, client)
        cursor = client.cursor(prepared=True)

        def query(number):
            cursor.execute("SELECT %s + 40", (number,))
            return int(cursor.fetchall()[0][0])

        self.assertEqual(query(2), 42)
        with proxy.handler("error", kind="1213", match="40$"), self.assertRaises(mysql.connector.Error) as caught:
            query(3)
        self.assertEqual((caught.exception.errno, caught.exception.sqlstate), (1213, "40001"))
        self.assertEqual(query(4), 44)


class TestSmtp(unittest.TestCase):
    """smtplib, and a real server: aiosmtpd."""

    def setUp(self):
        aiosmtpd = import_package("aiosmtpd.controller")
        self.sizes = []
        test = self

        class Handler:
            async def handle_DATA(self, server, session, envelope):
                test.sizes.append(len(envelope.content))
                return "250 OK"

        port = unused_port()
        controller = aiosmtpd.Controller(Handler(), hostname="127.0.0.1", port=port, data_size_limit=1 << 28)
        controller.start()
        self.addCleanup(controller.stop)
        self.proxy = vaurien.Proxy("127.0.0.1:%d" % port, "127.0.0.1:0", protocol="smtp", seed=1)
        self.proxy.__enter__()
        self.addCleanup(self.proxy.__exit__)

    def connect(self):
        client = smtplib.SMTP("127.0.0.1", self.proxy.port, timeout=PATIENCE)
        self.addCleanup(client.close)
        return client

    def send(self, client, text="Subject: hello\r\n\r\n.dot\r\n"):
        return client.sendmail("a@example.com", ["b@example.com"], text)

    def test_errors_are_the_servers_and_the_next_mail_is_sent(self):
        client = self.connect()
        for kind in "450", "451", "452":
            for match, name in ("(?i)^mail", "SMTPSenderRefused"), ("(?i)^rcpt", "SMTPRecipientsRefused"), ("(?i)^data", "SMTPDataError"):
                with self.proxy.handler("error", kind=kind, match=match), self.assertRaises(getattr(smtplib, name)) as caught:
                    self.send(client)
                self.assertIn(kind, str(caught.exception))
                self.send(client)
        self.assertEqual(self.proxy.accepted, 1)
        self.assertEqual(len(self.sizes), 9)

    def test_a_server_that_leaves(self):
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

    def test_a_large_message(self):
        with self.proxy.handler("error", match="^nothing"):
            self.send(self.connect(), "Subject: hello\r\n\r\n" + ("x" * 70 + "\r\n") * 50000)
        self.assertGreater(self.sizes[0], 72 * 50000)

    def test_it_fails_twice_and_then_succeeds(self):
        client = self.connect()
        with self.proxy.handler("transient", agitate=2, kind="451", match="(?i)^mail"):
            for _ in range(2):
                with self.assertRaises(smtplib.SMTPSenderRefused):
                    self.send(client)
            self.send(client)


class TestRequests(unittest.TestCase):
    """requests, from PyPI, and the server of the standard library."""

    def test_errors_are_answers_and_the_connection_lives(self):
        requests = import_package("requests")
        backend = vaurien.start_backend()
        self.addCleanup(backend.server_close)
        self.addCleanup(backend.shutdown)
        backend.RequestHandlerClass.protocol_version = "HTTP/1.1"
        with vaurien.Proxy(backend.server_address, "127.0.0.1:0", protocol="http") as proxy, requests.Session() as session:
            url = "http://127.0.0.1:%d/" % proxy.port
            self.assertEqual(session.get(url).content, vaurien.DEMO_BODY)
            for kind in vaurien.Http.errors:
                with proxy.handler("error", kind=kind, match="^GET /cart"):
                    answer = session.get(url + "cart")
                    self.assertEqual((answer.status_code, answer.headers.get("Retry-After")),
                                     (int(kind), "5" if kind in ("429", "503") else None))
                    self.assertEqual(session.get(url).content, vaurien.DEMO_BODY)
            self.assertEqual(proxy.accepted, 1)


# -- Benchmark: python3 test_vaurien.py bench ----------------------------------------
#
# Each proxy that is there, in front of the same backend, does the same work in turns; what
# counts is the ratio of medians. The load comes from two processes of their own, that need two
# system calls for a round trip, and so does the backend: they cost less than any proxy.

# What is asked of the backend in a round trip, and what it answers.
ASKED = {"tcp": bytes(64), "redis": b"*2\r\n$3\r\nGET\r\n$7\r\nuser:42\r\n",
         "http": b"GET /cart HTTP/1.1\r\nHost: localhost:8000\r\nAccept: */*\r\nUser-Agent: bench\r\n\r\n"}
ANSWERED = {b"*": b"$5\r\nhello\r\n", b"G": b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 5\r\n\r\nhello"}


def bench_selector():
    """A cheap one, that leaves the processor to others when it has nothing to do."""
    if not hasattr(select, "epoll"):
        return selectors.DefaultSelector()
    sel = vaurien.EpollSelector()
    sel.skips = math.inf
    return sel


def bench_backend():
    """The backend, in a process of its own: pours to who begins so, answers or echoes to others."""
    vaurien.raise_fd_limit()
    listener = listening_socket()
    listener.setblocking(False)
    print(listener.getsockname()[1], flush=True)
    sel = bench_selector()
    sel.register(listener, selectors.EVENT_READ)
    buffer = bytearray(1 << 16)
    while True:
        for key, _ in sel.select():
            sock = key.fileobj
            if sock is listener:
                with contextlib.suppress(BlockingIOError):
                    sel.register(listener.accept()[0], selectors.EVENT_READ)
                continue
            try:
                size = sock.recv_into(buffer)
                if buffer[:size] == b"pour":
                    threading.Thread(target=pour, args=(sock,), daemon=True).start()
                    sel.unregister(sock)
                    continue
                sock.sendall(ANSWERED.get(bytes(buffer[:1]), memoryview(buffer)[:size]))
            except OSError:
                size = 0
            if not size:
                sel.unregister(sock)
                sock.close()


def pour(sock):
    with contextlib.suppress(OSError), sock:
        while True:
            sock.sendall(bytes(1 << 20))


def bench_load():
    """The load, in a process of its own: does what each line of stdin says, and prints what came of it."""
    for line in sys.stdin:
        print(json.dumps(bench_work(**json.loads(line))), flush=True)


def bench_work(work, port, number, seconds):
    """Work for so many seconds: [units done, seconds, p50 and p99 of a round trip in seconds]."""
    times, done, buffer, asked = [], 0, bytearray(1 << 20), ASKED.get(work, b"pour")
    clock = time.perf_counter
    with contextlib.ExitStack() as stack:
        if work != "connect":
            socks = [stack.enter_context(contextlib.closing(connect(port))) for _ in range(number)]
            for sock in socks:
                sock.sendall(asked)
                sock.recv_into(buffer)
        began = now = clock()
        if work in ASKED:
            while now - began < seconds:
                starts = []
                for sock in socks:
                    starts.append(clock())
                    sock.send(asked)
                for sock, start in zip(socks, starts):
                    sock.recv_into(buffer)
                    now = clock()
                    times.append(now - start)
            done = len(times)
        elif work == "bulk":
            sel = bench_selector()
            for sock in socks:
                sel.register(sock, selectors.EVENT_READ)
            while now - began < seconds:
                for sock in socks if number == 1 else [key.fileobj for key, _ in sel.select()]:
                    done += sock.recv_into(buffer)
                now = clock()
            sel.close()
            done /= 1 << 20
        else:                               # connect, ask, close
            while now - began < seconds:
                last = now
                with contextlib.closing(connect(port)) as sock:
                    sock.send(ASKED["tcp"])
                    sock.recv_into(buffer)
                now = clock()
                times.append(now - last)
            done = len(times)
        taken = clock() - began
    times.sort()
    return [done, taken, times[len(times) // 2] if times else 0, times[len(times) * 99 // 100] if times else 0]


def processes(pid):
    """A process and its descendants."""
    found = [pid]
    for parent in found:
        with contextlib.suppress(OSError):
            for task in os.listdir("/proc/%d/task" % parent):
                with open("/proc/%d/task/%s/children" % (parent, task)) as file:
                    found += [int(word) for word in file.read().split()]
    return found


def cpu_seconds(pid):
    """What a process and its descendants, those that have ended too, have used."""
    total = 0
    for each in processes(pid):
        with contextlib.suppress(OSError), open("/proc/%d/stat" % each) as file:
            fields = file.read().rpartition(")")[2].split()
            total += sum(map(int, fields[11:15] if each == pid else fields[11:13]))
    return total / os.sysconf("SC_CLK_TCK")


def resident(pid):
    """Bytes of memory that a process and its descendants have to themselves."""
    total = 0
    for each in processes(pid):
        with contextlib.suppress(OSError), open("/proc/%d/statm" % each) as file:
            total += int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return total


def start_vaurien(*words):
    """What starts it, with these words, in front of a backend."""
    def start(folder, port, backend):
        return [sys.executable, FILE, "--local", "127.0.0.1:%d" % port, "--distant", "127.0.0.1:%d" % backend, "--log-level", "error", *words]
    return start


def start_haproxy(folder, port, backend):
    path = os.path.join(folder, "haproxy.cfg")
    with open(path, "w") as file:
        file.write("global\n nbthread 1\n maxconn 5000\ndefaults\n mode tcp\n timeout connect 5s\n timeout client 1h\n timeout server 1h\n"
                   "listen all\n bind 127.0.0.1:%d\n server one 127.0.0.1:%d\n" % (port, backend))
    return [find_program("haproxy"), "-f", path, "-db"]


def start_nginx(folder, port, backend):
    path, module = os.path.join(folder, "nginx.conf"), "/usr/lib/nginx/modules/ngx_stream_module.so"
    with open(path, "w") as file:
        file.write("%sworker_processes 1; daemon off; pid %s/nginx.pid; error_log /dev/null crit;\nevents { worker_connections 20000; }\n"
                   "stream { server { listen 127.0.0.1:%d; proxy_pass 127.0.0.1:%d; tcp_nodelay on; } }\n"
                   % ("load_module %s;\n" % module if os.path.exists(module) else "", folder, port, backend))
    return [find_program("nginx"), "-c", path, "-p", folder]


def start_socat(folder, port, backend):
    return [find_program("socat"), "TCP-LISTEN:%d,bind=127.0.0.1,fork,reuseaddr,nodelay,backlog=1000" % port, "TCP:127.0.0.1:%d,nodelay" % backend]


def start_toxiproxy(folder, port, backend):
    path = os.path.join(folder, "toxiproxy.json")
    with open(path, "w") as file:
        json.dump([{"name": "p", "listen": "127.0.0.1:%d" % port, "upstream": "127.0.0.1:%d" % backend}], file)
    return [find_program("toxiproxy-server"), "-port", str(unused_port()), "-config", path]


PEERS = {"haproxy": (start_haproxy, "haproxy"), "nginx": (start_nginx, "nginx"), "socat": (start_socat, "socat"),
         "toxiproxy": (start_toxiproxy, "toxiproxy-server")}
OWN = {"vaurien": start_vaurien(), "20:delay": start_vaurien("--behavior", "20:delay", "--handlers.delay.sleep", "0"),
       "redis": start_vaurien("--protocol", "redis"), "http": start_vaurien("--protocol", "http"),
       # Who says so waits for an hour; all others pass.
       "crowd": start_vaurien("--behavior", "100:delay", "--handlers.delay.sleep", "3600", "--handlers.delay.match", "^wait")}
# title: what a process of the load does, how many of them, connections of each, unit, which of our own beside vaurien, peers too
WORKS = [("round trips, 1 connection", "tcp", 1, 1, "/s", ["20:delay"], True),
         ("round trips, 50 connections", "tcp", 2, 25, "/s", ["20:delay"], True),
         ("bulk, 1 connection", "bulk", 1, 1, "MiB/s", [], True),
         ("bulk, 8 connections", "bulk", 2, 4, "MiB/s", [], True),
         ("connect, ask, close", "connect", 2, 1, "/s", [], True),
         ("redis, 1 connection", "redis", 1, 1, "/s", ["redis"], False),
         ("redis, 50 connections", "redis", 2, 25, "/s", ["redis"], False),
         ("http, 1 connection", "http", 1, 1, "/s", ["http"], False),
         ("http, 50 connections", "http", 2, 25, "/s", ["http"], False)]
CROWD, WAITING = 10000, 1000


class BenchTarget:
    """A proxy under test, or none, in front of the backend; the load is that of all of them."""

    def __init__(self, name, start, backend, load, stack):
        self.name, self.port, self.pid, self.load = name, backend, None, load
        if not start:
            return
        folder = tempfile.mkdtemp()
        stack.callback(shutil.rmtree, folder, True)
        self.port = unused_port()
        process = subprocess.Popen(start(folder, self.port, backend), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        stack.callback(process.wait)
        stack.callback(process.terminate)
        self.pid = process.pid

        def listens():
            with contextlib.suppress(OSError):
                connect(self.port).close()
                return True
        wait_until(listens)

    def measure(self, work, processes, connections, seconds):
        """(units per second, CPU us per unit, p50 ms, p99 ms)."""
        used = cpu_seconds(self.pid) if self.pid else 0
        for process in self.load[:processes]:
            process.stdin.write(json.dumps({"work": work, "port": self.port, "number": connections, "seconds": seconds}) + "\n")
            process.stdin.flush()
        found = [json.loads(process.stdout.readline()) for process in self.load[:processes]]
        used = cpu_seconds(self.pid) - used if self.pid else 0
        done = sum(one[0] for one in found)
        return (sum(one[0] / one[1] for one in found), used / done * 1e6, 1000 * max(one[2] for one in found), 1000 * max(one[3] for one in found))

    def crowd(self, number, waiting, stack):
        """Open so many idle connections; the first few say that they wait. Returns bytes of memory for each."""
        for _ in range(100):            # what the first ones need is not theirs alone
            send_and_read(stack.enter_context(contextlib.closing(connect(self.port))), b"hello")
        before = resident(self.pid)
        for count in range(number):
            sock = stack.enter_context(contextlib.closing(connect(self.port)))
            if count < waiting:
                sock.sendall(b"wait")
            else:
                send_and_read(sock, b"hello")
        return (resident(self.pid) - before) / number


def bench_process(stack, *argv):
    """This file in a process of its own, as its stdin and stdout."""
    process = subprocess.Popen([sys.executable, os.path.abspath(__file__), *argv], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               universal_newlines=True)
    stack.callback(process.stdout.close)
    stack.callback(process.wait)
    stack.callback(process.kill)
    stack.callback(process.stdin.close)
    return process


def bench_progress(words=""):
    print("\r%-70s\r%s" % ("", words), end="", file=sys.stderr, flush=True)


class FaultBench:
    """The proxy between a backend and this process, each in a process of its own."""

    def __enter__(self):
        self.stack = contextlib.ExitStack()
        self.backend = int(self.start(os.path.abspath(__file__), "bench-backend").readline())
        self.control = unused_port()
        self.start(FILE, "serve", "--attached", "--http-port", str(self.control)).readline()
        made = self.ask("POST", "/proxies", {"name": "p", "listen": "127.0.0.1:0",
                                             "upstream": "127.0.0.1:%d" % self.backend})
        self.port = int(made["listen"].split(":")[1])
        return self

    def __exit__(self, *exception):
        self.stack.close()

    def start(self, *argv):
        process = subprocess.Popen([sys.executable, *argv], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                   stderr=subprocess.DEVNULL, universal_newlines=True)

        def end():
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()
        self.stack.callback(end)
        return process.stdout

    def ask(self, method, path, body=None):
        return vaurien.Client("127.0.0.1", self.control).ask(method, path, body)

    def set_rules(self, *toxics):
        self.ask("PUT", "/proxies/p/toxics", [{"type": kind, "attributes": attributes} for kind, attributes in toxics])

    def round_trip(self, times):
        """Milliseconds of a round trip of 64 bytes on one connection, the median."""
        found = []
        with contextlib.closing(connect(self.port)) as sock:
            send_and_read(sock, bytes(64))
            for _ in range(times):
                began = time.perf_counter()
                send_and_read(sock, bytes(64))
                found.append(time.perf_counter() - began)
        return 1000 * vaurien.median(found)

    def bulk(self, seconds):
        """Kilobytes per second that one connection brings."""
        buffer, size = bytearray(1 << 20), 0
        with contextlib.closing(connect(self.port)) as sock:
            sock.sendall(b"pour")
            sock.recv_into(buffer)
            began = now = time.perf_counter()
            while now - began < seconds:
                size += sock.recv_into(buffer)
                now = time.perf_counter()
        return size / (now - began) / 1000


def bench_faults(quick):
    """How much faults are off what they say, and what they cost: lines of the table."""
    rounds, trips, seconds = (1, 30, 0.5) if quick else (7, 200, 3)
    rates = (10000,) if quick else (100, 10000, 100000)
    seen = {}
    with FaultBench() as at:
        for number in range(rounds):
            bench_progress("faults, round %d of %d" % (number + 1, rounds))
            at.set_rules()
            plain, bulk = at.round_trip(10 * trips), at.bulk(seconds)
            at.set_rules(("latency", {"latency": 10}))
            late, far = at.round_trip(trips), at.bulk(seconds)
            for name, value in ("added", late - plain), ("bulk", bulk), ("far", far), ("far/bulk", far / bulk):
                seen.setdefault(name, []).append(value)
            for rate in rates:
                at.set_rules(("bandwidth", {"rate": rate}))
                seen.setdefault(rate, []).append(100 * (at.bulk(seconds) / rate - 1))
    found = {name: vaurien.median(values) for name, values in seen.items()}
    yield "latency of 10 ms adds to a round trip", "%.3f ms" % found["added"]
    yield "one connection with it, against without", "%.2f GB/s, %.2f" % (found["far"] / 1e6, found["far/bulk"])
    for rate in rates:
        yield "bandwidth of %d KB/s is off by" % rate, "%+.2f %%" % found[rate]


def bench_crowd(backend, load, stack, seconds, rounds):
    """Round trips on one connection beside many, of which some have a delay running: a line of the table."""
    number = min(CROWD // (5 if rounds == 1 else 1), (vaurien.raise_fd_limit() or 1000) // 2 - 200)
    targets = [BenchTarget(name, OWN["crowd"], backend, load, stack) for name in ("alone", "crowd")]
    bench_progress("%d connections" % number)
    targets[1].crowd(number, number * WAITING // CROWD, stack)
    found = [[target.measure("tcp", 1, 1, seconds) for target in targets] for _ in range(rounds)]
    alone, crowd = ([vaurien.median(column) for column in zip(*(one[at] for one in found))] for at in (0, 1))
    yield ("1 connection beside %d, %d delayed" % (number, number * WAITING // CROWD),
           "%.0f /s, %.1f us CPU; alone %.0f /s, %.1f us: %.2f" % (crowd[0], crowd[1], alone[0], alone[1], crowd[0] / alone[0]))


def bench(argv):
    """One table: medians of rounds in turns, and the ratio of vaurien's to each."""
    quick = "--quick" in argv
    rounds, seconds, idle = (2, 0.1, 500) if quick else (5, 0.8, 1000)
    vaurien.raise_fd_limit()
    with contextlib.ExitStack() as stack:
        port = int(bench_process(stack, "bench-backend").stdout.readline())
        load = [bench_process(stack, "bench-load") for _ in range(2)]
        starts = {name: start for name, (start, program) in PEERS.items() if find_program(program)}
        peers = ["direct", *starts]
        starts.update(OWN, direct=None)
        seen, held = {}, {}
        for number in range(rounds):        # each with processes of its own: some lie better in memory than others
            with contextlib.ExitStack() as turn:
                targets = {name: BenchTarget(name, starts[name], port, load, turn)
                           for name in ["direct", "vaurien", *peers[1:], "20:delay", "redis", "http"]}
                for title, work, processes, connections, _, own, both in WORKS:
                    bench_progress("round %d of %d: %s" % (number + 1, rounds, title))
                    names = ["vaurien", *own, *peers * both]
                    for at in range(len(names)):        # each is the first once
                        name = names[(at + number) % len(names)]
                        seen.setdefault((title, name), []).append(targets[name].measure(work, processes, connections, seconds))
        for name in [name for name in ["vaurien", *peers[1:]] if name != "socat"]:      # that forks
            with contextlib.ExitStack() as crowd:
                bench_progress("memory: %s" % name)
                held[name] = BenchTarget(name, starts[name], port, load, crowd).crowd(idle, 0, crowd) / 1024
        lines = [*bench_crowd(port, load, stack, seconds, 1 if quick else rounds), *bench_faults(quick)]
    bench_progress()
    print("%-28s %-10s %12s %11s %9s %9s %13s" % ("work", "proxy", "rate", "CPU us each", "p50 ms", "p99 ms", "vaurien/that"))
    for title, _, _, _, unit, own, both in WORKS:
        rows = {name: [vaurien.median(column) for column in zip(*seen[title, name])] for name in ["vaurien", *own, *peers * both]}
        for name, (rate, cost, middle, late) in rows.items():
            numbers = ["%.1f" % cost if cost else "", "%.3f" % middle if middle else "", "%.3f" % late if late else ""]
            # Of our own, what is asked is what it keeps of vaurien's rate.
            ratio = rate / rows["vaurien"][0] if name in own else rows["vaurien"][0] / rate
            print("%-28s %-10s %12s %11s %9s %9s %13s" % (title * (name == "vaurien"), name, "%.0f %s" % (rate, unit), *numbers,
                                                          "" if name == "vaurien" else ("keeps %.2f" if name in own else "%.2f") % ratio))
    for name, kib in held.items():
        print("%-28s %-10s %12s %45s" % ("memory, idle connection" * (name == "vaurien"), name, "%.1f KiB" % kib,
                                         "" if name == "vaurien" else "%.2f" % (held["vaurien"] / kib)))
    for words, value in lines:
        print("%-45s %s" % (words, value))


# -- Load: python3 test_vaurien.py load ------------------------------------------------

def load_from(argv):
    """The figures of many connections, at once and one after another; the status."""
    many, short, burst = (10000, 100000, 2000) if not argv else map(int, argv)
    limit = vaurien.raise_fd_limit() or 1000
    many = min(many, (limit - 300) // 2)
    with contextlib.ExitStack() as stack:
        backend = int(bench_process(stack, "bench-backend").stdout.readline())
        load = [bench_process(stack, "bench-load") for _ in range(2)]
        proxy = BenchTarget("vaurien", OWN["vaurien"], backend, load, stack)

        def figures(what):
            wait_until(lambda: len(os.listdir("/proc/%d/fd" % proxy.pid)) == idle)
            print("%-50s %6.1f MiB, %d descriptors, %d threads" % (what, resident(proxy.pid) / 2 ** 20, idle, len(os.listdir("/proc/%d/task" % proxy.pid))), flush=True)
        with contextlib.ExitStack() as first:
            proxy.crowd(100, 0, first)
        wait_until(lambda: not select.select([], [], [], 0.2)[0])
        idle = len(os.listdir("/proc/%d/fd" % proxy.pid))
        figures("after 200 connections")
        for _ in range(2):
            with contextlib.ExitStack() as crowd:
                each = proxy.crowd(many, 0, crowd)
                print("%-50s %6.1f MiB, %.0f bytes each" % ("%d at once" % many, resident(proxy.pid) / 2 ** 20, each), flush=True)
            figures("when they have gone")
        done = 0
        while done < short:
            done += int(5 * proxy.measure("connect", 2, 1, 5)[0])
        figures("after %d short ones" % done)
        socks = [socket.socket() for _ in range(burst)]
        for sock in socks:
            sock.setblocking(False)
            sock.connect_ex(("127.0.0.1", proxy.port))
        for sock in socks:
            sock.settimeout(PATIENCE)
            send_and_read(sock, b"question")
            sock.close()
        figures("after %d at the same moment" % burst)
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["bench"]:
        bench(sys.argv[2:])
    elif sys.argv[1:2] == ["soak"]:
        sys.exit(soak_from(sys.argv[2:]))
    elif sys.argv[1:2] == ["load"]:
        sys.exit(load_from(sys.argv[2:]))
    elif sys.argv[1:2] == ["bench-backend"]:
        bench_backend()
    elif sys.argv[1:2] == ["bench-load"]:
        bench_load()
    else:
        unittest.main()
