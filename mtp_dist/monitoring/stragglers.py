"""Detection of ranks that the other ranks wait for."""

import logging
from collections.abc import Sequence
from itertools import groupby
from statistics import median_low

from mtp_dist.metrics import RankStats, StepMetrics
from mtp_dist.monitoring.callback import Callback

logger = logging.getLogger(__name__)

SLOW_RATIO = 1.3
"""Ratio to the median of the ranks with the same work above which a rank is slow."""
CONSECUTIVE_INTERVALS = 3
"""Log intervals in a row before a rank is reported: noise of a machine comes and goes."""
MAX_DATA_WAIT_FRACTION = 0.1
"""Fraction of an interval that a rank may wait for its samples."""


class Stragglers(Callback):
    """Callback that compares each rank's passes with those of its stage, and its wait for samples with the steps' time.

    Ranks of one tensor-parallel group wait for one another within each layer, so all of them are slow if one is.
    """

    def __init__(self, hosts: Sequence[str]) -> None:
        """Compare the ranks on these hosts, one per rank."""
        self._hosts = hosts
        self._seconds = 0.0
        self._slow_intervals = [0] * len(hosts)
        self._late_intervals = [0] * len(hosts)

    def on_rollback(self, completed_steps: int) -> None:
        self._seconds = 0.0  # the ranks' statistics start again, too

    def on_step(self, metrics: StepMetrics) -> None:
        self._seconds += metrics.seconds
        if metrics.ranks:
            self._compare_stages(metrics.ranks)
            self._compare_waiting(metrics.ranks)
            self._seconds = 0.0

    def _compare_stages(self, stats: Sequence[RankStats]) -> None:
        for stage, stage_ranks in groupby(range(len(stats)), key=lambda rank: stats[rank].stage):
            ranks = list(stage_ranks)
            median = median_low([stats[rank].busy_seconds for rank in ranks])
            for rank in ranks:
                ratio = stats[rank].busy_seconds / median if median else 1.0
                symptom = f"takes {ratio:.2g} times as long as the median rank of stage {stage}"
                self._count(self._slow_intervals, rank, ratio > SLOW_RATIO, symptom)

    def _compare_waiting(self, stats: Sequence[RankStats]) -> None:
        for rank, rank_stats in enumerate(stats):
            fraction = rank_stats.waiting_seconds / self._seconds
            symptom = f"waits {fraction:.0%} of the time for samples"
            self._count(self._late_intervals, rank, fraction > MAX_DATA_WAIT_FRACTION, symptom)

    def _count(self, intervals: list[int], rank: int, is_slow: bool, symptom: str) -> None:
        """Count a rank's slow intervals in a row; log once per series."""
        intervals[rank] = intervals[rank] + 1 if is_slow else 0
        if intervals[rank] == CONSECUTIVE_INTERVALS:
            logger.info(
                "straggler: rank %d on %s %s, %d log intervals in a row",
                rank,
                self._hosts[rank],
                symptom,
                CONSECUTIVE_INTERVALS,
                extra={"event": "note"},
            )
