"""Run untrusted programs against trusted tests and return verdicts.

    with Sandbox() as sandbox:
        verdicts = sandbox.run([Program(solution=..., tests=..., entry_point="add")])

`RaySandbox` does the same on the hosts of a Ray cluster (on_ray.py).

This file is the caller's side. It starts one small server as a fresh interpreter (never a fork of the caller, whose
memory may be huge), owns one socket per worker, assigns programs and replaces dead workers. In a worker, the judge runs
the tests (judge.py), the solution runs in a caged process of its own (solution.py, cage.py), and plain values cross
between them (wire.py). No line of a solution runs in the caller's process.

Not covered here: GPU code, tasks that need a network, and languages other than Python.
"""

import contextlib
import json
import logging
import os
import select
import socket
import struct
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from .host import first_core, installed, low_limits, set_limits, usable_cores
from .program import Program, Verdict, failed_parts
from .wire import Channel

if TYPE_CHECKING:
    from .on_ray import RaySandbox

__all__ = ["MAX_TIMEOUT", "Program", "RaySandbox", "Sandbox", "Verdict"]

MAX_TIMEOUT = 3600  # seconds that a program may be given
GRACE_SECONDS = 0.6  # after the timeout, before a worker without a verdict is killed
MAX_ATTEMPTS = 3  # to run a program whose worker died, and to start the workers
SILENCE_SECONDS = 10  # within a message, before a worker counts as lost

logger = logging.getLogger(__name__)


def __getattr__(name: str):
    if name != "RaySandbox":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .on_ray import RaySandbox

    return RaySandbox


class _Worker:
    """The caller's end of one worker."""

    channel: Channel

    def __init__(self, number: int):
        self.number = number
        self.socket = None
        self.packages = 0  # those that it has loaded, a bit each
        self.job = 0  # index of the program that it was given last
        self.started = False  # whether it said that it has started that program's solution
        self.deadline = 0.0

    def close(self):
        if self.socket is not None:
            self.socket.close()


