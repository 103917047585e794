"""Two evaluations side by side, and completions as programs for other graders, evalplus among them."""

import json
import sys

import pytest
from test_recipes import TASKS

from recipes import compare, evaluate
from recipes.common.samples import read_samples, write_programs
from rewards import as_chat, load_tasks, reference_completion
from sandbox import Program, Sandbox


def write_results(folder, rows):
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text("{}")
    fields = ("task_id", "completion", "completion_tokens", "verdict", "passed")
    lines = [json.dumps(dict(zip(fields, row, strict=True))) + "\n" for row in rows]
    (folder / "per_task.jsonl").write_text("".join(lines))
    return str(folder)


def run(monkeypatch, capsys, stage, *arguments):
    monkeypatch.setattr(sys, "argv", [f"{stage.__name__}.py", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "90")
    stage.main()
    return capsys.readouterr().out


@pytest.fixture
def results(tmp_path):
    first = [("t/1", "same", 4, "failed", False), ("t/2", "[bold]a\x1b[2Jb", 5, "failed", False)]
    first += [("t/3", "x = 1", 6, "passed", True), ("t/4", "only here", 7, "passed", True)]
    second = [("t/1", "same", 4, "failed", False), ("t/2", "other", 8, "failed", False)]
    second += [("t/3", "x = 2", 9, "timeout", False)]
    return [write_results(tmp_path / name, rows) for name, rows in (("sft", first), ("rl", second))]


def test_tasks_on_which_two_runs_differ_come_first(results, monkeypatch, capsys):
    out = run(monkeypatch, capsys, compare, *results)
    assert [line.strip() for line in out.splitlines() if line.startswith("t/")] == ["t/3", "t/2", "t/1"]
    (header,) = [line for line in out.splitlines() if "timeout" in line]
    assert [part.strip() for part in header.strip("│").split("│")] == ["sft: passed, 6 tokens", "rl: timeout, 9 tokens"]
    (row,) = [line for line in out.splitlines() if "other" in line]
    assert [part.strip() for part in row.strip("│").split("│")] == ["[bold]a\\x1b[2Jb", "other"]
    assert out.splitlines()[-2:] == [
        "sft: 1/3 passed, 5.0 tokens on average; better on 1: t/3",
        "rl: 0/3 passed, 7.0 tokens on average; better on 0",
    ]
    assert out.count("only here") == 0, "the second run has no answer to it"


def test_one_task_is_picked(results, monkeypatch, capsys, tmp_path):
    out = run(monkeypatch, capsys, compare, *results, "--task", "t/3")
    assert "x = 1" in out and "x = 2" in out and "t/2" not in out and "on average" not in out
    with pytest.raises(SystemExit, match="--task: t/4 is not in both evaluations, whose tasks are t/3, t/2, t/1"):
        run(monkeypatch, capsys, compare, *results, "--task", "t/4")
    with pytest.raises(SystemExit, match="holds no finished evaluation"):
        run(monkeypatch, capsys, compare, results[0], tmp_path)
    several = [(f"t/{n // 2}", "text", 3, "passed", n % 2 == 1) for n in range(4)]
    folders = [write_results(tmp_path / name / "sampled", several) for name in "ab"]
    out = run(monkeypatch, capsys, compare, *folders, "--task", "t/1")
    assert out.count("1/2 passed") == 2


def programs(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_programs_are_whole(tmp_path):
    """Every reference of HumanEval passes as a program without a prompt or setup, in both prompt formats."""
    tasks = load_tasks("humaneval", "all")
    for name, rows in (("text", tasks.to_list()), ("chat", as_chat(tasks).to_list())):
        completions = [reference_completion(row) for row in rows]
        completions = [text if isinstance(text, str) else text[0]["content"] for text in completions]
        samples = [{"task_id": row["task_id"], "completion": text} for row, text in zip(rows, completions, strict=True)]
        write_programs(str(tmp_path / "new" / name), samples, rows)
        written = programs(tmp_path / "new" / name)
        assert [list(program) for program in written] == [["task_id", "solution"]] * 164
        assert [program["task_id"] for program in written] == [row["task_id"] for row in rows]
        wanted = [
            Program(program["solution"], row["test"], row["entry_point"])
            for program, row in zip(written, tasks.to_list(), strict=True)
        ]
        with Sandbox(timeout=5.0) as sandbox:
            verdicts = sandbox.run(wanted)
        failed = [row["task_id"] for row, verdict in zip(rows, verdicts, strict=True) if not verdict.passed]
        assert failed == ["HumanEval/32", "HumanEval/38", "HumanEval/50"], "whose tests call helpers of the prompt"


def test_evaluate_writes_programs_of_a_finished_evaluation_too(tmp_path, tiny_folder, monkeypatch, capsys):
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text("".join(json.dumps(task) + "\n" for task in TASKS))
    fields = {"model_name_or_path": tiny_folder, "dataset_name": tasks, "dataset_test_split": "train"}
    fields |= {"dtype": "float32", "max_completion_length": 4, "output_dir": tmp_path / "row"}
    arguments = [part for name, value in fields.items() for part in (f"--{name}", value)]
    run(monkeypatch, capsys, evaluate, *arguments, "--programs_file", tmp_path / "first.jsonl")
    monkeypatch.setattr(evaluate, "load_sampler", None)
    out = run(monkeypatch, capsys, evaluate, *arguments, "--programs_file", tmp_path / "second.jsonl")
    assert "Completing" not in out
    rows = read_samples(tmp_path / "row")
    assert programs(tmp_path / "first.jsonl") == programs(tmp_path / "second.jsonl") == [
        {"task_id": task["task_id"], "solution": task["prompt"] + row["completion"]}
        for task, row in zip(TASKS, rows, strict=True)
    ]  # fmt: skip
    assert "0/3" in run(monkeypatch, capsys, evaluate, *arguments), "and it is one and the same run without"
