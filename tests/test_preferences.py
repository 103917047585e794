"""Preference pairs: the rules to the letter, and a sampling run that is killed and loses nothing."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from datasets import load_from_disk
from trl import ModelConfig

from recipes import preferences
from recipes.common.arguments import parse_settings
from recipes.preferences import PreferencesArguments, form_pairs
from rewards import load_tasks

ROOT = Path(__file__).parent.parent


def sample(text, passed, tokens, penalty=0.01):
    reward = float(passed) - penalty * tokens / 100
    return {"completion": text, "completion_ids": [3] * tokens, "completion_tokens": tokens} | {
        "verdict": "passed" if passed else "failed",
        "passed": passed,
        "reward": reward,
    }


MIXED = [sample("a", True, 30), sample("b", False, 20), sample("c", True, 10), sample("d", False, 50)]
MIXED += [sample("c", True, 12), sample("e", False, 50)]
PASSING = [sample(text, True, tokens) for text, tokens in [("p", 100), ("q", 200), ("p", 100)] + 3 * [("r", 150)]]
FAILING = [sample("s", False, 40)] * 6
TASKS = [{"task_id": name, "prompt": f"def {name}"} for name in ("mixed", "passing", "failing")]


def paired(rule, **fields):
    args = PreferencesArguments(num_generations=6, pair_rule=rule, **fields)
    pairs, summary = form_pairs(MIXED + PASSING + FAILING, TASKS, args)
    assert all(pair["prompt"] == f"def {pair['task_id']}" for pair in pairs)
    return [(pair["task_id"], pair["chosen"], pair["rejected"]) for pair in pairs], summary, pairs


def test_shortest_pass_against_longest_fail():
    names, summary, pairs = paired("shortest_pass_longest_fail")
    assert names == [("mixed", "c", "d")]
    assert pairs == [
        {
            "task_id": "mixed",
            "prompt": "def mixed",
            "chosen": "c",
            "chosen_ids": [3] * 10,
            "chosen_tokens": 10,
            "chosen_reward": 1 - 0.001,
            "rejected": "d",
            "rejected_ids": [3] * 50,
            "rejected_tokens": 50,
            "rejected_reward": -0.005,
        }
    ]
    assert summary == {
        "pair_rule": "shortest_pass_longest_fail",
        "tasks": 3,
        "samples": 18,
        "not_judged": 0,
        "duplicates": 9,  # c, p, r twice, s five times
        "pass_rate": 0.5,
        "always_pass": 1,
        "always_fail": 1,
        "tasks_not_judged": 0,
        "pairs": 1,
        "tasks_with_pairs": 1,
        "dropped": {"always_pass": 1, "always_fail": 1},
        "mean_chosen_tokens": 10,
        "mean_rejected_tokens": 50,
    }


def test_all_pairs_are_capped_from_the_largest_difference():
    everything = [("c", "d"), ("c", "e"), ("a", "d"), ("a", "e"), ("c", "b"), ("a", "b")]
    for cap in (1, 3, 8):
        names, summary, _ = paired("all_pairs", max_pairs_per_task=cap)
        assert names == [("mixed", *pair) for pair in everything[:cap]]
        assert summary["pairs"] == min(cap, 6) and summary["tasks_with_pairs"] == 1


def test_reward_margin_pairs_two_that_pass():
    # 100 tokens cost 0.01: of the passing ones only the shortest and the longest are 0.01 apart, exactly
    names, summary, _ = paired("reward_margin", min_reward_margin=0.01, max_pairs_per_task=2)
    assert names == [("mixed", "c", "d"), ("mixed", "c", "e"), ("passing", "p", "q")]
    assert summary["dropped"] == {"no_margin": 1}
    assert summary["always_pass"] == summary["always_fail"] == 1
    names, _, _ = paired("reward_margin", min_reward_margin=0.0101)
    assert {task for task, *_ in names} == {"mixed"}


@pytest.mark.parametrize("rule", ["shortest_pass_longest_fail", "all_pairs", "reward_margin"])
def test_completions_that_could_not_be_judged_are_in_no_pair(rule):
    not_judged = sample("d", False, 50) | {"verdict": "invalid", "reward": None}
    samples = [sample("a", True, 30), sample("b", False, 20), not_judged] + [not_judged] * 3
    args = PreferencesArguments(num_generations=3, pair_rule=rule)
    pairs, summary = form_pairs(samples, TASKS[:2], args)
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [("a", "b")]
    assert summary["not_judged"] == 4 and summary["tasks_not_judged"] == 1 and summary["always_fail"] == 0
    assert summary["dropped"] == {"tasks_not_judged": 1}


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"pair_rule": "best"}, "pair_rule is 'best': write one of 'shortest_pass_longest_fail', 'all_pairs'"),
        ({"num_generations": 1}, "num_generations is 1: a pair needs 2 or more"),
        ({"temperature": 0}, "temperature is 0"),
        ({"top_p": 0}, "top_p is 0"),
        ({"length_penalty": -1}, "length_penalty is -1"),
        ({"max_pairs_per_task": 0}, "max_pairs_per_task is 0: write 1 or more"),
        ({"adapter_path": "x"}, "unknown field 'adapter_path': did you mean 'adapter_name_or_path'?"),
    ],
)
def test_bad_fields_are_refused(tmp_path, fields, message):
    config = tmp_path / "recipe.yaml"
    config.write_text(yaml.safe_dump(fields))
    with pytest.raises(SystemExit) as error:
        parse_settings(PreferencesArguments, ModelConfig, argv=["--config", str(config)])
    assert message in str(error.value)


def task(n, prompt, result):
    return {
        "task_id": f"one/{n}",
        "prompt": prompt,
        "canonical_solution": "done",
        "test": f"def check(candidate):\n    assert candidate() == {result}\n",
        "entry_point": "one",
    }


def recipe(folder, tiny_folder, result=1):
    """Tasks that a random policy passes now and then: whatever it writes is a comment, unless it ends the line."""
    tasks, config = folder / "tasks.jsonl", folder / "preferences.yaml"
    rows = [task(n, f"def one():\n    return 1  # {n} ", result) for n in range(6)]
    tasks.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {"model_name_or_path": str(tiny_folder), "dtype": "float32", "dataset_name": str(tasks), "seed": 1}
    fields |= {"num_generations": 4, "per_device_eval_batch_size": 4, "max_completion_length": 60}
    config.write_text(yaml.safe_dump(fields))
    return config


def main(monkeypatch, config, output_dir):
    monkeypatch.setattr(sys, "argv", ["preferences.py", "--config", str(config), "--output_dir", str(output_dir)])
    preferences.main()


def test_killed_run_continues_as_if_it_had_not_been(tmp_path, tiny_folder, tiny_tokenizer, monkeypatch, capsys):
    config, whole, killed = recipe(tmp_path, tiny_folder), tmp_path / "whole", tmp_path / "killed"
    command = [sys.executable, "recipes/preferences.py", "--config", str(config), "--output_dir", str(killed)]
    samples = killed / "samples.jsonl"
    main(monkeypatch, config, whole)
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        while not (samples.is_file() and samples.stat().st_size):
            assert run.poll() is None, "the run ended before it could be killed"
            time.sleep(0.005)
        run.kill()
    kept = samples.read_bytes()
    expected = (whole / "samples.jsonl").read_bytes()
    assert 0 < len(kept) < len(expected) and expected.startswith(kept) and not (killed / "pairs.jsonl").exists()
    samples.write_bytes(expected[: len(kept) + 100])  # and half a line, as if it had died while writing

    main(monkeypatch, config, killed)
    for name in ("samples.jsonl", "pairs.jsonl", "tasks.jsonl", "summary.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    rows = [json.loads(line) for line in expected.splitlines()]
    assert [row["task_id"] for row in rows] == [f"one/{n}" for n in range(6) for _ in range(4)]
    assert len({row["completion"] for row in rows}) > 20, "each chunk has a seed of its own"

    rates = {f"one/{n}": sum(row["passed"] for row in rows[4 * n : 4 * n + 4]) / 4 for n in range(6)}
    tasks = load_tasks(str(whole / "tasks.jsonl"))
    assert dict(zip(tasks["task_id"], tasks["pass_rate"], strict=True)) == rates

    pairs = [json.loads(line) for line in (whole / "pairs.jsonl").read_text().splitlines()]
    summary = json.loads((whole / "summary.json").read_text())
    assert len(pairs) == summary["pairs"] == 6 - sum(summary["dropped"].values()) > 0
    assert load_from_disk(str(whole / "dataset")).to_list() == pairs
    for pair in pairs:
        assert pair["prompt"] == f"def one():\n    return 1  # {pair['task_id'][-1]} ", "byte for byte"
        for side in ("chosen", "rejected"):
            ids = pair[f"{side}_ids"]
            ended = ids[-1] == tiny_tokenizer.eos_token_id
            assert ended or len(ids) == 60, "EOS, unless it was cut off"
            assert tiny_tokenizer.decode(ids[: len(ids) - ended]) == pair[side]

    (killed / "pairs.jsonl").unlink()
    samples.write_bytes(b"".join([*expected.splitlines(keepends=True)[4:8], expected]))  # a chunk of other tasks
    with pytest.raises(SystemExit, match="samples.jsonl holds samples of other tasks"):
        main(monkeypatch, config, killed)

    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    capsys.readouterr()
    main(monkeypatch, config, whole)
    assert "this run has finished" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in whole.rglob("*")}


def test_no_pair_is_an_error_that_says_why(tmp_path, tiny_folder, monkeypatch):
    config = recipe(tmp_path, tiny_folder, result=2)
    with pytest.raises(SystemExit, match="of 6 tasks the policy always passes 0 and always fails 6"):
        main(monkeypatch, config, tmp_path / "run")
    assert not (tmp_path / "run" / "pairs.jsonl").exists()
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["dropped"] == {"always_fail": 6}
