"""Hooks of the training loop."""

from collections.abc import Sequence
from contextlib import ExitStack
from enum import Enum, auto

from mtp_dist.metrics import HeadMetrics, StepMetrics


class StopReason(Enum):
    """A reason for the end of training."""

    LAST_STEP = auto()
    SIGNAL = auto()
    """A rank received a signal; all ranks stopped after the same step and a checkpoint."""
    SPIKE = auto()
    """The loss jumped, and `train.spike_rollback` is set."""
    SKIPS = auto()
    """`train.max_skipped_steps` steps in a row had a gradient with NaN or Inf."""


class Callback:
    """An observer of the training loop; a subclass overrides the hooks it needs."""

    def on_start(self, completed_steps: int) -> None:
        """Run before the first step."""

    def on_step(self, metrics: StepMetrics) -> None:
        """Run after each step, including skipped ones."""

    def on_validation(self, step: int, name: str | None, heads: HeadMetrics) -> None:
        """Run after each validation on the set of that name; `step` steps were completed before it."""

    def on_spike(self, step: int, text: str) -> None:
        """Run after a step whose loss was a spike; text: how large it was."""

    def on_rollback(self, completed_steps: int) -> None:
        """Run after a rollback: the next step is `completed_steps` + 1. Without a checkpoint no step is repeated."""

    def on_stop(self, step: int, signal: int) -> None:
        """Run after the last step before a signal stops the run, before its checkpoint and its validation."""

    def on_end(self, reason: StopReason | None) -> None:
        """Run after the last step; reason: None if an exception ends the run."""


class CallbackList(Callback):
    """Several callbacks as one; each hook calls them in their order."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._callbacks = callbacks

    def on_start(self, completed_steps: int) -> None:
        for callback in self._callbacks:
            callback.on_start(completed_steps)

    def on_step(self, metrics: StepMetrics) -> None:
        for callback in self._callbacks:
            callback.on_step(metrics)

    def on_validation(self, step: int, name: str | None, heads: HeadMetrics) -> None:
        for callback in self._callbacks:
            callback.on_validation(step, name, heads)

    def on_spike(self, step: int, text: str) -> None:
        for callback in self._callbacks:
            callback.on_spike(step, text)

    def on_rollback(self, completed_steps: int) -> None:
        for callback in self._callbacks:
            callback.on_rollback(completed_steps)

    def on_stop(self, step: int, signal: int) -> None:
        for callback in self._callbacks:
            callback.on_stop(step, signal)

    def on_end(self, reason: StopReason | None) -> None:
        """End every callback, the last one first, even if another one fails."""
        with ExitStack() as ends:
            for callback in self._callbacks:
                ends.callback(callback.on_end, reason)
