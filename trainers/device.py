"""
Decide where a run computes, and hand out what is fast there.

The rest of the trainers, and the recipes, ask this module and never the hardware. The CPU's kernels stand in `cpu/`.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate.utils import parse_flag_from_env
from transformers import PreTrainedModel

from .cpu import add_packed_lm_head, packed_linears

# Names of bf16 matrix instructions among `torch.cpu.get_capabilities()`: x86's two, and Arm's
CPU_BF16 = ("avx512_bf16", "amx_bf16", "bf16")


def run_device(use_cpu: bool = False) -> torch.device:
    """
    Return the device that a run computes on.

    Args:
        use_cpu (`bool`, *optional*, defaults to `False`):
            The field `use_cpu` of the run's configuration.

    Returns:
        `torch.device`: The CPU if `use_cpu` is set, if `ACCELERATE_USE_CPU` is (a launch with `use_cpu: true` sets it),
        or if there is no accelerator. The current accelerator otherwise.
    """
    if use_cpu or parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available():
        return torch.device("cpu")
    return torch.accelerator.current_accelerator()


def supports_bf16(device: torch.device) -> bool:
    """
    Return whether a device multiplies bf16 matrices in hardware.

    Args:
        device (`torch.device`):
            The device.

    Returns:
        `bool`: `False` where bf16 is emulated, which takes two to four times as long as fp32 on a CPU.
    """
    if device.type == "cpu":
        return any(torch.cpu.get_capabilities().get(name) for name in CPU_BF16)
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return True


def use_fast_log_probs(model: torch.nn.Module, device: torch.device, temperature: float = 1.0) -> None:
    """
    Give the policy of a TRL trainer the device's fast log-probabilities. Only a CPU has other ones than TRL's.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            A policy that TRL has given its fused LM head.
        device (`torch.device`):
            The run's device.
        temperature (`float`, *optional*, defaults to `1.0`):
            Divides the logits.
    """
    if device.type == "cpu":
        add_packed_lm_head(model, temperature)


def fast_linears(model: PreTrainedModel, num_rows: int) -> AbstractContextManager:
    """
    Return a context in which a rollout's linear layers run as fast as their device can.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The policy, in eval mode, its adapter in the dtype of its base.
        num_rows (`int`):
            Rows of the rollout.

    Returns:
        A context manager.
    """
    if model.get_input_embeddings().weight.device.type != "cpu":
        return nullcontext()
    return packed_linears(model, num_rows)
