"""
Estimate the memory of a micro-batch's activations, and decide on gradient checkpointing by it.

Covered: plain decoders (Llama, Qwen2 and their like). Of other architectures, mixtures of experts among them, nothing
is estimated.
"""

from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from .device import free_memory

# What the backward of a decoder layer with LoRA keeps of a token, in multiples of the two sizes. Measured with
# torch.autograd.graph.saved_tensors_hooks in bf16: 57.9 kB for Qwen2.5-0.5B, 103.7 for 1.5B, 86.3 for DeepSeek-Coder
# 1.3B; this gives 58.6, 105.5 and 89.1. The MLP's are gate, up, silu(gate) and their product.
MLP_VALUES = 4
HIDDEN_VALUES = 11

# The rest is for the rollout's cache, the LM head's logits, the optimizer and fragmentation
SHARE_FOR_ACTIVATIONS = 0.5


def activation_bytes(
    config: PreTrainedConfig, num_tokens: int, dtype: torch.dtype = torch.bfloat16, checkpointing: bool = False
) -> int | None:
    """
    Estimate what a forward saves for backward.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            The model's configuration.
        num_tokens (`int`):
            Tokens of the micro-batch, padding included.
        dtype (`torch.dtype`, *optional*, defaults to `torch.bfloat16`):
            What the activations are computed in.
        checkpointing (`bool`, *optional*, defaults to `False`):
            Whether only the layers' inputs are kept, and one layer is computed again at a time.

    Returns:
        `int` or `None`: Bytes, or `None` for an architecture that is not covered.
    """
    config = config.get_text_config()
    names = ("hidden_size", "intermediate_size", "num_hidden_layers")
    hidden, intermediate, num_layers = (getattr(config, name, None) for name in names)
    sizes_known = all(isinstance(size, int) for size in (hidden, intermediate, num_layers))
    if not sizes_known or any(getattr(config, name, None) for name in ("num_experts", "num_local_experts")):
        return None
    layer = MLP_VALUES * intermediate + HIDDEN_VALUES * hidden
    values = num_layers * hidden + layer if checkpointing else num_layers * layer
    return num_tokens * values * dtype.itemsize


def longest_prompt(dataset: Any, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """
    Return the number of tokens of a dataset's longest prompt.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Tasks with the column `prompt`, text or chat messages.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The policy's tokenizer.

    Returns:
        `int` or `None`: Tokens of the prompt with the most characters, or `None` for a dataset without a length.
    """
    if not hasattr(dataset, "__len__"):
        return None
    prompt = max(dataset["prompt"], key=lambda prompt: len(str(prompt)))
    if not isinstance(prompt, str):
        prompt = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    return len(tokenizer(text=prompt)["input_ids"])


def needs_checkpointing(
    config: PreTrainedConfig, num_rows: int, num_tokens: int | None, device: torch.device, dtype: torch.dtype
) -> bool:
    """
    Decide whether a micro-batch needs gradient checkpointing.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            The model's configuration. Its weights are on the device already.
        num_rows (`int`):
            Completions of a micro-batch.
        num_tokens (`int`, *optional*):
            Tokens of the longest prompt and the longest completion together.
        device (`torch.device`):
            The run's device.
        dtype (`torch.dtype`):
            What the activations are computed in.

    Returns:
        `bool`: `False` on a CPU, and where the activations take at most half of the free memory. `True` otherwise, and
        where one of the numbers is not known.
    """
    if device.type == "cpu":
        return False
    free = free_memory(device)
    if num_tokens is None or free is None or (needed := activation_bytes(config, num_rows * num_tokens, dtype)) is None:
        return True
    return needed > SHARE_FOR_ACTIVATIONS * free
