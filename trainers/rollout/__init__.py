"""Rollouts: token ids and texts of a batch of completions, for training, evaluation and preference sampling alike."""

from .continuous import continuous_completions
from .decoding import decode_completions
from .generate import generate_completions

__all__ = ["continuous_completions", "decode_completions", "generate_completions"]
