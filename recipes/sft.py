"""
Stage 1, supervised fine-tuning: teach the base to write the reference solution and to stop after it.

TRL's `SFTTrainer` on prompt and canonical solution, the loss on the solution only, a LoRA adapter on a frozen base
(QLoRA where the recipe sets `load_in_4bit`). Writes an adapter that the RL stages continue from.

With `samples`, the solutions are the policy's own: of each task the shortest completion that passes, as
`preferences.py` sampled them. This is rejection-sampling fine-tuning (Yuan et al. 2023,
https://huggingface.co/papers/2308.01825), the baseline that RL has to beat.

    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/sft.py \
        --config recipes/qwen2.5-coder-0.5b/sft.yaml
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from recipes.common.arguments import TaskArguments, load_stage_tasks, parse_settings
from recipes.common.policy import check_policy, load_policy, load_tokenizer
from recipes.common.prompts import format_tasks, prompt_token_ids, reference_token_ids
from recipes.common.run_directory import RunDirectory, file_sha256

# isort: split
from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config

from trainers import CompleteCheckpoints, decode_completions, keep_adapter_in_fp32, use_fast_log_probs
from trainers.progress import print_progress_lines


@dataclass
class SFTArguments(TaskArguments):
    """What is taught."""

    samples: str | None = field(
        default=None,
        metadata={
            "help": "Output directory of the stage `preferences`. Its shortest passing completion of each task is "
            "taught; tasks without one are left out. If not set, the tasks' references are taught."
        },
    )


class _SFTTrainer(CompleteCheckpoints, SFTTrainer):
    pass


def reference_dataset(tasks: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> Dataset:
    """
    Tokenize tasks and their references.

    Args:
        tasks ([`~datasets.Dataset`]):
            The tasks.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The policy's tokenizer.
        max_length (`int`, *optional*):
            Largest number of tokens of prompt and completion together.

    Returns:
        [`~datasets.Dataset`] with the columns `input_ids` and `completion_mask`, as [`~trl.SFTTrainer`] takes them.

    Raises:
        SystemExit: A task has no reference, or is too long.
    """
    rows = []
    for task in tasks.to_list():
        try:
            row = reference_token_ids(tokenizer, task)
        except ValueError as error:
            raise SystemExit(f"dataset_name: {error}") from error
        rows.append((task["task_id"], *row))
    return _dataset(rows, max_length)


def sampled_dataset(
    tasks: Dataset, samples: list[dict], tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> Dataset:
    """
    Pair tasks with the token ids of their shortest passing completions.

    Args:
        tasks ([`~datasets.Dataset`]):
            The tasks.
        samples (`list[dict]`):
            Graded completions with `task_id`, `passed`, `completion` and `completion_ids`, as the stage `preferences`
            writes them.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The policy's tokenizer.
        max_length (`int`, *optional*):
            Largest number of tokens of prompt and completion together.

    Returns:
        [`~datasets.Dataset`] with the columns of [`reference_dataset`], one row a task with a passing completion.

    Raises:
        SystemExit: No completion of these tasks passes, one is too long, or one is of another tokenizer.
    """
    shortest = {}
    for sample in sorted((one for one in samples if one["passed"]), key=lambda one: len(one["completion_ids"])):
        shortest.setdefault(sample["task_id"], sample)
    rows = []
    for task in tasks.to_list():
        if sample := shortest.get(task["task_id"]):
            prompt_ids, ids = prompt_token_ids(tokenizer, [task["prompt"]]), sample["completion_ids"]
            if decode_completions(tokenizer, prompt_ids, [ids]) != [sample["completion"]]:
                raise SystemExit(
                    f"samples: of {task['task_id']}, completion_ids are not the tokens of the completion for this "
                    "model's tokenizer: sample a policy on the same base, with the same chat_template_kwargs"
                )
            rows.append((task["task_id"], *prompt_ids, ids))
    if not rows:
        raise SystemExit("samples: none of their completions of these tasks passes")
    print(f"{len(rows)} of {len(tasks)} tasks have a completion that passes")
    return _dataset(rows, max_length)


def _dataset(rows: list[tuple[str, list[int], list[int]]], max_length: int | None) -> Dataset:
    """Return the columns that `SFTTrainer` takes, from task ids and the token ids of prompts and completions."""
    for task_id, prompt_ids, completion_ids in rows:
        num_tokens = len(prompt_ids) + len(completion_ids)
        if max_length is not None and num_tokens > max_length:
            raise SystemExit(
                f"max_length is {max_length}, and {task_id} has {num_tokens} tokens with its completion: raise "
                "max_length or leave the task out, or the completion's end would not be taught"
            )
    return Dataset.from_list(
        [
            {
                "input_ids": prompt_ids + completion_ids,
                "completion_mask": [0] * len(prompt_ids) + [1] * len(completion_ids),
            }
            for _, prompt_ids, completion_ids in rows
        ]
    )


def main() -> None:
    stage, args, model_args, settings = parse_settings(SFTArguments, SFTConfig, ModelConfig)
    samples = Path(stage.samples, "samples.jsonl") if stage.samples else None
    if samples and not (samples.is_file() and samples.with_name("summary.json").is_file()):
        raise SystemExit(f"samples: {stage.samples} holds no samples of a finished run of the stage 'preferences'")
    if samples:
        settings["samples_sha256"] = file_sha256(samples)
    run = RunDirectory(args.output_dir, "sft", settings)
    if run.finished:
        return print(f"{args.output_dir}: this run has finished")
    check_policy(model_args)
    tokenizer = load_tokenizer(model_args)
    tasks = load_stage_tasks(stage.dataset_name, stage.dataset_train_split)
    tasks = format_tasks(tasks, stage, tokenizer, model_args)
    if samples:
        lines = [json.loads(line) for line in samples.read_text().splitlines()]
        train_dataset = sampled_dataset(tasks, lines, tokenizer, args.max_length)
    else:
        train_dataset = reference_dataset(tasks, tokenizer, args.max_length)
    if args.completion_only_loss is None:
        args.completion_only_loss = True

    checkpoint = run.start()
    trainer = _SFTTrainer(
        model=load_policy(model_args, args.device),
        args=args,
        train_dataset=train_dataset,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
    )
    model = trainer.accelerator.unwrap_model(trainer.model)  # with its adapter
    if model_args.use_peft:
        keep_adapter_in_fp32(model)
    use_fast_log_probs(model, args.device)
    print_progress_lines(trainer)
    trainer.train(resume_from_checkpoint=checkpoint)
    run.save(trainer)


if __name__ == "__main__":
    main()
