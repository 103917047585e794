"""The settings that REINFORCE and PPO-Clip share."""

from dataclasses import dataclass, field

from trl import RLOOConfig

BASELINES = ("none", "batch", "group")


@dataclass
class PolicyGradientConfig(RLOOConfig):
    """
    Configuration of both trainers: [`~trl.RLOOConfig`] with other defaults, one completion a prompt allowed, and a
    choice of baseline. The fields that differ are described by their `help`.
    """

    num_generations: int = field(default=1, metadata={"help": "Number of completions sampled for each prompt."})
    num_generations_eval: int = field(
        default=1,
        metadata={
            "help": "Number of completions for each prompt of the eval dataset. They are decoded greedily, so that "
            "`eval_pass_rate` is pass@1. With several processes, accelerate fills the last batch with tasks that then "
            "count twice."
        },
    )
    beta: float = field(
        default=0.0,
        metadata={"help": "Coefficient of the KL penalty to the starting policy that is subtracted from the reward."},
    )
    gradient_checkpointing: bool | None = field(
        default=None,
        metadata={
            "help": "Whether to recompute activations in the backward to save memory. If not set, `True` on an "
            "accelerator and `False` on a CPU, where log-probabilities need less memory without it than TRL's with it."
        },
    )
    disable_dropout: bool = field(
        default=True,
        metadata={
            "help": "Whether to disable dropout. Rollouts come from the policy without dropout, so the loss should too."
        },
    )
    baseline: str = field(
        default="none",
        metadata={
            "help": "What is subtracted from the reward to give the advantage: nothing (`none`), the mean of the "
            "global batch (`batch`), or the mean of the prompt's other completions (`group`, as RLOO does).",
            "choices": list(BASELINES),
        },
    )
    drop_uninformative_groups: bool = field(
        default=False,
        metadata={
            "help": "Whether to leave out prompts whose completions all pass or all fail: of the advantages, the loss "
            "and its forward and backward. Such a group teaches length at most. Rewards that log no `verdict` (all but "
            "`UnitTestReward`) are compared instead. The loss is the mean over the completions that are left."
        },
    )
    min_advantage_std: float = field(
        default=0.0,
        metadata={
            "help": "Lower bound on the standard deviation that normalized advantages are divided by. In a batch "
            "without a pass, rewards differ by the length penalty alone, and a division by so small a deviation trains "
            "on length at full size."
        },
    )

    def __post_init__(self):
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: write a number above 0 and at most 1 (1 keeps every token)")
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}: write a number above 0, the policy is sampled from")
        if self.baseline not in BASELINES:
            raise ValueError(f"baseline is {self.baseline!r}: write one of {', '.join(map(repr, BASELINES))}")
        if self.baseline == "group" and self.num_generations < 2:
            raise ValueError("baseline 'group' compares completions of one prompt: set num_generations to 2 or more")
        if self.drop_uninformative_groups and self.num_generations < 2:
            raise ValueError(
                "drop_uninformative_groups compares completions of one prompt: set num_generations to 2 or more"
            )
        if self.min_advantage_std < 0:
            raise ValueError(f"min_advantage_std is {self.min_advantage_std}: write 0 or more")
        if self.use_transformers_continuous_batching:
            raise ValueError(
                "use_transformers_continuous_batching would cast an fp32 adapter to bf16: set it to false, or use_vllm"
            )
        checkpointing = (self.gradient_checkpointing, self.activation_checkpointing)  # two names of one setting
        num_generations = self.num_generations
        if num_generations == 1:
            # RLOOConfig's own baseline needs two. Its other checks hold for one if they hold for twice the batch.
            self.num_generations = 2
            self.per_device_train_batch_size *= 2
            if self.generation_batch_size is not None:
                self.generation_batch_size *= 2
        super().__post_init__()
        if num_generations == 1:
            self.num_generations = 1
            self.per_device_train_batch_size //= 2
            self.generation_batch_size //= 2
        if checkpointing == (None, None):
            self.gradient_checkpointing = self.activation_checkpointing = self.device.type != "cpu"
