"""The trusted side: run the tests of a program against a proxy of its solution, and write the verdict.

The solution runs in another process, forked by the worker's zygote, and is reached through two pipes made for this one
program. A call of the proxy sends the arguments, receives a plain value or the name of an exception, and returns the
value or raises that exception in the tests. Once a channel has broken, `passed` is impossible, whatever the tests catch.

Not covered here: the cage that confines the solution (cage.py), and `inline` programs, which run tests and solution in
one interpreter (solution.py).
"""

import builtins
import functools
import gc
import os
import random
import signal
import socket
import sys
import time
import types
from _thread import allocate_lock  # importing threading would make every fork slower
from collections.abc import Callable
from typing import Any, NoReturn

import wire

MAX_DETAIL = 200
TESTS = "<tests>"
SETUP = "<setup>"


class Fault(BaseException):
    """Ends the tests: the solution's process or channel has failed."""


class TimeUp(BaseException):
    """Ends the tests: the program's time is up."""


class SolutionError(Exception):
    """Stands in the tests for an exception of the solution that is not a builtin `Exception`."""


class Solution:
    """The judge's end of one solution process.

    Args:
        control (`socket.socket`): Connected to the zygote, which forks the process.
    """

    def __init__(self, control: socket.socket):
        self.control = control
        self.fault = None  # (status, detail) of the first failure, which becomes the verdict
        self.called = False
        self._turn = allocate_lock()  # one call at a time, whichever thread of the tests makes it
        self._ending = allocate_lock()  # only one thread asks the zygote to kill the process or to wait for it
        # Two pipes: a call over one socket takes half as long again
        judge_answers, solution_answers = os.pipe()
        solution_calls, judge_calls = os.pipe()
        socket.send_fds(control, [b"s"], [solution_answers, solution_calls])
        os.close(solution_answers)
        os.close(solution_calls)
        self.channel: wire.Channel | None = wire.Channel(judge_answers, judge_calls)

    def load(self, *fields: str | None) -> list:
        """Send the program's texts and return the first answer."""
        try:
            self.channel.send_trusted(fields)
        except wire.CannotCross as error:
            self._break("error", f"in the program's text: {error}")
        except ConnectionError:
            pass  # it died early: reading will tell how
        return self._receive()

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Call the solution's function: the `candidate` of the tests."""
        self.called = True
        with self._turn:
            if self.fault or self.channel is None:
                raise Fault
            try:
                self.channel.send_trusted((args, kwargs))
            except wire.CannotCross as error:
                self._break("error", f"in an argument of the tests: {error}")
            except ConnectionError:
                pass
            answer = self._receive()
            if len(answer) == 1:
                return answer[0]
            if not _is_exception(answer):
                self._break(*explain(answer))
        raise _exception(answer)

    def _receive(self):
        try:
            answer = self.channel.receive()
        except EOFError:
            self._break(*_explain_exit(self._wait_status()))
        except ValueError as error:
            self._break("error", f"the solution wrote to the channel itself: {error}")
        except MemoryError:
            self._break("error", "the solution answered with more than fits into memory")
        # One item is a value, whatever it is; several are another outcome and begin with its name
        if type(answer) is list and (len(answer) == 1 or answer and type(answer[0]) is str):
            return answer
        self._break("error", "the solution wrote to the channel itself")

    def _break(self, status, detail):
        self.fault = self.fault or (status, detail)
        raise Fault

    def stop(self) -> None:
        """Have the process killed, unless it has exited."""
        with self._ending:
            if self.channel is not None:
                channel, self.channel = self.channel, None
                self.control.send(b"k")
                channel.close()  # after the kill: the solution would wake up when its channel closes

    def _wait_status(self):
        """Return the wait status of the process, which has closed its channel."""
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})  # the zygote expects all of this or nothing
        with self._ending:
            if self.channel is None:  # the tests have ended, and left this thread
                raise Fault
            self.channel.close()
            self.channel = None
            try:
                self.control.send(b"w")
                status = self.control.recv(4)
            except ConnectionError:
                status = b""
        if not status:
            os._exit(1)  # the zygote died: the caller replaces this worker and runs the program again
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
        return int.from_bytes(status, "little")


def explain(answer: list) -> tuple[str, str]:
    """Return the status and detail for an answer that is not a value."""
    kind, *content = answer
    if _is_exception(answer):
        name, _, message, where = content
        status = "out_of_memory" if name == "MemoryError" else "error"
        return status, f"the solution raised {name} {where}{message and ': '}{message}"
    text = content[0] if content else ""
    if type(text) is not str:
        return "error", "the solution wrote to the channel itself"
    if kind == "exited":
        return "crashed", f"the solution called sys.exit({text})"
    if kind == "not compiled":
        return "error", f"the solution does not compile: {text}"
    if kind == "no entry point":
        return "error", "the solution does not define the entry point as a function"
    if kind == "cannot cross":
        return "error", f"in the result: {text}"
    return "error", "the solution wrote to the channel itself"


def _explain_exit(status):
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number == signal.SIGXCPU:
            return "timeout", "the solution used up its processor time"
        name = signal.Signals(number).name if number in signal.Signals.__members__.values() else f"signal {number}"
        return "crashed", f"the solution process died by {name}"
    return "crashed", f"the solution process exited with status {os.WEXITSTATUS(status)}"


