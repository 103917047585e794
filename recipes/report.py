"""
Report: the evaluated runs as one self-contained page.

    python recipes/report.py results/

Reads `results/ROW/` as `evaluate.py` writes it, one directory per run: `metrics.json` and `per_task.jsonl` of a greedy
evaluation, and, where they exist, `training.jsonl` and `sampled/`, an evaluation with several samples per task. Writes
`results/report.html` and its figures as `results/pictures/*.png`, light and dark. The page has no script and fetches
nothing. Completions are untrusted text: the template escapes everything, control and direction characters are made
visible, and the page's content security policy forbids scripts.

Not covered: the texts of the sampled completions, which stay in `sampled/per_task.jsonl`.
"""

import base64
import difflib
import json
import re
import sys
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from statistics import mean

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from recipes.common.intervals import mcnemar_p
from recipes.common.pictures import draw_plane, draw_training
from recipes.common.run_directory import write_whole
from recipes.common.samples import visible
from rewards import load_tasks

# The published table: tasks passed of the same 33, and mean tokens. Its base is another, larger one.
PUBLISHED_BASE = "DeepSeek-Coder-1.3B"
PUBLISHED = {
    "base": (5, 177.3),
    "sft": (12, 136.3),
    "reinforce_alpha0.01": (16, 107.5),
    "reinforce_alpha0.03": (14, 136.2),
    "ppo_alpha0.01_bs4": (15, 89.6),
    "ppo_alpha0.03_bs4": (14, 66.3),
    "ppo_alpha0.01_bs8": (13, 80.3),
    "ppo_alpha0.03_bs8": (15, 92.9),
    "dpo": (15, 125.8),
}
OUTCOMES = {  # of a completion: its mark in the grid and its meaning
    "passed": ("✓", "passed"),
    "truncated": ("◐", "passes only when cut where the function ends"),
    "failed": ("✗", "a test failed"),
    "error": ("!", "error: does not load, raises, or returns what tests cannot compare"),
    "timeout": ("T", "timeout"),
    "out_of_memory": ("M", "out of memory"),
    "crashed": ("C", "its process died"),
}


@dataclass
class Run:
    """
    An evaluated policy, one row of the table.

    Args:
        name (`str`):
            The folder's name.
        metrics (`dict`):
            Its `metrics.json`.
        samples (`dict[str, dict]`):
            Its graded completions by task id.
        sampled (`dict`, *optional*):
            `metrics.json` of an evaluation with several samples per task.
        training (`list[dict]`):
            The log of its training.
    """

    name: str
    metrics: dict
    samples: dict[str, dict]
    sampled: dict | None = None
    training: list[dict] = field(default_factory=list)

    @property
    def recipe(self) -> str:
        """The run that this one repeats with another seed, `"sft"` of `"sft_seed43"`; else its own name."""
        return re.sub(r"_seed\d+$", "", self.name)

    @property
    def passed(self) -> int:
        """Number of tasks passed, strictly."""
        return sum(sample["passed"] for sample in self.samples.values())


def read_runs(results: Path) -> list[Run]:
    """
    Read a results directory's runs: in the order of the published table, then others, each before its other seeds.

    Args:
        results (`Path`):
            The directory.

    Returns:
        `list[Run]`

    Raises:
        SystemExit: There is no run, a file is missing or not what `evaluate.py` writes, or a run is not greedy.
    """
    runs = []
    for path in sorted(results.glob("*/metrics.json")):
        folder = path.parent
        metrics, samples = _read_json(path), _read_lines(folder / "per_task.jsonl")
        is_greedy = metrics["settings"]["temperature"] == 0
        if not is_greedy or len({sample["task_id"] for sample in samples}) != len(samples):
            raise SystemExit(f"{folder} holds samples: move them to {folder}/sampled, a greedy run belongs here")
        sampled, training = folder / "sampled" / "metrics.json", folder / "training.jsonl"
        runs.append(
            Run(
                folder.name,
                metrics,
                {sample["task_id"]: sample for sample in samples},
                _read_json(sampled) if sampled.is_file() else None,
                _read_lines(training) if training.is_file() else [],
            )
        )
    if not runs:
        raise SystemExit(f"{results} holds no evaluated run (no ROW/metrics.json): write them with recipes/evaluate.py")
    known = list(PUBLISHED)

    def place(run):
        return known.index(run.recipe) if run.recipe in known else len(known), run.name

    return sorted(runs, key=place)


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path} cannot be read ({error}): write it with recipes/evaluate.py") from None


