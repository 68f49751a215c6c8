"""Tests of vaurien.py: `python3 -m unittest` runs them all, with the standard library alone.

From pure to real: handlers, rules and pipes as tables of events; the proxy on real
sockets against an oracle, the same conversation over a direct connection; the command
line in its own process; real servers with their real drivers, where they are installed.
"""
import contextlib
import hashlib
import http.client
import http.server
import io
import logging
import math
import os
import random
import re
import select
import selectors
import shutil
import signal
import socket
import socketserver
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from unittest import mock

import vaurien
from vaurien import DOWNSTREAM, EOF, HANDLERS, NEVER, OPEN, RESET, UPSTREAM

HERE = os.path.dirname(os.path.abspath(__file__))
FILE = os.path.join(HERE, "vaurien.py")
PATIENCE = 30       # seconds after which a test gives up on a peer: no test waits that long


def setUpModule():
    logging.getLogger("vaurien").setLevel(logging.CRITICAL)


@contextlib.contextmanager
def registered(function):
    """A handler for the time of a test."""
    vaurien.handler(function)
    try:
        yield function
    finally:
        del HANDLERS[function.__name__]


# -- Pure: handlers, rules, lines and pipes -------------------------------------

def line_of(*rules):
    """A line that these rules are drawn for, its first request begun."""
    armed = vaurien.Rules(1, "test")
    armed.armed = list(rules)
    line = vaurien.Line(armed, 1)
    line.begin()
    return line


class TestHandlers(unittest.TestCase):
    """A fault is a table: events in, events out, with no socket and no sleep."""

    def play(self, name, *events, **options):
        """What a handler that acts makes of one request's events."""
        line = line_of(vaurien.Rule(name, options))
        return [(round(t, 3), to, data) for event in events for t, to, data, _ in line.carry(*event)]

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
        line = line_of(vaurien.Rule("delay", per="connection"))
        times = [line.carry(*event)[0][0] for event in [
            (0, UPSTREAM, b"q"), (2, DOWNSTREAM, b"a"), (3, UPSTREAM, b"r"), (3.5, UPSTREAM, b"s")]]
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
            line = line_of(vaurien.Rule("error", {"warmup": 2}))
            while line.request < request:
                line.begin()
            out = [out for event in events for out in line.carry(*event)]
            self.assertEqual(out[1][2] != b"a", touched, request)

    def test_transient_fails_and_then_succeeds(self):
        line = line_of(vaurien.Rule("transient", {"agitate": 2, "warmup": 1}))
        failed = []
        for _ in range(6):
            line.carry(0, UPSTREAM, b"q")
            failed.append(line.carry(1, DOWNSTREAM, b"a")[0][2] != b"a")
            line.begin()
        self.assertEqual(failed, [False, True, True, False, False, False])

    def test_transient_counts_for_the_whole_proxy(self):
        armed = vaurien.Rules(1, "test")
        armed.armed = [vaurien.Rule("transient", {"agitate": 3})]
        lines = [vaurien.Line(armed, number) for number in range(5)]
        failed = 0
        for line in lines:
            line.begin()
            line.carry(0, UPSTREAM, b"q")
            failed += line.carry(1, DOWNSTREAM, b"a")[0][2] != b"a"
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
                             set(vaurien.options_of(function)), name)
            vaurien.check_handler(name, function)

    def test_every_handler_survives_every_event_and_goes_forward_in_time(self):
        for name in HANDLERS:
            for start in range(len(self.EVENTS)):
                for stream in "both", UPSTREAM, DOWNSTREAM:
                    line = line_of(vaurien.Rule(name, stream=stream))
                    with mock.patch.object(vaurien.log, "exception",
                                           side_effect=AssertionError(name)):
                        for event in self.EVENTS[start:]:
                            for t, to, data, holds in line.carry(*event):
                                self.assertGreaterEqual(t, event[0])
                                self.assertIn(to, (UPSTREAM, DOWNSTREAM))
                                self.assertIsInstance(data, bytes)
                                self.assertEqual(event[0] + sum(s for _, s in holds), t)

    def test_what_only_puts_off_loses_nothing_when_it_is_released(self):
        for name in "delay", "hang", "dummy":
            rule = vaurien.Rule(name)
            line = line_of(rule)
            pipe = vaurien.Pipe(UPSTREAM, vaurien.Budget())
            for t, to, data in self.EVENTS:
                if to == UPSTREAM and data is not RESET:
                    for due, _, out, holds in line.carry(t, to, data):
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
        armed = vaurien.Rules(seed, name)
        armed.armed = vaurien.behavior_rules(vaurien.parse_behavior(text), {})
        return armed

    def drawn(self, armed, connections=40, requests=50):
        """{(connection, request): handler} of those that a rule acts on."""
        found = {}
        for connection in range(1, connections + 1):
            line = vaurien.Line(armed, connection)
            for request in range(1, requests + 1):
                line.begin()
                self.assertLessEqual(len(line.steps), 1)
                for step in line.steps:
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
        lines = [vaurien.Line(armed, number) for number in range(1, 41)]
        order = [number for number in range(40) for _ in range(50)]
        random.Random(7).shuffle(order)
        for number in order:
            lines[number].begin()
            for step in lines[number].steps:
                found[number + 1, lines[number].request] = step.rule.name
        self.assertEqual(found, one)

    def test_the_draws_are_the_same_on_every_python(self):
        found = self.drawn(self.rules("20:delay"), connections=1, requests=20)
        self.assertEqual(sorted(found), [(1, 3), (1, 15), (1, 16)])

    def test_another_seed_another_proxy_another_request_draw_anew(self):
        one = self.drawn(self.rules("20:delay"))
        self.assertNotEqual(self.drawn(self.rules("20:delay", seed=2)), one)
        self.assertNotEqual(self.drawn(self.rules("20:delay", name="other")), one)

    def test_rules_with_dice_of_their_own_are_drawn_independently(self):
        armed = vaurien.Rules(1, "test")
        armed.armed = [vaurien.Rule("delay", low=0, high=50, dice="a"),
                       vaurien.Rule("hang", low=0, high=50, dice="b")]
        seen = set()
        for number in range(100):
            line = vaurien.Line(armed, number)
            line.begin()
            seen.add(tuple(step.rule.name for step in line.steps))
        self.assertEqual(seen, {(), ("delay",), ("hang",), ("delay", "hang")})

    def test_a_rule_per_connection_is_drawn_once_for_it(self):
        armed = vaurien.Rules(1, "test")
        armed.armed = [vaurien.Rule("delay", low=0, high=50, per="connection")]
        for number in range(50):
            line = vaurien.Line(armed, number)
            line.begin()
            first = list(line.steps)
            for _ in range(5):
                line.begin()
                self.assertEqual(list(line.steps), first)

    def test_a_rule_says_what_it_is_as_the_log_does(self):
        self.assertEqual(str(vaurien.Rule("delay", {"sleep": 2.0})), "delay sleep=2.0")
        self.assertEqual(str(vaurien.Rule("delay", {"before": False})), "delay sleep=1.0 before=no")
        self.assertEqual(str(vaurien.Rule("hang")), "hang")


