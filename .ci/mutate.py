#!/usr/bin/env python3
"""Mutation test: change vaurien.py in one place, run the tests, and see whether they notice.

    python3 .ci/mutate.py [--count 40] [--seed N] [--tests TestA,TestB] [--root DIR]

For each mutation it prints the line, the change, and "caught" or "NOT caught". Each mutation
that is not caught is either a gap in the tests, or it does not change the behaviour: judge it
by hand. The same seed makes the same mutations of the same file.

A mutation swaps an operator, negates a condition, replaces a constant, or removes a statement.
Only code in functions is changed. Docstrings, tables, defaults and calls of the logger are not.
The tests run on a copy in a temporary folder, in one process for each mutation. Tests that run
longer than the time limit count as caught. Needs Python 3.8 or newer,
on a POSIX system.
"""
import argparse
import ast
import contextlib
import io
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tokenize
from collections import namedtuple

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

COMPARISONS = {     # {operator of the ast module: (its tokens, their replacement)}
    ast.Lt: (("<",), "<="), ast.LtE: (("<=",), "<"),
    ast.Gt: ((">",), ">="), ast.GtE: ((">=",), ">"),
    ast.Eq: (("==",), "!="), ast.NotEq: (("!=",), "=="),
    ast.Is: (("is",), "is not"), ast.IsNot: (("is", "not"), "is"),
    ast.In: (("in",), "not in"), ast.NotIn: (("not", "in"), "in"),
}
OPERATORS = {
    ast.And: (("and",), "or"), ast.Or: (("or",), "and"),
    ast.Add: (("+",), "-"), ast.Sub: (("-",), "+"),
}
CONSTANTS = {"0": "1", "1": "0", "True": "False", "False": "True"}      # {source: replacement}
FUNCTIONS = ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda

# This program runs the test classes named in its arguments; without arguments, it runs all of
# them, in the order of their definitions, because the first ones are the fastest.
RUNNER = """
import sys, unittest
import test_vaurien
classes = sys.argv[1:] or [name for name, value in vars(test_vaurien).items()
                           if isinstance(value, type) and issubclass(value, unittest.TestCase)]
unittest.main(test_vaurien, argv=["mutate", "--failfast", *classes])
"""
BASELINE_TIMEOUT = 1800.0       # seconds for the tests without a mutation

# Replace source[start:end], which begins in this line.
Mutation = namedtuple("Mutation", "start end replacement line")


class Source:
    """The text of a file, its tokens, and offsets for the positions of its syntax tree."""

    def __init__(self, text):
        self.text = text
        self.lines = text.splitlines(keepends=True)
        self.starts = [0]
        for line in self.lines:
            self.starts.append(self.starts[-1] + len(line))
        self.tree = ast.parse(text)
        self.tokens = [
            (self.starts[token.start[0] - 1] + token.start[1],
             self.starts[token.end[0] - 1] + token.end[1], token.string)
            for token in tokenize.generate_tokens(io.StringIO(text).readline)
            if token.type in (tokenize.NAME, tokenize.OP)]

    def offset(self, line, column):
        """Return the offset of a position of the ast module, which counts bytes of UTF-8."""
        prefix = self.lines[line - 1].encode()[:column]
        return self.starts[line - 1] + len(prefix.decode())

    def span(self, node):
        """Return (start, end) of a node."""
        return (self.offset(node.lineno, node.col_offset),
                self.offset(node.end_lineno, node.end_col_offset))

    def find_operator(self, strings, left, right):
        """Return (start, end) of these tokens between two operands, or None."""
        start, end = self.span(left)[1], self.span(right)[0]
        between = [token for token in self.tokens if start <= token[0] and token[1] <= end]
        for index in range(len(between)):
            tokens = between[index:index + len(strings)]
            if tuple(token[2] for token in tokens) == strings:
                return tokens[0][0], tokens[-1][1]
        return None

    def apply(self, mutation):
        return self.text[:mutation.start] + mutation.replacement + self.text[mutation.end:]

    def lines_of(self, text, mutation, size):
        """Return the lines of a text that a mutation touches, as one line."""
        start = text.rfind("\n", 0, mutation.start) + 1
        end = text.find("\n", mutation.start + size)
        return " ".join(text[start:end].split())

    def describe(self, mutation):
        """Return the changed lines before and after."""
        before = self.lines_of(self.text, mutation, mutation.end - mutation.start)
        after = self.lines_of(self.apply(mutation), mutation, len(mutation.replacement))
        return "%s\n       -> %s" % (before, after)


