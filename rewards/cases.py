"""
Tests made of cases: what a script reads and prints, or a function's arguments and its result.

A task's cases are literals of one test text, which runs them one after the other in one process. Not covered: tasks
with several right answers, which need a checker of their own.
"""

import ast
import json
from typing import Any

# Their text begins every test made of cases
_HELPERS = """\
import json, math


def close(value, expected):
    return math.isclose(value, expected, rel_tol=1e-6, abs_tol=1e-6)
"""

_SCRIPT = """

def same_word(word, expected):
    if word == expected:
        return True
    try:
        if "".join([*word, *expected]).strip("+-0123456789") == "":
            return int(word) == int(expected)
        return close(float(word), float(expected))
    except ValueError:
        return False


def same_line(line, expected):
    if line == expected:
        return True
    words, wanted = line.split(), expected.split()
    has_number = any(letter.isdigit() for letter in expected)
    return has_number and len(words) == len(wanted) and all(map(same_word, words, wanted))


def check(candidate):
    for stdin, expected in CASES:
        lines = [line.strip() for line in candidate(stdin).strip().split("\\n")]
        wanted = [line.strip() for line in expected.strip().split("\\n")]
        assert len(lines) == len(wanted) and all(map(same_line, lines, wanted))
"""

_FUNCTION = """

def same(value, expected):
    if isinstance(value, (list, tuple)) and isinstance(expected, list):
        return len(value) == len(expected) and all(map(same, value, expected))
    if isinstance(value, dict) and isinstance(expected, dict):
        value = {{str(key): item for key, item in value.items()}}
        return value.keys() == expected.keys() and all(same(value[key], expected[key]) for key in expected)
    if isinstance(value, float) or isinstance(expected, float):
        numbers = type(value) in (int, float) and type(expected) in (int, float)
        return numbers and close(value, expected)
    return type(value) is type(expected) and value == expected


def check(candidate):
    for arguments, expected in CASES:
        result = candidate(*arguments)
        assert same(result, expected){wrapped}
"""
_WRAPPED = " or isinstance(expected, list) and len(expected) == 1 and same(result, expected[0])"


NO_JSON = "an argument or result of its cases is no JSON"


class NoCases(Exception):
    """Cases that make no test, with the reason to report."""


def read_cases(value: Any, function: str | None = None) -> tuple[str | None, list[tuple[Any, Any]]]:
    """
    Read the cases of a task, in any of the shapes that data sets have.

    Args:
        value (`list` or `dict`):
            A list of `{"input", "output"}`, perhaps with `fn_name`, `type` or `testtype`; or one dictionary of lists,
            `{"inputs", "outputs"}` or `{"input", "output"}`, perhaps with `fn_name`.
        function (`str`, *optional*):
            The function's name, where another field names it.

    Returns:
        `tuple`: The name of the function under test (`None` for a script), and the cases as pairs of input and output.

    Raises:
        NoCases: There are none, or they are of another shape.
    """
    if isinstance(value, dict):
        names = value.get("fn_name") or value.get("func_name")
        types = value.get("type") or value.get("testtype")
        inputs, outputs = (value.get(f"{name}s", value.get(name)) for name in ("input", "output"))
        if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
            raise NoCases("its cases are no inputs and as many outputs")
        cases = list(zip(inputs, outputs, strict=True))
        function = _first(names) or function
        kind = _first(types)
    elif isinstance(value, list) and all(
        isinstance(case, dict) and {"input", "output"} <= case.keys() for case in value
    ):
        cases = [(case["input"], case["output"]) for case in value]
        first = value[0] if value else {}
        function = first.get("fn_name") or function
        kind = first.get("testtype") or first.get("type")
    else:
        raise NoCases("its cases are no list of input and output")
    if not cases:
        raise NoCases("it has no cases")
    if kind in ("stdin", "stdin_stdout", "stdio"):
        return None, cases
    if kind in ("functional", "function_call") and not function:
        raise NoCases("its cases call a function without a name")
    return function or None, cases


def _first(value: Any) -> Any:
    """What all cases share, where a data set writes it once for each."""
    return next(iter(value), None) if isinstance(value, list) else value


def cases_test(
    cases: list[tuple[Any, Any]], is_script: bool, max_cases: int, max_case_bytes: int, wrapped: bool = False
) -> str:
    """
    Write the tests of a task from its cases.

    Args:
        cases (`list[tuple]`):
            Pairs of input and output. A script's are texts or lists of lines. A function's input is a list of arguments
            or a text with one JSON value a line, its output a value or such a text.
        is_script (`bool`):
            Whether the cases are those of a script.
        max_cases (`int`):
            Most cases to keep; of more, those with the longest inputs are kept.
        max_case_bytes (`int`):
            Most bytes of input and output that a case may have; longer ones are left out.
        wrapped (`bool`, *optional*, defaults to `False`):
            Whether a result alone equals an output that is a list of just this result.

    Returns:
        `str`: Python source that defines `check(candidate)`.

    Raises:
        NoCases: No case is left, or one is no JSON.
    """
    read = _script_case if is_script else _function_case
    texts = [json.dumps(read(*case)) for case in cases]
    texts = [text for text in texts if len(text) <= max_case_bytes]
    if not texts:
        raise NoCases(f"each of its cases has more than {max_case_bytes} bytes")
    longest = sorted(range(len(texts)), key=lambda i: -len(texts[i]))[:max_cases]
    literal = repr(f"[{', '.join(texts[i] for i in sorted(longest))}]")
    body = _SCRIPT if is_script else _FUNCTION.format(wrapped=_WRAPPED if wrapped else "")
    return f"{_HELPERS}\n\nCASES = json.loads({literal})\n{body}"


def _script_case(given: Any, printed: Any) -> list[str]:
    parts = ["" if part is None else part for part in (given, printed)]
    return ["\n".join(map(str, part)) if isinstance(part, list) else str(part) for part in parts]


def _function_case(arguments: Any, result: Any) -> list:
    if isinstance(arguments, str):
        arguments = [_value(line) for line in arguments.strip().split("\n")]
        result = _value(result) if isinstance(result, str) else result
    if not isinstance(arguments, list):
        arguments = [arguments]
    return [_plain(arguments), _plain(result)]


def _value(text: str) -> Any:
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            pass
    raise NoCases(NO_JSON)


def _plain(value: Any) -> Any:
    """Return a value as JSON has it, with tuples as lists."""
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _plain(part) for key, part in value.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise NoCases(NO_JSON)
