"""Draw tokens from next-token logits: temperature, top-k and nucleus, as transformers' warpers define them."""

import torch

# Most likely tokens that are tried before a whole vocabulary is sorted: on a CPU a sort of 32 x 151,936 logits takes
# 152 ms, a top-k of 1,024 takes 10
NUM_CANDIDATES = 1024
# A probability of 1 as a 64-bit integer: a row's sum fits, and what rounding takes from a token is below 2^-50
MASS_OF_ONE = 1 << 50


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
            Find the nucleus by a fixed number of operations and without asking the host, so that a CUDA graph can hold
            the call. The distribution is the same. Where tokens are equally likely at the edge of the nucleus, and only
            some of them belong to it, those of lower ids do; otherwise the sort decides.

    Returns:
        `torch.Tensor` of shape `(rows,)`: Token ids.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probs = (logits.float() / temperature).softmax(-1)
    if top_p == 1 and not top_k:
        return _draw(probs)
    if in_graph and not top_k:
        return _draw(probs.masked_fill(~_in_nucleus(probs, top_p), 0.0))

    candidates, tokens = probs.topk(min(top_k or NUM_CANDIDATES, probs.size(-1)))
    if top_k:  # a nucleus is a share of what top-k left
        candidates = candidates / candidates.sum(-1, keepdim=True)
    elif (candidates.sum(-1) < top_p).any():
        candidates, tokens = probs.sort(descending=True)
    mass_before = candidates.cumsum(-1) - candidates
    candidates = candidates.masked_fill(mass_before >= top_p, 0.0)
    return tokens.gather(-1, _draw(candidates)[:, None])[:, 0]


def _in_nucleus(probs: torch.Tensor, top_p: float) -> torch.Tensor:
    """
    Return which tokens of each row belong to the nucleus, without a sort.

    The least probability of the nucleus is the greatest one whose tokens, with all that are likelier, have the mass.
    Probabilities are ordered as their bits are, read as integers, of which 1.0 has 30. So three histograms of the mass,
    over ten bits each, find it. Mass is counted in integers, whose sums do not depend on their order.
    """
    bits = probs.view(torch.int32)
    mass = (probs.double() * MASS_OF_ONE).long()
    needed = round(MASS_OF_ONE * torch.tensor(top_p).item())  # as the fp32 number that the sort compares with
    least = torch.zeros_like(bits[:, :1])
    mass_above = torch.zeros_like(mass[:, :1])  # of tokens likelier than all that `least` may still become
    for shift in (20, 10, 0):
        is_other = bits >> shift + 10 != least >> shift + 10
        histogram = mass.new_zeros(len(mass), 1 << 10)
        histogram.scatter_add_(1, (bits >> shift & 0x3FF).long(), mass.masked_fill(is_other, 0))
        mass_from = mass_above + histogram.flip(1).cumsum(1).flip(1)
        digit = ((mass_from >= needed).sum(1, keepdim=True) - 1).clamp(min=0)
        mass_above = mass_from.gather(1, digit) - histogram.gather(1, digit)
        least = least | digit.int() << shift
    is_above, is_least = bits > least, bits == least
    # Of tokens that are equally likely, the first ones, until the mass is reached
    mass_of_least = (least.view(torch.float32).double() * MASS_OF_ONE).long()
    return is_above | is_least & ((is_least.cumsum(-1) - 1) * mass_of_least < needed - mass_above)


def _draw(weights: torch.Tensor) -> torch.Tensor:
    """One index a row, in proportion to `weights` of shape (rows, n); inverse CDF, one uniform number a row."""
    cumulative = weights.double().cumsum(-1)
    target = torch.rand(weights.size(0), 1, dtype=torch.double, device=weights.device) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=weights.size(-1) - 1)
