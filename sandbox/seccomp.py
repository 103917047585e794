"""The system calls that a caged process may make: an allow-list for the zygote and a shorter one for its children.

Everything not named in `ALLOWED` fails with EPERM, so Python raises an ordinary `PermissionError`: there is no socket,
no execve, no ptrace, no signal, no mount, no chmod, no io_uring. The zygote must fork, wait and clean up. A second
filter, which each solution process installs before it runs any source, denies it the calls needed for that.

Not covered here: which files may be opened (cage.py).
"""

import ctypes
import errno
import os

KILL_PROCESS, ERRNO, ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
CLONE_THREAD = 0x00010000
CLONE3 = 435  # its flags lie in memory, where no filter can look: glibc falls back to clone

MACHINE = os.uname().machine
AUDIT_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
COLUMN = {"x86_64": 0, "aarch64": 1}

# Name: (x86_64, aarch64); None where the architecture has only the newer call.
ALLOWED = {
    # its own memory
    "mmap": (9, 222), "munmap": (11, 215), "mprotect": (10, 226), "mremap": (25, 216), "madvise": (28, 233),
    "brk": (12, 214),
    # open descriptors
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67),
    "pwrite64": (18, 68), "lseek": (8, 62), "close": (3, 57), "close_range": (436, 436), "fstat": (5, 80),
    "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24), "fsync": (74, 82), "fdatasync": (75, 83),
    "ftruncate": (77, 46), "getdents64": (217, 61), "pipe": (22, None), "pipe2": (293, 59), "poll": (7, None),
    "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72),
    # file names, restricted by mounts and Landlock
    "open": (2, None), "openat": (257, 56), "stat": (4, None), "lstat": (6, None), "newfstatat": (262, 79),
    "statx": (332, 291), "access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439),
    "readlink": (89, None), "readlinkat": (267, 78), "getcwd": (79, 17), "chdir": (80, 49), "fchdir": (81, 50),
    "mkdir": (83, None), "mkdirat": (258, 34), "rmdir": (84, None), "unlink": (87, None), "unlinkat": (263, 35),
    "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276),
    # time and randomness
    "clock_gettime": (228, 113), "clock_getres": (229, 114), "clock_nanosleep": (230, 115), "nanosleep": (35, 101),
    "gettimeofday": (96, 169), "time": (201, None), "times": (100, 153), "getitimer": (36, 102),
    "setitimer": (38, 103), "alarm": (37, None), "getrandom": (318, 278),
    # its own process and threads
    "clone": (56, 220), "futex": (202, 98), "set_robust_list": (273, 99), "set_tid_address": (218, 96),
    "rseq": (334, 293), "gettid": (186, 178), "sched_yield": (24, 124), "sched_getaffinity": (204, 123),
    "exit": (60, 93), "exit_group": (231, 94), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139), "sigaltstack": (131, 132), "restart_syscall": (219, 128), "getpid": (39, 172),
    "getppid": (110, 173), "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177),
    "getrusage": (98, 165), "getrlimit": (97, 163), "sysinfo": (99, 179), "uname": (63, 160),
    # the zygote only, denied to its children
    "fork": (57, None), "kill": (62, 129), "wait4": (61, 260), "recvmsg": (47, 212), "chmod": (90, None),
    "fchmodat": (268, 53), "prctl": (157, 167), "seccomp": (317, 277),
}  # fmt: skip
ZYGOTE_ONLY = ("fork", "kill", "wait4", "recvmsg", "chmod", "fchmodat", "prctl", "seccomp")
# Only on the process itself (argument 0), whose limits the kernel does not let it raise.
PRLIMIT64 = (302, 261)
# Python asks whether a descriptor is a terminal: ENOTTY is the usual answer.
IOCTL = (16, 29)
# Descriptors may be duplicated and queried. Owners, signals, leases and notices are refused: with them the kernel would
# signal other processes, or block those that open a file of the library. So are flags, which would stay set on the
# /dev/null that all solutions share.
FCNTL = (72, 25)
F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC = 0, 1, 2, 3, 1030

