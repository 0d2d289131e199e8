"""Training on every rank with and without a profiler."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mtp_dist.metrics import StepMetrics
from mtp_dist.monitoring.callback import Callback
from tests.tiny import load_resolved


class Recorder(Callback):
    def __init__(self) -> None:
        self.steps: list[tuple[Any, float]] = []

    def on_step(self, metrics: StepMetrics) -> None:
        self.steps.append((metrics.heads, metrics.grad_norm))


def profiling_changes_nothing(path: Path) -> tuple[bool, list[str]]:
    """Return whether both trainings computed the same, and the watchdog's phases of one."""
    from mtp_dist.data.datasets import load_datasets
    from mtp_dist.distributed.device import select_device
    from mtp_dist.distributed.topology import initialize_topology, new_gloo_groups
    from mtp_dist.engine.engine import build_engine
    from mtp_dist.monitoring.profiling import profiling_callbacks
    from mtp_dist.training.stopping import StopSignals
    from mtp_dist.training.trainer import Trainer
    from mtp_dist.training.watchdog import Watchdog

    config = load_resolved(path)
    topology = initialize_topology(config, select_device(config))
    phases, groups = list[str](), new_gloo_groups(topology)

    class RecordingWatchdog(Watchdog):
        def enter(self, phase: str) -> None:
            phases.append(phase)
            super().enter(phase)

    def train(*callbacks: Callback) -> list[tuple[Any, float]]:
        phases.clear()
        engine, datasets = build_engine(config, topology), load_datasets(config)
        recorder, watchdog = Recorder(), RecordingWatchdog(None, topology.rank)
        saver = SimpleNamespace(save=lambda *_: None, join=lambda: None)
        observers = [recorder, *callbacks]
        Trainer(config, engine, datasets, saver, observers, StopSignals(), watchdog, groups.all).fit()
        return recorder.steps

    return train() == train(*profiling_callbacks(config, topology, False)), phases
