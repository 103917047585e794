"""
The private names of TRL and transformers that the trainers rest on, for an upgrade to check.

Everything else is public API. `tests/test_private_names.py` fails for each name that is gone or has other parameters.
"""

import inspect
import re
from dataclasses import dataclass

from transformers import PreTrainedConfig, PreTrainedModel, Trainer
from trl import RLOOTrainer
from trl.generation.vllm_generation import VLLMGeneration


@dataclass(frozen=True)
class PrivateName:
    """A private method or attribute of a library class."""

    owner: type
    name: str
    used_by: str
    parameters: tuple[str, ...] | None = None  # of a method, without `self`; None for an attribute

    def problem(self) -> str | None:
        """Return what is wrong with the installed library's version of it, or `None`."""
        changed = f"{self.owner.__module__.split('.')[0]}'s {self.owner.__name__}.{self.name} changed"
        where = f"see {self.used_by} for what relies on it"
        if self.parameters is None:
            sets_it = re.search(rf"\bself\.{self.name}(: [^=]+)? = ", inspect.getsource(self.owner))
            return None if sets_it or hasattr(self.owner, self.name) else f"{changed}: it is gone, {where}"
        method = getattr(self.owner, self.name, None)
        if method is None:
            return f"{changed}: it is gone, {where}"
        found = tuple(inspect.signature(method).parameters)[1:]
        if found[: len(self.parameters)] != self.parameters:
            return f"{changed}: its parameters are {found} and were {self.parameters}, {where}"
        return None


_POLICY_GRADIENT = "trainers/policy_gradient.py"
_CHECKPOINTS = "trainers/checkpoints.py"
_VLLM = "trainers/vllm.py"
_CARD = "trainers/reinforce.py and ppo_clip.py"  # the model card

PRIVATE_NAMES = (
    PrivateName(RLOOTrainer, "_prepare_inputs", _POLICY_GRADIENT, ("generation_batch",)),
    PrivateName(RLOOTrainer, "_generate_and_score_completions", _POLICY_GRADIENT, ("inputs",)),
    PrivateName(RLOOTrainer, "_generate", _POLICY_GRADIENT, ("prompts",)),
    PrivateName(RLOOTrainer, "_generate_single_turn", _POLICY_GRADIENT, ("prompt_ids", "images", "multimodal_fields")),
    PrivateName(
        RLOOTrainer,
        "_calculate_rewards",
        _POLICY_GRADIENT,
        ("inputs", "prompts", "completions", "completion_ids_list"),
    ),
    PrivateName(
        RLOOTrainer,
        "_get_per_token_logps_and_entropies",
        _POLICY_GRADIENT,
        ("model", "input_ids", "attention_mask", "logits_to_keep", "batch_size", "compute_entropy", "compute_aux_loss"),
    ),
    PrivateName(RLOOTrainer, "_metrics", _POLICY_GRADIENT),
    PrivateName(RLOOTrainer, "_logs", _POLICY_GRADIENT),
    PrivateName(RLOOTrainer, "_step", _CHECKPOINTS),
    PrivateName(RLOOTrainer, "_buffered_inputs", _CHECKPOINTS),
    PrivateName(RLOOTrainer, "_get_train_sampler", _CHECKPOINTS, ("dataset",)),
    PrivateName(VLLMGeneration, "_iter_named_params", _VLLM, ()),
    PrivateName(VLLMGeneration, "_dist", _VLLM),
    PrivateName(RLOOTrainer, "_tag_names", _CARD),
    PrivateName(RLOOTrainer, "_name", _CARD),
    PrivateName(RLOOTrainer, "_paper", _CARD),
    PrivateName(Trainer, "_save_checkpoint", _CHECKPOINTS, ("model", "trial")),
    PrivateName(Trainer, "_get_output_dir", _CHECKPOINTS, ("trial",)),
    PrivateName(Trainer, "_save_rng_state", _CHECKPOINTS, ("output_dir",)),
    PrivateName(Trainer, "_load_rng_state", _CHECKPOINTS, ("checkpoint",)),
    PrivateName(PreTrainedModel, "_can_compile_fullgraph", "trainers/rollout/graph.py"),
    PrivateName(PreTrainedModel, "_supports_attention_backend", "trainers/cpu/log_probs.py"),
    PrivateName(PreTrainedConfig, "_attn_implementation", "trainers/cpu/log_probs.py and rollout/graph.py"),
)
