"""What ranks compare at the rendezvous, how long they wait for one another, and the resources of a rank."""

import os
import re
import resource
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from mtp_dist.config import Config
from mtp_dist.distributed.topology import initialize_topology, tp_group
from mtp_dist.errors import LaunchError
from tests.integration import jobs
from tests.ranks import Ranks
from tests.tiny import tiny_config

CPU = torch.device("cpu")


def _prepare(port: int) -> None:
    dist.destroy_process_group()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def collective_timeouts(config: Config, port: int) -> list[float]:
    """On each rank: return the timeouts in seconds of all ranks' group, a tensor-parallel group and the store."""
    _prepare(port)
    initialize_topology(config, CPU)
    groups = [dist.distributed_c10d._get_default_group(), tp_group()]
    timeouts = [group._get_backend(CPU).options._timeout for group in groups]
    return [time.total_seconds() for time in (*timeouts, dist.distributed_c10d._get_default_store().timeout)]


def resources(config: Config, port: int, soft_limit: int) -> tuple[int, int, str | None]:
    """On each rank: open the topology in an environment without settings.

    Return PyTorch's number of threads, the limit of open files and gloo's network interface.
    """
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
    """On each rank: open the topology with this rank's seed. Return the error if the ranks refuse to start."""
    rank = dist.get_rank()
    _prepare(port)
    try:
        initialize_topology(config.model_copy(update={"run": config.run.model_copy(update={"seed": seeds[rank]})}), CPU)
    except LaunchError as error:
        return str(error)
    return None


def run_on(ranks: Ranks, world_size: int, function: Any, *arguments: Any, **run: Any) -> list[Any]:
    tensor = 2 if world_size == 2 else 1
    train = {"global_batch_size": 12}
    config = tiny_config(run={"join_timeout": 600, **run}, parallel={"tensor": tensor}, train=train)
    return ranks.run(world_size, function, config, jobs.free_port(), *arguments)


@pytest.mark.parametrize(("step_timeout", "seconds"), [(7200.0, 7800), (None, 86400)])
def test_watchdog_acts_before_a_collective_times_out(ranks: Ranks, step_timeout: float | None, seconds: int) -> None:
    assert run_on(ranks, 2, collective_timeouts, step_timeout=step_timeout) == [[seconds] * 3] * 2


def test_ranks_with_another_configuration_are_named(ranks: Ranks) -> None:
    first, *others = run_on(ranks, 3, join_with_seeds, [1, 2, 1])
    assert re.match(r"the configuration is \w+ on rank 1 \(.*\), and \w+ on 2 other ranks: start ", first)
    assert others == ["this run cannot start: rank 0 reports why"] * 2


def test_ranks_share_the_cores_and_have_open_files_and_an_interface(ranks: Ranks) -> None:
    """There are as many local ranks as cores, and neither OMP_NUM_THREADS nor an interface is set."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    [loopback] = [
        name for name, addresses in psutil.net_if_addrs().items() if "127.0.0.1" in {a.address for a in addresses}
    ]
    assert run_on(ranks, 2, resources, 512) == [(1, min(hard, 65_536), loopback)] * 2
