"""The callback that writes a run's metrics."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from mtp_dist.metrics import HeadMetrics, StepMetrics
from mtp_dist.monitoring.callback import Callback, StopReason
from mtp_dist.monitoring.scalars import (
    ThroughputUnits,
    ThroughputWindow,
    head_scalars,
    step_scalars,
    validation_scalars,
)
from mtp_dist.monitoring.writers.writer import MetricsWriter

logger = logging.getLogger(__name__)


class MetricsLogger(Callback):
    """Callback that turns the metrics of logged steps and of validations into named scalars for all writers.

    Tokens per second are those of all steps since the last logged one, over the wall time since then without
    validation and checkpoints. Training does not depend on a writer. For rank 0 only.
    """

    def __init__(
        self, writers: Sequence[MetricsWriter], units: ThroughputUnits, description: Mapping[str, Any]
    ) -> None:
        """Log to the writers. description: contents of `run.json`."""
        self._writers = writers
        self._units = units
        self._description = description
        self._window = ThroughputWindow()
        self._faulty: set[MetricsWriter] = set()

    def on_start(self, completed_steps: int) -> None:
        for writer in self._writers:
            with self._tolerate_errors(writer):
                writer.describe(self._description)
        if self._units.peak_flops is None:
            logger.info(
                "throughput/mfu is 0: the peak FLOP/s of this device at this precision is not known",
                extra={"event": "note"},
            )

    def on_step(self, metrics: StepMetrics) -> None:
        self._window.add(metrics, self._units.flops_per_token[len(metrics.heads.losses) - 1])
        for writer in self._writers:
            with self._tolerate_errors(writer):
                writer.advance(metrics.step)
        if metrics.ranks:
            scalars = head_scalars(metrics.heads) | step_scalars(metrics, self._window, self._units.peak_flops)
            self._window = ThroughputWindow()
            for writer in self._writers:
                with self._tolerate_errors(writer):
                    writer.write(metrics.step, scalars)

    def on_validation(self, step: int, name: str | None, heads: HeadMetrics) -> None:
        scalars = validation_scalars(heads, name, self._units.bytes_per_token[name])
        for writer in self._writers:
            with self._tolerate_errors(writer):
                writer.write(step, scalars)

    def on_rollback(self, completed_steps: int) -> None:
        self._window = ThroughputWindow()
        for writer in self._writers:
            with self._tolerate_errors(writer):
                writer.rewind(completed_steps)

    def on_end(self, reason: StopReason | None) -> None:
        for writer in self._writers:
            with self._tolerate_errors(writer):
                writer.close(failed=reason not in (StopReason.LAST_STEP, StopReason.SIGNAL))

    def note(self, text: str) -> None:
        for writer in self._writers:
            with self._tolerate_errors(writer):
                writer.note(text)

    @contextmanager
    def _tolerate_errors(self, writer: MetricsWriter) -> Iterator[None]:
        """Log the first OSError of a writer and ignore the others."""
        try:
            yield
        except OSError as error:
            if writer not in self._faulty:
                self._faulty.add(writer)
                logger.warning("%s cannot be written, training continues: %s", writer.name, error)
