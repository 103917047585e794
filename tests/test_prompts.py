"""Prompt formats: which one a run has, and the same token ids in every stage."""

import json
import sys
from types import SimpleNamespace

import pytest
import yaml
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from trl import ModelConfig, RLOOConfig, RLOOTrainer, SFTConfig, SFTTrainer

from recipes import dpo, evaluate, preferences, sft
from recipes.common import sampling
from recipes.common.arguments import parse_settings
from recipes.common.policy_gradient import RLArguments, train_policy_gradient
from recipes.common.prompts import (
    PromptArguments,
    end_of_turn,
    format_tasks,
    prompt_format,
    prompt_token_ids,
    reference_token_ids,
)
from recipes.evaluate import EvaluateArguments
from rewards import as_chat, program_source
from trainers import ReinforceConfig, ReinforceTrainer, decode_completions

TEMPLATE = (
    "{% if messages[0].role != 'system' %}<|start|>system\nHelp.<|end|>\n{% endif %}"
    "{% for message in messages %}<|start|>{{ message.role }}\n{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
VARIABLE = "{% if add_generation_prompt and thinking is defined and not thinking %}<no>{% endif %}"
TASKS = Dataset.from_list(
    [
        {
            "task_id": f"add/{n}",
            "prompt": f"def add(x):\n    # plus {n}\n",
            "canonical_solution": f"    return x + {n}\n",
            "test": f"def check(candidate):\n    assert candidate(1) == {n + 1}\n",
            "entry_point": "add",
            "setup": "",
        }
        for n in range(3)
    ]
)


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory, tiny_folder):
    """The tiny model as an instruct model: its EOS is its chat template's end of turn."""
    folder = tmp_path_factory.mktemp("tiny-chat")
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|end|>"]})
    tokenizer.eos_token = "<|end|>"
    tokenizer.chat_template = TEMPLATE
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def chat_tokenizer(chat_folder):
    return AutoTokenizer.from_pretrained(chat_folder, padding_side="left")


def formatted(tokenizer, folder, tasks=TASKS, **fields):
    return format_tasks(tasks, PromptArguments(**fields), tokenizer, ModelConfig(model_name_or_path=str(folder)))


def test_auto_is_chat_for_an_instruct_model(chat_folder, chat_tokenizer, tiny_folder, tiny_tokenizer):
    assert end_of_turn(chat_tokenizer) == chat_tokenizer.convert_tokens_to_ids("<|end|>")
    assert formatted(chat_tokenizer, chat_folder).to_list() == as_chat(TASKS).to_list()
    assert formatted(chat_tokenizer, chat_folder, prompt_format="completion").to_list() == TASKS.to_list()
    assert formatted(tiny_tokenizer, tiny_folder).to_list() == TASKS.to_list()
    # A base model that ships a chat template: its own generations end with another token
    chat_tokenizer.eos_token = "<eos>"
    assert formatted(chat_tokenizer, tiny_folder).to_list() == TASKS.to_list()
    assert prompt_format(formatted(chat_tokenizer, tiny_folder, as_chat(TASKS))) == "chat"
    assert chat_tokenizer.eos_token == "<|end|>", "in chat, the end of turn ends a completion"


def test_instruction_and_system_message(chat_folder, chat_tokenizer):
    asked = {"chat_instruction": "Finish it.", "system_message": "Be brief."}
    task = formatted(chat_tokenizer, chat_folder, **asked)[0]
    (ids,) = prompt_token_ids(chat_tokenizer, [task["prompt"]])
    assert chat_tokenizer.decode(ids) == (
        "<|start|>system\nBe brief.<|end|>\n"
        "<|start|>user\nFinish it.\n\n```python\ndef add(x):\n    # plus 0\n```<|end|>\n"
        "<|start|>assistant\n"
    )


def test_template_variables_are_read_and_checked(tmp_path, chat_folder, chat_tokenizer, tiny_folder, tiny_tokenizer):
    with pytest.raises(ValueError, match="chat_template_kwargs is no JSON"):
        PromptArguments(chat_template_kwargs="{thinking: false}")
    for variables in ('["thinking"]', '{"a-b": 1}'):
        with pytest.raises(SystemExit, match="chat_template_kwargs is .*: write names and values"):
            formatted(chat_tokenizer, chat_folder, chat_template_kwargs=variables)
    with pytest.raises(SystemExit, match="chat_template_kwargs is for chat, and the policy completes code here"):
        formatted(tiny_tokenizer, tiny_folder, chat_template_kwargs='{"thinking": false}')
    recipe = ["--chat_template_kwargs", '{"thinking": false}', "--output_dir", "x"]
    for argv, types in ((["--bf16", "false"], (RLArguments, ReinforceConfig)), ([], (EvaluateArguments,))):
        *parts, settings = parse_settings(*types, argv=[*recipe, *argv])
        assert parts[-1].chat_template_kwargs == settings["chat_template_kwargs"] == {"thinking": False}


