"""The rewards in the trainers that people use them with: TRL's, ours, verl, verifiers; and those to combine."""

import asyncio
import inspect
import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from datasets import Dataset
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

from rewards import (
    CompilesReward,
    PartialReward,
    UnitTestReward,
    compiles_reward,
    elsewhere,
    length_reward,
    load_tasks,
    partial_reward,
    unit_test_reward,
)
from rewards.elsewhere import compute_score, rubric_reward, task_reward, verl_rows
from rewards.shaping import split_tests
from sandbox import Sandbox, Verdict
from trainers import PPOClipConfig, PPOClipTrainer, ReinforceConfig, ReinforceTrainer

# Whatever follows is a comment, so most completions of a random policy pass, and the rewards are known
PROMPT = "def one():\n    return 1  # "
TEST = "def check(candidate):\n    assert candidate() == 1\n"
TWICE = 'def twice(n: int) -> int:\n    """Return 2 n."""\n'
TWICE_TEST = """
def check(candidate):
    three = 3
    assert candidate(three) == 6
    assert candidate(0) == 0
    for n in range(3):
        assert candidate(n) == 2 * n
    assert candidate(-1) == -2, "negative"
"""
COMMON = {"max_steps": 1, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True}
COMMON |= {"bf16": False, "gradient_checkpointing": False, "disable_tqdm": True, "seed": 3}
TRAINERS = {
    "grpo": (GRPOTrainer, GRPOConfig, {"num_generations": 2, "max_completion_length": 8}),
    "rloo": (RLOOTrainer, RLOOConfig, {"num_generations": 2, "max_completion_length": 8}),
    "reinforce": (ReinforceTrainer, ReinforceConfig, {"max_completion_length": 8}),
    "ppo_clip": (PPOClipTrainer, PPOClipConfig, {"max_completion_length": 8}),
    "online_dpo": (OnlineDPOTrainer, OnlineDPOConfig, {"max_new_tokens": 8}),
}


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(timeout=2.0) as sandbox:
        yield sandbox


class Recorder:
    """A reward function that keeps what it was asked and what the reward it wraps answered."""

    def __init__(self, reward):
        self.reward, self.calls, self.__name__ = reward, [], reward.__name__

    def __call__(self, **kwargs):
        self.calls.append((kwargs, self.reward(**kwargs)))
        return self.calls[-1][1]


