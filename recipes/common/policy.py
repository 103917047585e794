"""
Find, check and load a policy: a base model, its tokenizer, and the adapter on it.

Whatever can be checked without weights is checked before they are loaded.
"""

import hashlib
import json
import os
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig, get_quantization_config

from recipes.default_model import DEFAULT_MODEL, default_model


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
    if model_name_or_path.count("/") != 1 or model_name_or_path.startswith((".", "/", "~")):
        raise SystemExit(
            f"model_name_or_path: there is no directory {model_name_or_path!r}, and a Hub id has the form owner/name "
            f"(the default model is called {DEFAULT_MODEL})"
        )
    return model_name_or_path


def adapter_base(adapter: str) -> str:
    """
    Return the base that an adapter was trained on.

    Args:
        adapter (`str`):
            Directory with `adapter_config.json`.

    Returns:
        `str`: The base's directory or Hub id, as the adapter's configuration names it.

    Raises:
        SystemExit: There is no adapter in the directory.
    """
    path = Path(adapter) / "adapter_config.json"
    if not path.is_file():
        raise SystemExit(f"there is no adapter in {adapter!r} (no {path.name}): has the stage that writes it finished?")
    return json.loads(path.read_text())["base_model_name_or_path"]


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
    return hashlib.sha256(Path(adapter, "adapter_model.safetensors").read_bytes()).hexdigest()


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
    base = adapter_base(adapter) if adapter else None
    model_args.model_name_or_path = model_path(model_args.model_name_or_path)
    if base and os.path.realpath(model_path(base)) != os.path.realpath(model_args.model_name_or_path):
        raise SystemExit(
            f"adapter_name_or_path: {adapter} was trained on the base {base}, and model_name_or_path is "
            f"{model_args.model_name_or_path}: set model_name_or_path to the adapter's base"
        )


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
    """
    tokenizer = AutoTokenizer.from_pretrained(
        model_args.model_name_or_path, revision=model_args.model_revision, padding_side=padding_side
    )
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
        [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]: The adapter's parameters are fp32.
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
    return PeftModel.from_pretrained(model, adapter, is_trainable=True) if adapter else model
