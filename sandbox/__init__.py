"""Runs untrusted programs against trusted tests and returns verdicts.

    with Sandbox() as sandbox:
        verdicts = sandbox.run([Program(solution=..., tests=..., entry_point="add")])

This file is the caller's side. It starts one small server as a fresh interpreter (never a fork of the caller, whose
memory may be huge), owns one socket for each worker, hands out programs and replaces what dies. In a worker, the
judge runs the tests (judge.py), the solution runs in a caged process of its own (solution.py, cage.py), and plain
values cross between them (wire.py). No line of a solution runs in the caller's process.

Not covered here: GPU code, network tasks, and tasks in other languages than Python.
"""

import json
import logging
import os
import select
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from dataclasses import dataclass

from .wire import Channel

__all__ = ["Program", "Sandbox", "Verdict"]

GRACE_SECONDS = 0.6  # beyond the timeout, before a worker that gave no verdict is killed
MAX_ATTEMPTS = 3  # for a program whose worker died

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Program:
    """One solution and the tests that it must pass.

    Args:
        solution (`str`): Untrusted source of a Python module.
        tests (`str`): Trusted source. It may use `entry_point` and `candidate`, and define `check(candidate)`, which
            is then called.
        entry_point (`str`): Name of the function that the solution must define. `"__main__"` makes the candidate a
            function that runs the solution as a script: stdin text in, printed text out.
        setup (`str`, defaults to `""`): Trusted source that is executed before the tests, such as a task's prompt with
            the helpers that its tests use.
        inline (`bool`, defaults to `False`): Run tests and solution in one interpreter, for tasks whose values cannot
            cross between processes. A solution can fool its tests then; the log says so.
    """

    solution: str
    tests: str
    entry_point: str
    setup: str = ""
    inline: bool = False


@dataclass(frozen=True)
class Verdict:
    """What became of a program.

    Args:
        status (`str`): `passed`, `failed` (a test failed), `error` (the solution does not load, raised, or a value
            cannot cross), `timeout`, `out_of_memory` or `crashed` (its process died or exited).
        detail (`str`): One short line for people; empty when passed.
        seconds (`float`): Wall-clock time it took.
    """

    status: str
    detail: str
    seconds: float

    @property
    def passed(self):
        return self.status == "passed"


class _Worker:
    """The caller's end of one worker."""

    def __init__(self, number):
        self.number = number
        self.socket = None
        self.job = None  # index of the program in flight
        self.deadline = 0.0


class Sandbox:
    """A pool of workers that grade programs. Use it as a context manager, or call `close`.

    Args:
        workers (`int`, *optional*): Programs graded at once. Defaults to the number of usable processor cores.
        timeout (`float`, defaults to `5.0`): Seconds of wall-clock time a program may take.
        memory_mb (`int`, defaults to `1024`): Megabytes of address space a solution may use.
        isolation (`str`, defaults to `"auto"`): `"auto"` takes the strongest cage the kernel offers and warns once
            about what is missing; `"strict"` raises when anything is missing.

    Raises:
        `ValueError`: If an argument is out of range.
        `RuntimeError`: If the cage is incomplete under `"strict"`, or the server does not start.
    """

    def __init__(self, workers=None, timeout=5.0, memory_mb=1024, isolation="auto"):
        self.workers = workers or _usable_cores()
        self.timeout = timeout
        self.memory_mb = memory_mb
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._server = None
        self._pool = []

    def run(self, programs):
        """Grades programs and returns one verdict for each, in order.

        Args:
            programs (`Iterable[Program]`): Any number of programs.

        Returns:
            `list[Verdict]`
        """
        programs = list(programs)
        if os.getpid() != self._pid:  # a fork of the caller: the sockets belong to the parent
            self._lock = threading.Lock()
            self._pid = os.getpid()
            self._server = None
        with self._lock:
            return self._run(programs)

    def _run(self, programs):
        verdicts = [None] * len(programs)
        attempts = [0] * len(programs)
        waiting = deque(range(len(programs)))
        if self._server is None and programs:
            self._start()
        while waiting or any(worker.job is not None for worker in self._pool):
            for worker in self._pool:
                if worker.job is None and waiting:
                    self._assign(worker, waiting.popleft(), programs)
            busy = {worker.socket.fileno(): worker for worker in self._pool if worker.job is not None}
            poll = select.poll()
            for descriptor in busy:
                poll.register(descriptor, select.POLLIN)
            pause = min(worker.deadline for worker in busy.values()) - time.monotonic()
            for descriptor, _ in poll.poll(max(0, int(pause * 1000) + 1)):
                worker = busy[descriptor]
                job, worker.job = worker.job, None
                try:
                    verdicts[job] = Verdict(*Channel(descriptor).receive_text())
                except (EOFError, ValueError):
                    self._replace(worker)
                    attempts[job] += 1
                    if attempts[job] < MAX_ATTEMPTS:
                        waiting.appendleft(job)
                    else:
                        verdicts[job] = Verdict("crashed", f"its worker died {MAX_ATTEMPTS} times", 0.0)
            now = time.monotonic()
            for worker in self._pool:
                if worker.job is not None and now > worker.deadline:
                    job, worker.job = worker.job, None
                    self._replace(worker)
                    verdicts[job] = Verdict("timeout", f"no verdict within {self.timeout:g} s", self.timeout)
        return verdicts

    def _assign(self, worker, job, programs):
        program = programs[job]
        worker.job = job
        worker.deadline = time.monotonic() + self.timeout + GRACE_SECONDS
        try:
            Channel(worker.socket.fileno()).send_text(
                [program.solution, program.tests, program.entry_point, program.setup, program.inline]
            )
        except ConnectionError:
            pass  # reading tells that it died

    def _start(self):
        ours, theirs = socket.socketpair()
        settings = {
            "control": theirs.fileno(),
            "caller": os.getpid(),
            "timeout": self.timeout,
            "memory_mb": self.memory_mb,
        }
        server = os.path.join(os.path.dirname(os.path.abspath(__file__)), "server.py")
        self._process = subprocess.Popen(
            [sys.executable, "-I", server, json.dumps(settings)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            env={},
            cwd="/",
            start_new_session=True,
        )
        theirs.close()
        self._server = ours
        self._pool = [_Worker(number) for number in range(self.workers)]
        for worker in self._pool:
            self._replace(worker)
        self._finalizer = weakref.finalize(self, _stop, os.getpid(), self._process, self._server)

    def _replace(self, worker):
        if worker.socket:
            worker.socket.close()
        worker.socket, theirs = socket.socketpair()
        socket.send_fds(self._server, [worker.number.to_bytes(4, "little")], [theirs.fileno()])
        theirs.close()

    def isolation(self):
        """Returns what is active in the cage here, by name."""
        return {}

    def close(self):
        """Stops the server and all workers. The next `run` starts them again."""
        if self._server is not None:
            self._finalizer()
            self._server = None
            for worker in self._pool:
                worker.socket.close()
            self._pool = []

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


def _stop(pid, process, server):
    if os.getpid() == pid:
        server.close()
        process.wait()


def _usable_cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
