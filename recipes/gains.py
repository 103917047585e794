"""
Print the gains over the untouched model as one table: rows are recipes, their seeds pooled; columns are evaluations.

    python recipes/gains.py results/mbpp
    python recipes/gains.py results/mbpp --baseline sft_on_samples      # the gains over another row

A results directory holds `ROW/EVALUATION/` as `evaluate.py` writes it, `ROW` being `base`, a recipe, or a recipe with
another seed, such as `reinforce_seed43`. Not covered: corrections for multiple comparisons.
"""

import argparse
import sys
from pathlib import Path
from statistics import mean

from recipes.common.intervals import paired_gain
from recipes.common.runs import recipe_name
from recipes.common.tables import are_of_one_file, markdown, read_metrics, task_means


def gains_rows(results: Path, baseline: str = "base") -> list[dict[str, str]]:
    """
    Return the table's rows.

    Args:
        results (`Path`):
            The results directory.
        baseline (`str`, *optional*, defaults to `"base"`):
            The row, of one seed, that the others are compared with.

    Returns:
        `list[dict[str, str]]`: Cells by their column's title. The baseline's row, the first, has each evaluation's pass
        rate and mean tokens. Every other row has the gain over it in points, by the evaluation's tasks and the row's
        seeds, with its paired 95% interval, and the mean tokens. Left out, with a note on stderr: rows that lack an
        evaluation that the baseline has, such as one that is still being evaluated.

    Raises:
        SystemExit: There is no such row, or a row was evaluated on other tasks.
    """
    folders = {path.parent.parent for path in results.glob("*/*/metrics.json")}
    if results / baseline not in folders or Path(baseline).name != baseline:
        names = ", ".join(sorted(folder.name for folder in folders)) or "none"
        raise SystemExit(f"{results} holds no row {baseline!r} (ROW/EVALUATION/metrics.json); its rows are: {names}")
    evaluated = sorted(path.parent for path in (results / baseline).glob("*/metrics.json"))
    baseline_means = {folder.name: task_means(str(folder)) for folder in evaluated}
    seeds: dict[str, list[Path]] = {baseline: [results / baseline]}
    for row in sorted(folders - {results / baseline}):
        if missing := [name for name in baseline_means if not (row / name / "metrics.json").is_file()]:
            print(f"{row} is left out: it has no {', '.join(missing)}", file=sys.stderr)
            continue
        name = recipe_name(row.name)
        seeds.setdefault(f"{name}, other seeds" if name == recipe_name(baseline) else name, []).append(row)
    rows = []
    for name, folders in sorted(seeds.items(), key=lambda item: (item[0] != baseline, item[0] != "base", item[0])):
        cells = {"row": name, "seeds": str(len(folders))}
        for evaluation, before in baseline_means.items():
            paths = [row / evaluation for row in folders]
            runs = [task_means(str(path)) for path in paths]
            numbers = [read_metrics(path) for path in (results / baseline / evaluation, *paths)]
            if any(run.keys() != before.keys() for run in runs) or not are_of_one_file(*numbers):
                raise SystemExit(f"{name}/{evaluation} and {baseline}/{evaluation} are of different tasks")
            cells |= _cells(evaluation, before, runs, is_baseline=name == baseline)
        rows.append(cells)
    return rows


def _cells(evaluation: str, before: dict, runs: list[dict], is_baseline: bool) -> dict[str, str]:
    cells = {}
    measures = {"passed": evaluation, "passed_plus": f"{evaluation} plus"}
    for measure, title in measures.items():
        if any(measure not in next(iter(run.values())) for run in (before, *runs)):
            continue
        rates = [before[task][measure] for task in before]
        if is_baseline:
            cells[title] = f"{mean(rates):.1%}"
            continue
        gain, (low, high) = paired_gain(rates, [[run[task][measure] for task in before] for run in runs])
        cells[title] = f"{100 * gain:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
    tokens = mean(means["completion_tokens"] for run in runs for means in run.values())
    change = tokens / mean(means["completion_tokens"] for means in before.values()) - 1
    cells[f"{evaluation} tokens"] = f"{tokens:.0f}" if is_baseline else f"{tokens:.0f} ({change:+.0%})"
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="directory of ROW/EVALUATION/")
    parser.add_argument("--baseline", default="base", help="row that the others are compared with")
    args = parser.parse_args()
    print(markdown(gains_rows(args.results, args.baseline)))


if __name__ == "__main__":
    main()
