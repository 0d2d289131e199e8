"""Trainings on every rank in which losses jump, and gradients are not finite, at chosen steps."""

import itertools
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from mtp_dist.errors import ConfigError
from mtp_dist.metrics import StepMetrics
from mtp_dist.monitoring.callback import Callback
from mtp_dist.training.spikes import SpikeDetector
from mtp_dist.training.watchdog import Watchdog
from tests.tiny import load_resolved

MakeStep = Callable[..., tuple[StepMetrics, int]]


class Jumps(SpikeDetector):
    """Calls chosen ones of all steps that are made spikes, counted from 1."""

    def __init__(self, at: Collection[int]) -> None:
        super().__init__(None)
        self.at = at
        self.seen = 0

    def update(self, loss: float) -> str | None:
        super().update(loss)
        self.seen += 1
        return "a jump" if self.seen in self.at else None


class Recorder(Callback):
    def __init__(self) -> None:
        self.losses: list[tuple[int, tuple[float, ...]]] = []
        self.logged: list[tuple[int, float, float]] = []

    def on_step(self, metrics: StepMetrics) -> None:
        self.losses.append((metrics.step, metrics.heads.losses))
        for figures in metrics.ranks[:1]:
            self.logged.append((metrics.step, figures.busy_seconds, figures.schedule_seconds))


class Listening(Watchdog):
    def __init__(self) -> None:
        super().__init__(None, 0)
        self.parts: list[str] = []

    def enter(self, part: str) -> None:
        self.parts.append(part)


def skipping(train_step: MakeStep, skips: Collection[int]) -> MakeStep:
    """The same, which calls chosen ones of all steps that are made skipped, counted from 1."""
    made = itertools.count(1)

    def make(*arguments: Any) -> tuple[StepMetrics, int]:
        metrics, signal = train_step(*arguments)
        return replace(metrics, skipped="a fault" if next(made) in skips else None), signal

    return make


class Trained(NamedTuple):
    reason: str
    """Name of the loop's reason to end, or the error's text."""
    losses: list[tuple[int, tuple[float, ...]]]
    """Of each step that was made, in the order of making."""
    recent: list[float]
    """What the next loss would be compared with."""
    logged: list[tuple[int, float, float]]
    """Steps with figures of the ranks, and rank 0's: seconds of passes and of all micro-batches."""
    ways_back: list[str]
    """What the watchdog is told while the run goes back."""


def train(
    path: Path, jumps: Collection[int], begin: tuple[Path, int] | None = None, skips: Collection[int] = ()
) -> Trained:
    """A step's passes take 1 second, and all of its micro-batches 2.

    jumps, skips: of all steps that are made, counted from 1. begin: a checkpoint, and the number of samples that are
    passed over.
    """
    from mtp_dist.checkpoint.find import ResumePoint
    from mtp_dist.checkpoint.format import read_metadata
    from mtp_dist.checkpoint.restore import restore
    from mtp_dist.checkpoint.saver import CheckpointSaver
    from mtp_dist.data.datasets import load_datasets
    from mtp_dist.distributed.device import select_device
    from mtp_dist.distributed.topology import initialize_topology, new_gloo_groups
    from mtp_dist.engine.engine import build_engine
    from mtp_dist.monitoring.logs import configure_logging
    from mtp_dist.monitoring.rank0 import log_start, rank0_callbacks
    from mtp_dist.training.recovery import fit_and_recover
    from mtp_dist.training.stopping import StopSignals
    from mtp_dist.training.trainer import Trainer

    config = load_resolved(path)
    topology = initialize_topology(config, select_device(config))
    configure_logging(topology.rank)
    groups = new_gloo_groups(topology)
    datasets = load_datasets(config)
    engine = build_engine(config, topology)
    point, samples_read = None, 0
    if begin:
        folder, samples_read = begin
        restore(engine, folder)
        description = read_metadata(folder)
        point = ResumePoint(folder, description.step, description.config, recent_losses=description.recent_losses)
        if config.data.train[0].stream:
            datasets.train.read(0, samples_read)
    recorder, watchdog, callbacks = Recorder(), Listening(), list[Any]()
    if topology.rank == 0:
        step = point.step if point else 0
        callbacks = rank0_callbacks(config, topology, datasets.validation, [""] * topology.world_size, step)
        log_start(config, topology, engine.optimizer_name, point)
    saver = CheckpointSaver(config, engine, groups)
    trainer = Trainer(config, engine, datasets, [*callbacks, recorder], saver.save, StopSignals(), watchdog)
    trainer.train_step = skipping(trainer.train_step, skips)  # type: ignore[method-assign]
    engine.clock = SimpleNamespace(begin=lambda: None, seconds=lambda: (1.0, 2.0))  # type: ignore[assignment]
    trainer.spikes = Jumps(jumps)
    try:
        reason = fit_and_recover(trainer, saver, groups.all, point, samples_read).reason.name
    except ConfigError as error:
        reason = str(error)
    saver.join()
    ways_back = [part for part in watchdog.parts if "back" in part]
    return Trained(reason, recorder.losses, trainer.spikes.losses, recorder.logged, ways_back)
