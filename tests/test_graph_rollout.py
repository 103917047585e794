"""The decoding loop for CUDA, its step without the graph: the other loops' tokens, and buffers that stay in place."""

import logging
from contextlib import contextmanager, nullcontext
from unittest.mock import Mock

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from trainers import generate_completions
from trainers.device import decoding_loop
from trainers.rollout import generate, graph
from trainers.rollout.eager import eager_completions
from trainers.rollout.graph import TokenStep, graph_completions, why_not_covered
from trainers.rollout.sampling import sample_tokens

PROMPTS = ["def f(x):", "a", "import os\n\ndef longer_name(a, b):\n", "a", "zz = 3"]
MANY_EOS = list(range(20))  # so that rows end at different steps


@pytest.fixture(autouse=True)
def no_gradient():
    with torch.no_grad():
        yield


@pytest.fixture
def prompt_ids(tiny_tokenizer):
    return tiny_tokenizer(PROMPTS)["input_ids"]


def with_adapter(model):
    """An fp64 adapter on an fp32 base, for an fp32 one on a bf16 base, where the loops round differently."""
    model = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.double()
    return model


def steps_of(model):
    return graph._KEPT[model].steps


@pytest.fixture
def memory_of_two_rows(monkeypatch, tiny_model):
    row = graph.bytes_per_row(tiny_model.config, torch.float32, graph.LENGTH_MULTIPLE)
    monkeypatch.setattr(graph, "free_memory", lambda device: 3 * row)  # four fifths of which are two rows


def test_greedy_tokens_are_the_eager_loops_and_transformers(tiny_model, prompt_ids):
    tiny_model.eval()
    completions = graph_completions(tiny_model, prompt_ids, MANY_EOS, 24, temperature=0)
    assert completions == eager_completions(tiny_model, prompt_ids, MANY_EOS, 24, temperature=0)
    for ids, completion in zip(prompt_ids, completions, strict=True):
        config = GenerationConfig(max_new_tokens=24, do_sample=False, eos_token_id=MANY_EOS, pad_token_id=0)
        assert completion == tiny_model.generate(torch.tensor([ids]), config)[0, len(ids) :].tolist()
    assert len({len(completion) for completion in completions}) > 2


