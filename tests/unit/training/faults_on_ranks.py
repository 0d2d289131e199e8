"""Trainings on every rank with loss spikes, skipped steps and signals at chosen steps."""

import itertools
import signal
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple

from mtp_dist.errors import TrainingDivergedError
from mtp_dist.metrics import StepMetrics
from mtp_dist.monitoring.callback import Callback, CallbackList
from mtp_dist.training.spikes import SpikeDetector
from tests.tiny import load_resolved

TrainStep = Callable[..., tuple[StepMetrics, int]]


class FakeSpikes(SpikeDetector):
    """Reports chosen steps of those that are trained, counted from 1."""

    def __init__(self, at):
        super().__init__(None)
        self.at, self.seen = at, 0

    def update(self, loss):
        super().update(loss)
        self.seen += 1
        return "a jump" if self.seen in self.at else None


class Trained(NamedTuple):
    reason: str  # name of the stop reason, or the error message
    losses: list[tuple[int, tuple[float | None, ...]]]  # step and head losses of each trained step
    recent: list[float]  # losses that the next one would be compared with
    logged: list[
        tuple[int, float, float]
    ]  # steps with rank statistics, rank 0's seconds of passes and of micro-batches
    phases: list[str]  # of the watchdog
    events: str


class Recorder(Callback):
    """Records the events of a rank, and lets a signal reach it during the step `signalled_in`."""

    def __init__(self, signals, signalled_in):
        self.signals, self.signalled_in = signals, signalled_in
        self.losses, self.logged, self.events = [], [], []

    def on_step(self, metrics):
        self.events.append(f"step {metrics.step}")
        self.losses.append((metrics.step, metrics.heads.losses))
        self.logged += [(metrics.step, stats.busy_seconds, stats.schedule_seconds) for stats in metrics.ranks[:1]]
        if metrics.step + 1 == self.signalled_in:
            self.signals.received = signal.SIGUSR1

    def on_stop(self, step, number):
        self.events.append(f"stop {step} by {signal.Signals(number).name}")

    def on_validation(self, step, *_):
        self.events.append(f"validation {step}")


def with_skips(train_step, skips):
    """Return a `train_step` that reports chosen steps of those that are trained, counted from 1, as skipped."""
    trained = itertools.count(1)

    def train(*arguments):
        metrics, number = train_step(*arguments)
        return replace(metrics, skipped="a fault" if next(trained) in skips else None), number

    return train


def train(path, spikes=(), start=None, skips=(), signalled_in=None):
    """Train with passes of 1 second per step, and 2 seconds for all of its micro-batches.

    spikes, skips: trained steps, counted from 1. start: a checkpoint and the number of samples to pass over.
    signalled_in: step by rank.
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
    signals, phases, callbacks = StopSignals(), [], []
    recorder = Recorder(signals, signalled_in and signalled_in[topology.rank])
    if topology.rank == 0:
        step = point.step if point else 0
        callbacks = rank0_callbacks(config, topology, datasets.validation, [""] * topology.world_size, step)
    saver = CheckpointSaver(config, engine, groups)
    save = saver.save
    saver.save = lambda state, last: (recorder.events.append(f"save {state.step}"), save(state, last))
    observers, watchdog = CallbackList([*callbacks, recorder]), SimpleNamespace(enter=phases.append)
    run = (config, engine, datasets, saver, observers, signals, watchdog, groups.all, point, samples_read)
    trainer = Trainer(*run)
    trainer.train_step = with_skips(trainer.train_step, skips)
    engine.clock = SimpleNamespace(begin=lambda: None, seconds=lambda: (1.0, 2.0))
    trainer.spikes = FakeSpikes(spikes)
    try:
        reason = trainer.fit().reason.name
    except TrainingDivergedError as error:
        reason = str(error)
    saver.join()
    events = ", ".join(recorder.events)
    return Trained(reason, recorder.losses, trainer.spikes.losses, recorder.logged, phases, events)
