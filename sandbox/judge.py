"""The trusted side: runs the tests of a program against a proxy of its solution, and alone writes the verdict.

The solution runs in another process, forked by the worker's zygote, and is reached through two pipes made for this one
program. A call of the proxy sends the arguments, receives a plain value or the name of an exception, and does in the
tests what the function would have done. Whatever the tests swallow, a channel that broke makes `passed` impossible.

Not covered here: what keeps the solution in its process (cage.py), and programs asked for `inline`, whose tests run
beside the solution and can be fooled by it (solution.py).
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
from _thread import allocate_lock

import wire

MAX_DETAIL = 200
TESTS = "<tests>"
SETUP = "<setup>"


class Fault(BaseException):
    """Ends the tests, whatever they catch: the solution's process or channel is of no further use."""


class TimeUp(BaseException):
    """The program's time is over."""


class SolutionError(Exception):
    """Stands in the tests for an exception of the solution that is no builtin `Exception`."""


class Solution:
    """One solution process, seen from the judge."""

    def __init__(self, control):
        self.control = control
        self.fault = None  # (status, detail) of what broke first; a verdict can no longer be `passed`
        self.called = False
        self._turn = allocate_lock()  # a call is alone on the channel, whichever thread of the tests makes it
        self._ending = allocate_lock()  # only one asks the zygote to kill it, or how it died
        # Two pipes: a call takes a third less time to cross and come back than over one socket
        answers, their_answers = os.pipe()
        their_calls, calls = os.pipe()
        socket.send_fds(control, [b"s"], [their_answers, their_calls])
        os.close(their_answers)
        os.close(their_calls)
        self.channel = wire.Channel(answers, calls)

    def load(self, *fields):
        """Sends the program's texts and returns the first answer."""
        try:
            self.channel.send_trusted(fields)
        except wire.CannotCross as error:
            self._break("error", f"in the program's text: {error}")
        except ConnectionError:
            pass  # it died early: reading tells how
        return self._receive()

    def call(self, *args, **kwargs):
        """What the tests call: the candidate."""
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
            if not _tells_of_exception(answer):
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
        # One item is a value, whatever it is; more are what else happened, by name
        if type(answer) is list and (len(answer) == 1 or answer and type(answer[0]) is str):
            return answer
        self._break("error", "the solution wrote to the channel itself")

    def _break(self, status, detail):
        self.fault = self.fault or (status, detail)
        raise Fault

    def stop(self):
        """Has the process killed, unless it has ended."""
        with self._ending:
            if self.channel is not None:
                channel, self.channel = self.channel, None
                self.control.send(b"k")
                channel.close()  # only now: the end of its channel would wake up the solution

    def _wait_status(self):
        """Returns how the process ended, which closed its channel."""
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})  # half of this would confuse the zygote
        with self._ending:
            if self.channel is None:  # the tests are over, and this is a thread that they left
                raise Fault
            self.channel.close()
            self.channel = None
            try:
                self.control.send(b"w")
                status = self.control.recv(4)
            except ConnectionError:
                status = b""
        if not status:
            os._exit(1)  # the zygote is gone: the caller replaces this worker and runs the program again
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
        return int.from_bytes(status, "little")


def explain(answer):
    """Returns status and detail for an answer that is no value."""
    kind, *content = answer
    if _tells_of_exception(answer):
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


def _tells_of_exception(answer):
    return answer[0] == "raised" and [*map(type, answer[1:])] == [str, tuple, str, str]


def _exception(answer):
    """Returns what to raise in the tests for an exception of the solution."""
    _, name, args, message, _ = answer
    error = _closest_builtin(name, args, message)
    error._answer = answer  # an exception of the tests has none
    return error


def _closest_builtin(name, args, message):
    kind = getattr(builtins, name, None)
    # The two that end an iteration would end the tests' own, `all(map(candidate, inputs))`, as if all had been seen
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
        except Exception:  # such as ExceptionGroup, which wants exceptions too
            pass


class Judge:
    """Grades one program after the other, for as long as the worker lives."""

    def __init__(self, control, timeout):
        self.control = control
        self.timeout = timeout
        self.armed = False
        self.late = False

    def _alarm(self, number, frame):
        if self.armed:
            self.late = True  # even if the tests swallow what is raised here
            raise TimeUp

    def grade(self, source, tests, entry_point, setup, inline):
        """Returns the verdict's fields, and whether to replace this worker: `[status, detail, seconds, spoilt]`."""
        start = time.monotonic()
        if "random" in tests or "random" in setup:
            random.seed()  # whatever the last tests left
            if "numpy" in sys.modules:
                sys.modules["numpy"].random.seed()  # a solution starts from the state that the worker was forked with
        solution = Solution(self.control)
        self.late = False
        try:
            # Whatever the last tests made of the signal
            signal.signal(signal.SIGALRM, self._alarm)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
            # Repeated, in case the tests swallow the first one.
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
        if self.late or seconds > self.timeout:  # the tests may have put an alarm of their own in the timer's place
            status, detail = "timeout", f"no verdict within {self.timeout:g} s"
        elif solution.fault:
            status, detail = solution.fault
        # A solution may have had its say in the detail: keep it one short line, and a harmless one to print.
        detail = "".join(letter if letter.isprintable() else " " for letter in detail[:MAX_DETAIL])
        # A timeout interrupts the tests anywhere, such as within an import
        return [status, detail, seconds, status == "timeout" or _threads_are_left()]

    def _apart(self, solution, source, tests, entry_point, setup):
        answer = solution.load(source, entry_point, None, None)
        if answer != [None]:
            return explain(answer)
        status, detail, error = run_tests(solution.call, entry_point, setup, tests, types.ModuleType("tests"))
        if hasattr(error, "_answer"):
            return explain(error._answer)
        if status == "passed" and not solution.called:
            return "error", f"the tests came to their end without a call of {entry_point}"
        return status, detail

    def _inline(self, solution, source, tests, entry_point, setup):
        answer = solution.load(source, entry_point, setup, tests)
        if len(answer) == 2 and answer[0] in ("passed", "failed", "error", "out_of_memory") and type(answer[1]) is str:
            return answer
        return explain(answer)


@functools.lru_cache(maxsize=512)
def _compiled(text, name):
    return compile(text, name, "exec", dont_inherit=True)


def _threads_are_left():
    threading = sys.modules.get("threading")
    return threading is not None and threading.active_count() > 1


def run_tests(candidate, entry_point, setup, tests, module):
    """Runs trusted tests in `module` against `candidate` and returns `(status, detail, exception or None)`."""
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
        namespace.clear()  # its functions hold it, and it holds what they answered
    return "passed", "", None


def last_line(traceback, file):
    """Returns the number of the last line of a file that the traceback comes by; 0 if there is none."""
    line = 0
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == file:
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return line


def judge(caller, control, timeout):
    """Serves the caller until it is gone.

    Args:
        caller (`wire.Channel`): programs come in as lists of five, verdicts go out as lists of four.
        control (`socket.socket`): connected to the worker's zygote.
        timeout (`float`): seconds a program may take.
    """
    gc.collect()
    gc.freeze()
    worker = Judge(control, timeout)
    while True:
        try:
            caller.send(worker.grade(*caller.receive_program()))
        except (EOFError, ConnectionError):
            sys.exit(0)
