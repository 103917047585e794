"""
The decoding loop for CPUs: one forward a token-step, over the rows that have not ended.

Beyond a plain `generate`, and without changing the distribution: a prompt that repeats in the batch is prefilled once,
finished rows leave the batch (once they are an eighth of it), the LM head sees last positions only, and the cache is
not copied at every step. Not covered: beam search, repetition penalties, and models whose layers keep a state.
"""

from collections.abc import Callable

import torch
from transformers import DynamicCache, DynamicLayer, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from ..adapters import adapter_in_base_dtype, base_model
from ..device import fast_linears
from .prefill import next_token_logits, pad_left
from .sampling import sample_tokens

# Tokens of free space that the cache gets when it grows
CACHE_ROOM = 64
# Share of the rows that may have ended before they leave the batch, which copies the cache of all others
MAX_ENDED = 1 / 8


class _RoomyLayer(DynamicLayer):
    """Keys and values of a layer with free space behind them: `DynamicLayer` copies everything at every token-step."""

    _buffers = None

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.size(-2)
        if self._buffers is None or end > self._buffers[0].size(-2):
            shape = (*key_states.shape[:2], end + CACHE_ROOM)
            self._buffers = [new.new_empty(*shape, new.size(-1)) for new in (key_states, value_states)]
            if start:
                self._buffers[0][:, :, :start] = self.keys
                self._buffers[1][:, :, :start] = self.values
        self._buffers[0][:, :, start:end] = key_states
        self._buffers[1][:, :, start:end] = value_states
        self.keys, self.values = (buffer[:, :, :end] for buffer in self._buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices):
        super().batch_select_indices(indices)
        self._buffers = None  # the remaining rows are a copy without free space


def why_not_covered(base: PreTrainedModel) -> str | None:
    """
    Return why this loop does not cover a model.

    Args:
        base ([`~transformers.PreTrainedModel`]):
            The base model, not wrapped by PEFT.

    Returns:
        `str` or `None`: The reason, or `None` if it covers it.
    """
    layers = DynamicCache(config=base.config).layers
    if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers):
        return "some of its layers keep a state, of which rows cannot be selected"
    return None


def eager_completions(
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
    Complete a batch of prompts as [`generate_completions`] does, which calls this.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The policy, in eval mode.
        prompt_ids, eos_token_ids, max_completion_length, temperature, top_p, top_k, on_ended:
            As in [`generate_completions`].

    Returns:
        `list[list[int]]`: Each completion's token ids.
    """
    base = base_model(model)
    device = base.get_output_embeddings().weight.device

    with adapter_in_base_dtype(model), fast_linears(model, len(prompt_ids)):
        unique = {tuple(ids): None for ids in prompt_ids}
        row_of_prompt = {ids: row for row, ids in enumerate(unique)}
        input_ids, mask = pad_left(list(unique), device)

        cache = DynamicCache(config=base.config)
        cache.layers = [_RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = next_token_logits(
            base, input_ids=input_ids, attention_mask=mask, position_ids=positions, past_key_values=cache
        )

        rows = torch.tensor([row_of_prompt[tuple(ids)] for ids in prompt_ids], device=device)
        logits, mask = logits[rows], mask[rows]
        cache.batch_select_indices(rows)
        lengths = mask.sum(-1, keepdim=True)
        live = list(range(len(prompt_ids)))
        completions = [[] for _ in prompt_ids]
        eos = torch.tensor(eos_token_ids, device=device)

        going = torch.ones(len(live), dtype=torch.bool, device=device)
        for step in range(max_completion_length):
            tokens = sample_tokens(logits, temperature, top_p, top_k)
            for row, token, is_going in zip(live, tokens.tolist(), going.tolist(), strict=True):
                if is_going:
                    completions[row].append(token)
            num_going = int(going.sum())
            going = going & ~torch.isin(tokens, eos)
            if on_ended is not None:
                on_ended(num_going - int(going.sum()))
            if step + 1 == max_completion_length or not going.any():
                break
            if int(going.sum()) <= (1 - MAX_ENDED) * len(live):
                keep = going.nonzero()[:, 0]
                live = [live[i] for i in keep.tolist()]
                tokens, mask, lengths, going = tokens[keep], mask[keep], lengths[keep], going[keep]
                cache.batch_select_indices(keep)
            mask = torch.cat([mask, mask.new_ones(len(live), 1)], dim=-1)
            logits = next_token_logits(
                base,
                input_ids=tokens[:, None],
                attention_mask=mask,
                position_ids=lengths + step,
                past_key_values=cache,
            )
    return completions
