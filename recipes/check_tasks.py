"""
Check tasks before training on them: do the references pass, and does anything pass that should not?

Runs every reference three times and a few do-nothing answers, prints a table, and writes the tasks that are fit for
training as JSONL for [`~rewards.load_tasks`]. With a policy it also samples completions and adds each task's pass rate,
by which the RL stages can leave out tasks that are never or always passed.

    python recipes/check_tasks.py --dataset_name tasks.jsonl --output_file good.jsonl
    python recipes/check_tasks.py --dataset_name tasks.jsonl --output_file good.jsonl \
        --model_name_or_path qwen2.5-coder-0.5b-instruct --num_generations 8

A task is fit if its reference passes three times in less than half of the timeout, no do-nothing answer passes, and it
overlaps with no test task. A task without a reference is fit if its tests load and no do-nothing answer passes.

Not covered: whether a task is worth learning.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from recipes.common.arguments import TaskArguments, check_timeout, load_stage_tasks, parse_settings
from recipes.common.run_directory import write_whole
from rewards import reference_completion, task_program
from sandbox import Program, Sandbox, Verdict

NUM_RUNS = 3  # of each reference
CHUNK = 64  # programs between two updates of the progress bar
SIMILAR = 0.6  # share of a test task's words that make a prompt for a function of its name the same task
NOTHINGS = ("None", "args[0] if args else None", "True", "0", "''", "[]")
NOTHING_SCRIPTS = ("pass", "import sys\nprint(sys.stdin.read())", "print(0)", "print('YES')")


@dataclass
class CheckArguments(TaskArguments):
    """Which tasks are checked, and where the good ones go."""

    output_file: str | None = field(
        default=None, metadata={"help": "JSONL file to write the fit tasks to. If not set, none is written."}
    )
    overlap_with: list[str] = field(
        default_factory=lambda: ["humaneval"],
        metadata={"help": "Benchmarks whose test tasks must not be among the tasks: names, files or Hub ids."},
    )
    sandbox_timeout: float = field(default=5.0, metadata={"help": "Seconds that a program may take."})

    def __post_init__(self):
        check_timeout(self.sandbox_timeout)


def main() -> None:
    args, _ = parse_settings(CheckArguments)
    if args.output_file and Path(args.output_file).exists():
        raise SystemExit(f"output_file: {args.output_file} exists, choose another name or remove it")
    tasks = load_stage_tasks(args.dataset_name, args.dataset_train_split)
    benchmarks = {name: load_stage_tasks(name, "test", "overlap_with") for name in args.overlap_with}
    findings = check(tasks, args.sandbox_timeout)
    for name, others in benchmarks.items():
        for task_id in overlaps(tasks, others):
            findings[task_id].append(f"overlaps with a test task of {name}")
    print_findings(tasks, findings)
    if args.output_file:
        good = [task for task in tasks if not findings[task["task_id"]]]
        write_whole(Path(args.output_file), "".join(json.dumps(task) + "\n" for task in good))
        print(f"{len(good)} of {len(tasks)} tasks are written to {args.output_file}")


def check(tasks: Dataset, timeout: float) -> dict[str, list[str]]:
    """
    Run references and do-nothing answers.

    Args:
        tasks ([`~datasets.Dataset`]):
            Tasks from [`~rewards.load_tasks`].
        timeout (`float`):
            Seconds that a program may take.

    Returns:
        `dict[str, list[str]]`: What is wrong with each task, by task id. An empty list for a task that is fit.
    """
    findings: dict[str, list[str]] = {task["task_id"]: [] for task in _rows(tasks)}
    programs: list[tuple[str, bool, Program]] = []  # task id, whether it is the reference
    for task in _rows(tasks):
        if task["canonical_solution"].strip():
            completion = reference_completion(task)
            reference = task_program(
                task["prompt"], completion, task["test"], task["entry_point"], task.get("setup") or ""
            )
            programs += [(task["task_id"], True, reference)] * NUM_RUNS
        programs += [(task["task_id"], False, program) for program in do_nothing(task)]

    verdicts: dict[str, dict[bool, list[Verdict]]] = {}
    with Sandbox(timeout=timeout) as sandbox, tqdm(total=len(programs), desc="Checking", unit="program") as bar:
        for start in range(0, len(programs), CHUNK):
            chunk = programs[start : start + CHUNK]
            results = sandbox.run([program for _, _, program in chunk])
            for (task_id, is_reference, _), verdict in zip(chunk, results, strict=True):
                verdicts.setdefault(task_id, {True: [], False: []})[is_reference].append(verdict)
            bar.update(len(chunk))
    for task_id, of_task in verdicts.items():
        findings[task_id] += _judge(of_task[True], of_task[False], timeout)
    return findings


def _judge(references: list[Verdict], nothings: list[Verdict], timeout: float) -> list[str]:
    """Say what is wrong with a task, given the verdicts of its reference's runs and of the do-nothing answers."""
    statuses = {verdict.status for verdict in references}
    if "invalid" in statuses or all(verdict.status == "invalid" for verdict in nothings):
        return ["cannot be judged"]
    found = []
    if len(statuses) > 1:
        found.append("reference is flaky")
    elif statuses and statuses != {"passed"}:
        found.append(f"reference does not pass: {references[0].status}")
    elif any(verdict.seconds > timeout / 2 for verdict in references):
        found.append("reference is slow")
    if any(verdict.passed for verdict in nothings):
        found.append("a do-nothing answer passes")
    return found


