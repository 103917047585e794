"""The trainers: policy, tasks, rewards -> better policy."""

from .log_probs import add_cpu_lm_head
from .policy_gradient import keep_adapter_in_fp32
from .ppo_clip import PPOClipConfig, PPOClipTrainer
from .reinforce import ReinforceConfig, ReinforceTrainer
from .rollout import generate_completions


__all__ = [
    "PPOClipConfig",
    "PPOClipTrainer",
    "ReinforceConfig",
    "ReinforceTrainer",
    "add_cpu_lm_head",
    "generate_completions",
    "keep_adapter_in_fp32",
]
