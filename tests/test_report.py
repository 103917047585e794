"""The report: its statistics to the digit, and a page that stays whole and inert whatever a completion says."""

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from recipes import evaluate, report
from recipes.common.intervals import bootstrap_interval, mcnemar_p, paired_gain
from recipes.common.pictures import _spread
from recipes.common.provenance import machine
from recipes.common.tables import evaluation_names, markdown, results_table
from recipes.evaluate import summarize

ROOT = Path(__file__).parent.parent

HOSTILE = "    return 1</code></pre></details><script>alert(1)</script><img src=x onerror=alert(2)>&amp;\"'{{ 7*7 }}"
HOSTILE += "\x1b[31m\u202e\ud800\n"


@pytest.mark.parametrize(
    "only_first, only_second, p",
    [(0, 0, 1), (3, 3, 1), (0, 1, 1), (0, 5, 1 / 16), (6, 0, 1 / 32), (1, 5, 7 / 32), (2, 10, 79 / 2048)],
)
def test_mcnemar_is_exact(only_first, only_second, p):
    assert mcnemar_p(only_first, only_second) == p


def test_bootstrap_is_right_and_the_same_each_time():
    shares = [i / 10 for i in (0, 1, 3, 7, 10, 10, 4)]
    assert bootstrap_interval(shares) == bootstrap_interval(shares)
    # The sum of 33 draws is binomial: P[X <= 9] = 0.011, P[X <= 10] = 0.027; P[X <= 21] = 0.973, P[X <= 22] = 0.989
    assert bootstrap_interval([1.0] * 16 + [0.0] * 17) == pytest.approx([10 / 33, 22 / 33])
    assert bootstrap_interval([0.5] * 4) == [0.5, 0.5]


def test_a_gain_is_paired_by_task_and_resamples_seeds():
    noisy = [0.0, 1.0] * 50
    gain, interval = paired_gain(noisy, [[value + 0.25 for value in noisy]])
    assert (gain, interval) == (0.25, [0.25, 0.25]), "what tasks have in common cancels out"
    gain, interval = paired_gain([0.0] * 4, [[0.0] * 4, [1.0] * 4])
    assert (gain, interval) == (0.5, [0.0, 1.0]), "of two resamples of two runs, a quarter each is one run alone"
    # As of a bootstrap of the differences, of which 17 of 33 are one
    gain, interval = paired_gain([1.0] * 16 + [0.0] * 17, [[1.0] * 33])
    assert gain == pytest.approx(17 / 33) and interval == pytest.approx([11 / 33, 23 / 33])


