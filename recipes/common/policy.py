"""
Find, check and load a policy: a base model, its tokenizer, and the adapter on it.

Whatever can be checked without weights is checked before they are loaded.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from datasets import Dataset
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import ModelConfig, get_quantization_config

from recipes.common.run_directory import file_sha256
from recipes.default_model import DEFAULT_MODEL, default_model
from trainers.device import free_memory
from trainers.memory import activation_bytes, longest_prompt


def model_path(model_name_or_path: str | None) -> str:
    """
    Resolve a model's name.

    Args:
        model_name_or_path (`str`):
            A directory, a Hub id, or `"qwen2.5-coder-0.5b-instruct"` for the default model, which is downloaded if
            need be.

    Returns:
        `str`: A directory or a Hub id.

    Raises:
        SystemExit: It is not set, or neither a directory nor a Hub id.
    """
    if not model_name_or_path:
        raise SystemExit(f"model_name_or_path is not set: write a directory, a Hub id, or {DEFAULT_MODEL}")
    if os.path.isdir(model_name_or_path):
        return model_name_or_path
    if os.path.basename(model_name_or_path) == DEFAULT_MODEL:
        return str(default_model())  # also where an adapter names its path on another machine
    if not _is_hub_id(model_name_or_path):
        raise SystemExit(
            f"model_name_or_path: there is no directory {model_name_or_path!r}, and a Hub id has the form owner/name "
            f"(the default model is called {DEFAULT_MODEL})"
        )
    return model_name_or_path


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def adapter_base(adapter: str) -> str:
    """
    Return the base that an adapter was trained on.

    Args:
        adapter (`str`):
            Directory with `adapter_config.json`.

    Returns:
        `str`: The base's directory or Hub id, as the adapter's configuration names it.

    Raises:
        SystemExit: There is no adapter in the directory, or its base is not where it was.
    """
    path = Path(adapter) / "adapter_config.json"
    if not path.is_file():
        raise SystemExit(f"there is no adapter in {adapter!r} (no {path.name}): has the stage that writes it finished?")
    base = json.loads(path.read_text())["base_model_name_or_path"]
    if not os.path.isdir(base) and os.path.basename(base) != DEFAULT_MODEL and not _is_hub_id(base):
        raise SystemExit(
            f"the base {base} of the adapter in {adapter} is not there: if it has moved, write its new place into "
            f"base_model_name_or_path of {path}"
        )
    return base


def split_off_adapter(model_args: ModelConfig) -> str | None:
    """
    Let `model_name_or_path` be an adapter's directory: put the adapter's base in its place.

    Args:
        model_args ([`~trl.ModelConfig`]):
            The policy.

    Returns:
        `str` or `None`: The adapter's directory, if it is one.
    """
    adapter = model_args.model_name_or_path
    if not adapter or not Path(adapter, "adapter_config.json").is_file():
        return None
    model_args.model_name_or_path = adapter_base(adapter)
    return adapter


def adapter_sha256(adapter: str) -> str:
    """
    Return the hash that tells two adapters apart that were trained into the same directory.

    Args:
        adapter (`str`):
            The adapter's directory.

    Returns:
        `str`: SHA-256 of its weights.
    """
    return file_sha256(Path(adapter, "adapter_model.safetensors"))


def check_policy(model_args: ModelConfig, adapter: str | None = None, generates_on: torch.device | None = None) -> None:
    """
    Check what can be checked of a policy without its weights, and resolve the model's name in place.

    Args:
        model_args ([`~trl.ModelConfig`]):
            The base and its precision. `model_name_or_path` is replaced by [`model_path`] of it.
        adapter (`str`, *optional*):
            Directory of the adapter to put on the base.
        generates_on (`torch.device`, *optional*):
            Device on which the stage samples completions. If `None`, it does not sample.

    Raises:
        SystemExit: The policy cannot be loaded or used as asked.
    """
    if model_args.load_in_4bit and generates_on is not None and generates_on.type == "cpu":
        raise SystemExit(
            "load_in_4bit: a stage that generates cannot use a 4-bit base on a CPU (bitsandbytes repacks its weights "
            "at the first generation, and the packed layers have no gradient): set load_in_4bit to false"
        )
    dtype = model_args.dtype
    if dtype not in (None, "auto") and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise SystemExit(f"dtype is {dtype!r}: write bfloat16, float16, float32 or auto")
    if model_args.load_in_4bit and (parse_flag_from_env("ACCELERATE_USE_FSDP") or is_deepspeed_zero3_enabled()):
        _store_4bit_as(dtype, model_args)
    base = adapter_base(adapter) if adapter else None
    model_args.model_name_or_path = model_path(model_args.model_name_or_path)
    if Path(model_args.model_name_or_path, "adapter_config.json").is_file():
        raise SystemExit(
            f"model_name_or_path: {model_args.model_name_or_path} holds an adapter, and a base is needed: write it as "
            "adapter_name_or_path. A stage without this field takes it merged, by recipes/merge.py"
        )
    if base and os.path.realpath(model_path(base)) != os.path.realpath(model_args.model_name_or_path):
        raise SystemExit(
            f"adapter_name_or_path: {adapter} was trained on the base {base}, and model_name_or_path is "
            f"{model_args.model_name_or_path}: set model_name_or_path to the adapter's base"
        )


def check_memory(model_args: ModelConfig, args: Any, tasks: Dataset, tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Check that a micro-batch of an RL stage fits into the memory of its GPU.

    Args:
        model_args ([`~trl.ModelConfig`]):
            A base that passed [`check_policy`].
        args ([`~trainers.PolicyGradientConfig`]):
            The stage's fields.
        tasks ([`~datasets.Dataset`]):
            The training tasks.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The base's tokenizer.

    Raises:
        SystemExit: The weights and the activations of a micro-batch take more than what is free. Nothing is checked
            on a CPU, nor where the architecture is not covered by [`~trainers.memory.activation_bytes`].
    """
    if (free := free_memory(args.device)) is None:
        return
    config = AutoConfig.from_pretrained(model_args.model_name_or_path, revision=model_args.model_revision)
    with torch.device("meta"):
        num_parameters = AutoModelForCausalLM.from_config(config).num_parameters()
    dtype = torch.bfloat16 if args.bf16 or args.fp16 else torch.float32
    weights = num_parameters * (0.5 if model_args.load_in_4bit else 4 if model_args.dtype == "float32" else 2)
    num_rows, prompt_length = args.per_device_train_batch_size, longest_prompt(tasks, tokenizer) or 0
    num_tokens = num_rows * (prompt_length + args.max_completion_length)
    activations = activation_bytes(config, num_tokens, dtype, checkpointing=args.gradient_checkpointing is not False)
    if activations is not None and weights + activations > free:
        without = " without gradient_checkpointing" if args.gradient_checkpointing is False else ""
        raise SystemExit(
            f"per_device_train_batch_size is {num_rows}: with prompts of up to {prompt_length} tokens and completions "
            f"of {args.max_completion_length} the activations take {activations / 1e9:.1f} GB{without}, the weights "
            f"take {weights / 1e9:.1f}, and {free / 1e9:.1f} GB of the GPU are free: lower it, and raise "
            "gradient_accumulation_steps"
        )


