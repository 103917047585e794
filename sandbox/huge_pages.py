"""Puts the interpreter's code and data on huge pages, for forks that cost less.

A fork does not copy the page tables of a mapped file, so each solution process would fault its way through the
interpreter's code once more, some forty times, and unmap a thousand pages at its end. A copy of that code in anonymous
memory, on pages of 2 MB, comes along with the fork as a few entries.

Data is what a fork does copy the page tables of, page for page, each with a count that goes up and, at the end of the
process, down. The parts of one huge page are counted together, even where each has its own entry (since Linux 6.9).

Not covered here: the pages that a fork has to copy because it writes to them (arenas.py).
"""

import ctypes
import errno
import functools
import os
import time

HUGE_PAGE = 1 << 21
PROT_READ, PROT_WRITE, PROT_EXEC = 1, 2, 4
MAP_PRIVATE, MAP_ANONYMOUS, MAP_FIXED_NOREPLACE = 0x02, 0x20, 0x100000
MADV_POPULATE_WRITE, MADV_COLLAPSE = 23, 25  # since Linux 5.14 and 6.1
MREMAP_MAYMOVE, MREMAP_FIXED = 1, 2
FAILED = -1
WAIT_SECONDS = 0.1  # for other workers

_pages = []  # addresses of what `align_data` found
_extensions = []  # (address, size) of what it added


def move_code():
    """Moves the part of the interpreter's code that fills huge pages to such pages, at the same addresses.

    The constants beside the code move too, and can be executed then. Call it while there is one thread.

    Returns:
        `int`: Bytes that were moved; 0 if nothing fills a huge page, or the kernel or the machine does not let it.
    """
    if os.uname().machine != "x86_64":
        return 0  # never tried
    address = ctypes.cast(ctypes.pythonapi.Py_IncRef, ctypes.c_void_p).value
    try:
        with open("/proc/self/maps") as maps:
            start, end = _readable_around(address, maps)
    except OSError:
        return 0
    start, end = -(-start // HUGE_PAGE) * HUGE_PAGE, end // HUGE_PAGE * HUGE_PAGE
    size = end - start
    if size <= 0:
        return 0
    libc = _libc()
    room = libc.mmap(0, size + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    if room == FAILED:
        return 0
    copy = -(-room // HUGE_PAGE) * HUGE_PAGE
    libc.munmap(room, copy - room)
    libc.munmap(copy + size, room + HUGE_PAGE - copy)
    ctypes.memmove(copy, start, size)
    # The code is replaced in one step, by its equal, while it runs
    if (
        libc.madvise(copy, size, MADV_COLLAPSE) == FAILED
        or libc.mprotect(copy, size, PROT_READ | PROT_EXEC) == FAILED
        or libc.mremap(copy, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, start) == FAILED
    ):
        libc.munmap(copy, size)
        return 0
    return size


def align_data(address):
    """Extends the heap and the arenas of small objects to whole huge pages, as far as the addresses beside are free.

    It takes a process that was not forked itself: what a fork maps stays apart from what it has inherited. Until
    `collapse_data` or `trim_data`, which each process that has the extensions calls, the heap cannot grow in one piece.

    Args:
        address (`int`): Where any small object lies.
    """
    _pages.clear()
    try:
        with open("/proc/self/maps") as maps:
            mappings = _data(address, maps.readlines())
    except OSError:
        return
    for start, end in mappings:
        low, high = start // HUGE_PAGE * HUGE_PAGE, -(-end // HUGE_PAGE) * HUGE_PAGE
        if not _extend(low, start):
            low += HUGE_PAGE
        if not _extend(end, high):
            high -= HUGE_PAGE
        _pages.extend(range(low, high, HUGE_PAGE))


def collapse_data():
    """Gathers on huge pages what `align_data` found, and unmaps what it added.

    A zygote calls it. Pages gathered earlier would be shared with its parents, and its every write would take a small
    one out again.

    Returns:
        `int`: Bytes that were gathered, with what was added to them.
    """
    end = time.monotonic() + WAIT_SECONDS
    gathered = sum(_gather(page, end) for page in _pages)
    trim_data()
    return gathered * HUGE_PAGE


def trim_data():
    """Unmaps what `align_data` has added."""
    while _extensions:
        _libc().munmap(*_extensions.pop())


def _gather(page, end):
    """Returns whether a huge page has taken the place of small ones, which other workers may hold until `end`."""
    libc = _libc()
    libc.madvise(page, 1, MADV_POPULATE_WRITE)  # the kernel refuses pages of which no part is this process's own
    while libc.madvise(page, HUGE_PAGE, MADV_COLLAPSE) == FAILED:
        if ctypes.get_errno() != errno.EAGAIN or time.monotonic() > end:
            return False
        time.sleep(0.001)
    return True


def _data(address, maps):
    """Returns start and end of the heap, and of what is mapped around an address."""
    found = []
    for line in maps:
        addresses, permissions, _, _, _, *name = line.split()
        start, end = (int(text, 16) for text in addresses.split("-"))
        if permissions == "rw-p" and (name == ["[heap]"] or start <= address < end):
            found.append((start, end))
    return found


def _extend(start, end):
    """Maps what lies between two addresses, and returns whether all of it is mapped."""
    if start == end:
        return True
    libc, size = _libc(), end - start
    flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE
    mapped = libc.mmap(start, size, PROT_READ | PROT_WRITE, flags, -1, 0)
    if mapped == FAILED:
        return False
    if mapped != start:  # Linux before 4.17, where the address was a wish
        libc.munmap(mapped, size)
        return False
    _extensions.append((start, size))
    return True


def _readable_around(address, maps):
    """Returns start and end of what is mapped from one file around an address without a gap, only to be read."""
    spans = []  # [start, end, file]
    for line in maps:
        addresses, permissions, _, *file = line.split()
        if not permissions.startswith("r-"):
            continue  # beside code there are gaps that not even reading is allowed in
        start, end = (int(text, 16) for text in addresses.split("-"))
        if spans and spans[-1][1:] == [start, file]:
            spans[-1][1] = end
        else:
            spans.append([start, end, file])
    return next(((start, end) for start, end, _ in spans if start <= address < end), (0, 0))


@functools.cache
def _libc():
    libc = ctypes.CDLL(None, use_errno=True)
    address, number = ctypes.c_size_t, ctypes.c_int
    libc.mmap.argtypes = [address, address, number, number, number, ctypes.c_long]
    libc.mremap.argtypes = [address, address, address, number, address]
    libc.madvise.argtypes = libc.mprotect.argtypes = [address, address, number]
    libc.munmap.argtypes = [address, address]
    libc.mmap.restype = libc.mremap.restype = ctypes.c_ssize_t
    return libc
