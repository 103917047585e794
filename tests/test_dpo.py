"""DPO on the tiny model: the reference is the SFT policy, the tokens are the policy's, and bad pairs are refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from trl import DPOConfig


ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "recipes"))

from common import parse_settings  # noqa: E402
from dpo import PairArguments, PairTrainer, load_pairs, pair_dataset  # noqa: E402
from trl import ModelConfig  # noqa: E402


TASKS = Dataset.from_list(
    [
        {
            "task_id": f"add/{n}",
            "prompt": f"def add(x):\n    # plus {n}\n",
            "canonical_solution": f"    return x + {n}\n",
            "test": f"def check(candidate):\n    assert candidate(1) == {n + 1}\n",
            "entry_point": "add",
        }
        for n in range(3)
    ]
)


@pytest.fixture
def sft_adapter(tmp_path, tiny_folder):
    """An adapter that moved away from its base, as after SFT."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    config = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, base_model_name_or_path=str(tiny_folder)
    )
    folder = tmp_path / "sft"
    get_peft_model(model, config).save_pretrained(folder)
    return folder


def make_pairs(tokenizer):
    """A pair a task; the rejected completion was cut off, so its ids have no EOS."""
    pairs = []
    for n, task in enumerate(TASKS):
        chosen, rejected = f"    return x + {n}", f"    return {n}\n    # and so on"
        pairs.append(
            {
                "task_id": task["task_id"],
                "prompt": task["prompt"],
                "chosen": chosen,
                "rejected": rejected,
                "chosen_ids": tokenizer(chosen)["input_ids"] + [tokenizer.eos_token_id],
                "rejected_ids": tokenizer(rejected)["input_ids"],
            }
        )
    return pairs


def log_prob(model, prompt_ids, completion_ids):
    logits = model(torch.tensor([prompt_ids + completion_ids])).logits[0, len(prompt_ids) - 1 : -1]
    return logits.log_softmax(-1)[range(len(completion_ids)), completion_ids].sum().item()


def test_reference_is_the_sft_policy_and_tokens_are_the_policys(tmp_path, tiny_folder, tiny_tokenizer, sft_adapter):
    pairs = make_pairs(tiny_tokenizer)
    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    frozen = {name: p.clone() for name, p in base.named_parameters()}
    sft = load_file(sft_adapter / "adapter_model.safetensors")
    config = DPOConfig(
        str(tmp_path / "run"),
        per_device_train_batch_size=3,
        beta=0.05,
        max_steps=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    rows = pair_dataset(pairs, tiny_tokenizer, 1024)
    assert rows[0]["chosen_ids"] == pairs[0]["chosen_ids"] and rows[0]["rejected_ids"] == pairs[0]["rejected_ids"]
    trainer = PairTrainer(
        PeftModel.from_pretrained(base, sft_adapter, is_trainable=True),
        args=config,
        train_dataset=rows,
        processing_class=tiny_tokenizer,
    )
    trainer.train()

    # At the start the policy is the reference: no preference, so a loss of log 2, and rewards of 0
    first, second = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert first["loss"] == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-6)
    assert first["rewards/chosen"] == first["rewards/rejected"] == pytest.approx(0.0, abs=1e-5)
    assert second["loss"] < first["loss"] and second["rewards/margins"] > 0
    # The second step's log-probabilities and rewards, from plain forwards of both policies
    reference = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32), sft_adapter
    )
    expected = [log_prob(reference, row["prompt_ids"], row["chosen_ids"]) for row in rows]
    assert first["logps/chosen"] == pytest.approx(sum(expected) / 3, rel=1e-5)
    expected_rejected = [log_prob(reference, row["prompt_ids"], row["rejected_ids"]) for row in rows]
    assert first["logps/rejected"] == pytest.approx(sum(expected_rejected) / 3, rel=1e-5)
    assert second["rewards/chosen"] == pytest.approx(0.05 * (second["logps/chosen"] - sum(expected) / 3), abs=1e-4)

    model = trainer.model
    for name, start in sft.items():
        module, kind = name.rsplit(".", 2)[0], name.rsplit(".", 2)[1]
        adapters = {adapter: model.get_parameter(f"{module}.{kind}.{adapter}.weight") for adapter in ("default", "ref")}
        assert torch.equal(adapters["ref"], start), "the reference has not moved"
        assert not torch.equal(adapters["default"], start), "the policy has"
    for name, value in frozen.items():
        name = name.replace("q_proj.", "q_proj.base_layer.").replace("v_proj.", "v_proj.base_layer.")
        assert torch.equal(model.get_base_model().get_parameter(name), value), "the base is bit for bit what it was"


@pytest.fixture
def recipe(tmp_path, tiny_folder, tiny_tokenizer, sft_adapter):
    """A recipe of the stage on the tiny model, and its command."""
    tasks, pairs = tmp_path / "tasks.jsonl", tmp_path / "pairs.jsonl"
    tasks.write_text("".join(json.dumps(task) + "\n" for task in TASKS))
    pairs.write_text("".join(json.dumps(pair) + "\n" for pair in make_pairs(tiny_tokenizer) * 4))
    config = tmp_path / "dpo.yaml"
    fields = {"model_name_or_path": str(tiny_folder), "adapter_name_or_path": str(sft_adapter), "dtype": "float32"}
    fields |= {"dataset_name": str(tasks), "preferences": str(pairs), "output_dir": str(tmp_path / "run")}
    fields |= {"per_device_train_batch_size": 2, "learning_rate": 1e-3, "beta": 0.05, "num_train_epochs": 1}
    fields |= {"bf16": False, "gradient_checkpointing": False, "report_to": "none", "save_steps": 1, "seed": 1}
    config.write_text(yaml.safe_dump({**fields, "logging_steps": 1}))
    return config


def launch(config, *arguments):
    command = [sys.executable, "recipes/dpo.py", "--config", str(config), *arguments]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return run.returncode, run.stdout + run.stderr


def test_stage_stops_continues_and_saves_one_adapter(tmp_path, recipe, sft_adapter):
    run = tmp_path / "run"
    status, output = launch(recipe, "--logging_dir", "-1")
    assert status != 0 and "unknown field" in output
    status, output = launch(recipe)
    assert status == 0, output
    assert "'rewards/margins'" in output
    assert not (run / "ref").exists(), "the reference is not saved beside the trained adapter"
    trained, start = load_file(run / "adapter_model.safetensors"), load_file(sft_adapter / "adapter_model.safetensors")
    assert trained.keys() == start.keys() and all(tensor.dtype == torch.float32 for tensor in trained.values())
    assert all(not torch.equal(trained[name], start[name]) for name in start)
    status, output = launch(recipe)
    assert status == 0 and "this run has finished" in output
