"""Two processes under `accelerate launch` against one with the doubled batch."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from two_processes import train

ROOT = Path(__file__).parent.parent


def test_two_processes_make_the_step_of_one_with_the_doubled_batch(tmp_path, tiny_folder):
    launched = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch"),
            *("--config_file", ROOT / "accelerate_configs" / "cpu_2proc.yaml", "--main_process_port", "0"),
            *(ROOT / "tests" / "two_processes.py", tiny_folder, tmp_path / "two"),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert launched.returncode == 0, launched.stderr
    for stage in ("reinforce", "ppo_clip"):
        log = train(stage, tiny_folder, tmp_path / "one" / stage, per_device_train_batch_size=4)
        assert log[0]["grad_norm"] > 0
        one, two = (load_file(tmp_path / run / stage / "adapter_model.safetensors") for run in ("one", "two"))
        # B starts at zero, so it is the change; Adam's first steps make rounding visible where a gradient is near zero
        change = torch.cat([one[name].flatten() for name in one if "lora_B" in name])
        difference = torch.cat([(one[name] - two[name]).flatten() for name in one if "lora_B" in name])
        assert change.norm() > 0.1
        assert difference.norm() < 1e-3 * change.norm(), stage
