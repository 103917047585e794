"""From a reply to its program: 164 references in every dressing that a model gives them pass in the sandbox."""

import time

import pytest

from rewards import load_tasks, program_source, task_program
from sandbox import Sandbox

THOUGHT = "First I try:\n```python\ndef NAME(*args):\n    return None\n```\nNo."
DRESSINGS = {
    "plain text": "SOURCE",
    "fence": "```python\nSOURCE```",
    "prose around it": "Here's the function:\n\n```python\nSOURCE```\n\nIt doesn't use `eval`.",
    "no label": "Sure!\n```\nSOURCE```\n",
    "capital label": "```Python\nSOURCE```",
    "py3 label": "```py3\nSOURCE```",
    "title": "```python title=solution.py\nSOURCE```",
    "braces": "```{.python .numberLines}\nSOURCE```",
    "file name": "``` solution.py\nSOURCE```",
    "tildes": "~~~python\nSOURCE~~~",
    "longer fence": "`````python\nSOURCE`````",
    "closing fence at the end of a line": "```python\nSOURCE# done```\nThat is all.",
    "unclosed": "Here it is:\n```python\nSOURCE",
    "lone closing": "SOURCE```",
    "lone closing, then prose": "SOURCE```\n\nThis returns the result, as it should.",
    "lone closing, then an example": "SOURCE```\nFor example:\n```python\nprint(NAME)\n```",
    "in markdown": "````markdown\nThe code:\n```python\nSOURCE```\n````",
    "not closed before the next": "```python\nimport math\n```python\nSOURCE```",
    "other languages": "```bash\npip install numpy\n```\n```python\nSOURCE```\n```js\nfunction NAME() {}\n```",
    "example after it": "```python\nSOURCE```\nUsage:\n```python\nresult = NAME\n```\nprints\n```\n3\n```",
    "session after it": "```python\nSOURCE```\n```python\n>>> NAME(1)\n2\n```\n```pycon\n>>> NAME(1)\n```",
    "attempt before it": "```python\ndef NAME(*args):\n    return None\n```\nThat's wrong:\n```python\nSOURCE```",
    "helpers before it": "```python\nimport math\n\nlimit: int = 3\n```\nThen:\n```python\nSOURCE```",
    "thought": f"<think>\n{THOUGHT}\n</think>\n\n```python\nSOURCE```",
    "thought that the template opened": f"{THOUGHT} So that's it.</think>\n```python\nSOURCE```",
    "thought without a fence": "<think>I don't know</think>SOURCE",
    "two thoughts": f"<think>a</think>\n{THOUGHT}<think>b\n</think>\n```python\nSOURCE```",
}
WHITESPACE = {
    "list": lambda reply: "1. The function:\n\n" + "".join(f"   {line}\n" for line in reply.split("\n")),
    "behind a list marker": lambda reply: "- " + "".join(f"  {line}\n" for line in reply.split("\n"))[2:],
    "tabs": lambda reply: "".join(f"\t{line}\n" for line in reply.split("\n")),
    "Windows": lambda reply: reply.replace("\n", "\r\n"),
}
DRESS = {name: lambda text, dressing=dressing: dressing.replace("SOURCE", text) for name, dressing in DRESSINGS.items()}
DRESS |= {name: lambda text, dress=dress: dress(f"```python\n{text}```") for name, dress in WHITESPACE.items()}


@pytest.fixture(scope="module")
def tasks():
    return list(load_tasks("humaneval", "all"))


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox() as sandbox:
        yield sandbox


def function_alone(task):
    """The function as the prompt begins it, without the imports and helpers before it."""
    return task["prompt"][task["prompt"].rindex(f"def {task['entry_point']}(") :] + task["canonical_solution"]


