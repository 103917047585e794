"""What the decoding loops share: prompts as one tensor, and the logits of the next token."""

import torch
from transformers import PreTrainedModel

from ..adapters import has_plain_lm_head


def pad_left(prompt_ids: list[tuple[int, ...]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Pad prompts on the left to the longest one.

    Args:
        prompt_ids (`list[tuple[int, ...]]`):
            Token ids of each prompt.
        device (`torch.device`):
            Where the tensors go.

    Returns:
        `torch.Tensor`, `torch.Tensor`: Token ids and attention mask, both int64 of shape `(prompts, longest)`.
    """
    longest = max(map(len, prompt_ids))
    input_ids = torch.tensor([[0] * (longest - len(ids)) + list(ids) for ids in prompt_ids], device=device)
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompt_ids], device=device)
    return input_ids, mask


def next_token_logits(base: PreTrainedModel, **inputs) -> torch.Tensor:
    """
    Return the logits of the token after the last one.

    Args:
        base ([`~transformers.PreTrainedModel`]):
            The base model, not wrapped by PEFT.
        inputs:
            What its forward takes, with `past_key_values`.

    Returns:
        `torch.Tensor` of shape `(rows, vocab)`
    """
    if not has_plain_lm_head(base):
        return base(**inputs, use_cache=True, logits_to_keep=1).logits[:, -1]
    # A 2-D product: the model's own forward would take a 3-D one, which copies the head once a row on a CPU
    head = base.get_output_embeddings()
    return head(base.base_model(**inputs, use_cache=True).last_hidden_state[:, -1])