LOAD, JUMP_EQUAL, JUMP_ANY_BIT, RETURN = 0x20, 0x15, 0x45, 0x06  # classic BPF
# Offsets in struct seccomp_data (little-endian)
NUMBER, ARCHITECTURE, FIRST_ARGUMENT, SECOND_ARGUMENT = 0, 4, 16, 24


class _Instruction(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint16), ("yes", ctypes.c_uint8), ("no", ctypes.c_uint8), ("k", ctypes.c_uint32)]


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_uint16), ("instructions", ctypes.POINTER(_Instruction))]


def supported() -> bool:
    """Return whether the system calls of this machine are known."""
    return MACHINE in COLUMN


def _numbers(names):
    column = COLUMN[MACHINE]
    return [ALLOWED[name][column] for name in names if ALLOWED[name][column] is not None]


def zygote_filter() -> ctypes.Structure:
    """Return the filter of the zygote, which its children inherit."""
    column = COLUMN[MACHINE]
    lines = [
        (LOAD, 0, 0, ARCHITECTURE),
        (JUMP_EQUAL, 1, 0, AUDIT_ARCHITECTURES[MACHINE]),
        (RETURN, 0, 0, KILL_PROCESS),
        (LOAD, 0, 0, NUMBER),
        (JUMP_EQUAL, 0, 1, CLONE3),
        (RETURN, 0, 0, ERRNO | errno.ENOSYS),
        (JUMP_EQUAL, 0, 1, IOCTL[column]),
        (RETURN, 0, 0, ERRNO | errno.ENOTTY),
        (JUMP_EQUAL, 0, 4, PRLIMIT64[column]),
        (LOAD, 0, 0, FIRST_ARGUMENT),
        (JUMP_EQUAL, 0, 1, 0),
        (RETURN, 0, 0, ALLOW),
        (RETURN, 0, 0, ERRNO | errno.EPERM),
        (JUMP_EQUAL, 0, 8, FCNTL[column]),
        (LOAD, 0, 0, SECOND_ARGUMENT),
        (JUMP_EQUAL, 4, 0, F_DUPFD),
        (JUMP_EQUAL, 3, 0, F_GETFD),
        (JUMP_EQUAL, 2, 0, F_SETFD),
        (JUMP_EQUAL, 1, 0, F_GETFL),
        (JUMP_EQUAL, 0, 1, F_DUPFD_CLOEXEC),
        (RETURN, 0, 0, ALLOW),
        (RETURN, 0, 0, ERRNO | errno.EPERM),
    ]
    numbers = _numbers(ALLOWED)
    lines += [(JUMP_EQUAL, len(numbers) - index, 0, number) for index, number in enumerate(numbers)]
    lines += [(RETURN, 0, 0, ERRNO | errno.EPERM), (RETURN, 0, 0, ALLOW)]
    return _program(lines)


def child_filter() -> ctypes.Structure:
    """Return the second filter of a solution process: threads, but no forks, and no other call of the zygote's."""
    denied = _numbers(ZYGOTE_ONLY)
    (clone,) = _numbers(["clone"])
    lines = [(LOAD, 0, 0, NUMBER)]
    lines += [(JUMP_EQUAL, len(denied) - index + 3, 0, number) for index, number in enumerate(denied)]
    lines += [
        (JUMP_EQUAL, 0, 2, clone),
        (LOAD, 0, 0, FIRST_ARGUMENT),
        (JUMP_ANY_BIT, 0, 1, CLONE_THREAD),
        (RETURN, 0, 0, ALLOW),
        (RETURN, 0, 0, ERRNO | errno.EPERM),
    ]
    return _program(lines)


def _program(lines):
    return _Program(len(lines), (_Instruction * len(lines))(*lines))
