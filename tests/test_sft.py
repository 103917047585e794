"""What SFT teaches: references, or the policy's own shortest completions that pass."""

import json
import sys

import pytest
import yaml
from datasets import Dataset
from safetensors.torch import load_file

from recipes import sft
from recipes.common.prompts import prompt_token_ids
from trainers import decode_completions

TASKS = [
    {
        "task_id": f"add/{n}",
        "prompt": f"def add(x):\n    # plus {n}\n",
        "canonical_solution": "",
        "test": f"def check(candidate):\n    assert candidate(1) == {n + 1}\n",
        "entry_point": "add",
    }
    for n in range(3)
]
SAMPLES = [
    {"task_id": "add/0", "passed": True, "completion_ids": [9, 8, 7, 1]},
    {"task_id": "add/0", "passed": True, "completion_ids": [9, 8, 1]},
    {"task_id": "add/0", "passed": False, "completion_ids": [1]},
    {"task_id": "add/1", "passed": False, "completion_ids": [5, 1]},
    {"task_id": "add/2", "passed": True, "completion_ids": [6, 1]},
]


@pytest.fixture
def samples(tiny_tokenizer):
    """Samples with the text of their tokens. All prompts are alike."""
    (prompt_ids,) = prompt_token_ids(tiny_tokenizer, [TASKS[0]["prompt"]])
    return [
        sample | {"completion": decode_completions(tiny_tokenizer, [prompt_ids], [sample["completion_ids"]])[0]}
        for sample in SAMPLES
    ]


def test_the_shortest_passing_completion_of_each_task_is_taught(tiny_tokenizer, samples, capsys):
    tasks = Dataset.from_list(TASKS)
    dataset = sft.sampled_dataset(tasks, samples, tiny_tokenizer, None)
    prompts = prompt_token_ids(tiny_tokenizer, tasks["prompt"][:])
    assert dataset["input_ids"][:] == [[*prompts[0], 9, 8, 1], [*prompts[2], 6, 1]]
    assert dataset["completion_mask"][:] == [[0] * len(prompts[0]) + [1] * 3, [0] * len(prompts[2]) + [1] * 2]
    assert "2 of 3 tasks have a completion that passes" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="samples: none of their completions of these tasks passes"):
        sft.sampled_dataset(tasks, samples[2:4], tiny_tokenizer, None)
    with pytest.raises(SystemExit, match="max_length is 5, and add/0 has"):
        sft.sampled_dataset(tasks, samples, tiny_tokenizer, 5)
    samples[1]["completion_ids"] = [9, 1]
    with pytest.raises(SystemExit, match="samples: of add/0, completion_ids are not the tokens of the completion"):
        sft.sampled_dataset(tasks, samples, tiny_tokenizer, None)


def test_the_stage_trains_on_samples_and_tells_them_apart(tmp_path, tiny_folder, samples, monkeypatch):
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in TASKS))
    fields = {"model_name_or_path": str(tiny_folder), "dataset_name": str(tmp_path / "tasks.jsonl"), "max_steps": 1}
    fields |= {
        "dtype": "float32",
        "bf16": False,
        "use_peft": True,
        "lora_target_modules": ["q_proj", "v_proj"],
        "seed": 1,
    }
    fields |= {"gradient_checkpointing": False, "report_to": "none", "output_dir": str(tmp_path / "sft")}
    config = tmp_path / "sft.yaml"
    config.write_text(yaml.safe_dump(fields | {"samples": str(tmp_path)}))
    monkeypatch.setattr(sys, "argv", ["sft.py", "--config", str(config)])
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    with pytest.raises(SystemExit, match="holds no samples of a finished run of the stage 'preferences'"):
        sft.main()
    (tmp_path / "summary.json").write_text("{}")
    sft.main()
    assert load_file(tmp_path / "sft" / "adapter_model.safetensors")
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples[1:]))
    with pytest.raises(SystemExit, match="holds another run"):
        sft.main()
