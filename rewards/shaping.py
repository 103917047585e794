"""
Rewards to combine with the reward of `unit_tests.py`, for tasks on which a policy passes too seldom to learn from it.

Each is a TRL reward function; TRL sums them with `reward_weights`. A policy can earn each without a passing program:
the docstrings say how. So keep these weights low and watch the pass rate, not the sum. Tests and
programs run in the sandbox, and a program is not even parsed in the caller's process.
"""

import ast
import dataclasses
import functools

from sandbox import Program, Sandbox, Verdict

from .programs import program_source, task_program
from .unit_tests import default_sandbox, task_column, warn_of_invalid


class PartialReward:
    """
    Fraction of a task's tests that pass, run one after another in one process.

    A test is a statement in the body of `check` that asserts something (`assert True` does not, nor does the definition
    of a function); a loop of asserts is one test, and a `check` without asserts is one. The statements that assert
    nothing run before each of them. A completion that is stopped for its time, its memory or a crash earns 0. Tests
    that are no Python, or could not be judged for another reason, earn `None`, which TRL leaves out.

    Helps where a policy passes some tests of a task and never all, so that completions of one task differ in reward.
    Gamed by answers that are right by chance or in the plain cases: `return False` passes half of the tests of many a
    predicate, and special cases of the docstring's examples pass those. So its weight belongs well below that of the
    full pass, and it should go to zero once the policy passes now and then.

    Args:
        sandbox ([`~sandbox.Sandbox`], *optional*):
            Where the programs run. If `None`, the one that rewards share.
        test_column (`str`, *optional*, defaults to `"test"`):
            The tasks' column that holds their tests.
        entry_point_column (`str`, *optional*, defaults to `"entry_point"`):
            The tasks' column that holds the name of the function under test.
    """

    def __init__(
        self, sandbox: Sandbox | None = None, test_column: str = "test", entry_point_column: str = "entry_point"
    ):
        self._sandbox = sandbox
        self.test_column = test_column
        self.entry_point_column = entry_point_column
        self.__name__ = "partial"

    def __call__(self, prompts: list, completions: list, **kwargs) -> list[float | None]:
        """
        Grade a batch of completions.

        Args:
            prompts (`list[str]` or `list[list[dict]]`):
                Prompts, plain text or chat messages.
            completions (`list[str]` or `list[list[dict]]`):
                One completion a prompt, in the same form.
            **kwargs:
                The task columns and whatever else the trainer passes.

        Returns:
            `list[float | None]`: One reward a completion, in order, from 0 to 1; `None` where it could not be judged.

        Raises:
            ValueError: A column of the tasks is missing.
        """
        sandbox = self._sandbox or default_sandbox()
        tests = task_column(kwargs, self.test_column, "test_column")
        entry_points = task_column(kwargs, self.entry_point_column, "entry_point_column")
        setups, inlines = kwargs.get("setup") or [""] * len(prompts), kwargs.get("inline") or [False] * len(prompts)
        programs = [
            dataclasses.replace(task_program(*row), tests=split_tests(row[2]))
            for row in zip(prompts, completions, tests, entry_points, setups, inlines, strict=True)
        ]
        verdicts = sandbox.run(programs)
        warn_of_invalid(verdicts)
        return [None if verdict.status == "invalid" else _fraction(verdict) for verdict in verdicts]


def _fraction(verdict: Verdict) -> float:
    was_stopped = verdict.status not in ("passed", "failed", "error")
    return 0.0 if was_stopped or not verdict.passed_parts else sum(verdict.passed_parts) / len(verdict.passed_parts)


