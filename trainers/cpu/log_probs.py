"""
Log-probabilities of completions on a CPU: TRL's fused LM head without the work that padding and prompts cost.

A batch runs as one packed row: no padding, and a prompt that several completions share is computed once. Only
completion tokens are scored, where TRL's head scores every position outside of Triton devices. The gradient is computed
together with the probabilities, tile by tile in the cache, instead of from logits computed again.

Covered: frozen LM heads (LoRA), full attention, plain logits, no gradient checkpointing, no load-balancing loss. In all
other cases TRL's own head runs.
"""

import functools
import types
from dataclasses import dataclass

import torch
from peft.helpers import disable_input_dtype_casting
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from ..adapters import base_model, has_plain_lm_head
from .linear import lora_in_place

# Positions and tokens of a tile of logits: 512 x 4,096 in fp32 are 8 MB, which fit into a cache
NUM_POSITIONS = 512
NUM_TOKENS = 4096


class _FrozenHeadLogProbs(torch.autograd.Function):
    r"""
    \\( \log p_y \\), entropy, mean logit and top-1 match of `softmax(hidden @ weight.T / temperature)`, for a frozen
    head.

    The gradient of each position's log-probability is one vector,
    \\( \partial \log p_y / \partial h = (w_y - \sum_v p_v w_v) / \tau \\), so it is computed in the forward and only
    scaled in the backward: nothing of the vocabulary's size is kept or computed again. The vocabulary is gone through
    in tiles with a running maximum (Milakov and Gimelshein 2018, https://huggingface.co/papers/1805.02867, alg. 3).
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature):
        hidden = hidden.to(weight.dtype)
        chunks = zip(hidden.split(NUM_POSITIONS), targets.split(NUM_POSITIONS), strict=True)
        with_gradient = ctx.needs_input_grad[0]
        parts = [_score(states, weight, bias, labels, temperature, with_gradient) for states, labels in chunks]
        log_probs, *measured, gradients = (torch.cat(part) for part in zip(*parts, strict=True))
        if with_gradient:
            ctx.save_for_backward(gradients)
        ctx.mark_non_differentiable(*measured)
        return log_probs, *measured

    @staticmethod
    def backward(ctx, grad_log_probs, *_):
        (gradients,) = ctx.saved_tensors
        return grad_log_probs[:, None] * gradients, None, None, None, None


def _score(hidden, weight, bias, labels, temperature, with_gradient):
    """Log-probability, entropy, mean logit, top-1 match and gradient of some positions; no gradient is an empty one."""
    num_tokens = weight.size(0)
    maximum = hidden.new_full((len(hidden),), -torch.inf, dtype=torch.float32)
    # Sums over the vocabulary: of exp(l - maximum), of that times l, of l, and of that times w
    total, weighted, plain = (torch.zeros_like(maximum) for _ in range(3))
    expected = hidden.new_zeros(hidden.shape if with_gradient else (len(hidden), 0), dtype=torch.float32)
    label_logits = torch.empty_like(maximum)
    for start in range(0, num_tokens, NUM_TOKENS):
        tile = weight[start : start + NUM_TOKENS]
        tile_bias = None if bias is None else bias[start : start + NUM_TOKENS]
        logits = nn.functional.linear(hidden, tile, tile_bias).float().div_(temperature)
        at = labels - start
        inside = (at >= 0) & (at < len(tile))
        label_logits[inside] = logits[inside, at[inside]]

        new_maximum = torch.maximum(maximum, logits.amax(-1))
        shrink = (maximum - new_maximum).exp()
        maximum = new_maximum
        exps = (logits - maximum[:, None]).exp_()
        total = total * shrink + exps.sum(-1)
        plain += logits.sum(-1)
        if with_gradient:
            expected = expected * shrink[:, None] + exps.to(weight.dtype) @ tile
        weighted = weighted * shrink + logits.mul_(exps).sum(-1)
    normalizer = maximum + total.log()
    if with_gradient:
        expected = (weight[labels].float() - expected / total[:, None]) / temperature
    entropy = normalizer - weighted / total
    return label_logits - normalizer, entropy, plain / num_tokens, label_logits == maximum, expected


@dataclass
class _Segment:
    """A prompt or a completion in the packed row: its slice, and the prompt's slice if it is a completion."""

    tokens: slice
    prompt: slice | None = None
    mask: torch.Tensor | None = None


def _segment_attention(module, query, key, value, attention_mask, scaling=None, segments=(), **kwargs):
    """
    Attention of the packed row: causal within a segment, and a completion sees all of its prompt.

    Takes and returns what transformers' attention functions do: query, key, value of shape (1, heads, length, size),
    an output of shape (1, length, heads, size).
    """
    outputs = []
    for segment in segments:
        q, k, v = (states[:, :, segment.tokens] for states in (query, key, value))
        if segment.prompt is not None:
            k = torch.cat([key[:, :, segment.prompt], k], dim=2)
            v = torch.cat([value[:, :, segment.prompt], v], dim=2)
        outputs.append(
            nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=segment.mask, is_causal=segment.mask is None, scale=scaling, enable_gqa=True
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2), None


