"""The README's Python examples and the scripts of `examples/` do what they say, on the tiny model and for one step."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import trl
from datasets import Dataset

ROOT = Path(__file__).parent.parent
ONE_STEP = {"max_steps": 1, "logging_steps": 1, "bf16": False, "use_cpu": True, "report_to": "none"}
ONE_STEP |= {"save_strategy": "no", "per_device_train_batch_size": 2, "disable_tqdm": True}
SHORT = {"num_generations": 2, "max_completion_length": 8}


def run_readme_example(trainer_name, tiny_folder, monkeypatch, settings, replacements):
    """As it stands; only the model's name and the defaults of the config differ. Returns what it logged."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (example,) = [block for block in blocks if f"import {trainer_name}" in block or f", {trainer_name}" in block]
    assert len([line for line in example.splitlines() if line]) <= 6
    config_name = trainer_name.replace("Trainer", "Config")
    config_class, trainer_class = getattr(trl, config_name), getattr(trl, trainer_name)

    def short_config(*args, **fields):
        return config_class(*args, **{**ONE_STEP, **settings, **fields})

    class ShortTrainer(trainer_class):
        def __init__(self, *args, **kwargs):
            if len(args) < 3:
                kwargs["args"] = short_config("unused")
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(trl, trainer_name, ShortTrainer)
    monkeypatch.setattr(trl, config_name, short_config)
    for old, new in {"Qwen/Qwen2.5-Coder-0.5B-Instruct": str(tiny_folder), **replacements}.items():
        assert old in example
        example = example.replace(old, new)
    namespace = {}
    exec(example, namespace)
    return namespace["trainer"].state.log_history[0]


def test_grpo_example_runs(tmp_path, tiny_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "pass_rate" in run_readme_example("GRPOTrainer", tiny_folder, monkeypatch, SHORT, {})


def test_rloo_example_runs(tmp_path, tiny_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log = run_readme_example("RLOOTrainer", tiny_folder, monkeypatch, SHORT, {})
    parts = [log[f"rewards/{name}/mean"] for name in ("unit_tests", "partial", "length_reward")]
    assert log["reward"] == pytest.approx(parts[0] + 0.2 * parts[1] + 0.01 * parts[2], abs=1e-6)


def test_dpo_example_runs(tmp_path, tiny_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pair = {"task_id": "one", "prompt": "a", "chosen": "b", "rejected": "cc", "chosen_ids": [3], "rejected_ids": [4, 4]}
    Dataset.from_list([pair] * 2).save_to_disk("dataset")
    folder = {"runs/qwen2.5-coder-0.5b/preferences/dataset": "dataset"}
    assert "rewards/margins" in run_readme_example("DPOTrainer", tiny_folder, monkeypatch, {}, folder)


@pytest.mark.parametrize("name, metric", [("grpo", "pass_rate"), ("rloo", "rewards/partial/mean"), ("dpo", "loss")])
def test_script_runs(tmp_path, tiny_folder, monkeypatch, capsys, name, metric):
    spec = importlib.util.spec_from_file_location(f"examples_{name}", ROOT / "examples" / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    fields = {"model_name_or_path": tiny_folder, "output_dir": tmp_path, **ONE_STEP, "use_peft": True}
    if name == "dpo":
        script.NUM_TASKS, script.MAX_COMPLETION_LENGTH = 2, 400  # long enough for a random policy to end some
    else:
        fields |= SHORT
    arguments = [part for field, value in fields.items() for part in (f"--{field}", str(value))]
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    script.main()
    assert f"'{metric}'" in capsys.readouterr().out and (tmp_path / "adapter_model.safetensors").is_file()
