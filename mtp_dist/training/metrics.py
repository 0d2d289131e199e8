"""What one training step and one validation report."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class HeadMetrics:
    """Per-head results over the valid targets of a global batch or a validation set, head 1 first.

    In a training step only those of the heads that the schedule lets learn.
    """

    losses: tuple[float, ...]
    """Mean cross-entropy of each head, in nats; 0 for a head without a valid target."""
    accuracies: tuple[float, ...]
    """Share of the targets that are the head's most probable token."""
    total: float
    """What is minimized but for the z-loss: sum_k w_k * L_k and the auxiliary losses, in nats."""
    distillation: tuple[float, ...] = ()
    """Mean cross-entropy of heads 2, 3, .. to head 1's distribution, in nats; empty without distillation."""
    token_order: float | None = None
    """Mean cross-entropy to the order of the upcoming tokens, in nats; None where it is not predicted."""


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer update. The same values on every rank."""

    step: int
    """Updates made so far, this one included."""
    heads: HeadMetrics
    grad_norm: float
    """Global norm of the gradient before clipping."""
    learning_rate: float
    tokens: int
    """Trained positions of the step: global batch size * sequence length."""
    seconds: float
    """Wall time of the step."""
    epochs: Mapping[str, float]
    """By training source: how many times it has been read so far."""
    peak_memory: int
    """Largest memory of one rank so far, in bytes: allocated on the GPU, resident in RAM on the CPU."""
