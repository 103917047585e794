"""
Run REINFORCE or PPO-Clip, from the fields to the saved adapter.

The policy is the base with the SFT stage's adapter, which is trained while the base stays frozen. Without an adapter, a
new one is put on the base. The reward runs every completion against its task's tests in the sandbox.
"""

from dataclasses import dataclass, field

from datasets import Dataset, concatenate_datasets
from trl import ModelConfig, get_peft_config

from recipes.common.arguments import (
    TaskArguments,
    check_length_penalty,
    check_pass_rates,
    check_timeout,
    load_stage_tasks,
    parse_settings,
)
from recipes.common.policy import adapter_sha256, check_memory, check_policy, load_policy, load_tokenizer
from recipes.common.prompts import format_tasks
from recipes.common.run_directory import RunDirectory
from rewards import UnitTestReward
from sandbox import Sandbox
from trainers import PPOClipConfig, PPOClipTrainer, ReinforceConfig, ReinforceTrainer
from trainers.progress import print_progress_lines
from trainers.vllm import FOUR_BIT


@dataclass
class RLArguments(TaskArguments):
    """What an RL stage adds: the adapter it starts from, its reward, and its evaluation during training."""

    chat_template_kwargs: dict | None = field(init=False, default=None)  # `RLOOConfig` has the field
    adapter_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Directory of the adapter to continue from, usually the SFT stage's. If not set, a new adapter is "
            "trained."
        },
    )
    min_pass_rate: float = field(
        default=0.0,
        metadata={
            "help": "Train on tasks with at least this `pass_rate`, a column of the tasks "
            "that check_tasks.py and preferences.py write."
        },
    )
    max_pass_rate: float = field(default=1.0, metadata={"help": "Train on tasks with at most this `pass_rate`."})
    length_penalty: float = field(default=0.01, metadata={"help": "Penalty per 100 generated tokens, at least 0."})
    penalize_failures: bool = field(
        default=True,
        metadata={"help": "Whether completions that fail pay the length penalty too. If not, every failure gets 0."},
    )
    sandbox_timeout: float = field(default=5.0, metadata={"help": "Seconds that a program may take."})
    eval_dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Tasks completed greedily during training if eval_strategy is set. Defaults to dataset_name."
        },
    )
    dataset_test_split: str = field(
        default="validation",
        metadata={
            "help": "Their split. HumanEval's 'validation' is a part of its 'train': train on 'fit' to keep them apart."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        check_length_penalty(self.length_penalty)
        check_pass_rates(self.min_pass_rate, self.max_pass_rate)
        check_timeout(self.sandbox_timeout)


def in_pass_rate(tasks: Dataset, minimum: float, maximum: float) -> Dataset:
    """
    Leave out tasks that a policy passes too seldom or too often to learn from.

    Args:
        tasks ([`~datasets.Dataset`]):
            Tasks, with the column `pass_rate` if there is a limit.
        minimum (`float`):
            Lowest pass rate.
        maximum (`float`):
            Highest pass rate.

    Returns:
        [`~datasets.Dataset`]: The tasks within the limits.

    Raises:
        SystemExit: The tasks have no pass rates, or none is within the limits.
    """
    if (minimum, maximum) == (0.0, 1.0):
        return tasks
    if "pass_rate" not in tasks.column_names:
        raise SystemExit(
            "min_pass_rate and max_pass_rate: the tasks have no column 'pass_rate': run recipes/check_tasks.py with "
            "a policy, or use the tasks.jsonl of recipes/preferences.py"
        )
    within = tasks.filter(lambda task: task["pass_rate"] is not None and minimum <= task["pass_rate"] <= maximum)
    if not len(within):
        raise SystemExit(f"min_pass_rate and max_pass_rate: no task has a pass rate from {minimum} to {maximum}")
    print(f"{len(within)} of {len(tasks)} tasks have a pass rate from {minimum} to {maximum}")
    return within


def fill_rollout(tasks: Dataset, num_tasks: int) -> Dataset:
    """
    Repeat tasks that are too few for a rollout, which TRL's sampler fills with different rows.

    Args:
        tasks ([`~datasets.Dataset`]):
            The training tasks.
        num_tasks (`int`):
            Tasks that a rollout takes.

    Returns:
        [`~datasets.Dataset`]: The tasks, as often as it takes.
    """
    repeats = -(-num_tasks // len(tasks))
    if repeats == 1:
        return tasks
    print(f"A rollout takes {num_tasks} tasks and there are {len(tasks)}: each is repeated {repeats} times")
    return concatenate_datasets([tasks] * repeats)


def train_policy_gradient(
    stage: str,
    trainer_class: type[ReinforceTrainer] | type[PPOClipTrainer],
    config_class: type[ReinforceConfig] | type[PPOClipConfig],
) -> None:
    """
    Run an RL stage.

    Args:
        stage (`str`):
            The stage's name.
        trainer_class (`type`):
            [`~trainers.ReinforceTrainer`] or [`~trainers.PPOClipTrainer`].
        config_class (`type`):
            The configuration that it takes.
    """
    rl, args, model_args, settings = parse_settings(RLArguments, config_class, ModelConfig)
    if model_args.load_in_4bit and args.use_vllm:
        raise SystemExit(f"use_vllm: {FOUR_BIT}")
    check_policy(model_args, rl.adapter_name_or_path, generates_on=args.device)
    if rl.adapter_name_or_path:
        settings["adapter_sha256"] = adapter_sha256(rl.adapter_name_or_path)
    else:
        model_args.use_peft = True  # whatever the recipe says: the base stays frozen
    run = RunDirectory(args.output_dir, stage, settings)
    if run.finished:
        return print(f"{args.output_dir}: this run has finished")
    tokenizer = load_tokenizer(model_args, padding_side="left")

    rl.chat_template_kwargs = args.chat_template_kwargs

    def load(field_name: str, split: str) -> Dataset:
        return format_tasks(load_stage_tasks(getattr(rl, field_name), split, field_name), rl, tokenizer, model_args)

    train_dataset = in_pass_rate(load("dataset_name", rl.dataset_train_split), rl.min_pass_rate, rl.max_pass_rate)
    train_dataset = fill_rollout(train_dataset, args.generation_batch_size // args.num_generations)
    eval_source = "eval_dataset_name" if rl.eval_dataset_name else "dataset_name"
    eval_dataset = load(eval_source, rl.dataset_test_split) if args.eval_strategy != "no" else None
    check_memory(model_args, args, train_dataset, tokenizer)

    checkpoint = run.start()
    with Sandbox(timeout=rl.sandbox_timeout) as sandbox:
        trainer = trainer_class(
            model=load_policy(model_args, args.device, rl.adapter_name_or_path),
            reward_funcs=UnitTestReward(rl.length_penalty, sandbox, penalize_failures=rl.penalize_failures),
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            peft_config=None if rl.adapter_name_or_path else get_peft_config(model_args),
        )
        print_progress_lines(trainer)
        trainer.train(resume_from_checkpoint=checkpoint)
    run.save(trainer)
