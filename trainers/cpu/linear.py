"""
Linear layers on a CPU, on weights packed for the number of rows.

A token-step of a rollout multiplies a handful of rows by every weight of the model. With packed weights oneDNN does so
in two thirds of the time (8 rows of a 0.5B model on two cores: 46 ms against 65), and a LoRA layer becomes one
product. In fp32, on a CPU without bf16 instructions, FBGEMM reads the weights as 16 bits (8 rows with AVX2: 87 ms,
oneDNN 130, plain 270). The packed copies live as long as the rollout. In training, a LoRA layer adds its product in
place instead of building, scaling and adding whole activations.

Not covered: dtypes other than bf16 and fp32, and adapters other than plain LoRA. They run as PEFT has them, as does
everything on a torch that lacks the private operators used here.
"""

import functools
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from peft.tuners import lora
from torch import nn


@contextmanager
def packed_linears(model: nn.Module, num_rows: int):
    """
    Run a model's linear layers on packed weights, without gradients, for the duration of the context.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The policy, in eval mode, its adapter in the dtype of its base.
        num_rows (`int`):
            Number of rows to pack for; other numbers work and are slower.
    """
    makers, called = {}, set()
    for layer in model.modules():
        if _is_plain_lora(layer) and _lora_dtype(layer) == layer.get_base_layer().weight.dtype:
            makers[layer] = functools.partial(_packed_lora, layer, num_rows)
            called.update(layer.modules())
        elif type(layer) is nn.Linear and layer not in called and _is_for_onednn(layer.weight):
            makers[layer] = functools.partial(_packed_linear, layer.weight, layer.bias, num_rows)
    # FBGEMM packs a weight with one thread, so the largest, the LM head, comes first
    largest_first = sorted(makers, key=lambda layer: -layer.weight.numel())
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        forwards = dict(zip(largest_first, pool.map(lambda layer: makers[layer](), largest_first), strict=True))
    with _forwards(forwards):
        yield


@contextmanager
def lora_in_place(model: nn.Module):
    """
    Compute a model's LoRA layers in place, with gradients, for the duration of the context.

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
    """Replace the `forward` of layers for the duration of the context."""
    try:
        for layer, forward in forwards.items():
            layer.forward = forward
        yield
    finally:
        for layer in forwards:
            del layer.forward


@functools.cache
def _has_operators(namespace: str, *names: str) -> bool:
    """Return whether this torch has some private operators. They may change or go with any release."""
    return all(hasattr(getattr(torch.ops, namespace), name) for name in names)


def _is_for_onednn(weight: torch.Tensor) -> bool:
    """Return whether oneDNN can pack this weight and multiply by it."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not _has_operators("mkldnn", "_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported"):
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32


def _is_plain_lora(layer: nn.Module) -> bool:
    """Return whether the layer is y = W x + b + s B (A x) on a frozen base for oneDNN, and nothing else."""
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
    """Return whether FBGEMM can read this fp32 weight as fp16 without rounding it, except for values next to zero."""
    if weight.dtype != torch.float32 or torch.backends.quantized.engine not in ("x86", "fbgemm"):
        return False
    if not _has_operators("quantized", "linear_prepack_fp16", "linear_dynamic_fp16"):
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

    Every result of an activation's size is written once: the adapter's part is added to it in place.
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
