"""What counts as the time and the memory of a step."""

import pytest

from tests.integration import jobs
from tests.ranks import Ranks
from tests.unit.engine.timing_on_ranks import CALLBACK, LARGE, STEP, Timed, train


@pytest.fixture(scope="module")
def timed(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Timed:
    path = jobs.write_config(
        tmp_path_factory.mktemp("timed"),
        train={"steps": 5, "validate_every": 2},
        checkpoint={"every": 2},
        log={"every": 2},
    )
    [of_rank] = ranks.run(1, train, path)
    return of_rank


def test_all_seconds_but_those_of_validations_and_saves_count(timed: Timed) -> None:
    assert timed.seconds == [STEP] + 4 * [CALLBACK + STEP]


def test_peak_memory_is_that_of_an_interval_without_the_build_of_the_model(timed: Timed) -> None:
    first, second, fourth, fifth = timed.peaks
    assert fourth > max(first, second, fifth) + LARGE // 2, "the callback allocates after the line of step 2"
