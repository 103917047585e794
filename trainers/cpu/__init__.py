"""Kernels for CPUs: linear layers on packed weights, and log-probabilities of a packed batch."""

from .linear import packed_linears
from .log_probs import add_packed_lm_head

__all__ = ["add_packed_lm_head", "packed_linears"]
