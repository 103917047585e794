"""
Compare two evaluations in the terminal: both answers to each task side by side, tasks on which they differ first.

    python recipes/compare.py results/sft results/reinforce
    python recipes/compare.py results/sft results/reinforce --task HumanEval/12

Reads `per_task.jsonl` as `evaluate.py` writes it. Of several completions of a task, the first is shown. Completions are
untrusted text: control and direction characters are made visible. Not covered: more than two evaluations, and
statistics, which `report.py` has.
"""

import argparse

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from recipes.common.samples import samples_by_task
from recipes.common.tables import evaluation_names, read_metrics
from trainers.progress import visible


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", help="result directory")
    parser.add_argument("second", help="result directory")
    parser.add_argument("--task", help="id of the one task to show, such as HumanEval/12")
    args = parser.parse_args()
    folders = [args.first, args.second]
    for folder in folders:
        read_metrics(folder)  # whether its evaluation has finished
    answers, names = [samples_by_task(folder) for folder in folders], evaluation_names(folders)
    shown = order_tasks(*answers)
    if not shown:
        raise SystemExit(f"{args.first} and {args.second} have no task in common")
    if args.task is not None:
        if args.task not in shown:
            raise SystemExit(f"--task: {args.task} is not in both evaluations, whose tasks are {', '.join(shown)}")
        shown = [args.task]
    console = Console()
    for task_id in shown:
        console.print(side_by_side(task_id, names, [answer[task_id] for answer in answers]))
    if len(shown) > 1:
        console.print(Text(summary(names, answers, shown)))


def order_tasks(first: dict[str, list[dict]], second: dict[str, list[dict]]) -> list[str]:
    """
    Order the tasks of two evaluations.

    Args:
        first (`dict[str, list[dict]]`):
            Completions by task.
        second (`dict[str, list[dict]]`):
            Completions by task.

    Returns:
        `list[str]`: The tasks that both have: those whose pass rates differ most first, then those whose texts differ,
        then the others.
    """

    def difference(task_id: str) -> tuple[float, bool]:
        texts = [answers[task_id][0]["completion"] for answers in (first, second)]
        return -abs(_pass_rate(first[task_id]) - _pass_rate(second[task_id])), texts[0] == texts[1]

    return sorted((task_id for task_id in first if task_id in second), key=difference)


def side_by_side(task_id: str, names: list[str], answers: list[list[dict]]) -> Table:
    """
    Return a task's two answers as a table.

    Args:
        task_id (`str`):
            The task.
        names (`list[str]`):
            Names of the two evaluations.
        answers (`list[list[dict]]`):
            The task's completions of each.

    Returns:
        [`~rich.table.Table`]: Verdict and tokens in the header.
    """
    table = Table(title=Text(visible(task_id)), title_justify="left", title_style="bold", box=box.ROUNDED, expand=True)
    for name, samples in zip(names, answers, strict=True):
        first = samples[0]
        passed = first["verdict"] if len(samples) == 1 else f"{_num_passed(samples)}/{len(samples)} passed"
        color = "green" if first["passed"] else "red"
        header = Text.assemble(f"{name}: ", (passed, color), f", {first['completion_tokens']} tokens")
        table.add_column(header, ratio=1, overflow="fold")
    table.add_row(*(Text(visible(samples[0]["completion"].rstrip())) for samples in answers))
    return table


def summary(names: list[str], answers: list[dict[str, list[dict]]], tasks: list[str]) -> str:
    """
    Return the counts of two evaluations on the same tasks.

    Args:
        names (`list[str]`):
            Names of the two evaluations.
        answers (`list[dict[str, list[dict]]]`):
            Completions by task of each.
        tasks (`list[str]`):
            The tasks.

    Returns:
        `str`: One line for each evaluation.
    """
    lines = []
    for name, own, other in zip(names, answers, reversed(answers), strict=True):
        samples = [sample for task_id in tasks for sample in own[task_id]]
        better = [task_id for task_id in tasks if _pass_rate(own[task_id]) > _pass_rate(other[task_id])]
        tokens = sum(sample["completion_tokens"] for sample in samples) / len(samples)
        passed = sum(_pass_rate(own[task_id]) for task_id in tasks)
        lines.append(
            f"{name}: {passed:g}/{len(tasks)} passed, {tokens:.1f} tokens on average; better on {len(better)}"
            + (f": {', '.join(better)}" if better else "")
        )
    return visible("\n".join(lines))


def _num_passed(samples: list[dict]) -> int:
    return sum(sample["passed"] for sample in samples)


def _pass_rate(samples: list[dict]) -> float:
    return _num_passed(samples) / len(samples)


if __name__ == "__main__":
    main()
