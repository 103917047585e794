"""Puts the interpreter's code and data on huge pages, for forks that cost less.

A fork does not copy the page tables of a mapped file, so each solution process would fault its way through the
interpreter's code once more, some forty times, and unmap a thousand pages at its end. A copy of that code in anonymous
memory, on pages of 2 MB, comes along with the fork as a few entries.

Data is what a fork does copy the page tables of, page for page, each with a count that goes up and, at the end of the
process, down. The parts of one huge page are counted together, even where each has its own entry (since Linux 6.8).

Not covered here: the pages that a fork has to copy because it writes to them (arenas.py).
"""

import ctypes
import errno
import os
import time

HUGE_PAGE = 1 << 21
PROT_READ, PROT_WRITE, PROT_EXEC = 1, 2, 4
MAP_PRIVATE, MAP_ANONYMOUS, MAP_FIXED_NOREPLACE = 0x02, 0x20, 0x100000
MADV_COLLAPSE = 25  # since Linux 6.1
MREMAP_MAYMOVE, MREMAP_FIXED = 1, 2
FAILED = -1
WAIT_SECONDS = 0.1  # for other workers that have the same pages in work

_aligned = []  # (address, size) of what `align_data` found
_extensions = []  # and of what it added to that


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


def align_data():
    """Extends the mappings of the interpreter's data to whole huge pages, as far as the addresses beside them are free.

    It takes a process that was not forked itself: what a fork maps stays apart from what it has inherited. Each process
    that has the extensions calls `collapse_data` or `trim_data`, because the heap cannot grow until then.
    """
    libc = _libc()
    _aligned.clear()
    try:
        with open("/proc/self/maps") as maps:
            mappings = _data(maps.readlines())
    except OSError:
        return
    for start, end in mappings:
        low, high = start // HUGE_PAGE * HUGE_PAGE, -(-end // HUGE_PAGE) * HUGE_PAGE
        if not _extend(libc, low, start):
            low += HUGE_PAGE
        if not _extend(libc, end, high):
            high -= HUGE_PAGE
        if low < high:
            _aligned.append((low, high - low))


def collapse_data():
    """Puts the data that `align_data` found on huge pages of this process alone.

    Where its parent did this, all that it writes to would be copied to small pages again.

    Returns:
        `int`: Bytes that lie on huge pages now, with what was added for a moment.
    """
    libc = _libc()
    end = time.monotonic() + WAIT_SECONDS
    collapsed = 0
    for address, size in _aligned:
        for page in range(address, address + size, HUGE_PAGE):
            ctypes.memmove(page, page, 1)  # what was not written to since the fork is refused
        while (failed := libc.madvise(address, size, MADV_COLLAPSE) == FAILED) and time.monotonic() < end:
            if ctypes.get_errno() != errno.EAGAIN:
                break
            time.sleep(0.001)
        collapsed += 0 if failed else size
    trim_data()
    return collapsed


def trim_data():
    """Unmaps what `align_data` has added."""
    libc = _libc()
    while _extensions:
        libc.munmap(*_extensions.pop())


def _data(maps):
    """Returns start and end of each large mapping of anonymous memory that can be written to, but for the stack."""
    found = []
    for line in maps:
        addresses, permissions, _, _, inode, *name = line.split()
        start, end = (int(text, 16) for text in addresses.split("-"))
        if permissions == "rw-p" and inode == "0" and name != ["[stack]"] and end - start >= HUGE_PAGE // 2:
            found.append((start, end))
    return found


def _extend(libc, start, end):
    """Maps what lies between two addresses, and returns whether all of it is mapped."""
    if start == end:
        return True
    size = end - start
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


def _libc():
    libc = ctypes.CDLL(None, use_errno=True)
    address, number = ctypes.c_size_t, ctypes.c_int
    libc.mmap.argtypes = [address, address, number, number, number, ctypes.c_long]
    libc.mremap.argtypes = [address, address, address, number, address]
    libc.madvise.argtypes = libc.mprotect.argtypes = [address, address, number]
    libc.munmap.argtypes = [address, address]
    libc.mmap.restype = libc.mremap.restype = ctypes.c_ssize_t
    return libc