class TestLine(unittest.TestCase):

    def test_a_request_begins_when_the_client_speaks_after_the_backend_has(self):
        with proxy_of(echo) as proxy, connected(proxy) as sock:
            for _ in range(3):
                exchange(sock, b"q")
            line = next(iter(proxy.connections.values())).line
            self.assertEqual(line.request, 3)

    def test_a_fault_is_news_once_and_only_when_it_changes_something(self):
        line = line_of(vaurien.Rule("error", {"warmup": 1}))
        line.carry(0, UPSTREAM, b"q")
        line.carry(0, DOWNSTREAM, b"a")
        self.assertEqual(line.news, [])
        line.begin()
        for event in (0, UPSTREAM, b"q"), (0, DOWNSTREAM, b"a"), (0, DOWNSTREAM, b"b"):
            line.carry(*event)
        self.assertEqual([rule.name for rule in line.news], ["error"])

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

        for function in none, wrong_way, no_bytes, raises:
            with registered(function), self.assertLogs("vaurien", "ERROR") as logged:
                line = line_of(vaurien.Rule(function.__name__), vaurien.Rule("hang", dice="b"))
                self.assertEqual(line.carry(3, UPSTREAM, b"q"), [(3, UPSTREAM, RESET, ())])
            self.assertIn("handler %s failed" % function.__name__, logged.output[0])

    def test_a_handler_may_return_a_list_and_yield_a_time_that_has_passed(self):
        def early(state, t, to, data):
            return [(t - 5, to, data), (math.nan, to, b"x")]

        with registered(early):
            line = line_of(vaurien.Rule("early"))
            self.assertEqual(line.carry(3, UPSTREAM, b"q"),
                             [(3, UPSTREAM, b"q", ()), (3, UPSTREAM, b"x", ())])

    def test_each_step_takes_what_the_one_before_it_gave(self):
        one, two = (vaurien.Rule("delay", {"sleep": seconds}, dice=name)
                    for seconds, name in ((1.0, "a"), (2.0, "b")))
        self.assertEqual(line_of(one, two).carry(0, UPSTREAM, b"q"),
                         [(3.0, UPSTREAM, b"q", ((one, 1.0), (two, 2.0)))])

    def test_a_stream_that_a_rule_does_not_see_passes_it_by(self):
        line = line_of(vaurien.Rule("hang", stream=DOWNSTREAM))
        self.assertEqual(line.carry(0, UPSTREAM, b"q"), [(0, UPSTREAM, b"q", ())])
        self.assertEqual(line.carry(0, DOWNSTREAM, b"a")[0][0], NEVER)


