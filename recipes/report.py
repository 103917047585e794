"""
Report: the evaluated runs as one self-contained page.

    python recipes/report.py results/

Reads `results/ROW/` as `evaluate.py` writes it, one directory per run: `metrics.json` and `per_task.jsonl` of a greedy
evaluation, and, where they exist, `training.jsonl` and `sampled/`, an evaluation with several samples per task. Of
`results/TABLE/ROW/EVALUATION/` it reads what `gains.py` prints, and the greedy answers of each recipe's first seed.
Writes `results/report.html` and its figures as `results/pictures/*.png`, light and dark. The page has no script and
fetches nothing: which two rows are shown side by side is chosen by its style sheet. Completions are untrusted text: the
template escapes everything, control and direction characters are made visible, and the page's content security policy
forbids scripts.

Not covered: the texts of sampled completions, which `compare.py` shows.
"""

import base64
import re
import sys
from itertools import combinations
from pathlib import Path
from statistics import mean

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from recipes.common.intervals import mcnemar_p
from recipes.common.pictures import draw_plane, draw_training
from recipes.common.run_directory import write_whole
from recipes.common.runs import PUBLISHED, PUBLISHED_BASE, Run, read_runs, recipe_name
from recipes.common.samples import read_samples
from recipes.common.tables import read_metrics
from recipes.gains import gains_rows
from rewards import load_tasks
from trainers.progress import visible

OUTCOMES = {  # of a completion: its mark in the grid and its meaning
    "passed": ("✓", "passed"),
    "truncated": ("◐", "passes only when cut where the function ends"),
    "failed": ("✗", "a test failed"),
    "error": ("!", "error: does not load, raises, or returns what tests cannot compare"),
    "timeout": ("T", "timeout"),
    "out_of_memory": ("M", "out of memory"),
    "crashed": ("C", "its process died"),
    "invalid": ("?", "could not be judged"),
}


def compare_pairs(runs: list[Run]) -> dict[tuple[str, str], dict]:
    """
    Compare every two runs on the tasks that both were evaluated on.

    Args:
        runs (`list[Run]`):
            The runs.

    Returns:
        `dict`: For each pair of names `only_first` and `only_second`, the numbers of tasks that only one of them
        passes, and `p` ([`mcnemar_p`](common/intervals.py)).
    """
    pairs = {}
    for first, second in combinations(runs, 2):
        both = first.samples.keys() & second.samples.keys()
        passed = [(first.samples[task]["passed"], second.samples[task]["passed"]) for task in both]
        only_first, only_second = passed.count((True, False)), passed.count((False, True))
        pairs[first.name, second.name] = {
            "only_first": only_first,
            "only_second": only_second,
            "p": mcnemar_p(only_first, only_second),
        }
    return pairs


def outcome(sample: dict) -> str:
    """
    Return what the grid shows of a completion.

    Args:
        sample (`dict`):
            A line of `per_task.jsonl`.

    Returns:
        `str`: A key of [`OUTCOMES`].
    """
    return "truncated" if sample["passed_truncated"] and not sample["passed"] else sample["verdict"]


def read_prompts(runs: list[Run]) -> dict[str, str]:
    """
    Return the prompts of the runs' tasks.

    Args:
        runs (`list[Run]`):
            The runs.

    Returns:
        `dict[str, str]`: Prompts by task id, of messages their texts; without those of task files that no longer
        exist.
    """
    prompts = {}
    for source in dict.fromkeys(run.metrics["settings"]["dataset_name"] for run in runs):
        try:
            tasks = load_tasks(source, "all")
        except (ValueError, OSError) as error:
            print(f"{source}: no prompts in the report ({error})", file=sys.stderr)
            continue
        for task_id, prompt in zip(tasks["task_id"], tasks["prompt"], strict=True):
            prompts[task_id] = prompt if isinstance(prompt, str) else "\n\n".join(one["content"] for one in prompt)
    return prompts


def repeated_seeds(runs: list[Run]) -> list[dict]:
    """
    Return how much a run's numbers vary from seed to seed.

    Args:
        runs (`list[Run]`):
            The runs, `sft_seed43` being a repetition of `sft`.

    Returns:
        `list[dict]`: Of each run with repetitions its `name`, the tasks `passed` and mean `tokens` of each seed.
    """
    groups = {}
    for run in runs:
        groups.setdefault(run.recipe, []).append(run)
    return [
        {
            "name": name,
            "passed": [run.passed for run in group],
            "mean_passed": mean(run.passed for run in group),
            "tokens": [run.metrics["mean_completion_tokens"] for run in group],
        }
        for name, group in groups.items()
        if len(group) > 1
    ]


