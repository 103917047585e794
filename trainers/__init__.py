"""The trainers: policy, tasks, rewards -> better policy."""

from .adapters import adapter_values, keep_adapter_in_fp32
from .checkpoints import CompleteCheckpoints, last_checkpoint
from .device import run_device, supports_bf16, use_fast_log_probs
from .ppo_clip import PPOClipConfig, PPOClipTrainer
from .progress import ProgressLine, print_progress_lines
from .reinforce import ReinforceConfig, ReinforceTrainer
from .rollout import decode_completions, generate_completions

__all__ = [
    "CompleteCheckpoints",
    "PPOClipConfig",
    "PPOClipTrainer",
    "ProgressLine",
    "ReinforceConfig",
    "ReinforceTrainer",
    "decode_completions",
    "generate_completions",
    "adapter_values",
    "keep_adapter_in_fp32",
    "last_checkpoint",
    "print_progress_lines",
    "run_device",
    "supports_bf16",
    "use_fast_log_probs",
]
