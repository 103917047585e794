# ruff: noqa: E501 - rows of data sets, a field a line
"""Task formats: rows of each become tasks that right answers pass and wrong ones fail, in the sandbox."""

import base64
import gzip
import json
import pickle
import zlib

import pyarrow
import pyarrow.parquet
import pytest

from rewards import load_tasks, reference_completion, task_program
from rewards.cases import cases_test
from sandbox import Program, Sandbox

ADD_ONE = "print(int(input()) + 1)"
STDIN = [{"input": "2\n", "output": "3\n", "type": "stdin_stdout", "fn_name": None}]
CALLS = [{"input": [[3, 4], 1], "output": [3.5], "type": "function_call", "fn_name": "shift"}]
SHIFT = "def shift(pair, by):\n    return min(pair) + by / 2"
METHOD = "class Solution:\n    def shift(self, pair: List[int], by: int) -> int:\n        "
METHOD_SOLUTION = METHOD + "return heappop(sorted(pair)) + by"
METHOD_CASES = [{"input": "[5, 4]\n2", "output": "6", "testtype": "functional"}]


def packed(value):
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


APPS = {"question": "Read n, print n + 1.", "starter_code": "", "difficulty": "easy"}
APPS |= {
    "solutions": json.dumps([ADD_ONE]),
    "input_output": json.dumps({"inputs": ["2\n", "5"], "outputs": ["3\n", "6\n"]}),
}
VERIFIABLE = {
    "task_type": "verifiable_code",
    "problem_id": "v1",
    "gold_standard_solution": f"```python\n{ADD_ONE}\n```",
}
LIVE = {"question_title": "Shift", "question_content": "Shift the least.", "question_id": "x1", "starter_code": METHOD}
LIVE |= {"public_test_cases": json.dumps(METHOD_CASES), "private_test_cases": packed(json.dumps(METHOD_CASES * 2))}
VERL = {"data_source": "code", "prompt": [{"role": "user", "content": "Do it."}], "extra_info": {"index": 4}}
PYTEST = """
import pytest
from solution import inc as up, half

class TestHalf:
    def test_it(self):
        assert half(3) == pytest.approx(1.5)

def test_inc():
    assert up(1) == 2

@pytest.mark.parametrize("x, y", [(1, 2), (3, 4)])
def test_more(y, x):
    assert up(x) == y

@pytest.mark.parametrize("x", ["a", None])
def test_errors(x):
    with pytest.raises(TypeError):
        half(x)
"""
INC_HALF = "def inc(x):\n    return x + 1\n\ndef half(x):\n    return x / 2"

