"""What ranks compare when they meet, how long they wait for one another, and what a rank takes of its machine."""

import re
import resource

import psutil
import pytest

from tests.integration import jobs
from tests.ranks import Ranks
from tests.tiny import tiny_config
from tests.unit.engine.on_ranks import join_with_other_seeds, patience, resources


@pytest.mark.parametrize(("step_timeout", "seconds"), [(7200.0, 7800), (None, 86400)])
def test_the_watchdog_speaks_first(ranks: Ranks, step_timeout: float | None, seconds: int) -> None:
    config = tiny_config(run={"step_timeout": step_timeout, "join_timeout": 600}, parallel={"tensor": 2})
    assert ranks.run(2, patience, config, jobs.free_port()) == [[seconds] * 3] * 2


def test_ranks_of_a_machine_share_its_cores(ranks: Ranks) -> None:
    """There are as many local ranks as cores, and OMP_NUM_THREADS is not set."""
    config = tiny_config(run={"join_timeout": 600}, parallel={"tensor": 2})
    assert [threads for threads, *_ in ranks.run(2, resources, config, jobs.free_port(), 512)] == [1, 1]


def test_ranks_with_another_configuration_are_named(ranks: Ranks) -> None:
    config = tiny_config(run={"join_timeout": 600})
    first, *others = ranks.run(3, join_with_other_seeds, config, [1, 2, 1], jobs.free_port())
    assert first and re.match(r"the configuration is \w+ on rank 1 \(.*\), and \w+ on 2 other ranks: start ", first)
    assert others == ["this run cannot start: rank 0 reports why"] * 2


def test_a_mesh_of_all_ranks_has_open_files_and_an_interface(ranks: Ranks) -> None:
    """gloo connects each rank with all others, and alone it takes the interface that the host's name stands for."""
    config = tiny_config(run={"join_timeout": 600}, parallel={"tensor": 2})
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    [loopback] = [
        name for name, addresses in psutil.net_if_addrs().items() if "127.0.0.1" in {a.address for a in addresses}
    ]
    opened = ranks.run(2, resources, config, jobs.free_port(), 512)
    assert [limits for _, *limits in opened] == [[min(hard, 65_536), loopback]] * 2