# -- Mutations ----------------------------------------------------------------

def mutable_nodes(tree):
    """Yield the nodes in the bodies of functions, except those of skipped statements."""
    stack = [(tree, False)]
    while stack:
        node, in_function = stack.pop()
        if is_skipped(node):
            continue
        if in_function:
            yield node
        if isinstance(node, FUNCTIONS):
            body = node.body if isinstance(node.body, list) else [node.body]
            children = [(child, True) for child in body]
        else:
            children = [(child, in_function) for child in ast.iter_child_nodes(node)]
        stack += reversed(children)


def is_skipped(node):
    """Return whether a node and its children stay as they are: docstrings, calls of the logger.

    Nodes in an f-string have no useful positions before Python 3.12.
    """
    if isinstance(node, ast.JoinedStr):
        return True
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return True
    function = node.func if isinstance(node, ast.Call) else None
    statement = node.value if isinstance(node, ast.Expr) else None
    if isinstance(statement, ast.Call):
        function = statement.func
    return (isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name)
            and function.value.id in ("log", "logger", "logging"))


def find_mutations(source):
    """Return all mutations of a source, in the order of their places."""
    mutations = []
    for node in mutable_nodes(source.tree):
        for make in (mutate_operator, negate_condition, mutate_constant, remove_statement):
            for start, end, replacement in make(source, node):
                line = source.text.count("\n", 0, start) + 1
                mutations.append(Mutation(start, end, replacement, line))
    return sorted(set(mutations))


def mutate_operator(source, node):
    """Swap comparisons, `and` and `or`, + and -."""
    if isinstance(node, ast.Compare):
        table, operands, operators = COMPARISONS, [node.left, *node.comparators], node.ops
    elif isinstance(node, ast.BoolOp):
        table, operands = OPERATORS, node.values
        operators = [node.op] * (len(operands) - 1)
    elif isinstance(node, ast.BinOp):
        table, operands, operators = OPERATORS, [node.left, node.right], [node.op]
    else:
        return
    for operator, left, right in zip(operators, operands, operands[1:]):
        tokens, replacement = table.get(type(operator), (None, None))
        span = tokens and source.find_operator(tokens, left, right)
        if span:
            yield (*span, replacement)


def negate_condition(source, node):
    """Negate the condition of `if`, `while`, a conditional expression or a comprehension."""
    tests = []
    if isinstance(node, (ast.If, ast.While, ast.IfExp)):
        tests = [node.test]
    elif isinstance(node, ast.comprehension):
        tests = node.ifs
    for test in tests:
        if not isinstance(test, ast.Constant):          # `while True` would never run
            start, end = source.span(test)
            yield start, end, "not (%s)" % source.text[start:end]


def mutate_constant(source, node):
    """Swap 0 and 1, True and False."""
    if isinstance(node, ast.Constant):
        start, end = source.span(node)
        replacement = CONSTANTS.get(source.text[start:end])
        if replacement:
            yield start, end, replacement


def remove_statement(source, node):
    """Replace a statement by `pass`, and a return value by None.

    Assignments to local names stay: without them, most functions only raise NameError.
    """
    removable = isinstance(node, (ast.AugAssign, ast.Delete, ast.Raise, ast.Break, ast.Continue))
    if isinstance(node, ast.Assign):
        removable = all(isinstance(target, (ast.Attribute, ast.Subscript))
                        for target in node.targets)
    elif isinstance(node, ast.Expr):
        removable = isinstance(node.value, (ast.Call, ast.Yield, ast.YieldFrom))
    elif isinstance(node, ast.Return) and node.value and not is_none(node.value):
        yield (*source.span(node), "return None")
    if removable:
        yield (*source.span(node), "pass")


def is_none(node):
    return isinstance(node, ast.Constant) and node.value is None