def _is_exception(answer):
    return answer[0] == "raised" and [*map(type, answer[1:])] == [str, tuple, str, str]


def _exception(answer):
    """Return the exception to raise in the tests for one of the solution."""
    _, name, args, message, _ = answer
    error = _closest_builtin(name, args, message)
    error._answer = answer  # marks it: exceptions of the tests have none
    return error


def _closest_builtin(name, args, message):
    kind = getattr(builtins, name, None)
    # These two would silently end a loop of the tests, such as `all(map(candidate, inputs))`
    if name in ("StopIteration", "StopAsyncIteration") or not (isinstance(kind, type) and issubclass(kind, Exception)):
        return SolutionError(f"{name}: {message}")
    try:
        if issubclass(kind, UnicodeError):
            *_, text, start, end, _ = args
            if not 0 <= start <= end <= len(text):
                raise ValueError("CPython would read beyond the text for the message")
        return kind(*args)
    except Exception:
        pass
    for base in kind.__mro__:
        try:
            return base(message)
        except Exception:  # such as ExceptionGroup, which needs exceptions too
            pass


class Judge:
    """Grades one program after another.

    Args:
        control (`socket.socket`): Connected to the zygote.
        timeout (`float`): Seconds that a program may take.
    """

    def __init__(self, control: socket.socket, timeout: float):
        self.control = control
        self.timeout = timeout
        self.armed = False
        self.late = False

    def _alarm(self, number, frame):
        if self.armed:
            self.late = True  # even if the tests swallow what is raised here
            raise TimeUp

    def grade(self, source: str, tests: str, entry_point: str, setup: str, inline: bool) -> list:
        """Return `[status, detail, seconds, needs_restart]`, the last of which says whether to replace this worker."""
        start = time.monotonic()
        # The last tests may have seeded these, and numpy's state is the one that solutions are forked with
        random.seed()
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed()
        solution = Solution(self.control)
        self.late = False
        try:
            # The last tests may have changed how the signal is handled
            signal.signal(signal.SIGALRM, self._alarm)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
            # Repeated, in case the tests catch the first one
            self.armed = True
            signal.setitimer(signal.ITIMER_REAL, self.timeout, 0.1)
            if inline:
                status, detail = self._inline(solution, source, tests, entry_point, setup)
            else:
                status, detail = self._apart(solution, source, tests, entry_point, setup)
            self.armed = False
        except (TimeUp, Fault):
            self.armed = False
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            solution.stop()
        seconds = time.monotonic() - start
        if self.late or seconds > self.timeout:  # the tests may have replaced the timer
            status, detail = "timeout", f"no verdict within {self.timeout:g} s"
        elif solution.fault:
            status, detail = solution.fault
        # The detail may contain text of the solution: make it one short line that is safe to print
        detail = "".join(letter if letter.isprintable() else " " for letter in detail[:MAX_DETAIL])
        # A timeout may have interrupted the tests in the middle of an import
        needs_restart = status == "timeout" or _threads_remain()
        return [status, detail, seconds, needs_restart]

    def _apart(self, solution, source, tests, entry_point, setup):
        answer = solution.load(source, entry_point, None, None)
        if answer != [None]:
            return explain(answer)
        status, detail, error = run_tests(solution.call, entry_point, setup, tests, types.ModuleType("tests"))
        if hasattr(error, "_answer"):
            return explain(error._answer)
        if status == "passed" and not solution.called:
            return "error", f"the tests never call {entry_point}"
        return status, detail

    def _inline(self, solution, source, tests, entry_point, setup):
        answer = solution.load(source, entry_point, setup, tests)
        if len(answer) == 2 and answer[0] in ("passed", "failed", "error", "out_of_memory") and type(answer[1]) is str:
            return answer
        return explain(answer)


@functools.lru_cache(maxsize=512)
def _compiled(text, name):
    return compile(text, name, "exec", dont_inherit=True)


def _threads_remain():
    threading = sys.modules.get("threading")
    return threading is not None and threading.active_count() > 1


def run_tests(
    candidate: Callable, entry_point: str, setup: str, tests: str, module: types.ModuleType
) -> tuple[str, str, BaseException | None]:
    """Run trusted tests in `module` against `candidate`; return the status, its detail and the exception."""
    sys.modules["tests"] = module  # dataclasses and pickle look it up
    namespace = module.__dict__
    namespace["__name__"] = "tests"
    try:
        exec(_compiled(setup, SETUP), namespace)
        namespace[entry_point] = namespace["candidate"] = candidate
        code = _compiled(tests, TESTS)
    except Exception as error:
        return "error", f"the task's setup or tests do not load: {type(error).__name__}: {error}", None
    before = namespace.get("check")
    try:
        exec(code, namespace)
        check = namespace.get("check")
        if check is not before:
            check(candidate)
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


def judge(caller: wire.Channel, control: socket.socket, timeout: float) -> NoReturn:
    """Grade the caller's programs until it is gone.

    Args:
        caller (`wire.Channel`): Receives programs as lists of five fields and sends verdicts as lists of four.
        control (`socket.socket`): Connected to the worker's zygote.
        timeout (`float`): Seconds that a program may take.
    """
    gc.collect()
    gc.freeze()
    worker = Judge(control, timeout)
    while True:
        try:
            caller.send(worker.grade(*caller.receive_program()))
        except (EOFError, ConnectionError):
            sys.exit(0)
