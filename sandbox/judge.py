"""The trusted side: run the tests of a program against a proxy of its solution, and write the verdict.

The solution runs in another process, forked by the worker's zygote (proxy.py). Whatever happens before that process has
received any source of the solution, or before the tests have called it, is not the solution's doing: a failure then
makes the program `invalid`. Later failures count against the solution, so that it cannot choose to be `invalid`.

Not covered here: the cage that confines the solution (cage.py), and `inline` programs, which run tests and solution in
one interpreter (solution.py).
"""

import functools
import gc
import marshal
import random
import signal
import socket
import sys
import time
import types
from collections.abc import Callable
from typing import NoReturn

import wire
from proxy import ANSWER, Fault, Solution, explain

MAX_DETAIL = 200
TESTS = "<tests>"
SETUP = "<setup>"


class TimeUp(BaseException):
    """Ends the tests: the program's time is up."""


def parse_entry_point(text: str) -> list[str]:
    """Return the names in an entry point; raise `ValueError` for anything but what a `Program` may have."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        name, _, method = name.partition("().")
        if not name.isidentifier() or not (method or "x").isidentifier() or (name == "__main__" and len(names) > 1):
            raise ValueError(f'entry_point={text!r}: write "f", "f, g", "Solution().method" or "__main__"')
    return names


class Judge:
    """Grades one program after another.

    Args:
        control (`socket.socket`): Connected to the zygote.
        timeout (`float`): Seconds that a program may take.
        stdio_mb (`int`): Megabytes of a script's stdin, and of its stdout.
    """

    def __init__(self, control: socket.socket, timeout: float, stdio_mb: int):
        self.control = control
        self.timeout = timeout
        self.stdio_bytes = stdio_mb << 20
        self.armed = False
        self.late = False

    def _alarm(self, number, frame):
        if self.armed:
            self.late = True  # even if the tests catch what is raised here
            raise TimeUp

    def grade(
        self,
        source: str,
        tests: str | tuple[str, ...],
        entry_point: str,
        setup: str,
        inline: bool,
        announce: Callable[[], object],
    ) -> list:
        """Return `[status, detail, seconds, passed_parts, needs_restart]`, the last for this worker.

        `announce` is called before the solution's process gets any of its source. What happens earlier is not the
        solution's doing, and makes the program `invalid`.
        """
        start = time.monotonic()
        # The last tests may have seeded these, and numpy's state is the one that solutions are forked with
        random.seed()
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed()
        parts = (tests,) if isinstance(tests, str) else tests
        flags = [False] * len(parts)
        status, detail = "invalid", ""
        solution = Solution(self.control, self.stdio_bytes if entry_point == "__main__" and not inline else 0)
        self.late = False
        try:
            # The last tests may have changed how the signal is handled
            signal.signal(signal.SIGALRM, self._alarm)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
            # Repeated, in case the tests catch the first one
            self.armed = True
            signal.setitimer(signal.ITIMER_REAL, self.timeout, 0.1)
            run = self._inline if inline else self._apart
            status, detail = run(solution, source, parts, entry_point, setup, flags, announce)
            self.armed = False
        except (TimeUp, Fault):
            self.armed = False
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            solution.stop()
        seconds = time.monotonic() - start
        late = self.late or seconds > self.timeout  # the tests may have replaced the timer
        if late:
            status, detail = "timeout", f"no verdict within {self.timeout:g} s"
        elif solution.fault:
            status, detail = solution.fault
        if not solution.started and status != "invalid":
            status, detail = "invalid", f"before the solution ran: {detail}"
        # The detail may contain text of the solution: make it one short line that is safe to print
        detail = "".join(letter if letter.isprintable() else " " for letter in detail[:MAX_DETAIL])
        # A timeout may have interrupted the tests in the middle of an import
        return [status, detail, seconds, () if isinstance(tests, str) else tuple(flags), late or _threads_remain()]

    def _apart(self, solution, source, parts, entry_point, setup, flags, announce):
        try:
            names = parse_entry_point(entry_point)
            proxies = {name: functools.partial(solution.call, name) for name in names}
            proxies["candidate"] = proxies[names[0]]
            module = _set_up(setup, proxies)
            for part in parts:
                _compiled(part, TESTS)
        except (TimeUp, Fault):
            raise
        except BaseException as error:
            return "invalid", f"the task's setup or tests do not load: {type(error).__name__}: {error}"
        answer = solution.prepare(_marshalled(setup), names, False)
        if answer != [None]:
            return "invalid", f"the task's setup does not load beside a solution: {explain(answer)[1]}"
        announce()
        answer = solution.load(source)
        if answer != [None]:
            return explain(answer)
        solution.loaded = True
        results = []
        for index, part in enumerate(parts):
            solution.reached = False
            error = None
            try:
                status, detail, error = run_tests(module or _set_up(setup, proxies), part, proxies)
            except (TimeUp, Fault):
                raise
            except BaseException as setup_error:
                status, detail = "failed", f"{type(setup_error).__name__}: {setup_error}"
            module = None
            if hasattr(error, ANSWER):
                status, detail = explain(getattr(error, ANSWER))
            elif status == "failed" and not solution.reached and not isinstance(error, MemoryError):
                status, detail = "invalid", f"before any call of the solution: {detail}"
            flags[index] = status == "passed" and not solution.fault and not self.late
            results.append((status, detail))
        if not solution.called and all(flags):
            return "invalid", f"the tests never call {entry_point}"
        results.sort(key=lambda result: result[0] != "invalid")  # it keeps the order of the others
        return next((result for result in results if result[0] != "passed"), ("passed", ""))

    def _inline(self, solution, source, parts, entry_point, setup, flags, announce):
        try:
            names = parse_entry_point(entry_point)
            for part in parts:
                _compiled(part, TESTS)
            marshalled = _marshalled(setup)
        except Exception as error:
            return "invalid", f"the task's setup or tests do not load: {type(error).__name__}: {error}"
        answer = solution.prepare(marshalled, names, True)
        if answer != [None]:
            return "invalid", f"the task's setup does not load: {explain(answer)[1]}"
        announce()
        answer = solution.load((source, tuple(parts)))
        if [*map(type, answer)] != [str, str, list] or len(answer[2]) != len(parts):
            return explain(answer)
        status, detail, passed = answer
        if status not in ("passed", "failed", "error", "out_of_memory"):
            return "error", "the solution wrote to the channel itself"
        flags[:] = [flag is True for flag in passed]
        return status, detail


@functools.lru_cache(maxsize=512)
def _compiled(text, name):
    return compile(text, name, "exec", dont_inherit=True)


def _threads_remain():
    threading = sys.modules.get("threading")
    return threading is not None and threading.active_count() > 1


def _marshalled(setup):
    return marshal.dumps(_compiled(setup, SETUP)) if setup.strip() else None


def _set_up(setup, proxies):
    """Return a module for tests in which the setup has run; `solution` is a module of the proxies meanwhile."""
    solution = sys.modules["solution"] = types.ModuleType("solution")
    solution.__dict__.update(proxies)
    module = sys.modules["tests"] = types.ModuleType("tests")  # dataclasses and pickle look it up
    if setup.strip():
        exec(_compiled(setup, SETUP), module.__dict__)
    return module


def run_tests(
    module: types.ModuleType, tests: str, functions: dict[str, Callable]
) -> tuple[str, str, BaseException | None]:
    """Run one text of tests.

    Args:
        module (`types.ModuleType`): Where they run; the setup has run there.
        tests (`str`): Trusted source.
        functions (`dict[str, Callable]`): What they may call, by name; one is the `candidate`.

    Returns:
        `tuple[str, str, BaseException | None]`: `passed` or `failed`, why, and the exception.
    """
    sys.modules["tests"] = module
    namespace = module.__dict__
    namespace.update(functions)
    namespace["__name__"] = "tests"
    before = namespace.get("check")
    try:
        exec(_compiled(tests, TESTS), namespace)
        check = namespace.get("check")
        if check is not None and check is not before:
            check(functions["candidate"])
    except (Fault, TimeUp):
        raise
    except BaseException as error:
        name = type(error).__name__
        line = last_line(error.__traceback__, TESTS)
        where = f"line {line} of the tests: {tests.splitlines()[line - 1].strip()}" if line else error
        return "failed", f"{name}: {where}", error
    finally:
        namespace.clear()  # it is a cycle with its functions, and holds what the solution answered
    return "passed", "", None


def last_line(traceback: types.TracebackType | None, file: str) -> int:
    """Return the number of the last line of `file` in a traceback; 0 if there is none."""
    line = 0
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == file:
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return line


def judge(caller: wire.Channel, control: socket.socket, timeout: float, stdio_mb: int) -> NoReturn:
    """Grade the caller's programs until it is gone.

    Args:
        caller (`wire.Channel`): Receives programs, sends verdicts.
        control (`socket.socket`): Connected to the worker's zygote.
        timeout (`float`): Seconds that a program may take.
        stdio_mb (`int`): Megabytes of a script's stdin, and of its stdout.
    """
    gc.collect()
    gc.freeze()
    worker = Judge(control, timeout, stdio_mb)
    while True:
        try:
            fields = caller.receive_program()
            again = fields.pop()
            # After a lost worker the caller asks whether the solution had started
            announce = functools.partial(caller.send, "started") if again else int
            caller.send(worker.grade(*fields, announce=announce))
        except (EOFError, ConnectionError):
            sys.exit(0)
