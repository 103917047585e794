"""
What REINFORCE and PPO-Clip share: the rollout, the advantages, and the way to the loss.

TRL's `RLOOTrainer` generates, calls the reward functions, logs, distributes and saves. Replaced here are the
advantages, the micro-batches, the loss, and the decoding loop (`rollout/`). Not covered: images.

The private names of TRL and transformers that this rests on are listed in `private_names.py`.
"""

import logging
import math
from contextlib import AbstractContextManager, nullcontext
from statistics import mean
from typing import Any

import torch
from accelerate.utils import DistributedType, gather, is_peft_model
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import RLOOTrainer
from trl.trainer.utils import get_config_model_id

from .adapters import adapter_values, keep_adapter_in_fp32
from .checkpoints import CompleteCheckpoints, ContinuedRollouts
from .config import PolicyGradientConfig
from .device import use_fast_log_probs
from .learning_signal import SignalWatch, collapse
from .memory import longest_prompt, needs_checkpointing
from .micro_batches import micro_batches
from .progress import print_completions
from .rollout import continuous_completions, decode_completions, generate_completions
from .timing import PhaseTimer
from .vllm import FOUR_BIT, MergedVLLM, correct_for_sampler, padded

logger = logging.getLogger(__name__)


class PolicyGradientTrainer(ContinuedRollouts, CompleteCheckpoints, RLOOTrainer):
    """
    Base of [`ReinforceTrainer`] and [`PPOClipTrainer`], which define `policy_loss`.

    Takes what [`~trl.RLOOTrainer`] takes. LoRA parameters are kept in fp32, under a quantised base too: an AdamW step
    at a learning rate of 5e-6 on a bf16 weight of 1e-2 rounds to nothing.

    Besides what [`~trl.RLOOTrainer`] logs, `seconds/rollout`, `seconds/grading`, `seconds/log_probs` and
    `seconds/backward` are those of an optimizer step.
    """

    config_class = PolicyGradientConfig
    args: PolicyGradientConfig

    def __init__(self, model, reward_funcs, args=None, *trainer_args, quantization_config=None, **kwargs):
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = self.config_class(f"{name.split('/')[-1]}-{self._name}")
        quantized = quantization_config is not None or getattr(model, "is_quantized", False)
        if quantized and args.use_vllm:
            raise ValueError(FOUR_BIT)
        if quantized and args.device.type == "cpu":
            raise ValueError(
                "a quantised base cannot be trained after it has generated on a CPU (bitsandbytes repacks the weights "
                "at the first generation, and the packed layers have no gradient): set load_in_4bit to false"
            )
        adapter = adapter_values(model)
        super().__init__(model, reward_funcs, args, *trainer_args, quantization_config=quantization_config, **kwargs)
        if is_peft_model(self.model):
            keep_adapter_in_fp32(self.model, adapter)
            if self.beta == 0.0 and "ref" in self.model.peft_config:
                self.model.delete_adapter("ref")  # RLOOTrainer's copy for the KL penalty
        if self.use_vllm:
            MergedVLLM.adopt(self.vllm_generation, with_logps=args.vllm_importance_sampling_correction)
        use_fast_log_probs(self.model, self.accelerator.device, self.temperature)
        if args.gradient_checkpointing is None:
            self._decide_on_checkpointing()
        self.add_callback(_StopOnBadGradient(self))
        self.num_completions_to_print = 0  # by RLOOTrainer, whose table leaves a completion no room
        self._rewards_per_func = None  # of the rollout in the making, shape (global_batch_size, functions)
        self._rollout_logps: list[torch.Tensor] | None = None  # its log-probabilities: the policy's, the reference's
        self.measured: dict[str, torch.Tensor] = {}
        self._signal_watch = SignalWatch()
        self._warned_of = set()  # metrics that tell of a collapse
        self._timer = PhaseTimer(self.accelerator.device)
        self._seconds_logged_at = None  # the step; a run may continue at any

    def _decide_on_checkpointing(self) -> None:
        """Set `gradient_checkpointing`, which the configuration left open."""
        args = self.args
        prompt_length = longest_prompt(self.train_dataset, self.processing_class)
        is_16_bit = args.bf16 or args.fp16 or self.model.dtype.itemsize == 2
        args.gradient_checkpointing = args.activation_checkpointing = needs_checkpointing(
            self.model.config,
            num_rows=args.per_device_train_batch_size,
            num_tokens=None if prompt_length is None else prompt_length + self.max_completion_length,
            device=self.accelerator.device,
            dtype=torch.bfloat16 if is_16_bit else torch.float32,
        )
        if args.gradient_checkpointing and is_peft_model(self.model):
            self.model.enable_input_require_grads()  # as RLOOTrainer does where the configuration says `True`

    def policy_loss(self, per_token_logps: torch.Tensor, inputs: dict) -> torch.Tensor:
        """
        Return the loss of a micro-batch.

        What it puts into `measured`, tensors without a dimension by name, is logged: the mean over the processes, or
        the extreme value where the name ends in `/min` or `/max`. Reading a value here would wait for the GPU.

        Args:
            per_token_logps (`torch.Tensor` of shape `(batch_size, completion_length)`):
                Log-probability of each token of the completions under the policy in training.
            inputs (`dict`):
                The micro-batch, with `advantages` of shape `(batch_size,)`, `completion_mask` of the shape of
                `per_token_logps`, and `old_per_token_logps` if [`needs_old_logps`] says so.

        Returns:
            `torch.Tensor`: A scalar.
        """
        raise NotImplementedError

    @property
    def needs_old_logps(self) -> bool:
        """Whether micro-batches need `old_per_token_logps`, computed at the rollout."""
        return False

    def advantages(self, rewards: torch.Tensor, num_generations: int) -> torch.Tensor:
        """
        Return the advantages of the global batch.

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
            rewards = (rewards - known.mean()) / (std.clamp(min=self.args.min_advantage_std) + 1e-8)
        return rewards.nan_to_num(0.0)

    def _prepare_inputs(self, generation_batch: list[dict]) -> dict:
        if not self.model.training:
            return self._roll_out(generation_batch)
        steps = self.args.steps_per_generation
        # The buffer is empty in the middle of a cycle when a run continues from a checkpoint without one
        if self._step % (steps * self.num_iterations) == 0 or self._buffered_inputs is None:
            self._buffered_inputs = micro_batches(
                self._roll_out(generation_batch),
                num_batches=steps,
                num_steps=steps // math.gcd(steps, self.args.gradient_accumulation_steps),
                keeps_padding=self.pad_to_multiple_of is not None,
            )
        return self._buffered_inputs[self._step % steps]

    def _roll_out(self, tasks: list[dict]) -> dict[str, torch.Tensor]:
        """
        Complete tasks, grade the completions and give them their advantages.

        Args:
            tasks (`list[dict]`):
                Rows of the dataset, each as often as it is to be completed.

        Returns:
            `dict`: This process's `prompt_ids` (padded to the left), `completion_ids` (padded to the right), their
            masks, `advantages` and, if needed, `old_per_token_logps`. In evaluation the advantages are the rewards.
        """
        if "image" in tasks[0] or "images" in tasks[0]:
            raise ValueError(
                "the tasks have a column 'image' or 'images': this trainer reads text only, drop the column"
            )
        mode = "train" if self.model.training else "eval"
        num_logged = {name: len(values) for name, values in self._metrics[mode].items()}
        self._rollout_logps = []
        rollout = self._generate_and_score_completions(tasks)  # rolls out, grades and logs
        logps, self._rollout_logps = self._rollout_logps, None

        rewards_per_func = self._rewards_per_func
        weighted = (rewards_per_func * self.reward_weights.to(rewards_per_func.device)).nansum(dim=1)
        rewards = weighted.masked_fill(rewards_per_func.isnan().all(dim=1), torch.nan)
        if self.reward_clip_range:
            rewards = rewards.clamp(*self.reward_clip_range)
        if mode == "train":
            is_mixed = self._mixed_groups(rewards)
            self._metrics["train"]["frac_mixed_groups"].append(is_mixed.float().mean().item())
            is_kept = is_mixed.repeat_interleave(self.num_generations)
            if self.args.drop_uninformative_groups:
                rewards = rewards.masked_fill(~is_kept, torch.nan)
        if self.beta != 0.0:
            policy_logps, reference_logps = logps
            kl = ((policy_logps - reference_logps) * rollout["completion_mask"]).sum(1)
            rewards = rewards - self.beta * gather(kl)
        advantages = self.advantages(rewards, self.num_generations) if mode == "train" else rewards.nan_to_num(0.0)

        logged = self._logs["advantages"]  # where RLOOTrainer has put its own
        for _ in range(min(len(logged), len(advantages))):
            logged.pop()
        logged.extend(advantages.tolist())
        if mode == "train":
            self._note_signal(weighted)
        else:  # batches of an evaluation may differ in size: every completion counts the same
            for name, values in self._metrics[mode].items():
                values.extend(values[num_logged.get(name, 0) :] * (len(advantages) - 1))

        first = self.accelerator.process_index * len(tasks)
        rollout["advantages"] = advantages[first : first + len(tasks)]
        if mode == "train" and self.args.drop_uninformative_groups:
            # The mean over the rows that all processes keep, of which one may keep more than another
            kept = is_kept.cpu().double()
            weights = kept / kept.mean().clamp(min=1 / len(kept))
            rollout["weights"] = weights[first : first + len(tasks)]
        del rollout["old_logps"]  # sums over whole completions
        if self.needs_old_logps:
            rollout["old_per_token_logps"] = logps[0]
        if mode == "train" and self.use_vllm and (sampling_logps := self.vllm_generation.sampling_logps):
            rollout["sampling_per_token_logps"] = padded(sampling_logps, rollout["completion_ids"])
        return rollout

    def _generate(self, prompts: list) -> tuple[list[list[int]], list[list[int]], list]:
        prompt_ids, completion_ids, _ = super()._generate(prompts)
        texts = decode_completions(self.processing_class, prompt_ids, completion_ids)
        if isinstance(prompts[0], str):
            return prompt_ids, completion_ids, texts
        return prompt_ids, completion_ids, [[{"role": "assistant", "content": text}] for text in texts]

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields) -> list[list[int]]:
        temperature = self.temperature if self.model.training else 0.0
        with self._phase("rollout"):
            policy, length = self.accelerator.unwrap_model(self.model), self.max_completion_length
            if self._has_own_rollout:
                sampling = (temperature, self.top_p, self.top_k)
                return generate_completions(policy, prompt_ids, self.eos_token_ids, length, *sampling)
            if self.use_vllm:
                self.vllm_generation.temperature = temperature
            else:
                self.generation_config.do_sample = temperature > 0
                if self.use_transformers_continuous_batching:
                    size = self.continuous_batching_config
                    return continuous_completions(policy, prompt_ids, self.generation_config, size)
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields)

    @property
    def _has_own_rollout(self) -> bool:
        """Whether `generate_completions` decodes: where weights are whole, and no setting asks for another way."""
        return (
            self.accelerator.distributed_type != DistributedType.FSDP
            and not is_deepspeed_zero3_enabled()
            and not self.use_vllm
            and not self.use_transformers_continuous_batching
            and self.min_p is None
            and self.repetition_penalty == 1.0
            and not self.args.generation_kwargs
            and not self.args.cache_implementation
        )

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list) -> torch.Tensor:
        with self._phase("grading"):
            try:
                rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
            except Exception as error:
                names = ", ".join(self.reward_func_names)
                raise self.stopped(f"grading by {names} failed: {type(error).__name__}: {error}") from error
        self._rewards_per_func = rewards
        return rewards

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        # RLOOTrainer computes log-probabilities at every rollout, which only a KL penalty and PPO have a use for
        if self._rollout_logps is not None and self.beta == 0.0 and not self.needs_old_logps:
            return torch.zeros(len(input_ids), logits_to_keep, device=input_ids.device), None, None
        with self._phase("log_probs"):
            result = super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
            )
        if self._rollout_logps is not None:
            self._rollout_logps.append(result[0])
        return result

    @property
    def _verdicts(self) -> list[str] | None:
        """The verdicts of the rollout in the making, if the only reward logs them, as `UnitTestReward` does."""
        verdicts = self._logs["extra"].get("verdict") if len(self.reward_funcs) == 1 else None
        return [*verdicts] if verdicts else None

    def _mixed_groups(self, rewards: torch.Tensor) -> torch.Tensor:
        """Return for each prompt whether some of its completions pass and others do not (or how rewards differ)."""
        scored = ~rewards.isnan()
        if verdicts := self._verdicts:
            rewards = rewards.new_tensor([verdict == "passed" for verdict in verdicts])
        best = rewards.masked_fill(~scored, -torch.inf).view(-1, self.num_generations).amax(1)
        worst = rewards.masked_fill(~scored, torch.inf).view(-1, self.num_generations).amin(1)
        return best - worst > 1e-8

    def _note_signal(self, rewards: torch.Tensor) -> None:
        """Count the groups whose rewards are the same, and warn of a run in which nothing can be learnt."""
        groups = rewards.view(-1, self.num_generations if self.args.baseline == "group" else len(rewards))
        same = groups.amax(1) - groups.amin(1) < 1e-8
        self._metrics["train"]["frac_reward_zero_std"][-1] = same.float().mean().item()
        if self.accelerator.is_main_process:
            verdicts = self._verdicts
            self._signal_watch.note(
                [verdict == "passed" for verdict in verdicts] if verdicts else rewards.tolist(),
                None if self.args.baseline == "none" and not self.normalize_advantages else groups.size(1),
            )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None) -> torch.Tensor:
        if return_outputs:
            raise ValueError(f"{type(self).__name__} returns no outputs")
        mask = inputs["completion_mask"]
        per_token_logps, entropies, aux_loss = self._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], mask], dim=1),
            mask.size(1),
            compute_entropy=True,
            compute_aux_loss=self.aux_loss_enabled,
        )
        per_token_logps = per_token_logps.float()
        if "sampling_per_token_logps" in inputs:
            clip_max = self.args.vllm_importance_sampling_clip_max
            self.measured |= correct_for_sampler(inputs, per_token_logps.detach(), clip_max)
        loss = self.policy_loss(per_token_logps, inputs) * inputs.get("loss_weight", 1.0)
        if aux_loss is not None:
            loss = loss + self.router_aux_loss_coef * aux_loss
            self.measured["aux_loss"] = aux_loss
        self.measured["entropy"] = (entropies.detach() * mask).sum() / mask.sum().clamp(min=1)
        bad = [value for value in self._log_measured(loss) if not math.isfinite(value)]  # of any process: all stop
        if bad and not self._skips_overflows:
            raise self.stopped(f"the loss is {bad[0]}, so a log-probability or a reward is not a finite number")
        return loss

    def _log_measured(self, loss: torch.Tensor) -> list[float]:
        """Log what was measured at a micro-batch, in one transfer to the host. Return the loss of every process."""
        values = torch.stack([value.detach().float() for value in (loss, *self.measured.values())])
        losses, *columns = zip(*gather(values[None]).tolist(), strict=True)
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, column in zip(self.measured, columns, strict=True):
            reduce = {"min": min, "max": max}.get(name.rpartition("/")[2], mean)
            metrics[name].append(reduce(column))
        self.measured.clear()
        return [*losses]

    @property
    def _skips_overflows(self) -> bool:
        """Whether a step whose gradient is not finite is skipped, by the loss scaler of fp16."""
        return self.accelerator.mixed_precision == "fp16"

    def _phase(self, name: str) -> AbstractContextManager:
        """Count the seconds of a phase of training."""
        return self._timer.phase(name) if self.model.training else nullcontext()

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        if self._seconds_logged_at is None:
            self._seconds_logged_at = self.state.global_step
        with self._timer.phase("backward"):  # what the other phases leave of it
            return super().training_step(model, inputs, num_items_in_batch)

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        grad_norm = logs.get("grad_norm", 0.0)
        if not self._skips_overflows and not math.isfinite(grad_norm):
            raise self.stopped(f"the gradient's norm is {grad_norm}: try a lower learning_rate")
        steps = self.state.global_step - (self._seconds_logged_at or 0)
        if self.model.training and steps > 0 and (seconds := self._timer.seconds()):
            logs |= {f"seconds/{name}": round(value / steps, 3) for name, value in seconds.items()}
            self._seconds_logged_at = self.state.global_step
        super().log(logs, start_time)
        if self.log_completions and self.accelerator.is_main_process and "train_runtime" not in logs:
            print_completions(self._logs, self.state.global_step, self.args.num_completions_to_print)
        for metric, warning in collapse(self.state.log_history).items():
            if metric not in self._warned_of and self.accelerator.is_main_process:
                logger.warning(warning)
            self._warned_of.add(metric)


class _StopOnBadGradient(TrainerCallback):
    """Stop a run before a gradient that is not finite reaches the weights."""

    def __init__(self, trainer: PolicyGradientTrainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if (scaler := self.trainer.accelerator.scaler) is not None:  # it skips such a step and halves its scale
            if scaler.get_scale() < 1:
                raise self.trainer.stopped(
                    "gradients are not finite in fp16, at any scale: compute in fp32 (fp16 false, dtype float32)"
                )
            return
        norm = get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        if not norm.isfinite():
            raise self.trainer.stopped(f"the gradient's norm is {norm.item()}: try a lower learning_rate")
