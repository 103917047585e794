"""The untrusted side: the zygote, and the solution processes that it forks, one for each program.

The zygote is forked before any test text exists in the worker and is caged once. A solution process receives its
source over its only descriptors, executes it, and answers calls until it is killed. Whatever it sends is data to the
judge, so nothing here needs to be defended from the code it runs.

Not covered here: the cage itself (cage.py), how a script runs (script.py), and how the judge reads answers (judge.py).
"""

import builtins
import contextlib
import gc
import marshal
import os
import signal
import socket
import sys
import time
import types
from collections.abc import Callable
from typing import Any, NoReturn

import cage
import judge
import proxy
import script
import wire

ANSWERS, CALLS, CONTROL = 3, 4, 5  # descriptors: two pipes of a solution process, and the zygote's socket
SOURCE = "<solution>"
MAX_MESSAGE = 10_000  # characters of what an exception says
DYING_SECONDS = 0.2  # how long a process that has closed its channel may take to finish dying


def zygote(control: socket.socket, limit_child: Callable[[bool], object], has_scratch: bool) -> NoReturn:
    """Fork a solution process for each start that the judge sends, until the judge is gone.

    Args:
        control (`socket.socket`): Connected to the judge. A start is one byte with two pipes, and with two files for
            stdin and stdout if it is a script. Then the judge says `k` (kill the process) or `w` (it closed its
            channel: wait for it), and receives the wait status after a `w`.
        limit_child (`Callable`): Sets the limits that each solution process needs anew, given whether it is a script;
            raises if it fails.
        has_scratch (`bool`): Whether solutions can write files, which are then deleted after each program.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the first process of a namespace ignores what it does not handle
    builtins.exit = builtins.quit = sys.exit  # the server runs without the site module, which would define them
    os.environ.clear()
    gc.collect()
    gc.freeze()
    while True:
        # They come as the lowest free descriptors: ANSWERS, CALLS and the two after CONTROL
        ancillary = control.recvmsg(1, socket.CMSG_SPACE(16))[1]
        if not ancillary:
            os._exit(0)
        is_script = len(ancillary[0][2]) == 16
        pid = os.fork()
        if pid == 0:
            _solution_process(limit_child, is_script)
        os.closerange(ANSWERS, CONTROL)
        if is_script:
            os.closerange(CONTROL + 1, CONTROL + 3)
        if os.read(CONTROL, 1) == b"w":
            os.write(CONTROL, _wait_briefly(pid).to_bytes(4, "little"))
        else:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        if has_scratch and os.listdir():
            cage.wipe_scratch()


def _solution_process(limit_child: Callable[[bool], object], is_script: bool) -> NoReturn:
    try:
        if is_script:
            os.dup2(CONTROL + 1, script.STDIN)
            os.dup2(CONTROL + 2, script.STDOUT)
            os.closerange(script.STDOUT + 1, 64)
        else:
            os.closerange(CONTROL, 64)
        limit_child(is_script)
        _serve(wire.Channel(CALLS, ANSWERS))
    except BaseException:
        pass
    finally:
        os._exit(1)


def _wait_briefly(pid):
    end = time.monotonic() + DYING_SECONDS
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


def _serve(channel):
    setup, names, inline = channel.receive_trusting()
    module = new_module("__main__" if names == ["__main__"] else "solution")
    if setup is not None:
        setup = marshal.loads(setup)
        _send_answer(channel, _guarded(_run_setup, (setup, names, module.__dict__), {}))
    if inline:  # the judge has given up the separation for this program
        source, parts = channel.receive_trusting()
        channel.send(_run_inline(source, names, parts, module))
        return
    answer = _load(channel.receive_trusting(), names, setup, module)
    if len(answer) > 1:
        _send_answer(channel, answer)
        return
    (functions,) = answer
    channel.send([None])
    while True:
        name, args, kwargs = channel.receive_trusting()
        function = functions[name]
        _send_answer(channel, _guarded(function, args, kwargs) if function else ["no entry point", name])


def _run_setup(code, names, namespace):
    """Run the setup, with stand-ins for the functions of the solution, which it may import and cannot call yet."""
    stand_ins = {name: lambda *args, _name=name, **kwargs: namespace[_name](*args, **kwargs) for name in names}
    namespace.update(stand_ins)
    exec(code, namespace)
    for name, stand_in in stand_ins.items():
        if namespace.get(name) is stand_in:
            del namespace[name]


def _run_inline(source, names, parts, module):
    """Run solution and tests in one interpreter; return `[status, detail, passed_parts]`."""
    try:
        exec(compile(source, SOURCE, "exec", dont_inherit=True), module.__dict__)
        functions: dict[str, Any] = {name: _look_up(module.__dict__, name) for name in names}
        candidate = functions["candidate"] = functions[names[0]]
        if candidate is None:
            return [*proxy.explain(["no entry point", names[0]]), [False] * len(parts)]
    except BaseException as error:
        return ["error", f"{type(error).__name__}: {error}", [False] * len(parts)]
    results = []
    for part in parts:
        tests_module = types.ModuleType("tests")
        tests_module.__dict__.update(module.__dict__)
        status, detail, error = judge.run_tests(tests_module, part, functions)
        results.append(("out_of_memory" if isinstance(error, MemoryError) else status, detail))
    status, detail = next((result for result in results if result[0] != "passed"), ("passed", ""))
    return [status, detail[:MAX_MESSAGE], [result[0] == "passed" for result in results]]


def _load(source, names, setup, module) -> list[Any]:
    """Return `[functions by name]`, or the answer that says why there are none."""
    try:
        code = compile(source, SOURCE, "exec", dont_inherit=True)
    except BaseException as error:
        return ["not compiled", f"{type(error).__name__}: {error}"[:200]]
    if names == ["__main__"]:
        return [{"__main__": lambda: script.run(code, setup, new_module("__main__"))}]
    answer = _guarded(exec, (code, module.__dict__), {})
    if len(answer) > 1:
        return answer
    answer = _guarded(lambda: {name: _look_up(module.__dict__, name) for name in names}, (), {})
    if len(answer) == 1 and answer[0][names[0]] is None:
        return ["no entry point", names[0]]
    return answer


def _look_up(namespace, name):
    """Return the function of that name, such as `f` or `Solution().method`; None if there is none."""
    name, _, method = name.partition("().")
    found = namespace.get(name)
    if not method:
        return found if callable(found) else None
    if not callable(found) or not callable(getattr(found, method, None)):
        return None
    return lambda *args, **kwargs: getattr(found(), method)(*args, **kwargs)


def new_module(name: str) -> types.ModuleType:
    """Return an empty module and register it, because dataclasses and pickle look theirs up."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    return module


