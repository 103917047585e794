"""
Formats of task files whose tests are cases (`cases.py`), and the form of verl, which holds any kind of test.

Not covered: data sets whose tests need a checker of their own, and functions whose arguments are no JSON.
"""

import ast
import base64
import json
import pickletools
import re
import zlib
from typing import Any

from .cases import NoCases, cases_test, read_cases
from .formats import Format, LeftOut, Row, ask, asserts_task, pytest_test, task

# What solutions of programming contests take for granted
PRELUDE = """\
import bisect, collections, functools, heapq, itertools, math, operator, random, re, string, sys
from bisect import *
from collections import *
from functools import *
from heapq import *
from itertools import *
from math import ceil, comb, floor, gcd, inf, log, sqrt
from typing import *
"""
MAX_TEXT = 1 << 28  # characters of LiveCodeBench's unpacked cases
PYTHON3 = 3  # Code-Contests' number of the language
_SEVERAL_ANSWERS = re.compile(
    r"multiple (?:\w+ )?(?:answers|solutions)|(?:print|output|find) any\b|any of them|any (?:valid|correct)", re.I
)
_TEXT_OPCODES = ("PROTO", "FRAME", "MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT", "STOP")
_TEXTS = ("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8")


def _json(row: Row, name: str, value: Any) -> Any:
    """A field that is JSON text, or data already."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise LeftOut(f"its field {name!r} is no JSON") from None


def _first_text(value: Any) -> str:
    """The first of the solutions, which may be a list, JSON text of one, or one text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return value
    return next((item for item in value if isinstance(item, str)), "") if isinstance(value, list) else ""


def _cases_task(
    row: Row,
    task_id: Any,
    question: Any,
    cases: Any,
    function: str | None = None,
    starter: str | None = None,
    reference: str = "",
    wrapped: bool = False,
) -> dict:
    starter = starter or ""
    try:
        if function is None and (method := re.search(r"^\s*def (\w+)\(", starter, re.M)):
            function = method[1] if "class Solution" in starter else None
        function, pairs = read_cases(cases, function)
        test = cases_test(pairs, function is None, row.max_cases, row.max_case_bytes, wrapped)
    except NoCases as reason:
        raise LeftOut(str(reason)) from None
    is_method = "class Solution" in starter or (not starter.strip() and "class Solution" in reference)
    entry_point = "__main__" if function is None else f"Solution().{function}" if is_method else function
    words = ask(question, entry_point, starter) if isinstance(question, str) else question
    return task(row, task_id, words, test, entry_point, reference, setup="" if function is None else PRELUDE)


def from_verifiable(row: Row) -> dict:
    """A row of open-r1's or PrimeIntellect's verifiable coding problems."""
    info = _json(row, "verification_info", row.get("verification_info"))
    if not isinstance(info, dict):
        raise row.error("verification_info", "write an object with 'test_cases'")
    if info.get("language", "python") not in ("python", "python3", None):
        raise LeftOut(f"its language is {info['language']}")
    question = row.text("problem_statement" if "problem_statement" in row.fields else "prompt")
    reference = row.get("gold_standard_solution") or ""
    return _cases_task(row, row.get("problem_id"), question, info.get("test_cases"), reference=reference, wrapped=True)


def from_apps(row: Row) -> dict:
    """A row of APPS, TACO or TACO-verified."""
    cases = _json(row, "input_output", row.get("input_output") or "null")
    question, reference = row.text("question"), _first_text(row.get("solutions"))
    task_id = row.get("id") if row.get("problem_id") is None else row.get("problem_id")
    return _cases_task(
        row, task_id, question, cases, starter=row.get("starter_code"), reference=reference, wrapped=True
    )


def from_deepcoder(row: Row) -> dict:
    """A row of DeepCoder-Preview."""
    metadata = _json(row, "metadata", row.get("metadata")) or {}
    cases = _json(row, "tests", row.get("tests"))
    function = metadata.get("func_name") if isinstance(metadata, dict) else None
    return _cases_task(
        row, row.get("problem_id"), row.text("problem"), cases, function, row.get("starter_code"),
        _first_text(row.get("solutions")), wrapped=True,
    )  # fmt: skip


def from_livecodebench(row: Row) -> dict:
    """A row of LiveCodeBench, with its public and private cases."""
    cases = []
    for name in ("public_test_cases", "private_test_cases"):
        value = row.get(name) or "[]"
        if isinstance(value, str) and not value.lstrip().startswith("["):
            value = unpack_text(row, name, value)
        part = _json(row, name, value)
        if not isinstance(part, list):
            raise row.error(name, "write JSON text of a list")
        cases += part
    metadata = _json(row, "metadata", row.get("metadata")) or {}
    return _cases_task(
        row, row.get("question_id"), row.text("question_content"), cases, metadata.get("func_name"),
        row.get("starter_code"),
    )  # fmt: skip


