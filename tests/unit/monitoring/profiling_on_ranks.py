"""Two trainings on every rank, one of them profiled, and the parts that the watchdog is told of."""

from pathlib import Path
from typing import Any

from mtp_dist.metrics import StepMetrics
from mtp_dist.monitoring.callback import Callback
from tests.tiny import load_resolved


class Learned(Callback):
    def __init__(self) -> None:
        self.steps: list[tuple[Any, float]] = []

    def on_step(self, metrics: StepMetrics) -> None:
        self.steps.append((metrics.heads, metrics.grad_norm))


def train_with_and_without(path: Path) -> tuple[bool, list[str], list[str]]:
    """Whether both learned the same, what the profiler said, and the watchdog's parts of one."""
    from mtp_dist.data.datasets import load_datasets
    from mtp_dist.distributed.device import select_device
    from mtp_dist.distributed.topology import initialize_topology
    from mtp_dist.engine.engine import build_engine
    from mtp_dist.monitoring.profiling import profiling_callbacks
    from mtp_dist.training.stopping import StopSignals
    from mtp_dist.training.trainer import Trainer
    from mtp_dist.training.watchdog import Watchdog

    config = load_resolved(path)
    topology = initialize_topology(config, select_device(config))
    said: list[str] = []
    parts: list[str] = []

    class Listening(Watchdog):
        def enter(self, part: str) -> None:
            parts.append(part)
            super().enter(part)

    def train(*callbacks: Callback) -> list[tuple[Any, float]]:
        parts.clear()
        engine = build_engine(config, topology)
        learned = Learned()
        datasets, told = load_datasets(config), [learned, *callbacks]
        watchdog = Listening(None, topology.rank)
        Trainer(config, engine, datasets, told, lambda *_: None, StopSignals(), watchdog).fit()
        return learned.steps

    same = train() == train(*profiling_callbacks(config, topology, False, said.append))
    return same, said, parts
