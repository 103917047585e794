"""REINFORCE: the plain policy gradient, one step a rollout."""

import textwrap
from dataclasses import dataclass

import torch

from .config import PolicyGradientConfig
from .policy_gradient import PolicyGradientTrainer


@dataclass
class ReinforceConfig(PolicyGradientConfig):
    """
    Configuration of [`ReinforceTrainer`].

    With the defaults (`baseline="none"`, `normalize_advantages=False`) the advantage is the reward itself, which is
    vanilla REINFORCE. See [`PolicyGradientConfig`] for the fields.
    """

    def __post_init__(self):
        super().__post_init__()
        if self.num_iterations != 1:
            raise ValueError(
                f"num_iterations is {self.num_iterations}: REINFORCE takes one step a rollout, set it to 1"
            )


class ReinforceTrainer(PolicyGradientTrainer):
    r"""
    Trainer for REINFORCE (Williams 1992, https://doi.org/10.1007/BF00992696):

    $$ L = -\frac{1}{N} \sum_i A_i \log \pi_\theta(c_i \mid p_i), \qquad
       \log \pi_\theta(c \mid p) = \sum_t \log \pi_\theta(c_t \mid p, c_{<t}) $$

    Example:

    ```python
    from peft import LoraConfig
    from rewards import UnitTestReward, load_tasks
    from trainers import ReinforceConfig, ReinforceTrainer

    trainer = ReinforceTrainer(
        model="Qwen/Qwen2.5-Coder-0.5B-Instruct",
        reward_funcs=UnitTestReward(length_penalty=0.01),
        args=ReinforceConfig("runs/reinforce", learning_rate=5e-6, max_completion_length=256),
        train_dataset=load_tasks("humaneval", "train"),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
    )
    trainer.train()
    ```

    Args:
        model, reward_funcs, args, train_dataset, ...:
            As [`~trl.RLOOTrainer`] takes them; `args` is a [`ReinforceConfig`].
    """

    config_class = ReinforceConfig
    _tag_names = ["trl", "reinforce"]
    _name = "REINFORCE"
    _paper = {
        "title": "Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning",
        "citation": textwrap.dedent("""\
            @article{williams1992simple,
                title   = {{Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning}},
                author  = {Ronald J. Williams},
                year    = 1992,
                journal = {Machine Learning},
                volume  = 8,
                pages   = {229--256},
            }"""),
    }

    def policy_loss(self, per_token_logps: torch.Tensor, inputs: dict) -> torch.Tensor:
        logps = (per_token_logps * inputs["completion_mask"]).sum(1)
        return -(inputs["advantages"] * logps).mean()
