"""
Linear layers of a rollout on a CPU: the same products, in the memory layout and the number of steps that suit few rows.

A token-step multiplies a handful of rows by every weight of the model. oneDNN reads weights that were packed for it a
third faster than plain ones (8 rows of an 0.5B model on two cores: 46 ms a step against 65), and of what PEFT does
around a LoRA layer (a cast, a dropout, two products, a scaling, a sum) one small product is left. Packed copies live
only as long as the rollout. Not covered: other dtypes than bf16 and fp32, and other adapters than plain LoRA;
they keep their own way.
"""

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
            The policy, in eval mode.
        num_rows (`int`):
            About how many rows a product will have.
    """
    changed = {}
    for layer in model.modules():
        if _is_plain_lora(layer):
            changed[layer] = _packed_lora(layer, num_rows)
            changed[layer.get_base_layer()] = None  # not called
        elif type(layer) is nn.Linear and layer not in changed and _can_be_packed(layer.weight):
            changed[layer] = _packed_linear(layer.weight, layer.bias, num_rows)
    changed = {layer: forward for layer, forward in changed.items() if forward is not None}
    try:
        for layer, forward in changed.items():
            layer.forward = forward
        yield
    finally:
        for layer in changed:
            del layer.forward


def _can_be_packed(weight: torch.Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32


def _is_plain_lora(layer: nn.Module) -> bool:
    """Whether the layer is y = W x + b + s B (A x) in one dtype that can be packed, and nothing else."""
    if type(layer) is not lora.Linear or layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return False
    (name,) = layer.active_adapters
    return (
        name in layer.lora_A
        and name not in layer.lora_variant
        and layer.lora_B[name].bias is None
        and type(layer.get_base_layer()) is nn.Linear
        and layer.lora_A[name].weight.dtype == layer.get_base_layer().weight.dtype
        and _can_be_packed(layer.get_base_layer().weight)
    )


def _packed_linear(weight: torch.Tensor, bias: torch.Tensor | None, num_rows: int):
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), num_rows)
    bias = None if bias is None else bias.detach()
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def _packed_lora(layer: lora.Linear, num_rows: int):
    """[W, sB] [x, Ax] + b: the adapter's second product is a few more columns of the base's."""
    (name,) = layer.active_adapters
    base = layer.get_base_layer()
    up = layer.lora_B[name].weight.detach() * layer.scaling[name]
    product = _packed_linear(torch.cat([base.weight.detach(), up], dim=1), base.bias, num_rows)
    down = layer.lora_A[name].weight.detach().t()
    return lambda x: product(torch.cat([x, x @ down], dim=-1))
