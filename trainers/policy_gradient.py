"""
What REINFORCE and PPO-Clip share: the rollout step, the advantage, and the way to the loss.

TRL's `RLOOTrainer` brings generation with vLLM, reward functions, PEFT, distributed training, logging and checkpoints.
Replaced here are its rollout step (no forward for old log-probabilities, micro-batches without needless padding, and on
a CPU the rollout of `rollout.py`), its advantage and its loss. The private names of TRL this rests on, so that an
upgrade has one list to check: `_generate`, `_generate_single_turn`, `_calculate_rewards`, `_prepare_inputs`,
`_get_per_token_logps_and_entropies`, `_metrics`, `_logs`, `_pending_metrics`, `_pending_extra_logs`, `_step`,
`_buffered_inputs`, `_tokenizer`. Not covered: images.
"""

from dataclasses import dataclass, field

import torch
from accelerate.utils import gather, gather_object, is_peft_model
from transformers import PreTrainedModel
from trl import RLOOConfig, RLOOTrainer
from trl.trainer.utils import get_config_model_id, pad, use_adapter

from .log_probs import add_cpu_lm_head
from .rollout import generate_completions


BASELINES = ("none", "batch", "group")


@dataclass
class PolicyGradientConfig(RLOOConfig):
    r"""
    Configuration of both trainers: [`~trl.RLOOConfig`] with other defaults, one completion a prompt allowed, and a
    choice of baseline.

    Parameters:
        num_generations (`int`, *optional*, defaults to `1`):
            Completions sampled for each prompt.
        beta (`float`, *optional*, defaults to `0.0`):
            Coefficient of the KL penalty that is subtracted from the reward.
        disable_dropout (`bool`, *optional*, defaults to `True`):
            Rollouts come from the policy without dropout, and so must the log-probabilities they are trained on.
        baseline (`str`, *optional*, defaults to `"none"`):
            What is subtracted from the reward to give the advantage: `"none"`, the mean of the global batch
            (`"batch"`), or the mean of the prompt's other completions (`"group"`, leave-one-out, as in RLOO).
        normalize_advantages (`bool`, *optional*):
            Whether the advantages of the global batch are brought to mean 0 and standard deviation 1.
    """

    num_generations: int = field(default=1, metadata={"help": "Number of completions sampled for each prompt."})
    beta: float = field(default=0.0, metadata={"help": "Coefficient of the KL penalty subtracted from the reward."})
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
        try:
            super().__post_init__()
        except ValueError as error:
            # The last check of RLOOConfig, which has a leave-one-out baseline only
            if self.num_generations != 1 or "at least 2 generations" not in str(error):
                raise