class Sandbox:
    """A pool of workers that grade programs. Use it as a context manager, or call `close`.

    Threads may share one: their batches take turns. A fork of the caller starts its own workers at its first `run`.

    Args:
        workers (`int`, *optional*): Programs graded at once. Defaults to the number of usable processor cores, divided
            among the processes of a launcher (`LOCAL_WORLD_SIZE`).
        timeout (`float`, defaults to `5.0`): Seconds of wall-clock time that a program may take.
        memory_mb (`int`, defaults to `1024`): Megabytes of address space that a solution may use beside its
            interpreter, at least 64.
        isolation (`str`, defaults to `"auto"`): `"auto"` uses every feature of the cage that the kernel has and
            warns about those missing; `"strict"` raises if any is missing.
        packages (`Iterable[str]`, *optional*): Names of installed packages that solutions may import, beside numpy, as
            in `import`. A worker loads one when a program's solution or setup names it. Install them outside of /tmp,
            which solutions see as an empty folder.
        stdio_mb (`int`, defaults to `64`): Megabytes that the stdin of a script may hold, and its stdout.

    Raises:
        `ValueError`: If an argument is out of range, or a package is not installed.
        `RuntimeError`: If the workers do not start, or the cage is incomplete under `"strict"`.
    """

    def __init__(
        self,
        workers: int | None = None,
        timeout: float = 5.0,
        memory_mb: int = 1024,
        isolation: str = "auto",
        packages: Iterable[str] = (),
        stdio_mb: int = 64,
    ):
        if workers is not None and workers < 1:
            raise ValueError(f"workers={workers}: give at least 1, or None for one per processor core")
        _check(timeout, memory_mb, isolation, stdio_mb)
        self._packages = ["numpy", *installed(packages)]
        self.workers = workers or usable_cores()
        self.timeout = timeout
        self.memory_mb = memory_mb
        self.stdio_mb = stdio_mb
        self.strict = isolation == "strict"
        self._warned = False
        self._reset()
        self._start()

    def run(self, programs: Iterable[Program]) -> list[Verdict]:
        """Grade programs.

        Args:
            programs (`Iterable[Program]`): Any number of programs.

        Returns:
            `list[Verdict]`: One for each program, in order.

        Raises:
            `RuntimeError`: If lost workers cannot be started again.
            `OSError`: If no descriptor is left to replace a worker.
        """
        programs = list(programs)
        with self._locked():
            try:
                return self._run(programs)
            except BaseException:
                self._stop()  # programs still running must not answer to the next batch
                raise

    def isolation(self) -> dict[str, str]:
        """Report the cage's features on this machine.

        Returns:
            `dict[str, str]`: For each feature `"active"`, or `"missing: "` and the reason.
        """
        with self._locked():
            if not self._running():
                self._start()
            return dict(self._isolation)

    def close(self) -> None:
        """Stop the server and all its workers. The next `run` starts them again."""
        with self._locked():
            self._stop()

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _locked(self):
        if os.getpid() != self._pid:  # in a fork: the server and its sockets are the parent's
            self._reset()
        return self._lock

    def _reset(self):
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._shutdown = None
        self._pool = []

    def _run(self, programs):
        verdicts: list[Any] = [None] * len(programs)
        attempts = [0] * len(programs)
        waiting = deque(range(len(programs)))
        idle = list(self._pool)
        busy = {}  # descriptor: worker; the first has the earliest deadline
        poll = select.poll()
        _warn_inline(programs)

        def lost(job, started=True):
            attempts[job] += 1
            if attempts[job] < MAX_ATTEMPTS:
                waiting.appendleft(job)
            else:  # once it has started, the solution may have caused it
                status, when = ("crashed", "") if started else ("invalid", " before its solution started")
                detail = f"its worker died {MAX_ATTEMPTS} times{when}"
                verdicts[job] = Verdict(status, detail, 0.0, failed_parts(programs[job]))

        def idle_again(descriptor):
            poll.unregister(descriptor)
            idle.append(busy.pop(descriptor))
            return idle[-1]

        while waiting or busy:
            if not self._running():
                for worker in busy.values():
                    lost(worker.job)
                self._start()
                idle, busy, poll = list(self._pool), {}, select.poll()
                continue
            while waiting and idle:
                worker = idle.pop()
                job = waiting.popleft()
                self._assign(worker, job, programs[job], attempts[job] > 0)
                busy[worker.channel.readable] = worker
                poll.register(worker.channel.readable, select.POLLIN)
            replaced = []
            pause = next(iter(busy.values())).deadline - time.monotonic()
            for descriptor, _ in poll.poll(max(0, pause * 1000) + 1):
                worker = busy[descriptor]
                try:
                    answer = worker.channel.receive()
                    if answer == "started":
                        worker.started = True
                        continue
                    *fields, needs_restart = answer
                    verdicts[worker.job] = Verdict(*fields)
                except (EOFError, ValueError, TypeError):
                    lost(worker.job, worker.started)
                    needs_restart = True
                idle_again(descriptor)
                if needs_restart:
                    replaced.append(worker)
            now = time.monotonic()
            while busy and now > (worker := next(iter(busy.values()))).deadline:
                idle_again(worker.channel.readable)
                seconds = self.timeout + GRACE_SECONDS + now - worker.deadline
                verdicts[worker.job] = Verdict(
                    "timeout", f"no verdict within {self.timeout:g} s", seconds, failed_parts(programs[worker.job])
                )
                replaced.append(worker)
            self._replace(replaced)
        return verdicts

    def _assign(self, worker, job, program, again):
        caged = program.setup + program.solution
        if program.inline:
            caged += program.tests if isinstance(program.tests, str) else "".join(program.tests)
        named = sum(1 << bit for bit, name in enumerate(self._packages) if name in caged)
        if named & ~worker.packages:
            worker.packages |= named
            self._replace([worker])
        worker.job = job
        worker.started = False
        worker.deadline = time.monotonic() + self.timeout + GRACE_SECONDS
        fields = [program.solution, program.tests, program.entry_point, program.setup, bool(program.inline), again]
        with contextlib.suppress(OSError):  # it died: reading will tell
            worker.channel.send_program(fields)

    def _running(self):
        return self._shutdown is not None and self._process.poll() is None

    def _start(self):
        """Start the server and all workers, after stopping any earlier ones."""
        failure = None
        for _ in range(MAX_ATTEMPTS):
            self._stop()
            try:
                return self._launch()
            except (EOFError, OSError) as error:
                failure = f"{error!r}{self._last_words()}"
        self._stop()
        raise RuntimeError(f"the sandbox's server does not start: {failure}{set_limits()}")

    def _last_words(self):
        if self._shutdown is None:
            return ""
        self._process.kill()
        assert self._process.stderr is not None
        lines = self._process.stderr.read().decode("utf-8", "replace").splitlines()
        return f", {lines[-1]}" if lines else ""

    def _launch(self):
        self._server, server_end = socket.socketpair()
        settings = {
            "control": server_end.fileno(),
            "caller": os.getpid(),
            "first_core": first_core(usable_cores()),
            "timeout": self.timeout,
            "memory_mb": self.memory_mb,
            "stdio_mb": self.stdio_mb,
            "packages": self._packages,
            "path": [path for path in sys.path if path.endswith("-packages")],
        }
        server = os.path.join(os.path.dirname(os.path.abspath(__file__)), "server.py")
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-s", "-S", server, json.dumps(settings)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=[server_end.fileno()],
            env={"PYTHONHASHSEED": "0"},  # or the order of sets, and with it verdicts, would change at each start
            cwd="/",
            start_new_session=True,  # Ctrl-C is the caller's to handle
        )
        server_end.close()
        self._shutdown = weakref.finalize(self, _stop, os.getpid(), self._process, self._server)
        self._pool = [_Worker(number) for number in range(self.workers)]
        for worker in self._pool:
            self._request(worker)
        for worker in self._pool:
            self._greet(worker)

    def _stop(self):
        if self._shutdown is not None:
            self._shutdown()
            self._shutdown = None
            for worker in self._pool:
                worker.close()
            self._pool = []

    def _replace(self, workers):
        """Kill all these workers, then wait for their successors to start."""
        try:
            for worker in workers:
                self._request(worker)
            for worker in workers:
                self._greet(worker)
        except (EOFError, ConnectionError):
            self._process.kill()  # `_run` starts another server
            self._process.wait()

    def _request(self, worker):
        caller_end, worker_end = socket.socketpair()
        worker.close()  # after the new pair exists, so that no two workers ever have the same descriptor
        worker.socket = caller_end
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            worker.socket.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", SILENCE_SECONDS, 0))
        worker.channel = Channel(worker.socket.fileno())
        with worker_end:
            message = worker.number.to_bytes(4, "little") + worker.packages.to_bytes(8, "little")
            socket.send_fds(self._server, [message], [worker_end.fileno()])

    def _greet(self, worker):
        """Receive the report on a new worker's cage; raise or warn about missing features."""
        (report,) = worker.channel.receive()
        if type(report) is str:
            raise RuntimeError(f"the sandbox cannot be set up: {report}{set_limits()}")
        self._isolation = report
        features = [f"{name} ({text})" for name, text in self._isolation.items() if text != "active"]
        missing = "; ".join(features + low_limits(self.memory_mb, self.stdio_mb))
        if missing and self.strict:
            self._stop()
            raise RuntimeError(f'the cage is incomplete here: {missing}. Use isolation="auto" to run without them')
        if missing and not self._warned:
            self._warned = True
            warnings.warn(f"the cage of untrusted code is incomplete here: {missing}", RuntimeWarning, stacklevel=5)


def _check(timeout, memory_mb, isolation, stdio_mb):
    if not 0 < timeout <= MAX_TIMEOUT:
        raise ValueError(f"timeout={timeout}: give seconds above 0 and up to {MAX_TIMEOUT}")
    if memory_mb < 64:
        raise ValueError(f"memory_mb={memory_mb}: give at least 64, such as 1024")
    if not 1 <= stdio_mb <= 1024:
        raise ValueError(f"stdio_mb={stdio_mb}: give 1 to 1024")
    if isolation not in ("auto", "strict"):
        raise ValueError(f'isolation="{isolation}": write "auto" or "strict"')


def _warn_inline(programs):
    if any(program.inline for program in programs):
        logger.warning("some programs run inline: their solutions share an interpreter with their tests and can cheat")


def _stop(pid, process, server):
    if os.getpid() == pid:
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)  # close is not enough: a fork of this process may hold it open
        server.close()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stderr is not None:
            process.stderr.close()
