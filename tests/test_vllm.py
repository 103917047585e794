"""What vLLM is given, and what its log-probabilities are used for. A recorder stands in the place of its server."""

import math

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import BitsAndBytesConfig
from trl.generation.vllm_generation import VLLMGeneration

from trainers import PPOClipTrainer, ReinforceTrainer
from trainers.vllm import MergedVLLM, correct_for_sampler


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


def test_losses_are_multiplied_by_the_ratios_of_whole_completions():
    sampler = torch.tensor([[-1.5, -2.0, -9.0], [-1.0, -0.5, math.nan], [-2.0, -2.0, 0.0]])
    inputs = {
        "advantages": torch.tensor([2.0, -1.0, 0.5]),
        "completion_mask": torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 0]]),
        "sampling_per_token_logps": sampler,
    }
    policy = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -1.0, -1.0], [-1.0, -1.0, -1.0]])
    logged = correct_for_sampler(inputs, policy, clip_max=3.0)
    ratios = [math.exp(0.5), math.exp(-0.5), 3.0]  # the last would be e^2
    assert inputs["advantages"].tolist() == pytest.approx([2 * ratios[0], -ratios[1], 0.5 * ratios[2]])
    assert {name.rpartition("/")[2]: value.item() for name, value in logged.items()} == pytest.approx(
        {"min": ratios[1], "mean": sum(ratios) / 3, "max": 3.0}
    )
    assert "sampling_per_token_logps" not in inputs, "later epochs have the corrected advantages"

    with_old = {
        "advantages": torch.ones(1),
        "completion_mask": torch.ones(1, 2),
        "old_per_token_logps": torch.tensor([[-1.0, -1.0]]),
        "sampling_per_token_logps": torch.tensor([[-1.5, -1.0]]),
    }
    correct_for_sampler(with_old, torch.tensor([[-9.0, -9.0]]), clip_max=3.0)
    assert with_old["advantages"].tolist() == pytest.approx([math.exp(0.5)]), "the rollout's policy counts"


@pytest.mark.parametrize("trainer_class", [ReinforceTrainer, PPOClipTrainer])
def test_a_run_with_vllm(tmp_path, tiny_model, server, trainer_class):
    ratios = []

    class Trainer(trainer_class):
        def policy_loss(self, per_token_logps, inputs):
            ratios.append((inputs["advantages"] / inputs["uncorrected"]).tolist())
            logps = (per_token_logps.detach() * inputs["completion_mask"]).sum(1) - per_token_logps.detach()[:, 1]
            expected.append((logps + 1.5).exp().clamp(max=3.0).tolist())  # the second token's is not known
            return super().policy_loss(per_token_logps, inputs)

        def _roll_out(self, tasks):
            rollout = super()._roll_out(tasks)
            return rollout | {"uncorrected": rollout["advantages"]}

    expected = []
    config = Trainer.config_class(
        str(tmp_path),
        per_device_train_batch_size=4,
        max_completion_length=6,
        max_steps=4,
        learning_rate=1e-2,
        temperature=0.8,
        use_vllm=True,
        vllm_mode="server",
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
    )
    tasks = Dataset.from_dict({"prompt": ["def f(x):\n", "a = 1\n", "import re\n", "b"]})
    trainer = Trainer(
        tiny_model.to(torch.bfloat16),
        lambda completions, **kwargs: [float(i) + 1 for i in range(len(completions))],
        config,
        train_dataset=tasks,
        eval_dataset=tasks,
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "lora_" not in name}
    trainer.train()
    trainer.evaluate()

    rollouts = 4 // config.num_iterations
    assert [asked["temperature"] for asked in server.asked] == [0.8] * rollouts + [0.0]
    assert all(torch.equal(trainer.model.get_parameter(name), value) for name, value in before.items())
    assert ratios[4] == [1.0] * 4, "an evaluation is not corrected"
    first_epochs = slice(None, 4, config.num_iterations)
    for found, wanted in zip(ratios[first_epochs], expected[first_epochs], strict=True):
        assert found == pytest.approx(wanted, rel=1e-3)
    assert all(ratios[i] == ratios[i - i % config.num_iterations] for i in range(4)), "one ratio a rollout"
    logged = [
        log["sampling/importance_sampling_ratio/max"] for log in trainer.state.log_history[: 4 : config.num_iterations]
    ]
    assert logged == pytest.approx([max(found) for found in ratios[first_epochs]], rel=1e-3)


def test_a_quantized_base_is_refused(tmp_path, tiny_folder):
    config = ReinforceTrainer.config_class(str(tmp_path), use_vllm=True, bf16=False, use_cpu=True)
    with pytest.raises(ValueError, match="vLLM cannot serve a 4-bit base in training"):
        ReinforceTrainer(str(tiny_folder), print, config, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
