"""
Print the gains over the untouched model as one table: rows are recipes, their seeds pooled; columns are evaluations.

    python recipes/gains.py results/mbpp

A results directory holds `ROW/EVALUATION/` as `evaluate.py` writes it, `ROW` being `base`, a recipe, or a recipe with
another seed, such as `reinforce_seed43`. Not covered: corrections for multiple comparisons.
"""

import sys
from pathlib import Path
from statistics import mean

from recipes.common.intervals import paired_gain
from recipes.common.runs import recipe_name
from recipes.common.tables import are_of_one_file, markdown, read_metrics, task_means


def gains_rows(results: Path) -> list[dict[str, str]]:
    """
    Return the table's rows.

    Args:
        results (`Path`):
            The results directory.

    Returns:
        `list[dict[str, str]]`: Cells by their column's title. The row `base` has each evaluation's pass rate and mean
        tokens. Every other row has the gain over it in points, by the evaluation's tasks and the row's seeds, with its
        paired 95% interval, and the mean tokens.

    Raises:
        SystemExit: There is no row `base`, or a row was evaluated on other tasks.
    """
    base = {path.parent.name: task_means(str(path.parent)) for path in sorted(results.glob("base/*/metrics.json"))}
    if not base:
        raise SystemExit(f"{results} holds no evaluation of the untouched model (no base/EVALUATION/metrics.json)")
    seeds: dict[str, list[Path]] = {}
    for row in sorted({path.parent.parent for path in results.glob("*/*/metrics.json")}):
        seeds.setdefault(recipe_name(row.name), []).append(row)
    rows = []
    for name, folders in sorted(seeds.items(), key=lambda item: (item[0] != "base", item[0])):
        cells = {"row": name, "seeds": str(len(folders))}
        for evaluation, untouched in base.items():
            paths = [row / evaluation for row in folders if (row / evaluation / "metrics.json").is_file()]
            runs = [task_means(str(path)) for path in paths]
            numbers = [read_metrics(str(path)) for path in (results / "base" / evaluation, *paths)]
            if any(run.keys() != untouched.keys() for run in runs) or not are_of_one_file(*numbers):
                raise SystemExit(f"{name}/{evaluation} and base/{evaluation} are of different tasks")
            cells |= _cells(evaluation, untouched, runs, is_base=name == "base")
        rows.append(cells)
    return rows


def _cells(evaluation: str, untouched: dict, runs: list[dict], is_base: bool) -> dict[str, str]:
    cells = {}
    measures = {"passed": evaluation, "passed_plus": f"{evaluation} plus"}
    for measure, title in measures.items():
        if not runs or any(measure not in next(iter(run.values())) for run in (untouched, *runs)):
            continue
        before = [untouched[task][measure] for task in untouched]
        if is_base:
            cells[title] = f"{mean(before):.1%}"
            continue
        gain, (low, high) = paired_gain(before, [[run[task][measure] for task in untouched] for run in runs])
        cells[title] = f"{100 * gain:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
    if runs:
        tokens = mean(means["completion_tokens"] for run in runs for means in run.values())
        of_base = mean(means["completion_tokens"] for means in untouched.values())
        cells[f"{evaluation} tokens"] = f"{tokens:.0f}" if is_base else f"{tokens:.0f} ({tokens / of_base - 1:+.0%})"
    return cells


def main(argv: list[str]) -> None:
    if len(argv) != 1 or argv[0].startswith("-"):
        raise SystemExit("usage: python recipes/gains.py RESULTS_FOLDER")
    print(markdown(gains_rows(Path(argv[0]))))


if __name__ == "__main__":
    main(sys.argv[1:])
