"""
Read an evaluation's completions, and make whole programs of them: for the sandbox, and in a file for other graders.

Other graders run the programs themselves, outside of this project's sandbox.
"""

import json
from pathlib import Path

from recipes.common.run_directory import write_whole
from rewards import task_program
from sandbox import Program


def read_lines(path: Path) -> list[dict]:
    """
    Read a file of JSON lines.

    Args:
        path (`Path`):
            A file that `evaluate.py` wrote.

    Returns:
        `list[dict]`: Its lines.

    Raises:
        SystemExit: It is missing or no JSON.
    """
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path} cannot be read ({error}): write it with recipes/evaluate.py") from None


def read_samples(folder: str | Path) -> list[dict]:
    """
    Read the completions of a finished evaluation.

    Args:
        folder (`str` or `Path`):
            The result directory.

    Returns:
        `list[dict]`: The lines of its `per_task.jsonl`.

    Raises:
        SystemExit: The file is missing or no JSON.
    """
    return read_lines(Path(folder) / "per_task.jsonl")


def samples_by_task(folder: str) -> dict[str, list[dict]]:
    """
    Read the completions of a finished evaluation, by task.

    Args:
        folder (`str`):
            The result directory.

    Returns:
        `dict[str, list[dict]]`: Each task's graded completions.

    Raises:
        SystemExit: The file is missing or no JSON.
    """
    samples = {}
    for sample in read_samples(folder):
        samples.setdefault(sample["task_id"], []).append(sample)
    return samples


def program_of(task: dict, completion: str | list[dict], test: str | None = None) -> Program:
    """
    Build the program that a completion of a task makes.

    Args:
        task (`dict`):
            A row of the tasks.
        completion (`str` or `list[dict]`):
            The completion.
        test (`str`, *optional*):
            Other tests than the task's own.

    Returns:
        [`~sandbox.Program`]
    """
    columns = test or task["test"], task["entry_point"], task.get("setup") or "", task.get("inline")
    return task_program(task["prompt"], completion, *columns)


def write_programs(path: str, samples: list[dict], tasks: list[dict]) -> None:
    """
    Write completions in the form that evalplus reads: JSON lines of `task_id` and `solution`, a whole program.

    Args:
        path (`str`):
            The file.
        samples (`list[dict]`):
            Completions, with `task_id` and `completion`.
        tasks (`list[dict]`):
            The tasks that they complete, with their prompts in the format of the evaluation.
    """
    by_id = {task["task_id"]: task for task in tasks}
    lines = []
    for sample in samples:
        task = by_id[sample["task_id"]]
        program = program_of(task, sample["completion"])
        # A text prompt is part of the program; the setup, which a chat reply may count on, is not
        setup = "" if isinstance(task["prompt"], str) or not program.setup else program.setup.rstrip() + "\n\n"
        lines.append(json.dumps({"task_id": sample["task_id"], "solution": setup + program.solution}) + "\n")
    write_whole(Path(path), "".join(lines))
