"""
The rows of results/ say what their completions do: each is graded again in the sandbox, and the numbers computed again.

Not covered: `passed_plus`, whose tests a user brings; its rate is computed again from the committed flags. Rows on
MBPP are graded again where the environment variable MBPP names its file, mbpp.jsonl; their numbers always are computed
again.
"""

import json
import os
from pathlib import Path

import pytest

from recipes.evaluate import grade, summarize
from rewards import as_chat, load_tasks, task_program, truncate_completion
from sandbox import Sandbox

ROOT = Path(__file__).parent.parent

CUT_OFF = {"timeout", "out_of_memory", "crashed"}  # which limit ends a program first depends on the machine


def disagreements(results):
    """What the rows of a results folder get wrong, one line each."""
    found, rows = [], []
    for path in sorted(results.rglob("per_task.jsonl")):
        metrics = json.loads((path.parent / "metrics.json").read_text())
        samples = [json.loads(line) for line in path.read_text().splitlines()]
        settings, name = metrics["settings"], str(path.parent.relative_to(results))
        for number, value in summarize(samples, metrics["num_tasks"], settings["num_generations"]).items():
            if metrics[number] != (value if isinstance(value, str) else pytest.approx(value, rel=1e-9)):
                found.append(f"{name}: {number} is {metrics[number]}, computed again {value}")
        source = os.environ.get("MBPP") if "mbpp" in settings["dataset_name"] else settings["dataset_name"]
        if source is None:
            continue
        tasks = load_tasks(source, "all")
        if metrics.get("prompt_format") == "chat":
            tasks = as_chat(tasks, settings["chat_instruction"], settings["system_message"])
        tasks = {task["task_id"]: task for task in tasks}
        for sample in samples:
            task, completion = tasks[sample["task_id"]], sample["completion"]
            truncated = truncate_completion(completion) if isinstance(task["prompt"], str) else completion
            strict, cut = (
                task_program(task["prompt"], text, task["test"], task["entry_point"], task["setup"])
                for text in (completion, truncated)
            )
            rows.append((f"{name} {sample['task_id']}", sample, strict, cut))

    # Runs write the same program again and again, and one that took 5 s in vain will not be done after half a second
    # either: only what would disagree gets the time that it had
    programs = list(dict.fromkeys(program for *_, strict, cut in rows for program in (strict, cut)))
    with Sandbox(timeout=0.5) as sandbox:
        verdicts = dict(zip(programs, sandbox.run(programs), strict=True))
    wanted = {strict for _, sample, strict, _ in rows if sample["verdict"] != "timeout"}
    wanted |= {cut for _, sample, _, cut in rows if sample["passed_truncated"]}
    late = [program for program in wanted if verdicts[program].status == "timeout"]
    with Sandbox() as sandbox:
        verdicts |= dict(zip(late, sandbox.run(late), strict=True))
    for name, sample, strict, cut in rows:
        status = verdicts[strict].status
        if sample["verdict"] != status and not {sample["verdict"], status} <= CUT_OFF:
            found.append(f"{name}: verdict is {sample['verdict']}, graded again {status}")
        for flag, passes in (("passed", verdicts[strict].passed), ("passed_truncated", verdicts[cut].passed)):
            if sample[flag] != passes:
                found.append(f"{name}: {flag} is {sample[flag]}, graded again {passes}")
    return found


def test_committed_rows_are_what_their_completions_do():
    assert len([*(ROOT / "results").glob("**/metrics.json")]) > 20
    assert disagreements(ROOT / "results") == []


def write_row(folder, samples, num_tasks, num_generations):
    folder.mkdir(parents=True)
    (folder / "per_task.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    metrics = summarize(samples, num_tasks, num_generations)
    metrics["settings"] = {"dataset_name": "humaneval", "num_generations": num_generations}
    (folder / "metrics.json").write_text(json.dumps(metrics))


def test_a_row_that_says_otherwise_is_found(tmp_path):
    tasks = load_tasks("humaneval", "test").select([0, 1])
    right = tasks[0]["canonical_solution"].rstrip()
    endless = "    while True:\n        pass\n"
    texts = [(0, right), (0, right + "\nprint(undefined)\n"), (1, endless), (1, "    return None\n")]
    samples = [
        {"task_id": tasks[i]["task_id"], "completion": text, "completion_tokens": len(text)} for i, text in texts
    ]
    grade(samples, tasks.to_list(), timeout=1)
    assert [sample["verdict"] for sample in samples] == ["passed", "error", "timeout", "failed"]
    write_row(tmp_path / "right" / "sampled", samples, 2, 2)
    assert disagreements(tmp_path) == []

    forged = [samples[0], samples[1] | {"verdict": "passed", "passed": True}, samples[2], samples[3]]
    forged[3] = samples[3] | {"passed_truncated": True}
    write_row(tmp_path / "forged" / "sampled", forged, 2, 2)
    metrics = tmp_path / "forged" / "sampled" / "metrics.json"
    metrics.write_text(json.dumps(json.loads(metrics.read_text()) | {"median_completion_tokens": 1}))
    first, second = (task["task_id"] for task in tasks)
    median = summarize(samples, 2, 2)["median_completion_tokens"]
    assert disagreements(tmp_path) == [
        f"forged/sampled: median_completion_tokens is 1, computed again {median}",
        f"forged/sampled {first}: verdict is passed, graded again error",
        f"forged/sampled {first}: passed is True, graded again False",
        f"forged/sampled {second}: passed_truncated is True, graded again False",
    ]