def warm_up() -> None:
    """Load a program and call it a few times, so that forks inherit code that is specialised for it."""
    source = "from typing import List\ndef f(numbers: List[int]) -> int:\n    return len(numbers)\n"
    for _ in range(10):
        judge_end, solution_end = socket.socketpair()
        with judge_end, solution_end:
            channel = wire.Channel(judge_end.fileno())
            channel.send_trusted((None, ["f"], False))
            channel.send_trusted(source)
            for number in range(5):
                channel.send_trusted(("f", ([number, 2.5],), {}))
            judge_end.shutdown(socket.SHUT_WR)
            with contextlib.suppress(EOFError):
                _serve(wire.Channel(solution_end.fileno()))


def _guarded(function: Callable, args: Any, kwargs: dict) -> list:
    """Return the answer to a call: `[value]`, `["exited", code]` or `["raised", class name, args, message, where]`."""
    try:
        return [function(*args, **kwargs)]
    except SystemExit as error:
        return ["exited", f"{error.code}"[:50]]
    except BaseException as error:
        kind = next(kind for kind in type(error).__mro__ if getattr(builtins, kind.__name__, None) is kind)
        line = judge.last_line(error.__traceback__, SOURCE)
        where = f"in line {line}" if line else "in the call"
        if kind is MemoryError:
            error.__traceback__ = None  # frees what the frames hold, so that there is room for an answer
            return ["raised", "MemoryError", (), "", where]
        try:
            message = str(error)[:MAX_MESSAGE]
        except BaseException:
            message = ""
        return ["raised", kind.__name__, _arguments(kind, error, message), message, where]


def _arguments(kind, error, message):
    """Return arguments with which that builtin class makes an exception that says what `error` says."""
    try:
        args = kind.__reduce__(error)[1]  # for an OSError they include the file's name, which `error.args` lacks
        if str(kind(*args)) == message:
            return args
    except BaseException:
        pass
    return (message,)


def _send_answer(channel, answer):
    try:
        channel.send(answer)
    except wire.CannotCross as error:
        if len(answer) > 1:  # an exception with such an argument
            *kind, _, message, where = answer
            channel.send([*kind, (message,), message, where])
        else:
            channel.send(["cannot cross", str(error)])
    except MemoryError:
        channel.send(["raised", "MemoryError", (), "", "while its result was sent"])
