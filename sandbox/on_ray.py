"""Grade programs on the hosts of a Ray cluster, with the interface of `Sandbox`.

    with RaySandbox("10.0.0.1:6379") as sandbox:
        verdicts = sandbox.run(programs)

An actor on each node owns sandboxes of one worker, one per core, so a slow program delays only its own core. The driver
sends each actor small chunks of programs, at most one more than it has workers. Ray's own retries are off: a chunk's
verdicts come from the one call that carries it. When that call fails, its actor is killed and its programs run again in
another. So no verdict is lost or counted twice.

Not covered here: the cage, which every node takes from its local sandbox (__init__.py), and starting the cluster.
"""

import logging
import os
import queue
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections import Counter, deque
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from . import GRACE_SECONDS, MAX_ATTEMPTS, Program, Sandbox, Verdict, _check, _warn_inline
from .program import failed_parts

CONNECT_SECONDS = 30  # for the cluster to answer
START_SECONDS = 30  # for an actor to start
PATIENCE_SECONDS = 60  # beyond the timeouts of a running and a waiting chunk, before their actor counts as lost
CHUNK = 16  # programs at most: larger chunks save little overhead, and their programs wait longer for each other
STRIDE = 64  # between programs of a chunk: a task's completions are adjacent in a batch and often time out together

logger = logging.getLogger(__name__)
_connected = weakref.WeakSet()  # open sandboxes, if one of them connected this process to Ray


class _Grader:
    """The class of the actors: a sandbox of one worker for each of some cores."""

    def __init__(self, cores, settings):
        self._usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
        self._cores = cores
        self._settings = settings
        self._free = queue.SimpleQueue()

    def start(self):
        with ThreadPoolExecutor(len(self._cores)) as pool:
            sandboxes = list(pool.map(self._open, self._cores))
        for core, sandbox in zip(self._cores, sandboxes, strict=True):
            self._free.put((core, sandbox))
        return sandboxes[0].isolation()

    def grade(self, programs):
        core, sandbox = self._free.get()  # Ray runs as many calls at once as there are sandboxes
        try:
            self._pin(core)
            return sandbox.run(programs)
        finally:
            self._free.put((core, sandbox))

    def _open(self, core):
        self._pin(core)
        return Sandbox(1, **self._settings)

    def _pin(self, core):
        """Keep this thread, and a server that it starts, on one core, so that the sandboxes use different ones."""
        if self._usable:
            os.sched_setaffinity(0, {self._usable[core % len(self._usable)]})


class _Actor:
    """The caller's end of one actor."""

    def __init__(self, place, host, handle, workers):
        self.place = place  # the node's id, and the actor's number there
        self.host = host
        self.handle = handle
        self.workers = workers
        self.isolation = None  # until it has started
        self.calls = {}  # the reference of each call in flight: its programs' indices and its deadline
        self.alone = False  # whether its call must stay the only one


