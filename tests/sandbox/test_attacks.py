"""Every attack gets its own verdict in time, leaves no mark, and disturbs no program beside it or after it."""

import os
import time
from pathlib import Path

import pytest
from attacks import ABUSES, ESCAPES, FALSE_INVALID, FALSE_PASS, SECRET

from sandbox import Program, Sandbox

TIMEOUT = 2.0
GOOD = Program(f"def f(x):\n    return {SECRET}\n", f"assert f(3) == {SECRET}", "f")
LINUX = os.path.isdir("/proc/self/fd")


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(timeout=TIMEOUT, memory_mb=320) as sandbox:
        yield sandbox


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def footprint(sandbox):
    """What the sandbox holds once the last solutions and replaced workers are gone, for which they have a second."""
    server = sandbox._process.pid
    end = time.monotonic() + 1
    while True:
        judges = children(server)
        zygotes = [zygote for judge in judges for zygote in children(judge)]
        processes = len(judges), len(zygotes), sum(len(children(zygote)) for zygote in zygotes)
        if processes == (sandbox.workers, sandbox.workers, 0) or time.monotonic() > end:
            break
        time.sleep(0.01)
    return {
        "processes": processes,
        "descriptors": [len(os.listdir(f"/proc/{pid}/fd")) for pid in (os.getpid(), server)],
    }


@pytest.mark.parametrize(
    "attacks", [FALSE_PASS, FALSE_INVALID, ESCAPES, ABUSES], ids=["false pass", "false invalid", "escape", "abuse"]
)
def test_attacks(sandbox, attacks):
    if LINUX:
        before, workers = footprint(sandbox), children(sandbox._process.pid)
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
        # Only a timeout costs a worker; these have more of them than there are workers, or tests that cost one
        timeouts = [verdict.status for verdict in verdicts].count("timeout")
        costly = attacks is ABUSES or attacks is FALSE_INVALID
        assert costly or len(set(workers) - set(children(sandbox._process.pid))) == timeouts
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
    probe = Program(source, "assert f(3) == ([], 'text')", "f")
    messes = [Program(*ABUSES[name][1:], "f") for name in ABUSES if name.startswith("scratch")]
    assert len(messes) == 5
    workers = children(sandbox._process.pid)
    verdicts = sandbox.run([program for mess in messes for program in (mess, probe, probe, probe)])
    assert [verdict.status for verdict in verdicts] == ["error", "passed", "passed", "passed"] * 5
    assert children(sandbox._process.pid) == workers, "a zygote that cannot wipe dies, and its worker is replaced"


def test_threads_are_few_however_much_memory_there_is():
    with Sandbox(workers=1, memory_mb=4096) as sandbox:
        if sandbox.isolation()["thread limit"] != "active":
            pytest.skip("no thread limit on this kernel")
        (verdict,) = sandbox.run([Program(*ESCAPES["threads without end"][1:], "f")])
        assert verdict.passed, verdict


@pytest.mark.skipif(not LINUX, reason="reads /proc")
def test_the_kernel_says_of_the_cage_what_isolation_says(sandbox):
    judges = children(sandbox._process.pid)
    zygotes = [child for judge in judges for child in children(judge)]
    assert len(zygotes) == sandbox.workers
    for zygote in zygotes:
        status, ours = (
            dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
            for pid in (zygote, "self")
        )
        shown = {
            "no new privileges": int(status["NoNewPrivs"]) == 1,
            "no capabilities": int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0,
            "unprivileged user": "0" not in status["Uid"].split() + status["Gid"].split(),
            "seccomp": int(status["Seccomp"]) == 2,
            "pid namespace": len(status["NSpid"].split()) > len(ours["NSpid"].split()),
        }
        isolation = sandbox.isolation()
        assert shown == {name: isolation[name] == "active" for name in shown}


def test_a_slow_program_holds_up_no_other(sandbox):
    sleepy = Program("import time\ntime.sleep(60)", "", "f")
    verdicts = sandbox.run([sleepy] + [GOOD] * 50)
    assert verdicts[0].status == "timeout"
    assert all(verdict.passed and verdict.seconds < TIMEOUT for verdict in verdicts[1:])
