"""A solution that is a script: it runs as `python script.py < input > output` would.

Scripts for contests do more than `input` and `print`: they read descriptor 0 in one go, write to descriptor 1, replace
`sys.stdout`, leave the work to a thread with a large stack, or print at exit.

Not covered here: how a solution is reached and what its answer is worth (solution.py, judge.py).
"""

import atexit
import contextlib
import io
import os
import sys


def run(code, text, module):
    """Runs a script in a solution process; `sys.exit` is a normal end, unless it says that it failed.

    Args:
        code (`types.CodeType`): the compiled script.
        text (`str`): what it reads from stdin.
        module (`types.ModuleType`): its `__main__`.

    Returns:
        `str`: What it printed.
    """
    for descriptor in (0, 1):  # the script's last run may have closed them, and no other file may take their numbers
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
    except (AttributeError, OSError):  # not Linux, or no scratch folder: a script has no descriptors then
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
    """Does what an interpreter does at its end: it waits for threads, calls what wants to be called, and flushes."""
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
    left_alone = {threading.current_thread(), *(pools._threads_queues if pools else ())}  # a pool's wait for work
    return [thread for thread in threading.enumerate() if not thread.daemon and thread not in left_alone]
