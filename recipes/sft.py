"""
Stage 1, supervised fine-tuning: teach the base to write the reference solution and to stop after it.

TRL's `SFTTrainer` on prompt and canonical solution, the loss on the solution only, a LoRA adapter on a frozen base
(QLoRA where the recipe sets `load_in_4bit`). Writes an adapter that the RL stages continue from.

    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/sft.py \
        --config recipes/qwen2.5-coder-0.5b/sft.yaml
"""

from recipes.common.arguments import TaskArguments, load_stage_tasks, parse_settings
from recipes.common.policy import check_policy, load_policy, load_tokenizer
from recipes.common.run_directory import RunDirectory

# isort: split
from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config

from trainers import CompleteCheckpoints, keep_adapter_in_fp32, use_fast_log_probs
from trainers.progress import print_progress_lines


class _SFTTrainer(CompleteCheckpoints, SFTTrainer):
    pass


def main() -> None:
    tasks, args, model_args, settings = parse_settings(TaskArguments, SFTConfig, ModelConfig)
    run = RunDirectory(args.output_dir, "sft", settings)
    if run.finished:
        return print(f"{args.output_dir}: this run has finished")
    train_dataset = load_stage_tasks(tasks.dataset_name, tasks.dataset_train_split).map(
        lambda task: {"completion": task["canonical_solution"].rstrip()}
    )
    check_policy(model_args)

    checkpoint = run.start()
    trainer = _SFTTrainer(
        model=load_policy(model_args, args.device),
        args=args,
        train_dataset=train_dataset.select_columns(["prompt", "completion"]),
        processing_class=load_tokenizer(model_args),
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
