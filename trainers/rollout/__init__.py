"""Rollouts: token ids and texts of a batch of completions, for training, evaluation and preference sampling alike."""

from .decoding import decode_completions
from .eager import generate_completions

__all__ = ["decode_completions", "generate_completions"]
