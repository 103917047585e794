"""A solution that is a script: it runs as `python script.py < input > output` would.

Contest scripts do more than `input` and `print`: they read all of descriptor 0 at once, write to descriptor 1, replace
`sys.stdout`, do the work in a thread with a large stack, or print at exit.

Not covered here: how calls reach a solution and how its answers are judged (solution.py, judge.py).
"""

import atexit
import contextlib
import os
import sys
import types

STDIN, STDOUT = 5, 6  # descriptors of nameless files that the judge made, writes and reads


def run(code: types.CodeType, setup: types.CodeType | None, module: types.ModuleType) -> None:
    """Run a script in a solution process. `sys.exit` is a normal end, unless its code says that the script failed.

    Args:
        code (`types.CodeType`): The compiled script.
        setup (`types.CodeType`, *optional*): What is executed before it.
        module (`types.ModuleType`): Its `__main__`.

    Raises:
        `SystemExit`: If the script exits with a code other than 0.
        `BaseException`: Whatever the script raises.
    """
    for descriptor, file in ((0, STDIN), (1, STDOUT)):  # its last run may have closed them
        os.dup2(file, descriptor)
        os.lseek(descriptor, 0, os.SEEK_SET)
    sys.stdin = sys.__stdin__ = open(0, encoding="utf-8", errors="surrogatepass", closefd=False)  # noqa: SIM115
    sys.stdout = sys.__stdout__ = open(  # noqa: SIM115
        1, "w", encoding="utf-8", errors="surrogatepass", closefd=False
    )
    try:
        if setup is not None:
            exec(setup, module.__dict__)
        exec(code, module.__dict__)
    except SystemExit as error:
        if error.code not in (None, 0):
            raise
    finally:
        _finish()


def _finish():
    """Do what an interpreter does at exit: wait for threads, run exit handlers, flush."""
    while threads := _unfinished_threads():
        threads[0].join()
    atexit._run_exitfuncs()
    for stream in filter(None, (sys.stdout, sys.__stdout__)):
        with contextlib.suppress(OSError, ValueError):  # the script closed it
            stream.flush()


def _unfinished_threads():
    threading, pools = map(sys.modules.get, ("threading", "concurrent.futures.thread"))
    if threading is None:
        return []
    skipped = {threading.current_thread(), *(pools._threads_queues if pools else ())}  # a pool's threads wait for work
    return [thread for thread in threading.enumerate() if not thread.daemon and thread not in skipped]
