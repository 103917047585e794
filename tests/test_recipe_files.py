"""Recipe files and command lines: what every recipe sets, what a run records of it, and what is refused."""

import json
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from datasets import Dataset
from trl import DPOConfig, ModelConfig, SFTConfig

from recipes.check_tasks import CheckArguments
from recipes.common.arguments import parse_settings
from recipes.common.policy_gradient import RLArguments, fill_rollout, in_pass_rate
from recipes.common.provenance import training_commands
from recipes.common.run_directory import RunDirectory
from recipes.dpo import PairArguments
from recipes.evaluate import EvaluateArguments
from recipes.merge import MergeArguments
from recipes.preferences import PreferencesArguments
from recipes.sft import SFTArguments
from rewards import load_tasks
from trainers import PPOClipConfig, ReinforceConfig

ROOT = Path(__file__).parent.parent

STAGES = {  # what a stage parses, by the first word of its script's and its recipes' names
    "check": (CheckArguments, ModelConfig),
    "sft": (SFTArguments, SFTConfig, ModelConfig),
    "reinforce": (RLArguments, ReinforceConfig, ModelConfig),
    "ppo": (RLArguments, PPOClipConfig, ModelConfig),
    "preferences": (PreferencesArguments, ModelConfig),
    "dpo": (PairArguments, DPOConfig, ModelConfig),
    "evaluate": (EvaluateArguments, ModelConfig),
    "merge": (MergeArguments,),
}


@pytest.mark.parametrize(
    "name, kind",
    [
        ("cpu", "NO"),
        ("cpu_2proc", "MULTI_GPU"),  # the name under which accelerate starts processes by itself
        ("single_gpu", "NO"),
        ("multi_gpu", "MULTI_GPU"),
        ("fsdp2", "FSDP"),
        ("zero2", "DEEPSPEED"),
        ("zero3", "DEEPSPEED"),
        ("multi_node", "MULTI_GPU"),
    ],
)
def test_accelerate_reads_every_config(name, kind):
    config = load_config_from_file(str(ROOT / "accelerate_configs" / f"{name}.yaml"))
    assert config.distributed_type == kind and config.num_processes >= config.num_machines
    if kind == "DEEPSPEED":
        assert config.deepspeed_config["zero_stage"] == int(name[-1])
    if kind == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("recipes/**/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_every_recipe_parses(path):
    *_, settings = parse_settings(*STAGES[path.stem.split("_")[0]], argv=["--config", str(path)])
    assert set(settings) - {"dataset_sha256"} == set(yaml.safe_load(path.read_text()))


REINFORCE = ["--config", str(ROOT / "recipes" / "qwen2.5-coder-0.5b" / "reinforce.yaml")]


@pytest.mark.parametrize(
    "instructions, dtype, bf16", [({"avx512_bf16": True}, "bfloat16", True), ({}, "float32", False)]
)
def test_recipes_compute_in_bf16_where_the_processor_does(monkeypatch, capsys, instructions, dtype, bf16):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx2": True, "avx512_bf16": False} | instructions)
    _, args, model, settings = parse_settings(*STAGES["reinforce"], argv=REINFORCE)
    assert (model.dtype, args.bf16, settings["dtype"], settings["bf16"]) == (dtype, bf16, dtype, bf16)
    assert ("This CPU has no bf16 instructions: computing in fp32" in capsys.readouterr().out) != bf16
    for name, value in (("dtype", "bfloat16"), ("bf16", "true")):
        if bf16:
            parse_settings(*STAGES["reinforce"], argv=[*REINFORCE, f"--{name}", value])
        else:
            with pytest.raises(SystemExit, match=f"--{name} {value}: this CPU has no bf16 instructions"):
                parse_settings(*STAGES["reinforce"], argv=[*REINFORCE, f"--{name}", value])
    _, args, model, _ = parse_settings(*STAGES["reinforce"], argv=[*REINFORCE, "--dtype", "float32", "--bf16", "false"])
    assert (model.dtype, args.bf16) == ("float32", False)
    for name, value in (("dtype", "float16"), ("fp16", "true")):
        with pytest.raises(SystemExit, match=f"{name} is {value}: fp16 needs a GPU"):
            parse_settings(*STAGES["reinforce"], argv=[*REINFORCE, f"--{name}", value])


@pytest.fixture
def pretended_gpu(monkeypatch):
    """A GPU without bf16 instructions, as a T4 is. Nothing is computed on it."""
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)


