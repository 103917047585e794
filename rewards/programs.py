"""
From a task and a completion to the program that is run, and where a completion's function ends.

There is one rule, for rewards and evaluation alike; the docstring of [`program_source`] states it.
"""

import ast
import functools
import re

from sandbox import Program

# Indentation and perhaps a list marker, the fence, and what follows it
_FENCE = re.compile(r"([ \t]*(?:(?:[-*+]|\d{1,3}[.)])[ \t]+)?)(`{3,}|~{3,})(.*)")
_LABEL = re.compile(r"[\s{.]*([^\s,:;{}|]*)")
_PYTHON = re.compile(r"(?:i?py(?:thon)?[\d.]*|.*\.py)?")  # also a file's name; `python-repl` and `pycon` are sessions
# A tag that touches a quotation mark is text, and so is an opening one behind a quotation mark or in a comment
_THOUGHT_ENDS = re.compile(r"(?<!['\"`])</think>(?!['\"`])")
_THOUGHT_BEGINS = re.compile(r"^[^'\"`#\n]*<think>", re.MULTILINE)
_READS_STDIN = re.compile(r"\binput\s*[(,)]|\bstdin\b|\bopen\(0|\bos\.read\(0|\bfileinput\b")
_DEFINES_SOMETHING = re.compile(r"^(?:import |from |def |async def |class |\w+ *(?::[^=\n]*)?=(?!=))", re.MULTILINE)
# The beginning of a line at column 0 of a program, as opposed to prose, data, and the prompt of a session
_CODE = re.compile(
    r"(?:import|from|async|def|class|if|elif|else|for|while|with|try|except|finally|assert|del|global|raise|pass)\b"
    r"|[\w.]+\(|[@#)\]}'\"]|[\w.\[\]*]+(?:, *[\w.\[\]*]+)* *(?::[^=]+|[-+*/%|&^@<>]+)?=(?!=)"
)
# The first line that starts at column 0 ends the function's body; a closing bracket at column 0 still belongs to it
_TOP_LEVEL_LINE = re.compile(r"^[^\s)\]}]", re.MULTILINE)


def task_program(
    prompt: str | list[dict],
    completion: str | list[dict],
    test: str,
    entry_point: str,
    setup: str | None = "",
    inline: bool | None = False,
) -> Program:
    """
    Build the program by which a completion of a task is graded, in training and in evaluation.

    Args:
        prompt (`str` or `list[dict]`):
            The task's prompt, plain text or chat messages.
        completion (`str` or `list[dict]`):
            What the policy wrote, in the same form.
        test (`str`):
            The task's tests.
        entry_point (`str`):
            What is under test: the name of a function, `"Solution().method"`, or `"__main__"`.
        setup (`str`, *optional*, defaults to `""`):
            Trusted code that both solution and tests may count on. If it is empty and the prompt is plain text, what
            the prompt defines beside the entry point.
        inline (`bool`, *optional*, defaults to `False`):
            Whether tests and solution share an interpreter. The solution can then cheat.

    Returns:
        [`~sandbox.Program`]
    """
    if not setup:
        setup = prompt_setup(prompt, entry_point) if isinstance(prompt, str) else ""
    return Program(program_source(prompt, completion, entry_point), test, entry_point, setup, bool(inline))


def program_source(prompt: str | list[dict], completion: str | list[dict], entry_point: str = "") -> str:
    """
    Return the program that a completion makes.

    A plain text completion continues the prompt: its program is prompt + completion, to the letter.

    The program of a chat reply is found by these rules:

    1. A thought is never the answer. Text before the last `</think>` is dropped, with or without a `<think>`,
       because some templates open the thought in the prompt. If a thought is left unclosed, the program is empty. Tags
       in quotation marks are text.
    2. Fences are lines of three or more backticks or tildes, perhaps indented or behind a list marker. A block ends at
       a fence of the same character which is at least as long and indented by at most three columns more, at the next
       labelled fence, or at the end of the reply. If only the reply's end would close it, it ends at the first line
       that has such a fence at its end. Its lines lose the indentation of its first one. Windows line ends count as
       line ends.
    3. A block is Python if its label means Python (`python`, `Python3`, `py`, `{.python}`, `python title=x`,
       `solution.py`) or if it has none. Blocks in other languages are no programs, and `markdown` fences are
       overlooked.
    4. The program is the last Python block that defines the entry point at column 0, by `def`, `class` or `=`. A script
       (`"__main__"`) is the last Python block that reads stdin. Of several entry points, each has its own last block.
    5. Helper blocks are kept before it, in order: earlier Python blocks that define or import something, and neither
       define the entry point (an earlier attempt) nor name it at column 0 (a usage example).
    6. If no block defines the entry point but the text before the first fence does, that text is the program. This is
       a reply with a lone closing fence, as a template that opens the block in the prompt makes it.
    7. Otherwise the program is the last block labelled as Python, the last unlabelled one that looks like code, or
       else the text before the first fence.
    8. A reply without a fence is a program as it is.

    Nothing is parsed or run here.

    Args:
        prompt (`str` or `list[dict]`):
            The task's prompt, plain text or chat messages.
        completion (`str` or `list[dict]`):
            What the policy wrote; text that follows messages is the content of the reply.
        entry_point (`str`, *optional*, defaults to `""`):
            What is under test: a function's name, several separated by commas, `"Solution().method"`, or `"__main__"`.

    Returns:
        `str`: The program's source; empty for a reply that has no answer.
    """
    if isinstance(prompt, str) and isinstance(completion, str):
        return prompt + completion
    answer = _answer(completion if isinstance(completion, str) else completion[-1].get("content") or "")
    before, blocks = _split(answer)
    if blocks is None:
        return answer

    names = [name.strip() for name in entry_point.split("(")[0].split(",") if name.strip()]
    sources = [source for label, source in blocks if _PYTHON.fullmatch(label)]
    defining = {name: [i for i, source in enumerate(sources) if _defines(source, name)] for name in names}
    chosen = {found[-1] for found in defining.values() if found}
    if chosen:
        attempts = {i for found in defining.values() for i in found}
        helpers = {i for i in range(max(chosen)) if i not in attempts and _is_helper(sources[i], names)}
        return "\n".join(sources[i] for i in sorted(chosen | helpers))
    if any(_defines(before, name) for name in names):
        return before
    labelled = [source for label, source in blocks if label and _PYTHON.fullmatch(label)]
    unlabelled = [source for label, source in blocks if not label and _looks_like_code(source)]
    return (labelled or unlabelled or [before])[-1]


