"""
Stage 3a, preferences: sample a policy on the training tasks, grade what it wrote, and form preference pairs for DPO.

Every task is completed `num_generations` times and every completion graded in the sandbox by the reward. A pair is two
completions of one task, the better one `chosen`. The published rule takes the shortest that passes and the longest
that fails; tasks on which the policy always passes or always fails give no pair then.

    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/preferences.py \
        --config recipes/qwen2.5-coder-0.5b/preferences.yaml

Writes to OUTPUT_DIR:

    samples.jsonl   every completion, its tokens, verdict and reward; grows while the stage runs
    pairs.jsonl     `prompt`, `chosen`, `rejected` as TRL reads them, with task id, token ids, token counts and rewards
    dataset/        the same pairs for `datasets.load_from_disk`
    summary.json    how many tasks gave how many pairs, and why the others gave none

A run that was stopped goes on with the task chunk it had not finished, and samples what it would have sampled. Texts
stand without the EOS token, token ids end in it; a completion that was cut off at the length limit has none, and DPO
(`dpo.py`) adds none: the policy never emitted it. Not covered: several processes.
"""

import json
import os
import random
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

from common import (
    TaskArguments,
    check_policy,
    check_timeout,
    load_policy,
    load_stage_tasks,
    load_tokenizer,
    parse_settings,
    refuse_several_processes,
)
from datasets import Dataset
from run_directory import RunDirectory, write_whole
from sampling import adapter_sha256, complete
from tqdm import tqdm
from transformers import set_seed
from trl import ModelConfig

from rewards import UnitTestReward
from sandbox import Sandbox

PAIR_RULES = ("shortest_pass_longest_fail", "all_pairs", "reward_margin")


