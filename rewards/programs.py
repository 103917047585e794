"""
From a task and a completion to the program that is run, and where a completion's function ends.

A completion continues the prompt to the letter. A chat reply is different: its program is the fenced block in it.
"""

import ast
import re

from sandbox import Program

# Every fenced block with what stands behind its opening fence; no two parts of it can match the same text in two ways
_FENCE = re.compile(r"^[ \t]*```([^\n`]*)\n(.*?)(?:```|\Z)", re.DOTALL | re.MULTILINE)
_PYTHON = ([], ["python"], ["python3"], ["py"])  # the first word there
# The first line that starts at column 0 ends the function's body; a closing bracket at column 0 still belongs to it
_TOP_LEVEL_LINE = re.compile(r"^[^\s)\]}]", re.MULTILINE)


def task_program(prompt: str | list[dict], completion: str | list[dict], test: str, entry_point: str) -> Program:
    """
    The program by which a completion of a task is graded, in training and in evaluation.

    Args:
        prompt (`str` or `list[dict]`):
            The task's prompt, plain text or chat messages.
        completion (`str` or `list[dict]`):
            What the policy wrote, in the same form.
        test (`str`):
            The task's tests.
        entry_point (`str`):
            The name of the function under test.

    Returns:
        [`~sandbox.Program`]
    """
    return Program(program_source(prompt, completion), test, entry_point, setup=trusted_setup(prompt))


def program_source(prompt: str | list[dict], completion: str | list[dict]) -> str:
    """
    The solution that a completion makes.

    Args:
        prompt (`str` or `list[dict]`):
            The task's prompt, plain text or chat messages.
        completion (`str` or `list[dict]`):
            What the policy wrote, in the same form.

    Returns:
        `str`: `prompt + completion` for plain text; for a chat the last fenced block of the reply that is labelled as
        Python or not labelled, or the whole reply where it has none.
    """
    if isinstance(completion, str):
        return prompt + completion
    reply = completion[-1]["content"]
    blocks = [block for label, block in _FENCE.findall(reply) if label.lower().split()[:1] in _PYTHON]
    return blocks[-1] if blocks else reply


def trusted_setup(prompt: str | list[dict]) -> str:
    """
    The prompt as a module of its own, so that tests can use the helper functions that it defines.

    Args:
        prompt (`str` or `list[dict]`):
            The task's prompt.

    Returns:
        `str`: The prompt, completed with `pass` where it ends in a bare signature; empty for a chat or a text that is
        no Python.
    """
    if not isinstance(prompt, str):
        return ""
    for source in (prompt, prompt.rstrip() + "\n    pass\n"):
        try:
            ast.parse(source)
            return source
        except (SyntaxError, ValueError):
            pass
    return ""


def truncate_completion(completion: str) -> str:
    """
    Cut a completion where the function that it completes ends.

    Args:
        completion (`str`):
            The text after the prompt, indented as a function's body.

    Returns:
        `str`: Everything before the first line that starts at column 0 with something other than a closing bracket.
    """
    # The text up to the first newline continues the prompt's last line, so it is never a new statement
    start = completion.find("\n") + 1
    end = _TOP_LEVEL_LINE.search(completion, start) if start else None
    return completion[: end.start()] if end else completion