def test_a_thought_that_the_prompt_opens_is_part_of_the_text(chat_tokenizer):
    prompt_ids = chat_tokenizer("assistant\n<think>\n")["input_ids"]
    reply_ids = chat_tokenizer("draft:\n```python\nx = 1\n```\n")["input_ids"]
    (text,) = decode_completions(chat_tokenizer, [prompt_ids], [reply_ids])
    assert text == "<think>\ndraft:\n```python\nx = 1\n```\n"
    assert program_source([{"role": "user", "content": "?"}], text) == "", "a thought that does not end is no answer"


def test_impossible_formats_are_refused(chat_folder, chat_tokenizer, tiny_folder, tiny_tokenizer):
    for tasks, asked in ((TASKS, "chat"), (as_chat(TASKS), "auto")):
        with pytest.raises(SystemExit, match="chat needs a chat template, and the tokenizer of .* has none: use the"):
            formatted(tiny_tokenizer, tiny_folder, tasks, prompt_format=asked)
    with pytest.raises(SystemExit, match="the tasks are chat messages: set prompt_format to chat"):
        formatted(chat_tokenizer, chat_folder, as_chat(TASKS), prompt_format="completion")
    with pytest.raises(ValueError, match="prompt_format is 'chats': write one of 'auto', 'completion', 'chat'"):
        PromptArguments(prompt_format="chats")
    with pytest.raises(ValueError, match="system_message is for chat, and prompt_format is 'completion'"):
        PromptArguments(prompt_format="completion", system_message="Be brief.")


def stage_prompts(tmp_path, folder, tokenizer, tasks, monkeypatch):
    """The token ids that every stage puts before a completion, by stage."""
    common = {"use_cpu": True, "bf16": False, "report_to": "none"}
    rl = RLOOTrainer(
        str(folder),
        reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
        args=RLOOConfig(str(tmp_path), per_device_train_batch_size=2, **common),
        train_dataset=tasks,
        processing_class=tokenizer,
    )
    found = {"rollout": rl._tokenize_prompts(tasks["prompt"][:])[0]}

    references = sft.reference_dataset(tasks, tokenizer, max_length=1024)
    args = SFTConfig(str(tmp_path), completion_only_loss=True, **common)
    model = AutoModelForCausalLM.from_pretrained(folder)
    rows = SFTTrainer(model, args, train_dataset=references, processing_class=tokenizer).train_dataset
    starts = [next(i for i, label in enumerate(row["labels"]) if label != -100) for row in rows]
    found["sft"] = [row["input_ids"][:start] for row, start in zip(rows, starts, strict=True)]

    pairs = [
        {"prompt": task["prompt"], "chosen": "b", "rejected": "c"}
        | {f"{side}_ids": tokenizer(text)["input_ids"] for side, text in (("chosen", "b"), ("rejected", "c"))}
        for task in tasks
    ]
    found["dpo"] = dpo.pair_dataset(pairs, tokenizer, 1024)["prompt_ids"][:]

    seen = []
    monkeypatch.setattr(
        sampling, "generate_completions", lambda model, ids, **kwargs: seen.extend(ids) or [[5]] * len(ids)
    )
    decode = SimpleNamespace(
        num_generations=1, per_device_eval_batch_size=8, max_completion_length=1, temperature=0.0, top_p=1.0
    )
    sampling.complete(model, tokenizer, tasks, decode, tqdm(disable=True))
    found["evaluate"] = sorted(seen)
    return found


@pytest.mark.parametrize("asked, variables", [("chat", None), ("chat", {"thinking": False}), ("completion", None)])
def test_every_stage_has_the_same_token_ids(tmp_path, chat_folder, chat_tokenizer, monkeypatch, asked, variables):
    chat_tokenizer.chat_template = TEMPLATE + VARIABLE
    tasks = formatted(chat_tokenizer, chat_folder, prompt_format=asked, chat_template_kwargs=variables)
    expected = prompt_token_ids(chat_tokenizer, tasks["prompt"][:])
    assert chat_tokenizer.decode(expected[0]).endswith("<no>") == (variables is not None)
    if asked == "chat":
        text = chat_tokenizer.apply_chat_template(tasks[0]["prompt"], tokenize=False, add_generation_prompt=True)
        assert chat_tokenizer.decode(expected[0]) == text and text.count("<|start|>") == 3
    else:
        assert chat_tokenizer.decode(expected[0]) == TASKS[0]["prompt"]
    for stage, ids in stage_prompts(tmp_path, chat_folder, chat_tokenizer, tasks, monkeypatch).items():
        assert ids == (sorted(expected) if stage == "evaluate" else expected), stage


