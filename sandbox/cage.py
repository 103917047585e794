"""The cage of a solution process: what it may not do, enforced by the features that this kernel has.

The zygote puts the cage on itself once, its children inherit it, and nothing in it can be undone from inside. Files are
blocked twice (by mounts and by Landlock) and so is the network (by a namespace and by seccomp), so a kernel that lacks
one feature still has the other. Missing features are reported. On systems other than Linux only the resource limits
exist, and the report says so.

Not covered here: which system calls remain (seccomp.py).
"""

import contextlib
import ctypes
import os
import resource
import signal
import stat
import sys
import sysconfig
from collections.abc import Callable

import seccomp

SCRATCH = "/tmp"  # a file system of its own, the only one that a solution can write to
SCRATCH_BYTES, SCRATCH_FILES = 16 << 20, 256
NULL = "/dev/null"
MAX_THREADS = 16
MAX_DESCRIPTORS = 64
NOBODY = 65534  # the user and group of a solution whose caller is root
LIBRARY_FOLDERS = sorted({os.path.realpath(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")})

FEATURES = (
    "no new privileges, unprivileged user, no capabilities, pid namespace, net namespace, ipc namespace, uts namespace,"
    " private files, thread limit, landlock, seccomp"
).split(", ")

LINUX = sys.platform == "linux"
_libc = ctypes.CDLL(None, use_errno=True)
if LINUX:
    _libc.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38
PR_SET_CHILD_SUBREAPER = 36
PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2
NEW_MOUNTS, NEW_UTS, NEW_IPC, NEW_USER, NEW_PIDS, NEW_NET = (
    0x00020000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 4096, 16384, 1 << 18
MNT_DETACH, AT_RECURSIVE, MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID = 2, 0x8000, 1, 2
CLONE, PIVOT_ROOT, CAPSET = {"aarch64": (220, 41, 91)}.get(seccomp.MACHINE, (56, 155, 126))
MOUNT_SETATTR, LANDLOCK_CREATE, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT = 442, 444, 445, 446

# Landlock's rights, by the kernel's bit; the number of bits known grows with its ABI.
READ_FILE, WRITE_FILE, READ_DIR = 1 << 2, 1 << 1, 1 << 3
REMOVE_DIR, REMOVE_FILE, MAKE_DIR, MAKE_REG, REFER, TRUNCATE = 1 << 4, 1 << 5, 1 << 7, 1 << 8, 1 << 13, 1 << 14
FILE_BITS = {1: 13, 2: 14, 3: 15, 4: 15}  # from 5 on: 16
ALL_NET, ALL_SCOPES = 3, 3  # TCP bind and connect; abstract sockets and signals


def _check(result, what):
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _prctl(option, value, address=0):
    _check(_libc.prctl(option, value, address, 0, 0), "prctl")


def _syscall(number, what, *arguments):
    return _check(_libc.syscall(ctypes.c_long(number), *arguments), what)


def _unshare(flags):
    _check(_libc.unshare(flags), "unshare")


def _mount(source, target, kind, flags, data=None):
    encode = lambda text: text if text is None else os.fsencode(text)  # noqa: E731
    arguments = encode(source), encode(target), encode(kind), ctypes.c_ulong(flags), encode(data)
    _check(_libc.mount(*arguments), f"mount on {target}")


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent exits."""
    if LINUX:
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def adopt_orphans() -> None:
    """Make this process the parent of its descendants' orphans."""
    with contextlib.suppress(OSError):  # gVisor has no subreapers, but pid namespaces, whose end is that of all orphans
        _become_subreaper()


def _become_subreaper():
    if LINUX:
        _prctl(PR_SET_CHILD_SUBREAPER, 1)


def hide() -> None:
    """Keep processes of the same user from tracing this one and from reading its memory."""
    if LINUX:
        _prctl(PR_SET_NO_NEW_PRIVS, 1)
        _prctl(PR_SET_DUMPABLE, 0)


def fork_apart() -> tuple[int, str | None]:
    """Fork a child that is the first process of a new pid namespace.

    `unshare` before a fork would do this too, but a process that has called it can start no threads.

    Returns:
        `tuple[int, str | None]`: What a fork returns, and why there is no namespace, if there is none.
    """
    if not LINUX:
        return os.fork(), None
    user, group = os.getuid(), os.getgid()
    try:
        return _clone(NEW_PIDS), None  # root, and stays root until it has made its mounts
    except OSError:
        pass
    try:
        pid = _clone(NEW_USER | NEW_PIDS)
    except OSError as error:
        return os.fork(), error.strerror
    try:
        if pid == 0:
            _write_text("/proc/self/setgroups", "deny")
            _write_text("/proc/self/uid_map", f"{user} {user} 1")
            _write_text("/proc/self/gid_map", f"{group} {group} 1")
    except OSError as error:
        return pid, error.strerror
    return pid, None


def _clone(namespaces):
    # PyDLL keeps the GIL over the call: taking it again in the child could deadlock
    syscall = ctypes.PyDLL(None, use_errno=True).syscall
    flags = ctypes.c_ulong(namespaces | signal.SIGCHLD)
    return _check(syscall(ctypes.c_long(CLONE), flags, None, None, None, None), "clone")


def enter(
    memory_mb: int, timeout: float, stdio_mb: int, packages: list[str], pids_failure: str | None = None
) -> tuple[dict[str, str], Callable[[bool], object]]:
    """Cage this process for good.

    Args:
        memory_mb (`int`): Megabytes of address space for each child, beside what this process has now.
        timeout (`float`): Seconds that a child may live; bounds its processor time.
        stdio_mb (`int`): Megabytes that each file of a script may have.
        packages (`list[str]`): Folders and files of installed packages that a child may read.
        pids_failure (`str`, *optional*): Why `fork_apart` made no namespace.

    Returns:
        `tuple[dict[str, str], Callable]`: Why each feature that is not active is missing, and a function that each
        child must call for itself, saying whether it is a script; it raises `OSError` when it fails.
    """
    if not LINUX:
        _limit_resources(memory_mb << 20, stdio_mb << 20)

        def limit_elsewhere(is_script):
            _limit_processor(timeout)
            if not is_script:
                _set_limit(resource.RLIMIT_FSIZE, 0)

        return dict.fromkeys(FEATURES, f"{sys.platform} has no such feature"), limit_elsewhere
    missing = {} if pids_failure is None else {"pid namespace": pids_failure}

    def attempt(feature, function, *arguments):
        try:
            return function(*arguments)
        except OSError as error:
            missing[feature] = error.strerror or str(error)

    memory = _address_space() + (memory_mb << 20)
    attempt("no new privileges", _prctl, PR_SET_NO_NEW_PRIVS, 1)
    with contextlib.suppress(OSError):
        _write_text("/proc/self/oom_score_adj", "1000")  # the kernel's first choice when memory runs out
    for flag, name in ((NEW_NET, "net"), (NEW_IPC, "ipc"), (NEW_UTS, "uts")):
        attempt(f"{name} namespace", _unshare, flag)
    attempt("private files", _private_files, packages)
    os.chdir(SCRATCH if "private files" not in missing else "/")
    attempt("landlock", _landlock, "private files" not in missing, packages)
    # After Landlock, whose rules name folders: nobody may have no access to a library in root's home
    attempt("unprivileged user", _become_nobody)
    attempt("thread limit", _limit_threads)
    attempt("no capabilities", _drop_capabilities)
    _limit_resources(memory, max(SCRATCH_BYTES, stdio_mb << 20))
    hide()
    die_with_parent()  # after the change of user, which would undo it
    child_filter = None
    try:
        if not seccomp.supported():
            raise OSError(0, f"no table of system calls for {seccomp.MACHINE}")
        _install(seccomp.zygote_filter())
        child_filter = seccomp.child_filter()
    except OSError as error:
        missing["seccomp"] = error.strerror or str(error)

    def limit_child(is_script):
        if "private files" in missing and not is_script:  # it has no file that it may write
            _set_limit(resource.RLIMIT_FSIZE, 0)
        if "pid namespace" in missing:  # it could outlive the zygote
            die_with_parent()
            _limit_processor(timeout)
        if child_filter is not None:
            _install(child_filter)

    return missing, limit_child


def _install(program):
    _prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(program))


def report(missing: dict[str, str]) -> dict[str, str]:
    """Return the state of every feature: `"active"` or `"missing: "` and the reason."""
    return {name: f"missing: {missing[name]}" if name in missing else "active" for name in FEATURES}


def _write_text(path, text):
    with open(path, "w") as file:
        file.write(text)


def _address_space():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def _installed_packages(folder):
    """Return the folders of third-party packages in the standard library: they may hold a task set's answers."""
    return [entry.path for entry in os.scandir(folder) if entry.name.endswith("-packages")]


def _private_files(packages):
    """Make a private root: the standard library and packages, read-only, and a scratch folder in memory."""
    nobody = _really_root() and _nobody_is_mapped()
    _unshare(NEW_MOUNTS)
    _mount("none", "/", None, MS_REC | MS_PRIVATE)
    root = "/proc"  # any folder that is not needed any more
    _mount("tmpfs", root, "tmpfs", MS_NOSUID, "size=1m,nr_inodes=256,mode=755")
    for folder in LIBRARY_FOLDERS:
        os.makedirs(root + folder)
        _mount(folder, root + folder, None, MS_BIND | MS_REC)
        for hidden in _installed_packages(folder):
            _mount("tmpfs", root + hidden, "tmpfs", MS_NOSUID, "size=64k,nr_inodes=256")
    for path in packages:
        os.makedirs(root + (path if os.path.isdir(path) else os.path.dirname(path)), exist_ok=True)
        if not os.path.isdir(path):
            os.close(os.open(root + path, os.O_CREAT | os.O_WRONLY))
        _mount(path, root + path, None, MS_BIND | MS_REC)
    os.mkdir(root + "/dev")
    os.close(os.open(root + NULL, os.O_CREAT | os.O_WRONLY))
    _mount(NULL, root + NULL, None, MS_BIND)
    os.makedirs(root + SCRATCH, exist_ok=True)  # packages beneath it are loaded already, and hidden from here on
    # struct mount_attr: attr_set, attr_clr, propagation, userns_fd
    attributes = ctypes.byref((ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, 0, 0, 0))
    _syscall(MOUNT_SETATTR, "mount_setattr", -1, os.fsencode(root), AT_RECURSIVE, attributes, ctypes.c_size_t(32))
    # The scratch folder belongs to the user that the solution will run as
    options = f"size={SCRATCH_BYTES},nr_inodes={SCRATCH_FILES},mode=700"
    options += f",uid={NOBODY},gid={NOBODY}" if nobody else ""
    _mount("tmpfs", root + SCRATCH, "tmpfs", MS_NOSUID | MS_NODEV, options)
    os.chdir(root)
    _syscall(PIVOT_ROOT, "pivot_root", b".", b".")
    _check(_libc.umount2(b".", MNT_DETACH), "umount2")


def _really_root():
    # An ordinary user is never uid 0 here: its user namespace maps it to itself, and cannot set groups
    return os.geteuid() == 0


def _nobody_is_mapped():
    # A user namespace may have no other user than root
    with open("/proc/self/uid_map") as file:
        ranges = [[int(number) for number in line.split()] for line in file]
    return any(first <= NOBODY < first + count for first, _, count in ranges)


def _become_nobody():
    if _really_root():
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)


def _drop_capabilities():
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this process
    _syscall(CAPSET, "capset", ctypes.byref(header), ctypes.byref((ctypes.c_uint32 * 6)()))


def _limit_resources(memory, file_bytes):
    limits = {
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_NOFILE: MAX_DESCRIPTORS,
        resource.RLIMIT_MEMLOCK: 0,
    }
    for name, limit in limits.items():
        _set_limit(name, limit)


def _set_limit(name, soft, hard=None):
    """Lower a limit. One that is lower already stays, as only root may raise it."""
    hard = soft if hard is None else hard
    now = resource.getrlimit(name)[1]
    if now != resource.RLIM_INFINITY:
        soft, hard = min(soft, now), min(hard, now)
    try:
        resource.setrlimit(name, (soft, hard))
    except (OSError, ValueError):
        if LINUX:  # macOS has the names of some limits, but not the limits
            raise


def limit_judge(memory_mb: int) -> None:
    """Bound what the tests allocate when a solution answers with a huge number."""
    limit = (memory_mb + 1024) << 20  # room for a result, for the tests' own data and for numpy
    _set_limit(resource.RLIMIT_AS, limit)


def _limit_threads():
    """Allow the zygote, one child and its threads, which are all that a new user namespace counts."""
    version = tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])
    if version < (5, 14):
        raise OSError(0, "Linux 5.14 or later is needed")
    _unshare(NEW_USER)
    _set_limit(resource.RLIMIT_NPROC, MAX_THREADS + 2)


