"""
Formats of task files, recognised by their columns, and how a row of each becomes a task.

Tasks whose tests are Python source are read here; tests made of cases in `case_formats.py`.
"""

import ast
import builtins
import re
from collections.abc import Callable
from dataclasses import dataclass
from textwrap import indent
from typing import Any

from .chat import python_block
from .programs import parse_prompt, program_source, prompt_setup

COLUMNS = ("task_id", "prompt", "canonical_solution", "test", "entry_point")
ENTRY_POINT = re.compile(r"[^\W\d]\w*(?:, *[^\W\d]\w*)*|[^\W\d]\w*\(\)\.[^\W\d]\w*")
FOUR_SPACES = " " * 4


class LeftOut(Exception):
    """A row of a public data set that makes no task, with the reason to report."""


@dataclass(frozen=True)
class Row:
    """
    A row and its location.

    Args:
        where (`str`):
            File and line.
        fields (`dict`):
            The row.
        number (`int`):
            Its number in the source, from 1.
        max_cases (`int`):
            Most cases a task may have.
        max_case_bytes (`int`):
            Most bytes a case may have.
    """

    where: str
    fields: dict[str, Any]
    number: int = 1
    max_cases: int = 15
    max_case_bytes: int = 100_000

    def get(self, name: str) -> Any:
        """Return a field, or `None`."""
        return self.fields.get(name)

    def text(self, name: str) -> str:
        """Return a field that must be a non-empty string."""
        value = self.get(name)
        if not isinstance(value, str) or not value.strip():
            raise self.error(name, "write a non-empty string")
        return value

    def error(self, name: str, hint: str) -> ValueError:
        """Return the error of a field: its location, what was found, and what to write."""
        found = f"is {self.get(name)!r:.60}" if name in self.fields else "is missing"
        return ValueError(f"{self.where}: field {name!r} {found}: {hint}")


def task(row: Row, task_id: str, question: Any, test: str, entry_point: str, reference: str = "", **more: str) -> dict:
    """Make a task that is asked in words; `question` may be messages already."""
    messages = question if isinstance(question, list) else [{"role": "user", "content": question}]
    reference = program_source([], reference, entry_point) if reference else ""
    return {
        "task_id": str(row.number if task_id in (None, "") else task_id),
        "prompt": [{"role": message["role"], "content": message["content"]} for message in messages],
        "canonical_solution": reference,
        "test": test,
        "entry_point": entry_point,
        "setup": more.get("setup", ""),
    }


def ask(question: str, entry_point: str, starter: str | None = None) -> str:
    """Ask a question in words so that the answer has the form that its tests expect."""
    if starter and starter.strip():
        question += f"\n\nComplete this code:\n\n{python_block(starter)}"
    elif entry_point == "__main__":
        question += "\n\nWrite a Python program that reads stdin and prints the answer."
    elif not re.search(rf"\b{re.escape(entry_point)}\b", question):
        question += f"\n\nDefine `{entry_point}`."
    return f"{question}\n\nAnswer with one Python code block."


