"""
What REINFORCE and PPO-Clip share: the rollout step, the advantage, and the way to the loss.

TRL's `RLOOTrainer` brings generation with vLLM, reward functions, PEFT, distributed training, logging and checkpoints.
Replaced here are its rollout step (no forward for old log-probabilities, micro-batches without needless padding, rewards
computed beside the log-probabilities, and on a CPU the rollout of `rollout.py`), its advantage and its loss. Not covered:
images.

The private names of TRL this rests on, so that an upgrade has one list to check: `_generate`, `_generate_single_turn`,
`_calculate_rewards`, `_get_per_token_logps_and_entropies`, `_prepare_inputs`, `_metrics`, `_logs`, `_log_metric`,
`_log_completion_extra`, `_pending_metrics`, `_pending_extra_logs`, `_last_loaded_step`, `_step`, `_buffered_inputs`,
`_tokenizer`; of transformers `_get_grad_norm`; and what `checkpoints.py` names.
"""

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext

import torch
from accelerate.utils import DistributedType, gather, gather_object, is_peft_model
from transformers import PreTrainedModel
from trl import RLOOTrainer
from trl.trainer.utils import get_config_model_id, pad, use_adapter

from .adapters import base_comes_back, keep_adapter_in_fp32
from .checkpoints import CompleteCheckpoints, ContinuedRollouts
from .config import PolicyGradientConfig
from .grading import BackgroundAsyncReward, BackgroundReward, in_background
from .learning_signal import SignalWatch
from .log_probs import add_cpu_lm_head
from .rollout import generate_completions


