"""
Record where an evaluation's numbers come from: the commands that reproduce them, the machine, and the training log.

Reads what the stages leave beside their output: the fields in `run.json`, the log in `trainer_state.json`. Not covered:
adapters that were trained elsewhere.
"""

import json
import os
import platform
import shlex
from pathlib import Path

import torch

# What the report needs of a trainer's log. Names that begin with `eval_` are those of the evaluation during training.
LOGGED = ("loss", "reward", "reward_std", "pass_rate", "completion_tokens", "kl", "approx_kl", "skipped_epochs")
LOGGED += ("clip_ratio/region_mean", "clip_ratio/low_mean", "clip_ratio/high_mean", "ratio/min", "ratio/max")
LOGGED += ("frac_mixed_groups", "completions/clipped_ratio", "rewards/margins")
LOGGED += ("rewards/accuracies", "mean_token_accuracy", "entropy", "grad_norm", "learning_rate")
LOGGED += ("step_time", "train_runtime")


def training_log(adapter: str) -> list[dict]:
    """
    Return the log of an adapter's training.

    Args:
        adapter (`str`):
            Directory of the adapter.

    Returns:
        `list[dict]`: The `step` of each entry and its values of [`LOGGED`], to six digits. Empty if the directory has
        no `trainer_state.json`.
    """
    path = Path(adapter) / "trainer_state.json"
    if not path.is_file():
        return []
    names = [*LOGGED, *(f"eval_{name}" for name in LOGGED)]  # TRL logs a mean of nothing as None
    return [
        {"step": entry["step"]} | {name: float(f"{entry[name]:.6g}") for name in names if entry.get(name) is not None}
        for entry in json.loads(path.read_text())["log_history"]
    ]


def training_commands(folder: str | None) -> list[str]:
    """
    Return the commands that reproduce a stage's output, beginning with the stages it builds on.

    Args:
        folder (`str`, *optional*):
            The output directory of a stage.

    Returns:
        `list[str]`: One command per stage with every field that was set. Empty where there is no `run.json`.
    """
    path = Path(folder or "") / "run.json"
    if folder is None or not path.is_file():
        return []
    run = json.loads(path.read_text())
    settings = run["settings"]
    sources = [settings.get(name) for name in ("adapter_name_or_path", "preferences", "samples")]
    tasks = Path(settings.get("dataset_name", "")).expanduser()
    if tasks.name == "tasks.jsonl" and (tasks.parent / "pairs.jsonl").is_file():  # which `preferences` wrote
        sources.append(str(tasks.parent))
    before = [command for source in sources for command in training_commands(source)]
    fields = {name: value for name, value in settings.items() if not name.endswith("_sha256") and value is not None}
    command = ["python", f"recipes/{run['stage']}.py"]
    for name, value in fields.items():
        values = value if isinstance(value, list) else [value]
        values = [json.dumps(one) if isinstance(one, dict) else str(one) for one in values]
        command += [f"--{name}", *(values or ["none"])]  # `report_to: none` is recorded as an empty list
    return list(dict.fromkeys([*before, shlex.join(command)]))


def machine() -> dict:
    """
    Describe the machine.

    Returns:
        `dict`: `cpu` (its model's name), `cores` (available to this process), `memory_gb` (10^9 bytes) and `gpu`
        (names, `None` without one).
    """
    names = [line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpu": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or None,
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []
