"""The README's example of the reward in another trainer does what it says."""

import re
from pathlib import Path

import trl
from trl import GRPOConfig, GRPOTrainer


def test_grpo_example_runs(tmp_path, tiny_folder, monkeypatch):
    """As it stands, on the tiny model and for one step: only the model's name and the defaults of the config differ."""
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    (example,) = [block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "GRPOTrainer" in block]
    assert len(example.strip().split("\n")) <= 6

    class ShortGRPOTrainer(GRPOTrainer):
        def __init__(self, *args, **kwargs):
            config = GRPOConfig(
                str(tmp_path),
                max_steps=1,
                per_device_train_batch_size=2,
                num_generations=2,
                max_completion_length=8,
                bf16=False,
                use_cpu=True,
                report_to="none",
                save_strategy="no",
                logging_steps=1,
            )
            super().__init__(*args, args=config, **kwargs)

    monkeypatch.setattr(trl, "GRPOTrainer", ShortGRPOTrainer)
    namespace = {}
    exec(example.replace("Qwen/Qwen2.5-Coder-0.5B-Instruct", str(tiny_folder)), namespace)
    assert "pass_rate" in namespace["trainer"].state.log_history[0]
