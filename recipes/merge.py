"""
Merge an adapter into its base: a model directory that vLLM, transformers and llama.cpp's converter read.

    python recipes/merge.py --adapter_name_or_path runs/qwen2.5-coder-0.5b/reinforce --output_dir models/reinforce \
        --results results/base results/reinforce

W + scaling * BA is computed in fp32 and rounded once to the base's dtype. Writes the weights, tokenizer, chat template,
generation config and a model card (`README.md`), with the table of the evaluations that `--results` names. Everything
is written to a temporary directory that is renamed at the end, so an interrupted merge leaves nothing incomplete.

Not covered: quantised output, and adapters other than PEFT's that can be merged.
"""

import json
import os
import tempfile
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from recipes.common.arguments import parse_settings, refuse_several_processes
from recipes.common.policy import adapter_base, adapter_sha256, check_policy, load_policy
from recipes.common.provenance import training_commands
from recipes.common.tables import results_table
from recipes.default_model import DEFAULT_MODEL, HUB_ID

# isort: split
import torch
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from trl import ModelConfig

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

CARD = """\
---
{front_matter}---

# {name}

{base}, fine-tuned with [LoRA](https://huggingface.co/papers/2106.09685) to write programs that pass unit tests. The
adapter is merged: W + scaling BA was computed in fp32 and rounded once to {dtype}. The base's licence applies.

{evaluation}## Use

```bash
vllm serve {name}    # or: transformers serve {name}
```
{training}
Adapter: SHA-256 `{sha256}`. Versions: {versions}.
"""


