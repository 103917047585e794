"""Runs that are killed, fill the disk, or meet a broken reward: what they leave and how they go on."""

import asyncio
import multiprocessing
import os
import resource
import signal
import traceback
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

import trainers.checkpoints
from trainers import PPOClipConfig, PPOClipTrainer, ReinforceConfig, ReinforceTrainer, last_checkpoint

# Children of a process that has imported everything already: a start costs a second instead of ten
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["trainers", "trl.trainer.rloo_trainer", "peft"])

STAGES = {
    "reinforce": (ReinforceTrainer, ReinforceConfig, {"max_steps": 6}),
    "ppo_clip": (PPOClipTrainer, PPOClipConfig, {"max_steps": 8, "num_iterations": 2, "epsilon": 0.01}),
}
PROMPTS = ["def f(x):\n", "a = 1\n", "import re\n", "b", "c = ", "def g():\n", "x", "y = [1, 2]\n"]


def share_of_low_tokens(completion_ids, **kwargs):
    return [sum(token < 100 for token in ids) / len(ids) for ids in completion_ids]


def build(stage, model, output_dir, reward=share_of_low_tokens, trainer_class=None, eval_prompts=None, **settings):
    """A run of several epochs, with two rollouts in each."""
    default_class, config_class, lengths = STAGES[stage]
    config = config_class(
        str(output_dir),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        save_steps=1,
        save_total_limit=1,
        **{
            "max_completion_length": 6,
            "bf16": False,
            "use_cpu": True,
            "gradient_checkpointing": False,
            "report_to": "none",
            "disable_tqdm": True,
            "seed": 5,
            **lengths,
            **settings,
        },
    )
    return (trainer_class or default_class)(
        model,
        reward,
        config,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        eval_dataset=Dataset.from_dict({"prompt": eval_prompts}) if eval_prompts else None,
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )


def train(stage, folder, output_dir, kill_in=None, kill_at_step=None, file_bytes=None):
    """A run, in a process of its own: continues from the last checkpoint, and may kill itself on the way."""
    torch.set_num_threads(1)
    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    default_class = STAGES[stage][0]
    rotate_checkpoints = trainers.checkpoints.rotate_checkpoints

    def rotate(folder, *args, **kwargs):
        if kill_in == "rotation" and last_checkpoint(folder).endswith(f"-{kill_at_step}"):
            os.kill(os.getpid(), signal.SIGKILL)  # complete, and the one before it is still there
        rotate_checkpoints(folder, *args, **kwargs)

    trainers.checkpoints.rotate_checkpoints = rotate

    def reward(trainer_state, **kwargs):
        if kill_in == "rollout" and trainer_state.global_step == kill_at_step:
            os.kill(os.getpid(), signal.SIGKILL)
        return share_of_low_tokens(**kwargs)

    class Trainer(default_class):
        def _save_optimizer_and_scheduler(self, output_dir):
            if kill_in == "checkpoint" and self.state.global_step == kill_at_step:
                os.kill(os.getpid(), signal.SIGKILL)  # the adapter is written, the optimizer is not
            super()._save_optimizer_and_scheduler(output_dir)

        def policy_loss(self, per_token_logps, inputs):
            if kill_in == "loss" and self.state.global_step == kill_at_step:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().policy_loss(per_token_logps, inputs)

    trainer = build(stage, str(folder), output_dir, reward, Trainer)
    try:
        trainer.train(resume_from_checkpoint=True)
    except RuntimeError as error:
        Path(output_dir, "error").write_text(str(error) + "\n")
        traceback.print_exc()
        raise SystemExit(1) from None
    trainer.save_model()


PASS_RATES = {1: 0.2, 2: 0.9, 3: 0.5, 4: 0.7}  # of an evaluation after each step


def train_for_the_best(folder, output_dir, kill_at_step=None):
    """A run whose second step is the best; it may kill itself after a later one."""
    torch.set_num_threads(1)

    def reward(trainer_state, completion_ids, log_metric, **kwargs):
        if len(completion_ids) == 2:  # of the evaluation
            log_metric("pass_rate", PASS_RATES[trainer_state.global_step])
        elif trainer_state.global_step == kill_at_step:
            os.kill(os.getpid(), signal.SIGKILL)
        return share_of_low_tokens(completion_ids)

    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_pass_rate"}
    evaluation = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 2}
    trainer = build(
        "reinforce", str(folder), output_dir, reward, eval_prompts=PROMPTS[:2], max_steps=4, **best, **evaluation
    )
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()


def test_the_best_checkpoint_is_kept_and_loaded_over_a_killed_run(tmp_path, tiny_folder):
    def run(*args):
        process = context.Process(target=train_for_the_best, args=(tiny_folder, tmp_path / "run", *args))
        process.start()
        process.join()
        return process.exitcode

    assert run(3) == -signal.SIGKILL
    best, latest = (
        (tmp_path / "run" / f"checkpoint-{step}" / "adapter_model.safetensors").read_bytes() for step in (2, 3)
    )
    assert best != latest
    assert run() == 0
    assert (tmp_path / "run" / "adapter_model.safetensors").read_bytes() == best


def exit_code(*args):
    process = context.Process(target=train, args=args)
    process.start()
    process.join()
    return process.exitcode


