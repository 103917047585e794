"""What vLLM is given, and what its log-probabilities are used for. A recorder stands in the place of its server."""

import math

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from trl.generation.vllm_generation import VLLMGeneration

from trainers.vllm import MergedVLLM, importance_ratios


class Server:
    """A vLLM server as TRL's client sees it: it keeps the weights, and completes every prompt with `[5, 6, 1]`."""

    def __init__(self):
        self.weights, self.metadata, self.asked = {}, [], []

    def update_named_params(self, metadata, named_params):
        self.metadata = metadata
        self.weights = {name: value.clone() for name, value in named_params}

    def reset_prefix_cache(self):
        pass

    def generate(self, prompts, features, n, **sampling):
        self.asked.append(sampling)
        count = len(prompts) * n
        logps = [[[-1.0], [None], [-0.5]]] * count if sampling["logprobs"] == 0 else None
        return {"prompt_ids": prompts, "completion_ids": [[5, 6, 1]] * count, "logprobs": logps}


@pytest.fixture
def server(monkeypatch):
    server = Server()
    monkeypatch.setattr(VLLMGeneration, "_init_vllm", lambda self: setattr(self, "vllm_client", server))
    return server


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"lora_bias": True}, {"modules_to_save": ["lm_head"]}])
def test_vllm_gets_the_merged_weights_and_the_base_stays_as_it_is(tiny_model, server, dtype, settings):
    torch.manual_seed(0)
    targets = ["q_proj", "down_proj"] if "lora_bias" not in settings else ["q_proj"]  # the layers that have a bias
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **settings)
    model = get_peft_model(tiny_model.to(dtype), config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    data = {name: p.data_ptr() for name, p in model.named_parameters()}
    tokens = torch.arange(12).view(1, -1)
    logits = model(tokens).logits

    generation = VLLMGeneration(model, Accelerator(cpu=True), None, mode="server")
    MergedVLLM.adopt(generation, with_logps=True)
    generation.sync_weights()

    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert {name: p.data_ptr() for name, p in after.items()} == data
    assert torch.equal(model(tokens).logits, logits)

    merged = model.merge_and_unload(safe_merge=True)
    expected = dict(merged.named_parameters())
    assert sorted(server.weights) == sorted(expected)
    assert all(torch.equal(server.weights[name], value) for name, value in expected.items())
    assert server.metadata == [
        (name, str(value.dtype).removeprefix("torch."), list(value.shape)) for name, value in server.weights.items()
    ]


def test_every_sync_has_the_weights_of_its_step(tiny_model, server):
    model = get_peft_model(tiny_model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    generation = VLLMGeneration(model, Accelerator(cpu=True), None, mode="server")
    MergedVLLM.adopt(generation, with_logps=False)
    generation.sync_weights()
    first = server.weights
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.lora_B["default"].weight.data *= 2
    generation.sync_weights()
    name, base = "model.layers.0.self_attn.q_proj.weight", layer.base_layer.weight
    assert torch.allclose(server.weights[name] - base, 2 * (first[name] - base), atol=1e-6)


def test_log_probabilities_are_those_of_the_completions(tiny_model, server):
    generation = VLLMGeneration(tiny_model, Accelerator(cpu=True), None, mode="server")
    MergedVLLM.adopt(generation, with_logps=True)
    generation.generate([[7], [8]], None, num_generations=1)
    assert generation.sampling_logps == [[-1.0, pytest.approx(math.nan, nan_ok=True), -0.5]] * 2
    MergedVLLM.adopt(generation, with_logps=False)
    generation.generate([[7], [8]], None, num_generations=1)
    assert generation.sampling_logps is None


def test_ratios_are_those_of_whole_completions():
    policy = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -1.0, -1.0], [-1.0, -1.0, -1.0]])
    sampler = torch.tensor([[-1.5, -2.0, -9.0], [-1.0, -0.5, math.nan], [-2.0, -2.0, 0.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 0]])
    ratios = importance_ratios(policy, sampler, mask, clip_max=3.0)
    assert ratios.tolist() == pytest.approx([math.exp(0.5), math.exp(-0.5), 3.0])  # the last would be e^2
