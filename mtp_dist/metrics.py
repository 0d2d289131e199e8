"""Metrics of a training step and of a validation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class HeadMetrics:
    """Per-head results over the valid targets of a global batch or a validation set, head 1 first.

    Those of a training step are of the heads that are active in its schedule.
    """

    losses: tuple[float | None, ...]
    """Mean cross-entropy of each head, in nats; None for a head without a valid target."""
    accuracies: tuple[float | None, ...]
    """Fraction of the targets that are the head's most probable token; None for a head without a valid target."""
    total: float | None
    """Minimized objective without the z-loss, in nats: sum_k w_k * L_k over the heads that have a loss, and the
    auxiliary losses; None if no head has a loss."""
    distillation: tuple[float | None, ...] = ()
    """Mean cross-entropy of heads 2, 3, .. to head 1's distribution, in nats; empty without distillation."""
    total_variation: tuple[float | None, ...] = ()
    """Mean total variation distance of heads 2, 3, .. to head 1's distribution, from 0 to 1; empty if it is not in the
    loss."""
    token_order: float | None = None
    """Mean cross-entropy to the order of the upcoming tokens, in nats; None if it is not predicted or head 1 has no
    valid target."""
    draft_acceptance_rates: tuple[float | None, ...] = ()
    """Fraction of a greedy decoder's forward passes along the text in which head 1 accepts all drafts up to distance
    2, 3, ..; None if it verifies none, empty for a training step."""

    @property
    def expected_tokens_per_forward(self) -> float | None:
        """Tokens per forward pass of a greedy decoder with all heads' drafts; None if no draft is verified."""
        rates = [rate for rate in self.draft_acceptance_rates if rate is not None]
        return 1 + sum(rates) if rates else None


@dataclass(frozen=True)
class RankStats:
    """Measurements of one rank over the steps since the last logged one."""

    stage: int
    """Pipeline stage of the rank, from 0."""
    waiting_seconds: float
    """Seconds of waiting for samples before the steps."""
    busy_seconds: float
    """Seconds of forward and backward passes of its stage, with the collectives within the stage."""
    schedule_seconds: float
    """Seconds of all micro-batches, with the wait for other stages."""
    peak_memory: int
    """Peak memory since the last logged step, in bytes: allocated on the GPU, resident in RAM on the CPU."""


@dataclass(frozen=True)
class StepMetrics:
    """Metrics of one step, also a skipped one, the same on every rank except for `seconds`."""

    step: int
    """Number of completed steps, this one included."""
    heads: HeadMetrics
    grad_norm: float
    """Global norm of the gradient before clipping; NaN or Inf if the step was skipped."""
    grad_norms_by_module: Mapping[str, float]
    """Gradient norms of the parts of the model before clipping, see `StepResult`."""
    learning_rate: float
    tokens: int
    """Trained positions of the step: global batch size * sequence length."""
    seconds: float
    """Wall time since the last step ended, without validation and saves in between."""
    epochs: Mapping[str, float]
    """Number of times that each training source has been read so far, by its name."""
    ranks: Sequence[RankStats]
    """Measurements by rank; empty if the step is not logged."""
    learning_rates: Mapping[str, float] = field(default_factory=dict)
    """Learning rate of each part of the model that `optimizer.multipliers` names."""
    skipped: str | None = None
    """Reason for which the step changed no parameter; None if it did."""

    @property
    def peak_memory(self) -> int:
        """Largest peak memory of a rank, in bytes."""
        return max(rank.peak_memory for rank in self.ranks)
