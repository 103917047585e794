"""Trains both stages on fixed completions; launched by test_two_processes.py, alone and as two processes."""

import os
import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig

from trainers import PPOClipConfig, PPOClipTrainer, ReinforceConfig, ReinforceTrainer

PROMPTS = ["def f(x):\n", "a = 1\n", "import re\n", "b", "c = ", "def g():\n", "x", "y = [1, 2]\n"]


def rewards(completion_ids, **kwargs):
    assert len(completion_ids) == 8 // int(os.environ.get("WORLD_SIZE", 1)), "each process grades its own completions"
    return [0.5 - (sum(ids) % 7) / 3 for ids in completion_ids]


def train(stage, folder, output_dir, per_device_train_batch_size):
    default_class, config_class, settings = {
        "reinforce": (ReinforceTrainer, ReinforceConfig, {"max_steps": 2, "baseline": "batch"}),
        "ppo_clip": (PPOClipTrainer, PPOClipConfig, {"max_steps": 4, "num_iterations": 2}),
    }[stage]

    class Trainer(default_class):
        def _generate_single_turn(self, prompt_ids, images, multimodal_fields):
            # Completions that depend on the prompt alone, not on the process that completes it
            return [
                [2 + (token * 37 + i) % 200 for i, token in enumerate(ids * 2)][: 3 + ids[0] % 4] for ids in prompt_ids
            ]

    torch.manual_seed(0)
    trainer = Trainer(
        str(folder),
        rewards,
        config_class(
            str(output_dir),
            per_device_train_batch_size=per_device_train_batch_size,
            gradient_accumulation_steps=2,
            normalize_advantages=True,
            learning_rate=1e-2,
            save_strategy="no",
            max_completion_length=8,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            report_to="none",
            disable_tqdm=True,
            logging_steps=1,
            lr_scheduler_type="constant",
            **settings,
        ),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    trainer.train()
    trainer.save_model()
    return trainer.state.log_history


if __name__ == "__main__":
    folder, output_dir = sys.argv[1:]
    for stage in ("reinforce", "ppo_clip"):
        train(stage, folder, Path(output_dir) / stage, per_device_train_batch_size=2)
