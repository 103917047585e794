"""fp16 with its loss scaler: a step that overflows is skipped. The scaler is torch's own, for a CPU."""

import math

import pytest
import torch
from reference_update import COMMON, RecordingReward, dataset, policy

from trainers import PPOClipConfig, PPOClipTrainer, ReinforceConfig, ReinforceTrainer


def in_fp16(trainer, **scaler):
    """Make a trainer on a CPU compute in fp16, as accelerate does on a GPU."""
    trainer.accelerator.state._mixed_precision = "fp16"
    trainer.accelerator.native_amp = True
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", **scaler)
    return trainer


def adapter(trainer):
    return [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]


@pytest.mark.parametrize(
    "trainer_class, config_class", [(ReinforceTrainer, ReinforceConfig), (PPOClipTrainer, PPOClipConfig)]
)
def test_a_step_that_overflows_is_skipped(tmp_path, tiny_model, trainer_class, config_class):
    config = config_class(str(tmp_path), per_device_train_batch_size=2, max_steps=3, learning_rate=1e-2, **COMMON)
    states = []

    class Trainer(trainer_class):
        def log(self, logs, start_time=None):
            super().log(logs, start_time)
            if "loss" in logs:
                states.append(adapter(self))

    model = policy(tiny_model.half())
    trainer = in_fp16(
        Trainer(model, RecordingReward(), config, train_dataset=dataset()), init_scale=2.0**100, backoff_factor=2.0**-92
    )
    assert all(p.dtype == torch.float32 for p in adapter(trainer)), "a scaler refuses fp16 gradients"
    before = adapter(trainer)
    trainer.train()
    assert trainer.state.global_step == 3
    assert trainer.accelerator.scaler.get_scale() == 2.0**8
    first, *others = (log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log)
    assert not math.isfinite(first) and all(map(math.isfinite, others))
    assert all(map(torch.equal, before, states[0])) and not all(map(torch.equal, before, states[1]))
    assert all(p.isfinite().all() for p in adapter(trainer))


def test_a_run_that_overflows_at_any_scale_stops(tmp_path, tiny_model):
    config = ReinforceConfig(str(tmp_path), per_device_train_batch_size=2, max_steps=9, learning_rate=1e-2, **COMMON)

    class Overflowing(ReinforceTrainer):
        def policy_loss(self, per_token_logps, inputs):
            return super().policy_loss(per_token_logps, inputs) * torch.inf

    trainer = Overflowing(policy(tiny_model.half()), RecordingReward(), config, train_dataset=dataset())
    in_fp16(trainer, init_scale=4.0)
    with pytest.raises(RuntimeError, match="stopped after 3 steps: gradients are not finite in fp16, at any scale"):
        trainer.train()


def test_target_kl_is_refused_in_fp16(tmp_path):
    with pytest.raises(ValueError, match="target_kl skips backward passes"):
        PPOClipConfig(str(tmp_path), target_kl=0.1, fp16=True)
