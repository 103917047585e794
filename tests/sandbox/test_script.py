"""Scripts: what a shell would give them they find, and what it would print is their answer."""

from test_sandbox import statuses

from sandbox import Program

SCRIPTS = {
    "descriptors": "import os\nsize = os.fstat(0).st_size\nos.write(1, b'%d\\n' % (int(os.read(0, size)) + 1))",
    "files at descriptors": "print(int(open(0).read()) + 1, file=open(1, 'w'))",
    "files replaced": """
import io, os, sys
class Fast(io.IOBase):
    def __init__(self, file):
        self.fd, self.written = file.fileno(), "r" not in file.mode
    def readline(self):
        return os.read(self.fd, 8192).decode()
    def write(self, text):
        os.write(self.fd, text.encode())
sys.stdin, sys.stdout = Fast(sys.stdin), Fast(sys.stdout)
assert (sys.stdin.written, sys.stdout.written) == (False, True)
print(int(sys.stdin.readline()) + 1)""",
    "encoding replaced": """
import io, sys
sys.stdout = io.TextIOWrapper(sys.stdout.buffer, encoding="utf-8")
print(int(sys.__stdin__.readline()) + 1)""",
    "thread that nobody waits for": """
import threading, time
def main():
    time.sleep(0.05)
    print(int(input()) + 1)
threading.Thread(target=main).start()""",
    "pool that nobody shuts down": """
from concurrent.futures import ThreadPoolExecutor
pool = ThreadPoolExecutor(2)
print(pool.submit(int, input()).result() + 1)""",
    "print at exit": """
import atexit, io, sys
sys.stdout = io.StringIO()
atexit.register(lambda: sys.__stdout__.write(sys.stdout.getvalue()))
print(int(input()) + 1)""",
    "output closed": "import sys\nprint(int(input()) + 1)\nsys.stdout.close()",
    "exit": "print(int(input()) + 1)\nexit()\nprint('more')",
    "quit": "print(int(input()) + 1)\nquit(0)\nprint('more')",
}


def test_scripts_read_stdin_and_print(sandbox):
    source = "import sys\nif __name__ == '__main__':\n    n = int(input())\n    print(n + sum(map(int, sys.stdin)))"
    tests = "for given, wanted in [('1\\n2\\n3', '6\\n'), ('5', '5\\n')]:\n    assert candidate(given) == wanted"
    endless = "while True: print('x' * 1000)"
    programs = [
        Program(each, tests, "__main__")
        for each in (f"{source}\nsys.exit()", "print(7)", "import sys; sys.exit(3)", "exit(", endless)
    ]
    assert statuses(sandbox, *programs) == ["passed", "failed", "crashed", "error", "error"]


def test_scripts_run_as_a_shell_would_run_them(sandbox):
    tests = "for number in (3, 5):\n    assert candidate(f'{number}\\n') == f'{number + 1}\\n'"
    verdicts = sandbox.run([Program(source, tests, "__main__") for source in SCRIPTS.values()])
    assert not {name: verdict for name, verdict in zip(SCRIPTS, verdicts, strict=True) if not verdict.passed}


def test_what_a_script_left_unwritten_is_not_printed_by_its_next_run(sandbox):
    source = "number = int(input())\nprint(number)\nassert number > 3"
    tests = "try:\n    candidate('3')\nexcept AssertionError:\n    pass\nassert candidate('5') == '5\\n'"
    assert statuses(sandbox, Program(source, tests, "__main__")) == ["passed"]
