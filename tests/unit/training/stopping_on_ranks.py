"""A training on every rank, in which signals reach some of them."""

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mtp_dist.metrics import StepMetrics
from mtp_dist.monitoring.callback import Callback, StopReason
from mtp_dist.training.stopping import StopSignals
from mtp_dist.training.watchdog import Watchdog
from tests.tiny import load_resolved


class Events(Callback):
    """Records the events of a rank, and lets a signal reach it during the step `signalled_in`."""

    def __init__(self, signals: StopSignals, signalled_in: int | None) -> None:
        self.signals = signals
        self.signalled_in = signalled_in
        self.events: list[str] = []

    def on_step(self, metrics: StepMetrics) -> None:
        self.events.append(f"step {metrics.step}")
        if metrics.step + 1 == self.signalled_in:
            self.signals.received = signal.SIGUSR1

    def on_stop(self, step: int, number: int) -> None:
        self.events.append(f"stop {step} by {signal.Signals(number).name}")

    def on_validation(self, step: int, *_: Any) -> None:
        self.events.append(f"validation {step}")


def train(path: Path, signalled_in: tuple[int | None, ...]) -> tuple[bool, str]:
    """Return whether the training reached its last step, and the events."""
    from mtp_dist.data.datasets import load_datasets
    from mtp_dist.distributed.topology import new_gloo_groups
    from mtp_dist.training.trainer import Trainer
    from tests.engines import open_engine

    config, signals = load_resolved(path), StopSignals()
    engine, datasets = open_engine(config), load_datasets(config)
    callback = Events(signals, signalled_in[int(os.environ["RANK"])])
    saver = SimpleNamespace(save=lambda state, last: callback.events.append(f"save {state.step}"), join=lambda: None)
    watchdog, group = Watchdog(None, engine.topology.rank), new_gloo_groups(engine.topology).all
    trainer = Trainer(config, engine, datasets, saver, [callback], signals, watchdog, group)  # type: ignore[arg-type]
    return trainer.fit().reason is StopReason.LAST_STEP, ", ".join(callback.events)
