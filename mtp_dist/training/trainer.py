"""The training loop."""

import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from mtp_dist.checkpoint.find import ResumePoint
from mtp_dist.checkpoint.format import RunState
from mtp_dist.checkpoint.restore import agree_on_resume_point, restore
from mtp_dist.checkpoint.saver import CheckpointSaver
from mtp_dist.config import Config
from mtp_dist.config.base import value_at_step
from mtp_dist.data.dataloader import Batches
from mtp_dist.data.datasets import Datasets
from mtp_dist.distributed.collectives import all_gather_floats
from mtp_dist.distributed.device import peak_memory, reset_peak_memory
from mtp_dist.engine.engine import TrainingEngine
from mtp_dist.engine.optimizer import learning_rate
from mtp_dist.errors import TrainingDivergedError
from mtp_dist.loss.schedule import HeadSchedule, head_schedule
from mtp_dist.metrics import RankStats, StepMetrics
from mtp_dist.monitoring.callback import Callback, StopReason
from mtp_dist.training.spikes import SpikeDetector
from mtp_dist.training.stopping import StopSignals
from mtp_dist.training.watchdog import Watchdog

logger = logging.getLogger(__name__)

MAX_ROLLBACKS = 3
"""Rollbacks to the same checkpoint, after which other samples are not expected to help."""


@dataclass(frozen=True)
class FitResult:
    """The end of training: its reason, step and data position."""

    reason: StopReason
    step: int
    """Last completed step."""
    samples: Any
    """Data position after that step."""
    signal: int = 0
    """Number of the signal that stopped the run, or 0."""