def _limit_processor(timeout):
    seconds = int(timeout) + 2  # a last resort: the judge has it killed long before
    _set_limit(resource.RLIMIT_CPU, seconds, seconds + 1)


class _PathRule(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("rights", ctypes.c_uint64), ("folder", ctypes.c_int32)]


def _landlock(scratch, packages):
    abi = _syscall(LANDLOCK_CREATE, "landlock", None, ctypes.c_size_t(0), 1)
    handled = (1 << FILE_BITS.get(abi, 16)) - 1
    attributes = (ctypes.c_uint64 * 3)(handled, ALL_NET if abi >= 4 else 0, ALL_SCOPES if abi >= 6 else 0)
    size = 8 if abi < 4 else 16 if abi < 6 else 24
    rules = _syscall(LANDLOCK_CREATE, "landlock", ctypes.byref(attributes), ctypes.c_size_t(size), 0)

    def allow(path, rights):
        folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
        if not stat.S_ISDIR(os.fstat(folder).st_mode):
            rights &= READ_FILE | WRITE_FILE | TRUNCATE
        rule = _PathRule(rights & handled, folder)
        _syscall(LANDLOCK_ADD_RULE, "landlock", rules, 1, ctypes.byref(rule), 0)
        os.close(folder)

    for folder in LIBRARY_FOLDERS:
        allow(folder, READ_DIR)  # import lists it; its entries are allowed one by one
        for entry in os.scandir(folder):
            # Debian links to files that may not be installed
            if entry.path not in _installed_packages(folder) and os.path.exists(entry.path):
                allow(entry.path, READ_FILE | READ_DIR)
    for path in filter(os.path.exists, packages):
        allow(path, READ_FILE | READ_DIR)
    allow(NULL, READ_FILE | WRITE_FILE)
    if scratch:
        writing = WRITE_FILE | REMOVE_DIR | REMOVE_FILE | MAKE_DIR | MAKE_REG | REFER | TRUNCATE
        allow(SCRATCH, READ_FILE | READ_DIR | writing)
    _syscall(LANDLOCK_RESTRICT, "landlock", rules, 0)
    os.close(rules)


def wipe_scratch() -> None:
    """Empty the scratch folder, however deep, long-named or unreadable its contents are, and stay in it."""
    os.chdir(SCRATCH)
    depth = 0  # of the current folder: one step at a time, as whole paths may be too long and too deep to recurse
    while True:
        for name in os.listdir(b"."):
            if not _is_folder(name):
                os.unlink(name)
                continue
            os.chmod(name, 0o700)
            try:
                os.rmdir(name)
            except OSError:  # it is not empty yet
                os.chdir(name)
                depth += 1
                break
        else:
            if depth == 0:
                return
            os.chdir("..")
            depth -= 1


def _is_folder(path):
    return stat.S_ISDIR(os.lstat(path).st_mode)
