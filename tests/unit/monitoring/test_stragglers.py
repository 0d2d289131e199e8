import pytest

from mtp_dist.metrics import RankStats
from mtp_dist.monitoring.stragglers import Stragglers
from tests.unit.monitoring.test_metrics_logger import step_metrics

STAGES = [0, 0, 1, 1]

# For each rank: busy seconds, and seconds of waiting for samples.
EVEN = [(0.2, 0.0), (0.2, 0.0), (0.8, 0.0), (0.8, 0.0)]
SLOW = [(0.2, 0.0), (0.2, 0.0), (0.8, 0.0), (1.2, 0.0)]
LATE = [(0.2, 0.0), (0.2, 0.4), (0.8, 0.0), (0.8, 0.0)]

SERIES = "3 log intervals in a row"
NAMED_SLOW = f"straggler: rank 3 on node-1 takes 1.5 times as long as the median rank of stage 1, {SERIES}"
NAMED_LATE = f"straggler: rank 1 on node-0 waits 40% of the time for samples, {SERIES}"


@pytest.mark.parametrize(
    ("intervals", "steps", "rollbacks", "expected"),
    [
        ([EVEN] * 10, 1, False, []),  # stages may differ
        ([SLOW] * 10, 1, False, [NAMED_SLOW]),  # once per series
        ([SLOW] * 3 + [EVEN] + [SLOW] * 3, 1, False, [NAMED_SLOW] * 2),
        ([SLOW] * 2 + [EVEN] + [SLOW] * 2, 1, False, []),
        ([LATE] * 3, 1, False, [NAMED_LATE]),
        ([LATE] * 4, 5, False, []),  # 0.4 of 5 seconds
        ([LATE] * 4, 3, False, [NAMED_LATE.replace("40%", "13%")]),
        ([LATE] * 3, 5, True, [NAMED_LATE]),  # time before a rollback does not count
        ([SLOW] * 2, 9, False, []),  # intervals are counted, not steps
    ],
)
def test_stragglers(caplog, intervals, steps, rollbacks, expected):
    """A log interval has `steps` steps of one second each; rollbacks: one after each step that is not logged."""
    stragglers = Stragglers(["node-0", "node-0", "node-1", "node-1"])
    for interval in intervals:
        ranks = [RankStats(stage, wait, busy, 1.0, 1) for stage, (busy, wait) in zip(STAGES, interval, strict=True)]
        for stats in [()] * (steps - 1) + [ranks]:
            stragglers.on_step(step_metrics(1, seconds=1.0, ranks=stats))
            if not stats and rollbacks:
                stragglers.on_rollback(0)
    assert caplog.messages == expected
