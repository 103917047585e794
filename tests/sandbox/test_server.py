"""What the server asks of the kernel to be fast: huge pages for code and data, and a scheduling policy for its workers.

Not covered here: what it starts and replaces (test_sandbox.py).
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sandbox.arenas import ARENA_SIZE, RESERVED_ARENAS
from sandbox.huge_pages import _data, _readable_around

ROOT = Path(__file__).resolve().parents[2]
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel")


POLICIES = """
import os, sys
sys.path.insert(0, sys.argv[1])
from sandbox import Program, Sandbox
if sys.argv[2] == "idle":
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
with Sandbox(workers=1) as sandbox:
    assert sandbox.run([Program("f = abs", "assert f(-1) == 1", "f")])[0].passed
    server = sandbox._process.pid
    (judge,) = open(f"/proc/{server}/task/{server}/children").read().split()
    print(os.sched_getscheduler(int(judge)))
"""


@linux_only
@pytest.mark.parametrize("caller, worker", [("other", "SCHED_BATCH"), ("idle", "SCHED_IDLE")])
def test_workers_do_not_take_more_than_the_caller_has(caller, worker):
    run = subprocess.run([sys.executable, "-c", POLICIES, str(ROOT), caller], stdout=subprocess.PIPE, check=True)
    assert int(run.stdout) == getattr(os, worker)


HUGE_PAGE = """
def huge_page():
    \"\"\"Returns address and size of memory that has the place of a huge page, on small ones.\"\"\"
    size = huge_pages.HUGE_PAGE
    page = -(-huge_pages._libc().mmap(0, 2 * size, 3, 0x22, -1, 0) // size) * size
    ctypes.memset(page, 1, size)
    return page, size
"""


MOVE = """
import ctypes, sys
sys.path.insert(0, sys.argv[1])
import huge_pages
if sys.argv[2] == "refused":
    ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE
moved = huge_pages.move_code()
executable, huge = False, 0
for line in open("/proc/self/smaps"):
    first, second, *_ = line.split()
    if "-" in first:
        executable = "x" in second
    elif executable and first == "AnonHugePages:":
        huge += int(second) * 1024
libc = huge_pages._libc()
page, size = huge_page()
able = libc.madvise(page, size, huge_pages.MADV_COLLAPSE) == 0 == libc.mprotect(page, size, 5)
print(moved, huge, int(able))
"""


@linux_only
@pytest.mark.parametrize("kernel", ["willing", "refused"])
def test_the_interpreters_code_moves_to_huge_pages_where_the_kernel_lets_it(kernel):
    command = [sys.executable, "-I", "-c", HUGE_PAGE + MOVE, str(ROOT / "sandbox"), kernel]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    moved, huge, able = map(int, run.stdout.split())
    assert not (able and kernel == "refused")
    if able and os.uname().machine == "x86_64":
        assert moved == huge >= 2 << 20
    else:
        assert moved == huge == 0


COLLAPSE = """
import os, sys
sys.path.insert(0, sys.argv[1])
import arenas
reserved = arenas.reserve()
import ctypes, huge_pages

def mappings():
    spans = [line.split()[0].split("-") for line in open("/proc/self/maps")]
    return [(int(start, 16), int(end, 16)) for start, end in spans]

together = next(end - start for start, end in mappings() if start <= id(reserved[0]) < end)
kept = [str(number) * (number % 900) for number in range(5000)]  # small objects, and 10 MB of larger ones
spare = bytes(100_000)
before = mappings()
huge_pages.align_data(id(reserved[0]))
extended = mappings() != before
if os.fork():
    sys.exit(os.wait()[1] != 0)
if sys.argv[2] == "refused":
    ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE
extensions = list(huge_pages._extensions)
gathered = huge_pages.collapse_data()
del spare  # or the heap may grow while it is looked at
left = sum(start <= extension < end for start, end in mappings() for extension, _ in extensions)
huge = sum(int(line.split()[1]) * 1024 for line in open("/proc/self/smaps") if line.startswith("AnonHugePages:"))
kept += [str(number) * (number % 900) for number in range(5000, 9000)]
assert kept == [str(number) * (number % 900) for number in range(9000)]
page, size = huge_page()
able = huge_pages._libc().madvise(page, size, huge_pages.MADV_COLLAPSE) == 0
print(together, int(extended), gathered, huge, left, int(able))
"""


@linux_only
@pytest.mark.parametrize("kernel", ["willing", "refused"])
def test_a_forks_data_is_gathered_on_huge_pages_where_the_kernel_lets_it(kernel):
    command = [sys.executable, "-I", "-S", "-c", HUGE_PAGE + COLLAPSE, str(ROOT / "sandbox"), kernel]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    together, extended, gathered, huge, left, able = map(int, run.stdout.split())
    assert together > RESERVED_ARENAS * ARENA_SIZE
    assert not (able and kernel == "refused")
    assert extended and not left
    if able:
        assert gathered >= huge >= 2 << 20
    else:
        assert gathered == huge == 0


def test_the_heap_and_the_arenas_alone_count_as_data():
    maps = [
        "200000-500000 rw-p 00000000 00:00 0                          [heap]",
        "600000-900000 rw-p 00000000 00:00 0",
        "900000-c00000 rw-p 00000000 00:00 0",
        "d00000-f00000 rw-p 00000000 fe:00 7 /lib/a python.so",
        "f00000-1f00000 rw-p 00000000 00:00 0                         [stack]",
    ]
    assert _data(0x700000, maps) == [(0x200000, 0x500000), (0x600000, 0x900000)]
    assert _data(0xD00000, ["d00000-f00000 r-xp 00000000 00:00 0"]) == []


WITHOUT_LINUX = """
import builtins, sys
sys.path.insert(0, sys.argv[1])
import huge_pages

def refuse(*arguments):
    raise FileNotFoundError

builtins.open = huge_pages._libc = refuse
huge_pages.align_data(id(refuse))
print(huge_pages.collapse_data(), huge_pages.trim_data(), huge_pages._pages, huge_pages._extensions)
"""


def test_where_there_is_no_proc_data_stays_where_it_is():
    command = [sys.executable, "-I", "-c", WITHOUT_LINUX, str(ROOT / "sandbox")]
    assert subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout == "0 None [] []\n"


def test_only_what_can_be_read_and_not_written_counts_as_code():
    maps = [
        "1000-2000 r--p 00000000 fe:00 7 /lib/other.so",
        "2000-3000 r--p 00000000 fe:00 9 /lib/a python.so",
        "3000-6000 r-xp 00001000 fe:00 9 /lib/a python.so",
        "6000-8000 ---p 00004000 fe:00 9 /lib/a python.so",
        "8000-9000 r--p 00004000 fe:00 9 /lib/a python.so",
        "9000-a000 rw-p 00005000 fe:00 9 /lib/a python.so",
        "a000-b000 r--p 00000000 00:00 0",
    ]
    assert _readable_around(0x4000, maps) == (0x2000, 0x6000)
    assert _readable_around(0x9100, maps) == (0, 0)
