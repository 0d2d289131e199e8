"""Naming the ranks that the others wait for."""

from collections.abc import Callable, Sequence
from itertools import groupby
from statistics import median_low

from mtp_dist.metrics import RankStats, StepMetrics
from mtp_dist.monitoring.callback import Callback

SLOW_RATIO = 1.3
"""Times the median of the ranks that do the same work: what a rank needs to be called slow."""
CONSECUTIVE_INTERVALS = 3
"""Log intervals in a row that it takes: a machine's noise comes and goes."""
MAX_DATA_WAIT_FRACTION = 0.1
"""Of an interval that a rank may wait for its samples."""


class Stragglers(Callback):
    """Compares each rank's passes with those of its pipeline stage, and its wait for samples with the step's time.

    Ranks of one tensor-parallel group wait for one another within each layer, so all of them are slow where one is.
    """

    def __init__(self, hosts: Sequence[str], note: Callable[[str], None]) -> None:
        """hosts: name of each rank's machine."""
        self._hosts = hosts
        self._note = note
        self._seconds = 0.0
        self._slow_intervals = [0] * len(hosts)
        self._late_intervals = [0] * len(hosts)

    def on_start(self, completed_steps: int) -> None:
        self._seconds = 0.0  # the ranks' figures begin anew, too

    def on_step(self, metrics: StepMetrics) -> None:
        self._seconds += metrics.seconds
        if metrics.ranks:
            self._compare_stages(metrics.ranks)
            self._compare_waiting(metrics.ranks)
            self._seconds = 0.0

    def _compare_stages(self, figures: Sequence[RankStats]) -> None:
        for stage, of_stage in groupby(range(len(figures)), key=lambda rank: figures[rank].stage):
            ranks = list(of_stage)
            median = median_low([figures[rank].busy_seconds for rank in ranks])
            for rank in ranks:
                times = figures[rank].busy_seconds / median if median else 1.0
                what = f"takes {times:.2g} times as long as the median rank of stage {stage}"
                self._count(self._slow_intervals, rank, times > SLOW_RATIO, what)

    def _compare_waiting(self, figures: Sequence[RankStats]) -> None:
        for rank, of_rank in enumerate(figures):
            share = of_rank.waiting_seconds / self._seconds
            self._count(
                self._late_intervals, rank, share > MAX_DATA_WAIT_FRACTION, f"waits {share:.0%} of the time for samples"
            )

    def _count(self, intervals: list[int], rank: int, is_slow: bool, what: str) -> None:
        """Say it once, until it is over."""
        intervals[rank] = intervals[rank] + 1 if is_slow else 0
        if intervals[rank] == CONSECUTIVE_INTERVALS:
            self._note(
                f"straggler: rank {rank} on {self._hosts[rank]} {what}, {CONSECUTIVE_INTERVALS} log intervals in a row"
            )
