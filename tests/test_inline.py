"""A task's column `inline` reaches the sandbox by every way on which a completion is graded."""

import json

import pytest

from recipes.check_tasks import check
from recipes.evaluate import grade
from recipes.preferences import _grade
from rewards import PartialReward, UnitTestReward, load_tasks
from sandbox import Sandbox

BOX = "class Box:\n    def __init__(self, n):\n        self.n = n\ndef box(n):\n    return Box(n)\n"
TEST = "def check(candidate):\n    assert candidate(3).n == 3\n"


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(workers=1, timeout=2.0) as sandbox:
        yield sandbox


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """A task whose results cannot cross, with `inline` left out, true and false. Each is a chunk of the dataset."""
    monkeypatch.setattr("rewards.tasks.CHUNK", 1)
    rows = [{"task_id": name, "prompt": "Write box(n).", "test": TEST, "entry_point": "box"} for name in "abc"]
    rows[1]["inline"], rows[2]["inline"] = True, False
    file = tmp_path / "tasks.jsonl"
    file.write_text("".join(json.dumps(row | {"canonical_solution": BOX}) + "\n" for row in rows))
    tasks = load_tasks(str(file))
    assert tasks["inline"][:] == [None, True, False]
    return tasks


@pytest.mark.parametrize("reward", [UnitTestReward, PartialReward])
def test_rewards(tasks, sandbox, reward):
    reward = reward(sandbox=sandbox)
    columns = {name: tasks[name][:] for name in ("test", "entry_point", "setup", "inline")}
    replies = [[{"role": "assistant", "content": BOX}]] * 3
    rewards = reward(prompts=tasks["prompt"][:], completions=replies, completion_ids=[[]] * 3, **columns)
    assert rewards == [0.0, 1.0, 0.0]


def test_recipes(tasks, sandbox):
    completions = [{"task_id": name, "completion": BOX, "completion_ids": []} for name in "abc"]
    evaluated, sampled = ([dict(each) for each in completions] for _ in range(2))
    grade(evaluated, tasks.to_list(), 2.0, extra_tests=dict.fromkeys("abc", TEST))
    assert [sample["passed_plus"] for sample in evaluated] == [False, True, False]
    _grade(sampled, tasks.to_list(), UnitTestReward(sandbox=sandbox))
    assert [sample["verdict"] for sample in sampled] == ["error", "passed", "error"]
    refused = ["reference does not pass: error"]
    assert check(tasks, 2.0) == {"a": refused, "b": [], "c": refused}


def test_another_value_is_refused(tmp_path):
    row = {"task_id": "a", "prompt": "Write box(n).", "test": TEST, "entry_point": "box", "canonical_solution": ""}
    file = tmp_path / "tasks.jsonl"
    file.write_text(json.dumps(row | {"inline": True, "entry_point": "__main__"}))
    with pytest.raises(ValueError, match="field 'inline' is True: leave the field out: a script has a process"):
        load_tasks(str(file))
    file.write_text(json.dumps(row | {"inline": "yes"}))
    with pytest.raises(ValueError, match="tasks.jsonl:1: field 'inline' is 'yes': write true or false, or leave the"):
        load_tasks(str(file))