class TestPipe(unittest.TestCase):

    def setUp(self):
        self.budget = vaurien.Budget()
        self.pipe = vaurien.Pipe(UPSTREAM, self.budget)

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
        one, two, three = "one", "two", "three"      # any rules
        self.pipe.put(NEVER, b"a", 1, ((one, NEVER),))
        self.pipe.put(2, b"b", 2)                    # only behind a
        self.pipe.put(NEVER, b"c", 3, ((two, 4), (one, NEVER)))
        self.pipe.put(NEVER, b"d", 4, ((three, NEVER),))
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
        self.assertEqual(self.budget.held, 6 + 2 * vaurien.HELD_ENTRY)
        self.pipe.due(1)
        self.pipe.sent(1)
        self.assertEqual((bytes(self.pipe.out[0]), self.budget.held), (b"bc", 5 + 2 * vaurien.HELD_ENTRY))
        self.pipe.sent(2)
        self.assertEqual(self.budget.held, 3 + vaurien.HELD_ENTRY)
        self.pipe.close()
        self.assertEqual((self.budget.held, self.budget.pipes), (0, 0))

    def test_after_the_end_nothing_more_is_taken(self):
        self.pipe.done = True
        self.pipe.put(1, b"abc", 0)
        self.pipe.put(1, RESET, 0)
        self.assertEqual((self.pipe.due(1), self.pipe.held), ([RESET], 0))

    def test_more_may_be_held_where_it_flows_than_where_it_stands(self):
        def fill(due):
            pipe = vaurien.Pipe(UPSTREAM, vaurien.Budget())
            while pipe.room() > 0:
                pipe.put(due, bytes(pipe.room()), 0)
            return pipe.held

        self.assertLessEqual(fill(NEVER), vaurien.HELD_STILL)
        self.assertGreater(fill(NEVER), vaurien.HELD_STILL // 2)
        self.assertLessEqual(fill(5), vaurien.HELD_MAX)
        self.assertGreater(fill(5), vaurien.HELD_MAX // 2)

    def test_the_budget_is_shared_and_never_passed_and_everybody_gets_something(self):
        budget = vaurien.Budget(32 * 1024 * 1024)
        pipes = [vaurien.Pipe(UPSTREAM, budget) for _ in range(4000)]
        for pipe in pipes:
            while pipe.room() > 0:
                pipe.put(5, bytes(pipe.room()), 0)
            self.assertLessEqual(budget.held, budget.total)
            self.assertGreater(pipe.held, 0)


class TestLoop(unittest.TestCase):

    def test_alarms_ring_in_order_and_not_before_their_time(self):
        loop, rung = vaurien.Loop(), []
        now = loop.clock()
        for late in 0.03, 0.001, 0.012, 0.0:
            loop.at(now + late, lambda late=late: rung.append((late, loop.clock() - now)))
        loop.cancel(loop.at(now + 0.002, lambda: rung.append("cancelled")))
        loop.at(now + 0.04, loop.stop)
        loop.run()
        loop.close()
        self.assertEqual([late for late, _ in rung], [0.0, 0.001, 0.012, 0.03])
        for late, rang in rung:
            self.assertGreaterEqual(rang, late)

    def test_an_alarm_years_away_is_no_overflow(self):
        loop = vaurien.Loop()
        loop.at(1e300, loop.stop)
        loop.post(loop.stop)
        loop.run()
        loop.close()

    def test_call_runs_in_the_loops_thread_and_hands_back_what_comes_of_it(self):
        loop = vaurien.Loop()
        thread = threading.Thread(target=loop.run)
        thread.start()
        self.assertIs(loop.call(threading.current_thread), thread)
        with self.assertRaises(ZeroDivisionError):
            loop.call(lambda: 1 // 0)
        loop.stop()
        thread.join(PATIENCE)
        loop.close()

    def test_what_blocks_runs_away_from_the_loop(self):
        loop, outcome, gate = vaurien.Loop(), [], threading.Event()
        thread = threading.Thread(target=loop.run)
        thread.start()
        loop.call(loop.away, gate.wait, lambda *result: (outcome.append(result), loop.stop()))
        loop.call(loop.away, lambda: 1 // 0, lambda _, problem: outcome.append(problem))
        while not outcome:
            loop.call(int)                  # the loop goes on meanwhile
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

    def test_what_only_calls_itself_is_refused(self):
        for local, distant in [("localhost:8000", "127.0.0.1:8000"), (":8000", "localhost:8000"),
                               ("127.0.0.1:8000", ":8000")]:
            with self.assertRaisesRegex(ValueError, "would call itself"):
                vaurien.Proxy(distant, local)
        vaurien.Proxy("127.0.0.1:8000", "127.0.0.2:8000")
        vaurien.Proxy("localhost:8000", "localhost:0")


# -- Real sockets: the proxy against an oracle -----------------------------------

@contextlib.contextmanager
def serving(talk):
    """A backend: talk(sock) for each connection, in a thread. Yields (port, what talk returned)."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(100)
    saw, threads = [], []

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
def proxy_of(talk, behavior="100:dummy", loop=None, **words):
    """A proxy in front of a backend that talks so."""
    with serving(talk) as (port, saw):
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


def connected(proxy):
    return contextlib.closing(connect(proxy.port))


def echo(sock):
    """A backend that says again what it hears."""
    with contextlib.suppress(OSError):
        while True:
            data = sock.recv(65536)
            if not data:
                return
            sock.sendall(data)


def read(sock, size):
    """Exactly size bytes."""
    data = b""
    while len(data) < size:
        piece = sock.recv(size - len(data))
        if not piece:
            raise EOFError(data)
        data += piece
    return data


def exchange(sock, data):
    sock.sendall(data)
    return read(sock, len(data))


def hear(sock):
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


def hang_up(sock):
    """Close with RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def noise(size, seed=0):
    return random.Random(seed).getrandbits(8 * size).to_bytes(size, "big") if size else b""


def both_ways(sock, data):
    """Send data and hear all that comes, at the same time."""
    def send():
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
    thread = threading.Thread(target=send)
    thread.start()
    heard = hear(sock)
    thread.join(PATIENCE)
    return heard


class Conversations:
    """Pairs of a client and a backend; each returns what it saw."""

    def half_close_client(sock):
        sock.sendall(noise(100000))
        sock.shutdown(socket.SHUT_WR)
        return hear(sock)

    def half_close_backend(sock):
        heard = hear(sock)
        sock.sendall(noise(50000, 1))
        return heard

    def server_first_client(sock):
        greeting = read(sock, 9)
        sock.sendall(b"thanks")
        return greeting, hear(sock)

    def server_first_backend(sock):
        sock.sendall(b"greetings")
        return read(sock, 6)

    def backend_half_closes_client(sock):
        heard = hear(sock)
        sock.sendall(noise(300000))
        sock.close()
        return heard

    def backend_half_closes_backend(sock):
        sock.sendall(noise(1000))
        sock.shutdown(socket.SHUT_WR)
        return hear(sock)

    def both_at_once_client(sock):
        return both_ways(sock, noise(3000000))

    def both_at_once_backend(sock):
        return both_ways(sock, noise(5000000, 1))

    def turns_client(sock):
        said = [exchange(sock, noise(1 + turn * 37, turn)) for turn in range(100)]
        return hashlib.sha1(b"".join(said)).hexdigest()

    def turns_backend(sock):
        echo(sock)

    def client_resets_client(sock):
        answer = exchange(sock, b"question")
        hang_up(sock)
        return answer

    def client_resets_backend(sock):
        sock.sendall(read(sock, 8))
        return hear(sock)

    def backend_resets_client(sock):
        sock.sendall(b"question")
        answer = read(sock, 4)
        sock.sendall(b"go")
        return answer, hear(sock)

    def backend_resets_backend(sock):
        read(sock, 8)
        sock.sendall(b"half")
        read(sock, 2)
        hang_up(sock)

    def backend_says_nothing_client(sock):
        sock.sendall(b"question")
        return hear(sock)

    def backend_says_nothing_backend(sock):
        return read(sock, 8)

    def client_leaves_at_once_client(sock):
        sock.shutdown(socket.SHUT_WR)
        return hear(sock)

    def client_leaves_at_once_backend(sock):
        return hear(sock)

    def slow_reader_client(sock):
        sock.sendall(b"go")
        read(sock, 1000)
        select.select([], [], [], 0.2)      # the backend runs into a full window meanwhile
        return hear(sock)

    def slow_reader_backend(sock):
        read(sock, 2)
        sock.sendall(noise(20000000))


NAMES = sorted(name[:-len("_client")] for name in vars(Conversations) if name.endswith("_client"))


class SelectLoop(vaurien.Loop):
    """A loop on a machine that has nothing better than select()."""

    def __init__(self):
        super().__init__(selector=selectors.SelectSelector())


class TestOracle(unittest.TestCase):
    """The same bytes and the same ending as over a direct connection."""

    def hold(self, name, port, saw):
        """One conversation, as both sides saw it."""
        sock = connect(port)
        with contextlib.closing(sock):
            client = getattr(Conversations, name + "_client")(sock)
        deadline = time.monotonic() + PATIENCE
        while not saw and time.monotonic() < deadline:
            time.sleep(0.001)
        return client, saw[-1] if saw else "the backend saw no end"

    def compare(self, behavior, loop=None, options=None):
        for name in NAMES:
            talk = getattr(Conversations, name + "_backend")
            with self.subTest(name, behavior=behavior):
                with serving(talk) as (port, saw):
                    direct = self.hold(name, port, saw)
                with proxy_of(talk, behavior, loop, options=options) as proxy:
                    self.assertEqual(self.hold(name, proxy.port, proxy.saw), direct)
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


def wait_until(condition):
    """Poll for what another thread is about to do; a test's way to wait, never its clock."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError("waited in vain")
        time.sleep(0.001)


class TestProxy(unittest.TestCase):

    def use(self, proxy, behavior, **options):
        rules = vaurien.behavior_rules(vaurien.parse_behavior(behavior), options)
        proxy.loop.call(proxy.use, rules)

    def test_delay_delays_each_request_that_it_is_drawn_for_and_no_other(self):
        with proxy_of(echo, "30:delay", seed=1, options={"delay": {"sleep": 0.05}}) as proxy:
            late = set()
            with connected(proxy) as sock:
                for request in range(1, 41):
                    began = time.monotonic()
                    exchange(sock, b"question")
                    if time.monotonic() - began >= 0.05:
                        late.add(request)
            drawn = {event.request for event in proxy.events}
            self.assertTrue(5 < len(drawn) < 25)
            self.assertLessEqual(drawn, late)

    def test_the_same_seed_delays_the_same_of_200_requests(self):
        runs = []
        for _ in range(2):
            with proxy_of(echo, "20:delay", seed=1, options={"delay": {"sleep": 0.001}}) as proxy:
                for _ in range(20):
                    with connected(proxy) as sock:
                        for _ in range(10):
                            exchange(sock, b"question")
                runs.append([(event.connection, event.request) for event in proxy.events])
        self.assertEqual(runs[0], runs[1])
        self.assertTrue(20 < len(runs[0]) < 70, len(runs[0]))

    def test_delay_before_the_backend_is_called_and_before_the_answer(self):
        for before in True, False:
            called = []

            def talk(sock):
                called.append(time.monotonic())
                echo(sock)

            with proxy_of(talk, "100:delay",
                          options={"delay": {"sleep": 0.1, "before": before}}) as proxy:
                began = time.monotonic()
                with connected(proxy) as sock:
                    exchange(sock, b"question")
                    self.assertGreaterEqual(time.monotonic() - began, 0.1)
            self.assertEqual(called[0] - began >= 0.1, before)

    def test_blackout_closes_at_once_and_the_backend_is_never_called(self):
        with proxy_of(echo, "100:blackout") as proxy:
            with connected(proxy) as sock:
                self.assertEqual(hear(sock)[0], 0)
            wait_until(lambda: not proxy.connections)
            self.assertEqual(proxy.saw, [])
            self.assertEqual(proxy.faults, {"blackout": 1})

    def test_blackout_in_the_middle_of_a_connection(self):
        with proxy_of(echo) as proxy, connected(proxy) as sock:
            exchange(sock, b"question")
            self.use(proxy, "100:blackout")
            sock.sendall(b"another")
            self.assertEqual(hear(sock)[0], 0)
            wait_until(lambda: not proxy.connections and proxy.saw)

    def test_abort_delivers_and_then_closes_the_client(self):
        got = []

        def talk(sock):
            got.append(read(sock, 8))
            sock.sendall(b"answer")
            hear(sock)

        with proxy_of(talk, "100:abort") as proxy, connected(proxy) as sock:
            sock.sendall(b"question")
            self.assertEqual(hear(sock)[0], 0)
            wait_until(lambda: proxy.saw)
            self.assertEqual(got, [b"question"])

    def test_error_replaces_the_answer_and_the_next_request_works(self):
        with proxy_of(echo, "100:error") as proxy, connected(proxy) as sock:
            sock.sendall(b"question")
            self.assertNotIn(b"question", read(sock, 1000))
            self.use(proxy, "100:dummy")
            self.assertEqual(exchange(sock, b"question"), b"question")

    def test_error_injects_into_the_valid_answer(self):
        with proxy_of(echo, "100:error", options={"error": {"inject": True}}) as proxy:
            with connected(proxy) as sock:
                sock.sendall(b"leftright")
                answer = read(sock, 109)
                self.assertEqual(answer[:4] + answer[104:], b"leftright")

    def test_transient_fails_once_for_the_whole_proxy(self):
        with proxy_of(echo, "100:transient") as proxy:
            with connected(proxy) as one, connected(proxy) as two:
                one.sendall(b"question")
                self.assertNotIn(b"question", read(one, 1000))
                for sock in one, two, one:
                    self.assertEqual(exchange(sock, b"question"), b"question")

    def test_what_hangs_goes_on_when_the_fault_is_removed(self):
        question = noise(3000000)
        with proxy_of(echo, "100:hang") as proxy, connected(proxy) as sock:
            thread = threading.Thread(target=sock.sendall, args=(question,))
            thread.start()
            pipe = proxy.loop.budget
            wait_until(lambda: pipe.held > vaurien.HELD_STILL // 2)
            self.assertEqual(proxy.saw, [])
            self.use(proxy, "100:dummy")
            self.assertEqual(read(sock, len(question)), question)
            thread.join(PATIENCE)
            sock.shutdown(socket.SHUT_WR)
            self.assertEqual(hear(sock)[2], "eof")

    def test_a_fault_meets_the_first_request_of_a_connection_that_was_open_before(self):
        with proxy_of(echo) as proxy, connected(proxy) as sock:
            wait_until(lambda: proxy.connections)
            self.use(proxy, "100:error")
            sock.sendall(b"question")
            self.assertNotIn(b"question", read(sock, 1000))

    def test_what_hangs_stays_while_another_fault_is_added(self):
        hang = vaurien.Rule("hang")
        with proxy_of(echo) as proxy, connected(proxy) as sock:
            proxy.loop.call(proxy.use, [hang])
            sock.sendall(b"question")
            wait_until(lambda: proxy.loop.budget.held)
            proxy.loop.call(proxy.use, [hang, vaurien.Rule("delay", {"sleep": 0.0}, dice="b")])
            self.assertTrue(proxy.loop.budget.held)
            self.assertFalse(select.select([sock], [], [], 0.05)[0])
            proxy.loop.call(proxy.use, [])
            self.assertEqual(read(sock, 8), b"question")

    def test_a_slow_reader_slows_the_sender_down(self):
        """Memory stays bounded, whichever road, and nothing is lost in the end."""
        for behavior in "100:dummy", "100:hang":
            gate = threading.Event()

            def talk(sock):
                gate.wait(PATIENCE)
                return hear(sock)

            with proxy_of(talk, behavior) as proxy, connected(proxy) as sock:
                sock.setblocking(False)
                data, sent = noise(1 << 16), 0
                while select.select([], [sock], [], 0.3)[1] and sent < 1 << 27:
                    with contextlib.suppress(BlockingIOError):
                        sent += sock.send(data[sent % len(data):])
                    self.assertLessEqual(proxy.loop.budget.held, 2 * vaurien.HELD_STILL)
                self.assertLess(sent, 1 << 27)
                gate.set()
                self.use(proxy, "100:dummy")
                sock.close()
                wait_until(lambda: proxy.saw)
                self.assertEqual(proxy.saw[0][0], sent)

    def test_who_reads_slowly_holds_up_nobody_else(self):
        def talk(sock):
            sock.sendall(noise(20000000))

        with proxy_of(talk) as proxy, connected(proxy) as slow, connected(proxy) as quick:
            self.assertEqual(hear(quick)[0], 20000000)
            self.assertEqual(hear(slow)[0], 20000000)

    def test_a_delay_is_no_limit_to_the_bandwidth(self):
        """What is on its way is held: several MiB leave before the first byte arrives."""
        data = noise(8 << 20)
        with proxy_of(hear, "100:delay", options={"delay": {"sleep": 30.0}}) as proxy:
            with connected(proxy) as sock:
                sock.sendall(data)
                self.assertEqual(proxy.saw, [])
                self.use(proxy, "100:dummy")
                sock.shutdown(socket.SHUT_WR)
                wait_until(lambda: proxy.saw)
        self.assertEqual(proxy.saw[0], (len(data), hashlib.sha1(data).hexdigest(), "eof"))

    def test_no_backend_closes_the_client_and_says_so_in_one_line(self):
        with vaurien.Proxy("127.0.0.1:%d" % unused_port(), "127.0.0.1:0") as proxy:
            with self.assertLogs("vaurien", "WARNING") as logged, connected(proxy) as sock:
                self.assertEqual(hear(sock)[0], 0)
                wait_until(lambda: not proxy.connections)
        self.assertEqual(len(logged.output), 1)
        self.assertIn("cannot connect to backend 127.0.0.1:", logged.output[0])
        self.assertIn("Connection refused", logged.output[0])
        self.assertEqual(proxy.failures, 1)

    def test_every_address_is_tried(self):
        with serving(echo) as (port, _), black_hole() as silent:
            with vaurien.Proxy("127.0.0.1:%d" % port, "127.0.0.1:0", timeout=0.6) as proxy:
                addresses = [(socket.AF_INET, ("127.0.0.1", unused_port())),
                             (socket.AF_INET, ("127.0.0.1", silent)),
                             (socket.AF_INET, ("127.0.0.1", port))]
                with mock.patch.object(vaurien, "literal", lambda *_: addresses):
                    with connected(proxy) as sock:
                        self.assertEqual(exchange(sock, b"question"), b"question")

    def test_a_silent_backend_times_out_and_holds_up_nobody_else(self):
        with black_hole() as silent, serving(echo) as (port, _):
            with vaurien.Proxy("127.0.0.1:%d" % silent, "127.0.0.1:0", timeout=0.3) as proxy:
                began = time.monotonic()
                with self.assertLogs("vaurien", "WARNING") as logged, connected(proxy) as stuck:
                    proxy.loop.call(setattr, proxy, "backend", ("127.0.0.1", port))
                    with connected(proxy) as sock:
                        self.assertEqual(exchange(sock, b"question"), b"question")
                    hear(stuck)
                    self.assertGreaterEqual(time.monotonic() - began, 0.3)
                self.assertIn("timed out", logged.output[0])

    def test_a_name_is_resolved_off_the_loop_once_for_all_who_wait(self):
        gate, asked = threading.Event(), []

        def resolve(host, port, *_, **__):
            asked.append(host)
            gate.wait(PATIENCE)
            return [(socket.AF_INET, ("127.0.0.1", port))]

        with serving(echo) as (port, _), vaurien.Proxy("name.invalid:%d" % port, "127.0.0.1:0") as proxy:
            with mock.patch.object(vaurien, "literal", lambda *_: None), \
                    mock.patch.object(vaurien, "resolve", resolve):
                with contextlib.ExitStack() as stack:
                    socks = [stack.enter_context(connected(proxy)) for _ in range(5)]
                    for sock in socks:
                        sock.sendall(b"question")
                    wait_until(lambda: len(proxy.connections) == 5)
                    proxy.loop.call(int)            # the loop goes on meanwhile
                    gate.set()
                    for sock in socks:
                        self.assertEqual(read(sock, 8), b"question")
        self.assertEqual(asked, ["name.invalid"])

    def test_a_name_that_is_unknown_closes_the_client(self):
        def resolve(*_, **__):
            raise socket.gaierror(-2, "Name or service not known")

        with vaurien.Proxy("name.invalid:80", "127.0.0.1:0") as proxy:
            with mock.patch.object(vaurien, "literal", lambda *_: None), \
                    mock.patch.object(vaurien, "resolve", resolve), \
                    self.assertLogs("vaurien", "WARNING") as logged, connected(proxy) as sock:
                self.assertEqual(hear(sock)[0], 0)
        self.assertIn("Name or service not known", logged.output[0])

    def test_localhost_listens_on_both_families_on_one_port(self):
        with serving(echo) as (port, _), vaurien.Proxy("localhost:%d" % port) as proxy:
            families = [sock.family for sock in proxy.listeners]
            self.assertEqual(len({sock.getsockname()[1] for sock in proxy.listeners}), 1)
            for sock in proxy.listeners:
                with contextlib.closing(connect(proxy.port, sock.getsockname()[0])) as client:
                    self.assertEqual(exchange(client, b"question"), b"question")
            self.assertIn(socket.AF_INET, families)
            if has_ipv6():
                self.assertIn(socket.AF_INET6, families)

    def test_a_machine_without_ipv6_listens_on_what_it_has(self):
        really = vaurien.listen_at

        def listen_at(family, address):
            if family == socket.AF_INET6:
                raise OSError(vaurien.errno.EADDRNOTAVAIL, "Cannot assign requested address")
            return really(family, address)

        with mock.patch.object(vaurien, "listen_at", listen_at):
            with vaurien.Proxy("127.0.0.1:9") as proxy:
                self.assertEqual(len(proxy.listeners), 1)

    def test_a_port_in_use_is_an_error_that_names_it_and_leaves_nothing_open(self):
        with contextlib.closing(socket.socket()) as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen(1)
            port = taken.getsockname()[1]
            with self.assertRaisesRegex(OSError, "cannot listen on 127.0.0.1:%d: Address" % port):
                vaurien.Proxy("127.0.0.1:9", "localhost:%d" % port).__enter__()

    def test_leaving_the_block_closes_everything(self):
        with serving(echo) as (backend, saw):
            with vaurien.Proxy("127.0.0.1:%d" % backend, "127.0.0.1:0") as proxy:
                port, sock = proxy.port, connect(proxy.port)
                exchange(sock, b"question")
            self.assertEqual(hear(sock)[0], 0)
            sock.close()
            wait_until(lambda: saw)
            with self.assertRaises(OSError):
                connect(port)
        self.assertFalse(proxy.thread.is_alive())

    def test_nothing_leaks(self):
        with proxy_of(echo, "20:delay,10:blackout,10:error,10:abort",
                      options={"delay": {"sleep": 0.001}}) as proxy:
            def some():
                for _ in range(100):
                    with connected(proxy) as sock, contextlib.suppress(OSError, EOFError):
                        exchange(sock, b"question")
                wait_until(lambda: not proxy.connections)
                return proxy.loop.call(lambda: (len(proxy.loop.selector.get_map()),
                                                proxy.loop.budget.held, proxy.loop.budget.pipes))
            self.assertEqual(some(), (2, 0, 0))         # the listener and the door
            self.assertEqual(some(), (2, 0, 0))
            self.assertGreater(len(proxy.faults), 2)

    def test_no_descriptors_left_is_a_pause_and_no_end(self):
        with proxy_of(echo) as proxy, connected(proxy) as here:
            exchange(here, b"question")
            really, listener = proxy.accept, proxy.listeners[0]
            full = mock.Mock(accept=mock.Mock(
                side_effect=OSError(vaurien.errno.EMFILE, "Too many open files")))
            with mock.patch.object(vaurien, "PAUSE", 0.05), \
                    self.assertLogs("vaurien", "WARNING") as logged:
                proxy.loop.call(lambda: (proxy.loop.watch(listener, 0), proxy.pause(
                    listener, full.accept.side_effect)))
                self.assertEqual(exchange(here, b"question"), b"question")
                with connected(proxy) as sock:
                    self.assertEqual(exchange(sock, b"question"), b"question")
            self.assertEqual(really, proxy.accept)
            self.assertIn("Too many open files", logged.output[0])

    def test_the_log_says_what_a_fault_did_and_how_a_connection_ended(self):
        with proxy_of(echo, "100:delay", seed=7, options={"delay": {"sleep": 0.001}}) as proxy:
            with self.assertLogs("vaurien", "DEBUG") as logged:
                with connected(proxy) as sock:
                    exchange(sock, b"question")
                    client = "127.0.0.1:%d" % sock.getsockname()[1]
                wait_until(lambda: not proxy.connections)
        self.assertIn("client %s, request 1: delay sleep=0.001" % client, logged.output[0])
        self.assertRegex(logged.output[1], "client %s: closed after [0-9.]+ s, 8 bytes up, "
                                           "8 bytes down, requests: 1" % client)


def unused_port():
    """A port that nobody listens on: refused, as long as nobody is given it."""
    with contextlib.closing(socket.socket()) as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@contextlib.contextmanager
def black_hole():
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


if __name__ == "__main__":
    unittest.main()
