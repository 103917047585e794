"""The trainers against their formulas, and what they must never touch."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from reference_update import (
    COMMON,
    RecordingReward,
    dataset,
    log_prob,
    policy,
    ppo_clip_loss,
    reference_update,
    reinforce_loss,
    train_with_sgd,
)
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from trainers import PPOClipConfig, PPOClipTrainer, ReinforceConfig, ReinforceTrainer


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
        (ReinforceConfig, {"drop_uninformative_groups": True}, "compares completions of one prompt"),
        (ReinforceConfig, {"num_iterations": 2}, "num_iterations is 2"),
        (ReinforceConfig, {"min_advantage_std": -1.0}, "min_advantage_std is -1.0"),
        (ReinforceConfig, {"min_advantage_std": 0.1}, "set normalize_advantages to true, or min_advantage_std to 0"),
        (PPOClipConfig, {"importance_sampling_level": "word"}, "importance_sampling_level is 'word'"),
        (PPOClipConfig, {"target_kl": 0.0}, "target_kl is 0.0"),
        (
            PPOClipConfig,
            {"target_kl": 0.1, "gradient_accumulation_steps": 4, "steps_per_generation": 2, "num_iterations": 3},
            "its 6 micro-batches .* end within a step of 4: set gradient_accumulation_steps to a divisor",
        ),
        (PPOClipConfig, {"dual_clip": 1.0}, "dual_clip is 1.0"),
        (ReinforceConfig, {"num_generations": 3}, "must be divisible by num_generations"),
        (PPOClipConfig, {"per_device_train_batch_size": 1}, "a single completion cannot be normalized"),
    ],
)
def test_bad_settings_are_refused(tmp_path, config_class, settings, message):
    with pytest.raises(ValueError, match=message):
        config_class(str(tmp_path), **{"per_device_train_batch_size": 4, **COMMON, **settings})


@pytest.mark.parametrize("sharding", ["FSDP", "DEEPSPEED"])
def test_continuous_batching_of_sharded_weights_is_refused(tmp_path, monkeypatch, sharding):
    monkeypatch.setenv(f"ACCELERATE_USE_{sharding}", "true")
    with pytest.raises(ValueError, match="needs the whole weights on each GPU"):
        ReinforceConfig(str(tmp_path), use_transformers_continuous_batching=True)


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
