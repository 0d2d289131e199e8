"""Trainings on every rank with loss spikes and skipped steps at chosen steps."""

import itertools
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from mtp_dist.errors import TrainingDivergedError
from mtp_dist.metrics import StepMetrics
from mtp_dist.monitoring.callback import Callback
from mtp_dist.training.spikes import SpikeDetector
from mtp_dist.training.watchdog import Watchdog
from tests.tiny import load_resolved

TrainStep = Callable[..., tuple[StepMetrics, int]]


class FakeSpikes(SpikeDetector):
    """Reports chosen steps of those that are trained, counted from 1."""

    def __init__(self, at: Collection[int]) -> None:
        super().__init__(None)
        self.at = at
        self.seen = 0

    def update(self, loss: float | None) -> str | None:
        super().update(loss)
        self.seen += 1
        return "a jump" if self.seen in self.at else None


class Trained(NamedTuple):
    reason: str
    """Name of the stop reason, or the error message."""
    losses: list[tuple[int, tuple[float | None, ...]]]
    """Step and head losses of each trained step."""
    recent: list[float]
    """Losses that the next one would be compared with."""
    logged: list[tuple[int, float, float]]
    """Steps with rank statistics, and rank 0's seconds of passes and of all micro-batches."""
    rollbacks: list[str]
    """Watchdog phases of rollbacks."""


class Recorder(Callback):
    def __init__(self) -> None:
        self.losses: list[tuple[int, tuple[float | None, ...]]] = []
        self.logged: list[tuple[int, float, float]] = []

    def on_step(self, metrics: StepMetrics) -> None:
        self.losses.append((metrics.step, metrics.heads.losses))
        for stats in metrics.ranks[:1]:
            self.logged.append((metrics.step, stats.busy_seconds, stats.schedule_seconds))


class RecordingWatchdog(Watchdog):
    def __init__(self) -> None:
        super().__init__(None, 0)
        self.phases: list[str] = []

    def enter(self, phase: str) -> None:
        self.phases.append(phase)


def with_skips(train_step: TrainStep, skips: Collection[int]) -> TrainStep:
    """Return a `train_step` that reports chosen steps of those that are trained, counted from 1, as skipped."""
    trained = itertools.count(1)

    def train(*arguments: Any) -> tuple[StepMetrics, int]:
        metrics, signal = train_step(*arguments)
        return replace(metrics, skipped="a fault" if next(trained) in skips else None), signal

    return train


def train(
    path: Path, spikes: Collection[int], start: tuple[Path, int] | None = None, skips: Collection[int] = ()
) -> Trained:
    """Train with passes of 1 second per step, and 2 seconds for all of its micro-batches.

    spikes, skips: trained steps, counted from 1. start: a checkpoint and the number of samples to pass over.
    """
    from mtp_dist.checkpoint.find import ResumePoint
    from mtp_dist.checkpoint.format import read_metadata
    from mtp_dist.checkpoint.restore import restore
    from mtp_dist.checkpoint.saver import CheckpointSaver
    from mtp_dist.data.datasets import load_datasets
    from mtp_dist.distributed.topology import new_gloo_groups
    from mtp_dist.monitoring.logs import configure_logging
    from mtp_dist.monitoring.rank0 import rank0_callbacks
    from mtp_dist.training.stopping import StopSignals
    from mtp_dist.training.trainer import Trainer
    from tests.engines import open_engine

    config = load_resolved(path)
    engine = open_engine(config)
    topology = engine.topology
    configure_logging(topology.rank)
    groups, datasets = new_gloo_groups(topology), load_datasets(config)
    point, samples_read = None, 0
    if start:
        folder, samples_read = start
        restore(engine, folder)
        saved = read_metadata(folder)
        point = ResumePoint(folder, saved.step, saved.config, recent_losses=saved.recent_losses)
        if config.data.train[0].stream:
            datasets.train.read(0, samples_read)
    recorder, watchdog, callbacks = Recorder(), RecordingWatchdog(), list[Callback]()
    if topology.rank == 0:
        step = point.step if point else 0
        callbacks = rank0_callbacks(config, topology, datasets.validation, [""] * topology.world_size, step)
    saver = CheckpointSaver(config, engine, groups)
    observers, signals = [*callbacks, recorder], StopSignals()
    run = (config, engine, datasets, saver, observers, signals, watchdog, groups.all, point, samples_read)
    trainer = Trainer(*run)
    trainer.train_step = with_skips(trainer.train_step, skips)  # type: ignore[method-assign]
    engine.clock = SimpleNamespace(begin=lambda: None, seconds=lambda: (1.0, 2.0))  # type: ignore[assignment]
    trainer.spikes = FakeSpikes(spikes)
    try:
        reason = trainer.fit().reason.name
    except TrainingDivergedError as error:
        reason = str(error)
    saver.join()
    rollbacks = [phase for phase in watchdog.phases if "rollback" in phase]
    return Trained(reason, recorder.losses, trainer.spikes.losses, recorder.logged, rollbacks)
