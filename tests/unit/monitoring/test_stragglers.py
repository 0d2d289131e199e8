"""Ranks that are reported as slow."""

import pytest

from mtp_dist.metrics import HeadMetrics, RankStats, StepMetrics
from mtp_dist.monitoring.stragglers import CONSECUTIVE_INTERVALS, Stragglers

HOSTS = ["node-0", "node-0", "node-1", "node-1"]
STAGES = [0, 0, 1, 1]

# For each rank: busy seconds, and seconds of waiting for samples.
EVEN = [(0.2, 0.0), (0.2, 0.0), (0.8, 0.0), (0.8, 0.0)]
SLOW = [(0.2, 0.0), (0.2, 0.0), (0.8, 0.0), (1.2, 0.0)]
LATE = [(0.2, 0.0), (0.2, 0.4), (0.8, 0.0), (0.8, 0.0)]

SERIES = "3 log intervals in a row"
NAMED_SLOW = f"straggler: rank 3 on node-1 takes 1.5 times as long as the median rank of stage 1, {SERIES}"
NAMED_LATE = f"straggler: rank 1 on node-0 waits 40% of the time for samples, {SERIES}"


def run(intervals, steps=1, rollbacks=False):
    """Report log intervals of `steps` steps of one second each; rollbacks: one after each step that is not logged."""
    stragglers = Stragglers(HOSTS)
    stragglers.on_start(0)
    for interval in intervals:
        ranks = [RankStats(stage, wait, busy, 1.0, 1) for stage, (busy, wait) in zip(STAGES, interval, strict=True)]
        for stats in [()] * (steps - 1) + [ranks]:
            stragglers.on_step(StepMetrics(1, HeadMetrics((1.0,), (0.0,), 1.0), 1.0, {}, 1e-3, 1, 1.0, {}, stats))
            if not stats and rollbacks:
                stragglers.on_rollback(0)


@pytest.mark.parametrize(
    ("intervals", "steps", "expected"),
    [
        ([EVEN] * 10, 1, []),  # stages may differ
        ([SLOW] * 10, 1, [NAMED_SLOW]),  # once per series
        ([SLOW] * 3 + [EVEN] + [SLOW] * 3, 1, [NAMED_SLOW] * 2),
        ([SLOW] * (CONSECUTIVE_INTERVALS - 1) + [EVEN] + [SLOW] * (CONSECUTIVE_INTERVALS - 1), 1, []),
        ([LATE] * 3, 1, [NAMED_LATE]),
        ([LATE] * 4, 5, []),  # 0.4 of 5 seconds
        ([LATE] * 4, 3, [NAMED_LATE.replace("40%", "13%")]),
        ([SLOW] * 2, 9, []),  # intervals are counted, not steps
    ],
)
def test_stragglers(caplog, intervals, steps, expected):
    run(intervals, steps)
    assert caplog.messages == expected


def test_time_before_a_rollback_does_not_count(caplog):
    run([LATE] * CONSECUTIVE_INTERVALS, steps=5, rollbacks=True)
    assert caplog.messages == [NAMED_LATE]
