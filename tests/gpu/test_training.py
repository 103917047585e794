"""Training on a GPU: an update against the formula on a CPU, the precisions, and the stages as a user launches them."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from reference_update import COMMON, RecordingReward, dataset, policy, reference_update, reinforce_loss, train_with_sgd
from safetensors.torch import load_file

from trainers import PPOClipConfig, PPOClipTrainer, ReinforceConfig, ReinforceTrainer, run_device
from trainers.device import free_memory

ROOT = Path(__file__).parent.parent.parent
ON_GPU = {name: value for name, value in COMMON.items() if name not in ("use_cpu", "gradient_checkpointing")}
TASK = {
    "task_id": "add/1",
    "prompt": "def add(x):\n",
    "canonical_solution": "    return x + 1\n",
    "test": "def check(candidate):\n    assert candidate(1) == 2\n",
    "entry_point": "add",
}


def test_a_run_computes_on_the_gpu():
    assert run_device().type == "cuda"
    assert 0 < free_memory(run_device()) <= torch.cuda.mem_get_info()[1]


@pytest.mark.parametrize("checkpointing", [True, False])
def test_an_update_equals_the_formula_on_a_cpu(tmp_path, tiny_model, tiny_tokenizer, checkpointing):
    model = policy(tiny_model)
    expected = copy.deepcopy(model)
    config = ReinforceConfig(
        str(tmp_path),
        per_device_train_batch_size=4,
        max_steps=1,
        max_grad_norm=0.0,
        learning_rate=0.1,
        **ON_GPU | {"gradient_checkpointing": checkpointing},
    )
    reward, trainer = train_with_sgd(ReinforceTrainer, config, model, learning_rate=0.1)
    assert trainer.accelerator.device.type == "cuda"
    reference_update(expected, tiny_tokenizer, reward.rollouts[0], 0.1, 1, reinforce_loss)
    for (name, ours), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize(
    "trainer_class, config_class", [(ReinforceTrainer, ReinforceConfig), (PPOClipTrainer, PPOClipConfig)]
)
def test_steps_in_16_bits(tmp_path, tiny_model, trainer_class, config_class, precision):
    model = policy(tiny_model.to(torch.float16 if precision == "fp16" else torch.bfloat16))
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    config = config_class(
        str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=4,
        learning_rate=1e-2,
        **ON_GPU | {"bf16": False, precision: True},
    )
    trainer = trainer_class(model, RecordingReward(), config, train_dataset=dataset())
    assert trainer.args.gradient_checkpointing is False, "a tiny model's activations fit"
    trainer.train()
    assert (trainer.accelerator.scaler is not None) == (precision == "fp16")
    after = [p.detach().cpu() for p in trainer.model.parameters() if p.requires_grad]
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in after)
    assert not all(map(torch.equal, before, after))
    seconds = [log["seconds/backward"] for log in trainer.state.log_history if "loss" in log]
    assert len(seconds) == 4 and all(value > 0 for value in seconds)


def test_an_overflow_skips_the_step(tmp_path, tiny_model):
    config = ReinforceConfig(
        str(tmp_path), per_device_train_batch_size=2, max_steps=2, **ON_GPU | {"bf16": False, "fp16": True}
    )
    trainer = ReinforceTrainer(policy(tiny_model.half()), RecordingReward(), config, train_dataset=dataset())
    trainer.accelerator.scaler = torch.amp.GradScaler("cuda", init_scale=2.0**100, backoff_factor=2.0**-92)
    trainer.train()
    assert trainer.state.global_step == 2 and trainer.accelerator.scaler.get_scale() == 2.0**8


@pytest.mark.parametrize("config", ["single_gpu", "cpu"])
def test_stages_as_launched(tmp_path, tiny_folder, config):
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text("".join(json.dumps(TASK | {"task_id": f"add/{n}"}) + "\n" for n in range(3)))
    common = {"model_name_or_path": str(tiny_folder), "dataset_name": str(tasks), "dtype": "bfloat16"}
    train = {"bf16": True, "max_steps": 1, "per_device_train_batch_size": 2, "report_to": "none", "logging_steps": 1}
    lora = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj", "v_proj", "down_proj"]}
    rl = {"adapter_name_or_path": str(tmp_path / "sft"), "max_completion_length": 8}

    def launch(stage, output_dir, **fields):
        recipe = tmp_path / f"{stage}.yaml"
        recipe.write_text(yaml.safe_dump({**common, **fields, "output_dir": str(tmp_path / output_dir)}))
        command = [sys.executable, "-m", "accelerate.commands.launch"]
        command += [
            "--config_file",
            f"accelerate_configs/{config}.yaml",
            f"recipes/{stage}.py",
            "--config",
            str(recipe),
        ]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr

    launch("sft", "sft", **train, **lora)
    launch("reinforce", "reinforce", **train, **rl)
    launch("ppo_clip", "ppo_clip", **train, **rl, num_iterations=2)
    for stage in ("sft", "reinforce", "ppo_clip"):
        weights = load_file(tmp_path / stage / "adapter_model.safetensors")
        assert all(tensor.isfinite().all() for tensor in weights.values())
        log = json.loads((tmp_path / stage / "trainer_state.json").read_text())["log_history"]
        assert log[0]["loss"] == log[0]["loss"] and log[0]["grad_norm"] >= 0
    launch(
        "evaluate",
        "results",
        model_name_or_path=str(tmp_path / "ppo_clip"),
        dataset_test_split="train",
        max_completion_length=8,
    )
    metrics = json.loads((tmp_path / "results" / "metrics.json").read_text())
    assert metrics["num_tasks"] == 3 and metrics["machine"]["gpu"]
