"""
Read an evaluation's completions, show them, and write them as whole programs for other graders.

Such graders run the programs themselves, outside of this project's sandbox.
"""

import json
import re
from pathlib import Path

from recipes.common.run_directory import write_whole
from rewards import task_program

# Control characters, and those that reorder text so that code reads differently from what it does
_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")


def read_samples(folder: str | Path) -> list[dict]:
    """
    Read the completions of a finished evaluation.

    Args:
        folder (`str` or `Path`):
            The result directory.

    Returns:
        `list[dict]`: The lines of its `per_task.jsonl`.
    """
    return [json.loads(line) for line in (Path(folder) / "per_task.jsonl").read_text().splitlines()]


def visible(text: str) -> str:
    """
    Escape what a page or a terminal would hide or obey.

    Args:
        text (`str`):
            Any text.

    Returns:
        `str`: Control, direction and zero-width characters and lone surrogates as `\\x1b` or `\\u202e`.
    """
    return _INVISIBLE.sub(lambda c: f"\\x{ord(c[0]):02x}" if ord(c[0]) < 256 else f"\\u{ord(c[0]):04x}", text)


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
        columns = task["test"], task["entry_point"], task.get("setup") or ""
        program = task_program(task["prompt"], sample["completion"], *columns)
        # A text prompt is part of the program; the setup, which a chat reply may count on, is not
        setup = "" if isinstance(task["prompt"], str) or not program.setup else program.setup.rstrip() + "\n\n"
        lines.append(json.dumps({"task_id": sample["task_id"], "solution": setup + program.solution}) + "\n")
    write_whole(Path(path), "".join(lines))