def _answer(reply: str) -> str:
    """The reply without its thoughts, its line ends normalised."""
    *_, answer = _THOUGHT_ENDS.split(reply.replace("\r\n", "\n"))
    return "" if _THOUGHT_BEGINS.search(answer) else answer


def _split(answer: str) -> tuple[str, list[tuple[str, str]] | None]:
    """The text before the first fence, and the blocks as pairs of label and source; `None` if there is no fence."""
    before, blocks = [], []
    fence, opened = "", 0  # of the block that is being read
    seen = False
    for line in answer.split("\n"):
        match = _FENCE.fullmatch(line)
        indent, mark, info = match.groups() if match else ("", "", "")
        label = _LABEL.match(info)[1].lower() if match else ""  # type: ignore[index]
        is_fence = bool(match) and not (mark[0] == "`" and "`" in info) and label not in ("markdown", "md")
        if is_fence and fence:
            same = mark.startswith(fence) and len(indent) <= opened + 3
            if same and not info.strip():
                fence = ""
                continue
            is_fence = same
        if is_fence:
            fence, opened, seen = mark, len(indent), True
            blocks.append((label, []))
        elif fence:
            blocks[-1][1].append(line)
        elif not seen:
            before.append(line)
    if fence:  # its closing fence may be at the end of a line
        lines = blocks[-1][1]
        end = next((i for i, line in enumerate(lines) if line.rstrip().endswith(fence)), None)
        if end is not None:
            lines[end:] = [lines[end].rstrip().removesuffix(fence)]
    dedented = [(label, _dedent(lines)) for label, lines in blocks]
    return "\n".join(before), [block for block in dedented if block[1].strip()] if seen else None


def _dedent(lines: list[str]) -> str:
    first = next((line for line in lines if line.strip()), "")
    width = len(first) - len(first.lstrip())
    return "".join(line[min(width, len(line) - len(line.lstrip())) :] + "\n" for line in lines)


def _defines(source: str, name: str) -> bool:
    if name == "__main__":
        return bool(_READS_STDIN.search(source)) and _looks_like_code(source)
    name = re.escape(name)
    return bool(
        re.search(rf"^(?:(?:async[ \t]+)?def|class)[ \t]+{name}\b|^{name}[ \t]*(?::[^=\n]*)?=(?!=)", source, re.M)
    )


def _top_level(source: str) -> list[str]:
    """The beginnings of the lines at column 0."""
    return [line[:200] for line in source.split("\n") if line[:1].strip()]


def _looks_like_code(source: str) -> bool:
    return any(map(_CODE.match, _top_level(source)))


def _is_helper(source: str, names: list[str]) -> bool:
    use = re.compile(rf"\b(?:{'|'.join(map(re.escape, names))})\b(?<!__main__)")
    lines = _top_level(source)
    return bool(_DEFINES_SOMETHING.search(source)) and all(_CODE.match(line) and not use.search(line) for line in lines)


@functools.lru_cache(maxsize=4096)
def prompt_setup(prompt: str, entry_point: str) -> str:
    """
    Return what a prompt defines beside the entry point: its imports and helper functions.

    Args:
        prompt (`str`):
            The task's prompt, trusted text.
        entry_point (`str`):
            The name of the function that the prompt begins.

    Returns:
        `str`: Python source; empty if there is nothing else, or the prompt is no Python.
    """
    module = parse_prompt(prompt)
    if module is None:
        return ""
    others = [node for node in module.body if getattr(node, "name", None) != entry_point]
    return ast.unparse(ast.Module(others, type_ignores=[])) + "\n" if others else ""


def parse_prompt(prompt: str) -> ast.Module | None:
    """
    Parse a prompt as the beginning of a Python program.

    Args:
        prompt (`str`):
            The task's prompt, trusted text.

    Returns:
        `ast.Module`: The module, where the prompt ends in a bare signature with `pass` as its body; `None` if the
        prompt is no Python.
    """
    for source in (prompt, prompt.rstrip() + "\n    pass\n"):
        try:
            return ast.parse(source)
        except (SyntaxError, ValueError):
            pass
    return None


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
