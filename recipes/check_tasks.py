"""
Check tasks before training on them: do the references pass, and does anything pass that should not?

Runs every reference three times and a few do-nothing answers, prints a table, and writes the tasks that are fit for
training as JSONL for [`~rewards.load_tasks`]. With a policy it also samples completions of the fit tasks, writes each
task's `pass_rate`, and can leave out tasks that the policy never or always passes: RL learns nothing from them.

    python recipes/check_tasks.py --dataset_name tasks.jsonl --output_file good.jsonl
    python recipes/check_tasks.py --dataset_name tasks.jsonl --output_file good.jsonl \
        --model_name_or_path qwen2.5-coder-0.5b-instruct --min_pass_rate 0.1 --max_pass_rate 0.9

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
from statistics import mean
from typing import Any

from accelerate.utils import set_seed
from datasets import Dataset
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase
from trl import ModelConfig

from recipes.common.arguments import (
    TaskArguments,
    check_pass_rates,
    check_sampling,
    check_timeout,
    load_stage_tasks,
    parse_settings,
    refuse_several_processes,
)
from recipes.common.policy import check_policy, load_tokenizer, split_off_adapter
from recipes.common.prompts import format_tasks
from recipes.common.run_directory import write_whole
from recipes.common.samples import program_of
from recipes.common.sampling import complete, load_sampler
from rewards import reference_completion
from sandbox import Program, Sandbox, Verdict
from trainers import run_device

NUM_RUNS = 3  # of each reference
NOT_JUDGED = "cannot be judged"
CHUNK = 64  # programs between two updates of the progress bar
SIMILAR = 0.6  # share of a test task's words that make a prompt for a function of its name the same task
NOTHINGS = ("None", "args[0] if args else None", "True", "0", "''", "[]")
NOTHING_SCRIPTS = ("pass", "import sys\nprint(sys.stdin.read())", "print(0)", "print('YES')")


@dataclass
class CheckArguments(TaskArguments):
    """Which tasks are checked, where the good ones go, and how a policy is sampled on them."""

    output_file: str | None = field(
        default=None, metadata={"help": "JSONL file to write the fit tasks to. If not set, none is written."}
    )
    overlap_with: list[str] = field(
        default_factory=lambda: ["humaneval"],
        metadata={"help": "Benchmarks whose test tasks must not be among the tasks: names, files or Hub ids."},
    )
    sandbox_timeout: float = field(default=5.0, metadata={"help": "Seconds that a program may take."})

    min_pass_rate: float = field(
        default=0.0, metadata={"help": "Smallest pass rate of a fit task, in [0, 1], with model_name_or_path."}
    )
    max_pass_rate: float = field(
        default=1.0, metadata={"help": "Largest pass rate of a fit task, in [0, 1], with model_name_or_path."}
    )
    num_generations: int = field(default=8, metadata={"help": "Completions per task."})
    temperature: float = field(default=0.8, metadata={"help": "What the logits are divided by, above 0."})
    top_p: float = field(default=0.95, metadata={"help": "Probability mass to sample from, in (0, 1]."})
    max_completion_length: int = field(default=256, metadata={"help": "Largest number of tokens of a completion."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Completions that are decoded at a time."})
    seed: int = field(default=42, metadata={"help": "Seed of the samples."})

    def __post_init__(self):
        super().__post_init__()
        check_timeout(self.sandbox_timeout)
        check_sampling(self)
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}: write a number above 0")
        check_pass_rates(self.min_pass_rate, self.max_pass_rate)


def main() -> None:
    args, model_args, _ = parse_settings(CheckArguments, ModelConfig)
    refuse_several_processes("check_tasks")
    if args.output_file and Path(args.output_file).exists():
        raise SystemExit(f"output_file: {args.output_file} exists, choose another name or remove it")
    tasks = load_stage_tasks(args.dataset_name, args.dataset_train_split)
    benchmarks = {name: _test_tasks(name) for name in args.overlap_with}
    has_policy = model_args.model_name_or_path is not None
    if not has_policy and (args.min_pass_rate > 0 or args.max_pass_rate < 1):
        raise SystemExit("min_pass_rate and max_pass_rate need a policy: set model_name_or_path")
    if has_policy:
        adapter = split_off_adapter(model_args)
        check_policy(model_args, adapter, generates_on=run_device())
        tokenizer = load_tokenizer(model_args)
        asked = format_tasks(tasks, args, tokenizer, model_args)
    findings = check(tasks, args.sandbox_timeout)
    for name, others in benchmarks.items():
        for task_id in overlaps(tasks, others):
            findings[task_id].append(f"overlaps with a test task of {name}")
    rates: dict[str, float | None] = {}
    if has_policy:
        fit = asked.select([i for i, task_id in enumerate(asked["task_id"]) if not findings[task_id]])
        rates = pass_rates(fit, tokenizer, args, model_args, adapter) if len(fit) else {}
        for task_id, rate in rates.items():
            if rate is None:
                findings[task_id].append("no completion can be judged")
            elif rate < args.min_pass_rate:
                findings[task_id].append("pass rate is below min_pass_rate")
            elif rate > args.max_pass_rate:
                findings[task_id].append("pass rate is above max_pass_rate")
    print_findings(tasks, findings)
    if judged := [rate for rate in rates.values() if rate is not None]:
        print(f"mean pass rate of {len(judged)} tasks: {mean(judged):.3f}")
    if args.output_file:
        good = [task for task in _rows(tasks) if not findings[task["task_id"]]]
        good = [task | {"pass_rate": rates[task["task_id"]]} if rates else task for task in good]
        write_whole(Path(args.output_file), "".join(json.dumps(task) + "\n" for task in good))
        print(f"{len(good)} of {len(tasks)} tasks are written to {args.output_file}")


def _test_tasks(name: str) -> Dataset:
    """The test split of a benchmark, or all tasks of a file that is one split."""
    try:
        return load_stage_tasks(name, "test", "overlap_with")
    except SystemExit:
        if not Path(name).expanduser().is_file():
            raise
        return load_stage_tasks(name, "all", "overlap_with")


def check(tasks: Dataset, timeout: float) -> dict[str, list[str]]:
    """
    Run references and do-nothing answers. Print why tasks cannot be judged, for the first three of them.

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
            programs += [(task["task_id"], True, program_of(task, completion))] * NUM_RUNS
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
    unjudged = [task_id for task_id, found in findings.items() if found == [NOT_JUDGED]]
    for task_id in unjudged[:3]:
        of_task = verdicts[task_id][True] + verdicts[task_id][False]
        print(f"{task_id} {NOT_JUDGED}: {next(one.detail for one in of_task if one.status == 'invalid')}")
    return findings


