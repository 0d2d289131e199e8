"""Functions that the tests of this folder run on every rank; each opens the process group itself."""

import os
import resource

import torch
import torch.distributed as dist

from mtp_dist.config import Config
from mtp_dist.distributed.topology import initialize_topology, tp_group
from mtp_dist.errors import LaunchError
from tests.parity.runs import Run, sharded_run

CPU = torch.device("cpu")


def _prepare(port: int) -> None:
    dist.destroy_process_group()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def collective_timeouts(config: Config, port: int) -> list[float]:
    """Return the timeouts of all ranks' group, of a tensor-parallel group and of the store, in seconds."""
    _prepare(port)
    initialize_topology(config, CPU)
    groups = [dist.distributed_c10d._get_default_group(), tp_group()]
    timeouts = [group._get_backend(CPU).options._timeout for group in groups]
    return [time.total_seconds() for time in (*timeouts, dist.distributed_c10d._get_default_store().timeout)]


def resources(config: Config, port: int, soft_limit: int) -> tuple[int, int, str | None]:
    """Open the topology in an environment without settings. Return PyTorch's number of threads, the limit of open
    files and gloo's network interface."""
    environment, limits = dict(os.environ), resource.getrlimit(resource.RLIMIT_NOFILE)
    _prepare(port)
    for name in ("OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.pop(name, None)
    os.environ["LOCAL_WORLD_SIZE"] = str(len(os.sched_getaffinity(0)))
    torch.set_num_threads(7)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft_limit, limits[1]))
    try:
        initialize_topology(config, CPU)
        open_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return torch.get_num_threads(), open_files, os.environ.get("GLOO_SOCKET_IFNAME")
    finally:
        os.environ.clear()
        os.environ |= environment
        torch.set_num_threads(1)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def join_with_seeds(config: Config, port: int, seeds: list[int]) -> str | None:
    """Open the topology with this rank's seed. Return the error if the ranks refuse to start."""
    rank = dist.get_rank()
    _prepare(port)
    try:
        initialize_topology(config.model_copy(update={"run": config.run.model_copy(update={"seed": seeds[rank]})}), CPU)
    except LaunchError as error:
        return str(error)
    return None


def run_with_flags(config: Config) -> tuple[Run | None, dict[str, object]]:
    """Return a short training and the settings of deterministic kernels that it leaves; they are undone."""
    names = ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO")
    try:
        run = sharded_run(config, 3)
        environment = {name: os.environ.get(name) for name in names}
        return run, {"pytorch": torch.are_deterministic_algorithms_enabled()} | environment
    finally:
        torch.use_deterministic_algorithms(False)
        for name in names:
            os.environ.pop(name, None)
