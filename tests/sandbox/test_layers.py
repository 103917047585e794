"""The cage without one of its layers, and as an ordinary user: what it still keeps away, and what it says of it.

Each runs in a copy of the package, with the layer's function replaced by one that fails as on a kernel without it.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from attacks import ESCAPES

ROOT = Path(__file__).resolve().parents[2]
PYTHON = os.path.realpath(sys.executable)
ORDINARY_USER = 65533
FILES = ("read ", "write ", "list ", "overwrite ")  # how the escapes begin that want files
SCRIPT = """
import json, sys, warnings
folder, names = json.loads(sys.argv[1])
sys.path.insert(0, folder)
from attacks import ESCAPES
from sandbox import Program, Sandbox

with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    with Sandbox(timeout=2.0, memory_mb=320) as sandbox:
        isolation = sandbox.isolation()
        if "active" not in (isolation["private files"], isolation["landlock"]):
            names = []  # nothing keeps files away here: do not let the escapes try
        attacks = {name: ESCAPES[name] for name in ESCAPES if name.startswith(tuple(names))}
        verdicts = sandbox.run([Program(source, tests, "f") for _, source, tests in attacks.values()])
try:
    Sandbox(workers=1, isolation="strict").close()
    strict = None
except RuntimeError as error:
    strict = str(error)
wrong = {
    name: (attacks[name][0], verdict.status, verdict.detail)
    for name, verdict in zip(attacks, verdicts)
    if verdict.status not in attacks[name][0].split("|")
}
print(json.dumps([isolation, [str(warning.message) for warning in warned], strict, len(attacks), wrong]))
"""


def cage_of_a_copy(names, switched_off=None, python=PYTHON, user=None):
    """What `isolation()`, the warnings and `strict` say there, how many escapes were tried and which went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        shutil.copytree(ROOT / "sandbox", f"{folder}/sandbox", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "tests" / "sandbox" / "attacks.py", folder)
        if switched_off:
            with open(f"{folder}/sandbox/cage.py", "a") as file:
                file.write(f"\n\ndef {switched_off}(*_):\n    raise OSError(0, 'switched off')\n")
        command = [python, "-I", "-B", "-c", SCRIPT, json.dumps([folder, names])]
        rights = {"user": user, "group": user, "extra_groups": []} if user else {}
        run = subprocess.run(command, cwd="/", capture_output=True, text=True, **rights)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux has these layers")
@pytest.mark.parametrize(
    "function, feature", [("_private_files", "private files"), ("_landlock", "landlock")], ids=lambda text: text
)
def test_either_layer_alone_keeps_files_away(function, feature):
    isolation, warned, strict, tried, wrong = cage_of_a_copy(FILES, function)
    assert isolation[feature] == "missing: switched off"
    assert not wrong and (tried > 10 or "active" not in (isolation["private files"], isolation["landlock"]))
    assert len(warned) == 1 and f"{feature} (missing: switched off)" in warned[0]
    assert strict.startswith("the cage is incomplete here") and f"{feature} (missing: switched off)" in strict


@pytest.mark.skipif(sys.platform != "linux", reason="Linux has subreapers")
def test_it_starts_where_no_process_can_adopt_orphans():
    isolation, *_, tried, wrong = cage_of_a_copy(["fork", "vfork", "clone", "kill"], "_become_subreaper")
    if "active" in (isolation["private files"], isolation["landlock"]):
        assert tried == 7 and not wrong


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="only root can become another user")
def test_an_ordinary_user_has_the_same_cage():
    python = next(filter(an_ordinary_user_can_start, (PYTHON, "/usr/bin/python3")), None)
    if python is None:
        pytest.skip("an ordinary user can start no Python from 3.11 on")
    isolation, *_, tried, wrong = cage_of_a_copy([""], python=python, user=ORDINARY_USER)
    if isolation["private files"] == isolation["seccomp"] == "active":  # some ask for more than files
        assert tried == len(ESCAPES) and not wrong


def an_ordinary_user_can_start(python):
    command = [python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]
    try:
        return subprocess.run(command, user=ORDINARY_USER, cwd="/", stderr=subprocess.DEVNULL).returncode == 0
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="Linux has these limits")
@pytest.mark.parametrize(
    "limit, said",
    [
        ("ulimit -f 100", "`ulimit -f` allows 50 KB, which is less than stdio_mb=64"),
        ("ulimit -v 1000000", "`ulimit -v` allows 1000000 KB, which is less than memory_mb=1024"),
        ("ulimit -v 2000000", None),
    ],
)
@pytest.mark.parametrize("user", [None, ORDINARY_USER])
def test_limits_are_lowered_never_raised(limit, said, user):
    """Under limits of the caller's shell the sandbox starts, and says which of them leaves solutions too little."""
    python = next(filter(an_ordinary_user_can_start, (PYTHON, "/usr/bin/python3")), PYTHON) if user else PYTHON
    if user and (os.geteuid() != 0 or not an_ordinary_user_can_start(python)):
        pytest.skip("only root can become another user, who must be able to start Python")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        shutil.copytree(ROOT / "sandbox", f"{folder}/sandbox", ignore=shutil.ignore_patterns("__pycache__"))
        script = (
            f"import sys; sys.path.insert(0, {folder!r})\n"
            "from sandbox import Program, Sandbox\n"
            "with Sandbox(workers=1) as sandbox:\n"
            "    print(sandbox.run([Program('f = abs', 'assert f(-1) == 1', 'f')])[0].status)\n"
        )
        command = ["/bin/sh", "-c", f'{limit}; exec "$0" -I -B -c "$1"', python, script]
        rights = {"user": user, "group": user, "extra_groups": []} if user else {}
        run = subprocess.run(command, cwd="/", capture_output=True, text=True, **rights)
    assert run.stdout == "passed\n", run.stderr
    assert said in run.stderr if said else "ulimit" not in run.stderr
