"""What counts as the time and the memory of a step, by a clock in which each part takes a time of its own."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from mtp_dist.data.datasets import load_datasets
from mtp_dist.distributed.device import select_device
from mtp_dist.distributed.topology import initialize_topology, new_gloo_groups
from mtp_dist.engine.engine import build_engine
from mtp_dist.metrics import StepMetrics
from mtp_dist.monitoring.callback import Callback
from mtp_dist.training import trainer as loop
from mtp_dist.training.stopping import StopSignals
from mtp_dist.training.watchdog import Watchdog
from tests.integration import jobs
from tests.ranks import Ranks
from tests.tiny import load_resolved

STEP, CALLBACK, VALIDATION, SAVE = 1.0, 10.0, 100.0, 1000.0
"""Seconds."""
LARGE = 400 << 20
"""Bytes that are allocated while the model is built, and by a callback after step 2."""


class Recorder(Callback):
    """A clock, and the metrics of the steps."""

    def __init__(self) -> None:
        self.now = 0.0
        self.steps: list[StepMetrics] = []

    def takes(self, seconds: float, function: Any) -> Any:
        """Return the function, delayed by the clock."""

        def timed(*arguments: Any) -> Any:
            self.now += seconds
            return function(*arguments)

        return timed

    def on_step(self, metrics: StepMetrics) -> None:
        self.now += CALLBACK
        self.steps.append(metrics)
        if metrics.step == 2:
            torch.ones(LARGE, dtype=torch.uint8)


def train(path: Path) -> list[StepMetrics]:
    """On a rank: train with delayed steps, validations, saves and callbacks."""
    config, recorder = load_resolved(path), Recorder()
    topology = initialize_topology(config, select_device(config))
    engine = build_engine(config, topology)
    engine.train_step = recorder.takes(STEP, engine.train_step)  # type: ignore[method-assign]
    engine.evaluate = recorder.takes(VALIDATION, engine.evaluate)  # type: ignore[method-assign]
    saver: Any = SimpleNamespace(save=recorder.takes(SAVE, lambda *_: None), join=lambda: None)
    group, watchdog = new_gloo_groups(topology).all, Watchdog(None, topology.rank)
    with patch.object(loop, "time", SimpleNamespace(perf_counter=lambda: recorder.now)):
        trainer = loop.Trainer(config, engine, load_datasets(config), saver, recorder, StopSignals(), watchdog, group)
        torch.ones(LARGE, dtype=torch.uint8)
        trainer.fit()
    return recorder.steps


@pytest.fixture(scope="module")
def steps(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> list[StepMetrics]:
    often, folder = {"every": 2}, tmp_path_factory.mktemp("timed")
    path = jobs.write_config(folder, train={"steps": 5, "validate_every": 2}, checkpoint=often, log=often)
    return ranks.run(1, train, path)[0]


def test_all_seconds_except_those_of_validations_and_saves_count(steps: list[StepMetrics]) -> None:
    assert [step.seconds for step in steps] == [STEP] + 4 * [CALLBACK + STEP]


def test_peak_memory_is_that_of_an_interval_without_the_build_of_the_model(steps: list[StepMetrics]) -> None:
    first, second, fourth, fifth = (step.peak_memory for step in steps if step.ranks)
    assert fourth > max(first, second, fifth) + LARGE // 2, "the callback allocates after the line of step 2"
