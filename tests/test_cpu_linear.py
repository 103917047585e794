"""The fast linear layers of a CPU: the same numbers as PEFT's own, to the dtype's accuracy, and gone afterwards."""

import contextlib

import pytest
import torch
from peft import LoraConfig, get_peft_model

from trainers.adapters import adapter_in_base_dtype
from trainers.cpu.linear import lora_in_place, packed_linears

# AVX2 alone is not enough for oneDNN's bf16: there bf16 layers keep their own way, which the stages avoid by fp32
needs_bf16 = pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bf16 here")
DTYPES = [pytest.param(torch.bfloat16, marks=needs_bf16), torch.float32]


def lora_policy(tiny_model, dtype=torch.float32, **settings):
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", init_lora_weights=False, **settings)
    return get_peft_model(tiny_model.to(dtype), config)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("use_dora", [False, True])
def test_packed_linears_give_the_same_logits_and_leave_no_trace(tiny_model, use_dora, dtype):
    model = lora_policy(tiny_model, dtype, use_dora=use_dora).eval()
    input_ids = torch.randint(2, 258, (3, 20))
    forwards = {name: module.forward for name, module in model.named_modules()}
    with torch.no_grad(), adapter_in_base_dtype(model):
        plain = model(input_ids).logits
        with packed_linears(model, num_rows=3):
            changed = {name for name, module in model.named_modules() if module.forward != forwards[name]}
            fast = model(input_ids).logits
    assert "base_model.model.lm_head" in changed, "no product was packed"
    is_lora = {name: "base_layer" not in name and name.endswith("_proj") for name in changed}
    assert any(is_lora.values()) != use_dora, "plain LoRA is fused, DoRA is left to PEFT"
    # The reference is more exact, so that the dtype's own error is the measure
    with torch.no_grad():
        exact = model.double()(input_ids).logits
    assert (fast - exact).abs().max() < 1.5 * (plain - exact).abs().max()
    assert all(module.forward == forwards[name] for name, module in model.named_modules())


@pytest.mark.skipif(torch.backends.quantized.engine not in ("x86", "fbgemm"), reason="no FBGEMM here")
@pytest.mark.parametrize("largest, in_16_bits", [(1.0, True), (1e5, False)])
def test_fp32_products_read_16_bits_where_a_weight_has_no_more(tiny_model, largest, in_16_bits):
    num_products = sum(type(module) is torch.nn.Linear for module in tiny_model.modules())
    model = lora_policy(tiny_model.to(torch.bfloat16)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2 and not parameter.requires_grad:
            parameter.data[0, 0] = largest  # beyond 65,504 fp16 has no numbers
    input_ids = torch.randint(2, 258, (3, 20))
    with torch.no_grad():
        plain = model(input_ids).logits
        with packed_linears(model, num_rows=3), torch.profiler.profile() as profile:
            fast = model(input_ids).logits
        exact = model.double()(input_ids).logits
    kernels = {event.key: event.count for event in profile.key_averages()}
    assert kernels.get("quantized::linear_dynamic_fp16", 0) == (num_products if in_16_bits else 0)
    assert (fast - exact).norm() < 2 * (plain - exact).norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", ["none", "lora_only"])
def test_lora_in_place_gives_the_same_outputs_and_gradients(tiny_model, bias, dtype):
    model = lora_policy(tiny_model, dtype, bias=bias)
    input_ids = torch.randint(2, 258, (3, 20))
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]

    def run(context):
        model.zero_grad()
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=model.dtype == torch.bfloat16)
        with autocast, context(model):
            logits = model(input_ids).logits
        logits.float().log_softmax(-1)[..., 7].sum().backward()
        return [logits.detach().double(), *(model.get_parameter(name).grad.double() for name in names)]

    plain, fast = run(contextlib.nullcontext), run(lora_in_place)
    assert not all(torch.equal(a, b) for a, b in zip(plain, fast, strict=True)), "the fast way was not taken"
    model.double()
    for a, b, exact in zip(plain, fast, run(contextlib.nullcontext), strict=True):
        # fp32's own error is so small that its noise is compared; 1e-6 of the value is above it
        assert (b - exact).norm() < 1.5 * (a - exact).norm() + 1e-6 * exact.norm()


@pytest.mark.parametrize("settings, is_fast", [({}, True), ({"lora_dropout": 0.1}, False), ({"use_dora": True}, False)])
def test_lora_in_place_leaves_the_rest_to_peft(tiny_model, settings, is_fast):
    model = lora_policy(tiny_model, **settings).train()
    forwards = {name: module.forward for name, module in model.named_modules()}

    def changed():
        return {name for name, module in model.named_modules() if module.forward != forwards[name]}

    with lora_in_place(model):
        assert bool(changed()) == is_fast
    assert not changed()
    with model.disable_adapter(), lora_in_place(model):
        assert not changed(), "without its adapter a layer is the base's"
