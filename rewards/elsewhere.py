"""
The reward of `unit_tests.py` under the signatures of other frameworks: verl, and both forms of verifiers.

These frameworks ask for one completion at a time, from several threads at once, and count no tokens for the reward. So
a function returns 1 if every test passes and 0 otherwise; a penalty for length is the framework's. Not covered: plain
text prompts, because verl passes no prompt: the program is found in a chat reply ([`program_source`](programs.py)).
"""

import asyncio
import functools
import json
import queue
import threading
from concurrent.futures import Future
from typing import Any

from datasets import Dataset

from sandbox import Program, Verdict

from .case_formats import from_verl
from .chat import as_chat
from .formats import LeftOut, Row
from .programs import task_program
from .unit_tests import default_sandbox, warn_of_invalid


def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: dict | None = None, **kwargs
) -> float:
    """
    Score a reply, as verl calls its custom reward function.

    Args:
        data_source (`str`):
            The data set's name; not used.
        solution_str (`str`):
            The reply.
        ground_truth (`str`, `dict` or `list`):
            The tests: JSON of `{"test", "entry_point", "setup", "inline"}`, as [`verl_rows`] writes it, or any other
            form of tests that [`load_tasks`](tasks.py) reads from verl's files (cases, asserts, pytest).
        extra_info (`dict`, *optional*):
            The row's other information. Cases of a method need the question in its `prompt`, which says whether the
            method's class is `Solution`.
        **kwargs:
            Whatever else verl passes; not used.

    Returns:
        `float`: 1.0 or 0.0. Also 0.0, with a warning in the log, where the task could not be judged: verl has no way to
        leave a completion out.

    Raises:
        ValueError: `ground_truth` holds no tests that can be read.
    """
    truth = ground_truth if isinstance(ground_truth, str) else json.dumps(ground_truth)
    question = (extra_info or {}).get("prompt") or ""
    tests = _tests(truth, question if isinstance(question, str) else json.dumps(question))
    verdict = _verdict(solution_str, **tests)
    return float(verdict.passed)


def verl_rows(tasks: Dataset, data_source: str = "unit_tests") -> Dataset:
    """
    Return tasks in the form of verl's data files, for `to_parquet`.

    Args:
        tasks ([`~datasets.Dataset`]):
            Tasks from [`load_tasks`](tasks.py). Text prompts become chat messages.
        data_source (`str`, *optional*, defaults to `"unit_tests"`):
            The name under which verl reports them.

    Returns:
        [`~datasets.Dataset`] with the columns `data_source`, `prompt`, `ability`, `reward_model` and `extra_info`.
    """
    return Dataset.from_list(
        [
            {
                "data_source": data_source,
                "prompt": task["prompt"],
                "ability": "code",
                "reward_model": {"style": "rule", "ground_truth": json.dumps(_columns(task))},
                "extra_info": {"index": index, "task_id": task["task_id"]},
            }
            for index, task in enumerate(as_chat(tasks).to_list())
        ]
    )


async def rubric_reward(completion: str | list, info: str | dict) -> float:
    """
    Score a reply, as `verifiers.Rubric` calls its functions (verifiers before 0.4).

    Args:
        completion (`str` or `list`):
            The reply, text or messages.
        info (`dict` or `str`):
            The row's column of this name: a dictionary, or JSON of one, with `test`, `entry_point` and, where there are
            any, `setup` and `inline`.

    Returns:
        `float`: 1.0 or 0.0.

    Raises:
        ValueError: The task could not be judged. A rubric logs this and pays 0.
    """
    info = json.loads(info) if isinstance(info, str) else info
    reply = completion if isinstance(completion, str) else completion[-1]["content"]
    return await _passed(reply or "", _columns(info))


async def task_reward(task: Any, trace: Any) -> float:
    """
    Score a rollout's last reply, as a task of `verifiers.v1` calls its reward functions.

    Args:
        task (`verifiers.v1.TaskData`):
            The task's data, with the fields `test`, `entry_point` and, where there are any, `setup` and `inline`.
        trace (`verifiers.v1.Trace`):
            The rollout.

    Returns:
        `float`: 1.0 or 0.0.

    Raises:
        ValueError: The task could not be judged. verifiers records it as the rollout's error.
    """
    return await _passed(trace.last_reply, _columns(vars(task)))


def _columns(task: Any) -> dict[str, Any]:
    required = {"test": task["test"], "entry_point": task["entry_point"]}
    return required | {"setup": task.get("setup") or "", "inline": bool(task.get("inline"))}


async def _passed(reply: str, tests: dict[str, Any]) -> float:
    verdict = await asyncio.to_thread(_verdict, reply, **tests)
    if verdict.status == "invalid":
        raise ValueError(f"the task could not be judged: {verdict.detail}")
    return float(verdict.passed)


@functools.lru_cache(maxsize=4096)
def _tests(ground_truth: str, question: str) -> dict[str, Any]:
    """A row's test, entry point, setup and whether it is graded inline."""
    prompt = [{"role": "user", "content": question}]
    try:
        task = from_verl(Row("ground_truth", {"prompt": prompt, "reward_model": {"ground_truth": ground_truth}}))
    except LeftOut as reason:
        raise ValueError(f"ground_truth: the task makes no test: {reason}: leave the row out") from None
    return _columns(task)


def _verdict(reply: str, test: str, entry_point: str, setup: str, inline: bool) -> Verdict:
    return _batcher.run(task_program([], reply, test, entry_point, setup, inline))


class _Batcher:
    """Run what several threads ask for while a batch runs as the next batch, so that all workers are used."""

    def __init__(self):
        self._waiting: queue.SimpleQueue[tuple[Program, Future[Verdict]]] = queue.SimpleQueue()
        self._turn = threading.Lock()

    def run(self, program: Program) -> Verdict:
        future: Future[Verdict] = Future()
        self._waiting.put((program, future))
        with self._turn:
            if not future.done():
                batch = [self._waiting.get() for _ in range(self._waiting.qsize())]
                try:
                    verdicts = default_sandbox().run(program for program, _ in batch)
                except BaseException as error:
                    for _, asked in batch:
                        asked.set_exception(error)
                    raise
                for (_, asked), verdict in zip(batch, verdicts, strict=True):
                    asked.set_result(verdict)
                warn_of_invalid(verdicts)
        return future.result()


_batcher = _Batcher()
