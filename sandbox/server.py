"""The fork server: a fresh interpreter, started by the caller, that forks the workers.

A worker is a judge and its zygote. The judge forks the zygote before it has received anything, so no test text is in
the memory that a solution inherits. Everything dies with its parent: the server with the caller, the judge with the
server, the zygote with the judge.

Not covered here: the caller's side, which starts this file and talks to it (__init__.py).
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import arenas  # noqa: E402

reserved = arenas.reserve()  # before any import that maps a library

import contextlib  # noqa: E402
import importlib  # noqa: E402
import json  # noqa: E402
import select  # noqa: E402
import signal  # noqa: E402
import socket  # noqa: E402

# Reseeding random and resetting threading in every fork would cost more than the fork. The judge reseeds by itself, and
# solutions all start from the same random state.
os.register_at_fork = lambda **hooks: None

import cage  # noqa: E402
import huge_pages  # noqa: E402
import judge  # noqa: E402
import solution  # noqa: E402
import wire  # noqa: E402

del sys.path[0]

# What solutions import, loaded once instead of once for each program. More would make every fork slower.
PRELOADED = (
    "typing math collections itertools functools re heapq bisect string random datetime statistics fractions decimal"
    " copy operator hashlib"
    " binascii zlib"  # for base64, secrets and zipfile: the system library that they need is out of reach later
).split()
# With these already loaded, numpy imports nothing more when a solution uses it; its files are out of reach then.
NUMPY = (
    "numpy numpy.char numpy.ctypeslib numpy.fft numpy.lib.recfunctions numpy.linalg numpy.ma numpy.polynomial"
    " numpy.random numpy.rec numpy.typing"
).split()


def worker(number, descriptor, settings):
    """Becomes the judge of a new worker, after forking its zygote. Never returns."""
    schedule(number + settings["caller"])
    ours, theirs = socket.socketpair()
    cage.die_with_parent()
    pid, pids_failure = cage.fork_apart()
    if pid == 0:
        huge_pages.collapse_data()
        ours.close()
        os.close(descriptor)
        os.dup2(theirs.detach(), solution.CONTROL)
        control = socket.socket(fileno=solution.CONTROL)
        os.closerange(solution.ANSWERS, solution.CONTROL)
        os.closerange(solution.CONTROL + 1, 64)
        report = wire.Channel(control.fileno())
        try:
            missing, limit_child = cage.enter(settings["memory_mb"], settings["timeout"], pids_failure)
        except Exception as error:
            report.send([f"{type(error).__name__}: {error}"])
            raise
        report.send([cage.report(missing)])
        solution.zygote(control, limit_child, "private files" not in missing)
    huge_pages.trim_data()
    theirs.close()
    cage.hide()
    cage.limit_judge(settings["memory_mb"])
    caller = wire.Channel(descriptor)
    caller.send(wire.Channel(ours.fileno()).receive())
    judge.judge(caller, ours, settings["timeout"])


def schedule(number):
    """Keeps a worker on one core, where its processes take turns without cutting each other short.

    To wake one on another core costs a fifth. To be interrupted by the one just woken, instead of going on until there
    is something to wait for, costs 2%; and where cores are scarce, it takes more than a fair share from the trainer.

    The number counts from the caller's process id, so that the few workers of several callers are on different cores.
    """
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[number % len(cores)]})
        with contextlib.suppress(OSError):  # some kernels and libraries have one policy only
            if os.sched_getscheduler(0) == os.SCHED_OTHER:  # not what the caller has chosen
                os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def serve(control, caller, settings):
    """Starts and replaces workers as the caller asks, until the caller is gone; then ends them all."""
    workers = {}  # number: pid
    poll = select.poll()  # select would refuse a descriptor above 1,023, which a caller with many files gives
    poll.register(control, select.POLLIN)
    while os.getppid() == caller:
        if poll.poll(500):
            message, descriptors, _, _ = socket.recv_fds(control, 5, 1)
            if not message:
                break
            number, with_numpy = int.from_bytes(message[:4], "little"), message[4]
            if with_numpy:
                load(NUMPY)
            if number in workers:
                os.kill(workers.pop(number), signal.SIGKILL)
            huge_pages.align_data(id(reserved[0]))
            pid = os.fork()
            if pid == 0:
                control.close()
                worker(number, descriptors[0], settings)
            huge_pages.trim_data()
            workers[number] = pid
            os.close(descriptors[0])
        reap(workers, os.WNOHANG)
    for pid in workers.values():
        os.kill(pid, signal.SIGKILL)
    reap(workers, 0)


def reap(workers, options):
    """Takes leave of judges that ended, and of their zygotes, which come to this process as orphans."""
    try:
        while pid := os.waitpid(-1, options)[0]:
            for number in [number for number in workers if workers[number] == pid]:
                del workers[number]
    except ChildProcessError:
        pass


def load(names):
    os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"  # a forked thread pool would hang
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError:
            pass  # then a solution that wants it fails with the same error
    os.environ.clear()


if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    sys.argv[:] = sys.orig_argv[:] = [""]  # solutions inherit them
    try:
        cage.adopt_orphans()
        huge_pages.move_code()
        sys.path += settings["packages"]
        load(PRELOADED)
        solution.warm_up()
        serve(socket.socket(fileno=settings["control"]), settings["caller"], settings)
    finally:
        os._exit(0)
