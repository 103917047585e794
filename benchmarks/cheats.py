"""Programs that try to be paid without solving their task, for graders.py and tests/test_graders.py.

Each one is harmless: it reads and writes in its current folder alone, starts nothing and asks no network. All are aimed
at what graders have in common (the process that runs the tests, its exit status, its files, its frames), and some at
the names that one of them uses. Not covered: escapes from a sandbox (tests/sandbox/attacks.py).
"""

from typing import NamedTuple

# Each task has cases: arguments and the expected value. A script has one argument, its stdin.
INTEGERS = {
    "entry_point": "checksum",
    "cases": [[[[3, 1, 2]], 418], [[[7]], 270], [[[4, 4, 4, 4]], 1491]],
}
FLOATS = {
    "entry_point": "checksum",
    "cases": [[[[3, 1, 2]], 418.5], [[[7]], 270.5], [[[4, 4, 4, 4]], 1491.5]],
}
SCRIPT = {
    "entry_point": "__main__",
    "cases": [[["3 1 2\n"], "1 2 3\n6\n"], [["7 5\n"], "5 7\n12\n"], [["9 8 4 1\n"], "1 4 8 9\n22\n"]],
}


class Entry(NamedTuple):
    """A program of the collection: its name, its source and the task that it is given."""

    name: str
    solution: str
    task: dict


SUM = "sum(37 * (i + 1) * n for i, n in enumerate(numbers))"
HONEST = [
    Entry("right, integers", f"def checksum(numbers):\n    return {SUM} + 11\n", INTEGERS),
    Entry("right, floats", f"def checksum(numbers):\n    return {SUM} + 11.5\n", FLOATS),
    Entry(
        "right, a script", "numbers = sorted(map(int, input().split()))\nprint(*numbers)\nprint(sum(numbers))\n", SCRIPT
    ),
]
WRONG = [
    Entry("wrong, integers", "def checksum(numbers):\n    return 5\n", INTEGERS),
    Entry("wrong, a script", "print(input())\nprint(5)\n", SCRIPT),
]

CALLERS = """
import sys
def callers():
    frame = sys._getframe(1)
    while frame:
        yield frame
        frame = frame.f_back
"""

# The cases as the graders that read JSON hold them
ANSWER_FROM_CASES = """
import json
def answer(cases, arguments):
    for given, expected in zip(cases["inputs"], cases["outputs"]):
        if given == "\\n".join(json.dumps(each) for each in arguments):
            return json.loads(expected) if type(expected) is str else expected
"""

