"""Merging an adapter: the same tokens as base and adapter, the weights by hand, and what is refused or left behind."""

import json
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes import merge
from trainers import generate_completions

TARGETS = ["q_proj", "v_proj", "down_proj"]
PROMPTS = ["def add(x):\n", "import re\n", "a = 1\nb = 2\nprint(", "x"]


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request):
    return getattr(torch, request.param)


def make_base(tiny_folder, folder, dtype, template=None):
    AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=dtype).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def make_adapter(base, folder, **config):
    model = get_peft_model(base, LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": TARGETS} | config))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)


def run(monkeypatch, **fields):
    arguments = [part for name, value in fields.items() for part in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["merge.py", *arguments])
    merge.main()


def greedy(model, tokenizer):
    return generate_completions(model, tokenizer(PROMPTS)["input_ids"], [tokenizer.eos_token_id], 24, temperature=0.0)


def test_merged_weights_and_tokens(tmp_path, tiny_folder, monkeypatch, dtype):
    base, adapter, output = tmp_path / "base", tmp_path / "adapter", tmp_path / "models" / "merged"
    make_adapter(make_base(tiny_folder, base, dtype, template="{{ messages[0].content }}"), adapter)
    run(monkeypatch, adapter_name_or_path=adapter, output_dir=output)

    weights, before = load_file(output / "model.safetensors"), load_file(base / "model.safetensors")
    lora = load_file(adapter / "adapter_model.safetensors")
    assert weights.keys() == before.keys() and {weight.dtype for weight in weights.values()} == {dtype}
    for name, weight in weights.items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        expected = before[name]
        if f"{prefix}.lora_A.weight" in lora:
            a, b = lora[f"{prefix}.lora_A.weight"], lora[f"{prefix}.lora_B.weight"]
            assert a.dtype == torch.float32
            expected = (before[name].float() + 12 / 4 * (b @ a)).to(dtype)
            assert not torch.equal(expected, before[name]), "or this says nothing"
        assert torch.equal(weight, expected), name
    assert sum(f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight" in lora for name in weights) == 6

    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer.chat_template == "{{ messages[0].content }}"
    merged = AutoModelForCausalLM.from_pretrained(output, dtype="auto")
    assert merged.dtype == dtype and merged.generation_config.eos_token_id == tokenizer.eos_token_id
    policy = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), adapter)
    for prompt, ours, theirs in zip(PROMPTS, greedy(merged, tokenizer), greedy(policy, tokenizer), strict=True):
        same = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
        if same is None:
            assert ours == theirs
            continue
        assert dtype == torch.bfloat16, "in fp32 the tokens are the same"
        ids = torch.tensor([[*tokenizer(prompt)["input_ids"], *ours[:same]]])
        logits = policy(ids).logits[0, -1].float()
        assert (logits[theirs[same]] - logits[ours[same]]).item() < 2**-5 * logits.abs().max().item(), "not a tie"