def draw_pictures(runs: list[Run], folder: Path) -> dict[str, tuple[str, str]]:
    """
    Draw all figures, each light and dark.

    Args:
        runs (`list[Run]`):
            The runs.
        folder (`Path`):
            Directory for the PNG files.

    Returns:
        `dict[str, tuple[str, str]]`: Data URIs of the light and the dark figure, by run and for `"plane"`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {}
    for theme in ("light", "dark"):
        drawn = {"plane": draw_plane(runs, PUBLISHED, PUBLISHED_BASE, theme)} | draw_training(runs, theme)
        for name, png in drawn.items():
            stem = "length_accuracy" if name == "plane" else f"training_{name}"
            (folder / f"{stem}_{theme}.png").write_bytes(png)
            uri = "data:image/png;base64," + base64.b64encode(png).decode()
            pictures[name] = (*pictures.get(name, ()), uri)
    return pictures


def gains_folders(results: Path) -> list[Path]:
    """
    Return the subdirectories that hold a table of gains over the untouched model.

    Args:
        results (`Path`):
            The results directory.

    Returns:
        `list[Path]`: Those that hold `base/EVALUATION/`.
    """
    return sorted({path.parents[2] for path in results.glob("*/base/*/metrics.json")})


def read_greedy(folder: Path) -> dict[str, list[Run]]:
    """
    Read the greedy evaluations of a table of gains.

    Args:
        folder (`Path`):
            One of [`gains_folders`].

    Returns:
        `dict[str, list[Run]]`: By evaluation its rows, `base` first, of each recipe the first seed.
    """
    rows = {}
    for path in sorted(folder.glob("*/*/metrics.json"), key=lambda path: (path.parts[-3] != "base", path)):
        name, metrics = path.parts[-3], read_metrics(path.parent)
        of_evaluation = rows.setdefault(path.parts[-2], {})
        if metrics["settings"]["temperature"] == 0 and recipe_name(name) not in of_evaluation:
            samples = {sample["task_id"]: sample for sample in read_samples(path.parent)}
            of_evaluation[recipe_name(name)] = Run(name, metrics, samples)
    return {evaluation: [*of_evaluation.values()] for evaluation, of_evaluation in rows.items() if of_evaluation}


def chat_baseline(runs: list[Run], answers: dict[str, list[Run]]) -> dict | None:
    """
    Return what the untouched model does in its chat format on the runs' tasks.

    Args:
        runs (`list[Run]`):
            The runs.
        answers (`dict[str, list[Run]]`):
            Sets of greedy evaluations.

    Returns:
        `dict`, *optional*: `passed`, the number of tasks, and `tokens`, their mean, of the first run `base` in chat
        format with all the tasks, from the same source. `None` if there is none.
    """
    task_ids = {task for run in runs for task in run.samples}
    sources = {run.metrics["settings"]["dataset_name"] for run in runs}
    for base in (run for rows in answers.values() for run in rows if run.name == "base"):
        is_of_source = {base.metrics["settings"]["dataset_name"]} == sources
        if is_of_source and base.metrics.get("prompt_format") == "chat" and task_ids <= base.samples.keys():
            own = [base.samples[task] for task in task_ids]
            passed = sum(sample["passed"] for sample in own)
            return {"passed": passed, "tokens": mean(sample["completion_tokens"] for sample in own)}
    return None


def render_page(
    runs: list[Run],
    pictures: dict[str, tuple[str, str]],
    gains: dict[str, list[dict[str, str]]],
    greedy: dict[str, list[Run]],
) -> str:
    """
    Render the page.

    Args:
        runs (`list[Run]`):
            The runs.
        pictures (`dict[str, tuple[str, str]]`):
            As [`draw_pictures`] returns them.
        gains (`dict[str, list[dict[str, str]]]`):
            The rows of each table of gains.
        greedy (`dict[str, list[Run]]`):
            Greedy evaluations of the tables of gains, by their title.

    Returns:
        `str`: HTML.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "common"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if type(value) is str else value,  # every text that is inserted
    )
    pairs = compare_pairs(runs)
    answers = {"The table": runs} | greedy
    seen = {outcome(sample) for rows in answers.values() for run in rows for sample in run.samples.values()}
    return environment.get_template("report.html").render(
        runs=runs,
        gains=gains,
        answers=answers,
        task_ids=_task_ids(runs),
        task_ids_of=_task_ids,
        prompts={title: read_prompts(rows) for title, rows in answers.items()},
        chat_baseline=chat_baseline(runs, greedy),
        outcome=outcome,
        OUTCOMES=OUTCOMES,
        seen_outcomes={kind: OUTCOMES[kind] for kind in OUTCOMES if kind in seen},
        pairs=pairs,
        num_significant=sum(pair["p"] < 0.05 for pair in pairs.values()),
        seeds=repeated_seeds(runs),
        published=PUBLISHED,
        published_base=PUBLISHED_BASE,
        pictures=pictures,
        has_plus=any("plus_pass_at_1" in run.metrics for run in runs),
        has_sampled=any(run.sampled for run in runs),
        has_eval=any("eval_reward" in entry for run in runs for entry in run.training),
        sampling="; ".join(dict.fromkeys(_sampling(run.sampled["settings"]) for run in runs if run.sampled)),
        p_value=lambda p: "1" if p == 1 else f"{p:.2g}" if p >= 0.001 else "<0.001",
    )


def _sampling(settings: dict) -> str:
    top_p = f", top_p {settings['top_p']}" if settings["top_p"] < 1 else ""
    return f"{settings['num_generations']} samples per task at temperature {settings['temperature']}{top_p}"


def _task_ids(runs: list[Run]) -> list[str]:
    return sorted({task for run in runs for task in run.samples}, key=_by_number)


def _by_number(task_id: str) -> tuple[str, int]:
    name, number = re.fullmatch(r"(.*?)(\d*)", task_id, re.DOTALL).groups()
    return name, int(number or 0)


def main(argv: list[str]) -> None:
    if len(argv) != 1 or argv[0].startswith("-"):
        raise SystemExit("usage: python recipes/report.py RESULTS_FOLDER")
    results = Path(argv[0])
    runs = read_runs(results)
    pictures = draw_pictures(runs, results / "pictures")
    folders = gains_folders(results)
    gains = {folder.name: gains_rows(folder) for folder in folders}
    greedy = {f"{folder.name}: {name}": rows for folder in folders for name, rows in read_greedy(folder).items()}
    write_whole(results / "report.html", render_page(runs, pictures, gains, greedy))
    print(f"{results / 'report.html'}: {len(runs)} runs")


if __name__ == "__main__":
    main(sys.argv[1:])
