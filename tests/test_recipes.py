"""The stages as a user launches them, on a tiny model and three tasks; and input refused before weights load."""

import json
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from trl import ModelConfig

from recipes import evaluate, preferences
from recipes.common.arguments import load_stage_tasks
from recipes.common.intervals import wilson_interval
from recipes.common.policy import adapter_base, check_policy, load_tokenizer, model_path
from recipes.common.run_directory import RunDirectory
from recipes.default_model import DEFAULT_MODEL
from recipes.evaluate import grade, load_extra_tests, results_table, summarize

ROOT = Path(__file__).parent.parent

TASKS = [
    {
        "task_id": f"add/{n}",
        "prompt": f"def add(x):\n    # plus {n}\n",
        "canonical_solution": f"    return x + {n}\n",
        "test": f"def check(candidate):\n    assert candidate(1) == {n + 1}\n",
        "entry_point": "add",
    }
    for n in range(3)
]


def launch(stage, config, **settings):
    """Run a stage's script as the README does; returns its exit status and everything it printed."""
    overrides = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    run = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/cpu.yaml"]
        + [f"recipes/{stage}.py", "--config", str(config), *overrides],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return run.returncode, run.stdout + run.stderr


def launch_both(*runs):
    """Two launches at once, each a stage, its config and settings: most of a launch is one core's imports."""
    with ThreadPoolExecutor(len(runs)) as pool:
        return list(pool.map(lambda run: launch(run[0], run[1], **run[2]), runs))


