#!/usr/bin/env python3
"""Fuzz test: rules change while clients send pipelined requests, on real sockets.

    python3 .ci/fuzz.py [--seconds N] [--seed N]

Each round has one proxy with a protocol, several clients at the same time, and a thread that
adds, removes and changes rules. The class Talk of test_vaurien.py knows what each peer must see:
each request is answered once and in order, by the backend or with one error of a rule; the
backend gets exactly the requests that were not refused, whole; and the fault records are the
errors that the client has seen.

A round is determined by its seed, but for the timing. Exits with status 1 if a check fails, and
prints the seed of that round: it is the first round of a run with that seed.
"""
import contextlib
import os
import random
import select
import sys
import threading
import time
from collections import Counter

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from soak import read_arguments

import vaurien
from test_vaurien import (
    SUBSTITUTE,
    TALKS,
    change_toxics,
    connect,
    running_proxy,
    wait_until,
)

CLIENTS = 6             # at the same time
TALKS_PER_CLIENT = 4    # one after the other
REQUESTS_MAX = 40       # of a talk
TIMEOUT = 30.0          # seconds without progress, after the end of all rules


def receive_piece(sock, rng):
    return sock.recv(rng.choice([1, 10, 1000, 100000]))


def send_piece(sock, data, rng):
    """Send some of the data. Returns the rest."""
    return data[sock.send(data[:rng.choice([1, 10, 100, 10000, 1000000])]):]