def pass_rates(
    tasks: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    args: CheckArguments,
    model_args: ModelConfig,
    adapter: str | None,
) -> dict[str, float | None]:
    """
    Sample a policy on tasks.

    Args:
        tasks ([`~datasets.Dataset`]):
            Tasks in the run's prompt format.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The policy's tokenizer.
        args ([`CheckArguments`]):
            How to sample.
        model_args ([`~trl.ModelConfig`]):
            A base that passed [`check_policy`](common/policy.py).
        adapter (`str`, *optional*):
            Directory of the adapter on it.

    Returns:
        `dict[str, float | None]`: Share of the completions that could be judged which pass, by task id; `None` without
        any.
    """
    set_seed(args.seed)
    model = load_sampler(model_args, adapter)
    with tqdm(total=len(tasks) * args.num_generations, desc="Completing", unit="completion") as bar:
        samples = complete(model, tokenizer, tasks, args, bar)
    by_id = {task["task_id"]: task for task in _rows(tasks)}
    with Sandbox(timeout=args.sandbox_timeout) as sandbox:
        verdicts = sandbox.run(program_of(by_id[sample["task_id"]], sample["completion"]) for sample in samples)
    passes = {task_id: [] for task_id in by_id}
    for sample, verdict in zip(samples, verdicts, strict=True):
        if verdict.status != "invalid":
            passes[sample["task_id"]].append(verdict.passed)
    return {task_id: mean(ones) if ones else None for task_id, ones in passes.items()}


def _judge(references: list[Verdict], nothings: list[Verdict], timeout: float) -> list[str]:
    """Say what is wrong with a task, given the verdicts of its reference's runs and of the do-nothing answers."""
    statuses = {verdict.status for verdict in references}
    if "invalid" in statuses or all(verdict.status == "invalid" for verdict in nothings):
        return [NOT_JUDGED]
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
    columns = task["test"], entry_point, task.get("setup") or "", bool(task.get("inline"))
    return [Program(source, *columns) for source in sources]


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
        if any(
            len(words & _words(task["prompt"])) >= SIMILAR * len(words) for words in known.get(task["entry_point"], [])
        )
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
        table.add_row(finding, str(count), Text(", ".join(ids[:3])))
    if without:
        table.add_row("no reference", str(len(without)), Text(", ".join(without[:3])))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
