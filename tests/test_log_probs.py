"""The CPU path of log-probabilities: the same numbers and gradients as a plain forward of each row alone."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import MistralConfig, MistralForCausalLM
from trl.trainer.utils import add_fused_lm_head

from trainers.cpu import add_packed_lm_head

PROMPT_LENGTH = 6
PROMPT_OF_ROW = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(2, 200, (3, PROMPT_LENGTH), generator=generator)
    prompt_mask = torch.ones_like(prompts)
    prompt_mask[1, :3] = 0
    completions = torch.randint(2, 200, (8, 5), generator=generator)
    completion_mask = (torch.arange(5) < torch.tensor([5, 3, 1, 5, 4, 2, 5, 1])[:, None]).long()
    input_ids = torch.cat([prompts[PROMPT_OF_ROW], completions], 1)
    attention_mask = torch.cat([prompt_mask[PROMPT_OF_ROW], completion_mask], 1)
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    labels[:, :PROMPT_LENGTH] = -100
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def with_adapter(model):
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))


def adapter_gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("num_positions, num_tokens", [(512, 4096), (7, 100)])
def test_log_probs_entropy_and_gradients_equal_a_plain_forward(
    tiny_model, batch, monkeypatch, num_positions, num_tokens
):
    monkeypatch.setattr("trainers.cpu.log_probs.NUM_POSITIONS", num_positions)
    monkeypatch.setattr("trainers.cpu.log_probs.NUM_TOKENS", num_tokens)
    weights = torch.linspace(-1, 1, 8)  # a different weight a row, as advantages are
    model = with_adapter(tiny_model)
    expected_log_probs, expected_entropy, expected_mean_logits, expected_top1 = (torch.zeros(8, 10) for _ in range(4))
    for row in range(8):
        keep = batch["attention_mask"][row].bool()
        ids, labels = batch["input_ids"][row][keep], batch["labels"][row][keep]
        logits = model(ids[None]).logits[0, :-1] / 0.7
        log_softmax = logits.log_softmax(-1)
        scored = labels[1:] != -100
        log_probs = log_softmax.gather(-1, ids[1:, None])[:, 0][scored]
        (weights[row] * log_probs.sum()).backward()
        at = (batch["labels"][row][1:] != -100).nonzero()[:, 0]
        expected_log_probs[row, at] = log_probs.detach()
        expected_mean_logits[row, at] = logits.mean(-1)[scored].detach()
        expected_top1[row, at] = (logits.argmax(-1) == labels[1:])[scored].float()
        expected_entropy[row, at] = -(log_softmax.exp() * log_softmax).sum(-1)[scored].detach()
    expected_gradients = adapter_gradients(model)

    model.zero_grad()
    base = model.get_base_model()
    add_fused_lm_head(base, temperature=0.7)
    add_packed_lm_head(base, temperature=0.7)
    output = model(**batch, fused_lm_head=True)
    (weights * output.log_probs.sum(1)).sum().backward()
    torch.testing.assert_close(output.log_probs, expected_log_probs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.entropy, expected_entropy, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.mean_logits, expected_mean_logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(output.is_top1.float(), expected_top1)
    # fp32's rounding alone is 1e-5 of them on some processors
    assert (adapter_gradients(model) - expected_gradients).norm() < 1e-4 * expected_gradients.norm()
    assert torch.equal(output.label_mask, batch["labels"][:, 1:] != -100)


def test_no_padding_and_a_shared_prompt_once(tiny_model, batch):
    lengths = []
    tiny_model.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    model = with_adapter(tiny_model)
    add_fused_lm_head(tiny_model)
    add_packed_lm_head(tiny_model)
    model(**batch, fused_lm_head=True)
    prompts = batch["attention_mask"][[0, 3, 5], :PROMPT_LENGTH].sum()
    assert lengths == [(1, prompts + batch["attention_mask"][:, PROMPT_LENGTH:].sum())]


def test_nothing_to_score_is_a_zero_with_a_gradient(tiny_model, batch):
    """As of a micro-batch whose completions are all cut off, with `mask_truncated_completions`."""
    batch["attention_mask"][:, PROMPT_LENGTH:] = 0
    batch["labels"][:] = -100
    model = with_adapter(tiny_model)
    add_fused_lm_head(tiny_model)
    add_packed_lm_head(tiny_model)
    log_probs = model(**batch, fused_lm_head=True).log_probs
    assert torch.equal(log_probs, torch.zeros(8, 10))
    log_probs.sum().backward()
    assert not adapter_gradients(model).any()


def test_a_sliding_window_is_kept(batch):
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=200,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=3,
        initializer_range=0.3,
    )
    model = MistralForCausalLM(config).requires_grad_(False)
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    expected = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0].masked_fill(labels == -100, 0)
    add_fused_lm_head(model)
    add_packed_lm_head(model)
    torch.testing.assert_close(model(**batch, fused_lm_head=True).log_probs, expected, rtol=1e-5, atol=1e-5)


def test_bf16_base_agrees_with_fp32_to_bf16_accuracy(tiny_model, batch):
    model = with_adapter(tiny_model.to(torch.bfloat16))
    add_fused_lm_head(tiny_model)
    add_packed_lm_head(tiny_model)
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = model(**batch, fused_lm_head=True).log_probs
        full = model.float()(**batch, fused_lm_head=True).log_probs
    assert half.dtype == full.dtype == torch.float32
    torch.testing.assert_close(half, full, rtol=0.02, atol=0.05)


def test_trained_head_keeps_trls_way(tiny_model, batch):
    def gradients(cpu_head):
        for parameter in tiny_model.parameters():
            parameter.grad = None
        forward = tiny_model.forward
        add_fused_lm_head(tiny_model)
        if cpu_head:
            add_packed_lm_head(tiny_model)
        tiny_model(**batch, fused_lm_head=True).log_probs.sum().backward()
        tiny_model.forward = forward
        return tiny_model.lm_head.weight.grad.clone()

    assert torch.equal(gradients(cpu_head=True), gradients(cpu_head=False))


def test_calls_without_the_fused_head_are_the_models_own(tiny_model, batch):
    expected = tiny_model(batch["input_ids"], labels=batch["input_ids"])
    add_fused_lm_head(tiny_model)
    add_packed_lm_head(tiny_model)
    output = tiny_model(batch["input_ids"], labels=batch["input_ids"])
    assert torch.equal(output.logits, expected.logits) and torch.equal(output.loss, expected.loss)
