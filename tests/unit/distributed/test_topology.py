"""What ranks compare at the rendezvous, how long they wait for one another, and the resources of a rank."""

import re
import resource
from typing import Any

import psutil
import pytest

from tests.integration import jobs
from tests.ranks import Ranks
from tests.tiny import tiny_config
from tests.unit.distributed.on_ranks import collective_timeouts, join_with_seeds, resources


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
