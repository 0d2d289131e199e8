"""Number of CPU threads per rank: its part of the machine's cores.

PyTorch by default uses every core in every rank, and the contention makes a step several times slower.
"""

import os
from pathlib import Path

import torch

from mtp_dist.distributed.launcher import local_ranks

CPU_FOLDER = Path("/sys/devices/system/cpu")
CGROUP_FOLDER = Path("/sys/fs/cgroup")


def set_threads() -> str | None:
    """Limit PyTorch to this rank's part of the cores. OMP_NUM_THREADS has precedence; return a notice if it differs."""
    threads = cores_per_rank()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads)
    elif torch.get_num_threads() != threads:
        return (
            f"OMP_NUM_THREADS = {os.environ['OMP_NUM_THREADS']} in the environment: each rank computes on the CPU with "
            f"{torch.get_num_threads()} threads; one per core would be OMP_NUM_THREADS={threads}"
        )
    return None


def cores_per_rank() -> int:
    """Return the number of cores that this process may use, divided by the ranks that share them."""
    mask = os.sched_getaffinity(0)
    cores = len({_core(cpu) for cpu in mask})
    if ranks := local_ranks():
        return max(1, min(cores, _cgroup_cpus(cores)) // ranks)
    # srun assigns CPUs to each task, but only some clusters bind the task to them.
    cpus_per_task = int(os.environ.get("SLURM_CPUS_PER_TASK") or len(mask))
    return max(1, min(cores, _cgroup_cpus(cores), cpus_per_task * cores // len(mask)))


def _core(cpu: int) -> str:
    """Return an identifier of the core of a CPU, which two hardware threads may share."""
    try:
        return (CPU_FOLDER / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text()
    except OSError:
        return str(cpu)


def _cgroup_cpus(cores: int) -> int:
    """Return the CPU limit of a container (`docker run --cpus`, limits of Kubernetes), or `cores` without one."""
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):  # cgroups of version 2, 1
        try:
            quota, period = " ".join((CGROUP_FOLDER / name).read_text() for name in names).split()
        except (OSError, ValueError):
            continue
        return int(quota) // int(period) if quota.isdecimal() else cores
    return cores
