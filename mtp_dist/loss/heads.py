"""The loss of all heads for one micro-batch, from the trunk's output to a scalar."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtp_dist.loss.cross_entropy import count_correct, cross_entropy_sum, squared_normalizer_sum
from mtp_dist.loss.linear_cross_entropy import LossSums, Vocabulary


@dataclass(frozen=True)
class Heads:
    """What the loss asks of the heads, k = 1..n."""

    hidden: Callable[[int, Tensor], Tensor]
    """(k, z `[S, B, D]`) -> the normalized hidden states of head k, shaped like z; both are `[S/TP, B, D]` under
    sequence parallelism."""
    logits: Callable[[int, Tensor], Tensor]
    """(k, its hidden states) -> this rank's logits `[S, B, V/TP]`, -inf at padded entries."""
    weights: Sequence[Tensor]
    """What `hidden` computes with and training changes."""
    unembeddings: Sequence[Tensor]
    """This rank's rows `[V/TP, D]` for each head; n times the same tensor where it is shared."""


@dataclass(frozen=True)
class Objective:
    """The loss of a micro-batch: sum_k scales[k-1] * (cross-entropies of head k + z_loss * squared normalizers)."""

    targets: Tensor
    """`[n, B, S]`."""
    scales: Tensor
    """`[n]`: head k's weight over the number of its valid targets in the global batch, times the micro-batches and
    data-parallel ranks that the engine averages over."""
    vocabulary: Vocabulary
    z_loss: float = 0.0
    chunk_tokens: int | None = None
    """Tokens whose logits the sequential modes hold at once; from a memory budget when None."""
    sequence_parallel: bool = False

    @property
    def num_heads(self) -> int:
        return len(self.targets)

    def loss(self, sums: Sequence[LossSums]) -> Tensor:
        """The scalar, from what each head has summed."""
        losses = torch.stack([head.cross_entropy for head in sums])
        if self.z_loss:
            losses = losses + self.z_loss * torch.stack([head.squared_normalizer for head in sums])
        return (self.scales * losses).sum()


@dataclass
class HeadSums:
    """What the heads have summed over micro-batches, each `[n]`, fp64."""

    losses: Tensor
    correct: Tensor
    targets: Tensor

    @classmethod
    def zeros(cls, heads: int, device: torch.device) -> "HeadSums":
        return cls(*(torch.zeros(heads, dtype=torch.float64, device=device) for _ in range(3)))

    def record(self, objective: Objective, sums: Sequence[LossSums]) -> Tensor:
        """Add one micro-batch's losses, hits and valid targets; returns its loss."""
        self.losses += torch.stack([head.cross_entropy.detach() for head in sums])
        self.correct += torch.stack([head.correct for head in sums])
        self.targets += (objective.targets != objective.vocabulary.ignore_index).sum((1, 2))
        return objective.loss(sums)


def naive_heads_loss(heads: Heads, trunk_output: Tensor, objective: Objective, sums: HeadSums) -> Tensor:
    """The loss, a scalar, by Megatron-core's cross-entropy; all heads' logits stay alive for the backward pass.

    Adds the micro-batch's losses, hits and valid targets to `sums`.
    """
    ignore_index = objective.vocabulary.ignore_index
    head_sums = []
    for distance, targets in enumerate(objective.targets, 1):
        logits = heads.logits(distance, heads.hidden(distance, trunk_output))
        targets = targets.T.contiguous()
        # The cross-entropy comes last: it overwrites the logits.
        correct = count_correct(logits, targets)
        normalizer = squared_normalizer_sum(logits, targets, ignore_index) if objective.z_loss else logits.new_zeros(())
        head_sums.append(LossSums(cross_entropy_sum(logits, targets, ignore_index), normalizer, correct))
    return sums.record(objective, head_sums)