def test_recipes_compute_in_fp16_on_a_gpu_without_bf16(pretended_gpu, capsys):
    for path in sorted((ROOT / "recipes" / "deepseek-coder-1.3b").glob("*.yaml")):
        *parts, settings = parse_settings(*STAGES[path.stem.split("_")[0]], argv=["--config", str(path)])
        assert parts[-1].dtype == settings["dtype"] == "float16", path
        if len(parts) == 3:
            assert (parts[1].fp16, parts[1].bf16, settings["bf16"]) == (True, False, False)
    assert "This GPU has no bf16 instructions: computing in fp16, with a loss scaler" in capsys.readouterr().out
    # Another precision on the command line stays
    _, args, model, _ = parse_settings(*STAGES["reinforce"], argv=[*REINFORCE, "--bf16", "false", "--dtype", "float32"])
    assert (args.fp16, args.bf16, model.dtype) == (False, False, "float32")
    _, args, model, _ = parse_settings(*STAGES["reinforce"], argv=[*REINFORCE, "--fp16", "true"])
    assert (args.fp16, args.bf16, model.dtype) == (True, False, "float16")
    with pytest.raises(SystemExit, match="--bf16 true: this GPU has no bf16 instructions"):
        parse_settings(*STAGES["reinforce"], argv=[*REINFORCE, "--bf16", "true"])