class Round:
    """A proxy, its clients and the changes of its rules.

    count       figures for the last line of the program
    problems    sentences
    """

    def __init__(self, protocol, seed, count):
        self.protocol, self.seed, self.count = protocol, seed, count
        self.problems = []
        self.per_connection = set()         # names of toxics
        self.talks = {}             # {address of the client as the proxy sees it: Talk}
        self.lock = threading.Lock()
        self.calm = threading.Event()       # no rule is installed any more

    def run(self):
        """Run the round, and count and check it."""
        with running_proxy(self.serve, protocol=self.protocol, seed=self.seed,
                           overwrite_host_header=False) as proxy:
            self.proxy = proxy
            clients = [threading.Thread(target=self.run_client, args=(proxy, number))
                       for number in range(CLIENTS)]
            for client in clients:
                client.start()
            self.change_rules(proxy, clients)
            self.calm.set()
            for client in clients:
                client.join()
            faults = proxy.events()
            self.count["rule changes"] += len(proxy.rule_changes)
        for address, talk in self.talks.items():
            self.check(address, talk, [record for record in faults if record.client == address])

    def change_rules(self, proxy, clients):
        """Change the rules until the clients are done, or for some seconds; then remove them."""
        rng = random.Random("rules %d" % self.seed)
        deadline = time.monotonic() + 4
        while time.monotonic() < deadline and any(client.is_alive() for client in clients):
            toxics = change_toxics(rng, self.protocol, proxy.toxics)
            if rng.random() < 0.1:
                toxics = []
            self.per_connection.update(
                toxic.name for toxic in toxics if toxic.rule.per == "connection")
            if rng.random() < 0.5:
                proxy.loop.run_sync(proxy.set_toxics, toxics)
            else:
                proxy.loop.call_soon_threadsafe(proxy.set_toxics, toxics)
            if rng.random() < 0.3:
                kind = rng.choice(vaurien.PROTOCOLS[self.protocol].default_errors)
                rules = vaurien.read_rules([{"name": "error", "percent": rng.choice([0, 30, 60]),
                                             "kind": kind, "times": rng.choice([0, 2])}])
                proxy.loop.run_sync(proxy.set_rules, rules)
            time.sleep(rng.choice([0, 0.001, 0.003, 0.01]))
        proxy.loop.run_sync(proxy.set_rules, [])
        proxy.loop.run_sync(proxy.set_toxics, [])

    def run_client(self, proxy, number):
        for talk_number in range(TALKS_PER_CLIENT):
            rng = random.Random("%d %d %d" % (self.seed, number, talk_number))
            talk = TALKS[self.protocol](rng, rng.randint(1, REQUESTS_MAX))
            with contextlib.closing(connect(proxy.port)) as sock:
                address = vaurien.format_address(sock.getsockname())
                with self.lock:
                    self.talks[address] = talk
                try:
                    self.converse(sock, talk, rng)
                except Exception as error:      # the check names the talk
                    talk.problems.append("client: " + vaurien.format_exception(error))

    def converse(self, sock, talk, rng):
        """Send the requests and read the replies, in random pieces.

        The end is when the client has all replies, and the backend the requests without one.
        """
        sock.setblocking(False)
        progress = time.monotonic()
        while not (talk.is_over() and talk.sent_count == len(talk.requests)
                   and not talk.to_backend and talk.silent.issubset(talk.log)):
            talk.write_requests()
            ready, writable, _ = select.select([sock], [sock] if talk.to_backend else [], [], 0.05)
            if ready:
                data = receive_piece(sock, rng)
                if not data:
                    raise EOFError("the proxy has closed the connection")
                talk.receive(data)
            if writable:
                talk.to_backend = send_piece(sock, talk.to_backend, rng)
                if rng.random() < 0.2:
                    time.sleep(rng.choice([0, 0.001, 0.005]))
            if ready or writable or not self.calm.is_set():
                progress = time.monotonic()
            elif time.monotonic() > progress + TIMEOUT:
                raise TimeoutError("no reply for %g s" % TIMEOUT)

    def serve(self, sock):
        """Be the backend of a connection, until the proxy closes it or has ended."""
        with contextlib.suppress(OSError, RuntimeError):
            talk = self.find_talk(vaurien.format_address(sock.getpeername()))
            rng = random.Random(self.seed)
            sock.setblocking(False)
            while True:
                ready, writable, _ = select.select(
                    [sock], [sock] if talk.to_client else [], [], TIMEOUT)
                if ready:
                    data = receive_piece(sock, rng)
                    if not data:
                        return
                    talk.serve(data)
                if writable:
                    talk.to_client = send_piece(sock, talk.to_client, rng)

    def find_talk(self, backend_address):
        """Return the Talk of the connection that the proxy has made from this address."""
        def find_client():
            for connection in self.proxy.connections.values():
                if connection.backend and backend_address == vaurien.format_address(
                        connection.backend.getsockname()):
                    return connection.name
            return ""

        client = self.proxy.loop.run_sync(find_client)
        wait_until(lambda: client in self.talks)
        return self.talks[client]

    def check(self, address, talk, faults):
        """Check a talk with its fault records, and count it."""
        talk.check([(record.toxic in self.per_connection, record.request) for record in faults
                    if record.handler in ("error", "transient")])
        self.problems += ["%s, seed %d, client %s: %s" % (self.protocol, self.seed, address, text)
                          for text in talk.problems]
        self.count["conversations"] += 1
        self.count["requests"] += len(talk.requests)
        self.count["errors"] += talk.outcomes.count(None)
        self.count["substitutes"] += talk.log.count(SUBSTITUTE)


def main():
    args = read_arguments("fuzz", "Check pipelined requests while rules change.")
    count, deadline, problems, rounds = Counter(), time.monotonic() + args.seconds, [], 0
    while not problems and (rounds == 0 or time.monotonic() < deadline):
        seed = args.seed + rounds
        protocol = list(TALKS)[seed % len(TALKS)]
        one_round = Round(protocol, seed, count)
        one_round.run()
        problems, rounds = one_round.problems, rounds + 1
    print("%d rounds: %s" % (rounds, ", ".join(
        "%d %s" % (number, name) for name, number in count.items())))
    if problems:
        print("\n".join(problems[:20]))
        print("repeat it with: python3 .ci/fuzz.py --seconds 1 --seed %d" % seed)
        return 1
    print("each request was answered once and in order")
    return 0


if __name__ == "__main__":
    sys.exit(main())
