"""What depends on the number of GPUs and on how a policy is sharded, as far as it can be pretended on a CPU."""

from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, TrainingArguments
from trl import ModelConfig

from recipes.common import policy
from recipes.common.arguments import parse_settings
from recipes.common.policy import check_policy, load_policy
from recipes.common.policy_gradient import train_policy_gradient
from trainers import ReinforceConfig, ReinforceTrainer, adapters, keep_adapter_in_fp32


@pytest.fixture
def under_zero3(monkeypatch):
    for module in (policy, adapters):
        monkeypatch.setattr(module, "is_deepspeed_zero3_enabled", lambda: True)


def test_one_process_takes_one_of_several_gpus(tmp_path, monkeypatch):
    setup = TrainingArguments._setup_devices

    def four_gpus(self):
        device = setup.__get__(self)
        self._n_gpu = 4
        return device

    monkeypatch.setattr(TrainingArguments, "_setup_devices", property(four_gpus))
    args, _ = parse_settings(
        ReinforceConfig, argv=["--output_dir", str(tmp_path), "--per_device_train_batch_size", "3", "--bf16", "false"]
    )
    assert args.train_batch_size == 3, "that of one GPU, and no nn.DataParallel"
    assert args.n_gpu == 1


def test_vllm_with_a_4_bit_base_is_refused_before_weights_load(tmp_path, monkeypatch):
    command = ["reinforce.py", "--model_name_or_path", "/nowhere/at/all", "--output_dir", str(tmp_path / "run")]
    monkeypatch.setattr("sys.argv", [*command, "--load_in_4bit", "true", "--use_vllm", "true", "--bf16", "false"])
    with pytest.raises(SystemExit, match="use_vllm: vLLM cannot serve a 4-bit base in training"):
        train_policy_gradient("reinforce", ReinforceTrainer, ReinforceConfig)
    assert not (tmp_path / "run").exists()


def test_vllm_needs_version_2_of_fsdp(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for version, refused in (("1", pytest.raises(ValueError, match="set fsdp_version")), ("2", nullcontext())):
        monkeypatch.setenv("FSDP_VERSION", version)
        with refused:
            ReinforceConfig(str(tmp_path), use_vllm=True, use_cpu=True, bf16=False)


@pytest.mark.parametrize("sharded_by", ["FSDP", "ZeRO-3"])
def test_a_4_bit_base_that_is_sharded_is_stored_in_its_dtype(tiny_folder, monkeypatch, request, sharded_by):
    def stored_as(**settings):
        model_args = ModelConfig(model_name_or_path=str(tiny_folder), load_in_4bit=True, **settings)
        check_policy(model_args)
        return model_args.bnb_4bit_quant_storage

    assert stored_as(dtype="bfloat16") is None
    if sharded_by == "FSDP":
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    else:
        request.getfixturevalue("under_zero3")
    assert stored_as(dtype="bfloat16") == "bfloat16"
    with pytest.raises(
        SystemExit, match="bnb_4bit_quant_storage is 'uint8' and dtype 'bfloat16': to shard a 4-bit base"
    ):
        stored_as(dtype="bfloat16", bnb_4bit_quant_storage="uint8")
    with pytest.raises(SystemExit, match="bnb_4bit_quant_storage is 'auto' and dtype 'auto'"):
        stored_as(dtype="auto")


def test_an_adapter_that_continues_under_zero3_has_the_dtype_of_its_base(tmp_path, tiny_model, tiny_folder, request):
    get_peft_model(tiny_model, LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path)
    model_args = ModelConfig(model_name_or_path=str(tiny_folder), dtype="bfloat16")

    def dtypes(model):
        return {parameter.dtype for name, parameter in model.named_parameters() if "lora_" in name}

    assert dtypes(load_policy(model_args, torch.device("cpu"), str(tmp_path))) == {torch.float32}
    request.getfixturevalue("under_zero3")
    assert dtypes(load_policy(model_args, torch.device("cpu"), str(tmp_path))) == {torch.bfloat16}

    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    model.add_adapter("ref", model.peft_config["default"])  # as TRL does for a KL penalty
    assert dtypes(model) == {torch.float32}
    keep_adapter_in_fp32(model)
    assert dtypes(model) == {torch.bfloat16}
