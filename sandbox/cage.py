"""What a solution process may not do, and what the kernel here offers to hold it to that.

Not covered here: the worker's processes themselves (server.py, solution.py).
"""

import ctypes
import resource
import signal
import sys

_libc = ctypes.CDLL(None, use_errno=True)
PR_SET_PDEATHSIG = 1


def die_with_parent():
    """Asks the kernel to kill this process when its parent ends."""
    if sys.platform == "linux":
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def enter(memory_mb, timeout):
    """Cages this process for good and returns what each of its children must call for itself."""

    def limit_child():
        resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        seconds = int(timeout) + 2
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))

    return limit_child
