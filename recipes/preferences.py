"""
Stage 3a, preferences: sample a policy on the training tasks, grade the samples, and form preference pairs for DPO.

Every task is completed `num_generations` times and every completion is graded by the reward. A pair is two completions
of one task, the better one `chosen`. The published rule takes the shortest that passes and the longest that fails:
tasks on which the policy always passes or always fails give no pair.

    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/preferences.py \
        --config recipes/qwen2.5-coder-0.5b/preferences.yaml

Writes to OUTPUT_DIR:

    samples.jsonl   every completion, its tokens, verdict and reward; grows while the stage runs
    pairs.jsonl     `prompt`, `chosen`, `rejected` as TRL reads them, with task id, token ids, token counts and rewards
    dataset/        the same pairs for `datasets.load_from_disk`
    tasks.jsonl     the tasks with the policy's pass rate on each, for the RL stages' min_pass_rate and max_pass_rate
    summary.json    how many tasks gave how many pairs, and why the others gave none

An interrupted run resumes with the first unfinished chunk of tasks, and samples what it would have sampled. Texts have
no EOS token, token ids end in it. A completion that was cut off at the length limit has none, and `dpo.py` adds none:
the policy never emitted it. Not covered: several processes.
"""

import json
import os
import random
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

from accelerate.utils import set_seed
from datasets import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase
from trl import ModelConfig

from recipes.common.arguments import (
    TaskArguments,
    check_length_penalty,
    check_sampling,
    check_timeout,
    load_stage_tasks,
    parse_settings,
    refuse_several_processes,
)
from recipes.common.policy import adapter_sha256, check_policy, load_tokenizer
from recipes.common.prompts import format_tasks
from recipes.common.run_directory import RunDirectory, write_whole
from recipes.common.sampling import complete, load_sampler
from rewards import UnitTestReward
from sandbox import Sandbox
from trainers import run_device

PAIR_RULES = ("shortest_pass_longest_fail", "all_pairs", "reward_margin")


