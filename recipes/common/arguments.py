"""
Parse and check what a stage is told: its fields, and the tasks they name.

A mistake is reported here, with the field and what to write, before any weights are loaded.
"""

import argparse
import difflib
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from transformers.hf_argparser import string_to_bool
from trl import TrlParser

from recipes.common.prompts import PromptArguments
from recipes.common.run_directory import file_sha256
from rewards import load_tasks
from sandbox import MAX_TIMEOUT
from trainers import run_device, supports_bf16
from trainers.device import training_dtype


@dataclass
class TaskArguments(PromptArguments):
    """The tasks that a stage trains on."""

    dataset_name: str = field(
        default="humaneval", metadata={"help": "Tasks: 'humaneval', a JSONL file, or a dataset on the Hub."}
    )
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})


def parse_settings(*dataclass_types: type, argv: list[str] | None = None) -> tuple[Any, ...]:
    """
    Parse a stage's fields from `--config FILE.yaml` and from `--field value`, which takes precedence.

    Args:
        *dataclass_types (`type`):
            Dataclasses whose fields are the valid fields.
        argv (`list[str]`, *optional*):
            Command line without the program's name. Defaults to this process's.

    Returns:
        `tuple`: One instance per dataclass, then a `dict` of the fields that were set and their values. Where
        `dataset_name` or `eval_dataset_name` is a file, `dataset_sha256` or `eval_dataset_sha256` is added: with other
        tasks it is another run.

    Raises:
        SystemExit: A field is unknown (the closest valid name is given), a file is missing, or a value is refused.
    """
    config, argv = _split_off("--config", sys.argv[1:] if argv is None else argv)
    recipe = _read_recipe(config) if config else {}
    parser = TrlParser(dataclass_types)
    valid = {action.dest for action in parser._actions} - {"help"}
    _refuse_unknown([name for name in recipe if name != "env"], valid, config)
    on_line = [arg[2:].split("=")[0] for arg in argv if arg.startswith("--") and arg != "--help"]
    _refuse_unknown(on_line, valid | {name.replace("_", "-") for name in valid}, "the command line")
    on_line = [name.replace("-", "_") for name in on_line]

    use_cpu, _ = _split_off(
        "--use_cpu", argv, type=string_to_bool, nargs="?", const=True, default=recipe.get("use_cpu")
    )
    device = run_device(bool(use_cpu))
    if "use_cpu" in valid and device.type == "cpu":
        parser.set_defaults(use_cpu=True)  # TrainingArguments allows bf16 on a CPU only if told that this is one
    _refuse_shared_accelerators(device)
    argv = [*argv, *_precision(recipe, argv, valid, device)]
    try:
        parsed = parser.parse_args_and_config([*(["--config", config] if config else []), *argv])
    except ValueError as error:
        raise SystemExit(f"{config or 'the command line'}: {error}") from error

    for part in parsed:
        if getattr(part, "n_gpu", 1) > 1:
            part._n_gpu = 1  # one process: on several GPUs Trainer would use nn.DataParallel, with a larger batch
        if getattr(part, "lr_scheduler_type", None) == "constant" and part.warmup_steps:
            raise SystemExit(
                f"{config or 'the command line'}: warmup_steps is {part.warmup_steps}, which lr_scheduler_type "
                "constant ignores: write constant_with_warmup"
            )
    given = sorted({name for name in recipe if name != "env"} | set(on_line))
    values = {name: value for part in parsed for name, value in vars(part).items()}
    settings = {name: values[name] for name in given if name in values}
    for prefix in ("", "eval_"):
        if os.path.isfile(tasks := os.path.expanduser(settings.get(f"{prefix}dataset_name") or "")):
            settings[f"{prefix}dataset_sha256"] = file_sha256(tasks)
    return *parsed, settings


