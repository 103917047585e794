"""The judge's end of a solution process: how the tests call it, and what its answers mean.

A call sends the arguments over a pipe, receives a plain value or the name of an exception, and returns the value or
raises that exception in the tests. Once a channel has broken, `passed` is impossible, whatever the tests catch.

Not covered here: the other end (solution.py), and what becomes of the tests (judge.py).
"""

import builtins
import os
import signal
import socket
from _thread import allocate_lock  # importing threading would make every fork slower
from typing import Any, NoReturn

import wire

ANSWER = "_answer"  # the attribute that marks an exception of the solution


class Fault(BaseException):
    """Ends the tests: the solution's process or channel has failed."""


class SolutionError(Exception):
    """Stands in the tests for an exception of the solution that is not a builtin `Exception`."""


class Solution:
    """The judge's end of one solution process.

    Args:
        control (`socket.socket`): Connected to the zygote, which forks the process.
    """

    def __init__(self, control: socket.socket, stdio_bytes: int = 0):
        self.control = control
        self.stdio_bytes = stdio_bytes
        self.fault = None  # (status, detail) of the first failure, which becomes the verdict
        self.started = False  # whether the process may have received the solution's source
        self.loaded = False
        self.called = False
        self.reached = False  # whether these tests have reached it with a call
        self._turn = allocate_lock()  # one call at a time, whichever thread of the tests makes it
        self._ending = allocate_lock()  # only one thread asks the zygote to kill the process or to wait for it
        # Two pipes: a call over one socket takes half as long again
        judge_answers, solution_answers = os.pipe()
        solution_calls, judge_calls = os.pipe()
        self.files = [_nameless_file(), _nameless_file()] if stdio_bytes else []  # stdin and stdout of a script
        socket.send_fds(control, [b"s"], [solution_answers, solution_calls, *self.files])
        os.close(solution_answers)
        os.close(solution_calls)
        self.channel: wire.Channel | None = wire.Channel(judge_answers, judge_calls)

    def prepare(self, setup: bytes | None, names: list[str], inline: bool) -> list:
        """Run the setup in the process, which has nothing of the solution yet, and return the answer."""
        self._send((setup, names, inline))
        return self._receive() if setup is not None else [None]

    def load(self, text: str | tuple) -> list:
        """Send the solution's source and return the first answer."""
        self.started = True
        self._send(text)
        return self._receive()

    def _send(self, value):
        assert self.channel is not None
        try:
            self.channel.send_trusted(value)
        except wire.CannotCross as error:
            self._break("error", f"in the program's text: {error}")
        except ConnectionError:
            pass  # it died early: reading will tell how

    def call(self, name: str, /, *args: Any, **kwargs: Any) -> Any:
        """Call a function of the solution: the `candidate` of the tests."""
        if not self.loaded:
            raise RuntimeError("the setup calls the solution, which is not loaded yet")
        self.called = True
        with self._turn:
            if self.fault or self.channel is None:
                raise Fault
            try:
                if self.files:
                    args = self._write_stdin(*args, **kwargs)
                    kwargs = {}
                self.channel.send_trusted((name, args, kwargs))
            except (wire.CannotCross, TypeError, OSError) as error:
                if not isinstance(error, ConnectionError):  # if it died early, reading will tell how
                    # What the tests pass on may come from an earlier answer
                    self._break("error" if self.reached else "invalid", f"in an argument of the tests: {error}")
            self.reached = True
            answer = self._receive()
            if len(answer) == 1:
                return self._read_stdout() if self.files else answer[0]
            if not _is_exception(answer):
                self._break(*explain(answer))
        raise _exception(answer)

    def _write_stdin(self, text):
        if type(text) is not str:
            raise wire.CannotCross(f"a script takes its stdin as a str, not as {type(text).__name__}")
        data = text.encode("utf-8", "surrogatepass")
        if len(data) > self.stdio_bytes:
            raise wire.CannotCross(f"a script's stdin of {len(data)} bytes is over stdio_mb={self.stdio_bytes >> 20}")
        stdin, stdout = self.files
        os.ftruncate(stdin, 0)
        os.ftruncate(stdout, 0)
        written = 0
        while written < len(data):
            written += os.pwrite(stdin, memoryview(data)[written:], written)
        return ()

    def _read_stdout(self):
        size = min(os.fstat(self.files[1]).st_size, self.stdio_bytes)
        return os.pread(self.files[1], size, 0).decode("utf-8", "replace")

    def _receive(self) -> list:
        assert self.channel is not None
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

    def _break(self, status, detail) -> NoReturn:
        self.fault = self.fault or (status, detail)
        raise Fault

    def stop(self) -> None:
        """Have the process killed, unless it has exited."""
        for file in self.files:
            os.close(file)
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
        return "error", f"the solution does not define {text} as a function"
    if kind == "cannot cross":
        return "error", f"in the result: {text}"
    return "error", "the solution wrote to the channel itself"


def _nameless_file():
    if hasattr(os, "memfd_create"):
        return os.memfd_create("script")
    import tempfile

    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


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
    setattr(error, ANSWER, answer)
    return error


def _closest_builtin(name, args, message) -> Exception:
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
    raise AssertionError("Exception takes any message")
