"""The training loop."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from mtp_dist.checkpoint.format import RunState
from mtp_dist.config import Config
from mtp_dist.data.dataloader import Batches
from mtp_dist.data.datasets import Datasets
from mtp_dist.distributed.collectives import all_gather_floats
from mtp_dist.distributed.device import peak_memory, reset_peak_memory
from mtp_dist.engine.engine import TrainingEngine
from mtp_dist.engine.optimizer import learning_rate
from mtp_dist.loss.schedule import HeadSchedule, head_schedule
from mtp_dist.metrics import RankStats, StepMetrics
from mtp_dist.monitoring.callback import Callback, StopReason
from mtp_dist.training.spikes import SpikeDetector
from mtp_dist.training.stopping import StopSignals
from mtp_dist.training.watchdog import Watchdog


@dataclass(frozen=True)
class FitResult:
    reason: StopReason
    step: int
    """The last one made."""
    samples: Any
    """State of the training samples after it."""
    signal: int = 0
    """Number of the one that stopped the run."""


class TrainingClock:
    """Wall time of training, without the parts that do not count as such."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._since = time.perf_counter()

    def lap(self) -> float:
        """Return the seconds since the last lap or restart that count."""
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
    """Makes updates, and tells callbacks of them; every rank has one."""

    config: Config
    engine: TrainingEngine
    datasets: Datasets
    callbacks: Sequence[Callback]
    save: Callable[[RunState, bool], None]
    """Given how far the run has come, and whether it is the last time."""
    stop_signals: StopSignals
    watchdog: Watchdog

    def __post_init__(self) -> None:
        self.spikes = SpikeDetector(self.config.train.spike_deviations)
        self._skips = 0
        """In a row, up to the last step."""
        self._first_step = 1
        self._clock = TrainingClock()
        self._measured = np.zeros(3)
        """Seconds of waiting for samples, of passes and of all micro-batches on this rank since the last log."""

    def fit(self, completed_steps: int = 0, samples_read: int = 0) -> FitResult:
        """Train up to `train.steps` updates, validating and saving on the way and at the end.

        completed_steps and samples_read are those of the state that the engine is in. Every rank comes to the same end.
        """
        self._first_step, self._measured[:] = completed_steps + 1, 0
        ending: FitResult | None = None

        def tell_end(callback: Callback) -> None:
            callback.on_end(ending.reason if ending else None)

        with ExitStack() as ends:
            batches = Batches(self.config, self.engine.topology, self.datasets, completed_steps, samples_read)
            ends.callback(batches.close)
            self.watchdog.enter("the start")
            for callback in self.callbacks:
                ends.callback(tell_end, callback)
                callback.on_start(completed_steps)
            ending = self._train(batches)
        return ending

    def _train(self, batches: Batches) -> FitResult:
        """From the first step to the end, whatever that is."""
        config, watchdog = self.config, self.watchdog
        self._clock.restart()
        reset_peak_memory(self.engine.topology.device)
        for step in range(self._first_step, config.train.steps + 1):
            watchdog.enter(f"step {step}")
            metrics, signal = self.train_step(step, batches)
            watchdog.enter(f"the log of step {step}")
            self.tell("on_step", metrics)
            self._skips = self._skips + 1 if metrics.skipped else 0
            if self._skips == config.train.max_skipped_steps:
                return FitResult(StopReason.SKIPS, step, batches.state())
            if not metrics.skipped and (spike := self.spikes.update(metrics.heads.losses[0])):
                self.tell("on_spike", step, spike)
                if config.train.spike_rollback:
                    return FitResult(StopReason.SPIKE, step, batches.state())
            stopping = signal > 0 and step < config.train.steps
            if stopping:
                self.tell("on_stop", step, signal)
            due = _is_due(step, config.train.validate_every, config.train.steps)
            if due and not stopping:
                self._validate(step, batches)
            if _is_due(step, config.checkpoint.every, config.train.steps) or stopping:
                watchdog.enter(f"the save after step {step}, or the one before")
                state = RunState(step, metrics.heads.losses, self.spikes.losses, batches.gather_state())
                with self._clock.paused():
                    self.save(state, stopping or step == config.train.steps)
            if due and stopping:  # saved first: the time may be short, and a validation takes long
                self._validate(step, batches)
            if stopping:
                return FitResult(StopReason.SIGNAL, step, batches.state(), signal)
        return FitResult(StopReason.LAST_STEP, config.train.steps, batches.state())

    def tell(self, event: str, *arguments: object) -> None:
        """Call the hook of that name of all callbacks."""
        for callback in self.callbacks:
            getattr(callback, event)(*arguments)

    def train_step(self, step: int, batches: Batches) -> tuple[StepMetrics, int]:
        """One update. Returns what it reports, and the number of a signal that has reached a rank, or 0."""
        config = self.config
        started = time.perf_counter()
        batch = batches.next_train_batch()
        waited = time.perf_counter() - started
        rate = learning_rate(config, step)
        result = self.engine.train_step(batch, rate, head_schedule(config, step), lambda: self.stop_signals.received)
        self._measured += waited, result.busy_seconds, result.schedule_seconds
        due = step == self._first_step or _is_due(step, config.log.every, config.train.steps)
        metrics = StepMetrics(
            step=step,
            heads=result.heads,
            grad_norm=result.grad_norm,
            grad_norms_by_module=result.grad_norms_by_module,
            learning_rate=rate,
            tokens=config.train.global_batch_size * config.train.sequence_length,
            seconds=self._clock.lap(),
            epochs=self.datasets.epochs(batches.samples_read),
            ranks=self._gather_rank_stats() if due else (),
            skipped=result.skipped,
        )
        return metrics, result.stop_signal

    def _gather_rank_stats(self) -> list[RankStats]:
        """Of the steps since the last log. A collective over all ranks."""
        topology = self.engine.topology
        of_ranks = all_gather_floats([*self._measured, peak_memory(topology.device)], topology)
        self._measured[:] = 0
        reset_peak_memory(topology.device)
        return [
            RankStats(topology.stage_of(rank), waiting, busy, scheduled, int(memory))
            for rank, (waiting, busy, scheduled, memory) in enumerate(of_ranks)
        ]

    def _validate(self, step: int, batches: Batches) -> None:
        """On all sets, with all heads."""
        self.watchdog.enter(f"the validation after step {step}")
        weights = HeadSchedule(head_schedule(self.config, step).loss_weights, self.config.heads.count)
        with self._clock.paused():
            for validation in self.datasets.validation:
                heads = self.engine.evaluate(batches.validation_batch(validation.samples), weights)
                self.tell("on_validation", step, validation.name, heads)


def _is_due(step: int, every: int | None, last: int) -> bool:
    return step == last or (every is not None and step % every == 0)