def write_run(folder, completions, passed, **fields):
    """A row as `evaluate.py` writes it, of tasks t/1, t/2 ..."""
    samples = [
        {
            "task_id": f"t/{i}",
            "completion": text,
            "completion_tokens": 10 * i,
            "verdict": "passed" if ok else "failed",
            "passed": ok,
            "passed_truncated": True,
        }
        | fields
        for i, (text, ok) in enumerate(zip(completions, passed, strict=True), start=1)
    ]
    settings = {"dataset_name": "absent.jsonl", "num_generations": 1, "temperature": 0.0, "top_p": 1.0}
    metrics = summarize(samples, len(samples), 1) | {"settings": settings, "versions": {"torch": "2"}, "seconds": 1.0}
    metrics |= {"machine": machine(), "commands": ["python <b>.py"]}
    folder.mkdir(parents=True)
    (folder / "per_task.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    (folder / "metrics.json").write_text(json.dumps(metrics))


class Page(HTMLParser):
    """Tags, attributes and text of a page, as a browser without scripts would see them."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.text += data


def make_report(results):
    report.main([str(results)])
    html = (results / "report.html").read_text()
    return html, Page(html)


def test_hostile_completions_stay_text(tmp_path):
    write_run(tmp_path / "sft", ["    return 1\n", "    return 2\n"], [True, False])
    write_run(tmp_path / '<i>"$x^$', [HOSTILE, "    return 2\n"], [False, False], passed_plus=False)
    html, page = make_report(tmp_path)
    assert "script" not in page.tags
    assert page.tags.count("img") == 1 and page.tags.count("i") == 2  # the plane, and a bar in each row
    images = [value for name, value in page.attributes if name in ("src", "srcset")]
    assert len(images) == 2 and all(value.startswith("data:image/png;base64,") for value in images)
    assert all(value.startswith("#") for name, value in page.attributes if name == "href")
    assert not any(name.startswith("on") for name, _ in page.attributes)
    shown = report.visible(HOSTILE)
    assert shown.endswith("{{ 7*7 }}\\x1b[31m\\u202e\\ud800\n")
    assert page.text.count(shown) == 1
    assert "default-src 'none'" in html and '<i>"$x^$' in page.text


def test_answers_of_any_two_rows_are_shown_side_by_side(tmp_path):
    task = {"task_id": "t/1", "prompt": [{"role": "user", "content": "Write f."}], "test": "def check(candidate): pass"}
    (tmp_path / "tasks.jsonl").write_text(json.dumps(task | {"entry_point": "f", "canonical_solution": ""}) + "\n")
    write_run(tmp_path / "base", ["The reply."], [False])
    for row, answer in (("sft", "Shorter."), ("sft_seed43", "Left out."), ("base", "Long."), ("dpo", "Short.")):
        write_run(tmp_path / "chat" / row / "mbpp", [answer], [True])
        write_run(tmp_path / "chat" / row / "sampled", [answer], [True])
        path = tmp_path / "chat" / row / "sampled" / "metrics.json"
        path.write_text(path.read_text().replace('"temperature": 0.0', '"temperature": 0.8'))
    path = tmp_path / "chat" / "base" / "mbpp" / "metrics.json"
    metrics = json.loads(path.read_text()) | {"prompt_format": "chat"}
    path.write_text(json.dumps(metrics))
    for of_task in (tmp_path / "base" / "metrics.json", path):
        of_task.write_text(of_task.read_text().replace("absent.jsonl", str(tmp_path / "tasks.jsonl")))
    html, page = make_report(tmp_path)
    assert '<pre class="wrap before">Write f.</pre>\n<div class="chosen">\n<div id="answer-1-1">' in html
    assert all(page.text.count(answer) == 1 for answer in ("The reply.", "Long.", "Short.", "Shorter."))
    assert "Left out." not in page.text and "chat: sampled" not in page.text
    options = re.findall(r"<option(| selected)>(\w+)</option>", html)
    assert options[2:5] == [(" selected", "base"), ("", "dpo"), ("", "sft")]
    assert options[5:] == [("", "base"), (" selected", "dpo"), ("", "sft")]
    assert html.count(" option:nth-child(3):checked) .chosen > :nth-child(3) {") == 2
    ids = {value for name, value in page.attributes if name == "id"}
    assert {value[1:] for name, value in page.attributes if name == "href"} == {"run-1", "answer-1-1", "answers"} <= ids
    assert "In its own chat format, the untouched model passes 1 of these tasks in\n10.0 tokens" in page.text


def test_optional_files_may_be_missing(tmp_path):
    write_run(tmp_path / "sft", ["a", "b", "c"], [True, False, True])
    write_run(tmp_path / "odd", ["a", "b", "d"], [True, True, False])
    _, page = make_report(tmp_path)
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == [
        "length_accuracy_dark.png",
        "length_accuracy_light.png",
    ]
    for text in ("sampled", "plus", "Training", "seeds"):
        assert text not in page.text
    assert "12/33" in page.text and "DeepSeek-Coder-1.3B" in page.text
    assert "1 : 1" in page.text

    # And with all of them there
    write_run(tmp_path / "sft_seed43", ["a", "b", "e"], [True, True, True], passed_plus=True)
    sampled = json.loads((tmp_path / "sft" / "metrics.json").read_text())
    sampled |= {"pass_at_1": 0.625, "settings": sampled["settings"] | {"num_generations": 10, "temperature": 0.2}}
    (tmp_path / "sft" / "sampled").mkdir()
    (tmp_path / "sft" / "sampled" / "metrics.json").write_text(json.dumps(sampled))
    log = [{"step": i, "reward": 0.1 * i, "completion_tokens": 50 - i} for i in range(1, 5)]
    log[2] |= {"eval_reward": 0.5}
    (tmp_path / "sft" / "training.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
    (tmp_path / "odd" / "training.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 1, "train_runtime": 3.0}\n')
    write_run(tmp_path / "chat" / "base" / "mbpp", ["a", "b"], [True, False])
    write_run(tmp_path / "chat" / "dpo" / "mbpp", ["a", "b"], [True, True])
    _, page = make_report(tmp_path)
    assert "chat: gains over the untouched model" in page.text and "+50.0 [+0.0, +100.0]" in page.text
    assert "62.5" in page.text and "10 samples per task at temperature 0.2" in page.text
    assert "sft with 2 seeds: 2, 3 passed" in page.text.replace("\n", " ")
    assert "Its training took 3 s from its last start." in page.text
    assert "dots a greedy evaluation during training" in page.text
    assert {"training_sft_dark.png", "training_odd_light.png"} <= {p.name for p in (tmp_path / "pictures").iterdir()}


def test_runs_are_in_the_published_order_and_compared_in_pairs(tmp_path):
    for name, passed in [("zzz", [1, 1, 1]), ("dpo", [1, 1, 0]), ("sft_seed43", [0, 0, 0]), ("sft", [0, 0, 1])]:
        write_run(tmp_path / name, ["a", "b", "c"], [bool(ok) for ok in passed])
    runs = report.read_runs(tmp_path)
    assert [run.name for run in runs] == ["sft", "sft_seed43", "dpo", "zzz"]
    pairs = report.compare_pairs(runs)
    assert len(pairs) == 6
    assert pairs["sft", "dpo"] == {"only_first": 1, "only_second": 2, "p": 1.0}
    assert pairs["sft_seed43", "zzz"] == {"only_first": 0, "only_second": 3, "p": 0.25}


def test_completions_that_could_not_be_judged_are_shown_and_counted(tmp_path, capsys):
    write_run(tmp_path / "sft", ["a", "b"], [False, False], verdict="invalid", passed_truncated=False)
    _, page = make_report(tmp_path)
    assert "could not be judged" in page.text
    print(results_table([str(tmp_path / "sft")]))
    assert "sft: 2 of 2 completions could not be judged and count as failed" in capsys.readouterr().out


def test_no_gain_is_given_over_an_evaluation_of_an_edited_task_file(tmp_path, capsys):
    for name, content in (("base", "a"), ("other", "a"), ("edited", "b")):
        write_run(tmp_path / name, ["a", "b"], [True, name != "base"])
        path = tmp_path / name / "metrics.json"
        metrics = json.loads(path.read_text())
        metrics["settings"]["dataset_sha256"] = content
        path.write_text(json.dumps(metrics))
    print(results_table([str(tmp_path / name) for name in ("base", "other", "edited")]))
    *_, other, edited, _, note = capsys.readouterr().out.splitlines()
    assert "+50.0 [" in other and "[+" not in edited and note.startswith("edited has no gain: its task file has")


def test_a_table_cuts_no_cell_and_reads_no_markup():
    wide = "x" * 300
    assert markdown([{"row": "a[b]c[/b]", "gain": wide}]).splitlines()[-1] == f"| a[b]c[/b] | {wide} |"


def test_compared_rows_are_drawn(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "base", ["a", "b"], [True, False])
    write_run(tmp_path / "reinforce", ["a", "b"], [True, True])
    picture = tmp_path / "new" / "gain.png"
    line = ["--compare", str(tmp_path / "base"), str(tmp_path / "reinforce"), "--picture", str(picture)]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *line])
    evaluate.main()
    assert "+50.0 [+0.0, +100.0]" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "results, names",
    [
        (["a/base"], ["base"]),
        (["a/base", "a/dpo"], ["base", "dpo"]),
        (["a/base/mbpp", "a/dpo/mbpp"], ["base", "dpo"]),
        (["a/base", "b/dpo", "b/base"], ["a/base", "b/dpo", "b/base"]),
        (["a/base", "a/base"], ["a/base", "a/base"]),
    ],
)
def test_evaluations_are_named_by_what_differs(results, names):
    assert evaluation_names(results) == names


def test_names_in_the_picture_do_not_overlap():
    heights = _spread([0.4, 0.0, 0.4, 0.42, 0.4], 0.05)
    apart = sorted(heights)
    assert all(b - a > 0.049 for a, b in zip(apart, apart[1:], strict=False))
    assert heights[1] == 0.0 and max(heights) == heights[3]


def test_bad_results_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="usage: python recipes/report.py RESULTS_FOLDER"):
        report.main([])
    with pytest.raises(SystemExit, match=r"holds no evaluated run \(no ROW/metrics.json\)"):
        report.main([str(tmp_path)])
    write_run(tmp_path / "sft", ["a", "b"], [True, True])
    lines = (tmp_path / "sft" / "per_task.jsonl").read_text()
    (tmp_path / "sft" / "per_task.jsonl").write_text(lines + lines)
    with pytest.raises(SystemExit, match="holds samples: move them to .*sft/sampled"):
        report.read_runs(tmp_path)
    metrics = json.loads((tmp_path / "sft" / "metrics.json").read_text())
    warm = metrics | {"settings": metrics["settings"] | {"temperature": 0.2}}
    (tmp_path / "sft" / "metrics.json").write_text(json.dumps(warm))
    (tmp_path / "sft" / "per_task.jsonl").write_text(lines)
    with pytest.raises(SystemExit, match="holds samples: move them to .*sft/sampled"):
        report.read_runs(tmp_path)
    (tmp_path / "sft" / "metrics.json").write_text(json.dumps(metrics))
    (tmp_path / "sft" / "per_task.jsonl").write_text(lines[:-20])
    with pytest.raises(SystemExit, match="per_task.jsonl cannot be read .*: write it with recipes/evaluate.py"):
        report.read_runs(tmp_path)
