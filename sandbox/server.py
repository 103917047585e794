"""The fork server: a fresh interpreter, started by the caller, that forks the workers.

A worker is a judge and its zygote. The judge forks the zygote before it has received anything, so no test text is in
the memory that a solution inherits. Everything dies with its parent: the server with the caller, the judge with the
server, the zygote with the judge.

Not covered here: the caller's side, which starts this file and talks to it (__init__.py).
"""

import json
import os
import select
import signal
import socket
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import cage  # noqa: E402
import judge  # noqa: E402
import solution  # noqa: E402
import wire  # noqa: E402

del sys.path[0]

# What solutions import, loaded once instead of once for each program.
PRELOADED = (
    "typing math collections itertools functools re heapq bisect string random datetime statistics fractions decimal"
    " copy operator hashlib json sys os time types enum dataclasses abc numbers contextlib io"
).split()


def worker(descriptor, settings):
    """Becomes the judge of a new worker, after forking its zygote. Never returns."""
    cage.die_with_parent()
    ours, theirs = socket.socketpair()
    if os.fork() == 0:
        cage.die_with_parent()
        ours.close()
        os.close(descriptor)
        theirs = _at_descriptor(theirs, solution.CHANNEL + 1)
        limit_child = cage.enter(settings["memory_mb"], settings["timeout"])
        solution.zygote(theirs, limit_child)
    theirs.close()
    judge.judge(wire.Channel(descriptor), ours, settings["timeout"])


def _at_descriptor(sock, number):
    os.dup2(sock.detach(), number)
    return socket.socket(fileno=number)


def serve(control, caller, settings):
    """Starts and replaces workers as the caller asks, until the caller is gone."""
    pids = {}
    while os.getppid() == caller:
        ready, _, _ = select.select([control], [], [], 0.5)
        if ready:
            message, descriptors, _, _ = socket.recv_fds(control, 4, 1)
            if not message:
                break
            number = int.from_bytes(message, "little")
            if number in pids:
                os.kill(pids.pop(number), signal.SIGKILL)
            pids[number] = os.fork()
            if pids[number] == 0:
                control.close()
                worker(descriptors[0], settings)
            os.close(descriptors[0])
        for number, pid in list(pids.items()):
            if os.waitpid(pid, os.WNOHANG)[0]:
                del pids[number]
    for pid in pids.values():
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    for name in PRELOADED:
        __import__(name)
    try:
        serve(socket.socket(fileno=settings["control"]), settings["caller"], settings)
    finally:
        os._exit(0)
