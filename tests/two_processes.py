"""What test_two_processes.py launches as two processes, and runs alone to compare."""

import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import save_file
from trl import ModelConfig

from recipes.common.policy import load_policy
from recipes.common.run_directory import RunDirectory
from trainers import (
    PPOClipConfig,
    PPOClipTrainer,
    ReinforceConfig,
    ReinforceTrainer,
    policy_gradient,
    use_fast_log_probs,
)
from trainers.vllm import merged_parameters

DROP_GROUPS = {"max_steps": 2, "num_generations": 2, "baseline": "group", "drop_uninformative_groups": True}
PROMPTS = ["def f(x):\n", "a = 1\n", "import re\n", "bb", "c = ", "def g():\n", "x", "y = [1, 2]\n"]
RANK = int(os.environ.get("RANK", 0))


def rewards(completion_ids, **kwargs):
    assert len(completion_ids) == 8 // int(os.environ.get("WORLD_SIZE", 1)), "each process grades its own completions"
    return [0.5 - (sum(ids) % 7) / 3 for ids in completion_ids]


def configure(config_class, output_dir, per_device_train_batch_size, **settings):
    return config_class(
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
    )


def build(stage, folder, output_dir, per_device_train_batch_size):
    """Build the trainer of a stage, for which completions depend on prompt and place, not on the process."""
    default_class, config_class, settings = {
        "reinforce": (ReinforceTrainer, ReinforceConfig, {"max_steps": 2, "baseline": "batch"}),
        "ppo_clip": (PPOClipTrainer, PPOClipConfig, {"max_steps": 4, "num_iterations": 2}),
        "drop_groups": (ReinforceTrainer, ReinforceConfig, DROP_GROUPS),
    }[stage]

    class Trainer(default_class):
        def _generate_single_turn(self, prompt_ids, images, multimodal_fields):
            # Two completions of a prompt differ, but not those of the prompt of one token: a group of one reward
            shifts = [row % 2 if len(ids) > 1 else 0 for row, ids in enumerate(prompt_ids)]
            return [
                [2 + (token * 37 + i + 2 * shift) % 200 for i, token in enumerate(ids * 2)][: 3 + ids[0] % 4]
                for ids, shift in zip(prompt_ids, shifts, strict=True)
            ]

    torch.manual_seed(0)
    return Trainer(
        str(folder),
        rewards,
        configure(config_class, output_dir, per_device_train_batch_size, **settings),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )


def train(stage, folder, output_dir, per_device_train_batch_size):
    trainer = build(stage, folder, output_dir, per_device_train_batch_size)
    trainer.train()
    trainer.save_model()
    return trainer.state.log_history


def train_sharded(folder, adapter, output_dir, per_device_train_batch_size, is_sharded=True):
    """Continue an adapter for one step, from completions that are decoded greedily; return the trainer."""
    config = configure(ReinforceConfig, output_dir, per_device_train_batch_size, max_steps=1, top_k=1)
    if is_sharded:
        assert config.device.type == "cpu"
        # accelerate leaves FSDP off on a CPU, where it works as well, and the LM head for CPUs needs whole weights
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        policy_gradient.use_fast_log_probs = lambda model, *_: use_fast_log_probs(model, torch.device("cuda"))
    model_args = ModelConfig(model_name_or_path=str(folder), dtype="float32")
    trainer = ReinforceTrainer(
        load_policy(model_args, config.device, str(adapter)),
        rewards,
        config,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
    )
    assert (trainer.accelerator.distributed_type == DistributedType.FSDP) == is_sharded
    trainer.train()
    trainer.save_model()
    return trainer


def refusal(function, *arguments):
    """Return how a function stops, or what it returns."""
    try:
        return function(*arguments)
    except (RuntimeError, SystemExit) as error:
        return f"{type(error).__name__}: {error}"


def loss_of_one_process(folder, output_dir):
    """Train with a loss that is not finite in the second process."""
    trainer = build("reinforce", folder, output_dir, 2)
    policy_loss = trainer.policy_loss
    trainer.policy_loss = lambda *arguments: policy_loss(*arguments) * (torch.nan if RANK else 1.0)
    return refusal(trainer.train)


def gradient_of_one_process(trainer):
    """Stop a sharded trainer at a gradient that is not finite in the second process's share."""
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
            if RANK:
                parameter.grad.to_local().fill_(torch.nan)
    [callback] = [c for c in trainer.callback_handler.callbacks if type(c).__name__ == "_StopOnBadGradient"]
    return refusal(lambda: callback.on_pre_optimizer_step(None, None, None, model=trainer.model))


def run_directories(output_dir):
    """Start runs on hosts that share no disk: the same path is another directory for each process."""
    this, other = ({"stage": stage, "settings": {}} for stage in ("sft", "dpo"))
    files_by_case = {  # on the first host and on the second
        "new": ([], ["rng_state_1.pth"]),
        "of another run": ([("run.json", other), "notes.txt"], []),
        "finished": ([("run.json", this | {"finished": True}), "adapter_model.safetensors"], []),
        "continued on one host": ([("run.json", this), "checkpoint-3/complete"], ["checkpoint-3/rng_state_1.pth"]),
        "continued": (
            [("run.json", this), "checkpoint-3/complete"],
            ["checkpoint-3/complete", "checkpoint-6/complete"],
        ),
    }
    outcomes = {}
    host = output_dir / f"host_{RANK}"
    for case, files in files_by_case.items():
        for file in files[RANK]:
            name, content = file if isinstance(file, tuple) else (file, {})
            (host / case / name).parent.mkdir(parents=True, exist_ok=True)
            (host / case / name).write_text(json.dumps(content))
        host.mkdir(exist_ok=True)
        os.chdir(host)

        def start(path):
            run = RunDirectory(path, "sft", {})
            return "has finished" if run.finished else run.start()

        outcomes[case] = refusal(start, case)
    return outcomes


if __name__ == "__main__":
    task, folder, output_dir = sys.argv[1], sys.argv[2], Path(sys.argv[3]).absolute()
    outcome = {}
    if task == "ddp":
        for stage in ("reinforce", "ppo_clip", "drop_groups"):
            train(stage, folder, output_dir / stage, per_device_train_batch_size=2)
        outcome["loss"] = loss_of_one_process(folder, output_dir / "nan")
        outcome |= run_directories(output_dir)
    else:
        trainer = train_sharded(folder, sys.argv[4], output_dir / "sharded", per_device_train_batch_size=2)
        before = [parameter.full_tensor().clone() for parameter in trainer.model.parameters()]
        merged = {name: value.clone() for name, value in merged_parameters(trainer.model, lambda _: nullcontext())}
        after = [parameter.full_tensor() for parameter in trainer.model.parameters()]
        outcome["policy is left as it is"] = all(map(torch.equal, before, after))
        outcome["gradient"] = gradient_of_one_process(trainer)
        save_file(merged, output_dir / f"merged_{RANK}.safetensors")
    (output_dir / f"outcome_{RANK}.json").write_text(json.dumps(outcome))
    torch.distributed.barrier()
    os._exit(0)  # a thread of gloo that still runs can end a process by SIGABRT, in destroy_process_group() too
