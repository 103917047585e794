"""
Linear layers of a rollout on a CPU: the same products, in the memory layout and the number of steps that suit few rows.

A token-step multiplies a handful of rows by every weight of the model. oneDNN reads weights that were packed for it a
third faster than plain ones (8 rows of an 0.5B model on two cores: 46 ms a step against 65), and of what PEFT does
around a LoRA layer (a cast, a dropout, a product, a scaling, a sum) one product and one accumulating product are left.
Packed copies live only as long as the rollout. Not covered: other dtypes than bf16, and other adapters than plain LoRA;
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
    changed = []
    if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        for layer in model.modules():
            if type(layer) is nn.Linear and _is_cpu_bf16(layer.weight):
                layer.forward = _packed_linear(layer, num_rows)
                changed.append(layer)
        for layer in model.modules():
            if _is_plain_lora(layer) and _is_cpu_bf16(layer.lora_A[layer.active_adapters[0]].weight):
                layer.forward = _fused_lora(layer)
                changed.append(layer)
    try:
        yield
    finally:
        for layer in changed:
            del layer.forward


def _is_cpu_bf16(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype == torch.bfloat16


def _is_plain_lora(layer: nn.Module) -> bool:
    """Whether the layer adds B A x times a scale to its base's output, and nothing else."""
    if type(layer) is not lora.Linear or layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return False
    (name,) = layer.active_adapters
    return name in layer.lora_A and name not in layer.lora_variant and layer.lora_B[name].bias is None


def _packed_linear(layer: nn.Linear, num_rows: int):
    weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), num_rows)
    bias = None if layer.bias is None else layer.bias.detach()
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _fused_lora(layer: lora.Linear):
    (name,) = layer.active_adapters
    base = layer.get_base_layer()
    down, up = layer.lora_A[name].weight.detach().t(), layer.lora_B[name].weight.detach().t()
    scaling = layer.scaling[name]

    def forward(x):
        out = base(x)
        flat = out.view(-1, out.size(-1))
        flat.addmm_(x.reshape(-1, x.size(-1)) @ down, up, alpha=scaling)
        return out

    return forward
