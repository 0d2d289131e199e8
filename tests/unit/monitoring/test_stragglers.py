"""Which ranks are named for what the others wait for."""

from collections.abc import Sequence

from mtp_dist.metrics import HeadMetrics, RankStats, StepMetrics
from mtp_dist.monitoring.stragglers import CONSECUTIVE_INTERVALS, Stragglers

HEADS = HeadMetrics((1.0,), (0.0,), 1.0)
HOSTS = ["node-0", "node-0", "node-1", "node-1"]
STAGES = [0, 0, 1, 1]


def reports(intervals: Sequence[Sequence[tuple[float, float]]], steps: int = 1) -> list[str]:
    """Of log intervals of some steps of one second; each has each rank's busy seconds, and those of waiting."""
    said: list[str] = []
    stragglers = Stragglers(HOSTS, said.append)
    for of_ranks in intervals:
        ranks = [
            RankStats(stage, waiting, busy, 1.0, 1) for stage, (busy, waiting) in zip(STAGES, of_ranks, strict=True)
        ]
        for figures in [()] * (steps - 1) + [ranks]:
            stragglers.on_step(StepMetrics(1, HEADS, 1.0, {}, 1e-3, 1, 1.0, {}, figures))
    return said


EVEN = [(0.2, 0.0), (0.2, 0.0), (0.8, 0.0), (0.8, 0.0)]
SLOW = [(0.2, 0.0), (0.2, 0.0), (0.8, 0.0), (1.2, 0.0)]
LATE = [(0.2, 0.0), (0.2, 0.4), (0.8, 0.0), (0.8, 0.0)]


def test_stages_differ_and_nobody_is_named() -> None:
    assert reports([EVEN] * 10) == []


def test_a_rank_slower_than_its_stage_is_named_once_until_it_is_over() -> None:
    [said] = reports([SLOW] * 10)
    assert said == (
        "straggler: rank 3 on node-1 takes 1.5 times as long as the median rank of stage 1, 3 log intervals in a row"
    )
    assert len(reports([SLOW] * 3 + [EVEN] + [SLOW] * 3)) == 2
    assert reports([SLOW] * (CONSECUTIVE_INTERVALS - 1) + [EVEN] + [SLOW] * (CONSECUTIVE_INTERVALS - 1)) == []


def test_a_rank_that_waits_for_its_samples_is_named() -> None:
    [said] = reports([LATE] * 3)
    assert said == "straggler: rank 1 on node-0 waits 40% of the time for samples, 3 log intervals in a row"


def test_the_steps_of_an_interval_count_together() -> None:
    assert reports([LATE] * 4, steps=5) == [], "0.4 of 5 seconds"
    assert len(reports([LATE] * 4, steps=3)) == 1
    assert reports([SLOW] * 2, steps=9) == []


def test_after_going_back_the_time_before_does_not_count() -> None:
    said: list[str] = []
    stragglers = Stragglers(HOSTS, said.append)
    ranks = [RankStats(stage, waiting, busy, 1.0, 1) for stage, (busy, waiting) in zip(STAGES, LATE, strict=True)]
    for _ in range(CONSECUTIVE_INTERVALS):
        for figures in ((), (), (), (), ranks):
            stragglers.on_step(StepMetrics(1, HEADS, 1.0, {}, 1e-3, 1, 1.0, {}, figures))
            if not figures:
                stragglers.on_start(0)
    assert len(said) == 1
