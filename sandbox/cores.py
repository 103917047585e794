"""How many processor cores this process may use: affinity, the quota of its control groups, and the ranks of a host."""

import os
from collections.abc import Mapping
from pathlib import Path

# What launchers tell each process about the number of processes on its host: torchrun and accelerate, Open MPI, Slurm
RANKS = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "SLURM_NTASKS_PER_NODE")


def usable_cores(root: str = "/", environment: Mapping[str, str] = os.environ) -> int:
    """Return this process's share of the cores, at least 1.

    Args:
        root (`str`, defaults to `"/"`): The folder that holds `proc` and `sys`.
        environment (`Mapping`, *optional*): Where launchers leave the number of ranks.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks = next((int(environment[name]) for name in RANKS if environment.get(name, "").isdigit()), 1)
    return max(1, int(min(cores, _quota(Path(root)))) // max(1, ranks))


def _quota(root):
    """Return the least quota, in cores, of this process's control groups and those above them."""
    quotas = [float("inf")]
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return quotas[0]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        group = mount / path.lstrip("/")
        # In a container the path may be the host's, and only the mount itself be there
        for folder in (group, *group.parents):
            if folder == mount or mount in folder.parents:
                quotas.append(_quota_of(folder))
    return min(quotas)


def _quota_of(folder):
    try:
        if (folder / "cpu.max").exists():  # version 2
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return float("inf") if quota in ("max", "-1") else int(quota) / int(period)
    except (OSError, ValueError):
        return float("inf")