def test_stages_from_the_base_to_the_table(tmp_path, tiny_folder, capsys):
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text("".join(json.dumps(task) + "\n" for task in TASKS))
    common = {"model_name_or_path": str(tiny_folder), "dataset_name": str(tasks)}
    train = {"bf16": False, "gradient_checkpointing": False, "report_to": "none", "seed": 1, "dtype": "float32"}

    def recipe(name, **fields):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**common, **fields}))
        return path

    lora = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj", "v_proj"]}
    sft = recipe("sft", **train, **lora, max_steps=2, per_device_train_batch_size=1, output_dir=str(tmp_path / "sft"))
    status, output = launch("sft", sft)
    assert status == 0, output
    assert adapter_base(str(tmp_path / "sft")) == str(tiny_folder)
    again, longer = launch_both(("sft", sft, {}), ("sft", sft, {"max_steps": 3}))
    assert again[0] == 0 and "this run has finished" in again[1]
    assert longer[0] != 0 and "holds another run (with max_steps 2 where this one has 3)" in longer[1]

    rl = {"adapter_name_or_path": str(tmp_path / "sft"), "max_completion_length": 8, "per_device_train_batch_size": 2}
    (tmp_path / "held_out").mkdir()
    (tmp_path / "held_out" / "validation.jsonl").write_text(json.dumps(TASKS[0]) + "\n")
    rl |= {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset_name": str(tmp_path / "held_out")}
    rl |= {"logging_steps": 1}
    stages = ("reinforce", "ppo_clip")
    rewards = {"reinforce": "-0.0008", "ppo_clip": "0"}  # of failures of 8 tokens
    recipes = [
        recipe(
            stage,
            **train,
            **rl,
            penalize_failures=stage == "reinforce",
            max_steps=1,
            output_dir=str(tmp_path / stage),
        )
        for stage in stages
    ]
    runs = launch_both(*((stage, config, {}) for stage, config in zip(stages, recipes, strict=True)))
    for stage, (status, output) in zip(stages, runs, strict=True):
        assert status == 0, output
        reward = rewards[stage]
        evaluation = rf"^step 1/1   evaluation   pass rate 0   tokens 8   reward {reward}( |$)"
        assert re.search(evaluation, output, re.MULTILINE)
        assert re.search(
            rf"^step 1/1   pass rate 0   tokens [\d.]+   reward {reward[0]}[\d.e-]*   .*s   0 s left$",
            output,
            re.MULTILINE,
        )
        assert "{'" not in output, "the full record is in the log file only"
        assert (tmp_path / stage / "adapter_model.safetensors").is_file()

    evaluate = recipe("evaluate", dtype="float32", dataset_test_split="train", max_completion_length=8, seed=1)
    results = {"base": str(tiny_folder), "reinforce": str(tmp_path / "reinforce")}
    settings = [
        {"model_name_or_path": model, "extra_tests": tasks, "output_dir": tmp_path / "results" / name}
        for name, model in results.items()
    ]
    runs = launch_both(*(("evaluate", evaluate, fields) for fields in settings))
    for (name, model), (status, output) in zip(results.items(), runs, strict=True):
        assert status == 0, output
        metrics = json.loads((tmp_path / "results" / name / "metrics.json").read_text())
        assert metrics["num_tasks"] == 3 and metrics["num_passed"] == 0 and metrics["model"] == model
        rows = [json.loads(line) for line in (tmp_path / "results" / name / "per_task.jsonl").read_text().splitlines()]
        assert [row["task_id"] for row in rows] == ["add/0", "add/1", "add/2"]
        fields = ["task_id", "completion", "completion_tokens", "verdict", "passed", "passed_truncated", "passed_plus"]
        assert all(list(row) == fields for row in rows)
        assert metrics["machine"]["cores"] >= 1 and metrics["machine"]["memory_gb"] > 0
    (*trained, evaluated) = metrics["commands"]
    assert evaluated.startswith("python recipes/evaluate.py --config") and "--extra_tests tasks.jsonl" in evaluated
    assert [command.split()[1] for command in trained] == ["recipes/sft.py", "recipes/reinforce.py"]
    log = [json.loads(line) for line in (tmp_path / "results/reinforce/training.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [1, 1, 1] and log[1]["eval_completion_tokens"] == 8
    assert (
        "pass_rate" in log[0] and "train_runtime" in log[2] and not (tmp_path / "results/base/training.jsonl").exists()
    )
    capsys.readouterr()
    print(results_table([str(tmp_path / "results" / name) for name in results]))
    table = capsys.readouterr().out
    assert (
        "| base      | completion |    0/3 |" in table
        and "| reinforce | completion |    0/3 |" in table
        and "| plus |" in table
        and " +0.0 [+0.0, +0.0] |" in table
    )


def test_qlora_sft_trains_an_fp32_adapter(tmp_path, tiny_folder):
    fields = {"model_name_or_path": tiny_folder, "output_dir": tmp_path / "run", "max_steps": 2, "max_length": 2048}
    status, output = launch("sft", ROOT / "recipes" / "deepseek-coder-1.3b" / "sft.yaml", **fields)
    assert status == 0, output
    weights = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    # B starts at zero, the first step is warm-up, and an AdamW step in one direction is the learning rate
    moved = max(tensor.abs().max().item() for name, tensor in weights.items() if "lora_B" in name)
    assert moved == pytest.approx(5e-5, rel=0.02)


def test_killed_run_continues_from_its_checkpoint(tmp_path, tiny_folder):
    tasks, output_dir = tmp_path / "tasks.jsonl", tmp_path / "run"
    tasks.write_text("".join(json.dumps(task) + "\n" for task in TASKS))
    config = tmp_path / "reinforce.yaml"
    fields = {"model_name_or_path": str(tiny_folder), "dataset_name": str(tasks), "output_dir": str(output_dir)}
    fields |= {"use_peft": True, "lora_target_modules": ["q_proj", "v_proj"], "dtype": "float32", "bf16": False}
    fields |= {"max_completion_length": 8, "per_device_train_batch_size": 2, "save_steps": 1, "logging_steps": 1}
    config.write_text(yaml.safe_dump({**fields, "max_steps": 20, "report_to": "none"}))
    command = [sys.executable, "recipes/reinforce.py", "--config", str(config)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        while not (output_dir / "checkpoint-2" / "trainer_state.json").is_file():
            assert run.poll() is None, "the run ended before it could be killed"
            time.sleep(0.02)
        run.kill()
    reached = max(int(path.name.split("-")[1]) for path in output_dir.glob("checkpoint-*"))
    assert reached < 18 and not (output_dir / "adapter_model.safetensors").exists()

    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert (output_dir / "adapter_model.safetensors").is_file()
    state = json.loads((output_dir / "checkpoint-20" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"]] == list(range(1, 21))
    steps_logged = len(re.findall(r"^step +\d+/20 ", run.stdout, re.MULTILINE))
    assert 20 - reached <= steps_logged < 20, "it went on, and did not start again"


def test_bad_tasks_are_refused(tmp_path):
    path = tmp_path / "tasks.jsonl"
    path.write_text(json.dumps({**TASKS[0], "test": "assert add(1) == 1"}))
    with pytest.raises(SystemExit, match="tasks.jsonl:1: field 'test' defines no function check"):
        load_stage_tasks(str(path), "train")
    path.write_text("")
    with pytest.raises(SystemExit, match="has no tasks"):
        load_stage_tasks(str(path), "train")


def test_bad_policies_are_refused(tmp_path, tiny_folder):
    with pytest.raises(SystemExit, match="cannot use a 4-bit base on a CPU"):
        check_policy(
            ModelConfig(model_name_or_path=str(tiny_folder), load_in_4bit=True), generates_on=torch.device("cpu")
        )
    with pytest.raises(SystemExit, match="dtype is 'bf16': write bfloat16"):
        check_policy(ModelConfig(model_name_or_path=str(tiny_folder), dtype="bf16"))
    with pytest.raises(SystemExit, match="there is no directory 'runs/no/such'"):
        model_path("runs/no/such")
    with pytest.raises(SystemExit, match=f"write a directory, a Hub id, or {DEFAULT_MODEL}"):
        model_path(None)
    with pytest.raises(SystemExit, match="model_name_or_path: no tokenizer could be loaded from .*: check the name"):
        load_tokenizer(ModelConfig(model_name_or_path=str(tmp_path)))
    with pytest.raises(SystemExit, match="there is no adapter in .*has the stage that writes it finished"):
        check_policy(ModelConfig(model_name_or_path=str(tiny_folder)), adapter=str(tmp_path))
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "other/base"}')
    with pytest.raises(SystemExit, match="was trained on the base other/base, and model_name_or_path is"):
        check_policy(ModelConfig(model_name_or_path=str(tiny_folder)), adapter=str(tmp_path))
    with pytest.raises(SystemExit, match="holds an adapter, and a base is needed: write it as adapter_name_or_path"):
        check_policy(ModelConfig(model_name_or_path=str(tmp_path)))
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "/models/moved"}')
    with pytest.raises(SystemExit, match="the base /models/moved of the adapter in .* write its new place into base_m"):
        check_policy(ModelConfig(model_name_or_path=str(tiny_folder)), adapter=str(tmp_path))


def test_bad_extra_tests_are_refused(tmp_path):
    path = tmp_path / "plus.jsonl"
    path.write_text("".join(json.dumps(task) + "\n" for task in TASKS[:2]))
    assert load_extra_tests(str(path), TASKS[:2]) == {task["task_id"]: task["test"] for task in TASKS[:2]}
    with pytest.raises(SystemExit, match="extra_tests: .*plus.jsonl has no tests of add/2: every evaluated task"):
        load_extra_tests(str(path), TASKS)
    with pytest.raises(SystemExit, match="plus.jsonl: add/0 tests the function 'add', and the task's is 'plus'"):
        load_extra_tests(str(path), [{**TASKS[0], "entry_point": "plus"}])
    with pytest.raises(SystemExit, match="extra_tests: there is no task file 'absent.jsonl'"):
        load_extra_tests("absent.jsonl", TASKS)


def test_plus_is_both_the_tasks_tests_and_the_stricter_ones():
    completions = ["    return x + 1\n", "    return 2\n", "    return -x\n", "    return x + 1\nprint(undefined)\n"]
    samples = [{"task_id": "add/1", "completion": text} for text in completions]
    # The third passes these and not the task's own
    stricter = {"add/1": "def check(candidate):\n    assert candidate(5) in (6, -5)\n"}
    grade(samples, TASKS, 5.0, stricter)
    assert [sample["passed"] for sample in samples] == [True, True, False, False]
    assert [sample["passed_truncated"] for sample in samples] == [True, True, False, True]
    assert [sample["passed_plus"] for sample in samples] == [True, False, False, False]


def test_output_directory_belongs_to_one_run(tmp_path):
    path = tmp_path / "run"
    assert RunDirectory(str(path), "sft", {"seed": 2}).start() is None  # and then it failed
    run = RunDirectory(str(path), "sft", {"seed": 1})
    assert run.start() is None
    with pytest.raises(SystemExit, match="is in use by another process"):
        RunDirectory(str(path), "sft", {"seed": 1}).start()
    assert not RunDirectory(str(path), "sft", {"seed": 1}).finished
    run.finish()
    assert not RunDirectory(str(path), "sft", {"seed": 1}).finished  # what it made is not there (any more)
    (path / "adapter_model.safetensors").touch()
    assert RunDirectory(str(path), "sft", {"seed": 1}).finished
    assert not RunDirectory(str(path), "sft", {"seed": 1}, result="metrics.json").finished
    with pytest.raises(SystemExit, match="with seed 1 where this one has 2"):
        RunDirectory(str(path), "sft", {"seed": 2})
    with pytest.raises(SystemExit, match="with seed 1 where this one has none"):  # what a person wrote comes first
        RunDirectory(str(path), "sft", {"adapter_sha256": "ca13"})
    with pytest.raises(SystemExit, match="with adapter_sha256 none where this one has 'ca13'"):
        RunDirectory(str(path), "sft", {"adapter_sha256": "ca13", "seed": 1})
    with pytest.raises(SystemExit, match="of the stage 'sft'"):
        RunDirectory(str(path), "reinforce", {"seed": 1})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("keep me")
    with pytest.raises(SystemExit, match="holds files and no run.json"):
        RunDirectory(str(tmp_path / "other"), "sft", {})


@pytest.mark.parametrize("stage", [evaluate, preferences])
def test_stages_for_one_process_refuse_several(tmp_path, tiny_folder, monkeypatch, stage):
    command = ["stage.py", "--model_name_or_path", str(tiny_folder), "--output_dir", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="runs in one process: launch it with --num_processes 1"):
        stage.main()
    assert not (tmp_path / "run").exists()


def test_summary_has_the_unbiased_estimates():
    samples = [
        {
            "passed": passed,
            "passed_truncated": True,
            "completion_tokens": tokens,
            "verdict": "passed" if passed else "failed",
        }
        for passed, tokens in [(True, 10), (False, 20), (False, 30), (False, 60)]
    ]
    assert summarize(samples, 2, 2) == {
        "num_tasks": 2,
        "num_passed": 0.5,
        "pass_at_1": 0.25,
        "pass_at_1_interval": [0.0, 0.5],  # of two tasks, one at 1/2 and one at 0, drawn again
        "truncated_pass_at_1": 1.0,
        "truncated_pass_at_1_interval": [1.0, 1.0],
        "interval_method": "percentile bootstrap over tasks, 10000 resamples",
        "pass_at_k": {"1": 0.25, "2": 0.5},
        "mean_completion_tokens": 30,
        "mean_completion_tokens_interval": [15.0, 45.0],
        "median_completion_tokens": 25,
        "verdicts": {"failed": 3, "passed": 1},
    }
    of_four = summarize([sample | {"passed_plus": False} for sample in samples], 4, 1)
    assert of_four["interval_method"] == "Wilson" and of_four["pass_at_1_interval"] == wilson_interval(0.25, 4)
    assert (of_four["plus_pass_at_1"], of_four["plus_pass_at_1_interval"]) == (0.0, wilson_interval(0.0, 4))
    # Wilson's interval of 16 in 33, to three places
    assert wilson_interval(16 / 33, 33) == pytest.approx([0.325, 0.648], abs=5e-4)
