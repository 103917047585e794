"""The trainers: policy, tasks, rewards -> better policy."""

from .adapters import keep_adapter_in_fp32
from .checkpoints import CompleteCheckpoints, last_checkpoint
from .log_probs import add_cpu_lm_head
from .ppo_clip import PPOClipConfig, PPOClipTrainer
from .reinforce import ReinforceConfig, ReinforceTrainer
from .rollout import generate_completions

__all__ = [
    "CompleteCheckpoints",
    "PPOClipConfig",
    "PPOClipTrainer",
    "ReinforceConfig",
    "ReinforceTrainer",
    "add_cpu_lm_head",
    "generate_completions",
    "keep_adapter_in_fp32",
    "last_checkpoint",
]