def choose_mutations(source, count, seed):
    """Return `count` random mutations that compile, in the order of their places."""
    mutations = find_mutations(source)
    random.Random(seed).shuffle(mutations)
    chosen = []
    for mutation in mutations:
        if len(chosen) == count:
            break
        with contextlib.suppress(SyntaxError):
            compile(source.apply(mutation), "vaurien.py", "exec")
            chosen.append(mutation)
    return sorted(chosen)


# -- Tests --------------------------------------------------------------------

def copy_project(root, folder):
    """Copy the files of the project, and the folder .github, to a folder: the tests read them."""
    for name in os.listdir(root):
        path = os.path.join(root, name)
        if os.path.isfile(path):
            shutil.copy(path, folder)
    shutil.copytree(os.path.join(root, ".github"), os.path.join(folder, ".github"))


def run_tests(folder, tests, timeout):
    """Run the tests in a folder. Returns (passed, output); output is None after the time limit.

    The process gets a session of its own, so that its children can be killed too.
    """
    tmp = os.path.join(folder, "tmp")
    os.mkdir(tmp)
    os.chmod(tmp, 0o1777)       # the tests start servers as other users
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [sys.executable, "-B", "-c", RUNNER, *tests], cwd=folder, stdin=subprocess.DEVNULL,
            stdout=output, stderr=output, start_new_session=True,
            env=dict(os.environ, TMPDIR=tmp))
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            shutil.rmtree(tmp, ignore_errors=True)
        output.seek(0)
        text = output.read().decode(errors="replace")
    return status == 0, None if status is None else text


def failed_test(output):
    """Return the name of the first test that failed, or the last line of the output."""
    match = re.search(r"^(?:ERROR|FAIL): (\w+) \((?:test_vaurien\.)?(\w+)", output, re.M)
    if match:
        return "%s.%s" % (match.group(2), match.group(1))
    return (output.strip().splitlines() or ["no output"])[-1]


def run_mutations(source, mutations, folder, tests):
    """Run the tests for each mutation and print the results. Returns how many are caught."""
    started = time.monotonic()
    passed, output = run_tests(folder, tests, BASELINE_TIMEOUT)
    if not passed:
        sys.exit("the tests fail without a mutation:\n%s" % (output or "time limit"))
    baseline = time.monotonic() - started
    timeout = 10 + 3 * baseline
    print("tests: %.1f s without a mutation; time limit %.1f s" % (baseline, timeout))
    caught = 0
    for mutation in mutations:
        print("line %d: %s" % (mutation.line, source.describe(mutation)), flush=True)
        with open(os.path.join(folder, "vaurien.py"), "w", encoding="utf-8") as file:
            file.write(source.apply(mutation))
        passed, output = run_tests(folder, tests, timeout)
        caught += not passed
        if passed:
            print("       NOT caught", flush=True)
        else:
            print("       caught by %s" % ("the time limit" if output is None
                                          else failed_test(output)), flush=True)
    return caught


def main():
    parser = argparse.ArgumentParser(
        description="Change vaurien.py in random places, and see whether the tests notice.")
    parser.add_argument("--count", type=int, default=40, metavar="N",
                        help="number of mutations (default: 40)")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(32),
                        metavar="N", help="repeat the run that printed this seed")
    parser.add_argument("--tests", default="", metavar="CLASS,...",
                        help="test classes to run (default: all)")
    parser.add_argument("--root", default=ROOT, metavar="DIR",
                        help="folder with vaurien.py and test_vaurien.py (default: this project)")
    args = parser.parse_args()
    try:
        with open(os.path.join(args.root, "vaurien.py"), encoding="utf-8") as file:
            source = Source(file.read())
    except OSError as error:
        parser.error("--root: %s" % error)
    tests = args.tests.split(",") if args.tests else []
    mutations = choose_mutations(source, args.count, args.seed)
    print("seed %d, %d mutations" % (args.seed, len(mutations)))
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)     # as for tmp in run_tests
        copy_project(args.root, folder)
        caught = run_mutations(source, mutations, folder, tests)
    print("%d of %d mutations caught" % (caught, len(mutations)))


if __name__ == "__main__":
    main()
