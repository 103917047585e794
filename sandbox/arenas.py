"""Where the interpreter keeps small objects: in few places close together, because a fork pays for each page.

Nothing depends on it. With another allocator than CPython's (Objects/obmalloc.c) forks are slower and nothing is wrong.
"""

import sys

ARENA_SIZE, POOL_SIZE, POOL_HEADER, ALIGNMENT, SMALLEST_BYTES, LARGEST_BLOCK = 1 << 20, 16384, 48, 16, 48, 512
RESERVED_ARENAS = 3  # beside the two that an interpreter starts with; what the server loads fills four
MOST_FILLING = 1 << 17  # bytes for objects of one size; 18,000 were the most seen


def reserve():
    """Returns objects that keep arenas for what is loaded later.

    Without libraries between them, which come with the first imports, they fill huge pages (huge_pages.py).
    """
    blocks = [_block(LARGEST_BLOCK) for _ in range(RESERVED_ARENAS * ARENA_SIZE // LARGEST_BLOCK)]
    return blocks[:: ARENA_SIZE // LARGEST_BLOCK // 2]  # one in each half of an arena: an empty one would be given back


def fill_pools():
    """Returns objects that fill the free places between those of the interpreter.

    A solution's own small objects then start new pools and lie close together. In the free places, on hundreds of pages
    that it shares with the zygote, almost each of them would make the kernel copy a page.
    """
    fillers = []
    for size in range(SMALLEST_BYTES, LARGEST_BLOCK + 1, ALIGNMENT):
        for _ in range(MOST_FILLING // size):
            fillers.append(_block(size))
            if id(fillers[-1]) % POOL_SIZE == POOL_HEADER:  # the first of a new pool
                break
    return fillers


def _block(size):
    return bytes(size - sys.getsizeof(b""))
