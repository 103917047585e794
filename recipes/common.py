"""
What the stages share before any of them trains: settings that are checked, tasks, a model and its adapter.

Everything that can be wrong with the input is found here, before weights are loaded.
"""

import difflib
import json
import logging
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

# On a CPU bitsandbytes warns at import that 4-bit layers could be faster, also where there are none
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

import torch  # noqa: E402
import yaml  # noqa: E402
from datasets import Dataset  # noqa: E402
from default_model import DEFAULT_MODEL, default_model  # noqa: E402
from peft import PeftModel  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase  # noqa: E402
from trl import ModelConfig, TrlParser, get_quantization_config  # noqa: E402

from rewards import load_tasks  # noqa: E402
from sandbox import MAX_TIMEOUT  # noqa: E402


@dataclass
class TaskArguments:
    """
    The tasks a stage works on.

    Args:
        dataset_name (`str`, *optional*, defaults to `"humaneval"`):
            What [`~rewards.load_tasks`] reads: `"humaneval"`, a JSONL file, or a Hub dataset id.
        dataset_train_split (`str`, *optional*, defaults to `"train"`):
            The split to train on.
    """

    dataset_name: str = field(default="humaneval", metadata={"help": "'humaneval', a JSONL file, or a Hub dataset id."})
    dataset_train_split: str = field(default="train", metadata={"help": "The split to train on."})


