"""A policy's base and its adapter: the dtype that the adapter is kept and computed in."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

# Settings by which a model changes its logits after the LM head, under the names that the architectures give them
LOGIT_SETTINGS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "output_multiplier", "lm_head_multiplier")


def base_model(policy: nn.Module) -> PreTrainedModel:
    """
    Return the causal language model of a policy, without the adapter around it.

    Args:
        policy ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The policy.

    Returns:
        [`~transformers.PreTrainedModel`]
    """
    return policy.get_base_model() if isinstance(policy, PeftModel) else policy


def has_plain_lm_head(model: PreTrainedModel) -> bool:
    """
    Return whether the logits are the LM head's plain output.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The base model, not wrapped by PEFT.

    Returns:
        `bool`: `False` where the model scales or caps its logits.
    """
    config = model.config.get_text_config()
    return all(getattr(config, name, None) in (None, 1.0) for name in LOGIT_SETTINGS)


def adapter_values(policy: Any) -> dict[str, torch.Tensor]:
    """
    Copy the parameters of an adapter that is in training, before a trainer of TRL's casts them.

    Args:
        policy ([`~peft.PeftModel`], [`~transformers.PreTrainedModel`] or `str`):
            What a trainer takes as its model.

    Returns:
        `dict[str, torch.Tensor]`: Copies by name; none of a base without an adapter.
    """
    if not isinstance(policy, PeftModel):
        return {}
    return {name: p.detach().clone() for name, p in policy.named_parameters() if p.requires_grad}


def keep_adapter_in_fp32(model: nn.Module, values: dict[str, torch.Tensor] | None = None) -> None:
    """
    Make an adapter's trainable parameters fp32. TRL's trainers cast them to bf16 over a quantised base.

    Under ZeRO-3 adapters get the base's dtype: it has fp32 masters of its own and cannot gather parameters of two
    dtypes (TRL issue 6089), which a continued adapter and TRL's reference copy of it would otherwise have.

    Args:
        model ([`~peft.PeftModel`]):
            The policy.
        values (`dict[str, torch.Tensor]`, *optional*):
            [`adapter_values`] from before they were rounded; parameters not among them keep their own.
    """
    if is_deepspeed_zero3_enabled():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(model.get_input_embeddings().weight.dtype)
        return
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = (values or {}).get(name, parameter.data).to(parameter.device, torch.float32)


@contextmanager
def adapter_in_base_dtype(model: nn.Module, copies: dict[nn.Parameter, nn.Parameter] | None = None) -> Iterator[None]:
    """
    Compute with a copy of the fp32 adapter in the dtype of its half-precision base.

    Around an fp32 adapter PEFT casts the activations to fp32, which costs a factor of 2 to 3 on a CPU. The layers get
    other parameters meanwhile. The masters are not written to: autograd would forget the hooks by which DDP averages
    the gradient of a parameter whose `data` had another dtype. Nothing changes where base and adapter have one dtype.

    Args:
        model (`nn.Module`):
            The policy.
        copies (`dict[nn.Parameter, nn.Parameter]`, *optional*):
            The copies of an earlier call, filled anew where they lie; those missing are added. A CUDA graph that was
            captured with them reads the adapter's present weights.
    """
    copies = {} if copies is None else copies
    dtype = model.get_input_embeddings().weight.dtype
    masters = [
        (module, name, parameter)
        for path, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if "lora_" in f"{path}.{name}" and parameter.is_floating_point() and parameter.dtype != dtype
    ]
    try:
        for module, name, parameter in masters:
            copy = copies.get(parameter)
            if copy is None or (copy.dtype, copy.device) != (dtype, parameter.device):
                copy = copies[parameter] = nn.Parameter(torch.empty_like(parameter, dtype=dtype), requires_grad=False)
            copy.data.copy_(parameter.data)
            setattr(module, name, copy)
        yield
    finally:
        for module, name, parameter in masters:
            setattr(module, name, parameter)
