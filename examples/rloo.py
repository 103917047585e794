"""
Several rewards in TRL's RLOOTrainer: passing all tests, the share of tests that pass, and a per-token penalty.

    python examples/rloo.py --model_name_or_path Qwen/Qwen2.5-Coder-0.5B-Instruct --output_dir runs/rloo --max_steps 20

On a machine without a GPU add `--use_cpu`; without the Hub, give the directory that `python recipes/default_model.py`
prints. `--use_peft` trains a LoRA adapter.
"""

from trl import ModelConfig, RLOOConfig, RLOOTrainer, TrlParser, get_peft_config

from rewards import PartialReward, UnitTestReward, length_reward, load_tasks


def main() -> None:
    args, model_args = TrlParser((RLOOConfig, ModelConfig)).parse_args_and_config()
    args.reward_weights = [1.0, 0.2, 0.01]
    trainer = RLOOTrainer(
        model=model_args.model_name_or_path,
        reward_funcs=[UnitTestReward(length_penalty=0), PartialReward(), length_reward],
        args=args,
        train_dataset=load_tasks("humaneval", "train"),
        peft_config=get_peft_config(model_args),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
