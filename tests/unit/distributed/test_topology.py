"""What ranks compare at the rendezvous, how long they wait for one another, and the resources of a rank."""

import os
import re
import resource

import psutil
import pytest
import torch
import torch.distributed as dist

from mtp_dist.distributed.topology import initialize_topology, tp_group
from mtp_dist.errors import LaunchError
from tests.integration import jobs
from tests.tiny import tiny_config

CPU = torch.device("cpu")


def open_topology(config, port, seeds):
    """On each rank: open the topology with this rank's seed, in an environment without settings.

    There are as many local ranks as cores. Return the timeouts in seconds of all ranks' group, a tensor-parallel group
    and the store, PyTorch's number of threads, the limit of open files and gloo's interface; or why it is refused.
    """
    run = config.run.model_copy(update={"seed": seeds[dist.get_rank()]})
    dist.destroy_process_group()
    environment, limits = dict(os.environ), resource.getrlimit(resource.RLIMIT_NOFILE)
    for name in ("OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.pop(name, None)
    cores = str(len(os.sched_getaffinity(0)))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_WORLD_SIZE=cores)
    torch.set_num_threads(7)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, limits[1]))
    try:
        initialize_topology(config.model_copy(update={"run": run}), CPU)
        groups = [dist.distributed_c10d._get_default_group(), tp_group()]
        times = [group._get_backend(CPU).options._timeout for group in groups]
        times.append(dist.distributed_c10d._get_default_store().timeout)
        open_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        interface = os.environ.get("GLOO_SOCKET_IFNAME")
        return [time.total_seconds() for time in times], torch.get_num_threads(), open_files, interface
    except LaunchError as error:
        return str(error)
    finally:
        os.environ.clear()
        os.environ |= environment
        torch.set_num_threads(1)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def run_on(ranks, seeds, tensor=1, **run):
    train = {"global_batch_size": 12}
    config = tiny_config(run={"join_timeout": 600, **run}, parallel={"tensor": tensor}, train=train)
    return ranks.run(len(seeds), open_topology, config, jobs.free_port(), seeds)


@pytest.mark.parametrize(("step_timeout", "seconds"), [(7200.0, 7800), (None, 86400)])
def test_watchdog_acts_before_a_collective_times_out_and_ranks_share_the_cores(ranks, step_timeout, seconds):
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    interfaces = psutil.net_if_addrs().items()
    [loopback] = [name for name, addresses in interfaces if "127.0.0.1" in {each.address for each in addresses}]
    expected = ([seconds] * 3, 1, min(hard, 65_536), loopback)
    assert run_on(ranks, [1, 1], tensor=2, step_timeout=step_timeout) == [expected] * 2


def test_ranks_with_another_configuration_are_named(ranks):
    first, *others = run_on(ranks, [1, 2, 1])
    assert re.match(r"the configuration is \w+ on rank 1 \(.*\), and \w+ on 2 other ranks: start ", first)
    assert others == ["this run cannot start: rank 0 reports why"] * 2
