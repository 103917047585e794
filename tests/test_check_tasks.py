"""The check of tasks before training finds what is wrong with each, and writes the others."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from recipes import check_tasks
from recipes.check_tasks import check, do_nothing, overlaps
from rewards import load_tasks

ROOT = Path(__file__).parent.parent


def row(task_id, test, solution="    return x + 1\n", prompt=None, **fields):
    prompt = prompt or 'def f(x):\n    """Return x + 1."""\n'
    test = "def check(candidate):\n" + "".join(f"    {line}\n" for line in test.splitlines())
    task = {"task_id": task_id, "prompt": prompt, "test": test, "entry_point": "f", "canonical_solution": solution}
    return task | fields


ROWS = [
    row("good", "assert candidate(1) == 2"),
    row("wrong", "assert candidate(1) == 3"),
    row("weak", "assert candidate(1) is not None", "    return 1\n"),
    row("flaky", "import random\nassert candidate(1) == 2 and random.random() < 0.5"),
    row("slow", "assert candidate(1) == 2\nimport time\ntime.sleep(1.2)"),
    row("broken", "import no_such_package\nassert candidate(1) == 2"),
    row("no reference", "assert candidate(1) == 2", ""),
    row("weak, no reference", "assert candidate(1) in (1, 2)", ""),
]


@pytest.fixture
def task_file(tmp_path):
    file = tmp_path / "tasks.jsonl"
    file.write_text("".join(json.dumps(task) + "\n" for task in ROWS))
    return file


def test_each_problem_is_found(task_file):
    tasks = load_tasks(str(task_file))
    findings = check(tasks, timeout=2.0)
    for _ in range(20):  # three runs of a coin agree in one of four checks
        if findings["flaky"] == ["reference is flaky"]:
            break
        findings |= check(tasks.select([3]), timeout=2.0)
    assert findings == {
        "good": [],
        "wrong": ["reference does not pass: failed"],
        "weak": ["a do-nothing answer passes"],
        "flaky": ["reference is flaky"],
        "slow": ["reference is slow"],
        "broken": ["cannot be judged"],
        "no reference": [],
        "weak, no reference": ["a do-nothing answer passes"],
    }


@pytest.mark.parametrize("entry_point", ["f", "f, g", "Solution().f", "__main__"])
def test_do_nothing_answers_define_what_is_asked_for(entry_point):
    test = "def check(candidate):\n    assert candidate('x') == 'no such answer'\n"
    programs = do_nothing({"entry_point": entry_point, "test": test, "setup": ""})
    assert len({program.solution for program in programs}) == len(programs) >= 4
    for program in programs:
        compile(program.solution, "answer", "exec")  # ours, not a policy's


def test_overlap_is_found_under_another_id_and_another_wording():
    test_tasks = load_tasks("humaneval", "test")
    first = dict(test_tasks[0])
    renamed = first | {"task_id": "Python/2", "prompt": first["prompt"].replace('"""', '""" Please: ', 1)}
    same_name = first | {"task_id": "other", "prompt": f"def {first['entry_point']}(x):\n    return 'unrelated'\n"}
    tasks = test_tasks.from_list([renamed, same_name])
    assert overlaps(tasks, test_tasks.from_list([first, first])) == ["Python/2"], "once, however many it overlaps with"


def test_overlap_with_a_file_of_ones_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("tasks", "tests"):
        Path(f"{name}.jsonl").write_text(json.dumps(row(f"[/{name}]", "assert candidate(1) == 2")) + "\n")
    monkeypatch.setattr(
        sys, "argv", ["check_tasks.py", "--dataset_name", "tasks.jsonl", "--overlap_with", "tests.jsonl"]
    )
    check_tasks.main()
    printed = capsys.readouterr().out
    assert re.search(r"overlaps with a test task of tests.jsonl +\| +1 \| \[/tasks\]", printed), printed


def test_command_prints_a_table_and_writes_the_fit_tasks(task_file, tmp_path, monkeypatch):
    good = tmp_path / "new" / "good.jsonl"
    command = [sys.executable, "recipes/check_tasks.py", "--dataset_name", str(task_file), "--output_file", str(good)]
    run = subprocess.run([*command, "--sandbox_timeout", "2"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "fit for training" in run.stdout and "| cannot be judged" in run.stdout
    assert re.search(r"^broken cannot be judged: .*ModuleNotFoundError: .*no_such_package", run.stdout, re.MULTILINE)
    assert {"good", "no reference"} <= set(load_tasks(str(good))["task_id"]) <= {"good", "no reference", "flaky"}
    monkeypatch.setattr(sys, "argv", command[1:])
    with pytest.raises(SystemExit, match="exists, choose another name"):
        check_tasks.main()


def test_a_policy_adds_pass_rates_and_limits_them(tmp_path, tiny_folder, monkeypatch, capsys):
    file, good = tmp_path / "tasks.jsonl", tmp_path / "good.jsonl"
    tasks = [row(name, "assert candidate(1) == 2", prompt=f"def f(x):  # {name}\n") for name in ("some", "always")]
    file.write_text("".join(json.dumps(task) + "\n" for task in [*tasks, ROWS[1]]))
    replies = {"some": ["    return x + 1", "    return x"], "always": ["    return x + 1", "    return 1 + x"]}
    samples = [{"task_id": name, "completion": text} for name, texts in replies.items() for text in texts]
    monkeypatch.setattr(check_tasks, "complete", lambda model, tokenizer, asked, *rest: samples)
    line = ["--dataset_name", str(file), "--output_file", str(good), "--max_pass_rate", "0.9", "--num_generations", "2"]
    monkeypatch.setattr(sys, "argv", ["check_tasks.py", *line])
    with pytest.raises(SystemExit, match="min_pass_rate and max_pass_rate need a policy: set model_name_or_path"):
        check_tasks.main()
    monkeypatch.setattr(sys, "argv", ["check_tasks.py", *line, "--model_name_or_path", str(tiny_folder)])
    check_tasks.main()
    output = capsys.readouterr().out
    assert "| pass rate is above max_pass_rate" in output and "mean pass rate of 2 tasks: 0.750" in output
    assert [json.loads(text) for text in good.read_text().splitlines()] == [
        {**load_tasks(str(file), "all")[0], "pass_rate": 0.5}
    ]
    assert load_tasks(str(good)).to_list() == [{**load_tasks(str(file))[0], "pass_rate": 0.5}]


def test_completions_that_cannot_be_judged_have_no_pass_rate(task_file, monkeypatch):
    tasks = load_tasks(str(task_file)).filter(lambda task: task["task_id"] in ("good", "broken"))
    samples = [
        {"task_id": name, "completion": text}
        for name in ("good", "broken")
        for text in ("    return x + 1", "    pass")
    ]
    monkeypatch.setattr(check_tasks, "load_sampler", lambda *_: None)
    monkeypatch.setattr(check_tasks, "complete", lambda *_: samples)
    args = check_tasks.CheckArguments(dataset_name=str(task_file), num_generations=2)
    assert check_tasks.pass_rates(tasks, None, args, None, None) == {"good": 0.5, "broken": None}
