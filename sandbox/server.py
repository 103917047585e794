"""The fork server: a fresh interpreter, started by the caller, that forks the workers.

A worker is a judge and its zygote. The judge forks the zygote before it has received anything, so no test text is in
the memory that a solution inherits. Every process dies with its parent: the server with the caller, the judge with the
server, the zygote with the judge.

Not covered here: the caller's side, which starts this file and talks to it (__init__.py).
"""

import contextlib
import importlib
import json
import os
import select
import signal
import socket
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # `python -P` leaves out the script's own folder
import cage  # noqa: E402
import judge  # noqa: E402
import solution  # noqa: E402
import wire  # noqa: E402

del sys.path[0]

# What solutions import, loaded once instead of once for each program. More would make every fork slower.
PRELOADED = (
    "typing math collections itertools functools re heapq bisect string random datetime statistics fractions decimal"
    " copy operator hashlib"
    " binascii zlib"  # for base64, secrets and zipfile: a solution cannot reach the system library that they need
).split()
# Loaded together with numpy, which would import them later, when a solution first uses them.
NUMPY = (
    "numpy numpy.char numpy.core numpy.ctypeslib numpy.f2py numpy.fft numpy.lib.recfunctions numpy.linalg numpy.ma"
    " numpy.polynomial numpy.random numpy.rec numpy.strings numpy.testing numpy.typing"
).split()


def worker(number: int, descriptor: int, settings: dict[str, Any]) -> NoReturn:
    """Fork the zygote of a new worker, then become its judge.

    Args:
        number (`int`): The worker's number in the caller's pool.
        descriptor (`int`): The socket that connects the worker to the caller.
        settings (`dict`): What the caller started the server with.
    """
    pin(number + settings["first_core"])
    judge_end, zygote_end = socket.socketpair()
    cage.die_with_parent()
    pid, pids_failure = cage.fork_apart()
    if pid == 0:
        judge_end.close()
        os.close(descriptor)
        os.dup2(zygote_end.detach(), solution.CONTROL)
        control = socket.socket(fileno=solution.CONTROL)
        os.closerange(solution.ANSWERS, solution.CONTROL)
        os.closerange(solution.CONTROL + 1, 64)
        report = wire.Channel(control.fileno())
        try:
            missing, limit_child = cage.enter(
                settings["memory_mb"], settings["timeout"], settings["stdio_mb"], package_files(), pids_failure
            )
        except Exception as error:
            report.send([f"{type(error).__name__}: {error}"])
            raise
        report.send([cage.report(missing)])
        solution.zygote(control, limit_child, "private files" not in missing)
    zygote_end.close()
    cage.hide()
    cage.limit_judge(settings["memory_mb"])
    caller = wire.Channel(descriptor)
    caller.send(wire.Channel(judge_end.fileno()).receive())
    judge.judge(caller, judge_end, settings["timeout"], settings["stdio_mb"])


def pin(number: int) -> None:
    """Keep this process and its children on one core: waking each other on another core costs a fifth of the rate.

    Args:
        number (`int`): The core, modulo the usable ones.
    """
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[number % len(cores)]})


def serve(control: socket.socket, caller: int, settings: dict[str, Any]) -> None:
    """Start and replace workers as the caller asks, until the caller is gone, then kill them all.

    Args:
        control (`socket.socket`): Connected to the caller.
        caller (`int`): The caller's process id.
        settings (`dict`): What the caller started the server with.
    """
    workers = {}  # number: pid
    poll = select.poll()  # select refuses descriptors above 1,023, which a caller with many files may give
    poll.register(control, select.POLLIN)
    while os.getppid() == caller:
        if poll.poll(500):
            message, descriptors, _, _ = socket.recv_fds(control, 12, 1)
            if not message:
                break
            number, wanted = int.from_bytes(message[:4], "little"), int.from_bytes(message[4:], "little")
            for bit, name in enumerate(settings["packages"]):
                if wanted >> bit & 1:
                    load(NUMPY if name == "numpy" else [name])
            if number in workers:
                os.kill(workers.pop(number), signal.SIGKILL)
            pid = os.fork()
            if pid == 0:
                control.close()
                worker(number, descriptors[0], settings)
            workers[number] = pid
            os.close(descriptors[0])
        reap(workers, os.WNOHANG)
    for pid in workers.values():
        os.kill(pid, signal.SIGKILL)
    reap(workers, 0)


def reap(workers: dict[int, int], options: int) -> None:
    """Reap exited judges and their orphaned zygotes."""
    try:
        while pid := os.waitpid(-1, options)[0]:
            for number in [number for number in workers if workers[number] == pid]:
                del workers[number]
    except ChildProcessError:
        pass


def load(names: Iterable[str]) -> None:
    """Import modules for the workers to inherit; skip those that fail, as a solution will get the same error."""
    for name in names:
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def package_files() -> list[str]:
    """Return the folders and files of the installed packages that are loaded, which import more of them when used."""
    found = set()
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if "." not in name and file and "-packages" in file:
            found.add(os.path.dirname(file) if os.path.basename(file).startswith("__init__.") else file)
    return sorted(found)


if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    sys.argv[:] = sys.orig_argv[:] = [""]  # solutions inherit them
    try:
        cage.adopt_orphans()
        sys.path += settings["path"]
        sys.set_int_max_str_digits(0)  # for solutions and tests
        os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"  # a forked thread pool would hang
        load(PRELOADED)
        solution.warm_up()
        os.dup2(0, 2)  # from here on nothing is said on stderr, which workers inherit
        serve(socket.socket(fileno=settings["control"]), settings["caller"], settings)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(0)
