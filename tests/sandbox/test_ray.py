"""The same verdicts from a Ray cluster, each of them once, whatever dies on the way.

A cluster of one machine: a head that grades nothing, as a trainer's host would, and two nodes of one CPU. Not covered
here: hostile programs other than those that look for Ray (test_attacks.py), and hosts apart.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

# Read when Ray is imported: a token that this process alone knows, and no file outside a folder of our own, whose name
# is short, as names of sockets must be
FOLDER = tempfile.mkdtemp(prefix="ray", dir="/tmp")
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": os.urandom(16).hex(), "RAY_TMPDIR": FOLDER}
os.environ |= {"RAY_USAGE_STATS_ENABLED": "0"}
os.environ.pop("RAY_ADDRESS", None)

import pytest  # noqa: E402
import ray  # noqa: E402
from datasets import Dataset  # noqa: E402
from peft import LoraConfig  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402
from test_sandbox import GOOD, statuses  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

from rewards import UnitTestReward  # noqa: E402
from sandbox import Program, RaySandbox, Sandbox, on_ray  # noqa: E402
from trainers import ReinforceConfig, ReinforceTrainer, last_checkpoint  # noqa: E402

TIMEOUT = 1.0


@pytest.fixture(scope="module")
def cluster():
    """The head, which is soon to see that a node is dead."""
    health = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 200, "health_check_timeout_ms": 1000}
    head = {"num_cpus": 0, "include_dashboard": False, "include_log_monitor": False, "_system_config": health}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    yield cluster
    ray.shutdown()
    cluster.shutdown()
    shutil.rmtree(FOLDER, ignore_errors=True)


@pytest.fixture(scope="module")
def connected(cluster):
    staff(cluster)
    with RaySandbox(cluster.address, timeout=TIMEOUT) as sandbox:
        yield sandbox


@pytest.fixture
def sandbox(cluster, connected):
    """A sandbox on two live nodes, whatever the test before has done to them."""
    staff(cluster)
    connected.isolation()  # starts what has been killed
    assert len(connected._actors) == 2
    return connected


def staff(cluster):
    while len(cluster.worker_nodes) < 2:
        cluster.add_node(num_cpus=1, include_dashboard=False)


def grader_pid(actor):
    """The process of an actor: the parent of a sandbox's server, which is a judge's parent."""
    path = Path(FOLDER) / "pid"
    tests = f"import os\nwith open({str(path)!r}, 'w') as file:\n    file.write(str(os.getppid()))\nassert f(3) == 4"
    (verdict,) = ray.get(actor.handle.grade.remote([Program(GOOD.solution, tests, "f")]))
    assert verdict.passed
    return parent(path.read_text())


def parent(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


@pytest.fixture
def victim(sandbox):
    return grader_pid(sandbox._actors[0])


@pytest.fixture
def batch(sandbox, tmp_path, monkeypatch):
    """80 programs of 40 ms in a thread, on both nodes already; each notes that it runs, every verdict is counted."""
    ran, came, verdicts = tmp_path / "ran", Counter(), []
    ran.touch()
    note = "import os\nwith open({!r}, 'a') as file:\n    print({}, os.getppid(), file=file)\nassert f({}) == {}"
    source = "import time\ndef f(x):\n    time.sleep(0.04)\n    return x + 1\n"
    programs = [Program(source, note.format(str(ran), i, i, i + 1 + i % 2), "f") for i in range(80)]
    wait = sandbox._wait

    def notes():
        return [line.split() for line in ran.read_text().splitlines() if " " in line]

    def counted():
        answers = wait()
        came.update(job for jobs, answer in answers if answer is not None for job in jobs)
        return answers

    monkeypatch.setattr(sandbox, "_wait", counted)
    thread = threading.Thread(target=lambda: verdicts.extend(sandbox.run(programs)))
    thread.start()
    while len({server for _, server in notes()}) < 2:
        time.sleep(0.01)

    def finish():
        thread.join(30)
        assert [verdict.status for verdict in verdicts] == ["passed", "failed"] * 40
        assert came == dict.fromkeys(range(80), 1)
        times = Counter(int(number) for number, _ in notes())
        assert times.keys() == came.keys()
        return times.total() - 80  # those that ran again

    yield finish
    thread.join(30)


def mixed_batch():
    sources = [
        ("def f(x):\n    return x + 1\n", "assert f(3) == 4"),
        ("def f(x):\n    return x\n", "assert f(3) == 4"),
        ("def f(x):\n    return 1 // 0\n", "assert f(3) == 4"),
        ("def f(x:", "assert f(3) == 4"),
        ("import os\ndef f(x):\n    os._exit(0)\n", "assert f(3) == 4"),
        ("def f(x):\n    return [0] * 10**9\n", "assert f(3) == 4"),
        ("def f(x):\n    while True: pass\n", "assert f(3) == 4"),
        ("import numpy\ndef f(x):\n    return int(numpy.add(x, 1))\n", "assert f(3) == 4"),
    ]
    return [Program(f"{source}# {i}", tests, "f") for i in range(3) for source, tests in sources]


def test_an_address_that_does_not_answer_is_an_error(monkeypatch):
    monkeypatch.setattr(on_ray, "CONNECT_SECONDS", 2)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"127.0.0.1:{mute.getsockname()[1]}"
        with pytest.raises(ConnectionError, match=f"no Ray cluster at {address}: no answer within 2 s"):
            RaySandbox(address)


def test_the_verdicts_are_those_of_a_local_sandbox(sandbox):
    programs = mixed_batch()
    with Sandbox(timeout=TIMEOUT) as local:
        wanted = local.run(programs)
        assert sandbox.isolation() == local.isolation()
    verdicts = sandbox.run(iter(programs))
    assert [(v.status, v.detail) for v in verdicts] == [(v.status, v.detail) for v in wanted]
    assert Counter(v.status for v in verdicts) == {
        "passed": 6, "failed": 3, "error": 6, "crashed": 3, "out_of_memory": 3, "timeout": 3,
    }  # fmt: skip
    assert sandbox.run([]) == []


def test_rewards_are_those_of_a_local_sandbox(sandbox):
    prompt = "def add(a, b):\n"
    tests = "def check(candidate):\n    assert candidate(2, 3) == 5\n"
    completions = ["    return a + b\n", "    return a - b\n", "    return (\n", "    while True: pass\n"]
    columns = {"test": [tests] * 4, "entry_point": ["add"] * 4}
    columns |= {"completion_ids": [[1] * 50, [1] * 10, [1], [1] * 100]}
    with Sandbox(timeout=TIMEOUT) as local:
        wanted = UnitTestReward(length_penalty=0.01, sandbox=local)([prompt] * 4, completions, **columns)
    got = UnitTestReward(length_penalty=0.01, sandbox=sandbox)([prompt] * 4, completions, **columns)
    assert got == wanted == [0.995, -0.001, -0.0001, -0.01]


def test_a_solution_finds_nothing_of_ray(sandbox, cluster):
    """Each way in is shown to be open to a process outside the cage, and to be closed to a solution."""
    session = Path(cluster.head_node.get_session_dir_path())
    host, port = cluster.address.rsplit(":", 1)
    source = f"""