@pytest.mark.parametrize("whole", [True, False], ids=["whole file", "function alone"])
def test_every_reference_passes_in_every_dressing(sandbox, tasks, whole):
    programs, names = [], []
    for name, dress in DRESS.items():
        for task in tasks:
            source = task["prompt"] + task["canonical_solution"] if whole else function_alone(task)
            reply = dress(source.rstrip() + "\n").replace("NAME", task["entry_point"])
            chat = [{"role": "user", "content": "?"}], [{"role": "assistant", "content": reply}]
            programs.append(task_program(*chat, task["test"], task["entry_point"], task["setup"]))
            names.append((name, task["task_id"]))
    different = list(dict.fromkeys(programs))  # most dressings come off without a trace
    verdicts = dict(zip(different, sandbox.run(different), strict=True))
    assert [(n, verdicts[p].detail) for n, p in zip(names, programs, strict=True) if not verdicts[p].passed] == []
    assert len(programs) == 164 * len(DRESS)


def reply_source(reply, entry_point="f"):
    return program_source([{"role": "user", "content": "?"}], [{"role": "assistant", "content": reply}], entry_point)


def test_a_text_completion_continues_its_prompt_to_the_letter():
    assert program_source("def f():\n", "    return '```'\n</think>\r\n") == "def f():\n    return '```'\n</think>\r\n"


F = "def f(x):\n    return g(x)\n"
G = "def g(x):\n    return x\n"
CLASS = "class Solution:\n    def f(self, x):\n        return x\n"
SCRIPT = "print(int(input()) + 1)\n"
DOCSTRING = 'def f(x):\n    """\n    ```\n    f(1)\n    ```\n    """\n'


def python(source):
    return f"```python\n{source}```\n"


def block(source, label=""):
    return f"```{label}\n{source}```\n"


@pytest.mark.parametrize(
    "reply, entry_point, source",
    [
        # Helpers stand before the entry point; examples, earlier attempts and later helpers are left out
        (python(G) + block(F), "f", f"{G}\n{F}"),
        (python(G + "print(g(2))\n") + "and\n" + block(F), "f", f"{G}print(g(2))\n\n{F}"),
        (python(G) + block("g(x) of 3\n") + block(F), "f", f"{G}\n{F}"),
        (python("y = f(3)\n") + block(F) + python("assert f(3) == y\n"), "f", F),
        (python("def f(x):\n    return 0\n") + "No:\n" + block(F), "f", F),
        (block(F) + python(G), "f", F),
        # Other entry points
        (python(F) + python(G) + python("f(g(1))\n"), "f, g", f"{F}\n{G}"),
        (python(CLASS) + python("Solution().f(3)\n"), "Solution().f", CLASS),
        (python("f: int = 3\n") + python("f == 3\n"), "f", "f: int = 3\n"),
        (python("a = 1\n") + block("python a.py\n", "bash") + block("3 4\n"), "f", "a = 1\n"),
        # Scripts
        (python(SCRIPT) + "For\n" + block("2\n") + "it prints\n" + python("3\n"), "__main__", SCRIPT),
        (python("import sys\n") + block("print(sys.stdin)\n"), "__main__", "import sys\n\nprint(sys.stdin)\n"),
        (block("print(3)\n") + block("3\n"), "__main__", "print(3)\n"),
        (SCRIPT + "```\nIt reads with input() and adds one.", "__main__", SCRIPT.rstrip()),
        # No answer
        ("<think>\n" + python(F), "f", ""),
        ("Well. <think> I try\n" + python(F), "f", ""),
        (block("function f(x) {}\n", "javascript"), "f", ""),
        ("", "f", ""),
        # Text that only looks like a fence or a thought
        *[
            (text, "f", text)
            for text in (
                "def f(s):\n    return s.strip('<think>').split('</think>')",
                "def f(s):\n    # drops <think>\n    return s.strip()",
                "Inline ```def f``` is no fence",
            )
        ],
        (python(DOCSTRING), "f", DOCSTRING),
        ("````\ndef f(x):\n```\n~~~\n````", "f", "def f(x):\n```\n~~~\n"),
    ],
)
def test_program_of_a_reply(reply, entry_point, source):
    assert reply_source(reply, entry_point) == source


def test_long_hostile_replies_take_no_time():
    start = time.process_time()
    for reply in ("```" + " " * 100_000 + "`" * 100_000, "<think" * 50_000, "a=" * 100_000, "```\n" * 50_000):
        assert len(reply_source(reply)) <= len(reply)
    assert reply_source("```python\ndef f(" + "(" * 100_000).startswith("def f((((")  # nothing is parsed here
    assert time.process_time() - start < 5