class TrainingClock:
    """Wall time of training, without validations and checkpoints."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._since = time.perf_counter()

    def lap(self) -> float:
        """Return the counted seconds since the last lap or restart."""
        since, self._since = self._since, time.perf_counter()
        return self._since - since

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing in this context."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._since += time.perf_counter() - started


@dataclass
class Trainer:
    """The training loop of one rank. All ranks run it and make the same decisions."""

    config: Config
    engine: TrainingEngine
    datasets: Datasets
    saver: CheckpointSaver
    callbacks: Callback
    stop_signals: StopSignals
    watchdog: Watchdog
    gloo_group: dist.ProcessGroup
    """Process group of all ranks."""
    resume_point: ResumePoint | None = None
    """Checkpoint that the engine was restored from; None: training starts from scratch."""
    samples_read: int = 0
    """Number of training samples read before the resume point."""
    validates_first: bool = False
    """True to validate before the first step too, to compare with the model that the weights come from."""

    def __post_init__(self) -> None:
        self.spikes = SpikeDetector(self.config.train.spike_deviations)
        self._rollbacks: Counter[Path] = Counter()
        self._first_step = 1
        self._clock = TrainingClock()
        self._seconds = np.zeros(3)
        """This rank's wait for samples, passes, and micro-batches with waits, since the last logged step."""

    def fit(self) -> FitResult:
        """Train up to `train.steps`, with validations and checkpoints on the way and at the end.

        With `train.spike_rollback` roll back after a spike and continue with new samples. Raise TrainingDivergedError,
        on every rank, if rollbacks do not help or if `train.max_skipped_steps` steps in a row are skipped. Wait for
        pending saves before returning.
        """
        point, reason = self.resume_point, None
        if point:
            self.spikes.restore(point.recent_losses)
        self.watchdog.enter("the start")
        try:
            self.callbacks.on_start(point.step if point else 0)
            result = self._train(point.step if point else 0, self.samples_read)
            while result.reason is StopReason.SPIKE:
                result = self._train(*self._roll_back(result))
            reason = result.reason
        finally:
            self.callbacks.on_end(reason)
        self.saver.join()
        if reason is StopReason.SKIPS:
            raise TrainingDivergedError(
                f"train.max_skipped_steps = {self.config.train.max_skipped_steps} steps in a row were skipped, the "
                f"last one was step {result.step}: the log names ranks and parameters; resume from an older checkpoint "
                "(checkpoint.resume) or with a lower optimizer.lr"
            )
        return result

    def _train(self, completed_steps: int, samples_read: int) -> FitResult:
        """Train from the engine's state to the last step, a signal, a spike or too many skips."""
        config, watchdog, last_step = self.config, self.watchdog, self.config.train.steps
        self._first_step, skips = completed_steps + 1, 0
        self._seconds[:] = 0
        self._clock.restart()
        reset_peak_memory(self.engine.topology.device)
        with closing(Batches(config, self.engine.topology, self.datasets, completed_steps, samples_read)) as batches:
            if self.validates_first and not completed_steps:
                self._validate(0, batches)
            for step in range(self._first_step, last_step + 1):
                watchdog.enter(f"step {step}")
                metrics, signal = self.train_step(step, batches)
                watchdog.enter(f"the log of step {step}")
                self.callbacks.on_step(metrics)

                skips = skips + 1 if metrics.skipped else 0
                if skips == config.train.max_skipped_steps:
                    return FitResult(StopReason.SKIPS, step, batches.state())
                if not metrics.skipped and (spike := self.spikes.update(metrics.heads.losses[0])):
                    self.callbacks.on_spike(step, spike)
                    if config.train.spike_rollback:
                        return FitResult(StopReason.SPIKE, step, batches.state())

                stopping = signal > 0 and step < last_step
                if stopping:
                    self.callbacks.on_stop(step, signal)
                validate = _is_due(step, config.train.validate_every, last_step)
                if validate and not stopping:
                    self._validate(step, batches)
                if stopping or _is_due(step, config.checkpoint.every, last_step):
                    self._save(step, metrics, batches, last=stopping or step == last_step)
                if validate and stopping:  # the checkpoint comes first: the time may be short, validations take long
                    self._validate(step, batches)
                if stopping:
                    return FitResult(StopReason.SIGNAL, step, batches.state(), signal)
            return FitResult(StopReason.LAST_STEP, last_step, batches.state())

    def train_step(self, step: int, batches: Batches) -> tuple[StepMetrics, int]:
        """Train on one global batch. Return its metrics, and the number of a signal that has reached a rank, or 0."""
        config = self.config
        started = time.perf_counter()
        batch = batches.next_train_batch()
        waited = time.perf_counter() - started
        rate = learning_rate(config, step)
        schedule = head_schedule(config, step)
        result = self.engine.train_step(batch, step, rate, schedule, lambda: self.stop_signals.received)
        self._seconds += waited, result.busy_seconds, result.schedule_seconds
        due = step == self._first_step or _is_due(step, config.log.every, config.train.steps)
        metrics = StepMetrics(
            step=step,
            heads=result.heads,
            grad_norm=result.grad_norm,
            grad_norms_by_module=result.grad_norms_by_module,
            learning_rate=rate,
            learning_rates={
                part: rate * value_at_step(factor, step) for part, factor in config.optimizer.multipliers.items()
            },
            tokens=config.train.global_batch_size * config.train.sequence_length,
            seconds=self._clock.lap(),
            epochs=self.datasets.epochs(batches.samples_read),
            ranks=self._gather_rank_stats() if due else (),
            skipped=result.skipped,
        )
        return metrics, result.stop_signal

    def _gather_rank_stats(self) -> list[RankStats]:
        """Return the statistics of all ranks since the last logged step. A collective over all ranks."""
        topology = self.engine.topology
        gathered = all_gather_floats([*self._seconds, peak_memory(topology.device)], topology)
        self._seconds[:] = 0
        reset_peak_memory(topology.device)
        return [
            RankStats(topology.pipeline_stage(rank), waiting, busy, scheduled, int(memory))
            for rank, (waiting, busy, scheduled, memory) in enumerate(gathered)
        ]

    def _validate(self, step: int, batches: Batches) -> None:
        """Evaluate all heads on all validation sets."""
        self.watchdog.enter(f"the validation after step {step}")
        schedule = HeadSchedule(head_schedule(self.config, max(1, step)).loss_weights, self.config.heads.count)
        with self._clock.paused():
            for validation in self.datasets.validation:
                heads = self.engine.evaluate(batches.validation_batch(validation.samples), schedule)
                self.callbacks.on_validation(step, validation.name, heads)

    def _save(self, step: int, metrics: StepMetrics, batches: Batches, last: bool) -> None:
        """Save a checkpoint in the background, or, if it is the run's last, wait until it is written."""
        self.watchdog.enter(f"the save after step {step}, or the one before")
        state = RunState(step, metrics.heads.losses, self.spikes.losses, batches.gather_state())
        with self._clock.paused():
            self.saver.save(state, last)

    def _roll_back(self, spike: FitResult) -> tuple[int, int]:
        """Restore this run's newest checkpoint, if it has one, and skip the samples read since.

        Return the number of completed steps and of samples read. Raise TrainingDivergedError if MAX_ROLLBACKS to that
        checkpoint have not helped.
        """
        self.watchdog.enter(f"the rollback from step {spike.step} to a checkpoint")
        self.saver.join()
        newest = self.config.checkpoint.model_copy(update={"resume": "auto"})
        config, engine = self.config.model_copy(update={"checkpoint": newest}), self.engine
        point = agree_on_resume_point(config, engine.topology, self.gloo_group) or self.resume_point
        if point:
            self._rollbacks[point.folder] += 1
            if self._rollbacks[point.folder] > MAX_ROLLBACKS:
                raise TrainingDivergedError(
                    f"the loss has jumped {MAX_ROLLBACKS + 1} times after {point.folder}, each time with other "
                    "samples: resume from an older checkpoint (checkpoint.resume) or with a lower optimizer.lr"
                )
            restore(engine, point.folder)
            self.spikes.restore(point.recent_losses)
        step = point.step if point else spike.step
        self.callbacks.on_rollback(step)
        where = f"Rolled back from step {spike.step} to {point.folder}" if point else "No checkpoint to roll back to"
        logger.info("%s, continuing after step %d with new samples", where, step, extra={"event": "rollback"})
        return step, self.datasets.restore(spike.samples, may_change=True)


def _is_due(step: int, every: int | None, last: int) -> bool:
    return step == last or (every is not None and step % every == 0)
