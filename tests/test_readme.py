"""
The README and `docs/`: every Python example and every command runs here or in the test that the page names above it, on
the tiny model, or the page says "not run here". The scripts of `examples/` run for one step.
"""

import importlib.util
import json
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import trl
import yaml
from datasets import Dataset
from test_recipe_files import STAGES
from transformers import AutoTokenizer

from recipes.common.arguments import parse_settings
from recipes.default_model import DEFAULT_MODEL
from rewards import load_tasks

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
ONE_STEP = {"max_steps": 1, "logging_steps": 1, "bf16": False, "use_cpu": True, "report_to": "none"}
ONE_STEP |= {"save_strategy": "no", "per_device_train_batch_size": 2, "disable_tqdm": True}
SHORT = {"num_generations": 2, "max_completion_length": 8}
RESULT_FILES = ("adapter_model.safetensors", "pairs.jsonl", "metrics.json", "model.safetensors")
TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
EASY = [  # whatever continues the comment passes, so a random policy passes most of the time
    {
        "task_id": f"number/{n}",
        "prompt": f"def number():\n    return {n}  # ",
        "canonical_solution": "the number\n",
        "test": f"def check(candidate):\n    assert candidate() == {n}\n",
        "entry_point": "number",
    }
    for n in range(2, 22)
]


def examples(page, languages="bash|python"):
    """A page's fenced blocks: language, code, and the paragraph above."""
    text = page.read_text()
    for block in re.finditer(rf"```({languages})\n(.*?)```", text, re.DOTALL):
        yield block[1], block[2], text[: block.start()].rstrip().rpartition("\n\n")[2]


def scripts(code):
    """The recipes that a block of commands runs: script and arguments."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        script = next((i for i, word in enumerate(words) if word.startswith("recipes/") and word.endswith(".py")), None)
        if script is not None and "$" not in line:
            yield words[script], words[script + 1 :]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_example_is_run_or_marked(page):
    text = page.read_text()
    assert page.name != "README.md" or text.count("\n") <= 200
    for language, code, above in examples(page):
        test = re.search(r"<!-- run by (tests/[\w/]+\.py)::(\w+) -->$", above)
        if test:
            assert f"def {test[2]}(" in (ROOT / test[1]).read_text()
            assert test[2] != "test_commands_run" or [*scripts(code)]
        else:
            assert "not run here" in above + code, f"{page.name}: nothing runs this {language} block:\n{code}"
            for script, arguments in scripts(code):
                assert (ROOT / script).is_file()
                if (stage := Path(script).stem.split("_")[0]) in STAGES:  # the others take folders
                    parse_settings(*STAGES[stage], argv=arguments)
    for target in re.findall(r"\]\((?!https?:)([^)#]*)[^)]*\)", text):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_run(page, tmp_path, tiny_folder, monkeypatch):
    """All of a page's commands, one after the other in one folder; the recipes differ in what makes them short."""
    blocks = [code for _, code, above in examples(page, "bash") if above.endswith("::test_commands_run -->")]
    own_tasks = [code for _, code, _ in examples(page, "json")]
    (tmp_path / "tasks.jsonl").write_text("".join(own_tasks) or "".join(json.dumps(task) + "\n" for task in EASY))
    model = shutil.copytree(tiny_folder, tmp_path / "cache" / "rl-code-agent" / DEFAULT_MODEL)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(model)
    short = {"dtype": "float32", "bf16": False, "prompt_format": "auto", "max_completion_length": 8, "max_length": 4096}
    short |= {"max_steps": 1, "num_train_epochs": 0.01}
    for recipe in ROOT.glob("recipes/qwen2.5-coder-0.5b/*.yaml"):
        fields = yaml.safe_load(recipe.read_text())
        fields |= {name: value for name, value in short.items() if name in fields}
        if "dataset_train_split" in fields:
            fields["dataset_name"] = "tasks.jsonl"
        copy = tmp_path / recipe.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(yaml.safe_dump(fields))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # all that accelerate_configs/cpu.yaml tells a script
    for script, arguments in scripts("".join(blocks)):
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        runpy.run_path(str(ROOT / script), run_name="__main__")
        if "--output_dir" in arguments:
            output = Path(arguments[arguments.index("--output_dir") + 1])
            assert any((output / name).is_file() for name in RESULT_FILES), f"{script} has written no result"


def run_example(words, namespace=None):
    """The one Python block that holds `words`, as it stands."""
    blocks = [code for page in PAGES for _, code, _ in examples(page, "python") if words in code]
    assert len(blocks) == 1
    exec(blocks[0], namespace if namespace is not None else {})


def test_sandbox_example_runs(capsys):
    run_example("from sandbox import Program, Sandbox")
    assert capsys.readouterr().out.startswith("passed True {")


def test_verl_example_writes_rows_that_are_read_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_example("verl_rows")
    assert load_tasks("train.parquet", "all").num_rows == 131


def run_trainer_example(trainer_name, tiny_folder, monkeypatch, settings, replacements):
    """As it stands; only the model's name and the defaults of the config differ. Returns what it logged."""
    blocks = [code for page in PAGES for _, code, _ in examples(page, "python")]
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
    assert "pass_rate" in run_trainer_example("GRPOTrainer", tiny_folder, monkeypatch, SHORT, {})


def test_rloo_example_runs(tmp_path, tiny_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log = run_trainer_example("RLOOTrainer", tiny_folder, monkeypatch, SHORT, {})
    parts = [log[f"rewards/{name}/mean"] for name in ("unit_tests", "partial", "length_reward")]
    assert log["reward"] == pytest.approx(parts[0] + 0.2 * parts[1] + 0.01 * parts[2], abs=1e-6)


def test_dpo_example_runs(tmp_path, tiny_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pair = {"task_id": "one", "prompt": "a", "chosen": "b", "rejected": "cc", "chosen_ids": [3], "rejected_ids": [4, 4]}
    Dataset.from_list([pair] * 2).save_to_disk("dataset")
    folder = {"runs/qwen2.5-coder-0.5b/preferences/dataset": "dataset"}
    assert "rewards/margins" in run_trainer_example("DPOTrainer", tiny_folder, monkeypatch, {}, folder)


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
