"""Draw tokens from next-token logits: temperature, top-k and nucleus, as transformers' warpers define them."""

import torch

# Most likely tokens that are tried before a whole vocabulary is sorted: on a CPU a sort of 32 x 151,936 logits takes
# 152 ms, a top-k of 1,024 takes 10
NUM_CANDIDATES = 1024


def sample_tokens(
    logits: torch.Tensor, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, in_graph: bool = False
) -> torch.Tensor:
    """
    Draw one token a row from the truncated distribution.

    Temperature first, then top-k, then the nucleus: the smallest set of most likely tokens whose mass reaches `top_p`
    (Holtzman et al. 2020, https://huggingface.co/papers/1904.09751). Exactly transformers' warpers in their order.

    Args:
        logits (`torch.Tensor` of shape `(rows, vocab)`):
            Next-token logits.
        temperature (`float`, *optional*, defaults to `1.0`):
            Divides the logits; 0 is greedy.
        top_p (`float`, *optional*, defaults to `1.0`):
            Mass of the nucleus, in (0, 1].
        top_k (`int`, *optional*, defaults to `0`):
            Number of most likely tokens to keep; 0 keeps all.
        in_graph (`bool`, *optional*, defaults to `False`):
            Sort the whole vocabulary for a nucleus, without asking whether that is necessary, so that a CUDA graph can
            hold the call. The distribution is the same.

    Returns:
        `torch.Tensor` of shape `(rows,)`: Token ids.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probs = (logits.float() / temperature).softmax(-1)
    if top_p == 1 and not top_k:
        return _draw(probs)
    if in_graph and not top_k:
        candidates, tokens = probs.sort(descending=True)
    else:
        candidates, tokens = probs.topk(min(top_k or NUM_CANDIDATES, probs.size(-1)))
        if top_k:  # a nucleus is a share of what top-k left
            candidates = candidates / candidates.sum(-1, keepdim=True)
        elif (candidates.sum(-1) < top_p).any():
            candidates, tokens = probs.sort(descending=True)
    mass_before = candidates.cumsum(-1) - candidates
    candidates = candidates.masked_fill(mass_before >= top_p, 0.0)
    return tokens.gather(-1, _draw(candidates)[:, None])[:, 0]


def _draw(weights: torch.Tensor) -> torch.Tensor:
    """One index a row, in proportion to `weights` of shape (rows, n); inverse CDF, one uniform number a row."""
    cumulative = weights.double().cumsum(-1)
    target = torch.rand(weights.size(0), 1, dtype=torch.double, device=weights.device) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=weights.size(-1) - 1)