def test_card_and_generation_end(tmp_path, tiny_folder, monkeypatch, capsys):
    base, adapter, output = tmp_path / "base", tmp_path / "adapter", tmp_path / "mine"
    make_adapter(make_base(tiny_folder, base, torch.bfloat16), adapter)
    tokenizer = AutoTokenizer.from_pretrained(base, eos_token="a")  # as the trainers save it after chat training
    tokenizer.chat_template = "{%- set enable_thinking = False %}{{ messages }}"
    tokenizer.save_pretrained(adapter)
    settings = {"model_name_or_path": str(base), "load_in_4bit": True, "learning_rate": 0.1, "report_to": []}
    (adapter / "run.json").write_text(json.dumps({"stage": "sft", "settings": settings}))
    results = tmp_path / "results" / "row"
    results.mkdir(parents=True)
    metrics = {"num_passed": 20, "num_tasks": 33, "pass_at_1": 20 / 33, "pass_at_1_interval": [0.44, 0.75]}
    metrics |= {"truncated_pass_at_1": 20 / 33, "mean_completion_tokens": 52.7, "median_completion_tokens": 40}
    (results / "metrics.json").write_text(json.dumps({**metrics, "verdicts": {"passed": 20, "failed": 13}}))
    sample = {"task_id": "a", "passed": True, "completion_tokens": 3}
    (results / "per_task.jsonl").write_text(json.dumps(sample) + "\n")
    run(monkeypatch, adapter_name_or_path=adapter, output_dir=output, results=results)
    assert "in 4 bits and is merged into the weights before quantisation" in capsys.readouterr().out
    card = (output / "README.md").read_text()
    assert "| row | completion |  20/33 | 60.6% [44%, 75%] |" in card
    assert f"python recipes/sft.py --model_name_or_path {base} --load_in_4bit True --learning_rate 0.1" in card
    assert card.startswith("---\nlibrary_name: transformers\n") and "# mine\n" in card and "base_model" not in card
    ends = json.loads((output / "generation_config.json").read_text())["eos_token_id"]
    assert ends == [AutoTokenizer.from_pretrained(base).eos_token_id, tokenizer.eos_token_id]
    assert (output / "chat_template.jinja").read_text() == tokenizer.chat_template
    model = AutoModelForCausalLM.from_pretrained(output, dtype="auto")
    card = merge.model_card("mine", "cache/qwen2.5-coder-0.5b-instruct", str(adapter), model, "")
    assert card.startswith("---\nbase_model: Qwen/Qwen2.5-Coder-0.5B-Instruct\n") and "Evaluation" not in card


def test_what_cannot_be_merged_is_refused_before_weights_load(tmp_path, tiny_folder, monkeypatch):
    monkeypatch.setattr(merge, "load_policy", None)
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model = make_base(tiny_folder, base, torch.float32)
    fields = {"adapter_name_or_path": adapter, "output_dir": tmp_path / "merged"}
    with pytest.raises(SystemExit, match="output_dir is not set: write a directory"):
        run(monkeypatch, adapter_name_or_path=adapter)
    with pytest.raises(SystemExit, match="there is no adapter in .*has the stage that writes it finished"):
        run(monkeypatch, **fields)
    make_adapter(model, adapter)
    with pytest.raises(SystemExit, match="exists: choose another, or remove it"):
        run(monkeypatch, **fields | {"output_dir": tmp_path})
    with pytest.raises(SystemExit, match="holds no finished evaluation"):
        run(monkeypatch, **fields, results=tmp_path)
    config = json.loads((base / "config.json").read_text())
    quantized = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (base / "config.json").write_text(json.dumps({**config, **quantized}))
    with pytest.raises(SystemExit, match=r"are quantised \(.*bitsandbytes.*\), and an adapter cannot be added to them"):
        run(monkeypatch, **fields)
    model = make_base(tiny_folder, base, torch.float32)
    (base / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    make_adapter(model, tmp_path / "head", target_modules=["lm_head"])
    with pytest.raises(SystemExit, match="changes lm_head, whose weights .* uses for its embedding and its LM head"):
        run(monkeypatch, **fields | {"adapter_name_or_path": tmp_path / "head"})
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(SystemExit, match="has no adapter_model.safetensors"):
        run(monkeypatch, **fields)
    assert not (tmp_path / "merged").exists()


def test_a_failed_merge_leaves_nothing(tmp_path, tiny_folder, monkeypatch):
    base, adapter, output = tmp_path / "base", tmp_path / "adapter", tmp_path / "models" / "merged"
    make_adapter(make_base(tiny_folder, base, torch.float32), adapter)

    def full(*args, **kwargs):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(merge.AutoTokenizer, "from_pretrained", full)  # the weights are written by then
        with pytest.raises(SystemExit, match="merged cannot be written: no space left on device"):
            run(patch, adapter_name_or_path=adapter, output_dir=output)
    assert list(output.parent.iterdir()) == []
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {name: weight[:, :3].contiguous() for name, weight in weights.items()}, adapter / "adapter_model.safetensors"
    )
    with pytest.raises(SystemExit, match="cannot be merged into .*size mismatch"):
        run(monkeypatch, adapter_name_or_path=adapter, output_dir=output)
    assert list(output.parent.iterdir()) == []
