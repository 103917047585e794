"""
Rollouts by transformers' continuous batching: a paged cache whose places go to the next prompt when a row ends.

It needs flash attention to be fast (`LOG.md` says what else), so nothing here chooses it: the setting
`use_transformers_continuous_batching` does.
"""

from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from ..adapters import adapter_in_base_dtype, base_model


@torch.no_grad()
def continuous_completions(
    model: PreTrainedModel, prompt_ids: list[list[int]], generation_config: GenerationConfig, batching_config: Any
) -> list[list[int]]:
    """
    Complete prompts with `generate_batch`.

    An adapter is computed in the dtype of its base, and its fp32 weights are untouched. TRL's own call casts the whole
    policy to bf16 for good, puts an evaluated policy into train mode, and drops requests that failed.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The policy, its weights not sharded (FSDP, ZeRO-3). It is put in eval mode for the duration.
        prompt_ids (`list[list[int]]`):
            Token ids of each prompt.
        generation_config ([`~transformers.GenerationConfig`]):
            How to decode.
        batching_config ([`~transformers.ContinuousBatchingConfig`]):
            Size of the cache and of the batches.

    Returns:
        `list[list[int]]`: Each completion's token ids, its EOS included where it has one.

    Raises:
        RuntimeError: If a request failed.
    """
    was_training = model.training
    try:
        with adapter_in_base_dtype(model):
            outputs = base_model(model).generate_batch(
                prompt_ids, generation_config=generation_config, continuous_batching_config=batching_config
            )
    finally:
        model.train(was_training)
    failed = next((output.error for output in outputs.values() if output.error is not None), None)
    if failed is not None or len(outputs) < len(prompt_ids):
        raise RuntimeError(
            f"transformers' continuous batching did not complete every prompt: {failed or 'see its log'}"
        )
    return [output.generated_tokens for output in outputs.values()]
