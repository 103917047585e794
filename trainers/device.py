"""
Decide where a run computes, and hand out what is fast there.

The rest of the trainers, and the recipes, ask this module and never the hardware. The CPU's kernels are in `cpu/`.
"""

import functools
import types
from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate.utils import parse_flag_from_env
from peft.helpers import disable_input_dtype_casting
from transformers import PreTrainedModel

from .adapters import base_model
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


def training_dtype(device: torch.device) -> torch.dtype:
    """
    Return the dtype that a device trains fastest in.

    Args:
        device (`torch.device`):
            The device.

    Returns:
        `torch.dtype`: bf16 where there is hardware for it, else fp16 on a GPU and fp32 on a CPU.
    """
    if supports_bf16(device):
        return torch.bfloat16
    return torch.float32 if device.type == "cpu" else torch.float16


def free_memory(device: torch.device) -> int | None:
    """
    Return how much memory of an accelerator is free.

    Args:
        device (`torch.device`):
            The device.

    Returns:
        `int` or `None`: Bytes, those included that torch has reserved and does not use. `None` where torch cannot tell,
        and on a CPU, where it depends on what else the machine does.
    """
    if device.type not in ("cuda", "xpu"):
        return None
    unused = torch.accelerator.memory_reserved(device) - torch.accelerator.memory_allocated(device)
    return torch.accelerator.get_memory_info(device)[0] + unused


def use_fast_log_probs(model: torch.nn.Module, device: torch.device, temperature: float = 1.0) -> None:
    """
    Give the policy of a TRL trainer the device's fast log-probabilities.

    On a CPU that is an LM head of its own (`cpu/log_probs.py`). On an accelerator it is TRL's, without PEFT's cast of
    the activations to fp32 around an fp32 adapter: autocast brings them back to 16 bits for the adapter's products, and
    keeps that second copy for the backward. It also calls [`avoid_cudnn_attention`].

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            A policy that TRL has given its fused LM head.
        device (`torch.device`):
            The run's device.
        temperature (`float`, *optional*, defaults to `1.0`):
            Divides the logits, on a CPU. TRL's head has its own.
    """
    avoid_cudnn_attention()
    if device.type == "cpu":
        return add_packed_lm_head(model, temperature)
    base = base_model(model)
    trl_forward = base.forward

    @functools.wraps(type(base).forward)  # the signature is what `generate` validates its arguments against
    def forward(self, *args, **kwargs):
        with disable_input_dtype_casting(self, active=torch.is_autocast_enabled(device.type)):
            return trl_forward(*args, **kwargs)

    base.forward = types.MethodType(forward, base)


def avoid_cudnn_attention() -> None:
    """
    Switch off cuDNN's attention for the whole process.

    torch prefers it on Hopper, where its gradients under a mask can be NaN (PyTorch issue 196678, TRL issue 7181).
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


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


def decoding_loop(device: torch.device) -> tuple[str, str | None]:
    """
    Return which loop decodes fastest on a device.

    Args:
        device (`torch.device`):
            The device.

    Returns:
        `str`, `str` or `None`: `"eager"` on a CPU and `"graph"` on CUDA, the modules of `rollout/`; elsewhere
        `"transformers"`, for its `generate`, and the reason.
    """
    if device.type in ("cpu", "cuda"):
        return ("eager" if device.type == "cpu" else "graph"), None
    return "transformers", f"there is no loop for {device.type} here"
