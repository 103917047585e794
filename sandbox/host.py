"""What this host gives a sandbox: processor cores, resource limits and installed packages."""

import importlib.util
import os
import resource
from collections.abc import Iterable, Mapping
from pathlib import Path

# What launchers tell each process about the number of processes on its host: torchrun and accelerate, Open MPI, Slurm
RANKS = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "SLURM_NTASKS_PER_NODE")
LOCAL_RANK = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID")


def usable_cores(root: str = "/", environment: Mapping[str, str] = os.environ) -> int:
    """Return this process's share of the cores: by affinity, the quota of its control groups and the ranks of a host.

    Args:
        root (`str`, defaults to `"/"`): The folder that holds `proc` and `sys`.
        environment (`Mapping`, *optional*): Where launchers leave the number of ranks.

    Returns:
        `int`: At least 1.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(cores, _quota(Path(root)))) // max(1, _number(RANKS, environment, 1)))


def first_core(share: int, environment: Mapping[str, str] = os.environ) -> int:
    """Return the core at which this process's workers begin: those of the processes of a host are on different cores.

    Args:
        share (`int`): Cores that a process of this host has for its workers.
        environment (`Mapping`, *optional*): Where launchers leave the rank.

    Returns:
        `int`: To be taken modulo the usable cores. Of a process on its own it is the process id.
    """
    if _number(RANKS, environment, 1) <= 1:
        return os.getpid()
    return _number(LOCAL_RANK, environment, 0) * share


def _number(names, environment, default):
    """Return the first of these variables that is a number."""
    return next((int(environment[name]) for name in names if environment.get(name, "").isdigit()), default)


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


def installed(packages: Iterable[str]) -> list[str]:
    """Return the names of packages, each once; raise `ValueError` if one cannot be imported here."""
    names = list(dict.fromkeys(packages))
    for name in names:
        if importlib.util.find_spec(name.partition(".")[0]) is None:
            raise ValueError(f"packages: there is no module {name!r} to import here: pip install it first")
    if len(names) > 60:
        raise ValueError(f"packages: {len(names)} names are too many: give at most 60")
    return names


def low_limits(memory_mb: int, stdio_mb: int) -> list[str]:
    """Return, as text, which limits of this process leave solutions less than they should have."""
    wanted = {"RLIMIT_AS": ("ulimit -v", "memory_mb", memory_mb), "RLIMIT_FSIZE": ("ulimit -f", "stdio_mb", stdio_mb)}
    low = []
    for name, (command, setting, megabytes) in wanted.items():
        hard = resource.getrlimit(getattr(resource, name))[1]
        if hard != resource.RLIM_INFINITY and hard < megabytes << 20:
            low.append(f"`{command}` allows {hard >> 10} KB, which is less than {setting}={megabytes}")
    return low


def set_limits() -> str:
    """Return the limits of this process that can keep a sandbox from starting, as text in brackets."""
    names = {"RLIMIT_AS": "ulimit -v", "RLIMIT_NPROC": "ulimit -u", "RLIMIT_NOFILE": "ulimit -n"}
    hard = {names[name]: resource.getrlimit(getattr(resource, name))[1] for name in names if hasattr(resource, name)}
    limits = [f"{name} is {value}" for name, value in hard.items() if value != resource.RLIM_INFINITY]
    return f" (limits here: {', '.join(limits)})" if limits else ""
