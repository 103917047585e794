"""
Stage 1, supervised fine-tuning: teach the base to write the reference solution and to stop after it.

TRL's `SFTTrainer` on prompt and canonical solution, the loss on the solution only, a LoRA adapter on a frozen base
(QLoRA where the recipe sets `load_in_4bit`). Writes an adapter that the RL stages continue from.

    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/sft.py \
        --config recipes/qwen2.5-coder-0.5b/sft.yaml
"""

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from recipes.common.arguments import TaskArguments, load_stage_tasks, parse_settings
from recipes.common.policy import check_policy, load_policy, load_tokenizer
from recipes.common.prompts import format_tasks, reference_token_ids
from recipes.common.run_directory import RunDirectory

# isort: split
from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config

from trainers import CompleteCheckpoints, keep_adapter_in_fp32, use_fast_log_probs
from trainers.progress import print_progress_lines


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
            prompt_ids, completion_ids = reference_token_ids(tokenizer, task)
        except ValueError as error:
            raise SystemExit(f"dataset_name: {error}") from error
        if max_length is not None and len(prompt_ids) + len(completion_ids) > max_length:
            raise SystemExit(
                f"max_length is {max_length}, and {task['task_id']} has {len(prompt_ids) + len(completion_ids)} tokens "
                "with its reference: raise max_length or leave the task out, or the reference's end would not be taught"
            )
        mask = [0] * len(prompt_ids) + [1] * len(completion_ids)
        rows.append({"input_ids": prompt_ids + completion_ids, "completion_mask": mask})
    return Dataset.from_list(rows)


def main() -> None:
    tasks, args, model_args, settings = parse_settings(TaskArguments, SFTConfig, ModelConfig)
    run = RunDirectory(args.output_dir, "sft", settings)
    if run.finished:
        return print(f"{args.output_dir}: this run has finished")
    check_policy(model_args)
    tokenizer = load_tokenizer(model_args)
    train_tasks = load_stage_tasks(tasks.dataset_name, tasks.dataset_train_split)
    train_dataset = reference_dataset(
        format_tasks(train_tasks, tasks, tokenizer, model_args), tokenizer, args.max_length
    )
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
    trainer.save_state()  # before the adapter: where there is an adapter there is its log
    trainer.save_model()
    run.finish()


if __name__ == "__main__":
    main()
