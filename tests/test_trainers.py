"""The trainers against their formulas, and what they must never touch."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from trainers import PPOClipConfig, PPOClipTrainer, ReinforceConfig, ReinforceTrainer, keep_adapter_in_fp32


PROMPTS = ["def f(x):\n", "a = 1\n", "import re\n\n\ndef long_name(x):\n", "b"]
COMMON = {
    "max_completion_length": 6,
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "report_to": "none",
    "lr_scheduler_type": "constant",
    "save_strategy": "no",
    "disable_tqdm": True,
    "logging_steps": 1,
    "seed": 3,
}


def policy(model):
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))


def dataset(repeats=1):
    return Dataset.from_dict({"prompt": PROMPTS * repeats})


class RecordingReward:
    """A deterministic reward that keeps the rollouts it was asked about."""

    __name__ = "recording"

    def __init__(self):
        self.rollouts = []

    def __call__(self, prompts, completions, completion_ids, **kwargs):
        rewards = [0.5 - (sum(ids) % 7) / 3 for ids in completion_ids]
        self.rollouts.append((prompts, completion_ids, rewards))
        return rewards


def train_with_sgd(trainer_class, config, model, learning_rate):
    reward = RecordingReward()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    trainer = trainer_class(model, reward, config, train_dataset=dataset(), optimizers=(optimizer, None))
    trainer.train()
    return reward, trainer


def reference_update(model, tokenizer, rollout, learning_rate, num_epochs, loss_of):
    """The independent reference: plain forwards of each row alone, a loss, a step of SGD."""
    prompts, completion_ids, rewards = rollout
    parameters = [p for p in model.parameters() if p.requires_grad]

    def log_prob(prompt, completion):
        prompt_ids = tokenizer(prompt)["input_ids"]
        logits = model(torch.tensor([prompt_ids + completion])).logits[0, len(prompt_ids) - 1 : -1]
        return logits.log_softmax(-1)[range(len(completion)), completion].sum()

    old = None
    for _ in range(num_epochs):
        log_probs = torch.stack([log_prob(*row) for row in zip(prompts, completion_ids, strict=True)])
        old = log_probs.detach() if old is None else old
        gradients = torch.autograd.grad(loss_of(log_probs, old, torch.tensor(rewards)), parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= learning_rate * gradient


def reinforce_loss(log_probs, old, rewards):
    return -(rewards * log_probs).mean()


def ppo_clip_loss(log_probs, old, rewards):
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-8)
    ratio = (log_probs - old).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()


@pytest.mark.parametrize(
    "trainer_class, config_class, settings, loss_of, num_epochs",
    [
        (ReinforceTrainer, ReinforceConfig, {"max_steps": 1}, reinforce_loss, 1),
        (PPOClipTrainer, PPOClipConfig, {"max_steps": 3, "num_iterations": 3}, ppo_clip_loss, 3),
    ],
)
@pytest.mark.parametrize(
    "accumulation, checkpointing, full", [(1, False, False), (2, False, False), (1, True, False), (1, False, True)]
)
def test_update_equals_the_formula(
    tmp_path,
    tiny_model,
    tiny_tokenizer,
    trainer_class,
    config_class,
    settings,
    loss_of,
    num_epochs,
    accumulation,
    checkpointing,
    full,
):
    learning_rate = 0.1  # the update must stand out from the rounding of the parameters
    model = tiny_model if full else policy(tiny_model)
    reference = copy.deepcopy(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = config_class(
        str(tmp_path),
        per_device_train_batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=0.0,
        **settings,
        **{**COMMON, "gradient_checkpointing": checkpointing},
    )
    reward, _ = train_with_sgd(trainer_class, config, model, learning_rate)
    assert len(reward.rollouts) == 1, "one rollout serves all epochs"
    reference_update(reference, tiny_tokenizer, reward.rollouts[0], learning_rate, num_epochs, loss_of)

    expected = dict(reference.named_parameters())
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    expected_to_move = {name for name in before if full or "lora_" in name}
    assert moved == expected_to_move, "an adapter moves alone, the base is bit-identical"
    for name in moved:
        change, expected_change = model.get_parameter(name) - before[name], expected[name] - before[name]
        # fp32's rounding alone is 1e-5 of it on some processors
        assert (change - expected_change).norm() < 1e-4 * expected_change.norm(), name


@pytest.mark.parametrize(
    "trainer_class, config_class, num_rollouts",
    [(ReinforceTrainer, ReinforceConfig, 80), (PPOClipTrainer, PPOClipConfig, 40)],
)
def test_learns_a_trivial_reward(tmp_path, tiny_model, trainer_class, config_class, num_rollouts):
    """Paid for the share of tokens below 100, which is 100/258 for a policy that has learnt nothing."""
    config = config_class(
        str(tmp_path),
        per_device_train_batch_size=32,
        num_generations=8,
        baseline="batch",
        learning_rate=2e-2,
        **COMMON,
    )
    config.max_steps = num_rollouts * config.num_iterations
    rewards = []

    def share_of_low_tokens(completion_ids, **kwargs):
        shares = [sum(token < 100 for token in ids) / 6 for ids in completion_ids]
        rewards.append(sum(shares) / len(shares))
        return shares

    trainer = trainer_class(
        tiny_model,
        share_of_low_tokens,
        config,
        train_dataset=dataset(8),
        peft_config=LoraConfig(r=8, target_modules="all-linear"),
    )
    trainer.train()
    assert rewards[0] < 0.5, rewards
    assert rewards[-1] >= 0.9, rewards


def test_advantages_of_each_baseline(tmp_path, tiny_model):
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.5, torch.nan])

    def advantages(num_generations, **settings):
        config = ReinforceConfig(
            str(tmp_path), per_device_train_batch_size=6, num_generations=num_generations, **settings, **COMMON
        )
        trainer = ReinforceTrainer(tiny_model, RecordingReward(), config, train_dataset=dataset())
        return trainer.advantages(rewards, num_generations)

    torch.testing.assert_close(advantages(1), torch.tensor([1.0, 0.0, 0.0, 0.0, 0.5, 0.0]))
    torch.testing.assert_close(advantages(3, baseline="batch"), torch.tensor([0.7, -0.3, -0.3, -0.3, 0.2, 0.0]))
    torch.testing.assert_close(advantages(3, baseline="group"), torch.tensor([1.0, -0.5, -0.5, -0.5, 0.5, 0.0]))
    normalized = advantages(3, baseline="batch", normalize_advantages=True)
    torch.testing.assert_close(normalized[:5].std(), torch.tensor(1.0))
    assert normalized[5] == 0


def test_extreme_ratio_is_reported_and_stays_finite(tmp_path, tiny_model):
    config = PPOClipConfig(str(tmp_path), per_device_train_batch_size=2, **COMMON)
    trainer = PPOClipTrainer(policy(tiny_model), RecordingReward(), config, train_dataset=dataset())
    logps = torch.tensor([900.0, -900.0], requires_grad=True)
    loss = trainer.policy_loss(logps, {"old_logps": torch.zeros(2), "advantages": torch.tensor([1.0, -1.0])})
    loss.backward()
    assert loss.isfinite() and logps.grad.isfinite().all()
    assert trainer._metrics["train"]["ratio/max"] == [pytest.approx(4.85e8, rel=0.01)]


def test_adapter_masters_are_fp32_and_a_step_at_5e_6_survives(tmp_path, tiny_model):
    """TRL casts the adapter of a quantised base to bf16, where this step would round to nothing."""
    model = policy(tiny_model.to(torch.bfloat16))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)  # what TRL does
    keep_adapter_in_fp32(model, before)
    assert all(torch.equal(model.get_parameter(name), value) for name, value in before.items())
    config = ReinforceConfig(
        str(tmp_path), per_device_train_batch_size=4, learning_rate=5e-6, max_steps=1, **{**COMMON, "bf16": True}
    )
    ReinforceTrainer(model, RecordingReward(), config, train_dataset=dataset()).train()
    changes = torch.cat([(model.get_parameter(name) - value).abs().flatten() for name, value in before.items()])
    # AdamW's first step is the learning rate, whatever the gradient
    torch.testing.assert_close(changes[changes > 0].median(), torch.tensor(5e-6), rtol=0.01, atol=0)
    assert (changes > 0).float().mean() > 0.9


def test_saved_adapter_is_the_trained_one(tmp_path, tiny_model, tiny_folder):
    model = policy(tiny_model)
    config = ReinforceConfig(
        str(tmp_path / "run"), per_device_train_batch_size=4, max_steps=1, learning_rate=1e-2, **COMMON
    )
    trainer = ReinforceTrainer(model, RecordingReward(), config, train_dataset=dataset())
    trainer.train()
    trainer.save_model()
    assert sorted(path.name for path in (tmp_path / "run").iterdir() if path.is_dir()) == [], "no second adapter"
    loaded = PeftModel.from_pretrained(
        type(tiny_model).from_pretrained(tiny_folder, dtype=torch.float32), tmp_path / "run"
    )
    trained = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert all(torch.equal(loaded.get_parameter(name), p) for name, p in trained.items())


def test_kl_to_the_adapter_it_started_from_is_zero_at_first(tmp_path, tiny_model):
    config = ReinforceConfig(
        str(tmp_path), per_device_train_batch_size=4, max_steps=2, learning_rate=0.05, beta=0.1, **COMMON
    )
    reward, trainer = train_with_sgd(ReinforceTrainer, config, policy(tiny_model), 0.05)
    kl = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert kl[0] == pytest.approx(0.0, abs=1e-6) and abs(kl[1]) > 1e-4


@pytest.mark.parametrize(
    "config_class, settings, message",
    [
        (ReinforceConfig, {"top_p": 0.0}, "top_p is 0.0"),
        (ReinforceConfig, {"top_p": 1.5}, "top_p is 1.5"),
        (ReinforceConfig, {"temperature": 0.0}, "temperature is 0.0"),
        (ReinforceConfig, {"baseline": "critic"}, "baseline is 'critic'"),
        (ReinforceConfig, {"baseline": "group"}, "set num_generations to 2 or more"),
        (ReinforceConfig, {"num_iterations": 2}, "num_iterations is 2"),
        (ReinforceConfig, {"num_generations": 3}, "must be divisible by num_generations"),
        (PPOClipConfig, {"per_device_train_batch_size": 1}, "a batch of 1 cannot be normalised"),
    ],
)
def test_bad_settings_are_refused(tmp_path, config_class, settings, message):
    with pytest.raises(ValueError, match=message):
        config_class(str(tmp_path), **{"per_device_train_batch_size": 4, **COMMON, **settings})


def test_images_are_refused(tmp_path, tiny_model):
    config = ReinforceConfig(str(tmp_path), per_device_train_batch_size=1, max_steps=1, **COMMON)
    images = Dataset.from_dict({"prompt": ["a"], "image": ["b"]})
    with pytest.raises(ValueError, match="this trainer reads text only"):
        ReinforceTrainer(tiny_model, RecordingReward(), config, train_dataset=images).train()
