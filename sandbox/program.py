"""What goes into a sandbox and what comes out: `Program` and `Verdict`.

Not covered here: how programs are run (__init__.py).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Program:
    """One solution and the tests that it must pass.

    Args:
        solution (`str`): Untrusted source of a Python module.
        tests (`str` or sequence of `str`): Trusted source. It may use `candidate`, the names of `entry_point` and
            `from solution import ...`, and define `check(candidate)`, which is then called. Several parts run one after
            another against the same solution process, each in a fresh namespace; a part that fails does not end the
            others.
        entry_point (`str`): The function that the solution must define. `"Solution().method"` calls a method of a fresh
            `Solution()` each time. `"f, g"` gives the tests several functions: `candidate` is the first, and the
            others are only needed when called. `"__main__"` makes the candidate a function that runs the solution as a
            script: stdin text in, printed text out.
        setup (`str`, defaults to `""`): Trusted source that is executed first, both in the solution's module and in
            that of the tests, such as a prompt's imports and helpers. A solution can read it.
        inline (`bool`, defaults to `False`): Run tests and solution in one interpreter, for tasks whose values cannot
            cross between processes. The solution can then cheat; a warning is logged. Tests are not checked to have
            called it: `invalid` is only what does not compile, or whose setup does not load. Not for scripts.

    Raises:
        `TypeError`: If a text is not a `str`.
    """

    solution: str
    tests: str | tuple[str, ...] | list[str]
    entry_point: str
    setup: str = ""
    inline: bool = False

    def __post_init__(self):
        if isinstance(self.tests, list):
            object.__setattr__(self, "tests", tuple(self.tests))
        parts = self.tests if isinstance(self.tests, tuple) else ()
        for name in ("solution", "tests", "entry_point", "setup"):
            kind = type(getattr(self, name))
            if kind is not str and not (name == "tests" and kind is tuple):
                raise TypeError(f"{name} of a Program is of type {kind.__name__}: give a str")
        for part in parts:
            if type(part) is not str:
                raise TypeError(f"a part of the tests of a Program is of type {type(part).__name__}: give a str")


@dataclass(frozen=True)
class Verdict:
    """The result of one program.

    Args:
        status (`str`): `passed`, `failed` (a test failed), `error` (the solution does not load, raised, or a value
            cannot cross), `timeout`, `out_of_memory`, `crashed` (its process died or exited) or `invalid` (the program
            could not be judged, for a reason that the solution had no part in: the setup or the tests do not load, fail
            before they have called it, or never call it).
        detail (`str`): One short line that explains the status; empty when passed.
        seconds (`float`): Wall-clock time that it took.
        passed_parts (`tuple[bool, ...]`): Whether each part of the tests passed; empty for tests of one text.
    """

    status: str
    detail: str
    seconds: float
    passed_parts: tuple[bool, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every test passed."""
        return self.status == "passed"


def failed_parts(program: Program) -> tuple[bool, ...]:
    """Return the `passed_parts` of a program that did not run to an end."""
    return () if isinstance(program.tests, str) else (False,) * len(program.tests)