def do_nothing(task: dict) -> list[Program]:
    """
    Return programs that a task's tests must not pass.

    Args:
        task (`dict`):
            A row of the tasks.

    Returns:
        `list[Program]`: Functions, methods or scripts that answer without looking at the task.
    """
    entry_point = task["entry_point"]
    if entry_point == "__main__":
        sources = NOTHING_SCRIPTS
    elif "." in entry_point:
        owner, method = entry_point.replace("()", "").split(".")
        sources = [f"class {owner}:\n    def {method}(self, *args, **kwargs):\n        return {x}\n" for x in NOTHINGS]
    else:
        names = [name.strip() for name in entry_point.split(",")]
        sources = ["\n".join(f"def {name}(*args, **kwargs):\n    return {x}\n" for name in names) for x in NOTHINGS]
    return [Program(source, task["test"], entry_point, setup=task.get("setup") or "") for source in sources]


def overlaps(tasks: Dataset, others: Dataset) -> list[str]:
    """
    Find tasks that ask for what other tasks ask for, whatever their ids are.

    Args:
        tasks ([`~datasets.Dataset`]):
            Tasks to look at.
        others ([`~datasets.Dataset`]):
            Tasks to compare with.

    Returns:
        `list[str]`: Ids of tasks whose entry point has the name of another's and whose prompt shares most of its words.
    """
    known: dict[str, list[set[str]]] = {}
    for other in _rows(others):
        known.setdefault(other["entry_point"], []).append(_words(other["prompt"]))
    return [
        task["task_id"]
        for task in _rows(tasks)
        for words in known.get(task["entry_point"], [])
        if len(words & _words(task["prompt"])) >= SIMILAR * len(words)
    ]


def _words(prompt: str | list[dict]) -> set[str]:
    text = prompt if isinstance(prompt, str) else " ".join(message["content"] for message in prompt)
    return set(re.findall(r"\w+", text.lower()))


def _rows(tasks: Dataset) -> Iterator[Any]:
    return iter(tasks)


def print_findings(tasks: Dataset, findings: dict[str, list[str]]) -> None:
    """
    Print how many tasks have which problem, with a few of their ids.

    Args:
        tasks ([`~datasets.Dataset`]):
            The tasks.
        findings (`dict[str, list[str]]`):
            What is wrong with each, by task id.
    """
    table = Table(box=box.MARKDOWN)
    for title in ("finding", "tasks", "such as"):
        table.add_column(title, justify="right" if title == "tasks" else "left", overflow="fold")
    table.add_row("all", str(len(tasks)), "")
    table.add_row("fit for training", str(sum(not found for found in findings.values())), "")
    without = [task["task_id"] for task in _rows(tasks) if not task["canonical_solution"].strip()]
    counts = Counter(finding for found in findings.values() for finding in found)
    for finding, count in counts.most_common():
        ids = [task_id for task_id, found in findings.items() if finding in found]
        table.add_row(finding, str(count), ", ".join(ids[:3]))
    if without:
        table.add_row("no reference", str(len(without)), ", ".join(without[:3]))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
