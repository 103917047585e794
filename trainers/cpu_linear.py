"""
Linear layers on a CPU: the same products, in the memory layout and the number of steps that suit them.

In a rollout a token-step multiplies a handful of rows by every weight of the model. oneDNN reads weights that were packed
for it a third faster than plain ones (8 rows of an 0.5B model on two cores: 46 ms a step against 65), and of what PEFT
does around a LoRA layer (a cast, a dropout, two products, a scaling, a sum) one small product is left. A model that is
computed in fp32 because the processor has no bf16 instructions still has weights of 16 bits: FBGEMM reads them as such
and computes in fp32 (8 rows with AVX2: 87 ms a step, oneDNN 130, plain 270). Packed copies live only as long as the
rollout. In training the adapter's product is added to the base's in place, where PEFT makes, scales and sums whole
activations. Not covered: other dtypes than bf16 and fp32, and other adapters than plain LoRA; they keep their own way.
"""

import functools
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from peft.tuners import lora
from torch import nn


@contextmanager
def fast_linears(model: nn.Module, num_rows: int):
    """
    Within, a model without gradient runs its linear layers the fast way where there is one.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The policy, in eval mode, its adapter in the dtype of its base.
        num_rows (`int`):
            About how many rows a product will have.
    """
    makers, called = {}, set()
    for layer in model.modules():
        if _is_plain_lora(layer) and _lora_dtype(layer) == layer.get_base_layer().weight.dtype:
            makers[layer] = functools.partial(_packed_lora, layer, num_rows)
            called.add(layer.get_base_layer())
        elif type(layer) is nn.Linear and layer not in called and _is_for_onednn(layer.weight):
            makers[layer] = functools.partial(_packed_linear, layer.weight, layer.bias, num_rows)
    # FBGEMM packs a weight with one thread; the LM head, by far the largest, comes first
    largest_first = sorted(makers, key=lambda layer: -layer.weight.numel())
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        forwards = dict(zip(largest_first, pool.map(lambda layer: makers[layer](), largest_first), strict=True))
    with _forwards(forwards):
        yield


@contextmanager
def fast_lora(model: nn.Module):
    """
    Within, a model in training runs its LoRA layers the fast way where there is one.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The policy.
    """
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    forwards = {}
    for layer in model.modules():
        if _is_plain_lora(layer) and (dtype or _lora_dtype(layer)) == layer.get_base_layer().weight.dtype:
            forwards[layer] = functools.partial(_lora_with_gradient, layer)
    with _forwards(forwards):
        yield


@contextmanager
def _forwards(forwards: dict):
    """Gives layers another `forward` for a while."""
    try:
        for layer, forward in forwards.items():
            layer.forward = forward
        yield
    finally:
        for layer in forwards:
            del layer.forward


def _is_for_onednn(weight: torch.Tensor) -> bool:
    """Whether oneDNN multiplies by this weight, and packs it."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32


def _is_plain_lora(layer: nn.Module) -> bool:
    """Whether the layer is y = W x + b + s B (A x) on a frozen base for oneDNN, and nothing else."""
    if type(layer) is not lora.Linear or layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return False
    (name,) = layer.active_adapters
    if name not in layer.lora_A or name in layer.lora_variant or layer.lora_B[name].bias is not None:
        return False
    base, dropout = layer.get_base_layer(), layer.lora_dropout[name]
    if layer.training and getattr(dropout, "p", 0.0) > 0:
        return False
    is_frozen = not any(parameter.requires_grad for parameter in base.parameters())
    return type(base) is nn.Linear and is_frozen and _is_for_onednn(base.weight)


def _lora_dtype(layer: lora.Linear) -> torch.dtype:
    return layer.lora_A[layer.active_adapters[0]].weight.dtype


def _is_for_fbgemm(weight: torch.Tensor) -> bool:
    """Whether FBGEMM can read this fp32 weight in 16 bits without rounding it, but for values next to zero."""
    if weight.dtype != torch.float32 or torch.backends.quantized.engine not in ("x86", "fbgemm"):
        return False
    # fp16 has more digits than bf16 and a smaller range: below 2**-14 its values are 2**-24 apart
    return all((rows - rows.half()).abs_().max() <= 2**-25 for rows in weight.split(256))


def _packed_linear(weight: torch.Tensor, bias: torch.Tensor | None, num_rows: int):
    weight = weight.detach()
    return _fbgemm_linear(weight, bias) if _is_for_fbgemm(weight) else _onednn_linear(weight, bias, num_rows)


def _fbgemm_linear(weight: torch.Tensor, bias: torch.Tensor | None):
    packed = torch.ops.quantized.linear_prepack_fp16(weight, None if bias is None else bias.detach())
    return lambda x: torch.ops.quantized.linear_dynamic_fp16(x, packed)


def _onednn_linear(weight: torch.Tensor, bias: torch.Tensor | None, num_rows: int):
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, num_rows)
    bias = None if bias is None else bias.detach()
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def _packed_lora(layer: lora.Linear, num_rows: int):
    (name,) = layer.active_adapters
    base = layer.get_base_layer()
    weight = base.weight.detach()
    down = layer.lora_A[name].weight.detach().t()
    up = layer.lora_B[name].weight.detach() * layer.scaling[name]
    if _is_for_fbgemm(weight):  # the adapter's own weights have more than 16 bits
        product, up = _fbgemm_linear(weight, base.bias), up.t().contiguous()
        return lambda x: product(x).add_(x @ down @ up)
    # [W, sB] [x, Ax] + b: the adapter's second product is a few more columns of the base's
    product = _onednn_linear(torch.cat([weight, up], dim=1), base.bias, num_rows)
    return lambda x: product(torch.cat([x, x @ down], dim=-1))


def _lora_with_gradient(layer: lora.Linear, x: torch.Tensor) -> torch.Tensor:
    (name,) = layer.active_adapters
    base, scaling = layer.get_base_layer(), layer.scaling[name]
    return _LoraLinear.apply(x, base.weight, base.bias, layer.lora_A[name].weight, layer.lora_B[name].weight, scaling)


class _LoraLinear(torch.autograd.Function):
    """
    y = W x + b + s B (A x) for a frozen W and b, computed in W's dtype; the gradients of x, A and B.

    Every result that has the size of an activation is written once: the adapter's part is added to it in place.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, lora_a, lora_b, scaling):
        rows = x.reshape(-1, x.size(-1)).to(weight.dtype)
        lora_a, lora_b = lora_a.to(weight.dtype), lora_b.to(weight.dtype)
        inner = rows @ lora_a.t()
        result = nn.functional.linear(rows, weight, bias).addmm_(inner, lora_b.t(), alpha=scaling)
        ctx.save_for_backward(rows, inner, weight, lora_a, lora_b)
        ctx.scaling, ctx.shape = scaling, x.shape
        return result.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, gradient):
        rows, inner, weight, lora_a, lora_b = ctx.saved_tensors
        gradient = gradient.reshape(-1, gradient.size(-1))
        inner_gradient = gradient @ lora_b * ctx.scaling
        x_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient = (gradient @ weight).addmm_(inner_gradient, lora_a).view(ctx.shape)
        a_gradient = inner_gradient.t() @ rows
        b_gradient = (gradient.t() @ inner).mul_(ctx.scaling)
        return x_gradient, None, None, a_gradient, b_gradient, None
