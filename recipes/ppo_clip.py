"""
Stage 2b, PPO-Clip: REINFORCE's reward, several epochs over each rollout, the ratio of whole completions clipped.

The run is in `common/policy_gradient.py`, the algorithm in `trainers/ppo_clip.py`.

    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/ppo_clip.py \
        --config recipes/qwen2.5-coder-0.5b/ppo_clip.yaml
"""

from recipes.common.policy_gradient import train_policy_gradient
from trainers import PPOClipConfig, PPOClipTrainer

if __name__ == "__main__":
    train_policy_gradient("ppo_clip", PPOClipTrainer, PPOClipConfig)
