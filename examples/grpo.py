"""
The reward in TRL's GRPOTrainer.

    python examples/grpo.py --model_name_or_path Qwen/Qwen2.5-Coder-0.5B-Instruct --output_dir runs/grpo --max_steps 20

On a machine without a GPU add `--use_cpu`; without the Hub, give the directory that `python recipes/default_model.py`
prints. `--use_peft` trains a LoRA adapter.
"""

from trl import GRPOConfig, GRPOTrainer, ModelConfig, TrlParser, get_peft_config

from rewards import UnitTestReward, load_tasks


def main() -> None:
    args, model_args = TrlParser((GRPOConfig, ModelConfig)).parse_args_and_config()
    trainer = GRPOTrainer(
        model=model_args.model_name_or_path,
        reward_funcs=UnitTestReward(length_penalty=0.01),
        args=args,
        train_dataset=load_tasks("humaneval", "train"),
        peft_config=get_peft_config(model_args),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
