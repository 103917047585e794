"""The settings that REINFORCE and PPO-Clip share."""

import os
from dataclasses import dataclass, field

from accelerate.utils import parse_flag_from_env
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
            "help": "Whether to recompute activations in the backward to save memory. If not set: `False` on a CPU, "
            "where these trainers need less memory without it than TRL's with it; `True` if FSDP or DeepSpeed "
            "shards the model; on one GPU `True` if the activations of a micro-batch take more than half of the "
            "memory that is free once the weights are loaded. They are estimated as layers * (8 * intermediate_size + "
            "22 * hidden_size) bytes a token in 16 bits, for `per_device_train_batch_size` times the longest prompt "
            "and `max_completion_length`: 1.4 MB a token for 0.5B, so 17 GB for 32 completions of 128 tokens after "
            "prompts of 250."
        },
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={
            "help": "Whether a loss that is not finite is left out of the logged mean. Such a loss ends a run, except "
            "in fp16, and checking again would wait for the GPU after every micro-batch."
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
            "help": "Whether prompts whose completions all pass or all fail are left out of the advantages, the loss "
            "and its forward and backward. Such a group teaches length at most. Where `UnitTestReward` is not the only "
            "reward function, rewards are compared instead. The loss is the mean over the completions that are left."
        },
    )
    min_advantage_std: float = field(
        default=0.0,
        metadata={
            "help": "Lower bound on the standard deviation that normalized advantages are divided by. In a batch "
            "without a pass, rewards differ only by the length penalty, and dividing by so small a value gives a "
            "full-size update on length."
        },
    )

    vllm_importance_sampling_correction: bool = field(
        default=True,
        metadata={
            "help": "Whether to multiply the loss of completions from vLLM by the ratio of their probability under the "
            "policy to that under vLLM, whose kernels round differently."
        },
    )
    vllm_importance_sampling_clip_max: float = field(
        default=3.0, metadata={"help": "Upper bound of vLLM's correction ratios, one per completion."}
    )

    def __post_init__(self):
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: write a number above 0 and at most 1 (1 keeps every token)")
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}: write a number above 0, the policy is sampled from")
        if not self.vllm_importance_sampling_clip_max > 0:
            raise ValueError(
                f"vllm_importance_sampling_clip_max is {self.vllm_importance_sampling_clip_max}: write a number above 0"
            )
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
        if self.min_advantage_std > 0 and not self.normalize_advantages:
            raise ValueError(
                f"min_advantage_std is {self.min_advantage_std}, which only normalized advantages are divided by: set "
                "normalize_advantages to true, or min_advantage_std to 0"
            )
        if self.auto_find_batch_size:
            raise ValueError(
                "auto_find_batch_size would change the number of completions of a rollout: set it to false, and lower "
                "per_device_train_batch_size while raising gradient_accumulation_steps"
            )
        is_sharded = any(parse_flag_from_env(f"ACCELERATE_USE_{name}") for name in ("FSDP", "DEEPSPEED"))
        if is_sharded and self.use_transformers_continuous_batching:
            raise ValueError(
                "use_transformers_continuous_batching needs the whole weights on each GPU, and FSDP and DeepSpeed "
                "shard them: set it to false, or use_vllm to true"
            )
        if self.use_vllm and parse_flag_from_env("ACCELERATE_USE_FSDP") and os.environ.get("FSDP_VERSION") != "2":
            raise ValueError(
                "use_vllm needs version 2 of FSDP, whose weights can be merged one at a time: set fsdp_version"
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
            # None on one accelerator: the trainer decides once the weights are on it
            default = False if self.device.type == "cpu" else True if is_sharded else None
            self.gradient_checkpointing = self.activation_checkpointing = default