def test_a_launch_with_cpu_yaml_stays_on_the_cpu_of_a_machine_with_a_gpu(pretended_gpu, monkeypatch):
    """SFT sent its inputs to the GPU, where the model was not."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.set_device", lambda device: None)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # all that such a launch tells a script
    for stage in ("sft", "reinforce", "ppo_clip", "dpo"):
        recipe = ROOT / "recipes" / "qwen2.5-coder-0.5b" / f"{stage}.yaml"
        _, args, *_ = parse_settings(*STAGES[stage.split("_")[0]], argv=["--config", str(recipe)])
        assert args.device == torch.device("cpu")


def test_several_processes_on_one_gpu_are_refused(pretended_gpu, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="2 processes were launched on a machine with 1 GPU, .* --num_processes 1"):
        parse_settings(*STAGES["reinforce"], argv=REINFORCE)
    *_, settings = parse_settings(*STAGES["reinforce"], argv=[*REINFORCE, "--use_cpu", "true"])
    assert settings["use_cpu"] is True


def test_recorded_commands_say_the_whole_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chains = {}
    for path in sorted((ROOT / "recipes" / "qwen2.5-coder-0.5b").glob("*.yaml")):
        types = STAGES[path.stem.split("_")[0]]
        *_, settings = parse_settings(*types, argv=["--config", str(path)])
        output_dir = f"runs/qwen2.5-coder-0.5b/{path.stem}"
        RunDirectory(output_dir, path.stem.split("_")[0], settings).start()
        chains[path.stem] = (output_dir, types, settings)
    for output_dir, types, settings in chains.values():
        *_, again = parse_settings(*types, argv=shlex.split(training_commands(output_dir)[-1])[2:])
        assert again == settings
    scripts = [command.split()[1] for command in training_commands(chains["dpo"][0])]
    assert scripts == ["recipes/sft.py", "recipes/preferences.py", "recipes/dpo.py"]
    assert training_commands("elsewhere") == training_commands(None) == []
    RunDirectory("runs/samples_sft", "sft", {"samples": "runs/qwen2.5-coder-0.5b/preferences"}).start()
    Path("runs/qwen2.5-coder-0.5b/preferences/pairs.jsonl").touch()
    tasks = "runs/qwen2.5-coder-0.5b/preferences/tasks.jsonl"
    RunDirectory("runs/filtered", "reinforce", {"dataset_name": tasks, "chat_template_kwargs": {"a": False}}).start()
    for output_dir, stage in (("runs/samples_sft", "sft"), ("runs/filtered", "reinforce")):
        scripts = [command.split()[1] for command in training_commands(output_dir)]
        assert scripts == ["recipes/sft.py", "recipes/preferences.py", f"recipes/{stage}.py"]
    assert training_commands("runs/filtered")[-1].endswith("""--chat_template_kwargs '{"a": false}'""")


@pytest.mark.parametrize("tasks_of", ["dataset", "eval_dataset"])
def test_a_run_is_known_by_the_content_of_its_task_files(tmp_path, monkeypatch, tasks_of):
    monkeypatch.setenv("HOME", str(tmp_path))
    tasks, output_dir = tmp_path / "tasks.jsonl", str(tmp_path / "run")

    def directory(text):
        tasks.write_text(text)
        *_, settings = parse_settings(*STAGES["reinforce"], argv=[*REINFORCE, f"--{tasks_of}_name", "~/tasks.jsonl"])
        return RunDirectory(output_dir, "reinforce", settings)

    directory("{}").start()
    (tmp_path / "run" / "adapter_model.safetensors").touch()
    directory("{}").finish()
    assert directory("{}").finished
    with pytest.raises(SystemExit, match=f"holds another run .its {tasks_of} had different content.: choose"):
        directory("{} ")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    del record["settings"][f"{tasks_of}_sha256"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    assert directory("{} ").finished, "a record without it"
    (tmp_path / "run" / "run.json").write_text("{}")
    with pytest.raises(SystemExit, match="holds another run .of the stage None"):
        directory("{}")


def test_deepseek_recipes_hold_the_published_values():
    folder = ROOT / "recipes" / "deepseek-coder-1.3b"

    def parsed(name):
        return parse_settings(*STAGES[name.split("_")[0]], argv=["--config", str(folder / f"{name}.yaml")])[:-1]

    _, args, model = parsed("sft")
    assert (args.learning_rate, args.max_steps, args.warmup_steps, args.weight_decay) == (5e-5, 200, 0.03, 0.01)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (1, 8)
    assert (model.load_in_4bit, model.bnb_4bit_quant_type, model.use_bnb_nested_quant) == (True, "nf4", True)
    assert (model.lora_r, model.lora_alpha, model.lora_dropout) == (8, 16, 0.05)
    assert set(model.lora_target_modules) == {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}
    for alpha in (0.01, 0.03):
        rl, args, _ = parsed(f"reinforce_alpha{alpha}")
        assert (rl.length_penalty, args.max_steps, args.generation_batch_size) == (alpha, 100, 1)
        assert (args.baseline, args.normalize_advantages) == ("none", False)
        assert (rl.penalize_failures, args.drop_uninformative_groups) == (True, False)
        for batch_size in (4, 8):
            rl, args, _ = parsed(f"ppo_alpha{alpha}_bs{batch_size}")
            assert (rl.length_penalty, args.generation_batch_size, args.num_generations) == (alpha, batch_size, 1)
            assert (args.num_iterations, args.epsilon, args.max_steps) == (4, 0.2, 400)
            assert (args.importance_sampling_level, args.target_kl, args.dual_clip) == ("sequence", None, None)
            assert (args.normalize_advantages, args.min_advantage_std) == (True, 0.0)
            assert (rl.penalize_failures, args.drop_uninformative_groups) == (True, False)
            assert (args.learning_rate, args.temperature, args.top_p) == (5e-6, 0.8, 0.95)
            assert (args.max_completion_length, args.max_grad_norm) == (256, 1.0)
    assert parsed("preferences")[0].pair_rule == "shortest_pass_longest_fail"
    for loss_type in ("sigmoid", "ipo", "sigmoid_norm"):
        _, args, _ = parsed("dpo" if loss_type == "sigmoid" else f"dpo_{loss_type}")
        assert (args.loss_type, args.beta, args.learning_rate) == ([loss_type], 0.05, 2e-6)
        assert (args.num_train_epochs, args.per_device_train_batch_size, args.gradient_accumulation_steps) == (1, 2, 1)


def test_bf16_recipes_differ_from_the_published_ones_in_the_base_alone():
    folder = ROOT / "recipes" / "deepseek-coder-1.3b"
    for path in (folder / "bf16").glob("*.yaml"):
        published = yaml.safe_load((folder / path.name).read_text())
        for name in ("load_in_4bit", "bnb_4bit_quant_type", "use_bnb_nested_quant"):
            del published[name]
        for name in {"output_dir", "adapter_name_or_path"} & set(published):
            published[name] = published[name].replace("1.3b/", "1.3b/bf16/")
        assert yaml.safe_load(path.read_text()) == published


@pytest.mark.parametrize("stage", ["reinforce", "ppo_clip"])
def test_the_1_5b_recipes_take_64_completions_a_step(stage):
    path = ROOT / "recipes" / "qwen2.5-coder-1.5b" / f"{stage}.yaml"
    _, args, model, _ = parse_settings(*STAGES[stage.split("_")[0]], argv=["--config", str(path)])
    assert (args.generation_batch_size, args.num_generations, args.per_device_train_batch_size) == (64, 8, 4)
    assert (model.load_in_4bit, args.baseline) == (False, "group")


def test_small_recipes_take_the_penalty_and_tasks_of_the_published_ones():
    for name in ("reinforce_alpha0.01", "reinforce_alpha0.03", "ppo_alpha0.01_bs8", "ppo_alpha0.03_bs8"):
        types = STAGES[name.split("_")[0]]
        (theirs, their_args, *_), (ours, args, *_) = (
            parse_settings(*types, argv=["--config", str(ROOT / "recipes" / folder / f"{name}.yaml")])
            for folder in ("deepseek-coder-1.3b", "qwen2.5-coder-0.5b/completion")
        )
        assert ours.length_penalty == theirs.length_penalty
        assert args.output_dir == f"runs/qwen2.5-coder-0.5b/completion/{name}"
        if name.startswith("ppo"):
            # As many tasks a rollout; ours completes each four times, in 40 rollouts as reinforce_alpha0.01
            assert args.generation_batch_size == 4 * their_args.generation_batch_size and args.num_generations == 4
            assert (args.max_steps, args.epsilon) == (40 * args.num_iterations, their_args.epsilon)


@pytest.mark.parametrize(
    "stage, fields, message",
    [
        ("sft", {"lerning_rate": 1}, "unknown field 'lerning_rate': did you mean 'learning_rate'?"),
        ("reinforce", {"length_penalty": -1}, "length_penalty is -1: write 0 or more"),
        ("reinforce", {"top_p": 1.2}, "top_p is 1.2"),
        ("reinforce", {"max_pass_rate": 90}, "max_pass_rate 90: write numbers in [0, 1], the smaller one first"),
        ("sft", {"lr_scheduler_type": "constant", "warmup_steps": 4}, "write constant_with_warmup"),
        ("ppo", {"sandbox_timeout": 0}, "sandbox_timeout is 0"),
        ("ppo", {"sandbox_timeout": 4000}, "at most 3600"),
        ("evaluate", {"top_p": 0}, "top_p is 0"),
        ("evaluate", {"sandbox_timeout": 1000, "extra_tests": "plus.jsonl"}, "at most 900"),
        ("evaluate", {"num_generations": 2}, "set a temperature above 0"),
    ],
)
def test_bad_fields_are_refused(tmp_path, stage, fields, message):
    config = tmp_path / "recipe.yaml"
    config.write_text(yaml.safe_dump({"output_dir": str(tmp_path / "run"), **fields}))
    with pytest.raises(SystemExit) as error:
        parse_settings(*STAGES[stage], argv=["--config", str(config)])
    assert message in str(error.value) and str(config) in str(error.value)


def test_bad_command_lines_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="there is no file absent.yaml"):
        parse_settings(*STAGES["sft"], argv=["--config", "absent.yaml"])
    with pytest.raises(SystemExit, match="there is no file absent.yaml"):
        parse_settings(*STAGES["sft"], argv=["--config=absent.yaml"])
    with pytest.raises(SystemExit, match="unknown field 'max_step': did you mean 'max_steps'"):
        parse_settings(*STAGES["sft"], argv=["--output_dir", str(tmp_path), "--max_step", "3"])


def test_tasks_are_limited_by_their_pass_rate(tmp_path):
    file = tmp_path / "tasks.jsonl"
    test = "def check(candidate):\n    assert candidate() == 1\n"
    rows = [
        {"task_id": f"t/{rate}", "prompt": "def f():\n", "test": test, "entry_point": "f", "pass_rate": rate}
        for rate in (0, 0.25, 0.5, 1)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = load_tasks(str(file))
    assert in_pass_rate(tasks, 0.1, 0.9)["task_id"] == ["t/0.25", "t/0.5"]
    assert in_pass_rate(tasks, 0.0, 1.0)["task_id"] == ["t/0", "t/0.25", "t/0.5", "t/1"]
    with pytest.raises(SystemExit, match="no task has a pass rate from 0.6 to 0.9"):
        in_pass_rate(tasks, 0.6, 0.9)
    with pytest.raises(SystemExit, match="the tasks have no column 'pass_rate'"):
        in_pass_rate(tasks.remove_columns("pass_rate"), 0.1, 1.0)


def test_few_tasks_are_repeated_to_fill_a_rollout():
    tasks = Dataset.from_dict({"prompt": ["a", "b", "c"]})
    assert fill_rollout(tasks, 8)["prompt"] == ["a", "b", "c"] * 3
    assert fill_rollout(tasks, 3) is tasks
