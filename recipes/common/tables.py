"""The table of evaluated runs, in Markdown, for the terminal and for a model card."""

import json
from io import StringIO
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table


def read_metrics(folder: str) -> dict:
    """
    Read the numbers of a finished evaluation.

    Args:
        folder (`str`):
            A result directory.

    Returns:
        `dict`: Its `metrics.json`.

    Raises:
        SystemExit: The directory holds no finished evaluation.
    """
    path = Path(folder) / "metrics.json"
    if not path.is_file():
        raise SystemExit(f"{folder} holds no finished evaluation (no {path.name})")
    return json.loads(path.read_text())


def results_table(results: list[str]) -> str:
    """
    Return finished evaluations as one table.

    Args:
        results (`list[str]`):
            Result directories.

    Returns:
        `str`: The table, in Markdown.

    Raises:
        SystemExit: A directory holds no finished evaluation.
    """
    rows = []
    for folder in results:
        m = read_metrics(folder)
        low, high = m["pass_at_1_interval"]
        row = {
            "run": Path(folder).resolve().name,
            "format": m.get("prompt_format", "completion"),
            "passed": f"{m['num_passed']:g}/{m['num_tasks']}",
            "pass@1 [95%]": f"{m['pass_at_1']:.1%} [{low:.0%}, {high:.0%}]",
            "truncated": f"{m['truncated_pass_at_1'] * m['num_tasks']:g}/{m['num_tasks']}",
        }
        if "plus_pass_at_1" in m:
            row["plus"] = f"{m['plus_pass_at_1'] * m['num_tasks']:g}/{m['num_tasks']}"
        row |= {
            "mean tokens": f"{m['mean_completion_tokens']:.1f}",
            "median": f"{m['median_completion_tokens']:g}",
            "verdicts": ", ".join(f"{count} {verdict}" for verdict, count in m["verdicts"].items()),
        }
        rows.append(row)
    table = Table(box=box.MARKDOWN)
    titles = max(rows, key=len)
    for title in titles:
        table.add_column(title, justify="left" if title in ("run", "format") else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(row.get(title, "") for title in titles))
    text = StringIO()
    Console(file=text, width=160).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()).strip("\n")


def print_table(results: list[str]) -> None:
    """
    Print finished evaluations as one table, in Markdown.

    Args:
        results (`list[str]`):
            Result directories.
    """
    print(results_table(results))