class PolicyGradientTrainer(RLOOTrainer):
    """
    Base of [`ReinforceTrainer`] and [`PPOClipTrainer`], which define `policy_loss`.

    Takes what [`~trl.RLOOTrainer`] takes. LoRA parameters are kept in fp32, under a quantised base too: an AdamW step
    at a learning rate of 5e-6 on a bf16 weight of 1e-2 rounds to nothing.
    """

    config_class = PolicyGradientConfig

    def __init__(self, model, reward_funcs, args=None, *trainer_args, quantization_config=None, **kwargs):
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = self.config_class(f"{name.split('/')[-1]}-{self._name}")
        quantized = quantization_config is not None or getattr(model, "is_quantized", False)
        if quantized and args.device.type == "cpu":
            raise ValueError(
                "a quantised base cannot be trained after it has generated on a CPU (bitsandbytes repacks the weights "
                "at the first generation, and the packed layers have no gradient): set load_in_4bit to false"
            )
        is_adapter = isinstance(model, torch.nn.Module) and is_peft_model(model)
        adapter = (
            {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad} if is_adapter else {}
        )
        super().__init__(model, reward_funcs, args, *trainer_args, quantization_config=quantization_config, **kwargs)
        if is_peft_model(self.model):
            keep_adapter_in_fp32(self.model, adapter)
            if self.beta == 0.0 and "ref" in self.model.peft_config:
                self.model.delete_adapter("ref")  # RLOOTrainer's copy for the KL penalty
        if self._rolls_out_on_cpu:
            add_cpu_lm_head(self.model, self.temperature)

    @property
    def _rolls_out_on_cpu(self) -> bool:
        """Whether the rollout of this project runs: on a CPU, unless it is told something only transformers knows."""
        return (
            self.accelerator.device.type == "cpu"
            and not self.use_vllm
            and not self.use_transformers_continuous_batching
            and self.min_p is None
            and self.repetition_penalty == 1.0
            and not self.args.generation_kwargs
            and not self.args.cache_implementation
        )

    def policy_loss(self, logps: torch.Tensor, inputs: dict) -> torch.Tensor:
        """
        The loss of a micro-batch.

        Args:
            logps (`torch.Tensor` of shape `(batch_size,)`):
                Log-probability of each whole completion under the policy in training.
            inputs (`dict`):
                The micro-batch, with `advantages` of shape `(batch_size,)`.

        Returns:
            `torch.Tensor`: A scalar.
        """
        raise NotImplementedError

    def advantages(self, rewards: torch.Tensor, num_generations: int) -> torch.Tensor:
        """
        Advantages of the global batch.

        Args:
            rewards (`torch.Tensor` of shape `(global_batch_size,)`):
                Rewards, the completions of one prompt side by side; NaN where no reward function scored one.
            num_generations (`int`):
                Completions a prompt.

        Returns:
            `torch.Tensor` of shape `(global_batch_size,)`: Advantages, 0 where the reward is NaN.
        """
        scored = ~rewards.isnan()
        if self.args.baseline == "batch":
            rewards = rewards - rewards.nanmean()
        elif self.args.baseline == "group":
            groups = rewards.view(-1, num_generations)
            others = groups.nansum(1, keepdim=True) - groups
            rewards = (groups - others / (scored.view_as(groups).sum(1, keepdim=True) - 1)).view(-1)
        if self.normalize_advantages:
            known = rewards[~rewards.isnan()]
            std = known.std() if len(known) > 1 else known.new_zeros(())
            rewards = (rewards - known.mean()) / (std + 1e-8)
        return rewards.nan_to_num(0.0)

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields):
        if not self._rolls_out_on_cpu:
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields)
        return generate_completions(
            self.accelerator.unwrap_model(self.model),
            prompt_ids,
            self.eos_token_ids,
            self.max_completion_length,
            self.temperature,
            self.top_p,
            self.top_k,
        )

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict:
        """The rollout of this process: token ids as lists, and each completion's advantage in the global batch."""
        if "image" in inputs[0] or "images" in inputs[0]:
            raise ValueError(
                "the tasks have a column 'image' or 'images': this trainer reads text only, drop the column"
            )
        mode = "train" if self.model.training else "eval"
        num_generations = self.num_generations if mode == "train" else self.num_generations_eval
        prompts = [task["prompt"] for task in inputs]
        prompt_ids, completion_ids, completions = self._generate(prompts)
        rollout = {"prompt_ids": prompt_ids, "completion_ids": completion_ids}

        rewards_per_func = self._calculate_rewards(inputs, prompts, completions, completion_ids)
        unscored = rewards_per_func.isnan().all(dim=1)
        weighted = (rewards_per_func * self.reward_weights.to(rewards_per_func.device)).nansum(dim=1)
        rewards = weighted.masked_fill(unscored, torch.nan)
        if self.reward_clip_range:
            rewards = rewards.clamp(*self.reward_clip_range)
        if self.beta != 0.0:
            kl, num_tokens = self._kl_to_reference(rollout)
            rewards = rewards - self.beta * gather(kl)
            self._metrics[mode]["kl"].append((gather(kl).sum() / gather(num_tokens).sum()).item())
        advantages = self.advantages(rewards, num_generations)
        first = self.accelerator.process_index * len(prompts)
        rollout["advantages"] = advantages[first : first + len(prompts)]
        self._log_rollout(mode, prompts, completions, rewards_per_func, weighted, unscored, advantages, num_generations)
        return rollout

    @torch.no_grad()
    def _kl_to_reference(self, rollout: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """log(policy / reference) of each whole completion, the estimate RLOO's penalty takes, and its tokens."""
        kl = torch.zeros(len(rollout["prompt_ids"]), device=self.accelerator.device)
        for rows in torch.arange(len(kl)).split(self.args.per_device_train_batch_size):
            batch = self._collate(rollout, rows.tolist())
            logps, _ = self._completion_logps(self.model, batch)
            if self.ref_model is not None:
                ref_logps, _ = self._completion_logps(self.ref_model, batch)
            else:
                policy = self.accelerator.unwrap_model(self.model)
                with use_adapter(policy, adapter_name="ref" if "ref" in policy.peft_config else None):
                    ref_logps, _ = self._completion_logps(self.model, batch)
            kl[rows] = logps - ref_logps
        return kl, torch.tensor([len(ids) for ids in rollout["completion_ids"]], device=kl.device)

    def _log_rollout(
        self, mode, prompts, completions, rewards_per_func, weighted, unscored, advantages, num_generations
    ):
        """Everything RLOOTrainer logs of a rollout, under its names."""
        metrics = self._metrics[mode]
        scored = weighted[~unscored]
        for i, name in enumerate(self.reward_func_names):
            known = rewards_per_func[:, i][~rewards_per_func[:, i].isnan()]
            metrics[f"rewards/{name}/mean"].append(known.mean().item())
            metrics[f"rewards/{name}/std"].append(known.std(correction=0).item())
            self._logs["rewards"][name].extend(rewards_per_func[:, i].tolist())
        metrics["reward"].append(scored.mean().item())
        metrics["reward_std"].append(scored.std(correction=0).item())
        groups = weighted.view(-1, num_generations)
        metrics["frac_reward_zero_std"].append((groups.amax(1) - groups.amin(1) < 1e-8).float().mean().item())

        self._logs["prompt"].extend(gather_object(prompts))
        self._logs["completion"].extend(gather_object(completions))
        self._logs["advantages"].extend(advantages.tolist())
        # Sorted, so that all processes gather in the same order
        for column in sorted(set(gather_object(list(self._pending_extra_logs)))):
            values = self._pending_extra_logs.get(column, [None] * len(prompts))
            self._logs["extra"][column].extend(gather_object(values))
        self._pending_extra_logs.clear()
        for name in sorted(set(gather_object(list(self._pending_metrics)))):
            values = gather_object(self._pending_metrics.get(name, []))
            metrics[name].append(sum(values) / len(values))
        self._pending_metrics.clear()

    def _prepare_inputs(self, generation_batch: list[dict]) -> dict:
        if not self.model.training:
            rollout = self._generate_and_score_completions(generation_batch)
            return self._collate(rollout, range(len(generation_batch)))
        steps = self.args.steps_per_generation
        # The buffer is empty in the middle of a cycle when a run continues from a checkpoint
        if self._step % (steps * self.num_iterations) == 0 or self._buffered_inputs is None:
            self._buffered_inputs = self._micro_batches(self._generate_and_score_completions(generation_batch), steps)
        return self._buffered_inputs[self._step % steps]

    def _micro_batches(self, rollout: dict, num_batches: int) -> list[dict]:
        """
        Shuffled micro-batches of equal size. Within one optimizer step, the completions of a prompt and prompts of
        similar length stand together, which saves padding and repeated prompts and changes no sum.
        """
        prompt_ids = rollout["prompt_ids"]
        size = len(prompt_ids) // num_batches
        rows_a_step = size * min(num_batches, self.args.gradient_accumulation_steps)
        batches = []
        for step in torch.randperm(len(prompt_ids)).split(rows_a_step):
            rows = sorted(step.tolist(), key=lambda row: (len(prompt_ids[row]), prompt_ids[row]))
            batches += [self._collate(rollout, rows[i : i + size]) for i in range(0, len(rows), size)]
        return batches

    def _collate(self, rollout: dict, rows) -> dict:
        """Padded tensors of some rows: prompts to the left, completions to the right, both of shape (rows, length)."""
        batch = {}
        for part, side in (("prompt", "left"), ("completion", "right")):
            ids = [torch.tensor(rollout[f"{part}_ids"][row]) for row in rows]
            ones = [torch.ones_like(x) for x in ids]
            batch[f"{part}_ids"] = pad(ids, self._tokenizer.pad_token_id, side, self.pad_to_multiple_of)
            batch[f"{part}_mask"] = pad(ones, 0, side, self.pad_to_multiple_of)
        if self.mask_truncated_completions:
            ended = [rollout["completion_ids"][row][-1] in self.eos_token_ids for row in rows]
            batch["completion_mask"] *= torch.tensor(ended)[:, None]
        batch = {name: tensor.to(self.accelerator.device) for name, tensor in batch.items()}
        if "advantages" in rollout:
            batch["advantages"] = rollout["advantages"][list(rows)]
        return batch

    def _completion_logps(self, model: PreTrainedModel, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability of each whole completion, shape (rows,), and the mean entropy of its tokens, a scalar."""
        input_ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        per_token_logps, entropies, _ = self._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, batch["completion_ids"].size(1), compute_entropy=True
        )
        mask = batch["completion_mask"]
        entropy = (entropies.detach() * mask).sum() / mask.sum().clamp(min=1)
        return (per_token_logps.float() * mask).sum(1), entropy

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if return_outputs:
            raise ValueError(f"{type(self).__name__} returns no outputs")
        logps, entropy = self._completion_logps(model, inputs)
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["entropy"].append(gather(entropy).mean().item())
        return self.policy_loss(logps, inputs)


def keep_adapter_in_fp32(model, values: dict[str, torch.Tensor] | None = None) -> None:
    """
    Make an adapter's trainable parameters fp32, undoing the cast to bf16 by which TRL's trainers prepare a quantised
    base.

    Args:
        model ([`~peft.PeftModel`]):
            The policy.
        values (`dict[str, torch.Tensor]`, *optional*):
            The parameters' values by name as they were before they were rounded; those not named keep their own.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = (values or {}).get(name, parameter.data).to(parameter.device, torch.float32)