# Row, entry point, right answers, wrong answers
FORMATS = {
    "MBPP sanitized": (
        {"task_id": 602, "prompt": "Add one.", "code": "def inc(x):\n    return x + 1", "test_imports": ["import math"],
         "test_list": ["assert inc(1) == math.floor(2.5)"], "source_file": "x"},
        "inc", ["    return 1 + x"], ["    return 2 * x + 1"],
    ),
    "MBPP+": (
        {"task_id": "Mbpp/602", "prompt": "Add one.", "code": "def inc(x):\n    return x + 1", "test_imports": [],
         "test_list": ["assert inc(1) == 2"], "test": "import math\ndef same(a, b):\n    assert a == b\n"
         "for given, wanted in zip([[1], [4]], [2, 5]):\n    same(inc(*given), wanted)\n"},
        "inc", ["    return 1 + x"], ["    return 2"],
    ),
    "AceCode": (
        {"id": "a1", "question": "Write `double(x)`.", "test_cases": ["assert double(2) == 4", "assert abs(double(-1)) == 2"],
         "inferences": [{"completion": "no", "pass_rate": 0.5}, {"completion": "def double(x):\n    return x + x", "pass_rate": 1.0}]},
        "double", ["def double(x):\n    return 2 * x"], ["def double(x):\n    return 4", "def twice(x):\n    return 2 * x"],
    ),
    "KodCode": (
        {"question_id": "k1", "question": "Write inc and half.", "solution": INC_HALF, "test": PYTEST, "test_info": []},
        "inc, half", [INC_HALF], [INC_HALF.replace("/", "//"), INC_HALF.replace("x + 1", "2"), "def inc(x):\n    return x + 1"],
    ),
    "LeetCodeDataset": (
        {"task_id": "shift", "prompt": "from heapq import *\nfrom typing import *\n", "completion": METHOD_SOLUTION,
         "entry_point": "Solution().shift", "test": "def check(candidate):\n    assert candidate(pair = [5, 4], by = 2) == 6\n",
         "query": "Shift."},
        "Solution().shift", [METHOD_SOLUTION], [METHOD + "return 0", "def shift(pair, by):\n    return 6"],
    ),
    "APPS": (APPS, "__main__", [ADD_ONE, "n = int(input())\nprint(n + 1, '\\n')"], ["print(3)", "print(int(input()) + 1, 1)"]),
    "APPS functions": (
        {**APPS, "solutions": [SHIFT], "starter_code": "def shift(pair, by):\n",
         "input_output": json.dumps({"fn_name": "shift", "inputs": [[[3, 4], 1], [[0, 9], 2]], "outputs": [[3.5], 1]})},
        "shift", [SHIFT, "def shift(pair, by):\n    return min(pair) + by / 2 + 1e-9"], ["def shift(pair, by):\n    return 3.5"],
    ),
    "open-r1": (
        {**VERIFIABLE, "problem_statement": "Add one.", "verification_info": {"language": "python", "test_cases": STDIN}},
        "__main__", [ADD_ONE], ["print(input())"],
    ),
    "PrimeIntellect": (
        {**VERIFIABLE, "prompt": "Shift.", "gold_standard_solution": SHIFT,
         "verification_info": json.dumps({"language": "python", "test_cases": CALLS}), "metadata": "{}"},
        "shift", [SHIFT], ["def shift(pair, by):\n    return 3"],
    ),
    "DeepCoder": (
        {"problem": "Add one.", "tests": json.dumps(STDIN), "solutions": [ADD_ONE]},
        "__main__", [ADD_ONE], ["print(4)"],
    ),
    "DeepCoder methods": (
        {"problem": "Shift.", "starter_code": METHOD, "tests": json.dumps(METHOD_CASES), "metadata": {"func_name": "shift"}},
        "Solution().shift", [METHOD_SOLUTION], [METHOD + "return 5"],
    ),
    "LiveCodeBench": (LIVE, "Solution().shift", [METHOD_SOLUTION], [METHOD + "return '6'"]),
    "Code-Contests": (
        {"name": "1_A", "description": "Read n, print n + 1.", "public_tests": {"input": ["2\n"], "output": ["3\n"]},
         "private_tests": {"input": [], "output": []}, "generated_tests": {"input": ["7\n"], "output": ["8\n"]},
         "solutions": {"language": [2, 3], "solution": ["int main() {}", ADD_ONE]}},
        "__main__", [ADD_ONE], ["print(3)"],
    ),
    "verl": (
        {**VERL, "reward_model": {"style": "rule", "ground_truth": json.dumps({"inputs": ["2\n"], "outputs": ["3\n"]})}},
        "__main__", [ADD_ONE], ["print(2)"],
    ),
    "verl functional": (
        {**VERL, "reward_model": {"ground_truth": json.dumps(
            {"functional": "def check(candidate):\n    assert candidate(pair=[5, 4], by=2) == 6\n\ncheck(Solution().shift)"})}},
        "Solution().shift", [METHOD_SOLUTION], [METHOD + "return 7"],
    ),
    "verl asserts": (
        {**VERL, "reward_model": {"ground_truth": json.dumps({"functional": "assert inc(1) == 2\nassert inc(2) == 3"})}},
        "inc", [INC_HALF], ["def inc(x):\n    return 2"],
    ),
    "verl pytest": (
        {**VERL, "reward_model": {"ground_truth": json.dumps({"pytest": "from solution import inc\ndef test_a():\n    assert inc(1) == 2"})}},
        "inc", [INC_HALF], ["def inc(x):\n    return x"],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(timeout=4.0) as sandbox:
        yield sandbox


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def verdicts(sandbox, task, answers):
    is_text = isinstance(task["prompt"], str)
    completions = [
        answer if is_text else [{"role": "assistant", "content": f"```python\n{answer}\n```"}] for answer in answers
    ]
    columns = task["test"], task["entry_point"], task["setup"]
    return sandbox.run([task_program(task["prompt"], completion, *columns) for completion in completions])


@pytest.mark.parametrize("name", FORMATS)
def test_right_answers_pass_and_wrong_ones_fail(sandbox, tmp_path, name):
    row, entry_point, right, wrong = FORMATS[name]
    (task,) = load_tasks(write(tmp_path / "tasks.jsonl", row))
    assert task["entry_point"] == entry_point
    if not name.startswith("MBPP"):
        assert [message["role"] for message in task["prompt"]] == ["user"]
    for verdict in verdicts(sandbox, task, right):
        assert verdict.status == "passed", verdict.detail
    assert [verdict.passed for verdict in verdicts(sandbox, task, wrong)] == [False] * len(wrong)
    if task["canonical_solution"]:
        reference = reference_completion(task)
        (verdict,) = sandbox.run([task_program(task["prompt"], reference, task["test"], entry_point, task["setup"])])
        assert verdict.passed, verdict.detail


def test_a_file_may_be_json_parquet_or_compressed(tmp_path):
    expected = load_tasks(write(tmp_path / "a.jsonl", APPS))[:]
    (tmp_path / "a.json").write_text(json.dumps([APPS], indent=1))
    (tmp_path / "a.json.gz").write_bytes(gzip.compress((tmp_path / "a.json").read_bytes()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([APPS]), tmp_path / "a.parquet")
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress((tmp_path / "a.parquet").read_bytes()))
    for name in ("a.json", "a.json.gz", "a.parquet", "a.parquet.gz"):
        assert load_tasks(str(tmp_path / name))[:] == expected
    (tmp_path / "b.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match="b.parquet: not a parquet file"):
        load_tasks(str(tmp_path / "b.parquet"))
    damaged = bytearray((tmp_path / "a.json.gz").read_bytes())
    damaged[len(damaged) // 2] ^= 255
    (tmp_path / "b.json.gz").write_bytes(damaged)
    with pytest.raises(ValueError, match="b.json.gz: not a json.gz file"):
        load_tasks(str(tmp_path / "b.json.gz"))


def test_any_split_of_a_hub_dataset(tmp_path, monkeypatch):
    (tmp_path / "own").mkdir()
    for split, question in (("train", "Train."), ("test", "Test.")):
        write(tmp_path / "own" / f"{split}.jsonl", {**APPS, "question": question})
    monkeypatch.chdir(tmp_path)
    assert load_tasks("own", "test")[0]["prompt"][0]["content"].startswith("Test.")
    assert len(load_tasks("own", "all")) == 2
    with pytest.raises(ValueError, match="own has no split 'valid', it has 'train', 'test'"):
        load_tasks("own", "valid")


@pytest.mark.parametrize(
    "name, field", [("APPS", "problem_id"), ("open-r1", "problem_id"), ("DeepCoder", "problem_id"), ("AceCode", "id")]
)
def test_0_is_an_id_as_any_other(tmp_path, name, field):
    path = write(tmp_path / "a.jsonl", *(FORMATS[name][0] | {field: number} for number in (7, 0)))
    assert load_tasks(path)["task_id"][:] == ["7", "0"]


def test_tests_without_code_and_cases_without_stdin(tmp_path, sandbox):
    row, entry_point, *_ = FORMATS["AceCode"]
    path = write(tmp_path / "a.jsonl", {**row, "test_cases": ["# nothing", *row["test_cases"]]})
    assert load_tasks(path)["entry_point"][:] == [entry_point]
    (task,) = load_tasks(
        write(tmp_path / "b.jsonl", {**APPS, "input_output": json.dumps({"inputs": [None], "outputs": ["0"]})})
    )
    (verdict,) = sandbox.run([Program("import sys\nprint(len(sys.stdin.read()))", task["test"], "__main__")])
    assert verdict.passed, verdict


def test_words_are_asked_in_chat_and_not_mixed_with_code(tmp_path):
    row = {"task_id": "a", "prompt": "Write add(a, b).", "entry_point": "add"}
    row["test"] = "def check(candidate):\n    assert candidate(1, 2) == 3\n"
    (task,) = load_tasks(write(tmp_path / "a.jsonl", row))
    assert task["prompt"] == [{"role": "user", "content": "Write add(a, b)."}] and task["canonical_solution"] == ""
    code = {**row, "task_id": "b", "prompt": "def add(a, b):\n"}
    with pytest.raises(ValueError, match="field 'prompt' is code to continue in one of the tasks a and b"):
        load_tasks(write(tmp_path / "b.jsonl", row, code))


@pytest.mark.parametrize(
    "expected, same, different",
    [
        ("3\n4\n", ["3\n4", " 3 \r\n4\n\n"], ["3 4", "3\n4\n5", "3", "3\n\n4", ""]),
        ("0.5 1000000\n", ["0.5000001 1000000", "5e-1  1000000.0"], ["0.51 1000000", "0.5 1000001", "nan 1000000"]),
        ("123456789012345678\n", ["123456789012345678"], ["123456789012345679", "123456789012345679.0x"]),
        ("a  b", ["a  b"], ["a b", "A  b"]),
        ("case 1: 0.25", ["case 1: 0.2500000001"], ["case 2: 0.25", "Case 1: 0.25"]),
    ],
)
def test_what_scripts_print_is_compared_line_by_line(sandbox, expected, same, different):
    test = cases_test([("", expected)], True, 15, 1000)
    programs = [Program(f"print({text!r}, end='')", test, "__main__") for text in same + different]
    assert [verdict.passed for verdict in sandbox.run(programs)] == [True] * len(same) + [False] * len(different)


def test_results_are_compared_by_value(sandbox):
    test = cases_test([([0], [[1, 2.5], {"1": "a"}, True])], False, 15, 1000)
    answers = {
        "([1, 2.5], {1: 'a'}, True)": True,
        "[(1.0000000001, 2.5), {'1': 'a'}, True]": True,
        "[(1, 2.5000001), {'1': 'a'}, True]": True,
        "[(1, 2.5), {'1': 'a'}, 1]": False,
        "[(1, 2.5), {'2': 'a'}, True]": False,
        "[(1, '2.5'), {'1': 'a'}, True]": False,
    }
    programs = [Program(f"def f(x):\n    return {answer}", test, "f") for answer in answers]
    assert [verdict.passed for verdict in sandbox.run(programs)] == list(answers.values())


def test_the_number_and_size_of_cases_are_settings(tmp_path, sandbox):
    inputs = [str(n) for n in (5, 500, 50, 5 * 10**40)]
    cases = {"inputs": inputs, "outputs": [str(int(n) + 1) for n in inputs]}
    path = write(tmp_path / "a.jsonl", {**APPS, "input_output": json.dumps(cases)})
    for settings, kept in (({}, [0, 1, 2, 3]), ({"max_cases": 2}, [1, 3]), ({"max_case_bytes": 20}, [0, 1, 2])):
        (task,) = load_tasks(path, **settings)
        assert [json.dumps(n) in task["test"] for n in inputs] == [i in kept for i in range(4)]
        assert verdicts(sandbox, task, [ADD_ONE])[0].passed
    with pytest.raises(ValueError, match="max_cases is 0"):
        load_tasks(path, max_cases=0)


class Hostile:
    def __reduce__(self):
        return print, ("unpickled",)


def called_with(text):
    return json.dumps({"fn_name": "f", "inputs": [text], "outputs": ["3"]})


@pytest.mark.parametrize("value", [Hostile(), ["text"], 3, b"text", ("a", "b")])
def test_private_cases_are_unpickled_to_text_and_nothing_else(tmp_path, capsys, value):
    path = write(tmp_path / "a.jsonl", {**LIVE, "private_test_cases": packed(value)})
    with pytest.raises(ValueError, match="a.jsonl:1: field 'private_test_cases' is .* of one pickled text"):
        load_tasks(path)
    assert "unpickled" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "row, reason",
    [
        (
            {**FORMATS["KodCode"][0], "test": "from solution import a\ndef test_a(tmp_path):\n    assert a() == 1"},
            "fixtures",
        ),
        ({**FORMATS["KodCode"][0], "test": "from solution import A\ndef test_a():\n    assert A()"}, "classes"),
        (
            {**FORMATS["AceCode"][0], "test_cases": ["", "assert f(1) == 2", "assert g(1) == 2"]},
            "no function in common",
        ),
        (
            {**FORMATS["LeetCodeDataset"][0], "test": "def check(candidate):\n    candidate(tree_node([1]))"},
            "lists or trees",
        ),
        ({**FORMATS["Code-Contests"][0], "description": "Print any of them."}, "several right answers"),
        ({**FORMATS["open-r1"][0], "verification_info": {"language": "rust", "test_cases": STDIN}}, "language is rust"),
        ({**APPS, "input_output": ""}, "no list of input and output"),
        ({**APPS, "input_output": "{"}, "'input_output' is no JSON"),
        *(({**APPS, "input_output": called_with(text)}, "is no JSON") for text in ("{1, 2}", "b'x'", "{1: 2}")),
    ],
)
def test_rows_that_make_no_task_are_left_out_and_counted(tmp_path, caplog, row, reason):
    good = (
        FORMATS["APPS"][0] if "input_output" in row else next(r for r, *_ in FORMATS.values() if r.keys() == row.keys())
    )
    assert len(load_tasks(write(tmp_path / "a.jsonl", row, good, row))) == 1
    assert "a.jsonl: 2 rows are left out: " in caplog.text and f"{reason}" in caplog.text and "(2)" in caplog.text
    with pytest.raises(ValueError, match="the split 'train' of .* has no tasks"):
        load_tasks(write(tmp_path / "b.jsonl", row))


def test_an_unknown_format_gets_the_known_ones(tmp_path):
    path = write(tmp_path / "a.jsonl", {"question": "?", "solutions": [], "outputs": []})
    with pytest.raises(ValueError) as error:
        load_tasks(path)
    message = str(error.value)
    assert message.startswith(f"{path}:1: field 'test_cases' is missing for AceCode, the nearest format")
    assert "LiveCodeBench (question_content, public_test_cases, private_test_cases)" in message


def test_a_task_that_lacks_one_field_is_told_which(tmp_path):
    path = write(tmp_path / "a.jsonl", {"task_id": "a", "prompt": "Write f.", "tests": "", "entry_point": "f"})
    with pytest.raises(ValueError) as error:
        load_tasks(path)
    assert str(error.value) == (
        f"{path}:1: field 'test' is missing: a task in HumanEval format has task_id, prompt, test, entry_point, and "
        "this one has task_id, prompt, tests, entry_point"
    )
    path = write(tmp_path / "b.jsonl", {"task_id": "b", "prompt": "Write f.", "test": "def f(", "entry_point": "f"})
    with pytest.raises(ValueError, match=r"b.jsonl:1: field 'test' is not Python: .* \(test, line 1\)"):
        load_tasks(path)


def test_test_tasks_of_humaneval_do_not_slip_into_training(tmp_path, caplog):
    tasks = {task["task_id"]: task for task in load_tasks("humaneval", "all")}
    rows = [
        {**tasks["HumanEval/1"], "task_id": "Python/1"},
        {**tasks["HumanEval/23"], "task_id": "HumanEval_23_x", "prompt": "Write strlen: Return length of given string"},
        {**tasks["HumanEval/0"], "task_id": "Python/0"},
    ]
    rows[2]["prompt"] = rows[0]["prompt"] = [
        {"role": "user", "content": f"Do:\n```\n{tasks['HumanEval/1']['prompt']}```"}
    ]
    rows[2]["prompt"] = [{"role": "user", "content": tasks["HumanEval/0"]["prompt"]}]
    path = write(tmp_path / "a.jsonl", *rows)
    assert load_tasks(path, "train")["task_id"][:] == ["Python/0"]
    assert "left out: Python/1 (HumanEval/1), HumanEval_23_x (HumanEval/23)" in caplog.text
    assert len(load_tasks(path, "all")) == 3
