"""How long ranks wait for one another."""

import pytest

from tests.integration import jobs
from tests.parity.runs import tiny_config
from tests.ranks import Ranks
from tests.unit.parallel.on_ranks import patience


@pytest.mark.parametrize(("step_timeout", "seconds"), [(7200.0, 7800), (None, 86400)])
def test_the_watchdog_speaks_first(ranks: Ranks, step_timeout: float | None, seconds: int) -> None:
    config = tiny_config(run={"step_timeout": step_timeout, "join_timeout": 60}, parallel={"tensor": 2})
    assert ranks.run(2, patience, config, jobs.free_port()) == [[seconds] * 3] * 2
