"""Rollouts on a GPU: a captured step draws what the step without the graph does, and serves the whole run."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from trainers import ReinforceConfig, ReinforceTrainer, generate_completions
from trainers.rollout import graph
from trainers.rollout.graph import graph_completions

PROMPTS = ["def f(x):", "a", "import os\n\ndef longer_name(a, b):\n", "a", "zz = 3"]
MANY_EOS = list(range(20))  # so that rows end at different steps
ADAPTER = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible")


@pytest.fixture
def prompt_ids(tiny_tokenizer):
    return tiny_tokenizer(PROMPTS)["input_ids"]


@pytest.fixture(params=["bf16", "nf4"])
def policy(request, tiny_folder):
    """An fp32 adapter on a base in bf16 or NF4."""
    if request.param == "nf4":
        pytest.importorskip("bitsandbytes")
        nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
        base = AutoModelForCausalLM.from_pretrained(
            tiny_folder, dtype=torch.bfloat16, quantization_config=nf4, device_map={"": 0}
        )
    else:
        base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.bfloat16).cuda()
    return get_peft_model(base, ADAPTER).eval()


@torch.no_grad()
def test_a_graph_draws_the_tokens_of_the_step_without_it_as_the_adapter_learns(policy, prompt_ids):
    masters = [p for name, p in policy.named_parameters() if "lora_" in name]
    arguments = (policy, prompt_ids, MANY_EOS, 40, 0.0)
    outputs, steps = [], []
    for _ in range(3):
        before = [p.clone() for p in masters]
        outputs.append(generate_completions(*arguments))
        steps.append([step for step in graph._KEPT[policy.get_base_model()].steps.values() if step.graph is not None])
        assert outputs[-1] == graph_completions(*arguments, use_graph=False)
        for parameter, values in zip(masters, before, strict=True):
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, values)
            parameter.add_(torch.randn_like(parameter))  # an optimizer's step
    assert len({len(completion) for completion in outputs[0]}) > 2
    assert outputs[0] != outputs[1] != outputs[2]
    assert len(steps[0]) == 1
    assert steps[0] == steps[1] == steps[2], "the step was captured again"


@torch.no_grad()
def test_a_seed_reproduces_samples_whether_or_not_the_step_is_captured_yet(policy, prompt_ids):
    def sample(seed):
        torch.manual_seed(seed)
        return generate_completions(policy, prompt_ids, [1], 40, temperature=0.8, top_p=0.95)

    first = sample(3)
    assert first == sample(3) != sample(4)
    assert first[1] != first[3], "two rows of one prompt are two samples"


@torch.no_grad()
@pytest.mark.parametrize("top_p, top_k", [(0.95, 0), (0.5, 0), (1.0, 20), (1.0, 0)])
def test_what_a_graph_samples_follows_the_distribution(tiny_model, top_p, top_k):
    """The frequencies of a graph's tokens and of the same number from the step without it, by chi-square."""
    model = tiny_model.cuda().eval()
    model.model.embed_tokens.weight.copy_(torch.randn(32))  # one for all tokens: the logits are always the same
    counts = []
    torch.manual_seed(0)
    for use_graph in (True, False):
        drawn = graph_completions(model, [[5]] * 512, [], 128, 1.0, top_p, top_k, use_graph=use_graph)
        counts.append(torch.tensor(drawn).flatten().bincount(minlength=258).double())
    often = counts[0] + counts[1] >= 10
    statistic = ((counts[0] - counts[1]) ** 2 / (counts[0] + counts[1]))[often].sum()
    degrees = int(often.sum())
    # Wilson and Hilferty's normal approximation; 4 standard deviations, with a fixed seed
    assert statistic < degrees * (1 - 2 / (9 * degrees) + 4 * (2 / (9 * degrees)) ** 0.5) ** 3


@torch.no_grad()
def test_a_step_that_waits_for_the_gpu_runs_without_a_graph(tiny_model, prompt_ids):
    model = tiny_model.cuda().eval()
    arguments = (model, prompt_ids, MANY_EOS, 40, 0.0)
    expected = generate_completions(*arguments)
    graph._KEPT.clear()

    def wait(module, inputs):
        inputs[0].sum().item()

    model.model.norm.register_forward_pre_hook(wait)
    assert generate_completions(*arguments) == expected
    assert [step.graph for step in graph._KEPT[model].steps.values()] == [None]
    assert len(generate_completions(model, prompt_ids, [], 40, 0.8, 0.95)[0]) == 40, "samples are drawn as before"


@torch.no_grad()
def test_rows_are_split_where_memory_is_short(tiny_model, prompt_ids, monkeypatch):
    model = tiny_model.cuda().eval()
    expected = generate_completions(model, prompt_ids, MANY_EOS, 40, temperature=0)
    graph._KEPT.clear()
    row = graph.bytes_per_row(model.config, torch.float32, graph.LENGTH_MULTIPLE)
    monkeypatch.setattr(graph, "free_memory", lambda device: 3 * row)
    assert generate_completions(model, prompt_ids, MANY_EOS, 40, temperature=0) == expected
    assert not graph._KEPT[model].steps


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {
            "use_transformers_continuous_batching": True,
            "transformers_continuous_batching_config": {"num_blocks": 16, "max_batch_tokens": 256},
        },
    ],
    ids=["graph", "continuous_batching"],
)
def test_training_leaves_the_adapter_in_fp32(tmp_path, tiny_folder, tiny_tokenizer, settings):
    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.bfloat16)
    model = get_peft_model(base, ADAPTER)
    trainer = ReinforceTrainer(
        model,
        lambda completions, **kwargs: [float(len(completion)) for completion in completions],
        ReinforceConfig(
            str(tmp_path),
            per_device_train_batch_size=4,
            max_completion_length=6,
            max_steps=3,
            bf16=True,
            report_to="none",
            save_strategy="no",
            **settings,
        ),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS[:4]}),
        processing_class=tiny_tokenizer,
    )
    rollouts, rollout = [], trainer._generate_single_turn

    def checked(*args):
        before = [(p.dtype, p.detach().clone()) for p in model.parameters()]
        rollouts.append(rollout(*args))
        for parameter, (dtype, values) in zip(model.parameters(), before, strict=True):
            assert parameter.dtype == dtype and torch.equal(parameter, values)
        return rollouts[-1]

    trainer._generate_single_turn = checked
    trainer.train()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert [len(completions) for completions in rollouts] == [4, 4, 4]
    if not settings:
        (step,) = graph._KEPT[base].steps.values()
        assert step.graph is not None