@pytest.mark.parametrize(
    "settings",
    [
        {"model_type": "llama", "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e5}},
        {"model_type": "granite", "logits_scaling": 3.0},
        {"model_type": "gpt2"},
    ],
    ids=lambda settings: settings["model_type"],
)
def test_greedy_tokens_of_other_architectures_are_transformers(settings, prompt_ids):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        **settings,
        vocab_size=258,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    assert why_not_covered(model) is None
    arguments = (model, prompt_ids, MANY_EOS, 24, 0.0, 1.0, 0)
    assert graph_completions(*arguments) == generate._transformers_completions(*arguments, on_ended=None)


def test_the_present_adapter_is_computed_and_its_masters_are_untouched(tiny_model, prompt_ids):
    model = with_adapter(tiny_model)
    arguments = (model, prompt_ids, MANY_EOS, 24, 0.0)
    masters = {name: p for name, p in model.named_parameters() if "lora_" in name}
    outputs, places = [], []
    for _ in range(3):
        before = {name: (p.data_ptr(), p.dtype, p.clone()) for name, p in masters.items()}
        outputs.append(graph_completions(*arguments))
        assert outputs[-1] == eager_completions(*arguments)
        for name, (place, dtype, values) in before.items():
            assert (masters[name].data_ptr(), masters[name].dtype) == (place, dtype)
            assert torch.equal(masters[name], values)
        (step,) = steps_of(tiny_model).values()
        copies = graph._KEPT[tiny_model].copies
        assert {copy.dtype for copy in copies.values()} == {torch.float32}
        places.append([step.cache.layers[0].keys.data_ptr(), *(copies[p].data_ptr() for p in masters.values())])
        for parameter in masters.values():  # an optimizer's step
            parameter.add_(torch.randn_like(parameter))
    assert places[0] == places[1] == places[2]
    assert outputs[0] != outputs[1] != outputs[2]


def test_a_step_is_captured_anew_where_weights_moved_or_the_adapter_is_off(tiny_model, prompt_ids):
    model = with_adapter(tiny_model)
    arguments = (model, prompt_ids, MANY_EOS, 24, 0.0)
    graph_completions(*arguments)
    (first,) = steps_of(tiny_model).values()
    head = tiny_model.get_output_embeddings()
    head.weight.data = -head.weight.data
    assert graph_completions(*arguments) == eager_completions(*arguments)
    (second,) = steps_of(tiny_model).values()
    with model.disable_adapter():
        assert graph_completions(*arguments) == eager_completions(*arguments)
        (third,) = steps_of(tiny_model).values()
    assert len({first, second, third}) == 3


def test_prompts_are_prefilled_once_in_forwards_of_limited_size(tiny_model, prompt_ids, monkeypatch):
    shapes = []
    tiny_model.eval().model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    expected = eager_completions(tiny_model, prompt_ids, MANY_EOS, 3, temperature=0)
    longest = max(map(len, prompt_ids))
    monkeypatch.setattr(graph, "PREFILL_TOKENS", 3 * longest)
    shapes.clear()
    assert graph_completions(tiny_model, prompt_ids, MANY_EOS, 3, temperature=0) == expected
    shortest_three = sorted(map(len, prompt_ids))[1:4]  # "a" is there twice
    assert shapes == [(8, 1), (3, shortest_three[-1]), (1, longest), (8, 1), (8, 1)]  # the first allocates the cache


def test_rows_are_split_where_memory_is_short(tiny_model, prompt_ids, memory_of_two_rows):
    tiny_model.eval()
    expected = eager_completions(tiny_model, prompt_ids, MANY_EOS, 24, temperature=0)
    rows = []
    tiny_model.model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    assert graph_completions(tiny_model, prompt_ids, MANY_EOS, 24, temperature=0) == expected
    assert set(rows) == {1, 2}
    assert not steps_of(tiny_model), "a step that takes most of the free memory stays"


def test_bytes_of_a_row_are_those_of_its_keys_and_values(tiny_model, prompt_ids):
    tiny_model.eval()
    graph_completions(tiny_model, prompt_ids, MANY_EOS, 3, temperature=0)
    (step,) = steps_of(tiny_model).values()
    cached = sum(layer.keys.nbytes + layer.values.nbytes for layer in step.cache.layers)
    vocabulary = 8 * graph.SAMPLING_BYTES * tiny_model.config.vocab_size
    assert step.num_bytes == cached + vocabulary
    assert cached == 8 * 256 * (2 * 2 * 2 * 8 * 4)  # rows, length, K and V of 2 layers, 2 heads of 8, fp32


def test_a_seed_reproduces_samples_whether_or_not_the_step_exists(tiny_model, prompt_ids):
    tiny_model.eval()

    def sample(seed):
        torch.manual_seed(seed)
        return graph_completions(tiny_model, prompt_ids, [1], 12, temperature=0.8, top_p=0.95)

    first = sample(3)
    assert first == sample(3) != sample(4)
    assert first[1] != first[3], "two rows of one prompt are two samples"


def test_a_nan_of_an_earlier_rollout_is_forgotten(tiny_model, prompt_ids):
    arguments = (tiny_model.eval(), prompt_ids, MANY_EOS, 24, 0.0)
    expected = graph_completions(*arguments)
    (step,) = steps_of(tiny_model).values()
    for layer in step.cache.layers:
        layer.keys.fill_(torch.nan)
        layer.values.fill_(torch.nan)
    assert graph_completions(*arguments) == expected


@pytest.fixture
def pretended_graphs(monkeypatch, tiny_model):
    """What `torch.cuda` has for graphs. A replay runs the step; `modes` are those of synchronizing operations."""

    class Graph:
        modes, num_replays = ["default"], 0

        def replay(self):
            Graph.num_replays += 1
            (step,) = steps_of(tiny_model).values()
            step.run(tiny_model)

    for name, value in {
        "Stream": Mock(),
        "current_stream": Mock(),
        "stream": lambda stream: nullcontext(),
        "get_sync_debug_mode": lambda: Graph.modes[-1],
        "set_sync_debug_mode": Graph.modes.append,
        "CUDAGraph": Graph,
        "graph": lambda graph, capture_error_mode: nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return Graph


def test_a_captured_step_is_replayed(tiny_model, prompt_ids, pretended_graphs):
    arguments = (tiny_model.eval(), prompt_ids, MANY_EOS, 24, 0.0)
    expected = eager_completions(*arguments)
    for rollout in (1, 2):
        assert graph_completions(*arguments, use_graph=True) == expected
        assert pretended_graphs.num_replays == rollout * (max(map(len, expected)) - 1)
    assert pretended_graphs.modes == ["default", "error", "default"]


def test_a_step_that_waits_for_the_device_runs_without_a_graph(tiny_model, prompt_ids, pretended_graphs, caplog):
    def wait(*args):
        if pretended_graphs.modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    tiny_model.eval().model.norm.register_forward_pre_hook(wait)
    samples = []
    for use_graph in (False, True, True):
        torch.manual_seed(3)
        samples.append(graph_completions(tiny_model, prompt_ids, [1], 12, 0.8, 0.95, use_graph=use_graph))
    assert samples[0] == samples[1] == samples[2]
    assert pretended_graphs.num_replays == 0 and pretended_graphs.modes == ["default", "error", "default"]
    assert [record.getMessage() for record in caplog.records if record.name.startswith("trainers")] == [
        "the token step of qwen2 runs without a CUDA graph, which is slower: called a synchronizing CUDA operation"
    ]


def test_a_failed_capture_names_the_way_without(tiny_model, prompt_ids, pretended_graphs, monkeypatch):
    @contextmanager
    def invalidated(graph, capture_error_mode):
        yield
        raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "graph", invalidated)
    with pytest.raises(RuntimeError, match="previous error during capture. Training .* cache_implementation to 'dyna"):
        graph_completions(tiny_model.eval(), prompt_ids, [1], 12, use_graph=True)
    assert not steps_of(tiny_model)


def test_progress_counts_rows_that_end(tiny_model, prompt_ids):
    ended = []
    tiny_model.eval()
    completions = graph_completions(tiny_model, prompt_ids, MANY_EOS, 40, temperature=0, on_ended=ended.append)
    assert sum(ended) == sum(completion[-1] in MANY_EOS for completion in completions)
    assert len(ended) == -(-max(map(len, completions)) // graph.CHECK_EVERY)


@pytest.mark.parametrize(
    "temperature, top_p, top_k", [(0.8, 0.95, 0), (1.3, 0.5, 0), (0.7, 1.0, 20), (1.0, 0.9, 10), (2.0, 1.0, 0)]
)
@pytest.mark.parametrize("vocab", [50, 1500])
def test_the_steps_samples_follow_the_warped_distribution(temperature, top_p, top_k, vocab):
    """Chi-square against transformers' warpers. Half of the logits are equal in pairs, as happens in bf16."""
    torch.manual_seed(1)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=vocab,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    ).eval()
    # One embedding for all tokens: the logits are the same after any of them
    model.model.embed_tokens.weight.copy_(torch.randn(16))
    model.lm_head.weight.normal_(std=0.5 if vocab == 50 else 0.1)
    if not top_k:  # of which transformers keeps more than k if several are equally likely
        model.lm_head.weight[: vocab // 4] = model.lm_head.weight[vocab // 4 : vocab // 4 * 2]
    logits = model(torch.tensor([[0]])).logits[:, -1]
    warped = TemperatureLogitsWarper(temperature)(None, logits)
    warped = TopKLogitsWarper(top_k)(None, warped) if top_k else warped
    probs = TopPLogitsWarper(top_p)(None, warped).softmax(-1)[0].double()

    step = TokenStep(model, 512, graph.LENGTH_MULTIPLE, (), (temperature, top_p, top_k), use_graph=False)
    step.prefill(model, [[0]] * 512)
    drawn = torch.tensor(step.decode(model, 20, None))
    # Equally likely tokens may stand in for each other at the edge of the nucleus: counted by probability
    values, group = logits[0].unique(return_inverse=True)
    counts = group[drawn.flatten()].bincount(minlength=len(values)).double()
    expected = torch.zeros_like(counts).index_add_(0, group, probs) * drawn.numel()
    assert counts[expected == 0].sum() == 0, "a token outside of the truncated distribution was drawn"
    kept = expected > 0
    statistic = ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    degrees = int(kept.sum()) - 1
    # Wilson and Hilferty's normal approximation; 4 standard deviations, with a fixed seed
    assert statistic < degrees * (1 - 2 / (9 * degrees) + 4 * (2 / (9 * degrees)) ** 0.5) ** 3


def test_a_nucleus_in_a_graph_takes_as_many_of_equally_likely_tokens_as_it_needs():
    logits = torch.tensor([[0.4, 0.2, 0.2, 0.2, 0.0]]).log()
    torch.manual_seed(0)
    for top_p, expected in ((0.3, {0}), (0.5, {0, 1}), (0.7, {0, 1, 2}), (0.9, {0, 1, 2, 3}), (0.999999, {0, 1, 2, 3})):
        drawn = sample_tokens(logits.expand(2000, -1), top_p=top_p, in_graph=True)
        assert set(drawn.tolist()) == expected


def test_each_device_has_its_loop():
    assert decoding_loop(torch.device("cpu")) == ("eager", None)
    assert decoding_loop(torch.device("cuda")) == ("graph", None)
    assert decoding_loop(torch.device("mps")) == ("transformers", "there is no loop for mps here")


@pytest.fixture
def pretended_device(monkeypatch, caplog):
    """Let the model's device be taken for another one; the loop without the graph computes on the CPU nevertheless."""
    generate._warn_once.cache_clear()
    caplog.set_level(logging.WARNING)

    def pretend(name):
        monkeypatch.setattr(generate, "decoding_loop", lambda device: decoding_loop(torch.device(name)))

    return pretend


def test_a_gpu_decodes_with_the_graphs_loop(tiny_model, prompt_ids, pretended_device, caplog):
    model = with_adapter(tiny_model).train()
    expected = generate_completions(model, prompt_ids, MANY_EOS, 24, temperature=0)
    assert tiny_model not in graph._KEPT
    pretended_device("cuda")
    assert generate_completions(model, prompt_ids, MANY_EOS, 24, temperature=0) == expected
    assert len(steps_of(tiny_model)) == 1
    assert all(module.training for module in model.modules())
    assert not caplog.records


def test_another_accelerator_decodes_with_transformers_and_says_so_once(
    tiny_model, prompt_ids, pretended_device, caplog
):
    # What a chat model's generation_config.json says must not reach a rollout
    tiny_model.generation_config.update(repetition_penalty=1.8, top_k=3, do_sample=True, min_new_tokens=20)
    models_own = tiny_model.generation_config.to_dict()
    expected = generate_completions(tiny_model, prompt_ids, MANY_EOS, 24, temperature=0)
    pretended_device("mps")
    ended = []
    for _ in range(2):
        assert generate_completions(tiny_model, prompt_ids, MANY_EOS, 24, 0.0, on_ended=ended.append) == expected
    assert sum(ended) == 2 * sum(completion[-1] in MANY_EOS for completion in expected)
    assert tiny_model.generation_config.to_dict() == models_own
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("trainers")]
    assert ours == [
        "qwen2 decodes with transformers' `generate`, which is slower: there is no loop for mps here",
    ]


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({"model_type": "mistral", "sliding_window": 8}, "its cache has other layers than those of full attention"),
        ({"model_type": "qwen2", "attn_implementation": "eager"}, "its attention is 'eager'"),
        (
            {"model_type": "llama", "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "its rotary embedding of type 'dynamic' depends on the length",
        ),
    ],
)
def test_models_that_the_loop_does_not_cover_decode_with_transformers(
    settings, reason, prompt_ids, pretended_device, caplog
):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(**settings, **sizes, num_key_value_heads=2, vocab_size=258, initializer_range=0.3)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=settings.get("attn_implementation"))
    expected = generate_completions(model, prompt_ids, MANY_EOS, 24, temperature=0)
    pretended_device("cuda")
    assert generate_completions(model, prompt_ids, MANY_EOS, 24, temperature=0) == expected
    (message,) = {record.getMessage() for record in caplog.records if record.name.startswith("trainers")}
    assert message.startswith(
        f"{settings['model_type']} decodes with transformers' `generate`, which is slower: {reason}"
    )
