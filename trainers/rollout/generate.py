"""The one place where a decoding loop is chosen: by the device, and by what the loop covers."""

import functools
import logging
from collections.abc import Callable

import torch
from transformers import GenerationConfig, PreTrainedModel

from ..adapters import adapter_in_base_dtype, base_model
from ..device import decoding_loop
from . import eager, graph
from .prefill import pad_left

logger = logging.getLogger(__name__)


@torch.no_grad()
def generate_completions(
    model: PreTrainedModel,
    prompt_ids: list[list[int]],
    eos_token_ids: list[int],
    max_completion_length: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    on_ended: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """
    Complete a batch of prompts.

    A CPU has a loop of its own (`eager.py`), and so has CUDA (`graph.py`). Models that these do not cover, and other
    accelerators, are left to transformers' `generate`, which the log says once.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The policy, its weights not sharded (FSDP, ZeRO-3). It is put in eval mode for the duration.
        prompt_ids (`list[list[int]]`):
            Token ids of each prompt, not padded. A prompt may repeat.
        eos_token_ids (`list[int]`):
            Tokens that end a completion.
        max_completion_length (`int`):
            Maximum tokens of a completion, EOS included.
        temperature (`float`, *optional*, defaults to `1.0`):
            0 decodes greedily.
        top_p (`float`, *optional*, defaults to `1.0`):
            See [`sample_tokens`].
        top_k (`int`, *optional*, defaults to `0`):
            See [`sample_tokens`].
        on_ended (`Callable[[int], None]`, *optional*):
            Called with the number of rows that ended, for a progress bar: on a CPU after each token step, on CUDA
            after several, and by transformers' `generate` once.

    Returns:
        `list[list[int]]`: Each completion's token ids, its EOS included where it has one.
    """
    base = base_model(model)
    loop, reason = decoding_loop(base.get_output_embeddings().weight.device)
    if loop != "transformers":
        reason = {"eager": eager, "graph": graph}[loop].why_not_covered(base)
    if reason is None:
        complete = {"eager": eager.eager_completions, "graph": graph.graph_completions}[loop]
    else:
        _warn_once(f"{base.config.model_type} decodes with transformers' `generate`, which is slower: {reason}")
        complete = _transformers_completions
    was_training = model.training
    model.eval()
    try:
        return complete(
            model, prompt_ids, eos_token_ids, max_completion_length, temperature, top_p, top_k, on_ended=on_ended
        )
    finally:
        model.train(was_training)


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def _transformers_completions(
    model, prompt_ids, eos_token_ids, max_completion_length, temperature, top_p, top_k, on_ended
) -> list[list[int]]:
    base = base_model(model)
    input_ids, mask = pad_left(prompt_ids, base.get_output_embeddings().weight.device)
    config = GenerationConfig(
        max_new_tokens=max_completion_length,
        eos_token_id=eos_token_ids or None,
        pad_token_id=eos_token_ids[0] if eos_token_ids else 0,
        do_sample=temperature > 0,
        **({"temperature": temperature, "top_p": top_p, "top_k": top_k} if temperature > 0 else {}),
    )
    models_own, base.generation_config = base.generation_config, config  # `generate` fills gaps from the model's own
    try:
        with adapter_in_base_dtype(model):
            output = base.generate(input_ids=input_ids, attention_mask=mask, generation_config=config)
    finally:
        base.generation_config = models_own
    completions, ends = [], set(eos_token_ids)
    for ids in output[:, input_ids.size(1) :].tolist():
        length = next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))
        completions.append(ids[:length])
    if on_ended is not None:
        on_ended(sum(ids[-1] in ends for ids in completions))
    return completions