class RaySandbox:
    """A `Sandbox` on the nodes of a Ray cluster. Use it as a context manager, or call `close`.

    A node grades as many programs at once as Ray counts CPUs on it: `ray start --num-cpus=0` excludes it. The actors
    reserve no CPUs, so each process of a distributed training may have a `RaySandbox`. Every node needs this package
    and the same versions of Python and Ray. Nodes that join are used from the next `run` on; lost nodes are skipped.
    Threads may share one: their batches take turns. A fork of the caller must not use it.

    Args:
        address (`str`, *optional*): `"host:port"` of the cluster, or `"auto"` for the one that this host belongs to.
            Defaults to the environment variable `RAY_ADDRESS`; without it Ray is started on this host alone. Ignored
            if this process is already connected to Ray.
        actors (`int`, *optional*): Actors per node, which share its cores. Defaults to one.
        timeout (`float`, defaults to `5.0`): Seconds of wall-clock time that a program may take.
        memory_mb (`int`, defaults to `1024`): Megabytes of address space that a solution may use beside its
            interpreter, at least 64.
        isolation (`str`, defaults to `"auto"`): `"auto"` uses every feature of the cage that a node's kernel has and
            warns about those missing; `"strict"` excludes nodes where any is missing.
        packages (`Iterable[str]`, *optional*): Installed packages that solutions may import, on every node.
        stdio_mb (`int`, defaults to `64`): Megabytes that the stdin of a script may hold, and its stdout.

    Raises:
        `ValueError`: If an argument is out of range.
        `ImportError`: If Ray is not installed.
        `ConnectionError`: If no cluster answers at the address within 30 seconds.
        `RuntimeError`: If no node can grade.
    """

    def __init__(
        self,
        address: str | None = None,
        actors: int | None = None,
        timeout: float = 5.0,
        memory_mb: int = 1024,
        isolation: str = "auto",
        packages: Iterable[str] = (),
        stdio_mb: int = 64,
    ):
        _check(timeout, memory_mb, isolation, stdio_mb)
        if actors is not None and actors < 1:
            raise ValueError(f"actors={actors}: give at least 1, or None for one per node")
        if address is not None and "://" in address:
            raise ValueError(f'address="{address}": write host:port, and run `ray start --address=...` on this host')
        _ray()
        self.address = address
        self.actors = actors or 1
        self._settings = {"timeout": timeout, "memory_mb": memory_mb, "isolation": isolation}
        self._settings |= {"packages": list(packages), "stdio_mb": stdio_mb}
        self._call_seconds = PATIENCE_SECONDS + 2 * CHUNK * (timeout + GRACE_SECONDS)
        self._lock = threading.Lock()
        self._actors = []
        self._failures = Counter()  # consecutive failed starts, by node
        self._reason = "none has CPUs"
        self._warned = set()
        try:
            self._start(everywhere=True)
        except BaseException:
            self.close()
            raise

    def run(self, programs: Iterable[Program]) -> list[Verdict]:
        """Grade programs.

        Args:
            programs (`Iterable[Program]`): Any number of programs.

        Returns:
            `list[Verdict]`: One for each program, in order.

        Raises:
            `RuntimeError`: If no node is left that can grade.
        """
        programs = list(programs)
        with self._lock:
            try:
                return self._run(programs)
            except BaseException:
                self._stop()  # calls still running must not answer to the next batch
                raise

    def isolation(self) -> dict[str, str]:
        """Report the features of the cage that all nodes have.

        Returns:
            `dict[str, str]`: For each feature `"active"`, or `"missing: "`, the reason and a host.
        """
        with self._lock:
            self._start(everywhere=True)
            merged = {}
            for actor in self._actors:
                for name, state in actor.isolation.items():
                    if merged.setdefault(name, "active") == "active" and state != "active":
                        merged[name] = f"{state} (on {actor.host})"
            return merged

    def close(self) -> None:
        """Kill the actors, and disconnect from Ray if this object connected. The next `run` starts them again."""
        with self._lock:
            self._stop()
            if self in _connected:
                _connected.discard(self)
                if not _connected:
                    _ray().shutdown()

    def __enter__(self) -> "RaySandbox":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _run(self, programs):
        verdicts: list[Any] = [None] * len(programs)
        attempts = [0] * len(programs)
        waiting = deque(job for first in range(STRIDE) for job in range(first, len(programs), STRIDE))
        left = len(programs)
        _warn_inline(programs)
        if programs:
            self._start(everywhere=False)
        while left:
            for actor in self._actors:
                self._assign(actor, programs, waiting, attempts)
            for jobs, answer in self._wait():
                if answer is None:
                    for job in jobs:
                        attempts[job] += 1
                    ended = [job for job in jobs if attempts[job] == MAX_ATTEMPTS]
                    waiting.extendleft(job for job in jobs if attempts[job] < MAX_ATTEMPTS)
                    jobs = ended
                    detail = f"its actor or node died {MAX_ATTEMPTS} times"  # which the solution may have caused
                    answer = [Verdict("crashed", detail, 0.0, failed_parts(programs[job])) for job in ended]
                for job, verdict in zip(jobs, answer, strict=True):
                    verdicts[job] = verdict
                left -= len(jobs)
        return verdicts

    def _assign(self, actor, programs, waiting, attempts):
        """Send an actor as many chunks as it may have."""
        if actor.isolation is None:
            return
        workers = sum(each.workers for each in self._actors)
        while waiting and len(actor.calls) <= actor.workers and not actor.alone:
            jobs = [waiting.popleft()]
            lost = attempts[jobs[0]]
            if lost == MAX_ATTEMPTS - 1:  # the last attempt runs alone, so that no other program can be the cause
                if actor.calls:
                    waiting.appendleft(jobs[0])
                    return
                actor.alone = True
            elif lost == 0:  # chunks shrink towards the end, so that the last ones finish together
                size = min(CHUNK, 1 + len(waiting) // (2 * workers))
                while len(jobs) < size and attempts[waiting[0]] == 0:
                    jobs.append(waiting.popleft())
            call = actor.handle.grade.remote([programs[job] for job in jobs])
            actor.calls[call] = jobs, time.monotonic() + self._call_seconds

    def _wait(self):
        """Wait for an answer of any actor.

        Returns:
            `list[tuple[list[int], list[Verdict] or None]]`: The programs of each finished call, and their verdicts,
            or `None` if the call's actor was lost.
        """
        ray = _ray()
        callers = {call: actor for actor in self._actors for call in actor.calls}
        if not callers:
            raise RuntimeError(f"no node of the Ray cluster is left that can grade: {self._reason}")
        first = min(callers, key=lambda call: callers[call].calls[call][1])
        deadline = callers[first].calls[first][1]
        ended, _ = ray.wait(list(callers), timeout=max(0, deadline - time.monotonic()))
        if not ended:
            return self._drop_actor(callers[first], "it does not answer")
        (call,) = ended
        actor = callers[call]
        try:
            answer = ray.get(call)
        except ray.exceptions.RayError as error:
            return self._drop_actor(actor, str(getattr(error, "cause", None) or error))
        jobs, _ = actor.calls.pop(call)
        actor.alone = False
        if actor.isolation is None:
            self._greet(actor, answer)
            return []
        return [(jobs, answer)]

    def _start(self, everywhere):
        """Connect to the cluster, start missing actors, and wait for one of them or for all."""
        self._connect()
        self._start_actors()
        enough = all if everywhere else any
        while not (self._actors and enough(actor.isolation for actor in self._actors)):
            self._wait()

    def _connect(self):
        ray = _ray()
        if ray.is_initialized():
            if _connected:
                _connected.add(self)
            return
        self._actors = []
        target = self.address or os.environ.get("RAY_ADDRESS") or "local"
        options = {"log_to_driver": False, "logging_level": logging.WARNING}
        if target == "local":
            options["include_dashboard"] = False
        else:
            _probe(target)
        ray.init(target, **options)
        _connected.add(self)

    def _start_actors(self):
        """Start an actor in every place on a live node that has none, and drop the actors of lost nodes."""
        ray = _ray()
        nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
        self._actors = [actor for actor in self._actors if actor.place[0] in nodes or actor.calls]
        taken = {actor.place for actor in self._actors}
        for name, node in nodes.items():
            cores = range(int(node["Resources"].get("CPU", 0)))
            for number in range(min(self.actors, len(cores))):
                if (name, number) not in taken and self._failures[name] < MAX_ATTEMPTS:
                    share = cores[number :: self.actors]
                    self._actors.append(self._start_actor((name, number), node["NodeManagerAddress"], share))

    def _start_actor(self, place, host, cores):
        ray = _ray()
        where = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(place[0], soft=False)
        grader = ray.remote(_Grader).options(
            num_cpus=0, max_concurrency=len(cores), max_restarts=0, max_task_retries=0, scheduling_strategy=where
        )
        actor = _Actor(place, host, grader.remote(list(cores), self._settings), len(cores))
        actor.calls[actor.handle.start.remote()] = [], time.monotonic() + START_SECONDS
        return actor

    def _greet(self, actor, isolation):
        actor.isolation = isolation
        self._failures[actor.place[0]] = 0
        missing = "; ".join(f"{name} ({text})" for name, text in isolation.items() if text != "active")
        if missing and actor.host not in self._warned:
            self._warned.add(actor.host)
            text = f"the cage of untrusted code is incomplete on {actor.host}: {missing}"
            warnings.warn(text, RuntimeWarning, stacklevel=6)

    def _drop_actor(self, actor, reason):
        """Kill an actor and start another if its node lives; return its unfinished programs, without verdicts."""
        self._reason = f"{actor.host}: {reason.strip().splitlines()[-1].strip()}"
        logger.warning("lost an actor on %s", self._reason)
        if actor.isolation is None:
            self._failures[actor.place[0]] += 1
        self._actors.remove(actor)
        _ray().kill(actor.handle)
        self._start_actors()
        return [(jobs, None) for jobs, _ in actor.calls.values()]

    def _stop(self):
        ray = _ray()
        if ray.is_initialized():
            for actor in self._actors:
                ray.kill(actor.handle)
        self._actors = []


def _ray() -> Any:
    """Import Ray, which only this file needs, and return it."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.util.scheduling_strategies
    except ImportError as error:
        raise ImportError("RaySandbox needs Ray: pip install 'rl-code-agent[ray]'") from error
    return ray


def _probe(address):
    """Connect to a cluster in another process first: a failing `ray.init` blocks for many minutes."""
    script = "import logging, ray, sys; ray.init(sys.argv[1], log_to_driver=False, logging_level=logging.ERROR)"
    try:
        subprocess.run(
            [sys.executable, "-c", script, address],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=True,
            timeout=CONNECT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        reason = f"no answer within {CONNECT_SECONDS} s"
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip() or f"exit status {error.returncode}").splitlines()[-1]
    else:
        return
    text = f"no Ray cluster at {address}: {reason}. Start one with `ray start --head` and join this host to it"
    raise ConnectionError(text) from None
