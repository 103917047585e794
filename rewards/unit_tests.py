"""
The reward: 1 if every unit test passes, minus a penalty per generated token.

A TRL reward function, so it plugs into `GRPOTrainer`, `RLOOTrainer` and the trainers of this project alike. The tests
run in the sandbox, never in the caller's process. Not covered: partial credit, which is in `shaping.py`.
"""

import functools
import logging
from collections import Counter
from collections.abc import Callable, Sequence

from sandbox import Sandbox, Verdict

from .programs import task_program

logger = logging.getLogger(__name__)

# By what the sandbox says about a program that it could not judge
INVALID_CAUSES = {
    "not load": "tests_do_not_load",
    "never call": "tests_never_call",
    "cannot cross": "value_cannot_cross",
    "its worker": "worker_lost",
}


@functools.cache
def default_sandbox() -> Sandbox:
    """
    The sandbox of all rewards that were given none, started at the first call.

    Returns:
        [`~sandbox.Sandbox`]
    """
    return Sandbox()


def task_column(columns: dict, name: str, setting: str) -> list:
    """
    A task column that a trainer passed to a reward.

    Args:
        columns (`dict`):
            Everything the trainer passed; columns are the lists in it.
        name (`str`):
            The column's name.
        setting (`str`):
            The reward's argument that sets this name.

    Returns:
        `list`: One value a completion.

    Raises:
        ValueError: There is no such column.
    """
    if columns.get(name) is None:
        there = sorted(key for key, value in columns.items() if isinstance(value, list) and key != "completion_ids")
        raise ValueError(
            f"the tasks have no column {name!r}, their columns are {', '.join(['prompt', *there])}: "
            f"add it, or name the column that holds it with {setting}=..."
        )
    return columns[name]


def warn_of_invalid(verdicts: Sequence[Verdict]) -> Counter[str]:
    """
    Count the programs of a batch that could not be judged, and warn if they are more than a tenth.

    Args:
        verdicts (`Sequence[Verdict]`):
            The verdicts of the batch.

    Returns:
        `Counter[str]`: Programs by cause: a value of [`INVALID_CAUSES`], or `"tests_fail"` for tests that fail before
        they have called the solution.
    """
    details = [verdict.detail for verdict in verdicts if verdict.status == "invalid"]
    if len(details) * 10 > len(verdicts):
        logger.warning(
            "%d of %d programs could not be judged and get no reward. The first: %s. Check the tasks' tests and setup.",
            len(details),
            len(verdicts),
            details[0],
        )
    return Counter(
        next((cause for words, cause in INVALID_CAUSES.items() if words in detail), "tests_fail") for detail in details
    )