@functools.lru_cache(maxsize=1024)
def split_tests(test: str) -> list[str]:
    """
    A task's tests, one by one.

    Args:
        test (`str`):
            Trusted text that defines `check(candidate)`, or asserts at its top level.

    Returns:
        `list[str]`: For each statement of `check` that asserts something the text with this one alone, after the
        statements before it that assert nothing. The text itself where there is none.
    """
    try:
        module = ast.parse(test)
    except (SyntaxError, ValueError):
        return [test]  # the sandbox says what is wrong with it
    checks = [node for node in module.body if isinstance(node, ast.FunctionDef) and node.name == "check"]
    holder = checks[-1] if checks else module
    setup, parts = [], []
    for statement in holder.body:
        if _asserts(statement):
            holder.body = [*setup, statement]
            parts.append(ast.unparse(module))
        else:
            setup.append(statement)
    return parts or [test]


def _asserts(node: ast.AST) -> bool:
    if isinstance(node, ast.Assert):
        return not isinstance(node.test, ast.Constant)
    is_definition = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda)
    return not is_definition and any(map(_asserts, ast.iter_child_nodes(node)))


class CompilesReward:
    """
    1 if the program is valid Python, 0 if it is not; nothing of it is run.

    The program's text is handed to `compile` as data, in the cage of the sandbox: a text nested a million deep can
    exhaust or crash a parser, and that is the caged process's end alone.

    Helps a base that writes prose or breaks off in the middle of a line. Gamed by the shortest valid program: `pass`,
    a comment, or an empty completion after a docstring. It says nothing about being right, so use it for the first
    steps only.

    Args:
        sandbox ([`~sandbox.Sandbox`], *optional*):
            Where the programs are parsed. If `None`, the one that rewards share.
    """

    def __init__(self, sandbox: Sandbox | None = None):
        self._sandbox = sandbox
        self.__name__ = "compiles"

    def __call__(self, prompts: list, completions: list, **kwargs) -> list[float]:
        """
        Grade a batch of completions.

        Args:
            prompts (`list[str]` or `list[list[dict]]`):
                Prompts, plain text or chat messages.
            completions (`list[str]` or `list[list[dict]]`):
                One completion a prompt, in the same form.
            **kwargs:
                The task column `entry_point`, where there is one, and whatever else the trainer passes.

        Returns:
            `list[float]`: 1.0 or 0.0 a completion, in order.
        """
        entry_points = kwargs.get("entry_point") or [""] * len(prompts)
        programs = [
            Program(
                # ascii() makes any text, NUL bytes and lone surrogates included, one literal that only means itself
                f"SOURCE = {ascii(program_source(prompt, completion, entry_point))}\n"
                "def parses():\n"
                "    compile(SOURCE, 'program', 'exec', dont_inherit=True)\n"
                "    return True\n",
                tests="assert candidate() is True",
                entry_point="parses",
            )
            for prompt, completion, entry_point in zip(prompts, completions, entry_points, strict=True)
        ]
        return [float(verdict.passed) for verdict in (self._sandbox or default_sandbox()).run(programs)]


def length_reward(completion_ids: list[list[int]], **kwargs) -> list[float]:
    r"""
    Minus the generated tokens, in hundreds, the EOS token included: \\( -T / 100 \\).

    `UnitTestReward(length_penalty=0)` and this with a weight of α add up to the reward with a penalty of α, and TRL
    then logs the two apart. Helps a policy that passes to do so in fewer tokens. Gamed by writing nothing: where few
    completions of a batch pass, the empty one is the best, so the weight must stay small beside the pass rate.

    Args:
        completion_ids (`list[list[int]]`):
            The generated token ids.
        **kwargs:
            Whatever else the trainer passes; not used.

    Returns:
        `list[float]`: One reward a completion, in order, at most 0.
    """
    return [-len(ids) / 100 for ids in completion_ids]


_partial, _compiles = PartialReward(), CompilesReward()


def partial_reward(prompts: list, completions: list, **kwargs) -> list[float | None]:
    """[`PartialReward`] with its defaults, as a function with a dotted path; see there how it is gamed."""
    return _partial(prompts, completions, **kwargs)


def compiles_reward(prompts: list, completions: list, **kwargs) -> list[float]:
    """[`CompilesReward`] with its defaults, as a function with a dotted path; see there how it is gamed."""
    return _compiles(prompts, completions, **kwargs)