AttentionInterface.register("prompt_and_completions", _segment_attention)
AttentionMaskInterface.register("prompt_and_completions", lambda *args, **kwargs: None)


def _scored_states(model, input_ids, attention_mask, labels) -> torch.Tensor:
    """
    Hidden states of the positions that predict a label, shape (number of labels, hidden), in row order.

    The batch is run as one packed row without padding, in which a prompt that several rows share appears once.
    """
    device = input_ids.device
    packed, positions, segments = [], [], []
    scored = [torch.empty(0, dtype=torch.long, device=device)]  # and none, if all labels are masked
    prompt_slices = {}
    end = 0
    for ids, mask, row_labels in zip(input_ids, attention_mask.bool(), labels, strict=True):
        ids, is_label = ids[mask], (row_labels != -100)[mask]
        first = int(is_label.int().argmax()) if is_label.any() else len(ids)
        prompt = tuple(ids[:first].tolist())
        if prompt not in prompt_slices:
            prompt_slices[prompt] = slice(end, end + first)
            segments.append(_Segment(prompt_slices[prompt]))
            packed.append(ids[:first])
            positions.append(torch.arange(first, device=device))
            end += first
        prompt_slice, length = prompt_slices[prompt], len(ids) - first
        if not length:
            continue
        causal = torch.ones(length, first + length, dtype=torch.bool, device=device).tril(diagonal=first)
        segments.append(_Segment(slice(end, end + length), prompt_slice, causal))
        packed.append(ids[first:])
        positions.append(torch.arange(first, first + length, device=device))
        # A label is predicted by the position before it: the first by the prompt's last
        predictors = torch.cat([torch.tensor([prompt_slice.stop - 1]), torch.arange(end, end + length - 1)]).to(device)
        scored.append(predictors[is_label[first:]])
        end += length

    attention = model.config._attn_implementation
    model.config._attn_implementation = "prompt_and_completions"
    try:
        hidden_states = model.base_model(
            input_ids=torch.cat(packed)[None],
            position_ids=torch.cat(positions)[None],
            use_cache=False,
            segments=segments,
        ).last_hidden_state[0]
    finally:
        model.config._attn_implementation = attention
    return hidden_states[torch.cat(scored)]


def _can_be_packed(model: PreTrainedModel) -> bool:
    """
    Whether the model's attention is a function that can be exchanged, over the whole context.

    Not with gradient checkpointing: the layers run again in the backward, when the exchange is over.
    """
    config = model.config.get_text_config()
    if layer_types := getattr(config, "layer_types", None):
        sees_everything = set(layer_types) == {"full_attention"}
    else:
        sees_everything = getattr(config, "sliding_window", None) is None
    return (
        has_plain_lm_head(model)
        and not (model.training and model.is_activation_checkpointing)
        and model._supports_attention_backend
        and sees_everything
    )


def add_packed_lm_head(model: PreTrainedModel, temperature: float = 1.0) -> None:
    """
    Replace the fused LM head that TRL put on `model` by the one of this file, for CPU tensors and a frozen head.

    The contract is TRL's: `model(..., labels=labels, fused_lm_head=True)` returns per-token log-probabilities,
    entropies, mean logits and whether the label is the likeliest token, zero where the label is -100; every other call
    is the model's own forward. TRL's SFTTrainer, RLOOTrainer and DPOTrainer use it.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Policy of a TRL trainer, whose base went through `trl.trainer.utils.add_fused_lm_head`.
        temperature (`float`, *optional*, defaults to `1.0`):
            Divides the logits.
    """
    model = base_model(model)
    trl_forward = model.forward

    @functools.wraps(type(model).forward)
    def forward(self, *args, fused_lm_head=False, **kwargs):
        head = self.get_output_embeddings()
        if not fused_lm_head:
            return trl_forward(*args, **kwargs)
        if head.weight.requires_grad or kwargs.get("output_router_logits") or not _can_be_packed(self):
            return trl_forward(*args, fused_lm_head=True, **kwargs)
        input_ids, attention_mask, labels = (kwargs[name] for name in ("input_ids", "attention_mask", "labels"))
        # Autocast brings activations to bf16 for the adapter's products: PEFT need not bring them to fp32 before
        with disable_input_dtype_casting(self, active=torch.is_autocast_enabled("cpu")), lora_in_place(self):
            hidden_states = _scored_states(self, input_ids, attention_mask, labels)
        labels = labels[:, 1:]
        mask = labels != -100
        scores = _FrozenHeadLogProbs.apply(hidden_states, head.weight, head.bias, labels[mask], temperature)
        log_probs, entropy, mean_logits, is_top1 = (x.new_zeros(mask.shape).masked_scatter(mask, x) for x in scores)
        return FusedCausalLMOutput(
            log_probs=log_probs, entropy=entropy, mean_logits=mean_logits, is_top1=is_top1, label_mask=mask
        )

    model.forward = types.MethodType(forward, model)