def _read_lines(path: Path) -> list[dict]:
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path} cannot be read ({error}): write it with recipes/evaluate.py") from None


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


def unified_diff(old: str, new: str) -> list[tuple[str, str]]:
    """
    Return what changed from one completion to another.

    Args:
        old (`str`):
            The first completion.
        new (`str`):
            The second completion.

    Returns:
        `list[tuple[str, str]]`: Kind and text of each line of a unified diff without its two header lines. Kinds are
        `"add"`, `"del"`, `"hunk"` or `"same"`. Empty if the texts are equal.
    """
    kinds = {"+": "add", "-": "del", "@": "hunk"}
    lines = list(difflib.unified_diff(old.split("\n"), new.split("\n"), lineterm=""))[2:]
    return [(kinds.get(line[:1], "same"), line) for line in lines]


def read_prompts(runs: list[Run]) -> dict[str, str]:
    """
    Return the prompts that the completions continue.

    Args:
        runs (`list[Run]`):
            The runs.

    Returns:
        `dict[str, str]`: Prompts by task id, without those of task files that no longer exist.
    """
    prompts = {}
    for source in {run.metrics["settings"]["dataset_name"] for run in runs}:
        try:
            tasks = load_tasks(source, "all")
        except (ValueError, OSError) as error:
            print(f"{source}: no prompts in the report ({error})", file=sys.stderr)
            continue
        prompts |= dict(zip(tasks["task_id"], tasks["prompt"], strict=True))
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


def render_page(runs: list[Run], pictures: dict[str, tuple[str, str]]) -> str:
    """
    Render the page.

    Args:
        runs (`list[Run]`):
            The runs.
        pictures (`dict[str, tuple[str, str]]`):
            As [`draw_pictures`] returns them.

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
    task_ids = sorted({task for run in runs for task in run.samples}, key=_by_number)
    outcomes = {run.name: {task: outcome(sample) for task, sample in run.samples.items()} for run in runs}
    return environment.get_template("report.html").render(
        runs=runs,
        task_ids=task_ids,
        prompts=read_prompts(runs),
        outcomes=outcomes,
        seen_outcomes={kind: OUTCOMES[kind] for kind in OUTCOMES if any(kind in o.values() for o in outcomes.values())},
        OUTCOMES=OUTCOMES,
        sft=next((run for run in runs if run.name == "sft"), None),
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
        unified_diff=unified_diff,
        p_value=lambda p: "1" if p == 1 else f"{p:.2g}" if p >= 0.001 else "<0.001",
    )


def _sampling(settings: dict) -> str:
    top_p = f", top_p {settings['top_p']}" if settings["top_p"] < 1 else ""
    return f"{settings['num_generations']} samples per task at temperature {settings['temperature']}{top_p}"


def _by_number(task_id: str) -> tuple[str, int]:
    name, number = re.fullmatch(r"(.*?)(\d*)", task_id, re.DOTALL).groups()
    return name, int(number or 0)


def main(argv: list[str]) -> None:
    if len(argv) != 1 or argv[0].startswith("-"):
        raise SystemExit("usage: python recipes/report.py RESULTS_FOLDER")
    results = Path(argv[0])
    runs = read_runs(results)
    pictures = draw_pictures(runs, results / "pictures")
    write_whole(results / "report.html", render_page(runs, pictures))
    print(f"{results / 'report.html'}: {len(runs)} runs")


if __name__ == "__main__":
    main(sys.argv[1:])