@dataclass
class PreferencesArguments(TaskArguments):
    """
    What is sampled and how it is paired.

    Args:
        adapter_name_or_path (`str`, *optional*):
            Directory of the policy's adapter, usually the SFT stage's. If `None`, the base is sampled.
        output_dir (`str`, *optional*, defaults to `"runs/preferences"`):
            Where samples and pairs go.
        num_generations (`int`, *optional*, defaults to `8`):
            Completions a task.
        temperature (`float`, *optional*, defaults to `0.8`):
            Divides the logits.
        top_p (`float`, *optional*, defaults to `0.95`):
            Mass of the nucleus, in (0, 1].
        max_completion_length (`int`, *optional*, defaults to `256`):
            Most tokens a completion may have.
        per_device_eval_batch_size (`int`, *optional*, defaults to `64`):
            Completions decoded at a time; as many tasks as fill it are sampled, graded and saved together.
        length_penalty (`float`, *optional*, defaults to `0.01`):
            Price of 100 generated tokens in the reward, at least 0.
        sandbox_timeout (`float`, *optional*, defaults to `5.0`):
            Seconds a program may take.
        pair_rule (`str`, *optional*, defaults to `"shortest_pass_longest_fail"`):
            `"shortest_pass_longest_fail"` forms one pair a task, `"all_pairs"` pairs every passing completion with
            every failing one, `"reward_margin"` any two whose rewards differ enough, so that of two passing
            completions the shorter one is preferred.
        max_pairs_per_task (`int`, *optional*, defaults to `8`):
            Cap of the latter two rules; the pairs that differ most are kept.
        min_reward_margin (`float`, *optional*, defaults to `0.05`):
            What `"reward_margin"` calls enough.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the samples.
    """

    adapter_name_or_path: str | None = field(default=None, metadata={"help": "Directory of the policy's adapter."})
    output_dir: str = field(default="runs/preferences", metadata={"help": "Where samples and pairs go."})
    num_generations: int = field(default=8, metadata={"help": "Completions a task."})
    temperature: float = field(default=0.8, metadata={"help": "Divides the logits."})
    top_p: float = field(default=0.95, metadata={"help": "Mass of the nucleus, in (0, 1]."})
    max_completion_length: int = field(default=256, metadata={"help": "Most tokens a completion may have."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Completions decoded at a time."})
    length_penalty: float = field(default=0.01, metadata={"help": "Price of 100 generated tokens, at least 0."})
    sandbox_timeout: float = field(default=5.0, metadata={"help": "Seconds a program may take."})
    pair_rule: str = field(default=PAIR_RULES[0], metadata={"help": f"How pairs are formed: {', '.join(PAIR_RULES)}."})
    max_pairs_per_task: int = field(default=8, metadata={"help": "Cap of all_pairs and reward_margin."})
    min_reward_margin: float = field(default=0.05, metadata={"help": "Least difference of rewards in reward_margin."})
    seed: int = field(default=42, metadata={"help": "Seed of the samples."})

    def __post_init__(self):
        if self.pair_rule not in PAIR_RULES:
            raise ValueError(f"pair_rule is {self.pair_rule!r}: write one of {', '.join(map(repr, PAIR_RULES))}")
        if self.num_generations < 2:
            raise ValueError(f"num_generations is {self.num_generations}: a pair needs 2 or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: write a number above 0 and at most 1")
        if self.length_penalty < 0:
            raise ValueError(f"length_penalty is {self.length_penalty}: write 0 or more, it is subtracted")
        check_timeout(self.sandbox_timeout)
        for name in ("temperature", "min_reward_margin"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: write a number above 0")
        for name in ("max_completion_length", "per_device_eval_batch_size", "max_pairs_per_task"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: write 1 or more")

    @property
    def tasks_per_chunk(self) -> int:
        """Tasks that are sampled together."""
        return max(1, self.per_device_eval_batch_size // self.num_generations)


def main():
    args, model_args, settings = parse_settings(PreferencesArguments, ModelConfig)
    refuse_several_processes("preferences")
    tasks = load_stage_tasks(args.dataset_name, args.dataset_train_split)
    check_policy(model_args, args.adapter_name_or_path)
    if args.adapter_name_or_path:
        settings["adapter_sha256"] = adapter_sha256(args.adapter_name_or_path)
    run = RunDirectory(args.output_dir, "preferences", settings, result="pairs.jsonl")
    if run.finished:
        return print(f"{args.output_dir}: this run has finished")

    run.start()
    samples = sample_policy(run.path / "samples.jsonl", tasks, args, model_args)
    pairs, summary = form_pairs(samples, tasks, args)
    write_whole(run.path / "summary.json", json.dumps(summary, indent=2) + "\n")
    if not pairs:
        raise SystemExit(
            f"no pair could be formed: of {len(tasks)} tasks the policy always passes {summary['always_pass']} and "
            f"always fails {summary['always_fail']}. Sample more (num_generations), hotter (temperature), or with the "
            "pair_rule 'reward_margin', which also pairs two that pass"
        )
    write_whole(run.path / "pairs.jsonl", "".join(json.dumps(pair) + "\n" for pair in pairs))
    draft = run.path / "dataset.draft"
    Dataset.from_list(pairs).save_to_disk(draft)
    shutil.rmtree(run.path / "dataset", ignore_errors=True)
    os.replace(draft, run.path / "dataset")
    run.finish()
    print(json.dumps(summary, indent=2))


def sample_policy(path: Path, tasks, args: PreferencesArguments, model_args: ModelConfig) -> list[dict]:
    """
    Complete and grade every task, chunk by chunk, each chunk from a seed of its own.

    Args:
        path (`Path`):
            Where the samples are kept; those of the chunks that it holds already are not sampled again.
        tasks ([`~datasets.Dataset`]):
            The tasks.
        args ([`PreferencesArguments`]):
            How to sample.
        model_args ([`~trl.ModelConfig`]):
            A base that went through [`check_policy`](common.py); loaded only if something is left to sample.

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
    model, tokenizer = load_policy(model_args, args.adapter_name_or_path), load_tokenizer(model_args)
    with (
        Sandbox(timeout=args.sandbox_timeout) as sandbox,
        tqdm(total=len(tasks) * args.num_generations, initial=len(samples), unit="completion") as bar,
    ):
        reward = UnitTestReward(args.length_penalty, sandbox)
        for number in range(num_chunks, len(chunks)):
            set_seed(random.Random(f"{args.seed} {number}").getrandbits(32))
            batch = tasks.select(chunks[number])
            new = complete(model, tokenizer, batch, args, bar)
            _grade(new, batch, reward)
            with path.open("a") as file:
                file.write("".join(json.dumps(sample) + "\n" for sample in new))
                file.flush()
                os.fsync(file.fileno())
            samples += new
            bar.set_postfix(
                tasks=f"{chunks[number].stop}/{len(tasks)}",
                pass_rate=f"{sum(sample['passed'] for sample in samples) / len(samples):.2f}",
                pairs=len(form_pairs(samples, tasks.select(range(chunks[number].stop)), args)[0]),
            )
    return samples


def _read_chunks(path: Path, sizes: list[int]) -> tuple[list[dict], int]:
    """The samples of the chunks that the file holds whole, and their number; what follows them is cut off."""
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


def _grade(samples: list[dict], tasks, reward: UnitTestReward) -> None:
    """Add `completion_tokens`, `verdict`, `passed` and `reward` to every sample."""
    by_id = {task["task_id"]: task for task in tasks}
    columns = {name: [by_id[sample["task_id"]][name] for sample in samples] for name in ("test", "entry_point")}
    extra = {}
    rewards = reward(
        prompts=[by_id[sample["task_id"]]["prompt"] for sample in samples],
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


def form_pairs(samples: list[dict], tasks, args: PreferencesArguments) -> tuple[list[dict], dict]:
    """
    The preference pairs of all tasks.

    Args:
        samples (`list[dict]`):
            Graded samples, those of a task side by side.
        tasks ([`~datasets.Dataset`]):
            Their tasks, in order.
        args ([`PreferencesArguments`]):
            `num_generations` and how to pair.

    Returns:
        `list[dict]`: The pairs: `task_id`, `prompt`, and of the chosen and the rejected completion its text
        (`chosen`), token ids (`chosen_ids`), their number (`chosen_tokens`) and its reward (`chosen_reward`).
        `dict`: The numbers of `tasks`, `samples`, `duplicates` (completions that were merged into the first of their
        text), tasks by outcome, `pairs`, tasks `dropped` by reason, and mean tokens of both sides.
    """
    pairs, dropped, count = [], Counter(), Counter()
    for i, task in enumerate(tasks):
        group = samples[i * args.num_generations : (i + 1) * args.num_generations]
        distinct = {}
        for sample in group:
            distinct.setdefault(sample["completion"], sample)
        count["duplicates"] += len(group) - len(distinct)
        passes = [sample["passed"] for sample in distinct.values()]
        always = "always_pass" if all(passes) else "always_fail" if not any(passes) else "mixed"
        count[always] += 1
        task_pairs = _pair(list(distinct.values()), args)
        count["tasks_with_pairs"] += bool(task_pairs)
        if not task_pairs:
            dropped["no_margin" if args.pair_rule == "reward_margin" else always] += 1
        for chosen, rejected in task_pairs:
            pair = {"task_id": task["task_id"], "prompt": task["prompt"]}
            for side, sample in (("chosen", chosen), ("rejected", rejected)):
                pair |= {
                    side: sample["completion"],
                    f"{side}_ids": sample["completion_ids"],
                    f"{side}_tokens": sample["completion_tokens"],
                    f"{side}_reward": sample["reward"],
                }
            pairs.append(pair)
    return pairs, {
        "pair_rule": args.pair_rule,
        "tasks": len(tasks),
        "samples": len(samples),
        "duplicates": count["duplicates"],
        "pass_rate": mean(sample["passed"] for sample in samples),
        "always_pass": count["always_pass"],
        "always_fail": count["always_fail"],
        "pairs": len(pairs),
        "tasks_with_pairs": count["tasks_with_pairs"],
        "dropped": dict(dropped),
        "mean_chosen_tokens": mean(pair["chosen_tokens"] for pair in pairs) if pairs else None,
        "mean_rejected_tokens": mean(pair["rejected_tokens"] for pair in pairs) if pairs else None,
    }


def _pair(samples: list[dict], args: PreferencesArguments) -> list[tuple[dict, dict]]:
    """The pairs (chosen, rejected) of one task, those that differ most first."""
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