def _split_off(flag: str, argv: list[str], **kind: Any) -> tuple[Any, list[str]]:
    """Return a flag's value and the command line without the flag."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(flag, flag.replace("_", "-"), dest="value", **kind)
    namespace, rest = parser.parse_known_args(argv)
    return namespace.value, rest


def _read_recipe(path: str) -> dict:
    if not Path(path).is_file():
        raise SystemExit(f"--config: there is no file {path}")
    try:
        recipe = yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as error:
        raise SystemExit(f"{path} is not YAML: {error}") from None
    if not isinstance(recipe, dict):
        raise SystemExit(f"{path}: a recipe consists of `field: value` lines")
    return recipe


def _precision(recipe: dict, argv: list[str], fields: set[str], device: torch.device) -> list[str]:
    """Return what to add to the command line where a recipe asks for bf16 and the device would emulate it."""
    flags: dict[str, Any] = {name: {"type": string_to_bool, "nargs": "?", "const": True} for name in ("bf16", "fp16")}
    flags["dtype"] = {}
    on_line = {name: _split_off(f"--{name}", argv, **kind)[0] for name, kind in flags.items() if name in fields}
    on_line = {name: value for name, value in on_line.items() if value is not None}
    asked = {name: on_line.get(name, recipe.get(name)) for name in flags}
    if device.type == "cpu":
        for name, value in (("fp16", True), ("dtype", "float16")):
            if asked[name] == value:
                raise SystemExit(f"{name} is {str(value).lower()}: fp16 needs a GPU, compute in bf16 or fp32 on a CPU")
    if supports_bf16(device):
        return []
    for name, value in (("bf16", True), ("dtype", "bfloat16")):
        if on_line.get(name) == value:
            raise SystemExit(
                f"--{name} {str(value).lower()}: this {_kind(device)} has no bf16 instructions and would emulate them, "
                "slower than fp32: leave it out, and the recipe's precision is replaced by the fastest there is"
            )
    dtype = training_dtype(device)
    added = []
    if "dtype" in fields - set(on_line) and recipe.get("dtype") == "bfloat16":
        added += ["--dtype", str(dtype).removeprefix("torch.")]
    if "bf16" in fields - set(on_line) and recipe.get("bf16", not asked["fp16"]):  # TRL's default
        added += ["--bf16", "false"]
        if dtype == torch.float16 and "fp16" not in on_line:
            added += ["--fp16", "true"]
    if added and os.environ.get("RANK", "0") == "0":  # PartialState is not set up yet, that is up to TrainingArguments
        name = "fp16, with a loss scaler" if dtype == torch.float16 else "fp32"
        print(f"This {_kind(device)} has no bf16 instructions: computing in {name} ({' '.join(added)})")
    return added


def _kind(device: torch.device) -> str:
    return "CPU" if device.type == "cpu" else "GPU"


def _refuse_shared_accelerators(device: torch.device) -> None:
    """Stop a run that was launched with more processes than this machine has accelerators."""
    num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device.type == "cpu" or num_processes <= (num_devices := torch.accelerator.device_count()):
        return
    raise SystemExit(
        f"{num_processes} processes were launched on a machine with {num_devices} GPU{'s' * (num_devices > 1)}, and "
        f"each needs one of its own: launch with --num_processes {num_devices}"
    )


def _refuse_unknown(names: list[str], valid: set[str], where: str) -> None:
    for name in names:
        if name not in valid:
            close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
            hint = f": did you mean {close[0]!r}?" if close else ""
            raise SystemExit(f"{where}: unknown field {name!r}{hint}")


def load_stage_tasks(dataset_name: str, split: str, field_name: str = "dataset_name") -> Dataset:
    """
    Load the tasks of a stage.

    Args:
        dataset_name (`str`):
            What [`~rewards.load_tasks`] reads.
        split (`str`):
            The split.
        field_name (`str`, *optional*, defaults to `"dataset_name"`):
            The field that an error names.

    Returns:
        [`~datasets.Dataset`]: The tasks.

    Raises:
        SystemExit: A row is malformed, or there is no such file, split or dataset.
    """
    try:
        return load_tasks(dataset_name, split)
    except (ValueError, OSError) as error:
        raise SystemExit(f"{field_name}: {error}") from error


def check_timeout(seconds: float, maximum: float = MAX_TIMEOUT) -> None:
    """
    Check the field `sandbox_timeout`.

    Args:
        seconds (`float`):
            Its value.
        maximum (`float`, *optional*, defaults to `3600`):
            The largest value allowed.

    Raises:
        ValueError: [`~sandbox.Sandbox`] does not take it.
    """
    if not 0 < seconds <= maximum:
        raise ValueError(f"sandbox_timeout is {seconds}: write a number of seconds above 0 and at most {maximum:g}")


def check_length_penalty(length_penalty: float) -> None:
    """
    Check the field `length_penalty`.

    Args:
        length_penalty (`float`):
            Its value.

    Raises:
        ValueError: It is negative.
    """
    if not length_penalty >= 0:
        raise ValueError(f"length_penalty is {length_penalty}: write 0 or more, it is subtracted")


def check_pass_rates(min_pass_rate: float, max_pass_rate: float) -> None:
    """
    Check the fields that choose tasks by how often a policy passes them.

    Args:
        min_pass_rate (`float`):
            Its value.
        max_pass_rate (`float`):
            Its value.

    Raises:
        ValueError: They are no range within [0, 1].
    """
    if not 0 <= min_pass_rate <= max_pass_rate <= 1:
        raise ValueError(
            f"min_pass_rate is {min_pass_rate} and max_pass_rate {max_pass_rate}: write numbers in [0, 1], the smaller "
            "one first"
        )


def check_sampling(arguments: Any) -> None:
    """
    Check the fields by which a stage samples.

    Args:
        arguments:
            Holds `top_p`, `num_generations`, `per_device_eval_batch_size` and `max_completion_length`.

    Raises:
        ValueError: One of them is out of range.
    """
    if not 0 < arguments.top_p <= 1:
        raise ValueError(f"top_p is {arguments.top_p}: write a number above 0 and at most 1")
    for name in ("num_generations", "per_device_eval_batch_size", "max_completion_length"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"{name} is {getattr(arguments, name)}: write 1 or more")


def refuse_several_processes(stage: str) -> None:
    """
    Stop a single-process stage that was launched as several processes.

    Args:
        stage (`str`):
            The stage's name.

    Raises:
        SystemExit: There are several processes.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise SystemExit(f"{stage} runs in one process: launch it with --num_processes 1")
