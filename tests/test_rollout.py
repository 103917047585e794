"""Rollouts: the same tokens as transformers greedily, the same distribution when sampled, each row as if alone."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    DynamicLayer,
    Lfm2Config,
    Lfm2ForCausalLM,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from trainers import generate_completions
from trainers.adapters import adapter_in_base_dtype
from trainers.rollout.eager import CACHE_ROOM, _RoomyLayer
from trainers.rollout.sampling import sample_tokens

PROMPTS = ["def f(x):", "a", "import os\n\ndef longer_name(a, b):\n", "a", "zz = 3"]


def test_greedy_batch_equals_one_by_one_and_transformers(tiny_model, tiny_tokenizer):
    prompt_ids = tiny_tokenizer(PROMPTS)["input_ids"]
    eos = list(range(20))  # many, so that rows end at different steps
    batched = generate_completions(tiny_model, prompt_ids, eos, 24, temperature=0)
    assert batched == [generate_completions(tiny_model, [ids], eos, 24, temperature=0)[0] for ids in prompt_ids]
    for ids, completion in zip(prompt_ids, batched, strict=True):
        expected = tiny_model.generate(
            torch.tensor([ids]), max_new_tokens=24, do_sample=False, eos_token_id=eos, pad_token_id=0
        )
        assert completion == expected[0, len(ids) :].tolist()
    assert len({len(completion) for completion in batched}) > 2


def test_a_model_with_a_state_decodes_with_transformers(caplog):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    config = Lfm2Config(**sizes, layer_types=["conv", "full_attention"], vocab_size=64, initializer_range=0.3)
    model = Lfm2ForCausalLM(config).eval()
    prompt_ids, eos = [[5, 6, 7], [8, 9, 10, 11, 12], [5, 6, 7]], [57]
    completions = generate_completions(model, prompt_ids, eos, 8, temperature=0)
    for ids, completion in zip(prompt_ids, completions, strict=True):
        expected = model.generate(
            torch.tensor([ids]), max_new_tokens=8, do_sample=False, eos_token_id=eos, pad_token_id=0
        )
        assert completion == expected[0, len(ids) :].tolist()
    assert "lfm2 decodes with transformers' `generate`, which is slower: some of its layers keep a state" in caplog.text


@pytest.mark.parametrize(
    "temperature, top_p, top_k", [(0.8, 0.95, 0), (1.3, 0.5, 0), (0.7, 1.0, 20), (1.0, 0.9, 10), (2.0, 1.0, 0)]
)
@pytest.mark.parametrize("vocab", [50, 1500])
def test_samples_follow_the_warped_distribution(temperature, top_p, top_k, vocab):
    """Chi-square against transformers' warpers. With 1,500 near-equal tokens the nucleus outgrows the candidates."""
    torch.manual_seed(1)
    logits = torch.randn(1, vocab) * (2.0 if vocab == 50 else 0.3)
    warped = TemperatureLogitsWarper(temperature)(None, logits)
    warped = TopKLogitsWarper(top_k)(None, warped) if top_k else warped
    probs = TopPLogitsWarper(top_p)(None, warped).softmax(-1)[0].double()

    num_samples = 30_000
    drawn = torch.cat([sample_tokens(logits.expand(500, -1), temperature, top_p, top_k) for _ in range(60)])
    counts = drawn.bincount(minlength=vocab).double()
    assert counts[probs == 0].sum() == 0, "a token outside of the truncated distribution was drawn"
    kept = probs > 0
    expected = probs[kept] * num_samples
    statistic = ((counts[kept] - expected) ** 2 / expected).sum()
    degrees = int(kept.sum()) - 1
    # Wilson and Hilferty's normal approximation; 4 standard deviations, with a fixed seed
    assert statistic < degrees * (1 - 2 / (9 * degrees) + 4 * (2 / (9 * degrees)) ** 0.5) ** 3