class PolicyGradientTrainer(ContinuedRollouts, CompleteCheckpoints, RLOOTrainer):
    """
    Base of [`ReinforceTrainer`] and [`PPOClipTrainer`], which define `policy_loss`.

    Takes what [`~trl.RLOOTrainer`] takes. LoRA parameters are kept in fp32, under a quantised base too: an AdamW step
    at a learning rate of 5e-6 on a bf16 weight of 1e-2 rounds to nothing.

    Besides what [`~trl.RLOOTrainer`] logs, `seconds/...` are those of an optimizer step: `rollout`, `grading` (the
    reward functions' own time), `grading_wait` (what of it the other phases did not hide), `log_probs`, `backward`.
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
        threads, loop = ThreadPoolExecutor(1, "reward"), getattr(self, "async_loop", None)
        self.reward_funcs = [
            function if isinstance(function, torch.nn.Module) else in_background(function, threads, loop)
            for function in self.reward_funcs
        ]
        self._ungraded = None  # a rollout and its micro-batches, until their advantages are needed
        self._signal_watch = SignalWatch()
        self._seconds = Counter()
        self._seconds_logged_at = None  # the step; a run may continue at any

    @property
    def _rolls_out_on_cpu(self) -> bool:
        """Whether the rollout of this project runs: on a CPU, unless it is told something only transformers knows."""
        return (
            self.accelerator.device.type == "cpu"
            and not self.use_vllm
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

    @contextmanager
    def _phase(self, name: str):
        """Counts the seconds of a phase of training."""
        started = time.perf_counter()
        yield
        if self.accelerator.device.type != "cpu":
            torch.accelerator.synchronize()
        if self.model.training:
            self._seconds[name] += time.perf_counter() - started

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields):
        sampled = self.model.training
        if self._rolls_out_on_cpu:
            return generate_completions(
                self.accelerator.unwrap_model(self.model),
                prompt_ids,
                self.eos_token_ids,
                self.max_completion_length,
                self.temperature if sampled else 0.0,
                self.top_p,
                self.top_k,
            )
        if self.use_vllm:
            self.vllm_generation.temperature = self.temperature if sampled else 0.0
        else:
            self.generation_config.do_sample = sampled
        # TRL merges the adapter to hand the weights to vLLM, after each step once
        merges = (
            self.use_vllm
            and is_peft_model(self.model)
            and self.accelerator.distributed_type not in (DistributedType.FSDP, DistributedType.DEEPSPEED)
            and self.state.global_step != self._last_loaded_step
        )
        with base_comes_back(self.model) if merges else nullcontext():
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields)

    def _roll_out(self, tasks: list[dict]) -> dict:
        """
        The rollout of this process: its completions with token ids as lists. Their grading has been started.

        Args:
            tasks (`list[dict]`):
                Rows of the dataset, as often as each is to be completed.
        """
        if "image" in tasks[0] or "images" in tasks[0]:
            raise ValueError(
                "the tasks have a column 'image' or 'images': this trainer reads text only, drop the column"
            )
        prompts = [task["prompt"] for task in tasks]
        with self._phase("rollout"):
            prompt_ids, completion_ids, completions = self._generate(prompts)
        taken = ("prompt", "completion", "completion_ids")
        columns = {name: [task[name] for task in tasks] for name in tasks[0] if name not in taken}
        for function in self.reward_funcs:
            if isinstance(function, BackgroundReward | BackgroundAsyncReward):
                function.start(
                    prompts=prompts,
                    completions=completions,
                    completion_ids=completion_ids,
                    trainer_state=self.state,
                    log_extra=self._log_completion_extra,
                    log_metric=self._log_metric,
                    **columns,
                )
        rollout = {
            "tasks": tasks,
            "prompts": prompts,
            "prompt_ids": prompt_ids,
            "completions": completions,
            "completion_ids": completion_ids,
        }
        if self.beta != 0.0:
            rollout["kl"] = self._kl_to_reference(rollout)
        return rollout

    def _collect_advantages(self) -> None:
        """Waits for the rewards of the latest rollout and gives its micro-batches their advantages."""
        (rollout, batches), self._ungraded = self._ungraded, None
        mode = "train" if self.model.training else "eval"
        try:
            with self._phase("grading_wait"):
                rewards_per_func = self._calculate_rewards(
                    *(rollout[name] for name in ("tasks", "prompts", "completions", "completion_ids"))
                )
        except Exception as error:
            raise self.stopped(str(error)) from error
        if mode == "train":
            self._seconds["grading"] += sum(getattr(function, "seconds", 0.0) for function in self.reward_funcs)
        unscored = rewards_per_func.isnan().all(dim=1)
        weighted = (rewards_per_func * self.reward_weights.to(rewards_per_func.device)).nansum(dim=1)
        rewards = weighted.masked_fill(unscored, torch.nan)
        if self.reward_clip_range:
            rewards = rewards.clamp(*self.reward_clip_range)
        if "kl" in rollout:
            kl = gather(rollout["kl"])
            num_tokens = gather(torch.tensor([len(ids) for ids in rollout["completion_ids"]], device=kl.device))
            rewards = rewards - self.beta * kl
            self._metrics[mode]["kl"].append((kl.sum() / num_tokens.sum()).item())
        advantages = self.advantages(rewards, self.num_generations) if mode == "train" else rewards.nan_to_num(0.0)
        self._log_rollout(mode, rollout, rewards_per_func, weighted, unscored, advantages)
        first = self.accelerator.process_index * len(rollout["prompts"])
        for batch in batches:
            batch["advantages"] = advantages[[first + row for row in batch["rows"]]]

    @torch.no_grad()
    def _kl_to_reference(self, rollout: dict) -> torch.Tensor:
        """log(policy / reference) of each whole completion, the estimate that RLOO's penalty takes, shape (rows,)."""
        kl = torch.zeros(len(rollout["prompt_ids"]), device=self.accelerator.device)
        for rows in torch.arange(len(kl)).split(self.args.per_device_train_batch_size):
            batch = self._collate(rollout, rows.tolist())
            logps, *_ = self._completion_logps(self.model, batch)
            if self.ref_model is not None:
                ref_logps, *_ = self._completion_logps(self.ref_model, batch)
            else:
                policy = self.accelerator.unwrap_model(self.model)
                with use_adapter(policy, adapter_name="ref" if "ref" in policy.peft_config else None):
                    ref_logps, *_ = self._completion_logps(self.model, batch)
            kl[rows] = logps - ref_logps
        return kl

    def _log_rollout(self, mode, rollout, rewards_per_func, weighted, unscored, advantages):
        """What RLOOTrainer logs of a rollout, under its names."""
        metrics = self._metrics[mode]
        # Batches of an evaluation may differ in size: every completion counts the same
        weight = len(advantages) if mode == "eval" else 1

        def record(name, value):
            metrics[name].extend([value] * weight)

        scored = weighted[~unscored]
        for i, name in enumerate(self.reward_func_names):
            known = rewards_per_func[:, i][~rewards_per_func[:, i].isnan()]
            record(f"rewards/{name}/mean", known.mean().item())
            record(f"rewards/{name}/std", known.std(correction=0).item())
            self._logs["rewards"][name].extend(rewards_per_func[:, i].tolist())
        record("reward", scored.mean().item())
        record("reward_std", scored.std(correction=0).item())

        self._logs["prompt"].extend(gather_object(rollout["prompts"]))
        self._logs["completion"].extend(gather_object(rollout["completions"]))
        self._logs["advantages"].extend(advantages.tolist())
        # Sorted, so that all processes gather in the same order
        for column in sorted(set(gather_object(list(self._pending_extra_logs)))):
            values = self._pending_extra_logs.get(column, [None] * len(rollout["prompts"]))
            self._logs["extra"][column].extend(gather_object(values))
        self._pending_extra_logs.clear()
        for name in sorted(set(gather_object(list(self._pending_metrics)))):
            values = gather_object(self._pending_metrics.get(name, []))
            record(name, sum(values) / len(values))
        self._pending_metrics.clear()
        if mode == "train":
            self._note_signal(weighted, metrics)

    def _note_signal(self, rewards: torch.Tensor, metrics: dict[str, list[float]]) -> None:
        """Counts the groups whose rewards are the same, and warns of a run in which nothing can be learnt."""
        groups = rewards.view(-1, self.num_generations if self.args.baseline == "group" else len(rewards))
        metrics["frac_reward_zero_std"].append((groups.amax(1) - groups.amin(1) < 1e-8).float().mean().item())
        if self.accelerator.is_main_process:
            verdicts = self._logs["extra"].get("verdict") if len(self.reward_funcs) == 1 else None
            self._signal_watch.note(
                [verdict == "passed" for verdict in verdicts] if verdicts else rewards.tolist(),
                None if self.args.baseline == "none" and not self.normalize_advantages else groups.size(1),
            )

    def _prepare_inputs(self, generation_batch: list[dict]) -> dict:
        if not self.model.training:
            rollout = self._roll_out(generation_batch)
            batch = self._collate(rollout, range(len(generation_batch)))
            self._ungraded = rollout, [batch]
            return batch
        steps = self.args.steps_per_generation
        # The buffer is empty in the middle of a cycle when a run continues from a checkpoint without one
        if self._step % (steps * self.num_iterations) == 0 or self._buffered_inputs is None:
            rollout = self._roll_out(generation_batch)
            self._buffered_inputs = self._micro_batches(rollout, steps)
            self._ungraded = rollout, self._buffered_inputs
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
        """Some rows as padded tensors: prompts to the left, completions to the right, both of shape (rows, length)."""
        batch = {}
        for part, side in (("prompt", "left"), ("completion", "right")):
            ids = [torch.tensor(rollout[f"{part}_ids"][row]) for row in rows]
            ones = [torch.ones_like(x) for x in ids]
            batch[f"{part}_ids"] = pad(ids, self._tokenizer.pad_token_id, side, self.pad_to_multiple_of)
            batch[f"{part}_mask"] = pad(ones, 0, side, self.pad_to_multiple_of)
        if self.mask_truncated_completions:
            ended = [rollout["completion_ids"][row][-1] in self.eos_token_ids for row in rows]
            batch["completion_mask"] *= torch.tensor(ended)[:, None]
        return {name: tensor.to(self.accelerator.device) for name, tensor in batch.items()} | {"rows": list(rows)}

    def _completion_logps(
        self, model: PreTrainedModel, batch: dict, for_loss: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """
        Log-probability of each whole completion, shape (rows,). For the loss also two scalars: the mean entropy of the
        tokens, and the load-balancing loss of a mixture of experts if it is asked for.
        """
        input_ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        with self._phase("log_probs"):
            per_token_logps, entropies, aux_loss = self._get_per_token_logps_and_entropies(
                model,
                input_ids,
                attention_mask,
                batch["completion_ids"].size(1),
                compute_entropy=for_loss,
                compute_aux_loss=for_loss and self.aux_loss_enabled,
            )
        mask = batch["completion_mask"]
        entropy = (entropies.detach() * mask).sum() / mask.sum().clamp(min=1) if for_loss else None
        return (per_token_logps.float() * mask).sum(1), entropy, aux_loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if return_outputs:
            raise ValueError(f"{type(self).__name__} returns no outputs")
        logps, entropy, aux_loss = self._completion_logps(model, inputs, for_loss=True)
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["entropy"].append(gather(entropy).mean().item())
        if self._ungraded is not None:
            self._collect_advantages()
        loss = self.policy_loss(logps, inputs)
        if aux_loss is not None:
            loss = loss + self.router_aux_loss_coef * aux_loss
            self._metrics[mode]["aux_loss"].append(gather(aux_loss.detach()).mean().item())
        if not loss.isfinite():
            raise self.stopped(f"the loss is {loss.item()}, so a log-probability or a reward is not a finite number")
        return loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self._seconds_logged_at is None:
            self._seconds_logged_at = self.state.global_step
        others = self._seconds.total() - self._seconds["grading"]
        started = time.perf_counter()
        loss = super().training_step(model, inputs, num_items_in_batch)
        others = self._seconds.total() - self._seconds["grading"] - others
        self._seconds["backward"] += time.perf_counter() - started - others
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if grad_norm is not None and not torch.as_tensor(grad_norm).isfinite():
            raise self.stopped(f"the gradient's norm is {grad_norm}: try a lower learning_rate")
        return grad_norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        steps = self.state.global_step - (self._seconds_logged_at or 0)
        if self.model.training and self._seconds and steps > 0:
            logs |= {f"seconds/{name}": round(seconds / steps, 3) for name, seconds in self._seconds.items()}
            self._seconds.clear()
            self._seconds_logged_at = self.state.global_step
        super().log(logs, start_time)