def _store_4bit_as(dtype: str | None, model_args: ModelConfig) -> None:
    """Let 4-bit weights be stored in the dtype of the others, which FSDP and ZeRO-3 shard together with them."""
    storage = model_args.bnb_4bit_quant_storage or dtype
    if dtype in (None, "auto") or storage != dtype:
        raise SystemExit(
            f"bnb_4bit_quant_storage is {storage!r} and dtype {dtype!r}: to shard a 4-bit base with FSDP or ZeRO-3 "
            "write the same dtype for both, such as bfloat16"
        )
    model_args.bnb_4bit_quant_storage = dtype


def load_tokenizer(model_args: ModelConfig, padding_side: str = "right") -> PreTrainedTokenizerBase:
    """
    Load a base's tokenizer and make sure that it has a padding token.

    Args:
        model_args ([`~trl.ModelConfig`]):
            A base that passed [`check_policy`].
        padding_side (`str`, *optional*, defaults to `"right"`):
            `"left"` for trainers that generate.

    Returns:
        [`~transformers.PreTrainedTokenizerBase`]

    Raises:
        SystemExit: The directory or the Hub has no such tokenizer, or the Hub cannot be reached.
    """
    name = model_args.model_name_or_path
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=model_args.model_revision, padding_side=padding_side)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise SystemExit(
            f"model_name_or_path: no tokenizer could be loaded from {name!r}: check the name and, for a Hub id, the "
            f"connection ({reason})"
        ) from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_policy(
    model_args: ModelConfig, device: torch.device, adapter: str | None = None
) -> PreTrainedModel | PeftModel:
    """
    Load a base, and an adapter on it that can be trained.

    Args:
        model_args ([`~trl.ModelConfig`]):
            A base that passed [`check_policy`].
        device (`torch.device`):
            The run's device. A 4-bit base is loaded onto it; another one is loaded on the CPU, and trainers move it.
        adapter (`str`, *optional*):
            Directory of the adapter.

    Returns:
        [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]: The adapter's parameters are fp32, under ZeRO-3 of
            the base's dtype.
    """
    quantization_config = get_quantization_config(model_args)
    model = AutoModelForCausalLM.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        dtype=model_args.dtype if model_args.dtype in (None, "auto") else getattr(torch, model_args.dtype),
        attn_implementation=model_args.attn_implementation,
        quantization_config=quantization_config,
        device_map=None if quantization_config is None else {"": device},
    )
    if not adapter:
        return model
    # ZeRO-3 gathers parameters of one dtype only, and keeps fp32 masters itself
    in_fp32 = not is_deepspeed_zero3_enabled()
    return PeftModel.from_pretrained(model, adapter, is_trainable=True, autocast_adapter_dtype=in_fp32)