import os, socket
def unix():
    with socket.socket(socket.AF_UNIX) as channel:
        channel.connect({str(session / "sockets" / "raylet")!r})
def tcp():
    with socket.create_connection(({host!r}, {port}), 1): pass
def shared_memory():
    with open("/dev/shm/found_by_a_solution", "w"): pass
    os.remove("/dev/shm/found_by_a_solution")
def token():
    with open("/proc/{grader_pid(sandbox._actors[0])}/environ") as file: file.read()
def package():
    import ray
ways = dict(unix=unix, tcp=tcp, shared_memory=shared_memory, token=token, package=package,
    files=lambda: os.listdir({str(session)!r}), logs=lambda: os.listdir({str(session / "logs")!r}),
    signal=lambda: os.kill({grader_pid(sandbox._actors[0])}, 0), environment=lambda: os.environ["PATH"])
def f(x):
    found = []
    for name, way in ways.items():
        try:
            way()
            found.append(name)
        except Exception:
            pass
    return sorted(found)
"""
    outside = subprocess.run([sys.executable, "-c", f"{source}\nprint(f(0))"], capture_output=True, text=True).stdout
    everything = "environment files logs package shared_memory signal tcp token unix".split()
    assert outside.strip() == str(everything)
    (verdict,) = sandbox.run([Program(source, "found = f(0)\nassert found == [], found", "f")])
    assert verdict.passed, verdict


def test_a_killed_actor_loses_no_verdict(sandbox, victim, batch):
    os.kill(victim, signal.SIGKILL)
    again = batch()
    assert 0 < again <= on_ray.CHUNK
    assert len(sandbox._actors) == 2


def test_an_actor_that_hangs_counts_as_lost(sandbox, victim, monkeypatch):
    monkeypatch.setattr(sandbox, "_call_seconds", 2.0)
    os.kill(victim, signal.SIGSTOP)
    try:
        assert statuses(sandbox, *[GOOD] * 30) == ["passed"] * 30
    finally:
        os.kill(victim, signal.SIGKILL)


def test_a_program_that_always_kills_its_actor_gets_a_verdict_and_disturbs_no_other(sandbox):
    tests = "import os\nwith open(f'/proc/{os.getppid()}/stat') as file:\n    os.kill(int(file.read().split()[3]), 9)"
    verdicts = sandbox.run([GOOD] * 15 + [Program(GOOD.solution, tests, "f")] + [GOOD] * 15)
    assert [verdict.status for verdict in verdicts] == ["passed"] * 15 + ["crashed"] + ["passed"] * 15
    assert verdicts[15].detail == "its actor or node died 3 times"


def test_a_killed_node_loses_no_verdict(sandbox, cluster, batch):
    cluster.remove_node(min(cluster.worker_nodes, key=id), allow_graceful=False)
    again = batch()
    assert 0 < again <= on_ray.CHUNK
    assert len(sandbox._actors) == 1


def kill_nodes(cluster):
    for node in list(cluster.worker_nodes):
        cluster.remove_node(node, allow_graceful=False)


def test_training_stops_with_its_last_checkpoint_when_no_node_is_left(sandbox, cluster, tmp_path, tiny_folder):
    class LoseAllNodes(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            kill_nodes(cluster)

    tasks = {"prompt": ["def one():\n    return 1\n#"], "test": ["assert candidate() == 1"], "entry_point": ["one"]}
    trainer = ReinforceTrainer(
        str(tiny_folder),
        UnitTestReward(sandbox=sandbox),
        ReinforceConfig(
            str(tmp_path),
            per_device_train_batch_size=1,
            max_steps=1000,
            save_steps=1,
            save_total_limit=1,
            max_completion_length=2,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict(tasks),
        peft_config=LoraConfig(r=2, target_modules="all-linear"),
        callbacks=[LoseAllNodes()],
    )
    with pytest.raises(RuntimeError, match="unit_tests.* failed: RuntimeError: no node of the Ray cluster") as error:
        trainer.train()
    assert str(error.value).endswith(f"The last complete checkpoint is {last_checkpoint(tmp_path)}")
    cluster.add_node(num_cpus=1, include_dashboard=False)


def test_no_node_left_is_an_error_and_a_new_node_is_used(sandbox, cluster):
    kill_nodes(cluster)
    end = time.monotonic() + 20
    with pytest.raises(RuntimeError, match="no node of the Ray cluster is left"):
        while time.monotonic() < end:  # an actor outlives its node by a moment
            assert statuses(sandbox, GOOD) == ["passed"]
    cluster.add_node(num_cpus=1, include_dashboard=False)
    assert statuses(sandbox, GOOD) == ["passed"]


def test_the_last_to_close_ends_the_connection_and_every_process(sandbox):
    complete = set(sandbox.isolation().values()) == {"active"}
    second = RaySandbox(timeout=TIMEOUT, isolation="strict" if complete else "auto")
    assert statuses(second, GOOD) == ["passed"]
    pids = [grader_pid(actor) for each in (sandbox, second) for actor in each._actors]
    sandbox.close()
    assert ray.is_initialized() and statuses(second, GOOD) == ["passed"]
    second.close()
    assert not ray.is_initialized()
    end = time.monotonic() + 5
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < end:
        time.sleep(0.02)
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_ray_is_imported_by_its_users_alone():
    script = (
        "import sys\nsys.modules['ray'] = None  # as if it were not installed\n"
        "from sandbox import *\nfrom sandbox import RaySandbox\n"
        "try:\n    RaySandbox()\nexcept ImportError as error:\n    print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout == "RaySandbox needs Ray: pip install 'rl-code-agent[ray]'\n"


@pytest.mark.parametrize(
    "arguments",
    [{"actors": 0}, {"timeout": 0}, {"memory_mb": 1}, {"isolation": "none"}, {"address": "ray://host:10001"}],
    ids=repr,
)
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        RaySandbox(**arguments)