def parse_settings(*dataclass_types, argv: list[str] | None = None) -> tuple:
    """
    The settings of a stage, from `--config FILE.yaml` and `--field value`, which has the last word.

    Args:
        *dataclass_types (`type`):
            The dataclasses whose fields are the valid settings.
        argv (`list[str]`, *optional*):
            Command line without the program's name, by default this process's.

    Returns:
        `tuple`: One instance a dataclass, then a `dict` of the fields that were set and their values.

    Raises:
        SystemExit: A field is unknown (the nearest valid name is given), a file is missing, or a value is refused.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    argv = [part for arg in argv for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
    parser = TrlParser(dataclass_types)
    valid = {action.dest for action in parser._actions} - {"help"}
    if "use_cpu" in valid and not torch.accelerator.is_available():
        parser.set_defaults(use_cpu=True)  # TrainingArguments wants to be told before it allows bf16
    in_file = {}
    if "--config" in argv:
        path = Path((argv[argv.index("--config") + 1 :] or ["(nothing)"])[0])
        if not path.is_file():
            raise SystemExit(f"--config: there is no file {path}")
        try:
            in_file = yaml.safe_load(path.read_text())
        except yaml.YAMLError as error:
            raise SystemExit(f"{path} is not YAML: {error}") from None
        if not isinstance(in_file, dict):
            raise SystemExit(f"{path}: a recipe is a list of `field: value` lines")
        _refuse_unknown([name for name in in_file if name != "env"], valid, str(path))
    on_line = [arg[2:].split("=")[0] for arg in argv if arg.startswith("--") and arg not in ("--config", "--help")]
    _refuse_unknown(on_line, valid | {name.replace("_", "-") for name in valid}, "the command line")
    on_line = [name.replace("-", "_") for name in on_line]
    argv += _fp32_instead_of_bf16(in_file, valid - set(on_line))
    try:
        parsed = parser.parse_args_and_config(argv)
    except ValueError as error:
        raise SystemExit(f"{path if in_file else 'the command line'}: {error}") from error

    given = sorted({name for name in in_file if name != "env"} | set(on_line))
    values = {name: value for part in parsed for name, value in vars(part).items()}
    return *parsed, {name: values[name] for name in given if name in values}


def multiplies_in_bf16() -> bool:
    """
    Whether this machine has instructions for bf16 products.

    Returns:
        `bool`: Taken for granted of an accelerator.
    """
    instructions = ("avx512_bf16", "amx_bf16", "bf16")  # x86's two, and Arm's
    return torch.accelerator.is_available() or any(map(torch.cpu.get_capabilities().get, instructions))


def _fp32_instead_of_bf16(in_file: dict, fields: set[str]) -> list[str]:
    """
    What to add to the command line where a recipe wants bf16 and the processor has no instructions for it.

    Emulated, a bf16 product takes two to four times as long as one in fp32.
    """
    if multiplies_in_bf16():
        return []
    in_bf16 = {"dtype": in_file.get("dtype") == "bfloat16", "bf16": in_file.get("bf16", True)}  # bf16 is TRL's default
    in_fp32 = {"dtype": "float32", "bf16": "false"}
    added = [part for name in in_fp32 if name in fields and in_bf16[name] for part in (f"--{name}", in_fp32[name])]
    if added and os.environ.get("RANK", "0") == "0":  # PartialState is TrainingArguments' to set up, which come later
        print(f"This processor has no bf16 instructions: computing in fp32, which is faster here ({' '.join(added)})")
    return added


def _refuse_unknown(names: list[str], valid: set[str], where: str) -> None:
    for name in names:
        if name not in valid:
            near = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
            hint = f": did you mean {near[0]!r}?" if near else ""
            raise SystemExit(f"{where}: unknown field {name!r}{hint}")


def load_stage_tasks(dataset_name: str, split: str, setting: str = "dataset_name") -> Dataset:
    """
    The tasks of a stage.

    Args:
        dataset_name (`str`):
            What [`~rewards.load_tasks`] reads.
        split (`str`):
            The split.
        setting (`str`, *optional*, defaults to `"dataset_name"`):
            Its name in an error.

    Returns:
        [`~datasets.Dataset`]: The tasks.

    Raises:
        SystemExit: A row is malformed, or there is no such file, split or dataset.
    """
    try:
        return load_tasks(dataset_name, split)
    except (ValueError, OSError) as error:
        raise SystemExit(f"{setting}: {error}") from error


def model_path(model_name_or_path: str | None) -> str:
    """
    Where a model is loaded from.

    Args:
        model_name_or_path (`str`):
            `"qwen2.5-coder-0.5b-instruct"` for the default model, which is fetched if need be, a folder, or a Hub id.

    Returns:
        `str`: A folder or a Hub id.
    """
    if not model_name_or_path:
        raise SystemExit(f"model_name_or_path is not set: write a folder, a Hub id, or {DEFAULT_MODEL}")
    if os.path.isdir(model_name_or_path):
        return model_name_or_path
    if os.path.basename(model_name_or_path) == DEFAULT_MODEL:
        return str(default_model())  # also under the path that an adapter made on another machine remembers
    if model_name_or_path.count("/") != 1 or model_name_or_path.startswith((".", "/", "~")):
        raise SystemExit(
            f"model_name_or_path: there is no folder {model_name_or_path!r}, and a Hub id has the form owner/name "
            f"(the default model is called {DEFAULT_MODEL})"
        )
    return model_name_or_path


def adapter_base(adapter: str) -> str:
    """
    The base that an adapter was trained on.

    Args:
        adapter (`str`):
            Directory with `adapter_config.json`.

    Returns:
        `str`: The base's folder or Hub id, as the adapter's configuration names it.
    """
    path = Path(adapter) / "adapter_config.json"
    if not path.is_file():
        raise SystemExit(f"there is no adapter in {adapter!r} (no {path.name}): has the stage that writes it finished?")
    return json.loads(path.read_text())["base_model_name_or_path"]


def check_policy(model_args: ModelConfig, adapter: str | None = None, generates: bool = True) -> None:
    """
    Check everything about a policy that can be checked before weights are loaded; resolves the model's name in place.

    Args:
        model_args ([`~trl.ModelConfig`]):
            Which base, in which precision; `model_name_or_path` is replaced by [`model_path`] of it.
        adapter (`str`, *optional*):
            Directory of an adapter to be put on the base.
        generates (`bool`, *optional*, defaults to `True`):
            Whether the stage samples completions.
    """
    if generates and model_args.load_in_4bit and not torch.cuda.is_available():
        raise SystemExit(
            "load_in_4bit: a stage that generates cannot use a 4-bit base on a CPU (bitsandbytes repacks its weights at "
            "the first generation, and the packed layers have no gradient): set load_in_4bit to false"
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
    The tokenizer of a base, with a padding token.

    Args:
        model_args ([`~trl.ModelConfig`]):
            A base that went through [`check_policy`].
        padding_side (`str`, *optional*, defaults to `"right"`):
            `"left"` for the trainers that generate.

    Returns:
        [`~transformers.PreTrainedTokenizerBase`]
    """
    tokenizer = AutoTokenizer.from_pretrained(
        model_args.model_name_or_path, revision=model_args.model_revision, padding_side=padding_side
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_policy(model_args: ModelConfig, adapter: str | None = None):
    """
    A base, and an adapter on it that can be trained on.

    Args:
        model_args ([`~trl.ModelConfig`]):
            A base that went through [`check_policy`].
        adapter (`str`, *optional*):
            Directory of the adapter.

    Returns:
        [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]: The adapter's parameters are fp32.
    """
    model = AutoModelForCausalLM.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        dtype=model_args.dtype if model_args.dtype in (None, "auto") else getattr(torch, model_args.dtype),
        attn_implementation=model_args.attn_implementation,
        quantization_config=get_quantization_config(model_args),
    )
    return PeftModel.from_pretrained(model, adapter, is_trainable=True) if adapter else model


def check_timeout(seconds: float, most: float = MAX_TIMEOUT) -> None:
    """
    Check the setting `sandbox_timeout`.

    Args:
        seconds (`float`):
            Its value.
        most (`float`, *optional*, defaults to `3600`):
            The most that it may be.

    Raises:
        ValueError: It is none that [`~sandbox.Sandbox`] takes.
    """
    if not 0 < seconds <= most:
        raise ValueError(f"sandbox_timeout is {seconds}: write a number of seconds above 0 and at most {most:g}")


def refuse_several_processes(stage: str) -> None:
    """
    End a stage that was launched as several processes and is written for one.

    Args:
        stage (`str`):
            The stage's name.

    Raises:
        SystemExit: There are several.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise SystemExit(f"{stage} runs in one process: launch it with --num_processes 1")