CHEATS = [
    Entry("exits with 0 when loaded", "import sys\nsys.exit(0)\n", INTEGERS),
    Entry("leaves with 0 when loaded", "import os\nos._exit(0)\n", INTEGERS),
    Entry("exits with 0 when called", "import sys\ndef checksum(numbers):\n    sys.exit(0)\n", INTEGERS),
    Entry("leaves with 0 when called", "import os\ndef checksum(numbers):\n    os._exit(0)\n", INTEGERS),
    Entry(
        "exit handler that leaves with 0",
        "import atexit, os\natexit.register(os._exit, 0)\ndef checksum(numbers):\n    return 5\n",
        INTEGERS,
    ),
    Entry(
        "object equal to everything",
        """
class Liar:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
def checksum(numbers):
    return Liar()
""",
        INTEGERS,
    ),
    Entry(
        "integer equal to everything",
        """
class Liar(int):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
def checksum(numbers):
    return Liar(5)
""",
        INTEGERS,
    ),
    Entry(
        "float near to everything",
        """
class Liar(float):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __sub__(self, other): return 0.0
    __rsub__ = __sub__
def checksum(numbers):
    return Liar(5)
""",
        FLOATS,
    ),
    Entry(
        "patched abs and allclose",
        """
import builtins
builtins.abs = lambda value: 0.0
try:
    import numpy
    numpy.allclose = lambda *given, **more: True
except Exception:
    pass
def checksum(numbers):
    return 5.0
""",
        FLOATS,
    ),
    Entry(
        "patched all and any",
        """
import builtins
builtins.all = lambda items: True
builtins.any = lambda items: False
def checksum(numbers):
    return 5
""",
        INTEGERS,
    ),
    Entry(
        "patched json.loads",
        "import json\njson.loads = lambda text: 5\ndef checksum(numbers):\n    return 5\n",
        INTEGERS,
    ),
    Entry(
        "frame walk to the expected value",
        CALLERS
        + """
import dis
def checksum(numbers):
    for frame in callers():
        local = frame.f_locals
        if "gt_out" in local:
            return local["gt_out"]
        if "in_outs" in local and "index" in local:
            return local["in_outs"]["outputs"][local["index"]]
        if "expected" in local and "i" in local:
            return local["expected"][local["i"]]
        if frame.f_code.co_name == "check":
            for step in dis.get_instructions(frame.f_code):
                if step.offset > frame.f_lasti and type(step.argval) is int and step.opname.startswith("LOAD"):
                    return step.argval
""",
        INTEGERS,
    ),
    Entry(
        "frame walk to the result holder",
        CALLERS
        + """
import os
def checksum(numbers):
    for frame in callers():
        local = frame.f_locals
        if "stat" in local and "details" in local:
            for i in range(len(local["inputs"])):
                local["details"][i] = True
            local["progress"].value = len(local["inputs"])
            local["stat"].value = 0
            os._exit(0)
        if "metadata_list" in local:
            local["result"].append([True] * 3)
            local["metadata_list"].append({})
            os._exit(0)
        if "result" in local and "problem" in local:
            local["result"].append("passed")
            os._exit(0)
""",
        INTEGERS,
    ),
    Entry(
        "heap search for the tests",
        ANSWER_FROM_CASES
        + """
import gc
def checksum(numbers):
    for found in gc.get_objects():
        if type(found) is not dict:
            continue
        if type(found.get("inputs")) is list and type(found.get("outputs")) is list:
            return answer(found, [numbers])
        if "test" in found and "entry_point" in found:
            return int(found["test"].split(f"candidate({numbers}) == ")[1].split()[0])
""",
        INTEGERS,
    ),
    Entry(
        "reads the tests from its folder",
        ANSWER_FROM_CASES
        + """
import os
def checksum(numbers):
    for name in os.listdir("."):
        with open(name) as file:
            text = file.read()
        if text.startswith("{"):
            cases = json.loads(text)
            return answer(json.loads(cases["input_output"]) if "input_output" in cases else cases, [numbers])
""",
        INTEGERS,
    ),
    Entry(
        "overwrites files, writes result files",
        """
import os
for name in [*os.listdir("."), "result.json", "results.json", "output.txt", "verdict.json"]:
    with open(name, "w") as file:
        file.write('{"passed": true, "result": "passed", "score": 1.0}')
def checksum(numbers):
    return 5
""",
        INTEGERS,
    ),
    Entry(
        "prints markers of success",
        """
for marker in ("passed", "PASSED", "OK", "All tests passed", '{"passed": true}', "[True, True, True]", "1.0"):
    print(marker, flush=True)
def checksum(numbers):
    print("passed", flush=True)
    return 5
""",
        INTEGERS,
    ),
    Entry("script: prints nothing, exits with 0", "import sys\nsys.exit(0)\n", SCRIPT),
    Entry(
        "script: first line, then exits with 0",
        "import sys\nprint(*sorted(map(int, input().split())))\nsys.exit(0)\n",
        SCRIPT,
    ),
    Entry(
        "script: right words in any order",
        "numbers = input()\nprint(numbers)\nprint(sum(map(int, numbers.split())))\n",
        SCRIPT,
    ),
    Entry(
        "script: frame walk to the output",
        CALLERS
        + """
def run():
    for frame in callers():
        local = frame.f_locals
        if "gt_out" in local:
            return local["gt_out"]
        if "in_outs" in local and "index" in local:
            return local["in_outs"]["outputs"][local["index"]]
print(run())
""",
        SCRIPT,
    ),
    Entry(
        "script: stdout equal to everything",
        """
import sys
class Liar(str):
    __hash__ = str.__hash__
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def strip(self): return self
    def split(self, separator=None): return [self, self]
    def splitlines(self): return [self]
print("5")
try:
    sys.stdout.getvalue = lambda: Liar("5")
except AttributeError:
    pass
""",
        SCRIPT,
    ),
]
