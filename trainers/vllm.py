"""
What TRL's vLLM backend does differently here: weights are merged without touching the base, and log-probabilities kept.

TRL starts the engine or finds the server, and asks it for completions.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.tensor import DTensor
from trl.generation.vllm_generation import VLLMGeneration

FOUR_BIT = (
    "vLLM cannot serve a 4-bit base in training: the adapter cannot be merged into packed weights without rounding "
    "the policy. Set load_in_4bit or use_vllm to false"
)


class MergedVLLM(VLLMGeneration):
    """
    [`~trl.generation.vllm_generation.VLLMGeneration`] that hands vLLM base + adapter one layer at a time.

    TRL's own merges the adapter into the base in place and subtracts it again. In bf16, W + BA - BA is not W, so the
    base would drift away from the one that the adapter is saved for.

    Attributes:
        sampling_logps (`list[list[float]]` or `None`):
            Log-probabilities of the last completions' tokens under vLLM, if they were asked for.
    """

    sampling_logps: list[list[float]] | None = None

    @classmethod
    def adopt(cls, generation: VLLMGeneration, with_logps: bool) -> None:
        """
        Make the backend that a trainer of TRL has built one of this class.

        Args:
            generation ([`~trl.generation.vllm_generation.VLLMGeneration`]):
                The trainer's backend.
            with_logps (`bool`):
                Whether to ask vLLM for log-probabilities.
        """
        generation.__class__ = cls
        generation.logprobs = 0 if with_logps else None  # 0: those of the sampled tokens alone

    def generate(self, *args, **kwargs) -> tuple:
        result = super().generate(*args, **kwargs)
        logps = result[2]
        # vLLM's NaN arrives as None
        self.sampling_logps = logps and [[torch.nan if x is None else x for (x, *_) in row] for row in logps]
        return result

    def _iter_named_params(self) -> Iterator[tuple[str, torch.Tensor]]:
        if isinstance(self.model, PeftModel):
            return merged_parameters(self.model, self._dist.gather_params)
        return super()._iter_named_params()


def merged_parameters(
    model: PeftModel, gather_params: Callable[[list[nn.Parameter]], AbstractContextManager]
) -> Iterator[tuple[str, torch.Tensor]]:
    """
    Yield the parameters of a policy with its adapter merged, one at a time, and leave the policy as it is.

    Args:
        model ([`~peft.PeftModel`]):
            The policy. It may be sharded by FSDP2 or ZeRO-3: then every process has to iterate.
        gather_params (`Callable`):
            Context in which a list of parameters is whole.

    Yields:
        `tuple[str, torch.Tensor]`: Name, as in the base's checkpoint, and value.
    """
    tuned = defaultdict(list)  # the adapter layers around each parameter of the base
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            for parameter in module.get_base_layer().parameters(recurse=False):
                tuned[parameter].append(module)
    for name, parameter in list(model.named_parameters()):
        if model.prefix in name or "original_module" in name:
            continue
        layers = tuned[parameter]
        with gather_params([parameter, *(p for layer in layers for p in layer.parameters())]), _merged(layers):
            yield _checkpoint_name(name), _whole(model.get_parameter(name))


@contextmanager
def _merged(layers: list[Any]) -> Iterator[None]:
    """Merge adapter layers, with other parameters in the place of theirs meanwhile."""
    kept = [
        (module, name, parameter)
        for layer in layers
        for module in layer.modules()
        for name, parameter in module.named_parameters(recurse=False)
    ]
    try:
        for module, name, parameter in kept:
            setattr(module, name, nn.Parameter(_whole(parameter), requires_grad=False))
        for layer in layers:
            layer.merge(safe_merge=True)  # into a copy of the weight, not in place
        yield
    finally:
        for module, name, parameter in kept:
            setattr(module, name, parameter)
        for layer in layers:
            layer.merged_adapters.clear()


def _whole(parameter: nn.Parameter) -> torch.Tensor:
    """Return a parameter's value, gathered from all processes if FSDP2 has sharded it."""
    value = parameter.data
    if isinstance(value, DTensor):
        return value.to(value.device_mesh.device_type).full_tensor()  # offloaded to the CPU, it cannot be gathered
    return value


def _checkpoint_name(name: str) -> str:
    """Return the name that a parameter has in a checkpoint of the base."""
    name = name.removeprefix("base_model.model.")
    for part in (".base_layer", "_checkpoint_wrapped_module.", "modules_to_save.default."):
        name = name.replace(part, "")
    return name


def padded(logps: list[list[float]], completion_ids: torch.Tensor) -> torch.Tensor:
    """
    Return log-probabilities as a tensor of the shape of the completions.

    Args:
        logps (`list[list[float]]`):
            Those of the tokens of each completion.
        completion_ids (`torch.Tensor` of shape `(batch_size, completion_length)`):
            The completions, padded to the right.

    Returns:
        `torch.Tensor`: 0 where there is padding.
    """
    result = torch.zeros_like(completion_ids, dtype=torch.float32)
    for row, values in zip(result, logps, strict=True):
        row[: len(values)] = torch.tensor(values)
    return result


def correct_for_sampler(inputs: dict, per_token_logps: torch.Tensor, clip_max: float) -> dict[str, torch.Tensor]:
    """
    Multiply each completion's advantage, and so its loss, by its probability ratio of policy to sampler.

    The ratios are of whole completions' probabilities under the policy of the rollout. They are taken once: what they
    are computed from is removed.

    Args:
        inputs (`dict`):
            The micro-batch, with `advantages`, `completion_mask`, `sampling_per_token_logps` and, if it was computed,
            `old_per_token_logps`. A token whose log-probability under the sampler is NaN has a ratio of 1.
        per_token_logps (`torch.Tensor` of shape `(batch_size, completion_length)`):
            Log-probabilities under the policy in training, for want of `old_per_token_logps`.
        clip_max (`float`):
            Upper bound of a ratio.

    Returns:
        `dict[str, torch.Tensor]`: What is logged, by [`~trl.GRPOTrainer`]'s names.
    """
    difference = inputs.get("old_per_token_logps", per_token_logps) - inputs.pop("sampling_per_token_logps")
    log_ratios = (difference * inputs["completion_mask"]).nan_to_num(0.0).sum(1)
    ratios = log_ratios.exp().clamp(max=clip_max)
    inputs["advantages"] = inputs["advantages"] * ratios
    extremes = {"min": ratios.min(), "mean": ratios.mean(), "max": ratios.max()}
    return {f"sampling/importance_sampling_ratio/{name}": value for name, value in extremes.items()}
