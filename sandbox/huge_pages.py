"""Puts the interpreter's code on huge pages, which forked processes share without faults.

A fork does not copy the page tables of a mapped file, so each solution process would fault its way through the
interpreter's code once more, some forty times, and unmap a thousand pages at its end. A copy of that code in anonymous
memory, on pages of 2 MB, comes along with the fork as a few entries.

Not covered here: the pages that a fork has to copy because it writes to them (solution.py).
"""

import ctypes
import os

HUGE_PAGE = 1 << 21
PROT_READ, PROT_WRITE, PROT_EXEC = 1, 2, 4
MAP_PRIVATE, MAP_ANONYMOUS = 0x02, 0x20
MADV_COLLAPSE = 25  # since Linux 6.1
MREMAP_MAYMOVE, MREMAP_FIXED = 1, 2
FAILED = -1


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
    libc = ctypes.CDLL(None)
    address, number = ctypes.c_size_t, ctypes.c_int
    libc.mmap.argtypes = [address, address, number, number, number, ctypes.c_long]
    libc.mremap.argtypes = [address, address, address, number, address]
    libc.madvise.argtypes = libc.mprotect.argtypes = [address, address, number]
    libc.munmap.argtypes = [address, address]
    libc.mmap.restype = libc.mremap.restype = ctypes.c_ssize_t
    return libc
