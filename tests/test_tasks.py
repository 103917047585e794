"""Loading tasks: files, splits, HumanEval's and MBPP's formats, and every malformed row refused where it stands."""

import gzip
import json

import pytest

from rewards import humaneval_test_ids, load_tasks

TASK = {
    "task_id": "mine/0",
    "prompt": "def add(a, b):\n",
    "canonical_solution": "    return a + b\n",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
    "entry_point": "add",
}
MBPP = {
    "task_id": 602,
    "text": "Write a function to double a number.",
    "code": "import math\r\ndef helper(x):\r\n\treturn 2 * x\r\ndef double(n):\r\n\treturn helper(n)",
    "test_setup_code": "limit = 4",
    "test_list": ["assert double(2) == limit", "assert double(0) == 0"],
}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_humaneval_has_the_published_split():
    test = "1 6 7 8 22 23 26 28 35 39 40 50 55 56 57 59 62 70 71 87 107 108 114 129 138 139 143 148 151 152 155 161 163"
    assert humaneval_test_ids() == [f"HumanEval/{number}" for number in test.split()]
    assert load_tasks("humaneval", "test")["task_id"][:] == humaneval_test_ids()
    train = load_tasks("humaneval", "train")["task_id"][:]
    assert len(train) == 131 and not set(train) & set(humaneval_test_ids())
    assert len(load_tasks("humaneval", "all")) == 164
    fit, validation = (set(load_tasks("humaneval", split)["task_id"][:]) for split in ("fit", "validation"))
    assert (len(fit), len(validation)) == (100, 31) and fit | validation == set(train)


def test_jsonl_file_plain_and_compressed(tmp_path):
    path = write(tmp_path / "tasks.jsonl", TASK, {**TASK, "task_id": 1, "extra": "dropped"})
    tasks = load_tasks(path)
    assert tasks[0] == {**TASK, "setup": ""}
    assert tasks[1] == {**TASK, "task_id": "1", "setup": ""}
    compressed = tmp_path / "tasks.jsonl.gz"
    compressed.write_bytes(gzip.compress((tmp_path / "tasks.jsonl").read_bytes()))
    assert load_tasks(str(compressed))[:] == tasks[:]


def test_jsonl_of_humaneval_problems_keeps_the_published_split(tmp_path):
    path = write(tmp_path / "plus.jsonl", *({**TASK, "task_id": f"HumanEval/{i}"} for i in (0, 1, 2, 6)))
    assert load_tasks(path, "test")["task_id"][:] == ["HumanEval/1", "HumanEval/6"]
    assert load_tasks(path, "train")["task_id"][:] == ["HumanEval/0", "HumanEval/2"]


def test_mbpps_entry_point_is_the_function_that_is_called_first(tmp_path):
    two = {"code": "def f(x):\n    return -x\ndef g(x):\n    return x", "test_list": ["assert abs(f(2)) == g(2)"]}
    path = write(tmp_path / "two.jsonl", MBPP | two)
    assert load_tasks(path, "all")["entry_point"][:] == ["f"]


def test_mbpp_becomes_a_body_to_complete(tmp_path):
    path = write(tmp_path / "mbpp.jsonl", MBPP, {**MBPP, "task_id": 511})
    assert load_tasks(path, "validation")["task_id"][:] == ["MBPP/511"]
    (task,) = load_tasks(path, "train")
    assert task == {
        "task_id": "MBPP/602",
        "prompt": (
            "import math\n\ndef helper(x):\n    return 2 * x\n\ndef double(n):\n"
            '    """\n    Write a function to double a number.\n    assert double(2) == limit\n    """\n'
        ),
        "canonical_solution": "    return helper(n)\n",
        "test": (
            "limit = 4\n\ndef check(candidate):\n    assert candidate(2) == limit\n    assert candidate(0) == 0\n"
        ),
        "entry_point": "double",
        "setup": "import math\n\ndef helper(x):\n    return 2 * x\n",
    }


