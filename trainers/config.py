"""The settings that REINFORCE and PPO-Clip share."""

from dataclasses import dataclass, field

from trl import RLOOConfig

BASELINES = ("none", "batch", "group")


@dataclass
class PolicyGradientConfig(RLOOConfig):
    r"""
    Configuration of both trainers: [`~trl.RLOOConfig`] with other defaults, one completion a prompt allowed, and a
    choice of baseline.

    Parameters:
        num_generations (`int`, *optional*, defaults to `1`):
            Completions sampled for each prompt.
        num_generations_eval (`int`, *optional*, defaults to `1`):
            Completions for each prompt of `eval_dataset`, which are decoded greedily: `eval_pass_rate` is pass@1. With
            several processes, accelerate fills up the last batch with tasks that count twice then.
        beta (`float`, *optional*, defaults to `0.0`):
            Coefficient of the KL penalty that is subtracted from the reward.
        gradient_checkpointing (`bool`, *optional*):
            Whether activations are computed again in the backward to save memory. If not set, `True`, but `False` on a
            CPU, where the log-probabilities without it need less memory than TRL's with it.
        disable_dropout (`bool`, *optional*, defaults to `True`):
            Rollouts come from the policy without dropout, and so must the log-probabilities they are trained on.
        baseline (`str`, *optional*, defaults to `"none"`):
            What is subtracted from the reward to give the advantage: `"none"`, the mean of the global batch
            (`"batch"`), or the mean of the prompt's other completions (`"group"`, leave-one-out, as in RLOO).
        normalize_advantages (`bool`, *optional*):
            Whether the advantages of the global batch are brought to mean 0 and standard deviation 1.
    """

    num_generations: int = field(default=1, metadata={"help": "Number of completions sampled for each prompt."})
    num_generations_eval: int = field(
        default=1, metadata={"help": "Number of completions, decoded greedily, for each prompt of the eval dataset."}
    )
    beta: float = field(default=0.0, metadata={"help": "Coefficient of the KL penalty subtracted from the reward."})
    gradient_checkpointing: bool | None = field(
        default=None,
        metadata={"help": "Whether to compute activations again to save memory. If not set, `True` but on a CPU."},
    )
    disable_dropout: bool = field(
        default=True,
        metadata={
            "help": "Whether to disable dropout: rollouts come from the policy without it, and so should the loss."
        },
    )
    baseline: str = field(
        default="none",
        metadata={
            "help": "What is subtracted from the reward: nothing, the mean of the global batch, or the mean of the "
            "prompt's other completions.",
            "choices": list(BASELINES),
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
        if self.use_transformers_continuous_batching:
            raise ValueError(
                "use_transformers_continuous_batching would cast an fp32 adapter to bf16: set it to false, or use_vllm"
            )
        checkpointing = (self.gradient_checkpointing, self.activation_checkpointing)  # two names of one setting
        try:
            super().__post_init__()
        except ValueError as error:
            # The last check of RLOOConfig, which has a leave-one-out baseline only
            if self.num_generations != 1 or "at least 2 generations" not in str(error):
                raise
        if checkpointing == (None, None):
            self.gradient_checkpointing = self.activation_checkpointing = self.device.type != "cpu"
