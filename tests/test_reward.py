"""The reward: exact values, both formats, TRL's hooks, and never a completion in this process."""

import os

import pytest

from rewards import UnitTestReward, truncate_completion
from sandbox import Sandbox

PROMPT = 'def twice(n: int) -> int:\n    """Return 2 n."""\n'
TEST = "def check(candidate):\n    assert candidate(3) == 6\n"


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(timeout=2.0) as sandbox:
        yield sandbox


def test_reward_is_pass_minus_price_of_tokens(sandbox):
    reward = UnitTestReward(length_penalty=0.03, sandbox=sandbox)
    completions = ["    return 2 * n", "    return n", "    return 2 *", "    while True:\n        pass"]
    metrics, columns = {}, {}
    rewards = reward(
        prompts=[PROMPT] * 4,
        completions=completions,
        completion_ids=[[7] * 10, [7] * 50, [7] * 200, [7]],
        test=[TEST] * 4,
        entry_point=["twice"] * 4,
        task_id=["a", "b", "c", "d"],
        trainer_state=None,
        log_metric=metrics.__setitem__,
        log_extra=columns.__setitem__,
    )
    assert rewards == pytest.approx([1 - 0.003, -0.015, -0.06, -0.0003], abs=1e-12)
    assert metrics == {"pass_rate": 0.25, "timeout_rate": 0.25, "completion_tokens": 261 / 4}
    assert columns == {
        "verdict": ["passed", "failed", "error", "timeout"],
        "completion_tokens": [10, 50, 200, 1],
    }


def test_a_failure_costs_nothing_where_passing_completions_alone_pay_for_length(sandbox):
    reward = UnitTestReward(length_penalty=0.03, sandbox=sandbox, penalize_failures=False)
    rewards = reward(
        prompts=[PROMPT] * 2,
        completions=["    return 2 * n", "    return n"],
        completion_ids=[[7] * 10, [7] * 50],
        test=[TEST] * 2,
        entry_point=["twice"] * 2,
    )
    assert rewards == pytest.approx([1 - 0.003, 0.0], abs=1e-12)


def test_chat_reply_is_graded_by_its_fenced_block(sandbox):
    messages = [{"role": "user", "content": "Write twice(n)."}]
    replies = [
        "Sure:\n```python\ndef twice(n):\n    return n + n\n```\nDone.",
        "def twice(n):\n    return n + n",
        "I would rather not.",
    ]
    rewards = UnitTestReward(length_penalty=0, sandbox=sandbox)(
        prompts=[messages] * 3,
        completions=[[{"role": "assistant", "content": reply}] for reply in replies],
        test=[TEST] * 3,
        entry_point=["twice"] * 3,
    )
    assert rewards == [1.0, 1.0, 0.0]


def test_tests_may_use_the_helpers_of_the_prompt(sandbox):
    prompt = "def half(n):\n    return n // 2\n\ndef twice(n):\n"
    test = "def check(candidate):\n    assert half(candidate(3)) == 3\n"
    cheat = "    return 2 * n\ndef half(n):\n    return 'fooled'"
    reward = UnitTestReward(length_penalty=0, sandbox=sandbox)
    assert reward([prompt] * 2, ["    return 2 * n", cheat], [test] * 2, ["twice"] * 2) == [1.0, 1.0]


def test_tests_may_use_the_setup_column(sandbox):
    messages = [{"role": "user", "content": "Write twice(n)."}]
    reply = [{"role": "assistant", "content": "def twice(n):\n    return 2 * n"}]
    test = "def check(candidate):\n    assert half(candidate(3)) == 3\n"
    setups = ["def half(n):\n    return n // 2\n", "", None]  # None, where some rows of a file have the field
    columns = {"test": [test] * 3, "entry_point": ["twice"] * 3, "setup": setups}
    reward = UnitTestReward(length_penalty=0, sandbox=sandbox)
    assert reward([messages] * 3, [reply] * 3, **columns) == [1.0, None, None], "without it the tests cannot run"


def test_what_cannot_be_judged_is_no_failure(sandbox, caplog):
    broken = {
        "def check(candidate:\n": "tests_do_not_load",
        "def check(candidate):\n    assert 1 == 2\n": "tests_fail",
        "def check(candidate):\n    pass\n": "tests_never_call",
        "def check(candidate):\n    candidate(object())\n": "value_cannot_cross",
        TEST + "# with a setup that ends the tests' process": "worker_lost",
    }
    rows = {
        "prompts": [PROMPT] * 7,
        "completions": ["    return 2 * n"] * 6 + ["    return n"],
        "entry_point": ["twice"] * 7,
        "test": [*broken, TEST, TEST],
        "setup": [""] * 4 + ["import os\nif os.getppid() > 1: os._exit(1)", "", ""],
    }
    metrics = {}
    rewards = UnitTestReward(0, sandbox)(**rows, log_metric=metrics.__setitem__)
    assert rewards == [None] * 5 + [1.0, 0.0]
    assert metrics == {f"invalid/{cause}": 1 for cause in broken.values()} | {
        "pass_rate": 0.5,
        "timeout_rate": 0.0,
        "completion_tokens": 0.0,
    }
    assert (
        "5 of 7 programs could not be judged and get no reward. The first: the task's setup or tests do not load"
        in (caplog.text)
    )
    caplog.clear()
    few = {name: column[2:3] + column[5:6] * 9 for name, column in rows.items()}
    assert UnitTestReward(0, sandbox)(**few) == [None] + [1.0] * 9
    assert caplog.text == "", "a tenth is not more than a tenth"


def test_no_completion_runs_in_this_process(sandbox):
    completion = "    import os\n    return os.getpid()"
    tests = [f"def check(candidate):\n    assert candidate(0) {op} {os.getpid()}\n" for op in ("!=", "==")]
    reward = UnitTestReward(length_penalty=0, sandbox=sandbox)
    assert reward([PROMPT] * 2, [completion] * 2, tests, ["twice"] * 2) == [1.0, 0.0]


def test_bad_arguments():
    with pytest.raises(ValueError, match="length_penalty is -0.1"):
        UnitTestReward(length_penalty=-0.1)
    with pytest.raises(ValueError, match="length_penalty needs completion_ids"):
        UnitTestReward()([PROMPT], ["    pass"], [TEST], ["twice"])


@pytest.mark.parametrize(
    "completion, kept",
    [
        ("    return 1", "    return 1"),
        ("    return 1\n\n\nprint(f(2))\n", "    return 1\n\n\n"),
        ("    x = [\n        1,\n]\n    return x\n\ndef g():\n", "    x = [\n        1,\n]\n    return x\n\n"),
        ("    return 1\n# Test\n", "    return 1\n"),
        ("return 1\n    pass\n```\n", "return 1\n    pass\n"),
        ("", ""),
    ],
)
def test_truncation_ends_where_the_function_ends(completion, kept):
    assert truncate_completion(completion) == kept