def test_sft_teaches_the_reference_and_the_end_of_turn(chat_folder, chat_tokenizer, tiny_folder, tiny_tokenizer):
    task = formatted(chat_tokenizer, chat_folder)[1]
    prompt_ids, completion_ids = reference_token_ids(chat_tokenizer, task)
    reply = "```python\ndef add(x):\n    # plus 1\n    return x + 1\n```<|end|>"
    assert chat_tokenizer.decode(completion_ids) == reply, "and not the template's line break after it"
    assert completion_ids[-1] == chat_tokenizer.eos_token_id
    rows = sft.reference_dataset(formatted(chat_tokenizer, chat_folder), chat_tokenizer, None)
    assert rows[1]["input_ids"] == prompt_ids + completion_ids
    assert rows[1]["completion_mask"] == [0] * len(prompt_ids) + [1] * len(completion_ids)

    _, completion_ids = reference_token_ids(tiny_tokenizer, TASKS[1])
    assert tiny_tokenizer.decode(completion_ids) == "    return x + 1<eos>"


def test_sft_refuses_what_it_would_cut_off_or_cannot_teach(tiny_tokenizer):
    with pytest.raises(
        SystemExit, match="max_length is 30, and add/0 has 42 tokens with its completion: raise max_length"
    ):
        sft.reference_dataset(TASKS, tiny_tokenizer, 30)
    assert len(sft.reference_dataset(TASKS, tiny_tokenizer, 42)) == 3
    without = Dataset.from_list([{**TASKS[0], "canonical_solution": ""}])
    with pytest.raises(SystemExit, match="dataset_name: the task 'add/0' has no reference"):
        sft.reference_dataset(without, tiny_tokenizer, None)


@pytest.fixture
def metaspace_tokenizer():
    """In the manner of Llama's: a leading space is dropped from whatever is decoded."""
    alphabet = ["▁", *"abcdefghijklmnopqrstuvwxyz(){}:+#0123456789\n"]
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    backend.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="first")
    backend.add_special_tokens(["<pad>", "<eos>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def test_indentation_survives_a_tokenizer_that_drops_leading_spaces(metaspace_tokenizer, monkeypatch):
    tokenizer, body = metaspace_tokenizer, "    return x + 0"
    prompt_ids, completion_ids = reference_token_ids(tokenizer, TASKS[0])
    assert tokenizer.decode(completion_ids, skip_special_tokens=True) == body[1:], "decoded alone"
    assert completion_ids[-1] == tokenizer.eos_token_id and len(completion_ids) == len(body) + 1
    monkeypatch.setattr(sampling, "generate_completions", lambda *args, **kwargs: [completion_ids])
    decode = SimpleNamespace(
        num_generations=1, per_device_eval_batch_size=8, max_completion_length=99, temperature=0.0, top_p=1.0
    )
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=None))
    (sample,) = sampling.complete(model, tokenizer, TASKS.select([0]), decode, tqdm(disable=True))
    assert sample["completion"] == body
    evaluate.grade([sample], TASKS.to_list(), timeout=5.0)
    assert sample["passed"]
    pair = {"prompt": TASKS[0]["prompt"], "chosen": body, "rejected": body}
    pair |= {"chosen_ids": completion_ids, "rejected_ids": completion_ids}
    (row,) = dpo.pair_dataset([pair], tokenizer, None)
    assert row == {"prompt_ids": prompt_ids, "chosen_ids": completion_ids, "rejected_ids": completion_ids}


def test_chat_replies_are_graded_as_programs():
    tasks = as_chat(TASKS).to_list()
    replies = [
        "```python\ndef add(x):\n    return x + 1\n```",
        "def add(x): return x",
        "```\nadd = lambda x: x + 1\n```",
    ]
    samples = [{"task_id": "add/1", "completion": reply} for reply in replies]
    evaluate.grade(samples, tasks, 5.0, {"add/1": "def check(candidate):\n    assert candidate(2) == 3\n"})
    for key in ("passed", "passed_truncated", "passed_plus"):
        assert [sample[key] for sample in samples] == [True, False, True]


