"""What the tests of a program see of its solution, and what they may do themselves.

Not covered here: verdicts in general (test_sandbox.py), and solutions that want to deceive (test_attacks.py).
"""

import pytest
from test_sandbox import GOOD, statuses

from sandbox import Program, Sandbox

POINT = """
from __future__ import annotations
from dataclasses import dataclass
@dataclass
class Point:
    x: int
"""
THREADS = "from concurrent.futures import ThreadPoolExecutor\nfrom threading import Thread\n"


@pytest.mark.parametrize(
    "raising, seen",
    [
        ("raise ValueError('text')", "type(e) is ValueError and str(e) == 'text'"),
        ("raise ValueError('text', 2)", "e.args == ('text', 2)"),
        ("raise ValueError(len)", "str(e) == '<built-in function len>'"),
        ("raise type('E', (IndexError,), {})('text')", "type(e) is IndexError and e.args == ('text',)"),
        ("raise type('E', (ValueError,), {'__str__': lambda e: 'text'})(1, 2)", "e.args == ('text',)"),
        ("raise KeyError('key')", "type(e) is KeyError and e.args == ('key',)"),
        ("open('none')", "type(e) is FileNotFoundError and (e.errno, e.filename) == (2, 'none')"),
        ("b'x\\xff'.decode()", "type(e) is UnicodeDecodeError and (e.object, e.start, e.end) == (b'x\\xff', 1, 2)"),
        ("'\\xff'.encode('ascii')", "type(e) is UnicodeEncodeError and 'not in range(128)' in str(e)"),
        ("raise ExceptionGroup('several', [ValueError()])", "type(e) is Exception and 'several' in str(e)"),
        ("raise KeyboardInterrupt('text')", "type(e) is not Exception and str(e) == 'KeyboardInterrupt: text'"),
    ],
)
def test_an_exception_arrives_with_what_it_says(sandbox, raising, seen):
    tests = f"try:\n    f(1)\nexcept Exception as e:\n    assert {seen}, repr(e)\nelse:\n    assert False"
    (verdict,) = sandbox.run([Program(f"def f(x):\n    {raising}", tests, "f")])
    assert verdict.passed, verdict


def test_tests_use_the_helpers_of_the_setup_and_a_main_block_does_not_run(sandbox):
    setup = "def helper(x):\n    return 2 * x\ndef f(x):\n    pass\n"
    source = "def f(x):\n    return 2 * x\nif __name__ == '__main__':\n    raise SystemExit(1)\n"
    assert statuses(sandbox, Program(source, "assert f(3) == helper(3)", "f", setup)) == ["passed"]
    assert statuses(sandbox, Program(source, "assert check(3) == 6", "check", "")) == ["error"]
    assert statuses(sandbox, Program("def check(x):\n    return 6", "assert check(3) == 6", "check")) == ["passed"]


@pytest.mark.parametrize("inline", [False, True])
def test_tests_and_setup_may_define_dataclasses(sandbox, inline):
    tests = "import pickle\nassert pickle.loads(pickle.dumps(Point(3))) == Point(3)\nassert f(Point(3).x) == 4"
    programs = [
        Program(GOOD.solution, tests, "f", POINT, inline=inline),
        Program(GOOD.solution, POINT + tests, "f", inline=inline),
        Program(POINT + GOOD.solution, tests if inline else GOOD.tests, "f", inline=inline),
    ]
    assert statuses(sandbox, *programs) == ["passed"] * 3


@pytest.mark.parametrize("tests", ["", "def test_f():\n    assert f(3) == 5", "assert callable(candidate)"])
def test_tests_that_never_call_the_solution_pass_nothing(sandbox, tests):
    (verdict,) = sandbox.run([Program(GOOD.solution, tests, "f")])
    assert (verdict.status, verdict.detail) == ("invalid", "the tests never call f")


@pytest.mark.parametrize(
    "source, tests, status",
    [
        (GOOD.solution, "with ThreadPoolExecutor(8) as p:\n    assert sum(p.map(f, range(99))) == 4950", "passed"),
        (GOOD.solution, "p = ThreadPoolExecutor(8)\nassert sum(p.map(f, range(99))) == 4950", "passed"),
        (GOOD.solution, "import asyncio\nassert asyncio.run(asyncio.to_thread(f, 3)) == 4", "passed"),
        ("def f(x):\n    raise ValueError", "with ThreadPoolExecutor(8) as p:\n    list(p.map(f, range(99)))", "error"),
        ("def f(x):\n    while True: pass", "t = Thread(target=f, args=[3])\nt.start()\nt.join(0.1)\n1 / 0", "failed"),
        ("import os\nf = os._exit", "[Thread(target=f, args=[3]).start() for _ in range(9)]\nf(3)", "crashed"),
        ("import os\nf = os._exit", "t = Thread(target=f, args=[3])\nt.start()\nt.join()", "crashed"),
    ],
)
def test_tests_may_call_the_solution_from_threads(sandbox, source, tests, status):
    programs = [Program(source, THREADS + tests, "f"), GOOD, GOOD] * 5
    assert statuses(sandbox, *programs) == [status, "passed", "passed"] * 5


def test_a_thread_that_tests_leave_is_gone_for_the_next_program():
    leaving = "import time\nThread(target=time.sleep, args=[60]).start()\nassert f(3) == 4"
    alone = "import threading\nassert f(3) == 4 and threading.active_count() == 1"
    with Sandbox(workers=1) as sandbox:
        programs = [Program(GOOD.solution, tests, "f") for tests in (THREADS + leaving, alone)]
        assert statuses(sandbox, *programs * 3) == ["passed"] * 6


def test_tests_interrupted_within_an_import_do_not_affect_later_programs():
    tests = "import numpy as np\nassert np.allclose(f(3), 4)"
    busy = """
import hashlib, threading, time
def work():
    while True:
        hashlib.pbkdf2_hmac("sha256", b"x", b"y", 10**8)
for _ in range(15):
    threading.Thread(target=work, daemon=True).start()
time.sleep(0.3)
f = lambda x: 0
"""
    pytest.importorskip("numpy")
    with Sandbox(workers=1, timeout=1.0) as sandbox:
        got = statuses(sandbox, Program(busy, tests, "f"), *[Program(GOOD.solution, tests, "f")] * 5)
    assert got == ["timeout"] + ["passed"] * 5


def test_tests_with_alarms_of_their_own_give_no_program_more_time():
    slow = "import time\ndef f(x):\n    time.sleep(0.7)\n    return x + 1"
    alarms = [
        "import signal\nsignal.alarm(10)\nassert f(3) == 4\nsignal.alarm(0)",
        "import signal\nsignal.signal(signal.SIGALRM, signal.SIG_IGN)\nassert f(3) == 4",
        "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})\nassert f(3) == 4",
    ]
    with Sandbox(workers=1, timeout=0.5) as sandbox:
        for tests in alarms:
            programs = [Program(slow, tests, "f"), Program(GOOD.solution, tests, "f"), Program(slow, GOOD.tests, "f")]
            assert statuses(sandbox, *programs) == ["timeout", "passed", "timeout"]