@dataclass
class MergeArguments:
    """What is merged and where it is written."""

    adapter_name_or_path: str | None = field(default=None, metadata={"help": "Directory of the adapter."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Directory to write. It must not exist; its last part names the model."}
    )
    results: list[str] | None = field(
        default=None, metadata={"help": "Result directories of evaluate.py, for the model card's table."}
    )


def main() -> None:
    args, _ = parse_settings(MergeArguments)
    refuse_several_processes("merge")
    for name in ("adapter_name_or_path", "output_dir"):
        if getattr(args, name) is None:
            raise SystemExit(f"{name} is not set: write a directory")
    output = Path(args.output_dir)
    if output.exists():
        raise SystemExit(f"output_dir {output} exists: choose another, or remove it if it is not needed")
    table = results_table(args.results) if args.results else ""
    base = adapter_base(args.adapter_name_or_path)
    model_args = ModelConfig(model_name_or_path=base, dtype="auto")
    check_policy(model_args, args.adapter_name_or_path)
    check_merge(str(model_args.model_name_or_path), args.adapter_name_or_path)
    if was_trained_in_4bit(args.adapter_name_or_path):
        print(
            f"The adapter was trained over {base} in 4 bits and is merged into the weights before quantisation, to "
            "which it is not fitted exactly: evaluate the merged model"
        )

    model = merge(model_args, args.adapter_name_or_path)
    card = model_card(output.name, base, args.adapter_name_or_path, model, table)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as work:
            draft = Path(work) / output.name
            model.save_pretrained(draft)
            tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
            if (template := Path(args.adapter_name_or_path) / "chat_template.jinja").is_file():
                tokenizer.chat_template = template.read_text()  # with the run's chat_template_kwargs
            tokenizer.save_pretrained(draft)
            (draft / "README.md").write_text(card)
            os.rename(draft, output)
    except (OSError, SafetensorError) as error:
        raise SystemExit(f"{output} cannot be written: {error}") from error
    print(f"{output}: the merged model, in {str(model.dtype).removeprefix('torch.')}")


def check_merge(base: str, adapter: str) -> None:
    """
    Check without weights that an adapter can be added to a base's weights.

    Args:
        base (`str`):
            The base's directory or Hub id.
        adapter (`str`):
            The adapter's directory.

    Raises:
        SystemExit: The base is quantised, the adapter's weights are missing, or they are no change of the base's.
    """
    if not (Path(adapter) / WEIGHTS).is_file():
        raise SystemExit(f"adapter_name_or_path: {adapter} has no {WEIGHTS}: has the stage that writes it finished?")
    config: Any = PeftConfig.from_pretrained(adapter)
    if config.is_prompt_learning:
        raise SystemExit(f"adapter_name_or_path: {adapter} is a learnt prompt, which cannot be merged into weights")
    model: Any = AutoConfig.from_pretrained(base)
    quantization = getattr(model, "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
        raise SystemExit(
            f"the weights of {base} are quantised ({method}), and an adapter cannot be added to them: write the model "
            f"that they were quantised from into base_model_name_or_path of the adapter's {CONFIG}"
        )
    targets = [config.target_modules] if isinstance(config.target_modules, str) else config.target_modules or []
    tied = [name for name in targets if name.split(".")[-1] in ("lm_head", "embed_tokens")]
    if tied and model.get_text_config().tie_word_embeddings:
        raise SystemExit(
            f"adapter_name_or_path: {adapter} changes {tied[0]}, whose weights {base} uses for its embedding and its "
            "LM head alike: one of them cannot be changed alone, so serve the adapter beside its base"
        )


def was_trained_in_4bit(adapter: str) -> bool:
    """
    Return whether a stage here trained an adapter over a 4-bit base.

    Args:
        adapter (`str`):
            The adapter's directory.

    Returns:
        `bool`: `False` also where there is no record of the training.
    """
    record = Path(adapter) / "run.json"
    return record.is_file() and bool(json.loads(record.read_text())["settings"].get("load_in_4bit"))


def merge(model_args: ModelConfig, adapter: str) -> PreTrainedModel:
    """
    Load a base and add an adapter to its weights.

    Args:
        model_args ([`~trl.ModelConfig`]):
            A base that passed [`check_policy`](common/policy.py).
        adapter (`str`):
            The adapter's directory.

    Returns:
        [`~transformers.PreTrainedModel`]: In the base's dtype. Its generations end with the base's tokens and with the
        EOS token that the adapter was trained with.

    Raises:
        SystemExit: The adapter does not fit or cannot be merged.
    """
    policy: Any = load_policy(model_args, torch.device("cpu"))
    base_dtype = policy.dtype
    try:
        # PEFT keeps the adapter in fp32, and adding fp32 to a weight in half precision rounds once
        policy = PeftModel.from_pretrained(policy, adapter)
        model = policy.merge_and_unload().to(base_dtype)
    except (RuntimeError, ValueError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split("\n")[:2])  # of a mismatch, the first of many tensors
        raise SystemExit(f"{adapter} cannot be merged into {model_args.model_name_or_path}: {reason}") from error
    if (Path(adapter) / "tokenizer_config.json").is_file():
        end = AutoTokenizer.from_pretrained(adapter).eos_token_id
        ends = model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        if end is not None and end not in ends:
            model.generation_config.eos_token_id = [*ends, end]
    return model


def model_card(name: str, base: str, adapter: str, model: PreTrainedModel, table: str) -> str:
    """
    Write a merged model's card.

    Args:
        name (`str`):
            The model's name.
        base (`str`):
            The base's directory, Hub id, or name.
        adapter (`str`):
            The adapter's directory.
        model ([`~transformers.PreTrainedModel`]):
            The merged model.
        table (`str`):
            A table of evaluations, may be empty.

    Returns:
        `str`: Markdown with the Hub's front matter.
    """
    base = HUB_ID if os.path.basename(base) == DEFAULT_MODEL else base
    front = [
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [code, lora, reinforcement-learning]",
    ]
    if not os.path.isdir(base):
        front.insert(0, f"base_model: {base}")
    commands = training_commands(adapter)
    return CARD.format(
        front_matter="".join(f"{line}\n" for line in front),
        name=name,
        base=base,
        dtype=str(model.dtype).removeprefix("torch."),
        evaluation=f"## Evaluation\n\n{table}\n\n" if table else "",
        training=f"\n## Training\n\n```bash\n{chr(10).join(commands)}\n```\n" if commands else "",
        sha256=adapter_sha256(adapter),
        versions=", ".join(f"{package} {version(package)}" for package in ("torch", "transformers", "peft", "trl")),
    )


if __name__ == "__main__":
    main()
