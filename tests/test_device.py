"""Where a run computes, on machines that this one is not: the accelerator is a pretended one."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from trl.trainer.utils import add_fused_lm_head

from trainers import run_device, supports_bf16, use_fast_log_probs
from trainers.device import fast_linears, training_dtype


@pytest.fixture
def pretended_gpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)


def test_a_run_computes_on_the_accelerator_if_there_is_one(pretended_gpu):
    assert run_device() == torch.device("cuda")


def test_a_run_computes_on_the_cpu_if_it_is_told_to(pretended_gpu, monkeypatch):
    assert run_device(use_cpu=True) == torch.device("cpu")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # what a launch with cpu.yaml sets
    assert run_device() == torch.device("cpu")


def test_a_machine_without_accelerator_computes_on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert run_device() == torch.device("cpu")


@pytest.mark.parametrize(
    "capabilities, expected",
    [({"avx512_bf16": True}, True), ({"avx512_bf16": False, "avx2": True}, False), ({}, False)],
)
def test_bf16_on_a_cpu_needs_its_instructions(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert supports_bf16(torch.device("cpu")) is expected


@pytest.mark.parametrize("in_hardware", [True, False])
def test_bf16_on_a_gpu_does_not_count_emulation(monkeypatch, in_hardware):
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: in_hardware or including_emulation
    )
    assert supports_bf16(torch.device("cuda")) is in_hardware


def test_a_gpu_has_trls_log_probabilities_without_a_cast_of_the_activations(tiny_model, monkeypatch):
    """Autocast is the CPU's here; the code under test asks for that of the GPU."""
    is_autocast = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: is_autocast("cpu"))
    add_fused_lm_head(tiny_model.to(torch.bfloat16))
    model = get_peft_model(tiny_model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    ids = torch.tensor([[5, 6, 7]])
    seen = set()
    for name, module in model.named_modules():
        if name.endswith("lora_A.default"):
            assert module.weight.dtype == torch.float32
            module.register_forward_pre_hook(lambda module, inputs: seen.add(inputs[0].dtype))

    def log_probs(autocast=True):
        seen.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, fused_lm_head=True).log_probs

    expected = log_probs()
    assert seen == {torch.float32}
    torch.backends.cuda.enable_cudnn_sdp(True)
    use_fast_log_probs(model, torch.device("cuda"))
    assert not torch.backends.cuda.cudnn_sdp_enabled(), "its gradients may be NaN"
    assert torch.equal(log_probs(), expected) and seen == {torch.bfloat16}
    log_probs(autocast=False)
    assert seen == {torch.float32}, "without autocast an fp32 adapter needs the cast"


def test_a_cpu_has_log_probabilities_of_its_own(tiny_model):
    add_fused_lm_head(tiny_model)
    tiny_model.requires_grad_(False)
    num_rows, ids = [], torch.tensor([[5, 6, 7, 8], [5, 6, 9, 8]])
    tiny_model.model.register_forward_pre_hook(
        lambda module, args, kwargs: num_rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    use_fast_log_probs(tiny_model, torch.device("cpu"))
    labels = ids.clone()
    labels[:, :2] = -100  # the prompt
    tiny_model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, fused_lm_head=True)
    assert num_rows == [1], "the batch is packed into one row"


@pytest.mark.parametrize(
    "device, in_hardware, expected",
    [
        ("cuda", True, torch.bfloat16),
        ("cuda", False, torch.float16),
        ("cpu", True, torch.bfloat16),
        ("cpu", False, torch.float32),
    ],
)
def test_training_dtype_is_the_fastest_of_the_device(monkeypatch, device, in_hardware, expected):
    monkeypatch.setattr("trainers.device.supports_bf16", lambda device: in_hardware)
    assert training_dtype(torch.device(device)) == expected


def test_without_the_private_operators_of_torch_layers_run_as_they_are(tiny_model, monkeypatch):
    model = get_peft_model(tiny_model, LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()
    monkeypatch.setattr("trainers.cpu.linear._has_operators", lambda namespace, *names: False)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = model(ids).logits
        with fast_linears(model, 1):
            assert not any("forward" in vars(module) for module in model.modules() if module is not tiny_model)
            assert torch.equal(model(ids).logits, expected)