def test_a_prompt_is_prefilled_once_and_rows_that_have_ended_are_not_computed(tiny_model, tiny_tokenizer):
    shapes = []
    tiny_model.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    prompt_ids = tiny_tokenizer(PROMPTS)["input_ids"]
    torch.manual_seed(0)
    completions = generate_completions(tiny_model, prompt_ids, list(range(20)), 24)
    lengths = [len(completion) for completion in completions]
    assert len(set(lengths)) > 2
    live = [sum(length > step for length in lengths) for step in range(1, max(lengths))]
    assert shapes == [(4, max(map(len, prompt_ids))), *((rows, 1) for rows in live)]


def test_the_cache_holds_what_the_librarys_does_and_is_copied_once_in_many_steps():
    torch.manual_seed(0)
    roomy, plain = _RoomyLayer(), DynamicLayer()
    kept = []  # a freed buffer's address may be that of the next one
    for step in range(2 * CACHE_ROOM):
        if step == CACHE_ROOM // 2:
            for layer in (roomy, plain):
                layer.batch_select_indices(torch.tensor([2, 0, 0]))
        rows, tokens = (3, 5 if step == 0 else 1)
        keys, values = torch.randn(rows, 2, tokens, 4), torch.randn(rows, 2, tokens, 6)
        for ours, theirs in zip(roomy.update(keys, values), plain.update(keys, values), strict=True):
            assert torch.equal(ours, theirs)
        assert roomy.get_seq_length() == plain.get_seq_length() == 5 + step
        kept.append(roomy.keys)
    moves = [step for step in range(1, len(kept)) if kept[step].data_ptr() != kept[step - 1].data_ptr()]
    assert moves == [CACHE_ROOM // 2, CACHE_ROOM // 2 + CACHE_ROOM + 1]


def test_seed_reproduces_samples(tiny_model, tiny_tokenizer):
    prompt_ids = tiny_tokenizer(PROMPTS)["input_ids"]

    def sample(seed):
        torch.manual_seed(seed)
        return generate_completions(tiny_model, prompt_ids, [1], 12, temperature=0.8, top_p=0.95)

    assert sample(3) == sample(3) != sample(4)
    assert sample(3)[1] != sample(3)[3], "two rows of one prompt are two samples"


def test_adapter_masters_come_back_untouched(tiny_model):
    model = get_peft_model(
        tiny_model.to(torch.bfloat16), LoraConfig(target_modules="all-linear", init_lora_weights=False)
    )
    before = {name: (p.data_ptr(), p.dtype) for name, p in model.named_parameters()}
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    with adapter_in_base_dtype(model):
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {name: (p.data_ptr(), p.dtype) for name, p in model.named_parameters()} == before
    assert all(torch.equal(p, values[name]) for name, p in model.named_parameters())
    assert {dtype for name, (_, dtype) in before.items() if "lora_" in name} == {torch.float32}


def test_a_rollout_leaves_the_hooks_by_which_ddp_averages_gradients(tiny_model, tiny_tokenizer):
    model = get_peft_model(tiny_model.to(torch.bfloat16), LoraConfig(target_modules="all-linear"))
    masters = [p for p in model.parameters() if p.requires_grad]

    def accumulators():  # DDP hooks these when it wraps a model
        return [p.view_as(p).grad_fn.next_functions[0][0] for p in masters]

    hooked = accumulators()
    generate_completions(model, tiny_tokenizer(PROMPTS)["input_ids"], [1], 2)
    assert accumulators() == hooked


def test_progress_counts_rows_that_end(tiny_model, tiny_tokenizer):
    prompt_ids = tiny_tokenizer(PROMPTS)["input_ids"]
    eos, ended = list(range(20)), []
    completions = generate_completions(tiny_model, prompt_ids, eos, 24, temperature=0, on_ended=ended.append)
    assert sum(ended) == sum(completion[-1] in eos for completion in completions) > 0
