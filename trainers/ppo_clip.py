"""PPO-Clip without a critic: several epochs on each rollout, with the ratio of whole completions clipped."""

import textwrap
from dataclasses import dataclass, field

import torch
from accelerate.utils import parse_flag_from_env

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
    importance_sampling_level: str = field(
        default="sequence",
        metadata={
            "help": "What has a ratio that is clipped: the whole completion (`sequence`, the published form) or each "
            "of its tokens (`token`). At a ratio of 1 both have the same gradient.",
            "choices": ["sequence", "token"],
        },
    )
    target_kl: float | None = field(
        default=None,
        metadata={
            "help": "Approximate KL, per completion, from the rollout's policy to the current one. An optimizer step "
            "that finds it exceeded is skipped, and so are the remaining steps on that rollout. If not set, none is."
        },
    )
    dual_clip: float | None = field(
        default=None,
        metadata={
            "help": "Bound, above 1, on the ratio of completions with a negative advantage (dual-clip PPO, Ye et al. "
            "2020, https://huggingface.co/papers/1912.09729, eq. 5). If not set, their ratio has no upper bound."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.normalize_advantages and self.generation_batch_size < 2:
            raise ValueError(
                "the advantage of a single completion cannot be normalized: raise per_device_train_batch_size or "
                "gradient_accumulation_steps, or set normalize_advantages to false"
            )
        if self.importance_sampling_level not in ("sequence", "token"):
            raise ValueError(
                f"importance_sampling_level is {self.importance_sampling_level!r}: write 'sequence' or 'token'"
            )
        if self.target_kl is not None and not self.target_kl > 0:
            raise ValueError(f"target_kl is {self.target_kl}: write a number above 0, or leave it out")
        if self.target_kl is not None and self.fp16:
            raise ValueError(
                "target_kl skips backward passes, and the loss scaler of fp16 needs one in every step: leave it out"
            )
        if self.target_kl is not None and parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
            raise ValueError("target_kl skips optimizer steps, which DeepSpeed takes within the backward: leave it out")
        num_micro_batches = self.steps_per_generation * self.num_iterations
        if self.target_kl is not None and num_micro_batches % self.gradient_accumulation_steps:
            raise ValueError(
                f"target_kl skips the optimizer steps of one rollout, but its {num_micro_batches} micro-batches "
                f"(steps_per_generation * num_iterations) end within a step of {self.gradient_accumulation_steps}: set "
                "gradient_accumulation_steps to a divisor of their number"
            )
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"dual_clip is {self.dual_clip}: write a number above 1, or leave it out")


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

    def policy_loss(self, per_token_logps: torch.Tensor, inputs: dict) -> torch.Tensor:
        mask, advantages = inputs["completion_mask"], inputs["advantages"][:, None]
        old_per_token_logps = inputs.setdefault("old_per_token_logps", per_token_logps.detach())
        log_ratio = (per_token_logps - old_per_token_logps) * mask
        if self.args.importance_sampling_level == "sequence":
            log_ratio, mask = log_ratio.sum(1, keepdim=True), torch.ones_like(advantages)
        log_ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        ratio = log_ratio.exp()
        surrogate = torch.min(ratio * advantages, ratio.clamp(1 - self.epsilon_low, 1 + self.epsilon_high) * advantages)
        if self.args.dual_clip is not None:
            surrogate = torch.where(advantages < 0, torch.max(surrogate, self.args.dual_clip * advantages), surrogate)
        self._record(ratio.detach(), log_ratio.detach(), advantages, mask)
        return -(surrogate * mask).sum(1).mean()

    def _record(self, ratio, log_ratio, advantages, mask) -> None:
        """
        Measure clip fractions, the range of the ratios and the approximate KL. All arguments broadcast to one shape.
        """
        mask = mask.bool() | ~mask.bool().any()  # no completion counts: all do, their ratios are 1
        low = (ratio < 1 - self.epsilon_low) & (advantages < 0)
        high = (ratio > 1 + self.epsilon_high) & (advantages > 0)

        def share(clipped):
            return (clipped & mask).sum() / mask.sum()

        self.measured |= {
            "clip_ratio/low_mean": share(low),
            "clip_ratio/high_mean": share(high),
            "clip_ratio/region_mean": share(low | high),
            # KL(old || new) of whole completions, by the unbiased estimator k3
            # (Schulman 2020, http://joschu.net/blog/kl-approx.html)
            "approx_kl": ((ratio - 1 - log_ratio) * mask).sum(1).mean(),
            "ratio/min": ratio.masked_fill(~mask, torch.inf).amin(),
            "ratio/max": ratio.masked_fill(~mask, -torch.inf).amax(),
        }

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        if self.args.target_kl is None:
            return super().training_step(model, inputs, num_items_in_batch)
        cycle = self.args.steps_per_generation * self.num_iterations
        is_skipped = self._step % cycle > 0 and self._buffered_inputs[0].get("skipped", False)
        if is_skipped:
            self._step += 1
            loss = torch.zeros((), device=self.accelerator.device)
        else:
            loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            kls = self._metrics["train"]["approx_kl"][-self.args.gradient_accumulation_steps :]  # of this step
            if not is_skipped and sum(kls) / len(kls) > self.args.target_kl:
                is_skipped = self._buffered_inputs[0]["skipped"] = True  # in the buffer, so that a checkpoint keeps it
                model.zero_grad()  # without a gradient the optimizer leaves the weights
            self._metrics["train"]["skipped_epochs"].append(float(is_skipped))
        return loss
