"""DPO on the tiny model: the reference is the SFT policy, the tokens are the policy's, and bad pairs are refused."""

import json
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

from recipes import dpo
from recipes.dpo import PairTrainer, pair_dataset

ROOT = Path(__file__).parent.parent

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
    """A recipe of the stage on the tiny model: six steps."""
    tasks, pairs = tmp_path / "tasks.jsonl", tmp_path / "pairs.jsonl"
    tasks.write_text("".join(json.dumps(task) + "\n" for task in TASKS))
    pairs.write_text("".join(json.dumps(pair) + "\n" for pair in make_pairs(tiny_tokenizer) * 4))
    config = tmp_path / "dpo.yaml"
    fields = {"model_name_or_path": str(tiny_folder), "adapter_name_or_path": str(sft_adapter), "dtype": "float32"}
    fields |= {"dataset_name": str(tasks), "preferences": str(pairs), "per_device_train_batch_size": 2, "beta": 0.05}
    fields |= {"learning_rate": 1e-3, "num_train_epochs": 1, "save_steps": 1, "logging_steps": 1, "seed": 1}
    fields |= {"bf16": False, "gradient_checkpointing": False, "report_to": "none", "disable_tqdm": True}
    config.write_text(yaml.safe_dump(fields))
    return config


def run_stage(monkeypatch, config, output_dir):
    monkeypatch.setattr(sys, "argv", ["dpo.py", "--config", str(config), "--output_dir", str(output_dir)])
    dpo.main()


def test_stage_continues_after_a_crash_and_saves_one_adapter(tmp_path, recipe, sft_adapter, monkeypatch, capsys):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run_stage(monkeypatch, recipe, whole)
    assert not (whole / "ref").exists(), "the reference is not saved beside the trained adapter"
    trained, start = (load_file(folder / "adapter_model.safetensors") for folder in (whole, sft_adapter))
    assert trained.keys() == start.keys() and {tensor.dtype for tensor in trained.values()} == {torch.float32}
    assert not any(torch.equal(trained[name], start[name]) for name in start)

    training_step = PairTrainer.training_step

    def power_cut(trainer, *args):
        if trainer.state.global_step == 3:
            raise KeyboardInterrupt
        return training_step(trainer, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PairTrainer, "training_step", power_cut)
        run_stage(patch, recipe, broken)
    assert (broken / "checkpoint-3").is_dir() and not (broken / "adapter_model.safetensors").exists()
    run_stage(monkeypatch, recipe, broken)
    continued = load_file(broken / "adapter_model.safetensors")
    assert all(torch.equal(continued[name], trained[name]) for name in trained), "as if nothing had happened"
    states = [run / "checkpoint-6" / "trainer_state.json" for run in (whole, broken)]
    logs = [json.loads(state.read_text())["log_history"] for state in states]
    for entries in logs:
        assert [entry["step"] for entry in entries] == list(range(1, 7))
    # The reference is still the SFT policy: rewards are measured from there
    assert [entry["rewards/margins"] for entry in logs[0]] == [entry["rewards/margins"] for entry in logs[1]]
    capsys.readouterr()
    run_stage(monkeypatch, recipe, broken)
    assert "this run has finished" in capsys.readouterr().out


@pytest.mark.parametrize("use_weighting", [False, True])
def test_without_an_adapter_a_new_one_is_trained_against_the_base(tmp_path, recipe, monkeypatch, use_weighting):
    torch.backends.cuda.enable_cudnn_sdp(True)
    fields = yaml.safe_load(recipe.read_text()) | {
        "use_weighting": use_weighting,
        "lora_r": 4,
        "lora_target_modules": ["q_proj", "v_proj"],
        "max_steps": 2,
    }
    del fields["adapter_name_or_path"]
    recipe.write_text(yaml.safe_dump(fields))
    run_stage(monkeypatch, recipe, tmp_path / "new")
    log = json.loads((tmp_path / "new" / "trainer_state.json").read_text())["log_history"]
    assert log[0]["rewards/margins"] == 0.0 and log[1]["rewards/margins"] > 0
    assert not torch.backends.cuda.cudnn_sdp_enabled(), "its gradients may be NaN"
    assert (
        len(load_file(tmp_path / "new" / "adapter_model.safetensors")) == 8
    )  # A and B of two projections in two layers


@pytest.mark.parametrize(
    "change, message",
    [
        ({"chosen_ids": None}, r"pairs.jsonl:2: column 'chosen_ids' is missing or no list: write the file with"),
        ({"rejected": 3}, r"pairs.jsonl:2: column 'rejected' is missing or no str"),
        ({"prompt": "def add(x):\n"}, r"pairs.jsonl:2: the prompt is not that of the task 'add/1', byte for byte"),
        ({"task_id": "HumanEval/1"}, r"pairs.jsonl:2: 'HumanEval/1' is none of the tasks of dataset_name"),
        ({"chosen_ids": [5, 6]}, r"pair 2: chosen_ids are not the tokens of 'chosen' for this model's tokenizer"),
        ({"rejected": "x" * 999, "rejected_ids": "x"}, r"pair 2 has 1024 tokens and max_length is 1000: raise"),
    ],
)
def test_bad_pairs_are_refused(tmp_path, recipe, tiny_tokenizer, monkeypatch, change, message):
    pairs = make_pairs(tiny_tokenizer)
    pairs[1] |= change
    if change.get("rejected_ids"):
        pairs[1]["rejected_ids"] = tiny_tokenizer(pairs[1]["rejected"])["input_ids"]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    refuse(monkeypatch, recipe, tmp_path, message, max_length=1000)


def test_no_pairs_are_refused(tmp_path, recipe, monkeypatch):
    (tmp_path / "pairs.jsonl").write_text("")
    refuse(monkeypatch, recipe, tmp_path, "pairs.jsonl holds no pairs")


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"preferences": "absent"}, "there is no file absent: has the stage 'preferences' finished"),
        ({"preferences": "tests"}, "there is no file tests/pairs.jsonl: has the stage 'preferences' finished"),
        ({"preferences": "LICENSE"}, "LICENSE:1: not a line of JSON"),
        ({"adapter_name_or_path": "absent"}, "there is no adapter in 'absent'"),
        ({"bta": 0.1}, "unknown field 'bta': did you mean 'beta'"),
    ],
)
def test_bad_fields_are_refused(tmp_path, recipe, monkeypatch, fields, message):
    monkeypatch.chdir(ROOT)
    refuse(monkeypatch, recipe, tmp_path, message, **fields)


def refuse(monkeypatch, recipe, tmp_path, message, **fields):
    """The stage ends with this message before it loads weights or claims its output directory."""
    recipe.write_text(yaml.safe_dump({**yaml.safe_load(recipe.read_text()), **fields}))
    monkeypatch.setattr(dpo, "load_policy", None)
    with pytest.raises(SystemExit, match=message):
        run_stage(monkeypatch, recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
