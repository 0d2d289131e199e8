"""What it costs to measure, to watch and to log a training.

Twice: as the difference between steps with and without it, which has all of it and the noise of whole steps, and as the
time that passes within it, which is precise and knows nothing of what it does to the rest.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from deepspeed.runtime.pipe.engine import PipelineEngine
from rich.table import Table

from mtp_dist.bench.measure import paired_seconds, processor_name, usable_cores
from mtp_dist.config import Config
from mtp_dist.data.dataloader import Batches
from mtp_dist.data.datasets import load_datasets
from mtp_dist.distributed.device import device_name
from mtp_dist.distributed.topology import Topology
from mtp_dist.engine.engine import TrainingEngine, build_engine
from mtp_dist.engine.optimizer import learning_rate
from mtp_dist.loss.schedule import head_schedule
from mtp_dist.monitoring.callback import StopReason
from mtp_dist.monitoring.rank0 import rank0_callbacks
from mtp_dist.planner.flops import parameter_counts
from mtp_dist.training.stopping import StopSignals
from mtp_dist.training.trainer import Trainer
from mtp_dist.training.watchdog import Watchdog


@dataclass
class _Stopwatch:
    seconds: float = 0.0

    def of(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, whose time is added."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - started

        return timed

    def of_all(self, functions: dict[type, Callable[..., Any]]) -> dict[type, Callable[..., Any]]:
        return {name: self.of(function) for name, function in functions.items()}


@contextmanager
def _timed_instructions(stopwatch: _Stopwatch) -> Iterator[None]:
    """DeepSpeed's own of the engines that are built within, without what is wrapped around them."""
    own = PipelineEngine._INSTRUCTION_MAP
    PipelineEngine._INSTRUCTION_MAP = stopwatch.of_all(own)
    try:
        yield
    finally:
        PipelineEngine._INSTRUCTION_MAP = own


@contextmanager
def _unwatched(engine: TrainingEngine) -> Iterator[None]:
    """DeepSpeed's instructions as they are, and nothing measured."""
    pipeline, watch, clock = engine.pipeline, engine.gradient_monitor, engine.clock
    wrapped = pipeline._INSTRUCTION_MAP
    pipeline._INSTRUCTION_MAP = PipelineEngine._INSTRUCTION_MAP
    nothing = SimpleNamespace(
        modules=(),
        squared_norms=watch.squared_norms.new_empty(0),
        fault=watch.squared_norms.new_zeros(()),
        add_fault=lambda _: None,
    )
    engine.gradient_monitor = nothing  # type: ignore[assignment]
    engine.clock = SimpleNamespace(begin=lambda: None, seconds=lambda: (0.0, 0.0))  # type: ignore[assignment]
    try:
        yield
    finally:
        pipeline._INSTRUCTION_MAP, engine.gradient_monitor, engine.clock = wrapped, watch, clock


def _training(
    config: Config, topology: Topology, folder: str, steps: int, watchdog: Watchdog
) -> tuple[Trainer, Batches]:
    """As a run in `folder` has it."""
    config = config.model_copy(
        update={
            "run": config.run.model_copy(update={"output_dir": folder}),
            "train": config.train.model_copy(update={"steps": steps}),
        }
    )
    datasets = load_datasets(config)
    engine = build_engine(config, topology)
    callbacks: list[Any] = []
    if topology.rank == 0:
        callbacks = rank0_callbacks(
            config, topology, datasets.validation, [""] * topology.world_size, completed_steps=0
        )
    trainer = Trainer(config, engine, datasets, callbacks, lambda *_: None, StopSignals(), watchdog)
    return trainer, Batches(config, topology, datasets)


def measure_monitoring(config: Config, topology: Topology, rounds: int) -> dict[str, Any]:
    """Medians over the rounds, each of `log.every` steps with and as many without, on every rank."""
    instructions, wrapped, training = (_Stopwatch() for _ in range(3))
    with tempfile.TemporaryDirectory() as folder, Watchdog(config.run.step_timeout, topology.rank) as watchdog:
        with _timed_instructions(instructions):
            trainer, batches = _training(config, topology, folder, 2 * (rounds + 1) * config.log.every, watchdog)
        engine = trainer.engine
        made = 0
        elsewhere: list[float] = []

        def with_all() -> None:
            nonlocal made
            for stopwatch in (instructions, wrapped, training):
                stopwatch.seconds = 0.0
            for _ in range(config.log.every):
                made += 1
                watchdog.enter(f"step {made}")
                metrics, _ = trainer.train_step(made, batches)
                trainer.tell("on_step", metrics)
                trainer.spikes.update(metrics.heads.losses[0])
            elsewhere.append(training.seconds - (wrapped.seconds - instructions.seconds))

        def without() -> None:
            nonlocal made
            with _unwatched(engine):
                for _ in range(config.log.every):
                    made += 1
                    schedule = learning_rate(trainer.config, made), head_schedule(trainer.config, made)
                    engine.train_step(batches.next_train_batch(), *schedule)

        engine.pipeline._INSTRUCTION_MAP = wrapped.of_all(engine.pipeline._INSTRUCTION_MAP)
        engine.train_step = training.of(engine.train_step)  # type: ignore[method-assign]
        batches.next_train_batch = training.of(batches.next_train_batch)  # type: ignore[method-assign]
        with_all()
        without()
        seconds = paired_seconds({"with": with_all, "without": without}, rounds, topology.device)
        trainer.tell("on_end", StopReason.LAST_STEP)
        batches.close()
    within = sum(seconds["with"]) - sum(elsewhere[1:])
    ratios = [one / other for one, other in zip(seconds["with"], seconds["without"], strict=True)]
    return {
        "machine": {"processor": processor_name(), "cores": usable_cores(), "device": device_name(topology.device)},
        "layout": topology.degrees,
        "parameters": parameter_counts(config).total,
        "rounds": rounds,
        "steps_of_a_round": config.log.every,
        "step_seconds": {name: statistics.median(of_name) / config.log.every for name, of_name in seconds.items()},
        "seconds_within": within / rounds / config.log.every,
        "share_within": within / sum(seconds["with"]),
        "ratio": statistics.median(ratios),
        "ratio_quartiles": statistics.quantiles(ratios, n=4) if rounds > 1 else ratios,
        "ratios": ratios,
    }


def table(result: dict[str, Any]) -> Table:
    shown = Table(title=f"Monitoring: medians of {result['rounds']} rounds of {result['steps_of_a_round']} steps")
    for column in ("seconds a step, with", "without", "ratio", "its quartiles", "ms within it", "share"):
        shown.add_column(column)
    seconds = (f"{result['step_seconds'][name]:.4f}" for name in ("with", "without"))
    low, high = result["ratio_quartiles"][0], result["ratio_quartiles"][-1]
    within = f"{result['seconds_within'] * 1e3:.1f}", f"{result['share_within']:.2%}"
    shown.add_row(*seconds, f"{result['ratio']:.4f}", f"{low:.4f} to {high:.4f}", *within)
    return shown
