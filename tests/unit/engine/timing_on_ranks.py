"""A training in which each part takes a time of its own, by a clock of the test's."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from mtp_dist.metrics import StepMetrics
from mtp_dist.monitoring.callback import Callback
from mtp_dist.training.stopping import StopSignals
from mtp_dist.training.watchdog import Watchdog
from tests.tiny import load_resolved

STEP, CALLBACK, VALIDATION, SAVE = 1.0, 10.0, 100.0, 1000.0
"""Seconds."""
LARGE = 400 << 20
"""Bytes that are allocated while the model is built, and by a callback after step 2."""


class Timed(NamedTuple):
    seconds: list[float]
    """Of each step."""
    peaks: list[int]
    """Peak memory of each step that is logged, in bytes."""


def allocate_and_free() -> None:
    torch.ones(LARGE, dtype=torch.uint8)


class Recorder(Callback):
    def __init__(self) -> None:
        self.now = 0.0
        self.timed = Timed([], [])

    def takes(self, seconds: float, function: Any) -> Any:
        """The same function, which takes so long."""

        def timed(*arguments: Any) -> Any:
            self.now += seconds
            return function(*arguments)

        return timed

    def on_step(self, metrics: StepMetrics) -> None:
        self.now += CALLBACK
        self.timed.seconds.append(metrics.seconds)
        if metrics.ranks:
            self.timed.peaks.append(metrics.peak_memory)
        if metrics.step == 2:
            allocate_and_free()


def train(path: Path) -> Timed:
    from mtp_dist.data.datasets import load_datasets
    from mtp_dist.distributed.device import select_device
    from mtp_dist.distributed.topology import initialize_topology
    from mtp_dist.engine.engine import build_engine
    from mtp_dist.training import trainer as loop

    config = load_resolved(path)
    recorder = Recorder()
    topology = initialize_topology(config, select_device(config))
    engine = build_engine(config, topology)
    engine.train_step = recorder.takes(STEP, engine.train_step)  # type: ignore[method-assign]
    engine.evaluate = recorder.takes(VALIDATION, engine.evaluate)  # type: ignore[method-assign]
    save = recorder.takes(SAVE, lambda *_: None)
    with patch.object(loop, "time", SimpleNamespace(perf_counter=lambda: recorder.now)):
        watchdog = Watchdog(None, int(os.environ["RANK"]))
        trainer = loop.Trainer(config, engine, load_datasets(config), [recorder], save, StopSignals(), watchdog)
        allocate_and_free()
        trainer.fit()
    return recorder.timed