def train(name, folder, model_folder, reward, rows):
    trainer_class, config_class, settings = TRAINERS[name]
    tokenizer = AutoTokenizer.from_pretrained(model_folder, padding_side="left")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    trainer = trainer_class(
        model=str(model_folder),
        reward_funcs=reward,
        args=config_class(str(folder), per_device_train_batch_size=2, **settings, **COMMON),
        train_dataset=Dataset.from_list(rows * 2),
        processing_class=tokenizer,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("name", TRAINERS)
def test_instance_in_every_trainer(tmp_path, tiny_folder, sandbox, name):
    reward = Recorder(UnitTestReward(0.01, sandbox, test_column="tests", entry_point_column="function"))
    row = {"prompt": PROMPT, "tests": TEST, "function": "one", "task_id": "one"}
    trainer = train(name, tmp_path, tiny_folder, reward, [row])
    ((asked, rewards),) = reward.calls
    assert len(rewards) == len(asked["completions"]) >= 2 and asked["prompts"][0] == PROMPT
    # Each is the pass of its own text minus the price of its own tokens
    alone = UnitTestReward(0, sandbox)
    passes = alone(asked["prompts"], asked["completions"], [TEST] * len(rewards), ["one"] * len(rewards))
    assert rewards == [p - 0.01 * len(ids) / 100 for p, ids in zip(passes, asked["completion_ids"], strict=True)]
    log = trainer.state.log_history[0]
    if name != "online_dpo":  # which knows no log_metric
        assert log["rewards/unit_tests/mean"] == pytest.approx(sum(rewards) / len(rewards), abs=1e-6)
        assert log["pass_rate"] == pytest.approx(sum(passes) / len(passes), abs=1e-6)
        assert log["completion_tokens"] == pytest.approx(log["completions/mean_length"])


@pytest.mark.parametrize("name", ["grpo", "reinforce", "online_dpo"])
def test_function_on_a_chat(tmp_path, tiny_folder, name):
    reward = Recorder(unit_test_reward)
    row = {"prompt": [{"role": "user", "content": "Write one()."}], "test": TEST, "entry_point": "one"}
    train(name, tmp_path, tiny_folder, reward, [row])
    ((asked, rewards),) = reward.calls
    assert asked["completions"][0][0]["role"] == "assistant" and reward.__name__ == "unit_test_reward"
    assert rewards == [-0.01 * len(ids) / 100 for ids in asked["completion_ids"]], "random bytes are no function"


def test_trl_command_line_finds_the_rewards_by_their_paths(tmp_path, tiny_folder):
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    row = {"prompt": PROMPT, "test": TEST, "entry_point": "one"}
    (tasks / "train.jsonl").write_text((json.dumps(row) + "\n") * 4)
    names = ["unit_test_reward", "partial_reward", "compiles_reward", "length_reward"]
    command = [sys.executable, "-m", "trl.cli.main", "grpo", "--reward_funcs", *[f"rewards.{name}" for name in names]]
    command += ["--model_name_or_path", str(tiny_folder), "--dataset_name", str(tasks), "--output_dir", "run"]
    command += ["--max_steps", "1", "--logging_steps", "1", "--report_to", "none", "--use_cpu", "--bf16", "false"]
    command += ["--per_device_train_batch_size", "4", "--num_generations", "4", "--max_completion_length", "8"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (state,) = tmp_path.glob("run/checkpoint-1/trainer_state.json")
    log = json.loads(state.read_text())["log_history"][0]
    passed, tokens = log["pass_rate"], log["completions/mean_length"]
    assert passed > 0, "or this says nothing"
    assert log["rewards/unit_test_reward/mean"] == pytest.approx(passed - 0.01 * tokens / 100, abs=1e-6)
    assert log["rewards/partial_reward/mean"] == log["rewards/compiles_reward/mean"] == pytest.approx(passed)
    assert log["rewards/length_reward/mean"] == pytest.approx(-tokens / 100, abs=1e-6)


def test_missing_column_is_named(sandbox):
    columns = {"tests": [TEST], "task_id": ["one"], "completion_ids": [[1]], "trainer_state": None}
    there = "their columns are prompt, task_id, tests: add it, or name the column that holds it with test_column="
    for reward in (UnitTestReward(sandbox=sandbox), PartialReward(sandbox)):
        with pytest.raises(ValueError, match=f"the tasks have no column 'test', {there}"):
            reward(prompts=[PROMPT], completions=[""], **columns)
    reward = UnitTestReward(sandbox=sandbox, test_column="tests")
    with pytest.raises(ValueError, match="the tasks have no column 'entry_point', .* with entry_point_column="):
        reward(prompts=[PROMPT], completions=[""], **columns)


def test_partial_counts_one_assert_at_a_time(sandbox):
    completions = {
        "    return 2 * n": 1.0,
        "    return n": 0.25,  # right for 0
        "    return abs(2 * n)": 0.75,
        "    if n == 3:\n        raise SystemExit\n    return 2 * n": 0.0,  # a crash
        "    while True:\n        pass": 0.0,
        "    return 2 *": 0.0,
    }
    rows = {"test": [TWICE_TEST] * len(completions), "entry_point": ["twice"] * len(completions)}
    rewards = PartialReward(sandbox)(prompts=[TWICE] * len(completions), completions=list(completions), **rows)
    assert rewards == list(completions.values())
    chat = [[{"role": "user", "content": "Write twice(n)."}]]
    reply = [[{"role": "assistant", "content": "```python\ndef twice(n):\n    return n\n```"}]]
    assert partial_reward(chat, reply, test=[TWICE_TEST], entry_point=["twice"]) == [0.25]
    assert partial_reward([], [], test=[], entry_point=[]) == []
    broken = ["def check(:", "def check(candidate):\n    assert undefined(candidate)\n"]
    assert PartialReward(sandbox)([TWICE] * 2, ["    return 2 * n"] * 2, test=broken, entry_point=["twice"] * 2) == [
        None,
        None,
    ]


def test_split_tests_keep_what_they_need(sandbox):
    assert split_tests(TWICE_TEST)[2] == (
        "def check(candidate):\n    three = 3\n    for n in range(3):\n        assert candidate(n) == 2 * n"
    )
    assert split_tests("a = 1\nassert candidate(a) == 2\nassert candidate(0) == 0\n") == [
        "a = 1\nassert candidate(a) == 2",
        "a = 1\nassert candidate(0) == 0",
    ]
    no_assert = "def check(candidate):\n    verify(candidate)\n"
    assert split_tests(no_assert) == [no_assert]
    helper = "def check(f):\n\n    def same(x):\n        assert f(x) == x\n    assert True\n    same(1)"
    assert split_tests(helper) == [helper], "what asserts nothing of the candidate itself is no test"
    assert split_tests(f"{helper}\n    assert f(2) == 2") == [f"{helper}\n    assert f(2) == 2"]
    tasks = load_tasks("humaneval", "all")
    rows = [
        (task["prompt"], task["canonical_solution"], part, task["entry_point"])
        for task in tasks
        for part in split_tests(task["test"])
    ]
    assert len(rows) == 1133
    prompts, completions, tests, entry_points = zip(*rows, strict=True)
    rewards = UnitTestReward(0, sandbox)(prompts, completions, list(tests), list(entry_points))
    assert rewards == [1.0] * len(rows), "every part of every task passes for the reference solution"


def test_compiles_takes_hostile_text_as_data(sandbox):
    completions = {
        "    return 2 * n": 1.0,
        "": 1.0,
        "    raise SystemExit": 1.0,  # it is not run
        "    return 9 ** 9 ** 9 ** 9": 1.0,
        "    return 2 *": 0.0,
        "    return '\x00'": 0.0,
        "    return '\ud800'": 0.0,
        "(" * 100_000: 0.0,
        "    return " + "-" * 1_000_000 + "1": 0.0,
        "'''\nimport os\nSOURCE = 'pass'\n'''\"\"\"": 0.0,
    }
    rewards = CompilesReward(sandbox)([TWICE] * len(completions), list(completions))
    assert rewards == list(completions.values())
    assert compiles_reward([[]], [[{"role": "assistant", "content": "```\nx = 1\n```"}]]) == [1.0]


def test_length_and_pass_add_up_to_the_reward(sandbox):
    rows = {"prompts": [TWICE] * 2, "completions": ["    return 2 * n", "    return n"]}
    rows |= {"test": [TWICE_TEST] * 2, "entry_point": ["twice"] * 2, "completion_ids": [[7] * 10, [7] * 250]}
    assert length_reward(**rows) == [-0.1, -2.5]
    passed, lengths = UnitTestReward(0, sandbox)(**rows), length_reward(**rows)
    both = [p + 0.03 * t for p, t in zip(passed, lengths, strict=True)]
    assert UnitTestReward(0.03, sandbox)(**rows) == pytest.approx(both, abs=1e-12)


FENCED = "Here it is:\n```python\n{}\n```"
TWICE_REPLIES = {  # and the score of each
    FENCED.format("def twice(n):\n    return 2 * n"): 1.0,
    FENCED.format("def twice(n):\n    return n"): 0.0,
    FENCED.format("while True:\n    pass"): 0.0,
    "I cannot do that.": 0.0,
}


def test_verl_calls_the_reward_from_threads(tmp_path, sandbox, monkeypatch):
    """With the names that verl's reward managers pass, which run the function in an executor."""
    task = {"task_id": "mine/1", "prompt": TWICE, "test": TWICE_TEST, "entry_point": "twice", "canonical_solution": ""}
    monkeypatch.setattr(elsewhere, "default_sandbox", lambda: sandbox)
    rows = verl_rows(Dataset.from_list([task]))
    rows.to_parquet(tmp_path / "train.parquet")
    (read,) = load_tasks(str(tmp_path / "train.parquet"), "train")
    assert (read["test"], read["entry_point"]) == (TWICE_TEST, "twice")
    assert TWICE in read["prompt"][0]["content"], "text prompts become chat messages"

    def score(reply):
        row = rows[0]
        return compute_score(
            data_source=row["data_source"],
            solution_str=reply,
            ground_truth=row["reward_model"]["ground_truth"],
            extra_info={**row["extra_info"], "num_turns": 2, "rollout_reward_scores": {}},
            reward_router_address=None,
        )

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(score, list(TWICE_REPLIES) * 2)) == list(TWICE_REPLIES.values()) * 2


def test_verl_ground_truth_in_the_forms_of_its_data_sets():
    def score(truth, program, **extra_info):
        return compute_score("taco", FENCED.format(program), truth, extra_info)

    cases = {"inputs": ["2\n"], "outputs": ["3\n"]}
    assert score(json.dumps(cases), "print(int(input()) + 1)") == score(cases, "print(int(input()) + 1)") == 1.0
    assert score(cases, "print(4)") == 0.0
    method = json.dumps({"fn_name": "inc", "inputs": [[1]], "outputs": [2]})
    solution = "class Solution:\n    def inc(self, x):\n        return x + 1"
    assert score(method, solution, prompt="class Solution:\n    def inc(self, x):") == 1.0
    assert score(["assert inc(1) == 2"], "def inc(x):\n    return x + 1") == 1.0
    assert score({"test": "def check(f):\n    undefined(f)\n", "entry_point": "inc"}, "inc = abs") == 0.0, "not judged"
    # A class that only compares inline: elsewhere it cannot cross
    own = {"test": "def check(f):\n    assert type(f()).__name__ == 'Own'\n", "entry_point": "f", "inline": True}
    assert score(own, "class Own:\n    pass\n\ndef f():\n    return Own()") == 1.0
    assert score({**own, "inline": False}, "class Own:\n    pass\n\ndef f():\n    return Own()") == 0.0
    with pytest.raises(ValueError, match="ground_truth: the task makes no test: .*: leave the row out"):
        score({"functional": "def ("}, "inc = abs")


def test_verifiers_rubric_and_task_score_replies(sandbox, monkeypatch):
    monkeypatch.setattr(elsewhere, "default_sandbox", lambda: sandbox)
    columns = {"test": TWICE_TEST, "entry_point": "twice"}

    async def score(call):
        return await asyncio.gather(*(call(reply) for reply in TWICE_REPLIES))

    def as_rubric(reply):  # a rubric passes those of its objects whose names the function has
        return rubric_reward(completion=[{"role": "assistant", "content": reply}], info=columns)

    def as_task(reply):
        return task_reward(task=SimpleNamespace(**columns, prompt="Write it."), trace=SimpleNamespace(last_reply=reply))

    for call in (as_rubric, as_task, lambda reply: rubric_reward(reply, json.dumps(columns))):
        assert asyncio.run(score(call)) == list(TWICE_REPLIES.values())
    assert not {"states", "prompts", "completions", "answers", "tasks", "infos"} & set(
        inspect.signature(rubric_reward).parameters
    ), "a rubric would pass whole groups"
    with pytest.raises(ValueError, match="the task could not be judged: .*undefined"):
        asyncio.run(rubric_reward("def twice(n): ...", {**columns, "test": "def check(f):\n    undefined(f)\n"}))


def test_what_is_asked_for_meanwhile_runs_as_one_batch(monkeypatch):
    batches, started, go_on = [], threading.Event(), threading.Event()

    class Slow:
        def run(self, programs):
            batches.append(list(programs))
            started.set()
            assert go_on.wait(20)
            if "raise" in batches[-1]:
                raise RuntimeError("the sandbox is gone")
            return [Verdict("passed", program, 0.0) for program in batches[-1]]

    monkeypatch.setattr(elsewhere, "default_sandbox", Slow)
    batcher = elsewhere._Batcher()
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(batcher.run, "first")
        assert started.wait(20)
        others = [pool.submit(batcher.run, name) for name in "abcd"]
        while batcher._waiting.qsize() < 4:
            time.sleep(0.01)
        go_on.set()
        assert [future.result().detail for future in (first, *others)] == ["first", *"abcd"]
        assert [sorted(batch) for batch in batches] == [["first"], [*"abcd"]]
        with pytest.raises(RuntimeError, match="the sandbox is gone"):
            batcher.run("raise")
        assert batcher.run("after").detail == "after"
