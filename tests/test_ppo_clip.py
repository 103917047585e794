"""PPO-Clip: its loss, its options, and the policy that a ratio is measured against."""

import copy

import pytest
import torch
from reference_update import COMMON, RecordingReward, dataset, log_prob, policy

from trainers import PPOClipConfig, PPOClipTrainer


def test_extreme_ratio_is_reported_and_stays_finite(tmp_path, tiny_model):
    config = PPOClipConfig(str(tmp_path), per_device_train_batch_size=2, **COMMON)
    trainer = PPOClipTrainer(policy(tiny_model), RecordingReward(), config, train_dataset=dataset())
    logps = torch.tensor([900.0, -900.0], requires_grad=True)
    inputs = {"old_per_token_logps": torch.zeros(2, 1), "completion_mask": torch.ones(2, 1)}
    loss = trainer.policy_loss(logps[:, None], inputs | {"advantages": torch.tensor([1.0, -1.0])})
    loss.backward()
    assert loss.isfinite() and logps.grad.isfinite().all()
    assert trainer.measured["ratio/max"].item() == pytest.approx(4.85e8, rel=0.01)


@pytest.mark.parametrize(
    "settings, expected",
    [
        # Ratios of the rows' tokens: (1.5, 1.5, -), (0.5, 2.0, 1.0); the mask ends the first row after two tokens
        ({}, -(1.2 * 1.0 + -1.0 * 1.0) / 2),
        ({"importance_sampling_level": "token"}, -((1.2 + 1.2) * 1.0 + (-0.8 - 2.0 - 1.0)) / 2),
        ({"importance_sampling_level": "token", "dual_clip": 1.5}, -((1.2 + 1.2) * 1.0 + (-0.8 - 1.5 - 1.0)) / 2),
    ],
)
def test_ppo_loss_of_completions_and_of_tokens(tmp_path, tiny_model, settings, expected):
    config = PPOClipConfig(str(tmp_path), per_device_train_batch_size=2, **settings, **COMMON)
    trainer = PPOClipTrainer(policy(tiny_model), RecordingReward(), config, train_dataset=dataset())
    inputs = {
        "old_per_token_logps": torch.zeros(2, 3),
        "completion_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]),
        "advantages": torch.tensor([1.0, -1.0]),
    }
    loss = trainer.policy_loss(torch.tensor([[1.5, 1.5, 7.0], [0.5, 2.0, 1.0]]).log(), inputs)
    torch.testing.assert_close(loss, torch.tensor(expected))


def test_epochs_beyond_the_target_kl_leave_the_policy_alone(tmp_path, tiny_model):
    model = policy(tiny_model)
    moved = []

    class Trainer(PPOClipTrainer):
        def log(self, logs, start_time=None):
            super().log(logs, start_time)
            if "approx_kl" in logs or "skipped_epochs" in logs:
                moved.append((logs["skipped_epochs"], sum(p.double().sum().item() for p in model.parameters())))

    settings = {"num_iterations": 4, "max_steps": 8, "target_kl": 1e-3, "epsilon": 10.0, "learning_rate": 1e-2}
    settings |= COMMON | {"save_strategy": "steps", "save_steps": 6}
    config = PPOClipConfig(str(tmp_path), per_device_train_batch_size=4, **settings)
    untrained = copy.deepcopy(model)
    Trainer(model, RecordingReward(), config, train_dataset=dataset(2)).train()
    # The first epoch's own KL is 0. The second finds that of one step, is skipped, and so are the third and fourth
    assert [skipped for skipped, _ in moved] == [0, 1, 1, 1] * 2
    sums = [total for _, total in moved]
    assert sums[0] == sums[1] == sums[2] == sums[3] and len(set(sums)) == 2

    model = untrained
    resumed = Trainer(model, RecordingReward(), config, train_dataset=dataset(2))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert moved[8:] == moved[6:8], "a run that continues from a checkpoint skips them, too"


def test_old_log_probabilities_are_the_rollouts_when_it_starts_within_a_step(tmp_path, tiny_model, tiny_tokenizer):
    """With 3 micro-batches a rollout and 4 a step, the policy moves before the last micro-batch of a first epoch."""
    model = policy(tiny_model)
    at_rollout = copy.deepcopy(model)
    differences = []

    def reward(completion_ids, **kwargs):
        at_rollout.load_state_dict(model.state_dict())
        return [float(sum(ids) % 7) for ids in completion_ids]

    class Trainer(PPOClipTrainer):
        def policy_loss(self, per_token_logps, inputs):
            loss = super().policy_loss(per_token_logps, inputs)
            for row, old in enumerate((inputs["old_per_token_logps"] * inputs["completion_mask"]).sum(1)):
                parts = [inputs[f"{x}_ids"][row][inputs[f"{x}_mask"][row].bool()] for x in ("prompt", "completion")]
                prompt, completion = (part.tolist() for part in parts)
                expected = log_prob(at_rollout, tiny_tokenizer, tiny_tokenizer.decode(prompt), completion)
                differences.append((old - expected).abs().item())
            return loss

    settings = {"gradient_accumulation_steps": 4, "steps_per_generation": 3, "num_iterations": 1, "max_steps": 3}
    config = PPOClipConfig(str(tmp_path), per_device_train_batch_size=2, learning_rate=0.1, **settings, **COMMON)
    Trainer(model, reward, config, train_dataset=dataset(6)).train()
    assert len(differences) == 3 * 4 * 2 and max(differences) < 1e-3, differences