def run(monkeypatch, stage, config, **fields):
    line = [part for name, value in fields.items() for part in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["stage.py", "--config", str(config), *line])
    stage.main()


def test_stages_in_chat_format(tmp_path, chat_folder, chat_tokenizer, monkeypatch, capsys):
    tasks, config = tmp_path / "tasks.jsonl", tmp_path / "recipe.yaml"
    tasks.write_text("".join(json.dumps(task) + "\n" for task in TASKS))
    recipe = {"model_name_or_path": str(chat_folder), "dtype": "float32", "dataset_name": str(tasks), "seed": 1}
    train = {"bf16": False, "report_to": "none", "max_steps": 1, "logging_steps": 1, "gradient_checkpointing": False}
    train |= {"use_peft": True, "lora_target_modules": ["q_proj", "v_proj"]}
    config.write_text(yaml.safe_dump(recipe | train))
    run(monkeypatch, sft, config, output_dir=tmp_path / "sft")

    config.write_text(yaml.safe_dump(recipe | {"max_completion_length": 8}))
    for name in ("chat", "completion"):
        output = tmp_path / name
        run(monkeypatch, evaluate, config, prompt_format=name, dataset_test_split="all", output_dir=output)
        assert json.loads((output / "metrics.json").read_text())["prompt_format"] == name
    capsys.readouterr()
    print(evaluate.results_table([str(tmp_path / "chat"), str(tmp_path / "completion")]))
    header, _, *rows = capsys.readouterr().out.strip().splitlines()
    assert [row.split("|")[2].strip() for row in (header, *rows)] == ["format", "chat", "completion"]

    # A policy that answers right or wrong by turns, and a pair from it
    replies = ["```python\ndef add(x):\n    return x + 0\n```", "I do not know."]
    ids = [chat_tokenizer(reply)["input_ids"] + [chat_tokenizer.eos_token_id] for reply in replies]
    monkeypatch.setattr(sampling, "generate_completions", lambda model, prompts, **kwargs: ids * (len(prompts) // 2))
    config.write_text(yaml.safe_dump(recipe | {"num_generations": 2, "adapter_name_or_path": str(tmp_path / "sft")}))
    run(monkeypatch, preferences, config, output_dir=tmp_path / "pairs")
    (pair,) = map(json.loads, (tmp_path / "pairs" / "pairs.jsonl").read_text().splitlines())
    assert pair["prompt"] == as_chat(TASKS)[0]["prompt"]
    assert pair["chosen"] == [{"role": "assistant", "content": replies[0]}]
    assert pair["rejected_ids"] == ids[1]

    train.pop("use_peft"), train.pop("lora_target_modules")
    config.write_text(yaml.safe_dump(recipe | train | {"adapter_name_or_path": str(tmp_path / "sft")}))
    with pytest.raises(SystemExit, match="not that of the task 'add/0', byte for byte: use the prompt_format that the"):
        run(
            monkeypatch,
            dpo,
            config,
            preferences=tmp_path / "pairs",
            prompt_format="completion",
            output_dir=tmp_path / "x",
        )
    run(monkeypatch, dpo, config, preferences=tmp_path / "pairs", output_dir=tmp_path / "dpo")
    assert (tmp_path / "dpo" / "adapter_model.safetensors").is_file()

    fields = {"max_completion_length": 4, "per_device_train_batch_size": 2}
    config.write_text(yaml.safe_dump(recipe | train | fields | {"adapter_name_or_path": str(tmp_path / "sft")}))
    reinforce = SimpleNamespace(main=lambda: train_policy_gradient("reinforce", ReinforceTrainer, ReinforceConfig))
    run(monkeypatch, reinforce, config, chat_template_kwargs='{"thinking": false}', output_dir=tmp_path / "rl")
    template = (tmp_path / "rl" / "chat_template.jinja").read_text()
    assert template.startswith("{%- set thinking = False %}{% if messages")


@pytest.mark.parametrize(
    "lengths, batches",
    [([5, 3, 4, 9, 2], [[4, 1], [2, 0], [3]]), ([2, 8, 9], [[0, 1], [2]]), ([2, 9, 1400], [[0], [1], [2]]), ([], [])],
)
def test_batches_hold_prompts_of_similar_length(lengths, batches):
    assert [*sampling.similar_lengths(lengths, batch_size=2)] == batches
