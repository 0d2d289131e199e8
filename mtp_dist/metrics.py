"""What one training step and one validation report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class HeadMetrics:
    """Per-head results over the valid targets of a global batch or a validation set, head 1 first.

    In a training step only those of the heads that the schedule lets learn.
    """

    losses: tuple[float | None, ...]
    """Mean cross-entropy of each head, in nats; None for a head without a valid target."""
    accuracies: tuple[float | None, ...]
    """Share of the targets that are the head's most probable token; None likewise."""
    total: float | None
    """Minimized objective without the z-loss, in nats: sum_k w_k * L_k over the heads that have a loss, and the
    auxiliary losses; None if no head has a loss."""
    distillation: tuple[float | None, ...] = ()
    """Mean cross-entropy of heads 2, 3, .. to head 1's distribution, in nats; empty without distillation."""
    token_order: float | None = None
    """Mean cross-entropy to the order of the upcoming tokens, in nats; None if it is not predicted or head 1 has no
    valid target."""


@dataclass(frozen=True)
class RankStats:
    """What one rank measured in the steps since the last logged one."""

    stage: int
    """Its pipeline stage, from 0."""
    waiting_seconds: float
    """For its samples, before a step."""
    busy_seconds: float
    """Forward and backward passes of its stage, with the collectives within it."""
    schedule_seconds: float
    """All micro-batches, with the wait for other stages."""
    peak_memory: int
    """Largest memory since the last logged step, in bytes: allocated on the GPU, resident in RAM on the CPU."""


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer update. The same values on every rank."""

    step: int
    """Updates made so far, this one included."""
    heads: HeadMetrics
    grad_norm: float
    """Global norm of the gradient before clipping; not finite where the step was skipped."""
    grad_norms_by_module: Mapping[str, float]
    """The same of the parts of the model, see `StepResult`."""
    learning_rate: float
    tokens: int
    """Trained positions of the step: global batch size * sequence length."""
    seconds: float
    """Wall time since the last step ended, without validation and saves in between."""
    epochs: Mapping[str, float]
    """By training source: how many times it has been read so far."""
    ranks: Sequence[RankStats]
    """By rank; empty where the step is not to be logged."""
    skipped: str | None = None
    """Why the step changed no weight."""

    @property
    def peak_memory(self) -> int:
        """Of the rank with the largest, in bytes."""
        return max(figures.peak_memory for figures in self.ranks)
