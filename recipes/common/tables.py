"""The table of evaluated runs, in Markdown, for the terminal and for a model card."""

import json
from io import StringIO
from pathlib import Path
from statistics import mean

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from recipes.common.intervals import paired_gain
from recipes.common.samples import samples_by_task

# Share of completions that may be impossible to judge without a note: a policy's answer can be so, too
MAX_INVALID = 0.01


def read_metrics(folder: str | Path) -> dict:
    """
    Read the numbers of a finished evaluation.

    Args:
        folder (`str` or `Path`):
            A result directory.

    Returns:
        `dict`: Its `metrics.json`.

    Raises:
        SystemExit: The directory holds no finished evaluation, or the file is no JSON.
    """
    path = Path(folder) / "metrics.json"
    if not path.is_file():
        raise SystemExit(f"{folder} holds no finished evaluation (no {path.name})")
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path} cannot be read ({error}): write it with recipes/evaluate.py") from None


def evaluation_names(results: list[str]) -> list[str]:
    """
    Name evaluations for a person.

    Args:
        results (`list[str]`):
            Result directories.

    Returns:
        `list[str]`: The last part of each path in which they differ: `["base", "dpo"]` of `base/mbpp` and `dpo/mbpp`.
        The last two parts where that is the same for several.
    """
    parts = [Path(folder).resolve().parts for folder in results]
    while len({*parts}) > 1 and len({path[-1] for path in parts}) == 1:
        parts = [path[:-1] for path in parts]
    names = [path[-1] for path in parts]
    return names if len({*names}) == len(names) else ["/".join(path[-2:]) for path in parts]


def task_means(folder: str) -> dict[str, dict[str, float]]:
    """
    Read the means of an evaluation's samples of each task.

    Args:
        folder (`str`):
            A result directory.

    Returns:
        `dict[str, dict[str, float]]`: By task id the means of `passed`, `completion_tokens` and, if it was graded,
        `passed_plus`.
    """
    names = ("passed", "completion_tokens", "passed_plus")
    return {
        task_id: {name: mean(sample[name] for sample in group) for name in names if name in group[0]}
        for task_id, group in samples_by_task(folder).items()
    }


def are_of_one_file(*metrics: dict) -> bool:
    """
    Return whether evaluations may be of the same tasks: ids stay where a test or a prompt is edited.

    Args:
        metrics (`dict`):
            Each evaluation's numbers.

    Returns:
        `bool`: `False` if their task files had different contents.
    """
    return len({m.get("settings", {}).get("dataset_sha256") for m in metrics} - {None}) < 2


def _gain(first: dict, own: dict, name: str) -> tuple[float, list[float]]:
    return paired_gain([first[task][name] for task in first], [[own[task][name] for task in first]])


def results_table(results: list[str]) -> str:
    """
    Return finished evaluations as one table.

    Args:
        results (`list[str]`):
            Result directories.

    Returns:
        `str`: The table, in Markdown. Rows over the same tasks as the first, from a file of the same content, have a
        gain over it: the difference of pass rates in points and of mean tokens, each with its paired 95% interval.
        Below it, rows without a gain for another content, and rows of which more than 1% could not be judged.

    Raises:
        SystemExit: A directory holds no finished evaluation.
    """
    rows, notes = [], []
    metrics = [read_metrics(folder) for folder in results]
    means = [task_means(folder) for folder in results]
    first = means[0]
    for name, folder, own, m in zip(evaluation_names(results), results, means, metrics, strict=True):
        low, high = m["pass_at_1_interval"]
        row = {
            "run": name,
            "format": m.get("prompt_format", "completion"),
            "passed": f"{m['num_passed']:g}/{m['num_tasks']}",
            "pass@1 [95%]": f"{m['pass_at_1']:.1%} [{low:.0%}, {high:.0%}]",
        }
        if row["format"] == "completion":
            row["truncated"] = f"{m['truncated_pass_at_1'] * m['num_tasks']:g}/{m['num_tasks']}"
        if "plus_pass_at_1" in m:
            row["plus"] = f"{m['plus_pass_at_1'] * m['num_tasks']:g}/{m['num_tasks']}"
        is_comparable = folder != results[0] and own.keys() == first.keys()
        if is_comparable and not are_of_one_file(m, metrics[0]):
            is_comparable = False
            notes.append(f"{name} has no gain: its task file has different content from the first row's")
        num_invalid, num_samples = m["verdicts"].get("invalid", 0), sum(m["verdicts"].values())
        if num_invalid > MAX_INVALID * num_samples:
            notes.append(
                f"{name}: {num_invalid} of {num_samples} completions could not be judged and count as failed. "
                "recipes/check_tasks.py finds the tasks"
            )
        if is_comparable:
            gain, (low, high) = _gain(first, own, "passed")
            row["gain in points [95%]"] = f"{100 * gain:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
        row["mean tokens"] = f"{m['mean_completion_tokens']:.1f}"
        if is_comparable:
            change, (low, high) = _gain(first, own, "completion_tokens")
            row["change [95%]"] = f"{change:+.0f} [{low:+.0f}, {high:+.0f}]"
        rows.append(row)
    return "\n\n".join([markdown(rows), *notes])


def markdown(rows: list[dict[str, str]]) -> str:
    """
    Format rows as a Markdown table.

    Args:
        rows (`list[dict[str, str]]`):
            Each row's cells by column.

    Returns:
        `str`: The table.
    """
    table = Table(box=box.MARKDOWN)
    titles = list(dict.fromkeys(title for row in sorted(rows, key=len, reverse=True) for title in row))
    for title in titles:
        table.add_column(title, justify="left" if title in ("run", "row", "format") else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(row.get(title, "")) for title in titles))
    text = StringIO()
    Console(file=text, width=10_000).print(table)  # no cell is cut
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()).strip("\n")
