"""
Stage 2a, REINFORCE: reward 1 per completion that passes its tests, minus a per-token penalty.

The run is in `common/policy_gradient.py`, the algorithm in `trainers/reinforce.py`.

    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/reinforce.py \
        --config recipes/qwen2.5-coder-0.5b/reinforce.yaml
"""

from recipes.common.policy_gradient import train_policy_gradient
from trainers import ReinforceConfig, ReinforceTrainer

if __name__ == "__main__":
    train_policy_gradient("reinforce", ReinforceTrainer, ReinforceConfig)
