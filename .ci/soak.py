#!/usr/bin/env python3
"""Soak test: random conversations through random faults. All received bytes are checked.

    python3 .ci/soak.py [--seconds N] [--seed N]
    VAURIEN_PLAIN=1 python3 .ci/soak.py     # as on a system with select() and IPv4 only

The class Soak of test_vaurien.py does the work. The same seed repeats the same data and faults.
Exits with status 1 if a connection has lost or changed a byte, or the proxy has leaked.
"""
import argparse
import os
import random
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from test_vaurien import Soak, setUpModule


def read_arguments(name, description):
    """Read the command line, and print the name, the time and the seed of the run."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seconds", type=float, default=60.0, metavar="N",
                        help="how long to run (default: 60)")
    parser.add_argument("--seed", type=int, metavar="N",
                        default=random.SystemRandom().getrandbits(32),
                        help="repeat the run that printed this seed")
    args = parser.parse_args()
    setUpModule()               # silences the log
    print("%s, %g s, seed %d" % (name, args.seconds, args.seed), flush=True)
    return args


def main():
    args = read_arguments("soak", "Check random conversations through faults.")
    soak = Soak(args.seed)
    errors = soak.run(args.seconds)
    print("%(conversations)d conversations, %(bytes)d bytes received, %(chains)d chains of "
          "faults; %(cut)d were cut by a fault, %(reset)d by a peer" % soak.count)
    print("\n".join(errors) or "every byte accounted for")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