def unpack_text(row: Row, name: str, packed: str) -> str:
    """
    Unpack a text that was pickled, compressed and written in base64, without unpickling anything.

    Args:
        row (`Row`):
            The row that it is from, for errors.
        name (`str`):
            The field.
        packed (`str`):
            Its content.

    Returns:
        `str`: The text.

    Raises:
        ValueError: It is anything but one pickled text.
    """
    try:
        unpacker = zlib.decompressobj()
        data = unpacker.decompress(base64.b64decode(packed), MAX_TEXT)
        texts = []
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name in _TEXTS:
                texts.append(argument)
            elif opcode.name not in _TEXT_OPCODES:
                raise ValueError(f"the pickle holds {opcode.name}")
        (text,) = texts
    except (ValueError, zlib.error) as error:
        raise row.error(name, f"write JSON text, or base64 of zlib of one pickled text ({error})") from None
    return text


def from_code_contests(row: Row) -> dict:
    """A row of Code-Contests; tasks with several right answers are left out, for the set has no checker."""
    question = row.text("description")
    if _SEVERAL_ANSWERS.search(question):
        raise LeftOut("it has several right answers")
    if row.get("input_file") or row.get("output_file"):
        raise LeftOut("it reads or writes files")
    parts = [row.get(f"{kind}_tests") or {} for kind in ("public", "private", "generated")]
    cases = {name: [text for part in parts for text in part.get(name) or []] for name in ("input", "output")}
    solutions = row.get("solutions") or {}
    pairs = (
        zip(solutions.get("language") or [], solutions.get("solution") or [], strict=False)
        if isinstance(solutions, dict)
        else [(item.get("language"), item.get("solution")) for item in solutions]
    )
    reference = next((solution for language, solution in pairs if language in (PYTHON3, "PYTHON3")), "")
    return _cases_task(row, row.get("name"), question, cases, reference=reference)


def from_verl(row: Row) -> dict:
    """A row of the form that verl converts data sets to: messages, and tests in `reward_model.ground_truth`."""
    model = _json(row, "reward_model", row.get("reward_model"))
    truth = model.get("ground_truth") if isinstance(model, dict) else None
    if not truth:
        raise row.error("reward_model", "write an object with 'ground_truth'")
    truth = _json(row, "ground_truth", truth)
    prompt = row.get("prompt")
    prompt = prompt if isinstance(prompt, list) else row.text("prompt")
    extra = _json(row, "extra_info", row.get("extra_info"))
    index = extra.get("index") if isinstance(extra, dict) else None
    task_id = f"{row.get('data_source') or 'verl'}/{row.number if index is None else index}"
    words = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if isinstance(truth, dict) and isinstance(truth.get("test"), str) and isinstance(truth.get("entry_point"), str):
        made = task(row, task_id, words, truth["test"], truth["entry_point"], setup=truth.get("setup") or "")
        return made | ({"inline": True} if truth.get("inline") is True else {})
    if isinstance(truth, dict) and isinstance(truth.get("pytest"), str):
        return task(row, task_id, words, *pytest_test(truth["pytest"]))
    if isinstance(truth, dict) and isinstance(truth.get("functional"), str):
        return _functional_task(row, task_id, words, truth["functional"])
    if isinstance(truth, list) and all(isinstance(item, str) for item in truth):
        return asserts_task(row, task_id, words, truth)
    asked = " ".join(str(message.get("content")) for message in words)
    starter = "class Solution:\n" if "class Solution" in asked else ""
    return _cases_task(row, task_id, words, truth, wrapped=True, starter=starter)


def _functional_task(row: Row, task_id: str, words: list, source: str) -> dict:
    """Asserts, or a `check` that is called with the entry point at the end."""
    try:
        module = ast.parse(source)
    except (SyntaxError, ValueError):
        raise LeftOut("its tests are no Python") from None
    last = module.body[-1] if module.body else None
    if isinstance(last, ast.Expr) and isinstance(last.value, ast.Call) and ast.unparse(last.value.func) == "check":
        test = ast.unparse(ast.Module(module.body[:-1], type_ignores=[])) + "\n"
        return task(row, task_id, words, test, ast.unparse(last.value.args[0]), setup=PRELUDE)
    return asserts_task(row, task_id, words, [source])


CASE_FORMATS = (
    Format("verl", ("prompt", "reward_model"), from_verl),
    Format("open-r1's verifiable problems", ("problem_statement", "verification_info"), from_verifiable),
    Format("PrimeIntellect's verifiable problems", ("prompt", "verification_info"), from_verifiable),
    Format("APPS or TACO", ("question", "input_output"), from_apps),
    Format("DeepCoder", ("problem", "tests"), from_deepcoder),
    Format("LiveCodeBench", ("question_content", "public_test_cases", "private_test_cases"), from_livecodebench),
    Format("Code-Contests", ("description", "public_tests", "private_tests"), from_code_contests),
)