@pytest.mark.parametrize(
    "stage, kills",
    [
        ("reinforce", [("rollout", 1), ("checkpoint", 3), ("rotation", 4), ("loss", 4)]),
        ("ppo_clip", [("loss", 1), ("rotation", 3), ("checkpoint", 4), ("rollout", 6)]),
    ],
)
def test_a_killed_run_ends_with_the_adapter_of_an_unbroken_one(tmp_path, tiny_folder, stage, kills):
    assert exit_code(stage, tiny_folder, tmp_path / "unbroken") == 0
    broken = tmp_path / "broken"
    for kill_in, step in kills:
        assert exit_code(stage, tiny_folder, broken, kill_in, step) == -signal.SIGKILL
        complete = step - 1 if kill_in == "checkpoint" else step
        assert last_checkpoint(broken) == str(broken / f"checkpoint-{complete}")
    assert exit_code(stage, tiny_folder, broken) == 0
    unbroken_adapter, adapter = (
        (folder / "adapter_model.safetensors").read_bytes() for folder in (tmp_path / "unbroken", broken)
    )
    assert adapter == unbroken_adapter


def test_a_seed_gives_one_adapter_and_another_seed_another(tmp_path, tiny_folder):
    def adapter(name, seed):
        torch.manual_seed(0)
        trainer = build("reinforce", str(tiny_folder), tmp_path / name, max_steps=2, save_strategy="no", seed=seed)
        trainer.train()
        trainer.save_model()
        return (tmp_path / name / "adapter_model.safetensors").read_bytes()

    assert adapter("a", 1) == adapter("b", 1) != adapter("c", 2)


@pytest.mark.parametrize("too_large", ["adapter_model.safetensors", "optimizer.pt"])
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, tiny_folder, too_large):
    folder = tmp_path / "run"
    assert exit_code("reinforce", tiny_folder, folder, "loss", 2) == -signal.SIGKILL
    kept = {path.name: path.read_bytes() for path in (folder / "checkpoint-2").iterdir()}
    size = (folder / "checkpoint-2" / too_large).stat().st_size
    assert exit_code("reinforce", tiny_folder, folder, None, None, size - 1) == 1
    error = (folder / "error").read_text()
    assert "training stopped after 3 steps: the checkpoint" in error and "could not be written" in error
    assert f"The last complete checkpoint is {folder / 'checkpoint-2'}" in error
    assert not (folder / "checkpoint-3").exists()
    assert {path.name: path.read_bytes() for path in (folder / "checkpoint-2").iterdir()} == kept


@pytest.mark.parametrize("is_async", [False, True])
def test_a_dead_reward_function_says_where_to_continue(tmp_path, tiny_folder, is_async):
    def reward(trainer_state, completions, **kwargs):
        if trainer_state.global_step == 2:
            raise ConnectionError("no grader answers")
        return [float(len(completion)) for completion in completions]

    async def async_reward(**kwargs):
        await asyncio.sleep(0)
        return reward(**kwargs)

    async_reward.__name__ = "reward"
    trainer = build("reinforce", str(tiny_folder), tmp_path, async_reward if is_async else reward)
    with pytest.raises(RuntimeError) as error:
        trainer.train()
    assert str(error.value) == (
        "training stopped after 2 steps: grading by reward failed: ConnectionError: no grader answers. "
        f"The last complete checkpoint is {tmp_path / 'checkpoint-2'}"
    )


@pytest.mark.parametrize(
    "value, steps, message",
    [(float("inf"), 1, "the loss is -?inf"), (1e36, 2, "the gradient's norm is inf: try a lower")],
)
def test_a_loss_or_gradient_that_is_not_finite_stops_the_run(tmp_path, tiny_folder, value, steps, message):
    """A norm that overflows clips the gradient to zero, so that step is taken and changes nothing for the worse."""

    def reward(trainer_state, completions, **kwargs):
        return [value if trainer_state.global_step == 1 else 1.0 for _ in completions]

    trainer = build("reinforce", str(tiny_folder), tmp_path, reward, logging_steps=1)
    with pytest.raises(RuntimeError, match=rf"stopped after {steps} steps: {message}.*checkpoint-1$"):
        trainer.train()
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_the_result_holds_no_copy_of_the_reference_and_checkpoints_do(tmp_path, tiny_model):
    """With an adapter to continue from, the reference of RLOOTrainer's KL penalty is a second adapter."""
    settings = {"per_device_train_batch_size": 2, "max_completion_length": 4, "max_steps": 2, "save_steps": 1}
    settings |= {"bf16": False, "use_cpu": True, "gradient_checkpointing": False, "report_to": "none", "beta": 0.1}
    trainer = ReinforceTrainer(
        get_peft_model(tiny_model, LoraConfig(r=4, target_modules="all-linear")),
        share_of_low_tokens,
        ReinforceConfig(str(tmp_path), logging_steps=1, **settings),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
    )
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "adapter_model.safetensors").is_file() and not (tmp_path / "ref").exists()
    assert "ref" in trainer.model.peft_config, "it is still in use"
    names = load_file(tmp_path / "adapter_model.safetensors")
    assert names and not [name for name in names if "ref" in name]
    assert (tmp_path / "checkpoint-1" / "ref" / "adapter_model.safetensors").is_file()
    trained = (tmp_path / "adapter_model.safetensors").read_bytes()
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    trainer.save_model()
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == trained
