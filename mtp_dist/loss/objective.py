"""The parts of a micro-batch's loss: the heads, their targets, their loss weights and their sums."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Heads(Protocol):
    """Prediction heads as their loss sees them, all or some of heads 1..n; `mtp_dist.model.heads.PredictionHeads` is
    the implementation.

    Hidden states `[S, B, D]` are `[S/TP, B, D]` under sequence parallelism. `context` is what the heads need of the
    micro-batch; the loss only passes it on.
    """

    @property
    def chains(self) -> Sequence[Sequence[int]]:
        """Heads in the order in which they run: the first head of a chain reads the trunk's output z, each other head
        the hidden states, before the final norm, of the head before it."""

    @property
    def detached(self) -> Collection[int]:
        """Heads that pass no gradient on to their input."""

    def pre_norm_hidden(self, head: int, inputs: Tensor, context: Any) -> Tensor:
        """Return a head's hidden states before the final norm, shaped like its input (see `chains`)."""

    def normalize(self, head: int, hidden: Tensor, context: Any) -> Tensor:
        """Return the normalized hidden states of a head, which its unembedding reads."""

    def logits(self, head: int, normalized: Tensor, context: Any) -> Tensor:
        """Return this rank's logits `[S, B, V/TP]` of the whole sequence, -inf at padded tokens."""

    def trained_parameters(self, context: Any) -> list[Tensor]:
        """Return the parameters of `pre_norm_hidden` and `normalize` that training changes."""

    def unembedding_weights(self, context: Any) -> Mapping[int, Tensor]:
        """Return this rank's rows `[V/TP, D]` by head: the same tensor for all that share and train it, one that
        requires no gradient for a head that does not train it."""

    @property
    def token_order_weight(self) -> Tensor | None:
        """This rank's rows `[V/TP, D]` of the token-order unembedding, which reads what head 1's reads."""


@dataclass(frozen=True)
class Vocabulary:
    """The vocabulary: its size, its sharding over ranks and the target that does not count."""

    size: int
    """Tokens over all ranks; rows of the weights beyond them are padding, which cannot be predicted."""
    ignore_index: int
    """Target that does not count."""
    group: dist.ProcessGroup
    """Ranks that share the vocabulary, each with the same number of rows, in rank order."""


class SoftTargets(NamedTuple):
    """A distribution over N tokens of the vocabulary for each of T positions."""

    token_ids: Tensor
    """`[T, N]`, int64, over the whole vocabulary. An id that occurs twice counts twice."""
    probabilities: Tensor
    """`[T, N]`, fp32; 0 throughout for a position that does not count."""
    total_variation: bool = False
    """Compute the total variation distance to it too; then no id may occur twice."""

    def at(self, positions: slice) -> "SoftTargets":
        return self._replace(token_ids=self.token_ids[positions], probabilities=self.probabilities[positions])


class HeadSums:
    """Sums over the valid targets in named columns: row k - 1 is head k's, the last row that of token-order prediction.

    All columns are views of one tensor, to which the loss kernel adds and which a collective sums:
    - cross_entropy: in nats;
    - log_z_squared: squared log of the softmax's denominator, for the z-loss (PaLM, arXiv:2204.02311, section 5);
    - correct: targets more probable than every other token (ties count as wrong);
    - soft_cross_entropy: in nats, over the positions that have soft targets;
    - total_variation: distance of the prediction to the soft targets, from 0 to 1, over the positions that have them;
    - targets: number of valid targets.
    """

    COLUMNS = ("cross_entropy", "log_z_squared", "correct", "soft_cross_entropy", "total_variation", "targets")

    def __init__(self, tensor: Tensor) -> None:
        """Name the columns of `tensor`, `[n + 1, columns]`."""
        self.tensor = tensor
        self.cross_entropy, self.log_z_squared, self.correct, *others = tensor.unbind(-1)
        self.soft_cross_entropy, self.total_variation, self.targets = others


@dataclass(frozen=True)
class Distillation:
    """The distillation of head 1 into heads 2..n."""

    weight: float
    """Weight of the cross-entropy to head 1's distribution, next to that of a head's own targets."""
    total_variation: float
    """Weight of the total variation distance to it."""
    top: int
    """Number of head 1's most probable tokens that make up its distribution."""
    distances: Sequence[int]
    """Prediction distances of heads 1..n."""


@dataclass(frozen=True)
class Objective:
    """The loss of a micro-batch: the sum over the rows of its HeadSums of `scales` times the row's loss.

    A head's loss is cross_entropy + z_loss * log_z_squared + distillation.weight * soft_cross_entropy +
    distillation.total_variation * total_variation; that of token order is its soft_cross_entropy.
    """

    targets: Tensor
    """`[n, B, S]`."""
    active_heads: int
    """Heads 1..active_heads run; the others have no loss."""
    scales: Tensor
    """`[n + 1]`, by row of HeadSums: the loss weight over the number of valid targets (for token order head 1's) in the
    global batch, times the micro-batches and data-parallel ranks over which the engine averages."""
    vocabulary: Vocabulary
    z_loss: float = 0.0
    chunk_tokens: int | None = None
    """Positions whose logits the sequential modes hold at once; from a memory budget if None."""
    sequence_parallel: bool = False
    distillation: Distillation | None = None
    token_order: SoftTargets | None = None
    """Order of the upcoming tokens at the `S * B` positions."""
    on_logits: Callable[[int, slice, Tensor], None] | None = None
    """Gets each head's number, some of the `S * B` positions and this rank's logits there, which it must not change."""

    def active(self, chain: Sequence[int]) -> list[int]:
        """Return the active heads of a chain."""
        return [head for head in chain if head <= self.active_heads]

    def soft_weights(self, head: int) -> tuple[float, float]:
        """Return the weights of the cross-entropy and of the total variation distance to head 1's distribution."""
        if head == 1 or self.distillation is None:
            return 0.0, 0.0
        return self.distillation.weight, self.distillation.total_variation

    def zero_sums(self, dtype: torch.dtype) -> HeadSums:
        """Return the sums of a micro-batch with hidden states of that dtype before any head has run."""
        shape = len(self.scales), len(HeadSums.COLUMNS)
        return HeadSums(self.scales.new_zeros(shape, dtype=torch.promote_types(dtype, torch.float32)))

    def loss(self, sums: HeadSums) -> Tensor:
        """Return the scalar that training minimizes."""
        losses = sums.cross_entropy + self.z_loss * sums.log_z_squared
        if self.distillation:
            losses = losses + self.distillation.weight * sums.soft_cross_entropy
            losses = losses + self.distillation.total_variation * sums.total_variation
        return (self.scales * torch.cat([losses[:-1], sums.soft_cross_entropy[-1:]])).sum()
