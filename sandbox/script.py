"""A solution that is a script: it runs as `python script.py < input > output` would.

Contest scripts do more than `input` and `print`: they read all of descriptor 0 at once, write to descriptor 1, replace
`sys.stdout`, do the work in a thread with a large stack, or print at exit.

Not covered here: how calls reach a solution and how its answers are judged (solution.py, judge.py).
"""

import atexit
import contextlib
import io
import os
import sys
import types


def run(code: types.CodeType, text: str, module: types.ModuleType) -> str:
    """Run a script in a solution process. `sys.exit` is a normal end, unless its code says that the script failed.

    Args:
        code (`types.CodeType`): The compiled script.
        text (`str`): What it reads from stdin.
        module (`types.ModuleType`): Its `__main__`.

    Returns:
        `str`: What it printed.

    Raises:
        `SystemExit`: If the script exits with a code other than 0.
        `BaseException`: Whatever the script raises.
    """
    for descriptor in (0, 1):  # its last run may have closed them, and no other file may get their numbers
        os.dup2(2, descriptor)
    stdin, stdout = _nameless_file(text.encode("utf-8", "surrogatepass")), _nameless_file()
    sys.stdin = sys.__stdin__ = _text_stream(stdin, 0, "r")
    sys.stdout = sys.__stdout__ = _text_stream(stdout, 1, "w")
    try:
        exec(code, module.__dict__)
    except SystemExit as error:
        if error.code not in (None, 0):
            raise
    finally:
        _finish()
    stdout.seek(0)
    return stdout.read().decode("utf-8", "replace")


def _nameless_file(content=b""):
    try:
        file = open(os.open(".", os.O_TMPFILE | os.O_RDWR), "w+b")
    except (AttributeError, OSError):  # not Linux, or no scratch folder: a script then has no descriptors
        file = io.BytesIO()
    file.write(content)
    file.seek(0)
    return file


def _text_stream(file, descriptor, mode):
    if isinstance(file, io.BytesIO):
        return io.TextIOWrapper(file, "utf-8", "surrogatepass")
    os.dup2(file.fileno(), descriptor)
    return open(descriptor, mode, encoding="utf-8", errors="surrogatepass", closefd=False)


def _finish():
    """Do what an interpreter does at exit: wait for threads, run exit handlers, flush."""
    while threads := _unfinished_threads():
        threads[0].join()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.__stdout__):
        with contextlib.suppress(OSError, ValueError):  # the script closed it
            stream.flush()


def _unfinished_threads():
    threading, pools = map(sys.modules.get, ("threading", "concurrent.futures.thread"))
    if threading is None:
        return []
    skipped = {threading.current_thread(), *(pools._threads_queues if pools else ())}  # a pool's threads wait for work
    return [thread for thread in threading.enumerate() if not thread.daemon and thread not in skipped]
