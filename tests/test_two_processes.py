"""Two processes over gloo against one with the doubled batch: DDP, FSDP2, and what one process alone runs into."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from two_processes import train, train_sharded

ROOT = Path(__file__).parent.parent


def launch(launcher, task, folder, output_dir, *arguments, **environment):
    """Run two_processes.py as two processes and return what each of them reports."""
    output_dir.mkdir()
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    launched = subprocess.run(
        [sys.executable, "-m", *launcher, ROOT / "tests" / "two_processes.py", task, folder, output_dir, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
    )
    assert launched.returncode == 0, launched.stderr
    return [json.loads((output_dir / f"outcome_{rank}.json").read_text()) for rank in range(2)]


def change(one, two):
    """Return the norm of the matrices B of one adapter, which began at zero, and of their difference to another's."""
    names = [name for name in one if "lora_B" in name]
    return [
        torch.cat([values.flatten() for values in part]).norm()
        for part in ([one[name] for name in names], [one[name] - two[name] for name in names])
    ]


@pytest.fixture(scope="module")
def ddp(tmp_path_factory, tiny_folder):
    """The directory and the reports of two processes under DDP."""
    output_dir = tmp_path_factory.mktemp("ddp") / "two"
    config = ROOT / "accelerate_configs" / "cpu_2proc.yaml"
    launcher = ("accelerate.commands.launch", "--config_file", config, "--main_process_port", "0")
    return output_dir, launch(launcher, "ddp", tiny_folder, output_dir)


@pytest.mark.parametrize("stage", ["reinforce", "ppo_clip", "drop_groups"])
def test_two_processes_make_the_step_of_one_with_the_doubled_batch(tmp_path, tiny_folder, ddp, stage):
    log = train(stage, tiny_folder, tmp_path / "one", per_device_train_batch_size=4)
    assert log[0]["grad_norm"] > 0
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "one", ddp[0] / stage))
    norm, difference = change(one, two)
    assert norm > 0.1
    # Adam's first steps make rounding visible where a gradient is near zero
    assert difference < 1e-3 * norm


def test_a_loss_that_is_not_finite_stops_both_processes(ddp):
    stopped = "RuntimeError: training stopped after 0 steps: the loss is nan"
    assert [report["loss"].startswith(stopped) for report in ddp[1]] == [True, True]


def test_the_first_host_says_where_a_run_stands(ddp):
    first, second = ddp[1]
    assert {case: first[case] for case in ("new", "finished", "continued")} == {
        "new": None,
        "finished": "has finished",
        "continued": "continued/checkpoint-3",
    }
    assert first["of another run"].startswith("SystemExit: output_dir of another run holds another run")
    assert first["continued on one host"] == (
        "SystemExit: output_dir: the run continues from continued on one host/checkpoint-3, which is on the first host "
        "and not on all: share output_dir between hosts, or set save_on_each_node to true from the start"
    )
    assert {**second, "loss": None} == {**first, "loss": None}


def test_fsdp2_makes_the_step_of_one_process(tmp_path, tiny_folder, tiny_model):
    adapter = tmp_path / "adapter"
    torch.manual_seed(0)
    get_peft_model(tiny_model, LoraConfig(r=4, target_modules="all-linear")).save_pretrained(adapter)
    command = ["--config_file", str(ROOT / "accelerate_configs" / "fsdp2.yaml"), "script.py"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    set_by_file = dict(prepare_multi_gpu_env(arguments))
    assert set_by_file["ACCELERATE_USE_FSDP"] == "true" and set_by_file["FSDP_VERSION"] == "2"

    launcher = (
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--rdzv_backend",
        "c10d",
        "--rdzv_endpoint",
        "localhost:0",
    )
    reports = launch(launcher, "fsdp2", tiny_folder, tmp_path / "two", adapter, **set_by_file)
    stopped = "RuntimeError: training stopped after 1 steps: the gradient's norm is nan"
    assert [report.pop("gradient").startswith(stopped) for report in reports] == [True, True]
    assert reports == [{"policy is left as it is": True}] * 2

    trainer = train_sharded(tiny_folder, adapter, tmp_path / "one", 4, is_sharded=False)
    assert trainer.state.log_history[0]["grad_norm"] > 0
    saved = tmp_path / "two" / "sharded"
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "one", saved))
    assert one.keys() == two.keys()
    norm, difference = change(one, two)
    assert norm > 0.1
    assert difference < 1e-4 * norm

    # What vLLM would be given
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    expected = dict(PeftModel.from_pretrained(model, saved).merge_and_unload(safe_merge=True).named_parameters())
    for rank in range(2):
        merged = load_file(tmp_path / "two" / f"merged_{rank}.safetensors")
        assert merged.keys() == expected.keys()
        assert all(torch.equal(merged[name], value) for name, value in expected.items())
