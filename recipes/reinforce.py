"""
Stage 2a, REINFORCE: pay the policy for every completion that passes its tests, minus a price for its tokens.

The run itself stands in `policy_gradient.py`, the algorithm in `trainers/reinforce.py`.

    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/reinforce.py \
        --config recipes/qwen2.5-coder-0.5b/reinforce.yaml
"""

from policy_gradient import train_policy_gradient

from trainers import ReinforceConfig, ReinforceTrainer

if __name__ == "__main__":
    train_policy_gradient("reinforce", ReinforceTrainer, ReinforceConfig)
