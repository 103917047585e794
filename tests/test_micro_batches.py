"""How a rollout is split for the loss, and which of its completions are left out."""

import copy

import pytest
import torch
from reference_update import COMMON, dataset, policy, reference_update

from trainers import ReinforceConfig, ReinforceTrainer
from trainers.micro_batches import micro_batches


def rollout(num_rows):
    return {
        "prompt_ids": torch.arange(num_rows).repeat_interleave(3).view(num_rows, 3),
        "prompt_mask": torch.tensor([[0, 1, 1]] * num_rows),
        "completion_ids": torch.ones(num_rows, 4, dtype=torch.long),
        "completion_mask": torch.tensor([[1, 1, 0, 0]] * num_rows),
        "advantages": torch.arange(num_rows).float(),
    }


def test_every_row_is_in_one_micro_batch_without_padding():
    batches = micro_batches(rollout(8), num_batches=4, num_steps=2)
    assert sorted(torch.cat([batch["advantages"] for batch in batches]).tolist()) == list(range(8))
    assert all(batch["prompt_ids"].shape == batch["completion_ids"].shape == (2, 2) for batch in batches)
    for first, second in (batches[:2], batches[2:]):  # sorted within a step
        assert first["prompt_ids"].max() < second["prompt_ids"].min()


@pytest.mark.parametrize("num_kept", [5, 2, 0])
def test_rows_that_are_not_kept_are_left_out_and_the_loss_is_the_mean_of_the_others(num_kept):
    weights = (torch.arange(8) < num_kept) * 8 / max(1, num_kept)
    batches = micro_batches(rollout(8) | {"weights": weights}, num_batches=4, num_steps=1)
    assert len(batches) == 4 and all("weights" not in batch for batch in batches)
    rows = [row for batch in batches if batch["loss_weight"] > 0 for row in batch["advantages"].tolist()]
    assert sorted(rows) == list(range(num_kept))
    mean = sum(batch["advantages"].mean() * batch["loss_weight"] for batch in batches) / 4
    assert mean == pytest.approx(sum(range(num_kept)) / max(1, num_kept))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_an_update_without_uninformative_groups_equals_the_formula(tmp_path, tiny_model, tiny_tokenizer, accumulation):
    """Of two prompts with four completions each, those of the second all pass: the first alone is learnt from."""
    model = policy(tiny_model)
    reference, before = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    seen = []

    def reward(prompts, completions, completion_ids, log_extra, **kwargs):
        passed = [row < 4 and row % 2 == 0 or row >= 4 for row in range(8)]
        log_extra("verdict", ["passed" if one else "failed" for one in passed])
        rewards = [float(one) - len(set(ids)) / 100 for one, ids in zip(passed, completion_ids, strict=True)]
        seen.append((prompts[:4], completion_ids[:4], rewards[:4]))
        return rewards

    config = ReinforceConfig(
        str(tmp_path),
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        num_generations=4,
        baseline="group",
        normalize_advantages=True,
        drop_uninformative_groups=True,
        max_grad_norm=0.0,
        max_steps=1,
        **COMMON,
    )
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    trainer = ReinforceTrainer(model, reward, config, train_dataset=dataset(2), optimizers=(optimizer, None))
    trainer.train()
    assert trainer.state.log_history[0]["frac_mixed_groups"] == 0.5

    def loss(log_probs, old, rewards):
        baselines = (rewards.sum() - rewards) / 3
        advantages = rewards - baselines
        return -((advantages - advantages.mean()) / (advantages.std() + 1e-8) * log_probs).mean()

    assert len(seen) == 1
    reference_update(reference, tiny_tokenizer, seen[0], 0.1, 1, loss)
    expected = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            change, expected_change = parameter - before[name], expected[name] - before[name]
            assert (change - expected_change).norm() < 1e-4 * expected_change.norm(), name
