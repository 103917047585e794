"""Every attack gets its own verdict in time, leaves no mark, and disturbs no program beside it or after it."""

import os
import time
from pathlib import Path

import pytest
from attacks import ABUSES, ESCAPES, FALSE_PASS, SECRET

from sandbox import Program, Sandbox

TIMEOUT = 2.0
GOOD = Program(f"def f(x):\n    return {SECRET}\n", f"assert f(3) == {SECRET}", "f")
ONLY_X86 = (
    "vfork",
    "clone",
    "bpf",
    "shared memory",
    "message queue",
    "keyring",
    "another filter",
    "32-bit system calls",
)
LINUX = os.path.isdir("/proc/self/fd")


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(timeout=TIMEOUT, memory_mb=160) as sandbox:
        yield sandbox


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def footprint(sandbox):
    """What the sandbox holds once the last solutions are gone, for which they have a second."""
    server = sandbox._process.pid
    judges = children(server)
    zygotes = [zygote for judge in judges for zygote in children(judge)]
    end = time.monotonic() + 1
    while any(children(zygote) for zygote in zygotes) and time.monotonic() < end:
        time.sleep(0.01)
    return {
        "processes": (len(judges), len(zygotes), sum(len(children(zygote)) for zygote in zygotes)),
        "descriptors": [len(os.listdir(f"/proc/{pid}/fd")) for pid in (os.getpid(), server)],
    }


@pytest.mark.parametrize("attacks", [FALSE_PASS, ESCAPES, ABUSES], ids=["false pass", "escape", "abuse"])
def test_attacks(sandbox, attacks):
    if os.uname().machine != "x86_64":
        attacks = {name: attack for name, attack in attacks.items() if name not in ONLY_X86}
    before = footprint(sandbox) if LINUX else None
    programs = []
    for _, source, tests in attacks.values():
        programs += [Program(source, tests, "f"), GOOD]
    verdicts = sandbox.run(programs)

    wrong = {}
    for (name, (expected, _, _)), verdict in zip(attacks.items(), verdicts[::2], strict=True):
        assert len(verdict.detail) <= 200
        if verdict.status not in expected.split("|") or verdict.seconds > TIMEOUT + 1:
            wrong[name] = expected, verdict
    assert not wrong
    assert {verdict.status for verdict in verdicts[1::2]} == {"passed"}
    if LINUX:
        assert footprint(sandbox) == before
    for folder in ("/etc", "/dev/shm", "/var/tmp", "/", "/tmp", os.path.dirname(os.__file__)):
        assert not [name for name in os.listdir(folder) if "sandbox_was_here" in name]


def test_scratch_is_private_bounded_and_wiped(sandbox):
    """A solution may write a little into its own folder, and the next one finds it empty."""
    if sandbox.isolation()["private files"] != "active":
        pytest.skip("no private files on this kernel")
    source = """
import os
def f(x):
    found = os.listdir('.') + os.listdir('/tmp')
    os.mkdir('folder')
    with open('folder/name', 'w') as file:
        file.write('text')
    with open('folder/name') as file:
        return found, file.read()
"""
    verdicts = sandbox.run([Program(source, "assert f(3) == ([], 'text')", "f")] * 6)
    assert [verdict.status for verdict in verdicts] == ["passed"] * 6


def test_a_slow_program_holds_up_no_other(sandbox):
    sleepy = Program("import time\ntime.sleep(60)", "", "f")
    verdicts = sandbox.run([sleepy] + [GOOD] * 50)
    assert verdicts[0].status == "timeout"
    assert all(verdict.passed and verdict.seconds < TIMEOUT for verdict in verdicts[1:])
