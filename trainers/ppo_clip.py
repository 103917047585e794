"""PPO-Clip without a critic: several epochs on each rollout, with the ratio of whole completions clipped."""

import textwrap
from dataclasses import dataclass, field

import torch
from accelerate.utils import gather

from .config import PolicyGradientConfig
from .policy_gradient import PolicyGradientTrainer

# exp(20) is 5e8: a larger ratio carries no more information
MAX_LOG_RATIO = 20.0


@dataclass
class PPOClipConfig(PolicyGradientConfig):
    """Configuration of [`PPOClipTrainer`]. The ratio is clipped to [1 - epsilon, 1 + epsilon], 0.2 by default."""

    num_iterations: int = field(default=4, metadata={"help": "Number of epochs on each rollout."})
    normalize_advantages: bool = field(
        default=True,
        metadata={
            "help": "Whether to normalize the advantages of the global batch to mean 0 and standard deviation 1."
        },
    )


class PPOClipTrainer(PolicyGradientTrainer):
    r"""
    Trainer for PPO's clipped surrogate (Schulman et al. 2017, https://huggingface.co/papers/1707.06347, eq. 7), where
    an action is a whole completion:

    $$ L = -\frac{1}{N} \sum_i \min\left(r_i A_i, \operatorname{clip}(r_i, 1 - \epsilon, 1 + \epsilon) A_i\right),
       \qquad r_i = \exp\left(\log \pi_\theta(c_i \mid p_i) - \log \pi_{\text{old}}(c_i \mid p_i)\right) $$

    There is no critic: the advantage is the reward, normalised over the global batch.

    Example:

    ```python
    from peft import LoraConfig
    from rewards import UnitTestReward, load_tasks
    from trainers import PPOClipConfig, PPOClipTrainer

    trainer = PPOClipTrainer(
        model="Qwen/Qwen2.5-Coder-0.5B-Instruct",
        reward_funcs=UnitTestReward(length_penalty=0.01),
        args=PPOClipConfig("runs/ppo_clip", learning_rate=5e-6, max_completion_length=256),
        train_dataset=load_tasks("humaneval", "train"),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
    )
    trainer.train()
    ```

    Args:
        model, reward_funcs, args, train_dataset, ...:
            As [`~trl.RLOOTrainer`] takes them; `args` is a [`PPOClipConfig`].
    """

    config_class = PPOClipConfig
    _tag_names = ["trl", "ppo-clip"]
    _name = "PPO-Clip"
    _paper = {
        "title": "Proximal Policy Optimization Algorithms",
        "id": "1707.06347",
        "citation": textwrap.dedent("""\
            @article{schulman2017proximal,
                title   = {{Proximal Policy Optimization Algorithms}},
                author  = {John Schulman and Filip Wolski and Prafulla Dhariwal and Alec Radford and Oleg Klimov},
                year    = 2017,
                journal = {arXiv preprint arXiv:1707.06347},
            }"""),
    }

    @property
    def needs_old_logps(self) -> bool:
        # A rollout within one optimizer step: the first epoch's own forward is still the old policy's
        steps = self.args.gradient_accumulation_steps
        fits_a_step = self.args.steps_per_generation <= steps
        starts_with_one = self.args.steps_per_generation * self.num_iterations % steps == 0
        return not (fits_a_step and starts_with_one)

    def policy_loss(self, logps: torch.Tensor, inputs: dict) -> torch.Tensor:
        old_logps = inputs.setdefault("old_logps", logps.detach())
        advantages = inputs["advantages"]
        log_ratio = (logps - old_logps).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        ratio = log_ratio.exp()
        clipped_ratio = ratio.clamp(1 - self.epsilon_low, 1 + self.epsilon_high)

        low = gather((ratio.detach() < 1 - self.epsilon_low) & (advantages < 0))
        high = gather((ratio.detach() > 1 + self.epsilon_high) & (advantages > 0))
        ratios = gather(ratio.detach())
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["clip_ratio/low_mean"].append(low.float().mean().item())
        metrics["clip_ratio/high_mean"].append(high.float().mean().item())
        metrics["clip_ratio/region_mean"].append((low | high).float().mean().item())
        # KL(old || new), by the unbiased estimator k3 (Schulman 2020, http://joschu.net/blog/kl-approx.html)
        metrics["approx_kl"].append(gather(ratio.detach() - 1 - log_ratio.detach()).mean().item())
        metrics["ratio/min"].append(ratios.min().item())
        metrics["ratio/max"].append(ratios.max().item())
        return -torch.min(ratio * advantages, clipped_ratio * advantages).mean()
