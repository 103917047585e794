"""The trainers against their formulas, and what they must never touch."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from trainers import PPOClipConfig, PPOClipTrainer, ReinforceConfig, ReinforceTrainer

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


def log_prob(model, tokenizer, prompt, completion):
    """Of a whole completion, by a plain forward of it alone."""
    prompt_ids = tokenizer(prompt)["input_ids"]
    logits = model(torch.tensor([prompt_ids + completion])).logits[0, len(prompt_ids) - 1 : -1]
    return logits.log_softmax(-1)[range(len(completion)), completion].sum()


def reference_update(model, tokenizer, rollout, learning_rate, num_epochs, loss_of):
    """The independent reference: plain forwards, a loss, a step of SGD."""
    prompts, completion_ids, rewards = rollout
    parameters = [p for p in model.parameters() if p.requires_grad]
    old = None
    for _ in range(num_epochs):
        log_probs = torch.stack([log_prob(model, tokenizer, *row) for row in zip(prompts, completion_ids, strict=True)])
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
    bounded = advantages(3, baseline="batch", normalize_advantages=True, min_advantage_std=2.0)
    torch.testing.assert_close(bounded, torch.tensor([0.35, -0.15, -0.15, -0.15, 0.1, 0.0]))


def test_extreme_ratio_is_reported_and_stays_finite(tmp_path, tiny_model):
    config = PPOClipConfig(str(tmp_path), per_device_train_batch_size=2, **COMMON)
    trainer = PPOClipTrainer(policy(tiny_model), RecordingReward(), config, train_dataset=dataset())
    logps = torch.tensor([900.0, -900.0], requires_grad=True)
    inputs = {"old_per_token_logps": torch.zeros(2, 1), "completion_mask": torch.ones(2, 1)}
    loss = trainer.policy_loss(logps[:, None], inputs | {"advantages": torch.tensor([1.0, -1.0])})
    loss.backward()
    assert loss.isfinite() and logps.grad.isfinite().all()
    assert trainer._metrics["train"]["ratio/max"] == [pytest.approx(4.85e8, rel=0.01)]


def test_adapter_masters_are_fp32_and_a_step_at_5e_6_is_that_of_an_fp32_model(tmp_path, tiny_model):
    """TRL casts the adapter of a quantised base to bf16, where this step would round to nothing."""

    class Trainer(ReinforceTrainer):
        def _generate_single_turn(self, prompt_ids, images, multimodal_fields):
            return [[2 + (37 * token) % 200 for token in ids[:5]] for ids in prompt_ids]

    def changes(model, bf16):
        before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        model.is_loaded_in_4bit = bf16  # all that TRL asks before it casts
        config = ReinforceConfig(
            str(tmp_path), per_device_train_batch_size=4, learning_rate=5e-6, max_steps=1, **{**COMMON, "bf16": bf16}
        )
        trainer = Trainer(model, RecordingReward(), config, train_dataset=dataset())
        assert all(torch.equal(model.get_parameter(name), value) for name, value in before.items()), "not rounded"
        trainer.train()
        return torch.cat([(model.get_parameter(name) - value).flatten() for name, value in before.items()])

    half = changes(policy(copy.deepcopy(tiny_model).to(torch.bfloat16)), bf16=True)
    full = changes(policy(tiny_model.to(torch.bfloat16).float()), bf16=False)
    # AdamW's first step is the learning rate in the direction of each gradient's sign
    torch.testing.assert_close(half.abs().median(), torch.tensor(5e-6), rtol=0.01, atol=0)
    assert (half.sign() == full.sign()).float().mean() > 0.95


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


@pytest.mark.parametrize("full", [False, True])
def test_kl_to_the_policy_it_started_from_is_subtracted_from_the_reward(tmp_path, tiny_model, tiny_tokenizer, full):
    model = tiny_model if full else policy(tiny_model)
    reference = copy.deepcopy(model)
    rewards = []

    class Trainer(ReinforceTrainer):
        def advantages(self, penalized, num_generations):
            rewards.append((penalized, copy.deepcopy(model.state_dict())))
            return super().advantages(penalized, num_generations)

    config = ReinforceConfig(str(tmp_path), per_device_train_batch_size=4, max_steps=2, beta=0.1, **COMMON)
    reward, trainer = train_with_sgd(Trainer, config, model, 0.05)
    policy_then = copy.deepcopy(reference)
    for (prompts, completion_ids, plain), (penalized, weights) in zip(reward.rollouts, rewards, strict=True):
        policy_then.load_state_dict({name: weights[name] for name in policy_then.state_dict()})
        kl = torch.stack(
            [
                log_prob(policy_then, tiny_tokenizer, *row) - log_prob(reference, tiny_tokenizer, *row)
                for row in zip(prompts, completion_ids, strict=True)
            ]
        )
        torch.testing.assert_close(penalized, torch.tensor(plain) - 0.1 * kl, rtol=1e-4, atol=1e-5)
    logged = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert logged[0] == pytest.approx(0.0, abs=1e-6)
    assert abs(logged[1]) > 1e-3
    assert logged[1] == pytest.approx(kl.sum().item() / sum(map(len, completion_ids)), rel=1e-3)


@pytest.mark.parametrize(
    "trainer_class, config_class, settings, num_forwards",
    [
        (ReinforceTrainer, ReinforceConfig, {"max_steps": 2}, 4),
        (PPOClipTrainer, PPOClipConfig, {"max_steps": 3, "num_iterations": 3}, 6),
        # Two steps a rollout: the policy moves before the second, so old log-probabilities take a forward of their own
        (PPOClipTrainer, PPOClipConfig, {"max_steps": 4, "num_iterations": 1, "steps_per_generation": 4}, 8 + 8),
    ],
)
def test_no_forward_more_than_needed(tmp_path, tiny_model, trainer_class, config_class, settings, num_forwards):
    """Of the policy: one for each micro-batch of each epoch; old log-probabilities are those of the first epoch."""
    forwards = []
    model = policy(tiny_model)
    model.register_forward_pre_hook(lambda module, args, kwargs: forwards.append(kwargs), with_kwargs=True)
    config = config_class(
        str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=2, **settings, **COMMON
    )
    trainer_class(model, RecordingReward(), config, train_dataset=dataset(2)).train()
    assert len(forwards) == num_forwards
    assert all(kwargs["fused_lm_head"] for kwargs in forwards)


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

    settings = {"num_iterations": 4, "max_steps": 8, "target_kl": 1e-3, "epsilon": 10.0}
    config = PPOClipConfig(str(tmp_path), per_device_train_batch_size=4, learning_rate=1e-2, **settings, **COMMON)
    Trainer(model, RecordingReward(), config, train_dataset=dataset(2)).train()
    # The first epoch's own KL is 0, the second's is that of one step: the third and fourth are skipped
    assert [skipped for skipped, _ in moved] == [0, 0, 1, 1] * 2
    sums = [total for _, total in moved]
    assert sums[1] == sums[2] == sums[3] and len(set(sums)) == 4


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


def test_completions_that_are_cut_off_do_not_count_when_masked(tmp_path, tiny_model):
    """All of them, of a policy that never stops: no step, and no failure either."""

    class Trainer(ReinforceTrainer):
        def _generate_single_turn(self, prompt_ids, images, multimodal_fields):
            return [[5, 6, 7] for _ in prompt_ids]

    model = policy(tiny_model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = ReinforceConfig(
        str(tmp_path), per_device_train_batch_size=4, max_steps=1, mask_truncated_completions=True, **COMMON
    )
    Trainer(model, RecordingReward(), config, train_dataset=dataset()).train()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


def test_the_load_balancing_loss_of_a_mixture_of_experts_is_added(tmp_path, tiny_tokenizer):
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        pad_token_id=0,
        eos_token_id=1,
    )
    model = get_peft_model(Qwen2MoeForCausalLM(config), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    args = ReinforceConfig(
        str(tmp_path), per_device_train_batch_size=4, max_steps=1, router_aux_loss_coef=0.5, **COMMON
    )
    trainer = ReinforceTrainer(
        model,
        lambda completions, **kwargs: [0.0] * len(completions),
        args,
        train_dataset=dataset(),
        processing_class=tiny_tokenizer,
    )
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["aux_loss"] > 1 and log["loss"] == pytest.approx(0.5 * log["aux_loss"], rel=1e-3)


@pytest.mark.parametrize(
    "config_class, settings, message",
    [
        (ReinforceConfig, {"top_p": 0.0}, "top_p is 0.0"),
        (ReinforceConfig, {"top_p": 1.5}, "top_p is 1.5"),
        (ReinforceConfig, {"temperature": 0.0}, "temperature is 0.0"),
        (ReinforceConfig, {"baseline": "critic"}, "baseline is 'critic'"),
        (ReinforceConfig, {"baseline": "group"}, "set num_generations to 2 or more"),
        (ReinforceConfig, {"num_iterations": 2}, "num_iterations is 2"),
        (ReinforceConfig, {"min_advantage_std": -1.0}, "min_advantage_std is -1.0"),
        (PPOClipConfig, {"importance_sampling_level": "word"}, "importance_sampling_level is 'word'"),
        (PPOClipConfig, {"target_kl": 0.0}, "target_kl is 0.0"),
        (PPOClipConfig, {"dual_clip": 1.0}, "dual_clip is 1.0"),
        (ReinforceConfig, {"use_transformers_continuous_batching": True}, "would cast an fp32 adapter to bf16"),
        (ReinforceConfig, {"num_generations": 3}, "must be divisible by num_generations"),
        (PPOClipConfig, {"per_device_train_batch_size": 1}, "a single completion cannot be normalized"),
    ],
)
def test_bad_settings_are_refused(tmp_path, config_class, settings, message):
    with pytest.raises(ValueError, match=message):
        config_class(str(tmp_path), **{"per_device_train_batch_size": 4, **COMMON, **settings})


def test_activations_are_kept_on_a_cpu_unless_asked_otherwise(tmp_path):
    settings = {name: value for name, value in COMMON.items() if name != "gradient_checkpointing"}
    for config_class in (ReinforceConfig, PPOClipConfig):
        assert not config_class(str(tmp_path), **settings).gradient_checkpointing
        for name in ("gradient_checkpointing", "activation_checkpointing"):
            assert config_class(str(tmp_path), **{name: True}, **settings).activation_checkpointing


def test_images_are_refused(tmp_path, tiny_model):
    config = ReinforceConfig(str(tmp_path), per_device_train_batch_size=2, max_steps=1, **COMMON)
    images = Dataset.from_dict({"prompt": ["a"] * 2, "image": ["b"] * 2})
    with pytest.raises(ValueError, match="this trainer reads text only"):
        ReinforceTrainer(tiny_model, RecordingReward(), config, train_dataset=images).train()
