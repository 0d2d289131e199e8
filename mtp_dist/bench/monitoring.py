"""Seconds of a training step with logs and callbacks, compared with those of one without.

Both train the same model in one process and alternate; what the engine itself measures is part of both.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from mtp_dist.checkpoint.format import RunState
from mtp_dist.checkpoint.saver import CheckpointSaver
from mtp_dist.config import Config
from mtp_dist.data.datasets import load_datasets
from mtp_dist.data.run_sources import RunSources
from mtp_dist.distributed.device import device_name
from mtp_dist.distributed.topology import Topology, new_gloo_groups
from mtp_dist.engine.engine import build_engine
from mtp_dist.metrics import StepMetrics
from mtp_dist.monitoring.callback import Callback, CallbackList
from mtp_dist.monitoring.logs import PACKAGE_LOGGER
from mtp_dist.monitoring.rank0 import rank0_callbacks
from mtp_dist.planner.flops import parameter_counts
from mtp_dist.provenance import processor_name, usable_cores
from mtp_dist.training.stopping import StopSignals
from mtp_dist.training.trainer import Trainer
from mtp_dist.training.watchdog import Watchdog


class _NoCheckpoints(CheckpointSaver):
    """A saver that saves nothing."""

    def save(self, state: RunState, last: bool = False) -> None:
        pass


class _StepTimes(Callback):
    """The times at which the callbacks of each step are done. It must be the last in its list."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step(self, metrics: StepMetrics) -> None:
        self.times.append(time.perf_counter())


def measure_monitoring(config: Config, sources: RunSources, topology: Topology, rounds: int) -> dict[str, Any]:
    """Return medians over the rounds, each of `log.every` steps with logs and callbacks and as many without."""
    steps = config.log.every
    config = config.model_copy(update={"data": config.data.model_copy(update={"validation": ()})})
    engine, datasets, groups = build_engine(config, topology), load_datasets(config, sources), new_gloo_groups(topology)
    saver = _NoCheckpoints(config, engine, groups)
    seconds: dict[str, list[float]] = {"with": [], "without": []}

    def train(config: Config, callbacks: Sequence[Callback]) -> float:
        """Return the seconds of all steps but the first one, which starts the reader and the logs."""
        times = _StepTimes()
        with Watchdog(config.run.step_timeout, topology.rank) as watchdog:
            observers = CallbackList([*callbacks, times])
            Trainer(config, engine, datasets, saver, observers, StopSignals(), watchdog, groups.all).fit()
        return times.times[-1] - times.times[0]

    for number in range(1 + rounds):  # the first round warms up
        for name in sorted(seconds, reverse=number % 2 == 1):
            handlers = list(PACKAGE_LOGGER.handlers)
            # Standard output is for the result.
            with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
                run = config.run.model_copy(update={"output_dir": folder})
                short = config.train.model_copy(update={"steps": steps + 1, "validate_every": None})
                part = config.model_copy(update={"run": run, "train": short})
                callbacks: list[Callback] = []
                if name == "with" and topology.rank == 0:
                    callbacks = rank0_callbacks(part, topology, datasets.validation, [""] * topology.world_size, 0)
                passed = train(part, callbacks)
            PACKAGE_LOGGER.handlers = handlers
            if number:
                seconds[name].append(passed)
    ratios = [one / other for one, other in zip(seconds["with"], seconds["without"], strict=True)]
    return {
        "machine": {"processor": processor_name(), "cores": usable_cores(), "device": device_name(topology.device)},
        "layout": topology.degrees,
        "parameters": parameter_counts(config).total,
        "rounds": rounds,
        "steps_of_a_round": steps,
        "step_seconds": {name: statistics.median(values) / steps for name, values in seconds.items()},
        "ratio": statistics.median(ratios),
        "ratio_quartiles": statistics.quantiles(ratios, n=4) if rounds > 1 else ratios,
        "ratios": ratios,
    }