class UnitTestReward:
    r"""
    Reward of a completion: \\( R = \mathbb{1}[\text{every test passes}] - \alpha \cdot T / 100 \\), where T counts the
    generated tokens, the EOS token included, and α is `length_penalty`.

    Example:

    ```python
    from datasets import Dataset
    from rewards import UnitTestReward, load_tasks
    from trl import GRPOTrainer

    trainer = GRPOTrainer(
        model="Qwen/Qwen2.5-Coder-0.5B-Instruct",
        reward_funcs=UnitTestReward(length_penalty=0.01),
        train_dataset=load_tasks("humaneval", "train"),
    )
    ```

    Args:
        length_penalty (`float`, *optional*, defaults to `0.01`):
            Price of 100 generated tokens, at least 0. With 0 no token counts are needed.
        sandbox ([`~sandbox.Sandbox`] or [`~sandbox.RaySandbox`], *optional*):
            Where the programs run. If `None`, a `Sandbox` with the defaults, which all such rewards of a process
            share, is started at the first call.
        test_column (`str`, *optional*, defaults to `"test"`):
            The tasks' column that holds their tests.
        entry_point_column (`str`, *optional*, defaults to `"entry_point"`):
            The tasks' column that holds the name of the function under test.
        penalize_failures (`bool`, *optional*, defaults to `True`):
            Whether a completion that fails pays for its length too, as published. With `False` every failure gets 0,
            so that a policy cannot earn by failing in fewer tokens.

    Raises:
        ValueError: `length_penalty` is negative.
    """

    def __init__(
        self,
        length_penalty: float = 0.01,
        sandbox: Sandbox | None = None,
        test_column: str = "test",
        entry_point_column: str = "entry_point",
        penalize_failures: bool = True,
    ):
        if not length_penalty >= 0:
            raise ValueError(f"length_penalty is {length_penalty}: write 0 or more, it is subtracted from the reward")
        self.length_penalty = length_penalty
        self._sandbox = sandbox
        self.test_column = test_column
        self.entry_point_column = entry_point_column
        self.penalize_failures = penalize_failures
        self.__name__ = "unit_tests"  # TRL names a reward function's metrics by this

    def __call__(
        self,
        prompts: list,
        completions: list,
        test: list[str] | None = None,
        entry_point: list[str] | None = None,
        setup: list[str] | None = None,
        inline: list[bool] | None = None,
        completion_ids: list[list[int]] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        log_extra: Callable[[str, list], None] | None = None,
        **kwargs,
    ) -> list[float | None]:
        """
        Grade a batch of completions.

        Args:
            prompts (`list[str]` or `list[list[dict]]`):
                Prompts, plain text or chat messages.
            completions (`list[str]` or `list[list[dict]]`):
                One completion a prompt, in the same form.
            test (`list[str]`, *optional*):
                Each task's tests, trusted text that defines `check(candidate)`; needed unless `test_column` names
                another column.
            entry_point (`list[str]`, *optional*):
                The name of the function under test; needed unless `entry_point_column` names another column.
            setup (`list[str]`, *optional*):
                Trusted code that a task's solution and tests may both count on.
            inline (`list[bool]`, *optional*):
                Whether a task's tests and solutions share an interpreter, for values that cannot cross between two.
                The solutions of such a task can cheat, and the sandbox logs a warning.
            completion_ids (`list[list[int]]`, *optional*):
                The generated token ids, EOS included; needed unless `length_penalty` is 0.
            log_metric (`Callable`, *optional*):
                TRL's hook for scalar metrics.
            log_extra (`Callable`, *optional*):
                TRL's hook for columns of the completions table.
            **kwargs:
                The task's other columns, among them those that `test_column` and `entry_point_column` name, and
                whatever else the trainer passes.

        Returns:
            `list[float | None]`: One reward a completion, in order; `None` where the task could not be judged, for
            a reason in which the completion had no part. TRL leaves such a completion out.

        Raises:
            ValueError: A column of the tasks is missing, or `completion_ids` where `length_penalty` is above 0.
        """
        if self.length_penalty and completion_ids is None:
            raise ValueError("length_penalty needs completion_ids, the generated tokens: pass them or set it to 0")
        columns = {**kwargs, "test": test, "entry_point": entry_point}
        tests = task_column(columns, self.test_column, "test_column")
        entry_points = task_column(columns, self.entry_point_column, "entry_point_column")
        setups, inlines = setup or [""] * len(prompts), inline or [False] * len(prompts)
        rows = zip(prompts, completions, tests, entry_points, setups, inlines, strict=True)
        verdicts = (self._sandbox or default_sandbox()).run([task_program(*row) for row in rows])
        lengths = [len(ids) for ids in completion_ids] if completion_ids is not None else [0] * len(completions)

        causes = warn_of_invalid(verdicts)
        judged = len(verdicts) - causes.total()
        if log_metric is not None and verdicts:
            for cause, number in causes.items():
                log_metric(f"invalid/{cause}", number)
            if judged:
                log_metric("pass_rate", sum(verdict.passed for verdict in verdicts) / judged)
                log_metric("timeout_rate", sum(verdict.status == "timeout" for verdict in verdicts) / judged)
            log_metric("completion_tokens", sum(lengths) / len(lengths))
        if log_extra is not None:
            log_extra("verdict", [verdict.status for verdict in verdicts])
            log_extra("completion_tokens", lengths)
        return [
            None if verdict.status == "invalid" else self._reward(verdict.passed, length)
            for verdict, length in zip(verdicts, lengths, strict=True)
        ]

    def _reward(self, passed: bool, length: int) -> float:
        pays = passed or self.penalize_failures
        return float(passed) - (self.length_penalty * length / 100 if pays else 0.0)


_unit_tests = UnitTestReward()


def unit_test_reward(prompts: list, completions: list, **kwargs) -> list[float | None]:
    """
    [`UnitTestReward`] with its defaults, as a function, so that TRL's command line finds it by its dotted path:
    `trl grpo --reward_funcs rewards.unit_test_reward ...`.

    Args:
        prompts (`list[str]` or `list[list[dict]]`):
            Prompts, plain text or chat messages.
        completions (`list[str]` or `list[list[dict]]`):
            One completion a prompt, in the same form.
        **kwargs:
            `completion_ids`, the task columns `test` and `entry_point`, and whatever else the trainer passes.

    Returns:
        `list[float | None]`: One reward a completion, in order; `None` where the task could not be judged.
    """
    return _unit_tests(prompts, completions, **kwargs)