@dataclass
class PreferencesArguments(TaskArguments):
    """What is sampled and how it is paired."""

    adapter_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Directory of the policy's adapter, usually the SFT stage's. If not set, the base is sampled."
        },
    )
    output_dir: str = field(default="runs/preferences", metadata={"help": "Directory for samples and pairs."})
    num_generations: int = field(default=8, metadata={"help": "Completions per task, at least 2."})
    temperature: float = field(default=0.8, metadata={"help": "What the logits are divided by, above 0."})
    top_p: float = field(default=0.95, metadata={"help": "Probability mass to sample from, in (0, 1]."})
    max_completion_length: int = field(default=256, metadata={"help": "Largest number of tokens of a completion."})
    per_device_eval_batch_size: int = field(
        default=64,
        metadata={
            "help": "Completions that are decoded at a time. As many tasks as fill it are sampled, graded and saved "
            "together."
        },
    )
    length_penalty: float = field(default=0.01, metadata={"help": "Penalty per 100 generated tokens, at least 0."})
    sandbox_timeout: float = field(default=5.0, metadata={"help": "Seconds that a program may take."})
    pair_rule: str = field(
        default=PAIR_RULES[0],
        metadata={
            "help": "How pairs are formed. `shortest_pass_longest_fail` forms one pair per task. `all_pairs` pairs "
            "every passing completion with every failing one. `reward_margin` pairs any two whose rewards differ by "
            "min_reward_margin, so that of two passing completions the shorter one is preferred.",
            "choices": list(PAIR_RULES),
        },
    )
    max_pairs_per_task: int = field(
        default=8,
        metadata={
            "help": "Largest number of pairs per task (all_pairs, reward_margin). Those that differ most are kept."
        },
    )
    min_reward_margin: float = field(
        default=0.05, metadata={"help": "Smallest difference of two rewards (reward_margin), above 0."}
    )
    seed: int = field(default=42, metadata={"help": "Seed of the samples."})

    def __post_init__(self):
        super().__post_init__()
        if self.pair_rule not in PAIR_RULES:
            raise ValueError(f"pair_rule is {self.pair_rule!r}: write one of {', '.join(map(repr, PAIR_RULES))}")
        if self.num_generations < 2:
            raise ValueError(f"num_generations is {self.num_generations}: a pair needs 2 or more")
        check_sampling(self)
        check_length_penalty(self.length_penalty)
        check_timeout(self.sandbox_timeout)
        for name in ("temperature", "min_reward_margin"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: write a number above 0")
        if self.max_pairs_per_task < 1:
            raise ValueError(f"max_pairs_per_task is {self.max_pairs_per_task}: write 1 or more")

    @property
    def tasks_per_chunk(self) -> int:
        """Number of tasks that are sampled together."""
        return max(1, self.per_device_eval_batch_size // self.num_generations)


def main() -> None:
    args, model_args, settings = parse_settings(PreferencesArguments, ModelConfig)
    refuse_several_processes("preferences")
    tasks = load_stage_tasks(args.dataset_name, args.dataset_train_split)
    check_policy(model_args, args.adapter_name_or_path, generates_on=run_device())
    if args.adapter_name_or_path:
        settings["adapter_sha256"] = adapter_sha256(args.adapter_name_or_path)
    run = RunDirectory(args.output_dir, "preferences", settings, result="pairs.jsonl")
    if run.finished:
        return print(f"{args.output_dir}: this run has finished")

    tokenizer = load_tokenizer(model_args)
    rows = tasks.to_list()
    tasks = format_tasks(tasks, args, tokenizer, model_args)
    run.start()
    samples = sample_policy(run.path / "samples.jsonl", tasks, tokenizer, args, model_args)
    pairs, summary = form_pairs(samples, tasks.to_list(), args)
    passes = {row["task_id"]: [] for row in rows}
    for sample in samples:
        if sample["verdict"] != "invalid":
            passes[sample["task_id"]].append(sample["passed"])
    rates = {task_id: sum(ones) / len(ones) if ones else None for task_id, ones in passes.items()}
    rows = [row | {"pass_rate": rates[row["task_id"]]} for row in rows]
    write_whole(run.path / "tasks.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_whole(run.path / "summary.json", json.dumps(summary, indent=2) + "\n")
    if not pairs:
        raise SystemExit(
            f"no pair could be formed: of {len(tasks)} tasks the policy always passes {summary['always_pass']} and "
            f"always fails {summary['always_fail']}. Raise num_generations or temperature, or set pair_rule to "
            "'reward_margin', which also pairs two passing completions"
        )
    write_whole(run.path / "pairs.jsonl", "".join(json.dumps(pair) + "\n" for pair in pairs))
    draft = run.path / "dataset.draft"
    Dataset.from_list(pairs).save_to_disk(draft)
    shutil.rmtree(run.path / "dataset", ignore_errors=True)
    os.replace(draft, run.path / "dataset")
    run.finish()
    print(json.dumps(summary, indent=2))


def sample_policy(
    path: Path,
    tasks: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    args: PreferencesArguments,
    model_args: ModelConfig,
) -> list[dict]:
    """
    Complete and grade every task, chunk by chunk, each chunk with its own seed.

    Args:
        path (`Path`):
            File of the samples. Chunks that it holds already are not sampled again.
        tasks ([`~datasets.Dataset`]):
            The tasks.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The policy's tokenizer.
        args ([`PreferencesArguments`]):
            How to sample.
        model_args ([`~trl.ModelConfig`]):
            A base that passed [`check_policy`](common/policy.py); loaded only if something is left to sample.

    Returns:
        `list[dict]`: `task_id`, `completion`, `completion_ids`, `completion_tokens`, `verdict`, `passed` and `reward`
        of every completion, those of a task side by side.
    """
    chunks = [range(len(tasks))[i : i + args.tasks_per_chunk] for i in range(0, len(tasks), args.tasks_per_chunk)]
    samples, num_chunks = _read_chunks(path, [len(chunk) * args.num_generations for chunk in chunks])
    wanted = [task_id for task_id in tasks["task_id"][:] for _ in range(args.num_generations)]
    if [sample["task_id"] for sample in samples] != wanted[: len(samples)]:
        raise SystemExit(f"{path} holds samples of other tasks: choose another output_dir, or remove that file")
    if num_chunks == len(chunks):
        return samples
    model = load_sampler(model_args, args.adapter_name_or_path)
    with (
        Sandbox(timeout=args.sandbox_timeout) as sandbox,
        tqdm(total=len(tasks) * args.num_generations, initial=len(samples), unit="completion") as bar,
    ):
        reward = UnitTestReward(args.length_penalty, sandbox)
        num_passed = sum(sample["passed"] for sample in samples)
        for number in range(num_chunks, len(chunks)):
            set_seed(random.Random(f"{args.seed} {number}").getrandbits(32))
            batch = tasks.select(chunks[number])
            new = complete(model, tokenizer, batch, args, bar)
            _grade(new, batch.to_list(), reward)
            with path.open("a") as file:
                file.write("".join(json.dumps(sample) + "\n" for sample in new))
                file.flush()
                os.fsync(file.fileno())
            samples += new
            num_passed += sum(sample["passed"] for sample in new)
            bar.set_postfix(tasks=f"{chunks[number].stop}/{len(tasks)}", pass_rate=f"{num_passed / len(samples):.2f}")
    return samples


def _read_chunks(path: Path, sizes: list[int]) -> tuple[list[dict], int]:
    """Return the samples of the complete chunks and the number of those; truncate the file behind them."""
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    num_chunks = num_lines = 0
    while num_chunks < len(sizes) and num_lines + sizes[num_chunks] <= len(lines):
        num_lines += sizes[num_chunks]
        num_chunks += 1
    if path.is_file():
        os.truncate(path, sum(map(len, lines[:num_lines])))
    return [json.loads(line) for line in lines[:num_lines]], num_chunks


def _grade(samples: list[dict], tasks: list[dict], reward: UnitTestReward) -> None:
    """Add `completion_tokens`, `verdict`, `passed` and `reward` to every sample."""
    by_id = {task["task_id"]: task for task in tasks}
    own = [by_id[sample["task_id"]] for sample in samples]
    columns = {name: [task.get(name, "") for task in own] for name in ("test", "entry_point", "setup", "inline")}
    extra = {}
    rewards = reward(
        prompts=[task["prompt"] for task in own],
        completions=[sample["completion"] for sample in samples],
        completion_ids=[sample["completion_ids"] for sample in samples],
        log_extra=extra.__setitem__,
        **columns,
    )
    for sample, verdict, number in zip(samples, extra["verdict"], rewards, strict=True):
        sample |= {
            "completion_tokens": len(sample["completion_ids"]),
            "verdict": verdict,
            "passed": verdict == "passed",
            "reward": number,
        }


def form_pairs(samples: list[dict], tasks: list[dict], args: PreferencesArguments) -> tuple[list[dict], dict]:
    """
    Form the preference pairs of all tasks.

    Args:
        samples (`list[dict]`):
            Graded samples, those of a task side by side.
        tasks (`list[dict]`):
            Their tasks, in order.
        args ([`PreferencesArguments`]):
            `num_generations` and how to pair.

    Returns:
        `list[dict]`: The pairs: `task_id`, `prompt`, and of the chosen and the rejected completion its text
        (`chosen`), token ids (`chosen_ids`), their number (`chosen_tokens`) and its reward (`chosen_reward`).
        `dict`: The numbers of `tasks`, `samples`, `not_judged` (completions that no pair takes, as the tests could not
        judge them), `duplicates` (completions that were merged into the first of their text), tasks by outcome,
        `pairs`, tasks `dropped` by reason, and mean tokens of both sides.
    """
    pairs, dropped, count = [], Counter(), Counter()
    for i, task in enumerate(tasks):
        group = samples[i * args.num_generations : (i + 1) * args.num_generations]
        judged = [sample for sample in group if sample["verdict"] != "invalid"]
        count["not_judged"] += len(group) - len(judged)
        distinct = {}
        for sample in judged:
            distinct.setdefault(sample["completion"], sample)
        count["duplicates"] += len(judged) - len(distinct)
        passes = [sample["passed"] for sample in distinct.values()]
        if not passes:
            outcome = "tasks_not_judged"
        else:
            outcome = "always_pass" if all(passes) else "mixed" if any(passes) else "always_fail"
        count[outcome] += 1
        task_pairs = _pair(list(distinct.values()), args)
        count["tasks_with_pairs"] += bool(task_pairs)
        if not task_pairs:
            dropped["no_margin" if passes and args.pair_rule == "reward_margin" else outcome] += 1
        for chosen, rejected in task_pairs:
            pair = {"task_id": task["task_id"], "prompt": task["prompt"]}
            for side, sample in (("chosen", chosen), ("rejected", rejected)):
                pair |= {
                    side: _as_completion(sample["completion"], task["prompt"]),
                    f"{side}_ids": sample["completion_ids"],
                    f"{side}_tokens": sample["completion_tokens"],
                    f"{side}_reward": sample["reward"],
                }
            pairs.append(pair)
    return pairs, {
        "pair_rule": args.pair_rule,
        "tasks": len(tasks),
        "samples": len(samples),
        "not_judged": count["not_judged"],
        "duplicates": count["duplicates"],
        "pass_rate": mean(sample["passed"] for sample in samples),
        "always_pass": count["always_pass"],
        "always_fail": count["always_fail"],
        "tasks_not_judged": count["tasks_not_judged"],
        "pairs": len(pairs),
        "tasks_with_pairs": count["tasks_with_pairs"],
        "dropped": dict(dropped),
        "mean_chosen_tokens": mean(pair["chosen_tokens"] for pair in pairs) if pairs else None,
        "mean_rejected_tokens": mean(pair["rejected_tokens"] for pair in pairs) if pairs else None,
    }


def _as_completion(text: str, prompt: str | list[dict]) -> str | list[dict]:
    """Return a completion's text in the form of its prompt."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def _pair(samples: list[dict], args: PreferencesArguments) -> list[tuple[dict, dict]]:
    """Return the pairs (chosen, rejected) of one task, those that differ most first."""
    if args.pair_rule == "reward_margin":
        # Rewards that differ by the margin itself do so up to rounding
        margin = args.min_reward_margin - 1e-9
        pairs = [(a, b) for a in samples for b in samples if a["reward"] - b["reward"] >= margin]
        pairs.sort(key=lambda pair: pair[1]["reward"] - pair[0]["reward"])
        return pairs[: args.max_pairs_per_task]
    pairs = [(a, b) for a in samples if a["passed"] for b in samples if not b["passed"]]
    pairs.sort(key=lambda pair: pair[0]["completion_tokens"] - pair[1]["completion_tokens"])
    return pairs[: 1 if args.pair_rule == "shortest_pass_longest_fail" else args.max_pairs_per_task]


if __name__ == "__main__":
    main()