def from_humaneval(row: Row) -> dict:
    """A row with HumanEval's columns; a prompt may be code to continue, messages, or words, which become messages."""
    if isinstance(row.get("task_id"), int) and not isinstance(row.get("task_id"), bool):
        row.fields["task_id"] = str(row.get("task_id"))
    task_id, entry_point, prompt = row.text("task_id"), row.text("entry_point"), row.get("prompt")
    if not ENTRY_POINT.fullmatch(entry_point):
        raise row.error("entry_point", "write the name of one function, 'Solution().method' or '__main__'")
    if isinstance(prompt, list):
        if not prompt or not all(
            isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
            for message in prompt
        ):
            raise row.error("prompt", 'write text or messages, [{"role": "user", "content": "..."}]')
        prompt = [{"role": message["role"], "content": message["content"]} for message in prompt]
    elif parse_prompt(row.text("prompt")) is None:
        prompt = [{"role": "user", "content": prompt}]
    for name in ("canonical_solution", "setup"):
        if row.get(name) is not None and not isinstance(row.get(name), str):
            raise row.error(name, "write a string, or leave the field out")
    setup = row.get("setup") or (prompt_setup(prompt, entry_point) if isinstance(prompt, str) else "")
    for name, source in (("test", row.text("test")), ("setup", setup)):
        try:
            tree = ast.parse(source, name)
        except (SyntaxError, ValueError) as error:
            raise ValueError(f"{row.where}: field {name!r} is not Python: {error}") from None
        if name == "test" and not any(isinstance(node, ast.FunctionDef) and node.name == "check" for node in tree.body):
            raise ValueError(f"{row.where}: field 'test' defines no function check(candidate)")
    pass_rate = row.get("pass_rate")
    if pass_rate is not None and not isinstance(pass_rate, int | float):
        raise row.error("pass_rate", "write a number from 0 to 1, or leave the field out")
    if row.get("inline") not in (None, True, False):
        raise row.error("inline", "write true or false, or leave the field out")
    if row.get("inline") and entry_point == "__main__":
        raise row.error("inline", "leave the field out: a script has a process of its own")
    return {
        "task_id": task_id,
        "prompt": prompt,
        "canonical_solution": row.get("canonical_solution") or "",
        "test": row.text("test"),
        "entry_point": entry_point,
        "setup": setup,
        **({} if pass_rate is None else {"pass_rate": float(pass_rate)}),
        **({} if row.get("inline") is None else {"inline": bool(row.get("inline"))}),
    }


def from_leetcode(row: Row) -> dict:
    """A row of LeetCodeDataset: methods of a class, with the prompt's imports as setup."""
    if re.search(r"\b(?:list|tree)_node\(", row.text("test")):
        raise LeftOut("its tests pass linked lists or trees")
    entry_point = row.text("entry_point")
    return task(
        row, row.text("task_id"), row.text("query"), row.text("test"), entry_point, row.get("completion") or "",
        setup=row.get("prompt") or "",
    )  # fmt: skip


def from_mbpp(row: Row) -> dict:
    """
    A row of MBPP, MBPP sanitized or MBPP+ (which has stricter tests in `test`).

    The prompt is what precedes the function's body (imports, helpers, signature) with the task's text and the
    first test as the docstring, so that a completion is a body, as in HumanEval.
    """
    words = "text" if "text" in row.fields else "prompt"
    for field in (words, "code", "test_list", "task_id"):
        if not row.get(field):
            raise ValueError(f"{row.where}: field {field!r} is missing or empty, and MBPP's format needs it")
    before_tests = row.get("test_setup_code") or "\n".join(row.get("test_imports") or [])
    try:
        program, setup = ast.parse(row.get("code")), ast.parse(before_tests)
        tests = [ast.parse(test) for test in row.get("test_list")]
        stricter = ast.parse(row.get("test") or "")
    except (SyntaxError, ValueError) as error:
        raise ValueError(
            f"{row.where}: field 'code', 'test_setup_code', 'test_list' or 'test' is not Python: {error}"
        ) from None
    functions = {node.name: node for node in program.body if isinstance(node, ast.FunctionDef)}
    called = [name for test in tests for name in _called(test) if name in functions]
    if not called:
        raise ValueError(f"{row.where}: field 'test_list' calls no function that 'code' defines")
    entry_point, function = called[0], functions[called[0]]
    at = program.body.index(function)

    before = "".join(ast.unparse(node) + "\n\n" for node in program.body[:at])
    docstring = f"{row.get(words).strip()}\n{row.get('test_list')[0].strip()}".replace("\\", "\\\\").replace(
        '"""', "'''"
    )
    body = function.body[1:] if ast.get_docstring(function) and len(function.body) > 1 else function.body
    after = [ast.unparse(node) for node in program.body[at + 1 :]]
    reference = "\n".join([indent("\n".join(map(ast.unparse, body)), FOUR_SPACES), *after]) + "\n"
    function.body = [ast.Pass()]
    signature = ast.unparse(function).rsplit("\n", 1)[0]
    prompt = f'{before}{signature}\n    """\n{indent(docstring, FOUR_SPACES)}\n    """\n'
    statements = stricter.body or [node for test in tests for node in test.body]
    return {
        "task_id": f"MBPP/{re.sub('^m?bpp/', '', str(row.get('task_id')), flags=re.I)}",
        "prompt": prompt,
        "canonical_solution": reference,
        "test": _check(statements, entry_point, setup.body),
        "entry_point": entry_point,
        "setup": prompt_setup(prompt, entry_point),
    }


