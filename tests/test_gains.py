"""The table of gains over the untouched model."""

import json
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from recipes.evaluate import summarize
from recipes.gains import gains_rows

ROOT = Path(__file__).parent.parent


def write(folder, passes, tokens, **extra):
    samples = [
        {"task_id": f"t/{i}", "completion_tokens": tokens, "verdict": "passed" if one else "failed"}
        | {"passed": one, "passed_truncated": one}
        | extra
        for i, one in enumerate(passes)
    ]
    folder.mkdir(parents=True)
    (folder / "per_task.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    (folder / "metrics.json").write_text(json.dumps(summarize(samples, len(passes), 1)))


def test_seeds_are_pooled_and_gains_are_paired(tmp_path):
    write(tmp_path / "base" / "mbpp", [True, False, False, False], 100, passed_plus=False)
    for seed in ("", "_seed43"):
        write(tmp_path / f"reinforce{seed}" / "mbpp", [True, True, True, True], 60, passed_plus=False)
    base, reinforce = gains_rows(tmp_path)
    assert [*base] == [*reinforce] == ["row", "seeds", "mbpp", "mbpp plus", "mbpp tokens"]
    assert [*base.values()] == ["base", "1", "25.0%", "0.0%", "100"]
    assert [*reinforce.values()] == ["reinforce", "2", "+75.0 [+25.0, +100.0]", "+0.0 [+0.0, +0.0]", "60 (-40%)"]


def test_a_measure_that_a_row_lacks_is_left_out(tmp_path):
    write(tmp_path / "base" / "mbpp", [True, False], 100, passed_plus=False)
    write(tmp_path / "sft" / "mbpp", [True, True], 60)
    base, sft = gains_rows(tmp_path)
    assert "mbpp plus" in base and "mbpp plus" not in sft and sft["mbpp"].startswith("+50.0")


def test_rows_are_compared_with_another_row(tmp_path):
    passes = {"base": [True, False], "sft": [True, True], "sft_seed43": [True, False], "dpo_seed43": [False, False]}
    for row, of_row in passes.items():
        write(tmp_path / row / "mbpp", of_row, 100)
    assert [(row["row"], row["seeds"], row["mbpp"].split()[0]) for row in gains_rows(tmp_path, "sft")] == [
        ("sft", "1", "100.0%"),
        ("base", "1", "-50.0"),
        ("dpo", "1", "-100.0"),
        ("sft, other seeds", "1", "-50.0"),
    ]


def test_a_row_that_is_still_being_evaluated_is_left_out(tmp_path, capsys):
    for folder in ("base/humaneval", "base/mbpp", "sft/humaneval", "sft/mbpp", "sft_seed43/mbpp"):
        write(tmp_path / folder, [True, False], 100)
    assert [(row["row"], row["seeds"]) for row in gains_rows(tmp_path)] == [("base", "1"), ("sft", "1")]
    assert "sft_seed43 is left out: it has no humaneval\n" in capsys.readouterr().err


def test_rows_of_other_tasks_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="holds no row 'base' .ROW/EVALUATION/metrics.json.; its rows are: none"):
        gains_rows(tmp_path)
    write(tmp_path / "base" / "mbpp", [True, False], 100)
    write(tmp_path / "sft" / "mbpp", [True], 100)
    with pytest.raises(SystemExit, match="sft/mbpp and base/mbpp are of different tasks"):
        gains_rows(tmp_path)


def test_every_row_of_the_makefile_has_a_recipe(tmp_path):
    """One check, one sampling, a training a row and seed, three evaluations of each and of the untouched model."""
    file = ROOT / "recipes" / "qwen2.5-coder-0.5b" / "mbpp" / "Makefile"
    line = ["make", "-n", "-f", str(file), "-B", f"RESULTS={tmp_path}"]
    run = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    scripts = Counter(re.findall(r"recipes/(\w+)\.py", run.stdout))
    rows = {"sft": 6, "dpo": 6, "reinforce": 12, "ppo_clip": 6}
    assert scripts == {"check_tasks": 1, "preferences": 1, **rows, "evaluate": 3 * (1 + sum(rows.values())), "gains": 1}
    configs = set(re.findall(r"--config (recipes/\S+)", run.stdout))
    assert configs == {str(path.relative_to(ROOT)) for path in file.parent.glob("*.yaml")}
    assert run.stdout.count("--length_penalty 0.03") == 9 and run.stdout.count("--seed 44") == 10
