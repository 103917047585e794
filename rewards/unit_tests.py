"""
The reward: 1 if every unit test passes, minus a price for every generated token.

A TRL reward function, so it plugs into `GRPOTrainer`, `RLOOTrainer` and the trainers of this project alike. The tests
run in the sandbox, never in the caller's process. Not covered: partial credit.
"""

from collections.abc import Callable

from sandbox import Sandbox

from .programs import task_program


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
            Where the programs run. If `None`, a `Sandbox` with the defaults is started at the first call.

    Raises:
        ValueError: `length_penalty` is negative.
    """

    def __init__(self, length_penalty: float = 0.01, sandbox: Sandbox | None = None):
        if not length_penalty >= 0:
            raise ValueError(f"length_penalty is {length_penalty}: write 0 or more, it is subtracted from the reward")
        self.length_penalty = length_penalty
        self._sandbox = sandbox
        self.__name__ = "unit_tests"  # TRL names a reward function's metrics by this

    def __call__(
        self,
        prompts: list,
        completions: list,
        test: list[str],
        entry_point: list[str],
        completion_ids: list[list[int]] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        log_extra: Callable[[str, list], None] | None = None,
        **kwargs,
    ) -> list[float]:
        """
        Grade a batch of completions.

        Args:
            prompts (`list[str]` or `list[list[dict]]`):
                Prompts, plain text or chat messages.
            completions (`list[str]` or `list[list[dict]]`):
                One completion a prompt, in the same form.
            test (`list[str]`):
                Each task's tests, trusted text that defines `check(candidate)`.
            entry_point (`list[str]`):
                The name of the function under test.
            completion_ids (`list[list[int]]`, *optional*):
                The generated token ids, EOS included; needed unless `length_penalty` is 0.
            log_metric (`Callable`, *optional*):
                TRL's hook for scalar metrics.
            log_extra (`Callable`, *optional*):
                TRL's hook for columns of the completions table.
            **kwargs:
                The task's other columns and whatever else the trainer passes; not used.

        Returns:
            `list[float]`: One reward a completion, in order.

        Raises:
            ValueError: `length_penalty` is above 0 and `completion_ids` is missing.
        """
        if self.length_penalty and completion_ids is None:
            raise ValueError("length_penalty needs completion_ids, the generated tokens: pass them or set it to 0")
        if self._sandbox is None:
            self._sandbox = Sandbox()
        verdicts = self._sandbox.run(
            [task_program(*task) for task in zip(prompts, completions, test, entry_point, strict=True)]
        )
        lengths = [len(ids) for ids in completion_ids] if completion_ids is not None else [0] * len(completions)

        if log_metric is not None and verdicts:
            log_metric("pass_rate", sum(verdict.passed for verdict in verdicts) / len(verdicts))
            log_metric("timeout_rate", sum(verdict.status == "timeout" for verdict in verdicts) / len(verdicts))
            log_metric("completion_tokens", sum(lengths) / len(lengths))
        if log_extra is not None:
            log_extra("verdict", [verdict.status for verdict in verdicts])
            log_extra("completion_tokens", lengths)
        return [
            float(verdict.passed) - self.length_penalty * length / 100
            for verdict, length in zip(verdicts, lengths, strict=True)
        ]