def _called(tree: ast.AST) -> list[str]:
    """The names that are called as functions, in the order of the text."""
    names = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    return [name.id for name in sorted(names, key=lambda name: (name.lineno, name.col_offset))]


def _check(statements: list[ast.stmt], entry_point: str, before: list[ast.stmt] | None = None) -> str:
    """`check(candidate)` of statements that call the entry point; imports and definitions precede it."""
    before, within = list(before or []), []
    for node in statements:
        is_definition = isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef)
        (before if is_definition else within).append(node)
    body = ast.Module(within or [ast.Pass()], type_ignores=[])
    for node in ast.walk(body):
        if isinstance(node, ast.Name) and node.id == entry_point:
            node.id = "candidate"
    check = f"def check(candidate):\n{indent(ast.unparse(body), FOUR_SPACES)}\n"
    return f"{ast.unparse(ast.Module(before, type_ignores=[]))}\n\n{check}".lstrip()


def asserts_task(row: Row, task_id: str, question: Any, asserts: list, reference: str = "") -> dict:
    """Make a task from a list of asserts; the entry point is the name that all of them call."""
    trees = []
    for text in asserts:
        try:
            trees.append(ast.parse(text))
        except (SyntaxError, ValueError, TypeError):
            raise LeftOut("a test is no Python") from None
    own = {node.name for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    asserting = [tree for tree in trees if any(map(_is_assert, ast.walk(tree)))]
    calls = [[n for n in _called(tree) if n not in own and n not in _BUILTINS] for tree in asserting]
    common = [name for name in (calls or [[]])[0] if all(name in names for names in calls)]
    if not common:
        raise LeftOut("its asserts call no function in common")
    others = {name for names in calls for name in names} - {common[0]}
    entry_point = ", ".join([common[0], *sorted(others)])
    test = _check([node for tree in trees for node in tree.body], entry_point)
    words = ask(question, common[0]) if isinstance(question, str) else question
    return task(row, task_id, words, test, entry_point, reference)


_BUILTINS = frozenset(dir(builtins))


def _is_assert(node: ast.AST) -> bool:
    return isinstance(node, ast.Assert)


def from_acecode(row: Row) -> dict:
    """A row of AceCode-87K: asserts, and answers of models, of which one that passes everything is the reference."""
    if not isinstance(row.get("test_cases"), list):
        raise row.error("test_cases", "write a list of asserts")
    answers = row.get("inferences") or []
    passing = [
        a["completion"] for a in answers if isinstance(a, dict) and a.get("pass_rate") == 1 and a.get("completion")
    ]
    return asserts_task(row, row.get("id"), row.text("question"), row.get("test_cases"), (passing or [""])[0])


def from_kodcode(row: Row) -> dict:
    """A row of KodCode: pytest functions that import from `solution`."""
    names = [info["function_name"] for info in row.get("test_info") or [] if isinstance(info, dict)]
    solution = row.get("solution") or ""
    test, entry_point = pytest_test(row.text("test"), names)
    return task(row, row.get("question_id"), ask(row.text("question"), entry_point), test, entry_point, solution)


def pytest_test(source: str, names: list[str] | None = None) -> tuple[str, str]:
    """
    Turn a pytest module that imports from `solution` into `check(candidate)`, which calls every test.

    Args:
        source (`str`):
            The module, trusted text.
        names (`list[str]`, *optional*):
            The functions under test, where the module imports them by `*`.

    Returns:
        `tuple[str, str]`: The tests and the entry point.

    Raises:
        LeftOut: The module is no Python, or needs what only pytest can do.
    """
    try:
        module = ast.parse(source)
    except (SyntaxError, ValueError):
        raise LeftOut("its tests are no Python") from None
    body, calls, imported = [], [], []
    for node in module.body:
        if isinstance(node, ast.ImportFrom) and node.module == "solution":
            imported += [alias.name for alias in node.names if alias.name != "*"]
            body += [ast.parse(f"{a.asname} = {a.name}").body[0] for a in node.names if a.asname]
            continue
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
            calls.append(_pytest_call(node, node.name))
        elif isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and method.name.startswith(("setup", "setUp")):
                    raise LeftOut("its tests need pytest's fixtures")
                if isinstance(method, ast.FunctionDef) and method.name.startswith("test"):
                    calls.append(_pytest_call(method, f"{node.name}().{method.name}", skip=1))
        body.append(node)
    names = list(dict.fromkeys(imported or names or []))
    if not names or not calls:
        raise LeftOut("its tests import nothing from solution" if calls else "it has no function test_*")
    if any(name[:1].isupper() for name in names):
        raise LeftOut("its tests build objects of the solution's classes")
    text = ast.unparse(ast.Module(body, type_ignores=[]))
    return f"{text}\n\ndef check(candidate):\n{indent(chr(10).join(calls), FOUR_SPACES)}\n", ", ".join(names)


def _pytest_call(function: ast.FunctionDef, call: str, skip: int = 0) -> str:
    parameters = [parameter.arg for parameter in function.args.args[skip:]]
    decorators, function.decorator_list = function.decorator_list, []
    if not parameters and not decorators:
        return f"{call}()"
    if len(decorators) == 1 and isinstance(decorators[0], ast.Call) and len(decorators[0].args) == 2:
        names, values = decorators[0].args
        if ast.unparse(decorators[0].func).endswith("mark.parametrize") and isinstance(
            names, ast.Constant | ast.List | ast.Tuple
        ):
            given = ast.literal_eval(names)
            given = [name.strip() for name in given.split(",")] if isinstance(given, str) else list(given)
            if sorted(given) == sorted(parameters) and "pytest.param" not in ast.unparse(values):
                pairs = "case" if len(given) > 1 else "(case,)"
                return f"for case in {ast.unparse(values)}:\n    {call}(**dict(zip({given!r}, {pairs})))"
    raise LeftOut("its tests need pytest's fixtures or marks")


@dataclass(frozen=True)
class Format:
    """
    A format of task files.

    Args:
        name (`str`):
            What people call it.
        needs (`tuple[str, ...]`):
            The columns by which it is recognised.
        convert (`Callable`):
            Makes a task of a row.
        public (`bool`):
            Whether ids may be missing or repeat, and rows that make no task are left out.
    """

    name: str
    needs: tuple[str, ...]
    convert: Callable[[Row], dict]
    public: bool = True


SOURCE_FORMATS = (
    Format("LeetCodeDataset", ("task_id", "prompt", "completion", "entry_point", "test", "query"), from_leetcode),
    Format("MBPP", ("task_id", "text", "code", "test_list"), from_mbpp, public=False),
    Format("MBPP sanitized or MBPP+", ("task_id", "prompt", "code", "test_list"), from_mbpp, public=False),
    Format("HumanEval", ("task_id", "prompt", "test", "entry_point"), from_humaneval, public=False),
    Format("AceCode", ("question", "test_cases"), from_acecode),
    Format("KodCode", ("question", "solution", "test"), from_kodcode),
)