@pytest.mark.parametrize(
    "row, message",
    [
        ({**TASK, "prompt": ""}, "field 'prompt' is ''"),
        ({**TASK, "test": 3}, "field 'test' is 3"),
        ({k: v for k, v in TASK.items() if k != "entry_point"}, "field 'entry_point' is missing"),
        ({**TASK, "entry_point": "a b"}, "field 'entry_point' is 'a b'"),
        ({**TASK, "test": "assert add(1, 2) == 3"}, "field 'test' defines no function check"),
        ({**TASK, "test": "def check(:"}, "field 'test' is not Python"),
        (TASK, "field 'task_id' repeats 'mine/0'"),
        ([TASK], "a task is a JSON object"),
        ({**MBPP, "code": ""}, "field 'code' is missing or empty"),
        ({**MBPP, "test_list": ["assert other(1) == 1"]}, "field 'test_list' calls no function"),
    ],
)
def test_malformed_row_names_file_line_and_field(tmp_path, row, message):
    path = write(tmp_path / "tasks.jsonl", TASK, row)
    with pytest.raises(ValueError) as error:
        load_tasks(path)
    assert f"tasks.jsonl:2: {message}" in str(error.value)


def test_line_that_is_no_json(tmp_path):
    path = tmp_path / "tasks.jsonl"
    path.write_text(json.dumps(TASK) + "\n\n{'task_id': 1}\n")
    with pytest.raises(ValueError, match="tasks.jsonl:3: not a line of JSON"):
        load_tasks(str(path))


def test_a_hub_dataset_keeps_its_own_splits(tmp_path, monkeypatch):
    """A folder of JSONL files is read as the Hub's datasets are."""
    (tmp_path / "own").mkdir()
    write(tmp_path / "own" / "train.jsonl", {**TASK, "task_id": "a"}, {**TASK, "task_id": "b"})
    write(tmp_path / "own" / "test.jsonl", {**TASK, "task_id": "c"})
    monkeypatch.chdir(tmp_path)
    assert load_tasks("own", "train")["task_id"][:] == ["a", "b"]
    assert load_tasks("own", "test")["task_id"][:] == ["c"]
    assert load_tasks("own", "all")["task_id"][:] == ["a", "b", "c"]
    with pytest.raises(ValueError, match="own has no split 'validation', it has 'train', 'test'"):
        load_tasks("own", "validation")


def test_no_test_task_of_a_benchmark_is_trained_on_in_a_mixture(tmp_path):
    path = write(tmp_path / "both.jsonl", {**TASK, "task_id": "HumanEval/1"}, MBPP)
    with pytest.raises(ValueError, match="mixes problems of HumanEval or MBPP"):
        load_tasks(path, "train")
    assert len(load_tasks(path, "all")) == 2


def test_tasks_in_mbpps_columns_that_are_not_its_tasks_are_one_split(tmp_path):
    path = write(tmp_path / "own.jsonl", *({**MBPP, "task_id": number} for number in (975, 976, "a1")))
    assert load_tasks(path, "train")["task_id"][:] == ["MBPP/975", "MBPP/976", "MBPP/a1"]
    path = write(tmp_path / "both.jsonl", *({**MBPP, "task_id": number} for number in (974, 975)))
    with pytest.raises(ValueError, match="mixes problems of HumanEval or MBPP.* number tasks of your own from 975"):
        load_tasks(path, "train")
    path = write(tmp_path / "few.jsonl", {**MBPP, "task_id": 49})
    with pytest.raises(
        ValueError, match="'train' of .* has no tasks .by their ids its tasks are of MBPP's other splits"
    ):
        load_tasks(path, "train")


def test_sources_and_splits_that_do_not_exist(tmp_path):
    path = write(tmp_path / "tasks.jsonl", TASK)
    with pytest.raises(FileNotFoundError, match="no task file"):
        load_tasks(str(tmp_path / "absent.jsonl"))
    with pytest.raises(
        ValueError,
        match="is one split, 'train': ask for that, or name the file in which the tasks of the split 'dev' are",
    ):
        load_tasks(path, "dev")
    with pytest.raises(ValueError, match="is one split, 'train'"):
        load_tasks(path, "test")
    with pytest.raises(ValueError, match="splits are 'train', 'fit', 'validation', 'test' and 'all'"):
        load_tasks("humaneval", "prompt")
    with pytest.raises(ValueError, match="MBPP's format, whose splits are"):
        load_tasks(write(tmp_path / "mbpp.jsonl", MBPP), "fit")
    with pytest.raises(ValueError, match="the split 'test' of .* has no tasks"):
        load_tasks(write(tmp_path / "mbpp.jsonl", MBPP), "test")
    with pytest.raises(ValueError, match="nor a Hub dataset that can be read"):
        load_tasks("nobody/nothing")
