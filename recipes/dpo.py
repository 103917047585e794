"""
Stage 3b, DPO: prefer the short program that passes to the long one that fails, both from the policy's own samples.

TRL's `DPOTrainer` on the pairs of `preferences.py`, from the adapter that they were sampled from, or with a new adapter
on the base. The reference is the policy that training starts from: TRL keeps a frozen copy of its adapter under the
name "ref", or switches the new one off.

    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/dpo.py \
        --config recipes/qwen2.5-coder-0.5b/dpo.yaml

TRL would tokenize prompt and completion as one text, where tokens can merge, and would append EOS to every completion,
even to one that was cut off. Here the token ids that the policy emitted are trained on as they are. Not covered:
training without an adapter, and pairs without token ids (use `trl dpo`).
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset

from recipes.common.arguments import TaskArguments, load_stage_tasks, parse_settings
from recipes.common.policy import adapter_sha256, check_policy, load_policy, load_tokenizer
from recipes.common.prompts import format_tasks, prompt_token_ids
from recipes.common.run_directory import RunDirectory

# isort: split
from transformers import PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer, ModelConfig, get_peft_config

from trainers import (
    CompleteCheckpoints,
    adapter_values,
    decode_completions,
    keep_adapter_in_fp32,
    use_fast_log_probs,
)
from trainers.device import avoid_cudnn_attention
from trainers.progress import print_progress_lines

COLUMNS = {"task_id": (str,), "chosen_ids": (list,), "rejected_ids": (list,)}
COLUMNS |= dict.fromkeys(("prompt", "chosen", "rejected"), (str, list))  # text or chat messages


@dataclass
class PairArguments(TaskArguments):
    """What DPO adds: the adapter it starts from, and the pairs it trains on."""

    adapter_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Directory of the adapter to continue from, usually the SFT stage's. It is the reference too. If "
            "not set, a new adapter is trained and the base is the reference."
        },
    )
    preferences: str = field(
        default="runs/preferences",
        metadata={
            "help": "Output directory of the stage `preferences`, or a JSONL file with the columns of its "
            "`pairs.jsonl`."
        },
    )


class PairTrainer(CompleteCheckpoints, DPOTrainer):
    """[`~trl.DPOTrainer`] on token ids as they are: `prompt_ids`, `chosen_ids` and `rejected_ids`."""

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        return dataset


def load_pairs(preferences: str, tasks: Dataset) -> list[dict]:
    """
    Read preference pairs, and check each against its task.

    Args:
        preferences (`str`):
            The output directory of the stage `preferences`, or a JSONL file.
        tasks ([`~datasets.Dataset`]):
            The tasks that the pairs may be of.

    Returns:
        `list[dict]`: The pairs, with the columns `task_id`, `prompt`, `chosen`, `rejected`, `chosen_ids` and
        `rejected_ids`.

    Raises:
        SystemExit: There is no such file, it holds no pairs, a column is missing, or a prompt is not its task's.
    """
    path = Path(preferences)
    if path.is_dir():
        path /= "pairs.jsonl"
    if not path.is_file():
        raise SystemExit(f"preferences: there is no file {path}: has the stage 'preferences' finished?")
    prompts = dict(zip(tasks["task_id"], tasks["prompt"], strict=True))
    pairs = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        where = f"preferences: {path}:{number}"
        try:
            pair = json.loads(line)
        except json.JSONDecodeError as error:
            raise SystemExit(f"{where}: not a line of JSON: {error}") from None
        for column, kinds in COLUMNS.items():
            if not isinstance(pair, dict) or not isinstance(pair.get(column), kinds):
                raise SystemExit(
                    f"{where}: column {column!r} is missing or no {' or '.join(kind.__name__ for kind in kinds)}: "
                    f"write the file with recipes/preferences.py"
                )
        if pair["task_id"] not in prompts:
            raise SystemExit(f"{where}: {pair['task_id']!r} is none of the tasks of dataset_name and its train split")
        if pair["prompt"] != prompts[pair["task_id"]]:
            raise SystemExit(
                f"{where}: the prompt is not that of the task {pair['task_id']!r}, byte for byte: use the "
                "prompt_format that the pairs were sampled in"
            )
        pairs.append({column: pair[column] for column in COLUMNS})
    if not pairs:
        raise SystemExit(f"preferences: {path} holds no pairs")
    return pairs


def pair_dataset(pairs: list[dict], tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> Dataset:
    """
    Tokenize the pairs' prompts, and check the token ids of their completions.

    Args:
        pairs (`list[dict]`):
            As [`load_pairs`] returns them.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The policy's tokenizer.
        max_length (`int`, *optional*):
            Largest number of tokens of prompt and completion together.

    Returns:
        [`~datasets.Dataset`] with the columns `prompt_ids`, `chosen_ids` and `rejected_ids`.

    Raises:
        SystemExit: The ids are not this tokenizer's, or a pair is too long.
    """
    rows = []
    for number, pair in enumerate(pairs, start=1):
        (prompt_ids,) = prompt_token_ids(tokenizer, [pair["prompt"]])
        for side in ("chosen", "rejected"):
            ids = pair[f"{side}_ids"]
            text = pair[side] if isinstance(pair[side], str) else pair[side][-1]["content"]
            if decode_completions(tokenizer, [prompt_ids], [ids]) != [text]:
                raise SystemExit(
                    f"preferences: pair {number}: {side}_ids are not the tokens of {side!r} for this model's "
                    "tokenizer: sample the pairs from a policy on the same base, with the same chat_template_kwargs"
                )
            if max_length is not None and len(prompt_ids) + len(ids) > max_length:
                raise SystemExit(
                    f"preferences: pair {number} has {len(prompt_ids) + len(ids)} tokens and max_length is "
                    f"{max_length}: raise max_length, or the completion's end would not be trained on"
                )
        rows.append({"prompt_ids": prompt_ids} | {name: pair[name] for name in ("chosen_ids", "rejected_ids")})
    return Dataset.from_list(rows)


def main() -> None:
    stage, args, model_args, settings = parse_settings(PairArguments, DPOConfig, ModelConfig)
    check_policy(model_args, stage.adapter_name_or_path)
    tokenizer = load_tokenizer(model_args)
    tasks = load_stage_tasks(stage.dataset_name, stage.dataset_train_split)
    pairs = load_pairs(stage.preferences, format_tasks(tasks, stage, tokenizer, model_args))
    if stage.adapter_name_or_path:
        settings["adapter_sha256"] = adapter_sha256(stage.adapter_name_or_path)
    else:
        model_args.use_peft = True  # whatever the recipe says: the base stays frozen
    settings["pairs_sha256"] = hashlib.sha256(json.dumps(pairs).encode()).hexdigest()
    run = RunDirectory(args.output_dir, "dpo", settings)
    if run.finished:
        return print(f"{args.output_dir}: this run has finished")
    train_dataset = pair_dataset(pairs, tokenizer, args.max_length)

    checkpoint = run.start()
    model = load_policy(model_args, args.device, stage.adapter_name_or_path)
    adapter = adapter_values(model)
    trainer = PairTrainer(
        model,
        args=args,
        train_dataset=train_dataset,
        processing_class=tokenizer,
        peft_config=None if stage.adapter_name_or_path else get_peft_config(model_args),
    )
    keep_adapter_in_fp32(trainer.model, adapter)
    # On two cores a step of two pairs (1,981 tokens) takes 10 s and 5.7 GB with it, 28 s and 9.0 GB without
    if args.use_weighting:  # WPO's weights need more than it returns
        avoid_cudnn_attention()
    else:
        use_fast_log_probs(model, args.device)
    print_progress_lines(trainer)
    trainer.train(resume_from_checkpoint=checkpoint)
    run.save(trainer)


if __name__ == "__main__":
    main()
